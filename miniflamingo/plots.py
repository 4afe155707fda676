"""Every figure of the course and of the reports, in one style.

A function takes arrays and returns a matplotlib Figure that belongs to the caller: pyplot's global
state is not touched, nothing is shown and nothing stays open. An image has one colour in all
figures (Okabe and Ito's palette, which colour-blind readers can tell apart), and wherever a colour
says something a number or a word says it too, for print in black and white.
"""

import functools
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from miniflamingo.xattn import check_phi, image_causal_mask

STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same letters on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}
INK, GREY, PAPER = "#222222", "#777777", "#e6e6e6"
VISIBLE, MASKED = "#0b3c78", "#cfe1f2"  # the paper's dark and light blue
WRONG = "#d55e00"
IMAGE_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00")
MONO = "DejaVu Sans Mono"


def styled(plot):
    """Draw under STYLE, whatever the caller's matplotlib settings are."""

    @functools.wraps(plot)
    def draw(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return plot(*args, **kwargs)

    return draw


def image_colour(j):
    """The colour of image j, counted from 1; grey for 0, no image."""
    return IMAGE_COLOURS[(j - 1) % len(IMAGE_COLOURS)] if j else PAPER


def _check_row(words, phi, N):
    """phi of one sequence; ValueError unless it fits the words and N, and there are any."""
    if N < 1 or not len(words):
        raise ValueError(f"the figure needs a token and an image, got {len(words)} and {N}")
    return check_phi(np.asarray(phi)[None], 1, len(words), N)[0]


def _canvas(width, height):
    """A Figure whose only axes measure it in points, from the upper left corner."""
    figure = Figure((width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


# --- phi ----------------------------------------------------------------------------------------

BOX, GAP, MARGIN, THUMB = 22, 4, 12, 64  # points
LETTER = 9 * 0.602  # the width of every letter of the monospaced font, at 9 points


@styled
def plot_phi(words, phi, images=None):
    """The tokens of a prompt, coloured by the image that each looks at; phi below each token.

    words: L strings; phi int[L]; images: N arrays [height, width, 3] in [0, 1], drawn as
    thumbnails. Long prompts are wrapped. ValueError when phi does not fit the words or the images.
    """
    N = max(1, np.max(phi, initial=0)) if images is None else len(images)
    phi = _check_row(words, phi, N)
    places, rows = _wrap([len(word) * LETTER + 10 for word in words], 640)
    top = MARGIN + (THUMB + 2 if images is not None else 0) + 28
    wide = max((N + 1) * (THUMB + 20), *(x + width for x, _, width in places))
    figure, axes = _canvas(wide + 2 * MARGIN + 12, top + rows * (BOX + 20) + 2)
    _draw_images(axes, N, images)
    for word, j, (x, row, width) in zip(words, phi, places):
        x, y = x + MARGIN + 12, top + row * (BOX + 20)
        _draw_box(axes, x, y, width, word, image_colour(j))
        axes.text(x + width / 2, y + BOX + 8, str(j), ha="center", va="center", color=GREY)
    for row in range(rows):
        axes.text(MARGIN, top + row * (BOX + 20) + BOX + 8, "φ", va="center", color=GREY)
    return figure


def _wrap(widths, most):
    """Boxes of these widths, left to right in lines: [(x, line, width)], number of lines."""
    places, x, line = [], 0, 0
    for width in widths:
        if x and x + width > most:
            x, line = 0, line + 1
        places.append((x, line, width))
        x += width + GAP
    return places, line + 1


def _draw_box(axes, x, y, width, text, colour, **style):
    """A rounded box of height BOX with monospaced text in it."""
    shape = "round,pad=0,rounding_size=4"
    box = FancyBboxPatch((x, y), width, BOX, shape, fc=colour, ec="white", lw=0.8, **style)
    axes.add_patch(box)
    axes.text(
        x + width / 2, y + BOX / 2, text, ha="center", va="center", color=INK,
        family=MONO, fontsize=9, parse_math=False,
    )  # fmt: skip


def _draw_images(axes, N, images):
    """The images in a row in their colours, as thumbnails or as names alone, and the grey of 0."""
    for j in range(N + 1):
        x, y = MARGIN + 12 + j * (THUMB + 20), MARGIN
        if images is not None:
            if j:
                axes.imshow(images[j - 1], extent=(x, x + THUMB, y + THUMB, y), aspect="auto")
            y += THUMB + 2
        axes.add_patch(Rectangle((x, y), THUMB, 5, fc=image_colour(j)))
        name = f"image {j}" if j else "0: no image"
        axes.text(x, y + 12, name, va="center", fontsize=8, color=INK)


# --- the image-causal mask ----------------------------------------------------------------------


def plot_image_causal_mask(words, phi, N, R):
    """The paper's figure 7: tokens x visual tokens, dark blue = visible, light blue = masked.

    words: L strings; phi int[L] in 0..N; each of the N images has R columns. ValueError when phi
    does not fit the words or N.
    """
    phi = _check_row(words, phi, N)
    return plot_mask(words, image_causal_mask(phi[None], N, R)[0], N, phi)


@styled
def plot_mask(words, mask, N, phi=None):
    """Any mask bool[L, N*R] as the paper draws it; phi int[L], where given, stands at its right."""
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 2 or len(mask) != len(words) or mask.shape[1] % N:
        raise ValueError(
            f"mask must be bool [L, N*R] = [{len(words)}, {N}*R], got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    (L, columns), cell = mask.shape, 15 if len(words) <= 60 else 9
    left, top = 24 + LETTER * max(map(len, words)), 40
    width = min(max(columns * cell, 200), 480)
    figure, axes = _canvas(left + width + 60, top + L * cell + 42)
    _draw_cells(axes, mask, left, top, width, cell)
    _name_rows(axes, words, phi, left, top, width, cell)
    _name_columns(axes, N, left, top, width)
    _legend(axes, {"visible": VISIBLE, "masked": MASKED}, left, top + L * cell + 20)
    return figure


def _name_rows(axes, words, phi, left, top, width, cell):
    """The tokens at the left of a table that starts at (left, top), and phi at its right."""
    size = 9 if cell > 9 else 6
    style = {"va": "center", "fontsize": size, "color": INK}
    for i, word in enumerate(words):
        y = top + (i + 0.5) * cell
        axes.text(left - 6, y, word, ha="right", family=MONO, parse_math=False, **style)
        if phi is not None:
            axes.text(left + width + 14, y, str(phi[i]), ha="center", **style)
    if phi is not None:
        axes.text(left + width + 14, top - 12, "φ", ha="center", va="center", fontsize=10)


def _name_columns(axes, N, left, top, width):
    """The images above a table, each with a bar in its colour."""
    step = width / N
    for j in range(1, N + 1):
        x = left + (j - 1) * step
        axes.add_patch(Rectangle((x + 1, top - 6), step - 2, 4, fc=image_colour(j)))
        name = f"image {j}" if step > 45 else str(j)
        axes.text(x + step / 2, top - 14, name, ha="center", va="center")


def _draw_cells(axes, mask, left, top, width, cell):
    """A boolean [rows, columns] as dark and light blue cells, with white lines where they fit."""
    rows, columns = mask.shape
    x, y = np.linspace(left, left + width, columns + 1), top + cell * np.arange(rows + 1)
    colours = matplotlib.colors.ListedColormap([MASKED, VISIBLE])
    line = {"edgecolors": "white", "linewidth": 0.7} if width / columns > 4 else {}
    axes.pcolormesh(x, y, mask.astype(float), cmap=colours, vmin=0, vmax=1, **line)


def _legend(axes, colours, x, y):
    """Coloured squares with names, in a line that starts at (x, y)."""
    for name, colour in colours.items():
        axes.add_patch(Rectangle((x, y - 5), 10, 10, fc=colour))
        axes.text(x + 15, y, name, va="center")
        x += 32 + 6 * len(name)


# --- training and evaluation --------------------------------------------------------------------

LAYER_COLOURS = ("#9ecae1", "#4292c6", "#084594")  # shallow to deep, light to dark
LINES = ("-", "--", ":", "-.")


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
    figure, axes = _canvas(bus + 112, 1)
    for name, (words, counted) in rows.items():
        places, lines = _wrap([len(word) * LETTER + 10 for word in words], bus - left - 60)
        middles.append(y + (lines * (BOX + 4) - 4) / 2)
        for word, counts, (x, line, width) in zip(words, counted, places):
            colour = IMAGE_COLOURS[1] if counts else PAPER
            _draw_box(axes, left + x, y + line * (BOX + 4), width, word, colour)
        y += lines * (BOX + 4) + 8
        axes.text(MARGIN, middles[-1], name, va="center", weight="bold")
        axes.text(left, y, f"{np.sum(counted)} of {len(words)} tokens count", va="center",
                  color=GREY, fontsize=8)  # fmt: skip
        end = left + max(x + width for x, _, width in places)
        axes.plot([end + 6, bus], [middles[-1]] * 2, color=GREY, lw=1)
        axes.text(bus - 6, middles[-1] - 8, f"× {weights[name]:g}", ha="right", va="center")
        y += 20
    _draw_bus(axes, bus, middles)
    _legend(axes, {"counts in the loss": IMAGE_COLOURS[1], "is only read": PAPER}, left, y + 4)
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
        _name_ends(axes, steps[-1], {f"layer {i}": (y, INK) for i, y in enumerate(ends)}, 4, 8)
    left, right = figure.axes
    left.set(title="attention", ylabel="|tanh(alpha)|")
    right.set(title="feed-forward")
    return figure


@styled
def plot_few_shot(curves, ceilings):
    """Accuracy against the number of shots, with what can be known from the shots at all.

    curves {name: {shots: accuracy in 0..1}}; ceilings, the same, for some of the names: how often
    the query's class was among the shots.
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
    axes.plot([], [], ":", color=GREY, label="ceiling: the class was shown")
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


# --- which image reaches which token ------------------------------------------------------------


@styled
def plot_reach(words, phi, panels):
    """Tables, tokens x images, of how much a token's output changes when an image changes.

    panels: {title of one or two lines: float[L, N]}. A change where phi allows one is dark blue;
    one where it does not is a leak, in orange and with a cross. ValueError when a table does not
    fit the words.
    """
    N = next(iter(panels.values())).shape[1]
    phi = _check_row(words, phi, N)
    left, top, cell, step = 24 + LETTER * max(map(len, words)), 66, 15, 46
    panel = N * step + 22
    height = top + len(words) * cell + 42
    figure, axes = _canvas(left + len(panels) * panel + 30, height)
    for i, (title, change) in enumerate(panels.items()):
        if np.shape(change) != (len(words), N):
            raise ValueError(f"{title!r} must be [{len(words)}, {N}], got {np.shape(change)}")
        x, last = left + i * panel, i == len(panels) - 1
        axes.text(x, 24, title, va="center", weight="bold", fontsize=8)
        _name_columns(axes, N, x, top, N * step)
        _name_rows(axes, words if not i else [""] * len(words), phi if last else None,
                   x, top, N * step, cell)  # fmt: skip
        _draw_reach(axes, np.asarray(change), phi, x, top, step, cell)
    names = {"its own image": VISIBLE, "no change": MASKED, "leak": WRONG}
    _legend(axes, names, left, height - 20)
    return figure


def _draw_reach(axes, change, phi, left, top, step, cell):
    """The cells of one table of plot_reach, with the number wherever something changed."""
    for (t, j), value in np.ndenumerate(change):
        x, y = left + j * step, top + t * cell
        own = phi[t] == j + 1
        colour = MASKED if not value else VISIBLE if own else WRONG
        axes.add_patch(Rectangle((x, y), step, cell, fc=colour, ec="white", lw=0.7))
        if value:
            text = f"{value:.2f}" if own else f"× {value:.2f}"
            axes.text(x + step / 2, y + cell / 2, text, ha="center", va="center", fontsize=8,
                      color="white" if own else INK)  # fmt: skip


# --- the fused kernel's work ----------------------------------------------------------------------


@styled
def plot_work_list(words, owner, tokens):
    """The items of xattn.work_list for a batch of one: each image's tokens, side by side.

    words: L strings; owner int[I], the item's image counted from 0; tokens int[I, M], L = free.
    """
    width = LETTER * max(map(len, words)) + 10
    left, top, row = 130, 34, BOX + 8
    I, M = tokens.shape
    figure, axes = _canvas(left + M * (width + GAP) + MARGIN, top + I * row + 6)
    places = left + np.arange(M) * (width + GAP)
    axes.text(MARGIN, 20, "place in the item", color=GREY)
    for m, x in enumerate(places):
        axes.text(x + width / 2, 20, str(m), ha="center", color=GREY)
    for i, j in enumerate(owner):
        y, colour = top + i * row, image_colour(j + 1)
        axes.add_patch(Rectangle((MARGIN, y), 6, BOX, fc=colour))
        axes.text(MARGIN + 12, y + BOX / 2, f"item {i}: image {j + 1}", va="center")
        for x, token in zip(places, tokens[i]):
            if token < len(words):
                _draw_box(axes, x, y, width, words[token], colour)
            else:
                _draw_box(axes, x, y, width, "", PAPER, alpha=0.4)
    return figure


# --- lines ----------------------------------------------------------------------------------------


@styled
def plot_lines(x, series, xlabel, ylabel, title="", log=True):
    """Lines with markers, named at their right ends: series is {name: [len(x)]}."""
    figure = Figure((6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    ends = {}
    for (name, y), colour, marker in zip(series.items(), ("#0b3c78", WRONG, "#009e73"), "os^"):
        axes.plot(x, y, color=colour, marker=marker, lw=1.8, ms=5)
        ends[name] = y[-1], colour
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xticks=x)
    axes.grid(True)
    _name_ends(axes, x[-1], ends, 8, 9)
    return figure


def _name_ends(axes, x, ends, gap, size):
    """Name lines at their right ends, one above the other where they would overlap.

    ends {name: (y, colour)}; gap, in points, is how far from the end. Wants the axes' final limits.
    """
    scale = axes.yaxis.get_transform().transform
    low, high = scale(np.array(axes.get_ylim()))
    height, lowest = 0.8 * 72 * axes.figure.get_figheight(), -np.inf
    for name, (y, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        place = height * (scale(np.array([y]))[0] - low) / (high - low)
        lowest = max(place, lowest + size + 2)
        axes.annotate(name, (x, y), (gap, lowest - place), textcoords="offset points",
                      va="center", color=colour, fontsize=size)  # fmt: skip


# --- what the kernels cost ------------------------------------------------------------------------

PEER_COLOURS = ("#777777", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#882255")
MARKERS = "osD^v<>P"


@styled
def plot_cost(document, entry, direction):
    """Microseconds against the number of images N, one line an implementation, one panel a shape.

    document is what `python -m kernels bench --json` writes; the floor is the counted one.
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
    markers = dict(zip(dict.fromkeys(r["entry"] for r in rows), MARKERS))
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
