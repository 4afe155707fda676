"""The map, distributions, beams and sight show what they are given, or refuse what does not fit."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from miniflamingo import plots

COUNTS = {"vision_encoder": 1234, "resampler": 5, "gated_xattn": 67, "lm": 89}
WORDS = ["red", "blue", "$x"]
STEPS = [[(0, "red", -0.1, True), (0, "blue", -2.0, True), (0, "x", -3.0, False)],
         [(1, "bar", -2.5, False), (0, "ring", -0.25, True)]]  # fmt: skip
SIGHT = np.stack([np.tril(np.ones((3, 3))), np.tril(np.full((3, 3), 0.5))])


def every_figure():
    yield plots.plot_map(COUNTS, 4)
    yield plots.plot_distributions(WORDS, {"a": [0.5, 0.5, 0.0], "b": [1.0, 0.0, 0.0]})
    yield plots.plot_beam("a large", STEPS)
    yield plots.plot_sight(WORDS, SIGHT, ["one", "two"])


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_map_has_every_part_with_its_size():
    said = texts(plots.plot_map(COUNTS, 4).axes[0])
    assert {"1,234 numbers", "5 numbers", "67 numbers", "89 numbers", "4 times"} <= set(said)
    assert {"vision encoder", "Perceiver Resampler", "GATED XATTN-DENSE", "LM block"} <= set(said)


def test_a_distribution_is_drawn_and_a_word_of_probability_0_is_cut():
    first, second = plots.plot_distributions(
        WORDS, {"a": [0.5, 0.25, 0.25], "b": [1.0, 0.0, 0.0]}
    ).axes
    assert [bar.get_width() for bar in first.patches] == [0.5, 0.25, 0.25]
    assert texts(first) == ["0.50", "0.25", "0.25"] and texts(second) == ["1.00", "cut", "cut"]
    assert [label.get_text() for label in first.get_yticklabels()] == WORDS


def test_a_beam_has_a_box_a_word_and_a_line_to_its_parent():
    axes = plots.plot_beam("a large", STEPS).axes[0]
    boxes = [p for p in axes.patches if type(p).__name__ == "FancyBboxPatch"]
    kept = [to_hex(box.get_facecolor()) != plots.PAPER for box in boxes]
    assert kept == [True, True, True, False, False, True]
    middles = [(box.get_x() + box.get_width() / 2, box.get_y() + 11) for box in boxes]
    starts = [tuple(line.get_xydata()[0]) for line in axes.lines]
    parents = [0, 0, 0, 2, 1]
    assert np.allclose(starts, [middles[i] for i in parents])
    assert {"-0.10", "-2.50", "-0.25"} <= set(texts(axes))


def test_sight_is_drawn_as_it_is_and_marked_where_it_is_1():
    figure = plots.plot_sight(WORDS, SIGHT, ["one", "two"])
    for axes, values in zip(figure.axes, SIGHT):
        assert np.array_equal(np.reshape(axes.collections[0].get_array(), (3, 3)), values)
        assert len(axes.lines[0].get_xdata()) == np.count_nonzero(values == 1)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.plot_map({"lm": 1}, 3), "missing: vision_encoder, resampler, gated_xattn"),
        (lambda: plots.plot_distributions(WORDS, {"a": [1.0]}), r"'a' must be \[3\], got \[1\]"),
        (lambda: plots.plot_beam("a", [[(1, "b", 0, True)]]), "step 0 has parent 1 of 1 kept"),
        (lambda: plots.plot_sight(WORDS, SIGHT, ["one"]), r"must be \[1, 3, 3\], got \[2, 3, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
