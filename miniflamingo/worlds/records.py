"""One record of a data set on disk: where it stands, how it is read and checked, what goes wrong.

A record is a `Line` of a JSONL file or a `Sample` of a tar shard; `disk` says what they look like.
Whatever is wrong with one is a BadRecord, and a Report counts it.
"""

import bz2
import gzip
import json
import lzma
import reprlib
import tarfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from miniflamingo.pictures import BadRecord, read_picture
from miniflamingo.prompt import SPECIAL_TOKENS

MAX_MESSAGES, MAX_LENGTH = 10, 300
MAX_LINE = 2**25  # bytes of a JSON object, 32 MiB
MAX_SAMPLE = 2**29  # bytes of a sample's files together, 512 MiB
MAX_HEADER = 2**20  # bytes of what a tar says about one file
MAX_END = 10752  # zeros at a tar's end: two blocks, and what fills it up to a multiple of 10240
# what macOS, Windows and network drives add; names with a dot in front are theirs, too
SYSTEM_NAMES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how a file in it, or in UTF-32, begins

# --- what went wrong ----------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the records: read = yielded + those skipped, by reason.

    `dropped` counts, by reason, unusable images of pages; the rest of such a page is used.
    `remarks` counts, by reason, what was used all the same: a "clip cut off" (the frames that can
    be read), "joined archives" (all of them), "zeros at the end" of an archive. The first messages
    name the file and the line, or the shard and the sample. With strict, whatever would be counted
    is a ValueError.
    """

    strict: bool = False
    read: int = 0
    yielded: int = 0
    skipped: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    remarks: Counter = field(default_factory=Counter)
    messages: list = field(default_factory=list)
    told: int = 0  # how many messages there would be

    def skip(self, where, error):
        """Count a record as skipped."""
        self._tell(where, error)
        self.skipped[error.reason] += 1

    def drop(self, where, error):
        """Count an image as left out of its page."""
        self._tell(where, error)
        self.dropped[error.reason] += 1

    def remark(self, where, error):
        """Count something that was used all the same."""
        self._tell(where, error)
        self.remarks[error.reason] += 1

    def _tell(self, where, error):
        if self.strict:
            raise ValueError(one_line(f"{where}: {error}")) from None
        self.told += 1
        if len(self.messages) < MAX_MESSAGES:
            text = str(error)
            text = text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} ..."
            self.messages.append(one_line(f"{where}: {text}"))

    def __str__(self):
        counts = f"{self.read} read, {self.yielded} yielded, {_total(self.skipped, 'skipped')}"
        counts += f"; {_total(self.dropped, 'images dropped')}" if self.dropped else ""
        counts += f"; {_total(self.remarks, 'remarks')}" if self.remarks else ""
        more = self.told - len(self.messages)
        return "\n  ".join([counts, *self.messages, *([f"... and {more} more"] * (more > 0))])


def one_line(text):
    """A text that can be printed: no end of a line, no lone surrogate (as in a name of a file)."""
    return "\\n".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()


def _total(counter, what):  # Counter(a=2, b=1), "skipped" -> "3 skipped: 2 a, 1 b"
    by_reason = ", ".join(f"{count} {reason}" for reason, count in counter.most_common())
    return f"{sum(counter.values())} {what}" + f": {by_reason}" * bool(counter)


_quoting = reprlib.Repr()
_quoting.maxstring = _quoting.maxother = 120
_quoting.maxlist = _quoting.maxdict = 20
_quoting.maxlevel = 3


def quote(value):
    """repr of what a stranger's file holds, however long or deep."""
    return _quoting.repr(value)


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
            raise BadRecord("missing key", f'expected a key "{kind}", got {quote([*fields])}')
        return fields[kind], find_inside(self.root, fields[kind], kind)


class Sample(NamedTuple):
    """The files of a shard that share a key."""

    where: str  # shard:key
    files: dict  # suffix -> bytes

    def text(self):
        """The caption in the .txt or the .json; BadRecord."""
        if "txt" in self.files:
            try:
                return self.files["txt"].decode("utf-8-sig")
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
    """In place of a record: a file or a part of it that could not be read."""

    where: str
    error: BadRecord


class Remark(NamedTuple):
    """Beside the records: what a file has that is odd, though it can be read."""

    where: str
    error: BadRecord


def is_of_the_system(name):
    """Whether a file's name, folders included, is one that an operating system added."""
    parts = [part.lower() for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part in SYSTEM_NAMES for part in parts)


def read_lines(path, root=None):
    """Yield the Lines of a JSONL file that are not blank; a Damaged for one above MAX_LINE."""
    root = path.parent if root is None else Path(root)
    with path.open("rb") as file:
        if file.read(2) in UTF_16:
            raise BadRecord("damaged file", "it is in UTF-16, expected UTF-8")
        file.seek(0)
        number = 0
        while line := file.readline(MAX_LINE):
            number, length = number + 1, len(line)
            while len(line) == MAX_LINE and line[-1:] != b"\n":
                line = file.readline(MAX_LINE)
                length += len(line)
            where = f"{path}:{number}"
            if length > MAX_LINE:
                says = f"a line of {length} bytes, more than {MAX_LINE}"
                yield Damaged(where, BadRecord("line too long", says))
            elif line.strip():
                yield Line(where, root, line)


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged header for the archive's end, and would lose the rest unnoticed."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            member = super().frombuf(buf, encoding, errors)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # zeros; the end of the file
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, before the archive's end") from None
        if member.size < 0 or (not member.isfile() and member.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header of {member.size} bytes: {member.name!r}")
        return member


OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


def _unpacked(file):
    """A binary file -> its content; compressed, it is checked to the end, and may be joined."""
    opener = OPENERS.get(file.read(2))
    file.seek(0)
    return opener(file) if opener else nullcontext(file)


def _archive(content):
    return tarfile.open(fileobj=content, mode="r|", tarinfo=_StrictHeader, ignore_zeros=True)


def read_samples(path):
    """Yield the Samples of a tar shard; where it is damaged, what came before and a Damaged.

    Archives that were joined are read to the last one's end, with a Remark. What an operating
    system added is passed over. A sample of more than MAX_SAMPLE bytes is a Damaged, and not read.
    """
    key, files, size, damaged = None, {}, 0, []
    try:
        for member, content in _members(path):
            if isinstance(member, Remark):
                yield member
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if (folder + slash + stem, suffix.lower() in files) != (key, False):
                if key is not None:
                    yield _sample(path, key, files, size)
                key, files, size = folder + slash + stem, {}, 0
            size += member.size
            if size > MAX_SAMPLE:
                files = dict.fromkeys(files)
            elif content:
                files[suffix.lower()] = content.read()
    except Exception as error:  # as Pillow: on damaged bytes almost anything
        damaged = [Damaged(str(path), BadRecord("damaged file", f"{error} (after {key!r})"))]
    if key is not None:
        yield _sample(path, key, files, size)
    yield from damaged


def _members(path):
    """Yield (TarInfo, its file; None for a link) of the archives in a file, and Remarks.

    Raises whatever tarfile does on damage, and for an end without its mark.
    """
    with path.open("rb") as file, _unpacked(file) as content, _archive(content) as shard:
        end = 0
        for member in shard:
            if member.offset > end:
                says = f"read on behind the end mark at byte {end}"
                yield Remark(str(path), BadRecord("joined archives", says)), None
            end = shard.offset
            if not member.isdir() and not is_of_the_system(member.name):
                yield member, shard.extractfile(member) if member.isfile() else None
        zeros = shard.offset - end
    if not zeros:
        raise tarfile.ReadError("no end mark: it is cut off")
    if zeros > MAX_END:
        says = f"{zeros} bytes of zeros: was all of it written?"
        yield Remark(str(path), BadRecord("zeros at the end", says)), None


def _sample(path, key, files, size):
    where = f"{path}:{key}"
    if size > MAX_SAMPLE:
        says = f"a sample of {size} bytes, more than {MAX_SAMPLE}"
        return Damaged(where, BadRecord("sample too large", says))
    return Sample(where, files)


def parse_object(content):
    """Bytes -> the JSON object that they hold, as a dict; BadRecord."""
    try:
        fields = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise BadRecord("invalid JSON", f"{error} in {content[:80]!r}") from None
    if not isinstance(fields, dict):
        raise BadRecord("invalid JSON", f"expected an object {{...}}, got {content[:80]!r}")
    return fields


def _without_doubles(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a key that comes twice in {quote([key for key, _ in pairs])}")
    return fields


def _caption(fields):
    for key in ("text", "caption"):
        if key in fields:
            return fields[key]
    raise BadRecord("missing key", f'expected a key "text" or "caption", got {quote([*fields])}')


# --- texts, paths, images: checked one by one ---------------------------------------------------


def check_text(text, tokenizer=None):
    """Return the text, stripped; BadRecord when it is empty, or what build_batch would refuse."""
    if not isinstance(text, str):
        raise BadRecord("bad field", f"a text must be a str, got {quote(text)}")
    special = [token for token in SPECIAL_TOKENS if token in text]
    if special:
        raise BadRecord("special token", f"a text must not hold {special}: {quote(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # tokenizers refuse it, each in a way of its own
        raise BadRecord("bad field", f"half a character: {error} in {quote(text)}") from None
    stripped = text.strip().strip("\ufeff").strip()  # a byte-order mark is no text
    if not stripped or (tokenizer is not None and not len(encode(text, tokenizer))):
        raise BadRecord("empty text", f"expected some text, got {quote(text)}")
    return stripped


def encode(text, tokenizer):
    """The tokenizer's ids; BadRecord for whatever it raises."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise BadRecord("unknown words", str(error)) from None
    except Exception as error:
        message = f"the tokenizer refuses {quote(text)}: {type(error).__name__}: {error}"
        raise BadRecord("refused text", message) from None


def find_inside(root, name, kind="image"):
    """The file `name` in the folder root or below it, as a Path; BadRecord.

    A name from a data set is not to be trusted: an absolute path, "..", and a symbolic link that
    leads out of the folder are refused.
    """
    if not isinstance(name, str):
        raise BadRecord("bad field", f"the {kind} must be a file name, got {quote(name)}")
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


def load_image(name, source):
    """A Path or BytesIO -> a PIL image in RGB, wholly read; BadRecord that quotes the name.

    Of an animation, the first frame.
    """
    try:
        return read_picture(source, name)
    except FileNotFoundError as error:
        raise BadRecord("missing image", f"{name}: {error.strerror}") from None
