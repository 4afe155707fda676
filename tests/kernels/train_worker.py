"""One process of the tests of model/train.py, started by torchrun: trains a small bridge."""

import json
import os
import signal
import sys

from miniflamingo.flamingo import FlamingoConfig
from miniflamingo.kernels.model import train
from miniflamingo.training import (
    BridgeRun,
    BridgeStage,
    OptimiserConfig,
    VisionRun,
    VisionStage,
)
from miniflamingo.vision import VisionConfig

STEPS = 7


def stage(lm, vision, **changes):
    """A small bridge over the hardly trained parts in two folders."""
    model = FlamingoConfig(
        media_dim=16, num_latents=2, resampler_depth=1, resampler_heads=2, resampler_head_dim=8,
        xattn_heads=2, xattn_head_dim=8, skip_without_image=True, train_eoc=True,
    )  # fmt: skip
    optimiser = OptimiserConfig(STEPS, warmup=2, alpha_rate=10.0, weight_decay=0.1)
    sizes = dict(pool_per_class=1, pool_per_turned=1, pool_pairs=20, pool_clips=10)
    sizes |= dict(batches=(9, 3, 3, 2), pictures=3)
    return BridgeStage(BridgeRun(optimiser, model, **{**sizes, **changes}), lm, vision)


def contrastive_stage(batch=16):
    """A small vision encoder beside a small text encoder."""
    model = VisionConfig(widths=(8, 8), depths=(1, 1), stem=(4,))
    optimiser = OptimiserConfig(STEPS, warmup=2, weight_decay=0.1)
    return VisionStage(VisionRun(optimiser, model, batch, 16, 8, label_smoothing=0.1))


def main(lm, vision, out, sent="", at="0"):
    """Train the bridge, or with lm "none" the vision encoder.

    The second process sends itself the signal `sent` before step `at` + 1, once.
    """
    update = train.ShardedRun.update

    def disturbed_update(run, *args):
        first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if sent and first_time and (run.rank, run.step) == (1, int(at)):
            os.kill(os.getpid(), signal.Signals[sent])
        return update(run, *args)

    train.ShardedRun.update = disturbed_update
    with train.processes("cpu") as mesh:
        train_on(mesh, contrastive_stage() if lm == "none" else stage(lm, vision), out)


def train_on(mesh, stage, out):
    """Train, and note down the step and the number of processes at the start."""
    run = train.ShardedRun(stage, out, mesh, resume=True, checkpoint_every=2)
    if run.rank == 0:
        with open(f"{out}/starts", "a", encoding="utf-8") as file:
            file.write(json.dumps([run.step, run.world]) + "\n")
    run.train(progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
