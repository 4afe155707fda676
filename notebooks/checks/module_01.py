"""Checks of module 01: attention, causal mask, masked weights, heads, the softmax's gradient."""

from functools import partial

import numpy as np

from miniflamingo.attention import attention, attention_weights
from miniflamingo.functional import softmax

from .core import as_array, call, exercise, expect

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
    expect(call(answer, q, k, v), attention(q, k, v))


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
        mistakes = [(m, np.where(some, wrong, right)) for m, wrong in _mask_mistakes(q, k, mask)]
        expect(np.where(some, got, right), right, mistakes)  # first the rows with a key
        mistakes = [(m, np.where(some, right, wrong)) for m, wrong in _empty_mistakes(q, k, mask)]
        expect(got, right, mistakes)
    low = q - 60, k + 60, MASK  # all scores far below 0
    expect(call(answer, *low), attention_weights(*low), [(FILL, np.zeros(MASK.shape))])


FILL = "all other scores may be lower than your fill, which then gets everything: use -inf or -1e9"


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


@exercise("1.4")
def multi_head(answer):
    """answer(q [Lq, H*K], k [Lk, H*K], v [Lk, H*K], H) -> [Lq, H*K]."""
    for H, sizes in ((3, (4, 1, 4, 6, 6)), (2, (5, 1, 3, 3, 8)), (1, (6, 1, 3, 4, 4))):
        q, k, v = (x[0] for x in attention_case(*sizes))
        expect(call(answer, q, k, v, H), heads(q, k, v, H), _head_mistakes(q, k, v, H))


def split(x, H):  # [L, H*K] -> [H, L, K]
    """Head h's columns as a matrix of its own."""
    return x.reshape(len(x), H, -1).swapaxes(0, 1)


def merge(x):  # [H, L, K] -> [L, H*K]
    """Undo split."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def heads(q, k, v, H):
    """Equation (7), without the last matrix."""
    return merge(attention(*(split(x, H) for x in (q, k, v))))


def _scrambled(x, H):
    return x.reshape(H, len(x), -1)


def _head_mistakes(q, k, v, H):
    outs, width = attention(*(split(x, H) for x in (q, k, v))), q.shape[1]
    yield "this is ONE head of width H*K: split q, k and v into H parts", attention(q, k, v)
    scrambled = (
        "a reshape to [H, L, K] mixes tokens with heads: reshape to [L, H, K], then swapaxes"
    )
    wrong = attention(*(_scrambled(x, H) for x in (q, k, v)))
    yield scrambled, merge(wrong)
    yield scrambled, wrong.reshape(q.shape)
    yield (
        "the way back is missing its swapaxes: [H, L, K] must become [L, H, K] before the reshape",
        outs.reshape(q.shape),
    )
    yield "not joined yet: [Lq, H*K] is wanted, the heads side by side", outs
    yield "not joined yet: [Lq, H*K] is wanted, the heads side by side", outs.swapaxes(0, 1)
    yield (
        "the scale is by the whole width: each head divides by the root of ITS width K",
        heads(q / np.sqrt(H), k, v, H),
    )
    interleaved = (x.reshape(len(x), -1, H).transpose(2, 0, 1) for x in (q, k, v))
    yield (
        "head h owns K columns side by side: reshape(L, H, K), not (L, K, H)",
        attention(*interleaved).transpose(1, 2, 0).reshape(len(q), width),
    )
    yield (
        "attention runs over the HEADS of one token: put the head axis first",
        _over_heads(q, k, v, H),
    )
    yield "the heads are summed: put them side by side", outs.sum(axis=0)
    yield "the heads are averaged: put them side by side", outs.mean(axis=0)
    yield "the heads stand below one another: side by side is axis 1", np.concatenate(outs)


def _over_heads(q, k, v, H):
    """[L, H, K] given to attention as it is; NaN where that does not fit, which nothing equals."""
    if len(q) != len(k):
        return np.full(1, np.nan)
    return attention(*(x.reshape(len(x), H, -1) for x in (q, k, v))).reshape(q.shape)


# --- 1.5: the softmax's gradient ------------------------------------------------------------------


@exercise("1.5")
def dscores(answer):
    """answer(dout [Lq, K], p [Lq, Lk], v [Lk, K]) -> [Lq, Lk]."""
    for seed, Lq, Lk in ((7, 4, 5), (8, 3, 3)):
        q, k, v = (x[0] for x in attention_case(seed, 1, Lq, Lk, 4))
        dout = np.random.default_rng(seed + 100).normal(size=q.shape)
        p = attention_weights(q, k)
        right = softmax_gradient(dout, p, v)
        expect(call(answer, dout, p, v), right, _gradient_mistakes(dout, p, v))


def softmax_gradient(dout, p, v):
    """Equation (8)."""
    dp = dout @ v.T
    return p * (dp - (p * dp).sum(axis=1, keepdims=True))


def _gradient_mistakes(dout, p, v):
    dp, right = dout @ v.T, softmax_gradient(dout, p, v)
    yield (
        "the gradient lacks its sum: the weights compete, one can only grow at the others' cost",
        (p * dp),
    )
    yield "this is dp: the softmax is still to be differentiated", dp
    yield (
        "wrong axis: the sum in (8) is over the keys j', a number for each ROW",
        p * (dp - (p * dp).sum(axis=0, keepdims=True)),
    )
    yield "one sum for all: (8) has one for each row, axis=1", p * (dp - (p * dp).sum())
    yield (
        "the sum needs its weights: sum of p * dp, not of dp",
        p * (dp - dp.sum(axis=1, keepdims=True)),
    )
    yield (
        "the mean of dp is right only where all weights are equal: sum p * dp",
        p * (dp - dp.mean(axis=1, keepdims=True)),
    )
    yield "the factor p in front is missing", dp - (p * dp).sum(axis=1, keepdims=True)
    yield "wrong sign: a MINUS before the sum", p * (dp + (p * dp).sum(axis=1, keepdims=True))
    yield "wrong sign of all of it", -right
    yield (
        "p (1 - p) dp is the diagonal alone: a score also moves the OTHER weights",
        p * (1 - p) * dp,
    )
    yield (
        "this is the gradient of q @ k.T: (8) is that of the scores after the division",
        (right / np.sqrt(v.shape[1])),
    )
