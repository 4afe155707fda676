"""Right and wrong answers to the exercises of module 04, for test_checks.py."""

import numpy as np

from miniflamingo.functional import log_softmax, softmax
from miniflamingo.vision import (
    NormalizerFreeResNet,
    VisionConfig,
    contrastive_loss_backward,
    conv2d,
    l2_normalise,
    l2_normalise_backward,
    standardise_weight,
)

# --- 4.1: convolution -----------------------------------------------------------------------------


def convolve(x, weight, stride, padding, mode="constant", filters=None, axes=(1, 2)):
    """An answer as students write it, with a place for each mistake."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
    windows = windows[:, ::stride] if 1 in axes else windows
    windows = windows[:, :, ::stride] if 2 in axes else windows
    matrix = (weight if filters is None else filters(weight)).reshape(len(weight), -1).T
    return windows.reshape(*windows.shape[:3], -1) @ matrix


def convolve_by_shifts(x, weight, stride, padding):  # a product for each place of the kernel
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kh, kw = weight.shape[2:]
    h, w = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    out = 0
    for u in range(kh):
        for v in range(kw):
            part = x[:, u : u + stride * h : stride, v : v + stride * w : stride]
            out = out + part[:, :h, :w] @ weight[:, :, u, v].T
    return out


# --- 4.2: standardisation -------------------------------------------------------------------------


def standardise(weight, gain, eps, axes=(1, 2, 3), centre=True, total=np.sum, root=np.sqrt):
    mean = weight.mean(axis=axes, keepdims=True) if centre else 0
    norm = root(total((weight - mean) ** 2, axis=axes, keepdims=True) + eps)
    return (weight - mean) / norm * gain[:, None, None, None]


def standardise_flat(weight, gain, eps):
    rows = weight.reshape(len(weight), -1)
    rows = rows - rows.mean(axis=1)[:, None]
    rows = rows / np.sqrt(np.einsum("oi,oi->o", rows, rows) + eps)[:, None]
    return (rows * gain[:, None]).reshape(weight.shape)


def w_by_deviation(weight, eps):
    axes = dict(axis=(1, 2, 3), keepdims=True)
    return (weight - weight.mean(**axes)) / (weight.std(**axes) + eps)


def total_by_n_1(squares, **axes):
    return squares.sum(**axes) / (squares[0].size - 1)


def norm_of_the_raw(weight, gain, eps):
    norm = np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True) + eps)
    return (weight - weight.mean(axis=(1, 2, 3), keepdims=True)) / norm * gain[:, None, None, None]


# --- 4.3: deviations ------------------------------------------------------------------------------


def run_blocks(x, blocks, a, block=None, start=1.0, after=None, column=lambda x, beta: x.std()):
    """An answer with a place for each mistake."""
    rows, v, first = [], start, x
    after = after or (lambda v, s: (1.0 if s else v) + a * a)
    for branch, shortcut in blocks:
        beta = v**0.5
        rows.append((beta, column(x, beta)))
        if block:
            x = block(x if block is not from_the_first else first, beta, branch, shortcut, a)
        else:
            x = (shortcut(x / beta) if shortcut else x) + a * branch(x / beta)
        v = after(v, shortcut)
    return x, np.array(rows)


def from_the_first(x, b, f, s, a):
    return (s(x / b) if s else x) + a * f(x / b)


def blocks_by_counting(x, blocks, a):
    """1 + a^2 times the number of blocks since the last transition, with it; plain lists."""
    since, rows = 0, []
    for branch, shortcut in blocks:
        beta = np.sqrt(1 + a**2 * since)
        rows.append([beta, np.sqrt(np.mean(x**2) - np.mean(x) ** 2)])
        added = a * branch(x / beta)
        if shortcut is None:
            x, since = x + added, since + 1
        else:
            x, since = shortcut(x / beta) + added, 1
    return [x, rows]


def blocks_of_the_library(x, blocks, a):
    """The expected deviations from the network's own blocks; the library's a is 0.2."""
    if a != 0.2:
        return blocks_by_counting(x, blocks, a)
    widths, depths = [], []
    for _, shortcut in blocks:
        if shortcut:
            widths.append(8 + len(widths))
            depths.append(0)
        depths[-1] += 1
    config = VisionConfig(8, (4,), (1,), tuple(widths), tuple(depths), (1,) * len(widths))
    network = NormalizerFreeResNet(config, rng=np.random.default_rng(0))
    out, table = run_blocks(x, blocks, a)
    return out, np.stack([[1 / block.beta for block in network.blocks], table[:, 1]], axis=1)


def blocks_in_place(x, blocks, a):
    out = run_blocks(x, blocks, a)
    x[:] = out[0]
    return out


def by_block(block):
    return lambda *case: run_blocks(*case, block=block)


def by_table(change):
    return lambda *case: (run_blocks(*case)[0], change(run_blocks(*case)[1]))


def by_count(after, start=1.0):
    """The right output, and the expected deviations of another count."""

    def answer(x, blocks, a):
        out, table = run_blocks(x, blocks, a)
        betas = run_blocks(x, blocks, a, after=lambda v, s: after(v, s, a), start=start)[1][:, 0]
        return out, np.stack([betas, table[:, 1]], axis=1)

    return answer


# --- 4.4: the loss --------------------------------------------------------------------------------


def terms(u, w, s, scale=lambda s: s, second=lambda z: z.T, take=None, reduce=np.mean):
    z = scale(s) * u @ w.T
    take = np.diagonal if take is None else take
    return np.array([-reduce(take(log_softmax(t))) for t in (z, second(z))])


def terms_by_loops(u, w, s):
    out, B = [0.0, 0.0], len(u)
    for i in range(B):
        for k, (a, b) in enumerate(((u[i], w), (w[i], u))):
            scores = s * (b @ a)
            most = scores.max()
            out[k] += (most + np.log(np.exp(scores - most).sum()) - scores[i]) / B
    return out


def two_by(weights, u, w, s):
    """The terms by the log of weights; np.exp as weights are not yet divided by their sum."""
    out = []
    for z in (s * u @ w.T, s * w @ u.T):
        p = weights(z)
        p = p / p.sum(axis=1, keepdims=True) if weights is np.exp else p
        out.append(-np.log(np.diagonal(p)).mean())
    return out


# --- 4.5: the gradient, down to the features ------------------------------------------------------


def step(x, y, log_kappa, dz=None, axis=1, along=True, lengths=True, own=None):
    """An answer as students write it, with a place for each mistake."""
    kappa, B = np.exp(log_kappa), len(x)
    long_x, long_y = (np.linalg.norm(a, axis=axis, keepdims=True) for a in (x, y))
    u, w = x / long_x, y / long_y
    z = kappa * u @ w.T
    dz = (softmax(z) + softmax(z.T).T - 2 * np.eye(B)) / B if dz is None else dz(z, B)
    du, dw = kappa * dz @ w, kappa * dz.T @ u
    if along:
        du -= (u * du).sum(axis=1, keepdims=True) * u
        dw -= (w * dw).sum(axis=1, keepdims=True) * w
    if lengths:
        du, dw = du / long_x, dw / long_y
    return du, dw, (dz * z).sum() if own is None else own(dz, z, kappa)


def step_by_rows(x, y, log_kappa):
    kappa, B = np.exp(log_kappa), len(x)
    u, w = ([row / np.linalg.norm(row) for row in a] for a in (x, y))
    z = np.array([[kappa * a @ b for b in w] for a in u])
    p, q = softmax(z), softmax(z.T)
    dx, dy, dlog = np.zeros(x.shape), np.zeros(y.shape), 0.0
    for i in range(B):
        for j in range(B):
            dz = (p[i, j] + q[j, i] - 2 * (i == j)) / B
            dx[i] += kappa * dz * (w[j] - (u[i] @ w[j]) * u[i]) / np.linalg.norm(x[i])
            dy[j] += kappa * dz * (u[i] - (u[i] @ w[j]) * w[j]) / np.linalg.norm(y[j])
            dlog += dz * z[i, j]
    return dx, dy, dlog


def step_of_the_library(x, y, log_kappa):
    kappa = np.exp(log_kappa)
    parts = contrastive_loss_backward(1.0, l2_normalise(x), l2_normalise(y), kappa)
    return *(l2_normalise_backward(d, a) for d, a in zip(parts, (x, y))), kappa * parts[2]


def naive(z, B):
    e = np.exp(z)
    rows, columns = e / e.sum(axis=1, keepdims=True), e / e.sum(axis=0, keepdims=True)
    return (rows + columns - 2 * np.eye(B)) / B


def step_in_place(x, y, log_kappa):
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return step(x, y, log_kappa)


def not_turned(x, y, log_kappa):
    dx, _, dlog = step(x, y, log_kappa)
    z = np.exp(log_kappa) * l2_normalise(x) @ l2_normalise(y).T
    dz = (softmax(z) + softmax(z.T).T - 2 * np.eye(len(x))) / len(x)
    return dx, l2_normalise_backward(np.exp(log_kappa) * dz @ l2_normalise(x), y), dlog


RIGHT = [
    ("4.1", convolve),
    ("4.1", convolve_by_shifts),
    ("4.1", lambda x, w, stride, padding: conv2d(x, w, None, stride, padding)),
    ("4.2", standardise),
    ("4.2", standardise_flat),
    ("4.2", standardise_weight),
    ("4.3", run_blocks),
    ("4.3", blocks_by_counting),
    ("4.3", blocks_of_the_library),
    ("4.4", terms),
    ("4.4", terms_by_loops),
    ("4.5", step),
    ("4.5", step_by_rows),
    ("4.5", step_of_the_library),
]

WRONG = [
    ("4.1", lambda x, w, s, p: convolve(x, w, s, 0), "the padding is missing"),
    ("4.1", lambda *a: convolve(*a, axes=()), "the stride is missing: take every"),
    ("4.1", lambda *a: convolve(*a, axes=(1,)), "the stride is missing along the columns"),
    ("4.1", lambda *a: convolve(*a, mode="edge"), "copies of the edge"),
    ("4.1", lambda *a: convolve(*a, filters=lambda w: w[:, :, ::-1, ::-1]), "kernel is flipped"),
    ("4.1", lambda *a: convolve(*a, filters=lambda w: w.swapaxes(2, 3)), "rows and columns"),
    ("4.1", lambda *a: convolve(*a, filters=lambda w: w.transpose(0, 2, 3, 1)),
     "filters (kh, kw, C)"),
    ("4.1", lambda *a: np.moveaxis(convolve(*a), -1, 1), "the channels come last"),
    ("4.1", lambda *a: convolve(*a) / a[1][0].size, "a mean over the patch"),
    ("4.1", lambda *a: convolve(*a)[0], "wrong shape: [2, 4, 3, 4] is wanted, got [4, 3, 4]"),
    ("4.2", lambda *a: standardise(*a, centre=False), "the mean is not subtracted"),
    ("4.2", lambda *a: standardise(*a, total=np.mean), "the deviation, a MEAN of squares"),
    ("4.2", lambda *a: standardise(*a, axes=(0, 1, 2, 3)), "one mean and norm for all filters"),
    ("4.2", lambda *a: standardise(*a, axes=0), "wrong axes"),
    ("4.2", lambda *a: standardise(*a, axes=(2, 3)), "only over the kernel"),
    ("4.2", lambda w, g, eps: standardise(w, np.ones(len(w)), eps), "the gain is missing"),
    ("4.2", lambda w, g, eps: standardise(w, np.ones(3), eps) * g, "belongs to the filters"),
    ("4.2", lambda w, g, eps: standardise(w, g, 0), "eps is missing"),
    ("4.2", lambda *a: standardise(*a, root=lambda x: x), "the square root is missing"),
    ("4.2", lambda *a: standardise(*a, root=lambda x: 1.0), "the norm is free"),
    ("4.2", norm_of_the_raw, "BEFORE the mean is subtracted"),
    ("4.3", by_table(lambda x: x**2), "these are variances"),
    ("4.3", by_table(lambda x: x[:, ::-1]), "the columns are exchanged"),
    ("4.3", by_table(lambda x: x.T), "yours is turned"),
    ("4.3", by_table(lambda x: x[:, [0, 0]]), "only what is expected"),
    ("4.3", by_table(lambda x: x[:, [1, 1]]), "only what is measured"),
    ("4.3", by_table(lambda x: x[:, 0]), "one row for each block is wanted, and two columns"),
    ("4.3", by_table(lambda x: np.add(x, [[0, 1]])), "deviations: wrong value at [0, 1]"),
    ("4.3", by_table(lambda x: [1, 0] / x + x * [0, 1]), "this is 1 / beta"),
    ("4.3", by_table(lambda x: x ** [2, 1]), "column 0: these are variances"),
    ("4.3", by_table(lambda x: x ** [1, 2]), "column 1: this is x's variance"),
    ("4.3", lambda *a: run_blocks(*a, column=lambda x, b: (x / b).std()), "before it is divided"),
    ("4.3", by_count(lambda v, s, a: v + a * a), "a transition starts the count again"),
    ("4.3", by_count(lambda v, s, a: 1 if s else v + a * a), "1 + a^2, not 1"),
    ("4.3", by_count(lambda v, s, a: (0 if s else v) + a * a), "1 + a^2, not a^2"),
    ("4.3", by_count(lambda v, s, a: (1 if s else v) + a), "variance is a^2"),
    ("4.3", by_block(lambda x, b, f, s, a: (s(x / b) if s else x) + a * f(x)), "yours gets x"),
    ("4.3", by_block(lambda x, b, f, s, a: from_the_first(x, x.std(), f, s, a)), "is measured"),
    ("4.3", by_block(lambda x, b, f, s, a: from_the_first(x, b, f, s, 1)), "scaled by a before"),
    ("4.3", by_block(lambda x, b, f, s, a: (s(x) if s else x) + a * f(x / b)), "divided signal, t"),
    ("4.3", by_block(lambda x, b, f, s, a: x + a * f(x / b)), "x does not go past it"),
    ("4.3", by_block(lambda x, b, f, s, a: x + (s(x / b) if s else 0) + a * f(x / b)), "not added"),
    ("4.3", by_block(lambda x, b, f, s, a: (s(x / b) if s else x / b) + a * f(x / b)), "not divid"),
    ("4.3", by_block(lambda x, b, f, s, a: a * f(x / b)), "is missing"),
    ("4.3", by_block(from_the_first), "yours gets the first x"),
    ("4.3", lambda x, blocks, a: run_blocks(x, blocks[:-1], a), "the last block is missing"),
    ("4.3", lambda *a: run_blocks(*a)[1], "the pair (output, deviations float [L, 2]) is wanted"),
    ("4.3", blocks_in_place, "changes its argument number 1 in place"),
    ("4.4", lambda *a: terms(*a, second=lambda z: z), "one softmax only: the second term"),
    ("4.4", lambda *a: terms(*a)[::-1], "the terms are exchanged"),
    ("4.4", lambda *a: terms(*a).sum(), "not their sum"),
    ("4.4", lambda *a: terms(*a)[0], "one term only"),
    ("4.4", lambda *a: terms(*a, scale=lambda s: 1), "the inverse temperature is missing"),
    ("4.4", lambda *a: terms(*a, scale=lambda s: 1 / s), "divided by kappa"),
    ("4.4", lambda *a: terms(*a, scale=np.log), "kappa is used as its logarithm"),
    ("4.4", lambda *a: -terms(*a), "the sign"),
    ("4.4", lambda *a: terms(*a, reduce=np.sum), "a sum over the batch"),
    ("4.4", lambda *a: terms(*a, take=lambda p: np.diagonal(p, 1)), "the labels are off by one"),
    ("4.4", lambda *a: terms(*a, take=lambda p: p), "a mean over all pairs"),
    ("4.4", lambda *a: terms(*a, take=lambda p: np.exp(np.diagonal(p))), "logarithm is missing"),
    ("4.5", lambda *a: step(*a, dz=lambda z, B: softmax(z) + softmax(z.T).T - 2 * np.eye(B)),
     "the division by B is missing"),
    ("4.5", lambda *a: [d / 2 for d in step(*a)], "halved"),
    ("4.5", lambda *a: [-d for d in step(*a)], "the sign"),
    ("4.5", lambda *a: step(*a, dz=lambda z, B: (softmax(z) - np.eye(B)) / B),
     "only the rows' term"),
    ("4.5", lambda *a: step(*a, dz=lambda z, B: 2 * (softmax(z) - np.eye(B)) / B),
     "one softmax only, twice"),
    ("4.5", lambda *a: step(*a, dz=lambda z, B: (softmax(z) + softmax(z.T) - 2 * np.eye(B)) / B),
     "must be turned back"),
    ("4.5", lambda *a: step(*a, dz=lambda z, B: (softmax(z) + softmax(z).T - 2 * np.eye(B)) / B),
     "softmax(z).T is not"),
    ("4.5", lambda *a: step(*a, dz=lambda z, B: (softmax(z) + softmax(z.T).T - np.eye(B)) / B),
     "the truth stands in both terms"),
    ("4.5", lambda *a: step(*a, along=False, lengths=False), "these are du and dw"),
    ("4.5", lambda *a: step(*a, along=False), "the part along u and w"),
    ("4.5", lambda *a: step(*a, lengths=False), "the division by the length is missing"),
    ("4.5", lambda *a: step(*a, axis=0), "wrong axis: each row has a length"),
    ("4.5", lambda *a: step(*a, axis=None), "one length for all rows"),
    ("4.5", lambda *a: step(*a, own=lambda dz, z, kappa: (dz * z).sum() / kappa),
     "this is the gradient of kappa"),
    ("4.5", lambda *a: step(*a, own=lambda dz, z, kappa: (dz * z).sum() + 1),
     "dlog_kappa: wrong value"),
    ("4.5", lambda x, y, s: step(x, y, np.log(s)), "the exp is missing"),
    ("4.5", not_turned, "dw sums over the pictures"),
    ("4.5", lambda *a: step(*a)[:2], "dx, dy, dlog_kappa is wanted, got tuple of 2"),
    ("4.5", step_in_place, "changes its argument number 1 in place"),
    ("4.5", lambda *a: step(*a, dz=naive), "subtract the row's maximum before exp"),
    ("4.1", lambda x, w, s, p: convolve(x, w, s, w.shape[2] // 2), "an argument, not k // 2"),
    ("4.2", lambda w, g, eps: w_by_deviation(w, eps) * g[:, None, None, None], "without eps"),
    ("4.2", lambda *a: standardise(*a, total=total_by_n_1), "with n - 1"),
    ("4.4", lambda *a: two_by(np.exp, *a), "and the log of a tiny weight"),
    ("4.4", lambda *a: two_by(lambda z: softmax(z), *a), "and the log of a tiny weight"),
    ("4.4", lambda *a: two_by(lambda z: softmax(z) + 1e-9, *a), "bounds the loss"),
    ("4.4", lambda *a: terms(*a) / 2, "every number is 0.5 times the right one"),
]  # fmt: skip
