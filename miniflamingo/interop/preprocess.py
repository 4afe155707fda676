"""Pictures as a checkpoint wants them: its preprocessor_config.json, on top of `pictures`.

    resize -> crop the middle -> / 255 -> (x - mean) / std

as transformers' processors of CLIP and IDEFICS do it, in Pillow's bicubic filter unless it says
otherwise. For Llama 3.2 Vision a picture becomes a canvas of tiles:

    resize, keeping its shape, into the grid of tiles that fits best -> black behind it -> / 255 ...
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from miniflamingo.interop.files import read_config
from miniflamingo.pictures import check_size, read_picture
from miniflamingo.tensorfile import shown
from miniflamingo.tiled_vit import HALF, grids_of

LARGEST = 4096  # pixels of a side
MOST = 2**26  # of a picture that was resized by its shorter side
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessor:
    """resize (height, width), or one number for the shorter side, or None; crop (height, width) or
    None; `filter`, one of Pillow's; mean and std [3] or None, of numbers scaled by `rescale`."""

    resize: tuple | int | None = 224
    crop: tuple | None = (224, 224)
    filter: int = Image.Resampling.BICUBIC
    rescale: float = 1 / 255
    mean: tuple | None = CLIP_MEAN
    std: tuple | None = CLIP_STD

    def fitted(self, source):
        """A picture (as `pictures.read_picture` takes it) -> RGB, resized and cropped."""
        image = read_picture(source)
        if self.resize is not None:
            size = self._size(*image.size)
            check_size(size, MOST, f"resized image of {image.width} x {image.height} pixels")
            image = image.resize(size, self.filter)
        if self.crop is None:
            return image
        height, width = self.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))  # black where it has nothing

    def _size(self, width, height):
        if not isinstance(self.resize, int):
            return self.resize[::-1]
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def __call__(self, source):
        """A picture -> float32 [height, width, 3], as the checkpoint's eye has seen them."""
        return self.normalise(np.asarray(self.fitted(source)) * np.float32(self.rescale))

    def normalise(self, x):  # [..., 3] -> [..., 3]
        """(x - mean) / std, where the checkpoint says so."""
        if self.mean is None:
            return x
        return (x - np.array(self.mean, x.dtype)) / np.array(self.std, x.dtype)


@dataclass(frozen=True)
class TiledPreprocessor(Preprocessor):
    """A picture -> a canvas of up to `tiles` tiles of `resize` (height, width), which are equal."""

    tiles: int = 4

    def fitted(self, source):
        """A picture -> RGB of rows x columns tiles, the picture in its upper left corner."""
        image, side = read_picture(source), self.resize[0]
        rows, columns = self.grid(*image.size)
        canvas = columns * side, rows * side
        image = image.resize(self.within(canvas, image.size), self.filter)
        return image.crop((0, 0, *canvas))  # black where it has nothing

    def grid(self, width, height):
        """The grid (rows, columns) in which a picture can be enlarged the least, else shrunk the
        least; of equals the one with the fewest tiles."""

        def how_bad(grid):
            rows, columns = grid
            scale = min(rows * self.resize[0] / height, columns * self.resize[0] / width)
            return scale < 1, scale if scale >= 1 else -scale, rows * columns

        return min(grids_of(self.tiles), key=how_bad)

    def within(self, canvas, size):  # (width, height), (width, height) -> (width, height)
        """The size on a canvas of a picture of this size: it keeps its shape, and is enlarged no
        further than to the side of a tile."""
        ends = [min(max(n, self.resize[0]), most) for n, most in zip(size, canvas)]
        scale = min(end / n for end, n in zip(ends, size))
        return tuple(min(math.floor(n * scale) or 1, end) if end / n > scale else end
                     for n, end in zip(size, ends))  # fmt: skip


def _config(folder):
    """(path, its fields) of a folder's preprocessor_config.json, or of what newer transformers
    write, processor_config.json; fields {} where there is none."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        return path, read_config(path)
    path = folder / "processor_config.json"
    found = read_config(path).get("image_processor") if path.is_file() else None
    return path, found if isinstance(found, dict) else {}


def preprocessor_of(folder, side=224):
    """The Preprocessor of a folder's preprocessor_config.json; CLIP's where there is none, for
    pictures of `side` pixels, which is the size where the file has none, too.

    ValueError that names the file and the field that cannot be.
    """
    path, c = _config(folder)
    if not c:
        return Preprocessor(side, (side, side))
    if c.get("do_image_splitting"):
        raise ValueError(f"{path}: pictures cut into tiles by do_image_splitting are not read")
    if "max_image_tiles" in c:
        return _tiled(path, c)
    own = c.get("image_size")  # IDEFICS
    size = c.get("size", {"height": own, "width": own} if own else side)
    whole = isinstance(size, dict) and "height" in size  # nothing is left to be cropped
    cropped = c.get("do_center_crop", "size" in c and not whole)
    crop = c.get("crop_size", side if cropped else None)
    return Preprocessor(
        _side(path, "size", size) if c.get("do_resize", True) else None,
        _square(path, crop) if c.get("do_center_crop", crop is not None) else None,
        _filter(path, c.get("resample", Image.Resampling.BICUBIC)),
        _rescale(path, c),
        *_mean_and_std(path, c),
    )  # fmt: skip


def _tiled(path, c):
    """The TiledPreprocessor of Llama 3.2 Vision's preprocessor_config.json, a dict."""
    tiles, side = c["max_image_tiles"], _side(path, "size", c.get("size", 224))
    if not isinstance(tiles, int) or isinstance(tiles, bool) or not 1 <= tiles <= 64:
        raise ValueError(f"{path}: max_image_tiles must be in 1..64, got {shown(tiles)}")
    size = side if isinstance(side, tuple) else (side, side)
    if size[0] != size[1]:
        raise ValueError(f"{path}: size must be of square tiles, got {shown(c['size'])}")
    for field in ("do_resize", "do_pad"):
        if not c.get(field, True):
            raise ValueError(f"{path}: {field} = {shown(c[field])} is not supported for tiles")
    return TiledPreprocessor(
        size, None, _filter(path, c.get("resample", Image.Resampling.BILINEAR)), _rescale(path, c),
        *_mean_and_std(path, {"image_mean": HALF, "image_std": HALF} | c), tiles,
    )  # fmt: skip


def _rescale(path, c):
    """rescale_factor, or 1 where nothing is rescaled."""
    factor = _number(path, "rescale_factor", c.get("rescale_factor", 1 / 255))
    if not factor > 0:
        raise ValueError(f"{path}: rescale_factor must be above 0, got {factor}")
    return factor if c.get("do_rescale", True) else 1.0


def _mean_and_std(path, c):
    """image_mean and image_std, or None twice where nothing is normalised."""
    mean = _three(path, "image_mean", c.get("image_mean", CLIP_MEAN))
    std = _three(path, "image_std", c.get("image_std", CLIP_STD))
    if not min(std) > 0:
        raise ValueError(f"{path}: image_std must be above 0, got {list(std)}")
    return (mean, std) if c.get("do_normalize", True) else (None, None)


def _side(path, field, value):
    """{"shortest_edge": n} or n -> n; {"height": h, "width": w} -> (h, w)."""
    if isinstance(value, dict):
        keys = ("shortest_edge",) if "shortest_edge" in value else ("height", "width")
        sides = tuple(value.get(key) for key in keys)
    else:
        sides = (value,)
    for x in sides:
        if not isinstance(x, int) or isinstance(x, bool) or not 1 <= x <= LARGEST:
            raise ValueError(
                f"{path}: {field} must be of 1 to {LARGEST} pixels, got {shown(value)}"
            )
    return sides[0] if len(sides) == 1 else sides


def _square(path, value):
    side = _side(path, "crop_size", value)
    return (side, side) if isinstance(side, int) else side


def _filter(path, value):
    if value not in list(Image.Resampling) or isinstance(value, bool):
        raise ValueError(f"{path}: resample must be one of Pillow's filters, got {shown(value)}")
    return Image.Resampling(value)


def _number(path, field, value):
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits:
        raise ValueError(f"{path}: {field} must be a number, got {shown(value)}")
    return value


def _three(path, field, value):
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError(f"{path}: {field} must be three numbers, got {shown(value)}")
    return tuple(_number(path, field, x) for x in value)
