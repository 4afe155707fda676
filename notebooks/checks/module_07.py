"""Checks of module 07: the gate, slopes by differences, the layer, its places, the folded gate."""

import math

import numpy as np

from .core import Wrong, as_array, call, exercise, expect

TAN = "`tan` where `tanh` was meant: beyond alpha = 1.57 it jumps to the opposite sign"

# --- 7.1: the gate --------------------------------------------------------------------------------


@exercise("7.1")
def gate(answer):
    """answer(y [...], alpha [], branch [...]) -> [...]."""
    rng = np.random.default_rng(0)
    for alpha, shape in ((0.8, (2, 3, 4)), (-2.1, (5,)), (0.0, (3, 2))):
        y, branch = rng.normal(size=(2, *shape))
        right = y + np.tanh(alpha) * branch
        expect(call(answer, y, np.array(alpha), branch), right, _gate_mistakes(y, alpha, branch))


def _gate_mistakes(y, alpha, branch):
    t = np.tanh(alpha)
    yield TAN, y + np.tan(alpha) * branch
    yield "this is alpha itself: the gate is tanh(alpha), never above 1", y + alpha * branch
    yield "tanh is taken of alpha alone, not of the branch", y + np.tanh(alpha * branch)
    yield "y is missing: the gated branch is ADDED to it", t * branch
    yield "y goes past the gate: only the branch is scaled", t * (y + branch)
    yield "the gate stands on y: it belongs on the branch", t * y + branch
    yield (
        "a sigmoid is half open at alpha = 0; tanh is shut there",
        y + branch / (1 + np.exp(-alpha)),
    )
    yield "no mixture: y keeps its full weight, whatever the gate is", (1 - t) * y + t * branch
    yield "the gate is missing", y + branch
    yield "the sign is plus", y - t * branch


# --- 7.2: slopes by differences -------------------------------------------------------------------


def differences(loss, alphas, h=1e-6):
    """The slope of a function of one number at each of alphas [n], by central differences: [n]."""
    return np.array([(loss(a + h) - loss(a - h)) / (2 * h) for a in alphas])


@exercise("7.2")
def slopes(answer):
    """answer(loss, a function of one number; alphas [n]) -> [n]."""
    kink = np.array([-1.0, 0.0, 2.0])
    at_kink = as_array(call(answer, abs, kink))
    for side in (1.0, -1.0):
        if at_kink.shape == (3,) and np.allclose(at_kink, [-1, side, 1], atol=1e-3):
            raise Wrong("one-sided: go as far down as up; at the kink of |alpha| that is slope 0")
    alphas = np.array([-1.3, 0.0, 0.4, 2.0])
    value, right = np.array([_curve(a) for a in alphas]), 2 * np.cos(2 * alphas) + alphas
    mistakes = [
        ("divide by 2h: the two points are 2h apart", 2 * right),
        ("the sign: f(alpha + h) comes first", -right),
        ("these are the values of the loss, not its slopes", value),
        *[(f"h = {h} is too large for this curve", differences(_curve, alphas, h))
          for h in (1.0, 0.5, 0.1, 0.01)],
    ]  # fmt: skip
    expect(call(answer, _curve, alphas), right, mistakes, _slope_in_words)
    expect(at_kink, np.array([-1.0, 0.0, 1.0]))


def _curve(a):
    return math.sin(2 * a) + a * a / 2 + 3


def _slope_in_words(got, right):
    factor = got / right
    if np.ptp(factor) < 1e-2 * abs(factor[0]) and abs(factor[0] - 1) > 0.1:
        return f"off by a factor of {factor.mean():.2g} everywhere: move both points, divide by 2h"
    if np.allclose(got, right, rtol=0.3, atol=0.3):
        return (
            "close, but no gradient check: h is too large for the curve, or too small for 16 digits"
        )
    place = int(np.argmax(abs(got - right)))
    return f"wrong slope at place {place}: {right[place]:.4g} is right, got {got[place]:.4g}"


# --- 7.3: the layer -------------------------------------------------------------------------------


@exercise("7.3")
def layer(answer):
    """answer(y [B, L, D], alpha_xattn, alpha_dense, attend, ffw) -> [B, L, D]."""
    y = np.random.default_rng(1).normal(size=(2, 3, 4))
    for gates in ((0.7, -0.4), (-1.9, 1.8), (0.0, 0.0)):
        case = (y, *map(np.array, gates), _attend, _ffw)
        expect(call(answer, *case), layer_of(*case), _layer_mistakes(*case))


def layer_of(y, alpha_xattn, alpha_dense, attend, ffw):
    """Equation (2)."""
    y = y + np.tanh(alpha_xattn) * attend(y)
    return y + np.tanh(alpha_dense) * ffw(y)


def _attend(y):
    return np.sin(y)[..., ::-1] + 0.5


def _ffw(y):
    return np.maximum(y, 0) ** 2 - 0.3


def _layer_mistakes(y, xattn, dense, attend, ffw):
    t, d = np.tanh(xattn), np.tanh(dense)
    first = y + t * attend(y)
    yield (
        "the feed-forward sees the OLD y here: overwrite y after the first gate",
        first + d * ffw(y),
    )
    yield (
        "the first branch is lost: the second one is added to y AFTER the first gate",
        y + d * ffw(first),
    )
    yield "the two gates are exchanged", layer_of(y, dense, xattn, attend, ffw)
    yield "both branches have the gate of the attention", layer_of(y, xattn, xattn, attend, ffw)
    yield "both branches have the gate of the feed-forward", layer_of(y, dense, dense, attend, ffw)
    yield "the attention comes first, then the feed-forward", layer_of(y, dense, xattn, ffw, attend)
    yield "the second y is missing: it goes past the feed-forward", d * ffw(first)
    yield "the feed-forward is missing", first
    yield "no gate", y + attend(y) + ffw(y + attend(y))
    yield "the feed-forward is not gated", first + ffw(first)
    yield "the attention is not gated", y + attend(y) + d * ffw(y + attend(y))
    tan = y + np.tan(xattn) * attend(y)
    yield TAN, tan + np.tan(dense) * ffw(tan)
    yield "a gate is tanh(alpha), not alpha", (z := y + xattn * attend(y)) + dense * ffw(z)
    yield "the feed-forward works on y, not on the branch alone", y + d * ffw(t * attend(y))


# --- 7.4: where the layers go ---------------------------------------------------------------------


@exercise("7.4")
def placed(answer):
    """answer(depth, every) -> int[count], the blocks with a layer before them."""
    for depth, every in ((40, 4), (80, 7), (24, 1), (3, 2)):
        right = np.arange(0, depth, every)
        expect(call(answer, depth, every), right, _place_mistakes(depth, every))


def _place_mistakes(depth, every):
    blocks, count = np.arange(depth), depth // every
    yield (
        "this is open-flamingo's (i + 1) % n == 0: block 0 must have a layer",
        blocks[(blocks + 1) % every == 0],
    )
    yield (
        "this is AFTER every n-th block: block 0 must have a layer before it",
        np.arange(every, depth + 1, every),
    )
    yield "block 0 must have a layer", np.arange(every, depth, every)
    yield (
        f"the last layer is missing: {depth} / {every} is rounded down",
        np.arange(count) * every,
    )
    yield f"there is no block {count * every}", np.arange(0, depth + 1, every)
    yield "blocks are counted from 0", np.arange(1, depth + 1, every)
    yield (
        "these are the numbers of the layers; those of the blocks are wanted",
        np.arange(-(-depth // every)),
    )
    yield "these are truths for all blocks: the indices are wanted", blocks % every == 0


# --- 7.5: the folded gate's gradient --------------------------------------------------------------


@exercise("7.5")
def gate_gradients(answer):
    """answer(dout [G, M, D], a [G, M, I], alpha [G], weight [G, D, I]) -> [G]."""
    for seed, (G, M, D, I) in enumerate(((3, 5, 4, 2), (2, 3, 3, 3), (1, 2, 4, 3))):
        rng = np.random.default_rng(seed)
        dout, a, weight = (rng.normal(size=(G, *s)) for s in ((M, D), (M, I), (D, I)))
        alpha = np.linspace(-1.2, 0.7, G)
        dfull = dout.swapaxes(1, 2) @ a
        right = (1 - np.tanh(alpha) ** 2) * (weight * dfull).sum(axis=(1, 2))
        mistakes = _gradient_mistakes(dout, a, alpha, weight, dfull)
        expect(call(answer, dout, a, alpha, weight), right, mistakes)


def _gradient_mistakes(dout, a, alpha, weight, dfull):
    t, product = np.tanh(alpha), (weight * dfull).sum(axis=(1, 2))
    slope = 1 - t * t
    yield "the factor 1 - tanh(alpha)^2 is missing", product
    yield "`tan` where `tanh` was meant: 1 + tan(alpha)^2", (1 + np.tan(alpha) ** 2) * product
    yield "1 - tanh(alpha), without the square", (1 - t) * product
    yield "1 - alpha^2: the square is of tanh(alpha)", (1 - alpha**2) * product
    yield "tanh(alpha) where its derivative was meant", t * product
    yield "dW' is taken as if the gate stood at 1: no tanh(alpha) in it", slope * t * product
    yield "the weight is missing: <W, dW'>, not the sum of dW'", slope * dfull.sum(axis=(1, 2))
    yield (
        "a mean: alpha acts on every number, so the products are summed",
        slope * (weight * dfull).mean(axis=(1, 2)),
    )
    yield "one number for EACH gate: sum over the last two axes only", (slope * product).sum()
    yield (
        "one gradient for each row of W: sum over both of its axes",
        slope[:, None] * (weight * dfull).sum(axis=2),
    )
    yield (
        "one gradient for each column of W: sum over both of its axes",
        slope[:, None] * (weight * dfull).sum(axis=1),
    )
    yield "this is dW, of all gates; one number a gate is wanted", t[:, None, None] * dfull
    across = np.einsum("gmd,hmi,gdi->g", dout, a, weight)
    yield "the gates are mixed: each has its own a", slope * across
