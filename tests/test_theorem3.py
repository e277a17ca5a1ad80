"""Theorem 3 as an experiment: its algebra against numpy on rows and against random search, its numbers by hand, and the
whole command on a tiny bridge."""
import contextlib
import json
import shutil
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import argv, for_script

import bridge
import distill
from bridge_parts.closed_form import Moments, energy, principal_directions
from bridge_parts.report import report, theorem_3_rank
from configs import load_config
from paper.first_last import open_pair, started_in
from paper.runs import Missing, read_runs
from paper.theorem3 import (
    RankRun,
    components,
    distilled,
    draw_theorem3,
    encoders,
    fitted_and_held_out,
    judge_encoder,
    predictability,
    rank_correlation,
    rank_runs,
    theorem3,
    theorem3_data,
    total_and_predicted,
    with_all_ranks,
)
from support.runtime import UserError

# ---- the algebra ---------------------------------------------------------------------------------

D_S, D_T, ROWS = 5, 7, 60


@pytest.fixture(scope='module')
def states():
    """Rows of two classes in which the student knows a part of the teacher: x (K, d_s), y (K, d_t), inside (K,)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, D_S, generator=generator, dtype=torch.float64) + 2.0
    noise = torch.randn(ROWS, D_T, generator=generator, dtype=torch.float64)
    mixing = torch.randn(D_S, D_T, generator=generator, dtype=torch.float64)
    scales = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.3, 0.1], dtype=torch.float64)
    y = (x[:, :3] @ mixing[:3] + 1.5 * noise) * scales - 1.0
    inside = torch.arange(ROWS) % 3 == 0
    return x, y, inside


def moments(x, y, inside):
    sums = Moments(x.shape[1], y.shape[1], 'cpu')
    sums.add(x, y, inside)
    return sums


def fitted_by_numpy(x, y, inside):
    """Least squares with a bias on the rows of each class -> predictions (K, d_t)."""
    guess = np.zeros(y.shape)
    for rows in (inside.numpy(), ~inside.numpy()):
        design = np.concatenate([x.numpy()[rows], np.ones((rows.sum(), 1))], 1)
        guess[rows] = design @ np.linalg.lstsq(design, y.numpy()[rows], rcond=None)[0]
    return guess


def random_basis(seed, r):
    """r orthonormal directions (r, d_t)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D_T, r, generator=generator, dtype=torch.float64))[0].t()


def test_what_is_predicted_is_what_least_squares_predicts(states):
    """The covariances from sums over rows, against predictions of numpy on the rows themselves. The classes have maps of
    their own, and one map for both would predict less."""
    x, y, inside = states
    guess = fitted_by_numpy(x, y, inside)
    centred = y.numpy() - y.numpy().mean(0)
    residual = y.numpy() - guess
    sums = moments(x, y, inside)
    C, P = total_and_predicted(sums, sums, 0.0, True)
    np.testing.assert_allclose(C.numpy(), centred.T @ centred / ROWS, atol=1e-11)
    np.testing.assert_allclose(P.numpy(), (centred.T @ centred - residual.T @ residual) / ROWS, atol=1e-11)


def test_held_out_rows_are_judged_by_the_fit_of_others(states):
    x, y, inside = states
    half = ROWS // 2
    guess = np.zeros((half, D_T))
    for rows in (inside.numpy(), ~inside.numpy()):
        design = np.concatenate([x.numpy(), np.ones((ROWS, 1))], 1)
        fit = np.linalg.lstsq(design[:half][rows[:half]], y.numpy()[:half][rows[:half]], rcond=None)[0]
        guess[rows[half:]] = design[half:][rows[half:]] @ fit
    residual = y.numpy()[half:] - guess
    C, P = total_and_predicted(moments(x[:half], y[:half], inside[:half]), moments(x[half:], y[half:], inside[half:]), 0.0, True)
    np.testing.assert_allclose((C - P).numpy(), residual.T @ residual / half, atol=1e-11)


def test_E_is_what_is_left_out_and_what_is_included_in_vain(states):
    """Theorem 3's two sums on the rows: the predictions of the components beyond r, and the residuals of the first r."""
    x, y, inside = states
    sums = moments(x, y, inside)
    mean, P_t, lam = principal_directions(sums)
    z = (y - mean) @ P_t.t()
    guess = fitted_by_numpy(x, z, inside)
    # With one map for each class, what is predicted is the variance less the residual.
    residual = ((z.numpy() - guess)**2).sum(0) / ROWS
    predicted = lam.numpy() - residual
    kept, E = judge_encoder(P_t, *total_and_predicted(sums, sums, 0.0, True), D_T)
    total = lam.sum().item()
    for r in range(1, D_T + 1):
        assert abs(E[r - 1] * total - (predicted[r:].sum() + residual[:r].sum())) < 1e-10
        assert abs(kept[r - 1] * total - lam[:r].sum().item()) < 1e-10
    made = {'bridge_ridge': 0.0, 'bridge_bias': True}
    rho2 = predictability(sums, sums, made, 4)
    np.testing.assert_allclose(rho2.numpy(), predicted[:4] / lam.numpy()[:4], atol=1e-10)


def test_one_more_direction_helps_while_rho2_is_above_one_half():
    """The difference E(r) - E(r-1) is lam_r (1 - 2 rho2_r), for any lam and rho2, also where E has several minima."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        lam = torch.rand(9, generator=generator, dtype=torch.float64).sort(descending=True).values
        rho2 = torch.rand(9, generator=generator, dtype=torch.float64)
        E = torch.cat([(lam * rho2).sum()[None], energy(lam, rho2)])         # of ranks 0, 1, ..., 9
        steps = E.diff()
        assert torch.allclose(steps, lam * (1 - 2 * rho2), atol=1e-14, rtol=0)
        assert torch.equal(steps < 0, rho2 > 0.5)


def test_no_linear_encoder_keeps_more_than_pca(states):
    """Theorem 9. Of every rank: what PCA loses is what the singular values beyond r say (Eckart and Young, by numpy's SVD
    of the rows), and 200 random encoders, each with the best decoder by least squares, lose more."""
    x, y, inside = states
    centred = (y - y.mean(0)).numpy()
    singular = np.linalg.svd(centred, compute_uv=False)
    sums = moments(x, y, inside)
    bases = encoders(sums, 0.0, True, seed=0)
    C, P = total_and_predicted(sums, sums, 0.0, True)
    kept, _ = judge_encoder(bases['PCA'], C, P, D_T)
    total = (singular**2).sum()
    rng = np.random.default_rng(0)
    for r in range(1, D_T + 1):
        assert abs((1 - kept[r - 1]) - (singular[r:]**2).sum() / total) < 1e-12
        for _ in range(200 // D_T):
            code = centred @ rng.standard_normal((D_T, r))
            lost = np.linalg.lstsq(code, centred, rcond=None)[1] if r < D_T else np.zeros(1)
            assert lost.sum() / total >= 1 - kept[r - 1] - 1e-12
    random_kept, _ = judge_encoder(bases['random'], C, P, D_T)
    assert all(a > b + 0.01 for a, b in zip(kept[:4], random_kept[:4], strict=True)) and abs(random_kept[-1] - 1) < 1e-12


def test_no_encoder_has_less_E_than_the_eigenvectors_of_2P_less_C(states):
    """E of any orthonormal directions of any number is at least that of the eigenvectors with positive eigenvalues, and
    PCA's is larger here: Theorem 3 takes PCA first and the rank second. By E's definition with projections."""
    sums = moments(*states)
    C, P = total_and_predicted(sums, sums, 0.0, True)
    bases = encoders(sums, 0.0, True, seed=0)
    assert all(torch.allclose(basis @ basis.t(), torch.eye(D_T, dtype=torch.float64), atol=1e-12) for basis in bases.values())
    variance = C.trace().item()
    _, best = judge_encoder(bases['best for E'], C, P, D_T)
    _, pca = judge_encoder(bases['PCA'], C, P, D_T)
    least = (P.trace() - torch.linalg.eigvalsh(2 * P - C).clamp(min=0).sum()).item() / variance
    assert abs(min(best) - least) < 1e-12
    assert min(pca) > least + 1e-3
    for seed in range(200):
        r = seed % D_T + 1
        projection = random_basis(seed, r).t() @ random_basis(seed, r)
        outside = torch.eye(D_T, dtype=torch.float64) - projection
        E = ((outside @ P @ outside).trace() + (projection @ (C - P) @ projection).trace()).item() / variance
        assert E >= best[r - 1] - 1e-12 and E >= least - 1e-12


# ---- numbers by hand --------------------------------------------------------------------------------

def made_bridge(rho2_of_layers, lam=(4.0, 2.0, 1.0, 1.0), cosine=0.9):
    """What read_components returns."""
    layers = {}
    for layer, rho2 in enumerate(rho2_of_layers, 1):
        cos = {str(r): cosine - 0.1 * r for r in (1, 2, 4)}
        layers[str(layer)] = {'lam': list(lam), 'rho2': list(rho2), 'variance': sum(lam), 'cos': cos}
    return {'layers': layers, 'rank': 2, 'used': 2, 'ranks': len(lam)}


def test_what_theorem_3_says_of_a_bridge():
    """By hand: lam = 4, 2, 1, 1 and rho2 = 0.9, 0.4, 0.8, 0.1 gives E = 2.1, 2.5, 1.9, 2.7 of 8. The first component that
    is not worth it is the second, but E is least at 3, so 'stop at the first' and 'least E' are two rules."""
    found = components(made_bridge([(0.9, 0.4, 0.8, 0.1), (0.9, 0.6, 0.4, 0.2)]))
    first, second = found['layers'].values()
    assert first['rank of least E'] == 3 and second['rank of least E'] == 2
    assert first['components before the first with rho2 <= 1/2'] == 1 and second['components before the first with rho2 <= 1/2'] == 2
    assert first['components with rho2 > 1/2'] == 2 == second['components with rho2 > 1/2']
    of_first = [2.1, 2.5, 1.9, 2.7]
    of_second = [0.4 + 1.2 + 0.4 + 0.2, 0.4 + 0.8 + 0.4 + 0.2, 0.4 + 0.8 + 0.6 + 0.2, 0.4 + 0.8 + 0.6 + 0.8]
    assert found['E'] == pytest.approx([(a + b) / 16 for a, b in zip(of_first, of_second, strict=True)])
    assert found['recommended'] == 3
    assert found['cos'] == pytest.approx({'1': 0.8, '2': 0.7, '4': 0.5})


def test_the_recommended_rank_is_the_one_of_bridge_json():
    """From lam and rho2 as bridge.json rounds them, against bridge_parts.report on what was measured."""
    generator = torch.Generator().manual_seed(3)
    judged = {}
    for layer in (1, 2, 3):
        lam = torch.rand(12, generator=generator, dtype=torch.float64).sort(descending=True).values
        rho2 = torch.rand(12, generator=generator, dtype=torch.float64).sort(descending=True).values
        cosines = {name: torch.zeros(12) for name in ('cos', 'before', 'shuffled', 'mean_only')}
        judged[layer] = cosines | {'lam': lam, 'rho2': rho2, 'E': energy(lam, rho2), 'total': 1.5 * lam.sum().item(), 'rows': 9}
    found = components(report(judged, {1: 1, 2: 2, 3: 4}, 0))
    assert found['recommended'] == theorem_3_rank(judged)
    assert [layer['rank of least E'] for layer in found['layers'].values()] == [int(layer['E'].argmin()) + 1 for layer in judged.values()]


def ranked(seed, asked, score, rank=None):
    rows = [{'step': 0, 'eval/avg@4': 20.0 + seed, 'teacher/avg@4': 90.0}, {'step': 7, 'eval/avg@4': score}]
    return RankRun(SimpleNamespace(seed=seed, rows=rows), f'b{seed}', asked, rank or asked)


def test_which_rank_distils_best_and_what_orders_the_ranks():
    """Two seeds by hand. Rank 0 is drawn at the rank that was used, which differs between the seeds."""
    scores = {0: {1: 30.0, 2: 50.0, 4: 40.0, 0: 45.0}, 1: {1: 32.0, 2: 48.0, 4: 44.0, 0: 41.0}}
    runs = []
    for seed, by_rank in scores.items():
        runs += [ranked(seed, asked, score, rank=asked or 3 + seed % 2) for asked, score in by_rank.items()]
    found = {f'b{seed}': components(made_bridge([(0.9, 0.4, 0.8, 0.1)])) for seed in scores}
    result = distilled(runs, found)
    assert result['seeds'] == [0, 1] and result['asked'] == [1, 2, 0, 4] and result['steps'] == 7 and result['metric'] == 'avg@4'
    assert result['ranks'] == [[1, 2, 3, 4], [1, 2, 4, 4]]
    assert result['accuracy'] == [[30.0, 50.0, 45.0, 40.0], [32.0, 48.0, 41.0, 44.0]] and result['best'] == 2
    assert result['student'] == [20.0, 21.0] and result['teacher'] == [90.0, 90.0]

    # E of ranks 1, 2, 4 is 2.1, 2.5, 2.7 and the cosine falls, so both say 1, 2, 4; the accuracies say 2, 4, 1.
    assert result['order by E'][0] == pytest.approx(-0.5) == result['order by cosine'][0]

    # Runs that were never evaluated have no accuracies to draw.
    for one in runs:
        one.run.rows = [{'step': 0}, {'step': 7}]
    assert distilled(runs, found) is None


def test_seeds_that_lack_a_rank_are_left_out(capsys):
    """A mean at rank 2 over two seeds beside one at rank 4 over one seed would compare other students."""
    runs = [SimpleNamespace(seed=seed, folder=f'{rank}-s{seed}', config={'bridge_rank': rank}) for seed, rank in ((0, 2), (0, 4), (0, 0), (1, 2), (2, 4), (2, 0), (2, 2))]
    assert with_all_ranks(runs) == [run for run in runs if run.seed != 1]
    assert capsys.readouterr().out == 'theorem3: seed 1 is left out, it has no run with bridge_rank=0, 4\n'
    with pytest.raises(UserError, match='0-s2: another run has seed 2 and bridge_rank=0 too'):
        with_all_ranks([*runs, runs[-2]])


def test_the_rank_correlation():
    """1 and -1 for the same and the opposite order; against 1 - 6 sum d^2 / (n (n^2 - 1)) without equal numbers; equal
    numbers share their place."""
    assert rank_correlation([1, 5, 9], [2, 3, 700]) == 1 and rank_correlation([1, 5, 9], [3, 2, 1]) == -1
    generator = torch.Generator().manual_seed(0)
    for n in (2, 5, 8):
        x, y = torch.rand(n, generator=generator).tolist(), torch.rand(n, generator=generator).tolist()
        places = [[sorted(values).index(value) for value in values] for values in (x, y)]
        d2 = sum((a - b)**2 for a, b in zip(*places, strict=True))
        assert rank_correlation(x, y) == pytest.approx(1 - 6 * d2 / (n * (n * n - 1)))
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(np.corrcoef([0.5, 0.5, 2], [0, 1, 2])[0, 1])
    assert rank_correlation([1, 1], [1, 2]) == 0


def test_the_figure_draws_these_numbers_and_the_same_bytes_twice(tmp_path, kept):
    """All six panels from hand-made numbers."""
    bridges = {f'b{seed}': made_bridge([(0.9, 0.4, 0.8, 0.1), (0.9, 0.6, 0.4, 0.2)], cosine=0.9 + 0.02 * seed) for seed in (0, 1)}
    runs = [ranked(seed, asked, 40.0 + asked + seed, rank=asked or 3) for seed in (0, 1) for asked in (1, 2, 0)]
    data = theorem3_data(bridges, runs)
    for folder in bridges:
        data['encoders'][folder] = {name: {'kept': [0.2, 0.5, 0.7, 1.0], 'E': [0.5, 0.4, 0.3, 0.4]} for name in ('PCA', 'best for E', 'random')}
    data['trained'] = {'2': [[0.9, 0.8, 0.8, 0.2]] * 2, '0': [[0.9, 0.9, 0.8, 0.3]] * 2}
    files = draw_theorem3(data, tmp_path / 'a')
    panels = {axes.get_title(): axes for axes in kept[-1].axes}
    assert list(panels) == ['predictable, before stage 2', 'E(r)', 'variance kept', 'held-out cosine', 'accuracy after 7 steps', 'predictable, after stage 2']
    lines = {line.get_label(): line for axes in panels.values() for line in axes.lines}
    assert list(lines['PCA'].get_ydata()) == data['bridges']['b0']['E']
    assert list(lines['distilled'].get_xdata()) == [1, 2, 3] and list(lines['distilled'].get_ydata()) == [41.5, 42.5, 40.5]
    assert list(lines["after, Theorem 3's rank"].get_ydata()) == [0.9, 0.9, 0.8, 0.3]
    assert list(lines['before stage 2'].get_ydata()) == pytest.approx([0.9, 0.5, 0.6, 0.15])
    again, = draw_theorem3(json.loads(json.dumps(data, allow_nan=False)), tmp_path / 'again.png')
    assert [file.suffix for file in files] == ['.png', '.pdf'] and files[0].read_bytes() == again.read_bytes()


# ---- the whole command --------------------------------------------------------------------------------

UNLIKE = dict(toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged', bridge='b', steps=1, bridge_normalise=False)         # a single number has no direction to learn


@pytest.fixture(scope='module')
def study(tmp_path_factory, toy_dir):
    """A bridge b between models of unlike vocabularies, and two runs of one step through it, of ranks 4 and Theorem 3's."""
    root = tmp_path_factory.mktemp('study')
    with contextlib.chdir(root):
        fit = for_script('bridge.py', argv(toy_dir, 'x', **UNLIKE))
        bridge.main(load_config([*fit, 'bridge_prompts=30', 'bridge_held_out=0.3'], 'bridge.py'))
        for rank in (4, 0):
            distill.main(load_config(argv(toy_dir, f'r{rank}', **UNLIKE | dict(bridge_rank=rank, eval_every=0)), 'distill.py'))
    return root


def test_the_states_are_those_of_bridge_py(study, tmp_path, monkeypatch):
    """rho2 of the untrained student, read again from the stored answers, is the one in bridge.json, which has six digits.
    Another split of the answers, other positions, or the problems of another order would not give it."""
    monkeypatch.chdir(tmp_path)
    found, bridges = rank_runs(read_runs([study / 'r4', study / 'r0']))
    (folder, made), = bridges.items()
    assert folder == str(study / 'b') and sorted(one.asked for one in found) == [0, 4]
    one = found[0]
    with started_in(one.run.folder, one.run.config):
        pair = open_pair(one.run.config, one.run.folder)
        fitted, held_out = fitted_and_held_out(pair, made)
    for layer, values in made['layers'].items():
        rho2 = predictability(fitted[int(layer)], held_out[int(layer)], made, made['ranks'])
        np.testing.assert_allclose(rho2.numpy(), values['rho2'], atol=2e-6)


def test_one_command_writes_the_numbers(study, tmp_path, capsys, monkeypatch):
    """From the runs alone, which name their bridge. Without the stored answers a line says what is not drawn."""
    drawn = []
    monkeypatch.setattr('paper.theorem3.draw_theorem3', lambda data, file: drawn.append(file) or [file])
    files = theorem3([study / 'r4', study / 'r0', study / 'b'], tmp_path / 'to')
    assert files == [tmp_path / 'to/theorem3.json', tmp_path / 'to/theorem3'] == [files[0], *drawn]
    data = json.loads(files[0].read_text())
    found = data['bridges'][str(study / 'b')]
    assert data['distilled']['ranks'] == [sorted([4, found['recommended']])]

    # The students have taken a step, so they are others than the one that bridge.json is about.
    assert set(data['trained']) == {'0', str(data['distilled']['best'])}
    before = [fmean(values) for values in zip(*(layer['rho2'] for layer in found['layers'].values()), strict=True)]
    for by_seed in data['trained'].values():
        assert [len(rho2) for rho2 in by_seed] == [len(before)] and max(np.abs(np.array(by_seed[0]) - before)) > 1e-4
    encoded = data['encoders'][str(study / 'b')]
    assert set(encoded) == {'PCA', 'best for E', 'random'} and encoded['PCA']['kept'][4] > encoded['random']['kept'][4]

    capsys.readouterr()
    with monkeypatch.context() as patched:               # the models are gone
        patched.setattr('paper.theorem3.open_pair', lambda *a, **k: missing())
        without = json.loads(theorem3([study / 'r4', study / 'r0'], tmp_path / 'without')[0].read_text())
    assert without['distilled'] == data['distilled'] and without['encoders'] == {} == without['trained']
    assert capsys.readouterr().out == 'theorem3: without the panels that need the models (gone)\n'


def missing():
    raise Missing('gone')


def test_a_bridge_alone_is_drawn(study, tmp_path, kept, capsys):
    """Before any run through it: the three panels that bridge.json can feed. A bridge between other models is no seed of it,
    and a mean over both would mean nothing."""
    shutil.copytree(study / 'b', tmp_path / 'wide-s0')
    shutil.copytree(study / 'b', tmp_path / 'wide-s1')
    files = theorem3([tmp_path / 'wide-s0', study / 'b', tmp_path / 'wide-s1'], tmp_path / 'bridge')
    assert list(json.loads(files[0].read_text())['bridges']) == [str(tmp_path / 'wide-s0'), str(tmp_path / 'wide-s1')]
    assert capsys.readouterr().out == f'theorem3: {study / "b"} is left out, it is no seed of {tmp_path / "wide-s0"}\n'
    assert [file.name for file in files] == ['theorem3.json', 'theorem3.png', 'theorem3.pdf']
    assert [axes.get_title() for axes in kept[0].axes] == ['predictable, before stage 2', 'E(r)', 'held-out cosine']


def test_what_is_missing_or_damaged_is_said(study, tmp_path):
    """One line: no bridge at all, a bridge of an earlier version without lam, lists of unequal length."""
    with pytest.raises(Missing, match='studies.compare toy_paper makes them'):
        theorem3([], tmp_path / 'to')
    made = json.loads((study / 'b/bridge.json').read_text())
    for change, says in ((lambda layer: layer.pop('lam'), 'lam is missing'), (lambda layer: layer['rho2'].pop(), '24 lam and 23 rho2'),
                         (lambda layer: layer['rho2'].append(2.0), 'rho2')):
        damaged = json.loads(json.dumps(made))
        change(damaged['layers']['2'])
        (tmp_path / 'b').mkdir(exist_ok=True)
        (tmp_path / 'b/bridge.json').write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=f'layer .?2.*{says}'):
            theorem3([tmp_path / 'b'], tmp_path / 'to')
    assert not (tmp_path / 'to').exists()
