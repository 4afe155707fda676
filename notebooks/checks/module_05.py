"""Checks of module 05: frames and their time, a resampler's layer, its size, where it looks."""

from functools import partial

import numpy as np

from miniflamingo.functional import layer_norm, softmax
from miniflamingo.perceiver import time_weights

from .core import call, exercise, expect, expect_stable

# --- 5.1: time ------------------------------------------------------------------------------------


@exercise("5.1")
def with_time(answer):
    """answer(x [T, S, D], time [T, D]) -> [T*S, D]."""
    for T, S, D in ((3, 4, 2), (3, 3, 3)):
        rng = np.random.default_rng(T * S)
        x, time = rng.normal(size=(T, S, D)), rng.normal(size=(T, D))
        right = (x + time[:, None]).reshape(T * S, D)
        expect(call(answer, x, time), right, _time_mistakes(x, time))


def _time_mistakes(x, time):
    T, S, D = x.shape
    right = (x + time[:, None]).reshape(T * S, D)
    yield "the time embedding is off: nothing tells the frames apart", x.reshape(T * S, D)
    yield "not flattened: [T*S, D] is wanted, frame after frame", right.reshape(T, S, D)
    yield (
        "flattened place by place: frame after frame is wanted",
        right.reshape(T, S, D).swapaxes(0, 1).reshape(T * S, D),
    )
    yield (
        "flattened place by place: frame after frame is wanted",
        x.swapaxes(0, 1).reshape(T * S, D) + np.repeat(time, S, axis=0),
    )
    if S == T:
        wrong = (x + time).reshape(T * S, D)
        yield "the embedding belongs to the FRAME, yours to the place: time[:, None]", wrong
    tiled = x.reshape(T * S, D) + np.tile(time, (S, 1))
    yield "np.tile gives neighbours different times: all S features of a frame share one", tiled
    yield "every frame gets the first frame's time", (x + time[0]).reshape(T * S, D)
    yield "times are added, not multiplied", (x * time[:, None]).reshape(T * S, D)


# --- 5.2: more frames than trained ----------------------------------------------------------------


@exercise("5.2")
def stretch(answer):
    """answer(time [F, D], T) -> [T, D]."""
    for F, T in ((8, 30), (8, 9), (8, 8), (8, 3), (8, 1), (5, 12), (5, 4)):
        time = np.random.default_rng(F).normal(size=(F, 3))
        right = time_weights(T, T, len(time)) @ time
        expect(call(answer, time, T), right, _stretch_mistakes(time, T))


def interpolated(time, place):
    """[F, D] read off at the places [T], linearly, the ends held."""
    columns = [np.interp(place, np.arange(len(time)), column) for column in time.T]
    return np.stack(columns, axis=1)


def _stretch_mistakes(time, T):
    F, t = len(time), np.arange(T)
    if T <= F:
        yield (
            f"a clip of {T} frames, no more than were trained, takes the first {T} embeddings",
            interpolated(time, np.linspace(0, F - 1, T)),
        )
        yield f"[T, D] is wanted, for {T} frames, not all trained ones", time
        return
    place = np.linspace(0, F - 1, T)
    yield (
        "the ends do not lie on ends: the last frame has the last embedding, (F - 1) / (T - 1)",
        interpolated(time, t * F / T),
    )
    yield (
        "the ends do not lie on ends: divide by T - 1, the steps between T frames",
        interpolated(time, t * (F - 1) / T),
    )
    yield (
        "the ends do not lie on ends: this aligns the centres of frames",
        interpolated(time, (t + 0.5) * F / T - 0.5),
    )
    yield "not interpolated: this takes the nearest embedding", time[place.round().astype(int)]
    yield "not interpolated: this rounds down", time[place.astype(int)]
    yield "these repeat from the start: frame 8 would stand at the time of frame 0", time[t % F]
    yield "all frames past the last trained one get its time", time[np.minimum(t, F - 1)]
    backwards = interpolated(time, place[::-1])
    yield "the time runs backwards", backwards
    i = np.minimum(place.astype(int), F - 2)
    w = (place - i)[:, None]
    yield (
        "the weights are exchanged: near i, tau_i counts most",
        w * time[i] + (1 - w) * time[i + 1],
    )


# --- 5.3: a layer ---------------------------------------------------------------------------------


def plain_norm(x):
    """Layer norm without gain and bias."""
    return layer_norm(x, np.ones(x.shape[-1]), np.zeros(x.shape[-1]))


def layer_case(seed, R=4, M=7, D=5, K=3):
    """x [R, D], f [M, D] at another size, and the three projections."""
    rng = np.random.default_rng(seed)
    x, f = rng.normal(0.5, 1, (R, D)), rng.normal(1, 3, (M, D))
    wq, wk = rng.normal(size=(2, D, K))
    return x, f, wq, wk, rng.normal(size=(D, D))


@exercise("5.3")
def layer(answer):
    """answer(x [R, D], f [M, D], norm, wq, wk, wv) -> [R, D]."""
    for seed, M in ((0, 7), (1, 4)):
        x, f, *w = layer_case(seed, M=M)
        expect(
            call(answer, x, f, plain_norm, *w), layer_by_parts(x, f, *w), _layer_mistakes(x, f, *w)
        )
    x, f, wq, *w = layer_case(2)
    right = layer_by_parts(x, f, 1000 * wq, *w)
    expect_stable(call(answer, x, f, plain_norm, 1000 * wq, *w), right)


def _same(x):
    return x


def layer_by_parts(
    x, f, wq, wk, wv, norm_x=plain_norm, norm_f=plain_norm, norm_own=plain_norm, append=True,
    scale=None, begin=_same, end=_same, axis=-1, values=None,
):  # fmt: skip
    """Equations (3) and (4), with a place for each mistake."""
    context = np.concatenate([norm_f(f), norm_own(x)]) if append else norm_f(f)
    q, k, v = norm_x(x) @ wq, context @ wk, context @ (wv if values is None else values)
    scores = q @ k.T * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = softmax(scores) if axis == -1 else softmax(scores.T).T
    return end(begin(x) + weights @ v)


def _layer_mistakes(x, f, *w):
    make, K = partial(layer_by_parts, x, f, *w), w[0].shape[-1]
    yield "the latents are not appended: keys and values are [norm(f); norm(x)]", make(append=False)
    yield (
        "the latents are not appended, and the features are not normalised",
        make(append=False, norm_f=_same),
    )
    yield (
        "no norm at all: f and x are normalised before the projections",
        make(norm_x=_same, norm_f=_same, norm_own=_same),
    )
    yield "the features are not normalised: their size decides the softmax", make(norm_f=_same)
    yield "the appended latents are not normalised: [norm(f); norm(x)]", make(norm_own=_same)
    yield "the queries are not normalised: norm(x) @ wq", make(norm_x=_same)
    yield (
        "only the features are normalised: queries and appended latents are norm(x)",
        make(norm_x=_same, norm_own=_same),
    )
    yield (
        "the norm comes too late: it stands before the projections, not after the sum",
        make(norm_x=_same, norm_f=_same, norm_own=_same, end=plain_norm),
    )
    yield "the sum is normalised as well: x goes on as it is", make(end=plain_norm)
    yield "the sum begins with x itself, not with norm(x)", make(begin=plain_norm)
    yield "x + is missing: the attention is ADDED to the latents", make(begin=np.zeros_like)
    yield "the scale is missing: divide the scores by sqrt(K)", make(scale=1)
    yield "the scale is sqrt(K), not K", make(scale=1 / K)
    yield "the scale is sqrt(K), of the projected width, not sqrt(D)", make(scale=len(w[0]) ** -0.5)
    yield "wrong softmax axis: each latent spreads over the keys, the last axis", make(axis=0)
    yield "the values are made of what is normalised, as the keys are", _places_of_values(x, f, *w)
    yield "the features read the latents: the queries are the latents", _exchanged(x, f, *w)


def _places_of_values(x, f, wq, wk, wv):
    weights = softmax(plain_norm(x) @ wq @ (np.concatenate([*map(plain_norm, (f, x))]) @ wk).T
                      / np.sqrt(wq.shape[1]))  # fmt: skip
    return x + weights @ (np.concatenate([f, x]) @ wv)


def _exchanged(x, f, wq, wk, wv):
    return layer_by_parts(f, x, wq, wk, wv)


# --- 5.4: parameters ------------------------------------------------------------------------------


@exercise("5.4")
def count(answer):
    """answer(D_in, D, R, F, layers, H, K) -> int[5]."""
    for sizes in ((7, 5, 3, 2, 4, 2, 6), (3072, 1536, 64, 8, 6, 16, 128)):
        expect(call(answer, *sizes), counted(*sizes), _count_mistakes(*sizes), whole=True)


def counted(D_in, D, R, F, layers, H, K, matrices=4, last=True, per_layer=3, bias=2, up=2):
    """Equation (6), part by part, with a place for each mistake."""
    norms = layers * per_layer * bias * D + last * bias * D
    attention = layers * matrices * D * H * K
    return np.array([D_in * D, (R + F) * D, attention, layers * up * 4 * D * D, norms])


def _count_mistakes(*sizes):
    D_in, D, R, F, layers, H, K = sizes
    make, right = partial(counted, *sizes), counted(*sizes)
    yield "five numbers are wanted, not their sum", right.sum()
    yield "the output projection is missing: attention has four matrices", make(matrices=3)
    yield (
        "heads need not add up to D: the inner width is H * K",
        np.array([*right[:2], layers * 4 * D * D, *right[3:]]),
    )
    yield "K is the width of ONE head: all together are H * K", make(matrices=4 / H)
    yield "the feed-forward has two matrices, up and down", make(up=1)
    yield (
        "the hidden width is 4 * D",
        np.array([*right[:3], layers * 2 * D * D, right[4]]),
    )
    yield "a norm has a gain AND a bias", make(bias=1)
    yield "the last norm is missing", make(last=False)
    yield (
        "a layer has three norms: on the features, on the latents, in the feed-forward",
        make(per_layer=2),
    )
    one = counted(D_in, D, R, F, 1, H, K)
    yield "this is one layer: there are more", one
    for i in (2, 3):
        words = f"{('attention', 'feed-forward')[i - 2]}: this is one layer, there are more"
        yield words, np.where(np.arange(5) == i, one, right)
    yield "the latents are missing", make() - np.array([0, R * D, 0, 0, 0])
    yield "the time embeddings are missing", make() - np.array([0, F * D, 0, 0, 0])


# --- 5.5: the share of each frame -----------------------------------------------------------------


def looks_case(seed, T, B=3, H=3, R=2, S=4, D=5, K=2):
    """queries [R, D], context [B, T*S + R, D], wq and wk [D, H*K], H, T, frames: random."""
    rng = np.random.default_rng(seed)
    queries, context = rng.normal(size=(R, D)), rng.normal(size=(B, T * S + R, D))
    frames = np.arange(B) % T + 1
    for b, n in enumerate(frames):
        context[b, n * S : T * S] *= 5  # what stands in the padding is no feature of a picture
    return queries, context, *rng.normal(size=(2, D, H * K)), H, T, frames


OVER_NOTHING = "a softmax over nothing is 0 / 0: is it over the keys, the last axis?"


@exercise("5.5")
def shares(answer):
    """answer(queries [R, D], context [B, M, D], wq, wk [D, H*K], H, T, frames) -> [R, T + 1]."""
    cases = dict(T=3, B=2), dict(T=4, S=3, R=3, H=2, K=3), dict(T=1, B=1, H=1, K=4), dict(T=2)
    for seed, sizes in enumerate(cases):
        queries, *others = looks_case(seed, **sizes)
        judge = partial(expect, infinite=OVER_NOTHING)
        if seed == 3:
            queries, judge = 2000 * queries, expect_stable
        case = queries, *others
        judge(call(answer, *case), shares_of(*case), _share_mistakes(*case))


def real_keys(R, M, T, frames):
    """bool [B, 1, 1, M]: the features of each clip's own frames, and the latents."""
    frame = np.minimum(np.arange(M) // ((M - R) // T), T)
    return ((frame < frames[:, None]) | (frame == T))[:, None, None]


def looks_of(
    queries, context, wq, wk, H, T, frames, scale=None, split=None, soft=softmax, real=None
):  # -> [B, H, R, M]
    """The weights of (4), with a place for each mistake."""
    split = split or (lambda x: x.reshape(*x.shape[:-1], H, -1).swapaxes(-2, -3))
    q, k = split(queries @ wq), split(context @ wk)
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale(q.shape[-1]))
    real = real_keys(len(queries), context.shape[1], T, frames) if real is None else real
    return soft(np.where(real, scores, -1e30))


def shares_of(*case, over=np.sum, mean=None, **how):
    """[R, T + 1]: the frames, then the latents themselves."""
    looks, R, T = looks_of(*case, **how), len(case[0]), case[5]
    looks = looks.mean(axis=(0, 1)) if mean is None else mean(looks)
    frames = over(looks[:, :-R].reshape(R, T, -1), axis=-1)
    return np.column_stack([frames, over(looks[:, -R:], axis=-1)])


def _share_mistakes(*case):
    queries, _, wq, _, H, T, frames = case
    right, R = shares_of(*case), len(queries)
    mean = looks_of(*case).mean(axis=(0, 1))

    def wrong(**how):
        return shares_of(*case, **how)

    yield "the last column, the latents, is missing: [R, T + 1]", right[:, :-1]
    yield "the latents come last: they stand behind the features", np.roll(right, 1, axis=1)
    yield "shares are sums over the S features of a frame, not means", wrong(over=np.mean)
    yield (
        "summed over the heads: take the mean, a row sums to 1",
        wrong(mean=lambda a: a.mean(axis=0).sum(axis=0)),
    )
    yield (
        "summed over the clips: take the mean, a row sums to 1",
        wrong(mean=lambda a: a.sum(axis=0).mean(axis=0)),
    )
    yield (
        "this is the first head alone: take the mean of all",
        wrong(mean=lambda a: a[:, 0].mean(0)),
    )
    yield "this is the first clip alone: take the mean of all", wrong(mean=lambda a: a[0].mean(0))
    yield from _padding_mistakes(*case)
    yield "the scale is missing: divide the scores by sqrt(K)", wrong(scale=lambda K: 1)
    yield "the scale is sqrt(K), not K", wrong(scale=lambda K: 1 / K)
    yield (
        "the scale is by the width of ONE head, K, not of all",
        wrong(scale=lambda K: wq.shape[1] ** -0.5),
    )
    yield "the scale is by K, not by D", wrong(scale=lambda K: len(wq) ** -0.5)
    yield (
        "this is ONE head of width H*K: split both projections into H parts",
        shares_of(*case[:4], 1, T, frames),
    )
    mixed = "a reshape to [H, R, K] mixes rows with heads: reshape to [R, H, K], then swapaxes"
    yield mixed, wrong(split=lambda x: x.reshape(*x.shape[:-2], H, x.shape[-2], -1))
    yield (
        "head h owns K columns side by side: reshape(R, H, K), not (R, K, H)",
        wrong(split=lambda x: np.moveaxis(x.reshape(*x.shape[:-1], -1, H), -1, -3)),
    )
    yield (
        "wrong softmax axis: each latent spreads over the keys, the last axis",
        wrong(soft=lambda a: softmax(a.swapaxes(-1, -2)).swapaxes(-1, -2)),
    )
    features = softmax(looks_of(*case, soft=lambda a: a)[..., :-R]).mean(axis=(0, 1))
    alone = features.reshape(R, T, -1).sum(axis=-1)
    yield "the latents are keys, too: cut them off AFTER the softmax", alone
    yield (
        "the latents are keys, too: cut them off AFTER the softmax",
        np.column_stack([alone, right[:, -1]]),
    )
    frames = mean[:, :-R].reshape(R, -1, T).sum(axis=1)
    yield (
        "the features stand frame after frame: reshape to [R, T, S], then sum over S",
        np.column_stack([frames, right[:, -1]]),
    )
    front = mean[:, R:].reshape(R, T, -1).sum(axis=-1)
    yield (
        "the latents' columns are the LAST R, not the first",
        np.column_stack([front, mean[:, :R].sum(axis=-1)]),
    )
    yield "the axes are exchanged: [R, T + 1], a row for each latent", right.T


def _padding_mistakes(*case):
    queries, context, _, _, _, T, frames = case
    (B, M, _), R = context.shape, len(queries)
    real, latent = real_keys(R, M, T, frames), np.arange(M) >= M - R

    def wrong(real, **how):
        return shares_of(*case, real=real, **how)

    yield "the padding is looked at, too: clip b has frames[b] frames", wrong(np.array(True))
    yield (
        "the mask comes too late: mask the scores before the softmax, or a row does not sum to 1",
        wrong(np.array(True), soft=lambda s: softmax(s) * real),
    )
    yield (
        "a score of 0 is no mask: exp(0) = 1",
        wrong(np.array(True), soft=lambda s: softmax(np.where(real, s, 0))),
    )
    yield "the latents are always there: only features are masked", wrong(real & ~latent)
    yield (
        "off by one: the frames 0 to frames[b] - 1 are real",
        wrong(real_keys(R, M, T, np.minimum(frames + 1, T))),
    )
    yield "each clip has a length of its own: this takes clip 0's", wrong(real[:1])
    yield (
        "the real frames come first, the padding behind them",
        wrong(np.concatenate([real[..., : M - R][..., ::-1], real[..., M - R :]], axis=-1)),
    )
    yield "upside down: what is real is looked at, the padding is masked", wrong(~real | latent)
    S = (M - R) // T
    tiled = np.tile(np.arange(T) < frames[:, None], (1, S))
    tiled = np.concatenate([tiled, np.ones((B, R), bool)], axis=1)[:, None, None]
    yield "the S features of a frame stand side by side: np.repeat, not np.tile", wrong(tiled)
    weigh = frames[:, None, None] / frames.sum()
    yield (
        "each clip counts alike, however long it is",
        wrong(None, mean=lambda a: (a.mean(axis=1) * weigh).sum(axis=0)),
    )
