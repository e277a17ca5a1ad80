"""
The hidden-state objectives, Eqs. (6), (14) and (15), and which layers they match.

Each objective is here twice. The readable form is a function of rows for autograd: it is the
definition. The fused form takes one layer at a time while the student's forward runs, forms the
gradient at once, and stores it in the memory of the teacher's rows, so that nothing else is kept
until the backward:

    Eq. (6)     row_distance,    oprd_loss     layer_loss     kernels/layer_loss.py
    Eq. (15)    bridge_distance                bridge_loss    kernels/bridge_loss.py

To try another distance, add it to DISTANCES. It trains from there on, with its gradient by
autograd; a fused gradient only makes it faster. Loss arithmetic is float32 (or wider), whatever the
type of the models.

Output-space objectives: output_losses.py. Positions and weights: step.py.

Letters: B answers, T tokens, K supervised positions, L layers, d width, r rank of a bridge.
"""
import torch
import torch.nn.functional as F

import kernels
from kernels.layer_loss import KINDS as FUSED

# ---- which layers ----------------------------------------------------------------------------

def layer_set(which, L):
    """'all', 'last', 'even', 'odd' or a list -> ascending student layers, counted from 1.

    The authors' code counts blocks from 0, so its 'even' is our 'odd'.
    """
    # A list may be in any order and may repeat itself.
    if isinstance(which, list):
        layers = sorted(set(which))
        assert layers[0] >= 1 and layers[-1] <= L, f'layers {layers} of a model with {L}'
        return layers
    layers = range(1, L + 1)
    if which == 'all':
        return list(layers)
    if which == 'last':
        return [L]
    assert which in ('even', 'odd'), which
    remainder = 0 if which == 'even' else 1
    return [l for l in layers if l % 2 == remainder]


def teacher_layer(l, L_s, L_t):
    """Eq. (11): the teacher layer that student layer l is matched with, both counted from 1.

    First meets first, last meets last. Whole numbers throughout, and halves are rounded up:
    Python's round() would take halves to the even neighbour, and floats come out one too low for
    some depths.
    """
    if L_s == 1:
        return L_t
    return (2 * (l - 1) * (L_t - 1) + L_s - 1) // (2 * (L_s - 1)) + 1


def layer_pairs(layers, L_s, L_t, teacher_layers='depth'):
    """layer_map {student layer: teacher layer}: by Eq. (11), or as the list `teacher_layers` says,
    one for each."""
    if isinstance(teacher_layers, list):
        return dict(zip(layers, teacher_layers, strict=True))
    return {l: teacher_layer(l, L_s, L_t) for l in layers}


# ---- Eq. (6): the distance of two hidden states -------------------------------------------------

def squared_error(h_s, h_t):
    """Eq. (6): (1/d) ||h_s - h_t||^2 of each row, (K, d) and (K, d) -> (K,)."""
    return (h_s - h_t).square().mean(-1)


def one_minus_cosine(h_s, h_t):
    """1 - cos of each row, (K, d) and (K, d) -> (K,). It is d/2 times `normalised_squared_error`."""
    return 1 - F.cosine_similarity(h_s, h_t, dim=-1, eps=1e-12)


def normalised_squared_error(h_s, h_t):
    """Eq. (6) after both rows were divided by their lengths, which is 2 (1 - cos) / d: the authors'
    code."""
    return one_minus_cosine(h_s, h_t) * 2 / h_s.shape[-1]


# The values of rep_loss. Those in kernels/layer_loss.py have a fused gradient as well.
DISTANCES = {'mse': squared_error, 'nmse': normalised_squared_error, 'cosine': one_minus_cosine}


def row_distance(h_s, h_t, kind='mse'):
    """Distance of each student row to its teacher row, (K, d) and (K, d) -> (K,). kind: a name in
    DISTANCES."""
    assert kind in DISTANCES, f'{kind!r} is not one of {list(DISTANCES)}'
    distance = DISTANCES[kind](h_s, h_t)
    shape = tuple(distance.shape)
    assert shape == h_s.shape[:-1], f'{kind!r} gives {shape}, not one number per row'
    return distance


def oprd_loss(h_s, h_t, weights, kind='mse'):
    """Eq. (6), OPRD-Vanilla: the mean over layers of sum_t w_t (distance at t); a scalar for autograd.

    h_s, h_t: lists of (K, d), one per layer; the teacher gets no gradient. weights: (K,).
    Slow on purpose: it keeps float32 copies of every layer alive until the backward. Training uses
    `layer_loss`.
    """
    # float32 at least: squares of bfloat16 differences would lose what they measure.
    dtype = torch.promote_types(h_s[0].dtype, torch.float32)
    total = 0.0
    for student_rows, teacher_rows in zip(h_s, h_t, strict=True):
        distance = row_distance(student_rows.to(dtype), teacher_rows.detach().to(dtype), kind)       # (K,)
        total = total + (weights * distance).sum()
    return total / len(h_s)


def drift_weights(weights, distance, answer):
    """Deal the weight of each answer to its positions in proportion to their distance, which is
    taken as constant: a position counts the more, the further the student has drifted from the
    teacher there.

    weights, distance (K,). answer (K,): which answer a position belongs to. -> (K,).
    """
    if len(answer) == 0:
        return weights
    distance = distance.clamp(min=0)         # 1 - cos of equal rows is a rounding error of either sign
    zeros = weights.new_zeros(int(answer.max()) + 1)                         # one number per answer
    answer_weight = zeros.index_add(0, answer, weights)
    answer_distance = zeros.index_add(0, answer, weights * distance)
    return answer_weight[answer] * weights * distance / answer_distance[answer].clamp(min=1e-30)


# ---- Eq. (6), fused: one layer while the student's forward runs ------------------------------------

def layer_rows_by_autograd(h, h_t, at, weights, kind):
    """What kernels.layer_rows computes, for any distance: h (N, d), h_t (K, d), at (K,) -> value
    (K,), cosine (K,); h_t is overwritten with w dvalue/dh_s. A row's value depends on its own state
    alone, so one backward of the sum gives the gradient of every row."""
    # The student's rows as a leaf of a small graph of their own.
    dtype = torch.promote_types(h.dtype, torch.float32)
    h_s = h.detach()[at].to(dtype).requires_grad_()                          # (K, d)
    target = h_t.to(dtype)
    with torch.enable_grad():
        value = row_distance(h_s, target, kind)                              # (K,)
        gradient, = torch.autograd.grad(value.sum(), h_s)

    # The teacher's rows are spent: their memory takes the gradient.
    cosine = F.cosine_similarity(h_s.detach(), target, dim=-1, eps=1e-12)
    h_t.copy_(gradient * weights.to(dtype)[:, None])
    return value.detach(), cosine


def fused_equals_readable(kind, device):
    """Does the fused gradient of a distance equal autograd's of the readable function, on eight
    random rows? Whoever edits a function in DISTANCES gets what was written, and not the old
    formula from a kernel."""
    # Rows of ordinary size, and weights of 1, so that nothing hides behind an eps.
    generator = torch.Generator().manual_seed(0)
    h, h_t = torch.randn(2, 8, 16, generator=generator).to(device)
    at = torch.arange(8, device=device)
    weights = torch.ones(8, device=device)
    fused_gradient = h_t.clone()
    readable_gradient = h_t.clone()
    # Both overwrite the teacher's rows with the gradient.
    fused_value, _ = kernels.layer_rows(h, fused_gradient, at, weights, kind)
    readable_value, _ = layer_rows_by_autograd(h, readable_gradient, at, weights, kind)
    return torch.allclose(fused_value, readable_value, rtol=1e-3, atol=1e-4) and torch.allclose(
        fused_gradient, readable_gradient, rtol=1e-3, atol=1e-4)


class LayerLoss(torch.autograd.Function):
    """One layer of Eq. (6) as an identity on h, which adds the loss's gradient to h's on the way
    back."""
    @staticmethod
    def forward(ctx, h, h_t, at, weights, kind, answer, fused):
        # answer is given for drift weights only. Those depend on the distance, so the kernel runs
        # with weights of 1, and its gradient is weighed afterwards.
        weights = weights.to(torch.promote_types(h.dtype, torch.float32))
        kernel_weights = weights if answer is None else torch.ones_like(weights)

        # The teacher's rows are not needed any more: from here on their memory holds dL/dh_s.
        rows = kernels.layer_rows if fused else layer_rows_by_autograd
        value, cosine = rows(h.flatten(0, 1), h_t, at, kernel_weights, kind)                 # (K,), (K,)
        loss_weights = weights
        if answer is not None:
            loss_weights = drift_weights(weights, value, answer)
            h_t.mul_(loss_weights[:, None])

        # The backward needs these rows, and of h only its shape.
        ctx.save_for_backward(h_t, at)
        ctx.like = h.shape, h.dtype, h.device
        ctx.set_materialize_grads(False)
        loss = (loss_weights * value).sum()
        mean_cosine = (weights * cosine).sum()
        ctx.mark_non_differentiable(mean_cosine)
        return h.view_as(h), loss, mean_cosine

    @staticmethod
    def backward(ctx, grad_h, grad_loss, _):
        if grad_loss is None:                # this layer's loss was not used
            return grad_h, *[None] * 6
        row_gradient, at = ctx.saved_tensors
        shape, dtype, device = ctx.like
        if grad_h is None:                   # the last layer: no gradient comes from above
            grad_h = torch.zeros(shape, dtype=dtype, device=device)
        # Not in place: autograd may hand the same grad_h to another branch of the residual stream.
        grad = grad_h.flatten(0, 1).index_add(0, at, (row_gradient * grad_loss).to(dtype))
        return grad.view(shape), *[None] * 6


def layer_loss(h, h_t, at, weights, kind='mse', answer=None, fused=None):
    """One layer's sum_t w_t (distance at t), with its gradient formed now -> (h, loss, cosine).

    h (B, T, d): the student's states after this layer. Go on with the returned h: its backward adds
    the gradient.
    h_t (K, d): the teacher's rows; *overwritten*. at (K,): flat positions in B * T. weights (K,).
    answer (K,): the answers' numbers, for drift weights; None = no drift weights. fused: use the kernel
    (None: if there is one for this kind), else autograd on the readable distance.
    loss: a scalar, differentiable as any other. cosine: the weighted mean cosine, a number to log.
    """
    assert kind in DISTANCES, f'{kind!r} is not one of {list(DISTANCES)}'
    fused = kind in FUSED if fused is None else fused
    return LayerLoss.apply(h, h_t, at, weights, kind, answer, fused)


# ---- Eqs. (14), (15): hidden states through a bridge -------------------------------------------------

def project_student(h_s, P_s, b_s, inside):
    """Student rows (K, d) through a bridge's student side -> (K, r). P_s (2, r, d) and b_s (2, r)
    hold one projector per class; inside (K,) says which class a row is of."""
    # Both projections in one product; then each row takes the one of its class.
    both = h_s @ P_s.flatten(0, 1).t() + b_s.flatten()                       # (K, 2 r)
    row = torch.arange(len(h_s), device=h_s.device)
    return both.view(len(h_s), 2, -1)[row, inside.long()]


def bridge_distance(z_s, z_t, normalise=True):
    """Eq. (14) of each row: ||z_s - z_t||^2 of projected states, (K, r) and (K, r) -> (K,).
    normalise: both are divided by their lengths first, as section 3.3.3 does in practice; then it
    is 2 (1 - cos)."""
    if normalise:
        z_s = F.normalize(z_s, dim=-1, eps=1e-12)
        z_t = F.normalize(z_t, dim=-1, eps=1e-12)
    return (z_s - z_t).square().sum(-1)


class BridgeLoss(torch.autograd.Function):
    """One layer of Eq. (15) as an identity on h, which adds the loss's gradient to h's on the way
    back. What is kept are r numbers per row, dL/dz; the gradient of the states is P_s' dL/dz."""
    @staticmethod
    def forward(ctx, h, z_t, at, weights, bridge_s, inside, normalise):
        P_s, b_s = bridge_s
        weights = weights.to(torch.promote_types(h.dtype, torch.float32))
        # The teacher's rows are not needed any more: from here on their memory holds dL/dz.
        value, cosine = kernels.bridge_rows(h.flatten(0, 1), z_t, at, weights, P_s, b_s, inside, normalise)
        # The backward needs r numbers per row and the frozen projector.
        ctx.save_for_backward(z_t, at, P_s, inside)
        ctx.like = h.shape, h.dtype, h.device
        ctx.set_materialize_grads(False)
        loss = (weights * value).sum()
        mean_cosine = (weights * cosine).sum()
        ctx.mark_non_differentiable(mean_cosine)
        return h.view_as(h), loss, mean_cosine

    @staticmethod
    def backward(ctx, grad_h, grad_loss, _):
        if grad_loss is None:                # this layer's loss was not used
            return grad_h, *[None] * 6
        row_gradient, at, P_s, inside = ctx.saved_tensors
        shape, dtype, device = ctx.like
        # A copy: autograd may hand the same grad_h to another branch of the residual stream.
        if grad_h is None:
            grad = torch.zeros(shape, dtype=dtype, device=device)
        else:
            grad = grad_h.clone(memory_format=torch.contiguous_format)
        kernels.bridge_back(grad.view(-1, shape[-1]), row_gradient, at, P_s, inside, grad_loss)
        return grad, *[None] * 6


def bridge_loss(h, z_t, at, weights, bridge_s, inside, normalise=True):
    """One layer of Eq. (15), sum_t w_t (bridge_distance at t), with its gradient formed now -> (h,
    loss, cosine).

    h (B, T, d), at (K,), weights (K,): as in layer_loss. z_t (K, r): the teacher's rows, already
    projected; *overwritten*. bridge_s: (P_s (2, r, d), b_s (2, r)), the frozen student side. inside
    (K,): classes.
    """
    return BridgeLoss.apply(h, z_t, at, weights, bridge_s, inside, normalise)


# ---- as the training loop uses them: made once, called for each layer ---------------------------------

class HiddenTerm:
    """Eq. (6) as a term of the training loss. drift: weigh each position by its own distance.

    fused: does the kernel's gradient run? Not for a distance that has no kernel, or whose function in
    DISTANCES was edited and says something else than its kernel.
    """
    def __init__(self, kind='mse', drift=False, device='cpu'):
        self.kind = kind
        self.drift = drift
        self.fused = kind in FUSED and fused_equals_readable(kind, device)

    def __call__(self, l, h, teacher_rows, rows):
        """The states h (B, T, d) of student layer l and the teacher's rows (K, d) -> (h, loss, cosine)."""
        answer = rows.answer if self.drift else None
        at = rows.at + rows.offset
        return layer_loss(h, teacher_rows, at, rows.weights, self.kind, answer, self.fused)

    def cosine(self, l, h_s, teacher_rows, inside):
        """The cosine of gathered rows (K, d) and (K, d) -> (K,), for the diagnosis."""
        return 1 - one_minus_cosine(h_s, teacher_rows)


class BridgeTerm:
    """Eq. (15) as a term of the training loss. There is no offset here: a bridge is fitted at the
    paper's positions, and preflight refuses position_offset=1 with it."""
    def __init__(self, bridge, normalise=True):
        self.bridge = bridge
        self.normalise = normalise

    def __call__(self, l, h, teacher_rows, rows):
        """The states h (B, T, d) of student layer l and the teacher's rows (K, r) -> (h, loss,
        cosine)."""
        bridge_s = self.bridge.P_s[l], self.bridge.b_s[l]
        return bridge_loss(h, teacher_rows, rows.at, rows.weights, bridge_s, rows.inside, self.normalise)

    def cosine(self, l, h_s, teacher_rows, inside):
        """The cosine of rows (K, d), projected, and (K, r) -> (K,), for the diagnosis."""
        z_s = project_student(h_s, self.bridge.P_s[l], self.bridge.b_s[l], inside)
        return 1 - one_minus_cosine(z_s, teacher_rows)
