"""One record of a data set on disk: where it stands, how it is read and checked, what goes wrong.

A record is a `Line` of a JSONL file or a `Sample` of a tar shard; `disk` says what they look like.
Whatever is wrong with one is a BadRecord, and a Report counts it.
"""

import json
import tarfile
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from miniflamingo.prompt import SPECIAL_TOKENS

MAX_MESSAGES, MAX_LENGTH = 10, 300

# --- what went wrong ----------------------------------------------------------------------------


class BadRecord(ValueError):
    """A record that cannot be used: `reason` is what a Report counts it under."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


@dataclass
class Report:
    """What became of the records: read = yielded + those skipped, by reason.

    `dropped` counts, by reason, unusable images of pages; the rest of such a page is used. The
    first messages name the file and the line, or the shard and the sample. With strict, whatever
    would be counted is a ValueError.
    """

    strict: bool = False
    read: int = 0
    yielded: int = 0
    skipped: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    messages: list = field(default_factory=list)

    def skip(self, where, error):
        """Count a record as skipped."""
        self._count(self.skipped, where, error)

    def drop(self, where, error):
        """Count an image as left out of its page."""
        self._count(self.dropped, where, error)

    def _count(self, counter, where, error):
        if self.strict:
            raise ValueError(f"{where}: {error}") from error
        counter[error.reason] += 1
        if len(self.messages) < MAX_MESSAGES:
            text = str(error)
            text = text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} ..."
            self.messages.append(f"{where}: {text}")

    def __str__(self):
        counts = f"{self.read} read, {self.yielded} yielded, {_total(self.skipped, 'skipped')}"
        counts += f"; {_total(self.dropped, 'images dropped')}" if self.dropped else ""
        more = sum(self.skipped.values()) + sum(self.dropped.values()) - len(self.messages)
        return "\n  ".join([counts, *self.messages, *([f"... and {more} more"] * (more > 0))])


def _total(counter, what):  # Counter(a=2, b=1), "skipped" -> "3 skipped: 2 a, 1 b"
    by_reason = ", ".join(f"{count} {reason}" for reason, count in counter.most_common())
    return f"{sum(counter.values())} {what}" + f": {by_reason}" * bool(counter)


# --- records ------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a JSONL file, not parsed yet."""

    where: str  # file:line
    root: Path
    content: bytes

    def fields(self):
        """The line's JSON object as a dict; BadRecord."""
        return parse_object(self.content)

    def text(self):
        """The caption, whatever its type; BadRecord."""
        return _caption(self.fields())

    def media(self, kind, suffixes):
        """kind "image" or "video" -> (name, Path); BadRecord unless it is a file within root."""
        fields = self.fields()
        if kind not in fields:
            raise BadRecord("missing key", f'expected a key "{kind}", got {list(fields)}')
        return fields[kind], find_inside(self.root, fields[kind], kind)


class Sample(NamedTuple):
    """The files of a shard that share a key."""

    where: str  # shard:key
    files: dict  # suffix -> bytes

    def text(self):
        """The caption in the .txt or the .json; BadRecord."""
        if "txt" in self.files:
            try:
                return self.files["txt"].decode()
            except UnicodeDecodeError as error:
                raise BadRecord("bad field", f"the .txt is not UTF-8: {error}") from None
        return _caption(parse_object(self._find(("json",), "text", "txt or .json")))

    def media(self, kind, suffixes):
        """kind "image" or "video" -> (name, BytesIO) of the first suffix there is; BadRecord."""
        content = self._find(suffixes, kind, " or .".join(suffixes))
        suffix = next(suffix for suffix in suffixes if suffix in self.files)
        return f"{self.where}.{suffix}", BytesIO(content)

    def _find(self, suffixes, kind, wanted):
        for suffix in suffixes:
            if suffix in self.files:
                return self.files[suffix]
        got = ", ".join(f".{suffix}" for suffix in self.files)
        raise BadRecord(f"missing {kind}", f"expected a .{wanted} among the sample's files: {got}")


class Damaged(NamedTuple):
    """A file that could not be read, or not to its end."""

    where: str
    error: BadRecord


def read_lines(path, root=None):
    """Yield the Lines of a JSONL file that are not blank. File names start from root."""
    root = path.parent if root is None else Path(root)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Line(f"{path}:{number}", root, line)


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged header for the archive's end, and would lose the rest unnoticed."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # the zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, before the archive's end") from None


def read_samples(path):
    """Yield the Samples of a tar shard; where it is damaged, what came before and a Damaged."""
    key, files, damaged = None, {}, []
    try:
        with tarfile.open(path, "r|*", tarinfo=_StrictHeader) as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if (folder + slash + stem, suffix.lower() in files) != (key, False):
                    if files:
                        yield Sample(f"{path}:{key}", files)
                    key, files = folder + slash + stem, {}
                files[suffix.lower()] = shard.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        damaged = [Damaged(str(path), BadRecord("damaged file", f"{error} (after {key!r})"))]
    if files:
        yield Sample(f"{path}:{key}", files)
    yield from damaged


def parse_object(content):
    """Bytes -> the JSON object that they hold, as a dict; BadRecord."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise BadRecord("invalid JSON", f"{error} in {content[:80]!r}") from None
    if not isinstance(fields, dict):
        raise BadRecord("invalid JSON", f"expected an object {{...}}, got {content[:80]!r}")
    return fields


def _caption(fields):
    for key in ("text", "caption"):
        if key in fields:
            return fields[key]
    raise BadRecord("missing key", f'expected a key "text" or "caption", got {list(fields)}')


# --- texts, paths, images: checked one by one ---------------------------------------------------


def check_text(text, tokenizer=None):
    """Return the text, stripped; BadRecord when it is empty, or what build_batch would refuse."""
    if not isinstance(text, str):
        raise BadRecord("bad field", f"a text must be a str, got {text!r}")
    special = [token for token in SPECIAL_TOKENS if token in text]
    if special:
        raise BadRecord("special token", f"a text must not hold {special}: {text!r}")
    try:
        if not text.strip() or (tokenizer is not None and not len(tokenizer.encode(text))):
            raise BadRecord("empty text", f"expected some text, got {text!r}")
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord("unknown words", str(error)) from None
    return text.strip()


def find_inside(root, name, kind="image"):
    """The file `name` in the folder root or below it, as a Path; BadRecord.

    A name from a data set is not to be trusted: an absolute path, "..", and a symbolic link that
    leads out of the folder are refused.
    """
    if not isinstance(name, str):
        raise BadRecord("bad field", f"the {kind} must be a file name, got {name!r}")
    if "://" in name:
        raise BadRecord(f"missing {kind}", f"{name!r} is an address, not a file: download it first")
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve()) and ".." not in path.parts
        found = inside and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        fault = getattr(error, "strerror", None) or str(error)
        raise BadRecord(f"missing {kind}", f"{fault}: {name!r}") from None
    if Path(name).is_absolute() or not inside:
        raise BadRecord("path outside the folder", f"{name!r} does not lie within {root}")
    if not found:
        raise BadRecord(f"missing {kind}", f"there is no file {name!r} in {root}")
    return path


@contextmanager
def open_image(name, source):
    """Pillow's image, to be used in a `with`; whatever goes wrong inside is a BadRecord."""
    too_large = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                yield image
    except BadRecord:
        raise
    except too_large as error:
        raise BadRecord("image too large", f"{name}: {error}") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        message = f"{name}: {type(error).__name__}: {error}"
        raise BadRecord("unreadable image", message) from None


def to_rgb(image):
    """A PIL image -> RGB, upright, 8 bits a channel, its pixels loaded; ValueError for floats."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
        grey = np.clip(np.asarray(image) >> 8, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def load_image(name, source):
    """A Path or BytesIO -> a PIL image in RGB, wholly read; BadRecord that quotes the name."""
    with open_image(name, source) as image:
        return to_rgb(image)
