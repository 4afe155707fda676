"""Whole OpenFlamingos: an MPT, an OPT and a Llama with gated layers, a perceiver and CLIP's eye.

Against their own code where it is installed; always against the parts, put together by hand.
"""

import functools
import json
from importlib.util import find_spec

import numpy as np
import pytest

from miniflamingo.interop import clip, open_flamingo, project_of
from miniflamingo.interop.bridge import Bridge
from miniflamingo.interop.loading import shapes_of
from miniflamingo.vit import CLIP_MEAN, CLIP_STD
from miniflamingo.xattn import compute_phi
from tests.interop.agreement import (
    Case,
    Peer,
    arrays,
    check,
    compare,
    each_route,
    move,
    run_theirs,
)
from tests.interop.peers import stand_ins

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch")

D = 8  # the text's and the eye's width: that of the fixtures
DECODERS = {
    "mpt": ("Mpt", "transformer.blocks",
            dict(d_model=D, n_layers=4, n_heads=2, vocab_size=40, max_seq_len=32)),
    "opt": ("OPT", "model.decoder.layers",
            dict(hidden_size=D, num_hidden_layers=4, num_attention_heads=2, vocab_size=40,
                 ffn_dim=12, word_embed_proj_dim=D, max_position_embeddings=32)),
    "llama": ("Llama", "model.layers",
              dict(hidden_size=D, num_hidden_layers=4, num_attention_heads=2, vocab_size=40,
                   num_key_value_heads=1, intermediate_size=12)),
}  # fmt: skip
VISION = dict(image_size=8, patch_size=4, width=D, layers=1, head_width=4, quick_gelu=False)
each_decoder = pytest.mark.parametrize("name", DECODERS)
IMAGE, rng = 39, np.random.default_rng(0)
TOKENS = rng.integers(3, 38, (3, 9))
TOKENS[0, [1, 4]] = TOKENS[1, 3] = IMAGE
PHI, PIXELS = compute_phi(TOKENS, IMAGE), rng.random((3, 2, 1, 8, 8, 3))


def decoder(name):
    """A random decoder of transformers, and its config as a dict."""
    kind, _, sizes = DECODERS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=1, eos_token_id=2)
    model = move(getattr(transformers, f"{kind}ForCausalLM")(config).double().eval())
    return model, json.loads(config.to_json_string(use_diff=False))


def config_of(about, every, **more):
    return {
        "cross_attn_every_n_layers": every, "lang_config": about, "vision_config": VISION,
        "media_token_id": IMAGE, **more,
    }  # fmt: skip


def open_clip_state():
    """Random weights of a small CLIP under open_clip's names."""
    shapes = {
        "class_embedding": (D,), "positional_embedding": (5, D), "conv1.weight": (D, 3, 4, 4),
        "proj": (D, 6), "transformer.resblocks.0.attn.in_proj_weight": (3 * D, D),
        "transformer.resblocks.0.attn.in_proj_bias": (3 * D,),
        "transformer.resblocks.0.attn.out_proj.weight": (D, D),
        "transformer.resblocks.0.mlp.c_fc.weight": (4 * D, D),
        "transformer.resblocks.0.mlp.c_fc.bias": (4 * D,),
        "transformer.resblocks.0.mlp.c_proj.weight": (D, 4 * D),
    }  # fmt: skip
    norms = ("ln_pre", "ln_post", *(f"transformer.resblocks.0.ln_{i}" for i in (1, 2)))
    shapes |= {f"{norm}.{kind}": (D,) for norm in norms for kind in ("weight", "bias")}
    parts = ("attn.out_proj", "mlp.c_proj")
    shapes |= {f"transformer.resblocks.0.{part}.bias": (D,) for part in parts}
    return {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}


def checkpoint(name, every, wrapped):
    """A whole checkpoint whose bridge is that of the fixtures, and its config.

    wrapped: under the names inside the decoder's layers, as a model saves them; else apart.
    """
    model, about = decoder(name)
    state = {f"vision_encoder.{n}": x for n, x in open_clip_state().items()}
    state |= Peer.load("open_flamingo-resampler-small").weights
    layers = DECODERS[name][1]
    for i in range(every - 1, 4, every):
        old = "lang_encoder.gated_cross_attn_layers.0."
        new = f"lang_encoder.{layers}.{i}.gated_cross_attn_layer." if wrapped else (
            f"lang_encoder.gated_cross_attn_layers.{i}.")  # fmt: skip
        gated = Peer.load("open_flamingo-xattn-small").weights
        state |= {n.replace(old, new): x for n, x in gated.items()}
    for n, x in arrays(model).items():
        if wrapped and n.startswith(layers):
            i, rest = n.removeprefix(layers + ".").split(".", 1)
            n = f"{layers}.{i}.decoder_layer.{rest}"
            state[f"lang_encoder.old_decoder_blocks.{i}.{rest}"] = x
        state[f"lang_encoder.{n}"] = x
    return config_of(about, every, dim_head=4), state


def by_parts(config, state):
    """The logits of a checkpoint, by the loaders of its parts."""
    own = {n.removeprefix("lang_encoder.").replace(".decoder_layer.", "."): x
           for n, x in state.items() if n.startswith("lang_encoder.")
           and "gated_cross_attn" not in n and "old_decoder" not in n}  # fmt: skip
    project = open_flamingo.DECODERS[config["lang_config"]["model_type"]]
    lm = project.build(config["lang_config"], own, np.float64)
    bridge = open_flamingo.build({"dim_head": 4}, state, np.float64)
    assert isinstance(bridge, Bridge)
    eye = clip.open_config_of(VISION)
    whole = open_flamingo.build(config, state, np.float64)
    features = whole.vision_encoder(PIXELS.reshape(-1, 8, 8, 3)).reshape(3, 2, 1, 4, D)
    assert features.shape[3] == eye.num_features
    media, positions = bridge.resampler(features), np.arange(9)[None]
    x, bias, every = lm.embed(TOKENS, positions), lm.causality(positions, 9), len(lm.blocks)
    every = config["cross_attn_every_n_layers"]
    for i, block in enumerate(lm.blocks):
        if (i + 1) % every == 0:
            x = bridge.gated_xattn[i // every](x, media, PHI)
        x = block(x, None, bias, None, positions)
    return whole, lm.predict(x)


@each_decoder
@pytest.mark.parametrize("every, wrapped", [(1, True), (2, True), (2, False)])
def test_a_whole_checkpoint_is_its_parts(name, every, wrapped):
    config, state = checkpoint(name, every, wrapped)
    assert project_of(config, shapes_of(state)) == "open_flamingo"
    whole, logits = by_parts(config, state)
    np.testing.assert_allclose(whole(TOKENS, PIXELS), logits, atol=1e-12)
    assert list(whole.config.layers()) == list(range(every - 1, 4, every))


INSTALLED = all(map(find_spec, ("open_flamingo", "open_clip")))
# their eye is run without gradients; transformers' softmax, and Llama's norms, are in float32
MOST = {"opt": 1e-12, "mpt": 2e-6, "llama": 2e-5}


@functools.cache
def live(name):
    """The Peer of all of it: open_clip's eye, their perceiver, their layers in a decoder."""
    with stand_ins("torchvision", "torchvision.ops.misc", "torchvision.transforms",
                   "torchvision.transforms.functional", "timm"):  # fmt: skip
        from open_clip.transformer import VisionTransformer
        from open_flamingo.src.flamingo import Flamingo
        from open_flamingo.src.flamingo_lm import FlamingoLMMixin
        from open_flamingo.src.utils import extend_instance
    model, about = decoder(name)
    extend_instance(model, FlamingoLMMixin)
    model.set_decoder_layers_attr_name(DECODERS[name][1])
    eye = torch.nn.Module()
    eye.visual = VisionTransformer(8, 4, D, 1, 2, 4.0, output_dim=6, output_tokens=True)
    theirs = Flamingo(eye, model, 38, IMAGE, D, cross_attn_every_n_layers=2)
    theirs = move(theirs.double().eval()).requires_grad_(True)
    pixels = torch.from_numpy(((PIXELS - CLIP_MEAN) / CLIP_STD).transpose(0, 1, 2, 5, 3, 4))
    tokens = torch.from_numpy(TOKENS)
    call = lambda: theirs(pixels, tokens, torch.ones_like(tokens)).logits  # noqa: E731
    return run_theirs(theirs, call, {}, config_of(about, 2))


def errors(name, route):
    """What `compare` says of our model."""
    peer = live(name)
    ours = open_flamingo.build(peer.config, peer.weights, np.float64)

    def call(m, to):
        return m(to.of(TOKENS), to.of(PIXELS), phi=to.of(PHI), **to.options)

    return compare(peer, open_flamingo, ours, call, relative=True, route=route)


@each_route
@each_decoder
def test_against_their_model(name, route):
    if not INSTALLED:
        pytest.skip("open_flamingo or open_clip is not installed")
    if route == "fused":
        pytest.skip("minutes: it builds a resampler of 64 latents; test_bridges.py runs the parts")
    check(errors(name, route), MOST[name])


def cases():
    """The rows of the agreement table, where the packages are installed."""
    for name, most in MOST.items() if INSTALLED else ():
        measure = functools.partial(errors, name)
        yield Case("open_flamingo", "whole model", name, most, measure, routes=("numpy", "torch"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cross_attn_every_n_layers": 3}, r"= 3, but gated layers stand at \[1, 3\]"),
        (
            {"lang_config": {"model_type": "gpt_neox"}},
            "a decoder 'gpt_neox' is none of mpt, mosaic_gpt, opt, ll",
        ),
        ({"vision_config": None}, "the config lacks vision_config"),
        ({"dim_head": 7}, "queries of 8 are no heads of dim_head = 7 each"),
    ],
)
def test_configs_that_do_not_fit(change, message):
    config, state = checkpoint("opt", 2, True)
    with pytest.raises(ValueError, match=message):
        open_flamingo.build(config | change, state)
