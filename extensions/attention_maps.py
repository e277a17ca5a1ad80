"""
Attention maps as a further term of the loss: the student's heads shall look where the teacher's heads look.

At a supervised position a head weighs the keys up to that position: its attention map, a distribution. The
term adds up, over the supervised rows r with the weights w_r of the other terms,

    w_r * mean over layers and heads of KL(teacher's map || student's map)

The maps of a layer would be B x H x T x T numbers. They never exist: the rows are taken in pieces, and of a
layer the gradients of its queries and keys alone are kept until the backward.

    Model.trunk -> AttentionMaps.keep, in each block of the teacher: its queries and keys
                -> AttentionMaps.__call__, in each block of the student: loss and gradients, piece by piece
    step.take_loss_at_layer -> AttentionMaps.loss, after the block: the loss joins the others

Simpler than usual: there is no kernel. The gradient of a piece is autograd's of `attention_distance`, so
whoever edits that function trains what was written. With recomputed blocks (checkpointing=True) the pieces
are computed twice.

What it does not do: another vocabulary or another prompt for the teacher (the keys would be other tokens),
models whose heads have other numbers (a list of heads that both have is fine), torch.compile.

    python distill.py configs/toy.py attention_weight=1 attention_layers=all      CPU, or one GPU
    torchrun --nproc_per_node=8 distill.py configs/toy.py attention_weight=1      eight GPUs, or 8 CPU ranks

Letters: B answers, T tokens, K supervised positions, H heads that are compared, R rows of a piece, T' keys
         that they see, G key heads of the model, e width of a head.
"""
import math

import torch

from losses import layer_set, teacher_layer

# The most logits (H x R x T') of a piece. Autograd keeps six tensors of so many numbers: 0.4 GB in float32. For
# 12 heads and 16,384 keys a piece has 85 rows, and its products are still limited by arithmetic.
LOGITS = 2**24


# ---- the definition -------------------------------------------------------------------------------

def log_attention(q, k, column):
    """Logarithms of the attention of R rows of one sequence. q (H, R, e): their rotated queries; k (H, T', e):
    rotated keys; column (R,): where the rows are. -> (H, R, T')."""
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])                  # (H, R, T')

    # Keys behind a row have no attention. The least number and not -inf: a difference of two is then 0.
    later = torch.arange(k.shape[1], device=k.device) > column[:, None]      # (R, T')
    return logits.masked_fill(later, torch.finfo(logits.dtype).min).log_softmax(-1)


def attention_distance(q_s, k_s, q_t, k_t, column):
    """KL(teacher's map || student's map) of each row, the mean over heads -> (R,). Arguments as for
    `log_attention`, of student and teacher."""
    log_s = log_attention(q_s, k_s, column)                                  # (H, R, T')
    log_t = log_attention(q_t, k_t, column)                                  # (H, R, T')
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean(0)


# ---- in pieces, with the gradient ------------------------------------------------------------------

def cut_rows(at, T, heads):
    """Flat positions at (K,) of sequences of T tokens, ascending -> [(sequence, first row, end, keys), ...]:
    pieces of rows of one sequence. A piece has at most LOGITS logits, or a single row.

    Example: one head, T = 10, at = [3, 4, 17, 18, 19] and LOGITS = 20 give (0, 0, 2, 5), (1, 2, 4, 9) and
    (1, 4, 5, 10): three rows of the second sequence would have 3 x 10 logits.
    """
    places = [divmod(position, T) for position in at.tolist()]
    pieces = []
    first = 0
    for row, (sequence, column) in enumerate(places):
        # Would this row make the piece too large, or is it of another sequence?
        logits = heads * (row + 1 - first) * (column + 1)
        if row > first and (sequence != places[first][0] or logits > LOGITS):
            pieces.append((places[first][0], first, row, places[row - 1][1] + 1))
            first = row
    if places:
        pieces.append((places[first][0], first, len(places), places[-1][1] + 1))
    return pieces


def loss_and_gradients(student, teacher, weights, column, pieces):
    """The weighted sum of `attention_distance` over all rows of a layer -> loss, and its gradients with
    respect to the student's queries (H, K, e) and keys (B, G, T, e).

    student, teacher: LayerHeads of the layer. weights, column (K,). pieces: from `cut_rows`.
    """
    dtype = torch.promote_types(student.q.dtype, torch.float32)
    loss = torch.zeros((), dtype=dtype, device=column.device)
    grad_q = torch.zeros_like(student.q, dtype=dtype)                        # (H, K, e)
    grad_k = torch.zeros_like(student.k, dtype=dtype)                        # (B, G, T, e)
    for sequence, first, end, keys in pieces:
        # The rows of the piece, and all keys that one of them sees, as leaves of a small graph.
        q_s, k_s = (x.requires_grad_() for x in student.piece(sequence, first, end, keys, dtype))
        q_t, k_t = teacher.piece(sequence, first, end, keys, dtype)
        with torch.enable_grad():
            k_s_of_heads = k_s[student.key_heads]                            # (H, T', e)
            distance = attention_distance(q_s, k_s_of_heads, q_t, k_t[teacher.key_heads], column[first:end])
            piece_loss = (weights[first:end] * distance).sum()
        piece_grad_q, piece_grad_k = torch.autograd.grad(piece_loss, (q_s, k_s))

        # Every row is in one piece, but a key is seen by the rows of many.
        loss += piece_loss.detach()
        grad_q[:, first:end] = piece_grad_q
        grad_k[sequence, :, :keys] += piece_grad_k
    return loss, grad_q.to(student.q.dtype), grad_k.to(student.k.dtype)


class LayerHeads:
    """What the term needs of one layer of a model: the queries of the chosen heads at the supervised rows, and
    all keys."""
    def __init__(self, q, k, maps):
        # q (B, H of the model, T, e), k (B, G, T, e). Query head h reads key head h // (H / G).
        self.q = q.detach()[maps.sequence, maps.heads[:, None], maps.column]             # (H, K, e)
        self.k = k.detach()                                                  # (B, G, T, e)
        self.key_heads = maps.heads // (q.shape[1] // k.shape[1])            # (H,)

    def piece(self, sequence, first, end, keys, dtype):
        """Some rows of a sequence and its first keys -> queries (H, R, e), keys (G, T', e)."""
        return self.q[:, first:end].to(dtype), self.k[sequence, :, :keys].to(dtype)


class AttentionLoss(torch.autograd.Function):
    """One layer of the term as an identity on q and k, which adds the loss's gradient to theirs on the way
    back."""
    @staticmethod
    def forward(ctx, q, k, teacher, maps):
        student = LayerHeads(q, k, maps)
        loss, grad_q, grad_k = loss_and_gradients(student, teacher, maps.weights, maps.column, maps.pieces)
        ctx.save_for_backward(grad_q, grad_k, maps.sequence, maps.heads[:, None], maps.column)
        return q.view_as(q), k.view_as(k), loss

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_loss):
        loss_grad_q, loss_grad_k, *at = ctx.saved_tensors
        # Not in place: autograd may hand the same tensors to others.
        grad_q = grad_q.index_put(at, (loss_grad_q * grad_loss).to(grad_q.dtype), accumulate=True)
        grad_k = grad_k + (loss_grad_k * grad_loss).to(grad_k.dtype)
        return grad_q, grad_k, None, None


class Joined(torch.autograd.Function):
    """States h and a loss that was taken inside their block, both as they are.

    The backward of the loss then begins where that of h begins: behind the block. Without it a loss in the
    last block would be differentiated before FSDP has gathered the weights of this block.
    """
    @staticmethod
    def forward(ctx, h, loss):
        return h.view_as(h), loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad_h, grad_loss):
        return grad_h, grad_loss


# ---- as the training loop uses it ------------------------------------------------------------------

class AttentionTerm:
    """Which maps are compared: made once, before the loop.

    layers: of the student, as the key `layers`; layer_map {student layer: teacher layer}: pairs of hidden
    states; a layer that is not among them meets the teacher's layer at its depth, Eq. (11). heads: 'all', or
    their numbers from 1. student, teacher: ModelConfig.
    """
    def __init__(self, layers, heads, layer_map, student, teacher):
        self.layer_map = {}
        for l in layer_set(layers, student.L):
            self.layer_map[l] = layer_map.get(l) or teacher_layer(l, student.L, teacher.L)
        numbers = range(1, student.H + 1) if heads == 'all' else sorted(set(heads))
        self.heads = [number - 1 for number in numbers]

    def maps(self, rows):
        """The term of one micro-batch (step.Rows)."""
        return AttentionMaps(self, rows)


class AttentionMaps:
    """The term of one micro-batch: first the teacher's forward passes, then the student's."""
    def __init__(self, term, rows):
        T = rows.ids.shape[1]
        self.layer_map = term.layer_map
        self.heads = torch.tensor(term.heads, device=rows.at.device)         # (H,)
        self.sequence = rows.at // T                                         # (K,)
        self.column = rows.at % T                                            # (K,)
        self.weights = rows.weights / len(term.layer_map)                    # (K,)
        self.pieces = cut_rows(rows.at, T, len(term.heads))
        self.teacher = {}                    # {teacher layer: LayerHeads}
        self.losses = {}                     # {student layer: its loss; None once it was handed over}

    def keep(self, t, q, k):
        """Called in block t of the teacher with its queries and keys -> the same."""
        if t in self.layer_map.values():
            self.teacher[t] = LayerHeads(q, k, self)
        return q, k

    def __call__(self, l, q, k):
        """Called in block l of the student with its queries and keys -> the same, with the loss's gradient to
        come."""
        if l not in self.layer_map:
            return q, k
        q, k, loss = AttentionLoss.apply(q, k, self.teacher[self.layer_map[l]], self)

        # A block that is recomputed in the backward comes here again, when its loss has been handed over.
        self.losses.setdefault(l, loss)
        return q, k

    def loss(self, l, h):
        """The states h (B, T, d) after block l of the student -> h, and the layer's share of the term."""
        loss = self.losses[l]
        self.losses[l] = None
        return Joined.apply(h, loss)
