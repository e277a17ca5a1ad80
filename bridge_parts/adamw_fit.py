"""
Eq. (13) as the paper's Algorithm 1 fits it: twenty epochs of AdamW. For comparison with the closed
form.

Both models read all answers again in every epoch. As in the paper there is one P_s for both
classes, and no bias. A component of the teacher depends on its own row of P_s alone, and AdamW
updates every number by itself, so this fit too gives every rank at once: the first r rows are what
a fit at rank r would give from the same start. What it does not do: choose its learning rate, or
stop early.

Letters: K rows of a micro-batch, d width (d_s student, d_t teacher), R rank.
"""
import torch

from support.progress import Progress
from support.runtime import all_reduce

EPOCHS = 20
BATCH = 16                      # answers of an AdamW step, over all processes


def adamw_fit(pair, answers, bridge, lr, seed):
    """{layer: LayerBridge}, of which mean and P_t are used -> {layer: (P_s, b_s)}, which are
    (2, R, d_s) and (2, R).

    pair: bridge.Pair, which reads the answers.
    """
    device = pair.env.device
    generator = torch.Generator().manual_seed(seed)
    P_s = {}
    for layer, closed_form in bridge.items():
        d_s = closed_form.P_s.shape[2]
        noise = torch.randn(len(closed_form.P_t), d_s, generator=generator) * d_s**-0.5
        P_s[layer] = noise.to(device).requires_grad_()                       # (R, d_s)
    optimizer = torch.optim.AdamW(P_s.values(), lr=lr)

    # Every process needs at least one answer of a step. A last, smaller batch that has too few is
    # left out.
    world = pair.env.world
    batch = max(BATCH, world)
    starts = range(0, len(answers) - world + 1, batch)
    steps = EPOCHS * len(starts)
    with Progress('adamw', steps, 'steps', rank=pair.env.rank) as progress:
        for _ in range(EPOCHS):
            # A new order in every epoch, the same on every process.
            order = torch.randperm(len(answers), generator=generator).tolist()
            for start in starts:
                chosen = [answers[i] for i in order[start:start + batch]]
                count = add_gradients(pair, chosen, bridge, P_s)

                # A mean over the rows of all processes.
                for weight in P_s.values():
                    all_reduce(weight.grad).div_(count.clamp(min=1))
                optimizer.step()
                optimizer.zero_grad()
                progress.update(progress.done + 1)

    # In the form of the closed one: the same P_s for both classes, a bias of 0.
    fitted = {}
    for layer, weight in P_s.items():
        both_classes = weight.detach().double().expand(2, -1, -1)            # (2, R, d_s)
        b_s = both_classes.new_zeros(both_classes.shape[:2])                 # (2, R)
        fitted[layer] = both_classes, b_s
    return fitted


def add_gradients(pair, answers, bridge, P_s):
    """Add the gradient of sum_rows |P_s x - P_t (y - mean)|^2 to each P_s -> the number of rows,
    over all processes."""
    count = torch.zeros((), device=pair.env.device)
    for states_s, states_t, inside in pair.read(answers):
        count += len(inside)
        for layer, layer_t in pair.layer_map.items():
            mean = bridge[layer].mean.float()
            P_t = bridge[layer].P_t.float()
            z_t = (states_t[layer_t].float() - mean) @ P_t.t()               # (K, R)
            z_s = states_s[layer].float() @ P_s[layer].t()                   # (K, R)
            (z_s - z_t).square().sum().backward()
    return all_reduce(count)
