"""The formulas that every room uses, against central differences and against torch."""

import math

import numpy as np
import pytest

from miniflamingo.autograd import Tape, Tensor
from miniflamingo.functional import (
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    add,
    broadcast_to,
    concat,
    cross_entropy,
    embedding,
    exp,
    gelu,
    gelu_exact,
    getitem,
    keep,
    layer_norm,
    linear,
    log_softmax,
    matmul,
    mean,
    multiply,
    norm_named,
    normal_tail,
    quick_gelu,
    relu,
    relu6,
    replace_row,
    reshape,
    rms_norm,
    sigmoid,
    silu,
    softmax,
    squared_relu,
    total,
    transpose,
)
from tests.gradients import Case, check_module, each_of, normal

x234, x34 = normal(2, 3, 4), normal(3, 4)
rng = np.random.default_rng(0)
targets = np.array([[1, -100, 4], [0, 0, -100]])
twice = np.array([0, 0, 2])

CASES = [
    Case(add, (x234, normal(3, 1)), lambda torch, x, y: x + y),
    Case(add, (normal(1, 4), normal(2, 1, 1)), lambda torch, x, y: x + y, note="both broadcast"),
    Case(multiply, (x234, normal(3, 1)), lambda torch, x, y: x * y),
    Case(multiply, (normal(4), x234), lambda torch, x, y: x * y, note="a vector first"),
    Case(matmul, (x234, normal(2, 4, 5)), lambda torch, x, y: x @ y),
    Case(matmul, (x34, normal(2, 4, 5)), lambda torch, x, y: x @ y, note="broadcast x"),
    Case(matmul, (normal(2, 1, 3, 4), normal(5, 4, 2)), lambda torch, x, y: x @ y, note="both"),
    Case(keep, (x234, x34 > 0), lambda torch, x, mask: x.where(torch.as_tensor(mask), 0)),
    Case(reshape, (x234, 4, -1), lambda torch, x, *shape: x.reshape(*shape)),
    Case(transpose, (x234, 1, 2, 0), lambda torch, x, *axes: x.permute(*axes)),
    Case(getitem, (x234, (slice(None), 1)), lambda torch, x, i: x[i], note="slice"),
    Case(getitem, (x234, 1), lambda torch, x, i: x[i], note="number"),
    Case(getitem, (x34, twice), lambda torch, x, i: x[i], note="array, twice"),
    Case(getitem, (x34, [0, 0]), lambda torch, x, i: x[i], note="list, twice"),
    Case(getitem, (x34, (twice, twice)), lambda torch, x, i: x[i], note="pairs, twice"),
    Case(getitem, (x234, (slice(0, 1), [1, 1])), lambda torch, x, i: x[i], note="slice and list"),
    Case(getitem, (x34, x34 > 0), lambda torch, x, i: x[i], note="mask"),
    Case(
        concat, (normal(2, 1), normal(2, 3), normal(2, 2)),
        lambda torch, *xs, axis: torch.cat(xs, dim=axis), {"axis": 1},
    ),
    Case(
        concat, (normal(2, 1, 3), normal(2, 4, 3)),
        lambda torch, *xs, axis: torch.cat(xs, dim=axis), {"axis": -2}, note="from the end",
    ),
    Case(broadcast_to, (x34, 2, 3, 4), lambda torch, x, *shape: x.expand(*shape)),
    Case(broadcast_to, (normal(3, 1), 3, 4), lambda torch, x, *shape: x.expand(*shape), note="1"),
    Case(total, (x234,), lambda torch, x: x.sum()),
    Case(total, (x234,), lambda torch, x, axis: x.sum(axis), {"axis": (0, 2)}, note="two axes"),
    Case(mean, (x234,), lambda torch, x: x.mean()),
    Case(mean, (x234,), lambda torch, x, axis: x.mean(axis), {"axis": -1}, note="last axis"),
    Case(mean, (x234,), lambda torch, x, axis: x.mean(axis), {"axis": (1, 2)}, note="two axes"),
    Case(exp, (x34,), lambda torch, x: x.exp()),
    Case(linear, (x234, normal(5, 4), normal(5)), lambda torch, *a: torch.nn.functional.linear(*a)),
    Case(linear, (normal(4), normal(5, 4)), lambda torch, *a: torch.nn.functional.linear(*a),
         note="no bias, a vector"),
    Case(
        layer_norm, (x234 + 3, normal(4), normal(4, seed=2)),
        lambda torch, x, w, b: torch.nn.functional.layer_norm(x, (4,), w, b),
    ),
    Case(
        rms_norm, (x234, normal(4)),
        lambda torch, x, w: torch.nn.functional.rms_norm(x, (4,), w, 1e-6),
    ),
    Case(relu, (x234,), lambda torch, x: x.relu()),
    Case(squared_relu, (x234,), lambda torch, x: x.relu() ** 2),
    Case(gelu, (3 * x234,), lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh")),
    Case(gelu_exact, (3 * x234,), lambda torch, x: torch.nn.functional.gelu(x)),
    Case(silu, (3 * x234,), lambda torch, x: torch.nn.functional.silu(x)),
    Case(quick_gelu, (3 * x234,), lambda torch, x: x * (1.702 * x).sigmoid()),
    Case(relu6, (5 * x234,), lambda torch, x: torch.nn.functional.relu6(x)),
    Case(sigmoid, (3 * x234,), lambda torch, x: x.sigmoid()),
    Case(softmax, (x234,), lambda torch, x: x.softmax(-1)),
    Case(
        embedding, (np.array([[0, 2, 2], [1, 0, 2]]), normal(4, 3)),
        lambda torch, ids, w: torch.nn.functional.embedding(ids, w),
    ),
    Case(
        replace_row, (x34, normal(4)),
        lambda torch, table, row, index: torch.cat([table[:index], row[None], table[index + 1 :]]),
        {"index": 1},
    ),
    *(
        Case(
            cross_entropy, (normal(2, 3, 5), targets),
            lambda torch, x, t, **options: torch.nn.functional.cross_entropy(
                x.reshape(-1, 5), t.reshape(-1), **options
            ),
            options, note=str(options),
        )
        for options in ({}, {"label_smoothing": 0.3}, {"ignore_index": -100, "label_smoothing": 1.})
    ),
    Case(
        cross_entropy, (normal(4, 3), np.array([0, 2, 1, 2])),
        lambda torch, x, t, **options: torch.nn.functional.cross_entropy(x, t, **options),
        {"ignore_index": 2}, note="ignore 2",
    ),
]  # fmt: skip


@each_of(CASES)
def test_formula(case, check):
    check(case)


@pytest.mark.parametrize(
    "module",
    [
        Linear(4, 3, rng=rng),
        Linear(4, 3, bias=True, rng=rng),
        LayerNorm(4),
        RMSNorm(4),
        norm_named("rms", 0.1)(4),
    ],
    ids=["linear", "with bias", "layer norm", "rms norm", "eps"],
)
def test_module(module):
    check_module(module, x234)


def test_embedding_module():
    check_module(Embedding(5, 3, rng=rng), np.array([[4, 0], [4, 1]]))


def test_linear_starts_with_the_documented_deviation():
    weight = Linear(300, 400, scale=0.5, rng=np.random.default_rng(0)).weight.data
    assert weight.std() == pytest.approx(0.5 / np.sqrt(900), rel=0.01)
    assert Embedding(400, 100, rng=rng).weight.data.std() == pytest.approx(0.1, rel=0.02)


def test_operators_on_tensors_and_arrays():
    x, y = Tensor(x34), normal(3, 4, seed=5)
    with Tape() as tape:
        out = ((2 - x) * y + (y - x) * 3 - x + y + (-x)).sum() + (normal(2, 3) @ x).sum()
    tape.backward(out)
    expected = (2 - x34) * y + (y - x34) * 3 - x34 + y - x34
    assert out.data == pytest.approx(expected.sum() + (normal(2, 3) @ x34).sum())
    by_hand = -y - 3 - 1 - 1 + normal(2, 3).sum(axis=0)[:, None]
    np.testing.assert_allclose(x.grad, by_hand)


def test_methods_of_tensors():
    x = Tensor(x234)
    with Tape() as tape:
        out = x.reshape(6, 4).transpose(1, 0)[0].mean() + x.sum(axis=0)[1, 2] + (x @ x34.T).sum()
    tape.backward(out)
    dx = np.broadcast_to(x34.sum(axis=0), x234.shape).copy()
    dx[:, :, 0] += 1 / 6
    dx[:, 1, 2] += 1
    np.testing.assert_allclose(x.grad, dx)


def test_linear_leaves_out_the_gradients_nobody_needs():
    dx, dweight, dbias = linear.backward(
        normal(2, 5), (normal(2, 4), normal(5, 4), normal(5)), (False, True, True), {}
    )
    assert dx is None
    assert dweight.shape == (5, 4)
    assert dbias.shape == (5,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_inputs_give_no_nan_and_no_warning(dtype):
    x = np.array([-1e4, -100, -30, 0, 30, 100, 1e4], dtype)
    for formula in (gelu, gelu_exact, quick_gelu, silu):
        np.testing.assert_allclose(formula(x), np.maximum(x, 0), atol=1e-10)
    np.testing.assert_allclose(sigmoid(x), [0, 0, 0, 0.5, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(softmax(x), [0, 0, 0, 0, 0, 0, 1], atol=1e-30)
    np.testing.assert_allclose(log_softmax(x)[0], -2e4)
    for formula in (gelu, gelu_exact, quick_gelu, silu, sigmoid, softmax):
        (dx,) = formula.backward(np.ones_like(x), (x,), (True,), {})
        assert np.isfinite(dx).all()
    np.testing.assert_allclose(
        gelu.backward(np.ones_like(x), (x,), (True,), {})[0], x > 0, atol=0.6
    )


@pytest.mark.parametrize("dtype, error", [(np.float32, 2e-7), (np.float64, 3e-16)])
def test_the_normal_tail_is_that_of_erfc(dtype, error):
    x = np.linspace(-9, 9, 2001).astype(dtype)
    expected = np.array([math.erfc(abs(v) / math.sqrt(2)) / 2 for v in x.tolist()])
    np.testing.assert_allclose(normal_tail(x), expected, rtol=100 * error, atol=error)
    assert normal_tail(np.zeros((), dtype)).shape == ()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_gelu_at_negative_zero(dtype):
    x = np.array([-0.0, 0.0], dtype)
    (dx,) = gelu_exact.backward(np.ones(2, dtype), (x,), (True,), {})
    np.testing.assert_allclose(dx, 0.5, rtol=1e-6)


def test_norms_by_name_have_the_eps_that_is_asked_for():
    found = [norm_named(*names)(4).eps for names in (("rms",), ("layer",), ("rms", 0.5))]
    assert found == [1e-6, 1e-5, 0.5]
    assert norm_named(None, 0.5) is None


def test_log_softmax_is_the_logarithm_of_softmax():
    np.testing.assert_allclose(log_softmax(x234), np.log(softmax(x234)))


def test_minus_infinity_has_no_probability():
    x = np.array([[0.0, -np.inf, 0.0]])
    np.testing.assert_array_equal(softmax(x), [[0.5, 0, 0.5]])
    np.testing.assert_allclose(log_softmax(x), [[-np.log(2), -np.inf, -np.log(2)]])


@pytest.mark.parametrize(
    "ids, message",
    [
        ([-100, -100], r"every target is ignore_index \(-100\)"),
        ([0, 5], r"must lie in 0\.\.4, got 0\.\.5"),
        ([-1, 2], r"must lie in 0\.\.4, got -1\.\.2"),
        ([0], r"targets must be \[2\], got \[1\]"),
    ],
)
def test_cross_entropy_says_what_is_wrong(ids, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(normal(2, 5), np.array(ids))


def test_replace_row_copies():
    table = x34.copy()
    out = replace_row(table, np.zeros(4), index=2)
    np.testing.assert_array_equal(table, x34)
    np.testing.assert_array_equal(out[2], 0)
    np.testing.assert_array_equal(out[:2], x34[:2])
