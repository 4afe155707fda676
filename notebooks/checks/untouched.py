"""What the checks compute with, as it was when they were imported: a cell may replace any of it.

A notebook's cells and the checks share one process, in nbgrader, too. `np.exp = my_exp` in a cell
would change what is right along with the answer, and `np.allclose = lambda *a: True` let anything
pass. So a check runs with the functions of NumPy, of the library and of the checks that were there
at first, and takes them again after each run of an answer; then the cell's own come back.

That holds against slips and against quick tricks, not against everyone. It does not see what was
replaced before the checks were imported, what is imported later (torch, Triton, the kernels), or a
function whose own code was changed; and whoever replaces `restore` or `check` themselves is let
through. A grade that must hold against that wants an eye on the cells.
"""

import builtins
import math
import sys
from contextlib import contextmanager

import numpy as np

OUTSIDE = (np, np.linalg, np.random, np.lib.stride_tricks, math)
BUILTINS = ("abs", "all", "any", "callable", "enumerate", "float", "getattr", "int", "isinstance",
            "len", "list", "map", "max", "min", "range", "sum", "tuple", "type", "zip")  # fmt: skip
_kept = []  # (a module's names, one of them, the function)
_registers = []  # (a dict, what it held)


def remember(*registers):
    """Keep the functions of all modules that count, and what the dicts `registers` hold."""
    library = [m for name, m in sys.modules.items()
               if name.startswith("miniflamingo") and "kernels" not in name]  # fmt: skip
    for module in (*OUTSIDE, *library):
        names = vars(module)
        _kept.extend((names, name, f) for name, f in names.items() if callable(f))
    _kept.extend((vars(builtins), name, vars(builtins)[name]) for name in BUILTINS)
    _registers.extend((register, dict(register)) for register in registers)


def restore():
    """Put back what was replaced since; -> [(a module's names, one of them, what stood there)]."""
    replaced = [(names, name, names.get(name)) for names, name, function in _kept
                if names.get(name) is not function]  # fmt: skip
    for names, name, function in _kept:
        names[name] = function
    for register, held in _registers:
        register.update(held)
    return replaced


@contextmanager
def originals():
    """A block in which everything is as it was at first."""
    replaced = restore()
    try:
        yield
    finally:
        restore()
        for names, name, function in replaced:
            names[name] = function
