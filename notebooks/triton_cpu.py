"""Triton for modules 12 to 14: interpreted, on CPU tensors, also where there is a GPU.

Import it before anything of `kernels`: TRITON_INTERPRET counts only if it is set before Triton is
first imported. Where Triton does not exist, `imitation` takes its place. `Watch` sees every address
that a kernel touches, which no GPU shows.
"""

import inspect
import linecache
import os

from miniflamingo.kernels import unavailable

from . import imitation

if imitation.missing():
    imitation.install()
if unavailable():
    raise ImportError(f"this module runs Triton kernels, and {unavailable()}")
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np

from miniflamingo.kernels.common.runtime import INTERPRET, tl, torch, triton

if not INTERPRET.value:
    raise ImportError("this module wants Triton's interpreter: expected TRITON_INTERPRET=1 from "
                      "the start, got compiled kernels")  # fmt: skip

from triton.runtime.interpreter import InterpreterError, interpreter_builder

__all__ = ["IMITATED", "Watch", "altered", "fenced", "tl", "torch", "triton"]
FENCE = 1024  # elements on either side
IMITATED = triton.__version__ == imitation.VERSION  # whether this is no Triton


def fenced(array):
    """A NumPy array as a tensor with the same strides, in memory that is poisoned all around.

    Before its first and behind its last element lie 1,024 others, NaN (-1 for integers); what lay
    between the array's own rows, if it is a view of a wider one, lies there still.
    """
    strides = [stride // array.itemsize for stride in array.strides]
    span = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, strides))
    poison = np.nan if array.dtype.kind == "f" else -1
    memory = np.full(span + 2 * FENCE, poison, array.dtype)
    own = np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,))
    memory[FENCE : FENCE + span] = own
    return torch.from_numpy(memory).as_strided(array.shape, strides, FENCE)


def altered(kernel, old, new):
    """A kernel with one piece of its source replaced. ValueError unless `old` is there once."""
    text, name = inspect.getsource(kernel.fn), kernel.fn.__name__
    if text.count(old) != 1:
        raise ValueError(f"{old!r} must stand once in {name}, it does {text.count(old)} times")
    file = f"<{name}: {new}>"
    text = text.replace(old, new)
    # Triton reads a kernel's source again: it must be found under the file's name
    linecache.cache[file] = len(text), None, text.splitlines(True), file
    scope = dict(kernel.fn.__globals__)
    exec(compile(text, file, "exec"), scope)
    return scope[name]


class Watch:
    """What kernels read and write: `with Watch(x=x, out=out) as watch: kernel[grid](x, out)`.

    loads, stores: lists of (program, name, offsets), offsets int[..] in elements from the tensor's
    first one; what a mask leaves out is not in them. fault: the first access to something that is
    no element of any of the tensors, in words, or None. Where it lies in a tensor's fence it is
    let through, as a GPU might; anywhere else it ends the run (`ended`), and the `with` block ends
    quietly.

    What a load's mask leaves out is undefined unless `other=` says what it is. The interpreter
    takes 0; with `watch.undefined = {name: number}` it takes that for loads from these tensors.
    fills: {name: what `other=` was there}.
    """

    def __init__(self, **tensors):
        self.tensors = {name: _Extent(tensor) for name, tensor in tensors.items()}
        self.loads, self.stores, self.fault, self.ended = [], [], None, False
        self.undefined, self.fills = {}, {}

    def __enter__(self):
        load, store = (
            interpreter_builder.create_masked_load,
            interpreter_builder.create_masked_store,
        )

        def watched_load(pointers, mask, other, *rest):
            self._see(self.loads, "reads", pointers, mask)
            loaded = load(pointers, mask, other, *rest)
            self._fill(loaded, pointers, mask, other)
            return loaded

        def watched_store(pointers, value, mask, *rest):
            self._see(self.stores, "writes", pointers, mask)
            return store(pointers, value, mask, *rest)

        # on the instance, before its class
        interpreter_builder.create_masked_load = watched_load
        interpreter_builder.create_masked_store = watched_store
        return self

    def __exit__(self, kind, error, trace):
        del interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
        return self.ended and kind is not None and issubclass(kind, InterpreterError)

    def count(self, accesses, *names):
        """How many elements of the named tensors stand in loads or stores, each time counted."""
        return sum(len(offsets) for _, name, offsets in accesses if name in names)

    def _fill(self, loaded, pointers, mask, other):
        """Note what fills the lanes that a load's mask leaves out, or fill them."""
        at, mask = np.broadcast_arrays(pointers.data, mask.data)
        places = at[mask] if mask.any() else at.ravel()
        name = next((n for n, t in self.tensors.items() if t.holds(places[0])), None)
        if other is not None:
            self.fills[name] = other.data.flat[0]
        elif name in self.undefined:
            loaded.data = np.where(mask, loaded.data, loaded.data.dtype.type(self.undefined[name]))

    def _see(self, accesses, verb, pointers, mask):
        program = interpreter_builder.grid_idx[0]
        at, mask = np.broadcast_arrays(pointers.data, mask.data)
        at = at[mask].astype(np.int64).ravel()
        while len(at):
            name = next((n for n, t in self.tensors.items() if t.holds(at[0])), None)
            if name is None:
                self.ended = True
                self.fault = self.fault or f"program {program} {verb} far outside all tensors"
                raise IndexError(self.fault)
            extent = self.tensors[name]
            here = extent.holds(at)
            offsets, at = (at[here] - extent.first) // extent.size, at[~here]
            accesses.append((program, name, offsets))
            strays = offsets[~np.isin(offsets, extent.places)]
            if len(strays) and not self.fault:
                self.fault = f"program {program} {verb} {name} at offset {strays[0]}, where it has "
                self.fault += f"no element (its last is at {extent.places[-1]})"


class _Extent:
    """Where a tensor lies in memory: its storage, and the offsets of its own elements."""

    def __init__(self, tensor):
        storage, self.size = tensor.untyped_storage(), tensor.element_size()
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.first = tensor.data_ptr()
        places = np.zeros(1, np.int64)
        for n, stride in zip(tensor.shape, tensor.stride()):
            places = np.add.outer(places, np.arange(n) * stride).ravel()
        self.places = np.unique(places)

    def holds(self, addresses):
        return (addresses >= self.begin) & (addresses < self.end)
