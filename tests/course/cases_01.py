"""Right and wrong answers to the exercises of module 01, for test_checks.py."""

import numpy as np

from miniflamingo.attention import attention, attention_weights
from miniflamingo.course.checks.module_01 import heads
from miniflamingo.functional import softmax, softmax_backward

# --- 1.1: attention -------------------------------------------------------------------------------


def soft(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def attend(q, k, v, scale=None, axis=-1, weights=soft, values=None):
    """An answer as students write it, with a place for each mistake."""
    K = q.shape[-1]
    scores = q @ k.swapaxes(-1, -2) * (K**-0.5 if scale is None else scale(K))
    p = weights(scores, axis) if weights is soft else weights(scores)
    return p @ (v if values is None else values)


def attend_by_loops(q, k, v):
    out = np.zeros(q.shape)
    for b, i in np.ndindex(q.shape[:2]):
        s = [q[b, i] @ key / np.sqrt(q.shape[2]) for key in k[b]]
        e = [np.exp(x - max(s)) for x in s]
        for p, value in zip(e, v[b]):
            out[b, i] += p / sum(e) * value
    return out


def attend_by_einsum(q, k, v):
    p = softmax(np.einsum("bik,bjk->bij", q, k) / q.shape[-1] ** 0.5)
    return np.einsum("bij,bjk->bik", p, v)


def overflowing(q, k, v):
    e = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
    return e / e.sum(axis=-1, keepdims=True) @ v


# --- 1.2: the causal mask -------------------------------------------------------------------------


def causal_by_loops(Lq, Lk):
    return [[j <= Lk - Lq + i for j in range(Lk)] for i in range(Lq)]


def positions(Lq, Lk):
    return np.arange(Lk - Lq, Lk)[:, None]


# --- 1.3: weights under a mask --------------------------------------------------------------------


def weights(q, k, mask, scale=None, fill=-1e9, late=False, mend=True, axis=-1):
    """An answer as students write it, with a place for each mistake."""
    scores = q @ k.T * (q.shape[1] ** -0.5 if scale is None else scale)
    p = soft(scores if late else np.where(mask, scores, fill), axis)
    return p * mask if mend or late else p


def weights_by_loops(q, k, mask):
    out = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        seen = np.flatnonzero(row)
        if len(seen):
            out[i, seen] = softmax(k[seen] @ q[i] / np.sqrt(len(q[i])))
    return out


def weights_by_sums(q, k, mask):
    s = q @ k.T / np.sqrt(q.shape[1])
    e = np.exp(s - s.max(axis=1, keepdims=True)) * mask
    return np.divide(e, e.sum(axis=1, keepdims=True), out=np.zeros_like(e), where=mask)


def first_key_instead(q, k, mask):
    mask = mask.copy()
    mask[~mask.any(axis=1), 0] = True
    return attention_weights(q, k, mask)


def all_keys_instead(q, k, mask):
    return attention_weights(q, k, mask | ~mask.any(axis=1, keepdims=True))


# --- 1.4: several heads ---------------------------------------------------------------------------


def heads_by_slices(q, k, v, H):
    K = q.shape[1] // H
    parts = [slice(h * K, (h + 1) * K) for h in range(H)]
    return np.concatenate([attention(q[:, s], k[:, s], v[:, s]) for s in parts], axis=1)


def heads_by_einsum(q, k, v, H):
    q, k, v = (x.reshape(len(x), H, -1) for x in (q, k, v))
    p = softmax(np.einsum("ihk,jhk->hij", q, k) / np.sqrt(q.shape[2]))
    return np.einsum("hij,jhk->ihk", p, v).reshape(len(q), -1)


def multi(q, k, v, H, turn=True, back=True, join=True, order="HK"):
    """An answer as students write it, with a place for each mistake."""
    if order == "KH":
        q, k, v = (x.reshape(len(x), -1, H).transpose(2, 0, 1) for x in (q, k, v))
        return attention(q, k, v).transpose(1, 2, 0).reshape(q.shape[1], -1)
    if turn:
        q, k, v = (x.reshape(len(x), H, -1).swapaxes(0, 1) for x in (q, k, v))
    else:
        q, k, v = (x.reshape(H, len(x), -1) for x in (q, k, v))
    out = attention(q, k, v)
    if not join:
        return out
    return (out.swapaxes(0, 1) if back else out).reshape(q.shape[1], -1)


def over_heads(q, k, v, H):
    if len(q) != len(k):
        return heads(q, k, v, H)
    return attention(*(x.reshape(len(x), H, -1) for x in (q, k, v))).reshape(q.shape)


# --- 1.5: the softmax's gradient ------------------------------------------------------------------


def dscores(dout, p, v, axis=1, inner=None, front=True, sign=-1):
    """An answer as students write it, with a place for each mistake."""
    dp = dout @ v.T
    total = (p * dp if inner is None else inner(p, dp)).sum(axis=axis, keepdims=True)
    return (p if front else 1) * (dp + sign * total)


def dscores_by_jacobians(dout, p, v):
    return np.stack([(np.diag(row) - np.outer(row, row)) @ (v @ d) for row, d in zip(p, dout)])


def dscores_by_differences(dout, p, v, step=1e-6):
    s, grad = np.log(p), np.zeros(p.shape)
    for place in np.ndindex(p.shape):
        move = np.zeros(p.shape)
        move[place] = step
        up, down = ((dout * (softmax(x) @ v)).sum() for x in (s + move, s - move))
        grad[place] = (up - down) / (2 * step)
    return grad


RIGHT = [
    ("1.1", attend),
    ("1.1", attend_by_loops),
    ("1.1", attend_by_einsum),
    ("1.1", attention),
    ("1.2", lambda Lq, Lk: np.arange(Lk) <= positions(Lq, Lk)),
    ("1.2", lambda Lq, Lk: np.tri(Lq, Lk, Lk - Lq, dtype=bool)),
    ("1.2", lambda Lq, Lk: np.tril(np.ones((Lk, Lk), bool))[-Lq:]),
    ("1.2", causal_by_loops),
    ("1.3", attention_weights),
    ("1.3", weights),
    ("1.3", weights_by_loops),
    ("1.3", weights_by_sums),
    ("1.3", lambda *a: np.nan_to_num(weights(*a, fill=-np.inf, mend=False))),
    ("1.4", heads),
    ("1.4", multi),
    ("1.4", heads_by_slices),
    ("1.4", heads_by_einsum),
    ("1.5", dscores),
    ("1.5", dscores_by_jacobians),
    ("1.5", dscores_by_differences),
    ("1.5", lambda dout, p, v: softmax_backward(dout @ v.T, np.log(p))),
]

WRONG = [
    ("1.1", lambda *a: attend(*a, scale=lambda K: 1), "the scale is missing"),
    ("1.1", lambda *a: attend(*a, scale=lambda K: 1 / K), "sqrt(K), not by K"),
    ("1.1", lambda *a: attend(*a, scale=lambda K: K**0.5), "yours multiplies"),
    (
        "1.1",
        lambda q, k, v: attend(q, k, v, lambda K: k.shape[1] ** -0.5),
        "not the number of keys",
    ),
    ("1.1", lambda *a: attend(*a, axis=1), "over the KEYS (the last axis)"),
    ("1.1", lambda *a: attend(*a, axis=0), "yours runs over the batch"),
    ("1.1", lambda *a: attend(*a, axis=None), "over all numbers at once"),
    ("1.1", lambda *a: attend(*a, weights=lambda s: s), "the softmax is missing"),
    ("1.1", lambda *a: attend(*a, weights=np.exp), "the sum to divide by is missing"),
    ("1.1", lambda q, k, v: attend(q, k, k), "yours are on the keys"),
    ("1.1", lambda q, k, v: attention_weights(q, k), "these are the weights"),
    ("1.1", lambda q, k, v: soft(q @ k.T) @ v, "your code stops with ValueError"),
    ("1.1", overflowing, "NaN at"),
    ("1.1", lambda *a: attend(*a)[0], "wrong shape: [2, 3, 4] is wanted, got [3, 4]"),
    ("1.2", lambda Lq, Lk: np.arange(Lk) < positions(Lq, Lk), "a token reads itself"),
    ("1.2", lambda Lq, Lk: np.arange(Lk) <= positions(Lq, Lk) + 1, "one too far"),
    ("1.2", lambda Lq, Lk: np.tri(Lq, Lk, dtype=bool), "query 0 stands at 3"),
    ("1.2", lambda Lq, Lk: np.arange(Lk) > positions(Lq, Lk), "upside down"),
    ("1.2", lambda Lq, Lk: np.arange(Lk) >= positions(Lq, Lk), "this reads the FUTURE"),
    ("1.2", lambda Lq, Lk: np.ones((Lq, Lk), bool), "no mask"),
    ("1.2", lambda Lq, Lk: np.tri(Lq, Lk, Lk - Lq, dtype=bool).T, "axes are exchanged"),
    ("1.2", lambda Lq, Lk: np.tri(Lq, Lk, Lk - Lq), "wrong dtype: bool is wanted"),
    ("1.2", lambda Lq, Lk: np.tri(Lk, dtype=bool), "wrong shape: [3, 6] is wanted, got [6, 6]"),
    ("1.2", lambda Lq, Lk: np.eye(Lq, Lk, dtype=bool), "query 0, which is token 3 of 6, does not"),
    ("1.3", lambda q, k, m: attention_weights(q, k), "no mask: forbidden keys get weight"),
    ("1.3", lambda *a: weights(*a, late=True), "the mask comes too late"),
    ("1.3", lambda q, k, m: attention_weights(q, k, ~m), "upside down"),
    ("1.3", lambda *a: weights(*a, fill=0), "a score of 0 is no mask"),
    ("1.3", lambda *a: weights(*a, fill=0, mend=False), "a score of 0 is no mask"),
    ("1.3", lambda *a: weights(*a, scale=1), "the scale is missing"),
    ("1.3", lambda *a: weights(*a, scale=1 / 4), "sqrt(K), not by K"),
    ("1.3", lambda *a: weights(*a, axis=0), "wrong softmax axis"),
    ("1.3", lambda q, k, m: np.where(m, q @ k.T / 2, -np.inf), "the softmax is missing"),
    ("1.3", lambda q, k, m: np.exp(q @ k.T / 2) * m, "the sum to divide by is missing"),
    ("1.3", lambda *a: weights(*a, mend=False), "a uniform average over ALL keys"),
    ("1.3", lambda *a: weights(*a, fill=-np.inf, mend=False), "yours is NaN"),
    ("1.3", all_keys_instead, "as if there were no mask"),
    ("1.3", first_key_instead, "yours reads key 0"),
    ("1.3", lambda *a: weights(*a, fill=-20), "which then gets everything"),
    ("1.4", lambda q, k, v, H: attention(q, k, v), "this is ONE head"),
    ("1.4", lambda *a: multi(*a, turn=False), "mixes tokens with heads"),
    ("1.4", lambda *a: multi(*a, turn=False, back=False), "mixes tokens with heads"),
    ("1.4", lambda *a: multi(*a, back=False), "the way back is missing its swapaxes"),
    ("1.4", lambda *a: multi(*a, join=False), "not joined yet"),
    ("1.4", lambda q, k, v, H: heads(q / H**0.5, k, v, H), "ITS width K"),
    ("1.4", lambda *a: multi(*a, order="KH"), "not (L, K, H)"),
    ("1.4", over_heads, "over the HEADS of one token"),
    ("1.4", lambda *a: multi(*a, join=False).sum(axis=0), "the heads are summed"),
    ("1.4", lambda *a: multi(*a, join=False).mean(axis=0), "the heads are averaged"),
    ("1.4", lambda *a: np.concatenate(multi(*a, join=False)), "stand below one another"),
    ("1.5", lambda dout, p, v: p * (dout @ v.T), "lacks its sum"),
    ("1.5", lambda dout, p, v: dout @ v.T, "this is dp"),
    ("1.5", lambda *a: dscores(*a, axis=0), "wrong axis"),
    ("1.5", lambda *a: dscores(*a, axis=None), "one sum for all"),
    ("1.5", lambda *a: dscores(*a, inner=lambda p, dp: dp), "the sum needs its weights"),
    ("1.5", lambda *a: dscores(*a, inner=lambda p, dp: dp / p.shape[1]), "the mean of dp"),
    ("1.5", lambda *a: dscores(*a, front=False), "the factor p in front is missing"),
    ("1.5", lambda *a: dscores(*a, sign=1), "wrong sign: a MINUS"),
    ("1.5", lambda *a: -dscores(*a), "wrong sign of all of it"),
    ("1.5", lambda dout, p, v: p * (1 - p) * (dout @ v.T), "the diagonal alone"),
    ("1.5", lambda *a: dscores(*a) / 2, "that of the scores after the division"),
    ("1.5", lambda dout, p, v: p * (dout @ v), "your code stops with ValueError"),
]
