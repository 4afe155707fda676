"""A Flamingo of a few thousand numbers, and batches written as layouts, for tests of the whole."""

from dataclasses import replace

import numpy as np

from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.language import LanguageConfig
from miniflamingo.prompt import BOS, EOC, IMAGE, PAD, Batch
from miniflamingo.vision import VisionConfig
from miniflamingo.xattn import compute_phi

TINY = FlamingoConfig(
    vision=VisionConfig(8, (4,), (2,), (6, 6), (1, 1), (2, 1)),
    lm=LanguageConfig(vocab_size=11, dim=16, depth=3, heads=2, ffw_mult=2),
    media_dim=8, num_latents=3, resampler_depth=1, resampler_heads=2, resampler_head_dim=4,
    num_frames=3, xattn_every=2, xattn_heads=2, xattn_head_dim=4,
)  # fmt: skip


def tiny(seed=0, alpha=0.9, dtype=np.float64, lm=None, **changes):
    """A tiny Flamingo whose gates stand open (alpha, and -alpha for the feed-forward)."""
    config = replace(TINY, lm=replace(TINY.lm, **(lm or {})), **changes)
    return open_gates(Flamingo(config, rng=np.random.default_rng(seed)).astype(dtype), alpha)


def open_gates(model, alpha=0.9):
    for layer in model.gated_xattn:
        dtype = layer.alpha_xattn.dtype
        layer.alpha_xattn.data = np.array(alpha, dtype)
        layer.alpha_dense.data = np.array(-alpha, dtype)
    return model


def batch_of(*layouts, images=None, T=1, size=8, use_next=False, seed=0, vocab=11):
    """Rows such as "b..eI..": b <BOS>, . any word, e <EOC>, I <image>; padded at the end.

    images [B] are the rows' numbers of images, those of the tags by default.
    """
    rng = np.random.default_rng(seed)
    B, L = len(layouts), max(map(len, layouts))
    tokens = rng.integers(IMAGE + 1, vocab, (B, L))
    for b, layout in enumerate(layouts):
        special = ["beI_".find(c) for c in layout.ljust(L, "_")]
        tokens[b] = [t if s < 0 else (BOS, EOC, IMAGE, PAD)[s] for t, s in zip(tokens[b], special)]
    lengths = np.array([len(layout.rstrip("_")) for layout in layouts])
    num_images = np.array([r.count("I") for r in layouts] if images is None else images)
    N = num_images.max(initial=0)
    num_frames = np.where(np.arange(N) < num_images[:, None], rng.integers(1, T + 1, (B, N)), 0)
    pixels = rng.random((B, N, T, size, size, 3))
    pixels *= (np.arange(T) < num_frames[..., None])[..., None, None, None]
    phi = compute_phi(tokens, IMAGE, use_next, num_images)
    return Batch(tokens, lengths, phi, pixels, num_images, num_frames)


def row_of(batch, b):
    """Row b alone, without any padding."""
    L, N = batch.lengths[b], batch.num_images[b]
    T = max(1, batch.num_frames[b].max(initial=0))
    b = slice(b, b + 1)
    return Batch(
        batch.tokens[b, :L], batch.lengths[b], batch.phi[b, :L], batch.pixels[b, :N, :T],
        batch.num_images[b], batch.num_frames[b, :N],
    )  # fmt: skip
