"""Training and evaluation: the mixture, the gates, few-shot curves, answers, latents."""

import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from miniflamingo.plots.style import (
    BOX,
    GREY,
    IMAGE_COLOURS,
    INK,
    LAYER_COLOURS,
    LETTER,
    LINES,
    MARGIN,
    PAPER,
    WRONG,
    canvas,
    draw_box,
    legend,
    name_ends,
    styled,
    wrap,
)


@styled
def plot_mixture(rows, weights):
    """One step of training on a mixture: a document of each dataset, weighted, into one update.

    rows {dataset: (words, counted)}: L strings, and bool[L], which of them count in the loss;
    weights {dataset: lambda}. ValueError when the two do not fit.
    """
    for name, (words, counted) in rows.items():
        if len(words) != len(counted) or name not in weights:
            raise ValueError(f"{name!r}: {len(words)} words, {len(counted)} counted, {weights}")
    left, y, bus, middles = 96, MARGIN, 700, []
    figure, axes = canvas(bus + 112, 1)
    for name, (words, counted) in rows.items():
        places, lines = wrap([len(word) * LETTER + 10 for word in words], bus - left - 60)
        middles.append(y + (lines * (BOX + 4) - 4) / 2)
        for word, counts, (x, line, width) in zip(words, counted, places):
            colour = IMAGE_COLOURS[1] if counts else PAPER
            draw_box(axes, left + x, y + line * (BOX + 4), width, word, colour)
        y += lines * (BOX + 4) + 8
        axes.text(MARGIN, middles[-1], name, va="center", weight="bold")
        axes.text(left, y, f"{np.sum(counted)} of {len(words)} tokens count", va="center",
                  color=GREY, fontsize=8)  # fmt: skip
        end = left + max(x + width for x, _, width in places)
        axes.plot([end + 6, bus], [middles[-1]] * 2, color=GREY, lw=1)
        axes.text(bus - 6, middles[-1] - 8, f"× {weights[name]:g}", ha="right", va="center")
        y += 20
    _draw_bus(axes, bus, middles)
    legend(axes, {"counts in the loss": IMAGE_COLOURS[1], "is only read": PAPER}, left, y + 4)
    figure.set_size_inches((bus + 112) / 72, (y + 20) / 72)
    axes.set_ylim(y + 20, 0)
    return figure


def _draw_bus(axes, x, middles):
    """A line that gathers the rows at these heights, and where it leads."""
    centre = (middles[0] + middles[-1]) / 2
    axes.plot([x, x], [middles[0], middles[-1]], color=GREY, lw=1)
    arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x + 24, centre), (x, centre), arrowprops=arrow)
    axes.text(x + 30, centre, "sum of the\ngradients:\none update", va="center")


@styled
def plot_alphas(steps, alpha_xattn, alpha_dense):
    """How alpha evolves (paper, appendix): |tanh(alpha)| of every layer, one panel a gate.

    steps int[S]; alpha_xattn, alpha_dense [S, layers].
    """
    figure = Figure((8, 3.2), layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), (alpha_xattn, alpha_dense))
    for axes, alpha in panels:
        layers = np.shape(alpha)[1]
        shades = matplotlib.colors.LinearSegmentedColormap.from_list("depth", LAYER_COLOURS)
        for layer, values in enumerate(np.abs(np.tanh(alpha)).T):
            colour = shades(layer / max(layers - 1, 1))
            axes.plot(steps, values, color=colour, ls=LINES[layer % 4], lw=1.8)
        axes.set(xlabel="step", ylim=(0, 1), xlim=(0, max(steps[-1], 1)))
        axes.grid(True)
        ends = np.abs(np.tanh(alpha[-1]))
        name_ends(axes, steps[-1], {f"layer {i}": (y, INK) for i, y in enumerate(ends)}, 4, 8)
    left, right = figure.axes
    left.set(title="attention", ylabel="|tanh(alpha)|")
    right.set(title="feed-forward")
    return figure


@styled
def plot_few_shot(curves, ceilings, blind=None):
    """Accuracy against the number of shots, with what can be known from the shots at all.

    curves {name: {shots: accuracy in 0..1}}; ceilings, the same, for some of the names: how often
    the query's class was among the shots; blind {name: accuracy}: who names a random shot without
    looking, which is chance among w classes, 1 / w.
    """
    figure = Figure((6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        shots = sorted(curve, key=int)
        x = np.log2(np.array(shots, int) + 1)
        colour = IMAGE_COLOURS[i % len(IMAGE_COLOURS)]
        axes.plot(x, [curve[k] for k in shots], "osD^v"[i % 5], ls="-", color=colour, label=name)
        if name in ceilings:
            axes.plot(x, [ceilings[name][k] for k in shots], ":", color=colour)
        if name in (blind or {}):
            axes.axhline(blind[name], ls=(0, (1, 4)), color=colour)
    axes.plot([], [], ":", color=GREY, label="ceiling: the class was shown")
    if blind:
        text = "blind: a random shot's name; chance"
        axes.plot([], [], ls=(0, (1, 4)), color=GREY, label=text)
    axes.set_xticks(x, [str(k) for k in shots])
    axes.set(xlabel="shots", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.grid(True)
    axes.legend(fontsize=8)
    return figure


@styled
def plot_answers(images, answers, correct, columns=6):
    """A sheet of images with the model's answer below each; a wrong one is marked.

    images [n, height, width, 3], or clips [n, T, height, width, 3], of which four frames are shown
    side by side; answers: n strings; correct bool[n].
    """
    rows = -(-len(images) // columns)
    clips = np.ndim(images[0]) == 4
    width, height = (4.2, 1.5) if clips else (1.75, 2.25)
    figure = Figure((width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, image, answer, right in zip(panels, images, answers, correct):
        axes.imshow(np.clip(_film_strip(image) if clips else image, 0, 1), interpolation="nearest")
        text = textwrap.fill(answer if right else f"{answer} (wrong)", 24)
        style = {"color": INK if right else WRONG, "fontsize": 8}
        axes.text(0.5, -0.05, text, transform=axes.transAxes, ha="center", va="top", **style)
    return figure


def _film_strip(clip, most=4):  # [T, height, width, 3] -> [height, ..., 3], frames side by side
    some = np.linspace(0, len(clip) - 1, most).round().astype(int)
    framed = np.pad(clip[some], ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=1)
    return np.concatenate(framed, axis=1)[:, :-2]


@styled
def plot_latents(image, maps):
    """Where each latent looks: image [height, width, 3]; maps [R, h, w], the attention it pays."""
    half = -(-len(maps) // 2)
    columns = 1 + half
    figure = Figure((1.5 * columns, 3.3), layout="constrained")
    grid = figure.add_gridspec(2, columns)
    first = figure.add_subplot(grid[:, 0])
    first.imshow(np.clip(image, 0, 1), interpolation="nearest")
    first.set_title("image", loc="center")
    first.set_axis_off()
    for r, attention in enumerate(maps):
        axes = figure.add_subplot(grid[r // half, 1 + r % half])
        extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        axes.imshow(np.clip(image, 0, 1).mean(axis=-1), cmap="gray", vmin=0, vmax=1)
        axes.imshow(attention, extent=extent, cmap="viridis", alpha=0.65, vmin=0)
        axes.set_title(f"latent {r}", loc="center", fontsize=8, fontweight="normal")
        axes.set_axis_off()
    return figure
