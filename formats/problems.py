"""
Problem sets: files, folders and hub data sets become questions, answers and prompts; and the order in which
the prompts of a training run are asked.

    problems = load_problems('BytedTsinghua-SIA/DAPO-Math-17k', tokenizer, longest=1024)

Simpler than a data loader: all problems are read into memory once, and which of them a step asks is a
function of (seed, step) alone, so there is no state to save. It does not stream, and it does not weigh
several training sets against each other. Questions and answers are data: nothing in them is run or
evaluated. formats/rows.py reads the files and names the columns; docs/data.md shows the layouts. What a row
may hold is checked for every row, because files are downloaded or written by hand:

    question    a text, or a list of messages, each an object whose role is one of SPEAKERS and whose content
                is a text
    answer      a text, a whole number or a finite number, or none; a list, an object or true is an error
    solution    the longest text among the columns of answers, or none
    teacher     anything: it is looked at only if it says who teaches (extensions/several_teachers.py)
    any text    at most LONGEST_TEXT characters, all of which UTF-8 can write
"""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch

from formats.hub import snapshot
from formats.rows import ANSWER_COLUMNS, LONGEST_TEXT, QUESTION_COLUMNS, READERS, ending_of, rows_of
from support.runtime import UserError, print0, shown

# The instruction that is added to the questions of sets that are given by name, and that many sets carry.
BOXED = ' Please reason step by step, and put your final answer within \\boxed{}.'

PIECE = 1000                    # prompts that are rendered together

# Words in a file's path that say it is held out; such files are never read for training.
HELD_OUT_WORDS = {'test', 'validation', 'valid', 'val', 'dev', 'eval'}

# What `datasets` writes beside the rows.
NO_ROWS = re.compile(r'(state|dataset_info|dataset_infos|dataset_dict)\.json|cache-.*\.arrow')

# Columns of conversations, which may hold the answer too.
CONVERSATIONS = ('messages', 'conversations')

# The roles of messages, in small letters, and what ShareGPT calls two of them. Another role would be rendered
# as it is: the answer of a 'chatbot' would be a part of the question.
SPEAKERS = ('system', 'developer', 'user', 'assistant', 'tool')
ROLES = {'human': 'user', 'gpt': 'assistant'}

# How Python or JSON prints messages or a ground truth: what a list in a cell of a csv file becomes.
PRINTED = re.compile(r"""\s*(\[\s*\{\s*['"](role|content|from|value)|\{\s*['"](ground_truth|style))['"]""")
PRINTED_LIST = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)           # ['7'], of an answer


@dataclass(frozen=True)
class Problem:
    """A question, its known answer if there is one, and the prompt that asks it."""
    question: str | list        # a text, or messages
    answer: str | None          # what the last box should hold, or a solution that ends in a box
    ids: list[int]              # the prompt, chat-rendered
    solution: str | None = None              # a worked solution, or else the answer as the row has it
    tag: object = None                       # the row's column `teacher`
    teacher: int = 0                         # the number of its teacher (extensions/several_teachers.py)
    teacher_ids: list[int] | None = None     # the teacher's prompt, if that shows the solution


@dataclass
class Tally:
    """What was read of a problem set, for the line that says so."""
    rows: int = 0
    repeated: int = 0           # rows whose question was there before
    long: int = 0               # prompts that are too long
    questions: Counter = field(default_factory=Counter)      # the columns that they came from
    answers: Counter = field(default_factory=Counter)


# ---- the files of a set --------------------------------------------------------------------------

def problem_files(source, split):
    """A file, a folder or a hub data set (owner/name), or several with commas between -> data files of one
    split ('train' or 'test')."""
    # A file's own name may hold a comma, so a path that exists is never split.
    source = str(source)
    names = [source] if Path(source).exists() else source.split(',')
    files = []
    for name in names:
        if Path(name).is_file():
            files.append(Path(name))
        else:
            files += files_of_folder(snapshot(name, dataset=True), split, name)
    return files


def files_of_folder(folder, split, name):
    """The data files of a folder, all of one ending: the first of READERS that has any. Text files (.txt)
    in a folder are seldom problems, and are not read."""
    by_ending = {}
    for file in folder.rglob('*'):
        ending = ending_of(file)
        if ending in READERS and ending != '.txt' and not NO_ROWS.fullmatch(file.name) and not file.is_dir():
            by_ending.setdefault(ending, []).append(file)
    for ending in READERS:
        files = files_of_split(sorted(by_ending.get(ending, [])), folder, split)
        if files:
            return files
    endings = ', '.join(ending for ending in READERS if ending != '.txt')
    raise UserError(f'{name}: no {endings} file in it for {split}; name one file')


def files_of_split(files, folder, split):
    """Files with the word `split` in their path, if there are any. Otherwise 'train' takes those whose path
    does not say that they are held out, and 'test' takes those whose path does, or else all."""
    of_split = []
    held_out = []
    others = []
    for file in files:
        # Whole words: `constrained.jsonl` does not hold the word `train`.
        words = set(re.split(r'[^a-z]+', str(file.relative_to(folder)).lower()))
        if split in words:
            of_split.append(file)
        elif words & HELD_OUT_WORDS:
            held_out.append(file)
        else:
            others.append(file)
    if of_split:
        return of_split
    if split == 'train':
        return others
    return held_out or others


# ---- rows to problems ----------------------------------------------------------------------------

def question_and_answer(row, where):
    """One row, {column: value} -> (question, column of it, answer, column of it, solution); the last three
    may be None.

    Question and answer are each in the first column of QUESTION_COLUMNS and ANSWER_COLUMNS that has a value.
    The last message of a conversation, if it is the assistant's, is an answer too. A column of its own comes
    before it: what stands there is shorter, and was meant to be graded by. The solution is the longest text
    among them all: it is for a teacher that may see one (teacher_sees).
    """
    question, column, last_message = question_of(row, where)
    answers = {name: row.get(name) for name in ANSWER_COLUMNS}
    answers['the last message'] = last_message

    # verl keeps the answer one level deeper: {'reward_model': {'ground_truth': '7'}}.
    if isinstance(answers['reward_model'], dict):
        answers['reward_model'] = answers['reward_model'].get('ground_truth')
    answer_column = next((name for name, answer in answers.items() if has_value(answer)), None)
    if answer_column is None:
        return question, column, None, None, None
    answer = answer_text(answers[answer_column], where)
    check_text(answer, where)

    # The worked solution is the longest of them.
    texts = [text for text in answers.values() if isinstance(text, str) and has_value(text)]
    solution = max([answer, *texts], key=len)
    return question, column, final_answer(answer) or None, answer_column, solution


def has_value(cell):
    """Does a row say anything in a column? A text without a letter says nothing."""
    return bool(cell.strip()) if isinstance(cell, str) else cell is not None


def question_of(row, where):
    """-> (question, its column, the assistant's last message or None). A question that is a list of messages
    ends before that message."""
    column = next((name for name in QUESTION_COLUMNS if row.get(name) and has_value(row[name])), None)
    value = row.get(column)
    if column == 'instruction':
        value = with_input(value, row.get('input'), where)
    if isinstance(value, str):
        check_text(value, where)
        return value, column, None

    messages = messages_of(value, where) or []
    last_message = None
    if column in CONVERSATIONS:
        messages, last_message = split_conversation(messages, row.get('system'), where)
    if all(message['role'] == 'system' for message in messages):
        raise UserError(f'{where}: no question; wants {" or ".join(QUESTION_COLUMNS)}, '
                        'a text or [{role, content}]')
    for message in messages:
        check_text(message['content'], where)
    return messages, column, last_message


def with_input(instruction, given, where):
    """Alpaca: what an instruction is about may have a column of its own, `input` -> both as one text."""
    if not has_value(given):
        return instruction
    if not isinstance(instruction, str) or type(given) not in (str, int, float):
        found = f'{shown(instruction, 30)} and {shown(given, 30)}'
        raise UserError(f'{where}: instruction and input are {found}; wants two texts')
    return f'{instruction}\n\n{given}'


def split_conversation(messages, system, where):
    """Messages -> (those that ask, the content of the assistant's last one or None). system: what the system
    says, if that has a column of its own."""
    last_message = None
    if messages and messages[-1]['role'] == 'assistant':
        *messages, last = messages
        last_message = last['content']

    # A part of the answer must not stand in the question.
    if messages and messages[-1]['role'] == 'assistant':
        raise UserError(f'{where}: ends with two messages of the assistant; join them')
    if isinstance(system, str) and has_value(system) and messages and messages[0]['role'] != 'system':
        messages = [{'role': 'system', 'content': system}, *messages]
    return messages, last_message


def messages_of(value, where):
    """A list of messages, each with a role and a content that are texts -> [{role, content}]; None if it is
    something else. ShareGPT's {from, value} means the same. A role that is unknown is a UserError."""
    if not isinstance(value, list):
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role = message.get('role')
        if role is None:
            role = message.get('from')
        content = message.get('content', message.get('value'))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        speaker = ROLES.get(role.lower(), role.lower())
        if speaker not in SPEAKERS:
            raise UserError(f'{where}: a message has the role {shown(role)}; wants {", ".join(SPEAKERS)}, '
                            'human or gpt')
        messages.append({'role': speaker, 'content': content})
    return messages


def answer_text(answer, where):
    """A known answer as text; a UserError if it is neither a text nor a number. The text of a list,
    "['7']", would be an answer that no model can ever give."""
    # TRL's completions can be messages.
    messages = messages_of(answer, where)
    if messages:
        last = messages[-1]
        if last['role'] != 'assistant':
            raise UserError(f"{where}: the answer ends with a message of the role {last['role']}; wants "
                            'one of the assistant')
        answer = last['content']
    is_number = type(answer) is int or (type(answer) is float and math.isfinite(answer))
    if not is_number and not isinstance(answer, str):
        raise UserError(f'{where}: the answer {shown(answer)} is of type {type(answer).__name__}; '
                        'wants a text or a number')
    if PRINTED_LIST.fullmatch(str(answer)):
        raise UserError(f'{where}: the answer {shown(answer)} is a list printed as a text; wants a single '
                        'answer')
    return str(answer)


def check_text(text, where):
    """A text that is endless, that no tokenizer can read, or that shows a list is a UserError."""
    if len(text) > LONGEST_TEXT:
        raise UserError(f'{where}: a text of {len(text)} characters, {shown(text)}; at most {LONGEST_TEXT} '
                        'are read, so delete the row')
    half = re.search('[\ud800-\udfff]', text)
    if half:
        raise UserError(f'{where}: holds {shown(half[0])}, half of a character; delete it')
    if PRINTED.match(text):
        raise UserError(f'{where}: {shown(text)} is a list or an object printed as a text; write the set as '
                        '.jsonl or .parquet')


def final_answer(answer):
    """What to grade by: of GSM8K's '5 + 2 = 7 apples\n#### 7' it is '7', and other answers stay as they are.

    A solution with a box is left alone: the grader reads its box, and '####' can be a heading in it.
    """
    if '####' not in answer or '\\boxed' in answer:
        return answer
    return answer.rpartition('####')[2].strip()


def folded(question, suffix=''):
    """A question as a text to compare by: without the suffix that was added to it, without the instruction to
    use a box, and with neither capitals nor differences in spaces. Of messages, all that the system did not
    say."""
    if isinstance(question, list):
        question = '\n'.join(message['content'] for message in question if message['role'] != 'system')
    question = question.removesuffix(suffix).removesuffix(BOXED)
    return ' '.join(question.split()).casefold()


def load_problems(source, tokenizer, first=0, longest=0, split='train', suffix='', show=True):
    """Problems of a file, folder or hub data set, or of several with commas between -> [Problem], each
    question once.

    first: take so many; 0 = all. longest: prompts of more tokens are left out; 0 = no limit. suffix: added
    to questions that are texts. show: print how many there are, what was left out, and which columns they
    came from. Raises UserError with file and row.
    """
    problems = []
    tally = Tally()
    rows = rows_of_files(problem_files(source, split))
    questions = new_questions(rows, suffix, tally)
    while not first or len(problems) < first:
        # Read as many questions as are still missing, and no further.
        missing = first - len(problems) if first else PIECE
        piece = list(islice(questions, min(missing, PIECE)))
        if not piece:
            break

        # Their prompts are rendered together, because each request to the renderer takes time.
        origins = [where for where, _ in piece]
        prompts = tokenizer.chat_all([problem.question for _, problem in piece], origins)
        for (where, problem), ids in zip(piece, prompts, strict=True):
            if not ids:
                raise UserError(f'{where}: the prompt renders to no token; fix it or the template')
            if longest and len(ids) > longest:
                tally.long += 1
            else:
                problems.append(replace(problem, ids=ids))
    if show:
        print0(f'  {tally_line(source, tally, problems, longest)}')
    if not problems:
        raise UserError(f'{source}: no problems in it')
    return problems


def rows_of_files(files):
    """The rows of several files, one file after the other."""
    for file in files:
        yield from rows_of(file)


def new_questions(rows, suffix, tally):
    """(where, problem without a prompt) of the rows whose question was not there before, one by one. Public
    sets repeat questions (DAPO-Math-17k a hundred times each): the first counts. suffix: added to texts."""
    seen = set()
    for where, row in rows:
        question, column, answer, answer_column, solution = question_and_answer(row, where)
        tally.rows += 1
        key = json.dumps(question)
        if key in seen:
            tally.repeated += 1
            continue
        seen.add(key)
        tally.questions[column] += 1
        if answer_column:
            tally.answers[answer_column] += 1
        if isinstance(question, str):
            question += suffix
        yield where, Problem(question, answer, [], solution, row.get('teacher'))


def tally_line(source, tally, problems, longest):
    """How many problems there are, what was left out, and which columns they came from, in one line."""
    parts = [f'{source}: {len(problems)} problems']
    if tally.repeated or tally.long:
        parts = [f'{source}: {tally.rows} rows, {tally.repeated} of them repeated']
        if longest:
            parts[0] += f', {tally.long} prompts longer than {longest} tokens'
        parts.append(f'{len(problems)} problems left')
    columns = f'columns {", ".join(tally.questions)} (question)'
    if tally.answers:
        columns += f', {", ".join(tally.answers)} (answer)'
    parts.append(columns)

    # Training needs no answers; but whoever has them in another column should learn that they are not seen.
    unknown = sum(problem.answer is None for problem in problems)
    if unknown:
        parts.append(f'{unknown} of them without a known answer in {", ".join(ANSWER_COLUMNS)}')
    return '; '.join(parts)


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
