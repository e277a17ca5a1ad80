"""Eqs. (3)-(5) against brute force in float64, chunked against unchunked, and Eq. (7) through the models."""
import itertools
import math
from functools import partial
from itertools import product

import pytest
import torch
from conftest import TINY_SUMS, Products, flat_sums, opd_loss, rounding, step_sums, tiny_model
from test_losses import DTYPES, Shapes, rollout

from losses import drift_weights, layer_loss, oprd_loss
from output_losses import (
    COLUMNS,
    divergence,
    likeliest,
    make_objective,
    opd_rows,
    overlap,
    row_dot,
    rows_at_once,
    sum_to_end,
)
from rollout import Rollout
from step import diagnostic_mask, position_mask, position_weights
from support.optimizer import ever_positive, weight_at
from teacher import hidden_rows

PHI = {1: 1, 2: 2, 3: 3}
V, SUPPORTS, TAILS, KLS = 13, ('student', 'teacher', 'union'), ('reward', 'renorm', 'bucket'), ('reverse', 'forward')
VARIANTS = [dict(kind='full', direction=d) for d in KLS] + [
    dict(kind='topk', support=s, tail=t, direction=d, k=k) for s, t, d, k in product(SUPPORTS, TAILS, KLS, (1, 4, V, 99))
    if (t, d) != ('reward', 'forward')]


def problem(seed=0, K=11, d=6, d_t=8, dtype=torch.float64):
    """Rows and heads of two models of different widths, the teacher's with three more embeddings; weights
    with a zero."""
    g = torch.Generator().manual_seed(seed)
    h, W = torch.randn(K, d, generator=g, dtype=dtype), torch.randn(V + 2, d, generator=g, dtype=dtype)
    h_t, W_t = torch.randn(K, d_t, generator=g, dtype=dtype) / 2, torch.randn(V + 5, d_t, generator=g, dtype=dtype)
    w = torch.rand(K, generator=g, dtype=dtype)
    w[3] = 0
    answer = torch.tensor([0, 0, 0, 2, 2, 2, 2, 5, 5, 6, 6])
    return h, W, h_t, W_t, torch.randint(V, (K,), generator=g), w, answer


def by_hand(z_s, z_t, kind, direction, support='student', tail='bucket', k=4):
    """One position in plain Python floats-of-autograd: the divergence as its words say."""
    p, q = z_s.softmax(-1), z_t.softmax(-1)
    if kind == 'topk':
        def top(x):
            return set(sorted(range(len(x)), key=lambda v: -x[v])[:k])
        S = sorted({'student': top(p), 'teacher': top(q), 'union': top(p) | top(q)}[support])
    else:
        S, tail = list(range(len(p))), 'bucket'
    ps, qs = [p[v] for v in S], [q[v] for v in S]
    if tail == 'renorm':
        ps, qs = [x / sum(ps) for x in ps], [x / sum(qs) for x in qs]
    if tail == 'bucket' and len(S) < len(p):
        ps.append(sum(p[v] for v in range(len(p)) if v not in S))
        qs.append(sum(q[v] for v in range(len(q)) if v not in S))
    if direction == 'forward':
        ps, qs = qs, ps
    if tail == 'reward':                     # a constant times the score, whose value is 1 here
        rewards = [(a / sum(ps) * (a / b).log()).detach() for a, b in zip(ps, qs, strict=True)]
        return sum(r * (1 + a.log() - a.log().detach()) for r, a in zip(rewards, ps, strict=True))
    return sum(a * (a / b).log() for a, b in zip(ps, qs, strict=True))


def test_the_rows_under_the_head_are_bounded_and_enough_for_a_gpu():
    """They were a quarter of the free memory: the peak of a step was our own choice, and another one in every run. On CUDA
    the product with the head has more operations per byte than an H100 computes while it moves one (989 / 3.35), and half
    of the rows would hardly have; four (C, V) tensors in float32 have 2.5 GB. 64 rows on a CPU."""
    V, d = 151_936, 1536
    C = rows_at_once(torch.device('cuda'))

    def operations_per_byte(C):
        return 2 * C * V * d / (2 * V * d + 2 * C * d + 4 * C * V)
    assert operations_per_byte(C) > 1.4 * 989 / 3.35 > operations_per_byte(C // 2) and 4 * 4 * C * V < 2.5e9
    assert rows_at_once(torch.device('cpu')) == 64


EVERY_OBJECTIVE = [*VARIANTS, *(dict(kind='sampled', future=f, baseline=b) for f, b in product((False, True), repeat=2))]


@pytest.mark.parametrize('how', EVERY_OBJECTIVE, ids=lambda how: '-'.join(map(str, how.values())))
def test_nothing_is_learned_from_oneself(how):
    """Student = teacher is a fixed point of every objective and tail: the gradient is 0 but for rounding. A top-k sum
    that is differentiated directly also moves mass into S or out of it, and drifts away from the teacher."""
    h, W, _, _, y, w, answer = problem()
    a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
    loss, _ = opd_loss(a, b, h, W, y, w, answer, **how, vocab=V, chunk=4)
    for grad in torch.autograd.grad(loss, (a, b)):
        assert grad.abs().max() < 1e-14
    away = h + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(0), dtype=h.dtype)
    loss, _ = opd_loss(a, b, away, W, y, w, answer, **how, vocab=V, chunk=4)
    if how.get('k') != 1 or how['tail'] != 'renorm':         # 0 whatever the models say (one token, or one of two)
        assert torch.autograd.grad(loss, b)[0].abs().max() > 1e-4


def test_supervised_is_the_cross_entropy_of_torch():
    """Value and gradients, with a temperature, padding ids, chunks and an upstream gradient of 1.7; the readable form too.
    Its statistics are those of the full KL: the teacher is looked at, though not learnt from."""
    h, W, h_t, W_t, y, w, answer = problem()
    want_h, want_W = h.clone().requires_grad_(), W.clone().requires_grad_()
    logits = want_h @ want_W[:V].t() / 0.7
    want = (w * torch.nn.functional.cross_entropy(logits, y, reduction='none')).sum()
    want_grads = torch.autograd.grad(1.7 * want, (want_h, want_W), retain_graph=True)
    assert torch.allclose((w * opd_rows(logits, h_t @ W_t[:V].t(), y, 'supervised')).sum(), want, rtol=0, atol=1e-12)
    for chunk in (4, 100):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        loss, stats = opd_loss(a, b, h_t, W_t, y, w, answer, kind='supervised', temperature=0.7, vocab=V, chunk=chunk)
        assert torch.allclose(loss, want, rtol=0, atol=1e-12)
        for got, grad in zip(torch.autograd.grad(1.7 * loss, (a, b)), want_grads, strict=True):
            assert torch.allclose(got, grad, rtol=0, atol=1e-12)
        full = opd_loss(h, W, h_t, W_t, y, w, answer, kind='full', temperature=0.7, vocab=V)[1]
        assert torch.allclose(stats, full, rtol=0, atol=1e-12)


def test_a_reward_has_the_gradient_of_the_score_function():
    """Top-k as a reward, written down: sum over S of w_S (log p - log q), constants, times grad log p."""
    g = torch.Generator().manual_seed(3)
    z_s, z_t = torch.randn(2, 6, V, generator=g, dtype=torch.float64)
    z_s.requires_grad_()
    got, = torch.autograd.grad(opd_rows(z_s, z_t, None, 'topk', k=4, tail='reward').sum(), z_s)
    p, logp, logq = z_s.softmax(-1), z_s.log_softmax(-1), z_t.log_softmax(-1)
    want = torch.zeros_like(z_s)
    for row in range(6):
        S = sorted(range(V), key=lambda v, row=row: -p[row, v].item())[:4]
        mass = sum(p[row, v].item() for v in S)
        for v in S:
            reward = p[row, v].item() / mass * (logp[row, v] - logq[row, v]).item()
            want[row] += reward * torch.autograd.grad(logp[row, v], z_s, retain_graph=True)[0][row]
    assert (got - want).abs().max() < 1e-14


@pytest.mark.parametrize('kind', ['fooled', 'top-k', ''])
def test_an_unknown_kind_is_an_error_and_not_another_objective(kind):
    h, W, h_t, W_t, y, w, _ = problem()
    for call in (lambda: opd_rows(h @ W.t(), h @ W.t(), y, kind), lambda: make_objective(kind),
                 lambda: opd_loss(h, W, h_t, W_t, y, w, kind='topk', tail=kind or 'x', vocab=V),
                 lambda: opd_loss(h, W, h_t, W_t, y, w, kind='topk', support=kind or 'x', vocab=V),
                 lambda: opd_loss(h, W, h_t, W_t, y, w, kind='full', direction=kind or 'x', vocab=V),
                 lambda: layer_loss(h[None], h.clone(), torch.arange(11), w, kind), lambda: oprd_loss([h], [h], w, kind)):
        with pytest.raises(AssertionError):
            call()


@pytest.mark.parametrize('how', VARIANTS, ids=lambda how: '-'.join(map(str, how.values())))
def test_every_variant_by_brute_force(how):
    """Value and gradient for states and head, both temperatures, upstream gradient 1.7, any chunk."""
    h, W, h_t, W_t, y, w, _ = problem()
    want_h, want_W = h.clone().requires_grad_(), W.clone().requires_grad_()
    want = sum(w[i] * by_hand(want_h[i] @ want_W[:V].t() / 0.7, h_t[i] @ W_t[:V].t() / 1.3, **how) for i in range(len(w)))
    want_grads = torch.autograd.grad(1.7 * want, (want_h, want_W))
    assert want_grads[1][V:].abs().max() == 0                             # padding ids have no part in it

    rows = opd_rows(h @ W[:V].t() / 0.7, h_t @ W_t[:V].t() / 1.3, y, **how)
    assert abs((w * rows).sum() - want) < 1e-12
    for chunk in (1, 4, 100):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        loss, stats = opd_loss(a, b, h_t, W_t, y, w, **how, temperature=0.7, teacher_temperature=1.3, vocab=V, chunk=chunk)
        assert abs(loss - want) < 1e-12 and not stats.requires_grad
        for got, grad in zip(torch.autograd.grad(1.7 * loss, (a, b)), want_grads, strict=True):
            assert (got - grad).abs().max() < 1e-11


def test_what_the_variants_must_satisfy():
    """k = V is the full KL whatever the tail; renormalised k = 1 is 0; a bucket never exceeds the full
    KL and grows with k; the value of a reward may be negative (why 'bucket' exists)."""
    g = torch.Generator().manual_seed(1)
    z_s, z_t = (3 * torch.randn(200, V, generator=g, dtype=torch.float64) for _ in range(2))
    y, negative = torch.zeros(200, dtype=torch.long), 0
    for support, direction in product(SUPPORTS, KLS):
        full = opd_rows(z_s, z_t, y, 'full', direction=direction)
        assert full.min() > 0
        rows = partial(opd_rows, z_s, z_t, y, 'topk', support=support, direction=direction)
        for tail in TAILS[direction == 'forward':]:                       # a reward is a reverse KL
            assert (rows(k=V, tail=tail) - full).abs().max() < 1e-12
        buckets = [rows(k=k, tail='bucket') for k in (1, 2, 5, 9, V)]
        assert all((b - full).max() < 1e-12 for b in buckets)
        if support != 'union':                                            # a finer partition says no less
            assert all((a - b).max() < 1e-12 for a, b in zip(buckets, buckets[1:], strict=False))
            assert rows(k=1, tail='renorm').abs().max() == 0
        if direction == 'reverse':
            negative += int((rows(k=2, tail='reward') < 0).sum())
    assert negative > 0


def test_a_bucket_holds_what_rounding_would_lose():
    """float32: models so sure of themselves that 1 minus the mass inside is rounding. Value and gradient of
    the forward direction, where the tail matters, against float64."""
    g = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(3, 50, generator=g) for _ in range(2))
    z_s[:, :4] += 17
    z_t[:, :4] += 12
    eye, w = torch.eye(3), torch.ones(3)
    y = torch.zeros(3, dtype=torch.long)
    ref = z_s.double().requires_grad_()
    want = opd_rows(ref, z_t.double(), y, 'topk', k=4, tail='bucket', direction='forward').sum()
    W = z_s.t().clone().requires_grad_()
    got, _ = opd_loss(eye, W, eye, z_t.t(), y, w, kind='topk', k=4, tail='bucket', direction='forward')
    outside = torch.autograd.grad(want, ref)[0][:, 4:]
    # A logit of 20 is off by 20 eps, and so is, relatively, its probability; about ten operations and fifty tokens.
    assert abs(got - want) <= rounding(want.float(), 20 * 10 + 50) and outside.abs().max() > 1e-5
    assert (torch.autograd.grad(got, W)[0].t()[:, 4:] - outside).norm() <= rounding(outside.float(), 20 * 10 + 50)


def sampled_gradients(future=False, baseline=False, loss=opd_loss):
    """Expected 'sampled' gradient, enumerated: every token at every position, weighted by p (detached)."""
    h, W, h_t, W_t, _, w, _ = problem(K=11)
    h, W = h[:2], W
    p = (h @ W[:V].t()).softmax(-1)
    total = [torch.zeros_like(h), torch.zeros_like(W)]
    for y in product(range(V), repeat=2):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        value, _ = loss(a, b, h_t[:2], W_t, torch.tensor(y), w[:2], torch.tensor([0, 0]), kind='sampled', vocab=V,
                        future=future, baseline=baseline, chunk=1)
        for t, g in zip(total, torch.autograd.grad(value, (a, b)), strict=True):
            t += p[0, y[0]] * p[1, y[1]] * g
    a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
    full, _ = opd_loss(a, b, h_t[:2], W_t, torch.tensor(y), w[:2], kind='full', vocab=V)
    return total, torch.autograd.grad(full, (a, b))


@pytest.mark.parametrize('future', [False, True])
@pytest.mark.parametrize('baseline', [False, True])
def test_expected_sampled_gradient_is_the_full_gradient(future, baseline):
    """Here positions do not influence each other, so later ratios only add noise of mean zero."""
    for got, want in zip(*sampled_gradients(future, baseline), strict=True):
        assert (got - want).abs().max() < 1e-12 < want.abs().max()


def test_back_propagating_the_log_ratio_would_be_caught():
    """The trap of Lemma 1: log p(y) - log q(y) differentiated directly has expected gradient 0. The
    enumeration above must tell the two apart."""
    def wrong(h, W, h_t, W_t, y, w, answer, **_):
        logp, logq = (h @ W[:V].t()).log_softmax(-1), (h_t @ W_t[:V].t()).log_softmax(-1)
        return (w * (logp - logq).gather(-1, y[:, None]).squeeze(-1)).sum(), None
    for got, want in zip(*sampled_gradients(loss=wrong), strict=True):
        assert got.abs().max() < 1e-12 < (got - want).abs().max()


def test_a_baseline_lowers_the_variance():
    h, W, h_t, W_t, _, w, _ = problem()
    g = torch.Generator().manual_seed(0)
    spread_of = {}
    for baseline in (False, True):
        grads = []
        for _ in range(400):
            y = torch.multinomial((h @ W[:V].t()).softmax(-1), 1, generator=g).squeeze(-1)
            a = h.clone().requires_grad_()
            loss, _ = opd_loss(a, W, h_t, W_t, y, w, kind='sampled', baseline=baseline, vocab=V)
            grads.append(torch.autograd.grad(loss, a)[0])
        spread_of[baseline] = torch.stack(grads).var(0).sum()
    assert spread_of[True] < 0.8 * spread_of[False]


def test_future_form_is_the_gradient_of_the_trajectory_kl():
    """A two-token language with a state: next logits depend on the previous token. KL over whole
    sequences by enumeration and autograd, against the expected estimator. The immediate form misses
    what a token does to later ones."""
    n, g = 3, torch.Generator().manual_seed(0)
    A, B = torch.randn(2, n + 1, n, generator=g, dtype=torch.float64)    # logits by previous token (n: start)
    A.requires_grad_()
    logp, logq = A.log_softmax(-1), B.log_softmax(-1)
    kl, total = 0.0, {f: torch.zeros_like(A) for f in (False, True)}
    for y in product(range(n), repeat=3):
        before = torch.tensor([n, y[0], y[1]])
        lp, lq = logp[before, list(y)].sum(), logq[before, list(y)].sum()
        kl = kl + lp.exp() * (lp - lq)
        for future in (False, True):
            a = A.detach().clone().requires_grad_()
            loss, _ = opd_loss(torch.eye(n + 1, dtype=A.dtype)[before], a.t(), torch.eye(n + 1, dtype=A.dtype)[before],
                               B.t(), torch.tensor(y), torch.ones(3, dtype=A.dtype), torch.zeros(3, dtype=torch.long),
                               kind='sampled', future=future, chunk=2)
            total[future] += lp.detach().exp() * torch.autograd.grad(loss, a)[0]
    want, = torch.autograd.grad(kl, A)
    assert (total[True] - want).abs().max() < 1e-12 < 1e-3 < (total[False] - want).abs().max()


def test_sums_to_the_end_of_each_answer():
    x = torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert sum_to_end(x, torch.tensor([0, 0, 0, 2, 2, 7])).tolist() == [6, 5, 3, 9, 5, 6]


@DTYPES
@pytest.mark.parametrize('kind', ['full', 'topk', 'sampled', 'supervised'])
def test_chunks_do_not_change_anything(kind, dtype):
    """Any chunk size, ragged last chunk; and no rows at all."""
    h, W, h_t, W_t, y, w, answer = problem(dtype=dtype)
    sums = 6 + 8 + 4 * V + 11                # of a logit, of the teacher's, over the vocabulary, over the rows
    results = []
    for chunk in (1, 2, 5, 11, 1000):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        loss, stats = opd_loss(a, b, h_t, W_t, y, w, answer, kind=kind, k=5, future=True, vocab=V, chunk=chunk)
        results.append([loss.detach(), stats, *torch.autograd.grad(loss, (a, b))])
    for other in results[:-1]:
        for x, want in zip(other, results[-1], strict=True):
            assert (x - want).norm() <= rounding(want, sums)
    none = slice(0, 0)
    a, b = h[none].requires_grad_(), W.clone().requires_grad_()
    loss, stats = opd_loss(a, b, h_t[none], W_t, y[none], w[none], answer[none], kind=kind, future=True, vocab=V)
    loss.backward()
    assert loss == 0 and stats.abs().max() == 0 and b.grad.abs().max() == 0 and a.grad.shape == (0, 6)


def test_logits_of_more_rows_than_a_chunk_are_never_made():
    """No tensor holds the vocabulary and more than a chunk of rows, in any order of axes; of the head's size
    there is its gradient and nothing else, forward and backward."""
    K, d, vocab, chunk = 40, 8, 301, 7
    h, W = torch.randn(K, d, requires_grad=True), torch.randn(vocab, d, requires_grad=True)
    for how in (dict(kind='full'), dict(kind='full', direction='forward'), dict(kind='topk', tail='bucket'), dict(kind='sampled'),
                dict(kind='supervised')):
        with Shapes() as watch:
            loss, _ = opd_loss(h, W, torch.randn(K, d), torch.randn(vocab, d), torch.zeros(K, dtype=torch.long),
                               torch.ones(K), **how, chunk=chunk)
            torch.autograd.grad(loss, (h, W))
        big = {s for s in watch.seen if vocab in s}
        assert (chunk, vocab) in big and all(sorted(s)[0] <= chunk + 1 and len(s) <= 3 for s in big), big
        new = [p for p in watch.owners if p[0] == (vocab, d)]
        assert len({p[1] for p in new} - {W.data_ptr()}) <= 2, how                        # the teacher's head, d_W


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('padding', [0, 3, 50])
@pytest.mark.parametrize('how', [*EVERY_OBJECTIVE, dict(kind='supervised'), dict(kind=None)], ids=lambda how: '-'.join(map(str, how.values())))
def test_matrices_of_an_odd_vocabulary_have_aligned_rows(how, padding, dtype):
    """A GPU's fast products take matrices whose rows begin at multiples of 16 bytes. Of Qwen's head 151,665 rows stand for
    tokens: logits and gradients of so many columns had none of these products. Any chunk; with and without rows of padding."""
    g = torch.Generator().manual_seed(0)
    h, W, h_t, W_t = (torch.randn(n, d, generator=g).to(dtype) for n, d in ((11, 16), (301 + padding, 16), (11, 24), (301 + padding, 24)))
    h.requires_grad_()
    W.requires_grad_()
    with Products() as products:
        loss, _ = opd_loss(h, W, h_t, W_t, torch.arange(11), torch.rand(11, generator=g), **how, vocab=301, chunk=4)
        if how['kind']:
            loss.backward()
            assert not W.grad[301:].any()
    # On a CPU the head's gradient is a sum in float32; see test_emulated_cuda.py for the products of CUDA.
    assert products.names == ({'mm', 'addmm_'} if how['kind'] else {'mm'}) and not products.unaligned


@pytest.mark.parametrize('K, V', [(3, 1), (5, COLUMNS - 1), (2, COLUMNS), (4, 2 * COLUMNS + 13), (0, 9)])
def test_row_dot_makes_no_third_matrix_and_no_product(K, V):
    """An einsum is a batched product of a row and a column there, which a GPU computes slowly; (a * b).sum(-1) makes a third
    (K, V)."""
    a, b = torch.randn(2, K, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with Shapes() as watch, Products() as products:
        got = row_dot(a, b)
    given = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (a, b)]
    new = [shape for shape, address in watch.owners if not any(address in memory for memory in given)]
    assert not products.names and all(len(shape) < 2 or shape[1] <= COLUMNS for shape in new)
    assert got.shape == (K,) and torch.allclose(got, (a * b).sum(-1), rtol=0, atol=1e-12 * V**0.5)


def test_a_second_backward_is_an_error_not_a_wrong_number():
    h, W, h_t, W_t, y, w, _ = problem()
    h.requires_grad_()
    loss, _ = opd_loss(h, W, h_t, W_t, y, w, kind='full', vocab=V)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


def test_bfloat16_rows_and_heads():
    """Losses in fp32: exactly 0 for identical models, near the float64 answer for others."""
    h, W, h_t, W_t, y, w, _ = (x.bfloat16() if x.is_floating_point() else x for x in problem())
    a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
    loss, stats = opd_loss(a, b, h_t, W_t, y, w, kind='full', vocab=V)
    loss.backward()
    A, B = h.double().requires_grad_(), W.double().requires_grad_()
    want = (w.double() * opd_rows(A @ B[:V].t(), h_t.double() @ W_t[:V].double().t(), y)).sum()
    want.backward()
    assert loss.dtype == stats.dtype == torch.float32 and a.grad.dtype == b.grad.dtype == torch.bfloat16
    # On a CPU the logits, up to 10, are bf16 themselves: log-probabilities are off by up to 10 eps / 2.
    assert abs(loss - want) <= rounding(want.bfloat16(), 5)
    for got, grad in ((a.grad, A.grad), (b.grad, B.grad)):
        assert (got - grad).norm() <= rounding(grad.bfloat16(), 5)
    same, _ = opd_loss(h, W, h.clone(), W.clone(), y, w, kind='full')
    assert same == 0


# ---- metrics, by hand ---------------------------------------------------------------------------

def common(a, b, k=16):
    return overlap(likeliest(a, k), likeliest(b, k))


def test_metrics_by_hand():
    """KL, entropies and overlap of distributions one can compute on paper, weighted 1 and 3; 20 tokens,
    the second student's 16 likeliest are tokens 4..19, the teacher's 0..15: twelve in common."""
    n = 20
    D = torch.float64
    flat, half = torch.full((n,), 1 / n, dtype=D), torch.tensor([0.5, 0.5] + [1e-30] * (n - 2), dtype=D)
    low, high = torch.arange(n, dtype=D) + 1, torch.arange(n, 0, -1, dtype=D)
    logits_s, logits_t = torch.stack([half.log(), low.log()]), torch.stack([flat.log(), high.log()])
    eye, w = torch.eye(2, dtype=D), torch.tensor([1.0, 3.0], dtype=D)
    _, stats = opd_loss(eye, logits_s.t(), eye, logits_t.t(), torch.zeros(2, dtype=torch.long), w, kind=None)
    p, q = low / low.sum(), high / high.sum()
    tied = common(half.log()[None], flat.log()[None])                    # ties: whatever topk takes of equals
    want = [4.0, math.log(n / 2) + 3 * float((p * (p / q).log()).sum()), math.log(2) - 3 * float((p * p.log()).sum()),
            math.log(n) - 3 * float((q * q.log()).sum()), float(tied) + 3 * 12 / 16]
    assert stats.tolist() == pytest.approx(want, rel=1e-12)
    assert common(low.log()[None], low.log()[None]) == 1
    assert common(torch.tensor([[3.0, 2, 1, 0]]), torch.tensor([[0.0, 1, 2, 3]]), k=2) == 0
    assert common(torch.tensor([[3.0, 2, 1]]), torch.tensor([[0.0, 1, 2]])) == 1          # fewer than 16 tokens


def test_spread_positions():
    """About the share asked for in every answer, a function of t and step alone; everything at share 1."""
    B, T = 6, 20_000
    roll = Rollout(torch.zeros(B, T, dtype=torch.long), torch.tensor([1, 5, 9, 1, 2, 3]), torch.tensor([19_990, 19_980, 2000, 500, 7, 19_997]),
                   torch.ones(B, dtype=torch.bool), torch.arange(B))
    m = position_mask(roll, 'all')
    some = diagnostic_mask(roll, m, 3, 0.1)
    assert not (some & ~m).any() and abs(some.sum() / m.sum() - 0.1) < 0.01
    for b in (0, 1, 2, 5):
        assert abs(some[b].sum() / m[b].sum() - 0.1) < 0.005
        P = int(roll.prompt_len[b])
        assert torch.equal(some[b, P - 1:P + 1900], some[0, :1901]), 'the same t in every answer'
    assert not torch.equal(some, diagnostic_mask(roll, m, 4, 0.1)) and torch.equal(diagnostic_mask(roll, m, 4, 7.0), m)


# ---- drift weights -------------------------------------------------------------------------------

def test_drift_weights():
    """Each answer keeps its weight; within it positions count by their distance. Value and gradient
    against autograd with the same weights held constant; the cosine is logged evenly."""
    g = torch.Generator().manual_seed(0)
    h, h_t = torch.randn(2, 5, 6, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(7, 6, generator=g, dtype=torch.float64)
    at, answer = torch.tensor([0, 1, 2, 4, 5, 8, 9]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    w = torch.tensor([1., 1, 1, 1, 2, 2, 2], dtype=torch.float64) / 10
    s = h.detach().flatten(0, 1)[at]
    far = (s - h_t).square().mean(-1)
    want_w = torch.cat([0.4 * far[:4] / far[:4].sum(), 0.6 * far[4:] / far[4:].sum()])
    assert torch.allclose(drift_weights(w, far, answer), want_w)
    want = oprd_loss([h.flatten(0, 1)[at]], [h_t], want_w)
    want_grad, = torch.autograd.grad(want, h)
    _, loss, cos = layer_loss(h, h_t.clone(), at, w, 'mse', answer)
    assert abs(loss - want) < 1e-12 and (torch.autograd.grad(loss, h)[0] - want_grad).abs().max() < 1e-12
    assert abs(cos - (w * torch.cosine_similarity(s, h_t)).sum()) < 1e-12
    assert (drift_weights(w, torch.zeros_like(w), answer) == 0).all()          # nothing left to learn: no 0/0
    for kind, near in itertools.product(('mse', 'nmse', 'cosine'), (0.0, 1e-4)):
        same = torch.randn(2, 5, 96, generator=g, requires_grad=True)     # 1 - cos of equal rows is rounding
        twin = same.detach().flatten(0, 1)[at] + near * torch.randn(7, 96, generator=g)
        _, loss, _ = layer_loss(same, twin, at, w.float(), kind, answer)
        assert abs(loss) < 1e-5 and torch.autograd.grad(loss, same)[0].abs().max() < 1e-3


# ---- Eq. (7) through the models -------------------------------------------------------------------

def composite(budget, oprd_weight=0.3, opd_weight=1.7, layers=(1, 3), recompute=False, tied=False, drift=False,
              dtype=torch.float64, **how):
    student, teacher = (tiny_model(seed, tied=tied).to(dtype) for seed in (0, 1))
    student.checkpointing = recompute
    roll = rollout(V=33)
    w = position_weights(position_mask(roll, 'last_k', 4))
    sums = step_sums(student, teacher, roll, w, {l: l for l in layers}, budget, 1.9, oprd_weight=oprd_weight,
                     opd_weight=opd_weight, output=make_objective(vocab=33, chunk=3, **how), drift=drift)
    return sums, {n: p.grad for n, p in student.named_parameters()}


@DTYPES
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('how', [dict(kind='full'), dict(kind='topk', k=4), dict(kind='sampled'), dict(kind='sampled', future=True)])
@pytest.mark.parametrize('layers, oprd_weight', [((1, 2, 3), 0.3), ((1, 2), 0.3), ((1, 2, 3), 0.0)])
def test_equation_7_through_the_model(layers, oprd_weight, how, tied, dtype):
    """The composite's gradient of every weight, embedding and head included, against autograd on whole
    logits; the last layer with and without a loss of its own."""
    student, teacher = (tiny_model(seed, tied=tied).to(dtype) for seed in (0, 1))
    roll = rollout(V=33)
    w = position_weights(position_mask(roll, 'last_k', 4)).flatten()
    at = w.nonzero().squeeze(-1)
    w, y, answer = w[at], roll.ids.flatten()[at + 1], at // roll.ids.shape[1]
    h_t = hidden_rows(teacher, roll.ids, dict.fromkeys(PHI, at), PHI)
    h = student.hidden(roll.ids, [1, 2, 3], at)
    logits = student.head(h[-1])[:, :33]
    if how.get('future'):
        ratio = opd_rows(logits, teacher.head(h_t[3])[:, :33], y, 'sampled').detach()
        out = (sum_to_end(w * ratio, answer) * logits.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)).sum()
    else:
        out = (w * opd_rows(logits, teacher.head(h_t[3])[:, :33], y, **how)).sum()
    rep = oprd_loss([h[l - 1] for l in layers], [h_t[l] for l in layers], w)
    (1.9 * (oprd_weight * rep + 1.7 * out)).backward()
    rep, out = rep.item(), out.item()
    sums, grads = composite(10**6, oprd_weight, layers=layers, tied=tied, dtype=dtype, **how)
    for name, p in student.named_parameters():
        assert (grads[name] - p.grad).norm() <= rounding(p.grad, TINY_SUMS), name
    logged = rounding(flat_sums(sums).float(), TINY_SUMS if dtype == torch.float32 else 100)
    assert abs(sums.get('loss/oprd', 0.0) - (rep if oprd_weight else 0.0)) <= logged
    if not how.get('future'):
        assert abs(sums['loss/opd'] - out) <= logged
    assert abs(sums['statistics'][0] - 1) <= logged


@DTYPES
@pytest.mark.parametrize('how', [dict(kind='full'), dict(kind='topk', support='union', tail='bucket'),
                                 dict(kind='sampled', future=True, baseline=True), dict(kind='full', drift=True)])
def test_micro_batches_do_not_change_the_composite(how, dtype):
    """One row at a time, or everything at once; blocks recomputed; all sums that are logged, in float32."""
    want_sums, want = composite(10**6, dtype=dtype, **how)
    for budget, recompute in ((1, False), (25, True)):
        sums, grads = composite(budget, recompute=recompute, dtype=dtype, **how)
        sums, want_flat = flat_sums(sums), flat_sums(want_sums)
        assert (sums - want_flat).norm() <= rounding(want_flat.float(), TINY_SUMS if dtype == torch.float32 else 100)
        for name in want:
            assert (grads[name] - want[name]).norm() <= rounding(want[name], TINY_SUMS), name


def test_a_probe_looks_and_changes_nothing():
    """Diagnosis in an OPRD-only step: the same gradient to the bit, the exact metrics of the probed
    positions, whatever the micro-batches; rows x V only for the probed rows."""
    V_big, roll = 997, rollout(V=997)
    m = position_mask(roll, 'all')
    probe = diagnostic_mask(roll, m, 1, 0.4)
    w, K = position_weights(m, 'token'), int(probe.sum())
    assert 3 < K < int(m.sum())
    teacher, results = tiny_model(1, V=V_big).double(), []
    for budget, look in ((10**6, None), (10**6, probe), (15, probe)):
        student = tiny_model(0, V=V_big).double()
        student.head.requires_grad_(False)
        with Shapes() as watch:
            sums = step_sums(student, teacher, roll, w, {1: 1, 2: 2}, budget, output=make_objective('full', vocab=900), probe=look)
        results.append((sums, [p.grad for p in student.parameters()]))
        rows = {s for s in watch.seen if (V_big in s or 900 in s) and V_big not in s[:1] and 900 not in s[:1] and s[0] != 20}
        assert bool(rows) == (look is not None) and all(s[0] <= K for s in rows)
    plain, probed, small = results
    assert 'statistics' not in plain[0] and torch.equal(plain[0]['loss/oprd'], probed[0]['loss/oprd'])
    assert 'layer_cosine' in plain[0]        # of the objective's own rows
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain[1], probed[1], strict=True))
    logged = rounding(flat_sums(probed[0]).float(), 100)
    assert (flat_sums(small[0]) - flat_sums(probed[0])).norm() <= logged
    at = probe.flatten().nonzero().squeeze(-1)
    z_s, z_t = (model.head(model.hidden(roll.ids, [3], at)[0])[:, :900].detach() for model in (tiny_model(0, V=V_big).double(), teacher))
    weight, kl, H_s, H_t, common = (probed[0]['statistics'] / probed[0]['looked']).tolist()
    p, q = z_s.log_softmax(-1), z_t.log_softmax(-1)
    assert kl == pytest.approx(float(divergence(p, q).mean()), abs=logged)
    assert H_s == pytest.approx(float(-(p.exp() * p).sum(-1).mean()), abs=logged)
    assert H_t == pytest.approx(float(-(q.exp() * q).sum(-1).mean()), abs=logged)
    both = [len(set(a.tolist()) & set(b.tolist())) / 16 for a, b in zip(p.topk(16).indices, q.topk(16).indices, strict=True)]
    assert common == pytest.approx(sum(both) / len(both), abs=logged) and 0 < common < 1


def test_one_student_forward_for_both_terms(monkeypatch):
    """Rollout apart, a step reads its rows once with each model, whatever the objective."""
    from model import Model
    real, calls = Model.trunk, []
    monkeypatch.setattr(Model, 'trunk', lambda self, *a, **k: calls.append(self) or real(self, *a, **k))
    composite(10**6, kind='topk')
    assert len(calls) == 2 and calls[0] is not calls[1]


# ---- the weights of Eq. (7) -----------------------------------------------------------------------

def test_weight_schedules():
    assert [weight_at(s, 4, 0.5) for s in (1, 4)] == [0.5, 0.5] and ever_positive(0.5) and not ever_positive(0.0)
    ramp = [[0, 0], [0.5, 1]]
    assert [weight_at(s, 4, ramp) for s in (1, 2, 3, 4)] == [0, 0.5, 1, 1]
    jump = [[0, 1], [0.5, 1], [0.5, 0]]
    assert [weight_at(s, 4, jump) for s in (1, 2, 3, 4)] == [1, 1, 0, 0]
    assert [weight_at(s, 4, [[0.5, 2], [0.75, 4]]) for s in (1, 2, 3, 4)] == [2, 2, 2, 4]
    assert ever_positive(jump) and not ever_positive([[0, 0], [1, 0]])
