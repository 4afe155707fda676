"""The prediction: its shapes, its reading of code, its model, and the committed file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

from miniflamingo import plots
from miniflamingo.__main__ import main
from miniflamingo.kernels.common.runtime import INTERPRET, tl, torch, triton
from miniflamingo.kernels.tools import bench_entries, devices, predict, sass
from miniflamingo.kernels.tools.dry_run import DryRun

ENTRIES = {entry.name: entry for entry in bench_entries.ENTRIES}
H200 = devices.DEVICES["H200"]

# --- the dry run ----------------------------------------------------------------------------------


def launches(name, direction="forward", **sizes):
    shape = {**ENTRIES[name].shapes["cuda"][0], **sizes}
    recorded, moved, flops = predict.launches_of(ENTRIES[name], shape, direction)
    return [predict.Launch(*x) for x in recorded], moved, flops


@pytest.mark.parametrize("N", [1, 32])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_dry_run_counts_what_the_benchmark_counts_by_hand(N, direction):
    """Full tiles and one launch: the same flops; the bytes but for lists and partial sums."""
    (first, *rest), moved, flops = launches("image_causal_attention", direction, N=N)
    assert first.run.flops * 16 == flops
    lists = sum(n for x, n in first.loaded.items() if n < 2**20)
    partial = 0
    if rest and N == 1:  # of k and v, of 8 images in 2 parts each, float32
        partial = 2 * 8 * 2 * 64 * 16 * 128 * 4
        moved -= 2 * 8 * 64 * 16 * 128 * 2  # stored by _sum_partials
        assert sum(x.moved() for x in rest) >= partial
    assert first.moved() - lists == moved + partial and 0 < lists < 2**20
    assert len(first.order) == first.programs


def test_programs_of_other_heads_do_the_same():
    sizes = dict(B=2, L=48, N=3, R=8, H=4, K=16)
    for launch in launches("image_causal_attention", "backward", **sizes)[0]:
        alone = DryRun(*launch.launch)
        every = [alone.program(i) for i in range(launch.programs)]
        found = [(tuple(sorted(turns.items())), busy) for turns, busy in every]
        assert found == [launch.kinds[i] for i in launch.order]


def test_decoding_touches_one_image_in_n():
    (launch,), moved, _ = launches("decode_attention", B=4, N=32)
    assert moved == 2 * 4 * 16 * 128 * (2 + 2 * 64)
    assert launch.moved() == moved + 4 * launch.launch[1][4].itemsize  # and phi


@triton.jit
def _branches_on_data(x_ptr):
    if tl.load(x_ptr) + tl.sum(tl.load(x_ptr + tl.arange(0, 4)), 0) > 0:
        tl.store(x_ptr, 0)


def test_a_branch_that_hangs_on_computed_numbers_is_refused():
    run = DryRun(_branches_on_data, [torch.ones(4, dtype=torch.int32)], {})
    with pytest.raises(ValueError, match="cannot know how a kernel branches"):
        run.program(0)


def test_what_fits_in_the_cache_is_read_once():
    found, _, _ = launches("resampler_attention", "backward", I=1, M=100)
    names = [launch.launch[0].__name__ for launch in found]
    q = found[0].launch[1][1]
    for launch, name in zip(found[1:], names[1:]):
        if id(q) in launch.loaded:
            assert launch.moved({id(q)}) == launch.moved() - q.nbytes, name


# --- code -----------------------------------------------------------------------------------------


def cuda(*lines):
    """SASS as nvdisasm prints it: labels, or (instruction, stall, write, wait mask)."""
    text = ""
    for x in lines:
        if isinstance(x, str):
            text += f"{x}:\n"
        else:
            op, stall, write, wait = (*x, 1, 7, 0)[:4] if len(x) == 1 else x
            control = (stall | write << 5 | 7 << 8 | wait << 11) << 41
            text += f"        /*0000*/                   {op} ;      /* 0x0000000000000000 */\n"
            text += f"              /* 0x{control:016x} */\n"
    return sass.parse(text, sass.CUDA)


LOOP = cuda(
    ("S2R R0, SR_TID.X",), ("@P0 BRA `(.L_x_2)",),
    ".L_x_1", ("LDG.E.128 R4, desc[UR4][R2.64]", 2, 0, 0), ("HMMA.16816.F32 R4, R4, R2", 5, 7, 1),
    ("@!P1 BRA `(.L_x_1)",), ("EXIT",),
    ".L_x_2", ("EXIT",), ".L_x_3", ("BRA `(.L_x_3)",),
)  # fmt: skip


def test_loops_and_the_ways_past_them():
    assert LOOP.loops == [range(2, 5)] and len(LOOP.instructions) == 7
    assert [x.op for x in LOOP.body(LOOP.loops[0])] == ["LDG.E.128", "HMMA.16816.F32", "BRA"]
    assert [len(LOOP.path(longest)) for longest in (True, False)] == [3, 3]
    inner = cuda(".L_a", ("MOV",), ".L_b", ("ADD",), ("@P0 BRA `(.L_b)",), ("@P1 BRA `(.L_a)",),
                 ("EXIT",))  # fmt: skip
    assert inner.loops == [range(0, 4), range(1, 3)]
    assert [len(inner.body(loop)) for loop in inner.loops] == [2, 2]
    longer = cuda(("@P0 BRA `(.L_a)",), ("MOV",), ("MOV",), ("EXIT",), ".L_a", ("EXIT",))
    assert [len(longer.path(longest)) for longest in (True, False)] == [4, 2]


def test_amds_loops_and_blocks_in_any_order():
    text = """
	s_branch .LBB0_2
.LBB0_1:
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc0 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v[4:5], off
	s_waitcnt vmcnt(0)
	s_branch .LBB0_1
.LBB0_3:
	s_branch .LBB0_5
.LBB0_4:
	s_endpgm
.LBB0_5:
	s_branch .LBB0_4
"""
    code = sass.parse(text, sass.AMD)
    assert code.loops == [range(1, 6)] and len(code.path(True)) == 4
    amd = devices.DEVICES["MI300X"]
    turn = 1 + 1 + amd.latency + 32  # two branches, the load's wait, a product of 16,384 flops
    assert sass.cycles(code.body(code.loops[0]), amd, 3) == pytest.approx(turn, abs=2)


@pytest.mark.parametrize(
    "op,flops",
    [
        ("HMMA.16816.F32.BF16", 4096),
        ("HMMA.1688.F32", 2048),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("v_mfma_f32_16x16x16_bf16", 8192),
        ("FFMA", 0),
    ],
)
def test_flops_of_an_instruction(op, flops):
    assert sass.Instruction(op).flops == flops


def test_a_warp_waits_for_its_scoreboards():
    body = LOOP.body(LOOP.loops[0])
    assert sass.cycles(body, H200, 2) == H200.latency + 5 + 1
    narrow = cuda(("LDG.E R4, desc[UR4][R2.64]", 2, 0, 0), ("MOV", 1, 7, 1), ("EXIT",))
    assert sass.cycles(narrow.instructions, H200) == H200.cache_latency + 1 + 1
    no_wait = cuda(("LDG.E R4, desc[UR4][R2.64]", 2, 0, 0), ("MOV", 4, 7, 0), ("EXIT",))
    assert sass.cycles(no_wait.instructions, H200) == 2 + 4 + 1


def test_copies_that_were_begun_a_turn_before_are_not_waited_for():
    turn = ("DEPBAR.LE SB0, 0x0",), ("MOV", 15, 7, 0), ("LDGSTS.E.128 [R1], [R2]",), ("LDGDEPBAR",)
    first = sass.cycles(cuda(*turn).instructions, H200, 1)
    second = sass.cycles(cuda(*turn).instructions, H200, 2)
    assert first == 18 and second == pytest.approx(H200.latency + 16, abs=2)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "durations,places,work,seconds",
    [
        ([1.0] * 8, 4, 0.1, 2.0),  # nothing is short: two waves
        ([1.0] * 9, 4, 0.1, 3.0),  # a tail
        ([1.0] * 8, 4, 16.0, 16.0),  # the resource alone decides
        ([1.0, 3.0], 2, 3.0, 1.5 + 2.0),  # two share until one is done, then one has enough
    ],
)
def test_the_time_of_programs_that_share(durations, places, work, seconds):
    assert predict.share(durations, places, work) == pytest.approx(seconds)


def test_the_table_of_devices():
    assert {d.target for d in devices.DEVICES.values()} == {"sm_80", "sm_90", "gfx942"}
    for d in devices.DEVICES.values():
        assert d.sources and d.bandwidth < d.peak_bandwidth and d.flops < d.peak_flops
        a_cycle = 4096 if d.target == "sm_90" else 2048
        assert d.clock * d.processors * a_cycle == pytest.approx(d.peak_flops, rel=0.01)
    names = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "AMD Instinct MI300X"
    assert [devices.find(name).name for name in names] == list(devices.DEVICES)
    assert devices.find("NVIDIA H100 PCIe") is None


# --- the committed file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document():
    assert predict.COMMITTED.exists(), predict.RENEW
    return json.loads(predict.COMMITTED.read_text("utf-8"))


def test_the_file_has_every_case_and_device(document):
    found = [(r["device"], r["entry"], json.dumps(r["shape"]), r["direction"])
             for r in document["records"]]  # fmt: skip
    cases = [(e.name, json.dumps(shape), way) for e, shape, way in predict.cases()]
    assert sorted(found) == sorted((d, *case) for d in devices.DEVICES for case in cases)
    heads = {(r["shape"]["H"], r["shape"]["K"]) for r in document["records"]}
    assert heads >= {(16, 128), (32, 128), (64, 128)} and document["meta"]["predicted"]
    for r in document["records"]:
        parts = {part: sum(x[part] for x in r["launches"]) for part in predict.PARTS}
        assert r["percent"] == pytest.approx(100 * r["floor"] / r["us"], rel=0.01)
        assert parts[r["binds"]] == pytest.approx(max(parts.values()))
        for x in r["launches"]:
            assert x["us"] >= 0.999 * max(x[part] for part in predict.PARTS if part != "tail")


SAMPLE = [
    ("decode_attention B=8 N=32 R=64 H=16", "H100 80GB HBM3"),
    ("image_causal_attention B=8 L=2048 N=5 R=64 H=16 K=128 phi=even forward", "H200"),
    ("image_causal_attention B=8 L=2048 N=1 R=64 H=16 K=128 phi=even backward", "A100-SXM4-80GB"),
    ("resampler_attention I=1 M=800 R=64 H=16 K=128 forward", "MI300X"),
]


def test_a_sample_predicted_again_gives_the_files_figures(document):
    code = f"""
import json
from miniflamingo.kernels.tools import compile, predict
records = []
if not compile.missing():
    for text, device in {SAMPLE!r}:
        for case in predict.cases(text):
            records += predict.rounded(list(predict.predict_case(case, (device,))))
print(json.dumps([compile.missing(), compile.tools(), records]))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = str(Path(kernels.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    missing, tools, records = json.loads(done.stdout)
    if missing or any(document["meta"][name] != x for name, x in tools.items()):
        pytest.skip(missing or f"the file's compilers are others than {tools}")
    assert len(records) == len(SAMPLE)
    for record in records:
        assert record in document["records"], f"renew the file: {predict.RENEW}"


def test_predictions_are_looked_up(monkeypatch):
    shape = dict(B=1)
    rows = [dict(device="H200", entry="e", shape=shape, direction=way, us=us)
            for way, us in (("forward", 10.0), ("backward", 20.0))]  # fmt: skip
    monkeypatch.setattr(predict, "committed", lambda: {"records": rows})
    assert predict.look_up("H200", "e", shape, "forward") == 10
    assert predict.look_up("H200", "e", shape, "forward + backward") == 30
    assert predict.look_up("H200", "e", dict(B=2), "forward") is None
    del rows[1]
    assert predict.look_up("H200", "e", shape, "forward + backward") is None


def test_the_figure_shows_every_prediction_above_its_floor(document):
    figure = plots.plot_prediction(document["records"])
    drawn = sorted(y for a in figure.axes for line in a.lines for y in line.get_ydata())
    rows = [r for r in document["records"] if r["entry"] == "image_causal_attention"]
    assert drawn == sorted([*(r["us"] for r in rows), *(r["floor"] for r in rows)])
    assert all(r["us"] > r["floor"] for r in rows)
    assert "predicted, not measured" in figure.get_suptitle()
    many = [r | {"device": f"device {i}"} for i in range(9) for r in rows]
    lines = [line for a in plots.plot_prediction(many).axes for line in a.lines]
    assert {f"device {i}, floor" for i in range(9)} <= {line.get_label() for line in lines}
    with pytest.raises(ValueError, match="got none"):
        plots.plot_prediction([])


@pytest.mark.parametrize(
    "options,message",
    [(["--json", "no/such/x.json"], "no/such/x.json"), ([], "process of its own")],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, capsys):
    if not INTERPRET.value:
        pytest.skip("this process compiles")
    assert main(["predict", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
