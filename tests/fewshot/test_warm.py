"""The resampler's start: it learns, it is put into the bridge, and another start is another run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from miniflamingo.fewshot import experiments, warm
from miniflamingo.module import load_tensors
from miniflamingo.training import WEIGHTS, OptimiserConfig, Run
from tests.fewshot.conftest import small


def test_two_pictures_of_a_class_become_more_alike(tmp_path):
    optimiser = OptimiserConfig(steps=60, warmup=3, rate=3e-3)
    config = replace(small(0)["warm"], optimiser=optimiser, batch=20)
    Run(warm.WarmStage(config, WEIGHTS / "vision"), tmp_path).train(progress=False)
    log = (tmp_path / "log.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_a_batch_has_two_pictures_of_each_class(trained):
    stage = warm.WarmStage(small(0)["warm"], trained / "vision")
    first, second = stage.draw("pairs", np.random.default_rng(0))
    assert first.shape == second.shape and first.shape[:3] == (8, 1, 1)
    assert not np.isclose(first, second).all(axis=(1, 2, 3, 4)).any()


def test_the_bridge_begins_with_it_and_says_so(trained):
    folders = {name: trained / name for name in ("lm", "vision", "warm")}
    bridge = experiments.build("flamingo", small(0)["flamingo"], folders)
    start, _ = load_tensors(trained / "warm" / "model.safetensors")
    own = bridge.model.state_dict()
    assert all(np.array_equal(own[f"resampler.{name}"], x) for name, x in start.items())
    assert bridge.identity()["frozen"].keys() == {"lm", "vision", "warm"}


@pytest.mark.parametrize("wrong", [{"batch": 1}, {"classes": 1}, {"pool_glyphs": 0}, {"seed": -1}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        warm.WarmRun(**wrong)
