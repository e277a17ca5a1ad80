"""
Does a model's answer equal the known one? `grade(text, answer)`, or `judge` for the reasons too.

    judge('... so \\boxed{\\frac12}', '0.5') -> Judgement('\\frac12', True, 'exact')

Two parts decide. The exact part (exact.py) knows numbers, choices and lists of these. What it cannot
decide goes to math-verify, the library of the field. Model output is hostile, so math-verify runs in a
child process (child.py) that has limits of time and memory, and that is killed and started again when
it takes too long. The child starts when it is first needed, which takes about two seconds. A process
keeps one child, so each rank of torchrun has its own.

`decided_by` says how a verdict was reached:
    'exact'         the exact part
    'math-verify'   math-verify, in the child
    'text'          it is too long to be read or ambiguous (`2 3`, `x2`): equal only if spelled alike
    'no box'        the text gives no answer
    'timeout'       math-verify took more than SECONDS, so the answers do not count as equal
    'crash'         the child ended without a verdict, so the answers do not count as equal

It looks at the last box of a text alone, and it does not judge how the answer was found.
"""
import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from grading.exact import boxed, decide, tidy

TAIL = 300_000                  # characters at the end of a text in which its last box is looked for
LIMIT = 400                     # characters of an answer that is read; longer ones are compared as text
SECONDS = 3                     # processor time that math-verify may take for one comparison
WALL_SECONDS = 5                # the same by the clock, for a machine that is busy with other things
START_SECONDS = 120             # by the clock, for importing SymPy from a slow disk
MEMORY = 2**30                  # bytes of address space of the child
REMEMBERED = 20_000             # comparisons whose verdicts are kept: answers repeat

# What no reader of mathematics should guess at: two numbers side by side, a letter before a digit (is x2
# meant as 2x, x^2 or x_2?), an equation with a number in its middle (x = 7 = 5), an ellipsis, and characters
# that do not occur in formulas.
AMBIGUOUS = re.compile(r'(?<![_^\d.])\d[\d.]* \d|(?<![\\a-zA-Z])[a-zA-Z]\d|= ?-?[\d.]+ ?=|dots|\.\.'
                       r'|["`#$@]|__|\d\'')


class Judgement(NamedTuple):
    """What `judge` finds out about one text."""
    extracted: str | None           # the answer that the text gives
    correct: bool
    decided_by: str                 # see the header


# ---- the child process -----------------------------------------------------------------------------

class Child:
    """math-verify in a process of its own; `process` is None before it starts and after it was stopped."""
    def __init__(self):
        self.process = None
        atexit.register(self.stop)

    def start(self):
        """Start the child and wait until it has imported math-verify."""
        command = [sys.executable, '-P', str(Path(__file__).with_name('child.py')), str(SECONDS), str(MEMORY)]
        # It sees no GPU. In a session of its own it does not get our Ctrl-C: it ends when its pipe is closed.
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True,
                                        env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})
        line, _ = self.reply(START_SECONDS)
        problem = json.loads(line) if line else 'its process did not start'
        if problem is not None:
            # Imported only now, because it imports torch, which grading itself does not need.
            from support.runtime import UserError
            self.stop()
            raise UserError(f'grading: math-verify cannot be used ({problem}); pip install math-verify')

    def stop(self):
        """End the child, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def reply(self, seconds):
        """The next line from the child, or '' if it ends or `seconds` pass -> (line, did the time pass)."""
        output = self.process.stdout.fileno()
        deadline = time.monotonic() + seconds
        line = b''
        while not line.endswith(b'\n'):
            ready, _, _ = select.select([output], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                return '', True
            piece = os.read(output, 4096)
            if not piece:
                return '', False
            line += piece
        return line.decode(), False

    def compare(self, answer, found):
        """Are two answers equal to math-verify? -> (verdict, decided_by)."""
        if self.process is not None and self.process.poll() is not None:
            self.stop()                                             # somebody else has killed it
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([answer, found]).encode() + b'\n')
            line, late = self.reply(WALL_SECONDS)
        except BrokenPipeError:
            line, late = '', False
        if line:
            verdict, worn = json.loads(line)
            if worn:
                self.stop()
            return verdict, 'math-verify'
        if not late:
            late = self.process.wait() == -signal.SIGXCPU           # the kernel's limit came first
        self.stop()
        return False, 'timeout' if late else 'crash'


child = Child()


# ---- grading -----------------------------------------------------------------------------------------

def extract(text):
    """The answer a text gives: its last box, or else a last line `Answer: ...`, as DAPO asks for; or None."""
    found = boxed(text[-TAIL:])
    if found is None:
        last_line = text[-300:].strip().split('\n')[-1].strip()
        answer_line = re.fullmatch(r'\W{0,4}answer\W{0,4}:(.*)', last_line, re.IGNORECASE)
        found = answer_line[1].strip('*_ ') if answer_line else None
    return found


@lru_cache(REMEMBERED)
def compare(found, answer):
    """Do two answers mean the same? -> (verdict, decided_by)."""
    if max(len(found), len(answer)) > LIMIT:
        return found.strip() == answer.strip(), 'text'
    found = tidy(found)
    answer = tidy(answer)
    verdict = decide(found, answer)
    if verdict is not None:
        return verdict, 'exact'
    if AMBIGUOUS.search(found) or AMBIGUOUS.search(answer):
        return False, 'text'
    return child.compare(answer, found)


def equal(found, answer):
    """Do two answers mean the same?"""
    return compare(found, answer)[0]


def judge(text, answer):
    """Does the text give the answer, and who says so? answer: itself, or a solution that ends in a box."""
    found = extract(text)
    if found is None:
        return Judgement(None, False, 'no box')
    return Judgement(found, *compare(found, boxed(answer[-TAIL:]) or answer))


def grade(text, answer):
    """Does the text give the answer?"""
    return judge(text, answer).correct
