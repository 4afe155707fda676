"""What all loaders share: fields of a foreign config, and a model filled one tensor at a time."""

import math
import re

import numpy as np

from miniflamingo.command import some
from miniflamingo.flamingo import ShapesOnly
from miniflamingo.rotary import SCALINGS, RotaryConfig
from miniflamingo.tensorfile import shown

# the names of activations in transformers -> ours
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# --- fields of a config ---------------------------------------------------------------------------

MOST = 2**24  # of what is counted: vocabularies have 262,144 words, contexts ten million tokens


def _whole(x, least=1):
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= MOST


def _above_zero(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf


# what a field must be -> whether a value is it, and the fields that are read, of all projects
KINDS = {
    f"a whole number from 1 to {MOST:,}": (_whole, """
        hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
        head_dim vocab_size max_position_embeddings original_max_position_embeddings ffn_dim
        word_embed_proj_dim d_model n_layers n_heads max_seq_len expansion_ratio alibi_bias_max
        embed_dim image_size patch_size num_channels width layers head_width vision_output_dim
        cross_layer_interval cross_attn_every_n_layers dim_head
        resampler_n_latents resampler_depth resampler_n_heads resampler_head_dim"""),
    f"a whole number from 0 to {MOST:,}": (lambda x: _whole(x, 0), """
        additional_vocab_size media_token_id eoc_token_id image_token_index"""),
    "a list of whole numbers": (
        lambda x: isinstance(x, list) and all(_whole(y, 0) for y in x), "cross_attention_layers"),
    "a number above 0": (_above_zero, """
        rms_norm_eps layer_norm_eps layer_norm_epsilon rope_theta factor low_freq_factor
        high_freq_factor beta_fast beta_slow attention_factor mlp_ratio"""),
    "true or false": (lambda x: isinstance(x, bool), """
        tie_word_embeddings use_resampler qk_layer_norms qk_layer_norms_perceiver quick_gelu
        use_sliding_window alibi qk_ln attn_qk_ln"""),
    "a text": (lambda x: isinstance(x, str), """
        model_type hidden_act activation_function rope_type type alpha_type attn_type"""),
    "an object": (lambda x: isinstance(x, dict), """
        text_config vision_config lang_config perceiver_config attn_config rope_parameters
        rope_scaling"""),
}  # fmt: skip
FIELDS = {name: (expected, fits) for expected, (fits, names) in KINDS.items()
          for name in names.split()}  # fmt: skip


def checked(config, where="the config's "):
    """A config.json (a dict) without what is null in it, which is what a missing field is.

    ValueError that names a field which is read here, what was expected and what it is.
    """
    found = {}
    for name, value in config.items():
        expected, fits = FIELDS.get(name, ("", None))
        if value is None:
            continue
        if fits and not fits(value):
            raise ValueError(f"{where}{name} must be {expected}, got {shown(repr(value))}")
        inner = expected == "an object"
        found[name] = checked(value, f"{where}{name}.") if inner else value
    return found


def need(config, *names):
    """The values of these fields of a config (a dict); ValueError that names one which is not."""
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ValueError(f"the config lacks {some(missing)}")
    return [config[name] for name in names]


def refuse(config, **wanted):
    """ValueError where a field that we cannot follow is there and not what we can."""
    for name, value in wanted.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{name} = {config[name]!r} is not supported, only {value!r}")


def activation(name):
    """Our name of an activation; ValueError for one that we do not have."""
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# a field of transformers' rope_parameters -> ours
ROTARY = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}


def rotary_of(config, base=10_000.0):
    """The RotaryConfig of a config.json, in transformers' older or newer form.

    ValueError for a scaling that we do not have, and for rotary positions in a part of a head.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in SCALINGS:
        raise ValueError(f"rope_type {kind!r} is none of {', '.join(SCALINGS)}")
    refuse(given, partial_rotary_factor=1.0, mscale=None, mscale_all_dim=None, truncate=True)
    refuse(config, partial_rotary_factor=1.0)
    base = given.get("rope_theta") or config.get("rope_theta") or base
    given = given if "original_max_position_embeddings" in given else {
        **given, "original_max_position_embeddings": config.get("max_position_embeddings"),
    }  # fmt: skip
    values = {ours: given[name] for name, ours in ROTARY.items() if given.get(name) is not None}
    return RotaryConfig(base=base, scaling=kind, **values)


# --- numbers --------------------------------------------------------------------------------------


def shapes_of(state):
    """{name: shape} of a mapping {name: array}; what knows its shapes is not read."""
    known = getattr(state, "shapes", None)
    return {n: np.shape(x) for n, x in state.items()} if known is None else known


def fill(module, state, dtype=np.float32, zeros=None):
    """Load {our name: array} into a module that was built with ShapesOnly; returns the module.

    One tensor at a time, so that a state which reads from a file is never whole in memory. `zeros`
    is a pattern of names that may be missing and are 0 then. ValueError that lists what is missing,
    unexpected, mis-shaped or not finite.
    """
    own, faults = dict(module.named_parameters()), []
    called = getattr(state, "source", str)
    missing = [n for n in own if n not in state and not (zeros and re.fullmatch(zeros, n))]
    faults += [f"missing: {n} {list(own[n].shape)}" for n in missing]
    faults += [f"unexpected: {n}" for n in state if n not in own]
    for name in own if not faults else ():
        shape = own[name].shape
        with np.errstate(over="ignore"):  # it is not finite then
            array = np.asarray(state[name] if name in state else np.zeros(shape), dtype)
        if array.shape != shape:
            faults.append(f"wrong shape: {called(name)} {list(shape)}, got {list(array.shape)}")
        elif not np.isfinite(array).all():
            faults.append(f"not finite: {called(name)}")
        own[name].data = array
    if faults:
        raise ValueError(f"the checkpoint does not fit its config ({len(faults)} faults): "
                         f"{some(faults)}")  # fmt: skip
    return module


def build(kind, config, state, dtype=np.float32, zeros=None):
    """A module of class `kind` with this config of ours, filled with {our name: array}."""
    return fill(kind(config, rng=ShapesOnly()), state, dtype, zeros)
