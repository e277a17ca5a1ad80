"""
The MLP of a block that is recomputed in the backward, in pieces of tokens.

    h + mlp(norm2(h)), (B, T, d) -> (B, T, d)

With recomputed blocks (checkpointing=True) an update keeps one state (B, T, d) a block, and in the backward
it makes one block's other tensors again. Those of the MLP are ff wide, about six times d: for two sequences
of 16,384 tokens they are more than the kept states of all 28 blocks of R1-Distill-Qwen-1.5B. Here at most
PIECE tokens have them at once. `python -m studies.peaks --count` counts both ways.

Simpler than a fused kernel: the operations are PyTorch's, and only the last product is differentiated by
hand. It is used where it saves memory (`in_pieces`); everywhere else a block is as model.Block.forward has
it. Tests hold the gradients of both equal.

Letters: B rows, T tokens, T' of them in a piece, d width, ff width of the MLP.
"""
import torch

# Most tokens of a piece. More would need more memory: the backward of a piece has seven tensors of width ff
# at once, 0.26 GB for ff = 8,960 in bfloat16. Fewer would lose time: each piece reads the weights again and
# adds to the sums of their gradients, and 2,048 x 1,536 results of `down` are 192 tiles of 128 x 128, with
# which the 132 processors of an H100 are just busy.
PIECE = 2048


def in_pieces(h, block):
    """Is the MLP of a block that is recomputed taken in pieces? h (B, T, d): the states that it reads.

    Not if they are one piece. Not under torch.compile, whose graph would hold all pieces one after another.
    And not if a part of the MLP is frozen, for which `piece_gradients` would be longer.
    """
    B, T, _ = h.shape
    learns = all(weight.requires_grad for weight in mlp_weights(block))
    return B * T > PIECE and learns and not torch.compiler.is_compiling()


def pieces(x):
    """x (B, T, d) -> views (B, T', d) of it, of equal length but for one token, at most PIECE tokens each."""
    B, T, _ = x.shape
    count = -(-T // max(1, PIECE // B))
    return x.tensor_split(count, 1)


def mlp_weights(block):
    """The weights of a block's MLP and of the norm before it."""
    return block.norm2.weight, block.mlp.gate_up.weight, block.mlp.down.weight


def add_mlp_in_pieces(h, block):
    """h + mlp(norm2(h)) of a block, (B, T, d) -> (B, T, d). Of all this, h alone is kept for the backward.

    The numbers come after h was kept. A recomputation stops as soon as it has made all that is kept, so it
    does not multiply here: the backward does, a piece at a time. No product is computed more often than
    without pieces.
    """
    result = MLPInPieces.apply(h, block, *mlp_weights(block))
    with torch.no_grad():
        for piece, result_piece in zip(pieces(h.detach()), pieces(result.detach()), strict=True):
            result_piece.copy_(piece + block.mlp(block.norm2(piece)))
    return result


class MLPInPieces(torch.autograd.Function):
    """The backward of `add_mlp_in_pieces`. Its forward keeps h and makes room for the result."""
    @staticmethod
    def forward(ctx, h, block, *weights):
        ctx.save_for_backward(h)
        ctx.block = block
        return torch.empty_like(h)

    @staticmethod
    def backward(ctx, grad):
        h, = ctx.saved_tensors
        weights = mlp_weights(ctx.block)
        grad_h = torch.empty_like(h)                                         # (B, T, d)

        # A weight's gradient is a sum over all tokens. A piece's part of it is rounded to the dtype of the
        # weight, as the whole sum would be; the parts are added in float32, and rounded once more.
        sums = []
        for weight in weights:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            sums.append(torch.zeros_like(weight, dtype=dtype))

        # The states are also added to the MLP's result, so the result's gradient is a part of theirs.
        for piece, grad_piece, grad_h_piece in zip(pieces(h), pieces(grad), pieces(grad_h), strict=True):
            through_mlp, *parts = piece_gradients(ctx.block, piece, grad_piece)
            grad_h_piece.copy_(grad_piece + through_mlp)
            for total, part in zip(sums, parts, strict=True):
                total += part
        return grad_h, None, *[total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)]


def piece_gradients(block, h, grad):
    """Gradients of mlp(norm2(h)): of h (B, T', d), and of the `mlp_weights`. grad (B, T', d): the result's.

    The last product is differentiated by hand, because its result is not needed here.
    """
    norm, gate_up, down = mlp_weights(block)
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        x = block.mlp.gated(block.norm2(h))                                  # (B, T', ff)
    grad_down = grad.flatten(0, 1).t() @ x.flatten(0, 1)                     # (d, ff)
    grad_x = grad @ down                                                     # (B, T', ff)
    grad_h, grad_norm, grad_gate_up = torch.autograd.grad(x, [h, norm, gate_up], grad_x)
    return grad_h, grad_norm, grad_gate_up, grad_down
