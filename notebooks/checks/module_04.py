"""Checks of module 04: convolution, standardised weights, deviations, the contrastive loss."""

import numpy as np

from miniflamingo.functional import cross_entropy, log_softmax, softmax
from miniflamingo.vision import conv2d, l2_normalise, standardise_weight

from .core import (
    OVERFLOW,
    UNDERFLOW,
    Wrong,
    call,
    exercise,
    expect,
    expect_stable,
    named,
    same,
    several,
)

# --- 4.1: convolution ---------------------------------------------------------------------------


def convolution_case(seed, kh, kw):
    """x [2, 7, 6, 3] and weight [4, 3, kh, kw], random."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 7, 6, 3)), rng.normal(size=(4, 3, kh, kw))


@exercise("4.1")
def convolution(answer):
    """answer(x [B, H, W, C], weight [O, C, kh, kw], stride, padding) -> [B, h, w, O]."""
    kernels = (3, 3), (3, 2), (1, 1), (3, 3)
    for seed, (kernel, stride, padding) in enumerate(zip(kernels, (2, 1, 1, 3), (1, 1, 0, 2))):
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
    if padding != kh // 2:
        yield (
            "how much is padded is an argument, not k // 2",
            conv2d(x, weight, None, stride, kh // 2),
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


# --- 4.2: weight standardisation ----------------------------------------------------------------


@exercise("4.2")
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
    without = scaled(weight, mean, total, 0)
    yield (
        "eps is missing in the sum under the root: a filter of equal weights would be 0/0",
        without,
    )
    yield (
        "the sum and eps stand under the root; a deviation is a MEAN of squares, without eps",
        (weight - mean) / (weight.std(axis=axes, keepdims=True) + eps) * g,
    )
    yield (
        "divided by the deviation (with n - 1): equation (4) has the sum of squares",
        scaled(weight, mean, lambda c: total(c) / (n - 1)),
    )
    yield "eps stands under the root", (weight - mean) / (np.sqrt(total(weight - mean)) + eps) * g
    yield (
        "the square root is missing: this divides by the squared norm",
        (weight - mean) / (total(weight - mean) + eps) * g,
    )


# --- 4.3: the expected deviation ------------------------------------------------------------------


BLOCKS = "the pair (output, deviations float [L, 2])"


def block_case(seed, flags):
    """x [30, 5] and a pair (branch, shortcut) for each flag; the shortcut is None where it is 0."""
    rng = np.random.default_rng(seed)
    x = 1.3 * rng.normal(size=(30, 5))

    def block(is_transition):
        weight, bias, short = rng.normal(size=(5, 5)), rng.normal(size=5), rng.normal(size=(5, 5))
        shortcut = (lambda h: 0.6 * h @ short - 0.2) if is_transition else None
        return (lambda h: np.maximum(h @ weight + bias, 0)), shortcut

    return x, [block(flag) for flag in flags]


@exercise("4.3")
def run_blocks(answer):
    """answer(x [...], pairs of functions, a) -> ([...], float[L, 2])."""
    cases = ((1, 0, 0, 1, 0), 0.2), ((0, 0, 1, 0, 0, 0), 0.5), ((0, 0, 0), 0.3)
    for seed, (flags, a) in enumerate(cases):
        x, blocks = block_case(seed, flags)
        right = through_blocks(x, blocks, a)
        out, table = several(call(answer, x, blocks, a), right, BLOCKS, shapes=False)
        transition = np.array(flags, bool)
        mistakes = list(_table_mistakes(x, blocks, transition, a))
        measured = right[1][:, 1]
        for words, betas in _deviation_mistakes(transition, a):
            mistakes.append((f"column 0: {words}", np.stack([betas, measured], axis=1)))
        expect(out, right[0], _output_mistakes(x, blocks, a), named("the first, the output"))
        expect(table, right[1], mistakes, named("the second, the deviations"))


def through_blocks(x, blocks, a, block=None):
    """The output of residual blocks, and [L, 2]: expected and measured deviation of each input."""
    block = block or _block
    betas, measured = expected_deviations([s is not None for _, s in blocks], a), []
    for beta, (branch, shortcut) in zip(betas, blocks):
        measured.append(x.std())
        x = block(x, beta, branch, shortcut, a)
    return x, np.stack([betas, measured], axis=1)


def _block(x, beta, branch, shortcut, a):
    return (shortcut(x / beta) if shortcut else x) + a * branch(x / beta)


def _output_mistakes(x, blocks, a):
    def wrong(block):
        return through_blocks(x, blocks, a, lambda x, b, f, s, a: block(x, b, f, s))[0]

    yield (
        "the branch gets x / beta, a signal of variance 1; yours gets x",
        wrong(lambda x, b, f, s: (s(x / b) if s else x) + a * f(x)),
    )
    yield (
        "beta is known before any picture is seen, from (6); yours is measured",
        wrong(lambda x, b, f, s: _block(x, x.std(), f, s, a)),
    )
    yield (
        "the branch is scaled by a before it is added",
        wrong(lambda x, b, f, s: _block(x, b, f, s, 1)),
    )
    yield (
        "the shortcut of a transition gets the divided signal, too: x / beta",
        wrong(lambda x, b, f, s: (s(x) if s else x) + a * f(x / b)),
    )
    yield (
        "a transition has a function on its shortcut: x does not go past it",
        wrong(lambda x, b, f, s: _block(x, b, f, None, a)),
    )
    yield (
        "a transition's shortcut stands in the place of x: it is not added to it",
        wrong(lambda x, b, f, s: x + (s(x / b) if s else 0) + a * f(x / b)),
    )
    yield (
        "without a shortcut x itself goes on, not divided",
        wrong(lambda x, b, f, s: (s or (lambda h: h))(x / b) + a * f(x / b)),
    )
    yield (
        "x is divided by the deviation beta, not by the variance",
        wrong(lambda x, b, f, s: _block(x, b * b, f, s, a)),
    )
    yield (
        "the block's sum is x + a * branch: x (or its shortcut) is missing",
        wrong(lambda x, b, f, s: a * f(x / b)),
    )
    yield (
        "the last block is missing: this is its input",
        through_blocks(x, blocks[:-1], a)[0],
    )
    branch, shortcut = blocks[-1]
    beta = through_blocks(x, blocks, a)[1][-1, 0]
    yield (
        "a network is a chain: each block gets what the one before it gave, yours gets the first x",
        _block(x, beta, branch, shortcut, a),
    )


def _table_mistakes(x, blocks, transition, a):
    out, right = through_blocks(x, blocks, a)
    betas, measured = right.T
    after = np.append(measured[1:], out.std())
    yield "the columns are exchanged: first the expected deviation, then x's own", right[:, ::-1]
    yield "one row for each block, [L, 2]; yours is turned", right.T
    yield "these are variances: the deviation is the square root", right**2
    yield "only what is expected: the second column is what x HAS, x.std()", right[:, [0, 0]]
    yield "only what is measured: the first column is what (6) expects", right[:, [1, 1]]
    yield (
        "column 1: this is the deviation BEHIND each block; that of its input is wanted",
        np.stack([betas, after], axis=1),
    )
    yield (
        "both columns are of what comes OUT of each block; its input is asked for, the first is 1",
        np.stack([expected_deviations(transition, a, after=True), after], axis=1),
    )
    yield (
        "column 1: measure x, before it is divided by beta",
        np.stack([betas, measured / betas], axis=1),
    )
    yield "column 1: this is x's variance, not its deviation", np.stack([betas, measured**2], 1)
    yield (
        "column 1: this is the output's deviation in every row",
        (np.stack([betas, 0 * betas + out.std()], axis=1)),
    )
    yield (
        "column 1: this is the FIRST input's deviation in every row",
        (np.stack([betas, 0 * betas + x.std()], axis=1)),
    )
    yield "one row for each block is wanted, and two columns", betas


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


# --- 4.4: the two terms ---------------------------------------------------------------------------


def pairs_case(seed, B=5, D=4):
    """u, w [B, D] of unit length, random."""
    return l2_normalise(np.random.default_rng(seed).normal(size=(2, B, D)))


@exercise("4.4")
def two_terms(answer):
    """answer(u [B, D], w [B, D], kappa) -> [2], picture to caption and caption to picture."""
    for seed, s in ((0, 5.0), (1, 3000.0)):
        u, w = pairs_case(seed)
        own = np.arange(len(u))
        z = s * u @ w.T
        right = np.array([cross_entropy(z, own), cross_entropy(z.T, own)])
        mistakes = _term_mistakes(u, w, s, right)
        judge = expect_stable if s > 100 else expect
        judge(call(answer, u, w, np.float64(s)), right, mistakes, infinite=UNDERFLOW)


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
    yield "divided by kappa: it is the INVERSE temperature, it multiplies", _of(u @ w.T / s, own)
    yield "kappa is used as its logarithm: the exp is undone", _of(np.log(s) * (u @ w.T), own)
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
    for small in (1e-6, 1e-8, 1e-9, 1e-10, 1e-12):
        words = "log(weight + a small number) bounds the loss: take log_softmax"
        yield (
            words,
            terms(lambda logp, small=small: -np.log(np.exp(np.diagonal(logp)) + small).mean()),
        )
    yield (
        "the logarithm of a mean; equation (8) is a mean of logarithms",
        terms(lambda logp: -np.log(np.exp(np.diagonal(logp)).mean())),
    )
    every = -np.diagonal(log_softmax(z.ravel()).reshape(z.shape)).mean()
    yield "one softmax over all B^2 pairs: rows and columns each have their own", [every, every]


def _of(z, take):
    return np.array([take(log_softmax(z)), take(log_softmax(z.T))])


# --- 4.5: its gradient, down to the features -----------------------------------------------------

NAMES = "dx, dy, dlog_kappa"


def features_case(seed, B, D):
    """x, y [B, D]: rows of different lengths, random."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, B, D)) * rng.uniform(0.5, 3, (2, B, 1))


@exercise("4.5")
def gradients(answer):
    """answer(x [B, D], y [B, D], log_kappa) -> dx [B, D], dy [B, D], dlog_kappa []."""
    for seed, (B, D, kappa) in enumerate(((5, 4, 3.0), (3, 6, 8.0), (4, 4, 3000.0))):
        x, y = features_case(seed, B, D)
        log_kappa = np.log(kappa)
        right = contrastive_gradients(x, y, log_kappa)
        got = several(call(answer, x, y, log_kappa), right, NAMES)
        for message, wrong in _gradient_mistakes(x, y, log_kappa):
            if _all_same(got, wrong) and not _all_same(wrong, right):
                raise Wrong(message)
        for part, wanted, name in zip(got, right, NAMES.split(", ")):
            expect(part, wanted, (), named(name), OVERFLOW, loose=100 if kappa > 100 else 1)


def _all_same(parts, others):
    return all(same(np.asarray(a), np.asarray(b)) for a, b in zip(parts, others))


def contrastive_gradients(
    x, y, log_kappa, dz=None, through=True, over=1, unit=True, scale=np.exp, turn=True, axis=1
):
    """Equations (7) and (10) to (12), with a place for each mistake."""
    long_x, long_y = (np.linalg.norm(a, axis=axis, keepdims=True) for a in (x, y))
    u, w = (x / long_x, y / long_y) if unit else (x, y)
    kappa = scale(log_kappa)
    z = kappa * u @ w.T
    p, q, eye = softmax(z), softmax(z.T).T, np.eye(len(z))
    dz = (p + q - 2 * eye) / len(z) if dz is None else dz(p, q, eye, len(z))
    du, dw = kappa * dz @ w, kappa * (dz.T if turn else dz) @ u
    if through:
        du = du - (du * u).sum(axis=1, keepdims=True) * u
        dw = dw - (dw * w).sum(axis=1, keepdims=True) * w
    return du / long_x**over, dw / long_y**over, (dz * z).sum()


def _gradient_mistakes(x, y, log_kappa):
    def wrong(**how):
        return contrastive_gradients(x, y, log_kappa, **how)

    dx, dy, dlog = right = wrong()
    kappa = np.exp(log_kappa)
    yield (
        "these are du and dw: equation (12) leads on to x and y",
        wrong(through=False, over=0),
    )
    yield (
        "the part along u and w is not taken off: making x longer does not move u",
        wrong(through=False),
    )
    yield "the division by the length is missing, equation (12)", wrong(over=0)
    yield "divided by the length twice", wrong(over=2)
    yield "x and y are not brought to length 1 first: u = x / |x|", wrong(unit=False)
    yield "x and y are not brought to length 1 first: u = x / |x|", wrong(unit=False, over=0)
    yield (
        "x and y are not brought to length 1 first: u = x / |x|",
        wrong(unit=False, over=0, through=False),
    )
    yield "wrong axis: each row has a length of its own, axis=1", wrong(axis=0)
    yield "one length for all rows: each row has its own, axis=1", wrong(axis=None)
    yield "dw sums over the pictures: dz.T @ u", wrong(turn=False)
    yield "kappa is missing in du and dw, equation (11)", (dx / kappa, dy / kappa, dlog)
    yield "the exp is missing: log_kappa is used as kappa", wrong(scale=lambda s: s)
    yield (
        "this is the gradient of kappa: that of log kappa is kappa times it",
        (dx, dy, dlog / kappa),
    )
    yield "kappa stands in z already: dlog_kappa is the sum of dz * z", (dx, dy, dlog * kappa)
    yield "the sign: probability minus truth", tuple(-a for a in right)
    yield "halved: equation (8) adds its terms, it does not average them", [a / 2 for a in right]
    for message, dz in (
        ("the division by B is missing: equation (8) is a mean", lambda p, q, I, B: p + q - 2 * I),
        ("divided by B twice", lambda p, q, I, B: (p + q - 2 * I) / B**2),
        ("only the rows' term: add that of the columns", lambda p, q, I, B: (p - I) / B),
        ("only the columns' term: add that of the rows", lambda p, q, I, B: (q - I) / B),
        (
            "one softmax only, twice: the second runs over the columns",
            lambda p, q, I, B: 2 * (p - I) / B,
        ),
        (
            "the softmax of the columns must be turned back: softmax(logits.T).T",
            lambda p, q, I, B: (p + q.T - 2 * I) / B,
        ),
        (
            "softmax(z).T is not the softmax of the columns: softmax(z.T).T",
            lambda p, q, I, B: (p + p.T - 2 * I) / B,
        ),
        (
            "the truth stands in both terms: minus 2 on the diagonal",
            lambda p, q, I, B: (p + q - I) / B,
        ),
        ("the truth is missing: probability MINUS truth", lambda p, q, I, B: (p + q) / B),
        (
            "minus 2 from every number: the truth is 1 on the diagonal alone",
            lambda p, q, I, B: (p + q - 2) / B,
        ),
    ):
        yield message, wrong(dz=dz)
