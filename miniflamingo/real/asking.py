"""Asking the real Flamingo about anybody's pictures: a prompt of texts, images and clips, and an
answer, token by token."""

import sys

import numpy as np

from miniflamingo.decoding import DecodingCache, greedy
from miniflamingo.interop.generation import Clock, report
from miniflamingo.prompt import read_frames
from miniflamingo.real import model as models
from miniflamingo.real import parts
from miniflamingo.real.documents import BOS, EOC, IMAGE
from miniflamingo.real.features import widen
from miniflamingo.real.pictures import SIZE

FRAMES = 8  # at most of a clip


def read_prompt(parts, words):
    """[str | picture | [pictures]] -> ids int[L], phi int[L], frames [[T, 224, 224, 3]].

    A picture is what prompt.read_frames takes, a list a clip. A picture that follows an answer
    ends it: `<EOC>` stands before it. ValueError for a picture that is none.
    """
    ids, phi, media = [BOS], [0], []
    for part in parts:
        if isinstance(part, str):
            new = words.encode(part if part.startswith((" ", "\n")) else f" {part}")
        else:
            new = [IMAGE] if not media or ids[-1] in (IMAGE, EOC) else [EOC, IMAGE]
            phi += [len(media)] * (len(new) - 1)
            ids += new[:-1]
            new = new[-1:]
            media.append(read_frames(part, SIZE))
        ids += new
        phi += [len(media)] * len(new)
    return np.array(ids), np.array(phi), media


def visual_tokens(model, media):
    """[[T, 224, 224, 3]] -> [1, N, R, D_m]; each picture and each frame is seen alone."""
    c = model.config
    tokens = [np.zeros((1, 0, c.num_latents, c.media_dim), np.float32)]
    for frames in media:
        grids = np.concatenate([model.vision_encoder.grid(frame[None]) for frame in frames])
        grids = grids.reshape(1, 1, len(frames), -1, grids.shape[-1])
        tokens.append(model.resampler(widen(model.vision_encoder, grids)))
    return np.concatenate(tokens, axis=1)


def speak(model, words, parts, most=20, choose=greedy, rng=None, clock=None):
    """Yield the ids of an answer to a prompt, up to its `<EOC>`."""
    clock = clock or Clock()
    with clock.on("eye"):
        ids, phi, media = read_prompt(parts, words)
        media = visual_tokens(model, media)
    yield from go_on(model, ids, phi, media, most, choose, rng, clock)


def go_on(model, ids, phi, media, most, choose=greedy, rng=None, clock=None):
    """Yield the ids behind int[L] ids, which look at phi int[L] of media [1, N, R, D_m]."""
    clock = clock or Clock()
    with clock.on("prefill"):
        cache = DecodingCache.of(model, media, len(ids) + most)
        positions = np.arange(len(ids))[None]
        logits = model.read(ids[None], None, phi[None], cache, positions, last=True)[:, 0]
    for step in range(most):
        token = int(choose(logits, rng)[0])
        if token == EOC:
            return
        yield token
        if step < most - 1:
            with clock.on("tokens"):
                positions = np.array([[len(ids) + step]])
                new = np.array([[token]])
                logits = model.read(new, None, phi[None, -1:], cache, positions, last=True)[:, 0]


def answer_aloud(folder, bridge, prompt, most, choose, rng):
    """Print an answer piece by piece, and to stderr where the time went; bridge: the shipped one
    where it is None. ValueError where the parts are not there."""
    if not parts.ready(folder):
        raise ValueError(f"{folder} has not all parts: python -m miniflamingo real fetch")
    clock = Clock()
    with clock.on("reading"):
        model, words = models.load_bridge(folder, bridge or models.BRIDGE_FILE)
    for piece in words.stream(speak(model, words, prompt, most, choose, rng, clock)):
        print(piece, end="", flush=True)
    print(flush=True)
    print(report(clock), file=sys.stderr, flush=True)


def answer(model, words, parts, most=20):
    """The answer as a text."""
    return words.decode(list(speak(model, words, parts, most))).strip()
