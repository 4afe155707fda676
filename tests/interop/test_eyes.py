"""CLIP of transformers and of open_clip, and the real EfficientNet-Lite0, as eyes of ours."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from miniflamingo.efficientnet import STAGES, EfficientNetConfig, EfficientNetLite
from miniflamingo.interop import clip, efficientnet, project_of
from miniflamingo.interop.loading import build, shapes_of
from miniflamingo.interop.names import Renamed
from miniflamingo.vit import VisionTransformer
from tests.gradients import normal
from tests.interop.agreement import arrays, check, compare, move, run_theirs
from tests.interop.peers import stand_ins

torch = pytest.importorskip("torch")

PIXELS = np.random.default_rng(0).random((2, 8, 8, 3))


def normalised(pixels, config):
    """As their processors give them: channels first."""
    return ((pixels - np.array(config.mean)) / np.array(config.std)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_of_transformers(act):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, hidden_act=act,
    )  # fmt: skip
    model = move(transformers.CLIPVisionModel(config).double().eval())
    about, state = json.loads(config.to_json_string(use_diff=False)), arrays(model)
    assert project_of(about, shapes_of(state)) == "clip"
    eye = clip.build(about, state, np.float64)
    pixels = torch.from_numpy(normalised(PIXELS, eye.config))
    peer = run_theirs(model, lambda: model(pixel_values=pixels).last_hidden_state, {}, about)
    check(compare(peer, clip, eye, lambda m, route: m(PIXELS)), 1e-11)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clips_patches(quick):
    if find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    with stand_ins("torchvision", "torchvision.ops.misc", "torchvision.transforms",
                   "torchvision.transforms.functional", "timm"):  # fmt: skip
        from open_clip.transformer import QuickGELU
        from open_clip.transformer import VisionTransformer as Theirs
    model = Theirs(8, 4, 16, 2, 2, 4.0, output_dim=6, output_tokens=True,
                   act_layer=QuickGELU if quick else torch.nn.GELU)  # fmt: skip
    model = move(model.double().eval())
    vision = dict(image_size=8, patch_size=4, width=16, layers=2, head_width=8, quick_gelu=quick)
    config, state = clip.open_config_of(vision), Renamed(arrays(model), clip.OPEN_NAMES)
    eye = build(VisionTransformer, config, state, np.float64)
    pixels = torch.from_numpy(normalised(PIXELS, config))
    np.testing.assert_allclose(eye(PIXELS), model(pixels)[1].detach().numpy(), atol=1e-12)


def random_lite0():
    """A state_dict with the names and shapes of EfficientNet-Lite0, and batch norms that matter."""
    eye, state = EfficientNetLite(EfficientNetConfig(64), rng=np.random.default_rng(0)), {}
    norms = {
        "stem": "_bn0",
        "head": "_bn1",
        "expand": "_bn0",
        "depthwise": "_bn1",
        "project": "_bn2",
    }
    for i, (name, p) in enumerate(eye.named_parameters()):
        *block, part, kind = name.split(".")
        at = f"_blocks.{block[1]}." if block else ""
        if kind == "weight":
            conv = f"_conv_{part}" if not block else f"_{part}_conv"
            state[f"{at}{conv}.weight"] = p.data
            continue
        for n, stat in enumerate(("weight", "bias", "running_mean", "running_var")):
            values = normal(*p.shape, seed=10 * i + n)
            values = np.abs(values) + 0.5 if stat in ("weight", "running_var") else 0.1 * values
            state[f"{at}{norms[part]}.{stat}"] = values
        state[f"{at}{norms[part]}.num_batches_tracked"] = np.array(0)
    return state | {"_fc.weight": np.zeros((1000, 1280)), "_fc.bias": np.zeros(1000)}


def by_torch(state, x):
    """EfficientNet-Lite0 written with torch: x [B, 3, 64, 64] -> [B, 1280, 2, 2]."""
    F, state = torch.nn.functional, {n: torch.from_numpy(np.array(x)) for n, x in state.items()}

    def conv(x, name, norm, stride=1, depthwise=False):
        w, pads = state[f"{name}.weight"], []
        for n in (x.shape[3], x.shape[2]):
            pad = max((-(-n // stride) - 1) * stride + w.shape[-1] - n, 0)
            pads += [pad // 2, pad - pad // 2]
        x = F.conv2d(F.pad(x, pads), w.to(x), None, stride, groups=x.shape[1] if depthwise else 1)
        stats = (
            state[f"{norm}.{s}"].to(x) for s in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, *stats, eps=1e-3)

    x, i = F.relu6(conv(x, "_conv_stem", "_bn0", 2)), 0
    for repeats, _, stride, widening, _ in STAGES:
        for r in range(repeats):
            b, y = f"_blocks.{i}.", x
            if widening > 1:
                y = F.relu6(conv(y, b + "_expand_conv", b + "_bn0"))
            y = F.relu6(conv(y, b + "_depthwise_conv", b + "_bn1", 1 if r else stride, True))
            y = conv(y, b + "_project_conv", b + "_bn2")
            x, i = (x + y if r else y), i + 1
    return F.relu6(conv(x, "_conv_head", "_bn1"))


def test_efficientnet_lite0_with_its_batch_norms_folded():
    state, pixels = random_lite0(), np.random.default_rng(0).random((1, 64, 64, 3))
    assert project_of({}, shapes_of(state)) == "efficientnet"
    eye = efficientnet.build({"image_size": 64}, state, np.float64)
    expected = by_torch(state, torch.from_numpy(normalised(pixels, eye.config)))
    expected = expected.flatten(2).transpose(1, 2).numpy()
    assert expected.std() > 1e-3
    np.testing.assert_allclose(eye(pixels), expected, atol=1e-10)
