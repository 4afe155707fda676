"""Pictures become what transformers' processors make of them."""

import json

import numpy as np
import pytest
from PIL import Image

from miniflamingo.interop.preprocess import Preprocessor, TiledPreprocessor, preprocessor_of
from miniflamingo.tiled_vit import grids_of

CLIP = {
    "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "resample": 3,
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
    "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
IDEFICS = {"image_size": 24, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27]}


def write(folder, about):
    (folder / "preprocessor_config.json").write_text(json.dumps(about), "utf-8")
    return preprocessor_of(folder)


def noise(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(40, 30), (31, 57), (20, 20), (9, 11)])
@pytest.mark.parametrize("kind", ["clip", "clip, plain", "clip, larger crop", "idefics"])
def test_pixels_are_transformers_own(tmp_path, kind, size):
    pytest.importorskip("transformers")
    if kind == "idefics":
        from transformers.models.idefics.image_processing_pil_idefics import (
            IdeficsImageProcessorPil as Theirs,
        )

        about = IDEFICS
    else:
        from transformers.models.clip.image_processing_pil_clip import (
            CLIPImageProcessorPil as Theirs,
        )

        about = CLIP | {"do_normalize": "plain" not in kind}
        about |= {"crop_size": 25} if "larger" in kind else {}
    image = noise(*size)
    theirs = Theirs(**about)(image, return_tensors="np")
    theirs = np.asarray(theirs if kind == "idefics" else theirs["pixel_values"])[0]
    ours = write(tmp_path, about)(image)
    assert ours.dtype == np.float32
    background = write(tmp_path, about).normalise(np.zeros(3, np.float32))
    if "larger" in kind:  # they crop, and fill with black, before they normalise, too
        assert np.allclose(ours[0, 0], background)
    np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, atol=1e-5)


def test_without_a_file_it_is_clip_s(tmp_path):
    assert preprocessor_of(tmp_path) == Preprocessor()
    assert Preprocessor()(noise(300, 250)).shape == (224, 224, 3)
    assert write(tmp_path, {"do_resize": False, "do_normalize": False})(noise(9, 7)).shape == (
        7,
        9,
        3,
    )


TILES = {
    "size": {"height": 28, "width": 28}, "max_image_tiles": 4, "resample": 2, "do_pad": True,
    "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27], "rescale_factor": 1 / 255,
    "image_processor_type": "MllamaImageProcessor",
}  # fmt: skip
# smaller than a tile, and larger than all; wide and high; of exactly two tiles; a line
SIZES = [(20, 20), (9, 21), (90, 70), (300, 40), (31, 200), (56, 28), (57, 29), (500, 1), (64, 64)]


@pytest.mark.parametrize("changes", [{}, {"do_normalize": False}, {"max_image_tiles": 6}, None])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_transformers_own(tmp_path, size, changes):
    """Without rescaling and normalising to the last bit; None: by their defaults."""
    pytest.importorskip("transformers")
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    about = {"max_image_tiles": 4} if changes is None else TILES | changes
    plain = about | {"do_normalize": False, "do_rescale": False}
    for exact, fields in enumerate((about, plain)):
        theirs = MllamaImageProcessorPil(**fields)(noise(*size), return_tensors="np")
        ours = write(tmp_path, fields)
        canvas, side = ours(noise(*size)), ours.resize[0]
        rows, columns = canvas.shape[0] // side, canvas.shape[1] // side
        grid = 1 + grids_of(ours.tiles).index((rows, columns))
        assert grid == theirs["aspect_ratio_ids"][0, 0] and canvas.dtype == np.float32
        tiles = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        expected = theirs["pixel_values"][0, 0, : rows * columns]
        tiles = tiles.reshape(expected.shape)
        np.testing.assert_allclose(tiles, expected, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("tiles", [1, 2, 4, 6])
@pytest.mark.parametrize("side", [16, 560])
def test_canvases_of_a_thousand_sizes_are_transformers_own(tiles, side):
    pytest.importorskip("transformers")
    from transformers.models.mllama import image_processing_pil_mllama as theirs

    ours, rng = TiledPreprocessor((side, side), tiles=tiles), np.random.default_rng(0)
    for i in range(1000):
        most = (3 * side, 3000, 40)[i % 3]
        width, height = (int(x) for x in rng.integers(1, most, 2))
        rows, columns = ours.grid(width, height)
        canvas = (rows * side, columns * side)
        assert canvas == theirs.get_optimal_tiled_canvas(height, width, tiles, side)
        size = theirs.get_image_size_fit_to_canvas(height, width, *canvas, side)
        assert ours.within(canvas[::-1], (width, height)) == size[::-1]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_image_tiles": 0}, r"max_image_tiles must be in 1\.\.64, got 0"),
        ({"max_image_tiles": "4"}, "max_image_tiles must be in"),
        ({"max_image_tiles": None}, "max_image_tiles must be in"),
        ({"size": {"height": 28, "width": 56}}, "size must be of square tiles, got"),
        ({"size": {"height": 28}}, "size must be of 1 to 4096 pixels, got"),
        ({"do_pad": False}, "do_pad = False is not supported for tiles"),
        ({"do_resize": False}, "do_resize = False is not supported for tiles"),
        ({"resample": 99}, "resample must be one of"),
        ({"image_std": [0, 1, 1]}, "image_std must be above 0"),
    ],
)
def test_tiles_that_cannot_be_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: " + message):
        write(tmp_path, TILES | wrong)


WRONG = {
    "size": [0, -1, 10**9, "big", {"height": 3}, {"shortest_edge": 2.5}, True],
    "crop_size": [0, {"height": 10**6, "width": 3}],
    "image_mean": [[1, 2], "x", [1, 2, None], [1, 2, True]],
    "image_std": [[0, 1, 1], 3],
    "rescale_factor": ["1", None, 1e999],
    "resample": [99, "cubic", True],
    "do_image_splitting": [True],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG.items() for v in values])
def test_what_cannot_be_is_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=r"preprocessor_config\.json") as error:
        write(tmp_path, CLIP | {field: value})
    words = {
        "do_image_splitting": "tiles",
        "rescale_factor": "no JSON" if value == 1e999 else field,
    }
    assert words.get(field, field) in str(error.value) or "no JSON" in str(error.value)
