"""Checks of module 03: counting scores, reading inputs, taking turns, position codes."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.functional import softmax

from .core import call, exercise, expect, expect_stable

# --- 3.1: counting --------------------------------------------------------------------------------


@exercise("3.1")
def scores(answer):
    """answer(M int[...], R, J, P) -> int[...]."""
    for M, R, J, P in (([100, 700, 5000], 8, 3, 5), ([[64], [90]], 16, 2, 4)):
        M = np.array(M)
        right = J * (M * R + P * R * R)
        expect(call(answer, M, R, J, P), right, _count_mistakes(M, R, J, P), whole=True)


def _count_mistakes(M, R, J, P):
    yield (
        "this is self-attention over the inputs: the latents read them, M R",
        J * (M**2 + P * R**2),
    )
    yield "this is self-attention over the inputs: the latents read them, M R", M**2
    yield "the self-attentions never see M: R^2 each", J * (M * R + P * M * R)
    yield "the self-attentions never see M: R^2 each", J * (M * R + P * M**2)
    yield "the turns are missing: J times both terms", M * R + P * R**2
    yield "the latents read once in EVERY turn: J times M R, too", M * R + J * P * R**2
    yield "every turn has its own self-attentions: J times P R^2", J * M * R + P * R**2
    yield "a turn has P self-attentions, not one", J * (M * R + R**2)
    yield "a turn has one cross-attention, not P", J * P * (M * R + R**2)
    yield "the latents alone: the inputs are missing", M * 0 + J * P * R**2
    yield "a self-attention of R latents has R^2 scores, not R", J * (M * R + P * R)


# --- 3.2: reading ---------------------------------------------------------------------------------


def read_case(seed=0, B=2, R=3, D=6, M=5, D_in=4, K=4):
    """latents [R, D], inputs [B, M, D_in], Wq [K, D], Wk [K, D_in], Wv [D, D_in]: random."""
    shapes = (R, D), (B, M, D_in), (K, D), (K, D_in), (D, D_in)
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape) for shape in shapes)


def projected(latents, inputs, Wq, Wk, Wv):
    """q [R, K], k [B, M, K], v [B, M, D]."""
    return latents @ Wq.T, inputs @ Wk.T, inputs @ Wv.T


def read_inputs(latents, *others):
    """Equation (1)."""
    return latents + attention(*projected(latents, *others))


@exercise("3.2")
def read(answer):
    """answer(latents [R, D], inputs [B, M, D_in], Wq, Wk, Wv) -> [B, R, D]."""
    for case in (read_case(), read_case(1, 3, 2, 8, 7, 5, 4)):
        expect(call(answer, *case), read_inputs(*case), _read_mistakes(*case))
    latents, inputs, Wq, *others = read_case(2)
    case = latents, inputs, 2000 * Wq, *others
    expect_stable(call(answer, *case), read_inputs(*case))


def _read_mistakes(latents, *others):
    q, k, v = projected(latents, *others)
    K, s = q.shape[-1], q @ k.swapaxes(1, 2)
    yield "the residual is missing: latents + what they read", attention(q, k, v)
    yield "the residual is there twice: latents + what they read", 2 * latents + attention(q, k, v)
    yield "the residual is the LATENT, not its query", _added(q, attention(q, k, v))
    yield "the scale is missing: divide the scores by sqrt(K)", latents + softmax(s) @ v
    yield (
        "wrong scale: DIVIDE by sqrt(K), yours multiplies",
        latents + softmax(s * np.sqrt(K)) @ v,
    )
    yield "wrong scale: divide by sqrt(K), not by K", latents + softmax(s / K) @ v
    for width in (latents.shape[1], others[0].shape[2]):
        words = "wrong scale: K is the width of queries and keys, not of latents or inputs"
        yield words, latents + softmax(s / np.sqrt(width)) @ v
    s = s / np.sqrt(K)
    yield (
        "wrong softmax axis: each latent shares itself out over the INPUTS, yours compete for each "
        "input",
        latents + softmax(s.swapaxes(1, 2)).swapaxes(1, 2) @ v,
    )
    yield "the softmax is missing", latents + s @ v
    yield (
        "the roles are exchanged: the LATENTS ask; the output has R rows, not M",
        attention(k, np.broadcast_to(q, (len(k), *q.shape)), np.stack([latents] * len(k))),
    )
    yield (
        "this is the first row of the batch for all",
        np.broadcast_to((latents + attention(q, k[:1], v[:1])), (len(k), *latents.shape)),
    )
    yield "the inputs' mean: the weights are missing", latents + v.mean(axis=1, keepdims=True)


def _added(q, read):
    return q + read if q.shape[-1] == read.shape[-1] else np.full(1, np.nan)


# --- 3.3: turns -----------------------------------------------------------------------------------


def turns_case(seed=0, J=2, P=3):
    """latents [1, R, D], inputs [1, M, D], J readings, J lists of P thoughts: small functions."""
    rng = np.random.default_rng(seed)
    latents, inputs = rng.normal(size=(1, 3, 4)), rng.normal(size=(1, 6, 4))

    def reading(W):
        return lambda z, x: z + attention(z @ W, x, x)

    def thought(W):
        return lambda z: z + np.tanh(attention(z, z, z) @ W)

    cross = [reading(rng.normal(size=(4, 4))) for _ in range(J)]
    blocks = [[thought(rng.normal(size=(4, 4))) for _ in range(P)] for _ in range(J)]
    return latents, inputs, cross, blocks


@exercise("3.3")
def perceive(answer):
    """answer(latents, inputs, cross, blocks) -> latents [B, R, D] after all turns."""
    for case in (turns_case(), turns_case(1, 3, 1), turns_case(2, 2, 0)):
        expect(call(answer, *case), turns(*case), _turn_mistakes(*case))


def turns(z, x, cross, blocks, again=False, feed=False):
    """Equation (2); again: every turn from the first latents; feed: they replace the inputs."""
    first = z
    for read_them, thoughts in zip(cross, blocks):
        z = read_them(first if again else z, x)
        for think in thoughts:
            z = think(z)
        x = z if feed else x
    return z


def _turn_mistakes(z, x, cross, blocks):
    flat = [think for thoughts in blocks for think in thoughts]
    none = [[] for _ in blocks]
    twice = [lambda z, x, f=f: z + f(z, x) for f in cross]
    inside = "the residual is inside the functions: z = read(z, x), without another z +"
    yield inside, turns(z, x, twice, blocks)
    blocks_twice = [[lambda z, f=f: z + f(z) for f in thoughts] for thoughts in blocks]
    yield inside, turns(z, x, cross, blocks_twice)
    yield inside, turns(z, x, twice, blocks_twice)
    yield "one turn only: go through all J of them", turns(z, x, cross[:1], blocks[:1])
    yield (
        "every turn starts from the FIRST latents: hand the new ones on",
        turns(z, x, cross, blocks, again=True),
    )
    yield (
        "the inputs are lost after turn 1: every turn reads the same, unchanged inputs",
        turns(z, x, cross, blocks, feed=True),
    )
    yield "the latents read, but never think: the blocks are missing", turns(z, x, cross, none)
    yield (
        "all readings first, then all blocks: each turn reads AND thinks",
        turns(z, x, cross, [*none[1:], flat]),
    )
    yield (
        "one block of each turn: a turn has P of them",
        turns(z, x, cross, [b[:1] for b in blocks]),
    )
    yield (
        "one block of each turn: a turn has P of them",
        turns(z, x, cross, [b[-1:] for b in blocks]),
    )
    yield (
        "think after reading, not before",
        _thinking_first(z, x, cross, blocks),
    )
    yield (
        "the first turn's functions in every turn",
        turns(z, x, cross[:1] * len(cross), blocks[:1] * len(cross)),
    )
    yield "the turns run backwards", turns(z, x, cross[::-1], blocks[::-1])
    yield "nothing is read or thought: these are the latents as they came", z


def _thinking_first(z, x, cross, blocks):
    for read_them, thoughts in zip(cross, blocks):
        for think in thoughts:
            z = think(z)
        z = read_them(z, x)
    return z


# --- 3.4: pictures with their places --------------------------------------------------------------


@exercise("3.4")
def places(answer):
    """answer(pictures [B, h, w, C], F) -> [B, h * w, C + 2 * (2F + 1)]."""
    for seed, shape, F in ((0, (2, 4, 5, 3), 2), (1, (1, 3, 3, 2), 3), (2, (3, 2, 6, 1), 1)):
        pictures = np.random.default_rng(seed).uniform(size=shape)
        right = with_places(pictures, F)
        expect(call(answer, pictures, F), right, _place_mistakes(pictures, F))


def fourier(u, frequencies, turn=np.pi):
    """Equation (4), for any frequencies."""
    angles = turn * u[:, None] * frequencies
    return np.concatenate([u[:, None], np.sin(angles), np.cos(angles)], axis=1)


def with_places(pictures, F, code=None, span=(-1, 1), spread=(np.repeat, np.tile), order=(0, 1, 2)):
    """The right answer, with a place for each mistake; code makes [n, ...] of positions u [n]."""
    B, h, w, C = pictures.shape
    code = code or (lambda u: fourier(u, np.arange(1, F + 1)))
    rows, columns = (code(np.linspace(*span, n)) for n in (h, w))
    if spread[0] is np.repeat:
        rows, columns = np.repeat(rows, w, axis=0), np.tile(columns, (h, 1))
    else:
        rows, columns = np.tile(rows, (w, 1)), np.repeat(columns, h, axis=0)
    parts = [np.broadcast_to(x, (B, *x.shape)) for x in (rows, columns)]
    parts = [pictures.reshape(B, h * w, C), *parts]
    return np.concatenate([parts[i] for i in order], axis=2)


def _place_mistakes(pictures, F):
    f = np.arange(1, F + 1)

    def wrong(code=None, **how):
        return with_places(pictures, F, code, **how)

    def columns_of(*order):
        return lambda u: fourier(u, f)[:, [*order]]

    sines, cosines = range(1, F + 1), range(F + 1, 2 * F + 1)
    yield "pi is missing: sin(f pi u)", wrong(lambda u: fourier(u, f, 1))
    yield (
        "pi, not 2 pi: u runs from -1 to 1, one wave at f = 1",
        wrong(lambda u: fourier(u, f, 2 * np.pi)),
    )
    yield "the frequencies are 1 to F: yours begin at 0", wrong(lambda u: fourier(u, f - 1))
    powers = "the frequencies are 1 to F, evenly spaced: yours are powers of two"
    yield powers, wrong(lambda u: fourier(u, 2 ** (f - 1)))
    yield powers, wrong(lambda u: fourier(u, 2**f))
    yield "u itself is missing: it is the first code", wrong(columns_of(*sines, *cosines))
    yield "u itself is the FIRST code", wrong(columns_of(*sines, *cosines, 0))
    yield "the cosines are missing", wrong(columns_of(0, *sines))
    yield "the sines come before the cosines", wrong(columns_of(0, *cosines, *sines))
    pairs = [k for pair in zip(sines, cosines) for k in pair]
    yield "first all sines, then all cosines: yours alternate", wrong(columns_of(0, *pairs))
    yield "sines twice: the second half is cosines", wrong(columns_of(0, *sines, *sines))
    yield "u runs from -1 to 1: yours from 0 to 1", wrong(span=(0, 1))
    yield "u runs from -1 to 1: yours from 1 to -1", wrong(span=(1, -1))
    yield "the codes of the ROW come first, then those of the column", wrong(order=(0, 2, 1))
    yield (
        "pixels go row after row: REPEAT the row's code w times, TILE the column's",
        wrong(spread=(np.tile, np.repeat)),
    )
    yield "the colours come first, then the codes", wrong(order=(1, 2, 0))
    yield "the colours are missing", wrong(order=(1, 2))
    yield "the codes of the columns are missing: an image has two axes", wrong(order=(0, 1))
    yield "the codes of the rows are missing: an image has two axes", wrong(order=(0, 2))
    B, h, w, C = pictures.shape
    turned = with_places(pictures.swapaxes(1, 2), F, order=(0, 2, 1))
    yield "pixels go row after row: yours column after column", turned
    yield (
        "the picture's axes are mixed up: reshape [B, h, w, C] to [B, h * w, C]",
        with_places(pictures.transpose(0, 3, 1, 2).reshape(B, h, w, C), F),
    )
