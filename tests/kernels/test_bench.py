"""The benchmark, without a GPU: its counting, its peers, its checks, its file and its figures."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
import types

import numpy as np
import pytest

from miniflamingo import kernels

if importlib.util.find_spec("torch") is None:
    pytest.skip("the peers need torch, not installed here", allow_module_level=True)

import torch

from miniflamingo import __main__ as command_line
from miniflamingo import plots, xattn
from miniflamingo.kernels.model.layers import GatedCrossAttentionDense
from miniflamingo.kernels.tools import bench, bench_entries, peers

ENTRIES = {entry.name: entry for entry in bench.ENTRIES}
SMALL = {
    "image_causal_attention": dict(B=2, L=40, N=3, R=5, H=2, K=16, phi="random"),
    "gated_xattn_dense": dict(B=2, L=20, N=3, R=5, H=2, K=16, D=24, D_m=12, phi="random"),
    "resampler_attention": dict(I=3, M=9, R=5, H=2, K=16),
    "decode_attention": dict(B=3, N=4, R=5, H=2, K=16),
}
LIMITS = {"copy_bytes_per_second": 1e9, "flops_per_second": 1e12}
ONE_IMAGE = {**SMALL["image_causal_attention"], "N": 1, "phi": "even"}


def arguments(entry, shape):
    args = ENTRIES[entry].make(shape, bench.Draw("cpu"))
    for x in bench.floats(args):
        x.requires_grad_()
    size = args[0].shape
    return args, torch.randn(size, generator=torch.Generator().manual_seed(1))


# --- what is counted ------------------------------------------------------------------------------


def counted(shape, backward=False):
    """(bytes in bf16, flops) of attention, without memory for its arguments."""
    B, L, N, R, H, K = (shape[letter] for letter in "BLNRHK")
    sizes = (B, L, H, K), (B, N, R, H, K), (B, N, R, H, K)
    args = *(torch.empty(size, device="meta") for size in sizes), bench_entries.make_phi(shape)
    moved, flops = bench_entries.attention_work(shape, args, backward)
    return 2 * moved, flops


@pytest.mark.parametrize(
    "H,K,forward,backward,dense",
    [
        (16, 64, 134, 235, 174),
        (16, 128, 268, 470, 348),
        (32, 64, 268, 470, 348),
        (32, 128, 537, 940, 696),
        (64, 64, 537, 940, 696),
        (64, 128, 1074, 1879, 1392),
    ],
)
def test_attention_moves_and_computes_what_was_derived(H, K, forward, backward, dense):
    """MB of both passes, and microseconds of a dense mask's products at 790 TFLOP/s."""
    shape = dict(B=8, L=2048, N=32, R=64, H=H, K=K, phi="even")
    moved, flops = counted(shape)
    both, more = counted(shape, backward=True)
    assert round(moved / 1e6) == forward and round((both - moved) / 1e6) == backward
    assert round(shape["N"] * flops / 790e12 * 1e6) == dense
    assert flops / moved == pytest.approx(32) and more == flops * 14 / 4


def test_tokens_and_images_that_take_no_part_are_not_counted():
    shape = dict(B=1, L=4, N=3, R=5, H=2, K=16, phi="even")
    k = torch.empty(1, 3, 5, 2, 16)
    phi = torch.tensor([[0, 0, 2, 2]])
    moved, flops = bench_entries.attention_work(shape, (torch.empty(1, 4, 2, 16), k, k, phi))
    assert flops == 2 * (2 * 5 * 16 * 2 * 2)  # two products, two tokens, two heads
    assert moved == 2 * 32 + 4 * 32 + 2 * 5 * 32  # two rows of q, all of out, one image's k and v


def test_the_blocks_products():
    """Of a block of Flamingo-3B: q and out take 174 us each at 790 TFLOP/s, the rest 1392."""
    shape = dict(B=8, L=2048, N=32, R=64, H=16, K=128, D=2048, D_m=1536, phi="even")
    args = (torch.empty(1), None, bench_entries.make_phi(shape))
    args = [x for x in args if x is not None]
    _, flops = bench_entries.block_work(shape, (args[0], torch.empty(1), args[1]))
    kv = 2 * 8 * 32 * 64 * 1536 * 2 * 2048
    attention = counted(shape)[1]
    assert (flops - kv - attention) / 790e12 * 1e6 == pytest.approx(174 + 174 + 1392, abs=1.5)


@pytest.mark.parametrize("name", ENTRIES)
def test_flops_are_those_that_torch_counts(name):
    """The reference's products, counted by torch as they run; attention's backward recomputes."""
    from torch.utils.flop_counter import FlopCounterMode

    entry, shape = ENTRIES[name], SMALL[name]
    args, _ = arguments(name, shape)
    with FlopCounterMode(display=False) as counter:
        entry.reference(shape)(*args)
    assert entry.work(shape, args, False)[1] == counter.get_total_flops()


@pytest.mark.parametrize(
    "name",
    ["image_causal_attention", "resampler_attention"],
)
def test_every_argument_and_result_is_moved_once(name):
    entry = ENTRIES[name]
    shape = ONE_IMAGE if name == "image_causal_attention" else SMALL[name]  # all take part
    args, _ = arguments(name, shape)
    inputs = sum(x.numel() for x in bench.floats(args))
    out = args[0].numel()
    assert entry.work(shape, args, False)[0] == inputs + out
    assert entry.work(shape, args, True)[0] == (inputs + out) + (inputs + out) + inputs


# --- phi and the arguments ------------------------------------------------------------------------


def test_even_and_random_phi():
    shape = dict(B=3, L=50, N=7)
    even = bench_entries.make_phi({**shape, "phi": "even"})
    assert all(row.unique(return_counts=True)[1].diff().abs().max() <= 1 for row in even)
    assert even.min() == 1 and even.max() == 7
    random = bench_entries.make_phi({**shape, "phi": "random"})
    assert (random.diff(dim=1) >= 0).all() and (random[:, -1] == 7).all()
    assert len({tuple(row) for row in random.tolist()}) == 3


def test_every_shape_can_be_made_and_named():
    for entry in bench.ENTRIES:
        assert set(entry.shapes) == {"cuda", "cpu"}
        labels = [bench.label(entry.name, shape) for shape in entry.shapes["cuda"]]
        assert len(set(labels)) == len(labels)
    heads = {(s["H"], s["K"]) for s in ENTRIES["image_causal_attention"].shapes["cuda"]}
    assert heads == {(16, 128), (32, 128), (64, 128), (16, 64)}
    assert {s["D"] for s in ENTRIES["gated_xattn_dense"].shapes["cuda"]} == {2048, 4096, 8192}


# --- the peers ------------------------------------------------------------------------------------


def segment_attention(q, k, v, begin_q, begin_k, max_q, max_k):
    """What varlen_attn computes, segment by segment."""
    out = torch.zeros_like(q)
    for i in range(len(begin_q) - 1):
        a, b, c, d = (int(x) for x in (*begin_q[i : i + 2], *begin_k[i : i + 2]))
        assert b - a <= max_q and d - c <= max_k
        if d > c:
            p = torch.einsum("lhk,rhk->hlr", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
            out[a:b] = torch.einsum("hlr,rhk->lhk", p.softmax(-1), v[c:d])
    return out


@pytest.fixture
def uncompiled(monkeypatch):
    """Every implementation on a CPU: nothing is compiled, varlen_attn is the function above."""
    module = types.SimpleNamespace(varlen_attn=segment_attention)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(peers, "compiled", lambda function, **options: function)
    attention = torch.nn.attention  # on a CPU there is neither flash's backend nor cuDNN's
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())


CASES = [
    *SMALL.items(),
    ("image_causal_attention", ONE_IMAGE),
    ("image_causal_attention", {**ONE_IMAGE, "N": 4}),
]


def runnable(implementations):
    """Those that run here: the kernel does where Triton is."""
    ours = ("fused", "image_causal_attention")
    return [x for x in implementations if not (x.name.startswith(ours) and kernels.unavailable())]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name,shape", CASES)
def test_every_implementation_equals_the_reference(name, shape, uncompiled):
    if os.environ.get("TRITON_INTERPRET") == "0":
        pytest.skip("the kernel does not run on CPU tensors")
    entry = ENTRIES[name]
    args, dout = arguments(name, shape)
    expected = bench.expect(entry, shape, args, dout)
    for implementation in runnable(entry.implementations(shape)):
        state = implementation.prepare(*args)
        forward = bench.call(implementation, state, [x.detach() for x in args])
        assert bench.error_of(forward, expected) < 1e-5, implementation.name
        if len(entry.directions) > 1 and "Flex" not in implementation.name:  # no backward on a CPU
            both = bench.call(implementation, state, args, dout)
            assert len(both) == len(expected), implementation.name
            assert bench.error_of(both, expected) < 1e-5, implementation.name


def test_the_references_attention_is_the_numpy_twin():
    args, dout = arguments("image_causal_attention", SMALL["image_causal_attention"])
    expected = bench.expect(ENTRIES["image_causal_attention"], None, args, dout)
    q, k, v, phi = (x.detach().numpy() for x in args)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    assert np.allclose(expected[0], xattn.image_causal_attention(q, k, v, phi), atol=1e-12)
    grads = xattn.image_causal_attention_backward(dout.double().numpy(), q, k, v, phi)
    assert all(np.allclose(a, b, atol=1e-12) for a, b in zip(expected[1:], grads))


def test_the_references_attention_takes_any_order_of_phi():
    (q, k, v, phi), _ = arguments("image_causal_attention", SMALL["image_causal_attention"])
    order = torch.randperm(phi.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = peers.reference_attention(q[:, order], k, v, phi[:, order])
    assert torch.allclose(shuffled, peers.reference_attention(q, k, v, phi)[:, order], atol=1e-6)


def test_the_references_block_is_the_module_of_layers():
    shape = SMALL["gated_xattn_dense"]
    (y, media, phi, *weights), _ = arguments("gated_xattn_dense", shape)
    module = GatedCrossAttentionDense(shape["D"], shape["D_m"], shape["H"], shape["K"])
    module.load_state_dict(dict(zip(peers.BLOCK_NAMES, weights)))
    out = peers.reference_block(shape)(y, media, phi, *weights)
    assert torch.allclose(out, module(y, media, phi), atol=1e-5)


def test_torch_compiles_the_block(monkeypatch):
    """Traced whole, without a graph break; what follows tracing needs a GPU to be of use."""
    shape = SMALL["gated_xattn_dense"]
    args, dout = arguments("gated_xattn_dense", shape)
    expected = bench.expect(ENTRIES["gated_xattn_dense"], shape, args, dout)
    whole = dict(backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(peers, "compiled", lambda function, **_: torch.compile(function, **whole))
    inner = runnable([peers.SDPA, peers.FUSED])
    for attention in inner:
        implementation = peers.compiled_block("compiled", attention, shape)
        results = bench.call(implementation, implementation.prepare(*args), args, dout)
        assert bench.error_of(results, expected) < 1e-5, attention.name
    torch.compiler.reset()


def test_varlen_refuses_a_phi_that_decreases(uncompiled):
    (q, k, v, phi), _ = arguments("image_causal_attention", SMALL["image_causal_attention"])
    with pytest.raises(ValueError, match="phi decreases"):
        peers.prepare_varlen(q, k, v, phi.flip(1))


# --- checking and timing --------------------------------------------------------------------------


def measured(implementations, name="image_causal_attention"):
    """The records of an entry whose implementations are replaced."""
    entry = dataclasses.replace(ENTRIES[name], implementations=lambda shape: implementations)
    records = list(bench.measure_case(entry, SMALL[name], "cpu", LIMITS, 4))
    for record in records:
        bench.add_ratio(record, [dataclasses.asdict(r) for r in records])
    return records


def leak(state, q, k, v, phi):
    """One token of the batch looks at the next image."""
    phi = phi.clone()
    phi[0, 20] = phi[0, 20] % k.shape[1] + 1
    return peers.reference_attention(q, k, v, phi)


def stop(*args):
    raise RuntimeError("not on this machine:\nno such instruction\nmore")


def test_what_cannot_run_or_is_wrong_is_listed_and_not_timed():
    tried = [
        peers.Implementation("raises", stop),
        peers.Implementation("prepares", leak, stop),
        peers.Implementation("leaks", leak),
        peers.Implementation("nan", lambda *args: leak(*args) * math.nan),
        peers.EAGER,
    ]
    records = {(r.implementation, r.direction): r for r in measured(tried)}
    assert len(records) == 2 * len(tried)
    for (name, direction), r in records.items():
        assert (r.microseconds is None) == (r.reason is not None) == (name != "eager"), name
        assert r.ratio is None  # no kernel was timed
        if name in ("raises", "prepares"):
            assert r.reason == "RuntimeError: not on this machine: no such instruction"
        elif name != "eager":
            assert r.reason.startswith("wrong: the worst row"), direction


def test_a_gradient_is_checked_too():
    def run(state, q, k, v, phi):
        return peers.reference_attention(q, k.detach() * 0.5 + k * 0.5, v, phi)

    records = {r.direction: r for r in measured([peers.Implementation("halves dk", run)])}
    assert records["forward"].reason is None and records["forward"].microseconds
    assert records["forward + backward"].reason.startswith("wrong: the worst row")


def test_a_gpu_that_is_lost_ends_the_run(monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    record = bench.Record("entry", {}, "bf16", "forward", "cuda", "peer", False, 1, 1, 1.0, "bytes")
    with pytest.raises(bench.GpuLost, match="lost after entry, peer: RuntimeError: not on this"):
        bench.attempt(bench.Trial(record, None), stop)


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def make(shape, draw):
        sizes.append(shape["B"])
        if shape["B"] > 2:
            raise torch.OutOfMemoryError("too much")
        return bench_entries.make_attention(shape, draw)

    entry = dataclasses.replace(
        ENTRIES["image_causal_attention"], make=make, implementations=lambda shape: [peers.EAGER]
    )
    shape = {**SMALL["image_causal_attention"], "B": 8}
    records = list(bench.measure_fitting(entry, shape, "cpu", LIMITS, 2))
    assert sizes == [8, 4, 2] and {r.shape["B"] for r in records} == {2}
    never = dataclasses.replace(entry, reference=lambda shape: out_of_memory)
    with pytest.raises(ValueError, match="does not fit"):
        list(bench.measure_fitting(never, {**shape, "B": 2}, "cpu", LIMITS, 2))


def out_of_memory(*args):
    raise torch.OutOfMemoryError("too much")


def test_a_kernel_without_memory_makes_the_batch_smaller_and_a_peer_does_not():
    peer = peers.Implementation("peer", out_of_memory)
    assert all("OutOfMemoryError" in r.reason for r in measured([peer]))
    with pytest.raises(torch.OutOfMemoryError):
        measured([dataclasses.replace(peer, is_kernel=True)])


def test_ratios_are_to_the_kernel_of_the_same_direction():
    kernel = dataclasses.replace(peers.SDPA, is_kernel=True)
    records = measured([peers.EAGER, kernel])
    for r in records:
        own = next(x for x in records if x.is_kernel and x.direction == r.direction)
        assert r.ratio == r.microseconds / own.microseconds


def test_the_summary_of_times():
    times = bench.summary([10.0, 12.0, 11.0, 20.0, 22.0, 21.0])
    assert times == {"microseconds": 16.0, "halves": [11.0, 21.0], "spread": 10 / 16}


def test_calls_go_round_the_copies():
    seen = []
    taken, host = bench.time_calls(seen.append, 2, 5, "cpu")
    assert len(taken) == 5 and host == taken
    assert seen[:3] == [0, 1, 0] and seen[3:] == [0, 1, 0, 1, 0]


class FakeGpu:
    """As much of torch.cuda as the timing asks for: a clock that only calls and pauses advance."""

    def __init__(self, monkeypatch):
        self.now, self.calls, self.held = 0.0, [], 0
        properties = types.SimpleNamespace(L2_cache_size=50 * 2**20)
        for name, stand_in in dict(
            synchronize=lambda: None,
            _sleep=lambda cycles: self.run(cycles, "pause"),
            Event=self.event,
            get_device_properties=lambda device: properties,
            memory_allocated=lambda: self.held,
            max_memory_allocated=lambda: self.held + 700,
            reset_peak_memory_stats=lambda: None,
        ).items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def run(self, milliseconds, what):
        self.now += milliseconds
        self.calls.append(what)

    def event(self, enable_timing):
        event = types.SimpleNamespace(elapsed_time=lambda end: end.time - event.time)
        event.record = lambda: setattr(event, "time", self.now)
        return event


def test_a_gpus_calls_are_timed_without_the_pause_before_them(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    taken, host = bench.time_calls(lambda i: gpu.run(0.25 * (1 + i), i), 2, 4, "cuda")
    assert len(host) == 4 and all(0 < x < 1e5 for x in host)
    assert taken == pytest.approx([250, 500, 250, 500])  # microseconds
    assert gpu.calls[-8:] == ["pause", 0, "pause", 1, "pause", 0, "pause", 1]


@pytest.mark.parametrize("B,L", [(1, 40), (8, 4096)])
def test_the_copies_exceed_the_cache(monkeypatch, B, L):
    FakeGpu(monkeypatch)
    shape = dict(B=B, L=L, N=2, R=64, H=16, K=64, phi="even")
    args, _ = arguments("image_causal_attention", shape)
    one = sum(x.nbytes for x in bench.floats(args))
    copies = bench.rotation(args, "cuda", one)
    assert (len(copies) - 1) * one >= 4 * 60 * 2**20 > (len(copies) - 2) * one
    assert all(x.requires_grad for x in bench.floats(copies[-1]))
    assert len({copy[0].data_ptr() for copy in copies}) == len(copies)
    assert all(copy[3] is args[3] for copy in copies)


def test_decoding_does_not_stay_in_the_cache(monkeypatch):
    """It touches one image in N: all bytes of the arguments would be N times too many."""
    FakeGpu(monkeypatch)
    rotated = []
    real = bench.rotation
    monkeypatch.setattr(
        bench, "rotation", lambda args, device, touched: rotated.append(real(args, "cuda", touched))
    )
    shape, entry = SMALL["decode_attention"], ENTRIES["decode_attention"]
    monkeypatch.setattr(bench, "LEAST_CACHE", 2**18)
    properties = types.SimpleNamespace(L2_cache_size=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    next(bench.measure_case(entry, shape, "cpu", LIMITS, 2), None)
    read = shape["B"] * shape["H"] * shape["K"] * (1 + 2 * shape["R"]) * 4  # q, one image's k and v
    assert len(rotated[0]) - 1 == math.ceil(4 * 2**18 / read)


def test_memory_counts_what_was_prepared(monkeypatch):
    gpu = FakeGpu(monkeypatch)

    def prepare(*args):
        gpu.held += 30
        return peers.prepare_eager(*args)

    choice = dataclasses.replace(peers.EAGER, prepare=prepare)
    args, dout = arguments("image_causal_attention", ONE_IMAGE)
    fields = "e", ONE_IMAGE, "bf16", "forward", "cuda", "eager", False, 1, 1, 1.0, "bytes"
    trial = bench.Trial(bench.Record(*fields), choice)
    bench.attempt(trial, bench.prepare, args)
    times = iter([[2.0, 2.0], [5.0, 5.0]])
    monkeypatch.setattr(bench, "_time_cuda", lambda *args: (next(times), [9.0, 9.0]))
    bench.attempt(trial, bench.clock, [args], dout, 2)
    r = trial.record
    assert r.peak_bytes == 700 + 30 and r.percent_of_floor == 50
    assert (r.microseconds, r.host_microseconds, r.prepared_microseconds) == (2, 9, 5)


@pytest.mark.parametrize("value,error", [(1.0, 0.0), (1.5, 0.5), (math.nan, math.inf)])
def test_the_worst_row(value, error):
    reference = torch.ones(3, 4, 1, dtype=torch.float64)
    x = reference.float().clone()
    x[1, 2] = value
    assert bench.worst_row(x, reference) == error


def test_a_row_that_should_be_zero_is_held_against_a_typical_one():
    reference = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    x = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    assert bench.worst_row(x, reference) == pytest.approx(1 / math.sqrt(12.5))


# --- the command ----------------------------------------------------------------------------------


def test_the_command_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "bench.json"
    options = ["--device", "cpu", "--quick", "--json", str(path), "--plots", str(tmp_path)]
    assert command_line.main(["bench", *options]) == 0
    printed, document = capsys.readouterr().out, json.loads(path.read_text("utf-8"))
    assert "no GPU" in printed and "no kernel" in printed
    assert document["meta"].keys() >= {"date", "machine", "gpu", "driver", "torch", "triton"}
    assert document["meta"]["backend"] == "cpu" and not document["meta"]["kernels_timed"]
    assert document["limits"]["copy_bytes_per_second"] > 0 < document["limits"]["flops_per_second"]
    fields = {field.name for field in dataclasses.fields(bench.Record)}
    for r in document["records"]:
        assert r.keys() == fields and r["backend"] == "cpu"
        assert (r["reason"] is None) == (r["microseconds"] is not None), r
        assert r["reason"] or (r["floor_microseconds"] > 0 and r["error"] < 1e-5)
        assert not (r["is_kernel"] and r["microseconds"])
    assert {r["entry"] for r in document["records"]} == set(ENTRIES)
    assert any(r["implementation"] == "NumPy" and r["microseconds"] for r in document["records"])
    names = {*bench.FIGURES, "bench.json", ".made-by-bench.json"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_case_chooses(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert command_line.main(["bench", "--device", "cpu", "--quick", "--case", "decode",
                              "--json", str(path), "--plots", str(tmp_path)]) == 0  # fmt: skip
    records = json.loads(path.read_text("utf-8"))["records"]
    assert {r["entry"] for r in records} == {"decode_attention"}
    assert not (tmp_path / "cost_forward.png").exists()  # there is nothing to draw
    (tmp_path / "roofline.png").write_text("mine", "utf-8")
    again = ["bench", "--device", "cpu", "--quick", "--plots", str(tmp_path)]
    assert command_line.main(again) == 2
    assert "roofline.png: in the way" in capsys.readouterr().err
    assert (tmp_path / "roofline.png").read_text("utf-8") == "mine"


@pytest.mark.parametrize(
    "options,message",
    [
        (["--case", "no such case"], "no such case"),
        (["--json", "no/such/folder/x.json"], "no/such/folder/x.json"),
        (["--plots", "no/such/folder"], "no/such/folder"),
        (["--device", "cuda"], "expected a GPU"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, message, capsys):
    if options[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main(["bench", "--quick", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_kernel_that_fails_on_a_gpu_exits_with_1(monkeypatch, capsys):
    """As far as it can be seen without one: the verdict over the records."""
    fields = "e", {"B": 1}, "bf16", "forward", "cuda", "fused", True, 1, 1, 1.0, "bytes"
    record = bench.Record(*fields, reason="wrong")
    monkeypatch.setattr(bench, "measure_fitting", lambda *args: [record])
    meta = {"backend": "cuda", "repeats": 1, "gpu": None}
    document = {"meta": meta, "limits": {}, "records": []}
    assert bench.measure_all(document, [(None, {})], None)
    assert "wrong" in capsys.readouterr().out and len(document["records"]) == 1


def test_a_file_grows_and_what_it_has_is_not_measured_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    options = ["bench", "--device", "cpu", "--quick", "--case", "decode", "--json", str(path)]
    monkeypatch.setattr(bench, "measure_limits", lambda *args: {**LIMITS, "product_side": 1})
    assert command_line.main(options) == 0
    first = json.loads(path.read_text("utf-8"))
    some = {**first, "records": first["records"][:2]}
    path.write_text(json.dumps(some), "utf-8")
    assert command_line.main([*options, "--append"]) == 0
    second = json.loads(path.read_text("utf-8"))
    assert second["records"][:2] == some["records"]
    assert list(map(bench.key, second["records"])) == list(map(bench.key, first["records"]))
    monkeypatch.setattr(bench, "code_digest", lambda: "other kernels")
    assert command_line.main([*options, "--append"]) == 2
    assert "expected times of the same code, other kernels" in capsys.readouterr().err
    assert json.loads(path.read_text("utf-8")) == second
    assert command_line.main(["bench", "--append"]) == 2


def test_a_kernels_row_has_its_prediction_beside_it(monkeypatch):
    if kernels.unavailable():
        pytest.skip(kernels.unavailable())
    from miniflamingo.kernels.tools import predict

    shape = ENTRIES["decode_attention"].shapes["cuda"][0]
    fields = "decode_attention", shape, "bfloat16", "forward", "cuda", "fused", True, 1, 1, 1.0
    record = bench.Record(*fields, "bytes", microseconds=15.0, host_microseconds=3.0, spread=0.0,
                          percent_of_floor=1.0, error=0.0)  # fmt: skip
    found = dict(device="H200", entry="decode_attention", shape=shape, direction="forward", us=10.0)
    monkeypatch.setattr(predict, "committed", lambda: {"records": [found]})
    bench.add_prediction(record, "NVIDIA A30")
    assert record.predicted_microseconds is None
    bench.add_prediction(record, "NVIDIA H200")
    assert record.predicted_microseconds == 10 and bench.row(record).endswith("10.0 +50%")


# --- the figures ----------------------------------------------------------------------------------


def made_up(gpu="a made-up GPU"):
    """A document as the command writes it, with invented times: what the figures must show."""
    limits = {"copy_bytes_per_second": 1e12, "flops_per_second": 1e14}
    entry, records = ENTRIES["image_causal_attention"], []
    for shape in [s for s in entry.shapes["cuda"] if s["H"] < 64]:
        for i, choice in enumerate(entry.implementations(shape)):
            for j, direction in enumerate(bench.DIRECTIONS):
                moved, flops = counted(shape, j > 0)
                floor = moved / 1e12 * 1e6
                cost = floor * (1.3 + i) * (1 if i in (0, 4, 6) else shape["N"] ** 0.5)
                records.append(
                    bench.Record(
                        entry.name, shape, "bfloat16", direction, "cuda", choice.name,
                        choice.is_kernel, moved, flops, floor, "bytes", microseconds=cost,
                    )
                )  # fmt: skip
    meta = {"gpu": gpu, "cpu": None, "machine": "x86_64"}
    return {"meta": meta, "limits": limits, "records": [dataclasses.asdict(r) for r in records]}


def test_the_cost_figure_shows_every_time():
    document = made_up()
    figure = plots.plot_cost(document, "image_causal_attention", "forward")
    drawn = sorted(y for a in figure.axes for line in a.lines for y in line.get_ydata())
    rows = [r for r in document["records"] if r["direction"] == "forward"]
    floors = {(json.dumps(r["shape"])): r["floor_microseconds"] for r in rows}.values()
    assert drawn == sorted([*(r["microseconds"] for r in rows), *floors])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(names) == {r["implementation"] for r in rows} | {"floor"}
    assert "a made-up GPU" in figure.get_suptitle()


def test_the_roofline_shows_every_rate_below_the_roof():
    document = made_up()
    figure = plots.plot_roofline(document)
    assert [a.get_title(loc="left") for a in figure.axes] == list(bench.DIRECTIONS)
    points = [(line.get_xdata(), line.get_ydata()) for a in figure.axes for line in a.lines]
    points = [(x[0], y[0]) for x, y in points if len(x) == 1]
    assert len(points) == len(document["records"])
    assert all(rate <= min(1e12 * x, 1e14) / 1e12 for x, rate in points)


def test_figures_say_that_a_cpu_times_no_kernel_and_refuse_a_document_without_times():
    document = made_up(gpu=None)
    assert "no kernel timed" in plots.plot_roofline(document).get_suptitle()
    with pytest.raises(ValueError, match="expected times of nothing"):
        plots.plot_cost(document, "nothing", "forward")
    with pytest.raises(ValueError, match="got none"):
        plots.plot_roofline({**document, "records": []})
