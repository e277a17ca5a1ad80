"""
How much memory a rank needs, phase by phase, by counting tensors; nothing is measured or loaded.

A run alternates between phases that never overlap: loading, sampling, evaluation, the update, saving. Each
phase holds the same lasting tensors (weights, AdamW's moments, the teacher) and some of its own, so what a
rank needs is the largest of the phases, and not their sum. A phase may have several moments at which it
could peak; the largest of them counts.

    estimate = phases(Plan(cfg, student, teacher, layer_map, work, env))     # {phase: {what: bytes}}
    peak(estimate)                                                           # name of the largest

Simpler than usual: every tensor is counted at full length, as if every answer had max_new_tokens tokens, and
what is smaller than a thousandth of the rest is left out. The counts follow the code line by line; a test
holds them against what autograd keeps and against all tensors alive in a step.

What it does not count: the libraries themselves (a CPU process has 0.25 GB after its imports, and its
matrix library keeps some tens of MB of buffers), what the allocator keeps of freed memory, files of weights
that are memory-mapped while they are read, and the CUDA context (about 0.5 GB).

Letters: B answers of this rank, T tokens of the longest of them, N = b T tokens of a micro-batch of b
         answers, K supervised positions in it, L layers, M of them matched, d width, H query heads, G
         key/value heads, e head width, ff width of the MLP, V vocabulary, W ranks, S ranks that share one
         copy of the weights, C rows under the head at once, r rank of a bridge, s bytes of a number in a
         forward (2 for bfloat16, 4 for float32).
"""
from dataclasses import dataclass

import torch

from losses import layer_set
from support.optimizer import ever_positive

GiB = 2**30
FILE_BYTES = 2**28              # of a file of the resume state (checkpoints.FILE_BYTES)
SHARD_BYTES = 5 * 10**9         # of a file of a model's folder (huggingface.save_model)
ROOM = 1024                     # tokens that a new cache has beyond the longest prompt (rollout.ROOM)
PREFILL = 32768                 # prompt tokens that are read at once (rollout.stream)
PACKED_FROM = 2**18             # numbers of a matrix that is packed for sampling (model.PACKED_FROM)
PIECE = 2048                    # tokens of a recomputed block's MLP at once (kernels.mlp_in_pieces.PIECE)
LOGITS = 2**24                  # of attention maps at once (extensions.attention_maps.LOGITS)


# ---- what a rank is asked to do ------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """The sizes that the config and the problems give. Lengths are in tokens."""
    prompts: int                # prompts of a step on this rank
    answers: int                # B
    prompt: int                 # longest prompt
    teacher_prompt: int         # of the teacher's prompts, which may show a solution
    new: int                    # longest answer
    eval_answers: int           # answers of an evaluation that are sampled at once on this rank; 0: none
    eval_total: int             # answers of an evaluation on this rank
    eval_prompt: int
    eval_new: int
    vocab: int                  # ids that both models know: columns of the sampler and of the loss


def work_of(cfg, world, train, held_out, vocab):
    """The work of the busiest of `world` ranks. train, held_out: problems with their ids."""
    answers = -(-cfg['prompts_per_step'] * cfg['n'] // world)
    total = -(-len(held_out) * cfg['eval_n'] // world)
    return Work(
        prompts=min(cfg['prompts_per_step'], answers), answers=answers,
        prompt=longest_prompt(train), teacher_prompt=longest_prompt(train, 'teacher'),
        new=cfg['max_new_tokens'],
        eval_answers=min(cfg['eval_rows'], total), eval_total=total,
        eval_prompt=longest_prompt(held_out),
        eval_new=cfg['eval_max_new_tokens'] or cfg['max_new_tokens'], vocab=vocab)


def longest_prompt(problems, side='student'):
    """Tokens of the longest prompt, as the student or the teacher reads it."""
    longest = 0
    for problem in problems:
        seen = problem.teacher_ids if side == 'teacher' else None
        longest = max(longest, len(seen or problem.ids))
    return longest


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


# ---- one block -----------------------------------------------------------------------------------

def kept_by_norm(n, s, cuda):
    """Bytes that an RMSNorm of n numbers keeps. CUDA has a kernel: it keeps its input and one number. On a
    CPU it is made of parts, which keep the input and the normalised input, both in float32."""
    return s * n + 4 if cuda else 8 * n + 4


def kept_by_block(c, s, cuda):
    """Bytes per token that one block keeps for its backward."""
    kept = 2 * kept_by_norm(c.d, s, cuda)                        # of both norms
    kept += 2 * s * c.d                                          # their results, which qkv and gate_up read
    kept += s * (c.H + 2 * c.G) * c.e                            # q, k and v
    if c.qk_norm:
        kept += (c.H + c.G) * kept_by_norm(c.e, s, cuda)
        if s == 4 or cuda:
            kept -= s * (c.H + c.G) * c.e                        # its input is q and k, counted above
    kept += s * (c.H + c.G) * c.e                                # q and k, rotated
    kept += s * c.H * c.e                                        # attention's result
    if not cuda and (c.qk_norm or c.partial < 1):
        kept += s * c.H * c.e                                    # and a copy in another order of its axes
    kept += 4 * c.H                                              # log of the softmax's denominator
    kept += 4 * s * c.ff                                         # gate, up, silu(gate), their product
    return kept


def kept_by_block_in_pieces(c, s, cuda):
    """Bytes per token that one block keeps for its backward when it is recomputed with its MLP in pieces
    (model.Block.forward_in_pieces), beside its input."""
    kept = s * (c.H + 2 * c.G) * c.e                             # q and k, rotated, and a copy of v
    if c.qk_norm:
        kept += (c.H + c.G) * kept_by_norm(c.e, s, cuda)
        if s == 4 or cuda:
            kept += s * c.G * c.e                                # its input is qkv, which stays whole
    kept += s * c.H * c.e                                        # attention's result
    if not cuda and (c.qk_norm or c.partial < 1):
        kept += s * c.H * c.e                                    # and a copy in another order of its axes
    kept += 4 * c.H                                              # log of the softmax's denominator
    kept += s * c.d                                              # what the MLP is added to
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


def piece_work(c, s, cuda):
    """Bytes per token of a piece in the backward of a block's MLP (kernels.mlp_in_pieces): gate, up,
    silu(gate), their product, its gradient and those of its two factors; and the norm before it."""
    return s * (7 * c.ff + 2 * c.d) + kept_by_norm(c.d, s, cuda)


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

@dataclass(frozen=True)
class Plan:
    """A run that is to be estimated."""
    cfg: dict
    student: object             # ModelConfig
    teacher: object
    layer_map: dict             # {student layer: teacher layer}
    work: Work
    env: object                 # ranks, device and dtype (support.runtime.Env)
    others: tuple = ()          # ModelConfigs of further teachers, none larger than `teacher`

    @property
    def s(self):
        return 2 if self.env.dtype == torch.bfloat16 else 4

    @property
    def W(self):
        return self.env.world

    @property
    def S(self):
        return self.env.shard_ranks

    @property
    def cuda(self):
        return self.env.device.type == 'cuda'

    @property
    def sharded(self):
        """Does FSDP hold the student (support.runtime.shard)?"""
        return self.W > 1 or self.s == 2

    @property
    def teacher_sharded(self):
        """And the teacher?"""
        return self.sharded and self.cfg['teacher_shard']

    @property
    def output(self):
        """Is there an output-space term?"""
        return any(ever_positive(self.cfg[key]) for key in ('opd_weight', 'reward_weight'))

    @property
    def watched(self):
        """The student layers whose attention is compared."""
        if not ever_positive(self.cfg['attention_weight']):
            return []
        return layer_set(self.cfg['attention_layers'], self.student.L)

    @property
    def learned(self):
        """How many weights learn: an untied head is frozen where the objective never reaches it."""
        weights = weights_of(self.student)
        return weights.total if self.output else weights.total - weights.head


def phases(plan):
    """{phase: {what: bytes}} of one rank of distill.py."""
    s = plan.s
    work = plan.work
    weights = weights_of(plan.student)
    teacher = weights_of(plan.teacher)
    total = {}

    # What stays from the first step to the last.
    lasting = {
        'student weights, float32': 4 * weights.total / plan.S,
        'AdamW, float32': 8 * plan.learned / plan.S,
        'teacher weights': s * teacher.total / (plan.S if plan.teacher_sharded else 1),
    }
    if plan.others and not (plan.cuda and plan.cfg['teachers_in_turn']):
        numbers = sum(weights_of(other).total for other in plan.others)
        lasting["other teachers' weights"] = s * numbers / (plan.S if plan.teacher_sharded else 1)
    if plan.cfg['teacher_every']:
        lasting['average for the teacher, float32'] = 4 * plan.learned / plan.S
    if plan.cfg['bridge']:
        r = bridge_rank(plan)
        lasting['bridge'] = 4 * len(plan.layer_map) * r * (plan.teacher.d + 2 * plan.student.d)

    # While weights are read, a rank has one whole tensor beside its shards; AdamW's moments come after that.
    largest = 4 * max(plan.student.V, 2 * plan.student.ff) * plan.student.d if plan.sharded else 0
    reading = lasting | {'AdamW, float32': 0, 'one tensor, before it is cut': largest}
    total['load'] = max(reading, lasting, key=lambda parts: sum(parts.values()))

    # Sampling needs all weights of the model that writes.
    writer = 'teacher' if plan.cfg['answers_by'] == 'teacher' else 'student'
    total['sample'] = lasting | gathered(plan, writer) | sampler(
        getattr(plan, writer), s, work.answers, work.prompts, work.prompt, work.new, work.vocab,
        plan.cfg['top_p'])
    if work.eval_answers:
        evaluations = []
        for side in ('student', 'teacher') if plan.cfg['eval_teacher'] else ('student',):
            evaluations.append(lasting | gathered(plan, side) | eval_sampler(plan, getattr(plan, side)))
        total['evaluate'] = max(evaluations, key=lambda parts: sum(parts.values()))
    total['update'] = lasting | update(plan)

    # On a GPU a checkpoint needs memory of the host alone.
    total['save'] = lasting if plan.cuda else lasting | saving(plan)
    return total


def gathered(plan, side):
    """What the 'student' or the 'teacher' needs beside its shards while it writes -> {what: bytes}: all its
    weights in the dtype of forwards, and on a CPU its large matrices once more. The group that is gathered
    last exists twice."""
    c = getattr(plan, side)
    parts = {}
    if {'student': plan.sharded, 'teacher': plan.teacher_sharded}[side]:
        weights = weights_of(c)
        last_group = max(weights.block, weights.head) if plan.S > 1 else 0
        parts[f'{side} weights, gathered for sampling'] = plan.s * (weights.total + last_group)
    return parts | packed(plan, c)


def packed(plan, c):
    """The matrices of a model (its ModelConfig) that a CPU packs for sampling (model.Model.packed) -> {what:
    bytes}."""
    if plan.cuda:
        return {}
    block = (c.d * (c.H + 2 * c.G) * c.e, c.H * c.e * c.d, c.d * 2 * c.ff, c.ff * c.d)
    numbers = c.L * sum(size for size in block if size >= PACKED_FROM)
    if c.V * c.d >= PACKED_FROM:
        numbers += c.V * c.d
    return {'matrices, packed for sampling': plan.s * numbers}


def eval_sampler(plan, c):
    """What an evaluation of the student or the teacher (their ModelConfig) holds beside the weights."""
    work = plan.work
    return sampler(c, plan.s, work.eval_answers, work.eval_answers, work.eval_prompt, work.eval_new,
                   work.vocab, plan.cfg['eval_top_p'])


def peak(estimate):
    """The phase that needs most."""
    return max(estimate, key=lambda phase: sum(estimate[phase].values()))


def bridge_rank(plan):
    """r of the bridge, at most; bridge_rank=0 means the rank that bridge.py has found."""
    return plan.cfg['bridge_rank'] or min(plan.student.d, plan.teacher.d)


def saving(plan):
    """Host memory of rank 0 while a checkpoint is written, beside what a CPU run holds -> {what: bytes}.

    First the resume state, a file at a time: it comes from the device, is turned into bytes, and these are
    copied once before they are written. Then the model, whose tensors come one by one and wait until their
    file is full; a tensor that lies on the CPU in the dtype of its file is not copied.
    """
    copies = 3 if plan.cuda else 2
    weights = weights_of(plan.student)
    share = resume_bytes(plan) / plan.W
    file = min(share, max(FILE_BYTES, 4 * weights.embed / plan.S))
    resume_state = {'files of the resume state, as bytes and a copy': copies * file}
    model = {}
    if plan.cuda or plan.sharded:
        model = {"files of the model's folder": min(plan.s * weights.total, SHARD_BYTES)}
    return max(resume_state, model, key=lambda parts: sum(parts.values()))


def resume_bytes(plan):
    """Float32 weights, AdamW's two moments and the teacher's average, of all ranks."""
    per_learned = 12 if plan.cfg['teacher_every'] else 8
    return 4 * weights_of(plan.student).total + per_learned * plan.learned


def checkpoint_bytes(plan):
    """A checkpoint on disk: a Hugging Face folder in the dtype of forwards, and the resume state."""
    return plan.s * weights_of(plan.student).total + resume_bytes(plan)


def bridge_phases(plan):
    """{phase: {what: bytes}} of bridge.py with the closed form, on one rank."""
    s = plan.s
    work = plan.work
    student = plan.student
    teacher = plan.teacher
    batch = largest_micro_batch(plan.cfg, work)
    K = batch.rows
    R = min(student.d, teacher.d)
    models = {'weights of both models': s * (weights_of(student).total + weights_of(teacher).total)}

    # Moments in float64: x x', y x' and y y' of two classes, for each pair of layers; and the bridge.
    pairs = len(plan.layer_map)
    moments = {'moments': 8 * pairs * 2 * (student.d**2 + student.d * teacher.d + teacher.d**2)}
    bridge = {'bridge': 8 * pairs * R * (teacher.d + 2 * student.d)}

    # A micro-batch: the states of all layers, and one pair of layers at a time in float64. The judgement
    # holds about eight tensors (K, R) of it: projections, their products and running sums.
    states = s * K * (pairs * student.d + len(set(plan.layer_map.values())) * teacher.d)
    states += batch.tokens * max(forward_work(student, s), forward_work(teacher, s))
    states += 8 * K * (student.d + teacher.d)
    return {
        'collect': models | packed(plan, student) | sampler(
            student, s, work.answers, work.answers, work.prompt, work.new, work.vocab, plan.cfg['top_p']),
        'fit': models | moments | {'a micro-batch': states},
        'judge': models | moments | bridge | {'a micro-batch': states + 8 * 8 * K * R},
    }


# ---- the update ----------------------------------------------------------------------------------

def update(plan):
    """The largest moment of an update, beside what stays -> {what: bytes}."""
    batch = largest_micro_batch(plan.cfg, plan.work)
    rows = teacher_rows(plan, batch)
    moments = [teacher_forward(plan, batch, rows), end_of_backward(plan, batch, rows)]
    for l in range(1, plan.student.L + 1):
        if in_pieces(plan, batch):
            moments.extend(backward_in_pieces(l, plan, batch, rows))
        else:
            moments.append(backward_of_block(l, plan, batch, rows))
    if plan.output:
        moments.append(loss_under_head(plan, batch, rows))
    for l in plan.watched:
        moments.append(loss_of_attention(l, plan, batch, rows))
    return max(moments, key=lambda moment: sum(moment.values()))


def moment(gradients, rows, fsdp, activations, head=0):
    """What an update holds at one time, by name."""
    return {'gradients': gradients, "the teacher's rows": rows, 'gathered weights and buffers of FSDP': fsdp,
            'activations': activations, "the LM head's gradient and a chunk of logits": head}


def teacher_rows(plan, batch):
    """Bytes of the teacher's rows. They become the gradients of the student's rows, in the same memory."""
    row = 4 * bridge_rank(plan) if plan.cfg['bridge'] else plan.s * plan.teacher.d
    rows = len(plan.layer_map) * row if ever_positive(plan.cfg['oprd_weight']) else 0
    if plan.output:
        rows += plan.s * plan.teacher.d * (2 if plan.cfg['opd'] == 'byte' else 1)
    return rows * batch.rows + plan.s * len(plan.watched) * attention_numbers(plan.teacher, plan, batch)


def attention_numbers(c, plan, batch):
    """How many numbers the attention term keeps of one layer of a model (its ModelConfig): the queries of the
    compared heads at the supervised rows, and all keys. Of the student it keeps their gradients."""
    heads = plan.cfg['attention_heads']
    compared = c.H if heads == 'all' else len(set(heads))
    return c.e * (compared * batch.rows + c.G * batch.tokens)


def attention_gradients(layers, plan, batch):
    """Bytes of the gradients that the attention term keeps of these student layers."""
    watched = set(plan.watched) & set(layers)
    return plan.s * len(watched) * attention_numbers(plan.student, plan, batch)


def gradients_before(plan, batch):
    """Bytes of the gradients that earlier micro-batches have left."""
    return 4 * plan.learned / plan.S if batch.several else 0


def kept_up_to(l, plan, batch):
    """Bytes of activations that blocks 1..l keep. A block that is recomputed keeps its input alone."""
    student = plan.student
    by_block = kept_by_block(student, plan.s, plan.cuda)
    if plan.cfg['checkpointing']:
        by_block = plan.s * student.d
    kept = l * by_block
    if l == student.L:                       # and of the last norm
        kept += plan.s * student.d if plan.cuda else 8 * student.d
    kept *= batch.tokens
    if not plan.cfg['checkpointing']:
        kept += attention_gradients(range(1, l + 1), plan, batch)
    return kept


def gathered_blocks(plan, c):
    """Bytes that FSDP has gathered of a sharded model (its ModelConfig): a block, the next one while it is
    computed, and the embedding. The student's stays whole from the forward to the end of the backward."""
    weights = weights_of(c)
    return plan.s * (2 * weights.block + weights.embed) if plan.sharded else 0


def teacher_forward(plan, batch, rows):
    """The teacher reads a micro-batch."""
    fsdp = 0
    if plan.sharded and batch.several:
        fsdp += plan.s * weights_of(plan.student).embed
    if plan.teacher_sharded:
        fsdp += gathered_blocks(plan, plan.teacher)
    work = plan.work
    tokens = batch.tokens * (work.teacher_prompt + work.new) / (work.prompt + work.new)
    return moment(gradients_before(plan, batch), rows, fsdp, forward_work(plan.teacher, plan.s) * tokens)


def backward_of_block(l, plan, batch, rows):
    """The backward of block l: activations of the blocks up to it, gradients of the blocks above it."""
    student = plan.student
    work = backward_work(student, plan.s) * batch.tokens
    activations = kept_up_to(l, plan, batch)
    if plan.cfg['checkpointing']:
        activations += kept_by_block(student, plan.s, plan.cuda) * batch.tokens
        activations += attention_gradients([l], plan, batch)

    # Before that, the loss of the last layer: two float32 tensors (K, d), and the teacher's rows cast.
    if l == student.L and not plan.cuda:
        work = max(work, batch.rows * 4 * student.d * (2 if plan.s == 4 else 3))

    # Gradients: those of the blocks above, and this block's first one, which is that of `down`.
    gradients = plan.s * student.d * student.ff + gradients_above(l, plan, batch)
    return moment(gradients, rows, fsdp_above(l, plan), activations + work)


def loss_of_attention(l, plan, batch, rows):
    """The attention term of layer l, in the forward of its block, or when the block is recomputed: float32
    sums of the gradients, and the student's queries. A piece has five float32 tensors of logits, and the keys
    of both models once for each head, with their gradient."""
    student = plan.student
    heads = student.H if plan.cfg['attention_heads'] == 'all' else len(set(plan.cfg['attention_heads']))
    T = plan.work.prompt + plan.work.new
    sequences = batch.tokens // T
    logits = min(LOGITS, heads * batch.rows // sequences * T)
    work = 4 * attention_numbers(student, plan, batch) + plan.s * heads * student.e * batch.rows
    work += 20 * logits + 4 * heads * T * (2 * student.e + plan.teacher.e)


    # Of the block there are its input, the norm's result, and q, k and v before and after the rotation.
    block = plan.s * batch.tokens * 2 * (student.d + (student.H + 2 * student.G) * student.e)
    activations = kept_up_to(l - 1, plan, batch) + block + work
    if plan.cfg['checkpointing']:
        return moment(gradients_above(l, plan, batch), rows, fsdp_above(l, plan), activations)
    return moment(gradients_before(plan, batch), rows, gathered_blocks(plan, student), activations)


def in_pieces(plan, batch):
    """Are blocks recomputed with their MLP in pieces (kernels.mlp_in_pieces)?"""
    return plan.cfg['checkpointing'] and not plan.cfg['compile'] and batch.tokens > PIECE


def backward_in_pieces(l, plan, batch, rows):
    """The same for a block whose MLP is taken in pieces: the moment of its MLP, and that of its attention
    or of its first norm."""
    c = plan.student
    s = plan.s
    block = kept_by_block_in_pieces(c, s, plan.cuda)
    inputs = l * s * c.d * batch.tokens + attention_gradients([l], plan, batch)

    # The MLP: the gradients of its result and of its input, and a piece. The gradients of its three matrices
    # are summed in float32, and a piece has its own.
    matrices = 3 * c.d * c.ff
    mlp = batch.tokens * (block + 2 * s * c.d) + PIECE * piece_work(c, s, plan.cuda)

    # Attention, when the input of the MLP has gone: the gradients of that, of attention's result, of q, k, v.
    attention = batch.tokens * (block + s * (c.H + c.H + 2 * c.G) * c.e)

    # The norm, or the last one: its input and the gradient, and on a CPU six float32 tensors.
    norm = batch.tokens * (2 * s * c.d if plan.cuda else s * c.d + 24 * c.d)

    above = gradients_above(l, plan, batch)
    fsdp = fsdp_above(l, plan)
    return [moment(above + (4 + s) * matrices, rows, fsdp, inputs + mlp),
            moment(above + s * matrices, rows, fsdp, inputs + max(attention, norm))]


def gradients_above(l, plan, batch):
    """Bytes of gradients that are there before block l: those of earlier micro-batches, or of what is
    above it."""
    weights = weights_of(plan.student)
    above = 4 * (plan.student.L - l) * weights.block / plan.S
    if plan.output:
        above += 4 * weights.head / plan.S
    return gradients_before(plan, batch) or above


def fsdp_above(l, plan):
    """Bytes of FSDP in the backward of block l. A block's gradient comes in the dtype of forwards; while
    that of the block above is summed over ranks, it is float32."""
    student = plan.student
    summed = 4 * weights_of(student).block if plan.sharded and l < student.L else 0
    return gathered_blocks(plan, student) + summed


def end_of_backward(plan, batch, rows):
    """All gradients, the embedding's among them, which is summed over ranks last."""
    embed = (2 * plan.s + 4) * weights_of(plan.student).embed
    return moment(4 * plan.learned / plan.S, rows, embed if plan.sharded else 0,
                  plan.s * plan.student.d * batch.tokens)


def loss_under_head(plan, batch, rows):
    """The output-space term, at the end of the forward: three (C, V) tensors of float32 at once, four of
    them for a forward or next-byte KL, and one in the dtype of forwards; the head's gradient; two rows of
    states."""
    cfg = plan.cfg
    c = plan.student
    s = plan.s
    C = min(batch.rows, cfg['head_rows'] or (1024 if plan.cuda else 64))
    tensors = 4 if cfg['kl_direction'] == 'forward' or cfg['opd'] == 'byte' else 3
    chunk = C * plan.work.vocab * (4 * tensors + (s if s == 2 else 0))

    # The head's gradient is float32. Where weights are sharded, the gathered head lies beside it, and later,
    # when the chunk has gone, the gradient in the head's dtype.
    head = 4 * c.V * c.d
    if plan.sharded:
        head += s * c.V * c.d
        chunk = max(chunk, s * c.V * c.d)
    states = 2 * s * batch.rows * c.d

    # The head of a sharded teacher is gathered meanwhile; a tied one lies in the group of the embedding.
    fsdp = gathered_blocks(plan, c)
    if plan.teacher_sharded:
        teacher = weights_of(plan.teacher)
        fsdp += s * (teacher.head or teacher.embed)
    return moment(gradients_before(plan, batch), rows, fsdp, kept_up_to(c.L, plan, batch),
                  chunk + head + states)
