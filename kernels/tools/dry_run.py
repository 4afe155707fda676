"""Run a kernel's own Python on shapes instead of numbers, and count what a program does.

A tile is known by its shape alone, a number by its value where it follows from the launch's
arguments and from lists of integers on the CPU; that is enough to go through every `if` and `for`.
Counted are the turns of each loop, the flops of tl.dot, and the bytes of each tensor that are
loaded and stored: whole tiles, also where a mask leaves some out. Nothing is computed, so a launch
of any size takes a moment. ValueError where an `if` or a `for` hangs on what is not known.
"""

import builtins
import operator
import sys
import types
from collections import Counter

import numpy as np

from ..common.runtime import tl, torch

MAKE = "zeros", "full", "empty"
KEEP = "multiple_of", "max_contiguous", "max_constancy"


class Other:
    """A dtype, or a function of tl that DryRun has not: it broadcasts its arguments' shapes."""

    def __call__(self, *operands, **_):
        return _apply(lambda *_: None, *operands)


class Value:
    """A tile, a number (of shape ()) or a pointer: one with a tensor, and an offset into it."""

    dtype = Other()
    dtype.element_ty = dtype

    def __init__(self, shape=(), number=None, tensor=None):
        self.shape, self.number, self.tensor = tuple(shape), number, tensor

    def to(self, *_, **__):
        """Another dtype is the same shape and number."""
        return self

    def __getitem__(self, places):
        """x[:, None] and the like."""
        axes = iter(self.shape)
        return Value([1 if p is None else next(axes) for p in places], None, self.tensor)

    def __index__(self):
        if self.number is None:
            raise ValueError("a dry run cannot know how a kernel branches on computed numbers")
        return int(self.number)

    def __bool__(self):
        return bool(self.__index__())

    __hash__ = object.__hash__


def _apply(function, *operands):
    operands = [x if isinstance(x, Value) else Value((), x) for x in operands]
    numbers, shapes = [x.number for x in operands], [x.shape for x in operands]
    known = not any(shapes) and all(isinstance(n, (int, float)) for n in numbers)
    tensors = [x.tensor for x in operands if x.tensor is not None]
    shape = np.broadcast_shapes(*shapes) if any(shapes) else ()
    return Value(shape, function(*numbers) if known else None, tensors[0] if tensors else None)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "lshift", "rshift",
              "lt", "le", "gt", "ge", "eq", "ne"):  # fmt: skip
    _function = getattr(operator, f"__{_name}__")
    setattr(Value, f"__{_name}__", lambda a, b, f=_function: _apply(f, a, b))
    setattr(Value, f"__r{_name}__", lambda a, b, f=_function: _apply(f, b, a))
Value.__neg__ = lambda a: _apply(operator.neg, a)


class DryRun:
    """Counts what programs of a launch (kernel, arguments, options) do; counters grow from call to
    call of `program`.

    dotted   the loops with a tl.dot inside; a loop is the lines of the calls and of its `for`
    fixed    {loop: whether its bounds are constants}
    flops    of tl.dot
    loaded   {id of a tensor: bytes}; stored, too
    """

    def __init__(self, kernel, arguments, options):
        self.dotted, self.fixed, self.flops = set(), {}, 0
        self.loaded, self.stored, self.open, self.made = Counter(), Counter(), [], {}
        names = kernel.arg_names
        self.function = self.translated(kernel.fn)
        self.arguments = [
            Value((), 0, x) if isinstance(x, torch.Tensor) else Value((), x) for x in arguments
        ]
        self.constants = {k: v for k, v in options.items() if k in names}

    def program(self, number):
        """Run one program -> (its turns, {loop: number}; whether it has touched a tile)."""
        self.number, self.turns, self.busy = number, Counter(), False
        self.function(*self.arguments, **self.constants)
        return self.turns, self.busy

    def translated(self, function):
        """A @triton.jit function's Python, with this dry run's tl and range."""
        if function not in self.made:
            names = {"tl": self, "triton": self, "range": self.range}
            made = types.FunctionType(
                function.__code__, names, function.__name__, function.__defaults__
            )
            self.made[function] = made
            for name in function.__code__.co_names:
                if name in function.__globals__ and name not in names:
                    names[name] = self.meaning(name, function.__globals__[name])
        return self.made[function]

    def meaning(self, name, x):
        """What a global name of a kernel stands for here."""
        if name == "INTERPRET":
            return False
        if isinstance(x, tl.constexpr):
            return x.value
        return self.translated(x.fn) if hasattr(x, "fn") else x

    def range(self, *bounds, **_):
        """range and tl.range: counts the turns."""
        frame, lines = sys._getframe(1), []
        while frame.f_code is not DryRun.program.__code__:
            lines.insert(0, frame.f_lineno)
            frame = frame.f_back
        loop, turns = tuple(lines), builtins.range(*map(operator.index, bounds))
        self.fixed[loop] = all(isinstance(bound, int) for bound in bounds)
        self.turns[loop] += len(turns)
        self.open.append(loop)
        for i in turns:
            yield Value((), i)
        self.open.pop()

    # --- tl -------------------------------------------------------------------------------------

    static_range = range

    def __getattr__(self, name):
        """Any function of tl that is not below keeps or broadcasts its arguments' shapes."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name in MAKE:
            return lambda shape, *_, **__: Value(shape)
        if name in KEEP:
            return lambda x, *_: x
        return Other()

    def program_id(self, axis):
        """The number of the program that runs."""
        return Value((), self.number if axis == 0 else 0)

    def arange(self, start, end):
        """A tile of one axis."""
        return Value((int(end) - int(start),))

    def cdiv(self, a, b):
        """Rounded up."""
        return _apply(lambda a, b: -(-a // b), a, b)

    def where(self, condition, a, b):
        """One of two."""
        return _apply(lambda c, a, b: a if c else b, condition, a, b)

    def maximum(self, a, b):
        """The greater."""
        return _apply(max, a, b)

    def minimum(self, a, b):
        """The smaller."""
        return _apply(min, a, b)

    def sum(self, x, axis=None):
        """Without an axis, or all of them."""
        return Value(() if axis is None else x.shape[:axis] + x.shape[axis + 1 :])

    max = min = sum

    def trans(self, x):
        """[M, N] -> [N, M]."""
        return Value(x.shape[::-1])

    def dot(self, a, b, *_, **__):
        """[M, K], [K, N] -> [M, N]."""
        self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self.dotted.update(self.open)
        return Value((a.shape[0], b.shape[1]))

    def load(self, pointer, mask=None, **_):
        """Counted; a single number of a tensor on the CPU is known."""
        self.touch(self.loaded, pointer)
        known = not pointer.shape and pointer.number is not None and pointer.tensor.is_cpu
        return Value(pointer.shape, int(pointer.tensor.view(-1)[pointer.number]) if known else None)

    def store(self, pointer, value, mask=None):
        """Counted."""
        self.touch(self.stored, pointer)

    def touch(self, counter, pointer):
        """Count the bytes of a tile, or of a single number."""
        counter[id(pointer.tensor)] += pointer.tensor.itemsize * int(np.prod(pointer.shape))
        self.busy |= bool(pointer.shape)
