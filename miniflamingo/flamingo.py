"""Flamingo: a frozen eye and a frozen language model, bridged by two trained parts.

    images, videos -> vision encoder (frozen) -> Perceiver Resampler -> R visual tokens each
    text -> embedding -> [ GATED XATTN-DENSE -> frozen LM block ] x depth -> logits

Letters: B batch, L text tokens, N images or videos in a sequence, T frames, S features of a frame,
R visual tokens of an image, D_v, D_m, D the widths of features, visual tokens and text, V words.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from miniflamingo.checks import LATER, check_at_least, check_range, check_types
from miniflamingo.dialects import Dialect
from miniflamingo.eyes import EyeConfig, build_eye
from miniflamingo.functional import keep, replace_row
from miniflamingo.language import LanguageConfig, LanguageModel
from miniflamingo.module import Module, Parameter
from miniflamingo.perceiver import (
    MLPResampler,
    NoResampler,
    PerceiverResampler,
    TransformerResampler,
    check_num_frames,
)
from miniflamingo.tiled_vit import TiledViTConfig
from miniflamingo.vision import NFNET_F6, VisionConfig, check_pixels
from miniflamingo.xattn import GatedCrossAttentionDense, check_phi, compute_phi, keep_seen


@dataclass(frozen=True)
class FlamingoConfig:
    """All sizes of a Flamingo. `FlamingoConfig.preset(name)` gives mini, 3B, 9B and 80B.

    resampler is "perceiver", "mlp", "transformer" or "none"; only_last=False is the ablation in
    which a token attends to all previous images; skip_without_image leaves tokens with no image
    before them to the frozen LM (see GatedCrossAttentionDense); train_eoc gives the model its own,
    trained embedding of `<EOC>`, for a frozen LM that has never seen it. dialect is how another
    system departs from the paper. ValueError for a value that cannot work.
    """

    vision: EyeConfig = field(default_factory=VisionConfig)
    lm: LanguageConfig = field(default_factory=LanguageConfig)
    media_dim: int = 64
    resampler: str = "perceiver"
    num_latents: int = 8
    resampler_depth: int = 2
    resampler_heads: int = 4
    resampler_head_dim: int = 16
    num_frames: int = 8
    spatial_embeddings: bool = True
    xattn_every: int = 1
    xattn_heads: int = 4
    xattn_head_dim: int = 16
    only_last: bool = True
    skip_without_image: bool = False
    train_eoc: bool = False
    eoc_token: int = 2
    image_token: int = 3
    dialect: Dialect = field(default_factory=Dialect, metadata=LATER)

    def __post_init__(self):
        check_types(self)
        sizes = ("media_dim", "num_latents", "resampler_depth", "resampler_heads", "num_frames")
        check_at_least(self, 1, *sizes, "resampler_head_dim", "xattn_heads", "xattn_head_dim")
        check_at_least(self, 1, "xattn_every")
        check_range(self, 0, self.lm.vocab_size - 1, "eoc_token", "image_token")
        check_range(self.dialect, 0, self.xattn_every - 1, "offset")

    def layers(self):
        """The indices of the LM's blocks that have a gated layer before them."""
        return range(self.dialect.offset, self.lm.depth, self.xattn_every)

    @classmethod
    def preset(cls, name, **changes):
        """One of "mini", "3B", "9B", "80B", with fields replaced; ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)


def _paper(depth, dim, heads, every):
    """A preset of the paper's Table 5: every size has the same eye and the same resampler."""
    lm = LanguageConfig(32_000, dim, depth, heads, tie_embeddings=True)
    return FlamingoConfig(
        NFNET_F6, lm, 1536, "perceiver", 64, 6, 16, 128, 8, False,
        xattn_every=every, xattn_heads=heads, xattn_head_dim=128, train_eoc=True,
    )  # fmt: skip


PRESETS = {
    # the ALiBi slopes with which a small LM generalises to 32 shots
    "mini": FlamingoConfig(lm=LanguageConfig(alibi_slopes=(1, 1 / 4, 1 / 16, 0))),
    "3B": _paper(depth=24, dim=2048, heads=16, every=1),
    "9B": _paper(depth=40, dim=4096, heads=32, every=4),
    "80B": _paper(depth=80, dim=8192, heads=64, every=7),
}


class Flamingo(Module):
    """The whole model (paper, figure 3). The vision encoder and the LM are built frozen."""

    def __init__(self, config, *, rng):
        c = self.config = config
        self.vision_encoder = build_eye(c.vision, rng=rng).freeze()
        self.resampler = build_resampler(c, rng=rng)
        self.gated_xattn = build_gated_xattn(c, rng=rng)
        self.lm = LanguageModel(c.lm, rng=rng).freeze()
        self.eoc_embedding = self.eoc_head = None
        if c.train_eoc:
            self.eoc_embedding = Parameter(self.lm.embedding.weight.data[c.eoc_token].copy())
            if not c.lm.tie_embeddings:
                self.eoc_head = Parameter(self.lm.head.weight.data[c.eoc_token].copy())

    def encode(self, pixels, num_frames=None):
        """pixels [B, N, T, height, width, 3] in [0, 1] -> features [B, N, T, S, D_v].

        For a TiledViT a frame is a canvas of tiles, all of one shape, and S grows with it.
        Frames are encoded one by one, those behind a clip's num_frames int[B, N] as black, whatever
        they hold. ValueError for a wrong size or dtype, NaN, or a wrong range.
        """
        pixels = np.asarray(pixels)
        if pixels.ndim != 6:
            raise ValueError(f"pixels must be [B, N, T, height, width, 3], got {pixels.shape}")
        if num_frames is not None:
            B, N, T = pixels.shape[:3]
            real = np.arange(T) < check_num_frames(num_frames, B, N, T)[..., None]
            pixels = keep(pixels, real[..., None, None, None])
        eye = self.config.vision
        grids = eye.grids if isinstance(eye, TiledViTConfig) else ((1, 1),)
        pixels = check_pixels(pixels, eye.image_size, grids)
        features = self.vision_encoder(pixels.reshape(-1, *pixels.shape[3:]))
        return features.reshape(*pixels.shape[:3], *features.shape[1:])

    def forward(self, tokens, pixels, *, phi=None, num_images=None, num_frames=None):
        """Text and images -> logits [B, L, V] of the next token.

        tokens int[B, L], padded at the end; pixels [B, N, T, height, width, 3]. Ragged batches say
        how many of the N images a row has in num_images int[B], and how many of the T frames are
        real in num_frames int[B, N]. phi int[B, L] is computed from the tokens unless given. What
        lies in padded frames, and in images that no token attends to, is not looked at: NaN there
        reaches no logit and no gradient. ValueError when a row has more `<image>` tags than images.
        """
        N = pixels.shape[1]
        if phi is None:
            num_images = np.full(len(tokens), N) if num_images is None else num_images
            phi = compute_phi(tokens, self.config.image_token, num_images=num_images)
        phi = check_phi(phi, *tokens.shape, N)
        pixels = keep_seen(pixels, phi, self.config.only_last)
        media = self.resampler(self.encode(pixels, num_frames), num_frames)
        return self.read(tokens, media, phi)

    def read(self, tokens, media, phi, cache=None, positions=None, last=False, keep=None):
        """The text half: tokens int[B, L], media [B, N, R, D_m], phi int[B, L] -> logits [B, L, V],
        or with `last` those of the last token, [B, 1, V], or those of keep bool[B, L], [C, V].

        A DecodingCache holds the past tokens' keys and values and the projected media; the tokens
        then stand at `positions` int[B, L], and media may be None.
        """
        L = tokens.shape[1]
        positions = np.arange(L)[None] if positions is None else positions
        bias = self.lm.causality(positions, L if cache is None else positions.max() + 1)
        table, head = self._rows_with_eoc()
        x = self.lm.embed(tokens, positions, table)
        for i, block in enumerate(self.lm.blocks):
            j, between = divmod(i - self.config.dialect.offset, self.config.xattn_every)
            if not between:
                x = self.gated_xattn[j](x, media, phi, cache and cache.media[j])
            x = block(x, None, bias, cache and cache.tokens[i], positions)
        x = x[:, -1:] if last else x if keep is None else x[keep]
        return self.lm.predict(x, table, head)

    def _rows_with_eoc(self):
        """The LM's embedding (and head) with the trained `<EOC>` row, or None where it has none."""
        table = head = None
        if self.eoc_embedding is not None:
            eoc = self.config.eoc_token
            table = replace_row(self.lm.embedding.weight, self.eoc_embedding, index=eoc)
            if self.eoc_head is not None:
                head = replace_row(self.lm.head.weight, self.eoc_head, index=eoc)
        return table, head

    def alphas(self):
        """{"alpha_xattn": [...], "alpha_dense": [...]}, a number (or D) for each inserted layer."""
        names = ("alpha_xattn", "alpha_dense")
        return {n: [getattr(g, n).data.tolist() for g in self.gated_xattn] for n in names}


def build_gated_xattn(config, *, rng):
    """The GATED XATTN-DENSE layers of a config, one for each of its `layers`."""
    c, sizes = config, (config.lm.dim, config.media_dim, config.xattn_heads, config.xattn_head_dim)
    choices = dict(only_last=c.only_last, skip_without_image=c.skip_without_image)
    return [
        GatedCrossAttentionDense(*sizes, **choices, dialect=c.dialect, rng=rng) for _ in c.layers()
    ]


def build_resampler(config, *, rng):
    """The resampler that the config names; ValueError for an unknown one."""
    c = config
    shared = dict(num_latents=c.num_latents, depth=c.resampler_depth, num_frames=c.num_frames)
    features = c.vision.num_features if c.spatial_embeddings or c.resampler == "mlp" else None
    sizes = (c.vision.out_dim, c.media_dim)
    shared |= dict(num_features=features, rng=rng)
    if c.resampler == "perceiver":
        heads, head_dim = c.resampler_heads, c.resampler_head_dim
        shared |= dict(heads=heads, head_dim=head_dim, dialect=c.dialect)
        return PerceiverResampler(*sizes, **shared)
    if c.resampler == "transformer":
        return TransformerResampler(*sizes, heads=c.resampler_heads, **shared)
    if c.resampler == "mlp":
        return MLPResampler(*sizes, **shared)
    if c.resampler == "none":
        return NoResampler(*sizes, rng=rng)
    raise ValueError(f"resampler must be perceiver, mlp, transformer or none, got {c.resampler!r}")


class ShapesOnly:
    """Stands in for a random generator: arrays with a shape and no storage, to count by."""

    def normal(self, loc=0.0, scale=1.0, size=()):
        return np.broadcast_to(np.float32(0), size)


def count_parameters(config):
    """Parameters of each part, {"lm", "vision_encoder", "gated_xattn", "resampler", ...: int}.

    Builds the real model, of any size, with arrays that take no memory.
    """
    model, counts = Flamingo(config, rng=ShapesOnly()), {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.size
    return counts
