"""Checks of module 11: an overall score, a difference, all divisions, abstaining."""

from itertools import combinations

import numpy as np

from miniflamingo.functional import log_softmax

from .core import Wrong, call, exercise, expect

# --- 11.1: the overall score ----------------------------------------------------------------------


@exercise("11.1")
def overall(answer):
    """answer(scores [E, 5], tuned [5]) -> [E], in per cent."""
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


# --- 11.2: a difference and its error -------------------------------------------------------------


@exercise("11.2")
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
    yield from _pooled(a, b, d)
    yield "errors do not add up, their squares do", np.array([d, sum(single)])
    yield (
        "divide each variance by its number of runs: the error of a mean is wanted",
        np.array([d, np.sqrt(a.var(ddof=1) + b.var(ddof=1))]),
    )
    yield "that is the half-width of a 95 % interval: leave out 1.96", np.array([d, 1.96 * e])
    yield (
        "this is how many errors the difference is: the error itself is wanted",
        np.array([d, d / e]),
    )
    for n in (len(a), len(b)):
        words = "each has a number of runs of its own: a's variance by len(a), b's by len(b)"
        yield words, np.array([d, np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / n)])
    yield "the error of a alone: b is uncertain, too", np.array([d, single[0]])
    yield "the error of b alone: a is uncertain, too", np.array([d, single[1]])
    yield (
        "variances of independent numbers ADD, also in a difference",
        np.array([d, np.sqrt(abs(single[0] ** 2 - single[1] ** 2))]),
    )
    yield "the difference alone: its standard error comes second", d
    yield "the error comes second", np.array([e, d])


def _pooled(a, b, d):
    n, m = len(a), len(b)
    pooled = ((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2)
    for var in (pooled, np.concatenate([a, b]).var(ddof=1)):
        yield (
            "pooled: this takes ONE variance for both, equation (2) each one's own, as a and b may "
            "spread differently",
            np.array([d, np.sqrt(var * (1 / n + 1 / m))]),
        )


# --- 11.3: all ways to divide the runs ------------------------------------------------------------


@exercise("11.3")
def dividing(answer):
    """answer(rows, a list of E arrays, baseline [m]) -> p [E]."""
    for seed, counts, m in ((0, (3, 3), 3), (1, (2, 4, 3), 4), (2, (5, 1), 3)):
        rng = np.random.default_rng(seed)
        rows = [rng.uniform(0.2, 0.8, n) + 0.3 * (i % 2) for i, n in enumerate(counts)]
        case = rows, rng.uniform(0.3, 0.9, m)
        mistakes = [(words, divided(*case, **how)) for words, how in DIVIDING_MISTAKES]
        expect(call(answer, *case), divided(*case), mistakes)


def divided(rows, baseline, two_sided=True, least=True, alone=False, by=np.mean, how=np.mean):
    """The share of all divisions whose difference is as large as the one observed, for each row."""
    found = []
    for a in rows:
        a, b = np.asarray(a), np.asarray(baseline)
        size = abs if two_sided else (lambda x: x)
        observed, scores = size(by(b) - by(a)), np.concatenate([a, b])
        hits = []
        for chosen in combinations(range(len(scores)), len(a)):
            mine = np.isin(np.arange(len(scores)), chosen)
            d = size(by(scores[~mine]) - by(scores[mine])) if (~mine).any() else -1
            hits.append(d >= observed - 1e-9 if least else d > observed + 1e-9)
        found.append(how(hits[1:] if alone else hits))
    return np.array(found, float)


DIVIDING_MISTAKES = [
    ("one-sided: a difference in either direction counts, so take its size", {"two_sided": False}),
    ("as large as the one observed, or larger: >=. The division that was observed counts, too",
     {"least": False}),
    ("the division that was observed is one of all of them", {"alone": True}),
    ("sums of groups of different counts: compare their MEANS", {"by": np.sum}),
    ("the number of divisions; their share is wanted", {"how": np.sum}),
    ("medians: the means are compared", {"by": np.median}),
    ("this is the share of the SMALLER differences: 1 - p", {"how": lambda x: 1 - np.mean(x)}),
]  # fmt: skip


# --- 11.4: abstaining -----------------------------------------------------------------------------


def answers_case(seed=0):
    """Log-probabilities [B, V] of the next word, sure and unsure ones, and the truth int[B]."""
    rng = np.random.default_rng(seed)
    logp = log_softmax(rng.uniform(0.5, 6, (40, 1)) * rng.normal(size=(40, 5)))
    return logp, np.where(rng.random(40) < 0.6, logp.argmax(axis=1), rng.integers(0, 5, 40))


@exercise("11.4")
def abstaining(answer):
    """answer(logp [B, V], truth int[B], level) -> [2]: share answered, accuracy of those."""
    for seed, level in ((0, 0.6), (1, 0.9), (2, 0.75)):
        logp, truth = answers_case(seed)
        right = abstained(logp, truth, level)
        expect(call(answer, logp, truth, level), right, _abstaining_mistakes(logp, truth, level))
    # words of probability 1 and 0: exactly at the level; and above it, where nothing is answered
    logp, truth = np.where(np.eye(5)[[0, 1, 1, 2]] > 0, 0.0, -800.0), np.array([0, 1, 2, 2])
    exact = [("at LEAST the level: >=, not >", [0.0, bad]) for bad in (0.0, 1.0, np.nan)]
    expect(call(answer, logp, truth, 1.0), [1.0, 0.75], exact)
    try:
        out = call(answer, logp, truth, 1.5)
    except Wrong as wrong:
        raise Wrong(f"{wrong}, where nothing is answered: then the accuracy is NaN") from None
    words = "the accuracy of no answers at all is 0 / 0, NaN: 0 would say that all are wrong"
    expect(out, [0.0, np.nan], [(words, [0.0, bad]) for bad in (0.0, 1.0, 0.75)], _nobody)


def _nobody(got, right):
    return (
        f"where nothing is answered, share and accuracy are 0 and NaN (0 / 0), got {got.tolist()}"
    )


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
    yield "a number of questions; their share is wanted", np.array([sure.sum(), accuracy])
    yield "two numbers are wanted: the accuracy is missing", share
    yield "numbers of questions; shares are wanted", np.array([sure.sum(), right[sure].sum()])
