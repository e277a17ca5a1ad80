"""
Where does each output-space objective come to rest? Two questions, on random distributions, in
seconds:

    the gradient when student and teacher are the same:  0, or the objective drifts away
    near the teacher, does it point where the exact KL points?  the cosine of the two gradients

    python -m studies.fixed_points                    the table of docs/objectives.md

The gradient is taken with respect to the logits of 64 rows over 5,000 tokens. `direct top-k` is the
sum over the k likeliest tokens of p (log p - log q), differentiated as it stands: the mass of the k
tokens is part of what it minimises, so it is no objective of this project and here as a control.

Letters: K rows, V vocabulary.
"""
import torch

from output_losses import likeliest, opd_rows
from support.command_help import command_words
from support.runtime import UserError, print0, run, shown

ROWS = 64
VOCABULARY = 5000
K_TOKENS = 16
SAMPLES = 2000                  # sampled tokens per row, for the mean gradient of Eq. (3)

OBJECTIVES = {
    'full KL (4)': dict(kind='full'),
    'top-16, reward (4.1.1)': dict(kind='topk', tail='reward'),
    'top-16, renormalised (5)': dict(kind='topk', tail='renorm'),
    'top-16, rest as one outcome': dict(kind='topk', tail='bucket'),
    'top-16 of the teacher, reward': dict(kind='topk', tail='reward', support='teacher'),
    'top-16, forward KL, renormalised': dict(kind='topk', tail='renorm', direction='forward'),
    'full forward KL': dict(kind='full', direction='forward'),
    'sampled token (3), mean': dict(kind='sampled'),
}


def direct_topk(z_s, z_t):
    """The control: sum over S of p (log p - log q), with p differentiated too. Logits (K, V) ->
    (K,)."""
    logp = z_s.log_softmax(-1)
    logq = z_t.log_softmax(-1)
    S = likeliest(logp, K_TOKENS)
    logp_S = logp.gather(-1, S)
    return (logp_S.exp() * (logp_S - logq.gather(-1, S))).sum(-1)


def gradient(loss_rows, z_s, z_t):
    """Gradient of the sum of a loss over rows with respect to the student's logits (K, V)."""
    leaf = z_s.clone().requires_grad_()
    grad, = torch.autograd.grad(loss_rows(leaf, z_t).sum(), leaf)
    return grad


def objective_gradient(settings, z_s, z_t, generator):
    """Gradient (K, V) of one of OBJECTIVES; of the sampled token its mean over SAMPLES draws per
    row."""
    if settings['kind'] != 'sampled':
        return gradient(lambda s, t: opd_rows(s, t, None, k=K_TOKENS, **settings), z_s, z_t)
    # The gradient of a draw y is (log p - log q)(y) (one-hot(y) - p): its mean needs no loop over
    # the draws.
    p = z_s.softmax(-1)
    drawn = torch.multinomial(p, SAMPLES, replacement=True, generator=generator)             # (K, SAMPLES)
    ratio = (z_s.log_softmax(-1) - z_t.log_softmax(-1)).gather(-1, drawn) / SAMPLES
    mean = torch.zeros_like(z_s).scatter_add(-1, drawn, ratio)
    return mean - p * ratio.sum(-1, keepdim=True)


def logits(sharpness, distance, generator):
    """Logits (K, V) of a student and of a teacher that is `distance` away; sharpness sets the mass
    of the top tokens."""
    z_s = sharpness * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    return z_s, z_s + distance * noise


def table():
    """-> markdown lines."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for sharpness in (7.0, 3.4):             # nearly all of the mass on 16 tokens, and two thirds
        z_s, z_t = logits(sharpness, 0.05, generator)
        p = z_s.softmax(-1)
        mass = p.gather(-1, likeliest(p, K_TOKENS)).sum(-1).mean().item()
        kl = opd_rows(z_s, z_t, None, 'full').mean().item()
        exact = gradient(lambda s, t: opd_rows(s, t, None, 'full'), z_s, z_t)
        cases.append((z_s, z_t, exact, f'cosine at mass {mass:.3f}, KL {kl:.1e}'))

    lines = ['| objective | gradient at student = teacher | ' + ' | '.join(case[-1] for case in cases) + ' |']
    lines.append('|---|---|' + '---|' * len(cases))
    for name in [*OBJECTIVES, 'control: direct top-16']:
        cells = []
        at_rest = 0.0
        for z_s, z_t, exact, _ in cases:
            if name in OBJECTIVES:
                same = objective_gradient(OBJECTIVES[name], z_s, z_s, generator)
                grad = objective_gradient(OBJECTIVES[name], z_s, z_t, generator)
            else:
                same = gradient(direct_topk, z_s, z_s)
                grad = gradient(direct_topk, z_s, z_t)
            at_rest = max(at_rest, same.norm(dim=-1).mean().item())
            cosine = torch.nn.functional.cosine_similarity(grad, exact, dim=-1).mean().item()
            cells.append(f'{cosine:.2f}')
        cells.insert(0, '0' if at_rest < 1e-12 else f'{at_rest:.1e}')
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(words):
    if words:
        raise UserError(f'{shown(words[0])}: this script takes nothing; python -m studies.fixed_points')
    print0('\n'.join(table()))


if __name__ == '__main__':
    run(main, lambda: command_words('studies/fixed_points.py'))
