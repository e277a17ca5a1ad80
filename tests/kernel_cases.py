"""Run with TRITON_INTERPRET=1 (test_kernels.py does): every kernel against its text; prints how many cases."""
import sys

import torch

from kernels.bridge_loss import bridge_back, bridge_back_text, bridge_rows, bridge_rows_text
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.layer_loss import KINDS, layer_rows, layer_rows_text

WORST = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}     # of the largest entry: one rounding


def layer_loss():
    """Widths that are powers of two and not, rows that repeat, weights with a zero; three dtypes and kinds."""
    count = 0
    for dtype, worst in WORST.items():
        for d, K in [(100, 1), (100, 257), *((d, 7) for d in (64, 576, 1536, 2048, 2560, 3072))]:
            g = torch.Generator().manual_seed(d)
            h, h_t = (torch.randn(n, d, generator=g).to(dtype) for n in (400, K))
            at, w = torch.randint(400, (K,), generator=g), torch.rand(K, generator=g)
            w[0] = 0 if K > 1 else 0.3
            for kind in KINDS if K < 257 or dtype == torch.float32 else KINDS[1:2]:      # the interpreter is slow
                a, b = h_t.clone(), h_t.clone()
                (value, cos), (v, c) = layer_rows(h, a, at, w, kind), layer_rows_text(h, b, at, w, kind)
                assert (a.float() - b.float()).abs().max() <= worst * b.float().abs().max(), (dtype, d, K, kind)
                assert (value - v).abs().max() <= 1e-5 * v.abs().max() and (cos - c).abs().max() < 1e-5
                assert K == 1 or not a[0].any()
                count += 1
    h = torch.randn(9, 64)
    layer_rows(h, torch.empty(0, 64), torch.empty(0, dtype=torch.long), torch.empty(0), 'mse')               # no rows
    for bad in (h.t(), h[:, ::2]):
        try:
            layer_rows(bad, torch.randn(1, bad.shape[1]), torch.zeros(1, dtype=torch.long), torch.ones(1), 'mse')
        except ValueError:
            continue
        sys.exit('a tensor that is not contiguous was taken')
    return count


def close(a, b, worst):
    """Within `worst` of the largest entry."""
    return (a.float() - b.float()).abs().max() <= worst * b.float().abs().max()


DECODE = [                  # lengths, H, G, e, R, norms, S
    ([0], 3, 1, 6, 6, True, 1),
    ([0, 1, 15, 16, 17, 100], 3, 1, 24, 24, True, 2),
    ([100, 0, 64], 9, 3, 64, 48, False, 1),
    ([100, 65], 3, 1, 6, 4, False, 4),
    ([100], 5, 1, 128, 96, True, None),
    ([17, 100], 20, 1, 64, 64, False, 1),
]


def decode():
    """Rows of very different lengths, shares without tokens, heads of odd numbers and widths; two steps, the
    second of which reads what the first wrote. The cache is a window of a larger one, and infinite wherever
    no token is: none of that may be read, and none changed."""
    count, T = 0, 103
    for dtype, worst in WORST.items():
        for lengths, H, G, e, R, normed, S in DECODE:
            g, B = torch.Generator().manual_seed(e + R), len(lengths)
            length, row = torch.tensor(lengths), torch.arange(B)
            norms = torch.rand(2, e, generator=g).to(dtype) if normed else (None, None)
            whole = torch.full((B + 1, 2, G + 1, T + 3, e + 2), torch.inf, dtype=dtype)
            window = (slice(1, None), slice(None), slice(G), slice(2, T + 2), slice(e))
            for b, n in enumerate(lengths):
                whole[window][b, :, :, :n] = torch.randn(2, G, n, e, generator=g)
            ours, texts = whole.clone(), whole.nan_to_num(posinf=0)
            for _ in range(2):
                qkv = torch.randn(H + 2 * G, e, B, generator=g).to(dtype).permute(2, 0, 1)       # as Linear has it
                angle = 9 * torch.rand(B, R, generator=g)
                cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
                y = decode_attention(qkv, ours[window], length, cos, sin, *norms, S=S)
                y_text = decode_attention_reference(qkv, texts[window], length, cos, sin, *norms, 1e-6, max(length) + 1)
                at = row, slice(None), slice(None), length
                (k, v), (k_text, v_text) = (x[window][at].unbind(1) for x in (ours, texts))
                assert close(k, k_text, worst) and v.equal(v_text), (dtype, e, H, S)
                assert close(y, y_text, 2 * worst), (dtype, e, H, S)         # the text rounds a query thrice
                whole[window][at] = ours[window][at]
                assert ours.equal(whole), ('touched', dtype, e, H, S)
                length = length + 1
                count += 1
    try:
        decode_attention(*(x.double() for x in (qkv, ours[window])), length, cos, sin)
    except ValueError:
        return count
    sys.exit('float64 was taken')


BRIDGE = [                  # r, d, K, share of rows inside
    (1, 20, 1, 0), (8, 100, 7, 0.5), (24, 576, 7, 0), (8, 20, 65, 0.1), (64, 100, 65, 1), (256, 100, 7, 0.5),
]


def bridge():
    """Ranks and widths that are no powers of two, blocks of one class and of both, rows without weight,
    teacher rows of zeros; and the way back, scaled, in place, on those rows alone."""
    count = 0
    for dtype, worst in WORST.items():
        for (r, d, K, share), normalise in [(case, flag) for case in BRIDGE for flag in (True, False)]:
            g = torch.Generator().manual_seed(r + d)
            h, above = torch.randn(2, 80, d, generator=g).to(dtype)
            at, inside = torch.randperm(80, generator=g)[:K], torch.rand(K, generator=g) < share
            P_s, b_s, z_t = (torch.randn(n, generator=g) for n in ((2, r, d), (2, r), (K, r)))
            w = torch.rand(K, generator=g)
            w[1::3], z_t[2::3] = 0, 0
            a, b = z_t.clone(), z_t.clone()
            (value, cos), (v, c) = (f(h, x, at, w, P_s, b_s, inside, normalise)
                                    for f, x in ((bridge_rows, a), (bridge_rows_text, b)))
            assert (a - b).abs().max() <= 2e-6 * max(1, b.abs().max()), (dtype, r, d, K, normalise)
            assert (value - v).abs().max() <= 2e-6 * v.max() and (cos - c).abs().max() < 2e-6
            assert not a[1::3].any()
            ours, texts, scale = above.clone(), above.clone(), torch.tensor(-1.7)
            bridge_back(ours, b, at, P_s, inside, scale)
            bridge_back_text(texts, b, at, P_s, inside, scale)
            assert close(ours, texts, worst), ('back', dtype, r, d, K, normalise)
            ours[at] = above[at]
            assert ours.equal(above)
            count += 1
    none = torch.empty(0, dtype=torch.long)
    bridge_rows(h, torch.empty(0, r), none, none.float(), P_s, b_s, none.bool(), True)           # no rows
    bridge_back(ours, torch.empty(0, r), none, P_s, none.bool(), scale)
    assert ours.equal(above)
    for call in (lambda: bridge_rows(h.t(), b, at, w, P_s, b_s, inside, True),
                 lambda: bridge_back(ours.double(), b, at, P_s, inside, scale)):
        try:
            call()
        except ValueError:
            continue
        sys.exit('a tensor that the kernel cannot read was taken')
    return count


if __name__ == '__main__':
    print(layer_loss() + decode() + bridge())
