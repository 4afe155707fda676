"""Scaled dot-product attention, its mask, the cache, and the modules built from them."""

from dataclasses import replace

import numpy as np
import pytest

from miniflamingo.attention import (
    FeedForward,
    KeyValueCache,
    MultiHeadAttention,
    TransformerBlock,
    attention,
    attention_backward,
    attention_in_parts,
    attention_weights,
    swap_heads,
)
from miniflamingo.functional import LayerNorm, RMSNorm, softmax
from miniflamingo.rotary import RotaryConfig
from tests.gradients import Case, check_module, each_of, normal, through_tape

q, k, v = normal(2, 3, 4, 5), normal(2, 3, 6, 5), normal(2, 3, 6, 5, seed=1)
rng = np.random.default_rng(0)
mask = rng.random((2, 1, 4, 6)) < 0.6
mask[0, 0, 2] = False  # this query may attend to nothing
bias = normal(3, 1, 6)
causal = np.where(np.tri(4, 6, 1, bool), 0.0, -np.inf)


def oracle(torch, q, k, v, mask=None, bias=None):
    """torch's own attention; a row without any key counts as 0."""
    allowed = torch.zeros(2, 3, 4, 6, dtype=q.dtype) if bias is None else bias.expand(2, 3, 4, 6)
    allowed = allowed if mask is None else allowed.masked_fill(~mask, -torch.inf)
    nothing = allowed.isneginf().all(dim=-1, keepdim=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, attn_mask=allowed.masked_fill(nothing, 0)).masked_fill(nothing, 0)


CASES = [
    Case(attention, (q, k, v), oracle),
    Case(attention, (q, k, v), oracle, {"mask": mask}, "mask"),
    Case(attention, (q, k, v), oracle, {"bias": bias}, "bias"),
    Case(attention, (q, k, v), oracle, {"mask": mask, "bias": bias}, "mask and bias"),
    Case(attention, (q, k, v), oracle, {"bias": causal}, "a bias of minus infinity"),
    Case(attention, (4 * q, 4 * k, v), oracle, {"mask": mask}, "sharp"),
]


@each_of(CASES)
def test_formula(case, check):
    check(case)


@pytest.mark.parametrize("most", [1, 50, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_parts_it_is_the_same_in_both_directions(case, most, monkeypatch):
    whole = through_tape(case)
    monkeypatch.setattr("miniflamingo.attention.MOST_SCORES", most)
    parts = through_tape(replace(case, formula=attention_in_parts))
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-14)
    for ours, theirs in zip(parts[1], whole[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


def shared_by_hand(module, x, bias):
    """The module with its keys and values written out, one for each head."""
    full = MultiHeadAttention(8, 4, 3, rng=rng).astype(np.float64)
    state = module.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].reshape(2, 3, 8).repeat(2, axis=0).reshape(12, 8)
    return full.load_state_dict(state)(x, bias=bias)


past = np.where(np.tri(5, dtype=bool), 0, -np.inf)


@pytest.mark.parametrize("bias", [None, normal(4, 1, 5), past], ids=["none", "heads", "past"])
def test_shared_keys_are_those_keys_repeated(bias):
    module, x = MultiHeadAttention(8, 4, 3, kv_heads=2, rng=rng).astype(np.float64), normal(2, 5, 8)
    np.testing.assert_allclose(module(x, bias=bias), shared_by_hand(module, x, bias), atol=1e-12)
    assert module.weights(x, bias=bias).shape == (2, 4, 5, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 1}, {"kv_heads": 2, "bias": True}, {"qk_norm": RMSNorm},
        {"rotary": RotaryConfig(50.0), "kv_heads": 2, "qk_norm": LayerNorm},
    ],
    ids=str,
)  # fmt: skip
def test_options(options):
    module = MultiHeadAttention(8, 4, 4, rng=rng, **options)
    check_module(module, normal(2, 5, 8), bias=past)


def test_heads_must_share_keys_evenly():
    with pytest.raises(ValueError, match="multiple of kv_heads, got 4 and 3"):
        MultiHeadAttention(8, 4, 3, kv_heads=3, rng=rng)


@pytest.mark.parametrize("activation", ["silu", "gelu_exact"])
def test_gated_feed_forward(activation):
    ffw, x = FeedForward(4, 6, activation, gated=True, bias=True, rng=rng), normal(2, 3, 4)
    check_module(ffw, x)
    h = ffw.norm(x)
    by_hand = ffw.down(ffw.activation(ffw.gate(h)) * ffw.up(h))
    np.testing.assert_array_equal(ffw(x), by_hand)


def test_weights_are_a_softmax_over_the_allowed_keys():
    weights = attention_weights(q, k, mask, bias)
    any_key = np.broadcast_to(mask.any(axis=-1), weights.shape[:-1])
    np.testing.assert_allclose(weights.sum(axis=-1), any_key)
    assert (weights[~np.broadcast_to(mask, weights.shape)] == 0).all()
    by_hand = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(5) + bias)
    np.testing.assert_allclose(attention_weights(q, k, bias=bias), by_hand)


@pytest.mark.parametrize("nothing", ["mask", "bias", "no keys"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_query_without_keys_gets_exactly_zero(nothing, dtype):
    keys = 0 if nothing == "no keys" else 6
    arrays = [x.astype(dtype) for x in (q, k[:, :, :keys], v[:, :, :keys])]
    allowed = np.ones((4, keys), bool)
    allowed[2] = False
    options = {"mask": allowed} if nothing != "bias" else {"bias": np.where(allowed, 0, -np.inf)}
    dq, dk, dv = attention_backward(np.ones((2, 3, 4, 5), dtype), *arrays, **options)
    assert (attention(*arrays, **options)[:, :, 2] == 0).all()
    assert (dq[:, :, 2] == 0).all()
    # and it moves no key and no value: the gradients are those without it
    rest = [np.delete(arrays[0], 2, axis=2), *arrays[1:]]
    without = attention_backward(np.ones((2, 3, 3, 5), dtype), *rest)
    np.testing.assert_allclose(dk, without[1], atol=1e-6)
    np.testing.assert_allclose(dv, without[2], atol=1e-6)


def test_large_scores_do_not_overflow():
    big = (1e4 * q).astype(np.float32)
    out = attention(big, k.astype(np.float32), v.astype(np.float32), mask=mask)
    assert np.isfinite(out).all()


def test_the_order_of_keys_does_not_matter_and_that_of_queries_carries_over():
    keys, queries = rng.permutation(6), rng.permutation(4)
    out = attention(q, k, v, mask=mask)
    np.testing.assert_allclose(
        attention(q, k[:, :, keys], v[:, :, keys], mask=mask[..., keys]), out, atol=1e-14
    )
    np.testing.assert_allclose(
        attention(q[:, :, queries], k, v, mask=mask[:, :, queries]), out[:, :, queries], atol=1e-14
    )


def test_identical_keys_average_the_values():
    same = np.broadcast_to(k[:, :, :1], k.shape)
    mean = np.broadcast_to(v.mean(axis=2, keepdims=True), q.shape)
    np.testing.assert_allclose(attention(q, same, v), mean)


# --- the cache ------------------------------------------------------------------------------------


def test_cache_stores_each_row_at_its_own_positions():
    cache = KeyValueCache(2, 5, heads=1, head_dim=2, dtype=np.float32)
    first = np.arange(8, dtype=np.float32).reshape(2, 2, 1, 2)
    cache.update(first, -first, np.array([[0, 1], [0, 1]]))
    k, v = cache.update(first[:, :1] + 10, first[:, :1] + 20, np.array([[1], [3]]))
    np.testing.assert_array_equal(k[0, :, 0, 0], [0, 10, 0, 0])  # overwritten at 1
    np.testing.assert_array_equal(k[1, :, 0, 0], [4, 6, 0, 14])
    np.testing.assert_array_equal(v[1, :, 0, 1], [-5, -7, 0, 25])
    np.testing.assert_array_equal(cache.k[:, 4], 0)  # behind the furthest, which is not returned
    assert k.dtype == np.float32


def test_cache_select_keeps_and_repeats_rows_without_sharing_them():
    cache = KeyValueCache(2, 3, heads=1, head_dim=1, dtype=np.float64)
    cache.update(np.array([[[[1.0]]], [[[2.0]]]]), np.zeros((2, 1, 1, 1)), np.zeros((2, 1), int))
    cache.select([1, 1, 0])
    cache.update(np.full((3, 1, 1, 1), 9.0), np.zeros((3, 1, 1, 1)), np.array([[0], [1], [2]]))
    np.testing.assert_array_equal(cache.k[:, :, 0, 0], [[9, 0, 0], [2, 9, 0], [1, 0, 9]])


def test_token_by_token_equals_all_at_once():
    block = TransformerBlock(8, 2, 16, rng=rng).astype(np.float64)
    x, L = normal(2, 5, 8), 5
    causal = np.where(np.tri(L, dtype=bool), 0, -np.inf)[None, None]
    whole, cache = block(x, bias=causal), KeyValueCache(2, L, 2, 4, np.float64)
    for i in range(L):
        at = np.full((2, 1), i)
        step = block(x[:, i : i + 1], bias=causal[:, :, i : i + 1, : i + 1], cache=cache,
                     positions=at)  # fmt: skip
        np.testing.assert_allclose(step, whole[:, i : i + 1], atol=1e-13)


# --- modules --------------------------------------------------------------------------------------


def test_swap_heads_is_its_own_inverse():
    x = normal(2, 3, 4, 5)
    assert swap_heads(x).shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(swap_heads(swap_heads(x)), x)


def test_multi_head_attention_equals_torchs():
    torch = pytest.importorskip("torch")
    ours = MultiHeadAttention(8, 2, 4, rng=rng).astype(np.float64)
    theirs = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True, dtype=torch.float64)
    qkv = [ours.q_proj.weight.data, ours.k_proj.weight.data, ours.v_proj.weight.data]
    theirs.in_proj_weight.data = torch.from_numpy(np.concatenate(qkv))
    theirs.out_proj.weight.data = torch.from_numpy(ours.out_proj.weight.data)
    x, context = normal(2, 3, 8), normal(2, 5, 8)
    for keys in (x, context):
        expected = theirs(*map(torch.from_numpy, (x, keys, keys)))[0].detach().numpy()
        np.testing.assert_allclose(ours(x, keys), expected, atol=1e-12)
    np.testing.assert_array_equal(ours(x), ours(x, x))


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("activation", ["relu", "squared_relu", "gelu"])
def test_blocks(norm, activation):
    check_module(FeedForward(4, 6, activation, norm, rng=rng), normal(2, 3, 4))
    block = TransformerBlock(4, 2, 6, activation, norm, rng=rng)
    check_module(block, normal(2, 3, 4), bias=np.where(np.tri(3, dtype=bool), 0, -np.inf))


def test_a_block_is_two_residuals():
    block, x = TransformerBlock(8, 2, 6, rng=rng).astype(np.float64), normal(2, 3, 8)
    y = x + block.attention(block.norm(x))
    ffw = block.ffw
    z = y + ffw.activation(ffw.norm(y) @ ffw.up.weight.data.T) @ ffw.down.weight.data.T
    np.testing.assert_allclose(block(x), z, atol=1e-13)


def test_a_width_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match="multiple of heads, got 8 and 3"):
        TransformerBlock(8, 3, 16, rng=rng)


def test_cross_attention():
    module = MultiHeadAttention(4, 2, 3, context_dim=5, rng=rng)
    allowed = np.array([[True, False, True, True], [False, False, False, False]])
    check_module(module, normal(2, 3, 4), normal(2, 4, 5), mask=allowed[:, None, None])
    out = module(normal(2, 3, 4), normal(2, 4, 5), mask=allowed[:, None, None])
    assert (out[1] == 0).all()  # no bias anywhere: nothing seen is nothing added


# --- masked means unseen --------------------------------------------------------------------------

each_bad = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


@each_bad
@pytest.mark.parametrize("way", ["mask", "bias"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # inf - inf, in a score that is not used
def test_a_key_that_nobody_may_see_reaches_nothing(bad, way):
    hidden = np.array([0, 1, 0, 0, 0, 1], bool)
    options = {"mask": ~hidden} if way == "mask" else {"bias": np.where(hidden, -np.inf, bias)}
    poisoned_k, poisoned_v = k.copy(), v.copy()
    poisoned_k[..., hidden, :] = poisoned_v[..., hidden, :] = bad
    out = attention(q, poisoned_k, poisoned_v, **options)
    np.testing.assert_array_equal(out, attention(q, k, v, **options))
    dout = normal(*out.shape, seed=1)
    grads = attention_backward(dout, q, poisoned_k, poisoned_v, **options)
    for grad, expected in zip(grads, attention_backward(dout, q, k, v, **options)):
        np.testing.assert_array_equal(grad, expected)
    assert not grads[1][..., hidden, :].any() and not grads[2][..., hidden, :].any()


@each_bad
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_later_key_reaches_no_earlier_query(bad):
    later, options = np.arange(4) >= 2, {"bias": causal[:, :4]}  # query i sees keys 0..i+1
    poisoned_k, poisoned_v, dout = k[..., :4, :].copy(), v[..., :4, :].copy(), normal(2, 3, 4, 5)
    poisoned_k[..., 3, 0] = poisoned_v[..., 3, 1] = bad
    clean = q, k[..., :4, :], v[..., :4, :]
    out, expected = attention(q, poisoned_k, poisoned_v, **options), attention(*clean, **options)
    np.testing.assert_array_equal(out[..., ~later, :], expected[..., ~later, :])
    assert not np.isfinite(out[..., later, :]).all(axis=-1).any()
    dq = attention_backward(dout, q, poisoned_k, poisoned_v, **options)[0]
    expected = attention_backward(dout, *clean, **options)[0]
    np.testing.assert_array_equal(dq[..., ~later, :], expected[..., ~later, :])
