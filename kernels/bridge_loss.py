"""
One layer of Eqs. (14), (15) over selected rows: student states through a bridge, compared with the teacher's.

With z = P_s h + b_s a projected student row, t its teacher row, u = z / |z| and v = t / |t|, c = u.v their
cosine, w the row's weight:

    as they are     value = |z - t|^2        dvalue/dz = 2 (z - t)
    normalised      value = |u - v|^2        dvalue/dz = (I - u u') 2 (u - v) / |z| = 2 (c u - v) / |z|

and dvalue/dh = P_s' dvalue/dz. A row is of one of two classes, each with its own P_s and b_s. Rows are
picked by index from the whole state: each is read once, r numbers of it are kept, and w dvalue/dz goes
where the teacher's row was. On the way back its product with P_s is added to the state's gradient in
place: float32 inside, rounded once.

Letters: K rows, d width, r rank, N all positions of a micro-batch; M rows, D numbers of a tile.
"""
import torch
import torch.nn.functional as F


def bridge_rows_text(h, z_t, at, w, P_s, b_s, inside, normalise):
    """h (N, d): student states. z_t (K, r): teacher rows, projected; *overwritten* with w dvalue/dz. at (K,):
    which rows of h. w (K,). P_s (2, r, d), b_s (2, r): the bridge; inside (K,): which of the two.
    normalise: both to length 1 first. -> value (K,), cosine (K,), float32 or wider."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    s = h[at].to(dtype)                                                      # (K, d)
    outer, inner = (F.linear(s, P, b) for P, b in zip(P_s, b_s, strict=True))
    z, t = torch.where(inside[:, None], inner, outer), z_t.to(dtype)         # (K, r)
    z_norm, t_norm = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (z, t))
    u, v = z / z_norm, t / t_norm
    cos = (u * v).sum(-1, keepdim=True)                                      # (K, 1)
    gap = u - v if normalise else z - t
    grad = 2 * (cos * u - v) / z_norm if normalise else 2 * gap
    z_t.copy_(grad * w.to(dtype)[:, None])
    return gap.square().sum(-1), cos.squeeze(-1)


def bridge_back_text(g, grad, at, P_s, inside, scale):
    """g (N, d): gradient of the states; scale grad P_s is *added* to its rows `at` (K,), no two alike.
    grad (K, r): what bridge_rows left. scale: the gradient from above, a tensor of one number."""
    rows = torch.where(inside[:, None], grad @ P_s[1], grad @ P_s[0]) * scale                # (K, d)
    g[at] = rows.add_(g[at]).to(g.dtype)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def compare(h, z_t, at, w, P_s, b_s, inside, value, cosine, K, d, r: tl.constexpr,
                NORMALISE: tl.constexpr, M: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr):
        """Program i: M rows of z_t against theirs of h."""
        k, rank = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, RANK)
        there, full = k < K, rank < r
        row = tl.load(at + k, mask=there, other=0)
        side = tl.load(inside + k, mask=there, other=0).to(tl.int32)
        z = tl.zeros((M, RANK), tl.float32)
        for c in tl.static_range(2):
            mine = there & (side == c)
            if tl.max(mine.to(tl.int32), 0) > 0:                             # often no row is inside
                for start in range(0, d, D):
                    column = start + tl.arange(0, D)
                    s = tl.load(h + row[:, None] * d + column[None, :], other=0.0,
                                mask=mine[:, None] & (column < d)[None, :]).to(tl.float32)
                    P = tl.load(P_s + (c * r + rank)[:, None] * d + column[None, :], other=0.0,
                                mask=full[:, None] & (column < d)[None, :])
                    z = tl.dot(s, tl.trans(P), z, input_precision='ieee')    # the other class adds zeros
                b = tl.load(b_s + c * r + rank, mask=full, other=0.0)
                z += tl.where(mine[:, None], b[None, :], 0.0)
        place, filled = k[:, None] * r + rank[None, :], there[:, None] & full[None, :]
        t = tl.load(z_t + place, mask=filled, other=0.0)
        z_norm = tl.maximum(tl.sqrt(tl.sum(z * z, 1)), 1e-12)[:, None]
        t_norm = tl.maximum(tl.sqrt(tl.sum(t * t, 1)), 1e-12)[:, None]
        u, v = z / z_norm, t / t_norm
        cos = tl.sum(u * v, 1)
        if NORMALISE:
            gap = u - v
            grad = 2 * (cos[:, None] * u - v) / z_norm
        else:
            gap = z - t
            grad = 2 * gap
        grad *= tl.load(w + k, mask=there, other=0.0).to(tl.float32)[:, None]
        tl.store(z_t + place, grad, mask=filled)
        tl.store(value + k, tl.sum(gap * gap, 1), mask=there)
        tl.store(cosine + k, cos, mask=there)

    @triton.jit
    def back(g, grad, at, P_s, inside, scale, K, d, r: tl.constexpr,
             M: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr):
        """Program (i, j): M rows, D columns of the product, summed over RANK of the r at a time."""
        k = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        column = tl.program_id(1) * D + tl.arange(0, D)
        there, wide = k < K, column < d
        row = tl.load(at + k, mask=there, other=0)
        side = tl.load(inside + k, mask=there, other=0).to(tl.int32)
        product = tl.zeros((M, D), tl.float32)
        for c in tl.static_range(2):
            mine = there & (side == c)
            if tl.max(mine.to(tl.int32), 0) > 0:
                for start in range(0, r, RANK):
                    rank = start + tl.arange(0, RANK)
                    x = tl.load(grad + k[:, None] * r + rank[None, :], other=0.0,
                                mask=mine[:, None] & (rank < r)[None, :])
                    P = tl.load(P_s + (c * r + rank)[:, None] * d + column[None, :], other=0.0,
                                mask=(rank < r)[:, None] & wide[None, :])
                    product = tl.dot(x, P, product, input_precision='ieee')
        place, filled = g + row[:, None] * d + column[None, :], there[:, None] & wide[None, :]
        before = tl.load(place, mask=filled, other=0.0).to(tl.float32)
        after = before + product * tl.load(scale).to(tl.float32)
        tl.store(place, after.to(g.dtype.element_ty), mask=filled)


def check(*tensors):
    if not all(x.is_contiguous() and x.dtype != torch.float64 for x in tensors):
        raise ValueError(f'contiguous, at most float32; got {[(x.dtype, x.stride()) for x in tensors]}')


def bridge_rows(h, z_t, at, w, P_s, b_s, inside, normalise):
    """As bridge_rows_text. All contiguous, h at most float32, z_t and the bridge float32."""
    check(h, z_t, at, w, P_s, b_s, inside)
    (K, r), d = z_t.shape, h.shape[1]
    value, cos = torch.empty(2, K, dtype=torch.float32, device=h.device)
    if K:
        rank = max(16, triton.next_power_of_2(r))                            # tl.dot takes no side below 16
        tile, warps = (64, 4) if rank <= 64 else (32, 8)                     # what the registers hold
        compare[triton.cdiv(K, 32),](h, z_t, at, w, P_s, b_s, inside, value, cos, K, d, r, normalise,
                                     32, rank, tile, num_warps=warps)
    return value, cos


def bridge_back(g, grad, at, P_s, inside, scale):
    """As bridge_back_text. All contiguous, g at most float32, grad and the bridge float32."""
    check(g, grad, at, P_s, inside)
    (K, r), d = grad.shape, g.shape[1]
    if K:
        rank = 16 if r <= 16 else 32
        back[triton.cdiv(K, 32), triton.cdiv(d, 64)](g, grad, at, P_s, inside, scale, K, d, r, 32, rank, 64)
