"""
Runs of the tiny toy as forks of one process: start one, watch what it changes, kill it, wait for it, compare what it made.

    with SCRATCH:                                           a temporary folder that is deleted at the end
        job = job_of('OPRD', SCRATCH.path / 'a')            distill.py on the toy, into SCRATCH.path / 'a/run'
        want = reference_of(job)                            its outcome, and its events
        ended = finish(job, trap=Trap(0, 7, kill_self(9)))  another one, killed before its event number 7

The process that imports this has imported everything that a run needs, so a fork pays for no imports: a run takes
about a second. Two ranks are two forks that find each other as those of torchrun do. An event is a change of a file
below the run's folder, a row that is written, or an update of the weights (see `watch`). A process must have started no
threads before it forks: call torch.set_num_threads(1) first.

breaking.py is made of these. What it does not do: run anything on a GPU.
"""
import atexit
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import matplotlib.pyplot  # noqa: F401 (this and the three scripts: imported once, here, for all forks)
import torch
from conftest import argv, for_script
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import bridge  # noqa: F401
import distill  # noqa: F401
import eval_math  # noqa: F401
import grading.grader
import support.jsonl
from support.runtime import ROOT

LIMIT = 120                     # seconds after which a process counts as hanging
GRACE = 1                       # seconds after which ranks are told to end when another one has failed
PATIENCE = 15                   # seconds that a rank may take to end after another one has died
LINE = 300                      # characters of an error line
STEPS = 7
SAVE_EVERY = 2

# The changes of files that are seen, by the names that Python gives them (see sys.addaudithook).
CHANGES = {'open', 'os.rename', 'os.symlink', 'os.link', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.chmod',
           'os.truncate', 'shutil.rmtree'}


# ---- commands -------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """One command, and where it works."""
    script: str                 # 'distill', 'bridge' or 'eval_math'
    arguments: list             # its command line
    cwd: Path                   # its current folder; everything that it writes is below
    out: Path                   # the folder that it writes


# A toy whose answers have the right form, and are right now and then, so that scores differ from step to step.
TOY = dict(toy_ops=1, toy_student_steps=100, toy_teacher_steps=30, toy_student_lr=1e-2, toy_teacher_lr=5e-3)
UNLIKE = dict(toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged')
OPD = dict(oprd_weight=0, opd_weight=1)
BRIDGE = UNLIKE | dict(bridge='bridge', bridge_rank=6, bridge_prompts=24, eval_rows=4)

# kind of run -> (script, keys beside those of the tiny toy)
KINDS = {
    'OPRD': ('distill', {}),
    'OPD full': ('distill', OPD | dict(opd='full')),
    'OPD topk': ('distill', OPD | dict(opd='topk', opd_k=4)),
    'byte': ('distill', OPD | UNLIKE | dict(opd='byte')),
    'bridge': ('bridge', BRIDGE),
    'through bridge': ('distill', BRIDGE),
    'evaluation': ('eval_math', dict(eval_n=8, eval_rows=4)),
}


def job_of(kind, place, shared=None, **more):
    """The command of a kind of run that writes below `place`: run, bridge or out/eval. shared: the folder of what
    it reads, toys and (unless it writes that) bridge; default: `place` too."""
    script, keys = KINDS[kind]
    shared = shared or place
    keys = TOY | dict(steps=STEPS, save_every=SAVE_EVERY, prompts_per_step=4, date='2026-01-31') | keys
    if 'bridge' in keys:
        keys['bridge'] = (place if script == 'bridge' else shared) / 'bridge'
    if script == 'eval_math':
        keys['eval_max_new_tokens'] = 20
    arguments = for_script(f'{script}.py', argv(shared / 'toys', place / 'run', **keys | more))
    out = {'distill': place / 'run', 'bridge': place / 'bridge', 'eval_math': place / 'out/eval'}[script]
    return Job(script, arguments, place, out)


# ---- in the child: one command, watched ----------------------------------------------------------------

class Trap(NamedTuple):
    """What happens to a process at one of its events (see `watch`)."""
    rank: int
    event: int                  # number of the event, from 0
    action: object              # called without arguments just before that


def watch(folder, events_file, trap):
    """Write a line to `events_file` before everything that this process changes below `folder`, and before
    and after each update of weights. The trap is sprung when the number of the line is its own."""
    events = os.open(events_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    folder = str(folder)
    count = 0

    def happens(what):
        nonlocal count
        count += 1
        os.write(events, f'{what}\n'.encode())
        if trap and trap.event == count - 1:
            trap.action()

    def audit(event, args):
        if event not in CHANGES or not isinstance(args[0], str | os.PathLike):
            return
        # Entries of a folder that is being deleted are named relative to it.
        within = event in ('os.remove', 'os.rmdir') and args[1] != -1
        if event == 'open' and args[1] is not None and not set(args[1]) & set('wax+'):
            return
        path = os.path.abspath(args[0])
        if within or path.startswith(folder + '/'):
            name = os.fspath(args[0]) if within else path[len(folder) + 1:]
            happens(f'{event.removeprefix("os.")} {without_pid(name)}')

    append_row = support.jsonl.append_row

    def append(file, row, **how):
        happens(f'row {without_pid(Path(file.name).name)}')
        append_row(file, row, **how)

    sys.addaudithook(audit)
    for module in list(sys.modules.values()):           # those that have imported it by name, too
        if getattr(module, 'append_row', None) is append_row:
            module.append_row = append
    register_optimizer_step_pre_hook(lambda *_: happens('update begins'))
    register_optimizer_step_post_hook(lambda *_: happens('update ends'))


def without_pid(name):
    """The name of a file without the process id that temporary files have in theirs."""
    return re.sub(r'(tmp|old)\d+', r'\1', name)


def run_in_child(job, notes, rank, ranks, port, prepare, trap):
    """The rest of a forked process: become the command of a job. Never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor, name in ((1, 'out'), (2, 'err')):
            file = os.open(notes / f'{name}-{rank}', os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
        os.chdir(job.cwd)

        # math-verify takes longer to start than a whole run here: what the exact part cannot decide is wrong.
        grading.grader.Child.compare = lambda self, answer, found: (False, 'not asked')
        if ranks > 1:
            os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(ranks),
                           'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        if prepare:
            prepare()
        watch(job.out, notes / f'events-{rank}', trap if trap and trap.rank == rank else None)
        sys.argv = [str(ROOT / f'{job.script}.py'), *map(str, job.arguments)]
        runpy.run_path(sys.argv[0], run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- in the parent: start, kill, wait -------------------------------------------------------------------

@dataclass
class Ended:
    """What became of the processes of a command."""
    codes: list                 # exit code of each rank; minus the signal that killed it
    out: str                    # what all ranks printed
    err: str
    events: list                # lines of each rank (see `watch`)
    seconds: float
    late: str = ''              # a complaint, if a process had to be ended

    @property
    def code(self):
        return self.codes[0]

    @property
    def resumed(self):
        """After which step it went on; 0: from the beginning."""
        found = re.search(r'resum\w* (?:after|from|at) step (\d+)', self.out)
        return int(found[1]) if found else 0


@dataclass
class Processes:
    """The ranks of one command, each a fork of this process in a session of its own."""
    job: Job
    ranks: int = 1
    prepare: object = None      # called in the child before the command
    trap: Trap = None
    pids: list = field(default_factory=list)

    def __post_init__(self):
        self.notes = Path(tempfile.mkdtemp(dir=SCRATCH.path))
        self.began = time.monotonic()
        self.codes = [None] * self.ranks
        self.job.cwd.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                run_in_child(self.job, self.notes, rank, self.ranks, port, self.prepare, self.trap)
            self.pids.append(pid)
        SCRATCH.running.append(self)

    def poll(self):
        """Note the exit codes of ranks that have ended -> have all of them?"""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None not in self.codes

    def send(self, number, rank=None):
        """A signal to one rank, or to all that still run."""
        self.poll()
        for index, pid in enumerate(self.pids):
            if self.codes[index] is None and rank in (None, index):
                os.kill(pid, number)

    def sleep(self, seconds):
        """Wait so long, or until all ranks have ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.poll():
            time.sleep(0.005)

    def wait(self, limit=LIMIT):
        """Wait until all ranks have ended -> Ended. When one has failed, the others are told to end, as by torchrun,
        but only after GRACE, because most notice it themselves; after PATIENCE they are killed."""
        end = time.monotonic() + limit
        failed_at = None
        told = False
        late = ''
        while not self.poll():
            now = time.monotonic()
            if failed_at is None and any(self.codes):                # a code that is neither None nor 0
                failed_at = now
                end = min(end, now + PATIENCE)
            if failed_at and not told and now > failed_at + GRACE:
                told = True
                self.send(signal.SIGTERM)
            if now > end:
                late = f'still running after {now - self.began:.0f} s'
                self.send(signal.SIGKILL)
            self.sleep(0.1)
        seconds = time.monotonic() - self.began
        texts = {}
        for name in ('out', 'err', 'events'):
            files = [self.notes / f'{name}-{rank}' for rank in range(self.ranks)]
            texts[name] = [file.read_text(errors='replace') if file.exists() else '' for file in files]
        shutil.rmtree(self.notes)
        SCRATCH.running.remove(self)
        events = [text.splitlines() for text in texts['events']]
        return Ended(self.codes, ''.join(texts['out']), ''.join(texts['err']), events, seconds, late)


class Scratch:
    """The temporary folder of everything, and the processes that run in it; both end with the tool."""
    def __enter__(self):
        self.path = Path(tempfile.mkdtemp(prefix='breaking-'))
        self.running = []
        return self

    def __exit__(self, *_):
        for processes in list(self.running):
            processes.send(signal.SIGKILL)
            processes.wait()
        shutil.rmtree(self.path, ignore_errors=True)


SCRATCH = Scratch()


def finish(job, ranks=1, prepare=None, trap=None):
    """Run a job to its end -> Ended."""
    return Processes(job, ranks, prepare, trap).wait()


def kill_self(number):
    """An action for a trap."""
    return lambda: os.kill(os.getpid(), number)


def refused(ended):
    """'' if the command ended as it should after a mistake of the user: exit code 2, one line, not too long. Else
    what is wrong."""
    lines = ended.err.strip().splitlines()
    if ended.late:
        return ended.late
    if 'Traceback' in ended.err:
        return f'traceback: {lines[-1][:120]}'
    if 2 not in ended.codes:                        # one rank says it, and the others are ended
        return f'exit code {ended.code}: {(lines or ended.out.splitlines() or [""])[-1][:120]}'
    if len(lines) != 1 or not lines[0].startswith('error: '):
        return f'{len(lines)} lines: {" / ".join(lines)[:120]}'
    return f'a line of {len(lines[0])} characters' if len(lines[0]) > LINE else ''


def leftovers(folder):
    """What a failed write left behind; '' if nothing."""
    names = sorted(path.name for path in folder.rglob('.*') if '.tmp' in path.name or '.old' in path.name)
    return f'left behind: {", ".join(names)[:100]}' if names else ''


# ---- what a run has made --------------------------------------------------------------------------------

def outcome(job):
    """Everything that a finished job has made, without what a clock says -> {name: value}."""
    made = {}
    if job.script == 'distill':
        rows = [json.loads(line) for line in (job.out / 'log.jsonl').read_text().splitlines()]
        for number, row in enumerate(rows):
            made[f'row {number} of log.jsonl'] = {k: v for k, v in row.items() if not is_time(k)}
        made['results.json'] = read_results(job.out / 'results.json')
        checkpoint = (job.out / 'last').resolve().parent
        for file in sorted(checkpoint.rglob('*.safetensors')):
            made[str(file.relative_to(job.out))] = tensors(file)
    elif job.script == 'bridge':
        made['rollouts.jsonl'] = (job.out / 'rollouts.jsonl').read_bytes()
        made['bridge.safetensors'] = tensors(job.out / 'bridge.safetensors')
        made['bridge.json'] = read_results(job.out / 'bridge.json')
    else:
        for file in sorted(job.out.glob('student-*/[!.]*.json*')):
            made[file.name] = file.read_bytes()
    return made


def is_time(key):
    """Is this entry of a log or of results what a clock said?"""
    return key.startswith(('time/', 'mem/')) or key in ('elapsed', 'seconds')


def read_results(file):
    return {key: value for key, value in json.loads(file.read_text()).items() if not is_time(key)}


def tensors(file):
    """A digest of names, shapes, types and bits of a safetensors file's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def difference(job, want):
    """The first thing in which a job's outcome is not the one that is wanted; '' if there is none."""
    try:
        got = outcome(job)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f'cannot be read: {type(error).__name__} {error}'[:160]
    for name in [*want, *got]:
        if got.get(name) != want.get(name):
            return f'{name} {"differs" if name in got and name in want else "is only in one"}'
    return ''


@dataclass
class Reference:
    """An uninterrupted run."""
    made: dict                  # its outcome
    events: list                # of each rank
    seconds: float


def make_shared(kind, shared):
    """Make what a kind of run reads: the toy's models, and the bridge if it goes through one."""
    arguments = for_script('studies/toy.py', job_of(kind, shared).arguments)
    needed = [Job('studies/toy', arguments, shared, shared / 'toys')]
    if kind == 'through bridge':
        needed.append(job_of('bridge', shared))
    for job in needed:
        made = finish(job)
        assert made.code == 0, f'{job.arguments}: {made.err}'


def reference_of(job, ranks=1, prepare=None):
    """Run a job undisturbed -> Reference."""
    ended = finish(job, ranks, prepare)
    assert set(ended.codes) == {0}, f'{job.arguments}: the undisturbed run failed: {ended.codes} {ended.err}'
    return Reference(outcome(job), ended.events, ended.seconds)
