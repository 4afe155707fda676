"""The glyphs' classes, splits, pictures and words, and the file of their masks."""

import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from miniflamingo.worlds import glyph_masks, glyph_texts, glyphs, grammar
from miniflamingo.worlds.glyphs import SPLITS, font


def test_no_script_and_no_block_of_signs_stands_in_two_splits():
    f = font()
    scripts = [{*f.script[f.glyph[glyphs.classes(split)]]} - {"SYMBOL"} for split in SPLITS]
    assert all(scripts) and len(set.union(*scripts)) == sum(map(len, scripts))
    blocks = sorted(block for blocks in glyph_masks.BLOCKS for block in blocks)
    assert all(before[1] < after[0] for before, after in pairwise(blocks))
    places = [glyph_masks.place(int(code)) for code in f.code[f.glyph]]
    assert places == list(zip(f.split.tolist(), f.script[f.glyph].tolist()))


def test_held_out_scripts_are_what_unicode_says():
    f = font()
    for split, scripts in (("validation", ("ARMENIAN", "TIFINAGH")), ("test", ("GEORGIAN", "LAO"))):
        names = [unicodedata.name(chr(f.code[f.glyph[c]])) for c in glyphs.classes(split)]
        for script in scripts:
            assert sum(name.startswith(script) for name in names) >= 15
    assert (f.turn[f.split > 0] == 0).all()  # they are asked as they are


def test_no_class_of_a_held_out_script_looks_like_any_of_training():
    f = font()
    masks = f.masks[f.start[f.glyph]]
    wide = glyph_masks.blurred(masks[:, 2:-2, 2:-2])
    wide = np.stack([glyph_masks.turned(mask, t) for mask, t in zip(wide, f.turn)])
    flat, held = glyph_masks.unit(wide), np.flatnonzero(f.split > 0)
    for shift in ((0, 0), (0, 1), (1, 0), (-1, -1)):
        moved = glyph_masks.unit(np.roll(wide[held], shift, (1, 2)))
        # 4 levels of grey in the file, 256 where it was measured
        assert (moved @ flat[f.split == 0].T).max() < glyph_masks.ALIKE + 0.03


def test_numbers_of_classes_are_nested_and_upright_first():
    whole = glyphs.classes()
    assert len(whole) > 3000 and len(set(whole)) == len(whole) and glyphs.upright() > 900
    seven, hundred = glyphs.classes("train", 7), glyphs.classes("train", 100)
    assert np.array_equal(hundred[:7], seven) and (font().turn[hundred] == 0).all()
    assert np.array_equal(np.sort(glyphs.classes("train", len(whole))), whole)
    for number in (0, len(whole) + 1):
        with pytest.raises(ValueError, match=f"train has 1 to {len(whole)} classes, got {number}"):
            glyphs.classes("train", number)
    with pytest.raises(ValueError, match="one of train, validation, test, got 'tset'"):
        glyphs.classes("tset")


def test_groups_are_of_one_split():
    for split in SPLITS[1:]:
        groups = glyphs.by_script(split)
        assert {"letters", "symbols"} < set(groups)
        both = np.concatenate([groups["letters"], groups["symbols"]])
        assert np.array_equal(np.sort(both), glyphs.classes(split))
        assert all(len(ids) >= 20 and np.isin(ids, both).all() for ids in groups.values())


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_follow_their_seed_and_lie_in_0_to_1():
    ids = np.random.default_rng(0).choice(glyphs.classes(), 40)
    one, again, other = (glyphs.draw(ids, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (40, 24, 24, 3) and one.dtype == np.float32
    assert one.min() >= 0 and one.max() <= 1
    assert np.array_equal(one, again) and not np.allclose(one, other, atol=0.1)
    means = [one.mean(dtype=float), one[0].mean(dtype=float)]
    assert means == pytest.approx(KNOWN, abs=1e-4)  # on every machine


KNOWN = [0.27877, 0.17781]


def test_a_glyph_lies_whole_in_its_picture_and_has_its_colour():
    ids = np.full(200, glyphs.classes()[9])
    white = glyphs.draw(ids, np.random.default_rng(0), np.full(200, 7))
    bright = white.min(axis=-1) > 0.7
    assert (bright.sum(axis=(1, 2)) > 8).all()
    edge = np.ones((24, 24), bool)
    edge[1:-1, 1:-1] = False
    assert bright[:, edge].mean() < 0.1 * bright[:, ~edge].mean()


@pytest.mark.parametrize("turn", range(8))
def test_a_turn_is_numpys(turn):
    f, side = font(), np.arange(36, dtype=np.float32) - 17.5
    x, y = np.broadcast_to(side, (1, 36, 36)), np.broadcast_to(side[:, None], (1, 36, 36))
    (a, b), (c, d) = glyphs.TURNS[turn]
    read = glyphs._read(f.masks[:1], a * x + b * y, c * x + d * y)
    np.testing.assert_allclose(read[0], glyph_masks.turned(f.masks[0], turn), atol=0.01)


def test_masks_are_packed_without_loss():
    masks = np.random.default_rng(0).integers(0, 4, (5, 24, 24))
    assert np.array_equal(glyphs.unpack(glyphs.pack(masks)), masks)


# --- the file -------------------------------------------------------------------------------------


def test_the_file_holds_what_the_fonts_here_draw():
    """Other versions of FreeType round edges differently, so that it is nearly the same."""
    f, faces = font(), glyph_masks.open_faces()
    for g in range(0, len(f.code), 50):
        drawn = [glyph_masks.render(face, int(f.code[g])) for face, known in faces
                 if f.code[g] in known]  # fmt: skip
        drawn = np.stack([mask for mask in drawn if mask is not None]) / 255
        kept = f.masks[f.start[g] : f.start[g + 1], 6:-6, 6:-6]
        assert kept.shape == drawn.shape and np.abs(kept - drawn).mean() < 0.06
        assert np.abs(kept - drawn).max() < 0.6


def test_what_looks_alike_is_one_class():
    rng = np.random.default_rng(0)
    masks = glyph_masks.blurred(rng.random((3, 32, 32)) > 0.7)
    masks[2] = np.roll(masks[0], 1, axis=1)  # the same, a pixel further
    pairs = [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]
    assert glyph_masks.unlike(pairs, masks) == [0, 1, 3]  # of a twin, no turn either
    assert glyph_masks.unlike(pairs, masks, rows=1) == [0, 1, 3]


def test_the_order_in_which_classes_are_taken():
    pairs = glyph_masks.candidates([40, 41, 42], [2, 0, 1])
    assert pairs == [(1, 0), *[(1, t) for t in range(1, 8)], (2, 0), (0, 0)]


# --- words ----------------------------------------------------------------------------------------


def picture(*rows):
    return np.array([[float(c == "#") for c in row.ljust(12, ".")] for row in rows])


DRAWN = {
    "a ring": (picture("............", ".######.....", ".#....#.....", ".#....#.....",
                       ".#....#.....", ".######.....", "............"), 1, 1),
    "two strokes": (picture(".##....##...", ".##....##...", ".##....##...", "............"), 0, 2),
    "eight": (picture("............", ".#######....", ".#..#..#....", ".#..#..#....",
                      ".#######....", "............"), 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_holes_and_parts_are_counted(name):
    mask, holes, parts = DRAWN[name]
    numbers = dict(zip(glyph_texts.ATTRIBUTES, glyph_masks.measured(mask)))
    assert (numbers["holes"], numbers["parts"]) == (holes, parts)
    assert 0 <= numbers["across"] <= 1 and numbers["mirrored"] == pytest.approx(1)


def test_a_tall_glyph_leaning_left_is_called_so():
    mask = np.zeros((24, 24))
    mask[2:22, 8:10], mask[2:6, 8:14] = 1, 1
    numbers = dict(zip(glyph_texts.ATTRIBUTES, glyph_masks.measured(mask)))
    assert numbers["proportions"] > 0.5 and numbers["across"] < 0.5 and numbers["height"] < 0.5


def test_descriptions_are_words_of_their_attributes_and_of_use():
    said = glyph_texts.descriptions()
    assert said.shape == (len(font().glyph), len(glyph_texts.ATTRIBUTES))
    for column, words in zip(said.T, glyph_texts.ATTRIBUTES.values()):
        assert np.isin(column, glyph_texts.ids_of(words)).all()
    upright = said[glyphs.classes("train", glyphs.upright())]
    assert len(np.unique(upright, axis=0)) > 0.5 * len(upright)


def test_the_vocabulary_goes_on_where_the_small_worlds_ends():
    small, whole = grammar.TOKENIZER, glyph_texts.TOKENIZER
    assert whole.words[: len(small)] == small.words
    assert glyph_texts.tokenizer_of(len(small)) is small
    assert glyph_texts.tokenizer_of(len(whole)) is whole
    with pytest.raises(ValueError, match=f"{len(small)} or {len(whole)} words, got one of 7"):
        glyph_texts.tokenizer_of(7)
    assert not set(glyph_texts.KEY_IDS) & set(glyph_texts.NAME_IDS)


def read(text):
    chunks = glyph_texts.TOKENIZER.decode(text).removeprefix("<BOS> ").split(" <EOC>")
    return [chunk.split() for chunk in chunks if chunk.strip()]


@pytest.mark.parametrize("make", [glyph_texts.text_batch, glyph_texts.long_text_batch])
def test_in_a_text_two_words_always_have_the_same_name(make):
    texts, again = make(20, np.random.default_rng(0)), 0
    assert texts.shape[0] == 20
    for text in texts:
        names = {}
        for *words, last in read(text):
            if len(words) == 2:
                again += tuple(words) in names
                assert names.setdefault(tuple(words), last) == last
                assert glyph_texts.TOKENIZER.ids[last] in glyph_texts.NAME_IDS
            else:
                assert len(words) == len(glyph_texts.ATTRIBUTES) - 1
    assert again > 60
