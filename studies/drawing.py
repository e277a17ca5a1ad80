"""
The look of every figure: sizes, fonts, one look for each method, and saving.

    with paper_style():
        figure, (left, right) = new_figure(columns=2, width=PAGE, height=2.3)
        draw_seeds(left, steps, [[20, 60], [22, 64]], 'OPRD', look_of('OPRD'))
        left.set(xlabel='step', ylabel='Avg@16 (%)')
        save(figure, 'out/toy/accuracy', notes='mean of 2 seeds')         # accuracy.png and accuracy.pdf

A figure has the size at which it is printed: a column or a page of a paper is so many inches wide, and its
text has 7 to 9 points. Each method has one color (Okabe and Ito's, and others that color-blind people can
tell apart), one line style and one marker, so that it is recognized in all figures and also in grey.
The same input gives the same bytes: a file holds no date and no version of matplotlib, the fonts come with
matplotlib, and the settings of the user's matplotlibrc have no effect.

Simpler than usual: no style file and no pyplot. A figure that is given up half-way is simply forgotten, and
no display is looked for. matplotlib is imported inside the functions: it takes a second, and the training
loop imports studies/figures.py, which imports this file.
"""
import re
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from support.files import whole
from support.runtime import printable

COLUMN = 3.25                   # inches: the width of a column,
PAGE = 6.75                     # and of a page
DPI = 200                       # of a PNG

STYLE = {
    # Points. 9 is for titles, 7 for what stands beside a line.
    'font.size': 8, 'axes.titlesize': 9, 'axes.labelsize': 8, 'figure.titlesize': 9, 'figure.labelsize': 8,
    'xtick.labelsize': 7, 'ytick.labelsize': 7, 'legend.fontsize': 7, 'legend.title_fontsize': 7,
    'lines.linewidth': 1.3, 'lines.markersize': 3.5, 'axes.linewidth': 0.6, 'grid.linewidth': 0.5,
    'xtick.major.width': 0.6, 'ytick.major.width': 0.6, 'xtick.major.size': 2.5, 'ytick.major.size': 2.5,
    'xtick.minor.width': 0.4, 'ytick.minor.width': 0.4, 'xtick.minor.size': 1.5, 'ytick.minor.size': 1.5,

    'axes.grid': True, 'grid.alpha': 0.25, 'axes.axisbelow': True,
    'axes.spines.top': False, 'axes.spines.right': False,
    'legend.frameon': False, 'legend.handlelength': 3,
    'pdf.fonttype': 42,                      # text stays text, which journals ask for
}

# One method, one look. The two models before the first step are lines without markers.
LOOKS = {
    'teacher': ('0.25', (0, (5, 2)), 'None'),
    'student': ('0.5', (0, (1, 1.5)), 'None'),
    'OPRD': ('#0072B2', '-', 'o'),
    'OPD top-1': ('#D55E00', '--', 's'),
    'OPD top-16': ('#E69F00', '-.', '^'),
    'OPD full KL': ('#CC79A7', ':', 'D'),
    'OPD top-1 + 1 OPRD': ('#56B4E9', '--', 'v'),
    'OPD top-1 + 10 OPRD': ('#009E73', '-', 'P'),
    'OPRD-Bridge': ('#332288', '-', 'X'),
    'OPRD-Bridge, then OPD top-1': ('#882255', '-.', '*'),
    'next byte': ('#000000', ':', 'p'),
}

# Of all other names. The three lengths have no common divisor, so 5 * 7 * 4 names look different.
OTHER_COLORS = ['#44AA99', '#AA4499', '#999933', '#661100', '#6699CC']
OTHER_MARKERS = ['<', '>', 'd', 'h', 'o', 's', '^']
OTHER_LINES = [(0, (7, 1.5)), (0, (3, 1, 1, 1, 1, 1)), '-', (0, (2, 1))]

MOST_MARKERS = 14               # on a line; of more points some have none
inside = []                     # the looks given out in each paper_style that is open: {name: look}


@contextmanager
def paper_style():
    """The settings of matplotlib for everything that is drawn inside, whatever they were before.

    Names without a look of their own get theirs in the order of first use, which begins anew with the
    outermost `paper_style`. So a figure looks the same whatever was drawn before it, and figures inside one
    `paper_style` share their looks.
    """
    import matplotlib
    from matplotlib.style.core import STYLE_BLACKLIST
    settings = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in STYLE_BLACKLIST}
    with matplotlib.rc_context(settings | STYLE):
        inside.append(inside[-1] if inside else {})
        try:
            yield
        finally:
            inside.pop()


def new_figure(rows=1, columns=1, width=PAGE, height=2.3, sharey=False):
    """-> (figure, flat list of its axes, row by row). width, height: of the whole figure, in inches. To be
    called inside `paper_style`."""
    from matplotlib.figure import Figure
    assert inside, 'new_figure outside of paper_style'
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    return figure, list(axes.flat)


def look_of(name):
    """A method's name -> {'color', 'linestyle', 'marker'}, for `axes.plot(x, y, **look)`.

    A rank or a key in the name makes no other method: 'OPRD-Bridge r=8' and 'OPRD, lr=0.001' have the looks
    of 'OPRD-Bridge' and 'OPRD', unless another one of the same method was there before.
    """
    assert inside, 'look_of outside of paper_style'
    given = inside[-1]
    if name not in given:
        family = re.sub(r' r=\d+|, \w+=.*', '', name)
        if name in LOOKS:
            look = LOOKS[name]
        elif family in LOOKS and LOOKS[family] not in given.values():
            look = LOOKS[family]
        else:
            number = sum(used not in LOOKS.values() for used in given.values())
            look = (OTHER_COLORS[number % 5], OTHER_LINES[number % 4], OTHER_MARKERS[number % 7])
        given[name] = look
    return dict(zip(('color', 'linestyle', 'marker'), given[name], strict=True))


def draw_seeds(axes, steps, by_seed, label, look):
    """One method: the mean over seeds with markers, and each seed as a thin line of the same color.

    by_seed: a list of values for each seed, measured at the same steps.
    """
    if len(by_seed) > 1:
        for values in by_seed:
            axes.plot(steps, values, color=look['color'], lw=0.5, alpha=0.6)
    mean = [fmean(values) for values in zip(*by_seed, strict=True)]
    axes.plot(steps, mean, label=label, markevery=-(-len(steps) // MOST_MARKERS) or 1, **look)
    whole_ticks(axes)


def whole_ticks(axes):
    """Ticks of the x axis at whole numbers only: there is no step 2.5."""
    from matplotlib.ticker import MaxNLocator
    locator = axes.xaxis.get_major_locator()
    if isinstance(locator, MaxNLocator):
        locator.set_params(integer=True)


def save(figure, file, notes=''):
    """Legends, and the figure as file.png and file.pdf, each written completely or not at all.

    file: without an ending. notes: a text below the panels, for what a reader must know: how many seeds and
    answers, what the thin lines are.
    """
    with paper_style():
        add_legends(figure)
        if notes:
            figure.supxlabel(notes, fontsize=7)
        show_as_it_is(figure)
        files = []
        for ending, metadata in (('png', ['Software']), ('pdf', ['Creator', 'Producer', 'CreationDate'])):
            files.append(Path(f'{file}.{ending}'))
            with whole(files[-1]) as temporary:
                figure.savefig(temporary, dpi=DPI, format=ending, metadata=dict.fromkeys(metadata))
    return files


def add_legends(figure):
    """A legend in each panel with labels; if two panels have a label in common, one legend below all."""
    panels = [axes for axes in figure.axes if axes.get_legend_handles_labels()[0] and not axes.get_legend()]
    handles = {}
    count = 0
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
            count += 1
    if count > len(handles):
        columns = min(len(handles), 5 if figure.get_figwidth() > 5 else 2)
        figure.legend(handles.values(), handles, loc='outside lower center', ncols=columns)
    else:
        for axes in panels:
            axes.legend()


def show_as_it_is(figure):
    """Names of folders and of metrics are drawn as they are: '$' begins no formula, and no control character
    reaches a terminal in a warning of matplotlib. Powers of ten at the ticks are matplotlib's own formulas."""
    from matplotlib.text import Text
    own = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            keep_formulas = axis.get_scale() == 'log'
            ticks = axis.get_ticklabels(which='both')
            if keep_formulas:
                own.update(ticks)
    for text in figure.findobj(Text):
        if text not in own:
            text.set_text(printable(text.get_text()))
            text.set_parse_math(False)
