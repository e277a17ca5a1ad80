"""
The algebra of stage 1 in closed form: Eqs. (12) and (13), Theorem 3, and the matching of layers by
CKA.

Everything is computed from sums over rows, so the hidden states are read once and never stored. A
row is a supervised position: the student's state x and the teacher's state y. Rows have a class c:
0 where both models have read exactly the same bytes, 1 where the student is inside a teacher token
(cross_tokenizer/pairing.py). The classes share the mean of y and P_t, and have a P_s and a b_s
each.

All of it is float64: a covariance is a small difference of large sums. What this file does not do:
read a model, a config or a file.

Letters: K rows, d width (d_s student, d_t teacher), R the largest rank, c class, i a component of
         the teacher, lam the variance of a component, rho2 the share of it that the student
         predicts.
"""
from typing import NamedTuple

import torch


class LayerBridge(NamedTuple):
    """The interface of one pair of layers: P_s x + b_s predicts z = P_t (y - mean). The bridge of
    rank r is the first r rows of P_t, P_s and b_s."""
    mean: torch.Tensor          # (d_t,) mean of the teacher's states
    P_t: torch.Tensor           # (R, d_t)
    P_s: torch.Tensor           # (2, R, d_s) one for each class
    b_s: torch.Tensor           # (2, R)


# ---- sums over rows --------------------------------------------------------------------------

class Central(NamedTuple):
    """Means and covariances of some rows."""
    count: int
    x: torch.Tensor             # (d_s,) mean
    y: torch.Tensor             # (d_t,) mean
    xx: torch.Tensor            # (d_s, d_s) covariance
    yx: torch.Tensor            # (d_t, d_s)
    yy: torch.Tensor            # (d_t, d_t)


class Moments:
    """Sums over the rows of one pair of layers, by class: the number of rows, and x, y, x x', y x',
    y y'.

    For 28 layers of 2048 and 2560 numbers this is 28 * 2 * (2048^2 + 2048 * 2560 + 2560^2) * 8
    bytes = 7.2 GB.
    """
    def __init__(self, d_s, d_t, device):
        shapes = {
            'n': (),
            'x': (d_s,),
            'y': (d_t,),
            'xx': (d_s, d_s),
            'yx': (d_t, d_s),
            'yy': (d_t, d_t),
        }
        self.sums = {}
        for name, shape in shapes.items():
            self.sums[name] = torch.zeros(2, *shape, dtype=torch.float64, device=device)

    def add(self, x, y, inside):
        """Add rows x (K, d_s) and y (K, d_t); inside (K,): True for rows of class 1."""
        for c, rows in enumerate((~inside, inside)):
            x_c = x[rows].double()
            y_c = y[rows].double()
            self.sums['n'][c] += len(x_c)
            self.sums['x'][c] += x_c.sum(0)
            self.sums['y'][c] += y_c.sum(0)
            self.sums['xx'][c].addmm_(x_c.t(), x_c)
            self.sums['yx'][c].addmm_(y_c.t(), x_c)
            self.sums['yy'][c].addmm_(y_c.t(), y_c)

    def central(self, c=None):
        """Means and covariances of class c, or of all rows together -> Central."""
        sums = {}
        for name, both in self.sums.items():
            sums[name] = both.sum(0) if c is None else both[c]

        # A class without rows has means and covariances of 0.
        count = sums['n'].clamp(min=1)
        x = sums['x'] / count
        y = sums['y'] / count
        xx = sums['xx'] / count - torch.outer(x, x)
        yx = sums['yx'] / count - torch.outer(y, x)
        yy = sums['yy'] / count - torch.outer(y, y)
        return Central(int(sums['n']), x, y, xx, yx, yy)


# ---- the fit ---------------------------------------------------------------------------------

def principal_directions(moments):
    """Eq. (12): the teacher's mean (d_t,), its principal directions P_t (d_t, d_t), one per row,
    and their variances lam (d_t,), largest first."""
    rows = moments.central()
    lam, vectors = torch.linalg.eigh(rows.yy)        # ascending; one vector per column
    P_t = vectors.flip(1).t().contiguous()

    # An eigenvector's sign is arbitrary. Make the largest entry positive, so that machines agree.
    largest = P_t.abs().argmax(1, keepdim=True)
    P_t = P_t * P_t.gather(1, largest).sign()
    return rows.y, P_t, lam.flip(0).clamp(min=0)


def ridge(moments, mean, P_t, penalty, bias):
    """Eq. (13) in closed form -> P_s (2, R, d_s) and b_s (2, R), one for each class.

    P_s x + b_s has the least mean squared distance to z = P_t (y - mean), plus penalty * (mean
    variance of a number in x) * |P_s|^2. The components of z do not mix, so the first r rows are
    the solution at rank r. The paper has no b_s: with bias=False, b_s = 0. A class without rows
    gets zeros.
    """
    P_s = []
    b_s = []
    for c in (0, 1):
        rows = moments.central(c)
        z_mean = P_t @ (rows.y - mean)                                       # (R,)
        if rows.count == 0:
            P_s.append(P_t.new_zeros(len(P_t), len(rows.x)))
            b_s.append(torch.zeros_like(z_mean))
            continue

        # With a bias both sides are centred; without one, the second moments take the covariances'
        # place.
        xx = rows.xx
        yx = rows.yx
        if not bias:
            xx = xx + torch.outer(rows.x, rows.x)
            yx = yx + torch.outer(rows.y - mean, rows.x)

        # The normal equations: P_s (xx + damping) = P_t yx.
        damping = penalty * xx.diagonal().mean().clamp(min=1e-30)
        damped = xx + damping * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        solution = torch.linalg.solve(damped, yx.t() @ P_t.t()).t()          # (R, d_s)
        P_s.append(solution)
        b_s.append(z_mean - solution @ rows.x if bias else torch.zeros_like(z_mean))
    return torch.stack(P_s), torch.stack(b_s)


# ---- how good a bridge is --------------------------------------------------------------------

def predicted_share(moments, bridge):
    """From held-out moments -> the variance lam (R,) of each component z_i, and rho2 (R,), the
    share of it that the bridge predicts: 1 - E (z - P_s x - b_s)^2 / lam, not below 0."""
    mean, P_t, P_s, b_s = bridge
    every_row = moments.central()
    residual = 0.0
    for c in (0, 1):
        # E (z - P_s x - b_s)^2 = var z - 2 cov(z, P_s x) + var(P_s x) + (difference of the means)^2
        rows = moments.central(c)
        gap = P_t @ (rows.y - mean) - P_s[c] @ rows.x - b_s[c]               # (R,)
        var_z = ((P_t @ rows.yy) * P_t).sum(1)
        cov = ((P_t @ rows.yx) * P_s[c]).sum(1)
        var_guess = ((P_s[c] @ rows.xx) * P_s[c]).sum(1)
        error = var_z - 2 * cov + var_guess + gap.square()
        residual = residual + rows.count / every_row.count * error
    lam = ((P_t @ every_row.yy) * P_t).sum(1).clamp(min=1e-30)
    return lam, (1 - residual / lam).clamp(min=0)


def energy(lam, rho2):
    """Theorem 3: E(r) = sum_{i>r} lam_i rho2_i + sum_{i<=r} lam_i (1 - rho2_i), for r = 1..R ->
    (R,).

    The first sum is what rank r leaves out although the student could predict it, the second is
    what it includes although the student cannot. One more direction pays as long as its rho2 is
    above 1/2.
    """
    predictable = lam * rho2
    from_here_on = predictable.flip(0).cumsum(0).flip(0)                     # sum_{i>=r}
    left_out = torch.cat([from_here_on[1:], lam.new_zeros(1)])               # sum_{i>r}
    unpredictable = (lam * (1 - rho2)).cumsum(0)
    return left_out + unpredictable


def cosine_sums(z_s, z_t):
    """Cosines of the rows of z_s and z_t (K, R), cut to their first r numbers, for r = 1..R, summed
    over the rows -> (R,)."""
    dots = (z_s * z_t).cumsum(1)                                             # (K, R)
    squares_s = (z_s * z_s).cumsum(1)
    squares_t = (z_t * z_t).cumsum(1)
    return (dots / (squares_s * squares_t).sqrt().clamp(min=1e-12)).sum(0)


# ---- which layers belong together -------------------------------------------------------------

def match_by_cka(states_s, states_t):
    """States of the same K positions, {layer: (K, d)} for each model -> {student layer: teacher
    layer}.

    Each student layer gets the teacher layer with the largest linear CKA, |x'y|^2 / (|x'x| |y'y|)
    of centred states. That is the cosine of the two matrices of inner products, x x' and y y' (K,
    K).
    """
    grams_s = unit_grams(states_s)
    grams_t = unit_grams(states_t)
    matched = {}
    for layer, gram in grams_s.items():
        cka = {layer_t: float(gram @ gram_t) for layer_t, gram_t in grams_t.items()}
        matched[layer] = max(cka, key=cka.get)
    return matched


def unit_grams(states):
    """{layer: (K, d)} -> {layer: (K * K,)}: inner products of the centred states, scaled to norm
    1."""
    grams = {}
    for layer, x in states.items():
        x = x.double()
        x = x - x.mean(0)
        grams[layer] = torch.nn.functional.normalize((x @ x.t()).flatten(), dim=0)
    return grams
