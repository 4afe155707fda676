"""What the tests of formulas and modules share.

A Case is a formula with arguments, and the same formula written with torch. CHECKS are what every
case must pass: central differences in float64, torch's values and torch's gradients, dtypes, and
purity. check_module does the same for a module, by a directional derivative for each parameter.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest

from miniflamingo.autograd import Tape, Tensor, array_of

STEP = 1e-5  # of a central difference


def normal(*shape, seed=0):
    """Standard normal numbers of this shape; the seed and the shape decide which."""
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def is_float(x):
    return isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == "f"


def cast(values, dtype):
    """The values, those that are floating-point arrays converted to dtype."""
    return [np.array(v, dtype) if is_float(v) else v for v in values]


@dataclass
class Case:
    """A formula, its arguments and options, and `oracle(torch, *arguments, **options)`."""

    formula: object
    args: tuple
    oracle: object
    options: dict = field(default_factory=dict)
    note: str = ""

    def __str__(self):
        return f"{self.formula.__name__} {self.note}".strip()

    def inputs(self, dtype=np.float64):
        keys, values = self.options.keys(), self.options.values()
        return cast(self.args, dtype), dict(zip(keys, cast(values, dtype)))


def dout_like(out):
    """A gradient of the output in which no two entries are alike."""
    return normal(*np.shape(out), seed=1).astype(out.dtype)


def through_tape(case, dtype=np.float64):
    """The output, and the gradient of every floating-point argument."""
    args, options = case.inputs(dtype)
    args = [Tensor(a) if is_float(a) else a for a in args]
    with Tape() as tape:
        out = case.formula(*args, **options)
    tape.backward(out, dout_like(out.data))
    return out.data, [a.grad for a in args if isinstance(a, Tensor)]


def central_difference(f, x):
    """d f() / d x for every element of x, which f reads and which is moved in place."""
    slope = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        here = x[i]
        x[i] = here + STEP
        above = f()
        x[i] = here - STEP
        slope[i] = (above - f()) / (2 * STEP)
        x[i] = here
    return slope


def central_differences(case):
    args, options = case.inputs()
    out, grads = through_tape(case)
    dout = dout_like(out)
    for x, dx in zip([a for a in args if is_float(a)], grads, strict=True):
        slope = central_difference(lambda: (dout * case.formula(*args, **options)).sum(), x)
        np.testing.assert_allclose(dx, slope, rtol=1e-6, atol=1e-7)


def torchs_values_and_gradients(case):
    torch = pytest.importorskip("torch")

    def tensor(x):
        x = torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x
        return x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x

    args, options = case.inputs()
    args = [tensor(np.asarray(a) if is_float(a) else a) for a in args]
    options = {key: tensor(value) for key, value in options.items()}
    theirs = case.oracle(torch, *args, **options)
    ours, grads = through_tape(case)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-10, atol=1e-12)
    theirs.backward(torch.from_numpy(np.asarray(dout_like(ours))))
    floats = [a for a in args if torch.is_tensor(a) and a.is_floating_point()]
    for dx, x in zip(grads, floats, strict=True):
        np.testing.assert_allclose(dx, x.grad.numpy(), rtol=1e-9, atol=1e-11)


def dtypes_and_shapes(case):
    for dtype in (np.float32, np.float64):
        args, _ = case.inputs(dtype)
        out, grads = through_tape(case, dtype)
        assert out.dtype == dtype
        for x, dx in zip([a for a in args if is_float(a)], grads, strict=True):
            assert (dx.dtype, dx.shape) == (dtype, x.shape)


def purity(case):
    """Arrays in, an array out; the same through a tape; and no input is written to."""
    args, options = case.inputs()
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    before = [a.copy() for a in arrays]
    plain = case.formula(*args, **options)
    tensors = [Tensor(a) if is_float(a) else a for a in args]
    with Tape() as tape:
        taped = case.formula(*tensors, **options)
    dout = dout_like(taped.data)
    dout.flags.writeable = False
    tape.backward(taped, dout)
    assert not isinstance(plain, Tensor)
    np.testing.assert_array_equal(plain, taped.data)
    for a, b in zip(arrays, before):
        np.testing.assert_array_equal(a, b)


CHECKS = [central_differences, torchs_values_and_gradients, dtypes_and_shapes, purity]
each_case = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


def each_of(cases):
    """Parametrise a test over the cases and over all checks."""
    return lambda test: each_case(pytest.mark.parametrize("case", cases, ids=str)(test))


def check_module(module, *inputs, **options):
    """Outputs and gradients keep the dtype; every parameter's gradient is the right one.

    A frozen parameter gets none. The module is left in float64.
    """
    for dtype in (np.float32, np.float64):
        module.astype(dtype).zero_grad()
        args = cast(inputs, dtype)
        plain = module(*args, **options)
        with Tape() as tape:
            out = module(*args, **options)
        np.testing.assert_array_equal(plain, array_of(out))
        assert plain.dtype == dtype
        dout = dout_like(plain)
        tape.backward(out, dout)
        for name, p in module.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
            assert p.grad is None or (p.grad.dtype, p.grad.shape) == (dtype, p.shape), name
    for i, (name, p) in enumerate(module.named_parameters()):
        if p.grad is not None:
            slope = _slope(lambda: (dout * module(*args, **options)).sum(), p, i)
            direction = normal(*p.shape, seed=i)
            np.testing.assert_allclose((p.grad * direction).sum(), slope, 1e-5, 1e-6, err_msg=name)


def _slope(f, parameter, seed):
    """The derivative of f() as the parameter moves in a random direction."""
    here, direction = parameter.data, normal(*parameter.shape, seed=seed)
    parameter.data = here + STEP * direction
    above = f()
    parameter.data = here - STEP * direction
    below = f()
    parameter.data = here
    return (above - below) / (2 * STEP)
