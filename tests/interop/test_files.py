"""Checkpoints of others on disk: read lazily, and refused in one line that names what is wrong."""

import json
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest

from miniflamingo.interop import files
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.module import load_tensors, save_tensors
from tests.interop.made import LLAMA, gguf_llama, llama_state, save_folder, save_gguf
from tests.test_checkpoints import raw

STATE = llama_state()


def refused(path, **options):
    """The one line with which a checkpoint is refused."""
    with pytest.raises(ValueError) as error:
        checkpoint = open_checkpoint(path, **options)
        for name in checkpoint:
            checkpoint[name]
    message = str(error.value)
    assert "\n" not in message and len(message) < 1500, message
    return message


def same(checkpoint, state):
    assert {*checkpoint} == {*state} and len(checkpoint) == len(state)
    for name, array in state.items():
        assert checkpoint.shapes[name] == array.shape
        np.testing.assert_array_equal(checkpoint[name], array)
        np.testing.assert_array_equal(checkpoint.mapped(name), array)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_folder_is_a_mapping(tmp_path, shards):
    folder = save_folder(tmp_path / "m", LLAMA, STATE, shards)
    checkpoint = open_checkpoint(folder)
    same(checkpoint, STATE)
    assert checkpoint.config == LLAMA and checkpoint.folder == folder
    assert checkpoint.size() == sum(x.size for x in STATE.values())
    assert {*checkpoint.dtypes.values()} == {"F32"}


def test_shards_without_an_index_are_read_together(tmp_path):
    folder = save_folder(tmp_path / "m", LLAMA, STATE, 3)
    (folder / "model.safetensors.index.json").unlink()
    same(open_checkpoint(folder), STATE)


def test_a_file_alone_takes_the_config_beside_it(tmp_path):
    folder = save_folder(tmp_path / "m", LLAMA, STATE)
    assert open_checkpoint(folder / "model.safetensors").config == LLAMA
    (folder / "config.json").unlink()
    assert open_checkpoint(folder / "model.safetensors").config == {}


def test_opening_reads_no_numbers(tmp_path):
    big = {"w": np.zeros((4000, 1000), np.float32)}
    folder = save_folder(tmp_path / "m", LLAMA, big)
    tracemalloc.start()
    checkpoint = open_checkpoint(folder)
    mapped = checkpoint.mapped("w")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2e6 and mapped.shape == (4000, 1000) and not mapped.flags.writeable


@pytest.mark.parametrize("kind, dtype", [("F16", "<f2"), ("F64", "<f8"), ("I64", "<i8")])
def test_other_kinds_of_numbers(tmp_path, kind, dtype):
    array = np.arange(6).reshape(2, 3)
    raw(tmp_path / "x.safetensors", {"a": (kind, [2, 3], array.astype(dtype).tobytes())})
    got = open_checkpoint(tmp_path / "x.safetensors")["a"]
    np.testing.assert_array_equal(got, array)
    assert got.dtype == {"F16": np.float32, "F64": np.float64, "I64": np.int64}[kind]


# --- safetensors, damaged -------------------------------------------------------------------------


def edit(path, change):
    document = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(change(document) or document), "utf-8")


INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


def renamed(folder):
    state, _ = load_tensors(folder / FIRST)
    state["nobody.knows"] = state.pop(min(state))
    save_tensors(folder / FIRST, state)


def point(where):
    def damage(folder):
        edit(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": where}))

    return damage


def cut(folder):
    whole = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(whole[: len(whole) * 2 // 3])


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def packed(folder):
    about = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    edit(folder / "config.json", lambda config: config.update(about))


DAMAGES = {
    "missing shard": (lambda folder: (folder / FIRST).unlink(), f"{FIRST}, which is missing"),
    "cut": (cut, f"{FIRST} is no whole safetensors file"),
    "renamed": (renamed, "does not fit its shards: "),
    "outside": (point("../evil.safetensors"), "../evil.safetensors, which is not in its folder"),
    "absolute": (point("/etc/passwd"), "/etc/passwd, which is not in its folder"),
    "dots": (point(".."), ".., which is not in its folder"),
    "no name": (point(""), "which is not in its folder"),
    "number": (point(7), "weight_map must be an object of file names"),
    "elsewhere": (point("model-00002-of-00002.safetensors"), "does not fit its shards"),
    "no map": (written(INDEX, b"{}"), f"{INDEX}: weight_map must be"),
    "no index": (written(INDEX, b"[1"), f"{INDEX} is no JSON"),
    "config": (written("config.json", b'{"a": NaN}'), "config.json is no JSON: NaN is no number"),
    "no object": (written("config.json", b"[]"), "config.json must hold an object, got []"),
    "no UTF-8": (written("config.json", b"\xff\xfe"), "config.json is no UTF-8"),
    "deep": (written("config.json", b'{"a":' + b"[" * 99_999), "config.json is no JSON"),
    "quantised": (packed, "quantization_config: weights packed by bitsandbytes are not read"),
    "web page": (written(FIRST, b"<!doctype html>"), "it looks like a web page"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_line_that_names_it(tmp_path, damage, message):
    folder = save_folder(tmp_path / "m", LLAMA, STATE, 2)
    damage(folder)
    said = refused(folder)
    assert message in said and str(folder) in said


def test_a_name_in_two_files_is_refused(tmp_path):
    folder = save_folder(tmp_path / "m", LLAMA, STATE)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    assert "stands twice: in model.safetensors and other.safetensors" in refused(folder)


def test_a_folder_without_weights_and_a_path_to_nothing(tmp_path):
    assert "holds no weights" in refused(tmp_path)
    assert "no checkpoint at" in refused(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["U8", "I8", "F8_E4M3"])
def test_packed_numbers_without_a_config_are_refused(tmp_path, kind):
    raw(tmp_path / "x.safetensors", {"w.weight": (kind, [4], bytes(4))})
    assert f"w.weight is {kind}" in refused(tmp_path)


# --- pickles --------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("evil",)


@pytest.mark.parametrize("suffix", files.PICKLES)
def test_pickles_are_refused_unless_allowed(tmp_path, suffix):
    (tmp_path / f"m{suffix}").write_bytes(pickle.dumps(Evil()))
    assert "which can run code: --allow-pickle" in refused(tmp_path)
    assert "--allow-pickle" in refused(tmp_path / f"m{suffix}")


def test_an_allowed_pickle_is_read_with_weights_only(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    state = {name: torch.from_numpy(x) for name, x in STATE.items()}
    for found in (state, {"state_dict": state, "epoch": 3}, {"model_state_dict": state}):
        torch.save(found, path)
        same(open_checkpoint(tmp_path, allow_pickle=True), STATE)
    torch.save({"a": torch.arange(4).bfloat16()}, path)
    assert open_checkpoint(path, allow_pickle=True)["a"].tolist() == [0, 1, 2, 3]
    torch.save({"a": torch.zeros(4, dtype=torch.int8)}, path)
    assert "a is int8" in refused(path, allow_pickle=True)
    path.write_bytes(pickle.dumps(Evil()))
    assert "is not read" in refused(path, allow_pickle=True)
    assert "evil" not in capsys.readouterr().out
    torch.save([1, 2], path)
    assert "holds no tensors by name" in refused(path, allow_pickle=True)
    path.write_bytes(b"")
    assert "is not read" in refused(path, allow_pickle=True)


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path):
    pytest.importorskip("gguf")
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("kind, most", [("F32", 0), ("F16", 4e-4), ("Q8_0", 5e-3)])
def test_a_gguf_is_a_llama_with_its_rows_put_back(gguf, kind, most):
    save_gguf(gguf, *gguf_llama(kind=kind))
    for path in (gguf, gguf.parent):
        checkpoint = open_checkpoint(path)
        assert {*checkpoint} == {*STATE}
        for name, array in STATE.items():
            assert checkpoint.shapes[name] == array.shape
            assert abs(checkpoint[name] - array).max() <= most, name
            assert checkpoint[name].dtype == np.float32
    for field in ("hidden_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings",
                  "rope_theta"):  # fmt: skip
        assert checkpoint.config[field] == LLAMA[field]
    assert checkpoint.config["rms_norm_eps"] == pytest.approx(1e-5)


def test_a_gguf_of_another_kind_is_refused(gguf):
    about, tensors = gguf_llama()
    save_gguf(gguf, about | {"general.architecture": "qwen2"}, tensors)
    assert "general.architecture is qwen2" in refused(gguf)
    save_gguf(gguf, {k: v for k, v in about.items() if "block_count" not in k}, tensors)
    assert "its metadata lack llama.block_count" in refused(gguf)
    save_gguf(gguf, about, tensors | {"blk.0.ssm": ("F32", np.zeros(3))})
    assert "blk.0.ssm is no tensor of a Llama" in refused(gguf)
    save_gguf(gguf, about | {"llama.attention.head_count": 7}, tensors)
    assert "is not of 7 heads" in refused(gguf)
    save_gguf(gguf, about | {"llama.attention.head_count_kv": "x"}, tensors)
    assert "num_key_value_heads is x" in refused(gguf)
    save_gguf(gguf, about | {"llama.rope.scaling.type": "yarn"}, tensors)
    assert "scaled positions" in refused(gguf)


@pytest.mark.parametrize("kind, name", [(24, "I8"), (250, "of type 250")])
def test_an_unknown_quantisation_is_named(gguf, kind, name):
    about, tensors = gguf_llama()
    tensors["output_norm.weight"] = (kind, tensors["output_norm.weight"][1])
    save_gguf(gguf, about, tensors)
    assert f"unknown quantisations: output_norm.weight is {name}" in refused(gguf)


def test_rows_that_are_no_blocks_and_a_cut_file(gguf):
    about, tensors = gguf_llama()
    tensors["output_norm.weight"] = (8, np.zeros(33, np.float32))
    save_gguf(gguf, about, tensors)
    assert "multiple of 32, as Q8_0 needs" in refused(gguf)
    whole = save_gguf(gguf, *gguf_llama()).read_bytes()
    for part in (0, 3, 30, 200):
        gguf.write_bytes(whole[:part] or b"GGUF")
        assert "is no whole" in refused(gguf)
    gguf.write_bytes(whole[: len(whole) * 2 // 3])
    assert "is cut off: it ends before, or in, " in refused(gguf)


def test_lies_about_lengths_end_at_once(gguf):
    whole = save_gguf(gguf, *gguf_llama()).read_bytes()
    for place in (8, 16, 24):  # tensors, values, the first key's length
        for lie in (2**20, 2**40, 2**64 - 1):
            gguf.write_bytes(whole[:place] + lie.to_bytes(8, "little") + whole[place + 8 :])
            assert "is no whole GGUF file" in refused(gguf)


def test_a_name_that_stands_twice_in_a_gguf(gguf):
    about, tensors = gguf_llama()
    about["general.nama"] = "twice"
    tensors["output_norm.weighx"] = tensors["output_norm.weight"]
    whole = save_gguf(gguf, about, tensors).read_bytes()
    for other, name in (("general.nama", "general.name"), ("norm.weighx", "norm.weight")):
        gguf.write_bytes(whole.replace(other.encode(), name.encode()))
        assert f"{name} stands twice" in refused(gguf)


def test_random_damage_of_a_gguf_is_a_value_error(gguf):
    whole, rng = save_gguf(gguf, *gguf_llama()).read_bytes(), np.random.default_rng(0)
    for i in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, 500 if i % 2 else 3000, 3):
            damaged[place] = rng.integers(0, 256)
        gguf.write_bytes(damaged[: rng.integers(0, len(whole))] if i % 5 == 0 else damaged)
        try:
            checkpoint = open_checkpoint(gguf)
            for name in checkpoint:
                checkpoint[name]
        except ValueError as error:
            assert str(gguf) in str(error), error
