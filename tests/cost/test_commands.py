"""`plan` and `scaling` as they are typed: what they print and write, and one line for bad input."""

import json
from argparse import Namespace

import pytest
from PIL import Image

from miniflamingo.__main__ import main
from miniflamingo.cost import commands, scaling
from miniflamingo.cost.counting import Sequence
from miniflamingo.cost.plan import MIXTURE

SMALL = ["plan", "--model", "mini", "--devices", "4", "--batch", "8", "--tokens", "16"]


def test_a_plan_has_a_column_for_each_way_and_says_what_it_assumes(capsys):
    assert main(["plan", "--model", "80B", "--devices", "16", "--device", "h200"]) == 0
    out = capsys.readouterr().out
    assert "Flamingo-80B on 16 x h200, 141 GB and 989 TFLOP/s each" in out
    heads = next(line for line in out.splitlines() if line.startswith("GB of the fullest"))
    assert heads.split()[5:] == ["ZeRO-1", "FSDP2", "tensor", "16", "pipeline", "16"]
    fits = next(line for line in out.splitlines() if line.startswith("  fits"))
    assert [word for word in fits.replace(",", "").split() if word in ("yes", "NO")] == [
        "NO", "yes", "yes", "yes"
    ]  # fmt: skip
    for option in ("--utilisation", "--precision", "--no-recompute", "--batch", "--images"):
        assert option in out.split("assumed:")[1]


def test_a_layout_that_is_asked_for_is_the_only_one(tmp_path, capsys):
    file = tmp_path / "plan.json"
    words = ["--tensor", "2", "--pipeline", "1", "--sharding", "fsdp2", "--micro-batch", "2"]
    assert main([*SMALL, *words, "--json", str(file)]) == 0
    ((way, plan),) = json.loads(file.read_text("utf-8"))["plans"].items()
    assert way == "tensor 2 fsdp2" and way in capsys.readouterr().out
    assert plan["layout"] == {"devices": 4, "tensor": 2, "pipeline": 1, "sharding": "fsdp2"}
    assert plan["training"]["micro_batch"] == 2 and plan["training"]["positions"] is False
    assert plan["training"]["sequences"] == [{"tokens": 16, "images": 5, "frames": 1}]


def test_ways_that_can_not_be_are_left_out_with_the_reason(capsys):
    assert main(["plan", "--devices", "32", "--batch", "32"]) == 0
    out = capsys.readouterr().out
    assert "left out: tensor 32: tensor must divide the resampler's 16 heads, got 32" in out
    assert "left out: pipeline 32: pipeline must divide 80 blocks, got 32" in out


def chosen(*words):
    arguments = commands.plan_parser().parse_args(words)
    options = commands.choices(arguments)
    return options, commands.training_of(options, options["model"])


def test_every_assumption_has_an_option():
    options = {"--utilisation": 0.3, "--overlap": 0.2, "--reserve": 0.4, "--steps": 7,
               "--batch": 8, "--micro-batch": 2}  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--precision", "fp32", "--trained", "bf16", "--gradients", "fp32", "--no-recompute"]
    _, t = chosen(*words, "--plain-attention", "--kept-features", "--frames", "3",
                  "--no-positions")  # fmt: skip
    assert (t.utilisation, t.overlap, t.reserve, t.steps) == (0.3, 0.2, 0.4, 7)
    assert (t.batch, t.micro_batch, t.sequences) == (8, 2, (Sequence(256, 5, 3),))
    assert (t.precision, t.trained, t.gradients) == ("fp32", "bf16", "fp32")
    assert not (t.recompute or t.fused or t.eye or t.positions)


def test_the_papers_run_can_be_changed_too():
    options, t = chosen("--paper")
    assert (options["devices"], options["device"], options["tensor"]) == (1536, "tpuv4", 16)
    assert t.sequences == tuple(MIXTURE.values()) and t.batch == 1536 and t.recompute
    options, t = chosen("--paper", "--utilisation", "0.4", "--tokens", "64", "--devices", "16")
    assert t.utilisation == 0.4 and t.sequences == (Sequence(64, 5),)
    assert options["devices"] == 16 and options["sharding"] == "zero1"


def test_the_paper_is_beside_its_15_days(tmp_path, capsys):
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", "--paper", "--json", str(files[0]), "--plot", str(files[1])]
    assert main(words) == main(words) == 0  # again: what it has made itself is not in its way
    out, document = capsys.readouterr().out, json.loads(files[0].read_text("utf-8"))
    assert "beside the paper's run (15 days; its batch sizes are not stated)" in out
    assert document["made_by"] == commands.PLAN and {"date", "machine", "versions"} <= {*document}
    for row in document["paper"]["at"]:
        assert f"{row['off']:+.0%}" in out
    with Image.open(files[1]) as picture:
        assert picture.info["made_by"] == commands.PLAN


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "5B"], "unknown preset '5B': choose from mini, 3B, 9B, 80B"),
        (["--device", "b200"], "unknown device 'b200': choose from tpuv4, a100, h100, "),
        (["--devices", "10", "--tensor", "4"], "devices must be a multiple of tensor * pipeline, "),
        (["--devices", "7"], "batch must be a multiple of data-parallel groups * micro_"),
        (["--tensor", "5", "--devices", "5"], "tensor must divide the LM's 64 heads, got 5"),
        (["--mixture", "--tokens", "5"], "--mixture and --tokens exclude each other"),
        (["--paper", "--fsdp2"], "--paper and --fsdp2 exclude each other"),
        (["--json", "nowhere/x.json"], "--json: expected a file in a folder that exists, got now"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_code_2(words, message, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"miniflamingo: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["--utilisation", "0"], ["--reserve", "1"], ["--devices", "0"], ["--steps", "x"],
              ["--sharding", "zero9"], ["--precision", "fp8"], ["--unknown"]],
)  # fmt: skip
def test_options_have_ranges(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_fsdp2_stands_beside_its_plan(monkeypatch, tmp_path, capsys):
    resident = pytest.importorskip("miniflamingo.kernels.model.resident")
    parts = ("frozen weights", "trained weights", "gradients", "moments")
    monkeypatch.setattr(resident, "measure", lambda *_: [dict.fromkeys(parts, 10**6)] * 2)
    file = tmp_path / "fsdp2.json"
    assert main(["plan", "--fsdp2", "--json", str(file)]) == 0
    rows, out = json.loads(file.read_text("utf-8"))["fsdp2"], capsys.readouterr().out
    for row in rows["fp32"] + rows["bf16"]:
        assert row["off"] == 10**6 / row["planned"] - 1
        assert f"{row['planned']:,.0f}" in out


# --- scaling --------------------------------------------------------------------------------------


@pytest.fixture
def one_case(monkeypatch):
    """The smallest sizes of one case."""
    case = scaling.CASES["self-attention"]
    small = type(case)(case.name, case.grows, ((8, 16, 32), (8, 16, 64)), case.order, case.flops,
                       case.make)  # fmt: skip
    monkeypatch.setattr(scaling, "CASES", {case.name: small})
    monkeypatch.setattr(scaling, "LEAST", 1e-4)


def test_scaling_prints_writes_and_draws(one_case, tmp_path, capsys):
    files = tmp_path / "scaling.json", tmp_path / "scaling.png"
    words = ["scaling", "--repeats", "2", "--json", str(files[0]), "--plot", str(files[1])]
    assert main(words) == main(words) == 0
    out, document = capsys.readouterr().out, json.loads(files[0].read_text("utf-8"))
    assert "self-attention: tokens N from 8 to 32, O(N^2)" in out
    (case,) = document["cases"]
    assert {row["size"] for row in case["rows"]} == {8, 16, 32} and not document["full"]
    assert document["made_by"] == commands.SCALING and document["repeats"] == 2
    for side, fit in case["fits"].items():
        assert f"{fit['low']:.2f} to {fit['high']:.2f}" in out and side in out
    with Image.open(files[1]) as picture:
        assert picture.info["made_by"] == commands.SCALING


def test_a_full_run_has_the_memory_of_all_sides(one_case, monkeypatch, capsys):
    grown = {(n, side): 3e6 for n in (8, 16, 64)
             for side in ("NumPy", "torch, eager", "torch, SDPA")}  # fmt: skip
    monkeypatch.setattr(scaling, "all_growth", lambda names, full: dict.fromkeys(names, grown))
    assert main(["scaling", "--full", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "from 8 to 64" in out and "the resident set's growth" in out


def test_a_case_that_there_is_not_is_refused(capsys):
    assert main(["scaling", "--case", "no such"]) == 2
    error = capsys.readouterr().err
    assert "--case: expected part of one of: self-attention; " in error and "'no such'" in error


def test_the_processor_and_the_versions_are_named(monkeypatch):
    about = commands.about()
    assert about["versions"]["numpy"] and about["processor"]
    monkeypatch.setattr(commands.outputs, "Path", lambda *_: Namespace(exists=lambda: False))
    assert commands.outputs.processor() == commands.platform.processor()
    assert commands.installed("no-such-package") is None
