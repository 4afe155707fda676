"""How public systems depart from the paper: one table, read by NumPy and torch modules alike.

    GatedCrossAttentionDense(D, D_media, H, K, dialect=DIALECTS["idefics"], rng=rng)
    FlamingoConfig(dialect=replace(DIALECTS["mllama"], kv_heads=8, hidden=14336))

A row says what every checkpoint of a project has in common; what its own config decides (a hidden
size, shared keys) is put in by the project's loader in interop/. `BlockConfig` is the same for the
blocks of the frozen language model, which the paper leaves open.
"""

from dataclasses import dataclass, field

from miniflamingo.checks import LATER, check_above_zero, check_at_least, check_types

ACTIVATION_NAMES = ("relu", "squared_relu", "gelu", "gelu_exact", "quick_gelu", "silu", "relu6")
NORM_NAMES = ("layer", "rms")


def check_one_of(config, choices, *names):
    """ValueError unless each named field is one of the choices; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class BlockConfig:
    """What a language model's block is made of; the defaults are the mini model's.

    norm is "rms" or "layer", norm_eps None its usual one; gated is SwiGLU's second projection;
    hidden replaces ffw_mult * dim, head_dim replaces dim / heads; kv_heads (None: all) is the
    number of keys and values that the heads share; qk_norm gives the queries and the keys a norm
    each, of all heads together. ValueError for a value that cannot work.
    """

    activation: str = "gelu"
    gated: bool = False
    hidden: int | None = None
    norm: str = "rms"
    norm_eps: float | None = None
    bias: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    qk_norm: bool = field(default=False, metadata=LATER)

    def __post_init__(self):
        check_types(self)
        check_one_of(self, ACTIVATION_NAMES, "activation")
        check_one_of(self, NORM_NAMES, "norm")
        check_at_least(self, 1, "hidden", "head_dim", "kv_heads")
        check_above_zero(self, "norm_eps")


@dataclass(frozen=True)
class Dialect:
    """Options of the gated layers and of the resampler; the defaults are the paper's.

    activation, gated, hidden (None: 4 D), norm and norm_eps (None: the norm's usual one) are those
    of a gated layer; media_norm=False leaves out the norm of the visual tokens; qk_norm is that of
    its queries and keys ("layer", "rms" or None), kv_heads the number of keys that its heads share.
    vector_alpha makes a gate of [D] of each gate; offset is the first block with a layer before it.
    The resampler has time_embeddings or none, and media_embeddings, one for each image or video of
    a sequence, or none. ValueError for a value that cannot work.
    """

    activation: str = "squared_relu"
    gated: bool = False
    hidden: int | None = None
    norm: str = "layer"
    norm_eps: float | None = None
    media_norm: bool = True
    qk_norm: str | None = None
    kv_heads: int | None = None
    vector_alpha: bool = False
    offset: int = 0
    resampler_activation: str = "squared_relu"
    resampler_qk_norm: str | None = None
    time_embeddings: bool = True
    media_embeddings: int | None = None

    def __post_init__(self):
        check_types(self)
        check_one_of(self, ACTIVATION_NAMES, "activation", "resampler_activation")
        check_one_of(self, NORM_NAMES, "norm", "qk_norm", "resampler_qk_norm")
        check_at_least(self, 1, "hidden", "kv_heads", "media_embeddings")
        check_at_least(self, 0, "offset")
        check_above_zero(self, "norm_eps")


DIALECTS = {
    "paper": Dialect(),
    "flamingo-pytorch": Dialect(
        "gelu_exact", media_norm=False,
        resampler_activation="gelu_exact", time_embeddings=False, media_embeddings=4,
    ),
    "open-flamingo": Dialect(
        "gelu_exact", media_norm=False,
        resampler_activation="gelu_exact", time_embeddings=False,
    ),
    "idefics": Dialect(
        "silu", gated=True, norm="rms", media_norm=False,
        resampler_activation="relu", time_embeddings=False,
    ),
    "mllama": Dialect(  # and skip_without_image, and no resampler
        "silu", gated=True, norm="rms", norm_eps=1e-5, media_norm=False, qk_norm="rms",
    ),
}  # fmt: skip
