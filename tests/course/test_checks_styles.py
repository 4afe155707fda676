"""What holds for every check, whatever an answer computes: its style, its dtype, its slips.

The answers are those of test_checks.py, with one thing about them changed.
"""

import copy
import re

import numpy as np
import pytest
from test_checks import RIGHT, check

KERNELS = ("12.1", "12.2", "12.3", "12.5", "13.2")
PLAIN = [(n, a) for n, a in RIGHT if n not in KERNELS]
FIRST = list({n: (n, a) for n, a in reversed(PLAIN)}.values())[::-1]  # one for each exercise


def mapped(change, out):
    """`change` applied to every array of a result, and the rest as it is."""
    if isinstance(out, dict):
        return {name: mapped(change, x) for name, x in out.items()}
    parts = isinstance(out, list) and any(isinstance(x, np.ndarray) for x in out)
    if isinstance(out, tuple) or parts:
        return type(out)(mapped(change, x) for x in out)
    return change(np.asarray(out))


def then(change, answer):
    """The answer, with its result changed."""
    return lambda *arguments: mapped(change, answer(*arguments))


def narrow(x):
    return x.astype(np.float32) if x.dtype.kind == "f" else x


def short(x):
    return x.astype(np.int32) if x.dtype.kind == "i" else x


def turned(x):
    return np.asarray(x, order="F")


# --- other styles ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "answer"), PLAIN)
@pytest.mark.parametrize("change", [narrow, short, np.ndarray.tolist, turned])
def test_a_right_answer_may_come_in_another_form(number, answer, change):
    result = check(number, then(change, answer))
    assert result.ok, result


@pytest.mark.parametrize(("number", "answer"), FIRST)
def test_a_right_answer_may_be_computed_in_float32(number, answer):
    def rounded(x):
        if isinstance(x, dict):
            return {name: rounded(value) for name, value in x.items()}
        if isinstance(x, list):
            return [rounded(value) for value in x]
        return narrow(x) if isinstance(x, np.ndarray) else x

    result = check(number, lambda *arguments: answer(*map(rounded, arguments)))
    assert result.ok or number == "8.2", result  # whose differences need 16 digits


# --- slips ----------------------------------------------------------------------------------------


def has_arrays(arguments):
    return any(isinstance(x, np.ndarray) and x.size for x in arguments)


@pytest.mark.parametrize(("number", "answer"), FIRST)
def test_a_forgotten_return_is_told_from_a_stub(number, answer):
    def forgetful(*arguments):
        answer(*arguments)

    assert check(number, forgetful).message == "your function returns nothing: is there a `return`?"


@pytest.mark.parametrize(("number", "answer"), FIRST)
def test_an_answer_may_work_in_place_on_copies_alone(number, answer):
    def spoil(arguments):
        seen.append(has_arrays(arguments))
        for x in arguments:
            if isinstance(x, np.ndarray):
                x[...] = 7

    def careless(*arguments):
        out = copy.deepcopy(answer(*arguments))
        spoil(arguments)
        return out

    def careful(*arguments):
        mine = copy.deepcopy(arguments)
        out = copy.deepcopy(answer(*mine))
        spoil(mine)
        return out

    seen = []
    assert check(number, careful).ok
    result = check(number, careless)
    assert result.ok is not any(seen)
    assert result.ok or "in place: copy it first" in result.message, result


@pytest.mark.parametrize(("number", "answer"), FIRST)
@pytest.mark.parametrize("change", [lambda x: x * 1.01 + 0.01, lambda x: x + 1, np.negative])
def test_nearly_right_is_not_right_and_the_numbers_tell_why(number, answer, change):
    result = check(number, then(lambda x: ~x if x.dtype.kind == "b" else change(x), answer))
    assert not result.ok
    for right, got in re.findall(r"(\S+) is right, got (\S+)", result.message):
        assert right != got
