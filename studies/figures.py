"""
Figures from run folders: what distill.py and bridge.py have logged, drawn by matplotlib.

    python -m studies.figures out/toy                 one run: out/toy/curve.png and curve.pdf
    python -m studies.figures out/a out/b out/c       several runs in one figure, in the first one's folder
    python -m studies.figures out/toy_bridge_stage1   one bridge, or several: bridge.png and bridge.pdf in it

A run. Left: accuracy over steps, with lines for the untrained student and the teacher (the paper's Figure 4).
Right: cosine of the matched states, a line for each layer, and their mean (Figure 6). distill.py draws
curve.png anew at every evaluation.
A bridge. Left: held-out cosine against rank (Figure 12). Right: each layer at the rank that is used.

Simpler than usual: it reads log.jsonl, config.json and bridge.json, and no tracker or event file. Runs that
start from different students, or that are evaluated differently, are refused: in one panel their curves
would look comparable and are not. How a figure looks: studies/drawing.py. Many runs with a table and seeds:
studies/compare.py.
"""
import re
from pathlib import Path
from statistics import fmean

from configs import default
from studies.drawing import draw_thin, label_ends, look_of, marked, new_figure, paper_style, save, whole_ticks
from support.command_help import command_words
from support.fields import Field, check_fields
from support.files import read_json
from support.provenance import mixed_code
from support.run_folder import log_rows, scores_of, teacher_scores
from support.runtime import UserError, cut, print0, run, shown

# The lines of a single bridge's figure: key in bridge.json, and label.
BRIDGE_LINES = {'cos': 'bridge', 'before': 'random P_S', 'shuffled': 'shuffled pairs',
                'mean_only': 'mean alone'}
NUMBERS = Field(dict, 1, items=Field(float, -10, 10))    # {rank: cosine}; a mean of them cannot overflow
LARGEST = 10**6                 # more than any rank or layer
BRIDGE = {'rank': Field(int, 1, LARGEST), 'used': Field(int, 1, LARGEST),
          'layers': Field(dict, 1, items=Field(dict))}
CONFIG = {'config': Field(dict)}                         # config.json
MOST_LABELS = 10                # with more layers than these, a color bar says which line is which


# ---- what a run folder says ----------------------------------------------------------------------

def read_log(folder):
    """The rows of a run's log.jsonl: step 0 and at least one more."""
    rows = log_rows(Path(folder) / 'log.jsonl')
    file = f'{folder}/log.jsonl'
    if len(rows) < 2:
        raise UserError(f'{file}: no steps in it; run distill.py first')

    # What is drawn together must have been measured together.
    names = scores_of(rows[0], 'eval').keys()
    if any(scores.keys() != names for scores in teacher_scores(rows[0]).values()):
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

def curve(folders, file):
    """Accuracy and cosine curves of one run or several -> the files that were written (drawing.save)."""
    if len(folders) > 1:
        require_comparable(read_configs(folders))
    logs = [read_log(folder) for folder in folders]      # one that is refused ends here
    with paper_style():
        figure, (left, right) = new_figure(columns=2)
        if len(folders) == 1:
            draw_run(figure, left, right, logs[0], Path(folders[0]).name)
        else:
            draw_runs(left, right, [Path(folder).name for folder in folders], logs)
        left.set(xlabel='step', ylim=(0, 102), title='held-out accuracy')
        right.set(xlabel='step', ylabel='cosine to the teacher')
        whole_ticks(left)
        whole_ticks(right)
        return save(figure, file)


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


def draw_run(figure, left, right, rows, name):
    """A single run: there is room for each set and each layer."""
    draw_accuracy(left, rows, f'{name}: distilled', look_of(name))
    of_sets = accuracy_metrics(rows)[1:]
    for metric in of_sets:
        steps, values = zip(*accuracy(rows, metric)[0], strict=True)
        of_set = metric.partition('/')[2]
        left.plot(steps, values, lw=0.8, label=of_set, markevery=marked(steps), **look_of(of_set))
    draw_models_before(left, rows)
    draw_layers(figure, right, rows)
    right.set_title('representation match of each layer')


def draw_runs(left, right, names, logs):
    """Several runs, each with one look in both panels."""
    for name, rows in zip(names, logs, strict=True):
        look = look_of(name)
        draw_accuracy(left, rows, name, look)
        steps, by_layer, mean = cosines(rows)

        # A run through another objective looks at the cosines now and then only, or never.
        if steps:
            draw_thin(right, steps, by_layer.values(), look)
            right.plot(steps, mean, label=name, markevery=marked(steps), **look)
    draw_models_before(left, logs[0])
    right.set_title('representation match (thin: each layer)')


def draw_accuracy(axes, rows, label, look):
    """One run's accuracy, of several sets their mean."""
    points, metric = accuracy(rows)
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=label, markevery=marked(steps), **look)
        of_sets = accuracy_metrics(rows)[1:]
        mean_of = f', mean of {len(of_sets)} sets' if of_sets else ''
        axes.set_ylabel(f'Avg@{metric[4:]}, %{mean_of}')


def draw_models_before(axes, rows):
    """Lines for the teachers and for the student before the first step, which all runs of a figure share."""
    points, metric = accuracy(rows)
    for side, scores in teacher_scores(rows[0]).items():     # one that does not fit whole is not evaluated
        axes.axhline(scores[metric], lw=1, label=side, **look_of(side))
    if points:
        axes.axhline(points[0][1], lw=1, label='student before', **look_of('student'))


def draw_layers(figure, axes, rows):
    """A single run: the cosine of each layer in the color of its depth. Few layers have their names at the
    right end of their lines; of many a color bar says which is which."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    steps, by_layer, mean = cosines(rows)
    if not steps:
        return

    # From dark blue, the first layer, to green. A name in the yellow end of the map cannot be read on white.
    dark = colormaps['viridis']([0.68 * number / 255 for number in range(256)])
    scale = ScalarMappable(Normalize(min(by_layer), max(by_layer)), ListedColormap(dark))
    ends = {}
    for layer, values in by_layer.items():
        axes.plot(steps, values, color=scale.to_rgba(layer), lw=0.8)
        ends[f'layer {layer}'] = (steps[-1], values[-1], scale.to_rgba(layer))
    axes.plot(steps, mean, color='0.15', ls='--', label='mean over layers')
    if len(by_layer) > MOST_LABELS:
        figure.colorbar(scale, ax=axes, label='student layer', pad=0.02)
    else:
        label_ends(axes, ends)


def cosines(rows):
    """-> (steps in which the cosines were measured, {layer: cosines}, their means over layers)."""
    looked = [row for row in rows if row.get('rep/cos') is not None]
    by_layer = {}
    for name in layer_names(rows):
        by_layer[int(name.removeprefix('rep/cos/'))] = [row[name] for row in looked]
    return [row['step'] for row in looked], by_layer, [row['rep/cos'] for row in looked]


def bridges(folders, file):
    """Stage 1 of OPRD-Bridge, one fit or several -> the files that were written (drawing.save).

    A single fit is drawn with its controls, each layer, and Theorem 3's rank. A teacher that reads gibberish
    shows in the right half, at the last layer, and not in the mean.
    """
    bridges_made = [read_bridge(folder) for folder in folders]           # a damaged one ends here
    lines = []                               # (what bridge.json says, key in it, label, look)
    with paper_style():
        if len(folders) == 1:
            for key, label in BRIDGE_LINES.items():
                look = look_of('OPRD-Bridge' if key == 'cos' else label)
                lines.append((bridges_made[0], key, label, look))
        else:
            for folder, made in zip(folders, bridges_made, strict=True):
                name = Path(folder).name
                lines.append((made, 'cos', f"{name}, used rank {made['used']}", look_of(name)))
        figure, (left, right) = new_figure(columns=2)
        for line in lines:
            draw_bridge(left, right, *line)
        if len(folders) == 1:
            draw_rank(left, right, bridges_made[0])
        label_bridge_axes(left, right, bridges_made)
        return save(figure, file)


def draw_bridge(left, right, made, key, label, look):
    """One line in both panels: the mean over layers at each rank, and each layer at the rank that is used."""
    layers = {int(layer): values[key] for layer, values in made['layers'].items()}

    # bridge.json holds {rank: cosine} for each layer; every layer has the same ranks.
    ranks = [int(rank) for rank in layers[max(layers)]]
    mean = []
    for rank in ranks:
        mean.append(fmean(values[str(rank)] for values in layers.values()))
    left.plot(ranks, mean, label=label, markevery=marked(ranks), **look)
    at_used = [values[str(made['used'])] for values in layers.values()]
    right.plot(list(layers), at_used, label=label, markevery=marked(layers), **look)


def draw_rank(left, right, made):
    """A single bridge: its single layers as thin lines, and the rank that Theorem 3 recommends."""
    for values in made['layers'].values():
        ranks = [int(rank) for rank in values['cos']]
        draw_thin(left, ranks, [list(values['cos'].values())], look_of('OPRD-Bridge'))
    left.axvline(made['rank'], color='0.3', ls=':', lw=1, label=f"Theorem 3: rank {made['rank']}")
    right.set_title(f"each layer at rank {made['used']}, which is used")


def label_bridge_axes(left, right, bridges_made):
    """Names and ticks of the axes. Left the powers of two, right whole layers."""
    largest = 1                              # rank, over all folders
    for made in bridges_made:
        for values in made['layers'].values():
            largest = max(largest, *(int(rank) for rank in values['cos']))
    powers = [2**exponent for exponent in range(largest.bit_length())]
    every = 1 if len(powers) <= 9 else 2     # of more there is room for every second number
    names = [str(power) if number % every == 0 else '' for number, power in enumerate(powers)]
    title = 'mean over layers (thin: each layer)' if len(bridges_made) == 1 else 'mean over layers'
    left.set(xscale='log', xlabel='rank r', ylabel='held-out cosine', title=title)
    left.set_xticks(powers, names)
    left.minorticks_off()
    right.set(xlabel='student layer', title=right.get_title() or 'each layer at the rank that is used')
    whole_ticks(right)


def main(folders):
    if not folders or folders[0].startswith('-'):
        raise UserError('no run folder given; python -m studies.figures out/toy '
                        '(to run a comparison: python -m studies.compare toy_comparison)')
    if all((Path(folder) / 'bridge.json').exists() for folder in folders):
        files = bridges(folders, Path(folders[0]) / 'bridge')
    else:
        for folder in folders:
            if not (Path(folder) / 'log.jsonl').exists():
                raise UserError(f'{folder}/log.jsonl: no such file; give run folders of distill.py')
        files = curve(folders, Path(folders[0]) / 'curve')
        for note in mixed_code(folders):
            print0(f'note: {note}')
    print0(*files)


if __name__ == '__main__':
    run(main, lambda: command_words('studies/figures.py'))
