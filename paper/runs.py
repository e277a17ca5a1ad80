"""
Run folders -> runs sorted by method: which runs are seeds of one method, what a method is called, and which
runs may not stand in one figure or table.

    runs = read_runs(['out/toy_paper/oprd-s0', 'out/toy_paper/oprd-s1', 'out/toy_paper/opd_top-16-s0', ...])
    by_method(runs)              {'OPRD': [the run of seed 0, that of seed 1], 'OPD top-16': [...]}

A method is named by its objective: 'OPRD', 'OPD top-16', 'OPD full KL', 'next byte', 'OPD top-1 + 10 OPRD',
'OPRD-Bridge r=8', 'OPRD-Bridge r=16, then OPD top-1'. Where two methods would share a name, the keys that
differ are added, except where they have their default: 'OPRD' and 'OPRD, rep_loss=nmse, lr=0.002'. A key that
a run does not read makes no difference.

Simpler than a table of experiments: everything is read from config.json, starts.jsonl and log.jsonl, and the
names of folders mean nothing. Runs from different students, on different problems, or evaluated differently
are refused. A toy's student differs from seed to seed, so every method must then have the same seeds.
"""
import re
from dataclasses import dataclass, replace
from pathlib import Path

from configs import default, free, reads
from studies.drawing import LOOKS
from studies.figures import read_configs, read_log, require_comparable
from support.fields import Field, check_fields
from support.optimizer import ever_positive
from support.provenance import ANOTHER_RUN, lasting_starts, read_starts
from support.run_folder import teacher_scores
from support.runtime import UserError, cut, shown

# Keys that two seeds of one method may differ in: they say where the run happens, how often it is looked at,
# and what is kept. The bridge's folder is compared without its seed (see `method_key`).
HARMLESS = {*free, 'seed', 'date', 'bridge', 'keep'}
HARMLESS |= {key for key in default if key.startswith(('eval_', 'save_', 'log_', 'diagnose_'))}

# How a teacher can differ from its student, and in words.
PAIRS = {'same': 'teacher of the same architecture', 'bridge': 'teacher of another depth or width',
         'tokens': 'teacher of another vocabulary'}

# What a config must hold for its method to be named.
WEIGHT = Field(float, other=Field(list, 1, items=Field(list, 2, 2, items=Field(float))))
NAMED_BY = {'oprd_weight': WEIGHT, 'opd_weight': WEIGHT, 'opd': Field(str), 'opd_k': Field(int),
            'bridge': Field(str), 'bridge_rank': Field(int), 'seed': Field(int, 0), 'teacher': Field(str),
            'student': Field(str), 'teacher_ids': Field(str), 'lr': Field(float), 'eval_n': Field(int, 1),
            'reward_weight': WEIGHT, 'attention_weight': WEIGHT, 'teacher_sees': Field(str)}
FURTHER_TERMS = {'reward_weight': 'rewards', 'attention_weight': 'attention maps'}
LONGEST_VALUE = 30              # characters of a key's value in the name of a method

# Keys that a run reads only with a weight of Eq. (6), an output-space term, or a bridge; and only with one
# value of another key: {key: (the other key, its value)}.
HIDDEN_KEYS = ('rep_loss', 'layers', 'position_offset')
OUTPUT_KEYS = ('opd', 'opd_k', 'opd_support', 'opd_tail', 'kl_direction', 'student_temperature',
               'teacher_temperature', 'opd_future', 'opd_baseline')
BRIDGE_KEYS = ('layer_map', 'bridge_rank', 'bridge_normalise', 'pair', 'teacher_ids')
READ_WITH = {'opd_k': ('opd', 'topk'), 'opd_support': ('opd', 'topk'), 'opd_tail': ('opd', 'topk'),
             'opd_future': ('opd', 'sampled'), 'opd_baseline': ('opd', 'sampled')}
for key in ('last_k', 'first_k', 'last_frac', 'first_frac'):
    READ_WITH[key] = ('positions', key)


class Missing(UserError):
    """The given folders do not hold what a figure or table needs; the text says what is missing."""


@dataclass
class Run:
    """A run of distill.py, read from its folder."""
    folder: Path
    config: dict                # every key of configs/default.py
    rows: list                  # of log.jsonl, from step 0 on
    method: str                 # 'OPRD', 'OPD top-16', ...
    seed: int
    pair: str                   # how its teacher differs from its student, see `pair_of`


# ---- folders -------------------------------------------------------------------------------------

def kind_of_folder(folder):
    """'run' of distill.py, 'bridge' of bridge.py, or 'other'; a UserError if it is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; give folders of distill.py or bridge.py')
    if (folder / 'bridge.json').is_file():
        return 'bridge'
    return 'run' if (folder / 'log.jsonl').is_file() else 'other'


def of_kind(folders, kind):
    """Those of the folders that are of this kind."""
    return [folder for folder in folders if kind_of_folder(folder) == kind]


def folders_in(folder):
    """A folder of runs and bridges, such as out/toy_paper -> (its finished runs and its bridges, its
    other runs). A run or a bridge stands for itself."""
    if kind_of_folder(folder) != 'other':
        return [Path(folder)], []
    finished = []
    unfinished = []
    for child in sorted(Path(folder).iterdir()):
        kind = kind_of_folder(child) if child.is_dir() else 'other'
        if kind == 'run' and not (child / 'results.json').exists():
            unfinished.append(child)
        elif kind != 'other':
            finished.append(child)
    if not finished:
        raise UserError(f'{folder}: no finished run and no bridge in it; give folders of distill.py or '
                        'bridge.py')
    return finished, unfinished


def read_runs(folders):
    """Folders of distill.py -> [Run], in the same order. A UserError if they cannot be compared."""
    runs = []
    for folder, config in read_configs(folders).items():
        # A run of an earlier version lacks a key that has come since; it had the default's effect.
        config = default | config
        check_fields(config, NAMED_BY, f'{folder}/config.json', 'give a run folder of distill.py')
        rows = read_log(folder)
        if len(teacher_scores(rows[0])) > 1:
            raise UserError(f'{folder}: has several teachers, and the runs of the paper one; draw it with '
                            'python -m studies.figures')
        runs.append(Run(Path(folder), config, rows, method_of(config), config['seed'],
                        pair_of(config, rows[0])))
    refuse_different(runs)
    refuse_other_teachers(runs)
    return runs


# ---- may these runs be compared? -----------------------------------------------------------------

def refuse_different(runs):
    """UserError if two runs have different students, problems, or ways to evaluate.

    The seeds of a toy are different students. So its seeds are compared by their configs, and the files that
    they began with are compared within each seed.
    """
    configs = {str(run.folder): run.config | {'seed': 0} for run in runs}
    require_comparable(configs)
    first_of = {}                            # {seed: (run, what it began with)}; of real models one entry
    for run in runs:
        began = began_with(run)
        seed = run.seed if run.config['student'] == 'toy' else None
        first, first_began = first_of.setdefault(seed, (run, began))
        for key, what in (('student', ANOTHER_RUN['student']), ('eval_data', 'the held-out problems')):
            if key in began and key in first_began and began[key] != first_began[key]:
                raise UserError(f'{first.folder} and {run.folder} cannot be compared: they differ in {what}; '
                                'put them in separate figures')


def refuse_other_teachers(runs):
    """UserError if two runs of one pair have had different teachers: its scores are a line of a figure or
    table, and a method is judged by how near to it the student comes."""
    keys = ['teacher', *(key for key in default if key.startswith('toy_teacher_'))]
    first_of = {}                            # {pair: run}
    for run in runs:
        first = first_of.setdefault(run.pair, run)
        for key in keys:
            if first.config[key] != run.config[key]:
                raise UserError(f'{first.folder} and {run.folder} have different teachers: {key}='
                                f'{shown(first.config[key])} and {shown(run.config[key])}; put them in '
                                'separate figures')


def began_with(run):
    """What a run noted at its last start, with digests of the student and of the held-out problems; {} where
    there is no note."""
    starts = lasting_starts(read_starts(run.folder))
    return starts[-1] if starts else {}


def pair_of(config, names=()):
    """How the teacher differs from the student: 'same' architecture, 'bridge' (another depth or width, or
    states that are compared through a bridge), or 'tokens' (another vocabulary).

    names: of what the run's log holds. The toy's keys say it. Of real models the log does: it has 'align'
    only with another vocabulary, or with a solution in the teacher's prompt; and without cosines the states
    cannot be compared as they are.
    """
    if config['teacher'] == 'toy':
        if config['toy_teacher_tokens'] != 'same':
            return 'tokens'
        same_shape = all(config[f'toy_teacher_{key}'] in (0, config[f'toy_{key}'])
                         for key in ('layers', 'width'))
        return 'same' if same_shape and not config['bridge'] else 'bridge'
    if 'align' in names and config['teacher_sees'] == 'prompt':
        return 'tokens'
    return 'bridge' if config['bridge'] or 'rep/cos' not in names else 'same'


# ---- methods -------------------------------------------------------------------------------------

def method_of(config):
    """The name of a run's objective: 'OPRD', 'OPD top-1 + 10 OPRD', 'OPRD-Bridge r=8', 'OPRD + rewards' and
    so on."""
    terms = []
    if ever_positive(config['oprd_weight']) or ever_positive(config['opd_weight']):
        terms.append(equation7_of(config))
    terms += [name for key, name in FURTHER_TERMS.items() if ever_positive(config[key])]
    return ' + '.join(terms)


def equation7_of(config):
    """The name of the terms of Eq. (7) in a run's objective."""
    hidden = 'OPRD'
    if config['bridge']:
        hidden = f'OPRD-Bridge r={config["bridge_rank"]}'
        if config['bridge_rank'] == 0:
            hidden = 'OPRD-Bridge r of Theorem 3'
    if config['teacher_ids'] == 'student':
        hidden += ", student's ids"
    names = {'sampled': 'OPD top-1', 'topk': f'OPD top-{config["opd_k"]}', 'full': 'OPD full KL',
             'byte': 'next byte', 'supervised': 'supervised'}
    if config['opd'] not in names:
        raise UserError(f'opd={shown(config["opd"])}: no objective of this version; run distill.py again')
    output = names[config['opd']]

    # One of the two terms alone, or both with weights that stay.
    weights = (config['oprd_weight'], config['opd_weight'])
    if not ever_positive(weights[1]):
        return hidden
    if not ever_positive(weights[0]):
        return output
    if not any(isinstance(weight, list) for weight in weights):
        factor = '' if weights[1] == 1 else f'{weights[1]:g} '
        return f'{factor}{output} + {weights[0]:g} {hidden}'

    # Weights with knots: most often one term first, and then the other one alone.
    ends = []                                # of each term: has it weight at the beginning, and at the end?
    for weight in weights:
        knots = weight if isinstance(weight, list) else [[0, weight]]
        ends.append((knots[0][1] > 0, knots[-1][1] > 0))
    if ends == [(True, False), (False, True)]:
        return f'{hidden}, then {output}'
    if ends == [(False, True), (True, False)]:
        return f'{output}, then {hidden}'
    return f'{output} and {hidden}, changing weights'


def by_method(runs):
    """{name of a method: its runs, one of each seed}, in one order for all figures and tables: as in
    studies.drawing.LOOKS, then by rank, then as they come.

    Where methods would share a name, the keys that differ between them are added to it. UserError: a method
    has a seed twice; or the methods of a toy do not all have the same seeds.
    """
    groups = {}                              # {(name, method_key): runs}
    for run in sorted(runs, key=place_of):
        groups.setdefault((run.method, method_key(run.config)), []).append(run)
    methods = {}
    for name, seeds in zip(told_apart(list(groups)), groups.values(), strict=True):
        methods[name] = [replace(run, method=name) for run in sorted(seeds, key=lambda run: run.seed)]
    refuse_uneven_seeds(methods)
    return methods


def place_of(run):
    """Where a run's method stands among others."""
    names = list(LOOKS)
    name = re.sub(r' r=\d+', '', run.method)
    return (names.index(name) if name in names else len(names), run.config['bridge_rank'])


def told_apart(groups):
    """[(name, ((key, value as text), ...)), ...] -> names. Where two would be equal, the keys that differ
    between them are added: 'OPRD, lr=0.001'. A key with its default is not: the others tell it apart."""
    names = []
    for name, settings in groups:
        same_name = [dict(other) for other_name, other in groups if other_name == name]
        differing = []
        for key, value in settings:
            values = {f'{other.get(key)}' for other in same_name}
            if len(values) > 1 and value != f'{default.get(key)}':
                # A long list is cut in its middle, unless another one is alike but for that.
                text = cut(value, LONGEST_VALUE)
                alike = [other for other in values if cut(other, LONGEST_VALUE) == text]
                differing.append(f'{key}={text if len(alike) == 1 else value}')
        names.append(', '.join([name, *differing]))
    return names


def method_key(config):
    """What makes a method, apart from its name -> ((key, value as text), ...), of the keys that it reads. A
    bridge counts by the name of its folder without the run's seed: 'out/toy_paper/wide-stage1-s0' ->
    'wide-stage1'."""
    values = [(key, f'{config[key]}') for key in default if key not in HARMLESS and is_read(key, config)]
    bridge = re.sub(f'-s{config["seed"]}$', '', Path(config['bridge']).name)
    return (*values, ('bridge', bridge))


def is_read(key, config):
    """Does a run with this config read the key? A key that it does not read cannot change its result."""
    if key.startswith('toy_'):
        return 'toy' in (config['student'], config['teacher'], config['data'], config['eval_data'])
    if key in HIDDEN_KEYS and not ever_positive(config['oprd_weight']):
        return False
    if key in OUTPUT_KEYS and not ever_positive(config['opd_weight']):
        return False
    if key in BRIDGE_KEYS and not config['bridge']:
        return False
    if key in READ_WITH:
        other, value = READ_WITH[key]
        return config[other] == value
    return key in reads['distill.py']


def refuse_uneven_seeds(methods):
    """UserError if a method has a seed twice, or if the methods of a toy have different seeds: a mean over
    other students could not be compared."""
    first_name = next(iter(methods), None)
    for name, runs in methods.items():
        seeds = [run.seed for run in runs]
        for earlier, later in zip(runs, runs[1:], strict=False):
            if earlier.seed == later.seed:
                raise UserError(f'{earlier.folder} and {later.folder}: one method with one seed; give one of '
                                'them')
        wanted = [run.seed for run in methods[first_name]]
        if runs[0].config['student'] == 'toy' and seeds != wanted:
            raise UserError(f'{first_name} has the seeds {listed(wanted)}, {name} has {listed(seeds)}, and a '
                            'toy has another student for each seed; give the same seeds of all methods, for '
                            'instance out/toy_paper/*-s0')


def listed(numbers):
    return ', '.join(str(number) for number in numbers)


# ---- what a run took -------------------------------------------------------------------------------

def seconds_of_steps(rows):
    """Seconds of all phases of all steps of a log, without evaluations and looks at what the objective leaves
    out."""
    total = 0.0
    for row in rows:
        for name, value in row.items():
            if name.startswith('time/') and name != 'time/diagnose' and value is not None:
                total += value
    return total


def machines_of(folder):
    """On what a run's steps were made -> ['cpu, ranks 1, threads 1'], one text for each kind."""
    kinds = []
    for start in lasting_starts(read_starts(folder)):
        made = start['versions']
        kinds.append(f'{made.get("device")}, ranks {made.get("ranks")}, threads {made.get("threads")}')
    return list(dict.fromkeys(kinds)) or ['a machine that the run does not name']
