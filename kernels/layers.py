"""Torch twins of the NumPy modules, with the same parameter names, and a switch to the kernels.

A checkpoint of `miniflamingo.Flamingo` loads here unchanged, and back: `load_state_dict` of one
takes the `state_dict` of the other (see `from_numpy` and `to_numpy`). Each class stands for the
NumPy class of the same name; look there for the formulas and the paper's sections. Wherever text
looks at images, `backend` chooses "torch" (plain torch, a dense mask) or "fused" (the kernel).

Letters: B batch, L text tokens, N images, T frames, S features of a frame, R visual tokens, H
heads, K head width, D width, V words.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from miniflamingo.flamingo import FlamingoConfig
from miniflamingo.language import alibi_slopes
from miniflamingo.perceiver import time_weights
from miniflamingo.vision import ACTIVATION_GAIN
from miniflamingo.xattn import compute_phi

BACKENDS = ("torch", "fused")


def squared_relu(x):  # [...] -> [...]
    return F.relu(x).square()


def gelu(x):  # [...] -> [...]
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"relu": F.relu, "squared_relu": squared_relu, "gelu": gelu}


class RMSNorm(nn.RMSNorm):
    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)


def attend(q, k, v, mask=None, bias=None):  # [B, L, H, K], [B, Lk, H, K] -> [B, L, H, K]
    if bias is not None and mask is not None:
        bias = torch.where(mask, bias, -torch.inf)
    mask = mask if bias is None else bias
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def dense_image_causal_attention(q, k, v, phi, only_last=True):
    """Plain torch: q [B, L, H, K]; k, v [B, N, R, H, K]; phi int[B, L] -> [B, L, H, K].

    Under the dense mask [B, L, N*R]. A token that may look at nothing attends to everything and is
    then set to 0, so that no NaN arises, in value or gradient.
    """
    N, R = k.shape[1:3]
    if N == 0:
        return q * 0
    image = torch.arange(1, N + 1, device=q.device).repeat_interleave(R)
    sees = (image == phi[:, :, None]) if only_last else (image <= phi[:, :, None])
    has_image = sees.any(dim=-1, keepdim=True)  # [B, L, 1]
    out = attend(q, k.flatten(1, 2), v.flatten(1, 2), (sees | ~has_image)[:, None])
    return torch.where(has_image[..., None], out, 0)


class MultiHeadAttention(nn.Module):
    def __init__(self, dim, heads, head_dim, context_dim=None):
        super().__init__()
        context_dim, inner = context_dim or dim, heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(context_dim, inner, bias=False)
        self.v_proj = nn.Linear(context_dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def project(self, projection, x):  # [..., D] -> [..., H, K]
        return projection(x).unflatten(-1, (self.heads, self.head_dim))

    def forward(self, x, context=None, mask=None, bias=None):
        context = x if context is None else context
        q = self.project(self.q_proj, x)
        k, v = self.project(self.k_proj, context), self.project(self.v_proj, context)
        return self.out_proj(attend(q, k, v, mask, bias).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden, activation="squared_relu", norm=nn.LayerNorm):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm = norm(dim)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(self.activation(self.up(self.norm(x))))


class TransformerBlock(nn.Module):
    def __init__(self, dim, heads, hidden, activation="gelu", norm=RMSNorm):
        super().__init__()
        self.norm = norm(dim)
        self.attention = MultiHeadAttention(dim, heads, dim // heads)
        self.ffw = FeedForward(dim, hidden, activation, norm)

    def forward(self, x, mask=None, bias=None):
        x = x + self.attention(self.norm(x), None, mask, bias)
        return x + self.ffw(x)


# --- resamplers ---------------------------------------------------------------------------------


class PerceiverLayer(nn.Module):
    def __init__(self, dim, heads, head_dim, ffw_mult=4):
        super().__init__()
        self.input_norm, self.latent_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(dim, heads, head_dim)
        self.ffw = FeedForward(dim, ffw_mult * dim)

    def forward(self, latents, inputs, mask=None):
        x = self.latent_norm(latents)
        context = torch.cat([self.input_norm(inputs), x], dim=1)
        latents = latents + self.attention(x, context, mask=mask)
        return latents + self.ffw(latents)


class Resampler(nn.Module):
    def __init__(self, input_dim, dim, num_frames, num_features):
        super().__init__()
        self.input_proj = nn.Linear(input_dim, dim, bias=False) if input_dim != dim else None
        self.time_embeddings = nn.Parameter(torch.randn(num_frames, dim))
        self.spatial_embeddings = (
            nn.Parameter(torch.randn(num_features, dim)) if num_features else None
        )
        self.final_norm = nn.LayerNorm(dim)

    def embed(self, features, num_frames):
        B, N, T, S, _ = features.shape
        frames = np.full((B, N), T) if num_frames is None else np.asarray(num_frames)
        mask = None
        if num_frames is not None:
            mask = np.repeat(np.arange(T) < frames[..., None], S, axis=-1).reshape(B * N, T * S)
            mask = torch.from_numpy(mask).to(features.device)
        x = features if self.input_proj is None else self.input_proj(features)
        weights = torch.from_numpy(time_weights(frames, T, len(self.time_embeddings))).to(x)
        x = x + (weights @ self.time_embeddings)[..., None, :]
        if self.spatial_embeddings is not None:
            x = x + self.spatial_embeddings
        return x.reshape(B * N, T * S, -1), mask

    def finish(self, x, B, N):
        return self.final_norm(x).unflatten(0, (B, N))


class PerceiverResampler(Resampler):
    def __init__(
        self, input_dim, dim, num_latents=64, depth=6, heads=16, head_dim=128, num_frames=8,
        num_features=None,
    ):  # fmt: skip
        super().__init__(input_dim, dim, num_frames, num_features)
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.3)
        self.layers = nn.ModuleList(PerceiverLayer(dim, heads, head_dim) for _ in range(depth))

    def forward(self, features, num_frames=None):
        (B, N), R = features.shape[:2], len(self.latents)
        x_f, mask = self.embed(features, num_frames)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(B * N, R)], dim=1)[:, None, None]
        x = self.latents.expand(B * N, -1, -1)
        for layer in self.layers:
            x = layer(x, x_f, mask)
        return self.finish(x, B, N)


# --- GATED XATTN-DENSE --------------------------------------------------------------------------


class ImageCausalCrossAttention(MultiHeadAttention):
    def __init__(self, dim, media_dim, heads, head_dim, only_last=True):
        super().__init__(dim, heads, head_dim, context_dim=media_dim)
        self.only_last = only_last

    def forward(self, x, keys_values, phi, backend="torch", work=None):
        q, (k, v) = self.project(self.q_proj, x), keys_values
        if backend == "fused" and self.only_last:
            from kernels.image_causal_attention import image_causal_attention

            out = image_causal_attention(q, k, v, phi, work)
        else:
            out = dense_image_causal_attention(q, k, v, phi, self.only_last)
        return self.out_proj(out.flatten(-2))


class GatedCrossAttentionDense(nn.Module):
    """One GATED XATTN-DENSE layer, usable alone: y [B, L, D], media [B, N, R, D_m], phi int[B, L].

    With both alphas at 0, as at the start, it is the identity. work, where given, is phi's
    `image_causal_attention.build_work_list`, which all layers can share. ValueError for an unknown
    backend.
    """

    def __init__(
        self, dim, media_dim, heads, head_dim, ffw_mult=4, only_last=True, skip_without_image=False
    ):
        super().__init__()
        self.skip_without_image = skip_without_image
        self.norm, self.media_norm = nn.LayerNorm(dim), nn.LayerNorm(media_dim)
        self.attention = ImageCausalCrossAttention(dim, media_dim, heads, head_dim, only_last)
        self.alpha_xattn = nn.Parameter(torch.zeros(()))
        self.ffw = FeedForward(dim, ffw_mult * dim)
        self.alpha_dense = nn.Parameter(torch.zeros(()))

    def project_media(self, media):
        """[B, N, R, D_m] -> keys and values [B, N, R, H, K]."""
        media, a = self.media_norm(media), self.attention
        return a.project(a.k_proj, media), a.project(a.v_proj, media)

    def forward(self, y, media, phi, backend="torch", work=None):
        """-> [B, L, D]."""
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        attended = self.attention(self.norm(y), self.project_media(media), phi, backend, work)
        y = y + self.alpha_xattn.tanh() * attended
        dense = self.ffw(y)
        if self.skip_without_image:
            dense = dense * (phi > 0)[..., None]
        return y + self.alpha_dense.tanh() * dense


# --- the frozen parts ---------------------------------------------------------------------------


class Conv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, stride=1, groups=1):
        super().__init__()
        self.stride, self.padding, self.groups = stride, kernel // 2, groups
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, kernel, kernel))
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):  # [B, C, height, width], as torch has it
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w * (w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-4).rsqrt()
        w = w * self.gain[:, None, None, None]
        return F.conv2d(x, w, self.bias, self.stride, self.padding, 1, self.groups)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, ratio):
        super().__init__()
        self.down = nn.Linear(channels, int(channels * ratio))
        self.up = nn.Linear(int(channels * ratio), channels)

    def forward(self, x):
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None] * 2


class NFBlock(nn.Module):
    def __init__(self, in_width, width, stride, expected_std, config):
        super().__init__()
        self.stride, self.beta = stride, 1 / expected_std
        self.act = scaled(config.activation)
        inner = width if config.bottleneck is None else int(width * config.bottleneck)
        groups = inner // config.group_size if config.group_size else 1
        shapes = [(in_width, inner, 3, stride, groups), (inner, width, 3, 1, groups)]
        if config.bottleneck is not None:
            shapes = [(in_width, inner, 1), (inner, inner, 3, stride, groups)]
            shapes += [(inner, inner, 3, 1, groups), (inner, width, 1)]
        self.convs = nn.ModuleList(Conv2d(*shape) for shape in shapes)
        transition = stride > 1 or in_width != width
        self.shortcut = Conv2d(in_width, width, 1) if transition else None
        ratio = config.squeeze_excite
        self.squeeze_excite = SqueezeExcite(width, ratio) if ratio else None
        self.skip_gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        out = self.act(x) * self.beta
        if self.shortcut is not None:
            x = self.shortcut(F.avg_pool2d(out, self.stride) if self.stride > 1 else out)
        out = self.convs[0](out)
        for conv in self.convs[1:]:
            out = conv(self.act(out))
        if self.squeeze_excite is not None:
            out = self.squeeze_excite(out)
        return x + out * self.skip_gain * 0.2


def scaled(activation):
    return lambda x: ACTIVATIONS[activation](x) * ACTIVATION_GAIN[activation]


class NormalizerFreeResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.act = config, scaled(config.activation)
        channels = (3, *config.stem)
        self.stem = nn.ModuleList(
            Conv2d(channels[i], channels[i + 1], 3, s) for i, s in enumerate(config.stem_strides)
        )
        blocks, width, variance = [], channels[-1], 1.0
        for depth, out, stride in zip(config.depths, config.widths, config.strides):
            for i in range(depth):
                blocks.append(NFBlock(width, out, 1 if i else stride, variance**0.5, config))
                variance = (1.0 if blocks[-1].shortcut is not None else variance) + 0.04
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.final_conv = Conv2d(width, config.final_width, 1) if config.final_width else None

    def forward(self, pixels):  # [B, height, width, 3] in [0, 1] -> [B, S, D_v]
        x = self.stem[0](pixels.permute(0, 3, 1, 2) * 2 - 1)
        for conv in self.stem[1:]:
            x = conv(self.act(x))
        for block in self.blocks:
            x = block(x)
        x = self.act(x if self.final_conv is None else self.final_conv(x))
        return x.flatten(2).transpose(1, 2)


class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        learned = c.positions == "learned"
        self.positions = nn.Parameter(torch.randn(c.max_positions, c.dim)) if learned else None
        self.blocks = nn.ModuleList(
            TransformerBlock(c.dim, c.heads, c.ffw_mult * c.dim) for _ in range(c.depth)
        )
        self.norm = RMSNorm(c.dim)
        tied = c.tie_embeddings
        self.head = None if tied else nn.Linear(c.dim, c.vocab_size, bias=False)

    def causality(self, L):  # -> bias [1, H, L, L]
        distance = torch.arange(L)[:, None] - torch.arange(L)
        slopes = self.config.alibi_slopes or alibi_slopes(self.config.heads)
        slopes = (0.0,) if self.positions is not None else slopes
        slopes = torch.as_tensor(slopes)[:, None, None].to(self.embedding.weight)
        distance = distance.to(slopes.device)
        return torch.where(distance >= 0, -slopes * distance, -torch.inf)[None]

    def embed(self, tokens, table):
        x = F.embedding(tokens, table)
        return x if self.positions is None else x + self.positions[: tokens.shape[1]]

    def forward(self, tokens):  # int [B, L] -> logits [B, L, V]
        x, bias = self.embed(tokens, self.embedding.weight), self.causality(tokens.shape[1])
        for block in self.blocks:
            x = block(x, None, bias)
        return F.linear(self.norm(x), (self.head or self.embedding).weight)


# --- Flamingo -----------------------------------------------------------------------------------


class Flamingo(nn.Module):
    """The whole model, for training and scoring; ValueError for a resampler of the ablations."""

    def __init__(self, config: FlamingoConfig):
        super().__init__()
        c = self.config = config
        if c.resampler != "perceiver":
            raise ValueError(f"the torch twin has the perceiver resampler, got {c.resampler!r}")
        self.vision_encoder = NormalizerFreeResNet(c.vision).requires_grad_(False)
        self.resampler = PerceiverResampler(
            c.vision.out_dim, c.media_dim, c.num_latents, c.resampler_depth, c.resampler_heads,
            c.resampler_head_dim, c.num_frames,
            c.vision.num_features if c.spatial_embeddings else None,
        )  # fmt: skip
        sizes = (c.lm.dim, c.media_dim, c.xattn_heads, c.xattn_head_dim)
        options = {"only_last": c.only_last, "skip_without_image": c.skip_without_image}
        self.gated_xattn = nn.ModuleList(
            GatedCrossAttentionDense(*sizes, **options) for _ in range(0, c.lm.depth, c.xattn_every)
        )
        self.lm = LanguageModel(c.lm).requires_grad_(False)
        own = c.train_eoc
        self.eoc_embedding = nn.Parameter(torch.zeros(c.lm.dim)) if own else None
        own = own and not c.lm.tie_embeddings
        self.eoc_head = nn.Parameter(torch.zeros(c.lm.dim)) if own else None

    @classmethod
    def from_numpy(cls, model):
        """The twin of a miniflamingo.Flamingo: the same config, weights and dtype."""
        twin = cls(model.config)
        state = {name: torch.from_numpy(np.array(x)) for name, x in model.state_dict().items()}
        twin.to(next(iter(state.values())).dtype).load_state_dict(state)
        return twin

    def to_numpy(self):
        """{name: array}, what miniflamingo.Flamingo.load_state_dict takes."""
        return {name: x.detach().cpu().numpy() for name, x in self.state_dict().items()}

    def encode(self, pixels):  # [B, N, T, height, width, 3] -> [B, N, T, S, D_v]
        return self.vision_encoder(pixels.flatten(0, 2)).unflatten(0, pixels.shape[:3])

    def forward(
        self, tokens, pixels, *, phi=None, num_images=None, num_frames=None, backend="torch"
    ):
        """As miniflamingo.Flamingo.forward, with tensors: logits [B, L, V]."""
        media = self.resampler(self.encode(pixels), num_frames)
        if phi is None:
            ids = tokens.cpu().numpy()
            num_images = np.full(len(ids), pixels.shape[1]) if num_images is None else num_images
            phi = torch.from_numpy(compute_phi(ids, self.config.image_token, False, num_images))
            phi = phi.to(tokens.device)
        return self.read(tokens, media, phi, backend)

    def read(self, tokens, media, phi, backend="torch"):
        """The text half: tokens int[B, L], media [B, N, R, D_m], phi int[B, L] -> [B, L, V]."""
        table, head = self.lm.embedding.weight, (self.lm.head or self.lm.embedding).weight
        if self.eoc_embedding is not None:
            table = self._with_eoc(table, self.eoc_embedding)
            head = table if self.lm.head is None else self._with_eoc(head, self.eoc_head)
        x, bias, work = self.lm.embed(tokens, table), self.lm.causality(tokens.shape[1]), None
        if backend == "fused":
            from kernels.image_causal_attention import build_work_list

            work = build_work_list(phi, media.shape[1], self.config.xattn_heads)
        for i, block in enumerate(self.lm.blocks):
            j, between = divmod(i, self.config.xattn_every)
            if not between:
                x = self.gated_xattn[j](x, media, phi, backend, work)
            x = block(x, None, bias)
        return F.linear(self.lm.norm(x), head)

    def _with_eoc(self, table, row):
        rows = torch.arange(len(table), device=table.device)[:, None]
        return torch.where(rows == self.config.eoc_token, row, table)
