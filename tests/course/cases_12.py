"""Right and wrong answers to the exercises of module 12, for test_checks.py.

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


# --- 12.1: add ------------------------------------------------------------------------------------


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


@jit
def add_all(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Every program does everything."""
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < n)
        tl.store(out_ptr + i, x + tl.load(y_ptr + i, i < n), i < n)


@jit
def add_overlapping(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Each program does its own block and the one before it."""
    i = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, 2 * BLOCK)
    own = (i >= 0) & (i < n)
    tl.store(out_ptr + i, tl.load(x_ptr + i, own) + tl.load(y_ptr + i, own), own)


# --- 12.2: softmax --------------------------------------------------------------------------------


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
def softmax_without_other(
    x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr, WHERE: tl.constexpr = False
):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * x_row + i, i < n)
    if WHERE:
        x = tl.where(i < n, x, float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + tl.program_id(0) * n + i, e / tl.sum(e, 0), i < n)


@jit
def softmax_of_all_rows(x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr):
    """Every program does every row."""
    i = tl.arange(0, BLOCK)
    for row in range(tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_row + i, i < n, other=float("-inf"))
        e = tl.exp(x - tl.max(x, 0))
        tl.store(out_ptr + row * n + i, e / tl.sum(e, 0), i < n)


@jit
def softmax_of_one_row(x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + tl.program_id(0) * n + i, e / tl.sum(e, 0), i < n)


# --- 12.3: attention ------------------------------------------------------------------------------


@jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    SCALE: tl.constexpr = -0.5, PADDED: tl.constexpr = False, AXIS: tl.constexpr = 1,
    SUM: tl.constexpr = True, STEP: tl.constexpr = 16, ROWS: tl.constexpr = 0,
    KEYS: tl.constexpr = False, STRIDE: tl.constexpr = 0, MAX: tl.constexpr = True,
    BARE: tl.constexpr = "", OTHER: tl.constexpr = 0.0,
):  # fmt: skip
    m = tl.program_id(0) * STEP + tl.arange(0, BLOCK_M)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    q_at = m[:, None] * K + c[None, :]
    k_at = r[:, None] * (K + STRIDE) + c[None, :]
    q = tl.load(q_ptr + q_at, (m < L)[:, None], other=0.0)
    k = tl.load(k_ptr + k_at, (r < R)[:, None], other=OTHER)
    if BARE == "q and k":
        q = tl.load(q_ptr + q_at, (m < L)[:, None])
        k = tl.load(k_ptr + k_at, (r < R)[:, None])
    v = tl.load((k_ptr if KEYS else v_ptr) + k_at, (r < R)[:, None], other=0.0)
    if BARE == "v":
        v = tl.load(v_ptr + k_at, (r < R)[:, None])
    scores = tl.dot(q, tl.trans(k)) * K**SCALE
    if BARE == "keys":
        scores = tl.where((r >= R)[None, :], scores, float("-inf"))
    elif not PADDED:
        scores = tl.where((r < R)[None, :], scores, float("-inf"))
    if MAX:
        scores = scores - tl.expand_dims(tl.max(scores, AXIS), AXIS)
    p = tl.exp(scores)
    if SUM:
        p = p / tl.expand_dims(tl.sum(p, AXIS), AXIS)
    tl.store(out_ptr + q_at, tl.dot(p, v), (m < L + ROWS)[:, None])


@jit
def attend_key_by_key(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """An online softmax with one key at a time: no tile of scores, no padding."""
    m, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, K)
    place, valid = m[:, None] * K + c[None, :], (m < L)[:, None]
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


# --- 12.5: flash attention ------------------------------------------------------------------------


@jit
def flash(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    SCALE: tl.constexpr = -0.5, O: tl.constexpr = True, Z: tl.constexpr = True,
    TURNED: tl.constexpr = False, PADDED: tl.constexpr = False, KEEP: tl.constexpr = True,
    MAX: tl.constexpr = True, ONE: tl.constexpr = False, DIVIDE: tl.constexpr = True,
    KEYS: tl.constexpr = False, STEP: tl.constexpr = 16, INTO_Q: tl.constexpr = False,
):  # fmt: skip
    i, c = tl.program_id(0) * STEP + tl.arange(0, BLOCK_M), tl.arange(0, K)
    at = i[:, None] * K + c[None, :]
    q = tl.load(q_ptr + at, (i < L)[:, None], other=0.0)
    m = tl.full([BLOCK_M], float("-inf") if MAX else 0.0, tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, K], tl.float32)
    for first in range(0, BLOCK_R if ONE else R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        keys = r[:, None] * K + c[None, :]
        k = tl.load(k_ptr + keys, (r < R)[:, None], other=0.0)
        v = tl.load((k_ptr if KEYS else v_ptr) + keys, (r < R)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * K**SCALE
        if not PADDED:
            scores = tl.where((r < R)[None, :], scores, float("-inf"))
        new_m = m
        if MAX:
            new_m = tl.maximum(m, tl.max(scores, 1))
        shrink, e = tl.exp(m - new_m), tl.exp(scores - new_m[:, None])
        if TURNED:
            shrink = tl.where(z > 0, tl.exp(new_m - m), 0.0)
        z = z * (shrink if Z else 1.0) + tl.sum(e, 1)
        o = o * (shrink if O else shrink * 0 + 1)[:, None] + tl.dot(e, v)
        if KEEP:
            m = new_m
    if DIVIDE:
        o /= z[:, None]
    tl.store((q_ptr if INTO_Q else out_ptr) + at, o, (i < L)[:, None])


@jit
def flash_block_by_block(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A softmax for each block, whose outputs are added, without what connects them."""
    i, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, K)
    at, valid = i[:, None] * K + c[None, :], (i < L)[:, None]
    q, o = tl.load(q_ptr + at, valid, other=0.0), tl.zeros([BLOCK_M, K], tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        k = tl.load(k_ptr + r[:, None] * K + c[None, :], (r < R)[:, None], other=0.0)
        v = tl.load(v_ptr + r[:, None] * K + c[None, :], (r < R)[:, None], other=0.0)
        scores = tl.where((r < R)[None, :], tl.dot(q, tl.trans(k)) * K**-0.5, float("-inf"))
        e = tl.exp(scores - tl.max(scores, 1)[:, None])
        o += tl.dot(e / tl.sum(e, 1)[:, None], v)
    tl.store(out_ptr + at, o, valid)


@jit
def flash_two_passes(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """First all maxima, then sums and output: right, only slower."""
    i, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, K)
    at, valid = i[:, None] * K + c[None, :], (i < L)[:, None]
    q = tl.load(q_ptr + at, valid, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        k = tl.load(k_ptr + r[:, None] * K + c[None, :], (r < R)[:, None], other=0.0)
        scores = tl.where((r < R)[None, :], tl.dot(q, tl.trans(k)) * K**-0.5, float("-inf"))
        top = tl.maximum(top, tl.max(scores, 1))
    z, o = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, K], tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        k = tl.load(k_ptr + r[:, None] * K + c[None, :], (r < R)[:, None], other=0.0)
        v = tl.load(v_ptr + r[:, None] * K + c[None, :], (r < R)[:, None], other=0.0)
        scores = tl.where((r < R)[None, :], tl.dot(q, tl.trans(k)) * K**-0.5, float("-inf"))
        e = tl.exp(scores - top[:, None])
        z, o = z + tl.sum(e, 1), o + tl.dot(e, v)
    tl.store(out_ptr + at, o / z[:, None], valid)


# --- 12.4: reads ----------------------------------------------------------------------------------


def reads(H, items, order, q, k, split=divmod, first=1, look=True, row=1, head=1, none=0, more=0,
          n=None):  # fmt: skip
    out = []
    for pid in range(n or len(items) * H):
        item, h = split(pid, H)
        b, image, begin, end, _ = items[item]
        if image == none:
            continue
        for place in range(begin, min(end + more, 8)):
            token = order[b, place] if look else place
            q_at = row * b * q[0] + token * q[1] + head * h * q[2]
            out.append([pid, q_at, row * b * k[0] + (image - first) * k[1] + head * h * k[3]])
    return out


def reads_by_arrays(H, items, order, q, k):
    """Without a loop over the heads: tables of all offsets, a block of rows for each item."""
    heads, blocks = np.arange(H), []
    q_all = np.add.outer(np.arange(2) * q[0], np.arange(8) * q[1])  # [B, L]
    for item, (b, image, begin, end, _) in enumerate(items):
        if image:
            q_at = q_all[b][order[b]][begin:end] + heads[:, None] * q[2]  # [H, tokens]
            k_at = np.dot((b, image - 1, 0), k[:3]) + heads[:, None] * k[3] + 0 * q_at
            pid = item * H + heads[:, None] + 0 * q_at
            blocks.append(np.stack([pid, q_at, k_at], axis=2).reshape(-1, 3))
    return np.concatenate(blocks)


def reads_in_place(H, items, *rest):
    out = reads(H, items, *rest)
    items[:, 1] -= 1
    return out


def exchanged(H, items, *rest):
    return reads(H, items, *rest, split=lambda pid, H: (pid % len(items), pid // len(items)))


def rows_of(change):
    return lambda *case: change(np.array(reads(*case)), *case)


RIGHT = [
    ("12.1", add),
    ("12.1", add_with_clamped_reads),
    ("12.2", softmax),
    ("12.2", softmax_one_by_one),
    ("12.2", With(softmax_without_other, WHERE=True)),
    ("12.3", attend),
    ("12.3", attend_key_by_key),
    ("12.3", With(attend, BARE="q and k")),  # their padded rows are masked or not stored
    ("12.4", reads),
    ("12.4", reads_by_arrays),
    ("12.5", flash),
    ("12.5", flash_two_passes),
]

WRONG = [
    ("12.1", add_without_masks, "program 2 reads x at offset 10, where it has no element"),
    ("12.1", With(add, LOAD=99), "mask both loads and the store with i < n"),
    ("12.1", With(add, STORE=99), "program 2 writes out at offset 10, where it has no element"),
    ("12.1", With(add, LOAD=1), "reads x at offset 10"),
    ("12.1", add_all, "programs 0 and 1 both write out at offset 0: each has places of its own"),
    ("12.1", add_overlapping, "programs 0 and 1 both write out at offset 0"),
    ("12.1", With(add, STEP=1), "pid is not multiplied by BLOCK"),
    ("12.1", With(add, STEP=0), "every program does the same places"),
    ("12.1", With(add, WHAT="x - y"), "out = x - y"),
    ("12.1", With(add, WHAT="x"), "this is a copy of x"),
    ("12.1", With(add, WHAT="y[0]"), "y is read at one place only"),
    ("12.1", add_without_store, "stores nothing: tl.store is missing"),
    ("12.1", add_in_place, "writes into x"),
    ("12.1", add_far_away, "far outside all tensors"),
    ("12.1", add_of_strange_shapes, "your kernel stops with"),
    ("12.2", With(softmax, PACKED=True), "wrong stride: row r of x begins at r * x_row"),
    ("12.2", softmax_without_other, "the padding takes part in the softmax as zeros"),
    ("12.2", softmax_of_all_rows, "programs 0 and 1 both write out"),
    ("12.2", With(softmax, OTHER=0.0), "the padding takes part in the softmax as zeros"),
    ("12.2", With(softmax, MAX=False), "the maximum is not subtracted"),
    ("12.2", With(softmax, SUM=False), "not divided by the sum"),
    ("12.2", With(softmax, TWO=True), "exp2 is a power of 2"),
    ("12.2", With(softmax, LOAD=99), "reads x at offset 5, where it has no element"),
    ("12.2", With(softmax, STORE=99), "program 2 writes out at offset 15"),
    ("12.2", softmax_of_one_row, "all rows are the first one"),
    ("12.3", With(attend, PADDED=True), "padded keys take part in the softmax"),
    ("12.3", With(attend, BARE="v"), "right by luck: what the mask leaves out of v is undefined"),
    ("12.3", With(attend, BARE="keys"), "the keys are masked and the padding is not"),
    ("12.3", With(attend, MAX=False), "NaN where scores are near 100"),
    ("12.3", With(attend, OTHER=float("-inf"), PADDED=True), "k is loaded with other=-inf"),
    ("12.3", With(attend, SCALE=0), "the scale is missing"),
    ("12.3", With(attend, SCALE=0, PADDED=True), "the scale is missing, and padded keys"),
    ("12.3", With(attend, SCALE=-1), "divide the scores by sqrt(K), not by K"),
    ("12.3", With(attend, AXIS=0), "is the softmax over the wrong axis?"),
    ("12.3", With(attend, AXIS=0, PADDED=True), "softmax over the wrong axis"),
    ("12.3", With(attend, SUM=False), "not divided by the sum of the row"),
    ("12.3", With(attend, STEP=1), "pid is not multiplied by BLOCK_M"),
    ("12.3", With(attend, ROWS=99), "writes out at offset 336"),
    ("12.3", With(attend, KEYS=True), "the weights belong on the VALUES"),
    ("12.3", With(attend, STRIDE=1), "reads k at offset"),
    ("12.4", exchanged, "here they are exchanged"),
    ("12.4", functools.partial(reads, split=lambda p, H: (p % 10, p % H)), "pid is not the item"),
    ("12.4", functools.partial(reads, none=-1), "whose item has no image reads nothing"),
    ("12.4", lambda H, items, *a: reads(H, items, *a, n=len(items)), "n * H programs, not n"),
    ("12.4", functools.partial(reads, first=0), "images are counted from 1"),
    ("12.4", functools.partial(reads, look=False), "begin..end are places in order"),
    ("12.4", functools.partial(reads, more=1), "BEHIND the item's last token"),
    ("12.4", functools.partial(reads, more=-1), "last token is missing"),
    ("12.4", functools.partial(reads, row=0), "the batch row is missing in both"),
    ("12.4", functools.partial(reads, head=0), "the head is missing"),
    ("12.4", rows_of(lambda x, *a: x.T), "this is turned"),
    ("12.4", rows_of(lambda x, *a: x[:, 1:]), "number is missing in front"),
    ("12.4", rows_of(lambda x, *a: x[:, [0, 2, 1]]), "the columns are exchanged"),
    ("12.4", rows_of(lambda x, H, *a: x // [H, 1, 1]), "not its item's"),
    ("12.4", rows_of(lambda x, H, *a: sorted(x.tolist(), key=lambda r: r[0] % H)), "side by side"),
    ("12.4", rows_of(lambda x, *a: x[np.diff(x[:, 0], prepend=-1) > 0]), "the first tokens alone"),
    ("12.4", rows_of(lambda x, *a: x[:, 0]), "wrong shape"),
    ("12.4", reads_in_place, "changes its argument number 2 in place"),
    ("12.5", With(flash, O=False, Z=False), "neither the sum nor the output shrinks"),
    ("12.5", With(flash, O=False), "the output so far does not shrink"),
    ("12.5", With(flash, Z=False), "the sum so far does not shrink"),
    ("12.5", With(flash, TURNED=True), "the factor is upside down"),
    ("12.5", With(flash, PADDED=True), "padded keys take part in the softmax"),
    ("12.5", With(flash, SCALE=0), "the scale is missing"),
    ("12.5", With(flash, SCALE=-1), "divide the scores by sqrt(K), not by K"),
    ("12.5", With(flash, DIVIDE=False), "not divided by the sum"),
    ("12.5", With(flash, KEEP=False), "only the last block counts"),
    ("12.5", With(flash, ONE=True), "only the first block of keys is read"),
    ("12.5", With(flash, MAX=False), "NaN where scores are near 100"),
    ("12.5", With(flash, KEYS=True), "the weights belong on the VALUES"),
    ("12.5", With(flash, STEP=1), "pid is not multiplied by BLOCK_M"),
    ("12.5", With(flash, INTO_Q=True), "your kernel writes into q"),
    ("12.5", flash_block_by_block, "each block has a softmax of its own, and their outputs are"),
    ("12.5", attend, "only the first block of keys is read"),
]
