"""From any number of visual features to R visual tokens.

A Perceiver (Jaegle et al., 2021) lets a few learned latents query a large array: O(M R) instead of
O(M^2), so that depth no longer depends on the size M of the input. The Perceiver Resampler (paper,
section 3.1.1 and its pseudo-code) does it for the features of an image or a video:

    x_f: [T, S, D], time_embeddings: [T, 1, D], x: [R, D]
    x_f = flatten(x_f + time_embeddings)                  # [T*S, D]
    for each layer:
        x = x + attention(q=x, kv=concat([x_f, x]))
        x = x + ffw(x)

Letters: B batch, N images or videos in a sequence, T frames, S features of a frame, R latents, D
width, M inputs of a general Perceiver.
"""

import numpy as np

from miniflamingo.attention import FeedForward, MultiHeadAttention, TransformerBlock
from miniflamingo.autograd import array_of
from miniflamingo.dialects import DIALECTS
from miniflamingo.functional import (
    LayerNorm,
    Linear,
    broadcast_to,
    concat,
    gelu,
    keep,
    matmul,
    norm_named,
)
from miniflamingo.module import Module, Parameter


class PerceiverLayer(Module):
    """Latents attend to the inputs (and to themselves, if append_latents); then a feed-forward."""

    def __init__(
        self,
        dim,
        input_dim,
        heads,
        head_dim,
        ffw_mult=4,
        append_latents=True,
        activation="squared_relu",
        qk_norm=None,
        *,
        rng,
    ):
        self.append_latents = append_latents
        self.input_norm, self.latent_norm = LayerNorm(input_dim), LayerNorm(dim)
        self.attention = MultiHeadAttention(
            dim, heads, head_dim, context_dim=input_dim, qk_norm=qk_norm, rng=rng
        )
        self.ffw = FeedForward(dim, ffw_mult * dim, activation, rng=rng)

    def normalise(self, latents, inputs):
        """What the attention reads: queries [B, R, D], context [B, M (+ R), D_in]."""
        x, context = self.latent_norm(latents), self.input_norm(inputs)
        return x, concat(context, x, axis=1) if self.append_latents else context

    def forward(self, latents, inputs, mask=None):
        """latents [B, R, D], inputs [B, M, D_in], mask bool[B, 1, 1, M (+ R)] -> [B, R, D]."""
        latents = latents + self.attention(*self.normalise(latents, inputs), mask=mask)
        return latents + self.ffw(latents)


class Perceiver(Module):
    """The general Perceiver: R latents read M inputs, then think among themselves; `depth` times.

    One turn is a cross-attention, O(M R), and `self_depth` transformer blocks over the latents,
    O(R^2). GELU, as in its paper.
    """

    def __init__(
        self, input_dim, dim, num_latents, depth=1, self_depth=2, heads=4, ffw_mult=4, *, rng
    ):
        self.latents = Parameter(
            rng.normal(0, 0.02, (num_latents, dim)).astype(np.float32, copy=False)
        )
        self.cross = [
            PerceiverLayer(dim, input_dim, heads, dim // heads, ffw_mult, False, "gelu", rng=rng)
            for _ in range(depth)
        ]
        self.blocks = [
            [TransformerBlock(dim, heads, ffw_mult * dim, norm=LayerNorm, rng=rng)
             for _ in range(self_depth)]
            for _ in range(depth)
        ]  # fmt: skip

    def forward(self, inputs, mask=None):
        """inputs [B, M, D_in], mask bool[B, M] (True: present) -> latents [B, R, D].

        What is not present reaches no output and no gradient, NaN or not.
        """
        x = broadcast_to(self.latents, len(inputs), *self.latents.shape)
        if mask is not None:
            inputs, mask = keep(inputs, mask[..., None]), mask[:, None, None, :]
        for cross, blocks in zip(self.cross, self.blocks):
            x = cross(x, inputs, mask)
            for block in blocks:
                x = block(x)
        return x


# --- resamplers ---------------------------------------------------------------------------------


def time_weights(num_frames, T, trained):
    """How much of each trained time embedding a frame gets: [..., T, trained].

    num_frames int[...] is the length of each clip in a batch padded to T frames. A clip that is no
    longer than the trained embeddings uses the first of them, one for each frame; a longer one
    interpolates linearly between them, ends on ends (8 frames trained, 30 at inference).
    """
    frames = np.asarray(num_frames)[..., None]
    step = np.where(frames > trained, (trained - 1) / np.maximum(frames - 1, 1), 1)
    position = np.arange(T) * step
    return np.maximum(0, 1 - np.abs(position[..., None] - np.arange(trained)))


class Resampler(Module):
    """What the three resamplers share: the input projection, the embeddings, the final norm.

    input_dim is projected to dim where they differ. num_frames time embeddings are learned; learned
    spatial embeddings exist only where `num_features` (S) is given, which the paper does not have.
    Their size at the start, about 0.3, is a choice that matters: it is that of the mini model's
    features, and three times as much drowns them. So does the time embeddings' form, points on a
    line: drawn one by one, they left the mini model blind to motion for up to 1,000 steps.
    final_norm is a choice too: the pseudo-code shows none, all public re-implementations have one.
    A dialect may have no time embeddings, or embeddings of the images' places in the sequence.
    """

    def __init__(
        self, input_dim, dim, num_frames, num_features, final_norm, dialect=DIALECTS["paper"],
        *, rng,
    ):  # fmt: skip
        self.input_proj = Linear(input_dim, dim, rng=rng) if input_dim != dim else None
        self.time_embeddings = self.media_embeddings = None
        if dialect.time_embeddings:
            line = np.linspace(-1.5, 1.5, num_frames)[:, None] * rng.normal(0, 0.3, dim)
            noise = rng.normal(0, 0.1, (num_frames, dim))
            self.time_embeddings = Parameter((line + noise).astype(np.float32, copy=False))
        if dialect.media_embeddings:
            places = rng.normal(0, 0.3, (dialect.media_embeddings, dim))
            self.media_embeddings = Parameter(places.astype(np.float32, copy=False))
        self.spatial_embeddings = (
            Parameter(rng.normal(0, 0.3, (num_features, dim)).astype(np.float32, copy=False))
            if num_features
            else None
        )
        self.final_norm = LayerNorm(dim) if final_norm else None

    def embed(self, features, num_frames=None):
        """features [B, N, T, S, D_in] -> [B*N, T*S, D], and the mask bool[B*N, T*S] or None.

        num_frames int[B, N] says how many of a clip's T frames are real (all by default); the
        others are masked, and count as 0 from the start: NaN in them reaches nothing, not even the
        gradients of the weights that all frames share. ValueError when it does not fit.
        """
        B, N, T, S, _ = features.shape
        mask, frames = None, np.full((B, N), T)
        if num_frames is not None:
            frames = check_num_frames(num_frames, B, N, T)
        if (frames < T).any():  # else nothing is padded, and nothing to be paid for
            real = np.arange(T) < frames[..., None]  # [B, N, T]
            features = keep(features, real[..., None, None])
            mask = np.repeat(real, S, axis=-1).reshape(B * N, T * S)
        x = features if self.input_proj is None else self.input_proj(features)
        x = self._place(x, frames)
        return x.reshape(B * N, T * S, x.shape[-1]), mask

    def _place(self, x, frames):
        """[B, N, T, S, D] with what embeddings there are of when, where, and which image."""
        B, N, T, _, D = x.shape
        if self.time_embeddings is not None:
            weights = time_weights(frames, T, len(self.time_embeddings))
            weights = weights.astype(array_of(x).dtype)
            x = x + matmul(weights, self.time_embeddings).reshape(B, N, T, 1, D)
        if self.spatial_embeddings is not None:
            x = x + self.spatial_embeddings
        if self.media_embeddings is not None:
            if N > len(self.media_embeddings):
                raise ValueError(f"embeds {len(self.media_embeddings)} images of a row, got {N}")
            x = x + self.media_embeddings[:N].reshape(N, 1, 1, D)
        return x

    def finish(self, x, B, N):
        """[B*N, R, D] -> [B, N, R, D], normalised."""
        x = x if self.final_norm is None else self.final_norm(x)
        return x.reshape(B, N, *x.shape[1:])


def check_num_frames(num_frames, B, N, T):
    """Return num_frames as an array; ValueError unless it is [B, N] within 0..T."""
    frames = np.asarray(num_frames)
    if frames.shape != (B, N) or (frames.size and (frames.min() < 0 or frames.max() > T)):
        raise ValueError(
            f"num_frames must be int [B, N] = [{B}, {N}] within 0..{T} frames, got "
            f"{list(frames.shape)}: {frames.tolist()}"
        )
    return frames


class PerceiverResampler(Resampler):
    """The paper's resampler: 64 latents, 6 layers, 16 heads, at every size of the model."""

    def __init__(
        self, input_dim, dim, num_latents=64, depth=6, heads=16, head_dim=128, ffw_mult=4,
        num_frames=8, num_features=None, final_norm=True, dialect=DIALECTS["paper"], *, rng,
    ):  # fmt: skip
        super().__init__(input_dim, dim, num_frames, num_features, final_norm, dialect, rng=rng)
        self.latents = Parameter(
            rng.normal(0, 0.3, (num_latents, dim)).astype(np.float32, copy=False)
        )
        options = (dialect.resampler_activation, norm_named(dialect.resampler_qk_norm))
        self.layers = [
            PerceiverLayer(dim, dim, heads, head_dim, ffw_mult, True, *options, rng=rng)
            for _ in range(depth)
        ]

    def begin(self, features, num_frames):
        """The latents [B*N, R, D], the features [B*N, T*S, D], a mask [B*N, 1, 1, T*S + R]."""
        B, N, (R, D) = *features.shape[:2], self.latents.shape
        x_f, mask = self.embed(features, num_frames)
        if mask is not None:  # the latents themselves are always present
            mask = np.concatenate([mask, np.ones((B * N, R), bool)], axis=1)[:, None, None]
        return broadcast_to(self.latents, B * N, R, D), x_f, mask

    def forward(self, features, num_frames=None):
        """features [B, N, T, S, D_in], num_frames int[B, N] or None -> [B, N, R, D]."""
        x, x_f, mask = self.begin(features, num_frames)
        for layer in self.layers:
            x = layer(x, x_f, mask)
        return self.finish(x, *features.shape[:2])

    def attention_maps(self, features, num_frames=None):
        """Where each latent looks, [depth, B, N, H, R, T*S + R]; arguments as in forward.

        A row sums to 1: the T*S features of all frames, then the R latents themselves.
        """
        x, x_f, mask = self.begin(features, num_frames)
        maps = []
        for layer in self.layers:
            maps.append(layer.attention.weights(*layer.normalise(x, x_f), mask=mask))
            x = layer(x, x_f, mask)
        return np.stack(maps).reshape(len(maps), *features.shape[:2], *maps[0].shape[1:])


class NoResampler(Module):
    """All features of an image or video are its visual tokens, projected where the widths differ.

    What Llama-3.2-Vision does, and what the paper's resampler spares: R grows with T and S.
    """

    def __init__(self, input_dim, dim, *, rng):
        self.proj = Linear(input_dim, dim, bias=True, rng=rng) if input_dim != dim else None

    def forward(self, features, num_frames=None):
        """features [B, N, T, S, D_in] -> [B, N, T*S, D]; ValueError for clips of padded frames."""
        B, N, T, S, _ = features.shape
        if num_frames is not None and (check_num_frames(num_frames, B, N, T) < T).any():
            raise ValueError(f"without a resampler all clips have T = {T} frames, got {num_frames}")
        x = features if self.proj is None else self.proj(features)
        return x.reshape(B, N, T * S, x.shape[-1])


class TransformerResampler(Resampler):
    """The ablation's Transformer: latents and features attend to one another, O((T S + R)^2)."""

    def __init__(
        self, input_dim, dim, num_latents=64, depth=6, heads=16, ffw_mult=4,
        num_frames=8, num_features=None, final_norm=True, *, rng,
    ):  # fmt: skip
        super().__init__(input_dim, dim, num_frames, num_features, final_norm, rng=rng)
        self.latents = Parameter(
            rng.normal(0, 0.3, (num_latents, dim)).astype(np.float32, copy=False)
        )
        self.blocks = [
            TransformerBlock(dim, heads, ffw_mult * dim, "squared_relu", LayerNorm, rng=rng)
            for _ in range(depth)
        ]

    def forward(self, features, num_frames=None):
        """features [B, N, T, S, D_in], num_frames int[B, N] or None -> [B, N, R, D]."""
        B, N, (R, D) = *features.shape[:2], self.latents.shape
        x_f, mask = self.embed(features, num_frames)
        if mask is not None:
            mask = np.concatenate([np.ones((B * N, R), bool), mask], axis=1)[:, None, None]
        x = concat(broadcast_to(self.latents, B * N, R, D), x_f, axis=1)
        for block in self.blocks:
            x = block(x, mask)
        return self.finish(x[:, :R], B, N)


class MLPResampler(Resampler):
    """The ablation's MLP: a feed-forward for every feature, the S places mixed, frames averaged.

    The paper does not say how its MLP maps features to tokens; this is our choice. S is fixed by
    num_features, which a Perceiver does not need.
    """

    def __init__(
        self, input_dim, dim, num_latents=64, depth=6, ffw_mult=4,
        num_frames=8, num_features=None, final_norm=True, *, rng,
    ):  # fmt: skip
        if num_features is None:
            raise ValueError("MLPResampler needs num_features, the number S of features of a frame")
        super().__init__(input_dim, dim, num_frames, num_features, final_norm, rng=rng)
        self.layers = [FeedForward(dim, ffw_mult * dim, rng=rng) for _ in range(depth)]
        self.mix = Linear(num_features, num_latents, rng=rng)
        self.out = Linear(dim, dim, rng=rng)

    def forward(self, features, num_frames=None):
        """features [B, N, T, S, D_in], num_frames int[B, N] or None -> [B, N, R, D]."""
        B, N, T, S, _ = features.shape
        x, mask = self.embed(features, num_frames)
        for layer in self.layers:
            x = x + layer(x)
        x = x.reshape(B * N, T, S, x.shape[-1]).transpose(0, 1, 3, 2)
        x = gelu(self.mix(x)).transpose(0, 1, 3, 2)  # [B*N, T, R, D]
        present = np.ones((B * N, T)) if mask is None else mask.reshape(B * N, T, S)[:, :, 0]
        share = present / np.maximum(present.sum(axis=1, keepdims=True), 1)
        x = (x * share[:, :, None, None].astype(array_of(x).dtype)).sum(axis=1)
        return self.finish(self.out(x), B, N)
