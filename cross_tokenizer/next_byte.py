"""
Output-space distillation between two different tokenizers: compare distributions over the next BYTE.

Two vocabularies share no tokens, but both spell bytes. The outcomes are the 256 bytes, the end of
the answer, and anything else (END, ELSE). The student's probability of a byte is the sum over its
tokens that begin with it.

The teacher's is computed likewise, but the student may stand in the middle of a teacher token.
Example: the teacher has the token `7=`, and the text so far is `7`. Two teacher states can say what
follows:

    the state before `7`:              it knows how likely `7`, `7=` and `72` were, so it can say how
                                       likely `=` is after `7`
    the state after a lone token `7`:  in its training `=` never followed here, because `7=` is one
                                       token

We ask the first, and condition on the bytes w that are already written. If we asked the second only
when the student happened to cut there, the student's own mistake would make itself look right: on
the toy the accuracy fell to 0. With q the distribution before w, and q' the distribution after the
token w:

    P(c) = [ sum of q(tokens that begin with w and go on with byte c)  +  q(w) * q'(c) ] / Z

where Z makes it sum to 1.

Inside a teacher token no state has read w, so q' is unknown. There q(w) goes to ELSE, with every
byte that no teacher token continues with, and the student's outcomes are put together in the same
way.

If no teacher token continues what is written inside a token, the teacher would never spell the text
this way, and the position has no loss. Simpler than possible: only the teacher's last token is
looked at, and not the other ways to cut the text into tokens before it.

Letters: C rows of a chunk, K rows, d width, V vocabulary, E = 258 outcomes;
         p student, q teacher (tokens); P student, Q teacher (outcomes).
"""
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import torch

from output_losses import LOG_ZERO, divergence, log_probs, row_dot

END, ELSE, E = 256, 257, 258    # outcomes: the end of the answer; anything that no byte or end stands for
FLOOR = 1e-8                    # least probability of an outcome to the teacher: log 0 would be no loss


class ByteTable:
    """Which outcome each token of a vocabulary stands for, after any bytes already written.

    pieces: the bytes of each id. stops: the ids that end an answer. count: rows of the model's head.
    The vocabulary is sorted by bytes once, so that all tokens that begin alike lie together.
    """
    def __init__(self, pieces, stops, count, device='cpu'):
        self.device = device
        self.sorted = sorted((word, i) for i, word in enumerate(pieces[:count]) if word and i not in stops)
        first_byte = torch.full((count,), ELSE)
        for word, i in self.sorted:
            first_byte[i] = word[0]
        first_byte[list(stops)] = END
        self.first = first_byte.to(device)                                   # (V,) outcome of each token
        self.after = lru_cache(1 << 16)(self.after)

    def after(self, written):
        """Tokens that begin with the bytes `written` -> ids of those that go on (n,), the byte each
        goes on with (n,), ids of those that end there (m,)."""
        going_on = []
        next_bytes = []
        ending = []
        # Words that begin alike lie together, so the search stops at the first that does not.
        first = bisect_left(self.sorted, (written,)) if written else len(self.sorted)
        for word, i in self.sorted[first:]:
            if not word.startswith(written):
                break
            if len(word) > len(written):
                going_on.append(i)
                next_bytes.append(word[len(written)])
            else:
                ending.append(i)
        return tuple(torch.tensor(ids, dtype=torch.long, device=self.device)
                     for ids in (going_on, next_bytes, ending))

    def first_outcomes(self, p):
        """Probabilities of tokens (C, V) -> of outcomes (C, E), where nothing of the next token is
        written."""
        return p.new_zeros(len(p), E).index_add(1, self.first, p)

    def outcomes(self, before, after, written, inside):
        """The teacher's distribution over outcomes, given the bytes of its last token that are written.

        before, after (C, V): token probabilities at the state before its last token, and at the
        state after it.
        written: [C] bytes. inside (C,): the student stands inside that token.
        -> Q (C, E), whose rows sum to 1, or to 0 where nothing is known; told (C, E): the outcomes
        that a row tells apart, the others being part of ELSE.
        """
        parts = [self.after(word) for word in written]
        row, ids = self.with_rows([going_on for going_on, _, _ in parts])
        _, next_bytes = self.with_rows([next_bytes for _, next_bytes, _ in parts])
        ending_row, ending = self.with_rows([ending for _, _, ending in parts])

        # q of the tokens that go on, by the byte they go on with; and q(w).
        goes_on = before.new_zeros(len(before), E)                           # (C, E)
        goes_on.index_put_((row, next_bytes), before[row, ids], accumulate=True)
        ends_here = before.new_zeros(len(before))                            # (C,)
        ends_here.index_put_((ending_row,), before[ending_row, ending], accumulate=True)
        ends_here = ends_here[:, None]
        told = torch.zeros_like(goes_on, dtype=torch.bool)
        told.index_put_((row, next_bytes), torch.ones_like(row).bool())

        # Outside a token: the formula of the header. Where no token goes on from w, it is q' alone.
        first = self.first_outcomes(after)
        outside = torch.where(goes_on.sum(-1, keepdim=True) > 0, goes_on + ends_here * first, first)

        # Inside a token: q(w) is the probability of anything but the bytes that go on.
        goes_on[:, ELSE] = torch.where(told.any(-1), ends_here[:, 0], 0.0)
        told[:, ELSE] = True
        inside = inside[:, None]
        Q = torch.where(inside, goes_on, outside)
        return Q / Q.sum(-1, keepdim=True).clamp(min=1e-37), told | ~inside

    def with_rows(self, tensors):
        """One tensor per row -> the row of every entry, and all entries one after the other."""
        sizes = torch.tensor([len(entries) for entries in tensors], device=self.device)
        rows = torch.arange(len(tensors), device=self.device).repeat_interleave(sizes)
        return rows, torch.cat(tensors)


def merge_untold(P, told):
    """Outcomes (C, E), with those that are not told apart put together into ELSE."""
    kept = P * told
    rest = torch.zeros_like(kept)
    rest[:, ELSE] = (P - kept).sum(-1)
    return kept + rest


def outcome_logs(P, Q):
    """Outcomes (C, E) -> log P, log Q. The teacher's are not below log FLOOR. Outcomes that no
    token of the student stands for are left out on both sides."""
    impossible = P <= 0
    logP = P.clamp(min=1e-37).log().masked_fill(impossible, LOG_ZERO)
    logQ = Q.clamp(min=FLOOR).log().masked_fill(impossible, LOG_ZERO)
    return logP, logQ


def byte_rows(p, Q, told, first, direction='reverse'):
    """KL over the next byte written down, for autograd: the student's token probabilities p (K, V),
    the teacher's outcomes Q (K, E) and which of them are told apart, the student's table `first`
    (V,) -> (K,)."""
    P = merge_untold(p.new_zeros(len(p), E).index_add(1, first, p), told)
    return divergence(*outcome_logs(P, Q), 'renorm', direction)


@dataclass
class NextByte:
    """KL over the next byte as an objective under the LM head (output_losses.HeadLoss); tables:
    ByteTables."""
    student_table: ByteTable
    teacher_table: ByteTable
    direction: str = 'reverse'
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    chunk: int = 0

    @property
    def vocab(self):
        """Rows of the student's head that stand for tokens."""
        return len(self.student_table.first)

    def teacher_positions(self, rows):
        """The teacher's state at each position, then the state before its last token: (2K,). Where
        the student is inside a token, and where no token is written, both are the same state."""
        at = rows.teacher_at
        if rows.written is None:             # one vocabulary: nothing is ever half written
            return torch.cat([at, at])
        has_token = torch.tensor([bool(word) for word in rows.written], device=at.device) & ~rows.inside
        return torch.cat([at, at - has_token.long()])

    def compare(self, logp, batch, piece):
        """log p (C, V) of a chunk, *overwritten* -> p (C, V); P, Q, told (C, E)."""
        # The teacher's states come in pairs: at the position, and before its last token.
        K = len(batch.weights)
        W_t = batch.teacher_W[:len(self.teacher_table.first)]
        written = [b''] * K if batch.written is None else batch.written
        after_h, before_h = batch.teacher_h.split(K)
        after = log_probs(after_h[piece], W_t, self.teacher_temperature).exp_()               # (C, V_t)
        before = log_probs(before_h[piece], W_t, self.teacher_temperature).exp_()
        Q, told = self.teacher_table.outcomes(before, after, written[piece], batch.inside[piece])
        # Where the teacher cannot tell bytes apart, the student's are put together as well.
        p = logp.exp_()
        P = merge_untold(self.student_table.first_outcomes(p), told)
        return p, P, Q, told

    def entropies(self, D, logP, logQ, known):
        """Statistics of a chunk (4, C): the KL, both entropies over the outcomes in nats, and 0."""
        logP = logP.log_softmax(-1)
        logQ = logQ.log_softmax(-1)
        entropy_p = -row_dot(logP.exp(), logP)
        entropy_q = -row_dot(logQ.exp(), logQ)
        return torch.stack([D, entropy_p, entropy_q, torch.zeros_like(D)]) * known

    def statistics(self, logp, batch, piece):
        """Statistics of a chunk without a gradient; see `entropies`."""
        _, P, Q, _ = self.compare(logp, batch, piece)
        known = Q.sum(-1) > 0
        logP, logQ = outcome_logs(P, Q)
        D = divergence(logP, logQ, 'renorm', self.direction) * known
        return self.entropies(D, logP, logQ, known)

    def loss_and_gradient(self, logp, batch, piece):
        """log p (C, V) -> D (C,), the gradient of w D with respect to the logits (C, V), statistics
        (4, C)."""
        p, P, Q, told = self.compare(logp, batch, piece)
        known = Q.sum(-1) > 0
        logP, logQ = outcome_logs(P, Q)

        # (C, E) is small enough for autograd: g = dD/dlog P.
        with torch.enable_grad():
            leaf = logP.requires_grad_()
            D = divergence(leaf, logQ, 'renorm', self.direction) * known
            g, = torch.autograd.grad(D.sum(), leaf)
        D = D.detach()
        statistics = self.entropies(D, leaf.detach(), logQ, known)

        # Each token has its share of its outcome: p_v / P times dD/dlog P. Then through the softmax.
        share = g / P.clamp(min=1e-37)
        share = torch.where(told, share, share[:, ELSE:])                    # (C, E)
        centred = share[:, self.student_table.first].sub_(g.sum(-1, keepdim=True))           # (C, V)
        G = p.mul_(centred).mul_(batch.weights[piece, None])
        return D, G, statistics
