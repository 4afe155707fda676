"""Whole random IDEFICS of transformers: logits, hidden states, gradients, greedy tokens."""

import functools
import json
from collections import Counter

import numpy as np
import pytest

from miniflamingo.decoding import DecodingCache
from miniflamingo.interop import idefics, project_of
from miniflamingo.interop.loading import shapes_of
from miniflamingo.xattn import compute_phi
from tests.interop.agreement import (
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

EYE = dict(embed_dim=16, image_size=8, patch_size=4, intermediate_size=24, num_hidden_layers=2,
           num_attention_heads=2)  # fmt: skip
PERCEIVER = dict(use_resampler=True, resampler_n_latents=3, resampler_depth=2, resampler_n_heads=2,
                 resampler_head_dim=5)  # fmt: skip
SIZES = dict(vocab_size=40, additional_vocab_size=2, hidden_size=24, intermediate_size=36,
             num_hidden_layers=4, num_attention_heads=3, cross_layer_interval=2)  # fmt: skip
KINDS = {
    "plain": {"use_resampler": True},
    "vector": {"use_resampler": True, "alpha_type": "vector", "qk_layer_norms": True},
    "no resampler": {"cross_layer_interval": 1, "additional_vocab_size": 0, "alpha_type": "float"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
rng = np.random.default_rng(0)
TOKENS = rng.integers(3, 39, (3, 9))
TOKENS[0, [1, 4]] = TOKENS[1, 3] = IMAGE = 39
# rows with 2, 1 and 0 of the two images; the padded image's pixels are there all the same
PHI = compute_phi(TOKENS, IMAGE)
PIXELS = rng.random((3, 2, 1, 8, 8, 3))


@functools.cache
def theirs_and_ours(kind):
    """transformers' model with weights away from their start, its config as a dict, and ours."""
    perceiver = PERCEIVER | {"qk_layer_norms_perceiver": kind == "vector"}
    config = transformers.IdeficsConfig(
        **SIZES | KINDS[kind], vision_config=EYE, perceiver_config=perceiver
    )
    model = move(transformers.IdeficsForVisionText2Text(config).double().eval()).requires_grad_(
        True
    )
    about, state = json.loads(config.to_json_string(use_diff=False)), arrays(model)
    assert project_of(about, shapes_of(state)) == "idefics"
    return model, about, idefics.build(about, state, np.float64)


def seen(phi):
    """Their image_attention_mask int[B, L, N]."""
    return (phi[..., None] == np.arange(1, 3)).astype(int)


def inputs_of(ours, phi=PHI):
    """What their model is called with, but for the tokens: normalised pixels, channels first."""
    c = ours.config.vision
    pixels = ((PIXELS - np.array(c.mean)) / np.array(c.std))[:, :, 0].transpose(0, 1, 4, 2, 3)
    return dict(
        pixel_values=torch.from_numpy(pixels), image_attention_mask=torch.from_numpy(seen(phi))
    )


MOST = 2e-6  # they compute norms and softmax in float32, whatever the model's dtype


def errors(kind, route):
    """What `compare` says of our logits and of all gradients."""
    model, about, ours = theirs_and_ours(kind)
    ids = torch.from_numpy(TOKENS)
    peer = run_theirs(model, lambda: model(input_ids=ids, **inputs_of(ours)).logits, {}, about)
    phi = idefics.phi_of(seen(PHI))

    def call(m, to):
        return m(to.of(TOKENS), to.of(PIXELS), phi=to.of(phi), **to.options)

    return compare(peer, idefics, ours, call, relative=True, route=route)


@each_route
@each_kind
def test_logits_and_all_gradients(kind, route):
    check(errors(kind, route), MOST)


def states_of(model, tokens, phi):
    """The hidden states in front of each block of the LM (behind its gated layer), of ours."""
    found = []
    for block in model.lm.blocks:
        forward = block.forward
        block.forward = lambda x, *a, f=forward: found.append(x) or f(x, *a)
    try:
        model(tokens, PIXELS, phi=phi)
    finally:
        for block in model.lm.blocks:
            del block.forward
    return found


@each_kind
def test_hidden_states(kind):
    model, _, ours = theirs_and_ours(kind)
    found, hooks = [], []
    for layer in model.model.layers:
        hook = lambda _, args, kwargs: found.append((args or [*kwargs.values()])[0])  # noqa: E731
        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(TOKENS), **inputs_of(ours))
    for hook in hooks:
        hook.remove()
    states = states_of(ours, TOKENS, PHI)
    assert len(states) == len(found) == 4
    for state, theirs in zip(states, found):
        assert worst([(state, theirs.numpy())], relative=True) <= 2e-6


def greedy(model, tokens, phi, n, cached):
    """n new tokens int[B, n], each the likeliest; they look at the last token's image."""
    B, L = tokens.shape
    media = model.resampler(model.encode(PIXELS))
    cache = DecodingCache.of(model, media, L + n) if cached else None
    phi = np.concatenate([phi, np.repeat(phi[:, -1:], n, axis=1)], axis=1)
    start = 0
    for _ in range(n):
        end = tokens.shape[1]
        if cached:
            at = np.arange(start, end)[None].repeat(B, axis=0)
            logits = model.read(tokens[:, start:], None, phi[:, start:end], cache, at)
        else:
            logits = model.read(tokens, media, phi[:, :end])
        start, new = end, logits[:, -1:].argmax(axis=-1)
        tokens = np.concatenate([tokens, new], axis=1)
    return tokens[:, L:]


def same_tokens(kind):
    """Whether twenty greedy tokens are theirs, decoded with a cache and without."""
    model, _, ours = theirs_and_ours(kind)
    tokens = TOKENS
    with torch.no_grad():
        for i in range(20):
            phi = np.concatenate([PHI, np.repeat(PHI[:, -1:], i, axis=1)], axis=1)
            out = model(input_ids=torch.from_numpy(tokens), **inputs_of(ours, phi)).logits
            new = out[:, -1:].argmax(-1).numpy()
            tokens = np.concatenate([tokens, new], axis=1)
    return all(
        np.array_equal(greedy(ours, TOKENS, PHI, 20, cached), tokens[:, 9:])
        for cached in (True, False)
    )


@each_kind
def test_twenty_greedy_tokens(kind):
    assert same_tokens(kind)


def resamplings():
    """How often `generate` runs the resampler, and theirs its eye, for eight tokens."""
    model, _, ours = theirs_and_ours("plain")
    counts, parts = Counter(), (model.model.perceiver_resampler, model.model.vision_model)
    hooks = [part.register_forward_hook(lambda m, *_: counts.update([m])) for part in parts]
    ids = torch.from_numpy(TOKENS)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), **inputs_of(ours), max_new_tokens=8,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    calls, forward = [], ours.resampler.forward
    ours.resampler.forward = lambda *a: calls.append(1) or forward(*a)
    greedy(ours, TOKENS, PHI, 8, cached=True)
    del ours.resampler.forward
    theirs, eye = (counts[part] for part in parts)
    return {"theirs": theirs, "ours": len(calls), "their eye": eye}


def test_their_generate_resamples_for_every_token_and_our_decoder_once():
    assert resamplings() == {"theirs": 8, "ours": 1, "their eye": 1}


def cases():
    """The rows of the agreement table."""
    for kind in KINDS:
        measures = (functools.partial(work, kind) for work in (errors, same_tokens))
        yield Case("idefics", "whole model", kind, MOST, *measures)


def faults():
    """What it does once too often."""
    name = "generate runs the resampler for every token (runs for 8 tokens)"
    yield Fault("idefics", name, resamplings, right=1)


def test_phi_of_a_mask_is_one_image_or_refused():
    np.testing.assert_array_equal(idefics.phi_of(seen(PHI)), PHI)
    with pytest.raises(ValueError, match="token 1 of row 0 looks at 2 images"):
        idefics.phi_of([[[1, 0], [1, 1]]])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"additional_vocab_size": 7}, "the config has 47 words, the embeddings have 42"),
        ({"cross_layer_interval": None}, "the config lacks cross_layer_interval"),
        ({"intermediate_size": 35}, r"layers.0.mlp.gate_proj.weight \[35, 24\]"),
    ],
)
def test_configs_that_do_not_fit(wrong, message):
    model, about, _ = theirs_and_ours("plain")
    with pytest.raises(ValueError, match=message):
        idefics.build(about | wrong, arrays(model))
