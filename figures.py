"""
Run folders -> figures. Reads log.jsonl and nothing else.

    python figures.py out/toy                     out/toy/curve.png
    python figures.py out/a out/b out/c           three runs in one figure, in the first one's folder

Left: accuracy over steps, with lines for the untrained student and the teacher (the paper's
Figure 4). Right: mean cosine of the matched states, and thin lines for each layer (Figure 6).
"""
import sys
from pathlib import Path

from files import Log, whole
from runtime import UserError, run


def curve(folders, file):
    """Accuracy and rep-cosine curves of one run or several -> a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    fig, (acc, rep) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for i, folder in enumerate(folders):
        rows = Log(Path(folder) / 'log.jsonl').rows
        if len(rows) < 2:
            raise UserError(f'{folder}/log.jsonl: no steps in it; run distill.py first')
        color, name = f'C{i}', Path(folder).name
        avg = next((k for k in rows[0]['student'] if k.startswith('avg@')), None)
        if avg:
            points = [(0, rows[0]['student'][avg])] + [(r['step'], r[avg]) for r in rows[1:] if avg in r]
            acc.plot(*zip(*points, strict=True), color=color, marker='o', ms=4, label=f'{name}: distilled')
            if i == 0:
                acc.axhline(rows[0]['teacher'][avg], color='0.2', ls='--', lw=1, label='teacher')
                acc.axhline(rows[0]['student'][avg], color='0.6', ls=':', lw=1.2, label='student before')
            acc.set_ylabel(f'Avg@{avg[4:]}, %')
        steps = [r['step'] for r in rows[1:]]
        for layer in zip(*(r['rep/cos_layer'] for r in rows[1:]), strict=True):
            rep.plot(steps, layer, color=color, lw=0.6, alpha=0.35)
        mean = [r['rep/cos'] for r in rows[1:]]
        rep.plot(steps, mean, color=color, lw=1.8, label=f'{name}: mean over layers')
    acc.set(xlabel='step', ylim=(0, 102), title='held-out accuracy')
    rep.set(xlabel='step', ylabel='cosine to the teacher', title='representation match (thin: each layer)')
    for ax in (acc, rep):
        ax.grid(alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
        if ax.has_data():
            ax.legend(frameon=False, fontsize=9)
    with whole(file) as tmp:
        fig.savefig(tmp, dpi=130, format='png')
    plt.close(fig)


def main(folders):
    if not folders:
        raise UserError('no run folder given; python figures.py out/toy')
    for folder in folders:
        if not (Path(folder) / 'log.jsonl').exists():
            raise UserError(f'{folder}/log.jsonl: no such file; give run folders of distill.py')
    file = Path(folders[0]) / 'curve.png'
    curve(folders, file)
    print(file)


if __name__ == '__main__':
    run(main, lambda: sys.argv[1:])
