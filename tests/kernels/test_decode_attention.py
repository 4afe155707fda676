"""The attention of one decoded token against its NumPy twin, plain torch, and its own promises."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniflamingo.kernels import decode_attention
from miniflamingo.kernels.common.runtime import INTERPRET, poisoned, replaced
from miniflamingo.kernels.image_causal_attention import image_causal_attention
from miniflamingo.kernels.tools import compare, twins

interpreted = pytest.mark.skipif(not INTERPRET.value, reason="float64 is the interpreter's alone")
ATTENTION = next(k for k in compare.KERNELS if k.name == "decode_attention")
DEVICE = "cpu" if INTERPRET.value else "cuda"


def draw(phi, N=3, R=7, H=2, K=16, dtype=torch.float32, device=DEVICE):
    """q, k, v, phi as tensors."""
    B, g = len(phi), torch.Generator().manual_seed(0)
    shapes = (B, H, K), (B, N, R, H, K), (B, N, R, H, K)
    floats = (torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes)
    return *floats, torch.tensor(phi, dtype=torch.int32, device=device)


def decode(*args):
    """The kernel's output, from a poisoned buffer."""
    with poisoned():
        return decode_attention.decode_attention(*args)


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("case", ATTENTION.cases)
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype, device):
    (record,) = compare.compare(ATTENTION, case, dtype, device)
    assert record.ok and record.direction == "forward", record


@interpreted
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_and_any_phi(data):
    size = lambda most, least=1: data.draw(st.integers(least, most))  # noqa: E731
    B, N = size(3, 0), size(3, 0)
    phi = data.draw(st.lists(st.integers(0, N), min_size=B, max_size=B))
    args = draw(phi, N, size(140), size(3), size(40), torch.float64)
    expected = twins.decode_attention(*map(compare.to_numpy, args))
    np.testing.assert_allclose(decode(*args).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_it_is_image_causal_attention_of_one_token(device):
    q, k, v, phi = draw([2, 0, 3, 1], device=device)
    expected = image_causal_attention(q[:, None], k, v, phi[:, None])[:, 0]
    torch.testing.assert_close(decode(q, k, v, phi), expected)


def test_zeros_are_exact(device):
    out = decode(*draw([0, 2, 0], device=device))
    assert (out[[0, 2]] == 0).all() and (out[1] != 0).all()


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_a_phi_outside_its_range_counts_as_0(wrong, device):
    out = decode(*draw([wrong, 1], device=device))
    assert (out[0] == 0).all() and (out[1] != 0).all()


@pytest.mark.parametrize("B,N", [(0, 2), (2, 0), (0, 0)])
def test_empty_sizes(B, N, device):
    out = decode(*draw([0] * B, N, device=device))
    assert out.shape == (B, 2, 16) and (out == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
def test_only_one_image_is_read(device):
    q, k, v, phi = draw([2, 1, 0], device=device)
    expected = decode(q, k, v, phi)
    k[0, [0, 2]], v[0, [0, 2]], k[2], v[2] = (float("nan"),) * 4
    assert torch.equal(decode(q, k, v, phi), expected)
    k[1, 0] = float("nan")
    assert decode(q, k, v, phi).isnan().flatten(1).all(1).tolist() == [False, True, False]


# --- layouts, determinism, launches -------------------------------------------------------------


@pytest.mark.parametrize("R", [5, 100])
def test_strides_change_nothing(R, device):
    *floats, phi = draw([1, 0, 3], R=R, device=device)
    expected = decode(*floats, phi)
    apart = [torch.stack([x, x], dim=-2)[..., 0, :] for x in floats]
    columns_first = [x.mT.contiguous().mT for x in floats]
    kept = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in floats]
    for x in (apart, columns_first, kept):
        assert not x[1].is_contiguous()
        assert torch.equal(decode(*x, phi.repeat_interleave(2)[::2]), expected)
    assert torch.equal(decode(*floats, phi.long()), expected)


def test_two_runs_agree_bit_for_bit(device):
    args = draw([1, 2, 3], R=100, device=device)
    assert torch.equal(decode(*args), decode(*args))


def test_the_launch_depends_on_shapes_alone(device):
    launches = []
    with replaced(launch=lambda kernel, programs, *args, **options: launches.append(programs)):
        for phi in ([0, 0, 0], [3, 3, 1]):
            decode(*draw(phi, device=device))
    assert launches == [6, 6]


def test_poison_shows_what_a_kernel_forgets():
    args = draw([0, 1])
    with replaced(launch=lambda *args, **options: None):
        assert decode(*args).isnan().all()
    assert not decode(*args).isnan().any()


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_a_cuda_graph_follows_phi(device):
    q, k, v, phi = draw([1, 0, 3], device=device)
    decode_attention.decode_attention(q, k, v, phi)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention.decode_attention(q, k, v, phi)
    for new in ([1, 0, 3], [0, 2, 2]):
        phi.copy_(torch.tensor(new))
        graph.replay()
        assert torch.equal(out, decode(q, k, v, phi))


# --- broken kernels -----------------------------------------------------------------------------

BRIEF = {
    "rows": twins.decode_case(0, 2, 3, R=5, K=16),
    "blocks": twins.decode_case(1, 2, 3, R=140, K=16),
}
BREAKAGES = {
    "nothing": ("", "", False),
    "phi off by one": ("(image - 1)", "(image % N)", True),
    "phi = 0 is the first image": (
        "tl.load(phi_ptr + b * phi_b)", "tl.maximum(tl.load(phi_ptr + b * phi_b), 1)", True,
    ),
    "no scale": ("(SCALE * LOG2E)", "LOG2E", True),
    "keys past the end": ('tl.where((r < R)[:, None], scores, float("-inf"))', "scores", True),
    "not divided by the sum": ("out = out * (1 / total)[:, None]", "", True),
    "the last block only": ("out * shrink[:, None] + ", "", True),
    "no rescaling": ("total * shrink", "total", True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the broken ones overflow
@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_kernel_turns_the_table_red(name, tmp_path):
    before, after, red = BREAKAGES[name]
    source = Path(decode_attention.__file__).read_text("utf-8")
    assert before in source, f"the kernel no longer contains {before!r}"
    source = source.replace(before, after) if before else source
    namespace = "broken_decode_" + "".join(filter(str.isalnum, name))
    path = tmp_path / f"{namespace}.py"
    path.write_text(source.replace('@operator("', f'@operator("{namespace}_'), "utf-8")
    spec = importlib.util.spec_from_file_location(f"miniflamingo.kernels.{namespace}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    comparison = dataclasses.replace(ATTENTION, kernel=module.decode_attention, cases=BRIEF)
    records = [r for case in BRIEF for r in compare.compare(comparison, case, "fp32", DEVICE)]
    assert any(not r.ok for r in records) == red


# --- torch --------------------------------------------------------------------------------------


def test_opcheck(device):
    torch.library.opcheck(
        torch.ops.miniflamingo.decode_attention.default, draw([1, 0], device=device)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, device):
    args = draw([1, 0, 3], device=device)
    doubled = lambda *args: 2 * decode_attention.decode_attention(*args)  # noqa: E731
    torch.compiler.reset()
    compiled = torch.compile(doubled, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*args), doubled(*args))


def test_it_has_no_gradient(device):
    q, k, v, phi = draw([1, 0], device=device)
    with pytest.raises(RuntimeError, match="autograd"):
        decode_attention.decode_attention(q.requires_grad_(), k, v, phi).sum().backward()


# --- errors -------------------------------------------------------------------------------------

q, kv, phi = torch.zeros(2, 2, 16), torch.zeros(2, 3, 4, 2, 16), torch.zeros(2, dtype=int)
WRONG = {
    "q with L": (dict(q=q[:, None]), r"q \[2, 1, 2, 16\] and k \[2, 3, 4, 2, 16\]"),
    "k without N": (dict(k=kv[:, 0]), r"k \[2, 4, 2, 16\]"),
    "other heads": (dict(q=q[:, :1]), r"q \[2, 1, 16\] and k \[2, 3, 4, 2, 16\]"),
    "v unlike k": (dict(v=kv[:, :2]), r"\[2, 3, 4, 2, 16\], got \[2, 2, 4, 2, 16\]"),
    "phi too short": (dict(phi=phi[:1]), r"int \[B\] = \[2\] on cpu, got int64 \[1\]"),
    "phi is float": (dict(phi=phi.float()), r"int \[B\] = \[2\].*got float32 \[2\]"),
    "phi elsewhere": (dict(phi=phi.to("meta")), r"on cpu, got int64 \[2\] on meta"),
    "K = 129": (
        dict(q=torch.zeros(2, 2, 129), k=(wide := torch.zeros(2, 3, 4, 2, 129)), v=wide),
        "K must be 1 to 128, got 129",
    ),
    "R = 257": (
        dict(k=torch.zeros(2, 3, 257, 2, 16), v=torch.zeros(2, 3, 257, 2, 16)),
        "R must be 1 to 256, got 257",
    ),
    "mixed dtypes": (
        dict(v=kv.half()),
        "must have one dtype.*got float32, float32, float16",
    ),
    "integers": (dict(q=q.int(), k=kv.int(), v=kv.int()), "float32.*got int32, int32, int32"),
    "mixed devices": (dict(v=kv.to("meta")), "one device.*got cpu, cpu, meta"),
}


@interpreted
@pytest.mark.parametrize("name", WRONG)
def test_value_errors_quote_expected_and_got(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        decode_attention.decode_attention(**(dict(q=q, k=kv, v=kv, phi=phi) | change))


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_cpu_tensors_are_refused_on_a_gpu_machine(device):
    with pytest.raises(ValueError, match="one device, cuda, got cpu"):
        decode_attention.decode_attention(q, kv, kv, phi)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_other_images_reach_nothing(bad, device):
    q, k, v, phi = draw([2, 0, 3], device=device)
    expected = decode(q, k, v, phi)
    others = torch.arange(1, 4, device=device) != phi[:, None]
    k[others], v[others] = bad, bad
    assert torch.equal(decode(q, k, v, phi), expected)
