"""The figures of what makes new classes learnable show what was measured, beside its baselines."""

import numpy as np
import pytest

from miniflamingo import plots
from miniflamingo.fewshot import report
from miniflamingo.fewshot.measure import AIMS, TASKS


def figures(accuracy):
    beside = {name: 0.1 * i for i, name in enumerate(report.BESIDE)} | {"ceiling": 1.0}
    return {"accuracy": accuracy, "interval": (accuracy - 0.02, accuracy + 0.02), "n": 9} | beside


def document():
    def tasks(accuracy):
        return {name: {str(k): figures(accuracy) for k in task.shots}
                for name, task in TASKS.items()}  # fmt: skip

    cells = [
        {"setting": setting, "seed": seed,
         "figures": {group: tasks(level + 0.1 * seed) for group in ("letters", "symbols", "seen")}}
        for seed in (0, 1, 2) for setting, level in (("7", 0.4), ("300", 0.6))
    ]  # fmt: skip
    return {"experiment": "classes", "cells": cells}


def measured():
    def tasks(accuracy):
        return {name: {str(k): figures(accuracy - 0.01 * k) for k in task.shots}
                for name, task in TASKS.items()}  # fmt: skip

    levels = {"letters": 0.6, "symbols": 0.5}
    runs = {str(seed): {"groups": {g: tasks(x + 0.1 * seed) for g, x in levels.items()}}
            for seed in (0, 1, 2)}  # fmt: skip
    return {"split": "test", "runs": runs}


def every_figure():
    yield plots.plot_settings(report.curves(document()), "classes")
    yield plots.plot_never_seen(report.by_shots(measured()))
    curve = {"0": 0.1, "1": 0.3, "8": 0.9}
    yield plots.plot_few_shot({"4-way": curve}, {"4-way": curve}, {"4-way": 0.25})
    spread = {k: (v, v - 0.1, v + 0.1) for k, v in curve.items()}
    yield plots.plot_shots({"live": spread}, {"live": curve}, 0.25)


def test_never_seen_classes_have_bars_bands_and_all_baselines():
    figure = plots.plot_never_seen(report.by_shots(measured()))
    assert [a.get_title(loc="left") for a in figure.axes] == ["3-way", "5-way"]
    axes = figure.axes[1]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    shots = TASKS["5-way"].shots
    np.testing.assert_allclose(lines["letters"], [0.7 - 0.01 * k for k in shots])
    assert {"ceiling", "blind", "chance", "nearest mean, visual tokens"} < lines.keys()
    band, bars = axes.collections[:2]
    ys = band.get_paths()[0].vertices[:, 1]
    assert ys.min() == pytest.approx(0.6 - 0.32) and ys.max() == pytest.approx(0.8 - 0.01)
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([0.67, 0.71])
    with pytest.raises(ValueError, match="expected a file of fewshot measure, got one of exp"):
        report.by_shots(document())


def test_a_few_shot_figure_shows_who_does_not_look():
    figure = list(every_figure())
    for axes in (figure[2].axes[0], figure[3].axes[0]):
        (label,) = [t.get_text() for t in axes.get_legend().get_texts() if "blind" in t.get_text()]
        assert "chance" in label
        assert any(np.allclose(line.get_ydata(), 0.25) for line in axes.lines)


def test_each_question_has_a_panel_with_every_line():
    figure = plots.plot_settings(report.curves(document()), "classes")
    assert [a.get_title(loc="left") for a in figure.axes] == [f"{t}, {k} shots" for t, k in AIMS]
    for axes in figure.axes:
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        np.testing.assert_allclose(lines["letters"], [0.5, 0.7])  # the median seed's
        assert {"ceiling", "blind", "chance", "nearest mean, visual tokens"} < lines.keys()
        assert [t.get_text() for t in axes.get_xticklabels()] == ["7", "300"]
        bars = axes.collections[0].get_segments()
        assert [bar[:, 1].tolist() for bar in bars] == [
            pytest.approx([0.4, 0.6]), pytest.approx([0.6, 0.8])
        ]  # fmt: skip


def test_only_an_experiment_has_curves():
    with pytest.raises(ValueError, match="expected a file of fewshot experiment, got one of meas"):
        report.curves({"runs": {}})
