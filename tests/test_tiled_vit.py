"""The tiled Vision Transformer: sizes, gradients, what its tiles see, and media side by side;
interop/test_mllama.py has transformers' numbers."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from miniflamingo.attention import attention
from miniflamingo.checks import config_from_json
from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.language import LanguageConfig
from miniflamingo.tiled_vit import TiledViT, TiledViTConfig, beside, grids_of
from tests.gradients import check_module, normal

SMALL = dict(image_size=4, patch_size=2, dim=8, depth=2, gated_depth=1, heads=2, hidden=12,
             max_tiles=2, levels=(1, 0))  # fmt: skip


def opened(**changes):
    """A small eye in float64 whose gates are open, and whose embeddings are so large that a norm
    of them is no curve for a central difference."""
    eye = TiledViT(TiledViTConfig(**SMALL | changes), rng=np.random.default_rng(0))
    eye.astype(np.float64)
    for i, (name, p) in enumerate(eye.named_parameters()):
        if name.split(".")[-1].startswith("gate_"):
            p.data = np.array(0.4 + 0.02 * i)
        elif "." not in name:
            p.data = 30 * p.data
    return eye


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1)])
def test_module(grid):
    eye, pixels = opened(), np.abs(normal(2, 4 * grid[0], 4 * grid[1], 3)) % 1
    check_module(eye, pixels)
    assert eye(pixels).shape == (2, 5 * grid[0] * grid[1], 8 * 3) == (
        2, grid[0] * grid[1] * eye.config.num_tokens, eye.config.out_dim)  # fmt: skip


def test_without_levels_and_gated_blocks():
    eye = opened(levels=(), gated_depth=0)
    assert eye(np.zeros((1, 4, 8, 3))).shape == (1, 10, 8)


def test_shut_gates_know_no_tiles():
    """At the start two equal tiles are told apart by nothing."""
    eye = TiledViT(TiledViTConfig(**SMALL), rng=np.random.default_rng(0)).astype(np.float64)
    tile = np.abs(normal(1, 4, 4, 3)) % 1
    left, right = np.split(eye(np.concatenate([tile, tile], axis=2)), 2, axis=1)
    np.testing.assert_allclose(left, right, atol=1e-12)
    eye = opened()
    left, right = np.split(eye(np.concatenate([tile, tile], axis=2)), 2, axis=1)
    assert abs(left - right).max() > 1e-3


def test_what_is_empty_is_hidden_from_what_is_empty_alone():
    mask = opened().mask(1, 8).reshape(2, 8, 2, 8)
    real = np.zeros((2, 8), bool)
    real[0, :5] = True
    for place in np.ndindex(2, 8):
        assert (mask[place] == (True if real[place] else real)).all()


def test_grids_are_in_the_order_of_their_embeddings():
    assert grids_of(4) == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


@pytest.mark.parametrize("tokens", [(3, 3), (4, 2), (2, 3, 6)])
def test_media_beside_one_another_are_attended_to_as_alone(tokens):
    media = [normal(2, 1, R, 4, seed=R) for R in tokens]
    whole = beside(*media)
    assert whole.shape[1] == len(tokens)
    q = normal(2, 5, 4)
    for i, x in enumerate(media):
        alone, among = (attention(q, y, y) for y in (x[:, 0], whole[:, i]))
        np.testing.assert_allclose(among, alone, atol=1e-14)


def test_a_flamingo_takes_canvases_and_comes_back_from_json():
    lm = LanguageConfig(dim=8, depth=1, heads=2)
    config = FlamingoConfig(TiledViTConfig(**SMALL), lm, 8, "none", spatial_embeddings=False)
    assert config_from_json(FlamingoConfig, json.dumps(asdict(config)), "here") == config
    model = Flamingo(config, rng=np.random.default_rng(0))
    tokens = np.array([[3, 5, 6]])
    assert model(tokens, np.zeros((1, 1, 1, 8, 4, 3), np.float32)).shape == (1, 3, 128)
    for shape in ((1, 1, 1, 8, 8, 3), (1, 1, 1, 6, 4, 3)):
        with pytest.raises(ValueError, match=r"\[..., 4, 4, 3\], or up to 2 such tiles, got"):
            model(tokens, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patch_size": 3}, "multiple of patch_size 3, got 4"),
        ({"heads": 3}, "multiple of heads, got 8 and 3"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"levels": (2,)}, r"levels must be in 0\.\.1"),
        ({"max_tiles": 0}, r"max_tiles must be in 1\.\.64"),
        ({"mean": (0.5,)}, "mean must have 3 elements"),
    ],
)
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        TiledViTConfig(**SMALL | wrong)
