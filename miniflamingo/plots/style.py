"""The one style of all figures: settings, colours, and what several figures draw."""

import functools

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from miniflamingo.xattn import check_phi

STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same letters on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}
INK, GREY, PAPER = "#222222", "#777777", "#e6e6e6"
VISIBLE, MASKED = "#0b3c78", "#cfe1f2"  # the paper's dark and light blue
WRONG = "#d55e00"
IMAGE_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00")
LAYER_COLOURS = ("#9ecae1", "#4292c6", "#084594")  # shallow to deep, light to dark
LINES = ("-", "--", ":", "-.")
MONO = "DejaVu Sans Mono"
BOX, GAP, MARGIN, THUMB = 22, 4, 12, 64  # points
LETTER = 9 * 0.602  # the width of every letter of the monospaced font, at 9 points


def styled(plot):
    """Draw under STYLE, whatever the caller's matplotlib settings are."""

    @functools.wraps(plot)
    def draw(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return plot(*args, **kwargs)

    return draw


def image_colour(j):
    """The colour of image j, counted from 1; grey for 0, no image."""
    return IMAGE_COLOURS[(j - 1) % len(IMAGE_COLOURS)] if j else PAPER


def check_row(words, phi, N):
    """phi of one sequence; ValueError unless it fits the words and N, and there are any."""
    if N < 1 or not len(words):
        raise ValueError(f"the figure needs a token and an image, got {len(words)} and {N}")
    return check_phi(np.asarray(phi)[None], 1, len(words), N)[0]


def canvas(width, height):
    """A Figure whose only axes measure it in points, from the upper left corner."""
    figure = Figure((width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def wrap(widths, most):
    """Boxes of these widths, left to right in lines: [(x, line, width)], number of lines."""
    places, x, line = [], 0, 0
    for width in widths:
        if x and x + width > most:
            x, line = 0, line + 1
        places.append((x, line, width))
        x += width + GAP
    return places, line + 1


def draw_box(axes, x, y, width, text, colour, **style):
    """A rounded box of height BOX with monospaced text in it."""
    shape = "round,pad=0,rounding_size=4"
    box = FancyBboxPatch((x, y), width, BOX, shape, fc=colour, ec="white", lw=0.8, **style)
    axes.add_patch(box)
    axes.text(
        x + width / 2, y + BOX / 2, text, ha="center", va="center", color=INK,
        family=MONO, fontsize=9, parse_math=False,
    )  # fmt: skip


def legend(axes, colours, x, y):
    """Coloured squares with names, in a line that starts at (x, y)."""
    for name, colour in colours.items():
        axes.add_patch(Rectangle((x, y - 5), 10, 10, fc=colour))
        axes.text(x + 15, y, name, va="center")
        x += 32 + 6 * len(name)


def name_ends(axes, x, ends, gap, size):
    """Name lines at their right ends, one above the other where they would overlap.

    ends {name: (y, colour)}; gap, in points, is how far from the end. Wants the axes' final limits.
    """
    scale = axes.yaxis.get_transform().transform
    low, high = scale(np.array(axes.get_ylim()))
    height, lowest = 0.8 * 72 * axes.figure.get_figheight(), -np.inf
    for name, (y, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        place = height * (scale(np.array([y]))[0] - low) / (high - low)
        lowest = max(place, lowest + size + 2)
        axes.annotate(name, (x, y), (gap, lowest - place), textcoords="offset points",
                      va="center", color=colour, fontsize=size)  # fmt: skip
