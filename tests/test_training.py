"""Training: the optimiser, the mixture, what is frozen, and runs that survive."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from miniflamingo import cards, runs, training
from miniflamingo import module as module_room
from miniflamingo.autograd import Tape
from miniflamingo.flamingo import PRESETS
from miniflamingo.functional import linear, log_softmax
from miniflamingo.language import LanguageConfig
from miniflamingo.module import Module, Parameter, load_tensors
from miniflamingo.training import (
    AdamW,
    BridgeRun,
    BridgeStage,
    LanguageRun,
    LanguageStage,
    OptimiserConfig,
    Run,
    Stage,
    VisionRun,
    VisionStage,
    check_weights,
    scheduled_rate,
    step_weights,
)
from miniflamingo.vision import VisionConfig
from miniflamingo.worlds import glyph_texts, grammar
from miniflamingo.worlds.datasets import IGNORED

SMALL_LM = LanguageConfig(len(grammar.TOKENIZER), dim=16, depth=1, heads=2)


def language_stage(steps=20, seed=0, **changes):
    optimiser = OptimiserConfig(steps=steps, warmup=3, **changes)
    return LanguageStage(LanguageRun(optimiser, SMALL_LM, batch=8, length=24, seed=seed))


# --- the optimiser --------------------------------------------------------------------------------


class Toy(Module):
    """Parameters of every kind that the optimiser treats differently."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.matrix = Parameter(rng.normal(size=(3, 2)))
        self.vector = Parameter(rng.normal(size=4))
        self.alpha_xattn = Parameter(np.array(0.3))
        self.resampler = Module()
        self.resampler.latents = Parameter(rng.normal(size=(2, 2)))
        self.frozen = Parameter(rng.normal(size=(2, 2)))
        self.frozen.requires_grad = False


def test_adamw_is_torchs_with_its_groups():
    torch = pytest.importorskip("torch")
    toy, config = Toy(), OptimiserConfig(20, 0.1, 4, weight_decay=0.3, clip=0.7, alpha_rate=10.0)
    before = {n: torch.tensor(p.data.copy()) for n, p in toy.named_parameters()}
    names = ["matrix", "vector", "alpha_xattn", "resampler.latents"]
    theirs = {n: before[n].requires_grad_() for n in names}
    groups = [{"params": [theirs[n]], "weight_decay": 0.3 * (n == "matrix")} for n in names]
    reference = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    adamw, rng = AdamW(toy, config), np.random.default_rng(1)
    assert adamw.names == names
    for step in range(20):
        for name, parameter in toy.named_parameters():
            parameter.grad = rng.normal(size=parameter.shape)
            if name in theirs:
                theirs[name].grad = torch.tensor(parameter.grad)
        for name, group in zip(names, reference.param_groups):
            scale = 10 if name == "alpha_xattn" else 1
            group["lr"] = scheduled_rate(config, step) * scale
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        reference.step()
        ours, rate = adamw.update(adamw.gradient())
        assert ours == pytest.approx(norm.item()) and rate == scheduled_rate(config, step)
    for name, parameter in toy.named_parameters():
        expected = theirs[name].detach() if name in theirs else before[name]
        np.testing.assert_allclose(parameter.data, expected, rtol=1e-5, err_msg=name)


def test_schedule_warms_up_and_falls_or_stays():
    cosine = OptimiserConfig(steps=100, rate=1.0, warmup=10)
    rates = [scheduled_rate(cosine, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01) and np.argmax(rates) == 9
    assert np.all(np.diff(rates[9:]) <= 0) and rates[-1] == 0.05
    constant = replace(cosine, schedule="constant")
    assert [scheduled_rate(constant, s) for s in (0, 9, 50, 99)] == [0.1, 1, 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "linear"}, {"steps": 0}, {"rate": -1.0}, {"clip": 0.0}, {"rate": np.nan},
        {"rate": np.inf}, {"steps": 2.5}, {"steps": True}, {"warmup": -1}, {"weight_decay": -1.0},
        {"beta1": 1.0}, {"beta2": -0.1}, {"alpha_rate": -1.0}, {"rate": "fast"},
    ],
)  # fmt: skip
def test_optimiser_refuses_what_cannot_work(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        OptimiserConfig(**wrong)


def test_largest_gradient_is_named():
    adamw = AdamW(Toy(), OptimiserConfig())
    gradient = np.zeros(len(adamw.weights))
    gradient[7] = -3
    assert adamw.largest(gradient) == ("vector", -3)
    gradient[10] = np.nan
    assert adamw.largest(gradient)[0] == "alpha_xattn"


# --- the mixture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{"a": -1, "b": 2}, {"a": 0, "b": 0.0}, {"a": np.nan}, {}])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="dataset weights must be"):
        check_weights(weights)


def test_strategies():
    weights, counts = {"a": 1.0, "b": 0.2}, {"a": 30, "b": 10}
    assert step_weights("accumulate", weights, 7, counts) == weights
    assert [list(step_weights("round_robin", weights, s, counts)) for s in range(3)] == [
        ["a"],
        ["b"],
        ["a"],
    ]
    assert step_weights("merge", weights, 0, counts) == {"a": 0.75, "b": 0.25}


class Quadratic(Stage):
    """|w - target_m|^2 / 2 with a target for each dataset: every gradient is known."""

    name = "quadratic"

    def __init__(self, weights, strategy="accumulate", poison=None, **optimiser):
        self.model, self.weights, self.strategy = Module(), weights, strategy
        self.model.w = Parameter(np.array([1.0, -2.0]))
        self.model.other = Parameter(np.array([0.5]))
        options = {"steps": 12, "warmup": 1, "clip": 1e9, "weight_decay": 0.0} | optimiser
        self.config = LanguageRun(OptimiserConfig(**options))
        self.targets, self.poison, self.step = {"a": 1.0, "b": 4.0}, poison, 0

    def draw(self, dataset, rng):
        return dataset, rng.normal(size=2)

    def count(self, batch):
        return {"a": 30, "b": 10}[batch[0]]

    def loss(self, batch):
        self.step += batch[0] == next(iter(self.weights))
        difference = self.model.w + -self.targets[batch[0]] + batch[1]
        loss = (difference * difference).sum() * 0.5 + self.model.other.sum() * 0.001
        if self.poison == (self.step, batch[0]):
            loss = loss * np.nan
        return loss

    def save(self, path):
        self.model.save(path)


def gradient_of_one_step(stage, folder):
    run = Run(stage, folder)
    record = run.step()
    return run.last_gradient, record


def test_accumulation_is_the_gradient_of_the_weighted_sum(tmp_path):
    stage = Quadratic({"a": 1.0, "b": 0.2})
    gradient, record = gradient_of_one_step(stage, tmp_path)
    rng = np.random.default_rng([0, 1])
    drift = {name: rng.normal(size=2) for name in "ab"}
    w = np.array([1.0, -2.0])
    expected = sum(lam * (w - stage.targets[n] + drift[n]) for n, lam in stage.weights.items())
    np.testing.assert_allclose(gradient[:2], expected)
    assert record["weighted"]["b"] == pytest.approx(0.2 * record["losses"]["b"])
    assert record["loss"] == pytest.approx(sum(record["weighted"].values()))
    assert record["gradient_norm"] == pytest.approx(np.linalg.norm(gradient))


def test_merged_batches_count_every_target_once(tmp_path):
    stage = Quadratic({"a": 1.0, "b": 0.2}, "merge")
    _, record = gradient_of_one_step(stage, tmp_path)
    losses = record["losses"]
    assert record["loss"] == pytest.approx((30 * losses["a"] + 10 * losses["b"]) / 40)


def test_a_dataset_of_weight_zero_is_left_out(tmp_path):
    _, record = gradient_of_one_step(Quadratic({"a": 1.0, "b": 0.0}), tmp_path)
    assert list(record["losses"]) == ["a"]


# --- runs that survive ----------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.test_training import Run, language_stage
Run(language_stage(steps=60), sys.argv[1], resume=True, checkpoint_every=7).train(progress=False)
"""


def train_in_a_process(folder):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=root), str(folder)],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip


def log_of(folder):
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wait_for_lines(folder, process, lines):
    log, end = folder / "log.jsonl", time.monotonic() + 120
    while not log.exists() or len(log.read_bytes().splitlines()) < lines:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Run(language_stage(steps=60), whole).train(progress=False)
    rng = np.random.default_rng()
    for after in (1, 20, 40):
        process = train_in_a_process(killed)
        wait_for_lines(killed, process, after)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
    assert train_in_a_process(killed).wait(120) == 0
    ours, theirs = (load_tensors(f / "model.safetensors")[0] for f in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert log_of(killed) == log_of(whole)
    assert [record["step"] for record in log_of(whole)] == list(range(1, 61))


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_a_run_saves_and_says_how_to_go_on(tmp_path, which):
    process = train_in_a_process(tmp_path)
    wait_for_lines(tmp_path, process, 3)
    process.send_signal(which)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    step = int(load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"])
    assert 3 <= step < 60 and f"after step {step}; the same command goes on" in printed
    assert len(log_of(tmp_path)) == step
    assert not (tmp_path / "model.safetensors").exists()
    assert Run(language_stage(steps=60), tmp_path, resume=True).train(progress=False) is True


def test_a_finished_run_resumed_does_nothing_more(tmp_path):
    stage = Quadratic({"a": 1.0, "b": 1.0})
    Run(stage, tmp_path).train(progress=False)
    before = stage.model.w.data.copy()
    again = Quadratic({"a": 1.0, "b": 1.0})
    assert Run(again, tmp_path, resume=True).train(progress=False)
    assert np.array_equal(again.model.w.data, before) and len(log_of(tmp_path)) == 12


def stopped_at_7(folder):
    """A run of 12 steps that broke down in step 8, behind its checkpoint of step 5."""
    stage = Quadratic({"a": 1.0, "b": 1.0}, poison=(8, "b"))
    with pytest.raises(FloatingPointError):
        Run(stage, folder, checkpoint_every=5).train(progress=False)


def resumed(folder, **options):
    return Run(Quadratic({"a": 1.0, "b": 1.0}, **options), folder, resume=True)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    stopped_at_7(tmp_path)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 8, "lo')  # killed while writing
    resumed(tmp_path)
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4, 5]


DAMAGE = {
    "missing": (lambda lines: None, "line 1: the log ends before it"),
    "a lost line": (lambda lines: lines[:2] + lines[3:], "line 3: expected the record of step 3"),
    "short": (lambda lines: lines[:3], "line 4: the log ends before it"),
    "cut off": (lambda lines: [*lines[:4], lines[4][:-9]], "line 5: it is cut off"),
    "zeros": (lambda lines: [*lines[:4], bytes(500)], "line 5: it is cut off"),
    "zeros within": (lambda lines: [*lines[:3], b"\0\n", lines[4]], "line 4: it is no JSON"),
    "no text": (lambda lines: [b"\xff" + lines[0], *lines[1:]], "line 1: .*decode"),
    "nested": (lambda lines: [b"[" * 99_999 + b"\n", *lines[1:]], "line 1: it is no JSON"),
    "no record": (lambda lines: [b"7\n", *lines[1:]], "line 1: expected the record of step 1"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_log_is_told_by_its_line_and_kept(tmp_path, damage, message):
    stopped_at_7(tmp_path)
    log = tmp_path / "log.jsonl"
    lines = damage(log.read_bytes().splitlines(keepends=True))
    log.unlink() if lines is None else log.write_bytes(b"".join(lines))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=rf"log\.jsonl, {message}.*checkpoint is at step 5"):
        resumed(tmp_path)
    assert files_of(tmp_path) == before


def forge(path, change):
    """Save a checkpoint again with other arrays or metadata, as its own `sha256` would say."""
    state, metadata = load_tensors(path)
    change(state, metadata)
    metadata["sha256"] = training._digest(state, metadata)
    training.save_tensors(path, state, metadata)


FORGED = {
    "broadcast": (lambda s, m: s.update(w=np.ones(1)), r"mis-shaped: w expected \[2\], got \[1\]"),
    "dtype": (lambda s, m: s.update(w=np.ones(2, np.float32)), "w must be F64, got F32"),
    "none": (lambda s, m: s.pop("w"), r"missing: w \[2\]"),
    "moment": (lambda s, m: s.pop("adamw.mean.w"), r"missing: adamw\.mean\.w"),
    "more": (lambda s, m: s.update(v=np.ones(2)), "unexpected: v"),
    "NaN": (lambda s, m: s.update(w=np.array([1, np.nan])), "w is not finite"),
    "infinite moment": (lambda s, m: s["adamw.mean.w"].fill(np.inf), r"adamw\.mean\.w is not fin"),
    "negative square": (lambda s, m: s["adamw.square.w"].fill(-1), r"square\.w has values below 0"),
    "step beyond": (lambda s, m: m.update(step="13"), r"must be an integer in 0\.\.12, got 13"),
    "step below": (lambda s, m: m.update(step="-1"), "step must be an integer in"),
    "step half": (lambda s, m: m.update(step="4.5"), "step must be an integer in"),
    "step true": (lambda s, m: m.update(step="true"), "step must be an integer in"),
    "step text": (lambda s, m: m.update(step="five"), "step is no JSON"),
    "step NaN": (lambda s, m: m.update(step="NaN"), "step is no JSON: NaN is no number"),
    "step missing": (lambda s, m: m.pop("step"), "its metadata has no 'step'"),
    "rng": (lambda s, m: m.update(rng="{}"), "rng is no state of a generator"),
    "rng of another": (lambda s, m: m.update(rng=m["rng"].replace("P", "X")), "rng is no state"),
    "config": (lambda s, m: m.update(config="[1]"), "has another config"),
    "deep config": (lambda s, m: m.update(config="[" * 99_999), "config is no JSON"),
    "parts": (lambda s, m: m.update(parts='[{"command": "x"}]'), "parts must be a list of comm"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", FORGED.values(), ids=FORGED)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(tmp_path, change, message):
    stopped_at_7(tmp_path)
    forge(tmp_path / "checkpoint.safetensors", change)
    before = files_of(tmp_path)
    stage = Quadratic({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match=message):
        Run(stage, tmp_path, resume=True)
    assert files_of(tmp_path) == before and stage.model.w.data.tolist() == [1, -2]


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(tmp_path):
    stopped_at_7(tmp_path)
    path, rng = tmp_path / "checkpoint.safetensors", np.random.default_rng(0)
    whole, log = path.read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    for place in [*rng.integers(0, len(whole), 60), whole.index(b"sha256"), whole.index(b"parts")]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(0, 8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors|another config"):
            resumed(tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    path.write_bytes(whole)
    assert resumed(tmp_path).train(progress=False)


def test_a_checkpoint_of_the_first_edition_still_loads(tmp_path):
    stopped_at_7(tmp_path)
    state, metadata = load_tensors(tmp_path / "checkpoint.safetensors")
    del metadata["sha256"], metadata["parts"]
    training.save_tensors(tmp_path / "checkpoint.safetensors", state, metadata)
    run = resumed(tmp_path)
    assert run.train(progress=False) and len(run.parts) == 1


def test_two_runs_do_not_share_a_folder(tmp_path):
    process = train_in_a_process(tmp_path)
    wait_for_lines(tmp_path, process, 2)
    with pytest.raises(ValueError, match=f"another process is training in the folder {tmp_path}"):
        Run(language_stage(steps=60), tmp_path, resume=True)
    process.kill()  # and leaves no lock behind
    process.communicate()
    Run(language_stage(steps=60), tmp_path, resume=True).lock.release()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    stopped_at_7(tmp_path)
    left = [".checkpoint.safetensors.0123abcd", ".log.jsonl.89abcdef", ".run.json.00000000"]
    users = [".checkpoint.safetensors.backup", ".notes.0123abcd", "checkpoint.safetensors.0123abcd"]
    for name in left + users:
        (tmp_path / name).write_text("half", "utf-8")
    resumed(tmp_path)
    names = set(os.listdir(tmp_path))
    assert names.isdisjoint(left) and names >= set(users)


@pytest.mark.parametrize("name", ["model.safetensors", "run.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_a_model_but_no_run_is_left_alone(tmp_path, name, resume):
    (tmp_path / name).write_text("somebody's", "utf-8")
    with pytest.raises(ValueError, match=f"{name}"):
        Run(language_stage(steps=1), tmp_path, resume=resume)
    assert (tmp_path / name).read_text("utf-8") == "somebody's"


def test_a_log_without_its_checkpoint_is_not_begun_again(tmp_path):
    stopped_at_7(tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match=r"log\.jsonl of 7 steps, but no checkpoint to go on"):
        Run(Quadratic({"a": 1.0}), tmp_path, resume=True, checkpoint_every=5)
    assert len(log_of(tmp_path)) == 7


def test_a_full_disk_is_one_error_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run, save = Run(Quadratic({"a": 1.0}), tmp_path, checkpoint_every=5), training.save_tensors

    def full(path, *args):
        if run.optimiser.step > 5:
            monkeypatch.setattr(module_room.os, "fsync", no_space)
        save(path, *args)

    def no_space(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training, "save_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint\.safetensors"):
        run.train(progress=False)
    monkeypatch.undo()
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "5"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".checkpoint")]
    assert Run(Quadratic({"a": 1.0}), tmp_path, resume=True).train(progress=False)


def test_the_parts_of_a_run_add_up(tmp_path):
    stopped_at_7(tmp_path)
    first = json.loads(load_tensors(tmp_path / "checkpoint.safetensors")[1]["parts"])
    run = resumed(tmp_path)
    run.costs.start -= 100  # seconds of work
    assert run.train(progress=False) and run.parts[:1] == first and len(run.parts) == 2
    cards.record_run(tmp_path, runs.seconds(run.parts), run.parts)
    about = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert about["command"] == first[0]["command"] and about["parts"] == run.parts
    assert 100 <= about["processor_seconds"] < 160
    again = resumed(tmp_path)
    assert again.train(progress=False) and again.parts == run.parts  # nothing more was done


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    stage = Quadratic({"a": 1.0, "b": 1.0}, poison=(8, "b"))
    with pytest.raises(FloatingPointError) as error:
        Run(stage, tmp_path, checkpoint_every=5).train(progress=False)
    for part in ("step 8", "dataset 'b' is nan", ", in w", str(tmp_path)):
        assert part in str(error.value)
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "5"
    assert [record["step"] for record in log_of(tmp_path)] == list(range(1, 8))
    assert np.isfinite(stage.model.w.data).all()
    healed = Quadratic({"a": 1.0, "b": 1.0})
    assert Run(healed, tmp_path, resume=True).train(progress=False)


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    stage = Quadratic({"a": 1.0, "b": 1.0})
    run = Run(stage, tmp_path)
    monkeypatch.setattr(run.optimiser, "gradient", lambda: np.where(np.arange(3) == 2, np.inf, 1.0))
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient .* inf, in other"):
        run.step()
    assert stage.model.w.data.tolist() == [1.0, -2.0]


def test_another_config_is_listed(tmp_path):
    Run(language_stage(steps=2), tmp_path).train(progress=False)
    other = language_stage(steps=2, seed=1, rate=0.5)
    with pytest.raises(ValueError) as error:
        Run(other, tmp_path, resume=True)
    assert "optimiser.rate: 0.002 there, 0.5 here" in str(error.value)
    assert "seed: 0 there, 1 here" in str(error.value) and str(error.value).count("there") == 2


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    Run(language_stage(steps=1), tmp_path).train(progress=False)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run.*resume"):
        Run(language_stage(steps=1), tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot write to the folder"):
            Run(language_stage(steps=1), out)


# --- stages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a language model and a vision encoder, hardly trained."""
    lm, vision = tmp_path_factory.mktemp("lm"), tmp_path_factory.mktemp("vision")
    stage = VisionStage(VisionRun(OptimiserConfig(steps=1), batch=16))
    Run(stage, vision).train(progress=False)
    Run(language_stage(steps=1), lm).train(progress=False)
    return {"lm": lm, "vision": vision}


SMALL_POOL = {
    "pool_per_class": 1, "pool_per_turned": 1, "pool_pairs": 20, "pool_clips": 10,
    "batches": (8, 2, 2, 2),
}  # fmt: skip


def bridge(trained, steps=3, model=None, **changes):
    optimiser = OptimiserConfig(steps=steps, warmup=1, alpha_rate=10.0)
    config = BridgeRun(optimiser, **{**SMALL_POOL, **changes})
    if model:
        config = replace(config, model=replace(PRESETS["mini"], **model))
    return BridgeStage(config, **trained)


def test_language_model_learns(tmp_path):
    stage = language_stage(steps=30)
    assert Run(stage, tmp_path).train(progress=False)
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert losses[0] == pytest.approx(np.log(len(grammar.TOKENIZER)), rel=0.1)
    assert np.mean(losses[-5:]) < losses[0] - 0.3


def test_vision_encoder_learns(tmp_path):
    optimiser = OptimiserConfig(steps=16, warmup=2)
    stage = VisionStage(VisionRun(optimiser, batch=16))
    assert Run(stage, tmp_path).train(progress=False)
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.parametrize("train_eoc", [False, True])
def test_frozen_is_frozen_and_everything_else_is_trained(trained, tmp_path, train_eoc):
    stage = bridge(trained, model={"train_eoc": train_eoc})
    model = stage.model
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    Run(stage, tmp_path).train(progress=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("resampler.", "gated_xattn.") + ("eoc_embedding", "eoc_head") * train_eoc
    assert trainable == {name for name in before if name.startswith(parts)}
    changed = {n for n, p in model.named_parameters() if not np.array_equal(p.data, before[n])}
    assert changed == trainable
    lm = load_tensors(trained["lm"] / "model.safetensors")[0]
    assert all(np.array_equal(model.lm.state_dict()[name], lm[name]) for name in lm)


def test_bridge_loss_is_that_of_the_counted_words(trained):
    stage = bridge(trained)
    batch = stage.draw("documents", np.random.default_rng(0))
    features = stage.pool.images[batch.pictures]
    phi = training.compute_phi(batch.tokens, training.IMAGE, batch.use_next)
    logp = log_softmax(stage.model.read(batch.tokens, stage.model.resampler(features), phi))
    total, count = 0, 0
    for b, row in enumerate(batch.targets):
        for l, target in enumerate(row[1:]):
            if target != IGNORED:
                total, count = total - logp[b, l, target], count + 1
    assert stage.count(batch) == count
    assert stage.loss(batch) == pytest.approx(total / count, rel=1e-5)


def test_every_gate_is_logged_at_every_step(trained, tmp_path):
    stage = bridge(trained)
    Run(stage, tmp_path).train(progress=False)
    records = log_of(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert set(records[0]["losses"]) == {"documents", "captions", "pairs", "clips"}
    for name, last in stage.model.alphas().items():
        assert np.allclose(records[-1][name], last) and len(last) == len(stage.model.gated_xattn)
        assert 0 not in records[0][name]


def test_p_next_gives_tokens_the_next_picture(trained):
    stage = bridge(trained, p_next=1.0)
    batch = stage.draw("documents", np.random.default_rng(0))
    assert batch.use_next.all()
    phi = training.compute_phi(batch.tokens, training.IMAGE, batch.use_next)
    images = batch.tokens == training.IMAGE
    assert (phi[:, 1] == 1).all() and (batch.tokens[:, 1] != training.IMAGE).all()
    assert np.array_equal(phi[images].reshape(-1, 5), np.tile(np.arange(1, 6), (8, 1)))


@pytest.mark.parametrize("strategy", training.STRATEGIES)
def test_interrupted_bridge_goes_on_bit_for_bit(trained, tmp_path, strategy):
    whole, stopped = bridge(trained, 4, strategy=strategy), bridge(trained, 4, strategy=strategy)
    Run(whole, tmp_path / "whole").train(progress=False)
    run, stopped.draw = Run(stopped, tmp_path / "cut", checkpoint_every=2), _fail_after(stopped, 3)
    with pytest.raises(MemoryError):
        run.train(progress=False)
    resumed = bridge(trained, 4, strategy=strategy)
    Run(resumed, tmp_path / "cut", resume=True).train(progress=False)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def _fail_after(stage, steps):
    draw, calls = stage.draw, []

    def failing(dataset, rng):
        calls.append(dataset)
        if calls.count(dataset) > steps:
            raise MemoryError
        return draw(dataset, rng)

    return failing


def test_other_frozen_parts_are_another_config(trained, tmp_path):
    Run(bridge(trained, 1), tmp_path / "run").train(progress=False)
    Run(language_stage(steps=2), tmp_path / "lm").train(progress=False)
    other = bridge({"lm": tmp_path / "lm", "vision": trained["vision"]}, 1)
    with pytest.raises(ValueError, match=r"frozen\.lm: [0-9a-f]{64} there"):
        Run(other, tmp_path / "run", resume=True)


def test_flamingo_is_saved_with_its_config(trained, tmp_path):
    stage = bridge(trained, 1, model={"num_latents": 5, "skip_without_image": True})
    Run(stage, tmp_path).train(progress=False)
    model = training.load_flamingo(tmp_path / "model.safetensors")
    assert model.config == stage.model.config and model.config.num_latents == 5
    assert model.config.lm == SMALL_LM
    ours, theirs = model.state_dict(), stage.model.state_dict()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="holds no Flamingo"):
        training.load_flamingo(trained["lm"] / "model.safetensors")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"strategy": "all"}, "strategy must be one of"),
        ({"weights": (1.0, -0.2, 0.2, 0.5)}, "dataset weights must be"),
        ({"weights": (0.0, 0.0, 0.0, 0.0)}, "dataset weights must be"),
        ({"weights": (1.0, 0.2)}, "weights must have 4 elements, got"),
        ({"batches": (1, 1, 1)}, "batches must have 4 elements"),
        ({"batches": (8, 0, 2, 2)}, "batches must be at least 1"),
        ({"batches": (8, 2.5, 2, 2)}, r"batches must be tuple\[int, \.\.\.\], got"),
        ({"p_next": 1.5}, r"p_next must be in 0\.\.1, got 1\.5"),
        ({"caption_noise": np.nan}, "caption_noise must be float, got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"pool_clips": 0}, "pool_clips must be at least 1"),
        ({"pictures": 0}, "pictures must be at least 1"),
    ],
)
def test_bridge_refuses_what_cannot_work(wrong, message):
    with pytest.raises(ValueError, match=message):
        BridgeRun(**wrong)


@pytest.mark.parametrize(
    "kind, wrong, message",
    [
        (LanguageRun, {"batch": 3}, "batch must be at least 4, got 3"),
        (LanguageRun, {"batch": 0, "long_share": 0.0}, "batch must be at least 1"),
        (LanguageRun, {"length": 4}, "length must be at least 5"),
        (LanguageRun, {"any_keys": -0.1}, r"any_keys must be in 0\.\.1"),
        (LanguageRun, {"noise": -0.1}, r"noise must be at least 0"),
        (LanguageRun, {"model": None}, "model must be LanguageConfig, got None"),
        (VisionRun, {"batch": 1}, "batch must be at least 2"),
        (VisionRun, {"text_dim": 6}, "text_dim must be a multiple of 4"),
        (VisionRun, {"label_smoothing": 1.0}, "label_smoothing must be in .* below 1"),
        (VisionRun, {"model": VisionConfig(16)}, "image_size must be 24, got 16"),
    ],
)
def test_the_other_stages_refuse_it_too(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_a_model_of_too_few_words_is_refused_before_it_is_trained(trained, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size must be at least \d+ words, got 9"):
        LanguageStage(LanguageRun(model=LanguageConfig(9)))
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        Run(language_stage(), tmp_path / "none", checkpoint_every=0)
    assert not (tmp_path / "none").exists()


def test_tape_and_optimiser_agree_on_the_parameters():
    """The optimiser replaces the arrays by views: a later forward must see its updates."""
    toy = Toy()
    adamw = AdamW(toy, OptimiserConfig(steps=5, rate=0.1, warmup=1))
    x = np.ones((1, 2))
    with Tape() as tape:
        loss = linear(x, toy.matrix).sum()
    tape.backward(loss)
    before = float(linear(x, toy.matrix).sum())
    adamw.update(adamw.gradient())
    assert float(linear(x, toy.matrix).sum()) < before - 0.1


def test_asked_twice_a_run_ends_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs this in the background
    with pytest.raises(KeyboardInterrupt), training.asked_to_stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("line", ['{"chat": 1}', '{"step": 2}', "notes"])
def test_a_log_of_another_program_is_in_the_way(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f"{line}\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl is in the way, no log of a run: line 1"):
        training.Run(Quadratic({"a": 1.0}), tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_text("utf-8") == f"{line}\n{line}\n"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "run.json"])
def test_a_run_does_not_overwrite_what_no_run_has_made(name, resume, tmp_path):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"holds .*{name}"):
        training.Run(Quadratic({"a": 1.0}), tmp_path, resume=resume)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_run_overwrites_no_model_that_it_has_not_made(tmp_path):
    for finished in (False, True):
        out = tmp_path / str(finished)
        run = training.Run(Quadratic({"a": 1.0}), out)
        if finished:
            run.train(progress=False)
        else:
            run.step()
            with open(run.log_path, "w", encoding="utf-8") as log:
                log.write('{"step": 1}\n')
                run.save(log)
            run.lock.release()
        (out / "model.safetensors").write_bytes(b"mine")
        if finished:
            assert training.Run(Quadratic({"a": 1.0}), out, resume=True).train(progress=False)
        else:
            with pytest.raises(
                ValueError, match=r"model\.safetensors is in the way: the run is at"
            ):
                training.Run(Quadratic({"a": 1.0}), out, resume=True)
        assert (out / "model.safetensors").read_bytes() == b"mine"


def test_a_lock_follows_no_link_and_takes_nobodys_file(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".writable").write_bytes(b"mine")
    training.Run(Quadratic({"a": 1.0}), out).lock.release()
    assert (out / ".writable").read_bytes() == b"mine"
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot write to the folder"):
        training.Run(Quadratic({"a": 1.0}), out, resume=True)
    assert not (tmp_path / "elsewhere").exists()


# --- glyphs ---------------------------------------------------------------------------------------

GLYPH_LM = replace(SMALL_LM, vocab_size=len(glyph_texts.TOKENIZER))
FEW = {"classes": 12, "glyph_batches": (8, 4), "pool_glyphs": 60}


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    """A language model and an eye that have learned of shapes and of glyphs."""
    folder = tmp_path_factory.mktemp("both")
    one = OptimiserConfig(steps=1)
    lm = LanguageStage(LanguageRun(one, GLYPH_LM, batch=8, weights=(1.0, 0.5)))
    vision = VisionRun(one, batch=8, weights=(1.0, 0.5), glyph_batch=6, classes=12)
    for stage in (lm, VisionStage(vision)):
        Run(stage, folder / stage.name).train(progress=False)
        assert len(log_of(folder / stage.name)[0]["losses"]) == 2
    return {"lm": folder / "lm", "vision": folder / "vision"}


def test_noise_is_a_share_of_the_embeddings_and_changes_the_loss_alone():
    plain, noisy = (LanguageStage(LanguageRun(model=SMALL_LM, batch=8, noise=n)) for n in (0, 0.3))
    (one, none), (other, noise) = (s.draw("text", np.random.default_rng(4)) for s in (plain, noisy))
    assert none is None and np.array_equal(one, other)
    B, L = other.shape
    size = np.sqrt((noisy.model.embedding.weight.data**2).mean())
    assert noise.shape == (B, L - 1, SMALL_LM.dim) and noise.dtype == np.float32
    assert noise.std() == pytest.approx(0.3 * size, rel=0.02)
    batch = noisy.draw("text", np.random.default_rng(4))
    assert noisy.loss(batch).data != plain.loss(batch._replace(noise=None)).data


def test_one_bridge_learns_of_shapes_and_of_glyphs(of_both, tmp_path):
    stage = bridge(of_both, 2, glyph_weights=(1.0, 0.5), **FEW)
    assert Run(stage, tmp_path).train(progress=False)
    record = log_of(tmp_path)[-1]
    assert list(record["losses"]) == ["documents", "captions", "pairs", "clips", *training.GLYPHS]
    weighted = record["weighted"]["glyph_captions"]
    assert weighted == pytest.approx(0.5 * record["losses"]["glyph_captions"])


def test_of_a_world_of_weight_0_nothing_is_drawn(of_both, tmp_path):
    alone = bridge(of_both, 2, weights=(0.0,) * 4, glyph_weights=(1.0, 1.0), **FEW)
    assert Run(alone, tmp_path / "glyphs").train(progress=False)
    assert "pool" not in vars(alone) and alone.glyph_pool.glyphs.shape[0] == 60
    without = bridge(of_both, 2)
    assert Run(without, tmp_path / "shapes").train(progress=False)
    assert "glyph_pool" not in vars(without) and "pool" in vars(without)
    assert VisionStage(VisionRun()).classes is None


def test_glyphs_need_their_words(trained):
    for make in (
        lambda: LanguageStage(LanguageRun(model=SMALL_LM, weights=(0.0, 1.0))),
        lambda: bridge(trained, glyph_weights=(1.0, 0.0), **FEW),
    ):
        with pytest.raises(ValueError, match=f"at least {GLYPH_LM.vocab_size} words, got"):
            make()


@pytest.mark.parametrize(
    "config, wrong",
    [
        (LanguageRun, {"weights": (1.0,)}), (LanguageRun, {"weights": (0.0, 0.0)}),
        (VisionRun, {"weights": (1.0, -1.0)}), (VisionRun, {"classes": 1}),
        (VisionRun, {"glyph_batch": 1}), (BridgeRun, {"bursts": 1.5}), (BridgeRun, {"ways": (0,)}),
        (BridgeRun, {"glyph_weights": (1.0,)}), (BridgeRun, {"classes": 0}),
    ],
)  # fmt: skip
def test_settings_of_glyphs_that_cannot_work_are_refused(config, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        config(**wrong)


def test_a_run_from_before_there_were_glyphs_goes_on(tmp_path):
    stage = language_stage(steps=4)
    run = Run(stage, tmp_path, checkpoint_every=2)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as log:
        for _ in range(2):
            log.write(json.dumps(run.step()) + "\n")
        log.flush()
        run.save(log)
    run.lock.release()

    def older(state, metadata):
        config = json.loads(metadata["config"])
        del config["weights"]
        metadata["config"] = json.dumps(config)

    forge(tmp_path / "checkpoint.safetensors", older)
    assert Run(language_stage(steps=4), tmp_path, resume=True).train(progress=False)
    assert len(log_of(tmp_path)) == 4
