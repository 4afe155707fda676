"""The figures of the gate show what they are given, and refuse what does not fit."""

import numpy as np
import pytest

from miniflamingo import plots

ALPHA = np.linspace(-1, 1, 5)
WORDS = ["red", "blue", "ring"]
P = np.array([[0.2, 0.5, 0.3], [0.1, 0.9, 0.0]])


def every_figure():
    yield plots.plot_gated_block(0.0, -0.5)
    yield plots.plot_gate(ALPHA, {"gate": {"tanh": np.tanh(ALPHA)}, "slope": {"1": ALPHA * 0 + 1}})
    yield plots.plot_next_words([0, 1], P, WORDS, [0.0, 0.4], most=2)
    yield plots.plot_openings({"attention": {0: np.array([0.4]), 3: np.arange(9) / 9}}, "gates")


def test_a_branch_is_as_thick_as_its_gate_is_open():
    figure = plots.plot_gated_block(0.0, -0.5)
    _, shut, opened = figure.axes[0].lines
    assert shut.get_linestyle() == ":" and opened.get_linestyle() == "-"
    assert shut.get_linewidth() == pytest.approx(0.8)
    assert opened.get_linewidth() == pytest.approx(0.8 + 5 * np.tanh(0.5))
    said = [text.get_text() for text in figure.axes[0].texts]
    assert {"0.00", "-0.46", "tanh(α_xattn)", "tanh(α_dense)", "trained", "frozen"} <= set(said)


def test_every_curve_of_the_gate_is_drawn_and_named():
    figure = plots.plot_gate(ALPHA, {"a": {"x": ALPHA, "y": -ALPHA}, "b": {"z": ALPHA**2}})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    curves = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 5]
    assert [line.get_label() for line in curves] == ["x", "y", "z"]
    assert np.array_equal(curves[2].get_ydata(), ALPHA**2)
    assert len({line.get_linestyle() for line in curves[:2]}) == 2  # not by colour alone


def test_the_likeliest_words_are_drawn_and_named_at_their_ends():
    left, right = plots.plot_next_words([0, 1], P, WORDS, [0.0, 0.4], most=2).axes
    drawn = [line.get_ydata() for line in left.lines]
    assert np.array_equal(drawn, [P[:, 1], P[:, 2]])
    assert {text.get_text() for text in left.texts} == {"blue", "ring"}
    assert right.lines[0].get_ydata().tolist() == [0.0, 0.4]


def test_every_gate_is_a_bar_with_its_height():
    openings = {"attention": {0: np.array([0.4]), 3: np.arange(9) / 9}, "dense": {}}
    (axes,) = plots.plot_openings(openings, "gates").axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.4, 4 / 9])
    assert [text.get_text() for text in axes.texts] == ["0.40", "0.44"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.plot_openings({"dense": {}}, ""), "needs a gate"),
        (lambda: plots.plot_gate(ALPHA, {"a": {"x": ALPHA[1:]}}), r"'x' must be \[5\], got \[4\]"),
        (lambda: plots.plot_next_words([0, 1], P, WORDS[1:], [0, 1]), r"must be \[2, 2\]"),
        (lambda: plots.plot_next_words([0, 1], P, WORDS, [0]), r"kl \[2\], got .* and \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
