"""The machinery of the checks: run an answer safely, compare it, name what is wrong."""

import copy
import dis
import sys
import warnings
from dataclasses import dataclass

import numpy as np

from . import untouched

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
        with untouched.originals(), warnings.catch_warnings(), np.errstate(all="ignore"):
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
    finally:
        untouched.restore()
    nothing = out is None or out is Ellipsis or out is NotImplemented
    if nothing and is_stub(answer):
        raise NotDone
    _refuse_changes(arguments, copies, " and returns nothing" if nothing else "")
    if nothing:
        raise Wrong("your function returns nothing: is there a `return`?")
    return out


def _refuse_changes(arguments, copies, also):
    for i, (given, now) in enumerate(zip(arguments, copies)):
        if isinstance(given, np.ndarray) and not np.array_equal(now, given):
            raise Wrong(f"your function changes its argument number {i + 1} in place{also}: copy "
                        "it first, or write x = x + ... for x += ...")  # fmt: skip


# what the code of `...`, of `pass` or of a docstring does; names differ with Python's version
IDLE = {"CACHE", "NOP", "RESUME", "COPY_FREE_VARS", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}


def is_stub(answer):
    """Whether a function's body is still nothing but `...`, `pass` or a docstring."""
    code = getattr(answer, "__code__", None)
    return code is not None and all(step.opname in IDLE for step in dis.get_instructions(code))


def _in_a_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


OVERFLOW = "exp of a large score is infinite: subtract the row's maximum before exp"
UNDERFLOW = "exp of a large score is infinite, and the log of a tiny weight, rounded to 0, too: " \
    "log_softmax subtracts the row's maximum and takes no log of a weight"  # fmt: skip


def expect(out, right, mistakes=(), explain=None, infinite="", whole=False, loose=1):
    """Wrong unless `out` equals the array `right` in values, shape and kind of dtype.

    mistakes: pairs (message, the array that this mistake gives), tried in order before anything
    general is said. explain(got, right), where given, says what is wrong with wrong values;
    infinite, why there may be an inf or a NaN; loose, how many times the usual rounding is let
    through. Integers of the same value will do for floats, and with whole=True (a count, no index)
    floats for integers.
    """
    got, right = as_array(out), np.asarray(right)
    fits = _kind(right) in (_kind(got), "float") or (
        whole and _kind(got) + _kind(right) == "floatint"
    )
    if same(got, right, loose) and fits:
        return
    for message, wrong in mistakes:
        if same(got, np.asarray(wrong), loose) and not same(np.asarray(wrong), right, loose):
            raise Wrong(message)
    if got.shape != right.shape:
        raise Wrong(f"wrong shape: {list(right.shape)} is wanted, got {list(got.shape)}")
    if not fits:
        mend = f" (right but for that: .astype({_kind(right)}))" if same(got, right) else ""
        raise Wrong(f"wrong dtype: {_kind(right)} is wanted, got {got.dtype}{mend}")
    _refuse_infinite(got, right, infinite)
    raise Wrong(explain(got, right) if explain else _first_wrong(got, right))


def expect_stable(out, right, mistakes=(), infinite=OVERFLOW):
    """`expect` for scores so large, or so low, that exp of them is infinite, or 0."""
    expect(out, right, mistakes, infinite=infinite, loose=100)


def _first_wrong(got, right):
    if got.dtype == np.float16 and same(got.astype(np.float32), right, 10):
        return "float16 has 3 digits, too few: compute in the dtype of the arguments"
    place = first(~close(got, right))
    wanted, found = apart(right[tuple(place)], got[tuple(place)])
    return f"wrong value at {place}: {wanted} is right, got {found}{_pattern(got, right)}"


def named(name):
    """An `explain` for one of several results."""
    return lambda got, right: f"{name}: {_first_wrong(got, right)}"


def _pattern(got, right):
    """In words, what all numbers of a wrong result have in common with the right ones, if any."""
    if right.size < 2 or "b" in got.dtype.kind + right.dtype.kind:
        return ""
    got, right = got.astype(float), right.astype(float)
    shift, factor = got - right, got[right != 0] / right[right != 0]
    if factor.size > 1 and factor[0] and same(got, factor[0] * right):
        return f" (every number is {factor[0]:.3g} times the right one)"
    if same(shift, np.full_like(shift, shift.flat[0])):
        by = shift.flat[0]
        return f" (every number is too {'large' if by > 0 else 'small'} by {abs(by):.3g})"
    if same(np.sort(got, axis=None), np.sort(right, axis=None)):
        return " (the right numbers, but in other places)"
    return ""


def _refuse_infinite(got, right, why):
    """Wrong where a number is NaN or infinite and should not be."""
    lost = (got != got) | (abs(got) == np.inf)
    lost &= (right == right) & (abs(right) != np.inf)
    if lost.any():
        wanted, found = apart(right[lost][0], got[lost][0], 3)
        found = "NaN" if found == "nan" else found
        why = f": {why}" if why else ""
        raise Wrong(f"{found} at {first(lost)}, where {wanted} is right{why}")


def as_array(out):
    """A student's result as an array of numbers; Wrong when it is none."""
    name = "None" if out is None else type(out).__name__
    try:
        got = np.asarray(out)
        got = np.asarray(got.tolist()) if got.dtype == object else got  # of Python's own numbers
    except (ValueError, TypeError):
        raise Wrong(f"an array is wanted, got {name} with parts of different shapes: "
                    "join them into one") from None  # fmt: skip
    if got.dtype.kind not in "biuf":
        what = f" of {got.dtype}" if got.dtype.kind not in "USO" else ""
        what = " of words" if got.dtype.kind in "US" and got.ndim else what
        what = " with a None in it" if got.ndim and None in got.ravel().tolist() else what
        raise Wrong(f"an array of numbers is wanted, got {name}{what}")
    return got


def several(out, right, names, shapes=True):
    """The arrays of a result that must be a tuple or list of len(right); Wrong when it is not.

    shapes=False leaves their shapes to `expect`, which knows what gives which.
    """
    if isinstance(out, np.ndarray) and out.dtype == object:
        out = list(out.ravel())
    if not isinstance(out, (tuple, list)) or len(out) != len(right):
        many = f" of {len(out)}" if isinstance(out, (tuple, list)) else ""
        if not many:
            as_array(out)
        raise Wrong(f"wrong shape: {names} is wanted, got {type(out).__name__}{many}")
    arrays = [as_array(part) for part in out]
    for i, (got, wanted) in enumerate(zip(arrays, right)):
        if shapes and got.shape != np.shape(wanted):
            both = f"{list(np.shape(wanted))} is wanted, got {list(got.shape)}"
            raise Wrong(f"wrong shape of number {i + 1} in {names}: {both}")
    return arrays


def first(where):
    """The first place where a boolean array is true, as a list of ints."""
    return np.argwhere(where)[0].tolist()


def same(a, b, loose=1):
    """Whether two arrays have one shape and, but for rounding, the same numbers."""
    return a.shape == b.shape and bool(close(a, b, loose).all())


def close(got, right, loose=1):
    """Where two arrays of one shape agree; whole numbers exactly, floats as far as dtypes allow."""
    equal = (got == right) | ((got != got) & (right != right))  # NaN equals NaN here
    if "f" not in got.dtype.kind + right.dtype.kind or not right.size:
        return equal
    single = any(x.dtype.kind == "f" and x.dtype.itemsize == 4 for x in (got, right))
    relative = (1e-3 if single else 1e-5) * loose
    size = abs(right[(right == right) & (abs(right) != np.inf)].astype(float))
    absolute = relative / 10 * size.max(initial=0)
    with np.errstate(all="ignore"):
        gap = abs(got.astype(float) - right)
    return equal | ((gap <= absolute + relative * abs(right)) & (gap != np.inf))


def _kind(array):
    return {"b": "bool", "i": "int", "u": "int", "f": "float"}[array.dtype.kind]


def apart(right, got, least=4):
    """Two numbers as text, in as many digits as tell them apart; whole ones in full."""
    kinds = np.asarray(right).dtype.kind + np.asarray(got).dtype.kind
    if kinds == "bb":
        return str(right), str(got)
    if "f" not in kinds[0]:
        return f"{float(right):.17g}", f"{float(got):.{17 if got == got // 1 else 4}g}"
    for digits in range(least, 18):
        texts = f"{float(right):.{digits}g}", f"{float(got):.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts
