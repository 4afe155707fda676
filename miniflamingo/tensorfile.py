"""Files of named arrays (safetensors; never pickle), looked at before they are read."""

import json
import os
from math import prod
from pathlib import Path

import numpy as np
import safetensors

from miniflamingo.command import some

# what loads: the numbers as they lie in the file. bfloat16, which NumPy has not, is the upper half
# of a float32
DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
INTEGERS = {"I32": "<i4", "I64": "<i8"}  # of tables of positions, which other projects save too

LOOKS = {  # how files that get renamed or fetched by mistake begin
    b"PK\x03\x04": "a zip archive, such as torch.save and numpy.savez write",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"version https://git-lfs": "the pointer of Git LFS to a file: `git lfs pull` fetches it",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"<": "a web page",
    b"{": "a JSON file: name the weights, or their folder",
}


class TensorFile:
    """The header of a safetensors file: metadata {str: str}, shapes and dtypes {name: ...}.

    dtypes are the format's names ("F32", "BF16", ...). Only `arrays` and `array` read the numbers.
    ValueError when the file is damaged or none, or holds numbers of a kind that does not load;
    whole numbers load with integers=True.
    """

    def __init__(self, path, integers=False):
        self.path = path = Path(path)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no file")
        with open(path, "rb") as file:
            start, size = file.read(64), os.fstat(file.fileno()).st_size
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass  # only its checks: lengths, offsets, JSON, UTF-8
            header = self._header(int.from_bytes(start[:8], "little"))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            looks = (what for begin, what in LOOKS.items() if start.startswith(begin))
            looks = "" if start[8:9] == b"{" else next(looks, "")
            why = f"it looks like {looks}" if looks else shown(error, 200)
            raise ValueError(f"{path} is no whole safetensors file ({size} bytes): {why}") from None
        self.metadata = header.pop("__metadata__", {})
        self.dtypes = {name: about["dtype"] for name, about in header.items()}
        self.shapes = {name: tuple(about["shape"]) for name, about in header.items()}
        self._offsets = {name: about["data_offsets"][0] for name, about in header.items()}
        kept = DTYPES | INTEGERS if integers else DTYPES
        refused = [f"{shown(n)} is {d}" for n, d in self.dtypes.items() if d not in kept]
        if refused:
            kinds = ", ".join(DTYPES)
            raise ValueError(f"{path} holds numbers other than {kinds}: {some(refused)}")

    def _header(self, length):
        with open(self.path, "rb") as file:
            file.seek(8)
            text = file.read(length).decode()
        self._data = 8 + length
        return json.loads(text, object_pairs_hook=_without_twins)

    def size(self):
        """How many numbers the file holds."""
        return sum(map(prod, self.shapes.values()))

    def arrays(self):
        """{name: array}; float16 and bfloat16 become float32, which holds each of their numbers."""
        return {name: self.array(name) for name in self.dtypes}

    def array(self, name, mapped=False):
        """One tensor, as in `arrays`; mapped: a read-only view of the file where nothing needs to
        be converted, of which only the pages that are looked at are read."""
        kind, shape = self.dtypes[name], self.shapes[name]
        stored, where = (DTYPES | INTEGERS)[kind], self._data + self._offsets[name]
        if mapped and prod(shape) and kind not in ("F16", "BF16"):
            return np.memmap(self.path, stored, "r", where, shape).view(np.ndarray)
        array = np.fromfile(self.path, stored, count=prod(shape), offset=where)
        if kind == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32 if kind == "F16" else array.dtype, copy=False).reshape(shape)


def _without_twins(pairs):
    """A JSON object as a dict; ValueError for a name that stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(n for n in names if names.count(n) > 1))} stands twice")
    return found


def misfits(own, theirs):
    """What differs between the {name: shape} of a model and of a file, as a sorted list."""
    faults = [f"missing: {name} {list(own[name])}" for name in own if name not in theirs]
    faults += [f"unexpected: {shown(name)}" for name in theirs if name not in own]
    for name in own.keys() & theirs.keys():
        if tuple(own[name]) != tuple(theirs[name]):
            expected, got = list(own[name]), list(theirs[name])
            faults.append(f"mis-shaped: {name} expected {expected}, got {got}")
    return sorted(faults)


def shown(value, most=80):
    """A text of a file for an error message: on one line, and not longer than `most`."""
    text = str(value) if str(value).isprintable() else repr(str(value))[1:-1]
    return text if len(text) <= most else text[: most - 3] + "..."
