"""
The objective, one function per equation, and which layers and positions it reads.

`oprd_loss` is Eq. (6) written down, for autograd. `layer_loss` is the same number taken one layer at
a time inside the student's forward: the gradient rows are formed at once in fp32 and kept where the
teacher's rows lay, so nothing else of a layer stays alive for the loss. A test holds them equal.

Letters: B rows, T tokens, K supervised positions (over all rows), L layers, d width.
"""
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
    of each answer, rounded, at least one position).
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
        assert which == 'all', which
    return m


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
    def forward(ctx, h, h_t, at, w, kind):
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
        w = w.to(dtype)[:, None]
        h_t.copy_(grad.mul_(w))              # the teacher's rows are spent: their memory holds dL/ds
        ctx.save_for_backward(h_t, at)
        ctx.like = h.shape, h.dtype, h.device
        ctx.set_materialize_grads(False)
        loss, cos = (w * value).sum(), (w * cos).sum()
        ctx.mark_non_differentiable(cos)
        return h.view_as(h), loss, cos

    @staticmethod
    def backward(ctx, g_h, g_loss, _):
        if g_loss is None:
            return g_h, None, None, None, None
        grad, at = ctx.saved_tensors
        shape, dtype, device = ctx.like
        if g_h is None:                      # the last layer: nothing comes from above
            g_h = torch.zeros(shape, dtype=dtype, device=device)
        # not in place: autograd may hand the same g_h to another branch of the residual stream
        g = g_h.flatten(0, 1).index_add(0, at, (grad * g_loss).to(dtype))
        return g.view(shape), None, None, None, None


def layer_loss(h, h_t, at, w, kind='mse'):
    """One layer's sum_t w_t (distance at t), its gradient formed now -> (h, loss, cos).

    h: student states (B, T, d) of the layer; go on with the returned h, whose backward adds the
    gradient. h_t: teacher rows (K, d); *overwritten*. at: flat positions (K,) of (B*T,). w: (K,).
    loss: scalar, differentiable as any other. cos: weighted mean cosine, a number to log.
    """
    return LayerLoss.apply(h, h_t, at, w, kind)
