"""Figures of evaluations show what they are given, and refuse what does not fit."""

import numpy as np
import pytest

from miniflamingo import plots

IMAGES = np.random.default_rng(0).random((3, 8, 8, 3))
LABELS = ["this dax", "this wug", "this ?"]
CURVE = {"0": (0.1, 0.05, 0.2), "4": (0.5, 0.4, 0.6), "32": (0.9, 0.9, 1.0)}
PANELS = {
    "caption": {"baseline": [0.9, 1.0], "other": [0.25]},
    "text": {"baseline": [0.5], "other": [0.0, 0.1]},
}


def every_figure():
    yield plots.plot_episode(IMAGES, LABELS, ["dax", "wug"], [-3.25, -0.5], truth=1)
    yield plots.plot_episode(IMAGES, LABELS)  # the pictures alone
    yield plots.plot_shots({"live": CURVE, "shipped": CURVE}, {"live": {k: 0.5 for k in CURVE}})
    yield plots.plot_dots(PANELS, reference="baseline", xlabel="accuracy")


def test_an_episode_shows_labels_and_scores_and_which_is_right():
    *pictures, bars = next(every_figure()).axes
    assert [axes.get_xlabel() for axes in pictures] == LABELS
    assert [axes.get_title(loc="center") for axes in pictures] == ["shot 1", "shot 2", "query"]
    assert [bar.get_width() for bar in bars.patches] == [-3.25, -0.5]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == ["dax  -3.2", "wug (right)  -0.5"]


def test_curves_have_their_points_bars_and_ceiling():
    axes = plots.plot_shots({"live": CURVE}, {"live": {k: 0.5 for k in CURVE}}).axes[0]
    line, _, (bars,) = axes.containers[0].lines
    assert np.allclose(line.get_ydata(), [0.1, 0.5, 0.9])
    ends = [segment[:, 1] for segment in bars.get_segments()]
    assert np.allclose(ends, [CURVE[k][1:] for k in CURVE])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "4", "32"]
    assert any(np.allclose(li.get_ydata(), 0.5) for li in axes.lines if len(li.get_ydata()) == 3)


def test_every_value_is_a_dot_and_every_mean_a_number():
    figure = plots.plot_dots(PANELS, reference="baseline", limits=(0, 1))
    assert all(axes.get_xlim() == (0, 1) for axes in figure.axes)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PANELS)
    for axes, rows in zip(figure.axes, PANELS.values()):
        dots = [li.get_xdata() for li in axes.lines if li.get_marker() == "o"]
        assert [list(x) for x in dots] == list(rows.values())
        assert [t.get_text() for t in axes.texts] == [f"{np.mean(v):.2f}" for v in rows.values()]
        dashed = [li.get_xdata()[0] for li in axes.lines if li.get_linestyle() == "--"]
        assert dashed == [np.mean(rows["baseline"])]


def test_chance_and_copiers_are_marked_in_their_own_panel():
    marks = {"caption": {"chance": 0.25, "copier": 0.4}}
    caption, text = plots.plot_dots(PANELS, marks=marks).axes
    dotted = {li.get_xdata()[0] for li in caption.lines if li.get_linestyle() == ":"}
    assert dotted == {0.25, 0.4}
    assert {"chance", "copier"} <= {t.get_text() for t in caption.texts}
    assert not [li for li in text.lines if li.get_linestyle() == ":"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.plot_episode(IMAGES, LABELS[:2], ["a"], [0], 0), "3 images, 2 labels"),
        (lambda: plots.plot_episode(IMAGES, LABELS, ["a"], [0, 1], 0), "1 candidates, 2 scores"),
        (lambda: plots.plot_shots({"a": {"1": (0.5, 0.6, 0.7)}}), "'a': an interval must hold"),
        (lambda: plots.plot_dots({"a": {"x": [1]}, "b": {"y": [1]}}), "'b' must have values for"),
        (lambda: plots.plot_dots({"a": {"x": []}}), "'a' must have values for each"),
    ],
)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
