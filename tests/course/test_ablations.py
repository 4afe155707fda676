"""The experiment of module 11: a row changes what its name says; the command writes them all."""

import json

import numpy as np
import pytest

from miniflamingo.course import ablations
from miniflamingo.perceiver import MLPResampler

TINY = {"steps": 1, "weights": (0, 1)}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def stages():
    pool, made = None, {}
    for row in ablations.CONFIGS:
        made[row] = ablations.Ablation(row, pool=pool, **TINY)
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
    stage = ablations.Ablation("one layer", pool=stages["baseline"].pool, **TINY)
    losses = ablations.train(stage)
    alphas = stage.model.alphas()["alpha_xattn"]
    assert len(losses) == 1 and alphas[0] == alphas[2] == 0 and alphas[1] != 0


def test_both_kinds_of_documents_are_drawn(stages):
    stage, rng = stages["baseline"], np.random.default_rng(0)
    assert stage.draw("captions", rng).pictures.shape == (12, 3)
    assert stage.draw("documents", rng).pictures.shape == (6, 5)


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match=r"row must be one of baseline, .* got 'no gates'"):
        ablations.Ablation("no gates")


def test_the_command_writes_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "CONFIGS", {"baseline": {}, "MLP resampler": {}})
    monkeypatch.setattr(ablations, "run_one", fake)
    out = tmp_path / "new" / "a.json"
    assert ablations.main(["--seeds", "2", "--steps", "7", "--out", str(out)]) == 0
    data = json.loads(out.read_text("utf-8"))
    assert data["about"]["command"].endswith("--seeds 2 --steps 7 --samples 400")
    assert [r["seed"] for r in data["rows"]["MLP resampler"]] == [0, 1]
    assert ablations.main(["--seeds", "2", "--steps", "7", "--out", str(out)]) == 0
    with pytest.raises(SystemExit):
        ablations.main(["--seeds", "0"])
    out.write_text("mine", "utf-8")
    assert ablations.main(["--out", str(out)]) == 2 and out.read_text("utf-8") == "mine"


def fake(seed, row, steps, samples):
    """What run_one returns, without the training."""
    return {"seed": seed, "caption": 0.5, "4-way, 16 shots": 0.25}


def test_questions_are_shares_and_a_bridge_that_reads_nothing_knows_no_shape(stages):
    result = ablations.examine(
        stages["baseline"].model, ablations.fresh_pool(stages["baseline"]), 20
    )
    assert all(0 <= share <= 1 for share in result.values())
    assert result["caption"] == 0 and result["4-way, 1 shots"] < 0.7
    assert result["text"] > 0.6  # shut gates: the model is its LM


def test_no_question_shows_what_it_asks_about(stages, monkeypatch):
    model, shown = stages["baseline"].model, []
    pool, read = ablations.fresh_pool(stages["baseline"]), model.read

    def remember(tokens, media, phi):
        same = (media[:, :, None] == media[:, None]).all(axis=(-2, -1))
        shown.append(same.sum() - same.shape[0] * same.shape[1])
        return read(tokens, media, phi)

    monkeypatch.setattr(model, "read", remember)
    ablations.examine(model, pool, 40)
    assert shown == [0, 0, 0]  # captions, binding, text
    monkeypatch.setattr(pool, "distinct", False)  # as it was: an accident would be seen
    ablations.examine(model, pool, 40)
    assert shown[4] > 0


def test_the_committed_data_has_every_row_and_says_how_it_was_made():
    data = json.loads(ablations.DATA.read_text("utf-8"))
    assert list(data["rows"]) == list(ablations.CONFIGS)
    assert {len(runs) for runs in data["rows"].values()} == {3}
    assert {"command", "date", "numpy", "python", "samples", "steps"} <= set(data["about"])
    for row, runs in data["rows"].items():
        stage = ablations.Ablation(row, steps=1)
        learn = stage.model.num_parameters(trainable_only=True)
        assert {run["learn"] for run in runs} == {learn}
