"""
The objectives, one function per equation, and which layers and positions they read.

Each is there twice: written down for autograd, and fused, with the gradient formed in the forward.
    Eq. (6)         oprd_loss    layer_loss: one layer at a time inside the student's forward; the
                                 gradient rows lie where the teacher's rows lay, nothing else is kept
    Eqs. (14), (15) bridge_rows  bridge_loss: the same through a bridge, r numbers a row kept
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

import kernels

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


def layer_pairs(layers, L_s, L_t, teacher_layers='depth'):
    """phi: {student layer: teacher layer}, by Eq. (11) or as the list teacher_layers says, one for each."""
    if isinstance(teacher_layers, list):
        return dict(zip(layers, teacher_layers, strict=True))
    return {l: layer_map(l, L_s, L_t) for l in layers}


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
    in every step. Position t is in if t * golden + step * plastic, modulo 1, is below the share (in whole
    numbers, so that devices agree): a function of t and step alone, so neither micro-batches nor ranks
    change it."""
    t = torch.arange(m.shape[1], device=m.device) - (roll.prompt_len[:, None] - 1)           # (B, T)
    return m & ((t * 2654435769 + step * 3242174889) % 2**32 < share * 2**32)


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
    distance = distance.clamp(min=0)         # 1 - cos of equal rows is rounding, of either sign
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
    """One layer of Eq. (6), as an identity on h that adds its gradient on the way back; the rows and their
    gradient: kernels/layer_loss.py."""
    @staticmethod
    def forward(ctx, h, h_t, at, w, kind, answer):
        w = even = w.to(torch.promote_types(h.dtype, torch.float32))
        # the teacher's rows are spent: their memory holds dL/ds from here on
        each = w if answer is None else torch.ones_like(w)
        value, cos = kernels.layer_rows(h.flatten(0, 1), h_t, at, each, kind)
        if answer is not None:
            w = by_drift(w, value, answer)
            h_t.mul_(w[:, None])
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


# ---- Eqs. (14), (15): hidden states through a bridge -------------------------------------------------

def through(s, P_s, b_s, inside):
    """Student rows (K, d) through a bridge's student side: P_s (2, r, d), b_s (2, r), a row's class
    inside (K,) -> (K, r)."""
    z = s @ P_s.flatten(0, 1).t() + b_s.flatten()                            # (K, 2 r): both classes
    return z.view(len(s), 2, -1)[torch.arange(len(s), device=s.device), inside.long()]


def bridge_rows(z_s, z_t, normalise=True):
    """Eq. (14) at each row, projected states (K, r) and (K, r) -> (K,): ||z_s - z_t||^2, both L2-normalised
    first as section 3.3.3 does in practice; then it is 2 (1 - cos)."""
    if normalise:
        z_s, z_t = (F.normalize(z, dim=-1, eps=1e-12) for z in (z_s, z_t))
    return (z_s - z_t).square().sum(-1)


class BridgeLoss(torch.autograd.Function):
    """One layer of Eq. (15), as an identity on h that adds its gradient on the way back. What is kept are
    r numbers a row, dL/dz; the gradient of the states is P_s' dL/dz."""
    @staticmethod
    def forward(ctx, h, z_t, at, w, P_s, b_s, inside, normalise):
        w = w.to(torch.promote_types(h.dtype, torch.float32))
        # the teacher's rows are spent: their memory holds dL/dz from here on
        value, cos = kernels.bridge_rows(h.flatten(0, 1), z_t, at, w, P_s, b_s, inside, normalise)
        ctx.save_for_backward(z_t, at, P_s, inside)
        ctx.like = h.shape, h.dtype, h.device
        ctx.set_materialize_grads(False)
        loss, cos = (w * value).sum(), (w * cos).sum()
        ctx.mark_non_differentiable(cos)
        return h.view_as(h), loss, cos

    @staticmethod
    def backward(ctx, g_h, g_loss, _):
        if g_loss is None:
            return g_h, *[None] * 7
        grad, at, P_s, inside = ctx.saved_tensors
        shape, dtype, device = ctx.like
        # a copy: autograd may hand the same g_h to another branch of the residual stream
        g = torch.zeros(shape, dtype=dtype, device=device) if g_h is None else g_h.clone(
            memory_format=torch.contiguous_format)
        kernels.bridge_back(g.view(-1, shape[-1]), grad, at, P_s, inside, g_loss)
        return g, *[None] * 7


def bridge_loss(h, z_t, at, w, P_s, b_s, inside, normalise=True):
    """One layer of Eq. (15): sum_t w_t bridge_rows at t, its gradient formed now -> (h, loss, cos).

    h (B, T, d): as in layer_loss. z_t (K, r): the teacher's rows, already projected; *overwritten*. at, w,
    inside (K,): flat positions, weights, classes. P_s (2, r, d), b_s (2, r): the bridge, no gradient.
    """
    return BridgeLoss.apply(h, z_t, at, w, P_s, b_s, inside, normalise)


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
