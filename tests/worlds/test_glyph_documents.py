"""Glyphs in documents: pools, episodes, and what is learned from them."""

import numpy as np
import pytest

from miniflamingo.prompt import IMAGE
from miniflamingo.worlds import glyph_documents, glyph_texts, glyphs
from miniflamingo.worlds.datasets import IGNORED, repeated
from miniflamingo.worlds.glyph_documents import GlyphPool, draw_index


def encoder(pictures):
    """Stands in for the frozen eye: the picture itself, in four features."""
    return pictures.reshape(len(pictures), 4, -1)


CLASSES = glyphs.classes("train", 12)


@pytest.fixture(scope="module")
def pool():
    return GlyphPool.draw(encoder, 5, CLASSES, per=9)


def test_a_pool_follows_its_seed_and_its_classes(pool):
    assert pool.glyphs.shape[:3] == (12 * 9, 1, 4)
    assert np.array_equal(pool.glyphs, GlyphPool.draw(encoder, 5, CLASSES, 9).glyphs)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 12, (50, 6))
    picked = pool.pick(rows, rng)
    assert np.array_equal(picked // 9, rows) and not repeated(picked).any()
    with pytest.raises(ValueError, match=r"needs 10 different .* has 9"):
        pool.pick(np.zeros((2, 10), int), rng)
    loose = GlyphPool(CLASSES, 9, pool.glyphs, distinct=False)
    assert repeated(loose.pick(np.zeros((2, 10), int), rng)).any()


def test_all_choices_of_different_pictures_are_equally_likely(pool):
    chosen = pool.pick(np.zeros((9000, 2), int), np.random.default_rng(0))
    counts = np.bincount(chosen[:, 0] * 9 + chosen[:, 1], minlength=81).reshape(9, 9)
    assert (np.diag(counts) == 0).all()
    expected = 9000 / 72
    chi_square = ((counts[~np.eye(9, dtype=bool)] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 71) < 4 * np.sqrt(2 * 71)


def test_one_of_each_shows_each_class_once():
    index = draw_index(50, 5, 5, np.random.default_rng(0), each=True)
    assert (np.sort(index[:, :5], axis=1) == np.arange(5)).all() and index.shape == (50, 6)
    assert len(np.unique(index[:, 0])) == len(np.unique(index[:, 5])) == 5


def test_binding_shows_the_named_class(pool):
    rng = np.random.default_rng(0)
    index = draw_index(30, 3, 6, rng)
    documents, names = glyph_documents.binding_documents(pool, index, rng)
    assert (documents.tokens[:, 1::4] == IMAGE).all() and documents.source == "glyphs"
    assert np.array_equal(documents.tokens[:, 3::4], names)
    rows = documents.pictures // 9
    for i in range(7):
        same = index == index[:, i : i + 1]
        assert np.array_equal(same, rows == rows[:, i : i + 1])
        assert np.array_equal(same, names == names[:, i : i + 1])
    assert np.isin(names, glyph_texts.NAME_IDS).all()


def test_a_class_has_another_name_in_every_episode_and_one_outside_of_them(pool):
    rng = np.random.default_rng(0)
    for bursts, most in ((1.0, 48), (0.0, 1)):
        documents = glyph_documents.glyph_documents(pool, 200, rng, N=5, bursts=bursts)
        rows, names = documents.pictures // 9, documents.tokens[:, 3::4]
        of_first = set(names[rows == 0].tolist())
        assert (len(of_first) > 10) if most > 1 else (len(of_first) == 1)
        again = repeated(rows).any(axis=1)
        assert again.mean() > 0.9 if bursts else not again.any()
    half = glyph_documents.glyph_documents(pool, 200, rng, N=5, bursts=0.5)
    assert 0.4 < repeated(half.pictures // 9).any(axis=1).mean() <= 0.5


def test_captions_describe_their_picture(pool):
    documents = glyph_documents.glyph_captions(pool, 40, np.random.default_rng(0))
    classes = CLASSES[documents.pictures[:, 0] // 9]
    assert np.array_equal(documents.tokens[:, 2:-1], glyph_texts.descriptions()[classes])
    counted = documents.targets != IGNORED
    assert counted[:, 2:].all() and not counted[:, 1].any()


def test_a_contrastive_batch_has_two_pictures_of_each_class():
    first, second = glyph_documents.contrastive_batch(6, CLASSES, np.random.default_rng(0))
    assert first.shape == second.shape == (6, 24, 24, 3)
    assert not np.allclose(first, second, atol=0.1)
    few = glyph_documents.contrastive_batch(20, CLASSES, np.random.default_rng(0))
    assert len(few[0]) == len(CLASSES)
