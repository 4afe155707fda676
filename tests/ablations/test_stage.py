"""A row changes what its name says, and nothing else; what is asked shows nothing that it asks."""

import numpy as np
import pytest

from miniflamingo import training
from miniflamingo.ablations import stage as stages
from miniflamingo.ablations.rows import ALL, ROWS, STABILITY, Row, baseline_of, config
from miniflamingo.ablations.stage import CHANCE, TASKS, Ablation, Examiner
from miniflamingo.perceiver import MLPResampler, TransformerResampler

BASES = ("baseline", "6 blocks")


@pytest.fixture
def folder(run_folder):
    return run_folder / "parts"


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_each_row_differs_from_its_baseline_in_one_choice():
    for name, row in ROWS.items():
        base, own = config(baseline_of(name) or name, 0), config(name, 0)
        differs = {k for k in vars(base) if getattr(base, k) != getattr(own, k)}
        choices = {k for k in vars(base.model) if getattr(base.model, k) != getattr(own.model, k)}
        expected = {*row.run, *(["model"] if row.model else [])}
        expected |= {"optimiser"} if row.optimiser else set()
        assert (differs, choices) == (expected, set(row.model)), name
        assert bool(differs) + bool(row.kind in stages.CHANGES) == (name not in BASES), name
    unknown = {row.kind for row in ALL.values()} - {*stages.CHANGES, ""}
    assert not unknown and ROWS["baseline"] == Row()


def test_what_is_trained_is_what_the_row_says(folder):
    models = {name: Ablation(name, folder).model for name in ROWS}
    base = trainable(models["baseline"])
    assert not any(name.startswith(("lm.", "vision")) for name in base)
    gates = {name for name in base if "alpha" in name}
    assert base - trainable(models["no gate"]) == gates and len(gates) == 6
    for name, prefix in (("LM tuned", "lm."), ("LM from scratch", "lm."),
                         ("encoder tuned", "vision_encoder.")):  # fmt: skip
        more = trainable(models[name]) - base
        assert base < trainable(models[name]) and all(n.startswith(prefix) for n in more), name
    dense = base - trainable(models["vanilla xattn"])
    assert all("ffw" in name or "alpha_dense" in name for name in dense) and len(dense) > 6
    assert {n.split(".")[0] for n in trainable(models["grafting"]) - base} == {"grafted"}
    assert base - trainable(models["no time embeddings"]) == {"resampler.time_embeddings"}
    assert isinstance(models["MLP resampler"].resampler, MLPResampler)
    assert isinstance(models["Transformer resampler"].resampler, TransformerResampler)
    depths = [len(models[n].gated_xattn) for n in ROWS if ROWS[n].depth == 6]
    assert depths == [6, 3, 1] and len(models["6 blocks"].lm.blocks) == 6
    assert list(models["6 blocks, xattn once"].config.layers()) == [3]


def test_rows_of_a_seed_start_from_the_same_parts(folder):
    base = Ablation("baseline", folder).model.state_dict()
    for name in ROWS:
        if ROWS[name].depth == 6 or name in ("LM from scratch", "encoder random"):
            continue
        state = Ablation(name, folder).model.state_dict()
        for key in base.keys() & state.keys():
            if key.startswith(("lm.", "vision_encoder.")):
                np.testing.assert_array_equal(base[key], state[key], f"{name}: {key}")
    for name in ("LM from scratch", "encoder random"):
        state = Ablation(name, folder).model.state_dict()
        assert not all(np.array_equal(base[key], state[key]) for key in base)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_takes_a_step_and_can_be_asked(row, folder, tmp_path):
    stage = Ablation(row, folder)
    before = {n: p.data.copy() for n, p in stage.model.named_parameters()}
    assert training.Run(stage, tmp_path / "run").train(progress=False)
    moved = {n for n, p in stage.model.named_parameters() if not np.array_equal(p.data, before[n])}
    assert moved and moved <= trainable(stage.model)
    if row == "encoder tuned":
        # shut gates pass no gradient on: the encoder moves from the second step
        layer = stage.model.gated_xattn[0]
        layer.alpha_xattn.data[...] = 1
        stage.model.zero_grad()
        stage.backward(stage.draw("captions", np.random.default_rng(0)), 1.0)
        assert any(p.grad is not None and np.abs(p.grad).max() > 0
                   for p in stage.model.vision_encoder.parameters())  # fmt: skip
    found = Examiner(stage, 6).ask()
    assert found.keys() == {*CHANCE, "overall"} and {*TASKS} < found.keys()
    assert all(0 <= value <= 1 for value in found.values())


def test_a_grafted_and_a_vanilla_flamingo_begin_as_they_should(folder):
    rng = np.random.default_rng(0)
    tokens, phi = rng.integers(4, 40, (2, 9)), np.ones((2, 9), int)
    media = rng.normal(size=(2, 1, 8, 64)).astype(np.float32)
    model = Ablation("vanilla xattn", folder).model
    np.testing.assert_array_equal(model.read(tokens, media, phi), model.lm(tokens))
    for layer in model.gated_xattn:
        layer.alpha_xattn.data[...] = 1
    moved = model.read(tokens, media, phi)
    assert not np.allclose(moved, model.lm(tokens))
    for layer in model.gated_xattn:
        layer.ffw.down.weight.data[...] = 9  # has no part in it
    np.testing.assert_array_equal(model.read(tokens, media, phi), moved)
    model = Ablation("grafting", folder).model
    assert not np.allclose(model.read(tokens, media, phi), model.lm(tokens))
    for block in model.grafted:
        for part in (block.attention.out_proj, block.ffw.down):
            part.weight.data[...] = 0
    np.testing.assert_allclose(model.read(tokens, media, phi), model.lm(tokens), atol=1e-5)


def test_no_question_shows_what_it_asks_about(folder, monkeypatch):
    examiner = Examiner(Ablation("baseline", folder), 30)
    shown, says = [], examiner.says

    def remember(tokens, media, rows=250):
        same = (media[:, :, None] == media[:, None]).all(axis=(-2, -1))
        shown.append(int(same.sum() - same.shape[0] * same.shape[1]))
        return says(tokens, media, rows)

    monkeypatch.setattr(examiner, "says", remember)
    examiner.ask()
    assert shown == [0] * 5


def test_the_shut_gates_leave_the_language_model_s_text(folder):
    assert Examiner(Ablation("baseline", folder), 100).ask()["text"] > 0.6


def test_clutter_stands_in_the_pictures(folder):
    from miniflamingo.worlds import shapes

    rng = np.random.default_rng
    plain, cluttered = shapes.background(3, rng(0)), shapes.background(3, rng(0), clutter=4)
    changed = (plain != cluttered).any(axis=-1).sum(axis=(1, 2))
    assert (changed <= 16).all() and (changed > 8).all()


def test_stability_compares_with_and_without_the_gate_alone():
    pairs = {row: baseline_of(row) for row in STABILITY}
    assert len(pairs) == 24 and sum(base is None for base in pairs.values()) == 12
    for row, base in pairs.items():
        if base:
            assert config(row, 0) == config(base, 0) and ALL[row].kind == "no gate"
            assert ALL[row].depth == ALL[base].depth
    assert len({config(row, 0).optimiser.rate for row in pairs}) == 4


def test_an_unknown_row_is_refused(folder):
    with pytest.raises(ValueError, match=r"row must be one of baseline, .* got 'no gates'"):
        Ablation("no gates", folder)


def test_in_torch_a_row_learns_as_in_numpy(folder, tmp_path):
    pytest.importorskip("torch")
    from miniflamingo.kernels.model.small import in_torch

    for name in ROWS:
        ours, theirs = (Ablation(name, folder, steps=2) for _ in range(2))
        alone = name in ("vanilla xattn", "grafting", "encoder tuned", "MLP resampler",
                         "Transformer resampler")  # fmt: skip
        assert ours.has_twin != alone
        if not alone:
            runs = [training.Run(s, tmp_path / name / str(i))
                    for i, s in enumerate((ours, in_torch(theirs)))]  # fmt: skip
            for run in runs:
                for g in run.stage.model.gated_xattn:  # shut gates would hide what is behind them
                    for alpha in (g.alpha_xattn, g.alpha_dense):
                        alpha.data[...] += 0.5
                run.step()
            mine, other = (run.last_gradient for run in runs)
            assert np.abs(mine - other).max() < 2e-3 * np.abs(mine).max(), name
