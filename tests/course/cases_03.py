"""Right and wrong answers to the exercises of module 03, for test_checks.py."""

import numpy as np

from miniflamingo.functional import log_softmax, softmax
from miniflamingo.vision import NormalizerFreeResNet, VisionConfig, conv2d, standardise_weight

# --- 3.1: convolution -----------------------------------------------------------------------------


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


# --- 3.2: standardisation -------------------------------------------------------------------------


def standardise(weight, gain, eps, axes=(1, 2, 3), centre=True, total=np.sum, root=np.sqrt):
    mean = weight.mean(axis=axes, keepdims=True) if centre else 0
    norm = root(total((weight - mean) ** 2, axis=axes, keepdims=True) + eps)
    return (weight - mean) / norm * gain[:, None, None, None]


def standardise_flat(weight, gain, eps):
    rows = weight.reshape(len(weight), -1)
    rows = rows - rows.mean(axis=1)[:, None]
    rows = rows / np.sqrt(np.einsum("oi,oi->o", rows, rows) + eps)[:, None]
    return (rows * gain[:, None]).reshape(weight.shape)


def norm_of_the_raw(weight, gain, eps):
    norm = np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True) + eps)
    return (weight - weight.mean(axis=(1, 2, 3), keepdims=True)) / norm * gain[:, None, None, None]


# --- 3.3: deviations ------------------------------------------------------------------------------


def deviations(transition, a, start=1.0, reset=lambda a: 1 + a * a, add=lambda a: a * a):
    betas, v = [], start
    for restarts in transition:
        betas.append(v**0.5)
        v = reset(a) if restarts else v + add(a)
    return np.array(betas)


def deviations_by_counting(transition, a):
    """1 + a^2 times the number of blocks since the last transition, with it."""
    since, counts = 0, []
    for restarts in transition:
        counts.append(since)
        since = 1 if restarts else since + 1
    return np.sqrt(1 + a**2 * np.array(counts))


def deviations_of_the_library(transition, a):
    """What the network's blocks have; the library's a is 0.2."""
    if a != 0.2:
        return deviations(transition, a)
    widths, depths = [], []
    for restarts in transition:
        if restarts:
            widths.append(8 + len(widths))
            depths.append(0)
        depths[-1] += 1
    config = VisionConfig(8, (4,), (1,), tuple(widths), tuple(depths), (1,) * len(widths))
    blocks = NormalizerFreeResNet(config, rng=np.random.default_rng(0)).blocks
    return np.array([1 / block.beta for block in blocks])


# --- 3.4: the loss --------------------------------------------------------------------------------


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


# --- 3.5: the gradient ----------------------------------------------------------------------------


def dlogits(z, divide=None, columns=lambda z: softmax(z.T).T, truth=2):
    B = len(z)
    return (softmax(z) + columns(z) - truth * np.eye(B)) / (B if divide is None else divide(B))


def dlogits_by_differences(z, step=1e-5):
    def loss(z):
        return sum(-np.diagonal(log_softmax(t)).mean() for t in (z, z.T))

    out = np.zeros_like(z)
    for place in np.ndindex(z.shape):
        nudge = np.zeros_like(z)
        nudge[place] = step
        out[place] = (loss(z + nudge) - loss(z - nudge)) / (2 * step)
    return out


RIGHT = [
    ("3.1", convolve),
    ("3.1", convolve_by_shifts),
    ("3.1", lambda x, w, stride, padding: conv2d(x, w, None, stride, padding)),
    ("3.2", standardise),
    ("3.2", standardise_flat),
    ("3.2", standardise_weight),
    ("3.3", deviations),
    ("3.3", deviations_by_counting),
    ("3.3", deviations_of_the_library),
    ("3.4", terms),
    ("3.4", terms_by_loops),
    ("3.5", dlogits),
    ("3.5", dlogits_by_differences),
]

WRONG = [
    ("3.1", lambda x, w, s, p: convolve(x, w, s, 0), "the padding is missing"),
    ("3.1", lambda *a: convolve(*a, axes=()), "the stride is missing: take every"),
    ("3.1", lambda *a: convolve(*a, axes=(1,)), "the stride is missing along the columns"),
    ("3.1", lambda *a: convolve(*a, mode="edge"), "copies of the edge"),
    ("3.1", lambda *a: convolve(*a, filters=lambda w: w[:, :, ::-1, ::-1]), "kernel is flipped"),
    ("3.1", lambda *a: convolve(*a, filters=lambda w: w.swapaxes(2, 3)), "rows and columns"),
    ("3.1", lambda *a: convolve(*a, filters=lambda w: w.transpose(0, 2, 3, 1)),
     "filters (kh, kw, C)"),
    ("3.1", lambda *a: np.moveaxis(convolve(*a), -1, 1), "the channels come last"),
    ("3.1", lambda *a: convolve(*a) / a[1][0].size, "a mean over the patch"),
    ("3.1", lambda *a: convolve(*a)[0], "wrong shape: [2, 4, 3, 4] is wanted, got [4, 3, 4]"),
    ("3.2", lambda *a: standardise(*a, centre=False), "the mean is not subtracted"),
    ("3.2", lambda *a: standardise(*a, total=np.mean), "the deviation, a MEAN of squares"),
    ("3.2", lambda *a: standardise(*a, axes=(0, 1, 2, 3)), "one mean and norm for all filters"),
    ("3.2", lambda *a: standardise(*a, axes=0), "wrong axes"),
    ("3.2", lambda *a: standardise(*a, axes=(2, 3)), "only over the kernel"),
    ("3.2", lambda w, g, eps: standardise(w, np.ones(len(w)), eps), "the gain is missing"),
    ("3.2", lambda w, g, eps: standardise(w, np.ones(3), eps) * g, "belongs to the filters"),
    ("3.2", lambda w, g, eps: standardise(w, g, 0), "eps is missing"),
    ("3.2", lambda *a: standardise(*a, root=lambda x: x), "the square root is missing"),
    ("3.2", lambda *a: standardise(*a, root=lambda x: 1.0), "the norm is free"),
    ("3.2", norm_of_the_raw, "BEFORE the mean is subtracted"),
    ("3.3", lambda *a: deviations(*a) ** 2, "these are variances"),
    ("3.3", lambda t, a: np.append(deviations(t, a)[1:], 0) + 0 * a, "wrong value at [0]"),
    ("3.3", lambda t, a: deviations(np.append(t, False), a)[1:], "AFTER each block"),
    ("3.3", lambda t, a: deviations(t & False, a), "a transition starts the count again"),
    ("3.3", lambda *a: deviations(*a, reset=lambda a: 1.0), "1 + a^2, not 1"),
    ("3.3", lambda *a: deviations(*a, reset=lambda a: a * a), "1 + a^2, not a^2"),
    ("3.3", lambda *a: deviations(*a, reset=lambda a: 1 + a, add=lambda a: a), "variance is a^2"),
    ("3.3", lambda *a: 1 / deviations(*a), "this is 1 / beta"),
    ("3.4", lambda *a: terms(*a, second=lambda z: z), "one softmax only: the second term"),
    ("3.4", lambda *a: terms(*a)[::-1], "the terms are exchanged"),
    ("3.4", lambda *a: terms(*a).sum(), "not their sum"),
    ("3.4", lambda *a: terms(*a)[0], "one term only"),
    ("3.4", lambda *a: terms(*a, scale=lambda s: 1), "the inverse temperature is missing"),
    ("3.4", lambda *a: terms(*a, scale=lambda s: 1 / s), "divided by s"),
    ("3.4", lambda *a: terms(*a, scale=np.log), "s is used as its logarithm"),
    ("3.4", lambda *a: -terms(*a), "the sign"),
    ("3.4", lambda *a: terms(*a, reduce=np.sum), "a sum over the batch"),
    ("3.4", lambda *a: terms(*a, take=lambda p: np.diagonal(p, 1)), "the labels are off by one"),
    ("3.4", lambda *a: terms(*a, take=lambda p: p), "a mean over all pairs"),
    ("3.4", lambda *a: terms(*a, take=lambda p: np.exp(np.diagonal(p))), "logarithm is missing"),
    ("3.5", lambda z: dlogits(z, divide=lambda B: 1), "the division by B is missing"),
    ("3.5", lambda z: dlogits(z, divide=lambda B: B * B), "divided by B twice"),
    ("3.5", lambda z: dlogits(z) / 2, "halved"),
    ("3.5", lambda z: -dlogits(z), "the sign"),
    ("3.5", lambda z: dlogits(z, columns=lambda z: 0, truth=1), "only the rows' term"),
    ("3.5", lambda z: dlogits(z, columns=softmax), "one softmax only, twice"),
    ("3.5", lambda z: dlogits(z, columns=lambda z: softmax(z.T)), "must be turned back"),
    ("3.5", lambda z: dlogits(z, truth=1), "the truth stands in both terms"),
    ("3.5", lambda z: dlogits(z, truth=0), "the truth is missing"),
]  # fmt: skip
