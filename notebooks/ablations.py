"""Module 11's live experiment: six small bridges that differ in one choice each.

A bridge of one resampler layer is trained on documents of three captioned pictures. Every row
starts from the same frozen parts, reads the same pictures, and is asked the same. More rows,
trained nine times as long: `python -m miniflamingo ablate`.
"""

import tempfile
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from miniflamingo.ablations.stage import lm_from_scratch, no_gate
from miniflamingo.flamingo import PRESETS
from miniflamingo.prompt import IMAGE
from miniflamingo.training import WEIGHTS, BridgeRun, BridgeStage, OptimiserConfig, Run
from miniflamingo.worlds import datasets
from miniflamingo.worlds.datasets import SEEN, Pool
from miniflamingo.worlds.grammar import GEOMETRIC
from miniflamingo.xattn import compute_phi

CLASSES = SEEN & GEOMETRIC

# --- the rows: what is changed in the config, and in the model ------------------------------------


def one_layer(model, rng):
    """Only the middle layer learns; the others stay shut, and alpha = 0 is the identity."""
    for i, layer in enumerate(model.gated_xattn):
        if i != len(model.gated_xattn) // 2:
            layer.freeze()
    return model


CONFIGS = {
    "baseline": {},
    "no gate": {},
    "MLP resampler": {"resampler": "mlp"},
    "one layer": {},
    "all previous images": {"only_last": False},
    "LM from scratch": {},
}
CHANGES = {"no gate": no_gate, "one layer": one_layer, "LM from scratch": lm_from_scratch}


class Ablation(BridgeStage):
    """The stage that trains one row."""

    def __init__(self, row, seed=0, steps=100, pool=None):
        """`pool`, where given, spares drawing the pictures again. ValueError for an unknown row."""
        if row not in CONFIGS:
            raise ValueError(f"row must be one of {', '.join(CONFIGS)}, got {row!r}")
        config = BridgeRun(
            OptimiserConfig(steps=steps, warmup=20, rate=4e-3, alpha_rate=10.0),
            model=replace(PRESETS["mini"], resampler_depth=1, **CONFIGS[row]),
            weights=(0.0, 1.0, 0.0, 0.0),
            batches=(1, 12, 1, 1),
            wordless=0.0, pool_per_class=20, pool_per_turned=0, pool_pairs=1, pool_clips=1,
            seed=seed,
        )  # fmt: skip
        super().__init__(config, WEIGHTS / "lm", WEIGHTS / "vision")
        if row in CHANGES:
            self.model = CHANGES[row](self.model, np.random.default_rng([seed, 3]))
        if pool is not None:
            self.pool = pool

    def draw(self, dataset, rng):
        return datasets.caption_documents(self.pool, self.batches[dataset], 3, rng, CLASSES)


def train(stage):
    """Run a stage to its end; returns the loss of every step."""
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        run = Run(stage, folder)
        return [run.step()["losses"]["captions"] for _ in range(stage.config.optimiser.steps)]


# --- what is asked --------------------------------------------------------------------------------


def fresh_pool(stage):
    """Pictures of the test split, which no row has seen."""
    return Pool.draw(stage.model.vision_encoder, [7, 7], "test", 17, 1, 1)


def examine(model, pool, samples=200):
    """{"caption", "colour", "shape"}: the share of fresh pictures behind which all four words of
    the caption are right, and two of them alone; the last of three captioned pictures."""
    media = model.resampler(pool.images[:, None])[:, 0]  # [pictures, R, D_m]
    asked = datasets.caption_documents(pool, samples, 3, np.random.default_rng(3), CLASSES)
    logits = model.read(asked.tokens, media[asked.pictures], compute_phi(asked.tokens, IMAGE))
    right = logits.argmax(axis=-1)[:, -6:-2] == asked.tokens[:, -5:-1]  # a small red circle
    return {"caption": float(right.all(axis=1).mean()),
            "colour": float(right[:, 2].mean()), "shape": float(right[:, 3].mean())}  # fmt: skip
