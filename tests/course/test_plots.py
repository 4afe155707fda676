"""The figures show what they are given, refuse what does not fit, and leave pyplot alone."""

import importlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from miniflamingo import plots
from miniflamingo.xattn import image_causal_mask, work_list

WORDS = ["<BOS>", "Cats", "$x", "<image>", "one", "<EOC>", "<image>", "two"]
PHI = np.array([0, 0, 0, 1, 1, 1, 2, 2])


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def every_figure():
    rng = np.random.default_rng(0)
    yield plots.plot_phi(WORDS, PHI)
    yield plots.plot_phi(WORDS * 9, np.tile(PHI, 9), images=rng.random((2, 8, 8, 3)))
    yield plots.plot_image_causal_mask(WORDS, PHI, 2, 3)
    yield plots.plot_image_causal_mask(WORDS * 9, np.tile(PHI, 9), 40, 64)
    yield plots.plot_reach(WORDS, PHI, {"a": rng.random((8, 2)), "b": np.zeros((8, 2))})
    yield plots.plot_work_list(WORDS, *work_list(PHI[None], 2, most=2))
    yield plots.plot_mixture({"one": (WORDS * 3, np.tile(PHI, 3) > 0)}, {"one": 0.5})
    yield plots.plot_alphas([1, 9], [[0.1, -0.5], [0.2, -1]], [[0.0, 0.0], [0.3, 0.31]])
    yield plots.plot_lines([1, 2, 4], {"one": [1, 2, 4], "two": [1, 1, 1]}, "x", "y")


# the other subjects' figures stand beside this file: every_figure of test_plots_NAME.py
SUBJECTS = {"phi and training": every_figure} | {
    path.stem: importlib.import_module(path.stem).every_figure
    for path in sorted(Path(__file__).parent.glob("test_plots_*.py"))
}


def drawn(every_figure, folder):
    """The bytes of a subject's figures as PNG files."""
    files = []
    for i, figure in enumerate(every_figure()):
        assert isinstance(figure, Figure)
        figure.savefig(folder / f"{i}.png", metadata={"Software": None})
        files.append((folder / f"{i}.png").read_bytes())
    return files


@pytest.mark.parametrize("subject", SUBJECTS)
def test_figures_are_deterministic_and_leave_no_trace(subject, tmp_path):
    from matplotlib import pyplot

    every_figure = SUBJECTS[subject]
    before = dict(matplotlib.rcParams)
    first = drawn(every_figure, tmp_path)
    assert first == drawn(every_figure, tmp_path) and min(map(len, first)) > 2000
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == []


def test_phi_has_a_box_a_word_and_a_number_for_every_token():
    figure = plots.plot_phi(WORDS, PHI)
    boxes = [p for p in figure.axes[0].patches if type(p).__name__ == "FancyBboxPatch"]
    assert [to_hex(box.get_facecolor()) for box in boxes] == [plots.image_colour(j) for j in PHI]
    said = texts(figure)
    assert [said.count(word) for word in WORDS] == [WORDS.count(word) for word in WORDS]
    assert [said.count(str(j)) for j in range(3)] == [3, 3, 2]


def test_the_mask_figure_shows_the_mask():
    figure = plots.plot_image_causal_mask(WORDS, PHI, 2, 3)
    cells = figure.axes[0].collections[0]
    mask = image_causal_mask(PHI[None], 2, 3)[0]
    assert np.array_equal(np.asarray(cells.get_array()).reshape(mask.shape), mask)
    assert [to_hex(cells.to_rgba(value)) for value in (0.0, 1.0)] == [plots.MASKED, plots.VISIBLE]


def test_a_leak_is_marked_in_colour_and_with_a_cross():
    change = np.zeros((8, 2))
    change[3, 0], change[0, 1] = 0.25, 0.75  # its own image; a leak
    figure = plots.plot_reach(WORDS, PHI, {"one": change})
    colours = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    assert colours.count(plots.WRONG) == 2  # the cell and the legend
    assert "× 0.75" in texts(figure) and "0.25" in texts(figure)


def test_a_work_list_shows_each_token_once_and_no_free_place():
    said = texts(plots.plot_work_list(WORDS, *work_list(PHI[None], 2, most=2)))
    assert [said.count(word) for word in WORDS[3:]] == [WORDS[3:].count(w) for w in WORDS[3:]]
    assert "Cats" not in said


def test_the_mixture_says_what_counts_and_how_much():
    rows = {"a": (WORDS, PHI > 0), "b": (["<BOS>", "x"], np.array([False, True]))}
    figure = plots.plot_mixture(rows, {"a": 1.0, "b": 0.2})
    boxes = [p for p in figure.axes[0].patches if type(p).__name__ == "FancyBboxPatch"]
    counted = [to_hex(box.get_facecolor()) != plots.PAPER for box in boxes]
    assert counted == [*(PHI > 0), False, True]
    said = texts(figure)
    assert {"× 1", "× 0.2", "5 of 8 tokens count", "1 of 2 tokens count"} <= set(said)


def test_alphas_are_shown_by_size_and_named_apart():
    alpha = np.array([[0, 0, 0], [0.02, -0.03, -2]])
    figure = plots.plot_alphas([0, 1], alpha, alpha / 2)
    for axes, values in zip(figure.axes, (alpha, alpha / 2)):
        drawn = np.array([line.get_ydata() for line in axes.lines]).T
        assert np.allclose(drawn, abs(np.tanh(values)))
        names = {t.get_text(): t for t in axes.texts}
        assert {n: t.xy[1] for n, t in names.items()} == pytest.approx(
            {f"layer {i}": y for i, y in enumerate(drawn[-1])}
        )
        height = 0.8 * 72 * figure.get_figheight()
        places = sorted(t.xy[1] * height + t.get_position()[1] for t in names.values())
        assert min(np.diff(places)) > 9.9


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.plot_phi(WORDS[:-1], PHI), r"phi must be int \[B, L\] = \[1, 7\]"),
        (lambda: plots.plot_phi(WORDS, PHI, images=np.zeros((1, 4, 4, 3))), "phi must lie in 0..1"),
        (lambda: plots.plot_phi([], []), "at least|needs a token and an image"),
        (lambda: plots.plot_image_causal_mask(WORDS, PHI, 0, 3), "needs a token and an image"),
        (lambda: plots.plot_mask(WORDS, np.ones((8, 6)), 2), "mask must be bool .* got float64"),
        (
            lambda: plots.plot_mask(WORDS, np.ones((8, 5), bool), 2),
            r"\[8, 2\*R\], got bool \[8, 5\]",
        ),
        (lambda: plots.plot_mixture({"a": (WORDS, PHI[:3] > 0)}, {"a": 1}), "8 words, 3 counted"),
        (lambda: plots.plot_reach(WORDS, PHI, {"a": np.ones((7, 2))}), r"'a' must be \[8, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_every_line_is_drawn_however_many_there_are():
    series = {f"seed {i}": [i, i + 1, i + 2] for i in range(9)}
    axes = plots.plot_lines([1, 2, 4], series, "x", "y", log=False).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:9]] == list(series.values())
    assert {text.get_text() for text in axes.texts} == series.keys()
