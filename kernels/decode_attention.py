"""
One decode step's attention: a new token in each row over the key/value cache, every row at its own length.

    y = softmax(q K' / sqrt(e)) V                over the length + 1 tokens there are, the new one included

The step costs what it costs to read the cache, so everything else rides along: norms, rotation and the
cache's new entry are made in registers, and the H/G query heads that share a key head are the rows of one
matrix product, for which that head is read once. A program for each row and key head would leave most of
a GPU idle at small B, so S programs divide a row's tokens, and keep, with s = log2(exp 1) q k / sqrt(e),

    m = max s        l = sum of 2^(s - m)        a = sum of 2^(s - m) v

over their own; with weights u_i = 2^(m_i - max m) these join to y = sum u_i a_i / sum u_i l_i. The new
token is never read back: program 0 has it in registers and writes it where no other program reads.
Lengths are read on the device: a CUDA graph of this launch stays right while the rows grow.

Letters: B rows, T tokens of room, H query heads, G key/value heads, e head width, R rotated numbers of a
head, S shares of a row's tokens.
"""
import math

import torch
import torch.nn.functional as F


def decode_attention_text(qkv, kv, length, cos, sin, q_norm=None, k_norm=None, eps=1e-6, longest=None,
                          mask=None):
    """qkv (B, H + 2G, e): the new tokens' projections: query heads, key heads, value heads. kv
    (B, 2, G, T, e): the cache, keys and values; *written* at position length (B,) of each row. cos, sin
    (B, R). q_norm, k_norm: weights (e,) of a head's RMSNorm, which precedes the rotation. -> y (B, H e).

    longest: no row holds more, the new token counted; only so much is read. mask (B, 1, 1, longest): 0 at
    a row's tokens, -inf beyond; made once it serves every layer, and as floats no layer converts it.
    """
    B, _, G, T, e = kv.shape
    H, longest = qkv.shape[1] - 2 * G, longest or T
    x = qkv.clone(memory_format=torch.contiguous_format)
    for heads, weight in ((x[:, :H], q_norm), (x[:, H:H + G], k_norm)):
        if weight is not None:
            heads.copy_(F.rms_norm(heads, (e,), weight, eps))
    turning = x[:, :H + G, :cos.shape[-1]]
    a, b = turning.chunk(2, -1)
    turned = torch.cat([-b, a], -1)          # a copy, before the next line overwrites a and b
    turning.mul_(cos[:, None]).addcmul_(turned, sin[:, None])
    kv[torch.arange(B, device=kv.device), :, :, length] = x[:, H:].view(B, 2, G, e)
    if mask is None:
        beyond = torch.arange(longest, device=kv.device) > length[:, None]
        mask = torch.zeros_like(beyond, dtype=x.dtype).masked_fill_(beyond, -math.inf)[:, None, None]
    k, v = kv[:, :, :, :longest].unbind(1)
    q = x[:, :H].view(B, G, H // G, e)       # a head group is the "sequence"
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H * e)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def turn(x, column, there, weight, cos, sin, eps, e: tl.constexpr, R: tl.constexpr):
        """Heads at x, one or a column of them, normed and rotated, in float32."""
        low = column < R // 2
        partner = tl.where(low, column + R // 2, column - R // 2)            # beyond R: any, its sine is 0
        a = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
        b = tl.load(x + partner, mask=there, other=0.0).to(tl.float32)
        if weight is not None:
            scale = tl.rsqrt(tl.sum(a * a, -1, keep_dims=True) / e + eps)
            a *= scale * tl.load(weight + column, mask=column < e, other=0.0).to(tl.float32)
            b *= scale * tl.load(weight + partner, mask=column < e, other=0.0).to(tl.float32)
        c = tl.load(cos + column, mask=column < R, other=1.0).to(tl.float32)
        s = tl.load(sin + column, mask=column < R, other=0.0).to(tl.float32)
        return a * c + tl.where(low, -b, b) * s

    @triton.jit
    def attend(qkv, kv, length, cos, sin, q_norm, k_norm, part, most, total, eps, scale,
               kv_row, kv_side, kv_head, kv_token, H: tl.constexpr, G: tl.constexpr, e: tl.constexpr,
               R: tl.constexpr, S: tl.constexpr, M: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
               CPU: tl.constexpr):
        """Program (b G + g, i): share i of row b for the query heads of key head g, N tokens at a time. The
        cache is large: 64 bits to find a head in it, 32 within."""
        # the interpreter holds bfloat16 as whole numbers, and would multiply those
        FACTOR: tl.constexpr = tl.float32 if CPU else kv.dtype.element_ty
        i = tl.program_id(1)
        b, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
        head, column = tl.arange(0, M), tl.arange(0, E)
        ours, wide = head < H // G, column < e
        qkv += b * (H + 2 * G) * e
        kv += b * kv_row + g.to(tl.int64) * kv_head
        cos += b * R
        sin += b * R
        x = qkv + (g * (H // G) + head)[:, None] * e
        q = turn(x, column[None, :], ours[:, None] & wide[None, :], q_norm, cos, sin, eps, e, R)
        q = q.to(kv.dtype.element_ty)
        n = tl.load(length + b).to(tl.int32)
        m = tl.full((M,), float('-inf'), tl.float32)
        l = tl.zeros((M,), tl.float32)
        a = tl.zeros((M, E), tl.float32)
        if i == 0:                           # the new token, rounded as later steps will read it
            k = turn(qkv + (H + g) * e, column, wide, k_norm, cos, sin, eps, e, R).to(q.dtype)
            v = tl.load(qkv + (H + G + g) * e + column, mask=wide, other=0.0).to(q.dtype)
            tl.store(kv + n * kv_token + column, k, mask=wide)
            tl.store(kv + kv_side + n * kv_token + column, v, mask=wide)
            m = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
            l += 1.0
            a += v.to(tl.float32)[None, :]
        share = tl.cdiv(n, S * N) * N
        for start in range(i * share, tl.minimum((i + 1) * share, n), N):
            token = start + tl.arange(0, N)
            at = token[:, None] * kv_token + column[None, :]
            held = (token < n)[:, None] & wide[None, :]
            keys = tl.load(kv + at, mask=held, other=0.0)                    # (N, E)
            s = tl.dot(q.to(FACTOR), tl.trans(keys.to(FACTOR)), input_precision='ieee')      # (M, N)
            s = tl.where((token < n)[None, :], s * scale, float('-inf'))
            higher = tl.maximum(m, tl.max(s, 1))                             # finite: every block has a token
            p, fade = tl.exp2(s - higher[:, None]), tl.exp2(m - higher)
            l = l * fade + tl.sum(p, 1)
            values = tl.load(kv + kv_side + at, mask=held, other=0.0)
            p = p.to(values.dtype).to(FACTOR)
            a = tl.dot(p, values.to(FACTOR), a * fade[:, None], input_precision='ieee')
            m = higher
        place = (b * H + g * (H // G) + head) * S + i
        if S == 1:
            a /= l[:, None]
        else:
            tl.store(most + place, m, mask=ours)
            tl.store(total + place, l, mask=ours)
        tl.store(part + place[:, None] * e + column[None, :], a.to(part.dtype.element_ty),
                 mask=ours[:, None] & wide[None, :])

    @triton.jit
    def join(part, most, total, y, e: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
        """Program b H + h: the shares of a query head. One without tokens has m = -inf, and no weight."""
        place, column = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S), tl.arange(0, E)
        wide = column < e
        m = tl.load(most + place)
        u = tl.exp2(m - tl.max(m, 0))
        a = tl.load(part + place[:, None] * e + column[None, :], mask=wide[None, :], other=0.0)      # (S, E)
        a = tl.sum(a * u[:, None], 0) / tl.sum(tl.load(total + place) * u, 0)
        tl.store(y + tl.program_id(0).to(tl.int64) * e + column, a.to(y.dtype.element_ty), mask=wide)


def decode_attention(qkv, kv, length, cos, sin, q_norm=None, k_norm=None, eps=1e-6, longest=None,
                     mask=None, S=None):
    """As decode_attention_text, at most float32; longest and mask are not needed here. S: a power of two;
    if None, it makes two to four programs a multiprocessor, but at most 64, and no more than T has blocks."""
    B, _, G, T, e = kv.shape
    H, R = qkv.shape[1] - 2 * G, cos.shape[-1]
    if kv.dtype == torch.float64 or kv.stride(-1) != 1:
        raise ValueError(f'decode_attention: at most float32, e contiguous; got {kv.dtype}, {kv.stride()}')
    qkv, length, cos, sin = (x.contiguous() for x in (qkv, length, cos, sin))
    M, E = (max(16, triton.next_power_of_2(n)) for n in (H // G, e))         # tl.dot takes no side below 16
    N = 64 if E * kv.element_size() <= 256 else 32                           # 16 KB of keys
    if S is None:
        chips = torch.cuda.get_device_properties(kv.device).multi_processor_count if kv.is_cuda else 4
        S = min(64, *(triton.next_power_of_2(triton.cdiv(a, b)) for a, b in ((2 * chips, B * G), (T, N))))
    y = torch.empty(B, H * e, dtype=qkv.dtype, device=kv.device)
    part = y if S == 1 else torch.empty(B * H, S, e, dtype=torch.float32, device=kv.device)
    most, total = torch.empty(2, B * H, S, dtype=torch.float32, device=kv.device)
    attend[B * G, S](qkv, kv, length, cos, sin, q_norm, k_norm, part, most, total, eps,
                     math.log2(math.e) / e**.5, *kv.stride()[:4], H, G, e, R, S, M, E, N, not kv.is_cuda,
                     num_warps=2 * kv.element_size(), num_stages=3)
    if S > 1:
        join[B * H,](part, most, total, y, e, S, E)
    return y
