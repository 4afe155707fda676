"""Interleaved sequences: a list of texts, images and videos -> tokens, phi and pixels.

    ["Cute pics of my pets!", puppy, "My puppy sitting in the grass.", cat, "My cat"]
    -> <BOS>Cute pics of my pets!<EOC><image>My puppy sitting in the grass.<EOC><image>My cat<EOC>

`<BOS>` opens a sequence; `<EOC>`, the end of a chunk, stands before every `<image>` and at the end
(paper, section 3.1.3). Letters: B batch, L tokens, N images or videos, T frames.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from miniflamingo.pictures import MAX_CLIP_PIXELS, check_size, iterate_frames, open_picture, to_rgb
from miniflamingo.vision import check_pixels
from miniflamingo.xattn import compute_phi

SPECIAL_TOKENS = ("<pad>", "<BOS>", "<EOC>", "<image>")
PAD, BOS, EOC, IMAGE = range(4)


class WordTokenizer:
    """Words and punctuation marks are tokens; the four special tokens are ids 0 to 3."""

    def __init__(self, words):
        self.words = [*SPECIAL_TOKENS, *words]
        self.ids = {word: i for i, word in enumerate(self.words)}
        if len(self.ids) < len(self.words):
            twice = sorted({word for word in self.words if self.words.count(word) > 1})
            raise ValueError(f"each word must occur once in a vocabulary, got twice: {twice}")

    @classmethod
    def from_texts(cls, texts):
        """The vocabulary of some texts, in alphabetical order."""
        words = {word for text in texts for word in split_words(text)}
        return cls(sorted(words - set(SPECIAL_TOKENS)))

    def __len__(self):
        return len(self.words)

    def encode(self, text):
        """str -> list of ids; ValueError that names every word outside the vocabulary."""
        words = split_words(text)
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise ValueError(f"not in the vocabulary of {len(self)} words: {unknown} in {text!r}")
        return [self.ids[word] for word in words]

    def decode(self, ids):
        """ids -> the words, joined by spaces; `<pad>` is left out."""
        return " ".join(self.words[i] for i in ids if i != PAD)


def split_words(text):
    """'what color?' -> ['what', 'color', '?']; '<EOC>' stays whole."""
    return re.findall(r"<\w+>|[\w']+|[^\w\s]", text)


@dataclass
class Batch:
    """What a Flamingo reads. Rows are padded at the end with `<pad>` and with black images.

    tokens int[B, L]; lengths int[B]; phi int[B, L]; pixels [B, N, T, height, width, 3] in [0, 1];
    num_images int[B]; num_frames int[B, N], 0 where a row has no such image.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    phi: np.ndarray
    pixels: np.ndarray
    num_images: np.ndarray
    num_frames: np.ndarray

    def inputs(self):
        """The arguments of Flamingo.forward."""
        names = ("tokens", "pixels", "phi", "num_images", "num_frames")
        return {name: getattr(self, name) for name in names}


def build_batch(prompts, tokenizer, image_size, close=True, use_next=False):
    """Turn B prompts into a Batch. A prompt is a list of texts, images and videos in their order.

    Text is a str; an image is a PIL image, a pathlib.Path (or bytes, or an open file) or an array
    [height, width, 3]; a video is a list of images, an array [T, height, width, 3] or the Path of
    an animation (GIF, WebP, APNG), with all its frames. PIL images and files become RGB as
    `pictures` says, are cropped to a square and scaled to image_size; arrays must have that size
    already, and hold uint8 or floating point values in [0, 1]. close=False leaves out the last
    `<EOC>`, for a prompt that the model is to go on with. use_next (bool or bool[B]): see
    compute_phi. ValueError for an unknown word, an `<image>` in a text, or an image that does not
    fit or cannot be read; a warning for an animation that is cut off.
    """
    rows = [_sequence(prompt, tokenizer, image_size, close) for prompt in prompts]
    B, L = len(rows), max((len(tokens) for tokens, _ in rows), default=0)
    N = max((len(media) for _, media in rows), default=0)
    T = max((len(clip) for _, media in rows for clip in media), default=1)
    tokens = np.full((B, L), PAD)
    pixels = np.zeros((B, N, T, image_size, image_size, 3), np.float32)
    num_frames = np.zeros((B, N), int)
    for b, (ids, media) in enumerate(rows):
        tokens[b, : len(ids)] = ids
        for n, clip in enumerate(media):
            pixels[b, n, : len(clip)], num_frames[b, n] = clip, len(clip)
    lengths = np.array([len(ids) for ids, _ in rows], int)
    num_images = np.array([len(media) for _, media in rows], int)
    phi = compute_phi(tokens, IMAGE, use_next, num_images)
    return Batch(tokens, lengths, phi, pixels, num_images, num_frames)


def _sequence(prompt, tokenizer, image_size, close):
    """One prompt -> its ids, and its media as a list of [T, height, width, 3]."""
    if isinstance(prompt, str):
        raise ValueError(f"a prompt is a list of texts and images, got the str {prompt!r}")
    ids, media = [BOS], []
    for part in prompt:
        if isinstance(part, str):
            new = tokenizer.encode(part)
            if IMAGE in new:
                raise ValueError(f"a text holds <image>: put the image there instead: {part!r}")
            ids += new
        else:
            ids += [IMAGE] if ids == [BOS] or ids[-1] == EOC else [EOC, IMAGE]
            media.append(read_frames(part, image_size))
    return ids + [EOC] * (close and ids[-1] != EOC), media


def read_frames(source, image_size):
    """An image or a video (see build_batch) -> float32 [T, image_size, image_size, 3] in [0, 1]."""
    if isinstance(source, (Path, bytes, Image.Image)) or hasattr(source, "read"):
        frames = _read_pictures(source, image_size)
    elif isinstance(source, (list, tuple)):
        frames = [frame for item in source for frame in read_frames(item, image_size)]
    else:
        frames = np.asarray(source)
        frames = frames[None] if frames.ndim == 3 else frames
        frames = frames / np.float32(255) if frames.dtype == np.uint8 else frames
    frames = np.asarray(frames)
    if frames.shape[:1] == (0,):
        raise ValueError("a video needs at least one frame, got none")
    frames = check_pixels(frames, image_size)
    if frames.ndim != 4:
        raise ValueError(f"an image is [height, width, 3] and a video [T, ...], got {frames.shape}")
    return frames.astype(np.float32)


def _read_pictures(source, size):
    """A file, or the frame that a PIL image stands at -> a list of [size, size, 3] in [0, 1]."""
    frames, said = [], []
    with open_picture(source) as image:
        single = [(image, None)] if image is source else iterate_frames(image, said.append)
        for frame, _ in single:
            check_size((size, size * (len(frames) + 1)), MAX_CLIP_PIXELS, "clip")
            frames.append(_fit(to_rgb(frame), size))
    for text in said:
        warnings.warn(f"{source}: {text}", stacklevel=4)
    return frames


def _fit(image, size):  # RGB -> [size, size, 3] in [0, 1]
    """The largest central square, scaled."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32) / 255
