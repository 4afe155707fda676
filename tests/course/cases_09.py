"""Right and wrong answers to the exercises of module 09, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_09 import trained
from miniflamingo.module import Parameter
from miniflamingo.training import AdamW, OptimiserConfig
from miniflamingo.worlds.datasets import IGNORED

# --- 9.1: targets ---------------------------------------------------------------------------------


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


# --- 9.2: the mixture -----------------------------------------------------------------------------


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


# --- 9.3: clipping --------------------------------------------------------------------------------


def norm(gradients):
    return np.sqrt(sum(np.sum(g * g) for g in gradients))


def clip(gradients, most, by=norm):
    return [g * min(1, most / by(gradients)) for g in gradients]


def clip_in_place(gradients, most):
    factor = min(1, most / norm(gradients))
    for g in gradients:
        g *= factor
    return gradients


def clip_by_entries(gradients, most):
    factor = min(1, most / norm(gradients))
    for i in range(len(gradients)):
        gradients[i] = gradients[i] * factor
    return gradients


def clip_into_nothing(gradients, most):
    clip_in_place(gradients, most)


def clip_a_name(gradients, most):
    factor = min(1, most / norm(gradients))
    for g in gradients:
        g = g * factor
    return gradients


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


# --- 9.4: the loop --------------------------------------------------------------------------------


def loop_by_numbers(gradients, weights, theta, steps, rate, warm, most, decay):
    """Number by number, with Adam's means as sums over the past."""
    path, past = [list(theta)], []
    for t in range(1, steps + 1):
        parts = [weights[m] * gradients[m](np.array(path[-1])) for m in weights]
        g = sum(parts[1:], parts[0])
        past.append(g * min(1.0, most / np.linalg.norm(g)))
        row, pace = [], rate * min(1.0, t / warm)
        for i, x in enumerate(path[-1]):
            m = sum(0.1 * 0.9 ** (t - 1 - j) * g[i] for j, g in enumerate(past))
            v = sum(0.001 * 0.999 ** (t - 1 - j) * g[i] ** 2 for j, g in enumerate(past))
            step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
            row.append(x - pace * (step + decay * x))
        path.append(row)
    return np.array(path)


def one_array_again_and_again(*case):
    path = loop_by_numbers(*case)
    return np.array([path[-1]] * len(path))


def loop_in_place(gradients, weights, theta, *rest):
    path = loop_by_numbers(gradients, weights, theta, *rest)
    theta[:] = path[-1]
    return path


# --- 9.5: the log ---------------------------------------------------------------------------------


def opening(records, level, of=lambda a: abs(np.tanh(a)), name="alpha_xattn", keep=dict.update,
            least=np.greater_equal, stay=True, steps=True, never=0):  # fmt: skip
    """An answer in one pass through the log, with a place for each mistake."""
    run, found = {}, {}
    for record in records:
        keep(run, {record["step"]: record[name]})
    for place, step in enumerate(sorted(run)):
        for layer, alpha in enumerate(run[step]):
            if not least(of(alpha), level):
                found[layer] = never if stay else found.get(layer, never)
            elif found.get(layer, never) == never:
                found[layer] = step if steps else place
    return np.array([found[layer] for layer in sorted(found)])


def first_wins(run, more):
    for step, alphas in more.items():
        run.setdefault(step, alphas)


def opening_by_arrays(records, level, steps=None):
    """Without a loop over the layers: a running `and` from the end."""
    run = {r["step"]: r["alpha_xattn"] for r in records}
    steps = np.array([*run]) if steps is None else steps
    is_open = abs(np.tanh(np.array([*run.values()]))) >= level
    stays = np.cumprod(is_open[::-1], axis=0)[::-1]
    return np.append(steps, 0)[len(steps) - stays.sum(axis=0)]


def opening_in_the_log_as_it_is(records, level):
    renamed = [r | {"step": i} for i, r in enumerate(records)]
    steps = np.array([r["step"] for r in records])
    return opening_by_arrays(renamed, level, steps)


def opening_by_argmax(records, level):
    """argmax of a column without a True is 0."""
    run = {r["step"]: r["alpha_xattn"] for r in records}
    is_open = abs(np.tanh(np.array([*run.values()]))) >= level
    stays = np.logical_and.accumulate(is_open[::-1])[::-1]
    return np.array([*run])[stays.argmax(axis=0)]


def last_shut(records, level):
    run = {r["step"]: r["alpha_xattn"] for r in records}
    steps = np.array([*run])
    shut = abs(np.tanh(np.array([*run.values()]))) < level
    return [steps[np.flatnonzero(column)[-1]] if column.any() else steps[0] for column in shut.T]


def zero_where_always_open(records, level):
    out = opening(records, level)
    return np.where(out == records[0]["step"], 0, out)


def open_at_the_end(records, level):
    return np.where(opening(records, level) > 0, max(r["step"] for r in records), 0)


RIGHT = [
    ("9.4", trained),
    ("9.4", loop_by_numbers),
    ("9.1", targets),
    ("9.1", targets_by_loops),
    ("9.2", mixture),
    ("9.2", mixture_by_loops),
    ("9.3", clip),
    ("9.3", lambda g, most: tuple(x / max(1, norm(g) / most) for x in g)),
    ("9.3", clip_by_adam),
    ("9.5", opening),
    ("9.5", opening_by_arrays),
    ("9.3", clip_in_place),
    ("9.3", clip_by_entries),
    ("9.5", lambda *a: opening(*a) / 1),
]

WRONG = [
    ("9.4", lambda *a: trained(*a, weigh=False), "the weights lambda are missing"),
    ("9.4", lambda *a: trained(*a, mean=True), "not a mean"),
    ("9.4", lambda *a: trained(*a, clip="never"), "not clipped"),
    ("9.4", lambda *a: trained(*a, clip="each number"), "each number is clipped"),
    ("9.4", lambda *a: trained(*a, clip="each dataset"), "each dataset is clipped alone"),
    ("9.4", lambda *a: trained(*a, each=True), "an update for each dataset"),
    ("9.4", lambda *a: trained(*a, hats=False), "the hats are missing"),
    ("9.4", lambda *a: trained(*a, first=0), "counted from 1"),
    ("9.4", lambda *a: trained(*a, warmed=False), "the warm-up is missing"),
    ("9.4", lambda *a: trained(*a, l2=True), "the decay is no part of g"),
    ("9.4", lambda *a: trained(*a, decayed="never"), "the weight decay is missing"),
    ("9.4", lambda *a: trained(*a, decayed="bare"), "multiplied by the rate, too"),
    ("9.4", lambda *a: trained(*a, sign=-1), "uphill"),
    ("9.4", one_array_again_and_again, "every row is the last one"),
    ("9.4", loop_in_place, "changes its argument number 3 in place"),
    ("9.4", lambda *a: trained(*a)[1:], "wrong shape: [7, 5] is wanted, got [6, 5]"),
    ("9.4", lambda *a: trained(*a) + 1, "before any update"),
    ("9.1", lambda *a: targets(*a, leave=()), "no token is left out"),
    ("9.1", lambda *a: targets(*a, leave=("pad",)), "<image> counts here"),
    ("9.1", by_the_word, "<image> counts here"),
    ("9.1", lambda *a: targets(*a, leave=("image",)), "<pad> counts here"),
    ("9.1", lambda *a: targets(*a, by="here"), "one place too early"),
    ("9.1", lambda *a: targets(*a, shift=0), "not shifted"),
    ("9.1", lambda t, i, p: np.where((t == i) | (t == p), -100, t), "no token predicts the first"),
    ("9.1", lambda *a: targets(*a, mark=0), "0 is none of that"),
    ("9.1", lambda *a: targets(*a, mark=-1), "-1 is none of that"),
    ("9.1", lambda t, i, p: targets(t, 3, 0), "the ids are the arguments"),
    ("9.1", lambda t, i, p: np.isin(t[:, 1:], [i, p], invert=True), "as truths"),
    ("9.1", targets_in_place, "changes its argument number 1 in place"),
    ("9.2", lambda g, w: sum(x.mean(axis=0) for x in g.values()), "the weights are missing"),
    ("9.2", lambda g, w: mixture(g, w, np.sum), "a sum over the examples"),
    ("9.2", lambda g, w: np.concatenate(list(g.values())).mean(axis=0), "this MERGES"),
    ("9.2", lambda g, w: mixture(g, w) / len(g), "do not divide by M"),
    ("9.2", lambda g, w: mixture(g, w) / sum(w.values()), "the sum of the weights"),
    ("9.2", overwriting, "this overwrites it"),
    ("9.2", lambda g, w: [w[m] * g[m].mean(axis=0) for m in g], "not summed over the datasets"),
    ("9.2", lambda g, w: mixture(g, w, lambda x, axis: x.mean()), "wrong shape: [6] is wanted"),
    ("9.3", lambda g, most: [clip([x], most)[0] for x in g], "each gradient is clipped by itself"),
    ("9.3", lambda g, most: [np.clip(x, -most, most) for x in g], "clipped number by number"),
    ("9.3", lambda g, most: [x * most / norm(g) for x in g], "a small gradient is left as it is"),
    ("9.3", lambda *a: clip(*a, by=lambda g: norm(g) ** 2), "the square root is missing"),
    ("9.3", lambda *a: clip(*a, by=lambda g: sum(norm([x]) for x in g)), "no sum of norms"),
    ("9.3", lambda *a: clip(*a, by=lambda g: max(abs(x).max() for x in g)), "largest number"),
    ("9.3", lambda g, most: [x / max(1, norm(g)) for x in g], "`most` is missing"),
    ("9.3", lambda g, most: g, "nothing is clipped"),
    ("9.3", lambda g, most: clip(g, most)[:2], "a list of three gradients is wanted"),
    ("9.3", lambda g, most: [x.ravel() for x in clip(g, most)], "wrong shape of number 1"),
    ("9.5", lambda *a: opening(*a, of=np.tanh), "the sign is arbitrary"),
    ("9.5", lambda *a: opening(*a, of=abs), "this looks at alpha; the gate is tanh(alpha)"),
    ("9.5", lambda *a: opening(*a, name="alpha_dense"), "the gates of the feed-forward"),
    ("9.5", opening_by_argmax, "not the first step"),
    ("9.5", lambda *a: opening(*a, stay=False), "but it shuts again: when does it stay"),
    ("9.5", lambda *a: opening(*a, keep=first_wins), "yours takes the earlier one"),
    ("9.5", opening_in_the_log_as_it_is, "a lost part of the run counts here"),
    ("9.5", lambda *a: opening_by_arrays(*a, steps=np.arange(12)), "places in the log"),
    ("9.5", lambda *a: opening(*a, never=-1), "not open at the end, not -1"),
    ("9.5", last_shut, "at which it was SHUT"),
    ("9.5", zero_where_always_open, "from the first step on, not from 0"),
    ("9.5", open_at_the_end, "this is the LAST step of those"),
    ("9.5", lambda *a: opening(*a).max(), "not one for all"),
    (
        "9.1",
        lambda *a: targets(*a) / 1,
        "wrong dtype: int is wanted, got float64 (right but for that",
    ),
    (
        "9.2",
        lambda g, w: sum(x * y.mean(0) for x, y in zip(w.values(), g.values())),
        "not by place",
    ),
    ("9.3", clip_into_nothing, "is there a `return`?"),
    ("9.3", clip_a_name, "puts nothing into the list"),
    ("9.5", lambda *a: opening(*a, least=np.greater), "at LEAST the level"),
    ("9.5", lambda *a: [step or None for step in opening(*a)], "with a None in it"),
]
