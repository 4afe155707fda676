"""Differences between rows: against scipy's own tests, and against what can be worked out."""

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")

from miniflamingo.ablations import statistics  # noqa: E402

A = {0: 0.71, 1: 0.64, 2: 0.80, 3: 0.69}
B = {0: 0.55, 1: 0.61, 2: 0.66, 3: 0.40}


def test_seeds_that_both_rows_have_are_compared_pair_by_pair():
    found, ours = statistics.compare(A, B), [list(x.values()) for x in (A, B)]
    theirs = stats.ttest_rel(*ours)
    assert found["paired"] and found["p"] == pytest.approx(theirs.pvalue)
    interval = theirs.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["difference"] == pytest.approx(np.mean(ours[0]) - np.mean(ours[1]))
    more = statistics.compare(A | {9: 0.0}, B)  # a seed that one row alone has counts for nothing
    assert more == found


def test_other_seeds_are_compared_by_welch():
    other = {10 + seed: score for seed, score in B.items()} | {20: 0.5}
    found = statistics.compare(A, other)
    theirs = stats.ttest_ind(list(A.values()), list(other.values()), equal_var=False)
    assert not found["paired"] and found["p"] == pytest.approx(theirs.pvalue)
    interval = theirs.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_seeds_that_agree_to_the_last_digit():
    same = dict.fromkeys(range(3), 0.5)
    assert statistics.compare(same, same)["p"] == 1
    assert statistics.compare(same, dict.fromkeys(range(3), 0.25))["p"] == 0
    welch = statistics.compare(same, dict.fromkeys(range(7, 9), 0.25))
    assert welch["p"] == 0 and welch["low"] == welch["high"] == 0.25


def test_one_seed_tells_nothing():
    with pytest.raises(ValueError, match="needs two seeds of each row, got 1 and 4"):
        statistics.compare({0: 1.0}, B)


def test_holm_s_procedure():
    # Holm (1979): the smallest of m is compared with level / m, the next with level / (m - 1), ...
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    p = np.random.default_rng(0).random(20) ** 3
    adjusted = np.array(statistics.holm(p))
    for level in (0.01, 0.05, 0.3):
        rejected, order = np.zeros(20, bool), np.argsort(p)
        for k, i in enumerate(order):
            if p[i] > level / (20 - k):
                break
            rejected[i] = True
        np.testing.assert_array_equal(adjusted <= level, rejected)


@pytest.mark.parametrize("difference, adjusted, paper, expected", [
    (-0.2, 0.01, -4.2, "same direction"), (0.2, 0.01, -4.2, "opposite"),
    (-0.2, 0.05, -4.2, "not separable"), (-0.2, 0.01, None, "worse"), (0.2, 0.0, None, "better"),
])  # fmt: skip
def test_verdicts(difference, adjusted, paper, expected):
    assert statistics.verdict({"difference": difference}, adjusted, paper) == expected
