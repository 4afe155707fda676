"""The map of the architecture, and how an answer is written: distributions, a beam, who sees whom.

A word that may be chosen is dark blue, one that may not is light blue and says "cut".
"""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from miniflamingo.plots.style import (
    BOX,
    GREY,
    IMAGE_COLOURS,
    INK,
    LETTER,
    MARGIN,
    MASKED,
    MONO,
    PAPER,
    VISIBLE,
    canvas,
    draw_box,
    legend,
    styled,
)

# --- the map --------------------------------------------------------------------------------------

TRAINED, FROZEN, DATA = IMAGE_COLOURS[1], PAPER, "#fbe3b0"
PARTS = {  # part: the middle of its box, in points; its colour; its name; where it is explained
    "vision_encoder": (182, 36, FROZEN, "vision encoder", "module 04"),
    "resampler": (370, 36, TRAINED, "Perceiver Resampler", "module 05"),
    "gated_xattn": (370, 138, TRAINED, "GATED XATTN-DENSE", "modules 07, 08"),
    "lm": (520, 138, FROZEN, "LM block", "modules 01, 06"),
}
ENDS = {"pictures": (52, 36), "words": (52, 138), "next word": (672, 138)}
ARROWS = (((88, 36), (124, 36)), ((240, 36), (305, 36)), ((370, 74), (370, 126)),
          ((76, 138), (312, 138)), ((428, 138), (488, 138)), ((552, 138), (632, 138)))  # fmt: skip


@styled
def plot_map(counts, depth):
    """The architecture (paper, figure 3), each part with its parameters and its modules.

    counts: {part: parameters} as count_parameters returns them; depth: how many blocks the language
    model (LM) has. ValueError when a part is missing.
    """
    if missing := [part for part in PARTS if part not in counts]:
        raise ValueError(f"counts must have {', '.join(PARTS)}; missing: {', '.join(missing)}")
    figure, axes = canvas(724, 222)
    axes.add_patch(Rectangle((286, 110), 300, 76, fc="none", ec=GREY, ls="--"))
    axes.text(580, 120, f"{depth} times", ha="right", va="center", color=GREY, fontsize=8)
    for name, (x, y) in ENDS.items():
        _centred(axes, x, y, name, DATA)
    for part, (x, y, colour, name, where) in PARTS.items():
        _centred(axes, x, y, name, colour)
        for dy, note in ((20, f"{counts[part]:,} numbers"), (32, where)):
            axes.text(x, y + dy, note, ha="center", va="center", color=GREY, fontsize=8)
    for start, end in ARROWS:
        arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, start, arrowprops=arrow)
    axes.text(378, 96, "visual tokens", va="center", fontsize=8)
    axes.text(672, 158, "module 06", ha="center", va="center", color=GREY, fontsize=8)
    legend(axes, {"frozen": FROZEN, "trained between them": TRAINED}, MARGIN, 206)
    return figure


def _centred(axes, x, y, name, colour):
    width = len(name) * LETTER + 12
    draw_box(axes, x - width / 2, y - BOX / 2, width, name, colour)


# --- distributions --------------------------------------------------------------------------------


@styled
def plot_distributions(words, panels):
    """Probabilities of the same n words, side by side: panels {title: [n]}; 0 is drawn as "cut".

    ValueError when a panel does not fit the words.
    """
    figure = Figure((0.9 + 1.85 * len(panels), 0.24 * len(words) + 0.9), layout="constrained")
    rows = np.arange(len(words))
    for axes, (title, p) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0],
                                panels.items()):  # fmt: skip
        if np.shape(p) != (len(words),):
            raise ValueError(f"{title!r} must be [{len(words)}], got {list(np.shape(p))}")
        axes.barh(rows, p, color=VISIBLE, height=0.7)
        for row, value in zip(rows, p):
            text, colour = (f"{value:.2f}", INK) if value > 0 else ("cut", GREY)
            axes.text(value + 0.02, row, text, va="center", fontsize=8, color=colour)
        axes.set(title=title, xlim=(0, 1.2), xticks=[0, 0.5, 1])
        axes.set_yticks(rows, words, family=MONO)
        axes.tick_params(axis="y", length=0)
        axes.grid(False)
    axes.invert_yaxis()
    return figure


# --- a beam ---------------------------------------------------------------------------------------


@styled
def plot_beam(root, steps):
    """The tree of a beam search, from left to right: what was kept is blue, what was dropped grey.

    root: what all beams start from. steps: one list a step of (parent, word, score, kept), parent
    the place among the KEPT of the step before (0 in the first); score a log-probability.
    ValueError for a parent that was not kept.
    """
    column, row = 128, 40
    height = max(map(len, steps)) * row + 44
    figure, axes = canvas(120 + column * len(steps), height)
    parents = [(MARGIN + 60, (height - 24) / 2)]
    _centred(axes, *parents[0], root, DATA)
    for i, step in enumerate(steps):
        kept, top = [], (height - 24 - len(step) * row) / 2
        for j, (parent, word, score, is_kept) in enumerate(step):
            if not 0 <= parent < len(parents):
                raise ValueError(f"step {i} has parent {parent} of {len(parents)} kept beams")
            x, y = 150 + column * i + 20, top + (j + 0.5) * row - 6
            colour = VISIBLE if is_kept else GREY
            axes.plot([parents[parent][0], x], [parents[parent][1], y], color=colour,
                      lw=1.8 if is_kept else 0.8, ls="-" if is_kept else ":", zorder=0)  # fmt: skip
            _centred(axes, x, y, word, TRAINED if is_kept else PAPER)
            axes.text(x, y + 18, f"{score:.2f}", ha="center", va="center", fontsize=8, color=GREY)
            kept += [(x, y)] * is_kept
        parents = kept
    legend(axes, {"kept": TRAINED, "dropped": PAPER}, MARGIN, height - 12)
    return figure


# --- who sees whom --------------------------------------------------------------------------------


@styled
def plot_sight(words, sight, titles):
    """How strongly each token may see each earlier one: sight [P, L, L] in 0..1, a panel each.

    Light is 0, dark is 1; 1 has a dot, too. ValueError when sight does not fit the words.
    """
    L = len(words)
    if np.shape(sight) != (len(titles), L, L):
        got = list(np.shape(sight))
        raise ValueError(f"sight must be [{len(titles)}, {L}, {L}], got {got}")
    figure = Figure((1.0 + 2.3 * len(titles), 2.9), layout="constrained")
    blues = LinearSegmentedColormap.from_list("sight", ["#ffffff", MASKED, VISIBLE])
    for axes, title, values in zip(figure.subplots(1, len(titles), squeeze=False, sharey=True)[0],
                                   titles, sight):  # fmt: skip
        mesh = axes.pcolormesh(values, cmap=blues, vmin=0, vmax=1, edgecolors="white", lw=0.7)
        places = np.argwhere(np.isclose(values, 1))
        axes.plot(places[:, 1] + 0.5, places[:, 0] + 0.5, ".", color="white", ms=5)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(np.arange(L) + 0.5, words, rotation=90, family=MONO, fontsize=8)
        axes.set_yticks(np.arange(L) + 0.5, words, family=MONO, fontsize=8)
        axes.set(aspect="equal")
        axes.grid(False)
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=figure.axes, shrink=0.7, ticks=[0, 0.5, 1])
    return figure
