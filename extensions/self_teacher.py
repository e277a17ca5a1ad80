"""
The student as its own teacher, which sees more: a reference solution stands in its prompt.

    teacher='self'             the initial student; its weights may follow those of the student:
    teacher_every=10           after every 10 steps they are replaced, ...
    teacher_decay=0.9          ... by a moving average: average <- 0.9 average + 0.1 student; 0 = a copy
    teacher_sees='solution'    the teacher's prompt is solution_text, in which {question} and {solution} stand
                               for those of the problem

The student answers the plain question. The teacher reads the same answer after its own, longer prompt, and
hidden states (or output distributions) are paired token by token over the answer: the same ids, at other
columns. The pairing is that of a teacher with another vocabulary (cross_tokenizer/pairing.py), where all
tokens fit.

The natural control is supervised learning on the same solutions: oprd_weight=0 opd_weight=1 opd=supervised
answers_by=solution n=1.

Simpler than usual: a solution is a column of the problem set. What it does not do: let the student write the
solution, or filter by it.

    python distill.py configs/toy_self.py

Letters: B answers, T tokens.
"""
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from formats.problems import check_text
from formats.rows import ANSWER_COLUMNS
from rollout import collect
from support.runtime import UserError, shown

# ---- before the loop ---------------------------------------------------------------------------

def named(cfg):
    """The config with the student's name where teacher= says 'self'."""
    names = [cfg['student'] if name == 'self' else name for name in cfg['teacher'].split(',')]
    return cfg | {'teacher': ','.join(names)}


def check(cfg):
    """Do the keys of a teacher that is the student itself make sense together? Else a UserError."""
    if cfg['teacher_every'] and cfg['teacher'] != cfg['student']:
        raise UserError(f"teacher_every={cfg['teacher_every']}: only a single teacher that is the student "
                        'itself can follow it; set teacher=self')
    if cfg['teacher_every'] and cfg['teachers_in_turn']:
        raise UserError('teachers_in_turn=True keeps the weights of the start, but teacher_every= changes '
                        'them; set teachers_in_turn=False')
    if cfg['teacher_decay'] and not cfg['teacher_every']:
        raise UserError(f"teacher_decay={cfg['teacher_decay']}: the teacher never follows the student; set "
                        'teacher_every=1')
    if cfg['teacher_sees'] == 'solution' and cfg['teacher_ids'] == 'student':
        raise UserError("teacher_ids='student' gives the teacher the student's prompt, in which there is no "
                        'solution; set teacher_ids=text')
    if cfg['teacher_sees'] == 'solution' and cfg['answers_by'] == 'teacher':
        raise UserError("answers_by='teacher' with teacher_sees='solution': the teacher would answer the "
                        'plain question; set answers_by=student')


def with_solution(problem, text):
    """The question of a problem with its solution in view. text: what is asked, in which {question} and
    {solution} stand for the two. Of messages, the last one becomes that text."""
    messages = problem.question
    question = messages if isinstance(messages, str) else messages[-1]['content']
    # Not str.format: solutions are full of braces.
    before, after = text.split('{solution}')
    asked = before.replace('{question}', question) + problem.solution + after.replace('{question}', question)
    if isinstance(messages, str):
        return asked
    return [*messages[:-1], messages[-1] | {'content': asked}]


def require_solutions(problems, key):
    """UserError if a problem has no solution. key: of the config, which says 'solution'."""
    missing = sum(not problem.solution for problem in problems)
    if missing:
        raise UserError(f"{key}='solution': {missing} of {len(problems)} problems have no solution; "
                        f'delete them, or give it in a column {" or ".join(ANSWER_COLUMNS)}')
    for problem in problems:
        check_text(problem.solution, f'the solution of {shown(problem.question)}')


def show_solutions(problems, toks, text, longest=0):
    """Problems -> those whose solutions their teachers may see, each with `teacher_ids`.

    toks: the tokenizers of all teachers. text: see `with_solution`. longest: prompts of more tokens are left
    out; 0 = no limit.
    """
    if text.count('{solution}') != 1 or '{question}' not in text:
        raise UserError(f'solution_text={shown(text)}: wants {{question}}, and {{solution}} once')
    require_solutions(problems, 'teacher_sees')
    with_ids = []
    for number, tok in enumerate(toks):
        own = [problem for problem in problems if problem.teacher == number]
        prompts = tok.chat_all([with_solution(problem, text) for problem in own])
        for problem, ids in zip(own, prompts, strict=True):
            if not longest or len(ids) <= longest:
                with_ids.append(replace(problem, teacher_ids=ids))
    if not with_ids:
        raise UserError(f'all prompts with a solution are longer than {longest} tokens; raise '
                        'max_prompt_tokens=')
    return with_ids


def show_in_sets(sets, tok, text):
    """Held-out sets {name: problems} -> the same, each problem with the `teacher_ids` of one teacher. tok:
    its tokenizer."""
    shown_sets = {}
    for name, problems in sets.items():
        problems = [replace(problem, teacher=0) for problem in problems]
        shown_sets[name] = show_solutions(problems, [tok], text)
    return shown_sets


def with_teacher_prompts(sets):
    """Sets of `show_in_sets` as this teacher is asked them."""
    return {name: [replace(problem, ids=problem.teacher_ids) for problem in problems]
            for name, problems in sets.items()}


# ---- answers that are the solutions: a control -----------------------------------------------------

def written_solutions(problems, tok, longest, device):
    """The solutions of the problems as if somebody had sampled them -> Rollout. longest: tokens of an answer,
    as max_new_tokens."""
    answers = []
    for index, problem in enumerate(problems):
        ids = tok.encode(problem.solution, special=False) + tok.stop_ids[:1]
        answers.append((index, ids[:longest], len(ids) <= longest))
    requests = [(problem.ids, 0, 0) for problem in problems]
    return collect(requests, 1, answers, device)


# ---- a teacher that follows the student --------------------------------------------------------

def keep_average(opt):
    """Begin a moving average of the weights that learn, in float32. It lies beside AdamW's moments, so that a
    checkpoint has it."""
    for p, state in opt.state.items():
        state['average'] = p.detach().clone()


@torch.no_grad()
def move_average(opt, decay):
    """average <- decay * average + (1 - decay) * weight. With decay 0 it is a copy."""
    for p, state in opt.state.items():
        state['average'].lerp_(p, 1 - decay)


@torch.no_grad()
def teach_average(opt, student, teacher):
    """Give the teacher the averages of the student's weights, in its own dtype. A weight that does not learn
    is the same in both already. Every rank must call this."""
    theirs = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if p not in opt.state:
            continue
        average = opt.state[p]['average']
        target = theirs[name]
        if isinstance(average, DTensor) and isinstance(target, DTensor):     # both are sharded alike
            target.to_local().copy_(average.to_local())
        elif isinstance(average, DTensor):
            target.copy_(average.full_tensor())
        else:
            target.copy_(average)
