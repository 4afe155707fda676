"""The figures of the kernels' modules show what they are given, and refuse what does not fit."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from miniflamingo import plots

WORDS = ["<BOS>", "Cats", "<image>", "one", "<image>", "two", "three"]
ORDER = np.array([0, 1, 2, 3, 4, 5, 6])
ITEMS = [[0, 0, 0, 2, -1], [0, 1, 2, 4, -1], [0, 2, 4, 6, 0], [0, 2, 6, 7, 1], [0, 3, 7, 7, -1],
         [0, 0, 9, 9, -1]]  # fmt: skip
SIZES = {"M": 10, "R": 20, "K": 30}
SUMS = np.float32(1) + np.spacing(np.float32(1)) * np.array([0, 0, 2, 1, 2, 2], np.float32)
TOUCHED = {"x, read": [[1, 2, 0], [0, 1, 1]], "out, stored": [[1, 0], [0, 1]]}
PRODUCTS = [(("S", "M", "R"), ("Q", "M", "K"), ("Kt", "K", "R"))]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def every_figure():
    yield plots.plot_programs(10, 4)
    yield plots.plot_tiles((6, 10), (4, 4))
    yield plots.plot_items(WORDS, ORDER, ITEMS, 2)
    yield plots.plot_products(PRODUCTS, SIZES)
    yield plots.plot_touched(TOUCHED)
    yield plots.plot_orders(SUMS, 1.0)


def test_programs_take_each_element_once_and_cross_out_the_rest():
    said = texts(plots.plot_programs(10, 4))
    assert [said.count(str(i)) for i in range(12)] == [1] * 10 + [0] * 2
    assert said.count("×10") == said.count("×11") == 1
    assert [f"program {p}" in said for p in range(4)] == [True, True, True, False]


def test_tiles_are_numbered_and_what_is_outside_is_crossed():
    figure = plots.plot_tiles((6, 10), (4, 4))
    said = texts(figure)
    assert [said.count(str(p)) for p in range(7)] == [1] * 6 + [0]
    assert said.count("×") == 8 * 12 - 6 * 10
    colours = [to_hex(p.get_facecolor()) for p in figure.axes[0].patches if p.get_fill()]
    assert colours.count(plots.image_colour(1)) == 4 * 4 + 1  # and the legend


def test_items_show_their_tokens_and_programs():
    said = texts(plots.plot_items(WORDS, ORDER, ITEMS, 2))
    assert [said.count(word) for word in WORDS] == [WORDS.count(word) for word in WORDS]
    assert {"0 to 1", "10 to 11", "0: no image, store 0", "1: image 1", "4: image 3, no token",
            "5: no image, nothing"} <= set(said)  # fmt: skip
    assert {"0", "5"} <= set(texts(plots.plot_items(WORDS, ORDER, ITEMS, 1)))


def test_matrices_are_drawn_to_scale():
    figure = plots.plot_products(PRODUCTS, SIZES, unit=2)
    boxes = [(p.get_width(), p.get_height()) for p in figure.axes[0].patches]
    assert boxes == [(40, 20), (60, 20), (40, 60)]
    assert {"S", "Q", "Kt", "M", "R", "K", "=", "·"} <= set(texts(figure))


def test_each_cell_that_a_program_touches_is_filled():
    figure = plots.plot_touched(TOUCHED)
    colours = [to_hex(p.get_facecolor()) for p in figure.axes[0].patches]
    assert [colours.count(plots.image_colour(j)) for j in (1, 2)] == [4, 2]
    said = texts(figure)
    assert {"x, read", "out, stored", "program 0", "program 1"} <= set(said)
    assert [said.count(n) for n in "012"] == [0, 4, 1]  # programs of each column


def test_orders_are_counted_by_their_distance_from_the_exact_sum():
    figure = plots.plot_orders(SUMS, 1.0)
    bars = [(p.get_x() + p.get_width() / 2, p.get_height()) for p in figure.axes[0].patches]
    assert bars == [pytest.approx(bar) for bar in ((0, 2), (1, 1), (2, 3))]
    assert texts(figure) == ["2", "1", "3"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.plot_orders([1.0], 1.0), r"float32 \[orders\], got float64 \[1\]"),
        (lambda: plots.plot_touched({}), r"the same programs, got \[\]"),
        (
            lambda: plots.plot_touched({"x": [[1]], "y": [[1], [1]]}),
            r"got \[\(1, 1\), \(2, 1\)\]",
        ),
        (lambda: plots.plot_programs(0, 4), "must be at least 1, got 0 and 4"),
        (lambda: plots.plot_tiles((6, 0), (4, 4)), r"must be at least 1, got \(6, 0\)"),
        (lambda: plots.plot_items(WORDS, ORDER, [[0, 1, 2]], 1), r"int \[I, 5\], got \[1, 3\]"),
        (lambda: plots.plot_items(WORDS[:3], ORDER, ITEMS, 1), r"must lie in 0..3"),
        (
            lambda: plots.plot_products(
                [(("S", "M", "R"), ("Q", "M", "K"), ("K", "R", "K"))], SIZES
            ),
            "is not the product of",
        ),
    ],
)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
