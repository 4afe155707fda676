"""The figures of attention: what they show, what they refuse, and that they leave no trace."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, Rectangle

from miniflamingo import plots
from miniflamingo.plots.attention import CELL

READ, ASK = ["<BOS>", "red", "$x", "dax"], ["red", "dax"]
WEIGHTS = np.array([[0.9, 0.1, 0, 0], [0.004, 0.496, 0.5, 0]])
MASK = np.array([[True, True, False, False], [True, True, True, False]])


def every_figure():
    yield plots.plot_attention(ASK, READ, WEIGHTS)
    yield plots.plot_attention(ASK, READ, WEIGHTS, MASK)
    yield plots.plot_weights(
        {"one": (ASK, READ, WEIGHTS, MASK), "two": (ASK, ASK, np.eye(2), None)}
    )
    yield plots.plot_areas({"self": [("all", 90, 90)], "few": [("cross", 9, 90), ("self", 9, 9)]})
    yield plots.plot_turns(50, 8, 2, 3)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def cells(figure):
    """{(row, column): its patch}, of the first matrix in a figure."""
    squares = [p for p in figure.axes[0].patches if p.get_height() == p.get_width() == CELL]
    left, top = min(p.get_x() for p in squares), min(p.get_y() for p in squares)
    places = [((p.get_y() - top) / CELL, (p.get_x() - left) / CELL) for p in squares]
    return {(round(i), round(j)): p for (i, j), p in zip(places, squares)}


def test_a_matrix_shows_weights_in_per_cent_and_what_is_masked():
    figure = plots.plot_attention(ASK, READ, WEIGHTS, MASK)
    said = texts(figure)
    assert [said.count(n) for n in ("90", "10", "50", "0")] == [1, 1, 2, 0]
    grey = {place for place, p in cells(figure).items() if to_hex(p.get_facecolor()) == plots.PAPER}
    assert grey == {(0, 2), (0, 3), (1, 3)}
    assert "masked" in said and "masked" not in texts(plots.plot_attention(ASK, READ, WEIGHTS))
    darkness = {place: -sum(p.get_facecolor()[:3]) for place, p in cells(figure).items()}
    assert darkness[0, 0] > darkness[1, 1] > darkness[0, 1] > darkness[1, 0]


def test_lines_join_each_query_to_what_it_reads():
    figure = plots.plot_attention(ASK, READ, WEIGHTS)
    lines = {(line.get_ydata()[0], line.get_ydata()[1]): line for line in figure.axes[0].lines}
    widths = [line.get_linewidth() for _, line in sorted(lines.items())]
    assert len(widths) == 4  # 0.004 is too little to be drawn
    assert widths[0] > widths[1] and widths[2] == pytest.approx(widths[3], abs=0.02)
    assert [texts(figure).count(word) for word in ("<BOS>", "$x", "red", "dax")] == [2, 2, 4, 4]


def test_several_matrices_have_titles_and_all_words():
    said = texts(
        plots.plot_weights({"one": (ASK, READ, WEIGHTS, MASK), "b": (ASK, ASK, np.eye(2), None)})
    )
    assert {"one", "b", "masked", "a row sums to 100 %"} <= set(said)
    assert said.count("100") == 2 and said.count("<BOS>") == 1 and said.count("red") == 4


def test_areas_are_to_scale():
    figure = plots.plot_areas({"self": [("all", 400, 400)], "few": [("cross", 20, 400)]})
    first, second = (p for p in figure.axes[0].patches if isinstance(p, Rectangle))
    areas = [p.get_width() * p.get_height() for p in (first, second)]
    assert areas[0] / areas[1] == pytest.approx(20)
    assert {"160,000 scores", "8,000 scores", "cross: 20 × 400"} <= set(texts(figure))


def test_the_perceiver_has_a_box_for_every_attention_and_an_arrow_for_every_reading():
    figure = plots.plot_turns(50_176, 512, 2, 3)
    said = texts(figure)
    assert (said.count("cross"), said.count("self"), said.count("50,176 × 512")) == (2, 6, 2)
    arrows = [p for p in figure.axes[0].patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == 3  # two readings, and the line of the latents
    assert {"512 latents", "50,176 inputs, never changed", "turn 2"} <= set(said)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.plot_attention(READ, ASK, WEIGHTS), r"= \[4, 2\], .* got \[2, 4\]"),
        (lambda: plots.plot_attention(ASK, READ, WEIGHTS, MASK[:1]), r"got \[2, 4\] and \[1, 4\]"),
        (lambda: plots.plot_attention([], [], np.ones((0, 0))), "not empty"),
        (lambda: plots.plot_weights({}), "needs an attention, got none"),
        (lambda: plots.plot_weights({"a": (ASK, ASK, WEIGHTS, None)}), r"= \[2, 2\]"),
        (lambda: plots.plot_areas({}), "needs queries and keys"),
        (lambda: plots.plot_areas({"a": [("b", 0, 3)]}), "needs queries and keys"),
        (lambda: plots.plot_turns(0, 3, 1, 1), "an input, a latent and a turn, got 0, 3"),
        (lambda: plots.plot_turns(9, 3, 0, 1), "got 9, 3 and 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
