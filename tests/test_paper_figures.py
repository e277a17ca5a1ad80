"""The paper's figures hold the numbers of the logs, draw no others, and say what is missing."""
import json
from pathlib import Path

import pytest
from conftest import write_run

from paper import figures
from paper.runs import Missing, read_runs
from support.provenance import append_start
from support.runtime import UserError

NUMBERS = (1, 4, 5, 6, 7, 9, 10, 11)
TOP1 = dict(oprd_weight=0, opd_weight=1, opd='sampled')


def columns(last, shift=0.0, output=True):
    """Four steps with an evaluation after steps 0, 2 and 4. shift: of everything but the accuracies."""
    log = {'eval/avg@16': [20.0, None, 40.0, None, last], 'eval/best@16': [60.0, None, 70.0, None, 80.0], 'eval/len': [9.0, None, 9.0, None, 9.0],
           'teacher/avg@16': [90.0, None, None, None, None], 'teacher/best@16': [99.0, None, None, None, None],
           'teacher/len': [9.0, None, None, None, None]}
    for number, name in enumerate(['len/mean', 'rep/cos', 'rep/cos/1', 'rep/cos/2', 'entropy/student', 'entropy/teacher', 'opd/overlap16'], 1):
        log[name] = [None] + [number / 10 + step / 100 + shift for step in (1, 2, 3, 4)]
    log['loss/opd'] = [None, 0.4 + shift, -0.3, 0.2, 0.1 + shift]
    if not output:
        del log['loss/opd']
        for name in ('entropy/student', 'entropy/teacher', 'opd/overlap16'):         # a look in the first step and the last
            log[name][2:4] = [None, None]
    return log | {'time/sample': [None, 1.0, 2.0, 3.0, 4.0], 'time/update': [None, *[0.5 + shift] * 4]}


def write_study(out):
    """OPRD and three weights mu, two seeds each."""
    folders = []
    for seed in (0, 1):
        folders.append(write_run(out / f'oprd-s{seed}', columns(80.0 + seed, 0.01 * seed, output=False), seed=seed))
        for mu, last in ((0, 50.0), (1, 60.0), (10, 70.0)):
            keys = TOP1 | dict(oprd_weight=mu, seed=seed, lr=1e-3 * (mu + 1))
            folders.append(write_run(out / f'mu{mu}-s{seed}', columns(last + seed, 0.01 * seed), **keys))
    return folders


def approx(nested):
    """Numbers in lists in dicts, up to rounding."""
    if isinstance(nested, dict):
        return {key: approx(value) for key, value in nested.items()}
    if isinstance(nested, list) and isinstance(nested[0], list):
        return [approx(value) for value in nested]
    return pytest.approx(nested, rel=1e-12)


def with_smooth(steps, by_seed):
    """A curve of a few steps, of which a tenth is less than two: it is not smoothed."""
    return {'steps': steps, 'by_seed': by_seed, 'smooth': by_seed}


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    folders = write_study(tmp_path_factory.mktemp('study'))
    for folder in folders:
        append_start(folder, {'versions': {'device': 'cpu', 'ranks': 1, 'threads': 1}, 'sources': {}, 'eval_data': {},
                              'problems': {'eval_data': {'eval': 64}}}, 0)
    return read_runs(folders)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in order; none is written."""
    kept = []

    def recorded_save(figure, file, notes=''):
        kept.append((figure, notes))
        return [Path(f'{file}.png')]
    monkeypatch.setattr(figures, 'save', recorded_save)
    return kept


def data_of(number, runs):
    """The numbers of a figure."""
    name = f'figure{number}'
    return figures.over_steps_data(name, runs) if name in figures.OVER_STEPS else getattr(figures, f'{name}_data')(runs)


def draw(number, data):
    name = f'figure{number}'
    return figures.draw_over_steps(name, data, 'x') if name in figures.OVER_STEPS else getattr(figures, f'draw_{name}')(data, 'x')


COMMON = {
    'pair': 'teacher of the same architecture',
    'runs': {'OPRD': ['oprd-s0', 'oprd-s1'], 'OPD top-1': ['mu0-s0', 'mu0-s1'], 'OPD top-1 + 1 OPRD': ['mu1-s0', 'mu1-s1'],
             'OPD top-1 + 10 OPRD': ['mu10-s0', 'mu10-s1']},
    'seeds': dict.fromkeys(['OPRD', 'OPD top-1', 'OPD top-1 + 1 OPRD', 'OPD top-1 + 10 OPRD'], [0, 1]),
    'left out': [], 'problems': {'eval': 64}, 'answers': 16,
}
OUTPUT = list(COMMON['runs'])[1:]


def test_figure_1_is_accuracy_minutes_and_memory(study):
    data = figures.figure1_data(study)
    methods = {name: {'steps': 4, 'accuracy': [last, last + 1], 'minutes': approx([12 / 60, 12.04 / 60]), 'gigabytes': None}
               for name, last in zip(COMMON['runs'], (80.0, 50.0, 60.0, 70.0), strict=True)}
    assert data == COMMON | {'metric': 'avg@16', 'machine': 'cpu, ranks 1, threads 1', 'student': 20.0, 'teacher': 90.0, 'methods': methods}


def test_figure_1_counts_the_steps_up_to_the_last_accuracy(tmp_path):
    """A run that goes on has steps behind its last evaluation, whose time is not that of its accuracy."""
    log = {name: values[:4] for name, values in columns(50.0).items()}
    method = figures.figure1_data(read_runs([write_run(tmp_path / 'a', log)]))['methods']['OPRD']
    assert method['steps'] == 2 and method['accuracy'] == [40.0] and method['minutes'] == [pytest.approx(4 / 60)]


def test_figure_1_with_memory(tmp_path, drawn):
    """The area of a bubble is proportional to the largest step's memory. Where one method has none, all bubbles are equal and
    the figure says so."""
    folders = []
    for name, peak, keys in (('a', 20.0, {}), ('b', 5.0, TOP1)):
        folders.append(write_run(tmp_path / name, columns(50.0) | {'mem/update_dpeak': [None, 1.0, peak, 2.0, None]}, **keys))
    data = figures.figure1_data(read_runs(folders))
    assert {name: method['gigabytes'] for name, method in data['methods'].items()} == {'OPRD': [20.0], 'OPD top-1': [5.0]}
    figures.draw_figure1(data, 'x')
    folders.append(write_run(tmp_path / 'c', columns(50.0), lr=1e-4))
    figures.draw_figure1(figures.figure1_data(read_runs(folders)), 'x')
    areas = [[points.get_sizes()[0] for points in figure.axes[0].collections[::2]] for figure, _ in drawn]
    assert areas[0][0] == 4 * areas[0][1] and len(set(areas[1])) == 1
    assert 'the largest 20.0 GB' in drawn[0][1] and 'memory was not measured' in drawn[1][1]


def test_times_of_two_machines_are_not_put_side_by_side(tmp_path):
    folders = [write_run(tmp_path / 'a', columns(50.0)), write_run(tmp_path / 'b', columns(50.0), **TOP1)]
    for folder, device in zip(folders, ('cpu', 'NVIDIA H100'), strict=True):
        append_start(folder, {'versions': {'device': device, 'ranks': 1, 'threads': 1}, 'sources': {}, 'eval_data': {}}, 0)
    with pytest.raises(UserError, match='a was made on cpu, ranks 1, threads 1, and .*/b on NVIDIA H100, .* their times cannot be compared'):
        figures.figure1_data(read_runs(folders))


def test_figure_4_is_the_accuracy_of_every_seed(study):
    """With fewer than ten evaluations the mean is not smoothed."""
    curves = {name: {'steps': [0, 2, 4], 'by_seed': [[20.0, 40.0, last], [20.0, 40.0, last + 1]], 'mean': [20.0, 40.0, last + 0.5]}
              for name, last in zip(COMMON['runs'], (80.0, 50.0, 60.0, 70.0), strict=True)}
    assert figures.figure4_data(study) == COMMON | {'metric': 'avg@16', 'window': 3, 'sets': {
        'eval': {'methods': curves, 'student': 20.0, 'teacher': 90.0}}}


def test_figure_4_has_a_panel_for_each_set_and_a_rolling_mean(tmp_path, drawn):
    """Ten evaluations of two sets. The mean over sets has no panel of its own. At the ends the window narrows: the first point
    stays the untrained student."""
    scores = [10.0, 40.0, 10.0, 40.0, 70.0, 70.0, 70.0, 40.0, 70.0, 100.0]
    log = {'eval/avg@16': scores, 'eval/avg@16/aime24': [score - 10 for score in scores], 'eval/avg@16/$\\x$': scores[::-1]}
    data = figures.figure4_data(read_runs([write_run(tmp_path / 'a', log, eval_data='aime24,x')]))
    assert list(data['sets']) == ['aime24', '$\\x$'] and data['problems'] == {}
    first = data['sets']['aime24']['methods']['OPRD']
    assert first['mean'] == pytest.approx([0, 10, 20, 30, 50, 60, 50, 50, 60, 90]) and first['by_seed'] == [[score - 10 for score in scores]]
    assert data['sets']['$\\x$']['student'] == 100.0 and 'teacher' not in data['sets']['$\\x$']
    figures.draw_figure4(data, 'x')
    (figure, notes), = drawn
    assert [axes.get_title() for axes in figure.axes] == ['aime24', '$\\x$'] and notes.startswith('Thick lines: one seed, centred mean of 3 evaluations. Thin lines: the eval')
    assert [list(line.get_ydata()) for line in figure.axes[0].lines[:2]] == [first['by_seed'][0], first['mean']]


@pytest.mark.parametrize('window', [1, 3, 5])
def test_a_rolling_mean_is_centred(window):
    """It is the mean of what is measured within half a window on both sides, whatever lies between. Near an end both sides
    become shorter, so a straight line stays as it is, and the first value too: methods that begin with one student begin at
    one point."""
    steps = [1, 2, 3, 4, 6, 8, 9]
    values = [1.0, 5.0, -2.0, 8.0, 0.5, 3.0, 7.0]
    by_step = dict(zip(steps, values, strict=True))
    for step, mean in zip(steps, figures.rolling(steps, values, window), strict=True):
        half = min(window // 2, step - 1, 9 - step)
        near = [by_step[other] for other in range(step - half, step + half + 1) if other in by_step]
        assert mean == pytest.approx(sum(near) / len(near))
    line = [2.0 * at + 1 for at in range(9)]
    assert figures.rolling(range(9), line, window) == pytest.approx(line)
    assert figures.rolling([7], [4.0], window) == [4.0]


def test_a_curve_of_every_step_is_smoothed_over_a_tenth_of_the_steps(tmp_path, drawn):
    """A hundred steps: eleven of them. What is measured every ten steps stays as it is, and both say the same."""
    log = {'eval/avg@16': [20.0] * 101, 'entropy/student': [None, *range(1, 101)], 'entropy/teacher': [None if step % 20 else step / 10 for step in range(101)]}
    data = data_of(11, read_runs([write_run(tmp_path / 'a', log)]))
    smooth = {name: data[name]['OPRD']['smooth'][0] for name in ('entropy/student', 'entropy/teacher')}
    assert data['window'] == 11 and smooth['entropy/student'][:3] == [1, 2, 3] and smooth['entropy/student'][49] == 50
    assert smooth['entropy/teacher'] == [0, 2, 4, 6, 8, 10] == data['entropy/teacher']['OPRD']['by_seed'][0]
    draw(11, data)
    assert list(drawn[0][0].axes[0].lines[0].get_ydata()) == smooth['entropy/student'] and drawn[0][1] == 'Lines: one seed, centred mean of 11 steps.'


@pytest.mark.parametrize('number, name, at', [(5, 'len/mean', 0.1), (10, 'opd/overlap16', 0.7)])
def test_figures_5_and_10_are_the_logged_numbers(study, number, name, at):
    steps = {method: [1, 2, 3, 4] for method in COMMON['runs']}
    if number == 10:
        steps['OPRD'] = [1, 4]
    curves = {method: with_smooth(found, [[at + step / 100 + shift for step in found] for shift in (0, 0.01)]) for method, found in steps.items()}
    assert data_of(number, study) == COMMON | {name: approx(curves), 'window': 1}


def test_figure_9_has_the_methods_with_an_output_term(study):
    curves = {method: with_smooth([1, 2, 3, 4], [[0.4, -0.3, 0.2, 0.1], [0.41, -0.3, 0.2, 0.11]]) for method in OUTPUT}
    assert data_of(9, study) == COMMON | {'loss/opd': approx(curves), 'window': 1}


def test_figure_11_has_both_entropies(study):
    data = data_of(11, study)
    assert data['entropy/student']['OPD top-1'] == approx(with_smooth([1, 2, 3, 4], [[0.51, 0.52, 0.53, 0.54], [0.52, 0.53, 0.54, 0.55]]))
    assert data['entropy/teacher']['OPRD'] == approx(with_smooth([1, 4], [[0.61, 0.64], [0.62, 0.65]]))
    assert list(data) == [*COMMON, 'entropy/student', 'entropy/teacher', 'window'] and list(data['entropy/teacher']) == list(COMMON['runs'])


def test_figure_6_has_every_method_and_the_layers_of_two(study, drawn):
    """The first method that matches hidden states, and the last that does not: the others would hide these."""
    data = figures.figure6_data(study)
    assert data['rep/cos']['OPRD'] == approx({'steps': [1, 2, 3, 4], 'by_seed': [[0.21, 0.22, 0.23, 0.24], [0.22, 0.23, 0.24, 0.25]]})
    assert list(data['layers']) == ['OPRD', 'OPD top-1'] and list(data['layers']['OPRD']) == ['1', '2']
    assert data['layers']['OPRD']['2'] == approx({'steps': [1, 2, 3, 4], 'by_seed': [[0.41, 0.42, 0.43, 0.44], [0.42, 0.43, 0.44, 0.45]]})
    figures.draw_figure6(data, 'x')
    figure = drawn[0][0]
    assert [axes.get_title() for axes in figure.axes] == ['mean over layers', 'layers, OPRD', 'layers, OPD top-1']
    assert [text.get_text() for text in figure.axes[1].texts] == ['layer 1', 'layer 2']
    lines = [list(line.get_ydata()) for line in figure.axes[1].lines]
    assert lines == [pytest.approx([start + step / 100 + 0.005 for step in (1, 2, 3, 4)]) for start in (0.3, 0.4, 0.35)]


def test_figure_6_shows_the_layers_of_the_exact_kl(tmp_path):
    """Of the output-space methods it sees the whole distribution."""
    folders = [write_run(tmp_path / name, columns(50.0), **keys) for name, keys in (
        ('a', TOP1 | dict(opd='full')), ('b', TOP1), ('c', dict(oprd_weight=1, opd_weight=1, opd='sampled')), ('d', {}))]
    assert list(figures.figure6_data(read_runs(folders))['layers']) == ['OPRD', 'OPD full KL']
    assert list(figures.figure6_data(read_runs(folders[2:3]))['layers']) == ['OPD top-1 + 1 OPRD']


def test_figure_7_has_a_curve_for_each_mu(study, drawn):
    """OPRD alone has no mu. The learning rate stands beside it, because each mu has its own."""
    data = figures.figure7_data(study)
    assert {name: (values['mu'], values['lr']) for name, values in data['methods'].items()} == {
        'OPD top-1': (0, 0.001), 'OPD top-1 + 1 OPRD': (1, 0.002), 'OPD top-1 + 10 OPRD': (10, 0.011)}
    assert data['methods']['OPD top-1 + 1 OPRD']['by_seed'] == [[20.0, 40.0, 60.0], [20.0, 40.0, 61.0]]
    figures.draw_figure7(data, 'x')
    right = drawn[0][0].axes[1]
    assert [label.get_text() for label in right.get_xticklabels()] == ['0\nlr=0.001', '1\nlr=0.002', '10\nlr=0.011']
    assert [text.get_text() for text in right.texts] == ['50.5', '60.5', '70.5']


@pytest.mark.parametrize('number', NUMBERS)
def test_what_is_drawn_is_in_the_data(study, drawn, number):
    """Every number of a line is one of the data, or a mean of them over seeds; and the data is JSON that a reader can plot again."""
    data = data_of(number, study)
    assert json.loads(json.dumps(data)) == data
    draw(number, data)
    known = set()

    def collect(value):
        if isinstance(value, dict):
            for part in value.values():
                collect(part)
        elif isinstance(value, list) and value and isinstance(value[0], list):
            for part in [*value, [sum(seeds) / len(seeds) for seeds in zip(*value, strict=True)]]:
                collect(part)
        elif isinstance(value, list) and value and not isinstance(value[0], str):
            known.update(round(part, 9) for part in [*value, sum(value) / len(value)])
        elif isinstance(value, float):
            known.add(round(value, 9))
    collect(data)
    (figure, notes), = drawn
    assert 'the seeds' in notes
    for axes in figure.axes if number != 6 else figure.axes[:1]:             # the layers of Figure 6 have a test of their own
        assert axes.get_xlabel() and axes.lines
        for line in axes.lines:
            assert {round(float(value), 9) for value in line.get_ydata()} <= known


def write_bridge(folder, shift=0.0, ranks=(1, 2, 4, 96), **other):
    layers = {}
    for layer in (1, 3):
        values = {'cos': {}, 'before': {}, 'shuffled': {}, 'mean_only': {}}
        for place, rank in enumerate(ranks):
            values['cos'][str(rank)] = 0.5 + 0.1 * layer - 0.1 * abs(place - 1) + shift
            for key in ('before', 'shuffled', 'mean_only'):
                values[key][str(rank)] = 0.1 * layer
        layers[str(layer)] = values
    made = {'rank': 2, 'used': ranks[-1], 'layers': layers, 'd': [96, 160], 'L': [4, 6], 'tokens': ['a', 'a'], 'teacher_ids': 'text',
            'bridge_fit': 'ridge'} | other
    folder.mkdir(parents=True)
    (folder / 'bridge.json').write_text(json.dumps(made))
    return folder


def test_figure_12_is_the_mean_over_layers_of_every_bridge(tmp_path, drawn):
    """Two seeds are one kind; another fit and another vocabulary are others. The ranks are those that all seeds were judged
    at: a rank that was used in one of them is not in the other."""
    folders = [write_bridge(tmp_path / 'a0'), write_bridge(tmp_path / 'a1', 0.02, ranks=(1, 2, 4, 31, 96), rank=4),
               write_bridge(tmp_path / 'b0', bridge_fit='random'), write_bridge(tmp_path / 'c0', tokens=['a', 'b'], teacher_ids='student')]
    data = figures.figure12_data(folders)
    assert data['seeds'] == {'6 layers, width 160': ['a0', 'a1'], '6 layers, width 160, bridge_fit=random': ['b0'],
                             "6 layers, width 160, other tokens, student's ids": ['c0']}
    first = data['bridges']['6 layers, width 160']
    assert first == approx({'ranks': [1, 2, 4, 96], 'after': [[0.6, 0.7, 0.6, 0.5], [0.62, 0.72, 0.62, 0.42]], 'before': [[0.2] * 4] * 2,
                            'best rank': 2, 'best': 0.71, 'at full width': 0.46, 'rank of Theorem 3': [2, 4]})
    figures.draw_figure12(data, 'x')
    panels = drawn[0][0].axes
    assert [text.get_text() for axes in panels for text in axes.texts] == ['0.710 at r = 2', '0.700 at r = 2', '0.700 at r = 2']
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[0].lines}
    assert lines['after stage 1'] == pytest.approx([0.61, 0.71, 0.61, 0.46]) and lines['before stage 1'] == pytest.approx([0.2] * 4)
    assert list(panels[0].get_xticks()) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize('changes', [{'d': [96]}, {'d': None}, {'L': ['4', '6']}, {'tokens': 'ab'}, {'teacher_ids': 5}, {'layers': {}}])
def test_a_damaged_bridge_is_refused_in_one_line(tmp_path, changes):
    with pytest.raises(UserError, match='bridge.json: .*; rerun bridge.py') as error:
        figures.figure12_data([write_bridge(tmp_path / 'a', **changes)])
    assert '\n' not in str(error.value)


def test_bridges_of_other_students_are_two_kinds(tmp_path):
    """Their name tells of the teacher alone: they were seeds of one bridge."""
    folders = [write_bridge(tmp_path / 'a'), write_bridge(tmp_path / 'b', d=[48, 160])]
    assert figures.figure12_data(folders)['seeds'] == {'6 layers, width 160, d=[96, 160]': ['a'], '6 layers, width 160, d=[48, 160]': ['b']}


def test_many_panels_are_three_side_by_side(tmp_path, drawn):
    """Seven of them in one row would be narrower than their titles."""
    figures.draw_figure12(figures.figure12_data([write_bridge(tmp_path / f'{number}', d=[96, 100 + number]) for number in range(7)]), 'x')
    places = [axes.get_position() for axes in drawn[0][0].axes]
    assert len(places) == 7 and len({round(place.x0, 3) for place in places}) == 3 and len({round(place.y0, 3) for place in places}) == 3


def test_seeds_of_a_bridge_without_a_common_rank_are_one_line(tmp_path):
    with pytest.raises(UserError, match='no common rank; rerun bridge.py'):
        figures.figure12_data([write_bridge(tmp_path / 'a'), write_bridge(tmp_path / 'b', ranks=(3, 5))])


def test_runs_without_a_curve_are_left_out_where_others_have_one(study, tmp_path):
    """The runs of Theorem 3, one for each rank, would fill every figure with lines between two points."""
    log = {'eval/avg@16': [20.0, None, None, None, 50.0], 'len/mean': [None, 1.0, 1.0, 1.0, 1.0]}
    two = read_runs([write_run(tmp_path / 'two', log, lr=5e-3)])
    data = data_of(5, study + two)
    assert data == data_of(5, study) | {'left out': ['two']}
    assert list(data_of(5, two)['len/mean']) == ['OPRD']


def test_each_pair_of_models_has_its_figure(tmp_path, drawn):
    """Runs with teachers of another shape or vocabulary have other lines for the teacher."""
    folders = [write_run(tmp_path / 'same', columns(50.0))]
    for pair, file in (('bridge', 'configs/toy_bridge.py'), ('tokens', 'configs/toy_bridge_tokens.py')):
        folders.append(write_run(tmp_path / pair, columns(50.0), file))
    names = [file.name for file in figures.figure5(folders, tmp_path / 'to')]
    assert names == [f'figure5{pair}.{ending}' for pair in ('', '_bridge', '_tokens') for ending in ('json', 'png')]
    data = json.loads((tmp_path / 'to/figure5_tokens.json').read_text())
    assert data['pair'] == 'teacher of another vocabulary' and list(data['len/mean']) == ['OPRD-Bridge r=32']


@pytest.mark.parametrize('number, log, says', [
    (5, {'loss': [None, 1.0]}, r'no run has logged len/mean, the length of answers; python -m studies.compare toy_paper makes'),
    (9, {'loss': [None, 1.0]}, 'no run has logged loss/opd, a term in the output space; python -m'),
    (11, {'loss': [None, 1.0]}, 'no run has logged entropy/student or entropy/teacher, entropies; python -m'),
    (1, {'loss': [None, 1.0]}, 'the runs were not evaluated; python -m'),
    (4, {'loss': [None, 1.0]}, 'the runs were not evaluated; python -m'),
    (7, {'eval/avg@16': [1.0, 2.0]}, 'fewer than two weights mu of Eq. .6. beside OPD top-1; python -m'),
])
def test_what_is_missing_is_said(tmp_path, number, log, says):
    folder = write_run(tmp_path / 'a', log)
    with pytest.raises(Missing, match=says):
        getattr(figures, f'figure{number}')([folder], tmp_path / 'to')
    assert not (tmp_path / 'to').exists()
    with pytest.raises(Missing, match='no run of distill.py in the folders; python -m studies.compare toy_paper makes'):
        getattr(figures, f'figure{number}')([write_bridge(tmp_path / 'b')], tmp_path / 'to')
    with pytest.raises(Missing, match='no bridge in the folders; python bridge.py configs/toy_bridge.py makes one'):
        figures.figure12([folder], tmp_path / 'to')


def test_seeds_that_were_measured_after_other_steps_are_one_line(tmp_path):
    """It was a traceback: zip() argument 2 is shorter than argument 1."""
    log = columns(50.0)
    folders = [write_run(tmp_path / 'a', log), write_run(tmp_path / 'b', {name: values[:4] for name, values in log.items()}, seed=1)]
    for number, name, steps in ((4, 'eval/avg@16', r'0, 2, 4; 0, 2\)'), (5, 'len/mean', r'1, 2, \.\.\. 4; 1, 2, 3\)')):
        with pytest.raises(UserError, match=f'a and .*/b are seeds of OPRD and have {name} after other steps .{steps}; finish both') as error:
            getattr(figures, f'figure{number}')(folders, tmp_path / 'to')
        assert '\n' not in str(error.value) and not isinstance(error.value, Missing)


def test_numbers_that_cannot_be_drawn_are_refused(tmp_path):
    """Three of the largest floats have no mean; problems are counted."""
    folder = write_run(tmp_path / 'a', columns(50.0) | {'loss/opd': [None, 1e308, 0.0, 0.0, 0.0]}, **TOP1)
    with pytest.raises(UserError, match=r'a/log.jsonl:2: loss/opd = 1e\+308; wants a finite number'):
        figures.figure9([folder], tmp_path / 'to')
    append_start(folder, {'versions': {}, 'sources': {}, 'eval_data': {}, 'problems': {'eval_data': {'eval': 'many'}}}, 0)
    with pytest.raises(UserError, match="a/starts.jsonl: problems: eval_data = {'eval': 'many'}; wants"):
        figures.figure4([folder], tmp_path / 'to')


def test_a_run_that_went_on_with_another_eval_n_is_refused(tmp_path):
    """Its log has two kinds of scores, and the curve of the first kind would end where the second begins."""
    folder = write_run(tmp_path / 'a', {'eval/avg@8': [1.0, 2.0, None], 'eval/avg@16': [None, None, 3.0]})
    with pytest.raises(UserError, match='a: scores of avg@8 before the first step, where eval_n=16 and .*; give runs that were evaluated alike'):
        figures.figure4([folder], tmp_path / 'to')


def test_a_figure_is_three_files_and_the_same_bytes_twice(tmp_path):
    """JSON, PNG and PDF, in colors that follow from the method and not from the order in which figures were drawn."""
    folders = [write_run(tmp_path / 'a', columns(50.0)), write_run(tmp_path / 'b', columns(60.0), rep_loss='nmse', lr=3e-3)]
    files = figures.figure9([write_run(tmp_path / 'c', columns(50.0), **TOP1)], tmp_path / 'first')
    first = figures.figure5(folders, tmp_path / 'first')
    second = figures.figure5(folders, tmp_path / 'second')
    assert [file.name for file in files] == ['figure9.json', 'figure9.png', 'figure9.pdf']
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and one.stat().st_size > 400
