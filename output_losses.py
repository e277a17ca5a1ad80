"""
The output-space objectives, Eqs. (3)-(5): compare the next-token distributions of student and teacher.

Each objective is here twice. `opd_rows` is the readable form, on logits, for autograd: it is the
definition. The classes Sampled, TopK and FullKL compute the same under the LM head, a chunk of rows
at a time, and form the gradient as they go. Memory then grows with the chunk, and not with tokens x
vocabulary. Tests hold the two equal.

    Eq. (3)   Sampled   the log-ratio at the sampled token, as a reward
    Eq. (4)   FullKL    the exact KL over the vocabulary
    Eq. (5)   TopK      over a set S of k tokens; the tail decides what is done about the tokens left out
    control   Supervised   -log p of the next token, for answers that somebody else has written

    HeadLoss    the loop over chunks, for any of them and for cross_tokenizer/next_byte.py
    OutputTerm  an objective as the training loop uses it

With student = teacher Eqs. (3)-(5) have gradient 0 (a reward's is 0 because every reward is).

Letters: K supervised positions, C of them in a chunk, d width, V vocabulary, S a set of k tokens;
         p student, q teacher; D the divergence of a row.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.runtime import whole_head

KINDS = ('sampled', 'full', 'topk', 'supervised')
SUPPORTS = ('student', 'teacher', 'union')
TAILS = ('reward', 'renorm', 'bucket')
DIRECTIONS = ('reverse', 'forward')
LOG_ZERO = -1e4                 # stands for log 0: its exp is 0, and differences stay finite
OVERLAP = 16                    # tokens compared for the logged overlap (Figure 10)
ALIGNMENT = 8                   # numbers: in bfloat16 16 bytes, see `empty_matrix`
COLUMNS = 1 << 14               # tokens of the vocabulary that `row_dot` takes at once


# ---- the definitions, for autograd --------------------------------------------------------------

def divergence(logp, logq, tail='bucket', direction='reverse'):
    """KL of each row over a set of outcomes: log-probabilities (K, k) and (K, k) -> (K,).

    direction: 'reverse' is KL(p || q), 'forward' KL(q || p).
    tail: what is done about the outcomes that are not in the set.
        'renorm'  p and q are both renormalised on the set: Eq. (5). Identically 0 at k = 1.
        'bucket'  they are one more outcome, which `on_support` has added: the set is complete.
        'reward'  each token of the set earns log p - log q, weighed by p renormalised on the set:
                  the authors' code. Only log p of the tokens has a gradient (score function), the
                  weighted log-ratios are constants. Differentiating the sum directly would also
                  move mass into the set or out of it, and not come to rest at the teacher.
    """
    assert tail in TAILS and direction in DIRECTIONS, (tail, direction)
    if tail == 'reward':
        assert direction == 'reverse', 'a reward is a reverse KL'
        reward = (logp.log_softmax(-1).exp() * (logp - logq)).detach()       # (K, k)
        score = logp - logp.detach()         # 0, with the gradient of log p
        return (reward * (1 + score)).sum(-1)
    if tail == 'renorm':
        logp = logp.log_softmax(-1)
        logq = logq.log_softmax(-1)
    if direction == 'forward':
        logp, logq = logq, logp
    return (logp.exp() * (logp - logq)).sum(-1)


def likeliest(logp, k):
    """The k likeliest tokens of each row, fewer if there are fewer, likeliest first: (K, k)."""
    return logp.topk(min(k, logp.shape[-1])).indices


def on_support(logp, logq, top_s, top_t, support='student', tail='renorm'):
    """Both models' log-probabilities (K, V) on the set S -> S (K, k or 2k), log p and log q there.

    support: S is the 'student's likeliest tokens top_s (K, k), the 'teacher's top_t, or their
    'union'. A token that is in both counts once, at its first place; at the second it has no mass
    and no gradient.
    tail: 'bucket' adds a last column to both, all the mass outside S, summed over the tokens there.
    (1 minus the mass inside would be a rounding error where the models are sure of themselves.)
    """
    assert support in SUPPORTS and tail in TAILS, (support, tail)
    S = {'student': top_s, 'teacher': top_t, 'union': torch.cat([top_s, top_t], -1)}[support]
    logp_S = logp.gather(-1, S)
    logq_S = logq.gather(-1, S)
    if support == 'union':
        repeated = (top_t[:, :, None] == top_s[:, None, :]).any(-1)          # (K, k)
        repeated = F.pad(repeated, (top_s.shape[-1], 0))                     # (K, 2k): never at a first place
        logp_S = logp_S.masked_fill(repeated, LOG_ZERO)
        logq_S = logq_S.masked_fill(repeated, LOG_ZERO)
    if tail == 'bucket':
        rest_p = logp.scatter(-1, S, LOG_ZERO).logsumexp(-1, keepdim=True)   # (K, 1)
        rest_q = logq.scatter(-1, S, LOG_ZERO).logsumexp(-1, keepdim=True)
        logp_S = torch.cat([logp_S, rest_p], -1)
        logq_S = torch.cat([logq_S, rest_q], -1)
    return S, logp_S, logq_S


def opd_rows(z_s, z_t, next_token, kind='full', k=16, support='student', tail='reward', direction='reverse'):
    """Eqs. (3)-(5) written down, for autograd: logits (K, V) of student and teacher -> (K,).

    kind: 'full' is Eq. (4), 'topk' Eq. (5), 'sampled' Eq. (3) at next_token (K,). The last is a
    reward: its gradient is (log p - log q), a constant, times grad log p. (Differentiating log p -
    log q itself would give the gradient of log p alone, with nothing of the teacher in it.) 'supervised'
    is -log p at next_token: the teacher is in the answers, which it has written.
    """
    assert kind in KINDS, kind
    # The teacher is a constant.
    logp = z_s.log_softmax(-1)
    logq = z_t.detach().log_softmax(-1)
    if kind == 'full':
        return divergence(logp, logq, 'bucket', direction)
    if kind == 'topk':
        top_s = likeliest(logp, k)
        top_t = likeliest(logq, k)
        _, logp_S, logq_S = on_support(logp, logq, top_s, top_t, support, tail)
        return divergence(logp_S, logq_S, tail, direction)
    assert direction == 'reverse', f'{kind} has no direction; the sampled token estimates the reverse KL'
    logp_y = logp.gather(-1, next_token[:, None]).squeeze(-1)                # (K,)
    if kind == 'supervised':
        return -logp_y
    logq_y = logq.gather(-1, next_token[:, None]).squeeze(-1)
    reward = (logp_y - logq_y).detach()
    score = logp_y - logp_y.detach()         # 0, with the gradient of log p
    return reward * (1 + score)


# ---- small parts --------------------------------------------------------------------------------

def overlap(top_s, top_t):
    """Share of the likeliest tokens (K, 16) that two models have in common (Figure 10) -> (K,)."""
    return (top_s[:, :, None] == top_t[:, None, :]).any(-1).float().mean(-1)


def sum_to_end(x, answer):
    """Sum of x (K,) from each row to the last row of its answer; answer (K,) ascending -> (K,)."""
    to_end = F.pad(x.flip(0).cumsum(0).flip(0), (0, 1))                      # (K + 1,)
    next_answer = torch.searchsorted(answer, answer, right=True)             # first row of the next one
    return to_end[:-1] - to_end[next_answer]


def row_dot(a, b):
    """Dot products of the rows of (K, V) and (K, V) -> (K,), without a third (K, V): a slice of the
    columns at a time. (An einsum becomes K products of a row and a column, which a GPU computes
    slowly.)"""
    total = a.new_zeros(len(a))                                              # (K,)
    for a_slice, b_slice in zip(a.split(COLUMNS, 1), b.split(COLUMNS, 1), strict=True):
        total += (a_slice * b_slice).sum(-1)
    return total


def empty_matrix(C, V, dtype, device):
    """An uninitialised (C, V) whose rows begin at multiples of ALIGNMENT numbers, so there may be
    unused memory between two rows.

    The fast matrix products of a GPU read and write matrices whose rows begin at multiples of 16
    bytes. A vocabulary may be odd: of the 151,936 rows of Qwen's head 151,665 stand for tokens. This
    needs no padding in the head itself, whose rows of d numbers are aligned.
    """
    row = -(-V // ALIGNMENT) * ALIGNMENT
    return torch.empty(C, row, dtype=dtype, device=device)[:, :V]


def aligned(x, dtype):
    """x (C, V) in a dtype, in an `empty_matrix`; x itself if it is that already."""
    if x.dtype == dtype and x.stride(0) % ALIGNMENT == 0:
        return x
    return empty_matrix(*x.shape, dtype, x.device).copy_(x)


def log_probs(h, W, temperature):
    """Rows (C, d) under a head (V, d) -> log-probabilities (C, V) in float32, in an `empty_matrix`.

    On CUDA the product of bf16 factors stays in float32: two models near each other differ by less
    than bf16 can say.
    """
    C, V = len(h), len(W)
    dtype = torch.promote_types(h.dtype, torch.float32)
    if h.is_cuda and h.dtype != dtype:
        logits = empty_matrix(C, V, dtype, h.device)
        torch.mm(h, W.t(), out_dtype=dtype, out=logits)
    else:
        logits = empty_matrix(C, V, h.dtype, h.device)
        torch.mm(h, W.t(), out=logits)
        logits = aligned(logits, dtype)
    logits.div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def add_product(d_W, G, h, scale):
    """d_W (V, d) += scale G' h, with G (C, V) in float32 and h (C, d).

    For bf16 rows on CUDA the factors are bf16 and the sum is float32, as in `log_probs`: float32
    factors have no tensor cores. The product is a tensor of its own there, so it is made for a
    slice of the vocabulary at a time.
    """
    if not (G.is_cuda and h.dtype == torch.bfloat16):
        d_W.addmm_(G.t(), h.to(d_W.dtype), alpha=scale)
        return
    for d_W_slice, G_slice in zip(d_W.split(1 << 15), G.split(1 << 15, dim=1), strict=True):
        product = torch.mm(aligned(G_slice, h.dtype).t(), h, out_dtype=torch.float32)
        d_W_slice.add_(product, alpha=scale)


def rows_at_once(device):
    """How many rows a head loss takes at once, if the config does not say: 1,024 on CUDA, elsewhere
    64.

    A product of C rows and a head (V, d) takes 2 C V d operations. It reads the head, 2 V d bytes in
    bf16, and writes logits of 4 C V bytes: C d / (d + 2 C) operations per byte, which is 439 for C =
    1,024 and d = 1,536. An H100 computes 295 while it moves a byte, an H200 206, so the matrix units
    are the limit. What a chunk moves whatever its rows (the heads, and the gradient of one: 5 GB) is
    by count a tenth of what it moves and computes in all, so more rows would gain little. Its four
    float32 tensors have 2.5 GB (V = 151,936).
    """
    return 1024 if device.type == 'cuda' else 64


# ---- the loop over chunks -----------------------------------------------------------------------

@dataclass
class HeadRows:
    """What an objective sees of K rows, besides the student's states. A chunk is a slice of all of
    them."""
    teacher_h: torch.Tensor     # (K, d_t) the teacher's states (next_byte.py: two of them per row, (2K, d_t))
    teacher_W: torch.Tensor     # (V_t, d_t) the teacher's head
    next_token: torch.Tensor    # (K,)
    weights: torch.Tensor       # (K,)
    answer: torch.Tensor        # (K,) ascending
    inside: torch.Tensor        # (K,) see step.Rows
    written: list | None        # [K] see step.Rows


class HeadLoss(torch.autograd.Function):
    """sum_t w_t D_t of rows under the student's LM head, a chunk of rows at a time, with its
    gradient formed now.

    What lives beside the head's own gradient is one chunk: three or four (C, V) tensors.
    """
    @staticmethod
    def forward(ctx, h, W, objective, batch):
        # Results, one number per row, and the gradients of states and head.
        dtype = torch.promote_types(h.dtype, torch.float32)
        weights = batch.weights.to(dtype)
        V = objective.vocab or W.shape[0]
        chunk = objective.chunk or rows_at_once(h.device)
        value = weights.new_zeros(len(h))                                    # (K,)
        statistics = weights.new_zeros(4, len(h))
        d_h = torch.empty_like(h)
        d_W = None
        if ctx.needs_input_grad[1]:
            d_W = torch.zeros_like(W, dtype=dtype)

        # From the last chunk to the first: `Sampled` may need the sum over the rest of an answer.
        for start in reversed(range(0, len(h), chunk)):
            piece = slice(start, start + chunk)
            logp = log_probs(h[piece], W[:V], objective.temperature)          # (C, V)
            value[piece], G, statistics[:, piece] = objective.loss_and_gradient(logp, batch, piece)
            # G (C, V) is the gradient of sum_t w_t D_t with respect to the logits. The chain rule
            # goes on from there to the states and to the head.
            d_h[piece] = (aligned(G, W.dtype) @ W[:V]).div_(objective.temperature)
            if d_W is not None:
                add_product(d_W[:V], G, h[piece], 1 / objective.temperature)
            del logp, G                      # before the next chunk's are made

        ctx.grads = d_h, d_W
        ctx.set_materialize_grads(False)
        sums = torch.cat([weights.sum()[None], statistics @ weights])        # (5,)
        ctx.mark_non_differentiable(sums)
        return (weights * value).sum(), sums

    @staticmethod
    def backward(ctx, grad_loss, _):
        d_h, d_W = ctx.grads
        del ctx.grads                        # they are scaled in place: a second backward would be wrong
        d_h.mul_(grad_loss)
        if d_W is not None:
            d_W.mul_(grad_loss)
        return d_h, d_W, None, None


@torch.no_grad()
def head_statistics(h, W, objective, batch):
    """The second result of HeadLoss, without loss and gradient: for the diagnosis of a step that
    trains something else.
    -> (5,): the sum of the weights; weighted sums of KL, entropy of p, entropy of q (nats), top-16
    overlap."""
    weights = batch.weights.to(torch.promote_types(h.dtype, torch.float32))
    V = objective.vocab or W.shape[0]
    chunk = objective.chunk or rows_at_once(h.device)
    statistics = weights.new_zeros(4, len(h))
    for start in range(0, len(h), chunk):
        piece = slice(start, start + chunk)
        logp = log_probs(h[piece], W[:V], objective.temperature)              # (C, V)
        statistics[:, piece] = objective.statistics(logp, batch, piece)
    return torch.cat([weights.sum()[None], statistics @ weights])


class OutputTerm:
    """An output-space objective as a term of the training loss: made once, called for each
    micro-batch."""
    def __init__(self, objective, teacher):
        self.objective = objective
        self.teacher = teacher

    def teacher_positions(self, rows):
        """Which states of the teacher's last layer the objective needs: flat positions in
        rows.teacher_ids."""
        return self.objective.teacher_positions(rows)

    def head_rows(self, teacher_h, teacher_W, rows):
        """The teacher's states (K, d_t), its head and Rows -> HeadRows."""
        return HeadRows(teacher_h, teacher_W, rows.next_token, rows.weights, rows.answer, rows.inside,
                        rows.written)

    def __call__(self, student_head, h, teacher_h, rows):
        """Student states (K, d) at rows.at -> (loss, statistics (5,)); see HeadLoss.

        The call goes through the head module: FSDP gathers the head's weight for it. The gradient is formed
        in this forward, so the teacher's head may be gone again when the backward comes.
        """
        with whole_head(self.teacher) as teacher_W:
            batch = self.head_rows(teacher_h, teacher_W, rows)
            return student_head(h, lambda h, W: HeadLoss.apply(h, W, self.objective, batch))

    def statistics(self, student_head, h, teacher_h, rows):
        """The statistics (5,) alone, without a gradient."""
        with whole_head(self.teacher) as teacher_W:
            batch = self.head_rows(teacher_h, teacher_W, rows)
            return student_head(h, lambda h, W: head_statistics(h, W, self.objective, batch))


# ---- Eqs. (3)-(5) on a chunk ----------------------------------------------------------------------

@dataclass
class Comparison:
    """Student and teacher on a chunk of C rows."""
    p: torch.Tensor             # (C, V)
    log_ratio: torch.Tensor     # (C, V) log p - log q
    KL: torch.Tensor            # (C,) exact
    statistics: torch.Tensor    # (4, C) KL, entropy of p, entropy of q, overlap


def compare(logp, logq, top_s=None, top_t=None):
    """Log-probabilities (C, V) and (C, V) -> Comparison. logq is *overwritten* (three (C, V)
    tensors live, not four).
    top_s, top_t: the likeliest tokens of both (C, 16 or more), if they are known."""
    # What needs log q itself comes before its memory is reused.
    if top_s is None:
        top_s = likeliest(logp, OVERLAP)
        top_t = likeliest(logq, OVERLAP)
    entropy_q = -row_dot(logq.exp(), logq)
    log_ratio = logq.neg_().add_(logp)       # in logq's memory
    # p becomes the gradient of the logits, which is a factor of two products: its rows are aligned.
    p = torch.exp(logp, out=empty_matrix(*logp.shape, logp.dtype, logp.device))
    KL = row_dot(p, log_ratio)
    entropy_p = -row_dot(p, logp)
    common = overlap(top_s[:, :OVERLAP], top_t[:, :OVERLAP]).to(KL.dtype)
    return Comparison(p, log_ratio, KL, torch.stack([KL, entropy_p, entropy_q, common]))


def support_gradient(p, S, g, p_S, rest):
    """The gradient of a function of log p on S with respect to the logits -> (C, V), in p's memory.

    g (C, k) = dD/dlog p on S, p_S (C, k) the probabilities there, rest (C, 1): outside S, dD/dlog p
    is rest * p. Through the softmax the gradient is g - p sum(g). A token that is twice in S has g
    and p_S of 0 at one place.
    """
    outside = p.scatter_(-1, S, 0.0)
    total = g.sum(-1, keepdim=True) + rest * outside.sum(-1, keepdim=True)
    return outside.mul_(rest - total).scatter_add_(-1, S, g - p_S * total)


@dataclass
class Vocabulary:
    """What the three objectives share: both models' distributions over one vocabulary.

    vocab: ids from here on are padding of the embedding that no token stands for; the softmax
    leaves them out, as the sampler does. None: there is no padding. chunk: rows at once; 0: see
    `rows_at_once`.
    """
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    vocab: int | None = None
    chunk: int = 0

    def teacher_positions(self, rows):
        """The teacher's state at each supervised position."""
        return rows.teacher_at

    def teacher_log_probs(self, batch, piece):
        """log q (C, V) of a chunk."""
        return log_probs(batch.teacher_h[piece], batch.teacher_W[:self.vocab], self.teacher_temperature)

    def statistics(self, logp, batch, piece):
        """KL, both entropies in nats and the overlap of a chunk (4, C)."""
        return compare(logp, self.teacher_log_probs(batch, piece)).statistics


@dataclass
class FullKL(Vocabulary):
    """Eq. (4): the KL over the whole vocabulary."""
    direction: str = 'reverse'

    def loss_and_gradient(self, logp, batch, piece):
        """log p (C, V) -> D (C,), the gradient of w D with respect to the logits (C, V), statistics
        (4, C)."""
        both = compare(logp, self.teacher_log_probs(batch, piece))
        if self.direction == 'reverse':
            D = both.KL
            G = both.p.mul_(both.log_ratio.sub_(both.KL[:, None]))           # p (log p - log q - KL)
        else:
            assert self.direction == 'forward', self.direction
            q = (logp - both.log_ratio).exp_()                               # a fourth (C, V)
            D = -row_dot(q, both.log_ratio)
            G = both.p.sub_(q)                                               # p - q
        return D, G.mul_(batch.weights[piece, None]), both.statistics


@dataclass
class TopK(Vocabulary):
    """Eq. (5) and its relatives on a set S of k tokens; `divergence` says what the tails mean."""
    k: int = 16
    support: str = 'student'
    tail: str = 'reward'
    direction: str = 'reverse'

    def loss_and_gradient(self, logp, batch, piece):
        """log p (C, V) -> D (C,), the gradient of w D with respect to the logits (C, V), statistics
        (4, C)."""
        logq = self.teacher_log_probs(batch, piece)
        top_s = likeliest(logp, max(self.k, OVERLAP))
        top_t = likeliest(logq, max(self.k, OVERLAP))
        S, logp_S, logq_S = on_support(logp, logq, top_s[:, :self.k], top_t[:, :self.k],
                                       self.support, self.tail)

        # On S the numbers are few enough for autograd: g = dD/dlog p.
        with torch.enable_grad():
            leaf = logp_S.detach().requires_grad_()
            D = divergence(leaf, logq_S, self.tail, self.direction)
            g, = torch.autograd.grad(D.sum(), leaf)                          # (C, k)
        p_S = logp_S.exp()
        rest = torch.zeros_like(g[:, :1])
        if self.tail == 'bucket':
            rest = (g / p_S.clamp(min=1e-37))[:, -1:]    # dD/dlog r over r, the mass outside
            g = g[:, :-1]
            p_S = p_S[:, :-1]

        # From the k tokens to the whole vocabulary, through the softmax.
        both = compare(logp, logq, top_s, top_t)
        weights = batch.weights[piece, None]
        G = support_gradient(both.p, S, g * weights, p_S, rest * weights)
        return D.detach(), G, both.statistics


@dataclass
class Sampled(Vocabulary):
    """Eq. (3): the log-ratio at the sampled token, a reward for that token.

    future: a token answers for the log-ratios of its whole answer from there on. That is the
    gradient of the KL of trajectories: unbiased, and noisier. Without it each token answers for
    itself alone, as in the paper.
    baseline: subtract the exact KL at the position, which is the log-ratio's mean: less variance,
    the same mean.
    """
    future: bool = False
    baseline: bool = False

    def loss_and_gradient(self, logp, batch, piece):
        """log p (C, V) -> D (C,), the gradient of w D with respect to the logits (C, V), statistics
        (4, C)."""
        both = compare(logp, self.teacher_log_probs(batch, piece))
        weights = batch.weights[piece]
        S = batch.next_token[piece, None]                                     # (C, 1)
        D = both.log_ratio.gather(-1, S).squeeze(-1)                         # (C,)
        reward = weights * D
        if self.future:
            # Rows come from the last to the first, so the log-ratios of the rest of the answer are
            # known.
            self.ratios = torch.cat([reward, self.ratios]) if piece.stop < len(batch.weights) else reward
            reward = sum_to_end(self.ratios, batch.answer[piece.start:])[:len(D)]
        if self.baseline:
            reward = reward - weights * both.KL
        G = support_gradient(both.p, S, reward[:, None], both.p.gather(-1, S), 0.0)
        return D, G, both.statistics


@dataclass
class Supervised(Vocabulary):
    """A control: supervised learning of the tokens that the answers have. It is meant for answers that the
    teacher has written, or of the solutions; the student's own would teach it nothing."""
    def loss_and_gradient(self, logp, batch, piece):
        """log p (C, V) -> D (C,), the gradient of w D with respect to the logits (C, V), statistics
        (4, C)."""
        both = compare(logp, self.teacher_log_probs(batch, piece))
        next_token = batch.next_token[piece, None]                           # (C, 1)
        logp_y = logp.gather(-1, next_token)                                 # (C, 1)
        # p - 1 at the token that comes next, p elsewhere
        G = both.p.scatter_add_(-1, next_token, -torch.ones_like(logp_y))
        return -logp_y.squeeze(-1), G.mul_(batch.weights[piece, None]), both.statistics


def make_objective(kind, *, k=16, support='student', tail='reward', direction='reverse', future=False,
                   baseline=False, **heads):
    """Sampled, FullKL, TopK or Supervised by name. heads: the fields of Vocabulary."""
    assert kind in KINDS, kind
    if kind == 'full':
        return FullKL(direction=direction, **heads)
    if kind == 'topk':
        return TopK(k=k, support=support, tail=tail, direction=direction, **heads)
    if kind == 'supervised':
        return Supervised(**heads)
    return Sampled(future=future, baseline=baseline, **heads)
