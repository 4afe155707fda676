"""Another project's model answers: texts and images -> ids and phi, as its processor makes them,
-> tokens, one by one; and where the time goes.

    python -m miniflamingo generate --weights FOLDER_OR_FILE --text "The capital of France is"
"""

import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from miniflamingo import decoding
from miniflamingo.attention import KeyValueCache
from miniflamingo.eyes import NoEyeConfig
from miniflamingo.flamingo import FlamingoConfig
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.interop.inspection import name_of
from miniflamingo.interop.preprocess import Preprocessor, TiledPreprocessor, preprocessor_of
from miniflamingo.interop.streaming import Layers, load, text_config_of
from miniflamingo.interop.tokenizer import tokenizer_of
from miniflamingo.pictures import read_picture
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
    """Yield up to `most` ids that follow a prompt; ends before one of `ends`.

    FloatingPointError where the model's numbers are too large for their dtype.
    """
    clock = clock or Clock()
    what = "prefill"
    for _ in range(most):
        with clock.on(what), np.errstate(over="ignore", invalid="ignore"):
            logits = speaker.extend(ids, phi)
        if not np.isfinite(logits).all():
            raise FloatingPointError("the logits are not finite: the model's numbers are too "
                                     f"large for {logits.dtype}")  # fmt: skip
        token = int(choose(logits, rng)[0])
        if token in ends:
            return
        yield token
        ids, phi, what = [token], phi[-1:], "tokens"


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
            checkpoint, words, pictures, config = _opened(path, request)
        ids, phi = _prompt(request, words, format_of(checkpoint, config))
        check_room(config, len(ids), request.most, checkpoint.config)
        pixels = _seen(request, pictures, config, checkpoint.folder, clock)
        with clock.on("reading"):
            model = load(checkpoint, layers, lambda _: config)
        if layers is not None:
            bar.total = request.most * len(layers.layers)
            print(estimate(layers, len(ids), request.most), file=sys.stderr, flush=True)
        speaker = Speaker(model, len(ids) + request.most, pixels, clock)
        rng, choose = np.random.default_rng(request.seed), request.choose
        steps = speak(speaker, ids, phi, request.most, choose, rng, words.ends, clock)
        for piece in words.stream(steps):
            print(piece, end="", flush=True)
    print(flush=True)
    print(report(clock, layers), file=sys.stderr, flush=True)


def _opened(path, request):
    """-> checkpoint, its tokenizer, its Preprocessor, its config; ValueError as `generate`."""
    checkpoint = open_checkpoint(path, request.allow_pickle)
    config, words = text_config_of(checkpoint), tokenizer_of(checkpoint)
    words.check(_lm(config).vocab_size)
    pictures = Preprocessor()
    if any(kind == "image" for kind, _ in request.parts):
        pictures = preprocessor_of(checkpoint.folder, *_side(config))
        check_tiles(config, pictures)
    return checkpoint, words, pictures, with_pixels(config, pictures)


def _lm(config):
    """The LanguageConfig of a FlamingoConfig, or the config itself."""
    return config.lm if isinstance(config, FlamingoConfig) else config


def _side(config):
    """(pixels of a side), of the eye of a FlamingoConfig that sees squares, or ()."""
    sees = isinstance(config, FlamingoConfig) and isinstance(config.vision, ViTConfig)
    return (config.vision.image_size,) if sees else ()


def format_of(checkpoint, config):
    """The ImageFormat of a checkpoint, None for a model that reads no images."""
    eye = getattr(config, "vision", None)
    return None if isinstance(eye, NoEyeConfig) else FORMATS.get(name_of(checkpoint))


def _prompt(request, words, form):
    if not request.chat:
        return build_prompt(request.parts, words, form)
    if [kind for kind, _ in request.parts] != ["text"]:
        raise ValueError("--chat takes one --text, and no image")
    ids = words.chat(request.parts[0][1])
    return np.array(ids), np.zeros(len(ids), int)


def check_room(config, prompt, most, about):
    """ValueError where a model with learned positions has too few for a prompt and `most` tokens,
    and a warning where others were trained with fewer, as `about`, its config.json, says.

    The last token is written and not read.
    """
    lm, of = _lm(config), f"a prompt of {prompt} tokens and --max-new-tokens {most}"
    if lm.positions == "learned" and prompt + most - 1 > lm.max_positions:
        raise ValueError(f"the model has {lm.max_positions} positions: too few for {of}")
    about = about.get("lang_config") or about.get("text_config") or about
    length = about.get("max_position_embeddings") or about.get("max_seq_len")
    if lm.positions == "rotary" and length and prompt + most - 1 > length:
        warnings.warn(f"the model was trained with {length} positions: fewer than {of}; the "
                      "answer may make no sense", stacklevel=2)  # fmt: skip


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


def _seen(request, pictures, config, folder, clock):
    """The pixels of a request's images; ValueError that names a picture that cannot be read, or the
    preprocessor_config.json that does not fit the eye."""
    images = [Path(content) for kind, content in request.parts if kind == "image"]
    pixels = _pixels([read_picture(image, still=True) for image in images], pictures, clock)
    for height, width in (x.shape[:2] for x in pixels if _side(config)):
        if (height, width) != 2 * _side(config):
            side = _side(config)[0]
            raise ValueError(f"{folder}: its preprocessor_config.json makes pictures of {width} x "
                             f"{height} pixels, its eye sees {side} x {side}")  # fmt: skip
    return pixels


def estimate(layers, prompt, most):
    """The line that says, before it starts, what streaming will take: from one layer, tried."""
    first, each = (layers.measure(rows) * layers.bytes() for rows in (prompt, 1))
    total = first + (most - 1) * each
    return (f"streaming {_amount(layers.bytes())} of layers for every token: {_span(each)} "
            f"for each token, {_span(total)} for the prompt and {most} tokens")  # fmt: skip


def _amount(count):
    """1270000000 -> 1.3 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _span(seconds):
    """About how long that is: 0.3 -> under a second, 7.21 -> about 7 s."""
    if seconds < 1:
        return "under a second"
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} minutes"


def report(clock, layers=None):
    """The line that says where the time went."""
    line = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in clock.spent.items())
    if after := clock.times["tokens"]:
        line += f" for {after} more tokens ({1e3 * clock.spent['tokens'] / after:.0f} ms each)"
    if layers is None:
        return line
    read = f"{layers.seconds:.2f} s for reading {_amount(layers.read_bytes)}"
    return f"{line}; of all that, {read}"
