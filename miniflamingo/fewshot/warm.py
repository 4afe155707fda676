"""A start for the resampler: two pictures of a glyph shall have like visual tokens.

The bridge's own gradient reaches the resampler through a frozen language model that cannot yet use
what it says; the eye was contrastive from the start (paper, appendix B.1.3), and so is this.
Letters: B classes, S features of a picture, D_v their width, D that of a visual token.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from miniflamingo.checkpoints import load_model
from miniflamingo.checks import check_at_least, check_types
from miniflamingo.flamingo import FlamingoConfig, build_resampler
from miniflamingo.functional import exp
from miniflamingo.module import Module, Parameter, load_tensors, save_tensors
from miniflamingo.training import MINI_BRIDGE, OptimiserConfig, Stage
from miniflamingo.vision import contrastive_loss, l2_normalise
from miniflamingo.worlds import glyphs
from miniflamingo.worlds.glyph_documents import GlyphPool

WARM = OptimiserConfig(steps=200, rate=2e-3, warmup=20)


@dataclass(frozen=True)
class WarmRun:
    """`batch` of the classes (None: of all) in two pictures each; model: whose resampler it is."""

    optimiser: OptimiserConfig = WARM
    model: FlamingoConfig = MINI_BRIDGE
    batch: int = 96
    classes: int | None = None
    pool_glyphs: int = 24_000
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 2, "batch", "classes")
        check_at_least(self, 1, "pool_glyphs")
        check_at_least(self, 0, "seed")


class Aligned(Module):
    """A resampler, and how alike the means of its visual tokens are for two pictures."""

    def __init__(self, config, *, rng):
        self.config, self.resampler = config, build_resampler(config, rng=rng)
        self.log_inverse_temperature = Parameter(np.array(np.log(10), np.float32))

    def embed(self, features):  # [B, 1, 1, S, D_v] -> [B, D], unit length
        """The mean of the visual tokens."""
        media = self.resampler(features)
        return l2_normalise(media.reshape(-1, *media.shape[2:]).mean(axis=1))

    def forward(self, first, second):  # [B, 1, 1, S, D_v] * 2 -> the loss, []
        """Row i of one belongs to row i of the other."""
        temperature = exp(self.log_inverse_temperature)
        return contrastive_loss(self.embed(first), self.embed(second), temperature)


class WarmStage(Stage):
    """The resampler alone, on features of the frozen eye in the folder `vision`."""

    name = "warm"

    def __init__(self, config, vision):
        self.config, self.weights = config, {"pairs": 1.0}
        self.eye = load_model(vision / "model.safetensors", "vision")
        model = replace(config.model, vision=self.eye.config)
        self.model = Aligned(model, rng=np.random.default_rng([config.seed, 0]))

    @cached_property
    def pool(self):
        """Pictures of the training classes, as features; drawn when first asked for."""
        classes = glyphs.classes("train", self.config.classes)
        per = max(2, self.config.pool_glyphs // len(classes))
        return GlyphPool.draw(self.eye, [self.config.seed, 7], classes, per)

    def draw(self, dataset, rng):
        rows = rng.permutation(len(self.pool.classes))[: self.config.batch, None]
        pictures = self.pool.pick(np.repeat(rows, 2, axis=1), rng)  # different ones
        return tuple(self.pool.glyphs[pictures[:, i : i + 1]] for i in (0, 1))

    def count(self, batch):
        return len(batch[0])

    def loss(self, batch):
        return self.model(*batch)

    def save(self, path):
        save_tensors(path, self.model.resampler.state_dict(), {"warm": "resampler"})


def begin_with(model, path):
    """Put the resampler in a file of WarmStage into a Flamingo."""
    model.resampler.load_state_dict(load_tensors(path)[0], path)
