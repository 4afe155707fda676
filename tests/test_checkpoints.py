"""Models from files: looked at before they are built, and refused in one line that names what."""

import json
import pickle
import re
import struct
import time
import tracemalloc
import warnings

import numpy as np
import pytest

from miniflamingo.__main__ import main
from miniflamingo.checkpoints import load_model
from miniflamingo.module import load_tensors, save_tensors, write_atomically
from miniflamingo.tensorfile import TensorFile
from miniflamingo.training import WEIGHTS, save_flamingo
from tests.models import tiny

PLAIN = tiny(dtype=np.float32, lm={"positions": "learned", "max_positions": 9})


@pytest.fixture
def path(tmp_path):
    save_flamingo(tmp_path / "model.safetensors", PLAIN)
    return tmp_path / "model.safetensors"


def rewrite(path, change):
    """Save a file's tensors again with its config changed."""
    state, metadata = load_tensors(path)
    config = json.loads(metadata["flamingo"])
    changed = change(config)
    text = changed if isinstance(changed, str) else json.dumps(config)
    save_tensors(path, state, {"flamingo": text})


def refused(path, stage="flamingo"):
    """The one line with which a file is refused, in no time and no memory."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        load_model(path, stage)
    seconds, (_, most) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5 and most < 50e6, (seconds, most)
    assert str(path) in str(error.value) and len(str(error.value)) < 2000
    return str(error.value)


SIZES = ["media_dim", "num_latents", "resampler_depth", "resampler_heads", "resampler_head_dim",
         "num_frames", "xattn_heads", "xattn_head_dim", "lm.vocab_size", "lm.dim", "lm.depth",
         "lm.ffw_mult", "lm.max_positions", "vision.final_width", "vision.stem", "vision.widths",
         "vision.depths"]  # fmt: skip


def put(config, field, value):
    *parts, name = field.split(".")
    for part in parts:
        config = config[part]
    config[name] = [value, *config[name][1:]] if isinstance(config[name], list) else value


@pytest.mark.parametrize("value", [10**5, 10**9, 10**12, 10**15, 10**30, 0, -1])
@pytest.mark.parametrize("field", SIZES)
def test_a_size_that_the_file_cannot_hold_is_refused_at_once(path, field, value):
    rewrite(path, lambda config: put(config, field, value))
    message = refused(path)
    assert field.split(".")[-1] in message or "multiple of heads" in message, message
    assert " means " not in message or str(value) in message, message


WRONG = {
    "num_latents": ["3", 3.0, None, True, [3]],
    "xattn_every": [0, -1, "1"],
    "only_last": [1, "true", None],
    "resampler": [7, "pooling", None],
    "eoc_token": [-1, 11, 10**30],
    "image_token": [11, 2.5],
    "lm": [None, [], "lm", 7],
    "lm.heads": [0, 3, 17, 10**12],
    "lm.alibi_slopes": [[1], ["a", "b"], 3, [None, 1]],
    "lm.positions": ["rotary", None],
    "vision.image_size": [9, 10**9, 0],
    "vision.bottleneck": ["0.5", -1, 0, 1e300, 1e-300],
    "vision.squeeze_excite": [1e9, 0],
    "vision.group_size": [0, -1, 5],
    "vision.activation": ["tanh", None],
}
CASES = [(field, value) for field, values in WRONG.items() for value in values]


@pytest.mark.parametrize("field, value", CASES)
def test_a_wrong_field_is_named(path, field, value):
    def change(config):
        *parts, name = field.split(".")
        for part in parts:
            config = config[part]
        config[name] = value

    rewrite(path, change)
    message = refused(path)
    assert field.split(".")[-1] in message or "slopes" in message, message


CONFIGS = {
    "unknown": (lambda c: c.update(brand_new=1), "has unknown fields: brand_new"),
    "many": (lambda c: c.update({f"x{i}": 1 for i in range(322)}), "x9, ... and 312 more"),
    "missing": (lambda c: c.pop("lm"), "has missing fields: lm"),
    "missing below": (lambda c: c["lm"].pop("heads"), "flamingo.lm has missing fields: heads"),
    "no JSON": (lambda c: "{", "is no JSON"),
    "NaN": (lambda c: '{"lm": NaN}', "NaN is no number"),
    "deep": (lambda c: '{"lm": ' + "[" * 99_999, "is no JSON"),
    "long": (lambda c: " " * 1_000_001, "1000001 characters, more than 1000000"),
    "list": (lambda c: "[]", "must be an object, got"),
    "empty": (lambda c: "", "is no JSON"),
}


@pytest.mark.parametrize("change, message", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_is_none_is_told(path, change, message):
    rewrite(path, change)
    assert message in refused(path)


def test_a_file_of_another_stage_is_told(tmp_path):
    files = {stage: WEIGHTS / stage / "model.safetensors" for stage in ("lm", "vision", "flamingo")}
    assert "holds no language model but a vision encoder (stage vision)" in refused(
        files["vision"], "lm"
    )
    assert "holds no vision encoder but a Flamingo" in refused(files["flamingo"], "vision")
    assert "holds no Flamingo but a language model" in refused(files["lm"])
    about = {"step": "1", "rng": "{}", "config": "{}"}
    save_tensors(tmp_path / "checkpoint.safetensors", {}, about)
    assert "give the model.safetensors beside it" in refused(tmp_path / "checkpoint.safetensors")
    save_tensors(tmp_path / "none.safetensors", {"w": np.ones(2)})
    assert "holds no Flamingo: its metadata has []" in refused(tmp_path / "none.safetensors")


# --- numbers --------------------------------------------------------------------------------------

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "U8": 1}


def raw(path, tensors, metadata=None, header=None):
    """Write a safetensors file by hand: {name: (dtype, shape, bytes)}, or a header as bytes."""
    about, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, content) in tensors.items():
        place = [len(data), len(data) + len(content)]
        about[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        data += content
    header = json.dumps(about).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_every_bfloat16_and_float16_is_converted_exactly(tmp_path):
    torch = pytest.importorskip("torch")
    bits = np.arange(2**16, dtype=np.uint16)
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16}
    raw(tmp_path / "x", {kind: (kind, [256, 256], bits.tobytes()) for kind in kinds})
    arrays = TensorFile(tmp_path / "x").arrays()
    for kind, dtype in kinds.items():
        expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().reshape(256, 256)
        assert arrays[kind].dtype == np.float32
        np.testing.assert_array_equal(arrays[kind], expected.numpy())


@pytest.mark.parametrize("kind", ["BF16", "F16", "F64"])
def test_other_floats_load_and_it_is_said_in_one_line(path, kind):
    state, metadata = load_tensors(path)
    kept = {"F16": "<f2", "F64": "<f8"}

    def narrow(x):
        if kind == "BF16":
            return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype("<u2").tobytes()
        return x.astype(kept[kind]).tobytes()

    raw(path, {n: (kind, list(x.shape), narrow(x)) for n, x in state.items()}, metadata)
    with pytest.warns(
        UserWarning, match=f"{len(state)} tensors of {kind} converted to float32"
    ) as said:
        model = load_model(path, "flamingo")
    for name, array in model.state_dict().items():
        np.testing.assert_allclose(array, state[name], rtol=0.01, atol=1e-6)
        assert array.dtype == np.float32
    (line,) = (str(about.message) for about in said)
    assert "\n" not in line and str(path) in line


def test_float32_loads_without_a_word(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(path, "flamingo")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL"])
def test_other_kinds_of_numbers_are_refused_by_name(path, kind):
    state, metadata = load_tensors(path)
    width = BYTES.get(kind, 1)
    raw(path, {n: (kind, list(x.shape), bytes(width * x.size)) for n, x in state.items()}, metadata)
    message = refused(path)
    assert f"is {kind}" in message and "other than F16, BF16, F32, F64" in message
    assert f"... and {len(state) - 10} more" in message


# --- headers --------------------------------------------------------------------------------------

ONE = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = {
    "twice": f"{{{ONE}, {ONE}}}".encode(),
    "overlap": f"{{{ONE}, {ONE.replace('a', 'b', 1)}}}".encode(),
    "no UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' + b"[" * 99_999 + b"]" * 99_999 + b"}",
    "unknown kind": f"{{{ONE.replace('F32', 'X9')}}}".encode(),
    "huge shape": f"{{{ONE.replace('[1]', '[1000000000000000, 1000000000000000]')}}}".encode(),
    "negative shape": f"{{{ONE.replace('[1]', '[-1]')}}}".encode(),
    "metadata": b'{"__metadata__": {"a": 1}}',
    "list": b"[]",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_damaged_header_is_told(tmp_path, header):
    raw(tmp_path / "x", {"a": ("F32", [1], b"1234")}, header=header)
    assert "is no whole safetensors file" in refused(tmp_path / "x")


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length_is_told(tmp_path, length):
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
    assert "is no whole safetensors file (10 bytes)" in refused(tmp_path / "x")


def test_other_files_are_told_by_how_they_begin(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for content, kind in (
        (pickle.dumps({"w": [1.0]}), "a pickle"), (b"PK\x03\x04....", "torch.save"),
        (pointer, "git lfs pull"), (b"<!doctype html><html></html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"GGUF....", "GGUF"),
    ):  # fmt: skip
        (tmp_path / "model.safetensors").write_bytes(content)
        assert kind in refused(tmp_path / "model.safetensors")
    assert f"{tmp_path} is no file" in refused(tmp_path)


def test_a_file_that_does_not_fit_its_config_shows_ten_names(path):
    state, metadata = load_tensors(path)
    state = {f"model.{name}": array for name, array in state.items()}
    save_tensors(path, state, metadata)
    message = refused(path)
    assert message.count("\n") == 10 and f"... and {2 * len(state) - 10} more" in message


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_refused(path, value):
    state, metadata = load_tensors(path)
    name = min(state)
    state[name].flat[-1] = value
    save_tensors(path, state, metadata)
    assert f"not finite: {name}" in refused(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        PLAIN.load(path)


def test_the_command_says_it_in_one_line(path, capsys):
    rewrite(path, lambda config: config.update(num_latents=10**12))
    assert main(["generate", "--checkpoint", str(path), "--text", "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "num_latents = 1000000000000" in error


def test_random_damage_of_a_file_is_an_error_or_another_number(path):
    """Never another exception, and never a model with NaN."""
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, header if i % 2 else len(whole), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        write_atomically(path, damaged[: rng.integers(0, len(whole))] if i % 5 == 0 else damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = load_model(path, "flamingo").state_dict()
        except ValueError as error:
            assert str(path) in str(error), error
        else:
            assert all(np.isfinite(x).all() for x in state.values())
