"""NumPy = torch twin = fused kernels for every dialect of the table, with one checkpoint."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from miniflamingo.autograd import Tape, Tensor  # noqa: E402
from miniflamingo.dialects import DIALECTS, BlockConfig  # noqa: E402
from miniflamingo.efficientnet import EfficientNetConfig, EfficientNetLite  # noqa: E402
from miniflamingo.eyes import NoEyeConfig  # noqa: E402
from miniflamingo.flamingo import Flamingo, FlamingoConfig  # noqa: E402
from miniflamingo.kernels.model import layers  # noqa: E402
from miniflamingo.language import LanguageConfig  # noqa: E402
from miniflamingo.perceiver import PerceiverResampler  # noqa: E402
from miniflamingo.rotary import RotaryConfig  # noqa: E402
from miniflamingo.vit import ViTConfig  # noqa: E402
from miniflamingo.xattn import GatedCrossAttentionDense  # noqa: E402
from tests.gradients import dout_like, normal  # noqa: E402

VARIANTS = {
    **DIALECTS,
    "vector alpha": replace(DIALECTS["idefics"], vector_alpha=True, hidden=5),
    "resampler norms": replace(DIALECTS["idefics"], resampler_qk_norm="layer"),
    "shared keys": replace(DIALECTS["mllama"], kv_heads=1),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)
each_backend = pytest.mark.parametrize("backend", ["torch", "fused"])
PHI = np.array([[0, 1, 1, 2, 2], [2, 2, 0, 1, 0]])


def moved(module):
    """In float64, every parameter away from its start."""
    for i, p in enumerate(module.astype(np.float64).unfreeze().parameters()):
        p.data = p.data + 0.3 * normal(*p.shape, seed=i)
    return module


def agree(ours, twin, inputs, call_ours, call_twin):
    """The same output and gradients, of all inputs and parameters."""
    tensors = [Tensor(x) for x in inputs]
    with Tape() as tape:
        out = call_ours(ours, *tensors)
    tape.backward(out, dout_like(out.data))
    twin.double().load_state_dict(
        {n: torch.from_numpy(np.array(x)) for n, x in ours.state_dict().items()}
    )
    twin.requires_grad_(True)
    theirs = [torch.from_numpy(x.copy()).requires_grad_() for x in inputs]
    result = call_twin(twin, *theirs)
    result.backward(torch.from_numpy(dout_like(out.data)))
    np.testing.assert_allclose(result.detach(), out.data, rtol=1e-9, atol=1e-11)
    for x, y in zip(tensors, theirs, strict=True):
        np.testing.assert_allclose(y.grad, x.grad, rtol=1e-8, atol=1e-11)
    grads = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in ours.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(grads[name], p.grad, 1e-8, 1e-10, err_msg=name)


def needs(backend):
    if backend == "fused":
        pytest.importorskip("triton")


@each_variant
@each_backend
def test_gated_layer(name, backend):
    needs(backend)
    sizes, d = (6, 4, 2, 4), VARIANTS[name]
    agree(
        moved(GatedCrossAttentionDense(*sizes, dialect=d, rng=np.random.default_rng(0))),
        layers.GatedCrossAttentionDense(*sizes, dialect=d),
        [normal(2, 5, 6), normal(2, 2, 3, 4)],
        lambda m, y, media: m(y, media, PHI),
        lambda m, y, media: m(y, media, torch.from_numpy(PHI), backend),
    )


@each_variant
@each_backend
def test_resampler(name, backend):
    needs(backend)
    d, frames = VARIANTS[name], np.array([[2, 1], [2, 2]])
    rng, num_frames = np.random.default_rng(0), 2
    agree(
        moved(PerceiverResampler(4, 4, 3, 2, 2, 2, 4, num_frames, dialect=d, rng=rng)),
        layers.PerceiverResampler(4, 4, 3, 2, 2, 2, num_frames, dialect=d),
        [normal(2, 2, 2, 3, 4)],
        lambda m, x: m(x, frames),
        lambda m, x: m(x, frames, backend),
    )


@pytest.mark.parametrize("L", [1, 5])
def test_shared_keys_without_gradients(L):
    """One token a row is what decoding does; its kernel has no shared keys, the other has."""
    pytest.importorskip("triton")
    layer = moved(GatedCrossAttentionDense(
        6, 4, 4, 4, dialect=VARIANTS["shared keys"], rng=np.random.default_rng(0)
    ))  # fmt: skip
    twin = layers.GatedCrossAttentionDense(6, 4, 4, 4, dialect=VARIANTS["shared keys"]).double()
    twin.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in layer.state_dict().items()})
    y, media, phi = normal(2, L, 6), normal(2, 2, 3, 4), PHI[:, 1 : L + 1] if L == 1 else PHI
    with torch.no_grad():
        out = twin(*map(torch.from_numpy, (y, media, phi)), "fused")
    np.testing.assert_allclose(out, layer(y, media, phi), atol=1e-12)


LLAMA = LanguageConfig(
    50, 16, 4, 4, positions="rotary", block=BlockConfig("silu", True, 20, kv_heads=2),
    rotary=RotaryConfig(100.0, "llama3", 2.0, original_length=8),
)  # fmt: skip
OPT = LanguageConfig(
    50, 16, 2, 4, positions="learned", max_positions=9, tie_embeddings=True,
    block=BlockConfig("relu", norm="layer", bias=True),
)  # fmt: skip
EYE = ViTConfig(4, 2, 6, 1, 2, 8, "quick_gelu")
PERCEIVER = dict(num_latents=3, resampler_depth=1, resampler_heads=2, resampler_head_dim=4)
XATTN = dict(xattn_heads=4, xattn_head_dim=4, spatial_embeddings=False)
WHOLE = {
    "idefics": FlamingoConfig(
        EYE, LLAMA, 6, **PERCEIVER, **XATTN, xattn_every=2, dialect=VARIANTS["vector alpha"]
    ),
    "open-flamingo": FlamingoConfig(
        replace(EYE, class_feature=False, final_norm=True), OPT, 6, **PERCEIVER, **XATTN,
        xattn_every=2, dialect=replace(DIALECTS["open-flamingo"], offset=1),
    ),
    "mllama": FlamingoConfig(
        EYE, replace(LLAMA, num_logits=40), 16, "none", **XATTN, skip_without_image=True,
        xattn_every=2, dialect=replace(DIALECTS["mllama"], kv_heads=2, offset=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@each_backend
def test_whole_model(name, backend):
    needs(backend)
    config, rng = WHOLE[name], np.random.default_rng(0)
    tokens, pixels = rng.integers(4, 50, (2, 8)), rng.random((2, 2, 1, 4, 4, 3))
    tokens[0, [1, 4]] = tokens[1, 3] = config.image_token
    sizes = {"num_images": np.array([2, 1])}
    agree(
        moved(Flamingo(config, rng=rng)), layers.Flamingo(config), [],
        lambda m: m(tokens, pixels, **sizes),
        lambda m: m(*map(torch.from_numpy, (tokens, pixels)), **sizes, backend=backend),
    )  # fmt: skip


def test_there_and_back_with_gates_of_vectors():
    model = moved(Flamingo(WHOLE["idefics"], rng=np.random.default_rng(0)))
    back = layers.Flamingo.from_numpy(model).to_numpy()
    assert all(np.array_equal(back[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("size", (32, 96))
def test_efficientnet_s_twin(size):
    config, rng = EfficientNetConfig(size), np.random.default_rng(0)
    ours = EfficientNetLite(config, rng=rng).astype(np.float64)
    theirs = layers.EfficientNetLite(config)
    state = {name: torch.from_numpy(x) for name, x in ours.state_dict().items()}
    theirs.double().load_state_dict(state)
    pixels = rng.random((2, size, size, 3))
    expected, found = ours(pixels), theirs(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-10)
    grid = theirs.grid(torch.from_numpy(pixels)).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(theirs.widen(grid).detach().numpy(), expected, atol=1e-10)


def test_no_eye_has_no_pixels():
    twin = layers.Flamingo(FlamingoConfig(NoEyeConfig(4), lm=LLAMA))
    with pytest.raises(ValueError, match="this Flamingo has no eye"):
        twin.encode(torch.zeros(1, 1, 1, 4, 4, 3))


def in_steps(read, tokens, first=3):
    """The logits of tokens [B, L] read in parts: the first ones, then one at a time."""
    ends = [first, *range(first + 1, tokens.shape[1] + 1)]
    return torch.cat([read(a, b) for a, b in zip([0, *ends], ends)], dim=1)


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["rotary", "learned"])
@torch.no_grad()
def test_a_cached_language_model_is_the_uncached(config):
    twin = layers.LanguageModel(config).double()
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    cache = layers.KeyValueCache.of(twin, 2, 8)
    out = in_steps(lambda a, b: twin(tokens[:, a:b], cache), tokens)
    torch.testing.assert_close(out, twin(tokens), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(twin(tokens, last=True), out[:, -1:])


@pytest.mark.parametrize("name", WHOLE)
@each_backend
@torch.no_grad()
def test_a_cached_flamingo_is_the_uncached(name, backend):
    needs(backend)
    twin = layers.Flamingo.from_numpy(moved(Flamingo(WHOLE[name], rng=np.random.default_rng(0))))
    c = WHOLE[name]
    media = torch.from_numpy(normal(2, 2, 3, c.media_dim))
    tokens = torch.randint(4, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    phi, cache = torch.from_numpy(PHI), layers.Cache.of(twin, media, 5)
    read = lambda a, b: twin.read(tokens[:, a:b], media, phi[:, a:b], backend, cache=cache)  # noqa: E731
    expected = twin.read(tokens, media, phi, "torch")
    torch.testing.assert_close(in_steps(read, tokens), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(twin.read(tokens, media, phi, last=True), expected[:, -1:])
