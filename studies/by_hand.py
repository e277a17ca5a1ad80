"""
One training step by hand: every tensor of Eq. (6) is small enough to be printed.

    python -m studies.by_hand
    python -c "from studies.by_hand import main; main(positions='last', distance='cosine')"

Two prompts, two answers to each, at most three tokens an answer. Student and teacher are decoders of two
layers and width 4 with random weights, so the answers mean nothing. Everything else is as in minimal.py,
and the steps have the same numbers. The gradient is checked in three ways: by a formula, by finite
differences, and against `step.accumulate`, with which distill.py trains. All numbers are float64, so that
a difference of two losses still has digits.

Simpler than usual: there is no tokenizer, no folder and no config. Change a line, run it, and read what
changes.

Letters: B answers, T tokens, K supervised positions, d width.
"""
from functools import partial

import torch

from losses import HiddenTerm, oprd_loss, row_distance
from model import Model, ModelConfig, init_weights
from rollout import sample
from step import Objective, accumulate, cut_rollout, position_mask, position_weights
from support.command_help import command_words
from support.optimizer import adamw
from support.runtime import UserError, run, shown

LETTERS = '0123456789=.'        # the vocabulary: an id is a place in this text; '.' ends an answer
LAYERS = [1, 2]
SIZES = ModelConfig(family='qwen3', V=len(LETTERS), L=2, d=4, H=1, G=1, e=4, ff=8)


def show(title, value):
    """Print a value under its title; of a tensor also the shape."""
    shape = f'  {tuple(value.shape)}' if torch.is_tensor(value) else ''
    print(f'{title}{shape}\n{value}\n')


def main(positions='all', distance='mse', average='sequence'):
    torch.set_default_dtype(torch.float64)
    torch.set_printoptions(precision=3, sci_mode=False)
    student = init_weights(Model(SIZES), seed=0)
    teacher = init_weights(Model(SIZES), seed=1).requires_grad_(False)
    student.head.requires_grad_(False)       # Eq. (6) never reaches it

    # Steps 1 to 3: the data of this step are the student's own answers.
    roll = prompts_and_answers(student)
    all_weights = positions_and_weights(roll, positions, average)            # (B, T)
    at = all_weights.flatten().nonzero().squeeze(-1)                         # (K,)
    weights = all_weights.flatten()[at]                                      # (K,)
    show('flat positions of the rows', at)

    # Steps 4 and 5: both models read the same answers.
    teacher_rows = teacher.hidden(roll.ids, LAYERS, at)                      # one (K, d) for each layer
    student_rows = student.hidden(roll.ids, LAYERS, at)
    show_layers(student_rows, teacher_rows, weights, distance)
    loss = oprd_loss(student_rows, teacher_rows, weights, distance)
    print(f'Eq. (6), the mean of the layers: {loss:.4f}\n')

    # The rows of layer 2 reach the loss through their own distance alone, so a formula gives their gradient.
    print('---- the gradient\n')
    gradient, = torch.autograd.grad(loss, student_rows[1], retain_graph=True)
    show('of the rows of layer 2, by autograd', gradient)                    # (K, d)
    if distance == 'mse':
        formula = weights[:, None] * 2 * (student_rows[1] - teacher_rows[1]) / SIZES.d / len(LAYERS)
        print(f'largest difference to the formula: {(gradient - formula).abs().max():.0e}\n')

    # Backpropagation carries it on to the weights. This is one matrix of the first block.
    loss.backward()
    matrix = student.blocks[0].mlp.down.weight                               # (d, ff)
    by_backpropagation = matrix.grad.clone()
    show('of a matrix of block 1, by backpropagation', by_backpropagation)

    loss_now = partial(loss_of, student, roll.ids, at, teacher_rows, weights, distance)
    differences = finite_differences(matrix, loss_now)
    show('the same by finite differences', differences)
    print(f'largest difference: {(by_backpropagation - differences).abs().max():.0e}\n')

    # distill.py forms each layer's gradient while the forward runs. budget=1: one answer in a micro-batch.
    student.zero_grad()
    objective = Objective({1: 1, 2: 2}, HiddenTerm(distance), output=None)
    micro_batches = cut_rollout(roll, all_weights, budget=1)
    accumulate(student, teacher, micro_batches, objective, {'oprd': 1.0})
    print(f'largest difference to step.accumulate: {(matrix.grad - by_backpropagation).abs().max():.0e}\n')

    update(student, matrix)
    print(f'loss of the same answers: {loss:.4f} -> {loss_now():.4f}')


def prompts_and_answers(student):
    """Steps 1 and 2: the student answers each prompt twice -> Rollout."""
    print('---- 1. prompts\n')
    prompts = [[1, 2, 10], [7, 10]]
    show('ids of 12= and of 7=', prompts)

    print('---- 2. rollout: the student answers\n')
    roll = sample(student, prompts, n=2, max_new_tokens=3, stop=[LETTERS.index('.')])
    show('ids: prompt, answer, padding', roll.ids)                           # (B, T)
    show('the answers as text', [''.join(LETTERS[i] for i in answer) for answer in roll.answers()])
    show('tokens of each prompt', roll.prompt_len)                           # (B,)
    show('tokens of each answer', roll.resp_len)                             # (B,)
    return roll


def positions_and_weights(roll, positions, average):
    """Step 3: which positions are supervised, and how much each of them counts -> (B, T)."""
    print('---- 3. rows\n')
    mask = position_mask(roll, positions, 1)                                 # (B, T)
    weights = position_weights(mask, average)                                # (B, T), they sum to 1
    show('mask of the supervised positions', mask.int())
    show('weight of each', weights)
    return weights


def show_layers(student_rows, teacher_rows, weights, distance):
    """Steps 4 and 5: what the two models have at the rows, layer by layer, and how far it is apart."""
    print('---- 4. teacher and 5. student\n')
    for layer, h_s, h_t in zip(LAYERS, student_rows, teacher_rows, strict=True):
        values = row_distance(h_s, h_t, distance).detach()                   # (K,)
        show(f'layer {layer}: rows of the teacher', h_t)                     # (K, d)
        show(f'layer {layer}: rows of the student', h_s.detach())            # (K, d)
        show(f'layer {layer}: distance of each row', values)
        print(f'layer {layer}: loss {(weights * values).sum():.4f}\n')


def update(student, matrix):
    """Step 6: clip the gradients, and let AdamW take its first step."""
    print('---- 6. update\n')
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    before = matrix.detach().clone()
    adamw(student, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0).step()
    print(f'gradient norm before clipping: {norm:.4f}\n')
    show('change of the matrix', matrix.detach() - before)


@torch.no_grad()
def loss_of(student, ids, at, teacher_rows, weights, distance):
    """Eq. (6) of the same answers, by the weights that the student has now."""
    return oprd_loss(student.hidden(ids, LAYERS, at), teacher_rows, weights, distance).item()


def finite_differences(matrix, loss_now, step=1e-5):
    """The gradient of loss_now() with respect to a matrix, one number after the other: the loss a little to
    the right, minus the loss a little to the left, divided by the way between them."""
    gradient = torch.zeros_like(matrix)
    numbers = matrix.detach().view(-1)       # the same memory
    for i in range(len(numbers)):
        numbers[i] += step
        right = loss_now()
        numbers[i] -= 2 * step
        left = loss_now()
        numbers[i] += step
        gradient.view(-1)[i] = (right - left) / (2 * step)
    return gradient


def from_shell(words):
    """The settings are arguments of `main`; a word on the command line would change nothing."""
    if words:
        raise UserError(f"{shown(words[0])}: this command has no settings; in Python: from studies.by_hand "
                        "import main; main(average='token')")
    main()


if __name__ == '__main__':
    run(from_shell, lambda: command_words('studies/by_hand.py'))
