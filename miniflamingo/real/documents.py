"""What the bridge reads: interleaved documents of at most 5 pictures, in real words.

    <BOS> <image> red apple <EOC> <image> Question: What kind of thing is this? Answer: food <EOC>

A document is a list of Shown: a picture, what is asked, what is answered. `build` makes token ids,
targets and phi of several. SmolLM2 has no `<image>` and no `<EOC>`: two of its unused special
tokens stand for them. A `<BOS>` stands first, because this language model parks attention on
whatever is first, which must be no image.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from miniflamingo.real.features import VERSIONS
from miniflamingo.real.pictures import TRAINED
from miniflamingo.worlds.datasets import IGNORED

BOS, EOC, IMAGE = 0, 2, 5  # <|endoftext|>, <|im_end|>, <file_sep>
WHAT_KIND = " Question: What kind of thing is this? Answer:"
WHAT = " Question: What is this? Answer:"
WORDS = " Question: Which words fit? Answer:"
INVENTED = tuple(
    "dax blicket wug toma fep zorp glim nark plim quib rosk tiv vost yand kib mof sleb".split()  # noqa: SIM905
)
TEST_WORDS = ("trun", "gorp", "vlem", "fusk", "lemp", "drav", "snib", "crell")  # never in training


class Shown(NamedTuple):
    """One picture of a document, (concept, artist, version) or several as a clip, and its text.

    answer None leaves it open, for the model to write; learned says whether it is a target.
    """

    picture: tuple
    question: str = ""
    answer: str | None = None
    learned: bool = True


@dataclass(frozen=True)
class Batch:
    """tokens, targets, phi int[B, L] (targets[t] is what t is to predict, or IGNORED); pictures, a
    list of lists of (concept, artist, version) or of tuples of them; lengths int[B]."""

    tokens: np.ndarray
    targets: np.ndarray
    phi: np.ndarray
    pictures: list
    lengths: np.ndarray

    def __len__(self):
        return len(self.tokens)

    def count(self):
        """How many targets there are."""
        return int((self.targets != IGNORED).sum())


def build(documents, words):
    """[[Shown]] -> Batch; words is SmolLM2's ForeignTokenizer."""
    rows = [_row(document, words) for document in documents]
    lengths = np.array([len(ids) for ids, _, _ in rows])
    B, L = len(rows), lengths.max()
    tokens, targets, phi = np.full((B, L), EOC), np.full((B, L), IGNORED), np.zeros((B, L), int)
    for b, (ids, learned, images) in enumerate(rows):
        n = len(ids)
        tokens[b, :n], phi[b, :n], phi[b, n:] = ids, images, images[-1]
        targets[b, : n - 1] = np.where(learned[1:], ids[1:], IGNORED)
    pictures = [[shown.picture for shown in document] for document in documents]
    return Batch(tokens, targets, phi, pictures, lengths)


def _row(document, words):
    """-> ids, which of them are targets, and the picture that each belongs to."""
    ids, learned, phi = [BOS], [False], [0]
    for n, shown in enumerate(document, 1):
        asked = [IMAGE, *words.encode(shown.question)]
        answer = [] if shown.answer is None else [*words.encode(" " + shown.answer), EOC]
        ids += asked + answer
        learned += [False] * len(asked) + [shown.learned] * len(answer)
        phi += [n] * (len(asked) + len(answer))
    return ids, np.array(learned), np.array(phi)


class Mixture:
    """Draws the documents of training, from the seen concepts as the trained artists drew them.

    `captions`: names; `questions`: kind, name, some of its keywords, yes or no; `kinds`: the first
    answers tell that kinds are wanted; `binding`: invented names for concepts or kinds; `clips`:
    one concept, drawn several times in a row as frames of a clip.
    """

    def __init__(self, concepts, words):
        self.concepts, self.words = concepts, words
        self.seen = np.array(concepts.seen)
        self.of_kind = {k: np.array([i for i in concepts.seen if concepts.kind(i) == k])
                        for k in concepts.kinds}  # fmt: skip
        self.with_kind = np.concatenate(list(self.of_kind.values()))

    def picture(self, i, rng):
        """A picture of concept i."""
        artist = TRAINED[rng.integers(len(TRAINED))]
        return int(i), artist, int(rng.integers(VERSIONS[artist]))

    def captions(self, rng, n=4):
        """n pictures and their names."""
        return [Shown(self.picture(i, rng), "", self.concepts.name(i))
                for i in rng.choice(self.seen, n, replace=False)]  # fmt: skip

    def clips(self, rng, n=3, frames=4):
        """n clips of one concept each, by one artist, and their names."""
        return [Shown(tuple(self._frames(i, rng, frames)), "", self.concepts.name(i))
                for i in rng.choice(self.seen, n, replace=False)]  # fmt: skip

    def _frames(self, i, rng, frames):
        artist = TRAINED[rng.integers(len(TRAINED))]
        return [(int(i), artist, int(v)) for v in rng.permutation(VERSIONS[artist])[:frames]]

    def questions(self, rng, n=2):
        """n pictures, each with a question about it."""
        return [self._question(i, rng) for i in rng.choice(self.with_kind, n, replace=False)]

    def _question(self, i, rng):
        kind, chance, picture = self.concepts.kind(i), rng.random(), self.picture(i, rng)
        if chance < 0.35:
            return Shown(picture, WHAT_KIND, kind)
        if chance < 0.5:
            return Shown(picture, WHAT, self.concepts.name(i))
        if chance < 0.8 and (keywords := self.concepts.all[i]["keywords"]):
            some = rng.choice(keywords, min(3, len(keywords)), replace=False)
            return Shown(picture, WORDS, ", ".join(map(str, some)))
        others = [k for k in self.concepts.kinds if k != kind]
        asked = kind if rng.random() < 0.5 else others[rng.integers(len(others))]
        return Shown(picture, is_it(asked), "yes" if asked == kind else "no")

    def kinds(self, rng, n=5):
        """n pictures of two to four kinds; the first is no target: nothing asks for a kind yet."""
        some = rng.choice(self.concepts.kinds, rng.integers(2, 5), replace=False)
        shown = []
        for kind in rng.choice(some, n):
            i = rng.choice(self.of_kind[kind])
            shown.append(Shown(self.picture(i, rng), "", str(kind), bool(shown)))
        return shown

    def binding(self, rng, n=5):
        """n pictures of two classes under invented names; a name is a target once it was shown."""
        names = rng.choice(INVENTED, 2, replace=False)
        if rng.random() < 0.5:
            classes = [[i] for i in rng.choice(self.seen, 2, replace=False)]
        else:
            classes = [self.of_kind[k] for k in rng.choice(self.concepts.kinds, 2, replace=False)]
        order, shown = [*rng.permutation(2), *rng.integers(0, 2, n - 2)], []
        for at, j in enumerate(order):
            picture = self.picture(rng.choice(classes[j]), rng)
            shown.append(Shown(picture, "", str(names[j]), j in order[:at]))
        return shown


def is_it(kind):
    """The question whether something is of this kind."""
    article = "an" if kind[0] in "aeiou" else "a"
    return f" Question: Is this {article} {kind}? Answer:"
