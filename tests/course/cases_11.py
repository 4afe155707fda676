"""Right and wrong answers to the exercises of module 11, for test_checks.py.

A kernel here has switches for its mistakes, and `With` sets them. Where kernels are not interpreted
(no Triton, or a GPU), an answer that is a kernel skips its test with the reason.
"""

import functools
from types import SimpleNamespace

import numpy as np
import pytest

from miniflamingo.kernels import unavailable

missing = unavailable()
if not missing:
    from miniflamingo.kernels.common.runtime import INTERPRET, tl, triton

    if not INTERPRET.value:
        missing = "the course's kernels are interpreted, and here they are compiled for the GPU"

if missing:

    def jit(function):
        return With(function)

    class With:
        """Stands in for a kernel: whoever calls it is skipped."""

        def __init__(self, *anything, **switches):
            pass

        def __call__(self, *arguments):
            pytest.skip(missing)

    tl = SimpleNamespace(constexpr=None)
else:
    jit = triton.jit

    class With(triton.runtime.KernelInterface):
        """A kernel with some of its switches set."""

        def __init__(self, kernel, **switches):
            self.kernel, self.fn, self.switches = kernel, kernel.fn, switches

        def run(self, *args, **options):
            return self.kernel.run(*args, **options, **self.switches)


# --- 11.1: add ------------------------------------------------------------------------------------


@jit
def add(
    x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, STEP: tl.constexpr = -1,
    LOAD: tl.constexpr = 0, STORE: tl.constexpr = 0, WHAT: tl.constexpr = "x + y",
):  # fmt: skip
    start = tl.program_id(0) * (BLOCK if STEP < 0 else STEP)
    i = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n + LOAD)
    y = tl.load(y_ptr + i, i < n + LOAD)
    if WHAT == "x - y":
        y = -y
    if WHAT == "x":
        y = y * 0
    if WHAT == "y[0]":
        y = tl.load(y_ptr)
    tl.store(out_ptr + i, x + y, i < n + STORE)


@jit
def add_with_clamped_reads(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """The places behind the end read the last element again, and are not stored."""
    x_ptr += tl.program_id(0) * BLOCK
    y_ptr += tl.program_id(0) * BLOCK
    out_ptr += tl.program_id(0) * BLOCK
    last = n - 1 - tl.program_id(0) * BLOCK
    i = tl.minimum(tl.arange(0, BLOCK), last)
    total = tl.load(y_ptr + i) + tl.load(x_ptr + i)
    tl.store(out_ptr + tl.arange(0, BLOCK), total, tl.arange(0, BLOCK) <= last)


@jit
def add_without_masks(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


@jit
def add_without_store(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.load(x_ptr + i, i < n) + tl.load(y_ptr + i, i < n)


@jit
def add_in_place(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, i < n) + tl.load(y_ptr + i, i < n), i < n)


@jit
def add_far_away(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK * 1000000 + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


@jit
def add_of_strange_shapes(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n) + tl.arange(0, 2 * BLOCK), i < n)


# --- 11.2: softmax --------------------------------------------------------------------------------


@jit
def softmax(
    x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr, PACKED: tl.constexpr = False,
    OTHER: tl.constexpr = float("-inf"), MAX: tl.constexpr = True, SUM: tl.constexpr = True,
    LOAD: tl.constexpr = 0, STORE: tl.constexpr = 0, TWO: tl.constexpr = False,
):  # fmt: skip
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * (n if PACKED else x_row) + i, i < n + LOAD, other=OTHER)
    if MAX:
        x -= tl.max(x, 0)
    e = tl.exp2(x) if TWO else tl.exp(x)
    if SUM:
        e /= tl.sum(e, 0)
    tl.store(out_ptr + row * n + i, e, i < n + STORE)


@jit
def softmax_one_by_one(x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr):
    """No tile at all: three loops over the row."""
    x_ptr += tl.program_id(0) * x_row
    out_ptr += tl.program_id(0) * n
    top = tl.load(x_ptr)
    for i in range(1, n):
        top = tl.maximum(top, tl.load(x_ptr + i))
    total = tl.exp(tl.load(x_ptr) - top)
    for i in range(1, n):
        total += tl.exp(tl.load(x_ptr + i) - top)
    for i in range(n):
        tl.store(out_ptr + i, tl.exp(tl.load(x_ptr + i) - top) / total)


@jit
def softmax_of_one_row(x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + tl.program_id(0) * n + i, e / tl.sum(e, 0), i < n)


# --- 11.3: attention ------------------------------------------------------------------------------


@jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    SCALE: tl.constexpr = -0.5, PADDED: tl.constexpr = False, AXIS: tl.constexpr = 1,
    SUM: tl.constexpr = True, STEP: tl.constexpr = 16, ROWS: tl.constexpr = 0,
    KEYS: tl.constexpr = False, STRIDE: tl.constexpr = 0,
):  # fmt: skip
    m = tl.program_id(0) * STEP + tl.arange(0, BLOCK_M)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    q_at = m[:, None] * K + c[None, :]
    k_at = r[:, None] * (K + STRIDE) + c[None, :]
    q = tl.load(q_ptr + q_at, (m < M)[:, None], other=0.0)
    k = tl.load(k_ptr + k_at, (r < R)[:, None], other=0.0)
    v = tl.load((k_ptr if KEYS else v_ptr) + k_at, (r < R)[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k)) * K**SCALE
    if not PADDED:
        scores = tl.where((r < R)[None, :], scores, float("-inf"))
    p = tl.exp(scores - tl.expand_dims(tl.max(scores, AXIS), AXIS))
    if SUM:
        p = p / tl.expand_dims(tl.sum(p, AXIS), AXIS)
    tl.store(out_ptr + q_at, tl.dot(p, v), (m < M + ROWS)[:, None])


@jit
def attend_key_by_key(
    q_ptr, k_ptr, v_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """An online softmax with one key at a time: no tile of scores, no padding."""
    m, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, K)
    place, valid = m[:, None] * K + c[None, :], (m < M)[:, None]
    q = tl.load(q_ptr + place, valid, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, K], tl.float32)
    for r in range(R):
        score = tl.sum(q * tl.load(k_ptr + r * K + c)[None, :], 1) * K**-0.5
        higher = tl.maximum(top, score)
        kept, weight = tl.exp(top - higher), tl.exp(score - higher)
        total = total * kept + weight
        out = out * kept[:, None] + weight[:, None] * tl.load(v_ptr + r * K + c)[None, :]
        top = higher
    tl.store(out_ptr + place, out / total[:, None], valid)


# --- 11.4: offsets --------------------------------------------------------------------------------


def offsets(pid, H, items, order, q, k, swap=False, first=1, look=True, row=1, head=1, whole=False):
    item, h = (pid % H, pid // H) if swap else (pid // H, pid % H)
    b, image, begin, end, _ = items[pid if whole else item]
    out = []
    for place in range(begin, end):
        token = order[b, place] if look else place
        q_at = row * b * q[0] + token * q[1] + head * h * q[2]
        out.append([q_at, row * b * k[0] + (image - first) * k[1] + head * h * k[3]])
    return out


def offsets_by_arrays(pid, H, items, order, q, k):
    (b, image, begin, end, _), h = items[pid // H], pid - pid // H * H
    q_all = np.add.outer(np.arange(2) * q[0], np.arange(8) * q[1]) + h * q[2]  # [B, L]
    q_at = q_all[b][order[b]][begin:end]
    return np.array([q_at, q_at * 0 + np.dot((b, image - 1, 0, h), k)]).T


RIGHT = [
    ("11.1", add),
    ("11.1", add_with_clamped_reads),
    ("11.2", softmax),
    ("11.2", softmax_one_by_one),
    ("11.3", attend),
    ("11.3", attend_key_by_key),
    ("11.4", offsets),
    ("11.4", offsets_by_arrays),
]

WRONG = [
    ("11.1", add_without_masks, "program 2 reads x at offset 10, where it has no element"),
    ("11.1", With(add, LOAD=99), "mask both loads and the store with i < n"),
    ("11.1", With(add, STORE=99), "program 2 writes out at offset 10, where it has no element"),
    ("11.1", With(add, LOAD=1), "reads x at offset 10"),
    ("11.1", With(add, STEP=1), "pid is not multiplied by BLOCK"),
    ("11.1", With(add, STEP=0), "every program does the same places"),
    ("11.1", With(add, WHAT="x - y"), "out = x - y"),
    ("11.1", With(add, WHAT="x"), "this is a copy of x"),
    ("11.1", With(add, WHAT="y[0]"), "y is read at one place only"),
    ("11.1", add_without_store, "stores nothing: tl.store is missing"),
    ("11.1", add_in_place, "writes into x"),
    ("11.1", add_far_away, "far outside all tensors"),
    ("11.1", add_of_strange_shapes, "your kernel stops with"),
    ("11.2", With(softmax, PACKED=True), "wrong stride: row r of x begins at r * x_row"),
    ("11.2", With(softmax, OTHER=0.0), "the padding takes part in the softmax as zeros"),
    ("11.2", With(softmax, MAX=False), "the maximum is not subtracted"),
    ("11.2", With(softmax, SUM=False), "not divided by the sum"),
    ("11.2", With(softmax, TWO=True), "exp2 is a power of 2"),
    ("11.2", With(softmax, LOAD=99), "reads x at offset 5, where it has no element"),
    ("11.2", With(softmax, STORE=99), "program 2 writes out at offset 15"),
    ("11.2", softmax_of_one_row, "all rows are the first one"),
    ("11.3", With(attend, PADDED=True), "padded keys take part in the softmax"),
    ("11.3", With(attend, SCALE=0), "the scale is missing"),
    ("11.3", With(attend, SCALE=0, PADDED=True), "the scale is missing, and padded keys"),
    ("11.3", With(attend, SCALE=-1), "divide the scores by sqrt(K), not by K"),
    ("11.3", With(attend, AXIS=0), "is the softmax over the wrong axis?"),
    ("11.3", With(attend, AXIS=0, PADDED=True), "softmax over the wrong axis"),
    ("11.3", With(attend, SUM=False), "not divided by the sum of the row"),
    ("11.3", With(attend, STEP=1), "pid is not multiplied by BLOCK_M"),
    ("11.3", With(attend, ROWS=99), "writes out at offset 336"),
    ("11.3", With(attend, KEYS=True), "the weights belong on the VALUES"),
    ("11.3", With(attend, STRIDE=1), "reads k at offset"),
    ("11.4", functools.partial(offsets, swap=True), "here they are exchanged"),
    ("11.4", functools.partial(offsets, whole=True), "pid is not the item"),
    ("11.4", functools.partial(offsets, first=0), "images are counted from 1"),
    ("11.4", functools.partial(offsets, look=False), "begin..end are places in order"),
    ("11.4", functools.partial(offsets, row=0), "the batch row is missing in both"),
    ("11.4", functools.partial(offsets, head=0), "the head is missing"),
    ("11.4", lambda *a: np.array(offsets(*a)).T, "this is turned"),
    ("11.4", lambda *a: np.array(offsets(*a))[:, 0], "wrong shape"),
]
