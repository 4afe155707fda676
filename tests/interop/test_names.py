"""The tables of names: renaming, cutting, joining, and names that no rule knows."""

import numpy as np
import pytest

from miniflamingo.interop.names import Renamed, below, scalar, vector_or_scalar

RULES = (
    (r"layers\.(\d+)\.(up|down)\.weight", "blocks.#.ffw.#.weight"),
    (r"to_kv", ("k", "v")),
    (r"added", "table+"),
    (r"table", "table"),
    (r".*inv_freq", None),
    (r"gate", "alpha", scalar),
)


def test_renamed():
    state = {
        "layers.3.up.weight": np.eye(2), "to_kv": np.arange(6).reshape(6, 1), "gate": np.ones(1),
        "added": np.full((1, 2), 7), "table": np.zeros((2, 2)), "x.inv_freq": np.ones(3),
    }  # fmt: skip
    ours = Renamed(state, RULES)
    assert set(ours) == {"blocks.3.ffw.up.weight", "k", "v", "alpha", "table"}
    assert len(ours) == 5
    assert ours["k"].ravel().tolist(), ours["v"].ravel().tolist() == ([0, 1, 2], [3, 4, 5])
    assert ours["table"].tolist() == [[0, 0], [0, 0], [7, 7]]  # the added rows come last
    assert ours["alpha"].shape == ()
    assert set(ours.without("k")) == set(ours) - {"k"}


def test_nothing_is_read_before_it_is_asked_for():
    class Lazy(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    read = []
    ours = Renamed(Lazy(table=np.zeros((1, 1)), to_kv=np.zeros((2, 1))), RULES)
    assert sorted(ours) == ["k", "table", "v"]
    assert not read
    assert ours["v"].shape == (1, 1)
    assert read == ["to_kv"]


def test_unknown_names_are_counted_and_ten_are_shown():
    with pytest.raises(ValueError, match=r"12 names are not understood: x0, .*x9, .* and 2 more"):
        Renamed({f"x{i}": np.zeros(1) for i in range(12)}, RULES)


@pytest.mark.parametrize("name, array", [("to_kv", np.zeros((3, 1))), ("gate", np.zeros(2))])
def test_a_shape_that_cannot_be_changed_names_the_tensor(name, array):
    ours = Renamed({name: array}, RULES)
    with pytest.raises(ValueError, match=rf"{name} \[{array.shape[0]}"):
        [ours[n] for n in ours]


def test_below():
    rules = below(r"a\.(\d+)\.", RULES, "b.#.")
    ours = Renamed({"a.5.to_kv": np.zeros((2, 1)), "a.5.layers.1.up.weight": np.zeros(1)}, rules)
    assert set(ours) == {"b.5.k", "b.5.v", "b.5.blocks.1.ffw.up.weight"}


def test_gates_of_one_number_and_of_many():
    assert vector_or_scalar(np.ones((1,))).shape == ()
    assert vector_or_scalar(np.ones((1, 1, 4))).shape == (4,)
