"""
The look of every figure: sizes, fonts, one look for each method, legends that cover nothing, and saving.

    with paper_style():
        figure, (left, right) = new_figure(columns=2, width=PAGE, height=2.3)
        draw_seeds(left, steps, [[20, 60], [22, 64]], 'OPRD', look_of('OPRD'))
        left.set(xlabel='step', ylabel='Avg@16 (%)')
        save(figure, 'out/toy/accuracy', notes='mean of 2 seeds')         # accuracy.png and accuracy.pdf

A figure has the size at which it is printed: a column or a page of a paper is so many inches wide, and its
text has 7 to 9 points. Each method has one color (of Okabe and Ito, and of Tol, for color-blind people), one
line style and one marker, so that it is recognized in all figures and also in grey. The same input gives the
same bytes: a file holds no date and no version, the font comes with matplotlib, and the settings of the
user's matplotlibrc have no effect. Another version of matplotlib may draw a little differently.

Simpler than usual: no style file and no pyplot. A figure that is given up half-way is simply forgotten, and
no display is looked for. matplotlib is imported inside the functions: it takes a second, and the training
loop imports studies/figures.py, which imports this file. It does not know what a run is.
"""
import re
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from support.files import whole
from support.runtime import cut, printable

COLUMN = 3.25                   # inches: the width of a column,
PAGE = 6.75                     # and of a page
DPI = 200                       # of a PNG
POINTS = 72                     # in an inch

STYLE = {
    # Points: 9 for titles, 8 for the names of axes, 7 for the rest.
    'font.size': 7, 'axes.titlesize': 9, 'axes.labelsize': 8, 'figure.titlesize': 9, 'figure.labelsize': 8,
    'xtick.labelsize': 7, 'ytick.labelsize': 7, 'legend.fontsize': 7, 'legend.title_fontsize': 7,
    'lines.linewidth': 1.3, 'lines.markersize': 3.5, 'axes.linewidth': 0.6, 'grid.linewidth': 0.5,
    'xtick.major.width': 0.6, 'ytick.major.width': 0.6, 'xtick.major.size': 2.5, 'ytick.major.size': 2.5,
    'xtick.minor.width': 0.4, 'ytick.minor.width': 0.4, 'xtick.minor.size': 1.5, 'ytick.minor.size': 1.5,
    'axes.titlepad': 4, 'axes.labelpad': 2.5, 'figure.dpi': DPI,

    'axes.grid': True, 'grid.alpha': 0.25, 'axes.axisbelow': True,
    'axes.spines.top': False, 'axes.spines.right': False,
    'legend.frameon': False, 'legend.handlelength': 3, 'legend.labelspacing': 0.3,
    'legend.columnspacing': 1.3, 'legend.handletextpad': 0.6,
    'pdf.fonttype': 42,                      # text stays text, which journals ask for
}

# One method, one look: color, line style, marker. The two models before the first step have no marker.
LOOKS = {
    'teacher': ('0.2', (0, (5, 2)), 'None'),
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

# All other names. The three lengths have no common divisor, so 5 x 4 x 7 names look different.
OTHER_COLORS = ['#44AA99', '#AA4499', '#999933', '#661100', '#6699CC']
OTHER_LINES = ['-', (0, (7, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 1))]
OTHER_MARKERS = ['h', '<', '>', 'd', 'H', '8', 'o']

MOST_MARKERS = 15               # a line of more points has some at about equal distances
SPACING = 0.1                   # of these, relative to the diagonal of the panel
LABEL_HEIGHT = 0.085            # of a label at the end of a line, relative to a panel of about 1.5 inches
open_styles = []                # of each paper_style that is open, the looks of its names: {name: look}


# ---- the style -----------------------------------------------------------------------------------

@contextmanager
def paper_style():
    """The settings of matplotlib for what is drawn inside, whatever they were before.

    Names without a look of their own get theirs in the order of first use, which begins anew with the
    outermost `paper_style`. So a figure looks the same whatever was drawn before it, and figures within one
    `paper_style` share their looks.
    """
    import matplotlib
    settings = {}
    for key, value in matplotlib.rcParamsDefault.items():
        if not key.startswith('backend'):    # choosing one would look for a display
            settings[key] = value
    with matplotlib.rc_context(settings | STYLE):
        open_styles.append(open_styles[-1] if open_styles else {})
        try:
            yield
        finally:
            open_styles.pop()


def new_figure(rows=1, columns=1, width=PAGE, height=2.3, sharey=False):
    """-> (figure, flat list of its axes, row by row).

    width, height: of the whole figure, in inches. What `save` puts below the panels, a legend or notes, is
    added to the height. To be called inside `paper_style`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    assert open_styles, 'new_figure outside of paper_style'
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)                  # it measures texts
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    return figure, list(axes.flat)


def look_of(name):
    """The name of a method -> {'color', 'linestyle', 'marker'}, for `axes.plot(x, y, **look)`.

    'OPRD-Bridge r=8' has the look of 'OPRD-Bridge', unless another name has it already. Then it gets, like a
    name that is not in LOOKS, the next look that nothing has.
    """
    assert open_styles, 'look_of outside of paper_style'
    given = open_styles[-1]
    if name not in given:
        look = LOOKS.get(family_of(name))
        if look is None or look in given.values():
            look = other_look(sum(used not in LOOKS.values() for used in given.values()))
        given[name] = look
    return dict(zip(('color', 'linestyle', 'marker'), given[name], strict=True))


def family_of(name):
    """The name in LOOKS of which a name is a variant; None if there is none. The rank, what stands after the
    last comma, and commas make a variant: 'OPRD-Bridge r=16, then OPD top-1, lr=0.001' ->
    'OPRD-Bridge, then OPD top-1'."""
    rest = re.sub(r' r=\d+', '', name)
    while rest:
        for known in LOOKS:
            if known.replace(',', '') == rest.replace(',', ''):
                return known
        rest = rest.rpartition(', ')[0]
    return None


def other_look(number):
    """The look of the name number 0, 1, 2, ... that has none of its own."""
    choices = []
    for values in (OTHER_COLORS, OTHER_LINES, OTHER_MARKERS):
        choices.append(values[number % len(values)])
    return tuple(choices)


# ---- lines ---------------------------------------------------------------------------------------

def draw_seeds(axes, steps, by_seed, label, look):
    """One method: its mean over seeds with markers, and each seed as a thin line of the same color.

    by_seed: for each seed the values that were measured at these steps.
    """
    mean = [fmean(values) for values in zip(*by_seed, strict=True)]
    if len(by_seed) > 1:
        draw_thin(axes, steps, by_seed, look)
    axes.plot(steps, mean, label=label, markevery=marked(steps), **look)
    whole_ticks(axes)


def draw_thin(axes, steps, lines, look):
    """The lines of which another line is the mean. They lie below the means of all methods."""
    for values in lines:
        axes.plot(steps, values, color=look['color'], lw=0.5, alpha=0.5, zorder=1.5)


def marked(points):
    """Which points of a line get a marker, as matplotlib's `markevery`: all of a few, else some."""
    return None if len(points) <= MOST_MARKERS else SPACING


def whole_ticks(axes):
    """Ticks of the x axis at whole numbers only: there is no step 2.5."""
    from matplotlib.ticker import MaxNLocator
    locator = axes.xaxis.get_major_locator()
    if isinstance(locator, MaxNLocator):
        locator.set_params(integer=True)


def label_ends(axes, ends):
    """Write names at the right ends of lines, none over another: {name: (x, y of the last point, color)}.

    A thin line leads from the point to its name. To be called when all lines are drawn, because the limits of
    the y axis decide where a name belongs.
    """
    from matplotlib.collections import LineCollection
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())             # they stay as they are
    to_panel = axes.transScale + axes.transLimits
    starts = {name: to_panel.transform((x, y)) for name, (x, y, _) in ends.items()}
    heights = spread({name: height for name, (_, height) in starts.items()}, LABEL_HEIGHT)
    leaders = []
    for name, (_, _, color) in ends.items():
        axes.text(1.04, heights[name], name, color=color, va='center', transform=axes.transAxes)
        leaders.append([starts[name], (1.03, heights[name])])
    colors = [color for _, _, color in ends.values()]
    lines = LineCollection(leaders, colors=colors, lw=0.4, transform=axes.transAxes, clip_on=False)
    axes.add_collection(lines, autolim=False)


def spread(heights, gap):
    """{name: height between 0 and 1} -> the same, moved so that neighbours are at least `gap` apart: upwards
    where they meet, and down again from the upper end, which is half a gap below 1."""
    upwards = sorted(heights, key=heights.get)
    placed = dict(heights)
    for lower, name in pairwise(upwards):
        placed[name] = max(placed[name], placed[lower] + gap)
    placed[upwards[-1]] = min(placed[upwards[-1]], 1 - gap / 2)
    for upper, name in pairwise(reversed(upwards)):
        placed[name] = min(placed[name], placed[upper] - gap)
    return placed


# ---- saving --------------------------------------------------------------------------------------

def save(figure, file, notes=''):
    """Add the legends, and write the figure, each file completely or not at all -> list of files.

    file: without an ending: file.png and file.pdf. If it ends in .png, that file alone.
    notes: a text below the panels, for what a reader must know: how many seeds and answers, what the thin
    lines are.
    """
    files = [Path(file)] if Path(file).suffix == '.png' else [Path(f'{file}.png'), Path(f'{file}.pdf')]
    dates_and_versions = {'.png': ['Software'], '.pdf': ['Creator', 'Producer', 'CreationDate']}
    with paper_style():
        arrange(figure, notes)
        for target in files:
            left_out = dict.fromkeys(dates_and_versions[target.suffix])
            with whole(target) as temporary:
                figure.savefig(temporary, dpi=DPI, format=target.suffix[1:], metadata=left_out)
    return files


def arrange(figure, notes):
    """Place everything: panels, titles, legends, notes. It is done once, so that both files are alike."""
    panels = [axes for axes in figure.axes if axes.get_legend_handles_labels()[0]]
    handles = {}                             # {label: a line that has it}, over all panels
    repeated = False
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            repeated = repeated or label in handles
            handles.setdefault(label, handle)
        if not axes.get_legend():
            axes.legend()
        axes.get_legend().set_in_layout(False)           # no room is made for it
    show_as_it_is(figure)
    engine = figure.get_layout_engine()
    engine.execute(figure)
    if wrap_titles(figure):
        engine.execute(figure)

    # A legend stays in its panel if there is room. One legend is enough for panels with the same lines.
    below = []
    if repeated or not all(legend_fits(axes, figure) for axes in panels):
        for axes in panels:
            axes.get_legend().remove()
        below.append(legend_below(figure, handles))
    if notes:
        below.append(notes_below(figure, notes))
    if below:
        make_room(figure, below)
        engine.execute(figure)
    figure.set_layout_engine('none')


def show_as_it_is(figure):
    """Names of folders and of metrics are drawn as they are: '$' begins no formula, and no control character
    reaches a terminal in a warning of matplotlib. Powers of ten at ticks are matplotlib's own formulas."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, NullFormatter, ScalarFormatter
    texts = figure.findobj(Text)             # this makes the texts at the ticks
    numbers = set()                          # those that matplotlib makes out of numbers
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), (LogFormatter, NullFormatter, ScalarFormatter)):
                for tick in (*axis.majorTicks, *axis.minorTicks):
                    numbers.update((tick.label1, tick.label2))
    for text in texts:
        if text not in numbers:
            text.set_text(printable(text.get_text()))
            text.set_parse_math(False)


def wrap_titles(figure):
    """Break titles and names of axes that are longer than their panel into lines -> was there one?"""
    changed = False
    for axes in figure.axes:
        panel = axes.get_window_extent()
        for text, room in ((axes.title, panel.width), (axes.xaxis.label, panel.width),
                           (axes.yaxis.label, 1.2 * panel.height)):
            changed = wrap(text, room) or changed
    return changed


def wrap(text, room):
    """Break a text into lines of at most `room` pixels -> was it longer? A single long word stays whole."""
    before = text.get_text()
    rotation = text.get_rotation()
    text.set_rotation(0)                     # its width is measured
    if text.get_window_extent().width > room:
        lines = []
        for word in before.split():
            text.set_text(f'{lines[-1]} {word}' if lines else '')
            if lines and text.get_window_extent().width <= room:
                lines[-1] = text.get_text()
            else:
                lines.append(word)
        text.set_text('\n'.join(lines))
    text.set_rotation(rotation)
    return text.get_text() != before


def legend_fits(axes, figure):
    """Does the legend of a panel lie inside it, over no line, point, bar or text of any panel?

    It is put where matplotlib finds the most room, and stays there: for each file it would look again.
    """
    legend = axes.get_legend()
    box = legend.get_window_extent()
    legend.set_loc(tuple(axes.transAxes.inverted().transform(box.p0)))
    box = box.padded(2)
    panel = axes.get_window_extent().padded(3)
    if not (panel.contains(box.x0, box.y0) and panel.contains(box.x1, box.y1)):
        return False
    for other in figure.axes:
        others = [*other.texts, *other.patches]
        if other is not axes and other.get_legend():
            others.append(other.get_legend())
        for line in other.lines:
            if line.get_transform().transform_path(line.get_path()).intersects_bbox(box, filled=False):
                return False
        for points in other.collections:
            if box.count_contains(points.get_offset_transform().transform(points.get_offsets())):
                return False
        if any(box.overlaps(artist.get_window_extent()) for artist in others):
            return False
    return True


def legend_below(figure, handles):
    """One legend for all panels: {label: line}. In as few lines as its width allows, with full columns."""
    longest = int(14 * figure.get_figwidth())            # characters, in 7 points
    labels = [cut(printable(label), longest) for label in handles]
    for columns in range(len(labels), 0, -1):
        rows = -(-len(labels) // columns)
        if -(-len(labels) // rows) < columns:
            continue                         # as many lines with fewer columns, which are fuller
        legend = figure.legend(handles.values(), labels, loc='lower center', ncols=columns, borderpad=0.2)
        for text in legend.get_texts():
            text.set_parse_math(False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return legend
        legend.remove()


def notes_below(figure, notes):
    """A text as wide as the figure."""
    text = figure.text(0.01, 0, printable(notes), va='bottom', color='0.3', parse_math=False)
    wrap(text, 0.98 * figure.bbox.width)
    return text


def make_room(figure, below):
    """Make the figure higher by what stands below the panels, and put that there, from top to bottom."""
    gap = 3 / POINTS
    heights = [artist.get_window_extent().height / figure.dpi + gap for artist in below]
    total = figure.get_figheight() + sum(heights)
    figure.set_figheight(total)
    top = sum(heights)
    for artist, height in zip(below, heights, strict=True):
        top -= height
        if hasattr(artist, 'set_bbox_to_anchor'):
            artist.set_bbox_to_anchor((0.5, top / total), figure.transFigure)
        else:
            artist.set_y((top + gap / 2) / total)
        artist.set_in_layout(False)
    figure.get_layout_engine().set(rect=(0, sum(heights) / total, 1, 1 - sum(heights) / total))

