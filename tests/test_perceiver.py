"""The Perceiver, and the three resamplers: any number of features in, R visual tokens out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflamingo import attention as attention_room
from miniflamingo.autograd import Tape, Tensor
from miniflamingo.perceiver import (
    MLPResampler,
    Perceiver,
    PerceiverLayer,
    PerceiverResampler,
    TransformerResampler,
    time_weights,
)
from tests.gradients import check_module, normal

D_IN, D, R, TRAINED, S = 5, 8, 3, 4, 2
RESAMPLERS = {
    "perceiver": lambda **options: PerceiverResampler(
        D_IN, D, R, 2, 2, 4, 2, TRAINED, rng=np.random.default_rng(0), **options
    ),
    "transformer": lambda **options: TransformerResampler(
        D_IN, D, R, 2, 2, 2, TRAINED, rng=np.random.default_rng(0), **options
    ),
    "mlp": lambda **options: MLPResampler(
        D_IN, D, R, 2, 2, TRAINED, rng=np.random.default_rng(0), **{"num_features": S, **options}
    ),
}
each_kind = pytest.mark.parametrize("kind", RESAMPLERS)


def resampler(kind, **options):
    return RESAMPLERS[kind](**options).astype(np.float64)


# --- the Perceiver --------------------------------------------------------------------------------


def perceiver(depth=2, self_depth=2):
    return Perceiver(5, 8, 3, depth, self_depth, heads=2, rng=np.random.default_rng(0))


def test_perceiver():
    present = np.array([[True] * 6, [True] * 4 + [False] * 2])
    check_module(perceiver(), normal(2, 6, 5))
    check_module(perceiver(), normal(2, 6, 5), mask=present)


@given(st.integers(1, 3), st.integers(1, 20))
def test_perceiver_returns_its_latents_whatever_it_reads(B, M):
    assert perceiver()(normal(B, M, 5)).shape == (B, 3, 8)


def test_perceiver_looks_only_at_what_the_mask_allows():
    model, x = perceiver().astype(np.float64), normal(2, 6, 5)
    present = np.array([[True] * 6, [True] * 4 + [False] * 2])
    out = model(x, present)
    x[1, 4:] = 1e3
    np.testing.assert_array_equal(model(x, present), out)
    np.testing.assert_allclose(out[1:], model(x[1:, :4]), atol=1e-12)
    x[1, 3, 0] += 1
    assert (model(x, present)[1] != out[1]).all()


def test_perceiver_reads_a_set():
    model, x = perceiver().astype(np.float64), normal(1, 6, 5)
    np.testing.assert_allclose(model(x[:, ::-1]), model(x), atol=1e-12)


def shapes_of_attention(monkeypatch, run):
    """(queries, keys) of every attention that `run()` computes."""
    seen, formula = [], attention_room.attention

    def spy(q, k, v, **options):
        seen.append((q.shape[-2], k.shape[-2]))
        return formula(q, k, v, **options)

    monkeypatch.setattr(attention_room, "attention", spy)
    run()
    return seen


@pytest.mark.parametrize("self_depth", [0, 1, 4])
def test_only_the_cross_attentions_see_the_inputs(monkeypatch, self_depth):
    model = perceiver(2, self_depth)
    seen = shapes_of_attention(monkeypatch, lambda: model(normal(1, 50, 5)))
    assert seen == [(3, 50), *[(3, 3)] * self_depth] * 2


def test_perceiver_layer_appends_the_latents_where_asked(monkeypatch):
    for append, keys in ((True, 9), (False, 6)):
        layer = PerceiverLayer(8, 8, 2, 4, append_latents=append, rng=np.random.default_rng(0))
        run = lambda layer=layer: layer(normal(1, 3, 8), normal(1, 6, 8))  # noqa: E731
        assert shapes_of_attention(monkeypatch, run) == [(3, keys)]


# --- all resamplers -------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("ragged", [False, True])
def test_resampler(kind, ragged):
    features = normal(2, 2, 3, S, D_IN)
    num_frames = np.array([[3, 1], [2, 0]]) if ragged else None
    check_module(resampler(kind, num_features=S), features, num_frames)


@each_kind
@given(st.integers(1, 2), st.integers(0, 3), st.integers(1, 9), st.integers(1, 4))
def test_any_clip_becomes_R_tokens(kind, B, N, T, S):
    options = {"num_features": S} if kind == "mlp" else {}
    features = normal(B, N, T, S, D_IN).astype(np.float32)
    out = RESAMPLERS[kind](**options)(features)
    assert (out.shape, out.dtype) == ((B, N, R, D), np.float32)
    assert np.isfinite(out).all()


def test_the_perceiver_resampler_is_the_papers_pseudo_code():
    model, features = resampler("perceiver"), normal(1, 2, 3, S, D_IN)
    for n in range(2):
        x_f = features[0, n] @ model.input_proj.weight.data.T  # [T, S, D]
        x_f = (x_f + model.time_embeddings.data[:3, None]).reshape(1, 3 * S, D)
        x = model.latents.data[None]
        for layer in model.layers:
            queries = layer.latent_norm(x)
            keys = np.concatenate([layer.input_norm(x_f), queries], axis=1)
            x = x + layer.attention(queries, keys)
            x = x + layer.ffw(x)
        np.testing.assert_allclose(model(features)[0, n], model.final_norm(x)[0], atol=1e-12)


@each_kind
def test_images_do_not_mix(kind):
    model, features = resampler(kind), normal(2, 3, 2, S, D_IN)
    out = model(features)
    features[1, 0] += 1
    changed = (model(features) != out).any(axis=(2, 3))
    np.testing.assert_array_equal(changed, [[False] * 3, [True, False, False]])


@each_kind
def test_the_order_of_frames_matters_through_time_embeddings_alone(kind):
    model, features = resampler(kind), normal(1, 1, 3, S, D_IN)
    reverse = features[:, :, ::-1]
    assert np.abs(model(features) - model(reverse)).max() > 1e-3
    model.time_embeddings.data[:] = 0
    np.testing.assert_allclose(model(features), model(reverse), atol=1e-12)


@pytest.mark.parametrize("kind", ["perceiver", "transformer"])
def test_the_order_of_places_matters_through_spatial_embeddings_alone(kind):
    features = normal(1, 1, 2, S, D_IN)
    swapped = features[:, :, :, ::-1]
    paper, spatial = resampler(kind), resampler(kind, num_features=S)
    np.testing.assert_allclose(paper(features), paper(swapped), atol=1e-12)
    assert np.abs(spatial(features) - spatial(swapped)).max() > 1e-3
    assert paper.spatial_embeddings is None


@each_kind
def test_padded_frames_never_matter(kind):
    model, features = resampler(kind), normal(2, 2, 6, S, D_IN)
    num_frames = np.array([[6, 2], [1, 5]])
    out = model(features, num_frames)
    for b, n in np.ndindex(2, 2):
        clip = features[b : b + 1, n : n + 1, : num_frames[b, n]]
        np.testing.assert_allclose(out[b, n], model(clip)[0, 0], atol=1e-12)
        features[b, n, num_frames[b, n] :] = 1e3
    np.testing.assert_array_equal(model(features, num_frames), out)
    full = np.full((2, 2), 6)
    np.testing.assert_allclose(model(features, full), model(features), atol=1e-12)


@each_kind
def test_an_image_without_frames_is_finite(kind):
    features = np.zeros((1, 2, 2, S, D_IN), np.float32)
    assert np.isfinite(RESAMPLERS[kind]()(features, np.array([[2, 0]]))).all()


@each_kind
def test_final_norm_and_input_projection_are_options(kind):
    out = resampler(kind)(normal(1, 1, 2, S, D_IN))
    np.testing.assert_allclose(out.mean(axis=-1), 0, atol=1e-12)
    np.testing.assert_allclose(out.std(axis=-1), 1, atol=3e-2)
    assert resampler(kind, final_norm=False).final_norm is None
    heads = {} if kind == "mlp" else {"heads": 2}
    same = type(resampler(kind))(D, D, num_features=S, rng=np.random.default_rng(0), **heads)
    assert same.input_proj is None
    names = {name.split(".")[0] for name, _ in resampler(kind).named_parameters()}
    assert {"input_proj", "time_embeddings", "final_norm"} <= names


@pytest.mark.parametrize("wrong", [[[1, 2]], [[3, 1], [0, 1]], [[-1, 1], [0, 1]], [1, 2]])
@each_kind
def test_num_frames_that_do_not_fit(kind, wrong):
    with pytest.raises(ValueError, match=r"int \[B, N\] = \[2, 2\] within 0\.\.2 frames, got"):
        resampler(kind)(normal(2, 2, 2, S, D_IN), np.array(wrong))


def test_the_mlp_must_know_the_number_of_features():
    with pytest.raises(ValueError, match="needs num_features"):
        MLPResampler(D_IN, D, rng=np.random.default_rng(0))


def test_each_layer_reads_features_and_latents(monkeypatch):
    features = normal(1, 1, 3, S, D_IN)
    for kind, queries in (("perceiver", R), ("transformer", R + 3 * S)):
        model = resampler(kind)
        seen = shapes_of_attention(monkeypatch, lambda model=model: model(features))
        assert seen == [(queries, R + 3 * S)] * 2


# --- time -----------------------------------------------------------------------------------------


def test_short_clips_use_the_first_embeddings():
    np.testing.assert_array_equal(time_weights(3, 3, 8), np.eye(8)[:3])
    np.testing.assert_array_equal(time_weights(8, 8, 8), np.eye(8))


def test_thirty_frames_between_eight_embeddings_end_on_ends():
    weights = time_weights(30, 30, 8)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights @ np.arange(8), np.linspace(0, 7, 30))  # linear in time
    np.testing.assert_allclose(weights[[0, -1]], np.eye(8)[[0, 7]], atol=1e-12)
    assert (np.count_nonzero(weights > 1e-12, axis=1) <= 2).all()  # neighbours only


@given(st.integers(1, 9), st.integers(1, 30))
def test_time_weights_are_those_of_numpys_interpolation(trained, frames):
    table = normal(trained, 2)
    if frames <= trained:
        expected = table[:frames]
    else:
        at = np.linspace(0, trained - 1, frames)
        expected = np.stack([np.interp(at, np.arange(trained), c) for c in table.T], axis=1)
    np.testing.assert_allclose(time_weights(frames, frames, trained) @ table, expected, atol=1e-9)


def test_each_clip_of_a_batch_has_its_own_clock():
    weights = time_weights(np.array([[2, 7]]), 7, 4)
    np.testing.assert_array_equal(weights[0, 0, :2], time_weights(2, 2, 4))
    np.testing.assert_array_equal(weights[0, 1], time_weights(7, 7, 4))


# --- masked means unseen --------------------------------------------------------------------------


def gradients(module, x, *rest):
    """The output, and the gradient of x and of every parameter."""
    for _, p in module.named_parameters():
        p.grad = None
    x = Tensor(x)
    with Tape() as tape:
        out = module(x, *rest)
        loss = (out * out).sum()
    tape.backward(loss)
    return [out.data, x.grad, *(p.grad for _, p in module.named_parameters())]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [*RESAMPLERS, "Perceiver"])
def test_what_is_padded_reaches_no_output_and_no_gradient(kind, bad):
    if kind == "Perceiver":
        module = Perceiver(D_IN, D, R, heads=2, rng=np.random.default_rng(0)).astype(np.float64)
        x, lengths = normal(2, 6, D_IN), np.array([4, 0])
        padded = np.arange(6) >= lengths[:, None]
        rest = (~padded,)
    else:
        module, x = resampler(kind), normal(2, 2, 3, S, D_IN)
        rest = (np.array([[1, 3], [2, 0]]),)
        padded = np.arange(3) >= rest[0][..., None]
    expected = gradients(module, x, *rest)
    x[padded] = bad
    for ours, clean in zip(gradients(module, x, *rest), expected, strict=True):
        np.testing.assert_array_equal(ours, clean)
