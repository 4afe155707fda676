"""Interleaved sequences: texts, images and videos -> tokens, phi and pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniflamingo.prompt import (
    BOS,
    EOC,
    IMAGE,
    PAD,
    WordTokenizer,
    build_batch,
    read_frames,
    split_words,
)

TEXTS = ("Cute pics of my pets!", "My puppy sitting in the grass.", "My cat looking dignified.")
tokenizer = WordTokenizer.from_texts([*TEXTS, "what's <EOC> that?"])
image = np.random.default_rng(0).random((8, 8, 3))
black, white = np.zeros((8, 8, 3)), np.ones((8, 8, 3))


def words_of(batch, b=0):
    return [tokenizer.words[i] for i in batch.tokens[b]]


# --- the tokenizer --------------------------------------------------------------------------------


def test_words_and_marks_are_tokens():
    assert split_words("What's <EOC>that?<image> A b.") == [
        "What's", "<EOC>", "that", "?", "<image>", "A", "b", ".",
    ]  # fmt: skip
    assert split_words("") == []


def test_the_vocabulary_is_sorted_behind_the_special_tokens():
    assert tokenizer.words[:4] == ["<pad>", "<BOS>", "<EOC>", "<image>"]
    assert tokenizer.words[4:] == sorted(set(tokenizer.words[4:]))
    assert len(tokenizer) == len(tokenizer.words) == len(set(tokenizer.words))
    assert [tokenizer.ids[w] for w in tokenizer.words[:4]] == [PAD, BOS, EOC, IMAGE]


def test_encoding_and_back():
    ids = tokenizer.encode("my cat looking.")
    assert tokenizer.decode([BOS, *ids, EOC, PAD, PAD]) == "<BOS> my cat looking . <EOC>"
    assert tokenizer.encode("<EOC>") == [EOC]


def test_unknown_and_repeated_words_are_named():
    with pytest.raises(ValueError, match=r"\['dog', '&'\] in 'my dog & cat'"):
        tokenizer.encode("my dog & cat")
    with pytest.raises(ValueError, match=rf"vocabulary of {len(tokenizer)} words"):
        tokenizer.encode("dog")
    with pytest.raises(ValueError, match=r"got twice: \['<pad>', 'a'\]"):
        WordTokenizer(["a", "b", "a", "<pad>"])


# --- sequences ------------------------------------------------------------------------------------


def test_the_papers_example():
    prompt = [TEXTS[0], image, TEXTS[1], black, TEXTS[2]]
    batch = build_batch([prompt], tokenizer, 8)
    segments = [
        "<BOS> Cute pics of my pets ! <EOC>",
        "<image> My puppy sitting in the grass . <EOC>",
        "<image> My cat looking dignified . <EOC>",
    ]
    assert " ".join(words_of(batch)) == " ".join(segments)
    expected = [phi for phi, s in enumerate(segments) for _ in s.split()]
    np.testing.assert_array_equal(batch.phi[0], expected)
    np.testing.assert_array_equal(batch.num_frames, [[1, 1]])
    np.testing.assert_array_equal(batch.pixels[0, 0, 0], image.astype(np.float32))
    assert (batch.lengths, batch.num_images) == (len(expected), 2)
    assert batch.pixels.dtype == np.float32


@pytest.mark.parametrize(
    "prompt, closed, opened",
    [
        ([image], "<BOS> <image> <EOC>", "<BOS> <image>"),
        ([image, image], "<BOS> <image> <EOC> <image> <EOC>", "<BOS> <image> <EOC> <image>"),
        (["my", "cat"], "<BOS> my cat <EOC>", "<BOS> my cat"),
        (["my<EOC>", image, "cat"], "<BOS> my <EOC> <image> cat <EOC>",
         "<BOS> my <EOC> <image> cat"),
        (["my cat<EOC>"], "<BOS> my cat <EOC>", "<BOS> my cat <EOC>"),
        ([], "<BOS> <EOC>", "<BOS>"),
    ],
)  # fmt: skip
def test_where_eoc_stands(prompt, closed, opened):
    assert " ".join(words_of(build_batch([prompt], tokenizer, 8))) == closed
    assert " ".join(words_of(build_batch([prompt], tokenizer, 8, close=False))) == opened


def test_a_ragged_batch():
    video = np.stack([black, white, black])
    prompts = [[image, "my cat", video], ["pets"], [white] * 3]
    batch = build_batch(prompts, tokenizer, 8, use_next=[False, False, True])
    assert batch.pixels.shape == (3, 3, 3, 8, 8, 3)
    np.testing.assert_array_equal(batch.num_images, [2, 0, 3])
    np.testing.assert_array_equal(batch.num_frames, [[1, 3, 0], [0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(batch.lengths, [7, 3, 7])
    assert words_of(batch, 1) == ["<BOS>", "pets", "<EOC>", *["<pad>"] * 4]
    np.testing.assert_array_equal(batch.phi, [[0, 1, 1, 1, 1, 2, 2], [0] * 7,
                                              [1, 1, 2, 2, 3, 3, 0]])  # fmt: skip
    np.testing.assert_array_equal(batch.pixels[0, 1, :, 0, 0, 0], [0, 1, 0])
    assert not batch.pixels[1].any()  # padding is black
    assert not batch.pixels[2, :, 1:].any()
    assert set(batch.inputs()) == {"tokens", "pixels", "phi", "num_images", "num_frames"}


def test_batches_without_images_and_without_rows():
    batch = build_batch([["my cat"]], tokenizer, 8)
    assert batch.pixels.shape == (1, 0, 1, 8, 8, 3)
    assert build_batch([], tokenizer, 8).tokens.shape == (0, 0)


# --- what an image can be -------------------------------------------------------------------------


def bytes_of(picture):
    return (picture * 255).round().astype(np.uint8)


def test_arrays():
    for picture in (image, image.astype(np.float32), image.astype(np.float16)):
        frames = read_frames(picture, 8)
        assert (frames.dtype, frames.shape) == (np.float32, (1, 8, 8, 3))
        np.testing.assert_allclose(frames[0], image, atol=1e-3)
    np.testing.assert_array_equal(read_frames(bytes_of(white), 8)[0], 1)
    np.testing.assert_allclose(read_frames(bytes_of(image), 8)[0], image, atol=0.5 / 255)


def test_pictures_are_cropped_to_the_central_square_and_scaled():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    frames = read_frames(Image.fromarray(wide), 8)
    assert (frames.dtype, frames.shape) == (np.float32, (1, 8, 8, 3))
    assert (frames > 0.9).mean() > 0.7
    assert not read_frames(Image.new("L", (5, 9)), 8).any()  # grey, and smaller
    assert (read_frames(Image.new("RGBA", (8, 8), "white"), 8) == 1).all()
    same = read_frames(Image.fromarray(bytes_of(image)), 8)
    np.testing.assert_array_equal(same, read_frames(bytes_of(image), 8))


def test_videos(tmp_path):
    shades = [Image.new("RGB", (8, 8), (50 * i,) * 3) for i in range(4)]
    shades[0].save(tmp_path / "v.gif", save_all=True, append_images=shades[1:], duration=100)
    Image.fromarray(bytes_of(image)).save(tmp_path / "i.png")
    expected = np.arange(4) * 50 / 255
    stack = np.stack([np.asarray(s) for s in shades])
    for video in (tmp_path / "v.gif", stack, shades, list(stack)):
        frames = read_frames(video, 8)
        assert frames.shape == (4, 8, 8, 3)
        np.testing.assert_allclose(frames[:, 0, 0, 0], expected, atol=0.01)
    np.testing.assert_allclose(read_frames(tmp_path / "i.png", 8)[0], image, atol=0.5 / 255)
    mixed = [tmp_path / "i.png", image, Image.new("RGB", (3, 3))]
    assert read_frames(mixed, 8).shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    "part, message",
    [
        (np.zeros((9, 8, 3)), r"\[\.\.\., 8, 8, 3\], got \(1, 9, 8, 3\)"),
        (np.zeros((8, 8)), r"\[\.\.\., 8, 8, 3\], got \(8, 8\)"),
        (np.zeros((2, 2, 8, 8, 3)), r"a video \[T, \.\.\.\], got \(2, 2, 8, 8, 3\)"),
        (np.zeros((8, 8, 3), int), r"floating point in \[0, 1\], got int64"),
        (np.full((8, 8, 3), np.nan), "finite, got nan"),
        (white * 255, r"lie in \[0, 1\], got 255.0\.\.255.0"),
        ("my <image> cat", "a text holds <image>: .* 'my <image> cat'"),
        ("my dog", r"\['dog'\]"),
        ([], "at least one frame, got none"),
        (np.zeros((0, 8, 8, 3)), "at least one frame, got none"),
        ([black, np.zeros((4, 4, 3))], r"got \(1, 4, 4, 3\)"),
        (None, r"\[\.\.\., 8, 8, 3\], got \(\)"),
        (7, r"\[\.\.\., 8, 8, 3\], got \(\)"),
    ],
)
def test_what_does_not_fit_is_a_value_error(part, message):
    with pytest.raises(ValueError, match=message):
        build_batch([["my", part]], tokenizer, 8)


def test_a_bare_text_is_no_prompt_and_a_missing_file_is_not_found():
    with pytest.raises(ValueError, match="a list of texts and images, got the str 'my cat'"):
        build_batch(["my cat"], tokenizer, 8)
    with pytest.raises(FileNotFoundError):
        build_batch([[Path("absent.png")]], tokenizer, 8)
