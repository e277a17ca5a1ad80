"""
Tables 2 to 6 of the paper from run folders of distill.py: a markdown file and a JSON file each.

    python -m paper table2 out/a out/b ...        Avg@n, where student and teacher have one architecture
    python -m paper table3 out/a out/b ...        memory of the update, and time
    python -m paper table4 out/a out/b ...        Avg@n and Best@n through a bridge
    python -m paper table5 out/a out/b ...        diversity (Dist-4g) and length of the same answers
    python -m paper table6 out/a out/b ...        Avg@n and Best@n, where the teacher has another vocabulary

The scores are computed from answers/ of each run, and must agree with its log. A cell is

    49.8 (48.1-51.0) [39.6-59.9]      mean over seeds (range over seeds) [95% interval over problems]

The interval says in how wide a range the mean would lie 95 times of 100 if other problems had been drawn. Of
several seeds each problem has its mean over the seeds, and problems are drawn by their number. So it holds
both for seeds with the same problems, and for toys, where each seed has problems of its own.

The paper's numbers stand beside ours where a run is at the paper's size, which its config says
(paper/printed.py). Other runs have no number beside them, and a line says how they differ.

Simpler than eval_math.py: nothing is graded again, and the metrics are those of the paper's tables. One is
added: Dist-4g of characters, for answers without words, as the toy's are.
"""
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from eval_math import bootstrap, cell, distinct
from paper.printed import MEMORY_AND_TIME, PRINTED, SETS, paper_row
from paper.runs import PAIRS, Missing, by_method, machines_of, of_kind, read_runs, seconds_of_steps
from studies.compare import span
from support.fields import Field, check_fields
from support.files import whole, write_json
from support.jsonl import read_rows
from support.run_folder import scores_of
from support.runtime import UserError, printable, shown

# ---- scores of a run -----------------------------------------------------------------------------

MOST_DIFFERENCES = 3            # in a line under a table

# What a table can show of answers -> its title; n is the number of answers to a problem.
METRICS = {'avg': 'Avg@{n}, %', 'best': 'Best@{n}, %', 'dist': 'Dist-4g, %',
           'characters': 'Dist-4g of characters, %', 'len': 'length, tokens'}
ADVICE = 'restore the file, or run distill.py again in another out_dir='
ANSWER = {'set': Field(str), 'problem': Field(int, 0, 10**9), 'sample': Field(int, 0, 10**9),
          'text': Field(str), 'correct': Field(bool), 'length': Field(int, 0, 10**9)}


def read_scores(run, side):
    """Scores of one evaluation of a run -> {set: {metric: {problem: value}}}.

    side: 'teacher', 'student' (before the first step) or 'method' (after the last). They are computed from
    the run's answers, and must agree with its log. {} for a teacher that was not evaluated.
    """
    row, file = evaluation_of(run, side)
    if row is None:
        return {}
    count = run.config['eval_n']
    answers = read_answers(file, count)
    scores = {}
    for label, problems in answers.items():
        scores[label] = defaultdict(dict)
        for problem, rows in problems.items():
            for metric, value in problem_scores(rows).items():
                scores[label][metric][problem] = value

    # The log was written in the same evaluation.
    logged = scores_of(row, 'teacher' if side == 'teacher' else 'eval')
    for label, metrics in scores.items():
        for metric, name in (('avg', f'avg@{count}'), ('best', f'best@{count}'), ('len', 'len')):
            name = name if len(scores) == 1 else f'{name}/{label}'
            mean = fmean(metrics[metric].values())
            if name not in logged or abs(logged[name] - mean) > 1e-6 * max(1, abs(mean)):
                raise UserError(f'{file}: {name} of these answers is {mean:.4f}, and the log says '
                                f'{shown(logged.get(name))}; {ADVICE}')
    return scores


def evaluation_of(run, side):
    """-> (the row of the log, the file of answers) of an evaluation; (None, None) if there was none."""
    assert side in ('teacher', 'student', 'method'), side
    answers = run.folder / 'answers'
    if side == 'teacher':
        has_scores = bool(scores_of(run.rows[0], 'teacher'))
        return (run.rows[0], answers / 'teacher.jsonl') if has_scores else (None, None)
    evaluated = [row for row in run.rows if scores_of(row, 'eval')]
    if not evaluated:
        raise Missing(f'{run.folder}: no evaluation in its log; run distill.py with eval_data=')
    row = evaluated[0] if side == 'student' else evaluated[-1]
    return row, answers / f'{row["step"]:06d}.jsonl'


def read_answers(file, count):
    """A file of answers -> {set: {problem: its answers in order}}. Each problem must have `count` of them."""
    if not file.exists():
        raise Missing(f'{file}: no such file, and the tables are made from the answers; {ADVICE}')
    answers = defaultdict(lambda: defaultdict(dict))
    for number, row in enumerate(read_rows(file, advice=ADVICE), 1):
        check_fields(row, ANSWER, f'{file}:{number}', ADVICE)
        answers[row['set']][row['problem']][row['sample']] = row
    if not answers:
        raise UserError(f'{file}: no answers in it; {ADVICE}')

    # A set with half of its answers would have other scores, and look as good.
    ordered = {}
    for label, problems in answers.items():
        ordered[label] = {}
        for problem, samples in sorted(problems.items()):
            if sorted(samples) != list(range(count)):
                raise UserError(f'{file}: set {shown(label)}, problem {problem}: {len(samples)} answers, '
                                f'where eval_n={count}; {ADVICE}')
            ordered[label][problem] = [samples[sample] for sample in range(count)]
    return ordered


def problem_scores(rows):
    """The answers to one problem -> its value of each metric; None = nothing to measure."""
    texts = [row['text'] for row in rows]
    spaced = [' '.join(text) for text in texts]          # each character is a word
    return {'avg': 100 * fmean(row['correct'] for row in rows),
            'best': 100.0 * any(row['correct'] for row in rows),
            'dist': percent(distinct(texts)),
            'characters': percent(distinct(spaced)),
            'len': fmean(row['length'] for row in rows)}


def percent(share):
    return None if share is None else 100 * share


def over_seeds(values_of_seeds):
    """[{problem: value} of each seed] -> {'by_seed', 'mean', 'interval'}, or None if nothing was measured."""
    by_seed = []
    by_problem = defaultdict(list)
    for values in values_of_seeds:
        known = {problem: value for problem, value in values.items() if value is not None}
        if not known:
            return None
        by_seed.append(fmean(known.values()))
        for problem, value in known.items():
            by_problem[problem].append(value)

    # Drawn by number: of seeds with problems of their own, each seed gets as many as it has.
    low, high = bootstrap([fmean(values) for _, values in sorted(by_problem.items())])
    return {'by_seed': by_seed, 'mean': fmean(by_seed), 'interval': [low, high]}


# ---- Tables 2, 4, 5 and 6 ------------------------------------------------------------------------

# How a run of each pair of models can be had.
MAKE = {
    'same': 'python distill.py configs/toy.py makes one',
    'bridge': 'bridge.py and distill.py with configs/toy_bridge.py make one',
    'tokens': 'bridge.py and distill.py with configs/toy_bridge_tokens.py make one',
}


def runs_of_pair(pair, runs):
    """The runs that belong into a table; Missing if there is none."""
    chosen = [run for run in runs if run.pair == pair]
    if not chosen:
        raise Missing(f'no run with a {PAIRS[pair]}; {MAKE[pair]}')
    return chosen


def scores_data(number, runs):
    """What Table 2, 4, 5 or 6 says of these runs -> a dict that JSON can hold. Runs between other pairs of
    models are left out."""
    printed = PRINTED[number]
    chosen = runs_of_pair(printed.pair, runs)
    metrics = printed.metrics
    if 'dist' in metrics:
        metrics = (*metrics, 'characters')

    # The models before the first step are the same for all methods: of each seed the first run tells.
    firsts = list({run.seed: run for run in reversed(chosen)}.values())[::-1]
    problems = problems_of(read_scores(firsts[0], 'student'))
    rows = []
    for side in ('teacher', 'student'):
        scores = [read_scores(run, side) for run in firsts]
        if all(scores):                      # a teacher need not be evaluated
            row = table_row(side, firsts, scores, metrics, problems)
            rows.append(row | {'steps': None, 'paper': None})

    # Then each method, after its last step.
    differences = {}
    for method, group in by_method(chosen).items():
        scores = [read_scores(run, 'method') for run in group]
        row = table_row(method, group, scores, metrics, problems)
        row['steps'] = one_end(group, [evaluation_of(run, 'method')[0]['step'] for run in group])
        row['paper'], found = row_of_paper(number, group)
        if found:
            differences[method] = found
        rows.append(row)

    # Student and teacher are the paper's where one of the runs is at its size.
    if any(row['paper'] for row in rows):
        for row in rows:
            if row['method'] in ('teacher', 'student') and row['method'] in printed.numbers:
                row['paper'] = row['method']
    counts = {label: len(numbers) for label, numbers in problems.items()}
    return {'table': number, 'n': chosen[0].config['eval_n'], 'problems': counts, 'rows': rows,
            'not at paper size': differences}


def row_of_paper(number, group):
    """The runs of one method -> (the row of the paper's table that they are, []), or (None, how one of them
    differs from it). Each seed must be at the paper's size."""
    for run in group:
        name, differences = paper_row(number, run.config)
        if name is None:
            return None, differences
    return name, []


def one_end(group, steps):
    """The step after which each run of one method ends; a UserError if it is not one step."""
    for run, step in zip(group, steps, strict=True):
        if step != steps[0]:
            raise UserError(f'{group[0].folder} and {run.folder} are seeds of {run.method} and end after '
                            f'{steps[0]} and {step} steps; finish both, or give one of them')
    return steps[0]


def problems_of(scores):
    """Scores of an evaluation -> {set: numbers of its problems}."""
    return {label: list(metrics['avg']) for label, metrics in scores.items()}


def table_row(method, group, scores, metrics, problems):
    """One row: {'method', 'seeds', 'scores': {set: {metric: numbers of `over_seeds`}}}. problems: of the
    whole table. They are drawn by their numbers, so each run must have the same numbers."""
    for run, of_seed in zip(group, scores, strict=True):
        if problems_of(of_seed) != problems:
            raise UserError(f'{run.folder}: evaluated on other numbers of problems than other runs of the '
                            'table; make a table of each')
    by_set = {}
    for label in scores[0]:
        by_set[label] = {}
        for metric in metrics:
            by_set[label][metric] = over_seeds([of_seed[label][metric] for of_seed in scores])
    return {'method': method, 'seeds': [run.seed for run in group], 'scores': by_set}


def scores_lines(data):
    """The same as markdown lines."""
    number = data['table']
    printed = PRINTED[number]
    with_paper = any(row['paper'] for row in data['rows'])
    metrics = shown_metrics(data)
    columns = [(metric, label) for metric in metrics for label in data['problems']]

    # The paper's column is there only if it has a number.
    titles = ['method']
    for metric, label in columns:
        title = METRICS[metric].format(n=data['n'])
        titles.append(f'{title}, {text_of(label)}')
        if with_paper:
            titles.append('paper')
    lines = [f'**Table {number}**: {printed.title}.', '', *table_head([*titles, 'steps', 'seeds'])]

    # A row for each model or method.
    for row in data['rows']:
        cells = [text_of(row['method'])]
        for metric, label in columns:
            cells.append(score_cell(row['scores'][label][metric]))
            if with_paper:
                cells.append(paper_cell(number, row['paper'], metric, label))
        steps = '' if row['steps'] is None else str(row['steps'])
        lines.append(table_line([*cells, steps, str(len(row['seeds']))]))
    return [*lines, '', *notes_under(data, metrics)]


def shown_metrics(data):
    """The metrics that a table shows. Where no answer has four words, as on the toy, Dist-4g is that of
    characters."""
    metrics = PRINTED[data['table']].metrics
    if 'dist' not in metrics:
        return metrics
    measured = []
    for row in data['rows']:
        measured += [numbers['dist'] for numbers in row['scores'].values() if numbers['dist'] is not None]
    return metrics if measured else ('characters', 'len')


def notes_under(data, metrics):
    """What a reader must know of the table above -> markdown lines."""
    several = any(len(row['seeds']) > 1 for row in data['rows'])
    counts = [f'{problems} of {text_of(label)}' for label, problems in data['problems'].items()]
    what = 'mean over seeds (range over seeds)' if several else 'the value of one seed'
    lines = [f'A cell: {what} [95% interval over problems]. Problems of each seed: {", ".join(counts)}, each '
             f'answered {data["n"]} times.']
    if 'characters' in metrics:
        lines.append('No answer has four words, so Dist-4g is of characters here, and cannot be compared '
                     'with that of words. Where all answers to a problem are alike it is at most '
                     f'{100 / data["n"]:.1f}.')
    return lines + size_notes(data)


def size_notes(data):
    """How the runs of a table differ from the paper's -> at most one markdown line, which tells it of one
    method; the JSON file tells it of each."""
    differing = data['not at paper size']
    if not differing:
        return []
    start = "No run is at the paper's size, so its numbers are not beside ours."
    if len(differing) < sum(row['method'] not in ('teacher', 'student') for row in data['rows']):
        names = ', '.join(text_of(name) for name in differing)
        start = f"Not at the paper's size, so without its numbers: {names}."

    # The first differences are enough: models and problems come first.
    method, differences = next(iter(differing.items()))
    listed = ', '.join(text_of(difference) for difference in differences[:MOST_DIFFERENCES])
    rest = len(differences) - MOST_DIFFERENCES
    more = f', and {rest} more' if rest > 0 else ''
    return [f'{start} {text_of(method)} has {listed}{more}.']


def score_cell(numbers):
    """Numbers of `over_seeds` as text."""
    if numbers is None:
        return 'not measured'
    return f'{span(numbers["by_seed"])} [{cell(numbers["interval"])}]'


def paper_cell(number, name, metric, label):
    """The paper's number for a row that is at its size; '' if it has none."""
    if name is None or label.lower() not in SETS or metric not in PRINTED[number].metrics:
        return ''
    return str(PRINTED[number].numbers[name][metric][SETS.index(label.lower())])


def table_head(titles):
    return [table_line(titles), '|---' * len(titles) + '|']


def table_line(cells):
    return f'| {" | ".join(cells)} |'


def text_of(name):
    """A name from a file, in a markdown table: a bar would end its cell, and a tag would be one."""
    text = ' '.join(printable(str(name)).split())
    for letter, instead in (('&', '&amp;'), ('<', '&lt;'), ('|', '&#124;'), ('`', '&#96;')):
        text = text.replace(letter, instead)
    return text


def printed_lines(number):
    """The paper's own numbers of a table -> markdown lines, with a column for ours, which are still to be
    measured."""
    if number == 3:
        titles = ['paper, Table 3', 'memory of the update, GB', '500 steps, minutes', 'ours at this size']
        lines = table_head(titles)
        for name, (memory, minutes) in MEMORY_AND_TIME.items():
            lines.append(table_line([name, str(memory), str(minutes), 'not yet measured']))
        return lines
    printed = PRINTED[number]
    titles = [f'paper, Table {number}']
    for metric in printed.metrics:
        title = METRICS[metric].format(n=16)
        titles += [f'{title}, {label.upper()}' for label in SETS]
    lines = table_head([*titles, 'ours at this size'])
    for name, numbers in printed.numbers.items():
        values = [str(value) for metric in printed.metrics for value in numbers[metric]]
        lines.append(table_line([name, *values, 'not yet measured']))
    return lines


# ---- Table 3 -------------------------------------------------------------------------------------

def table3_data(runs):
    """What Table 3 says of these runs: memory of the update in GB, and minutes of all steps without
    evaluation. Memory is measured on CUDA only."""
    chosen = runs_of_pair('same', runs)
    rows = []
    differences = {}
    machines = {}                            # in the order in which they come
    for method, group in by_method(chosen).items():
        paper, found = row_of_paper(2, group)
        if found:
            differences[method] = found
        peaks = [largest(run.rows, 'mem/update_dpeak') for run in group]
        rows.append({'method': method, 'seeds': [run.seed for run in group],
                     'steps': one_end(group, [run.rows[-1]['step'] for run in group]), 'paper': paper,
                     'gigabytes': None if None in peaks else peaks,
                     'minutes': [seconds_of_steps(run.rows) / 60 for run in group]})
        for run in group:
            machines |= dict.fromkeys(machines_of(run.folder))
    return {'table': 3, 'rows': rows, 'machines': list(machines), 'not at paper size': differences}


def largest(rows, name):
    """The largest value of a name in a log; None if it was not measured."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return max(values, default=None)


def table3_lines(data):
    """The same as markdown lines."""
    with_paper = any(row['paper'] for row in data['rows'])
    paper = ['paper'] if with_paper else []
    lines = ['**Table 3**: memory of the update and time, student and teacher of one architecture.', '']
    lines += table_head(['method', 'memory of the update, GB', *paper, 'all steps, minutes', *paper, 'steps',
                         'seeds'])
    for row in data['rows']:
        memory = 'not measured' if row['gigabytes'] is None else span(row['gigabytes'])
        minutes = span(row['minutes'])
        cells = [text_of(row['method']), memory, minutes]
        if with_paper:
            numbers = MEMORY_AND_TIME[row['paper']] if row['paper'] else ('', '')
            cells = [cells[0], memory, str(numbers[0]), minutes, str(numbers[1])]
        lines.append(table_line([*cells, str(row['steps']), str(len(row['seeds']))]))

    several = any(len(row['seeds']) > 1 for row in data['rows'])
    what = 'mean over seeds (range over seeds)' if several else 'the value of one seed'
    lines += ['', f"A cell: {what}. Memory: the update's peak minus what was allocated at its start, in the "
              "step where that is largest, on the largest rank; on CUDA only. Ours includes the teacher's "
              'forward. Time: all phases of all steps, without evaluation.',
              f'Made on: {text_of("; ".join(data["machines"]))}.']
    return lines + size_notes(data)


# ---- files ---------------------------------------------------------------------------------------

def write_table(data, lines, to):
    """Write to/tableN.json and to/tableN.md -> these files."""
    file = Path(to) / f'table{data["table"]}'
    write_json(file.with_suffix('.json'), data)
    with whole(file.with_suffix('.md')) as temporary:
        temporary.write_text('\n'.join(lines) + '\n')
    return [file.with_suffix('.json'), file.with_suffix('.md')]


def scores_table(number, folders, to):
    data = scores_data(number, read_runs(of_kind(folders, 'run')))
    return write_table(data, scores_lines(data), to)


def table2(folders, to='out/paper'):
    """Avg@n of runs between models of one architecture."""
    return scores_table(2, folders, to)


def table3(folders, to='out/paper'):
    """Memory of the update, and time."""
    data = table3_data(read_runs(of_kind(folders, 'run')))
    return write_table(data, table3_lines(data), to)


def table4(folders, to='out/paper'):
    """Avg@n and Best@n of runs with a teacher of another depth or width."""
    return scores_table(4, folders, to)


def table5(folders, to='out/paper'):
    """Dist-4g and length of the answers of Table 4."""
    return scores_table(5, folders, to)


def table6(folders, to='out/paper'):
    """Avg@n and Best@n of runs with a teacher of another vocabulary."""
    return scores_table(6, folders, to)
