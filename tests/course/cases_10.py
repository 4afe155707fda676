"""Right and wrong answers to the exercises of module 10, for test_checks.py."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.functional import softmax

# --- 10.1 and 10.2 --------------------------------------------------------------------------------


def overall(scores, tuned):
    return 100 * np.mean(scores / tuned, axis=1)


def overall_by_loops(scores, tuned):
    return [sum(s / t for s, t in zip(row, tuned)) / len(tuned) * 100 for row in scores]


def error(x, ddof=1):
    return np.std(x, ddof=ddof) / np.sqrt(len(x))


def difference(a, b):
    return np.array([a.mean() - b.mean(), np.hypot(error(a), error(b))])


def difference_by_sums(a, b):
    squares = [((x - x.mean()) ** 2).sum() / (len(x) - 1) / len(x) for x in (a, b)]
    return sum(a) / len(a) - sum(b) / len(b), sum(squares) ** 0.5


# --- 10.3: all previous images --------------------------------------------------------------------


def attend(q, k, v, phi, sees=np.less_equal, zero=True, fill=-1e9, scale=True):
    """As in the notebook, with a place for each mistake."""
    B, N, R, K = k.shape
    mask = sees(np.repeat(np.arange(N) + 1, R), phi[..., None])
    scores = q @ k.reshape(B, N * R, K).swapaxes(1, 2) * (K**-0.5 if scale else 1)
    out = softmax(np.where(mask, scores, fill)) @ v.reshape(B, N * R, K)
    return out * (phi > 0)[..., None] if zero else out


def attend_by_loops(q, k, v, phi):
    out = np.zeros_like(q)
    for b, row in enumerate(phi):
        for l, n in enumerate(row):
            if n:
                keys, values = (np.concatenate(x[b, :n]) for x in (k, v))
                out[b, l] = attention(q[b, l, None], keys, values)[0]
    return out


def late(q, k, v, phi):
    B, N, R, K = k.shape
    mask = np.repeat(np.arange(N) + 1, R) <= phi[..., None]
    weights = softmax(q @ k.reshape(B, N * R, K).swapaxes(1, 2) / np.sqrt(K))
    return (weights * mask) @ v.reshape(B, N * R, K)


# --- 10.4: abstaining -----------------------------------------------------------------------------


def abstain(logp, truth, level):
    p, said = np.exp(logp).max(axis=1), logp.argmax(axis=1)
    return np.array([np.mean(p >= level), np.mean(said[p >= level] == truth[p >= level])])


def abstain_by_loops(logp, truth, level):
    kept = [(row, t) for row, t in zip(logp, truth) if max(row) >= np.log(level)]
    hits = sum(int(np.argmax(row) == t) for row, t in kept)
    return len(kept) / len(logp), hits / len(kept)


def by_truth(logp, truth, level):
    sure = np.exp(logp[np.arange(len(truth)), truth]) >= level
    return np.array([sure.mean(), (logp.argmax(axis=1) == truth)[sure].mean()])


def of_all(logp, truth, level):
    share, accuracy = abstain(logp, truth, level)
    return np.array([share, share * accuracy])


def everything(*images):
    return np.ones(np.broadcast_shapes(*(np.shape(i) for i in images)), bool)


RIGHT = [
    ("10.1", overall),
    ("10.1", overall_by_loops),
    ("10.2", difference),
    ("10.2", difference_by_sums),
    ("10.3", attend),
    ("10.3", attend_by_loops),
    ("10.4", abstain),
    ("10.4", abstain_by_loops),
]

WRONG = [
    ("10.1", lambda s, t: (s / t).mean(axis=1), "in per cent"),
    ("10.1", lambda s, t: 100 * s.sum(axis=1) / t.sum(), "not the ratio of the means"),
    ("10.1", lambda s, t: s.mean(axis=1), "scores of different kinds"),
    ("10.1", lambda s, t: 100 * (t / s).mean(axis=1), "upside down"),
    ("10.1", lambda s, t: 100 * (s / t).mean(axis=0), "wrong axis"),
    ("10.1", lambda s, t: 100 * (s / t).mean(), "one number for each row"),
    ("10.2", lambda a, b: difference(b, a), "a minus b"),
    ("10.2", lambda a, b: [a.mean() - b.mean(), np.hypot(error(a, 0), error(b, 0))], "ddof=1"),
    ("10.2", lambda a, b: difference(a, b) ** [1, 2], "take the square root"),
    ("10.2", lambda a, b: [a.mean() - b.mean(), error(a) + error(b)], "errors do not add up"),
    ("10.2", lambda a, b: [a.mean() - b.mean(), np.hypot(a.std(ddof=1), b.std(ddof=1))],
     "divide each variance by its number"),
    ("10.2", lambda a, b: [a.mean() - b.mean(), error(a)], "the error of a alone"),
    ("10.2", lambda a, b: a.mean() - b.mean(), "its standard error comes second"),
    ("10.3", lambda *a: attend(*a, zero=False), "a uniform average over ALL images"),
    ("10.3", lambda *a: attend(*a, sees=np.equal), "the last image alone"),
    ("10.3", lambda *a: attend(*a, sees=np.less, zero=False), "the last image itself is missing"),
    ("10.3", lambda *a: attend(*a, sees=everything, zero=False), "nothing is masked"),
    ("10.3", lambda *a: attend(*a, scale=False), "not divided by sqrt(K)"),
    ("10.3", late, "masked after the softmax"),
    ("10.3", lambda q, k, v, p: attend(q, k, v, p)[..., :2], "wrong shape"),
    ("10.4", of_all, "divided by all questions"),
    ("10.4", lambda g, t, level: [abstain(g, t, level)[0], abstain(g, t, 0)[1]], "unsure ones"),
    ("10.4", lambda *a: 1 - abstain(*a) * [1, 0] - [0, 1 - abstain(*a)[1]], "the share left out"),
    ("10.4", lambda *a: abstain(*a)[::-1], "comes first"),
    ("10.4", by_truth, "the probability of the TRUTH"),
    ("10.4", lambda g, t, level: abstain(g, t, np.exp(level)), "compared with a probability"),
    ("10.4", lambda *a: abstain(*a)[0], "two numbers are wanted"),
]  # fmt: skip
