"""Two rows over several seeds: is there a difference, how large, and in the paper's direction?

Runs of one seed see the same pictures, so where both rows have a seed the two are compared pair by
pair (Student's t of the differences); rows that share fewer than two seeds by Welch's t. A family
of rows is tested at once: Holm's step-down (1979) keeps the chance of any false verdict at 5 %.
"""

import numpy as np
from scipy import stats

LEVEL = 0.05


def compare(a, b):
    """{seed: score} of a row and of its baseline -> {"difference", "low", "high", "p", "paired"}.

    low and high: the 95 % interval of the mean difference. ValueError for fewer than two seeds.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a difference needs two seeds of each row, got {len(a)} and {len(b)}")
    if paired := len(shared := sorted(a.keys() & b.keys())) >= 2:
        x = np.array([a[s] - b[s] for s in shared])
        mean, error, freedom = x.mean(), x.std(ddof=1) / np.sqrt(len(x)), len(x) - 1
    else:
        x, y = (np.array(list(v.values())) for v in (a, b))
        mean, (vx, vy) = x.mean() - y.mean(), (v.var(ddof=1) / len(v) for v in (x, y))
        error = np.sqrt(vx + vy)
        parts = vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1)
        freedom = (vx + vy) ** 2 / parts if parts else len(x) + len(y) - 2
    half = error * stats.t.ppf(1 - LEVEL / 2, freedom)
    return {"difference": float(mean), "low": float(mean - half), "high": float(mean + half),
            "p": _p(mean, error, freedom), "paired": bool(paired)}  # fmt: skip


def _p(mean, error, freedom):
    """Two-sided; seeds that agree to the last digit have no error, and then all or nothing."""
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def holm(p):
    """p values -> those that Holm's procedure compares with the level, in the same order."""
    p, order = np.asarray(p, float), np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, stepped)
    return adjusted.tolist()


def verdict(found, adjusted, paper):
    """What a comparison says beside the paper's difference, which may be None."""
    if adjusted >= LEVEL:
        return "not separable"
    if paper is None:
        return "better" if found["difference"] > 0 else "worse"
    return "same direction" if found["difference"] * paper > 0 else "opposite"
