"""
Does a model's answer equal the known one? `grade(text, answer)`, or `judge` for the reasons too.

    judge('... so \\boxed{\\frac12}', '0.5') -> Judgement('\\frac12', True, 'exact')

Two parts decide. The exact part (exact.py) knows numbers, choices and lists of these. What it cannot
decide goes to math-verify, the library of the field. Model output is hostile, so math-verify runs in a
child process (child.py) that has limits of time and memory (support/limited.py), and that is killed and
started again when it takes too long. The child starts when it is first needed, which takes about two
seconds. A process keeps one child, so each rank of torchrun has its own.

`decided_by` says how a verdict was reached:
    'exact'         the exact part
    'math-verify'   math-verify, in the child
    'text'          it is too long to be read or ambiguous (`2 3`, `x2`): equal only if spelled alike
    'no box'        the text gives no answer
    'timeout'       math-verify took more than SECONDS, so the answers do not count as equal
    'crash'         the child ended without a verdict, so the answers do not count as equal

It looks at the last box of a text alone, and it does not judge how the answer was found.
"""
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from grading.exact import boxed, decide, tidy
from support.limited import LimitedChild, Limits

TAIL = 300_000                  # characters at the end of a text in which its last box is looked for
LIMIT = 400                     # characters of an answer that is read; longer ones are compared as text
SECONDS = 3                     # processor time that math-verify may take for one comparison
WALL_SECONDS = 5                # the same by the clock, for a machine that is busy with other things
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

class Child(LimitedChild):
    """math-verify in a process of its own."""
    def __init__(self):
        super().__init__(Path(__file__).with_name('child.py'), 'grading', 'math-verify')

    def compare(self, answer, found):
        """Are two answers equal to math-verify? -> (verdict, decided_by)."""
        verdict, problem = self.ask([answer, found], Limits(SECONDS, WALL_SECONDS, MEMORY))
        if problem is not None:
            return False, problem
        return verdict, 'math-verify'


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
