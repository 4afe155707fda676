"""The fused image-causal attention against its NumPy twin, plain torch, and its own promises."""

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from miniflamingo import xattn
from miniflamingo.kernels.common import work_list
from miniflamingo.kernels.common.runtime import INTERPRET, cast, launch, poisoned, replaced
from miniflamingo.kernels.common.work_list import build_work_list, choose_chunks
from miniflamingo.kernels.image_causal_attention import (
    image_causal_attention,
    image_causal_attention_backward,
)
from miniflamingo.kernels.tools import compare

interpreted = pytest.mark.skipif(not INTERPRET.value, reason="float64 is the interpreter's alone")
DEVICE = "cpu" if INTERPRET.value else "cuda"
ATTENTION = next(k for k in compare.KERNELS if k.name == "image_causal_attention")


def draw(phi, N, R=7, H=2, K=16, dtype=torch.float32, device="cpu", seed=0):
    """dout, q, k, v, phi as tensors."""
    phi = torch.as_tensor(phi, dtype=torch.int32)
    (B, L), g = phi.shape, torch.Generator().manual_seed(seed)
    shapes = (B, L, H, K), (B, L, H, K), (B, N, R, H, K), (B, N, R, H, K)
    floats = (torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes)
    return *floats, phi.to(device)


def both(dout, q, k, v, phi, **options):
    """out, dq, dk, dv of the kernel, from poisoned buffers."""
    with poisoned():
        out = image_causal_attention(q, k, v, phi, **options)
        return out, *image_causal_attention_backward(dout, q, k, v, phi, **options)


def twin(dout, q, k, v, phi):
    """The same from NumPy in float64."""
    dout, q, k, v, phi = map(compare.to_numpy, (dout, q, k, v, phi))
    grads = xattn.image_causal_attention_backward(dout, q, k, v, phi)
    return xattn.image_causal_attention(q, k, v, phi), *grads


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("case", ATTENTION.cases)
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype, device):
    for record in compare.compare(ATTENTION, case, dtype, device):
        assert record.ok, record


@interpreted
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape_and_any_phi(data):
    size = lambda most, least=1: data.draw(st.integers(least, most))  # noqa: E731
    B, L, N, R, H, K = size(2), size(12, 0), size(3, 0), size(70), size(2), size(33)
    phi = data.draw(st.lists(st.integers(0, N), min_size=B * L, max_size=B * L))
    args = draw(torch.tensor(phi, dtype=torch.int32).reshape(B, L), N, R, H, K, torch.float64)
    work = build_work_list(args[-1], N, chunk=size(8))
    for x, reference in zip(both(*args, work=work), twin(*args)):
        np.testing.assert_allclose(x.numpy(), reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("R", [5, 70])
def test_zeros_are_exact(R, device):
    phi = [[0, 0, 3, 3, 0, 1], [0] * 6]
    out, dq, dk, dv = both(*draw(phi, N=3, R=R, device=device))
    nowhere = torch.tensor(phi, device=device) == 0
    assert (out[nowhere] == 0).all() and (dq[nowhere] == 0).all()
    assert (out[~nowhere] != 0).all()
    for grad in (dk, dv):
        attended = (grad != 0).flatten(2).any(-1).tolist()
        assert attended == [[True, False, True], [False, False, False]]


@pytest.mark.parametrize("B,L,N", [(0, 4, 2), (2, 0, 2), (2, 5, 0), (1, 0, 0)])
def test_empty_sizes(B, L, N, device):
    args = draw(np.zeros((B, L), int), N, device=device)
    for x, reference in zip(both(*args), twin(*args)):
        assert x.shape == reference.shape and (x == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
def test_a_nan_in_an_image_stays_with_its_tokens(device):
    dout, q, k, v, phi = draw([[1, 2, 0, 2, 3]], N=3, device=device)
    k[0, 1], v[0, 1] = float("nan"), float("nan")
    out, dq, dk, dv = both(dout, q, k, v, phi)
    assert out[0].isnan().flatten(1).any(-1).tolist() == [False, True, False, True, False]
    assert dq[0].isnan().flatten(1).any(-1).tolist() == [False, True, False, True, False]
    assert not dk[0, [0, 2]].isnan().any() and not dv[0, [0, 2]].isnan().any()


# --- layouts, determinism, the work list --------------------------------------------------------


@pytest.mark.parametrize("R", [5, 70])
def test_strides_change_nothing(R, device):
    dout, q, k, v, phi = draw([[0, 1, 1, 2, 2, 2]] * 2, N=2, R=R, device=device)
    expected = both(dout, q, k, v, phi)
    packed = torch.stack([q, dout], dim=3).unbind(3)  # rows apart, as from one projection
    heads_first = [x.transpose(-2, -3).contiguous().transpose(-2, -3) for x in (k, v)]
    phi_apart = phi.repeat_interleave(2, dim=1)[:, ::2]
    for x, y in zip(both(packed[1], packed[0], *heads_first, phi_apart), expected):
        assert torch.equal(x, y)
    columns_first = [x.mT.contiguous().mT for x in (dout, q, k, v)]
    assert columns_first[0].stride(-1) != 1
    for x, y in zip(both(*columns_first, phi), expected):
        assert torch.equal(x, y)


def test_an_expanded_gradient(device):
    _, q, k, v, phi = draw([[0, 1, 2]], N=2, device=device)
    q.requires_grad_()
    image_causal_attention(q, k, v, phi).sum().backward()  # dout has strides of 0
    expected = image_causal_attention_backward(torch.ones_like(q), q.detach(), k, v, phi)[0]
    assert torch.equal(q.grad, expected)


@pytest.mark.parametrize("R", [5, 70])
def test_two_runs_agree_bit_for_bit(R, device):
    args = draw([[1] * 150 + [2] * 30], N=2, R=R, device=device)
    assert all(torch.equal(x, y) for x, y in zip(both(*args), both(*args)))


def listed(phi, N, chunks):
    """The lists of some chunks, whose memory holds -7 at first: order, items, backward, splits."""
    empty = work_list._empty_lists
    filled = lambda *args: tuple(x.fill_(-7) for x in empty(*args))  # noqa: E731
    with patch.object(work_list, "_empty_lists", filled):
        return [x.cpu() for x in work_list.launch_list(phi.to(DEVICE), N, *chunks)]


def slots_of(items, order, phi, chunk):
    """Check items against phi -> {(batch row, image): the slots of its items}."""
    seen, slots = torch.zeros_like(phi), {}
    for b, image, begin, end, slot in items.tolist():
        assert 0 <= begin <= end <= begin + chunk and end <= phi.shape[1]
        tokens = order[b, begin:end].tolist()
        assert (phi[b, tokens] == image).all() and tokens == sorted(tokens)
        seen[b, tokens] += 1
        slots.setdefault((b, image), []).append(slot)
    assert (seen == 1).all()
    return slots


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_work_list_holds_every_token_once(data):
    B, L, N = (data.draw(st.integers(0, most)) for most in (2, 30, 9))
    row = st.lists(st.integers(-1, N + 1), min_size=L, max_size=L)
    rows = [data.draw(row.map(sorted) | row) for _ in range(B)]
    chunks = [data.draw(st.integers(1, 9)) for _ in range(2)]
    given_phi = torch.tensor(rows, dtype=torch.int64).reshape(B, L)
    phi = torch.where((given_phi >= 0) & (given_phi <= N), given_phi, 0)
    order, items, backward, splits = listed(given_phi, N, chunks)
    assert torch.equal(order.long(), phi.argsort(dim=1, stable=True))
    forward_slots, slots = (
        slots_of(items, order, phi, chunks[0]),
        slots_of(backward, order, phi, chunks[1]),
    )
    assert {s for own in forward_slots.values() for s in own} <= {-1}
    images = {(b, n) for b in range(B) for n in range(1, N + 1)}
    assert images <= slots.keys() and images <= forward_slots.keys()
    used, expected = [], {}
    for b, n in images:  # one with more tokens than an item has slots side by side, and is listed
        count = -(-int((phi[b] == n).sum()) // chunks[1])
        first = slots[b, n][0]
        assert slots[b, n] == ([*range(first, first + count)] if count > 1 else [-1])
        if count > 1:
            expected[b * N + n - 1] = [first, count]
            used += slots[b, n]
    assert {i: [first, count] for i, first, count in splits.tolist() if count} == expected
    assert len(set(used)) == len(used)
    assert all(0 <= s < B * work_list.most_splits(N, L, chunks[1])[1] for s in used)


@pytest.mark.parametrize("N,L,chunk", [(1, 9, 4), (3, 9, 4), (2, 20, 4), (5, 4, 4), (0, 9, 4)])
def test_no_more_room_for_partial_sums_than_some_phi_needs(N, L, chunk):
    """Against all ways to give L tokens to N images."""
    ways = itertools.combinations_with_replacement(range(L + 1), N)
    counts = (np.diff([0, *ends]) for ends in ways)
    split = [[-(-n // chunk) for n in count if n > chunk] for count in counts]
    most = max(map(len, split)), max(map(sum, split))
    assert work_list.most_splits(N, L, chunk) == most


def test_a_long_run_after_short_ones_fills_all_its_places_in_the_splits():
    phi = torch.tensor([[1, 2, 3, 4, *[5] * 12, 6]])
    order, _, backward, splits = listed(phi, 6, (2, 2))
    assert [row for row in splits.tolist() if row[2]] == [[4, *splits[1, 1:].tolist()]]
    assert len(splits) == 5 and splits[:, 2].tolist() == [0, 6, 0, 0, 0]
    assert slots_of(backward, order, phi, 2)[0, 5] == list(range(splits[1, 1], splits[1, 1] + 6))


def test_long_rows_and_many_images():
    """More tokens than a program takes at a time, and more items."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randint(0, 3, (1, 5000), generator=generator)
    order, _, backward, splits = listed(phi, 2, (7, 3))
    assert torch.equal(order.long(), phi.argsort(dim=1, stable=True))
    assert len(slots_of(backward, order, phi, 3)[0, 2]) == -(-int((phi == 2).sum()) // 3)
    phi = torch.arange(40)[None].flip(1)
    order, items, _, splits = listed(phi, 39, (64, 64))
    assert torch.equal(order[0], torch.arange(40, dtype=torch.int32).flip(0))
    assert len(slots_of(items, order, phi, 64)) == 40 and not splits[:, 2].any()


def test_one_kernel_builds_the_list_and_one_more_adds_up(device):
    launches = []

    def record(kernel, programs, *args, **options):
        launches.append((kernel.__name__, programs))

    args = draw([[1] * 70 + [2] * 130], N=2, K=64, R=64, device=device)
    with replaced(launch=record):
        both(*args)
    B, H, items = 1, 2, 3 + 200 // 64  # two images and none, and what full items there are
    one = [("_list_work", B)]
    backward = [("_backward", items * H), ("_sum_partials", 2 * 64 * H * 64 // 1024)]
    assert launches == [*one, ("_forward", items * H), *one, *backward]


def test_what_no_phi_can_split_costs_no_memory_and_no_launch(device):
    shapes, launches = [], []

    def allocate(shape, **options):
        shapes.append(tuple(shape))
        return torch.empty(shape, **options)

    args = draw([[1] * 64, [0] * 64], N=1, device=device)
    with replaced(allocate=allocate, launch=lambda kernel, *_, **__: launches.append(kernel)):
        image_causal_attention_backward(*args)
    assert [s for s in shapes if math.prod(s)] == [x.shape for x in args[1:4]]
    assert [kernel.__name__ for kernel in launches] == ["_list_work", "_backward"]


def test_work_list_agrees_with_its_twin():
    phi = np.array([[0, 2, 2, 1, 2], [3, 3, 0, 0, 3]])
    owner, tokens = xattn.work_list(phi, N=3, most=2)
    expected = {(int(o), tuple(t[t < phi.size].tolist())) for o, t in zip(owner, tokens)}
    order, *both_items, _ = listed(torch.tensor(phi), 3, (2, 2))
    for items in both_items:
        got = {
            (b * 3 + image - 1, tuple((b * 5 + order[b, begin:end]).tolist()))
            for b, image, begin, end, *_ in items.tolist()
            if image and begin < end
        }
        assert got == expected


def test_layers_share_a_work_list(device):
    args = draw([[0, 1, 1, 2]], N=2, device=device)
    work = build_work_list(args[-1], 2, heads=2)
    assert all(torch.equal(x, y) for x, y in zip(both(*args, work=work), both(*args)))


def test_chunks_grow_with_the_work():
    assert [choose_chunks(rows) for rows in (0, 2**14, 2**15, 2**16, 2**18 - 1, 2**18, 2**24)] == [
        (64, 64), (64, 64), (64, 128), (64, 256), (64, 512), (128, 1024), (512, 2048),
    ]  # fmt: skip


def test_unchecked_phi_outside_its_range_counts_as_0(device):
    args = draw([[0, 1, 2, 0]], N=2, device=device)
    wrong = torch.tensor([[-5, 1, 2, 3]], device=device, dtype=torch.int32)
    assert all(torch.equal(x, y) for x, y in zip(both(*args[:-1], wrong, check=False), both(*args)))


@pytest.mark.parametrize("R", [5, 70])
def test_autograd_gives_what_the_backward_function_gives(R, device):
    dout, q, k, v, phi = draw([[0, 1, 1, 2] * 40, [2] * 160], N=2, R=R, device=device)
    expected = both(dout, q, k, v, phi)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with poisoned():
        out = image_causal_attention(q, k, v, phi)
        kept = [x for x in out.grad_fn.saved_tensors if x.shape == out.shape]
        results = out, *torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(x, y) for x, y in zip(results, expected))
    assert len(kept) == (1 if R == 5 else 2)  # q, and the output where there are several blocks


def test_poison_shows_what_a_kernel_forgets():
    args = draw([[0, 1]], N=1, device="cpu" if INTERPRET.value else "cuda")
    with replaced(launch=lambda *args, **options: None):
        assert all(x.isnan().all() for x in both(*args))
    assert not any(x.isnan().any() for x in both(*args))


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_the_host_never_waits(device):
    args = draw([[0, 1, 1, 2]], N=2, device=device)
    both(*args)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        image_causal_attention(*args[1:], check=False)
        image_causal_attention_backward(*args, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- torch --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("R,chunk", [(3, 64), (3, 2), (70, 2)])
def test_gradcheck(R, chunk):
    _, q, k, v, phi = draw(
        [[0, 2, 2, 2, 1], [1, 0, 0, 1, 1]], N=2, R=R, H=1, K=4, dtype=torch.float64
    )
    work = build_work_list(phi, 2, chunk=chunk)
    for x in (q, k, v):
        x.requires_grad_()
    attend = lambda q, k, v: image_causal_attention(q, k, v, phi, work)  # noqa: E731
    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("R", [5, 70])
def test_opcheck(R, device):
    dout, q, k, v, phi = draw([[0, 1, 2]], N=2, R=R, device=device)
    work = build_work_list(phi, 2)
    lists = *work[:4], work.chunks[1]
    ops = torch.ops.miniflamingo
    torch.library.opcheck(ops.work_list.default, (phi, 2, 64, 64))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.image_causal_attention.default, (*leaves, *lists))
    found = ops.image_causal_attention(q, k, v, *lists)
    backward = ops.image_causal_attention_backward.default
    torch.library.opcheck(backward, (dout, q, k, v, *found, *lists))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, device):
    dout, q, k, v, phi = draw([[0, 1, 2, 2]], N=2, device=device)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, phi)
        return out, *torch.autograd.grad(out, leaves, dout)

    def doubled(q, k, v, phi):
        return 2 * image_causal_attention(q, k, v, phi, check=False)

    torch.compiler.reset()
    compiled = torch.compile(doubled, backend=backend, fullgraph=True)
    for x, y in zip(run(compiled), run(doubled)):
        torch.testing.assert_close(x, y)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, cast(tl.load(x_ptr + i), out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_torch(dtype, device):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    ties = 1 + torch.arange(16) / 256  # halfway between two bfloat16s, every other one
    x[:16], x[16:18] = ties, torch.tensor([float("inf"), -0.0])
    x, out = x.to(device), torch.empty(1024, dtype=dtype, device=device)
    launch(_cast_kernel, 1, x, out, BLOCK=1024)
    assert torch.equal(out, x.to(dtype))


# --- errors -------------------------------------------------------------------------------------

q, kv, phi = torch.zeros(2, 5, 2, 16), torch.zeros(2, 3, 4, 2, 16), torch.zeros(2, 5, dtype=int)
WRONG = {
    "phi too short": (dict(phi=phi[:, :4]), r"\[2, 5\].*got int64 \[2, 4\]"),
    "phi is float": (dict(phi=phi.float()), r"int.*got torch.float32 \[2, 5\]"),
    "phi too large": (dict(phi=phi + 4), r"0\.\.3.*got 4\.\.4"),
    "phi negative": (dict(phi=phi - 1), r"0\.\.3.*got -1\.\.-1"),
    "phi elsewhere": (dict(phi=phi.to("meta")), r"on cpu, got .* on meta"),
    "v unlike k": (dict(v=kv[:, :2]), r"\[2, 3, 4, 2, 16\], got \[2, 2, 4, 2, 16\]"),
    "other heads": (dict(q=q[:, :, :1]), r"q \[2, 5, 1, 16\] and k \[2, 3, 4, 2, 16\]"),
    "k without N": (dict(k=kv[:, 0]), r"k \[2, 4, 2, 16\]"),
    "K = 129": (
        dict(q=torch.zeros(2, 5, 2, 129), k=(wide := torch.zeros(2, 3, 4, 2, 129)), v=wide),
        r"K must be 1 to 128, got 129",
    ),
    "R = 257": (
        dict(k=torch.zeros(2, 3, 257, 2, 16), v=torch.zeros(2, 3, 257, 2, 16)),
        r"R must be 1 to 256, got 257",
    ),
    "mixed dtypes": (dict(v=kv.half()), "one dtype.*got float32, float32, float16"),
    "integers": (dict(q=q.int(), k=kv.int(), v=kv.int()), "float32.*got int32, int32, int32"),
    "mixed devices": (dict(v=kv.to("meta")), "one device.*got cpu, cpu, meta"),
}


@interpreted
@pytest.mark.parametrize("name", WRONG)
def test_value_errors_quote_expected_and_got(name):
    change, message = WRONG[name]
    args = dict(q=q, k=kv, v=kv, phi=phi) | change
    with pytest.raises(ValueError, match=message):
        image_causal_attention(**args)
    with pytest.raises(ValueError, match=message):
        image_causal_attention_backward(q, **args)


@interpreted
def test_dout_must_be_like_q():
    with pytest.raises(ValueError, match=r"float32 \[2, 5, 2, 16\] on cpu, got float16"):
        image_causal_attention_backward(q.half(), q, kv, kv, phi)


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_cpu_tensors_are_refused_on_a_gpu_machine(device):
    with pytest.raises(ValueError, match="one device, cuda, got cpu"):
        image_causal_attention(q, kv, kv, phi)


# --- masked means unseen, and a work list is for one phi ------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("R", [5, 70])
def test_an_image_that_nobody_looks_at_reaches_nothing(bad, R, device):
    args = draw([[0, 1, 1, 3], [2, 2, 0, 2]], N=3, R=R, device=device)
    expected, unseen = both(*args), torch.tensor([[0, 1, 0], [1, 0, 1]], dtype=bool, device=device)
    args[2][unseen], args[3][unseen] = bad, bad
    results = both(*args)
    assert all(torch.equal(x, y) for x, y in zip(results, expected))
    assert not results[2][unseen].any() and not results[3][unseen].any()


def test_a_work_list_of_other_sizes_is_refused(device):
    _, q, k, v, phi = draw([[0, 1, 1, 2]] * 2, N=2, device=device)
    work = build_work_list(phi[:, :3], 3)
    with pytest.raises(ValueError, match=r"\(2, 4, 2\) on .*, got \(2, 3, 3\)"):
        image_causal_attention(q, k, v, phi, work)


def test_a_work_list_of_another_phi_is_refused(device):
    dout, q, k, v, phi = draw([[0, 1, 1, 2]], N=2, device=device)
    work = build_work_list(torch.tensor([[0, 0, 1, 1]], device=device), 2)
    for check in (True, False):
        with pytest.raises(ValueError, match="work must be built from the phi given"):
            image_causal_attention(q, k, v, phi, work, check)
        with pytest.raises(ValueError, match="work must be built from the phi given"):
            image_causal_attention_backward(dout, q, k, v, phi, work, check)
    own = build_work_list(phi, 2)
    expected = image_causal_attention(q, k, v, phi)
    for same in (phi, phi.detach(), phi[:], phi.clone(), phi.long()):
        assert torch.equal(image_causal_attention(q, k, v, same, own), expected)
    phi[0, 0] = 1
    with pytest.raises(ValueError, match="built again: its phi was written to since"):
        image_causal_attention(q, k, v, phi, own)


def test_a_work_list_that_was_changed_is_refused(device):
    _, q, k, v, phi = draw([[0, 1, 1, 2] * 40], N=2, device=device)
    work = build_work_list(phi, 2)
    changes = {"chunks": (64, 16)}, {"source": None}, {"items": work.items[:-1]}
    for change in (*changes, {"backward_items": work.items[:-1]}):
        with pytest.raises(ValueError, match="as build_work_list returns it"):
            image_causal_attention(q, k, v, phi, work._replace(**change))


@pytest.mark.parametrize("chunk", [0, -3, 2.5, "8"])
def test_a_chunk_is_a_positive_integer(chunk):
    with pytest.raises(ValueError, match="chunk must be an integer above 0, got"):
        build_work_list(torch.zeros(1, 3, dtype=torch.int32), 1, chunk=chunk)


def test_a_work_list_of_inference_mode_serves(device):
    with torch.inference_mode():
        _, q, k, v, phi = draw([[0, 1, 1, 2]], N=2, device=device)
        phi = phi.clone()
        work = build_work_list(phi, 2, check=False)
        image_causal_attention(q, k, v, phi, work, check=False)


def test_a_compiled_step_shares_a_work_list_and_refuses_another(device):
    _, q, k, v, phi = draw([[0, 1, 1, 2]], N=2, device=device)
    work, other = build_work_list(phi, 2), build_work_list(phi.clone(), 2)
    expected = image_causal_attention(q, k, v, phi)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def inside(q, k, v, phi):
        return image_causal_attention(q, k, v, phi, build_work_list(phi, 2, check=False), False)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def outside(q, k, v, phi, work):
        return image_causal_attention(q, k, v, phi, work, False)

    assert torch.equal(inside(q, k, v, phi), expected)
    assert torch.equal(outside(q, k, v, phi, work), expected)
    with pytest.raises(Exception, match="work must be built from the phi given"):
        outside(q, k, v, phi, other)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_a_transposed_phi_is_read_as_it_is(dtype, device):
    phi = torch.tensor([[0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 1, 1]], dtype=dtype, device=device)
    q, k, v = torch.randn(2, 6, 2, 16), *torch.randn(2, 2, 3, 4, 2, 16)
    q, k, v = (x.to(device) for x in (q, k, v))
    expected = image_causal_attention(q, k, v, phi)
    assert torch.equal(image_causal_attention(q, k, v, phi.T.contiguous().T), expected)
    wide = torch.tensor([[257, 258]], device=device)
    work = build_work_list(wide, 300)
    q, (k, v) = torch.randn(1, 2, 1, 16, device=device), torch.randn(2, 1, 300, 1, 1, 16).to(device)
    with pytest.raises(ValueError, match="work must be built from the phi given"):
        image_causal_attention(q, k, v, wide.to(torch.uint8), work)
