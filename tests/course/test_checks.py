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
from miniflamingo.course.checks.module_07 import faults_of, one_head
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


def harness(attend, q, k, v, phi, **probe):
    return faults_of(reached_as_in_the_notebook(attend, q, k, v, phi, **probe), phi[0])


def harness_by_loops(attend, q, k, v, phi):
    table, faults = reached_by_noise(attend, q, k, v, phi), np.zeros((3, phi.shape[1]), bool)
    for token, own in enumerate(phi[0]):
        seen = {image + 1 for image in np.flatnonzero(table[token])}
        faults[:, token] = (
            any(image < own for image in seen),
            any(image > own for image in seen),
            own > 0 and own not in seen,
        )
    return faults


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
    ("7.1", lambda t, i: np.cumsum(t == i, axis=1)),
    ("7.1", phi_by_loops),
    ("7.1", compute_phi),
    ("7.2", lambda t, i: compute_phi(t, i, use_next=True)),
    ("7.2", next_by_reversal),
    ("7.3", image_causal_mask),
    ("7.3", mask_by_loops),
    ("7.4", attend),
    ("7.4", attention_by_gathering),
    ("7.4", one_head),
    ("7.5", harness),
    ("7.5", harness_by_loops),
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


def next_until(tokens, image_token, last):
    after = following(tokens, image_token)
    return np.where(after > last(total(tokens, image_token)), 0, after)


def overflowing(q, k, v, phi):
    B, N, R, K = k.shape
    e = np.exp(q @ k.reshape(B, N * R, K).swapaxes(1, 2) / np.sqrt(K))
    e = e * image_causal_mask(phi, N, R)
    total = e.sum(axis=-1, keepdims=True)
    return np.where(total == 0, 0, e / np.where(total == 0, 1, total)) @ v.reshape(B, N * R, K)


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
    return harness(attend, q, k, v, phi, keys=ramp, values=0)


def accumulating(attend, q, k, v, phi):
    before, table = attend(q, k, v, phi), []
    k, v = k.copy(), v.copy()
    for j in range(k.shape[1]):
        k[:, j] += 1
        v[:, j] += 1
        table.append((attend(q, k, v, phi) != before).any(axis=-1)[0])
    return faults_of(np.stack(table, axis=1), phi[0])


def all_tokens_at_once(attend, q, k, v, phi):
    table = reached_as_in_the_notebook(attend, q, k, v, phi)
    return faults_of(np.broadcast_to(table.any(axis=0), table.shape), phi[0])


def with_own_images(attend, q, k, v, phi, row=0):
    faults = harness(attend, q, k, v, phi)
    faults[row] |= (phi[0] > 0) & ~faults[2]
    return faults


def blind_without_an_image(attend, q, k, v, phi):
    return harness(attend, q, k, v, phi) | [[False], [False], [True]] * (phi == 0)


def imageless_forgotten(attend, q, k, v, phi):
    return harness(attend, q, k, v, phi) & (phi > 0)


def one_column_off(attend, q, k, v, phi):
    return faults_of(np.roll(reached_as_in_the_notebook(attend, q, k, v, phi), 1, 1), phi[0])


def in_place(attend, q, k, v, phi):
    before, table = attend(q, k, v, phi), []
    for j in range(k.shape[1]):
        k[:, j] += 1
        table.append((attend(q, k, v, phi) != before).any(axis=-1)[0])
    return np.stack(table, axis=1)


WRONG = [
    ("7.5", lambda *a: harness(*a, keys=0), "a leak stays unseen: change image j's keys AND"),
    ("7.5", lambda *a: harness(*a, values=0), "is blind to its own image: False is right"),
    ("7.5", keys_only, "a leak stays unseen: change image j's keys AND"),
    ("7.5", lambda *a: ~harness(*a), "upside down"),
    ("7.5", lambda *a: harness(*a).T, "axes are exchanged"),
    ("7.5", lambda *a: harness(*a)[[1, 0, 2]], "earlier and later are exchanged"),
    ("7.5", with_own_images, "a token's OWN image is neither earlier nor later"),
    ("7.5", lambda *a: with_own_images(*a, row=1), "a token's OWN image is neither earlier"),
    ("7.5", blind_without_an_image, "has no image to be blind to"),
    ("7.5", imageless_forgotten, "every image is a later one"),
    ("7.5", accumulating, "image 1 is still changed"),
    ("7.5", all_tokens_at_once, "compare token by token"),
    ("7.5", one_column_off, "image j is column j - 1"),
    ("7.5", in_place, "changes its argument number 3 in place"),
    ("7.5", lambda *a: harness(*a, keys=np.nan, values=np.nan), "you try it with NaN or inf"),
    ("7.5", lambda *a: harness(*a, keys=np.inf), "you try it with NaN or inf"),
    ("7.5", lambda attend, q, k, v, phi: np.zeros((3, phi.shape[1]), bool), "never calls attend"),
    ("7.5", lambda *a: harness(*a) & [[True], [True], [False]], "is blind to its own image: True"),
    ("7.1", lambda t, i: np.cumsum(t == i, 1) - is_image(t, i), "phi is off by one at <image>"),
    ("7.1", is_image, "marks the <image> tokens alone"),
    ("7.1", lambda t, i: np.cumsum(t == i).reshape(t.shape), "rows leak"),
    ("7.1", lambda t, i: np.cumsum(t == i), "wrong shape: [4, 9] is wanted, got [36]"),
    ("7.1", lambda t, i: np.cumsum(t == i, axis=0), "wrong axis"),
    ("7.1", lambda t, i: np.cumsum(t == i, axis=1) - 1, "counted from 1"),
    ("7.1", lambda t, i: np.cumsum(t == 3, axis=1), "not always 3"),
    ("7.1", lambda t, i: compute_phi(t, i, True), "NEXT image"),
    ("7.1", lambda t, i: total(t, i) - np.cumsum(t == i, 1), "still to come"),
    ("7.1", lambda t, i: np.cumsum(t == i, axis=1) * 1.0, "wrong dtype: int is wanted, got flo"),
    ("7.1", lambda t, i: np.cumsum(t == i, axis=1) * 2, "wrong value at [0, 3]: 1 is right, got 2"),
    ("7.2", lambda t, i: np.cumsum(t == i, axis=1), "PREVIOUS image"),
    ("7.2", lambda t, i: np.cumsum(t == i, axis=1) + 1, "phi is off by one at <image>"),
    ("7.2", following, "after the last image there is no next one: phi = 0 there, not 3"),
    ("7.2", lambda t, i: np.minimum(following(t, i), total(t, i)), "not the last image again"),
    ("7.2", lambda t, i: following(t, i) - 1, "counted from 1"),
    ("7.3", lambda p, N, R: p[:, :, None] >= columns(N, R), "`>=` where `==` was meant: token 7"),
    ("7.3", lambda p, N, R: p[:, :, None] <= columns(N, R), "`<=` where `==` was meant: token 0"),
    ("7.3", lambda p, N, R: p[:, :, None] != columns(N, R), "upside down"),
    ("7.3", lambda p, N, R: p[:, :, None] == columns(N, R) - 1, "images are counted from 1"),
    ("7.3", lambda p, N, R: p[:, :, None] == np.tile(np.arange(N) + 1, R), "repeat, not np.tile"),
    ("7.3", lambda p, N, R: p[:, None] == columns(N, R)[:, None], "axes are exchanged"),
    ("7.3", lambda p, N, R: image_causal_mask(np.maximum(p, 1), N, R), "phi = 0 must see nothing"),
    ("7.3", lambda p, N, R: image_causal_mask(p, N, R) * 1, "wrong dtype: bool is wanted, got"),
    ("7.3", lambda p, N, R: image_causal_mask(p % 2, N, R), "token 7 of row 0 (phi = 2) does not"),
    ("7.4", lambda *a: attend(*a, scale=lambda K: 1), "the scale is missing"),
    ("7.4", lambda *a: attend(*a, scale=lambda K: 1, zero=False), "the scale is missing"),
    ("7.4", lambda *a: attend(*a, scale=lambda K: 1 / K), "sqrt(K), not by K"),
    ("7.4", lambda *a: attend(*a, axis=-2), "wrong softmax axis"),
    ("7.4", lambda *a: attend(*a, late=True), "the mask comes too late"),
    ("7.4", lambda *a: attend(*a, mask=lambda *b: image_causal_mask(*b, only_last=False)),
     "`>=` where `==` was meant: token 5 (phi = 2) also sees image 1, which leaked"),
    ("7.4", lambda *a: attend(*a, mask=lambda p, N, R: np.array(True)), "no mask"),
    ("7.4", lambda q, k, v, phi: attend(q, k, k, phi), "belong on the VALUES"),
    ("7.4", lambda q, k, v, phi: attend(q, k, v, phi % 3 + 1), "off by one"),
    ("7.4", lambda *a: attend(*a, zero=False), "you averaged over ALL images"),
    ("7.4", lambda *a: attend(*a, fill=-np.inf, zero=False), "yours is NaN"),
    ("7.4", with_wrong_zeros(lambda q, k, v, p: attend(q, k, v, p * 0 + 3)), "see the LAST image"),
    ("7.4", with_wrong_zeros(lambda q, k, v, p: attend(q, k, v, p * 0 + 1)), "yours see image 1"),
    ("7.4", with_wrong_zeros(lambda q, k, v, p: q), "yours return their query"),
    ("7.4", lambda q, k, v, phi: k[np.arange(len(k))[:, None], phi], "your code stops with Index"),
    ("7.4", lambda q, k, v, p: one_head(q, k, v, p)[0], "wrong shape: [2, 8, 6] is wanted, got"),
    ("7.4", lambda *a: attend(*a) if len(a[0]) == 2 else attend(*a) * 0, "when phi goes back"),
    ("7.1", lambda t, i: np.cumsum(t == i, axis=1) + 0.0, "right but for that: .astype(int)"),
    ("7.2", lambda t, i: next_until(t, i, np.max), "N is the number of images of the ROW"),
    ("7.2", lambda t, i: next_until(t, i, lambda n: n[0]), "N is the number of images of the ROW"),
    ("7.3", lambda p, N, R: image_causal_mask(p[:1] + 0 * p, N, R), "of row 1 (phi = "),
    ("7.3", lambda p, N, R: image_causal_mask(p, p.max(), R), "wrong shape: [1, 5, 8] is wanted"),
    ("7.4", lambda *a: attend(*a, fill=-100), "your fill is higher than they are"),
    ("7.4", lambda *a: attend(*a, fill=0), "a score of 0 is no mask"),
    ("7.4", lambda q, k, v, p: attend(q, v, k, p), "k and v are exchanged"),
    ("7.4", lambda q, k, v, p: q + attend(q, k, v, p), "q is added"),
    ("7.4", lambda q, k, v, p: attend(q, k, v, p[:1] + 0 * p), "this takes row 0's"),
    ("7.4", lambda q, k, v, p: attend(q, k, v, np.minimum(p, p.max(1).min())), "fewer images"),
    ("7.4", overflowing, "or exp of them all is 0 (subtract the row's maximum)"),
    *[case for others in OTHERS for case in others.WRONG],
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "name"), WRONG)
def test_a_typical_mistake_is_named(number, answer, name):
    result = check(number, answer)
    assert not result.ok and name in result.message, result
    assert "\n" not in repr(result) and repr(result).startswith(f"✗ exercise {number}: ")


ONE_NUMBER = {"0.5"}  # what is asked for is one number at a time
GENERAL = "wrong value", "wrong shape", "wrong dtype", "your code stops", "your kernel stops"


def test_every_exercise_has_two_right_answers_and_six_mistakes_with_a_name():
    for number in EXERCISES:
        assert sum(n == number for n, _ in RIGHT) >= 2, number
        named = [name for n, _, name in WRONG if n == number and not name.startswith(GENERAL)]
        assert len(named) >= 6, (number, named)


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
    (lambda *a: [[1, 2], [3], 4, 5], "wanted, got list"),
    (lambda *a: 7, "wrong shape"),
    (lambda *a: object(), "an array of numbers is wanted"),
    (42, "a function is wanted, got int"),
    (None, "a function is wanted, got NoneType"),
]


@pytest.mark.parametrize("number", EXERCISES)
@pytest.mark.parametrize(("answer", "message"), ANYTHING)
def test_no_answer_makes_a_check_raise(number, answer, message):
    result = check(number, answer)
    if number in ONE_NUMBER and message == "wrong shape":
        message = "wrong value"
    assert not result.ok and message in result.message, result
    assert ("○" in repr(result)) == ("not done yet" in message)


def test_an_unknown_exercise_is_no_error():
    assert "there is no such exercise" in check("99.9", len).message
    assert "cannot be checked" in check("7.1").message


def test_wrong_values_of_a_float_are_quoted():
    message = check("7.4", lambda *a: attend(*a) + 1).message
    assert message.startswith("wrong value at [0, 2, 0]: ")


def test_nan_is_named_with_its_place():
    message = check("7.4", lambda *a: np.where(attend(*a) > 0, np.nan, attend(*a))).message
    assert message.startswith("NaN at [0, 2,")


def test_a_terminal_of_few_letters_shows_a_result(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    result = check("7.1", lambda *a: None)
    assert repr(result) == "? exercise 7.1: not done yet (the function returns nothing)"
    print(result)
    monkeypatch.setattr(sys, "stdout", None)  # there is none under pythonw
    assert repr(result).startswith("○ exercise")
