"""
The student's answers on disk. bridge.py samples them; here they are read and written.

    rollouts.jsonl      a first row that says how the answers were sampled, then a row for each answer, in the
                        order in which the problems are asked

Every row bears a checksum and is compared with what the command asks for, so that the answers of another
command are not taken for those that are there. Simpler than a database: all rows are read at once. What it
does not do: compare the answers with the student's weights, or lock the folder (support.files.owned).
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from formats.problems import prompt_order
from formats.tokenizer import shared_size, stop_set
from support.fields import Field, check_fields
from support.files import digest, whole
from support.jsonl import append_row, read_rows
from support.runtime import UserError

HEAD = {'made by': Field(str, 1, 100), 'date': Field(str, 10, 10)}       # what the first row may hold
DELETE = 'delete the file to sample anew'


class Answer(NamedTuple):
    """A row of rollouts.jsonl."""
    problem: int                # its number in the training problems
    ids: list                   # what the student sampled, the stop token included
    stopped: bool               # True: ended by a stop token; False: cut at max_new_tokens


@dataclass
class Collection:
    """What is asked of the student, and what an earlier run has collected."""
    file: Path                  # rollouts.jsonl
    head: dict                  # its first row: how the answers were sampled
    order: list                 # numbers of the problems, in the order in which they are asked
    draw: dict                  # how tokens are drawn: seed, temperature, ...
    stop: list                  # token ids that end an answer
    vocab: int                  # ids below it are written
    answers: list               # [Answer] that are there
    is_whole: bool              # does the file end in a whole line?

    def make_whole(self):
        """Write the file anew, unless it is there and ends in a whole line: a line that was cut off goes."""
        if self.is_whole:
            return
        with whole(self.file) as temporary, temporary.open('w') as lines:
            append_row(lines, self.head, crc=True)
            for answer in self.answers:
                append_row(lines, answer._asdict(), crc=True)

    def append(self, answers):
        """Add rows to the file."""
        with self.file.open('a') as lines:
            for answer in answers:
                append_row(lines, answer._asdict(), crc=True)


def open_collection(cfg, problems, tok_s, tok_t):
    """Look at rollouts.jsonl, and write nothing -> Collection. Answers that were sampled with other settings,
    or that are damaged, are a UserError."""
    file = Path(cfg['bridge']) / 'rollouts.jsonl'
    total = min(cfg['bridge_prompts'], len(problems))
    order = prompt_order(len(problems), total, 1, cfg['seed'])
    stop = stop_set(tok_s, tok_t)
    vocab = shared_size(tok_s, tok_t)

    # The first row says how the answers were sampled. Another first row is an error.
    draw = {key: cfg[key] for key in ('seed', 'temperature', 'top_k', 'top_p', 'max_new_tokens')}
    settings = {key: cfg[key] for key in ('student', 'data', 'max_prompt_tokens')}
    head = {'made by': digest(draw | settings | {'stop': stop, 'n': total}), 'date': cfg['date']}
    answers, is_whole = read_answers(file, head, order, stop, vocab, cfg['max_new_tokens'])
    return Collection(file, head, order, draw, stop, vocab, answers, is_whole)


def first_date(folder):
    """The date in the first row of a folder's rollouts.jsonl; '' if there is none."""
    file = Path(folder) / 'rollouts.jsonl'
    rows = read_rows(file, crc=True, advice=DELETE)
    if not rows:
        return ''
    return check_fields(rows[0], HEAD, f'{file}: the first row', DELETE)['date']


def read_answers(file, head, order, stop, vocab, max_new_tokens):
    """What an earlier run collected -> ([Answer], does the file end in a whole line?).

    head: the first row that is expected. order: the problems that are asked, in this order. stop: ids of
    which one ends an answer that did not reach max_new_tokens. All ids are below vocab.
    """
    rows = read_rows(file, crc=True, advice=DELETE)
    if not rows:
        return [], False
    if rows[0] != head:
        raise UserError(f'{file}: sampled with other settings; choose another bridge=, or delete it')

    # Each row must be the answer to the next problem of this seed's order.
    table = {'problem': Field(int, 0), 'stopped': Field(bool),
             'ids': Field(list, 1, max_new_tokens, items=Field(int, 0, vocab - 1))}
    answers = []
    for number, row in enumerate(rows[1:], 2):
        answer = Answer(**check_fields(row, table, f'{file}: line {number}', DELETE))
        ends_well = answer.ids[-1] in stop if answer.stopped else len(answer.ids) == max_new_tokens
        is_next = len(answers) < len(order) and answer.problem == order[len(answers)]
        if not (ends_well and is_next):
            raise UserError(f'{file}: line {number} is not the answer that belongs there; {DELETE}')
        answers.append(answer)
    return answers, file.read_bytes().endswith(b'\n')
