"""Right and wrong answers to the exercises of module 08, for test_checks.py."""

import numpy as np

from miniflamingo.module import Parameter
from miniflamingo.training import AdamW, OptimiserConfig
from miniflamingo.worlds.datasets import IGNORED
from miniflamingo.xattn import tanh_gate, tanh_gate_backward

# --- 8.1: targets ---------------------------------------------------------------------------------


def targets(tokens, image, pad, shift=1, by="next", leave=("image", "pad"), mark=IGNORED):
    """An answer as students write it, with a place for each mistake."""
    following, here = tokens[:, shift : tokens.shape[1] - 1 + shift], tokens[:, :-1]
    judged = following if by == "next" else here
    out = np.isin(judged, [{"image": image, "pad": pad}[name] for name in leave])
    return np.where(out, mark, following)


def targets_by_loops(tokens, image, pad):
    return [[IGNORED if t in (image, pad) else t for t in row[1:]] for row in tokens]


def targets_in_place(tokens, image, pad):
    tokens[tokens == image] = IGNORED
    return np.where(tokens == pad, IGNORED, tokens)[:, 1:]


def by_the_word(tokens, image, pad):  # open-flamingo, issue 269
    labels = tokens[:, 1:].copy()
    labels[labels == pad] = IGNORED
    labels[labels == "<image>"] = IGNORED
    return labels


# --- 8.2: the mixture -----------------------------------------------------------------------------


def mixture(gradients, weights, reduce=np.mean):
    return sum(weights[m] * reduce(g, axis=0) for m, g in gradients.items())


def mixture_by_loops(gradients, weights):
    total = np.zeros(6)
    for m in weights:
        for g in gradients[m]:
            total += weights[m] * g / len(gradients[m])
    return total


def overwriting(gradients, weights):
    for m, g in gradients.items():
        total = weights[m] * g.mean(axis=0)
    return total


# --- 8.3: clipping --------------------------------------------------------------------------------


def norm(gradients):
    return np.sqrt(sum(np.sum(g * g) for g in gradients))


def clip(gradients, most, by=norm):
    return [g * min(1, most / by(gradients)) for g in gradients]


class _Parameters:
    """The little of a Module that AdamW asks for."""

    def __init__(self, gradients):
        self.gradients = gradients

    def named_parameters(self):
        return [(f"p{i}", Parameter(np.zeros_like(g))) for i, g in enumerate(self.gradients)]


def clip_by_adam(gradients, most):
    """What the library's optimiser makes of a first gradient: its running mean is (1 - beta1) g."""
    optimiser = AdamW(_Parameters(gradients), OptimiserConfig(clip=most))
    optimiser.update(np.concatenate([g.ravel() for g in gradients]))
    return [m / (1 - optimiser.config.beta1) for m in optimiser.parts(optimiser.mean)]


# --- 8.4: the gate --------------------------------------------------------------------------------


def gate(dout, y, alpha, branch, slope=None, opening=np.tanh, dy=1.0, other=None):
    t = np.tanh(alpha)
    factor = 1 - t * t if slope is None else slope(alpha)
    inner = np.sum(dout * (branch if other is None else other))
    return dy * dout, factor * inner, opening(alpha) * dout


def gate_by_differences(dout, y, alpha, branch, step=1e-6):
    up, down = (np.sum(dout * tanh_gate(y, alpha + e, branch)) for e in (step, -step))
    return dout.copy(), (up - down) / (2 * step), tanh_gate(0, alpha, dout)


# --- 8.5: the log ---------------------------------------------------------------------------------


def opening(records, level, of=lambda a: abs(np.tanh(a)), name="alpha_xattn"):
    found = {}
    for record in records:
        for layer, alpha in enumerate(record[name]):
            found.setdefault(layer, 0)
            if found[layer] == 0 and of(alpha) >= level:
                found[layer] = record["step"]
    return np.array([found[layer] for layer in sorted(found)])


def opening_by_argmax(records, level, never=None, first=True, steps=True):
    numbers = np.array([r["step"] for r in records])
    reached = abs(np.tanh([r["alpha_xattn"] for r in records])) >= level
    place = reached.argmax(axis=0)
    if not first:
        place = len(records) - 1 - reached[::-1].argmax(axis=0)
    found = numbers[place] if steps else place
    return found if never is None else np.where(reached.any(axis=0), found, never)


RIGHT = [
    ("8.1", targets),
    ("8.1", targets_by_loops),
    ("8.2", mixture),
    ("8.2", mixture_by_loops),
    ("8.3", clip),
    ("8.3", lambda g, most: tuple(x / max(1, norm(g) / most) for x in g)),
    ("8.3", clip_by_adam),
    ("8.4", gate),
    ("8.4", tanh_gate_backward),
    ("8.4", gate_by_differences),
    ("8.5", opening),
    ("8.5", lambda *a: opening_by_argmax(*a, never=0)),
]

WRONG = [
    ("8.1", lambda *a: targets(*a, leave=()), "no token is left out"),
    ("8.1", lambda *a: targets(*a, leave=("pad",)), "<image> counts here"),
    ("8.1", by_the_word, "<image> counts here"),
    ("8.1", lambda *a: targets(*a, leave=("image",)), "<pad> counts here"),
    ("8.1", lambda *a: targets(*a, by="here"), "one place too early"),
    ("8.1", lambda *a: targets(*a, shift=0), "not shifted"),
    ("8.1", lambda t, i, p: np.where((t == i) | (t == p), -100, t), "no token predicts the first"),
    ("8.1", lambda *a: targets(*a, mark=0), "0 is none of that"),
    ("8.1", lambda *a: targets(*a, mark=-1), "-1 is none of that"),
    ("8.1", lambda t, i, p: targets(t, 3, 0), "the ids are the arguments"),
    ("8.1", lambda t, i, p: np.isin(t[:, 1:], [i, p], invert=True), "as truths"),
    ("8.1", targets_in_place, "changes its argument number 1 in place"),
    ("8.2", lambda g, w: sum(x.mean(axis=0) for x in g.values()), "the weights are missing"),
    ("8.2", lambda g, w: mixture(g, w, np.sum), "a sum over the examples"),
    ("8.2", lambda g, w: np.concatenate(list(g.values())).mean(axis=0), "this MERGES"),
    ("8.2", lambda g, w: mixture(g, w) / len(g), "do not divide by M"),
    ("8.2", lambda g, w: mixture(g, w) / sum(w.values()), "the sum of the weights"),
    ("8.2", overwriting, "this overwrites it"),
    ("8.2", lambda g, w: [w[m] * g[m].mean(axis=0) for m in g], "not summed over the datasets"),
    ("8.2", lambda g, w: mixture(g, w, lambda x, axis: x.mean()), "wrong shape: [6] is wanted"),
    ("8.3", lambda g, most: [clip([x], most)[0] for x in g], "each gradient is clipped by itself"),
    ("8.3", lambda g, most: [np.clip(x, -most, most) for x in g], "clipped number by number"),
    ("8.3", lambda g, most: [x * most / norm(g) for x in g], "a small gradient is left as it is"),
    ("8.3", lambda *a: clip(*a, by=lambda g: norm(g) ** 2), "the square root is missing"),
    ("8.3", lambda *a: clip(*a, by=lambda g: sum(norm([x]) for x in g)), "no sum of norms"),
    ("8.3", lambda *a: clip(*a, by=lambda g: max(abs(x).max() for x in g)), "largest number"),
    ("8.3", lambda g, most: [x / max(1, norm(g)) for x in g], "`most` is missing"),
    ("8.3", lambda g, most: g, "nothing is clipped"),
    ("8.3", lambda g, most: clip(g, most)[:2], "an array is wanted, got list"),
    ("8.3", lambda g, most: [x.ravel() for x in clip(g, most)], "wrong shape of number 1"),
    ("8.4", lambda *a: gate(*a, slope=lambda x: 1), "the factor 1 - tanh(alpha)^2 is missing"),
    ("8.4", lambda *a: gate(*a, slope=lambda x: 1 + np.tan(x) ** 2), "`tan` where `tanh` was"),
    ("8.4", lambda *a: gate(*a, opening=np.tan), "dbranch: `tan` where `tanh` was meant"),
    ("8.4", lambda *a: gate(*a, slope=lambda x: 1 - np.tanh(x)), "without the square"),
    ("8.4", lambda *a: gate(*a, slope=lambda x: 1 - x * x), "the square is of tanh(alpha)"),
    ("8.4", lambda *a: gate(*a, slope=np.tanh), "tanh(alpha) where its derivative was meant"),
    ("8.4", lambda *a: gate(*a, opening=lambda x: 1), "the gate is missing"),
    ("8.4", lambda *a: gate(*a, opening=lambda x: x), "alpha * dout, but the gate is tanh"),
    ("8.4", lambda *a: gate(*a, dy=0), "y is left out"),
    ("8.4", lambda d, y, a, b: gate(d, y, a, b, dy=np.tanh(a)), "straight through"),
    ("8.4", lambda d, y, a, b: gate(d, y, a, b, other=y), "alpha scales the branch, not y"),
    ("8.4", lambda d, y, a, b: (d, d * b, np.tanh(a) * d), "wrong shape of number 2"),
    ("8.4", lambda *a: gate(*a)[1:], "an array is wanted, got tuple"),
    ("8.5", lambda *a: opening(*a, of=np.tanh), "the sign is arbitrary"),
    ("8.5", lambda *a: opening(*a, of=abs), "this looks at alpha; the gate is tanh(alpha)"),
    ("8.5", lambda *a: opening(*a, name="alpha_dense"), "the gates of the feed-forward"),
    ("8.5", opening_by_argmax, "argmax of a column without a True"),
    ("8.5", lambda *a: opening_by_argmax(*a, never=0, steps=False), "places in the log"),
    ("8.5", lambda *a: opening_by_argmax(*a, never=0, first=False), "the FIRST step is asked"),
    ("8.5", lambda *a: opening_by_argmax(*a, never=-1), "never opens, not -1"),
    ("8.5", lambda *a: opening(*a).max(), "wrong shape: [4] is wanted, got []"),
]
