"""Right and wrong answers to the exercises of module 01, for test_checks.py."""

import numpy as np

from miniflamingo.attention import attention, attention_backward, attention_weights
from miniflamingo.course.checks.module_01 import grouped
from miniflamingo.functional import softmax

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


def one_maximum(scores):  # for all rows: those that lie far below it underflow
    e = np.exp(scores - scores.max())
    return e / e.sum(axis=-1, keepdims=True)


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


def weights_that_underflow(q, k, mask):
    e = np.exp(q @ k.T / np.sqrt(q.shape[1])) * mask
    return e / (e.sum(axis=1, keepdims=True) + 1e-9)


def first_key_instead(q, k, mask):
    mask = mask.copy()
    mask[~mask.any(axis=1), 0] = True
    return attention_weights(q, k, mask)


def all_keys_instead(q, k, mask):
    return attention_weights(q, k, mask | ~mask.any(axis=1, keepdims=True))


# --- 1.4: several heads ---------------------------------------------------------------------------


def heads_by_slices(q, k, v, mask, H):
    K = q.shape[-1] // H
    share = q.shape[-1] // k.shape[-1]
    out = np.zeros(q.shape)
    for b in range(len(q)):
        for h in range(H):
            own, group = (slice(i * K, (i + 1) * K) for i in (h, h // share))
            out[b, :, own] = attention(q[b, :, own], k[b, :, group], v[b, :, group], mask[b])
    return out


def heads_by_einsum(q, k, v, mask, H):
    (B, L, width), G = q.shape, k.shape[-1] * H // q.shape[-1]
    q, k, v = q.reshape(B, L, G, H // G, -1), *(x.reshape(B, x.shape[1], G, -1) for x in (k, v))
    s = np.einsum("bigsk,bjgk->bgsij", q, k) / np.sqrt(width // H)
    p = softmax(np.where(mask[:, None, None], s, -1e300)) * mask[:, None, None]
    return np.einsum("bgsij,bjgk->bigsk", p, v).reshape(B, L, width)


def multi(q, k, v, mask, H, turn=True, back=True, join=True, order="HK", see=None, copy="repeat",
          scale=1, empty=0):  # fmt: skip
    """An answer as students write it, with a place for each mistake."""
    (B, L, width), K, G = q.shape, q.shape[-1] // H, k.shape[-1] * H // q.shape[-1]
    if order == "KH":
        q, k, v = (np.moveaxis(x.reshape(B, x.shape[1], K, -1), -1, 1) for x in (q, k, v))
    elif turn:
        q, k, v = (x.reshape(B, x.shape[1], -1, K).swapaxes(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.reshape(B, -1, x.shape[1], K) for x in (q, k, v))
    if copy == "repeat":
        k, v = (np.repeat(x, H // G, axis=1) for x in (k, v))
    elif copy == "tile":
        k, v = (np.tile(x, (1, H // G, 1, 1)) for x in (k, v))
    else:
        k, v = k[:, :1], v[:, :1]
    out = attention(q * scale, k, v, see(mask) if see else mask[:, None])
    if empty:
        out[~np.broadcast_to(mask.any(axis=-1)[:, None], out.shape[:-1])] = empty
    if not join:
        return out
    if order == "KH" and back:
        return np.moveaxis(out, 1, -1).reshape(B, L, width)
    return (out.swapaxes(1, 2) if back else out).reshape(B, L, width)


def heads_with_a_finite_fill(q, k, v, mask, H):
    K, share = q.shape[-1] // H, q.shape[-1] // k.shape[-1]
    q, k, v = (x.reshape(len(x), x.shape[1], -1, K).swapaxes(1, 2) for x in (q, k, v))
    k, v = (np.repeat(x, share, axis=1) for x in (k, v))
    s = np.where(mask[:, None], q @ k.swapaxes(2, 3) / np.sqrt(K), -1e9)
    return (softmax(s) @ v).swapaxes(1, 2).reshape(len(q), q.shape[2], -1)


def one_head(q, k, v, mask, H):
    if k.shape[-1] == q.shape[-1]:
        return attention(q, k, v, mask)
    return grouped(q, k, v, mask, H)


def every_Hth_column(*case):
    return grouped(*case, cut=lambda x, K: np.moveaxis(x.reshape(*x.shape[:2], K, -1), -1, 1))


def heads_in_place(q, k, v, mask, H):
    q *= 1.1
    return heads_by_slices(q / 1.1, k, v, mask, H)


# --- 1.5: the gradient of several heads -----------------------------------------------------------


def gradient(dout, q, k, v, mask, H, axis=-1, inner=None, front=True, sign=-1, root=np.sqrt,
             turn=True, back=True, soft=soft, masked=True):  # fmt: skip
    """An answer as students write it, with a place for each mistake."""
    if turn:
        dout, q, k, v = (x.reshape(len(x), H, -1).swapaxes(0, 1) for x in (dout, q, k, v))
    else:
        dout, q, k, v = (x.reshape(H, len(x), -1) for x in (dout, q, k, v))
    s = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    p = soft(np.where(mask, s, -1e9) if masked else s)
    dp = dout @ v.swapaxes(1, 2)
    total = (p * dp if inner is None else inner(p, dp)).sum(axis=axis, keepdims=True)
    ds = (p if front else 1) * (dp + sign * total)
    scale = root(q.shape[-1])
    parts = ds @ k / scale, ds.swapaxes(1, 2) @ q / scale, p.swapaxes(1, 2) @ dout
    return [(x.swapaxes(0, 1) if back else x).reshape(x.shape[1], -1) for x in parts]


def gradient_head_by_head(dout, q, k, v, mask, H):
    K, parts = q.shape[1] // H, []
    for h in range(H):
        own = slice(h * K, (h + 1) * K)
        parts.append(attention_backward(dout[:, own], q[:, own], k[:, own], v[:, own], mask=mask))
    return [np.concatenate(x, axis=1) for x in list(zip(*parts))[:3]]


def gradient_pair_by_pair(dout, q, k, v, mask, H):
    grads, K = [np.zeros(x.shape) for x in (q, k, v)], q.shape[1] // H
    for h in range(H):
        own = slice(h * K, (h + 1) * K)
        for i, row in enumerate(mask):
            seen = np.flatnonzero(row)
            p = softmax(k[seen, own] @ q[i, own] / np.sqrt(K))
            jacobian = np.diag(p) - np.outer(p, p)
            ds = jacobian @ (v[seen, own] @ dout[i, own]) / np.sqrt(K)
            grads[0][i, own] += ds @ k[seen, own]
            grads[1][seen, own] += np.outer(ds, q[i, own])
            grads[2][seen, own] += np.outer(p, dout[i, own])
    return grads


def soft_that_overflows(s):
    e = np.exp(s)
    return e / e.sum(axis=-1, keepdims=True)


def in_place(dout, q, k, v, mask, H):
    q /= np.sqrt(q.shape[1] // H)
    return gradient(dout, q, k, v, mask, H)


def with_dv(change, *arguments):
    dq, dk, dv = gradient(*arguments)
    return dq, dk, change(dv, *arguments)


def dv_not_turned(dv, dout, q, k, v, mask, H):
    if len(q) != len(k):
        return dv
    p = [softmax(np.where(mask, a @ b.T / a.shape[1] ** 0.5, -1e9))
         for a, b in zip(np.split(q, H, axis=1), np.split(k, H, axis=1))]  # fmt: skip
    return np.hstack([w @ d for w, d in zip(p, np.split(dout, H, axis=1))])


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
    ("1.4", grouped),
    ("1.4", multi),
    ("1.4", heads_by_slices),
    ("1.4", heads_by_einsum),
    ("1.5", gradient),
    ("1.5", gradient_head_by_head),
    ("1.5", gradient_pair_by_pair),
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
    ("1.3", lambda *a: weights(*a, fill=-20), "and then gets everything"),
    ("1.4", one_head, "this is ONE head"),
    ("1.4", lambda *a: multi(*a, see=lambda m: np.array(True)), "the mask is missing"),
    ("1.4", lambda *a: multi(*a, see=lambda m: ~m[:, None]), "the mask is upside down"),
    ("1.4", lambda *a: multi(*a, see=lambda m: m[0]), "this takes page 0's"),
    ("1.4", lambda *a: multi(*a, copy="tile"), "np.repeat, not np.tile"),
    ("1.4", lambda *a: multi(*a, copy="first"), "all heads read group 0"),
    ("1.4", lambda *a: multi(*a, turn=False), "mixes tokens with heads"),
    ("1.4", lambda *a: multi(*a, turn=False, back=False), "mixes tokens with heads"),
    ("1.4", lambda *a: multi(*a, back=False), "the way back is missing its swapaxes"),
    ("1.4", lambda *a: multi(*a, join=False), "not joined yet"),
    ("1.4", lambda *a: multi(*a, scale=a[-1] ** -0.5), "ITS width K"),
    ("1.4", lambda *a: multi(*a, scale=3**-0.5), "attention divides by sqrt(K) itself"),
    ("1.4", lambda *a: multi(*a, order="KH"), "not (B, L, K, H)"),
    ("1.4", lambda *a: multi(*a, join=False).sum(axis=1), "the heads are summed"),
    ("1.4", lambda *a: multi(*a, join=False).mean(axis=1), "the heads are averaged"),
    ("1.4", lambda *a: np.hstack([*multi(*a, join=False).swapaxes(0, 1)]), "below one another"),
    ("1.4", lambda *a: multi(*a, empty=np.nan), "0, not NaN"),
    ("1.4", heads_with_a_finite_fill, "0, not the mean of all"),
    ("1.4", every_Hth_column, "not every H-th one"),
    ("1.4", heads_in_place, "changes its argument number 1 in place"),
    ("1.4", lambda *a: np.dstack([*multi(*a, join=False).swapaxes(0, 1)[::-1]]), "turned round"),
    ("1.4", lambda *a: np.dstack([multi(*a, join=False)[:, 0]] * a[-1]), "the first one"),
    ("1.4", lambda q, k, v, m, H: multi(q, k, v, m[:, 0], H), "your code stops with ValueError"),
    ("1.5", lambda *a: gradient(*a, sign=0), "lacks its sum"),
    ("1.5", lambda *a: gradient(*a, sign=0, front=False), "this uses dp for ds"),
    ("1.5", lambda *a: gradient(*a, axis=-2), "wrong axis"),
    ("1.5", lambda *a: gradient(*a, axis=None), "one sum for all"),
    ("1.5", lambda *a: gradient(*a, inner=lambda p, dp: dp), "the sum needs its weights"),
    ("1.5", lambda *a: gradient(*a, inner=lambda p, dp: dp / dp.shape[-1]), "the mean of dp"),
    ("1.5", lambda *a: gradient(*a, front=False), "the factor p in front is missing"),
    ("1.5", lambda *a: gradient(*a, sign=1), "wrong sign: a MINUS"),
    ("1.5", lambda *a: [-x for x in gradient(*a)], "wrong sign of all of it"),
    ("1.5", lambda *a: gradient(*a, root=lambda K: 1), "the root of K is missing"),
    ("1.5", lambda *a: gradient(*a, root=lambda K: K), "not twice, and not K"),
    ("1.5", lambda *a: gradient(*a, masked=False), "the mask is missing"),
    ("1.5", lambda *a: gradient(*a[:-1], 1), "this is ONE head"),
    ("1.5", lambda *a: gradient(*a, turn=False, back=False), "mixes tokens with heads"),
    ("1.5", lambda *a: gradient(*a, back=False), "the way back is missing its swapaxes"),
    (
        "1.5",
        lambda *a: with_dv(lambda dv, dout, q, *_: dv / (q.shape[1] // a[-1]) ** 0.5, *a),
        "dv has none",
    ),
    ("1.5", lambda *a: with_dv(dv_not_turned, *a), "dv_j sums over the QUERIES"),
    ("1.5", lambda *a: gradient(*a)[:2], "dq, dk, dv is wanted, got list of 2"),
    ("1.5", in_place, "changes its argument number 2 in place"),
    ("1.5", lambda *a: gradient(*a, soft=soft_that_overflows), "NaN at"),
    ("1.1", overflowing, "subtract the row's maximum before exp"),
    ("1.1", lambda *a: attend(*a, weights=one_maximum), "subtract the row's maximum before exp"),
    ("1.1", lambda q, k, v: attend(q, v, k), "k and v are exchanged"),
    ("1.1", lambda *a: attend(*a, scale=lambda K: 1) / a[0].shape[-1] ** 0.5, "on the SCORES"),
    ("1.1", lambda q, k, v: print(attend(q, k, v).shape), "is there a `return`?"),
    ("1.3", weights_that_underflow, "subtract the row's maximum"),
    ("1.3", lambda *a: weights(*a, fill=-100), "your fill is higher than they are"),
]
