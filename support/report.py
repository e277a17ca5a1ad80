"""
What a training run prints and writes: a line for each step, notes on the first one, results.json.
"""
from statistics import median

from support.files import read_json
from support.run_folder import log_rows
from support.runtime import UserError


def step_line(row, steps, eta):
    """A row of the log -> one line of fixed width, most wanted first."""
    train_seconds = row['time/teacher'] + row['time/student'] + row['time/update']
    speed = row['tokens'] / (row['time/sample'] + train_seconds)
    parts = [f"step {row['step']:04d}/{steps:04d}", f"loss {row['loss']:#.3g}"]
    if 'loss/opd' in row:
        parts.append(f"kl {row['opd/kl']:#.3g}")
    else:
        parts.append(f"cos {row['rep/cos']:.3f}")
    answers = f"len {row['len/mean']:.0f} fin {100 * row['finish']:.0f}%"
    if 'acc/rollout' in row:
        answers += f" acc {row['acc/rollout']:.0f}%"
    parts.append(answers)
    parts.append(f"sample {row['time/sample']:.1f}s train {train_seconds:.1f}s")
    parts.append(f'{amount(speed)} tok/s')
    if 'mem/peak' in row:
        parts.append(f"mem {row['mem/peak']:.1f}G")
    parts.append(f'eta {duration(eta)}')
    # of several held-out sets the means alone; log.jsonl has each by its name
    scores = [f'{name} {value:.1f}' for name, value in row.items() if '@' in name and '/' not in name]
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


def amount(number):
    """A positive number in three significant digits: 0.0427 -> '0.0427', 12 -> '12', 8214 -> '8.21k',
    999_700 -> '1M'."""
    rounded = float(f'{number:.3g}')         # first, so that 999.7 becomes 1k and not 1000
    thousands = 0
    while rounded >= 1000 and thousands < 3:
        rounded /= 1000
        thousands += 1
    return f'{rounded:.3g}' + ('', 'k', 'M', 'G')[thousands]


def first_step_notes(row, layers, adam_eps):
    """What the first step tells about the whole run -> lines.

    The share of each layer in the loss of hidden states: with 'mse' layers of large states outweigh
    the others. And the share of the weights whose gradients AdamW's eps damps.
    """
    lines = []
    if 'loss/layer' in row and sum(row['loss/layer']) > 0:
        total = sum(row['loss/layer'])
        shares = [loss / total for loss in row['loss/layer']]
        listed = ' '.join(f'{l}:{100 * share:.3g}' for l, share in zip(layers, shares, strict=True))
        lines.append(f'  share of each layer in the loss, per cent: {listed}')
        largest = max(shares)
        if largest > 10 * median(shares):
            layer = layers[shares.index(largest)]
            lines.append(f'  note: layer {layer} has {100 * largest:.0f}% of the loss, more than ten times '
                         'the median layer; rep_loss=cosine weighs all layers alike')
    if row.get('adam/below_eps', 0.0) > 0.1:
        lines.append(f"  note: the gradients of {100 * row['adam/below_eps']:.0f}% of the weights are below "
                     f'adam_eps={adam_eps:g}, which damps their steps; lower adam_eps=, or raise the loss '
                     '(rep_loss=cosine is d/2 times nmse)')
    return lines


def summary(rows):
    """The rows of log.jsonl -> results.json."""
    first = rows[0]
    last = rows[-1]
    cosines = [row['rep/cos'] for row in rows if 'rep/cos' in row]

    # The last step may have been evaluated otherwise than the models before the first one: eval_n= may
    # change when a run goes on. 'len/mean' is of the step's own answers.
    distilled = {}
    for name, value in last.items():
        if name.startswith(('avg@', 'best@', 'len')) and name != 'len/mean':
            distilled[name] = value
    return {'student': first['student'], 'teacher': first['teacher'],
            'distilled': distilled, 'steps': last['step'],
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
    is_step = type(steps) is int and 0 < steps < len(rows)
    if is_step:
        is_step = {'student', 'teacher'} <= rows[0].keys() and 'elapsed' in rows[steps]
    if not is_step or results != summary(rows[:steps + 1]):
        raise UserError(f'{file}: does not agree with log.jsonl; delete it, and the same command makes both '
                        'from the last checkpoint')
    return results
