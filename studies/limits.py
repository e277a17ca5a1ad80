"""
The least time that a piece of work can take, from what it must read, write and multiply.

    parts = limits.decode(config, rows=2, context=8192, size=2)
    limits.limit(parts, limits.GPUS['h200'])             # seconds
    limits.expected(parts, limits.GPUS['h200'])          # with the launches, and the blocks computed again

The work is a list of parts. Each part is limited by memory or by arithmetic, whichever takes longer:

    limit = sum over the parts of max(bytes / copy bandwidth, flops / matrix product's speed)

Every weight is read once for each step or pass that needs it. Every key and value is read once, and every
result is written once. Flops are those of matrix products: a multiplication and the addition of its result
count as 2. A query multiplies only the keys that it may see, so causal attention counts about half of all
pairs.

`expected` adds two things that can be counted, but are not necessary for the result: the launches of kernels
that cannot overlap (those of a decode step and of the loss kernel), and the blocks that are computed again in
the backward. It is no prediction. Both functions leave out

    - that a kernel reads slower than a large copy and multiplies slower than a large product
    - what is neither weight, cache nor product: norms, activations, softmaxes, states between two kernels
    - padding, and the weights that further micro-batches read again
    - the host: Python, the allocator, the polls of a rollout, compilation

so a measured line takes longer. Simpler than usual: nothing overlaps, and there is one kind of memory.

How to run it: every table of studies/bench.py prints the limit, of this machine or with --expect of a GPU
that is not at hand.

Letters: L layers, d width, V vocabulary, H query heads, G key/value heads, e head width, ff width of the
         MLP, K supervised rows. c: a model.ModelConfig. size: bytes of a number in forwards.
"""
import math
from dataclasses import dataclass

from kernels.decode_products import MOST_ROWS

# ---- machines -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Machine:
    """What a machine can do at most."""
    name: str
    copy: float                 # bytes a second, read and written, of a large copy
    product: float              # flops a second of a large matrix product


# These figures are not measured. They are the vendor's bandwidth and dense bfloat16 speed, multiplied by the
# shares of them that large copies and large products usually reach: 0.9 and 0.8.
GPUS = {
    'a100': Machine('A100 80 GB SXM', 0.9 * 2.04e12, 0.8 * 312e12),
    'h100': Machine('H100 SXM', 0.9 * 3.35e12, 0.8 * 989e12),
    'h200': Machine('H200 SXM', 0.9 * 4.8e12, 0.8 * 989e12),
}
LAUNCH = 1.8e-6                 # seconds from one kernel of a CUDA graph to the next; assumed, not measured


@dataclass(frozen=True)
class Part:
    """A part of a piece of work."""
    bytes: float = 0            # read or written
    flops: float = 0            # of matrix products
    launches: int = 0           # of kernels that cannot overlap; only `expected` counts them
    flops_again: float = 0      # of products that are computed a second time; only `expected` counts them


def limit(parts, machine):
    """Parts -> seconds that they take at least."""
    seconds = 0.0
    for part in parts:
        seconds += max(part.bytes / machine.copy, part.flops / machine.product)
    return seconds


def expected(parts, machine):
    """Parts -> seconds with their launches and with what is computed a second time."""
    seconds = 0.0
    for part in parts:
        flops = part.flops + part.flops_again
        seconds += max(part.bytes / machine.copy, flops / machine.product)
        seconds += part.launches * LAUNCH
    return seconds


# ---- a model --------------------------------------------------------------------------------------

def block_products(c):
    """Weights of a block's matrices: queries, keys and values; out; gate and up; down."""
    attention = c.d * (c.H + 2 * c.G) * c.e + c.H * c.e * c.d
    return attention + 3 * c.d * c.ff


def trunk_weights(c):
    """Weights without embedding and head: the matrices, biases and norms of the blocks, and the last norm."""
    block = block_products(c) + 2 * c.d
    if c.qkv_bias:
        block += (c.H + 2 * c.G) * c.e
    if c.qk_norm:
        block += 2 * c.e
    return c.L * block + c.d


def token_weights(c):
    """Weights that a decode step reads: all but the embedding, of which it reads one row per token."""
    return trunk_weights(c) + c.V * c.d


def learning_weights(c, with_head):
    """Weights that an update changes: the head only if a loss is on the logits."""
    head = c.V * c.d if with_head and not c.tied else 0
    return trunk_weights(c) + c.V * c.d + head


def causal_pairs(length):
    """Pairs of a query and a key that the query may see, in a sequence of this length: 3 -> 1 + 2 + 3 = 6."""
    return length * (length + 1) // 2


def forward_flops(c, lengths):
    """Flops of a forward of the blocks over sequences of these lengths."""
    products = 2 * block_products(c) * sum(lengths)
    attention = 4 * c.H * c.e * sum(causal_pairs(length) for length in lengths)
    return c.L * (products + attention)


def token_flops(c, keys):
    """Flops of a decode step of one row whose query sees `keys` keys, the head included."""
    return c.L * (2 * block_products(c) + 4 * c.H * c.e * keys) + 2 * c.d * c.V


def token_bytes(c, context, size):
    """Bytes of the keys and values of a row that holds `context` tokens."""
    return context * 2 * c.L * c.G * c.e * size


def decode_launches(c, rows):
    """Kernels of a decode step, as tests/test_decode_launches.py counts them: those of the layers, 14 others
    of the model, and 2 that draw the tokens."""
    per_layer = 5 if rows <= MOST_ROWS else 8
    return per_layer * c.L + 14 + 2


# ---- the tables -----------------------------------------------------------------------------------

def loss_rows(c, rows, size):
    """Eq. (6) of K rows at every layer: both models' rows are read, and the gradient is written."""
    return [Part(bytes=3 * c.L * rows * c.d * size, launches=c.L)]


def loss(c, rows, tokens, size):
    """`loss_rows`, and the backward on a micro-batch of `tokens` tokens.

    The gradient of the states of all tokens is written once. At each layer the gradient of the K rows is
    added to K rows of it: both are read, and the sum is written.
    """
    backward = 3 * c.L * rows * c.d * size + tokens * c.d * size
    return [*loss_rows(c, rows, size), Part(bytes=backward)]


def head(c, rows, vocab, size, teacher_states=1):
    """A loss of K rows under the student's head (vocab, d) and the teacher's, with its gradient.

    teacher_states: states of the teacher for each of the student's rows. The products are the logits of the
    student and of each of the teacher's states, and the gradients of states and head. Both heads are read,
    and the gradient of the student's head is written in float32.
    """
    products = 3 + teacher_states
    states = (2 + teacher_states) * rows * c.d * size
    return [Part(bytes=2 * vocab * c.d * size + 4 * vocab * c.d + states,
                 flops=2 * products * rows * c.d * vocab)]


@dataclass(frozen=True)
class Terms:
    """The loss terms of an update."""
    rows: int                   # K supervised rows
    hidden: bool                # is Eq. (6) one of them?
    vocab: int                  # rows of the head that the loss on the logits uses; 0: there is no such loss


def update(c, lengths, terms, size, checkpointing):
    """One update on sequences of these lengths: the teacher's forward, the student's forward and backward,
    the losses, AdamW. A backward has as many flops as two forwards."""
    forward = forward_flops(c, lengths)
    weights = trunk_weights(c)

    # The backward computes each block again, apart from its last product, whose result no gradient needs.
    again = 0
    if checkpointing:
        last_products = c.L * 2 * c.ff * c.d * sum(lengths)
        again = forward - last_products
    parts = [
        Part(bytes=weights * size, flops=forward),
        Part(bytes=2 * weights * size + 4 * weights, flops=3 * forward, flops_again=again),
    ]
    if terms.hidden:
        parts += loss(c, terms.rows, 0, size)
    if terms.vocab:
        parts += head(c, terms.rows, terms.vocab, size)

    # AdamW reads weight, gradient and two moments in float32, and writes all but the gradient.
    return [*parts, Part(bytes=7 * 4 * learning_weights(c, bool(terms.vocab)))]


def decode(c, rows, context, size):
    """A token for each of `rows` answers that hold `context` tokens."""
    return [Part(bytes=token_weights(c) * size + rows * token_bytes(c, context, size),
                 flops=rows * token_flops(c, context + 1), launches=decode_launches(c, rows))]


def rollout(c, prompt, lengths, slots, size):
    """Answers of these lengths after prompts of `prompt` tokens, in `slots` slots.

    All prompts are read in one prefill, which also gives the first token of each answer. For the other tokens
    there are at least as many decode steps as the longest answer has of them, and at least as many as all
    tokens over all slots, which are enough if no slot is ever free. Example: answers with 5, 3 and 4 of these
    tokens need at least max(5, 12 / 2) = 6 steps in 2 slots.
    """
    prefill = forward_flops(c, [prompt] * len(lengths)) + len(lengths) * 2 * c.d * c.V
    tokens = [length - 1 for length in lengths]
    steps = max(max(tokens), math.ceil(sum(tokens) / slots))

    # A row holds prompt, prompt + 1, ... tokens as its answer grows.
    held = 0
    for count in tokens:
        held += count * prompt + count * (count - 1) // 2
    seen = held + sum(tokens)                # each query also sees its own key
    flops = sum(tokens) * token_flops(c, 0) + 4 * c.L * c.H * c.e * seen
    return [Part(bytes=token_weights(c) * size, flops=prefill),
            Part(bytes=steps * token_weights(c) * size + token_bytes(c, held, size), flops=flops,
                 launches=steps * decode_launches(c, slots))]
