"""Two ranks on gloo against one process: the same answers, gradient, log and checkpoint."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY_SUMS, argv, log_of, rounding, tiny_model
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from two_ranks import gradient

from configs import load_config
from distill import main
from formats.huggingface import load_model, save_model
from support.runtime import ROOT, Env, all_reduce, gathered, shard


def torchrun(*args, code=0):
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                        *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert p.returncode == code, p.stdout + p.stderr
    return p.stdout


def on_two_ranks(tmp_path, student, teacher, budget, dtype, recompute, opd='none'):
    """A gradient (two_ranks.py) -> {name: gradient}, sums."""
    file = tmp_path / 'gradient.safetensors'
    torchrun('tests/two_ranks.py', 'gradient', file, student, teacher, budget, dtype, recompute, opd)
    tensors = load_file(file)
    sums = {name.removeprefix('sum '): tensors.pop(name) for name in list(tensors) if name.startswith('sum ')}
    return tensors, sums


def assert_same_gradient(got, want, got_sums, want_sums):
    """Both in one dtype. What is logged is float32 at most, and a sum over fewer than 100 positions."""
    assert got.keys() == want.keys()
    for name, g in want.items():
        assert got[name].dtype == g.dtype and (got[name] - g).norm() <= rounding(g, TINY_SUMS), name
    assert got_sums.keys() == want_sums.keys()
    for name, value in want_sums.items():
        assert (got_sums[name] - value).norm() <= rounding(value.float(), 100), name


@pytest.mark.parametrize('budget, recompute', [(10**6, False), (25, True)])
def test_gradient_does_not_depend_on_the_number_of_ranks(toy_cfg, tmp_path, budget, recompute):
    """Ranks hold 4 and 2 rows, so with a small budget they need different numbers of micro-batches:
    the poorer one runs empty ones, and nothing hangs; blocks recomputed under FSDP included. In float64, where
    a wrong weight of one row in a million would show."""
    got, got_sums = on_two_ranks(tmp_path, toy_cfg['student'], toy_cfg['teacher'], budget, 'float64', recompute)
    student, teacher = (load_model(toy_cfg[side], torch.float64) for side in ('student', 'teacher'))
    want, sums, _ = gradient(student, teacher, 10**6, 0, 1)
    assert_same_gradient(got, want, got_sums, sums)


def test_gradient_in_float32_on_two_ranks(tmp_path):
    """The dtype that a run on CPUs has: as above, within float32's rounding."""
    for name, seed in (('student', 0), ('teacher', 1)):
        save_model(tiny_model(seed), tmp_path / name)
    got, got_sums = on_two_ranks(tmp_path, tmp_path / 'student', tmp_path / 'teacher', 25, 'float32', True)
    want, sums, _ = gradient(load_model(tmp_path / 'student'), load_model(tmp_path / 'teacher'), 10**6, 0, 1)
    assert_same_gradient(got, want, got_sums, sums)


@pytest.mark.parametrize('opd, tied', [('topk', True), ('sampled', False), ('probe', False), ('probe', True)])
def test_output_space_gradient_on_two_ranks(tmp_path, opd, tied):
    """The head's gradient is formed inside its own FSDP group, or, tied, inside the root's; a rank that
    runs an empty micro-batch calls it too. A probe gathers the frozen head and leaves no gradient."""
    for name, seed in (('student', 0), ('teacher', 1)):
        save_model(tiny_model(seed, tied=tied), tmp_path / name)
    got, got_sums = on_two_ranks(tmp_path, tmp_path / 'student', tmp_path / 'teacher', 25, 'float64', True, opd)
    student, teacher = (load_model(tmp_path / name, torch.float64) for name in ('student', 'teacher'))
    want, sums, _ = gradient(student, teacher, 10**6, 0, 1, opd)
    assert sums['statistics'][0] > 0 and ('head.weight' in want) == (opd != 'probe' and not tied)
    assert_same_gradient(got, want, got_sums, sums)


def assert_near_in_bfloat16(got, want, cosine):
    """Float32 gradients of forwards in bf16 against those of forwards in float32: the direction, and the length, for
    a cosine does not see a wrong factor. Each of the 3 or 4 blocks rounds its state about eight times, the way back
    as often: 64 roundings, which add up like a random walk."""
    assert got.keys() == want.keys() and all(g.dtype == torch.float32 for g in got.values())
    ours, exact = (torch.cat([grads[name].flatten() for name in want]) for grads in (got, want))
    assert abs(ours.norm() - exact.norm()) <= rounding(exact.bfloat16(), 64**0.5)
    assert torch.cosine_similarity(ours, exact, dim=0) > cosine


@pytest.mark.parametrize('opd', ['topk', 'probe'])
def test_output_space_gradient_in_bfloat16(tmp_path, opd):
    """What GPUs run: bf16 weights gathered for the head, fp32 chunks, fp32 reduction. The layers of the
    hidden-state term are 1 and 3; with a probe the frozen head is gathered without a gradient."""
    for name, seed in (('student', 0), ('teacher', 1)):
        save_model(tiny_model(seed), tmp_path / name)
    got, got_sums = on_two_ranks(tmp_path, tmp_path / 'student', tmp_path / 'teacher', 25, 'bfloat16', False, opd)
    student, teacher = (load_model(tmp_path / name) for name in ('student', 'teacher'))
    want, sums, _ = gradient(student, teacher, 10**6, 0, 1, opd)
    assert all(torch.allclose(got_sums[name], value, rtol=0.1, atol=0.02) for name, value in sums.items())
    assert_near_in_bfloat16(got, want, 0.9)  # a reward is a small difference of two rounded log-probabilities


def test_bfloat16_forwards_keep_float32_gradients(toy_cfg, tmp_path):
    """Mixed precision: near the float32 gradient, and reduced in float32."""
    got, _ = on_two_ranks(tmp_path, toy_cfg['student'], toy_cfg['teacher'], 10**6, 'bfloat16', False)
    want, *_ = gradient(load_model(toy_cfg['student']), load_model(toy_cfg['teacher']), 10**6, 0, 1)
    assert_near_in_bfloat16(got, want, 0.98)


KEYS = ('loss', 'rep/cos', 'grad_norm', 'len/mean', 'acc/rollout', 'finish')


def assert_same_run(a, b):
    rows = log_of(a), log_of(b)
    assert [[r['step'] for r in rs] for rs in rows] == [[0, 1, 2, 3, 4]] * 2
    for x, y in zip(*(rs[1:] for rs in rows), strict=True):
        assert [x[k] for k in KEYS] == pytest.approx([y[k] for k in KEYS], rel=1e-5)
        assert x.get('adam/below_eps') == pytest.approx(y.get('adam/below_eps'), abs=1e-3)
    for p, q in zip(load_model(a / 'last').parameters(), load_model(b / 'last').parameters(), strict=True):
        assert (p - q).norm() <= 1e-5 * p.norm()


def assert_same_answers(a, b):
    """The ranks' answers are gathered into the files that one rank writes: none twice, none missing, in one order."""
    files = [{file.name: file.read_bytes() for file in (out / 'answers').iterdir()} for out in (a, b)]
    assert files[0] == files[1] and set(files[0]) == {'teacher.jsonl', '000000.jsonl', '000002.jsonl', '000004.jsonl'}


def test_a_whole_run_on_two_ranks_and_on_one(toy_dir, tmp_path):
    """Through the `config` link: rank 0 alone speaks, and log and weights agree with one process. A
    run that two ranks began goes on on one, and the other way round."""
    def args(name):
        return ['config/toy.py', *argv(toy_dir, tmp_path / name, lr=1e-4)[1:]]
    main(load_config(args('one')))
    out = torchrun('distill.py', *args('two'))
    assert out.count('Avg@2') == 2 and out.count('step 0004') == 1
    assert_same_run(tmp_path / 'one', tmp_path / 'two')
    assert_same_answers(tmp_path / 'one', tmp_path / 'two')

    # A mean over all tokens of the step: over those of one rank, the two ranks would each count as half.
    by_token = ['loss_average=token', 'rep_loss=cosine', 'adam_eps=1e-5', 'eval_data=']
    main(load_config([*args('one by token'), *by_token]))
    torchrun('distill.py', *args('two by token'), *by_token)
    assert_same_run(tmp_path / 'one by token', tmp_path / 'two by token')

    torchrun('tests/two_ranks.py', 'interrupt', 3, *args('two, one'), code=1)
    assert [r['step'] for r in log_of(tmp_path / 'two, one')] == [0, 1, 2, 3]
    main(load_config(args('two, one')))
    assert_same_run(tmp_path / 'one', tmp_path / 'two, one')

    env = {**os.environ, 'RANK': '0', 'WORLD_SIZE': '1'}
    p = subprocess.run([sys.executable, 'tests/two_ranks.py', 'interrupt', '1', *args('one, two')], cwd=ROOT, env=env,
                       capture_output=True, text=True)
    assert p.returncode == 130 and 'stopped after step 1' in p.stdout and p.stderr == '\ninterrupted\n'
    torchrun('distill.py', *args('one, two'))
    assert_same_run(tmp_path / 'one', tmp_path / 'one, two')


def test_an_error_on_two_ranks_ends_both(toy_dir, tmp_path):
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                        'distill.py', *argv(toy_dir, tmp_path / 'x', prompts_per_step=1)],
                       cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert p.returncode != 0 and p.stderr.count('prompts_per_step=1 is fewer than the 2 ranks') == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / 'distill.py') not in p.stderr


@pytest.mark.parametrize('backend, moves', [('nccl', 'cuda'), ('gloo', 'cpu')])
def test_all_reduce_refuses_tensors_that_its_library_does_not_move(backend, moves, monkeypatch):
    """nccl knows no CPU tensors: every bridge run on several GPUs died after its fit, and gloo, on which the tests
    run, hid it. The check runs on one rank too, and without a GPU ("meta" stands for any other device)."""
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 1)
    monkeypatch.setattr(dist, 'get_backend', lambda: backend)
    x = torch.ones(2)
    if moves == 'cpu':
        assert all_reduce(x) is x
        x = x.to('meta')
    with pytest.raises(AssertionError, match=f'{backend} connects the ranks, which moves {moves} tensors; .*env.device'):
        all_reduce(x)


def test_a_sharded_model_is_plain_only_while_it_is_gathered():
    """`plain` promised whole weights and kept DTensors, which fail in the middle of somebody's own evaluation. A mesh
    of one rank shards in bfloat16."""
    assert not dist.is_initialized()
    try:
        model = shard(tiny_model(), Env(0, 1, 0, torch.device('cpu'), torch.bfloat16, 1))
        ids = torch.tensor([[1, 2, 3]])
        want = tiny_model().to(torch.bfloat16)(ids)
        with pytest.raises(RuntimeError, match=r'use `with gathered\(model\)'):
            model.plain()
        with gathered(model) as whole, torch.no_grad():
            assert not any(isinstance(p, DTensor) for p in whole.parameters()) and torch.equal(whole(ids), want)
            assert all(type(p) is torch.nn.Parameter and p.dtype == torch.bfloat16 for p in whole.parameters())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        with pytest.raises(RuntimeError, match='is the shard of a weight'):
            model.plain()
    finally:
        dist.destroy_process_group()
