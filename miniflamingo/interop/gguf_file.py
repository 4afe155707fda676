"""GGUF, llama.cpp's format: metadata, a tokenizer's tables and tensors, quantised in blocks.

    "GGUF" | version | tensors T | values K | K x (key, kind, value)
           | T x (name, dimensions, kind, offset) | data, aligned

Described in ggml's docs/gguf.md. The blocks are decoded by the package `gguf` (the extra
`interop`). The header is read here: its own reader takes seconds for a tokenizer's tables.
"""

import struct
from importlib import import_module
from math import prod
from pathlib import Path

import numpy as np

from miniflamingo.command import require, some
from miniflamingo.tensorfile import shown

SCALARS = dict(enumerate("BbHhIif?")) | dict(zip((10, 11, 12), "Qqd"))  # kind -> struct's letter
STRING, ARRAY = 8, 9
LONGEST = 10_000_000  # elements of an array, and bytes of a string: a tokenizer has 200,000
MOST = 1_000_000  # tensors, and values


class GGUFFile:
    """The header of a GGUF file: metadata {key: value}, shapes and dtypes {name: ...}.

    dtypes are the format's names ("F32", "Q4_1", ...). Only `array` reads the numbers. ValueError
    when the file is damaged, or holds tensors of a kind that the package `gguf` cannot decode;
    ModuleNotFoundError without it.
    """

    def __init__(self, path):
        require("gguf")
        self.path = path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is no file")
        try:
            header = _Header(np.memmap(path, np.uint8, "r"))
            self.metadata, tensors, start = header.read()
        except (ValueError, struct.error, RecursionError) as error:
            size = path.stat().st_size
            raise ValueError(f"{path} is no whole GGUF file ({size} bytes): {error}") from None
        self.shapes = {name: shape for name, (shape, *_) in tensors.items()}
        self._places = {name: (kind, start + at) for name, (_, kind, at) in tensors.items()}
        self.dtypes = self._checked()

    def _checked(self):
        """{name: kind}; ValueError unless each tensor lies in the file and can be decoded."""
        kinds, size = _kinds({kind for kind, _ in self._places.values()}), self.path.stat().st_size
        unknown = [
            f"{shown(name)} is {kinds.get(kind, (f'of type {kind}',))[0]}"
            for name, (kind, _) in self._places.items()
            if len(kinds.get(kind, ())) < 3
        ]
        if unknown:
            raise ValueError(f"{self.path}: unknown quantisations: {some(unknown)}")
        for name, (kind, where) in self._places.items():
            word, block, width = kinds[kind]
            shape = self.shapes[name]
            if shape and shape[-1] % block:
                raise ValueError(f"{self.path}: {shown(name)} {list(shape)} has rows that are no "
                                 f"multiple of {block}, as {word} needs")  # fmt: skip
            if where + prod(shape) // block * width > size:
                raise ValueError(f"{self.path} ({size} bytes) is cut off: it ends before, or in, "
                                 f"{shown(name)} {list(shape)}")  # fmt: skip
        self._widths = {word: (kind, block, width) for kind, (word, block, width) in kinds.items()}
        return {name: kinds[kind][0] for name, (kind, _) in self._places.items()}

    def array(self, name, mapped=False):
        """One tensor, decoded to float32; `mapped` asks for what TensorFile.array does."""
        kind, block, width = self._widths[self.dtypes[name]]
        shape, where = self.shapes[name], self._places[name][1]
        if self.dtypes[name] == "F32":
            data = np.memmap(self.path, "<f4", "r", where, shape).view(np.ndarray)
            return data if mapped else data.copy()
        rows = (*shape[:-1], shape[-1] // block * width)
        data = np.memmap(self.path, np.uint8, "r", where, rows).view(np.ndarray)
        gguf = import_module("gguf")
        with np.errstate(all="ignore"):  # what is not finite is refused later, by name
            decoded = gguf.dequantize(data, gguf.GGMLQuantizationType(kind))
        return decoded.astype(np.float32, copy=False).reshape(shape)


def _kinds(used):
    """{number of a kind: (name, numbers in a block, its bytes)}; (name,) for one not decoded."""
    gguf, found = import_module("gguf"), {}
    for kind in used:
        try:
            kind = gguf.GGMLQuantizationType(kind)
        except ValueError:
            continue
        block, width = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, width), np.uint8), kind)
            found[int(kind)] = (kind.name, block, width)
        except NotImplementedError:
            found[int(kind)] = (kind.name,)
    return found


class _Header:
    """Reads the header's values one after the other; struct.error or ValueError where it ends."""

    def __init__(self, data):
        self.data, self.at = memoryview(data), 0

    def read(self):
        """-> metadata, {name: (shape, kind, offset)}, where the data begins."""
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        if (version := self.take("I")) not in (2, 3):
            raise ValueError(f"version {version} of the format, expected 2 or 3")
        tensors, values = self.count(MOST, "tensors"), self.count(MOST, "values")
        metadata = _once((self.string(), self.value(self.take("I"))) for _ in range(values))
        found = _once((self.string(), self.tensor()) for _ in range(tensors))
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"general.alignment is {shown(align)}")
        return metadata, found, -(-self.at // align) * align

    def take(self, letters):
        values = struct.unpack_from(f"<{letters}", self.data, self.at)
        self.at += struct.calcsize(f"<{letters}")
        return values[0] if len(values) == 1 else values

    def count(self, most, what):
        number = self.take("Q")
        if number > most:
            raise ValueError(f"{number} {what}, more than {most}")
        return number

    def string(self):
        length = self.count(LONGEST, "bytes of a text")
        text = bytes(self.data[self.at : self.at + length])
        if len(text) < length:
            raise ValueError("it ends in a text")
        self.at += length
        return text.decode("utf-8", "replace")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            if kind not in SCALARS:
                raise ValueError(f"a value of kind {kind}")
            return self.take(SCALARS[kind])
        inner, length = self.take("I"), self.count(LONGEST, "elements")
        if inner == STRING:
            return [self.string() for _ in range(length)]
        if inner not in SCALARS:
            raise ValueError(f"an array of kind {inner}")
        return list(
            struct.unpack_from(f"<{length}{SCALARS[inner]}", self.data, self._pass(inner, length))
        )

    def _pass(self, kind, length):
        begin = self.at
        self.at += length * struct.calcsize(f"<{SCALARS[kind]}")
        return begin

    def tensor(self):
        axes = self.take("I")
        if axes > 4:
            raise ValueError(f"a tensor of {axes} axes")
        shape = tuple(self.take("Q") for _ in range(axes))[::-1]  # the format has rows last
        if prod(shape) >= 2**48:
            raise ValueError(f"a tensor of shape {list(shape)}")
        return shape, self.take("I"), self.take("Q")


def _once(pairs):
    """A dict of pairs; ValueError for a name that comes twice."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} stands twice")
        found[name] = value
    return found
