"""The figure is drawn from what the log says."""
import json
import subprocess
import sys

import pytest
from matplotlib import pyplot as plt

from figures import curve, main
from runtime import ROOT, UserError


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


def test_script_and_its_errors(tmp_path):
    write_log(tmp_path / 'a')
    p = subprocess.run([sys.executable, ROOT / 'figures.py', 'a'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and (tmp_path / 'a/curve.png').exists()
    for folders, says in (([], 'no run folder'), ([str(tmp_path / 'none')], 'no such file')):
        with pytest.raises(UserError, match=says):
            main(folders)
    (tmp_path / 'a/log.jsonl').write_text('')
    with pytest.raises(UserError, match='no steps in it'):
        main([str(tmp_path / 'a')])
