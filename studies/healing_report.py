"""
The report of studies/healing.py: tables, samples of text, and two figures.

It shows what may be chance. A number over several seeds is a mean with its range. Methods are compared prompt
by prompt, and a difference is called undecided if it is below two standard errors, or if the seeds do not
agree on its sign.

`results` is everywhere {name: [(found, rows)]} of one kind of damage. The names are 'damaged', 'intact' and
those of the methods; there is a pair for each seed. found: what studies/agreement.py says of the student, its
sums for each prompt among it. rows: those of the run's log.
"""
import math
from statistics import fmean

from studies.drawing import PAGE, draw_seeds, look_of, new_figure, paper_style, save
from support.files import whole
from support.run_folder import scores_of
from support.runtime import print0, printable

TEXTS = {'teacher_text': "teacher's text", 'own_samples': 'own samples'}     # in the JSON: in a table


def write_report(study, distances, best, results, costs, notes):
    """Write report.md, curves.png and layers.png into the folder of a study, and print the report.

    distances: {damage: {method: {rate: distance}}} of the search. best: {damage: {method: rate}}. results:
    {damage: what the header says}. costs: {method: {'sample', 'update', 'peak'}} for the first kind of
    damage. notes: sentences about the runs.
    """
    lines = []
    for kind, words in study.damages.items():
        seeds = ', '.join(map(str, study.seeds[kind]))
        lines += [f'## {kind}: {" ".join(words)}; seeds {seeds}', '']
        lines += [*distances_table(best[kind], results[kind]), '']
        lines += [*differences_table(study.reference, results[kind]), '']
        lines += samples_of_text(results[kind])
    for kind, by_method in distances.items():
        lines += [f'## learning rates: {kind}, seed {study.search_seed}', '', *rates_table(by_method), '']
    lines += [f'## what a step costs: {next(iter(best))}', '', *costs_table(costs)]
    for note in notes:
        lines += ['', f'When this was written: {note}.']

    with whole(study.out / 'report.md') as temporary:
        temporary.write_text('\n'.join(lines) + '\n')
    draw_curves(study.out / 'curves.png', {kind: on_policy(study, results[kind]) for kind in results}, costs)
    draw_layers(study.out / 'layers.png', results)
    print0('\n'.join(lines))
    print0(f'{study.out}: report.md, curves.png, layers.png')


def on_policy(study, results):
    """The methods whose KL during training is one on own samples."""
    return {name: seeds for name, seeds in results.items()
            if name in study.methods and 'answers_by=teacher' not in study.methods[name]}


# ---- tables --------------------------------------------------------------------------------------

def markdown(titles, rows):
    """-> lines of a table."""
    lines = [f"| {' | '.join(titles)} |", '|---' * len(titles) + '|']
    for row in rows:
        lines.append(f"| {' | '.join(map(str, row))} |")
    return lines


def over_seeds(values, digits):
    """Mean and range over seeds: '0.312 (0.305-0.319)'. Of a single value, the value."""
    mean = f'{fmean(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})'


def distances_table(best, results):
    """How near the students of one kind of damage are to the teacher -> lines. best: {method: rate}."""
    titles = ['', 'rate', "KL, teacher's text", 'KL, own samples', "same token, teacher's text, %",
              "perplexity, teacher's text", 'cosine', 'exact answers, %']
    rows = []
    for name, seeds in results.items():
        on_teacher = [found['scores']['teacher_text'] for found, _ in seeds]
        on_own = [found['scores']['own_samples'] for found, _ in seeds]
        right = [accuracy(log[-1]) for _, log in seeds if log]
        rows.append([name, f'{best[name]:g}' if name in best else '',
                     over_seeds([scores['kl'][0] for scores in on_teacher], 3),
                     over_seeds([scores['kl'][0] for scores in on_own], 3),
                     over_seeds([100 * scores['same'][0] for scores in on_teacher], 1),
                     over_seeds([math.exp(scores['surprise'][0]) for scores in on_teacher], 3),
                     over_seeds([scores['cosine'][0] for scores in on_own], 4),
                     over_seeds(right, 0) if right else ''])
    return markdown(titles, rows)


def accuracy(row):
    """The accuracy in a row of a log."""
    scores = scores_of(row, 'eval')
    return next(value for name, value in scores.items() if name.startswith('avg@'))


def differences_table(reference, results):
    """The KL of each method minus that of the reference, with its standard error -> lines."""
    rows = []
    for name, seeds in results.items():
        if name in ('damaged', 'intact', reference):
            continue
        cells = []
        for text in TEXTS:
            mean, error, same_sign = difference(seeds, results[reference], text)
            verdict = 'nearer' if mean < 0 else 'farther'
            if abs(mean) < 2 * error or not same_sign:
                verdict = 'undecided'
            cells.append(f'{mean:+.3f} +-{error:.3f} {verdict}')
        rows.append([name, *cells])
    return markdown([f'KL minus that of {reference}', *TEXTS.values()], rows)


def difference(seeds, others, text):
    """Two methods, as `results` has them -> (KL of the first minus KL of the second, its standard error, has
    it the same sign for every seed?).

    Both answered the same prompts, and a prompt that is hard for one is hard for the other. So the error is
    taken from the differences prompt by prompt. It says how much other prompts would change, and nothing
    about other seeds.
    """
    differences = []                         # one for each seed
    by_prompt = []                           # for each seed, what each prompt adds to it
    for (found, _), (other, _) in zip(seeds, others, strict=True):
        mean, parts = mean_and_parts(found['by_prompt'][text])
        other_mean, other_parts = mean_and_parts(other['by_prompt'][text])
        differences.append(mean - other_mean)
        by_prompt.append([part - other_part for part, other_part in zip(parts, other_parts, strict=True)])

    of_prompts = [fmean(parts) for parts in zip(*by_prompt, strict=True)]
    count = len(of_prompts)
    error = math.sqrt(count / (count - 1) * sum(part**2 for part in of_prompts))
    return fmean(differences), error, min(differences) > 0 or max(differences) < 0


def mean_and_parts(sums):
    """Sums of each prompt -> (mean KL over all positions, by how much each prompt moves it).

    The mean is a ratio of two sums over prompts. The squares of these parts add up to the variance of such a
    ratio, but for a factor n / (n - 1): `agreement.mean_and_error`.
    """
    total = sum(sums['tokens'])
    mean = sum(sums['kl']) / total
    parts = [(kl - mean * tokens) / total for kl, tokens in zip(sums['kl'], sums['tokens'], strict=True)]
    return mean, parts


def rates_table(by_method):
    """The search on one kind of damage, {method: {rate: distance}} -> lines. The best rate is bold."""
    rows = []
    for method, by_rate in by_method.items():
        best = min(by_rate, key=by_rate.get)
        cells = []
        for rate, distance in by_rate.items():
            cell = f'{rate:g}: {distance:.3f}'
            cells.append(f'**{cell}**' if rate == best else cell)
        rows.append([method, *cells, 'yes' if best in (min(by_rate), max(by_rate)) else ''])
    most = max(len(row) for row in rows)
    rows = [[*row[:-1], *[''] * (most - len(row)), row[-1]] for row in rows]
    return markdown(['sum of both KL', *['rate'] * (most - 2), 'best at an edge'], rows)


def costs_table(costs):
    """{method: {'sample', 'update', 'peak'}} -> lines."""
    rows = []
    for method, values in costs.items():
        peak = f'{values["peak"]:.1f}' if values['peak'] else ''
        seconds = [f'{value:.2f}' for value in (values['sample'], values['update'], seconds_of(values))]
        rows.append([method, *seconds, peak])
    titles = ['', 'sampling, s', 'teacher, student, optimizer, s', 'a step, s', 'peak memory, GB']
    return markdown(titles, rows)


def seconds_of(values):
    """Seconds of a whole step."""
    return values['sample'] + values['update']


def samples_of_text(results):
    """Greedy answers to a few held-out questions, of the first seed -> lines."""
    first = {name: seeds[0][0] for name, seeds in results.items()}
    lines = []
    for number, example in enumerate(first['intact']['examples']):
        lines += [f'**{example["question"]}**', '']
        for name, found in first.items():
            text = printable(found['shown'][number]).replace('\n', '\\n').replace('`', "'")
            lines.append(f'- {name}: `{text}`')
        lines.append('')
    return lines


# ---- figures -------------------------------------------------------------------------------------

# Names that have the look of others in studies/drawing.py, so that no two have one color.
LOOKS_LIKE = {'damaged': 'student', 'supervised': 'next byte', 'OPRD + full KL': 'OPD top-1 + 1 OPRD',
              'OPRD, then full KL': 'OPRD-Bridge, then OPD top-1'}


def look(name):
    return look_of(LOOKS_LIKE.get(name, name))


def draw_curves(file, results, costs):
    """The KL on own samples during training: over steps for each kind of damage, and for the first one over
    seconds too. results: {damage: {method: as in the header}}."""
    first, *others = results
    panels = [(first, False), (first, True), *((kind, False) for kind in others)]
    with paper_style():
        columns = 3 if len(panels) == 3 else 2
        rows = -(-len(panels) // columns)
        figure, axes = new_figure(rows, columns, PAGE, 2.3 * rows)
        for unused in axes[len(panels):]:
            unused.remove()
        for panel, (kind, in_seconds) in zip(axes, panels, strict=False):
            curves = divergences(results[kind])
            for name, (steps, lines) in curves.items():
                if in_seconds:
                    steps = [step * seconds_of(costs[name]) for step in steps]
                draw_seeds(panel, steps, lines, name, look(name))
            panel.set(title=kind, xlabel='seconds' if in_seconds else 'step', ylim=(0, None),
                      ylabel='KL, own samples (nats)')
        save(figure, file, 'On training questions, before the update of a step. Mean of the seeds; thin: '
             'each seed. Seconds: what a step of a method costs alone on the machine.')


def divergences(results):
    """-> {method: (steps, [the KL at these steps, for each seed])}.

    A method with an output-space term measures the KL at each of its steps, the others at some. The questions
    of a step are the same for all, and no two steps have the same, so only steps that all have are compared.
    """
    measured = {}                            # {method: [{step: KL} of each seed]}
    for name, seeds in results.items():
        measured[name] = [{row['step']: row['opd/kl'] for row in rows if row['opd/kl'] is not None}
                          for _, rows in seeds]
    common = None
    for seeds in measured.values():
        for points in seeds:
            common = points.keys() if common is None else common & points.keys()
    steps = sorted(common)
    return {name: (steps, [[points[step] for step in steps] for points in seeds])
            for name, seeds in measured.items()}


def draw_layers(file, results):
    """How far each layer is from the teacher's. results: {damage: as in the header}."""
    with paper_style():
        figure, axes = new_figure(1, len(results), PAGE, 2.4)
        for panel, (kind, by_name) in zip(axes, results.items(), strict=True):
            for name, seeds in by_name.items():
                if name != 'intact':
                    layers, lines = layer_distances(seeds)
                    draw_seeds(panel, layers, lines, name, look(name))
            panel.set(title=kind, xlabel="teacher's layer", ylabel='1 - cosine', yscale='log')
        save(figure, file, "On held-out questions, the student's own samples. Mean of the seeds; thin: each "
             'seed. Lower is nearer to the teacher.')


def layer_distances(seeds):
    """A student's seeds -> (the teacher's layers, [1 - cosine of each, for each seed])."""
    layer_map = seeds[0][0]['layer_map']     # the names in a JSON file are texts
    lines = []
    for found, _ in seeds:
        scores = found['scores']['own_samples']
        lines.append([1 - scores[f'cosine/{layer}'][0] for layer in layer_map])
    return list(layer_map.values()), lines
