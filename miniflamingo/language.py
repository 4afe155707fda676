"""The decoder-only language model that Flamingo freezes.

Pre-norm transformer blocks with RMSNorm. Positions are ALiBi (Press et al., 2022), a linear penalty
on distance that extrapolates to prompts longer than any seen in training, or a learned table. The
paper's LM, Chinchilla, uses relative positions of the Transformer-XL kind instead.

Letters: B batch, L tokens, D width, H heads, V vocabulary, Lk keys (the length of a cache, or L).
"""

from dataclasses import asdict, dataclass, field

import numpy as np

from miniflamingo.attention import TransformerBlock
from miniflamingo.checks import LATER, check_at_least, check_range, check_types
from miniflamingo.dialects import BlockConfig, check_one_of
from miniflamingo.functional import Embedding, Linear, embedding, linear, norm_named
from miniflamingo.module import Module, Parameter
from miniflamingo.rotary import RotaryConfig


@dataclass(frozen=True)
class LanguageConfig:
    """A language model. The defaults are the mini model's.

    positions is "alibi", "learned" (max_positions rows) or "rotary"; alibi_slopes [H] default to
    the geometric series of the ALiBi paper, 2^(-8/H), 2^(-16/H), ... num_logits, where other models
    have more embeddings than words, is the number of words that the head knows.
    """

    vocab_size: int = 128
    dim: int = 64
    depth: int = 3
    heads: int = 4
    ffw_mult: int = 4
    positions: str = "alibi"
    alibi_slopes: tuple[float, ...] | None = None
    max_positions: int = 2048
    tie_embeddings: bool = False
    block: BlockConfig = field(default_factory=BlockConfig, metadata=LATER)
    rotary: RotaryConfig = field(default_factory=RotaryConfig, metadata=LATER)
    num_logits: int | None = field(default=None, metadata=LATER)

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "vocab_size", "dim", "depth", "heads", "ffw_mult", "max_positions")
        check_range(self, 1, self.vocab_size, "num_logits")
        check_one_of(self, ("alibi", "learned", "rotary"), "positions")
        kv_heads, head_dim = self.kv_shape
        if self.heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads}, {kv_heads}")
        if self.positions == "rotary" and head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, got {head_dim}")
        if self.num_logits and self.tie_embeddings:
            raise ValueError("num_logits needs a head of its own (tie_embeddings=False)")
        if self.alibi_slopes is not None and len(self.alibi_slopes) != self.heads:
            raise ValueError(f"{self.heads} heads need as many slopes, got {self.alibi_slopes}")
        if self.block.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")

    @property
    def kv_shape(self):
        """How many keys a token has, and their width."""
        return self.block.kv_heads or self.heads, self.block.head_dim or self.dim // self.heads

    @property
    def block_norm(self):
        """(name, eps) of the blocks' norms and of the last one."""
        return self.block.norm, self.block.norm_eps

    def block_options(self):
        """The arguments of TransformerBlock but for the norm, which NumPy and torch each have."""
        options = asdict(self.block)
        options["hidden"] = self.block.hidden or self.ffw_mult * self.dim
        options["rotary"] = self.rotary if self.positions == "rotary" else None
        return {k: v for k, v in options.items() if not k.startswith("norm")}


def alibi_slopes(heads):  # -> [H]
    """2^(-8 h / H) for h = 1..H (Press et al., 2022, section 3)."""
    return 2.0 ** (-8 / heads * np.arange(1, heads + 1))


class LanguageModel(Module):
    """tokens -> embed -> blocks -> predict -> logits; Flamingo's layers go between the blocks."""

    def __init__(self, config, *, rng):
        self.config, norm = config, norm_named(*config.block_norm)
        self.embedding = Embedding(config.vocab_size, config.dim, rng=rng)
        self.positions = None
        if config.positions == "learned":
            table = rng.normal(0, 0.02, (config.max_positions, config.dim))
            self.positions = Parameter(table.astype(np.float32, copy=False))
        self.blocks = [
            TransformerBlock(
                config.dim, config.heads, norm=norm, out_scale=(2 * config.depth) ** -0.5,
                **config.block_options(), rng=rng,
            )
            for _ in range(config.depth)
        ]  # fmt: skip
        self.norm = norm(config.dim)
        tied, words = config.tie_embeddings, config.num_logits or config.vocab_size
        self.head = None if tied else Linear(config.dim, words, rng=rng)

    def embed(self, tokens, positions, table=None):
        """tokens, positions int[B, L] (or [1, L]) -> [B, L, D]; `table` [V, D] replaces the own."""
        x = self.embedding(tokens) if table is None else embedding(tokens, table)
        if self.positions is None:
            return x
        if positions.size and positions.max() >= len(self.positions):
            most = len(self.positions)
            raise ValueError(f"positions go up to {most - 1}, got {positions.max()}")
        return x + embedding(positions, self.positions)

    def causality(self, positions, num_keys):
        """How a token at `positions` int[B, L] sees keys 0..num_keys - 1: a bias [B, H, L, Lk].

        -inf for the future; for the past minus slope times distance (ALiBi), or 0 (H = 1 then).
        None where it would be 0 throughout: no slopes, and all tokens behind all keys.
        """
        if self.config.positions != "alibi" and positions.min(initial=num_keys) >= num_keys - 1:
            return None
        distance = positions[:, None, :, None] - np.arange(num_keys)
        slopes = self.config.alibi_slopes or alibi_slopes(self.config.heads)
        slopes = slopes if self.config.positions == "alibi" else (0.0,)
        slopes = np.array(slopes, self.embedding.weight.dtype)[:, None, None]
        return np.where(distance >= 0, -slopes * distance.astype(slopes.dtype), -np.inf)

    def predict(self, x, table=None, head=None):
        """[B, L, D] -> logits [B, L, V]; `table` or `head` [V, D] replaces the model's own."""
        x = self.norm(x)
        if self.head is None:
            return linear(x, self.embedding.weight if table is None else table)
        return linear(x, self.head.weight if head is None else head)

    def forward(self, tokens, positions=None, cache=None, last=False, noise=None):
        """tokens int[B, L] -> logits [B, L, V], or with `last` those of the last token, [B, 1, V].

        With a cache (one KeyValueCache a block), tokens stand at `positions` int[B, L]; without
        one, positions are 0..L-1. Rows of different lengths are padded at the END. noise [B, L, D]
        is added to the embedded tokens.
        """
        positions = np.arange(tokens.shape[1])[None] if positions is None else positions
        num_keys = tokens.shape[1] if cache is None else positions.max() + 1
        bias = self.causality(positions, num_keys)
        x = self.embed(tokens, positions)
        x = x if noise is None else x + noise
        for i, block in enumerate(self.blocks):
            x = block(x, None, bias, None if cache is None else cache[i], positions)
        return self.predict(x[:, -1:] if last else x)
