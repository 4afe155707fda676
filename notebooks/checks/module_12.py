"""Checks of module 12: vector add, softmax of rows, tiles of attention, what programs read."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.functional import softmax

from .core import call, exercise, expect
from .kernel_runs import expect_stored

# --- 12.1: vector add -----------------------------------------------------------------------------


@exercise("12.1")
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


# --- 12.2: the softmax of rows --------------------------------------------------------------------


def softmax_case(rows, n, gap, shift):
    """x float32 [rows, n], a view of a wider matrix; row 1 is `shift` higher than the others."""
    wide = 3 * np.random.default_rng(n).normal(size=(rows, n + gap)).astype(np.float32)
    wide[1] += shift
    return wide[:, :n]


@exercise("12.2")
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


# --- 12.3: a tile of attention --------------------------------------------------------------------


def attention_case(L, R, K):
    """q [L, K], k and v [R, K], float32."""
    rng = np.random.default_rng(R)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((L, K), (R, K), (R, K))]


@exercise("12.3")
def tile(answer):
    """answer: a kernel (q_ptr, k_ptr, v_ptr, out_ptr, L, R, K, BLOCK_M, BLOCK_R)."""
    for L, R, K in ((21, 5, 16), (16, 16, 32)):
        q, k, v = attention_case(L, R, K)
        arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": None, "L": L, "R": R}
        constants = dict(K=K, BLOCK_M=16, BLOCK_R=16)
        mistakes = [*_tile_mistakes(q, k, v), *_axis_mistakes(q, k, v)]
        hint = ": mask the rows, row < L for q and out, r < R for k and v; a row has K elements"
        right = attention(*(x.astype(float) for x in (q, k, v)))
        expect_stored(answer, -(-L // 16), arguments, right, mistakes, hint, **constants)
    q, k, v = raised(*attention_case(21, 5, 16))
    arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": None, "L": 21, "R": 5}
    right = attention(*(x.astype(float) for x in (q, k, v)))
    constants = dict(K=16, BLOCK_M=16, BLOCK_R=16, loose=30)
    expect_stored(answer, 2, arguments, right, [(HIGH, np.full(q.shape, np.nan))], **constants)


HIGH = "NaN where scores are near 100: exp is infinite there in float32, subtract the row's maximum"


def raised(q, k, *others):
    """The same scores and 100: all weights are as before."""
    q[:, 0], k[:, 0] = 40, 10 * q.shape[1] ** 0.5 / 4
    return q, k, *others


def _tile_mistakes(q, k, v, BLOCK=16):
    (L, K), R = q.shape, len(k)
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
    if R < BLOCK:
        words = "the keys are masked and the padding is not: tl.where(r < R, scores, -inf)"
        yield words, np.zeros((L, K))
    yield "all weights are equal: are the scores used?", np.broadcast_to(v.mean(axis=0), (L, K))


def _axis_mistakes(q, k, v, BLOCK=16):
    (L, K), R = q.shape, len(k)
    scores = q @ k.T / np.sqrt(K)
    tiles = np.pad(scores, ((0, -L % BLOCK), (0, 0))).reshape(-1, BLOCK, R)
    columns = softmax(tiles.swapaxes(1, 2)).swapaxes(1, 2).reshape(-1, R)[:L]
    yield (
        "softmax over the wrong axis: a row of scores is one query's, so reduce over axis 1",
        columns @ v,
    )
    yield (
        "everything is NaN: is the softmax over the wrong axis? A padded key's column holds only "
        "-inf; a row, over axis 1, never does",
        np.full((L, K), np.nan),
    )
    right, programs = softmax(scores) @ v, -(-L // BLOCK)
    yield "pid is not multiplied by BLOCK_M", _written(right, BLOCK + programs - 1)
    yield "every program does the same rows: tl.program_id(0)", _written(right, BLOCK)


# --- 12.4: what all programs read -----------------------------------------------------------------


def item_case():
    """A work list of two rows: H, items, order, strides of q and k.

    phi = [2, 1, 1, 2, 0, 2, 1, 2], [0, 1, 1, 0, 1, 0, 0, 1] and at most 3 tokens an item. Two items
    have no token: a spare one, and one of an image that nobody looks at.
    """
    order = np.array([[4, 1, 2, 6, 0, 3, 5, 7], [0, 3, 5, 6, 1, 2, 4, 7]])
    first = [[0, 0, 0, 1, -1], [0, 1, 1, 4, -1], [0, 2, 4, 7, 0], [0, 2, 7, 8, 1]]
    second = [
        [1, 0, 0, 3, -1],
        [1, 0, 3, 4, -1],
        [1, 0, 4, 4, -1],
        [1, 1, 4, 7, 2],
        [1, 1, 7, 8, 3],
    ]
    items = np.array([*first, *second, [1, 2, 8, 8, -1]])
    return 3, items, order, (8 * 48 + 7, 48, 16), (2 * 240 + 5, 240, 48, 16)


@exercise("12.4")
def reads(answer):
    """answer(H, items, order, q_strides, k_strides) -> int[reads, 3]."""
    H, items, order, *strides = item_case()
    fewer = 2, np.flipud(items)[1:], order, (400, 50, 6), (600, 200, 40, 6)
    for case in ((H, items, order, *strides), fewer):
        mistakes = [*_lookup_mistakes(*case), *_term_mistakes(*case)]
        expect(call(answer, *case), reads_of(*case), mistakes)


def reads_of(H, items, order, q_strides, k_strides, split=divmod, image_at=-1, by="order",
             skip=lambda image: image == 0, last=0, programs=None):  # fmt: skip
    """Equation (5) for all programs, with places for mistakes."""
    found = []
    for pid in range(len(items) * H if programs is None else programs):
        item, h = split(pid, H)
        b, image, begin, end, _ = items[min(item, len(items) - 1)]
        places = np.arange(begin, max(end + last, begin))
        row = order[b if by == "order" else 0]
        k = b * k_strides[0] + (image + image_at) * k_strides[1] + h * k_strides[3]
        for token in () if skip(image) else places if by == "place" else row[places[places < 8]]:
            found.append((pid, b * q_strides[0] + token * q_strides[1] + h * q_strides[2], k))
    return np.array(found).reshape(-1, 3)


def _lookup_mistakes(H, items, *rest):
    def with_(**mistake):
        return reads_of(H, items, *rest, **mistake)

    n = len(items)
    yield (
        "a program whose item has no image reads nothing: phi = 0 is no image",
        with_(skip=lambda image: False),
    )
    yield "one program an item AND head: there are n * H programs, not n", with_(programs=n)
    yield (
        "the items come first: item = pid // H, head = pid % H; here they are exchanged",
        with_(split=lambda pid, H: (pid % n, pid // n)),
    )
    yield (
        "one program an item AND head: pid is not the item, pid // H is",
        with_(split=lambda pid, H: (pid % n, pid % H)),
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
    yield "end is the place BEHIND the item's last token: begin:end", with_(last=1)
    yield "the item's last token is missing: begin:end ends before end by itself", with_(last=-1)


def _term_mistakes(H, items, order, q_strides, k_strides):
    right = reads_of(H, items, order, q_strides, k_strides)
    pid = right[:, 0]
    b, h, none = items[pid // H, 0], pid % H, 0 * pid
    (q_b, _, q_h), (k_b, _, k_r, k_h) = q_strides, k_strides

    def without(q, k):
        return right - np.stack([none, q, k], axis=1)

    yield "the batch row is missing in both columns", without(b * q_b, b * k_b)
    yield "the batch row is missing in q's offset: b * q_b", without(b * q_b, none)
    yield "the batch row is missing in k's offset: b * k_b", without(none, b * k_b)
    yield "the head is missing: h * q_h for q and h * k_h for k", without(h * q_h, h * k_h)
    yield "the head is missing in q's offset: h * q_h", without(h * q_h, none)
    yield "the head is missing in k's offset: h * k_h", without(none, h * k_h)
    yield (
        "k's head stride is the last of k_strides = (k_b, k_n, k_r, k_h); this takes k_r",
        without(none, h * (k_h - k_r)),
    )
    yield "the columns are exchanged: program, q's offset, k's offset", right[:, [0, 2, 1]]
    yield (
        "the first column is the PROGRAM's number, not its item's",
        np.stack([pid // H, *right.T[1:]], axis=1),
    )
    yield "the program's number is missing in front: [reads, 3]", right[:, 1:]
    yield "one row for each read, three columns; this is turned", right.T
    by_head = np.argsort(h, kind="stable")
    yield "in the order of the programs: the heads of an item stand side by side", right[by_head]
    yield (
        "one row for each TOKEN of an item: these are the first tokens alone",
        right[np.unique(pid, return_index=True)[1]],
    )


# --- 12.5: flash attention ------------------------------------------------------------------------


@exercise("12.5")
def flash(answer):
    """answer: a kernel (q_ptr, k_ptr, v_ptr, out_ptr, L, R, K, BLOCK_M, BLOCK_R), R any."""
    for L, R, K in ((21, 40, 16), (16, 5, 16), (16, 64, 32)):
        q, k, v = attention_case(L, R, K)
        k[R // 2] *= 4  # a maximum that grows on the way
        hint = ": mask the rows, row < L for q and out, key < R for k and v in every block"
        mistakes = [*_flash_mistakes(q, k, v), *_axis_mistakes(q, k, v)]
        _expect_flash(answer, q, k, v, mistakes, hint)
    q, k, v = raised(*attention_case(21, 40, 16))
    _expect_flash(answer, q, k, v, [(HIGH, np.full(q.shape, np.nan))], loose=30)


def _expect_flash(answer, q, k, v, mistakes, hint="", **options):
    arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": None, "L": len(q), "R": len(k)}
    right = attention(*(x.astype(float) for x in (q, k, v)))
    constants = dict(K=q.shape[1], BLOCK_M=16, BLOCK_R=16, **options)
    expect_stored(answer, -(-len(q) // 16), arguments, right, mistakes, hint, **constants)


def _online(q, k, v, o=True, z=True, turned=False, pad=False, scale=-0.5, BLOCK=16):
    """The online softmax; o and z: whether they shrink. -> output and sum of each row."""
    m, sums, out = np.full((len(q), 1), -np.inf), 0.0, 0.0
    if pad:
        k, v = (np.pad(x, ((0, -len(k) % BLOCK), (0, 0))) for x in (k, v))
    for first in range(0, len(k), BLOCK):
        scores = q.astype(float) @ k[first : first + BLOCK].T * q.shape[1] ** scale
        new_m = np.maximum(m, scores.max(axis=1, keepdims=True))
        shrink = np.exp(new_m - m if turned and first else m - new_m)
        e = np.exp(scores - new_m)
        sums = sums * (shrink if z else 1) + e.sum(axis=1, keepdims=True)
        out = out * (shrink if o else 1) + e @ v[first : first + BLOCK]
        m = new_m
    return out, sums


def _flash_mistakes(q, k, v, BLOCK=16):
    def with_(**mistake):
        out, sums = _online(q, k, v, **mistake)
        return out / sums

    yield "neither the sum nor the output shrinks when the maximum grows", with_(o=False, z=False)
    words = "does not shrink when the maximum grows: multiply it by exp(m - new_m)"
    yield f"the output so far {words}", with_(o=False)
    yield f"the sum so far {words}", with_(z=False)
    yield "the factor is upside down: exp(m - new_m), which is at most 1", with_(turned=True)
    yield (
        "padded keys take part in the softmax: in every block tl.where, key < R, else -inf",
        with_(pad=True),
    )
    yield "the scale is missing: divide the scores by sqrt(K)", with_(scale=0)
    yield "divide the scores by sqrt(K), not by K", with_(scale=-1)
    yield "not divided by the sum: o / z, once, behind the loop", _online(q, k, v)[0]
    starts = range(0, len(k), BLOCK)
    own = [attention(q, k[i : i + BLOCK], v[i : i + BLOCK]) for i in starts]
    yield "each block has a softmax of its own, and their outputs are added", sum(own)
    yield "each block has a softmax of its own, and their outputs are averaged", sum(own) / len(own)
    yield "only the first block of keys is read: loop over range(0, R, BLOCK_R)", own[0]
    yield (
        "only the last block counts: m = new_m ends each turn, and m, z and o start before the "
        "loop",
        own[-1],
    )
    yield "the weights belong on the VALUES, this multiplies them with the keys", attention(q, k, k)
