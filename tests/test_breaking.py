"""A few cases of breaking.py: runs that are killed, files that are damaged, folders that are copied, disks that are full.

The tool prints a line for each case; `python tests/breaking.py signals 60`, `files 200` and `cases` are its long form.
"""
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from breaking import files_below, judge
from forks import LINE, Ended, Job, difference, outcome, refused
from safetensors.torch import save_file

from support.runtime import ROOT

COMMANDS = {
    'signals': ['signals', '8', '--seed', '18', '--only', '0', '4', '6', '7'],       # OPRD, bridge, evaluation, two ranks
    'files': ['files', '15', '--seed', '3', '--scenes', 'stopped'],
    'cases': ['cases', '--only', 'bad weights', 'copied', 'slurm', 'empty', 'foreign', 'remains', 'clock'],
}


@pytest.fixture(scope='module')
def tables():
    """The three commands, side by side: {name: process}."""
    if sys.platform != 'linux':
        pytest.skip('the tool forks, and reads /proc')
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    started = {}
    for name, arguments in COMMANDS.items():
        started[name] = subprocess.Popen([sys.executable, 'tests/breaking.py', *arguments], cwd=ROOT, env=environment,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield started
    for process in started.values():
        process.send_signal(signal.SIGTERM)              # it deletes its folder
        process.wait()
        process.stdout.close()


def table(process):
    """What a command printed; it fails if a case went wrong."""
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and 'WRONG:' not in out, f'\n{out}'
    return out


def test_killed_runs_end_as_uninterrupted_ones(tables):
    """Same log, weights and results, whatever the signal and the place. Guards against a save that can be caught half
    done, a step that is done twice, and a state that is not saved."""
    assert '4 cases, 0 wrong' in table(tables['signals'])


def test_damaged_files_are_refused_or_do_not_matter(tables):
    """A line and exit code 2, the previous checkpoint, or the same results. Guards against a run that goes on with
    other weights or another log, and against tracebacks."""
    assert '15 cases, 0 wrong' in table(tables['files'])


def test_what_goes_wrong_on_real_machines(tables):
    """Copied folders, somebody else's files, Slurm, clocks, weights that are no numbers. Guards against lost
    checkpoints and against runs that look healthy and are not."""
    out = table(tables['cases'])
    assert all(f'      {name}' in out for name in ('bad weights', 'copied folder', 'slurm', 'empty out_dir', 'clock'))


# ---- would the tool notice? --------------------------------------------------------------------------------

@pytest.fixture
def job(tmp_path):
    """A job of distill.py with the files that its outcome is read from."""
    out = tmp_path / 'run'
    (out / 'ckpt-000002/model').mkdir(parents=True)
    (out / 'last').symlink_to('ckpt-000002/model')
    save_file({'a': torch.arange(4.0)}, out / 'last/model.safetensors')
    save_file({'exp_avg.a': torch.arange(4.0)}, out / 'ckpt-000002/resume.safetensors')
    rows = [{'step': step, 'loss': 1.5, 'elapsed': step, 'time/sample': step} for step in range(3)]
    (out / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (out / 'results.json').write_text(json.dumps({'steps': 2, 'seconds': 7}))
    return Job('distill', [], tmp_path, out)


@pytest.mark.parametrize('change, seen', [
    ('nothing', ''), ('times', ''), ('step twice', 'row 2 of log.jsonl differs'), ('gap', 'row 1 of log.jsonl differs'),
    ('loss', 'row 2 of log.jsonl differs'), ('weight', 'ckpt-000002/model/model.safetensors differs'),
    ('moment', 'ckpt-000002/resume.safetensors differs'), ('results', 'results.json differs'), ('no log', 'cannot be read')])
def test_the_tool_sees_a_difference(job, change, seen):
    """The comparison itself: one last bit of one weight, one step too many or too few."""
    want = outcome(job)
    log = (job.out / 'log.jsonl').read_text()
    lines = log.splitlines(keepends=True)
    if change == 'times':
        (job.out / 'log.jsonl').write_text(log.replace('"elapsed": 2', '"elapsed": 9'))
        (job.out / 'results.json').write_text(json.dumps({'steps': 2, 'seconds': 8}))
    elif change == 'step twice':
        (job.out / 'log.jsonl').write_text(''.join([*lines[:2], *lines[1:]]))
    elif change == 'gap':
        (job.out / 'log.jsonl').write_text(lines[0] + lines[2])
    elif change == 'loss':
        (job.out / 'log.jsonl').write_text(''.join([*lines[:2], lines[2].replace('1.5', '1.5000000000000002')]))
    elif change == 'weight':
        save_file({'a': torch.tensor([0, 1, 2, 3.0000002])}, job.out / 'last/model.safetensors')
    elif change == 'moment':
        save_file({'exp_avg.a': -torch.arange(4.0)}, job.out / 'ckpt-000002/resume.safetensors')
    elif change == 'results':
        (job.out / 'results.json').write_text(json.dumps({'steps': 3, 'seconds': 7}))
    elif change == 'no log':
        (job.out / 'log.jsonl').unlink()
    assert difference(job, want).startswith(seen) and bool(difference(job, want)) == bool(seen)


def ended(code, err, late=''):
    return Ended([code], '', err, [[]], 0.0, late)


def test_the_tool_sees_what_is_no_clear_refusal():
    """Exit code 2 and one line of at most 300 characters; nothing else will do."""
    assert refused(ended(2, 'error: config.json: damaged; fetch it again\n')) == ''
    assert refused(ended(2, 'error: ' + 'x' * (LINE - 7))) == ''
    for bad in (ended(1, 'error: a'), ended(0, ''), ended(2, ''), ended(2, 'error: a\nb'), ended(2, 'error: ' + 'x' * 294),
                ended(2, 'Traceback (most recent call last):\nKeyError: 1'), ended(-9, '', 'still running'), ended(2, 'warning: a')):
        assert refused(bad) != ''


def test_the_tool_sees_what_became_of_damage(job):
    """Going back to an earlier checkpoint is fine if it is said; other results with exit code 0, and a refusal that costs
    a file, are not."""
    stage = SimpleNamespace(job=job, reference=SimpleNamespace(made=outcome(job)), resumed=4)
    before = files_below(job.out)

    def verdict(code, out, err=''):
        return judge(stage, Ended([code], out, err, [[]], 0.0), before)[0]
    assert verdict(0, 'resumed after step 4') == 'equal'
    assert verdict(0, 'ckpt-000004: damaged\nresumed after step 2') == 'previous'
    assert verdict(0, 'resumed after step 2') == 'WRONG' and verdict(0, '') == 'WRONG'
    assert verdict(2, '', 'error: config.json: damaged') == 'refused'
    assert verdict(1, '', 'Traceback (most recent call last):') == 'WRONG'
    (job.out / 'results.json').unlink()
    assert verdict(0, 'resumed after step 4') == 'WRONG'
    assert verdict(2, '', 'error: config.json: damaged') == 'WRONG'
