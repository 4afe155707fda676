"""Another project's model answers: texts and images -> ids and phi, as its processor makes them,
-> tokens, one by one; and where the time goes.

    python -m miniflamingo generate --weights FOLDER_OR_FILE --text "The capital of France is"
"""

import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from miniflamingo import decoding
from miniflamingo.attention import KeyValueCache
from miniflamingo.eyes import NoEyeConfig
from miniflamingo.flamingo import FlamingoConfig
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.interop.inspection import name_of
from miniflamingo.interop.preprocess import TiledPreprocessor, preprocessor_of
from miniflamingo.interop.streaming import Layers, load
from miniflamingo.interop.tokenizer import tokenizer_of
from miniflamingo.tiled_vit import TiledViTConfig, beside
from miniflamingo.vit import ViTConfig


@dataclass(frozen=True)
class ImageFormat:
    """The special tokens that stand for an image: before it, the image's own, and after it, which
    two images in a row share where it is the same; what ends a text before an image; what begins
    the prompt behind the images that it starts with; and whether text behind two images in a row
    looks at both (together), which phi cannot say."""

    image: str
    around: str | None = None
    end: str | None = None
    begin: str | None = None
    together: bool = False

    def opened(self, words, before, seen, last=None):
        """The ids that end what was before an image ("text", "image", None) and open its own; last
        is the id before it. ValueError for a second image in a row where text would see both."""
        if self.together and last == words.id_of(self.image):
            raise ValueError("two images in a row: text behind them would look at both, and here "
                             "a token looks at one: give each --image a --text")  # fmt: skip
        ids = [words.id_of(self.end)] if self.end and before == "text" and seen else []
        return ids + ([words.id_of(self.around)] if self.around and before != "image" else [])

    def begun(self, parts):
        """The parts with what begins the text, as a ("token", str), behind the first images."""
        first = next((i for i, (kind, _) in enumerate(parts) if kind == "text"), len(parts))
        return [*parts[:first], *([("token", self.begin)] if self.begin else []), *parts[first:]]

    def shown(self, words):
        """The ids of the image itself, and of what closes it."""
        return [words.id_of(token) for token in (self.image, self.around) if token]


FORMATS = {
    "idefics": ImageFormat("<image>", around="<fake_token_around_image>"),
    "open_flamingo": ImageFormat("<image>", end="<|endofchunk|>"),
    "mllama": ImageFormat("<|image|>", begin="<|begin_of_text|>", together=True),
}


def build_prompt(parts, words, form):
    """[("text", str) | ("image", source)] -> ids [L] and phi [L], from 0: no image so far.

    ValueError for an image where `form` is None, and a special token that the tokenizer lacks.
    """
    ids, phi, seen, before = list(words.start), [], 0, None
    for kind, content in form.begun(parts) if form else parts:
        if kind == "text":
            ids += words.encode(content)
        elif kind == "token":
            token = [words.id_of(content)]
            ids += token if ids[-1:] != token else []
        elif form is None:
            raise ValueError("this model reads no images here: give it --text alone")
        else:
            ids += form.opened(words, before, seen, *ids[-1:])
            phi += [seen] * (len(ids) - len(phi))
            seen += 1
            ids += form.shown(words)
        before = kind
    phi += [seen] * (len(ids) - len(phi))
    if not ids:
        raise ValueError("a prompt needs at least one token")
    return np.array(ids), np.array(phi)


class Clock:
    """Seconds, and how many times, by what they were spent on: clock.spent, clock.times."""

    def __init__(self):
        self.spent, self.times = {}, Counter()

    @contextmanager
    def on(self, what):
        """Count the time of a `with` block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - start
            self.times[what] += 1


class Speaker:
    """One sequence being written by a LanguageModel or a Flamingo, with room for `length` tokens.

    pixels [N, height, width, 3] in [0, 1], for a Flamingo; for one with a TiledViT a list of N
    canvases.
    """

    def __init__(self, model, length, pixels=(), clock=None):
        self.model, self.position, clock = model, 0, clock or Clock()
        self.sees = isinstance(model.config, FlamingoConfig)
        lm = model.config.lm if self.sees else model.config
        shape = (1, length, *lm.kv_shape, np.float32)
        if not self.sees:
            self.cache = [KeyValueCache(*shape) for _ in range(lm.depth)]
            return
        media = np.zeros((1, 0, model.config.num_latents, model.config.media_dim), np.float32)
        if len(pixels):
            with clock.on("eye"):
                media = look(model, pixels)
        with clock.on("prefill"):
            self.cache = decoding.DecodingCache.of(model, media, length)

    def extend(self, ids, phi):
        """Read ids [L] with phi [L]; the logits [1, V] of what comes next."""
        tokens, phi = np.asarray(ids)[None], np.asarray(phi)[None]
        positions = self.position + np.arange(tokens.shape[1])[None]
        self.position += tokens.shape[1]
        if self.sees:
            return self.model.read(tokens, None, phi, self.cache, positions, last=True)[:, 0]
        return self.model(tokens, positions, self.cache, last=True)[:, 0]


def look(model, pixels):
    """N images as a Speaker takes them -> the media [1, N, R, D_m] of a Flamingo."""
    tiled = isinstance(model.config.vision, TiledViTConfig)
    groups = [[x] for x in pixels] if tiled else [pixels]  # canvases differ in shape: one by one
    groups = (np.asarray(group, np.float32)[None, :, None] for group in groups)
    return beside(*(model.resampler(model.encode(group)) for group in groups))


def speak(speaker, ids, phi, most, choose=decoding.greedy, rng=None, ends=(), clock=None):
    """Yield up to `most` ids that follow a prompt; ends before one of `ends`."""
    clock = clock or Clock()
    with clock.on("prefill"):
        logits = speaker.extend(ids, phi)
    for step in range(most):
        token = int(choose(logits, rng)[0])
        if token in ends:
            return
        yield token
        if step < most - 1:
            with clock.on("tokens"):
                logits = speaker.extend([token], phi[-1:])


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is asked of a checkpoint: parts of the prompt, and how to answer them.

    keep is the bytes of weights that may stay in memory where `stream` is set.
    """

    parts: tuple
    most: int = 20
    choose: object = decoding.greedy
    seed: int = 0
    chat: bool = False
    stream: bool = False
    keep: int = 0
    allow_pickle: bool = False


def generate(path, request):
    """Answer from the checkpoint at `path`: print the text piece by piece, the time to stderr.

    ValueError in one line for a checkpoint, a tokenizer, an image or a prompt that cannot be.
    """
    clock = Clock()
    with tqdm(disable=None if request.stream else True, unit="layer", leave=False) as bar:
        layers = Layers(request.keep, bar.update) if request.stream else None
        with clock.on("reading"):
            checkpoint, words, pictures, model = _opened(path, request, layers)
        ids, phi = _prompt(request, words, format_of(checkpoint, model))
        check_room(model, len(ids), request.most)
        if layers is not None:
            bar.total = request.most * len(layers.layers)
            print(estimate(layers, len(ids), request.most), file=sys.stderr, flush=True)
        images = [content for kind, content in request.parts if kind == "image"]
        speaker = Speaker(model, len(ids) + request.most, _pixels(images, pictures, clock), clock)
        rng, choose = np.random.default_rng(request.seed), request.choose
        steps = speak(speaker, ids, phi, request.most, choose, rng, words.ends, clock)
        for piece in words.stream(steps):
            print(piece, end="", flush=True)
    print(flush=True)
    print(report(clock, layers), file=sys.stderr, flush=True)


def _opened(path, request, layers):
    """-> checkpoint, its tokenizer, its Preprocessor, the model; ValueError as `generate`."""
    checkpoint = open_checkpoint(path, request.allow_pickle)
    words, pictures = tokenizer_of(checkpoint), preprocessor_of(checkpoint.folder)
    images = any(kind == "image" for kind, _ in request.parts)

    def change(config):
        if images:
            check_tiles(config, pictures)
        return with_pixels(config, pictures)

    model = load(checkpoint, layers, change)
    words.check(len((model.lm if hasattr(model, "lm") else model).embedding.weight))
    return checkpoint, words, pictures, model


def format_of(checkpoint, model):
    """The ImageFormat of a checkpoint, None for a model that reads no images."""
    eye = getattr(model.config, "vision", None)
    return None if isinstance(eye, NoEyeConfig) else FORMATS.get(name_of(checkpoint))


def _prompt(request, words, form):
    if not request.chat:
        return build_prompt(request.parts, words, form)
    if [kind for kind, _ in request.parts] != ["text"]:
        raise ValueError("--chat takes one --text, and no image")
    ids = words.chat(request.parts[0][1])
    return np.array(ids), np.zeros(len(ids), int)


def check_room(model, prompt, most):
    """ValueError where a model with learned positions has too few for a prompt and `most` tokens.

    The last token is written and not read.
    """
    lm = model.config.lm if isinstance(model.config, FlamingoConfig) else model.config
    if lm.positions == "learned" and prompt + most - 1 > lm.max_positions:
        raise ValueError(f"the model has {lm.max_positions} positions: too few for a prompt of "
                         f"{prompt} tokens and --max-new-tokens {most}")  # fmt: skip


def check_tiles(config, pictures):
    """ValueError unless the tiles of a checkpoint's Preprocessor are those of its TiledViT."""
    eye = getattr(config, "vision", None)
    if not isinstance(eye, TiledViTConfig):
        return
    own = f"an eye of up to {eye.max_tiles} tiles of {eye.image_size} pixels"
    if not isinstance(pictures, TiledPreprocessor):
        raise ValueError(f"{own} needs a preprocessor_config.json with max_image_tiles")
    if (pictures.tiles, pictures.resize[0]) != (eye.max_tiles, eye.image_size):
        raise ValueError(f"{own} does not fit preprocessor_config.json, which cuts up to "
                         f"{pictures.tiles} of {pictures.resize[0]}")  # fmt: skip


def with_pixels(config, pictures):
    """A config whose eye normalises pixels as a checkpoint's Preprocessor says."""
    kinds = (ViTConfig, TiledViTConfig)
    if not isinstance(config, FlamingoConfig) or not isinstance(config.vision, kinds):
        return config
    scale = 255 * pictures.rescale  # our pixels are in [0, 1]
    mean, std = pictures.mean or (0.0,) * 3, pictures.std or (1.0,) * 3
    mean, std = (tuple(x / scale for x in values) for values in (mean, std))
    return replace(config, vision=replace(config.vision, mean=mean, std=std))


def _pixels(images, pictures, clock=None):
    """Pictures -> a list of [height, width, 3] in [0, 1], resized, and cropped or padded."""
    if not images:
        return []
    with (clock or Clock()).on("eye"):
        return [np.asarray(pictures.fitted(image), np.float32) / 255 for image in images]


def estimate(layers, prompt, most):
    """The line that says, before it starts, what streaming will take: from one layer, tried."""
    first, each = (layers.measure(rows) * layers.bytes() for rows in (prompt, 1))
    total = first + (most - 1) * each
    return (f"streaming {layers.bytes() / 1e9:.2f} GB of layers for every token: about {each:.1f} "
            f"s a token, {_span(total)} for the prompt and {most} tokens")  # fmt: skip


def _span(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def report(clock, layers=None):
    """The line that says where the time went."""
    line = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in clock.spent.items())
    if after := clock.times["tokens"]:
        line += f" for {after} more tokens ({1e3 * clock.spent['tokens'] / after:.0f} ms each)"
    if layers is None:
        return line
    read = f"{layers.seconds:.2f} s for reading {layers.read_bytes / 1e9:.2f} GB"
    return f"{line}; of all that, {read}"
