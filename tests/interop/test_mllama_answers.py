"""`generate --weights` and `inspect` of a whole random Llama 3.2 Vision, with images."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from miniflamingo.__main__ import main
from miniflamingo.interop import generation, mllama
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.interop.generation import FORMATS, Speaker, build_prompt, speak
from miniflamingo.interop.preprocess import preprocessor_of
from miniflamingo.interop.streaming import load
from miniflamingo.interop.tokenizer import tokenizer_of
from tests.interop import made
from tests.interop.theirs import save_mllama, save_whole_mllama

processors = pytest.importorskip("tokenizers").processors
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch")

SIZES = [(50, 40), (100, 30), (20, 90)]  # of pictures: 2 x 2 tiles, 1 x 4, 4 x 1
ABOUT = {"size": {"height": 28, "width": 28}, "max_image_tiles": 4, "resample": 2,
         "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with all that a Llama 3.2 Vision brings, and pictures -> folder, their model."""
    folder = tmp_path_factory.mktemp("mllama")
    model = save_whole_mllama(folder)
    tokenizer = made.trained()
    tokenizer.post_processor = processors.ByteLevel()  # theirs, too, begins with nothing
    tokenizer.add_special_tokens(["<|image|>", "<|begin_of_text|>", "<|python_tag|>"])
    made.save_tokenizer(folder, tokenizer, bos_token="<|begin_of_text|>")
    (folder / "preprocessor_config.json").write_text(json.dumps(ABOUT), "utf-8")
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder, model


def processed(folder, parts):
    """What their processor makes of a text with images."""
    from transformers import MllamaProcessor, PreTrainedTokenizerFast
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    words = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"),
                                    bos_token="<|begin_of_text|>", eos_token="</s>")  # fmt: skip
    processor = MllamaProcessor(MllamaImageProcessorPil(**ABOUT), words)
    text = "".join("<|image|>" if kind == "image" else content for kind, content in parts)
    images = [Image.open(content) for kind, content in parts if kind == "image"]
    return processor(images or None, text, return_tensors="pt")


def parts_of(folder, layout):
    """ "0a1b" -> picture 0, a text, picture 1, a text."""
    return [("image", folder / f"{c}.png") if c.isdigit() else ("text", f"{c} red") for c in layout]


def answer(folder, *words, capsys):
    code = main(["generate", "--weights", str(folder), *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def check_theirs(model, theirs, speaker, ids, phi, got):
    """Logits and greedy tokens of their model are ours."""
    with torch.no_grad():
        expected = model(**theirs).logits[0, -1].numpy()
    np.testing.assert_allclose(speaker.extend(ids, phi)[0], expected, atol=1e-4)
    model.generation_config.eos_token_id = None
    tokens = model.generate(**theirs, do_sample=False, max_new_tokens=len(got))
    assert got == tokens[0, len(ids) :].tolist()


@pytest.mark.parametrize("layout", ["0a", "0a1b", "2a", "a1b", "0a1b2c", "0", "ab"])
def test_it_writes_what_transformers_writes(whole, layout, capsys):
    folder, model = whole
    parts, new = parts_of(folder, layout), 12
    theirs, checkpoint = processed(folder, parts), open_checkpoint(folder)
    words, pictures = tokenizer_of(checkpoint), preprocessor_of(folder)
    ids, phi = build_prompt(parts, words, FORMATS["mllama"])
    images = [content for kind, content in parts if kind == "image"]
    assert ids.tolist() == theirs["input_ids"][0].tolist()
    if images:
        assert phi.tolist() == mllama.phi_of(theirs["cross_attention_mask"])[0].tolist()
    ours = load(checkpoint, change=lambda config: generation.with_pixels(config, pictures))
    pixels = generation._pixels(images, pictures)
    got = list(speak(Speaker(ours, len(ids) + new, pixels), ids, phi, new))
    if not images or phi[0]:  # else the first tokens of theirs see all images
        check_theirs(model, theirs, Speaker(ours, len(ids), pixels), ids, phi, got)
    flags = [word for kind, content in parts for word in (f"--{kind}", content)]
    for options in ([], ["--stream"]):
        code, out, err = answer(folder, *flags, *options, "--max-new-tokens", new, capsys=capsys)
        assert code == 0 and ("eye " in err) == bool(images), err
        kept = got[: min([got.index(i) for i in words.ends if i in got], default=new)]
        assert out == words.decode(kept) + "\n"


def test_the_images_and_the_texts_order_matter(whole, capsys):
    folder, texts = whole[0], ("--text", "red", "--max-new-tokens", 9)
    outs = [answer(folder, "--image", folder / f"{i}.png", *texts, capsys=capsys) for i in range(3)]
    assert {code for code, *_ in outs} == {0} and len({out for _, out, _ in outs}) == 3


WRONG = {
    "in a row": (["--image", "0.png", "--image", "1.png", "--text", "a"], {},
                 "two images in a row: text behind them would look at both, and here a token looks "
                 "at one: give each --image a --text"),
    "empty text": (["--text", "a", "--image", "0.png", "--text", "", "--image", "1.png"], {},
                   "two images in a row"),
    "no preprocessor": (["--image", "0.png"], None, "an eye of up to 4 tiles of 28 pixels needs a "
                        "preprocessor_config.json with max_image_tiles"),
    "another's": (["--image", "0.png"], {"size": 28},
                  "needs a preprocessor_config.json with max_image_tiles"),
    "larger tiles": (["--image", "0.png"], ABOUT | {"size": {"height": 56, "width": 56}},
                     "does not fit preprocessor_config.json, which cuts up to 4 of 56"),
    "more tiles": (["--image", "0.png"], ABOUT | {"max_image_tiles": 6},
                   "does not fit preprocessor_config.json, which cuts up to 6 of 28"),
}  # fmt: skip


@pytest.mark.parametrize("words, about, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_line(whole, tmp_path, capsys, words, about, message):
    folder = shutil.copytree(whole[0], tmp_path / "m")
    path = folder / "preprocessor_config.json"
    if about is None:
        path.unlink()
    elif about:
        path.write_text(json.dumps(about), "utf-8")
    words = [folder / word if word.endswith(".png") else word for word in words]
    code, _, err = answer(folder, *words, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_a_text_alone_needs_no_preprocessor(whole, tmp_path, capsys):
    folder = shutil.copytree(whole[0], tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    assert answer(folder, "--text", "red", capsys=capsys)[0] == 0


def test_the_text_side_alone_reads_no_images(whole, tmp_path, capsys):
    save_mllama(tmp_path)
    made.save_tokenizer(tmp_path, made.trained())
    assert answer(tmp_path, "--text", "red", capsys=capsys)[0] == 0
    words = ["--image", whole[0] / "0.png", "--text", "red"]
    code, _, err = answer(tmp_path, *words, capsys=capsys)
    assert code == 2 and "this model reads no images here: give it --text alone" in err


def test_inspect_knows_all_parts(whole, capsys):
    assert main(["inspect", str(whole[0])]) == 0
    said = capsys.readouterr().out
    assert "Llama 3.2 Vision (mllama)" in said and "every name is understood" in said
    for part in ("vision encoder", "projection", "gated layers", "language model"):
        assert part in said
    assert "|tanh(alpha)| of 2 layers" in said
