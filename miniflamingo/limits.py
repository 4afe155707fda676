"""Where the small Flamingo is wrong, and how sure it is then: the limits that the paper names,
measured (section 6), against the number of shots and with the remedies that cost no training.

    python -m miniflamingo limits --json limits.json

A share comes with its Wilson interval over `samples` questions. No training has seen the pictures,
and none stands twice in a prompt. Letters: B questions, k shots, C candidates, n = k + 1.
"""

import json
from pathlib import Path

import numpy as np

from miniflamingo import outputs
from miniflamingo.evaluation import Evaluation, figure
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.worlds import grammar, shapes
from miniflamingo.worlds.datasets import SEEN, encode_pictures
from miniflamingo.worlds.grammar import COLOUR_IDS, GEOMETRIC, NAME_IDS, SHAPE_IDS, SIZE_IDS

COMMAND = "python -m miniflamingo limits"
RESULTS = Path(__file__).with_name("results") / "limits.json"
SHOTS = (0, 1, 2, 4, 8)
PROBES = (2, 4, 8, 16)  # shots of yes and no
CLASSES = SEEN & GEOMETRIC
NOTHING = NAME_IDS[0]  # an invented name: "there is none", where the shots use it so


class Limits(Evaluation):
    """Asks one model; every method gives {what: figure}, a dict that JSON takes."""

    def ask(self, chunks, pictures, candidates, source="images"):
        """log p [B, C] of candidates int[C] as the next word behind chunks int[B, n, words], one
        for each of pictures int[B, n]; the last chunk ends where the answer would stand."""
        tokens = np.concatenate([np.full((len(pictures), 1), grammar.BOS), *chunks], axis=1)
        logits = self.logits(tokens, self.media[source][pictures])[:, -1]
        return log_softmax(logits)[:, candidates]

    # --- an answer that is likely from the text, and wrong for the picture ---

    def prior(self, shots=SHOTS):
        """k captioned pictures of one colour and shape, then that shape in another colour: does the
        answer follow the shots ("prior") or the picture ("right")? control: shots of any colour."""
        result = {}
        for k in shots:
            rng, B = self.rng("prior"), self.samples
            colour, shape, _ = grammar.draw_attributes((B,), CLASSES, rng)
            shown = np.tile(colour[:, None], k)
            any_colour = self._colours_of(np.tile(shape[:, None], k), rng)
            asked = self._other_colour(colour, shape, rng)
            for name, colours in (("shots agree", shown), ("control", any_colour)):
                every = np.column_stack([colours, asked])
                pictures = self.pool.pick(every, np.tile(shape[:, None], k + 1), rng)
                logp = self.ask(self._captions(every, shape, pictures), pictures, COLOUR_IDS)
                said = logp.argmax(axis=1)
                right, before = figure(said == asked), figure(said == colour)
                result.setdefault(name, {})[str(k)] = {"right": right, "prior": before}
        return result

    def _colours_of(self, shape, rng):
        """A random seen colour of each shape."""
        weights = np.where(CLASSES.T[shape], rng.random((*shape.shape, len(CLASSES))), -1)
        return weights.argmax(axis=-1)

    def _other_colour(self, colour, shape, rng):
        """A random seen colour of each shape, not the given one, int[B]."""
        weights = np.where(CLASSES.T[shape], rng.random((len(shape), len(CLASSES))), -1)
        weights[np.arange(len(shape)), colour] = -1
        return weights.argmax(axis=1)

    def _captions(self, colour, shape, pictures):
        """Chunks "<image> a small red circle <EOC>", the last one cut behind its size."""
        size = self.pool.objects[2][pictures]
        words = grammar.phrase("<image> a", SIZE_IDS[size], COLOUR_IDS[colour],
                               SHAPE_IDS[shape][:, None], "<EOC>")  # fmt: skip
        return [*np.moveaxis(words[:, :-1], 1, 0), words[:, -1, :3]]

    # --- a question that does not fit the picture ---

    def absent(self, shots=SHOTS):
        """The colour of a shape that is not among the two of the picture, behind k answered
        questions that fit: the colour of one that is there, another ("ungrounded"), and how sure.

        remedy: half of the shots ask for what is not there and are answered with an invented name;
        "declined" is the share of that name where it is right, "wrongly" where it is not.
        """
        result = {"plain": {}, "remedy": {}}
        for k in shots:
            plain = self._absent(k, self.rng("absent", str(k)), remedy=False)
            result["plain"][str(k)] = plain
            if k > 1:
                result["remedy"][str(k)] = self._absent(k, self.rng("remedy", str(k)), remedy=True)
        return result

    def _absent(self, k, rng, remedy):
        B, n = self.samples, k + 1
        chosen = self.pool.pick_pairs((B, n), rng)
        colour, shape, _ = (label[chosen] for label in self.pool.pairs)  # [B, n, 2]
        which = rng.integers(0, 2, (B, n))
        fits = np.ones((B, n), bool)
        if remedy:
            fits[:, :k] = rng.permuted(np.tile(np.arange(k) % 2 == 0, (B, 1)), axis=1)
        pictures, found = len(self.pool.objects[0]) + chosen, {}
        for name, fit in (("fits", True), ("absent", False)):
            fits[:, -1] = fit
            about = self._asked_shape(shape, which, fits, rng)
            own = np.take_along_axis(colour, which[..., None], -1)[..., 0]
            answer = np.where(fits, COLOUR_IDS[own], NOTHING)
            words = grammar.phrase("<image> what color is", SHAPE_IDS[about], "?", answer, "<EOC>")
            chunks = [*np.moveaxis(words[:, :-1], 1, 0), words[:, -1, :6]]
            candidates = np.append(COLOUR_IDS, NOTHING)
            logp = self.ask(chunks, pictures, candidates)
            said = logp.argmax(axis=1)
            there = (said[:, None] == colour[:, -1]).any(axis=1)
            found[name] = {
                "right": figure(said == own[:, -1]), "of what is there": figure(there),
                "ungrounded": figure(~there & (said < len(COLOUR_IDS))),
                "declined": figure(said == len(COLOUR_IDS)),
                "sure": figure(np.exp(logp.max(axis=1)) > 0.9),
            }  # fmt: skip
        return found

    def _asked_shape(self, shape, which, fits, rng):
        """The shape that a question names: one of the picture's two, or another, int[B, n]."""
        own = np.take_along_axis(shape, which[..., None], -1)[..., 0]
        there = (np.arange(shapes.NUM_GEOMETRIC) == shape[..., None]).any(axis=-2)
        other = np.where(there, -1, rng.random(there.shape)).argmax(axis=-1)
        return np.where(fits, own, other)

    def probing(self, shots=PROBES):
        """Is this shape in the picture? Asked as POPE does (Li et al., 2023), half of the time of a
        shape that is not there. What answers yes and what no, two invented names, only the k shots
        say, half of which are either: {k: {"right", "yes"}}, the latter how often it answers yes.
        """
        result, B = {}, self.samples
        for k in shots:
            rng, n = self.rng("probing", str(k)), k + 1
            chosen = self.pool.pick_pairs((B, n), rng)
            fits = rng.permuted(np.tile(np.arange(k) % 2 == 0, (B, 1)), axis=1)
            fits = np.column_stack([fits, rng.random(B) < 0.5])
            which = rng.integers(0, 2, (B, n))
            about = self._asked_shape(self.pool.pairs[1][chosen], which, fits, rng)
            names = NAME_IDS[np.argsort(rng.random((B, len(NAME_IDS))), axis=1)[:, :2]]  # no, yes
            answer = np.take_along_axis(names, fits.astype(int), 1)
            words = grammar.phrase("<image>", SHAPE_IDS[about], answer, "<EOC>")
            chunks = [*np.moveaxis(words[:, :-1], 1, 0), words[:, -1, :2]]
            everything = np.arange(len(grammar.TOKENIZER))
            logp = self.ask(chunks, len(self.pool.objects[0]) + chosen, everything)
            yes = np.take_along_axis(logp, names, 1).argmax(axis=1).astype(bool)
            result[str(k)] = {"right": figure(yes == fits[:, -1]), "yes": figure(yes)}
        return result

    # --- nothing to see ---

    def nothing(self):
        """Pictures of noise alone, captioned and asked for a colour: how sure is the answer, beside
        that about an object?"""
        rng, B = self.rng("nothing"), self.samples
        noise = np.clip(shapes.background(B, rng), 0, 1).astype(np.float32)
        seen = encode_pictures(self.model.vision_encoder, noise)
        media = np.concatenate([self.model.resampler(seen[i : i + 256, None])[:, 0]
                                for i in range(0, B, 256)])  # fmt: skip
        colour, shape, _ = grammar.draw_attributes((B, 1), CLASSES, rng)
        objects = self.media["images"][self.pool.pick(colour, shape, rng)]
        words = grammar.phrase("<BOS> <image> what color ?", np.zeros(B, int))[:, :-1]
        result = {}
        for name, shown in (("object", objects), ("noise", media[:, None])):
            top = softmax(self.logits(words, shown)[:, -1]).max(axis=1)
            result[name] = {f"sure above {level}": figure(top > level) for level in (0.5, 0.9)}
        return result

    # --- how sure, and how often right ---

    def calibration(self, bins=10):
        """Ranked answers by their probability among the candidates: {task: {"bins", "error"}}.

        A bin has the mean probability, the share that is right, and n; error is the expected
        calibration error: the mean distance of the two, weighted by n.
        """
        rng, B = self.rng("calibration"), self.samples
        chosen = self.pool.pick_pairs((B, 1), rng)
        colour, shape, _ = (label[chosen] for label in self.pool.pairs)
        which = rng.integers(0, 2, (B, 1))
        about = np.take_along_axis(shape, which[..., None], -1)[..., 0]
        own = np.take_along_axis(colour, which[..., None], -1)[:, 0, 0]
        words = grammar.phrase("<image> what color is", SHAPE_IDS[about], "?")
        pictures = len(self.pool.objects[0]) + chosen
        result = {"one of two": _calibrated(self.ask([words[:, 0]], pictures, COLOUR_IDS), own,
                                            bins)}  # fmt: skip
        for k in (1, 4, 8):
            index = rng.integers(0, 4, (B, k + 1))
            logp = self._binding(rng, index)
            result[f"4-way, {k} shots"] = _calibrated(logp, index[:, -1], bins)
        return result

    # --- order, recency, wrong labels ---

    def _binding(self, rng, index, called=None):
        """Binding of 4 classes: shots of the classes index int[B, n], under the names of `called`
        (their own by default), the last of which is asked for -> log p [B, 4]."""
        B, classes = len(index), np.argwhere(CLASSES)
        classes = classes[np.argsort(rng.random((B, len(classes))), axis=1)[:, :4]]  # [B, 4, 2]
        colour, shape = np.moveaxis(np.take_along_axis(classes, index[..., None], 1), -1, 0)
        names = NAME_IDS[np.argsort(rng.random((B, len(NAME_IDS))), axis=1)[:, :4]]
        own = np.take_along_axis(names, index if called is None else called, 1)
        words = grammar.phrase("<image> this", own, "<EOC>")
        chunks = [*np.moveaxis(words[:, :-1], 1, 0), words[:, -1, :2]]
        everything = np.arange(len(grammar.TOKENIZER))
        logp = self.ask(chunks, self.pool.pick(colour, shape, rng), everything)
        return np.take_along_axis(logp, names, 1)

    def order(self, k=8):
        """One shot of the asked class at place p of k: {p: {"right", "last of wrong"}}, the latter
        how many of the wrong answers are the last shot's name; "expected": of a random wrong shot.
        """
        result = {}
        for place in range(k):
            rng = self.rng("order", str(place))
            index = rng.integers(1, 4, (self.samples, k + 1))
            index[:, place] = index[:, -1] = 0
            said = self._binding(rng, index).argmax(axis=1)
            wrong, last = said != 0, index[:, k - 1]
            telling = wrong & (last != 0)
            others, same = index[:, :k] != 0, index[:, :k] == last[:, None]
            expected = (others & same).sum(axis=1) / others.sum(axis=1)
            result[str(place + 1)] = {
                "right": figure(~wrong),
                "last of wrong": figure((said == last)[telling]),
                "expected": float(expected[telling].mean()) if telling.any() else None,
            }
        return result

    def wrong_labels(self, k=8):
        """k shots, m of which have another class's name: {m: {"right", "blind"}} where a true one
        is shown; blind: a random shot's name."""
        result = {}
        for m in (m for m in (0, 1, 2, 4, 6) if m < k):
            rng = self.rng("wrong", str(m))
            index = rng.integers(0, 4, (self.samples, k + 1))
            wrong = np.zeros(index.shape, bool)
            wrong[:, :k] = rng.permuted(np.tile(np.arange(k) < m, (self.samples, 1)), axis=1)
            called = np.where(wrong, (index + rng.integers(1, 4, index.shape)) % 4, index)
            truth, same = index[:, -1], index[:, :k] == index[:, -1:]
            shown = (same & ~wrong[:, :k]).any(axis=1)
            right = self._binding(rng, index, called).argmax(axis=1) == truth
            blind = (called[:, :k] == truth[:, None]).mean(axis=1)
            result[str(m)] = {"right": figure(right[shown]), "blind": float(blind[shown].mean())}
        return result

    def everything(self):
        """All figures."""
        asked = ("prior", "absent", "probing", "nothing", "calibration", "order", "wrong_labels")
        return {name: getattr(self, name)() for name in asked}


def _calibrated(logp, truth, bins):
    """log p [B, C] of the candidates and the right one int[B] -> {"bins", "error", "right"}."""
    sure, right = softmax(logp).max(axis=1), logp.argmax(axis=1) == truth
    place = np.minimum((sure * bins).astype(int), bins - 1)
    rows = [{"sure": float(sure[place == b].mean()), **figure(right[place == b])}
            for b in range(bins) if (place == b).any()]  # fmt: skip
    error = sum(row["n"] * abs(row["sure"] - row["accuracy"]) for row in rows) / len(sure)
    return {"bins": rows, "error": float(error), "right": figure(right)}


# --- the command ----------------------------------------------------------------------------------


def measure(model, samples, checkpoint, progress=lambda x: x):
    """The document of all figures."""
    found = Limits(model, samples, progress=progress).everything()
    return {
        "made_by": COMMAND, "command": f"{COMMAND} --samples {samples}", "samples": samples,
        "checkpoint": checkpoint, **outputs.about(), "limits": found,
    }  # fmt: skip


def write(document, file):
    """Write the JSON, over nothing but what this command made."""
    outputs.write_file(file, json.dumps(document, indent=1).encode(), COMMAND)


def table(document):
    """Yield the lines of Markdown tables."""
    found = document["limits"]
    yield f"{document['samples']} questions each, {document['date']}, {document['checkpoint']}"
    yield from ("", "| shots | " + " | ".join(SHOT_COLUMNS) + " |",
                "|---" * (1 + len(SHOT_COLUMNS)) + "|")  # fmt: skip
    for k in map(str, SHOTS):
        cells = [_shown(get(found, k)) for get in SHOT_COLUMNS.values()]
        yield f"| {k} | {' | '.join(cells)} |"
    yield from ("", "| shots | is this shape there? right | answers yes | chance |",
                "|---|---|---|---|")  # fmt: skip
    for k, row in found["probing"].items():
        yield f"| {k} | {_shown(row['right'])} | {_shown(row['yes'])} | 0.50 |"
    yield from ("", "| place of the asked class's one shot among 8 | right | of the wrong answers, "
                "the last shot's name | a random wrong shot's |", "|---|---|---|---|")  # fmt: skip
    for place, row in found["order"].items():
        expected = "" if row["expected"] is None else f"{row['expected']:.2f}"
        yield f"| {place} | {_shown(row['right'])} | {_shown(row['last of wrong'])} | {expected} |"
    yield from ("", "| wrong labels among 8 shots | right, where a true one is shown | blind |",
                "|---|---|---|")  # fmt: skip
    for m, row in found["wrong_labels"].items():
        yield f"| {m} | {_shown(row['right'])} | {row['blind']:.2f} |"
    yield from ("", "| ranked answers | right | calibration error |", "|---|---|---|")
    for task, row in found["calibration"].items():
        yield f"| {task} | {_shown(row['right'])} | {row['error']:.3f} |"
    yield ""
    yield "; ".join(f"{name}: {what} {_shown(f)}" for name, row in found["nothing"].items()
                    for what, f in row.items())  # fmt: skip


def _plain(name, what):
    return lambda found, k: found["absent"]["plain"].get(k, {}).get(name, {}).get(what)


def _remedy(name):
    return lambda found, k: found["absent"]["remedy"].get(k, {}).get(name, {}).get("declined")


SHOT_COLUMNS = {
    "prior: right, shots agree": lambda found, k: found["prior"]["shots agree"][k]["right"],
    "follows the shots": lambda found, k: found["prior"]["shots agree"][k]["prior"],
    "right, control": lambda found, k: found["prior"]["control"][k]["right"],
    "question fits: right": _plain("fits", "right"),
    "absent: of what is there": _plain("absent", "of what is there"),
    "absent: ungrounded": _plain("absent", "ungrounded"),
    "absent: surer than .9": _plain("absent", "sure"),
    "remedy: declined, absent": _remedy("absent"),
    "remedy: declined, fits": _remedy("fits"),
}


def _shown(found):
    """A figure with its interval."""
    if not found or found["accuracy"] is None:
        return ""
    low, high = found["interval"]
    return f"{found['accuracy']:.2f} ({low:.2f} to {high:.2f})"
