"""The machinery of the checks: run an answer safely, compare it, name what is wrong."""

import copy
import sys
import warnings
from dataclasses import dataclass

import numpy as np

EXERCISES = {}  # number -> the function that checks an answer, and raises Wrong or NotDone


class Wrong(Exception):
    """An answer is wrong; the message says how, in one line."""


class NotDone(Exception):
    """There is no answer yet."""


@dataclass(frozen=True, repr=False)
class Result:
    """The outcome of a check: true when the answer is right; a notebook shows its message."""

    number: str
    ok: bool
    message: str
    mark: str = "✗"

    def __bool__(self):
        return self.ok

    def __repr__(self):
        text = f"{self.mark} exercise {self.number}: {self.message}"
        # with ? for what a terminal of few letters cannot show: a check never raises
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)


def exercise(number):
    """Register the function below as the check of exercise `number`."""

    def register(function):
        EXERCISES[number] = function
        return function

    return register


def check(number, *answer):
    """Check the answer to an exercise; returns a Result, never raises."""
    if number not in EXERCISES:
        return Result(number, False, f"there is no such exercise: {', '.join(EXERCISES)}")
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            EXERCISES[number](*answer)
    except NotDone:
        return Result(number, False, "not done yet (the function returns nothing)", "○")
    except Wrong as wrong:
        return Result(number, False, str(wrong))
    except Exception as error:
        return Result(number, False, f"cannot be checked: {_in_a_line(error)}")
    return Result(number, True, "right", "✓")


def call(answer, *arguments):
    """Run a student's function on copies of the arguments; Wrong when it fails or changes them."""
    if not callable(answer):
        raise Wrong(f"a function is wanted, got {type(answer).__name__}")
    copies = copy.deepcopy(arguments)
    try:
        out = answer(*copies)
    except NotImplementedError:
        raise NotDone from None
    except (Exception, SystemExit) as error:
        raise Wrong(f"your code stops with {_in_a_line(error)}") from None
    if out is None or out is Ellipsis or out is NotImplemented:
        raise NotDone
    for i, (given, now) in enumerate(zip(arguments, copies)):
        if isinstance(given, np.ndarray) and not np.array_equal(given, now):
            raise Wrong(f"your function changes its argument number {i + 1} in place: copy it")
    return out


def _in_a_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def expect(out, right, mistakes=(), explain=None):
    """Wrong unless `out` equals the array `right` in values, shape and kind of dtype.

    mistakes: pairs (message, the array that this mistake gives), tried in order before anything
    general is said. explain(got, right), where given, says what is wrong with wrong values.
    """
    got, right = as_array(out), np.asarray(right)
    if _same(got, right) and _kind(got) == _kind(right):
        return
    for message, wrong in mistakes:
        if _same(got, np.asarray(wrong)) and not _same(np.asarray(wrong), right):
            raise Wrong(message)
    if got.shape != right.shape:
        raise Wrong(f"wrong shape: {list(right.shape)} is wanted, got {list(got.shape)}")
    if _kind(got) != _kind(right):
        raise Wrong(f"wrong dtype: {_kind(right)} is wanted, got {got.dtype}")
    if _kind(got) == "float" and np.isnan(got).any():
        raise Wrong(f"NaN at {first(np.isnan(got))}, where {right[np.isnan(got)][0]:.3g} is right")
    if explain:
        raise Wrong(explain(got, right))
    place = first(~np.isclose(got, right, rtol=1e-5, atol=1e-8))
    raise Wrong(f"wrong value at {place}: {_number(right, place)} is right, got "
                f"{_number(got, place)}")  # fmt: skip


def as_array(out):
    """A student's result as an array of numbers; Wrong when it is none."""
    try:
        got = np.asarray(out)
    except (ValueError, TypeError) as error:
        raise Wrong(f"an array is wanted, got {type(out).__name__}: {_in_a_line(error)}") from None
    if got.dtype.kind not in "biuf":
        raise Wrong(f"an array of numbers is wanted, got {type(out).__name__} of {got.dtype}")
    return got


def first(where):
    """The first place where a boolean array is true, as a list of ints."""
    return np.argwhere(where)[0].tolist()


def _same(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)


def _kind(array):
    return {"b": "bool", "i": "int", "u": "int", "f": "float"}[array.dtype.kind]


def _number(array, place):
    return f"{array[tuple(place)]:.4g}" if _kind(array) == "float" else str(array[tuple(place)])
