"""Checks of module 02: layer norm, a block, the gradient of half of one, walking a tape."""

import numpy as np

from miniflamingo.functional import layer_norm

from .core import Wrong, call, exercise, expect, named, same, several

# --- 2.1: the layer norm --------------------------------------------------------------------------


def norm_case(seed=0, shape=(2, 3, 5)):
    """x [..., D], gain [D], offset [D]: float64, random, far from 0."""
    rng = np.random.default_rng(seed)
    D = shape[-1]
    return rng.normal(4, 3, shape), rng.normal(1, 0.3, D), rng.normal(0, 0.5, D)


@exercise("2.1")
def norm(answer):
    """answer(x [..., D], gain [D], offset [D]) -> [..., D]."""
    for seed, shape in ((0, (2, 3, 5)), (1, (4, 4)), (2, (6,)), (3, (2, 2, 3, 8))):
        x, gain, offset = norm_case(seed, shape)
        right = layer_norm(x, gain, offset)
        expect(call(answer, x, gain, offset), right, _norm_mistakes(x, gain, offset))
    x, gain, offset = norm_case(4)
    near = 4 + x / 1000  # where eps counts
    mistakes = _norm_mistakes(near, gain, offset)
    expect(call(answer, near, gain, offset), layer_norm(near, gain, offset), mistakes)
    x[0, 0] = 7.0  # no deviation at all
    mistakes = [("a row of equal numbers has a deviation of 0: add eps under the root", np.nan * x)]
    expect(call(answer, x, gain, offset), layer_norm(x, gain, offset), mistakes)


def _norm_mistakes(x, gain, offset, eps=1e-5):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    sigma = np.sqrt(variance + eps)
    yield "the mean is not taken off", gain * x / sigma + offset
    yield "the gain is missing", centred / sigma + offset
    yield "the offset is missing", gain * centred / sigma
    yield (
        "divide by the DEVIATION: the root of the variance is missing",
        (gain * centred / (variance + eps) + offset),
    )
    yield "the offset is divided, too: it is added at the end", (gain * centred + offset) / sigma
    yield "the gain multiplies the offset, too", gain * (centred / sigma + offset)
    yield (
        "RMS norm: the mean belongs into the deviation, too",
        (gain * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) + offset),
    )
    yield (
        "the variance is divided by D, not by D - 1",
        (gain * centred / np.sqrt(variance * x.shape[-1] / (x.shape[-1] - 1) + eps) + offset),
    )
    yield (
        "eps stands under the root: sqrt(variance + eps)",
        (gain * centred / (np.sqrt(variance) + eps) + offset),
    )
    everything = (x - x.mean()) / np.sqrt(x.var() + eps)
    yield "one mean for all rows: each token has its own (axis=-1)", gain * everything + offset
    if x.ndim > 1:
        over = (x - x.mean(axis=-2, keepdims=True)) / np.sqrt(x.var(axis=-2, keepdims=True) + eps)
        yield "wrong axis: the mean is over the D numbers of one token", gain * over + offset


# --- 2.2: a block ---------------------------------------------------------------------------------


def block(x, attend, norm, up, down):
    """Equations (3) and (4) of the module."""
    y = x + attend(norm(x))
    return y + np.maximum(norm(y) @ up, 0) @ down


def block_case(seed=0, shape=(2, 4, 5), F=7):
    """x, attend, norm, up, down: an attention that moves tokens, a norm without gain."""
    rng, D = np.random.default_rng(seed), shape[-1]
    mix, value = rng.normal(size=(shape[-2], shape[-2])), rng.normal(size=(D, D))

    def attend(rows):
        return mix @ rows @ value

    def plain(rows):
        return layer_norm(rows, np.ones(D), np.zeros(D))

    return rng.normal(1, 2, shape), attend, plain, rng.normal(size=(D, F)), rng.normal(size=(F, D))


@exercise("2.2")
def whole_block(answer):
    """answer(x [..., D], attend, norm, up [D, F], down [F, D]) -> [..., D]."""
    for seed, shape in ((0, (2, 4, 5)), (1, (3, 6)), (2, (1, 2, 3, 4))):
        case = block_case(seed, shape)
        expect(call(answer, *case), block(*case), _block_mistakes(*case))


def _block_mistakes(x, attend, norm, up, down):
    y, relu = x + attend(norm(x)), lambda h: np.maximum(h, 0)
    part = relu(norm(y) @ up) @ down
    yield "the stream is cut: the second part is added to y", part
    yield (
        "the stream is cut: the first part is added to x",
        (attend(norm(x)) + relu(norm(attend(norm(x))) @ up) @ down),
    )
    yield "the second part is added to x: it belongs on y", x + part
    yield "the second part reads x: it reads y, behind attention", y + relu(norm(x) @ up) @ down
    yield (
        "both parts side by side: the second reads what the first has added",
        (x + attend(norm(x)) + relu(norm(x) @ up) @ down),
    )
    yield "attention reads x without a norm", block(x, lambda r: attend(x), norm, up, down)
    yield "the feed-forward part reads y without a norm", y + relu(y @ up) @ down
    yield "no norm at all", block(x, attend, lambda r: r, up, down)
    yield "the ReLU is missing", y + norm(y) @ up @ down
    yield "the ReLU stands between the matrices, not behind them", y + relu(norm(y) @ up @ down)
    yield "the ReLU acts on the row before the first matrix", y + relu(norm(y)) @ up @ down
    behind = norm(x + attend(x))
    yield (
        "the norm stands BEFORE each part, inside of the sum",
        (norm(behind + relu(behind @ up) @ down)),
    )
    yield "the feed-forward part is missing", y
    yield "attention is missing", x + relu(norm(x) @ up) @ down
    yield (
        "the normed row goes on: the stream itself is never normed",
        (norm(x) + attend(norm(x)) + relu(norm(norm(x) + attend(norm(x))) @ up) @ down),
    )


# --- 2.3: the gradient of half a block ------------------------------------------------------------

PARTS = "dy, dgain, doffset, dup, ddown"


def half_case(seed, L, D, F):
    """dz, y [L, D], gain, offset [D], up [D, F], down [F, D]: random."""
    y, gain, offset = norm_case(seed, (L, D))
    rng = np.random.default_rng(seed + 9)
    return (
        rng.normal(size=(L, D)),
        y,
        gain,
        offset,
        rng.normal(size=(D, F)),
        rng.normal(size=(F, D)),
    )


@exercise("2.3")
def half_gradient(answer):
    """answer(dz, y, gain, offset, up, down) -> dy, dgain, doffset, dup, ddown."""
    for seed, sizes in ((0, (5, 4, 7)), (1, (1, 3, 6)), (2, (4, 4, 4))):
        case = half_case(seed, *sizes)
        right = half(*case)
        got = several(call(answer, *case), right, PARTS)
        for message, wrong in _half_mistakes(*case):
            if _all_same(got, wrong) and not _all_same(wrong, right):
                raise Wrong(message)
        for part, wanted, name in zip(got, right, PARTS.split(", ")):
            expect(part, wanted, (), named(name))


def _all_same(parts, others):
    return all(same(np.asarray(a), np.asarray(b)) for a, b in zip(parts, others))


def half(
    dz, y, gain, offset, up, down, eps=1e-5, stream=1, relu=True, mean=1, along=1, over=1,
    scale=None, late=False, rows_of=None, gain_of=None,
):  # fmt: skip
    """The right answer, with a place for each mistake."""
    centred = y - y.mean(axis=-1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    xhat = centred / sigma
    rows = gain * xhat + offset
    hidden = rows @ up
    active = np.maximum(hidden, 0)
    on = (hidden > 0) if relu else 1
    dhidden = dz @ down.T * on
    drows = dhidden @ up.T
    h = drows * (gain if scale is None else scale)
    dx = h - mean * h.mean(axis=-1, keepdims=True)
    dx = (dx - along * xhat * (h * xhat).mean(axis=-1, keepdims=True)) / sigma**over
    read = rows if rows_of is None else rows_of(y, xhat)
    dgain = (drows * (xhat if gain_of is None else gain_of(y, rows))).sum(axis=0)
    ddown = (hidden if late else active).T @ dz
    return [stream * dz + dx, dgain, drows.sum(axis=0), read.T @ dhidden, ddown]


def _half_mistakes(*case):
    wrong = lambda **how: half(*case, **how)  # noqa: E731
    dy, dgain, doffset, dup, ddown = right = wrong()
    yield "the stream is missing in dy: y is used twice, and dz arrives directly", wrong(stream=0)
    yield "the stream carries dz once, not twice", wrong(stream=2)
    yield "the ReLU's gradient is missing: 0 where its input was not above 0", wrong(relu=False)
    yield "the mean of h is not taken off: y also acts through mu", wrong(mean=0)
    yield "the part along xhat is not taken off: y also acts through sigma", wrong(along=0)
    yield "only the norm's direct term: y also acts through mu and sigma", wrong(mean=0, along=0)
    yield "both terms of (6) are taken off: two minus signs", wrong(along=-1)
    yield "the division by sigma is missing", wrong(over=0)
    yield "divided by sigma squared", wrong(over=2)
    yield "multiplied by sigma: divide", wrong(over=-1)
    D = case[1].shape[-1]
    yield "sums where equation (6) has means: divide by D", wrong(mean=D, along=D)
    yield "the gain is missing in h: h = gain times the gradient at the norm", wrong(scale=1)
    yield "dup: up reads the NORMED rows, not y", wrong(rows_of=lambda y, xhat: y)
    yield "dup: the normed rows have gain and offset", wrong(rows_of=lambda y, xhat: xhat)
    yield "ddown: down reads what the ReLU has let through", wrong(late=True)
    yield (
        "dgain: the gain multiplies xhat, not the normed rows",
        wrong(gain_of=lambda y, rows: rows),
    )
    yield "dgain: the gain multiplies xhat, not y", wrong(gain_of=lambda y, rows: y)
    if case[1].shape[0] == D:
        yield "dup is rows.T @ dhidden: yours is turned", [dy, dgain, doffset, dup.T, ddown]
        yield "ddown is the active numbers turned, times dz", [dy, dgain, doffset, dup, ddown.T]
    yield "wrong sign of all of it", [-part for part in right]


# --- 2.4: walking the tape ------------------------------------------------------------------------


class Value:
    """A value of the tape of this check."""

    def __init__(self, data):
        self.data = np.asarray(data, float)


class Notes(list):
    """The tape: `notes.record(formula, gradient, *values)` returns the value that comes out."""

    def record(self, formula, gradient, *inputs):
        """Compute, and leave a note."""
        out = Value(formula(*(v.data for v in inputs)))
        self.append((out, inputs, gradient))
        return out

    def times(self, a, b):
        """a b"""
        return self.record(np.multiply, lambda dout, x, y: (dout * y, dout * x), a, b)

    def plus(self, a, b):
        """a + b"""
        return self.record(np.add, lambda dout, x, y: (dout, dout), a, b)

    def square(self, a):
        """a a"""
        return self.record(np.square, lambda dout, x: (2 * x * dout,), a)


@exercise("2.4")
def walk(answer):
    """answer(notes, loss, wanted) -> the gradients of the wanted values, a list."""
    for notes, loss, wanted in (_used_twice(), _chain(), _stream(), _aside()):
        right, mistakes = gradients(notes, loss, wanted), _walk_mistakes(notes, loss, wanted)
        expect(call(answer, notes, loss, wanted), right, mistakes)


def gradients(notes, loss, wanted, add=True, order=reversed, skip=True, seed=1.0):
    """What is right, with a place for each mistake."""
    grads = {id(loss): seed + np.zeros_like(loss.data)}
    for out, inputs, gradient in order(notes):
        if id(out) not in grads and skip:
            continue
        dout = grads.get(id(out), np.ones_like(out.data))
        for value, d in zip(inputs, gradient(dout, *(v.data for v in inputs))):
            grads[id(value)] = grads.get(id(value), 0) + d if add else d
    return np.array([grads.get(id(v), np.zeros_like(v.data)) for v in wanted])


def _walk_mistakes(notes, loss, wanted):
    wrong = lambda **how: gradients(notes, loss, wanted, **how)  # noqa: E731
    yield (
        "what is used twice gets two gradients, and they are added: += where yours has =",
        (wrong(add=False)),
    )
    yield "only the last note counted: walk backwards, through all of them", wrong(order=iter)
    yield "a note that the loss does not depend on got a gradient: skip it", wrong(skip=False)
    yield "the loss's own gradient is 1, not 0", wrong(seed=0.0)
    yield "these are the values, not their gradients", np.array([v.data for v in wanted])
    once = gradients(notes, loss, wanted, seed=0.5)
    yield "the loss's own gradient is 1, not 1/2", once


def _used_twice():
    notes, a, b = Notes(), Value(3.0), Value(4.0)
    return notes, notes.plus(notes.times(a, b), a), [a, b]


def _chain():
    notes, a, b = Notes(), Value([2.0, -1.0]), Value([3.0, 5.0])
    u = notes.times(a, b)
    loss = notes.square(u)
    return notes, loss, [a, u, b, loss]


def _stream():
    notes, x, w = Notes(), Value([1.0, 2.0]), Value([0.5, -3.0])
    y = notes.plus(x, notes.times(x, w))  # the stream, and a part that reads it
    return notes, notes.plus(y, notes.square(y)), [x, w, y]


def _aside():
    notes, a, b = Notes(), Value(2.0), Value(7.0)
    loss = notes.square(a)
    notes.times(b, a)  # computed, and no part of the loss
    return notes, loss, [a, b]
