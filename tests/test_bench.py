"""The benchmark runs, and what it counts holds: never a time."""
import json
import subprocess
import sys

import pytest
import torch

from bench import liger_scheme
from losses import opd_loss
from runtime import ROOT


def bench(*args):
    p = subprocess.run([sys.executable, ROOT / 'bench.py', *args, '--device', 'cpu'], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return p.stdout


def test_every_line_of_both_tables():
    for what, cases in (('head', 6), ('update', 5)):
        lines = bench(what, '--model', 'toy', '--rows', '3', '--tokens', '8', '--repeat', '2').splitlines()
        rows = [json.loads(line) for line in lines[-cases:]]
        assert len({r['case'] for r in rows}) == cases == len(lines) - 2 - cases
        assert all(0 < r['low'] < 60 and r['peak_mb'] >= 0 and r['torch'] and r['machine'] for r in rows)


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
