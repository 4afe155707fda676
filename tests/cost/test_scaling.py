"""The measurement's own parts: slopes, intervals, what is compared, what is counted."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from miniflamingo.command import Failed, in_processes
from miniflamingo.cost import scaling
from miniflamingo.cost.scaling import CASES, Inputs
from tests.cost.products import counted


def rows(sizes, seconds, flops=None):
    """Rows as `measure` makes them; seconds [sizes][repeats]."""
    flops = sizes if flops is None else flops
    return [{"size": n, "side": "NumPy", "seconds": s, "median": float(np.median(s)),
             "bytes": 8 * n, "flops": f} for n, s, f in zip(sizes, seconds, flops)]  # fmt: skip


def test_a_slope_is_the_exponent_of_a_power():
    sizes = np.array([2, 4, 8, 32])
    assert scaling.slope(sizes, 3.0 * sizes**1.7) == pytest.approx(1.7)
    both = scaling.slope(sizes, np.stack([sizes**2.0, 5.0 / sizes]))
    assert both == pytest.approx([2, -1])


@pytest.mark.parametrize("sizes, values", [([2, 2], [1, 2]), ([0, 2], [1, 2]), ([1, 2], [0, 2])])
def test_a_slope_of_nothing_is_refused(sizes, values):
    with pytest.raises(ValueError, match="a slope needs two sizes and values above 0"):
        scaling.slope(sizes, values)


def test_an_exponent_has_an_interval_that_repeats_decide():
    sizes, case = [1, 2, 4, 8, 16, 32], CASES["resampler, images"]
    exact = scaling.exponent(rows(sizes, [[n**1.5] * 5 for n in sizes]), case)
    assert exact["sizes"] == [4, 8, 16, 32]  # without the smallest third
    assert (exact["low"], exact["exponent"], exact["high"]) == pytest.approx((1.5, 1.5, 1.5))
    assert exact["counted"] == pytest.approx(1) == exact["memory"]
    rng = np.random.default_rng(0)
    noisy = [list(n**1.5 * np.exp(rng.normal(0, 0.3, 7))) for n in sizes]
    fit = scaling.exponent(rows(sizes, noisy), case)
    assert 0.05 < fit["high"] - fit["low"] < 1 and fit["low"] < fit["exponent"] < fit["high"]


def test_shots_count_with_the_picture_that_is_asked_about():
    sizes = [0, 1, 3, 7]
    fit = scaling.exponent(rows(sizes, [[n + 1.0] * 2 for n in sizes]), CASES["reading a prompt"])
    assert fit["sizes"] == [2, 4, 8] and fit["exponent"] == pytest.approx(1)


def test_memory_is_what_a_call_holds():
    assert 8e6 <= scaling.most_held(lambda: np.ones(10**6)) < 8.1e6
    # in a fresh process, as a run does it: malloc of this one may hold a hole that is large enough
    (grown,) = in_processes(1, scaling.growth, [partial(np.ones, 10**7)], method="spawn")
    assert grown is None or 7.5e7 < grown < 9e7  # None: not Linux


@pytest.mark.parametrize("name", CASES)
def test_every_case_measures_and_counts(name):
    """At its smallest size; the two ways to write a word, and a dense mask, give the same."""
    case = replace(CASES[name], sizes=((CASES[name].sizes[0][0], CASES[name].sizes[0][1]), ()))
    found = scaling.measure(case, repeats=2)
    document = scaling.summarise(case, found)
    sides = list(document["fits"])
    assert sides[0].startswith("NumPy") and document["ratios"][sides[0]] == 1
    for row in found:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 < row["bytes"]
    flops = {(r["size"], r["side"]): r["flops"] for r in found}
    small, large = case.sizes[0]
    assert all(0 < flops[small, side] < flops[large, side] for side in sides)


@pytest.mark.parametrize(
    "name, size, side",
    [("Perceiver, inputs", 40, "NumPy"), ("Perceiver, latents", 24, "NumPy"),
     ("resampler, frames", 3, "NumPy"), ("resampler, images", 2, "NumPy"),
     ("gated block, images", 2, "NumPy"), ("gated block, images", 2, "NumPy, dense mask"),
     ("one more word", 3, "NumPy, cached")],
)  # fmt: skip
def test_flops_are_those_of_numpys_products(name, size, side):
    inputs = CASES[name].make(size, np.random.default_rng(0))
    head = 2 * scaling.D * scaling.SMALL.lm.vocab_size if name == "one more word" else 0
    number = counted(inputs.module, inputs.sides[side])
    assert number - head == CASES[name].flops(size, side)


def test_a_dense_mask_and_no_cache_are_counted_as_more():
    image, word = (CASES[name].flops for name in ("gated block, images", "one more word"))
    R, K, H, L = scaling.R, scaling.K, scaling.H, 256
    assert image(8, "NumPy, dense mask") - image(8, "NumPy") == 4 * L * 7 * R * H * K
    assert image(1, "torch") == image(1, "NumPy")
    assert word(32, "NumPy, not cached") > 100 * word(32, "NumPy, cached")


def test_the_flops_of_a_cached_word_are_those_of_a_prompt_of_one():
    """A prompt that has one token more costs that token, and nothing else that is cached."""
    c, s = scaling.SMALL, scaling.counting
    L = scaling.SHOT * 5 - 3
    whole = [s.flops(c, s.Sequence(n, 5)) for n in (L - 1, L)]
    more = sum(whole[1][part].forward - whole[0][part].forward for part in ("gated_xattn", "lm"))
    back = 4 * (L - 1) * c.lm.dim * c.lm.depth  # the others' attention to the new one: masked
    assert scaling.read_flops(4, "NumPy, cached") == more - back


def test_sides_that_differ_fail_but_public_ones_may():
    case, one = CASES["self-attention"], np.ones(3)
    scaling.check_equal(case, 8, {"NumPy": lambda: one, "open-flamingo": lambda: 2 * one})
    with pytest.raises(Failed, match="self-attention of 8: torch is off by 1"):
        scaling.check_equal(case, 8, {"NumPy": lambda: one, "torch": lambda: 2 * one})
    with pytest.raises(Failed, match="torch is off by nan"):
        scaling.check_equal(case, 8, {"NumPy": lambda: one, "torch": lambda: np.nan * one})


def test_short_calls_are_repeated_until_the_clock_can_see_them(monkeypatch):
    """Also where something else took the processor's time during one of the first calls."""
    taken = itertools.chain([1e-4, 3e-3], itertools.repeat(1e-4))
    now = 0.0

    def work():
        nonlocal now
        now += next(taken)

    monkeypatch.setattr(scaling.time, "process_time", lambda: now)
    timed = scaling.Timed(CASES["self-attention"], 1, "NumPy", work)
    assert timed.calls == 128
    timed.measure()
    assert timed.seconds == [pytest.approx(1e-4)]


def test_without_torch_its_sides_are_left_out_with_the_reason(monkeypatch):
    def missing(*names):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(scaling, "require", missing)
    more, reasons = scaling.others()
    assert more(Inputs({}, "attention")) == {} and "torch" in reasons["torch"]
    assert reasons.keys() == {"torch", "flamingo-pytorch", "open-flamingo"}


def test_the_environment_is_as_it_was(monkeypatch):
    seen = []

    def here(jobs, work, *columns, method):
        seen.append(scaling.os.environ["MALLOC_MMAP_THRESHOLD_"])
        return [{} for _ in columns[0]]

    monkeypatch.setattr(scaling, "in_processes", here)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert scaling.all_growth(["self-attention"], 0) == {"self-attention": {}}
    assert seen == ["65536"] and "MALLOC_MMAP_THRESHOLD_" not in scaling.os.environ
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "7")
    scaling.all_growth(["self-attention"], 0)
    assert scaling.os.environ["MALLOC_MMAP_THRESHOLD_"] == "7"
