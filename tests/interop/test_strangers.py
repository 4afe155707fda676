"""What a stranger's checkpoint, prompt or picture gets wrong is one line that names it."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from miniflamingo.__main__ import main
from miniflamingo.interop.loading import checked
from miniflamingo.interop.preprocess import Preprocessor, preprocessor_of
from miniflamingo.module import load_tensors, save_tensors
from miniflamingo.training import WEIGHTS
from tests.interop import made
from tests.processes import ODD

pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path):
    """A Llama with its tokenizer."""
    folder = made.save_folder(tmp_path / ODD, made.LLAMA, made.llama_state())
    made.save_tokenizer(folder, made.trained())
    return folder


@pytest.fixture
def flamingo(tmp_path):
    """An OpenFlamingo with its tokenizer, a picture, and no preprocessor_config.json."""
    folder = tmp_path / "open_flamingo"
    made.save_folder(folder, made.OPEN_FLAMINGO, made.open_flamingo_state())
    tokenizer = made.trained()
    tokenizer.add_special_tokens(["<|endofchunk|>", "<image>"])
    made.save_tokenizer(folder, tokenizer)
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    return folder


def refused(capsys, path, *words, code=2):
    """The one line that `generate` ends with."""
    assert main(["generate", "--weights", str(path), *map(str, words)]) == code
    said = capsys.readouterr()
    assert said.out.strip() == "" and said.err.count("\n") == 1, said
    return said.err


def change(path, **fields):
    about = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(about | fields), "utf-8")


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", [], {}, 1.5, True, -1, 0, 10**30])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "head_dim", "vocab_size"])
def test_a_field_of_the_wrong_kind_is_named_as_it_is_there(folder, capsys, field, value):
    change(folder / "config.json", **{field: value})
    said = refused(capsys, folder, "--text", "a")
    assert f"{folder}: the config's {field} must be a whole number from 1 to " in said
    assert f"got {value!r}" in said


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_parameters": "x"}, "rope_parameters must be an object, got 'x'"),
        ({"rope_scaling": {"rope_type": []}}, "rope_scaling.rope_type must be a text, got []"),
        ({"hidden_act": {}}, "hidden_act must be a text, got {}"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a number above 0, got 'x'"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0, got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"cross_attention_layers": 3}, "cross_attention_layers must be a list of whole numbers"),
        ({"vision_config": {"width": None, "layers": "x"}}, "vision_config.layers must be a whole"),
    ],
)
def test_fields_of_every_kind(fields, message):
    with pytest.raises(ValueError, match="the config's ") as error:
        checked(fields)
    assert message in str(error.value)


def test_null_is_as_if_it_were_not_there(folder, capsys):
    whole = {"hidden_size": 32, "rope_scaling": {"factor": 2.0}}
    assert checked(whole | {"hidden_act": None, "rope_scaling": {"factor": 2.0, "type": None}}) == (
        whole
    )
    change(folder / "config.json", hidden_act=None, rms_norm_eps=None, tie_word_embeddings=None)
    assert main(["generate", "--weights", str(folder), "--text", "a"]) == 0


def test_the_fields_of_a_gguf_too(tmp_path, capsys):
    pytest.importorskip("gguf")
    about, tensors = made.gguf_llama()
    about |= made.tables(made.trained())
    for key, value, message in [
        ("llama.rope.freq_base", 0, "rope_theta must be a number above 0, got 0"),
        ("tokenizer.ggml.model", ["a"], "tokenizer.ggml.model is ['a']"),
        ("tokenizer.ggml.pre", ["a"], "tokenizer.ggml.pre is ['a']"),
        ("tokenizer.ggml.merges", [1], "merges must be a list of pairs of texts, got [1]"),
        ("tokenizer.ggml.merges", "x", "merges must be a list of pairs of texts, got x"),
        ("tokenizer.ggml.bos_token_id", 300, "begins with the id 300, the model has 300 rows"),
        ("tokenizer.ggml.eos_token_id", "x", "eos_token_id must be an id or a list of ids, got"),
    ]:
        made.save_gguf(tmp_path / "m.gguf", about | {key: value}, tensors)
        assert message in refused(capsys, tmp_path / "m.gguf", "--text", "a")


# --- weights --------------------------------------------------------------------------------------


def test_a_part_of_a_model_says_what_is_not_there(folder, capsys):
    state, _ = load_tensors(folder / "model.safetensors")
    state["model.embed.weight"] = state.pop("model.embed_tokens.weight")
    save_tensors(folder / "model.safetensors", state)
    said = refused(capsys, folder, "--text", "a")
    assert "the config says 'llama', but there is no model.embed_tokens.weight" in said
    save_tensors(folder / "model.safetensors", {})
    assert "holds no tensors" in refused(capsys, folder, "--text", "a")


def test_numbers_that_grow_too_large_are_no_answer(folder, capsys):
    state, _ = load_tensors(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_tensors(folder / "model.safetensors", state | {name: np.full((64, 32), 1e38, np.float32)})
    for words in ([], ["--temperature", "1"], ["--top-k", "3"], ["--top-p", "0.5"]):
        said = refused(capsys, folder, "--text", "a", *words, code=1)
        assert "the logits are not finite: the model's numbers are too large for float32" in said
    save_tensors(folder / "model.safetensors", state | {name: np.full((64, 32), 1e300)})
    assert f"not finite: {name}" in refused(capsys, folder, "--text", "a")


@pytest.mark.parametrize("shard", ["x" * 5000, "\ud800", None, 3])
def test_an_index_that_names_no_file(tmp_path, capsys, shard):
    folder = made.save_folder(tmp_path / "m", made.LLAMA, made.llama_state(), 2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index), "utf-8")
    said = refused(capsys, folder, "--text", "a")
    what = "which is missing" if isinstance(shard, str) else f"{shard} for model.norm.weight"
    assert what in said and str(path) in said and len(said) < 500


def test_a_json_file_is_no_weights(folder, capsys):
    said = refused(capsys, folder / "config.json", "--text", "a")
    assert "it looks like a JSON file: name the weights, or their folder" in said
    config = folder / "config.json"
    change(config, quantization_config={"load_in_4bit": True})
    assert "packed by {'load_in_4bit': True} are not" in refused(capsys, folder, "--text", "a")


def test_our_own_checkpoints_have_an_option_of_their_own(capsys):
    said = refused(capsys, WEIGHTS / "flamingo", "--text", "a")
    assert "is a checkpoint of this project: --checkpoint" in said


class Command:
    """What a pickle that runs a command holds."""

    def __reduce__(self):
        return os.system, ("touch surely_not",)


def test_pickles_say_why_they_are_refused(tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    cases = {
        "is not read: weights_only refuses it: ": {"a": Command()},
        "a is sparse_coo": {"a": torch.zeros(2, 2).to_sparse()},
        "a is without numbers": {"a": torch.zeros(2, device="meta")},
    }
    for message, content in cases.items():
        torch.save(content, "x.pt")
        said = refused(capsys, "x.pt", "--text", "a", "--allow-pickle")
        assert message in said and "arbitrary" not in said and "False" not in said
        assert "system" in said or "is not read" not in said
    whole = (tmp_path / "x.pt").read_bytes()
    for damaged in (b"", b"hello", b"PK\3\4" + bytes(50), whole[:300], whole[:-10]):
        (tmp_path / "x.pt").write_bytes(damaged)
        said = refused(capsys, "x.pt", "--text", "a", "--allow-pickle")
        assert f"x.pt ({len(damaged)} bytes) is not read: " in said
    assert not (tmp_path / "surely_not").exists()


def test_a_pickle_of_a_training_on_many_processes(folder, capsys):
    torch = pytest.importorskip("torch")
    ask = ["generate", "--weights", str(folder), "--text", "red", "--max-new-tokens", "5"]
    assert main(ask) == 0
    expected = capsys.readouterr().out
    state, _ = load_tensors(folder / "model.safetensors")
    state = {f"module.{n}": torch.from_numpy(x) for n, x in state.items()}
    torch.save({"epoch": 3, "model": {"state_dict": state}}, folder / "checkpoint.pt")
    (folder / "model.safetensors").unlink()
    assert main([*ask, "--allow-pickle"]) == 0 and capsys.readouterr().out == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_a_pipe_is_not_waited_for(folder, capsys):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "model.safetensors is no file" in refused(capsys, folder, "--text", "a")
    said = refused(capsys, folder / "model.safetensors", "--text", "a")
    assert "model.safetensors is no file" in said


def test_gates_that_are_no_numbers_are_shown_as_such(flamingo, tmp_path, capsys):
    state, _ = load_tensors(flamingo / "model.safetensors")
    gate = "lang_encoder.gated_cross_attn_layers.1."
    wrong = {f"{gate}attn_gate": [np.nan], f"{gate}ff_gate": []}
    state |= {name: np.array(value, np.float32) for name, value in wrong.items()}
    save_tensors(flamingo / "model.safetensors", state)
    assert main(["inspect", str(flamingo)]) == 0
    said = capsys.readouterr()
    assert said.out.count("not a number") == 1 and said.err == ""
    assert main(["inspect", str(flamingo), "--plot", str(tmp_path / "gates.png")]) == 2
    said = capsys.readouterr().err
    assert "the attention gate of layer 1 is not a number" in said and said.count("\n") == 1


# --- prompts and pictures -------------------------------------------------------------------------


def test_a_text_that_is_no_text(folder, capsys):
    said = refused(capsys, folder, "--text", "a\udcffb")
    assert r"a text must be UTF-8, got 'a\udcffb'" in said


def test_more_tokens_than_positions_of_the_training_are_a_warning(folder, capsys):
    assert main(["generate", "--weights", str(folder), "--text", "red " * 40]) == 0
    err = capsys.readouterr().err
    assert err.startswith("miniflamingo: warning: the model was trained with 64 positions: fewer")
    assert main(["generate", "--weights", str(folder), "--text", "red"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_pictures_are_as_large_as_the_eye_unless_the_folder_says_otherwise(flamingo, capsys):
    words = ["--image", flamingo / "a.png", "--text", "red"]
    assert main(["generate", "--weights", str(flamingo), *map(str, words)]) == 0
    capsys.readouterr()
    change(flamingo / "preprocessor_config.json", size={"shortest_edge": 30}, crop_size=29)
    said = refused(capsys, flamingo, *words)
    assert "preprocessor_config.json makes pictures of 29 x 29 pixels, its eye sees 28 x 28" in said
    assert main(["generate", "--weights", str(flamingo), "--text", "red"]) == 0  # not looked at


def test_a_picture_is_looked_at_before_the_weights_are_read(flamingo, capsys):
    state, _ = load_tensors(flamingo / "model.safetensors")
    state["perceiver.latents"] *= np.nan
    save_tensors(flamingo / "model.safetensors", state)
    (flamingo / "a.png").write_bytes(b"no picture")
    assert "a.png: no picture" in refused(capsys, flamingo, "--image", flamingo / "a.png")


def test_an_animation_and_a_picture_like_a_thread(flamingo, capsys):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(flamingo / "b.gif", save_all=True, append_images=frames[1:])
    said = refused(capsys, flamingo, "--image", flamingo / "b.gif")
    assert "b.gif: an animation of 2 frames, expected one picture" in said
    Image.new("RGB", (1, 90_000)).save(flamingo / "c.png")
    said = refused(capsys, flamingo, "--image", flamingo / "c.png")
    assert "resized image of 1 x 90000 pixels too large" in said


def test_the_processor_that_newer_transformers_save(tmp_path):
    about = {"size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3], "image_size": 28}
    change(tmp_path / "processor_config.json", image_processor=about, processor_class="X")
    found = preprocessor_of(tmp_path)
    assert (found.resize, found.crop, found.mean) == ((28, 28), None, (0.1, 0.2, 0.3))
    assert preprocessor_of(tmp_path / "none", 28) == Preprocessor(28, (28, 28))
