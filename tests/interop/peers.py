"""What flamingo-pytorch and OpenFlamingo compute, by their own code: {name of a case: Peer}.

Small, in float64, with random weights away from their start, and rows that differ in how many
images they have. Importing this needs none of the packages; calling does.
"""

import contextlib
import importlib
import sys
from unittest import mock

import numpy as np

from tests.gradients import normal
from tests.interop.agreement import move, run_theirs

DIM_HEAD = 4
# which tokens are <image>: rows with 2, 1 and 0 of the two images; tokens before the first one
LOCATIONS = np.array([[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
SHAPES = {"small": dict(D=8, heads=2, R=3, S=4), "other": dict(D=6, heads=3, R=2, S=5)}


@contextlib.contextmanager
def stand_ins(*names):
    """Modules that a package imports and we do not need, such as torchvision: mocks of them."""
    importlib.import_module("transformers")  # it asks whether torchvision is there
    for name in names:
        with contextlib.suppress(ImportError, RuntimeError):
            importlib.import_module(name)
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update({name: mock.MagicMock() for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def open_flamingo_helpers():
    """open_flamingo's modules, without open_clip and torchvision where these do not import."""
    with stand_ins("torchvision", "torchvision.transforms", "open_clip"):
        return importlib.import_module("open_flamingo.src.helpers")


def values_mean(attention, media):
    """The plain mean of the values of ALL visual tokens, projected: what leaks."""
    values = attention.to_kv(media).chunk(2, dim=-1)[1]
    return attention.to_out(values.flatten(1, 2).mean(1, keepdim=True))


def gated(helpers, seed, D, heads, R, **_):
    """The Peer of a GatedCrossAttentionBlock; extra: what it gives tokens that see no image when
    it attends to all previous images, and the mean over ALL images' values."""
    import torch

    wide = {"dim_visual": D} if helpers.__name__.startswith("open_flamingo") else {}
    make = helpers.GatedCrossAttentionBlock
    block = move(make(dim=D, dim_head=DIM_HEAD, heads=heads, **wide).double(), seed)
    locations = torch.from_numpy(LOCATIONS).bool()
    inputs = {"y": normal(3, 7, D, seed=seed), "media": normal(3, 2, R, D, seed=seed)}
    media, y = (torch.from_numpy(inputs[n]) for n in ("media", "y"))
    block.attn.only_attend_immediate_media = False
    leak = block.attn(y, media, media_locations=locations)
    block.attn.only_attend_immediate_media = True
    # one <image> more than there are images
    tags = torch.ones(3, 7, dtype=torch.bool)
    excess = block.attn(y, media, media_locations=tags)[:, 2:]
    mean = values_mean(block.attn, media)
    extra = {"leak": leak, "excess": excess, "mean": mean}
    return run_theirs(
        block, lambda y, media: block(y, media, media_locations=locations), inputs,
        {"dim_head": DIM_HEAD}, {"phi": LOCATIONS.cumsum(axis=1)},
        {name: x.detach().numpy() for name, x in extra.items()},
        "lang_encoder.gated_cross_attn_layers.0." if wide else "",
    )  # fmt: skip


def flamingo_pytorch_peers():
    """{"flamingo_pytorch-xattn-small": Peer, ...}; needs the package flamingo-pytorch."""
    theirs, peers = importlib.import_module("flamingo_pytorch.flamingo_pytorch"), {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        D, heads, R, S = shape.values()
        resampler = theirs.PerceiverResampler(
            dim=D, depth=2, dim_head=DIM_HEAD, heads=heads, num_latents=R, num_media_embeds=3
        )
        resampler = move(resampler.double(), seed)
        features = {"features": normal(2, 3 - seed, S, D, seed=seed)}  # [b, images, features, dim]
        peers[f"flamingo_pytorch-resampler-{name}"] = run_theirs(
            resampler, lambda features, f=resampler: f(features), features, {"dim_head": DIM_HEAD}
        )
        peers[f"flamingo_pytorch-xattn-{name}"] = gated(theirs, seed, **shape)
    return peers


def open_flamingo_peers():
    """{"open_flamingo-xattn-small": Peer, ...}; needs the package open-flamingo."""
    theirs, peers = open_flamingo_helpers(), {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        D, heads, R, S = shape.values()
        video = dict(max_num_frames=3, max_num_media=2) if seed else {}
        resampler = theirs.PerceiverResampler(
            dim=D, depth=2, dim_head=DIM_HEAD, heads=heads, num_latents=R, **video
        )
        resampler = move(resampler.double(), seed)
        features = {"features": normal(2, 2, 1 + seed, S, D, seed=seed)}
        peers[f"open_flamingo-resampler-{name}"] = run_theirs(
            resampler,
            lambda features, f=resampler: f(features),
            features,
            {"dim_head": DIM_HEAD},
            prefix="perceiver.",
        )
        peers[f"open_flamingo-xattn-{name}"] = gated(theirs, seed, **shape)
    return peers


PEERS = {"flamingo_pytorch": flamingo_pytorch_peers, "open_flamingo": open_flamingo_peers}
CASES = [
    f"{project}-{what}-{shape}"
    for project in PEERS for what in ("resampler", "xattn") for shape in SHAPES
]  # fmt: skip
