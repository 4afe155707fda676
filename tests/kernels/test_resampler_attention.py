"""The resampler's fused attention against its NumPy twin, plain torch, and its own promises."""

import dataclasses
import importlib.util
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniflamingo.kernels import resampler_attention
from miniflamingo.kernels.common import feature_list
from miniflamingo.kernels.common.feature_list import (
    build_feature_list,
    build_padded_list,
    choose_chunk,
)
from miniflamingo.kernels.common.runtime import INTERPRET, poisoned, replaced
from miniflamingo.kernels.resampler_attention import padded_resampler_attention
from miniflamingo.kernels.tools import compare, twins

interpreted = pytest.mark.skipif(not INTERPRET.value, reason="float64 is the interpreter's alone")
ATTENTION = next(k for k in compare.KERNELS if k.name == "resampler_attention")
DEVICE = "cpu" if INTERPRET.value else "cuda"


def draw(counts, R=5, H=2, K=16, dtype=torch.float32, device=DEVICE, seed=0):
    """dout, q, k_x, v_x, k_l, v_l, offsets as tensors, for images with these many features."""
    offsets = torch.tensor([0, *np.cumsum(counts, dtype=int)], dtype=torch.int32)
    g = torch.Generator().manual_seed(seed)
    latents, features = (len(counts), R, H, K), (int(offsets[-1]), H, K)
    shapes = latents, latents, features, features, latents, latents
    floats = (torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes)
    return *floats, offsets.to(device)


def both(dout, *args, **options):
    """out, dq, dk_x, dv_x, dk_l, dv_l of the kernels, from poisoned buffers."""
    with poisoned():
        out = resampler_attention.resampler_attention(*args, **options)
        return out, *resampler_attention.resampler_attention_backward(dout, *args, **options)


def padded(dout, *args, **options):
    """The same through the padded wrapper and autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in args[:5]]
    with poisoned():
        out = padded_resampler_attention(*leaves, *args[5:], **options)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


def twin(dout, *args):
    """The same from NumPy in float64."""
    dout, *args = map(compare.to_numpy, (dout, *args))
    return twins.resampler_attention(*args), *twins.resampler_attention_backward(dout, *args)


def listed(args, **options):
    """The list of features for the arguments that `draw` returned."""
    return build_feature_list(args[-1], len(args[2]), **options)


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("case", ATTENTION.cases)
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype, device):
    records = list(compare.compare(ATTENTION, case, dtype, device))
    assert [r.direction for r in records] == ["forward", "backward"]
    for record in records:
        assert record.ok, record


@interpreted
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape_and_any_number_of_features(data):
    size = lambda most, least=1: data.draw(st.integers(least, most))  # noqa: E731
    counts = data.draw(st.lists(st.integers(0, 20), max_size=4))
    args = draw(counts, size(40), size(2), size(33), torch.float64)
    work = listed(args, chunk=size(25))
    for x, reference in zip(both(*args, work=work), twin(*args), strict=True):
        np.testing.assert_allclose(x.numpy(), reference, rtol=1e-10, atol=1e-12)


@interpreted
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_padded_equals_packed(data):
    M = data.draw(st.integers(0, 12))
    counts = data.draw(st.lists(st.integers(0, M), min_size=1, max_size=4))
    args = draw(counts, dtype=torch.float64)
    lengths = torch.tensor(counts)
    real = torch.arange(M) < lengths[:, None]  # [B, M]
    pad = lambda x: torch.full((len(counts), M, *x.shape[1:]), torch.nan, dtype=x.dtype)  # noqa: E731
    features = [pad(x).masked_scatter(real[:, :, None, None], x) for x in args[2:4]]
    work = build_padded_list(lengths, M, chunk=data.draw(st.integers(1, 15)))
    out, dq, dk_x, dv_x, dk_l, dv_l = padded(*args[:2], *features, *args[4:6], lengths, work)
    assert (dk_x[~real] == 0).all() and (dv_x[~real] == 0).all()
    for x, y in zip((out, dq, dk_x[real], dv_x[real], dk_l, dv_l), twin(*args)):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_all_rows_count_unless_lengths_say_otherwise(device):
    args = draw([4, 4], device=device)
    features = [x.unflatten(0, (2, 4)) for x in args[2:4]]
    out, *grads = padded(*args[:2], *features, *args[4:6])
    expected = both(*args)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(x.reshape(y.shape), y) for x, y in zip(grads, expected[1:]))


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0], [7, 0], [0, 7]])
def test_images_without_features_attend_to_their_latents(counts, device):
    args = draw(counts, device=device)
    for x, reference in zip(both(*args), twin(*args)):
        assert x.shape == reference.shape
        np.testing.assert_allclose(compare.to_numpy(x), reference, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("chunk", [3, 100])
def test_a_nan_in_an_image_stays_there(chunk, device):
    args = draw([4, 5, 4], device=device)
    args[2][4:9], args[3][4:9] = float("nan"), float("nan")
    out, dq, dk_x, dv_x, dk_l, dv_l = both(*args, work=listed(args, chunk=chunk))
    for x in (out, dq, dk_l, dv_l):
        assert x.isnan().flatten(1).any(1).tolist() == [False, True, False]
    for x in (dk_x, dv_x):
        assert x.isnan().flatten(1).any(1).tolist() == [False] * 4 + [True] * 5 + [False] * 4


# --- layouts, determinism, the list of features -------------------------------------------------


@pytest.mark.parametrize("chunk", [8, 100])
def test_strides_change_nothing(chunk, device):
    args = draw([11, 0, 20], device=device)
    work = listed(args, chunk=chunk)
    expected = both(*args, work=work)
    *floats, offsets = args
    layouts = {
        "rows apart": lambda x: torch.stack([x, x], dim=-2)[..., 0, :],
        "heads first": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
        "columns first": lambda x: x.mT.contiguous().mT,
    }
    for layout in layouts.values():
        apart = [layout(x) for x in floats]
        assert not apart[0].is_contiguous()
        for x, y in zip(both(*apart, offsets, work=work), expected):
            assert torch.equal(x, y)


def test_an_expanded_gradient(device):
    _, *args = draw([3, 9], device=device)
    args[0].requires_grad_()
    resampler_attention.resampler_attention(*args).sum().backward()  # dout has strides of 0
    q = args[0].detach()
    grads = resampler_attention.resampler_attention_backward(torch.ones_like(q), q, *args[1:])
    assert torch.equal(args[0].grad, grads[0])


@pytest.mark.parametrize("chunk", [16, 200])
def test_two_runs_agree_bit_for_bit(chunk, device):
    args = draw([90, 1, 40], R=20, device=device)
    first, second = (both(*args, work=listed(args, chunk=chunk)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_list_holds_every_row_once(data):
    M, chunk = (data.draw(st.integers(least, 9)) for least in (0, 1))
    counts = data.draw(st.lists(st.integers(0, M), max_size=4))
    offsets = torch.tensor([0, *np.cumsum(counts, dtype=int)])
    starts, empty = torch.arange(len(counts)) * M, feature_list._empty_lists
    filled = lambda *args: tuple(x.fill_(-7) for x in empty(*args))  # noqa: E731
    with patch.object(feature_list, "_empty_lists", filled):
        packed = build_feature_list(offsets, int(offsets[-1]), chunk=chunk)
        apart = build_padded_list(torch.tensor(counts, dtype=torch.int32), M, chunk=chunk)
    check_list(packed, offsets[:-1], offsets[:-1] + torch.tensor(counts, dtype=int), offsets[-1])
    check_list(apart, starts, starts + torch.tensor(counts, dtype=int), len(counts) * M)


def check_list(features, starts, ends, total):
    rows, latents, slots = torch.zeros(int(total), dtype=int), [], []
    for image, begin, end, stop, slot, takes_latents in features.items.tolist():
        assert begin <= end <= stop <= begin + features.chunk
        rows[begin:stop] += 1
        if image < 0:
            assert begin == end and slot < 0 and not takes_latents
        else:
            assert begin >= starts[image] and (end == min(stop, ends[image]) or begin == end)
            assert takes_latents == (begin == starts[image]) or begin == end
            latents += [image] * takes_latents
            slots += [slot] * (slot >= 0)
    assert (rows == 1).all() and sorted(latents) == list(range(len(starts)))
    assert len(set(slots)) == len(slots) and all(s < features.num_slots for s in slots)
    sums = [s for _, first, n in features.splits.tolist() for s in range(first, first + n)]
    assert sorted(sums) == sorted(slots)


def test_layers_share_a_list(device):
    args = draw([8, 3], device=device)
    work = listed(args, heads=2)
    assert all(torch.equal(x, y) for x, y in zip(both(*args, work=work), both(*args)))


def test_features_are_split_only_where_programs_are_few():
    assert [choose_chunk(B, 800 * B, 16) for B in (1, 4, 8, 16, 64)] == [
        128, 128, 256, 12_800, 51_200,
    ]  # fmt: skip
    assert choose_chunk(64, 0, 16) == 1
    assert choose_chunk(1, 100_000, 16) == 1024


def test_unchecked_offsets_are_clamped_into_order_and_range(device):
    *args, _ = draw([4, 0, 5], device=device)
    wrong = torch.tensor([-3, 4, 2, 99], device=device)
    right = torch.tensor([0, 4, 4, 9], device=device)
    assert all(
        torch.equal(x, y) for x, y in zip(both(*args, wrong, check=False), both(*args, right))
    )


def test_unchecked_rows_of_no_image_get_zeros(device):
    *args, _ = draw([4, 5], device=device)
    args = args[0][:1], args[1][:1], *args[2:4], args[4][:1], args[5][:1]
    _, _, dk_x, dv_x, *_ = both(*args, torch.tensor([2, 9], device=device), check=False)
    for grad in (dk_x, dv_x):
        assert (grad[:2] == 0).all() and (grad[2:] != 0).all()


def test_poison_shows_what_a_kernel_forgets():
    args = draw([3, 40])
    work = listed(args, chunk=16)
    with replaced(launch=lambda *args, **options: None):
        assert all(x.isnan().all() for x in both(*args, work=work))
    assert not any(x.isnan().any() for x in both(*args, work=work))


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_the_host_never_waits(device):
    args = draw([300, 20], device=device)
    both(*args)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(*args, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- broken kernels -----------------------------------------------------------------------------

BRIEF = {
    "unequal": twins.resampler_case(7, 0, 40, R=5, K=16),
    "split": twins.resampler_case(300, R=40, K=16),
}
# name -> what is replaced in the kernels' source, by what, and the directions that must turn red
BREAKAGES = {
    "nothing": ("", "", set()),
    "the latents left out": ("latents * R, m, total, out", "0, m, total, out", {"forward"}),
    "the latents in every part": (
        "_, slot, latents = load_features(items_ptr, item)",
        "_, slot, latents = load_features(items_ptr, item)\n    latents = 1",
        {"forward", "backward"},
    ),
    "no scale": ("(SCALE * LOG2E)", "LOG2E", {"forward", "backward"}),
    "keys past the end": (
        'tl.where((n < end)[None, :], scores, float("-inf"))', "scores", {"forward", "backward"},
    ),
    "the first block only": ("m, total, out = attend(", "_, _, _ = attend(", {"forward"}),
    "partial results not merged": (
        "    if slots:\n", "    if False:\n", {"forward", "backward"},
    ),
    "parts weighted alike": ("weight = tl.exp2(m - new_m), tl.exp2(m_i - new_m)",
                             "weight = tl.exp2(m - m), tl.exp2(m_i - m_i)", {"forward"}),
    "statistics not merged": (
        "        tl.store(statistics_ptr + row * 2 + 1, inverse, r < R)\n\n\n# --- backward",
        "\n\n# --- backward", {"backward"},
    ),
    "delta from a part": ("        if latents:  #", "        if slot < 0:  #", {"backward"}),
    "partial dq not added": (
        "    sum_partials([dq_part], grads[:1], features.splits)\n", "", {"backward"},
    ),
    "delta forgotten": (" - delta[:, None])", ")", {"backward"}),
    "delta forgotten in dk": (" - delta[None, :])", ")", {"backward"}),
    "dk not scaled": ("dk * SCALE", "dk", {"backward"}),
    "the last queries only": ("dv += dot", "dv = dot", {"backward"}),
    "dk_l, dv_l swapped": (
        "dkl_ptr + row * K, dvl_ptr + row * K", "dvl_ptr + row * K, dkl_ptr + row * K",
        {"backward"},
    ),
}  # fmt: skip


def broken(tmp_path, name):
    """The comparison of a copy of the kernels' file, changed as BREAKAGES says."""
    before, after, _ = BREAKAGES[name]
    source = Path(resampler_attention.__file__).read_text("utf-8")
    assert before in source, f"the kernel no longer contains {before!r}"
    source = source.replace(before, after) if before else source
    namespace = "broken_resampler_" + "".join(filter(str.isalnum, name))
    path = tmp_path / f"{namespace}.py"
    path.write_text(source.replace('@operator("', f'@operator("{namespace}_'), "utf-8")
    spec = importlib.util.spec_from_file_location(f"miniflamingo.kernels.{namespace}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dataclasses.replace(
        ATTENTION,
        kernel=module.resampler_attention,
        kernel_backward=module.resampler_attention_backward,
        cases=BRIEF,
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the broken ones overflow
@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_kernel_turns_the_table_red(name, tmp_path):
    comparison, red = broken(tmp_path, name), set()
    for case in BRIEF:
        for record in compare.compare(comparison, case, "fp32", DEVICE):
            red |= set() if record.ok else {record.direction}
    assert red == BREAKAGES[name][2] if name == "nothing" else red >= BREAKAGES[name][2]


# --- torch --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("chunk", [4, 64])
def test_gradcheck(chunk):
    _, *args, offsets = draw([3, 0, 9], R=3, H=1, K=4, dtype=torch.float64)
    work = build_feature_list(offsets, 12, chunk=chunk)
    leaves = [x.requires_grad_() for x in args]
    attend = lambda *xs: resampler_attention.resampler_attention(*xs, offsets, work)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_opcheck(device):
    dout, *args, offsets = draw([2, 6], device=device)
    work = build_feature_list(offsets, 8, chunk=4)
    lists, ops = (work.items, work.splits, work.chunk), torch.ops.miniflamingo
    leaves = [x.clone().requires_grad_() for x in args]
    torch.library.opcheck(ops.resampler_attention.default, (*leaves, *lists))
    backward, found = ops.resampler_attention_backward, ops.resampler_attention(*args, *lists)
    torch.library.opcheck(backward.default, (dout, *args, *found, *lists))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, device):
    dout, *args, offsets = draw([2, 6], device=device)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in args]
        out = function(*leaves, offsets)
        return out, *torch.autograd.grad(out, leaves, dout)

    def doubled(*args):
        return 2 * resampler_attention.resampler_attention(*args, check=False)

    torch.compiler.reset()
    compiled = torch.compile(doubled, backend=backend, fullgraph=True)
    for x, y in zip(run(compiled), run(doubled)):
        torch.testing.assert_close(x, y)


# --- errors -------------------------------------------------------------------------------------

latents, features = torch.zeros(2, 5, 2, 16), torch.zeros(7, 2, 16)
ARGUMENTS = dict(q=latents, k_x=features, v_x=features, k_l=latents, v_l=latents)
OFFSETS = torch.tensor([0, 3, 7])


def like(x, **change):
    """All arguments with other sizes: R, H or K."""
    R, H, K = (change.get(n, s) for n, s in zip("RHK", (5, 2, 16)))
    return {n: torch.zeros(7, H, K) if n[-1] == "x" else torch.zeros(2, R, H, K) for n in x}


WRONG = {
    "q without H": (dict(q=latents[:, :, 0]), r"\[B, R, H, K\].*got \[2, 5, 16\], \[2, 5, 2, 16\]"),
    "other latents": (dict(v_l=latents[:, :4]), r"\[B, R, H, K\].*and \[2, 4, 2, 16\]"),
    "other heads": (dict(k_x=features[:, :1]), r"\(2, 16\), got \[7, 1, 16\] and \[7, 2, 16\]"),
    "v_x unlike k_x": (dict(v_x=features[:6]), r"got \[7, 2, 16\] and \[6, 2, 16\]"),
    "padded": (dict(k_x=features[None]), r"\[total, H, K\].*got \[1, 7, 2, 16\]"),
    "K = 129": (like(ARGUMENTS, K=129), "K must be 1 to 128, got 129"),
    "R = 257": (like(ARGUMENTS, R=257), "R must be 1 to 256, got 257"),
    "R = 0": (like(ARGUMENTS, R=0), "R must be 1 to 256, got 0"),
    "mixed dtypes": (dict(v_x=features.half()), "q, k_x, v_x, k_l, v_l must have one.*float16"),
    "integers": ({n: x.int() for n, x in ARGUMENTS.items()}, "float32.*got int32, int32"),
    "mixed devices": (dict(k_l=latents.to("meta")), "one device.*got cpu, cpu, cpu, meta, cpu"),
    "too few offsets": (dict(offsets=OFFSETS[:2]), r"\[B \+ 1\] = \[3\] on cpu, got int64 \[2\]"),
    "float offsets": (dict(offsets=OFFSETS.float()), r"offsets must be int.*got float32 \[3\]"),
    "offsets elsewhere": (dict(offsets=OFFSETS.to("meta")), r"on cpu, got int64 \[3\] on meta"),
    "offsets that fall": (dict(offsets=torch.tensor([0, 8, 7])), r"from 0 to 7.*got \[0, 8, 7\]"),
    "offsets too short": (dict(offsets=torch.tensor([0, 3, 6])), r"from 0 to 7.*got \[0, 3, 6\]"),
    "offsets from 1": (dict(offsets=torch.tensor([1, 3, 7])), r"from 0 to 7.*got \[1, 3, 7\]"),
    "a list for others": (
        dict(work=build_feature_list(torch.tensor([0, 7]), 7)), r"\(2, 7\) on cpu, got \(1, 7\)",
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", WRONG)
def test_value_errors_quote_expected_and_got(name):
    change, message = WRONG[name]
    args = ARGUMENTS | dict(offsets=OFFSETS) | change
    with pytest.raises(ValueError, match=message):
        resampler_attention.resampler_attention(**args)
    with pytest.raises(ValueError, match=message):
        resampler_attention.resampler_attention_backward(latents, **args)


@interpreted
def test_dout_must_be_like_q():
    with pytest.raises(ValueError, match=r"float32 \[2, 5, 2, 16\] on cpu, got float16"):
        resampler_attention.resampler_attention_backward(
            latents.half(), **ARGUMENTS, offsets=OFFSETS
        )


pairs = torch.zeros(2, 4, 2, 16)
WRONG_PADDED = {
    "packed": (dict(k_x=features), r"\[B, M, H, K\] with B = 2, got \[7, 2, 16\]"),
    "other B": (dict(k_x=pairs[:1], v_x=pairs[:1]), r"B = 2, got \[1, 4, 2, 16\]"),
    "v_x unlike k_x": (dict(v_x=pairs[:, :3]), r"got \[2, 4, 2, 16\] and \[2, 3, 2, 16\]"),
    "too few lengths": (dict(lengths=torch.tensor([1])), r"lengths.*\[2\] on cpu, got int64 \[1\]"),
    "float lengths": (dict(lengths=torch.zeros(2)), r"must be int \[B\], got float32 \[2\]"),
    "too long": (dict(lengths=torch.tensor([1, 5])), r"in 0\.\.4 \(M = 4 features\), got 1\.\.5"),
    "negative": (dict(lengths=torch.tensor([-1, 4])), r"in 0\.\.4.*got -1\.\.4"),
    "other widths": (dict(q=latents[..., :8]), r"\[B, R, H, K\], all three, got \[2, 5, 2, 8\]"),
    "a list for others": (
        dict(work=build_padded_list(torch.tensor([2, 3]), 3)), r"\(2, 8\) on cpu, got \(2, 6\)",
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", WRONG_PADDED)
def test_value_errors_of_the_padded_function(name):
    change, message = WRONG_PADDED[name]
    with pytest.raises(ValueError, match=message):
        padded_resampler_attention(**(ARGUMENTS | dict(k_x=pairs, v_x=pairs) | change))


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_cpu_tensors_are_refused_on_a_gpu_machine(device):
    with pytest.raises(ValueError, match="one device, cuda, got cpu"):
        resampler_attention.resampler_attention(**ARGUMENTS, offsets=OFFSETS)


# --- masked means unseen, and a list of features is for one batch ---------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk", [None, 2])
def test_padding_reaches_nothing(bad, chunk, device):
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, n, 2, 16, generator=g).to(device) for n in (3, 3, 5, 5, 3, 3)]
    lengths = torch.tensor([4, 0], device=device)
    work = build_padded_list(lengths, 5, chunk=chunk)
    expected = padded(*drawn, lengths=lengths, work=work)
    behind = torch.arange(5, device=device) >= lengths[:, None]
    drawn[2][behind], drawn[3][behind] = bad, bad
    results = padded(*drawn, lengths=lengths, work=work)
    assert all(torch.equal(x, y) for x, y in zip(results, expected))
    assert not results[2][behind].any() and not results[3][behind].any()


@interpreted
@pytest.mark.parametrize("check", [True, False])
def test_a_list_of_another_batch_is_refused(check):
    work = build_feature_list(torch.tensor([0, 4, 7]), 7)
    with pytest.raises(ValueError, match="work must be built from the offsets given"):
        resampler_attention.resampler_attention(
            **ARGUMENTS, offsets=OFFSETS, work=work, check=check
        )
    own = build_feature_list(OFFSETS, 7)
    for offsets in (OFFSETS, OFFSETS.clone(), OFFSETS.int()):
        resampler_attention.resampler_attention(**ARGUMENTS, offsets=offsets, work=own)


@interpreted
def test_a_padded_list_of_other_lengths_is_refused():
    arguments, lengths = ARGUMENTS | dict(k_x=pairs, v_x=pairs), torch.tensor([2, 3])
    work = build_padded_list(lengths, 4)
    for same in (None, lengths, lengths.clone()):
        padded_resampler_attention(**arguments, lengths=same, work=work)
    with pytest.raises(ValueError, match="work must be built from the lengths given"):
        padded_resampler_attention(**arguments, lengths=torch.tensor([3, 3]), work=work)
    lengths[0] = 1
    with pytest.raises(ValueError, match="built again: its lengths was written to since"):
        padded_resampler_attention(**arguments, work=work)
    packed = build_feature_list(torch.tensor([0, 2, 8]), 8)
    with pytest.raises(ValueError, match=r"work must be built from lengths, got .* from offsets"):
        padded_resampler_attention(**arguments, work=packed)
    with pytest.raises(ValueError, match="as build_feature_list returns it"):
        padded_resampler_attention(**arguments, work=work._replace(chunk=1))
    with pytest.raises(ValueError, match="chunk must be an integer above 0, got 0"):
        build_padded_list(torch.tensor([2, 3]), 4, chunk=0)
