"""The sides in torch give what NumPy's give, and public blocks are found or named."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from miniflamingo.cost import scaling
from miniflamingo.kernels.tools import scaling_peers


@pytest.mark.parametrize("name", scaling.CASES)
def test_the_twins_compute_the_same(name):
    case = scaling.CASES[name]
    size = case.sizes[0][1]
    inputs = case.make(size, np.random.default_rng(0))
    sides = scaling_peers.sides(inputs)
    ours = {side: work for side, work in sides.items() if side.startswith("torch")}
    assert ours
    for _ in range(2):  # a cached word can be asked for again
        scaling.check_equal(case, size, inputs.sides | ours)


def test_a_twin_that_computes_something_else_is_noticed():
    inputs = scaling.CASES["cross-attention"].make(16, np.random.default_rng(0))
    q, k, v = inputs.arrays
    wrong = scaling_peers.sides(replace(inputs, arrays=(2 * q, k, v)))
    with pytest.raises(scaling.Failed, match="torch, eager is off by"):
        scaling.check_equal(scaling.CASES["cross-attention"], 16, inputs.sides | wrong)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(scaling_peers.importlib.util, "find_spec", lambda name: None)
    scaling_peers.load.cache_clear()
    reasons = scaling_peers.missing()
    scaling_peers.load.cache_clear()
    assert reasons == {
        project: f"{project} is not installed: `make scaling` does so"
        for project in ("flamingo-pytorch", "open-flamingo")
    }


def test_public_blocks_take_the_same_arrays():
    if len(scaling_peers.missing()) == 2:
        pytest.skip("neither flamingo-pytorch nor open-flamingo is installed")
    for name in ("resampler, images", "gated block, images"):
        inputs = scaling.CASES[name].make(2, np.random.default_rng(0))
        expected = next(iter(inputs.sides.values()))().shape
        sides = scaling_peers.sides(inputs)
        for project in scaling_peers.PUBLIC.keys() - scaling_peers.missing().keys():
            out = sides[project]()
            assert tuple(out.shape) == expected and out.isfinite().all()
