"""The widgets follow their sliders; rendered, or without ipywidgets, they are a still picture."""

import re
import sys

import nbformat
import numpy as np
import pytest

from miniflamingo.course import render as r
from miniflamingo.course import widgets as w
from miniflamingo.xattn import compute_phi

TEXT = "My cat . <image> My dog <image> ran ."
CELLS = [
    "from miniflamingo.course import widgets\nwidgets.move_image_tag('My cat <image> sat .')",
    "widgets.turn_alpha(opening=0.5)",
]


@pytest.fixture(scope="module")
def gates():
    return w.Gates("what color ?")


@pytest.fixture
def interactive(monkeypatch):
    """ipywidgets, in a session that is not being rendered."""
    monkeypatch.delenv("MINIFLAMINGO_RENDERING", raising=False)
    return pytest.importorskip("ipywidgets")


def alt_of(widget):
    return re.match('<img alt="([^"]+)"', widget.children[-1].value)[1]


# --- the tag --------------------------------------------------------------------------------------


def test_tags_are_put_where_the_sliders_say():
    words, phi = w.tagged(["a", "b", "c"], (3, 1))  # in any order
    assert words == ["a", "<image>", "b", "c", "<image>"]
    assert phi.tolist() == [0, 1, 1, 1, 2]
    is_tag = np.array([[word == w.TAG for word in words]]).astype(int)
    assert np.array_equal(compute_phi(is_tag, 1)[0], phi)


def test_moving_a_tag_moves_phi_and_the_mask(interactive):
    widget = w.move_image_tag(TEXT)
    first, second, picture = widget.children
    assert (first.value, second.value, first.max) == (3, 5, 7)
    before = picture.value
    assert "3 look at no image, 3 look at image 1, 3 look at image 2" in alt_of(widget)
    first.value = 0
    assert "0 look at no image, 6 look at image 1, 3 look at image 2" in alt_of(widget)
    assert picture.value != before
    first.value = 3
    assert picture.value == before


@pytest.mark.parametrize("text", ["no tag at all", "<image>", ""])
def test_a_text_needs_words_and_a_tag(text):
    with pytest.raises(ValueError, match="a text of words and <image> tags is wanted"):
        w.move_image_tag(text)


# --- the gates ------------------------------------------------------------------------------------


def test_shut_gates_are_the_frozen_lm_bit_for_bit(gates):
    assert np.array_equal(gates.opened(0.0), gates.frozen())
    assert np.isclose(gates.opened(0.7).sum(), 1)


def test_trained_gates_are_the_shipped_model(gates):
    fresh = w.Gates("what color ?")
    logits = fresh.model(**fresh.batch.inputs())
    gates.opened(0.3)
    assert np.array_equal(gates.opened(1.0), w.softmax(logits[0, -1]))


def test_the_picture_is_what_opened_gates_let_in(gates):
    blue = np.zeros((24, 24, 3), np.float32)
    blue[6:18, 6:18, 2] = 1
    other = w.Gates("what color ?", blue)
    assert np.array_equal(other.opened(0.0), gates.opened(0.0))
    assert not np.array_equal(other.opened(1.0), gates.opened(1.0))
    red = w.grammar.TOKENIZER.ids["red"]
    assert gates.opened(1.0)[red] > 0.5 > gates.opened(0.0)[red]


def test_turning_alpha_redraws(interactive):
    widget = w.turn_alpha(opening=0.0)
    slider, before = widget.children[0], widget.children[1].value
    assert "are 0.00 apart" in alt_of(widget)
    slider.value = 1.0
    assert widget.children[1].value != before and "with the picture: red" in alt_of(widget)


# --- without a widget -----------------------------------------------------------------------------


def test_without_ipywidgets_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.delenv("MINIFLAMINGO_RENDERING", raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # an import of it fails
    shown = []
    monkeypatch.setattr(w, "show", lambda figure, alt: shown.append(alt))
    assert w.move_image_tag(TEXT) is None and w.turn_alpha() is None
    assert capsys.readouterr().out == f"{w.MISSING}\n" * 2
    assert len(shown) == 2 and all(len(alt) > 40 for alt in shown)


def test_rendering_gives_the_same_bytes_twice(tmp_path):
    cells = [nbformat.v4.new_code_cell(code, id=f"99-{i}") for i, code in enumerate(CELLS * 2)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=r.METADATA)
    r.execute(notebook, tmp_path)
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[:2] == outputs[2:]
    for line, picture, words in outputs:
        assert line.text == f"{w.RENDERED}\n"
        assert set(picture.data) == {"image/png", "text/plain"} and "text/markdown" in words.data
