"""What the eye and the resampler do: features, similarities, the signal's size, keys, latents."""

import textwrap

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from miniflamingo.plots.style import (
    GREY,
    IMAGE_COLOURS,
    INK,
    LINES,
    PAPER,
    VISIBLE,
    WRONG,
    canvas,
    image_colour,
    name_ends,
    styled,
)

CURVE_COLOURS = (VISIBLE, WRONG, "#009e73", "#cc79a7")


def _expect(fits, expected, got):
    if not fits:
        raise ValueError(f"expected {expected}, got {got}")


def _picture(axes, image, title="", size=8):
    axes.imshow(np.clip(image, 0, 1), interpolation="nearest")
    axes.set_title(title, loc="center", fontsize=size, fontweight="normal", color=INK)
    axes.set_axis_off()


@styled
def plot_features(images, captions, maps):
    """Pictures with their captions, and below each the grid that the eye makes of it.

    images [n, height, width, 3]; captions: n strings; maps [n, h, w], one number a feature, in a
    common scale. ValueError when they are not equally many.
    """
    n = len(images)
    _expect(len(captions) == n == len(maps), f"{n} captions and maps", (len(captions), len(maps)))
    figure = Figure((1.35 * n, 3.1), layout="constrained")
    panels = figure.subplots(2, n, squeeze=False)
    for (above, below), image, caption, grid in zip(panels.T, images, captions, maps):
        _picture(above, image, textwrap.fill(caption, 17), 8)
        drawn = below.imshow(grid, cmap="Blues", vmin=0, vmax=np.max(maps))
        below.set_axis_off()
    h, w = np.shape(maps)[1:]
    panels[1, 0].set_title(f"{h} × {w} features", loc="center", fontsize=8, fontweight="normal")
    figure.colorbar(drawn, ax=panels[1], label="length")
    return figure


@styled
def plot_signal(panels, ylabel="", xlabel="layer"):
    """The size of a signal through the depth, on a logarithmic axis, one line a network.

    panels {title: {name: [depth]}}, at most four names each. ValueError for more, or for a value
    that is not above 0.
    """
    figure = Figure((4.6 * len(panels), 3.3), layout="constrained")
    for axes, (title, curves) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items()):
        _expect(len(curves) <= len(CURVE_COLOURS), "at most 4 curves a panel", len(curves))
        ends = {}
        for i, (name, y) in enumerate(curves.items()):
            _expect(np.min(y) > 0, f"values above 0 in {name!r}", np.min(y))
            x = np.arange(1, len(y) + 1)
            axes.plot(x, y, color=CURVE_COLOURS[i], ls=LINES[i], lw=1.8, marker="os^D"[i], ms=3.5)
            ends[name] = y[-1], CURVE_COLOURS[i]
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True)
        name_ends(axes, x[-1], ends, 6, 8)
    return figure


@styled
def plot_similarity(similarity, images, captions):
    """The similarities of a batch: pictures as rows, captions as columns, the own one framed.

    similarity [n, n]; images [n, height, width, 3]; captions: n strings. The largest of a row
    stands in bold; a cross where that is another's caption. ValueError when the sizes differ.
    """
    s, n = np.asarray(similarity), len(images)
    _expect(s.shape == (n, n) and len(captions) == n, f"[{n}, {n}] and {n} captions",
            (s.shape, len(captions)))  # fmt: skip
    cell, left, top = 50, 62, 100
    figure, axes = canvas(left + n * cell + 14, top + n * cell + 30)
    x = left + cell * np.arange(n + 1)
    axes.pcolormesh(x, top + x - left, s, cmap="Blues", vmin=min(0, s.min()), vmax=1,
                    edgecolors="white", linewidth=1)  # fmt: skip
    for i in range(n):
        y = top + i * cell
        axes.imshow(np.clip(images[i], 0, 1), extent=(left - 52, left - 6, y + cell - 2, y + 2))
        place = left + (i + 0.5) * cell, top - 6, textwrap.fill(captions[i], 18)
        axes.text(*place, rotation=60, ha="left", rotation_mode="anchor", fontsize=7.5, color=INK)
        axes.add_patch(Rectangle((left + i * cell, y), cell, cell, fill=False, ec=INK, lw=1.8))
        _similarities_of(axes, s[i], i, left, y, cell)
    axes.set(xlim=(0, left + n * cell + 14), ylim=(top + n * cell + 30, 0))
    note = "framed: its own caption; bold: the largest of the row; × where that is another's"
    axes.text(left - 52, top + n * cell + 14, note, fontsize=8, color=GREY, va="center")
    return figure


def _similarities_of(axes, row, own, left, y, cell):
    """The numbers of one row of a similarity matrix; the background decides their colour."""
    best = int(np.argmax(row))
    for j, value in enumerate(row):
        cross = "× " if j == best != own else ""
        colour = "white" if value > 0.55 else INK
        number = f"{cross}{np.round(value, 1) + 0.0:.1f}"  # no "-0.0"
        axes.text(left + (j + 0.5) * cell, y + cell / 2, number, ha="center", va="center",
                  color=colour, weight="bold" if j == best else "normal")  # fmt: skip


@styled
def plot_retrieved(queries, names, found, found_names, scores):
    """Query pictures, one a row, and what was retrieved for each, the most similar first.

    queries [n, height, width, 3] and their n names; found [n, k, height, width, 3] and their names
    [n, k]; scores [n, k]. A cross stands where a name is another. ValueError when sizes differ.
    """
    n, k = np.shape(scores)
    shapes = np.shape(queries)[:1], np.shape(names), np.shape(found)[:2], np.shape(found_names)
    _expect(shapes == ((n,), (n,), (n, k), (n, k)), f"{n} queries, {n} x {k} found", shapes)
    figure = Figure((1.15 * (k + 1) + 0.3, 1.55 * n), layout="constrained")
    panels = figure.subplots(n, k + 1, width_ratios=[1.25, *[1] * k], squeeze=False)
    for i, row in enumerate(panels):
        _picture(row[0], queries[i], f"query:\n{names[i]}")
        for j, axes in enumerate(row[1:]):
            same = found_names[i][j] == names[i]
            _picture(axes, found[i][j], f"{scores[i][j]:.2f}{'' if same else ' ×'}\n"
                                        + str(found_names[i][j]))  # fmt: skip
            axes.title.set_color(INK if same else WRONG)
    return figure


@styled
def plot_keys(clips, S, R):
    """What the latents of a resampler read: each frame's S features, and the R latents, appended.

    clips {name: T}, one row each; S a square. One cell a key. ValueError when S is no square or
    nothing is there to draw.
    """
    side, most = int(S**0.5), max(clips.values(), default=0)
    _expect(side**2 == S and most > 0 and R > 0, "a square S, and R and T above 0", (S, R, clips))
    cell, left, top = 7, 70, 34
    block, row, width = side * cell, side * cell + 54, -(-R // side) * cell
    figure, axes = canvas(left + most * (block + 10) + width + 170, top + len(clips) * row - 16)
    for i, (name, T) in enumerate(clips.items()):
        y = top + i * row
        axes.text(12, y + block / 2, name, va="center", weight="bold")
        for t in range(T):
            x = left + t * (block + 10)
            _cells(axes, x, y, S, side, cell, image_colour(t + 1))
            axes.text(x + block / 2, y - 10, f"+ τ{t + 1}", ha="center", va="center")
            axes.text(x + block / 2, y + block + 10, f"frame {t + 1}", ha="center", fontsize=8)
        x = left + T * (block + 10) + 8
        _cells(axes, x, y, R, side, cell, PAPER, down=True)
        axes.text(x, y + block + 10, f"{R} latents", fontsize=8)
        after = x + width + 12, y + block / 2
        text = f"{T * S} + {R} = {T * S + R} keys\n→ {R} visual tokens"
        axes.text(*after, text, va="center", color=INK)
    return figure


def _cells(axes, x, y, count, side, cell, colour, down=False):
    """`count` squares in lines of `side`, left to right, or columns, top to bottom."""
    for i in range(count):
        a, b = divmod(i, side)
        column, line = (a, b) if down else (b, a)
        place = x + column * cell, y + line * cell
        axes.add_patch(Rectangle(place, cell, cell, fc=colour, ec="white", lw=0.6))


@styled
def plot_clip_latents(frames, maps, latents):
    """Where some latents look in a clip, one row a latent, with each frame's share of its look.

    frames [T, height, width, 3]; maps [n, T, h, w], what latent `latents[i]` pays; one scale a row.
    ValueError when they do not fit.
    """
    n, T = np.shape(maps)[:2]
    _expect((len(latents), len(frames)) == (n, T), f"{n} latents, {T} frames",
            (len(latents), len(frames)))  # fmt: skip
    figure = Figure((1.15 * T + 0.6, 1.42 * n), layout="constrained")
    panels = figure.subplots(n, T, squeeze=False)
    extent = (-0.5, frames.shape[2] - 0.5, frames.shape[1] - 0.5, -0.5)
    yellow = ListedColormap([IMAGE_COLOURS[4]])  # the more attention, the less transparent
    for row, latent, paid in zip(panels, latents, maps):
        for axes, frame, attention in zip(row, frames, paid):
            grey = np.clip(frame, 0, 1).mean(axis=-1)
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
            axes.imshow(attention, extent=extent, cmap=yellow,
                        alpha=0.9 * attention / max(np.max(paid), 1e-12))  # fmt: skip
            share = attention.sum() / max(np.sum(paid), 1e-12)
            axes.set_title(f"{share:.0%}", loc="center", fontsize=8, fontweight="normal")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"latent {latent}", fontsize=8)
    return figure
