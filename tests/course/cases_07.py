"""Right and wrong answers to the exercises of module 07, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_07 import differences, layer_of
from miniflamingo.functional import linear, linear_backward
from miniflamingo.xattn import tanh_gate, tanh_gate_backward

# --- 7.1 and 7.2 ----------------------------------------------------------------------------------


def gate_by_exponentials(y, alpha, branch):
    return y + (1 - 2 / (np.exp(2 * alpha) + 1)) * branch


def slopes(loss, alphas, h=1e-5, up=1, down=1, by=2):
    """An answer as students write it, with a place for each mistake."""
    return [(loss(a + up * h) - loss(a - down * h)) / (by * h) for a in alphas]


def slopes_into_an_array(loss, alphas):
    out = np.zeros(len(alphas))
    for i, a in enumerate(alphas):
        out[i] = (loss(a + 1e-6) - loss(a - 1e-6)) / 2e-6
    return out


# --- 7.3 ------------------------------------------------------------------------------------------


def layer(y, xattn, dense, attend, ffw, gate=np.tanh, see="new", add="new"):
    new = y + gate(xattn) * attend(y)
    return {"new": new, "old": y, "none": 0}[add] + gate(dense) * ffw(new if see == "new" else y)


# --- 7.4 ------------------------------------------------------------------------------------------


def placed(depth, every, start=0, end=0):
    return list(range(start, depth + end, every))


# --- 7.5 ------------------------------------------------------------------------------------------


def gradients(dout, a, alpha, weight, slope=lambda x: 1 - np.tanh(x) ** 2, reduce=np.sum):
    products = weight * np.einsum("gmd,gmi->gdi", dout, a)
    return [slope(x) * reduce(p) for x, p in zip(alpha, products)]


def gradients_by_the_branch(dout, a, alpha, weight):  # builds the branch, and is right
    branches = [linear(x, w) for x, w in zip(a, weight)]
    return np.array([tanh_gate_backward(d, d, x, b)[1] for d, x, b in zip(dout, alpha, branches)])


def gradients_from_the_gated_dweight(dout, a, alpha, weight):
    gated = [linear_backward(np.tanh(x) * d, y, w)[1] for d, y, x, w in zip(dout, a, alpha, weight)]
    return (1 - np.tanh(alpha) ** 2) * (weight * gated).sum(axis=(1, 2))


RIGHT = [
    ("7.1", tanh_gate),
    ("7.1", gate_by_exponentials),
    ("7.2", slopes),
    ("7.2", slopes_into_an_array),
    ("7.2", differences),
    ("7.3", layer),
    ("7.3", layer_of),
    ("7.3", lambda y, a, d, attend, ffw: tanh_gate(z := tanh_gate(y, a, attend(y)), d, ffw(z))),
    ("7.4", placed),
    ("7.4", lambda depth, every: np.flatnonzero(np.arange(depth) % every == 0)),
    ("7.5", gradients),
    ("7.5", gradients_by_the_branch),
]

WRONG = [
    ("7.1", lambda y, a, b: y + np.tan(a) * b, "`tan` where `tanh` was meant"),
    ("7.1", lambda y, a, b: y + a * b, "this is alpha itself"),
    ("7.1", lambda y, a, b: y + np.tanh(a * b), "of alpha alone, not of the branch"),
    ("7.1", lambda y, a, b: np.tanh(a) * b, "y is missing"),
    ("7.1", lambda y, a, b: np.tanh(a) * (y + b), "only the branch is scaled"),
    ("7.1", lambda y, a, b: b + np.tanh(a) * y, "it belongs on the branch"),
    ("7.1", lambda y, a, b: y + b / (1 + np.exp(-a)), "a sigmoid is half open"),
    ("7.1", lambda y, a, b: y + np.tanh(a) * (b - y), "no mixture"),
    ("7.1", lambda y, a, b: y + b, "the gate is missing"),
    ("7.1", lambda y, a, b: tanh_gate(y, a, b).sum(), "wrong shape"),
    ("7.2", lambda *a: slopes(*a, by=1), "divide by 2h"),
    ("7.2", lambda *a: slopes(*a, down=0), "off by a factor of 0.5"),
    ("7.2", lambda *a: slopes(*a, down=0, by=1), "one-sided"),
    ("7.2", lambda *a: slopes(*a, up=0, by=1), "one-sided"),
    ("7.2", lambda *a: slopes(*a, by=-2), "the sign: f(alpha + h) comes first"),
    ("7.2", lambda *a: slopes(*a, h=0.1), "h = 0.1 is too large"),
    ("7.2", lambda *a: slopes(*a, h=0.03), "close, but no gradient check"),
    ("7.2", lambda *a: slopes(*a, h=1e-14), "close, but no gradient check"),
    ("7.2", lambda *a: slopes(*a, by=2e5), "off by a factor of 1e-05 everywhere"),
    ("7.2", lambda loss, alphas: [loss(a) for a in alphas], "the values of the loss"),
    ("7.2", lambda loss, alphas: loss(alphas + 1e-6), "your code stops with TypeError"),
    ("7.2", lambda loss, alphas: slopes(loss, alphas)[0], "wrong shape: [4] is wanted, got []"),
    ("7.3", lambda *a: layer(*a, see="old"), "sees the OLD y"),
    ("7.3", lambda *a: layer(*a, add="old"), "the first branch is lost"),
    ("7.3", lambda *a: layer(*a, add="none"), "the second y is missing"),
    ("7.3", lambda y, a, d, f, g: layer(y, d, a, f, g), "the two gates are exchanged"),
    ("7.3", lambda y, a, d, f, g: layer(y, a, a, f, g), "the gate of the attention"),
    ("7.3", lambda y, a, d, f, g: layer(y, d, a, g, f), "the attention comes first"),
    ("7.3", lambda *a: layer(*a, gate=np.tan), "`tan` where `tanh` was meant"),
    ("7.3", lambda *a: layer(*a, gate=lambda x: x), "a gate is tanh(alpha), not alpha"),
    ("7.3", lambda *a: layer(*a, gate=lambda x: 1), "no gate"),
    ("7.3", lambda y, a, d, f, g: y + np.tanh(a) * f(y), "the feed-forward is missing"),
    ("7.4", lambda n, k: [i for i in range(n) if (i + 1) % k == 0], "open-flamingo's"),
    ("7.4", lambda n, k: placed(n, k, start=k, end=1), "AFTER every n-th block"),
    ("7.4", lambda n, k: placed(n, k, start=k), "block 0 must have a layer"),
    ("7.4", lambda n, k: [i * k for i in range(n // k)], "80 / 7 is rounded down"),
    ("7.4", lambda n, k: placed(n, k, end=1), "there is no block 40"),
    ("7.4", lambda n, k: placed(n, k, start=1, end=1), "blocks are counted from 0"),
    ("7.4", lambda n, k: np.arange(n) % k == 0, "these are truths"),
    ("7.4", lambda n, k: list(range(-(-n // k))), "the numbers of the layers"),
    ("7.4", lambda n, k: np.arange(0.0, n, k), "wrong dtype: int is wanted"),
    ("7.5", lambda *a: gradients(*a, slope=lambda x: 1), "the factor 1 - tanh(alpha)^2 is missing"),
    ("7.5", lambda *a: gradients(*a, slope=lambda x: 1 + np.tan(x) ** 2), "`tan` where `tanh`"),
    ("7.5", lambda *a: gradients(*a, slope=lambda x: 1 - np.tanh(x)), "without the square"),
    ("7.5", lambda *a: gradients(*a, slope=lambda x: 1 - x * x), "the square is of tanh(alpha)"),
    ("7.5", lambda *a: gradients(*a, slope=np.tanh), "where its derivative was meant"),
    ("7.5", lambda *a: gradients(*a, reduce=np.mean), "a mean"),
    ("7.5", lambda *a: np.sum(gradients(*a)), "one number for EACH gate"),
    ("7.5", lambda *a: gradients(*a, reduce=lambda p: p.sum(axis=1)), "each row of W"),
    ("7.5", lambda *a: gradients(*a, reduce=lambda p: p.sum(axis=0)), "each column of W"),
    ("7.5", gradients_from_the_gated_dweight, "no tanh(alpha) in it"),
    ("7.5", lambda d, a, x, w: gradients(d, a, x, np.ones_like(w)), "the weight is missing"),
    ("7.5", lambda d, a, x, w: gradients(d, a * 0 + a.sum(0), x, w), "the gates are mixed"),
]
