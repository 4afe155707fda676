"""How glyphs.npz was made: masks of the DejaVu fonts' glyphs, and which of them are classes.

    python -m miniflamingo.worlds.glyph_masks            compare what is made here with the file
    python -m miniflamingo.worlds.glyph_masks --write    write the file again

The fonts are those that matplotlib ships, Pillow's FreeType draws them; versions of FreeType round
edges differently, which is why the masks are shipped and not drawn where they are needed.
DejaVu's licence allows that: fonts (c) 2003 Bitstream, glyphs of the Arev fonts (c) 2006 Tavmjong
Bah, changes in the public domain.
"""

import sys
import unicodedata
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from miniflamingo.command import Parser, run_command
from miniflamingo.module import write_atomically
from miniflamingo.worlds.glyph_texts import ATTRIBUTES
from miniflamingo.worlds.glyphs import EDGE, FILE, LEVELS, SIDE, font, pack, unpack

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACES = ("Sans", "Sans-Bold", "Serif", "Serif-Bold", "SansMono", "SansMono-Bold")
ALIKE = 0.85  # a correlation of two masks from which on they are one class
# by split: the first words of letters' names in Unicode, and the blocks of signs
SCRIPTS = (
    ("LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARABIC", "CANADIAN", "COPTIC", "DIGIT"),
    ("ARMENIAN", "TIFINAGH", "LISU", "OGHAM"),
    ("GEORGIAN", "LAO", "NKO", "OLD"),
)
BLOCKS = (
    # ASCII and Latin-1, currency, letterlike, mathematical, technical
    ((0x21, 0xBF), (0x20A0, 0x20CF), (0x2100, 0x214F), (0x2200, 0x22FF), (0x2300, 0x23FF),
     (0x2A00, 0x2AFF)),
    # arrows, miscellaneous symbols
    ((0x2190, 0x21FF), (0x27F0, 0x27FF), (0x2900, 0x297F), (0x2B00, 0x2BFF), (0x2600, 0x26FF)),
    ((0x25A0, 0x25FF), (0x2700, 0x27BF)),  # geometric shapes, dingbats
)  # fmt: skip


def place(code):
    """The index of a code point's split and its script, or None where it is not taken."""
    sign = chr(code)
    category, name = unicodedata.category(sign), unicodedata.name(sign, "?").split()[0]
    for split in range(len(SCRIPTS)):
        if (category[0] == "L" or name == "DIGIT") and name in SCRIPTS[split]:
            return split, name
        inside = any(first <= code <= last for first, last in BLOCKS[split])
        if category[0] in "SP" and category != "Sk" and inside:
            return split, "SYMBOL"
    return None


def open_faces():
    """[(PIL's font, its code points)] of FACES."""
    paths = [str(FONTS / f"DejaVu{face}.ttf") for face in FACES]
    return [(ImageFont.truetype(path, 64), set(FT2Font(path).get_charmap())) for path in paths]


def render(face, code):
    """A glyph's mask uint8[24, 24], its longer side 24 pixels; None where there is too little."""
    image = Image.new("L", (200, 200))
    ImageDraw.Draw(image).text((60, 50), chr(code), fill=255, font=face)
    box = image.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < 8:
        return None
    image = image.crop(box)
    scale = SIDE / max(image.size)
    w, h = (max(1, round(scale * side)) for side in image.size)
    smooth = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    out = Image.new("L", (SIDE, SIDE))
    out.paste(image.resize((w, h), smooth), ((SIDE - w) // 2, (SIDE - h) // 2))
    return np.asarray(out)


def turned(mask, turn):  # [..., 24, 24] -> the same, as glyphs.TURNS has it
    """Mirrored from turn 4 on, then turned by quarters."""
    return np.rot90(mask[..., ::-1] if turn > 3 else mask, turn % 4, (-2, -1))


# --- which are classes ----------------------------------------------------------------------------


def candidates(codes, splits):
    """(glyph, turn) in the order in which they become classes: training's upright, its turned,
    validation's, test's. Of two that look alike the later one is dropped."""
    glyphs = [np.flatnonzero(np.array(splits) == split) for split in range(3)]
    learned, *asked = ([(int(i), 0) for i in own] for own in glyphs)
    return [*learned, *[(i, t) for t in range(1, 8) for i, _ in learned], *asked[0], *asked[1]]


def blurred(masks):  # [n, S, S] -> the same
    """Twice (1, 2, 1) / 4 along both axes: strokes a pixel apart are nearly the same."""
    for axis in (1, 2, 1, 2):
        masks = masks / 2 + (np.roll(masks, 1, axis) + np.roll(masks, -1, axis)) / 4
    return masks


def unit(masks):  # [n, S, S] -> [n, S * S] of mean 0 and length 1, whose products are correlations
    """Flat, centred, normalised."""
    flat = masks.reshape(len(masks), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def unlike(pairs, masks, rows=256):
    """The places of the pairs that are less than ALIKE to all before them, whichever of them is
    shifted by a pixel; turned ones only of glyphs that are classes themselves."""
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    own = np.stack([turned(masks[i], t) for i, t in pairs])
    own, flat, kept, upright = own, unit(own), [], set()
    for start in range(0, len(pairs), rows):
        block = np.arange(start, min(start + rows, len(pairs)))
        moved = np.stack([unit(np.roll(own[block], s, (1, 2))) for s in shifts])
        among = (moved @ flat[block].T).max(axis=0)
        among = np.maximum(among, among.T)
        before = (moved @ flat[kept].T).max(axis=(0, 2), initial=-1)
        new = []
        for j, (glyph, turn) in enumerate(pairs[start : start + rows]):
            if (turn and glyph not in upright) or before[j] >= ALIKE:
                continue
            if among[j, new].max(initial=-1) < ALIKE:
                new.append(j)
                upright.add(glyph)
        kept += block[new].tolist()
    return kept


# --- what a glyph looks like ----------------------------------------------------------------------


def measured(mask):  # [S, S] in [0, 1] -> [A]
    """The numbers behind ATTRIBUTES, of one mask."""
    ink = mask > 0.4
    rows, columns = np.nonzero(ink)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = box.shape
    x, y = (np.arange(n) / max(1, n - 1) for n in (width, height))
    across, down = box.sum(axis=0) @ x / box.sum(), box.sum(axis=1) @ y / box.sum()
    flips = [(np.minimum(box, np.flip(box, axis)).sum()) / box.sum() for axis in (1, 0)]
    holes, parts = regions(~ink, corners=False) - 1, regions(ink, corners=True)
    return np.array([np.log(height / width), box.mean(), holes, parts, across, down, *flips])


def regions(inside, corners):  # bool[S, S] -> int
    """How many connected regions of at least three pixels; corners: diagonal neighbours count."""
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    steps += [(1, 1), (1, -1), (-1, 1), (-1, -1)] * corners
    left, count = set(map(tuple, np.argwhere(inside).tolist())), 0
    while left:
        edge, size = [left.pop()], 1
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            edge += near
            size += len(near)
        count += size >= 3
    return count


def said_of(masks, plain):  # n masks [S, S], bool[n] -> int[n, A]
    """Which word of each of ATTRIBUTES: numbers are cut at the thirds of the `plain` ones, the
    upright training classes; counts where the words say."""
    values, columns = np.stack([measured(mask) for mask in masks]), []
    for i, name in enumerate(ATTRIBUTES):
        cuts = np.quantile(values[plain, i], (1 / 3, 2 / 3))
        cuts = {"holes": (1, 2), "parts": (2,)}.get(name, cuts)
        columns.append(np.searchsorted(cuts, values[:, i], side="right"))
    return np.stack(columns, axis=1)


# --- the file -------------------------------------------------------------------------------------


def make():
    """The arrays of glyphs.npz."""
    faces = open_faces()
    codes = [c for c in sorted(faces[0][1]) if place(c) and render(faces[0][0], c) is not None]
    masks = np.stack([render(faces[0][0], c) for c in codes]).astype(np.float32) / 255
    pairs = candidates(codes, [place(c)[0] for c in codes])
    wide = blurred(np.pad(masks, ((0, 0), (4, 4), (4, 4))))
    pairs = np.array(pairs)[unlike(pairs, wide)]
    used, glyph = np.unique(pairs[:, 0], return_inverse=True)
    split = np.array([place(codes[i])[0] for i in pairs[:, 0]])
    shown = [turned(masks[i], t) for i, t in pairs]
    each = [_masks_of(codes[i], faces) for i in used]
    grey = np.round(np.concatenate(each) / 255 * (LEVELS - 1)).astype(int)
    return {
        "code": np.array([codes[i] for i in used], np.int32),
        "script": np.array([place(codes[i])[1] for i in used]),
        "start": np.cumsum([0, *map(len, each)]).astype(np.int32),
        "packed": pack(grey),
        "glyph": glyph.astype(np.int32),
        "turn": pairs[:, 1].astype(np.int8),
        "split": split.astype(np.int8),
        "said": said_of(shown, (split == 0) & (pairs[:, 1] == 0)).astype(np.int8),
    }


def _masks_of(code, faces):
    drawn = [render(face, code) for face, known in faces if code in known]
    return [mask for mask in drawn if mask is not None]


# --- the command ----------------------------------------------------------------------------------


def compare(arrays):
    """What is made here beside the file, as lines of text."""
    f = font()
    ours = {(int(f.code[g]), int(t)) for g, t in zip(f.glyph, f.turn)}
    made = {(int(arrays["code"][g]), int(t)) for g, t in zip(arrays["glyph"], arrays["turn"])}
    yield f"{len(ours)} classes in the file, {len(made)} made here, {len(ours & made)} in both"
    if np.array_equal(arrays["start"], f.start):
        here = unpack(arrays["packed"]) / (LEVELS - 1)
        there = f.masks[:, EDGE:-EDGE, EDGE:-EDGE]
        yield f"{len(here)} masks, a mean difference of {np.abs(here - there).mean():.4f} of 1"


def save(arrays, path):
    """Write the file."""
    packed = BytesIO()
    np.savez_compressed(packed, **arrays)
    write_atomically(path, packed.getvalue())


def main(argv=None):
    """Compare, or write; returns the exit code."""
    parser = Parser(prog="python -m miniflamingo.worlds.glyph_masks", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the file again")
    return run_command("miniflamingo.worlds.glyph_masks", lambda: run(parser.parse_args(argv)))


def run(arguments):
    """See main."""
    arrays = make()
    if arguments.write:
        save(arrays, FILE)
        font.cache_clear()
    print("\n".join(compare(arrays)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
