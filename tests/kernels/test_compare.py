"""The comparison itself: broken kernels turn the table red, and the command says so."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

import torch

from miniflamingo import __main__ as command_line
from miniflamingo.kernels import image_causal_attention
from miniflamingo.kernels.common import work_list
from miniflamingo.kernels.common.runtime import INTERPRET
from miniflamingo.kernels.tools import compare

ATTENTION = next(k for k in compare.KERNELS if k.name == "image_causal_attention")
DEVICE = "cpu" if INTERPRET.value else "cuda"
BRIEF = {
    "images": compare.attention_case([compare.runs(3, 5, 4)], R=5, H=1, K=16),
    "unattended": compare.attention_case([compare.runs(2, 0, 6)], N=3, R=5, H=1, K=16),
    "split": compare.attention_case([compare.runs(0, 70)], R=5, H=1, K=16),
}

# name -> what is replaced in the kernel's source, by what, and the directions that must turn red
BREAKAGES = {
    "nothing": ("", "", set()),
    "no scale": ("(SCALE * LOG2E)", "LOG2E", {"forward", "backward"}),
    "scale of exp, not exp2": ("(SCALE * LOG2E)", "SCALE", {"forward", "backward"}),
    "phi off by one": (
        "build_work_list(phi, N, heads",
        "build_work_list((phi - 1).clamp(min=0), N, heads",
        {"forward", "backward"},
    ),
    "the first image where there is none": (
        "    return _attention(q,",
        "    work.items[:, 1].clamp_(min=min(1, k.shape[1]))\n    return _attention(q,",
        {"forward"},
    ),
    "a uniform average on masked rows": (
        "    return _attention(q, k, v, *work[:4], work.chunks[1])[0]",
        "    out = _attention(q, k, v, *work[:4], work.chunks[1])[0]\n"
        "    average = v.mean((1, 2))[:, None].expand_as(out)\n"
        "    return torch.where(phi[:, :, None, None] > 0, out, average)",
        {"forward"},
    ),
    "padding keys not masked": (
        'scores = tl.where((r < R)[None, :], scores, float("-inf"))', "", {"forward"},
    ),
    "softmax not divided": ("out * inverse[:, None]", "out", {"forward"}),
    "softmax over the tokens": (
        "(1 / tl.sum(p, 1))[:, None]", "(1 / tl.sum(p, 0))[None, :]", {"backward"},
    ),
    "dk not stored": (
        "store_rows(dk_ptr + first, r, H * K, r < R, dk * SCALE, K, BLOCK_K)", "pass", {"backward"},
    ),
    "dk not scaled": ("dk * SCALE", "dk", {"backward"}),
    "delta forgotten": (" - delta[:, None]", "", {"backward"}),
    "partial sums not added": ("    sum_partials(parts, (dk, dv), work.splits)", "", {"backward"}),
    "the last tile of tokens only": ("dv += dot", "dv = dot", {"backward"}),
}  # fmt: skip


def broken(tmp_path, name):
    """The comparison of a copy of the kernel's file, changed as BREAKAGES says."""
    before, after, _ = BREAKAGES[name]
    source = Path(image_causal_attention.__file__).read_text("utf-8")
    assert before in source, f"the kernel no longer contains {before!r}"
    source = source.replace(before, after) if before else source
    namespace = "broken_" + "".join(filter(str.isalnum, name))
    path = tmp_path / f"{namespace}.py"
    path.write_text(source.replace('@operator("', f'@operator("{namespace}_'), "utf-8")
    spec = importlib.util.spec_from_file_location(f"miniflamingo.kernels.{namespace}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel, backward = module.image_causal_attention, module.image_causal_attention_backward
    return dataclasses.replace(ATTENTION, kernel=kernel, kernel_backward=backward, cases=BRIEF)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the broken ones overflow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_kernel_turns_the_table_red(name, dtype, tmp_path, monkeypatch):
    comparison, red = broken(tmp_path, name), set()
    if "last tile" in name:  # an item then has several
        monkeypatch.setattr(work_list, "choose_chunks", lambda rows: (256, 256))
    for case in BRIEF:
        for record in compare.compare(comparison, case, dtype, DEVICE):
            red |= set() if record.ok else {record.direction}
    assert red == BREAKAGES[name][2] if name == "nothing" else red >= BREAKAGES[name][2]


# --- the verdict --------------------------------------------------------------------------------


def judged(out, peer, reference, dtype="fp32"):
    arrays = [[torch.tensor(x, dtype=torch.float64)] for x in (out, peer)]
    return compare.judge("kernel", "case", dtype, "forward", "here", *arrays, [np.array(reference)])


@pytest.mark.parametrize(
    "out,peer,ratio,ok",
    [
        (1.0 + 1.9e-6, 1.0 + 1e-6, 1.9, True),
        (1.0 + 2.1e-6, 1.0 + 1e-6, 2.1, False),
        (1.0 + 1.1e-7, 1.0, 1.1e-7 / 2**-24, True),  # a perfect peer counts as eps / 2
        (1.0 + 1.3e-7, 1.0, 1.3e-7 / 2**-24, False),
        (float("nan"), 1.0, float("inf"), False),
        (float("nan"), float("nan"), float("inf"), False),
    ],
)
def test_the_bound(out, peer, ratio, ok):
    record = judged([out], [peer], [1.0])
    assert record.ratio == pytest.approx(ratio, rel=1e-6) and record.ok == ok


@pytest.mark.parametrize("out,ok", [(0.0, True), (1e-30, False), (float("nan"), False)])
def test_zeros_must_be_exact(out, ok):
    assert judged([out], [0.1], [0.0]).ok == ok


def test_the_worst_output_decides():
    ones, off = [torch.ones(1), torch.tensor([float("nan")]), torch.ones(1)], [np.ones(1)] * 3
    record = compare.judge(
        "kernel", "case", "bf16", "backward", "here", ones, [torch.ones(1)] * 3, off
    )
    assert not record.ok


def test_inputs_keep_their_strides_and_their_gaps_hold_nan():
    q, *_ = ATTENTION.cases["strided inputs"](np.random.default_rng(0))
    x = compare.to_torch(q, torch.bfloat16, DEVICE)
    assert x.stride() == torch.from_numpy(q).stride() and not x.is_contiguous()
    memory = x.as_strided((x.untyped_storage().nbytes() // 2,), (1,))
    assert memory.isnan().sum() == len(memory) - x.numel() > 0 and not x.isnan().any()


# --- a peer that is wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out, peer, dtype, fault, ok",
    [
        (1.0 + 1e-7, float("nan"), "fp32", "NaN", True),
        (1.0 + 1e-6, float("nan"), "fp32", "NaN", False),  # above 16 floors
        (1.0 + 2**-8, float("nan"), "bf16", "NaN", True),
        (1.0 + 2**-6, float("nan"), "bf16", "NaN", False),
        (1.0, float("inf"), "bf16", "infinite", True),
        (1.0, 3.0, "bf16", "far off", True),
        (2.0, 3.0, "bf16", "far off", False),  # an error below the peer's is no excuse
        (float("nan"), float("nan"), "bf16", "NaN", False),
        (1.0, 1.0 + 2**-8, "bf16", "", True),
    ],
)
def test_beside_a_wrong_peer_the_floor_alone_decides(out, peer, dtype, fault, ok):
    record = judged([out], [peer], [1.0], dtype)
    assert (record.peer, record.ok) == (fault, ok)


def nan_peer(*args):
    """What plain torch on some processors makes of strided operands."""
    return compare.dense_attention(*args) * float("nan")


def test_a_wrong_peer_is_said_and_fails_nothing(tmp_path, monkeypatch, capsys):
    cases = {"images": BRIEF["images"], "strided inputs": ATTENTION.cases["strided inputs"]}
    comparison = dataclasses.replace(ATTENTION, peer=nan_peer, cases=cases)
    monkeypatch.setattr(compare, "KERNELS", [comparison])
    path = tmp_path / "compare.json"
    assert command_line.main(["compare", "--json", str(path)]) == 0
    printed, records = capsys.readouterr().out, json.loads(path.read_text("utf-8"))["records"]
    assert printed.count("ok  peer: NaN (plain torch on this processor)") == len(records) == 12
    assert all(r["peer_error"] is None and r["peer"] == "NaN" and r["ok"] for r in records)


def test_a_wrong_peer_does_not_hide_a_wrong_kernel(tmp_path):
    comparison = dataclasses.replace(broken(tmp_path, "no scale"), peer=nan_peer)
    records = list(compare.compare(comparison, "images", "bf16", DEVICE))
    assert records and not any(r.ok for r in records)


def test_a_peer_gets_no_gaps():
    seen = []

    def peer(*args):
        seen.extend(x.is_contiguous() for x in args)
        return compare.dense_attention(*args)

    list(
        compare.compare(dataclasses.replace(ATTENTION, peer=peer), "strided inputs", "bf16", DEVICE)
    )
    assert seen and all(seen)


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_the_table(tmp_path, capsys):
    path = tmp_path / "compare.json"
    assert command_line.main(["compare", "--case", "R = 1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text("utf-8"))
    assert f"{len(document['records'])} comparisons, 0 failed" in printed
    assert document["meta"].keys() >= {"date", "machine", "torch", "triton", "numpy"}
    keys = {"kernel", "case", "dtype", "direction", "backend", "error", "peer_error", "bound", "ok"}
    assert all(record.keys() >= keys for record in document["records"])
    rows = {(r["case"], r["dtype"], r["direction"]) for r in document["records"]}
    assert len(rows) == len(document["records"]) and ("R = 1", "bf16", "backward") in rows


def test_a_failure_exits_with_1(tmp_path, monkeypatch, capsys):
    comparison = dataclasses.replace(
        broken(tmp_path, "dk not stored"), cases={"images": BRIEF["images"]}
    )
    monkeypatch.setattr(compare, "KERNELS", [comparison])
    path = tmp_path / "compare.json"
    assert command_line.main(["compare", "--json", str(path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    path.write_text('{"records": "mine"}', "utf-8")
    assert command_line.main(["compare", "--json", str(path)]) == 2
    assert "in the way" in capsys.readouterr().err and "mine" in path.read_text("utf-8")
    path.unlink()
    assert command_line.main(["compare", "--json", str(path)]) == 1
    failed = [r for r in json.loads(path.read_text("utf-8"))["records"] if not r["ok"]]
    assert failed and all(r["direction"] == "backward" and r["ratio"] is None for r in failed)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--case", "no such case"], "no such case"),
        (["--json", "no/such/folder/x.json"], "no/such/folder/x.json"),
        (["--device", "cuda"], "--device cuda: expected a GPU"),
        (["--device", "cpu"], "--device cpu needs TRITON_INTERPRET=1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    if arguments[-1] in ("cuda", "cpu") and (arguments[-1] == "cpu") == INTERPRET.value:
        pytest.skip(f"{arguments[-1]} can run kernels here")
    assert command_line.main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
