"""The decoder-only language model: causality, positions, the cache."""

import numpy as np
import pytest

from miniflamingo.attention import KeyValueCache
from miniflamingo.dialects import BlockConfig
from miniflamingo.language import LanguageConfig, LanguageModel, alibi_slopes
from miniflamingo.rotary import RotaryConfig
from tests.gradients import check_module

SIZES = {"vocab_size": 9, "dim": 8, "depth": 2, "heads": 2, "ffw_mult": 2, "max_positions": 6}
KINDS = {
    "alibi": {},
    "slopes": {"alibi_slopes": (1, 0)},
    "learned": {"positions": "learned"},
    "tied": {"tie_embeddings": True},
    "llama": {
        "positions": "rotary",
        "rotary": RotaryConfig(100.0, "linear", 2.0),
        "block": BlockConfig("silu", True, 12, norm_eps=1e-3, kv_heads=1),
    },
    "opt": {"positions": "learned", "block": BlockConfig("relu", norm="layer", bias=True)},
    "shared keys": {"block": BlockConfig(kv_heads=1, head_dim=3)},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
tokens = np.array([[1, 5, 6, 5, 8], [1, 7, 7, 0, 0]])


def model(kind):
    config = LanguageConfig(**SIZES, **KINDS[kind])
    return LanguageModel(config, rng=np.random.default_rng(0)).astype(np.float64)


@each_kind
def test_language_model(kind):
    check_module(model(kind), tokens)
    assert model(kind)(tokens).shape == (2, 5, 9)


@each_kind
def test_a_token_changes_itself_and_what_follows(kind):
    lm = model(kind)
    logits = lm(tokens)
    for at in range(5):
        changed = tokens.copy()
        changed[0, at] = 3
        moved = (lm(changed) != logits).any(axis=2)
        np.testing.assert_array_equal(moved, [np.arange(5) >= at, [False] * 5])


@each_kind
def test_padding_at_the_end_changes_nothing(kind):
    np.testing.assert_allclose(model(kind)(tokens)[1:, :3], model(kind)(tokens[1:, :3]), atol=1e-13)


@each_kind
def test_the_order_of_the_past_matters_unless_no_position_is_told(kind):
    swapped = tokens[:1, [0, 2, 1, 3, 4]]
    last = [model(kind)(t)[0, -1] for t in (tokens[:1], swapped)]
    assert np.abs(last[0] - last[1]).max() > 1e-4


def test_alibi_is_minus_slope_times_distance():
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2**i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[[0, 15]], [2**-0.5, 2**-8])
    bias = model("slopes").causality(np.array([[0, 1, 2], [2, 3, 4]]), 4)
    assert bias.shape == (2, 2, 3, 4)
    inf = np.inf
    np.testing.assert_array_equal(bias[0, 0], [[0, -inf, -inf, -inf], [-1, 0, -inf, -inf],
                                               [-2, -1, 0, -inf]])  # fmt: skip
    np.testing.assert_array_equal(bias[1, 0], [[-2, -1, 0, -inf], [-3, -2, -1, 0],
                                               [-4, -3, -2, -1]])  # fmt: skip
    np.testing.assert_array_equal(bias[1, 1, 0], [0, 0, 0, -inf])  # slope 0


def test_alibi_has_no_end_and_a_table_has():
    long = np.ones((1, 7), int)
    assert model("alibi")(long).shape == (1, 7, 9)
    with pytest.raises(ValueError, match="positions go up to 5, got 6"):
        model("learned")(long)


@each_kind
def test_the_cache_gives_the_same_logits_for_rows_of_different_lengths(kind):
    lm, lengths = model(kind), np.array([5, 3])
    whole = lm(tokens)
    caches = [KeyValueCache(2, 6, *lm.config.kv_shape, np.float64) for _ in lm.blocks]
    steps = [np.minimum(i, lengths - 1)[:, None] for i in range(5)]  # a row that ended repeats
    for positions in steps:
        logits = lm(np.take_along_axis(tokens, positions, axis=1), positions, caches)
        expected = np.take_along_axis(whole, positions[:, :, None], axis=1)
        np.testing.assert_allclose(logits, expected, atol=1e-13)


@each_kind
def test_last_gives_the_last_row_alone(kind):
    lm = model(kind)
    np.testing.assert_allclose(lm(tokens, last=True), lm(tokens)[:, -1:], atol=1e-14)


def test_tokens_behind_all_keys_need_no_bias():
    lm = model("llama")
    assert lm.causality(np.array([[4], [5]]), 5) is None
    np.testing.assert_array_equal(lm.causality(np.array([[3], [4]]), 5)[:, 0, 0, -1], [-np.inf, 0])
    assert model("alibi").causality(np.array([[4]]), 5).shape == (1, 2, 1, 5)


def test_tied_embeddings_have_no_head():
    assert model("tied").head is None
    extra = model("alibi").num_parameters() - model("tied").num_parameters()
    assert extra == 9 * 8


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"positions": "sine"}, "must be one of alibi, learned, rotary, got 'sine'"),
        ({"block": BlockConfig(kv_heads=3)}, "multiple of kv_heads, got 2, 3"),
        ({"positions": "rotary", "block": BlockConfig(head_dim=3)}, "an even head width, got 3"),
        ({"num_logits": 500}, r"num_logits must be in 1\.\.\d+, got 500"),
        ({"num_logits": 5, "tie_embeddings": True}, "a head of its own"),
        ({"alibi_slopes": (1,)}, r"2 heads need as many slopes, got \(1,\)"),
        ({"dim": 9}, "multiple of heads, got 9 and 2"),
    ],
)
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**{**SIZES, **wrong})
