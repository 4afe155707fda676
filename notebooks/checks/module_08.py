"""Checks of module 08: which tokens count, the mixture, clipping, the gate's gradient, a log."""

import numpy as np

from miniflamingo.worlds.datasets import IGNORED
from miniflamingo.xattn import tanh_gate_backward

from .core import Wrong, as_array, call, exercise, expect

# --- 8.1: which tokens count ----------------------------------------------------------------------

# two documents, <pad> = 0, <BOS> = 1, <EOC> = 2, <image> = 3: two pictures; one, padded
TOKENS = np.array([[1, 3, 5, 6, 2, 3, 7, 2], [1, 8, 3, 9, 2, 0, 0, 0]])


@exercise("8.1")
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


# --- 8.2: the mixture -----------------------------------------------------------------------------


def mixture_case(seed=0):
    """{dataset: the gradient of each example, [B_m, P]} and {dataset: lambda}."""
    rng = np.random.default_rng(seed)
    sizes = {"documents": 5, "captions": 3, "pairs": 2, "clips": 4}
    gradients = {m: rng.normal(i, 1, (B, 6)) for i, (m, B) in enumerate(sizes.items())}
    return gradients, dict(zip(sizes, (1.0, 0.2, 0.3, 0.6)))


@exercise("8.2")
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
    last = list(means)[-1]
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


# --- several arrays at once -----------------------------------------------------------------------


def _several(out, right, names):
    """The arrays of a result that must be a tuple or list of len(right); Wrong when it is not."""
    if not isinstance(out, (tuple, list)) or len(out) != len(right):
        as_array(out)
        raise Wrong(f"wrong shape: {names} is wanted, got {type(out).__name__}")
    arrays = [as_array(part) for part in out]
    for i, (got, wanted) in enumerate(zip(arrays, right)):
        if got.shape != np.shape(wanted):
            shapes = f"{list(np.shape(wanted))} is wanted, got {list(got.shape)}"
            raise Wrong(f"wrong shape of number {i + 1} in {names}: {shapes}")
    return arrays


def _flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


# --- 8.3: clipping --------------------------------------------------------------------------------


def clip_case(scale):
    """Gradients of three parameters of different shapes and sizes."""
    rng = np.random.default_rng(3)
    shapes = ((2, 3), (4,), ())
    return [scale * (i + 1) * np.asarray(rng.normal(size=s)) for i, s in enumerate(shapes)]


@exercise("8.3")
def clipping(answer):
    """answer(gradients, a list of arrays, most) -> the list, clipped to a global norm of most."""
    for scale, most in ((1.0, 1.0), (20.0, 2.5), (0.01, 1.0)):
        gradients = clip_case(scale)
        right = clipped(gradients, most)
        out = _several(call(answer, gradients, most), right, "a list of three gradients")
        mistakes = [(m, _flat(wrong)) for m, wrong in _clip_mistakes(gradients, most)]
        expect(_flat(out), _flat(right), mistakes)


def clipped(gradients, most):
    """Equation (3)."""
    norm = np.sqrt(sum((g * g).sum() for g in gradients))
    return [g * min(1, most / norm) for g in gradients]


def _clip_mistakes(gradients, most):
    flat = _flat(gradients)
    norm, separate = np.sqrt(flat @ flat), [np.sqrt((g * g).sum()) for g in gradients]

    def scaled(by):
        return [g * min(1, most / by) for g in gradients]

    yield "nothing is clipped", gradients
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


# --- 8.4: the gate's gradient ---------------------------------------------------------------------

GRADIENTS = "the three gradients (dy, dalpha, dbranch)"


def gate_case(alpha, seed=0):
    """dout, y, alpha, branch of a gate: float64, random."""
    dout, y, branch = np.random.default_rng(seed).normal(size=(3, 2, 3, 4))
    return dout, y, np.array(alpha), branch


@exercise("8.4")
def gate_backward(answer):
    """answer(dout [...], y, alpha [], branch) -> dy, dalpha, dbranch."""
    for alpha in (0.8, 0.0, -1.7):
        case = gate_case(alpha)
        right = tanh_gate_backward(*case)
        arrays = _several(call(answer, *case), right, GRADIENTS)
        for i, got in enumerate(arrays):  # dy first, so that the message is about one of them
            expect(got, right[i], _gate_mistakes(i, *case))


def _gate_mistakes(i, dout, y, alpha, branch):
    """What typical mistakes give for gradient i of (dy, dalpha, dbranch)."""
    t, product = np.tanh(alpha), np.vdot(dout, branch)
    if i == 0:
        yield "dy: y also goes straight through, y + ..., so its gradient is dout", t * dout
        yield "dy: y is not in the gated branch; its gradient is dout alone", (1 + t) * dout
        yield "dy: y is left out: its gradient is dout, not 0", np.zeros_like(dout)
    if i == 1:
        yield "dalpha: the factor 1 - tanh(alpha)^2 is missing", product
        yield "dalpha: `tan` where `tanh` was meant: 1 + tan(alpha)^2", _tan_factor(alpha) * product
        yield "dalpha: 1 - tanh(alpha), without the square", (1 - t) * product
        yield "dalpha: 1 - alpha^2: the square is of tanh(alpha)", (1 - alpha**2) * product
        yield "dalpha: 1 + tanh(alpha)^2: the sign is minus", (1 + t * t) * product
        yield "dalpha: tanh(alpha) where its derivative was meant", t * product
        yield (
            "dalpha: alpha scales the branch, not y: <dout, branch>",
            (1 - t * t) * np.vdot(dout, y),
        )
        mean = (1 - t * t) * product / dout.size
        yield "dalpha: a mean; alpha acts on every number, so the gradients are summed", mean
        yield "dalpha: the sum of the branch, without dout", (1 - t * t) * branch.sum()
        yield "dalpha: the sum of dout, without the branch", (1 - t * t) * dout.sum()
    if i == 2:
        yield "dbranch: the gate is missing: tanh(alpha) * dout, which is 0 at alpha = 0", dout
        yield "dbranch: `tan` where `tanh` was meant", np.tan(alpha) * dout
        yield "dbranch: alpha * dout, but the gate is tanh(alpha)", alpha * dout
        yield "dbranch: the derivative of the gate belongs to dalpha alone", (1 - t * t) * dout
        yield "dbranch: multiply dout by the gate, not the branch by it", t * branch


def _tan_factor(alpha):
    return 1 + np.tan(alpha) ** 2


# --- 8.5: reading a log ---------------------------------------------------------------------------


def log_case(seed=0):
    """Records of a made-up log: every eighth step, four layers; one gate shuts again, one stays."""
    rng, steps = np.random.default_rng(seed), np.arange(1, 90, 8)
    s = steps / 89
    curves = np.stack([1.2 * s * (1.4 - s), -1.1 * s, 0.4 * s, 1.1 * np.sin(3 * s) ** 2], axis=1)
    curves = curves * (1 + 0.01 * rng.normal(size=4))
    dense = curves[:, ::-1] * 0.9
    return [
        {"step": int(t), "loss": 1.0, "alpha_xattn": list(a), "alpha_dense": list(d)}
        for t, a, d in zip(steps, curves, dense)
    ]


@exercise("8.5")
def opening(answer):
    """answer(records, level) -> int[layers], the first step with |tanh(alpha_xattn)| >= level."""
    for seed, level in ((0, 0.5), (1, 0.3), (2, 0.45)):
        records = log_case(seed)
        right = opened(records, level)
        expect(call(answer, records, level), right, _opening_mistakes(records, level))


def opened(records, level, gate=lambda alpha: abs(np.tanh(alpha)), name="alpha_xattn"):
    """The first step at which each layer's gate is at least `level`; 0 where it never is."""
    steps = np.array([r["step"] for r in records])
    reached = gate(np.array([r[name] for r in records])) >= level  # [records, layers]
    return np.where(reached.any(axis=0), steps[reached.argmax(axis=0)], 0)


def _opening_mistakes(records, level):
    steps = np.array([r["step"] for r in records])
    reached = abs(np.tanh([r["alpha_xattn"] for r in records])) >= level
    never, first = ~reached.any(axis=0), reached.argmax(axis=0)
    last = len(steps) - 1 - reached[::-1].argmax(axis=0)
    yield (
        "the sign is arbitrary: take |tanh(alpha)|, or a negative gate never opens",
        opened(records, level, np.tanh),
    )
    yield "this looks at alpha; the gate is tanh(alpha)", opened(records, level, np.abs)
    yield (
        "this looks at alpha, and with its sign; the gate is |tanh(alpha)|",
        opened(records, level, np.asarray),
    )
    yield (
        "these are the gates of the feed-forward: alpha_xattn is asked for",
        opened(records, level, name="alpha_dense"),
    )
    yield (
        "0 for a gate that never opens: argmax of a column without a True is 0, the first step",
        (steps[first]),
    )
    yield "these are places in the log: it holds every eighth step, look up record['step']", first
    yield "places in the log, not steps: look up record['step']", np.where(never, 0, first + 1)
    yield "places in the log, not steps: look up record['step']", np.where(never, 0, first)
    yield "the FIRST step is asked for, this is the last", np.where(never, 0, steps[last])
    yield "0 for a gate that never opens, not -1", np.where(never, -1, steps[first])
    yield "this counts the records with an open gate", reached.sum(axis=0)
    yield "one step for each layer is wanted, not one for all", steps[first[~never].min()]
