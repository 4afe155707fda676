"""GATED XATTN-DENSE in another project's decoder, such as those of Hugging Face's transformers.

    gated = insert_into(model.model.layers, 4, dim=2048, media_dim=1024, heads=16, head_dim=128)
    with gated.reading(media, phi):  # media [B, N, R, D_m], phi int[B, L]
        model(tokens, labels=tokens).loss.backward()

The decoder stays what it was: a forward pre-hook in front of every n-th block passes the hidden
states through a layer (paper, section 3.1.2), so the names of its parameters, its checkpoints and
its methods remain. Outside of `reading`, and while all gates are shut, it is the original, bit for
bit. Letters as in kernels/model/layers.py.

Needs a decoder whose blocks take the hidden states [B, L, D] as their first argument or as
`hidden_states`, and, to generate with a cache, get it as an argument with `get_seq_length`.
Tested: GPT-2 and LLaMA of transformers 5.23, on the CPU. Not tested: GPUs, and decoders spread over
several devices.
"""

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .layers import GatedCrossAttentionDense, check_phi, share_work

HALVES = (torch.float16, torch.bfloat16)


class Sight(NamedTuple):
    """What one forward pass sees: media, phi of its tokens, their work list, kept projections."""

    media: torch.Tensor
    phi: torch.Tensor
    work: tuple | None
    keys_values: dict | None  # {layer: projected media}, where no gradient is wanted


class InsertedLayers(nn.ModuleList):
    """The layers that `insert_into` put into a decoder, which holds none of them: train and save
    these. Their parameters are named as those of `Flamingo.gated_xattn`.

    checkpointing=True recomputes each layer in the backward pass instead of keeping what is in it.
    """

    def __init__(self, layers, backend, checkpointing):
        super().__init__(layers)
        self.backend, self.checkpointing = backend, checkpointing
        self._given = self._sight = None
        self._hooks = []

    @contextmanager
    def reading(self, media, phi):
        """Inside, the decoder sees media [B, N, R, D_m] under phi int[B, L] in 0..N.

        phi belongs to the tokens from the first on; tokens after its end, as they are generated,
        have the last token's image. Rows that `generate` multiplies (beams) must be multiplied here
        too: `media.repeat_interleave(3, 0)`. With the decoder's own activation checkpointing, call
        backward inside as well. ValueError when phi does not fit.
        """
        if media.ndim != 4 or phi.ndim != 2 or 0 in phi.shape:
            got = f"{list(media.shape)} and {list(phi.shape)}"
            raise ValueError(f"media must be [B, N, R, D_m] and phi [B, L], L >= 1, got {got}")
        check_phi(phi, len(media), phi.shape[1], media.shape[1], media.device)
        before, self._given = self._given, (media, phi, {})
        try:
            yield self
        finally:
            self._given, self._sight = before, None

    def remove(self):
        """Take the layers out of the decoder again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_block(self, j, block, args, kwargs):
        """The hook: layer j, then the block."""
        if self._given is None:
            return None
        y = args[0] if args else kwargs.get("hidden_states")
        if not torch.is_tensor(y):
            raise ValueError(f"{type(block).__name__} got no hidden states as its first argument")
        if j == 0:
            self._sight = self._look(*y.shape[:2], (*args, *kwargs.values()))
        y = self._apply_layer(j, y)
        return ((y, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": y})

    def _look(self, B, L, arguments):
        """The Sight of a pass of B rows of L tokens, before the first block caches them."""
        media, phi, kept = self._given
        if B != len(media):
            raise ValueError(
                f"the decoder reads {B} rows and was given media for {len(media)}: where generate "
                "multiplies rows, media and phi need repeat_interleave"
            )
        past = next((a.get_seq_length() for a in arguments if hasattr(a, "get_seq_length")), 0)
        places = (past + torch.arange(L, device=phi.device)).clamp(max=phi.shape[1] - 1)
        phi = phi[:, places]
        a = self[0].attention
        work = share_work(phi, media.shape[1], a.heads, self.backend, a.groups)
        return Sight(media, phi, work, None if torch.is_grad_enabled() else kept)

    def _apply_layer(self, j, y):
        layer, sight, kept = self[j], self._sight, None
        # trained in float32 inside a half-precision decoder, as in the paper (section 3.2)
        half = y.dtype in HALVES and layer.alpha_xattn.dtype == torch.float32
        with torch.autocast(y.device.type, y.dtype) if half else nullcontext():
            if sight.keys_values is not None:  # each image is projected once for all new tokens
                if j not in sight.keys_values:
                    sight.keys_values[j] = layer.project_media(sight.media)
                kept = sight.keys_values[j]
            call = layer
            if self.checkpointing and torch.is_grad_enabled():
                call = partial(checkpoint, layer, use_reentrant=False)
            return call(y, sight.media, sight.phi, self.backend, sight.work, kept, False)


def insert_into(
    blocks, every, dim, media_dim, heads, head_dim, backend="auto", checkpointing=False, **options
):
    """Put a GatedCrossAttentionDense before blocks 0, every, 2 every, ... -> InsertedLayers.

    blocks is the decoder's nn.ModuleList (or list) of blocks, dim its width; the rest is as for
    GatedCrossAttentionDense. Each layer is float32, on its block's device. ValueError for no
    blocks or every < 1.
    """
    if len(blocks) == 0 or every < 1:
        raise ValueError(f"needs blocks and every >= 1, got {len(blocks)} and every={every}")
    chosen = [blocks[i] for i in range(0, len(blocks), every)]
    layers = [GatedCrossAttentionDense(dim, media_dim, heads, head_dim, **options) for _ in chosen]
    devices = [next(block.parameters()).device for block in chosen]
    layers = [layer.to(device) for layer, device in zip(layers, devices)]
    inserted = InsertedLayers(layers, backend, checkpointing)
    for j, block in enumerate(chosen):
        hook = partial(inserted._before_block, j)
        inserted._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    return inserted
