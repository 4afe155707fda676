"""The gated product, the squared ReLU of a product and layer norm, against twins and promises."""

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

from miniflamingo.kernels import gated_linear, layer_norm, squared_relu_linear
from miniflamingo.kernels.common.runtime import INTERPRET, poisoned, replaced
from miniflamingo.kernels.tools import block_twins, compare

interpreted = pytest.mark.skipif(not INTERPRET.value, reason="float64 is the interpreter's alone")
COMPARISONS = {c.name: c for c in compare.KERNELS if not c.name.endswith("attention")}
DEVICE = "cpu" if INTERPRET.value else "cuda"
CASES = [(name, case) for name, c in COMPARISONS.items() for case in c.cases]
# of each function, one case that is larger than a tile and fits none
BRIEF = {
    "gated_linear": block_twins.gated_case(2, 9, D=70, I=40),
    "squared_relu_linear": block_twins.squared_case(2, 9, D=40, F=70),
    "layer_norm": block_twins.norm_case(2, 9, D=24),
}


def draw(name, dtype=torch.float32, device=DEVICE, case=None):
    """[dout, *arguments] of a comparison."""
    rng, comparison = np.random.default_rng(1), COMPARISONS[name]
    args = (case or BRIEF[name.split(",")[0]])(rng)
    dout = rng.normal(size=np.shape(comparison.twin(*args)))
    return [compare.to_torch(x, dtype, device) for x in (dout, *args)]


def both(name, dout, *args):
    """[out, *gradients] of the kernel, from poisoned buffers."""
    comparison = COMPARISONS[name]
    with poisoned():
        return [comparison.kernel(*args), *comparison.kernel_backward(dout, *args)]


def twin(name, dout, *args):
    """The same from NumPy in float64."""
    dout, *args = map(compare.to_numpy, (dout, *args))
    comparison = COMPARISONS[name]
    return [comparison.twin(*args), *comparison.twin_backward(dout, *args)]


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", compare.DTYPES)
@pytest.mark.parametrize("name,case", CASES)
def test_error_is_at_most_twice_that_of_plain_torch(name, case, dtype, device):
    for record in compare.compare(COMPARISONS[name], case, dtype, device):
        assert record.ok, record


@interpreted
@pytest.mark.parametrize("name", COMPARISONS)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_shape(name, data):
    size = lambda most, least=1: data.draw(st.integers(least, most))  # noqa: E731
    rows, wide, other = size(70, 0), size(70), size(70)
    case = {
        "gated_linear": block_twins.gated_case(rows, D=wide, I=other, alpha=0.3),
        "squared_relu_linear": block_twins.squared_case(rows, D=other, F=wide),
        "layer_norm": block_twins.norm_case(rows, D=wide),
    }[name.split(",")[0]]
    args = draw(name, torch.float64, case=case)
    for x, reference in zip(both(name, *args), twin(name, *args), strict=True):
        np.testing.assert_allclose(x.numpy(), reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", COMPARISONS)
def test_no_rows(name, device):
    args = [x[:0] if x.ndim == 3 else x for x in draw(name, device=device)]
    for result, reference in zip(both(name, *args), twin(name, *args), strict=True):
        assert result.shape == reference.shape and (result == 0).all()


@pytest.mark.parametrize("fused", [True, False])
def test_no_inputs(fused, device):
    sizes = (3, 5), (3, 5), (3, 0), (1,), (5, 0)  # dout, x, a, alpha, weight
    args = [torch.randn(size, device=device) for size in sizes]
    y, dx, da, dalpha, dweight = both("gated_linear, " + ("fused" if fused else "addmm"), *args)
    assert torch.equal(y, args[1]) and torch.equal(dx, args[0])
    assert da.shape == (3, 0) and dweight.shape == (5, 0) and dalpha == 0


@pytest.mark.parametrize("dtype", compare.DTYPES.values())
@pytest.mark.parametrize("fused", [True, False])
def test_a_shut_gate_returns_x_bit_for_bit(fused, dtype, device):
    _, x, a, alpha, weight = draw("gated_linear, fused", dtype, device)
    y = gated_linear.gated_linear(x, a, torch.zeros_like(alpha), weight, fused)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(bits), x.view(bits))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("name", COMPARISONS)
def test_a_nan_stays_with_its_row(name, device):
    args = draw(name, device=device)
    args[1][1, 3] = float("nan")
    out = both(name, *args)[0]
    nan = out.isnan().flatten(0, 1).any(1)
    assert nan.tolist() == [i == 9 + 3 for i in range(18)]


def test_the_root_of_h_is_exact_where_r_is_a_power_of_two(device):
    x = torch.tensor([[2.0**-60], [0.25], [-4.0], [2.0**40]], device=device)
    one = torch.ones(1, 1, device=device)
    for fused in (True, False):
        dx, _ = squared_relu_linear.squared_relu_linear_backward(
            torch.ones_like(x), x, one, fused=fused
        )
        assert torch.equal(dx, 2 * x.clamp(min=0))


# --- layouts, determinism, what is kept ---------------------------------------------------------


@pytest.mark.parametrize("name", COMPARISONS)
def test_strides_change_nothing(name, device):
    args = draw(name, device=device)
    expected = both(name, *args)
    apart = [torch.stack([x, x], dim=x.ndim - 1)[..., 0, :] if x.ndim > 1 else x for x in args]
    columns_first = [x.mT.contiguous().mT if x.ndim > 1 else x for x in args]
    middle_first = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 2 else x
                    for x in args]  # fmt: skip
    for changed in (apart, columns_first, middle_first):
        for x, y in zip(both(name, *changed), expected):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
            assert torch.equal(x, y) or "fused" not in name  # BLAS may take another way


@pytest.mark.parametrize("name", COMPARISONS)
def test_two_runs_agree_bit_for_bit(name, device):
    args = draw(name, device=device)
    assert all(torch.equal(x, y) for x, y in zip(both(name, *args), both(name, *args)))


@pytest.mark.parametrize("name", COMPARISONS)
def test_an_expanded_gradient(name, device):
    dout, *args = draw(name, device=device)
    leaves = [x.clone().requires_grad_() for x in args]
    COMPARISONS[name].kernel(*leaves).sum().backward()  # dout has strides of 0
    expected = both(name, torch.ones_like(dout), *args)[1:]
    for leaf, grad in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("name", COMPARISONS)
def test_poison_shows_what_a_kernel_forgets(name):
    args = draw(name)
    assert not any(x.isnan().any() for x in both(name, *args))
    with replaced(launch=lambda *args, **options: None):
        assert any(x.isnan().any() for x in both(name, *args))


KEPT = {  # the arguments, and whether the output is kept too
    "gated_linear": ((1, 2, 3), False),
    "squared_relu_linear": ((0, 1), True),
    "layer_norm": ((0, 1), False),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_only_what_the_header_names_is_kept(name, device):
    _, *args = draw(name, device=device)
    leaves, kept = [x.requires_grad_() for x in args], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = COMPARISONS[name].kernel(*leaves)
    arguments, with_output = KEPT[name.split(",")[0]]
    expected = [leaves[i].data_ptr() for i in arguments] + [out.data_ptr()] * with_output
    assert [x.data_ptr() for x in kept] == expected


@pytest.mark.parametrize("alpha_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gate_of_another_dtype_and_shape(fused, alpha_dtype, device):
    dout, x, a, alpha, weight = draw("gated_linear, fused", torch.bfloat16, device)
    alpha = alpha.to(alpha_dtype).reshape(1).requires_grad_()
    y = gated_linear.gated_linear(x, a, alpha, weight, fused)
    y.backward(dout)
    assert y.dtype == torch.bfloat16 and alpha.grad.shape == (1,)
    expected = block_twins.gated_linear_backward(
        *(compare.to_numpy(t) for t in (dout, x, a, alpha, weight))
    )[2]
    np.testing.assert_allclose(compare.to_numpy(alpha.grad), expected, rtol=1e-4)


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module,kernel",
    [(gated_linear, "_gated_linear"), (squared_relu_linear, "_squared_relu_linear")],
)
def test_one_line_chooses_the_product(module, kernel, monkeypatch):
    name = module.__name__.removeprefix("miniflamingo.kernels.")
    _, *args = draw(f"{name}, fused")
    launched = []

    def call():
        launched.clear()
        with replaced(launch=lambda k, *rest, **options: launched.append(k.__name__)):
            getattr(module, name)(*args)
        return f"_{name}" in launched

    assert not call()  # nothing is measured yet
    monkeypatch.setattr(module, "FUSED_UP_TO", 40)
    assert call()
    monkeypatch.setattr(module, "FUSED_UP_TO", 39)
    assert not call()


# --- torch --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("name", COMPARISONS)
def test_gradcheck(name):
    _, *args = draw(name, torch.float64, case=BRIEF[name.split(",")[0]])
    leaves = [x.requires_grad_() for x in args]
    assert torch.autograd.gradcheck(COMPARISONS[name].kernel, leaves, fast_mode=True)


@pytest.mark.parametrize("fused", [True, False])
def test_opcheck(fused, device):
    ops = torch.ops.miniflamingo
    dout, x, a, alpha, weight = draw("gated_linear, fused", device=device)
    leaves = [t.clone().requires_grad_() for t in (x, a, alpha, weight)]
    torch.library.opcheck(ops.gated_linear.default, (*leaves, fused))
    torch.library.opcheck(ops.gated_linear_backward.default, (dout, a, alpha, weight, fused))
    dout, x, weight = draw("squared_relu_linear, fused", device=device)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    torch.library.opcheck(ops.squared_relu_linear.default, (*leaves, fused))
    if fused:
        h = squared_relu_linear.squared_relu_linear(x, weight)
        torch.library.opcheck(ops.squared_relu_linear_backward.default, (dout, x, weight, h))
        dout, x, weight, bias = draw("layer_norm", device=device)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(ops.layer_norm.default, (*leaves, 1e-5))
        torch.library.opcheck(ops.layer_norm_backward.default, (dout, x, weight, 1e-5))


@pytest.mark.parametrize("name", COMPARISONS)
def test_torch_compile(name, device):
    dout, *args = draw(name, device=device)
    function = lambda *args: 2 * COMPARISONS[name].kernel(*args)  # noqa: E731

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
alpha, bias = torch.zeros(()), torch.zeros(8)
WRONG = {
    "x unlike weight": ("gated_linear", (x, a, alpha, w[:5]), r"\[2, 3, 8\] and \[5, 6\]"),
    "weight of three axes": ("gated_linear", (x, a, alpha, w[None]), r"\[1, 8, 6\]"),
    "a unlike x": ("gated_linear", (x, a[:1], alpha, w), r"\[2, 3, 6\], got \[1, 3, 6\]"),
    "a unlike weight": ("gated_linear", (x, a[..., :4], alpha, w), r"\[2, 3, 6\], got \[2, 3, 4\]"),
    "two gates": ("gated_linear", (x, a, torch.zeros(2), w), r"one float, got float32 \[2\]"),
    "an integer gate": ("gated_linear", (x, a, alpha.int(), w), r"one float, got int32 \[\]"),
    "a gate elsewhere": ("gated_linear", (x, a, alpha.to("meta"), w), "on cpu, got meta"),
    "mixed dtypes": ("gated_linear", (x, a.half(), alpha, w), "float32, float16, float32"),
    "integers": ("gated_linear", (x.int(), a.int(), alpha, w.int()), "got int32, int32, int32"),
    "mixed devices": ("gated_linear", (x, a, alpha, w.to("meta")), "got cpu, cpu, meta"),
    "other inputs": ("squared_relu_linear", (x, w), r"\[2, 3, 8\] and \[8, 6\]"),
    "a vector": ("squared_relu_linear", (a, w[0]), r"\[2, 3, 6\] and \[6\]"),
    "half a weight": ("squared_relu_linear", (a, w.half()), "float32, float16"),
    "other width": ("layer_norm", (a, bias, bias), r"\[2, 3, 6\], \[8\] and \[8\]"),
    "no width": ("layer_norm", (alpha, bias, bias), r"got \[\]"),
    "half a bias": ("layer_norm", (x, bias, bias.half()), "float32, float32, float16"),
}


@interpreted
@pytest.mark.parametrize("name", WRONG)
def test_value_errors_quote_expected_and_got(name):
    function, args, message = WRONG[name]
    module = getattr(kernels, function)
    with pytest.raises(ValueError, match=message):
        getattr(module, function)(*args)
    with pytest.raises(ValueError, match=message):
        getattr(module, function + "_backward")(x, *args)


@interpreted
def test_gradients_given_must_fit():
    with pytest.raises(ValueError, match=r"float32 \[2, 3, 8\] on cpu, got float16"):
        gated_linear.gated_linear_backward(x.half(), x, a, alpha, w)
    with pytest.raises(ValueError, match=r"float32 \[2, 3, 8\] on cpu, got float32 \[2, 3, 6\]"):
        layer_norm.layer_norm_backward(a, x, bias, bias)
    with pytest.raises(ValueError, match=r"dout must be .*\[2, 3, 8\] on cpu, got .*\[2, 3, 6"):
        squared_relu_linear.squared_relu_linear_backward(a, a, w)
    with pytest.raises(ValueError, match=r"h must be float32 \[2, 3, 8\] on cpu, got float16"):
        squared_relu_linear.squared_relu_linear_backward(x, a, w, x.half())


def test_a_row_too_wide_goes_to_torch(device):
    wide = torch.randn(2, layer_norm.MAX_D + 1, device=device).requires_grad_()
    weight = torch.ones(wide.shape[1], device=device)
    out = layer_norm.layer_norm(wide, weight, weight)
    assert torch.equal(out, torch.nn.functional.layer_norm(wide, weight.shape, weight, weight))
    with pytest.raises(ValueError, match="1 to 8192, got 8193"):
        layer_norm.layer_norm_backward(out, wide, weight, weight)


# name of the comparison, what is replaced, by what, and the directions that must turn red
BREAKAGES = {
    "tan": ("gated_linear, fused", ".tanh()", ".tan()", {"forward", "backward"}),
    "no residual": ("gated_linear, fused", "x + gate * branch", "gate * branch", {"forward"}),
    "no gate": ("gated_linear, fused", "x + gate * branch", "x + branch", {"forward"}),
    "dweight without the gate": ("gated_linear, fused", "cast(gate * dw", "cast(dw", {"backward"}),
    "the pass without the gate": (
        "gated_linear, addmm", "ptr + i, cast(gate * dw", "ptr + i, cast(dw", {"backward"},
    ),
    "no 1 - tanh^2": ("gated_linear, fused", "(1 - gate.square()) * inner", "inner", {"backward"}),
    "a gate's gradient of one tile": (
        "gated_linear, fused", "shares.sum()", "shares[:1].sum()", {"backward"},
    ),
    "da without the gate": (
        "gated_linear, fused", "(packed(rows) @ _fold(gate, weight))", "(packed(rows) @ weight)",
        {"backward"},
    ),
    "relu, not squared": ("squared_relu_linear, fused", "r * r", "r", {"forward", "backward"}),
    "squared, no relu": (
        "squared_relu_linear, cuBLAS and a pass", "return r * r", "return x * x",
        {"forward", "backward"},
    ),
    "no 2": ("squared_relu_linear, fused", "2 * r * dout", "r * dout", {"backward"}),
    "h for r": ("squared_relu_linear, fused", "tl.sqrt(", "(", {"backward"}),
    "the last row alone": ("layer_norm", "dw += ", "dw = ", {"backward"}),
    "the mean does not move": ("layer_norm", " - tl.sum(dx_hat, 0) / D", "", {"backward"}),
    "padding moves the deviation": (
        "layer_norm", "tl.where(inside, x - tl.sum(x, 0) / D, 0.0)", "x - tl.sum(x, 0) / D",
        {"backward"},
    ),
}  # fmt: skip
RED = {  # more rows than layer norm then has programs, and a width that is no power of two
    "gated_linear": block_twins.gated_case(80, D=140, I=24),
    "squared_relu_linear": block_twins.squared_case(9, D=20, F=30),
    "layer_norm": block_twins.norm_case(12, D=12, mean=3.0),
}


def broken(tmp_path, name, before, after, label):
    """Forward and backward of a changed copy of a kernel's file."""
    function, _, branch = name.partition(", ")
    source = Path(getattr(kernels, function).__file__).read_text("utf-8")
    assert before in source, f"the kernel no longer contains {before!r}"
    namespace = "broken_" + "".join(filter(str.isalnum, label))
    path = tmp_path / f"{namespace}.py"
    source = source.replace(before, after).replace('@operator("', f'@operator("{namespace}_')
    path.write_text(source.replace("PROGRAMS = 512", "PROGRAMS = 4"), "utf-8")
    spec = importlib.util.spec_from_file_location(f"miniflamingo.kernels.{namespace}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"fused": branch == "fused"} if branch else {}
    return (
        lambda *args: getattr(module, function)(*args, **options),
        lambda *args: getattr(module, function + "_backward")(*args, **options),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # padding divides by 0
@pytest.mark.parametrize("label", BREAKAGES)
def test_a_broken_kernel_turns_the_table_red(label, tmp_path):
    name, before, after, red = BREAKAGES[label]
    kernel, backward = broken(tmp_path, name, before, after, label)
    comparison = dataclasses.replace(
        COMPARISONS[name],
        kernel=kernel,
        kernel_backward=backward,
        cases={"": RED[name.split(",")[0]]},
    )
    records = compare.compare(comparison, "", "bf16", DEVICE)
    assert {r.direction for r in records if not r.ok} >= red


def test_what_a_broken_kernel_is_held_against_is_green():
    for name, comparison in COMPARISONS.items():
        brief = dataclasses.replace(comparison, cases={"": RED[name.split(",")[0]]})
        assert all(r.ok for r in compare.compare(brief, "", "bf16", DEVICE)), name
