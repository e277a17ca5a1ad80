"""
Generated bad inputs for every script: what does a user see, how long does it take, and what is left behind?

    python tests/bad_inputs.py 1000               the first 1,000 cases of all kinds, and a table
    python tests/bad_inputs.py 1000 --show 137    case 137 alone: its command line, and what it printed
    python tests/bad_inputs.py 200 --kind weights the first 200 of one kind

A bad input must be refused: exit code 2 and one line of at most 300 characters on standard error, which begins with
`error: `. There must be no traceback, no control character on the terminal, no question to a hub about a path that looks
local, no file left behind, and no more than two seconds of processor time beyond the imports. Some inputs may be refused
or accepted; then an accepted one must run to its end. The inputs are made in bad_input_kinds.py, each from a good one; the
good ones are cases too, and must be accepted.

How it works: the modules of all scripts are imported once. Each case is a fork of this process, in a fresh folder with
copies of small models, problem sets, a bridge, a run and an evaluation. The fork executes the script's file as `__main__`.
A number names the same case on every machine, for one revision of the code. It needs Linux. What it does not do: several
ranks, signals, damage while a script runs.
"""
import argparse
import json
import os
import re
import resource
import runpy
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

# Before torch and the hub's library are imported. Forks need a process with one thread, and whatever a hub would be asked
# must be asked of the network, and not of a cache.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
os.environ['ARROW_DEFAULT_MEMORY_POOL'] = 'system'
os.environ['HF_HUB_OFFLINE'] = '0'

from bad_input_kinds import LINES, SECRET, TINY_TOY, Case, all_cases  # noqa: E402

LINE = 300                      # characters of an error line
WALL_SECONDS = 30              # of the wall clock: a process that waits for ever uses no processor time
MOST_MEMORY = 2**30             # bytes that a case may hold beyond what the imports hold
MOST_ADDRESSES = 3 * 2**30      # bytes that it may ask for; more is a MemoryError
MOST_BYTES = 2**28              # of a file that it writes

# What may not reach a terminal: control characters other than the ends of lines and tabs, marks of direction, lone
# surrogates (which Python writes as \udc80 where it can, and cannot encode elsewhere).
CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffd]')

# The columns of the table: a case is 'refused', 'fine' or has one or several of the faults below.
FAULTS = {
    'accepted': 'bad, and exit code 0',
    'traceback': 'a traceback, or an exit code other than 0 and 2',
    'hang': 'more processor time than is allowed, or killed for it',
    'memory': 'more memory than is allowed',
    'form': 'not one line that begins with `error: ` and has at most 300 characters',
    'files': 'refused, and a file or folder was left or changed',
    'control': 'a control character in the output',
    'network': 'a question to a hub about a path that looks local',
    'leak': 'a file from outside the folder was copied into the output',
    'wrong': 'a good input was refused, or the output holds what it must not hold',
}


@dataclass
class Outcome:
    """What one case did."""
    number: int
    kind: str
    what: str
    script: str
    code: int = 0
    seconds: float = 0.0
    memory: int = 0             # bytes beyond those that the imports hold
    faults: list = field(default_factory=list)
    sign: str = ''              # where the traceback came from, or the beginning of the error line
    out: str = ''
    err: str = ''
    left: list = field(default_factory=list)
    asked: str = ''             # what was asked of the network


# ---- the good material ------------------------------------------------------------------------

def make_good_files(base):
    """Models, problem sets, a bridge, runs and an evaluation, made by the scripts themselves in the folder `base`."""
    os.makedirs(base)

    # Two models of one width, and a teacher of another.
    for name, more in (('same', []), ('unlike', ['toy_teacher_layers=4', 'toy_teacher_width=32'])):
        must_run('studies/toy.py', ['configs/toy.py', *TINY_TOY, *more, f'toy_dir=made/{name}'], base)
    same, = (base / 'made/same').glob('seed*')
    unlike, = (base / 'made/unlike').glob('seed*')
    same.rename(base / 'toy')
    (unlike / 'teacher').rename(base / 'toy/other')
    shutil.rmtree(base / 'made')

    # A bridge, a finished run, and one that was stopped before it wrote its results. A study's runs are finished ones.
    must_run('bridge.py', LINES['bridge.py'], base)
    must_run('distill.py', [arg for arg in LINES['distill.py'] if arg != '--dry-run'] + ['out_dir=done'], base)
    shutil.copytree(base / 'done', base / 'run', symlinks=True)
    (base / 'run/results.json').unlink()
    must_run('eval_math.py', [arg for arg in LINES['eval_math.py'] if arg != '--dry-run'], base)
    (base / 'secret.txt').write_text(SECRET)


def must_run(script, args, folder):
    """Run a script with a good input in a folder; what it prints is shown if it fails."""
    child = os.fork()
    if child == 0:
        be_the_script(Case(script, args, 'good'), folder, folder / '.out', folder / '.err', folder / '.asked')
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        sys.exit(f'{script} {" ".join(args)} failed\n' + (folder / '.err').read_text())
    for name in ('.out', '.err', '.asked'):
        (folder / name).unlink(missing_ok=True)


def copy_good_files(base, folder):
    """A fresh copy. Weights are linked, because no script writes into them; other files may be appended to."""
    def copy(source, target):
        if source.endswith('.safetensors'):
            os.link(source, target)
        else:
            shutil.copy2(source, target)
    shutil.copytree(base, folder, symlinks=True, copy_function=copy)


# ---- one case ---------------------------------------------------------------------------------

def be_the_script(case, folder, out, err, asked):
    """In a fork: become `python script args` in a folder. Does not return."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)
        sys.stderr = open(2, 'w', encoding='utf-8', errors='backslashreplace', closefd=False)
        sys.argv = [case.script, *case.args]
        limit_this_process()
        watch_this_process(asked)
        runpy.run_path(str(ROOT / case.script), run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):        # what could not be written is a fault: no refusal ends with 1
            code = 1
        os._exit(code)


def limit_this_process():
    """Processor time, and on Linux memory: a case that would fill the machine fails instead."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))
    # The soft limit alone: the grader's process asks for more, and has limits of its own.
    resource.setrlimit(resource.RLIMIT_CPU, (20, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    if sys.platform == 'linux':
        pages = int(Path('/proc/self/statm').read_text().split()[0])
        most = pages * os.sysconf('SC_PAGE_SIZE') + MOST_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def watch_this_process(asked):
    """From now on this process cannot reach a network, and each try is a line of the file `asked`. A study that begins to
    start its runs was accepted: it ends there."""
    def hook(event, arguments):
        if event == 'subprocess.Popen' and any(str(word).endswith(('distill.py', 'bridge.py')) for word in arguments[1]):
            os._exit(0)
        wants = event == 'socket.getaddrinfo'
        if event == 'socket.connect':
            wants = isinstance(arguments[1], tuple)          # the address of a local socket is a text
        if wants:
            with open(asked, 'a') as file:
                file.write(f'{event} {arguments[1 if event == "socket.connect" else 0]}\n')
            raise OSError(101, 'Network is unreachable')
    sys.addaudithook(hook)


def run_case(number, case, base, scratch):
    """Make the input, run the script, look at what it did -> Outcome."""
    folder = scratch / f'case-{number:06d}'
    out, err, asked = (scratch / f'{number:06d}.{name}' for name in ('out', 'err', 'asked'))
    copy_good_files(base, folder)
    if case.change:
        case.change(folder)
    before = contents(folder)

    # The processor time is that of the script and of the processes that it waited for.
    held = memory_held()
    child = os.fork()
    if child == 0:
        be_the_script(case, folder, out, err, asked)
    code, seconds, memory = wait_for(child)
    outcome = Outcome(number, case.kind, case.what, case.script, code, round(seconds, 2), memory - held)
    outcome.out, outcome.err = (path.read_bytes().decode(errors='replace') for path in (out, err))
    outcome.asked = asked.read_text() if asked.exists() else ''
    outcome.left = difference(before, contents(folder))
    judge(case, outcome, folder)
    shutil.rmtree(folder)
    for path in (out, err, asked):
        path.unlink(missing_ok=True)
    return outcome


def wait_for(child):
    """Wait for a process, and end it if it takes too long -> (exit code, seconds of processor time, bytes of memory)."""
    began = time.monotonic()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() - began > WALL_SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)

    # What it started ends with it. Until it is waited for, its number belongs to no other process.
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    _, status, usage = os.wait4(child, 0)
    scale = 1 if sys.platform == 'darwin' else 1024
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale


def memory_held():
    """Bytes of memory that this process holds; 0 where the system does not say."""
    if sys.platform != 'linux':
        return 0
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def contents(folder):
    """{path: what shows that it was changed} of everything in a folder."""
    found = {}
    for path in folder.rglob('*'):
        info = path.lstat()
        name = str(path.relative_to(folder))
        found[name] = None if stat.S_ISDIR(info.st_mode) else (info.st_size, info.st_mtime_ns, info.st_ino)
    return found


def difference(before, after):
    """The paths that were made, changed or deleted."""
    return sorted(path for path in {*before, *after}
                  if path not in before or path not in after or before[path] != after[path])


def judge(case, outcome, folder):
    """Fill in the outcome's faults."""
    text = outcome.out + outcome.err
    faults = outcome.faults
    refused = outcome.code == 2
    killed = outcome.code in (-signal.SIGXCPU, -signal.SIGKILL)
    is_quick = refused or '--dry-run' in case.args       # training, if it was accepted, may take its time
    outcome.sign = sign_of(outcome)
    if killed or (is_quick and outcome.seconds > case.seconds):
        faults.append('hang')
    if outcome.memory > MOST_MEMORY:
        faults.append('memory')
    if not killed and (outcome.code not in (0, 2) or 'Traceback (most recent call last)' in text):
        faults.append('traceback')
    if outcome.code == 0 and case.expect == 'refused':
        faults.append('accepted')
    if refused and not is_one_line(outcome.err):
        faults.append('form')
    if refused and outcome.left:
        faults.append('files')
    if CONTROL.search(text) and not killed:
        faults.append('control')
    if outcome.asked and not case.hub:
        faults.append('network')
    if leaks(folder, outcome.left):
        faults.append('leak')
    if (refused and case.expect == 'fine') or (case.absent and case.absent in text):
        faults.append('wrong')


def is_one_line(err):
    """Is it one error line as the scripts promise?"""
    return bool(re.fullmatch('error: [^\n]+\n', err)) and len(err) <= LINE + 1


def sign_of(outcome):
    """What failures are grouped by: the error's type and the line of ours that it came from, or the error line."""
    lines = outcome.err.strip().splitlines()
    if 'Traceback' not in outcome.err:
        return lines[-1][:110] if lines else ''
    ours = re.findall(rf'File "{re.escape(str(ROOT))}/([^"]+)", line (\d+), in', outcome.err)
    where = ':'.join(ours[-1]) if ours else '?'
    kind = re.match(r'[\w.]+', lines[-1])
    return f'{kind[0] if kind else lines[-1][:40]} at {where}'


def leaks(folder, left):
    """Did the contents of a file outside a model folder get into what was written?"""
    for name in left:
        path = folder / name
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
            return True
    return False


# ---- all cases --------------------------------------------------------------------------------

def run_all(numbered, base, scratch, jobs):
    """Run (number, case) pairs in several processes -> [Outcome] in their order."""
    files = []
    workers = []
    for worker in range(jobs):
        files.append(scratch / f'outcomes-{worker}.jsonl')
        child = os.fork()
        if child == 0:
            work(numbered[worker::jobs], base, scratch, files[-1])
        workers.append(child)
    failed = [os.waitpid(child, 0)[1] for child in workers]
    if any(failed):
        sys.exit('a case could not be made; see above')
    outcomes = []
    for file in files:
        outcomes += [Outcome(**json.loads(line)) for line in file.read_text().splitlines()]
    return sorted(outcomes, key=lambda outcome: outcome.number)


def work(numbered, base, scratch, file):
    """In a fork: run these cases one after the other. Does not return."""
    code = 1
    try:
        with file.open('w') as lines:
            for number, case in numbered:
                try:
                    outcome = run_case(number, case, base, scratch)
                except Exception as error:
                    error.add_note(f'case {number}, {case.kind}: {case.what}')
                    raise
                lines.write(json.dumps(asdict(outcome)) + '\n')
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def import_all():
    """Everything that the scripts import, and what they import when it is first needed."""
    for name in ('distill', 'bridge', 'eval_math', 'minimal', 'studies.toy', 'studies.compare', 'studies.figures',
                 'studies.fixed_points', 'studies.bench', 'huggingface_hub', 'matplotlib'):
        __import__(name)
    import matplotlib
    matplotlib.use('Agg')
    from huggingface_hub import snapshot_download  # noqa: F401
    from matplotlib import pyplot  # noqa: F401


def table(outcomes):
    """A line for each kind, and a line for all -> lines."""
    columns = ['cases', 'refused', 'fine', *FAULTS]
    counts = {}
    for outcome in outcomes:
        for kind in (outcome.kind, 'all'):
            count = counts.setdefault(kind, Counter())
            count['cases'] += 1
            count.update(outcome.faults or ['refused' if outcome.code == 2 else 'fine'])
    counts['all'] = counts.pop('all')        # the last line
    lines = [f'{"kind":18}' + ''.join(f'{name:>10}' for name in columns)]
    for kind, count in counts.items():
        lines.append(f'{kind:18}' + ''.join(f'{count[name] or "-":>10}' for name in columns))
    return lines


def groups(outcomes):
    """The faults, those of one kind and origin together -> lines, the most frequent first."""
    found = {}
    for outcome in outcomes:
        for fault in outcome.faults:
            same = outcome.sign if fault == 'traceback' else outcome.what.split('=')[0][:60]
            found.setdefault((fault, outcome.kind, same), []).append(outcome)
    lines = []
    for (fault, kind, same), members in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        first = members[0]
        lines.append(f'{fault:10} {len(members):4} x {kind}: {same}   such as case {first.number}, '
                     f'{first.what[:70]!r}')
    return lines


def show(outcome, case):
    """Print one case in full."""
    line = ' '.join(map(ascii, case.args))
    print(f'case {outcome.number}, kind {case.kind}: {case.what!r}, expected: {case.expect}')
    print(f'  python {case.script} {line[:2000]}')
    print(f'  exit code {outcome.code}, {outcome.seconds} s, {outcome.memory / 2**20:.0f} MiB')
    print(f'  faults: {", ".join(outcome.faults) or "none"}')
    print(f'  left or changed: {outcome.left or "nothing"}')
    print(f'  asked of the network: {outcome.asked or "nothing"}')
    for name, text in (('output', outcome.out), ('error output', outcome.err)):
        print(f'  {name}, with what a terminal would obey escaped:')
        for line in text[:6000].split('\n'):
            print(f'    {ascii(line)[1:-1]}')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('count', type=int, help='how many cases; the kinds take turns')
    p.add_argument('--show', type=int, help='run this case alone, and show what it printed')
    p.add_argument('--kind', help='cases of this kind alone; the numbers stay the same')
    p.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes at once')
    p.add_argument('--json', help='write every outcome to this file, a line each')
    args = p.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='bad-inputs-') as scratch:
        scratch = Path(scratch).resolve()
        os.environ['HF_HOME'] = str(scratch / 'hub')         # before the hub's library is imported
        import_all()
        make_good_files(scratch / 'good')
        numbered = list(enumerate(all_cases()))
        print(f'{len(numbered)} cases in all; good files after {time.monotonic() - began:.0f} s', flush=True)
        if args.show is not None:
            outcome = run_case(*numbered[args.show], scratch / 'good', scratch)
            show(outcome, numbered[args.show][1])
            return bool(outcome.faults)
        chosen = [pair for pair in numbered if args.kind in (None, pair[1].kind)][:args.count]
        outcomes = run_all(chosen, scratch / 'good', scratch, args.jobs)
    print('\n'.join(table(outcomes)))
    print('\n'.join(groups(outcomes)))
    slowest = max(outcomes, key=lambda outcome: outcome.seconds * (outcome.code == 2))
    print(f'{time.monotonic() - began:.0f} s in all; the slowest that was refused took {slowest.seconds} s '
          f'(case {slowest.number})')
    if args.json:
        Path(args.json).write_text(''.join(json.dumps(asdict(outcome)) + '\n' for outcome in outcomes))
    return any(outcome.faults for outcome in outcomes)


if __name__ == '__main__':
    sys.exit(main())
