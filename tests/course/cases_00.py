"""Right and wrong answers to the exercises of module 00, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_00 import prompt_of
from miniflamingo.evaluation import coverage
from miniflamingo.prompt import BOS, EOC, IMAGE
from miniflamingo.worlds.grammar import document, phrase

PHI = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def phi_by_a_loop(words):
    return [words[: i + 1].count("<image>") for i in range(len(words))]


def teach(names, this, eoc=True, query=(IMAGE, "this"), end=(), order=("image", "this", "name")):
    """An answer as students write it, with a place for each mistake."""
    tokens = [BOS]
    for name in names:
        tokens += [{"image": IMAGE, "this": this, "name": name}[part] for part in order]
        tokens += [EOC] * eoc
    return np.array([*tokens, *(this if t == "this" else t for t in query), *end])


def teach_by_the_library(names, this):
    whole = document(phrase("<image>", np.array([this] * len(names), int), names, "<EOC>")[None])
    return np.append(whole[0], [IMAGE, this])


RIGHT = [
    ("0.1", lambda q: np.array([BOS, IMAGE, *q])),
    ("0.1", lambda q: np.concatenate([[1, 3], q])),
    ("0.2", lambda words: PHI),
    ("0.2", phi_by_a_loop),
    ("0.3", teach),
    ("0.3", prompt_of),
    ("0.3", teach_by_the_library),
    ("0.4", coverage),
    ("0.4", lambda w, k: [1 - np.prod(np.full(n, 1 - 1 / w)) for n in k]),
]

WRONG = [
    ("0.1", lambda q: [BOS, IMAGE, *q, EOC], "the prompt must stay open"),
    ("0.1", lambda q: [BOS, *q, IMAGE], "<image> comes too late"),
    ("0.1", lambda q: [IMAGE, *q], "<BOS> is missing"),
    ("0.1", lambda q: [BOS, *q], "<image> is missing"),
    ("0.1", lambda q: [IMAGE, BOS, *q], "<BOS> opens the prompt"),
    ("0.1", lambda q: [BOS, IMAGE, EOC, *q], "no <EOC> between an image and its text"),
    ("0.1", lambda q: [BOS, IMAGE, *q, 20], "wrong shape: [5] is wanted, got [6]"),
    ("0.2", lambda w: [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2], "off by one at <image>"),
    ("0.2", lambda w: [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], "belongs to the chunk that it closes"),
    ("0.2", lambda w: [n - 1 for n in PHI], "counted from 1"),
    ("0.2", lambda w: [max(n, 1) for n in PHI], "text before any image looks at nothing"),
    ("0.2", lambda w: [int(x == "<image>") for x in w], "marks the <image> tokens alone"),
    ("0.2", lambda w: [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0], "this is the NEXT image"),
    ("0.2", lambda w: [n + 1 for n in PHI], "this counts the chunks"),
    ("0.2", lambda w: [2] * 12, "not all at the last of the page"),
    ("0.2", lambda w: PHI[:-1], "wrong shape: [12] is wanted, got [11]"),
    ("0.3", lambda *a: teach(*a, end=[EOC]), "the last chunk must stay open"),
    ("0.3", lambda *a: teach(*a, eoc=False), "<EOC> is missing between the chunks"),
    ("0.3", lambda *a: teach(*a, query=()), "the query is missing"),
    ("0.3", lambda *a: teach(*a, query=(IMAGE,)), "the query has no `this`"),
    ("0.3", lambda *a: teach(*a, query=("this",)), "the query's own <image> is missing"),
    ("0.3", lambda *a: teach(*a)[1:], "<BOS> is missing"),
    ("0.3", lambda *a: teach(*a, order=("image", "name", "this")), "`this` comes before the name"),
    ("0.3", lambda n, t: teach(n, 7), "the argument, not always 7"),
    ("0.3", lambda n, t: [*teach(n, t), *n[-1:]], "gives the query's name away"),
    ("0.4", lambda w, k: ((w - 1) / w) ** k, "NOT shown"),
    ("0.4", lambda w, k: 1 - k * (w - 1) / w, "a power, not a product"),
    ("0.4", lambda w, k: k / w, "not k / w"),
    ("0.4", lambda w, k: np.minimum(1, k / w), "not k / w"),
    ("0.4", lambda w, k: 1 - (1 / w) ** k, "MISSES with probability"),
    ("0.4", lambda w, k: 1.0 - ((w - 1) // w) ** k, "rounded down"),
    ("0.4", lambda w, k: coverage(w, k)[-1], "the last number of shots only"),
    ("0.4", lambda w, k: coverage(w, k + 1), "one shot too many"),
]
