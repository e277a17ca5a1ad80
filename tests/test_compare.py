"""A comparison: its runs, its table, its figure."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import argv, badly_placed_texts, for_script, write_log

from studies.children import log_text, run_logged, show_failure
from studies.compare import (
    comparison_figure,
    comparison_table,
    launch,
    main,
    notes_under_table,
    read_finished_log,
)
from support.provenance import append_start, source_digests
from support.runtime import UserError


def seeds(*finals):
    """Logs of one method, a seed for each final accuracy; steps of 5 ms after 7 ms of rollout."""
    times = {'time/sample': 0.007, 'time/teacher': 0.001, 'time/student': 0.003, 'time/update': 0.001}
    logs = []
    for i, final in enumerate(finals):
        exam = {'avg@4': 20.0 + i, 'best@4': 60.0, 'len': 9.0}
        teacher = {f'teacher/{name}': 90.0 for name in exam}
        names = dict.fromkeys(['step', *(f'eval/{name}' for name in exam), *teacher, *times])
        rows = [names | {'step': 0, **{f'eval/{name}': value for name, value in exam.items()}, **teacher}]
        rows += [names | {'step': s, **times} for s in (1, 2)]
        rows[1] |= {'eval/avg@4': 30.0, 'eval/best@4': 70.0, 'eval/len': 9.0}
        rows[2] |= {'eval/avg@4': final, 'eval/best@4': 80.0, 'eval/len': 10.0}
        logs.append(rows)
    return logs


def start_of(folder, losses=None, **changes):
    """Give a run folder one start, by the code that there is now, or with another losses.py."""
    sources = source_digests() | ({'losses.py': losses} if losses else {})
    row = {'versions': {'git': 'abc'}, 'sources': sources, 'student': 's', 'eval_data': {'toy': 'e'}} | changes
    folder.mkdir(exist_ok=True)
    (folder / 'starts.jsonl').unlink(missing_ok=True)
    append_start(folder, row, 0)


def test_runs_of_a_seed_that_began_with_other_files_are_told(tmp_path):
    """Two methods, two seeds: seeds may differ in student and problems, methods may not. All that differs else is the
    method's. The lines stand apart from the table, each in a paragraph of its own."""
    folders = {(name, seed): tmp_path / f'{name}-{seed}' for name in 'ab' for seed in (0, 1)}
    for (name, seed), folder in folders.items():
        start_of(folder, student=f's{seed}', eval_data={'toy': f'e{seed}'}, teacher=name, data=name, bridge=name)
    assert notes_under_table(folders, [0, 1]) == []
    start_of(folders['b', 0], student='s0', eval_data={'toy': 'other'})
    start_of(folders['b', 1], student='other', eval_data={'toy': 'e1'})
    first, second, third, fourth = notes_under_table(folders, [0, 1])
    assert first == third == '' and 'the runs of seed 0 differ in the held-out problems' in second
    assert 'the runs of seed 1 differ in the student that it started from' in fourth
    for folder in folders.values():
        (folder / 'starts.jsonl').unlink()
    (_, line) = notes_under_table(folders, [0, 1])
    assert line.startswith('When this table was written: 4 of 4 runs do not say what code made them')


def test_comparison_table_by_hand():
    table = comparison_table({'a': seeds(50.0, 60.0, 70.0), 'b': seeds(1.0, 1.0, 4.0)})
    assert table[0] == '| method | Avg@4 | Best@4 | length | steps | seconds | ms a step | seeds |'
    assert table[2] == '| student | 21.0 (20.0-22.0) | 60.0 (60.0-60.0) | 9.0 (9.0-9.0) |  |  |  | 3 |'
    assert table[4] == '| a | 60.0 (50.0-70.0) | 80.0 (80.0-80.0) | 10.0 (10.0-10.0) | 2 | 0 | 5 | 3 |'
    assert table[5].startswith('| b | 2.0 (1.0-4.0) |') and len(table) == 6
    assert comparison_table({'a': seeds(50.0)})[4].startswith('| a | 50.0 | 80.0 |')


def test_a_table_of_several_sets_shows_their_mean():
    """Names such as avg@4/aime24 stand beside avg@4 in the log."""
    logs = {'a': seeds(50.0, 60.0)}
    for rows in logs['a']:
        for row in rows:
            row |= {f'{name}/aime24': -1.0 for name, value in row.items() if name.startswith(('eval', 'teacher')) and value is not None}
    assert comparison_table(logs) == comparison_table({'a': seeds(50.0, 60.0)})


def test_teachers_that_were_not_evaluated_are_left_out(tmp_path, kept):
    logs = {'a': seeds(50.0, 60.0)}
    with_teacher = comparison_table(logs)
    for rows in logs['a']:
        rows[0] |= {name: None for name in rows[0] if name.startswith('teacher/')}
    assert comparison_table(logs) == [line for line in with_teacher if not line.startswith('| teacher')] and len(with_teacher) == 5
    comparison_figure(logs, {'all': ['a']}, tmp_path / 'c.png')
    assert [line.get_label() for line in kept[0].axes[0].lines if line.get_label()[0] != '_'] == ['a', 'student']


def test_each_of_several_teachers_has_its_line_in_table_and_figure(tmp_path, kept):
    logs = {'a': seeds(50.0, 60.0)}
    one = comparison_table(logs)
    for rows in logs['a']:
        rows[0] |= {f'teacher2/{name[8:]}': value / 2 for name, value in rows[0].items() if name.startswith('teacher/')}
    table = comparison_table(logs)
    assert table[:4] + table[5:] == one and table[4].startswith('| teacher2 | 45.0 (45.0-45.0) |')
    comparison_figure(logs, {'all': ['a']}, tmp_path / 'c.png')
    lines = {line.get_label(): line.get_ydata()[0] for line in kept[0].axes[0].lines if line.get_label()[0] != '_'}
    assert lines['teacher'] == 90.0 and lines['teacher2'] == 45.0 and list(lines)[-3:] == ['teacher', 'teacher2', 'student']


def test_comparison_figure_draws_means_and_each_seed(tmp_path, kept):
    """The seeds as thin lines in the method's color; a method has one look in all panels, and one legend names all."""
    logs = {'a': seeds(50.0, 60.0, 70.0), 'b': seeds(1.0, 1.0, 4.0)}
    comparison_figure(logs, {'both': ['a', 'b'], 'one': ['b']}, tmp_path / 'c.png')
    both, one = kept[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in both.lines if line.get_label()[0] != '_'}
    assert lines['a'] == [21.0, 30.0, 60.0] and lines['b'] == [21.0, 30.0, 2.0] and set(lines['teacher']) == {90.0}
    assert set(lines['student']) == {21.0}
    assert [line.get_label() for line in one.lines if line.get_label()[0] != '_'] == ['b', 'teacher', 'student']
    thin = [line for line in both.lines if line.get_linewidth() < 0.6]
    assert [list(line.get_ydata()) for line in thin] == [[20 + seed, 30, final] for finals in ((50, 60, 70), (1, 1, 4)) for seed, final in enumerate(finals)]
    of_b = {line.get_color() for line in (*thin[3:], both.lines[7], *one.lines[:4])}
    assert len(of_b) == 1 and {line.get_color() for line in thin[:3]} == {both.lines[3].get_color()} != of_b
    legend, = kept[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ['a', 'b', 'teacher', 'student']
    assert [text.get_text() for text in kept[0].texts] == ['mean of 3 seeds; thin: each seed']


def test_seven_panels_stand_in_three_rows(tmp_path, kept):
    """In one row each was a finger wide."""
    logs = {'a': seeds(50.0)}
    comparison_figure(logs, {f'panel {i}': ['a'] for i in range(7)}, tmp_path / 'c.png')
    assert [panel.get_title() for panel in kept[0].axes] == [f'panel {i}' for i in range(7)]
    assert [bool(panel.get_ylabel()) for panel in kept[0].axes] == [i % 3 == 0 for i in range(7)]
    assert [bool(panel.get_xlabel()) for panel in kept[0].axes] == [i > 3 for i in range(7)]
    assert kept[0].texts[0].get_text() == 'one seed' and badly_placed_texts(kept[0]) == []


def test_seeds_evaluated_at_different_steps_are_one_line(tmp_path):
    """It was a traceback from zip: one of the runs had gone on with another eval_every."""
    logs = {'a': seeds(50.0, 60.0), 'OPD, full KL': seeds(50.0, 60.0)}
    logs['OPD, full KL'][1][1] |= {'eval/avg@4': None}
    with pytest.raises(UserError, match=r"^'OPD, full KL': seeds number 1 and 2 were evaluated at different steps \(step 1 in one only\); delete .*$"):
        comparison_figure(logs, {'all': list(logs)}, tmp_path / 'c.png')
    assert not (tmp_path / 'c.png').exists()


def test_a_comparison_runs_resumes_and_reports(toy_dir, tmp_path):
    """Two methods, two seeds of the tiny toy, the second seed's made on the way by whichever run comes
    first; again: nothing is run, the same table. A run that fails is told in one line; one that cannot
    begin is told before any other runs."""
    args = argv(toy_dir, 'x', steps=2)
    args = [a for a in args if not a.startswith('out_dir')]
    study = tmp_path / 'tiny_study.py'
    study.write_text(f"seeds = [0, 1]\nruns = {{'OPRD': {args}, 'OPD, full': {[*args, 'oprd_weight=0', 'opd_weight=1', 'opd=full']}}}\n")

    def figures():
        return subprocess.run([sys.executable, '-m', 'studies.compare', 'tiny_study.py'], cwd=tmp_path,
                              capture_output=True, text=True)
    p = figures()
    assert p.returncode == 0, p.stderr
    out = tmp_path / 'out/tiny_study'
    runs = {'oprd-s0', 'oprd-s1', 'opd_full-s0', 'opd_full-s1'}
    assert {f.name for f in out.iterdir()} == {*runs, *(f'{run}.log' for run in runs), 'table.md', 'curves.png'}
    log = (out / 'oprd-s0.log').read_text()
    assert log.startswith('$ python distill.py ') and '\nstep 0002/0002 | ' in log

    # Other code than now has made all of them: the same numbers with a line under them, and nothing is run again.
    for folder in out.glob('*/'):
        start_of(folder, losses='0')
    p = figures()
    note = ('4 of 4 runs were made by other code than there is now: losses.py (revision abc); to make them again, delete '
            'out/tiny_study/oprd-s0, out/tiny_study/opd_full-s0, out/tiny_study/oprd-s1, out/tiny_study/opd_full-s1')
    noted = (out / 'table.md').read_text()
    assert noted.splitlines()[6:] == ['', f'When this table was written: {note}.'] and noted in p.stdout
    for folder in out.glob('*/'):
        start_of(folder)
    assert figures().returncode == 0
    table = (out / 'table.md').read_text()
    assert table.count('\n') == 6 and '| OPD, full |' in table and table in noted
    logs = {f: f.read_bytes() for f in out.glob('*/log.jsonl')}
    assert figures().returncode == 0 and (out / 'table.md').read_text() == table and len(logs) == 4
    assert all(f.read_bytes() == was for f, was in logs.items())
    study.write_text(f"seeds = [0]\nruns = {{'a': {[*args, 'n=0']}, 'b': {args}}}\n")
    p = figures()
    assert p.returncode == 2 and p.stderr.startswith('error: out/tiny_study/a-s0: ') and 'n=0' in p.stderr
    assert p.stderr.count('\n') == 1 and not (out / 'b-s0').exists()
    study.write_text(f"seeds = [0]\nruns = {{'a': {[*args, 'max_new_tokens=9999', 'eval_max_new_tokens=20']}, 'b': {args}}}\n")
    p = figures()
    assert p.returncode == 2 and p.stderr.splitlines()[-1].startswith('error: out/tiny_study/a-s0: error: ') and '9999' in p.stderr
    assert p.stderr.endswith('; its log is out/tiny_study/a-s0.log\n') and (out / 'b-s0/results.json').exists()
    shown = p.stderr.splitlines()[1:-1]
    assert shown[0] == 'out/tiny_study/a-s0 has failed; the last that it said:' and shown[-1].startswith('    error: ')
    log = (out / 'a-s0.log').read_text()
    assert len(shown) > 3 and all(f'\n{line[4:]}' in log for line in shown[1:])


def test_a_log_keeps_what_every_start_has_printed(tmp_path, monkeypatch, capsys):
    """The error output was thrown away but for its last line: of a traceback, the one without a place. What is shown is of
    the last start, and cannot command the terminal."""
    script = tmp_path / 'child.py'
    script.write_text("import sys\nprint('out', sys.argv[1], flush=True)\nprint('\\x1b[31m', file=sys.stderr)\nsys.exit(int(sys.argv[1]))")
    log = tmp_path / 'logs/a.log'
    assert [run_logged([script, code], log) for code in (0, 3)] == [0, 3]
    assert log.read_text() == f'$ python {script} 0\nout 0\n\x1b[31m\n$ python {script} 3\nout 3\n\x1b[31m\n'
    assert show_failure('a', log_text(log)) == '\\x1b[31m'
    assert capsys.readouterr().err == '\na has failed; the last that it said:\n    out 3\n    \\x1b[31m\n'
    log.write_text('$ python x\n')
    assert show_failure('a', log_text(log)) == 'it ended without a word; out of memory?'
    log.write_text('x' * 10**6 + '\n' + 'y\n' * 99)
    assert show_failure('a', log_text(log)) == 'y' and capsys.readouterr().err.count('    y\n') == 12


@pytest.mark.parametrize('first, second, says', [
    ([], ['eval_n=4'], 'eval_n=16 and 4'),
    ([], ['eval_problems=3'], 'eval_problems=0 and 3'),
    ([], ['toy_student_steps=9'], 'toy_student_steps=200 and 9'),
    (['eval_data=x'], ['eval_data=y', 'student=z'], "student='toy' and 'z', eval_data='x' and 'y'"),
    ([], ['eval_data='], 'out/mixed/b-s7: a run without evaluation cannot be put in a table'),
])
def test_a_study_that_mixes_evaluations_is_refused_before_it_runs(tmp_path, monkeypatch, first, second, says):
    """It used to run for hours, and then say so, or draw the runs as if they could be compared."""
    monkeypatch.chdir(tmp_path)
    toy = ['configs/toy.py']
    Path('mixed.py').write_text(f"seeds = [7]\nruns = {{'a': {toy + first}, 'b': {toy + second}}}\n")
    with pytest.raises(UserError) as error:
        main(['mixed.py'])
    assert says in str(error.value) and '\n' not in str(error.value) and not Path('out').exists()


def test_a_run_that_has_succeeded_is_reported_to_who_started_it(monkeypatch, tmp_path):
    """studies/healing.py then deletes what only a resumed run needs; a run that failed needs it."""
    script = tmp_path / 'script.py'
    script.write_text('import sys; sys.exit(int(sys.argv[1]))')
    ended = []
    with pytest.raises(UserError, match='bad: it ended without a word'):
        launch(str(script), {tmp_path / 'good': ['0'], tmp_path / 'bad': ['3']}, ended.append)
    assert ended == [tmp_path / 'good']


@pytest.mark.parametrize('name', ['toy_ablations', 'toy_comparison', 'toy_paper', 'toy_search', 'toy_search_opd', 'toy_bridge_study', 'toy_tokens_study'])
def test_the_studies_of_this_project_are_comparable(name, monkeypatch, tmp_path):
    """Up to the point where the first process would start."""
    monkeypatch.chdir(tmp_path)
    jobs = {}

    def note(script, runs):
        jobs[script] = runs
        if script == 'distill.py':
            raise InterruptedError
    monkeypatch.setattr('studies.compare.launch', note)
    with pytest.raises(InterruptedError):
        main([name])
    for folder, arguments in jobs['distill.py'].items():
        assert arguments[-1] == f'out_dir={folder}' and not any('{' in argument for argument in arguments)


def test_wrong_command_lines_are_one_line_errors():
    with pytest.raises(UserError, match='not a Python file with seeds and runs'):
        main(['toy'])
    for arguments in ([], ['--run'], ['toy_comparison', 'toy_search']):
        with pytest.raises(UserError, match='give one study'):
            main(arguments)


RUNS = "runs = {'a': ['configs/toy.py']}"


@pytest.mark.parametrize('text, says', [
    (f'seeds = 3; {RUNS}', 'seeds = 3; wants a list'),
    (f'seeds = []; {RUNS}', 'seeds = []; wants a list of length from 1'),
    (f'seeds = [None]; {RUNS}', 'seeds = [None]; wants a list of length from 1, each entry a whole number'),
    (f'seeds = [0, 0]; {RUNS}', 'seeds=[0, 0]: one of them is there twice'),
    ('seeds = [0]; runs = {}', 'runs = {}; wants an object of length from 1'),
    ('seeds = [0]; runs = [1]', 'runs = [1]; wants an object'),
    ("seeds = [0]; runs = {'a': None}", "runs = {'a': None}; wants an object"),
    ("seeds = [0]; runs = {'a': 'configs/toy.py'}", "runs = {'a': 'configs/toy.py'}; wants an object"),
    ("seeds = [0]; runs = {'a': [1]}", "runs = {'a': [1]}; wants an object"),
    ("seeds = [0]; runs = {1: ['configs/toy.py']}", 'runs: 1 is no name'),
    ("seeds = [0]; runs = {'a' * 500: ['configs/toy.py']}", 'is no name; give a text of 1 to 100 characters'),
    (f'seeds = [0]; bridges = [1]; {RUNS}', 'bridges = [1]; wants an object'),
    (f"seeds = [0]; bridges = {{'b': ['stepz=1']}}; {RUNS}", 'out/mine/b-stage1-s0: '),
    (f'seeds = [0]; panels = [1]; {RUNS}', 'panels = [1]; wants an object'),
    (f"seeds = [0]; panels = {{'x': []}}; {RUNS}", "panels = {'x': []}; wants an object"),
    (f"seeds = [0]; panels = {{'x': ['b']}}; {RUNS}", "panel 'x': 'b' is none of the runs"),
    *((f"seeds = [0]; runs = {{'a': ['configs/toy.py', 'bridge={braces}']}}", f"'bridge={braces}': braces are for")
      for braces in ('{', '}', '{nope}', '{0}', '{x.__class__}')),
    ('seeds = [', 'mine.py: SyntaxError: '),
    (f"seeds = [0]; bridges = {{'b': ['steps=1']}}; {RUNS}", 'out/mine/b-stage1-s0: bridge.py does not read steps='),
    ('1 / 0', 'mine.py: ZeroDivisionError: division by zero; mend the study'),
    ('raise SystemExit(0)', 'mine.py: SystemExit: 0; mend the study'),
])
def test_a_study_of_another_form_is_refused_before_it_runs(tmp_path, monkeypatch, text, says):
    """Each was a traceback, or was noticed when the runs had ended."""
    monkeypatch.chdir(tmp_path)
    Path('mine.py').write_text(text)
    with pytest.raises(UserError) as error:
        main(['mine.py'])
    assert says in str(error.value) and '\n' not in str(error.value) and not Path('out').exists()


@pytest.mark.parametrize('number, change', [
    (0, {'eval/best@4': None, 'teacher/best@4': None}), (0, {'teacher/best@4': None}),
    (2, {'eval/best@4': None}), (2, {'time/update': 'x'}), (1, {'time/teacher': None}),
])
def test_a_log_without_what_the_table_shows_is_refused(tmp_path, number, change):
    """None: it was not measured. It was a KeyError when all runs had ended."""
    rows = seeds(50.0)[0]
    write_log(tmp_path, rows)
    assert read_finished_log(tmp_path) == rows
    rows[number] |= change
    write_log(tmp_path, rows)
    with pytest.raises(UserError, match='log.jsonl:'):
        read_finished_log(tmp_path)


def test_a_study_makes_its_bridges_first(toy_dir, tmp_path):
    """Once a seed; a run names the folder as {name}; again, nothing is made."""
    args = argv(toy_dir, 'x', toy_teacher_layers=4, toy_teacher_width=32, bridge_rank=4, steps=2)
    args = [a for a in args if not a.startswith('out_dir')]
    fit = [*for_script('bridge.py', args), 'bridge_prompts=20']
    study = tmp_path / 'tiny_bridges.py'
    study.write_text(f"args = {args}\nfit = {fit}\nseeds = [0]\nbridges = {{'ridge': fit, 'rnd': [*fit, 'bridge_fit=random']}}\npanels = {{}}\n"
                     "runs = {'bridge': [*args, 'bridge={ridge}'], 'random': [*args, 'bridge={rnd}']}\n")
    out = tmp_path / 'out/tiny_bridges'
    for _ in range(2):
        p = subprocess.run([sys.executable, '-m', 'studies.compare', study], cwd=tmp_path, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
        made = (out / 'ridge-stage1-s0/bridge.safetensors').stat().st_mtime_ns
    assert made == (out / 'ridge-stage1-s0/bridge.safetensors').stat().st_mtime_ns and not (out / 'curves.png').exists()
    configs = {name: json.loads((out / f'{name}-s0/config.json').read_text())['config'] for name in ('bridge', 'random')}
    assert {name: Path(c['bridge']).name for name, c in configs.items()} == {'bridge': 'ridge-stage1-s0', 'random': 'rnd-stage1-s0'}
    assert '| random |' in (out / 'table.md').read_text()
