"""The Triton kernels in Triton's interpreter, which needs no GPU: equality is tested, and speed is not. And their
PyTorch reference implementations against slower ones."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import rounding
from kernel_cases import NAMES

import kernels
import losses
from kernels.bridge_loss import bridge_back_reference, bridge_rows_reference
from kernels.decode_attention import decode_attention_reference
from kernels.layer_loss import KINDS, layer_rows_reference, layer_rows_triton
from model import rotate
from support.runtime import ROOT


@pytest.fixture(scope='module')
def interpreted():
    """All cases of kernel_cases.py in one process -> {(case, dtype): what came of it}."""
    pytest.importorskip('triton')
    env = os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT)}
    p = subprocess.run([sys.executable, ROOT / 'tests/kernel_cases.py'], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stdout + p.stderr
    results = [json.loads(line) for line in p.stdout.splitlines() if line.startswith('{')]
    return {(result['case'], result['dtype']): result for result in results}


@pytest.mark.parametrize('case, dtype', NAMES)
def test_the_kernel_equals_its_reference(interpreted, case, dtype):
    result = interpreted[case, dtype]
    if result['not_run']:
        import numpy
        import triton
        pytest.skip(f'Triton {triton.__version__} with numpy {numpy.__version__} does not interpret a loop up to a number '
                    f'known at run time ({result["not_run"]}); install a newer Triton or numpy<2.5')
    assert not result['error'], result['error']


@pytest.mark.parametrize('call', [kernels.layer_rows, layer_rows_reference, layer_rows_triton])
def test_an_unknown_kind_is_an_error(call):
    """It used to train as cosine, in silence, on a CPU."""
    h, at, w = torch.randn(3, 4), torch.arange(3), torch.ones(3)
    with pytest.raises(AssertionError, match='foo'):
        call(h, h.clone(), at, w, 'foo')


@pytest.mark.parametrize('H, G, e, R, normed', [(4, 4, 6, 6, True), (9, 3, 24, 16, False), (6, 1, 64, 48, True)])
@pytest.mark.parametrize('masked', [True, False])
def test_decode_reference_equals_one_head_at_a_time(H, G, e, R, normed, masked):
    """A query head that reads the wrong key head, a rotation with its sign or halves exchanged, a rotated
    value, a row that sees beyond its token or not the token itself."""
    g = torch.Generator().manual_seed(e)
    lengths, T, eps = [0, 5, 1, 11], 13, 1e-5
    length, B = torch.tensor(lengths), len(lengths)
    kv = torch.randn(B, 2, G, T, e, generator=g, dtype=torch.float64)
    qkv = torch.randn(H + 2 * G, e, B, generator=g, dtype=torch.float64).permute(2, 0, 1)
    cos, sin = torch.randn(2, B, R, generator=g, dtype=torch.float64)
    norms = torch.rand(2, e, generator=g, dtype=torch.float64) if normed else (None, None)
    longest = 12 if masked else None
    mask = torch.where(torch.arange(12) > length[:, None], -torch.inf, 0.0).double()[:, None, None]
    before, raw = kv.clone(), qkv.clone()
    y = decode_attention_reference(qkv, kv, length, cos, sin, *norms, eps, longest, mask if masked else None)
    assert qkv.equal(raw)

    def turned(x, b, weight):
        x = x if weight is None else F.rms_norm(x, (e,), weight, eps)
        return rotate(x, cos[b], sin[b])
    for b, n in enumerate(lengths):
        for j in range(G):
            before[b, 0, j, n] = turned(qkv[b, H + j], b, norms[1])
            before[b, 1, j, n] = qkv[b, H + G + j]
        for i in range(H):
            k, v = before[b, :, i * G // H, :n + 1]
            p = (k @ turned(qkv[b, i], b, norms[0]) / e**.5).softmax(0)
            torch.testing.assert_close(y.view(B, H, e)[b, i], p @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(kv, before, rtol=0, atol=1e-14)


DTYPES = pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)


def assert_rows_close(ours, oracle, terms, count, stored):
    """Row by row: a row of zeros has a gradient 1e12 times its neighbours'. terms (K,): the size of what is summed.
    stored: dtype of the result, beside that of the arithmetic, which is the oracle's."""
    for k in range(len(oracle)):
        bound = rounding(terms[k].detach().to(oracle.dtype), count) + rounding(oracle[k].detach().to(stored), 1)
        assert (ours[k].to(oracle.dtype) - oracle[k]).norm() <= bound, k


@DTYPES
@pytest.mark.parametrize('kind', KINDS)
def test_layer_reference_equals_autograd(dtype, kind):
    """Value, cosine and gradient; a row without weight; rows of zeros, rows shorter than the smallest norm, and rows
    that only look short: a smallest norm of 1e-2, or none, would change those and nothing else."""
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    d, at = 12, torch.tensor([7, 0, 3, 9, 1, 5, 8])
    h, h_t = torch.randn(10, d, generator=g).to(dtype), torch.randn(7, d, generator=g).to(dtype)
    w = torch.rand(7, generator=g).to(wide)
    h[7] = 0
    h[0] *= 1e-28
    h[3] *= 1e-9
    h_t[3] = 0
    h_t[4] *= 1e-9
    w[6] = 0
    leaf = h.to(wide).requires_grad_()
    want = losses.row_distance(leaf[at], h_t.to(wide), kind)
    (w * want).sum().backward()
    grad = h_t.clone()
    value, cos = layer_rows_reference(h, grad, at, w, kind)

    s_norm, t_norm = (x.to(wide).norm(dim=-1).clamp(min=1e-12) for x in (h[at], h_t))
    terms = 2 * (s_norm + t_norm) if kind == 'mse' else 2 / s_norm
    one = torch.ones_like(w)
    value_terms = (s_norm + t_norm) ** 2 if kind == 'mse' else 2 * one
    assert_rows_close(grad, leaf.grad[at], w * terms, 4 * d, dtype)
    assert_rows_close(value, want, value_terms, 4 * d, wide)
    assert_rows_close(cos, F.cosine_similarity(h[at].to(wide), h_t.to(wide), eps=1e-12), one, 4 * d, wide)
    assert not grad[6].any()


@DTYPES
@pytest.mark.parametrize('normalise', [True, False])
def test_bridge_reference_equals_autograd(dtype, normalise):
    """Values, cosines and both gradients, of the projected rows and of the states, with an upstream gradient
    that is not 1; a row without weight, rows of zeros and short ones as above, on both sides."""
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    K, r, d = 17, 5, 12
    h = torch.randn(40, d, generator=g).to(dtype)
    P_s, b_s, z_t, w = (torch.randn(n, generator=g).to(wide) for n in ((2, r, d), (2, r), (K, r), (K,)))
    at, inside = torch.randperm(40, generator=g)[:K], torch.rand(K, generator=g) < 0.4
    w[3], z_t[5] = 0, 0
    b_s[0] = 0                               # then a projected row of class 0 is as short as its state
    inside[7:12] = False
    h[at[7]] = 0
    h[at[8]] *= 1e-28
    h[at[9]] *= 1e-9
    z_t[10] *= 1e-9
    h[at[11]] = 0
    z_t[11] = 0
    leaf = h.to(wide).requires_grad_()
    z = losses.project_student(leaf[at], P_s, b_s, inside)
    z.retain_grad()
    want = losses.bridge_distance(z, z_t, normalise)
    (w * want).sum().backward()
    grad = z_t.clone()
    value, cos = bridge_rows_reference(h, grad, at, w, P_s, b_s, inside, normalise)
    back = torch.randn(40, d, generator=g).to(dtype)
    others = torch.ones(40, dtype=torch.bool).index_fill(0, at, False)
    before = back.clone()
    bridge_back_reference(back, grad, at, P_s, inside, torch.tensor(-1.7, dtype=wide))

    # What is summed: the products of P and h, the bias, and the teacher's row. count: d products, and a few sums of r.
    P = P_s[inside.long()]                                                   # (K, r, d)
    made = P.flatten(1).norm(dim=-1) * h[at].to(wide).norm(dim=-1) + b_s[inside.long()].norm(dim=-1)
    t_norm, z_norm = z_t.norm(dim=-1), z.detach().norm(dim=-1).clamp(min=1e-12)
    one = torch.ones_like(w)
    if normalise:
        value_terms = cos_terms = 4 * (one + made / z_norm)
        terms = value_terms / z_norm
    else:
        value_terms, terms, cos_terms = (made + t_norm) ** 2, 2 * (made + t_norm), 4 * (one + made / z_norm)
    count = d + 4 * r
    assert_rows_close(value, want, value_terms, count, wide)
    assert_rows_close(cos, F.cosine_similarity(z, z_t, eps=1e-12), cos_terms, count, wide)
    assert_rows_close(grad, z.grad, w.abs() * terms, count, wide)
    assert not grad[3].any()

    expected = before[at].to(wide) - 1.7 * leaf.grad[at]
    terms = before[at].to(wide).norm(dim=-1) + 1.7 * w.abs() * terms * P.flatten(1).norm(dim=-1)
    assert_rows_close(back[at], expected, terms, count + r, dtype)
    assert back.dtype == dtype and back[others].equal(before[others])
