"""The three stages of the glyphs, two steps each, of a small model."""

from dataclasses import replace

import pytest

from miniflamingo.fewshot import experiments, recipe
from miniflamingo.training import OptimiserConfig

CONFIGS = recipe.configs


def small(seed, both=False):
    """recipe.configs, cut down."""
    configs = CONFIGS(seed, both)
    two = OptimiserConfig(steps=2, warmup=1)
    lm = replace(configs["lm"], model=replace(configs["lm"].model, dim=16, depth=1), batch=8)
    vision = replace(configs["vision"], glyph_batch=4, classes=20)
    vision = replace(vision, model=replace(vision.model, stem=(4,), widths=(4, 8)))
    bridge = replace(configs["flamingo"], glyph_batches=(8, 4), classes=20, pool_glyphs=200)
    warm = replace(configs["warm"], classes=20, pool_glyphs=60, batch=8)
    found = {"lm": lm, "vision": vision, "warm": warm, "flamingo": bridge}
    return {stage: replace(config, optimiser=two) for stage, config in found.items()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run of `fewshot train`, but small."""
    out, folders = tmp_path_factory.mktemp("glyphs") / "0", {}
    for stage, config in small(0).items():
        folders[stage] = out / stage
        stage = experiments.build(stage, config, folders)
        stage.progress = False
        assert experiments.finished(stage, folders[stage.name])
    return out


@pytest.fixture
def briefly(monkeypatch):
    """Trainings and classes for a test's time."""
    monkeypatch.setattr(recipe, "configs", small)
    monkeypatch.setattr(experiments, "configs", small)
    return monkeypatch
