"""Image and caption pairs from disk: what is read, what is skipped and counted, how it goes on."""

import io
import itertools
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miniflamingo.prompt import WordTokenizer, build_batch
from miniflamingo.worlds import disk, records
from miniflamingo.worlds.disk import Stream, find_files, read_pairs, shuffle_records

TOKENIZER = WordTokenizer(["a", "cat", "dog"])


def picture(seed=0, size=(9, 7)):
    return np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)


def encoded(seed=0, kind="PNG", size=(9, 7)):
    file = io.BytesIO()
    Image.fromarray(picture(seed, size)).save(file, kind)
    return file.getvalue()


def write_lines(path, lines):
    """Dicts become JSON; bytes are written as they are."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_shard(path, files, mode="w"):
    """files: [(name, bytes)] in order."""
    with tarfile.open(path, mode) as shard:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def pair_files(n):
    names = ((f"{i:03}.png", encoded(i)) for i in range(n))
    texts = ((f"{i:03}.txt", b"a cat\n") for i in range(n))
    return [file for pair in zip(names, texts) for file in pair]


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    return tmp_path


def good(i=0):
    return {"image": f"{i}.png", "caption": "a cat"}


def pixels(prompt):
    return np.asarray(prompt[0])


# --- pairs --------------------------------------------------------------------------------------


def test_pairs_become_prompts_of_image_and_caption(folder):
    lines = [good(0), {"image": "1.png", "text": " a dog\n", "other": 1}]
    data = read_pairs(write_lines(folder / "pairs.jsonl", lines), tokenizer=TOKENIZER)
    prompts = list(data)
    assert [caption for _, caption in prompts] == ["a cat", "a dog"]
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(pixels(prompt), picture(i))
    batch = build_batch(prompts, TOKENIZER, image_size=4)
    words = [TOKENIZER.words[i] for i in batch.tokens[1]]
    assert words == ["<BOS>", "<image>", "a", "dog", "<EOC>"]
    assert batch.pixels.shape == (2, 1, 1, 4, 4, 3)
    assert str(data.report) == "2 read, 2 yielded, 0 skipped"


def test_blank_lines_and_a_byte_order_mark_are_no_records(folder):
    line = json.dumps(good()).encode()
    (folder / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\n\n  \r\n" + line)
    data = read_pairs(folder)
    assert len(list(data)) == data.report.read == 2


def test_file_names_start_from_root_when_given(folder):
    (folder / "lists").mkdir()
    path = write_lines(folder / "lists" / "pairs.jsonl", [good()])
    assert len(list(read_pairs(path, root=folder))) == 1
    with pytest.raises(ValueError, match="no usable record"):
        list(read_pairs(path))
    with pytest.raises(ValueError, match="root must be a folder"):
        read_pairs(path, root=folder / "nowhere")


def absurd_png():
    """A PNG of 60 bytes that says it is 100,000 pixels wide and high."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded()[33:60]


FILES = {
    "cut.png": encoded()[:80],
    "cut.jpg": encoded(kind="JPEG", size=(64, 64))[:-500],
    "text.png": b"this is no image",
    "empty.png": b"",
    "absurd.png": absurd_png(),
}

BAD_LINES = {
    "cut line": (b'{"image": "0.png", ', "invalid JSON", "column"),
    "a list": (b'["0.png", "a cat"]', "invalid JSON", "expected an object"),
    "not utf-8": (b'{"image": "0.png", "caption": "\xff"}', "invalid JSON", "decode byte 0xff"),
    "nested": (b"[" * 100_000, "invalid JSON", "recursion"),
    "no image": ({"caption": "a cat"}, "missing key", '"image", got ["caption"]'),
    "no caption": ({"image": "0.png"}, "missing key", '"text" or "caption", got ["image"]'),
    "a number": ({"image": 7, "caption": "a"}, "bad field", "must be a file name, got 7"),
    "captions": ({"image": "0.png", "text": ["a"]}, "bad field", "must be a str, got ['a']"),
    "null": ({"image": "0.png", "text": None}, "bad field", "must be a str, got None"),
    "blank": ({"image": "0.png", "text": " \n"}, "empty text", "got ' \\n'"),
    "a tag": ({"image": "0.png", "text": "a <image>"}, "special token", "['<image>']"),
    "unknown": ({"image": "0.png", "text": "a red cat ."}, "unknown words", "['red', '.']"),
    "no file": ({"image": "9.png", "text": "a"}, "missing image", "no file '9.png'"),
    "folder": ({"image": ".", "text": "a"}, "missing image", "no file '.'"),
    "address": ({"image": "http://x/a.png", "text": "a"}, "missing image", "download it first"),
    "null byte": ({"image": "a\0.png", "text": "a"}, "missing image", "null"),
    "too long": ({"image": "a" * 5000, "text": "a"}, "missing image", "too long"),
    "loop": ({"image": "loop.png", "text": "a"}, "missing image", "loop"),
    "up": ({"image": "../secret.png", "text": "a"}, "path outside the folder", "'../secret.png'"),
    "up and back": ({"image": "x/../0.png", "text": "a"}, "path outside the folder", "within"),
    "absolute": ({"image": "/etc/hostname", "text": "a"}, "path outside the folder", "within"),
    "link": ({"image": "link.png", "text": "a"}, "path outside the folder", "'link.png'"),
    "cut png": ({"image": "cut.png", "text": "a"}, "unreadable image", "cut.png: "),
    "cut jpg": ({"image": "cut.jpg", "text": "a"}, "unreadable image", "truncated"),
    "no png": ({"image": "text.png", "text": "a"}, "unreadable image", "no picture in a format"),
    "empty": ({"image": "empty.png", "text": "a"}, "unreadable image", "no picture in a format"),
    "absurd": ({"image": "absurd.png", "text": "a"}, "image too large", "10000000000 pixels"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_record_is_counted_and_named_or_raised_when_strict(name, folder):
    line, reason, says = BAD_LINES[name]
    for file, content in FILES.items():
        (folder / file).write_bytes(content)
    secret = folder.parent / f"{folder.name}-secret.png"
    secret.write_bytes(encoded())
    (folder / "link.png").symlink_to(secret)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    path = write_lines(folder / "pairs.jsonl", [good(0), line, good(1)])
    data = read_pairs(path, tokenizer=TOKENIZER)
    assert len(list(data)) == 2
    assert (data.report.read, data.report.yielded) == (3, 2)
    assert data.report.skipped == {reason: 1}
    (message,) = data.report.messages
    assert message.startswith(f"{path}:2: ")
    assert says.replace('"', "'") in message.replace('"', "'")
    with pytest.raises(ValueError, match=f"{path.name}:2: "):
        list(read_pairs(path, tokenizer=TOKENIZER, strict=True))


def test_an_absolute_path_into_the_folder_is_refused_too(folder):
    lines = [good(), {"image": str(folder / "0.png"), "text": "a"}]
    data = read_pairs(write_lines(folder / "pairs.jsonl", lines))
    assert len(list(data)) == 1
    assert data.report.skipped == {"path outside the folder": 1}


def test_an_image_between_pillows_two_limits_is_too_large(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns above 40, raises above 80
    (folder / "small.png").write_bytes(encoded(0, size=(6, 6)))
    lines = [good(), {"image": "small.png", "caption": "a cat"}]
    data = read_pairs(write_lines(folder / "pairs.jsonl", lines))
    assert len(list(data)) == 1
    assert data.report.skipped == {"image too large": 1}


def test_many_faults_are_counted_by_reason_and_the_first_are_quoted(folder):
    bad = [{"image": f"no{i}.png", "text": "a"} for i in range(30)] + [{"image": "0.png"}]
    data = read_pairs(write_lines(folder / "pairs.jsonl", [*bad, good()]))
    assert len(list(data)) == 1
    lines = str(data.report).split("\n  ")
    assert lines[0] == "32 read, 1 yielded, 31 skipped: 30 missing image, 1 missing key"
    assert len(lines) == 12
    assert "no0.png" in lines[1]
    assert lines[-1] == "... and 21 more"


def test_a_long_fault_is_quoted_short(folder):
    lines = [good(), {"image": "0.png", "text": "red " * 9999}]
    data = read_pairs(write_lines(folder / "pairs.jsonl", lines), tokenizer=TOKENIZER)
    assert len(list(data)) == 1
    (message,) = data.report.messages
    assert len(message) < 600
    assert "'red'" in message


def test_each_pass_counts_anew(folder):
    data = read_pairs(write_lines(folder / "pairs.jsonl", [good(), {}]))
    for _ in range(2):
        list(data)
        assert (data.report.read, data.report.yielded) == (2, 1)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n{}\n"])
def test_data_that_yields_nothing_is_an_error_with_the_report(content, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(content)
    says = f"no usable record .*pairs.jsonl.* {content.count(b'{}')} read, 0 yielded"
    for pull in (list, lambda data: next(Stream(data))):
        with pytest.raises(ValueError, match=says):
            pull(read_pairs(tmp_path))


# --- images -------------------------------------------------------------------------------------


def load(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.asarray(records.load_image("x", file))


def test_every_kind_of_pixel_becomes_rgb():
    grey = np.arange(63, dtype=np.uint8).reshape(7, 9)
    for mode in ("L", "LA", "RGBA", "P"):
        np.testing.assert_array_equal(
            load(Image.fromarray(grey).convert(mode)), np.stack([grey] * 3, axis=-1)
        )


def test_sixteen_bits_of_grey_keep_their_shades():
    shades = np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16)
    np.testing.assert_array_equal(load(Image.fromarray(shades))[0, :, 0], [0, 1, 128, 255])


def test_floating_point_pixels_are_refused():
    with pytest.raises(records.BadRecord, match=r"x: .*floating point") as caught:
        load(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    assert caught.value.reason == "unreadable image"


def test_a_photograph_is_turned_upright():
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation tag: the camera was turned by 90 degrees
    upright = load(Image.fromarray(picture()), exif=turned)
    np.testing.assert_array_equal(upright, np.rot90(picture(), -1))


WHOLE = {kind: encoded(3, kind, (24, 16)) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")}


@given(st.sampled_from(sorted(WHOLE)), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_a_bad_record_or_an_image_and_nothing_else(kind, data):
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        image = records.load_image("x", io.BytesIO(bytes(content)))
    except records.BadRecord as error:
        assert str(error).startswith("x: ")
    else:
        assert image.mode == "RGB"
        image.load()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_cut_in_half_is_never_used(kind):
    with pytest.raises(records.BadRecord, match="x: "):
        records.load_image("x", io.BytesIO(WHOLE[kind][: len(WHOLE[kind]) // 2]))


# --- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz")]
)
def test_a_shard_is_read_compressed_or_not(name, mode, tmp_path):
    data = read_pairs(write_shard(tmp_path / name, pair_files(3), mode), tokenizer=TOKENIZER)
    prompts = list(data)
    assert [caption for _, caption in prompts] == ["a cat"] * 3
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(pixels(prompt), picture(i))


def test_a_samples_files_share_the_name_up_to_the_first_dot(tmp_path):
    files = [
        ("a/1.PNG", encoded(1)), ("a/1.json", b'{"caption": "a cat"}'), ("a/1.cls", b"3"),
        ("b/1.jpg", encoded(2, "JPEG")), ("b/1.json", b"{}"), ("b/1.txt", b"a dog"),
    ]  # fmt: skip
    data = read_pairs(write_shard(tmp_path / "x.tar", files))
    assert [caption for _, caption in data] == ["a cat", "a dog"]


BAD_SAMPLES = {
    "no text": ([("1.png", encoded())], {"missing text": 1}, ".txt or .json"),
    "no image": ([("1.txt", b"a cat")], {"missing image": 1}, "files: .txt"),
    "bad txt": ([("1.png", encoded()), ("1.txt", b"\xff")], {"bad field": 1}, "not UTF-8"),
    "bad json": ([("1.png", encoded()), ("1.json", b"{")], {"invalid JSON": 1}, "in b'{'"),
    "bad png": ([("1.png", b"?"), ("1.txt", b"a cat")], {"unreadable image": 1}, "x.tar:1.png"),
    "no name": ([("README", b"a cat")], {"missing text": 1}, "x.tar:README"),
    "apart": (
        [("1.png", encoded()), ("2.png", encoded()), ("1.txt", b"a cat"), ("2.txt", b"a dog")],
        {"missing text": 2, "missing image": 2},
        "x.tar:2",
    ),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_counted_and_named(name, tmp_path):
    files, skipped, says = BAD_SAMPLES[name]
    data = read_pairs(write_shard(tmp_path / "x.tar", [*files, *pair_files(1)]))
    assert len(list(data)) == 1
    assert data.report.skipped == skipped
    assert says in str(data.report)


def test_a_key_that_comes_twice_is_two_samples(tmp_path):
    data = read_pairs(write_shard(tmp_path / "x.tar", pair_files(1) * 2))
    assert len(list(data)) == 2


def test_links_in_a_shard_are_not_followed(tmp_path):
    with tarfile.open(write_shard(tmp_path / "x.tar", pair_files(1)), "a") as shard:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        shard.addfile(link)
        text = tarfile.TarInfo("1.txt")
        text.size = 1
        shard.addfile(text, io.BytesIO(b"a"))
    data = read_pairs(tmp_path)
    assert len(list(data)) == 1
    assert data.report.skipped == {"missing image": 1}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("shard") / "x.tar", pair_files(4))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_shard_cut_anywhere_loses_its_rest_but_says_so(shard, tmp_path_factory, data):
    shard_bytes = shard.read_bytes()
    end = shard_bytes.rindex(b"a cat") + 512  # behind it stand only the zeros that end a shard
    cut = data.draw(st.integers(1, end))
    path = tmp_path_factory.mktemp("cut") / "x.tar"
    path.write_bytes(shard_bytes[:cut])
    reading = read_pairs([write_shard(path.with_name("whole.tar"), pair_files(1)), path])
    n = len(list(reading))
    ends = [shard_bytes.index(f"{i:03}.txt".encode()) + 512 + len("a cat\n") for i in range(4)]
    assert n == 1 + sum(end <= cut for end in ends)
    assert reading.report.skipped["damaged file"] == 1
    assert reading.report.read == n + sum(reading.report.skipped.values())


def test_a_damaged_header_does_not_pass_for_the_end(shard, tmp_path):
    content = bytearray(shard.read_bytes())
    content[content.index(b"002.png") + 2] ^= 1  # its checksum is wrong now
    (tmp_path / "x.tar").write_bytes(bytes(content))
    data = read_pairs(tmp_path)
    assert len(list(data)) == 2
    assert data.report.skipped == {"damaged file": 1}
    assert "bad checksum, before the archive's end (after '001')" in str(data.report)


@pytest.mark.parametrize("content", [b"", b"no tar" * 200, b"\x1f\x8b" + b"no gzip" * 200])
def test_what_is_no_shard_is_counted(content, tmp_path):
    (tmp_path / "0.tar").write_bytes(content)
    write_shard(tmp_path / "1.tar", pair_files(2))
    data = read_pairs(tmp_path)
    assert len(list(data)) == 2
    assert data.report.skipped == {"damaged file": 1}
    assert "0.tar: " in str(data.report)
    with pytest.raises(ValueError, match=r"0\.tar: "):
        list(read_pairs(tmp_path, strict=True))


def test_a_file_that_vanishes_is_counted(folder):
    write_lines(folder / "a.jsonl", [good()])
    gone = write_lines(folder / "b.jsonl", [good()])
    data = read_pairs(folder)
    gone.unlink()
    assert len(list(data)) == 1
    assert data.report.skipped == {"damaged file": 1}


def test_files_are_found_by_folder_glob_and_list(tmp_path):
    for name in ("b.tar", "a.tar", "c.jsonl", "d.txt"):
        (tmp_path / name).touch()

    def names(source):
        return [path.name for path in find_files(source, disk.LINES + disk.SHARDS)]

    assert names(tmp_path) == names(str(tmp_path)) == ["a.tar", "b.tar", "c.jsonl"]
    assert names(f"{tmp_path}/*.tar") == ["a.tar", "b.tar"]
    assert names([tmp_path / "c.jsonl", f"{tmp_path}/a*"]) == ["c.jsonl", "a.tar"]
    for source in (tmp_path / "no.jsonl", f"{tmp_path}/*.tgz", []):
        with pytest.raises(ValueError, match=r"expected files that end in \.jsonl or .* found no"):
            find_files(source, disk.LINES + disk.SHARDS)
    with pytest.raises(ValueError, match=r"expected files .* got \['.*d.txt'\]"):
        find_files(tmp_path / "d.txt", disk.LINES)


# --- what others' computers write ---------------------------------------------------------------

MAC = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60)
ADDED = ["._{}", "__MACOSX/._{}", "__MACOSX/x/{}", ".{}", "a/.thumbs/{}", "$RECYCLE.BIN/{}"]


@pytest.mark.parametrize("name", ADDED)
def test_what_an_operating_system_adds_to_a_shard_is_passed_over(name, tmp_path):
    files = [f for n, c in pair_files(3) for f in ((name.format(n), MAC), (f"./{n}", c))]
    files += [(".DS_Store", MAC), ("Thumbs.db", MAC), ("a/desktop.ini", MAC)]
    data = read_pairs(write_shard(tmp_path / "x.tar", files))
    assert len(list(data)) == 3
    assert str(data.report) == "3 read, 3 yielded, 0 skipped"


def test_what_an_operating_system_adds_to_a_folder_is_passed_over(folder):
    write_lines(folder / "A.JSONL", [good()])
    for name in ("._A.JSONL", ".x.jsonl", "._x.tar", "Thumbs.db", ".DS_Store"):
        (folder / name).write_bytes(MAC)
    for source in (folder, f"{folder}/*", f"{folder}/*.JSONL"):
        if source != f"{folder}/*":
            assert [path.name for path in find_files(source, disk.LINES)] == ["A.JSONL"]
    assert len(list(read_pairs(folder))) == 1


def test_texts_of_windows(folder, tmp_path):
    line = json.dumps(good()).encode()
    bom = b"\xef\xbb\xbf"
    (folder / "x.jsonl").write_bytes(bom + line + b"\r\n" + bom + line + b"\r\n")  # joined
    files = [("1.png", encoded()), ("1.txt", bom + b"a cat\r\n"), ("2.png", encoded())]
    files += [("2.json", bom + b'{"text": "a cat"}\r\n')]
    write_shard(folder / "x.tar", files)
    data = read_pairs(folder, tokenizer=TOKENIZER)
    assert [caption for _, caption in data] == ["a cat"] * 4


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_counted(encoding, folder):
    lines = "".join(json.dumps(good()) + "\n" for _ in range(3))
    (folder / "x.jsonl").write_bytes(lines.encode(encoding))
    data = read_pairs([write_lines(folder / "y.jsonl", [good()]), folder / "x.jsonl"])
    assert len(list(data)) == 1
    assert data.report.skipped.total() >= 1
    assert "x.jsonl" in data.report.messages[0]


JSON_OF_OTHERS = {
    "nan": (b'{"image": "0.png", "caption": "a", "score": NaN}', None),
    "huge": (b'{"image": "0.png", "caption": "a", "n": ' + b"9" * 5000 + b"}", "invalid JSON"),
    "twice": (b'{"image": "0.png", "image": "1.png", "caption": "a"}', "invalid JSON"),
    "nan text": (b'{"image": "0.png", "caption": NaN}', "bad field"),
    "deep": (b'{"image": ' + b"[" * 800 + b"]" * 800 + b', "caption": "a"}', "bad field"),
    "half": (b'{"image": "0.png", "caption": "a \\ud83d"}', "bad field"),
    "half name": (b'{"image": "\\udcff.png", "caption": "a"}', "missing image"),
    "zero": (b'{"image": "0.png", "caption": "a"}\0\0', "invalid JSON"),
}


@pytest.mark.parametrize("name", JSON_OF_OTHERS)
def test_json_of_others_is_used_or_counted_and_can_be_printed(name, folder):
    line, reason = JSON_OF_OTHERS[name]
    data = read_pairs(write_lines(folder / "x.jsonl", [good(), line]))
    assert len(list(data)) == 2 - bool(reason)
    assert data.report.skipped == ({reason: 1} if reason else {})
    assert all(len(m.encode().splitlines()) == 1 for m in data.report.messages)


@pytest.mark.parametrize("fault", [TypeError, KeyError, RuntimeError, IndexError, OverflowError])
def test_a_tokenizer_that_raises_anything_skips_a_record_not_the_stream(fault, folder):
    class Fails:
        def encode(self, text):
            if text == "b":
                raise fault("no b")
            return [1]

    lines = [good(), {"image": "1.png", "caption": "b"}, good()]
    data = read_pairs(write_lines(folder / "x.jsonl", lines), tokenizer=Fails())
    assert len(list(data)) == 2
    assert data.report.skipped == {"refused text": 1}
    assert fault.__name__ in data.report.messages[0]


def test_names_that_are_no_text_can_be_printed(tmp_path):
    data = read_pairs(write_shard(tmp_path / "x.tar", [("\udcff\n.png", b"?"), *pair_files(1)]))
    assert len(list(data)) == 1
    (message,) = data.report.messages
    assert message.encode() and "\n" not in message


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_joined_shards_are_read_to_the_last(mode, tmp_path):
    one = write_shard(tmp_path / "1", pair_files(2), mode).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + one + one)
    data = read_pairs(tmp_path / "x.tar")
    assert len(list(data)) == 6
    assert (data.report.skipped, data.report.remarks) == ({}, {"joined archives": 2})
    with pytest.raises(ValueError, match="behind the end mark at byte"):
        list(read_pairs(tmp_path / "x.tar", strict=True))


@pytest.mark.parametrize("rest", [b"garbage", b"garbage " * 99, b"\x1f\x8b\x08 " * 300])
def test_what_follows_the_end_mark_is_counted(rest, tmp_path):
    content = write_shard(tmp_path / "1", pair_files(2)).read_bytes()
    (tmp_path / "x.tar").write_bytes(content + rest)
    data = read_pairs(tmp_path / "x.tar")
    assert len(list(data)) == 2
    assert data.report.skipped == {"damaged file": 1}


def test_a_wrong_checksum_of_a_gzip_is_counted(tmp_path):
    content = bytearray(write_shard(tmp_path / "1", pair_files(2), "w:gz").read_bytes())
    content[-8] ^= 1
    (tmp_path / "x.tgz").write_bytes(bytes(content))
    data = read_pairs(tmp_path / "x.tgz")
    assert len(list(data)) == 2
    assert data.report.skipped == {"damaged file": 1}


def test_a_shard_whose_rest_was_never_written_is_counted(tmp_path):
    content = write_shard(tmp_path / "1", pair_files(30)).read_bytes()
    (tmp_path / "x.tar").write_bytes(content[: 1024 * 8] + bytes(len(content) - 1024 * 8))
    data = read_pairs(tmp_path / "x.tar")
    assert len(list(data)) == 4
    assert data.report.remarks == {"zeros at the end": 1}
    hole = content[: 1024 * 8] + bytes(2048) + content[1024 * 10 :]
    (tmp_path / "x.tar").write_bytes(hole)
    data = read_pairs(tmp_path / "x.tar")
    assert len(list(data)) == 29
    assert data.report.remarks == {"joined archives": 1}


def test_a_sample_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_SAMPLE", 2000)
    big = [("9.png", bytes(1500)), ("9.json", bytes(501))]
    data = read_pairs(write_shard(tmp_path / "x.tar", [*pair_files(1), *big, *pair_files(1)]))
    assert len(list(data)) == 2
    assert data.report.skipped == {"sample too large": 1}


def test_a_line_that_is_too_long_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 64)
    lines = [good(), good() | {"more": "x" * 50}, good(), good() | {"more": "x" * 500}]
    data = read_pairs(write_lines(folder / "x.jsonl", lines))
    assert len(list(data)) == 2
    assert data.report.skipped == {"line too long": 2}


def test_a_header_that_is_absurd_is_damage(tmp_path):
    shard = write_shard(tmp_path / "x.tar", pair_files(1))
    for size in (-512, 2**40):
        info = tarfile.TarInfo("long")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
        header = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "y.tar").write_bytes(header + bytes(2048))
        data = read_pairs([shard, tmp_path / "y.tar"])
        assert len(list(data)) == 1
        assert data.report.skipped == {"damaged file": 1}


def test_a_sample_of_links_alone_is_counted(tmp_path):
    with tarfile.open(write_shard(tmp_path / "x.tar", pair_files(1)), "a") as shard:
        for name in ("9.png", "9.txt"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, f"000{name[1:]}"
            shard.addfile(link)
    data = read_pairs(tmp_path)
    assert len(list(data)) == 1
    assert data.report.skipped == {"missing text": 1}


def test_pax_and_gnu_headers_are_read(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form, encoding="utf-8") as shard:
            for name, content in pair_files(2):
                info = tarfile.TarInfo(f"{'ä' * 120}/{name}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
        assert len(list(read_pairs(tmp_path))) == 2


# --- damage at random -----------------------------------------------------------------------------

KINDS = ("x.jsonl", "x.tar", "x.tar.gz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same 12 records in three kinds of file, beside their images; captions 0 to 11."""
    path = tmp_path_factory.mktemp("whole")
    files = []
    for i in range(12):
        (path / f"{i}.png").write_bytes(encoded(i))
        files += [(f"{i}.png", encoded(i)), (f"{i}.json", json.dumps({"text": str(i)}).encode())]
    write_lines(path / "x.jsonl", [{"image": f"{i}.png", "text": str(i)} for i in range(12)])
    write_shard(path / "x.tar", files)
    write_shard(path / "x.tar.gz", files, "w:gz")
    write_lines(path / "good.jsonl", [{"image": "0.png", "text": "good"}])
    return path


def damage(content, data):
    """Bytes changed, cut out, put in, zeroed or doubled, at random."""
    content, n = bytearray(content), len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at, length = data.draw(st.integers(0, n)), data.draw(st.integers(1, 1500))
        piece = data.draw(st.sampled_from(["flip", "cut", "random", "zeros", "double", "end"]))
        rng = np.random.default_rng(at)
        if piece == "flip" and at < len(content):
            content[at] ^= 1 << at % 8
        elif piece == "end":
            del content[at:]
        elif piece == "double":
            content[at:at] = content[at : at + length]
        elif piece != "flip":
            new = {"cut": b"", "zeros": bytes(length), "random": rng.bytes(length)}[piece]
            content[at : at + length] = new
    return bytes(content)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_after_random_damage_nothing_is_lost_unnoticed(whole, tmp_path_factory, kind, data):
    path = tmp_path_factory.mktemp("damaged") / kind
    path.write_bytes(damage((whole / kind).read_bytes(), data))
    reading = read_pairs([whole / "good.jsonl", path], root=whole)
    prompts = list(reading)
    report = reading.report
    assert report.read == report.yielded + report.skipped.total()
    assert report.yielded == len(prompts)
    intact = {p[1] for p in prompts if p[1].isdigit() and int(p[1]) < 12
              and (pixels(p) == picture(int(p[1]))).all()}  # fmt: skip
    assert all(str(path) in message for message in report.messages)
    if kind == "x.jsonl":  # a line that is gone cannot be missed, one that is there is used
        lines = path.read_bytes().split(b"\n")
        assert report.read == 1 + sum(bool(line.strip()) for line in lines)
        whole_lines = (whole / kind).read_bytes().split(b"\n")
        assert intact >= {str(i) for i in range(12) if whole_lines[i] in lines}
    else:
        changed = len(prompts) - 1 - len(intact)  # a text that is another now, or came twice
        said = report.skipped.total() + report.remarks.total()
        assert len(intact) == 12 or said or changed, str(report)


# --- streams ------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 99))
def test_a_shuffle_buffer_keeps_every_record(n, size, seed):
    order = list(shuffle_records(range(n), size, np.random.default_rng(seed)))
    assert sorted(order) == list(range(n))
    # nothing can come out before it went in: at most `size` places early
    assert all(record <= place + size for place, record in enumerate(order))
    if size == 0:
        assert order == list(range(n))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Ten samples in three shards, with captions 0 to 9; those of 3 and 8 are missing."""
    path = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate(((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))):
        files = []
        for i in numbers:
            files += [(f"{i}.png", encoded(size=(2, 2)))]
            files += [(f"{i}.txt", str(i).encode())] * (i not in (3, 8))
        write_shard(path / f"{shard}.tar", files)
    return path


def captions(stream, n):
    return [int(prompt[1]) for prompt in itertools.islice(stream, n)]


USABLE = [0, 1, 2, 4, 5, 6, 7, 9]


def test_a_stream_repeats_the_data_in_a_new_order_each_epoch(shards):
    plain = Stream(read_pairs(shards))
    assert captions(plain, 16) == USABLE * 2
    epochs = np.array(captions(Stream(read_pairs(shards), shuffle=100), 80)).reshape(10, 8)
    assert (np.sort(epochs) == USABLE).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 10
    again = captions(Stream(read_pairs(shards), shuffle=100), 80)
    other = captions(Stream(read_pairs(shards), seed=1, shuffle=100), 80)
    assert epochs.ravel().tolist() == again != other


def test_with_a_small_buffer_the_shards_order_is_random_too(shards):
    epochs = np.array(captions(Stream(read_pairs(shards), shuffle=1), 160)).reshape(20, 8)
    assert len({epoch[0] for epoch in epochs.tolist()} & {7, 9}) > 0


def test_a_record_waits_among_as_many_others_as_the_buffer_holds():
    orders = [list(shuffle_records(range(9), 3, np.random.default_rng(i))) for i in range(99)]
    assert {order[0] for order in orders} == {0, 1, 2, 3}


def test_a_stream_whose_data_is_gone_stops(folder):
    path = write_lines(folder / "pairs.jsonl", [good()])
    stream = Stream(read_pairs(path))
    next(stream)
    path.write_text("", "utf-8")
    with pytest.raises(ValueError, match=r"no usable record .* 1 read, 1 yielded"):
        next(stream)


@given(st.integers(0, 30), st.sampled_from([0, 1, 3, 100]), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_stream_goes_on_from_its_state(shards, before, shuffle, seed):
    whole = Stream(read_pairs(shards), seed, shuffle)
    captions(whole, before)
    state = json.loads(json.dumps(whole.state))  # as a checkpoint would keep it
    resumed = Stream(read_pairs(shards), seed, shuffle, state)
    assert captions(resumed, 12) == captions(whole, 12)
    assert resumed.state == whole.state


def test_going_on_decodes_nothing_that_came_before(shards, monkeypatch):
    decoded = []

    def counting(name, source):
        decoded.append(name)
        return records.load_image(name, source)

    monkeypatch.setattr(disk, "load_image", counting)
    stream = Stream(read_pairs(shards), state=(5, 7))
    assert captions(stream, 1) == [7]
    assert len(decoded) == stream.report.read == 1


def test_the_state_counts_records_bad_ones_included(shards):
    stream = Stream(read_pairs(shards))
    assert stream.state == (0, 0)
    captions(stream, 4)  # 0, 1, 2, then 3 is skipped, 4
    assert stream.state == (0, 5)
    captions(stream, 5)
    assert stream.state == (1, 1)
    assert (stream.report.read, stream.report.yielded) == (11, 9)
    assert stream.report.skipped == {"missing text": 2}


def test_a_state_that_does_not_fit_is_refused(shards):
    for state in ((0,), (0, -1), (0.5, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match="state must be"):
            Stream(read_pairs(shards), state=state)
    with pytest.raises(ValueError, match="after record 11: there are only 10"):
        next(Stream(read_pairs(shards), state=(0, 11)))
    with pytest.raises(ValueError, match="shuffle must be"):
        Stream(read_pairs(shards), shuffle=-1)
    assert captions(Stream(read_pairs(shards), state=(0, 10)), 1) == [0]


def test_a_strict_stream_stops_at_the_first_bad_record(shards):
    stream = Stream(read_pairs(shards, strict=True))
    assert captions(stream, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"0.tar:3: expected a .txt or .json .* .png"):
        next(stream)
