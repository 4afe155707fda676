"""The Normalizer-Free ResNet and the contrastive objective."""

import tracemalloc

import numpy as np
import pytest

from miniflamingo.autograd import Tape
from miniflamingo.flamingo import FlamingoConfig, count_parameters
from miniflamingo.functional import ACTIVATIONS
from miniflamingo.vision import (
    ACTIVATION_GAIN,
    ContrastiveModel,
    Conv2d,
    NFBlock,
    NormalizerFreeResNet,
    SqueezeExcite,
    TextEncoder,
    VisionConfig,
    average_pool,
    check_pixels,
    contrastive_loss,
    conv2d,
    l2_normalise,
    standardise_weight,
)
from tests.gradients import Case, check_module, each_of, normal

rng = np.random.default_rng(0)
TINY = VisionConfig(8, stem=(4,), stem_strides=(2,), widths=(4, 6), depths=(1, 1), strides=(2, 1))
DEEP = VisionConfig(
    8, stem=(4, 8), stem_strides=(2, 1), widths=(8, 12), depths=(2, 1), strides=(1, 2),
    bottleneck=0.5, group_size=2, squeeze_excite=0.5, final_width=7, activation="gelu",
)  # fmt: skip
pixels = np.random.default_rng(0).random((2, 8, 8, 3))


def conv_oracle(torch, x, weight, bias=None, **options):
    out = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, **options)
    return out.permute(0, 2, 3, 1)


def standardise_oracle(torch, weight, gain):
    flat = weight.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    norm = (centred.square().sum(dim=1, keepdim=True) + 1e-4).sqrt()
    return (centred / norm * gain[:, None]).reshape(weight.shape)


def contrastive_oracle(torch, images, texts, inverse_temperature, label_smoothing=0.0):
    logits, own = inverse_temperature * images @ texts.T, torch.arange(len(images))
    loss = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return loss(logits, own) + loss(logits.T, own)


unit = [l2_normalise(normal(4, 3, seed=i)) for i in range(2)]
CASES = [
    Case(conv2d, (normal(2, 5, 4, 3), normal(4, 3, 3, 2), normal(4)), conv_oracle),
    Case(conv2d, (normal(2, 5, 4, 3), normal(4, 3, 3, 3)), conv_oracle, {"padding": 1}, "padded"),
    Case(
        conv2d, (normal(1, 7, 6, 2), normal(3, 2, 3, 3), normal(3)), conv_oracle,
        {"stride": 2, "padding": 1}, "stride 2",
    ),
    Case(
        conv2d, (normal(1, 8, 5, 2), normal(3, 2, 2, 2)), conv_oracle, {"stride": 3}, "stride 3",
    ),
    Case(
        conv2d, (normal(2, 4, 4, 6), normal(4, 3, 3, 3), normal(4)), conv_oracle,
        {"padding": 1, "groups": 2}, "2 groups",
    ),
    Case(
        conv2d, (normal(1, 4, 4, 3), normal(6, 1, 3, 3)), conv_oracle,
        {"padding": 1, "groups": 3, "stride": 2}, "one channel a group",
    ),
    Case(conv2d, (normal(2, 3, 3, 4), normal(5, 4, 1, 1), normal(5)), conv_oracle, note="1 x 1"),
    Case(standardise_weight, (normal(4, 2, 3, 3) + 1, normal(4)), standardise_oracle),
    Case(
        average_pool, (normal(2, 4, 6, 3), 2),
        lambda torch, x, size: torch.nn.functional.avg_pool2d(
            x.permute(0, 3, 1, 2), size
        ).permute(0, 2, 3, 1),
    ),
    Case(
        l2_normalise, (normal(2, 3, 4),),
        lambda torch, x: torch.nn.functional.normalize(x, dim=-1),
    ),
    Case(contrastive_loss, (*unit, np.array(3.0)), contrastive_oracle),
    Case(
        contrastive_loss, (*unit, np.array(3.0)), contrastive_oracle, {"label_smoothing": 0.1},
        "smoothed",
    ),
]  # fmt: skip


@each_of(CASES)
def test_formula(case, check):
    check(case)


def test_convolution_leaves_out_the_gradients_nobody_needs():
    args = (normal(1, 4, 4, 2), normal(3, 2, 3, 3), None)
    dx, dweight, dbias = conv2d.backward(normal(1, 2, 2, 3), args, (False, True, False), {})
    assert dx is None
    assert dweight.shape == (3, 2, 3, 3)
    assert dbias is None
    assert conv2d.backward(normal(1, 2, 2, 3), args, (True, False, False), {})[1] is None


# --- weight standardisation and variance ----------------------------------------------------------


def test_standard_filters_have_mean_zero_and_norm_gain():
    gain = np.array([1.0, 0.5, -2.0, 0.0])
    weight = standardise_weight(5 * normal(4, 6, 3, 3) + 7, gain)
    np.testing.assert_allclose(weight.mean(axis=(1, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(
        np.sqrt(np.square(weight).sum(axis=(1, 2, 3))), abs(gain), rtol=1e-5
    )  # fmt: skip


def test_a_constant_filter_does_not_divide_by_zero():
    assert (standardise_weight(np.ones((1, 2, 3, 3)), np.ones(1)) == 0).all()


@pytest.mark.parametrize("activation", ACTIVATION_GAIN)
def test_activation_gain_brings_the_variance_back_to_one(activation):
    x, w = np.polynomial.hermite_e.hermegauss(200)
    y, w = ACTIVATIONS[activation](x) * ACTIVATION_GAIN[activation], w / w.sum()
    assert (w * y * y).sum() - (w * y).sum() ** 2 == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bottleneck", [None, 0.5])
def test_variance_stays_near_one_through_many_blocks(activation, bottleneck):
    config = VisionConfig(
        32, (64,), (2,), (64, 96), (4, 4), (1, 1), bottleneck=bottleneck, activation=activation
    )
    model, x = NormalizerFreeResNet(config, rng=np.random.default_rng(1)), normal(4, 16, 16, 64)
    variances = []
    for block in model.blocks:
        x = block(x)
        variances.append(x.var())
        # what the block has been told to expect of its input: 1 / beta^2, 0.2^2 more each time
    expected = [1.04 + 0.04 * i for i in range(4)]
    assert [1 / b.beta**2 for b in model.blocks[1:4]] == pytest.approx(expected[:3])
    assert 1 / model.blocks[5].beta ** 2 == pytest.approx(1.04)  # a shortcut starts again
    assert all(0.8 < v < 1.3 for v in variances), variances


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, DEEP], ids=["basic", "bottleneck"])
def test_resnet(config):
    model = NormalizerFreeResNet(config, rng=np.random.default_rng(0))
    check_module(model, pixels)
    assert model(pixels).shape == (2, config.num_features, config.out_dim)


def test_parts():
    check_module(Conv2d(3, 4, 3, stride=2, rng=rng), pixels)
    check_module(SqueezeExcite(4, 0.5, rng=rng), normal(2, 3, 3, 4))
    check_module(NFBlock(3, 4, 2, 1.1, TINY, rng=rng), pixels)
    check_module(NFBlock(3, 3, 1, 1.1, TINY, rng=rng), pixels)


def test_a_block_and_the_network_by_hand():
    model = NormalizerFreeResNet(TINY, rng=np.random.default_rng(0)).astype(np.float64)
    first, second = model.blocks  # of stride 2, with a shortcut; and of stride 1, wider
    act = lambda x: np.maximum(x, 0) * ACTIVATION_GAIN["relu"]  # noqa: E731
    x = model.stem[0](2 * pixels - 1)
    out = act(x)  # beta is 1 here
    x = first.shortcut(average_pool(out, 2)) + 0.2 * first.convs[1](act(first.convs[0](out)))
    out = act(x) / np.sqrt(1.04)
    x = second.shortcut(out) + 0.2 * second.convs[1](act(second.convs[0](out)))
    np.testing.assert_allclose(model(pixels), act(x).reshape(2, 4, 6), atol=1e-12)


def test_features_are_the_last_grid_row_by_row():
    model = NormalizerFreeResNet(VisionConfig(64), rng=np.random.default_rng(0))
    image = np.full((1, 64, 64, 3), 0.5)
    features = model(image)
    image[:, :4, -4:] = 1  # the upper right corner
    changed = (model(image) != features).any(axis=2).reshape(16, 16)
    assert changed[0, 15]
    assert not changed[[0, 15, 15], [0, 0, 15]].any()


def test_images_of_a_batch_do_not_mix():
    model, images = NormalizerFreeResNet(DEEP, rng=np.random.default_rng(0)), pixels.copy()
    features = model(images)
    images[1] = 0
    np.testing.assert_array_equal(model(images)[0], features[0])
    np.testing.assert_allclose(model(images[:1])[0], features[0], atol=1e-12)


def test_squeeze_excite_scales_between_nothing_and_two():
    shut = SqueezeExcite(4, 0.5, rng=rng)
    shut.up.weight.data[:] = 0
    np.testing.assert_array_equal(shut(np.ones((1, 2, 2, 4), np.float32)), 1)
    shut.up.bias.data[:] = [-50, 50, -50, 50]
    np.testing.assert_allclose(shut(np.ones((1, 2, 2, 4)))[0, 0, 0], [0, 2, 0, 2], atol=1e-9)


def test_config_errors():
    with pytest.raises(ValueError, match="image_size must be a multiple of 4, got 9"):
        VisionConfig(image_size=9)


def test_nfnet_f6_has_the_papers_size_and_is_counted_without_memory():
    tracemalloc.start()
    counts = count_parameters(FlamingoConfig.preset("3B"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["vision_encoder"] == pytest.approx(435e6, rel=0.01)
    assert peak < 20e6


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.zeros((2, 8, 9, 3)), r"must be \[..., 8, 8, 3\], got \(2, 8, 9, 3\)"),
        (np.zeros((8, 8)), r"must be \[..., 8, 8, 3\], got \(8, 8\)"),
        (np.zeros((8, 8, 4)), r"got \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.uint8), r"floating point in \[0, 1\], got uint8"),
        (np.full((8, 8, 3), np.nan), r"finite, got nan at \[0, 0, 0\]"),
        (np.full((8, 8, 3), -np.inf), r"finite, got -inf"),
        (np.full((8, 8, 3), 1.5), r"lie in \[0, 1\], got 1.5\.\.1.5"),
        (np.full((8, 8, 3), -0.5), r"lie in \[0, 1\], got -0.5\.\.-0.5"),
    ],
)
def test_check_pixels_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(wrong, 8)


def test_check_pixels_lets_good_ones_through():
    for dtype in (np.float16, np.float32, np.float64):
        assert check_pixels(np.ones((0, 2, 8, 8, 3), dtype), 8).dtype == dtype
    np.testing.assert_array_equal(check_pixels(pixels.tolist(), 8), pixels)


# --- the contrastive objective --------------------------------------------------------------------


def test_contrastive_loss_is_symmetric_and_follows_the_pairs():
    images, texts = unit
    loss = contrastive_loss(images, texts, 3.0, label_smoothing=0.1)
    assert contrastive_loss(texts, images, 3.0, label_smoothing=0.1) == pytest.approx(loss)
    order = [2, 0, 3, 1]
    assert contrastive_loss(images[order], texts[order], 3.0, 0.1) == pytest.approx(loss)
    assert contrastive_loss(images, texts[order], 3.0, 0.1) != pytest.approx(loss, rel=0.01)
    assert contrastive_loss(np.eye(4), np.eye(4), 100.0) < 1e-8
    assert contrastive_loss(images, texts, 0.0) == pytest.approx(2 * np.log(4))


def test_l2_normalise_of_nothing():
    assert (l2_normalise(np.zeros((2, 3))) == 0).all()
    np.testing.assert_allclose(np.linalg.norm(l2_normalise(normal(5, 3)), axis=1), 1)


def contrastive_model():
    rng = np.random.default_rng(0)
    vision, text = NormalizerFreeResNet(TINY, rng=rng), TextEncoder(9, 8, max_positions=6, rng=rng)
    return ContrastiveModel(vision, text, text_dim=8, joint_dim=5, rng=rng)


words = np.array([[3, 4, 5, 0], [6, 7, 0, 0]])


def test_text_encoder():
    encoder = TextEncoder(9, 8, heads=2, max_positions=6, rng=rng)
    check_module(encoder, words)
    np.testing.assert_allclose(encoder(words)[1:], encoder(words[1:, :2]), atol=1e-12)
    assert (encoder(np.zeros((1, 3), int)) == 0).all()  # nothing but padding
    with pytest.raises(ValueError, match="at most 6 tokens, got 7"):
        encoder(np.ones((1, 7), int))


def test_contrastive_model():
    model = contrastive_model()
    check_module(model, pixels, words, label_smoothing=0.1)
    images, texts = model.embed_images(pixels), model.embed_texts(words)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1)
    scale = np.exp(model.log_inverse_temperature.data)
    assert model(pixels, words) == pytest.approx(contrastive_loss(images, texts, scale))


def test_a_few_steps_of_descent_pair_images_with_texts():
    model = contrastive_model().astype(np.float64)
    before = float(model(pixels, words))
    for _ in range(10):
        model.zero_grad()
        with Tape() as tape:
            loss = model(pixels, words)
        tape.backward(loss)
        for p in model.parameters():
            p.data = p.data - 0.05 * p.grad
    assert float(model(pixels, words)) < before / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_padding_of_a_text_reaches_nothing(bad):
    encoder = TextEncoder(9, 8, heads=2, max_positions=6, rng=np.random.default_rng(0))
    tokens, results = np.array([[3, 4, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]]), []
    for value in (1.0, bad):
        encoder.embedding.weight.data[0] = value
        for _, p in encoder.named_parameters():
            p.grad = None
        with Tape() as tape:
            out = encoder(tokens)
            loss = (out * out).sum()
        tape.backward(loss)
        results.append([out.data, *(p.grad for _, p in encoder.named_parameters())])
    for ours, clean in zip(results[1], results[0]):
        np.testing.assert_array_equal(ours, clean)
