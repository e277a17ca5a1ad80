"""
The processes that a study starts: what they say is kept, and shown when one fails.

    code = run_logged(['distill.py', 'configs/toy.py'], Path('out/toy.log'), OMP_NUM_THREADS='1')
    if code != 0:
        last_line = show_failure('out/toy', log_text('out/toy.log'))

A log grows while its process runs (`tail -f out/toy.log`), and a process that is started again goes on in it.
Simpler than a scheduler: a log is a file beside the run's folder, and Ctrl-C reaches all processes of a
terminal by itself. What it does not do: start anything on another machine.
"""
import os
import shlex
import subprocess
import sys

from support.runtime import ROOT, printable

SHOWN_LINES = 12                # of a failed process
SHOWN_BYTES = 100_000           # where these lines are looked for, from the end of a log


def run_logged(command, log, **variables):
    """Run `python command` to its end -> exit code. All that it prints is appended to a log as it comes,
    after a line with the command itself. variables: of the environment."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *rest = map(str, command)
    with log.open('a') as file:
        print(f'$ python {shlex.join([script, *rest])}', file=file, flush=True)
        return subprocess.run([sys.executable, ROOT / script, *rest], env=os.environ | variables,
                              stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode


def log_text(log):
    """The end of a log, as far as it is of the last process that was started -> text."""
    with open(log, 'rb') as file:
        file.seek(max(0, os.path.getsize(log) - SHOWN_BYTES))
        text = file.read().decode(errors='replace')
    return f'\n{text}'.rpartition('\n$ python ')[2].partition('\n')[2]


def show_failure(name, text):
    """Show on standard error the last lines of what a failed process has printed -> the very last one."""
    lines = [line for line in printable(text).splitlines() if line.strip()][-SHOWN_LINES:]
    lines = lines or ['it ended without a word; out of memory?']
    print(f'\n{name} has failed; the last that it said:', file=sys.stderr)
    for line in lines:
        print(f'    {line[:200]}', file=sys.stderr, flush=True)
    return lines[-1]
