"""
Problem sets: files, folders and hub data sets become questions, answers and prompts; and the order in which
the prompts of a training run are asked.

    problems = load_problems('BytedTsinghua-SIA/DAPO-Math-17k', tokenizer, longest=1024)

Simpler than a data loader: all problems are read into memory once, and which of them a step asks is a
function of (seed, step) alone, so there is no state to save. It does not stream, and it does not mix
several training sets. Questions and answers are data: nothing in them is run or evaluated. What a row may
hold is checked for every row, because files are downloaded or written by hand:

    question    a text, or a list of messages, each an object whose role and content are texts
    answer      a text, a whole number or a finite number, or none; a list, an object or true is an error
    any text    at most LONGEST_TEXT characters, all of which UTF-8 can write
"""
import codecs
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from formats.hub import snapshot
from support.files import read_json
from support.runtime import UserError, cut, print0, shown

# The names of the columns that are read, in the order in which they are looked for.
QUESTION_KEYS = ('prompt', 'question', 'problem')
ANSWER_KEYS = ('answer', 'reward_model', 'solution')

LONGEST_TEXT = 1_000_000        # characters of a question or an answer: a few hundred pages
PIECE = 1000                    # prompts that are rendered together

# Words in a file's path that say it is held out; such files are never read for training.
HELD_OUT_WORDS = {'test', 'validation', 'valid', 'val', 'dev', 'eval'}


@dataclass(frozen=True)
class Problem:
    """A question, its known answer if there is one, and the prompt that asks it."""
    question: str | list        # a text, or messages
    answer: str | None          # what the last box should hold, or a solution that ends in a box
    ids: list[int]              # the prompt, chat-rendered


# ---- files to rows -------------------------------------------------------------------------------

def problem_files(source, split):
    """A file, a folder or a hub data set (owner/name) -> its data files of one split ('train' or 'test').

    Files with the word `split` in their path, if there are any. Otherwise all files, except that 'train'
    never takes a file whose path says that it is held out.
    """
    if Path(source).is_file():
        return [Path(source)]
    folder = snapshot(source, dataset=True)
    for ending in ('parquet', 'jsonl', 'json'):
        of_split = []
        others = []
        for file in sorted(folder.rglob(f'*.{ending}')):
            # Whole words: `constrained.jsonl` does not hold the word `train`.
            words = set(re.split(r'[^a-z]+', str(file.relative_to(folder)).lower()))
            if split in words:
                of_split.append(file)
            elif split != 'train' or not words & HELD_OUT_WORDS:
                others.append(file)
        if of_split or others:
            return of_split or others
    raise UserError(f'{source}: no .parquet, .jsonl or .json file in it for {split}; name one file')


def numbered_rows(file):
    """The rows of a data file -> (where, row) one by one; `where` is file and row, for error messages."""
    if file.suffix == '.parquet':
        yield from parquet_rows(file)
    elif file.suffix == '.json':
        for number, row in enumerate(read_json(file, list), 1):
            yield f'{file}, row {number}', row
    elif file.suffix in ('.jsonl', '.txt'):
        yield from line_rows(file)
    else:
        raise UserError(f'{file}: problems come as .parquet, .jsonl, .json or .txt')


def parquet_rows(file):
    """(where, row) of a parquet file. Only the columns that are needed are read, a batch at a time."""
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name in QUESTION_KEYS + ANSWER_KEYS]
        if len(set(columns)) < len(columns):
            raise UserError(f'{file}: two of its columns have one name ({", ".join(columns)}); rename one')
        number = 0
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f'{file}, row {number}', row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two: texts that are not UTF-8, and dates that Python does not have.
        message = cut(str(error).partition('\n')[0], 100)
        raise UserError(f'{file}: not a whole parquet file ({message}); fetch it again') from None


def line_rows(file):
    """(where, row) of a .jsonl file, or of a .txt file, in which each line is a question."""
    # Windows writes a mark in front of the file and a carriage return at the end of each line.
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)

    # Split at newlines only: str.splitlines would also split at U+2028, which JSON texts may hold.
    for number, line in enumerate(content.split(b'\n'), 1):
        line = line.removesuffix(b'\r')
        if not line.strip():
            continue
        try:
            row = {'question': line.decode()} if file.suffix == '.txt' else json.loads(line.decode())
        except (ValueError, RecursionError) as error:        # not UTF-8 is a ValueError as well
            message = cut(str(error), 100)
            raise UserError(f'{file}:{number}: {message}; fix the line or delete it') from None
        yield f'{file}:{number}', row


# ---- rows to problems ----------------------------------------------------------------------------

def question_and_answer(row, where):
    """One row of the layouts that people have -> (question, answer or None).

    Question: `prompt` (messages as verl has them, or a text), `question` or `problem`.
    Answer: `answer`, `reward_model.ground_truth` or `solution`.
    """
    if not isinstance(row, dict):
        raise UserError(f'{where}: a {type(row).__name__}, not a row with names')
    question = next((row[key] for key in QUESTION_KEYS if row.get(key)), None)
    if is_conversation(question):
        question = [{'role': message['role'], 'content': message['content']} for message in question]
        texts = [text for message in question for text in message.values()]
    elif isinstance(question, str):
        texts = [question]
    else:
        raise UserError(f'{where}: no question; wants {" or ".join(QUESTION_KEYS)}, '
                        'a text or [{role, content}]')

    # verl keeps the answer one level deeper: {'reward_model': {'ground_truth': '7'}}.
    reward = row.get('reward_model')
    if isinstance(reward, dict):
        row = row | {'reward_model': reward.get('ground_truth')}
    answer = next((row[key] for key in ANSWER_KEYS if row.get(key) is not None), None)
    if answer is not None:
        answer = answer_text(answer, where)
        texts.append(answer)
    for text in texts:
        check_text(text, where)
    return question, None if answer is None else final_answer(answer)


def is_conversation(question):
    """Is it a list of messages, each with a role and a content that are texts?"""
    if not isinstance(question, list) or not question:
        return False
    for message in question:
        if not isinstance(message, dict):
            return False
        if not isinstance(message.get('role'), str) or not isinstance(message.get('content'), str):
            return False
    return True


def answer_text(answer, where):
    """A known answer as text; a UserError if it is neither a text nor a number. The text of a list,
    "['7']", would be an answer that no model can ever give."""
    is_number = type(answer) is int or (type(answer) is float and math.isfinite(answer))
    if not is_number and not isinstance(answer, str):
        raise UserError(f'{where}: the answer {shown(answer)} is of type {type(answer).__name__}; '
                        'wants a text or a number')
    return str(answer)


def check_text(text, where):
    """A text that is endless, or that no tokenizer can read, is a UserError."""
    if len(text) > LONGEST_TEXT:
        raise UserError(f'{where}: a text of {len(text)} characters, {shown(text)}; at most {LONGEST_TEXT} '
                        'are read, so delete the row')
    half = re.search('[\ud800-\udfff]', text)
    if half:
        raise UserError(f'{where}: holds {shown(half[0])}, half of a character; delete it')


def final_answer(answer):
    """What to grade by: of GSM8K's '5 + 2 = 7 apples\\n#### 7' it is '7', and other answers stay as they are.

    A solution with a box is left alone: the grader reads its box, and '####' can be a heading in it.
    """
    if '####' not in answer or '\\boxed' in answer:
        return answer
    return answer.rpartition('####')[2].strip()


def load_problems(source, tokenizer, first=0, longest=0, split='train', suffix=''):
    """Problems of a file, folder or hub data set -> [Problem], each question once.

    first: take so many; 0 = all. longest: prompts of more tokens are left out; 0 = no limit. suffix: added
    to questions that are texts. How many were repeated or left out is printed. Raises UserError with
    file and row.
    """
    problems = []
    seen = set()
    counts = {'rows': 0, 'long': 0}
    rows = rows_of_files(problem_files(source, split))
    questions = new_questions(rows, suffix, seen, counts)
    while not first or len(problems) < first:
        # Read as many questions as are still missing, and no further.
        missing = first - len(problems) if first else PIECE
        piece = list(islice(questions, min(missing, PIECE)))
        if not piece:
            break

        # Their prompts are rendered together, because each request to the renderer takes time.
        origins = [where for where, _, _ in piece]
        prompts = tokenizer.chat_all([question for _, question, _ in piece], origins)
        for (where, question, answer), ids in zip(piece, prompts, strict=True):
            if not ids:
                raise UserError(f'{where}: the prompt renders to no token; fix it or the template')
            if longest and len(ids) > longest:
                counts['long'] += 1
            else:
                problems.append(Problem(question, answer, ids))

    repeated = counts['rows'] - len(seen)
    if repeated or counts['long']:
        print0(f"  {source}: {counts['rows']} rows, {repeated} of them repeated, {counts['long']} prompts "
               f'longer than {longest} tokens; {len(problems)} problems left')
    if not problems:
        raise UserError(f'{source}: no problems in it')
    return problems


def new_questions(rows, suffix, seen, counts):
    """(where, question, answer) of the rows whose question is not in `seen`, one by one. Public sets repeat
    questions (DAPO-Math-17k a hundred times each): the first counts. suffix: added to texts."""
    for where, row in rows:
        question, answer = question_and_answer(row, where)
        counts['rows'] += 1
        key = json.dumps(question)
        if key not in seen:
            seen.add(key)
            if isinstance(question, str):
                question += suffix
            yield where, question, answer


def rows_of_files(files):
    """The rows of several files, one file after the other."""
    for file in files:
        yield from numbered_rows(file)


# ---- the order of training -----------------------------------------------------------------------

def prompt_order(total, per_step, step, seed):
    """Indices, of `total` problems, of the prompts of a step (1, 2, ...): shuffled anew each epoch, every
    problem once an epoch. A function of its arguments alone, so resuming needs no saved state."""
    indices = []
    for draw in range((step - 1) * per_step, step * per_step):
        epoch = draw // total
        indices.append(permutation(total, seed, epoch)[draw % total])
    return indices


@lru_cache(maxsize=2)                        # a step may reach from one epoch into the next
def permutation(total, seed, epoch):
    """The order of the problems in one epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(total, generator=generator).tolist()
