"""
Several teachers for one student, each for its own share of the prompts: specialists into one generalist.

    teacher='out/algebra,out/geometry'      as many models as wanted, with commas between
    bridge='out/bridge,'                    likewise, one for each teacher; empty where it needs none
    teacher_share=...                       which teacher reads the answers to a prompt:
        'data'      the sets of data= belong to the teachers, in this order
        'tag'       the number in the problem's column `teacher`, from 1
        [3, 1]      each prompt to one of them at random, with these weights

An answer is read by one teacher, and matched with this teacher's states. Everything that a pair of models has is
there once for each teacher: its tokenizer, layer map, bridge and objective. The weights of all rows still sum to 1
over the whole batch, so the gradient is that of one loss over all answers.

If the teachers do not fit into the GPU's memory together, teachers_in_turn=True keeps their weights in the
memory of the host, and copies those of one teacher to the GPU while it works. The results are the same, bit for
bit: a copy does not change a weight.

Simpler than usual: no server for each teacher, no asynchronous copies. What it does not do: average several
teachers over the same answer, or let the student's progress decide who teaches what.

    python distill.py configs/toy_two_teachers.py

Letters: B answers, T tokens.
"""
import random
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from support.runtime import UserError, shown

# ---- before the loop ---------------------------------------------------------------------------

def configs_of_teachers(cfg):
    """The config of a run -> a list of configs, one for each teacher, in which `teacher` and `bridge` are
    those of this teacher alone."""
    # A folder's own name may hold a comma, so a path that exists is never split.
    names = [cfg['teacher']] if Path(cfg['teacher']).exists() else cfg['teacher'].split(',')
    bridges = cfg['bridge'].split(',')
    if not all(names):
        raise UserError(f"teacher={cfg['teacher']!r}: nothing between two commas; name a model there")
    if not cfg['bridge']:
        bridges = [''] * len(names)
    if len(bridges) != len(names):
        raise UserError(f"bridge={cfg['bridge']!r} names {len(bridges)} and teacher= {len(names)}; give each "
                        'teacher a bridge, or nothing between two commas')
    pairs = zip(names, bridges, strict=True)
    return [cfg | {'teacher': name, 'bridge': bridge} for name, bridge in pairs]


def sources_of_teachers(data, share, teachers):
    """The sources of the problems that have to be loaded -> a list of texts. With teacher_share='data' each
    teacher has its own, otherwise all problems come together."""
    if share != 'data' or teachers == 1:
        return [data]
    sources = data.split(',')
    if len(sources) != teachers:
        raise UserError(f"teacher_share='data': data= names {len(sources)} sets for {teachers} teachers; name "
                        'one for each, with commas between')
    return sources


def assign_teachers(problems, share, teachers, seed):
    """Problems that came together -> the same with the number of their teacher, 0, 1, ...

    share: 'tag', or a list of weights. A problem keeps its teacher in every epoch: the choice at random is a
    function of (seed, question) alone.
    """
    if teachers == 1:
        return problems
    if share == 'tag':
        return [replace(problem, teacher=teacher_of_tag(problem, teachers)) for problem in problems]
    if not isinstance(share, list) or len(share) != teachers or not sum(share):
        raise UserError(f"teacher_share={share!r} with {teachers} teachers; give 'data', 'tag', or a weight for "
                        'each of them such as [1,1]')
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
    if type(tag) is not int or not 1 <= tag <= teachers:
        raise UserError(f"teacher_share='tag': the problem {shown(problem.question)} has teacher={shown(tag)}; "
                        f'write a number from 1 to {teachers} into this column')
    return tag - 1


# ---- in a step -----------------------------------------------------------------------------------

@dataclass
class Share:
    """The answers of a step that one teacher reads, B of them on this rank."""
    teacher: object             # teacher.Teacher
    roll: object                # rollout.Rollout
    problems: list              # one for each answer
    advantage: torch.Tensor | None           # (B,) of each answer, if there are rewards
    reading: object = None      # pairing.Reading; None: the teacher reads the student's ids
    mask: torch.Tensor | None = None         # (B, T) the supervised positions


def share_answers(teachers, roll, problems, advantage):
    """A rollout, the problem of each answer and its advantage -> a Share for each of `teachers`."""
    if len(teachers) == 1:
        return [Share(teachers[0], roll, problems, advantage)]
    shares = []
    for number, teacher in enumerate(teachers):
        own = [row for row, problem in enumerate(problems) if problem.teacher == number]
        if own:
            own_advantage = None if advantage is None else advantage[own]
            share = Share(teacher, rows_of(roll, own), [problems[row] for row in own], own_advantage)
        else:
            share = empty_share(teacher, roll, problems)
        shares.append(share)
    return shares


def rows_of(roll, rows):
    """Those rows of a rollout that has one answer to each prompt -> Rollout."""
    return replace(roll, ids=roll.ids[rows], prompt_len=roll.prompt_len[rows], resp_len=roll.resp_len[rows],
                   stopped=roll.stopped[rows], prompt=torch.arange(len(rows), device=roll.ids.device))


def empty_share(teacher, roll, problems):
    """The share of a teacher that has no answer on this rank. FSDP needs as many forwards on every rank, so it
    is a prompt without an answer: no position of it is supervised."""
    prompt = rows_of(roll, [0])
    prompt = replace(prompt, resp_len=torch.zeros_like(prompt.resp_len))
    problem = replace(problems[0], teacher_ids=None)     # those were made for another teacher
    return Share(teacher, prompt, [problem], torch.zeros(1, device=roll.ids.device))


# ---- in turn -------------------------------------------------------------------------------------

def keep_on_host(model):
    """Move the weights of a frozen model to the memory of the host -> {name: weight}, for `on_device`. The
    copies are pinned, so that the GPU can fetch them at full speed."""
    weights = {}
    for name, weight in model.named_parameters():
        weights[name] = weight.data.cpu()
        if weight.is_cuda:
            weights[name] = weights[name].pin_memory()
        weight.data = weights[name]
    return weights


@contextmanager
def on_device(teacher, device):
    """A teacher's model, with its weights on the device inside this context, wherever they wait outside."""
    if teacher.host_weights is None:
        yield teacher.model
        return
    for name, weight in teacher.model.named_parameters():
        weight.data = teacher.host_weights[name].to(device, non_blocking=True)
    try:
        yield teacher.model
    finally:
        for name, weight in teacher.model.named_parameters():
            weight.data = teacher.host_weights[name]
