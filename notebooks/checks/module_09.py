"""Checks of module 09: which tokens count, the mixture, clipping, a training loop, a log."""

import numpy as np

from miniflamingo.worlds.datasets import IGNORED

from .core import apart, call, close, exercise, expect, several

# --- 9.1: which tokens count ----------------------------------------------------------------------

# two documents, <pad> = 0, <BOS> = 1, <EOC> = 2, <image> = 3: two pictures; one, padded
TOKENS = np.array([[1, 3, 5, 6, 2, 3, 7, 2], [1, 8, 3, 9, 2, 0, 0, 0]])


@exercise("9.1")
def targets(answer):
    """answer(tokens int[B, L], image, pad) -> int[B, L-1]."""
    other = np.array([[4, 1, 9, 6, 4, 9, 3, 0], [4, 9, 0, 3, 4, 1, 1, 1]])  # <image> = 9, <pad> = 1
    for tokens, image, pad in ((TOKENS, 3, 0), (other, 9, 1)):
        right = targets_of(tokens, image, pad)
        expect(call(answer, tokens, image, pad), right, _target_mistakes(tokens, image, pad))


def targets_of(tokens, image, pad):
    """The token to predict at each place but the last; IGNORED where that is no text."""
    following = tokens[:, 1:]
    return np.where((following == image) | (following == pad), IGNORED, following)


def _target_mistakes(tokens, image, pad):
    following, here = tokens[:, 1:], tokens[:, :-1]
    text, text_here = ((t != image) & (t != pad) for t in (following, here))
    right = targets_of(tokens, image, pad)
    yield "no token is left out: <image> and <pad> must not count", following
    yield (
        "<image> counts here: the model would learn to predict where pictures stand",
        np.where(following == pad, IGNORED, following),
    )
    yield "<pad> counts here: it is no text", np.where(following == image, IGNORED, following)
    yield (
        "one place too early: leave out by the token that is to be PREDICTED, not by the one read",
        np.where(text_here, following, IGNORED),
    )
    yield (
        "not shifted: token l predicts token l + 1, so the targets are tokens[:, 1:]",
        np.where(text_here, here, IGNORED),
    )
    yield (
        "no token predicts the first one: the targets are [B, L-1], from tokens[:, 1:]",
        np.where((tokens == image) | (tokens == pad), IGNORED, tokens),
    )
    for mark in (0, -1, pad):
        yield (
            f"left out is what has the target {IGNORED} (IGNORED); {mark} is none of that",
            np.where(text, following, mark),
        )
    yield "these are the tokens that count, as truths: their ids are wanted", text
    yield "upside down: this keeps <image> and <pad>", np.where(text, IGNORED, following)
    if (image, pad) != (3, 0):
        kept = (following != 3) & (following != 0)
        yield "the ids are the arguments image and pad", np.where(kept, following, IGNORED)
    yield "the last target is missing or repeated", np.roll(right, 1, axis=1)


# --- 9.2: the mixture -----------------------------------------------------------------------------


def mixture_case(seed=0):
    """{dataset: the gradient of each example, [B_m, P]} and {dataset: lambda}."""
    rng = np.random.default_rng(seed)
    sizes = {"documents": 5, "captions": 3, "pairs": 2, "clips": 4}
    gradients = {m: rng.normal(i, 1, (B, 6)) for i, (m, B) in enumerate(sizes.items())}
    weights = {"documents": 1.0, "captions": 0.2, "pairs": 0.3, "clips": 0.6}
    return gradients, weights if seed == 0 else dict(reversed(weights.items()))


@exercise("9.2")
def mixture(answer):
    """answer({m: [B_m, P]}, {m: lambda_m}) -> [P]."""
    for seed in (0, 1):
        gradients, weights = mixture_case(seed)
        right = sum(weights[m] * g.mean(axis=0) for m, g in gradients.items())
        expect(call(answer, gradients, weights), right, _mixture_mistakes(gradients, weights))
    only = {"clips": gradients["clips"]}  # a dataset alone
    expect(call(answer, only, {"clips": 0.5}), 0.5 * only["clips"].mean(axis=0))


def _mixture_mistakes(gradients, weights):
    means = {m: g.mean(axis=0) for m, g in gradients.items()}
    right, M = sum(weights[m] * g for m, g in means.items()), len(means)
    every = np.concatenate(list(gradients.values()))
    weighted = np.concatenate([weights[m] * g for m, g in gradients.items()])
    last, turned = list(means)[-1], zip(weights.values(), means.values())
    yield (
        "by name, not by place: the weights stand in another order here, weights[m]",
        sum(weight * g for weight, g in turned),
    )
    yield "the weights are missing: each dataset's mean counts lambda_m times", sum(means.values())
    yield "the weights are missing, and this is a mean over datasets", sum(means.values()) / M
    yield (
        "a sum over the examples: a dataset would count more for a larger batch; take the mean",
        weighted.sum(axis=0),
    )
    yield (
        "this MERGES the datasets: all examples in one batch count the same, lambda is lost",
        every.mean(axis=0),
    )
    yield "divided by the sum of all examples: take each dataset's mean", weighted.mean(axis=0)
    yield "equation (2) is a sum over datasets, not their mean: do not divide by M", right / M
    yield (
        "equation (2) does not divide by the sum of the weights",
        right / sum(weights.values()),
    )
    yield (
        "only the last dataset is left: ADD its gradient to the sum, this overwrites it",
        weights[last] * means[last],
    )
    first = next(iter(means))
    yield "only the first dataset is here: go through all of them", weights[first] * means[first]
    yield (
        "not summed over the datasets: one gradient for the one update",
        np.stack([weights[m] * g for m, g in means.items()]),
    )


# --- 9.3: clipping --------------------------------------------------------------------------------


def clip_case(scale):
    """Gradients of three parameters of different shapes and sizes."""
    rng = np.random.default_rng(3)
    shapes = ((2, 3), (4,), ())
    return [np.array(scale * (i + 1) * rng.normal(size=s)) for i, s in enumerate(shapes)]


@exercise("9.3")
def clipping(answer):
    """answer(gradients, a list of arrays, most) -> the list, clipped to a global norm of most."""
    for scale, most in ((1.0, 1.0), (20.0, 2.5), (0.01, 1.0)):
        gradients = clip_case(scale)
        right = clipped(gradients, most)
        out = several(call(answer, gradients, most), right, "a list of three gradients")
        mistakes = [(m, _flat(wrong)) for m, wrong in _clip_mistakes(gradients, most)]
        expect(_flat(out), _flat(right), mistakes)


def _flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def clipped(gradients, most):
    """Equation (3)."""
    norm = np.sqrt(sum((g * g).sum() for g in gradients))
    return [g * min(1, most / norm) for g in gradients]


def _clip_mistakes(gradients, most):
    flat = _flat(gradients)
    norm, separate = np.sqrt(flat @ flat), [np.sqrt((g * g).sum()) for g in gradients]

    def scaled(by):
        return [g * min(1, most / by) for g in gradients]

    yield (
        "nothing is clipped (`for g in gradients: g = ...` puts nothing into the list)",
        gradients,
    )
    yield (
        "each gradient is clipped by itself: the norm is that of ALL of them together, or the "
        "direction changes",
        [g * min(1, most / n) for g, n in zip(gradients, separate)],
    )
    yield (
        "clipped number by number: equation (3) scales them all by one factor",
        [np.clip(g, -most, most) for g in gradients],
    )
    yield (
        "a small gradient is left as it is: the factor is at most 1",
        [g * most / norm for g in gradients],
    )
    yield "the square root is missing: this divides by the square of the norm", scaled(norm**2)
    yield (
        "the norm of all is no sum of norms: add up the squares, then take the root",
        scaled(sum(separate)),
    )
    yield "this is the norm of the largest gradient alone", scaled(max(separate))
    yield "this scales by the largest number; the norm is wanted", scaled(abs(flat).max())
    yield (
        "the norm needs squares, or at least absolute values: yours is of the sum",
        scaled(abs(flat.sum())),
    )
    yield "divided by the norm, but `most` is missing", [g / max(1, norm) for g in gradients]


# --- 9.4: a training loop -------------------------------------------------------------------------


def loop_case(seed, P=5):
    """Gradients of three quadratic losses, their weights, and the rest of train's arguments."""
    rng = np.random.default_rng(seed)
    centres, sizes = rng.normal(size=(3, P)), (4.0, 0.7, 1.5)

    def gradient_of(centre, size):
        return lambda theta: size * (theta - centre)

    gradients = {m: gradient_of(c, s) for m, c, s in zip("abc", centres, sizes)}
    weights = {"a": 1.0, "b": 0.2, "c": 0.5}
    return gradients, weights, rng.normal(size=P), 6, 0.05, 3, 2.0 + 4 * seed, 0.1


@exercise("9.4")
def training_loop(answer):
    """answer(gradients, weights, theta [P], steps, rate, warm, most, decay) -> [steps + 1, P]."""
    for seed in (0, 1):
        case = loop_case(seed)
        mistakes = [(words, trained(*case, **how)) for words, how in LOOP_MISTAKES]
        right = trained(*case)
        mistakes.append(("every row is the last one: theta is changed in place, and path holds it "
                         "many times; theta = theta - ...", right[-1:] + 0 * right))  # fmt: skip
        expect(call(answer, *case), right, mistakes, _update_in_words)


def trained(gradients, weights, theta, steps, rate, warm, most, decay, weigh=True, clip="whole",
            hats=True, first=1, warmed=True, l2=False, decayed="rated", sign=1, each=False,
            root="outside", mean=False):  # fmt: skip
    """Equations (2) to (5), as in the notebook; what may vary are the typical mistakes."""
    m, v, path, t = 0, 0, [theta], first
    total = sum(weights.values()) if mean else 1
    for _ in range(steps):
        parts = {n: (weights[n] if weigh else 1) / total * g(theta) for n, g in gradients.items()}
        for g in parts.values() if each else [sum(parts.values())]:
            if clip == "each dataset":
                g = sum(_clipped(part, most) for part in parts.values())
            elif clip == "each number":
                g = np.clip(g, -most, most)
            elif clip == "whole":
                g = _clipped(g, most)
            g = g + decay * theta * l2
            m, v, u = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, max(t, 1)
            a, b = (1 - 0.9**u, 1 - 0.999**u) if hats else (1, 1)
            step = m / a / (np.sqrt(v / b) + 1e-8)
            pace = rate * (min(1, t / warm) if warmed else 1)
            shrink = {"rated": pace, "never": 0, "bare": 1}[decayed] * (not l2)
            theta = theta - sign * pace * step - shrink * decay * theta
        path.append(theta)
        t += 1
    return np.array(path)


def _clipped(g, most):
    return g * min(1, most / np.sqrt((g * g).sum()))


LOOP_MISTAKES = [
    ("the weights lambda are missing", {"weigh": False}),
    ("nothing to divide by: equation (2) is a sum, not a mean", {"mean": True}),
    ("not clipped: equation (3)", {"clip": "never"}),
    ("each number is clipped: the whole gradient is, so that its direction stays",
     {"clip": "each number"}),
    ("each dataset is clipped alone: first add up, then clip", {"clip": "each dataset"}),
    ("an update for each dataset: add up first, then ONE update", {"each": True}),
    ("the hats are missing: divide by 1 - beta^t", {"hats": False}),
    ("updates are counted from 1: the first one must not have the rate 0", {"first": 0}),
    ("the warm-up is missing: equation (5)", {"warmed": False}),
    ("the decay is no part of g: it pulls at the weight itself", {"l2": True}),
    ("the weight decay is missing", {"decayed": "never"}),
    ("the decay is multiplied by the rate, too", {"decayed": "bare"}),
    ("uphill: theta MINUS the step", {"sign": -1}),
]  # fmt: skip


def _update_in_words(got, right):
    row, place = np.argwhere(~close(got, right))[0]
    wanted, found = apart(right[row, place], got[row, place])
    where = "before any update" if row == 0 else f"after update {row}"
    return f"{where}: {wanted} is right at [{row}, {place}], got {found}"


# --- 9.5: reading a log ---------------------------------------------------------------------------


def log_case(seed=0):
    """Records of a made-up log: not every step, four layers.

    Of the gates one opens and shuts, one opens, shuts and opens again, and one hardly opens.
    """
    rng, steps = np.random.default_rng(seed), np.arange(1, 90, 8)
    s = steps / 89
    steps = steps if seed < 2 else 3 + np.cumsum(rng.integers(1, 9, len(steps)))
    curves = np.stack([1.2 * s * (1.4 - s), -1.1 * s, 0.4 * s, 1.1 * np.sin(4.5 * s) ** 2], axis=1)
    curves = curves * (1 + 0.01 * rng.normal(size=4))
    dense = curves[:, ::-1] * 0.9
    return [
        {"step": int(t), "loss": 1.0, "alpha_xattn": list(a), "alpha_dense": list(d)}
        for t, a, d in zip(steps, curves, dense)
    ]


def interrupted(records, at, back=3):
    """The log of a run that was interrupted after `at` records, and lost the last `back`."""
    lost = [
        r | {name: list(np.multiply(r[name], (0.1, 0.1, 4, 0.1)))}
        for r in records[at - back : at]
        for name in ("alpha_xattn",)
    ]
    return records[: at - back] + lost + records[at - back :]


@exercise("9.5")
def opening(answer):
    """answer(records, level) -> int[layers]: from which step on |tanh(alpha_xattn)| >= level."""
    cases = [(log_case(0), 0.5), (interrupted(log_case(1), 8), 0.3)]
    cases += [(interrupted(log_case(2), 11), 0.45), (interrupted(log_case(4), 11, 2), 0.3)]
    cases += [(log_case(2)[10:], 0.4)]  # a log that begins when a gate is open
    cases += [(_from_shut(log_case(3)), 0.0)]  # exactly at the level
    for records, level in cases:
        mistakes = *_edge_mistakes(records, level), *_opening_mistakes(records, level)
        expect(call(answer, records, level), opened(records, level), mistakes, whole=True)


def _from_shut(records):
    """A log whose first gates are exactly 0."""
    shut = {"alpha_xattn": [0.0] * 4, "alpha_dense": [0.0] * 4}
    return [records[0] | shut, *records[1:]]


def _open_to_the_end(gate):
    """The place from which on all of gate is true; its length where the last is not."""
    return len(gate) - int(np.logical_and.accumulate(gate[::-1]).sum())


def opened(records, level, gate=lambda alpha: abs(np.tanh(alpha)), name="alpha_xattn", keep="last",
           at=_open_to_the_end, never=0, least=np.greater_equal):  # fmt: skip
    """The step from which on each layer's gate is at least `level`; `never` where it is not so."""
    if keep == "last":
        records = [*{r["step"]: r for r in records}.values()]
    if keep == "first":
        records = [*{r["step"]: r for r in records[::-1]}.values()]
        records = sorted(records, key=lambda r: r["step"])
    steps = [r["step"] for r in records]
    reached = least(gate(np.array([r[name] for r in records])), level)  # [records, layers]
    places = [at(column) for column in reached.T]
    return np.array([steps[i] if i < len(steps) else never for i in places])


def _opening_mistakes(records, level):
    run = [*{r["step"]: r for r in records}.values()]
    steps = np.array([r["step"] for r in run])
    reached = abs(np.tanh([r["alpha_xattn"] for r in run])) >= level
    places = np.array([_open_to_the_end(column) for column in reached.T])
    shut, right = places == len(steps), opened(records, level)

    def wrong(**how):
        return opened(records, level, **how)

    yield (
        "the sign is arbitrary: take |tanh(alpha)|, or a negative gate never opens",
        wrong(gate=np.tanh),
    )
    yield "this looks at alpha; the gate is tanh(alpha)", wrong(gate=np.abs)
    yield (
        "this looks at alpha, and with its sign; the gate is |tanh(alpha)|",
        wrong(gate=np.asarray),
    )
    yield (
        "these are the gates of the feed-forward: alpha_xattn is asked for",
        wrong(name="alpha_dense"),
    )
    first = np.where(reached.any(axis=0), reached.argmax(axis=0), len(steps))
    again = "this is the FIRST step at which a gate is open, but it shuts again: when does it stay?"
    yield again, np.append(steps, 0)[first]
    yield (
        f"{again} (and of a step that stands in the log twice the later record counts)",
        wrong(keep="all", at=lambda gate: int(gate.argmax()) if gate.any() else 10**6),
    )
    yield (
        "a step that stands in the log twice: the later record counts, yours takes the earlier one",
        wrong(keep="first"),
    )
    yield (
        "a lost part of the run counts here: of a step that stands in the log twice only the later "
        "record is part of it",
        wrong(keep="all"),
    )
    yield "these are places in the log: look up the step", np.where(shut, 0, places)
    yield "these are places in the log: look up the step", places
    yield "a gate that is shut in the last record: 0, not the last step", wrong(never=steps[-1])
    yield "0 for a gate that is not open at the end, not -1", wrong(never=-1)
    yield "0 for a gate that is not open at the end, not the first step", wrong(never=steps[0])
    yield "this counts the records at the end with an open gate", len(steps) - places
    yield "this counts the records with an open gate", reached.sum(axis=0)
    yield "one step for each layer is wanted, not one for all", right.max()


def _edge_mistakes(records, level):
    right = opened(records, level)
    run = [*{r["step"]: r for r in records}.values()]
    steps = np.array([r["step"] for r in run])
    gates = abs(np.tanh([r["alpha_xattn"] for r in run])) >= level
    places = np.array([_open_to_the_end(column) for column in gates.T])
    yield (
        "a gate that is open in all records: it stays open from the first step on, not from 0",
        np.where(places == 0, 0, right),
    )
    yield "at LEAST the level: >=, not >", opened(records, level, least=np.greater)
    before = steps[np.maximum(places - 1, 0)]
    yield (
        "this is the last step at which it was SHUT; the next one in the log is asked for",
        before,
    )
    yield (
        "this is the last step at which it was SHUT; the next one in the log is asked for",
        np.where(places == len(steps), 0, before),
    )
    at_the_end = np.where(places < len(steps), steps[-1], 0)
    yield "this is the LAST step of those at which it is open", at_the_end
