"""
One layer of Eq. (6) over selected rows: distance, cosine and gradient in one pass over memory.

With s a student row, t its teacher row, c = s.t / (|s| |t|) their cosine, w the row's weight:

    mse      v = |s - t|^2 / d            dv/ds = 2 (s - t) / d
    cosine   v = 1 - c                    dv/ds = (c s / |s| - t / |t|) / |s|
    nmse     2 / d times cosine

All of it needs s.s, t.t and s.t, three sums over a row that fits into registers (d <= 8192): a program
reads its two rows once, and writes w dv/ds where the teacher's row was. Sums are float32 whatever the rows
are. Rows are picked by index from the whole state, so nothing is gathered first.

Letters: K rows, d width, N all positions of a micro-batch.
"""
import torch

KINDS = ('mse', 'nmse', 'cosine')
WIDEST = 8192


def layer_rows_text(h, h_t, at, w, kind):
    """h (N, d): student states. h_t (K, d): teacher rows; *overwritten* with w dv/ds. at (K,): which rows of
    h. w (K,). kind: rep_loss. -> v (K,), c (K,), float32 or wider."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    s, t = h[at].to(dtype), h_t.to(dtype)                                    # (K, d)
    d = s.shape[-1]
    s_norm, t_norm = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (s, t))
    cos = (s * t).sum(-1, keepdim=True) / (s_norm * t_norm)                  # (K, 1)
    if kind == 'mse':
        s -= t
        value, grad = s.square().mean(-1, keepdim=True), s.mul_(2 / d)
    else:
        scale = 2 / d if kind == 'nmse' else 1.0
        value, grad = (1 - cos) * scale, (s.mul_(cos / s_norm) - t / t_norm).mul_(scale / s_norm)
    h_t.copy_(grad.mul_(w.to(dtype)[:, None]))
    return value.squeeze(-1), cos.squeeze(-1)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def kernel(h, h_t, at, w, value, cosine, d, KIND: tl.constexpr, WIDE: tl.constexpr):
        """Program k: row k of h_t against row at[k] of h."""
        k = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDE)
        there = column < d
        s = tl.load(h + tl.load(at + k) * d + column, mask=there, other=0.0).to(tl.float32)
        t = tl.load(h_t + k * d + column, mask=there, other=0.0).to(tl.float32)
        s_norm = tl.maximum(tl.sqrt(tl.sum(s * s)), 1e-12)
        t_norm = tl.maximum(tl.sqrt(tl.sum(t * t)), 1e-12)
        c = tl.sum(s * t) / (s_norm * t_norm)
        if KIND == 0:
            gap = s - t
            v = tl.sum(gap * gap) / d
            grad = gap * (2.0 / d)
        else:
            scale = 2.0 / d if KIND == 1 else 1.0
            v = (1 - c) * scale
            grad = (s * (c / s_norm) - t / t_norm) * (scale / s_norm)
        grad *= tl.load(w + k).to(tl.float32)
        tl.store(h_t + k * d + column, grad.to(h_t.dtype.element_ty), mask=there)
        tl.store(value + k, v)
        tl.store(cosine + k, c)


def layer_rows(h, h_t, at, w, kind):
    """As layer_rows_text, one program a row. h and h_t contiguous, d <= 8192, at most float32."""
    K, d = h_t.shape
    if d > WIDEST or h.dtype == torch.float64 or not all(x.is_contiguous() for x in (h, h_t, at, w)):
        raise ValueError(f'layer_rows: contiguous tensors of width at most {WIDEST}, got {tuple(h.shape)}')
    value, cos = torch.empty(2, K, dtype=torch.float32, device=h.device)
    if K:
        wide = triton.next_power_of_2(d)
        kernel[(K,)](h, h_t, at, w, value, cos, d, KINDS.index(kind), wide, num_warps=4 if d <= 2048 else 8)
    return value, cos
