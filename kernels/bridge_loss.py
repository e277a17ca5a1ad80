"""
One layer of Eqs. (14), (15) over selected rows: student states go through a bridge and are
compared with the teacher's, which went through its own side before.

Let z = P_s h + b_s be a projected student row and t its teacher row; u = z / |z| and v = t / |t|
are both at length 1, c = u.v is their cosine, and w is the row's weight:

                    value          gradient with respect to z
    as they are     |z - t|^2      2 (z - t)
    normalised      |u - v|^2      2 (c u - v) / |z|

The gradient with respect to the state h is P_s' times that. Only the gradient of z, r numbers a
row, is kept for the backward pass: it is written, times w, over the teacher's row. On the way back
its product with P_s is added to the gradient of the states in place; sums are float32, and rounded
once. A norm below 1e-12 counts as 1e-12.

A bridge has two sets of weights, and a row is of one of two classes: class 1 if the student's
position is inside a token of the teacher, else class 0.

Both functions exist twice, and a test holds the two equal:
    bridge_rows_reference, bridge_back_reference    PyTorch, on any device and in any dtype
    bridge_rows_triton, bridge_back_triton          one kernel each, for a GPU; float32 at most
kernels/__init__.py chooses between them. They do without autograd. To check them: as in
kernels/layer_loss.py.

Letters: N all positions of a micro-batch, K supervised rows, d width, r rank; in the kernels a tile
has M rows and D columns, and RANK is r or a part of it, as a power of two.
"""
import torch
import torch.nn.functional as F


def bridge_rows_reference(h, z_t, at, w, P_s, b_s, inside, normalise):
    """Eq. (14) by rows, and its gradient -> (value, cosine), both (K,), at least float32.

    h (N, d): student states. z_t (K, r): teacher rows, already projected, *overwritten* with w
    times the gradient of z. at (K,): which rows of h are supervised. w (K,): their weights.
    P_s (2, r, d), b_s (2, r): the bridge. inside (K,): a row's class. normalise: compare
    directions rather than states.
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    s = h[at].to(dtype)                                                      # (K, d)

    # Every row goes through both classes' weights, and the one that counts is picked: rows are not
    # sorted.
    outer = F.linear(s, P_s[0], b_s[0])                                      # (K, r)
    inner = F.linear(s, P_s[1], b_s[1])                                      # (K, r)
    z = torch.where(inside[:, None], inner, outer)                           # (K, r)
    t = z_t.to(dtype)                                                        # (K, r)

    # The cosine is logged in both cases.
    z_norm = z.norm(dim=-1, keepdim=True).clamp(min=1e-12)                   # (K, 1)
    t_norm = t.norm(dim=-1, keepdim=True).clamp(min=1e-12)                   # (K, 1)
    u = z / z_norm                                                           # (K, r)
    v = t / t_norm                                                           # (K, r)
    cos = (u * v).sum(-1, keepdim=True)                                      # (K, 1)
    if normalise:
        gap = u - v
        grad = 2 * (cos * u - v) / z_norm                                    # (K, r)
    else:
        gap = z - t
        grad = 2 * gap                                                       # (K, r)
    z_t.copy_(grad * w.to(dtype)[:, None])
    return gap.square().sum(-1), cos.squeeze(-1)


def bridge_back_reference(g, grad, at, P_s, inside, scale):
    """The gradient's way back through the bridge: *add* scale * grad P_s to the rows `at` of g.

    g (N, d): gradient of the states. grad (K, r): what bridge_rows left. at (K,): no two alike.
    scale: the gradient from above, a tensor of one number.
    """
    outer = grad @ P_s[0]                                                    # (K, d)
    inner = grad @ P_s[1]                                                    # (K, d)
    rows = torch.where(inside[:, None], inner, outer) * scale                # (K, d)
    g[at] = rows.add_(g[at]).to(g.dtype)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def bridge_rows_kernel(h, z_t, at, w, P_s, b_s, inside, value, cosine, K, d, r: tl.constexpr,
                           NORMALISE: tl.constexpr, M: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr):
        """Program i compares M rows of z_t with theirs of h."""
        # Rows are addressed in 64 bits: N times d may exceed 2^31.
        k = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        rank = tl.arange(0, RANK)
        row_exists = k < K
        rank_exists = rank < r
        row = tl.load(at + k, mask=row_exists, other=0)
        side = tl.load(inside + k, mask=row_exists, other=0).to(tl.int32)

        # z = P_s h + b_s, one class after the other. Rows of the other class read zeros, which add
        # nothing. Often no row of a tile is inside a teacher's token; then the second class is
        # skipped.
        z = tl.zeros((M, RANK), tl.float32)
        for c in tl.static_range(2):
            of_class = row_exists & (side == c)
            if tl.max(of_class.to(tl.int32), 0) > 0:
                for start in range(0, d, D):
                    column = start + tl.arange(0, D)
                    s = tl.load(h + row[:, None] * d + column[None, :], other=0.0,
                                mask=of_class[:, None] & (column < d)[None, :]).to(tl.float32)
                    P = tl.load(P_s + (c * r + rank)[:, None] * d + column[None, :], other=0.0,
                                mask=rank_exists[:, None] & (column < d)[None, :])
                    z = tl.dot(s, tl.trans(P), z, input_precision='ieee')
                b = tl.load(b_s + c * r + rank, mask=rank_exists, other=0.0)
                z += tl.where(of_class[:, None], b[None, :], 0.0)

        # The rest is the reference, line by line. Columns beyond r hold zeros and change no sum.
        at_row = k[:, None] * r + rank[None, :]
        exists = row_exists[:, None] & rank_exists[None, :]
        t = tl.load(z_t + at_row, mask=exists, other=0.0)
        z_norm = tl.maximum(tl.sqrt(tl.sum(z * z, 1)), 1e-12)[:, None]
        t_norm = tl.maximum(tl.sqrt(tl.sum(t * t, 1)), 1e-12)[:, None]
        u = z / z_norm
        v = t / t_norm
        cos = tl.sum(u * v, 1)
        if NORMALISE:
            gap = u - v
            grad = 2 * (cos[:, None] * u - v) / z_norm
        else:
            gap = z - t
            grad = 2 * gap
        grad *= tl.load(w + k, mask=row_exists, other=0.0).to(tl.float32)[:, None]
        tl.store(z_t + at_row, grad, mask=exists)
        tl.store(value + k, tl.sum(gap * gap, 1), mask=row_exists)
        tl.store(cosine + k, cos, mask=row_exists)

    @triton.jit
    def bridge_back_kernel(g, grad, at, P_s, inside, scale, K, d, r: tl.constexpr,
                           M: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr):
        """Program (i, j) makes M rows and D columns of the product grad P_s, and adds them to g."""
        k = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        column = tl.program_id(1) * D + tl.arange(0, D)
        row_exists = k < K
        column_exists = column < d
        row = tl.load(at + k, mask=row_exists, other=0)
        side = tl.load(inside + k, mask=row_exists, other=0).to(tl.int32)

        # The sum over r is taken RANK numbers at a time, class by class as above.
        product = tl.zeros((M, D), tl.float32)
        for c in tl.static_range(2):
            of_class = row_exists & (side == c)
            if tl.max(of_class.to(tl.int32), 0) > 0:
                for start in range(0, r, RANK):
                    rank = start + tl.arange(0, RANK)
                    x = tl.load(grad + k[:, None] * r + rank[None, :], other=0.0,
                                mask=of_class[:, None] & (rank < r)[None, :])
                    P = tl.load(P_s + (c * r + rank)[:, None] * d + column[None, :], other=0.0,
                                mask=(rank < r)[:, None] & column_exists[None, :])
                    product = tl.dot(x, P, product, input_precision='ieee')

        # No two rows are alike, so no two programs add to the same numbers.
        at_row = g + row[:, None] * d + column[None, :]
        exists = row_exists[:, None] & column_exists[None, :]
        before = tl.load(at_row, mask=exists, other=0.0).to(tl.float32)
        after = before + product * tl.load(scale).to(tl.float32)
        tl.store(at_row, after.to(g.dtype.element_ty), mask=exists)


def check_readable(*tensors):
    """The kernels index rows by their width, and compute in float32."""
    if not all(x.is_contiguous() and x.dtype != torch.float64 for x in tensors):
        raise ValueError(f'contiguous, at most float32; got {[(x.dtype, x.stride()) for x in tensors]}')


def bridge_rows_triton(h, z_t, at, w, P_s, b_s, inside, normalise):
    """The same as bridge_rows_reference. All tensors are contiguous; z_t and the bridge are
    float32."""
    check_readable(h, z_t, at, w, P_s, b_s, inside)
    K, r = z_t.shape
    d = h.shape[1]
    value, cos = torch.empty(2, K, dtype=torch.float32, device=h.device)     # (K,), (K,)
    if K == 0:
        return value, cos
    rank = max(16, triton.next_power_of_2(r))            # tl.dot takes no side below 16
    columns, warps = (64, 4) if rank <= 64 else (32, 8)  # what the registers hold
    bridge_rows_kernel[triton.cdiv(K, 32),](h, z_t, at, w, P_s, b_s, inside, value, cos, K, d, r, normalise,
                                            32, rank, columns, num_warps=warps)
    return value, cos


def bridge_back_triton(g, grad, at, P_s, inside, scale):
    """The same as bridge_back_reference. All tensors are contiguous; grad and the bridge are
    float32."""
    check_readable(g, grad, at, P_s, inside)
    K, r = grad.shape
    d = g.shape[1]
    if K == 0:
        return
    rank = 16 if r <= 16 else 32
    tiles = triton.cdiv(K, 32), triton.cdiv(d, 64)
    bridge_back_kernel[tiles](g, grad, at, P_s, inside, scale, K, d, r, 32, rank, 64)
