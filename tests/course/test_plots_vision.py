"""The figures of modules 04 and 05: they show what they are given and refuse what does not fit."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from miniflamingo import plots

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 8, 8, 3))
CAPTIONS = ["a red circle", "a blue $bar", "a green ring"]
SIMILARITY = np.array([[0.9, 0.2, -0.1], [0.4, 0.1, 0.8], [-0.02, 0.3, 0.6]])
FOUND = RNG.random((2, 3, 8, 8, 3))
FOUND_NAMES = [["ring", "ring", "bar"], ["bar", "ring", "bar"]]
SIGNAL = {"variance": {"one": [1, 2, 4], "two": [1, 0.5, 0.1]}}


def every_figure():
    yield plots.plot_features(IMAGES, CAPTIONS, np.ones((3, 2, 2)))
    yield plots.plot_signal(SIGNAL)
    yield plots.plot_similarity(SIMILARITY, IMAGES, CAPTIONS)
    yield plots.plot_retrieved(
        IMAGES[:2], ["ring", "bar"], FOUND, FOUND_NAMES, np.full((2, 3), 0.5)
    )
    yield plots.plot_keys({"image": 1, "clip": 3}, 4, 3)
    yield plots.plot_clip_latents(IMAGES, np.ones((2, 3, 2, 2)), [0, 5])


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_features_stand_below_their_picture_on_one_scale():
    maps = np.arange(12.0).reshape(3, 2, 2)
    figure = plots.plot_features(IMAGES, CAPTIONS, maps)
    pictures = [axes.images[0] for axes in figure.axes[:6]]
    for i in range(3):
        assert np.array_equal(pictures[i].get_array(), IMAGES[i])
        assert np.array_equal(pictures[3 + i].get_array(), maps[i])
        assert pictures[3 + i].get_clim() == (0, 11)


def test_a_signal_is_drawn_as_it_is_and_named():
    figure = plots.plot_signal(SIGNAL)
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [
        [1, 2, 4],
        [1, 0.5, 0.1],
    ]
    assert set(texts(figure)) == {"one", "two"}
    assert figure.axes[0].get_yscale() == "log"


def test_a_similarity_matrix_marks_what_finds_the_wrong_caption():
    figure = plots.plot_similarity(SIMILARITY, IMAGES, CAPTIONS)
    cells = np.asarray(figure.axes[0].collections[0].get_array())
    assert np.array_equal(cells.reshape(3, 3), SIMILARITY)
    said = texts(figure)
    assert "× 0.8" in said and sum("× " in text[:2] for text in said) == 1
    assert "0.0" in said and "-0.0" not in said  # -0.02, rounded
    bold = [t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"]
    assert bold == ["0.9", "× 0.8", "0.6"]


def test_what_is_retrieved_wrongly_has_a_cross_and_another_colour():
    figure = plots.plot_retrieved(IMAGES[:2], ["ring", "bar"], FOUND, FOUND_NAMES, np.eye(2, 3))
    titles = [axes.title for axes in figure.axes]
    wrong = [t.get_text() for t in titles if to_hex(t.get_color()) == plots.WRONG]
    assert wrong == ["0.00 ×\nbar", "1.00 ×\nring"]
    assert titles[0].get_text() == "query:\nring" and sum("×" in t.get_text() for t in titles) == 2


def test_there_is_a_cell_for_every_key():
    figure = plots.plot_keys({"image": 1, "clip": 3}, 4, 3)
    colours = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    assert len(colours) == (4 + 3) + (12 + 3)
    assert colours.count(plots.PAPER) == 6 and colours.count(plots.image_colour(3)) == 4
    assert "12 + 3 = 15 keys\n→ 3 visual tokens" in texts(figure)


def test_latents_of_a_clip_are_drawn_frame_by_frame_with_their_shares():
    maps = np.arange(24.0).reshape(2, 3, 2, 2)
    figure = plots.plot_clip_latents(IMAGES, maps, [0, 5])
    assert np.array_equal(figure.axes[4].images[1].get_array(), maps[1, 1])
    titles = [axes.get_title(loc="center") for axes in figure.axes]
    assert titles[:3] == [f"{x:.0%}" for x in maps[0].sum(axis=(1, 2)) / maps[0].sum()]
    assert figure.axes[3].get_ylabel() == "latent 5"


REFUSED = [
    (lambda: plots.plot_keys({"clip": 2}, 5, 3), "expected a square S"),
    (lambda: plots.plot_keys({}, 4, 3), "R and T above 0"),
    (lambda: plots.plot_clip_latents(IMAGES, np.ones((1, 2, 2, 2)), [0]), "1 latents, 2 frames"),
    (lambda: plots.plot_features(IMAGES, CAPTIONS[:2], np.ones((3, 2, 2))), "expected 3 captions"),
    (lambda: plots.plot_signal({"a": {"b": [1, 0]}}), "expected values above 0 in 'b', got 0"),
    (lambda: plots.plot_signal({"a": {str(i): [1] for i in range(5)}}), "at most 4 curves"),
    (lambda: plots.plot_similarity(SIMILARITY[:2], IMAGES, CAPTIONS), r"expected \[3, 3\] and 3"),
    (
        lambda: plots.plot_retrieved(IMAGES, CAPTIONS, FOUND, FOUND_NAMES, np.ones((2, 3))),
        "expected 2 queries, 2 x 3 found",
    ),
]


@pytest.mark.parametrize(("draw", "message"), REFUSED)
def test_what_does_not_fit_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
