"""
The numbers that the paper prints in its Tables 2 to 6, and whether a run of ours is at the same size.

    paper_row(4, config)         ('OPRD-Bridge r=8', [])       a run of this config belongs beside that row
    paper_row(2, toy_config)     (None, ["student='toy' (paper: 'deepseek-ai/...')", ...])

A run is at the paper's size if each key of its config that decides the result has the value of the paper's
experiment. That value is in the config files of this project, such as configs/r1_1p5b.py (PRINTED names the
command line of each row). Of models and problems the last part of a hub id or of a folder's name is compared,
so that a downloaded copy is the same model.

What it does not do: look into a bridge, whose own folder says how it was fitted, or into the weights of a
model. The row "bridge, then OPD top-1" has no command line, because the paper does not say when its run
changes from one term to the other.
"""
from dataclasses import dataclass
from functools import cache

from configs import default, free, load_config
from paper.runs import is_read
from support.runtime import shown

SETS = ('aime24', 'aime25', 'aimo')
SAME = ['configs/r1_1p5b.py']
WIDE = ['configs/bridge_qwen.py']
TOP1 = ['bridge=', 'oprd_weight=0', 'opd_weight=1', 'opd=sampled', 'positions=all']
TOP16 = ['bridge=', 'oprd_weight=0', 'opd_weight=1', 'opd=topk', 'positions=all']


@dataclass(frozen=True)
class Printed:
    """A table as the paper prints it."""
    title: str
    pair: str                   # between which models: 'same', 'bridge' or 'tokens' (paper/runs.py)
    metrics: tuple              # of METRICS
    numbers: dict               # {row: {metric: its values, in the order of SETS}}
    commands: dict              # {row: command line of distill.py at the paper's size}; a row may have none


PRINTED = {
    2: Printed(
        'accuracy, student and teacher of one architecture', 'same', ('avg',),
        {'teacher': {'avg': (50.8, 35.6, 79.5)},
         'student': {'avg': (32.9, 21.9, 62.2)},
         'OPD top-1': {'avg': (42.3, 33.5, 77.0)},
         'OPD top-16': {'avg': (47.1, 34.0, 76.5)},
         'OPRD': {'avg': (49.8, 34.6, 79.1)}},
        {'OPD top-1': ['configs/r1_opd_top1.py'], 'OPD top-16': ['configs/r1_opd_top16.py'], 'OPRD': SAME}),
    4: Printed(
        'accuracy through a bridge: a teacher of another depth or width', 'bridge', ('avg', 'best'),
        {'teacher': {'avg': (23.1, 25.2, 59.4), 'best': (50.0, 40.0, 80.7)},
         'student': {'avg': (0.6, 0.2, 7.5), 'best': (6.7, 3.3, 3.5)},
         'OPD top-1': {'avg': (8.5, 6.3, 31.0), 'best': (20.0, 13.3, 59.0)},
         'OPD top-16': {'avg': (6.7, 4.0, 20.5), 'best': (13.3, 6.7, 61.4)},
         'OPRD-Bridge r=8': {'avg': (5.0, 3.8, 24.8), 'best': (20.0, 13.3, 59.0)},
         'OPRD-Bridge r=8, then OPD top-1': {'avg': (9.6, 3.0, 28.2), 'best': (20.0, 16.7, 65.1)}},
        {'OPD top-1': [*WIDE, *TOP1], 'OPD top-16': [*WIDE, *TOP16], 'OPRD-Bridge r=8': WIDE}),
    5: Printed(
        'diversity and length of the answers of Table 4', 'bridge', ('dist', 'len'),
        {'teacher': {'dist': (24.0, 25.4, 41.6), 'len': (6542, 4426, 2384)},
         'student': {'dist': (2.9, 5.3, 3.5), 'len': (15422, 13123, 15106)},
         'OPD top-1': {'dist': (6.2, 6.4, 15.6), 'len': (19120, 17931, 11008)},
         'OPD top-16': {'dist': (9.9, 11.7, 13.6), 'len': (12222, 10175, 11833)},
         'OPRD-Bridge r=8': {'dist': (22.6, 17.2, 21.3), 'len': (5909, 5235, 4855)},
         'OPRD-Bridge r=8, then OPD top-1': {'dist': (12.5, 14.0, 18.4), 'len': (8855, 6690, 5961)}},
        {'OPD top-1': [*WIDE, *TOP1], 'OPD top-16': [*WIDE, *TOP16], 'OPRD-Bridge r=8': WIDE}),
    6: Printed(
        'accuracy through a bridge: a teacher of another vocabulary', 'tokens', ('avg', 'best'),
        {"OPRD-Bridge r=4, student's ids": {'avg': (4.0, 1.0, 10.0), 'best': (13.3, 13.3, 37.3)}},
        {"OPRD-Bridge r=4, student's ids": ['configs/bridge_phi.py', 'teacher_ids=student']}),
}

# Table 3, at 8 prompts in a step and answers of up to 16,384 tokens: GB on a GPU, and minutes of 500 steps.
MEMORY_AND_TIME = {'OPD top-1': (30.2, 813), 'OPD top-16': (45.0, 812), 'OPRD': (20.5, 563)}

# ---- is a run at this size? -----------------------------------------------------------------------

# Keys that change no score of a finished run, beside those of configs.free: how often something is saved,
# logged or looked at, and the seed.
HARMLESS = ('seed', 'date', 'save_every', 'keep', 'log_every', 'diagnose_every', 'diagnose_rows',
            'eval_every', 'eval_rows', 'eval_show', 'eval_teacher', 'bridge')
NAMES = ('student', 'teacher', 'data', 'eval_data')      # keys of which the last part is compared


def paper_row(number, config):
    """Which row of the paper's table has this config at its size? -> (the row's name, []), or (None, how the
    config differs from the row that is nearest)."""
    nearest = None
    for name in PRINTED[number].commands:
        differences = differences_from(config, paper_config(number, name))
        if not differences:
            return name, []
        if nearest is None or len(differences) < len(nearest):
            nearest = differences
    return None, nearest


@cache
def paper_config(number, name):
    """The config of a row of the paper's table, at its size."""
    return load_config(PRINTED[number].commands[name])


def differences_from(config, wanted):
    """How a config differs from the paper's in what decides the result -> ['steps=100 (paper: 500)', ...]."""
    # A run on GPUs notes the dtype that 'auto' stands for there.
    wanted = wanted | {'dtype': 'bfloat16'}
    differences = []
    for key in default:
        if key in free or key in HARMLESS or not is_read(key, wanted):
            continue

        # A run of an earlier version may lack a key; it then had the default's effect.
        value = config.get(key, default[key])
        same = last_part(value) == last_part(wanted[key]) if key in NAMES else value == wanted[key]
        if not same:
            differences.append(f'{key}={shown(value)} (paper: {wanted[key]!r})')
    if bool(config.get('bridge')) != bool(wanted['bridge']):
        differences.append('a bridge' if config.get('bridge') else 'no bridge')
    return differences


def last_part(names):
    """The last parts of hub ids or folders with commas between them, without revisions and endings:
    'Qwen/Qwen3-4B@main' -> 'qwen3-4b'."""
    parts = []
    for name in str(names).split(','):
        name = name.split('@')[0].rstrip('/').split('/')[-1]
        parts.append(name.removesuffix('.jsonl').removesuffix('.parquet').lower())
    return ','.join(parts)
