"""phi, image-causal attention and the gate: what makes Flamingo Flamingo."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflamingo.attention import attention, attention_backward, swap_heads
from miniflamingo.autograd import Tape, Tensor
from miniflamingo.xattn import (
    GatedCrossAttentionDense,
    ImageCausalCrossAttention,
    check_phi,
    compute_phi,
    image_causal_attention,
    image_causal_attention_backward,
    image_causal_mask,
    tanh_gate,
    work_list,
)
from tests.gradients import Case, check_module, each_of, normal

phi = np.array([[0, 1, 1, 3, 3], [2, 2, 0, 1, 0]])
q, k, v = normal(2, 5, 2, 3), normal(2, 3, 4, 2, 3), normal(2, 3, 4, 2, 3, seed=1)
rng = np.random.default_rng(0)


def oracle(torch, q, k, v, phi):
    """Each token by itself, with torch's own attention, over its image alone."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    zero = (q.sum() + k.sum() + v.sum()) * torch.zeros(2, 3)
    rows = [
        [
            sdpa(q[b, l, :, None], k[b, j - 1].transpose(0, 1), v[b, j - 1].transpose(0, 1))[:, 0]
            if j
            else zero
            for l, j in enumerate(images)
        ]
        for b, images in enumerate(phi.tolist())
    ]
    return torch.stack([torch.stack(row) for row in rows])


CASES = [
    Case(image_causal_attention, (q, k, v, phi), oracle),
    Case(image_causal_attention, (q, k, v, 0 * phi), oracle, note="nobody sees anything"),
    Case(image_causal_attention, (q, k, v, 0 * phi + 2), oracle, note="all see one image"),
    *(
        Case(
            tanh_gate,
            (normal(2, 3), np.array(alpha), normal(2, 3, seed=1)),
            lambda torch, y, alpha, branch: y + alpha.tanh() * branch,
            note=f"alpha {alpha}",
        )
        for alpha in (0.0, 0.7, -1.5, [0.7], normal(3))
    ),
]


@each_of(CASES)
def test_formula(case, check):
    check(case)


# --- phi ------------------------------------------------------------------------------------------

# b <BOS>, . word, e <EOC>, I <image>, _ <pad>; below it phi of the previous and of the next image
TABLE = {
    "paper": ("b.....eI.......eI......e", "000000011111111122222222", "111111112222222220000000"),
    "text before": ("b..eI..eI..", "00001111222", "11111222200"),
    "image first": ("bI.eI.", "011122", "112220"),
    "adjacent": ("bIII..", "012333", "112300"),
    "trailing": ("b.eI", "0001", "1111"),
    "no image": ("b..e", "0000", "0000"),
    "padded": ("bI.e__", "011111", "110000"),
}


def tokens_of(layout):
    return np.array([[".beI_".index(c) for c in layout]])


def digits(text):
    return np.array([[int(c) for c in text]])


@pytest.mark.parametrize("layout, previous, following", TABLE.values(), ids=TABLE)
def test_compute_phi(layout, previous, following):
    tokens = tokens_of(layout)
    np.testing.assert_array_equal(compute_phi(tokens, 3), digits(previous))
    np.testing.assert_array_equal(compute_phi(tokens, 3, use_next=True), digits(following))
    assert compute_phi(tokens, 3).dtype.kind == "i"


def test_each_row_has_its_own_direction_and_its_own_count():
    layouts, previous, following = zip(TABLE["padded"], TABLE["adjacent"], TABLE["image first"])
    tokens = np.concatenate([tokens_of(layout) for layout in layouts])
    expected = np.concatenate([digits(previous[0]), digits(following[1]), digits(previous[2])])
    got = compute_phi(tokens, 3, use_next=[False, True, False], num_images=np.array([1, 3, 2]))
    np.testing.assert_array_equal(got, expected)


def test_more_tags_than_images():
    tokens = np.concatenate([tokens_of("bI..."), tokens_of("bI.II")])
    compute_phi(tokens, 3, num_images=[1, 3])
    with pytest.raises(ValueError, match="row 1 has 3 <image> tags but 2 images"):
        compute_phi(tokens, 3, num_images=[5, 2])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.zeros((3, 2), int), r"\[B, L\] = \[2, 3\], got int64 \[3, 2\]"),
        (np.zeros(6, int), r"\[B, L\] = \[2, 3\], got int64 \[6\]"),
        (np.zeros((2, 3)), r"\[B, L\] = \[2, 3\], got float64 \[2, 3\]"),
        (np.zeros((2, 3), bool), r"got bool \[2, 3\]"),
        ([[0, 1, 2], [3, 5, 4]], r"0\.\.4 \(N = 4 images\), got phi\[1, 1\] = 5"),
        ([[0, 1, -1], [3, 4, 4]], r"0\.\.4 \(N = 4 images\), got phi\[0, 2\] = -1"),
    ],
)
def test_check_phi_quotes_what_was_expected_and_what_came(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_phi(wrong, 2, 3, 4)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_phi_of_any_integer_type(dtype):
    checked = check_phi(phi.astype(dtype), 2, 5, 3)
    out = image_causal_attention(q, k, v, checked)
    np.testing.assert_array_equal(out, image_causal_attention(q, k, v, phi))


def test_check_phi_accepts_an_empty_batch_and_no_images():
    assert check_phi(np.zeros((0, 3), int), 0, 3, 2).shape == (0, 3)
    assert check_phi(np.zeros((2, 3), int), 2, 3, 0).max() == 0


def test_image_causal_mask_by_hand():
    last = [[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    until = [[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(image_causal_mask([[0, 1, 3]], N=3, R=2)[0], last)
    mask = image_causal_mask([[0, 1, 3]], N=3, R=2, only_last=False)
    np.testing.assert_array_equal(mask[0], until)
    assert mask.dtype == bool


# --- image-causal attention -----------------------------------------------------------------------


def dense(q, k, v, phi, only_last=True):
    """The same by the dense mask: q, k, v for `attention`, and the mask."""
    B, N, R, H, K = k.shape
    k, v = (swap_heads(x.reshape(B, N * R, H, K)) for x in (k, v))
    return swap_heads(q), k, v, image_causal_mask(phi, N, R, only_last)[:, None]


@st.composite
def problems(draw):
    """Any sizes and any valid phi, increasing or not."""
    B, L, N, R, H, K = (draw(st.integers(low, high)) for low, high in
                        ((1, 3), (1, 7), (0, 4), (1, 3), (1, 2), (1, 4)))  # fmt: skip
    phi = draw(st.lists(st.integers(0, N), min_size=B * L, max_size=B * L))
    shapes = (B, L, H, K), (B, N, R, H, K), (B, N, R, H, K)
    return *(normal(*s, seed=i) for i, s in enumerate(shapes)), np.array(phi).reshape(B, L)


@given(problems())
def test_equals_attention_under_the_dense_mask(problem):
    q, k, v, phi = problem
    *arrays, mask = dense(q, k, v, phi)
    out, dout = image_causal_attention(q, k, v, phi), normal(*q.shape, seed=3)
    np.testing.assert_allclose(out, swap_heads(attention(*arrays, mask=mask)), atol=1e-12)
    dq, dk, dv = image_causal_attention_backward(dout, q, k, v, phi)
    expected = attention_backward(swap_heads(dout), *arrays, mask=mask)
    np.testing.assert_allclose(dq, swap_heads(expected[0]), atol=1e-12)
    for dx, dense_dx in zip((dk, dv), expected[1:]):
        np.testing.assert_allclose(dx, swap_heads(dense_dx).reshape(k.shape), atol=1e-12)
    assert (out[phi == 0] == 0).all()
    assert (dq[phi == 0] == 0).all()
    for b, n in np.ndindex(k.shape[:2]):
        if n + 1 not in phi[b]:  # an image that nobody attends to
            assert (dk[b, n] == 0).all()
            assert (dv[b, n] == 0).all()


@pytest.mark.parametrize("most", [1, 3, 64])
def test_work_list_gives_every_token_to_its_image_once(most):
    phi = np.random.default_rng(1).integers(0, 4, (3, 90))
    owner, tokens = work_list(phi, N=3, most=most)
    assert tokens.shape[1] <= most
    places = tokens[tokens < phi.size]
    assert sorted(places) == np.flatnonzero(phi.ravel()).tolist()
    image = (np.arange(3)[:, None] * 3 + phi - 1).ravel()
    for item, row in zip(owner, tokens):
        assert (image[row[row < phi.size]] == item).all()
        assert (row < phi.size).any()


def test_an_image_with_more_tokens_than_an_item_holds():
    q, k, v = normal(1, 150, 1, 4), normal(1, 2, 3, 1, 4), normal(1, 2, 3, 1, 4, seed=1)
    phi = np.repeat([[1, 2]], 75, axis=1)
    phi[0, 10:140] = 2
    *arrays, mask = dense(q, k, v, phi)
    expected = attention_backward(swap_heads(q), *arrays, mask=mask)
    got = image_causal_attention_backward(q, q, k, v, phi)
    assert len(work_list(phi, 2)[0]) == 4
    for dx, dense_dx in zip(got, expected):
        np.testing.assert_allclose(dx, swap_heads(dense_dx).reshape(dx.shape), atol=1e-12)


def peak_memory(f, *args):
    """Bytes at the highest point of a call, without its arguments and its results."""
    tracemalloc.start()
    try:
        out = f(*args)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak - sum(x.nbytes for x in (out if isinstance(out, tuple) else (out,)))


def by_dense_mask(q, k, v, phi):
    *arrays, mask = dense(q, k, v, phi)
    return attention(*arrays, mask=mask)


def test_the_list_of_work_is_made_once_for_one_phi():
    phi = np.array([[0, 1, 1, 2]])
    first, again = work_list(phi, 2), work_list(phi.copy(), 2)
    assert first[1] is again[1] and not first[1].flags.writeable
    phi[0, 0] = 2
    assert len(work_list(phi, 2)[1].ravel()) == 4 and (first[1] == [[1, 2], [3, 4]]).all()
    assert work_list(phi.astype(np.int32), 2)[1] is work_list(phi, 2)[1]
    assert work_list(phi, 3)[1] is not work_list(phi, 2)[1]


@pytest.mark.parametrize(
    "f, grows",
    [
        (image_causal_attention, False),
        (lambda *args: image_causal_attention_backward(args[0], *args), False),
        (by_dense_mask, True),
    ],
    ids=["forward", "backward", "dense, to see that the test can fail"],
)
def test_no_array_of_all_tokens_by_all_visual_tokens(f, grows):
    L, R, few, many = 256, 4, 256, 1024
    q, peaks = normal(1, L, 1, 4), []
    for N in (few, many):
        k = normal(1, N, R, 1, 4)
        peaks.append(peak_memory(f, q, k, k, np.linspace(0, N, L).astype(int)[None]))
    # a quarter of a byte for every pair of a token and an added visual token is already too much
    assert (peaks[1] - peaks[0] > L * (many - few) * R / 4) == grows


def test_attending_to_all_previous_images():
    module = ImageCausalCrossAttention(6, 5, 2, 3, only_last=False, rng=rng).astype(np.float64)
    module.out_proj.weight.data = np.eye(6)
    module.q_proj.weight.data = np.eye(6)
    out = module(q.reshape(2, 5, 6), (k, v), phi).reshape(q.shape)
    *arrays, mask = dense(q, k, v, phi, only_last=False)
    np.testing.assert_allclose(out, swap_heads(attention(*arrays, mask=mask)), atol=1e-12)
    assert (out[phi == 0] == 0).all()


# --- the gate and the layer -----------------------------------------------------------------------


def layer(alpha=0.0, only_last=True, **options):
    options |= {"only_last": only_last, "rng": np.random.default_rng(0)}
    made = GatedCrossAttentionDense(6, 5, 2, 3, **options)
    made.astype(np.float64)
    made.alpha_xattn.data, made.alpha_dense.data = np.array(alpha), np.array(-alpha)
    return made


y, media = normal(2, 5, 6), normal(2, 3, 4, 5)


@pytest.mark.parametrize("only_last", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_layer(alpha, only_last):
    check_module(layer(alpha, only_last), y, media, phi)


def test_shut_gates_are_the_identity_bit_for_bit():
    np.testing.assert_array_equal(layer()(y, media, phi), y)
    assert float(layer().alpha_xattn.data) == 0


def test_shut_gates_give_only_the_alphas_a_gradient():
    shut = layer()
    with Tape() as tape:
        loss = (shut(y, media, phi) * normal(2, 5, 6, seed=2)).sum()
    tape.backward(loss)
    moved = {name for name, p in shut.named_parameters() if np.any(p.grad)}
    assert moved == {"alpha_xattn", "alpha_dense"}


def test_the_layer_is_the_papers_two_lines():
    opened = layer(0.8)
    attended = opened.attention(opened.norm(y), opened.project_media(media), phi)
    x = y + np.tanh(0.8) * attended
    np.testing.assert_allclose(opened(y, media, phi), x + np.tanh(-0.8) * opened.ffw(x))
    assert (attended[phi == 0] == 0).all()


def test_a_token_without_an_image_can_be_left_to_the_language_model():
    skipping, papers = layer(0.8, skip_without_image=True), layer(0.8)
    out = skipping(y, media, phi)
    assert (phi == 0).any() and (phi > 0).any()
    np.testing.assert_array_equal(out[phi == 0], y[phi == 0])
    np.testing.assert_array_equal(out[phi > 0], papers(y, media, phi)[phi > 0])
    check_module(skipping, y, media, phi)


def test_a_token_without_an_image_is_still_fed_forward():
    opened = layer(0.8)
    expected = y + np.tanh(-0.8) * opened.ffw(y)
    np.testing.assert_array_equal(opened(y, media, phi)[phi == 0], expected[phi == 0])


def test_projected_media_stand_in_for_media():
    opened = layer(0.8)
    kept = opened.project_media(media)
    np.testing.assert_array_equal(
        opened(y, None, phi, keys_values=kept), opened(y, media, phi)
    )  # fmt: skip
    assert kept[0].shape == kept[1].shape == (2, 3, 4, 2, 3)


def test_the_layer_checks_phi():
    with pytest.raises(ValueError, match=r"\[2, 5\], got int64 \[2, 4\]"):
        layer()(y, media, phi[:, :4])
    with pytest.raises(ValueError, match=r"0\.\.3 \(N = 3 images\), got phi\[0, 0\] = 4"):
        layer()(y, media, phi + 4)


# --- masked means unseen --------------------------------------------------------------------------


each_bad = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


def equal(ours, expected):
    for name in expected:
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


@each_bad
def test_an_image_that_nobody_looks_at_reaches_nothing(bad):
    unseen = np.array([[0, 1, 0], [0, 0, 1]], bool)  # phi above has no 2 in row 0, no 3 in row 1
    poisoned_k, poisoned_v = k.copy(), v.copy()
    poisoned_k[unseen] = poisoned_v[unseen] = bad
    expected = image_causal_attention(q, k, v, phi)
    np.testing.assert_array_equal(image_causal_attention(q, poisoned_k, poisoned_v, phi), expected)
    grads = image_causal_attention_backward(expected, q, poisoned_k, poisoned_v, phi)
    for x, y in zip(grads, image_causal_attention_backward(expected, q, k, v, phi)):
        np.testing.assert_array_equal(x, y)
    assert not grads[1][unseen].any() and not grads[2][unseen].any()


def layer_gradients(layer, y, media, phi):
    """{"out", "y", "media", and the parameters' names}: the output, and every gradient."""
    for _, p in layer.named_parameters():
        p.grad = None
    y, media = Tensor(y), Tensor(media)
    with Tape() as tape:
        out = layer(y, media, phi)
        loss = (out * out).sum()
    tape.backward(loss)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out.data, "y": y.grad, "media": media.grad, **grads}


def open_layer(**options):
    layer = GatedCrossAttentionDense(6, 5, 2, 3, **options, rng=np.random.default_rng(0))
    layer.alpha_xattn.data, layer.alpha_dense.data = np.array([0.5, -0.7], np.float32)
    return layer.astype(np.float64)


@each_bad
@pytest.mark.parametrize("only_last", [True, False])
def test_unseen_media_reach_no_gradient_of_a_weight_that_images_share(bad, only_last):
    layer, y, media = open_layer(only_last=only_last), normal(2, 5, 6), normal(2, 3, 4, 5)
    seen_first = np.minimum(phi, 2)  # image 3 is seen by nobody, in either mode
    expected = layer_gradients(layer, y, media, seen_first)
    media[:, 2] = bad
    equal(layer_gradients(layer, y, media, seen_first), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the skipped tokens overflow
def test_what_a_skipped_token_overflows_to_is_not_seen():
    layer, y, media = open_layer(skip_without_image=True), normal(2, 5, 6), normal(2, 3, 4, 5)
    dense = layer.ffw.forward
    layer.ffw.forward = lambda x: dense(x) * np.where(abs(x).max(-1, keepdims=True) > 9, np.inf, 1)
    y[phi == 0] = 10
    out = layer(y, media, phi)
    assert np.isfinite(out).all() and (out[phi == 0] == 10).all()


@pytest.mark.parametrize("y", [-0.0, 0.0, 1.5, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("branch, same", [(3.0, True), (-3.0, True), (np.inf, False)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 0 * inf
def test_a_shut_gate_gives_y_where_the_branch_is_finite(y, branch, same):
    out = tanh_gate(np.array([y]), np.array(0.0), np.array([branch]))
    assert np.array_equal(out, [y], equal_nan=True) == (same or np.isnan(y))
