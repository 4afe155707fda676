"""Measured time against one size that grows, with the exponents that were fitted."""

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from miniflamingo.plots.style import GREY, VISIBLE, WRONG, styled

# a side's colour and marker: ours dark, torch light, others warm; hollow where nothing is cached
SIDES = {
    "NumPy": (VISIBLE, "o"), "NumPy, cached": (VISIBLE, "o"),
    "NumPy, dense mask": (VISIBLE, "s"), "NumPy, not cached": (VISIBLE, "s"),
    "torch": ("#56b4e9", "^"), "torch, cached": ("#56b4e9", "^"), "torch, SDPA": ("#56b4e9", "^"),
    "torch, eager": ("#56b4e9", "v"), "torch, not cached": ("#56b4e9", "v"),
    "open-flamingo": (WRONG, "D"), "flamingo-pytorch": ("#e69f00", "P"),
}  # fmt: skip
HOLLOW = ("dense mask", "not cached", "eager")
OTHER = (GREY, "x")


@styled
def plot_scaling(document):
    """One panel a case of scaling's document: milliseconds against the size, both logarithmic, a
    line a side, its exponent and the counted one in the legend. ValueError without a case."""
    if not (cases := document["cases"]):
        raise ValueError("expected cases to draw, got none")
    rows = -(-len(cases) // 2)
    figure = Figure((9.6, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, case in zip(panels, cases):
        _draw_case(axes, case)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    return figure


def _draw_case(axes, case):
    """Lines of one case. A prompt of n shots stands at n + 1 images, so that 0 has a place."""
    shift = case["grows"] == "shots"
    for side, fit in case["fits"].items():
        own = [row for row in case["rows"] if row["side"] == side]
        colour, marker = SIDES.get(side, OTHER)
        hollow = any(word in side for word in HOLLOW)
        label = f"{side}: {fit['exponent']:.2f} ({fit['counted']:.2f})"
        x, y = [row["size"] + shift for row in own], [1e3 * row["median"] for row in own]
        axes.plot(x, y, color=colour, marker=marker, ms=5, lw=1.4, ls="--" if hollow else "-",
                  mfc="white" if hollow else colour, label=label)  # fmt: skip
    sizes = sorted({row["size"] for row in case["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([size + shift for size in sizes], [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=case["case"], xlabel=f"{case['grows']}; {case['order']}", ylabel="milliseconds")
    axes.grid(True)
    axes.legend(fontsize=7, loc="upper left", title="side: exponent (counted)", title_fontsize=7)
