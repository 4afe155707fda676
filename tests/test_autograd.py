"""The tape: what it records, what it leaves alone, and where gradients end up."""

import threading

import numpy as np
import pytest

from miniflamingo.autograd import Tape, Tensor, array_of, differentiable
from miniflamingo.functional import add, concat, embedding, linear, multiply
from miniflamingo.module import Parameter


@differentiable
def square(x):
    return x * x


@square.gradient
def square_backward(dout, x):
    return 2 * x * dout


def test_the_example_of_the_docstring():
    w = Tensor(np.array([1.0, -2.0, 3.0]))
    with Tape() as tape:
        loss = square(w).sum()
    tape.backward(loss)
    np.testing.assert_array_equal(w.grad, [2, -4, 6])


def test_without_a_tape_arrays_come_out():
    x = np.array([3.0])
    for out in (square(x), square(Tensor(x))):
        assert type(out) is np.ndarray
        assert out == 9
    with Tape() as tape:
        assert type(square(x)) is np.ndarray  # nobody needs a gradient
        assert type(square(Tensor(x, requires_grad=False))) is np.ndarray
    assert tape.records == []


def test_gradients_of_several_uses_and_several_passes_add_up():
    x = Tensor(np.array(3.0))
    for passes in (1, 2):
        with Tape() as tape:
            loss = square(x) + x * x + x  # 2 x^2 + x
        tape.backward(loss)
        assert x.grad == passes * 13


def test_gradients_leaves_grad_untouched():
    x, y = Tensor(np.array(3.0)), Tensor(np.array(5.0))
    with Tape() as tape:
        loss = square(x) * y
    pairs = tape.gradients(loss)
    assert {id(leaf): float(dx) for leaf, dx in pairs} == {id(x): 30, id(y): 9}
    assert x.grad is None
    assert y.grad is None


def test_backward_starts_from_dout():
    x = Tensor(np.array([1.0, 2.0]))
    with Tape() as tape:
        out = square(x)
    tape.backward(out, np.array([10.0, 100.0]))
    np.testing.assert_array_equal(x.grad, [20, 400])


def test_frozen_tensors_and_unused_results_get_nothing():
    x, frozen, aside = Tensor(np.ones(2)), Parameter(np.ones(2)), Tensor(np.ones(2))
    frozen.requires_grad = False
    with Tape() as tape:
        square(aside)
        loss = (x * frozen).sum()
    tape.backward(loss)
    np.testing.assert_array_equal(x.grad, [1, 1])
    assert frozen.grad is None
    assert aside.grad is None


def test_a_gradient_is_told_what_is_needed():
    told = []

    @differentiable
    def product(x, y):
        return x * y

    @product.gradient
    def product_backward(dout, x, y, needs):
        told.append(needs)
        return dout * y if needs[0] else None, dout * x if needs[1] else None

    x = Tensor(np.array(2.0))
    with Tape() as tape:
        loss = product(x, np.array(3.0))
    tape.backward(loss)
    assert told == [(True, False)]
    assert x.grad == 3


def test_an_inner_tape_takes_the_calls_and_gives_back():
    x = Tensor(np.array(2.0))
    with Tape() as outer:
        with Tape() as inner:
            square(x)
        y = square(x)
    assert (len(outer.records), len(inner.records)) == (1, 1)
    outer.backward(y)
    assert x.grad == 4


def test_an_exception_closes_the_tape():
    with pytest.raises(ZeroDivisionError), Tape():
        1 / 0  # noqa: B018
    assert type(square(Tensor(np.array([2.0])))) is np.ndarray


def test_a_tape_records_its_own_thread_only():
    with Tape() as tape:
        thread = threading.Thread(target=lambda: square(Tensor(np.array(1.0))))
        thread.start()
        thread.join()
    assert tape.records == []


def test_arrays_meet_tensors_from_both_sides():
    x = Tensor(np.array([1.0, 2.0]))
    with Tape():
        for out in (np.ones(2) + x, np.ones(2) * x, np.ones(2) - x, np.ones((3, 2)) @ x[:, None]):
            assert isinstance(out, Tensor)


def test_misuse_is_named():
    x = Tensor(np.ones((2, 3)))
    with pytest.raises(TypeError, match="linear: pass the Tensor 'weight' by position"):
        linear(np.ones(3), weight=x)
    with pytest.raises(TypeError, match=r"use tensor\.data"):
        np.exp(np.asarray(x))
    assert repr(Parameter(np.ones((2, 3)))) == "Parameter(shape=(2, 3), dtype=float64)"
    assert (len(x), x.ndim, x.size, x.shape) == (2, 2, 6, (2, 3))


def test_array_of():
    x = np.ones(2)
    assert array_of(Tensor(x)) is x
    assert array_of(x) is x
    assert array_of(None) is None


def test_only_what_leads_to_the_loss_is_run_backwards():
    calls = []

    @differentiable
    def noisy(x):
        return x

    noisy.gradient(lambda dout, x: calls.append(1) or dout)
    x = Tensor(np.ones(2))
    with Tape() as tape:
        noisy(x)
        loss = concat(noisy(x), np.ones(1), axis=0).sum()
    tape.backward(loss)
    assert calls == [1]


def test_integer_arguments_get_no_gradient():
    weight = Tensor(np.ones((3, 2)))
    with Tape() as tape:
        loss = add(embedding(np.array([0, 0]), weight), multiply(weight, 2)[:2]).sum()
    tape.backward(loss)
    np.testing.assert_array_equal(weight.grad, [[4, 4], [2, 2], [0, 0]])
