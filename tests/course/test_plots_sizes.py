"""The figures of modules 14 and 15 show what they are given and refuse what does not fit."""

import numpy as np
import pytest

from miniflamingo import plots

MODELS = {
    "small": {"counted": {"lm": 3e9, "gated_xattn": 1e9}, "paper": {"lm": 3.5e9}},
    "large": {"counted": {"lm": 60e9, "resampler": 194e6}},
}
POINTS = {"counted": (3e9, 1e9, None), "measured": (32e9, 2e9, 8.0)}  # flops, bytes, seconds
PLACES = {"ours": np.array([0, 2, 4]), "theirs": [2, 4, 6]}


def every_figure():
    yield plots.plot_sizes(MODELS)
    yield plots.plot_inserted(6, PLACES)
    yield plots.plot_roof(2e9, 8e9, POINTS, "a roof")
    yield plots.plot_occupancy([32, 64, 128], [64, 32, 16], {"one": (40, 40)})
    yield plots.plot_memory([1, 2, 4], {"a": [8e9, 4e9, 2e9], "b": [9e9, 9e9, 9e9]}, {"80": 80e9})


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_sizes_are_bars_of_the_parts_with_their_sum():
    figure = plots.plot_sizes(MODELS)
    bars = [[p.get_width() for p in axes.patches] for axes in figure.axes]
    assert bars == [pytest.approx([3, 1, 3.5]), pytest.approx([60, 0.194])]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["small", "large"]
    assert {"4", "3.5", "60.2", "lm 3", "gated xattn 1"} <= set(words(figure))
    assert "resampler" not in " ".join(words(figure))  # no room in its bar: in the legend
    assert [t.get_text() for t in figure.legends[0].texts] == ["lm", "gated xattn", "resampler"]


def test_a_mark_stands_at_every_place():
    figure = plots.plot_inserted(6, PLACES)
    boxes = {p.get_width(): p for p in figure.axes[0].patches}
    width = max(boxes) + 8
    marks = [p for p in figure.axes[0].patches if p.get_height() == 32]
    places = [round((p.get_x() + 3 - 150) / width) for p in marks]
    assert places == [0, 2, 4, 2, 4, 6]
    assert words(figure).count("5") == 2 and "theirs" in words(figure)


def test_counted_work_lies_on_the_roof_and_measured_work_where_it_was_measured():
    axes = plots.plot_roof(2e9, 8e9, POINTS).axes[0]
    roof, _, counted, measured = axes.lines
    assert list(roof.get_xdata()) == pytest.approx([1, 4, 48])  # the ridge at 8e9 / 2e9 = 4
    assert list(roof.get_ydata()) == pytest.approx([2e9, 8e9, 8e9])
    assert (counted.get_xdata()[0], counted.get_ydata()[0]) == pytest.approx((3, 6e9))
    assert (measured.get_xdata()[0], measured.get_ydata()[0]) == pytest.approx((16, 4e9))
    assert counted.get_markerfacecolor() == "white" != measured.get_markerfacecolor()
    assert axes.texts[0].get_text() == "ridge: 4 flops a byte"


def test_a_kernel_stands_at_its_registers_and_warps_with_both_numbers():
    figure = plots.plot_occupancy([32, 64], [64, 32], {"one": (40, 24)})
    stairs, kernel = figure.axes[0].lines
    assert list(stairs.get_ydata()) == [64, 32]
    assert (kernel.get_xdata()[0], kernel.get_ydata()[0]) == (40, 24)
    assert figure.legends[0].texts[1].get_text() == "one: 40, 24"


def test_memory_is_drawn_in_gigabytes_with_the_limits():
    figure = plots.plot_memory([1, 2], {"a": [8e9, 4e9]}, {"80 GB": 80e9})
    line, limit = figure.axes[0].lines
    assert list(line.get_ydata()) == [8, 4] and set(limit.get_ydata()) == {80}
    assert {"a", "80 GB"} == set(words(figure))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.plot_sizes({"a": {"counted": {"lm": 0}}}), "expected parameters of a"),
        (lambda: plots.plot_inserted(3, {"a": [4]}), r"a: expected places in 0..3, got 4"),
        (lambda: plots.plot_roof(1, 1, {"a": (0, 1, None)}), "expected flops and bytes above 0"),
        (lambda: plots.plot_occupancy([8], [4, 4], {}), "expected 1 numbers of warps, got 2"),
        (lambda: plots.plot_occupancy([8], [4], {"a": (8, 65)}), "a: expected at most 64 warps"),
        (lambda: plots.plot_memory([1, 2], {"a": [1.0]}, {}), "a: expected 2 numbers, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
