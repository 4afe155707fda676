"""Right and wrong answers to the exercises of module 04, for test_checks.py."""

import numpy as np

from miniflamingo.functional import softmax
from miniflamingo.perceiver import PerceiverResampler, time_weights

# --- 4.1 and 4.2: time ----------------------------------------------------------------------------


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


def stretch_by_hand(time, T):
    F, out = len(time), []
    for t in range(T):
        place = t if T <= F else t * (F - 1) / (T - 1)
        i = min(int(place), F - 2)
        out.append((1 + i - place) * time[i] + (place - i) * time[i + 1])
    return np.array(out)


# --- 4.3: the layer -------------------------------------------------------------------------------


def read(x, f, norm, wq, wk, wv, own=None, feature=None, query=None, join=True, scale=None):
    """An answer as students write it, with a place for each mistake."""
    own, feature, query = (norm if g is None else g for g in (own, feature, query))
    context = np.concatenate([feature(f), own(x)]) if join else feature(f)
    q, k, v = query(x) @ wq, context @ wk, context @ wv
    scores = q @ k.T / (np.sqrt(q.shape[-1]) if scale is None else scale(q.shape[-1]))
    return x + softmax(scores) @ v


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


# --- 4.4: the count -------------------------------------------------------------------------------


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


# --- 4.5: shares ----------------------------------------------------------------------------------


def shares(maps, T, heads=np.mean, over=np.sum):
    R = maps.shape[1]
    mean = heads(maps, axis=0)
    parts = [*np.split(mean[:, : mean.shape[1] - R], T, axis=1), mean[:, -R:]]
    return np.stack([over(part, axis=1) for part in parts], axis=1)


def shares_by_loops(maps, T):
    H, R, M = maps.shape
    S, out = (M - R) // T, np.zeros((R, T + 1))
    for h, r, m in np.ndindex(H, R, M):
        out[r, min(m // S, T)] += maps[h, r, m] / H
    return out


RIGHT = [
    ("4.1", with_time_by_loops),
    ("4.1", flat_time),
    ("4.2", stretch),
    ("4.2", stretch_by_hand),
    ("4.2", lambda time, T: time_weights(T, T, len(time)) @ time),
    ("4.3", read),
    ("4.3", read_by_loops),
    ("4.4", count),
    ("4.4", count_by_the_library),
    ("4.5", shares),
    ("4.5", shares_by_loops),
]

WRONG = [
    ("4.1", lambda x, time: x.reshape(-1, x.shape[-1]), "the time embedding is off"),
    ("4.1", lambda x, time: x + time[:, None], "not flattened"),
    ("4.1", lambda x, t: (x + t[:, None]).swapaxes(0, 1).reshape(-1, x.shape[-1]),
     "flattened place by place"),
    ("4.1", lambda x, t: flat_time(x, np.tile(t[:1], (len(t), 1))), "the first frame's time"),
    ("4.1", lambda x, t: x.reshape(-1, x.shape[-1]) + np.tile(t, (x.shape[1], 1)), "np.tile"),
    ("4.1", time_of_the_place, "belongs to the FRAME"),
    ("4.1", lambda x, t: (x * t[:, None]).reshape(-1, x.shape[-1]), "added, not multiplied"),
    ("4.2", lambda time, T: stretch(time, T, short=True), "takes the first 3 embeddings"),
    ("4.2", lambda time, T: stretch(time, T, lambda t, F, T: t * F / T), "has the last embedding"),
    ("4.2", lambda time, T: stretch(time, T, lambda t, F, T: t * (F - 1) / T), "divide by T - 1"),
    ("4.2", lambda time, T: stretch(time, T, lambda t, F, T: (t + 0.5) * F / T - 0.5), "centres"),
    ("4.2", lambda time, T: time[np.linspace(0, len(time) - 1, T).round().astype(int)], "nearest"),
    ("4.2", lambda time, T: time[np.arange(T) % len(time)], "repeat from the start"),
    ("4.2", lambda time, T: time[np.minimum(np.arange(T), len(time) - 1)], "past the last trained"),
    ("4.2", lambda time, T: stretch(time, T)[::-1], "the time runs backwards"),
    ("4.2", lambda time, T: time if T < 8 else stretch(time, T), "not all trained ones"),
    ("4.3", lambda *a: read(*a, join=False), "the latents are not appended: keys"),
    ("4.3", lambda *a: read(*a, own=as_it_is), "the appended latents are not normalised"),
    ("4.3", lambda *a: read(*a, feature=as_it_is), "the features are not normalised"),
    ("4.3", lambda *a: read(*a, query=as_it_is), "the queries are not normalised"),
    ("4.3", lambda x, f, norm, *w: read(x, f, as_it_is, *w), "no norm at all"),
    ("4.3", late, "the norm comes too late"),
    ("4.3", lambda x, f, norm, *w: norm(read(x, f, norm, *w)), "the sum is normalised as well"),
    ("4.3", lambda x, *a: read(x, *a) - x, "x + is missing"),
    ("4.3", lambda x, f, norm, *w: read(x, f, norm, *w) - x + norm(x), "not with norm(x)"),
    ("4.3", lambda *a: read(*a, scale=lambda K: 1), "the scale is missing"),
    ("4.3", lambda *a: read(*a, scale=lambda K: K), "the scale is sqrt(K), not K"),
    ("4.3", lambda x, f, *a: read(f, x, *a), "the features read the latents"),
    ("4.3", lambda x, f, norm, wq, wk, wv: read(x, f, norm, wq, wk, wv)[0], "wrong shape: [4, 5]"),
    ("4.4", lambda *a: sum(count(*a)), "not their sum"),
    ("4.4", lambda *a: count(*a, matrices=3), "the output projection is missing"),
    ("4.4", lambda *a: count(*a, inner=lambda D, H, K: D), "heads need not add up to D"),
    ("4.4", lambda *a: count(*a, inner=lambda D, H, K: K), "K is the width of ONE head"),
    ("4.4", lambda *a: count(*a, up=1), "two matrices"),
    ("4.4", lambda *a: count(*a, gain=1), "a gain AND a bias"),
    ("4.4", lambda *a: count(*a, norms=2), "a layer has three norms"),
    ("4.4", lambda *a: count(*a, last=0), "the last norm is missing"),
    ("4.4", lambda *a: count(*a[:4], 1, *a[5:]), "this is one layer"),
    ("4.5", lambda *a: shares(*a)[:, :-1], "the latents, is missing"),
    ("4.5", lambda *a: np.roll(shares(*a), 1, axis=1), "the latents come last"),
    ("4.5", lambda *a: shares(*a, over=np.mean), "not means"),
    ("4.5", lambda *a: shares(*a, heads=np.sum), "summed over the heads"),
    ("4.5", lambda maps, T: shares(maps[:1], T), "the first head alone"),
    ("4.5", lambda *a: shares(*a).T, "the axes are exchanged"),
    ("4.5", lambda maps, T: shares(np.roll(maps, -2, axis=-1), T), "the LAST R, not the first"),
]  # fmt: skip
