"""1,279 named concepts, drawn by several artists: their names and kinds, how a picture is
composed, and which concepts no training sees.

Names and keywords are those of Unicode's CLDR. Flags, signs, letters, skin tones and the gendered
twins of people are left out: they are marks or repetitions, no things.
"""

import io
import json
import re
from importlib import import_module

import numpy as np
from PIL import Image, ImageOps

from miniflamingo.command import require

SIZE = 224
TRAINED, UNSEEN, LAST = ("noto", "fluent"), "twemoji", "openmoji"  # artists; LAST is asked once
SPLIT_SEED, HELD_SHARE = 7, 0.1
# CLDR's subgroup -> what its members are, for the question "What kind of thing is this?"
KINDS = {
    "animal": "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug",
    "plant": "plant-flower plant-other",
    "food": "food-fruit food-vegetable food-prepared food-asian food-sweet",
    "drink": "drink",
    "tool": "dishware tool household writing office science medical",
    "place": "place-geographic place-other place-map",
    "building": "place-building place-religious",
    "vehicle": "transport-ground transport-water transport-air",
    "weather": "sky-weather",
    "sport": "sport",
    "game": "game",
    "clothing": "clothing",
    "musical instrument": "musical-instrument",
    "device": "computer phone light-video",
    "book or paper": "book-paper",
    "face": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy "
    "face-unwell face-hat face-glasses face-concerned face-negative face-costume cat-face "
    "monkey-face",
    "hand": "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands "
    "hand-prop",
    "body part": "body-parts",
    "person": "person person-gesture person-role person-fantasy person-activity person-sport "
    "person-resting",
    "heart": "heart",
    "shape": "geometric",
    "arrow": "arrow",
}
KIND_OF = {group: kind for kind, groups in KINDS.items() for group in groups.split()}
LEFT_OUT = (
    "country-flag subdivision-flag flag keycap alphanum family skin-tone hair-style person-symbol "
    "zodiac av-symbol transport-sign punctuation math currency gender"
)
CLOCK = re.compile("o.clock|thirty")
ONE_WAY = re.compile("left|right|arrow|pointing|direction")  # not to be mirrored


def concepts_of(labels, subgroups, pictures):
    """[{"name", "kind", "keywords", "code", "pictures": {artist: file}}], in Unicode's order.

    labels and subgroups are emojibase's en/data.json and its groups' names; pictures {artist:
    {file: ...}} says what was drawn. A concept needs a picture of every artist but the last and the
    moving ones.
    """
    concepts = []
    for label in labels:
        group = subgroups.get(str(label.get("subgroup")))
        name = label["label"].replace("’", "'").replace("“", "").replace("”", "")
        if group is None or not _is_a_thing(name, group, label["hexcode"]):
            continue
        drawn = {artist: file for artist, files in pictures.items()
                 if (file := _file(label["hexcode"], files))}  # fmt: skip
        if drawn.keys() >= {*TRAINED, UNSEEN}:
            name = name if re.search("[A-Z]{2}", name) else name.lower()
            concepts.append(dict(
                name=name, kind=KIND_OF.get(group), keywords=label.get("tags", []),
                code=label["hexcode"], pictures=drawn,
            ))  # fmt: skip
    return concepts


def _is_a_thing(name, group, code):
    gendered = name.split()[0] in ("man", "woman", "men", "women") and " " in name and "-" in code
    twin = group.startswith("person") and gendered
    clock = group == "time" and CLOCK.search(name)
    return not (group in LEFT_OUT.split() or clock or twin or "facing right" in name)


def _file(code, files):
    """The picture of a code point in an artist's files, which name it in one of four ways."""
    for name in (code.lower(), code, f"{code.lower()}-fe0f", code.replace("-FE0F", "").lower(),
                 code.replace("-FE0F", "")):  # fmt: skip
        for end in (".png", ".webp", ".svg"):
            if name + end in files:
                return name + end
    return None


class Concepts:
    """What `parts.fetch` has unpacked: concepts, kinds, and the split.

    seen and held are the indices of the concepts that training may use, and of those that it must
    not: a tenth of each kind.
    """

    def __init__(self, folder):
        self.folder = folder / "emoji"
        self.all = json.loads((self.folder / "concepts.json").read_bytes())
        rng, by_kind = np.random.default_rng(SPLIT_SEED), {}
        for i, concept in enumerate(self.all):
            by_kind.setdefault(concept["kind"], []).append(i)
        drawn = (rng.permutation(by_kind[k])[: round(len(by_kind[k]) * HELD_SHARE)]
                 for k in sorted(by_kind, key=str))  # fmt: skip
        self.held = sorted(int(i) for some_of_a_kind in drawn for i in some_of_a_kind)
        self.seen = sorted(set(range(len(self.all))) - set(self.held))
        self.kinds = sorted({k for i in self.seen if (k := self.kind(i))})

    def __len__(self):
        return len(self.all)

    def name(self, i):
        """The name of concept i."""
        return self.all[i]["name"]

    def kind(self, i):
        """The kind of concept i, None if it has none."""
        return self.all[i]["kind"]

    def picture(self, i, artist):
        """An RGBA image; KeyError if this artist has not drawn it."""
        return read_rgba(self.path(i, artist))

    def path(self, i, artist):
        """Where an artist's picture of concept i lies; KeyError if there is none."""
        return self.folder / artist / self.all[i]["pictures"][artist]

    def drawn_by(self, artist, indices):
        """Those of the concepts that an artist has drawn."""
        return [i for i in indices if artist in self.all[i]["pictures"]]


def read_rgba(path):
    """A picture with its transparency; an SVG is drawn by the package resvg_py."""
    if path.suffix == ".svg":
        require("resvg_py")
        svg = import_module("resvg_py").svg_to_bytes(svg_path=str(path), width=SIZE, height=SIZE)
        return Image.open(io.BytesIO(bytes(svg))).convert("RGBA")
    with Image.open(path) as image:
        return image.convert("RGBA")


def compose(image, rng=None, flip=True):
    """RGBA -> uint8 [224, 224, 3]: centred on white without an rng; else scaled, shifted, mirrored
    if flip, on a light background that is plain or slopes."""
    box = image.getbbox()
    image = image.crop(box) if box else image
    scale = (190 if rng is None else int(rng.integers(130, 216))) / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    if rng is not None and flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    ground = Image.fromarray(_ground(rng)).convert("RGBA")
    spare = SIZE - np.array(image.size)
    x, y = spare // 2 if rng is None else rng.integers(0, spare + 1)
    ground.alpha_composite(image, (int(x), int(y)))
    return np.asarray(ground.convert("RGB"))


def _ground(rng):
    """uint8 [224, 224, 3]: white, one light colour, or a slope between two of them."""
    if rng is None:
        return np.full((SIZE, SIZE, 3), 255, np.uint8)
    first, last = rng.integers(180, 256, (2, 3))
    slope = np.linspace(0, rng.random() < 0.5, SIZE)[:, None, None]
    slope = slope if rng.random() < 0.5 else slope.swapaxes(0, 1)
    ground = first + (last - first) * slope
    return np.broadcast_to(ground, (SIZE, SIZE, 3)).astype(np.uint8)
