"""
AdamW, and what changes from step to step: the learning rate, and the weights of the two terms of
Eq. (7).
"""
import math
from itertools import pairwise

import torch
from torch.distributed.tensor import DTensor

from support.runtime import all_reduce


def learning_rate(step, steps, peak, warmup, schedule, min_lr):
    """The rate of a step 1..steps: a linear rise to the peak over warmup * steps, then the schedule.

    schedule: 'cosine' or 'linear' fall to min_lr * peak; 'constant' stays at the peak. The end is
    reached when the last step is done, and not in it: a step at rate 0 would be a rollout for
    nothing.
    """
    warmup_steps = round(warmup * steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps - 1) / (steps - warmup_steps)            # [0, 1)
    fall = {
        'cosine': (1 + math.cos(math.pi * progress)) / 2,
        'linear': 1 - progress,
        'constant': 1.0,
    }[schedule]
    return peak * (min_lr + (1 - min_lr) * fall)


def weight_at(step, steps, weight):
    """A term's weight at a step 1..steps. weight: a number, or knots [[share of the run, weight],
    ...] with straight lines between them and flat ends; two knots at one share make a jump."""
    if not isinstance(weight, list):
        return weight
    progress = (step - 1) / steps
    if progress < weight[0][0]:
        return weight[0][1]
    for (x0, w0), (x1, w1) in pairwise(weight):
        if x0 <= progress < x1:
            return w0 + (w1 - w0) * (progress - x0) / (x1 - x0)
    return weight[-1][1]


def ever_positive(weight):
    """Is a term's weight, a number or knots, positive at any time?"""
    if isinstance(weight, list):
        return max(w for _, w in weight) > 0
    return weight > 0


def adamw(model, lr, betas, eps, weight_decay):
    """AdamW over the weights of a model that learn. Decay acts on matrices only, never on norms and
    biases.

    Its state is allocated now, so a run that does not fit into memory fails before the first
    rollout and not at the second step.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2]
    vectors = [p for p in params if p.ndim < 2]
    fused = params[0].device.type != 'mps'
    groups = [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.0}]
    opt = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    for p in params:
        step = torch.zeros((), device=p.device if fused else 'cpu')
        opt.state[p] = {'step': step, 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
    return opt


# ---- what to log -------------------------------------------------------------------------------

def share_below_eps(opt):
    """The share of the weights whose gradients are below AdamW's eps, as a root mean square over the
    steps; weights that have had no gradient at all, such as the embeddings of tokens that never came,
    are not counted.

    AdamW divides by (root mean square + eps), so the steps of these weights are at most half as long
    as lr says.
    """
    # All steps are read at once, and below all sums: on a GPU each reading waits for the device.
    weights = [(p, group) for group in opt.param_groups for p in group['params']]
    steps = torch.stack([opt.state[p]['step'] for p, _ in weights]).tolist()
    below = 0
    count = 0
    for (p, group), step in zip(weights, steps, strict=True):
        mean_square = opt.state[p]['exp_avg_sq']
        if isinstance(mean_square, DTensor):
            mean_square = mean_square.to_local()                             # this rank's shard
        learned = mean_square > 0
        # exp_avg_sq starts at 0, so after so many steps it is short of the mean by this factor.
        limit = group['eps'] ** 2 * (1 - group['betas'][1] ** step)
        below += (learned & (mean_square < limit)).sum()
        count += learned.sum()
    below, count = all_reduce(torch.stack([below, count]).to(torch.float32)).tolist()
    return below / max(count, 1)
