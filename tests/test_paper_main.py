"""The command line of the paper: commands, folders, what is missing, and errors in one line."""
import json
import subprocess
import sys

import pytest
from conftest import write_run

from paper import __main__ as paper
from paper.runs import Missing
from support.provenance import append_start
from support.runtime import ROOT, UserError, run

LOG = {'eval/avg@16': [20.0, 50.0], 'len/mean': [None, 9.0]}


def test_every_command_is_a_function_of_the_file_that_is_named():
    """A command whose file has no function of its name would be a traceback. All take folders first, and `to`."""
    for command, file in paper.COMMANDS.items():
        if (ROOT / 'paper' / f'{file}.py').exists():
            function = paper.function_of(command)
            first, *others = paper.inspect.signature(function).parameters
            assert first == 'folders' and 'to' in others and function.__doc__, command
        assert file in paper.__doc__


@pytest.mark.parametrize('words, says', [
    ([], 'no command given; give one of figure1, figure4,'),
    (['figur4'], "'figur4': no command; did you mean figure4?"),
    (['draw'], "'draw': no command; give one of figure1,"),
    (['--run'], "'--run': no command"),
    (['figure4', '--to', 'x'], "'--to': there are no such options; keys are given as to=FOLDER"),
    (['all'], 'all: no folder given'),
    (['figure5', 'out', 'window=3'], 'window=: figure5 does not read this; it reads to='),
    (['all', 'out', 'steps=3'], 'steps=: all does not read this; it reads to='),
    (['figure5', 'out/lr=1'], 'out/lr=1: no such folder'),
    (['figure5', 'nowhere'], 'nowhere: no such folder; give folders of distill.py or bridge.py'),
    (['figure5', 'out'], 'out: no finished run and no bridge in it'),
    (['figure5', 'to=file/x'], 'file/x: cannot be made, '),
    (['figure5', 'rank_=_8'], 'rank_=: figure5 does not read this'),
    (['figure5'], 'no run of distill.py in the folders; python -m studies.compare toy_paper makes'),
])
def test_a_wrong_command_line_is_one_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit) as end:
        run(paper.main, lambda: words)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count('\n') == 1 and says in printed
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['file', 'out']


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path, monkeypatch):
    """Studies name folders like this one. Given from the folder above, it was read as a key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bridge_r_=_16-s0').mkdir()
    assert paper.read_words(['figure4', 'bridge_r_=_16-s0', 'to=x']) == ('figure4', ['bridge_r_=_16-s0'], {'to': 'x'})


def test_a_folder_of_runs_is_opened_and_what_is_left_out_is_told(tmp_path, capsys, monkeypatch):
    """Unfinished runs, and that other code has made some of the runs. A folder that is named twice is one: a bridge would be
    two seeds."""
    given = []
    monkeypatch.setattr(paper, 'function_of', lambda command: lambda folders, to='': given.append((command, folders, to)) or ['file'])
    runs = [write_run(tmp_path / name, LOG) for name in 'abc']
    (runs[1] / 'results.json').unlink()
    for folder, losses in zip(runs, '112', strict=True):
        append_start(folder, {'versions': {}, 'sources': {'losses.py': losses}, 'eval_data': {}}, 0)
    paper.main(['figure4', str(tmp_path), str(runs[0]), f'{tmp_path}/b/../a', 'to=x=y'])
    assert given == [('figure4', [runs[0], runs[2]], 'x=y')]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{runs[1]}: left out, the run is not finished' and lines[2:] == ['file']
    assert lines[1] == 'note: the runs were not all made by the same code: it differs in losses.py'


def test_all_draws_what_it_can_and_names_the_rest(tmp_path, capsys, monkeypatch):
    """What is missing ends nothing. What is refused ends nothing either, and the command fails at the end."""
    def function_of(command):
        def function(folders, to):
            if command == 'figure6':
                raise Missing('no cosines; make some')
            if command == 'figure7' and refuse:
                raise UserError('a and b cannot be compared')
            return [f'{to}/{command}.png']
        return function
    monkeypatch.setattr(paper, 'function_of', function_of)
    refuse = False
    files = list(paper.draw_all(['out'], 'x'))
    assert capsys.readouterr().out == 'figure6: no cosines; make some\n'
    wanted = [*paper.FIGURES, *paper.TABLES, 'theorem2', 'theorem3']
    assert len(wanted) == 17
    assert files == [f'x/{command}.png' for command in wanted if command != 'figure6']
    refuse = True
    with pytest.raises(UserError, match='not drawn: figure7; the lines above say why'):
        list(paper.draw_all(['out'], 'x'))
    assert capsys.readouterr().out == 'figure6: no cosines; make some\nfigure7: a and b cannot be compared\n'


def test_the_command_as_it_is_typed(tmp_path, monkeypatch, capsys):
    """From another folder, into the default one; --help is the header."""
    write_run(tmp_path / 'runs/a', LOG)
    p = subprocess.run([sys.executable, '-m', 'paper', 'figure5', 'runs'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout == 'out/paper/figure5.json\nout/paper/figure5.png\nout/paper/figure5.pdf\n', p.stderr
    assert json.loads((tmp_path / 'out/paper/figure5.json').read_text())['len/mean']['OPRD']['by_seed'] == [[9.0]]
    monkeypatch.setattr(sys, 'argv', ['paper', 'figure5', '--help'])
    with pytest.raises(SystemExit) as end:
        run(paper.main, lambda: paper.command_words('paper/__main__.py'))
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.startswith("The paper's figures, tables and theorems") and 'paper all out/toy_paper' in printed
