"""Checks of module 12: dS, a tile of dV, adding up partial sums, unread images, the gate."""

import numpy as np

from miniflamingo.functional import softmax

from .core import Wrong, as_array, call, exercise, expect
from .kernel_runs import expect_stored
from .module_11 import attention_case

# --- 12.1: through the softmax --------------------------------------------------------------------


@exercise("12.1")
def dscores(answer):
    """answer(p [.., M, R], dp [.., M, R]) -> [.., M, R]."""
    for shape in ((4, 3), (2, 3, 5), (3, 3)):
        scores, dp = np.random.default_rng(len(shape)).normal(size=(2, *shape))
        p = softmax(scores)
        expect(call(answer, p, dp), dscores_of(p, dp), _dscores_mistakes(p, dp))


def dscores_of(p, dp):
    """Equation (3)."""
    return p * (dp - (p * dp).sum(axis=-1, keepdims=True))


def _dscores_mistakes(p, dp):
    delta = (p * dp).sum(axis=-1, keepdims=True)
    yield (
        "delta is missing: raising one score lowers all other weights of its row, subtract "
        "delta = sum(p * dp)",
        p * dp,
    )
    yield "dp is not yet dS: it must go through the softmax, equation (3)", dp
    yield (
        "delta is not multiplied by p: P * (dP - delta), with the brackets",
        p * dp - delta,
    )
    yield "the sign of delta: P * (dP - delta)", p * (dp + delta)
    yield (
        "delta over the wrong axis: it is summed over the R keys of a token, the last axis",
        p * (dp - (p * dp).sum(axis=-2, keepdims=True)),
    )
    yield (
        "delta over everything: each token has its own, sum over the last axis",
        p * (dp - (p * dp).sum()),
    )
    yield "delta is the sum of P * dP; yours sums dP alone", p * (dp - dp.sum(-1, keepdims=True))
    yield "delta is a mean here, and must be a sum", p * (dp - (p * dp).mean(-1, keepdims=True))
    yield "P outside the brackets is missing: P * (dP - delta)", dp - delta
    yield (
        "this is the derivative of a sigmoid, number by number: a softmax's row hangs together",
        p * (1 - p) * dp,
    )


# --- 12.2: a tile of dV ---------------------------------------------------------------------------


@exercise("12.2")
def dv_tile(answer):
    """answer: a kernel (q_ptr, k_ptr, dout_ptr, out_ptr, M, R, K, BLOCK_M, BLOCK_R); out is dV."""
    for M, R, K in ((37, 5, 16), (16, 16, 32)):
        q, k, _ = attention_case(M, R, K)
        dout = np.random.default_rng(M).normal(size=(M, K)).astype(np.float32)
        arguments = {"q_ptr": q, "k_ptr": k, "dout_ptr": dout, "out_ptr": None, "M": M, "R": R}
        constants = dict(K=K, BLOCK_M=16, BLOCK_R=16)
        hint = ": mask the rows, m < M for q and dout, r < R for k and out; a row has K elements"
        right = softmax((q @ k.T).astype(float) / np.sqrt(K)).T @ dout
        mistakes = list(_dv_mistakes(q, k, dout))
        expect_stored(answer, 1, arguments, right, mistakes, hint, **constants)


def _dv_mistakes(q, k, dout, BLOCK=16):
    (M, K), R = q.shape, len(k)
    scores = q @ k.T / np.sqrt(K)
    p = softmax(scores)
    last = (M - 1) // BLOCK * BLOCK
    padded = softmax(np.pad(scores, ((0, 0), (0, BLOCK - R))))[:, :R]
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    yield (
        "only the last tile of tokens is left: ADD each tile's product to dv, `dv += ...`",
        p[last:].T @ dout[last:],
    )
    yield (
        "only the first tile of tokens: loop over all of them, range(0, M, BLOCK_M)",
        p[:BLOCK].T @ dout[:BLOCK],
    )
    yield "the scale is missing in the recomputed scores: / sqrt(K)", softmax(q @ k.T).T @ dout
    yield (
        "padded keys take part in the recomputed softmax: their score must be -inf",
        padded.T @ dout,
    )
    yield "P is not divided by its row's sum: here it cannot wait till the end", shifted.T @ dout
    yield "dV = P^T dO; this takes the scores, not P", scores.T @ dout
    yield "dV = P^T dO; this takes Q, not dO", p.T @ q
    tiles = np.pad(scores, ((0, -M % BLOCK), (0, 0))).reshape(-1, BLOCK, R)
    columns = softmax(tiles.swapaxes(1, 2)).swapaxes(1, 2).reshape(-1, R)[:M]
    yield "softmax over the wrong axis: each TOKEN's weights sum to 1", columns.T @ dout


# --- 12.3: partial sums ---------------------------------------------------------------------------

LEFT = 777.0  # what lay in memory before


def partials_case():
    """parts [7, 3], of which slots 0, 1, 2 are image 1's and 3, 4 image 3's; out [5, 3]; splits."""
    parts = np.random.default_rng(3).normal(size=(7, 3))
    parts[5:] = LEFT
    out = np.random.default_rng(4).normal(size=(5, 3))
    splits = np.array([[0, 0], [0, 3], [3, 0], [3, 2], [5, 0]])
    out[splits[:, 1] > 0] = LEFT
    return parts, out, splits


@exercise("12.3")
def partials(answer):
    """answer(parts [slots, size], out [images, size], splits int[images, 2]) -> [images, size]."""
    parts, out, splits = partials_case()
    for case in ((parts, out, splits), (parts[::-1][2:], out[[0, 1, 3]], splits[[0, 1, 3]])):
        mistakes = [*_partial_mistakes(*case), *_slot_mistakes(*case)]
        expect(call(answer, *case), added(*case), mistakes)


def added(parts, out, splits, reduce=np.sum):
    """The sums of the images with slots; the others as they are."""
    result = out.copy()
    for image, (slot, slots) in enumerate(splits):
        if slots:
            result[image] = reduce(parts[slot : slot + slots], axis=0)
    return result


def _partial_mistakes(parts, out, splits):
    right, split = added(parts, out, splits), (splits[:, 1] > 0)[:, None]
    yield "nothing is added up: this is out as it was", out
    yield (
        "only an image's last slot is left: ADD the slots up",
        added(parts, out, splits, lambda x, axis: x[-1]),
    )
    yield (
        "only an image's first slot: add up all of its slots",
        added(parts, out, splits, lambda x, axis: x[0]),
    )
    yield (
        "a sum over tokens is wanted, this is the mean of the slots",
        added(parts, out, splits, np.mean),
    )
    yield (
        "added to what lay in out: that memory holds anything, 777 here; store the sum",
        np.where(split, right + LEFT, right),
    )
    yield (
        "images without slots are lost: theirs was stored by their only item, leave it",
        np.where(split, right, 0),
    )


def _slot_mistakes(parts, out, splits):
    split = (splits[:, 1] > 0)[:, None]
    yield (
        "every image gets the sum of ALL slots: its own are slot to slot + slots - 1",
        np.where(split, parts.sum(axis=0), out),
    )
    ends = [(s, max(n - s, 0)) for s, n in splits]
    wrong = [parts[s : s + n].sum(axis=0) for s, n in ends]
    yield (
        "the second number of splits is how many slots, not where they end",
        np.where(split, wrong, out),
    )
    wrong = [parts[s : s + n + 1].sum(axis=0) for s, n in splits]
    yield (
        "one slot too many: slot + slots is the first of the next image",
        np.where(split, wrong, out),
    )
    wrong = [parts[:n].sum(axis=0) for _, n in splits]
    yield "an image's slots begin at splits[image, 0], not at 0", np.where(split, wrong, out)


# --- 12.4: unread images --------------------------------------------------------------------------


@exercise("12.4")
def unread(answer):
    """answer(phi int[B, L], N) -> bool[B, N]."""
    first = np.array([[0, 0, 1, 1, 3, 3], [2, 2, 2, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    for phi, N in ((first, 4), (np.array([[4, 0, 4, 2]]), 5), (np.array([[1, 2], [2, 1]]), 2)):
        expect(call(answer, phi, N), unread_of(phi, N), _unread_mistakes(phi, N))


def unread_of(phi, N):
    """Which images no token looks at."""
    return (phi[:, :, None] != np.arange(1, N + 1)).all(axis=1)


def _unread_mistakes(phi, N):
    right = unread_of(phi, N)
    yield "upside down: these are the images that some token looks at", ~right
    yield (
        "images are counted from 1: column j of the result is image j + 1",
        (phi[:, :, None] != np.arange(N)).all(axis=1),
    )
    yield (
        "rows leak: an image of one page may be unread while another page reads its own",
        np.broadcast_to(right.all(axis=0), right.shape),
    )
    yield (
        "only the images after the last one that is read: one in between can be unread, too",
        np.arange(1, N + 1) > phi.max(axis=1, keepdims=True),
    )
    yield (
        "unread means that NO token looks at it (all of them look elsewhere); yours asks for any",
        (phi[:, :, None] != np.arange(1, N + 1)).any(axis=1),
    )
    yield (
        "these are numbers of tokens: say where they are 0",
        (phi[:, :, None] == np.arange(1, N + 1)).sum(axis=1),
    )
    if len(phi) > 1:
        yield "one row for each page is wanted, not one for all", right.all(axis=0)


# --- 12.5: the gate -------------------------------------------------------------------------------


def gated_case(alpha, seed=0):
    """dout [6, 4], a [6, 3], alpha, weight [4, 3]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), alpha, rng.normal(size=(4, 3))


@exercise("12.5")
def gate(answer):
    """answer(dout [M, D], a [M, I], alpha, weight [D, I]) -> dalpha [], dweight [D, I]."""
    for alpha in (0.8, 0.0, -1.7):
        case = gated_case(alpha)
        out = call(answer, *case)
        if not isinstance(out, tuple) or len(out) != 2:
            as_array(out)
            raise Wrong(
                f"wrong shape: a pair (dalpha, dweight) is wanted, got {type(out).__name__}"
            )
        dalpha, dweight, t = *gate_of(*case), np.tanh(alpha)
        expect(out[0], dalpha, _dalpha_mistakes(*case))
        expect(out[1], dweight, _dweight_mistakes(dweight, t, *case))


def gate_of(dout, a, alpha, weight):
    """Equation (8)."""
    dw = dout.T @ a
    t = np.tanh(alpha)
    return (1 - t * t) * (weight * dw).sum(), t * dw


def _dalpha_mistakes(dout, a, alpha, weight):
    dw, t = dout.T @ a, np.tanh(alpha)
    inner = (weight * dw).sum()
    yield "dalpha: the factor 1 - tanh(alpha)^2 is missing", inner
    yield "dalpha: `tan` where `tanh` was meant: 1 + tan(alpha)^2", (1 + np.tan(alpha) ** 2) * inner
    yield "dalpha: 1 - tanh(alpha), without the square", (1 - t) * inner
    yield "dalpha: 1 - alpha^2: the square is of tanh(alpha)", (1 - alpha**2) * inner
    yield (
        "dalpha: <W, dW'> with dW' = dout^T a, BEFORE it is multiplied by tanh(alpha)",
        (1 - t * t) * t * inner,
    )
    yield "dalpha: tanh(alpha) where its derivative was meant", t * inner
    yield "dalpha: <W, dW'>; this sums dW' without W", (1 - t * t) * dw.sum()
    yield "dalpha: a mean; alpha acts on every number, so sum", (1 - t * t) * inner / dw.size
    yield "dalpha: one number is wanted: sum over all of W * dW'", (1 - t * t) * weight * dw


def _dweight_mistakes(dweight, t, dout, a, alpha, weight):
    dw = dout.T @ a
    yield "dweight: the gate is missing: tanh(alpha) * dout^T a", dw
    yield "dweight: alpha * dW', but the gate is tanh(alpha)", alpha * dw
    yield "dweight: `tan` where `tanh` was meant", np.tan(alpha) * dw
    yield "dweight: the derivative of the gate belongs to dalpha alone", (1 - t * t) * dw
    yield "dweight: turned; like weight it is [D, I]: dout^T a, not a^T dout", dweight.T
