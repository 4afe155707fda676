"""Checks of module 03: convolution, standardised weights, deviations, the contrastive loss."""

import numpy as np

from miniflamingo.functional import cross_entropy, cross_entropy_backward, log_softmax, softmax
from miniflamingo.vision import conv2d, l2_normalise, standardise_weight

from .core import call, exercise, expect

# --- 3.1: convolution ---------------------------------------------------------------------------


def convolution_case(seed, kh, kw):
    """x [2, 7, 6, 3] and weight [4, 3, kh, kw], random."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 7, 6, 3)), rng.normal(size=(4, 3, kh, kw))


@exercise("3.1")
def convolution(answer):
    """answer(x [B, H, W, C], weight [O, C, kh, kw], stride, padding) -> [B, h, w, O]."""
    for seed, kernel, stride, padding in ((0, (3, 3), 2, 1), (1, (3, 2), 1, 1), (2, (1, 1), 1, 0)):
        x, weight = convolution_case(seed, *kernel)
        right = conv2d(x, weight, stride=stride, padding=padding)
        out = call(answer, x, weight, stride, padding)
        expect(out, right, _convolution_mistakes(x, weight, stride, padding))


def _convolution_mistakes(x, weight, stride, padding):
    O, C, kh, kw = weight.shape
    options = dict(stride=stride, padding=padding)
    right = conv2d(x, weight, **options)
    yield "the padding is missing: np.pad with zeros first", conv2d(x, weight, stride=stride)
    yield "the stride is missing: take every stride-th window", conv2d(x, weight, padding=padding)
    yield (
        "the stride is missing along the columns: it leaves out windows along BOTH axes",
        conv2d(x, weight, padding=padding)[:, ::stride],
    )
    yield (
        "padded with copies of the edge; equation (1) has zeros around the picture",
        conv2d(_edge(x, padding), weight, stride=stride),
    )
    yield (
        "the kernel is flipped: equation (1) does not turn it, x is read at i + u",
        conv2d(x, weight[:, :, ::-1, ::-1], **options),
    )
    if kh == kw:
        turned = conv2d(x, weight.swapaxes(2, 3), **options)
        yield "rows and columns of the kernel are exchanged", turned
    mixed = weight.reshape(O, kh, kw, C).transpose(0, 3, 1, 2)
    yield (
        "patches and filters list their numbers in different orders: patches (kh, kw, C), filters "
        "(C, kh, kw)",
        conv2d(x, mixed, **options),
    )
    mixed = weight.transpose(0, 2, 3, 1).reshape(weight.shape)
    yield (
        "patches and filters list their numbers in different orders: patches (C, kh, kw), filters "
        "(kh, kw, C)",
        conv2d(x, mixed, **options),
    )
    yield "the channels come last: [B, h, w, O]", np.moveaxis(right, -1, 1)
    mean = right / (C * kh * kw)
    yield "a mean over the patch; equation (1) is a sum", mean


def _edge(x, padding):
    return np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="edge")


# --- 3.2: weight standardisation ----------------------------------------------------------------


@exercise("3.2")
def standardise(answer):
    """answer(weight [O, C, k, k], gain [O], eps) -> [O, C, k, k]."""
    for seed, eps in ((0, 1e-4), (1, 0.1)):
        rng = np.random.default_rng(seed)
        weight, gain = rng.normal(0.4, 1, (3, 2, 3, 3)), rng.uniform(0.5, 2, 3)
        right = standardise_weight(weight, gain, eps)
        expect(call(answer, weight, gain, eps), right, _standard_mistakes(weight, gain, eps))
    flat = np.full((2, 2, 3, 3), 0.5)  # filters of equal weights
    expect(call(answer, flat, np.ones(2), 1e-4), np.zeros_like(flat))


def _standard_mistakes(weight, gain, eps):
    g, axes = gain[:, None, None, None], (1, 2, 3)
    n = weight[0].size

    def scaled(w, centre, total, extra=eps):
        centred = w - centre
        return centred / np.sqrt(total(centred) + extra) * g

    def total(c):
        return np.square(c).sum(axis=axes, keepdims=True)

    mean = weight.mean(axis=axes, keepdims=True)
    right = scaled(weight, mean, total)
    yield (
        "the mean is not subtracted: it lets the mean of the input through",
        scaled(weight, 0, total),
    )
    yield "the mean is subtracted, but nothing is divided: the norm is free", (weight - mean) * g
    yield (
        "divided by the deviation, a MEAN of squares: equation (4) has the sum",
        scaled(weight, mean, lambda c: total(c) / n),
    )
    yield (
        "the norm is that of the weights BEFORE the mean is subtracted",
        (weight - mean) / np.sqrt(total(weight) + eps) * g,
    )
    yield (
        "one mean and norm for all filters: each filter, axes 1, 2 and 3, has its own",
        scaled(weight, weight.mean(), lambda c: np.square(c).sum()),
    )
    yield (
        "wrong axes: the mean and the sum run over axes 1, 2 and 3, not over the filters",
        scaled(weight, weight.mean(axis=0), lambda c: np.square(c).sum(axis=0)),
    )
    yield (
        "only over the kernel, axes 2 and 3: the input channels, axis 1, belong to a filter too",
        scaled(
            weight,
            weight.mean(axis=(2, 3), keepdims=True),
            lambda c: np.square(c).sum(axis=(2, 3), keepdims=True),
        ),
    )
    yield "the gain is missing", right / g
    yield "the gain belongs to the filters, axis 0: gain[:, None, None, None]", right / g * gain
    yield "eps is missing: a filter of equal weights would be 0/0", scaled(weight, mean, total, 0)
    yield "eps stands under the root", (weight - mean) / (np.sqrt(total(weight - mean)) + eps) * g
    yield (
        "the square root is missing: this divides by the squared norm",
        (weight - mean) / (total(weight - mean) + eps) * g,
    )


# --- 3.3: the expected deviation ------------------------------------------------------------------


@exercise("3.3")
def deviations(answer):
    """answer(transition bool[L], a) -> float[L]."""
    for flags, a in (((1, 0, 0, 1, 0), 0.2), ((0, 0, 1, 0, 0, 0), 0.5)):
        transition = np.array(flags, bool)
        right = expected_deviations(transition, a)
        expect(call(answer, transition, a), right, _deviation_mistakes(transition, a))


def expected_deviations(transition, a, after=False, restart=1.0, power=2, stay=True):
    """Equation (6), and what is left of it under a mistake."""
    found, v = [], 1.0
    for restarts in transition:
        before = v
        v = (restart if restarts and stay else v) + a**power
        found.append(v if after else before)
    return np.sqrt(found)


def _deviation_mistakes(transition, a):
    right = expected_deviations(transition, a)
    after = expected_deviations(transition, a, after=True)
    yield "these are variances: beta is the deviation, the square root", right**2
    yield "this is the deviation AFTER each block: the input's is wanted, the first is 1", after
    yield "variances, and after each block: the deviation of the input is wanted", after**2
    yield (
        "a transition starts the count again: 1 + a^2 after it",
        expected_deviations(transition, a, stay=False),
    )
    yield (
        "after a transition the variance is 1 + a^2, not 1: its branch is added too",
        expected_deviations(transition, a, restart=1 - a**2),
    )
    yield (
        "after a transition the variance is 1 + a^2, not a^2: the shortcut carries 1",
        expected_deviations(transition, a, restart=0.0),
    )
    yield (
        "the branch is scaled by a, so its variance is a^2",
        expected_deviations(transition, a, power=1),
    )
    yield "this is 1 / beta: the deviation itself is wanted", 1 / right
    yield (
        "variances add, deviations do not: add a^2 to the variance, then take the root",
        _linear(transition, a),
    )


def _linear(transition, a):
    found, d = [], 1.0
    for restarts in transition:
        found.append(d)
        d = (1.0 if restarts else d) + a
    return np.array(found)


# --- 3.4: the two terms ---------------------------------------------------------------------------


def pairs_case(seed, B=5, D=4):
    """u, w [B, D] of unit length, random."""
    return l2_normalise(np.random.default_rng(seed).normal(size=(2, B, D)))


@exercise("3.4")
def two_terms(answer):
    """answer(u [B, D], w [B, D], s) -> [2], picture to caption and caption to picture."""
    for seed, s in ((0, 5.0), (1, 1000.0)):
        u, w = pairs_case(seed)
        own = np.arange(len(u))
        z = s * u @ w.T
        right = np.array([cross_entropy(z, own), cross_entropy(z.T, own)])
        expect(call(answer, u, w, np.float64(s)), right, _term_mistakes(u, w, s, right))


def _term_mistakes(u, w, s, right):
    z = s * u @ w.T
    rows, columns = log_softmax(z), log_softmax(z.T)

    def terms(take, first=rows, second=columns):
        return np.array([take(first), take(second)])

    def own(logp):
        return -np.diagonal(logp).mean()

    yield (
        "one softmax only: the second term runs over the columns, logits.T",
        terms(own, rows, rows),
    )
    yield (
        "one softmax only: the first term runs over the rows, the captions",
        terms(own, columns, columns),
    )
    yield "the terms are exchanged: pictures to captions, the rows, come first", right[::-1]
    yield "the two terms are wanted apart, [2], not their sum", right.sum()
    yield "the two terms are wanted apart, [2], not their mean", right.mean()
    yield "one term only: the second is that of logits.T", right[0]
    yield "the inverse temperature is missing", _of(u @ w.T, own)
    yield "divided by s: it is the INVERSE temperature, it multiplies", _of(u @ w.T / s, own)
    yield "s is used as its logarithm: the exp is undone", _of(np.log(s) * (u @ w.T), own)
    yield "the sign: the loss is MINUS the log-probability", -right
    yield "a sum over the batch: equation (8) divides by B", right * len(u)
    yield (
        "the labels are off by one: picture i belongs to caption i, the diagonal",
        terms(lambda logp: -np.mean([logp[i, i - 1] for i in range(len(logp))])),
    )
    yield (
        "the labels are off by one: picture i belongs to caption i, the diagonal",
        terms(lambda logp: -np.diagonal(logp, 1).mean()),
    )
    yield (
        "a mean over all pairs: only the own pairs, the diagonal, count",
        terms(lambda logp: -logp.mean()),
    )
    yield (
        "the logarithm is missing: these are probabilities",
        terms(lambda logp: -np.exp(np.diagonal(logp)).mean()),
    )
    yield (
        "the logarithm of a mean; equation (8) is a mean of logarithms",
        terms(lambda logp: -np.log(np.exp(np.diagonal(logp)).mean())),
    )
    every = -np.diagonal(log_softmax(z.ravel()).reshape(z.shape)).mean()
    yield "one softmax over all B^2 pairs: rows and columns each have their own", [every, every]


def _of(z, take):
    return np.array([take(log_softmax(z)), take(log_softmax(z.T))])


# --- 3.5: its gradient ----------------------------------------------------------------------------


@exercise("3.5")
def gradient(answer):
    """answer(logits [B, B]) -> the gradient of equation (8), [B, B]."""
    for seed, s in ((0, 3.0), (1, 8.0)):
        u, w = pairs_case(seed)
        z, own = s * u @ w.T, np.arange(len(u))
        right = cross_entropy_backward(1.0, z, own)[0] + cross_entropy_backward(1.0, z.T, own)[0].T
        expect(call(answer, z), right, _gradient_mistakes(z, right))


def _gradient_mistakes(z, right):
    B, p, q = len(z), softmax(z), softmax(z.T)
    eye = np.eye(B)
    yield "the division by B is missing: equation (8) is a mean", right * B
    yield "divided by B twice", right / B
    yield "halved: equation (8) adds its terms, it does not average them", right / 2
    yield "the sign: probability minus truth", -right
    yield "only the rows' term: add that of the columns", (p - eye) / B
    yield "only the columns' term: add that of the rows", (q.T - eye) / B
    yield "one softmax only, twice: the second runs over the columns", 2 * (p - eye) / B
    yield (
        "the softmax of the columns must be turned back: softmax(logits.T).T",
        (p + q - 2 * eye) / B,
    )
    yield "the truth stands in both terms: minus 2 on the diagonal", (p + q.T - eye) / B
    yield "the truth is missing: probability MINUS truth", (p + q.T) / B
    yield "minus 2 from every number: the truth is 1 on the diagonal alone", (p + q.T - 2) / B
    whole = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    yield (
        "one softmax over all B^2 pairs: rows and columns each have their own",
        (2 * (whole - eye) / B),
    )
