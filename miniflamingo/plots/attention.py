"""Attention as a matrix and as lines, and how many scores it needs, drawn to scale."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle

from miniflamingo.plots.style import (
    GREY,
    INK,
    LETTER,
    MARGIN,
    MASKED,
    MONO,
    PAPER,
    VISIBLE,
    canvas,
    legend,
    styled,
)

SHADES = LinearSegmentedColormap.from_list("weights", ["#f4f8fc", MASKED, VISIBLE])
CELL, LINE = 23, 19  # points: a cell of a matrix, a line of a column of words


@styled
def plot_attention(queries, keys, weights, mask=None):
    """One attention twice: as a matrix, a query a row, and as lines from each query to its keys.

    queries, keys: Lq and Lk strings; weights [Lq, Lk], shown in per cent; mask bool[Lq, Lk], where
    given: what it forbids is grey. ValueError when these do not fit.
    """
    weights, mask = _check_weights(queries, keys, weights, mask)
    left, top = _names(queries), _names(keys) + 8
    width, rows = len(keys) * CELL, max(len(queries), len(keys))
    x = left + width + 40 + _names(queries)  # where the lines begin
    height = top + max(len(queries) * CELL, rows * LINE) + 40
    figure, axes = canvas(x + 150 + _names(keys), height)
    _draw_matrix(axes, queries, keys, weights, mask, left, top)
    _draw_lines(axes, queries, keys, weights, x, x + 150, top + LINE / 2)
    note = {"masked": PAPER} if not mask.all() else {}
    legend(axes, {"a row sums to 100 %": VISIBLE, **note}, left, height - 14)
    return figure


@styled
def plot_weights(panels):
    """Several attentions as matrices side by side: {title: (queries, keys, weights, mask)}.

    Each as in plot_attention; mask may be None. ValueError when one does not fit, or there is none.
    """
    if not panels:
        raise ValueError("the figure needs an attention, got none")
    checked = {t: (q, k, *_check_weights(q, k, w, m)) for t, (q, k, w, m) in panels.items()}
    top = 26 + max(_names(keys) for _, keys, _, _ in checked.values())
    rows = max(len(queries) for queries, _, _, _ in checked.values())
    sizes = [_names(q) + max(len(k) * CELL, 6 * len(t)) for t, (q, k, _, _) in checked.items()]
    figure, axes = canvas(sum(sizes) + 14 * len(sizes), top + rows * CELL + 40)
    x = 0
    for (title, (queries, keys, weights, mask)), size in zip(checked.items(), sizes):
        left = x + _names(queries)
        axes.text(left, 14, title, va="center", weight="bold")
        _draw_matrix(axes, queries, keys, weights, mask, left, top)
        x += size + 14
    masked = any(not mask.all() for _, _, _, mask in checked.values())
    names = {"a row sums to 100 %": VISIBLE, **({"masked": PAPER} if masked else {})}
    legend(axes, names, _names(next(iter(checked.values()))[0]), top + rows * CELL + 26)
    return figure


def _check_weights(queries, keys, weights, mask):
    weights, shape = np.asarray(weights, float), (len(queries), len(keys))
    mask = np.ones(shape, bool) if mask is None else np.asarray(mask)
    if weights.shape != shape or mask.shape != shape or 0 in shape:
        raise ValueError(
            f"weights and mask must be [Lq, Lk] = {list(shape)}, and not empty, got "
            f"{list(weights.shape)} and {list(mask.shape)}"
        )
    return weights, mask


def _names(words):
    """The points that a column of these words takes."""
    return MARGIN + 8 + LETTER * max(map(len, words))


def _draw_matrix(axes, queries, keys, weights, mask, left, top):
    """Cells shaded by weight with the per cent in them, where it is 1 or more; masked ones grey."""
    style = {"family": MONO, "color": INK, "parse_math": False}
    for j, word in enumerate(keys):
        x = left + (j + 0.5) * CELL
        axes.text(x, top - 6, word, rotation=90, ha="center", va="bottom", **style)
    for i, word in enumerate(queries):
        y = top + i * CELL
        axes.text(left - 6, y + CELL / 2, word, ha="right", va="center", **style)
        for j, weight in enumerate(weights[i]):
            x, colour = left + j * CELL, SHADES(weight) if mask[i, j] else PAPER
            axes.add_patch(Rectangle((x, y), CELL, CELL, fc=colour, ec="white", lw=0.8))
            if np.round(100 * weight) >= 1:
                ink = "white" if weight > 0.65 else INK
                axes.text(x + CELL / 2, y + CELL / 2, f"{100 * weight:.0f}", color=ink,
                          ha="center", va="center", fontsize=8)  # fmt: skip


def _draw_lines(axes, queries, keys, weights, x, end, top):
    """Queries in a column at x, keys at `end`, and a line where one reads the other."""
    style = {"family": MONO, "color": INK, "va": "center", "parse_math": False}
    for i, word in enumerate(queries):
        axes.text(x - 6, top + i * LINE, word, ha="right", **style)
    for j, word in enumerate(keys):
        axes.text(end + 6, top + j * LINE, word, ha="left", **style)
    for i, j in np.argwhere(weights >= 0.02):
        y = top + LINE * np.array([i, j])
        colour = SHADES(0.25 + 0.75 * weights[i, j])
        axes.plot([x, end], y, color=colour, lw=0.5 + 2.5 * weights[i, j], zorder=weights[i, j])
    axes.text(x - 6, top - LINE - 4, "reads", ha="right", va="center", color=GREY)
    axes.text(end + 6, top - LINE - 4, "is read", ha="left", va="center", color=GREY)


@styled
def plot_areas(panels, most=240):
    """How many scores an attention needs, to scale: one unit of area a score.

    panels {title: [(name, queries, keys), ...]}: each is a rectangle, queries high and keys wide;
    the longest side of all is `most` points. ValueError when a size is not positive.
    """
    sizes = [size for parts in panels.values() for _, *sides in parts for size in sides]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"every attention needs queries and keys, got {panels}")
    scale, x, top = most / max(sizes), MARGIN, 44
    wide = max(len(f"{n}: {q:,} × {k:,}") for p in panels.values() for n, q, k in p)
    height = max(sum(max(q * scale, 1.5) + 26 for _, q, _ in p) for p in panels.values())
    figure, axes = canvas(2 * MARGIN + len(panels) * (max(most, 5.4 * wide) + 24), top + height + 8)
    for title, parts in panels.items():
        total = sum(queries * keys for _, queries, keys in parts)
        axes.text(x, 14, title, va="center", weight="bold")
        axes.text(x, 30, f"{total:,} scores", va="center")
        y = top
        for name, queries, keys in parts:
            sides = max(keys * scale, 1.5), max(queries * scale, 1.5)  # still seen when tiny
            axes.add_patch(Rectangle((x, y), *sides, fc=VISIBLE))
            words = f"{name}: {queries:,} × {keys:,}"
            axes.text(x, y + sides[1] + 11, words, va="center", color=INK, fontsize=8.5)
            y += sides[1] + 26
        x += max(most, 5.4 * wide) + 24
    return figure


@styled
def plot_turns(M, R, depth, self_depth):
    """The Perceiver as boxes: M inputs above, R latents below that read them `depth` times.

    Every turn is one cross-attention and self_depth self-attentions among the latents. ValueError
    when there is no input, no latent or no turn.
    """
    if min(M, R, depth) < 1:
        raise ValueError(
            f"the figure needs an input, a latent and a turn, got {M}, {R} and {depth}"
        )
    left, step, arrow = 84, 44, {"arrowstyle": "-|>", "mutation_scale": 11, "color": GREY}
    arrow |= {"shrinkA": 0, "shrinkB": 0}
    turn = (1 + self_depth) * step + 26
    end = left + depth * turn
    figure, axes = canvas(end + 60, 150)
    axes.add_patch(Rectangle((left, 14), end - left, 22, fc=MASKED))
    axes.text((left + end) / 2, 25, f"{M:,} inputs, never changed", ha="center", va="center")
    axes.text(left - 10, 111, f"{R:,} latents", ha="right", va="center")
    axes.add_patch(FancyArrowPatch((left - 6, 111), (end + 12, 111), **arrow))
    for t in range(depth):
        x = left + t * turn + 12
        axes.add_patch(FancyArrowPatch((x + 19, 36), (x + 19, 99), **arrow))
        axes.text(x + 24, 66, f"{M:,} × {R:,}", va="center", fontsize=8)
        axes.text(x, 136, f"turn {t + 1}", va="center", color=GREY)
        for i in range(1 + self_depth):
            _draw_part(axes, x + i * step, step - 6, "self" if i else "cross")
    return figure


def _draw_part(axes, x, width, name):
    colours = {"cross": (VISIBLE, "white"), "self": (MASKED, INK)}
    axes.add_patch(Rectangle((x, 99), width, 24, fc=colours[name][0], zorder=3))
    axes.text(x + width / 2, 111, name, ha="center", va="center", color=colours[name][1], zorder=4)
