"""phi, the image-causal mask, which image reaches which token, the fused kernel's work list."""

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from miniflamingo.plots.style import (
    BOX,
    GAP,
    GREY,
    INK,
    LETTER,
    MARGIN,
    MASKED,
    MONO,
    PAPER,
    THUMB,
    VISIBLE,
    WRONG,
    canvas,
    check_row,
    draw_box,
    image_colour,
    legend,
    styled,
    wrap,
)
from miniflamingo.xattn import image_causal_mask


@styled
def plot_phi(words, phi, images=None):
    """The tokens of a prompt, coloured by the image that each looks at; phi below each token.

    words: L strings; phi int[L]; images: N arrays [height, width, 3] in [0, 1], drawn as
    thumbnails. Long prompts are wrapped. ValueError when phi does not fit the words or the images.
    """
    N = max(1, np.max(phi, initial=0)) if images is None else len(images)
    phi = check_row(words, phi, N)
    places, rows = wrap([len(word) * LETTER + 10 for word in words], 640)
    top = MARGIN + (THUMB + 2 if images is not None else 0) + 28
    wide = max((N + 1) * (THUMB + 20), *(x + width for x, _, width in places))
    figure, axes = canvas(wide + 2 * MARGIN + 12, top + rows * (BOX + 20) + 2)
    _draw_images(axes, N, images)
    for word, j, (x, row, width) in zip(words, phi, places):
        x, y = x + MARGIN + 12, top + row * (BOX + 20)
        draw_box(axes, x, y, width, word, image_colour(j))
        axes.text(x + width / 2, y + BOX + 8, str(j), ha="center", va="center", color=GREY)
    for row in range(rows):
        axes.text(MARGIN, top + row * (BOX + 20) + BOX + 8, "φ", va="center", color=GREY)
    return figure


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


def plot_image_causal_mask(words, phi, N, R):
    """The paper's figure 7: tokens x visual tokens, dark blue = visible, light blue = masked.

    words: L strings; phi int[L] in 0..N; each of the N images has R columns. ValueError when phi
    does not fit the words or N.
    """
    phi = check_row(words, phi, N)
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
    figure, axes = canvas(left + width + 60, top + L * cell + 42)
    _draw_cells(axes, mask, left, top, width, cell)
    _name_rows(axes, words, phi, left, top, width, cell)
    _name_columns(axes, N, left, top, width)
    legend(axes, {"visible": VISIBLE, "masked": MASKED}, left, top + L * cell + 20)
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


@styled
def plot_reach(words, phi, panels):
    """Tables, tokens x images, of how much a token's output changes when an image changes.

    panels: {title of one or two lines: float[L, N]}. A change where phi allows one is dark blue;
    one where it does not is a leak, in orange and with a cross. ValueError when a table does not
    fit the words.
    """
    N = next(iter(panels.values())).shape[1]
    phi = check_row(words, phi, N)
    left, top, cell, step = 24 + LETTER * max(map(len, words)), 66, 15, 46
    panel = N * step + 22
    height = top + len(words) * cell + 42
    figure, axes = canvas(left + len(panels) * panel + 30, height)
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
    legend(axes, names, left, height - 20)
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


@styled
def plot_work_list(words, owner, tokens):
    """The items of xattn.work_list for a batch of one: each image's tokens, side by side.

    words: L strings; owner int[I], the item's image counted from 0; tokens int[I, M], L = free.
    """
    width = LETTER * max(map(len, words)) + 10
    left, top, row = 130, 34, BOX + 8
    I, M = tokens.shape
    figure, axes = canvas(left + M * (width + GAP) + MARGIN, top + I * row + 6)
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
                draw_box(axes, x, y, width, words[token], colour)
            else:
                draw_box(axes, x, y, width, "", PAPER, alpha=0.4)
    return figure
