"""The torch twins: the NumPy model's weights under the same names, and the same numbers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kernels import layers  # noqa: E402
from miniflamingo import Flamingo, FlamingoConfig  # noqa: E402

IMAGE = FlamingoConfig().image_token
CHANGES = {
    "plain": {},
    "own <EOC>": {"train_eoc": True},
    "all previous images": {"only_last": False},
    "text alone to the LM": {"skip_without_image": True},
    "every other layer": {"xattn_every": 2},
    "no spatial embeddings": {"spatial_embeddings": False},
}


def open_model(dtype, **changes):
    """A mini Flamingo with open gates, and a ragged batch: rows with 3, 2 and 0 images."""
    rng = np.random.default_rng(0)
    model = Flamingo(FlamingoConfig.preset("mini", **changes), rng=rng).astype(dtype)
    for layer in model.gated_xattn:
        layer.alpha_xattn.data, layer.alpha_dense.data = np.array([0.5, -0.7], dtype)
    tokens = rng.integers(4, 100, (3, 20))
    tokens[:2, [2, 9]], tokens[0, 10] = IMAGE, IMAGE
    pixels = rng.random((3, 3, 2, 24, 24, 3)).astype(dtype)
    sizes = {
        "num_images": np.array([3, 2, 0]),
        "num_frames": np.array([[1, 2, 2], [2, 1, 0], [0] * 3]),
    }
    return model, tokens, pixels, sizes


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-4)])
def test_one_checkpoint_gives_the_same_logits_on_both_sides(changes, dtype, tolerance):
    model, tokens, pixels, sizes = open_model(dtype, **changes)
    expected = model(tokens, pixels, **sizes)
    twin = layers.Flamingo.from_numpy(model)
    logits = twin(torch.from_numpy(tokens), torch.from_numpy(pixels), **sizes).detach().numpy()
    assert logits.dtype == dtype
    assert abs(logits - expected).max() <= tolerance * abs(expected).max()


def test_a_checkpoint_goes_there_and_back_unchanged():
    model, *_ = open_model(np.float32)
    twin = layers.Flamingo.from_numpy(model)
    state, back = model.state_dict(), twin.to_numpy()
    assert set(state) == set(back)
    assert all(np.array_equal(state[name], back[name]) for name in state)
    frozen = {name for name, p in twin.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_gradients_equal_the_hand_derived_ones():
    from miniflamingo.autograd import Tape
    from miniflamingo.functional import cross_entropy

    model, tokens, pixels, sizes = open_model(np.float64, train_eoc=True)
    with Tape() as tape:
        loss = cross_entropy(model(tokens, pixels, **sizes), tokens)
    tape.backward(loss)
    twin = layers.Flamingo.from_numpy(model)
    logits = twin(torch.from_numpy(tokens), torch.from_numpy(pixels), **sizes)
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(tokens).flatten()
    ).backward()
    own = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            np.testing.assert_allclose(
                own[name].grad, parameter.grad, rtol=1e-8, atol=1e-12, err_msg=name
            )


def test_the_fused_backend_gives_the_same_logits_and_gradients():
    pytest.importorskip("triton")
    model, tokens, pixels, sizes = open_model(np.float64)
    twin, results = layers.Flamingo.from_numpy(model), {}
    for backend in layers.BACKENDS:
        twin.zero_grad()
        logits = twin(torch.from_numpy(tokens), torch.from_numpy(pixels), **sizes, backend=backend)
        logits.square().mean().backward()
        grads = [p.grad for p in twin.parameters() if p.requires_grad]
        results[backend] = [logits.detach(), *grads]
    for plain, fused in zip(results["torch"], results["fused"], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


def test_a_phi_that_no_image_has_counts_as_none():
    q, phi = torch.randn(1, 2, 2, 8), torch.tensor([[0, 3]])
    k, v = torch.randn(2, 1, 2, 3, 2, 8)
    assert (layers.dense_image_causal_attention(q, k, v, phi) == 0).all()
    assert (layers.dense_image_causal_attention(q, k[:, :0], v[:, :0], phi * 0) == 0).all()


def test_a_row_without_images_stays_finite_and_untouched():
    q, phi = torch.randn(1, 5, 2, 8, requires_grad=True), torch.zeros(1, 5, dtype=torch.int32)
    k, v = torch.randn(2, 1, 2, 3, 2, 8)
    out = layers.dense_image_causal_attention(q, k, v, phi)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


def test_bad_input():
    layer = layers.GatedCrossAttentionDense(8, 8, 2, 4)
    y, media, phi = (
        torch.randn(1, 2, 8),
        torch.randn(1, 1, 3, 8),
        torch.ones(1, 2, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=r"backend must be one of .*'torch', 'fused'.* got 'cuda'"):
        layer(y, media, phi, backend="cuda")
    with pytest.raises(ValueError, match="perceiver resampler, got 'mlp'"):
        layers.Flamingo(FlamingoConfig.preset("mini", resampler="mlp"))
