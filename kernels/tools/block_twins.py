"""NumPy twins, plain torch peers and cases of the block's products and of layer norm.

The twins are those of `miniflamingo`, composed as the kernels are. Letters as in their files.
"""

import numpy as np
import torch.nn.functional as F

from miniflamingo import functional, xattn

# --- the twins: arrays in, arrays out -------------------------------------------------------------


def gated_linear(x, a, alpha, weight):
    """x + tanh(alpha) * (a @ weight^T)."""
    return xattn.tanh_gate(x, alpha, functional.linear(a, weight))


def gated_linear_backward(dout, x, a, alpha, weight):
    """-> dx, da, dalpha, dweight."""
    branch = functional.linear(a, weight)
    dx, dalpha, dbranch = xattn.tanh_gate_backward(dout, x, alpha, branch)
    da, dweight, _ = functional.linear_backward(dbranch, a, weight)
    return dx, da, np.asarray(dalpha), dweight


def gated_linear_scales(dout, x, a, alpha, weight):
    """For dalpha, the root of the summed squares of what is summed up; 0 for the others."""
    terms = (1 - np.tanh(alpha) ** 2) * dout * functional.linear(a, weight)
    return 0, 0, np.linalg.norm(terms), 0


def squared_relu_linear(x, weight):
    """relu(x @ weight^T)^2."""
    return functional.squared_relu(functional.linear(x, weight))


def squared_relu_linear_backward(dout, x, weight):
    """-> dx, dweight."""
    dpre = functional.squared_relu_backward(dout, functional.linear(x, weight))
    return functional.linear_backward(dpre, x, weight)[:2]


# --- the peers: plain torch in the precision of its inputs --------------------------------------


def torch_gated_linear(x, a, alpha, weight):
    """As the paper writes it."""
    return x + alpha.tanh() * F.linear(a, weight)


def torch_squared_relu_linear(x, weight):
    """Operation by operation."""
    return F.relu(F.linear(x, weight)).square()


def torch_layer_norm(x, weight, bias):
    """torch's own, forward and backward."""
    return F.layer_norm(x, weight.shape, weight, bias)


# --- the cases: functions of a generator --------------------------------------------------------


def spread(x):
    """The same numbers, every row with as many unused ones behind it."""
    return np.concatenate([x, np.zeros_like(x)], axis=-1)[..., : x.shape[-1]]


def gated_case(*leading, D, I, alpha=0.5, strided=False):
    """x [*leading, D], a [*leading, I], alpha, weight [D, I]."""

    def draw(rng):
        x, a = rng.normal(size=(*leading, D)), rng.normal(size=(*leading, I))
        weight = rng.normal(size=(D, I)) * max(I, 1) ** -0.5
        x, a, weight = map(spread, (x, a, weight)) if strided else (x, a, weight)
        return x, a, np.array(alpha), weight

    return draw


def squared_case(*leading, D, F, scale=1.0, strided=False):
    """x [*leading, D], weight [F, D]; scale is that of x @ weight^T."""

    def draw(rng):
        x, weight = rng.normal(size=(*leading, D)), rng.normal(size=(F, D)) * scale * D**-0.5
        return tuple(map(spread, (x, weight))) if strided else (x, weight)

    return draw


def norm_case(*leading, D, mean=0.0, strided=False):
    """x [*leading, D], weight [D], bias [D]."""

    def draw(rng):
        x, weight, bias = rng.normal(mean, size=(*leading, D)), *rng.normal(size=(2, D))
        return (spread(x) if strided else x), weight, bias

    return draw


GATED_CASES = {
    "one tile": gated_case(2, 8, D=16, I=32),
    "tiles and a rest": gated_case(3, 47, D=150, I=70),
    "more inputs than outputs": gated_case(20, D=24, I=200),
    "a shut gate": gated_case(2, 9, D=20, I=24, alpha=0.0),
    "a gate nearly shut": gated_case(30, D=20, I=24, alpha=-1e-3),
    "a gate wide open": gated_case(30, D=20, I=24, alpha=3.0),
    "one row, one input": gated_case(1, D=5, I=1),
    "gate, strided inputs": gated_case(2, 19, D=40, I=33, strided=True),
}
SQUARED_CASES = {
    "hidden: one tile": squared_case(2, 8, D=16, F=32),
    "hidden: tiles and a rest": squared_case(3, 47, D=70, F=150),
    "hidden: many inputs": squared_case(20, D=200, F=24),
    "hidden: small": squared_case(30, D=24, F=40, scale=0.02),
    "hidden: large": squared_case(30, D=24, F=40, scale=30.0),
    "hidden: strided inputs": squared_case(2, 19, D=33, F=40, strided=True),
}
NORM_CASES = {
    "norm: D = 24": norm_case(2, 9, D=24),
    "norm: D = 300": norm_case(7, D=300),
    "norm: more rows than programs": norm_case(520, D=8),
    "norm: a mean of 8": norm_case(20, D=64, mean=8.0),
    "norm: D = 1": norm_case(3, D=1),
    "norm: strided inputs": norm_case(2, 9, D=40, strided=True),
}
