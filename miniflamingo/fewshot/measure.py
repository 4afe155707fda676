"""Asks a bridged model to name glyphs of scripts never seen, from a few shots.

    5-way, one shot of each class; 3-way and 5-way with random shots

Every document has fresh pictures, none of them twice. Beside the accuracy stand, for the same
documents: its ceiling (the asked class was among the shots), chance, the BLIND baseline (the name
of a random shot, without looking: "given that the class was shown" it is 1.00 at one shot), and
what the nearest class mean reaches on the eye's mean features and on the bridge's visual tokens.

Letters: B episodes, k shots, w classes, N pictures, R visual tokens.
"""

from typing import NamedTuple

import numpy as np

from miniflamingo.evaluation import VALIDATION_SEED, figure
from miniflamingo.prompt import IMAGE
from miniflamingo.vision import l2_normalise
from miniflamingo.worlds import glyphs
from miniflamingo.worlds.glyph_documents import GlyphPool, binding_documents, draw_index
from miniflamingo.xattn import compute_phi

PER_CLASS = 40  # pictures of a class: of 32 shots of 3 classes one may have so many
SEEN = 171  # training classes that are asked for comparison


class Task(NamedTuple):
    """`ways` classes, asked after so many shots; each: the first shots are one of each class."""

    ways: int
    shots: tuple
    each: bool = False


TASKS = {
    "5-way, one of each": Task(5, (5,), True),
    "3-way": Task(3, (1, 2, 4, 8)),
    "5-way": Task(5, (1, 2, 4, 8, 16, 32)),
}
AIMS = (("5-way, one of each", "5"), ("3-way", "8"), ("5-way", "32"))  # what is quoted first


class Measure:
    """Asks one model about the classes of one split, `samples` episodes a figure.

    look: visual tokens of features, [B, 1, 1, S, D_v] -> [B, 1, R, D_m]; answer: tokens int[B, L],
    media [B, N, R, D_m], phi int[B, L] -> the most likely word behind every third of four tokens,
    int[B, N]. Both are the model's own by default.
    """

    def __init__(self, model, split="validation", samples=2000, seed=VALIDATION_SEED):
        self.model, self.split, self.samples, self.seed = model, split, samples, seed
        self.look, self.answer = model.resampler, self._answer

    def groups(self):
        """{name: int[C]}: letters, symbols, and scripts of the split; training's own "seen"."""
        if self.split == "train":
            return {"seen": glyphs.classes("train", min(SEEN, len(glyphs.classes())))}
        return glyphs.by_script(self.split)

    def _answer(self, tokens, media, phi):
        rows = range(0, len(tokens), 50)
        asked = (self.model.read(*(x[i : i + 50] for x in (tokens, media, phi))) for i in rows)
        return np.concatenate([logits[:, 2::4].argmax(axis=-1) for logits in asked])

    def group(self, classes):
        """{task: {shots: figures}} of some classes, int[C]."""
        pool = GlyphPool.draw(self.model.vision_encoder, [self.seed, 5], classes, PER_CLASS)
        parts = range(0, len(pool.glyphs), 256)
        media = np.concatenate([self.look(pool.glyphs[i : i + 256, None]) for i in parts])[:, 0]
        eye = l2_normalise(pool.glyphs.mean(axis=(1, 2)))
        flat = media.reshape(len(media), -1)
        seen = {"eye": eye, "tokens": l2_normalise(flat - flat.mean(axis=0))}
        return {name: self.ask(task, pool, media, seen) for name, task in TASKS.items()}

    def ask(self, task, pool, media, seen):
        """{shots: figures} of a task.

        A causal model answers after k shots whatever follows, so one document of max(shots) + 1
        pictures has the answers for every k.
        """
        rng = np.random.default_rng([self.seed, 6, task.ways, task.each])
        index = draw_index(self.samples, task.ways, max(task.shots), rng, task.each)
        documents, names = binding_documents(pool, index, rng)
        tokens, pictures = documents.tokens[:, :-1], documents.pictures
        answers = self.answer(tokens, media[pictures], compute_phi(tokens, IMAGE))
        result = {}
        for k in task.shots:
            result[str(k)] = beside(index[:, : k + 1], names[:, : k + 1], answers[:, k], rng)
            result[str(k)]["chance"] = 1 / task.ways
            for what, vectors in seen.items():
                right = nearest_mean(vectors[pictures[:, : k + 1]], index[:, : k + 1])
                result[str(k)][f"nearest_{what}"] = float(right.mean())
        return result

    def run(self, progress=lambda x: x, only=None):
        """{group: {task: {shots: figures}}}; only: names of groups, None: of all."""
        groups = {name: ids for name, ids in self.groups().items() if not only or name in only}
        return {name: self.group(ids) for name, ids in progress(groups.items())}


def beside(index, names, answers, rng):
    """The figures of answers int[B] to the last of the pictures index, names int[B, k + 1]."""
    right, shown = answers == names[:, -1], (index[:, :-1] == index[:, -1:]).any(axis=1)
    guess = names[np.arange(len(names)), rng.integers(0, names.shape[1] - 1, len(names))]
    return figure(right) | {
        "given_shown": figure(right[shown])["accuracy"],
        "ceiling": float(shown.mean()),
        "blind": float((guess == names[:, -1]).mean()),
        "one_of_the_names": float((answers[:, None] == names[:, :-1]).any(axis=1).mean()),
    }


def nearest_mean(vectors, index):  # [B, k + 1, D], int[B, k + 1] -> bool[B]
    """Is the class whose shots' mean is most like the query, by cosine, the query's?"""
    ways = index.max() + 1
    own = index[:, :-1, None] == np.arange(ways)  # [B, k, w]
    means = l2_normalise(np.einsum("bkd,bkw->bwd", vectors[:, :-1], own.astype(vectors.dtype)))
    alike = np.einsum("bwd,bd->bw", means, vectors[:, -1])
    return np.where(own.any(axis=1), alike, -np.inf).argmax(axis=1) == index[:, -1]
