"""The course's Triton: fenced tensors, the watch on addresses, altered kernels, their checks."""

import subprocess
import sys

import numpy as np
import pytest

from miniflamingo.course.checks import check
from miniflamingo.course.checks.kernel_runs import expect_stored
from miniflamingo.kernels import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

from miniflamingo.kernels.common.runtime import INTERPRET

if not INTERPRET.value:
    pytest.skip("kernels are compiled for the GPU here", allow_module_level=True)

from miniflamingo.course.triton_cpu import FENCE, Watch, altered, fenced, tl, torch, triton


@triton.jit
def copy(x_ptr, out_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i + SHIFT, i < n), i < n)


@triton.jit
def stub(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """A docstring is no answer yet."""
    ...


def watched_copy(x, out, shift=0, kernel=copy):
    with Watch(x=x, out=out) as watch:
        kernel[(3,)](x, out, 10, SHIFT=shift, BLOCK=4)
    return watch


def test_a_fenced_tensor_equals_its_array_and_keeps_its_strides():
    wide = np.arange(24.0).reshape(4, 6)
    for array in (wide, wide[:, 1:3], wide.T, np.arange(5)):
        tensor = fenced(array)
        assert np.array_equal(tensor.numpy(), array)
        assert [s * array.itemsize for s in tensor.stride()] == list(array.strides)
        memory = torch.as_strided(tensor, (FENCE,), (1,), 0)
        assert memory.isnan().all() if memory.is_floating_point() else (memory == -1).all()
    beyond = torch.as_strided(fenced(wide[:, :2]), (6,), (1,), FENCE)
    assert beyond.tolist() == wide[0].tolist()  # what lies between the rows


def test_the_watch_lists_what_each_program_touches():
    watch = watched_copy(torch.arange(10.0), torch.zeros(10))
    assert watch.fault is None and not watch.ended
    assert [(p, n, o.tolist()) for p, n, o in watch.loads] == [
        (0, "x", [0, 1, 2, 3]), (1, "x", [4, 5, 6, 7]), (2, "x", [8, 9]),
    ]  # fmt: skip
    assert watch.count(watch.stores, "out") == 10 and watch.count(watch.stores, "x") == 0


def test_the_watch_tells_a_stray_access_and_goes_on_inside_the_fence():
    x, out = fenced(np.arange(10.0)), fenced(np.zeros(10))
    watch = watched_copy(x, out, shift=1)
    assert watch.fault == (
        "program 2 reads x at offset 10, where it has no element (its last is at 9)"
    )
    assert not watch.ended and torch.isnan(out[9]) and out[8] == 9


def test_the_watch_ends_a_run_before_it_touches_unknown_memory():
    out = torch.zeros(10)
    watch = watched_copy(torch.arange(10.0), out, shift=10**9)
    assert watch.ended and watch.fault == "program 0 reads far outside all tensors"
    assert not out.any()


def test_the_watch_is_gone_after_its_block_and_lets_other_errors_pass():
    from triton.runtime.interpreter import interpreter_builder

    with pytest.raises(ZeroDivisionError), Watch():
        raise ZeroDivisionError
    assert "create_masked_load" not in vars(interpreter_builder)


def test_an_altered_kernel_differs_in_one_place():
    twice = altered(copy, "tl.load(x_ptr + i + SHIFT, i < n)", "2 * tl.load(x_ptr + i, i < n)")
    x, out = torch.arange(10.0), torch.zeros(10)
    watched_copy(x, out, kernel=twice)
    assert torch.equal(out, 2 * x)
    for old in ("tl.load(y_ptr", "i < n"):
        with pytest.raises(ValueError, match=r"must stand once in copy, it does [02] times"):
            altered(copy, old, "")


def test_a_stub_is_not_done_yet():
    assert repr(check("12.1", stub)).startswith("○ exercise 12.1: not done yet")


def test_the_right_numbers_without_a_kernel_are_not_enough():
    assert "no kernel stored them" in check("12.1", lambda x, y, n: x + y).message
    forgotten = check("12.1", stub.fn)
    assert "your code stops with TypeError" in forgotten.message
    assert "is @triton.jit missing above it?" in forgotten.message


def test_where_triton_is_missing_a_check_says_so(monkeypatch):
    reason = "the kernels need triton, not installed here"
    monkeypatch.setattr("miniflamingo.kernels.unavailable", lambda: reason)
    assert check("12.1", lambda x, y, n: x + y).message == reason
    with pytest.raises(Exception, match="a function is wanted"):
        expect_stored(None, 1, {}, 0.0)


def test_the_other_modules_need_no_torch():
    code = "import sys, miniflamingo.course; print({'torch', 'triton'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "set()"


def test_where_triton_is_missing_the_module_says_so(monkeypatch):
    monkeypatch.setattr("miniflamingo.kernels.unavailable", lambda: "the kernels need triton")
    monkeypatch.delitem(sys.modules, "miniflamingo.course.triton_cpu")
    with pytest.raises(ImportError, match="this module runs Triton kernels, and the kernels need"):
        import miniflamingo.course.triton_cpu  # noqa: F401
