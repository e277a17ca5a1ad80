"""The figure is drawn from what the log says."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import argv
from matplotlib import pyplot as plt

from studies.figures import bridges, comparison_figure, comparison_table, curve, main
from support.runtime import UserError


def write_log(folder, shift=0.0, evaluate=True):
    folder.mkdir(parents=True)
    exam = {'avg@4': 20.0, 'best@4': 60.0, 'len': 9.0} if evaluate else {}
    rows = [{'step': 0, 'student': exam, 'teacher': {k: 90.0 for k in exam}}]
    for step in range(1, 5):
        rows.append({'step': step, 'rep/cos': 0.5 + shift, 'rep/cos_layer': [0.4 + shift, 0.6 + shift]})
    rows[4] |= {k: 70.0 + shift for k in exam}
    (folder / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder


def test_lines_are_the_logged_numbers(tmp_path, monkeypatch):
    """Student and teacher lines, evaluated points, mean and per-layer cosines, for two runs."""
    kept = []
    monkeypatch.setattr(plt, 'close', kept.append)
    curve([write_log(tmp_path / 'a'), write_log(tmp_path / 'b', 0.1)], tmp_path / 'c.png')
    acc, rep = kept[0].axes
    lines = {line.get_label(): line.get_ydata() for line in acc.lines}
    assert list(lines['a: distilled']) == [20.0, 70.0] and list(lines['b: distilled']) == [20.0, 70.1]
    assert set(lines['teacher']) == {90.0} and set(lines['student before']) == {20.0}
    rows = sorted(round(float(line.get_ydata()[0]), 3) for line in rep.lines)
    assert rows == [0.4, 0.5, 0.5, 0.6, 0.6, 0.7] and len(rep.lines[0].get_xdata()) == 4
    assert (tmp_path / 'c.png').stat().st_size > 10_000


def test_a_run_without_evaluation_is_drawn_too(tmp_path):
    curve([write_log(tmp_path / 'a', evaluate=False)], tmp_path / 'c.png')
    assert (tmp_path / 'c.png').exists()


def test_steps_without_cosines_are_passed_over(tmp_path, monkeypatch):
    """An OPD run looks at hidden states now and then only; one between unlike widths never."""
    folder, kept = write_log(tmp_path / 'a'), []
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    for row in rows[2:4]:
        del row['rep/cos'], row['rep/cos_layer']
    (folder / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    monkeypatch.setattr(plt, 'close', kept.append)
    curve([folder], tmp_path / 'c.png')
    assert [list(line.get_xdata()) for line in kept[0].axes[1].lines] == [[1, 4]] * 3
    (folder / 'log.jsonl').write_text(''.join(json.dumps({k: v for k, v in r.items() if k[:3] != 'rep'}) + '\n' for r in rows))
    curve([folder], tmp_path / 'c.png')


def seeds(*finals):
    """Logs of one method, a seed for each final accuracy; steps of 5 ms after 7 ms of rollout."""
    times = {'time/sample': 0.007, 'time/teacher': 0.001, 'time/student': 0.003, 'time/update': 0.001}
    logs = []
    for i, final in enumerate(finals):
        exam = {'avg@4': 20.0 + i, 'best@4': 60.0, 'len': 9.0}
        rows = [{'step': 0, 'student': exam, 'teacher': {k: 90.0 for k in exam}}]
        rows += [{'step': s, **times} for s in (1, 2)]
        rows[1] |= {'avg@4': 30.0, 'best@4': 70.0, 'len': 9.0}
        rows[2] |= {'avg@4': final, 'best@4': 80.0, 'len': 10.0}
        logs.append(rows)
    return logs


def test_comparison_table_by_hand():
    table = comparison_table({'a': seeds(50.0, 60.0, 70.0), 'b': seeds(1.0, 1.0, 4.0)})
    assert table[0] == '| method | Avg@4 | Best@4 | length | steps | seconds | ms a step | seeds |'
    assert table[2] == '| student | 21.0 (20.0-22.0) | 60.0 (60.0-60.0) | 9.0 (9.0-9.0) |  |  |  | 3 |'
    assert table[4] == '| a | 60.0 (50.0-70.0) | 80.0 (80.0-80.0) | 10.0 (10.0-10.0) | 2 | 0 | 5 | 3 |'
    assert table[5].startswith('| b | 2.0 (1.0-4.0) |') and len(table) == 6
    assert comparison_table({'a': seeds(50.0)})[4].startswith('| a | 50.0 | 80.0 |')


def test_comparison_figure_draws_means_and_ranges(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, 'close', kept.append)
    logs = {'a': seeds(50.0, 60.0, 70.0), 'b': seeds(1.0, 1.0, 4.0)}
    comparison_figure(logs, {'both': ['a', 'b'], 'one': ['b']}, tmp_path / 'c.png')
    both, one = kept[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in both.lines}
    assert lines['a'] == [21.0, 30.0, 60.0] and lines['b'] == [21.0, 30.0, 2.0] and set(lines['teacher']) == {90.0}
    assert [line.get_label() for line in one.lines] == ['b', 'teacher', 'student'] and len(both.collections) == 2


def test_a_comparison_runs_resumes_and_reports(toy_dir, tmp_path):
    """Two methods, two seeds of the tiny toy, the second seed's made on the way by whichever run comes
    first; again: nothing is run, the same table. A run that fails is told in one line."""
    args = argv(toy_dir, 'x', steps=2)
    args = [a for a in args if not a.startswith('out_dir')]
    study = tmp_path / 'tiny_study.py'
    study.write_text(f"seeds = [0, 1]\nruns = {{'OPRD': {args}, 'OPD, full': {[*args, 'oprd_weight=0', 'opd_weight=1', 'opd=full']}}}\n")

    def figures():
        return subprocess.run([sys.executable, '-m', 'studies.figures', '--run', 'tiny_study.py'], cwd=tmp_path,
                              capture_output=True, text=True)
    p = figures()
    assert p.returncode == 0, p.stderr
    out = tmp_path / 'out/tiny_study'
    assert {f.name for f in out.iterdir()} == {'oprd-s0', 'oprd-s1', 'opd_full-s0', 'opd_full-s1', 'table.md', 'curves.png'}
    table = (out / 'table.md').read_text()
    assert table.count('\n') == 6 and '| OPD, full |' in table and table in p.stdout
    logs = {f: f.read_bytes() for f in out.glob('*/log.jsonl')}
    assert figures().returncode == 0 and (out / 'table.md').read_text() == table and len(logs) == 4
    assert all(f.read_bytes() == was for f, was in logs.items())
    study.write_text(f"seeds = [0]\nruns = {{'a': {[*args, 'n=0']}, 'b': {args}}}\n")
    p = figures()
    assert p.returncode == 2 and p.stderr.splitlines()[-1].startswith('error: out/tiny_study/a-s0: error: ') and 'n=0' in p.stderr
    assert (out / 'b-s0/results.json').exists()


def write_bridge(folder, used, shift):
    layers = {str(l): {key: {str(r): 0.1 * l + 0.01 * r + shift + i for r in (1, 2, 4)}
                       for i, key in enumerate(('cos', 'before', 'shuffled', 'mean_only'))} for l in (1, 3)}
    folder.mkdir(parents=True)
    (folder / 'bridge.json').write_text(json.dumps({'rank': 2, 'used': used, 'layers': layers}))
    return folder


def test_bridges_side_by_side(tmp_path, monkeypatch):
    """Mean over layers at every rank, each layer at the rank that is used; one alone has its controls and
    Theorem 3's rank."""
    kept = []
    monkeypatch.setattr(plt, 'close', kept.append)
    a, b = write_bridge(tmp_path / 'a', 4, 0.0), write_bridge(tmp_path / 'b', 1, 0.5)
    main([str(a), str(b)])
    rank, layer = kept[0].axes
    for ax, want in ((rank, [[0.21, 0.22, 0.24], [0.71, 0.72, 0.74]]), (layer, [[0.14, 0.34], [0.61, 0.81]])):
        assert [list(line.get_ydata()) == pytest.approx(w) for line, w in zip(ax.lines, want, strict=True)] == [True, True]
    assert [line.get_label() for line in layer.lines] == ['a, rank 4', 'b, rank 1'] and (a / 'bridge.png').exists()
    bridges([a], tmp_path / 'c.png')
    rank, layer = kept[1].axes
    labels = [line.get_label() for line in rank.lines]
    assert [w for w in labels if w[0] != '_'] == ['bridge', 'random P_S', 'shuffled pairs', 'mean alone', 'Theorem 3: rank 2']
    assert len(labels) == 7 and len(layer.lines) == 4


def test_a_study_makes_its_bridges_first(toy_dir, tmp_path):
    """Once a seed; a run names the folder as {name}; again, nothing is made."""
    args = argv(toy_dir, 'x', toy_teacher_layers=4, toy_teacher_width=32, bridge_prompts=20, bridge_rank=4, steps=2)
    args = [a for a in args if not a.startswith('out_dir')]
    study = tmp_path / 'tiny_bridges.py'
    study.write_text(f"args = {args}\nseeds = [0]\nbridges = {{'ridge': args, 'rnd': [*args, 'bridge_fit=random']}}\npanels = {{}}\n"
                     "runs = {'bridge': [*args, 'bridge={ridge}'], 'random': [*args, 'bridge={rnd}']}\n")
    out = tmp_path / 'out/tiny_bridges'
    for _ in range(2):
        p = subprocess.run([sys.executable, '-m', 'studies.figures', '--run', study], cwd=tmp_path, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
        made = (out / 'ridge-stage1-s0/bridge.safetensors').stat().st_mtime_ns
    assert made == (out / 'ridge-stage1-s0/bridge.safetensors').stat().st_mtime_ns and not (out / 'curves.png').exists()
    configs = {name: json.loads((out / f'{name}-s0/config.json').read_text())['config'] for name in ('bridge', 'random')}
    assert {name: Path(c['bridge']).name for name, c in configs.items()} == {'bridge': 'ridge-stage1-s0', 'random': 'rnd-stage1-s0'}
    assert '| random |' in (out / 'table.md').read_text()


def test_script_and_its_errors(tmp_path):
    write_log(tmp_path / 'a')
    p = subprocess.run([sys.executable, '-m', 'studies.figures', 'a'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and (tmp_path / 'a/curve.png').exists()
    for folders, says in (([], 'no run folder'), ([str(tmp_path / 'none')], 'no such file')):
        with pytest.raises(UserError, match=says):
            main(folders)
    with pytest.raises(UserError, match='not a Python file with seeds and runs'):
        main(['--run', 'toy'])
    with pytest.raises(UserError, match='or --run toy_comparison'):
        main(['--run'])
    (tmp_path / 'a/log.jsonl').write_text('')
    with pytest.raises(UserError, match='no steps in it'):
        main([str(tmp_path / 'a')])
