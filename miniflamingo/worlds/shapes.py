"""Pictures of a small world: 24 x 24 RGB, coloured shapes on noise, all drawn from a seed.

8 colours x 16 shapes x 2 sizes. Six shapes are geometric; ten are real handwritten digits: the
1,797 images, 8 x 8, of the "Optical Recognition of Handwritten Digits" data set (E. Alpaydin and
C. Kaynak, 1998, UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0), as scikit-learn
distributes them. They lie in digits.npz, with their 17 grey levels as 0..16.

Every function draws B pictures at once, float32 in [0, 1]. colour, shape and size are int[B].
"""

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar", *DIGITS)
SIZES = ("small", "large")
DIRECTIONS = ("left", "right", "up", "down")
NUM_GEOMETRIC = len(SHAPES) - len(DIGITS)
# shapes turned left or right or mirrored, where that makes another shape: numbered from len(SHAPES)
# on, they have no word, so that their names can only be learned from examples
TURNS = {"left": lambda image: np.rot90(image), "right": lambda image: np.rot90(image, -1),
         "mirrored": np.fliplr}  # fmt: skip
TURNED = (*product(("two", "three", "four", "five", "six"), TURNS), ("triangle", "left"),
          ("triangle", "right"), ("bar", "left"))  # fmt: skip

RGB = np.array(
    [(0.9, 0.1, 0.1), (0.1, 0.75, 0.15), (0.15, 0.25, 0.95), (0.95, 0.9, 0.1),
     (0.6, 0.15, 0.75), (0.1, 0.85, 0.9), (0.98, 0.55, 0.05), (0.95, 0.95, 0.95)],
    np.float32,
)  # fmt: skip
WIDTH = 24  # of a picture
RADII = ((2.6, 3.3), (4.6, 5.4))  # of a small and of a large geometric shape
GLYPH_WIDTHS = (12, 16)  # of a small and of a large digit
UPRIGHT = np.array([*range(len(SHAPES)), *(SHAPES.index(word) for word, _ in TURNED)])
ANEW = np.iinfo(np.int32).max  # how many pictures there are of a shape that is drawn anew each time
# which of the 1,797 images of digits each split draws from
GLYPHS = {"train": slice(0, 1200), "validation": slice(1200, 1450), "test": slice(1450, None)}


# --- the parts of a picture -----------------------------------------------------------------------


def background(B, rng, clutter=0):  # -> [B, 24, 24, 3]
    """A grey of its own for each picture, noise, and so many specks of 2 x 2 in the objects'
    colours, over which the objects are painted."""
    grey = rng.uniform(0.05, 0.45, (B, 1, 1, 1))
    pictures = (grey + rng.normal(0, 0.05, (B, WIDTH, WIDTH, 3))).astype(np.float32)
    rows, (down, right) = np.arange(B)[:, None, None], np.mgrid[0:2, 0:2]
    for _ in range(clutter):
        y, x = rng.integers(0, WIDTH - 1, (2, B, 1, 1))
        colour = RGB[rng.integers(0, len(RGB), B)]
        pictures[rows, y + down, x + right] = colour[:, None, None]
    return pictures


def geometric_cover(shape, x, y, radius):  # int[B], [B], [B], [B] -> [B, 24, 24] in [0, 1]
    """How much of each pixel a geometric shape covers: a soft step at its signed distance."""
    dy, dx = np.mgrid[0:WIDTH, 0:WIDTH][:, None] - np.stack([y, x])[..., None, None]
    r, ax, ay = np.broadcast_to(radius[:, None, None], dx.shape), np.abs(dx), np.abs(dy)
    rho = np.hypot(dx, dy)
    flat, upright = np.maximum(ax - r, ay - r * 0.33), np.maximum(ay - r, ax - r * 0.33)
    distance = np.stack([
        rho - r,
        np.maximum(ax, ay) - r * 0.85,
        np.maximum(dy - r * 0.8, ax * 1.9 - (dy + r) * 0.95) / 1.3,
        np.minimum(flat, upright),
        np.abs(rho - r * 0.78) - r * 0.22,
        flat,
    ])  # fmt: skip
    own = distance[shape, np.arange(len(shape))]
    return (1 / (1 + np.exp(np.clip(4 * own, -20, 20)))).astype(np.float32)


@cache
def glyphs(split):
    """The digits of a split: ({size: [G, w, w] in [0, 1]}, int[10 + 1] where each class starts)."""
    if split not in GLYPHS:
        raise ValueError(f"split must be one of {', '.join(GLYPHS)}, got {split!r}")
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"] / np.float32(16), file["labels"]
    images, labels = images[GLYPHS[split]], labels[GLYPHS[split]]
    images = images[np.argsort(labels, kind="stable")]
    starts = np.searchsorted(np.sort(labels), np.arange(len(DIGITS) + 1))
    return [_enlarge(images, width) for width in GLYPH_WIDTHS], starts


def variety(split):  # -> int[shapes + turned]
    """How many handwritten images each shape of the split has; ANEW for geometric ones."""
    upright = np.full(len(SHAPES), ANEW)
    upright[NUM_GEOMETRIC:] = np.diff(glyphs(split)[1])
    return upright[UPRIGHT]


def _enlarge(images, width):  # [G, 8, 8] -> [G, width, width], bilinear, corners on corners
    place = np.linspace(0, images.shape[1] - 1, width)[:, None]
    weight = np.maximum(0, 1 - np.abs(place - np.arange(images.shape[1]))).astype(np.float32)
    return weight @ images @ weight.T


def glyph_cover(digit, x, y, size, split, rng, glyph=None):
    """A handwritten digit centred on (x, y), int[B], [B], [B], int[B] -> [B, 24, 24].

    glyph int[B] says which of its class's images in the split; by default it is drawn at random.
    """
    enlarged, starts = glyphs(split)
    if glyph is None:
        chosen = rng.integers(starts[digit], starts[digit + 1])
    else:
        chosen = starts[digit] + glyph
    cover = np.zeros((len(digit), WIDTH, WIDTH), np.float32)
    for b, (g, z) in enumerate(zip(chosen, size)):
        width = GLYPH_WIDTHS[z]
        left, top = (int(np.clip(round(p[b] - width / 2), 0, WIDTH - width)) for p in (x, y))
        cover[b, top : top + width, left : left + width] = enlarged[z][g]
    return cover


def cover_of(shape, x, y, radius, size, split, rng, glyph=None):  # -> [B, 24, 24]
    """The cover of any shape; a turned one is turned together with its place in the picture."""
    cover = _plain_cover(UPRIGHT[shape], x, y, radius, size, split, rng, glyph)
    for b in np.flatnonzero(shape >= len(SHAPES)):
        cover[b] = TURNS[TURNED[shape[b] - len(SHAPES)][1]](cover[b])
    return cover


def _plain_cover(shape, x, y, radius, size, split, rng, glyph):
    digit = shape >= NUM_GEOMETRIC
    cover = geometric_cover(np.where(digit, 0, shape), x, y, radius)
    rows = np.flatnonzero(digit)
    chosen = (shape[rows] - NUM_GEOMETRIC, x[rows], y[rows], size[rows])
    cover[rows] = glyph_cover(*chosen, split, rng, None if glyph is None else glyph[rows])
    return cover


def paint(pictures, cover, colour, rng):  # [B, 24, 24, 3], [B, 24, 24], int[B] -> pictures
    """Lay a colour (with a little variation) over the covered pixels."""
    rgb = (RGB[colour] + rng.normal(0, 0.04, (len(colour), 3))).astype(np.float32)
    return pictures + cover[..., None] * (rgb[:, None, None] - pictures)


def _radius(size, rng):
    low, high = np.array(RADII)[size].T
    return rng.uniform(low, high)


def finish(pictures):
    return np.clip(pictures, 0, 1).astype(np.float32)


# --- whole pictures -------------------------------------------------------------------------------


def draw_objects(colour, shape, size, rng, split="train", centre=None, glyph=None, clutter=0):
    """One object each, int[B] * 3 -> [B, 24, 24, 3].

    centre (x [B], y [B]) is random by default, and so is glyph int[B]: see glyph_cover. clutter:
    see background.
    """
    radius = _radius(size, rng)
    margin = np.where(shape < NUM_GEOMETRIC, radius, np.array(GLYPH_WIDTHS)[size] / 2)
    x, y = rng.uniform(margin, WIDTH - 1 - margin, (2, len(shape))) if centre is None else centre
    cover = cover_of(shape, x, y, radius, size, split, rng, glyph)
    return finish(paint(background(len(shape), rng), cover, colour, rng))


def draw_pairs(colour, shape, size, rng, split="train", clutter=0):
    """Two objects each, int[B, 2] * 3, the first on the left -> [B, 24, 24, 3]."""
    pictures = background(len(shape), rng, clutter)
    for i, (low, high) in enumerate(((5, 6.5), (16.5, 18))):
        radius = np.minimum(_radius(size[:, i], rng), 5.2)
        x = rng.uniform(low, high, len(shape))
        y = rng.uniform(radius, WIDTH - 1 - radius)
        cover = cover_of(shape[:, i], x, y, radius, size[:, i], split, rng)
        pictures = paint(pictures, cover, colour[:, i], rng)
    return finish(pictures)


def draw_clips(colour, shape, size, direction, rng, num_frames=8, split="train", clutter=0):
    """One object moving left, right, up or down: int[B] * 4 -> [B, T, 24, 24, 3]."""
    B, radius = len(shape), _radius(size, rng)
    still = background(B, rng, clutter)
    path = rng.uniform(7, 11, B)
    start, across = rng.uniform(5, WIDTH - 6 - path), rng.uniform(radius, WIDTH - 1 - radius)
    backwards, horizontal = np.isin(direction, (0, 2)), direction < 2
    glyph_seed, frames = rng.integers(2**63), []
    for t in np.linspace(0, 1, num_frames):
        along = start + path * np.where(backwards, 1 - t, t)
        x, y = np.where(horizontal, (along, across), (across, along))
        same_glyph = np.random.default_rng(glyph_seed)
        cover = cover_of(shape, x, y, radius, size, split, same_glyph)
        noise = rng.normal(0, 0.02, still.shape).astype(np.float32)
        frames.append(paint(still + noise, cover, colour, rng))
    return finish(np.stack(frames, axis=1))


# --- files ----------------------------------------------------------------------------------------


def as_image(picture, scale=1):  # [24, 24, 3] in [0, 1] -> PIL image
    """A picture as a PIL image, `scale` times enlarged without smoothing."""
    image = Image.fromarray(np.round(np.asarray(picture) * 255).astype(np.uint8))
    size = tuple(scale * side for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST)


def save_picture(path, picture, scale=1):
    """Write a picture [height, width, 3] as PNG."""
    as_image(picture, scale).save(path, format="PNG")


def save_clip(path, frames, scale=1, milliseconds=125):
    """Write a clip [T, height, width, 3] as an endless animated GIF."""
    first, *others = (as_image(frame, scale) for frame in frames)
    options = dict(save_all=True, append_images=others, duration=milliseconds, loop=0)
    first.save(path, format="GIF", **options)
