"""Every figure of a bridge between real parts, as data: on pictures by an artist never seen, on
concepts never seen, and what a guess, another's picture and the eye alone would reach.

    python -m miniflamingo real measure runs/real/0 --json runs/real/figures.json
    python -m miniflamingo real table
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib import cbook
from tqdm import tqdm

from miniflamingo.evaluation import wilson
from miniflamingo.real.asking import answer
from miniflamingo.real.documents import TEST_WORDS, WHAT_KIND, Shown, is_it
from miniflamingo.real.features import VERSIONS
from miniflamingo.real.pictures import LAST, TRAINED, UNSEEN

# split -> which concepts, whose pictures
SPLITS = {
    "seen": ("seen", TRAINED[0]),
    "artist never seen": ("seen", UNSEEN),
    "last artist": ("seen", LAST),
    "concepts never seen": ("held", TRAINED[0]),
    "both never seen": ("held", UNSEEN),
}
SHOTS = (0, 1, 2, 4, 8)
CANDIDATES = 10


@dataclass
class Measure:
    """Asks one bridge; `samples` pictures a figure, or all held-out concepts where they are fewer.

    Each method gives {"value", "low", "high", "n", ...} of a split; low and high are a 95 %
    interval over pictures: Wilson's for shares, and for nats from 1,000 resamples.
    """

    reader: object
    concepts: object
    samples: int = 256
    seed: int = 1

    def pick(self, split, with_kind=False):
        """-> the split's concepts, in random order, and the artist."""
        which, artist = SPLITS[split]
        drawn = self.concepts.drawn_by(artist, getattr(self.concepts, which))
        drawn = [i for i in drawn if self.concepts.kind(i) or not with_kind]
        rng = np.random.default_rng([self.seed, len(split)])
        return [int(i) for i in rng.permutation(drawn)[: self.samples]], artist, rng

    def named(self, i, picture):
        """The document: a picture, and the name of concept i."""
        return [Shown(picture, "", self.concepts.name(i))]

    def nats(self, split):
        """Nats a token of the name: given the right picture, and given another's."""
        chosen, artist, rng = self.pick(split)
        others = np.roll(chosen, 37)
        found = {}
        for what, shown in (("right", chosen), ("another", others)):
            documents = [self.named(i, (j, artist, 0)) for i, j in zip(chosen, shown)]
            found[what], counts = self.reader.nats(documents)
        gain = resampled(found["another"] - found["right"], counts, rng)
        each = {f"nats_{what}": float(x.sum() / counts.sum()) for what, x in found.items()}
        return gain | each

    def ranked(self, split):
        """The right name among 10 of the split, by log-likelihood; chance 0.10."""
        chosen, artist, rng = self.pick(split)
        pool, documents = getattr(self.concepts, SPLITS[split][0]), []
        for i in chosen:
            others = [j for j in pool if j != i]
            others = rng.choice(others, min(CANDIDATES - 1, len(others)), replace=False)
            documents += [self.named(j, (i, artist, 0)) for j in (i, *map(int, others))]
        nats, counts = (x.reshape(len(chosen), -1) for x in self.reader.nats(documents))
        a_token = float(first_is_least(nats / counts).mean())
        return share(first_is_least(nats)) | {
            "a_token": a_token,
            "chance": 1 / nats.shape[1],
        }

    def open_ended(self, split):
        """The exact name, written greedily; shuffled: judged against another's name."""
        chosen, artist, _ = self.pick(split)
        answers = self.reader.answers([[Shown((i, artist, 0))] for i in chosen])
        names = [self.concepts.name(i).lower() for i in chosen]
        right = np.array([a.lower() == n for a, n in zip(answers, names)], float)
        word = [bool(content(a) & content(n)) for a, n in zip(answers, names)]
        wrong = [bool(content(a) & content(n)) for a, n in zip(answers, np.roll(names, 1))]
        return share(right) | {
            "shares_a_word": float(np.mean(word)), "shuffled": float(np.mean(wrong)),
            "answers": list(zip(names, answers)),
        }  # fmt: skip

    def kinds(self, split):
        """The kind, written greedily; chance: the split's most frequent kind, always."""
        chosen, artist, _ = self.pick(split, with_kind=True)
        answers = self.reader.answers([[Shown((i, artist, 0), WHAT_KIND)] for i in chosen], 6)
        kinds = [self.concepts.kind(i) for i in chosen]
        right = np.array([a == k for a, k in zip(answers, kinds)], float)
        most = max(np.mean([k == other for k in kinds]) for other in self.concepts.kinds)
        return share(right) | {"chance": float(most)}

    def yes_no(self, split):
        """Is this a ...? half of the time it is; the likelier of yes and no; chance 0.5."""
        chosen, artist, rng = self.pick(split, with_kind=True)
        documents = []
        for n, i in enumerate(chosen):
            kind = self.concepts.kind(i)
            asked = kind if n % 2 else rng.choice([k for k in self.concepts.kinds if k != kind])
            documents += [[Shown((i, artist, 0), is_it(asked), a)] for a in ("yes", "no")]
        nats = self.reader.nats(documents)[0].reshape(-1, 2)
        right = ((nats[:, 0] < nats[:, 1]) == (np.arange(len(chosen)) % 2 == 1)).astype(float)
        return share(right) | {"chance": 0.5}

    def shots_of_kinds(self, split, shots):
        """The kind without a question, behind so many examples of the trained artists' pictures.

        blind: one of the examples' answers, at random; ceiling: how often that is among them."""
        chosen, artist, rng = self.pick(split, with_kind=True)
        pool = [i for i in self.concepts.seen if self.concepts.kind(i)]
        documents, given = [], []
        for i in chosen:
            support = rng.choice([j for j in pool if j != i], shots, replace=False)
            shown = [Shown((int(j), TRAINED[0], 0), "", self.concepts.kind(int(j)), False)
                     for j in support]  # fmt: skip
            documents.append([*shown, Shown((i, artist, 0))])
            given.append([s.answer for s in shown])
        answers, kinds = self.reader.answers(documents, 6), [self.concepts.kind(i) for i in chosen]
        right = np.array([a == k for a, k in zip(answers, kinds)], float)
        blind = [np.mean([g == k for g in some]) if some else 0 for some, k in zip(given, kinds)]
        return share(right) | {
            "blind": float(np.mean(blind)),
            "ceiling": float(np.mean([k in some for some, k in zip(given, kinds)])),
            "is_a_kind": float(np.mean([a in self.concepts.kinds for a in answers])),
        }  # fmt: skip

    def bound(self, split, shots, way=2):
        """Invented names that no training has used, for `way` concepts of the split, so many
        examples of each by the trained artists; asked is a picture by the split's. Chance 1 / way.

        nearest: the class whose examples' mean feature is nearest, by cosine, without any bridge.
        """
        chosen, artist, rng = self.pick(split)
        examples = [(a, v) for v in range(1, VERSIONS[TRAINED[0]]) for a in TRAINED][:shots]
        documents, nearest = [], []
        for n in range(self.samples):
            classes, right = [int(i) for i in rng.choice(chosen, way, replace=False)], n % way
            names = [str(name) for name in rng.choice(TEST_WORDS, way, replace=False)]
            support = [(j, (classes[j], *example)) for example in examples for j in range(way)]
            support = [support[k] for k in rng.permutation(len(support))]
            asked = (classes[right], artist, 0)
            shown = [Shown(picture, "", names[j], False) for j, picture in support]
            order = [right, *(j for j in range(way) if j != right)]
            documents += [[*shown, Shown(asked, "", names[j])] for j in order]
            nearest.append(self._nearest(support, asked, way) == right)
        nats = self.reader.nats(documents)[0].reshape(-1, way)
        return share(first_is_least(nats)) | {
            "chance": 1 / way, "nearest": float(np.mean(nearest)),
        }  # fmt: skip

    def _nearest(self, support, asked, way):
        """The class whose examples' mean feature is nearest to that of the question."""
        pooled = lambda p: self.reader.features.get([p])[0].mean(axis=0)  # noqa: E731
        means = [np.mean([pooled(p) for j, p in support if j == c], axis=0) for c in range(way)]
        return int(np.argmax([cosine(pooled(asked), mean) for mean in means]))

    def eye_alone(self, split):
        """What the features have without bridge or language model: the nearest concept's name and
        kind, by cosine of mean features to the trained artists' pictures. Names of held-out
        concepts are not among them."""
        chosen, artist, _ = self.pick(split, with_kind=True)
        seen, features = self.concepts.seen, self.reader.features
        pooled = lambda i, a, v: features.get([(i, a, v)])[0].mean(axis=0)  # noqa: E731
        known = np.stack([np.mean([pooled(i, a, v) for a in TRAINED for v in (0, 1)], axis=0)
                          for i in seen])  # fmt: skip
        known = known - (mean := known.mean(axis=0))
        known /= np.linalg.norm(known, axis=1, keepdims=True)
        asked = np.stack([pooled(i, artist, 0) for i in chosen]) - mean
        best = [seen[k] for k in (asked @ known.T).argmax(axis=1)]
        names = np.array([b == i for b, i in zip(best, chosen)], float)
        kinds = np.array([self.concepts.kind(b) == self.concepts.kind(i)
                          for b, i in zip(best, chosen)], float)  # fmt: skip
        return {"name": share(names), "kind": share(kinds)}


def first_is_least(nats):  # [n, candidates] -> float [n]
    """1 where the first candidate, the right one, is likelier than every other; a tie is none."""
    return (nats[:, 0] < nats[:, 1:].min(axis=1)).astype(float)


def cosine(a, b):
    """The cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


EMPTY = "a an the with of and in on face symbol button person sign"  # what names nothing


def content(text):
    """The words of a name that say something, without a plural's s."""
    return {word.rstrip("s") for word in text.lower().split()} - {*EMPTY.split()}


def share(right):  # float [n] of 0 and 1
    """{"value", "low", "high", "n"} of what is right."""
    low, high = wilson(int(right.sum()), len(right))
    return {"value": float(right.mean()), "low": low, "high": high, "n": len(right)}


def resampled(sums, counts, rng, resamples=1000):
    """The same of sums [n] over counts [n], its interval from resampling the n."""
    rows = rng.integers(0, len(sums), (resamples, len(sums)))
    drawn = sums[rows].sum(axis=1) / counts[rows].sum(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    value = float(sums.sum() / counts.sum())
    return {"value": value, "low": float(low), "high": float(high), "n": len(sums)}


# --- photographs ----------------------------------------------------------------------------------


def photographs():
    """{file name: (picture, words any of which names it)} of what the installed packages bring."""
    found = {"grace_hopper.jpg": (Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)),
                                  "woman person officer soldier face captain")}  # fmt: skip
    for package, folder, names in PHOTOGRAPHS:
        if (spec := find_spec(package)) is None:
            continue
        base = Path(spec.origin).parent / folder
        found |= {name: (base / name, words) for name, words in names.items()
                  if (base / name).is_file()}  # fmt: skip
    return found


# package -> where in it, and words any of which names what is there
PHOTOGRAPHS = (
    ("sklearn", "datasets/images", {
        "china.jpg": "temple building castle palace pagoda shrine house",
        "flower.jpg": "flower blossom rose tulip hibiscus plant",
    }),
    ("skimage", "data", {
        "astronaut.png": "astronaut woman person", "chelsea.png": "cat", "coffee.png":
        "coffee hot beverage cup drink", "rocket.jpg": "rocket", "camera.png":
        "camera person photographer", "coins.png": "coin money", "motorcycle_left.png":
        "motorcycle", "clock_motion.png": "clock watch", "moon.png": "moon",
    }),
)  # fmt: skip


def is_named(answer, words):
    """Whether one of these words stands in an answer."""
    return bool(content(answer) & content(words))


def of_photographs(reader):
    """{file: {"answer", "right"}}: what is written of each photograph that is installed here."""
    found = {}
    for name, (path, words) in photographs().items():
        said = answer(reader.model, reader.words, [path], 12)
        found[name] = {"answer": said, "right": is_named(said, words)}
    return found


# --- all of it ------------------------------------------------------------------------------------


def everything(measure, progress=True):
    """{figure: {split: {...}}} of one bridge."""
    m, work = measure, {}
    for split in SPLITS:
        for name in ("nats", "ranked", "open_ended", "kinds", "yes_no", "eye_alone"):
            work[name, split] = lambda name=name, split=split: getattr(m, name)(split)
    for shots in SHOTS:
        for split in ("artist never seen", "both never seen"):
            work[f"kinds, {shots} shots", split] = lambda k=shots, s=split: m.shots_of_kinds(s, k)
            if shots:
                work[f"invented names, {shots} shots", split] = lambda k=shots, s=split: m.bound(
                    s, k
                )
    found = {}
    for (name, split), ask in tqdm(work.items(), "figures", disable=not progress):
        found.setdefault(name, {})[split] = ask()
    return found | {"photographs": of_photographs(m.reader)}


ROWS = {
    "nats": "nats a token of the name: another's picture minus the right one",
    "ranked": f"the right name among {CANDIDATES}, by log-likelihood (chance .10)",
    "open_ended": "open-ended, the exact name",
    "kinds": "kind, open-ended",
    "yes_no": "is this a ...? (chance .50)",
}
ROWS |= {f"kinds, {k} shots": f"kind, no question, examples: {k}" for k in SHOTS}
ROWS |= {f"invented names, {k} shots": f"invented names, 2-way, examples of each: {k}"
         for k in SHOTS[1:]}  # fmt: skip


def table(document):
    """Yield the lines of a Markdown table: the median of the runs, and the lowest and highest of
    all their 95 % intervals."""
    runs = list(document["runs"].values())
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    yield f"| figure ({seeds}) | " + " | ".join(SPLITS) + " |"
    yield "|---" * (1 + len(SPLITS)) + "|"
    for name, text in ROWS.items():
        cells = [_cell([run[name][split] for run in runs if split in run.get(name, {})])
                 for split in SPLITS]  # fmt: skip
        yield f"| {text} | " + " | ".join(cells) + " |"
    for what in ("name", "kind"):
        cells = [_cell([run["eye_alone"][split][what] for run in runs[:1]]) for split in SPLITS]
        yield f"| the nearest picture's {what}, by the eye alone | " + " | ".join(cells) + " |"
    photos = [run["photographs"].values() for run in runs if run.get("photographs")]
    if photos:
        right = ", ".join(f"{sum(p['right'] for p in some)} of {len(some)}" for some in photos)
        yield f"\nPhotographs whose answer has a word of what is there, by seed: {right}."


BESIDE = ("a_token", "blind", "ceiling", "nearest", "chance")


def _cell(found):
    if not found:
        return ""
    value = np.median([f["value"] for f in found])
    beside = [key for key in BESIDE if key in found[0]]
    extra = [f"{key} {np.median([f[key] for f in found]):.2f}" for key in beside]
    span = f"{min(f['low'] for f in found):.2f} to {max(f['high'] for f in found):.2f}"
    return f"{value:.2f} ({'; '.join([span, *extra])})"
