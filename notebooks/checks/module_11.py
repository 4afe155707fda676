"""Checks of module 11: vector add, softmax of rows, a tile of attention, a program's offsets."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.functional import softmax

from .core import call, exercise, expect
from .kernel_runs import expect_stored

# --- 11.1: vector add -----------------------------------------------------------------------------


@exercise("11.1")
def add(answer):
    """answer: a kernel (x_ptr, y_ptr, out_ptr, n, BLOCK)."""
    for n, BLOCK in ((10, 4), (8, 8), (13, 2)):
        x, y = np.random.default_rng(n).normal(size=(2, n)).astype(np.float32)
        programs = -(-n // BLOCK)
        arguments = {"x_ptr": x, "y_ptr": y, "out_ptr": None, "n": n}
        mistakes = list(_add_mistakes(x, y, BLOCK, programs))
        hint = ": mask both loads and the store with i < n, where i = pid * BLOCK + 0, 1, 2, ..."
        expect_stored(answer, programs, arguments, x + y, mistakes, hint, BLOCK=BLOCK)


def _add_mistakes(x, y, BLOCK, programs):
    right = x + y
    yield (
        "pid is not multiplied by BLOCK: program 1 begins at place 1, and the end is never written",
        _written(right, BLOCK + programs - 1),
    )
    yield (
        "every program does the same places: tl.program_id(0) says which program this is",
        _written(right, BLOCK),
    )
    yield "one place a program: tl.arange(0, BLOCK) is missing", _written(right, programs)
    yield "y is read at one place only: add the offsets i to y_ptr, too", x + y[0]
    yield "x is read at one place only: add the offsets i to x_ptr, too", x[0] + y
    yield "this is a copy of x: y is not added", x
    yield "this is a copy of y: x is not added", y
    yield "out = x - y, but x + y is asked for", x - y
    yield "out = x * y, but x + y is asked for", x * y


def _written(right, count):
    """`right`, of which only the first `count` rows are stored."""
    out = np.array(right, float)
    out[count:] = np.nan
    return out


# --- 11.2: the softmax of rows --------------------------------------------------------------------


def softmax_case(rows, n, gap, shift):
    """x float32 [rows, n], a view of a wider matrix; row 1 is `shift` higher than the others."""
    wide = 3 * np.random.default_rng(n).normal(size=(rows, n + gap)).astype(np.float32)
    wide[1] += shift
    return wide[:, :n]


@exercise("11.2")
def row_softmax(answer):
    """answer: a kernel (x_ptr, out_ptr, x_row, n, BLOCK); out [rows, n] is contiguous."""
    for rows, n, BLOCK, gap, shift in ((3, 5, 8, 4, 0), (3, 5, 8, 4, 200), (4, 8, 8, 0, 0)):
        x = softmax_case(rows, n, gap, shift)
        arguments = {"x_ptr": x, "out_ptr": None, "x_row": n + gap, "n": n}
        mistakes = list(_softmax_mistakes(x, BLOCK))
        hint = ": is the mask column < n there, and is the row's stride right (x_row for x, n for "
        hint += "out)?"
        right = softmax(x.astype(float))
        expect_stored(answer, rows, arguments, right, mistakes, hint, BLOCK=BLOCK)


def _softmax_mistakes(x, BLOCK):
    (rows, n), right, e = x.shape, softmax(x.astype(float)), np.exp(x)
    shifted = np.exp(x - x.max(axis=1, keepdims=True))
    padded = np.pad(x, ((0, 0), (0, BLOCK - n)))
    yield (
        "the maximum is not subtracted: exp of 200 is infinite in float32",
        e / e.sum(axis=1, keepdims=True),
    )
    yield (
        "the padding takes part in the softmax as zeros: load with other=-inf",
        softmax(padded)[:, :n],
    )
    flat = x.base.ravel()
    packed = np.stack([flat[r * n : (r + 1) * n] for r in range(rows)])
    yield "wrong stride: row r of x begins at r * x_row, not at r * n", softmax(packed)
    yield "all rows are the first one: add pid * x_row to x_ptr", right[[0] * rows]
    yield (
        "only the first row is written: add pid * n to out_ptr",
        _written(right[[rows - 1]].repeat(rows, 0), 1),
    )
    yield "not divided by the sum of the row", shifted
    yield "the exponentials without the maximum, not divided by their sum", e
    two = np.exp2(x - x.max(axis=1, keepdims=True))
    yield (
        "exp2 is a power of 2: multiply by log2(e) first, or use tl.exp",
        two / two.sum(axis=1, keepdims=True),
    )
    yield "this is the maximum subtracted, without exp", x - x.max(axis=1, keepdims=True)


# --- 11.3: a tile of attention --------------------------------------------------------------------


def attention_case(M, R, K):
    """q [M, K], k and v [R, K], float32."""
    rng = np.random.default_rng(R)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((M, K), (R, K), (R, K))]


@exercise("11.3")
def tile(answer):
    """answer: a kernel (q_ptr, k_ptr, v_ptr, out_ptr, M, R, K, BLOCK_M, BLOCK_R)."""
    for M, R, K in ((21, 5, 16), (16, 16, 32)):
        q, k, v = attention_case(M, R, K)
        arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": None, "M": M, "R": R}
        constants = dict(K=K, BLOCK_M=16, BLOCK_R=16)
        mistakes = [*_tile_mistakes(q, k, v), *_axis_mistakes(q, k, v)]
        hint = ": mask the rows, m < M for q and out, r < R for k and v; a row has K elements"
        right = attention(*(x.astype(float) for x in (q, k, v)))
        expect_stored(answer, -(-M // 16), arguments, right, mistakes, hint, **constants)


def _tile_mistakes(q, k, v, BLOCK=16):
    (M, K), R = q.shape, len(k)
    scores = q @ k.T / np.sqrt(K)
    with_padding = np.pad(scores, ((0, 0), (0, BLOCK - R)))  # padded keys: score 0, value 0
    yield (
        "padded keys take part in the softmax: their score is 0, it must be -inf (tl.where, r < R)",
        softmax(with_padding)[:, :R] @ v,
    )
    yield "the scale is missing: divide the scores by sqrt(K)", softmax(q @ k.T) @ v
    yield (
        "the scale is missing, and padded keys take part with a score of 0",
        softmax(with_padding * np.sqrt(K))[:, :R] @ v,
    )
    yield "divide the scores by sqrt(K), not by K", softmax(q @ k.T / K) @ v
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    yield "not divided by the sum of the row", shifted @ v
    yield (
        "the weights belong on the VALUES, this multiplies them with the keys",
        softmax(scores) @ k,
    )
    two = np.exp2(scores - scores.max(axis=1, keepdims=True))
    yield (
        "exp2 is a power of 2: multiply by log2(e) first, or use tl.exp",
        two / two.sum(axis=1, keepdims=True) @ v,
    )
    yield "all weights are equal: are the scores used?", np.broadcast_to(v.mean(axis=0), (M, K))


def _axis_mistakes(q, k, v, BLOCK=16):
    (M, K), R = q.shape, len(k)
    scores = q @ k.T / np.sqrt(K)
    tiles = np.pad(scores, ((0, -M % BLOCK), (0, 0))).reshape(-1, BLOCK, R)
    columns = softmax(tiles.swapaxes(1, 2)).swapaxes(1, 2).reshape(-1, R)[:M]
    yield (
        "softmax over the wrong axis: a row of scores is one query's, so reduce over axis 1",
        columns @ v,
    )
    yield (
        "everything is NaN: is the softmax over the wrong axis? A padded key's column holds only "
        "-inf; a row, over axis 1, never does",
        np.full((M, K), np.nan),
    )
    right, programs = softmax(scores) @ v, -(-M // BLOCK)
    yield "pid is not multiplied by BLOCK_M", _written(right, BLOCK + programs - 1)
    yield "every program does the same rows: tl.program_id(0)", _written(right, BLOCK)


# --- 11.4: the offsets of a program ---------------------------------------------------------------


def item_case():
    """A work list of two rows, without its empty items: H, items, order, strides of q and k.

    phi = [2, 1, 1, 2, 0, 2, 1, 2], [0, 1, 1, 0, 1, 0, 0, 1] and at most 3 tokens an item.
    """
    order = np.array([[4, 1, 2, 6, 0, 3, 5, 7], [0, 3, 5, 6, 1, 2, 4, 7]])
    first = [[0, 0, 0, 1, -1], [0, 1, 1, 4, -1], [0, 2, 4, 7, 0], [0, 2, 7, 8, 1]]
    second = [[1, 0, 0, 3, -1], [1, 0, 3, 4, -1], [1, 1, 4, 7, 2], [1, 1, 7, 8, 3]]
    items = np.array(first + second)
    return 3, items, order, (8 * 48 + 7, 48, 16), (2 * 240 + 5, 240, 48, 16)


@exercise("11.4")
def offsets(answer):
    """answer(pid, H, items, order, q_strides, k_strides) -> int[tokens, 2]."""
    case = item_case()
    for pid in (4, 7, 8, 11, 20, 22):
        right = offsets_of(pid, *case)
        mistakes = [*_lookup_mistakes(pid, *case), *_term_mistakes(pid, *case)]
        expect(call(answer, pid, *case), right, mistakes)


def offsets_of(pid, H, items, order, q_strides, k_strides, split=divmod, image_at=-1, by="order"):
    """Equation (5), with places for mistakes."""
    item, h = split(pid, H)
    b, image, begin, end, _ = items[min(item, len(items) - 1)]
    token = np.arange(begin, end) if by == "place" else order[b if by == "order" else 0, begin:end]
    q = b * q_strides[0] + token * q_strides[1] + h * q_strides[2]
    k = b * k_strides[0] + (image + image_at) * k_strides[1] + h * k_strides[3]
    return np.stack([q, np.full(len(q), k)], axis=1)


def _lookup_mistakes(pid, *case):
    def with_(**mistake):
        return offsets_of(pid, *case, **mistake)

    yield (
        "the items come first: item = pid // H, head = pid % H; here they are exchanged",
        with_(split=lambda pid, H: (pid % H, pid // H)),
    )
    yield (
        "one program an item AND head: pid is not the item, pid // H is",
        with_(split=lambda pid, H: (pid, pid % H)),
    )
    yield (
        "images are counted from 1: the keys of image j stand at (j - 1) * k_n",
        with_(image_at=0),
    )
    yield (
        "begin..end are places in order, not tokens: look them up, order[b, begin:end]",
        with_(by="place"),
    )
    yield "order has a row for each page: look up row b, not row 0", with_(by="row 0")


def _term_mistakes(pid, H, items, order, q_strides, k_strides):
    right = offsets_of(pid, H, items, order, q_strides, k_strides)
    (b, *_), h = items[pid // H], pid % H
    (q_b, _, q_h), (k_b, _, k_r, k_h) = q_strides, k_strides
    yield "the batch row is missing in both columns", right - [b * q_b, b * k_b]
    yield "the batch row is missing in q's offset: b * q_b", right - [b * q_b, 0]
    yield "the batch row is missing in k's offset: b * k_b", right - [0, b * k_b]
    yield "the head is missing: h * q_h for q and h * k_h for k", right - [h * q_h, h * k_h]
    yield "the head is missing in q's offset: h * q_h", right - [h * q_h, 0]
    yield "the head is missing in k's offset: h * k_h", right - [0, h * k_h]
    yield (
        "k's head stride is the last of k_strides = (k_b, k_n, k_r, k_h); this takes k_r",
        right - [0, h * (k_h - k_r)],
    )
    yield "the columns are exchanged: first q's offsets, then k's", right[:, ::-1]
    yield "one row for each token of the item, two columns; this is turned", right.T
