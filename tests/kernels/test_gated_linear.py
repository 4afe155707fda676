"""The gated product and its gate's gradient, against the twin and its promises."""

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

from miniflamingo.kernels import gated_linear
from miniflamingo.kernels.common.runtime import INTERPRET, poisoned, replaced
from miniflamingo.kernels.tools import compare, twins

interpreted = pytest.mark.skipif(not INTERPRET.value, reason="float64 is the interpreter's alone")
COMPARISON = next(c for c in compare.KERNELS if c.name == "gated_linear")
DEVICE = "cpu" if INTERPRET.value else "cuda"
LARGE = twins.gated_case(2, 9, D=70, I=40)  # more than a program's numbers, and no multiple


def draw(dtype=torch.float32, device=DEVICE, case=LARGE):
    """[dout, x, a, alpha, weight]."""
    rng = np.random.default_rng(1)
    args = case(rng)
    dout = rng.normal(size=np.shape(COMPARISON.twin(*args)))
    return [compare.to_torch(x, dtype, device) for x in (dout, *args)]


def both(dout, *args):
    """[out, *gradients] of the kernel, from poisoned buffers."""
    with poisoned():
        return [COMPARISON.kernel(*args), *COMPARISON.kernel_backward(dout, *args)]


def twin(dout, *args):
    """The same from NumPy in float64."""
    dout, *args = map(compare.to_numpy, (dout, *args))
    return [COMPARISON.twin(*args), *COMPARISON.twin_backward(dout, *args)]


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("case", COMPARISON.cases)
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype, device):
    for record in compare.compare(COMPARISON, case, dtype, device):
        assert record.ok, record


@interpreted
@settings(max_examples=8, deadline=None)
@given(*(st.integers(least, 70) for least in (0, 1, 1)))
def test_any_shape(rows, D, I):
    args = draw(torch.float64, case=twins.gated_case(rows, D=D, I=I, alpha=0.3))
    for x, reference in zip(both(*args), twin(*args), strict=True):
        np.testing.assert_allclose(x.numpy(), reference, rtol=1e-8, atol=1e-10)


def test_no_rows(device):
    args = [x[:0] if x.ndim == 3 else x for x in draw(device=device)]
    for result, reference in zip(both(*args), twin(*args), strict=True):
        assert result.shape == reference.shape and (result == 0).all()


def test_no_inputs(device):
    sizes = (3, 5), (3, 5), (3, 0), (1,), (5, 0)  # dout, x, a, alpha, weight
    args = [torch.randn(size, device=device) for size in sizes]
    y, dx, da, dalpha, dweight = both(*args)
    assert torch.equal(y, args[1]) and torch.equal(dx, args[0])
    assert da.shape == (3, 0) and dweight.shape == (5, 0) and dalpha == 0


@pytest.mark.parametrize("dtype", compare.DTYPES.values())
def test_a_shut_gate_returns_x_bit_for_bit(dtype, device):
    _, x, a, alpha, weight = draw(dtype, device)
    y = gated_linear.gated_linear(x, a, torch.zeros_like(alpha), weight)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(bits), x.view(bits))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
def test_a_nan_stays_with_its_row(device):
    args = draw(device=device)
    args[1][1, 3] = float("nan")
    out = both(*args)[0]
    nan = out.isnan().flatten(0, 1).any(1)
    assert nan.tolist() == [i == 9 + 3 for i in range(18)]


# --- layouts, determinism, what is kept ---------------------------------------------------------


def test_strides_change_nothing(device):
    args = draw(device=device)
    expected = both(*args)
    apart = [torch.stack([x, x], dim=x.ndim - 1)[..., 0, :] if x.ndim > 1 else x for x in args]
    columns_first = [x.mT.contiguous().mT if x.ndim > 1 else x for x in args]
    middle_first = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 2 else x
                    for x in args]  # fmt: skip
    for changed in (apart, columns_first, middle_first):
        for x, y in zip(both(*changed), expected):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # BLAS may take another way


def test_two_runs_agree_bit_for_bit(device):
    args = draw(device=device)
    assert all(torch.equal(x, y) for x, y in zip(both(*args), both(*args)))


def test_an_expanded_gradient(device):
    dout, *args = draw(device=device)
    leaves = [x.clone().requires_grad_() for x in args]
    COMPARISON.kernel(*leaves).sum().backward()  # dout has strides of 0
    expected = both(torch.ones_like(dout), *args)[1:]
    for leaf, grad in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, grad)


def test_poison_shows_what_a_kernel_forgets():
    args = draw()
    assert not any(x.isnan().any() for x in both(*args))
    with replaced(launch=lambda *args, **options: None):
        assert any(x.isnan().any() for x in both(*args))


def test_only_what_the_header_names_is_kept(device):
    _, *args = draw(device=device)
    leaves, kept = [x.requires_grad_() for x in args], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        COMPARISON.kernel(*leaves)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in leaves[1:]]


@pytest.mark.parametrize("alpha_dtype", [torch.float32, torch.float64])
def test_a_gate_of_another_dtype_and_shape(alpha_dtype, device):
    dout, x, a, alpha, weight = draw(torch.bfloat16, device)
    alpha = alpha.to(alpha_dtype).reshape(1).requires_grad_()
    y = gated_linear.gated_linear(x, a, alpha, weight)
    y.backward(dout)
    assert y.dtype == torch.bfloat16 and alpha.grad.shape == (1,)
    expected = twins.gated_linear_backward(
        *(compare.to_numpy(t) for t in (dout, x, a, alpha, weight))
    )[2]
    np.testing.assert_allclose(compare.to_numpy(alpha.grad), expected, rtol=1e-4)


# --- torch --------------------------------------------------------------------------------------


@interpreted
def test_gradcheck():
    _, *args = draw(torch.float64)
    leaves = [x.requires_grad_() for x in args]
    assert torch.autograd.gradcheck(COMPARISON.kernel, leaves, fast_mode=True)


def test_opcheck(device):
    ops = torch.ops.miniflamingo
    dout, x, a, alpha, weight = draw(device=device)
    leaves = [t.clone().requires_grad_() for t in (x, a, alpha, weight)]
    torch.library.opcheck(ops.gated_linear.default, tuple(leaves))
    torch.library.opcheck(ops.gated_linear_backward.default, (dout, a, alpha, weight))


def test_torch_compile(device):
    dout, *args = draw(device=device)
    function = lambda *args: 2 * COMPARISON.kernel(*args)  # noqa: E731

    def run(function):
        leaves = [x.clone().requires_grad_() for x in args]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for x, y in zip(run(compiled), run(function)):
        torch.testing.assert_close(x, y)


# --- errors, and mistakes that must be seen -----------------------------------------------------

x, a, w = torch.zeros(2, 3, 8), torch.zeros(2, 3, 6), torch.zeros(8, 6)
alpha = torch.zeros(())
WRONG = {
    "x unlike weight": ((x, a, alpha, w[:5]), r"\[2, 3, 8\] and \[5, 6\]"),
    "weight of three axes": ((x, a, alpha, w[None]), r"\[1, 8, 6\]"),
    "a unlike x": ((x, a[:1], alpha, w), r"\[2, 3, 6\], got \[1, 3, 6\]"),
    "a unlike weight": ((x, a[..., :4], alpha, w), r"\[2, 3, 6\], got \[2, 3, 4\]"),
    "two gates": ((x, a, torch.zeros(2), w), r"one float, got float32 \[2\]"),
    "an integer gate": ((x, a, alpha.int(), w), r"one float, got int32 \[\]"),
    "a gate elsewhere": ((x, a, alpha.to("meta"), w), "on cpu, got meta"),
    "mixed dtypes": ((x, a.half(), alpha, w), "float32, float16, float32"),
    "integers": ((x.int(), a.int(), alpha, w.int()), "got int32, int32, int32"),
    "mixed devices": ((x, a, alpha, w.to("meta")), "got cpu, cpu, meta"),
}


@interpreted
@pytest.mark.parametrize("name", WRONG)
def test_value_errors_quote_expected_and_got(name):
    args, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        gated_linear.gated_linear(*args)
    with pytest.raises(ValueError, match=message):
        gated_linear.gated_linear_backward(x, *args)


@interpreted
def test_gradients_given_must_fit():
    with pytest.raises(ValueError, match=r"float32 \[2, 3, 8\] on cpu, got float16"):
        gated_linear.gated_linear_backward(x.half(), x, a, alpha, w)


# what is replaced, by what, and the directions that must turn red
BREAKAGES = {
    "tan": (".tanh()", ".tan()", {"forward", "backward"}),
    "no residual": ("addmm(packed(_as_rows(x)), ", "addmm(0 * _as_rows(x), ", {"forward"}),
    "no gate": ("_fold(_gate(alpha, x.dtype), weight).mT", "weight.mT", {"forward"}),
    "dweight without the gate": ("cast(gate * dw", "cast(dw", {"backward"}),
    "no 1 - tanh^2": ("(1 - gate.square()) * inner", "inner", {"backward"}),
    "a gate's gradient of one program": ("shares.sum()", "shares[:1].sum()", {"backward"}),
    "da without the gate": (
        "(packed(rows) @ _fold(gate, weight))", "(packed(rows) @ weight)", {"backward"},
    ),
}  # fmt: skip
RED = twins.gated_case(80, D=140, I=24)


def broken(tmp_path, before, after, label):
    """Forward and backward of a changed copy of the kernel's file."""
    source = Path(gated_linear.__file__).read_text("utf-8")
    assert before in source, f"the file no longer contains {before!r}"
    namespace = "broken_" + "".join(filter(str.isalnum, label))
    path = tmp_path / f"{namespace}.py"
    source = source.replace(before, after).replace('@operator("', f'@operator("{namespace}_')
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location(f"miniflamingo.kernels.{namespace}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gated_linear, module.gated_linear_backward


@pytest.mark.parametrize("label", BREAKAGES)
def test_a_broken_kernel_turns_the_table_red(label, tmp_path):
    before, after, red = BREAKAGES[label]
    kernel, backward = broken(tmp_path, before, after, label)
    comparison = dataclasses.replace(
        COMPARISON, kernel=kernel, kernel_backward=backward, cases={"": RED}
    )
    records = compare.compare(comparison, "", "bf16", DEVICE)
    assert {r.direction for r in records if not r.ok} >= red


def test_what_a_broken_kernel_is_held_against_is_green():
    brief = dataclasses.replace(COMPARISON, cases={"": RED})
    assert all(r.ok for r in compare.compare(brief, "", "bf16", DEVICE))
