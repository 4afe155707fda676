"""Frozen parts that have learned little, and pools that are drawn in a moment."""

import pytest

from miniflamingo import training
from miniflamingo.ablations import stage as stages
from miniflamingo.ablations.commands import parts
from miniflamingo.ablations.rows import config
from miniflamingo.ablations.stage import Ablation


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A folder of trainings whose parts are there; the language model is the shipped one."""
    run = tmp_path_factory.mktemp("run")
    for path, make in parts(run, {3, 6, 12}).items():
        path.mkdir(parents=True)
        make().save(path / "model.safetensors")
        if path.name == "lm3":
            shipped = (training.WEIGHTS / "lm" / "model.safetensors").read_bytes()
            (path / "model.safetensors").write_bytes(shipped)
    return run


@pytest.fixture(scope="session")
def pools():
    """What was drawn: most rows have the same encoder, and so the same pool."""
    return {}


@pytest.fixture(autouse=True)
def small(monkeypatch, pools):
    """One step of a few small documents, and each pool drawn once."""
    draw_pool = Ablation.draw_pool

    def once(stage, seed, split, per_class, distinct=False):
        key = split, stage.sees, stage.row == "encoder random"
        if key not in pools:
            pools[key] = draw_pool(stage, seed, split, per_class, distinct)
        return pools[key]

    def few(name, seed, steps):
        sizes = {"pool_per_class": 6, "pool_per_turned": 2, "pool_pairs": 120, "pool_clips": 20}
        return training.replace(config(name, seed, min(steps, 2)), batches=(6, 2, 2, 2), **sizes)

    monkeypatch.setattr(Ablation, "draw_pool", once)
    monkeypatch.setattr(stages, "config", few)
