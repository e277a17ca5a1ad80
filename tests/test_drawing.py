"""The look of figures: sizes, looks that can be told apart, legends that cover nothing, and the same bytes."""
import inspect
import math
import os
import re
import subprocess
import sys
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
from conftest import badly_placed_texts
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from studies.drawing import (
    COLUMN,
    LABEL_HEIGHT,
    LOOKS,
    OTHER_COLORS,
    OTHER_LINES,
    OTHER_MARKERS,
    PAGE,
    SPACING,
    draw_seeds,
    label_ends,
    look_of,
    new_figure,
    other_look,
    paper_style,
    save,
    spread,
)
from support.runtime import ROOT

STEPS = list(range(0, 101, 10))


def saturating(speed, seed=0):
    return [20 + 70 * (1 - math.exp(-step * speed)) + math.sin(3 * seed + step) for step in STEPS]


def crowded(file, width=PAGE):
    """A figure with everything: many methods, names at the ends of lines that meet, long titles, powers of ten, notes."""
    with paper_style():
        columns = 2 if width == PAGE else 1
        figure, axes = new_figure(4 // columns, columns, width, 8.4 / columns)
        for number, name in enumerate([*LOOKS, 'a $method$ of its own', 'OPRD-Bridge r=8']):
            draw_seeds(axes[0], STEPS, [saturating(0.01 * (1 + number), seed) for seed in range(2)], name, look_of(name))
        for name in ('OPRD', 'OPD top-1'):
            draw_seeds(axes[1], STEPS, [saturating(0.03)], name, look_of(name))
        axes[2].loglog([1e-4, 1e-3, 1e-2], [1e-7, 1e-2, 1e4], label='variance', **look_of('OPD top-1'))
        ends = {}
        for layer in range(1, 9):
            axes[3].plot([1, 2, 3], [0.2, 0.8, 0.99 + 0.001 * layer])
            ends[f'layer {layer}'] = (3, 0.99 + 0.001 * layer, 'C0')
        label_ends(axes[3], ends)
        axes[0].set(title='a title that is a good deal longer than its panel is wide, at any width of the page', xlabel='step',
                    ylabel='Avg@16, %, mean of all of the sets of held-out problems')
        axes[1].set(title='short', xlabel='step')
        axes[2].set(xlabel='the distance between the student and the teacher, δ', ylabel='variance')
        return figure, save(figure, file, 'mean of 2 seeds; thin: each seed; 64 problems with 16 answers each. ' * 3)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """{width: figure, its files}. That of a page is the second one, and not the first that has names."""
    folder = tmp_path_factory.mktemp('drawn')
    with paper_style():
        look_of('a name that was drawn before')
    return {width: crowded(folder / f'{width}', width) for width in (COLUMN, PAGE)}


def test_the_same_figure_has_the_same_bytes(drawn, tmp_path):
    """In a process that has drawn nothing else, on another day, with another hash seed, time zone, locale and matplotlibrc. A PDF held the
    date, and a PNG the version of matplotlib. Importing studies.figures costs no matplotlib, and drawing no pyplot."""
    figure, first = drawn[PAGE]
    assert [file.name for file in first] == ['6.75.png', '6.75.pdf']

    # Another day: matplotlib and fontTools ask for SOURCE_DATE_EPOCH first, and then for the time.
    (tmp_path / 'matplotlibrc').write_text('font.size: 20\nlines.linewidth: 7\npdf.fonttype: 3\nsavefig.bbox: tight\n')
    code = f"""import sys, time, math
import studies.figures
assert not [name for name in sys.modules if name.startswith('matplotlib')]
now = time.time
time.time = lambda: now() + 40 * 86400
from studies.drawing import *
STEPS = {STEPS}
{inspect.getsource(saturating)}
{inspect.getsource(crowded)}
crowded({str(tmp_path / 'c')!r})
assert 'matplotlib.pyplot' not in sys.modules"""
    env = os.environ | {'PYTHONHASHSEED': '7', 'TZ': 'Pacific/Apia', 'SOURCE_DATE_EPOCH': '1', 'LC_ALL': 'C', 'MATPLOTLIBRC': str(tmp_path)}
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, check=True)
    assert [file.read_bytes() for file in first] == [(tmp_path / f'c.{ending}').read_bytes() for ending in ('png', 'pdf')]

    # What matplotlib writes of its own accord is not the same.
    figure.savefig(tmp_path / 'd.pdf')
    assert b'/CreationDate' in (tmp_path / 'd.pdf').read_bytes()
    for file in first:
        assert not re.search(b'(?i)date|producer|creator|software|matplotlib', file.read_bytes())


@pytest.mark.parametrize('width', [COLUMN, PAGE])
def test_texts_have_7_to_9_points_and_none_is_over_another(drawn, width):
    """At the size at which the figure is printed. Titles ran into each other, names of layers into the title, and a legend
    into the ticks."""
    figure, (png, pdf) = drawn[width]
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert {text.get_fontsize() for text in texts} == {7, 8, 9} and badly_placed_texts(figure) == []
    assert figure.get_figwidth() == width
    assert Image.open(png).width == round(200 * width)
    box = re.search(rb'/MediaBox \[ *0 0 ([\d.]+) ([\d.]+)', pdf.read_bytes())
    assert [float(side) for side in box.groups()] == pytest.approx([72 * width, 72 * figure.get_figheight()])
    assert b'/FontFile2' in pdf.read_bytes() and b'/Type3' not in pdf.read_bytes()       # text as text: TrueType

    # The same check finds what is wrong, on purpose, here.
    figure.axes[1].text(0, 0, 'mine', transform=figure.axes[1].title.get_transform())
    figure.text(0.98, 0.5, 'leaves')
    figure.axes[1].texts[-1].set_position(figure.axes[1].title.get_position())
    found = badly_placed_texts(figure)
    assert ('leaves', 'leaves the figure') in found and {'mine', 'short'} in [set(pair) for pair in found]


def lightness(color):
    """CIE L*: 0 is black and 100 is white."""
    red, green, blue = linear(color)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def linear(color):
    values = np.array(to_rgb(color))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_looks_can_be_told_apart_in_grey():
    """Those of the paper's methods, and ten that come after them: by style or marker, not only by the shade. The two models
    have no markers, so nothing that does can be mistaken for them."""
    looks = [*LOOKS.values(), *(other_look(number) for number in range(10))]
    assert len({(str(line), marker) for _, line, marker in looks}) == len(looks)
    for color, _, _ in looks:
        assert lightness(color) < 75         # it can be seen on white
    assert {LOOKS['teacher'][2], LOOKS['student'][2]} == {'None'}
    assert lightness(LOOKS['student'][0]) - lightness(LOOKS['teacher'][0]) > 15
    every = {other_look(number) for number in range(1000)}
    assert len(every) == len(OTHER_COLORS) * len(OTHER_LINES) * len(OTHER_MARKERS) == 140


def test_colors_can_be_told_apart_by_color_blind_people():
    """The paper's methods, two at a time: the distance in CIE Lab of the colors as people without red, green or blue cones
    see them (Machado, Oliveira and Fernandes, 2009). 10 is a difference that is seen at a glance."""
    deficiencies = [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])

    def lab(values):
        scaled = to_xyz @ np.clip(values, 0, 1) / [0.95047, 1, 1.08883]
        x, y, z = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    colors = {name: linear(look[0]) for name, look in LOOKS.items() if look[2] != 'None'}
    for (name, color), (other_name, other) in combinations(colors.items(), 2):
        for number, matrix in enumerate(deficiencies):
            assert np.linalg.norm(lab(matrix @ color) - lab(matrix @ other)) > 15, (name, other_name, number)
    assert lab(np.ones(3)) == pytest.approx([100, 0, 0], abs=0.02)


def test_a_method_has_one_look_in_every_figure():
    """Whatever stands beside it and was drawn before. Variants have their method's look if it is free."""
    def keys(look):
        return look['color'], look['linestyle'], look['marker']
    with paper_style():
        for name, look in LOOKS.items():
            assert keys(look_of(name)) == look
        assert keys(look_of('OPRD-Bridge r=8')) == other_look(0) and keys(look_of('x')) == other_look(1)
        with paper_style():                  # part of the same figures
            assert keys(look_of('x')) == other_look(1) and keys(look_of('y')) == other_look(2)
        assert keys(look_of('y')) == other_look(2)
    with paper_style():
        names = {'y': other_look(0), 'OPRD-Bridge r=16': LOOKS['OPRD-Bridge'], 'OPRD-Bridge r=8': other_look(1),
                 'OPRD-Bridge r=16, then OPD top-1, lr=0.001': LOOKS['OPRD-Bridge, then OPD top-1'], 'OPRD, lr=0.001': LOOKS['OPRD'],
                 'OPD, full KL, 300 steps': LOOKS['OPD full KL'], 'OPD, foo': other_look(2), 'OPD top-1 + 5 OPRD': other_look(3),
                 'OPRD': other_look(4), '': other_look(5)}
        assert {name: keys(look_of(name)) for name in names} == names
    with pytest.raises(AssertionError, match='outside of paper_style'):
        look_of('OPRD')


def test_the_settings_of_matplotlib_come_back():
    """Also after an error: a notebook that drew a figure of ours had our fonts from then on."""
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError), paper_style(), paper_style():
        assert matplotlib.rcParams['legend.fontsize'] == 7
        raise ZeroDivisionError
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(AssertionError, match='outside of paper_style'):
        new_figure()


def test_seeds_are_thin_lines_beside_their_mean():
    """The mean has the label and the markers; one seed alone needs no second line; unequal lengths are an error."""
    with paper_style():
        _, (axes,) = new_figure(width=COLUMN)
        draw_seeds(axes, [0, 5, 20], [[1, 2, 6], [3, 4, 8]], 'a', look_of('OPRD'))
        draw_seeds(axes, [0, 5], [[7, 9]], 'b', look_of('OPD top-1'))
        draw_seeds(axes, list(range(300)), [list(range(300))], 'c', look_of('x'))
        with pytest.raises(ValueError):
            draw_seeds(axes, [0, 5], [[1, 2], [1]], 'd', look_of('x'))
    *thin, mean, alone, long = axes.lines
    assert [list(line.get_ydata()) for line in thin] == [[1, 2, 6], [3, 4, 8]] and list(mean.get_ydata()) == [2, 3, 7]
    assert {line.get_color() for line in thin} == {mean.get_color()} == {LOOKS['OPRD'][0]}
    assert all(line.get_linewidth() < mean.get_linewidth() / 2 and line.get_label()[0] == '_' for line in thin)
    assert all(line.get_zorder() < other.get_zorder() for line in thin for other in (mean, alone, long))
    assert (mean.get_label(), mean.get_marker(), list(alone.get_ydata())) == ('a', 'o', [7, 9])
    assert mean.get_markevery() is None and long.get_markevery() == SPACING


@pytest.mark.parametrize('scale', ['linear', 'log'])
def test_names_stand_at_the_ends_of_their_lines(tmp_path, scale):
    """A leader goes from each line's last point to its name, in the order of the lines, also if the panel changes its size
    when a legend goes below."""
    with paper_style():
        figure, (axes,) = new_figure(width=COLUMN)
        ends = {}
        for number, end in enumerate((0.9, 0.2, 0.21, 0.22, 1e-3)):
            axes.plot([1, 10], [0.5, end], label=f'a long name of the line with the number {number}')
            ends[f'name {number}'] = (10, end, f'C{number}')
        axes.set_yscale(scale)
        axes.set_xscale(scale)
        label_ends(axes, ends)
        save(figure, tmp_path / 'a.png')
    assert len(figure.legends) == 1 and badly_placed_texts(figure) == []
    leaders, = axes.collections
    for (x, y, color), segment, text in zip(ends.values(), leaders.get_segments(), axes.texts, strict=True):
        assert axes.transAxes.transform(segment[0]) == pytest.approx(axes.transData.transform((x, y)))
        assert segment[1][1] == text.get_position()[1] and text.get_color() == color
    heights = {name: text.get_position()[1] for name, text in zip(ends, axes.texts, strict=True)}
    assert sorted(heights, key=heights.get) == ['name 4', 'name 1', 'name 2', 'name 3', 'name 0']
    assert min(high - low for low, high in pairwise(sorted(heights.values()))) >= LABEL_HEIGHT - 1e-9


def test_spread_moves_names_apart_and_no_further_than_needed():
    assert spread({'a': 0.5, 'b': 0.1}, 0.1) == {'a': 0.5, 'b': 0.1}
    assert spread({'a': 0.5, 'b': 0.45}, 0.1) == pytest.approx({'a': 0.55, 'b': 0.45})
    assert spread({'a': 1.0, 'b': 1.0, 'c': 0.3}, 0.1) == pytest.approx({'a': 0.85, 'b': 0.95, 'c': 0.3})


def covered(legend, figure):
    """Does a line pass through a legend? By brute force: 2000 points on each line."""
    box = legend.get_window_extent()
    for axes in figure.axes:
        for line in axes.lines:
            points = line.get_transform().transform(line.get_xydata())
            place = np.linspace(0, len(points) - 1, 2000)
            x, y = (np.interp(place, np.arange(len(points)), points[:, axis]) for axis in (0, 1))
            if ((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)).any():
                return True
    return False


def test_a_legend_covers_no_line(tmp_path):
    """It stays in its panel where there is room, and stands below where there is none, or where two panels would repeat it.
    The figure grows by it: the panels do not become flat."""
    shapes = {
        'room': [[0, 1, 2, 3], [0, 0.1, 0.2, 0.3]],
        'full': [[0, 5, 0, 5, 0, 5, 0, 5, 0], [5, 0, 5, 0, 5, 0, 5, 0, 5], [2.5] * 9],
        'wide': [[0, 0], [1, 1]],
    }
    below = {}
    heights = {}
    for what, lines in shapes.items():
        with paper_style():
            figure, (axes,) = new_figure(width=COLUMN)
            for number, values in enumerate(lines):
                axes.plot(values, label=f'line {number}' + ' with a name that is too long for a panel of a column' * (what == 'wide'))
            save(figure, tmp_path / f'{what}.png')
        below[what] = len(figure.legends)
        legend, = figure.legends or [axes.get_legend()]
        assert not covered(legend, figure) and badly_placed_texts(figure) == []
        assert len(legend.get_texts()) == len(lines)
        heights[what] = axes.get_window_extent().height
    assert below == {'room': 0, 'full': 1, 'wide': 1}
    assert max(heights.values()) - min(heights.values()) < 0.05 * 200    # of an inch

    # The oracle sees a line under a legend that was put there.
    with paper_style():
        figure, (axes,) = new_figure(width=COLUMN)
        axes.plot([0, 1], [0, 1], label='x')
        assert covered(axes.legend(loc='center'), figure)

    with paper_style():
        figure, panels = new_figure(columns=3)
        for panel in panels:
            draw_seeds(panel, [0, 1], [[0, 1]], 'OPRD', look_of('OPRD'))
        twin = panels[0].twinx()
        twin.plot([0, 1], [1, 0], label='twin')
        save(figure, tmp_path / 'shared.png')
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['OPRD', 'twin']
    assert not any(axes.get_legend() for axes in figure.axes)


@pytest.mark.parametrize('kind', ['bars', 'points', 'text', 'twin'])
def test_a_legend_covers_nothing_else(tmp_path, kind):
    """Bars, the points of a scatter plot, texts, and the lines of a second axis in the same panel."""
    with paper_style():
        figure, (axes,) = new_figure(width=COLUMN)
        if kind == 'bars':
            axes.bar(['a', 'b', 'c'], [3, 3, 3], label='bars')
        elif kind == 'points':
            grid = np.linspace(0, 1, 15)
            axes.scatter(*np.meshgrid(grid, grid), s=1, label='points')
        elif kind == 'text':
            axes.plot([0, 1], [0, 0], label='line')
            axes.text(0.5, 0, '\n'.join(['a text that fills the panel as good as whole'] * 16), ha='center', va='center')
        else:
            axes.plot([0, 1], [0, 0], label='line')
            axes.twinx().plot(np.linspace(0, 1, 50), [0, 1] * 25)
        save(figure, tmp_path / 'a.png')
    assert len(figure.legends) == 1 and axes.get_legend() is None


def test_texts_are_drawn_as_they_are(tmp_path, recwarn):
    """A '$' began a formula of matplotlib, which may be wrong, in a title, at ticks, in a legend and in the notes; and
    matplotlib's own powers of ten must stay formulas."""
    wrong = '$\\x$ \x1b[2J'
    safe = '$\\x$ \\x1b[2J'
    with paper_style():
        figure, (left, right) = new_figure(columns=2)
        for panel in (left, right):
            panel.plot([0, 1, 2], [1, 1e3, 1e6], label=wrong)
            panel.set(title=wrong, xlabel=wrong, ylabel=wrong, yscale='log')
        left.set_xticks([0, 1, 2], ['$\\x$'] * 3)
        save(figure, tmp_path / 'a.png', wrong)
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert sum(text.get_text() == safe for text in texts) == 3 * 2 + 2
    assert not [text for text in texts if '\x1b' in text.get_text()]
    for axes in (left, right):
        powers = [text for text in axes.get_yticklabels() if text.get_text()]
        assert powers and all(text.get_parse_math() and 'mathdefault{10^' in text.get_text() for text in powers)
    assert not any(text.get_parse_math() for text in left.get_xticklabels())
    assert not [warning for warning in recwarn if 'missing from' in str(warning.message)]


def test_a_figure_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    """A full disk in the middle of a file. A name that ends in .png is that file alone, for a run that goes on."""
    with paper_style():
        figure, (axes,) = new_figure(width=COLUMN)
        axes.plot([0, 1], [0, 1])
        assert save(figure, tmp_path / 'a.b.png') == [tmp_path / 'a.b.png']
    before = (tmp_path / 'a.b.png').read_bytes()

    def full(self, file, **_):
        file.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Figure, 'savefig', full)
    with paper_style(), pytest.raises(OSError):
        figure, (axes,) = new_figure(width=COLUMN)
        save(figure, tmp_path / 'a.b.png')
    assert [file.name for file in tmp_path.iterdir()] == ['a.b.png'] and (tmp_path / 'a.b.png').read_bytes() == before
