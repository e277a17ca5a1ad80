"""
Run folders -> figures and tables. Reads log.jsonl and nothing else.

    python -m studies.figures out/toy             out/toy/curve.png
    python -m studies.figures out/a out/b out/c   three runs in one figure, in the first one's folder
    python -m studies.figures out/toy_bridge_stage1   a bridge, or several: out/toy_bridge_stage1/bridge.png
    python -m studies.figures --run toy_comparison  every run of configs/toy_comparison.py, one a core, then
                                                  table.md and curves.png in out/toy_comparison

Left: accuracy over steps, with lines for the untrained student and the teacher (the paper's
Figure 4). Right: mean cosine of the matched states, and thin lines for each layer (Figure 6).
A comparison is a Python file with `seeds`, `runs` = {name: command line of distill.py} and, if wanted,
`panels` = {title: names} of its figure and `bridges` = {name: command line of bridge.py}, whose folder a
run calls {name}; a run that was interrupted goes on, one that is finished is read.
"""
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

from support.files import Log, read_json, whole
from support.runtime import ROOT, UserError, run

# ---- one figure of a few runs -----------------------------------------------------------------

def accuracy(rows):
    """Points (step, Avg@n) of a log, and the metric's name; None if nothing was evaluated."""
    avg = next((k for k in rows[0]['student'] if k.startswith('avg@')), None)
    points = {r['step']: r[avg] for r in rows if avg in r} | ({0: rows[0]['student'][avg]} if avg else {})
    return sorted(points.items()), avg


def read_log(folder):
    """The rows of a run's log.jsonl; step 0 and at least one more."""
    rows = Log(Path(folder) / 'log.jsonl').rows
    if len(rows) < 2:
        raise UserError(f'{folder}/log.jsonl: no steps in it; run distill.py first')
    return rows


def curve(folders, file):
    """Accuracy and rep-cosine curves of one run or several -> a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    fig, (acc, rep) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for i, folder in enumerate(folders):
        rows, color, name = read_log(folder), f'C{i}', Path(folder).name
        points, avg = accuracy(rows)
        if avg:
            acc.plot(*zip(*points, strict=True), color=color, marker='o', ms=4, label=f'{name}: distilled')
            if i == 0:
                acc.axhline(rows[0]['teacher'][avg], color='0.2', ls='--', lw=1, label='teacher')
                acc.axhline(rows[0]['student'][avg], color='0.6', ls=':', lw=1.2, label='student before')
            acc.set_ylabel(f'Avg@{avg[4:]}, %')
        looked = [r for r in rows if 'rep/cos' in r]
        steps = [r['step'] for r in looked]
        for layer in zip(*(r['rep/cos_layer'] for r in looked), strict=True):
            rep.plot(steps, layer, color=color, lw=0.6, alpha=0.35)
        if looked:
            mean = [r['rep/cos'] for r in looked]
            rep.plot(steps, mean, color=color, lw=1.8, label=f'{name}: mean over layers')
    acc.set(xlabel='step', ylim=(0, 102), title='held-out accuracy')
    rep.set(xlabel='step', ylabel='cosine to the teacher', title='representation match (thin: each layer)')
    finish(fig, (acc, rep), file)


def bridges(folders, file):
    """Stage 1 of OPRD-Bridge, one fit or several -> a PNG. Left: held-out cosine against rank (Figure 12),
    with the controls of a single one; right: every layer at the rank that is used. A teacher that reads
    gibberish shows in the right half, at the last layer, and not in the mean."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    fig, (rank, layer) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    words = {'cos': 'bridge', 'before': 'random P_S', 'shuffled': 'shuffled pairs', 'mean_only': 'mean alone'}
    colors = iter(f'C{i}' for i in range(99))
    for folder in folders:
        made = read_json(Path(folder) / 'bridge.json')
        layers = {int(l): v for l, v in made['layers'].items()}
        for key, word in words.items() if len(folders) == 1 else [('cos', Path(folder).name)]:
            color = next(colors)
            ranks = [int(r) for r in layers[max(layers)][key]]
            each = [[v[key][str(r)] for r in ranks] for v in layers.values()]
            for line in each if key == 'cos' and len(folders) == 1 else ():
                rank.plot(ranks, line, color=color, lw=0.5, alpha=0.4)
            dots = dict(color=color, marker='o', ms=3)
            rank.plot(ranks, [fmean(v) for v in zip(*each, strict=True)], label=word, **dots)
            layer.plot(list(layers), [v[key][str(made['used'])] for v in layers.values()],
                       label=f"{word}, rank {made['used']}", **dots)
        if len(folders) == 1:
            rank.axvline(made['rank'], color='0.3', ls=':', lw=1, label=f"Theorem 3: rank {made['rank']}")
    rank.set(xscale='log', xlabel='rank r', ylabel='held-out cosine', title='mean over layers (Figure 12)')
    powers = [r for r in ranks if r & (r - 1) == 0]
    rank.set_xticks(powers, powers)
    rank.minorticks_off()
    layer.set(xlabel='student layer', xticks=list(layers), title='each layer')
    finish(fig, (rank, layer), file)


def finish(fig, axes, file):
    """Grid, legends, and the file, whole."""
    from matplotlib import pyplot as plt
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    with whole(file) as tmp:
        fig.savefig(tmp, dpi=130, format='png')
    plt.close(fig)


# ---- a comparison: many runs, a table, a figure -------------------------------------------------

def launch(script, jobs):
    """A script on each {folder: command line}, one process a core with one thread each; a finished
    folder costs seconds. The first failure is a UserError, once the others have ended."""
    env, failed = {**os.environ, 'OMP_NUM_THREADS': '1'}, []

    def one(folder, args):
        done = subprocess.run([sys.executable, ROOT / script, *args], env=env, text=True,
                              capture_output=True)
        return folder, done.returncode, (done.stderr.strip().splitlines() or ['no message'])[-1]
    with ThreadPoolExecutor(workers()) as pool, tqdm(total=len(jobs), unit='run') as bar:
        try:
            for job in as_completed([pool.submit(one, *job) for job in jobs.items()]):
                folder, code, line = job.result()
                bar.update()
                bar.set_postfix_str(folder.name)
                failed += [f'{folder}: {line}'] * (code != 0)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)       # those that run save themselves
            raise
    if failed:
        raise UserError(failed[0] + (f' ({len(failed)} runs failed)' if failed[1:] else ''))


def workers():
    """Runs at once: one for each core that this process may use; on a GPU one after the other."""
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def slug(name):
    return re.sub(r'[^a-z0-9.=-]+', '_', name.lower())


def compare(study):
    """Run a comparison and write its table and figure into out/<its name>."""
    file = next((p for p in (Path(study), ROOT / 'configs' / f'{study}.py') if p.is_file()), None)
    plan = runpy.run_path(str(file)) if file else {}
    if not {'seeds', 'runs'} <= plan.keys():
        raise UserError(f'{study}: not a Python file with seeds and runs; see configs/toy_comparison.py')
    out, seeds, runs = Path('out') / file.stem, plan['seeds'], plan['runs']
    folder = {(name, s): out / f'{slug(name)}-s{s}' for name in runs for s in seeds}
    if len(set(folder.values())) < len(folder):
        raise UserError(f'{file}: two names or seeds share a folder; make them differ in letters or digits')
    print(f'{file.stem}: {len(folder)} runs in {out}')
    fits = plan.get('bridges', {})
    stage1 = {s: {name: out / f'{slug(name)}-stage1-s{s}' for name in fits} for s in seeds}
    launch('bridge.py', {f: [*fits[name], f'seed={s}', f'bridge={f}'] for s in seeds
                         for name, f in stage1[s].items() if not (f / 'bridge.json').exists()})
    launch('distill.py', {f: [*(a.format(**stage1[s]) for a in runs[name]), f'seed={s}', f'out_dir={f}']
                          for (name, s), f in folder.items()})
    logs = {name: [read_log(folder[name, s]) for s in seeds] for name in runs}
    metrics = {accuracy(rows)[1] for many in logs.values() for rows in many}
    if len(metrics) > 1 or None in metrics:
        raise UserError(f'{file}: runs without evaluation or with several eval_n cannot be put in one table')
    lines = comparison_table(logs)
    with whole(out / 'table.md') as tmp:
        tmp.write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
    panels = plan.get('panels', {file.stem: list(runs)})
    if panels:
        comparison_figure(logs, panels, out / 'curves.png')
    print(f'{out}: table.md' + ', curves.png' * bool(panels))


def span(values):
    """Mean and range over seeds."""
    low, mean, high = (f'{x:.1f}' for x in (min(values), fmean(values), max(values)))
    return mean if len(values) == 1 else f'{mean} ({low}-{high})'


def comparison_table(logs):
    """{method: [rows of each seed]} -> markdown lines. seconds: of all steps, without evaluation; ms a
    step: median of what comes after the rollout (teacher, student, update)."""
    some = next(iter(logs.values()))
    avg, best = (k for k in some[0][0]['student'] if '@' in k)
    lines = [f'| method | {avg.title()} | {best.title()} | length | steps | seconds | ms a step | seeds |',
             '|---|---|---|---|---|---|---|---|']

    def line(name, rows, *rest):
        cells = [name, *(span([r[k] for r in rows]) for k in (avg, best, 'len')), *rest, str(len(rows))]
        lines.append(f"| {' | '.join(cells)} |")
    for name in ('student', 'teacher'):
        line(name, [rows[0][name] for rows in some], '', '', '')
    for name, seeds in logs.items():
        seconds = fmean(sum(v for r in rows for k, v in r.items() if k.startswith('time/')) for rows in seeds)
        ms = 1000 * median(sum(r[f'time/{phase}'] for phase in ('teacher', 'student', 'update'))
                           for rows in seeds for r in rows[1:])
        last = [rows[-1] for rows in seeds]
        line(name, last, str(last[0]['step']), f'{seconds:.0f}', f'{ms:.0f}')
    return lines


def comparison_figure(logs, panels, file):
    """Accuracy over steps, mean over seeds with their range; a panel for each {title: methods}."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    fig, (axes,) = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), constrained_layout=True,
                                sharey=True, squeeze=False)
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            runs, avg = zip(*(accuracy(rows) for rows in logs[name]), strict=True)
            steps = [step for step, _ in runs[0]]
            seeds = list(zip(*([v for _, v in points] for points in runs), strict=True))   # [step][seed]
            ax.plot(steps, [fmean(v) for v in seeds], color=f'C{i}', marker='o', ms=3, label=name)
            ax.fill_between(steps, [min(v) for v in seeds], [max(v) for v in seeds], color=f'C{i}',
                            alpha=0.12, lw=0)
        first = [rows[0] for rows in logs[names[0]]]
        for side, style in (('teacher', '--'), ('student', ':')):
            ax.axhline(fmean(r[side][avg[0]] for r in first), color='0.3', ls=style, lw=1, label=side)
        ax.set(xlabel='step', ylim=(0, 102), title=title)
    axes[0].set_ylabel(f'Avg@{avg[0][4:]}, %: mean and range of {len(first)} seeds')
    finish(fig, axes, file)


def main(args):
    if args[:1] == ['--run'] and len(args) == 2:
        return compare(args[1])
    if not args or args[0].startswith('-'):
        raise UserError('no run folder given; python -m studies.figures out/toy, or --run toy_comparison')
    if all((Path(folder) / 'bridge.json').exists() for folder in args):
        file = Path(args[0]) / 'bridge.png'
        bridges(args, file)
        print(file)
        return
    for folder in args:
        if not (Path(folder) / 'log.jsonl').exists():
            raise UserError(f'{folder}/log.jsonl: no such file; give run folders of distill.py')
    file = Path(args[0]) / 'curve.png'
    curve(args, file)
    print(file)


if __name__ == '__main__':
    run(main, lambda: sys.argv[1:])
