"""
How much memory a rank needs, phase by phase, by counting tensors; nothing is measured or loaded.

A run alternates between phases that never overlap: loading, sampling, evaluation, the update, saving. Each
phase holds the same lasting tensors (weights, AdamW's moments, the teacher) and some of its own, so what a
rank needs is the largest of the phases, and not their sum. A phase may have several moments at which it
could peak; the largest of them counts.

    estimate = phases(cfg, student, teacher, layer_map, work, env)           # {phase: {what: bytes}}
    peak(estimate)                                                           # name of the largest

Simpler than usual: every tensor is counted at full length, as if every answer had max_new_tokens tokens, and
what is smaller than a thousandth of the rest is left out. The counts follow the code line by line; a test
holds them against what autograd keeps and against all tensors alive in a step.

What it does not count: the libraries themselves (a CPU process has 0.25 GB after its imports, and its
matrix library keeps some tens of MB of buffers), what the allocator keeps of freed memory, files of weights
that are memory-mapped while they are read, and the CUDA context (about 0.5 GB).

Letters: B answers of this rank, T tokens of the longest of them, N = b T tokens of a micro-batch of b
         answers, K supervised positions in it, L layers, M of them matched, d width, H query heads, G
         key/value heads, e head width, ff width of the MLP, V vocabulary, W ranks, C rows under the head at
         once, r rank of a bridge, s bytes of a number in a forward (2 for bfloat16, 4 for float32).
"""
from dataclasses import dataclass

import torch

from support.optimizer import ever_positive

GiB = 2**30
ROOM = 1024                     # tokens that a new cache has beyond the longest prompt (rollout.ROOM)
PREFILL = 32768                 # prompt tokens that are read at once (rollout.stream)


# ---- what a rank is asked to do ------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """The sizes that the config and the problems give. Lengths are in tokens."""
    prompts: int                # prompts of a step on this rank
    answers: int                # B
    prompt: int                 # longest prompt
    new: int                    # longest answer
    eval_answers: int           # answers of an evaluation that are sampled at once on this rank; 0: none
    eval_total: int             # answers of an evaluation on this rank
    eval_prompt: int
    eval_new: int
    vocab: int                  # ids that both models know: columns of the sampler and of the loss


def work_of(cfg, world, train, held_out, vocab):
    """The work of the busiest of `world` ranks. train, held_out: problems with their ids."""
    prompts = -(-cfg['prompts_per_step'] // world)
    total = -(-len(held_out) * cfg['eval_n'] // world)
    return Work(
        prompts=prompts, answers=prompts * cfg['n'],
        prompt=longest_prompt(train), new=cfg['max_new_tokens'],
        eval_answers=min(cfg['eval_rows'], total), eval_total=total,
        eval_prompt=longest_prompt(held_out),
        eval_new=cfg['eval_max_new_tokens'] or cfg['max_new_tokens'], vocab=vocab)


def longest_prompt(problems):
    return max((len(problem.ids) for problem in problems), default=0)


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a step."""
    tokens: int                 # N
    rows: int                   # K
    several: bool               # does a step have more than one?


def largest_micro_batch(cfg, work):
    """As step.micro_batches cuts them, if all answers are of full length."""
    T = work.prompt + work.new
    b = min(work.answers, max(1, cfg['token_budget'] // T))
    by_rule = {
        'all': work.new,
        'drift': work.new,
        'last': 1,
        'last_k': cfg['last_k'],
        'first_k': cfg['first_k'],
        'last_frac': round(cfg['last_frac'] * work.new),
        'first_frac': round(cfg['first_frac'] * work.new),
    }
    rows = min(work.new, max(1, by_rule[cfg['positions']]))
    return MicroBatch(tokens=b * T, rows=b * rows, several=work.answers > b)


# ---- weights -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Weights:
    """Numbers of weights of a model, in the groups in which FSDP gathers them."""
    block: int                  # of one block
    blocks: int                 # of all L
    embed: int                  # V d, and the last norm
    head: int                   # V d; 0 where the head is the embedding

    @property
    def total(self):
        return self.blocks + self.embed + self.head


def weights_of(c):
    """ModelConfig -> Weights."""
    heads = (c.H + 2 * c.G) * c.e                                # q, k and v
    block = c.d * heads + c.H * c.e * c.d                        # qkv and out
    block += 3 * c.d * c.ff                                      # gate, up and down
    block += 2 * c.d                                             # two norms
    if c.qkv_bias:
        block += heads
    if c.qk_norm:
        block += 2 * c.e
    return Weights(block, c.L * block, c.V * c.d + c.d, 0 if c.tied else c.V * c.d)


def learned(c, with_head):
    """How many weights learn: an untied head is frozen where the objective never reaches it."""
    weights = weights_of(c)
    return weights.total if with_head else weights.total - weights.head


# ---- one block -----------------------------------------------------------------------------------

def kept_by_block(c, s, cuda):
    """Bytes per token that one block keeps for its backward."""
    # An RMSNorm of n numbers. CUDA has a kernel: it keeps its input and one number. On a CPU it is made of
    # parts, which keep the input and the normalised input, both in float32.
    def norm(n):
        return s * n + 4 if cuda else 8 * n + 4

    kept = 2 * norm(c.d)                                         # of both norms
    kept += 2 * s * c.d                                          # their results, which qkv and gate_up read
    kept += s * (c.H + 2 * c.G) * c.e                            # q, k and v
    if c.qk_norm:
        kept += norm((c.H + c.G) * c.e)
        if s == 4 or cuda:
            kept -= s * (c.H + c.G) * c.e                        # its input is q and k, counted above
    kept += s * (c.H + c.G) * c.e                                # q and k, rotated
    kept += s * c.H * c.e * (1 if cuda else 2)                   # attention's result, and a copy by heads
    kept += 4 * c.H                                              # log of the softmax's denominator
    kept += 4 * s * c.ff                                         # gate, up, silu(gate), their product
    return kept


def forward_work(c, s):
    """Bytes per token of one block's forward without a gradient, the block's input among them."""
    # MLP: the block's input, the states after attention, the norm's result; gate, up, silu and product.
    mlp = s * (3 * c.d + 4 * c.ff)
    # Attention: the block's input, the norm's result, q, k and v; q and k normed or rotated, and parts of it.
    attention = s * (2 * c.d + (c.H + 2 * c.G) * c.e + (c.H + c.G) * c.e + 3 * c.H * c.e)
    return max(mlp, attention)


def backward_work(c, s):
    """Bytes per token of one block's backward beyond what the block keeps: most are needed at the product
    of silu(gate) and up, when the gradients of the block's result (d), of the product and of both of its
    factors are alive, and the product itself is not any more."""
    return s * (c.d + 3 * c.ff - c.ff)


# ---- sampling ------------------------------------------------------------------------------------

def cache_bytes(c, s, answers, tokens):
    """Keys and values: 2 L G e numbers per token of each answer."""
    return 2 * c.L * c.G * c.e * s * answers * tokens


def sampler(c, s, answers, prompts, prompt, new, vocab, top_p):
    """What sampling holds beside the weights -> {what: bytes}."""
    # A cache that has grown was copied one layer after another: one layer exists twice.
    cache = cache_bytes(c, s, answers, prompt + new)
    if new > ROOM:
        cache += cache // c.L

    # A decode step: logits, scaled logits and probabilities, and their running sums: float64 in a small
    # vocabulary, a padded copy in a large one. top_p adds the sorted ones, their order and two more.
    per_logit = s + 8 + (16 if vocab <= 4096 else 4)
    if top_p < 1:
        per_logit += 24
    decode = answers * c.V * per_logit

    # Reading prompts: a cache of their own, and one block at a time.
    tokens = min(PREFILL, prompts * prompt)
    prefill = cache_bytes(c, s, 1, tokens) + tokens * forward_work(c, s) + s * c.V * (prompts + answers)
    return {'KV cache': cache, 'one decode step, or reading the prompts': max(decode, prefill)}


# ---- the phases ----------------------------------------------------------------------------------

def phases(cfg, student, teacher, layer_map, work, env):
    """{phase: {what: bytes}} of one rank. student, teacher: ModelConfig. layer_map: {student layer: teacher
    layer}. work: Work. env: ranks, device and dtype (support.runtime.Env)."""
    s = 2 if env.dtype == torch.bfloat16 else 4
    W = env.world
    sharded = W > 1 or s == 2
    with_head = student.tied or ever_positive(cfg['opd_weight'])
    weights = weights_of(student)

    # What stays from the first step to the last.
    lasting = {
        'student weights, float32': 4 * weights.total / W,
        'AdamW, float32': 8 * learned(student, with_head) / W,
        'teacher weights': s * weights_of(teacher).total,
    }
    if cfg['bridge']:
        r = cfg['bridge_rank'] or min(student.d, teacher.d)
        lasting['bridge'] = 4 * len(layer_map) * r * (teacher.d + 2 * student.d)

    # Sampling needs whole weights in the dtype of forwards. The group that is gathered last exists twice.
    whole = {}
    if sharded:
        last_group = max(weights.block, weights.head) if W > 1 else 0
        whole = {'student weights, gathered for sampling': s * (weights.total + last_group)}
    rollout = sampler(student, s, work.answers, work.prompts, work.prompt, work.new, work.vocab, cfg['top_p'])

    # While models are loaded every rank has the whole student for a moment.
    estimate = {
        'load': {'student weights, float32': 4 * weights.total, 'teacher weights': lasting['teacher weights']},
        'sample': lasting | whole | rollout,
        'update': lasting | update(cfg, student, teacher, layer_map, largest_micro_batch(cfg, work), work, env),
        'save': lasting,
    }
    if work.eval_answers:
        evaluation = sampler(student, s, work.eval_answers, work.eval_answers, work.eval_prompt, work.eval_new,
                             work.vocab, cfg['eval_top_p'])
        estimate['evaluate'] = lasting | whole | evaluation
    if env.device.type == 'cpu':
        estimate['save'] = lasting | saving(student, with_head, env)
    return estimate


def peak(estimate):
    """The phase that needs most."""
    return max(estimate, key=lambda phase: sum(estimate[phase].values()))


def saving(student, with_head, env):
    """Host memory of a rank while a checkpoint is written, beside what a CPU run holds -> {what: bytes}.

    The rank's share of the resume state comes from the device, is turned into the bytes of a file, and these
    are copied once before they are written.
    """
    copies = 2 if env.device.type == 'cpu' else 3
    return {'resume state, as bytes and a copy of them': copies * resume_bytes(student, with_head) / env.world}


def resume_bytes(student, with_head):
    """Float32 weights and AdamW's two moments, of all ranks."""
    return 4 * weights_of(student).total + 8 * learned(student, with_head)


def checkpoint_bytes(student, with_head, s):
    """A checkpoint on disk: a Hugging Face folder in the dtype of forwards, and the resume state."""
    return s * weights_of(student).total + resume_bytes(student, with_head)


def bridge_phases(cfg, student, teacher, layer_map, work, env):
    """{phase: {what: bytes}} of bridge.py with the closed form, on one rank. Arguments as in `phases`."""
    s = 2 if env.dtype == torch.bfloat16 else 4
    batch = largest_micro_batch(cfg, work)
    K = batch.rows
    R = min(student.d, teacher.d)
    models = {'weights of both models': s * (weights_of(student).total + weights_of(teacher).total)}

    # Moments in float64: x x', y x' and y y' of two classes, for each pair of layers; and the bridge.
    pairs = len(layer_map)
    moments = 8 * pairs * 2 * (student.d**2 + student.d * teacher.d + teacher.d**2)
    bridge = 8 * pairs * R * (teacher.d + 2 * student.d)

    # A micro-batch: the states of all layers, and one pair of layers at a time in float64. The judgement
    # holds about eight tensors (K, R) of it: projections, their products and running sums.
    states = s * K * (pairs * student.d + len(set(layer_map.values())) * teacher.d)
    states += batch.tokens * max(forward_work(student, s), forward_work(teacher, s))
    double = 8 * K * (student.d + teacher.d)
    return {
        'collect': models | sampler(student, s, work.answers, work.answers, work.prompt, work.new, work.vocab,
                                    cfg['top_p']),
        'fit': models | {'moments': moments, 'a micro-batch': states + double},
        'judge': models | {'moments': moments, 'bridge': bridge, 'a micro-batch': states + double + 8 * 8 * K * R},
    }


# ---- the update ----------------------------------------------------------------------------------

def update(cfg, student, teacher, layer_map, batch, work, env):
    """The largest moment of an update, beside what stays -> {what: bytes}."""
    s = 2 if env.dtype == torch.bfloat16 else 4
    cuda = env.device.type == 'cuda'
    W = env.world
    sharded = W > 1 or s == 2
    weights = weights_of(student)
    output = ever_positive(cfg['opd_weight'])
    with_head = student.tied or output
    L = student.L
    N = batch.tokens
    K = batch.rows

    # The teacher's rows. They become the gradients of the student's rows, in the same memory.
    row_bytes = s * teacher.d
    if cfg['bridge']:
        row_bytes = 4 * (cfg['bridge_rank'] or min(student.d, teacher.d))
    rows = len(layer_map) * K * row_bytes if ever_positive(cfg['oprd_weight']) else 0
    if output:
        rows += K * s * teacher.d * (2 if cfg['opd'] == 'byte' else 1)

    # Activations. A block that is recomputed keeps its input alone until then.
    kept = kept_by_block(student, s, cuda) * N
    kept_before = s * student.d * N if cfg['checkpointing'] else kept
    last_norm = (s * student.d if cuda else 8 * student.d) * N
    back = backward_work(student, s) * N
    loss_rows = 0 if cuda else K * 4 * student.d * (2 if s == 4 else 3)     # one layer of Eq. (6), by parts

    # FSDP gathers a block, and the next one while it is computed. The embedding stays whole. A block's
    # gradient comes in the dtype of forwards; while it is summed over ranks it is float32.
    gathered = s * (2 * weights.block + weights.embed) if sharded else 0
    summed = 4 * weights.block if sharded else 0

    # Gradients so far: all of them from the second micro-batch on.
    all_gradients = 4 * learned(student, with_head) / W
    head_gradient = 4 * weights.head / W if output else 0
    earlier = all_gradients if batch.several else 0

    # The teacher's forward of a second micro-batch: the rows of the first one are still there.
    moments = [{
        'gradients': earlier,
        "the teacher's rows": rows * (2 if batch.several else 1),
        'gathered weights and buffers of FSDP': s * weights.embed if sharded and batch.several else 0,
        'activations': forward_work(teacher, s) * N,
    }]

    # The backward of block l: activations of the blocks up to it, gradients of the blocks above it.
    for l in range(1, L + 1):
        activations = (l - 1) * kept_before + kept + back
        if cfg['checkpointing']:
            activations += kept_before
        if l == L:
            activations += last_norm + max(0, loss_rows - back)
        own_gradient = s * student.d * student.ff                # of `down`, the first to be made
        moments.append({
            'gradients': own_gradient + (earlier or head_gradient + 4 * (L - l) * weights.block / W),
            "the teacher's rows": rows,
            'gathered weights and buffers of FSDP': gathered + (summed if l < L else 0),
            'activations': activations,
        })

    # The end of the backward, with the embedding's gradient.
    moments.append({
        'gradients': all_gradients,
        "the teacher's rows": rows,
        'gathered weights and buffers of FSDP': (2 * s + 4) * weights.embed if sharded else 0,
        'activations': s * student.d * N,
    })
    if output:
        moments.append({
            'gradients': earlier,
            "the teacher's rows": rows,
            'gathered weights and buffers of FSDP': gathered,
            'activations': L * kept_before + last_norm,
            "the LM head's gradient and a chunk of logits": head_work(cfg, student, K, s, work.vocab, sharded),
        })
    return max(moments, key=lambda moment: sum(moment.values()))


def head_work(cfg, c, K, s, vocab, sharded):
    """The output-space term under the head: three (C, V) tensors of float32 at once, four of them for a
    forward or next-byte KL, and one in the dtype of forwards; the head's gradient; two rows of states."""
    C = min(K, cfg['head_rows'] or 64)
    tensors = 4 if cfg['kl_direction'] == 'forward' or cfg['opd'] == 'byte' else 3
    chunk = C * vocab * (4 * tensors + (s if s == 2 else 0))

    # The head's gradient is float32. Where weights are sharded, the gathered head lies beside it, and later,
    # when the chunk has gone, the gradient in the head's dtype.
    head = 4 * c.V * c.d
    if sharded:
        head += s * c.V * c.d
        chunk = max(chunk, s * c.V * c.d)
    return chunk + head + 2 * s * K * c.d
