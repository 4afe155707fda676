"""The one way into the model: whatever a picture is, it becomes 8-bit RGB, or one line says why."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from miniflamingo import pictures
from miniflamingo.pictures import BadRecord, open_picture, read_picture
from miniflamingo.prompt import read_frames
from miniflamingo.worlds.records import load_image
from miniflamingo.worlds.video import read_clip

WHITE, RED, GREEN = [255, 255, 255], [255, 0, 0], [0, 128, 0]


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    if "append_images" in options:  # copies: Pillow leaves notes on what it saved
        options["append_images"] = [image.copy() for image in options["append_images"]]
    image.copy().save(file, kind, **options)
    return file.getvalue()


def pixels(source):
    return np.asarray(read_picture(source))


def png(depth, colour_type, row, *chunks):
    """A PNG of one row, written by hand: Pillow does not write all kinds."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    width = len(row) * 8 // depth // channels
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


# --- every door is the same ---------------------------------------------------------------------


@pytest.fixture
def turned(tmp_path):
    """Stored with red on the left; a camera's note says that red is above."""
    image = Image.new("RGB", (8, 8), "blue")
    image.paste("red", (0, 0, 4, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    return path


def test_a_path_bytes_a_file_a_pil_image_and_the_loader_agree(turned):
    expected = np.zeros((8, 8, 3), np.uint8)
    expected[:4], expected[4:] = [255, 0, 0], [0, 0, 255]
    with Image.open(turned) as image, turned.open("rb") as file:
        for source in (turned, str(turned), turned.read_bytes(), file, image, read_picture(turned)):
            np.testing.assert_array_equal(pixels(source), expected)
            if not isinstance(source, str):  # in a prompt, a text
                for part in (source, [source]):
                    np.testing.assert_array_equal(read_frames(part, 8)[0] * 255, expected)
    np.testing.assert_array_equal(np.asarray(load_image("x", turned)), expected)


def test_a_pil_image_is_left_as_it_was(turned):
    with Image.open(turned) as image:
        read_picture(image)
        assert image.getexif()[0x0112] == 6 and image.mode == "RGB"


KINDS = {
    "P": Image.new("P", (4, 4)), "1": Image.new("1", (4, 4), 1), "L": Image.new("L", (4, 4), 9),
    "LA": Image.new("LA", (4, 4), (9, 99)), "RGBA": Image.new("RGBA", (4, 4), (1, 2, 3, 99)),
    "CMYK": Image.new("CMYK", (4, 4), (9, 99, 0, 50)), "I;16": Image.new("I;16", (4, 4), 999),
}  # fmt: skip


@pytest.mark.parametrize("mode", KINDS)
def test_what_came_through_comes_through_unchanged(mode):
    image = KINDS[mode]
    image.info |= {"transparency": 9} if mode in ("P", "L") else {}
    once = read_picture(image)
    assert (once.mode, once.info) == ("RGB", {})
    np.testing.assert_array_equal(pixels(once), np.asarray(once))


# --- upright ------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 do not exist
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_orientation_in_every_format(kind, orientation):
    grey = np.zeros((16, 24), np.uint8)
    grey[:8, :8] = 255
    image = Image.fromarray(grey).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    turn = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
            5: np.transpose, 6: lambda a: np.rot90(a, -1), 8: np.rot90,
            7: lambda a: np.rot90(a.T, 2)}  # fmt: skip
    expected = turn.get(orientation, turn[1])(grey)
    got = pixels(encoded(image, kind, exif=exif))[..., 0]
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() < 40


def test_damaged_metadata_does_not_lose_a_picture():
    image = Image.new("RGB", (8, 8), "red")
    for exif in (
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0XX",
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12",
    ):
        assert pixels(encoded(image, "JPEG", exif=exif))[0, 0].tolist() == [254, 0, 0]


# --- on white -----------------------------------------------------------------------------------


def half_seen(mode, hidden=(255, 0, 255), seen=(0, 128, 0)):
    """The left half is transparent and hides a colour; the right half is green."""
    image = Image.new("RGBA", (4, 2), (*hidden, 0))
    image.paste((*seen, 255), (2, 0, 4, 2))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "ICO", "TGA"])
def test_hidden_colours_are_never_shown(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = half_seen("RGBA").resize((16, 16), Image.Resampling.NEAREST)
    got = pixels(encoded(image, kind, **options))
    assert (got[2, 2].tolist(), got[2, -2].tolist()) == (WHITE, GREEN)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_every_mode_with_alpha(mode):
    image = half_seen("LA").convert("La") if mode == "La" else half_seen(mode)
    if mode == "PA":
        image.putalpha(half_seen("RGBA").getchannel("A"))
    got = pixels(image)
    assert got[0, 0].tolist() == WHITE
    assert got[0, 3].max() < 140


def test_alpha_blends_with_white():
    assert pixels(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))[0, 0].tolist() == [204] * 3
    assert pixels(Image.new("LA", (1, 1), (0, 102)))[0, 0].tolist() == [153] * 3


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_one_entry_of_a_palette_or_many(kind):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 255, *GREEN] + [0] * 750)
    image.paste(1, (2, 0, 4, 2))
    alphas = [0] if kind == "GIF" else [0, b"\0\xff", b"\x80\xff"]
    for alpha in alphas:
        got = pixels(encoded(image, kind, transparency=alpha))
        half = alpha == b"\x80\xff"
        assert got[0, 0].tolist() == ([255, 127, 255] if half else WHITE)
        assert got[0, 3].tolist() == GREEN


@pytest.mark.parametrize(
    "depth, colour_type, row, hidden, expected",
    [
        (1, 0, b"\x50", (0,), [255] * 8),  # black is transparent, so all is white
        (1, 0, b"\x50", (1,), [0, 255] * 2 + [0] * 4),
        (2, 0, b"\x1b", (0,), [255, 85, 170, 255]),
        (2, 0, b"\x1b", (1,), [0, 255, 170, 255]),
        (4, 0, b"\x12", (2,), [17, 255]),
        (8, 0, b"\x07\x08", (7,), [255, 8]),
        (16, 0, b"\x12\x34\x12\x35", (0x1234,), [255, 0x12]),
        (8, 2, b"\1\2\3\1\2\4", (1, 2, 3), [255, 1]),
        (16, 2, b"\1\0\2\0\3\0\1\0\2\0\4\0", (256, 512, 768), [255, 1]),
        (16, 2, b"\0\1\0\2\0\3\1\0\2\0\4\0", (1, 2, 3), [255, 1]),
    ],
)
def test_one_colour_of_a_png_is_transparent(depth, colour_type, row, hidden, expected):
    content = png(depth, colour_type, row, (b"tRNS", struct.pack(f">{len(hidden)}H", *hidden)))
    assert pixels(content)[0, :, 0].tolist() == expected


# --- 8 bits -------------------------------------------------------------------------------------

SHADES = np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_of_grey_keep_their_shades_in_every_format(kind):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    tall = np.tile(SHADES, (4, 1))
    assert pixels(encoded(Image.fromarray(tall), kind, **options))[0, :, 0].tolist() == [
        0, 1, 128, 255,
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bits_in_every_order(mode):
    assert pixels(Image.new(mode, (2, 2), 0x8000))[0, 0].tolist() == [128] * 3


def test_sixteen_bits_as_older_pillows_hold_them():
    image = Image.fromarray(SHADES.astype(np.int32))
    for image.format in ("PNG", "PPM"):
        assert pixels(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bits_of_colour_and_alpha():
    assert pixels(png(16, 2, b"\x80\0\x40\0\x20\0"))[0, 0].tolist() == [128, 64, 32]
    assert pixels(png(16, 6, b"\x80\0\x40\0\x20\0\0\0"))[0, 0].tolist() == WHITE
    assert pixels(png(16, 4, b"\x80\0\xff\xff\x80\0\0\0"))[0, :, 0].tolist() == [128, 255]


def tiff(bits, content, photometric=1):
    """A TIFF of one row in grey, written by hand."""
    width = len(content) * 8 // bits
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8),
            (277, 1), (278, 1), (279, len(content))]  # fmt: skip
    content += b"\0" * (len(content) % 2)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    return start + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_scanners_grey_of_twelve_bits_or_with_white_as_zero():
    assert pixels(tiff(12, b"\x00\x0f\xff"))[0, :, 0].tolist() == [0, 255]
    assert pixels(tiff(16, b"\0\0\xff\xff", photometric=0))[0, :, 0].tolist() == [255, 0]
    assert pixels(tiff(8, b"\0\xff", photometric=0))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((2, 2), 0.5, np.float32)),
        Image.fromarray(np.full((2, 2), 70_000, np.int32)),
        Image.new("L", (2, 2), 9).convert("I"),
    ],
    ids=["float", "int", "8 bits as int"],
)
def test_numbers_of_an_unknown_range_are_refused_at_every_door(image, tmp_path):
    image.save(tmp_path / "x.tif")
    for source in (image, tmp_path / "x.tif"):
        with pytest.raises(BadRecord, match="whose range is not known"):
            read_picture(source)
        with pytest.raises(ValueError, match="whose range is not known"):
            read_frames(source, 8)


# --- colours ------------------------------------------------------------------------------------


def test_other_spaces_of_colour():
    red = Image.new("RGB", (8, 8), "red")
    for mode in ("YCbCr", "HSV", "CMYK"):
        assert np.abs(pixels(red.convert(mode))[0, 0].astype(int) - RED).max() <= 2
    for kind in ("JPEG", "TIFF"):
        assert np.abs(pixels(encoded(red.convert("CMYK"), kind))[0, 0].astype(int) - RED).max() < 3
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    for source in (lab, encoded(lab, "TIFF")):
        assert np.abs(pixels(source)[0, 0].astype(int) - RED).max() < 9


def swapped_profile():
    """sRGB with the columns of red and blue exchanged: what is stored as red is blue."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = content.index(b"rXYZ"), content.index(b"bXYZ")
    content[red], content[blue] = content[blue], content[red]
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_profile_of_colours_is_followed(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    red = Image.new("RGB", (8, 8), "red")
    content = encoded(red, kind, icc_profile=swapped_profile(), **options)
    assert np.abs(pixels(content)[0, 0].astype(int) - [0, 0, 255]).max() < 4
    seen = half_seen("RGBA", seen=(255, 0, 0))
    seen.info["icc_profile"] = swapped_profile()
    assert pixels(seen)[0, :, :].tolist() == [WHITE] * 2 + [[0, 0, 255]] * 2


@pytest.mark.parametrize("profile", [b"none", b"\0" * 200, swapped_profile()[:300]])
def test_a_broken_profile_is_ignored(profile):
    content = encoded(Image.new("RGB", (8, 8), "red"), icc_profile=profile)
    assert pixels(content)[0, 0].tolist() == RED


def test_a_profile_for_other_pixels_is_ignored():
    content = encoded(Image.new("L", (8, 8), 99), icc_profile=swapped_profile())
    assert pixels(content)[0, 0].tolist() == [99] * 3


# --- one picture --------------------------------------------------------------------------------

FIRST, SECOND = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


@pytest.mark.parametrize("kind", ["MPO", "TIFF"])
def test_of_a_phones_pictures_and_of_pages_the_first(kind, tmp_path):
    (tmp_path / "x").write_bytes(encoded(FIRST, kind, save_all=True, append_images=[SECOND]))
    frames = read_frames(tmp_path / "x", 8)
    assert len(frames) == 1 and frames[0, 4, 4, 0] > 0.9 > 0.1 > frames[0, 4, 4, 2]
    assert read_picture(tmp_path / "x", still=True).getpixel((4, 4))[2] < 9


@given(st.integers(0, 2**32), st.integers(0, 90))
@settings(max_examples=60, deadline=None)
def test_a_phones_picture_survives_damage_to_the_list_of_the_others(seed, cut):
    content = bytearray(encoded(FIRST, "MPO", save_all=True, append_images=[SECOND]))
    at = content.index(b"MPF\0") + 4
    rng = np.random.default_rng(seed)
    for i in rng.integers(at, at + 82, 3):
        content[i] = rng.integers(256)
    second = content.index(b"\xff\xd9") + 2
    del content[second + cut :]
    assert pixels(bytes(content))[4, 4, 0] > 250


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_no_picture_but_its_path_is_a_video(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    options = {"save_all": True, "append_images": [SECOND, FIRST], "duration": 100}
    path.write_bytes(encoded(FIRST, kind, **options))
    with pytest.raises(BadRecord, match=r"x\.\w+: an animation of 3 frames, expected one picture"):
        read_picture(path, still=True)
    assert read_picture(path).getpixel((4, 4))[0] > 250
    assert (read_frames(path, 8)[:, 4, 4, 0] > 0.9).tolist() == [True, False, True]
    path.write_bytes(encoded(FIRST, kind))
    assert read_picture(path, still=True).size == (8, 8)


def test_an_animations_frames_hide_nothing_either(tmp_path):
    frames = [half_seen("RGBA"), half_seen("RGBA", seen=(0, 0, 255))]
    options = {"save_all": True, "append_images": frames[1:], "disposal": 2}
    for kind in ("GIF", "PNG", "WEBP"):
        more = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        frames[0].save(tmp_path / "x", kind, **options, **more)
        got = read_frames([read_picture(tmp_path / "x"), tmp_path / "x"], 2)
        assert got.shape[0] == 3 and (got[:, :, 0] == 1).all()


def test_an_apngs_stand_in_is_no_frame_of_it(tmp_path):
    options = {"save_all": True, "append_images": [SECOND, SECOND.copy()], "default_image": True}
    second = SECOND.copy()
    second.paste("green", (0, 0, 2, 2))
    options["append_images"] = [SECOND, second]
    FIRST.save(tmp_path / "x.png", **options)
    frames = read_frames(tmp_path / "x.png", 8)
    assert len(frames) == 2 and (frames[:, 4, 4, 2] > 0.9).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_that_is_cut_off_gives_its_first_frames_and_says_so(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    options = {"save_all": True, "append_images": frames[1:], "duration": 200}
    content = encoded(frames[0], kind, **options)
    (tmp_path / "x").write_bytes(content[: int(0.7 * len(content))])
    with pytest.warns(UserWarning, match="x: cut off after 2 frames"):
        assert len(read_frames(tmp_path / "x", 8)) == 2
    assert read_picture(tmp_path / "x").size == (16, 16)


# --- limits and damage --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (3, 2)])
def test_thin_and_tiny_pictures_fit(size):
    assert (read_frames(Image.new("RGB", size, "red"), 24) == [1, 0, 0]).all()


def test_pictures_above_the_limit_are_refused_at_every_door(monkeypatch, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    frames = {"save_all": True, "append_images": [SECOND], "duration": 100}
    FIRST.save(tmp_path / "x.gif", **frames)
    for limit in (40, 20):  # Pillow warns above the limit, raises above twice as much
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for source in (tmp_path / "x.png", tmp_path / "x.gif", Image.new("RGB", (8, 8))):
            for read in (read_picture, lambda source: read_frames(source, 8)):
                with pytest.raises(BadRecord, match="image too large: ") as caught:
                    read(source)
                assert caught.value.reason == "image too large"


def test_an_empty_picture_is_refused():
    with pytest.raises(BadRecord, match="0 x 5 pixels"):
        read_frames(Image.new("RGB", (0, 5)), 8)


@pytest.mark.parametrize("name, limit", [("MAX_DECODED_PIXELS", 2**13), ("MAX_CLIP_PIXELS", 150)])
def test_an_animation_of_too_many_pixels_is_refused(name, limit, monkeypatch, tmp_path):
    FIRST.save(tmp_path / "x.gif", save_all=True, append_images=[SECOND, FIRST], duration=100)
    monkeypatch.setattr(pictures, name, limit)
    monkeypatch.setattr("miniflamingo.prompt.MAX_CLIP_PIXELS", pictures.MAX_CLIP_PIXELS)
    with pytest.raises(BadRecord) as caught:
        read_frames(tmp_path / "x.gif", 8)
    assert caught.value.reason == "image too large"


def test_what_runs_as_a_program_is_refused():
    with pytest.raises(BadRecord, match="EPS is a program"):
        read_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "x.png")
    with pytest.raises(BadRecord, match=str(tmp_path)):
        read_picture(tmp_path)
    with pytest.raises(BadRecord, match=r"a\.png"):
        load_image("a.png", Path("a.png"))


def many_kinds():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)) for _ in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": noise[1:]}
    profile = {"icc_profile": swapped_profile()}
    yield from ((kind, encoded(noise[0], kind)) for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF"))
    yield from ((kind, encoded(noise[0], kind)) for kind in ("PPM", "TGA", "JPEG2000", "ICO"))
    yield from (
        (f"animated {kind}", encoded(noise[0], kind, duration=90, **more))
        for kind in ("GIF", "PNG", "WEBP")
    )
    yield from (
        ("MPO", encoded(noise[0], "MPO", **more)),
        ("pages", encoded(noise[0], "TIFF", **more)),
    )
    yield "CMYK", encoded(noise[0].convert("CMYK"), "JPEG", exif=exif, **profile)
    yield "alpha", encoded(noise[0].convert("RGBA"), "PNG", exif=exif, **profile)
    yield "palette", encoded(noise[0].quantize(9), "PNG", transparency=b"\0\x80")
    yield "16 bits", encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999))


MANY = dict(many_kinds())


@pytest.mark.filterwarnings("ignore:.*cut off")
@given(st.sampled_from(sorted(MANY)), st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_one_line_or_a_picture_and_nothing_else(kind, data):
    content = bytearray(MANY[kind])
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    for read in (read_picture, lambda source: read_picture(source, still=True)):
        try:
            image = read(bytes(content))
        except BadRecord as error:
            assert str(error).startswith("bytes: ")
        else:
            assert image.mode == "RGB" and min(image.size) > 0
    try:
        assert read_frames(bytes(content), 8).shape[1:] == (8, 8, 3)
    except BadRecord as error:
        assert str(error).startswith("bytes: ")


def test_pillow_says_nothing_of_its_own(tmp_path, capfd):
    content = bytearray(tiff(16, b"\0\0\xff\xff"))
    at = content.index(struct.pack("<HHI", 277, 3, 1)) + 8
    content[at : at + 2] = b"\xff\0"  # 255 samples a pixel, which Pillow logs
    with pytest.raises(BadRecord, match=r"^bytes: "):
        read_picture(bytes(content))
    assert capfd.readouterr() == ("", "")


def test_errors_inside_the_with_are_of_the_one_kind():
    with pytest.raises(BadRecord, match="x: MemoryError") as caught, open_picture(MANY["PNG"], "x"):
        raise MemoryError
    assert caught.value.reason == "unreadable image"


@pytest.mark.parametrize("what", ["a pipe", "a folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path, what):
    path = tmp_path / "x.gif"
    {"a pipe": os.mkfifo, "a folder": Path.mkdir}[what](path)
    for read in (read_picture, read_clip):
        with pytest.raises(BadRecord, match=r"x\.gif: expected a file, got"):
            read(path)
