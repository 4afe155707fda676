"""A world of many classes: letters and signs of the DejaVu fonts, whole scripts never shown.

Few-shot learning of new classes appears where training has many of them, each rare (Chan et al.,
2022, "Data distributional properties drive emergent in-context learning"). Here a class is a
glyph: a code point, in up to six faces, in any colour, size and place, a little turned and noisy.
Glyphs that look alike (Latin A, Greek Alpha) are one class. In training a glyph turned by quarters
or mirrored is a class of its own, where it looks like no other.

    train        Latin, Greek, Cyrillic, Hebrew, Arabic, Canadian syllabics, digits, mathematics
    validation   Armenian, Tifinagh, Ogham, Lisu; arrows and miscellaneous symbols: to choose on
    test         Georgian, Lao, N'Ko, Old Italic; geometric shapes and dingbats: asked once

No stage of training sees a script of the last two. glyphs.npz holds the masks, so that pictures do
not hang on a version of matplotlib, which brings the fonts, or of FreeType; glyph_masks.py makes
it. Letters: B pictures, C classes, G glyphs, M masks.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miniflamingo.worlds.shapes import COLOURS, WIDTH, background, finish, paint

FILE = Path(__file__).with_name("glyphs.npz")
SPLITS = ("train", "validation", "test")
SIDE, LEVELS = 24, 4  # of a mask: pixels of its longer side, levels of grey
EDGE = 6  # empty pixels around a mask, for what a turned picture reads beside it
LONGER = (12, 19)  # pixels of a glyph's longer side in a picture
# what a turn does to (x, y): quarters, then quarters of the mirror image
QUARTERS = np.array([[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]]])
TURNS = np.concatenate([QUARTERS, QUARTERS * [[-1], [1]]]).astype(np.float32)  # [8, 2, 2]


class Font(NamedTuple):
    """code, script [G]; start int[G + 1], where each glyph's masks begin; masks [M, 36, 36] in
    [0, 1]; of each class its glyph, its turn and the index of its split, int[C], and what is said
    of it, int[C, A], which word of each of glyph_texts.ATTRIBUTES."""

    code: np.ndarray
    script: np.ndarray
    start: np.ndarray
    masks: np.ndarray
    glyph: np.ndarray
    turn: np.ndarray
    split: np.ndarray
    said: np.ndarray


@cache
def font():
    """All glyphs and classes -> Font."""
    with np.load(FILE) as file:
        arrays = {name: file[name] for name in file.files}
    masks = unpack(arrays.pop("packed")) / np.float32(LEVELS - 1)
    return Font(masks=np.pad(masks, ((0, 0), (EDGE, EDGE), (EDGE, EDGE))), **arrays)


def pack(masks):  # int[M, 24, 24] in 0..3 -> uint8[M, 144], four pixels in a byte
    """Quarter the space."""
    return (masks.reshape(len(masks), -1, 4) << np.arange(0, 8, 2)).sum(-1).astype(np.uint8)


def unpack(packed):  # uint8[M, 144] -> uint8[M, 24, 24] in 0..3
    """Undo pack."""
    return (packed[..., None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(-1, SIDE, SIDE)


# --- classes --------------------------------------------------------------------------------------


def classes(split="train", number=None):
    """The classes of a split, int[C]; a `number` of the training classes, always the same ones.

    Smaller numbers are parts of larger ones: upright glyphs in one random order, then turned ones.
    ValueError for an unknown split, or a number that there is not.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    found = np.flatnonzero(font().split == SPLITS.index(split))
    if number is None:
        return found
    if not 1 <= number <= len(found):
        raise ValueError(f"{split} has 1 to {len(found)} classes, got {number}")
    order = np.random.default_rng(0).permutation(found)
    return order[np.argsort(font().turn[order] > 0, kind="stable")][:number]


def upright():
    """How many training classes are not turned."""
    return int((font().turn[classes()] == 0).sum())


def by_script(split, least=20):
    """{script: int[C]} of the split's scripts with so many classes, and of all "letters", all
    "symbols"."""
    found, f = classes(split), font()
    scripts = f.script[f.glyph[found]]
    letters = scripts != "SYMBOL"
    groups = {"letters": found[letters], "symbols": found[~letters]}
    each = {s.capitalize(): found[scripts == s] for s in np.unique(scripts[letters])}
    return groups | {name: ids for name, ids in each.items() if len(ids) >= least}


# --- pictures -------------------------------------------------------------------------------------


def draw(classes, rng, colour=None):
    """One glyph a picture: int[B] -> [B, 24, 24, 3] in [0, 1]; colour int[B] is drawn by default.

    Face, size, proportions, angle (12 degrees at most) and place are drawn for each picture.
    """
    f, B = font(), len(classes)
    first, last = f.start[f.glyph[classes]], f.start[f.glyph[classes] + 1]
    mask = f.masks[(first + rng.random(B) * (last - first)).astype(int)]
    colour = rng.integers(0, len(COLOURS), B) if colour is None else colour
    cover = _cover(mask, TURNS[f.turn[classes]], rng)
    return finish(paint(background(B, rng), cover, colour, rng))


def _cover(mask, turn, rng):  # [B, 36, 36], [B, 2, 2] -> [B, 24, 24]
    """Masks, each scaled, turned and put somewhere: which place of a mask does a pixel show?"""
    B = len(mask)
    longer = rng.uniform(*LONGER, B)
    scale = longer / SIDE * np.exp(rng.normal(0, 0.06, (2, B)))
    angle = np.deg2rad(rng.uniform(-12, 12, B))
    margin = longer / 2
    x, y = margin + rng.random((2, B)) * (WIDTH - 2 * margin)
    c, s, sx, sy, x, y = (a.astype(np.float32)[:, None, None]
                          for a in (np.cos(angle), np.sin(angle), *scale, x, y))  # fmt: skip
    middle = np.arange(WIDTH, dtype=np.float32) + np.float32(0.5)  # of each pixel
    x, y = middle - x, middle[:, None] - y
    u, v = (c * x + s * y) / sx, (c * y - s * x) / sy
    a, b, d, e = (turn[:, i, j, None, None] for i in (0, 1) for j in (0, 1))
    return _read(mask, a * u + b * v, d * u + e * v)


def _read(mask, u, v):  # [B, S, S], [B, 24, 24] * 2 from the middle -> [B, 24, 24], bilinear
    S = mask.shape[-1]
    u, v = (np.clip(p + np.float32(S / 2 - 0.5), 0, S - 1.001) for p in (u, v))
    left, top = u.astype(np.int32), v.astype(np.int32)
    u, v = u - left, v - top
    at = np.arange(len(mask), dtype=np.int32)[:, None, None] * (S * S) + top * S + left
    flat = mask.ravel()
    upper = flat[at] * (1 - u) + flat[at + 1] * u
    lower = flat[at + S] * (1 - u) + flat[at + S + 1] * u
    return upper * (1 - v) + lower * v
