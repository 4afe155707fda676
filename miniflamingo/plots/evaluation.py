"""Few-shot episodes, curves with their uncertainty, and runs beside one another."""

import numpy as np
from matplotlib.figure import Figure

from miniflamingo.plots.style import GREY, IMAGE_COLOURS, INK, LINES, MASKED, VISIBLE, WRONG, styled


@styled
def plot_episode(images, labels, candidates=(), scores=(), truth=None):
    """An episode: pictures with their labels, the query last, and how the candidates score.

    images [n, height, width, 3]; labels: n strings; candidates: C strings; scores [C]; truth: the
    index of the right one; without candidates, the pictures alone. ValueError when the lengths do
    not fit.
    """
    if len(images) != len(labels) or len(candidates) != len(scores):
        raise ValueError(
            f"{len(images)} images, {len(labels)} labels, {len(candidates)} candidates, "
            f"{len(scores)} scores"
        )
    wide = [2.6] if len(candidates) else []  # the scores' panel, beside the pictures
    figure = Figure((1.15 * len(images) + 3.4 * len(wide), 2.3), layout="constrained")
    widths = [1] * len(images) + wide
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
    for i, (image, label) in enumerate(zip(images, labels)):
        axes = figure.add_subplot(grid[i])
        axes.imshow(np.clip(image, 0, 1), interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlabel=label)
        axes.set_title("query" if i == len(images) - 1 else f"shot {i + 1}", loc="center")
        width = 3 if i == len(images) - 1 else 0.8
        axes.spines[:].set(visible=True, linewidth=width, color=INK if width == 3 else GREY)
    if wide:
        _draw_scores(figure.add_subplot(grid[-1]), candidates, scores, truth)
    return figure


def _draw_scores(axes, candidates, scores, truth):
    names = [f"{name} (right)" if i == truth else name for i, name in enumerate(candidates)]
    names = [f"{name}  {round(score, 1) + 0.0:.1f}" for name, score in zip(names, scores)]
    colours = [VISIBLE if i == truth else MASKED for i in range(len(names))]
    axes.barh(np.arange(len(names)), scores, color=colours, edgecolor=VISIBLE)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="log-likelihood, nearer 0 is better")


@styled
def plot_shots(curves, ceilings=None, blind=None):
    """Accuracy against the number of shots, with intervals.

    curves {name: {shots: (accuracy, low, high)}}; ceilings {name: {shots: accuracy}}, dotted, for
    some of the names; blind: the accuracy of who names a random shot without looking. Curves may
    have different shots. ValueError for an interval that does not hold its accuracy.
    """
    figure = Figure((6.8, 3.9), layout="constrained")
    axes, ticks = figure.subplots(), set()
    for i, (name, curve) in enumerate(curves.items()):
        shots = sorted(curve, key=int)
        middle, low, high = np.array([curve[k] for k in shots]).T
        if not ((low <= middle) & (middle <= high)).all():
            raise ValueError(f"{name!r}: an interval must hold its accuracy, got {curve}")
        x = np.log2(np.array(shots, int) + 1)
        style = dict(color=IMAGE_COLOURS[(5, 0, 2, 3)[i % 4]], ls=LINES[i % 4], capsize=4)
        axes.errorbar(x, middle, [middle - low, high - middle], marker="osD^"[i % 4],
                      label=name, **style)  # fmt: skip
        if ceilings and name in ceilings:
            axes.plot(x, [ceilings[name][k] for k in shots], ":", color=GREY)
        ticks |= {int(k) for k in shots}
    if ceilings:
        axes.plot([], [], ":", color=GREY, label="ceiling: the class was shown")
    if blind is not None:
        text = "blind: a random shot's name; chance"
        axes.axhline(blind, ls=(0, (1, 4)), color=GREY, label=text)
    axes.set_xticks(np.log2(np.array(sorted(ticks)) + 1), [str(k) for k in sorted(ticks)])
    axes.set(xlabel="shots", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.grid(True)
    axes.legend(fontsize=8)
    return figure


@styled
def plot_dots(panels, reference=None, digits=2, xlabel="", limits=None, marks=None):
    """Every measurement as a dot: panels {title: {row: [values]}}, with each row's mean in numbers.

    All panels have the same rows, in the order of the first, and, where given, the same `limits` of
    the x-axis. A dashed line goes down from the mean of the row `reference`, and a dotted one, with
    its name, at each of marks {title: {name: x}}: chance, or what a copier reaches. ValueError when
    the rows differ, or one has no value.
    """
    rows = list(next(iter(panels.values())))
    for title, values in panels.items():
        if list(values) != rows or not all(np.size(v) for v in values.values()):
            raise ValueError(f"{title!r} must have values for each of {rows}, got {values}")
    figure = Figure((2.2 + 2.9 * len(panels), 0.7 + 0.36 * len(rows)), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                     panels.items()):  # fmt: skip
        _draw_dots(axes, values, reference, digits)
        axes.set(title=title, xlabel=xlabel, xlim=limits)
        for name, x in (marks or {}).get(title, {}).items():
            axes.axvline(x, ls=":", lw=1.2, color=INK, zorder=0)
            axes.annotate(name, (x, 0), (2, 2), textcoords="offset points", fontsize=7, color=INK,
                          xycoords=("data", "axes fraction"))  # fmt: skip
    for axes in figure.axes[1:]:
        axes.set_yticklabels([])
    return figure


def _draw_dots(axes, values, reference, digits):
    for y, (row, dots) in enumerate(values.items()):
        mean = float(np.mean(dots))
        colour = VISIBLE if row == reference else WRONG
        style = dict(ms=6, alpha=0.6, color=colour, mew=0, clip_on=False)
        axes.plot(dots, np.full(np.size(dots), y), "o", **style)
        if np.size(dots) > 1:
            axes.plot([mean, mean], [y - 0.32, y + 0.32], color=INK, lw=2, clip_on=False)
        axes.annotate(f"{mean:.{digits}f}", (1, y), (6, 0), textcoords="offset points",
                      xycoords=("axes fraction", "data"), va="center", fontsize=8)  # fmt: skip
    if reference is not None:
        axes.axvline(np.mean(values[reference]), ls="--", lw=1, color=VISIBLE, zorder=0)
    axes.set_yticks(np.arange(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
