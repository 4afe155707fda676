"""Checks of module 10: an overall score, a difference and its error, all images, abstaining."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.functional import log_softmax, softmax

from .core import call, exercise, expect

# --- 10.1: the overall score ----------------------------------------------------------------------


@exercise("10.1")
def overall(answer):
    """answer(scores [C, 5], tuned [5]) -> [C], in per cent."""
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        scores, tuned = rng.uniform(20, 90, (3 + seed, 5)), rng.uniform(60, 140, 5)
        right = overall_of(scores, tuned)
        expect(call(answer, scores, tuned), right, _overall_mistakes(scores, tuned))


def overall_of(scores, tuned):
    """Equation (1)."""
    return 100 * (scores / tuned).mean(axis=1)


def _overall_mistakes(scores, tuned):
    yield "in per cent: multiply by 100", (scores / tuned).mean(axis=1)
    yield (
        "the mean of the ratios is wanted, not the ratio of the means: a benchmark with large "
        "numbers would count more",
        100 * scores.mean(axis=1) / tuned.mean(),
    )
    yield "the plain mean of scores of different kinds: divide each by `tuned`", scores.mean(axis=1)
    yield "upside down: score / tuned", 100 * (tuned / scores).mean(axis=1)
    yield "a sum: the mean over the benchmarks is wanted", 100 * (scores / tuned).sum(axis=1)
    yield (
        "wrong axis: one number for each row, not for each benchmark",
        100 * (scores / tuned).mean(axis=0),
    )
    yield "one number for each row is wanted", 100 * (scores / tuned).mean()
    yield "the median; the paper takes the mean", 100 * np.median(scores / tuned, axis=1)


# --- 10.2: a difference and its error -------------------------------------------------------------


@exercise("10.2")
def difference(answer):
    """answer(a [n], b [m]) -> [2], the difference of the means and its standard error."""
    for seed, n, m in ((0, 3, 4), (1, 5, 3)):
        rng = np.random.default_rng(seed)
        a, b = rng.uniform(0.5, 0.9, n), rng.uniform(0.1, 0.8, m)
        expect(call(answer, a, b), difference_of(a, b), _difference_mistakes(a, b))


def difference_of(a, b, ddof=1, root=np.sqrt):
    """Equation (2)."""
    error = root(a.var(ddof=ddof) / len(a) + b.var(ddof=ddof) / len(b))
    return np.array([a.mean() - b.mean(), error])


def _difference_mistakes(a, b):
    d, e = difference_of(a, b)
    single = [np.sqrt(x.var(ddof=1) / len(x)) for x in (a, b)]
    yield "a minus b, not b minus a", np.array([-d, e])
    yield (
        "divide by n - 1 in the variance (ddof=1): with three runs that is no detail",
        difference_of(a, b, ddof=0),
    )
    yield "this is the variance: take the square root", difference_of(a, b, root=lambda x: x)
    yield "errors do not add up, their squares do", np.array([d, sum(single)])
    yield (
        "divide each variance by its number of runs: the error of a mean is wanted",
        np.array([d, np.sqrt(a.var(ddof=1) + b.var(ddof=1))]),
    )
    yield "the error of a alone: b is uncertain, too", np.array([d, single[0]])
    yield "the error of b alone: a is uncertain, too", np.array([d, single[1]])
    yield (
        "variances of independent numbers ADD, also in a difference",
        np.array([d, np.sqrt(abs(single[0] ** 2 - single[1] ** 2))]),
    )
    yield "the difference alone: its standard error comes second", d
    yield "the error comes second", np.array([e, d])


# --- 10.3: all previous images --------------------------------------------------------------------


def attention_case(seed=0):
    """q [B, L, K]; k, v [B, N, R, K]; phi int[B, L]."""
    rng = np.random.default_rng(seed)
    phi = np.array([[0, 0, 1, 1, 2, 3], [1, 1, 1, 2, 2, 2]])
    return (
        rng.normal(size=(2, 6, 4)),
        rng.normal(size=(2, 3, 2, 4)),
        rng.normal(size=(2, 3, 2, 4)),
        phi,
    )


@exercise("10.3")
def all_previous(answer):
    """answer(q [B, L, K], k, v [B, N, R, K], phi int[B, L]) -> [B, L, K]."""
    for seed in (0, 1):
        case = attention_case(seed)
        expect(call(answer, *case), attend_all(*case), _attention_mistakes(*case))


def attend_all(q, k, v, phi, visible=None, zero=True, scale=True, late=False):
    """Equation (3), one head; places for mistakes."""
    B, N, R, K = k.shape
    keys, values = k.reshape(B, N * R, K), v.reshape(B, N * R, K)
    image = np.repeat(np.arange(1, N + 1), R)
    mask = image <= phi[:, :, None] if visible is None else visible(image, phi[:, :, None])
    scores = q @ keys.swapaxes(1, 2) / (np.sqrt(K) if scale else 1)
    weights = softmax(scores if late else np.where(mask, scores, -1e9))
    return (weights * mask if zero else weights) @ values


def _attention_mistakes(q, k, v, phi):
    case = q, k, v, phi
    yield (
        "a row without an image is a uniform average over ALL images, later ones included: it must "
        "be exactly 0",
        attend_all(*case, zero=False),
    )
    yield (
        "this looks at the last image alone: all images up to phi are wanted",
        attend_all(*case, visible=lambda image, phi: image == phi),
    )
    for zero in (True, False):
        yield (
            "the last image itself is missing: image <= phi, not image < phi",
            attend_all(*case, visible=lambda image, phi: image < phi, zero=zero),
        )
    for visible in (lambda image, phi: image >= phi, lambda image, phi: image > phi):
        yield "these are the images that FOLLOW: image <= phi", attend_all(*case, visible=visible)
    yield (
        "nothing is masked: every token sees every image, later ones, too",
        attend_all(*case, visible=lambda image, phi: image < np.inf + phi, zero=False),
    )
    for zero in (True, False):
        yield "the scores are not divided by sqrt(K)", attend_all(*case, scale=False, zero=zero)
    yield (
        "masked after the softmax: the weights no longer sum to 1",
        attend_all(*case, late=True),
    )
    yield "this is the mean of what each image gives alone: one softmax over all", _mean(*case)


def _mean(q, k, v, phi):
    """Each image attended to by itself, and the results averaged."""
    out = np.zeros_like(q)
    for b, l in np.ndindex(phi.shape):
        parts = [attention(q[b, l, None], k[b, n], v[b, n])[0] for n in range(phi[b, l])]
        out[b, l] = np.mean(parts, axis=0) if parts else 0
    return out


# --- 10.4: abstaining -----------------------------------------------------------------------------


def answers_case(seed=0):
    """Log-probabilities [B, V] of the next word, sure and unsure ones, and the truth int[B]."""
    rng = np.random.default_rng(seed)
    logp = log_softmax(rng.uniform(0.5, 6, (40, 1)) * rng.normal(size=(40, 5)))
    return logp, np.where(rng.random(40) < 0.6, logp.argmax(axis=1), rng.integers(0, 5, 40))


@exercise("10.4")
def abstaining(answer):
    """answer(logp [B, V], truth int[B], level) -> [2]: share answered, accuracy of those."""
    for seed, level in ((0, 0.6), (1, 0.9), (2, 0.75)):
        logp, truth = answers_case(seed)
        right = abstained(logp, truth, level)
        expect(call(answer, logp, truth, level), right, _abstaining_mistakes(logp, truth, level))


def abstained(logp, truth, level):
    """How many questions are answered with a probability of at least `level`, and how well."""
    sure = np.exp(logp.max(axis=1)) >= level
    return np.array([sure.mean(), (logp.argmax(axis=1) == truth)[sure].mean()])


def _abstaining_mistakes(logp, truth, level):
    sure, right = np.exp(logp.max(axis=1)) >= level, logp.argmax(axis=1) == truth
    share, accuracy = abstained(logp, truth, level)
    yield (
        "divided by all questions: the accuracy of those that are ANSWERED is wanted",
        np.array([share, (right & sure).mean()]),
    )
    yield "the accuracy of all answers, unsure ones, too", np.array([share, right.mean()])
    yield "these are the answers below the level", np.array([1 - share, right[~sure].mean()])
    yield "the share left out; the share answered is wanted", np.array([1 - share, accuracy])
    yield "the share answered comes first", np.array([accuracy, share])
    yield (
        "logp is compared with a probability: take exp, or compare with log(level)",
        np.array([(logp.max(axis=1) >= level).mean(), np.nan]),
    )
    true = np.exp(np.take_along_axis(logp, truth[:, None], axis=1)[:, 0]) >= level
    yield (
        "this looks at the probability of the TRUTH, which nobody knows when answering",
        np.array([true.mean(), right[true].mean()]),
    )
    yield "the share of errors; the accuracy is wanted", np.array([share, 1 - accuracy])
    yield "two numbers are wanted: the accuracy is missing", share
    yield "numbers of questions; shares are wanted", np.array([sure.sum(), right[sure].sum()])
