"""
Break runs on purpose and print what became of them: a line for each case, then a summary.

    python tests/breaking.py signals 60             kill runs; what goes on must equal the uninterrupted run
    python tests/breaking.py files 200              damage the files of a stopped run, then go on
    python tests/breaking.py cases                  a full disk, a dead rank, a copied folder, two starts, ...

    python tests/breaking.py files 200 --seed 3 --only 17 40     two cases of these 200 again
    python tests/breaking.py files 15 --scenes stopped           the files of some scenes alone (see SCENES)
    python tests/breaking.py cases --only full copied            the cases whose names begin like this

Every case follows from its number and --seed; only a kill after so many seconds also depends on the machine.
The exit code is 1 if a case went wrong. The runs are those of the tiny toy, forked from this process (see
forks.py). One that takes LIMIT seconds counts as wrong.
test_breaking.py runs a few cases. What it does not do: cut the power, or damage files while a run reads them.
"""
import argparse
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from forks import (
    KINDS,
    LIMIT,
    PATIENCE,
    SAVE_EVERY,
    SCRATCH,
    STEPS,
    Processes,
    Trap,
    difference,
    finish,
    job_of,
    kill_self,
    leftovers,
    make_shared,
    reference_of,
    refused,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

from support.runtime import ROOT

# ---- signals --------------------------------------------------------------------------------------------

class Death(NamedTuple):
    """A signal, and when it comes."""
    number: signal.Signals
    rank: int                   # whom it hits; -1: all ranks
    event: int                  # before this event of that rank (see `watch`); -1: by the clock
    seconds: float              # after so many seconds


class Killed:
    """What the cases of `signals` share: one reference for each kind of run and number of ranks."""
    titles = ('kind', 'ranks', 'resumed', 'signal and when')
    widths = (14, 5, 7, 90)

    def __init__(self):
        self.references = {}
        self.shared = {}
        self.results = []                            # (kind and ranks, is it wrong?)

    def reference(self, kind, ranks):
        if kind not in self.shared:
            self.shared[kind] = SCRATCH.path / f'shared {kind}'
            make_shared(kind, self.shared[kind])
        if (kind, ranks) not in self.references:
            place = SCRATCH.path / f'whole {kind} {ranks}'
            self.references[kind, ranks] = reference_of(job_of(kind, place, self.shared[kind]), ranks)
        return self.references[kind, ranks]

    def case(self, seed, number):
        """One killed run -> (the columns of its line, what is wrong or '')."""
        rng = random.Random(f'signals {seed} {number}')
        kind = list(KINDS)[number % len(KINDS)]
        ranks = 1 + number // len(KINDS) % 2
        reference = self.reference(kind, ranks)
        place = SCRATCH.path / f'signals {number}'
        job = job_of(kind, place, self.shared[kind])

        # One death, and in a third of the cases another one as the run goes on.
        wrong = ''
        moments = []
        for _ in range(rng.choice([1, 1, 2])):
            death = draw_death(rng, reference, ranks)
            ended = die(job, ranks, death)
            moments.append(f'{death.number.name[3:]} {moment(death, ended)}')
            wrong = wrong or misbehaved(ended, death, ranks)
        last = finish(job, ranks)
        if set(last.codes) != {0}:
            wrong = wrong or f'did not go on: {last.codes} {last.err.strip()[-160:]}'
        wrong = wrong or difference(job, reference.made) or leftovers(job.out)
        shutil.rmtree(place)
        self.results.append((f'{kind}, ranks: {ranks}', bool(wrong)))
        resumed = f'step {last.resumed}' if job.script == 'distill' else '-'
        if 'finished at step' in last.out:
            resumed = 'done'
        return [kind, ranks, resumed, ', then '.join(moments)], wrong

    def summary(self):
        """Print the table by kind of run."""
        print(f'\n{"kind of run":26s} cases  equal  WRONG')
        for kind in [*sorted({kind for kind, _ in self.results}), '']:
            wrong = [is_wrong for name, is_wrong in self.results if kind in ('', name)]
            print(f'{kind or "all":26s} {len(wrong):5d} {len(wrong) - sum(wrong):6d} {sum(wrong):6d}')


def draw_death(rng, reference, ranks):
    """When and how a run dies: half of the deaths are inside a save, where a run has such."""
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    rank = rng.choice([0, 0, ranks - 1])
    saves = []
    for index, line in enumerate(reference.events[rank]):
        if 'ckpt' in line or ' last' in line or 'bridge.' in line:
            saves.append(index)
    how = rng.random()
    if saves and how < 0.5:
        return Death(number, rank, rng.choice(saves), 0)
    if reference.events[rank] and how < 0.75:
        return Death(number, rank, rng.randrange(len(reference.events[rank])), 0)
    return Death(number, -1, -1, rng.uniform(0.05, reference.seconds))


def die(job, ranks, death):
    """Start a job that dies -> Ended."""
    if death.event >= 0:
        return finish(job, ranks, trap=Trap(death.rank, death.event, kill_self(death.number)))
    processes = Processes(job, ranks)
    processes.sleep(death.seconds)
    processes.send(death.number)
    return processes.wait()


def moment(death, ended):
    """When a death came, in words: the updates that were done, and what came next."""
    events = ended.events[max(death.rank, 0)]
    updates = events.count('update ends')
    if death.event >= 0 and len(events) > death.event:
        where = f'rank {death.rank}, ' if len(ended.codes) > 1 else ''
        return f'{where}update {updates}, before "{events[death.event]}"'
    if set(ended.codes) == {0}:
        return 'came too late'
    return f'at {death.seconds:.2f} s, update {updates}'


def misbehaved(ended, death, ranks):
    """'' if the processes of a killed run ended as they should, else what is wrong."""
    if ended.late:
        return ended.late
    if death.number == signal.SIGKILL or ranks > 1:
        return ''                # a rank whose partner is gone may say so in any way
    allowed = {signal.SIGINT: (130, 0), signal.SIGTERM: (130, -signal.SIGTERM, 0)}[death.number]
    if ended.code not in allowed or 'Traceback' in ended.err:
        return f'{death.number.name}: exit code {ended.code} {ended.err.strip()[-120:]}'
    return ''


# ---- damaged files --------------------------------------------------------------------------------------

class Scene(NamedTuple):
    """A run that was stopped, or not, and the files of it that will be damaged."""
    kind: str                   # of the run
    event: str                  # the run is killed before this event ...
    count: int                  # ... when it comes for the count-th time; 0: it ends by itself
    patterns: list              # what is damaged, below the scene's folder
    ranks: int = 1


SCENES = {
    'stopped': Scene('OPRD', 'update begins', STEPS - 1, ['run/**/*']),
    'toys': Scene('OPRD', 'update begins', STEPS - 1, ['toys/**/*']),
    'sharded': Scene('OPRD', 'update begins', STEPS - 1, ['run/ckpt-*/resume*', 'run/ckpt-*/resume*/*', 'run/last'], 2),
    'finished': Scene('OPRD', '', 0, ['run/results.json', 'run/config.json']),
    'collecting': Scene('bridge', 'row rollouts.jsonl', 14, ['bridge/**/*']),
    'collected': Scene('bridge', '', 0, ['bridge/**/*']),
    'bridged': Scene('through bridge', 'update begins', STEPS - 1, ['bridge/bridge*']),
    'evaluating': Scene('evaluation', 'row samples-0.jsonl', 20, ['out/eval/**/*']),
}


def group_of(path):
    """The kind of a file, from its path in a scene: run/ckpt-000004/resume.json -> ckpt-*/resume.json."""
    name = re.sub(r'^run/', '', str(path))
    name = re.sub(r'^toys/[^/]+', 'toys', name)
    name = re.sub(r'^out/eval/[^/]+', 'eval', name)
    name = re.sub(r'(model|student|teacher)/(?!model\.safetensors).+', r'\1/others', name)
    return re.sub(r'\d+', '*', name)


class Stage:
    """A scene that has been made. Each case damages its work folder, which is then put back from a copy."""
    def __init__(self, name, scene):
        self.place = SCRATCH.path / name
        self.pristine = SCRATCH.path / f'{name} as it was'
        self.job = job_of(scene.kind, self.place)
        make_shared(scene.kind, self.place)
        if scene.kind == 'through bridge':
            shutil.rmtree(self.place / 'run', ignore_errors=True)
        shutil.copytree(self.place, self.pristine, symlinks=True)
        self.ranks = scene.ranks
        self.reference = reference_of(self.job, self.ranks, steady_clock)

        # Stop the run at its event, and keep that state.
        if scene.count:
            self.restore()
            found = [number for number, line in enumerate(self.reference.events[0]) if line == scene.event]
            trap = Trap(0, found[scene.count - 1], kill_self(signal.SIGKILL))
            assert finish(self.job, self.ranks, steady_clock, trap).code == -signal.SIGKILL
        shutil.rmtree(self.pristine)
        shutil.copytree(self.place, self.pristine, symlinks=True)

        # Undamaged, it must end as the uninterrupted run does; from which step, the cases are held against.
        ended = finish(self.job, self.ranks)
        wrong = difference(self.job, self.reference.made)
        assert set(ended.codes) == {0} and not wrong, f'{name}: {wrong} {ended.err}'
        self.resumed = ended.resumed
        self.restore()

        # The files by kind. What begins with a dot is temporary, figures are drawn anew.
        self.groups = {}
        for pattern in scene.patterns:
            for path in sorted(self.place.glob(pattern)):
                inner = path.relative_to(self.place)
                if path.name[0] != '.' and path.suffix != '.png' and len(inner.parts) > 1:
                    self.groups.setdefault(group_of(inner), []).append(inner)

    def restore(self):
        """The work folder as it was, times of files included."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.pristine, self.place, symlinks=True)


def steady_clock():
    """Every look at a clock is an eighth of a second after the last one: the times in a log then have the same digits
    whenever a scene is made, so that a case damages the same byte again."""
    ticks = itertools.count(1000)
    for name in ('time', 'monotonic', 'perf_counter'):
        setattr(time, name, lambda: next(ticks) / 8)


def damage(path, rng):
    """Damage a file, link or folder in one of the ways that suit it -> in words."""
    if path.is_symlink():
        return damage_link(path, rng)
    if path.is_dir():
        return damage_folder(path, rng)
    ways = ['bit', 'bit', 'bit', 'bit', 'truncate', 'empty', 'delete', 'folder', '{}', '[]', 'null']
    if path.suffix in ('.json', '.jsonl', '.jinja'):
        ways += ['double line', 'drop line', 'swap lines', 'foreign line', 'not UTF-8', 'not UTF-8']
    if os.geteuid() != 0:
        ways.append('mode 000')
    way = rng.choice(ways)
    if way in ('double line', 'drop line', 'swap lines', 'foreign line'):
        return damage_lines(path, way, rng)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data)) if data else 0
    if way == 'bit' and data:
        bit = rng.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        return f'bit {bit} of byte {at} flipped'
    if way == 'truncate':
        path.write_bytes(data[:at])
        return f'cut to {at} of {len(data)} bytes'
    if way == 'not UTF-8':
        path.write_bytes(data[:at] + b'\xff\xfe' + data[at:])
        return f'ff fe put in at byte {at}'
    if way in ('{}', '[]', 'null', 'empty', 'bit'):
        path.write_text('' if way in ('empty', 'bit') else f'{way}\n')
        return f'replaced by {way}' if way in ('{}', '[]', 'null') else 'emptied'
    if way == 'mode 000':
        path.chmod(0)
        return way
    path.unlink()
    if way == 'folder':
        path.mkdir()
    return 'deleted' if way == 'delete' else 'a folder in its place'


def damage_lines(path, way, rng):
    """Damage the lines of a text file -> in words."""
    lines = path.read_bytes().splitlines(keepends=True) or [b'\n']
    at = rng.randrange(len(lines))
    if len(lines) == 1 and way == 'swap lines':
        way = 'double line'
    if way == 'double line':
        lines.insert(at, lines[at])
    elif way == 'drop line':
        del lines[at]
    elif way == 'foreign line':
        lines.insert(at, rng.choice([b'{"step": 1, "problem": 0}\n', b'[0, [1], true]\n', b'7\n', b'<<<<<<< HEAD\n']))
    elif way == 'swap lines':
        other = (at + rng.randrange(1, len(lines))) % len(lines)
        lines[at], lines[other] = lines[other], lines[at]
        way = f'swap line {other + 1} and'
    path.write_bytes(b''.join(lines))
    return f'{way} {at + 1}'


def damage_link(path, rng):
    """Damage a link -> in words."""
    way = rng.choice(['deleted', 'a copy in its place', 'a text file in its place', 'pointed to nothing',
                      'pointed to the folder above', 'a link to itself'])
    target = os.readlink(path)
    copied = path.resolve()
    path.unlink()
    if way == 'a copy in its place':
        shutil.copytree(copied, path)
    elif way == 'a text file in its place':
        path.write_text(target)
    elif way != 'deleted':
        path.symlink_to({'pointed to nothing': 'ckpt-999999/model', 'pointed to the folder above': '..',
                         'a link to itself': path.name}[way])
    return way


def damage_folder(path, rng):
    """Damage a folder -> in words."""
    way = rng.choice(['deleted', 'a file in its place', 'emptied', 'renamed'])
    if way == 'renamed':
        path.rename(path.with_name(f'old-{path.name}'))
        return way
    shutil.rmtree(path)
    if way == 'a file in its place':
        path.write_text('hello\n')
    elif way == 'emptied':
        path.mkdir()
    return way


def files_below(folder):
    """Paths of all files below a folder, without temporary ones."""
    return {path for path in folder.rglob('*') if path.is_file() and not path.name.startswith('.')}


VERDICTS = ('refused', 'previous', 'equal', 'WRONG')


def judge(stage, ended, before):
    """What became of a damaged run -> (a word of VERDICTS, what is wrong or '')."""
    if set(ended.codes) != {0} or ended.late:
        wrong = refused(ended)
        lost = sorted(path.name for path in before - files_below(stage.job.out))
        if lost and not wrong:
            wrong = f'refused, but {", ".join(lost)[:100]} was deleted'
        return ('WRONG' if wrong else 'refused'), wrong
    wrong = difference(stage.job, stage.reference.made)
    if wrong:
        return 'WRONG', f'exit code 0, but {wrong}'
    if ended.resumed < stage.resumed:
        silent = not re.search(r'damaged|ckpt-|checkpoint', ended.out + ended.err)
        return ('WRONG', 'went back without a word') if silent else ('previous', '')
    return 'equal', ''


class Damaged:
    """What the cases of `files` share: the stages, and the kinds of files on them."""
    titles = ('scene', 'file', 'damage', 'verdict')
    widths = (10, 50, 30, 8)

    def __init__(self, names):
        self.targets = []                            # (stage, kind of file, paths)
        for name in names:
            stage = Stage(name, SCENES[name])
            self.targets += [(stage, f'{name}: {group}', paths) for group, paths in stage.groups.items()]
        random.Random(0).shuffle(self.targets)
        self.counts = {group: dict.fromkeys(VERDICTS, 0) for _, group, _ in self.targets}

    def case(self, seed, number):
        """One damaged file -> (the columns of its line, what is wrong or '')."""
        rng = random.Random(f'files {seed} {number}')
        stage, group, paths = self.targets[number % len(self.targets)]
        inner = rng.choice(paths)
        way = damage(stage.place / inner, rng)
        before = files_below(stage.job.out)
        ended = finish(stage.job, stage.ranks)
        verdict, wrong = judge(stage, ended, before)
        stage.restore()
        self.counts[group][verdict] += 1
        return [group.split(':')[0], inner, way, verdict], wrong

    def summary(self):
        """Print the table by kind of file."""
        print(f'\n{"kind of file":48s} cases  refused  previous  equal  WRONG')
        rows = sorted(self.counts.items())
        total = {verdict: sum(counts[verdict] for _, counts in rows) for verdict in VERDICTS}
        for group, counts in [*rows, ('all', total)]:
            if sum(counts.values()):
                columns = [sum(counts.values()), *counts.values()]
                print(f'{group:48s} {columns[0]:5d} {columns[1]:8d} {columns[2]:9d} {columns[3]:6d} {columns[4]:6d}')


# ---- cases with a name -----------------------------------------------------------------------------------

class Named:
    """What the cases with a name share: an uninterrupted run, and one that was stopped after its update 5, so
    that its checkpoints are those of steps 2 and 4."""
    def __init__(self):
        self.shared = SCRATCH.path / 'shared'
        make_shared('OPRD', self.shared)
        self.whole = reference_of(self.job('whole'))
        self.trap = Trap(0, self.event('update begins', STEPS - 1), kill_self(signal.SIGKILL))
        self.stopped = self.job('stopped')
        assert finish(self.stopped, trap=self.trap).code == -signal.SIGKILL

    def job(self, name, kind='OPRD', **keys):
        return job_of(kind, SCRATCH.path / name, self.shared, **keys)

    def event(self, what, count):
        """The number of the event at which `what` happens for the count-th time in the uninterrupted run."""
        return [number for number, line in enumerate(self.whole.events[0]) if line == what][count - 1]

    def copy(self, name):
        """A job on a copy of the stopped run."""
        job = self.job(name)
        shutil.copytree(self.stopped.cwd, job.cwd, symlinks=True)
        return job

    def goes_on(self, job, ranks=1, whole=None, least=0):
        """'' if the run now ends as the uninterrupted one did, having gone on after step `least` or later."""
        ended = finish(job, ranks)
        if set(ended.codes) != {0}:
            return f'did not go on: {ended.codes} {ended.err.strip()[-160:]}'
        if ended.resumed < least:
            return f'went on after step {ended.resumed}, not {least}'
        return difference(job, (whole or self.whole).made)


def full_disk(named):
    """No space left at one of the changes of files, or beyond a size of file: a line, no leftovers, and it goes on."""
    changes = [number for number, line in enumerate(named.whole.events[0]) if not line.startswith('update')]
    for part in range(8):
        number = changes[part * (len(changes) - 1) // 7]
        job = named.job(f'full disk {part}')

        def no_space():
            raise OSError(28, os.strerror(28), 'somewhere')
        ended = finish(job, trap=Trap(0, number, no_space))
        event = named.whole.events[0][number]
        if 'curve.png' in event:             # a run does not end because of its figure
            wrong = told_and_finished(ended) or leftovers(job.out) or difference(job, named.whole.made)
        else:
            wrong = refused(ended) or leftovers(job.out) or named.goes_on(job)
        yield f'no space before "{event}"', wrong

    # A limit on the size of files cuts a write in two, as a full disk does.
    for kind in ('OPRD', 'bridge', 'evaluation'):
        make_shared(kind, named.shared)
        whole = reference_of(named.job(f'full disk, whole {kind}', kind))
        largest = max(path.stat().st_size for path in files_below(named.job(f'full disk, whole {kind}', kind).out))
        for size in (largest // 2, 4000):                      # what is printed goes to a file, of less than 4000 bytes
            job = named.job(f'full disk {kind} {size}', kind)
            ended = finish(job, prepare=limit_files(size))
            wrong = refused(ended) or leftovers(job.out) or named.goes_on(job, whole=whole)
            yield f'{kind}: no file beyond {size} bytes', wrong


def told_and_finished(ended):
    """'' if the run said in a line that it could not draw its figure, and went on to its end."""
    if ended.code != 0 or ended.out.count('curve.png could not be drawn') != 1:
        return f'exit code {ended.code}, {ended.out.count("could not be drawn")} lines about the figure'
    return ''


def limit_files(size):
    """A function that forbids its process files beyond this size."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def copied_folder(named):
    """A run folder copied to somewhere else, in the ways in which links are lost: it goes on after step 4."""
    def follow(path, target):
        shutil.copytree(target, path)

    def forget(path, target):
        pass

    def write(path, target):
        path.write_text(os.path.relpath(target, path.parent))
    for what, replace in (('links became folders', follow), ('links are missing', forget),
                          ('links became text files', write)):
        job = named.copy(f'copied, {what}')
        for path in list(job.out.iterdir()):
            if path.is_symlink():
                target = path.resolve()
                path.unlink()
                replace(path, target)
        yield what, named.goes_on(job, least=4)


def two_starts(named):
    """The second start in one folder ends with a line, and the first goes on undisturbed."""
    for kind in ('OPRD', 'bridge', 'evaluation'):
        make_shared(kind, named.shared)
        whole = reference_of(named.job(f'two starts, whole {kind}', kind))
        job = named.job(f'two starts {kind}', kind)
        gate = SCRATCH.path / f'gate {kind}'

        # The first waits in the middle of its work until the gate is there.
        def pause(gate=gate):
            for _ in range(LIMIT * 50):
                if not gate.exists():
                    time.sleep(0.01)
        middle = [number for number, line in enumerate(whole.events[0]) if line.startswith(('update begins', 'row'))]
        first = Processes(job, trap=Trap(0, middle[len(middle) // 2], pause))
        events = first.notes / 'events-0'
        while not first.poll() and len(events.read_text().splitlines() if events.exists() else '') <= first.trap.event:
            first.sleep(0.05)
        second = finish(job)
        gate.touch()
        ended = first.wait()
        wrong = refused(second) and f'second: {refused(second)}'
        if ended.code or ended.late:
            wrong = wrong or f'first: {ended.code} {ended.err.strip()[-120:]}'
        yield kind, wrong or difference(job, whole.made)


def slurm_without_torchrun(named):
    """Two tasks of Slurm that do not know of each other: a line that names torchrun, and nothing is made."""
    job = named.job('slurm')
    tasks = {'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'SLURM_JOB_ID': '1'}
    ended = finish(job, prepare=lambda: os.environ.update(tasks))
    wrong = refused(ended)
    if not wrong and 'torchrun' not in ended.err:
        wrong = f'does not name torchrun: {ended.err.strip()}'
    if not wrong and job.out.exists():
        wrong = 'the folder was made'
    yield 'SLURM_NTASKS=2', wrong


def bad_weights(named):
    """Weights that are no numbers after an update: a line, and the good checkpoint stays and can be gone on from."""
    unused = 3                   # the row of <unk>, which is in no text, so no loss and no gradient sees it
    cases = (('the embeddings, before a save', 4, slice(None)), ('an unused embedding, before a save', 4, unused),
             ('an unused embedding, in the last update', STEPS, unused), ('the embeddings, between saves', 3, slice(None)))
    for what, update, rows in cases:
        job = named.job(f'weights, {what}')

        def poison(update=update, rows=rows):
            calls = []

            def after(optimizer, *_):
                calls.append(1)
                if len(calls) == update:
                    with torch.no_grad():
                        optimizer.param_groups[0]['params'][0][rows] = float('nan')
            register_optimizer_step_post_hook(after)
        ended = finish(job, prepare=poison)
        least = (update - 1) // SAVE_EVERY * SAVE_EVERY
        yield what, refused(ended) or named.goes_on(job, least=least)


def clock_set_back(named):
    """The clock is set back a day, between two starts and within one: no time in the log runs backward."""
    job = named.copy('clock')
    real = time.time
    calls = []

    def ticking():
        calls.append(1)
        return real() - 86400 * (1 + len(calls) // 4)
    ended = finish(job, prepare=lambda: setattr(time, 'time', ticking))
    wrong = difference(job, named.whole.made) if ended.code == 0 else f'exit code {ended.code} {ended.err[-120:]}'
    if not wrong:
        seconds = [json.loads(line)['elapsed'] for line in (job.out / 'log.jsonl').read_text().splitlines()]
        if seconds != sorted(seconds) or seconds[0] < 0:
            wrong = f'elapsed: {[round(second) for second in seconds]}'
        if json.loads((job.out / 'results.json').read_text())['seconds'] < 0:
            wrong = wrong or 'negative seconds in results.json'
    yield 'time.time() goes back', wrong


def foreign_files(named):
    """Files of somebody else that are called like checkpoints: never deleted; where there is no run, the folder is
    refused."""
    def put(folder):
        for name in ('ckpt-best/weights.bin', 'ckpt-000001/notes.txt', 'ckpt-notes.txt', '.ckpt-000003.txt'):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text('mine')

    def lost(folder):
        count = sum(path.read_text() == 'mine' for path in folder.rglob('*') if path.suffix in ('.txt', '.bin'))
        return '' if count == 4 else f'{4 - count} of 4 files were deleted'
    job = named.job('foreign')
    put(job.out)
    wrong = lost(job.out) if finish(job).late == '' else 'hangs'
    yield 'a folder that is no run: nothing is deleted', wrong
    shutil.rmtree(job.out)
    put(job.out)
    yield 'a folder that is no run: refused', refused(finish(job))
    job = named.copy('foreign in a run')
    put(job.out)
    yield 'in a run folder', named.goes_on(job, least=4) or lost(job.out)


def empty_out_dir(named):
    """out_dir= without a folder must not write into the current one."""
    job = named.job('empty', out_dir='')
    ended = finish(job._replace(out=job.cwd))
    made = sorted(path.name for path in job.cwd.iterdir())
    yield 'out_dir=', refused(ended) or (f'made {made}' if made else '')


def remains_of_a_kill(named):
    """Temporary files and folders of killed writes are swept when the run goes on."""
    job = named.copy('remains')
    for name in ('.ckpt-000006.tmp77/model/model.safetensors', '.log.jsonl.tmp77', '.results.json.tmp77'):
        (job.out / name).parent.mkdir(parents=True, exist_ok=True)
        (job.out / name).write_text('half')
    (job.out / '.last.tmp77').symlink_to('ckpt-000006/model')
    yield 'temporary files of a killed process', named.goes_on(job, least=4) or leftovers(job.out)


# ---- cases under torchrun ----------------------------------------------------------------------------------

def stat_of(pid):
    """(state, parent) of a process; ('', 0) when it is gone."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return '', 0
    return ('' if fields[0] == 'Z' else fields[0]), int(fields[1])


class Torchrun:
    """A run on two ranks, started by the real torchrun. `ranks`: their process ids, when `wait_for_last` returns."""
    def __init__(self, job):
        self.job = job
        job.cwd.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                   ROOT / f'{job.script}.py', *job.arguments]
        self.output = (job.cwd / 'output').open('w')
        self.process = subprocess.Popen(list(map(str, command)), cwd=job.cwd, start_new_session=True,
                                        stdout=self.output, stderr=self.output)
        self.ranks = []

    def wait_for_last(self):
        """Wait until there is a checkpoint; then the ranks are known -> is there one?"""
        end = time.monotonic() + LIMIT
        while not (self.job.out / 'last').exists():
            if time.monotonic() > end or self.process.poll() is not None:
                return False
            time.sleep(0.01)
        pids = [int(path.name) for path in Path('/proc').iterdir() if path.name.isdigit()]
        self.ranks = sorted(pid for pid in pids if stat_of(pid)[1] == self.process.pid)
        return len(self.ranks) == 2

    def alive(self, seconds):
        """Wait so long for the ranks to end -> those that still run."""
        end = time.monotonic() + seconds
        while any(stat_of(pid)[0] for pid in self.ranks) and time.monotonic() < end:
            time.sleep(0.05)
        return [pid for pid in self.ranks if stat_of(pid)[0]]

    def close(self):
        """End whatever is left of it."""
        for pid in [self.process.pid, *self.alive(0)]:
            if stat_of(pid)[0]:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()


def broken_torchrun(named, name, hit):
    """Start two ranks, wait for the first checkpoint, hit(run) -> what is wrong or ''. Then the same goes on."""
    whole = reference_of(named.job(f'{name}, whole', steps=40), ranks=2)
    job = named.job(name, steps=40)
    run = Torchrun(job)
    try:
        wrong = '' if run.wait_for_last() else f'no checkpoint: {(job.cwd / "output").read_text()[-160:]}'
        wrong = wrong or hit(run)
    finally:
        run.close()
    return wrong or named.goes_on(job, ranks=2, whole=whole, least=2)


def dead_rank(named):
    """One of two ranks is killed: the other one ends, and so does torchrun."""
    def hit(run):
        os.kill(run.ranks[1], signal.SIGKILL)
        try:
            code = run.process.wait(PATIENCE * 4)
        except subprocess.TimeoutExpired:
            return 'torchrun still runs'
        alive = run.alive(PATIENCE)
        return f'ranks {alive} still run' if alive else '' if code else 'torchrun ended with exit code 0'
    yield 'kill -9 of one of two ranks', broken_torchrun(named, 'dead rank', hit)


def killed_launcher(named):
    """torchrun itself is killed: its ranks end within seconds, and log nothing more."""
    def hit(run):
        os.kill(run.process.pid, signal.SIGKILL)
        alive = run.alive(PATIENCE)
        return f'{len(alive)} ranks still run {PATIENCE} s later' if alive else ''
    yield 'kill -9 of torchrun', broken_torchrun(named, 'killed launcher', hit)


CASES = {
    'full disk': full_disk,
    'copied folder': copied_folder,
    'two starts': two_starts,
    'slurm': slurm_without_torchrun,
    'bad weights': bad_weights,
    'clock': clock_set_back,
    'foreign files': foreign_files,
    'empty out_dir': empty_out_dir,
    'remains of a kill': remains_of_a_kill,
    'dead rank': dead_rank,
    'killed launcher': killed_launcher,
}


# ---- tables ----------------------------------------------------------------------------------------------

def show(number, columns, widths, verdict):
    """Print a line of a table."""
    cells = [str(column).ljust(width) for column, width in zip(columns, widths, strict=True)]
    print(f'{number:>4}  {"  ".join(cells)}  {verdict}', flush=True)


def said(wrong):
    """The last column of a case."""
    return f'WRONG: {wrong}' if wrong else 'ok'


def numbered_cases(cases, options):
    """Run the cases of `signals` or `files`, a line each -> how many went wrong."""
    numbers = [int(number) for number in options.only] or range(options.count)
    failed = []
    show('case', cases.titles, cases.widths, '')
    for number in numbers:
        columns, wrong = cases.case(options.seed, number)
        show(number, columns, cases.widths, said(wrong))
        if wrong:
            failed.append(number)
    cases.summary()
    print(f'\n{len(numbers)} cases, {len(failed)} wrong')
    if failed:
        scenes = f' --scenes {" ".join(options.scenes)}' if options.scenes else ''
        print(f'again: python tests/breaking.py {options.what} {options.count} --seed {options.seed}{scenes} --only '
              + ' '.join(map(str, failed)))
    return len(failed)


def named_cases(options):
    """Run the cases with a name, a line each -> how many went wrong."""
    named = Named()
    results = []
    for name, case in CASES.items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        for what, wrong in case(named):
            show('', [name, what], (17, 54), said(wrong))
            results.append(wrong)
    failed = sum(map(bool, results))
    print(f'\n{len(results)} cases, {failed} wrong')
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('signals', 'files', 'cases'))
    parser.add_argument('count', nargs='?', type=int, default=60, help='how many of signals or files')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', nargs='+', default=[], help='numbers of signals or files, beginnings of names of cases')
    parser.add_argument('--scenes', nargs='+', default=[], choices=list(SCENES), help='of files; default: all')
    options = parser.parse_args()

    # A process that has started threads cannot be forked safely. A terminated one cleans up.
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with SCRATCH:
        if options.what == 'cases':
            failed = named_cases(options)
        else:
            cases = Killed() if options.what == 'signals' else Damaged(options.scenes or SCENES)
            failed = numbered_cases(cases, options)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
