"""The machinery of the checks: what it lets through, how it says a number, what it puts back."""

import functools
import subprocess
import sys

import numpy as np
import pytest

from miniflamingo import functional
from miniflamingo.course.checks import check, core, untouched
from miniflamingo.course.checks.core import NotDone, Wrong, apart, expect, is_stub


def message(*arguments, **options):
    """What `expect` says; "" where nothing is wrong."""
    try:
        expect(*arguments, **options)
    except Wrong as wrong:
        return str(wrong)
    return ""


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "got", "texts"),
    [
        (0.88312, 0.88309, ("0.88312", "0.88309")),
        (1.0, 1 + 1e-9, ("1", "1.000000001")),
        (682.7, np.inf, ("682.7", "inf")),
        (75497472, 75497473, ("75497472", "75497473")),
        (3360, 20160.0, ("3360", "20160")),
        (True, False, ("True", "False")),
    ],
)
def test_two_numbers_are_said_in_as_many_digits_as_tell_them_apart(right, got, texts):
    assert apart(right, got) == texts


def test_a_wrong_value_never_reads_like_the_right_one():
    right = np.array([0.5, 0.88312])
    assert message(right + np.array([0, 3e-5]), right) == (
        "wrong value at [1]: 0.88312 is right, got 0.88315"
    )


@pytest.mark.parametrize(
    ("got", "right", "whole", "says"),
    [
        ([1, 0], [1.0, 0.0], False, ""),
        ([True, False], [1.0, 0.0], False, ""),
        (np.float32([0.1, 1 / 3]), [0.1, 1 / 3], False, ""),
        ([0.1, 0.3], np.float32([0.1, 0.3]), False, ""),
        (np.int8([1, 2]), [1, 2], False, ""),
        ([1.0, 2.0], [1, 2], True, ""),
        (
            [1.0, 2.0],
            [1, 2],
            False,
            "int is wanted, got float64 (right but for that: .astype(int))",
        ),
        ([1, 0], [True, False], True, "(right but for that: .astype(bool))"),
        ([1.0, 2.5], [1, 2], True, "wrong value at [1]: 2 is right, got 2.5"),
        ([3, 75497473], [3, 75497472], False, "75497472 is right, got 75497473"),
        (np.float16([0.1, 0.3]), [0.1, 0.3], False, "float16 has 3 digits"),
        (np.float32([0.1, 0.31]), [0.1, 0.3], False, "wrong value at [1]"),
        ([0.1, 0.30001], [0.1, 0.3], False, "0.3 is right, got 0.30001"),
    ],
)
def test_the_kind_of_a_number_matters_where_it_must(got, right, whole, says):
    found = message(got, np.asarray(right), whole=whole)
    assert says in found and bool(found) == bool(says), found


@pytest.mark.parametrize(
    ("got", "says"),
    [
        ([2.0, 4.0, 8.0], "(every number is 2 times the right one)"),
        ([1.5, 2.5, 4.5], "(every number is too large by 0.5)"),
        ([0.0, 1.0, 3.0], "(every number is too small by 1)"),
        ([4.0, 2.0, 1.0], "(the right numbers, but in other places)"),
        ([4.0, 2.0, 3.0], "1 is right, got 4"),
        ([1.0, np.nan, 4.0], "NaN at [1], where 2 is right: see above"),
        ([1.0, 2.0, -np.inf], "-inf at [2], where 4 is right: see above"),
    ],
)
def test_what_wrong_numbers_have_in_common_is_said(got, says):
    assert message(got, np.array([1.0, 2.0, 4.0]), infinite="see above").endswith(says)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ([[1, 2], [3]], "got list with parts of different shapes: join them into one"),
        (["a", "b"], "an array of numbers is wanted, got list of words"),
        ([1, None], "an array of numbers is wanted, got list with a None in it"),
        ({1: 2}, "an array of numbers is wanted, got dict"),
        (np.array([1, 2], object), ""),
        ((1, 2), ""),
        (range(1, 3), ""),
    ],
)
def test_what_is_no_array_is_said(out, says):
    found = message(out, np.array([1, 2]))
    assert found.endswith(says) and bool(found) == bool(says)


# --- nothing --------------------------------------------------------------------------------------


def stub(tokens, image_token):
    """Not yet."""
    ...


def forgetful(tokens, image_token):
    phi = np.cumsum(tokens == image_token, axis=1)  # noqa: F841


def begun(tokens, image_token):
    phi = tokens == image_token  # noqa: F841
    ...


def in_place(tokens, image_token):
    tokens[:] = np.cumsum(tokens == image_token, axis=1)


def test_a_stub_is_told_from_a_body_without_a_return():
    assert is_stub(stub) and is_stub(lambda: ...) and is_stub(lambda: None)
    assert repr(check("7.1", stub)).startswith("○ exercise 7.1: not done yet")
    for answer in (forgetful, begun, functools.partial(forgetful)):
        result = check("7.1", answer)
        assert result.message == "your function returns nothing: is there a `return`?"
        assert repr(result).startswith("✗")
    assert "number 1 in place and returns nothing: copy it first" in check("7.1", in_place).message


# --- what a cell can replace ----------------------------------------------------------------------


def true(*arguments, **options):
    return True


def wrong_weights(q, k, v):
    e = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
    return e / e.sum(axis=-1, keepdims=True) @ v


REPLACED = [
    (np, "allclose", true),
    (np, "isclose", true),
    (np, "array_equal", true),
    (np, "exp", lambda x: 1 + x),
    (np, "sqrt", lambda x: x),
    (np.random, "default_rng", lambda seed=0: None),
    (functional, "softmax", lambda x: x),
    (core, "same", true),
    (core, "expect", true),
    (core, "call", true),
    (sys.modules["miniflamingo.course.checks.module_01"], "expect", true),
    (sys.modules["miniflamingo.course.checks.module_01"], "attention", wrong_weights),
]


@pytest.fixture
def put_back():
    yield
    untouched.restore()


@pytest.mark.parametrize(("module", "name", "other"), REPLACED)
def test_what_a_cell_replaced_does_not_make_an_answer_right(module, name, other, put_back):
    def all_zero(q, k, v):
        return np.zeros_like(q)

    def from_inside(q, k, v):
        setattr(module, name, other)
        return np.zeros_like(q)

    first = getattr(module, name)
    assert not check("1.1", from_inside).ok
    assert getattr(module, name) is first
    setattr(module, name, other)
    assert not check("1.1", all_zero).ok
    assert getattr(module, name) is other  # a check leaves a notebook as it is


def test_an_answer_is_right_with_the_true_functions_only(put_back):
    np.exp = lambda x: 1 + x
    assert not check("1.1", lambda q, k, v: np.exp(q) * 0).ok
    assert check("7.1", lambda t, i: np.cumsum(t == i, axis=1)).ok


def test_a_registered_check_cannot_be_exchanged(put_back):
    core.EXERCISES["7.1"] = true
    assert not check("7.1", stub).ok


def test_the_functions_come_back_in_a_graded_notebook_too():
    cells = [
        "from miniflamingo.course.checks import check",
        "import numpy as np",
        "np.allclose = np.isclose = np.array_equal = lambda *a, **k: True",
        "np.exp = lambda x: x",
        "from miniflamingo.course.checks import check",  # as release.py's hidden tests have it
        "assert not check('1.1', lambda q, k, v: q).ok",
        "assert check('7.1', lambda t, i: np.cumsum(t == i, axis=1)).ok",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(cells)], check=True)


def test_not_implemented_is_not_done():
    def later(*arguments):
        raise NotImplementedError

    with pytest.raises(NotDone):
        core.call(later, 1)
