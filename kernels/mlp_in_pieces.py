"""
The MLP of a block that is recomputed in the backward, in pieces of tokens.

    h + mlp(norm2(h)), (B, T, d) -> (B, T, d)

With recomputed blocks (checkpointing=True) an update keeps the input (B, T, d) of each block, and in the
backward it computes the block's other tensors again. Those of the MLP are ff wide, about six times d. For two
sequences of 16,384 tokens they are larger than the kept inputs of all 28 blocks of R1-Distill-Qwen-1.5B. With
this file they exist for at most PIECE tokens at once. `python -m studies.peaks --count` counts both ways.

Simpler than a fused kernel: the operations are PyTorch's, and only the last product is differentiated by
hand. It is used where it saves memory (`in_pieces`); everywhere else a block is as model.Block.forward has
it. Tests hold the gradients of both equal.

Letters: B rows, T tokens, T' of them in a piece, d width, ff width of the MLP.
"""
import torch

# The most tokens of a piece. More tokens would need more memory: the backward of a piece has seven tensors of
# width ff at once, 0.26 GB for ff = 8,960 in bfloat16. Fewer tokens would take more time: each piece reads
# the weights again and adds to the sums of their gradients. Also, the 2,048 x 1,536 results of `down` are 192
# tiles of 128 x 128, which is just enough for the 132 multiprocessors of an H100.
PIECE = 2048


def in_pieces(h, block):
    """Is the MLP of a block that is recomputed taken in pieces? h (B, T, d): the states that it reads.

    It is not if all tokens fit in one piece. It is not under torch.compile, whose graph would contain all
    pieces one after another. And it is not if a part of the MLP is frozen: `piece_gradients` differentiates
    by all weights.
    """
    B, T, _ = h.shape
    learns = all(weight.requires_grad for weight in mlp_weights(block))
    return B * T > PIECE and learns and not torch.compiler.is_compiling()


def pieces(x):
    """x (B, T, d) -> views (B, T', d) of it, of at most PIECE tokens each. Their T' differ by at most one.

    Example: B = 2 and T = 2,500 with PIECE = 2,048 give T' = 834, 833 and 833.
    """
    B, T, _ = x.shape
    count = -(-T // max(1, PIECE // B))
    return x.tensor_split(count, 1)


def mlp_weights(block):
    """The weights of a block's MLP and of the norm before it."""
    return block.norm2.weight, block.mlp.gate_up.weight, block.mlp.down.weight


def add_mlp_in_pieces(h, block):
    """h + mlp(norm2(h)) of a block, (B, T, d) -> (B, T, d). Only h is kept for the backward.

    `MLPInPieces.apply` keeps h before any number of the result is computed. When torch's checkpoint computes
    a block again, it stops as soon as it has all kept tensors, so it never reaches the loop below. The
    backward of MLPInPieces computes what it needs of the MLP itself, a piece at a time. So no product is
    computed more often than without pieces.
    """
    result = MLPInPieces.apply(h, block, *mlp_weights(block))
    with torch.no_grad():
        for piece, result_piece in zip(pieces(h.detach()), pieces(result.detach()), strict=True):
            result_piece.copy_(piece + block.mlp(block.norm2(piece)))
    return result


class MLPInPieces(torch.autograd.Function):
    """The backward of `add_mlp_in_pieces`. Its forward keeps h and allocates the result, which it does not
    compute."""
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

        # A weight's gradient is a sum over all tokens. The part of one piece is rounded to the dtype of the
        # weight, as the whole sum would be. The parts are added in float32, and the sum is rounded once more.
        sums = []
        for weight in weights:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            sums.append(torch.zeros_like(weight, dtype=dtype))

        # The result is h + mlp(norm2(h)), so its gradient reaches h directly and through the MLP.
        for piece, grad_piece, grad_h_piece in zip(pieces(h), pieces(grad), pieces(grad_h), strict=True):
            through_mlp, *parts = piece_gradients(ctx.block, piece, grad_piece)
            grad_h_piece.copy_(grad_piece + through_mlp)
            for total, part in zip(sums, parts, strict=True):
                total += part
        return grad_h, None, *[total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)]


def piece_gradients(block, h, grad):
    """Gradients of mlp(norm2(h)) with respect to h (B, T', d) and to the `mlp_weights`.

    grad (B, T', d): the gradient of the result. The last product is differentiated by hand, so that it need
    not be computed again.
    """
    norm, gate_up, down = mlp_weights(block)
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        x = block.mlp.gated(block.norm2(h))                                  # (B, T', ff)
    grad_down = grad.flatten(0, 1).t() @ x.flatten(0, 1)                     # (d, ff)
    grad_x = grad @ down                                                     # (B, T', ff)
    grad_h, grad_norm, grad_gate_up = torch.autograd.grad(x, [h, norm, gate_up], grad_x)
    return grad_h, grad_norm, grad_gate_up, grad_down
