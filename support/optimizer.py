"""
The learning-rate schedule, and AdamW.
"""
import math

import torch

# ---- the schedule ------------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup, schedule, min_lr):
    """Rate of a step 1..steps: linear rise to the peak over warmup * steps, then the schedule towards
    min_lr * peak, reached when the last step is done (a step at rate 0 would be a rollout for nothing)."""
    rise = round(warmup * steps)
    if step <= rise:
        return peak * step / rise
    x = (step - rise - 1) / (steps - rise)                                   # [0, 1)
    fall = {'cosine': (1 + math.cos(math.pi * x)) / 2, 'linear': 1 - x, 'constant': 1.0}[schedule]
    return peak * (min_lr + (1 - min_lr) * fall)


# ---- the optimizer ----------------------------------------------------------------------------

def adamw(model, lr, betas, weight_decay):
    """AdamW with its state allocated now: a run that does not fit fails before the first rollout,
    not at its second step. Decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    fused = params[0].device.type != 'mps'
    opt = torch.optim.AdamW([{'params': [p for p in params if p.ndim >= 2], 'weight_decay': weight_decay},
                             {'params': [p for p in params if p.ndim < 2], 'weight_decay': 0.0}],
                            lr=lr, betas=betas, fused=fused)
    for p in params:
        opt.state[p] = {'step': torch.zeros((), device=p.device if fused else 'cpu'),
                        'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
    return opt


