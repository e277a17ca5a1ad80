"""Run with TRITON_INTERPRET=1 (test_kernels.py does): every kernel against its text; prints how many cases."""
import sys

import torch

from kernels.layer_loss import KINDS, layer_rows, layer_rows_text

WORST = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}     # of the largest entry: one rounding


def layer_loss():
    """Widths that are powers of two and not, rows that repeat, weights with a zero; three dtypes and kinds."""
    count = 0
    for dtype, worst in WORST.items():
        for d, K in [(64, 257), (100, 1), (100, 257), *((d, 7) for d in (64, 576, 1536, 2048, 2560, 3072))]:
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


if __name__ == '__main__':
    print(layer_loss())
