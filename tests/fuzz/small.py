"""The commands as they are, with smaller models and pools behind their defaults.

    python -m tests.fuzz.small miniflamingo train flamingo --out DIR --steps 8

What is drawn and encoded before the bridge's first step takes ten seconds at its real size.
"""

import runpy
import sys
from dataclasses import dataclass

from miniflamingo import training
from miniflamingo.flamingo import FlamingoConfig
from miniflamingo.language import LanguageConfig
from miniflamingo.vision import VisionConfig

LM = LanguageConfig(training.MINI_LM.vocab_size, dim=16, depth=2, heads=2)
VISION = VisionConfig(widths=(8, 8), depths=(1, 1), stem=(4,))
BRIDGE = FlamingoConfig(
    media_dim=16, num_latents=2, resampler_depth=1, resampler_heads=2, resampler_head_dim=8,
    xattn_heads=2, xattn_head_dim=8, skip_without_image=True, train_eoc=True,
)  # fmt: skip


@dataclass(frozen=True)
class SmallLanguageRun(training.LanguageRun):
    """The first stage."""

    model: LanguageConfig = LM
    batch: int = 8
    length: int = 16


@dataclass(frozen=True)
class SmallVisionRun(training.VisionRun):
    """The second stage."""

    model: VisionConfig = VISION
    batch: int = 8


@dataclass(frozen=True)
class SmallBridgeRun(training.BridgeRun):
    """The third stage."""

    model: FlamingoConfig = BRIDGE
    batches: tuple = (4, 2, 2, 2)
    pictures: int = 3
    pool_per_class: int = 1
    pool_per_turned: int = 1
    pool_pairs: int = 20
    pool_clips: int = 10


def run(module, words):
    """`python -m module words...` in this process, with the small defaults; SystemExit."""
    training.LanguageRun = SmallLanguageRun
    training.VisionRun = SmallVisionRun
    training.BridgeRun = SmallBridgeRun
    for name in ("miniflamingo.__main__", "miniflamingo.kernels.model.train"):
        sys.modules.pop(name, None)  # they read the defaults when they are imported
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
