"""Pictures and words together: every document's words must be true of its pictures."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from miniflamingo import training
from miniflamingo.prompt import BOS, EOC, IMAGE, PAD
from miniflamingo.worlds import datasets, grammar, shapes
from miniflamingo.worlds.datasets import GROUP, IGNORED, SEEN, WORDLESS, Pool
from miniflamingo.worlds.grammar import HELD_OUT, HELD_OUT_SHAPES, NAME_IDS, TOKENIZER
from miniflamingo.worlds.shapes import COLOURS, DIRECTIONS, NUM_GEOMETRIC, SHAPES, SIZES


def encoder(pictures):
    """Stands in for the frozen eye: the picture itself, in four features."""
    return pictures.reshape(len(pictures), 4, -1)


TRAINING = dict(classes=SEEN, per_class=3, per_turned=1, pairs=60, clips=40, distinct=False)


@pytest.fixture(scope="module")
def pool():
    """What training draws from: few pictures, which a document may show twice."""
    return Pool.draw(encoder, 5, **TRAINING)


@pytest.fixture(scope="module")
def fresh():
    """What evaluation draws from."""
    return Pool.draw(encoder, 5, "test", per_class=7, per_turned=2, pairs=90, clips=8)


def labels_of(pool, documents):
    """The label arrays of the pictures that a document shows."""
    if documents.source == "videos":
        return tuple(label[documents.pictures] for label in pool.clips)
    first = len(pool.objects[0])
    if documents.pictures.min() >= first:
        return tuple(label[documents.pictures - first] for label in pool.pairs)
    return tuple(label[documents.pictures] for label in pool.objects)


def chunks(documents):
    """The texts between `<image>` and `<EOC>`, [B][N]."""
    rows = [TOKENIZER.decode(row).split("<image> ")[1:] for row in documents.tokens]
    return [[text.replace(" <EOC>", "").strip() for text in row] for row in rows]


def says(colour, shape, size):
    return f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"


# --- the pool -------------------------------------------------------------------------------------


def test_a_pool_follows_its_seed_and_holds_every_class(pool):
    pictures = 3 * SEEN.sum() + grammar.TURNED_SEEN.sum() + 60
    assert pool.images.shape[:2] == (pictures, 1) and pool.videos.shape[:2] == (40, 8)
    again = Pool.draw(encoder, 5, **TRAINING)
    assert np.array_equal(pool.images, again.images) and np.array_equal(pool.videos, again.videos)
    rng = np.random.default_rng(0)
    classes = np.argwhere(WORDLESS)
    colour, shape = classes[rng.integers(0, len(classes), 300)].T
    picked = pool.pick(colour, shape, rng)
    assert np.array_equal(pool.objects[0][picked], colour)
    assert np.array_equal(pool.objects[1][picked], shape)
    assert len(set(picked)) > 150
    with pytest.raises(ValueError, match=r"needs 1 .* the pool has 0"):  # a class is held out
        pool.pick(*np.argwhere(HELD_OUT)[:1].T, rng)


def test_chunks_of_the_pool_do_not_matter(pool, monkeypatch):
    monkeypatch.setattr(datasets, "CHUNK", 10**6)
    whole = Pool.draw(encoder, 5, per_class=1, pairs=3, clips=3)
    sizes = []
    Pool.draw(lambda p: sizes.append(len(p)) or encoder(p), 5, per_class=1, pairs=3, clips=3)
    assert sizes == [128, 3, 24] and len(whole.images) == 131


# --- an evaluation never shows what it asks about -------------------------------------------------

DOCUMENTS = {
    "binding": lambda pool, rng: datasets.binding_documents(pool, 60, 7, 3, rng)[0],
    "one class": lambda pool, rng: datasets.binding_documents(pool, 20, 7, 1, rng)[0],
    "captions": lambda pool, rng: datasets.caption_documents(pool, 60, 20, rng),
    "questions": lambda pool, rng: datasets.question_documents(pool, 60, 20, rng),
    "pairs' captions": lambda pool, rng: datasets.pair_caption_documents(pool, 60, 5, rng),
    "pairs' questions": lambda pool, rng: datasets.pair_question_documents(pool, 60, 5, rng, True),
    "clips": lambda pool, rng: datasets.clip_documents(pool, 60, 8, rng),
    "training's mixture": lambda pool, rng: datasets.interleaved_documents(pool, 64, rng),
}  # fmt: skip


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_no_document_of_a_distinct_pool_shows_a_picture_twice(fresh, kind):
    documents = DOCUMENTS[kind](fresh, np.random.default_rng(0))
    assert all(len(set(row)) == len(row) for row in documents.pictures.tolist())


def test_all_choices_of_different_pictures_are_equally_likely(fresh):
    zero = np.zeros((42_000, 3), int)  # red circles: 7 * 6 * 5 = 210 choices, each about 200 times
    chosen = Counter(map(tuple, fresh.pick(zero, zero, np.random.default_rng(0)).tolist()))
    assert len(chosen) == 210
    chi_square = sum((n - 200) ** 2 / 200 for n in chosen.values())
    assert abs(chi_square - 209) < 4 * np.sqrt(2 * 209)


def test_no_handwritten_digit_stands_twice_in_a_class(monkeypatch):
    """In another size, place or noise it would nearly show what is asked about."""
    seen, cover = [], shapes.glyph_cover

    def remember(digit, x, y, size, split, rng, glyph=None):
        seen.extend(zip(digit.tolist(), [-1] * len(digit) if glyph is None else glyph.tolist()))
        return cover(digit, x, y, size, split, rng, glyph)

    monkeypatch.setattr(shapes, "glyph_cover", remember)
    pool = Pool.draw(encoder, 5, "test", per_class=40, pairs=1, clips=1)
    colour, shape, _ = pool.objects
    digits = np.flatnonzero(shape >= NUM_GEOMETRIC)
    rows = list(zip(colour[digits].tolist(), seen))
    assert len(set(rows)) == len(rows) == len(digits)
    assert all(g >= 0 for _, (_, g) in rows)
    available = np.diff(shapes.glyphs("test")[1])  # there are not 40 of any digit
    assert np.array_equal(pool.counts[:, NUM_GEOMETRIC : len(SHAPES)], [available] * 8)
    assert (pool.counts[:, :NUM_GEOMETRIC] == 40).all() and available.max() < 40


def test_a_document_that_needs_more_pictures_than_there_are_is_refused(fresh, pool):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"needs 8 different pictures of one class, .* has 7"):
        datasets.binding_documents(fresh, 3, 8, 1, rng)
    with pytest.raises(ValueError, match="needs 9 different ones, the pool has 8"):
        datasets.clip_documents(fresh, 3, 9, rng)
    assert datasets.binding_documents(pool, 3, 8, 1, rng)[0].pictures.shape == (3, 8)


def test_training_draws_the_batches_that_the_shipped_weights_were_trained_on(pool):
    """The sum is of the code before evaluation's pools were distinct."""
    seen, rng = hashlib.sha256(), np.random.default_rng(0)
    labels = [*pool.objects, *pool.pairs, *pool.clips]
    for _ in range(20):
        for documents in (
            datasets.interleaved_documents(pool, 32, rng, noise=0.3, wordless=0.5),
            datasets.caption_documents(pool, 8, 3, rng, noise=0.3),
            datasets.pair_caption_documents(pool, 8, 2, rng),
            datasets.clip_documents(pool, 8, 2, rng),
        ):
            labels += documents[:3]
    for array in labels:
        seen.update(np.ascontiguousarray(array, np.int64).tobytes())
    known = "84892b3dbae39f322b09a64dce15a166258851665b9e2784c1b864f1e50726a6"
    assert seen.hexdigest() == known
    means = [x.mean(dtype=float) for x in (pool.images, pool.videos, pool.images[-1])]
    assert means == pytest.approx([0.2901755, 0.2760944, 0.3986656], abs=1e-5)


def test_training_draws_from_a_pool_that_is_not_distinct():
    stage = training.BridgeStage(
        training.BridgeRun(pool_per_class=1, pool_per_turned=1, pool_pairs=2, pool_clips=2),
        training.WEIGHTS / "lm", training.WEIGHTS / "vision",
    )  # fmt: skip
    assert not stage.pool.distinct


# --- documents ------------------------------------------------------------------------------------


def test_captions_say_what_is_there(pool):
    documents = datasets.caption_documents(pool, 20, 3, np.random.default_rng(0))
    for texts, *row in zip(chunks(documents), *labels_of(pool, documents)):
        assert texts == [says(*labels) for labels in zip(*row)]


def test_pair_captions_say_what_is_there(pool):
    documents = datasets.pair_caption_documents(pool, 20, 2, np.random.default_rng(0))
    for texts, *row in zip(chunks(documents), *labels_of(pool, documents)):
        for text, colour, shape, size in zip(texts, *row):
            first, second = (says(colour[i], shape[i], size[i]) for i in (0, 1))
            assert text == f"{first} and {second}"


def test_questions_have_true_answers(pool):
    documents = datasets.question_documents(pool, 40, 3, np.random.default_rng(0))
    kinds = set()
    for texts, *row in zip(chunks(documents), *labels_of(pool, documents)):
        for text, colour, shape, size in zip(texts, *row):
            kind, answer = text.removeprefix("what ").split(" ? ")
            true = {"color": COLOURS[colour], "shape": SHAPES[shape], "size": SIZES[size]}
            assert answer == true[kind]
            kinds.add(kind)
    assert kinds == {"color", "shape", "size"}


def test_questions_about_two_objects_have_true_answers(pool):
    documents = datasets.pair_question_documents(pool, 40, 3, np.random.default_rng(0))
    asked = set()
    for texts, *row in zip(chunks(documents), *labels_of(pool, documents)):
        for text, colour, shape, _ in zip(texts, *row):
            what, answer = text.removeprefix("what color is ").split(" ? ")
            i = [SHAPES[s] for s in shape].index(what)
            assert answer == COLOURS[colour[i]]
            asked.add(i)
    assert asked == {0, 1}


def test_clips_say_where_they_move(pool):
    documents = datasets.clip_documents(pool, 30, 1, np.random.default_rng(0))
    direction = labels_of(pool, documents)[3]
    assert chunks(documents) == [[f"moving {DIRECTIONS[d]}"] for d in direction[:, 0]]


def test_binding_shows_pictures_of_the_named_class(pool):
    documents, episode = datasets.binding_documents(pool, 30, 5, 3, np.random.default_rng(0))
    colour, shape, _ = labels_of(pool, documents)
    assert np.array_equal(colour, episode.colour) and np.array_equal(shape, episode.shape)
    assert (documents.tokens[:, 1::4] == IMAGE).all()
    assert np.array_equal(documents.tokens[:, 3::4], episode.name)
    assert np.isin(episode.name, NAME_IDS).all()


# --- what counts in the loss ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_on_words_and_eoc_alone(pool, seed):
    documents = datasets.interleaved_documents(pool, 32, np.random.default_rng(seed))
    counted = documents.targets != IGNORED
    assert np.array_equal(documents.tokens[counted], documents.targets[counted])
    assert not np.isin(documents.tokens[counted], (PAD, IMAGE)).any()
    assert np.isin(documents.tokens[~counted], (PAD, IMAGE)).all()
    assert (documents.tokens == IMAGE).sum(axis=1).tolist() == [5] * 32
    assert (documents.tokens[:, 0] == BOS).all() and documents.pictures.shape == (32, 5)


def test_wrong_colour_words_are_not_learned(pool):
    documents = datasets.caption_documents(pool, 200, 2, np.random.default_rng(0), noise=0.5)
    colour, *_ = labels_of(pool, documents)
    said, counted = documents.tokens[:, 4::6], documents.targets[:, 4::6] != IGNORED
    true = grammar.COLOUR_IDS[colour]
    assert 0.4 < counted.mean() < 0.6
    assert np.array_equal(said[counted], true[counted])
    assert 0.8 < (said != true)[~counted].mean() < 0.95  # 7 of 8 colours are wrong
    shape_counted = documents.targets[:, 5::6] != IGNORED
    assert shape_counted.all()


def test_nothing_held_out_is_shown_in_training(pool):
    rng = np.random.default_rng(0)
    for _ in range(20):
        documents = datasets.interleaved_documents(pool, 32, rng)
        singles = documents.pictures < len(pool.objects[0])
        colour, shape = (label[documents.pictures[singles]] for label in pool.objects[:2])
        assert not HELD_OUT[colour, shape].any()
    for colour, shape in (pool.pairs[:2], pool.clips[:2]):
        assert not HELD_OUT[colour, shape].any()


def test_held_out_tables_can_be_asked_for(pool):
    pool = Pool.draw(encoder, 5, per_class=1, pairs=200, clips=3)
    documents = datasets.caption_documents(pool, 50, 1, np.random.default_rng(0), HELD_OUT_SHAPES)
    colour, shape, _ = labels_of(pool, documents)
    assert HELD_OUT_SHAPES[colour, shape].all()
    for held_out in (False, True):
        asked = datasets.pair_question_documents(pool, 50, 1, np.random.default_rng(0), held_out)
        colour, shape, _ = labels_of(pool, asked)
        assert (HELD_OUT[colour, shape].any(axis=-1) == held_out).all()


def test_turned_shapes_are_bound_to_names_and_have_no_words(pool):
    rng, shares = np.random.default_rng(0), []
    for wordless in (0.0, 0.5, 1.0):
        drawn = [
            datasets.interleaved_documents(pool, 32, rng, wordless=wordless) for _ in range(20)
        ]
        documents = datasets.together(drawn)
        shown = documents.pictures < len(pool.objects[0])
        shape = pool.objects[1][np.where(shown, documents.pictures, 0)]
        turned = shown & (shape >= len(SHAPES))
        bound = (documents.tokens[:, 2] == TOKENIZER.ids["this"])[:, None]
        assert not (turned & ~bound).any()  # captions and questions have words for all they see
        shares.append(turned[bound[:, 0]].mean())
    assert shares[0] == 0 < shares[1] < shares[2]


# --- text before its picture ----------------------------------------------------------------------


def test_text_first_puts_each_text_before_its_picture(pool):
    documents = datasets.interleaved_documents(pool, 12, np.random.default_rng(0))
    rows = np.arange(12) % 2 == 0
    turned = datasets.text_first(documents, rows)
    assert np.array_equal(turned.use_next, rows)
    assert np.array_equal(turned.pictures, documents.pictures)
    for b in range(12):
        before, after = (TOKENIZER.decode(d.tokens[b]) for d in (documents, turned))
        if rows[b]:
            body = before.removeprefix("<BOS> <image> ").split(" <image> ")
            assert after == "<BOS> " + " ".join(f"{text} <image>" for text in body)
        else:
            assert after == before
    counted = turned.targets != IGNORED
    assert np.array_equal(turned.tokens[counted], turned.targets[counted])
    assert counted.sum() == (documents.targets != IGNORED).sum()


# --- contrastive batches --------------------------------------------------------------------------


def test_contrastive_rows_of_a_group_differ_in_one_shape_alone():
    pictures, texts = datasets.contrastive_batch(96, np.random.default_rng(0))
    assert pictures.shape == (96, 24, 24, 3) and len(texts) == 96
    for g in range(0, 96, GROUP):
        differ = (texts[g : g + GROUP] != texts[g]).any(axis=0)
        assert differ.sum() == 1
        assert np.isin(texts[g : g + GROUP, differ], grammar.SHAPE_IDS).all()
    singles = [TOKENIZER.decode(row) for row in texts[:48]]
    assert all(text.split()[-2] in ("up", "down") for text in singles)
    assert len(set(singles)) > 40  # 8 different shapes of 16 in each group
    assert EOC not in texts


def test_contrastive_places_are_true():
    pictures, texts = datasets.contrastive_batch(192, np.random.default_rng(1))
    pictures, texts = pictures[:96], [TOKENIZER.decode(row).split() for row in texts[:96]]
    grey = np.median(pictures, axis=(1, 2), keepdims=True)
    cover = np.abs(pictures - grey).max(axis=-1) > 0.25
    y, x = np.mgrid[0:24, 0:24] - 11.5
    for where, text in zip(cover, texts):
        assert ("down" in text) == ((where * y).sum() > 0)
        assert ("right" in text) == ((where * x).sum() > 0)
