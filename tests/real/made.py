"""Small parts as `python -m miniflamingo real fetch` leaves them, made up: a random Llama of 14
blocks, a random EfficientNet-Lite0, and forty concepts of plain shapes."""

import json

import numpy as np
from PIL import Image, ImageDraw

from miniflamingo.module import save_tensors
from miniflamingo.real import features, parts
from miniflamingo.real.pictures import KINDS
from tests.interop.made import LLAMA, gguf_llama, save_gguf, tables, trained
from tests.interop.test_eyes import random_lite0

SMALL = LLAMA | {"num_hidden_layers": 14}
NAMES = ("red", "green", "blue", "white")
ARTISTS = ("noto", "fluent", "twemoji", "openmoji")


def toy_parts(folder):
    """Write them; returns the folder."""
    metadata, tensors = gguf_llama(SMALL)
    save_gguf(folder / "smollm2.gguf", metadata | tables(trained()), tensors)
    eye = {n: x for n, x in random_lite0().items() if x.dtype.kind == "f"}
    save_tensors(folder / "eye.safetensors", {n: np.float32(x) for n, x in eye.items()})
    concepts = []
    for i in range(40):
        kind = sorted(KINDS)[i % 4]
        code = f"{i:04X}"
        concepts.append(dict(
            name=f"{NAMES[i % 4]} {i}", kind=kind, keywords=[kind, "thing"], code=code,
            pictures={artist: f"{code}.png" for artist in (*ARTISTS, "moving")},
        ))  # fmt: skip
    (folder / "emoji" / "moving").mkdir(parents=True)
    for i, concept in enumerate(concepts):
        first, *others = (draw(i, artist) for artist in ARTISTS)
        path = folder / "emoji" / "moving" / concept["pictures"]["moving"]
        first.save(path, save_all=True, append_images=others)
    for artist in ARTISTS:
        (folder / "emoji" / artist).mkdir(parents=True)
        for i, concept in enumerate(concepts):
            draw(i, artist).save(folder / "emoji" / artist / concept["pictures"][artist])
    (folder / "emoji" / "concepts.json").write_text(json.dumps(concepts), "utf-8")
    files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    about = {"parts": parts._identity(), "files": files}
    (folder / "parts.json").write_text(json.dumps(about), "utf-8")
    return folder


def draw(i, artist):
    """A transparent picture: a disc in the concept's colour, as large as the artist draws."""
    image = Image.new("RGBA", (32, 32))
    size = 8 + 2 * ARTISTS.index(artist)
    colour = tuple(int(x) for x in np.random.default_rng(i).integers(0, 255, 3))
    ImageDraw.Draw(image).ellipse((16 - size, 16 - size, 16 + size, 12 + size), fill=colour)
    return image


def toy_features(folder, versions=2):
    """Random features in the place of the eye's, which would take minutes."""
    rng = np.random.default_rng(0)
    for artist in ARTISTS:
        shape = (40, max(versions, features.VERSIONS[artist]), features.GRID, features.WIDTH)
        features.save(folder / f"features-{artist}.npy", rng.normal(size=shape).astype(np.float16))
    return folder
