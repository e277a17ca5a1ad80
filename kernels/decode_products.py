"""
The matrix products of one decode step, each with the operations before or after it in a block:

    norm_product    y = linear(norm(h))                          the queries, keys and values
                    y = activation(gate) * up                    the MLP, where linear(norm(h)) = [gate, up]
    add_product     h + linear(x)                                attention's and the MLP's result, added to h

With few rows each of these kernels runs for a few microseconds, which is about as long as its launch takes.
So the number of kernels matters. These products and the attention between them (kernels/decode_attention.py)
are five kernels a block. With PyTorch's operations in place of these products they would be eleven.

RMSNorm multiplies each row by one factor. `norm_product_kernel` can therefore apply it after the product:

    linear(norm(h)) = W (s * h) / sqrt(|h|^2 / d + eps) + bias

where s is the weight of the norm. One pass over h gives the product and |h|^2. Column i of gate is computed
from row i of W, and column i of up from row i + n. One program computes both and multiplies them.

The kernel is for at most 16 rows, which is the smallest side of a matrix unit's tile. With more rows the
matrix library is better at reading the states. Norm and product are then PyTorch's, `swiglu_kernel` does the
rest, and a block has eight kernels. float16 is always computed in this second way, because s * h may be
larger than the largest float16 number.

`add_product_in_place` needs no kernel of ours: the matrix library can add a product to its output.

The functions named *_reference are PyTorch, for every device and dtype, and call the modules that they are
given. kernels/__init__.py chooses. What none of them does: gradients on a GPU.

Letters: B rows, d width of the states, n width of y. In the kernel also: M rows and N columns of a tile of y,
D columns of h that are read at once.
"""
import torch
import torch.nn.functional as F

MOST_ROWS = 16                  # for norm_product_kernel


def norm_product_reference(h, norm, linear, activation=None):
    """States (B, 1, d) -> linear(norm(h)) (B, 1, n). With an activation the linear gives [gate, up], of width
    2 n, and the result is activation(gate) * up (B, 1, n).

    norm: a module with weight and eps. linear: a module with weight and bias.
    """
    y = linear(norm(h))
    if activation is None:
        return y
    gate, up = y.chunk(2, -1)
    return activation(gate) * up


def swiglu_reference(gate_up):
    """(B, 1, 2 n) -> silu(gate) * up (B, 1, n)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def add_product_reference(h, x, linear):
    """States h (B, 1, d) and x (B, 1, k) -> h + linear(x)."""
    return h + linear(x)


def add_product_in_place(h, x, linear):
    """The same on a GPU, written over h, by one call of the matrix library. The product is not rounded before
    it is added, so the result is rounded only once."""
    assert linear.bias is None
    h.view(-1, h.shape[-1]).addmm_(x.flatten(0, 1), linear.weight.t())
    return h


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def silu(x):
        return x * tl.sigmoid(x)

    @triton.jit
    def norm_product_kernel(h, norm_weight, W, bias, y, B, d, n, eps, GATED: tl.constexpr, M: tl.constexpr,
                            N: tl.constexpr, D: tl.constexpr, CPU: tl.constexpr):
        """Program i computes N columns of y for all rows. W is (n, d), or (2 n, d) if GATED."""
        # Triton's interpreter stores bfloat16 as integers, and its tl.dot would multiply these integers. So
        # use float32 there.
        FACTOR: tl.constexpr = tl.float32 if CPU else W.dtype.element_ty
        row = tl.arange(0, M)
        out = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        row_exists = row < B
        out_exists = out < n

        # The weights are the left factor: their tile is the larger one.
        squares = tl.zeros((M,), tl.float32)
        product = tl.zeros((N, M), tl.float32)
        up = tl.zeros((N, M), tl.float32)
        for start in range(0, d, D):
            column = start + tl.arange(0, D)
            column_exists = column < d
            x = tl.load(h + row[:, None] * d + column[None, :], other=0.0,
                        mask=row_exists[:, None] & column_exists[None, :]).to(tl.float32)           # (M, D)
            squares += tl.sum(x * x, 1)
            x *= tl.load(norm_weight + column, mask=column_exists, other=0.0).to(tl.float32)[None, :]
            x = tl.trans(x.to(W.dtype.element_ty).to(FACTOR))                # (D, M)
            exists = out_exists[:, None] & column_exists[None, :]
            weights = W + out[:, None] * d + column[None, :]
            tile = tl.load(weights, mask=exists, other=0.0).to(FACTOR)       # (N, D)
            product = tl.dot(tile, x, product, input_precision='ieee')
            if GATED:
                weights = W + (out + n)[:, None] * d + column[None, :]
                tile = tl.load(weights, mask=exists, other=0.0).to(FACTOR)
                up = tl.dot(tile, x, up, input_precision='ieee')

        # Apply the norm's factor. Then add the bias, or multiply silu(gate) by up.
        factor = tl.rsqrt(squares / d + eps)[None, :]                        # (1, M)
        product *= factor
        if bias is not None:
            product += tl.load(bias + out, mask=out_exists, other=0.0).to(tl.float32)[:, None]
        if GATED:
            product = silu(product) * (up * factor)
        tl.store(y + row[None, :] * n + out[:, None], product.to(y.dtype.element_ty),
                 mask=row_exists[None, :] & out_exists[:, None])

    @triton.jit
    def swiglu_kernel(gate_up, y, n, N: tl.constexpr):
        """Program (b, i): N columns of row b."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * N + tl.arange(0, N)
        exists = column < n
        gate = tl.load(gate_up + row * 2 * n + column, mask=exists, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * n + n + column, mask=exists, other=0.0).to(tl.float32)
        tl.store(y + row * n + column, (silu(gate) * up).to(y.dtype.element_ty), mask=exists)


def norm_product_fits(h):
    """Is the fused kernel meant for these states?"""
    return h[..., 0].numel() <= MOST_ROWS and h.dtype in (torch.float32, torch.bfloat16)


def norm_product_triton(h, norm, linear, gated=False):
    """The same as norm_product_reference; gated: with silu as the activation. States and weights have one
    dtype."""
    W = linear.weight
    d = h.shape[-1]
    B = h.numel() // d
    n = W.shape[0] // 2 if gated else W.shape[0]
    tensors = (h, norm.weight, W) if linear.bias is None else (h, norm.weight, W, linear.bias)
    if not norm_product_fits(h) or not all(x.is_contiguous() and x.dtype == h.dtype for x in tensors):
        raise ValueError(f'contiguous, of one dtype, at most {MOST_ROWS} rows; '
                         f'got {[(x.dtype, tuple(x.shape), x.stride()) for x in tensors]}')
    assert not gated or linear.bias is None

    # A narrow output has narrow tiles, so that every multiprocessor gets one. A tile of the weights has 8 KB
    # in bfloat16. Float32 is multiplied without matrix units, and its tile must fit in the registers.
    N = 16 if n <= 4096 else 32
    D = 64 if h.dtype == torch.float32 else 4096 // N
    y = torch.empty(*h.shape[:-1], n, dtype=h.dtype, device=h.device)
    norm_product_kernel[triton.cdiv(n, N),](h, norm.weight, W, linear.bias, y, B, d, n, norm.eps, gated,
                                            MOST_ROWS, N, D, not h.is_cuda, num_warps=4, num_stages=3)
    return y


def swiglu_triton(gate_up):
    """The same as swiglu_reference, for at most float32."""
    if gate_up.dtype == torch.float64:
        raise ValueError(f'at most float32; got {gate_up.dtype}')
    gate_up = gate_up.contiguous()
    n = gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], n, dtype=gate_up.dtype, device=gate_up.device)
    swiglu_kernel[y.numel() // n, triton.cdiv(n, 1024)](gate_up, y, n, 1024, num_warps=4)
    return y
