"""Pictures, clips, shards and JSONL files that are damaged, each through every way in."""

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from miniflamingo.prompt import build_batch
from miniflamingo.worlds.disk import read_pairs
from miniflamingo.worlds.grammar import TOKENIZER
from miniflamingo.worlds.interleaved import read_documents
from miniflamingo.worlds.video import read_clip, read_videos
from tests.fuzz.corpus import encoded
from tests.fuzz.damage import damage, damage_png, mutate, pick

SIZE, RECORDS = 24, 6


MOST_LINES = 11  # a heading and ten names, which a command joins to one line


def call(work, expected=None):
    """Do some work, and print what became of it: "accepted", or "refused" by a short ValueError.
    Whatever else it raises goes on, and so does what was not expected."""
    try:
        work()
    except ValueError as error:
        if str(error).count("\n") >= MOST_LINES or expected == "accepted":
            raise
        became = "refused"
    else:
        became = "accepted"
    assert expected in (None, became), f"{became}, where it should be {expected}"
    print(json.dumps({became: 1}))


# --- pictures and clips ---------------------------------------------------------------------------


def damaged(rng, files):
    """Copy one of some files here, damaged, or now and then whole -> its name, whether whole."""
    path, other = pick(rng, files), pick(rng, files)
    data, whole = path.read_bytes(), rng.random() < 0.125
    if not whole:
        sealed = path.suffix == ".png" and rng.random() < 0.6
        data = damage_png(rng, data) if sealed else damage(rng, data, other.read_bytes())
    Path(path.name).write_bytes(data)
    return path.name, whole and data == path.read_bytes()


def draw_picture(rng, corpus):
    """A picture, and by which way it goes in."""
    name, whole = damaged(rng, sorted(Path(corpus, "pictures").iterdir()))
    return {"file": name, "whole": whole, "way": pick(rng, ["path", "pillow", "list", "loader"])}


def act_picture(case):
    """Through build_batch or a loader."""
    path, way = Path(case["file"]), case["way"]
    if way == "pillow":
        try:
            opened = Image.open(path)
        except Exception:  # this is between the user and Pillow
            print('{"refused": 1}')
            return
    Path("x.jsonl").write_text(
        json.dumps({"image": case["file"], "caption": "a red circle"}), "utf-8"
    )

    def work():
        if way == "loader":
            return check_batch(list(read_pairs("x.jsonl", strict=True)))
        media = {"path": path, "list": [path, path]}.get(way) or opened
        return check_batch([[media, "a red circle"]])

    right = "refused" if path.name.startswith("no_") else "accepted"
    call(work, right if case["whole"] else None)


def check_batch(prompts):
    """Build a batch; AssertionError unless its pixels are what a model can read."""
    batch = build_batch(prompts, TOKENIZER, SIZE)
    shape = batch.pixels.shape
    assert shape == (1, 1, shape[2], SIZE, SIZE, 3) and batch.num_frames[0, 0] == shape[2] > 0
    assert np.isfinite(batch.pixels).all()
    assert batch.pixels.min() >= 0 and batch.pixels.max() <= 1


def draw_clip(rng, corpus):
    """A clip, and how many frames of it are wanted."""
    name, whole = damaged(rng, sorted(Path(corpus, "clips").iterdir()))
    return {"file": name, "whole": whole, "frames": pick(rng, [1, 3, 8, 30]),
            "way": pick(rng, ["read_clip", "loader"])}  # fmt: skip


def act_clip(case):
    """Through read_clip or a loader, then into a batch."""
    path, most = Path(case["file"]), case["frames"]

    def work():
        if case["way"] == "loader":
            Path("x.jsonl").write_text(
                json.dumps({"video": path.name, "caption": "a red circle"}), "utf-8"
            )
            prompts = list(read_videos("x.jsonl", fps=2, max_frames=most, strict=True))
        else:
            prompts = [[read_clip(path, most), "a red circle"]]
        frames = prompts[0][0]
        assert 1 <= len(frames) <= most
        assert not (case["whole"] and case["way"] == "read_clip") or len(frames) == most
        check_batch(prompts)

    call(work, "accepted" if case["whole"] else None)


def draw_prompt(rng, corpus):
    """A prompt of damaged files for `generate`."""
    words = ["generate", "--max-new-tokens", "3"]
    for _ in range(int(rng.integers(1, 4))):
        kind = pick(rng, ["--image", "--video", "--text"])
        folder = pick(rng, ["pictures", "clips"])
        file, _ = damaged(rng, sorted(Path(corpus, folder).iterdir()))
        words += [kind, "what color ?" if kind == "--text" else file]
    return {"module": "miniflamingo", "words": words}


# --- shards ---------------------------------------------------------------------------------------


def draw_shard(rng, corpus):
    """A shard damaged from some byte on, or two joined ones; packed or not."""
    (data, ends), form = shard(rng), pick(rng, ["damaged"] * 6 + ["gz", "joined", "whole"])
    first = int(rng.integers(len(data) + 1)) if form == "damaged" else len(data)
    if form == "damaged":
        data = damage(rng, data, shard(rng)[0], first)
    elif form == "joined":
        data += shard(rng)[0]
    elif form == "gz":
        data, first = damage(rng, gzip.compress(data, mtime=0)), 0
    Path("shard.tar").write_bytes(data)
    return {"form": form, "certain": [i for i, end in enumerate(ends) if end <= first]}


def shard(rng):
    """The bytes of a shard of RECORDS samples, "picture 0" and so on -> bytes, where each ends."""
    file, ends = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(RECORDS):
            kind = pick(rng, ["png", "jpeg"])
            image = encoded(Image.new("RGB", (16, 16), (40 * i, 0, 0)), kind.upper())
            text = f"picture {i}"
            if rng.random() < 0.5:
                about = ("txt", text.encode())
            else:
                about = ("json", json.dumps({"caption": text}).encode())
            for suffix, content in ((kind, image), about):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            ends.append(tar.offset)
    return file.getvalue(), ends


def act_shard(case):
    """Read it, and check that nothing got lost unnoticed."""
    prompts, report = read_all(read_pairs("shard.tar"))
    assert len(prompts) >= len(case["certain"]), f"lost before the damage: {report}"
    for i, (image, caption) in zip(case["certain"], prompts):  # they come first
        assert caption == f"picture {i}", f"picture {i} is lost: {report}"
        assert abs(np.asarray(image).mean(axis=(0, 1)) - [40 * i, 0, 0]).max() < 4, caption
    noticed, read = sum(report.skipped.values()), len(prompts)
    assert noticed or read >= RECORDS, f"lost unnoticed: {report}"
    assert case["form"] != "joined" or noticed or read == 2 * RECORDS, f"joined: {report}"
    print(json.dumps({"accepted": read, "skipped": noticed}))


def read_all(data):
    """All prompts of a Dataset, and its report; ValueError alone where nothing can be used."""
    prompts = []
    try:
        prompts.extend(data)
    except ValueError as error:
        assert data.report.yielded == 0, error
    report = data.report
    assert report.yielded == len(prompts) or not prompts
    assert report.read == report.yielded + sum(report.skipped.values()), report
    return prompts, report


# --- JSONL ----------------------------------------------------------------------------------------


class Fussy:
    """A tokenizer that raises what those of other projects raise."""

    def encode(self, text):
        """Bytes are tokens."""
        try:
            return list(text.encode())
        except UnicodeEncodeError:
            raise TypeError("TextEncodeInput must be Union[TextInputSequence, ...]") from None

    def decode(self, ids):
        """And back."""
        return bytes(ids).decode(errors="replace")


READERS = {"pairs": read_pairs, "mmc4": read_documents, "obelics": read_documents,
           "videos": read_videos}  # fmt: skip


def record(shape, i):
    """A whole record; its text begins with "record i"."""
    text = f"record {i} says ."
    infos = [{"image_name": "a.png", "matched_text_index": j} for j in (0, 1)]
    return {
        "pairs": {"image": "a.png", "caption": text},
        "videos": {"video": "clip.gif", "text": text},
        "mmc4": {"text_list": ["My pets .", text], "image_info": infos},
        "obelics": {"images": [None, "a.png", None], "texts": [text, None, "A cat ."]},
    }[shape]


def draw_lines(rng, corpus):
    """Records of one shape; some lines damaged, or the file from some byte on."""
    shape, lines, certain = pick(rng, list(READERS)), [], []
    shutil.copy(Path(corpus, "pictures/rgb.png"), "a.png")
    shutil.copy(Path(corpus, "clips/clip.gif"), "clip.gif")
    for i in range(RECORDS):
        whole, how = record(shape, i), rng.random()
        line = json.dumps(mutate(rng, whole) if 0.5 < how < 0.8 else whole).encode()
        line = damage(rng, line) if how > 0.8 else line
        lines.append(line)
        if line == json.dumps(whole).encode():
            certain.append(i)
    data = pick(rng, [b"\n", b"\r\n", b"\n\n"]).join(lines) + b"\n" * int(rng.integers(2))
    data = (b"\xef\xbb\xbf" if rng.random() < 0.2 else b"") + data
    Path("x.jsonl").write_bytes(data)
    count = sum(1 for line in data.split(b"\n") if line.strip())
    fussy = bool(rng.random() < 0.5)
    return {"shape": shape, "certain": certain, "lines": count, "fussy": fussy}


def act_lines(case):
    """Read them; every whole line must come through, and every other be counted."""
    reader = READERS[case["shape"]]
    prompts, report = read_all(reader("x.jsonl", tokenizer=Fussy() if case["fussy"] else None))
    assert report.read == case["lines"], f"{case['lines']} lines: {report}"
    texts = " ".join(part for prompt in prompts for part in prompt if isinstance(part, str))
    lost = [i for i in case["certain"] if f"record {i} says ." not in texts]
    assert not lost, f"whole lines {lost} are lost: {report}"
    print(json.dumps({"accepted": len(prompts), "skipped": sum(report.skipped.values())}))
