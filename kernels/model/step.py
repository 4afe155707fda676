"""Seconds a training step: the NumPy model beside its torch twin, on the same CPU in one run.

Both take the same batches through the same update of the bridge (mini Flamingo, all datasets of the
mixture), in turns, so that whatever else the machine does disturbs both alike. Their losses are
checked against each other before anything is timed.
"""

import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from miniflamingo.autograd import Tape
from miniflamingo.prompt import IMAGE
from miniflamingo.training import WEIGHTS, AdamW, BridgeRun, BridgeStage
from miniflamingo.worlds.datasets import IGNORED
from miniflamingo.xattn import compute_phi

from .layers import Flamingo


class NumpyStep:
    """One update of the bridge as training.Run makes it, without the log."""

    def __init__(self, stage):
        self.stage, self.optimiser = stage, AdamW(stage.model, stage.config.optimiser)

    def __call__(self, batches):
        """-> {dataset: mean loss}."""
        losses = {}
        self.stage.model.zero_grad()
        for name, batch in batches.items():
            with Tape() as tape:
                loss = self.stage.loss(batch)
            tape.backward(loss, np.asarray(self.stage.weights[name], loss.dtype))
            losses[name] = float(loss.data)
        self.optimiser.update(self.optimiser.gradient())
        return losses


class TorchStep:
    """The same update with the torch twin, autograd, and torch's own AdamW."""

    def __init__(self, stage):
        self.stage, c = stage, stage.config.optimiser
        self.model = Flamingo.from_numpy(stage.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        betas = (c.beta1, c.beta2)
        self.optimiser = torch.optim.AdamW(self.trained, c.rate, betas, weight_decay=c.weight_decay)

    def __call__(self, batches):
        """-> {dataset: mean loss}."""
        losses = {}
        self.optimiser.zero_grad()
        for name, batch in batches.items():
            loss = self.loss(batch)
            (loss * self.stage.weights[name]).backward()
            losses[name] = loss.item()
        torch.nn.utils.clip_grad_norm_(self.trained, self.stage.config.optimiser.clip)
        self.optimiser.step()
        return losses

    def loss(self, batch):
        """BridgeStage.loss in torch."""
        features = torch.from_numpy(self.stage.features(batch))
        phi = torch.from_numpy(compute_phi(batch.tokens, IMAGE, batch.use_next))
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        logits = self.model.read(tokens[:, :-1], self.model.resampler(features), phi[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)


def measure(steps=20):
    """{"numpy", "torch": median seconds a step, "ratio"}; ValueError when their losses differ."""
    if steps < 1:
        raise ValueError(f"steps must be above 0, got {steps}")
    config = BridgeRun(pool_per_class=8, pool_pairs=256, pool_clips=64)
    stage = BridgeStage(config, WEIGHTS / "lm", WEIGHTS / "vision")
    sides = {"torch": TorchStep(stage), "numpy": NumpyStep(stage)}
    rng, seconds = np.random.default_rng(0), {name: [] for name in sides}
    for i in range(steps + 1):
        batches, losses = {n: stage.draw(n, rng) for n, w in stage.weights.items() if w}, {}
        for name, side in sorted(sides.items(), reverse=bool(i % 2)):
            start = time.perf_counter()
            losses[name] = side(batches)
            seconds[name].append(time.perf_counter() - start)
        if i == 0:
            _check_equal(losses)
    median = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    return median | {"ratio": median["numpy"] / median["torch"]}


def run(steps):
    """Measure and print; returns the exit code."""
    result = measure(steps)
    print(f"median of {steps} training steps, {torch.get_num_threads()} threads")
    for side in ("numpy", "torch"):
        print(f"  {side:<6} {result[side]:.3f} s a step")
    print(f"  ratio  {result['ratio']:.2f} (numpy / torch)")
    return 0


def _check_equal(losses):
    for name, value in losses["numpy"].items():
        if not np.isclose(value, losses["torch"][name], rtol=1e-4):
            raise ValueError(f"the losses of {name} differ: {losses}")
