"""
Several teachers for one student, each for its own share of the prompts: specialists into one generalist.

    teacher='out/algebra,out/geometry'      as many models as wanted, with commas between
    bridge='out/bridge,'                    likewise, one for each teacher; empty where it needs none
    teacher_share=...                       which teacher reads the answers to a prompt:
        'data'      the sets of data= belong to the teachers, in this order
        'tag'       the number in the problem's column `teacher`, from 1
        [3, 1]      each prompt to one of them at random, with these weights

An answer is read by one teacher, and matched with this teacher's states. Everything that a pair of models
has is there once for each teacher: tokenizer, layer map, bridge and objective. The weights of all rows still
sum to 1 over the whole batch, so the gradient is that of one loss over all answers.

If the teachers do not fit into the GPU's memory together, teachers_in_turn=True keeps their weights in the
memory of the host, and copies those of one teacher to the GPU while it works. The results are the same, bit
for bit: a copy does not change a weight.

Simpler than usual: no server for each teacher, no asynchronous copies. What it does not do: average several
teachers over the same answer, or let the student's progress decide who teaches what.

    python distill.py configs/toy_two_teachers.py

Letters: B answers, T tokens.
"""
import random
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from extensions.self_teacher import require_solutions, show_solutions
from formats.problems import load_problems
from support.runtime import UserError, print0, shown

# ---- before the loop ---------------------------------------------------------------------------

def configs(cfg):
    """The config of a run -> a list of configs, one for each teacher, in which `teacher` and `bridge` are
    those of this teacher alone."""
    # A folder's own name may hold a comma, so a path that exists is never split.
    names = [cfg['teacher']] if Path(cfg['teacher']).exists() else cfg['teacher'].split(',')
    bridges = [cfg['bridge']] if Path(cfg['bridge']).exists() else cfg['bridge'].split(',')
    if not all(names):
        raise UserError(f"teacher={cfg['teacher']!r}: nothing between two commas; name a model there")
    if not cfg['bridge']:
        bridges = [''] * len(names)
    if len(bridges) != len(names):
        raise UserError(f"bridge={cfg['bridge']!r} names {len(bridges)} and teacher= {len(names)}; give each "
                        'teacher a bridge, or nothing between two commas')
    pairs = zip(names, bridges, strict=True)
    return [cfg | {'teacher': name, 'bridge': bridge} for name, bridge in pairs]


def check(cfg, teachers):
    """Do the keys make sense with so many teachers? Else a UserError."""
    if cfg['teachers_in_turn'] and teachers == 1:
        raise UserError('teachers_in_turn=True, but there is one teacher; set it to False')
    if cfg['teachers_in_turn'] and cfg['teacher_shard']:
        raise UserError('teachers_in_turn=True moves whole teachers, but teacher_shard=True cuts them; set '
                        'one of them to False')
    if cfg['answers_by'] == 'teacher' and teachers > 1:
        raise UserError(f"answers_by='teacher': there are {teachers} teachers; set answers_by=student")


def load_training_problems(cfg, tok, toks_t):
    """The training problems of a run, each with the number of its teacher. toks_t: the teachers' tokenizers.

    With teacher_share='data' each teacher has one set; otherwise `assign_teachers` divides them.
    """
    sources = [cfg['data']]
    if cfg['teacher_share'] == 'data' and len(toks_t) > 1:
        sources = cfg['data'].split(',')
        if len(sources) != len(toks_t):
            raise UserError(f"teacher_share='data': data= names {len(sources)} sets for {len(toks_t)} "
                            'teachers; name one for each, with commas between')
    train = []
    for number, source in enumerate(sources):
        problems = load_problems(source, tok, longest=cfg['max_prompt_tokens'])
        train += [replace(problem, teacher=number) for problem in problems]
    if len(sources) < len(toks_t):
        train = assign_teachers(train, cfg['teacher_share'], len(toks_t), cfg['seed'])

    if cfg['answers_by'] == 'solution':
        require_solutions(train, 'answers_by')

    # In self-distillation the teacher's prompts show the solution.
    if cfg['teacher_sees'] == 'solution':
        train = show_solutions(train, toks_t, cfg['solution_text'], cfg['max_prompt_tokens'])
        print0(f'  {len(train)} of them with a solution that the teacher can read')
    return train


def assign_teachers(problems, share, teachers, seed):
    """Problems that came together -> the same with the number of their teacher, 0, 1, ...

    share: 'tag', or a list of weights. A problem keeps its teacher in every epoch: the choice at random is a
    function of (seed, question) alone.
    """
    if share == 'tag':
        return [replace(problem, teacher=teacher_of_tag(problem, teachers)) for problem in problems]
    if not isinstance(share, list) or len(share) != teachers:
        raise UserError(f"teacher_share={share!r} with {teachers} teachers; give 'data', 'tag', or a weight "
                        'for each of them such as [1,1]')
    numbers = range(teachers)
    limits = list(accumulate(share))
    assigned = []
    for problem in problems:
        chance = random.Random(f'{seed} {problem.question}')
        number, = chance.choices(numbers, cum_weights=limits)
        assigned.append(replace(problem, teacher=number))
    return assigned


def teacher_of_tag(problem, teachers):
    """The number of a problem's teacher, from 0, as its column `teacher` says, which counts from 1."""
    tag = problem.tag
    if isinstance(tag, str) and re.fullmatch('[0-9]{1,6}', tag):
        tag = int(tag)                       # the cells of a .csv file are texts
    if type(tag) is not int or not 1 <= tag <= teachers:
        raise UserError(f"teacher_share='tag': the problem {shown(problem.question)} has "
                        f'teacher={shown(tag)}; write a number from 1 to {teachers} into this column')
    return tag - 1


# ---- in a step -----------------------------------------------------------------------------------

def split(share, teachers):
    """One Share (teacher.Share) that holds all answers of this rank -> one Share for each teacher, with the
    answers that it reads."""
    shares = []
    for number, teacher in enumerate(teachers):
        own = [row for row, problem in enumerate(share.problems) if problem.teacher == number]
        if own:
            advantage = None if share.advantage is None else share.advantage[own]
            problems = [share.problems[row] for row in own]
            shares.append(replace(share, teacher=teacher, roll=rows_of(share.roll, own), problems=problems,
                                  advantage=advantage))
        else:
            shares.append(empty(share, teacher))
    return shares


def rows_of(roll, rows):
    """Those rows of a rollout that has one answer to each prompt -> Rollout."""
    return replace(roll, ids=roll.ids[rows], prompt_len=roll.prompt_len[rows], resp_len=roll.resp_len[rows],
                   stopped=roll.stopped[rows], prompt=torch.arange(len(rows), device=roll.ids.device))


def empty(share, teacher):
    """The share of a teacher that has no answer on this rank. FSDP needs as many forwards on every rank, so
    it is a prompt without an answer: no position of it is supervised."""
    prompt = rows_of(share.roll, [0])
    prompt = replace(prompt, resp_len=torch.zeros_like(prompt.resp_len))
    problem = replace(share.problems[0], teacher_ids=None)       # those were made for another teacher
    advantage = None if share.advantage is None else share.advantage[:1]
    return replace(share, teacher=teacher, roll=prompt, problems=[problem], advantage=advantage)


# ---- in turn -------------------------------------------------------------------------------------

def keep_on_host(model, device):
    """Move the weights of a frozen model to the memory of the host -> `fetched`, with these weights and the
    device filled in, as Teacher.ready. The copies are pinned, so that the GPU fetches them at full speed."""
    weights = {}
    for name, weight in model.named_parameters():
        weights[name] = weight.data.cpu()
        if device.type == 'cuda':
            weights[name] = weights[name].pin_memory()
        weight.data = weights[name]
    return partial(fetched, weights=weights, device=device)


@contextmanager
def fetched(model, weights, device):
    """`with fetched(model, ...) as model:` its weights are on the device inside, and on the host outside."""
    for name, weight in model.named_parameters():
        weight.data = weights[name].to(device, non_blocking=True)
    try:
        yield model
    finally:
        for name, weight in model.named_parameters():
            weight.data = weights[name]
