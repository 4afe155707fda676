"""The table of dialects: each row's gated layer and resampler, wired as it says, with gradients."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from miniflamingo.checkpoints import load_model
from miniflamingo.checks import config_from_json, with_later
from miniflamingo.dialects import ACTIVATION_NAMES, DIALECTS, NORM_NAMES, BlockConfig, Dialect
from miniflamingo.efficientnet import EfficientNetConfig
from miniflamingo.eyes import NoEyeConfig
from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.functional import ACTIVATIONS, NORMS
from miniflamingo.language import LanguageConfig
from miniflamingo.perceiver import NoResampler, PerceiverResampler
from miniflamingo.vision import VisionConfig
from miniflamingo.vit import ViTConfig
from miniflamingo.xattn import GatedCrossAttentionDense
from tests.gradients import check_module, normal

VARIANTS = {
    **DIALECTS,
    "vector alpha": replace(DIALECTS["idefics"], vector_alpha=True, hidden=5),
    "shared keys": replace(DIALECTS["mllama"], kv_heads=1),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)
phi = np.array([[0, 1, 1, 2], [2, 2, 0, 1]])


def moved(module):
    """The module with every parameter away from its start: open gates, norms that do something."""
    for i, p in enumerate(module.parameters()):
        p.data = p.data + 0.3 * normal(*p.shape, seed=i)
    return module


def test_names_are_those_of_the_formulas():
    assert set(ACTIVATION_NAMES) == set(ACTIVATIONS)
    assert set(NORM_NAMES) == set(NORMS)


@each_variant
@pytest.mark.parametrize("only_last", [True, False])
def test_gated_layer(name, only_last):
    layer = GatedCrossAttentionDense(
        6, 4, 2, 4, only_last=only_last, dialect=VARIANTS[name], rng=np.random.default_rng(0)
    )
    check_module(moved(layer), normal(2, 4, 6), normal(2, 2, 3, 4), phi)


@each_variant
def test_a_shut_gate_is_the_identity(name):
    rng = np.random.default_rng(0)
    layer = GatedCrossAttentionDense(6, 4, 2, 4, dialect=VARIANTS[name], rng=rng)
    y = normal(2, 4, 6).astype(np.float32)
    np.testing.assert_array_equal(layer(y, normal(2, 2, 3, 4).astype(np.float32), phi), y)


@each_variant
def test_resampler(name):
    resampler = PerceiverResampler(
        4, 4, 3, 1, 2, 2, num_frames=2, dialect=VARIANTS[name], rng=np.random.default_rng(0)
    )
    check_module(moved(resampler), normal(2, 2, 2, 3, 4), num_frames=np.array([[2, 1], [2, 2]]))


def test_embeddings_of_the_place_in_the_sequence_are_counted():
    d = replace(DIALECTS["flamingo-pytorch"], media_embeddings=2)
    resampler = PerceiverResampler(4, 4, 3, 1, 2, 2, dialect=d, rng=np.random.default_rng(0))
    same = np.repeat(normal(1, 1, 1, 3, 4), 2, axis=1).astype(np.float32)
    out = resampler(same)
    assert np.abs(out[:, 0] - out[:, 1]).max() > 1e-3
    with pytest.raises(ValueError, match="embeds 2 images of a row, got 3"):
        resampler(normal(1, 3, 1, 3, 4))


def test_no_resampler():
    check_module(NoResampler(4, 6, rng=np.random.default_rng(0)), normal(2, 2, 2, 3, 4))
    x = normal(2, 2, 2, 3, 4)
    np.testing.assert_array_equal(NoResampler(4, 4, rng=None)(x), x.reshape(2, 2, 6, 4))
    with pytest.raises(ValueError, match="all clips have T = 2 frames"):
        NoResampler(4, 4, rng=None)(x, np.array([[2, 1], [2, 2]]))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"activation": "tanh"}, "activation must be one of relu, squared_relu"),
        ({"qk_norm": "batch"}, "qk_norm must be one of layer, rms, got 'batch'"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"gated": 1}, "gated must be bool, got 1"),
    ],
)
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        Dialect(**wrong)


def test_offset_must_lie_below_the_interval():
    with pytest.raises(ValueError, match=r"offset must be in 0\.\.1, got 2"):
        FlamingoConfig(xattn_every=2, dialect=Dialect(offset=2))
    config = FlamingoConfig(xattn_every=2, dialect=Dialect(offset=1), lm=LanguageConfig(depth=5))
    assert list(config.layers()) == [1, 3]
    assert len(Flamingo(config, rng=np.random.default_rng(0)).gated_xattn) == 2


@pytest.mark.parametrize(
    "eye", [VisionConfig(), ViTConfig(4, 2, 8, 1, 2, 12), EfficientNetConfig(64), NoEyeConfig(5)]
)
def test_a_config_comes_back_from_json(eye):
    lm = LanguageConfig(positions="rotary", block=BlockConfig("silu", True, kv_heads=2))
    config = FlamingoConfig(eye, lm, dialect=VARIANTS["vector alpha"])
    assert config_from_json(FlamingoConfig, json.dumps(asdict(config)), "here") == config


def test_a_model_with_another_eye_is_saved_and_loaded(tmp_path):
    eye, lm = EfficientNetConfig(32), LanguageConfig(dim=8, depth=1, heads=2)
    config = FlamingoConfig(eye, lm, 8, num_latents=2, resampler_depth=1, xattn_heads=1)
    model = Flamingo(config, rng=np.random.default_rng(0))
    model.save(tmp_path / "a.safetensors", {"flamingo": json.dumps(asdict(config))})
    loaded = load_model(tmp_path / "a.safetensors", "flamingo")
    tokens, pixels = (
        np.array([[3, 5]]),
        np.random.default_rng(0).random((1, 1, 1, 32, 32, 3), np.float32),
    )
    np.testing.assert_array_equal(loaded(tokens, pixels), model(tokens, pixels))


def test_a_config_from_before_the_options_is_the_papers():
    values = asdict(FlamingoConfig())
    for name in ("block", "rotary", "num_logits"):
        del values["lm"][name]
    del values["dialect"]
    assert config_from_json(FlamingoConfig, json.dumps(values), "here") == FlamingoConfig()
    assert with_later(values, FlamingoConfig()) == asdict(FlamingoConfig())
