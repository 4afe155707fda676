"""How the programs of a kernel share out their work; products to scale; sums in many orders."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from miniflamingo.plots.style import (
    BOX,
    GAP,
    GREY,
    INK,
    LETTER,
    MARGIN,
    MASKED,
    PAPER,
    VISIBLE,
    WRONG,
    canvas,
    draw_box,
    image_colour,
    legend,
    styled,
)


@styled
def plot_programs(n, block):
    """The places that programs of `block` take of a vector of n elements, one row a program.

    Places behind the vector's end are grey and crossed: a mask has to leave them out. ValueError
    unless n and block are at least 1.
    """
    if n < 1 or block < 1:
        raise ValueError(f"n and block must be at least 1, got {n} and {block}")
    width, left, top, programs = 30, 84, 12, -(-n // block)
    wide = max(left + block * (width + GAP) + MARGIN, 250)
    figure, axes = canvas(wide, top + programs * (BOX + 8) + 26)
    for i in range(programs * block):
        pid, place = divmod(i, block)
        x, y = left + place * (width + GAP), top + pid * (BOX + 8)
        if not place:
            axes.text(MARGIN, y + BOX / 2, f"program {pid}", va="center")
        inside = i < n
        text, colour = (str(i), image_colour(pid + 1)) if inside else (f"×{i}", PAPER)
        draw_box(axes, x, y, width, text, colour)
    y = top + programs * (BOX + 8) + 8
    legend(axes, {"element": image_colour(1), "× masked": PAPER}, MARGIN, y)
    return figure


@styled
def plot_tiles(shape, tile):
    """The tiles [tile rows, tile columns] that programs take of a matrix of this shape.

    Every tile has its program's number; what a tile covers outside the matrix is grey and crossed.
    ValueError unless all four sizes are at least 1.
    """
    if min(*shape, *tile) < 1:
        raise ValueError(f"shape and tile must be at least 1, got {shape} and {tile}")
    cell, left, top = 16, 40, 30
    rows, columns = (-(-size // side) for size, side in zip(shape, tile))
    wide, high = columns * tile[1] * cell, rows * tile[0] * cell
    figure, axes = canvas(max(left + wide + MARGIN, 250), top + high + 30)
    for i, j in np.ndindex(rows * tile[0], columns * tile[1]):
        x, y, pid = left + j * cell, top + i * cell, i // tile[0] * columns + j // tile[1]
        inside = i < shape[0] and j < shape[1]
        colour = image_colour(pid + 1) if inside else PAPER
        axes.add_patch(Rectangle((x, y), cell, cell, fc=colour, ec="white", lw=0.7))
        if not inside:
            axes.text(x + cell / 2, y + cell / 2, "×", ha="center", va="center", color=GREY)
    for pid in range(rows * columns):
        _number_tile(axes, pid, shape, tile, columns, left, top, cell)
    axes.text(left, top - 12, f"{shape[1]} columns", va="center", color=GREY)
    axes.text(left - 12, top, f"{shape[0]} rows", rotation=90, ha="center", va="top", color=GREY)
    legend(axes, {"element": image_colour(1), "× masked": PAPER}, MARGIN, top + high + 17)
    return figure


def _number_tile(axes, pid, shape, tile, columns, left, top, cell):
    """A frame around tile `pid`, and its number in the middle of what lies in the matrix."""
    i, j = pid // columns * tile[0], pid % columns * tile[1]
    x, y = left + j * cell, top + i * cell
    frame = Rectangle((x, y), tile[1] * cell, tile[0] * cell, fill=False, ec=INK, lw=1.2)
    axes.add_patch(frame)
    high, wide = (min(t, n - at) * cell for t, n, at in zip(tile, shape, (i, j)))
    note = dict(ha="center", va="center", weight="bold", fontsize=12, color=INK)
    axes.text(x + wide / 2, y + high / 2, str(pid), **note)


@styled
def plot_items(words, order, items, heads):
    """The kernel's work list for a batch of one: the tokens of every item, and its programs.

    words: L strings; order int[L] and items int[I, 5] as `kernels.work_list` has them: batch row,
    image (0: none), begin and end in order, slot. ValueError where items do not fit the words.
    """
    items, L = np.asarray(items), len(words)
    if items.ndim != 2 or items.shape[1] != 5 or not len(items):
        raise ValueError(f"items must be int [I, 5], got {list(items.shape)}")
    count = items[:, 3] - items[:, 2]
    if (count > 0).any() and items[count > 0, 3].max() > L:
        raise ValueError(f"the tokens of items must lie in 0..{L}, got {items.tolist()}")
    most = max(1, count.max())
    width = LETTER * max(map(len, words)) + 10
    left, top, row = 210, 26, BOX + 8
    figure, axes = canvas(left + most * (width + GAP) + MARGIN, top + len(items) * row + 4)
    axes.text(MARGIN, 14, "programs", va="center", color=GREY)
    axes.text(80, 14, "item", va="center", color=GREY)
    axes.text(left, 14, "its tokens, order[begin:end]", va="center", color=GREY)
    for i, (_, image, begin, end, _) in enumerate(items):
        y = top + i * row
        pids = f"{i * heads}" + (f" to {(i + 1) * heads - 1}" if heads > 1 else "")
        axes.add_patch(Rectangle((68, y), 6, BOX, fc=image_colour(image)))
        axes.text(MARGIN, y + BOX / 2, pids, va="center")
        axes.text(80, y + BOX / 2, _name_item(i, image, end - begin), va="center")
        for m, token in enumerate(np.asarray(order)[begin:end]):
            draw_box(axes, left + m * (width + GAP), y, width, words[token], image_colour(image))
    return figure


def _name_item(i, image, tokens):
    if image:
        return f"{i}: image {image}" + ("" if tokens else ", no token")
    return f"{i}: no image" + (", store 0" if tokens else ", nothing")


@styled
def plot_touched(tables, cell=8):
    """Which program touches which cell of memory: one strip a tensor, one row a program.

    tables {name: int[programs, cells]}: how often. Below each column stands the number of programs
    that touch it. ValueError unless all are int [programs, cells], with the same programs.
    """
    tables = {name: np.asarray(table) for name, table in tables.items()}
    shapes = [table.shape for table in tables.values()]
    if not shapes or any(len(s) != 2 or not all(s) or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(f"tables must be int [programs, cells], the same programs, got {shapes}")
    left, top, programs = 84, 26, shapes[0][0]
    wide = left + sum(s[1] * cell + 3 * GAP for s in shapes) + MARGIN
    figure, axes = canvas(max(wide, 250), top + programs * cell + 34)
    axes.text(MARGIN, top + 5, "program 0", va="center", fontsize=7)
    axes.text(MARGIN, top + (programs - 0.5) * cell, f"program {programs - 1}", va="center",
              fontsize=7)  # fmt: skip
    axes.text(MARGIN, top + programs * cell + 9, "programs", va="center", color=GREY, fontsize=7)
    for j, (name, table) in enumerate(tables.items(), 1):
        axes.text(left, 14, name, va="center", weight="bold")
        wide = table.shape[1] * cell
        axes.add_patch(Rectangle((left, top), wide, programs * cell, fc=PAPER))
        for i, c in zip(*np.nonzero(table)):
            place = (left + c * cell, top + i * cell)
            axes.add_patch(Rectangle(place, cell, cell, fc=image_colour(j), ec="white", lw=0.5))
        for c, count in enumerate((table > 0).sum(axis=0)):
            middle = left + (c + 0.5) * cell, top + programs * cell + 9
            axes.text(*middle, str(count), ha="center", va="center", fontsize=6)
        left += wide + 3 * GAP
    return figure


@styled
def plot_products(products, sizes, unit=1.6):
    """Matrix products as rectangles to scale, one line each: result = left · right.

    products: [(result, left, right)], each a (name, letter of the rows, letter of the columns);
    sizes {letter: number}, drawn at `unit` points each. ValueError when a product does not fit.
    """
    gap, left, y = 34, 20, 22
    high = [unit * max(sizes[m[1]] for m in line) + 40 for line in products]
    wide = max(sum(unit * sizes[m[2]] for m in line) for line in products)
    figure, axes = canvas(left + wide + 2 * gap + 60, y + sum(high))
    for (result, a, b), height in zip(products, high):
        if (a[2], result[1:]) != (b[1], (a[1], b[2])):
            raise ValueError(f"{result} is not the product of {a} and {b}")
        x, middle = left + 14, y + (height - 40) / 2
        for matrix, sign, colour in ((result, "=", VISIBLE), (a, "·", MASKED), (b, "", MASKED)):
            x = _draw_matrix(axes, x, middle, matrix, sizes, unit, colour) + gap
            axes.text(x - gap / 2 - 4, middle, sign, ha="center", va="center", fontsize=13)
        y += height
    return figure


def _draw_matrix(axes, x, middle, matrix, sizes, unit, colour):
    """One rectangle, its name in it and its letters at its sides; returns its right edge."""
    name, rows, columns = matrix
    wide, high = unit * sizes[columns], unit * sizes[rows]
    axes.add_patch(Rectangle((x, middle - high / 2), wide, high, fc=colour, ec=INK, lw=0.8))
    ink = "white" if colour == VISIBLE else INK
    note = dict(ha="center", va="center")
    axes.text(x + wide / 2, middle, name, color=ink, weight="bold", fontsize=10, **note)
    axes.text(x + wide / 2, middle - high / 2 - 7, columns, color=GREY, fontsize=8, **note)
    axes.text(x - 7, middle, rows, color=GREY, fontsize=8, **note)
    return x + wide


@styled
def plot_orders(sums, exact):
    """How often sums of the same float32 numbers, in different orders, miss the exact sum by what.

    sums float32[orders]; exact: a float. One bar for each distance, in steps of the last binary
    place of the exact sum. ValueError unless sums are float32, one row and not empty.
    """
    sums = np.asarray(sums)
    if sums.dtype != np.float32 or sums.ndim != 1 or not len(sums):
        raise ValueError(f"sums must be float32 [orders], got {sums.dtype} {list(sums.shape)}")
    step = np.spacing(abs(np.float32(exact)))
    steps = np.round((sums.astype(float) - np.float32(exact)) / step).astype(int)
    places, counts = np.unique(steps, return_counts=True)
    figure = Figure((6.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(places, counts, color=VISIBLE, width=0.8)
    for place, count in zip(places, counts):
        axes.text(place, count + 1, str(count), ha="center", va="bottom", fontsize=7,
                  bbox=dict(fc="white", ec="none", pad=0.5))  # fmt: skip
    axes.axvline(0, color=WRONG, ls="--", lw=1.2, zorder=0)
    label = "steps of the last place from the nearest float32 to the exact sum (dashed)"
    axes.set(xlabel=label, ylabel="orders", ylim=(0, counts.max() * 1.15))
    return figure
