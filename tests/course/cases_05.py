"""Right and wrong answers to the exercises of module 05, for test_checks.py."""

import numpy as np

from miniflamingo.functional import softmax
from miniflamingo.perceiver import PerceiverResampler, time_weights

# --- 5.1 and 4.2: time ----------------------------------------------------------------------------


def with_time_by_loops(x, time):
    return [x[t, s] + time[t] for t in range(len(x)) for s in range(x.shape[1])]


def flat_time(x, time):
    return x.reshape(-1, x.shape[-1]) + np.repeat(time, x.shape[1], axis=0)


def time_of_the_place(x, time):
    time = time if x.shape[1] == len(time) else time[:, None]
    return (x + time).reshape(-1, x.shape[-1])


def stretch(time, T, place=None, short=None):
    F = len(time)
    if T <= F and short is None:
        return time[:T]
    place = np.linspace(0, F - 1, T) if place is None else place(np.arange(T), F, T)
    return np.stack([np.interp(place, np.arange(F), c) for c in time.T], axis=1)


def stretch_from_8(time, T):  # the table of this course has 8 rows, another may not
    place = np.linspace(0, 7, T)
    i = np.minimum(place.astype(int), 6)
    w = (place - i)[:, None]
    return (1 - w) * time[i] + w * time[i + 1]


def stretch_by_hand(time, T):
    F, out = len(time), []
    for t in range(T):
        place = t if T <= F else t * (F - 1) / (T - 1)
        i = min(int(place), F - 2)
        out.append((1 + i - place) * time[i] + (place - i) * time[i + 1])
    return np.array(out)


# --- 5.3: the layer -------------------------------------------------------------------------------


def overflowing(scores):
    e = np.exp(scores)
    return e / e.sum(axis=-1, keepdims=True)


def read(
    x, f, norm, wq, wk, wv, own=None, feature=None, query=None, join=True, scale=None, value=None,
    softly=softmax,
):  # fmt: skip
    """An answer as students write it, with a place for each mistake."""
    own, feature, query = (norm if g is None else g for g in (own, feature, query))
    context = np.concatenate([feature(f), own(x)]) if join else feature(f)
    valued = np.concatenate([value(f), value(x)]) if value else context
    q, k, v = query(x) @ wq, context @ wk, valued @ wv
    scores = q @ k.T / (np.sqrt(q.shape[-1]) if scale is None else scale(q.shape[-1]))
    return x + softly(scores) @ v


def read_by_loops(x, f, norm, wq, wk, wv):
    out = []
    for row in x:
        keys = [norm(c) for c in [*x, *f]]  # in another order: a set has none
        scores = np.array([norm(row) @ wq @ (c @ wk) for c in keys]) / wq.shape[1] ** 0.5
        e = np.exp(scores - scores.max())
        out.append(row + sum(p * (c @ wv) for p, c in zip(e / e.sum(), keys)))
    return out


def late(x, f, norm, *w):
    return norm(read(x, f, lambda y: y, *w))


def as_it_is(y):
    return y


# --- 5.4: the count -------------------------------------------------------------------------------


def count(D_in, D, R, F, layers, H, K, inner=None, matrices=4, norms=3, gain=2, last=1, up=2):
    inner = H * K if inner is None else inner(D, H, K)
    return [D_in * D, (R + F) * D, layers * matrices * D * inner, layers * up * D * 4 * D,
            layers * norms * gain * D + last * gain * D]  # fmt: skip


def count_by_the_library(D_in, D, R, F, layers, H, K):
    sizes = dict(num_latents=R, depth=layers, heads=H, head_dim=K, num_frames=F)
    if D > 100:  # do not build it
        return count(D_in, D, R, F, layers, H, K)
    module, out = PerceiverResampler(D_in, D, **sizes, rng=np.random.default_rng(0)), [0] * 5
    for name, p in module.named_parameters():
        kinds = ("input_proj", "embeddings", "attention", "ffw.up ffw.down", "norm")
        found = [i for i, k in enumerate(kinds) if any(word in name for word in k.split())]
        out[found[0] if found else 1] += p.size
    return out


# --- 5.5: shares ----------------------------------------------------------------------------------


def shares(queries, context, wq, wk, H, T, frames, mean=(0, 1), over=np.sum, scale=None,
           soft=softmax, turn=True, real=None, fill=-np.inf):  # fmt: skip
    """An answer as students write it, with a place for each mistake."""
    R, B = len(queries), len(context)
    q, k = queries @ wq, context @ wk
    if turn:
        q, k = q.reshape(R, H, -1).swapaxes(0, 1), k.reshape(B, -1, H, q.shape[1] // H)
        k = k.swapaxes(1, 2)
    else:
        q, k = q.reshape(H, R, -1), k.reshape(B, H, k.shape[1], -1)
    scores = q @ k.swapaxes(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale(q.shape[-1]))
    S = (context.shape[1] - R) // T
    padding = np.arange(T * S) // S >= np.reshape(frames, (-1, 1))
    padding = np.pad(padding, ((0, 0), (0, R)))[:, None, None]
    looks = soft(np.where(padding if real is None else ~real(padding, S), fill, scores))
    looks = looks.mean(axis=mean) if isinstance(mean, tuple) else mean(looks)
    parts = [*np.split(looks[:, : looks.shape[1] - R], T, axis=1), looks[:, -R:]]
    return np.stack([over(part, axis=1) for part in parts], axis=1)


def shares_by_loops(queries, context, wq, wk, H, T, frames):
    (B, M, _), R, K = context.shape, len(queries), wq.shape[1] // H
    S, out = (M - R) // T, np.zeros((R, T + 1))
    for b, h, r in np.ndindex(B, H, R):
        own = slice(h * K, (h + 1) * K)
        keys = [*range(frames[b] * S), *range(T * S, M)]  # without the padding
        paid = softmax(context[b, keys] @ wk[:, own] @ (queries[r] @ wq[:, own]) / np.sqrt(K))
        for m, p in zip(keys, paid):
            out[r, min(m // S, T)] += p / (B * H)
    return out


def soft_that_overflows(s):
    e = np.exp(s)
    return e / e.sum(axis=-1, keepdims=True)


def cut_before(queries, context, wq, wk, H, T, frames):
    features = context[:, : context.shape[1] - len(queries)]
    dummy = np.concatenate([features, np.zeros((len(context), len(queries), wq.shape[0]))], axis=1)
    hide = lambda s: softmax(np.where(np.arange(s.shape[-1]) < features.shape[1], s, -1e9))  # noqa: E731
    return shares(queries, dummy, wq, wk, H, T, frames, soft=hide)[:, :-1]


def masked_late(*case):
    R, M, T = len(case[0]), case[1].shape[1], case[5]
    frame = np.minimum(np.arange(M) // ((M - R) // T), T)
    seen = (frame < case[6][:, None]) | (frame == T)
    return shares(*case, real=everything, soft=lambda s: softmax(s) * seen[:, None, None])


def everything(padding, S):
    return np.ones_like(padding)


def of_clip_0(padding, S):
    return ~np.repeat(padding[:1], len(padding), axis=0)


def down(s):
    return softmax(s.swapaxes(2, 3)).swapaxes(2, 3)


def counted_by_frames(*case):
    weigh = case[6] / case[6].sum()
    return shares(*case, mean=lambda x: np.einsum("b,bhrm->rm", weigh / x.shape[1], x))


def latents_too(*case):
    R = len(case[0])
    return shares(*case, real=lambda padding, S: ~padding & (np.arange(padding.shape[-1]) <
                                                             padding.shape[-1] - R))  # fmt: skip


def one_frame_more(*case):
    return shares(*case[:6], np.minimum(case[6] + 1, case[5]))


def shares_in_place(queries, context, *others):
    context -= context.mean()
    return shares(queries, context, *others)


RIGHT = [
    ("5.1", with_time_by_loops),
    ("5.1", flat_time),
    ("5.2", stretch),
    ("5.2", stretch_by_hand),
    ("5.2", lambda time, T: time_weights(T, T, len(time)) @ time),
    ("5.3", read),
    ("5.3", read_by_loops),
    ("5.4", count),
    ("5.4", count_by_the_library),
    ("5.5", shares),
    ("5.5", shares_by_loops),
    ("5.4", lambda *a: np.array(count(*a), float)),
]

WRONG = [
    ("5.1", lambda x, time: x.reshape(-1, x.shape[-1]), "the time embedding is off"),
    ("5.1", lambda x, time: x + time[:, None], "not flattened"),
    ("5.1", lambda x, t: (x + t[:, None]).swapaxes(0, 1).reshape(-1, x.shape[-1]),
     "flattened place by place"),
    ("5.1", lambda x, t: flat_time(x, np.tile(t[:1], (len(t), 1))), "the first frame's time"),
    ("5.1", lambda x, t: x.reshape(-1, x.shape[-1]) + np.tile(t, (x.shape[1], 1)), "np.tile"),
    ("5.1", time_of_the_place, "belongs to the FRAME"),
    ("5.1", lambda x, t: (x * t[:, None]).reshape(-1, x.shape[-1]), "added, not multiplied"),
    ("5.2", lambda time, T: stretch(time, T, short=True), "takes the first 3 embeddings"),
    ("5.2", lambda time, T: stretch(time, T, lambda t, F, T: t * F / T), "has the last embedding"),
    ("5.2", lambda time, T: stretch(time, T, lambda t, F, T: t * (F - 1) / T), "divide by T - 1"),
    ("5.2", lambda time, T: stretch(time, T, lambda t, F, T: (t + 0.5) * F / T - 0.5), "centres"),
    ("5.2", lambda time, T: time[np.linspace(0, len(time) - 1, T).round().astype(int)], "nearest"),
    ("5.2", lambda time, T: time[np.arange(T) % len(time)], "repeat from the start"),
    ("5.2", lambda time, T: time[np.minimum(np.arange(T), len(time) - 1)], "past the last trained"),
    ("5.2", lambda time, T: stretch(time, T)[::-1], "the time runs backwards"),
    ("5.2", lambda time, T: time if T < 8 else stretch(time, T), "not all trained ones"),
    ("5.3", lambda *a: read(*a, join=False), "the latents are not appended: keys"),
    ("5.3", lambda *a: read(*a, own=as_it_is), "the appended latents are not normalised"),
    ("5.3", lambda *a: read(*a, feature=as_it_is), "the features are not normalised"),
    ("5.3", lambda *a: read(*a, query=as_it_is), "the queries are not normalised"),
    ("5.3", lambda x, f, norm, *w: read(x, f, as_it_is, *w), "no norm at all"),
    ("5.3", late, "the norm comes too late"),
    ("5.3", lambda x, f, norm, *w: norm(read(x, f, norm, *w)), "the sum is normalised as well"),
    ("5.3", lambda x, *a: read(x, *a) - x, "x + is missing"),
    ("5.3", lambda x, f, norm, *w: read(x, f, norm, *w) - x + norm(x), "not with norm(x)"),
    ("5.3", lambda *a: read(*a, scale=lambda K: 1), "the scale is missing"),
    ("5.3", lambda *a: read(*a, scale=lambda K: K), "the scale is sqrt(K), not K"),
    ("5.3", lambda x, f, *a: read(f, x, *a), "the features read the latents"),
    ("5.3", lambda x, f, norm, wq, wk, wv: read(x, f, norm, wq, wk, wv)[0], "wrong shape: [4, 5]"),
    ("5.4", lambda *a: sum(count(*a)), "not their sum"),
    ("5.4", lambda *a: count(*a, matrices=3), "the output projection is missing"),
    ("5.4", lambda *a: count(*a, inner=lambda D, H, K: D), "heads need not add up to D"),
    ("5.4", lambda *a: count(*a, inner=lambda D, H, K: K), "K is the width of ONE head"),
    ("5.4", lambda *a: count(*a, up=1), "two matrices"),
    ("5.4", lambda *a: count(*a, gain=1), "a gain AND a bias"),
    ("5.4", lambda *a: count(*a, norms=2), "a layer has three norms"),
    ("5.4", lambda *a: count(*a, last=0), "the last norm is missing"),
    ("5.4", lambda *a: count(*a[:4], 1, *a[5:]), "this is one layer"),
    ("5.5", lambda *a: shares(*a)[:, :-1], "the latents, is missing"),
    ("5.5", lambda *a: np.roll(shares(*a), 1, axis=1), "the latents come last"),
    ("5.5", lambda *a: shares(*a, over=np.mean), "not means"),
    ("5.5", lambda *a: shares(*a, mean=lambda x: x.mean(0).sum(0)), "summed over the heads"),
    ("5.5", lambda *a: shares(*a, mean=lambda x: x.sum(0).mean(0)), "summed over the clips"),
    ("5.5", lambda *a: shares(*a, mean=lambda x: x.mean(0)[0]), "the first head alone"),
    ("5.5", lambda *a: shares(*a, mean=lambda x: x.mean(1)[0]), "the first clip alone"),
    ("5.5", lambda *a: shares(*a, scale=lambda K: 1), "the scale is missing"),
    ("5.5", lambda *a: shares(*a, scale=lambda K: (K * a[4]) ** -0.5), "the width of ONE head"),
    ("5.5", lambda *a: shares(*a[:4], 1, *a[5:]), "this is ONE head"),
    ("5.5", lambda *a: shares(*a, turn=False), "mixes rows with heads"),
    ("5.5", lambda *a: shares(*a, soft=down, fill=-1e30),
     "wrong softmax axis"),
    ("5.5", lambda *a: shares(*a, real=everything), "the padding is looked at, too"),
    ("5.5", lambda *a: shares(*a, fill=0), "a score of 0 is no mask"),
    ("5.5", lambda *a: shares(*a, soft=down), "is it over the keys, the last axis?"),
    ("5.5", masked_late, "the mask comes too late"),
    ("5.5", latents_too, "the latents are always there"),
    ("5.5", one_frame_more, "off by one: the frames 0 to frames[b] - 1"),
    ("5.5", lambda *a: shares(*a, real=of_clip_0), "this takes clip 0's"),
    ("5.5", counted_by_frames, "each clip counts alike"),
    ("5.5", cut_before, "cut them off AFTER the softmax"),
    ("5.5", lambda *a: shares(*a).T, "the axes are exchanged"),
    ("5.5", lambda *a: 100 * shares(*a), "every number is 100 times the right one"),
    ("5.5", lambda *a: shares(*a, soft=soft_that_overflows), "subtract the row's maximum"),
    ("5.5", shares_in_place, "changes its argument number 2 in place"),
    ("5.2", lambda time, T: stretch(time, T) if T <= 8 else stretch_from_8(time, T), "IndexError"),
    ("5.3", lambda *a: read(*a, softly=overflowing), "subtract the row's maximum before exp"),
    ("5.3", lambda *a: read(*a, value=as_it_is), "the values are made of what is normalised"),
    ("5.4", lambda *a: [*count(*a)[:2], count(*a)[2] / a[4], *count(*a)[3:]], "one layer"),
]  # fmt: skip
