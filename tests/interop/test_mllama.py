"""Random Llama-3.2-Vision: the text side, the eye, the whole; and what their tokens before any
image see."""

import functools
import json
import math

import numpy as np
import pytest

from miniflamingo.decoding import DecodingCache
from miniflamingo.flamingo import Flamingo, ShapesOnly
from miniflamingo.functional import concat
from miniflamingo.interop import mllama, project_of
from miniflamingo.interop.loading import shapes_of
from miniflamingo.tensorfile import misfits
from miniflamingo.tiled_vit import TiledViTConfig, beside
from miniflamingo.xattn import compute_phi
from tests.gradients import normal
from tests.interop.agreement import (
    ROUTES,
    Case,
    Fault,
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
layers = pytest.importorskip("miniflamingo.kernels.model.layers")

N, R, D = 3, 5, 32
SIZES = {
    "shared keys": dict(vocab_size=40, hidden_size=D, num_hidden_layers=6, num_attention_heads=4,
                        num_key_value_heads=2, intermediate_size=48, cross_attention_layers=[1, 4]),
    "one layer": dict(vocab_size=40, hidden_size=D, num_hidden_layers=3, num_attention_heads=2,
                      num_key_value_heads=2, intermediate_size=36, cross_attention_layers=[0]),
}  # fmt: skip
each_size = pytest.mark.parametrize("name", SIZES)
TOKENS = np.random.default_rng(0).integers(3, 39, (3, 11))
TOKENS[0, [2, 5, 8]] = TOKENS[1, [0, 3]] = IMAGE = 40  # behind the words: an embedding, no logit
PHI = compute_phi(TOKENS, IMAGE)
SEEN = (PHI > 0).any(axis=1)


@functools.cache
def theirs_and_ours(name):
    """transformers' model with weights away from their start, its config as a dict, and ours."""
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **SIZES[name], pad_token_id=0, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.MllamaForCausalLM(config).double().eval()
    move(model)
    about, state = json.loads(config.to_json_string(use_diff=False)), arrays(model)
    assert project_of(about, shapes_of(state)) == "mllama"
    return model, about, mllama.build(about, state, np.float64)


def masks(phi):
    """Their two masks of the cross-attention."""
    from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

    sees = torch.from_numpy((phi[..., None] == np.arange(1, N + 1)).astype(float))[..., None]
    mask, full = _prepare_cross_attention_mask(sees, R, torch.float64)
    return dict(cross_attention_mask=mask, full_text_row_masked_out_mask=full)


def theirs(model, media, tokens=TOKENS, phi=PHI, keep=slice(None)):
    """Their final states, before the float32 that their logits are in."""
    states = media.flatten(1, 2)
    out = model.model(torch.from_numpy(tokens), cross_attention_states=states, **masks(phi))
    return torch.nn.functional.linear(out.last_hidden_state, model.lm_head.weight)[:, keep]


def all_seen():
    """Tokens and phi with an image from the first token on, for which ours and theirs agree."""
    tokens = TOKENS.copy()
    tokens[:, 0] = IMAGE
    tokens[2, 4] = IMAGE
    tokens[0, 8] = 7  # three of the three images, two, two
    return tokens, compute_phi(tokens, IMAGE)


MOST = 2e-6


def errors(name, route):
    """What `compare` says where every token has an image."""
    model, about, ours = theirs_and_ours(name)
    tokens, phi = all_seen()
    assert phi.min() > 0 and phi.max() <= N
    media = {"media": normal(3, N, R, D)}
    peer = run_theirs(model, lambda media: theirs(model, media, tokens, phi), media, about)

    def call(m, to, media):
        return m.read(to.of(tokens), media, to.of(phi), **to.options)

    return compare(peer, mllama, ours, call, relative=True, route=route)


@each_route
@each_size
def test_logits_and_all_gradients_where_every_token_has_an_image(name, route):
    check(errors(name, route), MOST)


@each_size
def test_the_language_model_alone_where_no_token_has_an_image(name):
    """Without images they leave out the gated layers; with phi = 0 ours change nothing."""
    model, _, ours = theirs_and_ours(name)
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    out = ours.read(TOKENS, normal(3, N, R, D), 0 * PHI)
    assert worst([(out, expected)], relative=True) <= 2e-6


def same_tokens(name):
    """Whether twenty greedy tokens are theirs, decoded with a cache and without."""
    model, _, ours = theirs_and_ours(name)
    media = normal(3, N, R, D)

    def call(tokens, phi):
        return theirs(model, torch.from_numpy(media), tokens, phi, slice(-1, None))

    return as_ours(call, ours, media, *all_seen())


def as_ours(call, ours, media, tokens, phi):
    """Whether twenty greedy tokens by call(tokens, phi) -> logits are ours, cached and not."""
    L, expected = tokens.shape[1], tokens
    phi = np.concatenate([phi, np.repeat(phi[:, -1:], 20, axis=1)], axis=1)
    for i in range(20):
        with torch.no_grad():
            out = call(expected, phi[:, : L + i])[:, -1:]
        expected = np.concatenate([expected, out.argmax(-1).numpy()], axis=1)
    return all(
        np.array_equal(greedy(ours, tokens, media, phi, cached), expected[:, L:])
        for cached in (True, False)
    )


@each_size
def test_twenty_greedy_tokens(name):
    assert same_tokens(name)


def greedy(model, tokens, media, phi, cached):
    """The likeliest tokens after `tokens`, as far as phi goes."""
    start, L = 0, tokens.shape[1]
    cache = DecodingCache.of(model, media, phi.shape[1]) if cached else None
    while (end := tokens.shape[1]) < phi.shape[1]:
        if cached:
            at = np.arange(start, end)[None].repeat(len(tokens), axis=0)
            logits = model.read(tokens[:, start:], None, phi[:, start:end], cache, at)
        else:
            logits = model.read(tokens, media, phi[:, :end])
        start, tokens = end, np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    return tokens[:, L:]


def moved_by_the_last_image():
    """How far the logits of row 0's two tokens before its first image move when the last of the
    three images changes: only their feed-forward is masked, their attention is uniform over ALL
    images."""
    model, _, ours = theirs_and_ours("shared keys")
    media = normal(3, N, R, D)
    moved = media.copy()
    moved[:, -1] += 1
    with torch.no_grad():
        outs = [theirs(model, torch.from_numpy(m)).numpy() for m in (media, moved)]
    own = [ours.read(TOKENS, m, PHI) for m in (media, moved)]
    leaks = {"theirs": outs, "ours": own}
    return {who: float(np.abs(a - b)[0, :2].max()) for who, (a, b) in leaks.items()}


def test_their_tokens_before_the_first_image_see_the_last_and_ours_do_not():
    found = moved_by_the_last_image()
    assert found["theirs"] > 1e-2 and found["ours"] == 0


# --- with its eye ---------------------------------------------------------------------------------

EYE = dict(hidden_size=16, num_hidden_layers=4, num_global_layers=2, attention_heads=2,
           intermediate_size=24, image_size=12, patch_size=4, max_num_tiles=4,
           intermediate_layers_indices=[2, 0], vision_output_dim=48)  # fmt: skip
GRIDS = (((1, 1), (2, 2)), ((3, 1), (1, 2)), ((1, 4), (2, 1)))  # of each image [3, 2]


def canvases():
    """A picture for each of GRIDS, [height, width, 3] in [0, 1]."""
    sizes = [(12 * rows, 12 * columns) for images in GRIDS for rows, columns in images]
    return [np.random.default_rng(i).random((*size, 3)) for i, size in enumerate(sizes)]


@functools.cache
def whole(attention="eager"):
    """As theirs_and_ours, of a whole model; "sdpa" has no softmax in float32."""
    from transformers.models.mllama.configuration_mllama import MllamaConfig

    text = SIZES["shared keys"] | dict(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config = MllamaConfig(vision_config=EYE, text_config=text, image_token_index=IMAGE)
    config._attn_implementation = attention
    model = move(transformers.MllamaForConditionalGeneration(config).double().eval())
    about, state = json.loads(config.to_json_string(use_diff=False)), arrays(model)
    assert project_of(about, shapes_of(state)) == "mllama"
    return model, about, mllama.build(about, state, np.float64)


def tiles_of(pictures, eye):
    """What their vision model is called with, for n images in a row: padded tiles
    [1, n, T, 3, size, size], the numbers of their grids, and which tiles there are."""
    n, T, size = len(pictures), eye.max_tiles, eye.image_size
    tiles, there = np.zeros((1, n, T, 3, size, size)), np.zeros((1, n, T), int)
    ids = np.zeros((1, n), int)
    for i, x in enumerate(pictures):
        grid = (x.shape[0] // size, x.shape[1] // size)
        cut = [np.split(row, grid[1], axis=1) for row in np.split((x - 0.5) / 0.5, grid[0])]
        cut = np.concatenate(cut).transpose(0, 3, 1, 2)
        tiles[0, i, : len(cut)], there[0, i, : len(cut)] = cut, 1
        ids[0, i] = 1 + eye.grids.index(grid)
    return tuple(map(torch.from_numpy, (tiles, ids, there)))


MOST_EYE = 1e-11


def eye_errors(route):
    """What `compare` says of the eye alone, over pictures of all grids."""
    model, about, ours = whole("sdpa")
    eye, theirs = ours.config.vision, model.model.vision_model
    pictures = [np.random.default_rng(i).random((12 * r, 12 * c, 3)) for i, (r, c) in
                enumerate(eye.grids)]  # fmt: skip
    tiles, ids, there = tiles_of(pictures, eye)

    def call():
        out = theirs(tiles, ids, there).last_hidden_state
        return out[there.bool()].flatten(0, 1)[None]

    peer = run_theirs(theirs, call, {}, about, prefix="vision_model.")

    def features(m, to):
        seen = [m.encode(to.of(x[None, None, None])) for x in pictures]
        return joined(seen, axis=3)[0, 0]

    return compare(peer, mllama, ours, features, route=route)


def joined(xs, axis):
    """Arrays, or tensors, or those of a tape, one behind the other."""
    return torch.cat(xs, dim=axis) if isinstance(xs[0], torch.Tensor) else concat(*xs, axis=axis)


@pytest.mark.parametrize("route", ROUTES[:2])
def test_the_eyes_features_and_all_gradients(route):
    check(eye_errors(route), MOST_EYE)


def seen_by(phi, there):
    """Their cross_attention_mask [3, L, 2, T] for the tiles there are [3, 2, T]."""
    sees = phi[..., None] == np.arange(1, 3)
    return torch.from_numpy((sees[..., None] & (there.numpy()[:, None] > 0)).astype(int))


def two_images():
    """Tokens and phi of rows with two, two and one of their two images, from the first token on."""
    tokens = np.random.default_rng(1).integers(3, 39, (3, 9))
    tokens[:, 0] = tokens[0, 4] = tokens[1, 2] = IMAGE
    return tokens, compute_phi(tokens, IMAGE)


def whole_theirs(tokens, phi):
    """Their logits."""
    model, _, ours = whole()
    tiles, ids, there = (
        x.unflatten(1, (3, 2))[0] for x in tiles_of(canvases(), ours.config.vision)
    )
    mask = seen_by(phi, there)
    return model(input_ids=torch.from_numpy(tokens), pixel_values=tiles, aspect_ratio_ids=ids,
                 aspect_ratio_mask=there, cross_attention_mask=mask).logits  # fmt: skip


def media_of(m, to=np.asarray):
    """The six images as media [3, 2, R, D] of ours or of its twin."""
    media = [m.resampler(m.encode(to(x[None, None, None]))) for x in canvases()]
    media = layers.beside(*media) if isinstance(media[0], torch.Tensor) else beside(*media)
    return media.reshape(3, 2, *media.shape[2:])


def whole_errors(route):
    """What `compare` says of logits and of all gradients, those of the eye among them."""
    (model, about, ours), (tokens, phi) = whole(), two_images()
    assert phi.min() > 0 and phi[2].max() == 1
    peer = run_theirs(model, lambda: whole_theirs(tokens, phi), {}, about)

    def call(m, to):
        return m.read(to.of(tokens), media_of(m, to.of), to.of(phi), **to.options)

    return compare(peer, mllama, ours, call, relative=True, route=route)


@each_route
def test_a_whole_models_logits_and_all_gradients(route):
    check(whole_errors(route), MOST)


def whole_tokens():
    """Whether twenty greedy tokens are theirs, decoded with a cache and without."""
    ours = whole()[2]
    return as_ours(whole_theirs, ours, media_of(ours), *two_images())


def test_twenty_greedy_tokens_of_a_whole_model():
    assert whole_tokens()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_size": None}, "the config lacks image_size"),
        ({"vision_output_dim": 32}, "vision_output_dim = 32 is not supported, only 48"),
        ({"supported_aspect_ratios": [[2, 1]]}, r"supported_aspect_ratios = \[\[2, 1\]\] is not"),
        ({"intermediate_layers_indices": [4, 0]}, r"levels must be in 0\.\.3"),
        ({"num_global_layers": 1}, "unexpected: vision_encoder.gated_blocks.1."),
        ({"max_num_tiles": 3}, "supported_aspect_ratios"),
    ],
)
def test_eyes_that_do_not_fit(wrong, message):
    model, about, _ = whole()
    wrong = {"vision_config": about["vision_config"] | wrong}
    with pytest.raises(ValueError, match=message):
        mllama.build(about | wrong, arrays(model))


def test_the_published_11b_has_our_names_and_shapes():
    """By their defaults, with tiles of 560 pixels; no memory is taken."""
    config = transformers.MllamaConfig(vision_config={"image_size": 560})
    with torch.device("meta"):
        model = transformers.MllamaForConditionalGeneration(config)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    about = json.loads(config.to_json_string(use_diff=False))
    ours = mllama.config_of(about, shapes)
    assert ours.vision == TiledViTConfig()
    own = {n: p.shape for n, p in Flamingo(ours, rng=ShapesOnly()).named_parameters()}
    theirs = mllama.state_of({n: np.broadcast_to(0.0, s) for n, s in shapes.items()}, ours)
    assert not misfits(own, {name: x.shape for name, x in theirs.items()})
    assert sum(map(math.prod, own.values())) == 10_670_220_835


def cases():
    """The rows of the agreement table."""
    for name in SIZES:
        measures = (functools.partial(work, name) for work in (errors, same_tokens))
        yield Case("mllama", "text side", name, MOST, *measures)
    yield Case("mllama", "eye", "all grids", MOST_EYE, eye_errors, routes=ROUTES[:2])
    yield Case("mllama", "whole model", "images of several grids", MOST, whole_errors, whole_tokens)


def faults():
    """What its tokens before the first image see."""
    name = "tokens before the first image move when the last image changes (largest move)"
    yield Fault("mllama", name, moved_by_the_last_image)


@pytest.mark.parametrize("layers, total", [([0, 1], 5), ([1, 3, 6], 9), ([4], 5), ([], 5)])
def test_unevenly_spaced_layers_are_refused(layers, total):
    with pytest.raises(ValueError, match="are not evenly spaced"):
        mllama.spacing(layers, total)


def test_the_places_of_the_published_models():
    assert mllama.spacing([3, 8, 13, 18, 23, 28, 33, 38], 40) == (4, 3)
    assert mllama.spacing(list(range(3, 100, 5)), 100) == (4, 3)


def test_phi_of_a_mask_of_tiles():
    mask = (PHI[..., None] == np.arange(1, N + 1))[..., None] & [True, False]
    np.testing.assert_array_equal(mllama.phi_of(mask.astype(int)), PHI)


def test_it_has_no_eye():
    _, _, ours = theirs_and_ours("one layer")
    with pytest.raises(ValueError, match="this Flamingo has no eye: give `read` the visual tokens"):
        ours(TOKENS, normal(3, N, 1, 4, 4, 3), phi=PHI)


def test_the_projection_of_a_whole_checkpoint():
    """The names of the newer transformers, without those of a vision encoder."""
    model, about, ours = theirs_and_ours("one layer")
    state = {"lm_head.weight": arrays(model)["lm_head.weight"]}
    state |= {f"model.language_{n}": x for n, x in arrays(model).items() if n != "lm_head.weight"}
    weight, bias = normal(D, 12), normal(D)
    state |= {
        "model.multi_modal_projector.weight": weight,
        "model.multi_modal_projector.bias": bias,
    }
    config = {"text_config": about, "vision_config": {"vision_output_dim": 12}}
    whole = mllama.build(config | {"image_token_index": 40}, state, np.float64)
    features = normal(3, N, 1, R, 12)
    media = whole.resampler(features)
    np.testing.assert_allclose(media, (features @ weight.T + bias)[:, :, 0])
    np.testing.assert_array_equal(whole.read(TOKENS, media, PHI), ours.read(TOKENS, media, PHI))
