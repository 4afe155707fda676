"""The formulas count what the real modules hold, multiply and keep."""

from dataclasses import replace

import numpy as np
import pytest

from miniflamingo.cost import counting
from miniflamingo.cost.counting import Flops, Sequence
from miniflamingo.flamingo import PRESETS, Flamingo, FlamingoConfig, count_parameters
from miniflamingo.language import LanguageConfig
from miniflamingo.vision import VisionConfig
from tests.cost.products import counted

MINI = PRESETS["mini"]
BOTTLENECK = VisionConfig(
    image_size=32, stem=(4, 8), stem_strides=(2, 1), widths=(8, 16), depths=(2, 1), strides=(1, 2),
    bottleneck=0.5, group_size=2, squeeze_excite=0.5, final_width=24, activation="gelu",
)  # fmt: skip
OTHER = FlamingoConfig(
    BOTTLENECK, LanguageConfig(50, 24, 4, 3, 2, "learned", max_positions=40), 16, num_latents=5,
    resampler_depth=3, resampler_heads=3, resampler_head_dim=7, num_frames=4,
    spatial_embeddings=False, xattn_every=2, xattn_heads=2, xattn_head_dim=9, train_eoc=True,
)  # fmt: skip
CONFIGS = {
    **PRESETS,
    "other": OTHER,
    "groups": replace(MINI, vision=VisionConfig(stem=(24,), widths=(48, 64), group_size=8)),
    "tied": replace(MINI, lm=replace(MINI.lm, tie_embeddings=True), train_eoc=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_built_model(name):
    assert counting.parameters(CONFIGS[name]) == count_parameters(CONFIGS[name])


@pytest.mark.parametrize("N, T", [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("name", ["mini", "other", "tied"])
def test_forward_flops_are_those_of_numpys_products(name, N, T):
    config, L, rng = CONFIGS[name], 12, np.random.default_rng(0)
    model, sequence = Flamingo(config, rng=rng), Sequence(L, N, T)
    size, expected = config.vision.image_size, counting.flops(config, sequence)
    pixels = rng.random((1, N, T, size, size, 3), np.float32)
    tokens, phi = rng.integers(4, 40, (1, L)), 1 + np.arange(L)[None] * N // L
    features = []
    part = {"vision_encoder": counted(model, lambda: features.append(model.encode(pixels)))}
    media = model.resampler(features[0])
    part["resampler"] = counted(model, lambda: model.resampler(features[0]))
    text = counted(model, lambda: model.read(tokens, media, phi))
    for name, number in part.items():
        assert number == expected[name].forward, name
    assert text == sum(expected[name].forward for name in ("gated_xattn", "lm", "head"))


@pytest.mark.parametrize("name", ["mini", "other", "tied"])
def test_backward_flops_are_those_that_torch_counts(name):
    """One image, because plain torch multiplies under a dense mask, with all visual tokens."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from miniflamingo.kernels.model import layers

    # with a trained `<EOC>` the first gated layer's input wants a gradient, as those of all others
    config, L = replace(CONFIGS[name], train_eoc=True), 12
    with torch.device("meta"):
        twin, size = layers.Flamingo(config), config.vision.image_size
        pixels, tokens = torch.zeros(1, 1, 1, size, size, 3), torch.zeros(1, L, dtype=int)
        features = twin.encode(pixels)
        with FlopCounterMode(display=False) as forward:
            media = twin.resampler(features, backend="torch")
            logits = twin.read(tokens, media, tokens, "torch", check=False)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    expected = counting.flops(config, Sequence(L, 1))
    expected.pop("vision_encoder")
    assert forward.get_total_flops() == sum(part.forward for part in expected.values())
    assert backward.get_total_flops() == sum(part.backward for part in expected.values())


def test_what_is_frozen_costs_a_third_less_than_what_learns():
    frozen, trained = (counting.product(7, 3, 5, trained) for trained in (False, True))
    assert frozen == Flops(210, 210, 210) and trained == Flops(210, 420, 210)
    assert counting.vision_flops(MINI, Sequence(1, 2)).backward == 0


def test_a_sequence_without_images_has_no_attention_to_them():
    with_image, without = (counting.gated_flops(MINI, Sequence(10, n)).forward for n in (1, 0))
    c, R = MINI, MINI.num_latents
    wide, layers = c.xattn_heads * c.xattn_head_dim, len(c.layers())
    assert with_image - without == layers * (4 * 10 * R * wide + 4 * R * c.media_dim * wide)


# --- what is kept ---------------------------------------------------------------------------------


def saved(module, work):
    """Numbers that torch's autograd saves in work(), each storage once, without parameters."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes = {}

    def pack(x):
        if x.dtype.is_floating_point and x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.itemsize
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = work()
    return sum(sizes.values()), out


def trained_block(config):
    """(module, work on 2 sequences of 32 tokens and an image, Kept of one sequence): the gated
    layer as the paper writes it, with torch's own attention."""
    import torch

    from miniflamingo.kernels.tools import peers

    c, s = config, Sequence(32, 1)
    sizes = dict(D=c.lm.dim, D_m=c.media_dim, H=c.xattn_heads, K=c.xattn_head_dim)
    layer = peers.block_module(sizes).to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)

    def attend(q, k, v, phi):
        q, k, v = (x.transpose(1, 2) for x in (q, k.flatten(1, 2), v.flatten(1, 2)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    y = torch.randn(2, s.tokens, c.lm.dim, requires_grad=True)
    media = torch.randn(2, 1, c.num_latents, c.media_dim, requires_grad=True)
    heads, weights = (c.xattn_heads, c.xattn_head_dim), list(layer.parameters())
    work = lambda: peers.block(attend, heads, peers.gate, y, media, None, *weights)  # noqa: E731
    return layer, work, counting.gated_block_kept(c, s)


def frozen_block(config):
    """The same of a block of the frozen language model."""
    import torch

    from miniflamingo.kernels.model import layers

    lm = layers.LanguageModel(config.lm).requires_grad_(False)
    x = torch.randn(2, 32, config.lm.dim, requires_grad=True)
    return lm.blocks[0], lambda: lm.blocks[0](x), counting.lm_block_kept(config, 32)


def resampler(config):
    """The same of the whole resampler, two images."""
    import torch

    from miniflamingo.kernels.model import layers

    module, s = layers.build_resampler(config), Sequence(32, 1)
    features = torch.randn(2, 1, 1, config.vision.num_features, config.vision.out_dim)
    expected = counting.resampler_layer_kept(config, s).times(config.resampler_depth)
    expected += counting.features_kept(config, s)
    return module, lambda: module(features, backend="torch"), expected


@pytest.mark.parametrize("build", [trained_block, frozen_block, resampler])
@pytest.mark.parametrize("name", ["mini", "other"])
def test_what_is_kept_is_about_what_torch_saves(build, name):
    """Not to the number: statistics of norms and softmax, a mask, and copies are torch's own."""
    pytest.importorskip("torch")
    config = CONFIGS[name]
    config = replace(config, lm=replace(config.lm, dim=96, heads=4))
    module, work, expected = build(config)
    number, _ = saved(module, work)
    assert 1 <= number / (2 * sum(expected)) < 1.04
