"""The small world's pictures: their form, their seeds, their classes, their splits, their files."""

import numpy as np
import pytest
from PIL import Image

from miniflamingo.worlds import shapes
from miniflamingo.worlds.shapes import COLOURS, DIGITS, NUM_GEOMETRIC, RGB, SHAPES

B = 64


def labels(rng, B=B, pairs=()):
    return tuple(rng.integers(0, n, (B, *pairs)) for n in (len(COLOURS), len(SHAPES), 2))


def draw(kind, seed):
    rng = np.random.default_rng(seed)
    if kind == "objects":
        return shapes.draw_objects(*labels(rng), rng)
    if kind == "pairs":
        return shapes.draw_pairs(*labels(rng, pairs=(2,)), rng)
    return shapes.draw_clips(*labels(rng, 8), np.arange(8) % 4, rng, num_frames=3)


SHAPE_OF = {"objects": (B, 24, 24, 3), "pairs": (B, 24, 24, 3), "clips": (8, 3, 24, 24, 3)}


@pytest.mark.parametrize("kind", SHAPE_OF)
def test_pictures_are_what_the_model_takes_and_follow_their_seed(kind):
    pictures = draw(kind, seed=3)
    assert pictures.shape == SHAPE_OF[kind] and pictures.dtype == np.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert np.array_equal(pictures, draw(kind, seed=3))
    assert not np.allclose(pictures, draw(kind, seed=4), atol=0.1)


def covered(pictures):
    """Pixels that are far from the background's grey, bool[B, 24, 24]."""
    grey = np.median(pictures, axis=(1, 2), keepdims=True)
    return np.abs(pictures - grey).max(axis=-1) > 0.22


def test_the_colour_is_the_label():
    rng = np.random.default_rng(0)
    colour, shape, size = labels(rng, 256)
    shape %= NUM_GEOMETRIC
    pictures = shapes.draw_objects(colour, shape, size, rng)
    mean = np.stack([p[c].mean(axis=0) for p, c in zip(pictures, covered(pictures))])
    nearest = np.linalg.norm(mean[:, None] - RGB, axis=-1).argmin(axis=1)
    assert (nearest == colour).mean() > 0.95


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_large_is_larger_than_small(shape):
    rng = np.random.default_rng(0)
    fixed = np.zeros(64, int), np.full(64, shape)
    small, large = (covered(shapes.draw_objects(*fixed, np.full(64, z), rng)) for z in (0, 1))
    assert large.sum() > 1.3 * small.sum()


def test_geometric_shapes_differ_and_have_their_geometry():
    place = np.full(NUM_GEOMETRIC, 12.0)
    cover = shapes.geometric_cover(np.arange(NUM_GEOMETRIC), place, place, place * 0 + 5)
    area = dict(zip(SHAPES, cover.sum(axis=(1, 2))))
    assert area["circle"] == pytest.approx(np.pi * 25, rel=0.1)
    assert area["square"] == pytest.approx((2 * 4.25) ** 2, rel=0.1)
    assert area["bar"] == pytest.approx(10 * 3.3, rel=0.2)
    assert cover[SHAPES.index("ring"), 12, 12] < 0.1 < 0.9 < cover[SHAPES.index("circle"), 12, 12]
    assert np.allclose(cover[3], cover[3].T)  # a cross is its own mirror image
    upper, lower = cover[2, :12].sum(), cover[2, 13:].sum()
    assert upper < 0.7 * lower  # a triangle stands on its base


def test_turned_shapes_are_what_they_say():
    def cover(shape):
        place, size = np.full(1, 12.0), np.ones(1, int)
        rng = np.random.default_rng(0)
        return shapes.cover_of(np.array([shape]), place, place, place * 0 + 5, size, "train", rng)[
            0
        ]

    for i, (word, turn) in enumerate(shapes.TURNED):
        upright, turned = cover(SHAPES.index(word)), cover(len(SHAPES) + i)
        undone = {
            "left": np.rot90(turned, -1),
            "right": np.rot90(turned),
            "mirrored": turned[:, ::-1],
        }
        np.testing.assert_array_equal(undone[turn], upright)
        assert np.abs(turned - upright).max() > 0.5
    # the digits that are kept for later are not among them, turned or not
    assert not {word for word, _ in shapes.TURNED} & {"seven", "eight", "nine"}


def test_first_object_is_on_the_left():
    rng = np.random.default_rng(0)
    colour = np.tile([COLOURS.index("red"), COLOURS.index("blue")], (B, 1))
    _, shape, size = labels(rng, pairs=(2,))
    pictures = shapes.draw_pairs(colour, shape % NUM_GEOMETRIC, size, rng)
    red, blue = pictures[..., 0] - pictures[..., 2], pictures[..., 2] - pictures[..., 0]
    x = np.arange(24)
    left = [(np.clip(c, 0.3, 1) - 0.3).sum(axis=1) for c in (red, blue)]
    centre = [(c * x).sum(axis=1) / c.sum(axis=1) for c in left]
    assert (centre[0] < centre[1]).all()


def test_clips_move_where_their_label_says():
    rng = np.random.default_rng(0)
    direction = np.arange(B) % 4
    colour, shape, size = labels(rng)
    clips = shapes.draw_clips(colour, shape % NUM_GEOMETRIC, size, direction, rng, num_frames=5)
    y, x = np.mgrid[0:24, 0:24]
    where = np.stack([covered(frames) for frames in clips.swapaxes(0, 1)], axis=1)
    area = where.sum(axis=(2, 3))
    centre = np.stack([(where * axis).sum(axis=(2, 3)) / area for axis in (x, y)], axis=-1)
    moved = centre[:, -1] - centre[:, 0]
    expected = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])[direction]
    assert ((moved * expected).sum(axis=1) > 4).all()  # pixels along
    assert (np.abs(moved * (1 - np.abs(expected))).sum(axis=1) < 2).all()  # and hardly across
    steps = np.diff(centre, axis=1)
    assert ((steps * expected[:, None]).sum(axis=2) > 0).all()  # in every frame


# --- handwritten digits ---------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    bundled = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(shapes.Path(shapes.__file__).with_name("digits.npz")) as file:
        assert np.array_equal(file["images"], bundled.images)
        assert np.array_equal(file["labels"], bundled.target)


def test_splits_share_no_image():
    sets = {}
    for split in shapes.GLYPHS:
        (small, large), starts = shapes.glyphs(split)
        assert small.shape[1:] == (12, 12) and large.shape[1:] == (16, 16)
        assert 0 <= large.min() and large.max() <= 1
        assert len(starts) == len(DIGITS) + 1 and (np.diff(starts) >= 20).all()
        sets[split] = {image.tobytes() for image in large}
    assert sum(len(glyphs[0][0]) for glyphs in map(shapes.glyphs, shapes.GLYPHS)) == 1797
    assert not sets["train"] & sets["test"] and not sets["validation"] & sets["test"]
    assert not sets["train"] & sets["validation"]


def test_a_digit_comes_from_its_class_and_split():
    (_, large), starts = shapes.glyphs("test")
    rng = np.random.default_rng(0)
    digit, middle = np.arange(200) % 10, np.full(200, 12.0)
    cover = shapes.glyph_cover(digit, middle, middle, np.ones(200, int), "test", rng)
    for d, image in zip(digit, cover[:, 4:20, 4:20]):
        assert (image == large[starts[d] : starts[d + 1]]).all(axis=(1, 2)).any()


def test_a_handwritten_image_can_be_chosen():
    (small, large), starts = shapes.glyphs("test")
    digit, middle = np.repeat(np.arange(10), 2), np.full(20, 12.0)
    number = np.tile([0, 31], 10)
    for size, images in ((0, small), (1, large)):
        w = images.shape[1]
        place = slice(12 - w // 2, 12 + w // 2)
        cover = shapes.glyph_cover(
            digit, middle, middle, np.full(20, size), "test", np.random.default_rng(0), number
        )
        assert np.array_equal(cover[:, place, place], images[starts[digit] + number])
    shape, rng = digit + NUM_GEOMETRIC, np.random.default_rng
    first, again = (shapes.draw_objects(digit % 8, shape, digit % 2, rng(0), "test", None, number)
                    for _ in range(2))  # fmt: skip
    other = shapes.draw_objects(digit % 8, shape, digit % 2, rng(0), "test", None, number[::-1])
    assert np.array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).all()


def test_variety_counts_handwritten_images():
    assert shapes.variety("test")[NUM_GEOMETRIC : len(SHAPES)].sum() == 347
    assert (shapes.variety("test")[:NUM_GEOMETRIC] == shapes.ANEW).all()
    upright = dict(zip(SHAPES, shapes.variety("train")))
    turned = [upright[word] for word, _ in shapes.TURNED]
    assert shapes.variety("train")[len(SHAPES) :].tolist() == turned


def test_unknown_split_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="train, validation, test, got 'tset'"):
        shapes.draw_objects(*np.array([[0, 0], [9, 9], [1, 1]]), rng, split="tset")


# --- files ----------------------------------------------------------------------------------------


def test_png_and_gif_hold_the_picture(tmp_path):
    rng = np.random.default_rng(0)
    clip = shapes.draw_clips(*labels(rng, 1), np.array([1]), rng, num_frames=4)[0]
    shapes.save_picture(tmp_path / "a.png", clip[0])
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (24, 24)
        assert np.abs(np.asarray(image) / 255 - clip[0]).max() <= 0.5 / 255 + 1e-6
    shapes.save_clip(tmp_path / "a.gif", clip, scale=3)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.size == (72, 72) and image.n_frames == 4 and image.info["loop"] == 0
