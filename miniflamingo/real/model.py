"""The parts and a bridge as one Flamingo, and the bridge alone as a file.

Two things differ from the paper's start, and both are measured with and without: the resampler
begins from a contrastive warm start (stages.py), because this eye, unlike the paper's, was never
trained with text; and each inserted layer's branches begin in proportion to the residual stream
that they are added to, because tanh cannot reach a scale of its own. SmolLM2's stream grows from
0.1 at block 0 to 5 and more.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from miniflamingo.checks import from_json
from miniflamingo.dialects import Dialect
from miniflamingo.efficientnet import EfficientNetConfig
from miniflamingo.flamingo import (
    Flamingo,
    FlamingoConfig,
    ShapesOnly,
    build_gated_xattn,
    build_resampler,
)
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.interop.streaming import load
from miniflamingo.interop.tokenizer import tokenizer_of
from miniflamingo.module import save_tensors
from miniflamingo.real.documents import BOS, EOC, IMAGE
from miniflamingo.real.features import open_eye
from miniflamingo.tensorfile import TensorFile

BRIDGE = FlamingoConfig(
    EfficientNetConfig(), media_dim=192, num_latents=16, resampler_depth=1, resampler_heads=3,
    resampler_head_dim=64, num_frames=4, xattn_every=6, xattn_heads=4, xattn_head_dim=64,
    skip_without_image=True, eoc_token=EOC, image_token=IMAGE,
    dialect=Dialect(hidden=224, offset=4),
)  # fmt: skip
SHIPPED = Path(__file__).with_name("weights")
BRIDGE_FILE = SHIPPED / "model.safetensors"
SENTENCE = " a cat face and a red apple on a wooden table"


def assemble(folder, config=BRIDGE, seed=0, scale=0.3):
    """-> a Flamingo of the parts in `folder` with a new bridge, and the ForeignTokenizer.

    scale: each branch's output, as a share of the residual stream at its place, at the start; 0
    leaves the branches as they are drawn.
    """
    checkpoint = open_checkpoint(Path(folder) / "smollm2.gguf")
    words, lm = tokenizer_of(checkpoint), load(checkpoint)
    config = replace(config, lm=lm.config)
    model = Flamingo(config, rng=ShapesOnly())
    model.lm, model.vision_encoder = lm.freeze(), open_eye(folder).freeze()
    rng = np.random.default_rng([seed, 0])
    model.resampler = build_resampler(config, rng=rng)
    model.resampler.time_embeddings.data[...] = 0  # a picture is no first frame
    model.resampler.spatial_embeddings.data *= 0.1
    model.gated_xattn = build_gated_xattn(config, rng=rng)
    if scale:
        scale_branches(model, words.encode(SENTENCE), scale, rng)
    return model, words


def residual_stream(lm, tokens):
    """Yield what comes before each block of a LanguageModel, [B, L, D], reading tokens [B, L]."""
    tokens = np.asarray(tokens)
    positions = np.arange(tokens.shape[1])[None]
    bias, x = lm.causality(positions, tokens.shape[1]), lm.embed(tokens, positions)
    for block in lm.blocks:
        yield x
        x = block(x, None, bias, None, positions)


def scale_branches(model, ids, scale, rng):
    """Multiply the last weights of each inserted layer's branches, so that each adds `scale` times
    the residual stream's standard deviation where its gate is open. The first token is left out:
    there the stream is a hundred times as large."""
    streams = list(residual_stream(model.lm, [[BOS, *ids]]))
    c = model.config
    for layer, i in zip(model.gated_xattn, c.layers()):
        y = streams[i][:, 1:]
        media = rng.normal(size=(1, 1, c.num_latents, c.media_dim)).astype(np.float32)
        seen = layer.attention.out_proj(layer.project_media(media)[1].reshape(c.num_latents, -1))
        for weight, out in ((layer.attention.out_proj.weight, seen),
                            (layer.ffw.down.weight, layer.ffw(y))):  # fmt: skip
            weight.data *= np.float32(scale * y.std() / out.std())


# --- the bridge as a file -------------------------------------------------------------------------


def trained(model):
    """{name: array} of what is not frozen."""
    return {n: p.data for n, p in model.named_parameters() if p.requires_grad}


def save_bridge(path, model, about=None):
    """Write the trained parts alone, in float16, with the sizes that they belong to."""
    sizes = {name: getattr(model.config, name) for name in SIZES}
    sizes |= {name: getattr(model.config.dialect, name) for name in ("hidden", "offset")}
    state = {n: np.asarray(x, np.float16) for n, x in trained(model).items()}
    save_tensors(path, state, {"bridge": json.dumps(sizes), "about": json.dumps(about or {})})


SIZES = (
    "media_dim", "num_latents", "resampler_depth", "resampler_heads", "resampler_head_dim",
    "num_frames", "xattn_every", "xattn_heads", "xattn_head_dim",
)  # fmt: skip


def load_bridge(folder, path=BRIDGE_FILE):
    """-> the Flamingo of the parts in `folder` with a bridge of save_bridge, and the tokenizer.

    ValueError for a file that holds no such bridge.
    """
    file = TensorFile(path)
    if "bridge" not in file.metadata:
        raise ValueError(f"{path} holds no bridge between real parts")
    sizes = from_json(file.metadata["bridge"], path)
    dialect = Dialect(hidden=sizes.pop("hidden"), offset=sizes.pop("offset"))
    model, words = assemble(folder, replace(BRIDGE, **sizes, dialect=dialect), scale=0)
    state = {n: np.asarray(x, np.float32) for n, x in file.arrays().items()}
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if faults := sorted(own.keys() ^ state.keys()) or [
        n for n, p in own.items() if p.shape != state[n].shape
    ]:
        raise ValueError(f"{path} does not fit its sizes: {', '.join(faults[:5])}")
    for name, parameter in own.items():
        parameter.data = state[name]
    return model, words
