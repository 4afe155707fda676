"""Checks of module 08: the gate, slopes by differences, one layer, all layers, the folded gate."""

import math

import numpy as np

from .core import Wrong, apart, as_array, call, exercise, expect, named, several

TAN = "`tan` where `tanh` was meant: beyond alpha = 1.57 it jumps to the opposite sign"

# --- 8.1: the gate --------------------------------------------------------------------------------


@exercise("8.1")
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


# --- 8.2: slopes by differences -------------------------------------------------------------------


def differences(loss, alphas, h=1e-6):
    """The slope of a function of one number at each of alphas [n], by central differences: [n]."""
    return np.array([(loss(a + h) - loss(a - h)) / (2 * h) for a in alphas])


@exercise("8.2")
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
    wanted, found = apart(right[place], got[place])
    return f"wrong slope at place {place}: {wanted} is right, got {found}"


# --- 8.3: the layer -------------------------------------------------------------------------------


@exercise("8.3")
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


# --- 8.4: a Flamingo of functions -----------------------------------------------------------------


def flamingo_case(depth, every, seed=0, L=4, D=3):
    """y [2, L, D], blocks, layers, every, sees bool [2, L]: functions that mind their order."""
    rng = np.random.default_rng(seed)

    def step(weight, size):
        return lambda y: y + size * np.tanh(y @ weight)

    blocks = [step(rng.normal(size=(D, D)), 1) for _ in range(depth)]
    layers = [step(rng.normal(size=(D, D)), 0.5) for _ in range(-(-depth // every))]
    sees = np.array([[False, False] + [True] * (L - 2), [True] * L])
    return rng.normal(size=(2, L, D)), blocks, layers, every, sees


@exercise("8.4")
def run(answer):
    """answer(y [B, L, D], blocks, layers, every, sees bool[B, L]) -> ([B, L, D], float[layers])."""
    for seed, (depth, every) in enumerate(((5, 2), (4, 1), (7, 3))):
        case = flamingo_case(depth, every, seed)
        right = flamingo_of(*case)
        names = "the pair (y [B, L, D], shares [layers])"
        y, shares = several(call(answer, *case), right, names, shapes=False)
        expect(y, right[0], _stream_mistakes(*case), named("the first, the stream"))
        expect(shares, right[1], _added_mistakes(*case), named("the second, the shares"))


def flamingo_of(y, blocks, layers, every, sees, here=lambda i, n: i % n == 0, after=False,
                which=None, skip=None, share=None):  # fmt: skip
    """Blocks with a layer before every n-th, and each layer's share; with places for mistakes."""
    skip = skip or (lambda new, y: np.where(sees[..., None], new, y))
    share = share or (lambda new, y: np.linalg.norm(new - y) / np.linalg.norm(y))
    shares = []
    for i, block in enumerate(blocks):
        y = block(y) if after else y
        if here(i, every):
            layer = layers[which(i, len(shares)) if which else len(shares)]
            new = skip(layer(y), y)
            shares.append(share(new, y))
            y = new
        y = y if after else block(y)
    return y, np.array(shares)


def _stream_mistakes(y, blocks, layers, every, sees):
    def wrong(**how):
        return flamingo_of(y, blocks, layers, every, sees, **how)[0]

    n = len(layers)
    yield "the layer stands BEFORE its block: yours stands after it", wrong(after=True)
    yield (
        "this is open-flamingo's (i + 1) % n == 0: block 0 must have a layer",
        wrong(here=lambda i, n: (i + 1) % n == 0),
    )
    yield (
        "this is open-flamingo's (i + 1) % n == 0: block 0 must have a layer, and each its own",
        wrong(here=lambda i, n: (i + 1) % n == 0, which=lambda i, count: i // every),
    )
    yield "block 0 must have a layer", wrong(here=lambda i, n: i > 0 and i % n == 0)
    yield (
        "block 0 must have a layer, and it is layer 0",
        wrong(here=lambda i, n: i > 0 and i % n == 0, which=lambda i, _: i // every),
    )
    yield (
        "there is a layer before EVERY block here; before every n-th is wanted",
        wrong(here=lambda i, n: True, which=lambda i, _: min(i, n - 1)),
    )
    yield (
        "there is a layer before EVERY block here; before every n-th is wanted",
        wrong(here=lambda i, n: True, which=lambda i, _: i // every),
    )
    yield "every layer is layer 0 here", wrong(which=lambda i, _: 0)
    yield "the layers are taken from the last to the first", wrong(which=lambda i, m: n - 1 - m)
    yield (
        "the layers are counted apart from the blocks: before block i stands layer i // n",
        wrong(which=lambda i, _: i % n),
    )
    yield (
        "the skip is missing: a token that sees no image goes past the layer",
        wrong(skip=lambda new, y: new),
    )
    yield (
        "upside down: here the tokens WITH an image go past the layer",
        wrong(skip=lambda new, y: np.where(sees[..., None], y, new)),
    )
    yield (
        "a token that sees no image keeps its row; yours becomes 0",
        wrong(skip=lambda new, y: new * sees[..., None]),
    )
    yield (
        "the layer has added its branches to y already: y is in it",
        wrong(skip=lambda new, y: np.where(sees[..., None], y + new, y)),
    )
    yield "the layers are missing: these are the blocks alone", wrong(here=lambda i, n: False)
    yield (
        "block and layer, one after the other: here a block with a layer is left out",
        _either(y, blocks, layers, every, sees),
    )
    yield "the last block is missing", flamingo_of(y, blocks[:-1], layers, every, sees)[0]


def _either(y, blocks, layers, every, sees):
    for i, block in enumerate(blocks):
        new = layers[i // every](y)
        y = block(y) if i % every else np.where(sees[..., None], new, y)
    return y


def _added_mistakes(y, blocks, layers, every, sees):
    def wrong(share, skip=None):
        return flamingo_of(y, blocks, layers, every, sees, share=share, skip=skip)[1]

    norm = np.linalg.norm
    yield (
        "this is |y'| / |y|: only what the layer ADDS, y' - y",
        wrong(lambda n, y: norm(n) / norm(y)),
    )
    yield (
        "the share is of the stream BEFORE the layer, y",
        wrong(lambda n, y: norm(n - y) / norm(n)),
    )
    yield "not divided by |y|: a share is wanted", wrong(lambda n, y: norm(n - y))
    yield "these are squares: take the root", wrong(lambda n, y: (norm(n - y) / norm(y)) ** 2)
    yield (
        "this is the difference of two sizes; the size of the difference is wanted",
        wrong(lambda n, y: norm(n) / norm(y) - 1),
    )
    yield "this is |y| / |y' - y|", wrong(lambda n, y: norm(y) / norm(n - y))
    yield (
        "|.| is the root of the sum of squares, not the sum of sizes",
        wrong(lambda n, y: abs(n - y).sum() / abs(y).sum()),
    )
    yield (
        "one share for a layer, of all numbers together; yours is a mean over the tokens",
        wrong(lambda n, y: (norm(n - y, axis=-1) / norm(y, axis=-1)).mean()),
    )
    yield (
        "one share for a layer, of all numbers together; yours is a mean over the pages",
        wrong(lambda n, y: np.mean([norm(a - b) / norm(b) for a, b in zip(n, y)])),
    )
    seen = sees[..., None]
    yield (
        "the share is of the WHOLE stream, also of tokens that see no image",
        wrong(lambda n, y: norm(n - y) / norm(y * seen)),
    )
    right, whole = flamingo_of(y, blocks, layers, every, sees)[1], []
    stream = y
    for i, block in enumerate(blocks):
        before = stream
        if i % every == 0:
            stream = np.where(seen, layers[i // every](stream), stream)
            whole.append(norm(block(stream) - before) / norm(before))
        stream = block(stream)
    yield "this is what layer and block add together: measure before the block", np.array(whole)
    yield "one share for each layer, not one for each block", _spread(right, every, len(blocks))
    yield "one share for each layer is wanted, not their mean", right.mean()


def _spread(shares, every, depth):
    out = np.zeros(depth)
    out[::every] = shares
    return out


# --- 8.5: the gated feed-forward, backwards -------------------------------------------------------

FIVE = "a tuple (out, dy, dup, ddown, dalpha)"
NAMES = ("out", "dy", "dup", "ddown", "dalpha")


def feed_forward_case(alpha, L, D, I, seed):
    """dout and y [L, D], up [I, D], down [D, I], alpha []: float64, random."""
    rng = np.random.default_rng(seed)
    dout, y = rng.normal(size=(2, L, D))
    return dout, y, rng.normal(size=(I, D)), rng.normal(size=(D, I)), np.array(alpha)


@exercise("8.5")
def feed_forward_gradients(answer):
    """answer(dout [L, D], y [L, D], up [I, D], down [D, I], alpha []) -> out, four gradients."""
    for seed, (alpha, *sizes) in enumerate(((0.8, 5, 4, 7), (-1.3, 3, 3, 3), (0.0, 2, 4, 3))):
        case = feed_forward_case(alpha, *sizes, seed)
        right = gated_backward(*case)
        arrays = several(call(answer, *case), right, FIVE)
        for i in (0, 4, 3, 2, 1):  # forward first, then the way back
            mistakes = [(f"{NAMES[i]}: {words}", gated_backward(*case, **how)[i])
                        for only, words, how in BACKWARD_MISTAKES if i in only]  # fmt: skip
            expect(arrays[i], right[i], mistakes, named(NAMES[i]))


def gated_backward(dout, y, up, down, alpha, slope=lambda a: 1 - np.tanh(a) ** 2, gate=np.tanh,
                   gate_in_dalpha=False, inner=1, through=True, straight=1, act=2, weights=None,
                   reduce=np.sum):  # fmt: skip
    """Equations (3) and (4) for y + tanh(alpha) relu(y up^T)^2 down^T; places for mistakes."""
    before = y @ up.T
    positive = np.maximum(before, 0)
    hidden = positive**act
    full = dout.T @ hidden  # dW' of equation (4), as if the gate stood at 1
    share = gate(alpha) if gate_in_dalpha else 1
    dalpha = slope(alpha) * share * reduce((down if weights is None else weights) * full)
    dhidden = gate(alpha) ** inner * dout @ down
    local = (2 * positive if act == 2 else before > 0) if through else 1
    dbefore = dhidden * local
    out = straight * y + gate(alpha) * hidden @ down.T
    return out, straight * dout + dbefore @ up, dbefore.T @ y, gate(alpha) * full, dalpha


BACKWARD_MISTAKES = [
    ((0,), "y is missing: y + tanh(alpha) branch", {"straight": 0}),
    ((0, 3), "the gate is missing", {"gate": lambda a: 1}),
    ((0, 3), "`tan` where `tanh` was meant", {"gate": np.tan}),
    ((0, 3, 4), "the square of the ReLU is missing", {"act": 1}),
    ((4,), "the factor 1 - tanh(alpha)^2 is missing", {"slope": lambda a: 1}),
    ((4,), "`tan` where `tanh` was meant", {"slope": lambda a: 1 + np.tan(a) ** 2}),
    ((4,), "tanh(alpha) where its derivative was meant", {"slope": np.tanh}),
    ((4,), "1 - alpha^2: the square is of tanh(alpha)", {"slope": lambda a: 1 - a * a}),
    ((4,), "dW' is taken as if the gate stood at 1: no tanh(alpha) in it", {"gate_in_dalpha": 1}),
    ((4,), "the weight is missing: <W, dW'>, not the sum of dW'", {"weights": 1}),
    ((4,), "a mean: alpha acts on every number, so sum", {"reduce": np.mean}),
    ((1, 2), "the gate is missing on the way back", {"inner": 0}),
    ((1, 2), "the gate acts twice on the way back", {"inner": 2}),
    ((1, 2), "the ReLU's square has a slope, too: 2 relu(y up^T)", {"through": False}),
    ((1, 2), "that is the slope of the ReLU, not of its square", {"act": 1}),
    ((1,), "y goes straight through, too: add dout", {"straight": 0}),
]
