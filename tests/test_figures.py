"""The figure is drawn from what the log says."""
import json
import subprocess
import sys
from itertools import pairwise

import pytest
from conftest import badly_placed_texts
from conftest import write_log as write_rows
from matplotlib import pyplot

from configs import load_config
from studies import figures
from studies.drawing import SPACING
from studies.figures import bridges, curve, main
from support.provenance import append_start
from support.runtime import UserError, run


def write_log(folder, shift=0.0, evaluate=True, **keys):
    folder.mkdir(parents=True)
    keys = dict(eval_n=4, eval_data='toy' if evaluate else '') | keys
    config = load_config(['configs/toy.py', *(f'{key}={value}' for key, value in keys.items())])
    (folder / 'config.json').write_text(json.dumps({'config': config}))
    exam = {'avg@4': 20.0, 'best@4': 60.0, 'len': 9.0} if evaluate else {}
    rows = [{'step': 0, **{f'eval/{name}': value for name, value in exam.items()}, **{f'teacher/{name}': 90.0 for name in exam}}]
    for step in range(1, 5):
        rows.append({'step': step, 'rep/cos': 0.5 + shift, 'rep/cos/1': 0.4 + shift, 'rep/cos/2': 0.6 + shift})
    rows[4] |= {f'eval/{name}': 70.0 + shift for name in exam}
    write_rows(folder, rows)
    return folder


def test_lines_are_the_logged_numbers(tmp_path, kept):
    """Student and teacher lines, evaluated points, mean and per-layer cosines, for two runs."""
    curve([write_log(tmp_path / 'a'), write_log(tmp_path / 'b', 0.1)], tmp_path / 'c.png')
    acc, rep = kept[0].axes
    lines = {line.get_label(): line.get_ydata() for line in acc.lines}
    assert list(lines['a']) == [20.0, 70.0] and list(lines['b']) == [20.0, 70.1]
    assert set(lines['teacher']) == {90.0} and set(lines['student before']) == {20.0}
    rows = sorted(round(float(line.get_ydata()[0]), 3) for line in rep.lines)
    assert rows == [0.4, 0.5, 0.5, 0.6, 0.6, 0.7] and len(rep.lines[0].get_xdata()) == 4
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in (*acc.lines[:2], rep.lines[2], rep.lines[5])]
    assert looks[0] == looks[2] != looks[1] == looks[3] and badly_placed_texts(kept[0]) == []
    assert (tmp_path / 'c.png').stat().st_size > 10_000


def test_a_teacher_that_was_not_evaluated_has_no_line(tmp_path, kept):
    """One that does not fit whole: the student's curve is drawn all the same."""
    folder = write_log(tmp_path / 'a')
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    write_rows(folder, [{name: value for name, value in row.items() if not name.startswith('teacher/')} for row in rows])
    curve([folder], tmp_path / 'c.png')
    assert [line.get_label() for line in kept[0].axes[0].lines] == ['a: distilled', 'student before']


def test_each_of_several_teachers_has_its_line(tmp_path, kept):
    """The first one's score stood there as that of the teacher."""
    folder = write_log(tmp_path / 'a')
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    rows[0] |= {'teacher2/avg@4': 40.0, 'teacher2/best@4': 60.0, 'teacher2/len': 9.0}
    write_rows(folder, rows)
    curve([folder], tmp_path / 'c.png')
    lines = {line.get_label(): line for line in kept[0].axes[0].lines}
    assert list(lines['teacher'].get_ydata()) == [90.0, 90.0] and list(lines['teacher2'].get_ydata()) == [40.0, 40.0]
    looks = {(line.get_color(), str(line.get_linestyle())) for line in lines.values()}
    assert len(looks) == len(lines) == 4 and badly_placed_texts(kept[0]) == []


@pytest.mark.parametrize('layers', [[2, 5, 9], list(range(1, 37))], ids=['few', 'many'])
def test_layers_can_be_told_apart(tmp_path, kept, layers):
    """By names at the ends of their lines, each in the color of its line and none over another; of many layers by a color
    bar of the student's layer numbers. They were thin lines of one color."""
    folder = write_log(tmp_path / 'a')
    ends = {l: 0.9 + 0.001 * (l % 7) for l in layers}
    rows = [{'step': 0}] + [{'step': s, 'rep/cos': 0.9, **{f'rep/cos/{l}': end for l, end in ends.items()}} for s in (1, 2)]
    write_rows(folder, rows)
    curve([folder], tmp_path / 'c.png')
    _, panel, *rest = kept[0].axes
    lines = dict(zip(layers, panel.lines[:-1], strict=True))
    assert {l: line.get_ydata()[-1] for l, line in lines.items()} == ends and panel.lines[-1].get_label() == 'mean over layers'
    assert len({line.get_color() for line in lines.values()}) == len(layers) and badly_placed_texts(kept[0]) == []
    if len(layers) > 10:
        bar, = rest
        assert bar.get_ylabel() == 'student layer' and bar.get_ylim() == (1, 36) and not panel.texts
        return
    assert not rest
    names = {text.get_text(): text for text in panel.texts}
    assert {f'layer {l}': line.get_color() for l, line in lines.items()} == {name: text.get_color() for name, text in names.items()}
    heights = sorted(text.get_position()[1] for text in names.values())
    assert heights[0] >= 0 and heights[-1] <= 1 and min(high - low for low, high in pairwise(heights)) >= 0.055 - 1e-9
    inside = panel.get_window_extent()
    for text in names.values():              # the names floated above the panel
        assert inside.y0 <= text.get_window_extent().y0 and text.get_window_extent().y1 <= inside.y1
    by_height = sorted(ends, key=ends.get)
    assert [f'layer {l}' for l in by_height] == sorted(names, key=lambda name: names[name].get_position()[1])


def test_a_figure_that_cannot_be_drawn_is_a_line(tmp_path, capsys, monkeypatch):
    """During a run, whatever is wrong with it: hours of training must not end because of a picture."""
    folder = write_log(tmp_path / 'a')
    figures.redraw(folder)
    assert (folder / 'curve.png').exists() and not (folder / 'curve.pdf').exists() and capsys.readouterr().out == ''
    for error in (OSError(28, 'No space left on device', 'x'), ImportError('no matplotlib'), ZeroDivisionError('\x1b[2J' + 'y' * 1000), ValueError('a\nb')):
        def broken(*_, error=error):
            raise error
        monkeypatch.setattr(figures, 'save', broken)
        figures.redraw(folder)
        line = capsys.readouterr().out
        assert line.startswith(f'  note: {folder}/curve.png could not be drawn ({type(error).__name__}: ') and '\x1b' not in line
        assert line.endswith(f'python -m studies.figures {folder}\n') and line.count('\n') == 1 and len(line) < 400


def test_figures_are_not_kept_open(tmp_path, monkeypatch):
    """A log that was refused left its figure open, and after twenty of them matplotlib warned about memory."""
    damaged = write_log(tmp_path / 'a')
    (damaged / 'log.jsonl').write_text('{"step": 1}\n')
    with pytest.raises(UserError):
        curve([damaged], tmp_path / 'c.png')
    monkeypatch.setattr(figures, 'draw_layers', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        curve([write_log(tmp_path / 'b')], tmp_path / 'c.png')
    assert pyplot.get_fignums() == []


def test_a_run_without_evaluation_is_drawn_too(tmp_path):
    curve([write_log(tmp_path / 'a', evaluate=False)], tmp_path / 'c.png')
    assert (tmp_path / 'c.png').exists()


def test_steps_without_cosines_are_passed_over(tmp_path, kept):
    """An OPD run looks at hidden states now and then only; one between unlike widths never."""
    folder = write_log(tmp_path / 'a')
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    for row in rows[2:4]:
        row |= {'rep/cos': None, 'rep/cos/1': None, 'rep/cos/2': None}
    write_rows(folder, rows)
    curve([folder], tmp_path / 'c.png')
    assert [list(line.get_xdata()) for line in kept[0].axes[1].lines] == [[1, 4]] * 3
    write_rows(folder, [{k: v for k, v in r.items() if k[:3] != 'rep'} for r in rows])
    curve([folder], tmp_path / 'c.png')


@pytest.mark.parametrize('keys, says', [
    (dict(eval_n=16), 'eval_n=4 and 16'),
    (dict(eval_data='aime24'), "eval_data='toy' and 'aime24'"),
    (dict(eval_problems=30), 'eval_problems=0 and 30'),
    (dict(eval_temperature=1.0), 'eval_temperature=0.7 and 1.0'),
    (dict(max_new_tokens=20), 'eval_max_new_tokens=48 and 20'),      # 0 stands for it, and was equal to itself
    (dict(eval_max_new_tokens=20), 'eval_max_new_tokens=48 and 20'),
    (dict(student='me/student'), "student='toy' and 'me/student'"),
    (dict(toy_width=48), 'toy_width=96 and 48'),
    (dict(seed=1), 'seed=0 and 1'),
    (dict(eval_n=16, student='s'), "student='toy' and 's', eval_n=4 and 16"),
])
def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys, keys, says):
    """Curves of another eval_n, other problems or another student used to stand in one panel with one label."""
    runs = [write_log(tmp_path / 'a'), write_log(tmp_path / 'b'), write_log(tmp_path / 'c', **keys)]
    with pytest.raises(SystemExit) as end:
        run(main, lambda: [str(folder) for folder in runs])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count('\n') == 1
    assert f'{runs[0]} and {runs[2]} cannot be compared: {says};' in printed
    assert not (runs[0] / 'curve.png').exists()
    main([str(runs[2])])                     # alone it can be drawn


@pytest.mark.parametrize('number, change, says', [
    (0, {'student': {'avg@4': 20.0}, 'teacher': {}}, ":1: 'student' is a name in the logs of earlier versions"),
    (0, {'eval/avg@4': [1]}, ':1: eval/avg@4 = [1]; wants a finite number'),
    (0, {'eval/avg@4': {'x': None}}, ":1: eval/avg@4 = {'x': None}; wants a finite number"),
    (0, {'eval/avg@4': 10**400}, ':1: eval/avg@4 = 1000'),
    (0, {'eval/avg@4': None}, ':1: wants the same scores of student and teacher'),
    (0, {'teacher/avg@4': None}, ':1: wants the same scores of student and teacher'),
    (4, {'eval/avg@4': 10**400}, ':5: eval/avg@4 = 1000'),
    (4, {'eval/avg@4': 'x'}, ":5: eval/avg@4 = 'x'; wants a finite number"),
    (2, {'rep/cos': float('nan')}, ':3: rep/cos = nan; wants a finite number'),
    (2, {'rep/cos/1': 'a'}, ":3: rep/cos/1 = 'a'; wants a finite number"),
    (2, {'rep/cos/2': [0.5]}, ':3: rep/cos/2 = [0.5]; wants a finite number'),
    (2, {'rep/cos/2': None}, ':3: the cosines of 1 of 2 layers, and a mean'),
    (2, {'rep/cos': None}, ':3: the cosines of 2 of 2 layers, and no mean'),
    (2, {'rep/cos/1': None, 'rep/cos/2': None}, ':3: the cosines of 0 of 2 layers, and a mean'),
    (2, {'rep/cos/3': 0.5}, ":3: other names than in line 1 ('rep/cos/3')"),
])
def test_a_log_that_cannot_be_drawn_is_refused_in_one_line(tmp_path, number, change, says):
    """Each was a traceback: a KeyError, a TypeError, an OverflowError."""
    folder = write_log(tmp_path / 'a')
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    rows[number] |= change
    (folder / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with pytest.raises(UserError) as error:
        main([str(folder)])
    assert f'{folder}/log.jsonl{says}' in str(error.value) and not (folder / 'curve.png').exists()


@pytest.mark.parametrize('layers', [{}, {'rep/cos/x': 0.5}, {'rep/cos/-1': 0.5, 'rep/cos/01': 0.5}])
def test_a_log_with_a_mean_over_no_layers_is_refused(tmp_path, layers):
    """It was a ValueError: the least of no numbers, or the number of a layer called x."""
    folder = write_log(tmp_path / 'a')
    write_rows(folder, [{'step': 0}, {'step': 1, 'rep/cos': 0.5, **layers}])
    with pytest.raises(UserError, match='log.jsonl:2: the cosines of 0 of 0 layers, and a mean'):
        main([str(folder)])


@pytest.mark.parametrize('config', [None, [], 5, 'x'])
def test_a_config_that_describes_no_run_is_refused(tmp_path, config):
    runs = [write_log(tmp_path / 'a'), write_log(tmp_path / 'b')]
    (runs[1] / 'config.json').write_text(json.dumps({'config': config}))
    with pytest.raises(UserError, match='b/config.json: config = .*; wants an object; it does not describe a run'):
        main([str(folder) for folder in runs])


def test_names_are_drawn_as_they_are(tmp_path, kept, recwarn):
    """A '$' began a formula of matplotlib, which may be wrong, and a control character reached the terminal in a
    warning."""
    main([str(write_log(tmp_path / '$\\x$\x1b'))])
    labels = [line.get_label() for line in kept[0].axes[0].lines]
    legend, = kept[0].legends                # no place in the right panel is free of lines
    assert labels[0] == '$\\x$\x1b: distilled' and legend.get_texts()[0].get_text() == '$\\x$\\x1b: distilled'
    assert not [warning for warning in recwarn if 'missing from' in str(warning.message)]


def test_runs_of_different_code_are_drawn_with_a_line(tmp_path, capsys):
    """The files differ, which may well be what the figure shows; the line names them. Runs of the same code, and of versions
    that did not note it, need none."""
    runs = [str(write_log(tmp_path / name)) for name in 'abc']
    for folder, losses in zip(runs, ('1', '1', '2'), strict=True):
        append_start(folder, {'versions': {'git': 'abc'}, 'sources': {'losses.py': losses}, 'eval_data': {}}, 0)
    old = str(write_log(tmp_path / 'd'))
    main([*runs[:2], old])
    assert capsys.readouterr().out == f'{runs[0]}/curve.png {runs[0]}/curve.pdf\n'
    main(runs)
    printed = capsys.readouterr().out
    assert printed.count('\n') == 2 and printed.startswith('note: the runs were not all made by the same code: it differs in losses.py')


def test_runs_that_differ_in_the_method_are_drawn(tmp_path):
    """Objective, rate, length, teacher, and how often and how fast a run is evaluated. Runs with and without eval_teacher
    were refused, though the student's scores are the same."""
    keys = dict(lr=1e-5, steps=7, opd_weight=1, oprd_weight=0, layers='last', positions='last_k', teacher='me/t',
                toy_teacher_width=48, toy_dir='other', eval_every=3, eval_rows=5, eval_teacher=False, n=4, out_dir='b', max_new_tokens=20,
                eval_max_new_tokens=48)
    runs = [write_log(tmp_path / 'a'), write_log(tmp_path / 'b', **keys), write_log(tmp_path / 'c', evaluate=False)]
    curve(runs, tmp_path / 'c.png')
    assert (tmp_path / 'c.png').exists()

    # A run of an earlier version lacks a key that has come since; it had the default's effect.
    config = json.loads((runs[0] / 'config.json').read_text())
    del config['config']['eval_suffix']
    (runs[0] / 'config.json').write_text(json.dumps(config))
    curve(runs, tmp_path / 'c.png')

    # Real models: the seed chooses samples only.
    real = [write_log(tmp_path / f'r{seed}', student='a/b', eval_data='aime24', seed=seed) for seed in (0, 1)]
    curve(real, tmp_path / 'd.png')
    (real[1] / 'config.json').unlink()
    with pytest.raises(UserError, match='config.json: no such file'):
        curve(real, tmp_path / 'd.png')


def test_of_several_sets_the_mean_is_drawn_and_alone_each_set(tmp_path, kept):
    """The plain name comes first and is the mean over sets."""
    runs = [write_log(tmp_path / 'a'), write_log(tmp_path / 'b')]
    for folder in runs:
        rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
        for row, name in ((rows[0], 'eval/avg@4'), (rows[0], 'teacher/avg@4'), (rows[4], 'eval/avg@4')):
            row |= {f'{name}/aime24': row[name] - 8, f'{name}/me/set': row[name] + 8}
        write_rows(folder, rows)
    curve(runs[:1], tmp_path / 'c.png')
    curve(runs, tmp_path / 'd.png')
    lines = {line.get_label(): list(line.get_ydata()) for line in kept[0].axes[0].lines}
    assert lines['a: distilled'] == [20, 70] and lines['aime24'] == [12, 62] and lines['me/set'] == [28, 78]
    assert kept[0].axes[0].get_ylabel() == 'Avg@4, %, mean of 2 sets' and lines['teacher'] == [90, 90]
    labels = [line.get_label() for line in kept[1].axes[0].lines]
    assert labels == ['a', 'b', 'teacher', 'student before'] and badly_placed_texts(kept[0]) == badly_placed_texts(kept[1]) == []


def write_bridge(folder, used, shift):
    layers = {str(l): {key: {str(r): 0.1 * l + 0.01 * r + shift - 0.3 * i for r in (1, 2, 4)}
                       for i, key in enumerate(('cos', 'before', 'shuffled', 'mean_only'))} for l in (1, 3)}
    folder.mkdir(parents=True)
    (folder / 'bridge.json').write_text(json.dumps({'rank': 2, 'used': used, 'layers': layers}))
    return folder


def test_bridges_side_by_side(tmp_path, kept):
    """Mean over layers at every rank, each layer at the rank that is used; one alone has its controls and
    Theorem 3's rank."""
    a, b = write_bridge(tmp_path / 'a', 4, 0.0), write_bridge(tmp_path / 'b', 1, 0.5)
    main([str(a), str(b)])
    rank, layer = kept[0].axes
    for ax, want in ((rank, [[0.21, 0.22, 0.24], [0.71, 0.72, 0.74]]), (layer, [[0.14, 0.34], [0.61, 0.81]])):
        assert [list(line.get_ydata()) == pytest.approx(w) for line, w in zip(ax.lines, want, strict=True)] == [True, True]
    assert [line.get_label() for line in layer.lines] == ['a, used rank 4', 'b, used rank 1']
    assert (a / 'bridge.png').exists() and (a / 'bridge.pdf').exists()
    bridges([a], tmp_path / 'c.png')
    rank, layer = kept[1].axes
    labels = [line.get_label() for line in rank.lines]
    assert [w for w in labels if w[0] != '_'] == ['bridge', 'random P_S', 'shuffled pairs', 'mean alone', 'Theorem 3: rank 2']
    assert len(labels) == 7 and len(layer.lines) == 4 and layer.get_title() == 'each layer at rank 4, which is used'


def test_a_bridge_judged_at_every_rank_up_to_3072_is_drawn(tmp_path, kept):
    """The paper's widest model. Ticks at the powers of two of the widest folder, also if it is not the last;
    markers at some of the 3072 points, and room for all numbers at the ticks."""
    folders = []
    for name, width in (('wide', 3072), ('narrow', 6)):
        values = {key: {str(rank): rank / width for rank in range(1, width + 1)} for key in ('cos', 'before', 'shuffled', 'mean_only')}
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / 'bridge.json').write_text(json.dumps({'rank': 5, 'used': width, 'layers': {str(l): values for l in range(1, 29)}}))
    bridges(folders, tmp_path / 'c.png')
    bridges(folders[:1], tmp_path / 'd.png')
    for figure in kept:
        rank, layer = figure.axes
        assert list(rank.get_xticks()) == [2**i for i in range(12)]
        wide = rank.lines[0]
        assert list(wide.get_xdata()) == list(range(1, 3073)) and wide.get_markevery() == SPACING
        assert badly_placed_texts(figure) == []
        assert [text.get_text() for text in rank.get_xticklabels()] == ['1', '', '4', '', '16', '', '64', '', '256', '', '1024', '']
    assert kept[0].axes[0].lines[1].get_markevery() is None and list(kept[0].axes[1].lines[0].get_ydata()) == [1.0] * 28
    assert kept[1].axes[1].lines[0].get_label() == 'bridge' and kept[1].axes[1].get_title() == 'each layer at rank 3072, which is used'


def test_script_and_its_errors(tmp_path):
    write_log(tmp_path / 'a')
    p = subprocess.run([sys.executable, '-m', 'studies.figures', 'a'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and (tmp_path / 'a/curve.png').exists()
    for folders, says in (([], 'no run folder'), ([str(tmp_path / 'none')], 'no such file')):
        with pytest.raises(UserError, match=says):
            main(folders)
    with pytest.raises(UserError, match='python -m studies.compare toy_comparison'):
        main(['--run', 'toy'])
    (tmp_path / 'a/log.jsonl').write_text('')
    with pytest.raises(UserError, match='no steps in it'):
        main([str(tmp_path / 'a')])


def test_a_damaged_bridge_json_is_one_line(tmp_path):
    """An empty one was a KeyError; NaN, words and lists went on into matplotlib."""
    numbers = {'1': 0.5, '2': 0.6}
    fine = {'rank': 2, 'used': 2, 'layers': {'1': dict.fromkeys(('cos', 'before', 'shuffled', 'mean_only'), numbers)}}
    file = tmp_path / 'bridge.json'
    file.write_text(json.dumps(fine))
    bridges([tmp_path], tmp_path / 'c.png')
    layer = fine['layers']['1']
    for broken in ({}, fine | {'layers': {}}, fine | {'layers': []}, fine | {'used': 3}, fine | {'rank': '2'}, fine | {'used': True},
                   *({**fine, 'layers': {'1': layer | {'cos': cos}}} for cos in ({}, {'1': 0.5}, {'1': 0.5, '2': float('nan')},
                                                                              {'1': 0.5, '2': 'x'}, [0.5], None, {'2': 0.6, '1': 0.5})),
                   fine | {'layers': {'one': layer}}, fine | {'layers': {'1': layer, '2': {}}}, fine | {'layers': {'1': 5}}):
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match='bridge.json: .*; rerun bridge.py') as error:
            bridges([tmp_path], tmp_path / 'c.png')
        assert '\n' not in str(error.value)
