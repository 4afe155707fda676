"""Scaled dot-product attention and its gradient; then what every room builds from it.

    attention(Q, K, V) = softmax(Q K^T / sqrt(K)) V        (Vaswani et al., 2017, equation 1)

Letters: B batch, L or Lq queries, Lk keys, H heads, K head width, D model width.
"""

import numpy as np

from miniflamingo.autograd import differentiable
from miniflamingo.functional import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    RMSNorm,
    row_dot,
    row_max,
    row_sum,
)
from miniflamingo.module import Module


def visible_pairs(mask, bias):  # -> bool [.., Lq, Lk], or None where all may see all
    """Which keys a query may attend to: those that neither mask nor a bias of -inf hides."""
    if bias is None:
        return mask
    return bias != -np.inf if mask is None else mask & (bias != -np.inf)


def attention_weights(q, k, mask=None, bias=None):  # [.., Lq, K], [.., Lk, K] -> [.., Lq, Lk]
    """softmax(q k^T / sqrt(K) + bias), over the keys that `mask` allows.

    mask is boolean (True: may be attended to), bias is added to the scores; both broadcast to
    [.., Lq, Lk]. A query that may attend to nothing gets weights of exactly 0: the softmax of a row
    that holds only -inf would be NaN, and that of equal large negatives a uniform average.
    """
    scores = q @ k.swapaxes(-1, -2)
    scores *= q.shape[-1] ** -0.5
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = row_max(scores)
    if (
        bias is not None and np.isnan(top).any()
    ):  # NaN - inf is NaN: choose, where a sum will not do
        scores = np.where(visible_pairs(mask, bias), scores, -np.inf)
        top = row_max(scores)
    scores -= np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores, out=scores)  # in place: a large array costs more to get than to fill
    total = row_sum(weights)
    weights /= np.where(total > 0, total, 1)
    return weights


def weigh(weights, x, visible):  # [.., I, J], [.., J, K], bool [.., I, J] or None -> [.., I, K]
    """weights @ x, in which a hidden pair's weight of 0 hides NaN and infinity, too."""
    if visible is None or np.isfinite(x).all():
        return weights @ x
    visible, wrong = np.broadcast_to(visible, weights.shape), ~np.isfinite(x)
    return np.where(visible @ wrong, weights @ x, weights @ np.where(wrong, 0, x))


@differentiable
def attention(q, k, v, mask=None, bias=None):
    """[.., Lq, K], [.., Lk, K], [.., Lk, K] -> [.., Lq, K]; see attention_weights for the mask.

    What a query may not attend to does not reach it, in output or gradient, NaN or not.
    """
    return weigh(attention_weights(q, k, mask, bias), v, visible_pairs(mask, bias))


@attention.gradient
def attention_backward(dout, q, k, v, mask=None, bias=None):
    p, visible, seen_by = attention_weights(q, k, mask, bias), visible_pairs(mask, bias), None
    if visible is not None:
        seen_by = np.broadcast_to(visible, p.shape).swapaxes(-1, -2)
    # out = p @ v
    dv = weigh(p.swapaxes(-1, -2), dout, seen_by)
    dscores = dout @ v.swapaxes(-1, -2)  # so far dp
    if visible is not None and not np.isfinite(dscores).all():
        dscores = np.where(visible, dscores, 0)
    # p = softmax(scores): a row of zeros stays a row of zeros
    dscores -= row_dot(p, dscores)
    dscores *= p
    # scores = q @ k^T / sqrt(K) + bias
    dscores *= q.shape[-1] ** -0.5
    return weigh(dscores, k, visible), weigh(dscores.swapaxes(-1, -2), q, seen_by), dv


class KeyValueCache:
    """The keys and values of the tokens seen so far, for one self-attention layer.

    Row b's token at position p lies at [b, p], so rows of different lengths share one cache with no
    padding between their tokens: what lies behind a row's last position is masked, and overwritten
    later.
    """

    def __init__(self, batch, length, heads, head_dim, dtype):
        self.k = np.zeros((batch, length, heads, head_dim), dtype)
        self.v = np.zeros_like(self.k)

    def update(self, k, v, positions):
        """Store k, v [B, L, H, K] at positions [B, L]; return all of them, [B, length, H, K]."""
        rows = np.arange(len(k))[:, None]
        self.k[rows, positions], self.v[rows, positions] = k, v
        return self.k, self.v

    def select(self, rows):
        """Keep (or repeat) the given batch rows, for beams."""
        self.k, self.v = self.k[rows], self.v[rows]


def swap_heads(x):  # [B, L, H, K] <-> [B, H, L, K]
    """Exchange the token and the head axis."""
    return x.transpose(0, 2, 1, 3)


class MultiHeadAttention(Module):
    """H attentions side by side, of width K each; self-attention unless a context is given."""

    def __init__(self, dim, heads, head_dim, context_dim=None, out_scale=1.0, *, rng):
        context_dim, inner = context_dim or dim, heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.q_proj = Linear(dim, inner, rng=rng)
        self.k_proj = Linear(context_dim, inner, rng=rng)
        self.v_proj = Linear(context_dim, inner, rng=rng)
        self.out_proj = Linear(inner, dim, scale=out_scale, rng=rng)

    def project(self, projection, x):  # [B, L, D] -> [B, L, H, K]
        """Apply one of the three projections and split the heads."""
        return projection(x).reshape(*x.shape[:-1], self.heads, self.head_dim)

    def weights(self, x, context=None, mask=None, bias=None):
        """How much each query looks at each key, [B, H, Lq, Lk]; arguments as in forward."""
        q = self.project(self.q_proj, x)
        k = self.project(self.k_proj, x if context is None else context)
        return attention_weights(swap_heads(q), swap_heads(k), mask, bias)

    def forward(self, x, context=None, mask=None, bias=None, cache=None, positions=None):
        """x [B, Lq, D], context [B, Lk, C] -> [B, Lq, D]; mask, bias broadcast to [B, H, Lq, Lk].

        With a KeyValueCache, keys and values of x go to `positions` [B, Lq] and Lk is its length.
        """
        context = x if context is None else context
        q = self.project(self.q_proj, x)
        k, v = self.project(self.k_proj, context), self.project(self.v_proj, context)
        if cache is not None:
            k, v = cache.update(k, v, positions)
        out = attention(swap_heads(q), swap_heads(k), swap_heads(v), mask=mask, bias=bias)
        return self.out_proj(swap_heads(out).reshape(*x.shape[:-1], self.heads * self.head_dim))


class FeedForward(Module):
    """x -> down(activation(up(norm(x)))): the dense half of a layer, D -> hidden -> D."""

    def __init__(
        self, dim, hidden, activation="squared_relu", norm=LayerNorm, out_scale=1.0, *, rng
    ):
        self.activation = ACTIVATIONS[activation]
        self.norm = norm(dim)
        self.up = Linear(dim, hidden, rng=rng)
        self.down = Linear(hidden, dim, scale=out_scale, rng=rng)

    def forward(self, x):  # [..., D] -> [..., D]
        return self.down(self.activation(self.up(self.norm(x))))


class TransformerBlock(Module):
    """Self-attention and feed-forward, each with a norm before it and the residual around it.

    ValueError when dim is no multiple of heads.
    """

    def __init__(self, dim, heads, hidden, activation="gelu", norm=RMSNorm, out_scale=1.0, *, rng):
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.norm = norm(dim)
        self.attention = MultiHeadAttention(dim, heads, dim // heads, out_scale=out_scale, rng=rng)
        self.ffw = FeedForward(dim, hidden, activation, norm, out_scale, rng=rng)

    def forward(self, x, mask=None, bias=None, cache=None, positions=None):
        """x [B, L, D] -> [B, L, D]; the other arguments as in MultiHeadAttention."""
        x = x + self.attention(self.norm(x), None, mask, bias, cache, positions)
        return x + self.ffw(x)
