"""Triton's language in NumPy, for computers on which Triton does not exist (macOS, Windows).

`install()` puts it in Triton's place, before `miniflamingo.kernels` loads a kernel. It runs kernels
as Triton's own interpreter does: one program after the other, on CPU tensors of torch, with real
addresses, so that `triton_cpu.Watch` sees the same. It knows what the kernels of this repository
and the exercises of the course use, and no more: no compiler, no bfloat16, no GPU.
"""

import ctypes
import functools
import importlib.util
import inspect
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np

VERSION = "0 (imitation)"
NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
           "float16", "float32", "float64")  # fmt: skip


def missing():
    """Whether there is no Triton here."""
    return importlib.util.find_spec("triton") is None


# --- types and tiles ----------------------------------------------------------------------------


class constexpr:
    """A number that is known before the kernel runs. Here it only has to behave like a number."""

    def __init__(self, value):
        self.value = getattr(value, "value", value)

    def __bool__(self):
        return bool(self.value)

    def __index__(self):
        return int(self.value)

    def __float__(self):
        return float(self.value)

    def __mul__(self, other):
        return self.value * _plain(other)

    __rmul__ = __mul__

    def __eq__(self, other):
        return self.value == _plain(other)

    def __hash__(self):
        return hash(self.value)


class dtype:
    """A type of numbers; of addresses, where it has an element_ty."""

    def __init__(self, name, numpy, element_ty=None):
        self.name, self.numpy, self.element_ty = name, np.dtype(numpy), element_ty
        self.kind = "address" if element_ty else self.numpy.kind

    def __repr__(self):
        return self.name


TYPES = {name: dtype(name, name) for name in NUMBERS}
TYPES["bfloat16"] = dtype("bfloat16", "uint16")  # its bits: nothing computes with it here


def _type_of(array):
    return TYPES[array.dtype.name]


def _plain(x):
    return x.value if isinstance(x, constexpr) else x


class tensor:
    """A tile, or one number: `data` is its NumPy array, `dtype` its type."""

    def __init__(self, data, type=None):
        self.data = np.asarray(data)
        self.dtype = type or _type_of(self.data)

    shape = property(lambda self: list(self.data.shape))
    T = property(lambda self: tensor(self.data.T, self.dtype))

    def __getitem__(self, places):
        return tensor(self.data[places], self.dtype)

    def __bool__(self):
        return bool(self.data)

    def __index__(self):
        return int(self.data)

    def to(self, dtype, bitcast=False):
        """In another type; with bitcast the same bits."""
        dtype = _plain(dtype)
        change = self.data.view if bitcast else self.data.astype
        return tensor(change(dtype.numpy), dtype)

    def __neg__(self):
        return tensor(-self.data)

    def __invert__(self):
        return tensor(~self.data)

    def __hash__(self):
        return id(self)


def _pair(a, b):
    """Two operands as arrays of one type, as Triton promotes: integers give way to floats."""
    a, b = (x.data if isinstance(x, tensor) else _plain(x) for x in (a, b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and "f" in (kinds := [
        a.dtype.kind, b.dtype.kind]) and kinds[0] != kinds[1]:  # fmt: skip
        a, b = (x if x.dtype.kind == "f" else x.astype((a, b)[kinds.index("f")].dtype)
                for x in (a, b))  # fmt: skip
    for x, y in ((a, b), (b, a)):  # a bare float beside whole numbers is a float32
        if isinstance(x, np.ndarray) and x.dtype.kind != "f" and isinstance(y, float):
            return tuple(np.asarray(z, np.float32) for z in (a, b))
    return a, b


def _divide_whole(a, b):  # as in C: towards zero
    a, b = np.asarray(a), np.asarray(b)
    return np.sign(a) * np.sign(b) * (abs(a) // abs(b))


def _remainder(a, b):
    return np.asarray(a) - np.asarray(b) * _divide_whole(a, b)


def _divide(a, b):
    whole = not any(np.asarray(x).dtype.kind == "f" for x in (a, b))
    return np.divide(a, b, dtype=np.float32) if whole else a / b


OPERATORS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": _divide,
    "floordiv": _divide_whole, "mod": _remainder, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "lshift": np.left_shift, "rshift": np.right_shift, "pow": np.power,
}  # fmt: skip


def _operator(name, function, turned):
    def operate(self, other):
        for x, offset in ((self, other), (other, self)):  # an address moves by whole elements
            if isinstance(x, tensor) and x.dtype.kind == "address":
                steps = offset.data if isinstance(offset, tensor) else _plain(offset)
                steps = np.asarray(steps).astype(np.int64) * x.dtype.element_ty.numpy.itemsize
                return tensor(x.data + (steps if name == "add" else -steps), x.dtype)
        a, b = _pair(*((other, self) if turned else (self, other)))
        return tensor(function(a, b))

    return operate


for _name, _function in OPERATORS.items():
    setattr(tensor, f"__{_name}__", _operator(_name, _function, False))
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(tensor, f"__r{_name}__", _operator(_name, _function, True))


# --- memory -------------------------------------------------------------------------------------


def _memory(addresses, element):
    """(the memory from the lowest to the highest address, as an array; their places in it)."""
    low, size = int(addresses.min()), element.itemsize
    span = (int(addresses.max()) - low) // size + 1
    raw = (ctypes.c_char * (span * size)).from_address(low)
    return np.frombuffer(raw, element), (addresses - low) // size


class Builder:
    """Where loads and stores come together, as in Triton's interpreter; `Watch` stands before."""

    grid_idx, grid_dim = (0, 0, 0), (1, 1, 1)

    def create_masked_load(self, pointers, mask, other, *_):
        """What lies at the addresses; where the mask is false `other`, or 0."""
        element = pointers.dtype.element_ty
        at, mask = np.broadcast_arrays(pointers.data, mask.data)
        out = np.zeros(at.shape, element.numpy)
        if other is not None:
            out[...] = other.data
        if mask.any():
            memory, places = _memory(at[mask], element.numpy)
            out[mask] = memory[places]
        return tensor(out, element)

    def create_masked_store(self, pointers, value, mask, *_):
        """Write the values where the mask is true."""
        element = pointers.dtype.element_ty
        at, mask, value = np.broadcast_arrays(pointers.data, mask.data, value.data)
        if mask.any():
            memory, places = _memory(at[mask], element.numpy)
            memory[places] = value[mask].astype(element.numpy)


interpreter_builder = Builder()


def _tile(x, like=None):
    return x if isinstance(x, tensor) else tensor(np.asarray(_plain(x), like))


def _masked(pointers, mask):
    if mask is None:
        return pointers, tensor(np.ones(pointers.data.shape, bool))
    return pointers, _tile(mask)


def load(pointer, mask=None, other=None, **_):
    """The elements at the addresses."""
    if not isinstance(pointer, tensor) or pointer.dtype.kind != "address":
        raise ValueError(f"tl.load wants addresses, got {type(pointer).__name__}")
    pointer, mask = _masked(pointer, mask)
    other = None if other is None else _tile(other, pointer.dtype.element_ty.numpy)
    return interpreter_builder.create_masked_load(pointer, mask, other, None, None, False)


def store(pointer, value, mask=None, **_):
    """Write a tile at the addresses."""
    if not isinstance(pointer, tensor) or pointer.dtype.kind != "address":
        raise ValueError(f"tl.store wants addresses, got {type(pointer).__name__}")
    pointer, mask = _masked(pointer, mask)
    interpreter_builder.create_masked_store(pointer, _tile(value), mask, None, None)


# --- functions of tl ----------------------------------------------------------------------------


def program_id(axis):
    """This program's number."""
    return tensor(np.int32(interpreter_builder.grid_idx[_plain(axis)]))


def num_programs(axis):
    """How many programs there are."""
    return tensor(np.int32(interpreter_builder.grid_dim[_plain(axis)]))


def arange(start, end):
    """start, start + 1, ..., end - 1; so many as a power of two."""
    start, end = int(start), int(end)
    if (end - start) & (end - start - 1) or end <= start:
        raise ValueError("arange's range must be a power of 2")
    return tensor(np.arange(start, end, dtype=np.int32))


def full(shape, value, dtype):
    """A tile of one number."""
    shape = [int(n) for n in shape]
    return tensor(np.full(shape, _tile(value).data, _plain(dtype).numpy), _plain(dtype))


def zeros(shape, dtype):
    """A tile of zeros."""
    return full(shape, 0, dtype)


def zeros_like(x):
    """A tile of zeros like another."""
    return tensor(np.zeros_like(x.data), x.dtype)


def dot(a, b, acc=None, **_):
    """The matrix product of two tiles, added up in float32, or in float64."""
    if a.data.shape[-1] != b.data.shape[-2]:
        raise ValueError(f"tl.dot: shapes {a.shape} and {b.shape} do not fit")
    precise = np.float64 if a.data.dtype == np.float64 else np.float32
    product = tensor(a.data.astype(precise) @ b.data.astype(precise))
    return product if acc is None else acc + product


def where(condition, x, y):
    """x where the condition is true, else y."""
    x, y = _pair(x, y)
    kinds = [z.dtype for z in (x, y) if isinstance(z, np.ndarray)]
    out = np.where(_tile(condition).data, x, y)
    return tensor(out.astype(np.result_type(*kinds)) if kinds else out.astype(np.float32))


def _reduction(function):
    def reduce(x, axis=None, keep_dims=False):
        data = x.data.astype(np.int32) if x.data.dtype == bool else x.data
        axis = None if axis is None else _plain(axis)
        return tensor(function(data, axis=axis, keepdims=keep_dims).astype(data.dtype))

    return reduce


def _elementwise(function):
    return lambda *xs: tensor(function(*(_pair(*xs) if len(xs) == 2 else [_tile(*xs).data])))


def expand_dims(x, axis):
    """A new axis of length 1."""
    return tensor(np.expand_dims(x.data, axis), x.dtype)


def broadcast_to(x, *shape):
    """Repeated to a shape."""
    shape = shape[0] if isinstance(shape[0], list | tuple) else shape
    return tensor(np.broadcast_to(_tile(x).data, [int(n) for n in shape]), _tile(x).dtype)


def trans(x, *axes):
    """The tile with its axes turned."""
    return tensor(np.transpose(x.data, axes or None), x.dtype)


def cumsum(x, axis=0):
    """Sums of what came so far."""
    data = x.data.astype(np.int32) if x.data.dtype == bool else x.data
    return tensor(np.cumsum(data, axis=axis, dtype=data.dtype))


def cdiv(x, y):
    """x / y, rounded up."""
    return (x + y - 1) // y


def next_power_of_2(n):
    """The smallest power of two that is not below n."""
    return 1 << max(0, int(n) - 1).bit_length()


def _range(*limits, **_):
    return range(*map(int, limits))


LANGUAGE = {
    f.__name__: f
    for f in (program_id, num_programs, arange, load, store, full, zeros, zeros_like, dot, where,
              expand_dims, broadcast_to, trans, cumsum, cdiv, constexpr, tensor, dtype)
} | {
    "max": _reduction(np.max), "min": _reduction(np.min), "sum": _reduction(np.sum),
    "maximum": _elementwise(np.maximum), "minimum": _elementwise(np.minimum),
    "range": _range, "static_range": _range, "int1": TYPES["bool"],
}  # fmt: skip
LANGUAGE |= {n: _elementwise(getattr(np, n)) for n in ("exp", "exp2", "log", "log2", "sqrt", "abs")}
LANGUAGE |= {name: kind for name, kind in TYPES.items() if name != "bool"}


# --- launching ----------------------------------------------------------------------------------


class InterpreterError(Exception):
    """What a kernel stopped with."""


class KernelInterface:
    """What is launched with its grid in square brackets."""

    def __getitem__(self, grid):
        return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)


class JITFunction(KernelInterface):
    """A kernel: launched with a grid, or called by another kernel."""

    def __init__(self, function):
        self.fn, self.signature = function, inspect.signature(function)
        self.arg_names = list(self.signature.parameters)
        functools.update_wrapper(self, function)

    def __call__(self, *args, **options):
        return self.fn(*args, **options)

    def run(self, *args, grid, warmup=False, **options):
        """Run the programs one after the other."""
        own = {name: x for name, x in options.items() if name in self.arg_names}
        bound = self.signature.bind(*args, **own)
        bound.apply_defaults()
        values = {n: self._argument(n, x) for n, x in bound.arguments.items()}
        grid = grid(bound.arguments) if callable(grid) else grid
        grid = tuple(map(int, grid)) + (1,) * (3 - len(grid))
        interpreter_builder.grid_dim = grid
        try:
            for turned in np.ndindex(grid[::-1]):  # the first axis runs fastest
                interpreter_builder.grid_idx = turned[::-1]
                with np.errstate(all="ignore"):
                    self.fn(**values)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    def _argument(self, name, x):
        """An argument as kernels see it: an address for a tensor of torch, a number as a tile."""
        if hasattr(x, "data_ptr"):
            kind = TYPES[str(x.dtype).removeprefix("torch.")]
            return tensor(np.int64(x.data_ptr()), dtype(f"pointer<{kind}>", np.int64, kind))
        annotation = str(self.signature.parameters[name].annotation)
        if "constexpr" in annotation or isinstance(x, bool | str) or x is None:
            return x
        if isinstance(x, int):
            return tensor(np.int32(x) if abs(x) < 2**31 else np.int64(x))
        return tensor(np.float32(x)) if isinstance(x, float) else x


def jit(function=None, **_):
    """The decorator of a kernel."""
    return JITFunction(function) if function else JITFunction


# --- in Triton's place --------------------------------------------------------------------------


class GPUTarget:
    """The name of a target; nothing is compiled here."""

    def __init__(self, *what):
        self.what = what


def install():
    """Put the imitation where Python looks for Triton, if there is none."""
    if not missing() or importlib.util.find_spec("torch") is None:
        return
    importlib.import_module("torch._dynamo")  # which looks for Triton, too: it is to find none
    knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=True))
    modules = {
        "triton": dict(__version__=VERSION, jit=jit, cdiv=cdiv, next_power_of_2=next_power_of_2,
                       knobs=knobs),
        "triton.language": LANGUAGE,
        "triton.runtime": dict(JITFunction=JITFunction, KernelInterface=KernelInterface),
        "triton.runtime.interpreter": dict(
            InterpreterError=InterpreterError, interpreter_builder=interpreter_builder),
        "triton.backends": {},
        "triton.backends.compiler": dict(GPUTarget=GPUTarget),
    }  # fmt: skip
    for name, contents in modules.items():
        module = types.ModuleType(name, __doc__)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(module).update(contents)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
