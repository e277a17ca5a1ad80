"""
Problem sets: files, folders and hub data sets to questions, answers and prompts, and the order in
which they are asked.
"""
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from formats.huggingface import snapshot
from support.files import read_json
from support.runtime import UserError, print0


@dataclass(frozen=True)
class Problem:
    """A question, its known answer if there is one, and the prompt that asks it."""
    question: str | list        # a text, or messages
    answer: str | None          # what the last box should hold
    ids: list[int]              # the prompt, chat-rendered


def problem_files(source, split):
    """A file, a folder or a hub data set (owner/name) -> its data files: those with the word `split`
    in their path if there are any; else all, but for 'train' never what is named as held out."""
    if Path(source).is_file():
        return [Path(source)]
    folder = snapshot(source, dataset=True)
    for end in ('parquet', 'jsonl', 'json'):
        files = sorted(folder.rglob(f'*.{end}'))
        words = {f: set(re.split(r'[^a-z]+', str(f.relative_to(folder)).lower())) for f in files}
        fit = [f for f in files if split in words[f]]
        held = {'test', 'validation', 'valid', 'val', 'dev', 'eval'} if split == 'train' else set()
        fit = fit or [f for f in files if not words[f] & held]
        if fit:
            return fit
    raise UserError(f'{source}: no .parquet, .jsonl or .json file in it for {split}; name one file')


def rows_of(file):
    """Rows of a data file -> (place, dict) one by one. Raises UserError with file and row."""
    if file.suffix == '.parquet':
        try:
            table = pyarrow.parquet.ParquetFile(file)
            keep = [k for k in table.schema_arrow.names if k in QUESTION + ANSWER]
            rows = (row for part in table.iter_batches(columns=keep) for row in part.to_pylist())
            yield from ((f'{file}, row {i}', row) for i, row in enumerate(rows, 1))
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f'{file}: not a whole parquet file ({str(e).splitlines()[0]}); '
                            'fetch it again') from None
    elif file.suffix == '.json':
        yield from ((f'{file}, row {i}', row) for i, row in enumerate(read_json(file, list), 1))
    elif file.suffix in ('.jsonl', '.txt'):
        for i, line in enumerate(file.read_bytes().split(b'\n'), 1):
            if line.strip():
                try:                         # bytes: not UTF-8 is a ValueError as well
                    row = {'question': line.decode()} if file.suffix == '.txt' else json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise UserError(f'{file}:{i}: {e}; mend the line or delete it') from None
                yield f'{file}:{i}', row
    else:
        raise UserError(f'{file}: problems come as .parquet, .jsonl, .json or .txt')


QUESTION, ANSWER = ('prompt', 'question', 'problem'), ('answer', 'reward_model', 'solution')


def ask(row, place):
    """One row of the layouts people have -> (question, answer or None).

    Question: `prompt` (messages as verl has them, or a text), `question` or `problem`.
    Answer: `answer`, `reward_model.ground_truth` or `solution`.
    """
    if not isinstance(row, dict):
        raise UserError(f'{place}: a {type(row).__name__}, not a row with names')
    question = next((row[k] for k in QUESTION if row.get(k)), None)
    messages = isinstance(question, list) and all(
        isinstance(m, dict) and isinstance(m.get('content'), str) and 'role' in m for m in question)
    if not messages and not isinstance(question, str):
        raise UserError(f'{place}: no question; wants {" or ".join(QUESTION)}, a text or [{{role, content}}]')
    reward = row.get('reward_model')
    if isinstance(reward, dict):
        row = row | {'reward_model': reward.get('ground_truth')}
    answer = next((row[k] for k in ANSWER if row.get(k) is not None), None)
    return question, None if answer is None else str(answer)


def load_problems(source, tokenizer, first=0, longest=0, split='train', suffix=''):
    """Problems of a file, folder or hub data set -> [Problem], each question once.

    first: take so many; 0 = all. longest: prompts of more tokens are left out; 0 = none. suffix: added
    to questions that are texts. How many were repeated or left out is printed. Raises UserError with
    file and row.
    """
    problems, seen, rows, long = [], set(), 0, 0
    for place, row in (pair for file in problem_files(source, split) for pair in rows_of(file)):
        question, answer = ask(row, place)
        key, rows = json.dumps(question), rows + 1
        if key in seen:
            continue
        seen.add(key)
        if suffix and isinstance(question, str):
            question = question + suffix
        ids = tokenizer.chat(question)
        if not ids:
            raise UserError(f'{place}: the prompt renders to no token; mend it or the template')
        if longest and len(ids) > longest:
            long += 1
            continue
        problems.append(Problem(question, answer, ids))
        if len(problems) == first:
            break
    if rows > len(seen) or long:
        print0(f'  {source}: {rows} rows, {rows - len(seen)} of them repeated, {long} prompts longer than '
               f'{longest} tokens; {len(problems)} problems left')
    if not problems:
        raise UserError(f'{source}: no problems in it')
    return problems


def prompt_order(N, per_step, step, seed):
    """Indices of the prompts of a step (1, 2, ...): shuffled anew each epoch, every problem once an
    epoch. A function of its arguments alone, so resuming needs no saved state."""
    draws = range((step - 1) * per_step, step * per_step)
    return [permutation(N, seed, i // N)[i % N] for i in draws]


@lru_cache(maxsize=2)
def permutation(N, seed, epoch):
    g = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(N, generator=g).tolist()
