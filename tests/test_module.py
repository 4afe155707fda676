"""Parameters by name, freezing, and checkpoints that are whole or not there."""

import os
import re

import numpy as np
import pytest
import safetensors.numpy

from miniflamingo import module as module_room
from miniflamingo.functional import LayerNorm, Linear
from miniflamingo.module import (
    Module,
    Parameter,
    load_tensors,
    save_tensors,
    write_atomically,
)


class Nested(Module):
    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.first = Linear(2, 3, rng=rng)
        self.layers = [LayerNorm(3), [Linear(3, 1, bias=True, rng=rng)]]
        self.alpha, self.none, self.number = Parameter(np.float32(seed)), None, 3

    def forward(self, x):
        return self.layers[1][0](self.layers[0](self.first(x)))


NAMES = [
    "first.weight",
    "layers.0.weight",
    "layers.0.bias",
    "layers.1.0.weight",
    "layers.1.0.bias",
    "alpha",
]


def test_names_are_paths_in_the_order_of_the_attributes():
    model = Nested()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert model.num_parameters() == 6 + 3 + 3 + 3 + 1 + 1
    assert model.state_dict()["first.weight"] is model.first.weight.data
    assert model(np.ones((5, 2), np.float32)).shape == (5, 1)


def test_freezing():
    model = Nested()
    assert model.layers[0].freeze() is model.layers[0]
    assert model.num_parameters(trainable_only=True) == 17 - 6
    model.freeze()
    assert model.num_parameters(trainable_only=True) == 0
    assert model.unfreeze() is model
    assert model.num_parameters(trainable_only=True) == 17


def test_zero_grad_and_astype():
    model = Nested()
    model.alpha.grad = np.ones(())
    model.zero_grad()
    assert model.alpha.grad is None
    assert {p.dtype for p in model.astype(np.float64).parameters()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, dtype):
    model, other = Nested(seed=1).astype(dtype), Nested(seed=2).astype(dtype)
    model.save(tmp_path / "model.safetensors", {"step": "7"})
    assert other.load(tmp_path / "model.safetensors") is other
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array)
        assert (other.state_dict()[name].dtype, other.state_dict()[name].shape) == (
            dtype, array.shape,
        )  # fmt: skip
    tensors, metadata = load_tensors(tmp_path / "model.safetensors")
    assert sorted(tensors) == sorted(NAMES)
    assert metadata == {"step": "7"}
    # the file is plain safetensors
    assert sorted(safetensors.numpy.load_file(tmp_path / "model.safetensors")) == sorted(NAMES)


def test_views_and_transposed_arrays_are_saved_as_they_look(tmp_path):
    x = np.arange(24.0).reshape(2, 3, 4)
    saved = {"t": x.transpose(2, 0, 1), "step": x[:, ::2], "flip": x[::-1], "scalar": x[1, 1, 1]}
    save_tensors(tmp_path / "x", saved)
    for name, array in load_tensors(tmp_path / "x")[0].items():
        np.testing.assert_array_equal(array, saved[name])
        assert array.shape == saved[name].shape


def test_loading_copies_and_converts():
    model, state = Nested(), Nested(seed=1).astype(np.float64).state_dict()
    model.load_state_dict(state)
    assert model.first.weight.dtype == np.float32
    np.testing.assert_allclose(model.first.weight.data, state["first.weight"], rtol=1e-6)
    state["first.weight"][:] = 0
    assert model.first.weight.data.all()


def test_a_misfit_is_told_whole_and_changes_nothing():
    model = Nested()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = Nested(seed=1).state_dict()
    del state["alpha"]
    state["beta"] = np.zeros(1)
    state["first.weight"] = np.zeros((3, 3))
    state["layers.0.bias"] = np.array([0, np.nan, 0])
    state["layers.0.weight"] = np.array([0, 0, -np.inf])
    with pytest.raises(ValueError) as error:
        model.load_state_dict(state)
    assert str(error.value).split("\n  ") == [
        "checkpoint does not fit the model (5 faults):",
        "mis-shaped: first.weight expected [3, 2], got [3, 3]",
        "missing: alpha []",
        "not finite: layers.0.bias",
        "not finite: layers.0.weight",
        "unexpected: beta",
    ]
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("length", [0, 1, 7, 20, 200, -1])
def test_a_truncated_file_is_a_value_error(tmp_path, length):
    path = tmp_path / "model.safetensors"
    Nested().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=rf"no whole safetensors file \({len(whole[:length])} by"):
        Nested().load(path)


def test_a_file_of_something_else_is_a_value_error_and_none_is_not_found(tmp_path):
    (tmp_path / "text").write_text("not a checkpoint, but long enough to have a header", "utf-8")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        Nested().load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        Nested().load(tmp_path / "absent")


@pytest.mark.parametrize("broken", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_old_file_alone(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "model.safetensors"
    Nested(seed=1).save(path)
    whole = path.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(module_room.os, broken, fail)
    with pytest.raises(error):
        Nested(seed=2).save(path)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_file_is_replaced_whole_and_readable(tmp_path):
    path, before = tmp_path / "file", os.umask(0o022)
    try:
        write_atomically(path, b"old")
        write_atomically(str(path), b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "no" / "folder", b"")


@pytest.mark.parametrize(
    "array, message",
    [
        (np.ones((3, 2), np.int64), "not floating point: first.weight is int64"),
        (np.ones((3, 2), bool), "is bool"),
        (np.ones((3, 2), complex), "is complex128"),
        (np.full((3, 2), None), "is object"),
        (np.full((3, 2), "1"), "is <U1"),
        (np.full((3, 2), 1e300), "not finite: first.weight"),  # in float32 it is infinite
        ([[1, 2]] * 3, "is int64"),
    ],
)
def test_only_floats_that_fit_are_loaded(array, message):
    model = Nested()
    before = model.first.weight.data.copy()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_state_dict(model.state_dict() | {"first.weight": array})
    np.testing.assert_array_equal(model.first.weight.data, before)


def test_ten_faults_are_shown_of_many():
    state = Nested().state_dict() | {f"x\n{i:03}": np.ones(1) for i in range(322)}
    with pytest.raises(ValueError) as error:
        Nested().load_state_dict(state)
    lines = str(error.value).splitlines()
    assert len(lines) == 11 and lines[0].endswith("(322 faults):")
    assert lines[-1].endswith(r"unexpected: x\n009, ... and 312 more")


def test_a_header_is_enough_to_refuse_a_file(tmp_path, monkeypatch):
    save_tensors(tmp_path / "x", {"first.weight": np.ones((3, 3))})
    monkeypatch.setattr(np, "fromfile", None)  # no number is read
    with pytest.raises(ValueError, match=r"x does not fit the model \(6 faults\)"):
        Nested().load(tmp_path / "x")


@pytest.mark.skipif(os.name != "posix", reason="permissions and links")
def test_permissions_and_links_stay(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").chmod(0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "new")
    write_atomically(tmp_path / "folder" / "link", b"2")
    assert (tmp_path / "folder" / "link").is_symlink()
    assert (tmp_path / "new").read_bytes() == b"2"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["folder", "new"]
    write_atomically("/dev/null", b"3")
    assert not os.path.isfile("/dev/null")
