"""The bridge's training: NumPy and torch agree, the frozen parts stay, a run survives."""

import json
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from miniflamingo import training
from miniflamingo.module import load_tensors
from miniflamingo.real import model as models
from miniflamingo.real import stages
from miniflamingo.worlds.datasets import IGNORED

RATES = training.OptimiserConfig(steps=3, rate=1e-3, warmup=1, alpha_rate=10, resampler_rate=0.3)


def warm_stage(folder):
    return stages.WarmStage(stages.WarmRun(RATES, batch=8), folder)


def real_stage(folder, warm=None, **changes):
    return stages.RealStage(stages.RealRun(RATES, **changes), folder, warm)


@pytest.fixture(params=(warm_stage, real_stage))
def stage(request, folder):
    return request.param(folder)


def open_gates(model):
    for layer in getattr(model, "gated_xattn", ()):
        layer.alpha_xattn.data[...], layer.alpha_dense.data[...] = 0.4, -0.3


def gradients(stage, batch):
    stage.model.zero_grad()
    loss = stage.backward(batch, 0.7)
    named = stage.model.named_parameters()
    return loss, {n: np.array(p.grad) for n, p in named if p.requires_grad and p.grad is not None}


def test_numpy_and_torch_have_one_loss_and_one_gradient(stage):
    pytest.importorskip("torch")
    from miniflamingo.kernels.model.real import in_torch

    open_gates(stage.model)
    batch = stage.draw(next(iter(stage.weights)), np.random.default_rng(0))
    loss, ours = gradients(stage, batch)
    theirs_loss, theirs = gradients(in_torch(stage), batch)
    assert theirs_loss == pytest.approx(loss, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        most = np.abs(gradient).max()
        np.testing.assert_allclose(theirs[name], gradient, atol=2e-4 * most + 1e-8, err_msg=name)


def test_runs_in_numpy_and_torch_go_the_same_way(folder, tmp_path):
    pytest.importorskip("torch")
    from miniflamingo.kernels.model.real import in_torch

    logs = []
    for name, wrap in (("numpy", lambda stage: stage), ("torch", in_torch)):
        training.Run(wrap(real_stage(folder)), tmp_path / name).train(progress=False)
        lines = (tmp_path / name / "log.jsonl").read_text("utf-8").splitlines()
        logs.append([json.loads(line) for line in lines])
    for ours, theirs in zip(*logs):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        np.testing.assert_allclose(theirs["alpha_xattn"], ours["alpha_xattn"], atol=2e-3)
    assert all(abs(alpha) > 0 for alpha in logs[0][-1]["alpha_xattn"])


def test_the_frozen_parts_stay_as_they_are(folder):
    pytest.importorskip("torch")
    from miniflamingo.kernels.model.real import in_torch

    stage = in_torch(real_stage(folder))
    own = {n: p for n, p in stage.model.named_parameters()}
    before = {n: p.data.copy() for n, p in own.items()}
    optimiser = training.AdamW(stage.model, RATES)
    for _ in range(2):  # in the first step shut gates let through the gates' gradient alone
        stage.model.zero_grad()
        stage.backward(stage.draw("documents", np.random.default_rng(1)), 1.0)
        optimiser.update(optimiser.gradient())
    for name, parameter in own.items():
        frozen = name.startswith(("lm.", "vision_encoder."))
        assert np.array_equal(parameter.data, before[name]) == frozen, name


def test_a_resumed_run_is_the_run_that_was_never_stopped(folder, tmp_path):
    whole = training.Run(real_stage(folder), tmp_path / "whole", checkpoint_every=1)
    whole.train(progress=False)
    first = training.Run(real_stage(folder), tmp_path / "parts", checkpoint_every=1)
    with open(first.log_path, "a", encoding="utf-8") as log:
        with threadpool_limits(1):  # as train() has it
            log.write(json.dumps(first.step()) + "\n")
        first.save(log)
    first.lock.release()
    training.Run(real_stage(folder), tmp_path / "parts", resume=True).train(progress=False)
    logs = [(tmp_path / run / "log.jsonl").read_text("utf-8") for run in ("whole", "parts")]
    assert logs[0] == logs[1]
    files = [load_tensors(tmp_path / run / "model.safetensors") for run in ("whole", "parts")]
    for name, array in files[0][0].items():
        np.testing.assert_array_equal(files[1][0][name], array, name)
    assert files[0][1] == files[1][1]


def test_a_checkpoint_holds_what_is_trained_alone(folder, tmp_path):
    run = training.Run(real_stage(folder), tmp_path / "run")
    assert not any(name.startswith(("lm.", "vision_encoder.")) for name in run.tensors())
    assert sum("adamw" in name for name in run.tensors()) == 2 * len(run.stage.state())


def test_the_warm_start_is_taken_up_and_counts_for_the_identity(folder, tmp_path):
    training.Run(warm_stage(folder), tmp_path / "warm").train(progress=False)
    warm = tmp_path / "warm" / "model.safetensors"
    cold, warmed = real_stage(folder), real_stage(folder, warm)
    assert not np.array_equal(
        cold.model.resampler.latents.data, warmed.model.resampler.latents.data
    )
    assert cold.identity() != warmed.identity()


def test_each_dataset_counts_its_lambda_times_its_mean(folder):
    stage = real_stage(folder, weights=(1.0, 0.5, 0.0, 0.25, 0.125))
    open_gates(stage.model)
    rng = np.random.default_rng(3)
    batch = stage.draw("documents", rng)
    assert batch.shares.sum() == pytest.approx(1.875)
    total, rows = 0.0, np.cumsum([0, 5, 2, 1, 1])
    media = stages.see(stage.model, batch.places, batch.stills, batch.clips)
    logits = stage.model.read(batch.tokens, media, batch.phi)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for weight, start, end in zip((1.0, 0.5, 0.25, 0.125), rows, rows[1:]):
        targets = batch.targets[start:end]
        b, t = np.nonzero(targets != IGNORED)
        total -= weight * logp[start:end][b, t, targets[b, t]].mean()
    assert stage.loss(batch) == pytest.approx(total, rel=1e-5)


def test_branches_begin_in_proportion_to_the_stream(folder):
    model, words = models.assemble(folder, scale=0.3)
    streams = list(models.residual_stream(model.lm, [[0, *words.encode(models.SENTENCE)]]))
    for layer, i in zip(model.gated_xattn, model.config.layers()):
        y = streams[i][:, 1:]
        assert layer.ffw(y).std() / y.std() == pytest.approx(0.3, rel=1e-3)


def test_a_bridge_is_read_back_in_half_precision(folder, tmp_path):
    stage = real_stage(folder)
    open_gates(stage.model)
    stage.save(tmp_path / "model.safetensors")
    model, _ = models.load_bridge(folder, tmp_path / "model.safetensors")
    own = dict(model.named_parameters())
    for name, array in stage.state().items():
        np.testing.assert_array_equal(own[name].data, np.float32(np.float16(array)), name)


def test_files_that_are_no_bridge(folder, tmp_path):
    stage = real_stage(folder)
    path = tmp_path / "model.safetensors"
    models.save_bridge(path, stage.model)
    about = stage.model.config
    stage.model.config = replace(about, media_dim=64)
    models.save_bridge(path, stage.model)
    with pytest.raises(ValueError, match="does not fit its sizes"):
        models.load_bridge(folder, path)
    from miniflamingo.module import save_tensors

    save_tensors(path, {"x": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="holds no bridge"):
        models.load_bridge(folder, path)
