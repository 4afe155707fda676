"""The figures of `plan` and `scaling` show what they are given."""

import pytest

from miniflamingo import plots
from miniflamingo.plots.plan import PARTS

GB = 1e9
DEVICE = {"memory": 80 * GB}


def a_plan(**memory):
    filled = dict.fromkeys(PARTS, 0.0) | {part: GB * n for part, n in memory.items()}
    return {"memory": filled, "room": 72 * GB, "device": DEVICE, "layout": {"devices": 16}}


PLANS = {"model": "80B", "device": "a100",
         "plans": {"one": a_plan(gradients=30, moments=10), "two": a_plan(logits=90)}}  # fmt: skip
FIT = {"exponent": 1.98, "counted": 2.0}
ROWS = [{"size": n, "side": side, "median": n * k / 1000}
        for side, k in (("NumPy", 1), ("torch", 2)) for n in (4, 8, 16)]  # fmt: skip
CASE = {"case": "self-attention", "grows": "tokens N", "order": "O(N^2)",
        "fits": {"NumPy": FIT, "torch": FIT}, "rows": ROWS}  # fmt: skip


def every_figure():
    yield plots.plot_plan(PLANS)
    yield plots.plot_scaling({"cases": [CASE]})


def test_a_plan_is_a_bar_with_its_sum_beside_what_there_is():
    axes = plots.plot_plan(PLANS).axes[0]
    assert [p.get_width() for p in axes.patches] == pytest.approx([30, 10, 90])
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([80, 72])
    words = [text.get_text().strip() for text in axes.texts]
    assert {"30", "10", "40", "90", "a100", "room"} <= set(words)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert axes.get_title(loc="left") == "Flamingo-80B on 16 x a100"


def test_a_case_is_a_panel_with_a_line_a_side_and_its_exponents():
    case = CASE | {"grows": "shots", "case": "b"}
    first, second = plots.plot_scaling({"cases": [CASE, case]}).axes
    assert [list(line.get_ydata()) for line in first.lines] == [[4, 8, 16], [8, 16, 32]]
    assert list(second.lines[0].get_xdata()) == [5, 9, 17]  # 4 shots, and the picture asked about
    labels = [text.get_text() for text in first.get_legend().get_texts()]
    assert labels == ["NumPy: 1.98 (2.00)", "torch: 1.98 (2.00)"]
    assert first.get_xlabel() == "tokens N; O(N^2)" and second.get_title(loc="left") == "b"


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="expected plans to draw, got none"):
        plots.plot_plan(PLANS | {"plans": {}})
    with pytest.raises(ValueError, match="expected cases to draw, got none"):
        plots.plot_scaling({"cases": []})
