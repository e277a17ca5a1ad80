"""
Output-space distillation across tokenizers: KL between two models' distributions of the next *byte*.

Two vocabularies share no tokens, but both spell bytes. Outcomes are the 256 bytes, the end of the answer, and
anything else. The student's probability of a byte is the sum over its tokens that begin with it.

What the teacher thinks comes next must not depend on what the student then wrote, or a slip justifies
itself: where a teacher token is cut off, the text has already told it what follows. So one state before the
teacher's last token w (whole, or as far as it is written) is asked as well:

    P(c) = [ sum of q(tokens that begin with w and go on with c)  +  q(w) * q'(c) ] / all of that

with q there and q', the distribution after w, here. Inside a token (class 1) no state has read w; then q(w)
is the probability of anything but the bytes that go on, and the student's outcomes are put together likewise.

Simpler than usual: only the last token is looked at; the same text in other tokens is not. Where the
teacher's tokens neither go on from w nor end there (text it would never spell so) inside a token, the
position has no loss. The vocabulary is sorted once, so what begins alike lies together.

Letters: C rows of a chunk, K rows, d width, V vocabulary, E = 258 outcomes; p student, q teacher.
"""
from bisect import bisect_left
from functools import lru_cache

import torch

from output_losses import NOTHING, add_product, divergence, dot, log_probs, rows_at_once

END, ELSE, E = 256, 257, 258    # outcomes: the end of the answer; anything that no byte or end stands for
FLOOR = 1e-8                    # least probability of an outcome to the teacher: log 0 would be no loss


class ByteTable:
    """Which outcome each token of a vocabulary stands for, after any bytes already written.

    pieces: the bytes of each id. stops: ids that end an answer. count: rows of the model's head.
    """
    def __init__(self, pieces, stops, count, device='cpu'):
        self.device = device
        self.sorted = sorted((word, i) for i, word in enumerate(pieces[:count]) if word and i not in stops)
        self.first = torch.full((count,), ELSE)
        for word, i in self.sorted:
            self.first[i] = word[0]
        self.first[list(stops)] = END
        self.first = self.first.to(device)
        self.after = lru_cache(1 << 16)(self.after)

    def after(self, written):
        """Tokens that begin with the bytes `written`: ids of those that go on (n,), their next bytes (n,),
        ids of those that end there (m,)."""
        going, ending = [], []
        for word, i in self.sorted[bisect_left(self.sorted, (written,)):] if written else ():
            if not word.startswith(written):
                break
            if len(word) > len(written):
                going.append((i, word[len(written)]))
            else:
                ending.append(i)
        ids, nexts = zip(*going, strict=True) if going else ((), ())
        return tuple(torch.tensor(x, dtype=torch.long, device=self.device) for x in (ids, nexts, ending))

    def firsts(self, p):
        """Probabilities of tokens (C, V) -> of outcomes (C, E), nothing being written."""
        return p.new_zeros(len(p), E).index_add(1, self.first, p)

    def outcomes(self, before, after, written, inside):
        """The teacher's outcomes: its tokens' probabilities before the last token (C, V) and after it (C, V),
        the bytes of it that are written, class -> Q (C, E), which sums to 1, or to 0 where nothing is known;
        told (C, E): the outcomes that a row tells apart, the others being ELSE."""
        parts = [self.after(w) for w in written]

        def cat(k):
            """Rows and values of the k-th part of all rows."""
            sizes = torch.tensor([len(part[k]) for part in parts], device=self.device)
            return torch.arange(len(parts), device=self.device).repeat_interleave(sizes), torch.cat(
                [part[k] for part in parts])
        (row, ids), (_, nexts), (at, ending) = cat(0), cat(1), cat(2)
        on = before.new_zeros(len(before), E).index_put_((row, nexts), before[row, ids], accumulate=True)
        ends = before.new_zeros(len(before)).index_put_((at,), before[at, ending], accumulate=True)[:, None]
        told = torch.zeros_like(on, dtype=torch.bool).index_put_((row, nexts), torch.ones_like(row).bool())
        here = torch.where(on.sum(-1, keepdim=True) > 0, on + ends * self.firsts(after), self.firsts(after))
        on[:, ELSE] = torch.where(told.any(-1), ends[:, 0], 0.0)
        told[:, ELSE] = True
        inside = inside[:, None]
        Q = torch.where(inside, on, here)
        return Q / Q.sum(-1, keepdim=True).clamp(min=1e-37), told | ~inside


def together(P, told):
    """Outcomes (C, E) with those that are not told apart put into ELSE."""
    kept = P * told
    rest = torch.zeros_like(kept)
    rest[:, ELSE] = (P - kept).sum(-1)
    return kept + rest


def byte_rows(p, Q, told, first, direction='reverse'):
    """KL over the next byte, written down for autograd: student's token probabilities p (K, V), the
    teacher's outcomes Q (K, E) and which are told apart, the student's table `first` (V,) -> (K,)."""
    P = together(p.new_zeros(len(p), E).index_add(1, first, p), told)
    return divergence(*logs(P, Q), 'renorm', direction)


def logs(P, Q):
    """Logs of both, the teacher's not below FLOOR; outcomes that no token of the student stands for are
    left out on both sides."""
    never = P <= 0
    return (P.clamp(min=1e-37).log().masked_fill(never, NOTHING),
            Q.clamp(min=FLOOR).log().masked_fill(never, NOTHING))


class ByteLoss(torch.autograd.Function):
    """KL over the next byte under both heads, a chunk of rows at a time, gradient formed as it goes."""
    @staticmethod
    def forward(ctx, h, W, h_t, W_t, w, written, inside, how):
        dtype = torch.promote_types(h.dtype, torch.float32)
        table_s, table_t, chunk, learn = how['table_s'], how['table_t'], how['chunk'], how['learn']
        V, w = len(table_s.first), w.to(dtype)
        d_h = torch.empty_like(h) if learn else None
        d_W = torch.zeros_like(W, dtype=dtype) if learn and ctx.needs_input_grad[1] else None
        stats = w.new_zeros(4, len(h))       # KL, entropy of P, entropy of Q, -
        for at in range(0, len(h), chunk):
            rows = slice(at, at + chunk)
            after, before = (log_probs(x[rows], W_t[:len(table_t.first)], how['teacher_temperature']).exp_()
                             for x in h_t.split(len(h)))                     # (C, V_t)
            Q, told = table_t.outcomes(before, after, written[rows], inside[rows])       # (C, E)
            del after, before
            p = log_probs(h[rows], W[:V], how['temperature']).exp_()         # (C, V)
            P = together(table_s.firsts(p), told)
            there = Q.sum(-1) > 0
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
            share = g / P.clamp(min=1e-37)
            share = torch.where(told, share, share[:, ELSE:])                # (C, E)
            G = p.mul_(share[:, table_s.first].sub_(g.sum(-1, keepdim=True))).mul_(w[rows, None])
            d_h[rows] = (G.to(W.dtype) @ W[:V]).div_(how['temperature'])
            if d_W is not None:
                add_product(d_W[:V], G, h[rows], 1 / how['temperature'])
        ctx.grads = d_h, d_W
        ctx.set_materialize_grads(False)
        stats = torch.cat([w.sum()[None], stats @ w])
        ctx.mark_non_differentiable(stats)
        return stats[1].clone(), stats

    @staticmethod
    def backward(ctx, g_loss, _):
        d_h, d_W = ctx.grads
        del ctx.grads                        # scaled in place: a second backward would be wrong
        return d_h.mul_(g_loss), d_W if d_W is None else d_W.mul_(g_loss), *[None] * 6


def byte_loss(h, W, h_t, W_t, y, w, answer=None, written=None, inside=None, *, table_s, table_t,
              direction='reverse', temperature=1.0, teacher_temperature=1.0, chunk=0, kind='byte'):
    """sum_t w_t KL(P_t || Q_t) over the next byte -> (loss, stats (5,)); called as losses.opd_loss is.

    h (K, d), W (V, d), W_t (V_t, d_t): rows and heads. h_t (2K, d_t): the teacher's floor states, then those
    before its last token. written: for each row the bytes of that token which are written. inside (K,):
    class 1, not all of them are. Or h_t (K, d_t), where both write the same tokens. w (K,): weights. table_s,
    table_t: ByteTables. kind=None: stats alone. y and answer are not looked at.
    stats: sum of w, then w-weighted sums of the KL, both entropies over the outcomes (nats), and 0.
    """
    if written is None:
        h_t, written = torch.cat([h_t, h_t]), [b''] * len(h)
        inside = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    return ByteLoss.apply(h, W, h_t, W_t, w, written, inside, dict(
        table_s=table_s, table_t=table_t, direction=direction, temperature=temperature,
        teacher_temperature=teacher_temperature,
        chunk=chunk or rows_at_once(max(W.shape[0], 2 * W_t.shape[0]), h.device), learn=kind is not None))
