"""Two ranks on gloo against one process: the same answers, gradient, log and checkpoint."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import argv
from safetensors.torch import load_file
from two_ranks import gradient

from configs import load_config
from distill import main
from model import load_model
from runtime import ROOT


def torchrun(*args, ranks=2):
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}',
                        *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout


@pytest.mark.parametrize('budget', [10**6, 25])
def test_gradient_does_not_depend_on_the_number_of_ranks(toy_cfg, tmp_path, budget):
    """Ranks hold 4 and 2 rows, so with a small budget they need different numbers of micro-batches:
    the poorer one runs empty ones, and nothing hangs."""
    torchrun('tests/two_ranks.py', tmp_path / 'g.safetensors', toy_cfg['student'], toy_cfg['teacher'], budget, 'float32')
    got = load_file(tmp_path / 'g.safetensors')
    want, sums, _ = gradient(load_model(toy_cfg['student']), load_model(toy_cfg['teacher']), 10**6, 0, 1)
    assert torch.allclose(got.pop('sums'), sums, rtol=1e-6)
    assert got.keys() == want.keys()
    for name, g in want.items():
        assert (got[name] - g).norm() <= 1e-6 * g.norm(), name


def test_bfloat16_forwards_keep_float32_gradients(toy_cfg, tmp_path):
    """Mixed precision: near the float32 gradient, and reduced in float32."""
    torchrun('tests/two_ranks.py', tmp_path / 'g.safetensors', toy_cfg['student'], toy_cfg['teacher'], 10**6, 'bfloat16')
    got = load_file(tmp_path / 'g.safetensors')
    want, *_ = gradient(load_model(toy_cfg['student']), load_model(toy_cfg['teacher']), 10**6, 0, 1)
    assert all(got[name].dtype == torch.float32 for name in want)
    flat = [torch.cat([d[k].flatten() for k in want]) for d in (got, want)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.98


def test_a_whole_run_on_two_ranks(toy_dir, tmp_path):
    """torchrun through the `config` link: the log agrees with one process, and one process can go on
    from the checkpoint that two ranks wrote."""
    args = argv(toy_dir, tmp_path / 'two', lr=1e-4)
    args[0] = 'config/toy.py'
    out = torchrun('distill.py', *args)
    assert out.count('Avg@2') == 2                        # rank 0 alone speaks
    main(load_config(argv(toy_dir, tmp_path / 'one', lr=1e-4)))
    rows = [[json.loads(line) for line in (tmp_path / name / 'log.jsonl').read_text().splitlines()]
            for name in ('one', 'two')]
    assert len(rows[0]) == len(rows[1]) == 5
    for a, b in zip(*(r[1:] for r in rows), strict=True):
        for key in ('loss', 'rep/cos', 'grad_norm', 'len/mean', 'acc/rollout', 'finish'):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    for a, b in zip(load_model(tmp_path / 'one/last').parameters(), load_model(tmp_path / 'two/last').parameters(),
                    strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_an_error_on_two_ranks_ends_both(toy_dir, tmp_path):
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                        'distill.py', *argv(toy_dir, tmp_path / 'x', prompts_per_step=1)],
                       cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert p.returncode != 0 and 'prompts_per_step=1 is fewer than the 2 ranks' in p.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / 'distill.py') not in p.stderr
