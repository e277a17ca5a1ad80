"""Fused kernels in Triton's interpreter: no GPU needed, so equality is tested and speed is not. And their
texts against slower ones."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses
from kernels.bridge_loss import bridge_back_text, bridge_rows_text
from kernels.decode_attention import decode_attention_reference
from model import rotate
from support.runtime import ROOT


def test_every_kernel_equals_its_text():
    pytest.importorskip('triton')
    p = subprocess.run([sys.executable, ROOT / 'tests/kernel_cases.py'], capture_output=True, text=True,
                       env=os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT)})
    if 'only 0-dimensional arrays can be converted' in p.stderr:
        pytest.skip("this Triton's interpreter does not know numpy 2.4: loop bounds that are tensors; Triton 3.9 does")
    assert p.returncode == 0, p.stderr
    assert int(p.stdout) == 140


@pytest.mark.parametrize('H, G, e, R, normed', [(4, 4, 6, 6, True), (9, 3, 24, 16, False), (6, 1, 64, 48, True)])
@pytest.mark.parametrize('masked', [True, False])
def test_decode_text_equals_one_head_at_a_time(H, G, e, R, normed, masked):
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


@pytest.mark.parametrize('dtype, worst', [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)])
@pytest.mark.parametrize('normalise', [True, False])
def test_bridge_text_equals_autograd(dtype, worst, normalise):
    """Values, cosines and both gradients, of the projected rows and of the states, with an upstream gradient
    that is not 1; a row without weight, a teacher's row of zeros."""
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    K, r, d = 17, 5, 12
    h = torch.randn(40, d, generator=g).to(dtype)
    P_s, b_s, z_t, w = (torch.randn(n, generator=g).to(wide) for n in ((2, r, d), (2, r), (K, r), (K,)))
    at, inside = torch.randperm(40, generator=g)[:K], torch.rand(K, generator=g) < 0.4
    w[3], z_t[5] = 0, 0
    leaf = h.to(wide).requires_grad_()
    z = losses.project_student(leaf[at], P_s, b_s, inside)
    z.retain_grad()
    value = losses.bridge_distance(z, z_t, normalise)
    (w * value).sum().backward()
    grad = z_t.clone()
    v, c = bridge_rows_text(h, grad, at, w, P_s, b_s, inside, normalise)
    back = torch.randn(40, d, generator=g).to(dtype)
    expected = (back.to(wide) - 1.7 * leaf.grad).to(dtype)
    bridge_back_text(back, grad, at, P_s, inside, torch.tensor(-1.7, dtype=wide))
    for ours, oracle in ((v, value), (c, F.cosine_similarity(z, z_t, eps=1e-12)), (grad, z.grad)):
        assert (ours - oracle).abs().max() <= worst * oracle.abs().max()
    assert (back - expected).abs().max() <= max(worst, 2 * torch.finfo(dtype).eps) * expected.abs().max()
    assert back.dtype == dtype and not grad[3].any()
