"""Training on several processes: the curve of one, and runs that survive."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from miniflamingo import __main__ as command_line  # noqa: E402
from miniflamingo import runs, training  # noqa: E402
from miniflamingo.kernels.model import layers, train  # noqa: E402
from miniflamingo.language import LanguageConfig  # noqa: E402
from miniflamingo.module import load_tensors  # noqa: E402
from miniflamingo.vision import VisionConfig  # noqa: E402
from miniflamingo.worlds import grammar  # noqa: E402

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import train_worker  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a language model and a vision encoder, not trained."""
    lm, vision = tmp_path_factory.mktemp("lm"), tmp_path_factory.mktemp("vision")
    config = LanguageConfig(len(grammar.TOKENIZER), dim=16, depth=2, heads=2)
    training.LanguageStage(training.LanguageRun(model=config)).save(lm / "model.safetensors")
    config = training.VisionRun(model=VisionConfig(widths=(8, 8), depths=(1, 1), stem=(4,)))
    training.VisionStage(config).save(vision / "model.safetensors")
    return str(lm), str(vision)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def assert_same_curve(ours, theirs, tolerance=2e-4):
    """All numbers of two logs, each within the tolerance of the largest of its kind."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for key in theirs[0].keys() - {"step"}:
        mine, other = (np.array([_numbers(line[key]) for line in log]) for log in (ours, theirs))
        np.testing.assert_allclose(mine, other, 0, tolerance * abs(other).max(), err_msg=key)


def _numbers(value):
    return list(value.values()) if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def reference(parts, tmp_path_factory):
    """The folder of the same run by the NumPy model, which knows of no processes."""
    out = tmp_path_factory.mktemp("reference")
    assert training.Run(train_worker.stage(*parts), out).train(progress=False)
    return out


def torchrun(*arguments, restarts=0):
    """Two processes of the worker under torchrun, with one CPU thread each -> its stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", f"--max-restarts={restarts}", HERE / "train_worker.py"]
    root = str(HERE.parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see kernels/model/train.py
    done = subprocess.run(
        [*command, *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        cwd=root,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def killed(parts, tmp_path_factory):
    """The folder of a run on two processes, one of which was killed in step 6."""
    out = tmp_path_factory.mktemp("killed")
    errors = torchrun(*parts, str(out), "SIGKILL", "5", restarts=1)
    assert "exitcode: -9" in errors
    return out


def test_a_killed_worker_is_replaced_and_the_curve_goes_on(killed, reference):
    starts = [json.loads(line) for line in (killed / "starts").read_text("utf-8").splitlines()]
    assert starts == [[0, 2], [4, 2]]  # checkpoints every 2 steps: step 5 was made again
    assert_same_curve(log_of(killed), log_of(reference))


def test_the_model_of_two_processes_is_that_of_numpy(killed, reference):
    ours, theirs = (
        training.load_flamingo(folder / "model.safetensors") for folder in (killed, reference)
    )
    assert ours.config == theirs.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 60, (2, 9))
    tokens[:, [1, 5]] = ours.config.image_token
    batch = tokens, rng.random((2, 2, 1, 24, 24, 3), np.float32)
    logits, expected = (model(*batch) for model in (ours, theirs))
    assert abs(logits - expected).max() < 1e-3 * abs(expected).max()
    twin = layers.Flamingo.from_numpy(ours)(*map(torch.from_numpy, batch)).detach().numpy()
    assert abs(twin - logits).max() < 1e-4 * abs(logits).max()


def test_what_is_frozen_comes_back_as_it_was_and_the_rest_has_moved(parts, killed):
    start = train_worker.stage(*parts).model.state_dict()
    end = training.load_flamingo(killed / "model.safetensors")
    for name, parameter in end.named_parameters():
        same = np.array_equal(parameter.data, start[name])
        assert same != parameter.requires_grad, name


def sharded(parts, out, resume=False, precision="fp32", **changes):
    """(whether it was finished, the run) of a run on this process alone."""
    with train.processes("cpu") as mesh:
        stage = train_worker.stage(*parts, **changes)
        run = train.ShardedRun(stage, out, mesh, resume, 2, precision)
        return run.train(progress=False), run


def test_one_process_goes_on_where_two_were_asked_to_stop(parts, reference, tmp_path):
    torchrun(*parts, str(tmp_path), "SIGTERM", "1")  # to one of them: both end step 3 whole
    assert len(log_of(tmp_path)) == 3 and not (tmp_path / "model.safetensors").exists()
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 4, "loss')  # as of a process killed while it wrote
    assert sharded(parts, tmp_path, resume=True)[0]
    assert_same_curve(log_of(tmp_path), log_of(reference))
    ours, theirs = (
        training.load_flamingo(folder / "model.safetensors").state_dict()
        for folder in (tmp_path, reference)
    )
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], 0, 1e-3, err_msg=name)


def test_two_processes_compare_the_rows_of_both(tmp_path):
    assert training.Run(train_worker.contrastive_stage(), tmp_path / "numpy").train(progress=False)
    torchrun("none", "none", str(tmp_path / "two"))
    assert_same_curve(log_of(tmp_path / "two"), log_of(tmp_path / "numpy"))
    files = (tmp_path / name / "model.safetensors" for name in ("numpy", "two"))
    (theirs, about), (ours, same) = map(load_tensors, files)
    assert about == same and ours.keys() == theirs.keys()  # the text encoder is thrown away
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], 0, 1e-3, err_msg=name)


def test_a_contrastive_batch_that_cannot_be_shared_is_refused():
    class Mesh:
        size, get_rank = staticmethod(lambda: 3), staticmethod(lambda: 0)

    loss = train.ContrastiveLoss(train_worker.contrastive_stage(), Mesh, "auto")
    with pytest.raises(ValueError, match="divide evenly over the processes, got 16 rows for 3"):
        loss.rows((np.zeros((16, 24, 24, 3)), np.zeros((16, 4), int)), slice(0, None, 3))


def test_bfloat16_keeps_what_is_trained_in_float32(parts, reference, tmp_path):
    finished, run = sharded(parts, tmp_path, precision="bf16")
    assert finished
    for parameter in run.module.parameters():
        trained = parameter.requires_grad
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16)
    moments = {x.dtype for s in run.optimiser.state.values() for x in s.values() if x.ndim}
    assert moments == {torch.float32}
    ours, theirs = (np.array([r["loss"] for r in log_of(f)]) for f in (tmp_path, reference))
    assert 0 < abs(ours - theirs).max() < 0.01 * theirs.max()


@pytest.mark.parametrize("strategy", ["round_robin", "merge"])
def test_the_other_strategies_are_numpys_too(parts, tmp_path, strategy):
    stage = train_worker.stage(*parts, strategy=strategy)
    training.Run(stage, tmp_path / "numpy").train(progress=False)
    assert sharded(parts, tmp_path / "torch", strategy=strategy)[0]
    assert_same_curve(log_of(tmp_path / "torch"), log_of(tmp_path / "numpy"))


def test_a_run_is_neither_overwritten_nor_mixed(parts, killed, tmp_path):
    with pytest.raises(ValueError, match="already holds a run: choose another folder, or resume"):
        sharded(parts, killed)
    with pytest.raises(ValueError, match=r"another config:\n  seed: 0 there, 1 here"):
        sharded(parts, killed, resume=True, seed=1)
    with pytest.raises(ValueError, match="precision: fp32 there, bf16 here"):
        sharded(parts, killed, resume=True, precision="bf16")
    before = log_of(killed)
    assert sharded(parts, killed, resume=True)[0]  # a finished run does nothing more
    assert log_of(killed) == before


def test_a_half_written_checkpoint_does_not_count(parts, killed):
    half = killed / "checkpoints" / "0000009"
    half.mkdir()
    (half / "run.json").write_text("{}", "utf-8")
    with train.processes("cpu") as mesh:
        run = train.ShardedRun(train_worker.stage(*parts), killed, mesh, resume=True)
    run.release()
    assert run.step == 7 and run.latest().name == "0000007"
    assert not half.exists()  # it is of no use, and goes


def small_run(out, resume=True, steps=4):
    """(whether it was finished, the run) of a small language model on this process alone."""
    config = LanguageConfig(len(grammar.TOKENIZER), dim=8, depth=1, heads=2)
    optimiser = training.OptimiserConfig(steps, warmup=1)
    stage = training.LanguageStage(training.LanguageRun(optimiser, config, batch=4))
    with train.processes("cpu") as mesh:
        run = train.ShardedRun(stage, out, mesh, resume, 2)
        return run.train(progress=False), run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert small_run(out, resume=False)[0]
    return out


def change_about(folder, seal=True, **changes):
    about = json.loads((folder / "run.json").read_text("utf-8"))
    del about["sha256"]
    before, about = train._digest(about), about | changes
    about["sha256"] = train._digest(about) if seal else before
    (folder / "run.json").write_text(json.dumps(about), "utf-8")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def store(folder, change):
    """Save the checkpoint's tensors again, changed, as its run.json would say."""
    state = {}
    reader = dcp.FileSystemReader(folder)
    for name, kind in reader.read_metadata().state_dict_metadata.items():
        is_tensor = hasattr(kind, "size")
        state[name] = torch.empty(kind.size, dtype=kind.properties.dtype) if is_tensor else None
    dcp.load(state, checkpoint_id=folder)
    change(state)
    for path in folder.glob("*.distcp"):
        path.unlink()
    dcp.save(state, checkpoint_id=folder)
    files = [path for path in folder.iterdir() if path.name != "run.json"]
    change_about(folder, files={path.name: runs.file_digest(path) for path in files})


NORM = "model.model.norm.weight"
DAMAGE = {
    "a flipped bit": (lambda f: flip(f / "__0_0.distcp"), "damaged files: __0_0.distcp"),
    "metadata": (lambda f: flip(f / ".metadata"), "damaged files: .metadata"),
    "a part": (lambda f: (f / "__0_0.distcp").unlink(), "damaged files: __0_0.distcp"),
    "more": (lambda f: (f / "__9_0.distcp").write_bytes(b"x"), "damaged files: __9_0.distcp"),
    "no JSON": (lambda f: (f / "run.json").write_bytes(b"\xff\0"), "run.json is no JSON"),
    "step": (lambda f: change_about(f, step=5), r"step must be an integer in 0\.\.4, got 5"),
    "other step": (lambda f: change_about(f, step=3), "step must be that of its folder, got 3"),
    "rng": (lambda f: change_about(f, rng={}), "rng is no state of a generator"),
    "seal": (lambda f: change_about(f, seal=False, parts=[]), "run.json is damaged"),
    "parts": (lambda f: change_about(f, parts=[1]), "parts must be a list"),
    "shape": (lambda f: store(f, lambda s: s.update({NORM: torch.ones(1)})), f"{NORM} expected"),
    "dtype": (lambda f: store(f, lambda s: s.update({NORM: torch.ones(8).half()})), "float16"),
    "missing": (lambda f: store(f, lambda s: s.pop(NORM)), f"{NORM} expected .*, got None"),
    "NaN": (lambda f: store(f, lambda s: s[NORM].fill_(torch.nan)), f"{NORM} is not finite"),
    "square": (lambda f: store(f, lambda s: s[SQUARE].fill_(-1)), "has values below 0"),
}  # fmt: skip
SQUARE = "optimiser.state.model.norm.weight.exp_avg_sq"


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected an existing")
@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused(finished, tmp_path, damage, message):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "0000004")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        small_run(tmp_path / "run")
    assert str(tmp_path / "run") in str(error.value)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_a_damaged_log_is_refused_and_a_lock_is_kept(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    lock = runs.Lock(tmp_path / "run")
    with pytest.raises(ValueError, match="another process is training in the folder"):
        small_run(tmp_path / "run")
    lock.release()
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 2', b'"step": 9'))
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: expected the record of step 2"):
        small_run(tmp_path / "run")


def test_only_our_own_checkpoints_are_removed_and_the_parts_add_up(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    whole = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert whole["parts"][0]["command"].startswith("python -m miniflamingo")
    assert whole["processor_seconds"] == round(runs.seconds(whole["parts"]), 1) > 0
    (tmp_path / "run" / "checkpoints" / "mine").mkdir()
    (tmp_path / "run" / "checkpoints" / "notes.txt").write_text("mine", "utf-8")
    (tmp_path / "run" / ".log.jsonl.0123abcd").write_text("half", "utf-8")
    assert small_run(tmp_path / "run")[0]
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"mine", "notes.txt", "0000004"}
    assert not (tmp_path / "run" / ".log.jsonl.0123abcd").exists()
    about = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert about["parts"] == whole["parts"]  # nothing more was done


def test_a_full_disk_is_one_error_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save = dcp.save

    def full(state, checkpoint_id):
        if checkpoint_id.name == "0000004":
            error = OSError(errno.ENOSPC, "No space left on device", str(checkpoint_id))
            raise CheckpointException("write", {0: (error, None)})
        save(state, checkpoint_id=checkpoint_id)

    monkeypatch.setattr(train.dcp, "save", full)
    with pytest.raises(ValueError, match=r"0000004: .*No space left on device"):
        small_run(tmp_path, resume=False)
    monkeypatch.undo()
    finished, run = small_run(tmp_path)
    assert finished and run.latest().name == "0000004" and len(log_of(tmp_path)) == 4


def two_processes(out):
    """The command on two processes -> their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(HERE.parent.parent)
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "miniflamingo", *LM, "--out", str(out), "--resume"]
    started = [
        subprocess.Popen(command, cwd=root, env=shared | {"RANK": rank, "LOCAL_RANK": rank},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
        for rank in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], said


def test_an_error_of_one_process_ends_both_with_one_line(tmp_path):
    assert two_processes(tmp_path)[0] == [0, 0]
    part = tmp_path / "checkpoints" / "0000003" / "__0_0.distcp"
    part.unlink()
    part.mkdir()  # only the second process reads it
    codes, (first, second) = two_processes(tmp_path)
    assert codes == [2, 2]
    assert (
        first.count("\n") == 1 and first.startswith("miniflamingo: error: ") and str(part) in first
    )
    assert second == ""


def test_a_loss_that_is_no_number_stops_the_run(parts, tmp_path, monkeypatch):
    weird = train._summed_loss
    monkeypatch.setattr(train, "_summed_loss", lambda *a: weird(*a) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1: the loss of .* is nan; none saved"):
        sharded(parts, tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and log_of(tmp_path) == []


LM = ["train-torch", "lm", "--steps", "3", "--batch", "8", "--device", "cpu", "--warmup", "1"]


def test_the_command_trains_a_language_model_and_converts_a_checkpoint(tmp_path, capsys):
    ours, numpy = tmp_path / "torch", tmp_path / "numpy"
    assert command_line.main([*LM, "--out", str(ours)]) == 0
    optimiser = training.OptimiserConfig(3, warmup=1)
    stage = training.LanguageStage(training.LanguageRun(optimiser, batch=8))
    training.Run(stage, numpy).train(progress=False)
    assert_same_curve(log_of(ours), log_of(numpy))
    made = (ours / "model.safetensors").read_bytes()
    (ours / "model.safetensors").unlink()
    assert command_line.main([*LM, "--out", str(ours), "--export"]) == 0
    assert (ours / "model.safetensors").read_bytes() == made
    stage.model.load(ours / "model.safetensors")
    assert command_line.main([*LM, "--out", str(ours)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert command_line.main([*LM, "--out", str(tmp_path / "none"), "--export"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_the_command_trains_a_vision_encoder(tmp_path):
    sizes = ["--steps", "2", "--batch", "8", "--device", "cpu", "--out", str(tmp_path)]
    assert command_line.main(["train-torch", "vision", *sizes]) == 0
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]
    _, about = load_tensors(tmp_path / "model.safetensors")
    assert "vision" in about


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["compile", "--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_gates_and_resampler_have_rates_of_their_own():
    names = ("model.resampler.latents", "model.gated_xattn.0.alpha_xattn", "model.lm.norm.weight")
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in names}
    module = SimpleNamespace(named_parameters=parameters.items)
    config = training.OptimiserConfig(alpha_rate=6.0, resampler_rate=0.03)
    groups = train.build_optimiser(module, config).param_groups
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert [scales[id(p)] for p in parameters.values()] == [0.03, 6.0, 1.0]
