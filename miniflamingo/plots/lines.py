"""Plain lines."""

from itertools import cycle

from matplotlib.figure import Figure

from miniflamingo.plots.style import WRONG, name_ends, styled

COLOURS, MARKERS = ("#0b3c78", WRONG, "#009e73", "#cc79a7", "#e69f00", "#56b4e9"), "os^Dv<P"


@styled
def plot_lines(x, series, xlabel, ylabel, title="", log=True):
    """Lines with markers, named at their right ends: series is {name: [len(x)]}."""
    figure = Figure((6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    ends = {}
    for (name, y), colour, marker in zip(series.items(), cycle(COLOURS), cycle(MARKERS)):
        axes.plot(x, y, color=colour, marker=marker, lw=1.8, ms=5)
        ends[name] = y[-1], colour
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xticks=x)
    axes.grid(True)
    name_ends(axes, x[-1], ends, 8, 9)
    return figure
