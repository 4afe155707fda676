"""Right and wrong answers to the exercises of module 02, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_02 import block, gradients
from miniflamingo.functional import layer_norm, layer_norm_backward

# --- 2.1 ------------------------------------------------------------------------------------------


def norm(x, gain, offset, eps=1e-5, axis=-1, root=np.sqrt, mean=True, ddof=0, inside=True):
    """An answer as students write it, with a place for each mistake."""
    centred = x - x.mean(axis=axis, keepdims=True) if mean else x
    variance = x.var(axis=axis, keepdims=True, ddof=ddof)
    return gain * centred / (root(variance + eps) if inside else root(variance) + eps) + offset


def norm_by_loops(x, gain, offset, eps=1e-5):
    out = np.empty(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        row = x[place]
        out[place] = gain * (row - row.mean()) / np.sqrt(row.var() + eps) + offset
    return out


def norm_of_all(x, gain, offset):
    return gain * (x - x.mean()) / np.sqrt(x.var() + 1e-5) + offset


# --- 2.2 ------------------------------------------------------------------------------------------


def whole(x, attend, norm, up, down, stream=True, first=None, second=None, relu=True, late=False):
    """An answer as students write it, with a place for each mistake."""
    y = x + attend(norm(x) if first is None else first(x))
    h = (norm(y) if second is None else second(y, x, norm)) @ up
    part = np.maximum(h, 0) @ down if relu and not late else h @ down
    part = np.maximum(part, 0) if late else part
    return y + part if stream else part


def post_norm(x, attend, norm, up, down):
    y = norm(x + attend(x))
    return norm(y + np.maximum(y @ up, 0) @ down)


def side_by_side(x, attend, norm, up, down):
    return x + attend(norm(x)) + np.maximum(norm(x) @ up, 0) @ down


def in_place_on_a_copy(x, attend, norm, up, down):
    x = x.copy()
    x += attend(norm(x))
    h = norm(x) @ up
    h[h < 0] = 0
    x += h @ down
    return x


# --- 2.3 ------------------------------------------------------------------------------------------


def gradient(dz, y, gain, offset, up, down, eps=1e-5, stream=True, relu=True, mean=1, along=1,
             over=1, h_of=None, read=None, late=False, axis=0):  # fmt: skip
    """An answer as students write it, with a place for each mistake."""
    sigma = np.sqrt(y.var(-1, keepdims=True) + eps)
    xhat = (y - y.mean(-1, keepdims=True)) / sigma
    rows = gain * xhat + offset
    hidden = rows @ up
    dhidden = dz @ down.T
    if relu:
        dhidden[hidden <= 0] = 0
    drows = dhidden @ up.T
    h = drows * (gain if h_of is None else h_of)
    dx = h - mean * h.mean(-1, keepdims=True) - along * xhat * (h * xhat).mean(-1, keepdims=True)
    dy = dx / sigma**over + (dz if stream else 0)
    dup = (rows if read is None else read(y, xhat)).T @ dhidden
    ddown = (hidden if late else np.maximum(hidden, 0)).T @ dz
    return dy, (drows * xhat).sum(axis=axis), drows.sum(axis=axis), dup, ddown


def gradient_by_differences(*case):
    dz, *inputs = [x.copy() for x in case]

    def loss():
        y, gain, offset, up, down = inputs
        z = y + np.maximum(layer_norm(y, gain, offset) @ up, 0) @ down
        return (dz * z).sum()

    grads = []
    for x in inputs:
        grads.append(np.zeros(x.shape))
        for place in np.ndindex(x.shape):
            kept, ends = x[place], []
            for x[place] in (kept + 1e-5, kept - 1e-5):
                ends.append(loss())
            x[place] = kept
            grads[-1][place] = (ends[0] - ends[1]) / 2e-5
    return grads


def gradient_of_the_library(dz, y, gain, offset, up, down):
    rows = layer_norm(y, gain, offset)
    dhidden = np.where(rows @ up > 0, dz @ down.T, 0)
    dx, dgain, doffset = layer_norm_backward(dhidden @ up.T, y, gain, offset)
    return [dz + dx, dgain, doffset, rows.T @ dhidden, np.maximum(rows @ up, 0).T @ dz]


def in_place(dz, y, gain, offset, up, down):
    case = dz.copy(), y.copy(), gain, offset, up, down
    y -= y.mean(axis=-1, keepdims=True)
    return gradient(*case)


def with_turned_down(*case):
    *parts, ddown = gradient(*case)
    return [*parts, ddown.T if ddown.shape[0] == ddown.shape[1] else ddown]


# --- 2.4 ------------------------------------------------------------------------------------------


def walk_recursively(notes, loss, wanted):
    grads = {}
    made_by = {id(out): (inputs, gradient) for out, inputs, gradient in notes}

    def visit(value, d):
        grads[id(value)] = grads.get(id(value), 0) + d
        if id(value) in made_by:
            inputs, gradient = made_by[id(value)]
            for v, part in zip(inputs, gradient(d, *[v.data for v in inputs])):
                visit(v, part)

    visit(loss, np.ones_like(loss.data))
    return [grads.get(id(v), 0 * v.data) for v in wanted]


def walk_with_lists(notes, loss, wanted):
    values, grads = [loss], [np.ones_like(loss.data)]
    for out, inputs, gradient in notes[::-1]:
        total = sum((g for v, g in zip(values, grads) if v is out), start=0 * out.data)
        for v, d in zip(inputs, gradient(total, *[v.data for v in inputs])):
            values.append(v)
            grads.append(d)
    return [sum((g for v, g in zip(values, grads) if v is w), start=0 * w.data) for w in wanted]


def turned(notes, loss, wanted):
    return gradients(notes, loss, wanted)[::-1]


RIGHT = [
    ("2.1", norm), ("2.1", norm_by_loops), ("2.1", lambda x, g, b: layer_norm(x, g, b)),
    ("2.2", whole), ("2.2", in_place_on_a_copy), ("2.2", block),
    ("2.3", gradient), ("2.3", gradient_by_differences), ("2.3", gradient_of_the_library),
    ("2.4", gradients), ("2.4", walk_recursively), ("2.4", walk_with_lists),
]  # fmt: skip
WRONG = [
    ("2.1", lambda *a: norm(*a, axis=-2 if a[0].ndim > 1 else -1), "wrong axis"),
    ("2.1", norm_of_all, "one mean for all rows"),
    ("2.1", lambda *a: norm(*a, mean=False), "the mean is not taken off"),
    ("2.1", lambda *a: norm(*a, root=lambda v: v), "the root of the variance is missing"),
    ("2.1", lambda *a: norm(*a, ddof=1), "not by D - 1"),
    ("2.1", lambda *a: norm(*a, inside=False), "eps stands under the root"),
    ("2.1", lambda x, g, b: norm(x, 1, b), "the gain is missing"),
    ("2.1", lambda x, g, b: norm(x, g, 0), "the offset is missing"),
    ("2.1", lambda x, g, b: g * norm(x, 1, b), "multiplies the offset, too"),
    ("2.1", lambda x, g, b: g * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) + b, "RMS norm"),
    ("2.2", lambda *a: whole(*a, stream=False), "the second part is added to y"),
    ("2.2", lambda *a: whole(*a, first=lambda x: x), "attention reads x without a norm"),
    ("2.2", lambda *a: whole(*a, second=lambda y, x, norm: y), "reads y without a norm"),
    ("2.2", lambda *a: whole(*a, second=lambda y, x, norm: norm(x)), "the second part reads x"),
    ("2.2", lambda *a: whole(*a, relu=False), "the ReLU is missing"),
    ("2.2", lambda *a: whole(*a, late=True), "between the matrices"),
    ("2.2", post_norm, "BEFORE each part"),
    ("2.2", lambda x, a, n, u, d: x + a(n(x)), "the feed-forward part is missing"),
    ("2.3", lambda *a: gradient(*a, stream=False), "the stream is missing in dy"),
    ("2.3", lambda *a: gradient(*a, relu=False), "the ReLU's gradient is missing"),
    ("2.3", lambda *a: gradient(*a, mean=0), "the mean of h is not taken off"),
    ("2.3", lambda *a: gradient(*a, along=0), "the part along xhat is not taken off"),
    ("2.3", lambda *a: gradient(*a, mean=0, along=0), "only the norm's direct term"),
    ("2.3", lambda *a: gradient(*a, along=-1), "two minus signs"),
    ("2.3", lambda *a: gradient(*a, over=0), "the division by sigma is missing"),
    ("2.3", lambda *a: gradient(*a, over=2), "divided by sigma squared"),
    ("2.3", lambda *a: gradient(*a, h_of=1), "the gain is missing in h"),
    ("2.3", lambda *a: gradient(*a, read=lambda y, xhat: y), "up reads the NORMED rows"),
    ("2.3", lambda *a: gradient(*a, read=lambda y, xhat: xhat), "have gain and offset"),
    ("2.3", lambda *a: gradient(*a, late=True), "what the ReLU has let through"),
    ("2.3", lambda *a: gradient(*a, axis=-1), "wrong shape of number 2 in dy, dgain"),
    ("2.3", with_turned_down, "ddown is the active numbers turned"),
    ("2.3", in_place, "changes its argument number 2 in place"),
    ("2.3", lambda *a: gradient(*a)[0], "dup, ddown is wanted, got ndarray"),
    ("2.4", lambda *a: gradients(*a, add=False), "+= where yours has ="),
    ("2.4", lambda *a: gradients(*a, order=iter), "walk backwards, through all"),
    ("2.4", lambda *a: gradients(*a, skip=False), "skip it"),
    ("2.4", lambda *a: gradients(*a, seed=0.0), "is 1, not 0"),
    ("2.4", lambda *a: gradients(*a, seed=0.5), "is 1, not 1/2"),
    ("2.4", lambda notes, loss, wanted: [v.data for v in wanted], "not their gradients"),
    ("2.4", lambda notes, loss, w: gradients(notes[-1:], loss, w), "only the last note counted"),
    ("2.4", turned, "in other places"),
]  # fmt: skip
