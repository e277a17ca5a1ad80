"""The folder of a run: whose it is, which configs may go on in it, its log."""
import json
import os

import pytest

from support.files import owned, write_json
from support.run_folder import begin, check_config, log_rows, open_run, rewrite_log, write_config
from support.runtime import UserError


def test_a_run_folder_belongs_to_one_config(tmp_path):
    """And looking at one makes nothing: a command that fails must not claim the folder."""
    config = {'lr': 1.0, 'device': 'cpu'}
    out = open_run(tmp_path / 'r', config, ('device',))
    assert not out.exists()
    with owned(out):
        begin(out, config, ('device',), 0, ['step'])
    open_run(out, config | {'device': 'cuda'}, ('device',))
    with pytest.raises(UserError, match='lr=1.0, now 2.0'):
        open_run(out, config | {'lr': 2.0}, ('device',))
    with pytest.raises(UserError, match='cannot be made'):
        open_run(out / 'config.json' / 'x', {}, ())


@pytest.mark.parametrize('name', ['ckpt-best', 'notes.txt', 'last', 'log.jsonl'])
def test_a_folder_with_other_things_is_refused(tmp_path, name):
    """A run wrote between somebody's files, and deleted those that were called ckpt-*."""
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"holds '{name}' and no run"):
        open_run(tmp_path, {}, ())
    assert os.listdir(tmp_path) == [name]


def test_no_folder_is_refused():
    """`out_dir=` meant the current folder."""
    with pytest.raises(UserError, match="out_dir='': nothing given"):
        open_run('', {}, ())


def test_a_folder_in_use_is_told_before_anything_is_loaded(tmp_path):
    with owned(tmp_path), pytest.raises(UserError, match=f'in use by process {os.getpid()} '):
        open_run(tmp_path, {}, ())
    open_run(tmp_path, {}, ())


@pytest.mark.parametrize('content', [{}, {'config': []}, {'config': {}, 'run': 7}, {'run': 'a'}])
def test_a_config_that_describes_no_run(tmp_path, content):
    write_json(tmp_path / 'config.json', content)
    with pytest.raises(UserError, match='config.json: does not describe a run'):
        open_run(tmp_path, {}, ())


def test_the_name_of_a_run_stays(tmp_path):
    """Checkpoints are known by it. The stored config is that of the last start."""
    first = begin(tmp_path, {'steps': 3}, ('steps',), 0, ['step'])
    again = begin(tmp_path, {'steps': 5}, ('steps',), 0, ['step'])
    assert again.name == first.name and len(first.name) == 12
    check_config(tmp_path, {'steps': 3}, ())
    write_config(again)
    check_config(tmp_path, {'steps': 5}, ())
    with pytest.raises(UserError, match='steps=5, now 3'):
        begin(tmp_path, {'steps': 3}, (), 0, ['step'])


def test_the_log(tmp_path):
    """A line for each step; rank 0 alone writes. What has changed is told once, in the first row after it."""
    run, other = (begin(tmp_path, {}, (), rank, ['step', 'loss']) for rank in (0, 1))
    run.changed = {'lr': [1.0, 2.0], 'keep': [2, 3]}
    for step in range(3):
        run.log({'step': step})
        other.log({'step': step})
    rows = log_rows(tmp_path / 'log.jsonl')
    assert [row['step'] for row in rows] == [0, 1, 2] and rows == run.rows
    assert [row['changed'] for row in rows] == ['lr=2.0 (before 1.0), keep=3 (before 2)', None, None]
    assert 0 <= rows[0]['elapsed'] <= rows[2]['elapsed'] <= run.seconds()
    rewrite_log(run, rows[:1])
    assert log_rows(tmp_path / 'log.jsonl') == rows[:1]


def test_the_seconds_do_not_go_back_with_the_clock(tmp_path, monkeypatch):
    """A clock that was set back made the time of a run negative."""
    run = begin(tmp_path, {}, (), 0, ['step'])
    monkeypatch.setattr('time.time', lambda: 0.0)
    run.log({'step': 0})
    assert 0 <= run.rows[0]['elapsed'] < 60


def test_every_row_has_the_names_with_which_the_log_was_begun(tmp_path):
    """In one order, null where a step did not measure. A name that was not announced is a mistake of the code: pandas
    would make a column of it that begins in the middle of the run."""
    run = begin(tmp_path, {}, (), 0, ['step', 'loss', 'rep/cos/7'])
    run.log({'rep/cos/7': 0.5, 'step': 0})
    run.log({'step': 1, 'loss': 2.0})
    lines = (tmp_path / 'log.jsonl').read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [['step', 'loss', 'rep/cos/7', 'elapsed', 'changed']] * 2
    assert '"loss": null, "rep/cos/7": 0.5' in lines[0] and '"changed": null' in lines[1]
    with pytest.raises(AssertionError, match='kl'):
        run.log({'step': 2, 'kl': 1.0})


def test_a_run_that_goes_on_with_other_names_gives_them_to_all_rows(tmp_path):
    """eval_n= may change: the accuracies of both parts are columns of one table, and neither is lost."""
    first = begin(tmp_path, {}, (), 0, ['step', 'eval/avg@2'])
    for step in range(3):
        first.log({'step': step, 'eval/avg@2': 10.0 * step})
    again = begin(tmp_path, {}, (), 0, ['step', 'eval/avg@4'])
    rewrite_log(again, log_rows(tmp_path / 'log.jsonl')[:2])
    again.log({'step': 2, 'eval/avg@4': 7.0})
    rows = log_rows(tmp_path / 'log.jsonl')
    assert [row['eval/avg@2'] for row in rows] == [0.0, 10.0, None] and [row['eval/avg@4'] for row in rows] == [None, None, 7.0]
    assert {tuple(row) for row in rows} == {('step', 'eval/avg@2', 'elapsed', 'changed', 'eval/avg@4')}


def lines_of(steps):
    return [json.dumps({'step': step}) for step in steps]


@pytest.mark.parametrize('lines, says', [
    (lines_of([0, 1, 1, 2]), ':3: step 1 where step 2 belongs'),
    (lines_of([0, 1, 3]), ':3: step 3 where step 2 belongs'),
    (lines_of([1, 2]), ':1: step 1 where step 0 belongs'),
    ([*lines_of([0]), '[1]', *lines_of([2])], r':2: step \[1\] where step 1 belongs'),
    ([*lines_of([0]), '{"step": 1', *lines_of([2])], ':2: damaged'),
    ([*lines_of([0]), '{"step": 1, "loss": 1.0}'], r":2: other names than in line 1 \('loss'\)"),
    (['{"step": 0, "loss": 1.0}', '{"loss": 1.0, "step": 1}'], ':2: other names than in line 1 .*order'),
    (['{"step": 0, "loss": [1.0]}'], r':1: loss = \[1.0\]; wants a finite number, or null'),
    (['{"step": 0, "changed": {"lr": [1, 2]}}'], ':1: changed = .*wants a text, or null'),
    (['{"step": 0, "student": {"avg@2": 1.0}, "teacher": {}, "elapsed": 0.1}'], ":1: 'student' is a name in the logs of earlier versions"),
])
def test_a_log_with_doubled_or_missing_lines(tmp_path, lines, says):
    """They were accepted, and curves were drawn from them."""
    file = tmp_path / 'log.jsonl'
    file.write_text('\n'.join(lines) + '\n')
    with pytest.raises(UserError, match=says):
        log_rows(file)


def test_the_best_step(tmp_path):
    """By the plain accuracy, which of several sets is their mean; a tie keeps the earlier one; another eval_n begins
    anew, since its scores cannot be compared."""
    run = begin(tmp_path, {}, (), 0, ['step', 'eval/avg@2', 'eval/avg@2/one', 'eval/best@2', 'eval/avg@4', 'teacher/avg@2'])
    assert not run.is_best(0)
    run.log({'step': 0, 'eval/avg@2': 99.0, 'teacher/avg@2': 99.0})
    for step, score in enumerate([30.0, 50.0, 50.0, 40.0], 1):
        run.log({'step': step, 'eval/avg@2': score, 'eval/avg@2/one': 100.0, 'eval/best@2': 90.0 + step})
    assert run.best == {'step': 2, 'score': 50.0, 'metric': 'avg@2'} and run.is_best(2) and not run.is_best(4)
    run.log({'step': 5})
    run.log({'step': 6, 'eval/avg@4': 45.0})
    assert run.is_best(6)


@pytest.mark.parametrize('name', ['loop', 'loop/x', 'gone/x', 'a/' + 'x' * 300])
def test_a_folder_that_cannot_be_made_is_told_and_leaves_nothing(tmp_path, name):
    """Links to themselves and to nowhere exist and are no folders; a long name was noticed when `a` was made."""
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'gone').symlink_to('nowhere')
    with pytest.raises(UserError, match='cannot be made'):
        open_run(tmp_path / name, {}, ())
    assert not (tmp_path / 'a').exists()


def test_a_run_with_an_empty_config_is_another_run(tmp_path):
    """It was taken for no run."""
    write_json(tmp_path / 'config.json', {'run': 'x', 'config': {}})
    with pytest.raises(UserError, match='this run was started with lr=None, now 1'):
        open_run(tmp_path, {'lr': 1}, ())
