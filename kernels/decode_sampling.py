"""
The end of a decode step: draw one token for each slot from its logits, and record it in the slot's state.

    u = the slot's uniform number at this position       depends on its key and its number of tokens only
    token = the one at which the cumulative sum of the probabilities passes u
    record the token; if it ends the answer, the slot is done

`sample_next_reference` is the PyTorch reference implementation, for every device; the functions that it calls
are below it. It consists of 68 operations on small tensors, and each of them is a kernel.
`sample_next_triton` does the same in two kernels:

    sum_blocks     each program reads 1024 logits x of a row: their maximum m_j, and s_j = sum exp(x - m_j)
    draw_token     one program a row: the block where the cumulative sum of s_j exp(m_j - max m) passes u
                   of its total, then the token within this block, then the record

In this way several programs share the logits of a row, and `draw_token` reads only one block of them again.
Exponentials are float32. The sums over blocks, and over the tokens of the block, are float64. The token is
the reference's, unless u is so near to the border between two tokens that rounding decides. At temperature 0
the likeliest token has the mass 1 and the others have 0, and the same search finds it.

Top-k and top-p need sorted probabilities, and PyTorch sorts them. Then `distribution` takes 8 to 18 more
launches, and the kernels draw from the logarithms of its probabilities.

What the kernels do not do: float64.

Letters: n slots that get a token, B all slots, V vocabulary; in the kernels N is the size of a block.
"""
import torch
import torch.nn.functional as F


def sample_next_reference(state, slots, logits):
    """Sample one token for each of these slots (n,) from its logits (n, V), and record it in the state.

    state: an object with the tensors keys, ids, token, count, max_count, done and stopped of all slots, with
    is_stop (V,), and with the settings `sampling`: see Slots and Sampling in rollout.py.
    """
    sampling = state.sampling
    u = uniform(state.keys[slots], state.count[slots])                       # (n,)
    token = pick(logits, u, sampling.temperature, sampling.top_k, sampling.top_p, sampling.vocab)

    # A finished slot keeps its count. Its token goes to the column after its answer, which is never read.
    active = ~state.done[slots]                                              # (n,)
    state.ids[slots, state.count[slots]] = token
    state.count[slots] += active
    state.token[slots] = token

    # An answer ends with a stop token, or at its greatest length. Both can happen at once.
    stopped = state.is_stop[token] & active
    state.stopped[slots] |= stopped
    state.done[slots] |= stopped | (state.count[slots] == state.max_count[slots])


# ---- randomness: splitmix64, one stream per answer --------------------------------------------

GOLDEN = -0x61c8864680b583eb    # 2^64 / golden ratio, as a signed 64-bit number


def signed(x):
    """A Python integer, modulo 2^64, as the signed 64-bit number that torch holds: 2^64 - 1 -> -1."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def shift_right(z, bits):
    """Shift an int64 tensor as if it were unsigned: `>>` copies the sign bit, the mask removes the copies."""
    return z >> bits & (1 << 64 - bits) - 1


def mix(z):
    """The output function of splitmix64 on an int64 tensor: one bit of z changes half the bits of the result.

    Products wrap around modulo 2^64, in int64 as in uint64.
    """
    z = (z ^ shift_right(z, 30)) * signed(0xbf58476d1ce4e5b9)
    z = (z ^ shift_right(z, 27)) * signed(0x94d049bb133111eb)
    return z ^ shift_right(z, 31)


def stream_keys(seed, step, prompt, sample):
    """The key of each answer's stream of random numbers. prompt, sample: int64 (B,) -> int64 (B,).

    The key is a hash: it takes in one number after the other and mixes after each, so that answers whose
    numbers differ in one place only have unrelated keys.
    """
    key = torch.zeros_like(prompt)
    for part in (signed(seed), signed(step), prompt, sample):
        key = mix(key + GOLDEN ^ part)
    return key


def uniform(keys, position):
    """The number of each stream at `position`, an int or (B,) -> float64 (B,) in [0, 1).

    Splitmix64 is a counter that is mixed: number t of the stream is mix(key + (t + 1) * GOLDEN), so any
    number can be computed without the ones before it. Its upper 53 bits, divided by 2^53, are a float64.
    Example: key 1234567, position 0 -> mix gives 6457827717110365317 -> 0.3500795420214081.
    """
    # Apple's GPUs have no float64: compute these few numbers on the CPU.
    if keys.device.type == 'mps':
        keys = keys.cpu()
        position = torch.as_tensor(position).cpu()
    if torch.is_tensor(position):
        counter = (position + 1) * GOLDEN
    else:
        counter = signed(GOLDEN * (position + 1))
    upper_bits = shift_right(mix(keys + counter), 11)
    return upper_bits.double() * 2.0**-53


# ---- one token --------------------------------------------------------------------------------

def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, V) -> probabilities (B, V) in float32, after temperature, top-k and top-p, in this order.

    If several tokens tie at rank k, all of them are kept. The probabilities that remain are not normalised
    again, so a row can sum to less than 1; `pick` multiplies u by the sum.
    """
    p = (logits.float() / temperature).softmax(-1)
    if 0 < top_k < p.shape[-1]:
        smallest_kept = p.topk(top_k).values[:, -1:]                         # (B, 1)
        p = p.where(p >= smallest_kept, 0.0)
    if top_p < 1:
        # Keep a token if the likelier tokens together have less than top_p: the likeliest always stays.
        p = p / p.sum(-1, keepdim=True)
        ranked, order = p.sort(descending=True, stable=True)
        mass_before = ranked.cumsum(-1) - ranked
        ranked = ranked.where(mass_before < top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    return p


def first_above(mass, x):
    """The first column of each row where the cumulative mass (B, n) is above x (B, 1) -> (B, 1).

    The cumulative mass increases in this column, so its token has a positive probability. Rounding can make x
    as large as the total mass, and then no column is above it. So x is kept just below the total. The clamp
    is for NaN.
    """
    just_below_total = torch.nextafter(mass[:, -1:], torch.zeros_like(x))
    column = torch.searchsorted(mass, torch.minimum(x, just_below_total), right=True)
    return column.clamp(max=mass.shape[-1] - 1)


def invert(p, u):
    """Probabilities (B, V) and u (B,) -> the token (B, 1) at which the cumulative sum passes u.

    Example: p = [.2, .5, .3] has the cumulative sum [.2, .7, 1.]; u = .6 gives token 1, u = .75 token 2.
    """
    mass = p.to(u).cumsum(-1)                                                # (B, V)
    return first_above(mass, u[:, None] * mass[:, -1:])


def invert_in_blocks(p, u, block_size=512):
    """`invert` in two stages: first the block of 512 tokens, then the token within it.

    No running sum is longer than a block or than the number of blocks, instead of 150,000 tokens.
    """
    B, V = p.shape
    blocks = F.pad(p, (0, -V % block_size)).view(B, -1, block_size)          # (B, blocks, 512)
    block_mass = blocks.sum(-1, dtype=u.dtype).cumsum(-1)                    # (B, blocks)
    mass = F.pad(block_mass, (1, 0))                                         # (B, 1 + blocks), from 0
    x = u[:, None] * mass[:, -1:]                                            # (B, 1)
    block = first_above(mass[:, 1:].contiguous(), x)                         # (B, 1)

    # Subtract the mass of the blocks before it from x, and search within the block for what remains.
    inside = blocks.take_along_dim(block[..., None], 1).squeeze(1)           # (B, 512)
    token = first_above(inside.to(u).cumsum(-1), x - mass.gather(-1, block))
    return block * block_size + token


def pick(logits, u, temperature=1.0, top_k=0, top_p=1.0, vocab=None):
    """One token a row: invert the cumulative distribution of the logits (B, V) at u (B,) in [0, 1) -> (B,).

    The sums are float64. In float32 a sum over 150,000 tokens could end below 1, and a u above that sum would
    give the last token, even if top-p had removed it. The settings are those of `Sampling`.
    """
    logits = logits[:, :vocab]
    if temperature == 0:
        return logits.argmax(-1)
    p = distribution(logits, temperature, top_k, top_p).to(u.device)         # (B, V)
    if p.shape[-1] <= 4096:
        token = invert(p, u)
    else:
        token = invert_in_blocks(p, u)

    # NaN in the logits can give any column. Stay in the vocabulary: the loss then says what is wrong.
    return token.squeeze(-1).clamp(max=p.shape[-1] - 1).to(logits.device)


# ---- the same in two kernels ------------------------------------------------------------------

BLOCK = 1024                    # logits that one program adds up

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:
    @triton.jit
    def load_block(logits, j, V, vocab, temperature, N: tl.constexpr):
        """Block j of a row's V logits, divided by the temperature; -inf from column `vocab` on.

        The load is masked by V alone. V is usually divisible by 16 and vocab is not, and a thread can read
        several logits at once only where the mask is the same for all of them.
        """
        column = j * N + tl.arange(0, N)
        x = tl.load(logits + column, mask=column < V, other=float('-inf')).to(tl.float32)
        return tl.where(column < vocab, x / temperature, float('-inf'))

    @triton.jit
    def sum_blocks(logits, row_stride, block_max, block_sum, V, vocab, temperature, N: tl.constexpr):
        """Program (b, j): the maximum of block j of row b, and the sum of exp(x - maximum)."""
        row = tl.program_id(0).to(tl.int64)
        j = tl.program_id(1)
        x = load_block(logits + row * row_stride, j, V, vocab, temperature, N)

        # If all logits of the block are -inf, so is m, and x - m would be NaN. With -1e38 the sum is 0.
        m = tl.max(x, 0)
        s = tl.sum(tl.exp(x - tl.maximum(m, -1e38)), 0)
        at = row * tl.num_programs(1) + j
        tl.store(block_max + at, m)
        tl.store(block_sum + at, s)

    @triton.jit
    def search(mass, u, N: tl.constexpr):
        """Where does the cumulative mass (N,) pass u times the total? -> the index, and u within its mass.

        Example: mass = [2, 0, 6] and u = .625. The cumulative mass [2, 2, 8] passes 5 at index 2, and 5 is
        half of the way from 2 to 8: (2, .5). An index without mass is never found.
        """
        index = tl.arange(0, N)
        cumulative = tl.cumsum(mass, 0)
        has_mass = mass > 0
        x = u * tl.sum(mass, 0)
        first_above = tl.min(tl.where(has_mass & (cumulative > x), index, N), 0)

        # Rounding can make x as large as the total, and nothing is above it: take the last index with mass.
        last = tl.max(tl.where(has_mass, index, 0), 0)
        found = tl.minimum(first_above, last)
        end = tl.sum(tl.where(index == found, cumulative, 0.0), 0)
        size = tl.sum(tl.where(index == found, mass, 0.0), 0)
        return found, (x - (end - size)) / size

    @triton.jit
    def draw_token(logits, row_stride, block_max, block_sum, slots, keys, ids, ids_stride, token, count,
                   max_count, done, stopped, is_stop, blocks, V, vocab, temperature, GREEDY: tl.constexpr,
                   BLOCKS: tl.constexpr, N: tl.constexpr):
        """Program b: draw and record the token of slot slots[b]. BLOCKS is `blocks`, as a power of two."""
        row = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + row)
        position = tl.load(count + slot)
        longest = tl.load(max_count + slot)
        was_done = tl.load(done + slot).to(tl.int32) != 0
        was_stopped = tl.load(stopped + slot).to(tl.int32) != 0

        # The uniform number: see `mix` and `uniform`. Unsigned numbers wrap around and shift as wanted.
        z = tl.load(keys + slot).to(tl.uint64, bitcast=True)
        z += (position + 1).to(tl.uint64, bitcast=True) * 0x9e3779b97f4a7c15
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb
        z = z ^ (z >> 31)
        u = (z >> 11).to(tl.float64) * 1.1102230246251565e-16                # 2^-53

        # Find the block. A mass is a probability, relative to the row's largest.
        block = tl.arange(0, BLOCKS)
        exists = block < blocks
        m = tl.load(block_max + row * blocks + block, mask=exists, other=float('-inf'))
        s = tl.load(block_sum + row * blocks + block, mask=exists, other=0.0)
        largest = tl.max(m, 0)
        if GREEDY:
            mass = (m == largest).to(tl.float64)
            u *= 0.0
        else:
            mass = s.to(tl.float64) * tl.exp(m - largest).to(tl.float64)
        j, u = search(mass, u, BLOCKS)

        # Find the token within the block. The sum of its masses is rounded differently than in sum_blocks. So
        # the search continues with u, a share of the block's mass. With a remainder of the mass, as in the
        # reference, it could end behind the last likely token.
        logit = load_block(logits + row * row_stride, j, V, vocab, temperature, N)
        if GREEDY:
            mass = (logit == largest).to(tl.float64)
        else:
            mass = tl.exp(logit - largest).to(tl.float64)
        index, u = search(mass, u, N)

        # NaN in the logits can give any column: stay in the vocabulary.
        drawn = tl.minimum(j * N + index, vocab - 1).to(tl.int64)

        # The record, line by line as in the reference.
        tl.store(ids + slot * ids_stride + position, drawn)
        position = tl.where(was_done, position, position + 1)
        tl.store(count + slot, position)
        tl.store(token + slot, drawn)
        stops = (tl.load(is_stop + drawn).to(tl.int32) != 0) & (was_done == 0)
        tl.store(stopped + slot, was_stopped | stops)
        tl.store(done + slot, was_done | stops | (position == longest))


def sample_next_triton(state, slots, logits):
    """The same as sample_next_reference, for logits of at most float32."""
    if logits.dtype == torch.float64:
        raise ValueError(f'sample_next_triton: logits of at most float32; got {logits.dtype}')
    sampling = state.sampling
    n, V = logits.shape
    vocab = min(sampling.vocab or V, V)
    greedy = sampling.temperature == 0
    temperature = 1.0 if greedy else float(sampling.temperature)

    # With top-k or top-p draw from what they keep. Logarithms of probabilities are logits; log 0 is -inf.
    if not greedy and (sampling.top_k > 0 or sampling.top_p < 1):
        p = distribution(logits[:, :vocab], temperature, sampling.top_k, sampling.top_p)     # (n, vocab)
        logits = p.log()
        V = vocab
        temperature = 1.0
    if logits.stride(1) != 1:
        logits = logits.contiguous()

    # One program for each block of each row, then one for each row.
    blocks = triton.cdiv(vocab, BLOCK)
    block_max, block_sum = torch.empty(2, n, blocks, dtype=torch.float32, device=logits.device)
    BLOCKS = triton.next_power_of_2(blocks)
    sum_blocks[n, blocks](logits, logits.stride(0), block_max, block_sum, V, vocab, temperature, BLOCK)
    draw_token[n,](logits, logits.stride(0), block_max, block_sum, slots, state.keys, state.ids,
                   state.ids.stride(0), state.token, state.count, state.max_count, state.done, state.stopped,
                   state.is_stop, blocks, V, vocab, temperature, greedy, BLOCKS, BLOCK)
