"""The Vision Transformer (Dosovitskiy et al., 2021) as CLIP trains it: the eye of public Flamingos.

    patches -> linear -> [class token, patches] + positions -> norm -> blocks -> features

Letters: B images, S features of an image (the class token first), D_v their width.
"""

from dataclasses import dataclass

import numpy as np

from miniflamingo.attention import TransformerBlock
from miniflamingo.autograd import array_of
from miniflamingo.checks import (
    check_above_zero,
    check_at_least,
    check_lengths,
    check_range,
    check_types,
)
from miniflamingo.dialects import ACTIVATION_NAMES, check_one_of
from miniflamingo.functional import LayerNorm, broadcast_to, concat, norm_named
from miniflamingo.module import Module, Parameter
from miniflamingo.vision import conv2d

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer; the defaults are CLIP's ViT-H/14.

    mean and std normalise the pixels. The features are the last block's output, after a last norm
    where final_norm is set, with the class token's first unless class_feature is not. ValueError
    for a value that cannot work.
    """

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    depth: int = 32
    heads: int = 16
    hidden: int = 5120
    activation: str = "gelu_exact"
    norm_eps: float = 1e-5
    class_feature: bool = True
    final_norm: bool = False
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        check_types(self)
        check_range(self, 1, 4096, "image_size")
        check_at_least(self, 1, "patch_size", "dim", "depth", "heads", "hidden")
        check_one_of(self, ACTIVATION_NAMES, "activation")
        check_lengths(self, 3, "mean", "std")
        check_above_zero(self, "norm_eps")
        check_range(self, 1e-6, 1e6, "std")
        if self.image_size % self.patch_size:
            size, patch = self.image_size, self.patch_size
            raise ValueError(f"image_size must be a multiple of patch_size {patch}, got {size}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")

    @property
    def out_dim(self):
        """D_v, the width of a visual feature."""
        return self.dim

    @property
    def num_features(self):
        """S, the number of features of one frame."""
        return self.num_tokens - (not self.class_feature)

    @property
    def num_tokens(self):
        """The patches and the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2


class VisionTransformer(Module):
    """Images -> the features of their patches, each having looked at all others."""

    def __init__(self, config, *, rng):
        c = self.config = config

        def draw(*shape):
            return Parameter(rng.normal(0, 0.02, shape).astype(np.float32, copy=False))

        self.patch = draw(c.dim, 3, c.patch_size, c.patch_size)
        self.class_token, self.positions = draw(c.dim), draw(c.num_tokens, c.dim)
        norm = norm_named("layer", c.norm_eps)
        self.pre_norm = norm(c.dim)
        self.blocks = [
            TransformerBlock(c.dim, c.heads, c.hidden, c.activation, norm, bias=True, rng=rng)
            for _ in range(c.depth)
        ]
        self.final_norm = LayerNorm(c.dim, c.norm_eps) if c.final_norm else None

    def forward(self, pixels):
        """[B, height, width, 3] in [0, 1] -> features [B, S, D_v]."""
        dtype, D = array_of(pixels).dtype, self.config.dim
        mean, std = (np.array(x, dtype) for x in (self.config.mean, self.config.std))
        x = conv2d((pixels - mean) * (1 / std), self.patch, stride=self.config.patch_size)
        first = broadcast_to(self.class_token, len(x), 1, D)
        x = self.pre_norm(concat(first, x.reshape(len(x), -1, D), axis=1) + self.positions)
        for block in self.blocks:
            x = block(x)
        x = x if self.config.class_feature else x[:, 1:]
        return x if self.final_norm is None else self.final_norm(x)
