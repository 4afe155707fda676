"""From logits to text: every way of choosing, with and without a cache."""

from itertools import product

import numpy as np
import pytest

from miniflamingo.decoding import (
    Decoder,
    DecodingCache,
    beam_search,
    generate,
    greedy,
    log_likelihood,
    nucleus,
    temperature,
    top_k,
)
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.prompt import BOS, EOC, IMAGE, PAD, Batch
from miniflamingo.xattn import compute_phi
from tests.models import batch_of, row_of, tiny

V = 11
# of different lengths; two images, one with one to spare, none at all, more to come
ROWS, IMAGES = ("b.eI.eI..", "bI.", "b...", "bI..eI"), (2, 2, 0, 4)
MODELS = {
    "alibi": {},
    "all previous": {"only_last": False},
    "learned": {"lm": {"positions": "learned"}},
    "trained <EOC>": {"train_eoc": True},
    "tied": {"lm": {"tie_embeddings": True}, "train_eoc": True},
}
each_model = pytest.mark.parametrize("kind", MODELS)


def ragged(**options):
    return batch_of(*ROWS, images=IMAGES, T=2, **options)


def model_of(kind, seed=0):
    model = tiny(seed=seed, **MODELS[kind])
    model.lm.embedding.weight.data *= 3  # livelier than at initialisation
    if model.eoc_embedding is not None:
        model.eoc_embedding.data += 0.3
    return model


def whole(model, batch, b, ids):
    """The logits behind row b of the batch with ids written behind it, by Flamingo.forward."""
    row = row_of(batch, b)
    tokens = np.concatenate([row.tokens, [ids]], axis=1).astype(int)
    inputs = {**row.inputs(), "tokens": tokens, "phi": compute_phi(tokens, IMAGE)}
    return model(**inputs)[0, len(row.tokens[0]) - 1 :]


# --- the decoder ----------------------------------------------------------------------------------

SCRIPT = np.array([[5, IMAGE, 6, EOC, 7], [IMAGE, 8, EOC, 4, 4], [9, 9, 4, 5, EOC],
                   [IMAGE, EOC, IMAGE, 4, 5]])  # fmt: skip


@each_model
@pytest.mark.parametrize("cached", [True, False])
def test_each_step_equals_a_forward_pass_over_everything(kind, cached):
    model, batch = model_of(kind), ragged()
    batch.num_images[0] = 3  # the third image, black, is there for the <image> that the row writes
    batch.num_frames[0, 2] = 1
    decoder = Decoder(model, batch, 5, cached)
    steps = [decoder.logits] + [decoder.extend(SCRIPT[:, i : i + 1])[:, 0] for i in range(5)]
    np.testing.assert_array_equal(decoder.lengths, batch.lengths + 5)
    for b in range(4):
        expected = whole(model, batch, b, SCRIPT[b])
        np.testing.assert_allclose(np.stack(steps)[:, b], expected, atol=1e-12, err_msg=ROWS[b])


def test_a_row_that_writes_an_image_leaves_the_others_theirs():
    model, batch = model_of("alibi"), ragged()
    for cached in (True, False):
        alone, beside = (Decoder(model, batch, 2, cached) for _ in range(2))
        alone.extend(np.array([[5], [5], [5], [5]]))
        beside.extend(np.array([[5], [IMAGE], [5], [IMAGE]]))
        np.testing.assert_array_equal(beside.logits[[0, 2]], alone.logits[[0, 2]])
        assert (beside.logits[[1, 3]] != alone.logits[[1, 3]]).any(axis=1).all()


@pytest.mark.parametrize("cached", [True, False])
def test_several_tokens_at_once_equal_one_after_another(cached):
    model, batch = model_of("alibi"), ragged(seed=1)
    batch.num_images[0] = 3
    batch.num_frames[0, 2] = 1
    together, steps = Decoder(model, batch, 5, cached), Decoder(model, batch, 5, cached)
    logits = together.extend(SCRIPT)
    for i in range(5):
        np.testing.assert_allclose(steps.extend(SCRIPT[:, i : i + 1])[:, 0], logits[:, i], 1e-9)


def test_an_image_too_many_is_an_error_and_is_not_allowed():
    decoder = Decoder(model_of("alibi"), ragged(), 2)
    logits = decoder.allowed_logits()
    assert np.isneginf(logits[:, [PAD, BOS]]).all()
    np.testing.assert_array_equal(np.isneginf(logits[:, IMAGE]), [True, False, True, False])
    kept = [EOC, *range(4, V)]
    np.testing.assert_array_equal(logits[:, kept], decoder.logits[:, kept])
    with pytest.raises(ValueError, match="row 0 has 3 <image> tags but 2 images"):
        decoder.extend(np.array([[IMAGE], [5], [5], [5]]))


@pytest.mark.parametrize("cached", [True, False])
def test_select_repeats_rows(cached):
    model, batch = model_of("alibi"), ragged()
    decoder = Decoder(model, batch, 2, cached)
    decoder.select(np.array([1, 1, 0]))
    decoder.extend(np.array([[4], [IMAGE], [5]]))
    for row, (b, token) in enumerate([(1, 4), (1, IMAGE), (0, 5)]):
        expected = whole(model, batch, b, [token])[-1]
        np.testing.assert_allclose(decoder.logits[row], expected, atol=1e-12)


def test_the_cache_projects_each_image_once_and_reads_one_token_a_step(monkeypatch):
    model, batch = model_of("alibi"), ragged()
    calls, widths = [], []
    for layer in model.gated_xattn:
        project = layer.project_media
        spy = lambda media, project=project: calls.append(1) or project(media)  # noqa: E731
        monkeypatch.setattr(layer, "project_media", spy)
    embed = model.lm.embed
    monkeypatch.setattr(
        model.lm, "embed", lambda tokens, *rest: widths.append(tokens.shape) or embed(tokens, *rest)
    )
    generate(model, batch, 3, choose=lambda logits, rng: np.full(4, 5))
    assert calls == [1] * len(model.gated_xattn)
    assert widths == [(4, 9), (4, 1), (4, 1)]


def test_a_cache_has_the_models_dtype():
    model = tiny(dtype=np.float32)
    cache = DecodingCache.of(model, np.zeros((2, 1, 3, 8), np.float32), 5)
    assert cache.tokens[0].k.dtype == cache.media[0][0].dtype == np.float32
    assert cache.tokens[0].k.shape == (2, 5, 2, 8)
    assert cache.media[0][0].shape == (2, 1, 3, 2, 4)


# --- how to choose --------------------------------------------------------------------------------

logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05]))


def frequencies(choose, draws=20_000):
    drawn = choose(np.tile(logits, (draws, 1)), np.random.default_rng(0))
    return np.bincount(drawn, minlength=5) / draws


@pytest.mark.parametrize(
    "choose, expected",
    [
        (temperature(), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (temperature(2.0), softmax(logits / 2)),
        (temperature(0.5), softmax(logits * 2)),
        (temperature(1e-3), [1, 0, 0, 0, 0]),
        (temperature(1e6), [0.2] * 5),
        (top_k(1), [1, 0, 0, 0, 0]),
        (top_k(3), np.array([0.5, 0.2, 0.15, 0, 0]) / 0.85),
        (top_k(3, t=0.5), [*softmax(logits[:3] * 2), 0, 0]),
        (top_k(5), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (top_k(99), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (nucleus(1e-9), [1, 0, 0, 0, 0]),
        (nucleus(0.49), [1, 0, 0, 0, 0]),
        (nucleus(0.6), np.array([0.5, 0.2, 0, 0, 0]) / 0.7),
        (nucleus(0.8), np.array([0.5, 0.2, 0.15, 0, 0]) / 0.85),
        (nucleus(1.0), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (nucleus(0.9, t=1e-3), [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies(choose, expected):
    expected = np.array(expected)
    got = frequencies(choose)
    assert (got[expected == 0] == 0).all()
    np.testing.assert_array_less(
        abs(got - expected), 4 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9
    )


@pytest.mark.parametrize("choose", [greedy, top_k(1), nucleus(1e-9), temperature(1e-4)])
def test_limits_are_greedy_and_rows_are_independent(choose):
    rng = np.random.default_rng(0)
    many = rng.normal(size=(50, 7)).astype(np.float32)
    many[:, 3] = -np.inf
    np.testing.assert_array_equal(choose(many, rng), many.argmax(axis=1))


def test_what_is_forbidden_is_never_drawn():
    rng = np.random.default_rng(0)
    barred = np.where(np.isin(np.arange(6), [0, 2, 5]), -np.inf, 0.0).astype(np.float32)
    for choose in (temperature(), temperature(5.0), top_k(4), nucleus(0.99), nucleus(1.0)):
        assert set(choose(np.tile(barred, (2000, 1)), rng)) == {1, 3, 4}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: temperature(0), "temperature must be above 0, got 0"),
        (lambda: temperature(-1.0), "got -1.0"),
        (lambda: temperature(float("nan")), "got nan"),
        (lambda: top_k(0), "k >= 1, got 0"),
        (lambda: top_k(3, t=0), "temperature must be above 0, got 0"),
        (lambda: nucleus(0), "0 < p <= 1, got 0"),
        (lambda: nucleus(1.1), "0 < p <= 1, got 1.1"),
        (lambda: nucleus(0.9, t=-1), "temperature must be above 0, got -1"),
    ],
)
def test_impossible_choices_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- whole answers --------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("seed", range(3))
def test_cached_equals_uncached(kind, seed):
    model, batch = model_of(kind, seed), ragged(seed=seed)
    both = [generate(model, batch, 8, cached=cached) for cached in (True, False)]
    assert both[0] == both[1]
    beams = [beam_search(model, batch, 6, cached=cached) for cached in (True, False)]
    assert [ids for ids, _ in beams[0]] == [ids for ids, _ in beams[1]]
    np.testing.assert_allclose([s for _, s in beams[0]], [s for _, s in beams[1]], atol=1e-10)
    candidates = [[5, 6, EOC], [7], [EOC], [4, 4, 4, 4]]
    both = [log_likelihood(model, batch, candidates, cached=cached) for cached in (True, False)]
    np.testing.assert_allclose(both[0], both[1], atol=1e-11)
    drawn = [
        generate(model, batch, 6, temperature(2.0), cached, np.random.default_rng(seed))
        for cached in (True, False)
    ]
    assert drawn[0] == drawn[1]


@each_model
def test_greedy_takes_the_most_likely_token_of_each_row(kind):
    model, batch = model_of(kind), ragged()
    for b, answer in enumerate(generate(model, batch, 6)):
        ids = []
        while len(ids) < 6:
            row = whole(model, batch, b, ids)[-1]
            row[[PAD, BOS]] = -np.inf
            if ROWS[b].count("I") + ids.count(IMAGE) >= IMAGES[b]:
                row[IMAGE] = -np.inf
            if row.argmax() == EOC:
                break
            ids.append(int(row.argmax()))
        assert answer == ids


def test_some_answers_hold_images_some_end_early():
    """The comparisons above would show little if no row ever wrote <image> or <EOC>."""
    answers = [
        a for kind in MODELS for seed in range(3)
        for a in generate(model_of(kind, seed), ragged(seed=seed), 8)
    ]  # fmt: skip
    assert any(IMAGE in a for a in answers)
    assert any(len(a) < 8 for a in answers)
    assert any(len(a) == 8 for a in answers)


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_stops_at_eoc_and_the_others_go_on(cached):
    script = iter([[5, EOC, 6], [7, 8, EOC], [EOC, 9, 9]])
    choose = lambda logits, rng: np.array(next(script))  # noqa: E731
    batch = batch_of("b.", "b...", "b")
    assert generate(tiny(), batch, 9, choose, cached) == [[5, 7], [], [6]]
    script = iter([[5, EOC, 6], [7, 8, EOC], [9, 9, 9]])
    assert generate(tiny(), batch, 2, choose, cached) == [[5, 7], [], [6]]
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate(tiny(), batch, 0, choose, cached)


@each_model
@pytest.mark.parametrize("seed", range(2))
def test_a_beam_of_width_one_is_greedy(kind, seed):
    model, batch = model_of(kind, seed), ragged(seed=seed)
    beams = beam_search(model, batch, 6, width=1)
    assert [ids for ids, _ in beams] == generate(model, batch, 6)


def path_score(model, batch, b, ids):
    """Sum of the log-probabilities of ids, among the tokens that the decoder allows."""
    total, tags = 0.0, (batch.tokens[b] == IMAGE).sum()
    for row, i in zip(whole(model, batch, b, ids), ids):
        row[[PAD, BOS]] = -np.inf
        if tags >= batch.num_images[b]:
            row[IMAGE] = -np.inf
        total, tags = total + log_softmax(row)[i], tags + (i == IMAGE)
    return total


def exhaustive(model, batch, b, steps, V):
    """The most likely of all answers of at most `steps` tokens, and its score."""
    spare = batch.num_images[b] - (batch.tokens[b] == IMAGE).sum()
    allowed = [i for i in range(V) if i not in (PAD, BOS)]
    paths = {
        path[: path.index(EOC) + 1] if EOC in path else path
        for path in product(allowed, repeat=steps)
    }
    paths = [p for p in paths if p.count(IMAGE) <= spare]
    scores = [path_score(model, batch, b, list(p)) for p in paths]
    best = int(np.argmax(scores))
    return [i for i in paths[best] if i != EOC], scores[best]


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_the_vocabulary_searches_two_steps_exhaustively(seed):
    model = tiny(seed=seed, lm={"vocab_size": 7})
    model.lm.embedding.weight.data *= 3
    model.lm.head.weight.data *= 4
    batch = batch_of("b.eI.", "b..", "bI", images=(2, 0, 1), vocab=7, seed=seed)
    for b, (ids, score) in enumerate(beam_search(model, batch, 2, width=7)):
        best, its_score = exhaustive(model, batch, b, 2, 7)
        assert ids == best
        assert score == pytest.approx(its_score, abs=1e-9)


def reference_beam(model, batch, b, steps, width):
    """Beam search by lists: every beginning and its score, sorted, one row at a time."""
    beams, V = [((), 0.0)], model.config.lm.vocab_size
    spare = batch.num_images[b] - (batch.tokens[b] == IMAGE).sum()
    for _ in range(steps):
        grown = [(ids, score) for ids, score in beams if EOC in ids]
        for ids, _ in beams:
            for i in range(V) if EOC not in ids else ():
                if i not in (PAD, BOS) and (*ids, i).count(IMAGE) <= spare:
                    grown.append(((*ids, i), path_score(model, batch, b, [*ids, i])))
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return [i for i in beams[0][0] if i != EOC], beams[0][1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [2, 3])
def test_beam_search_equals_the_reference(seed, width):
    model, batch = model_of("alibi", seed), ragged(seed=seed)
    model.lm.head.weight.data[EOC] *= 3  # some beams end early
    for b, (ids, score) in enumerate(beam_search(model, batch, 4, width=width)):
        expected, its_score = reference_beam(model, batch, b, 4, width)
        assert ids == expected
        assert score == pytest.approx(its_score, abs=1e-9)


def test_a_wider_beam_finds_answers_that_greedy_misses():
    better = 0
    for seed in range(4):
        model, batch = model_of("alibi", seed), ragged(seed=seed)
        narrow, wide = (beam_search(model, batch, 5, width=width) for width in (1, 6))
        better += sum(w[1] > n[1] + 1e-6 for n, w in zip(narrow, wide))
    assert better > 0


@pytest.mark.parametrize("width", [6, 40])
def test_more_beams_than_there_are_continuations(width):
    """Beams that cannot be must not ask for images, nor be chosen."""
    model, batch = tiny(lm={"vocab_size": 6}), batch_of("b.", "bI", vocab=6)
    for ids, score in beam_search(model, batch, 3, width=width):
        assert np.isfinite(score)
        assert set(ids) <= {4, 5}


def test_beam_search_edges():
    model, batch = tiny(), batch_of("b.", "bI.")
    assert beam_search(model, batch, 0) == [([], 0.0)] * 2
    for width in (0, -1):
        with pytest.raises(ValueError, match=f"width >= 1, got {width}"):
            beam_search(model, batch, width=width)


def test_log_likelihood_is_the_sum_of_log_softmax():
    model, batch = model_of("alibi"), ragged()
    candidates = [[5, 6, EOC], [7], [EOC], [4, 4, 4, 4]]
    got = log_likelihood(model, batch, candidates)
    assert got.shape == (4, 4)
    for b, (c, ids) in product(range(4), enumerate(candidates)):
        logp = log_softmax(whole(model, batch, b, ids)[:-1])
        assert got[b, c] == pytest.approx(logp[np.arange(len(ids)), ids].sum(), abs=1e-10)


def test_likelihoods_of_all_next_tokens_add_up_to_one():
    got = log_likelihood(model_of("alibi"), ragged(), [[i] for i in range(V) if i != IMAGE])
    image = log_softmax(Decoder(model_of("alibi"), ragged(), 1).logits)[:, IMAGE]
    np.testing.assert_allclose(np.exp(got).sum(axis=1) + np.exp(image), 1)


def test_an_empty_candidate_is_an_error():
    with pytest.raises(ValueError, match=r"at least one token, got \[\[5\], \[\]\]"):
        log_likelihood(tiny(), batch_of("b."), [[5], []])


def test_float32_from_end_to_end():
    model, batch = tiny(dtype=np.float32), ragged()
    batch = Batch(**{**vars(batch), "pixels": batch.pixels.astype(np.float32)})
    for cached in (True, False):
        decoder = Decoder(model, batch, 2, cached)
        assert decoder.logits.dtype == decoder.extend(np.full((4, 1), 5)).dtype == np.float32
        assert log_likelihood(model, batch, [[5]], cached).dtype == np.float32
