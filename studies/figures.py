"""
Figures from run folders: what distill.py and bridge.py have logged, drawn by matplotlib into a PNG.

    python -m studies.figures out/toy                 one run: out/toy/curve.png
    python -m studies.figures out/a out/b out/c       several runs in one figure, in the first one's folder
    python -m studies.figures out/toy_bridge_stage1   one bridge, or several: out/toy_bridge_stage1/bridge.png

A run. Left: accuracy over steps, with lines for the untrained student and the teacher (the paper's Figure 4).
Right: cosine of the matched states, a line for each layer, and their mean (Figure 6). distill.py draws it
anew at every evaluation.
A bridge. Left: held-out cosine against rank (Figure 12). Right: each layer at the rank that is used.

Simpler than usual: it reads log.jsonl, config.json and bridge.json, and no tracker or event file. Runs that
start from different students, or that are evaluated differently, are refused: in one panel their curves
would look comparable and are not. Many runs with a table and seeds: studies/compare.py.
"""
import re
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from configs import default
from support.command_help import command_words
from support.fields import Field, check_fields
from support.files import read_json, whole
from support.provenance import mixed_code
from support.run_folder import log_rows, scores_of
from support.runtime import UserError, cut, print0, printable, run, shown

# The lines of a single bridge's figure: key in bridge.json, and label.
BRIDGE_LINES = {'cos': 'bridge', 'before': 'random P_S', 'shuffled': 'shuffled pairs',
                'mean_only': 'mean alone'}
NUMBERS = Field(dict, 1, items=Field(float, -10, 10))    # {rank: cosine}; a mean of them cannot overflow
LARGEST = 10**6                 # more than any rank or layer
BRIDGE = {'rank': Field(int, 1, LARGEST), 'used': Field(int, 1, LARGEST),
          'layers': Field(dict, 1, items=Field(dict))}
CONFIG = {'config': Field(dict)}                         # config.json
MOST_MARKERS = 40               # with more points than these, a line is drawn without markers
MOST_LABELS = 10                # with more layers than these, a color bar says which line is which


# ---- what a run folder says ----------------------------------------------------------------------

def read_log(folder):
    """The rows of a run's log.jsonl: step 0 and at least one more."""
    rows = log_rows(Path(folder) / 'log.jsonl')
    file = f'{folder}/log.jsonl'
    if len(rows) < 2:
        raise UserError(f'{file}: no steps in it; run distill.py first')

    # What is drawn together must have been measured together.
    scores = [scores_of(rows[0], side) for side in ('eval', 'teacher')]
    if scores[1] and scores[0].keys() != scores[1].keys():
        raise UserError(f'{file}:1: wants the same scores of student and teacher; run distill.py again')
    layers = layer_names(rows)
    for number, row in enumerate(rows, 1):
        measured = [name for name in layers if row[name] is not None]
        has_mean = row.get('rep/cos') is not None
        if has_mean != bool(measured) or has_mean and measured != layers:
            raise UserError(f'{file}:{number}: the cosines of {len(measured)} of {len(layers)} layers, and '
                            f'{"a" if has_mean else "no"} mean; run distill.py again')
    return rows


def layer_names(rows):
    """The names in a log of the cosines of single layers, in the order of the layers: 'rep/cos/1', ..."""
    return [name for name in rows[0] if re.fullmatch('rep/cos/[1-9][0-9]{0,5}', name)]


def read_bridge(folder):
    """A folder's bridge.json, with what the figure needs: of every layer each line's cosines at the same
    ranks, the rank that is used among them."""
    file = Path(folder) / 'bridge.json'
    made = read_json(file)
    advice = 'rerun bridge.py'
    check_fields(made, BRIDGE, file, advice)
    ranks = None
    for layer, values in made['layers'].items():
        check_fields(values, dict.fromkeys(BRIDGE_LINES, NUMBERS), f'{file}: layer {shown(layer)}', advice)
        for key in BRIDGE_LINES:
            ranks = ranks or list(values[key])
            whole_numbers = all(re.fullmatch('[1-9][0-9]{0,5}', name) for name in (layer, *ranks))
            if not whole_numbers or list(values[key]) != ranks or str(made['used']) not in ranks:
                raise UserError(f'{file}: layer {shown(layer)}: {key} has other ranks; {advice}')
    return made


def accuracy_metrics(rows):
    """Names of the accuracies of the student before the first step: first the plain one ('avg@16', of several
    sets their mean), then one for each set ('avg@16/aime24'); [] if nothing was evaluated."""
    return [name for name in scores_of(rows[0], 'eval') if name.startswith('avg@')]


def accuracy(rows, metric=None):
    """Points (step, Avg@n) of a log, and the metric's name; [] and None if nothing was evaluated. metric: one
    set's; default: the plain one."""
    names = accuracy_metrics(rows)
    if not names:
        return [], None
    metric = metric or names[0]
    points = []
    for row in rows:
        if row[f'eval/{metric}'] is not None:
            points.append((row['step'], row[f'eval/{metric}']))
    return points, metric


# ---- may these runs stand in one panel? ----------------------------------------------------------

def require_comparable(configs):
    """{run: config} -> nothing, or a UserError that names the first run that differs from the first one, and
    how: another student to start from, or other held-out problems, or another way to evaluate. All other keys
    are the methods that a figure compares.
    """
    runs = list(configs)
    for run_name in runs[1:]:
        first, other = configs[runs[0]], configs[run_name]
        differences = []
        for key in evaluation_keys(first, other):
            values = [effective(config, key) for config in (first, other)]
            if values[0] != values[1]:
                differences.append(f'{key}={shown(values[0])} and {shown(values[1])}')
        if differences:
            raise UserError(f'{runs[0]} and {run_name} cannot be compared: {", ".join(differences)}; '
                            'put them in separate figures')


def effective(config, key):
    """What a key of a run's config stands for. A run of an earlier version may lack a key; it then had the
    default's effect. eval_max_new_tokens=0 stands for max_new_tokens."""
    value = config.get(key, default[key])
    if key == 'eval_max_new_tokens' and value == 0:
        return effective(config, 'max_new_tokens')
    return value


def evaluation_keys(first, other):
    """The keys that must be equal in two configs."""
    keys = ['student']
    if first.get('eval_data') and other.get('eval_data'):
        # How often, how many at once, what is printed, and whether the teacher is evaluated too: this changes
        # no score of the student. A run without evaluation draws no accuracy.
        harmless = ('eval_every', 'eval_rows', 'eval_show', 'eval_teacher')
        keys += [key for key in default if key.startswith('eval_') and key not in harmless]

    # A toy's student and problems are made by its own keys and the seed. Its teacher is part of the method.
    if 'toy' in (first.get('student'), first.get('eval_data')):
        keys.append('seed')
        for key in default:
            if key.startswith('toy_') and not key.startswith('toy_teacher_') and key != 'toy_dir':
                keys.append(key)
    return keys


def read_configs(folders):
    """{folder: the config that its run was started with}."""
    configs = {}
    for folder in folders:
        file = Path(folder) / 'config.json'
        stored = read_json(file)
        check_fields(stored, CONFIG, file, 'it does not describe a run; give a run folder of distill.py')
        configs[str(folder)] = stored['config']
    return configs


# ---- figures -------------------------------------------------------------------------------------

def new_figure(count, width=5.0, sharey=False):
    """-> (figure, a list of `count` axes side by side, each so many inches wide).

    The figure is made without pyplot, which would keep it until it is closed: one that is given up half-way
    is simply forgotten, and no display is looked for. matplotlib is imported here: it takes a second, and the
    training loop imports this file.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * count, 3.8), layout='constrained')
    (axes,) = figure.subplots(1, count, sharey=sharey, squeeze=False)
    return figure, list(axes)


def curve(folders, file):
    """Accuracy and cosine curves of one run or several -> a PNG."""
    if len(folders) > 1:
        require_comparable(read_configs(folders))
    logs = [read_log(folder) for folder in folders]      # one that is refused ends here
    figure, (left, right) = new_figure(2)
    alone = len(folders) == 1
    for number, (folder, rows) in enumerate(zip(folders, logs, strict=True)):
        name = Path(folder).name
        draw_accuracy(left, rows, name, f'C{number}', first=number == 0, alone=alone)
        if alone:
            draw_layers(figure, right, rows)
        else:
            draw_cosines(right, rows, name, f'C{number}')
    thin = 'one line a layer' if alone else 'thin: each layer'
    left.set(xlabel='step', ylim=(0, 102), title='held-out accuracy')
    right.set(xlabel='step', ylabel='cosine to the teacher', title=f'representation match ({thin})')
    for panel in (left, right):
        panel.xaxis.get_major_locator().set_params(integer=True)
    finish(figure, (left, right), file)


def redraw(folder):
    """Draw the figure of a run that goes on. A training run must not end because of its figure, whatever goes
    wrong here, from a full disk to a damaged installation of matplotlib. That is a line."""
    file = Path(folder) / 'curve.png'
    try:
        curve([folder], file)
    except Exception as error:
        message = cut(' '.join(str(error).split()), 100)             # matplotlib's can have many lines
        print0(f'  note: {file} could not be drawn ({type(error).__name__}: {message}); to draw it later: '
               f'python -m studies.figures {folder}')


def draw_accuracy(axes, rows, name, color, first, alone):
    """One run's accuracy. first: also the lines that the runs share; alone: also a line for each set."""
    points, metric = accuracy(rows)
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=color, marker='o', ms=4, label=f'{name}: distilled')

    # With several sets the line above is their mean. Of a single run there is room for the sets, too.
    of_sets = accuracy_metrics(rows)[1:]
    for number, of_set in enumerate(of_sets if alone else [], 1):
        steps, values = zip(*accuracy(rows, of_set)[0], strict=True)
        axes.plot(steps, values, color=f'C{number}', lw=1, label=of_set.partition('/')[2])
    if first:
        teacher = scores_of(rows[0], 'teacher')
        if teacher:                          # one that does not fit whole is not evaluated
            axes.axhline(teacher[metric], color='0.2', ls='--', lw=1, label='teacher')
        axes.axhline(points[0][1], color='0.6', ls=':', lw=1.2, label='student before')
    mean_of = f', mean of {len(of_sets)} sets' if of_sets else ''
    axes.set_ylabel(f'Avg@{metric[4:]}, %{mean_of}')


def draw_cosines(axes, rows, name, color):
    """One of several runs: its cosines in its color. A run through another objective looks at them now and
    then only, or never."""
    steps, by_layer, mean = cosines(rows)
    for values in by_layer.values():
        axes.plot(steps, values, color=color, lw=0.6, alpha=0.35)
    if steps:
        axes.plot(steps, mean, color=color, lw=1.8, label=f'{name}: mean over layers')


def draw_layers(figure, axes, rows):
    """A single run: the cosine of each layer in the color of its depth. Few layers have their names at the
    right end of their lines; of many a color bar says which is which."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    steps, by_layer, mean = cosines(rows)
    if not steps:
        return

    # From dark blue, the first layer, to green. The yellow end of the map cannot be seen on white.
    dark = colormaps['viridis']([0.88 * number / 255 for number in range(256)])
    scale = ScalarMappable(Normalize(min(by_layer), max(by_layer)), ListedColormap(dark))
    for layer, values in by_layer.items():
        axes.plot(steps, values, color=scale.to_rgba(layer), lw=1)
    axes.plot(steps, mean, color='0.15', ls='--', lw=1.8, label='mean over layers')
    if len(by_layer) > MOST_LABELS:
        figure.colorbar(scale, ax=axes, label='student layer', pad=0.02)
        return

    low, high = axes.get_ylim()
    ends = {layer: (values[-1] - low) / (high - low) for layer, values in by_layer.items()}
    for layer, height in spread(ends, 0.055).items():
        axes.text(1.01, height, f'layer {layer}', color=scale.to_rgba(layer), fontsize=8, va='center',
                  transform=axes.transAxes)


def spread(heights, gap):
    """{name: height between 0 and 1} -> the same, moved so that neighbours are at least `gap` apart: upwards
    where they meet, and down again from the upper end."""
    upwards = sorted(heights, key=heights.get)
    placed = dict(heights)
    for lower, name in pairwise(upwards):
        placed[name] = max(placed[name], placed[lower] + gap)
    placed[upwards[-1]] = min(placed[upwards[-1]], 1.0)
    for upper, name in pairwise(reversed(upwards)):
        placed[name] = min(placed[name], placed[upper] - gap)
    return placed


def cosines(rows):
    """-> (steps in which the cosines were measured, {layer: cosines}, their means over layers)."""
    looked = [row for row in rows if row.get('rep/cos') is not None]
    by_layer = {}
    for name in layer_names(rows):
        by_layer[int(name.removeprefix('rep/cos/'))] = [row[name] for row in looked]
    return [row['step'] for row in looked], by_layer, [row['rep/cos'] for row in looked]


def bridges(folders, file):
    """Stage 1 of OPRD-Bridge, one fit or several -> a PNG.

    A single fit is drawn with its controls, each layer, and Theorem 3's rank. A teacher that reads gibberish
    shows in the right half, at the last layer, and not in the mean.
    """
    bridges_made = [read_bridge(folder) for folder in folders]           # a damaged one ends here
    figure, (left, right) = new_figure(2)
    alone = len(folders) == 1
    color_number = 0
    largest = 1                              # rank, over all folders
    for folder, made in zip(folders, bridges_made, strict=True):
        layers = {int(layer): values for layer, values in made['layers'].items()}
        for key, label in BRIDGE_LINES.items() if alone else [('cos', Path(folder).name)]:
            color = f'C{color_number}'
            color_number += 1

            # bridge.json holds {rank: cosine} for each layer; every layer has the same ranks.
            ranks = [int(rank) for rank in layers[max(layers)][key]]
            largest = max(largest, *ranks)
            by_layer = [[values[key][str(rank)] for rank in ranks] for values in layers.values()]
            if alone and key == 'cos':
                for line in by_layer:
                    left.plot(ranks, line, color=color, lw=0.5, alpha=0.4)
            marker = 'o' if len(ranks) <= MOST_MARKERS else None
            mean = [fmean(values) for values in zip(*by_layer, strict=True)]
            left.plot(ranks, mean, color=color, marker=marker, ms=3, label=label)

            used = str(made['used'])
            at_used = [values[key][used] for values in layers.values()]
            right.plot(list(layers), at_used, color=color, marker='o', ms=3, label=f'{label}, rank {used}')
        if alone:
            left.axvline(made['rank'], color='0.3', ls=':', lw=1, label=f"Theorem 3: rank {made['rank']}")
    left.set(xscale='log', xlabel='rank r', ylabel='held-out cosine', title='mean over layers (Figure 12)')
    powers = [2**exponent for exponent in range(largest.bit_length())]
    left.set_xticks(powers, powers)
    left.minorticks_off()
    right.set(xlabel='student layer', xticks=list(layers), title='each layer')
    finish(figure, (left, right), file)


def finish(figure, axes, file):
    """Grid, legends, and the file, written completely or not at all."""
    from matplotlib.text import Text
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[['top', 'right']].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)

    # Names of folders and of metrics are drawn as they are: '$' begins no formula.
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
        text.set_parse_math(False)
    with whole(file) as temporary:
        figure.savefig(temporary, dpi=130, format='png')


def main(folders):
    if not folders or folders[0].startswith('-'):
        raise UserError('no run folder given; python -m studies.figures out/toy '
                        '(to run a comparison: python -m studies.compare toy_comparison)')
    if all((Path(folder) / 'bridge.json').exists() for folder in folders):
        file = Path(folders[0]) / 'bridge.png'
        bridges(folders, file)
    else:
        for folder in folders:
            if not (Path(folder) / 'log.jsonl').exists():
                raise UserError(f'{folder}/log.jsonl: no such file; give run folders of distill.py')
        file = Path(folders[0]) / 'curve.png'
        curve(folders, file)
        for note in mixed_code(folders):
            print0(f'note: {note}')
    print0(file)


if __name__ == '__main__':
    run(main, lambda: command_words('studies/figures.py'))
