"""Models from the files that the stages save: looked at first, built when all fits."""

import warnings
from collections import Counter

from miniflamingo.checks import config_from_json
from miniflamingo.flamingo import Flamingo, FlamingoConfig, ShapesOnly
from miniflamingo.language import LanguageConfig, LanguageModel
from miniflamingo.tensorfile import TensorFile, shown
from miniflamingo.vision import NormalizerFreeResNet, VisionConfig
from miniflamingo.vit import ViTConfig

STAGES = {
    "lm": ("language model", LanguageConfig, LanguageModel),
    "vision": ("vision encoder", VisionConfig, NormalizerFreeResNet),
    "flamingo": ("Flamingo", FlamingoConfig, Flamingo),
}


def load_model(path, stage):
    """The model in a file of a stage's `save`: "lm", "vision" or "flamingo".

    The file's metadata, names, shapes and dtypes are looked at before anything of the model's size
    is built. ValueError that names the file, and the field or the tensors, when it is damaged, of
    another stage, or does not fit its own config. Numbers other than float32 are converted, with a
    warning.
    """
    file = TensorFile(path)
    name, kind, build = STAGES[stage]
    if stage not in file.metadata:
        raise ValueError(f"{path} holds no {name}{_what_else(file)}")
    where = f"{path}: config of stage {stage}"
    config = config_from_json(kind, file.metadata[stage], where)
    try:
        check_size(config, file)
        model = build(config, rng=ShapesOnly())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    model.check_header(file)
    model.load_state_dict(file.arrays(), path)
    _say_what_was_converted(file)
    return model


def _say_what_was_converted(file):
    kinds = Counter(d for d in file.dtypes.values() if d != "F32")
    if kinds:
        found = ", ".join(f"{count} tensors of {kind}" for kind, count in kinds.items())
        warnings.warn(f"{file.path}: {found} converted to float32", stacklevel=4)


def _what_else(file):
    for stage, (name, *_) in STAGES.items():
        if stage in file.metadata:
            return f" but a {name} (stage {stage})"
    if {"step", "rng", "config"} <= file.metadata.keys():
        return ", but is the checkpoint of a run: give the model.safetensors beside it"
    return f": its metadata has {shown(sorted(file.metadata))}"


def check_size(config, file):
    """ValueError that names a field of which the model would need more than the file holds.

    By the fields alone, without building anything of their size: layers are held against the number
    of tensors, and what surely lies in the model against the numbers in them.
    """
    tensors, numbers = len(file.shapes), file.size()
    for field, value, layers, least in _needs(config):
        field = f"{field} = {shown(value)}"
        if layers > tensors:
            raise ValueError(f"{field} means {layers} layers, the file has {tensors} tensors")
        if least > numbers:
            raise ValueError(f"{field} means at least {least} numbers, the file has {numbers}")


def _needs(config):
    """Yield (field, its value, how many layers and how many numbers it stands for at least)."""
    if isinstance(config, FlamingoConfig):
        for part in ("lm", "vision"):
            inner = _needs(getattr(config, part))
            yield from ((f"{part}.{field}", *rest) for field, *rest in inner)
        yield from _needs_of_the_bridge(config)
    elif isinstance(config, LanguageConfig):
        c = config
        yield "dim", c.dim, 0, c.dim * c.dim
        yield "depth", c.depth, c.depth, c.depth * c.dim
        yield "vocab_size", c.vocab_size, 0, c.vocab_size * c.dim
        if c.block.hidden:
            yield "block.hidden", c.block.hidden, 0, c.block.hidden * c.dim
        else:
            yield "ffw_mult", c.ffw_mult, 0, c.ffw_mult * c.dim * c.dim
        if c.positions == "learned":
            yield "max_positions", c.max_positions, 0, c.max_positions * c.dim
    else:
        yield from _needs_of_the_eye(config)


def _needs_of_the_eye(c):
    if isinstance(c, VisionConfig):
        yield "stem", c.stem, len(c.stem), sum(c.stem)
        yield "depths", c.depths, sum(c.depths), sum(c.depths)
        yield "widths", c.widths, 0, sum(d * w for d, w in zip(c.depths, c.widths))
        yield "final_width", c.final_width, 0, c.final_width or 0
    elif isinstance(c, ViTConfig):
        yield "dim", c.dim, c.depth, c.depth * c.dim * c.dim
        yield "patch_size", c.patch_size, 0, c.num_tokens * c.dim


def _needs_of_the_bridge(c):
    inserted = len(c.layers())
    yield "media_dim", c.media_dim, 0, c.media_dim * inserted
    if c.dialect.time_embeddings and c.resampler != "none":
        yield "num_frames", c.num_frames, 0, c.num_frames * c.media_dim
    yield "xattn_heads", c.xattn_heads, 0, c.xattn_heads * c.lm.dim
    yield "xattn_head_dim", c.xattn_head_dim, 0, c.xattn_head_dim * c.lm.dim
    if c.resampler == "none":
        return
    depth, heads = c.resampler_depth, c.resampler_heads
    yield "num_latents", c.num_latents, 0, c.num_latents
    yield "resampler_depth", depth, depth, depth * c.media_dim
    if c.resampler != "mlp":
        yield "resampler_heads", heads, 0, heads
    if c.resampler == "perceiver":
        yield "resampler_head_dim", c.resampler_head_dim, 0, c.resampler_head_dim * heads
