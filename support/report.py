"""
What a training run prints and writes: the names in its log, a line for each step, notes on the first one,
results.json.

Simpler than a table of metrics with types and units: names are texts, and docs/objectives.md says what each
one means. It prints nothing itself.
"""
from statistics import median

from support.files import read_json
from support.optimizer import ever_positive
from support.run_folder import log_rows, plain_scores, scores_of, teacher_scores
from support.runtime import UserError

# ---- the names in the log -------------------------------------------------------------------------

def log_names(cfg, setup, device):
    """What a run can measure, in the order of a row: a list of names. support.run_folder adds two of its own.

    A step measures some of it. All names are known before the first step, so that every row has the same.
    setup: distill.Setup, with its objectives.
    """
    names = ['step', 'loss']
    for teacher in setup.teachers:
        names += [name for name in objective_names(cfg, teacher.objective) if name not in names]
    names += ['len/mean', 'finish', 'tokens']
    if cfg['teacher_sees'] == 'solution' or not all(teacher.same_ids for teacher in setup.teachers):
        names.append('align')
    if any(problem.answer is not None for problem in setup.train):
        names.append('acc/rollout')
    names += ['lr', 'grad_norm', 'adam/below_eps']

    # The student is evaluated again and again, its teachers once, before the first step.
    for side in ('eval', *setup.named_teachers) if cfg['eval_teacher'] else ('eval',):
        names += [f'{side}/{name}' for name in score_names(setup.held_out, cfg['eval_n'])]

    # support.runtime.Clock
    names += [f'time/{phase}' for phase in ('sample', 'diagnose', 'teacher', 'student', 'update')]
    if device.type == 'cuda':
        names += ['mem/peak', 'mem/update_dpeak']
    return names


def objective_names(cfg, objective):
    """The names of what the terms of the loss say: their losses if they ever run, and how far apart the
    models are, which is looked at in any case if the models allow it."""
    layers = list(objective.layer_map)
    has_hidden = objective.hidden is not None
    has_output = objective.output is not None
    names = []
    if has_hidden and ever_positive(cfg['oprd_weight']):
        names.append('loss/oprd')
    if has_output and ever_positive(cfg['opd_weight']):
        names.append('loss/opd')
    if objective.reward is not None:
        names.append('loss/reward')
    if objective.attention is not None:
        names.append('loss/attention')
    if 'loss/oprd' in names:
        names += [f'loss/layer/{l}' for l in layers]
    if has_hidden:
        names += ['rep/cos', *(f'rep/cos/{l}' for l in layers)]
    if has_output:
        names += ['opd/kl', 'entropy/student', 'entropy/teacher']
    if has_output and cfg['opd'] != 'byte':              # the next byte has no likeliest tokens
        names.append('opd/overlap16')
    return names


def score_names(sets, per_problem):
    """What eval_math.shared_scores measures of these sets."""
    if not sets:
        return []
    plain = [f'avg@{per_problem}', f'best@{per_problem}', 'len']
    if len(sets) == 1:
        return plain
    return plain + [f'{name}/{label}' for label in sets for name in plain]


# ---- lines on the terminal ------------------------------------------------------------------------

def step_line(row, steps, eta):
    """A row of the log -> one line of fixed width, most wanted first."""
    train_seconds = row['time/teacher'] + row['time/student'] + row['time/update']
    speed = row['tokens'] / (row['time/sample'] + train_seconds)
    parts = [f"step {row['step']:04d}/{steps:04d}", f"loss {row['loss']:#.3g}"]

    # Neither is measured if no position of the step is supervised: the teacher may have a state at none.
    if row.get('loss/opd') is not None and row.get('opd/kl') is not None:
        parts.append(f"kl {row['opd/kl']:#.3g}")
    elif row.get('rep/cos') is not None:
        parts.append(f"cos {row['rep/cos']:.3f}")
    answers = f"len {row['len/mean']:.0f} fin {100 * row['finish']:.0f}%"
    if row.get('acc/rollout') is not None:
        answers += f" acc {row['acc/rollout']:.0f}%"
    parts.append(answers)
    parts.append(f"sample {row['time/sample']:.1f}s train {train_seconds:.1f}s")
    parts.append(f'{amount(speed)} tok/s')
    if 'mem/peak' in row:
        parts.append(f"mem {row['mem/peak']:.1f}G")
    parts.append(f'eta {duration(eta)}')
    # Of several held-out sets the means alone; log.jsonl has each by its name.
    scores = [f'{name} {value:.1f}' for name, value in plain_scores(row, 'eval').items() if '@' in name]
    if scores:
        parts.append(' '.join(scores))
    return ' | '.join(parts)


def duration(seconds):
    """Seconds -> '1.5h', '12.3m' or '45s'."""
    if seconds > 3600:
        return f'{seconds / 3600:.1f}h'
    if seconds > 60:
        return f'{seconds / 60:.1f}m'
    return f'{seconds:.0f}s'


def amount(number, gap=''):
    """A positive number in three significant digits: 0.0427 -> '0.0427', 12 -> '12', 8214 -> '8.21k',
    999_700 -> '1M'. gap: between digits and letter, where a unit follows: '8.21 k' + 'B'."""
    rounded = float(f'{number:.3g}')         # first, so that 999.7 becomes 1k and not 1000
    thousands = 0
    while rounded >= 1000 and thousands < 5:
        rounded /= 1000
        thousands += 1
    return f'{rounded:.3g}{gap}' + ('', 'k', 'M', 'G', 'T', 'P')[thousands]


def first_step_notes(row, adam_eps):
    """What the first step tells about the whole run -> lines.

    The share of each layer in the loss of hidden states: with 'mse' layers of large states outweigh
    the others. And the share of the weights whose gradients AdamW's eps damps.
    """
    losses = {}                              # {layer: its loss}
    for name, value in row.items():
        if name.startswith('loss/layer/') and value is not None:
            losses[name.removeprefix('loss/layer/')] = value

    lines = []
    total = sum(losses.values())
    if total > 0:
        shares = {layer: loss / total for layer, loss in losses.items()}
        listed = ' '.join(f'{layer}:{100 * share:.3g}' for layer, share in shares.items())
        lines.append(f'  share of each layer in the loss, per cent: {listed}')
        largest = max(shares, key=shares.get)
        if shares[largest] > 10 * median(shares.values()):
            lines.append(f'  note: layer {largest} has {100 * shares[largest]:.0f}% of the loss, more than '
                         'ten times the median layer; rep_loss=cosine weighs all layers alike')
    if (row.get('adam/below_eps') or 0.0) > 0.1:
        lines.append(f"  note: the gradients of {100 * row['adam/below_eps']:.0f}% of the weights are below "
                     f'adam_eps={adam_eps:g}, which damps their steps; lower adam_eps=, or raise the loss '
                     '(rep_loss=cosine is d/2 times nmse)')
    return lines


# ---- results.json ---------------------------------------------------------------------------------

def summary(rows):
    """The rows of log.jsonl -> results.json."""
    first = rows[0]
    last = rows[-1]
    cosines = [row['rep/cos'] for row in rows if row.get('rep/cos') is not None]

    # Of several teachers each has its own scores.
    teachers = teacher_scores(first) or {'teacher': {}}

    # The last step may have been evaluated otherwise than the models before the first one: eval_n= may
    # change when a run goes on.
    return {'student': scores_of(first, 'eval'), **teachers,
            'distilled': scores_of(last, 'eval'), 'steps': last['step'],
            'seconds': last['elapsed'], 'rep_cos': [cosines[0], cosines[-1]] if cosines else []}


def read_results(out):
    """results.json of a run folder; None if there is none. It must be what the log says, so damage to either
    is a UserError."""
    file = out / 'results.json'
    if not file.exists():
        return None
    results = read_json(file)
    rows = log_rows(out / 'log.jsonl')
    steps = results.get('steps')
    is_step = type(steps) is int and 0 < steps < len(rows) and 'elapsed' in rows[steps]
    if not is_step or results != summary(rows[:steps + 1]):
        raise UserError(f'{file}: does not agree with log.jsonl; delete it, and the same command makes both '
                        'from the last checkpoint')
    return results
