"""The small world's words: sentences, held-out classes, binding episodes, what the LM reads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniflamingo.prompt import EOC, IMAGE, PAD
from miniflamingo.worlds import grammar
from miniflamingo.worlds.grammar import (
    ANY,
    DIGIT,
    GEOMETRIC,
    HELD_OUT,
    HELD_OUT_DIGITS,
    HELD_OUT_SHAPES,
    MODES,
    NAME_IDS,
    NAMES,
    SHAPE_IDS,
    TOKENIZER,
)
from miniflamingo.worlds.shapes import COLOURS, SHAPES

RED, BLUE, CIRCLE, BAR = COLOURS.index("red"), COLOURS.index("blue"), 0, SHAPES.index("bar")


def words(ids):
    return TOKENIZER.decode(np.ravel(ids))


def test_sentences():
    small, large = 0, 1
    one = np.array([RED]), np.array([CIRCLE]), np.array([small])
    two = np.array([[RED, BLUE]]), np.array([[CIRCLE, BAR]]), np.array([[small, large]])
    assert words(grammar.caption(*one)) == "a small red circle"
    assert words(grammar.pair_caption(*two)) == "a small red circle and a large blue bar"
    asked = [words(grammar.question(*one, np.array([k]))) for k in range(3)]
    answers = ("color ? red", "shape ? circle", "size ? small")
    assert asked == [f"what {answer} <EOC>" for answer in answers]
    for which, answer in enumerate(("circle ? red", "bar ? blue")):
        sentence = words(grammar.pair_question(*two[:2], np.array([which])))
        assert sentence == f"what color is {answer} <EOC>"
    assert words(grammar.motion(np.array([2]))) == "moving up"


def test_binding_has_the_name_right_after_its_key():
    episode = grammar.Episode(
        np.array([[RED, BLUE]]), np.array([[CIRCLE, BAR]]), NAME_IDS[[[1, 0]]], np.array([[0, 1]])
    )
    expected = f"<BOS> red circle {NAMES[1]} <EOC> blue bar {NAMES[0]} <EOC>"
    assert words(grammar.binding(episode)) == expected


def test_texts_of_several_lengths_are_padded_at_the_end():
    rows = grammar.stack_rows([np.array([[5, 6, 7]]), np.array([[8]])])
    assert rows.tolist() == [[5, 6, 7], [8, PAD, PAD]]


# --- held-out classes -----------------------------------------------------------------------------


def test_what_is_held_out():
    assert HELD_OUT_SHAPES.sum() == 12 == GEOMETRIC.sum() / 4
    assert HELD_OUT_DIGITS.sum() == 24 and HELD_OUT_DIGITS[:, -3:].all()
    assert np.array_equal(HELD_OUT, HELD_OUT_SHAPES | HELD_OUT_DIGITS)
    assert np.array_equal(ANY, GEOMETRIC | DIGIT) and not (GEOMETRIC & DIGIT).any()
    # every colour and every shape is seen in other combinations
    seen = GEOMETRIC & ~HELD_OUT
    assert (seen.sum(axis=1) >= 4).all() and (seen.sum(axis=0)[:6] == 6).all()


def test_attributes_are_drawn_from_the_table_alone():
    rng = np.random.default_rng(0)
    colour, shape, size = grammar.draw_attributes((40, 50), HELD_OUT_SHAPES, rng)
    assert HELD_OUT_SHAPES[colour, shape].all() and colour.shape == (40, 50)
    drawn = np.zeros_like(ANY)
    drawn[colour, shape] = True
    assert np.array_equal(drawn, HELD_OUT_SHAPES) and set(np.unique(size)) == {0, 1}


def test_two_objects_have_different_shapes_from_the_table():
    rng = np.random.default_rng(0)
    colour, shape, size = grammar.draw_pair_attributes((500,), ~HELD_OUT, rng)
    assert colour.shape == shape.shape == size.shape == (500, 2)
    assert (shape[:, 0] != shape[:, 1]).all()
    assert (GEOMETRIC & ~HELD_OUT)[colour, shape].all()


# --- episodes -------------------------------------------------------------------------------------

TABLES = {"any": ANY, "seen": ~HELD_OUT, "held out": HELD_OUT_SHAPES, "digits": HELD_OUT_DIGITS}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    ways=st.integers(2, 8),
    shots=st.integers(1, 33),
    table=st.sampled_from(list(TABLES)),
    mode=st.sampled_from([None, *MODES]),
)
def test_an_episode_binds_each_name_to_one_class(seed, ways, shots, table, mode):
    allowed = TABLES[table]
    episode = grammar.draw_episode(6, shots, ways, np.random.default_rng(seed), allowed, mode)
    assert allowed[episode.colour, episode.shape].all()
    for colour, shape, name, index in zip(*episode):
        classes = set(zip(colour, shape))
        assert len(classes) == len(set(name)) == len(set(index)) <= ways
        assert len(set(zip(colour, shape, name, index))) == len(classes)
        assert mode != "colour" or len(set(shape)) == 1
        assert mode != "shape" or len(set(colour)) == 1
        assert set(name) <= set(NAME_IDS)


@pytest.mark.parametrize("mode,ways", [("pair", 8), ("colour", 6), ("shape", 4)])
def test_an_episode_has_all_its_ways_equally_often(mode, ways):
    rng = np.random.default_rng(0)
    episode = grammar.draw_episode(400, 200, ways, rng, GEOMETRIC & ~HELD_OUT, mode)
    share = np.bincount(episode.index.ravel()) / episode.index.size
    np.testing.assert_allclose(share, np.full(ways, 1 / ways), atol=0.01)
    assert all(len(set(row)) == ways for row in episode.index)


def test_names_and_classes_do_not_go_together():
    """A name says nothing of its class: only the examples do."""
    rng = np.random.default_rng(0)
    episode = grammar.draw_episode(20000, 1, 4, rng, GEOMETRIC)
    table = np.zeros((len(TOKENIZER), len(SHAPES)))
    np.add.at(table, (episode.name.ravel(), episode.shape.ravel()), 1)
    table = table[NAME_IDS][:, :6]
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (len(NAMES) - 1) * 5
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


# --- what the language model reads ----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_text_batches_are_well_formed(seed):
    batch = grammar.text_batch(48, np.random.default_rng(seed), length=48)
    assert batch.shape[0] == 48 and batch.shape[1] <= 48
    assert not (batch == IMAGE).any() and batch.min() >= 0 and batch.max() < len(TOKENIZER)
    lengths = (batch != PAD).sum(axis=1)
    assert all((row[:n] != PAD).all() and row[n - 1] == EOC for row, n in zip(batch, lengths))
    assert np.array_equal(batch, grammar.text_batch(48, np.random.default_rng(seed), length=48))
    texts = [words(row) for row in batch]
    assert sum(any(name in text for name in NAMES) for text in texts) == 29  # 60 %
    for part in ("what color is", "moving", "what shape ?", " and a "):
        assert any(part in text for text in texts)


def test_long_batches_hold_many_shots():
    shots = set()
    for seed in range(40):
        batch = grammar.long_text_batch(12, np.random.default_rng(seed))
        assert (batch.shape[1] - 1) % 4 == 0 and len(batch) == 12
        assert np.isin(batch[:, 3::4], NAME_IDS).all() and np.isin(batch[:, 2::4], SHAPE_IDS).all()
        shots.add((batch.shape[1] - 1) // 4)
    assert min(shots) >= 8 and max(shots) <= 33 and len(shots) > 10


def test_any_words_can_be_keys():
    rows = grammar.any_binding(300, 9, 3, np.random.default_rng(0))
    assert rows.shape == (300, 37) and (rows[:, 4::4] == EOC).all()
    keys = np.stack([rows[:, 1::4], rows[:, 2::4]], axis=-1)
    names = rows[:, 3::4]
    assert np.isin(names, NAME_IDS).all()
    assert set(keys.ravel()) == set(range(4, len(TOKENIZER)))  # every word but the special tokens
    for key, name in zip(keys, names):
        pairs = {(*k, n) for k, n in zip(key, name)}
        assert len(pairs) == len(set(name)) <= 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_binding_has_any_keys(share):
    batch = grammar.text_batch(48, np.random.default_rng(0), 48, share)
    long = grammar.long_text_batch(12, np.random.default_rng(0), share)
    for rows, binding in ((batch, 29), (long, 12)):
        bound = rows[np.isin(rows[:, 3], NAME_IDS) & (rows[:, 4] == EOC)]
        assert len(bound) >= binding - 1
        free = (~np.isin(bound[:, 2], SHAPE_IDS)).mean()  # a quarter of free keys looks like words
        assert 0.5 * share <= free <= share
