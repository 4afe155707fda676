"""Run a student's Triton kernel on small fenced tensors, and say what it stored or touched.

torch and Triton are imported when the first kernel comes, so that other modules do without them.
"""

import ast
import inspect
import textwrap

import numpy as np

from .core import OVERFLOW, NotDone, Wrong, call, expect


def expect_stored(answer, programs, arguments, right, mistakes=(), astray="", loose=1, **constants):
    """Wrong unless the kernel `answer`, run as `programs` programs, stores `right` in `out`.

    arguments {name: array, number, or None for the output}, in the kernel's order; constants are
    its tl.constexpr arguments. mistakes as for `expect`. astray is what to say where the kernel
    touches memory that is no element of a tensor; loose, how many times the usual rounding is let
    through. One program stores each element, and what a mask leaves out has no part in it.
    """
    right = np.asarray(right)
    if not _is_kernel(answer):
        expect(_plain(answer, arguments), right)
        raise Wrong(_missing() or "these are the right numbers, but no kernel stored them")
    if _is_stub(answer):
        raise NotDone
    out, watch = _run(answer, programs, arguments, right, constants)
    _judge_stores(watch, astray)
    _judge_values(out, right, watch, mistakes, astray, loose)
    _judge_shares(watch)
    for names in _undefined(arguments):
        out, _ = _run(answer, programs, arguments, right, constants, names)
        if not _nearly(out, right, loose):
            raise Wrong(
                f"right by luck: what the mask leaves out of {' and '.join(names)} is "
                "undefined, perhaps NaN, and 0 * NaN is NaN: load it with other=0.0"
            )


def _undefined(arguments):
    """The inputs whose masked lanes are to be NaN: each, then all together."""
    names = [n.removesuffix("_ptr") for n, v in arguments.items() if isinstance(v, np.ndarray)]
    return [*([name] for name in names), names]


def _judge_values(out, right, watch, mistakes, astray, loose):
    """Wrong unless the numbers that were stored are right."""
    endless = [n for n, fill in watch.fills.items() if n != "x" and abs(fill) == np.inf]
    if endless and np.isnan(out).all() and not np.isnan(right).any():
        raise Wrong(
            f"{endless[0]} is loaded with other=-inf: products with it are infinite, and "
            "their sums NaN; load other=0.0, and put -inf into the SCORES with tl.where"
        )
    for message, wrong in mistakes:
        if watch.fault and np.isnan(wrong).all():
            continue  # the fault says more
        if _nearly(out, wrong, loose) and not _nearly(wrong, right, loose):
            raise Wrong(message)
    if watch.fault:
        raise Wrong(f"{watch.fault}{astray}")
    if not _nearly(out, right, loose):
        expect(out.astype(float), right, infinite=OVERFLOW if loose > 1 else "")


def _judge_shares(watch):
    """Wrong where two programs store the same element."""
    owner = {}
    for program, name, offsets in watch.stores:
        for place in offsets.tolist():
            if owner.setdefault(place, program) != program:
                raise Wrong(
                    f"programs {owner[place]} and {program} both write {name} at offset "
                    f"{place}: each has places of its own, tl.program_id(0) says which"
                )


def _judge_stores(watch, astray):
    """Wrong where the values that were stored need not be looked at."""
    if watch.ended:
        raise Wrong(f"{watch.fault}{astray}")
    inputs = {name for _, name, _ in watch.stores} - {"out"}
    if inputs:
        raise Wrong(f"your kernel writes into {', '.join(sorted(inputs))}: the result goes to out")
    if not watch.stores:
        raise Wrong("your kernel stores nothing: tl.store is missing")


def _nearly(a, b, loose=1):  # float32, where terms may cancel
    return np.allclose(a, b, rtol=1e-5 * loose, atol=1e-6 * loose, equal_nan=True)


def _is_kernel(answer):  # what @triton.jit makes, interpreted or compiled
    return callable(getattr(answer, "run", None)) and hasattr(answer, "fn")


def _missing():
    from miniflamingo import kernels

    return kernels.unavailable()


def _triton():
    """triton_cpu, at the last moment: it decides how Triton runs, for good."""
    try:
        from .. import triton_cpu
    except ImportError as error:
        raise Wrong(f"cannot be checked here: {error}") from None
    return triton_cpu


def _plain(answer, arguments):
    """What a function that is no kernel returns; Wrong that asks for @triton.jit if it stops."""
    try:
        out = call(answer, *(value for value in arguments.values() if value is not None))
    except Wrong as wrong:
        if not callable(answer):
            raise
        raise Wrong(f"{wrong} (it is no kernel: is @triton.jit missing above it?)") from None
    return out


def _is_stub(kernel):
    """Whether a kernel's body is nothing but `...`, pass or a docstring."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    except (OSError, TypeError, AttributeError, SyntaxError):
        return False
    body = tree.body[0].body if isinstance(tree.body[0], ast.FunctionDef) else [tree.body[0]]
    return all(
        isinstance(line, ast.Pass)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in body
    )


def _run(kernel, programs, arguments, right, constants, undefined=()):
    """Launch the kernel -> what it stored in out (NaN where nothing), and its Watch."""
    from triton.runtime.interpreter import InterpreterError

    fenced, Watch = _triton().fenced, _triton().Watch
    poison = np.full(right.shape, np.nan, np.float32)
    values = [poison if value is None else value for value in arguments.values()]
    values = [fenced(value) if isinstance(value, np.ndarray) else value for value in values]
    named = zip(arguments, values)
    tensors = {n.removesuffix("_ptr"): v for n, v in named if hasattr(v, "untyped_storage")}
    with Watch(**tensors) as watch:
        watch.undefined = dict.fromkeys(undefined, np.nan)
        try:
            kernel[(programs,)](*values, **constants)
        except InterpreterError as error:
            if not watch.fault:
                reason = " ".join(str(error).split())
                raise Wrong(f"your kernel stops with {reason}") from None
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise Wrong(f"your kernel stops with {reason}") from None
    return tensors["out"].numpy(), watch
