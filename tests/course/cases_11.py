"""Right and wrong answers to the exercises of module 11, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_11 import divided

# --- 11.1 and 10.2 --------------------------------------------------------------------------------


def overall(scores, tuned):
    return 100 * np.mean(scores / tuned, axis=1)


def overall_by_loops(scores, tuned):
    return [sum(s / t for s, t in zip(row, tuned)) / len(tuned) * 100 for row in scores]


def error(x, ddof=1):
    return np.std(x, ddof=ddof) / np.sqrt(len(x))


def difference(a, b):
    return np.array([a.mean() - b.mean(), np.hypot(error(a), error(b))])


def pooled(a, b):
    n, m = len(a), len(b)
    var = ((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2)
    return a.mean() - b.mean(), np.sqrt(var * (1 / n + 1 / m))


def difference_by_sums(a, b):
    squares = [((x - x.mean()) ** 2).sum() / (len(x) - 1) / len(x) for x in (a, b)]
    return sum(a) / len(a) - sum(b) / len(b), sum(squares) ** 0.5


# --- 11.3: all divisions --------------------------------------------------------------------------


def divided_by_bits(rows, baseline):
    """Every subset of the runs as a number in binary; those of another size are left out."""
    found = []
    for a in rows:
        scores, n = [*map(float, a), *map(float, baseline)], len(a)
        groups = [mask for mask in range(2 ** len(scores)) if mask.bit_count() == n]

        def apart(mask, scores=scores):
            mine = [x for i, x in enumerate(scores) if mask >> i & 1]
            others = [x for i, x in enumerate(scores) if not mask >> i & 1]
            return abs(sum(mine) / len(mine) - sum(others) / len(others))

        observed = apart(2**n - 1)
        found.append(sum(apart(g) >= observed - 1e-9 for g in groups) / len(groups))
    return np.array(found)


def divided_in_place(rows, baseline):
    p = divided(rows, baseline)
    baseline -= baseline.mean()
    return p


# --- 11.4: abstaining -----------------------------------------------------------------------------


def abstain(logp, truth, level, least=np.greater_equal):
    p, said = np.exp(logp).max(axis=1), logp.argmax(axis=1)
    sure = least(p, level)
    return np.array([np.mean(sure), np.mean(said[sure] == truth[sure])])


def abstain_by_loops(logp, truth, level):
    kept = [(row, t) for row, t in zip(logp, truth) if max(row) >= np.log(level)]
    hits = sum(int(np.argmax(row) == t) for row, t in kept)
    return len(kept) / len(logp), hits / len(kept) if kept else float("nan")


def by_division(logp, truth, level):
    kept = [row.argmax() == t for row, t in zip(logp, truth) if max(row) >= np.log(level)]
    return len(kept) / len(logp), sum(kept) / len(kept)


def by_truth(logp, truth, level):
    sure = np.exp(logp[np.arange(len(truth)), truth]) >= level
    return np.array([sure.mean(), (logp.argmax(axis=1) == truth)[sure].mean()])


def of_all(logp, truth, level):
    share, accuracy = abstain(logp, truth, level)
    return np.array([share, share * accuracy])


RIGHT = [
    ("11.3", divided),
    ("11.3", divided_by_bits),
    ("11.1", overall),
    ("11.1", overall_by_loops),
    ("11.2", difference),
    ("11.2", difference_by_sums),
    ("11.4", abstain),
    ("11.4", abstain_by_loops),
]

WRONG = [
    ("11.3", lambda *a: divided(*a, two_sided=False), "one-sided"),
    ("11.3", lambda *a: divided(*a, least=False), "or larger: >="),
    ("11.3", lambda *a: divided(*a, alone=True), "is one of all of them"),
    ("11.3", lambda *a: divided(*a, by=np.sum), "compare their MEANS"),
    ("11.3", lambda *a: divided(*a, by=np.median), "medians"),
    ("11.3", lambda *a: divided(*a, how=np.sum), "the number of divisions"),
    ("11.3", lambda *a: 1 - divided(*a), "the SMALLER differences"),
    ("11.3", lambda *a: divided(*a)[:1], "wrong shape: [2] is wanted, got [1]"),
    ("11.3", divided_in_place, "changes its argument number 2 in place"),
    ("11.1", lambda s, t: (s / t).mean(axis=1), "in per cent"),
    ("11.1", lambda s, t: 100 * s.sum(axis=1) / t.sum(), "not the ratio of the means"),
    ("11.1", lambda s, t: s.mean(axis=1), "scores of different kinds"),
    ("11.1", lambda s, t: 100 * (t / s).mean(axis=1), "upside down"),
    ("11.1", lambda s, t: 100 * (s / t).mean(axis=0), "wrong axis"),
    ("11.1", lambda s, t: 100 * (s / t).mean(), "one number for each row"),
    ("11.2", lambda a, b: difference(b, a), "a minus b"),
    ("11.2", lambda a, b: [a.mean() - b.mean(), np.hypot(error(a, 0), error(b, 0))], "ddof=1"),
    ("11.2", lambda a, b: difference(a, b) ** [1, 2], "take the square root"),
    ("11.2", lambda a, b: [a.mean() - b.mean(), error(a) + error(b)], "errors do not add up"),
    ("11.2", lambda a, b: [a.mean() - b.mean(), np.hypot(a.std(ddof=1), b.std(ddof=1))],
     "divide each variance by its number"),
    ("11.2", lambda a, b: [a.mean() - b.mean(), error(a)], "the error of a alone"),
    ("11.2", lambda a, b: a.mean() - b.mean(), "its standard error comes second"),
    ("11.4", of_all, "divided by all questions"),
    ("11.4", lambda g, t, level: [abstain(g, t, level)[0], abstain(g, t, 0)[1]], "unsure ones"),
    ("11.4", lambda *a: 1 - abstain(*a) * [1, 0] - [0, 1 - abstain(*a)[1]], "the share left out"),
    ("11.4", lambda *a: abstain(*a)[::-1], "comes first"),
    ("11.4", by_truth, "the probability of the TRUTH"),
    ("11.4", lambda g, t, level: abstain(g, t, np.exp(level)), "compared with a probability"),
    ("11.4", lambda *a: abstain(*a)[0], "two numbers are wanted"),
    ("11.1", lambda s, t: overall(s, t) * 5 / len(s), "every number is"),
    ("11.2", pooled, "pooled: this takes ONE variance for both"),
    ("11.2", lambda a, b: [a.mean() - b.mean(), 1.96 * difference(a, b)[1]], "leave out 1.96"),
    ("11.4", lambda *a: abstain(*a, least=np.greater), "at LEAST the level"),
    ("11.4", lambda *a: np.nan_to_num(abstain(*a), nan=0), "no answers at all is 0 / 0"),
    ("11.4", lambda *a: np.nan_to_num(abstain(*a), nan=1), "no answers at all is 0 / 0"),
    ("11.4", lambda *a: np.nan_to_num(abstain(*a), nan=-5), "share and accuracy are 0 and NaN"),
    ("11.4", by_division, "ZeroDivisionError: division by zero, where nothing is answered"),
]  # fmt: skip
