"""What the kernels cost: time against N, and the roofline."""

import textwrap
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from miniflamingo.plots.style import GREY, INK, LINES, VISIBLE, WRONG, styled

PEER_COLOURS = ("#777777", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#882255")
MARKERS = "osD^v<>P"


@styled
def plot_cost(document, entry, direction):
    """Microseconds against the number of images N, one line an implementation, one panel a shape.

    document is what `python -m miniflamingo bench --json` writes; the floor is the counted one.
    ValueError when it holds no time for the entry and direction.
    """
    rows = [r for r in _timed(document) if (r["entry"], r["direction"]) == (entry, direction)]
    if not rows:
        raise ValueError(f"expected times of {entry}, {direction}; the document has none")
    sizes = list(dict.fromkeys(_sizes(r["shape"]) for r in rows))
    kinds = list(dict.fromkeys(r["shape"]["phi"] for r in rows))
    width = max(6.4, 3 * len(sizes))
    figure = Figure((width, 2.6 * len(kinds) + 1.2), layout="constrained")
    panels = figure.subplots(len(kinds), len(sizes), sharex=True, sharey=True, squeeze=False)
    styles = _implementation_styles(rows)
    for i, kind in enumerate(kinds):
        for axes, size in zip(panels[i], sizes):
            some = [r for r in rows if (_sizes(r["shape"]), r["shape"]["phi"]) == (size, kind)]
            _draw_cost(axes, some, styles)
            axes.set_title("{} heads × {}, B = {}, ".format(*size) + f"{kind} φ", fontsize=9)
        panels[i][0].set_ylabel("microseconds")
    for axes in panels[-1]:
        axes.set_xlabel("images N")
    _name_lines(figure, panels[0][0], f"{entry}, {direction}, on {_where(document)}", width)
    return figure


def _timed(document):
    return [r for r in document["records"] if r["microseconds"]]


def _where(document):
    """The machine, and that a CPU's figures are no kernel's."""
    meta = document["meta"]
    return meta["gpu"] or f"a CPU (no kernel timed): {meta['cpu'] or meta['machine']}"


def _sizes(shape):
    return shape["H"], shape["K"], shape["B"]


def _implementation_styles(rows):
    """{implementation: how its line looks}; the kernel's is dark blue and thicker."""
    names = dict.fromkeys(r["implementation"] for r in rows if not r["is_kernel"])
    styles = {r["implementation"]: dict(color=VISIBLE, marker="o", lw=2.4)
              for r in rows if r["is_kernel"]}  # fmt: skip
    for i, name in enumerate(names):
        marker = MARKERS[1 + i % (len(MARKERS) - 1)]
        colour = PEER_COLOURS[i % len(PEER_COLOURS)]
        styles[name] = dict(color=colour, marker=marker, lw=1.4, ls=LINES[i % 4])
    return styles


def _draw_cost(axes, rows, styles):
    """The lines of one panel, and the floor below them."""
    floor = {r["shape"]["N"]: r["floor_microseconds"] for r in rows}
    for name, style in styles.items():
        cost = {r["shape"]["N"]: r["microseconds"] for r in rows if r["implementation"] == name}
        # all names, so that the first panel's legend has them
        axes.plot(sorted(cost), [cost[N] for N in sorted(cost)], ms=4.5, label=name, **style)
    axes.plot(sorted(floor), [floor[N] for N in sorted(floor)], color=INK, ls=":", label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xticks(sorted(floor))
    axes.grid(True)


def _name_lines(figure, axes, title, width):
    """A title, and a legend below all panels; both as wide as the figure, in inches."""
    title = textwrap.fill(title, int(11 * width))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=int(width / 2), fontsize=8)


@styled
def plot_roofline(document):
    """Flops a second against flops a byte, both as counted by hand, under the measured roof.

    document as for plot_cost; one panel a direction, one marker an entry; the kernels are dark
    blue, the peers orange. ValueError when it holds no times.
    """
    rows = _timed(document)
    if not rows:
        raise ValueError("expected a document with times, got none")
    directions = dict.fromkeys(r["direction"] for r in rows)
    markers = dict(zip(dict.fromkeys(r["entry"] for r in rows), cycle(MARKERS)))
    figure = Figure((4.6 * len(directions), 4.2), layout="constrained")
    panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, directions):
        some = [r for r in rows if r["direction"] == direction]
        _draw_roof(axes, document["limits"], [r["flops"] / r["bytes"] for r in some])
        for r in sorted(some, key=lambda r: r["is_kernel"]):
            style = dict(mfc=VISIBLE, mec="white", zorder=3) if r["is_kernel"] else PEER_MARKS
            rate = r["flops"] / r["microseconds"] / 1e6
            axes.plot(r["flops"] / r["bytes"], rate, markers[r["entry"]], ms=6, mew=0.8, **style)
        axes.set(title=direction, xlabel="flops a byte")
    panels[0].set_ylabel("TFLOP/s")
    for entry, marker in markers.items():
        panels[0].plot([], [], marker, color=GREY, label=entry)
    if any(r["is_kernel"] for r in rows):
        panels[0].plot([], [], "s", color=VISIBLE, label="this project's kernels")
    panels[0].plot([], [], "s", mfc="none", mec=WRONG, label="peers")
    title = f"roofline of {_where(document)}"
    _name_lines(figure, panels[0], title, 4.6 * len(directions))
    return figure


PEER_MARKS = dict(mfc="none", mec=WRONG)


def _draw_roof(axes, limits, intensities):
    """The two measured limits, over the range of the points."""
    bandwidth, peak = limits["copy_bytes_per_second"], limits["flops_per_second"]
    ridge = peak / bandwidth
    ends = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    x = np.array([ends[0], ridge, ends[1]])
    axes.loglog(x, np.minimum(bandwidth * x, peak) / 1e12, color=INK, lw=1.5)
    note = dict(fontsize=8, color=INK, textcoords="offset points")
    axes.annotate(f"{peak / 1e12:.3g} TFLOP/s", (ends[1], peak / 1e12), (0, 4), ha="right", **note)
    start = (ends[0], bandwidth * ends[0] / 1e12)
    axes.annotate(f"{bandwidth / 1e9:.0f} GB/s", start, (12, -4), va="top", **note)
    axes.set_xscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(True)


@styled
def plot_prediction(records):
    """Predicted microseconds of image-causal attention against N, above the floor of each device.

    records: those of `python -m miniflamingo predict`; one panel a direction and size, a colour a
    device. ValueError when none is of image-causal attention.
    """
    rows = [r for r in records if r["entry"] == "image_causal_attention"]
    if not rows:
        raise ValueError("expected predictions of image_causal_attention, got none")
    ways, devices = (list(dict.fromkeys(r[x] for r in rows)) for x in ("direction", "device"))
    sizes = list(dict.fromkeys(_sizes(r["shape"]) for r in rows))
    width = max(6.4, 2.7 * len(sizes))
    figure = Figure((width, 2.6 * len(ways) + 1.2), layout="constrained")
    panels = figure.subplots(len(ways), len(sizes), sharex=True, sharey=True, squeeze=False)
    for i, way in enumerate(ways):
        for axes, size in zip(panels[i], sizes):
            for device, colour in zip(devices, cycle((INK, VISIBLE, *PEER_COLOURS[3:]))):
                some = [r for r in rows if (r["direction"], r["device"]) == (way, device)]
                some = sorted((r["shape"]["N"], r["us"], r["floor"]) for r in some
                              if _sizes(r["shape"]) == size)  # fmt: skip
                N, us, floor = zip(*some)
                axes.plot(N, us, "o-", color=colour, ms=4.5, lw=1.8, label=f"{device}, predicted")
                axes.plot(N, floor, ":", color=colour, lw=1.2, label=f"{device}, floor")
            axes.set_title("{}, {} heads × {}".format(way, *size), fontsize=9)
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.set_xticks(N)
            axes.set_yticks([30, 100, 300, 1000])
            axes.grid(True)
        panels[i][0].set_ylabel("microseconds")
    for axes in panels[-1]:
        axes.set_xlabel("images N")
    _name_lines(figure, panels[0][0], "predicted, not measured: image-causal attention", width)
    return figure
