"""Makes the answers of a bridge that are kept (kept.py), with their pictures and probabilities.

python -m miniflamingo real examples --json miniflamingo/real/results/examples.json
"""

import base64
import contextlib
from pathlib import Path

import numpy as np

from miniflamingo.functional import log_softmax
from miniflamingo.real import features, parts
from miniflamingo.real import model as models
from miniflamingo.real.asking import go_on, read_prompt, visual_tokens
from miniflamingo.real.documents import BOS, EOC, IMAGE, TEST_WORDS, WHAT_KIND, Shown, is_it
from miniflamingo.real.measure import SPLITS
from miniflamingo.real.pictures import SIZE, TRAINED, UNSEEN, Concepts
from miniflamingo.real.reading import Reader
from miniflamingo.worlds.datasets import IGNORED

COMMAND = "python -m miniflamingo real examples"
CHOSEN = ("dog", "cat", "flamingo")  # all others are drawn at random
RANDOM = 6  # pictures that are shown of a split
TABLE = 40  # pictures, and as many names, of a table of likelihoods
ASKED = 48  # pictures that are asked with each prompt
SEED = 16
TABLES = ("artist never seen", "concepts never seen")
LICENCES = {
    "noto": ("Noto Emoji by Google, Apache-2.0", "emoji-datasource-google"),
    "twemoji": ("Twemoji by Twitter, Inc and other contributors, CC-BY 4.0: "
                "https://creativecommons.org/licenses/by/4.0/", "emoji-datasource-twitter"),
}  # fmt: skip


# --- how they are made ----------------------------------------------------------------------------


class Looked(features.Features):
    """The features of pictures, seen by the eye when they are first asked for."""

    def __init__(self, concepts, eye):
        self.concepts, self.eye, self.kept = concepts, eye, {}

    def _grids(self, pictures):
        for p in set(pictures) - self.kept.keys():
            image = features.picture(self.concepts, *p)
            self.kept[p] = features.encode(self.eye, image[None])[0]
        return np.stack([self.kept[p] for p in pictures])


class Examples(Reader):
    """Asks one bridge; a picture is (concept, artist, 0)."""

    def __init__(self, model, words, concepts):
        super().__init__(model, words, Looked(concepts, model.vision_encoder))
        self.concepts, self.pictures = concepts, {}

    def keep(self, picture):
        """The key under which a picture is kept."""
        i, artist, _ = picture
        key = f"{self.concepts.name(i)}, {artist}"
        self.pictures[key] = {
            "name": self.concepts.name(i), "kind": self.concepts.kind(i), "artist": artist,
            "seen": i in self.concepts.seen,
            "png": base64.b64encode(self.concepts.path(i, artist).read_bytes()).decode(),
        }  # fmt: skip
        return key

    def drawn(self, split, n, with_kind=False):
        """n pictures of a split, at random."""
        which, artist = SPLITS[split]
        some = self.concepts.drawn_by(artist, getattr(self.concepts, which))
        some = [i for i in some if self.concepts.kind(i) or not with_kind]
        rng = np.random.default_rng([SEED, len(split), n])
        return [(int(i), artist, 0) for i in rng.permutation(some)[:n]]

    def spelled(self, picture, question=""):
        """What is written, and of each of its tokens the probability and the likeliest three."""
        answer = self.answers([[Shown(picture, question)]])[0]
        ((_, batch, media),) = self._batches([[Shown(picture, question, answer)]])
        learned = batch.targets != IGNORED
        logits = self.model.read(batch.tokens, media, batch.phi, keep=learned)
        p = np.exp(log_softmax(logits.astype(np.float64)))
        tokens = [{"piece": self.piece(t), "p": rounded(row[t], 4),
                   "likeliest": [[self.piece(i), rounded(row[i], 4)] for i in (-row).argsort()[:3]]}
                  for t, row in zip(batch.targets[learned], p)]  # fmt: skip
        return {"answer": answer, "tokens": tokens}

    def piece(self, token):
        """A token as a text."""
        return "<EOC>" if token == EOC else self.words.decode([int(token)])

    def shown(self):
        """The pictures that are shown, with what is written of them and answered about them."""
        chosen = [(i, artist, 0) for artist in (TRAINED[0], UNSEEN) for name in CHOSEN
                  for i in self.concepts.seen if self.concepts.name(i) == name]  # fmt: skip
        sets = {"chosen": chosen}
        for split in ("seen", "artist never seen", "concepts never seen"):
            sets[split] = self.drawn(split, RANDOM, with_kind=True)
        return {name: [self.told(picture) for picture in some] for name, some in sets.items()}

    def told(self, picture):
        """One picture: its name, its kind, and whether it is of a kind, of its own and another."""
        kind = self.concepts.kind(picture[0])
        other = next(k for k in ("animal", "food") if k != kind)
        documents = [[Shown(picture, is_it(k), a)] for k in (kind, other) for a in ("yes", "no")]
        yes, no = np.exp(-self.nats(documents)[0]).reshape(2, 2).T
        return {
            "picture": self.keep(picture), "name": self.spelled(picture),
            "kind": self.spelled(picture, WHAT_KIND),
            "is_it": {k: rounded(p, 3) for k, p in zip((kind, other), yes / (yes + no))},
        }  # fmt: skip

    def table(self, split):
        """-log p of every name given every picture, [pictures, names], and with the gates shut."""
        pictures = self.drawn(split, TABLE)
        names = [self.concepts.name(i) for i, *_ in pictures]
        documents = [[Shown(p, "", name)] for p in pictures for name in names]
        nats, counts = self.nats(documents)
        with shut(self.model):
            blind = self.nats(documents[: len(names)])[0]
        return {"names": names, "tokens": counts[: len(names)].tolist(),
                "nats": rounded(nats.reshape(len(pictures), -1), 2),
                "nats_gates_shut": rounded(blind, 2)}  # fmt: skip

    def invented(self):
        """Two names that mean nothing, for two kept pictures; which is likelier for a third?"""
        dog, cat = ([i for i in self.concepts.seen if self.concepts.name(i) == name]
                    for name in CHOSEN[:2])  # fmt: skip
        found = []
        for i, j in [*zip(dog, cat), *zip(cat, dog)]:
            for names in (TEST_WORDS[:2], TEST_WORDS[1::-1]):
                support = [Shown((k, TRAINED[0], 0), "", n, False) for k, n in zip((i, j), names)]
                asked = [[*support, Shown((i, UNSEEN, 0), "", name)] for name in names]
                p = np.exp(-self.nats(asked)[0])
                found.append({
                    "examples": {self.keep(s.picture): s.answer for s in support},
                    "asked": self.keep((i, UNSEEN, 0)),
                    "p": {n: rounded(x, 3) for n, x in zip(names, p / p.sum())},
                })  # fmt: skip
        return found

    def prompts(self):
        """The kind of the same pictures, asked as in training and otherwise."""
        pictures = self.drawn("concepts never seen", ASKED, with_kind=True)
        kinds, found = [self.concepts.kind(i) for i, *_ in pictures], {}
        images = [features.picture(self.concepts, *p) for p in pictures]
        before = [*images[-1:], *images[:-1]], [*kinds[-1:], *kinds[:-1]]
        for prompt, make in PROMPTS.items():
            with shut(self.model) if "shut" in prompt else contextlib.nullcontext():
                asked = [make(self.words, *case) for case in zip(images, *before)]
                said = [self.write(*case) for case in asked]
            found[prompt] = {
                "right": share(said, kinds), "of the picture before": share(said, before[1]),
                "a kind at all": float(np.mean([s in self.concepts.kinds for s in said])),
                "answers": list(zip(kinds, said))[:4],
            }  # fmt: skip
        most = max(np.mean([k == other for k in kinds]) for other in self.concepts.kinds)
        return {"n": len(kinds), "most frequent kind": float(most), "prompts": found}

    def write(self, ids, phi, media):
        """An answer of at most six tokens."""
        tokens = visual_tokens(self.model, media)
        return self.words.decode(list(go_on(self.model, ids, phi, tokens, 6))).strip()


def share(said, right):
    """How many answers are right."""
    return float(np.mean([s == r for s, r in zip(said, right)]))


def rounded(x, digits):
    """Numbers that a JSON file can hold, shortened."""
    return np.round(np.asarray(x, float), digits).tolist()


@contextlib.contextmanager
def shut(model):
    """A model's gates at 0 for a while."""
    gates = [gate for layer in model.gated_xattn for gate in (layer.alpha_xattn, layer.alpha_dense)]
    before = [gate.data for gate in gates]
    for gate in gates:
        gate.data = np.zeros((), np.float32)
    try:
        yield
    finally:
        for gate, data in zip(gates, before):
            gate.data = data


# --- prompts: (words, image, the image before it, that one's kind) -> ids, phi, frames ------------


def _asked(words, image, *_):
    return read_prompt([image, WHAT_KIND], words)


def _after_another(words, image, before, kind):
    return read_prompt([before, WHAT_KIND, kind, image, WHAT_KIND], words)


def _one_too_low(*case):
    ids, phi, media = _after_another(*case)
    return ids, np.maximum(phi - 1, 0), media


def _chat(words, image, *_):
    head = [1, *words.encode("user\n"), IMAGE, *words.encode("What kind of thing is this?"), EOC]
    ids = np.array([*head, *words.encode("\n"), 1, *words.encode("assistant\n")])
    return ids, np.cumsum(ids == IMAGE), read_prompt([image], words)[2]


def _without_bos(*case):
    ids, phi, media = _asked(*case)
    assert ids[0] == BOS
    return ids[1:], phi[1:], media


PROMPTS = {
    "as in training": _asked,
    "the gates shut": _asked,
    "without <BOS>": _without_bos,
    "without 'Question:' and 'Answer:'": lambda words, image, *_: read_prompt(
        [image, " What kind of thing is this?"], words),
    "the question before the picture": lambda words, image, *_: read_prompt(
        [WHAT_KIND, image], words),
    "SmolLM2's chat template": _chat,
    "behind another picture": _after_another,
    "behind another picture, phi one too low": _one_too_low,
}  # fmt: skip


# --- the command ----------------------------------------------------------------------------------


def ask(arguments):
    """Everything of one bridge, as data."""
    model, words = models.load_bridge(arguments.parts, arguments.bridge)
    asked = Examples(model, words, Concepts(Path(arguments.parts)))
    found = {"blocks": list(model.config.layers()), "size": SIZE,
             "shapes": {n: list(p.shape) for n, p in model.named_parameters()},
             "shown": asked.shown(), "invented": asked.invented(), "asked": asked.prompts(),
             "tables": {split: asked.table(split) for split in TABLES}}  # fmt: skip
    packages = {part.name: part.version for part in parts.PARTS}
    licences = {artist: {"licence": text, "source": f"npm: {name} {packages[name]}"}
                for artist, (text, name) in LICENCES.items()}  # fmt: skip
    return found | {"licences": licences, "pictures": asked.pictures}


def lines(document):
    """Yield a line for each kept answer."""
    for some in document["shown"].values():
        for told in some:
            name, kind = told["name"]["answer"], told["kind"]["answer"]
            yield f"{told['picture']:<40} {name:<30} {kind}"
    for prompt, found in document["asked"]["prompts"].items():
        yield f"{prompt:<45} right {found['right']:.2f}, a kind {found['a kind at all']:.2f}"
