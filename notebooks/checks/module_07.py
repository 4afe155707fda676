"""Checks of module 07: phi, the image-causal mask, attention under it, and who can see what."""

from functools import partial

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.functional import softmax
from miniflamingo.xattn import compute_phi, image_causal_attention, image_causal_mask

from .core import Wrong, as_array, call, exercise, expect, expect_stable
from .module_01 import FILL

# pages with two images, three, one and none, <image> = 3; some begin or end with one
TOKENS = np.array(
    [
        [1, 5, 2, 3, 6, 7, 2, 3, 8],
        [3, 1, 5, 3, 2, 2, 3, 8, 7],
        [1, 5, 2, 6, 2, 7, 7, 8, 3],
        [1, 5, 6, 2, 7, 8, 2, 5, 2],
    ]
)


# --- 7.1 and 6.2: phi -----------------------------------------------------------------------------


@exercise("7.1")
def phi(answer):
    """answer(tokens int[B, L], image_token) -> phi int[B, L]."""
    for tokens, tag in ((TOKENS, 3), (TOKENS[:, ::-1], 7), (TOKENS % 3, 3)):
        expect(call(answer, tokens, tag), compute_phi(tokens, tag), _phi_mistakes(tokens, tag))


def _phi_mistakes(tokens, tag):
    is_image = (tokens == tag).astype(int)
    right = np.cumsum(is_image, axis=1)
    total = is_image.sum(axis=1, keepdims=True)
    if tag != 3:
        three = np.cumsum(tokens == 3, axis=1)
        yield "the id of <image> is the argument image_token, not always 3", three
    yield "phi is off by one at <image>: it already carries its own image's index", right - is_image
    yield "this marks the <image> tokens alone: what follows an image looks at it too", is_image
    yield (
        "rows leak: row 1 goes on counting where row 0 ended; count along axis 1",
        np.cumsum(is_image).reshape(tokens.shape),
    )
    yield (
        "wrong axis: count along the tokens (axis 1), not the batch",
        is_image.cumsum(axis=0),
    )
    yield "images are counted from 1: phi = 0 is kept for `no image yet`", right - 1
    yield "this is the index of the NEXT image: exercise 7.2", compute_phi(tokens, tag, True)
    yield "this counts the images still to come", total - right
    yield "this gives every token the last image of its row", np.broadcast_to(total, tokens.shape)


@exercise("7.2")
def phi_next(answer):
    """answer(tokens int[B, L], image_token) -> phi int[B, L] under p_next."""
    for tokens, tag in ((TOKENS, 3), (TOKENS[:, ::-1], 7), (TOKENS % 3, 3)):
        right = compute_phi(tokens, tag, use_next=True)
        expect(call(answer, tokens, tag), right, _next_mistakes(tokens, tag))


def _next_mistakes(tokens, tag):
    is_image = (tokens == tag).astype(int)
    previous, total = np.cumsum(is_image, axis=1), is_image.sum(axis=1, keepdims=True)
    following = previous - is_image + 1
    shifted = previous + 1
    yield "this is the PREVIOUS image: exercise 7.1", previous
    at_image = "phi is off by one at <image>: the next image of <image> is its own"
    yield at_image, np.where(shifted > total, 0, shifted)
    yield (
        f"{at_image}; and after the last image there is no next one: phi = 0 there",
        shifted,
    )
    beyond = "after the last image there is no next one: phi = 0 there, not"
    yield f"{beyond} {int(total[0, 0]) + 1}", following
    for of_all in (total.max(), total.min(), total[0], total.sum()):
        words = "each row has a last image of its own: N is the number of images of the ROW"
        yield words, np.where(following > of_all, 0, following)
    yield (
        f"{beyond} the last image again",
        np.minimum(following, total),
    )
    yield "images are counted from 1: phi = 0 is kept for `no image`", previous - is_image


# --- 7.3: the mask ------------------------------------------------------------------------------


@exercise("7.3")
def mask(answer):
    """answer(phi int[B, L], N, R) -> bool[B, L, N*R]."""
    pages = compute_phi(TOKENS, 3)
    for phi, N, R in ((pages[:1], 2, 3), (pages, 3, 2), (np.array([[0, 3, 1, 2, 2]]), 4, 2)):
        right = image_causal_mask(phi, N, R)
        out = call(answer, phi, N, R)
        explain = partial(_mask_leak, phi=phi, R=R)
        expect(out, right, _mask_mistakes(phi, N, R), explain)


def _mask_mistakes(phi, N, R):
    right, image = image_causal_mask(phi, N, R), np.repeat(np.arange(1, N + 1), R)
    column = phi[:, :, None]
    yield _wrong_sign(">=", column >= image, right, phi, R), column >= image
    yield _wrong_sign("<=", column <= image, right, phi, R), column <= image
    yield "upside down: True means visible, not masked", ~right
    yield "the axes are exchanged: [B, L, N*R], tokens before visual tokens", right.swapaxes(1, 2)
    yield (
        "images are counted from 1: image n is seen where phi = n",
        column == image - 1,
    )
    yield (
        "the R visual tokens of an image stand side by side, 1 1 1 2 2 2: np.repeat, not np.tile",
        column == np.tile(np.arange(1, N + 1), R),
    )
    yield (
        "text before the first image sees image 1: phi = 0 must see nothing",
        image_causal_mask(np.maximum(phi, 1), N, R),
    )


def _wrong_sign(sign, wrong, right, phi, R):
    b, t, c = np.argwhere(wrong & ~right)[0]
    also = f"token {t} of row {b} (phi = {phi[b, t]}) also sees image {c // R + 1}"
    return f"`{sign}` where `==` was meant: {also}"


def _mask_leak(got, right, phi, R):
    """The first cell that is wrong, in words."""
    b, t, c = np.argwhere(got != right)[0]
    sees = "sees" if got[b, t, c] else "does not see"
    return (
        f"token {t} of row {b} (phi = {phi[b, t]}) {sees} visual token {c}, which is of image "
        f"{c // R + 1}"
    )


# --- 7.4: attention under phi -------------------------------------------------------------------


def attention_case(seed=0, phi=((0, 0, 1, 1, 1, 2, 2, 3), (0, 1, 1, 2, 2, 2, 3, 0)), R=4, K=6):
    """q [B, L, K], k and v [B, N, R, K], phi int[B, L], with N = 3 images: float64, random."""
    rng, phi = np.random.default_rng(seed), np.array(phi)
    k, v = rng.normal(0, 1, (2, len(phi), 3, R, K))
    return rng.normal(0, 1, (*phi.shape, K)), k, v, phi


def one_head(q, k, v, phi):
    """The library's image-causal attention without the axis of heads."""
    add = np.expand_dims
    return image_causal_attention(add(q, 2), add(k, 3), add(v, 3), phi)[:, :, 0]


@exercise("7.4")
def masked_attention(answer):
    """answer(q [B, L, K], k [B, N, R, K], v [B, N, R, K], phi int[B, L]) -> [B, L, K]."""
    q, k, v, phi = attention_case()
    right, out = one_head(q, k, v, phi), call(answer, q, k, v, phi)
    got = as_array(out)
    if got.shape != right.shape or got.dtype.kind != "f":
        expect(out, right)
    right = right.astype(got.dtype)
    seen = (phi > 0)[:, :, None]  # first the tokens that have an image, then the others
    mistakes = (*_score_mistakes(q, k, v, phi), *_sight_mistakes(q, k, v, phi))
    mistakes = [(message, np.where(seen, wrong, right)) for message, wrong in mistakes]
    expect(np.where(seen, got, right), right, mistakes)
    mistakes = _imageless_mistakes(q, k, v, phi)
    mistakes = [(message, np.where(seen, right, wrong)) for message, wrong in mistakes]
    expect(np.where(seen, right, got), right, mistakes)
    for phi, words in PHIS.items():
        q, k, v, phi = attention_case(1, phi, R=3, K=4)
        explain = partial(_leak_of, phi=phi, words=words)
        expect(call(answer, q, k, v, phi), one_head(q, k, v, phi), explain=explain)
    for sign in (-1, 1):  # all scores far below 0, and far above
        case = q + sign * 60, k + 60, v, phi
        expect_stable(call(answer, *case), one_head(*case), _fill_mistakes(v, phi, sign))


def _fill_mistakes(v, phi, sign):
    """What a fill above all scores gives: all weight on what is masked, taken away afterwards."""
    hidden = ~image_causal_mask(phi, *v.shape[1:3])
    leaked = softmax(np.where(hidden, 0, -1e9)) @ _flat(v) * (phi > 0)[:, :, None]
    return [(FILL, leaked), (FILL, 0 * leaked)] if sign < 0 else []


PHIS = {
    ((2, 2, 0, 3, 1),): "when phi goes back",  # any order is allowed
    ((1, 0, 1, 1, 0), (0, 0, 0, 0, 0)): "in a page with fewer images",
}


def _flat(x):  # [B, N, R, K] -> [B, N*R, K]
    return x.reshape(len(x), -1, x.shape[-1])


def _turned(k):  # [B, N, R, K] -> [B, K, N*R], with the scores in view: q @ _turned(k)
    return _flat(k).swapaxes(1, 2)


def _score_mistakes(q, k, v, phi):
    """What wrong scales and a wrong axis give."""
    K, mask, scores = k.shape[-1], image_causal_mask(phi, *k.shape[1:3]), q @ _turned(k)
    unscaled, by_k, scaled = (np.where(mask, scores * c, -1e30) for c in (1, 1 / K, K**-0.5))
    zeroed = softmax(np.where(mask, q @ _turned(k) / np.sqrt(K), 0))
    for weights in (zeroed, zeroed * mask):
        yield "a score of 0 is no mask: exp(0) = 1; use -1e9", weights @ _flat(v)
    yield "the scale is missing: divide the scores by sqrt(K)", softmax(unscaled) @ _flat(v)
    yield "wrong scale: divide by sqrt(K), not by K", softmax(by_k) @ _flat(v)
    yield (
        "wrong softmax axis: one token's weights, over the visual tokens, must sum to 1",
        softmax(scaled.swapaxes(1, 2)).swapaxes(1, 2) @ _flat(v),
    )
    yield (
        "the mask comes too late: mask the scores before the softmax, or the weights left over do "
        "not sum to 1, and the keys of other images leak through the sum",
        masked_late(q, k, v, phi),
    )


def _sight_mistakes(q, k, v, phi):
    """What seeing the wrong images gives."""
    earlier = image_causal_mask(phi, *k.shape[1:3], only_last=False)
    t = int(np.argmax(phi[0] > 1))
    yield (
        f"`>=` where `==` was meant: token {t} (phi = {phi[0, t]}) also sees image 1, which leaked",
        attention(q, _flat(k), _flat(v), earlier),
    )
    yield "no mask: every token sees every image", attention(q, _flat(k), _flat(v))
    shifted = one_head(q, np.roll(k, -1, 1), np.roll(v, -1, 1), phi)
    yield "off by one: images are counted from 1, image phi is k[b, phi - 1]", shifted
    yield "the weights belong on the VALUES: yours are on the keys", one_head(q, k, k, phi)
    yield "queries meet KEYS: k and v are exchanged", one_head(q, v, k, phi)
    yield "q is added: the residual is not part of equation (3)", q + one_head(q, k, v, phi)
    yield "each row has a phi of its own: this takes row 0's", one_head(q, k, v, phi[:1] + 0 * phi)


NOTHING = "tokens before the first image must attend to nothing"


def _imageless_mistakes(q, k, v, phi):
    """What typical mistakes give for tokens with phi = 0."""
    uniform = np.broadcast_to(_flat(v).mean(axis=1, keepdims=True), q.shape)
    yield f"{NOTHING}: you averaged over ALL images, later ones too", uniform
    yield f"{NOTHING}: yours is NaN (a softmax over nothing is 0 / 0)", np.full_like(q, np.nan)
    last = one_head(q, k, v, np.where(phi == 0, k.shape[1], phi))
    yield f"{NOTHING}: yours see the LAST image (phi - 1 = -1 is the last index)", last
    first = one_head(q, k, v, np.maximum(phi, 1))
    yield f"{NOTHING}: yours see image 1, which comes after them", first
    yield f"{NOTHING}: yours see all images", attention(q, _flat(k), _flat(v))
    yield f"{NOTHING}: yours return their query", q


def _leak_of(got, right, phi, words):
    b, t = np.argwhere(~np.isclose(got, right).all(axis=-1))[0]
    return f"right so far, but token {t} is wrong {words}: phi = {phi[b].tolist()}"


# --- 7.5: a harness that finds the fault ----------------------------------------------------------


def filled(q, k, v, phi):
    """Attention with the bug of a finite fill: a row that is all masked becomes a mean over all."""
    mask = image_causal_mask(phi, *k.shape[1:3])
    scores = np.where(mask, q @ _turned(k) / k.shape[-1] ** 0.5, -1e9)
    return softmax(scores) @ _flat(v)


def masked_late(q, k, v, phi):
    """Attention that masks the weights, not the scores: other images' KEYS leak through the sum."""
    weights = softmax(q @ _turned(k) / k.shape[-1] ** 0.5)
    return (weights * image_causal_mask(phi, *k.shape[1:3])) @ _flat(v)


def reach(attend, q, k, v, phi, keys=True, values=True):
    """How much the output at token l of a batch of one changes with image j + 1: float[L, N]."""
    table = np.zeros((phi.shape[1], k.shape[1]))
    for j in range(k.shape[1]):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, j] += keys * np.linspace(1, 2, k[0, j].size).reshape(k[0, j].shape)
        other_v[:, j] += values
        change = attend(q, other_k, other_v, phi) - attend(q, k, v, phi)
        table[:, j] = abs(change[0]).reshape(phi.shape[1], -1).max(axis=-1)
    return table


@exercise("7.5")
def harness(answer):
    """answer(attend, q [1, L, K], k [1, N, R, K], v, phi int[1, L]) -> bool[3, L]."""
    case = attention_case(2, [[0, 0, 1, 1, 2, 3, 3]])
    for attend, name in FAULTS.items():
        right, probes = faults_of(reach(attend, *case) > 0, case[3][0]), []
        mistakes = _harness_mistakes(attend, case, right, name)
        out = call(answer, _noted(attend, probes), *case)
        try:
            expect(out, right, mistakes, _faults_in_words)
        except Wrong:
            if name and not probes:
                words = "your code never calls attend, which may have any fault: measure it"
                raise Wrong(words) from None
            if all(probes):
                raise
            raise Wrong(INFINITE_PROBE) from None


def faults_of(table, phi):
    """bool[L, N], which token notices which image -> bool[3, L]: earlier, later, blind."""
    image, own = np.arange(1, table.shape[1] + 1), phi[:, None]
    earlier = (table & (image < own)).any(axis=1)
    later = (table & (image > own)).any(axis=1)
    return np.stack([earlier, later, (phi > 0) & ~(table & (image == own)).any(axis=1)])


def _all_so_far(q, k, v, phi):
    return attention(q, _flat(k), _flat(v), image_causal_mask(phi, *k.shape[1:3], only_last=False))


def _too_early(q, k, v, phi):
    return one_head(q, k, v, np.maximum(phi, 1))


def _the_one_before(q, k, v, phi):
    return one_head(q, k, v, np.maximum(phi - 1, 0))


FAULTS = {
    one_head: "",
    _too_early: "image 1 too early",
    filled: "a mean over all",
    masked_late: "late mask",
    _all_so_far: ">= for ==",
    _the_one_before: "off by one",
}
INFINITE_PROBE = (
    "you try it with NaN or inf, which spoil everything: 0 * NaN is NaN, so it passes a weight of "
    "0; change the image to other finite numbers"
)


def _noted(attend, probes):
    """attend, and a list of whether all arguments of each call are finite."""

    def noted(*arguments):
        probes.append(all(np.isfinite(x).all() for x in arguments))
        return attend(*arguments)

    return noted


def _harness_mistakes(attend, case, right, name):
    phi, table = case[3][0], reach(attend, *case) > 0
    through = "a leak stays unseen: change image j's keys AND its values"
    if name == "a mean over all":
        keys_only = reach(attend, *case, values=False) > 0
        words = f"{through} (a uniform mean does not look at the keys)"
        yield words, faults_of(keys_only, phi)
    if name == "late mask":
        values_only = reach(attend, *case, keys=False) > 0
        words = f"{through} (a late mask leaks through the keys alone)"
        yield words, faults_of(values_only, phi)
    both = right.copy()
    both[0] |= (table & (np.arange(1, table.shape[1] + 1) == phi[:, None])).any(axis=1)
    yield "a token's OWN image is neither earlier nor later: < and >, not <= and >=", both
    both = right.copy()
    both[1] |= (table & (np.arange(1, table.shape[1] + 1) == phi[:, None])).any(axis=1)
    yield "a token's OWN image is neither earlier nor later: < and >, not <= and >=", both
    blind = right.copy()
    blind[2] |= phi == 0
    yield "a token with phi = 0 has no image to be blind to", blind
    missed = right.copy()
    missed[1] &= phi > 0
    yield "of a token with phi = 0 every image is a later one: it must see none", missed
    yield "earlier and later are exchanged", right[[1, 0, 2]]
    yield "the axes are exchanged: [3, L], kinds before tokens", right.T
    yield "upside down: True means a fault", ~right
    yield (
        "image 1 is still changed while you try image 2: start from a fresh copy for each image",
        faults_of(np.logical_or.accumulate(table, axis=1), phi),
    )
    yield (
        "compare token by token: one changed token makes your whole column True",
        faults_of(np.broadcast_to(table.any(axis=0), table.shape), phi),
    )
    yield (
        "images are counted from 1, columns from 0: image j is column j - 1",
        faults_of(np.roll(table, 1, 1), phi),
    )


def _faults_in_words(got, right):
    kind, token = np.argwhere(got != right)[0]
    words = ("sees an earlier image", "sees a later image", "is blind to its own image")[kind]
    found = "your table says so" if got[kind, token] else "your table does not say so"
    return f"token {token} {words}: {right[kind, token]} is right; {found}"
