"""
Output-space distillation across tokenizers: KL between two models' distributions of the next *byte*.

Two vocabularies share no tokens, but both spell bytes. Outcomes are the 256 bytes and the end of the
answer. The student's probability of a byte is the sum over its tokens that begin with it. The teacher
stands at its floor state (teacher.py), perhaps inside a token of its own that the student has written
in part, so its probability is conditioned on those bytes: among its tokens that begin with them, the
share that goes on with this one. The vocabulary is sorted once, so what begins alike lies together.

Simpler than usual: a token that ends exactly where the student stands is left out, as are special tokens
that do not end an answer; both sides are renormalised over the rest. Where the teacher's tokens do not go
on from the bytes written (text it would never spell so), the position has no loss.

Letters: C rows of a chunk, K rows, d width, V vocabulary, E = 257 outcomes; p student, q teacher.
"""
from bisect import bisect_left
from functools import lru_cache

import torch

from losses import NOTHING, divergence, dot, log_probs

END, NONE = 256, 257            # outcomes: the end of the answer; a token that has none
FLOOR = 1e-8                    # least probability of an outcome to the teacher: log 0 would be no loss


class ByteTable:
    """Which outcome each token of a vocabulary stands for, after any bytes already written.

    pieces: the bytes of each id. stops: ids that end an answer. count: rows of the model's head.
    """
    def __init__(self, pieces, stops, count, device='cpu'):
        self.device = device
        self.sorted = sorted((word, i) for i, word in enumerate(pieces[:count]) if word and i not in stops)
        self.first = torch.full((count,), NONE)
        for word, i in self.sorted:
            self.first[i] = word[0]
        self.first[list(stops)] = END
        self.first = self.first.to(device)
        self.after = lru_cache(1 << 16)(self.after)

    def after(self, written):
        """Tokens that begin with the bytes `written` and go on -> their ids (n,), their next bytes (n,)."""
        lo = bisect_left(self.sorted, (written,))
        words = []
        for word, i in self.sorted[lo:]:
            if not word.startswith(written):
                break
            if len(word) > len(written):
                words.append((i, word[len(written)]))
        ids, nexts = zip(*words, strict=True) if words else ((), ())
        return tuple(torch.tensor(x, dtype=torch.long, device=self.device) for x in (ids, nexts))

    def outcomes(self, p, written):
        """Probabilities of tokens (C, V), the bytes written in each row -> of outcomes (C, 257), which
        need not sum to 1."""
        out = p.new_zeros(len(p), NONE + 1).index_add_(1, self.first, p)
        for row, bytes_ in enumerate(written):
            if bytes_:
                ids, nexts = self.after(bytes_)
                out[row] = p.new_zeros(NONE + 1).index_add_(0, nexts, p[row, ids])
        return out[:, :NONE]


def byte_rows(p, Q, first, direction='reverse'):
    """KL over the next byte, written down for autograd: student's token probabilities p (K, V), the
    teacher's outcomes Q (K, 257), the student's table `first` (V,) -> (K,)."""
    P = p.new_zeros(len(p), NONE + 1).index_add(1, first, p)[:, :NONE]
    return divergence(*logs(P, Q), 'renorm', direction)


def logs(P, Q):
    """Logs of both, the teacher's not below FLOOR; outcomes that no token of the student stands for are
    left out on both sides."""
    never = P <= 0
    Q = (Q / Q.sum(-1, keepdim=True).clamp(min=1e-37)).clamp(min=FLOOR)
    return P.clamp(min=1e-37).log().masked_fill(never, NOTHING), Q.log().masked_fill(never, NOTHING)


class ByteLoss(torch.autograd.Function):
    """KL over the next byte under both heads, a chunk of rows at a time, gradient formed as it goes."""
    @staticmethod
    def forward(ctx, h, W, h_t, W_t, w, written, how):
        dtype = torch.promote_types(h.dtype, torch.float32)
        table_s, table_t, chunk, learn = how['table_s'], how['table_t'], how['chunk'], how['learn']
        V, w = len(table_s.first), w.to(dtype)
        d_h = torch.empty_like(h) if learn else None
        d_W = torch.zeros_like(W, dtype=dtype) if learn and ctx.needs_input_grad[1] else None
        stats = w.new_zeros(4, len(h))       # KL, entropy of P, entropy of Q, -
        for at in range(0, len(h), chunk):
            rows = slice(at, at + chunk)
            q = log_probs(h_t[rows], W_t[:len(table_t.first)], how['teacher_temperature']).exp_()
            Q = table_t.outcomes(q, written[rows])                           # (C, E)
            del q
            p = log_probs(h[rows], W[:V], how['temperature']).exp_()         # (C, V)
            P = table_s.outcomes(p, [b''] * len(p))
            there = Q.sum(-1) > 0            # the teacher's tokens go on from here
            logP, logQ = logs(P, Q)
            with torch.enable_grad():        # (C, E): small enough for autograd
                leaf = logP.requires_grad_()
                D = divergence(leaf, logQ, 'renorm', how['direction']) * there
                g, = torch.autograd.grad(D.sum(), leaf)
            logP, logQ = (x.detach().log_softmax(-1) for x in (leaf, logQ))
            entropies = -dot(logP.exp(), logP), -dot(logQ.exp(), logQ)
            stats[:3, rows] = torch.stack([D.detach(), *entropies]) * there
            if not learn:
                continue
            # each token of an outcome has its share of dD/dlog P: p_v / P times it
            share = torch.cat([g / P.clamp(min=1e-37), g.new_zeros(len(g), 1)], 1)           # (C, E + 1)
            G = p.mul_(share[:, table_s.first].sub_(g.sum(-1, keepdim=True))).mul_(w[rows, None])
            d_h[rows] = (G.to(W.dtype) @ W[:V]).div_(how['temperature'])
            if d_W is not None:
                d_W[:V].addmm_(G.t(), h[rows].to(dtype), alpha=1 / how['temperature'])
        ctx.grads = d_h, d_W
        ctx.set_materialize_grads(False)
        stats = torch.cat([w.sum()[None], stats @ w])
        ctx.mark_non_differentiable(stats)
        return stats[1].clone(), stats

    @staticmethod
    def backward(ctx, g_loss, _):
        d_h, d_W = ctx.grads
        del ctx.grads                        # scaled in place: a second backward would be wrong
        return d_h.mul_(g_loss), d_W if d_W is None else d_W.mul_(g_loss), *[None] * 5


def byte_loss(h, W, h_t, W_t, y, w, answer=None, written=None, *, table_s, table_t, direction='reverse',
              temperature=1.0, teacher_temperature=1.0, chunk=64, kind='byte'):
    """sum_t w_t KL(P_t || Q_t) over the next byte -> (loss, stats (5,)); called as losses.opd_loss is.

    h (K, d), W (V, d), h_t (K, d_t), W_t (V_t, d_t): rows and heads. w (K,): weights. written: for each
    row the bytes that the student has written since the teacher's state (b'' where both have read the
    same; None: everywhere). table_s, table_t: ByteTables. kind=None: stats alone. y and answer are not
    looked at.
    stats: sum of w, then w-weighted sums of the KL, both entropies over the outcomes (nats), and 0.
    """
    return ByteLoss.apply(h, W, h_t, W_t, w, written or [b''] * len(h), dict(
        table_s=table_s, table_t=table_t, direction=direction, temperature=temperature,
        teacher_temperature=teacher_temperature, chunk=chunk, learn=kind is not None))
