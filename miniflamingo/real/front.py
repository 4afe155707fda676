"""The two pictures of the README: the gates of the shipped bridge as they opened, and what the
bridged model answers about pictures that were drawn by lot.

    python -m miniflamingo real front

They lie in front/, with answers.json, which says what was asked, what was answered and whose the
pictures are.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from miniflamingo import outputs, plots
from miniflamingo.real import parts
from miniflamingo.real.asking import answer
from miniflamingo.real.documents import WHAT_KIND
from miniflamingo.real.features import picture
from miniflamingo.real.pictures import UNSEEN, Concepts

FOLDER = Path(__file__).with_name("front")
MADE = ("gates.png", "answers.png", "answers.json")
SEED, EACH = 11, 6
MAKER = "emoji-datasource-twitter"


def draw(model, words, folder, out, alphas):
    """Write MADE into the folder `out`; what an earlier call put there is replaced."""
    with outputs.staged(out, "real-front", MADE) as new:
        figure = plots.plot_alphas(alphas["steps"], alphas["alpha_xattn"], alphas["alpha_dense"])
        save(figure, new / "gates.png")
        concepts = Concepts(Path(folder))
        chosen, found = choose(concepts), []
        pictures = [picture(concepts, i, UNSEEN, 0) for i in chosen]
        for i, image in zip(chosen, pictures):
            said = answer(model, words, [image, WHAT_KIND], 12)
            found.append({"picture": concepts.name(i), "truth": concepts.kind(i), "answer": said,
                          "in training": i in concepts.seen})  # fmt: skip
        sheet = plots.plot_answers(
            [np.asarray(p, np.float32) / 255 for p in pictures],
            [f["answer"] for f in found], [f["answer"] == f["truth"] for f in found], EACH,
        )  # fmt: skip
        save(sheet, new / "answers.png")
        maker = next(part for part in parts.PARTS if part.name == MAKER)
        document = {"made_by": "python -m miniflamingo real front", "seed": SEED,
                    "question": WHAT_KIND.strip(), "pictures": f"{maker.what}: {maker.licence}",
                    "answers": found}  # fmt: skip
        (new / "answers.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def choose(concepts):
    """By lot: EACH concepts of the training, then EACH that it has never seen; all have a kind."""
    rng = np.random.default_rng(SEED)
    drawn = [[i for i in concepts.drawn_by(UNSEEN, some) if concepts.kind(i)]
             for some in (concepts.seen, concepts.held)]  # fmt: skip
    return [int(i) for some in drawn
            for i in rng.choice(some, min(EACH, len(some)), replace=False)]  # fmt: skip


def save(figure, path):
    """A PNG of 128 colours: a third of the bytes, and nobody sees the difference."""
    figure.savefig(path, dpi=100, metadata={"Software": None})
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
