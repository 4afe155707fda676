"""The ground floor: a tape, and the decorator that pairs a formula with its gradient.

A formula is an ordinary NumPy function. Its gradient takes the output's gradient and the formula's
INPUTS, recomputes what it needs, and stands right below it:

    @differentiable
    def square(x):  # [...] -> [...]
        return x * x

    @square.gradient
    def square_backward(dout, x):
        return 2 * x * dout

Called with arrays, `square` is the plain function. Called with a `Tensor` while a `Tape` is open,
it also records the call; `tape.backward(loss)` walks the record from its end to its start:

    with Tape() as tape:
        loss = square(w).sum()          # w is a Tensor (or a Parameter of a Module)
    tape.backward(loss)                 # adds d loss / d w to w.grad

Outside a tape every Tensor counts as its array, and arrays come out. This file holds no formula.
"""

import functools
import inspect
import threading

import numpy as np

_open = threading.local()  # .tapes: the stack of this thread's open tapes


class Tensor:
    """An array whose gradient may be wanted. Arithmetic on it comes from `functional.py`."""

    __array_ufunc__ = None  # let `array + tensor` reach Tensor.__radd__

    def __init__(self, data, requires_grad=True):
        self.data, self.requires_grad, self.grad = np.asarray(data), requires_grad, None

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    dtype = property(lambda self: self.data.dtype)
    size = property(lambda self: self.data.size)

    def __len__(self):
        return len(self.data)

    def __array__(self, *args, **kwargs):
        raise TypeError("a Tensor is not an array: use tensor.data, or a differentiable function")

    def __repr__(self):
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


def array_of(x):
    """The array inside a Tensor; anything else unchanged."""
    return x.data if isinstance(x, Tensor) else x


def differentiable(formula):
    """Let `formula(*arrays, **options)` be recorded, and pair it with its `.gradient`.

    The gradient is called as `backward(dout, *arrays, **options)` and returns one gradient for each
    leading array (None where there is none to give). If it has a parameter `needs`, a tuple of
    bools, it is told which of them are wanted and can leave out the others.
    """

    @functools.wraps(formula)
    def call(*args, **options):
        for name, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{formula.__name__}: pass the Tensor {name!r} by position")
        out = formula(*map(array_of, args), **options)
        if not (tapes := getattr(_open, "tapes", None)):
            return out
        needs = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
        if not any(needs):
            return out
        out = Tensor(out)
        tapes[-1].records.append((out, call.backward, args, needs, options))
        return out

    def gradient(backward):
        takes_needs = "needs" in inspect.signature(backward).parameters

        def run(dout, args, needs, options):
            extra = {"needs": needs} if takes_needs else {}
            grads = backward(dout, *map(array_of, args), **options, **extra)
            return grads if isinstance(grads, tuple) else (grads,)

        call.backward = run
        return backward

    call.gradient = gradient
    return call


class Tape:
    """Records the differentiable calls made inside `with Tape() as tape:`."""

    def __init__(self):
        self.records = []  # (output, backward, arguments, which of them need a gradient, options)

    def __enter__(self):
        _open.tapes = [*getattr(_open, "tapes", []), self]
        return self

    def __exit__(self, *exception):
        _open.tapes = _open.tapes[:-1]

    def backward(self, loss, dout=None):
        """Add d loss / d leaf to `leaf.grad` for every leaf; dout [like loss] is 1 by default."""
        for leaf, dx in self.gradients(loss, dout):
            leaf.grad = dx if leaf.grad is None else leaf.grad + dx

    def gradients(self, loss, dout=None):
        """The pairs (leaf, d loss / d leaf), without touching `leaf.grad`."""
        dout = np.ones_like(loss.data) if dout is None else dout
        grads, tensors = {id(loss): dout}, {id(loss): loss}
        for out, backward, args, needs, options in reversed(self.records):
            dout = grads.pop(id(out), None)
            if dout is None:
                continue
            for arg, need, dx in zip(args, needs, backward(dout, args, needs, options)):
                if need and dx is not None:
                    grads[id(arg)] = grads[id(arg)] + dx if id(arg) in grads else dx
                    tensors[id(arg)] = arg
        return [(tensors[key], dx) for key, dx in grads.items()]  # no record produced these: leaves
