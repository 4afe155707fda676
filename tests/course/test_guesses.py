"""Guesses are kept, compared and shown, and nothing that a reader writes stops the notebook."""

import numpy as np
import pytest

from miniflamingo.course.guesses import GUESSES, guess, told


@pytest.fixture(autouse=True)
def nothing_guessed():
    GUESSES.clear()


def test_dots_are_no_guess():
    assert repr(guess("7.a", first=..., last=2)) == (
        "○ guess 7.a: write what you expect for first, then run")  # fmt: skip
    found = told("7.a", first=1, last=2)
    assert repr(found) == "○ 7.a first: 1 (no guess)\n✓ 7.a last: 2"
    assert (found.right, found.asked) == (1, 2)


def test_a_cell_that_was_left_out_is_no_guess_either():
    assert repr(told("10.z", share=0.5)) == "○ 10.z share: 0.5 (no guess)"


def test_what_was_guessed_is_repeated_and_what_is_right_is_said():
    assert repr(guess("1.b", cells=4, who="the LM")) == "guess 1.b: cells 4, who the LM"
    assert repr(told("1.b", cells=np.int64(5), who="the lm ")) == (
        "✗ 1.b cells: 5, your guess was 4\n✓ 1.b who: the lm ")  # fmt: skip


@pytest.mark.parametrize("said, right, agrees", [
    (3, 3, True), (3.0, 3, True), (3.1, 3, False), ("3", 3, False), (True, 1, False),
    (True, True, True), (1, True, False), (0.52, 0.5, True), (0.6, 0.5, False), (0, 0.0, True),
    (float("nan"), 0.5, False), (float("inf"), 1.0, False), ("Puppy ", "puppy", True),
    ([2, 1], (1, 2), True), ({1, 2}, [2, 1], True), ([1], (1, 2), False), (1, (1, 2), False),
    (["a", "B"], {"b", "A"}, True), ([], [], True), (np.array([1, 2]), [2, 1], True),
    (np.float32(0.5), 0.5, True), (object(), 3, False), (print, "print", False), ({}, 1, False),
    ("puppy", ["Puppy"], True), (3, {3}, True), ("cat", ["puppy"], False), ("none", [], True),
    (float("inf"), float("inf"), False), ("a", ["a", "b"], False),
])  # fmt: skip
def test_what_agrees(said, right, agrees):
    guess("0.a", value=said)
    found = told("0.a", value=right)
    assert (found.right == 1) == agrees and repr(found)


def test_how_near_is_near_enough_can_be_said():
    guess("3.a", seconds=2.0)
    assert told("3.a", seconds=1.1, within=1.0).right == 1
    assert told("3.a", seconds=1.1).right == 0
    guess("3.b", seconds=2.3, loss=-1e9)
    assert told("3.b", seconds=1.1, loss=1.0, within=1.0).right == 0  # of what is right
