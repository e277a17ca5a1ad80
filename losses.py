"""
The objectives, one function per equation, and which layers and positions they read.

Each is there twice: written down for autograd, and fused, with the gradient formed in the forward.
    Eq. (6)         oprd_loss    layer_loss: one layer at a time inside the student's forward; the
                                 gradient rows lie where the teacher's rows lay, nothing else is kept
    Eqs. (3)-(5)    opd_rows     opd_loss: a chunk of rows at a time under the LM head; memory grows
                                 with the chunk, not with tokens x vocabulary
A test holds each pair equal. Eq. (7) is their weighted sum, taken by distill.py. Loss arithmetic is
fp32 whatever the models' type.

Letters: B rows, T tokens, K supervised positions (over all rows), C of them in a chunk, L layers,
         d width, V vocabulary, S a set of k tokens; p student, q teacher.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F

# ---- which layers ---------------------------------------------------------------------------

def layer_set(which, L):
    """'all', 'last', 'even', 'odd' or a list -> ascending student layers, 1-based."""
    if isinstance(which, list):
        layers = sorted(set(which))
        assert layers[0] >= 1 and layers[-1] <= L, f'layers {layers} of a model with {L}'
        return layers
    every = range(1, L + 1)
    return {'all': list(every), 'last': [L], 'even': [l for l in every if l % 2 == 0],
            'odd': [l for l in every if l % 2]}[which]


def layer_map(l, L_s, L_t):
    """Eq. (11): the teacher layer for student layer l, both 1-based. Ends meet ends. Whole numbers
    throughout, halves up: Python's round() would take them to the even side."""
    if L_s == 1:
        return L_t
    return (2 * (l - 1) * (L_t - 1) + L_s - 1) // (2 * (L_s - 1)) + 1


# ---- which positions, with what weight --------------------------------------------------------

def positions(roll, which='all', size=0):
    """Mask m of the supervised positions of a rollout -> bool (B, T).

    Response position t = 0 .. resp_len - 1 is the place whose output predicts response token t: it
    has read the prompt and t response tokens, so it lies at column prompt_len - 1 + t. Chosen by
    length, never by id: the stop token is supervised, padding never.
    which: 'all', 'last', 'last_k' or 'first_k' (size = k), 'last_frac' or 'first_frac' (size = share
    of each answer, rounded, at least one position), 'drift' (all; layer_loss weighs them).
    """
    n = roll.resp_len[:, None]                                               # (B, 1)
    t = torch.arange(roll.ids.shape[1], device=roll.ids.device) - (roll.prompt_len[:, None] - 1)  # (B, T)
    m = (t >= 0) & (t < n)
    if which.endswith('frac'):
        size = (n * size).round().clamp(min=1)
    if which == 'last':
        size = 1
    if which.startswith('last'):
        m &= t >= n - size
    elif which.startswith('first'):
        m &= t < size
    else:
        assert which in ('all', 'drift'), which
    return m


def spread(roll, m, step, share):
    """About `share` of the positions in a mask m (B, T), spread evenly over each answer and differently
    in every step: t is in if the fractional part of t * golden + step * plastic is below the share, a
    function of t and step alone, so neither micro-batches nor ranks change it."""
    t = torch.arange(m.shape[1], device=m.device) - (roll.prompt_len[:, None] - 1)           # (B, T)
    return m & ((t * 0.6180340 + step * 0.7548777 % 1) % 1 < share)


def position_weights(m, average='sequence', sequences=None, tokens=None):
    """Mask m (B, T) -> weights (B, T) fp32 that sum to 1 over the global batch.

    'sequence' is Eq. (6): 1 / sum_t m_t within each answer, then a mean over answers. 'token' gives
    every supervised token the same weight (the authors' code). sequences, tokens: counts over the
    global batch, default those of m; made once per step, so that neither micro-batches nor ranks
    change the gradient.
    """
    count = m.sum(1, keepdim=True)
    if average == 'sequence':
        return m / count.clamp(min=1) / (sequences or (count > 0).sum())
    assert average == 'token', average
    return m / (tokens or m.sum())


def by_drift(w, distance, answer):
    """Each answer's weight dealt to its positions in proportion to their distance, taken as constant:
    a position counts the more, the further the student has drifted there. w, distance (K,) -> (K,)."""
    n = int(answer.max()) + 1 if len(answer) else 0
    whole, far = (w.new_zeros(n).index_add(0, answer, x) for x in (w, w * distance))
    return whole[answer] * w * distance / far[answer].clamp(min=1e-30)


# ---- Eq. (6) ----------------------------------------------------------------------------------

def row_distance(h_s, h_t, kind='mse'):
    """Distance of each student row to its teacher row, (K, d) and (K, d) -> (K,).

    'mse': (1/d) ||h_s - h_t||^2, Eq. (6).  'nmse': the same after L2-normalising both, which is
    2 (1 - cos) / d.  'cosine': 1 - cos.
    """
    if kind == 'mse':
        return (h_s - h_t).square().mean(-1)
    cos = F.cosine_similarity(h_s, h_t, dim=-1, eps=1e-12)
    return 1 - cos if kind == 'cosine' else 2 * (1 - cos) / h_s.shape[-1]


def oprd_loss(h_s, h_t, w, kind='mse'):
    """Eq. (6), OPRD-Vanilla: mean over layers of sum_t w_t (distance at t); a scalar for autograd.

    h_s, h_t: lists of (K, d), one per layer; the teacher gets no gradient. w: (K,) weights.
    Plain and slow on purpose: it keeps fp32 copies of every layer alive. Training uses layer_loss.
    """
    dtype = torch.promote_types(h_s[0].dtype, torch.float32)
    each = [(w * row_distance(s.to(dtype), t.detach().to(dtype), kind)).sum()
            for s, t in zip(h_s, h_t, strict=True)]
    return sum(each) / len(each)


class LayerLoss(torch.autograd.Function):
    """One layer of Eq. (6), as an identity on h that adds its gradient on the way back.

    With s, t a student and a teacher row and c their cosine, the row gradients are
        mse      2 (s - t) / d
        cosine   (c s/|s| - t/|t|) / |s|           nmse = cosine times 2/d
    """
    @staticmethod
    def forward(ctx, h, h_t, at, w, kind, answer):
        dtype = torch.promote_types(h.dtype, torch.float32)
        s, t = h.flatten(0, 1)[at].to(dtype), h_t.to(dtype)                  # (K, d)
        d = s.shape[-1]
        s_norm, t_norm = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (s, t))
        cos = (s * t).sum(-1, keepdim=True) / (s_norm * t_norm)              # (K, 1)
        if kind == 'mse':
            s -= t
            value, grad = s.square().mean(-1, keepdim=True), s.mul_(2 / d)
        else:
            scale = 2 / d if kind == 'nmse' else 1.0
            value, grad = (1 - cos) * scale, (s.mul_(cos / s_norm) - t / t_norm).mul_(scale / s_norm)
        w = even = w.to(dtype)[:, None]
        if answer is not None:
            w = by_drift(w.squeeze(-1), value.squeeze(-1), answer)[:, None]
        h_t.copy_(grad.mul_(w))              # the teacher's rows are spent: their memory holds dL/ds
        ctx.save_for_backward(h_t, at)
        ctx.like = h.shape, h.dtype, h.device
        ctx.set_materialize_grads(False)
        loss, cos = (w * value).sum(), (even * cos).sum()
        ctx.mark_non_differentiable(cos)
        return h.view_as(h), loss, cos

    @staticmethod
    def backward(ctx, g_h, g_loss, _):
        if g_loss is None:
            return g_h, None, None, None, None, None
        grad, at = ctx.saved_tensors
        shape, dtype, device = ctx.like
        if g_h is None:                      # the last layer: nothing comes from above
            g_h = torch.zeros(shape, dtype=dtype, device=device)
        # not in place: autograd may hand the same g_h to another branch of the residual stream
        g = g_h.flatten(0, 1).index_add(0, at, (grad * g_loss).to(dtype))
        return g.view(shape), None, None, None, None, None


def layer_loss(h, h_t, at, w, kind='mse', answer=None):
    """One layer's sum_t w_t (distance at t), its gradient formed now -> (h, loss, cos).

    h: student states (B, T, d) of the layer; go on with the returned h, whose backward adds the
    gradient. h_t: teacher rows (K, d); *overwritten*. at: flat positions (K,) of (B*T,). w: (K,).
    answer: numbers (K,) of the rows' answers, for drift weighting (`by_drift`).
    loss: scalar, differentiable as any other. cos: weighted mean cosine, a number to log.
    """
    return LayerLoss.apply(h, h_t, at, w, kind, answer)


# ---- Eqs. (3)-(5): output space ----------------------------------------------------------------

def divergence(logp, logq, tail='renorm', direction='reverse'):
    """KL of each row on a support S of k tokens, log-probabilities (K, k) and (K, k) -> (K,).

    direction: 'reverse' is KL(p || q), 'forward' KL(q || p). tail, what is done with the mass outside S:
    'renorm'  both are renormalised on S: Eq. (5). Identically 0 at k = 1.
    'bucket'  it is one more outcome: never more than the KL over the whole vocabulary.
    'drop'    nothing: sum over S of p (log p - log q), section 4.1.1; can be negative.
    With the whole vocabulary as S all three are Eq. (4).
    """
    if tail == 'renorm':
        logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
    elif tail == 'bucket':
        eps = torch.finfo(logp.dtype).eps    # what 1 - sum may be off by; below it the rest is rounding
        logp, logq = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).clamp(min=eps).log()], -1)
                      for x in (logp, logq))
    else:
        assert tail == 'drop', tail
    if direction == 'forward':
        logp, logq = logq, logp
    return (logp.exp() * (logp - logq)).sum(-1)


def on_support(logp, logq, which, k):
    """Log-probabilities (K, V) of both models -> token ids of S (K, k or 2k), both gathered there.
    S: the k likeliest tokens of the 'student', of the 'teacher', or of either ('union': a token that
    is in both keeps its place once, the other place has no mass and no gradient)."""
    k = min(k, logp.shape[-1])
    if which == 'union':
        a, b = logp.topk(k).indices, logq.topk(k).indices
        S = torch.cat([a, b], -1)                                            # (K, 2k)
        twice = F.pad((b[:, :, None] == a[:, None, :]).any(-1), (k, 0))
        return S, *(x.gather(-1, S).masked_fill(twice, -1e4) for x in (logp, logq))
    S = (logp if which == 'student' else logq).topk(k).indices               # (K, k)
    return S, logp.gather(-1, S), logq.gather(-1, S)


def opd_rows(z_s, z_t, y, kind='full', k=16, support='student', tail='renorm', direction='reverse'):
    """Eqs. (3)-(5) written down, for autograd: logits (K, V) of student and teacher -> (K,).

    'full': Eq. (4).  'topk': Eq. (5) on `support`.  'sampled': Eq. (3) at the token y (K,). That one
    is a reward: its gradient is (log p - log q), detached, times grad log p. (Back-propagating
    log p - log q itself would have the gradient of log p alone: nothing of the teacher's.)
    """
    logp, logq = z_s.log_softmax(-1), z_t.detach().log_softmax(-1)
    if kind == 'full':
        return divergence(logp, logq, 'drop', direction)
    if kind == 'topk':
        return divergence(*on_support(logp, logq, support, k)[1:], tail, direction)
    assert kind == 'sampled' and direction == 'reverse', f'{kind} {direction}'
    logp_y, logq_y = (x.gather(-1, y[:, None]).squeeze(-1) for x in (logp, logq))
    ratio = (logp_y - logq_y).detach()
    return ratio * (1 + logp_y - logp_y.detach())        # the ratio, with the reward's gradient


def overlap(logp, logq, k=16):
    """Share of the k likeliest tokens that two models have in common (Figure 10), (K, V) -> (K,)."""
    k = min(k, logp.shape[-1])
    a, b = logp.topk(k).indices, logq.topk(k).indices
    return (a[:, :, None] == b[:, None, :]).any(-1).to(logp.dtype).mean(-1)


def to_go(x, answer):
    """Sum of x from each row to the last one of its answer; answer (K,) ascending -> (K,)."""
    ahead = F.pad(x.flip(0).cumsum(0).flip(0), (0, 1))                       # (K + 1,)
    return ahead[:-1] - ahead[torch.searchsorted(answer, answer, right=True)]


def dot(a, b):
    """Row by row, (K, V) and (K, V) -> (K,), without a third (K, V)."""
    return torch.einsum('kv,kv->k', a, b)


def log_probs(h, W, temperature):
    """Rows (K, d) under a head (V, d) -> log-probabilities (K, V), in fp32 whatever the head's type."""
    z = h @ W.t()
    z = z.to(torch.promote_types(z.dtype, torch.float32)).div_(temperature)
    return z.sub_(z.logsumexp(-1, keepdim=True))


class HeadLoss(torch.autograd.Function):
    """Eqs. (3)-(5) of rows under the LM head, a chunk of rows at a time, gradient formed as it goes.

    With g = dD/dlog p, nonzero on the support alone, the gradient of the logits is g - p sum(g); with
    the whole vocabulary p (log p - log q - KL), or p - q the other way round. Three (chunk, V) tensors
    live at once, four for forward KL, beside the head's own gradient.
    """
    @staticmethod
    def forward(ctx, h, W, h_t, W_t, y, w, answer, kind, k, support, tail, direction, temperature,
                teacher_temperature, future, baseline, vocab, chunk):
        W_all, W, W_t = W, W[:vocab], W_t[:vocab]
        learns = kind is not None
        dtype = torch.promote_types(h.dtype, torch.float32)
        w = w.to(dtype)
        d_h = torch.empty_like(h) if learns else None
        d_W = torch.zeros_like(W_all, dtype=dtype) if learns and ctx.needs_input_grad[1] else None
        D, ratio = w.new_zeros(len(h)), w.new_zeros(len(h))                  # (K,)
        stats = w.new_zeros(4, len(h))       # KL, entropy of p, entropy of q, overlap
        for at in reversed(range(0, len(h), chunk)):     # backwards: what is to come is known (to_go)
            rows = slice(at, at + chunk)
            logp, logq = log_probs(h[rows], W, temperature), log_probs(h_t[rows], W_t, teacher_temperature)
            stats[3, rows] = overlap(logp, logq)
            if kind == 'topk':
                S, logp_S, logq_S = on_support(logp, logq, support, k)       # (C, k)
            q = logq.exp()                                                   # (C, V)
            stats[2, rows] = -dot(q, logq)
            if kind != 'full' or direction == 'reverse':
                q = None
            f = logq.neg_().add_(logp)                                       # log p - log q, in logq's memory
            p = logp.exp()
            KL = dot(p, f)                                                   # (C,)
            stats[0, rows], stats[1, rows] = KL, -dot(p, logp)
            del logp, logq
            if not learns:
                continue
            weight = w[rows, None]
            if kind == 'full' and direction == 'reverse':
                D[rows], G = KL, p.mul_(f.sub_(KL[:, None])).mul_(weight)
            elif kind == 'full':
                D[rows], G = -dot(q, f), p.sub_(q).mul_(weight)
            else:
                if kind == 'topk':
                    with torch.enable_grad():            # (C, k): small enough for autograd
                        leaf = logp_S.detach().requires_grad_()
                        D_rows = divergence(leaf, logq_S, tail, direction)
                        g, = torch.autograd.grad(D_rows.sum(), leaf)
                    D[rows], g = D_rows.detach(), g * weight
                else:
                    S = y[rows, None]
                    D[rows] = f.gather(-1, S).squeeze(-1)
                    ratio[rows] = w[rows] * D[rows]
                    g = (to_go(ratio, answer) if future else ratio)[rows, None]
                    if baseline:
                        g = g - weight * KL[:, None]
                G = p.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, S, g)
            d_h[rows] = (G.to(W.dtype) @ W).div_(temperature)
            if d_W is not None:
                d_W[:vocab].addmm_(G.t(), h[rows].to(dtype), alpha=1 / temperature)
            del f, p, q, G
        ctx.grads = d_h, d_W
        ctx.set_materialize_grads(False)
        stats = torch.cat([w.sum()[None], stats @ w])
        ctx.mark_non_differentiable(stats)
        return (w * D).sum(), stats

    @staticmethod
    def backward(ctx, g_loss, _):
        d_h, d_W = ctx.grads
        del ctx.grads                        # scaled in place: a second backward would be wrong
        return d_h.mul_(g_loss), d_W if d_W is None else d_W.mul_(g_loss), *[None] * 16


def opd_loss(h, W, h_t, W_t, y, w, answer=None, *, kind='full', k=16, support='student', tail='renorm',
             direction='reverse', temperature=1.0, teacher_temperature=1.0, future=False, baseline=False,
             vocab=None, chunk=64):
    """sum_t w_t (opd_rows at t), without logits of more than `chunk` rows -> (loss, stats).

    h (K, d), W (V, d): student rows and head. h_t (K, d_t), W_t (V_t, d_t): the teacher's. y (K,): the
    sampled tokens. w (K,): weights. vocab: ids from here on are padding; the softmax leaves them out,
    as the sampler does. kind=None: stats alone, no gradient.
    stats (5,): sum of w, then w-weighted sums of the exact KL(p || q), both entropies in nats, overlap.
    'sampled' only: future=True weighs grad log p(y_t) with the sum of the ratios from t to the end of
    its answer (row numbers `answer`, ascending), the gradient of the whole trajectory's KL: unbiased,
    and noisier; without it each token answers for itself alone. baseline=True subtracts the exact KL
    at t, the ratio's mean: less variance, the same expectation.
    """
    return HeadLoss.apply(h, W, h_t, W_t, y, w, answer, kind, k, support, tail, direction, temperature,
                          teacher_temperature, future, baseline, vocab, chunk)


# ---- Eq. (7): the weights of its two terms -------------------------------------------------------

def weight_at(step, steps, weight):
    """A term's weight at a step 1..steps: a number, or knots [[share of the run, weight], ...] with
    straight lines between and flat ends; two knots at one share make a jump."""
    if not isinstance(weight, list):
        return weight
    x = (step - 1) / steps
    for (x0, w0), (x1, w1) in pairwise(weight):
        if x0 <= x < x1:
            return w0 + (w1 - w0) * (x - x0) / (x1 - x0)
    return weight[0][1] if x < weight[0][0] else weight[-1][1]


def ever(weight):
    """Is this term's weight positive at any time?"""
    return max(w for _, w in weight) > 0 if isinstance(weight, list) else weight > 0
