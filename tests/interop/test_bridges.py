"""flamingo-pytorch and OpenFlamingo: 1e-12 of theirs, in outputs and all gradients.

Against fixtures of what their code computed, always; against their code where it is installed.
"""

import functools
from importlib.util import find_spec

import numpy as np
import pytest

from miniflamingo.interop import PROJECTS, project_of
from miniflamingo.interop.loading import shapes_of
from miniflamingo.xattn import image_causal_mask
from tests.gradients import normal
from tests.interop.agreement import (
    FIXTURES,
    Case,
    Fault,
    Peer,
    arrays,
    check,
    compare,
    each_route,
    move,
)
from tests.interop.peers import CASES, PEERS

GATED = [case for case in CASES if "xattn" in case]


@functools.cache
def live(project):
    return PEERS[project]()


@pytest.fixture(params=["fixture", "live"])
def peer_of(request):
    """case -> its Peer, from a file, or from the package itself."""
    if request.param == "fixture":
        return Peer.load

    def run(case):
        project = case.split("-")[0]
        if find_spec(project) is None:
            pytest.skip(f"{project} is not installed")
        return live(project)[case]

    return run


def ours(case, peer):
    """The project's module here, and the Bridge that it builds of a peer."""
    project = PROJECTS[case.split("-")[0]]
    return project, project.build(peer.config, peer.weights, np.float64)


def errors(case, peer, route):
    """What `compare` says of our gated layer or resampler."""
    phi = peer.whole.get("phi")

    def gated(m, to, y, media):
        return m.gated_xattn[0](y, media, to.of(phi), **to.options)

    def resampler(m, to, features):  # flamingo-pytorch's features have no axis of frames
        frames = np.s_[:, :, None] if features.ndim == 4 else np.s_[:]
        return m.resampler(features[frames], **to.options)

    return compare(peer, *ours(case, peer), gated if "xattn" in case else resampler, route=route)


MOST = 1e-12


@each_route
@pytest.mark.parametrize("case", CASES)
def test_agreement(case, peer_of, route):
    peer = peer_of(case)
    assert project_of(peer.config, shapes_of(peer.weights)) == case.split("-")[0]
    check(errors(case, peer, route), MOST)


def attend(bridge, peer, phi, only_last):
    """Our attention alone, as their `attn` gives it."""
    layer = bridge.gated_xattn[0]
    layer.attention.only_last = only_last
    keys_values = layer.project_media(peer.inputs["media"])
    return layer.attention(layer.norm(peer.inputs["y"]), keys_values, phi)


def before_any_image(case, peer):
    """The largest number that the attention to all previous images gives a token without one."""
    phi = peer.whole["phi"]
    out = attend(ours(case, peer)[1], peer, phi, only_last=False)
    return {"theirs": _largest(peer.extra["leak"][phi == 0]), "ours": _largest(out[phi == 0])}


def excess_tag(case, peer):
    """The same for a tag behind the last image, which ours refuses: a number of nothing is 0."""
    phi = np.broadcast_to(np.arange(1, 8), (3, 7))
    try:
        out = ours(case, peer)[1].gated_xattn[0](peer.inputs["y"], peer.inputs["media"], phi)
    except ValueError:
        out = np.zeros(0)
    return {"theirs": _largest(peer.extra["excess"]), "ours": _largest(out)}


def _largest(x):
    return float(np.abs(x).max(initial=0))


def cases():
    """The rows of the agreement table: live where the package is installed."""
    for case in CASES:
        project, part, name = case.split("-")
        peer, from_file = best(case)
        part = {"xattn": "gated layer"}.get(part, part)
        measure = functools.partial(errors, case, peer)
        yield Case(project, part, name, MOST, measure, from_file=from_file)


def faults():
    """What a gated layer of each package does with text that sees no image."""
    for case in GATED:
        if case.endswith("small"):
            project, peer = case.split("-")[0], best(case)[0]
            for fault, name in FAULTS.items():
                yield Fault(project, name, functools.partial(fault, case, peer))


FAULTS = {
    before_any_image: "tokens before any image get the mean of V over all images (largest number)",
    excess_tag: "a tag without an image gets that mean, too (largest number)",
}


def best(case):
    """-> a case's Peer, and whether it is from a file."""
    project = case.split("-")[0]
    from_file = find_spec(project) is None
    return (Peer.load(case) if from_file else live(project)[case]), from_file


@pytest.mark.parametrize("case", GATED)
def test_their_tokens_before_any_image_get_the_mean_of_all_images_and_ours_nothing(case, peer_of):
    """only_attend_immediate_media=False: a softmax over equal numbers is uniform."""
    peer = peer_of(case)
    phi, (_, bridge) = peer.whole["phi"], ours(case, peer)
    before, leak = phi == 0, peer.extra["leak"]
    np.testing.assert_allclose(
        leak[before], np.broadcast_to(peer.extra["mean"], leak.shape)[before]
    )
    found = before_any_image(case, peer)
    assert found["theirs"] > 0.1 and found["ours"] == 0
    out = attend(bridge, peer, phi, only_last=False)
    # where there is an image, both agree
    np.testing.assert_allclose(out[~before], leak[~before], atol=1e-12)


@pytest.mark.parametrize("case", GATED)
def test_their_excess_image_tag_gets_the_mean_of_all_images_and_ours_is_refused(case, peer_of):
    peer = peer_of(case)
    _, bridge = ours(case, peer)
    excess = peer.extra["excess"]
    np.testing.assert_allclose(excess, np.broadcast_to(peer.extra["mean"], excess.shape))
    found = excess_tag(case, peer)
    assert found["theirs"] > 0.1 and found["ours"] == 0
    phi = np.broadcast_to(np.arange(1, 8), (3, 7))
    with pytest.raises(ValueError, match=r"phi must lie in 0\.\.2 \(N = 2 images\)"):
        bridge.gated_xattn[0](peer.inputs["y"], peer.inputs["media"], phi)


@pytest.mark.parametrize("every", [1, 2])
def test_the_bridge_of_a_flamingo_palm(every):
    if find_spec("flamingo_pytorch") is None:
        pytest.skip("flamingo_pytorch is not installed")
    import torch
    from flamingo_pytorch import FlamingoPaLM

    palm = FlamingoPaLM(
        num_tokens=20, dim=8, depth=3, dim_head=4, heads=2, media_token_id=3,
        cross_attn_every=every, perceiver_depth=1, perceiver_num_latents=3, max_video_frames=2,
        img_encoder=torch.nn.Identity(),
    )  # fmt: skip
    palm = move(palm.double())
    config, project = {"dim_head": 4}, PROJECTS["flamingo_pytorch"]
    bridge = project.build(config, arrays(palm), np.float64)
    crosses = [cross for _, cross in palm.layers if cross is not None]
    y, media, features = normal(1, 4, 8), normal(1, 2, 3, 8), normal(1, 2, 1, 5, 8)
    tags = torch.tensor([[False, True, True, False]])
    assert len(bridge.gated_xattn) == len(crosses) == len(range(0, 3, every))
    for ours, cross in zip(bridge.gated_xattn, crosses):
        theirs = cross(*map(torch.from_numpy, (y, media)), tags).detach()
        np.testing.assert_allclose(ours(y, media, np.array([[0, 1, 2, 2]])), theirs, atol=1e-12)
    frame = palm.video_frame_pos_emb[:1, None]
    theirs = palm.perceiver_resampler(torch.from_numpy(features[:, :, 0]) + frame)
    np.testing.assert_allclose(bridge.resampler(features), theirs.detach(), atol=1e-12)


def test_the_cases_have_rows_with_fewer_images_than_others():
    phi = Peer.load(GATED[0]).whole["phi"]
    assert phi.max(axis=1).tolist() == [2, 1, 0]
    assert image_causal_mask(phi, 2, 1).any(axis=1).tolist() == [
        [True] * 2,
        [True, False],
        [False] * 2,
    ]


def test_the_fixtures_are_small():
    sizes = [path.stat().st_size for path in FIXTURES.glob("*.safetensors")]
    assert len(sizes) == len(CASES)
    assert sum(sizes) < 300_000
