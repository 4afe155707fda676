"""Whole random Llamas, OPTs and MPTs of transformers, here: logits, hidden states, tokens."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest

from miniflamingo.attention import KeyValueCache
from miniflamingo.interop import PROJECTS, llama, project_of
from miniflamingo.interop.loading import rotary_of, shapes_of
from miniflamingo.rotary import RotaryConfig
from tests.interop.agreement import (
    Case,
    arrays,
    check,
    compare,
    each_route,
    move,
    run_theirs,
    worst,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch")

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=48)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", dict(SIZES, intermediate_size=48, num_key_value_heads=2)),
    "tied": ("Llama", dict(SIZES, intermediate_size=40, tie_word_embeddings=True)),
    "llama3": ("Llama", dict(SIZES, intermediate_size=48, rope_parameters=LLAMA3, head_dim=10)),
    "biased": ("Llama", dict(SIZES, intermediate_size=48, attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(SIZES, intermediate_size=48, num_key_value_heads=1,
                                sliding_window=None)),
    "qwen2": ("Qwen2", dict(SIZES, intermediate_size=48, num_key_value_heads=2)),
    "opt": ("OPT", dict(SIZES, ffn_dim=40, word_embed_proj_dim=32, max_position_embeddings=40)),
    "mpt": ("Mpt", dict(d_model=24, n_layers=2, n_heads=3, vocab_size=48, max_seq_len=40)),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 14))


@functools.cache
def theirs_and_ours(name, dtype=torch.float64):
    """transformers' model with weights away from their start, its config as a dict, and ours."""
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    move(model)
    about, state = json.loads(config.to_json_string(use_diff=False)), arrays(model)
    project = PROJECTS[project_of(about, shapes_of(state))]
    return model, about, project, project.build(about, state, np.float64)


each_model = pytest.mark.parametrize("name", MODELS)


MOST = 2e-6  # transformers computes norms and softmax in float32, whatever the model's dtype


def errors(name, route):
    """What `compare` says of our logits and of all gradients."""
    model, about, project, ours = theirs_and_ours(name)
    ids = torch.from_numpy(TOKENS)
    peer = run_theirs(model, lambda: model(input_ids=ids).logits, {}, about)
    call = lambda m, to: m(to.of(TOKENS))  # noqa: E731
    return compare(peer, project, ours, call, relative=True, route=route)


@each_route
@each_model
def test_logits_and_all_gradients(name, route):
    if route == "fused":
        pytest.skip("a language model alone has no kernel")
    check(errors(name, route), MOST)


@each_model
def test_hidden_states(name):
    model, _, _, ours = theirs_and_ours(name)
    states = model(input_ids=torch.from_numpy(TOKENS), output_hidden_states=True).hidden_states
    positions = np.arange(TOKENS.shape[1])[None]
    x, bias = ours.embed(TOKENS, positions), ours.causality(positions, TOKENS.shape[1])
    for block, state in zip(ours.blocks, states):
        assert worst([(x, state.detach().numpy())], relative=True) <= 2e-6
        x = block(x, None, bias, None, positions)
    assert worst([(ours.norm(x), states[-1].detach().numpy())], relative=True) <= 2e-6


def greedy(lm, tokens, n, cached):
    """n new tokens int[B, n], each the likeliest."""
    B, L = tokens.shape
    cache = [KeyValueCache(B, L + n, *lm.config.kv_shape, np.float64) for _ in lm.blocks]
    new, at = tokens, 0
    for _ in range(n):
        positions = np.arange(at, tokens.shape[1])[None].repeat(B, axis=0)
        logits = lm(new, positions, cache) if cached else lm(tokens)
        at, new = tokens.shape[1], logits[:, -1:].argmax(axis=-1)
        tokens = np.concatenate([tokens, new], axis=1)
    return tokens[:, L:]


def same_tokens(name):
    """Whether twenty greedy tokens are theirs, decoded with a cache and without."""
    model, _, _, ours = theirs_and_ours(name)
    ids = torch.from_numpy(TOKENS)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 14:].numpy()
    return all(
        np.array_equal(greedy(ours, TOKENS, 20, cached), expected) for cached in (True, False)
    )


@each_model
def test_twenty_greedy_tokens(name):
    assert same_tokens(name)


def cases():
    """The rows of the agreement table; a language model alone has no kernel."""
    for name in MODELS:
        measures = (functools.partial(work, name) for work in (errors, same_tokens))
        yield Case(MODELS[name][0].lower(), "whole model", name, MOST, *measures,
                   routes=("numpy", "torch"))  # fmt: skip


def test_a_name_that_no_rule_knows():
    model, about, _, _ = theirs_and_ours("llama")
    state = arrays(model) | {f"model.layers.0.lora.{i}": np.zeros(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"12 names are not understood: .*lora.9, .* and 2 more"):
        llama.build(about, state)


def test_a_tensor_that_is_missing_and_one_of_another_shape():
    model, about, _, _ = theirs_and_ours("llama")
    state = arrays(model)
    q = state.pop("model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match=r"missing: blocks.1.attention.q_proj.weight \[32, 32\]"):
        llama.build(about, state)
    state["model.layers.1.self_attn.q_proj.weight"] = q[:5]
    with pytest.raises(ValueError, match=r"wrong shape: model.layers.1.self_attn.q_proj.weight"):
        llama.build(about, state)
    state["model.layers.1.self_attn.q_proj.weight"] = q * np.nan
    with pytest.raises(ValueError, match=r"not finite: model.layers.1.self_attn.q_proj.weight"):
        llama.build(about, state)


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("llama", {"hidden_size": None}, "the config lacks hidden_size"),
        ("llama", {"hidden_act": "xielu"}, "the activation 'xielu' is none of gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_type 'longrope' is none of",
        ),
        ("llama", {"num_key_value_heads": 3}, "multiple of kv_heads, got 4, 3"),
        ("llama", {"num_hidden_layers": "two"}, "depth must be int, got 'two'"),
        ("mistral", {"sliding_window": 8}, "sliding_window = 8 is not supported"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False is not supported"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv = 6.0 is not supported"),
    ],
)
def test_configs_that_we_cannot_follow(name, wrong, message):
    model, about, project, _ = theirs_and_ours(name)
    with pytest.raises(ValueError, match=message):
        project.build(about | wrong, arrays(model))


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"rope_theta": 5e5}, RotaryConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RotaryConfig(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RotaryConfig(1e4, "linear", 2.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if "theta" not in k},
            },
            RotaryConfig(5e5, "llama3", 4.0, original_length=16),
        ),
        (
            {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            RotaryConfig(1e4, "yarn", 2.0, original_length=64),
        ),
    ],
)
def test_positions_of_older_configs(config, expected):
    found = rotary_of(config)
    lengths = {"original_length": 8192} if expected.scaling in ("default", "linear") else {}
    assert replace(found, **lengths) == expected


def test_a_checkpoint_of_nobody():
    with pytest.raises(ValueError, match="a checkpoint of 'bert' is of none of idefics, mllama"):
        project_of({"model_type": "bert"}, {"bert.embeddings": (1,)})
