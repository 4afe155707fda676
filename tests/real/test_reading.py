"""Documents, likelihoods and answers: batched as alone, each text its own picture."""

import json

import numpy as np
import pytest

from miniflamingo import outputs
from miniflamingo.real import asking, features, measure
from miniflamingo.real import model as models
from miniflamingo.real.documents import BOS, EOC, IMAGE, Mixture, Shown, build
from miniflamingo.real.pictures import TRAINED, UNSEEN, Concepts
from miniflamingo.real.reading import Reader
from miniflamingo.real.stages import see
from miniflamingo.worlds.datasets import IGNORED


@pytest.fixture(scope="module")
def reader(folder):
    model, words = models.assemble(folder)
    for layer in model.gated_xattn:
        layer.alpha_xattn.data[...], layer.alpha_dense.data[...] = 0.8, 0.3
    return Reader(model, words, features.Features(folder, model.vision_encoder), rows=3)


@pytest.fixture(scope="module")
def concepts(folder):
    return Concepts(folder)


def documents(n=7):
    """Of different lengths, with one and with two pictures, the last answer open."""
    made = []
    for i in range(n):
        shown = [Shown((i, "noto", 0), "", "red " * (1 + i % 3), False)] * (i % 2)
        made.append([*shown, Shown((i + 3, "fluent", 1), " what color" * (i % 3))])
    return made


def test_a_document_s_tokens_targets_and_phi(reader):
    words = reader.words
    two = [Shown((0, "noto", 0), " what", "red"), Shown((1, "noto", 0), "", "blue", False)]
    batch = build([two, [Shown((2, "noto", 0))]], words)
    what, red, blue = (words.encode(x) for x in (" what", " red", " blue"))
    expected = [BOS, IMAGE, *what, *red, EOC, IMAGE, *blue, EOC]
    assert batch.tokens[0].tolist() == expected
    first = 2 + len(what) + len(red)
    assert batch.phi[0].tolist() == [0] + [1] * first + [2] * (len(expected) - first - 1)
    learned = np.flatnonzero(batch.targets[0] != IGNORED)
    assert learned.tolist() == list(range(1 + len(what), 2 + len(what) + len(red)))
    assert batch.targets[0, learned].tolist() == [*red, EOC]
    assert batch.lengths.tolist() == [len(expected), 2]
    assert (batch.targets[1] == IGNORED).all()


def test_nats_are_those_of_each_document_alone(reader):
    asked = [[*d[:-1], d[-1]._replace(answer="green blue" if i % 2 else "red")]
             for i, d in enumerate(documents())]  # fmt: skip
    together, counts = reader.nats(asked)
    for i, document in enumerate(asked):
        alone, count = reader.nats([document])
        assert (counts[i], together[i]) == (count[0], pytest.approx(alone[0], rel=1e-5))


def test_answers_are_those_of_each_document_alone_and_without_a_cache(reader):
    together = reader.answers(documents(), most=6)
    for text, document in zip(together, documents()):
        assert text == reader.answers([document], most=6)[0]
        batch = build([document], reader.words)
        media = see(reader.model, *reader.features.stacked(batch.pictures))
        ids, phi, written = batch.tokens, batch.phi, []
        for _ in range(6):
            written.append(int(reader.model.read(ids, media, phi)[0, -1].argmax()))
            if written[-1] == EOC:
                written.pop()
                break
            ids = np.append(ids, [written[-1:]], axis=1)
            phi = np.append(phi, phi[:, -1:], axis=1)
        assert text == reader.words.decode(written).strip()


def test_a_text_depends_on_its_own_picture_alone(reader):
    first, last = (1, "noto", 0), (2, "noto", 0)
    nats = {}
    for one in (first, (5, "fluent", 2)):
        for other in (last, (6, "fluent", 2)):
            shown = [Shown(one, "", "red", True), Shown(other, "", "blue", False)]
            nats[one, other] = reader.nats([shown])[0][0]
    assert nats[first, last] == pytest.approx(nats[first, (6, "fluent", 2)], abs=1e-6)
    assert abs(nats[first, last] - nats[(5, "fluent", 2), last]) > 1e-4


def test_pictures_and_clips_of_a_document_find_their_places(reader):
    clip = tuple((7, "noto", v) for v in range(4))
    rows = [[(1, "noto", 0), clip], [clip, (2, "fluent", 1), (3, "twemoji", 1)]]
    places, stills, clips = reader.features.stacked(rows)
    assert stills.shape[:2] == (3, 1) and clips.shape[:2] == (2, 4)
    assert places.tolist() == [[0, 3, 0], [4, 1, 2]]
    for seen, artist, place in ((stills[2, 0], "twemoji", (3, 1)), (clips[1, 2], "noto", (7, 2))):
        grid = reader.features.grids(artist)[place]
        wide = features.widen(reader.features.eye, grid[None])[0]
        np.testing.assert_allclose(seen, wide, rtol=1e-5, atol=1e-5 * np.abs(wide).max())


def test_the_split_holds_a_tenth_of_each_kind_and_training_never_draws_it(reader, concepts):
    kinds = [concepts.kind(i) for i in concepts.held]
    assert sorted(kinds) == concepts.kinds and not set(concepts.held) & set(concepts.seen)
    mixture, rng = Mixture(concepts, reader.words), np.random.default_rng(0)
    for dataset in ("captions", "questions", "kinds", "binding", "clips"):
        for _ in range(30):
            for shown in getattr(mixture, dataset)(rng):
                clip = isinstance(shown.picture[1], tuple)
                for i, artist, _ in shown.picture if clip else [shown.picture]:
                    assert i in concepts.seen and artist in TRAINED


def test_bound_names_are_targets_once_they_were_shown(reader, concepts):
    mixture, rng = Mixture(concepts, reader.words), np.random.default_rng(0)
    for _ in range(20):
        known = set()
        for shown in mixture.binding(rng):
            assert shown.learned == (shown.answer in known)
            known.add(shown.answer)


def test_text_without_a_picture_has_the_language_model_s_own_logits(reader):
    ids, phi, media = asking.read_prompt(["the capital of France is"], reader.words)
    ours = reader.model.read(ids[None], asking.visual_tokens(reader.model, media), phi[None])
    np.testing.assert_array_equal(ours, reader.model.lm(ids[None]))


def test_anybody_s_picture_gets_what_the_features_of_it_get(reader, concepts):
    image = features.picture(concepts, 2, "noto", 0)
    ids, phi, media = asking.read_prompt([image, "what color", image], reader.words)
    what = reader.words.encode(" what color")
    assert ids.tolist() == [BOS, IMAGE, *what, EOC, IMAGE]
    assert phi.tolist() == [0] + [1] * (2 + len(what)) + [2]
    grid = features.encode(reader.model.vision_encoder, [image])
    ours = asking.visual_tokens(reader.model, media)
    wide = features.widen(reader.model.vision_encoder, grid)
    theirs = see(reader.model, np.array([[0, 0]]), wide[:, None], np.zeros(0))
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_features_are_computed_once_and_the_same_in_torch(folder, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from miniflamingo.kernels.model import real as in_torch

    threads = torch.get_num_threads()
    monkeypatch.setattr(features, "CHUNK", 1)
    monkeypatch.setitem(features.VERSIONS, "noto", 1)
    ours, theirs = (work(folder, "noto", 5) for work in
                    (features.encode_chunk, in_torch.encode_chunk))  # fmt: skip
    torch.set_num_threads(threads)
    assert ours.shape == theirs.shape == (1, 1, features.GRID, features.WIDTH)
    most = np.abs(ours.astype(float)).max()
    np.testing.assert_allclose(ours.astype(float), theirs, atol=2e-3 * most)


def test_missing_features_name_the_command(tmp_path):
    with pytest.raises(ValueError, match="real features"):
        features.Features(tmp_path, eye=object()).grids("noto")


def test_every_figure_has_its_interval_and_chance(reader, concepts):
    found = measure.everything(measure.Measure(reader, concepts, samples=6), progress=False)
    for name, splits in found.items():
        if name in ("eye_alone", "photographs"):
            continue
        for split, figures in splits.items():
            assert figures["low"] <= figures["value"] <= figures["high"], (name, split)
    document = {"runs": {"0": found, "1": found}} | outputs.about()
    json.dumps(document)
    lines = list(measure.table(document))
    assert len(lines) == 2 + len(measure.ROWS) + 2 + 1
    assert all(line.count("|") == lines[0].count("|") for line in lines[:-1])
    named, total = found["photographs"].values(), len(measure.photographs())
    right = sum(photograph["right"] for photograph in named)
    assert lines[-1].endswith(f"by seed: {right} of {total}, {right} of {total}.")


def test_a_model_that_knows_the_answer_scores_one(reader, concepts, monkeypatch):
    asked = measure.Measure(reader, concepts, samples=8)
    name = {tuple(p): concepts.name(p[0]) for p in
            ((i, UNSEEN, 0) for i in range(len(concepts)))}  # fmt: skip

    def nats(documents):
        wrong = [d[-1].answer != name.get(tuple(d[-1].picture)) for d in documents]
        return np.array(wrong, float), np.ones(len(documents), int)

    monkeypatch.setattr(reader, "nats", nats)
    answers = lambda documents, most=12: [name[tuple(d[-1].picture)] for d in documents]  # noqa: E731
    monkeypatch.setattr(reader, "answers", answers)
    assert asked.ranked("artist never seen")["value"] == 1
    assert asked.open_ended("artist never seen")["value"] == 1
    assert asked.open_ended("artist never seen")["shuffled"] < 1
    gain = asked.nats("artist never seen")
    assert gain["nats_right"] == 0 and gain["value"] == pytest.approx(gain["nats_another"])


def test_a_model_that_does_not_look_scores_nothing(reader, concepts, monkeypatch):
    asked = measure.Measure(reader, concepts, samples=8)
    equal = lambda documents: (np.ones(len(documents)), np.ones(len(documents), int))  # noqa: E731
    monkeypatch.setattr(reader, "nats", equal)
    assert asked.ranked("seen")["value"] == asked.ranked("seen")["a_token"] == 0
    assert asked.bound("artist never seen", 2)["value"] == 0


def test_the_examples_of_a_name_are_different_pictures(reader, concepts, monkeypatch):
    asked, seen = measure.Measure(reader, concepts, samples=4), []
    nats = reader.nats
    monkeypatch.setattr(reader, "nats", lambda documents: seen.extend(documents) or nats(documents))
    asked.bound("both never seen", 8)
    for document in seen:
        pictures = [shown.picture for shown in document]
        assert len(set(pictures)) == len(pictures) == 17
        assert document[-1].picture[1] == UNSEEN and not document[0].learned


def test_the_eye_alone_finds_its_own_pictures(reader, concepts):
    asked = measure.Measure(reader, concepts, samples=8)
    assert asked.eye_alone("seen")["name"]["value"] == 1
    assert asked.eye_alone("concepts never seen")["name"]["value"] == 0


def test_the_nearest_example_is_found_where_it_is_the_same_picture(reader, concepts):
    asked = measure.Measure(reader, concepts, samples=4)
    support = [(0, (1, "noto", 0)), (1, (2, "noto", 0))]
    assert asked._nearest(support, (2, "noto", 0), 2) == 1
