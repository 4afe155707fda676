"""Few-shot evaluation: what a model that was trained on five pictures does with up to 32.

Everything is asked of pictures and episodes that no training has seen: other seeds, other images
of digits. The asked picture never stands among its own shots, nor does its handwritten digit in
another size and place: a pool is `distinct`. A figure is an accuracy over `samples` episodes with
its Wilson interval (95 %). Shots often fail to show the class that is asked for, so each curve
comes with its ceiling, and with the accuracy given that the class was shown.

Letters: B episodes, k shots, w ways (classes), L tokens, N pictures, R visual tokens, V words.
"""

import copy
from typing import NamedTuple

import numpy as np

from miniflamingo.decoding import beam_search, generate, log_likelihood
from miniflamingo.functional import log_softmax
from miniflamingo.prompt import EOC, IMAGE, Batch
from miniflamingo.worlds import datasets, grammar
from miniflamingo.worlds.datasets import SEEN, Pool
from miniflamingo.worlds.grammar import (
    COLOUR_IDS,
    DIGIT,
    DIRECTION_IDS,
    GEOMETRIC,
    HELD_OUT_DIGITS,
    HELD_OUT_SHAPES,
    KINDS,
    SHAPE_IDS,
    SIZE_IDS,
)
from miniflamingo.xattn import compute_phi

SHOTS = (0, 1, 2, 4, 8, 16, 32)
# training seeds are small; settings are chosen with the first of these, figures come from the other
VALIDATION_SEED, TEST_SEED = 1_000_000, 2_000_000


class Task(NamedTuple):
    """A binding task: `ways` classes of the table `allowed`, told apart by `mode`."""

    ways: int
    allowed: np.ndarray
    mode: str


TASKS = {
    "binding_8way": Task(8, GEOMETRIC & SEEN, "pair"),
    "binding_8way_held_out": Task(8, HELD_OUT_SHAPES, "pair"),
    "binding_4way": Task(4, GEOMETRIC & SEEN, "pair"),
    "colour_6way": Task(6, GEOMETRIC & SEEN, "colour"),
    "shape_4way": Task(4, GEOMETRIC & SEEN, "shape"),
    "digits_5way": Task(5, DIGIT & SEEN, "shape"),
    "digits_3way": Task(3, DIGIT & SEEN, "shape"),
    "digits_3way_unseen": Task(3, HELD_OUT_DIGITS, "shape"),
}

OTHERS = ("captions", "questions", "motion", "rices", "ensemble", "text_only")

# --- figures --------------------------------------------------------------------------------------


def wilson(hits, n, z=1.96):
    """The Wilson interval of a proportion, (low, high): 95 % by default; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, scale = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def coverage(ways, shots):
    """How often k random shots of w classes show the class that is asked: 1 - ((w - 1) / w)^k."""
    return 1 - ((ways - 1) / ways) ** shots


def figure(correct):  # bool[n] -> {"accuracy", "interval", "n"}
    """An accuracy with its interval."""
    n = int(np.size(correct))
    accuracy = float(np.mean(correct)) if n else None
    return {"accuracy": accuracy, "interval": wilson(int(np.sum(correct)), n), "n": n}


# --- the examination ------------------------------------------------------------------------------


class Evaluation:
    """One model, one pool of fresh pictures, and the visual tokens of each of them.

    A picture's visual tokens do not depend on its neighbours, so they are computed once.
    """

    def __init__(self, model, samples=1000, seed=TEST_SEED, per_class=40, progress=lambda x: x):
        split = "validation" if seed == VALIDATION_SEED else "test"
        self.model, self.samples, self.seed = model, samples, seed
        sizes = dict(per_class=per_class, pairs=4 * samples, clips=samples)
        encoder = model.vision_encoder
        self.pool = Pool.draw(encoder, [seed, 0], split, **sizes, progress=progress)
        self.media = {
            source: np.concatenate([
                model.resampler(features[i : i + 256, None])[:, 0]
                for i in range(0, len(features), 256)
            ])
            for source in ("images", "videos")
            for features in [getattr(self.pool, source)]
        }  # fmt: skip
        # the same model, reading visual tokens where it would read pixels
        self.reader = copy.copy(model)
        self.reader.encode = lambda media, num_frames=None: media
        self.reader.resampler = lambda media, num_frames=None: media

    def rng(self, *key):
        """A generator of its own for each figure, so that no figure moves another one."""
        return np.random.default_rng(
            [self.seed, 1, *(int.from_bytes(k.encode(), "big") for k in key)]
        )

    def logits(self, tokens, media):
        """[B, L], [B, N, R, D_m] -> [B, L, V], some rows at a time."""
        phi = compute_phi(tokens, IMAGE)
        rows = range(0, len(tokens), 64)
        parts = [self.model.read(*(a[i : i + 64] for a in (tokens, media, phi))) for i in rows]
        return np.concatenate(parts)

    def prompt(self, tokens, media):
        """Unpadded tokens int[B, L] and media [B, N, R, D_m] as a Batch for the decoder."""
        B, L = tokens.shape
        images = np.full(B, media.shape[1])
        phi = compute_phi(tokens, IMAGE)
        return Batch(tokens, np.full(B, L), phi, media, images, np.ones(media.shape[:2], int))

    # --- few-shot binding ---

    def binding(self, name, shots=SHOTS):
        """The curve of a task over the number of shots, {str(k): figure}.

        A causal model answers after k shots whatever follows, so one sequence of max(shots) + 1
        pictures has the answers for every k. The answer is the most likely of all words.
        """
        task, rng = TASKS[name], self.rng(name)
        documents, episode = datasets.binding_documents(
            self.pool, self.samples, max(shots) + 1, task.ways, rng, task.allowed, task.mode
        )
        media = self.media["images"][documents.pictures]
        answers = self.logits(documents.tokens, media)[:, 2::4].argmax(axis=-1)
        correct, curve = answers == episode.name, {}
        for k in shots:
            shown = (episode.index[:, :k] == episode.index[:, k : k + 1]).any(axis=1)
            given = figure(correct[shown, k])["accuracy"]
            extra = {"given_shown": given, "ceiling": coverage(task.ways, k)}
            curve[str(k)] = figure(correct[:, k]) | extra
        return curve

    # --- captions, questions, motion: no shots ---

    def _asked(self, documents, words):
        """Cut one-picture documents behind `words` words of the chunk: Batch, and what follows."""
        tokens = documents.tokens
        media = self.media[documents.source][documents.pictures]
        return self.prompt(tokens[:, : 2 + words], media), tokens[:, 2 + words :]

    def _written(self, documents, words, width=1):
        """Does the model, open-ended, write exactly what follows? bool[B, rest], word by word."""
        batch, rest = self._asked(documents, words)
        if width > 1:
            answers = [a for a, _ in beam_search(self.reader, batch, rest.shape[1], width)]
        else:
            answers = generate(self.reader, batch, rest.shape[1])
        padded = [[*a, *[EOC] * rest.shape[1]][: rest.shape[1]] for a in answers]
        return np.array(padded) == rest

    def captions(self):
        """Whole captions exactly right, with beam search of width 3, as in the paper."""
        result, cases = {}, {"seen": SEEN & GEOMETRIC, "held_out": HELD_OUT_SHAPES}
        cases |= {"digits": SEEN & DIGIT, "unseen_digits": HELD_OUT_DIGITS}
        for name, allowed in cases.items():
            rng = self.rng("captions", name)
            asked = datasets.caption_documents(self.pool, self.samples, 1, rng, allowed)
            right = self._written(asked, 0, width=3)
            words = {word: float(right[:, i].mean()) for i, word in
                     enumerate(("article", "size", "colour", "shape"))}  # fmt: skip
            result[name] = figure(right.all(axis=1)) | {"words": words}
        for name, held_out in (("two_objects", False), ("two_objects_held_out", True)):
            rng = self.rng("captions", name)
            asked = datasets.pair_caption_documents(self.pool, self.samples, 1, rng, held_out)
            result[name] = figure(self._written(asked, 0, width=3).all(axis=1))
        return result

    def questions(self):
        """Open-ended answers, exactly right; "_ranked": the likeliest of all possible answers."""
        result, candidates = {}, (COLOUR_IDS, SHAPE_IDS, SIZE_IDS)
        for i, kind in enumerate(KINDS):
            for name, allowed in (("", SEEN & GEOMETRIC), ("_held_out", HELD_OUT_SHAPES)):
                rng = self.rng("questions", kind + name)
                asked = datasets.question_documents(self.pool, self.samples, 1, rng, allowed, i)
                result[kind + name] = figure(self._written(asked, 3).all(axis=1))
                result[kind + name + "_ranked"] = figure(self._ranked(asked, 3, candidates[i]))
        for name, held_out in (("two_objects", False), ("two_objects_held_out", True)):
            rng = self.rng("questions", name)
            asked = datasets.pair_question_documents(self.pool, self.samples, 1, rng, held_out)
            result[name] = figure(self._written(asked, 5).all(axis=1))
            result[name + "_ranked"] = figure(self._ranked(asked, 5, COLOUR_IDS))
        return result

    def _ranked(self, documents, words, candidates):
        """Is the true answer the likeliest of the candidates? bool[B]."""
        batch, rest = self._asked(documents, words)
        scores = log_likelihood(self.reader, batch, [[c, EOC] for c in candidates])
        return candidates[scores.argmax(axis=1)] == rest[:, 0]

    def motion(self):
        """The direction in which the object of a clip moves, open-ended and ranked."""
        asked = datasets.clip_documents(self.pool, self.samples, 1, self.rng("motion"))
        ranked = figure(self._ranked(asked, 1, DIRECTION_IDS))
        return {
            "direction": figure(self._written(asked, 1).all(axis=1)),
            "direction_ranked": ranked,
        }

    # --- choosing and ordering the shots ---

    def rices(self, shots=4, support=160, name="binding_8way"):
        """RICES (paper, appendix A.2): the k support pictures that are most like the query.

        Each episode has `support` named pictures; likeness is the cosine of the frozen encoder's
        mean features; the most similar comes LAST. Beside it, k random pictures of the support.
        The pool is finite, so the query itself may be drawn, or one picture twice: the query is
        never chosen, and no picture twice. ValueError when fewer than k are left.
        """
        task, rng = TASKS[name], self.rng("rices", name)
        episode = grammar.draw_episode(
            self.samples, support + 1, task.ways, rng, task.allowed, task.mode
        )
        each = self.pool.pick(episode.colour[..., None], episode.shape[..., None], rng)
        pictures = each[..., 0]  # drawn one by one, so that a class may have more than the pool
        mean = self.pool.images[:, 0].mean(axis=1)
        mean = mean - mean.mean(axis=0)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        query, others = mean[pictures[:, -1]], mean[pictures[:, :-1]]
        likeness = np.einsum("bd,bnd->bn", query, others)
        again = datasets.repeated(pictures)[:, :-1]
        if (left := support - again.sum(axis=1).max()) < shots:
            raise ValueError(f"{shots} shots: only {left} different pictures in a support")
        alike = np.argsort(np.where(again, -np.inf, likeness), axis=1)[:, -shots:]
        at_random = np.argsort(again, axis=1, kind="stable")[:, :shots]
        chosen = {"rices": alike, "random": at_random}
        return {how: figure(self._choose(pictures, episode.name, rows).argmax(axis=1)
                            == episode.name[:, -1]) for how, rows in chosen.items()}  # fmt: skip

    def _choose(self, pictures, names, rows):
        """The word scores [B, V] for the last picture after the shots rows int[B, k]."""
        order = np.concatenate([rows, np.full((len(rows), 1), pictures.shape[1] - 1)], axis=1)
        pictures, names = (np.take_along_axis(a, order, axis=1) for a in (pictures, names))
        tokens = grammar.document(grammar.phrase("<image> this", names, "<EOC>"))[:, :-2]
        return log_softmax(self.logits(tokens, self.media["images"][pictures])[:, -1])

    def ensemble(self, shots=8, orders=6, name="binding_4way"):
        """Prompt ensembling (paper, appendix): mean log-likelihood over 6 orders of the shots."""
        task, rng = TASKS[name], self.rng("ensemble", name)
        drawn = grammar.draw_episode(
            self.samples, shots + 1, task.ways, rng, task.allowed, task.mode
        )
        pictures = self.pool.pick(drawn.colour, drawn.shape, rng)
        ordered = [np.argsort(rng.random((self.samples, shots)), axis=1) for _ in range(orders)]
        scores = np.stack([self._choose(pictures, drawn.name, rows) for rows in ordered])
        truth = drawn.name[:, -1]
        return {
            "one_order": figure(scores[0].argmax(axis=1) == truth),
            f"{orders}_orders": figure(scores.mean(axis=0).argmax(axis=1) == truth),
        }

    # --- what is left of the language model ---

    def text_only(self):
        """Binding in text alone: the frozen LM, and the same LM inside the bridged model."""
        result = {}
        for name, ways, k in (("binding_4way_8", 4, 8), ("binding_8way_32", 8, 32)):
            episode = grammar.draw_episode(
                self.samples, k + 1, ways, self.rng("text", name), GEOMETRIC, "pair"
            )
            tokens = grammar.binding(episode)[:, :-2]
            nothing = np.zeros((len(tokens), 1, *self.media["images"].shape[1:]), np.float32)
            alone = self.model.lm(tokens)[:, -1].argmax(axis=-1) == episode.name[:, -1]
            inside = self.logits(tokens, nothing)[:, -1].argmax(axis=-1) == episode.name[:, -1]
            kept = float(inside.mean() / max(alone.mean(), 1e-9))
            result[name] = {"lm": figure(alone), "inside": figure(inside), "kept": kept}
        return result

    def run(self, shots=SHOTS, progress=lambda x: x):
        """All figures: a dict that JSON takes.

        "few_shot" has plain accuracies, {task: {str(k): float}}; "few_shot_details" the figures.
        """
        metrics = {"samples": self.samples, "seed": self.seed, "alpha": self.model.alphas()}
        details = {}
        for name in progress([*TASKS, *OTHERS]):
            if name in TASKS:
                details[name] = self.binding(name, shots)
            else:
                metrics[name] = getattr(self, name)()
        plain = {n: {k: v["accuracy"] for k, v in curve.items()} for n, curve in details.items()}
        return metrics | {"few_shot": plain, "few_shot_details": details}


def table(metrics):
    """The metrics as text: a table of the curves, then a line for each other figure."""
    shots = list(next(iter(metrics["few_shot"].values())))
    yield f"{'shots':<24}" + "".join(f"{k:>7}" for k in shots)
    for name, curve in metrics["few_shot_details"].items():
        for row in ("accuracy", "given_shown", "ceiling"):
            values = (curve[k][row] for k in shots)
            label = name if row == "accuracy" else "  " + row.replace("_", " ")
            yield f"{label:<24}" + "".join(f"{'-' if v is None else f'{v:.3f}':>7}" for v in values)
    for part in OTHERS:
        for name, values in metrics[part].items():
            if part == "text_only":
                line = (f"{values['lm']['accuracy']:.3f} alone, {values['inside']['accuracy']:.3f} "
                        f"inside the bridged model ({values['kept']:.0%})")  # fmt: skip
            else:
                low, high = values["interval"]
                line = f"{values['accuracy']:.3f}  ({low:.3f} to {high:.3f})"
            yield f"{part + ': ' + name.replace('_', ' '):<36} {line}"


def probe(encoder, seed=TEST_SEED, per_class=20):
    """How well a linear map reads colour, shape and size off the encoder's mean features.

    encoder maps [B, 24, 24, 3] to features [B, S, D_v]. The map is fitted by least squares to
    pictures of the training split, and asked about fresh ones -> {kind: figure}.
    """
    features, labels = {}, {}
    for key, split in enumerate(("train", "test")):
        pool = Pool.draw(encoder, [seed, 2 + key], split, per_class, pairs=1, clips=1)
        labels[split], n = pool.objects, len(pool.objects[0])
        mean = pool.images[:n, 0].mean(axis=1)
        features[split] = np.concatenate([mean, np.ones((n, 1))], axis=1)
    result = {}
    for kind, truth, asked in zip(KINDS, labels["train"], labels["test"]):
        one_hot = np.eye(truth.max() + 1)[truth]
        weights = np.linalg.lstsq(features["train"], one_hot, rcond=None)[0]
        result[kind] = figure((features["test"] @ weights).argmax(axis=1) == asked)
    return result
