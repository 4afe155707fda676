"""The tiled Vision Transformer of Llama 3.2 Vision (Meta, 2024): pictures larger than its images.

    canvas -> tiles -> patches -> [class token, patches] + where in the tile, + which tile
           -> blocks, over all tiles at once -> + which tile -> gated blocks
    features = the last block's output beside those of some earlier blocks (levels)

A canvas is a grid of 1 to `max_tiles` tiles. Its grid, one of `grids`, has embeddings of its own
for each of its tiles. The eye always computes on max_tiles, of which those that a canvas lacks are
empty, and each tile has empty patches behind its own, up to a multiple of 8. What is empty is
hidden from what is empty alone: a real patch looks at all, as the weights have learnt it.

Letters: B canvases, t their tiles, A grids, P patches of a tile and S with its class token, D the
width of a block, D_v that of a feature: D (1 + levels).
"""

from dataclasses import dataclass
from math import lcm, pi

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
from miniflamingo.functional import broadcast_to, concat, norm_named
from miniflamingo.module import Module, Parameter
from miniflamingo.vision import conv2d
from miniflamingo.xattn import tanh_gate

HALF = (0.5, 0.5, 0.5)
MULTIPLE = 8  # of which a tile has patches, the empty ones among them


def grids_of(tiles):
    """The grids (rows, columns) of at most so many tiles, in the order of their embeddings."""
    sides = range(1, tiles + 1)
    return tuple((r, c) for r in sides for c in sides if r * c <= tiles)


@dataclass(frozen=True)
class TiledViTConfig:
    """A tiled Vision Transformer; the defaults are those of Llama 3.2 Vision 11B.

    image_size is the side of a tile; levels are the blocks (from 0) whose outputs are features,
    too; mean and std normalise the pixels. ValueError for a value that cannot work.
    """

    image_size: int = 560
    patch_size: int = 14
    dim: int = 1280
    depth: int = 32
    gated_depth: int = 8
    heads: int = 16
    hidden: int = 5120
    activation: str = "gelu_exact"
    norm_eps: float = 1e-5
    max_tiles: int = 4
    levels: tuple[int, ...] = (3, 7, 15, 23, 30)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    num_features = None  # of a canvas: it depends on its grid

    def __post_init__(self):
        check_types(self)
        check_range(self, 1, 4096, "image_size")
        check_range(self, 1, 64, "max_tiles")
        check_at_least(self, 1, "patch_size", "dim", "depth", "heads", "hidden")
        check_at_least(self, 0, "gated_depth")
        check_range(self, 0, self.depth - 1, "levels")
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
    def grids(self):
        """The grids (rows, columns) that a canvas can have."""
        return grids_of(self.max_tiles)

    @property
    def num_tokens(self):
        """S, the patches of a tile and its class token."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @property
    def out_dim(self):
        """D_v, the width of a visual feature."""
        return self.dim * (1 + len(self.levels))


class GatedBlock(TransformerBlock):
    """A TransformerBlock whose two halves come through tanh gates; they start half open."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate_attention, self.gate_ffw = (Parameter(np.float32(pi / 4)) for _ in range(2))

    def forward(self, x, mask=None):  # [B, L, D], bool [L, L] -> [B, L, D]
        x = tanh_gate(x, self.gate_attention, self.attention(self.norm(x), mask=mask))
        return tanh_gate(x, self.gate_ffw, self.ffw(x))


class TiledViT(Module):
    """Canvases -> the features of the patches of their tiles, each having looked at all tiles.

    tile_positions [1 + A, T S D], pre_tiles and post_tiles [1 + A, T D] hold a row for each grid,
    for T = max_tiles; row 0 is of no grid.
    """

    def __init__(self, config, *, rng):
        c = self.config = config

        def draw(*shape):
            return Parameter(rng.normal(0, 0.02, shape).astype(np.float32, copy=False))

        def blocks(kind, depth):
            sizes, options = (c.dim, c.heads, c.hidden, c.activation, norm), dict(ffw_bias=True)
            return [kind(*sizes, **options, rng=rng) for _ in range(depth)]

        self.patch = draw(c.dim, 3, c.patch_size, c.patch_size)
        self.class_token, self.positions = draw(c.dim), draw(c.num_tokens, c.dim)
        rows, T = 1 + len(c.grids), c.max_tiles
        self.tile_positions = draw(rows, T * c.num_tokens * c.dim)
        self.pre_tiles, self.post_tiles = draw(rows, T * c.dim), draw(rows, T * c.dim)
        gates = (Parameter(np.float32(0)) for _ in range(3))
        self.gate_positions, self.gate_pre, self.gate_post = gates
        # those of the blocks have the config's eps, these two the usual one
        self.pre_norm, self.post_norm = norm_named("layer")(c.dim), norm_named("layer")(c.dim)
        norm = norm_named("layer", c.norm_eps)
        self.blocks = blocks(TransformerBlock, c.depth)
        self.gated_blocks = blocks(GatedBlock, c.gated_depth)

    def forward(self, pixels):
        """[B, rows * size, columns * size, 3] in [0, 1] -> features [B, t S, D_v]."""
        c, B = self.config, len(pixels)
        grid = tuple(n // c.image_size for n in pixels.shape[1:3])
        row, t, levels = 1 + c.grids.index(grid), grid[0] * grid[1], {}
        x = self.embed(self.patches(pixels, *grid), row)
        shape, mask = x.shape, self.mask(t, x.shape[2])
        x = x.reshape(B, -1, c.dim)
        for i, block in enumerate(self.blocks):
            x = block(x, mask)
            levels |= {i: x} if i in c.levels else {}
        x = self.in_tiles(self.post_norm(x).reshape(*shape), self.gate_post, self.post_tiles[row])
        x = x.reshape(B, -1, c.dim)
        for block in self.gated_blocks:
            x = block(x, mask)
        columns = [levels[i].reshape(B, -1, c.dim, 1) for i in c.levels]  # theirs alternate
        found = [concat(*columns, axis=-1).reshape(B, x.shape[1], -1)] if columns else []
        x = concat(x, *found, axis=-1).reshape(*shape[:3], c.out_dim)
        return x[:, :t, : c.num_tokens].reshape(B, t * c.num_tokens, c.out_dim)

    def patches(self, pixels, rows, columns):
        """A canvas's tiles, row by row, as patches [B, T, P, D]; 0 in tiles that it lacks."""
        c, B, size = self.config, len(pixels), self.config.image_size
        mean, std = (np.array(x, array_of(pixels).dtype) for x in (c.mean, c.std))
        x = ((pixels - mean) * (1 / std)).reshape(B, rows, size, columns, size, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(B * rows * columns, size, size, 3)
        x = conv2d(x, self.patch, stride=c.patch_size).reshape(B, rows * columns, -1, c.dim)
        return pad(x, c.max_tiles, axis=1)

    def embed(self, x, row):
        """Patches [B, T, P, D] -> tokens [B, T, S and empty ones, D] that know their place."""
        c, (B, T, _, D) = self.config, x.shape
        x = self.in_tiles(x, self.gate_pre, self.pre_tiles[row])
        x = concat(broadcast_to(self.class_token, B, T, 1, D), x, axis=2)
        # (1 - tanh(gate)) * positions + tanh(gate) * those of this tile in this grid
        of_tiles = self.tile_positions[row].reshape(T, -1, D) - self.positions
        of_tiles = broadcast_to(of_tiles, *x.shape)
        x = self.pre_norm(tanh_gate(x + self.positions, self.gate_positions, of_tiles))
        return pad(x, -(-c.num_tokens // MULTIPLE) * MULTIPLE, axis=2)

    def in_tiles(self, x, gate, which):
        """[B, T, S, D] + tanh(gate) * the embeddings [T D] of the tiles of a grid."""
        return tanh_gate(x, gate, broadcast_to(which.reshape(x.shape[1], 1, -1), *x.shape))

    def mask(self, t, length):
        """bool [T length, T length]: two tokens see each other unless both are empty."""
        real = np.zeros((self.config.max_tiles, length), bool)
        real[:t, : self.config.num_tokens] = True
        return real.reshape(-1, 1) | real.reshape(1, -1)


def pad(x, length, axis):  # [...] -> the same with zeros behind, up to this length along an axis
    """As many zeros as an axis lacks."""
    shape = list(x.shape)
    shape[axis] = length - shape[axis]
    return concat(x, np.zeros(shape, array_of(x).dtype), axis=axis)


def beside(*media):  # n of [B, N_i, R_i, D] -> [B, sum of N_i, R, D]
    """Images of different numbers R_i of tokens as those of one number, R, for the attention.

    R is the least common multiple, and each image is repeated as often as it goes into it. Over m
    copies of all keys a softmax gives each copy one m-th of the weight: what is attended to stays
    the same, and no attention, kernel or cache has to know of padding.
    """
    R = lcm(*(x.shape[2] for x in media))
    return concat(*(concat(*[x] * (R // x.shape[2]), axis=2) for x in media), axis=1)
