"""
What was answered in the evaluations of a run: written into its folder, and a few answers printed.

    out/answers/teacher.jsonl       the teacher, before the first step; others are teacher2.jsonl, ...
    out/answers/000000.jsonl        the student before the first step
    out/answers/000020.jsonl        the student after step 20, and so on

A line is one answer:

    {"set": "eval", "problem": 0, "sample": 0, "prompt": "1+2=", "text": "1+2=3;\\boxed{3}",
     "answer": "3", "extracted": "3", "correct": true, "length": 10, "stopped": true}

Texts have no special tokens (`<eos>` is the tenth token here). `answer` is the known answer, `extracted` the
one that the grader found in the text (null if there is none).
A file is written when its evaluation is finished, completely or not at all, so an evaluation that is
repeated after a resume replaces it. A token takes about four bytes, so the files are small beside the
checkpoints.

Simpler than eval_math.py's samples.jsonl (support/samples.py): these files are for people. No script reads
them again, so they have neither checksums nor token ids.
"""
import re
import shutil
import unicodedata

from support.files import sweep, whole
from support.jsonl import append_row
from support.runtime import cut, gather, print0, printable

NAMES = ('set', 'problem', 'sample', 'prompt', 'text', 'answer', 'extracted', 'correct', 'length', 'stopped')
WIDTH = 120                     # columns of a line where there is no terminal
SHORT = 30                      # columns of a label, an extracted answer, a known answer


# ---- on disk -------------------------------------------------------------------------------------

def keep_answers(out, side, step, rows, sets, show):
    """Write the answers of an evaluation into a run folder, and print a few. All ranks call it.

    side: 'student' after a step, or the name of a teacher. rows: this rank's answers, as
    eval_math.sample_and_grade returns them. sets: the labels of the sets, in order. show: how many are
    printed.
    """
    parts = gather(rows, f'the evaluation of the {side} after step {step}')
    if parts is None:                        # rank 0 has them all
        return

    # The ranks' answers in one order, which no number of ranks changes.
    number_of = {label: number for number, label in enumerate(sets)}
    rows = [row for part in parts for row in part]
    rows.sort(key=lambda row: (number_of[row['set']], row['problem'], row['sample']))
    name = side if side.startswith('teacher') else f'{step:06d}'
    with whole(out / 'answers' / f'{name}.jsonl') as temporary, temporary.open('w') as file:
        for row in rows:
            append_row(file, row)

    who = side if side.startswith('teacher') else f'step {step}'
    for row in chosen(rows, show):
        for line in answer_lines(row, who, shutil.get_terminal_size((WIDTH, 24)).columns):
            print0(line)


def forget_later(out, step):
    """Delete the answers of evaluations after a step, where a run goes on from that step: they are not in its
    log, and will be sampled again. What a killed process left half-written goes as well."""
    sweep(out / 'answers')
    for file in (out / 'answers').glob('*.jsonl'):
        if re.fullmatch(r'\d{6,12}', file.stem) and int(file.stem) > step:
            file.unlink()


# ---- on the terminal -----------------------------------------------------------------------------

def chosen(rows, count):
    """The first answers to so many problems, spread evenly over all sets -> rows. At each evaluation they are
    the same problems with the same random numbers, so one sees the student change."""
    first = [row for row in rows if row['sample'] == 0]
    count = min(count, len(first))
    return [first[number * len(first) // count] for number in range(count)]


def answer_lines(row, who, columns):
    """An answer as two lines of at most so many columns: who was asked what and whether the answer is right;
    and the text."""
    verdict = 'right' if row['correct'] else 'wrong'
    found = 'no answer' if row['extracted'] is None else fitted(row['extracted'], SHORT)
    known = fitted(row['answer'], SHORT)
    name = f"{fitted(row['set'], SHORT)} problem {row['problem']}"
    asked = f'  {who}, {name}: {verdict}, {found} (known: {known})'

    # The prompt fills the rest of the line if there is room for some of it.
    rest = columns - width_of(asked) - 3
    if rest >= SHORT:
        asked += f" | {fitted(row['prompt'], rest)}"
    return [asked, f"    {fitted(row['text'], max(SHORT, columns - 4))}"]


def fitted(text, columns):
    """A text on one line of at most so many columns: control characters become escapes, white space becomes
    one blank, and the middle is left out. Chinese and Japanese characters take two columns."""
    # What is far beyond any line is cut first, so that a long answer costs nothing.
    text = printable(cut(' '.join(text.split()), 4 * columns))
    length = columns
    while width_of(cut(text, length)) > columns:
        length -= 1
    return cut(text, length)


def width_of(text):
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(letter) in 'WF' else 1 for letter in text)
