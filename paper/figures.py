"""
The paper's figures that are drawn from what runs and bridges have written: Figures 1, 4 to 7 and 9 to 12.

    python -m paper figure4 out/toy_paper         Figure 4 of all finished runs in a folder
    python -m paper figure7 out/a out/b to=out/x  Figure 7 of two runs, written into out/x

    1   accuracy against time, with bubbles as large as the memory of the update
    4   held-out accuracy over steps, a panel for each set      9   the output-space term over steps
    5   length of the training answers                          10  overlap of the 16 likeliest tokens
    6   cosine of the hidden states, and of each layer          11  entropies of student and teacher
    7   accuracy with weights mu of Eq. (6) beside Eq. (3)      12  a bridge's cosine against its rank

Each figure is three functions: figure4_data(runs) makes the numbers, draw_figure4(data, file) only draws
them, and figure4(folders, to) reads the folders, and writes figure4.json, .png and .pdf. Figures 5 and 9 to
11 share two of them, and OVER_STEPS says what each shows. Runs with a teacher of another shape or vocabulary
get a figure of their own: figure4_bridge.png, figure4_tokens.png.
A figure shows the runs that are evaluated during training; runs that are evaluated only before and after it
are drawn where all are such runs, and are otherwise named under 'left out' in the JSON file.

Simpler than usual: nothing is fitted and nothing is interpolated. A line is the mean over seeds, and the thin
lines beside it are the seeds. Figure 8 measures two models and is in first_last.py.
"""
from bisect import bisect_left, bisect_right
from functools import partial
from pathlib import Path
from statistics import fmean

from paper.runs import (
    PAIRS,
    Missing,
    began_with,
    by_method,
    machines_of,
    method_key,
    of_kind,
    read_runs,
    seconds_of_steps,
    told_apart,
)
from studies.drawing import COLUMN, PAGE, draw_seeds, look_of, new_figure, paper_style, save
from studies.figures import LARGEST, accuracy, accuracy_metrics, draw_layers, layer_names, read_bridge
from support.fields import Field, check_fields
from support.files import write_json
from support.optimizer import ever_positive
from support.run_folder import scores_of
from support.runtime import UserError

MAKE_RUNS = 'python -m studies.compare toy_paper makes such runs of the toy'
MAKE_BRIDGE = 'python bridge.py configs/toy_bridge.py makes one of the toy'
DRAWN = Field(float, -1e9, 1e9)              # a value of a log; a mean of them cannot overflow
COUNTS = Field(dict, items=Field(int, 0, 10**9), default={})
WINDOW = 3                      # evaluations in a rolling mean of Figure 4: one and its two neighbours
FEW = 10                        # with fewer evaluations than these, Figure 4 shows them as they are
WHITE = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 1}        # behind a number beside a point


# ---- from folders to files -------------------------------------------------------------------------

def draw_pairs(name, folders, to, data_of, draw):
    """A figure of each pair of models that the folders hold -> list of files. data_of, draw: the figure's own
    functions. Missing if no pair can feed it."""
    runs = read_runs(of_kind(folders, 'run'))
    if not runs:
        raise Missing(f'no run of distill.py in the folders; {MAKE_RUNS}')
    files = []
    missing = None
    for pair in PAIRS:
        of_pair = [run for run in runs if run.pair == pair]
        if not of_pair:
            continue
        try:
            data = data_of(of_pair)
        except Missing as error:
            missing = missing or error
            continue
        ending = '' if pair == 'same' else f'_{pair}'
        files += write_figure(data, draw, Path(to) / f'{name}{ending}')
    if not files:
        raise missing
    return files


def write_figure(data, draw, file):
    """Write a figure and its numbers -> list of files. file: without an ending."""
    write_json(file.with_suffix('.json'), data)
    return [file.with_suffix('.json'), *draw(data, file)]


# ---- from runs to numbers ------------------------------------------------------------------------

def shown_runs(runs):
    """The runs of one pair -> (those that a figure shows, those that it leaves out). Methods that are
    evaluated only before and after training have no curve; they are shown if no other method has one."""
    have_curve = set()                       # methods
    for run in runs:
        if len(accuracy(run.rows)[0]) > 2:
            have_curve.add((run.method, method_key(run.config)))
    if not have_curve:
        return runs, []
    shown = []
    left_out = []
    for run in runs:
        has_curve = (run.method, method_key(run.config)) in have_curve
        (shown if has_curve else left_out).append(run)
    return shown, left_out


def common_data(runs):
    """What the file of every figure says about its runs: which they are, and how many answers are behind a
    score."""
    chosen, left_out = shown_runs(runs)
    methods = by_method(chosen)
    return methods, {
        'pair': PAIRS[runs[0].pair],
        'runs': {name: [run.folder.name for run in seeds] for name, seeds in methods.items()},
        'seeds': {name: [run.seed for run in seeds] for name, seeds in methods.items()},
        'left out': [run.folder.name for run in left_out],
        'problems': problems_of(chosen[0]),
        'answers': chosen[0].config['eval_n'],
    }


def problems_of(run):
    """{held-out set: number of its problems}, as the run noted it; {} where it did not."""
    noted = began_with(run).get('problems', {})
    file = run.folder / 'starts.jsonl'
    return check_fields(noted, {'eval_data': COUNTS}, f'{file}: problems', 'delete it')['eval_data']


def metrics_of(methods):
    """Names of the accuracies in the logs: first the plain one, then one for each set.

    Missing if the runs were not evaluated. UserError: a run that has gone on with another eval_n has scores
    of two kinds, and no curve.
    """
    runs = [run for seeds in methods.values() for run in seeds if accuracy_metrics(run.rows)]
    if not runs:
        raise Missing(f'the runs were not evaluated; {MAKE_RUNS}')
    names = accuracy_metrics(runs[0].rows)
    for run in runs:
        found = accuracy_metrics(run.rows)
        if found != names or found[0] != f'avg@{run.config["eval_n"]}':
            raise UserError(f'{run.folder}: scores of {", ".join(found)} before the first step, where eval_n='
                            f'{run.config["eval_n"]} and {runs[0].folder} has {", ".join(names)}; give runs '
                            'that were evaluated alike from their first step on')
    return names


def curve_of(seeds, name):
    """What the runs of one method have logged under a name -> {'steps', 'by_seed'}; None if it is nothing.

    UserError: the runs have measured it after different steps, so there is no mean over them.
    """
    curves = []
    for run in seeds:
        measured = [row for row in run.rows if row.get(name) is not None]
        for row in measured:
            check_fields(row, {name: DRAWN}, f'{run.folder}/log.jsonl:{row["step"] + 1}', 'restore the file')
        curves.append(([row['step'] for row in measured], [row[name] for row in measured]))
    steps = curves[0][0]
    for run, (other, _) in zip(seeds, curves, strict=True):
        if other != steps:
            found = f'{steps_in_words(steps)}; {steps_in_words(other)}'
            raise UserError(f'{seeds[0].folder} and {run.folder} are seeds of {run.method} and have {name} '
                            f'after other steps ({found}); finish both, or give one of them')
    if not steps:
        return None
    return {'steps': steps, 'by_seed': [values for _, values in curves]}


def steps_in_words(steps):
    """'0, 20, ... 100'"""
    if len(steps) < 4:
        return ', '.join(str(step) for step in steps) or 'none'
    return f'{steps[0]}, {steps[1]}, ... {steps[-1]}'


def curves_data(runs, names, what):
    """{name of the log: its curves of every method} with what is common. Missing if no run has them."""
    methods, data = common_data(runs)
    for name in names:
        data[name] = {}
        for method, seeds in methods.items():
            curve = curve_of(seeds, name)
            if curve:
                data[name][method] = curve
    if not any(data[name] for name in names):
        raise Missing(f'no run has logged {" or ".join(names)}, {what}; {MAKE_RUNS}')
    return data


def first_models(methods, metric):
    """Scores of the models before the first step, the same for all methods -> {'student', 'teacher'}, means
    over seeds; a teacher that was not evaluated is left out."""
    longest = max(methods.values(), key=len)
    scores = {}
    for side, start in (('student', 'eval'), ('teacher', 'teacher')):
        of_seeds = [scores_of(run.rows[0], start) for run in longest]
        if all(metric in values for values in of_seeds):
            scores[side] = fmean(values[metric] for values in of_seeds)
    return scores


def rolling(steps, values, window):
    """Centred rolling mean over so many steps, an odd number. Near both ends it takes as few on one side as
    there are on the other, so that the first value stays as it is: all methods begin with one student."""
    means = []
    for step in steps:
        half = min(window // 2, step - steps[0], steps[-1] - step)
        first = bisect_left(steps, step - half)
        behind = bisect_right(steps, step + half)
        means.append(fmean(values[first:behind]))
    return means


# ---- what the drawings share ---------------------------------------------------------------------

def mean_of_seeds(data, smooth='', thin='the seeds'):
    """What the lines are, as a text under a figure. smooth: how the thick ones were smoothed. thin: what the
    thin ones are; of one seed, "the seeds" have none."""
    counts = sorted({len(seeds) for seeds in data['seeds'].values()})
    number = str(counts[0]) if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'
    mean = 'one seed' if counts == [1] else f'mean of {number} seeds'
    thick = f'{mean}, {smooth}' if smooth else mean
    if counts == [1] and thin == 'the seeds':
        return f'Lines: {thick}.'
    return f'Thick lines: {thick}. Thin lines: {thin}.'


def answers_of(data):
    """What a point is, and how many answers a score stands for, as a text under a figure."""
    problems = sum(data['problems'].values())
    counts = f'{problems} problems, {data["answers"]} answers to each.' if problems else ''
    several = any(len(seeds) > 1 for seeds in data['seeds'].values())
    return f'Small points: the seeds. {counts}' if several else counts


def figure_of(count, sharey):
    """-> (figure, so many panels, at most three side by side). sharey: they have one y axis."""
    columns = min(count, 3)
    rows = -(-count // columns)
    width = PAGE if count > 1 else COLUMN
    figure, panels = new_figure(rows, columns, width, height=2.5 * rows, sharey=sharey)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def draw_curves(axes, curves, key):
    """Every method's curve in its look. key: 'smooth', or 'by_seed' for the values as they are."""
    for method, curve in curves.items():
        draw_seeds(axes, curve['steps'], curve[key], method, look_of(method))


def draw_models(axes, scores):
    """Horizontal lines for the models before the first step."""
    for side in ('teacher', 'student'):
        if side in scores:
            look = look_of(side)
            axes.axhline(scores[side], color=look['color'], ls=look['linestyle'], lw=1, label=side)


# ---- Figure 1 ------------------------------------------------------------------------------------

def figure1_data(runs):
    """Of every method and seed: the last accuracy, minutes of the steps up to there, and GB of the update."""
    methods, data = common_data(runs)
    metric = metrics_of(methods)[0]
    data |= {'metric': metric, 'machine': one_machine(methods), 'methods': {}}
    data |= first_models(methods, metric)
    for method, seeds in methods.items():
        curve = curve_of(seeds, f'eval/{metric}')
        if curve is None:
            continue
        memory = curve_of(seeds, 'mem/update_dpeak')
        steps = curve['steps'][-1]           # a run that is not finished may have made more
        data['methods'][method] = {
            'steps': steps,
            'accuracy': [values[-1] for values in curve['by_seed']],
            'minutes': [seconds_of_steps(run.rows[:steps + 1]) / 60 for run in seeds],
            'gigabytes': memory and [max(values) for values in memory['by_seed']],
        }
    return data


def one_machine(methods):
    """The kind of machine that made all runs; a UserError if there are two, whose times mean nothing side by
    side."""
    made_on = {}                             # {kind of machine: one of its runs}
    for seeds in methods.values():
        for run in seeds:
            for machine in machines_of(run.folder):
                made_on.setdefault(machine, run)
    if len(made_on) > 1:
        (machine, run), (other_machine, other), *_ = made_on.items()
        raise UserError(f'{run.folder} was made on {machine}, and {other.folder} on {other_machine}; their '
                        'times cannot be compared; put them in separate figures')
    return next(iter(made_on))


def draw_figure1(data, file):
    """Bubbles: their area is memory, their middle the mean over seeds; the seeds are small points."""
    peaks = [max(method['gigabytes']) for method in data['methods'].values() if method['gigabytes']]
    measured = len(peaks) == len(data['methods']) and min(peaks) > 0
    with paper_style():
        figure, (axes,) = new_figure(width=COLUMN, height=2.6)
        for name, method in data['methods'].items():
            look = look_of(name)
            middle = (fmean(method['minutes']), fmean(method['accuracy']))
            area = 500 * fmean(method['gigabytes']) / max(peaks) if measured else 150
            axes.scatter(*middle, s=area, color=look['color'], alpha=0.3, lw=0, clip_on=False)
            axes.scatter(method['minutes'], method['accuracy'], s=3, color=look['color'], lw=0)
            axes.plot(*middle, label=name, **look | {'linestyle': 'None'})
        draw_models(axes, data)
        axes.set(xlabel='time of all steps, minutes', ylabel=f'Avg@{data["answers"]}, %')
        axes.margins(y=0.12)
        axes.set_xlim(left=0, right=1.15 * axes.get_xlim()[1])
        notes = [f'{answers_of(data)} Made on {data["machine"]}.']
        if measured:
            notes.append(f'Area of bubbles: memory of the update, the largest {max(peaks):.1f} GB.')
        else:
            notes.append('Bubbles are equal: memory was not measured.')
        if data['pair'] != PAIRS['same']:
            notes.append('Stage 1 of a bridge is not counted.')
        return save(figure, file, ' '.join(notes))


def figure1(folders, to='out/paper'):
    """Accuracy against time and memory."""
    return draw_pairs('figure1', folders, to, figure1_data, draw_figure1)


# ---- Figure 4 ------------------------------------------------------------------------------------

def figure4_data(runs):
    """Of every held-out set: each method's accuracies, and their rolling mean over evaluations."""
    methods, data = common_data(runs)
    metrics = metrics_of(methods)
    data |= {'metric': metrics[0], 'window': WINDOW, 'sets': {}}

    # Of several sets the first name is their mean, which has no panel of its own.
    for metric in metrics[1:] or metrics:
        curves = {}
        for method, seeds in methods.items():
            curve = curve_of(seeds, f'eval/{metric}')
            if curve is None:
                continue
            mean = [fmean(values) for values in zip(*curve['by_seed'], strict=True)]
            if len(mean) >= FEW:
                mean = rolling(range(len(mean)), mean, WINDOW)
            curve['mean'] = mean
            curves[method] = curve
        name = metric.partition('/')[2] or next(iter(data['problems']), 'held-out problems')
        data['sets'][name] = {'methods': curves, **first_models(methods, metric)}
    return data


def draw_figure4(data, file):
    """A panel for each set: thick lines are rolling means, thin ones the evaluations of each seed."""
    smooth = any(len(curve['steps']) >= FEW for values in data['sets'].values()
                 for curve in values['methods'].values())
    with paper_style():
        figure, panels = figure_of(len(data['sets']), sharey=False)
        for axes, (name, values) in zip(panels, data['sets'].items(), strict=True):
            for method, curve in values['methods'].items():
                look = look_of(method)
                for seed in curve['by_seed']:
                    axes.plot(curve['steps'], seed, color=look['color'], lw=0.5, alpha=0.5)
                axes.plot(curve['steps'], curve['mean'], label=method, **look)
            draw_models(axes, values)
            count = f', {data["problems"][name]} problems' if name in data['problems'] else ''
            axes.set(xlabel='step', title=f'{name}{count}')
        panels[0].set_ylabel(f'Avg@{data["answers"]}, %')
        lines = mean_of_seeds(data)
        if smooth:
            mean = f'centred mean of {WINDOW} evaluations'
            lines = mean_of_seeds(data, mean, 'the evaluations of each seed')
        return save(figure, file, f'{lines} {data["answers"]} answers to each problem.')


def figure4(folders, to='out/paper'):
    """Held-out accuracy over steps."""
    return draw_pairs('figure4', folders, to, figure4_data, draw_figure4)


# ---- Figures 5, 9, 10 and 11: what the log says over steps -----------------------------------------

# {figure: (what it shows, {name of the log: label of its y axis}, a panel for each)}
OVER_STEPS = {
    'figure5': ('the length of answers', {'len/mean': 'length of an answer, tokens'}),
    'figure9': ('a term in the output space', {'loss/opd': 'output-space term, nats'}),
    'figure10': ('the overlap of the 16 likeliest tokens',
                 {'opd/overlap16': 'overlap of the 16 likeliest tokens'}),
    'figure11': ('entropies', {'entropy/student': 'entropy of the student, nats',
                               'entropy/teacher': 'entropy of the teacher, nats'}),
}


def over_steps_data(name, runs):
    """The curves of a figure of OVER_STEPS, with a rolling mean over a tenth of the steps beside each: a
    rollout is a small sample, and methods that jump from step to step cannot be told apart."""
    what, panels = OVER_STEPS[name]
    data = curves_data(runs, list(panels), what)
    curves = [curve for panel in panels for curve in data[panel].values()]
    data['window'] = 1 + 2 * (max(curve['steps'][-1] for curve in curves) // 20)
    for curve in curves:
        curve['smooth'] = [rolling(curve['steps'], values, data['window']) for values in curve['by_seed']]
    return data


def draw_over_steps(name, data, file):
    """Its panels."""
    _, panels = OVER_STEPS[name]
    width = COLUMN if len(panels) == 1 else PAGE
    with paper_style():
        figure, axes = new_figure(columns=len(panels), width=width, height=2.5)
        for panel, (logged, label) in zip(axes, panels.items(), strict=True):
            draw_curves(panel, data[logged], 'smooth')
            panel.set(xlabel='step', ylabel=label)
        return save(figure, file, mean_of_seeds(data, f'centred mean of {data["window"]} steps'))


def over_steps(name, folders, to):
    """Read the folders, and write a figure of OVER_STEPS -> list of files."""
    return draw_pairs(name, folders, to, partial(over_steps_data, name), partial(draw_over_steps, name))


def figure5(folders, to='out/paper'):
    """Length of the training answers over steps."""
    return over_steps('figure5', folders, to)


def figure9(folders, to='out/paper'):
    """The output-space term over steps, of the methods that have one."""
    return over_steps('figure9', folders, to)


def figure10(folders, to='out/paper'):
    """Share of the 16 likeliest tokens that both models have in common, over steps."""
    return over_steps('figure10', folders, to)


def figure11(folders, to='out/paper'):
    """Entropies of student and teacher on the answers of the student, over steps."""
    return over_steps('figure11', folders, to)


# ---- Figure 6 ------------------------------------------------------------------------------------

def figure6_data(runs):
    """Cosines of student and teacher: of every method the mean over layers, and each layer of two methods:
    the first one that matches hidden states, and the last one that does not, which sees most of the output
    distribution."""
    data = curves_data(runs, ['rep/cos'], 'cosines of the hidden states')
    methods, _ = common_data(runs)
    matching = []
    others = []
    for method in data['rep/cos']:
        matches = ever_positive(methods[method][0].config['oprd_weight'])
        (matching if matches else others).append(method)
    data['layers'] = {method: layers_of(methods[method]) for method in [*matching[:1], *others[-1:]]}
    return data


def layers_of(seeds):
    """{layer: its cosines} of one method's runs, as text for JSON."""
    layers = {}
    for name in layer_names(seeds[0].rows):
        layers[name.removeprefix('rep/cos/')] = curve_of(seeds, name)
    return layers


def draw_figure6(data, file):
    """Left: the mean over layers of every method. Then: the layers of two methods."""
    with paper_style():
        figure, (left, *others) = new_figure(columns=1 + len(data['layers']), height=2.5, sharey=True)
        draw_curves(left, data['rep/cos'], 'by_seed')
        left.set(xlabel='step', ylabel='cosine to the teacher', title='mean over layers')
        for axes, (method, layers) in zip(others, data['layers'].items(), strict=True):
            draw_layers(figure, axes, rows_of_means(layers))
            axes.set(xlabel='step', title=f'layers, {method}')
        return save(figure, file, mean_of_seeds(data))


def rows_of_means(layers):
    """Curves of layers -> rows as a log has them, of means over seeds."""
    steps = next(iter(layers.values()))['steps']
    rows = [{'step': step} for step in steps]
    for layer, curve in layers.items():
        for row, values in zip(rows, zip(*curve['by_seed'], strict=True), strict=True):
            row[f'rep/cos/{layer}'] = fmean(values)
    for row in rows:
        row['rep/cos'] = fmean(row[f'rep/cos/{layer}'] for layer in layers)
    return rows


def figure6(folders, to='out/paper'):
    """Cosine of the hidden states over steps."""
    return draw_pairs('figure6', folders, to, figure6_data, draw_figure6)


# ---- Figure 7 ------------------------------------------------------------------------------------

def figure7_data(runs):
    """Of each weight mu of Eq. (6) beside Eq. (3): the accuracies over steps, the last ones, and the learning
    rate. Weights that change during a run are not compared."""
    methods, data = common_data(runs)
    data |= {'metric': metrics_of(methods)[0], 'methods': {}}
    for method, seeds in methods.items():
        config = seeds[0].config
        weights = (config['oprd_weight'], config['opd_weight'])
        constant = not any(isinstance(weight, list) for weight in weights)
        curve = curve_of(seeds, f'eval/{data["metric"]}')
        if config['opd'] == 'sampled' and constant and weights[1] > 0 and curve:
            data['methods'][method] = {'mu': weights[0] / weights[1], 'lr': config['lr'], **curve}
    if len({values['mu'] for values in data['methods'].values()}) < 2:
        raise Missing(f'fewer than two weights mu of Eq. (6) beside OPD top-1; {MAKE_RUNS}')
    data |= first_models(methods, data['metric'])
    return data


def draw_figure7(data, file):
    """Left: accuracy over steps. Right: after the last step, against mu."""
    with paper_style():
        figure, (left, right) = new_figure(columns=2, height=2.5, sharey=True)
        by_mu = sorted(data['methods'].items(), key=lambda item: item[1]['mu'])
        for number, (method, values) in enumerate(by_mu):
            look = look_of(method)
            draw_seeds(left, values['steps'], values['by_seed'], method, look)
            last = [seed[-1] for seed in values['by_seed']]
            right.plot(number, fmean(last), **look | {'linestyle': 'None'})
            right.scatter([number - 0.12] * len(last), last, s=4, color=look['color'], lw=0)
            right.annotate(f'{fmean(last):.1f}', (number, fmean(last)), (6, 0), textcoords='offset points',
                           va='center', bbox=WHITE)
        draw_models(left, data)
        draw_models(right, data)
        left.set(xlabel='step', ylabel=f'Avg@{data["answers"]}, %', title='over steps')
        labels = [f'{values["mu"]:g}\nlr={values["lr"]:g}' for _, values in by_mu]
        right.set(xlabel='weight mu of Eq. (6)', xlim=(-0.5, len(by_mu) - 0.3), title='after the last step')
        right.set_xticks(range(len(by_mu)), labels)
        notes = f'{mean_of_seeds(data)} {answers_of(data)}'
        return save(figure, file, notes)


def figure7(folders, to='out/paper'):
    """Accuracy with weights mu of Eq. (6) beside Eq. (3)."""
    return draw_pairs('figure7', folders, to, figure7_data, draw_figure7)


# ---- Figure 12 -----------------------------------------------------------------------------------

# What makes two bridges of one kind; they then differ in the seed.
SETTINGS = ('L', 'd', 'positions', 'pair', 'layer_map', 'bridge_prompts', 'bridge_held_out', 'bridge_fit',
            'bridge_ridge', 'bridge_bias')
PAIR = Field(list, 2, 2, items=Field(int, 1, LARGEST))   # of the student, of the teacher
JOINS = {'d': PAIR, 'L': PAIR, 'tokens': Field(list, 2, 2, items=Field(str)), 'teacher_ids': Field(str)}


def figure12_data(folders):
    """Folders of bridges -> of each kind of bridge its held-out cosines before and after stage 1, means over
    layers, at every rank that was judged. Bridges of one kind are seeds."""
    groups = {}                              # {(name, settings): [(folder, bridge.json)]}
    for folder in folders:
        made = read_bridge(folder)
        check_fields(made, JOINS, Path(folder) / 'bridge.json', 'rerun bridge.py')
        settings = tuple((key, f'{made.get(key)}') for key in SETTINGS)
        groups.setdefault((joined_models(made), settings), []).append((folder, made))
    if not groups:
        raise Missing(f'no bridge in the folders; {MAKE_BRIDGE}')
    data = {'seeds': {}, 'bridges': {}}
    for name, seeds in zip(told_apart(list(groups)), groups.values(), strict=True):
        data['seeds'][name] = [Path(folder).name for folder, _ in seeds]
        data['bridges'][name] = curves_of_bridges([made for _, made in seeds])
    return data


def joined_models(made):
    """The models of a bridge in words: '6 layers, width 160', and what is special about its vocabulary."""
    name = f'{made["L"][1]} layers, width {made["d"][1]}'
    if made['tokens'][0] != made['tokens'][1]:
        name += ', other tokens'
    if made['teacher_ids'] == 'student':
        name += ", student's ids"
    return name


def curves_of_bridges(seeds):
    """Contents of bridge.json of every seed -> cosines before and after stage 1, at the ranks that all seeds
    have, and where the mean is largest."""
    ranks_of = [set(next(iter(made['layers'].values()))['cos']) for made in seeds]
    ranks = sorted(int(rank) for rank in set.intersection(*ranks_of))
    if not ranks:
        raise UserError('bridge.json: the seeds of a bridge were judged at no common rank; rerun bridge.py')
    curves = {'ranks': ranks}
    for key, title in (('cos', 'after'), ('before', 'before')):
        curves[title] = []
        for made in seeds:
            layers = made['layers'].values()
            curves[title].append([fmean(layer[key][str(rank)] for layer in layers) for rank in ranks])
    mean = [fmean(values) for values in zip(*curves['after'], strict=True)]
    best = max(range(len(mean)), key=mean.__getitem__)
    return curves | {'best rank': ranks[best], 'best': mean[best], 'at full width': mean[-1],
                     'rank of Theorem 3': [made['rank'] for made in seeds]}


def draw_figure12(data, file):
    """A panel for each kind of bridge."""
    with paper_style():
        figure, panels = figure_of(len(data['bridges']), sharey=True)
        for axes, (name, curves) in zip(panels, data['bridges'].items(), strict=True):
            draw_seeds(axes, curves['ranks'], curves['after'], 'after stage 1', look_of('OPRD-Bridge'))
            draw_seeds(axes, curves['ranks'], curves['before'], 'before stage 1',
                       look_of('student') | {'marker': 'o'})
            axes.axvline(fmean(curves['rank of Theorem 3']), color='0.3', ls='-.', lw=0.8,
                         label="Theorem 3's rank")
            best = (curves['best rank'], curves['best'])
            label = f'{curves["best"]:.3f} at r = {curves["best rank"]}'
            axes.annotate(label, best, (0, -9), textcoords='offset points', va='top', bbox=WHITE)
            axes.set(xscale='log', xlabel='rank r', title=f'teacher: {name}')
            powers = [2**exponent for exponent in range(curves['ranks'][-1].bit_length())]
            ticks = powers[::1 + len(powers) // 8]
            axes.set_xticks(ticks, ticks)
            axes.minorticks_off()
        panels[0].set_ylabel('held-out cosine, mean over layers')
        return save(figure, file, mean_of_seeds(data))


def figure12(folders, to='out/paper'):
    """A bridge's held-out cosine against its rank."""
    return write_figure(figure12_data(of_kind(folders, 'bridge')), draw_figure12, Path(to) / 'figure12')
