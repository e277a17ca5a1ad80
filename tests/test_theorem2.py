"""Theorem 2 as an experiment: what each of its numbers is held against."""
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import argv, tiny_model

from configs import load_config
from distill import main as distill_main
from formats.huggingface import load_model, save_model
from formats.tokenizer import load_tokenizer
from output_losses import opd_rows
from paper import theorem2
from paper.__main__ import main
from paper.runs import Missing
from paper.theorem2 import (
    Pair,
    curvature,
    head_and_norm,
    head_basis,
    kl_bound,
    kl_rows,
    output_after,
    output_losses,
    read_pair,
    split,
    theorem2_data,
    twin_of,
)
from support.runtime import UserError

SMOL = Path(os.environ.get('SMOLLM2', '/nowhere'))
EPS = torch.finfo(torch.float64).eps


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_random_norms(**shape):
    """A tiny model in float64 whose norms and biases are random, so that moving them into a matrix matters."""
    model = tiny_model(**shape).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, dtype=torch.float64, generator=generator) + 0.5)
    return model


def pair_of(student, teacher, seed=0):
    """A Pair on random ids: every position but the first two and the last of each row."""
    V = student.config.V
    ids = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(seed))
    at = torch.tensor([row * 9 + column for row in range(3) for column in range(2, 8)])
    return Pair(student, teacher, ids, at, ids.flatten()[at + 1], V)


# ---- the head's directions --------------------------------------------------------------------------

@pytest.mark.parametrize('V, d', [(5, 12), (12, 12), (13, 12), (90, 12)])
def test_the_basis_is_the_svd_of_the_centred_head(V, d, monkeypatch):
    """Against numpy on the whole matrix. A slice of the vocabulary left out, a mean over the wrong axis, or rows
    instead of columns of V' would be seen; so would a null space that forgets the constant (V = d = 12 has one
    dimension, V = 13 has none)."""
    monkeypatch.setattr(theorem2, 'ROWS_OF_A_MATRIX', 7)
    W = randn(V, d) + 3
    basis = head_basis(W)
    centred = W.numpy() - W.numpy().mean(0)
    sigma = numpy.linalg.svd(centred, compute_uv=False)
    assert basis.seen == min(V - 1, d) == numpy.linalg.matrix_rank(centred)
    assert numpy.allclose(basis.sigma[:len(sigma)], sigma, rtol=0, atol=100 * EPS * sigma[0])
    assert basis.sigma[len(sigma):].abs().max().item() == 0 if d > len(sigma) else True

    # Each direction has the length of its singular value in the centred logits, and they are orthonormal.
    lengths = numpy.linalg.norm(centred @ basis.directions.numpy(), axis=0)
    assert numpy.allclose(lengths, basis.sigma, rtol=0, atol=100 * EPS * sigma[0])
    assert torch.allclose(basis.directions.t() @ basis.directions, torch.eye(d).double(), atol=100 * EPS)


def test_a_difference_that_adds_a_constant_to_all_logits_is_in_the_null_space():
    """span{1}, and not only W dh = 0: an SVD of the head that is not centred would lose this direction."""
    W = randn(5, 12)
    dh = torch.linalg.pinv(W) @ torch.full((5,), 2.5, dtype=torch.float64)
    assert torch.allclose(W @ dh, torch.full((5,), 2.5, dtype=torch.float64))
    low, rest = split(dh[None], head_basis(W))
    assert torch.allclose(low, dh[None], atol=100 * EPS) and rest.abs().max() < 100 * EPS


def test_the_parts_of_a_difference_are_those_of_a_projection():
    """Against least squares on the rows of the centred head. The low part has centred logits of 0, the rest is what a
    combination of the head's rows can say."""
    W = randn(5, 12)
    difference = randn(7, 12, seed=1)
    low, rest = split(difference, head_basis(W))
    centred = (W - W.mean(0)).numpy()
    coefficients = numpy.linalg.lstsq(centred.T, difference.numpy().T, rcond=None)[0]
    assert numpy.allclose((centred.T @ coefficients).T, rest, atol=1e-13)
    assert torch.allclose(low + rest, difference) and abs(float((low * rest).sum())) < 1e-12
    assert numpy.abs(low.numpy() @ centred.T).max() < 1e-13

    # So many of the lowest as asked for, where there is no null space: all but the first direction.
    W = randn(40, 6)
    basis = head_basis(W)
    assert basis.low() == 1 and basis.low(5) == 5
    _, _, V_t = numpy.linalg.svd(W.numpy() - W.numpy().mean(0))
    difference = randn(7, 6, seed=2)
    low, rest = split(difference, basis, 5)
    first = numpy.outer(V_t[0], V_t[0])
    assert numpy.allclose(rest, difference.numpy() @ first) and numpy.allclose(low + rest, difference)


# ---- Theorem 7 --------------------------------------------------------------------------------------

def slow_losses(z_s, z_t, token):
    """Eqs. (3), (4), (5) and 4.1.1 of one position, by loops over the tokens."""
    p = [math.exp(z) / sum(math.exp(y) for y in z_s) for z in z_s]
    q = [math.exp(z) / sum(math.exp(y) for y in z_t) for z in z_t]
    top = sorted(range(len(p)), key=lambda v: -p[v])[:16]
    p_S = sum(p[v] for v in top)
    q_S = sum(q[v] for v in top)
    return {'sampled (3)': math.log(p[token] / q[token]),
            'full KL (4)': sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
            'top-16, renormalised (5)': sum(p[v] / p_S * math.log(p[v] / p_S * q_S / q[v]) for v in top),
            'top-16, reward (4.1.1)': sum(p[v] / p_S * math.log(p[v] / q[v]) for v in top)}


def test_no_output_space_loss_sees_the_null_space_and_all_see_the_rest():
    """The largest value over positions against loops. Differences in the null space, as long as the states themselves:
    all losses and gradients are rounding errors, Eq. (6) is not; the same lengths outside: none is small."""
    W = randn(19, 40)
    basis = head_basis(W)
    h = randn(6, 40, seed=1)
    token = torch.tensor([0, 3, 18, 7, 7, 2])
    random = randn(6, 40, seed=2)
    low, rest = split(random, basis)
    for change, is_seen in ((low, False), (rest, True)):
        z_s = h @ W.t()
        z_t = (h + change) @ W.t()
        values, gradients = output_losses(z_s, z_t, token)
        rows = [slow_losses(a, b, t) for a, b, t in zip(z_s.tolist(), z_t.tolist(), token.tolist(), strict=True)]
        for name, value in values.items():
            assert value == pytest.approx(max(abs(row[name]) for row in rows), rel=1e-9, abs=1e-12)
            assert (value > 0.1) == is_seen and (gradients[name] > 0.01) == is_seen
            assert is_seen or max(value, gradients[name]) < 1e-12
        assert change.square().mean() > 0.1

    # Nor is there a gradient in the null space when student and teacher differ elsewhere; Eq. (6) has one.
    for settings in theorem2.LOSSES.values():
        leaf = h.clone().requires_grad_()
        loss = opd_rows(leaf @ W.t(), (h + random) @ W.t(), token, **settings).sum()
        gradient, = torch.autograd.grad(loss, leaf)
        low, rest = split(gradient, basis)
        assert low.abs().max() < 1e-12 and rest.abs().max() > 0.01


@pytest.mark.parametrize('shape', [dict(), dict(family='qwen2', tied=True), dict(family='llama', H=2, G=1, e=10),
                                   dict(family='phi3', partial=0.5, e=8)])
def test_a_twin_has_the_same_outputs_and_other_states_in_each_layer(shape):
    """Of every family, with random norms and biases. In the free directions, found here by solving for them, its states
    have the opposite sign; embedding, final norm and head are those of the model, bit for bit."""
    model = with_random_norms(**dict(V=6) | shape)
    twin = twin_of(model)
    pair = pair_of(model, twin)
    a, b = model(pair.ids), twin(pair.ids)
    assert torch.allclose(a, b, rtol=0, atol=1000 * EPS * a.abs().max())
    for name in ('embed.weight', 'norm.weight', 'head.weight'):
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))

    # What is not a combination of the embedding's rows and of the head's, read through the norm's weight.
    used = torch.cat([model.embed.weight, model.head.weight * model.norm.weight])
    for l, ours, theirs in zip(pair.layers, pair.states(model), pair.states(twin), strict=True):
        final = l == pair.layers[-1]
        raw = ours / model.norm.weight if final else ours
        theirs = theirs / model.norm.weight if final else theirs
        inside = torch.linalg.lstsq(used.t(), raw.t(), driver='gelsd').solution
        kept = (used.t() @ inside).t()
        assert torch.allclose(theirs, 2 * kept - raw, atol=1e-10)
        assert (raw - kept).square().mean() > 1e-3


def test_a_model_with_as_many_tokens_as_numbers_in_a_state_has_no_twin():
    """A twin of such a model would be the model itself, and the figure would show an Eq. (6) of 0 as a result. A full
    SVD of the two matrices of a large vocabulary would need 13 GB here, and 77 GB of a real one."""
    assert twin_of(with_random_norms(V=20)) is None and twin_of(with_random_norms(V=20_000)) is None


# ---- Theorem 8 --------------------------------------------------------------------------------------

def test_the_curvature_is_the_second_derivative_of_the_kl():
    """Against autograd on the definition, one position and one direction after another."""
    W = randn(9, 5)
    h = 2 * randn(4, 5, seed=1)
    directions = torch.linalg.qr(randn(5, 5, seed=2)).Q[:, :3]
    found = curvature(h, W, directions)
    for k in range(4):
        for i in range(3):
            def kl(step, k=k, i=i):
                p = (h[k] @ W.t()).log_softmax(-1)
                q = ((h[k] + step * directions[:, i]) @ W.t()).log_softmax(-1)
                return (p.exp() * (p - q)).sum()
            expected = torch.autograd.functional.hessian(kl, torch.zeros((), dtype=torch.float64))
            assert found[k, i].item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_curvature_of_a_sure_position_is_no_rounding_error():
    """The likeliest token has all but 2e-30 of the mass. E z^2 - (E z)^2 would be 0 or noise; the sum over the other
    tokens of p (z - z_a)^2 is the answer to 1e-29."""
    W = randn(9, 9)
    h = torch.linalg.solve(W, 70 * torch.eye(9).double()[4])[None]           # logits of 70 and eight times 0
    z = (W @ torch.eye(9).double()).t()                                      # [direction][token]
    expected = math.exp(-70) * (z - z[:, 4:5]).square().sum(1)
    assert torch.allclose(curvature(h, W, torch.eye(9).double())[0], expected, rtol=1e-9, atol=0)


def test_the_bound_of_the_kl_holds_for_steps_of_any_length_and_is_reached():
    """Sure and unsure positions, small and large steps along each direction. With two equally likely tokens and a small
    step the KL is the bound: a bound that were larger would hold too, and say less."""
    W = randn(9, 5)
    basis = head_basis(W)
    for scale in (0.0, 1.0, 5.0):
        h = scale * randn(30, 5, seed=1)
        for step in (1e-3, 0.1, 1.0, 10.0, 100.0):
            bound = kl_bound(basis.sigma, step)
            for i in range(5):
                kl = kl_rows(h, h + step * basis.directions[:, i], W)
                assert kl.max() <= bound[i] * (1 + 1e-6) + 1e-12
    W = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    basis = head_basis(W)
    h = torch.zeros(1, 2, dtype=torch.float64)
    assert kl_rows(h, h + 1e-4 * basis.directions[:, 0], W).item() == pytest.approx(
        kl_bound(basis.sigma[0], 1e-4).item(), rel=1e-5)


def test_the_directions_of_a_pair_are_compared_by_hand(monkeypatch):
    """Every number of the panel, from the definitions: squares of singular values, means and quantiles of the exact
    KL of a short step."""
    monkeypatch.setattr(theorem2, 'ROWS', 4)
    student, teacher = with_random_norms(V=6), with_random_norms(V=6, seed=1)
    pair = pair_of(student, teacher)
    data = theorem2.direction_data(pair)
    W = teacher.head.weight
    _, sigma, V_t = numpy.linalg.svd(W.numpy() - W.numpy().mean(0))
    assert data['predicted'] == pytest.approx((sigma[0] / sigma[:5]) ** 2, rel=1e-5)
    h = student.hidden(pair.ids, [3], pair.at)[0]
    kl = torch.stack([kl_rows(h, h + 1e-3 * torch.tensor(V_t[i]), W) for i in range(5)], 1)     # (K, 5)
    assert data['of_mean_kl'] == pytest.approx((kl.mean(0)[0] / kl.mean(0)).tolist(), rel=0.01)
    middle = numpy.quantile((kl[:, :1] / kl).numpy(), 0.5, axis=0)
    assert data['of_positions']['50%'] == pytest.approx(middle, rel=0.02)
    assert data['largest_share_of_bound'] == pytest.approx(
        (kl / (sigma[:5] ** 2 * 1e-6 / 4)).max().item(), rel=0.01)
    assert 0 < data['largest_share_of_bound'] <= 1
    length = (h - teacher.hidden(pair.ids, [3], pair.at)[0]).square().sum(-1).mean().sqrt()
    assert data['full_step']['length'] == pytest.approx(length.item(), rel=1e-5)
    assert data['full_step']['kl_along_first'] in [
        pytest.approx(kl_rows(h, h + sign * length * torch.tensor(V_t[0]), W).mean().item(), rel=1e-5)
        for sign in (1, -1)]


# ---- a pair of models -------------------------------------------------------------------------------

def test_moved_states_are_read_by_the_blocks_above():
    """Against a forward written out block by block, for each layer. A change at the embedding, at all positions instead
    of the given ones, or before the final norm in the last layer would be seen."""
    student = with_random_norms()
    pair = pair_of(student, student)
    change = randn(len(pair.at), 20, seed=3)
    positions = torch.arange(9)
    for layer in (1, 2, 3):
        inv, scale = student.rope_frequencies(9, torch.device('cpu'))
        angle = torch.cat([positions[:, None] * inv] * 2, -1)
        rope = (angle.cos() * scale).double(), (angle.sin() * scale).double()
        h = student.embed(pair.ids)
        for l, block in enumerate(student.blocks, 1):
            h = block(h, rope)
            if l == 3:
                h = student.norm(h)
            if l == layer:
                for at, row in zip(pair.at.tolist(), change, strict=True):
                    h[at // 9, at % 9] += row
        assert torch.allclose(output_after(pair, layer, change), h.flatten(0, 1)[pair.at], atol=1e-12)


def test_of_a_twin_all_of_the_last_layers_difference_is_in_the_null_space():
    """The whole data of a pair whose answer is known: student and teacher with equal outputs. The last layer's
    difference is Eq. (6) and nothing of it is seen; one layer below, the same parts move the output."""
    student = with_random_norms(V=6)
    twin = twin_of(student)
    pair = pair_of(student, twin)
    data = theorem2_data(pair, [], {'a': (twin.head.weight, twin.norm.weight)})
    before = data['before']
    eq6 = [(a - b).square().mean().item() for a, b in zip(pair.states(student), pair.states(twin), strict=True)]
    assert before['kl'] < 1e-12 and before['head'] == 0
    assert [a + b for a, b in zip(before['low'], before['rest'], strict=True)] == pytest.approx(eq6, rel=1e-5)
    assert before['rest'][-1] < 1e-20 < 1e-3 < before['low'][-1]
    assert data['twin']['eq6'] == pytest.approx(eq6, rel=1e-5)
    assert max(data['twin']['largest_loss'].values()) < 1e-12
    assert data['low'] == {'directions': 15, 'null_space': 15} and data['twin']['free_directions'] == 8
    assert data['moved']['layers'] == [1, 2, 3] and abs(data['moved']['low'][-1]) < 1e-12
    assert min(data['moved']['low'][:2]) > 1e-6
    assert data['heads']['a']['null_space'] == 15 and len(data['heads']['a']['sigma']) == 20
    json.dumps(data, allow_nan=False)


def test_moving_both_parts_one_after_the_other_gives_the_teachers_output():
    """In the last layer the rest alone does it if the heads are equal: its KL is the KL to the teacher."""
    student = with_random_norms(V=6)
    teacher = with_random_norms(V=6, seed=1)
    teacher.head.weight.copy_(student.head.weight)
    pair = pair_of(student, teacher)
    data = theorem2_data(pair, [], {})
    assert data['moved']['rest'][-1] == pytest.approx(data['before']['kl'], rel=1e-5) and data['before']['kl'] > 0.1

    # With another head it does not, and the data say how far the heads are apart.
    teacher.head.weight.mul_(1.5)
    data = theorem2_data(pair, [], {})
    assert data['before']['head'] == pytest.approx(1 / 3, rel=1e-5)
    assert data['moved']['rest'][-1] != pytest.approx(data['before']['kl'], rel=0.01)


def test_below_the_last_layer_the_head_reads_through_the_norms_weight():
    """The spectrum of the head times the final norm's weight, and parts by its directions: a difference that the
    weight hides from the head is low there."""
    student = with_random_norms(V=6)
    teacher = twin_of(student)
    bases = pair_of(student, teacher).bases()
    W, norm = teacher.head.weight, teacher.norm.weight
    hidden = head_basis(W).directions[:, -1] / norm                          # W diag(norm) hidden = W v = 0
    low, rest = split(hidden[None], bases[0])
    assert rest.abs().max() < 1e-12 and torch.allclose(low[0], hidden)
    assert split(hidden[None], bases[2])[1].abs().max() > 1e-3
    found = theorem2.spectrum(W, norm)
    centred = (W * norm - (W * norm).mean(0)).numpy()
    assert found['sigma_with_norm'][:5] == pytest.approx(numpy.linalg.svd(centred)[1][:5], rel=1e-5)
    assert found['ratio_with_norm'] == pytest.approx(numpy.linalg.cond(centred @ numpy.linalg.svd(centred)[2][:5].T) ** 2,
                                                     rel=1e-5)


# ---- the command ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def toy_run(toy_dir, tmp_path_factory):
    """A run on the tiny toy that has kept all of its four checkpoints."""
    out = tmp_path_factory.mktemp('run') / 'oprd'
    distill_main(load_config(argv(toy_dir, out, save_every=1, keep=10, eval_every=0)))
    return out


def test_the_command_measures_a_run_at_its_kept_checkpoints(toy_run, toy_cfg, tmp_path, capsys, monkeypatch):
    """Steps, KL and both parts of Eq. (6) against the models read here; the same numbers twice."""
    main(['theorem2', str(toy_run), f'to={tmp_path / "a"}', 'problems=5', f'head={toy_cfg["student"]}'])
    assert capsys.readouterr().out.split() == [str(tmp_path / 'a' / f'theorem2.{end}') for end in ('json', 'png', 'pdf')]
    data = json.loads((tmp_path / 'a/theorem2.json').read_text())
    run, = data['runs']
    assert run['steps'] == [0, 1, 2, 3, 4] and run['method'] == 'OPRD' and run['seed'] == 0
    assert data['answers'] == 5 and set(data['heads']) == {'the toy', 'student'} and data['twin'] is None
    assert run['head'] == [0.0] * 5          # Eq. (6) never reaches the head, and the teacher's was frozen

    pair = read_pair(toy_cfg['student'], toy_cfg['teacher'], toy_cfg['eval_data'], 5)
    trained = load_model(toy_run / 'ckpt-000003/model').double()
    h_s, h_t = pair.states(trained), pair.states(pair.teacher)
    W = pair.teacher.head.weight.numpy()
    _, _, V_t = numpy.linalg.svd(W - W.mean(0))
    difference = (h_s[-1] - h_t[-1]).numpy()
    seen = difference @ V_t[:20].T
    assert run['rest'][3][-1] == pytest.approx((seen ** 2).sum() / difference.size, rel=1e-5)
    assert run['low'][3][-1] == pytest.approx((difference ** 2).mean() - (seen ** 2).sum() / difference.size, rel=1e-4)
    p = (h_s[-1] @ trained.head.weight.t()).log_softmax(-1)
    q = (h_t[-1] @ pair.W.t()).log_softmax(-1)
    assert run['kl'][3] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert {key: run[key][0] for key in ('kl', 'head', 'low', 'rest')} == data['before']

    monkeypatch.setattr(theorem2, 'save', lambda *figure: [])
    main(['theorem2', str(toy_run), f'to={tmp_path / "b"}', 'problems=5', f'head={toy_cfg["student"]}'])
    assert (tmp_path / 'a/theorem2.json').read_bytes() == (tmp_path / 'b/theorem2.json').read_bytes()


def test_the_figure_draws_the_data(monkeypatch):
    """Six panels for a toy with runs, and lines at the numbers of the data: a part under the other's label, or shares
    of the first step instead of the last one, would be seen."""
    with_runs = {
        'positions': 10, 'answers': 2, 'layers': [1, 2], 'width': 8, 'low': {'directions': 2, 'null_space': 2},
        'heads': {'the toy': {'width': 8, 'null_space': 2, 'sigma': [4.0, 3, 3, 2, 2, 1, 0, 0],
                              'sigma_with_norm': [8.0, 3, 3, 2, 2, 1, 0, 0]}},
        'twin': {'eq6': [0.5, 0.25], 'largest_loss': {'full KL (4)': 1e-16}},
        'directions': {'predicted': [1.0, 4.0], 'of_mean_kl': [1.0, 2.0],
                       'of_positions': {'10%': [1.0, 0.5], '50%': [1.0, 3.0], '90%': [1.0, 9.0]}},
        'before': {'kl': 0.3, 'head': 0.0, 'low': [3.0, 1.0], 'rest': [1.0, 1.0]},
        'moved': {'layers': [1, 2], 'low': [0.2, 0.0], 'rest': [0.1, 0.3]},
        'runs': [{'method': 'OPRD', 'seed': seed, 'steps': [0, 10], 'low': [[3.0, 1.0 + 2 * seed], [0.1, 0.1 + 0.2 * seed]],
                  'rest': [[1.0, 1.0], [0.1, 0.3]]} for seed in (0, 1)]}
    monkeypatch.setattr(theorem2, 'save', lambda figure, file, notes: (figure, notes))
    figure, notes = theorem2.draw_theorem2(with_runs, 'x')
    panels = figure.axes
    assert len(panels) == 6
    assert notes == ("2 answers of the untrained student, 10 positions; null space: 2 of 8 directions of the teacher's "
                     'head; below the last layer: what the head would not see if it read the state there; '
                     'shares and training: mean of 2 seeds; all else: seed 0')
    lines = [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in panels]
    assert lines[0]['to the teacher: KL 0.3'] == pytest.approx([4, 2]) and lines[0]['to the twin: KL 0'] == [0.5, 0.25]
    assert lines[1] == {'the rest': [0.1, 0.3], 'null space': [0.2, 0.0]}
    assert lines[2]['the toy: 2 of 8 are 0'] == [1, 0.75, 0.75, 0.5, 0.5, 0.25]
    assert lines[3]['mean KL'] == [1.0, 2.0] and lines[3]['median position'] == [1.0, 3.0]
    assert lines[4]['before'] == pytest.approx([75, (50 + 75) / 2]) and lines[4]['random direction'] == [25, 25]
    assert lines[4]['after OPRD'] == pytest.approx([50, (25 + 50) / 2])
    assert lines[5]['OPRD, null space'] == pytest.approx([2, 0.2]) and lines[5]['OPRD, the rest'] == pytest.approx([1, 0.3])

    # Without a twin and without runs there are four, and none is empty.
    figure, _ = theorem2.draw_theorem2(
        with_runs | {'twin': None, 'runs': [], 'low': {'directions': 2, 'null_space': 0}}, 'y')
    assert len(figure.axes) == 4 and all(axes.lines for axes in figure.axes)
    assert figure.axes[3].get_title() == 'share of the lowest 2'


def test_a_head_is_read_without_the_rest_of_its_model(tmp_path, toy_cfg):
    """Of a tied and of an untied model, the same numbers as load_model; rows that no token stands for are left out."""
    W, norm = head_and_norm(toy_cfg['student'])
    model = load_model(toy_cfg['student'])
    assert torch.equal(W, model.head.weight) and torch.equal(norm, model.norm.weight)
    tied = tiny_model(V=25, tied=True)
    save_model(tied, tmp_path / 'tied', source=toy_cfg['student'])
    W, norm = head_and_norm(tmp_path / 'tied')
    assert load_tokenizer(tmp_path / 'tied').size == 21
    assert torch.equal(W, tied.head.weight[:21]) and torch.equal(norm, tied.norm.weight)


def test_bad_input_is_told_in_one_line(toy_run, toy_cfg, tmp_path, capsys):
    """And nothing is written."""
    student, teacher, data = (toy_cfg[key] for key in ('student', 'teacher', 'eval_data'))
    given = [f'student={student}', f'teacher={teacher}', f'data={data}', f'to={tmp_path / "out"}']
    for words, message in (([*given[:2], given[3]], 'give all three'), ([str(toy_run), *given], 'give all three'),
                           ([*given, 'problems=0'], "problems='0'"), ([*given, 'problems=x'], "problems='x'"),
                           ([*given, 'lowest=-1'], "lowest='-1'"), ([*given, 'lowest=25'], 'has 24 numbers'),
                           ([*given, 'head=/nowhere/x'], '/nowhere/x')):
        with pytest.raises(UserError, match=message):
            main(['theorem2', *words])
    with pytest.raises(UserError, match='the same weights'):
        main(['theorem2', *given, f'teacher={student}'])
    save_model(tiny_model(V=21), tmp_path / 'other', source=student)
    with pytest.raises(Missing, match='no pair of one family'):
        main(['theorem2', *given, f'teacher={tmp_path / "other"}'])
    assert not (tmp_path / 'out').exists()


def test_runs_that_show_no_course_are_left_out_with_a_line(toy_run, monkeypatch, capsys):
    """A run that has kept its last two checkpoints would be a straight line from step 0, and look measured."""
    monkeypatch.setattr(theorem2, 'FEWEST_CHECKPOINTS', 5)
    assert theorem2.usable_runs([toy_run]) == []
    assert 'left out, a run has kept 4 checkpoint(s)' in capsys.readouterr().out
    monkeypatch.setattr(theorem2, 'FEWEST_CHECKPOINTS', 4)
    monkeypatch.setattr(theorem2, 'read_runs', lambda folders: [replace(run, pair='bridge') for run in READ(folders)])
    assert theorem2.usable_runs([toy_run]) == [] and 'another shape' in capsys.readouterr().out


READ = theorem2.read_runs


def test_the_toy_must_have_been_made(tmp_path, monkeypatch):
    """The command reads the toy's models and does not train them: it would take minutes without a word."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Missing, match='python -m studies.toy configs/toy.py makes the toy'):
        main(['theorem2'])


@pytest.mark.skipif(not SMOL.exists(), reason='SMOLLM2= is not set; see tests/smollm2.py')
def test_the_head_of_a_pretrained_model_has_no_null_space():
    """V = 49,152 and d = 576: against the eigenvalues of the Gram matrix."""
    W, norm = head_and_norm(SMOL)
    found = theorem2.spectrum(W, norm)
    centred = W.double() - W.double().mean(0)
    sigma = torch.linalg.eigvalsh(centred.t() @ centred).flip(0).sqrt()
    assert found['null_space'] == 0
    assert found['sigma'] == pytest.approx(sigma.tolist(), rel=1e-5)
