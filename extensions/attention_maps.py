"""
Attention maps as a further term of the loss: the student's heads learn to look where the teacher's look.

At a supervised position a head distributes its attention over the keys up to that position. This
distribution is the position's row of the attention map. The term is the sum over the supervised rows, with
the same weights w_r as the other terms, of

    w_r * mean over layers and heads of KL(teacher's row || student's row)

The maps of a layer would be B x H x T x T numbers. They never exist: the rows are taken in pieces, and
until the backward only the gradients of a layer's queries and keys are kept.

    Model.trunk -> AttentionMaps.keep, in each block of the teacher: its queries and keys
                -> AttentionMaps.__call__, in each block of the student: loss and gradients by pieces
    step.take_loss_at_layer -> AttentionMaps.loss, after the block: its loss joins the others

Simpler than usual: there is no kernel. The gradient of a piece is autograd's of `attention_distance`, so
an edit of that function changes what is trained. If blocks are recomputed (checkpointing=True), the
pieces are computed twice.

What it does not do: a teacher with another vocabulary or another prompt (its keys would be other tokens),
another number of heads (unless a list names heads that both models have), torch.compile.

    python distill.py configs/toy.py attention_weight=1 attention_layers=all    on a CPU, or one GPU
    torchrun --nproc_per_node=8 distill.py configs/toy.py attention_weight=1    eight GPUs, or 8 CPU ranks

Letters: B answers, T tokens, K supervised positions, H heads that are compared, G key heads of a model,
         e width of a head, R rows of a piece, T' keys that they see.
"""
import math
from typing import NamedTuple

import torch

from losses import layer_set, teacher_layer

# The most logits (H x R x T') of a piece. Autograd needs five tensors of so many numbers at once, which are
# 0.34 GB in float32. With 12 heads and 16,384 keys a piece has 85 rows. Fewer rows would not save much more:
# the keys of both models, once for each head, and their gradient take 0.3 GB (e = 128) whatever the rows.
LOGITS = 2**24


# ---- the definition -------------------------------------------------------------------------------

def log_attention(q, k, column):
    """Logarithms of the attention of R rows of one sequence -> (H, R, T').

    q (H, R, e), k (H, T', e): rotated queries and keys. column (R,): the rows' positions in the sequence.
    """
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])                  # (H, R, T')

    # A row does not see later keys. Their logit is the lowest finite number, not -inf, because the difference
    # of two infinities is not a number.
    later = torch.arange(k.shape[1], device=k.device) > column[:, None]      # (R, T')
    logits = logits.masked_fill(later, torch.finfo(logits.dtype).min)
    return logits.log_softmax(-1)


def attention_distance(q_s, k_s, q_t, k_t, column):
    """KL(teacher's row || student's row), the mean over heads -> (R,). Arguments: as of `log_attention`,
    for both models."""
    log_s = log_attention(q_s, k_s, column)                                  # (H, R, T')
    log_t = log_attention(q_t, k_t, column)                                  # (H, R, T')
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1)                     # (H, R)
    return divergence.mean(0)


# ---- in pieces, with the gradient ------------------------------------------------------------------

class Piece(NamedTuple):
    """Supervised rows of one sequence that are computed together."""
    sequence: int
    first: int                  # the rows first .. end - 1 of the K
    end: int
    keys: int                   # T', the keys that the last of them sees


def cut_rows(at, T, heads):
    """Flat positions at (K,), ascending, of sequences of T tokens -> list of Piece. A piece has at most
    LOGITS logits, or a single row.

    Example: one head, T = 10, at = [3, 4, 17, 18, 19] and LOGITS = 20 give (0, 0, 2, 5), (1, 2, 4, 9) and
    (1, 4, 5, 10). The three rows of the second sequence together would have 3 x 10 logits.
    """
    pieces = []
    for row, position in enumerate(at.tolist()):
        sequence, column = divmod(position, T)
        keys = column + 1

        # The row joins the last piece, if it is of the same sequence and there is room.
        first = row
        if pieces and pieces[-1].sequence == sequence:
            rows = row + 1 - pieces[-1].first
            if heads * rows * keys <= LOGITS:
                first = pieces.pop().first
        pieces.append(Piece(sequence, first, row + 1, keys))
    return pieces


class LayerHeads:
    """One layer of a model: the queries of the compared heads at the supervised rows, and all keys."""
    def __init__(self, q, k, maps):
        """q (B, heads of the model, T, e), k (B, G, T, e). maps: AttentionMaps."""
        self.q = q.detach()[maps.at]                                         # (H, K, e)
        self.k = k.detach()                                                  # (B, G, T, e)
        shared_by = q.shape[1] // k.shape[1]         # so many query heads read one key head
        self.key_head = maps.heads // shared_by                              # (H,)

    def of_piece(self, piece, dtype):
        """-> queries (H, R, e), keys (G, T', e)."""
        q = self.q[:, piece.first:piece.end]
        k = self.k[piece.sequence, :, :piece.keys]
        return q.to(dtype), k.to(dtype)


def loss_and_gradients(student, teacher, maps):
    """The weighted sum of `attention_distance` over all rows of one layer -> loss, and its gradients with
    respect to the student's queries (H, K, e) and keys (B, G, T, e).

    student, teacher: LayerHeads. maps: AttentionMaps.
    """
    # float32 at least, as everywhere in the losses.
    dtype = torch.promote_types(student.q.dtype, torch.float32)
    loss = torch.zeros((), dtype=dtype, device=student.q.device)
    grad_q = torch.zeros_like(student.q, dtype=dtype)                        # (H, K, e)
    grad_k = torch.zeros_like(student.k, dtype=dtype)                        # (B, G, T, e)
    for piece in maps.pieces:
        rows = slice(piece.first, piece.end)
        q_s, k_s = student.of_piece(piece, dtype)                            # (H, R, e), (G, T', e)
        q_t, k_t = teacher.of_piece(piece, dtype)

        # A small graph of its own, whose leaves are the student's queries and keys.
        q_s.requires_grad_()
        k_s.requires_grad_()
        with torch.enable_grad(), own_graph():
            distance = attention_distance(q_s, k_s[student.key_head], q_t, k_t[teacher.key_head],
                                          maps.column[rows])                 # (R,)
            piece_loss = (maps.weights[rows] * distance).sum()
        piece_grad_q, piece_grad_k = torch.autograd.grad(piece_loss, [q_s, k_s])

        # Every row is in one piece, but a key is seen by the rows of many.
        loss += piece_loss.detach()
        grad_q[:, rows] = piece_grad_q
        grad_k[piece.sequence, :, :piece.keys] += piece_grad_k
    return loss, grad_q.to(student.q.dtype), grad_k.to(student.k.dtype)


def own_graph():
    """A context in which autograd saves tensors as they are.

    A block that is recomputed in the backward runs under hooks of torch's checkpoint. They drop what autograd
    would save, and compute the block again when it is asked for. A graph that is differentiated inside the
    block must not come under them.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class AttentionLoss(torch.autograd.Function):
    """The term of one layer as an identity on q and k, which adds the loss's gradient to theirs on the way
    back."""
    @staticmethod
    def forward(ctx, q, k, teacher, maps):
        student = LayerHeads(q, k, maps)
        loss, grad_q, grad_k = loss_and_gradients(student, teacher, maps)
        ctx.save_for_backward(grad_q, grad_k, *maps.at)
        return q.view_as(q), k.view_as(k), loss

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_loss):
        loss_grad_q, loss_grad_k, *at = ctx.saved_tensors
        loss_grad_q = (loss_grad_q * grad_loss).to(grad_q.dtype)             # (H, K, e)
        loss_grad_k = (loss_grad_k * grad_loss).to(grad_k.dtype)             # (B, G, T, e)

        # Not in place: autograd may hand the same tensors to another part of the graph.
        grad_q = grad_q.index_put(at, loss_grad_q, accumulate=True)
        return grad_q, grad_k + loss_grad_k, None, None


class Joined(torch.autograd.Function):
    """An identity on the states h after a block and on a loss computed inside it.

    The backward of the loss then begins where that of h begins, after the block. Otherwise a loss in the
    last block could be differentiated before FSDP has gathered the weights of this block.
    """
    @staticmethod
    def forward(ctx, h, loss):
        return h.view_as(h), loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad_h, grad_loss):
        return grad_h, grad_loss


# ---- as the training loop uses it ------------------------------------------------------------------

class AttentionTerm:
    """Which maps are compared. Made once, before the loop.

    layers: of the student, as the key `layers` has them. heads: 'all', or numbers from 1. layer_map: the
    pairs {student layer: teacher layer} of the hidden states; a layer that is not among them is compared
    with the teacher's layer at the same depth, Eq. (11). student, teacher: ModelConfig.
    """
    def __init__(self, layers, heads, layer_map, student, teacher):
        self.layer_map = {}
        for l in layer_set(layers, student.L):
            self.layer_map[l] = layer_map.get(l) or teacher_layer(l, student.L, teacher.L)
        numbers = range(1, student.H + 1) if heads == 'all' else sorted(set(heads))
        self.heads = [number - 1 for number in numbers]

    def maps(self, rows):
        """The term of one micro-batch."""
        return AttentionMaps(self, rows)


class AttentionMaps:
    """The term of one micro-batch (step.Rows). The teacher's forward must come first."""
    def __init__(self, term, rows):
        T = rows.ids.shape[1]
        self.layer_map = term.layer_map
        self.heads = torch.tensor(term.heads, device=rows.at.device)         # (H,)
        self.column = rows.at % T                                            # (K,)
        self.at = rows.at // T, self.heads[:, None], self.column             # an index of q: (H, K)
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
        """Called in block l of the student with its queries and keys -> the same, for the block to go on
        with: their backward adds the gradient."""
        if l not in self.layer_map:
            return q, k
        q, k, loss = AttentionLoss.apply(q, k, self.teacher[self.layer_map[l]], self)

        # A block that is recomputed in the backward comes here a second time. Its loss was handed over
        # long before, and must not be kept: it would keep all tensors of the block with it.
        self.losses.setdefault(l, loss)
        return q, k

    def loss(self, l, h):
        """The states h (B, T, d) after block l of the student -> h to go on with, the layer's share of the
        term: a scalar, differentiable as any other."""
        loss = self.losses[l]
        self.losses[l] = None
        return Joined.apply(h, loss)
