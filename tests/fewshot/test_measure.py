"""What is asked of glyphs never seen, and what stands beside the answers."""

import numpy as np
import pytest

from miniflamingo.evaluation import TEST_SEED, coverage
from miniflamingo.fewshot import measure
from miniflamingo.fewshot.measure import AIMS, TASKS, Measure, nearest_mean
from miniflamingo.prompt import IMAGE
from miniflamingo.training import load_flamingo
from miniflamingo.worlds import glyphs
from miniflamingo.worlds.glyph_documents import GlyphPool, binding_documents, draw_index
from miniflamingo.xattn import compute_phi


@pytest.fixture(scope="module")
def model(trained):
    return load_flamingo(trained / "flamingo" / "model.safetensors")


CLASSES = glyphs.classes("validation")[:6]


def asked(model, **changes):
    m = Measure(model, samples=40)
    for name, value in changes.items():
        setattr(m, name, value)
    return m.group(CLASSES)


def test_every_figure_has_its_ceiling_and_baselines(model):
    found = asked(model)
    assert found.keys() == TASKS.keys()
    for name, task in TASKS.items():
        assert list(found[name]) == list(map(str, task.shots))
        for k, f in found[name].items():
            assert f["n"] == 40 and f["interval"][0] <= f["accuracy"] <= f["interval"][1]
            assert f["chance"] == 1 / task.ways and f["accuracy"] <= 1
            expected = 1 if task.each else coverage(task.ways, int(k))
            assert f["ceiling"] == pytest.approx(expected, abs=0.25)
            assert 0 <= f["nearest_tokens"] <= f["ceiling"] >= f["nearest_eye"]
    assert all(k in found[task] for task, k in AIMS)


def test_a_model_that_knows_reaches_the_ceiling_and_one_that_guesses_the_blind(model):
    def oracle(tokens, media, phi):
        return tokens[:, 3::4]

    def blind(tokens, media, phi):
        names = tokens[:, 3::4]
        return np.concatenate([names[:, :1], names[:, :-1]], axis=1)  # the last name there was

    known, guessed = asked(model, answer=oracle), asked(model, answer=blind)
    for task, shots in known.items():
        for k, f in shots.items():
            assert f["accuracy"] == 1 and f["given_shown"] == 1
            assert guessed[task][k]["accuracy"] < 0.65
            assert guessed[task][k]["one_of_the_names"] == 1
    assert guessed["5-way"]["1"]["given_shown"] == 1  # which is why it means nothing there
    assert guessed["5-way"]["1"]["accuracy"] == guessed["5-way"]["1"]["blind"]


def test_one_document_answers_as_separate_prompts_would(model):
    rng = np.random.default_rng(0)
    pool = GlyphPool.draw(model.vision_encoder, 1, CLASSES, 8)
    documents, _ = binding_documents(pool, draw_index(6, 3, 4, rng), rng)
    tokens = documents.tokens[:, :-1]
    media = model.resampler(pool.glyphs[documents.pictures])
    answers = Measure(model)._answer(tokens, media, compute_phi(tokens, IMAGE))
    for k in (1, 4):
        cut = tokens[:, : 1 + 4 * k + 2]
        logits = model.read(cut, media[:, : k + 1], compute_phi(cut, IMAGE), last=True)
        assert np.array_equal(logits[:, 0].argmax(axis=-1), answers[:, k])


def test_what_is_asked_never_stood_among_its_shots(model, monkeypatch):
    seen, draw = [], measure.binding_documents

    def remember(*arguments):
        seen.append(draw(*arguments))
        return seen[-1]

    monkeypatch.setattr(measure, "binding_documents", remember)
    asked(model)
    for documents, _ in seen:
        assert all(len(set(row)) == len(row) for row in documents.pictures.tolist())


def test_splits_ask_about_their_own_classes(model):
    for split in ("validation", "test"):
        ids = np.concatenate(list(Measure(model, split).groups().values()))
        assert (glyphs.font().split[ids] == glyphs.SPLITS.index(split)).all()
    seen = Measure(model, "train", seed=TEST_SEED).groups()["seen"]
    assert (glyphs.font().split[seen] == 0).all() and len(seen) == measure.SEEN


def test_the_nearest_mean_is_the_nearest_of_the_classes_shown():
    index = np.array([[0, 0, 1, 1], [0, 1, 2, 2], [0, 0, 0, 1]])
    east, north = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    vectors = np.array([
        [east + north, east - north, north, north * 0.5 + east * 0.4],
        [east, north, -east, -east],
        [east, east, east, north],
    ])  # fmt: skip
    assert nearest_mean(vectors, index).tolist() == [True, True, False]
