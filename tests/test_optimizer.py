"""AdamW's eps, and what is said about it. The schedule: test_distill.py; the whole update: test_loop.py."""
import torch

from support.optimizer import adamw, share_below_eps


def test_the_share_of_weights_that_eps_damps():
    """By hand: of the entries that had a gradient those whose root mean square over the steps is below eps. An embedding that
    never had a gradient is not damped, and counting it would hide what nmse does to the others."""
    model = torch.nn.Linear(3, 2, bias=False)
    opt = adamw(model, 1e-3, (0.9, 0.5), 1e-6, 0.0)
    for gradient in ([[1e-3, 2e-6, 0.0], [1e-7, 1e-7, 3e-9]], [[0.0, 0.0, 0.0], [1e-7, 5e-6, 0.0]]):
        model.weight.grad = torch.tensor(gradient)
        opt.step()
    # weights of the two steps' squares: 1/3 and 2/3. [0, 1]: 2e-6 / sqrt(3) is above 1e-6; [1, 1]: 5e-6 sqrt(2/3) too.
    assert share_below_eps(opt) == 2 / 5
    opt.param_groups[0]['eps'] = 2e-6
    assert share_below_eps(opt) == 3 / 5


def test_eps_damps_the_step():
    """One step of a gradient that equals eps is half as long as lr says."""
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    opt = adamw(model, 0.01, (0.9, 0.999), 1e-6, 0.0)
    model.weight.grad = torch.full((1, 1), 1e-6)
    opt.step()
    assert abs(before - model.weight.item() - 0.005) < 1e-5
