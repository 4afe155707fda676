"""What things cost, counted and measured: parameters, bytes a device, the roofline, occupancy."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from miniflamingo.plots.style import (
    GREY,
    INK,
    MARGIN,
    PAPER,
    VISIBLE,
    WRONG,
    canvas,
    legend,
    name_ends,
    styled,
)

# a part's colour and the colour of the words in it
PARTS = {
    "lm": ("#d9d9d9", INK),
    "relative positions": ("#f2f2f2", INK),
    "gated_xattn": (VISIBLE, "white"),
    "resampler": ("#56b4e9", INK),
    "vision_encoder": ("#e69f00", INK),
}
OTHER = ("white", INK)  # any other part
ROOF_COLOURS = (VISIBLE, WRONG, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@styled
def plot_sizes(models):
    """Parameters by part as bars, one panel a model, in it one bar a count.

    models {model: {count's name: {part: parameters}}}; each panel has its own scale, in billions,
    and a part's name stands in it where there is room. ValueError for a model without a parameter.
    """
    bars = sum(len(counts) for counts in models.values())
    figure = Figure((8, 0.42 * bars + 0.55 * len(models) + 0.6), layout="constrained")
    ratios = [len(counts) for counts in models.values()]
    panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (name, counts) in zip(panels, models.items()):
        most = max(sum(parts.values()) for parts in counts.values())
        if most <= 0:
            raise ValueError(f"expected parameters of {name}, got {counts}")
        for row, parts in enumerate(counts.values()):
            _draw_parts(axes, row, parts, most)
        axes.set(title=name, xlim=(0, 1.12 * most / 1e9), ylim=(len(counts) - 0.5, -0.5))
        axes.set_yticks(range(len(counts)), list(counts))
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("billions of parameters")
    _name_parts(figure, models)
    return figure


def _name_parts(figure, models):
    """A legend of the parts that there are, below all panels."""
    names = dict.fromkeys(part for counts in models.values() for c in counts.values() for part in c)
    boxes = [Rectangle((0, 0), 1, 1, fc=PARTS.get(n, OTHER)[0], ec=GREY, lw=0.4) for n in names]
    words = [name.replace("_", " ") for name in names]
    figure.legend(boxes, words, loc="outside lower center", ncols=5, fontsize=8)


def _draw_parts(axes, row, parts, most):
    """One bar: the parts side by side, and their sum at its end."""
    left, sum_of_parts = 0.0, sum(parts.values()) / 1e9
    for part, count in parts.items():
        colour, ink = PARTS.get(part, OTHER)
        axes.barh(row, count / 1e9, left=left, height=0.7, color=colour, ec="white", lw=0.8)
        if count > 0.09 * most:
            name = part.replace("_", " ") if count > 0.2 * most else ""
            words = f"{name} {count / 1e9:.2g}".strip()
            where = left + count / 2e9, row
            axes.text(*where, words, ha="center", va="center", color=ink, fontsize=8)
        left += count / 1e9
    axes.text(left + 0.01 * most / 1e9, row, f"{sum_of_parts:.3g}", va="center", fontweight="bold")


@styled
def plot_inserted(depth, conventions):
    """A stack of `depth` LM layers for each convention, with a mark where a block is inserted.

    conventions {name: [places]}; place i, 0 to depth, is before layer i (depth: behind the last).
    ValueError for another place.
    """
    left, cell, row = 150, 34, 48
    figure, axes = canvas(left + depth * cell + 40, MARGIN + row * len(conventions) + 34)
    for j, (name, places) in enumerate(conventions.items()):
        y = MARGIN + row * j + 14
        axes.text(MARGIN, y + 9, name, va="center", weight="bold")
        for i in range(depth):
            axes.add_patch(Rectangle((left + i * cell + 4, y), cell - 8, 18, fc=PAPER))
            axes.text(left + (i + 0.5) * cell, y + 9, str(i), ha="center", va="center", color=INK)
        for place in places:
            if not 0 <= place <= depth:
                raise ValueError(f"{name}: expected places in 0..{depth}, got {place}")
            x = left + place * cell
            axes.add_patch(Rectangle((x - 3, y - 7), 6, 32, fc=VISIBLE))
    names = {"layer of the language model": PAPER, "inserted block": VISIBLE}
    legend(axes, names, left, MARGIN + row * len(conventions) + 16)
    return figure


@styled
def plot_memory(devices, curves, limits):
    """Bytes of one device against the number of devices, both axes logarithmic.

    devices int[n]; curves {name: bytes [n]}; limits {name: bytes}, drawn as dashed lines.
    ValueError when a curve does not fit the devices.
    """
    figure = Figure((7.2, 4), layout="constrained")
    axes, ends = figure.add_subplot(), {}
    colours, markers = (VISIBLE, "#009e73", WRONG, "#cc79a7"), "os^D"
    for i, (name, y) in enumerate(curves.items()):
        if len(y) != len(devices):
            raise ValueError(f"{name}: expected {len(devices)} numbers, got {len(y)}")
        colour = colours[i % len(colours)]
        gigabytes = [value / 1e9 for value in y]
        axes.plot(devices, gigabytes, color=colour, marker=markers[i % 4], lw=1.8, ms=5)
        ends[name] = gigabytes[-1], colour
    for name, limit in limits.items():
        axes.axhline(limit / 1e9, color=GREY, ls="--", lw=1)
        axes.annotate(name, (devices[-1], limit / 1e9), (0, 3), textcoords="offset points",
                      ha="right", color=GREY, fontsize=8)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="devices", ylabel="GB a device", xticks=devices)
    axes.grid(True)
    name_ends(axes, devices[-1], ends, 8, 9)
    return figure


@styled
def plot_roof(bandwidth, peak, points, title=""):
    """A roofline: rate against intensity, both axes logarithmic.

    bandwidth in bytes a second, peak in flops a second; points {name: (flops, bytes, seconds)},
    with seconds None for work that is only counted: a hollow mark on the roof, its most.
    ValueError for a point without flops or bytes.
    """
    if not all(flops > 0 and moved > 0 for flops, moved, _ in points.values()):
        raise ValueError(f"expected flops and bytes above 0 for each point, got {points}")
    figure = Figure((7.6, 4.2), layout="constrained")
    axes, ridge = figure.add_subplot(), peak / bandwidth
    intensities = [flops / moved for flops, moved, _ in points.values()]
    x = [min(*intensities, ridge) / 3, ridge, max(*intensities, ridge) * 3]
    axes.loglog(x, [min(bandwidth * i, peak) for i in x], color=INK, lw=1.5)
    axes.axvline(ridge, color=GREY, ls=":", lw=1)
    for i, (name, (flops, moved, seconds)) in enumerate(points.items()):
        rate = flops / seconds if seconds else min(bandwidth * flops / moved, peak)
        colour = ROOF_COLOURS[i % 6]
        axes.plot(flops / moved, rate, "os^Dv<>P"[i % 8], mfc=colour if seconds else "white",
                  mec=colour, mew=1.6, ms=8, ls="", label=name)  # fmt: skip
    lowest = min(value for line in axes.lines[:1] + axes.lines[2:] for value in line.get_ydata())
    _finish_roof(axes, ridge, lowest)
    axes.set(title=title, xlabel="flops a byte", ylabel="flops a second")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _finish_roof(axes, ridge, lowest):
    """Room below the lowest mark, the ridge's name in it, ticks at powers of ten alone."""
    axes.set_ylim(bottom=lowest / 4)
    note = dict(textcoords="offset points", fontsize=8, color=GREY)
    axes.annotate(f"ridge: {ridge:.3g} flops a byte", (ridge, lowest / 4), (4, 4), **note)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")
    axes.grid(True)


@styled
def plot_occupancy(registers, warps, points, most=64):
    """Warps that a multiprocessor holds, against registers a thread: a staircase, and kernels.

    registers, warps int[n], the staircase; points {name: (registers, warps)}. ValueError where the
    staircase's halves do not fit, or a point holds more than `most` warps.
    """
    if len(registers) != len(warps):
        raise ValueError(f"expected {len(registers)} numbers of warps, got {len(warps)}")
    figure = Figure((7.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.step(registers, warps, where="post", color=GREY, lw=1.5, label="registers alone allow")
    for i, (name, (x, y)) in enumerate(points.items()):
        if y > most:
            raise ValueError(f"{name}: expected at most {most} warps, got {y}")
        axes.plot(x, y, "os^Dv<>P"[i % 8], color=ROOF_COLOURS[i % 6], ms=7, ls="",
                  label=f"{name}: {x}, {y}")  # fmt: skip
    axes.set(xlabel="registers a thread", ylabel="warps at a time", ylim=(0, most + 4))
    axes.grid(True)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure
