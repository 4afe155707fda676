"""The sides of `python -m miniflamingo scaling` that need torch: our twins, and public blocks.

flamingo-pytorch and open-flamingo are used where they are installed; `make scaling` installs them
into out/peers. Of each the one file that holds its blocks is loaded, which needs torch and einops
alone; the packages themselves import much more. Their blocks have random weights of their own, a
GELU where ours has a squared ReLU, and no norm on the visual tokens: near enough to compare times.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..model import layers

PUBLIC = {"flamingo-pytorch": ("flamingo_pytorch", "flamingo_pytorch.py"),
          "open-flamingo": ("open_flamingo", "src/helpers.py")}  # fmt: skip


@functools.cache
def load(project):
    """A project's file with the blocks, as a module; ImportError that says what is missing."""
    package, file = PUBLIC[project]
    if (found := importlib.util.find_spec(package)) is None:
        raise ImportError(f"{project} is not installed: `make scaling` does so")
    path = Path(found.submodule_search_locations[0], file)
    spec = importlib.util.spec_from_file_location(f"_blocks_of_{package}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing():
    """{project: why it is left out}."""
    reasons = {}
    for project in PUBLIC:
        try:
            load(project)
        except ImportError as error:
            reasons[project] = str(error)
    return reasons


def tensors(arrays):
    """NumPy arrays as tensors that share their memory."""
    return [torch.from_numpy(x) for x in arrays]


def twin(kind, module, *sizes, **options):
    """The torch twin of a NumPy module, with its weights."""
    made = kind(*sizes, **options)
    made.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in module.state_dict().items()})
    return made.eval()


def quietly(work):
    """work, without gradients."""

    def run():
        with torch.inference_mode():
            return work()

    return run


def sides(inputs):
    """{side: function} of what scaling.Inputs describe."""
    torch.set_num_threads(1)
    kinds = {"attention": attention, "perceiver": perceiver, "resampler": resampler,
             "gated": gated, "read": read, "word": word}  # fmt: skip
    made = kinds[inputs.kind](inputs.module, inputs.arrays)
    return {name: quietly(work) for name, work in made.items()}


def attention(module, arrays):
    """Operation by operation, and torch's own."""
    q, k, v = tensors(arrays)

    def eager():
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    return {"torch, eager": eager, "torch, SDPA": lambda: F.scaled_dot_product_attention(q, k, v)}


class Perceiver(nn.Module):
    """miniflamingo.perceiver.Perceiver, with its parameters' names; without a mask."""

    def __init__(self, input_dim, dim, num_latents, depth, self_depth, heads):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_latents, dim))
        self.cross = nn.ModuleList(self._cross(input_dim, dim, heads) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.ModuleList(layers.TransformerBlock(dim, heads, 4 * dim, norm=nn.LayerNorm)
                          for _ in range(self_depth))
            for _ in range(depth)
        )  # fmt: skip

    def _cross(self, input_dim, dim, heads):
        return nn.ModuleDict({
            "input_norm": nn.LayerNorm(input_dim), "latent_norm": nn.LayerNorm(dim),
            "attention": layers.MultiHeadAttention(dim, heads, dim // heads, input_dim),
            "ffw": layers.FeedForward(dim, 4 * dim, "gelu"),
        })  # fmt: skip

    def forward(self, inputs):  # [B, M, D_in] -> [B, R, D]
        x = self.latents.expand(len(inputs), -1, -1)
        for cross, blocks in zip(self.cross, self.blocks):
            x = x + cross["attention"](cross["latent_norm"](x), cross["input_norm"](inputs))
            x = x + cross["ffw"](x)
            for block in blocks:
                x = block(x)
        return x


def perceiver(module, arrays):
    """The general Perceiver."""
    (x,), (latents, dim) = tensors(arrays), module.latents.shape
    heads, _ = sizes_of(module.cross[0])
    own = twin(Perceiver, module, x.shape[-1], dim, latents, len(module.cross),
               len(module.blocks[0]), heads)  # fmt: skip
    return {"torch": lambda: own(x)}


def sizes_of(module):
    """(heads, head width) of a module's attention."""
    return module.attention.heads, module.attention.head_dim


def resampler(module, arrays):
    """The twin and the public ones; theirs have an embedding for each image, or none for time."""
    (x,) = tensors(arrays)
    images, dim = x.shape[1], x.shape[-1]
    heads, width = sizes_of(module.layers[0])
    latents, depth = len(module.latents), len(module.layers)
    own = twin(layers.PerceiverResampler, module, dim, dim, latents, depth, heads, width,
               len(module.time_embeddings))  # fmt: skip
    made = {"torch": lambda: own(x, backend="torch")}
    options = dict(dim=dim, depth=depth, dim_head=width, heads=heads, num_latents=latents)
    if "flamingo-pytorch" not in missing():
        kind = load("flamingo-pytorch").PerceiverResampler
        theirs, flat = kind(**options, num_media_embeds=images), x.flatten(2, 3)
        made["flamingo-pytorch"] = lambda: theirs(flat)
    if "open-flamingo" not in missing():
        other = load("open-flamingo").PerceiverResampler(**options)
        made["open-flamingo"] = lambda: other(x)
    return made


def gated(module, arrays):
    """The twin, under its dense mask, and the public ones, under theirs, in each layer anew."""
    y, media, phi = tensors(arrays)
    dim, (heads, width) = y.shape[-1], sizes_of(module)
    own = twin(layers.GatedCrossAttentionDense, module, dim, media.shape[-1], heads, width)
    made = {"torch": lambda: own(y, media, phi, "torch")}
    tags = torch.diff(phi, prepend=torch.zeros(len(phi), 1, dtype=phi.dtype)) > 0  # <image>
    for project in PUBLIC.keys() - missing().keys():
        wide = {"dim_visual": media.shape[-1]} if project == "open-flamingo" else {}
        block = load(project).GatedCrossAttentionBlock(dim=dim, dim_head=width, heads=heads, **wide)
        made[project] = functools.partial(block, y, media, media_locations=tags)
    return dict(sorted(made.items(), reverse=True))


def read(module, arrays):
    """A whole prompt by the twin."""
    model, (tokens, media, phi) = layers.Flamingo.from_numpy(module), tensors(arrays)
    return {"torch": lambda: model.read(tokens, media, phi, "torch", last=True)}


def word(module, arrays):
    """One more word by the twin, with caches and without."""
    model, (tokens, media, phi) = layers.Flamingo.from_numpy(module), tensors(arrays)
    before = tokens.shape[1] - 1
    with torch.inference_mode():
        cache = layers.Cache.of(model, media, before + 1)
        model.read(tokens[:, :-1], media, phi[:, :-1], "torch", cache=cache)

    def cached():
        for kept in cache.tokens:
            kept.length = before
        return model.read(tokens[:, -1:], media, phi[:, -1:], "torch", cache=cache)

    whole = lambda: model.read(tokens, media, phi, "torch", last=True)  # noqa: E731
    return {"torch, cached": cached, "torch, not cached": whole}
