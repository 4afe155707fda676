"""The Vision Transformer: sizes, options and gradients; interop/test_clip.py has CLIP's numbers."""

import numpy as np
import pytest

from miniflamingo.vit import VisionTransformer, ViTConfig
from tests.gradients import check_module, normal

SMALL = dict(image_size=4, patch_size=2, dim=8, depth=1, heads=2, hidden=12)


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "quick_gelu", "final_norm": True}, {"class_feature": False}],
    ids=["plain", "quick", "patches"],
)
def test_module(options):
    config = ViTConfig(**SMALL, **options)
    eye = VisionTransformer(config, rng=np.random.default_rng(0))
    pixels = np.abs(normal(2, 4, 4, 3)) % 1
    check_module(eye, pixels)
    assert eye(pixels).shape == (2, config.num_features, config.out_dim)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patch_size": 3}, "multiple of patch_size 3, got 4"),
        ({"heads": 3}, "multiple of heads, got 8 and 3"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"mean": (0.5,)}, "mean must have 3 elements"),
    ],
)
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**SMALL | wrong)
