"""Right and wrong answers to the exercises of module 08, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_08 import differences, gated_backward, layer_of
from miniflamingo.xattn import tanh_gate

# --- 8.1 and 7.2 ----------------------------------------------------------------------------------


def gate_by_exponentials(y, alpha, branch):
    return y + (1 - 2 / (np.exp(2 * alpha) + 1)) * branch


def gate_in_place(y, alpha, branch):
    y += np.tanh(alpha) * branch
    return y


def slopes(loss, alphas, h=1e-5, up=1, down=1, by=2):
    """An answer as students write it, with a place for each mistake."""
    return [(loss(a + up * h) - loss(a - down * h)) / (by * h) for a in alphas]


def slopes_into_an_array(loss, alphas):
    out = np.zeros(len(alphas))
    for i, a in enumerate(alphas):
        out[i] = (loss(a + 1e-6) - loss(a - 1e-6)) / 2e-6
    return out


# --- 8.3 ------------------------------------------------------------------------------------------


def layer(y, xattn, dense, attend, ffw, gate=np.tanh, see="new", add="new"):
    new = y + gate(xattn) * attend(y)
    return {"new": new, "old": y, "none": 0}[add] + gate(dense) * ffw(new if see == "new" else y)


# --- 8.4 ------------------------------------------------------------------------------------------


def run(y, blocks, layers, every, sees, own=None, order=None, share=None, block_too=True):
    """An answer with a place for each mistake."""
    left, shares = list(layers), []
    own = own or (lambda i: i % every == 0)
    for i, block in enumerate(blocks):
        if own(i) and left:
            new = (order or (lambda left: left.pop(0)))(left)(y)
            new = y + (new - y) * sees[:, :, None]
            shares.append((share or measured)(new, y))
            y = new
            if not block_too:
                continue
        y = block(y)
    return y, np.array(shares)


def measured(new, y):
    return np.sqrt(((new - y) ** 2).sum() / (y**2).sum())


def run_token_by_token(y, blocks, layers, every, sees):
    """The skip by places, the shares from all streams afterwards; plain lists."""
    streams, layers = [], iter(layers)
    for i, block in enumerate(blocks):
        if not i % every:
            new, given = y.copy(), next(layers)(y)
            for place in np.argwhere(sees):
                new[tuple(place)] = given[tuple(place)]
            streams.append((y, new))
            y = new
        y = block(y)
    return y.tolist(), [float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in streams]


def run_by_the_library(y, blocks, layers, every, sees):
    def inserted(layer):
        return lambda y: np.where(sees[..., None], layer(y), y)

    chain, shares = list(blocks), []
    for number in reversed(range(len(layers))):
        chain.insert(number * every, inserted(layers[number]))
    for i, step in enumerate(chain):
        before, y = y, step(y)
        if i % (every + 1) == 0:
            shares.append(np.linalg.norm(y - before) / np.linalg.norm(before))
    return y, shares


def run_after(y, blocks, layers, every, sees):
    shares = []
    for i, block in enumerate(blocks):
        y = block(y)
        if i % every == 0:
            new = np.where(sees[..., None], layers[len(shares)](y), y)
            shares.append(measured(new, y))
            y = new
    return y, np.array(shares)


def run_in_place(y, *rest):
    out = run(y, *rest)
    y += 1
    return out


def seeing(change):
    return lambda y, blocks, layers, every, sees: run(y, blocks, layers, every, change(sees))


def sharing(share):
    return lambda *case: run(*case, share=share)


norm = np.linalg.norm


# --- 8.5 ------------------------------------------------------------------------------------------


def backward_by_differences(dout, y, up, down, alpha, h=1e-6):
    """Each number of the arguments moved a little: slow, and right."""

    def loss(y, up, down, alpha):
        return np.vdot(dout, y + np.tanh(alpha) * np.maximum(y @ up.T, 0) ** 2 @ down.T)

    found, arguments = [], [np.array(x, float) for x in (y, up, down, alpha)]
    dout = np.array(dout, float)
    for x in arguments:
        slope = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            kept, ends = x[place], []
            for x[place] in (kept + h, kept - h):
                ends.append(loss(*arguments))
            x[place] = kept
            slope[place] = (ends[0] - ends[1]) / (2 * h)
        found.append(slope)
    y, up, down, alpha = arguments
    return (y + np.tanh(alpha) * np.maximum(y @ up.T, 0) ** 2 @ down.T, *found)


def backward_in_place(dout, y, up, down, alpha):
    out, dy, *others = gated_backward(dout, y, up, down, alpha)
    dout += dy - dout
    return out, dout, *others


RIGHT = [
    ("8.5", gated_backward),
    ("8.5", backward_by_differences),
    ("8.1", tanh_gate),
    ("8.1", gate_by_exponentials),
    ("8.2", slopes),
    ("8.2", slopes_into_an_array),
    ("8.2", differences),
    ("8.3", layer),
    ("8.3", layer_of),
    ("8.3", lambda y, a, d, attend, ffw: tanh_gate(z := tanh_gate(y, a, attend(y)), d, ffw(z))),
    ("8.4", run),
    ("8.4", run_token_by_token),
    ("8.4", run_by_the_library),
    ("8.1", lambda y, a, b: tanh_gate(y, a, b).astype(np.float32)),
]

WRONG = [
    ("8.5", lambda *a: gated_backward(*a, slope=lambda x: 1), "the factor 1 - tanh(alpha)^2 is"),
    ("8.5", lambda *a: gated_backward(*a, slope=lambda x: 1 + np.tan(x) ** 2), "`tan` where"),
    ("8.5", lambda *a: gated_backward(*a, slope=np.tanh), "where its derivative was meant"),
    ("8.5", lambda *a: gated_backward(*a, gate_in_dalpha=True), "no tanh(alpha) in it"),
    ("8.5", lambda *a: gated_backward(*a, weights=1), "the weight is missing"),
    ("8.5", lambda *a: gated_backward(*a, reduce=np.mean), "a mean"),
    ("8.5", lambda *a: gated_backward(*a, gate=lambda x: 1), "the gate is missing"),
    ("8.5", lambda *a: gated_backward(*a, inner=0), "the gate is missing on the way back"),
    ("8.5", lambda *a: gated_backward(*a, through=False), "has a slope, too"),
    ("8.5", lambda *a: gated_backward(*a, act=1), "the square of the ReLU is missing"),
    ("8.5", lambda *a: gated_backward(*a, straight=0), "y is missing"),
    ("8.5", lambda *a: gated_backward(*a)[1:], "a tuple (out, dy, dup, ddown, dalpha) is wanted"),
    ("8.5", lambda *a: [x.T for x in gated_backward(*a)], "wrong shape of number 1"),
    ("8.5", backward_in_place, "in place: copy it first, or write x = x + ..."),
    ("8.1", lambda y, a, b: y + np.tan(a) * b, "`tan` where `tanh` was meant"),
    ("8.1", lambda y, a, b: y + a * b, "this is alpha itself"),
    ("8.1", lambda y, a, b: y + np.tanh(a * b), "of alpha alone, not of the branch"),
    ("8.1", lambda y, a, b: np.tanh(a) * b, "y is missing"),
    ("8.1", lambda y, a, b: np.tanh(a) * (y + b), "only the branch is scaled"),
    ("8.1", lambda y, a, b: b + np.tanh(a) * y, "it belongs on the branch"),
    ("8.1", lambda y, a, b: y + b / (1 + np.exp(-a)), "a sigmoid is half open"),
    ("8.1", lambda y, a, b: y + np.tanh(a) * (b - y), "no mixture"),
    ("8.1", lambda y, a, b: y + b, "the gate is missing"),
    ("8.1", lambda y, a, b: tanh_gate(y, a, b).sum(), "wrong shape"),
    ("8.2", lambda *a: slopes(*a, by=1), "divide by 2h"),
    ("8.2", lambda *a: slopes(*a, down=0), "off by a factor of 0.5"),
    ("8.2", lambda *a: slopes(*a, down=0, by=1), "one-sided"),
    ("8.2", lambda *a: slopes(*a, up=0, by=1), "one-sided"),
    ("8.2", lambda *a: slopes(*a, by=-2), "the sign: f(alpha + h) comes first"),
    ("8.2", lambda *a: slopes(*a, h=0.1), "h = 0.1 is too large"),
    ("8.2", lambda *a: slopes(*a, h=0.03), "close, but no gradient check"),
    ("8.2", lambda *a: slopes(*a, h=1e-14), "close, but no gradient check"),
    ("8.2", lambda *a: slopes(*a, by=2e5), "off by a factor of 1e-05 everywhere"),
    ("8.2", lambda loss, alphas: [loss(a) for a in alphas], "the values of the loss"),
    ("8.2", lambda loss, alphas: loss(alphas + 1e-6), "your code stops with TypeError"),
    ("8.2", lambda loss, alphas: slopes(loss, alphas)[0], "wrong shape: [4] is wanted, got []"),
    ("8.3", lambda *a: layer(*a, see="old"), "sees the OLD y"),
    ("8.3", lambda *a: layer(*a, add="old"), "the first branch is lost"),
    ("8.3", lambda *a: layer(*a, add="none"), "the second y is missing"),
    ("8.3", lambda y, a, d, f, g: layer(y, d, a, f, g), "the two gates are exchanged"),
    ("8.3", lambda y, a, d, f, g: layer(y, a, a, f, g), "the gate of the attention"),
    ("8.3", lambda y, a, d, f, g: layer(y, d, a, g, f), "the attention comes first"),
    ("8.3", lambda *a: layer(*a, gate=np.tan), "`tan` where `tanh` was meant"),
    ("8.3", lambda *a: layer(*a, gate=lambda x: x), "a gate is tanh(alpha), not alpha"),
    ("8.3", lambda *a: layer(*a, gate=lambda x: 1), "no gate"),
    ("8.3", lambda y, a, d, f, g: y + np.tanh(a) * f(y), "the feed-forward is missing"),
    ("8.4", lambda *a: run(*a, own=lambda i: (i + 1) % a[3] == 0), "open-flamingo's"),
    ("8.4", lambda *a: run(*a, own=lambda i: i and i % a[3] == 0), "block 0 must have a layer"),
    (
        "8.4",
        lambda *a: run(
            *a, own=lambda i: True, order=lambda left: left[0] if len(left) < 2 else left.pop(0)
        ),
        "before EVERY block here",
    ),
    ("8.4", run_after, "stands BEFORE its block"),
    ("8.4", lambda *a: run(*a, order=lambda left: left[0]), "every layer is layer 0"),
    ("8.4", lambda *a: run(*a, order=lambda left: left.pop()), "from the last to the first"),
    ("8.4", lambda *a: run(*a, block_too=False), "a block with a layer is left out"),
    ("8.4", lambda *a: run(*a, own=lambda i: False), "these are the blocks alone"),
    ("8.4", lambda y, b, *a: run(y, b[:-1], *a), "the last block is missing"),
    ("8.4", seeing(lambda sees: sees | True), "the skip is missing"),
    ("8.4", seeing(np.logical_not), "upside down"),
    ("8.4", sharing(lambda new, y: norm(new) / norm(y)), "only what the layer ADDS"),
    ("8.4", sharing(lambda new, y: norm(new - y) / norm(new)), "the stream BEFORE the layer"),
    ("8.4", sharing(lambda new, y: norm(new - y)), "not divided by |y|"),
    ("8.4", sharing(lambda new, y: measured(new, y) ** 2), "take the root"),
    ("8.4", sharing(lambda new, y: abs(new - y).sum() / abs(y).sum()), "not the sum of sizes"),
    ("8.4", sharing(lambda new, y: norm(new) / norm(y) - 1), "the size of the difference"),
    ("8.4", lambda *a: (run(*a)[0], run(*a)[1].mean()), "not their mean"),
    ("8.4", lambda *a: run(*a)[0], "the pair (y [B, L, D], shares [layers]) is wanted"),
    ("8.4", run_in_place, "changes its argument number 1 in place"),
    ("8.1", lambda y, a, b: tanh_gate(y, a, b).astype(np.float16), "float16 has 3 digits"),
    ("8.1", gate_in_place, "in place: copy it first, or write x = x + ..."),
    ("8.2", lambda *a: slopes(*a, h=1e-16), "wrong slope at place"),
]
