"""Theorem 1's experiment: moments by enumeration through the training code, draws of the sampler, closed forms."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import argv, rounding, step_sums, tiny_model

from configs import load_config
from formats.huggingface import save_model
from output_losses import make_objective, opd_rows
from paper import theorem1 as t1
from paper.runs import Missing
from rollout import Rollout, sample
from support.runtime import UserError

V = 9
EPS = torch.finfo(torch.float64).eps


def pair_of(distance=1.0, **shape):
    """A random student, and a teacher that is some way from it, in float64."""
    student = tiny_model(0, V=V, **shape).double()
    other = tiny_model(1, V=V, **shape).double()
    teacher = t1.Pair(other, student, [], [], V).at(distance).requires_grad_(False)
    return t1.Pair(student, teacher, [[1, 2, 3], [4, 5]], [0], V)


def answers_of(prompt, answers):
    """Answers to one prompt as a Rollout; all have the same length."""
    ids = torch.tensor([[*prompt, *answer] for answer in answers])
    count = len(answers)
    return Rollout(ids, torch.full((count,), len(prompt)), torch.full((count,), len(answers[0])),
                   torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long))


def gradient_of_step(pair, prompt, token, name):
    """The gradient by all weights that a training step forms, where the prompt is answered with one token."""
    model = pair.at(1)
    objective = None
    if name != 'OPRD':
        objective = make_objective(**t1.OBJECTIVES[name], vocab=V)
    roll = answers_of(prompt, [[token]])
    weights = torch.zeros(roll.ids.shape, dtype=torch.float64)
    weights[0, len(prompt) - 1] = 1
    hidden = name == 'OPRD'
    step_sums(model, pair.teacher, roll, weights, {1: 1, 2: 2, 3: 3}, output=objective,
              oprd_weight=float(hidden), opd_weight=float(not hidden))
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in model.parameters()])


@pytest.mark.parametrize('name', ['OPRD', *t1.OBJECTIVES])
def test_moments_are_those_of_the_gradients_of_training_steps(name):
    """Every token, one after the other, through step.accumulate: mean and variance of N numbers each. The experiment
    carries V numbers and J J' instead; and the objectives that read no token must have a variance of 0."""
    pair = pair_of()
    prompt = [1, 4, 2, 7]
    gradients = torch.stack([gradient_of_step(pair, prompt, token, name) for token in range(V)])         # (V, N)
    ids = torch.tensor([prompt])
    z_s, z_t = (t1.logits_at(model, ids, torch.tensor([3]), V) for model in (pair.student, pair.teacher))
    p = z_s.softmax(-1)
    mean = p[0] @ gradients
    want_signal = mean.square().sum()
    want_variance = p[0] @ (gradients - mean).square().sum(-1)

    look = t1.look_at(pair.at(1), pair.teacher, ids, V)
    assert (look.logits - z_s).abs().max() < 1e-13
    if name == 'OPRD':
        assert look.hidden_signal == pytest.approx(float(want_signal), rel=1e-10) and want_signal > 1e-4
        assert (gradients == gradients[0]).all()
        return
    signal, variance = t1.moments(p, t1.token_gradients(z_s, z_t, **t1.OBJECTIVES[name]), look.gram)
    assert float(signal) == pytest.approx(float(want_signal), rel=1e-10) and want_signal > 1e-4
    if name == 'OPD top-1':
        assert float(variance) == pytest.approx(float(want_variance), rel=1e-10) and want_variance > 1e-2
    else:
        assert float(variance) == 0 and (gradients == gradients[0]).all()


def test_moments_are_those_of_tokens_that_the_sampler_draws():
    """4,000 answers of one token from rollout.sample. Mean squared length of the gradient, and its product with the
    exact mean, each within four of their own standard errors."""
    pair = pair_of()
    prompt = [1, 4, 2, 7]
    roll = sample(pair.student, [prompt], 4000, max_new_tokens=1, stop=[0], seed=3)
    tokens = roll.ids[:, -1]
    by_token = torch.stack([gradient_of_step(pair, prompt, token, 'OPD top-1') for token in range(V)])   # (V, N)
    ids = torch.tensor([prompt])
    z_s, z_t = (t1.logits_at(model, ids, torch.tensor([3]), V) for model in (pair.student, pair.teacher))
    look = t1.look_at(pair.at(1), pair.teacher, ids, V)
    signal, variance = t1.moments(z_s.softmax(-1), t1.token_gradients(z_s, z_t, kind='sampled'), look.gram)

    squares = by_token.square().sum(-1)[tokens]
    assert abs(squares.mean() - (signal + variance)) < 4 * squares.std() / math.sqrt(4000)
    assert squares.std() / math.sqrt(4000) < 0.05 * variance                 # a bound that says something
    mean = gradient_of_step(pair, prompt, 0, 'OPD full KL')                  # the mean of Eq. (3) is Eq. (4)
    products = (by_token @ mean)[tokens]
    assert abs(products.mean() - signal) < 4 * products.std() / math.sqrt(4000)


def test_two_tokens_in_closed_form():
    """With log-ratios a, b of two tokens of probability P, 1 - P: signal 2 P^2 (1-P)^2 (a-b)^2, variance
    2 P (1-P) (a (1-P) + b P)^2. Both families, at every delta, and their slopes."""
    data = t1.families_data()
    for number, delta in enumerate(data['delta']):
        inner = math.exp(delta) * 0.1 / (0.9 + math.exp(delta) * 0.1)
        for name, P, Q in (('inner', inner, 0.1), ('rare', 4 * delta, delta)):
            a = math.log(P / Q)
            b = math.log1p(-P) - math.log1p(-Q)
            want = {'kl': P * a + (1 - P) * b, 'signal': 2 * (P * (1 - P) * (a - b)) ** 2,
                    'variance': 2 * P * (1 - P) * (a * (1 - P) + b * P) ** 2}
            # A log-ratio is a difference of logits, which are off by an eps; the inner KL a difference of log-ratios.
            error = 100 * EPS / delta if name == 'inner' else 100 * EPS
            for what, value in want.items():
                bound = error / delta if what == 'kl' and name == 'inner' else error
                assert data[name][what][number] == pytest.approx(value, rel=bound + 1e-9), (name, what, delta)
    ends = {name: data['inner' if name == 'inner' else 'rare'] for name in ('inner', 'rare')}
    for name, exponents in (('inner', (1, 1)), ('rare', (2, 1))):
        for what, exponent in zip(('signal', 'variance'), exponents, strict=True):
            measured, _ = t1.slope(ends[name]['kl'][:6], ends[name][what][:6])
            assert measured == pytest.approx(exponent, abs=1e-3), (name, what)
    near = data['inner']['signal'][0] / data['inner']['variance'][0]
    assert near == pytest.approx(t1.two_token_ratio(0.1), rel=1e-4)
    rare = data['rare']
    assert rare['signal'][0] / rare['variance'][0] == pytest.approx(4 * data['delta'][0], rel=1e-4)


def test_a_smooth_family_has_the_coefficients_of_its_taylor_series():
    """Logits z + delta u, V tokens: with u centred under q, KL = delta^2/2 sum q u^2, signal = delta^2 sum q^2 u^2 and
    signal + variance = delta^2 sum q u^2 (1 - 2 q + |q|^2), each but for a relative error of the order of delta."""
    g = torch.Generator().manual_seed(0)
    z, u = torch.randn(2, 5, V, generator=g, dtype=torch.float64)
    q = z.softmax(-1)
    u = u - (q * u).sum(-1, keepdim=True)
    delta = 1e-4
    kl = t1.kl_rows(z + delta * u, z)
    p = (z + delta * u).softmax(-1)
    signal, variance = t1.moments(p, t1.token_gradients(z + delta * u, z, kind='sampled'))
    lengths = 1 - 2 * q + q.square().sum(-1, keepdim=True)
    for got, want in ((kl, (q * u**2).sum(-1) / 2), (signal, (q**2 * u**2).sum(-1)),
                      (signal + variance, (q * u**2 * lengths).sum(-1))):
        assert ((got / delta**2 - want) / want).abs().max() < 50 * delta


def test_the_ratio_stays_above_half_of_the_smallest_probability():
    """Why the ratio cannot go to 0 at a fixed teacher: signal = sum p^2 (r - KL)^2 >= min p Var(r), and variance <= 2
    (Var(r) + KL^2), whose last term is of higher order. Of the logits, any two distributions."""
    g = torch.Generator().manual_seed(0)
    z_s, z_t = 2 * torch.randn(2, 500, V, generator=g, dtype=torch.float64)
    for left in (1, 0.1, 1e-3):
        z = z_t + left * (z_s - z_t)
        p = z.softmax(-1)
        kl = t1.kl_rows(z, z_t)
        log_ratio = z.log_softmax(-1) - z_t.log_softmax(-1)
        spread = (p * (log_ratio - kl[:, None]).square()).sum(-1)
        signal, variance = t1.moments(p, t1.token_gradients(z, z_t, kind='sampled'))
        bound = p.min(-1).values / 2 / (1 + kl**2 / spread)
        assert (signal / variance > bound).all()
    assert (kl**2 / spread).max() < 1e-3


def test_at_the_teacher_the_variance_is_zero_unless_the_score_stays_in():
    """Every reward is 0 at student = teacher. With the score left in, the variance is the trace of the Fisher
    information, 1 - |p|^2 in the logits, and the mean is 0."""
    z = torch.randn(4, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = z.softmax(-1)
    gradients = t1.token_gradients(z, z, kind='sampled')
    signal, variance = t1.moments(p, gradients)
    assert signal.abs().max() == 0 and variance.abs().max() == 0
    signal, variance = t1.moments(p, gradients + t1.score_gradients(z))
    assert signal.max() < 1e-30 and (variance - (1 - p.square().sum(-1))).abs().max() < 1e-14


def test_the_score_is_the_gradient_of_the_log_probability():
    z = torch.randn(2, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    scores = t1.score_gradients(z.detach())
    for k in range(2):
        for y in range(V):
            want, = torch.autograd.grad(z.log_softmax(-1)[k, y], z, retain_graph=True)
            assert (scores[k, y] - want[k]).abs().max() < 1e-15


def test_the_noise_of_sampled_tokens_adds_up_over_positions():
    """All 81 answers of two tokens, weighed by their probability: the mean squared distance between the gradients of
    Eq. (3) and of the exact KL is the sum of w^2 times the variance at each prefix. Noise at one position says nothing
    about that at another one."""
    pair = pair_of()
    prompt = [1, 4]
    answers = [[a, b] for a in range(V) for b in range(V)]
    roll = answers_of(prompt, answers)
    model = pair.at(1)
    gradients = t1.answer_gradients(pair, model, roll)
    p = model(roll.ids).detach().softmax(-1)
    rows = torch.arange(len(answers))
    first = p[rows, 1, roll.ids[:, 2]]
    probability = first * p[rows, 2, roll.ids[:, 3]]
    assert float(probability.sum()) == pytest.approx(1)
    distance = (gradients.of['OPD top-1'] - gradients.of['OPD full KL']).double().square().sum(-1)
    assert gradients.token_noise == pytest.approx(float(distance.mean()), rel=1e-4)

    def variance_after(prefix):
        ids = torch.tensor([prefix])
        look = t1.look_at(model, pair.teacher, ids, V)
        z_t = t1.logits_at(pair.teacher, ids, torch.tensor([len(prefix) - 1]), V)
        return t1.moments(look.logits.softmax(-1), t1.token_gradients(look.logits, z_t, kind='sampled'), look.gram)[1]

    second = sum(first[V * a] * variance_after([*prompt, a]) for a in range(V))
    want = float(variance_after(prompt) + second) / 4
    # The gradients are kept in float32: each number is off by half an eps, relative to the longer of the two.
    terms = gradients.of['OPD top-1'].norm(dim=-1).max()
    assert float(probability @ distance) == pytest.approx(want, abs=rounding(terms, 2) * math.sqrt(want))
    # KL: the mean over the two positions, then over the answers.
    z_s, z_t = (model_(roll.ids)[:, 1:3].detach().flatten(0, 1) for model_ in (model, pair.teacher))
    assert gradients.kl == pytest.approx(float(opd_rows(z_s, z_t, None, 'full').mean()), rel=1e-12)


def test_signal_to_noise_by_the_vectors_themselves():
    """|mean|^2 - trace(covariance)/n over trace(covariance), and the jackknife by leaving out vectors. Here the
    products are of the same vectors as the squares."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 30, generator=g, dtype=torch.float64) + 0.3

    def by_vectors(rows):
        variance = rows.var(0).sum()
        return float((rows.mean(0).square().sum() - variance / len(rows)) / variance)

    ratio, error = t1.signal_to_noise(x @ x.t(), x.square().sum(-1))
    assert ratio == pytest.approx(by_vectors(x), rel=1e-12)
    left_out = torch.tensor([by_vectors(torch.cat([x[:i], x[i + 1:]])) for i in range(12)], dtype=torch.float64)
    assert error == pytest.approx(float((11 * left_out.var(correction=0)).sqrt()), rel=1e-12)
    # Twice the variance around the same mean: half the ratio, but for the mean's own square.
    _, larger = ratio, t1.signal_to_noise(x @ x.t(), 2 * x.square().sum(-1))[0]
    signal = ratio / (1 + ratio) * float(x.square().sum(-1).mean())
    assert larger == pytest.approx(signal / (2 * float(x.square().sum(-1).mean()) - signal), rel=1e-12)


def test_slopes():
    x = [1e-8, 1e-5, 1e-3, 0.1]
    exponent, error = t1.slope(x, [3 * value**1.7 for value in x])
    assert exponent == pytest.approx(1.7) and error < 1e-7
    assert t1.slope([0, *x], [5, *(value**2 for value in x)])[0] == pytest.approx(2)
    assert t1.slope(x, [0.0] * 4) is None
    import numpy as np
    y = [2.0, 1.0, 7.0, 5.0]
    fit, covariance = np.polyfit(np.log(x), np.log(y), 1, cov='unscaled')
    residual = np.log(y) - np.polyval(fit, np.log(x))
    assert t1.slope(x, y) == pytest.approx([fit[0], math.sqrt(covariance[0, 0] * (residual**2).sum() / 2)])


def test_the_way_begins_at_the_student_and_ends_at_the_teacher():
    pair = pair_of()
    for left in (1, 0.25, 0):
        for got, begin, end in zip(pair.at(left).parameters(), pair.student.parameters(), pair.teacher.parameters(), strict=True):
            assert (got - (end + left * (begin - end))).abs().max() < 1e-15
    assert not any(w.requires_grad for w in pair.teacher.parameters())


def test_positions_stand_for_all():
    """At even ranks: of ten positions, four stand at ranks 1, 3, 6 and 8 of their KL."""
    kl = [9.0, 0.0, 8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0]
    assert [kl[k] for k in t1.spread_out(kl, 4)] == [1.0, 3.0, 6.0, 8.0]
    assert sorted(t1.spread_out(kl, 99)) == list(range(10))


def test_what_is_not_above_its_error_is_an_upper_limit():
    """A negative estimate has no logarithm, and a small one with a large error would look like a measurement."""
    values, bars, is_limit = t1.shown_ratios([0.5, 0.01, -0.3], [0.1, 0.02, 0.2])
    assert values == pytest.approx([0.5, 0.05, 0.4]) and is_limit == [False, True, True]
    assert bars == pytest.approx([0.1, 0.025, 0.2])


@pytest.fixture(scope='module')
def small(toy_cfg, tmp_path_factory):
    """The command on the tiny toy -> its numbers, files, and pair."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(PREFIX_ANSWERS=2, POSITIONS=3, ROLLOUTS=4, MAX_NEW_TOKENS=6).items():
            patch.setattr(t1, name, value)
        files = t1.theorem1([], tmp_path_factory.mktemp('theorem1'), toy_cfg['student'], toy_cfg['teacher'])
        pair = t1.load_pair(toy_cfg['student'], toy_cfg['teacher'], toy_cfg['data'])
    return SimpleNamespace(files=files, numbers=json.loads(files[0].read_text()), pair=pair)


def test_the_command_on_a_toy(small):
    """Shapes, exact zeros, and the two slopes of 1 near a teacher that has no zeros."""
    numbers = small.numbers
    assert [file.name for file in small.files] == ['theorem1.json', 'theorem1.png', 'theorem1.pdf']
    assert all(file.stat().st_size > 1000 for file in small.files)
    way = numbers['way']
    assert len(way['kl']) == 3 and all(len(series) == len(t1.LEFT) for series in way['kl'])
    for name in ('OPD top-2', 'OPD full KL'):
        assert way[f'variance {name}'] == [[0.0] * len(t1.LEFT)] * 3 and numbers['slopes'][f'end variance {name}'] is None
    assert numbers['variance OPRD'] == 0
    for name in ('signal OPRD', 'signal OPD top-1', 'signal OPD full KL', 'variance OPD top-1'):
        assert numbers['slopes'][f'end {name}'][0] == pytest.approx(1, abs=0.05), name
    assert numbers['slopes']['end left'][0] == pytest.approx(2, abs=0.05)
    assert abs(numbers['slopes']['end variance OPD top-1 + grad log p'][0]) < 0.05
    assert way['signal OPD top-1'] == [pytest.approx(series, rel=1e-5) for series in way['signal OPD full KL']]
    rollouts = numbers['rollouts']
    assert all(len(rollouts[name]) == len(t1.LEFT_ROLLOUTS) for name in ('OPRD', 'OPD top-1', 'token share', 'kl'))


def test_the_numbers_of_a_position(small):
    """One position of the toy, by other functions: KL and unsure from probabilities in plain numbers."""
    roll = small.pair.rollout(small.pair.student, 2, step=1)
    student, teacher = (model(roll.ids).log_softmax(-1).detach() for model in (small.pair.student, small.pair.teacher))
    column = int(roll.prompt_len[0]) - 1
    p, q = student[0, column].tolist(), teacher[0, column].tolist()
    columns = small.numbers['positions']['untrained']
    assert columns['kl'][0] == pytest.approx(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)), rel=1e-5)
    means = small.numbers['all positions']
    assert means['kl'][0] == pytest.approx(sum(columns['kl']) / len(columns['kl']), rel=1e-5)
    ratios = sorted(a / b for a, b in zip(columns['signal'], columns['variance'], strict=True))
    assert means['median ratio'][0] == pytest.approx(ratios[(len(ratios) - 1) // 2], rel=1e-5)
    assert columns['unsure'][0] == pytest.approx(1 - math.exp(max(p)), rel=1e-5)


def test_the_figure_shows_the_numbers(small, tmp_path, kept):
    """What is drawn is what is in the file; and the same numbers give the same bytes."""
    again = t1.draw_theorem1(small.numbers, tmp_path / 'again')
    for old, new in zip(small.files[1:], again, strict=True):
        assert old.read_bytes() == new.read_bytes()
    way = small.numbers['way']
    lines = {line.get_label().partition(' (')[0]: line for line in kept[0].axes[0].lines}
    series = way['variance OPD top-1']
    assert list(lines['variance, top-1'].get_ydata()) == pytest.approx([sum(values) / 3 for values in zip(*series, strict=True)])
    assert list(lines['variance, top-1'].get_xdata()) == pytest.approx([sum(values) / 3 for values in zip(*way['kl'], strict=True)])
    points = kept[0].axes[1].collections[0].get_offsets()
    columns = small.numbers['positions']['untrained']
    assert points.tolist() == [list(point) for point in zip(columns['kl'], columns['variance'], strict=True)]


def test_without_folders_it_takes_the_pair_of_the_toy(small, toy_dir, monkeypatch):
    monkeypatch.setattr(t1, 'load_config', lambda words: load_config(argv(toy_dir, 'unused')))
    pair = t1.load_pair('', '', '')
    for got, want in ((pair.student, small.pair.student), (pair.teacher, small.pair.teacher)):
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))
    assert pair.prompts[:4] == small.pair.prompts and len(pair.prompts) == 40


def test_what_cannot_be_measured_is_told(toy_cfg, tmp_path, monkeypatch):
    """One line each, before anything is computed."""
    student, teacher = toy_cfg['student'], toy_cfg['teacher']
    with pytest.raises(UserError, match='theorem1 reads no run'):
        t1.theorem1(['out/toy'])
    with pytest.raises(UserError, match='give student=FOLDER and teacher=FOLDER'):
        t1.theorem1([], tmp_path, student=student)
    with pytest.raises(Missing, match='give data=FILE'):
        t1.theorem1([], tmp_path, student, teacher, data=str(tmp_path / 'no.jsonl'))
    save_model(tiny_model(V=21, context=64), tmp_path / 'other', source=student)
    with pytest.raises(UserError, match='a pair of one shape'):
        t1.theorem1([], tmp_path, student, str(tmp_path / 'other'), data=toy_cfg['data'])
    with pytest.raises(UserError, match='have the same weights'):
        t1.theorem1([], tmp_path, student, student)
    monkeypatch.setattr(t1, 'MOST_NUMBERS', 1000)
    with pytest.raises(UserError, match='such as the toy'):
        t1.theorem1([], tmp_path, student, teacher)
    assert not (tmp_path / 'theorem1.json').exists()
