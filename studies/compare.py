"""
Run a comparison of methods: many runs of distill.py, then one table and one figure.

    python -m studies.compare toy_comparison        every run of configs/toy_comparison.py, one process a core
    python -m studies.compare my/study.py           any Python file of that form

It writes out/<name of the study>/: a run folder for each method and seed with a log beside it (what the run
prints, as it prints it: tail -f), table.md and curves.png. A study is a Python file that holds

    seeds     list of numbers; each method runs once with each
    runs      {method: command line of distill.py, as a list}
    panels    {title: methods} of the figure, if wanted; {} = no figure
    bridges   {name: command line of bridge.py}, if wanted: made first, for each seed; a run names its folder
              as bridge={name}

Simpler than a scheduler: the same command again reads the runs that are finished, resumes those that were
interrupted and starts those that are missing. It uses one machine, and a single GPU for one run at a time.
Runs that other code has made are not made again: a line under the table says which they are.
"""
import os
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import torch

from configs import free, load_config
from studies.children import log_text, run_logged, show_failure
from studies.drawing import COLUMN, PAGE, draw_seeds, look_of, new_figure, paper_style, save
from studies.figures import accuracy, read_log, require_comparable
from support.command_help import command_words
from support.fields import Field, check_fields
from support.files import whole
from support.progress import Progress
from support.provenance import ANOTHER_RUN, code_notes, lasting_starts, read_starts
from support.run_folder import MEASURED, plain_scores, scores_of, stored_config, teacher_scores
from support.runtime import ROOT, UserError, print0, run, run_file, shown

# What a study's variables may hold. Names are those of methods, of bridges, and of panels.
COMMANDS = Field(dict, items=Field(list, items=Field(str)))
STUDY = {'seeds': Field(list, 1, items=Field(int)), 'runs': replace(COMMANDS, low=1),
         'bridges': replace(COMMANDS, default={}),
         'panels': Field(dict, items=Field(list, 1, items=Field(str)), default={})}
PHASES = ('teacher', 'student', 'update')    # of a step, after its rollout
LONGEST_NAME = 100              # a name is part of a folder's name

# ---- many processes ------------------------------------------------------------------------------

def launch(script, jobs, ended=None):
    """Run a script with each {folder: command line}, one process a core with one thread each. A finished
    folder costs seconds. A run that fails is told at once; it is a UserError when the others have ended.

    ended: a function that is given the folder of each run that has succeeded.
    """
    failures = []
    with ThreadPoolExecutor(workers()) as pool, Progress(script, len(jobs), 'runs') as progress:
        waiting = {}
        for folder, arguments in jobs.items():
            waiting[pool.submit(run_script, script, arguments, folder)] = folder
        try:
            for job in as_completed(waiting):
                folder = waiting[job]
                if job.result() != 0:
                    last_line = show_failure(folder, log_text(log_of(folder)))
                    failures.append(f'{folder}: {last_line}; its log is {log_of(folder)}')
                elif ended:
                    ended(folder)
                progress.extra = f'the last one {folder.name}'
                progress.update(progress.done + 1)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)       # runs that have begun save themselves
            raise
    if failures:
        more = f' ({len(failures)} runs failed)' if len(failures) > 1 else ''
        raise UserError(failures[0] + more)


def run_script(script, arguments, folder):
    """One process to its end -> exit code. What it prints is in a log beside its folder."""
    return run_logged([script, *arguments], log_of(folder), OMP_NUM_THREADS='1')


def log_of(folder):
    return folder.with_name(f'{folder.name}.log')


def workers():
    """Runs at once: one for each core that this process may use; on a GPU one after the other."""
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def is_finished(folder, arguments):
    """Has a run ended, with the config that its command line asks for?"""
    if not (folder / 'results.json').exists():
        return False
    asked = checked_config('distill.py', folder, arguments)
    stored = stored_config(folder)

    # 'auto' and today's date were resolved when the run was started.
    resolved = (*free, 'dtype', 'date')
    return all(stored.get(key) == value for key, value in asked.items() if key not in resolved)


# ---- the study -----------------------------------------------------------------------------------

def read_study(name):
    """A study's path, or its name in configs/ -> (file, its variables)."""
    for file in (Path(name), ROOT / 'configs' / f'{name}.py'):
        if file.is_file():
            plan = run_file(file, name, 'study')
            if {'seeds', 'runs'} <= plan.keys():
                check_study(file, plan)
                return file, plan
            break
    raise UserError(f'{name}: not a Python file with seeds and runs; see configs/toy_comparison.py')


def check_study(file, plan):
    """UserError if a study's variables are not what the header of this file says."""
    check_fields(plan, STUDY, file, 'see configs/toy_comparison.py')
    if len(set(plan['seeds'])) < len(plan['seeds']):
        raise UserError(f'{file}: seeds={shown(plan["seeds"])}: one of them is there twice; delete it')
    for variable in ('runs', 'bridges', 'panels'):
        for name in plan.get(variable, {}):
            if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
                raise UserError(f'{file}: {variable}: {shown(name)} is no name; give a text of 1 to '
                                f'{LONGEST_NAME} characters')
    for title, names in plan.get('panels', {}).items():
        unknown = [name for name in names if name not in plan['runs']]
        if unknown:
            raise UserError(f'{file}: panel {shown(title)}: {shown(unknown[0])} is none of the runs; give '
                            'names of runs')


def slug(name):
    """A method's name as a folder's: 'OPD, full KL' -> 'opd_full_kl'."""
    return re.sub(r'[^a-z0-9.=-]+', '_', name.lower())


def command_lines(plan, out):
    """-> (bridge jobs, run jobs, run folders): {folder: arguments} of each script, and {(method, seed):
    folder}. Arguments that are given later win, so a study's seed and folders cannot be overridden."""
    bridge_jobs = {}
    run_jobs = {}
    folders = {}
    for seed in plan['seeds']:
        stage1 = {}                          # {bridge's name: its folder} of this seed
        for name, arguments in plan.get('bridges', {}).items():
            stage1[name] = out / f'{slug(name)}-stage1-s{seed}'
            bridge_jobs[stage1[name]] = [*arguments, f'seed={seed}', f'bridge={stage1[name]}']
        for name, arguments in plan['runs'].items():
            folder = out / f'{slug(name)}-s{seed}'
            folders[name, seed] = folder
            run_jobs[folder] = [*filled_in(arguments, stage1), f'seed={seed}', f'out_dir={folder}']
    if len(run_jobs) < len(folders):
        raise UserError(f'{out.name}: two names or seeds share a folder; make them differ in letters or '
                        'digits')
    return bridge_jobs, run_jobs, folders


def filled_in(arguments, stage1):
    """Arguments with the folder of a bridge for each {name of a bridge}."""
    filled = []
    for argument in arguments:
        for name, folder in stage1.items():
            argument = argument.replace(f'{{{name}}}', str(folder))
        if '{' in argument or '}' in argument:
            raise UserError(f'{shown(argument)}: braces are for the name of a bridge, one of '
                            f'{", ".join(stage1) or "none"}; mend the study')
        filled.append(argument)
    return filled


def checked_config(script, folder, arguments):
    """The config of a script's command line; an error names the run's folder."""
    try:
        return load_config(arguments, script)
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None


def require_one_table(run_jobs, folders, seeds):
    """Before hours of work: can these runs be put in one table and figure?"""
    configs = {}
    for folder, arguments in run_jobs.items():
        configs[folder] = checked_config('distill.py', folder, arguments)
        if not configs[folder]['eval_data']:
            raise UserError(f'{folder}: a run without evaluation cannot be put in a table; set eval_data=')

    # Within a seed: over seeds the toy's student differs, and the table shows mean and range.
    for seed in seeds:
        of_seed = [folder for (_, its_seed), folder in folders.items() if its_seed == seed]
        require_comparable({folder: configs[folder] for folder in of_seed})


def compare(study):
    """Run a comparison and write its table and figure into out/<its name>."""
    file, plan = read_study(study)
    out = Path('out') / file.stem
    bridge_jobs, run_jobs, folders = command_lines(plan, out)
    for folder, arguments in bridge_jobs.items():
        checked_config('bridge.py', folder, arguments)
    require_one_table(run_jobs, folders, plan['seeds'])
    print0(f'{file.stem}: {len(run_jobs)} runs in {out}')

    # A bridge that is there is not made again: bridge.py, unlike distill.py, would begin anew.
    launch('bridge.py', {folder: arguments for folder, arguments in bridge_jobs.items()
                         if not (folder / 'bridge.json').exists()})
    launch('distill.py', run_jobs)

    logs = {}                                # {method: [rows of each seed]}
    for name in plan['runs']:
        logs[name] = [read_finished_log(folders[name, seed]) for seed in plan['seeds']]
    lines = comparison_table(logs) + notes_under_table(folders, plan['seeds'])
    with whole(out / 'table.md') as temporary:
        temporary.write_text('\n'.join(lines) + '\n')
    print0('\n'.join(lines))
    panels = plan.get('panels', {file.stem: list(plan['runs'])})
    if panels:
        comparison_figure(logs, panels, out / 'curves.png')
    print0(f'{out}: table.md' + (', curves.png' if panels else ''))


# ---- table and figure ----------------------------------------------------------------------------

def span(values):
    """Mean and range over seeds: '60.0 (50.0-70.0)'; of a single value, the value."""
    mean = f'{fmean(values):.1f}'
    return mean if len(values) == 1 else f'{mean} ({min(values):.1f}-{max(values):.1f})'


def table_metrics(first_row):
    """The row of step 0 -> names of the metrics that the table shows: Avg@n, Best@n, length. Of several sets
    their means."""
    names = plain_scores(first_row, 'eval')
    return [name for start in ('avg@', 'best@', 'len') for name in names if name.startswith(start)]


def read_finished_log(folder):
    """The rows of a finished run's log, with everything that the table shows."""
    rows = read_log(folder)
    file = f'{folder}/log.jsonl'
    advice = f'delete {folder} to run it again'
    metrics = table_metrics(rows[0])
    if len(metrics) != 3:
        raise UserError(f'{file}: scores of {", ".join(metrics) or "nothing"}; {advice}')
    measured = replace(MEASURED, null=False)
    scores = {f'eval/{metric}': measured for metric in metrics}
    check_fields(rows[-1], scores, f'{file}: the last row', advice)
    seconds = {f'time/{phase}': measured for phase in PHASES}
    for number, row in enumerate(rows[1:], 2):
        check_fields(row, seconds, f'{file}:{number}', advice)
    return rows


def comparison_table(logs):
    """{method: [rows of each seed]} -> markdown lines.

    seconds: of all steps, without evaluation. ms a step: median of what comes after the rollout (teacher,
    student, update). Of several sets the table has the mean.
    """
    first_method = next(iter(logs.values()))
    average, best_of, _ = table_metrics(first_method[0][0])
    columns = ['method', average.title(), best_of.title(), 'length', 'steps', 'seconds', 'ms a step', 'seeds']
    lines = [f"| {' | '.join(columns)} |", '|---' * len(columns) + '|']

    def add_line(name, scores, *rest):
        cells = [name, *(span([values[metric] for values in scores]) for metric in (average, best_of, 'len'))]
        lines.append(f"| {' | '.join([*cells, *rest, str(len(scores))])} |")

    # The models before the first step are the same for every method. A teacher need not be evaluated.
    sides = {'student': 'eval'} | {name: name for name in teacher_scores(first_method[0][0])}
    for name, side in sides.items():
        scores = [scores_of(rows[0], side) for rows in first_method]
        if all(scores):
            add_line(name, scores, '', '', '')
    for name, seeds in logs.items():
        last_rows = [rows[-1] for rows in seeds]
        scores = [scores_of(row, 'eval') for row in last_rows]
        seconds, milliseconds = step_times(seeds)
        add_line(name, scores, str(last_rows[0]['step']), f'{seconds:.0f}', f'{milliseconds:.0f}')
    return lines


def notes_under_table(folders, seeds):
    """What a reader must know before comparing these runs -> markdown lines: that other code has made some of
    them, or that the runs of one seed did not begin with the same files. Most often there is none.

    folders: {(method, seed): run folder}.
    """
    notes = code_notes(list(folders.values()))
    shared = {'student': ANOTHER_RUN['student'], 'eval_data': 'the held-out problems or their prompts'}
    for seed in seeds:
        starts = []
        for (_, its_seed), folder in folders.items():
            if its_seed == seed:
                starts += lasting_starts(read_starts(folder))
        for key, what in shared.items():
            if any(start.get(key) != starts[0].get(key) for start in starts):
                notes.append(f'the runs of seed {seed} differ in {what} and cannot be compared; delete their '
                             'folders and run the study again')
    lines = []
    for note in notes:
        lines += ['', f'When this table was written: {note}.']
    return lines


def step_times(seeds):
    """Logs of one method -> (seconds of all steps, mean over seeds; milliseconds of the median step after its
    rollout)."""
    totals = []
    updates = []
    for rows in seeds:
        phases = [value for row in rows for key, value in row.items() if key.startswith('time/')]
        totals.append(sum(value for value in phases if value is not None))
        for row in rows[1:]:
            updates.append(sum(row[f'time/{phase}'] for phase in PHASES))
    return fmean(totals), 1000 * median(updates)


def comparison_figure(logs, panels, file):
    """Accuracy over steps, mean over seeds and each seed; a panel for each {title: methods}."""
    points = {name: points_of_seeds(name, seeds) for name, seeds in logs.items()}
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with paper_style():
        width = PAGE if columns > 1 else COLUMN
        figure, axes = new_figure(rows, columns, width, 2.1 * rows, sharey=True)
        for unused in axes[len(panels):]:
            unused.remove()
        for panel, (title, names) in zip(axes, panels.items(), strict=False):
            for name in names:
                steps, by_seed = points[name]
                draw_seeds(panel, steps, by_seed, name, look_of(name))
            metric = draw_models_before(panel, logs[names[0]])
            panel.set(ylim=(0, 102), title=title)
        for panel in axes[:len(panels)][-columns:]:
            panel.set_xlabel('step')
        for panel in axes[:len(panels):columns]:
            panel.set_ylabel(f'Avg@{metric[4:]}, %')
        count = len(logs[names[0]])
        save(figure, file, f'mean of {count} seeds; thin: each seed' if count > 1 else 'one seed')


def points_of_seeds(name, seeds):
    """A method's logs -> (steps at which the student was evaluated, [accuracies of each seed]).

    Seeds that were evaluated at different steps have no mean; that is a UserError.
    """
    by_seed = [dict(accuracy(rows)[0]) for rows in seeds]
    steps = list(by_seed[0])
    for number, points in enumerate(by_seed[1:], 2):
        different = sorted(points.keys() ^ set(steps))
        if different:
            raise UserError(f'{shown(name)}: seeds number 1 and {number} were evaluated at different steps '
                            f'(step {different[0]} in one only); delete one run folder to run it again')
    return steps, [list(points.values()) for points in by_seed]


def draw_models_before(axes, seeds):
    """Lines for the teachers and for the student before the first step, mean over seeds -> name of the
    metric."""
    metric = accuracy(seeds[0])[1]
    sides = {name: name for name in teacher_scores(seeds[0][0])} | {'student': 'eval'}
    for name, side in sides.items():
        scores = [scores_of(rows[0], side) for rows in seeds]
        if all(scores):
            mean = fmean(values[metric] for values in scores)
            axes.axhline(mean, lw=1, label=name, **look_of(name))
    return metric


def main(arguments):
    if len(arguments) != 1 or arguments[0].startswith('-'):
        raise UserError('give one study: python -m studies.compare toy_comparison')
    compare(arguments[0])


if __name__ == '__main__':
    run(main, lambda: command_words('studies/compare.py'))
