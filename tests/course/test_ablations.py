"""The live experiment of module 11: a row changes what its name says, and learns captions."""

import numpy as np
import pytest

from miniflamingo.course import ablations
from miniflamingo.perceiver import MLPResampler


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def stages():
    pool, made = None, {}
    for row in ablations.CONFIGS:
        made[row] = ablations.Ablation(row, steps=1, pool=pool)
        pool = made[row].pool
    return made


def test_each_row_changes_what_its_name_says(stages):
    models = {row: stage.model for row, stage in stages.items()}
    base = trainable(models["baseline"])
    assert not any(name.startswith("lm.") for name in base)
    gates = {name for name in base if "alpha" in name}
    assert base - trainable(models["no gate"]) == gates
    assert all(np.tanh(a) == 1 for a in models["no gate"].alphas()["alpha_xattn"])
    assert isinstance(models["MLP resampler"].resampler, MLPResampler)
    layers = {n.split(".")[1] for n in trainable(models["one layer"]) if n.startswith("gated")}
    assert layers == {"1"}
    assert not models["all previous images"].gated_xattn[0].attention.only_last
    scratch = trainable(models["LM from scratch"])
    assert base < scratch and all(name.startswith("lm.") for name in scratch - base)


def test_rows_start_from_the_same_frozen_parts(stages):
    base = stages["baseline"].model.state_dict()
    for row, stage in stages.items():
        state = stage.model.state_dict()
        same = {n for n in base if n in state and np.array_equal(base[n], state[n])}
        assert {n for n in base if n.startswith("vision_encoder.")} <= same
        lm = {n for n in base if n.startswith("lm.")}
        assert (lm <= same) == (row != "LM from scratch")


def test_a_shut_layer_stays_shut_and_the_open_one_learns(stages):
    stage = ablations.Ablation("one layer", steps=1, pool=stages["baseline"].pool)
    losses = ablations.train(stage)
    alphas = stage.model.alphas()["alpha_xattn"]
    assert len(losses) == 1 and alphas[0] == alphas[2] == 0 and alphas[1] != 0


def test_captions_of_three_pictures_are_drawn(stages):
    drawn = stages["baseline"].draw("captions", np.random.default_rng(0))
    assert drawn.pictures.shape == (12, 3)


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match=r"row must be one of baseline, .* got 'no gates'"):
        ablations.Ablation("no gates")


def test_questions_are_shares_and_a_bridge_that_reads_nothing_knows_no_shape(stages):
    stage = stages["baseline"]
    result = ablations.examine(stage.model, ablations.fresh_pool(stage), 20)
    assert all(0 <= share <= 1 for share in result.values())
    assert result["caption"] == 0 and result["shape"] < 0.7


def test_no_question_shows_what_it_asks_about(stages, monkeypatch):
    model, shown = stages["baseline"].model, []
    pool, read = ablations.fresh_pool(stages["baseline"]), model.read

    def remember(tokens, media, phi):
        same = (media[:, :, None] == media[:, None]).all(axis=(-2, -1))
        shown.append(same.sum() - same.shape[0] * same.shape[1])
        return read(tokens, media, phi)

    monkeypatch.setattr(model, "read", remember)
    ablations.examine(model, pool, 2000)
    assert shown == [0]
    monkeypatch.setattr(pool, "distinct", False)  # as it was: an accident would be seen
    ablations.examine(model, pool, 2000)
    assert shown[1] > 0
