"""Every picture, seen once by the frozen eye: float16 [pictures, 49, 320], a file for each artist.

What is kept is the grid before EfficientNet's last layer, a quarter as wide as what that gives;
`Eye.widen` is applied when a batch is drawn. Version 0 of a picture is plain, centred on white; the
others are composed at random. Two versions of the artists that are tested, five of the trained.
"""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from miniflamingo.command import in_processes
from miniflamingo.interop import efficientnet
from miniflamingo.module import write_atomically
from miniflamingo.real.pictures import LAST, ONE_WAY, TRAINED, UNSEEN, Concepts, compose
from miniflamingo.tensorfile import TensorFile

VERSIONS = {**dict.fromkeys(TRAINED, 5), UNSEEN: 2, LAST: 2}
GRID, WIDTH = 49, 320
CHUNK = 64  # concepts that a process encodes at a time


def open_eye(folder):
    """The frozen EfficientNetLite of the parts in `folder`."""
    state = TensorFile(Path(folder) / "eye.safetensors").arrays()
    return efficientnet.build({}, state)


def encode(eye, pixels):
    """uint8 [B, 224, 224, 3] -> float16 [B, 49, 320], one by one: that stays in the cache."""
    grids = [eye.grid(np.float32(image[None]) / 255) for image in pixels]
    return np.concatenate(grids).reshape(len(pixels), GRID, WIDTH).astype(np.float16)


def picture(concepts, i, artist, version):
    """uint8 [224, 224, 3], the same whenever it is asked for."""
    rng = None
    if version:
        rng = np.random.default_rng([version, i, sorted(VERSIONS).index(artist)])
    flip = not ONE_WAY.search(concepts.name(i))
    return compose(concepts.picture(i, artist), rng, flip)


def encode_chunk(folder, artist, first):
    """float16 [concepts of a chunk, versions, 49, 320]; zeros for what was not drawn."""
    with threadpool_limits(1):
        eye = open_eye(folder)
        return encode_with(lambda pixels: encode(eye, pixels), folder, artist, first)


def encode_with(see, folder, artist, first):
    """As encode_chunk, by `see` (uint8 [B, 224, 224, 3] -> float16 [B, 49, 320])."""
    concepts = Concepts(Path(folder))
    indices = range(first, min(first + CHUNK, len(concepts)))
    out = np.zeros((len(indices), VERSIONS[artist], GRID, WIDTH), np.float16)
    for row, i in zip(out, indices):
        if artist in concepts.all[i]["pictures"]:
            row[:] = see(np.stack([picture(concepts, i, artist, v) for v in range(len(row))]))
    return out


def compute(folder, artists=tuple(VERSIONS), work=encode_chunk, processes=None, progress=True):
    """Write folder/features-ARTIST.npy, those that are not there.

    work: encode_chunk, or the same in torch (kernels/model/real.py), which is faster. What is
    there is kept; what is stopped leaves whole artists alone.
    """
    folder = Path(folder)
    total = len(Concepts(folder))
    for artist in artists:
        path = folder / f"features-{artist}.npy"
        if path.is_file():
            continue
        firsts = list(range(0, total, CHUNK))
        rows = in_processes(processes or os.cpu_count(), work, [folder] * len(firsts),
                            [artist] * len(firsts), firsts, method="spawn")  # fmt: skip
        bar = tqdm(rows, f"pictures by {artist}", len(firsts), disable=not progress)
        save(path, np.concatenate(list(bar)))


def save(path, array):
    """Write an .npy file, whole or not at all."""
    data = BytesIO()
    np.save(data, array)
    write_atomically(path, data.getbuffer())


def widen(eye, grids):
    """float16 [..., S, 320] -> float32 [..., S, 1280], what the eye gives in the end."""
    flat = np.asarray(grids, np.float32).reshape(-1, 1, *grids.shape[-2:])
    return eye.widen(flat).reshape(*grids.shape[:-1], -1)


class Features:
    """The features of a folder by concept, artist and version, mapped from the disk."""

    def __init__(self, folder, eye=None):
        self.folder, self.files = Path(folder), {}
        self.eye = eye or open_eye(folder)

    def grids(self, artist):
        """float16 [concepts, versions, 49, 320] of an artist; ValueError if they are missing."""
        if artist not in self.files:
            path = self.folder / f"features-{artist}.npy"
            if not path.is_file():
                raise ValueError(f"{path} is missing: python -m miniflamingo real features")
            self.files[artist] = np.load(path, mmap_mode="r")
        return self.files[artist]

    def get(self, pictures):
        """[(concept, artist, version)] -> float32 [len(pictures), 49, 1280]."""
        return widen(self.eye, self._grids(pictures))

    def _grids(self, pictures):
        return np.stack([self.grids(artist)[i, v] for i, artist, v in pictures])

    def stacked(self, documents):
        """Pictures and clips by document -> places int[B, N] among the P stills and then the Q
        clips, stills float32 [P, 1, 49, 1280], clips float32 [Q, T, 49, 1280].

        A picture is (concept, artist, version), a clip a tuple of such, all of one length. A
        document with fewer than N has place 0 there, which no token of it looks at.
        """
        flat = [x for document in documents for x in document]
        stills = [x for x in flat if isinstance(x[1], str)]
        clips = [x for x in flat if not isinstance(x[1], str)]
        where = iter(range(len(stills))), iter(range(len(stills), len(flat)))
        places = np.zeros((len(documents), max(map(len, documents))), int)
        for row, document in zip(places, documents):
            row[: len(document)] = [next(where[not isinstance(x[1], str)]) for x in document]
        none = np.zeros(0, np.float32)
        one = self.get(stills)[:, None] if stills else none
        frames = np.stack([self.get(clip) for clip in clips]) if clips else none
        return places, one, frames
