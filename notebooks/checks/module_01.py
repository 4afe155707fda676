"""Checks of module 01: attention, causal mask, masked weights, heads, the softmax's gradient."""

from functools import partial

import numpy as np

from miniflamingo.attention import attention, attention_weights
from miniflamingo.functional import softmax

from .core import (
    OVERFLOW,
    Wrong,
    as_array,
    call,
    exercise,
    expect,
    expect_stable,
    named,
    same,
    several,
)

# --- 1.1: attention -------------------------------------------------------------------------------


def attention_case(seed=0, B=2, Lq=3, Lk=5, K=4):
    """q [B, Lq, K], k and v [B, Lk, K]: float64, random."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, Lq, K)), *rng.normal(size=(2, B, Lk, K))


@exercise("1.1")
def attend(answer):
    """answer(q [B, Lq, K], k [B, Lk, K], v [B, Lk, K]) -> [B, Lq, K]."""
    q, k, v = attention_case()
    expect(call(answer, q, k, v), attention(q, k, v), _attend_mistakes(q, k, v))
    q, k, v = attention_case(1, 3, 4, 4, 6)
    expect(call(answer, q, k, v), attention(q, k, v), _attend_mistakes(q, k, v))
    q, k, v = attention_case(2)
    q = 2000 * q  # exp(s) alone overflows
    expect_stable(call(answer, q, k, v), attention(q, k, v))


def _attend_mistakes(q, k, v):
    K, scores = q.shape[-1], q @ k.swapaxes(-1, -2)
    yield "the scale is missing: divide the scores by sqrt(K)", softmax(scores) @ v
    yield "wrong scale: divide by sqrt(K), not by K", softmax(scores / K) @ v
    yield "wrong scale: DIVIDE by sqrt(K), yours multiplies", softmax(scores * K**0.5) @ v
    yield (
        "wrong scale: K is the width, not the number of keys",
        softmax(scores / len(k[0]) ** 0.5) @ v,
    )
    scores = scores / np.sqrt(K)
    yield (
        "wrong softmax axis: one query's weights, over the KEYS (the last axis), must sum to 1",
        softmax(scores.swapaxes(-1, -2)).swapaxes(-1, -2) @ v,
    )
    yield (
        "wrong softmax axis: yours runs over the batch",
        softmax(np.moveaxis(scores, 0, -1)).transpose(2, 0, 1) @ v,
    )
    yield "softmax over all numbers at once: each query has its own", _softmax_of_all(scores) @ v
    yield "the softmax is missing", scores @ v
    yield "exp, but the sum to divide by is missing: a row must sum to 1", np.exp(scores) @ v
    yield "the weights belong on the VALUES: yours are on the keys", softmax(scores) @ k
    yield (
        "queries meet KEYS, and the weights go on the values: k and v are exchanged",
        (softmax(q @ v.swapaxes(-1, -2) / np.sqrt(K)) @ k),
    )
    yield (
        "the scale belongs on the SCORES, before the softmax",
        softmax(scores * K**0.5) @ v / K**0.5,
    )
    yield "these are the weights: multiply them with v", softmax(scores)


def _softmax_of_all(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


# --- 1.2: the causal mask -------------------------------------------------------------------------


@exercise("1.2")
def causal(answer):
    """answer(Lq, Lk) -> bool[Lq, Lk]."""
    for Lq, Lk in ((3, 6), (4, 4), (1, 3)):
        right = np.tri(Lq, Lk, Lk - Lq, dtype=bool)
        explain = partial(_causal_leak, Lk=Lk)
        expect(call(answer, Lq, Lk), right, _causal_mistakes(Lq, Lk), explain)


def _causal_mistakes(Lq, Lk):
    def tri(k):
        return np.tri(Lq, Lk, k, dtype=bool)

    yield "a token reads itself, too: `<=`, not `<`", tri(Lk - Lq - 1)
    yield "one too far: query i must not read the key after it", tri(Lk - Lq + 1)
    corner = (
        "the triangle is at the wrong corner: the queries are the LAST Lq tokens, query 0 stands"
    )
    yield f"{corner} at {Lk - Lq}", tri(0)
    yield f"{corner} at {Lk - Lq}; and a token reads itself, too", tri(-1)
    yield "upside down: True means may read, not masked", ~tri(Lk - Lq)
    yield "this reads the FUTURE: j <= position, not j >= position", ~tri(Lk - Lq - 1)
    yield "no mask: every query reads every key", np.ones((Lq, Lk), bool)
    yield "the axes are exchanged: [Lq, Lk], queries before keys", tri(Lk - Lq).T


def _causal_leak(got, right, Lk):
    i, j = np.argwhere(got != right)[0]
    reads, position = ("reads" if got[i, j] else "does not read"), Lk - len(got) + i
    return f"query {i}, which is token {position} of {Lk}, {reads} token {j}"


# --- 1.3: weights under a mask --------------------------------------------------------------------

# query 2 may read nothing
MASK = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)


@exercise("1.3")
def masked_weights(answer):
    """answer(q [Lq, K], k [Lk, K], mask bool[Lq, Lk]) -> [Lq, Lk]."""
    q, k, _ = (x[0] for x in attention_case(3, 1, 4, 5, 4))
    for mask in (MASK, MASK[::-1]):
        right, some = attention_weights(q, k, mask), mask.any(axis=1)[:, None]
        out = call(answer, q, k, mask)
        got = as_array(out)
        if got.shape != right.shape or got.dtype.kind != "f":
            expect(out, right)
        right = right.astype(got.dtype)
        mistakes = [(m, np.where(some, wrong, right)) for m, wrong in _mask_mistakes(q, k, mask)]
        expect(np.where(some, got, right), right, mistakes)  # first the rows with a key
        mistakes = [(m, np.where(some, right, wrong)) for m, wrong in _empty_mistakes(q, k, mask)]
        expect(got, right, mistakes)
    for sign in (-1, 1):  # all scores far below 0, and far above
        case = q + sign * 60, k + 60, MASK
        mistakes = [(FILL, np.zeros(MASK.shape))] if sign < 0 else []
        expect_stable(call(answer, *case), attention_weights(*case), mistakes)


FILL = (
    "wrong where all scores are far below 0: your fill is higher than they are, and then gets "
    "everything (use -inf or -1e9), or exp of them all is 0 (subtract the row's maximum)"
)


def _mask_mistakes(q, k, mask):
    K, scores = q.shape[1], q @ k.T
    scaled = scores / np.sqrt(K)
    right = attention_weights(q, k, mask)
    yield "no mask: forbidden keys get weight", softmax(scaled)
    yield (
        "the mask comes too late: mask the scores BEFORE the softmax, or a row does not sum to 1",
        softmax(scaled) * mask,
    )
    yield "upside down: the mask is True where a key MAY be read", attention_weights(q, k, ~mask)
    for fill in (0, 1e-9):
        zeroed = np.where(mask, scaled, fill)
        words = "a score of 0 is no mask: exp(0) = 1; use -inf or a large negative number"
        yield words, softmax(zeroed)
        yield words, softmax(zeroed) * mask
    unscaled, by_k = (attention_weights(q * c, k, mask) for c in (K**0.5, K**-0.5))
    yield "the scale is missing: divide the scores by sqrt(K)", unscaled
    yield "wrong scale: divide by sqrt(K), not by K", by_k
    yield (
        "wrong softmax axis: a ROW of weights, over the keys, must sum to 1",
        softmax(np.where(mask, scaled, -1e30).T).T * mask,
    )
    yield "these are the scores: the softmax is missing", np.where(mask, scaled, -np.inf)
    yield "these are the scores: the softmax is missing", np.where(mask, scaled, 0)
    yield "exp, but the sum to divide by is missing", right * np.exp(_logsum(scaled, mask))


def _logsum(scores, mask):
    return np.log(np.where(mask, np.exp(scores), 0).sum(axis=1, keepdims=True) + 1e-300)


NOTHING = "a query that may read nothing has weights of exactly 0"


def _empty_mistakes(q, k, mask):
    shape = mask.shape
    yield f"{NOTHING}: yours is a uniform average over ALL keys", np.full(shape, 1 / shape[1])
    yield f"{NOTHING}: yours is NaN (a softmax over nothing is 0 / 0)", np.full(shape, np.nan)
    yield f"{NOTHING}: yours reads as if there were no mask", attention_weights(q, k)
    for i in (0, shape[1] - 1):
        yield f"{NOTHING}: yours reads key {i}", np.arange(shape[1]) == np.full(shape, i)


# --- 1.4: several heads ---------------------------------------------------------------------------


def group_case(seed, B, H, G, Lq=4, Lk=6, K=3):
    """q [B, Lq, H*K], k and v [B, Lk, G*K], mask bool [B, Lq, Lk] with a row of nothing."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, Lq, Lk)) < 0.6
    mask[..., 0] = True
    mask[-1, 1] = False
    return rng.normal(size=(B, Lq, H * K)), *rng.normal(size=(2, B, Lk, G * K)), mask, H


@exercise("1.4")
def multi_head(answer):
    """answer(q [B, Lq, H*K], k, v [B, Lk, G*K], mask bool[B, Lq, Lk], H) -> [B, Lq, H*K]."""
    for seed, sizes in enumerate(((2, 4, 2), (3, 3, 3, 5, 5), (2, 4, 1, 3, 5, 2), (1, 6, 2, 6, 4))):
        case = group_case(seed, *sizes)
        expect(call(answer, *case), grouped(*case), _head_mistakes(*case))
    q, *case = group_case(9, 2, 4, 2)
    expect_stable(call(answer, 4000 * q, *case), grouped(4000 * q, *case))


def split(x, H):  # [L, H*K] -> [H, L, K]
    """Head h's columns as a matrix of its own."""
    return x.reshape(len(x), H, -1).swapaxes(0, 1)


def merge(x):  # [H, L, K] -> [L, H*K]
    """Undo split."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def heads_of(x, K):  # [B, L, H*K] -> [B, H, L, K]
    """Each head's columns as a matrix of its own."""
    return x.reshape(*x.shape[:2], -1, K).swapaxes(1, 2)


def side_by_side(x):  # [B, H, L, K] -> [B, L, H*K]
    """Undo heads_of."""
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


def grouped(q, k, v, mask, H, cut=heads_of, spread=None, see=None, join=side_by_side, scale=1):
    """Equation (7) in groups, without the last matrix, with a place for each mistake."""
    K = q.shape[-1] // H
    q, k, v = (cut(x, K) for x in (q, k, v))
    spread = spread or (lambda x: np.repeat(x, H // x.shape[1], axis=1))
    see = mask[:, None] if see is None else see
    return join(attention(q * scale, spread(k), spread(v), see))


def _scrambled(x, H):
    return x.reshape(H, len(x), -1)


def _head_mistakes(q, k, v, mask, H):
    (B, L, width), K, G = q.shape, q.shape[-1] // H, k.shape[-1] * H // q.shape[-1]

    def wrong(**how):
        return grouped(q, k, v, mask, H, **how)

    if G == H:
        one = "this is ONE head of width H*K: split q, k and v into H parts"
        yield one, attention(q, k, v, mask)
    yield "the mask is missing", wrong(see=np.array(True))
    yield (
        "the mask is upside down: True means that the query may read the key",
        wrong(see=~mask[:, None]),
    )
    yield "each page has a mask of its own: this takes page 0's", wrong(see=mask[:1, None])
    yield (
        "the heads of a group stand side by side, 0 0 1 1: np.repeat, not np.tile",
        wrong(spread=lambda x: np.tile(x, (1, H // G, 1, 1))),
    )
    yield (
        "all heads read group 0: head h reads group h // (H / G)",
        wrong(spread=lambda x: np.repeat(x[:, :1], H, axis=1)),
    )
    yield (
        "all heads read a mean of the groups: head h reads group h // (H / G)",
        wrong(spread=lambda x: np.repeat(x.mean(axis=1, keepdims=True), H, axis=1)),
    )
    mixed = "a reshape to [B, H, L, K] mixes tokens with heads: first [B, L, H, K], then swapaxes"
    scrambled = lambda x, K: x.reshape(B, -1, x.shape[1], K)  # noqa: E731
    yield mixed, wrong(cut=scrambled)
    yield mixed, wrong(cut=scrambled, join=lambda x: x.reshape(B, L, width))
    yield (
        "the way back is missing its swapaxes: [B, H, L, K] must become [B, L, H, K] first",
        wrong(join=lambda x: x.reshape(B, L, width)),
    )
    apart = "not joined yet: [B, Lq, H*K] is wanted, the heads side by side"
    yield apart, wrong(join=lambda x: x)
    yield apart, wrong(join=lambda x: x.swapaxes(1, 2))
    yield (
        "the scale is by the whole width: each head divides by the root of ITS width K",
        wrong(scale=H**-0.5),
    )
    yield (
        "the scale is there twice: attention divides by sqrt(K) itself",
        wrong(scale=K**-0.5),
    )
    yield (
        "head h owns K columns side by side: reshape(B, L, H, K), not (B, L, K, H)",
        wrong(
            cut=lambda x, K: np.moveaxis(x.reshape(*x.shape[:2], K, -1), -1, 1),
            join=lambda x: np.moveaxis(x, 1, -1).reshape(B, L, width),
        ),
    )
    yield (
        "head h owns K columns side by side: x[..., h * K : (h + 1) * K], not every H-th one",
        wrong(cut=lambda x, K: np.moveaxis(x.reshape(*x.shape[:2], K, -1), -1, 1)),
    )
    yield (
        "the heads stand in the order 0 to H - 1: yours are turned round",
        wrong(join=lambda x: side_by_side(x[:, ::-1])),
    )
    yield (
        "all heads are the first one: head h has its own columns",
        wrong(join=lambda x: side_by_side(np.repeat(x[:, :1], H, axis=1))),
    )
    yield "the heads are summed: put them side by side", wrong(join=lambda x: x.sum(axis=1))
    yield "the heads are averaged: put them side by side", wrong(join=lambda x: x.mean(axis=1))
    yield (
        "the heads stand below one another: side by side is the last axis",
        wrong(join=lambda x: x.reshape(B, -1, K)),
    )
    right, nothing = wrong(), ~mask.any(axis=2, keepdims=True)
    yield (
        "a query that may read nothing: 0, not NaN (a softmax over nothing is 0 / 0)",
        np.where(nothing, np.nan, right),
    )
    alike = wrong(see=(mask | nothing)[:, None], scale=0)
    yield "a query that may read nothing: 0, not the mean of all", np.where(nothing, alike, right)


# --- 1.5: the gradient of several heads -----------------------------------------------------------

GRADIENTS = "dq, dk, dv"


@exercise("1.5")
def heads_gradient(answer):
    """answer(dout [Lq, H*K], q, k, v [L, H*K], mask bool[Lq, Lk], H) -> dq, dk, dv."""
    for H, scale, sizes in ((2, 1, (7, 1, 4, 4, 6)), (3, 1, (8, 1, 3, 5, 6)),
                            (2, 4000, (9, 1, 3, 4, 8))):  # fmt: skip
        q, k, v = (x[0] for x in attention_case(*sizes))
        dout = np.random.default_rng(sizes[0] + 100).normal(size=q.shape)
        mask = np.tri(len(q), len(k), len(k) - len(q), dtype=bool)
        q = scale * q  # exp(s) alone overflows
        right = gradients(dout, q, k, v, mask, H)
        got = several(call(answer, dout, q, k, v, mask, H), right, GRADIENTS)
        for message, wrong in _gradient_mistakes(dout, q, k, v, mask, H):
            if _all_same(got, wrong) and not _all_same(wrong, right):
                raise Wrong(message)
        for part, wanted, name in zip(got, right, GRADIENTS.split(", ")):
            expect(part, wanted, (), named(name), OVERFLOW, loose=100 if scale > 1 else 1)


def _all_same(parts, others):
    return all(same(a, b) for a, b in zip(parts, others))


def gradients(dout, q, k, v, mask, H, root=np.sqrt, ds=None, axis=-1, split=split, merge=merge):
    """Equation (8) for each head, with a place for each mistake."""
    dout, q, k, v = (split(x, H) for x in (dout, q, k, v))
    scale = root(q.shape[-1])
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    p = softmax(np.where(mask, scores, -1e30))
    dp = dout @ v.swapaxes(1, 2)
    total = (p * dp).sum(axis=axis, keepdims=True)
    d = p * (dp - total) if ds is None else ds(p, dp, total)
    parts = d @ k / scale, d.swapaxes(1, 2) @ q / scale, p.swapaxes(1, 2) @ dout
    return [merge(x) for x in parts]


def _gradient_mistakes(dout, q, k, v, mask, H):
    def wrong(**how):
        return gradients(dout, q, k, v, mask, H, **how)

    dq, dk, dv = right = wrong()
    yield (
        "this is ONE head of width H*K: split dout, q, k and v into H parts",
        gradients(dout, q, k, v, mask, 1),
    )
    stacked = lambda x: x.reshape(x.shape[1], -1)  # noqa: E731
    mixed = "a reshape to [H, L, K] mixes tokens with heads: reshape to [L, H, K], then swapaxes"
    yield mixed, wrong(split=_scrambled)
    yield mixed, wrong(split=_scrambled, merge=stacked)
    yield (
        "the way back is missing its swapaxes: [H, L, K] must become [L, H, K] before the reshape",
        wrong(merge=stacked),
    )
    yield "the mask is missing", gradients(dout, q, k, v, np.ones_like(mask), H)
    yield (
        "the gradient lacks its sum: the weights compete, one can only grow at the others' cost",
        wrong(ds=lambda p, dp, total: p * dp),
    )
    yield "this uses dp for ds: the softmax is to be differentiated", wrong(ds=lambda p, dp, _: dp)
    yield (
        "wrong axis: the sum in (8) is over the keys j', a number for each ROW",
        wrong(axis=-2),
    )
    yield "one sum for all: (8) has one for each row of each head", wrong(axis=None)
    yield (
        "the sum needs its weights: sum of p * dp, not of dp",
        wrong(ds=lambda p, dp, _: p * (dp - dp.sum(axis=-1, keepdims=True))),
    )
    yield (
        "the mean of dp is right only where all weights are equal: sum p * dp",
        wrong(ds=lambda p, dp, _: p * (dp - dp.mean(axis=-1, keepdims=True))),
    )
    yield "the factor p in front is missing", wrong(ds=lambda p, dp, total: dp - total)
    yield "wrong sign: a MINUS before the sum", wrong(ds=lambda p, dp, total: p * (dp + total))
    yield "wrong sign of all of it", [-x for x in right]
    yield (
        "p (1 - p) dp is the diagonal alone: a score also moves the OTHER weights",
        wrong(ds=lambda p, dp, _: p * (1 - p) * dp),
    )
    yield "the root of K is missing in dq and dk: (1) divides", wrong(root=lambda K: 1)
    yield "the root of K once: not twice, and not K", wrong(root=lambda K: K)
    yield (
        "the root is that of the head's width K, not of H*K",
        wrong(root=lambda K: np.sqrt(K * H)),
    )
    yield (
        "the root divides dq and dk: dv has none",
        (dq, dk, dv / np.sqrt(q.shape[1] // H)),
    )
    if len(q) == len(k):
        p_of_v = _values_by_rows(dout, q, k, mask, H)
        yield (
            "dv_j sums over the QUERIES that read it: p turned, p.swapaxes(1, 2)",
            (dq, dk, p_of_v),
        )
    yield "dq and dk are exchanged", (dk, dq, dv)


def _values_by_rows(dout, q, k, mask, H):
    q, k, dout = (split(x, H) for x in (q, k, dout))
    return merge(softmax(np.where(mask, q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5, -1e30)) @ dout)
