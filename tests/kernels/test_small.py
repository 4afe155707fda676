"""The three stages with torch's gradients: NumPy's losses, gradients and runs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from miniflamingo import training  # noqa: E402
from miniflamingo.fewshot.warm import WarmRun, WarmStage  # noqa: E402
from miniflamingo.kernels.model.small import in_torch  # noqa: E402
from miniflamingo.worlds import glyph_texts  # noqa: E402

TWO = training.OptimiserConfig(steps=2, warmup=1)
LM = replace(training.MINI_LM, vocab_size=len(glyph_texts.TOKENIZER), dim=16, depth=2)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A language model and an eye of both worlds."""
    folder = tmp_path_factory.mktemp("before")
    for name in ("lm", "vision"):
        training.Run(stage(name), folder / name).train(progress=False)
    return folder


def stage(name, before=None):
    if name == "lm":
        config = training.LanguageRun(TWO, LM, batch=8, weights=(1.0, 0.5), noise=0.3)
        return training.LanguageStage(config)
    if name == "warm":
        return WarmStage(WarmRun(TWO, classes=20, pool_glyphs=60, batch=8), before / "vision")
    if name == "vision":
        config = training.VisionRun(TWO, batch=8, weights=(1.0, 0.5), glyph_batch=6, classes=20)
        return training.VisionStage(config)
    config = training.BridgeRun(
        TWO, batches=(8, 2, 2, 2), pool_per_class=1, pool_per_turned=1, pool_pairs=20,
        pool_clips=10, glyph_weights=(1.0, 0.5), glyph_batches=(8, 4), classes=20, pool_glyphs=100,
    )  # fmt: skip
    return training.BridgeStage(config, before / "lm", before / "vision")


@pytest.mark.parametrize("name", ["lm", "vision", "warm", "flamingo"])
def test_one_run_of_both_worlds_in_torch_is_numpys(name, before, tmp_path):
    ours, theirs = stage(name, before), in_torch(stage(name, before))
    runs = [training.Run(s, tmp_path / str(i)) for i, s in enumerate((ours, theirs))]
    for _ in range(2):
        mine, other = (run.step() for run in runs)
        assert list(mine["losses"]) == [n for n, w in ours.weights.items() if w]
        for dataset, loss in mine["losses"].items():
            assert other["losses"][dataset] == pytest.approx(loss, rel=2e-3), dataset
    mine, other = (run.last_gradient for run in runs)
    assert np.abs(mine - other).max() < 2e-3 * np.abs(mine).max()
