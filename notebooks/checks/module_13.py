"""Checks of module 13: dS, a tile of dV, adding up partial sums, a work list, the gate."""

import numpy as np

from miniflamingo.functional import softmax

from .core import call, exercise, expect, named, several
from .kernel_runs import expect_stored
from .module_12 import HIGH, attention_case, raised

# --- 13.1: through the softmax --------------------------------------------------------------------


@exercise("13.1")
def dscores(answer):
    """answer(p [.., L, R], dp [.., L, R]) -> [.., L, R]."""
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
    yield "the sign of all of it: P * (dP - delta)", -dscores_of(p, dp)
    yield (
        "the scale 1 / sqrt(K) comes later, in dq and dk",
        dscores_of(p, dp) / np.sqrt(p.shape[-1]),
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


# --- 13.2: a tile of dV ---------------------------------------------------------------------------


@exercise("13.2")
def dv_tile(answer):
    """answer: a kernel (q_ptr, k_ptr, dout_ptr, out_ptr, L, R, K, BLOCK_M, BLOCK_R); out is dV."""
    for L, R, K, high in ((37, 5, 16, False), (16, 16, 32, False), (19, 5, 16, True)):
        q, k, _ = attention_case(L, R, K)
        q, k = raised(q, k) if high else (q, k)
        dout = np.random.default_rng(L).normal(size=(L, K)).astype(np.float32)
        arguments = {"q_ptr": q, "k_ptr": k, "dout_ptr": dout, "out_ptr": None, "L": L, "R": R}
        constants = dict(K=K, BLOCK_M=16, BLOCK_R=16)
        hint = ": mask the rows, token < L in q, dout, r < R in k, out; a row has K elements"
        right = softmax((q @ k.T).astype(float) / np.sqrt(K)).T @ dout
        mistakes = [(HIGH, np.full(k.shape, np.nan))] if high else list(_dv_mistakes(q, k, dout))
        loose = 30 if high else 1
        expect_stored(answer, 1, arguments, right, mistakes, hint, loose, **constants)


def _dv_mistakes(q, k, dout, BLOCK=16):
    (L, K), R = q.shape, len(k)
    scores = q @ k.T / np.sqrt(K)
    p = softmax(scores)
    last = (L - 1) // BLOCK * BLOCK
    padded = softmax(np.pad(scores, ((0, 0), (0, BLOCK - R))))[:, :R]
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    yield (
        "only the last tile of tokens is left: ADD each tile's product to dv, `dv += ...`",
        p[last:].T @ dout[last:],
    )
    yield (
        "only the first tile of tokens: loop over all of them, range(0, L, BLOCK_M)",
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
    tiles = np.pad(scores, ((0, -L % BLOCK), (0, 0))).reshape(-1, BLOCK, R)
    columns = softmax(tiles.swapaxes(1, 2)).swapaxes(1, 2).reshape(-1, R)[:L]
    yield "softmax over the wrong axis: each TOKEN's weights sum to 1", columns.T @ dout


# --- 13.3: partial sums ---------------------------------------------------------------------------

LEFT = 777.0  # what lay in memory before


def partials_case():
    """parts [7, 3], of which slots 0, 1, 2 are image 1's and 3, 4 image 3's; out [5, 3]; splits."""
    parts = np.random.default_rng(3).normal(size=(7, 3))
    parts[5:] = LEFT
    out = np.random.default_rng(4).normal(size=(5, 3))
    splits = np.array([[0, 0], [0, 3], [3, 0], [3, 2], [5, 0]])
    out[splits[:, 1] > 0] = LEFT
    return parts, out, splits


@exercise("13.3")
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
    most = splits[:, 1].max()
    wrong = [parts[s : s + most].sum(axis=0) for s, _ in splits]
    yield (
        "each image has a number of slots of its own: yours adds the largest number for all",
        np.where(split, wrong, out),
    )
    wrong = [parts[:n].sum(axis=0) for _, n in splits]
    yield "an image's slots begin at splits[image, 0], not at 0", np.where(split, wrong, out)


# --- 13.4: an audit of a work list ----------------------------------------------------------------

PAGES = np.array([[0, 0, 1, 1, 1, 3, 3, 1], [2, 2, 2, 4, 4, 0, 2, 0], [0, 0, 0, 0, 0, 0, 0, 0]])


def listed(phi, N, chunk=2):
    """A work list without a fault: order int[B, L], items int[n, 5] without their slots."""
    order = np.argsort(phi, axis=1, kind="stable")
    items = []
    for b, row in enumerate(phi):
        for image in range(N + 1):
            begin, end = np.searchsorted(np.sort(row), [image, image + 1])
            cuts = [*range(begin, max(end, begin + 1), chunk)]
            items += [[b, image, cut, min(cut + chunk, end), -1] for cut in cuts]
    return order, np.array(items)


def work_lists():
    """phi, N, order and items, the first without a fault, the others with some."""
    order, items = listed(PAGES, 4)
    yield PAGES, 4, order, items
    some = np.delete(items, [3, 4, 9], axis=0)  # tokens, and an image without any, are forgotten
    yield PAGES, 4, order, some
    yield PAGES, 4, order, np.concatenate([items, items[[1, 1, 2, 12]]])  # held by several
    other = items.copy()
    other[[0, 2, 8], 1] = [4, 2, 1]  # another image's items
    yield PAGES, 4, order, other
    yield PAGES[:2], 5, order[1::-1], items[items[:, 0] < 2]
    order, items = listed(PAGES[:2, ::-1], 4, 3)
    yield PAGES[:2], 4, order, items[::2]


@exercise("13.4")
def audit(answer):
    """answer(phi int[B, L], N, order int[B, L], items int[n, 5]) -> int[4]."""
    for case in work_lists():
        expect(call(answer, *case), faults_of(*case), _audit_mistakes(*case), _which, whole=True)


FAULTS = (
    "tokens that no item holds",
    "tokens that several items hold",
    "places of items whose token looks at another image",
    "images that no item names",
)


def faults_of(phi, N, order, items, look=True, row=True, last=0, empty=True):
    """The four numbers of faults, with places for mistakes."""
    held, named, astray = np.zeros(phi.shape, int), np.zeros((len(phi), N + 1), bool), 0
    for b, image, begin, end, _ in items:
        place = np.arange(begin, min(max(end + last, begin), phi.shape[1]))
        token = order[b if row else 0, place] if look else place
        held[b, token] += 1
        named[b, image] |= empty or begin < end
        astray += np.sum(phi[b, token] != image)
    return np.array([np.sum(held == 0), np.sum(held > 1), astray, np.sum(~named[:, 1:])])


def _audit_mistakes(phi, N, order, items):
    def wrong(**how):
        return faults_of(phi, N, order, items, **how)

    right = wrong()
    yield "begin..end are places in order, not tokens: order[b, begin:end]", wrong(look=False)
    yield "order has a row for each page: look up row b, not row 0", wrong(row=False)
    yield "end is the place BEHIND the item's last token: begin:end", wrong(last=1)
    yield "the item's last token is missing: begin:end ends before end by itself", wrong(last=-1)
    named, counts = np.zeros((len(phi), N + 1), bool), np.zeros(phi.shape, int)
    for b, image, begin, end, _ in items:
        named[b, image] = True
        counts[b, order[b, begin:end]] += 1
    for words, i, number in (
        ("an empty item names its image, too, for which it stores zeros", 3, wrong(empty=False)[3]),
        ("images are counted from 1, and 0 is none of them", 3, np.sum(~named)),
        ("images are counted from 1, and 0 is none of them", 3, np.sum(~named[:, :-1])),
        ("an image of one page may be forgotten while another page has its own", 3,
         np.sum(~named[:, 1:].any(axis=0))),
        ("that no token looks at an image is no fault: count those that no item names", 3,
         np.sum((phi[:, :, None] != np.arange(1, N + 1)).all(axis=1))),
        ("a token without an image needs an item, too: its program stores zeros", 0,
         np.sum((counts == 0) & (phi > 0))),
        ("count the tokens that are held several times, not how often", 1,
         np.sum(np.maximum(counts - 1, 0))),
        ("held by two or MORE: > 1, not == 2", 1, np.sum(counts == 2)),
        ("these are the tokens that some item holds", 0, np.sum(counts > 0)),
        ("these are all that are held at least once", 1, np.sum(counts > 0)),
        ("this counts items, not their places", 2,
         sum((phi[b, order[b, i:j]] != image).any() for b, image, i, j, _ in items)),
        ("tokens without an image are astray, too, in an item of an image", 2,
         sum(((phi[b, order[b, i:j]] != image) & (phi[b, order[b, i:j]] > 0)).sum()
             for b, image, i, j, _ in items)),
    ):  # fmt: skip
        changed = right.copy()
        changed[i] = number
        yield f"{FAULTS[i]}: {words}", changed
    yield "numbers of faults are wanted, not whether there are some", np.minimum(right, 1)
    yield "one number for each kind of fault is wanted, not their sum", right.sum()
    yield "the order is: forgotten, held by several, astray, images", right[[1, 0, 2, 3]]


def _which(got, right):
    kind = int(np.flatnonzero(got != right)[0])
    return f"{FAULTS[kind]}: {right[kind]} is right, got {got[kind]}"


# --- 13.5: the gate -------------------------------------------------------------------------------


def gated_case(alpha, seed=0):
    """dout [6, 4], a [6, 3], alpha, weight [4, 3]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), alpha, rng.normal(size=(4, 3))


@exercise("13.5")
def gate(answer):
    """answer(dout [L, D], a [L, I], alpha, weight [D, I]) -> dalpha [], dweight [D, I]."""
    for alpha in (0.8, 0.0, -1.7):
        case = gated_case(alpha)
        out = call(answer, *case)
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            several(out, (0, 0), "a pair (dalpha, dweight)")
        dalpha, dweight, t = *gate_of(*case), np.tanh(alpha)
        expect(out[0], dalpha, _dalpha_mistakes(*case), named("dalpha"))
        expect(out[1], dweight, _dweight_mistakes(dweight, t, *case), named("dweight"))


def gate_of(dout, a, alpha, weight):
    """Equation (8)."""
    dw = dout.T @ a
    t = np.tanh(alpha)
    return (1 - t * t) * (weight * dw).sum(), t * dw


def _dalpha_mistakes(dout, a, alpha, weight):
    dw, t = dout.T @ a, np.tanh(alpha)
    inner = (weight * dw).sum()
    yield "(dalpha, dweight), in this order", t * dw
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
