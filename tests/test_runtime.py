"""What is printed, one-line errors, exit codes, and ranks that end with their launcher."""
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata

import pytest
import torch
from torch import distributed as dist

from support import runtime
from support.runtime import ROOT, UserError, cut, print0, printable, run, shown, start

HOSTILE = 'a\x1b[2J\x07\x00\x08\x7f\x9b1m\x85\r\u2028\u2029\u202e\u2066\u200f\ud800\udfff\ufeffz'


def test_what_a_terminal_would_act_on_is_escaped_and_all_else_is_not():
    """Every code point, against the Unicode database: control characters, separators of lines and halves of characters
    are escaped, and so are the marks that turn the direction of text. The text is still there to be read."""
    directions = {'LRE', 'RLE', 'PDF', 'LRO', 'RLO', 'LRI', 'RLI', 'FSI', 'PDI'}
    for number in range(0x110000):
        character = chr(number)
        escaped = unicodedata.category(character) in ('Cc', 'Cs', 'Zl', 'Zp') and character not in '\n\t'
        escaped |= unicodedata.bidirectional(character) in directions
        got = printable(character)
        if number not in (0x61c, 0x200e, 0x200f, 0xfeff):        # marks without a class of their own
            assert (got != character) == escaped, hex(number)
        if got != character:
            assert got.isascii() and got.isprintable() and got.startswith('\\') and printable(got) == got
    assert printable('a\x1b[2Jé🙂\n\t数') == 'a\\x1b[2Jé🙂\n\t数' and printable('\u202e') == '\\u202e'


def test_cut_keeps_both_ends():
    text = ''.join(map(chr, range(100, 1100)))
    for length in (20, 21, 60, 300):
        got = cut(text, length)
        begin, end = got.split(' ... ')
        assert len(got) == length and text.startswith(begin) and text.endswith(end) and abs(len(begin) - len(end)) <= 1
    assert cut('x' * 60, 60) == 'x' * 60 and len(cut('x' * 61, 60)) == 60


def test_shown_is_short_whatever_the_value():
    """The repr of an integer of thousands of digits, and of a list in a list in a list, is an error."""
    deep = []
    for _ in range(10**5):
        deep = [deep]
    for value in ('x' * 10**6, 10**5000, deep, {'a': 'b' * 999}, float('nan'), None, HOSTILE):
        assert len(shown(value)) <= 60 and '\n' not in shown(value)
    assert shown(10**5000) == 'a large int' and shown('x') == "'x'" and len(shown('x' * 99, 20)) == 20


def ended(main, capsys, code):
    """Run a script's main to its end -> what it printed: (out, err)."""
    with pytest.raises(SystemExit) as end:
        run(main, dict)
    assert end.value.code == code
    return capsys.readouterr()


def test_an_error_is_one_line_of_at_most_300_characters(capsys):
    """Downloaded text inside of it cannot command the terminal, and what to do, at the end, is not cut off."""
    def refused(text):
        def main(_):
            raise UserError(text)
        err = ended(main, capsys, 2).err
        line = err.removesuffix('\n')
        assert line.startswith('error: ') and line.isprintable() and len(line) <= 300 and err.count('\n') == 1
        return line
    assert refused('a.json: broken; fetch it again') == 'error: a.json: broken; fetch it again'
    long = refused('a.json: ' + HOSTILE * 999 + '; fetch it again')
    assert long.startswith('error: a.json: a\\x1b[2J') and long.endswith('; fetch it again') and ' ... ' in long
    assert refused('one\ntwo\tthree') == 'error: one two three'
    assert len(refused('x' * 293)) == 300 and '...' not in refused('x' * 293) and ' ... ' in refused('x' * 294)

    def lost(_):
        raise RuntimeError('[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:5')
    line = ended(lost, capsys, 2).err
    assert line.startswith('error: rank 0: another rank has died or is silent, look at its log ([/py') and line.count('\n') == 1

    def storeless(_):
        raise dist.DistStoreError('wait timeout after 3600000ms, keys: /default_pg/0//cuda//0')
    assert ended(storeless, capsys, 2).err.startswith('error: rank 0: another rank has died or is silent, look at its log (wait t')

    def full(_):
        raise OSError(28, 'No space left on device', 'b\x1b[2J' * 99)
    assert ended(full, capsys, 2).err.count('\n') == 1


def test_printed_lines_are_escaped(capsys):
    print0(HOSTILE, 3, 'b\nc')
    out = capsys.readouterr().out
    assert '\x1b' not in out and '\u202e' not in out and out.endswith('z 3 b\nc\n') and '\\x1b[2J' in out


def test_a_terminal_that_knows_ascii_alone(tmp_path):
    """An é was a UnicodeEncodeError with a traceback."""
    code = 'from support.runtime import print0, run\nrun(lambda _: print0("caf\\u00e9 \\U0001f642"), dict)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 0 and done.stdout == b'caf\\xe9 \\U0001f642\n' and done.stderr == b''


@pytest.mark.parametrize('script, code', [
    ('eval_math.py --help', 0), ('-c "from support.runtime import *; run(lambda _: [print0(i) for i in range(10**5)], dict)"', 141)])
def test_output_that_nobody_reads_any_more_ends_quietly(script, code):
    """`--help | head` said "Broken pipe", with exit code 2. A help has done its work; a run that ends early has not, and
    `distill.py | head && eval_math.py` must not go on."""
    done = subprocess.run(['bash', '-c', f'{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}'], cwd=ROOT, capture_output=True)
    assert done.returncode == code and done.stderr == b'' and done.stdout.count(b'\n') == 1


def test_tasks_of_slurm_without_torchrun_are_told(monkeypatch):
    """Each trained alone, in one folder, as rank 0 of 1. One task, and tasks that torchrun has made, are fine."""
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setenv('SLURM_NTASKS', '8')
    with pytest.raises(UserError, match='SLURM_NTASKS=8, but no RANK: .* start one task per node, with torchrun'):
        start('cpu')
    monkeypatch.setenv('SLURM_NTASKS', '1')
    assert start('cpu').world == 1
    monkeypatch.setenv('SLURM_NTASKS', '8')
    monkeypatch.setenv('RANK', '0')
    assert start('cpu').world == 1


def test_lengths_are_rounded_up_on_cuda_alone():
    """To the next multiple of 128. The original context of a longrope model is such a multiple: a padding column beyond it would
    give all tokens other frequencies."""
    for T in (1, 127, 128, 129, 1000, 4095, 4096):
        padded = runtime.padded_length(T, torch.device('cuda', 0))
        assert T <= padded < T + 128 and padded % 128 == 0 and padded <= 4096
        assert runtime.padded_length(T, torch.device('cpu')) == runtime.padded_length(T, 'mps') == T


STARTED = '''
import os, sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
empty = torch.empty
torch.empty = lambda *shape, device: empty(*shape)
from support.runtime import start
start(sys.argv[1], 'float32')
read = getattr(torch._C, '_accelerator_getAllocatorSettings', lambda: os.environ.get('PYTORCH_ALLOC_CONF', ''))
print([os.environ.get(name, '') for name in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')], read())
'''


@pytest.mark.parametrize('device, given, scripts, want', [
    ('cuda', {}, 'distill, bridge, eval_math', "['expandable_segments:True', ''] expandable_segments:True"),
    ('cpu', {}, 'torch', "['', ''] "),
    ('cuda', {'PYTORCH_ALLOC_CONF': ''}, 'torch', "['', ''] "),
    ('cuda', {'PYTORCH_CUDA_ALLOC_CONF': 'max_split_size_mb:64'}, 'torch', "['', 'max_split_size_mb:64'] max_split_size_mb:64"),
])
def test_the_memory_of_a_gpu_is_in_segments_that_grow(device, given, scripts, want):
    """In a new process, as the scripts start: the environment, and what torch has read of it. A growing cache and ever new
    lengths left gaps, and an evaluation of 64 rows came to the path that frees memory and tries again. What the user says
    about the allocator holds."""
    environment = {name: value for name, value in os.environ.items() if 'ALLOC_CONF' not in name}
    code = f'import {scripts}\n{STARTED}'
    done = subprocess.run([sys.executable, '-c', code, device], cwd=ROOT, capture_output=True, text=True, env=environment | given)
    assert done.returncode == 0, done.stderr
    got = done.stdout.splitlines()[-1]
    if hasattr(torch._C, '_accelerator_getAllocatorSettings'):
        assert got == want
    else:
        assert got.split('] ')[0] == want.split('] ')[0]


@pytest.mark.parametrize('kernel, asked', [('6.8.0-48-generic', True), ('5.15.153.1-microsoft-standard-WSL2', False), ('5.15.148-tegra', False)])
def test_wsl_and_tegra_have_no_segments_that_grow(monkeypatch, kernel, asked):
    """There the first tensor on the GPU would be an unknown error of the driver."""
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch, 'empty', lambda *shape, device: None)
    monkeypatch.setattr(runtime.platform, 'release', lambda: kernel)
    for name in runtime.ALLOCATOR:
        monkeypatch.setenv(name, '')         # so that it is put back
        monkeypatch.delenv(name)
    runtime.use_gpu(torch.device('cuda', 0))
    assert os.environ.get('PYTORCH_ALLOC_CONF') == ('expandable_segments:True' if asked else None)


def test_a_driver_without_segments_that_grow_is_told(monkeypatch):
    """A virtual GPU: torch says that the operation is not supported, with a traceback. Other errors stay what they are."""
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    for text, error in (('CUDA driver error: operation not supported\nAt: x', UserError), ('CUDA error: unknown', RuntimeError)):
        def refuse(*shape, device, text=text):
            raise RuntimeError(text)
        monkeypatch.setattr(torch, 'empty', refuse)
        monkeypatch.setenv('PYTORCH_ALLOC_CONF', 'expandable_segments:True')
        with pytest.raises(error, match=text.splitlines()[0]) as refused:
            runtime.use_gpu(torch.device('cuda', 0))
        assert ('PYTORCH_ALLOC_CONF=expandable_segments:False' in str(refused.value)) == (error is UserError)


RANK = '''
import os, sys, time
from support.runtime import start
start('cpu')
with open(sys.argv[1], 'a') as file:
    file.write(f'{os.getpid()}\\n')
time.sleep(100)
'''


def alive(pid):
    """Is it running? A process that has ended and was not waited for yet counts as gone."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def wait_for(condition, seconds):
    began = time.monotonic()
    while not condition() and time.monotonic() - began < seconds:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_ranks_end_with_torchrun_and_a_process_without_it_outlives_its_parent(tmp_path):
    """After kill -9 of torchrun its ranks went on as orphans, and the next launch mixed with them. What nohup has started
    must go on when its shell has gone."""
    (tmp_path / 'rank.py').write_text(RANK)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    launchers = {
        'torchrun': [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', tmp_path / 'rank.py', tmp_path / 'torchrun'],
        'shell': ['bash', '-c', f'{sys.executable} {tmp_path}/rank.py {tmp_path}/shell & sleep 100'],
    }
    pids = {}
    for name, command in launchers.items():
        file = tmp_path / name
        file.touch()
        with (tmp_path / f'{name}.log').open('w') as log:
            launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        count = 2 if name == 'torchrun' else 1
        assert wait_for(lambda file=file, count=count: len(file.read_text().split()) == count, 100), (tmp_path / f'{name}.log').read_text()
        pids[name] = [int(pid) for pid in file.read_text().split()]
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    try:
        assert wait_for(lambda: not any(map(alive, pids['torchrun'])), 15)
        assert 'error: torchrun has died; this rank ends with it' in (tmp_path / 'torchrun.log').read_text()
        time.sleep(2)
        assert alive(pids['shell'][0])
    finally:
        os.kill(pids['shell'][0], signal.SIGKILL)


def test_the_day_of_a_start(monkeypatch):
    """The first one that is known; else today's, in the form that is stored."""
    assert runtime.day_of_start('', '2020-02-29', '2021-01-01') == '2020-02-29'
    assert re.fullmatch(r'20\d\d-\d\d-\d\d', runtime.day_of_start('')) and runtime.day_of_start() == runtime.day_of_start('')


def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch):
    """Slurm signals torchrun and its ranks, and torchrun passes its signal on to the ranks. If the second one stopped at
    once, the step would be lost that the first one lets finish. Later ones do stop."""
    now = 100.0
    monkeypatch.setattr(runtime.time, 'monotonic', lambda: now)
    with runtime.interruptible() as caught:
        signal.raise_signal(signal.SIGTERM)
        now = 101.9
        signal.raise_signal(signal.SIGTERM)
        assert len(caught) == 1
        now = 102.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
