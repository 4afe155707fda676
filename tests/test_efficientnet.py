"""EfficientNet-Lite0: its depthwise convolution and padding against torch, its blocks by slopes."""

import numpy as np
import pytest

from miniflamingo.efficientnet import (
    EfficientNetConfig,
    EfficientNetLite,
    InvertedResidual,
    depthwise_conv2d,
    pad_same,
)
from tests.gradients import Case, check_module, each_of, normal

x = normal(2, 6, 5, 3)


def depthwise(torch, x, weight, bias, stride=1):
    out = torch.nn.functional.conv2d(x.movedim(-1, 1), weight, bias, stride, groups=len(weight))
    return out.movedim(1, -1)


def padded(torch, x, k, stride=1):
    rows, columns = (max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[1:3])
    pads = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return torch.nn.functional.pad(x, (0, 0, *pads))


CASES = [
    Case(depthwise_conv2d, (x, normal(3, 1, 3, 3), normal(3)), depthwise),
    Case(depthwise_conv2d, (x, normal(3, 1, 3, 3), normal(3)), depthwise, {"stride": 2}, "by 2"),
    Case(pad_same, (x,), padded, {"k": 3}),
    Case(pad_same, (x,), padded, {"k": 5, "stride": 2}, "odd"),
]


@each_of(CASES)
def test_formula(case, check):
    check(case)


@pytest.mark.parametrize("stride, width, widening", [(1, 4, 2), (2, 6, 1)])
def test_block(stride, width, widening):
    block = InvertedResidual(4, width, 3, stride, widening, rng=np.random.default_rng(0))
    for i, p in enumerate(block.parameters()):  # a bias of 0 lies on relu6's kink, at the edges
        p.data = p.data + normal(*p.shape, seed=i)
    check_module(block, normal(1, 4, 4, 4))


def test_features_are_a_grid_of_1280_channels():
    config = EfficientNetConfig(image_size=64)
    eye = EfficientNetLite(config, rng=np.random.default_rng(0))
    features = eye(np.random.default_rng(0).random((2, 64, 64, 3), np.float32))
    assert features.shape == (2, config.num_features, config.out_dim) == (2, 4, 1280)
    assert features.dtype == np.float32
    assert eye.num_parameters() == 3_350_000


@pytest.mark.parametrize("wrong", [{"image_size": 100}, {"std": (1.0, 0.0, 1.0)}, {"mean": (0.5,)}])
def test_config_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EfficientNetConfig(**wrong)
