"""Right and wrong answers to the exercises of module 13, for test_checks.py; kernels as in 11."""

import functools

import numpy as np
from cases_12 import With, jit, tl

from miniflamingo.functional import softmax_backward

# --- 13.1 -----------------------------------------------------------------------------------------


def dscores(p, dp, axis=-1, sign=-1, weigh=True, outside=True, reduce=np.sum):
    delta = reduce(p * dp if weigh else dp, axis=axis, keepdims=True)
    return (p if outside else 1) * (dp + sign * delta)


def dscores_by_jacobian(p, dp):
    out = np.empty_like(p)
    for row in np.ndindex(p.shape[:-1]):
        out[row] = (np.diag(p[row]) - np.outer(p[row], p[row])) @ dp[row]
    return out


# --- 13.2 -----------------------------------------------------------------------------------------


@jit
def dv_transposed(
    q_ptr, k_ptr, dout_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    SCALE: tl.constexpr = -0.5, PADDED: tl.constexpr = False, SUM: tl.constexpr = True,
    ADD: tl.constexpr = True, LOOP: tl.constexpr = True, WHAT: tl.constexpr = "p",
    AXIS: tl.constexpr = 0, ROWS: tl.constexpr = 0, MAX: tl.constexpr = True,
    BARE: tl.constexpr = "",
):  # fmt: skip
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    k_at = r[:, None] * K + c[None, :]
    k = tl.load(k_ptr + k_at, (r < R)[:, None], other=0.0)
    dv = tl.zeros([BLOCK_R, K], tl.float32)
    for start in range(0, L if LOOP else BLOCK_M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q_at = m[:, None] * K + c[None, :]
        q = tl.load(q_ptr + q_at, (m < L + ROWS)[:, None], other=0.0)
        dout = tl.load((q_ptr if WHAT == "q" else dout_ptr) + q_at, (m < L)[:, None], other=0.0)
        if BARE == "q":
            q = tl.load(q_ptr + q_at, (m < L)[:, None])
        if BARE == "dout":
            dout = tl.load(dout_ptr + q_at, (m < L)[:, None])
        p = tl.dot(k, tl.trans(q)) * K**SCALE  # [R, L]
        if not PADDED:
            p = tl.where((r < R)[:, None], p, float("-inf"))
        if WHAT == "scores":
            p = tl.where((r < R)[:, None], p, 0.0)
        else:
            if MAX:
                p = p - tl.expand_dims(tl.max(p, AXIS), AXIS)
            p = tl.exp(p)
            if SUM:
                p = p / tl.expand_dims(tl.sum(p, AXIS), AXIS)
        if ADD:
            dv += tl.dot(p, dout)
        else:
            dv = tl.dot(p, dout)
    tl.store(out_ptr + k_at, dv, (r < R)[:, None])


@jit
def dv_token_by_token(
    q_ptr, k_ptr, dout_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """No tile of tokens: each adds an outer product."""
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    place, valid = r[:, None] * K + c[None, :], (r < R)[:, None]
    k = tl.load(k_ptr + place, valid, other=0.0)
    dv = tl.zeros([BLOCK_R, K], tl.float32)
    for m in range(L):
        score = tl.sum(k * tl.load(q_ptr + m * K + c)[None, :], 1) * K**-0.5
        e = tl.where(r < R, tl.exp(score - tl.max(score, 0)), 0.0)
        dv += (e / tl.sum(e, 0))[:, None] * tl.load(dout_ptr + m * K + c)[None, :]
    tl.store(out_ptr + place, dv, valid)


# --- 13.3 -----------------------------------------------------------------------------------------


def partials(parts, out, splits, more=0, start=True, on_top=False, keep=True, reduce=np.sum):
    total = out.copy() if keep else np.zeros_like(out)
    for i, (slot, slots) in enumerate(splits):
        if slots:
            slot = slot if start else 0
            found = reduce(parts[slot : slot + slots + more], axis=0)
            total[i] = total[i] + found if on_top else found
    return total


def partials_by_loops(parts, out, splits):
    rows = []
    for row, (slot, slots) in zip(out, splits):
        total = np.zeros(len(row)) if slots else row
        for i in range(slots):
            total = total + parts[slot + i]
        rows.append(total)
    return rows


def partials_to_the_end(parts, out, splits):
    return np.array([parts[s:n].sum(axis=0) if n else row for (s, n), row in zip(splits, out)])


def partials_of_equal_length(parts, out, splits):
    return partials(parts, out, np.where(splits[:, 1:] > 0, [[1, 0]], 0) * splits
                    + np.where(splits[:, 1:] > 0, [[0, splits[:, 1].max()]], 0))  # fmt: skip


def partials_in_place(parts, out, splits):
    for i, (slot, slots) in enumerate(splits):
        if slots:
            out[i] = parts[slot : slot + slots].sum(axis=0)
    return out


# --- 13.4 -----------------------------------------------------------------------------------------


def audit(phi, N, order, items, look=True, row=None, first=1, more=0, several=None, empty=True,
          astray=None):  # fmt: skip
    """An answer with lists, with a place for each mistake."""
    holders, pairs, stray = {}, set(), 0
    for item, (b, image, begin, end, _) in enumerate(items.tolist()):
        places = range(begin, min(end + more, phi.shape[1]))
        if empty or begin < end:
            pairs.add((b, image))
        wrong = 0
        for place in places:
            token = int(order[b if row is None else row, place]) if look else place
            holders.setdefault((b, token), []).append(item)
            wrong += phi[b, token] != image
        stray += astray(wrong) if astray else wrong
    several = several or (lambda n: n > 1)
    every = {(b, image) for b in range(len(phi)) for image in range(first, N + first)}
    found = [several(len(items)) for items in holders.values()]
    return [phi.size - len(holders), int(sum(found)), int(stray), len(every - pairs)]


def audit_by_arrays(phi, N, order, items):
    """All places of all items at once, then counts."""
    b = np.repeat(items[:, 0], items[:, 3] - items[:, 2])
    image = np.repeat(items[:, 1], items[:, 3] - items[:, 2])
    place = np.concatenate([np.arange(i, j) for i, j in items[:, 2:4]])
    token = order[b, place]
    held = np.bincount(b * phi.shape[1] + token, minlength=phi.size)
    named = np.unique(items[items[:, 1] > 0, :2], axis=0)
    fourth = len(phi) * N - len(named)
    return np.array([(held == 0).sum(), (held > 1).sum(), (phi[b, token] != image).sum(), fourth])


def audit_by_phi(phi, N, order, items):
    unread = (phi[:, :, None] != np.arange(1, N + 1)).all(axis=1)
    return [*audit(phi, N, order, items)[:3], unread.sum()]


def audit_of_images(phi, N, order, items):
    none = {(b, t) for b, t in np.argwhere(phi == 0).tolist()}
    for b, _, begin, end, _ in items:
        none -= {(int(b), t) for t in order[b, begin:end].tolist()}
    out = audit(phi, N, order, items)
    return [out[0] - len(none), *out[1:]]


def audit_of_all_by_phi(phi, N, order, items):
    """As if nobody named an image that no token looks at, and an empty item were a fault."""
    out = audit(phi, N, order, items)
    unread = (phi[:, :, None] != np.arange(1, N + 1)).all(axis=1).sum()
    return [*out[:3], unread if out[3] else 0]


def audit_in_place(phi, N, order, items):
    out = audit(phi, N, order, items)
    phi[:] = -1
    return out


# --- 13.5 -----------------------------------------------------------------------------------------


def gate(dout, a, alpha, weight, slope=None, opening=np.tanh, inner=None):
    dw = np.einsum("md,mi->di", dout, a)
    factor = 1 - np.tanh(alpha) ** 2 if slope is None else slope(alpha)
    product = np.vdot(weight, dw) if inner is None else inner(weight, dw, alpha)
    return factor * product, opening(alpha) * dw


def gate_by_differences(dout, a, alpha, weight, step=1e-5):
    def loss(alpha, weight):
        return (dout * np.tanh(alpha) * (a @ weight.T)).sum()

    dweight = np.empty_like(weight)
    for place in np.ndindex(weight.shape):
        nudge = np.zeros_like(weight)
        nudge[place] = step
        up, down = (loss(alpha, weight + sign * nudge) for sign in (1, -1))
        dweight[place] = (up - down) / (2 * step)
    return (loss(alpha + step, weight) - loss(alpha - step, weight)) / (2 * step), dweight


RIGHT = [
    ("13.1", dscores),
    ("13.1", dscores_by_jacobian),
    ("13.1", lambda p, dp: softmax_backward(dp, np.log(p))),
    ("13.2", dv_transposed),
    ("13.2", dv_token_by_token),
    ("13.3", partials),
    ("13.3", partials_by_loops),
    ("13.4", audit),
    ("13.4", audit_by_arrays),
    ("13.5", gate),
    ("13.5", gate_by_differences),
    ("13.5", lambda *a: list(gate(*a))),
]

make = functools.partial
WRONG = [
    ("13.1", lambda p, dp: p * dp, "delta is missing"),
    ("13.1", lambda p, dp: dp, "it must go through the softmax"),
    ("13.1", lambda p, dp: p * dp - (p * dp).sum(-1, keepdims=True), "not multiplied by p"),
    ("13.1", make(dscores, sign=1), "the sign of delta"),
    ("13.1", make(dscores, axis=-2), "delta over the wrong axis"),
    ("13.1", make(dscores, axis=None), "delta over everything"),
    ("13.1", make(dscores, weigh=False), "yours sums dP alone"),
    ("13.1", make(dscores, reduce=np.mean), "delta is a mean here"),
    ("13.1", make(dscores, outside=False), "P outside the brackets is missing"),
    ("13.1", lambda p, dp: p * (1 - p) * dp, "derivative of a sigmoid"),
    ("13.2", With(dv_transposed, ADD=False), "only the last tile of tokens is left"),
    ("13.2", With(dv_transposed, LOOP=False), "only the first tile of tokens"),
    ("13.2", With(dv_transposed, BARE="q"), "what the mask leaves out of q is undefined"),
    ("13.2", With(dv_transposed, BARE="dout"), "what the mask leaves out of dout is undefined"),
    ("13.2", With(dv_transposed, MAX=False), "NaN where scores are near 100"),
    ("13.2", With(dv_transposed, SCALE=0), "the scale is missing"),
    ("13.2", With(dv_transposed, PADDED=True), "padded keys take part"),
    ("13.2", With(dv_transposed, SUM=False), "P is not divided by its row's sum"),
    ("13.2", With(dv_transposed, WHAT="scores"), "this takes the scores, not P"),
    ("13.2", With(dv_transposed, WHAT="q"), "this takes Q, not dO"),
    ("13.2", With(dv_transposed, AXIS=1, PADDED=True), "softmax over the wrong axis"),
    ("13.2", With(dv_transposed, AXIS=1), "softmax over the wrong axis"),
    ("13.2", With(dv_transposed, ROWS=99), "reads q at offset 592, where it has no element"),
    ("13.3", lambda parts, out, splits: out, "nothing is added up"),
    ("13.3", make(partials, reduce=lambda x, axis: x[-1]), "only an image's last slot"),
    ("13.3", make(partials, reduce=lambda x, axis: x[0]), "only an image's first slot"),
    ("13.3", make(partials, reduce=np.mean), "this is the mean of the slots"),
    ("13.3", make(partials, on_top=True), "added to what lay in out"),
    ("13.3", partials_of_equal_length, "each image has a number of slots of its own"),
    ("13.3", make(partials, keep=False), "images without slots are lost"),
    ("13.3", make(partials, more=1), "one slot too many"),
    ("13.3", make(partials, start=False), "begin at splits[image, 0]"),
    ("13.3", partials_to_the_end, "how many slots, not where they end"),
    ("13.3", lambda p, o, s: np.where(s[:, 1:] > 0, p.sum(axis=0), o), "the sum of ALL slots"),
    ("13.3", partials_in_place, "changes its argument number 2 in place"),
    ("13.4", make(audit, look=False), "begin..end are places in order, not tokens"),
    ("13.4", make(audit, row=0), "look up row b, not row 0"),
    ("13.4", make(audit, more=1), "BEHIND the item's last token"),
    ("13.4", make(audit, more=-1), "the item's last token is missing"),
    ("13.4", make(audit, empty=False), "an empty item names its image, too"),
    ("13.4", make(audit, first=0), "images are counted from 1"),
    ("13.4", make(audit, several=lambda n: n == 2), "> 1, not == 2"),
    ("13.4", make(audit, several=lambda n: n - 1), "not how often"),
    ("13.4", make(audit, several=lambda n: 1), "held at least once"),
    ("13.4", make(audit, astray=bool), "this counts items, not their places"),
    ("13.4", audit_by_phi, "an empty item names its image, too"),
    ("13.4", audit_of_all_by_phi, "that no token looks at an image is no fault"),
    ("13.4", audit_of_images, "a token without an image needs an item, too"),
    ("13.4", lambda *a: np.minimum(audit(*a), 1), "not whether there are some"),
    ("13.4", lambda *a: sum(audit(*a)), "not their sum"),
    ("13.4", lambda *a: np.array(audit(*a))[[1, 0, 2, 3]], "the order is"),
    ("13.4", lambda *a: np.add(audit(*a), [0, 0, 1, 0]), "another image: 0 is right, got 1"),
    ("13.4", audit_in_place, "changes its argument number 1 in place"),
    ("13.5", lambda *a: gate(*a)[::-1], "(dalpha, dweight), in this order"),
    ("13.5", make(gate, slope=lambda x: 1), "the factor 1 - tanh(alpha)^2 is missing"),
    ("13.5", make(gate, slope=lambda x: 1 + np.tan(x) ** 2), "dalpha: `tan` where `tanh` was"),
    ("13.5", make(gate, slope=lambda x: 1 - np.tanh(x)), "without the square"),
    ("13.5", make(gate, slope=lambda x: 1 - x * x), "the square is of tanh(alpha)"),
    ("13.5", make(gate, slope=np.tanh), "tanh(alpha) where its derivative was meant"),
    ("13.5", make(gate, inner=lambda w, dw, t: np.tanh(t) * np.vdot(w, dw)), "BEFORE it is"),
    ("13.5", make(gate, inner=lambda w, dw, t: dw.sum()), "this sums dW' without W"),
    ("13.5", make(gate, inner=lambda w, dw, t: w * dw), "one number is wanted"),
    ("13.5", make(gate, opening=lambda x: 1), "dweight: the gate is missing"),
    ("13.5", make(gate, opening=lambda x: x), "alpha * dW', but the gate is tanh"),
    ("13.5", make(gate, opening=np.tan), "dweight: `tan` where `tanh` was"),
    ("13.5", lambda *a: (gate(*a)[0], gate(*a)[1].T), "dweight: turned"),
    ("13.5", lambda *a: gate(*a)[0], "a pair (dalpha, dweight) is wanted"),
]
