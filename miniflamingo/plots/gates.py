"""The tanh gate: the layer it stands in, its curve and slope, what opening it does to the words."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from miniflamingo.plots.style import (
    BOX,
    GREY,
    IMAGE_COLOURS,
    INK,
    LETTER,
    LINES,
    PAPER,
    VISIBLE,
    WRONG,
    canvas,
    draw_box,
    legend,
    name_ends,
    styled,
)

STREAM, BRANCH = 38, 102  # heights, in points
CURVES = (VISIBLE, WRONG, "#009e73", "#cc79a7", "#56b4e9", "#777777")


@styled
def plot_gated_block(alpha_xattn, alpha_dense):
    """GATED XATTN-DENSE and the frozen block behind it (paper, figure 4), from left to right.

    Each gate shows its tanh(alpha); a branch is drawn as thick as its gate is open, and dashed when
    it is shut.
    """
    figure, axes = canvas(750, 182)
    axes.plot([20, 730], [STREAM, STREAM], color=INK, lw=2, zorder=0)
    axes.text(20, STREAM - 14, "y", va="center", style="italic")
    _draw_branch(axes, 56, "attention", "α_xattn", np.tanh(alpha_xattn))
    _draw_branch(axes, 286, "feed-forward", "α_dense", np.tanh(alpha_dense))
    arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (126, BRANCH + 13), (126, BRANCH + 46), arrowprops=arrow)
    _centred(axes, 126, BRANCH + 57, "visual tokens of image φ", IMAGE_COLOURS[0])
    for x, name in ((572, "self-attention"), (676, "feed-forward")):
        _centred(axes, x, STREAM, name, PAPER)
    axes.text(572, STREAM + 26, "each with its own + around it", va="center", color=GREY,
              fontsize=8, ha="left")  # fmt: skip
    legend(axes, {"trained": IMAGE_COLOURS[1], "frozen": PAPER}, 572, BRANCH)
    return figure


def _centred(axes, x, y, name, colour):
    width = len(name) * LETTER + 12
    draw_box(axes, x - width / 2, y - BOX / 2, width, name, colour)


def _draw_branch(axes, x, name, alpha, gate):
    """A branch that leaves the stream at x, passes a box and a gate, and is added at x + 200."""
    style = {"color": INK, "lw": 0.8 + 5 * abs(gate), "ls": "-" if gate else ":", "zorder": 0}
    style["solid_capstyle"] = "butt"
    axes.plot([x, x, x + 200, x + 200], [STREAM, BRANCH, BRANCH, STREAM], **style)
    _centred(axes, x + 70, BRANCH, name, IMAGE_COLOURS[1])
    axes.add_patch(Circle((x + 158, BRANCH), 21, fc="white", ec=INK))
    axes.text(x + 158, BRANCH, f"{gate:.2f}", ha="center", va="center")
    axes.text(x + 158, BRANCH + 31, f"tanh({alpha})", ha="center", va="center", fontsize=8)
    axes.add_patch(Circle((x + 200, STREAM), 8, fc="white", ec=INK, zorder=2))
    axes.text(x + 200, STREAM, "+", ha="center", va="center", zorder=3)


@styled
def plot_gate(alpha, panels):
    """Curves over alpha [n], one panel each: panels {title: {name: [n]}}; NaN leaves a gap.

    ValueError when a curve does not fit alpha.
    """
    figure = Figure((8, 3), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                     panels.items()):  # fmt: skip
        for i, (name, values) in enumerate(curves.items()):
            if np.shape(values) != np.shape(alpha):
                raise ValueError(
                    f"{name!r} must be {list(np.shape(alpha))}, got {list(np.shape(values))}"
                )
            style = dict(color=CURVES[i % len(CURVES)], ls=LINES[i % len(LINES)], lw=1.8)
            axes.plot(alpha, values, label=name, **style)
        axes.axvline(0, color=GREY, lw=0.6)
        axes.axhline(0, color=GREY, lw=0.6)
        axes.set(title=title, xlabel="alpha", xlim=(alpha[0], alpha[-1]))
        axes.grid(True)
        axes.legend(fontsize=8)
    return figure


@styled
def plot_next_words(scales, probabilities, words, kl, most=4):
    """What the next word is while the gates open: probabilities over the openings, and the KL.

    scales [S], which multiply every alpha; probabilities [S, V]; words: V strings; kl [S], in nats.
    The `most` words that reach the highest probability are drawn. ValueError when sizes do not fit.
    """
    if np.shape(probabilities) != (len(scales), len(words)) or len(kl) != len(scales):
        raise ValueError(
            f"probabilities must be [{len(scales)}, {len(words)}] and kl [{len(scales)}], "
            f"got {list(np.shape(probabilities))} and {list(np.shape(kl))}"
        )
    probabilities, ends = np.asarray(probabilities), {}
    figure = Figure((8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, v in enumerate(np.argsort(-probabilities.max(axis=0), kind="stable")[:most]):
        colour = CURVES[i % len(CURVES)]
        left.plot(scales, probabilities[:, v], "osD^v<"[i % 6], ls=LINES[i % 4], color=colour, ms=4)
        ends[words[v]] = probabilities[-1, v], colour
    left.set(title="probability of the next word", xlabel="every alpha times", ylim=(-0.03, 1.03))
    name_ends(left, scales[-1], ends, 6, 9)
    right.plot(scales, kl, "o-", color=VISIBLE, ms=4)
    right.set(title="KL from the frozen LM, nats", xlabel="every alpha times", ylim=(-0.05, None))
    for axes in (left, right):
        axes.grid(True)
    return figure


@styled
def plot_openings(gates, title):
    """How open every gate is: |tanh(alpha)| as bars, a panel for each kind of gate.

    gates {kind: {layer: [1] or [D]}}; of a gate with D numbers the bar is their mean, and a line
    goes from the 5th to the 95th percentile. ValueError without a gate.
    """
    kinds = {kind: layers for kind, layers in gates.items() if layers}
    if not kinds:
        raise ValueError(f"the figure needs a gate, got {gates}")
    figure = Figure((8, 1.9 * len(kinds) + 0.6), layout="constrained")
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (kind, layers), colour in zip(panels, kinds.items(), (VISIBLE, WRONG)):
        _draw_bars(axes, list(layers.values()), colour)
        axes.set(title=f"{kind}: |tanh(alpha)|", ylim=(0, 1.15), yticks=(0, 0.5, 1))
        places = range(0, len(layers), max(1, len(layers) // 20))
        axes.set_xticks(places, [list(layers)[i] for i in places])
    panels[-1].set_xlabel("layer")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _draw_bars(axes, openings, colour):
    """A bar for each layer, with its height as a number above it where there is room."""
    means = [float(np.mean(opening)) for opening in openings]
    axes.bar(range(len(means)), means, color=colour, width=0.7)
    for x, (mean, opening) in enumerate(zip(means, openings)):
        low, high = np.percentile(opening, [5, 95])
        if np.size(opening) > 1:
            axes.plot([x, x], [low, high], color=INK, lw=1.2)
        if len(means) <= 16:
            axes.text(x, max(mean, high) + 0.02, f"{mean:.2f}", ha="center", fontsize=8, color=GREY)
    axes.set_xlim(-0.6, max(len(means), 6) - 0.4)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
