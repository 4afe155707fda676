"""Right and wrong answers to the exercises of module 12, for test_checks.py; kernels as in 11."""

import functools

import numpy as np
from cases_11 import With, jit, tl

from miniflamingo.functional import softmax_backward
from miniflamingo.xattn import work_list

# --- 12.1 -----------------------------------------------------------------------------------------


def dscores(p, dp, axis=-1, sign=-1, weigh=True, outside=True, reduce=np.sum):
    delta = reduce(p * dp if weigh else dp, axis=axis, keepdims=True)
    return (p if outside else 1) * (dp + sign * delta)


def dscores_by_jacobian(p, dp):
    out = np.empty_like(p)
    for row in np.ndindex(p.shape[:-1]):
        out[row] = (np.diag(p[row]) - np.outer(p[row], p[row])) @ dp[row]
    return out


# --- 12.2 -----------------------------------------------------------------------------------------


@jit
def dv_transposed(
    q_ptr, k_ptr, dout_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    SCALE: tl.constexpr = -0.5, PADDED: tl.constexpr = False, SUM: tl.constexpr = True,
    ADD: tl.constexpr = True, LOOP: tl.constexpr = True, WHAT: tl.constexpr = "p",
    AXIS: tl.constexpr = 0, ROWS: tl.constexpr = 0,
):  # fmt: skip
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    k_at = r[:, None] * K + c[None, :]
    k = tl.load(k_ptr + k_at, (r < R)[:, None], other=0.0)
    dv = tl.zeros([BLOCK_R, K], tl.float32)
    for start in range(0, M if LOOP else BLOCK_M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q_at = m[:, None] * K + c[None, :]
        q = tl.load(q_ptr + q_at, (m < M + ROWS)[:, None], other=0.0)
        dout = tl.load((q_ptr if WHAT == "q" else dout_ptr) + q_at, (m < M)[:, None], other=0.0)
        p = tl.dot(k, tl.trans(q)) * K**SCALE  # [R, M]
        if not PADDED:
            p = tl.where((r < R)[:, None], p, float("-inf"))
        if WHAT == "scores":
            p = tl.where((r < R)[:, None], p, 0.0)
        else:
            p = tl.exp(p - tl.expand_dims(tl.max(p, AXIS), AXIS))
            if SUM:
                p = p / tl.expand_dims(tl.sum(p, AXIS), AXIS)
        if ADD:
            dv += tl.dot(p, dout)
        else:
            dv = tl.dot(p, dout)
    tl.store(out_ptr + k_at, dv, (r < R)[:, None])


@jit
def dv_token_by_token(
    q_ptr, k_ptr, dout_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """No tile of tokens: each adds an outer product."""
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    place, valid = r[:, None] * K + c[None, :], (r < R)[:, None]
    k = tl.load(k_ptr + place, valid, other=0.0)
    dv = tl.zeros([BLOCK_R, K], tl.float32)
    for m in range(M):
        score = tl.sum(k * tl.load(q_ptr + m * K + c)[None, :], 1) * K**-0.5
        e = tl.where(r < R, tl.exp(score - tl.max(score, 0)), 0.0)
        dv += (e / tl.sum(e, 0))[:, None] * tl.load(dout_ptr + m * K + c)[None, :]
    tl.store(out_ptr + place, dv, valid)


# --- 12.3 -----------------------------------------------------------------------------------------


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


def partials_in_place(parts, out, splits):
    for i, (slot, slots) in enumerate(splits):
        if slots:
            out[i] = parts[slot : slot + slots].sum(axis=0)
    return out


# --- 12.4 -----------------------------------------------------------------------------------------


def unread(phi, N, first=1):
    return np.array([[not (row == n).any() for n in range(first, N + first)] for row in phi])


def unread_by_work_list(phi, N):
    owner, _ = work_list(phi, N)
    found = np.ones(len(phi) * N, bool)
    found[owner] = False
    return found.reshape(len(phi), N)


# --- 12.5 -----------------------------------------------------------------------------------------


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
    ("12.1", dscores),
    ("12.1", dscores_by_jacobian),
    ("12.1", lambda p, dp: softmax_backward(dp, np.log(p))),
    ("12.2", dv_transposed),
    ("12.2", dv_token_by_token),
    ("12.3", partials),
    ("12.3", partials_by_loops),
    ("12.4", unread),
    ("12.4", unread_by_work_list),
    ("12.5", gate),
    ("12.5", gate_by_differences),
]

make = functools.partial
WRONG = [
    ("12.1", lambda p, dp: p * dp, "delta is missing"),
    ("12.1", lambda p, dp: dp, "it must go through the softmax"),
    ("12.1", lambda p, dp: p * dp - (p * dp).sum(-1, keepdims=True), "not multiplied by p"),
    ("12.1", make(dscores, sign=1), "the sign of delta"),
    ("12.1", make(dscores, axis=-2), "delta over the wrong axis"),
    ("12.1", make(dscores, axis=None), "delta over everything"),
    ("12.1", make(dscores, weigh=False), "yours sums dP alone"),
    ("12.1", make(dscores, reduce=np.mean), "delta is a mean here"),
    ("12.1", make(dscores, outside=False), "P outside the brackets is missing"),
    ("12.1", lambda p, dp: p * (1 - p) * dp, "derivative of a sigmoid"),
    ("12.2", With(dv_transposed, ADD=False), "only the last tile of tokens is left"),
    ("12.2", With(dv_transposed, LOOP=False), "only the first tile of tokens"),
    ("12.2", With(dv_transposed, SCALE=0), "the scale is missing"),
    ("12.2", With(dv_transposed, PADDED=True), "padded keys take part"),
    ("12.2", With(dv_transposed, SUM=False), "P is not divided by its row's sum"),
    ("12.2", With(dv_transposed, WHAT="scores"), "this takes the scores, not P"),
    ("12.2", With(dv_transposed, WHAT="q"), "this takes Q, not dO"),
    ("12.2", With(dv_transposed, AXIS=1, PADDED=True), "softmax over the wrong axis"),
    ("12.2", With(dv_transposed, AXIS=1), "softmax over the wrong axis"),
    ("12.2", With(dv_transposed, ROWS=99), "reads q at offset 592, where it has no element"),
    ("12.3", lambda parts, out, splits: out, "nothing is added up"),
    ("12.3", make(partials, reduce=lambda x, axis: x[-1]), "only an image's last slot"),
    ("12.3", make(partials, reduce=lambda x, axis: x[0]), "only an image's first slot"),
    ("12.3", make(partials, reduce=np.mean), "this is the mean of the slots"),
    ("12.3", make(partials, on_top=True), "added to what lay in out"),
    ("12.3", make(partials, keep=False), "images without slots are lost"),
    ("12.3", make(partials, more=1), "one slot too many"),
    ("12.3", make(partials, start=False), "begin at splits[image, 0]"),
    ("12.3", partials_to_the_end, "how many slots, not where they end"),
    ("12.3", lambda p, o, s: np.where(s[:, 1:] > 0, p.sum(axis=0), o), "the sum of ALL slots"),
    ("12.3", partials_in_place, "changes its argument number 2 in place"),
    ("12.4", lambda phi, N: ~unread(phi, N), "upside down"),
    ("12.4", make(unread, first=0), "images are counted from 1"),
    ("12.4", lambda phi, N: unread(phi.reshape(1, -1), N)[[0] * len(phi)], "rows leak"),
    ("12.4", lambda phi, N: np.arange(1, N + 1) > phi.max(1)[:, None], "one in between"),
    ("12.4", lambda phi, N: (phi[:, :, None] != np.arange(N) + 1).any(1), "yours asks for any"),
    ("12.4", lambda phi, N: (phi[:, :, None] == np.arange(N) + 1).sum(1), "numbers of tokens"),
    ("12.4", lambda phi, N: unread(phi, N).all(0), "one row for each page"),
    ("12.5", make(gate, slope=lambda x: 1), "the factor 1 - tanh(alpha)^2 is missing"),
    ("12.5", make(gate, slope=lambda x: 1 + np.tan(x) ** 2), "dalpha: `tan` where `tanh` was"),
    ("12.5", make(gate, slope=lambda x: 1 - np.tanh(x)), "without the square"),
    ("12.5", make(gate, slope=lambda x: 1 - x * x), "the square is of tanh(alpha)"),
    ("12.5", make(gate, slope=np.tanh), "tanh(alpha) where its derivative was meant"),
    ("12.5", make(gate, inner=lambda w, dw, t: np.tanh(t) * np.vdot(w, dw)), "BEFORE it is"),
    ("12.5", make(gate, inner=lambda w, dw, t: dw.sum()), "this sums dW' without W"),
    ("12.5", make(gate, inner=lambda w, dw, t: w * dw), "one number is wanted"),
    ("12.5", make(gate, opening=lambda x: 1), "dweight: the gate is missing"),
    ("12.5", make(gate, opening=lambda x: x), "alpha * dW', but the gate is tanh"),
    ("12.5", make(gate, opening=np.tan), "dweight: `tan` where `tanh` was"),
    ("12.5", lambda *a: (gate(*a)[0], gate(*a)[1].T), "dweight: turned"),
    ("12.5", lambda *a: gate(*a)[0], "a pair (dalpha, dweight) is wanted"),
]
