"""
The attention of one decode step: each row of the batch adds one token and attends to its KV cache.

    y = softmax(q K' / sqrt(e)) V                over the tokens in the cache and the new token

`decode_attention_reference` is the PyTorch reference implementation, for every device. `decode_attention` is
the Triton kernel that must equal it. Every row has its own length, so that answers of different lengths can
share a batch.

The time of a step is the time to read the cache. The kernel therefore does everything else in registers: it
applies RMSNorm and rotation to the new token's query and key, and writes the new key and value to the cache.
The H / G query heads that share a key head are the rows of one matrix product, so a key head is read once.

One program for each row and key head would leave most of a GPU idle at small B. So S programs divide the
tokens of a row among them, a share each. With s = log2(exp 1) q k / sqrt(e), each computes over its share

    m = max s        l = sum of 2^(s - m)        a = sum of 2^(s - m) v

and the shares are joined: y = sum u_i a_i / sum u_i l_i with u_i = 2^(m_i - max m). Example: two shares with
the scores s = (0, 1) and (3) have m = 1 and 3, l = 1.5 and 1, so u = 1/4 and 1. The denominator is 1.5 / 4 +
1 = 1.375, which is 2^0 + 2^1 + 2^3 = 11 without the factor 2^-3 that all terms share.

The programs of a row and key head count how many of them have written their share, and the last one to write
reads and joins them all. So no program waits for another. The counters are zero before and after a launch.

The new token belongs to program 0. It takes its key and value from registers and writes them where no other
program reads. The lengths are read on the device: a CUDA graph of this launch stays valid while the rows
grow.

What it does not do: several new tokens per row (prefill uses PyTorch's attention), float64, gradients.

Letters: B rows, T tokens that a row has room for, H query heads, G key/value heads, e head width, R rotated
numbers of a head, S shares of a row's tokens. In the kernel also: M query heads of a key head, E head width
(both rounded up to a power of two), N tokens that are read at once.
"""
import math

import torch
import torch.nn.functional as F


def decode_attention_reference(qkv, kv, length, cos, sin, q_norm=None, k_norm=None, eps=1e-6, longest=None,
                               mask=None, arrived=None):
    """One decode step's attention in PyTorch -> y (B, H e). The new key and value are *written* into kv.

    qkv (B, H + 2G, e): the new token of each row: query heads, key heads, value heads. kv (B, 2, G, T, e):
    the cache, keys and values. length (B,): the tokens that a row holds, and so the position of the new
    one. cos, sin (B, R): of the rotation. q_norm, k_norm: weights (e,) of a head's RMSNorm, which precedes
    the rotation. longest: no row holds more tokens, the new one included; only so much is read. mask (B, 1,
    1, longest): 0 at a row's tokens, -inf beyond; the caller makes it once for all layers. arrived: counters
    of the Triton kernel, which are not needed here.
    """
    B, _, G, T, e = kv.shape
    H = qkv.shape[1] - 2 * G
    longest = longest or T

    # Norm of the query and key heads.
    x = qkv.clone(memory_format=torch.contiguous_format)                     # (B, H + 2G, e)
    if q_norm is not None:
        x[:, :H] = F.rms_norm(x[:, :H], (e,), q_norm, eps)
    if k_norm is not None:
        x[:, H:H + G] = F.rms_norm(x[:, H:H + G], (e,), k_norm, eps)

    # Rotation of their first R numbers, in place: a, b -> a cos - b sin, b cos + a sin.
    rotated = x[:, :H + G, :cos.shape[-1]]                                   # (B, H + G, R)
    a, b = rotated.chunk(2, -1)
    partner = torch.cat([-b, a], -1)         # a copy, made before the next line overwrites a and b
    rotated.mul_(cos[:, None]).addcmul_(partner, sin[:, None])

    # Write the new key and value to the cache.
    row = torch.arange(B, device=kv.device)
    kv[row, :, :, length] = x[:, H:].view(B, 2, G, e)

    # Attend to the tokens that each row holds. The H / G query heads of a key head stand where a sequence
    # usually stands: attention treats them as H / G queries.
    if mask is None:
        beyond = torch.arange(longest, device=kv.device) > length[:, None]   # (B, longest)
        mask = torch.zeros_like(beyond, dtype=x.dtype).masked_fill_(beyond, -math.inf)[:, None, None]
    k, v = kv[:, :, :, :longest].unbind(1)                                   # (B, G, longest, e)
    q = x[:, :H].view(B, G, H // G, e)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H * e)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def norm_and_rotate(x, column, inside, weight, cos, sin, eps, e: tl.constexpr, R: tl.constexpr):
        """Load the heads at x (one, or a column of them), apply norm and rotation -> float32."""
        # Number i of a head is rotated together with number i + R / 2. Beyond R the sine is 0, so any
        # partner will do.
        first_half = column < R // 2
        partner = tl.where(first_half, column + R // 2, column - R // 2)
        a = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            scale = tl.rsqrt(tl.sum(a * a, -1, keep_dims=True) / e + eps)
            a *= scale * tl.load(weight + column, mask=column < e, other=0.0).to(tl.float32)
            b *= scale * tl.load(weight + partner, mask=column < e, other=0.0).to(tl.float32)
        c = tl.load(cos + column, mask=column < R, other=1.0).to(tl.float32)
        s = tl.load(sin + column, mask=column < R, other=0.0).to(tl.float32)
        return a * c + tl.where(first_half, -b, b) * s

    @triton.jit
    def read_share(q, m, l, a, kv, first, end, n, kv_side, kv_token, column, real_column, scale,
                   N: tl.constexpr, FACTOR: tl.constexpr):
        """Add the tokens first to end - 1 of a row, which holds n, to m, l and a of the queries q (M, E)."""
        for start in range(first, end, N):
            token = start + tl.arange(0, N)
            offset = token[:, None] * kv_token + column[None, :]
            held = (token < n)[:, None] & real_column[None, :]
            keys = tl.load(kv + offset, mask=held, other=0.0)                # (N, E)
            s = tl.dot(q.to(FACTOR), tl.trans(keys.to(FACTOR)), input_precision='ieee')      # (M, N)
            s = tl.where((token < n)[None, :], s * scale, float('-inf'))

            # When the maximum rises, rescale what was summed so far. It is finite, because start < n.
            new_m = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - new_m[:, None])                                  # (M, N)
            rescale = tl.exp2(m - new_m)
            l = l * rescale + tl.sum(p, 1)
            values = tl.load(kv + kv_side + offset, mask=held, other=0.0)    # (N, E)
            p = p.to(values.dtype).to(FACTOR)
            a = tl.dot(p, values.to(FACTOR), a * rescale[:, None], input_precision='ieee')
            m = new_m
        return m, l, a

    @triton.jit
    def leave_share(m, l, a, share_a, share_m, share_l, at, arrived, real_head, column, inside,
                    e: tl.constexpr):
        """Leave m, l and a of a share in memory -> how many programs of the row and key head did so before.

        at (M,): the numbers of the share in share_m and share_l, one for each query head.

        All threads of the program write. The barrier lets none of them go on before all have written, and
        the atomic operation makes what they wrote visible to the programs that count after this one.
        """
        tl.store(share_m + at, m, mask=real_head)
        tl.store(share_l + at, l, mask=real_head)
        tl.store(share_a + at[:, None] * e + column[None, :], a, mask=inside)
        tl.debug_barrier()
        return tl.atomic_add(arrived, 1, sem='acq_rel', scope='gpu')

    @triton.jit
    def join(share_a, share_m, share_l, output, real_head, column, inside, shares,
             e: tl.constexpr, S: tl.constexpr, M: tl.constexpr, E: tl.constexpr):
        """Join the first `shares` shares of the query heads with the numbers `output` (M,) -> y (M, E).

        Other programs wrote them a moment ago: '.cg' reads from the cache that all multiprocessors share.
        """
        # The largest m of each head; 0 for the heads that only fill up the power of two.
        share = tl.arange(0, S)
        exists = real_head[:, None] & (share < shares)[None, :]
        m = tl.load(share_m + output[:, None] * S + share[None, :], mask=exists, other=float('-inf'),
                    cache_modifier='.cg')                                    # (M, S)
        top = tl.where(real_head, tl.max(m, 1), 0.0)                         # (M,)

        # Sum u l and u a over the shares.
        l = tl.zeros((M,), tl.float32)
        a = tl.zeros((M, E), tl.float32)
        for i in range(0, shares):
            at = output * S + i
            u = tl.exp2(tl.load(share_m + at, mask=real_head, other=0.0, cache_modifier='.cg') - top)
            l += u * tl.load(share_l + at, mask=real_head, other=1.0, cache_modifier='.cg')
            share_row = share_a + at[:, None] * e + column[None, :]
            a += u[:, None] * tl.load(share_row, mask=inside, other=0.0, cache_modifier='.cg')
        return a / l[:, None]

    @triton.jit
    def attend(qkv, kv, length, cos, sin, q_norm, k_norm, y, share_a, share_m, share_l, arrived, eps, scale,
               kv_row, kv_side, kv_head, kv_token, H: tl.constexpr, G: tl.constexpr, e: tl.constexpr,
               R: tl.constexpr, S: tl.constexpr, M: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
               CPU: tl.constexpr):
        """Program (b G + g, i): share i of row b, for the query heads of key head g.

        kv_row, kv_side, kv_head, kv_token: strides of the cache. scale: log2(exp 1) / sqrt(e).
        share_a, share_m, share_l: a, m and l of each share. arrived: how many of the S programs of each row
        and key head have written theirs. These four are not used if S = 1.
        """
        # The interpreter stores bfloat16 as integers, and tl.dot would multiply these: use float32 there.
        FACTOR: tl.constexpr = tl.float32 if CPU else kv.dtype.element_ty

        # Find the row and the head. The cache can have more than 2^31 numbers: offsets of rows and heads
        # are 64-bit, offsets within a head are 32-bit.
        i = tl.program_id(1)
        b = (tl.program_id(0) // G).to(tl.int64)
        g = tl.program_id(0) % G
        head = tl.arange(0, M)
        column = tl.arange(0, E)
        real_head = head < H // G            # the others only fill up the power of two
        real_column = column < e
        qkv += b * (H + 2 * G) * e
        kv += b * kv_row + g.to(tl.int64) * kv_head
        cos += b * R
        sin += b * R

        # The query heads of this key head, rounded to the dtype of the cache.
        x = qkv + (g * (H // G) + head)[:, None] * e
        inside = real_head[:, None] & real_column[None, :]
        q = norm_and_rotate(x, column[None, :], inside, q_norm, cos, sin, eps, e, R)
        q = q.to(kv.dtype.element_ty)                                        # (M, E)

        # The running m, l and a of the header.
        n = tl.load(length + b).to(tl.int32)
        m = tl.full((M,), float('-inf'), tl.float32)
        l = tl.zeros((M,), tl.float32)
        a = tl.zeros((M, E), tl.float32)

        # Program 0 also has the new token. Its key is rounded as later steps will read it from the cache.
        if i == 0:
            k = norm_and_rotate(qkv + (H + g) * e, column, real_column, k_norm, cos, sin, eps, e, R)
            k = k.to(q.dtype)
            v = tl.load(qkv + (H + G + g) * e + column, mask=real_column, other=0.0).to(q.dtype)
            tl.store(kv + n * kv_token + column, k, mask=real_column)
            tl.store(kv + kv_side + n * kv_token + column, v, mask=real_column)
            m = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
            l += 1.0
            a += v.to(tl.float32)[None, :]

        # Then its share of the tokens that the cache already holds.
        share = tl.cdiv(n, S * N) * N
        end = tl.minimum((i + 1) * share, n)
        m, l, a = read_share(q, m, l, a, kv, i * share, end, n, kv_side, kv_token, column, real_column, scale,
                             N, FACTOR)

        # One share is the whole row: divide.
        output = b * H + g * (H // G) + head                                 # (M,)
        y_row = y + output[:, None] * e + column[None, :]                    # (M, E)
        if S == 1:
            tl.store(y_row, (a / l[:, None]).to(y.dtype.element_ty), mask=inside)

        # Otherwise the program that comes last joins the shares that have tokens, and sets the counter back
        # for the next launch.
        else:
            arrived += tl.program_id(0)
            earlier = leave_share(m, l, a, share_a, share_m, share_l, output * S + i, arrived, real_head,
                                  column, inside, e)
            if earlier == S - 1:
                shares = tl.maximum(tl.cdiv(n, tl.maximum(share, 1)), 1)
                a = join(share_a, share_m, share_l, output, real_head, column, inside, shares, e, S, M, E)
                tl.store(y_row, a.to(y.dtype.element_ty), mask=inside)
                tl.store(arrived, 0)


def decode_attention(qkv, kv, length, cos, sin, q_norm=None, k_norm=None, eps=1e-6, longest=None,
                     mask=None, arrived=None, S=None):
    """`decode_attention_reference` as a Triton kernel, for at most float32.

    longest and mask are not needed here. arrived: at least B G int32 zeros, which are zeros again afterwards;
    None: they are made here, which is one more launch. S: the number of shares, a power of two; None: as many
    as make two to four programs per multiprocessor, but at most 64 and no more than T has blocks of N tokens.
    """
    B, _, G, T, e = kv.shape
    H = qkv.shape[1] - 2 * G
    R = cos.shape[-1]
    if kv.dtype == torch.float64 or kv.stride(-1) != 1:
        raise ValueError(f'decode_attention: kv is {kv.dtype} with strides {kv.stride()}; '
                         'it must be at most float32, with stride 1 in the last axis')
    qkv, length, cos, sin = (x.contiguous() for x in (qkv, length, cos, sin))

    # tl.dot takes no side below 16. N tokens of one head are at most 16 KB.
    M = max(16, triton.next_power_of_2(H // G))
    E = max(16, triton.next_power_of_2(e))
    N = 64 if E * kv.element_size() <= 256 else 32
    if S is None:
        processors = torch.cuda.get_device_properties(kv.device).multi_processor_count if kv.is_cuda else 4
        enough = triton.next_power_of_2(triton.cdiv(2 * processors, B * G))
        blocks = triton.next_power_of_2(triton.cdiv(T, N))
        S = min(64, enough, blocks)

    # With one share the kernel writes y directly. Otherwise the shares are kept in float32 and joined.
    y = torch.empty(B, H * e, dtype=qkv.dtype, device=kv.device)
    share_a = share_m = share_l = None
    if S > 1:
        share_a = torch.empty(B * H, S, e, dtype=torch.float32, device=kv.device)
        share_m, share_l = torch.empty(2, B * H, S, dtype=torch.float32, device=kv.device)
        if arrived is None:
            arrived = torch.zeros(B * G, dtype=torch.int32, device=kv.device)
        assert arrived.is_contiguous() and arrived.numel() >= B * G, (arrived.shape, B, G)
    attend[B * G, S](qkv, kv, length, cos, sin, q_norm, k_norm, y, share_a, share_m, share_l, arrived, eps,
                     math.log2(math.e) / e**.5, *kv.stride()[:4], H, G, e, R, S, M, E, N, not kv.is_cuda,
                     num_warps=2 * kv.element_size(), num_stages=3)
    return y
