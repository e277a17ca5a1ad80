"""
One layer of Eq. (6) over selected rows: distance, cosine and gradient in one pass over memory.

Let s be a student row, t its teacher row, c = s.t / (|s| |t|) their cosine, and w the row's weight:

    kind      value                 gradient with respect to s
    mse       |s - t|^2 / d         2 (s - t) / d
    nmse      2 (1 - c) / d         2 / d times the gradient below
    cosine    1 - c                 (c s / |s| - t / |t|) / |s|

The gradient, times w, is written over the teacher's row, which is not needed any more. A norm below
1e-12 counts as 1e-12, so that a row of zeros has the cosine 0 and a finite gradient.

The function exists twice, and a test holds the two equal:
    layer_rows_reference    PyTorch, on any device and in any dtype
    layer_rows_triton       one kernel, for a GPU; float32 at most, d at most 8192
kernels/__init__.py chooses between them. They do without autograd, and know no fourth kind of
distance: an experiment with another one is written for autograd, in losses.py.

To check them:  pytest tests/test_kernels.py    on any machine, in Triton's interpreter
                pytest tests/test_gpu.py        on a machine with an NVIDIA GPU

Letters: N all positions of a micro-batch, K supervised rows, d width.
"""
import torch

KINDS = ('mse', 'nmse', 'cosine')
WIDEST = 8192                   # numbers of a row that one program can hold in registers


def layer_rows_reference(h, h_t, at, w, kind):
    """One layer of Eq. (6) by rows, and its gradient -> (value, cosine), both (K,), at least float32.

    h (N, d): student states. h_t (K, d): teacher rows, *overwritten* with w times the gradient. at
    (K,): which rows of h are supervised. w (K,): their weights. kind: one of KINDS.
    """
    assert kind in KINDS, kind
    dtype = torch.promote_types(h.dtype, torch.float32)
    s = h[at].to(dtype)                                                      # (K, d)
    t = h_t.to(dtype)                                                        # (K, d)
    d = s.shape[-1]

    # The cosine is logged for every kind.
    s_norm = s.norm(dim=-1, keepdim=True).clamp(min=1e-12)                   # (K, 1)
    t_norm = t.norm(dim=-1, keepdim=True).clamp(min=1e-12)                   # (K, 1)
    cos = (s * t).sum(-1, keepdim=True) / (s_norm * t_norm)                  # (K, 1)

    # s is a copy of our own. Working in its memory halves what a wide model needs here.
    if kind == 'mse':
        s -= t
        value = s.square().mean(-1, keepdim=True)                            # (K, 1)
        grad = s.mul_(2 / d)                                                 # (K, d)
    else:
        scale = 2 / d if kind == 'nmse' else 1.0
        value = (1 - cos) * scale                                            # (K, 1)
        s.mul_(cos / s_norm)
        grad = (s - t / t_norm).mul_(scale / s_norm)                         # (K, d)
    h_t.copy_(grad.mul_(w.to(dtype)[:, None]))
    return value.squeeze(-1), cos.squeeze(-1)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def layer_rows_kernel(h, h_t, at, w, value, cosine, d, KIND: tl.constexpr, WIDE: tl.constexpr):
        """Program k compares row k of h_t with row at[k] of h. KIND is a place in KINDS. WIDE is d,
        rounded up to a power of two: the program holds both rows whole, so that each is read from
        memory once."""
        # The row is addressed in 64 bits: K times d may exceed 2^31.
        k = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDE)
        in_row = column < d
        row = tl.load(at + k)
        s = tl.load(h + row * d + column, mask=in_row, other=0.0).to(tl.float32)
        t = tl.load(h_t + k * d + column, mask=in_row, other=0.0).to(tl.float32)

        # Three sums over the row are all that the value, the cosine and the gradient need.
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

        # The gradient takes the teacher's row's place, in its dtype.
        grad *= tl.load(w + k).to(tl.float32)
        tl.store(h_t + k * d + column, grad.to(h_t.dtype.element_ty), mask=in_row)
        tl.store(value + k, v)
        tl.store(cosine + k, c)


def layer_rows_triton(h, h_t, at, w, kind):
    """The same as layer_rows_reference, one program a row. All tensors are contiguous, and at most
    float32."""
    assert kind in KINDS, kind
    K, d = h_t.shape
    if d > WIDEST or h.dtype == torch.float64 or not all(x.is_contiguous() for x in (h, h_t, at, w)):
        raise ValueError(f'contiguous tensors of width at most {WIDEST}; got {tuple(h.shape)}')
    value, cos = torch.empty(2, K, dtype=torch.float32, device=h.device)     # (K,), (K,)
    if K == 0:
        return value, cos
    wide = triton.next_power_of_2(d)
    warps = 4 if d <= 2048 else 8
    layer_rows_kernel[(K,)](h, h_t, at, w, value, cos, d, KINDS.index(kind), wide, num_warps=warps)
    return value, cos
