"""A checkpoint on disk, whoever wrote it: a mapping from names to arrays, read one by one.

    with_weights = open_checkpoint("idefics-9b")     # a folder, or one file
    with_weights.config                              # its config.json, {} where there is none
    with_weights.shapes["lm_head.weight"]            # known without reading a number
    with_weights["lm_head.weight"]                   # read now: float32, or float64

Weights are safetensors, whole or in shards with an index; GGUF; or, only where that is allowed,
pickles, which run the code that is in them unless torch's weights_only refuses it.
"""

import json
import warnings
from collections.abc import Mapping
from importlib import import_module
from math import prod
from pathlib import Path

import numpy as np

from miniflamingo.checks import from_json
from miniflamingo.command import require, some
from miniflamingo.interop.gguf_file import GGUFFile
from miniflamingo.interop.llamacpp import LlamaOfGGUF
from miniflamingo.tensorfile import TensorFile, shown

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INSIDE = ("state_dict", "model_state_dict", "model")  # where a pickle may keep its tensors
PARALLEL = "module."  # before all names of what torch's DistributedDataParallel has saved


class Checkpoint(Mapping):
    """{name: array} of some files; an array is read when it is asked for, and not kept.

    path; config, the config.json as a dict; shapes and dtypes {name: ...}; metadata of the files
    that have some; folder, where tokenizer.json and others lie (None for a file alone).
    float16 and bfloat16 become float32, and so does what a GGUF holds.
    """

    def __init__(self, path, files, config=None, folder=None):
        self.path, self.config, self.folder = Path(path), config or {}, folder
        self._files, self.metadata = {}, {}
        for file in files:
            if twice := self._files.keys() & file.shapes.keys():
                name = min(twice)
                both = f"{self._files[name].path.name} and {file.path.name}"
                raise ValueError(f"{path}: {shown(name)} stands twice: in {both}")
            self._files |= dict.fromkeys(file.shapes, file)
            self.metadata |= file.metadata
        if not self._files:
            raise ValueError(f"{path} holds no tensors")
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in self._files.items()}

    def __getitem__(self, name):
        return self._files[name].array(name)

    def __iter__(self):
        return iter(self._files)

    def __len__(self):
        return len(self._files)

    def mapped(self, name):
        """Like [name], but a read-only view of the file where nothing has to be converted."""
        return self._files[name].array(name, mapped=True)

    def size(self, names=None):
        """How many numbers these tensors hold; all of them by default."""
        return sum(prod(self.shapes[name]) for name in (self if names is None else names))


def open_checkpoint(path, allow_pickle=False):
    """A Checkpoint: a folder (config.json and weights) or a file (safetensors, GGUF, pickle).

    ValueError in one line that names the thing at fault: no or several kinds of weights, a file
    that is damaged, an index that names a file outside its folder, one that is missing or a tensor
    that is not where the index has it, a name that stands twice, a config.json that is none, or
    weights that are quantised in an unknown way; a pickle without allow_pickle.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}")
    if path.is_dir():
        return _open_folder(path, allow_pickle)
    file = _open_file(path, allow_pickle)
    beside = path.parent / "config.json"
    config = getattr(file, "config", None) or (read_config(beside) if beside.is_file() else {})
    return Checkpoint(path, [file], config, path.parent)


def _open_folder(folder, allow_pickle):
    config = folder / "config.json"
    config = read_config(config) if config.exists() else {}
    files = _weights(folder, allow_pickle)
    config = config or getattr(files[0], "config", {})
    return Checkpoint(folder, files, config, folder)


def _weights(folder, allow_pickle):
    """The open files of a folder's weights: by an index, else all of the best kind there is."""
    for pattern in ("*.safetensors.index.json", "*.bin.index.json"):
        if indices := sorted(folder.glob(pattern)):
            return _by_index(_only(indices, "index"), allow_pickle)
    if found := sorted(folder.glob("*.safetensors")):
        return [_open_file(path, allow_pickle) for path in found]
    if found := sorted(folder.glob("*.gguf")):
        return [_open_file(_only(found, "GGUF file"), allow_pickle)]
    found = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if not found:
        raise ValueError(f"{folder} holds no weights: no .safetensors, .gguf or {PICKLES[0]}")
    return [_open_file(path, allow_pickle) for path in found]


def _only(paths, what):
    if len(paths) > 1:
        names = some(path.name for path in paths)
        raise ValueError(f"{paths[0].parent} holds more than one {what}: {names}: name one")
    return paths[0]


def _by_index(path, allow_pickle):
    """The open shards of an index; ValueError unless each tensor lies where it says."""
    places = read_config(path).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{path}: weight_map must be an object of file names, got {shown(places)}")
    for name, shard in places.items():
        if not isinstance(shard, str):
            raise ValueError(f"{path}: weight_map must be an object of file names, but has "
                             f"{shown(repr(shard))} for {shown(name)}")  # fmt: skip
    for shard in sorted(set(places.values())):
        if shard != Path(shard).name or "\\" in shard or "\0" in shard or not shard.strip("."):
            raise ValueError(f"{path} names {shown(shard)}, which is not in its folder")
        if len(shard) > 255 or not (path.parent / shard).is_file():
            raise ValueError(f"{path} names {shown(shard)}, which is missing")
    shards = [_open_file(path.parent / s, allow_pickle) for s in sorted(set(places.values()))]
    there = {name: file.path.name for file in shards for name in file.shapes}
    lost = [f"{shown(name)} (in {shard})" for name, shard in places.items()
            if all(name not in f.shapes for f in shards if f.path.name == shard)]  # fmt: skip
    lost += [f"{shown(name)} (not in the index)" for name in there if name not in places]
    if lost:
        raise ValueError(f"{path} does not fit its shards: {some(lost)}")
    return shards


def _open_file(path, allow_pickle):
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return LlamaOfGGUF(GGUFFile(path))
    if path.suffix in PICKLES:
        return PickleFile(path, allow_pickle)
    return TensorFile(path, integers=True)


def read_config(path):
    """A JSON file's object; ValueError that names the file if it is none, or too large.

    Also for a quantization_config: numbers that were packed in some project's way.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 2**26:
        raise ValueError(f"{path} must be a JSON file of at most {2**26:,} bytes")
    config = _object(path) if path.stat().st_size > 10**6 else from_json(_text(path), path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got {shown(config)}")
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method", packed) if isinstance(packed, dict) else packed
        raise ValueError(f"{path}: quantization_config: weights packed by {shown(method)} are not "
                         "read")  # fmt: skip
    return config


def _text(path):
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {shown(error)}") from None


def _object(path):
    """A large JSON file, such as an index."""
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {shown(error, 200)}") from None


class PickleFile:
    """The tensors of a pickle that torch.save wrote, read whole; shapes, dtypes as TensorFile's.

    ValueError unless allow_pickle, for what weights_only refuses, and for what holds no tensors.
    """

    def __init__(self, path, allow_pickle):
        self.path, self.metadata = Path(path), {}
        if not allow_pickle:
            raise ValueError(f"{path} is a pickle, which can run code: --allow-pickle reads it all "
                             "the same, with torch's weights_only")  # fmt: skip
        require("torch")
        self._tensors = self._read(import_module("torch"))
        self.shapes = {name: tuple(x.shape) for name, x in self._tensors.items()}
        kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
                 "int64": "I64", "int32": "I32"}  # fmt: skip
        self.dtypes = {name: _kind(x) for name, x in self._tensors.items()}
        if odd := [f"{shown(n)} is {kind}" for n, kind in self.dtypes.items() if kind not in kinds]:
            raise ValueError(f"{path} holds numbers other than {', '.join(kinds)}: {some(odd)}")
        self.dtypes = {name: kinds[kind] for name, kind in self.dtypes.items()}

    def _read(self, torch):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles that are not torch's
                found = torch.load(self.path, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # whatever the bytes of no pickle bring about
            size = self.path.stat().st_size
            raise ValueError(f"{self.path} ({size} bytes) is not read: {_why(error)}") from None
        while inner := next((found[k] for k in INSIDE if isinstance(found, dict)
                             and isinstance(found.get(k), dict)), None):  # fmt: skip
            found = inner
        tensors = found if isinstance(found, dict) else {}
        tensors = {str(n): x for n, x in tensors.items() if isinstance(x, torch.Tensor)}
        if not tensors:
            raise ValueError(f"{self.path} holds no tensors by name")
        if all(name.startswith(PARALLEL) for name in tensors):
            return {name.removeprefix(PARALLEL): x for name, x in tensors.items()}
        return tensors

    def array(self, name, mapped=False):
        """One tensor; float16 and bfloat16 become float32."""
        array = self._tensors[name].detach()
        array = array.float() if self.dtypes[name] in ("F16", "BF16") else array
        return np.array(array.numpy(), copy=not mapped)


def _kind(tensor):
    """torch.float32 -> "float32", or what a tensor is that holds no plain array."""
    if tensor.is_meta:
        return "without numbers"
    layout = str(tensor.layout)[6:]
    return str(tensor.dtype)[6:] if layout == "strided" else layout


def _why(error):
    """What torch.load says, without its advice to load what it has refused all the same."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if said[0].startswith("Weights only load failed"):
        first = str(error).partition("WeightsUnpickler error: ")[2].strip().splitlines()[:1]
        return f"weights_only refuses it: {shown((first or said[1:2] or [''])[0], 200)}"
    return shown(f"{type(error).__name__}: {said[0]}", 200).removesuffix(": ")
