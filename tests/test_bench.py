"""The benchmark runs, and what it counts holds: never a time."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import argv

from bench import liger_scheme
from configs import load_config
from losses import opd_loss
from runtime import ROOT
from toy import folder_of


def bench(*args):
    p = subprocess.run([sys.executable, ROOT / 'bench.py', *args, '--device', 'cpu'], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return p.stdout


def test_every_line_of_every_table():
    for what, cases in (('head', 7), ('update', 5), ('rollout', 2)):
        lines = bench(what, '--model', 'toy', '--rows', '3', '--tokens', '8', '--repeat', '2').splitlines()
        rows = [json.loads(line) for line in lines[-cases:]]
        assert len({r['case'] for r in rows}) == cases == len(lines) - 2 - cases
        assert all(0 < r['low'] < 60 and r['peak_mb'] >= 0 and r['torch'] and r['machine'] for r in rows)


def test_bridge_and_pair(toy_dir, tmp_path):
    """Both fits read the same answers: 21 forwards to 1. Pairing of a vocabulary with itself is all exact,
    with the merged one not."""
    keys = [a for a in argv(toy_dir, 'x', toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged')
            if '=' in a and not a.startswith('out_dir')]
    lines = bench('bridge', '--rows', '20', '--keys', *keys).splitlines()
    got = json.loads(lines[-1])
    assert (got['ridge']['forwards'], got['adamw']['forwards']) == (1, 21) and '21x the forwards' in lines[-2]
    assert got['ridge']['cos'].keys() == got['adamw']['cos'].keys() and got['ridge']['cos'] != got['adamw']['cos']
    folder = folder_of(load_config(['configs/toy.py', *keys]))
    texts = tmp_path / 'texts.txt'
    texts.write_text('3+7=0;0*4=0;\n1*1=1;\n')       # inside 7=, ;0, 4= and 1=
    for teacher, align in (('student', 1), ('teacher', 14 / 18)):
        out = bench('pair', '--tokenizers', str(folder / 'student'), str(folder / teacher), '--data',
                    str(texts), '--repeat', '1')
        got = json.loads(out.splitlines()[-1])
        assert got['align'] == pytest.approx(align) and (got['texts'], got['bytes']) == (2, 18) and got['mb_per_s'] > 0


def test_memory_of_the_head_loss_grows_with_the_chunk_not_with_the_rows():
    """V = 49,152, d = 576, float32, resident set of a process: the head's gradient is 113 MB and a chunk
    of 32 rows of logits 6 MB; whole logits of 512 rows are 101 MB each."""
    def peak(case, rows):
        return json.loads(bench('head', '--model', 'smollm2', '--rows', str(rows), '--chunk', '32', '--repeat', '1',
                                '--case', case))['peak_mb']
    few, many = peak('full KL', 64), peak('full KL', 512)
    assert many < 1.25 * few and many < 113 + 4 * 6.3 + 75               # four chunks; the rest is the libraries'
    assert peak('whole logits', 512) > 3 * many


def test_the_peer_computes_the_same():
    """Liger's scheme, as written down here, is the same loss: the comparison is of like with like."""
    g = torch.Generator().manual_seed(0)
    h, W, h_t, W_t = (torch.randn(n, 6, generator=g) for n in (9, 29, 9, 29))
    w = torch.rand(9, generator=g)
    loss, d_h, d_W = liger_scheme(h, W, h_t, W_t, w)
    a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
    ours, _ = opd_loss(a, b, h_t, W_t, torch.zeros(9, dtype=torch.long), w)
    want = torch.autograd.grad(ours, (a, b))
    assert loss == pytest.approx(ours.item(), rel=1e-5)
    for x, y in zip((d_h, d_W), want, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()
