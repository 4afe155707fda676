"""Evaluation: its statistics, and that every figure asks what it says it asks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflamingo import evaluation
from miniflamingo.decoding import generate
from miniflamingo.evaluation import (
    OTHERS,
    TASKS,
    TEST_SEED,
    VALIDATION_SEED,
    Evaluation,
    coverage,
    figure,
    table,
    wilson,
)
from miniflamingo.flamingo import PRESETS, Flamingo
from miniflamingo.prompt import IMAGE
from miniflamingo.worlds import datasets, grammar
from miniflamingo.worlds.grammar import NAME_IDS, TOKENIZER
from miniflamingo.xattn import compute_phi
from tests.models import open_gates

SAMPLES = 6


def model(seed=0, **changes):
    config = replace(PRESETS["mini"], **changes)
    config = replace(config, lm=replace(config.lm, vocab_size=len(TOKENIZER)))
    return open_gates(Flamingo(config, rng=np.random.default_rng(seed)))


@pytest.fixture(scope="module")
def examination():
    return Evaluation(model(), samples=SAMPLES, seed=11, per_class=9)


# --- statistics -----------------------------------------------------------------------------------


def test_wilson_interval_of_a_textbook():
    low, high = wilson(81, 263)  # Newcombe (1998), example (a), method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0, 1) and wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_interval_holds_the_share(n, share):
    hits = round(n * share)
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n + 1e-12 and hits / n - 1e-12 <= high <= 1
    wider = wilson(hits, n, z=3)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


def test_coverage_is_how_often_the_class_was_shown():
    assert coverage(8, 0) == 0 and coverage(8, 1) == 1 / 8
    rng = np.random.default_rng(0)
    shots = rng.integers(0, 8, (20_000, 5))
    shown = (shots == rng.integers(0, 8, (20_000, 1))).any(axis=1).mean()
    assert coverage(8, 5) == pytest.approx(shown, abs=0.01)


def test_figure_of_nothing_has_no_accuracy():
    assert figure(np.zeros(0, bool)) == {"accuracy": None, "interval": (0, 1), "n": 0}
    assert figure(np.array([True, True, False, True]))["accuracy"] == 0.75


# --- what is asked --------------------------------------------------------------------------------


def test_no_training_seed_is_an_evaluation_seed():
    assert VALIDATION_SEED != TEST_SEED and min(VALIDATION_SEED, TEST_SEED) > 10**5


def test_pictures_come_from_the_split_of_the_seed(monkeypatch):
    splits = []
    draw = datasets.Pool.draw

    def spy(encoder, seed, split, **sizes):
        splits.append(split)
        return draw(encoder, seed, split, **sizes)

    monkeypatch.setattr(datasets.Pool, "draw", spy)
    for seed in (VALIDATION_SEED, TEST_SEED):
        Evaluation(model(), samples=2, seed=seed, per_class=1)
    assert splits == ["validation", "test"]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_ways(name):
    task = TASKS[name]
    rng = np.random.default_rng(0)
    episode = grammar.draw_episode(20, 200, task.ways, rng, task.allowed, task.mode)
    assert all(len(set(row)) == task.ways for row in episode.index)


def test_one_sequence_answers_as_separate_prompts_would(examination, monkeypatch):
    """The curve reads k shots off a long sequence; a prompt of k shots must say the same."""
    drawn = {}
    draw = datasets.binding_documents

    def remember(*arguments, **options):
        drawn["documents"], drawn["episode"] = draw(*arguments, **options)
        return drawn["documents"], drawn["episode"]

    monkeypatch.setattr(evaluation.datasets, "binding_documents", remember)
    curve = examination.binding("binding_4way", shots=(0, 1, 3))
    documents, episode = drawn["documents"], drawn["episode"]
    for k in (0, 1, 3):
        tokens = documents.tokens[:, : 1 + 4 * k + 2]
        media = examination.media["images"][documents.pictures[:, : k + 1]]
        written = generate(examination.reader, examination.prompt(tokens, media), 1)
        answers = np.array([row[0] if row else -1 for row in written])
        correct = (answers == episode.name[:, k]).mean()
        assert curve[str(k)]["accuracy"] == pytest.approx(correct)
        assert curve[str(k)]["ceiling"] == coverage(4, k) and curve[str(k)]["n"] == SAMPLES


def test_visual_tokens_are_those_of_the_whole_model(examination):
    """What the examination computes once for each picture is what the model would compute."""
    documents = datasets.caption_documents(examination.pool, 3, 2, np.random.default_rng(0))
    features = examination.pool.images[documents.pictures]
    media = examination.model.resampler(features)
    np.testing.assert_allclose(
        examination.media["images"][documents.pictures], media, rtol=1e-4, atol=1e-5
    )
    phi = compute_phi(documents.tokens, IMAGE)
    expected = examination.model.read(documents.tokens, media, phi)
    ours = examination.logits(documents.tokens, examination.media["images"][documents.pictures])
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


class Oracle:
    """Stands in for the decoder: writes down the truth, or something else."""

    def __init__(self, monkeypatch, examination, right):
        self.right, self.rests = right, []
        asked = examination._asked

        def remember(documents, words):
            batch, rest = asked(documents, words)
            self.rests.append(rest)
            return batch, rest

        monkeypatch.setattr(examination, "_asked", remember)
        monkeypatch.setattr(evaluation, "generate", lambda *a: self.answers())
        monkeypatch.setattr(
            evaluation, "beam_search", lambda *a: [(ids, 0.0) for ids in self.answers()]
        )
        monkeypatch.setattr(evaluation, "log_likelihood", self.score)

    def answers(self):
        rest = self.rests[-1]
        rows = [[int(i) for i in row[:-1]] for row in rest]  # without the last <EOC>
        return rows if self.right else [[*row[:-1], NAME_IDS[0]] for row in rows]

    def score(self, reader, batch, candidates):
        true = self.rests[-1][:, 0]
        hit = np.array([[c[0] == t for c in candidates] for t in true])
        return hit if self.right else ~hit


@pytest.mark.parametrize("right", [True, False])
def test_right_answers_count_and_wrong_ones_do_not(examination, monkeypatch, right):
    Oracle(monkeypatch, examination, right)
    parts = [getattr(examination, name)() for name in ("captions", "questions", "motion")]
    assert [len(part) for part in parts] == [6, 16, 2]
    accuracies = [figure["accuracy"] for part in parts for figure in part.values()]
    assert accuracies == [float(right)] * 24


def test_captions_are_scored_word_by_word(examination, monkeypatch):
    Oracle(monkeypatch, examination, right=False)  # it gets the last word, the shape, wrong
    words = examination.captions()["seen"]["words"]
    assert words == {"article": 1.0, "size": 1.0, "colour": 1.0, "shape": 0.0}


def test_an_answer_must_end_where_the_truth_ends(examination, monkeypatch):
    documents = datasets.clip_documents(examination.pool, 4, 1, np.random.default_rng(0))
    truth = documents.tokens[:, 3]
    longer = [[int(t), int(t)] for t in truth]
    monkeypatch.setattr(evaluation, "generate", lambda *a: longer)
    assert not examination._written(documents, 1).all(axis=1).any()
    monkeypatch.setattr(evaluation, "generate", lambda *a: [row[:1] for row in longer])
    assert examination._written(documents, 1).all()


def asked_before(examination, monkeypatch, method, *arguments, **options):
    """Run a harness; in how many of its prompts the last picture stood among those before it."""
    shown, logits, prompt = [], examination.logits, examination.prompt

    def seen_by(read):
        def remember(tokens, media):
            shown.append((media[:, :-1] == media[:, -1:]).all(axis=(2, 3)).any(axis=1))
            return read(tokens, media)

        return remember

    with monkeypatch.context() as patch:
        patch.setattr(examination, "logits", seen_by(logits))
        patch.setattr(examination, "prompt", seen_by(prompt))
        getattr(examination, method)(*arguments, **options)
    return sum(int(rows.sum()) for rows in shown), sum(len(rows) for rows in shown)


@pytest.fixture(scope="module")
def small():
    """Few pictures a class and many episodes: an accident would happen."""
    return Evaluation(model(), samples=40, seed=12, per_class=9)


HARNESSES = [
    *(("binding", name, (k,)) for name in TASKS for k in (1, 5)),
    ("rices",),
    ("rices", 6, 40, "digits_3way"),
    ("ensemble",),
    ("ensemble", 5, 2, "digits_3way_unseen"),
]


@pytest.mark.parametrize("harness", HARNESSES, ids=str)
def test_the_asked_picture_never_stands_among_its_shots(small, monkeypatch, harness):
    method, *arguments = harness
    hits, prompts = asked_before(small, monkeypatch, method, *arguments)
    assert hits == 0 and prompts >= 40


def test_an_accident_would_be_seen(small, monkeypatch):
    monkeypatch.setattr(small.pool, "distinct", False)
    assert asked_before(small, monkeypatch, "binding", "digits_3way", (5,))[0] > 0


# --- choosing and ordering the shots --------------------------------------------------------------


def test_rices_takes_the_most_similar_and_puts_them_last(examination, monkeypatch):
    """Features that name the class: the chosen shots must be of the query's class, if there are."""
    pool = examination.pool
    colour, shape, _ = pool.objects
    features = np.zeros((len(pool.images), 1, 1, 128), np.float32)
    features[np.arange(len(colour)), 0, 0, colour * 16 + shape] = 1
    monkeypatch.setattr(pool, "images", features)
    seen = {}

    def choose(pictures, names, rows):
        seen[len(seen)] = (pictures, names, rows)
        return np.zeros((len(rows), len(TOKENIZER)))

    monkeypatch.setattr(examination, "_choose", choose)
    assert set(examination.rices(shots=4, support=60)) == {"rices", "random"}
    pictures, names, alike = seen[0]
    classes = colour[pictures] * 16 + shape[pictures]
    itself = pictures[:, :-1] == pictures[:, -1:]
    again = datasets.repeated(pictures)[:, :-1]  # the query, or what is drawn once more
    for row, name, chosen, left_out in zip(classes, names, alike, again):
        same = np.flatnonzero((row[:-1] == row[-1]) & ~left_out)
        last = chosen[len(chosen) - min(4, len(same)) :]
        assert np.isin(last, same).all() and len(set(chosen)) == 4
        assert (name[last] == name[-1]).all()
    assert not np.array_equal(seen[1][2], alike)
    assert itself.any(axis=1).sum() > 1  # a small pool: the query often stands in its own support
    for rows in (alike, seen[1][2]):
        assert not np.take_along_axis(itself, rows, axis=1).any()
        shots = np.take_along_axis(pictures, rows, axis=1).tolist()
        assert all(len(set(row)) == len(row) for row in shots)


def test_rices_needs_enough_different_pictures(examination):
    with pytest.raises(ValueError, match=r"80 shots: only \d+ different pictures in a support"):
        examination.rices(shots=80, support=100)


def test_ensemble_means_over_orders_of_the_same_shots(examination, monkeypatch):
    orders, truth = [], {}
    draw = grammar.draw_episode

    def remember(*arguments, **options):
        truth["names"] = draw(*arguments, **options)
        return truth["names"]

    def choose(pictures, names, rows):
        orders.append(rows)
        scores = np.zeros((len(rows), len(TOKENIZER)))
        scores[:, NAME_IDS[0]] = 1 if len(orders) == 1 else 0  # the first order is wrong mostly,
        scores[np.arange(len(rows)), names[:, -1]] += 0.9  # and all of them together right
        return scores

    monkeypatch.setattr(evaluation.grammar, "draw_episode", remember)
    monkeypatch.setattr(examination, "_choose", choose)
    result = examination.ensemble(shots=5, orders=6)
    assert len(orders) == 6 and all(np.array_equal(np.sort(o), np.sort(orders[0])) for o in orders)
    lucky = (truth["names"].name[:, -1] == NAME_IDS[0]).mean()
    assert result["one_order"]["accuracy"] == lucky and result["6_orders"]["accuracy"] == 1


# --- text alone -----------------------------------------------------------------------------------


def test_text_alone_is_the_language_models_own_where_tokens_without_image_are_skipped():
    opened = model(skip_without_image=True)
    examination = Evaluation(opened, samples=SAMPLES, seed=3, per_class=1)
    tokens = grammar.text_batch(6, np.random.default_rng(0), 30)
    nothing = np.zeros((6, 1, *examination.media["images"].shape[1:]), np.float32)
    assert np.array_equal(examination.logits(tokens, nothing), opened.lm(tokens))
    for values in examination.text_only().values():
        assert values["lm"] == values["inside"]
    paper = replace(opened.config, skip_without_image=False)
    same = Flamingo(paper, rng=np.random.default_rng(0)).load_state_dict(opened.state_dict())
    examination.model = same
    assert not np.allclose(examination.logits(tokens, nothing), opened.lm(tokens), atol=0.01)


# --- all of it ------------------------------------------------------------------------------------


def test_run_gives_every_figure_and_repeats_itself(examination):
    shots = (0, 1, 4)
    metrics = examination.run(shots)
    assert set(metrics) == {
        "samples", "seed", "alpha", "few_shot", "few_shot_details", *OTHERS,
    }  # fmt: skip
    assert set(metrics["few_shot"]) == set(TASKS)
    for name, curve in metrics["few_shot"].items():
        details = metrics["few_shot_details"][name]
        assert curve == {k: details[k]["accuracy"] for k in ("0", "1", "4")}
    assert json.loads(json.dumps(metrics))["few_shot"] == metrics["few_shot"]
    assert examination.binding("shape_4way", shots) == metrics["few_shot_details"]["shape_4way"]
    lines = list(table(metrics))
    assert len(lines) == 1 + 3 * len(TASKS) + sum(len(metrics[name]) for name in OTHERS)
    for name in TASKS:
        assert any(line.startswith(name) for line in lines)
