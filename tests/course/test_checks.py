"""The mutation test of the students' checks: each typical mistake is called by its name.

An answer that is right must pass however it is written, and no answer may make a check raise.
"""

import importlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest

from miniflamingo.course.checks import check
from miniflamingo.course.checks.core import EXERCISES
from miniflamingo.course.checks.module_06 import one_head
from miniflamingo.functional import softmax
from miniflamingo.xattn import compute_phi, image_causal_mask

# the cases of the other modules stand beside this file: RIGHT and WRONG of cases_NN.py
OTHERS = [importlib.import_module(p.stem) for p in sorted(Path(__file__).parent.glob("cases_*.py"))]

# --- right answers --------------------------------------------------------------------------------


def phi_by_loops(tokens, image_token):
    return [
        [sum(t == image_token for t in row[: i + 1]) for i in range(len(row))] for row in tokens
    ]


def next_by_reversal(tokens, image_token):
    is_image = tokens == image_token
    to_come = np.cumsum(is_image[:, ::-1], axis=1)[:, ::-1]  # at or after the token
    return np.where(to_come > 0, is_image.sum(axis=1, keepdims=True) - to_come + 1, 0)


def mask_by_loops(phi, N, R):
    mask = np.zeros((*phi.shape, N, R), bool)
    for b, l in np.ndindex(phi.shape):
        if phi[b, l]:
            mask[b, l, phi[b, l] - 1] = True
    return mask.reshape(*phi.shape, N * R)


def attention_by_gathering(q, k, v, phi):
    rows = np.arange(len(phi))[:, None]
    own_k, own_v = k[rows, phi - 1], v[rows, phi - 1]  # [B, L, R, K]
    weights = softmax(np.einsum("blk,blrk->blr", q, own_k) / np.sqrt(q.shape[-1]))
    return np.einsum("blr,blrk->blk", weights, own_v) * (phi > 0)[:, :, None]


def reached_by_noise(attend, q, k, v, phi):
    before = attend(q, k, v, phi)[0]
    table = np.empty((phi.shape[1], k.shape[1]), bool)
    for j in range(k.shape[1]):
        noise = np.zeros_like(k)
        noise[:, j] = np.random.default_rng(j).normal(size=k[:, j].shape)
        table[:, j] = abs(attend(q, k + noise, v - noise, phi)[0] - before).max(axis=1) > 1e-9
    return table


def reached_as_in_the_notebook(attend, q, k, v, phi, keys=1, values=1):
    before, columns = attend(q, k, v, phi), []
    for j in range(k.shape[1]):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, j] += keys
        other_v[:, j] += values
        columns.append((attend(q, other_k, other_v, phi) != before).any(axis=-1)[0])
    return np.stack(columns, axis=1)


def attend(q, k, v, phi, scale=None, fill=-1e9, axis=-1, late=False, zero=True, mask=None):
    """An attention as students write it, with a place for each mistake."""
    B, N, R, K = k.shape
    keys, values = k.reshape(B, N * R, K), v.reshape(B, N * R, K)
    mask = image_causal_mask(phi, N, R) if mask is None else mask(phi, N, R)
    scores = q @ keys.swapaxes(1, 2) * (K**-0.5 if scale is None else scale(K))
    masked = scores if late else np.where(mask, scores, fill)
    e = np.exp(masked - masked.max(axis=axis, keepdims=True))
    weights = e / e.sum(axis=axis, keepdims=True)
    return (weights * mask if zero or late else weights) @ values


RIGHT = [
    ("6.1", lambda t, i: np.cumsum(t == i, axis=1)),
    ("6.1", phi_by_loops),
    ("6.1", compute_phi),
    ("6.2", lambda t, i: compute_phi(t, i, use_next=True)),
    ("6.2", next_by_reversal),
    ("6.3", image_causal_mask),
    ("6.3", mask_by_loops),
    ("6.4", attend),
    ("6.4", attention_by_gathering),
    ("6.4", one_head),
    ("6.5", reached_as_in_the_notebook),
    ("6.5", reached_by_noise),
    *[case for others in OTHERS for case in others.RIGHT],
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_a_right_answer_passes(number, answer):
    result = check(number, answer)
    assert result.ok and bool(result), result
    assert repr(result) == f"✓ exercise {number}: right"


# --- wrong answers --------------------------------------------------------------------------------


def is_image(tokens, image_token):
    return (tokens == image_token).astype(int)


def total(tokens, image_token):
    return is_image(tokens, image_token).sum(axis=1, keepdims=True)


def following(tokens, image_token):
    return np.cumsum(is_image(tokens, image_token), 1) - is_image(tokens, image_token) + 1


def columns(N, R):
    return np.repeat(np.arange(1, N + 1), R)


def with_wrong_zeros(make):
    """Right for tokens with an image, `make(q, k, v, phi)` for the others."""

    def answer(q, k, v, phi):
        none = (phi == 0)[:, :, None]
        return np.where(none, make(q, k, v, phi), attend(q, k, v, phi))

    return answer


def keys_only(attend, q, k, v, phi):
    ramp = np.linspace(1, 2, k[0, 0].size).reshape(k[0, 0].shape)
    return reached_as_in_the_notebook(attend, q, k, v, phi, keys=ramp, values=0)


def accumulating(attend, q, k, v, phi):
    before, table = attend(q, k, v, phi), []
    k, v = k.copy(), v.copy()
    for j in range(k.shape[1]):
        k[:, j] += 1
        v[:, j] += 1
        table.append((attend(q, k, v, phi) != before).any(axis=-1)[0])
    return np.stack(table, axis=1)


def all_tokens_at_once(attend, q, k, v, phi):
    return np.ones((phi.shape[1], 1), bool) & reached_as_in_the_notebook(attend, q, k, v, phi).any(
        0
    )


def in_place(attend, q, k, v, phi):
    before, table = attend(q, k, v, phi), []
    for j in range(k.shape[1]):
        k[:, j] += 1
        table.append((attend(q, k, v, phi) != before).any(axis=-1)[0])
    return np.stack(table, axis=1)


ABOUT = reached_as_in_the_notebook
WRONG = [
    ("6.1", lambda t, i: np.cumsum(t == i, 1) - is_image(t, i), "phi is off by one at <image>"),
    ("6.1", is_image, "marks the <image> tokens alone"),
    ("6.1", lambda t, i: np.cumsum(t == i).reshape(t.shape), "rows leak"),
    ("6.1", lambda t, i: np.cumsum(t == i), "wrong shape: [2, 9] is wanted, got [18]"),
    ("6.1", lambda t, i: np.cumsum(t == i, axis=0), "wrong axis"),
    ("6.1", lambda t, i: np.cumsum(t == i, axis=1) - 1, "counted from 1"),
    ("6.1", lambda t, i: np.cumsum(t == 3, axis=1), "not always 3"),
    ("6.1", lambda t, i: compute_phi(t, i, True), "NEXT image"),
    ("6.1", lambda t, i: total(t, i) - np.cumsum(t == i, 1), "still to come"),
    ("6.1", lambda t, i: np.cumsum(t == i, axis=1) * 1.0, "wrong dtype: int is wanted, got flo"),
    ("6.1", lambda t, i: np.cumsum(t == i, axis=1) * 2, "wrong value at [0, 3]: 1 is right, got 2"),
    ("6.2", lambda t, i: np.cumsum(t == i, axis=1), "PREVIOUS image"),
    ("6.2", lambda t, i: np.cumsum(t == i, axis=1) + 1, "phi is off by one at <image>"),
    ("6.2", following, "after the last image there is no next one: phi = 0 there, not 3"),
    ("6.2", lambda t, i: np.minimum(following(t, i), total(t, i)), "not the last image again"),
    ("6.2", lambda t, i: following(t, i) - 1, "counted from 1"),
    ("6.3", lambda p, N, R: p[:, :, None] >= columns(N, R), "`>=` where `==` was meant: token 7"),
    ("6.3", lambda p, N, R: p[:, :, None] <= columns(N, R), "`<=` where `==` was meant: token 0"),
    ("6.3", lambda p, N, R: p[:, :, None] != columns(N, R), "upside down"),
    ("6.3", lambda p, N, R: p[:, :, None] == columns(N, R) - 1, "images are counted from 1"),
    ("6.3", lambda p, N, R: p[:, :, None] == np.tile(np.arange(N) + 1, R), "repeat, not np.tile"),
    ("6.3", lambda p, N, R: p[:, None] == columns(N, R)[:, None], "axes are exchanged"),
    ("6.3", lambda p, N, R: image_causal_mask(np.maximum(p, 1), N, R), "phi = 0 must see nothing"),
    ("6.3", lambda p, N, R: image_causal_mask(p, N, R) * 1, "wrong dtype: bool is wanted, got"),
    ("6.3", lambda p, N, R: image_causal_mask(p % 2, N, R), "token 7 of row 0 (phi = 2) does not"),
    ("6.4", lambda *a: attend(*a, scale=lambda K: 1), "the scale is missing"),
    ("6.4", lambda *a: attend(*a, scale=lambda K: 1, zero=False), "the scale is missing"),
    ("6.4", lambda *a: attend(*a, scale=lambda K: 1 / K), "sqrt(K), not by K"),
    ("6.4", lambda *a: attend(*a, axis=-2), "wrong softmax axis"),
    ("6.4", lambda *a: attend(*a, late=True), "the mask comes too late"),
    ("6.4", lambda *a: attend(*a, mask=lambda *b: image_causal_mask(*b, only_last=False)),
     "`>=` where `==` was meant: token 5 (phi = 2) also sees image 1, which leaked"),
    ("6.4", lambda *a: attend(*a, mask=lambda p, N, R: np.array(True)), "no mask"),
    ("6.4", lambda q, k, v, phi: attend(q, k, k, phi), "belong on the VALUES"),
    ("6.4", lambda q, k, v, phi: attend(q, k, v, phi % 3 + 1), "off by one"),
    ("6.4", lambda *a: attend(*a, zero=False), "you averaged over ALL images"),
    ("6.4", lambda *a: attend(*a, fill=-np.inf, zero=False), "yours is NaN"),
    ("6.4", with_wrong_zeros(lambda q, k, v, p: attend(q, k, v, p * 0 + 3)), "see the LAST image"),
    ("6.4", with_wrong_zeros(lambda q, k, v, p: attend(q, k, v, p * 0 + 1)), "yours see image 1"),
    ("6.4", with_wrong_zeros(lambda q, k, v, p: q), "yours return their query"),
    ("6.4", lambda q, k, v, phi: k[np.arange(len(k))[:, None], phi], "your code stops with Index"),
    ("6.4", lambda q, k, v, p: one_head(q, k, v, p)[0], "wrong shape: [2, 8, 6] is wanted, got"),
    ("6.4", lambda *a: attend(*a) if len(a[0]) == 2 else attend(*a) * 0, "when phi goes back"),
    ("6.5", lambda *a: ABOUT(*a, keys=0), "a leak stays unseen: change image j's keys AND"),
    ("6.5", lambda *a: ABOUT(*a, values=0), "softmax sees only differences"),
    ("6.5", keys_only, "a leak stays unseen: change image j's keys AND"),
    ("6.5", lambda *a: np.eye(7, 3, dtype=bool), "token 0 does not notice image 1"),
    ("6.5", lambda *a: ~ABOUT(*a), "upside down"),
    ("6.5", lambda *a: ABOUT(*a).T, "axes are exchanged"),
    ("6.5", accumulating, "image 1 is still changed"),
    ("6.5", all_tokens_at_once, "compare token by token"),
    ("6.5", lambda *a: np.roll(ABOUT(*a), 1, 1), "image j is column j - 1"),
    ("6.5", in_place, "changes its argument number 3 in place"),
    *[case for others in OTHERS for case in others.WRONG],
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "name"), WRONG)
def test_a_typical_mistake_is_named(number, answer, name):
    result = check(number, answer)
    assert not result.ok and name in result.message, result
    assert "\n" not in repr(result) and repr(result).startswith(f"✗ exercise {number}: ")


def test_every_exercise_has_two_right_and_four_wrong_answers():
    for number in EXERCISES:
        assert sum(n == number for n, _ in RIGHT) >= 2, number
        assert sum(n == number for n, _, _ in WRONG) >= 4, number


# --- any answer at all ----------------------------------------------------------------------------


def refuse(*arguments):
    raise NotImplementedError


def fail(*arguments):
    raise KeyError("two\nlines")


ANYTHING = [
    (lambda *a: None, "not done yet"),
    (lambda *a: ..., "not done yet"),
    (refuse, "not done yet"),
    (fail, "your code stops with KeyError: 'two\\nlines'"),
    (lambda *a: exit(), "your code stops with SystemExit"),
    (lambda: 0, "your code stops with TypeError"),
    (lambda *a: "a word", "an array of numbers is wanted, got str"),
    (lambda *a: [[1, 2], [3]], "an array is wanted, got list"),
    (lambda *a: 7, "wrong shape"),
    (lambda *a: object(), "an array of numbers is wanted"),
    (42, "a function is wanted, got int"),
    (None, "a function is wanted, got NoneType"),
]


@pytest.mark.parametrize("number", EXERCISES)
@pytest.mark.parametrize(("answer", "message"), ANYTHING)
def test_no_answer_makes_a_check_raise(number, answer, message):
    result = check(number, answer)
    assert not result.ok and message in result.message, result
    assert ("○" in repr(result)) == ("not done yet" in message)


def test_an_unknown_exercise_is_no_error():
    assert "there is no such exercise" in check("99.9", len).message
    assert "cannot be checked" in check("6.1").message


def test_wrong_values_of_a_float_are_quoted():
    message = check("6.4", lambda *a: attend(*a) + 1).message
    assert message.startswith("wrong value at [0, 2, 0]: ")


def test_nan_is_named_with_its_place():
    message = check("6.4", lambda *a: np.where(attend(*a) > 0, np.nan, attend(*a))).message
    assert message.startswith("NaN at [0, 2,")


def test_a_terminal_of_few_letters_shows_a_result(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    result = check("6.1", lambda *a: None)
    assert repr(result) == "? exercise 6.1: not done yet (the function returns nothing)"
    print(result)
    monkeypatch.setattr(sys, "stdout", None)  # there is none under pythonw
    assert repr(result).startswith("○ exercise")
