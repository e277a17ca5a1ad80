"""report= and --profile: what Weights & Biases and TensorBoard are told, read back by their own libraries, and traces."""
import ast
import gzip
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import argv, resume_state

import distill
from configs import load_config
from support import profile, trackers
from support.run_folder import begin, log_rows
from support.runtime import ROOT, UserError
from support.trackers import check_trackers, numbers_of, tracked, tracker_names


@pytest.fixture(scope='module')
def offline(tmp_path_factory):
    """W&B without a network, and with a home and a current folder of its own -> these two folders, which stay empty. Every
    attempt to reach a server fails at once."""
    pytest.importorskip('wandb')
    pytest.importorskip('tensorboard')
    home = tmp_path_factory.mktemp('home')
    work = tmp_path_factory.mktemp('work')
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith('WANDB_')]:
            patch.delenv(name)
        # setdefault of the tracker is undone at the end, too
        for name in ('WANDB_CACHE_DIR', 'WANDB_DATA_DIR'):
            patch.setenv(name, '')
            os.environ.pop(name)
        patch.setenv('WANDB_MODE', 'offline')
        patch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
        patch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')
        patch.setenv('HOME', str(home))
        patch.chdir(work)
        yield home, work


# ---- readers ------------------------------------------------------------------------------------

def wandb_records(file):
    """The protobuf records of a .wandb file. It is a LevelDB log: blocks of 32 KiB with chunks of CRC, length and kind
    (1 whole, 2 first, 3 middle, 4 last); a record may span chunks."""
    from wandb.proto.wandb_internal_pb2 import Record
    data = file.read_bytes()
    assert data.startswith(b':W&B')
    at, record = 7, b''
    while at < len(data):
        if 32768 - at % 32768 < 7:           # no room for the head of a chunk
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack('<IHB', data[at:at + 7])
        record += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b''


def wandb_runs(out):
    """{W&B run: [(step, {name: number})] as they were sent} of all starts in a run folder, and {W&B run: config}. The x axis
    of all charts is the row's own step."""
    sent, configs, axes = {}, {}, {}
    for file in sorted((out / 'wandb').glob('offline-run-*/*.wandb')):
        for record in wandb_records(file):
            if record.HasField('run'):
                run_id = record.run.run_id
                configs[run_id] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField('history'):
                row = {(item.key or '/'.join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
                sent.setdefault(run_id, []).append((row['step'], {name: x for name, x in row.items() if name[0] != '_'}))
            if record.HasField('metric') and record.metric.glob_name:
                axes[record.metric.glob_name] = record.metric.step_metric
    assert axes == {'*': 'step'}
    return sent, configs


def tensorboard_rows(out):
    """[(step, {name: number})] as TensorBoard shows them, and the times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / 'tensorboard'), size_guidance={'scalars': 0, 'tensors': 0}).Reload()
    told = []
    for name in events.Tags()['scalars']:
        for event in events.Scalars(name):
            told.append((event.step, name, event.value, event.wall_time))
    return sorted(told), events


def float32(number):
    return struct.unpack('f', struct.pack('f', number))[0]


def assert_told(rows, out, name):
    """Every number of these rows, once per step, is in the W&B run of this name and in TensorBoard."""
    sent, _ = wandb_runs(out)
    assert sent[name] == [(row['step'], numbers_of(row)) for row in rows]
    told, _ = tensorboard_rows(out)
    expected = [(row['step'], key, float32(number)) for row in rows for key, number in numbers_of(row).items() if key != 'step']
    assert [event[:3] for event in told] == sorted(expected)


def service_processes():
    """Command lines of this process's descendants that are W&B's."""
    parents, lines = {}, {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            lines[int(folder.name)] = (folder / 'cmdline').read_text()
            parents[int(folder.name)] = int((folder / 'stat').read_text().rsplit(')', 1)[1].split()[1])
        except OSError:                      # it has ended
            continue
    return [line for pid, line in lines.items() if 'wandb' in line and parents.get(pid) == os.getpid()]


# ---- a run that is watched ------------------------------------------------------------------------

def timeless(rows):
    return [{key: x for key, x in row.items() if not key.startswith('time/') and key != 'elapsed'} for row in rows]


@pytest.fixture(scope='module')
def runs(toy_dir, tmp_path_factory, offline):
    """A run of six steps; and the same with report= and --profile, stopped by Ctrl-C in step 3 and gone on. Its answers may
    have 20 tokens, and rollouts are traced up to 19: they have most of the operations, and would take most of the time."""
    folder = tmp_path_factory.mktemp('runs')
    distill.main(load_config(argv(toy_dir, folder / 'plain', steps=6)))
    args = [*argv(toy_dir, folder / 'watched', steps=6), 'report=wandb,tensorboard', '--profile']
    real, steps = distill.accumulate, []

    def interrupted(*arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, 'ROLLOUT_TOKENS', 19)
        patch.setattr(distill, 'accumulate', interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill.main(load_config(args))
        patch.setattr(distill, 'accumulate', real)
        distill.main(load_config(args))
    return folder


def test_every_number_of_the_log_is_told_once_per_step(runs, offline):
    """Over a Ctrl-C and a resume: W&B counts rows by itself and would begin again, and TensorBoard shows a step twice."""
    out = runs / 'watched'
    rows = log_rows(out / 'log.jsonl')
    assert len(rows) == 7 and len(list((out / 'wandb').glob('offline-run-*'))) == 2
    assert len(list((out / 'tensorboard').glob('events*'))) == 2
    name = json.loads((out / 'config.json').read_text())['run']
    assert_told(rows, out, name)

    # The config goes along, and the time of a row is that of its step.
    _, configs = wandb_runs(out)
    config = {key: value for key, value in configs[name].items() if key != '_wandb'}
    assert config == json.loads((out / 'config.json').read_text())['config']
    told, events = tensorboard_rows(out)
    times = {step: time for step, key, _, time in told if key == 'loss'}
    for row in rows[2:]:
        assert math.isclose(times[row['step']] - times[1], row['elapsed'] - rows[1]['elapsed'], abs_tol=0.1)
    assert b'eval_n = 2' in events.Tensors('config/text_summary')[0].tensor_proto.string_val[0]


def test_nothing_is_left_behind(runs, offline):
    """W&B writes logs into the home folder, its runs into the current one, and leaves a process."""
    for folder in offline:
        assert [str(path) for path in folder.rglob('*') if 'wandb' in str(path).lower()] == []
    assert service_processes() == []


def test_watching_changes_no_number(runs):
    """Neither the trackers nor the profiler."""
    plain, watched = runs / 'plain', runs / 'watched'
    assert timeless(log_rows(watched / 'log.jsonl')) == timeless(log_rows(plain / 'log.jsonl'))
    ours, theirs = resume_state(watched), resume_state(plain)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (watched / 'last/model.safetensors').read_bytes() == (plain / 'last/model.safetensors').read_bytes()


def trace_of(file):
    return json.loads(gzip.decompress(file.read_bytes()))['traceEvents']


def test_the_second_and_the_third_step_of_a_start_are_traced(runs):
    """Of the first start 2 and 3; of the second one, which takes 4, 5 and 6, the last two. The rollout is left out: 16k
    tokens are millions of kernels, and a trace of them gigabytes. So is the evaluation of steps 2 and 6."""
    folder = runs / 'watched/profile'
    names = [f'{kind}-{step:06d}.{ending}' for kind, ending in (('operations', 'txt'), ('trace', 'json.gz')) for step in (2, 3, 5, 6)]
    assert sorted(path.name for path in folder.iterdir()) == names
    for step in (2, 3, 5, 6):
        found = [event['name'] for event in trace_of(folder / f'trace-{step:06d}.json.gz')]
        assert found.count('Optimizer.step#AdamW.step') == 1 and 'aten::mm' in found and '[memory]' in found
        assert 'aten::searchsorted' not in found     # of which each sampled token has one
        table = (folder / f'operations-{step:06d}.txt').read_text()
        assert 'Self CPU' in table and 'CPU Mem' in table and 'aten::' in table


def test_a_trace_has_a_short_rollout(toy_dir, tmp_path, capsys):
    """And no evaluation after it, which would sample up to three more tokens: a batch looks one token up at a time."""
    args = argv(toy_dir, tmp_path / 'run', steps=2, max_new_tokens=2, eval_max_new_tokens=3, prompts_per_step=1)
    distill.main(load_config([*args, '--profile']))
    assert f'step 2 is traced: {tmp_path}' in capsys.readouterr().out
    found = [event['name'] for event in trace_of(tmp_path / 'run/profile/trace-000002.json.gz')]
    longest = 2 if log_rows(tmp_path / 'run/log.jsonl')[2]['len/mean'] > 1 else 1
    assert found.count('aten::searchsorted') == longest and 'Optimizer.step#AdamW.step' in found


# ---- what becomes of steps that are taken again ------------------------------------------------------

def start(out, report, step=0, rows=(), changed=None):
    """A RunFolder as support.checkpoints.resume leaves it, and a context in which its rows are told."""
    run = begin(out, {'lr': 1.0}, ('lr',), 0, ['step', 'loss', 'none'])
    run.step, run.rows = step, list(rows)
    run.changed = changed or {}
    return run, tracked(run, report)


def test_steps_that_are_taken_again(tmp_path, offline):
    """A killed run had sent steps 3 and 4, and its checkpoint was step 2. They were lost or doubled. As it was, W&B keeps
    the rows that it has. With another lr the rows are other rows: they belong to another W&B run, with all of the log.
    TensorBoard always shows the log as it is."""
    out = tmp_path / 'run'
    out.mkdir()
    both = 'wandb,tensorboard'
    code = ('import os, sys, time; from pathlib import Path\nfrom support.run_folder import begin\n'
            'from support.trackers import tracked\n'
            'run = begin(Path(sys.argv[1]), {"lr": 1.0}, ("lr",), 0, ["step", "loss", "none"])\n'
            'with tracked(run, "wandb,tensorboard"):\n'
            '    for step in range(5): run.log({"step": step, "loss": float(step)})\n'
            '    time.sleep(1.5)\n    os.kill(os.getpid(), 9)')
    assert subprocess.run([sys.executable, '-c', code, out]).returncode == -signal.SIGKILL
    run, context = start(out, both, 2, log_rows(out / 'log.jsonl')[:3])
    with context:
        for step in range(3, 6):
            run.log({'step': step, 'loss': float(step)})
    first = [(step, float(step)) for step in range(6)]
    sent = {name: [(step, x['loss']) for step, x in rows] for name, rows in wandb_runs(out)[0].items()}
    assert sent == {run.name: first}
    assert [event[:3] for event in tensorboard_rows(out)[0] if event[1] == 'loss'] == [(s, 'loss', float(s)) for s in range(6)]

    run, context = start(out, both, 3, run.rows[:4], {'lr': [2.0, 1.0]})
    with context:
        for step in range(4, 6):
            run.log({'step': step, 'loss': -1.0})
    assert_told(run.rows, out, f'{run.name}-2')
    sent, _ = wandb_runs(out)
    assert [(step, x['loss']) for step, x in sent[run.name]] == first and len(sent) == 2
    assert run.rows[4]['changed'] and sent[f'{run.name}-2'][4][1].keys() == {'step', 'loss', 'elapsed'}      # numbers alone
    assert service_processes() == []


def test_a_tracker_that_comes_later_is_told_the_rows_before(tmp_path, offline):
    """report= may be given to a run that goes on."""
    run, context = start(tmp_path, '')
    with context:
        run.log({'step': 0, 'loss': 1.5})
    run, context = start(tmp_path, 'tensorboard', 0, run.rows)
    with context:
        run.log({'step': 1, 'loss': 0.5})
    told, _ = tensorboard_rows(tmp_path)
    assert [event[:3] for event in told if event[1] == 'loss'] == [(0, 'loss', 1.5), (1, 'loss', 0.5)]
    assert not (tmp_path / 'wandb').exists()


# ---- trackers that fail ---------------------------------------------------------------------------

class Failing:
    """A tracker that fails at one of its calls."""
    module = 'json'
    fails_at = None

    def __init__(self, run):
        self.calls = []

    def call(self, name):
        self.calls.append(name)
        if name == self.fails_at:
            raise OSError(28, 'No space left on device')

    def begin(self):
        self.call('begin')

    def log(self, rows):
        self.call('log')

    def end(self, failed):
        self.call('end')


@pytest.mark.parametrize('fails_at', ['begin', 'log', 'end', None])
def test_a_tracker_that_fails_ends_no_training(tmp_path, monkeypatch, capsys, fails_at):
    """A full disk or a server that is gone: one line, and the tracker is not asked again. The log has all rows, and the
    other tracker too."""
    monkeypatch.setattr(Failing, 'fails_at', fails_at)
    other = type('Other', (Failing,), {'fails_at': None})
    monkeypatch.setattr(trackers, 'TRACKERS', {'wandb': Failing, 'tensorboard': other})
    run, context = start(tmp_path, 'wandb,tensorboard')
    with context:
        active = dict(run.trackers.active)
        for step in range(3):
            run.log({'step': step})
    assert [row['step'] for row in log_rows(tmp_path / 'log.jsonl')] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert printed.count('\n') == printed.count('note: wandb: ') == (fails_at is not None)
    assert active['tensorboard'].calls == ['begin', 'log', 'log', 'log', 'log', 'end']       # the first: earlier rows
    if fails_at:
        assert 'No space left on device; training goes on without it' in printed


def test_no_login_is_a_line(tmp_path, offline, monkeypatch, capsys):
    """W&B raises an error of its own where nobody has logged in."""
    monkeypatch.setenv('WANDB_MODE', 'online')
    run, context = start(tmp_path, 'wandb')
    with context:
        run.log({'step': 0, 'loss': 1.0})
    lines = [line for line in capsys.readouterr().out.splitlines() if 'note: wandb: ' in line]
    assert len(lines) == 1 and 'API key' in lines[0] and lines[0].endswith('training goes on without it')
    assert len(log_rows(tmp_path / 'log.jsonl')) == 1


def test_rank_0_alone_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, 'TRACKERS', {'wandb': None})       # calling it would fail
    run = begin(tmp_path, {}, (), 1, ['step'])
    with tracked(run, 'wandb'):
        run.log({'step': 0})
    check_trackers('', 0)
    assert run.trackers is None


# ---- before the run -------------------------------------------------------------------------------

@pytest.mark.parametrize('name, module', [('wandb', 'wandb'), ('tensorboard', 'torch.utils.tensorboard')])
def test_a_missing_package_is_told_before_anything_is_loaded(toy_dir, tmp_path, monkeypatch, name, module):
    """It was noticed after the models were loaded and evaluated."""
    monkeypatch.setitem(sys.modules, module, None)                   # import raises ImportError
    with pytest.raises(UserError, match=f'report={name}: .*; pip install {name}'):
        distill.main(load_config(argv(toy_dir, tmp_path / 'run', report=name)))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('report', ['wandbb', 'wandb;tensorboard', ',', 'wandb,,tensorboard', 'none'])
def test_an_unknown_tracker_is_refused(toy_dir, tmp_path, report):
    with pytest.raises(UserError, match='no tracker is called .*; give wandb, tensorboard, or wandb,tensorboard'):
        distill.main(load_config(argv(toy_dir, tmp_path / 'run', report=report)))
    assert not (tmp_path / 'run').exists()


def test_names_of_trackers():
    assert tracker_names('') == [] and tracker_names('wandb, tensorboard,wandb') == ['wandb', 'tensorboard']
    assert numbers_of({'step': 3, 'a': 1, 'b': 0.5, 'c': None, 'd': 'x', 'e': [1.0], 'f': {}}) == {'step': 3, 'a': 1, 'b': 0.5}


def test_the_packages_are_imported_only_if_wanted():
    """At the top of no file of the project: they are not among its requirements."""
    for file in [*ROOT.glob('*.py'), *ROOT.glob('[a-z]*/*.py')]:
        if 'tests' in file.parts:
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert 'wandb' not in ast.unparse(node) and 'torch.utils.tensorboard' not in ast.unparse(node), file
