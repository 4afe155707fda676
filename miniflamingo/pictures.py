"""Pictures: whatever a phone, a scanner or a program calls one -> 8-bit RGB. The only way in.

The command line, build_batch, the loaders and the frames of an animation all come through `to_rgb`:
    upright      by the orientation that EXIF, XMP or TIFF note
    sRGB         by the colour profile in the file; one that is broken or made for other pixels is
                 ignored, as browsers do
    on white     whatever is transparent: an alpha channel, a palette's entries, one colour of a PNG
    8 bits       of grey with 12 or 16, the highest 8; numbers of an unknown range are refused
    one picture  the first of a phone's MPO, of a TIFF's pages, of a file's layers. Animations are
                 GIF, WebP, APNG, AVIF and FLI files of several frames; as a picture, the first one
Pictures of more than Image.MAX_IMAGE_PIXELS (89 million) are refused, as are files that are cut
off. Whatever is wrong is a BadRecord, one line that names the file.
"""

import logging
import warnings
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "FLI")
PROGRAMS = ("EPS",)  # Pillow would run Ghostscript on what a stranger wrote
MAX_CLIP_PIXELS = 2**28  # of the frames that are kept: 0.8 GB in RGB, 8 frames of 8K
MAX_DECODED_PIXELS = 2**32  # of all frames of an animation: 2,000 in full HD
SHORTEST, INSTEAD = 10, 100  # browsers show frames of up to 10 milliseconds for 100
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
logging.getLogger("PIL").addHandler(logging.NullHandler())  # a BadRecord says it, once


class BadRecord(ValueError):
    """A file or a record that cannot be used: `reason` is what a Report counts it under."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


# --- files --------------------------------------------------------------------------------------


@contextmanager
def open_picture(source, name=None):
    """A Path, bytes, binary file or PIL image -> Pillow's image, to be used in a `with`.

    Whatever goes wrong inside is a BadRecord that begins with the name; only a file that is not
    there is a FileNotFoundError.
    """
    name = name or _described(source)
    if isinstance(source, (str, Path)):
        check_file(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow; `check_size` is stricter
            if isinstance(source, Image.Image):
                yield source
                return
            with _opened(source) as file, _begun(file) as image:
                yield image
    except FileNotFoundError:
        raise
    except BadRecord as error:
        raise BadRecord(error.reason, f"{name}: {error}") from None
    except UnidentifiedImageError:
        formats = "no picture in a format that is read (PNG, JPEG, WebP, GIF, TIFF, ...; HEIC, SVG"
        raise BadRecord("unreadable image", f"{name}: {formats} and PDF are not)") from None
    except Image.DecompressionBombError as error:
        raise BadRecord("image too large", f"{name}: image too large: {error}") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        message = f"{name}: {type(error).__name__}: {error}"
        raise BadRecord("unreadable image", message) from None


def check_file(path, kind="image"):
    """BadRecord for what is there and no file, such as a pipe, which may have no end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise BadRecord(f"unreadable {kind}", f"{path}: expected a file, got a folder or a pipe")


def _described(source):
    if isinstance(source, (str, Path)):
        return str(source)
    return getattr(source, "filename", "") or getattr(source, "name", "") or type(source).__name__


@contextmanager
def _opened(source):
    """A Path, bytes or binary file -> a file that can be rewound."""
    if isinstance(source, bytes):
        yield BytesIO(source)
    elif isinstance(source, (str, Path)):
        with open(source, "rb") as file, _opened(file) as rewindable:
            yield rewindable
    else:
        yield source if source.seekable() else BytesIO(source.read())


def _begun(file):
    """Pillow's image of a binary file, with the note "cut off" where that is known already."""
    mended = _whole_frames(file)
    image = Image.open(mended or file)
    if image.format in PROGRAMS:
        raise BadRecord("unreadable image", f"{image.format} is a program, not a picture")
    image.info["cut off"] = mended is not None
    return image


def _whole_frames(file):
    """A WebP that is cut off, without its last chunk: libwebp reads all or nothing. Else None."""
    start = file.tell()
    head = file.read(12)
    rest = file.read() if head[:4] + head[8:] == b"RIFFWEBP" else b""
    file.seek(start)
    end = int.from_bytes(head[4:8], "little") - 4
    if not rest or len(rest) >= end:
        return None
    at = after = 0
    while after <= len(rest):
        at = after
        after += 8 + (int.from_bytes(rest[at + 4 : at + 8], "little") + 1) // 2 * 2
    return BytesIO(b"RIFF" + (at + 4).to_bytes(4, "little") + b"WEBP" + rest[:at])


def read_picture(source, name=None, still=False):
    """A Path, bytes, binary file or PIL image -> a new PIL image in RGB, wholly read.

    A PIL image gives the frame that it stands at, a file its first picture; with still=True an
    animation is refused. BadRecord that begins with the name, or FileNotFoundError.
    """
    with open_picture(source, name) as image:
        frames = count_frames(image) if still else 1
        if frames > 1:
            raise BadRecord("animation", f"an animation of {frames} frames, expected one picture")
        return to_rgb(image)


# --- pixels -------------------------------------------------------------------------------------


def check_size(size, limit=None, what="image"):
    """BadRecord unless [width, height] are positive and at most `limit` pixels, Pillow's own."""
    limit = Image.MAX_IMAGE_PIXELS if limit is None else limit
    pixels = size[0] * size[1]
    if not pixels:
        raise BadRecord("unreadable image", f"an {what} of {size[0]} x {size[1]} pixels")
    if limit is not None and pixels > limit:
        raise BadRecord("image too large", f"{what} too large: {pixels} pixels, more than {limit}")


def to_rgb(image):
    """A PIL image in any mode -> a new one in RGB, upright, on white, without metadata.

    BadRecord for its size or for numbers of an unknown range; Pillow's errors for damaged bytes.
    """
    check_size(image.size)
    hidden = _hidden(image)
    image.load()
    colours, alpha = _split(image, hidden)
    rgb = _to_srgb(colours, image.info.get("icc_profile"))
    if alpha is not None:
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    turn = TURNS.get(_orientation(image))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # what it said is done: it must not be done again
    return rgb


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata: the picture may be whole
        return None


def _hidden(image):
    """The value or the colour that a PNG makes transparent, in the range of the decoded pixels."""
    value, tile = image.info.get("transparency"), getattr(image, "tile", None)
    raw = tile[0][3] if tile else None
    if raw in ("L;2", "L;4") and isinstance(value, int):
        return value * {"L;2": 85, "L;4": 17}[raw]
    if isinstance(value, tuple) and (raw == "RGB;16B" or max(value, default=0) > 255):
        return tuple(v >> 8 for v in value)
    return value


def _split(image, hidden):
    """Any mode -> the colours as L, RGB, CMYK or LAB, and alpha as L, or None if all is seen."""
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode in ("P", "PA", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode in ("LA", "RGBA"):
        colours = image.getchannel("L") if image.mode == "LA" else image.convert("RGB")
        return colours, image.getchannel("A")
    alpha = None
    if isinstance(hidden, tuple if image.mode == "RGB" else int):
        seen = np.asarray(image) != np.array(hidden)
        alpha = Image.fromarray(np.uint8(255) * (seen.any(-1) if seen.ndim == 3 else seen))
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image), alpha
    return (image if image.mode in ("L", "CMYK", "LAB") else image.convert("RGB")), alpha


def _eight_bits(image):
    """Grey of 12 or 16 bits -> L; convert would cut it off at 255."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        raise BadRecord("unreadable image", "floating point pixels, whose range is not known")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # older Pillows' 16 bits
        raise BadRecord("unreadable image", "32-bit or signed pixels, whose range is not known")
    bits = 12 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 16
    grey = np.clip(np.asarray(image), 0, 2**bits - 1) >> (bits - 8)
    grey = 255 - grey if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 else grey
    return Image.fromarray(grey.astype(np.uint8))


def _to_srgb(colours, profile):
    if profile:
        with suppress(Exception):  # a broken profile, or one for other pixels
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(colours, source, srgb, outputMode="RGB")
    return colours.convert("RGB")


# --- animations ---------------------------------------------------------------------------------


def count_frames(image):
    """The number of frames of Pillow's image if it is an animation, else 1."""
    try:
        return image.n_frames if image.format in ANIMATED else 1
    except Exception:  # damaged behind the first frame
        return 1


def iterate_frames(image, say):
    """Yield (Pillow's image standing at a frame, its milliseconds) for each; one for a picture.

    Where an animation is cut off, say(message) is called, and what came before is all. BadRecord
    for more than MAX_DECODED_PIXELS together.
    """
    animation = image.format in ANIMATED
    first = int(bool(image.info.get("default_image")))  # of an APNG: stands in for the animation
    pixels = 0
    for i in count(first):
        try:
            check_size(image.size)
            image.seek(i)
            image.load()
        except EOFError:
            break
        except BadRecord:
            raise
        except Exception as error:
            if i == first:
                raise
            return say(f"cut off after {i - first} frames: {type(error).__name__}: {error}")
        pixels += max(image.width * image.height, 2**12)
        if pixels > MAX_DECODED_PIXELS:
            raise BadRecord("image too large", f"more than {MAX_DECODED_PIXELS} pixels to decode")
        yield image, _milliseconds(image)
        if not animation:
            return None
    if _is_cut_off(image, i):
        say(f"cut off after {i - first} frames, where its end mark is missing")


def _milliseconds(image):
    shown = round(image.info.get("duration") or 0)
    return shown if shown > SHORTEST else INSTEAD


def _is_cut_off(image, read):
    """Whether an animation ended, for Pillow, before its own end."""
    if image.format == "GIF":
        image.fp.seek(-min(2**10, image.fp.seek(0, 2)), 2)
        return image.fp.read().rstrip(b"\0\r\n\t ")[-1:] != b";"
    return image.info.get("cut off") or read < count_frames(image)


def keep(frames, image):
    """Append an RGB image; BadRecord when the frames would then take too much memory."""
    kept = len({id(frame) for frame in frames}) + 1
    check_size(image.size, MAX_CLIP_PIXELS // kept, f"clip with {kept} frames")
    frames.append(image)
