"""
The output-space objectives, Eqs. (3)-(5): written down for autograd, and under the LM head a chunk of
rows at a time.
"""
import torch
import torch.nn.functional as F


def divergence(logp, logq, tail='renorm', direction='reverse'):
    """KL of each row over a set of outcomes, log-probabilities (K, k) and (K, k) -> (K,).

    direction: 'reverse' is KL(p || q), 'forward' KL(q || p). tail, what is done about outcomes left out:
    'renorm'  both are renormalised on what is there: Eq. (5). Identically 0 at k = 1.
    'weights' only the weights are, not the log-ratios (the authors' code).
    'drop'    nothing: sum of p (log p - log q), section 4.1.1; can be negative.
    'bucket'  nothing either: `on_support` has added the rest as one more outcome.
    """
    if tail == 'renorm':
        logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
    if direction == 'forward':
        logp, logq = logq, logp
    weights = logp.log_softmax(-1) if tail == 'weights' else logp
    return (weights.exp() * (logp - logq)).sum(-1)


def likeliest(logp, k):
    """The k likeliest tokens of each row, fewer if there are fewer, likeliest first: (K, k)."""
    return logp.topk(min(k, logp.shape[-1])).indices


def on_support(logp, logq, top_s, top_t, which='student', tail='renorm'):
    """Both models' log-probabilities (K, V) on the support S -> S (K, k or 2k), logp and logq there.

    S: the 'student's likeliest tokens top_s (K, k), the 'teacher's top_t, or their 'union', where a token
    that is in both counts at its first place; the second has no mass and no gradient. tail='bucket'
    adds a last column to both: all the mass outside S, summed over the tokens there (1 minus the mass
    inside would be rounding where the models are sure of themselves).
    """
    S = {'student': top_s, 'teacher': top_t, 'union': torch.cat([top_s, top_t], -1)}[which]
    both = [x.gather(-1, S) for x in (logp, logq)]
    if which == 'union':
        twice = F.pad((top_t[:, :, None] == top_s[:, None, :]).any(-1), (top_s.shape[-1], 0))
        both = [x.masked_fill(twice, NOTHING) for x in both]
    if tail == 'bucket':
        rest = [x.scatter(-1, S, NOTHING).logsumexp(-1, keepdim=True) for x in (logp, logq)]
        both = [torch.cat(pair, -1) for pair in zip(both, rest, strict=True)]
    return S, *both


NOTHING = -1e4                  # log of no mass at all: exp gives 0, and differences stay finite


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
        _, p_S, q_S = on_support(logp, logq, likeliest(logp, k), likeliest(logq, k), support, tail)
        return divergence(p_S, q_S, tail, direction)
    assert kind == 'sampled' and direction == 'reverse', f'{kind} {direction}'
    logp_y, logq_y = (x.gather(-1, y[:, None]).squeeze(-1) for x in (logp, logq))
    ratio = (logp_y - logq_y).detach()
    return ratio * (1 + logp_y - logp_y.detach())        # the ratio, with the reward's gradient


def overlap(top_s, top_t):
    """Share of the likeliest tokens (K, 16) that two models have in common (Figure 10) -> (K,)."""
    return (top_s[:, :, None] == top_t[:, None, :]).any(-1).float().mean(-1)


def to_go(x, answer):
    """Sum of x from each row to the last one of its answer; answer (K,) ascending -> (K,)."""
    ahead = F.pad(x.flip(0).cumsum(0).flip(0), (0, 1))                       # (K + 1,)
    return ahead[:-1] - ahead[torch.searchsorted(answer, answer, right=True)]


def dot(a, b):
    """Row by row, (K, V) and (K, V) -> (K,), without a third (K, V)."""
    return torch.einsum('kv,kv->k', a, b)


def log_probs(h, W, temperature):
    """Rows (C, d) under a head (V, d) -> log-probabilities (C, V) in fp32. On CUDA the product of bf16
    factors is kept in fp32 too: two models near each other differ by less than bf16 can say."""
    if h.is_cuda and h.dtype in (torch.bfloat16, torch.float16):
        z = torch.mm(h, W.t(), out_dtype=torch.float32)
    else:
        z = h @ W.t()
        z = z.to(torch.promote_types(z.dtype, torch.float32))
    z.div_(temperature)
    return z.sub_(z.logsumexp(-1, keepdim=True))


def rows_at_once(V, device):
    """How many rows a head loss takes at once, if nobody says: on CUDA as many, a power of two, as fill a
    quarter of the free memory with four (C, V) fp32 tensors, at most 4096; elsewhere 64."""
    if device.type != 'cuda':
        return 64
    free = torch.cuda.mem_get_info(device)[0]            # and what the allocator keeps for itself
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(4096, max(16, 1 << max(1, free // 4 // (16 * V)).bit_length() - 1))


def add_product(d_W, G, h, scale):
    """d_W (V, d) += scale G' h, with G (C, V) fp32 and h (C, d). Of bf16 rows on CUDA the factors are bf16
    and the sum fp32, as in `log_probs`: fp32 factors have no tensor cores. A slice of the vocabulary at a
    time, for there the product is a tensor of its own."""
    if not (G.is_cuda and h.dtype == torch.bfloat16):
        d_W.addmm_(G.t(), h.to(d_W.dtype), alpha=scale)
        return
    for part, g in zip(d_W.split(1 << 15), G.split(1 << 15, dim=1), strict=True):
        part.add_(torch.mm(g.t().to(h.dtype), h, out_dtype=torch.float32), alpha=scale)


class HeadLoss(torch.autograd.Function):
    """Eqs. (3)-(5) of rows under the LM head, a chunk of rows at a time, gradient formed as it goes: three
    (C, V) tensors live at once, four for forward KL, beside the head's own gradient."""
    @staticmethod
    def forward(ctx, h, W, h_t, W_t, y, w, answer, how):
        dtype = torch.promote_types(h.dtype, torch.float32)
        kind, v = how['kind'], how['vocab'] or W.shape[0]
        chunk = how['chunk'] or rows_at_once(v, h.device)
        w = w.to(dtype)
        d_h = torch.empty_like(h) if kind else None
        d_W = torch.zeros_like(W, dtype=dtype) if kind and ctx.needs_input_grad[1] else None
        D, ratio = w.new_zeros(len(h)), w.new_zeros(len(h))                  # (K,)
        stats = w.new_zeros(4, len(h))       # KL, entropy of p, entropy of q, overlap
        for at in reversed(range(0, len(h), chunk)):     # backwards: what is to come is known (to_go)
            rows = slice(at, at + chunk)
            logp = log_probs(h[rows], W[:v], how['temperature'])             # (C, V)
            logq = log_probs(h_t[rows], W_t[:v], how['teacher_temperature'])
            top_s, top_t = (likeliest(x, max(how['k'], 16)) for x in (logp, logq))
            S = logp_S = logq_S = None
            if kind == 'topk':
                S, logp_S, logq_S = on_support(logp, logq, top_s[:, :how['k']], top_t[:, :how['k']],
                                               how['support'], how['tail'])
            H_t = -dot(logq.exp(), logq)
            f = logq.neg_().add_(logp)                                       # log p - log q, in logq's memory
            p = logp.exp()
            KL, H_s = dot(p, f), -dot(p, logp)
            stats[:, rows] = torch.stack([KL, H_s, H_t, overlap(top_s[:, :16], top_t[:, :16]).to(dtype)])
            if not kind:
                continue
            if kind == 'full':
                D[rows], G = full_gradient(logp, p, f, KL, how['direction'])
                G.mul_(w[rows, None])
            else:
                if kind == 'topk':
                    D[rows], g, p_S, rest = topk_gradient(logp_S, logq_S, how['tail'], how['direction'])
                    g, rest = g * w[rows, None], rest * w[rows, None]
                else:
                    S, rest = y[rows, None], 0.0
                    p_S, D[rows] = p.gather(-1, S), f.gather(-1, S).squeeze(-1)
                    ratio[rows] = w[rows] * D[rows]
                    g = (to_go(ratio, answer) if how['future'] else ratio)[rows, None]
                    if how['baseline']:
                        g = g - w[rows, None] * KL[:, None]
                G = spread_gradient(p, S, g, p_S, rest)
            d_h[rows] = (G.to(W.dtype) @ W[:v]).div_(how['temperature'])
            if d_W is not None:
                add_product(d_W[:v], G, h[rows], 1 / how['temperature'])
            del logp, f, p, G
        ctx.grads = d_h, d_W
        ctx.set_materialize_grads(False)
        stats = torch.cat([w.sum()[None], stats @ w])
        ctx.mark_non_differentiable(stats)
        return (w * D).sum(), stats

    @staticmethod
    def backward(ctx, g_loss, _):
        d_h, d_W = ctx.grads
        del ctx.grads                        # scaled in place: a second backward would be wrong
        return d_h.mul_(g_loss), d_W if d_W is None else d_W.mul_(g_loss), *[None] * 6


def full_gradient(logp, p, f, KL, direction):
    """Eq. (4) and its gradient with respect to the logits, f = log p - log q (C, V) -> D (C,), and in p's
    memory (C, V): p (f - KL), or the other way round p - q."""
    if direction == 'reverse':
        return KL, p.mul_(f.sub_(KL[:, None]))
    q = (logp - f).exp_()                                                    # (C, V)
    return -dot(q, f), p.sub_(q)


def topk_gradient(logp_S, logq_S, tail, direction):
    """Eq. (5) and kin on (C, k): small enough for autograd -> D (C,), g = dD/dlog p on S, p on S, and for
    'bucket' the rest's dD/dlog r over its mass r, (C, 1)."""
    with torch.enable_grad():
        leaf = logp_S.detach().requires_grad_()
        D = divergence(leaf, logq_S, tail, direction)
        g, = torch.autograd.grad(D.sum(), leaf)
    p_S, rest = logp_S.exp(), torch.zeros_like(g[:, :1])
    if tail == 'bucket':
        g, p_S, rest = g[:, :-1], p_S[:, :-1], (g / p_S.clamp(min=1e-37))[:, -1:]
    return D.detach(), g, p_S, rest


def spread_gradient(p, S, g, p_S, rest):
    """g = dD/dlog p on S, and `rest` times p outside, through the softmax: g - p sum(g) -> (C, V), in p's
    memory. A token that is twice in S has g and p_S of 0 at one of its places."""
    outside = p.scatter_(-1, S, 0.0)
    total = g.sum(-1, keepdim=True) + rest * outside.sum(-1, keepdim=True)
    return outside.mul_(rest - total).scatter_add_(-1, S, g - p_S * total)


def opd_loss(h, W, h_t, W_t, y, w, answer=None, *, kind='full', k=16, support='student', tail='renorm',
             direction='reverse', temperature=1.0, teacher_temperature=1.0, future=False, baseline=False,
             vocab=None, chunk=0):
    """sum_t w_t (opd_rows at t), without logits of more than `chunk` rows -> (loss, stats).

    h (K, d), W (V, d): student rows and head. h_t (K, d_t), W_t (V_t, d_t): the teacher's. y (K,): the
    sampled tokens. w (K,): weights. vocab: ids from here on are padding; the softmax leaves them out,
    as the sampler does. kind=None: stats alone, no gradient. chunk: rows at once, 0: by the free memory.
    stats (5,): sum of w, then w-weighted sums of the exact KL(p || q), both entropies in nats, overlap.
    'sampled' only: future=True weighs grad log p(y_t) with the sum of the ratios from t to the end of
    its answer (row numbers `answer`, ascending), the gradient of the whole trajectory's KL: unbiased,
    and noisier; without it each token answers for itself alone. baseline=True subtracts the exact KL
    at t, the ratio's mean: less variance, the same expectation.
    """
    return HeadLoss.apply(h, W, h_t, W_t, y, w, answer, dict(
        kind=kind, k=k, support=support, tail=tail, direction=direction, temperature=temperature, vocab=vocab,
        teacher_temperature=teacher_temperature, future=future, baseline=baseline, chunk=chunk))


