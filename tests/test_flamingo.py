"""The whole model: which image reaches which token, what is frozen, what is trained."""

from dataclasses import replace

import numpy as np
import pytest

from miniflamingo.autograd import Tape
from miniflamingo.decoding import Decoder
from miniflamingo.flamingo import Flamingo, FlamingoConfig, build_resampler, count_parameters
from miniflamingo.functional import cross_entropy
from tests.gradients import check_module
from tests.models import TINY, batch_of, open_gates, row_of, tiny

# --- causality as a table -------------------------------------------------------------------------

# layouts of a batch's rows; for each mode and image: which tokens the first inserted layer lets
# that image reach (x), written out by hand below the row
TABLE = {
    "text before the first image": {
        "rows": ["b..eI..eI.e"],
        "previous": {(0, 0): "....xxxx...", (0, 1): "........xxx"},
        "next": {(0, 0): "xxxxx......", (0, 1): ".....xxxx.."},
        "all previous": {(0, 0): "....xxxxxxx", (0, 1): "........xxx"},
    },
    "adjacent images": {
        "rows": ["bIII.e"],
        "previous": {(0, 0): ".x....", (0, 1): "..x...", (0, 2): "...xxx"},
        "next": {(0, 0): "xx....", (0, 1): "..x...", (0, 2): "...x.."},
        "all previous": {(0, 0): ".xxxxx", (0, 1): "..xxxx", (0, 2): "...xxx"},
    },
    "trailing image": {
        "rows": ["bI.eI"],
        "previous": {(0, 0): ".xxx.", (0, 1): "....x"},
        "next": {(0, 0): "xx...", (0, 1): "..xxx"},
        "all previous": {(0, 0): ".xxxx", (0, 1): "....x"},
    },
    "ragged": {
        "rows": ["b.eI.eI..", "bI.e", "b..."],
        "previous": {(0, 0): "...xxx...", (0, 1): "......xxx", (1, 0): ".xxx"},
        "next": {(0, 0): "xxxx.....", (0, 1): "....xxx..", (1, 0): "xx.."},
        "all previous": {(0, 0): "...xxxxxx", (0, 1): "......xxx", (1, 0): ".xxx"},
    },
}
ROWS = [
    (name, mode, image)
    for name, entry in TABLE.items()
    for mode in ("previous", "next", "all previous")
    for image in entry[mode]
]


def first_layer(model, batch):
    """The output of the first GATED XATTN-DENSE layer, [B, L, D]."""
    y = model.lm.embed(batch.tokens, np.arange(batch.tokens.shape[1])[None])
    media = model.resampler(model.encode(batch.pixels), batch.num_frames)
    return model.gated_xattn[0](y, media, batch.phi)


@pytest.mark.parametrize("name, mode, image", ROWS)
def test_which_tokens_an_image_reaches(name, mode, image):
    rows, (b, j), reached = TABLE[name]["rows"], image, TABLE[name][mode][image]
    model = tiny(only_last=mode != "all previous")
    batch = batch_of(*rows, use_next=mode == "next")
    before, logits = first_layer(model, batch), model(**batch.inputs())
    batch.pixels[b, j] = 1 - batch.pixels[b, j]
    expected = np.zeros(batch.tokens.shape, bool)
    expected[b, : len(reached)] = np.array(list(reached)) == "x"
    moved = (first_layer(model, batch) != before).any(axis=2)
    real = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    np.testing.assert_array_equal(moved & real, expected)
    # through the LM's self-attention an image reaches all that follows, and nothing that precedes
    after = model(**batch.inputs())
    first = reached.index("x")
    np.testing.assert_array_equal(after[b, :first], logits[b, :first])
    assert (after[b, first : batch.lengths[b]] != logits[b, first : batch.lengths[b]]).any(1).all()
    others = np.arange(len(rows)) != b
    np.testing.assert_array_equal(after[others], logits[others])


def test_previous_means_nothing_before_the_images_tag():
    for name, entry in TABLE.items():
        for mode in ("previous", "all previous"):
            for (b, j), reached in entry[mode].items():
                tags = [i for i, c in enumerate(entry["rows"][b]) if c == "I"]
                assert reached.index("x") == tags[j], (name, mode)


def test_the_mini_preset_is_causal_to_the_bit():
    config = FlamingoConfig.preset("mini")
    model = open_gates(Flamingo(config, rng=np.random.default_rng(0)))
    batch = batch_of("b..eI..eI..", "bI.eI.eI..", size=24)
    batch.pixels = batch.pixels.astype(np.float32)
    logits = model(**batch.inputs())
    assert logits.dtype == np.float32
    batch.pixels[0, 1] = 0
    after = model(**batch.inputs())
    np.testing.assert_array_equal(after[0, :8], logits[0, :8])
    assert (after[0, 8:] != logits[0, 8:]).any(axis=1).all()
    np.testing.assert_array_equal(after[1], logits[1])


@pytest.mark.parametrize("only_last", [True, False])
@pytest.mark.parametrize("kind", ["perceiver", "mlp", "transformer"])
def test_padding_never_changes_a_row(kind, only_last):
    model = tiny(resampler=kind, only_last=only_last)
    batch = batch_of("b.eI.eI..", "bI.e", "b...", T=3)
    logits = model(**batch.inputs())
    for b, L in enumerate(batch.lengths):
        alone = model(**row_of(batch, b).inputs())
        np.testing.assert_allclose(logits[b, :L], alone[0], atol=1e-12)
    # whatever lies behind the end of a row, an image or a clip
    noise = np.random.default_rng(5)
    real = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    batch.tokens = np.where(real, batch.tokens, noise.integers(4, 11, real.shape))
    frames = (np.arange(3) < batch.num_frames[..., None])[..., None, None, None]
    batch.pixels = np.where(frames, batch.pixels, noise.random(batch.pixels.shape))
    np.testing.assert_array_equal(model(**batch.inputs())[real], logits[real])


def test_phi_is_computed_from_the_tokens_and_checked():
    model, batch = tiny(), batch_of("b.eI.eI..", "bI.e")
    given = model(**batch.inputs())
    inputs = {**batch.inputs(), "phi": None}
    np.testing.assert_array_equal(model(**inputs), given)
    with pytest.raises(ValueError, match="row 0 has 2 <image> tags but 1 images"):
        model(**{**inputs, "num_images": np.array([1, 1])})
    with pytest.raises(ValueError, match="row 0 has 2 <image> tags but 1 images"):
        model(batch.tokens, batch.pixels[:, :1])
    with pytest.raises(ValueError, match=r"0\.\.2 \(N = 2 images\), got phi\[0, 0\] = 3"):
        model(**{**inputs, "phi": np.full((2, 9), 3)})
    with pytest.raises(ValueError, match=r"\[2, 9\], got int32 \[1, 9\]"):
        model(**{**inputs, "phi": batch.phi[:1]})


def test_no_image_at_all():
    model, batch = tiny(), batch_of("b...", "b.e")
    assert batch.pixels.shape[1] == 0
    logits = model(**batch.inputs())
    assert np.isfinite(logits).all()
    assert np.abs(logits - model.lm(batch.tokens)).max() > 1e-3  # the gated FFW still acts


def test_pixels_are_checked():
    model = tiny()
    with pytest.raises(ValueError, match=r"\[B, N, T, height, width, 3\], got \(1, 1, 8, 8, 3\)"):
        model.encode(np.zeros((1, 1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"\[\.\.\., 8, 8, 3\]"):
        model.encode(np.zeros((1, 1, 1, 9, 9, 3)))
    assert model.encode(np.zeros((2, 3, 1, 8, 8, 3))).shape == (2, 3, 1, 4, 6)


def test_frames_are_encoded_one_by_one():
    model, batch = tiny(), batch_of("bI.I.", T=3)
    features = model.encode(batch.pixels)
    np.testing.assert_allclose(features[0, 1, 2], model.vision_encoder(batch.pixels[0, 1, 2:])[0])


# --- the gates and what is frozen -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("changes", [{}, {"train_eoc": True}, {"only_last": False}], ids=str)
@pytest.mark.parametrize("lm", [{}, {"tie_embeddings": True}, {"positions": "learned"}], ids=str)
def test_shut_gates_leave_the_frozen_lm_bit_for_bit(dtype, changes, lm):
    model, batch = tiny(alpha=0.0, dtype=dtype, lm=lm, **changes), batch_of("b.eI.eI..", "bI.e")
    batch.pixels = batch.pixels.astype(dtype)
    logits = model(**batch.inputs())
    np.testing.assert_array_equal(logits, model.lm(batch.tokens))
    assert logits.dtype == dtype
    assert (open_gates(model)(**batch.inputs()) != logits).any(axis=2).all()


def loss_and_gradients(model, batch):
    model.zero_grad()
    targets = np.where(batch.tokens[:, 1:] == 0, -100, batch.tokens[:, 1:])
    with Tape() as tape:
        logits = model(**batch.inputs())
        loss = cross_entropy(logits[:, :-1], targets)
    tape.backward(loss)
    return float(loss.data), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied, rows", [(False, 2), (True, 1)])
@pytest.mark.parametrize("train_eoc", [False, True])
def test_exactly_the_bridge_is_trained(train_eoc, tied, rows):
    model = tiny(train_eoc=train_eoc, lm={"tie_embeddings": tied})
    frozen = {n: p.data.copy() for n, p in model.named_parameters() if not p.requires_grad}
    _, gradients = loss_and_gradients(model, batch_of("b.eI.eI..", "bI.e"))
    parts = {name.split(".")[0] for name in gradients}
    eoc = {"eoc_embedding", "eoc_head"} if not tied else {"eoc_embedding"}
    assert parts == {"resampler", "gated_xattn"} | (eoc if train_eoc else set())
    assert len(eoc) == rows
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == trainable
    assert {n.split(".")[0] for n in frozen} == {"vision_encoder", "lm"}
    assert all(np.any(g) for g in gradients.values())


def test_shut_gates_are_opened_by_their_own_gradient():
    _, gradients = loss_and_gradients(tiny(alpha=0.0), batch_of("b.eI.eI..", "bI.e"))
    moved = {name.split(".")[-1] for name, g in gradients.items() if np.any(g)}
    assert moved == {"alpha_xattn", "alpha_dense"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resampler": "mlp"},
        {"resampler": "transformer", "train_eoc": True},
        {"only_last": False, "train_eoc": True, "lm": {"tie_embeddings": True}},
    ],
    ids=str,
)
def test_gradient_of_the_whole_model(changes):
    batch = batch_of("b.eI.eI..", "bI.e", T=2)
    model = tiny(**changes)
    model.unfreeze()  # the eye and the LM too: every path
    if model.eoc_embedding is not None:  # the rows that <EOC> replaces are read by nobody
        model.lm.embedding.weight.requires_grad = model.config.lm.tie_embeddings
    check_module(model, batch.tokens, batch.pixels, num_frames=batch.num_frames,
                 num_images=batch.num_images)  # fmt: skip


def test_loss_gradient_by_central_differences():
    model, batch = tiny(train_eoc=True), batch_of("b.eI.eI..", "bI.e")
    _, gradients = loss_and_gradients(model, batch)
    rng = np.random.default_rng(0)
    parameters = dict(model.named_parameters())
    for name in rng.choice(sorted(gradients), 12, replace=False):
        at = tuple(rng.integers(n) for n in gradients[name].shape)
        data, losses = parameters[name].data, []
        for step in (1e-5, -1e-5):
            parameters[name].data = data.copy()
            parameters[name].data[at] += step
            losses.append(loss_and_gradients(model, batch)[0])
        parameters[name].data = data
        slope = (losses[0] - losses[1]) / 2e-5
        np.testing.assert_allclose(gradients[name][at], slope, 1e-5, 1e-9, err_msg=name)


def test_the_trained_eoc_row_replaces_the_lms():
    batch = batch_of("b.eI.e.")
    model, plain = tiny(train_eoc=True), tiny()
    np.testing.assert_array_equal(model(**batch.inputs()), plain(**batch.inputs()))
    model.eoc_embedding.data += 1
    moved = (model(**batch.inputs()) != plain(**batch.inputs())).any(axis=(0, 2))
    np.testing.assert_array_equal(moved, np.arange(7) >= 2)
    model = tiny(train_eoc=True)
    model.eoc_head.data += 1
    moved = (model(**batch.inputs()) != plain(**batch.inputs())).any(axis=(0, 1))
    np.testing.assert_array_equal(moved, np.arange(11) == 2)


# --- wiring and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("every, before", [(1, [0, 1, 2]), (2, [0, 2]), (3, [0]), (7, [0])])
def test_layers_are_inserted_before_every_nth_block(every, before, monkeypatch):
    model, batch, order = tiny(xattn_every=every), batch_of("bI.e"), []
    for name, layers in (("x", model.gated_xattn), ("lm", model.lm.blocks)):
        for layer in layers:
            forward = layer.forward
            spy = lambda *a, forward=forward, name=name: order.append(name) or forward(*a)  # noqa: E731
            monkeypatch.setattr(layer, "forward", spy)
    model(**batch.inputs())
    expected = [step for i in range(3) for step in (["x"] if i in before else []) + ["lm"]]
    assert order == expected


def test_alphas():
    alphas = tiny(alpha=0.5).alphas()
    assert alphas == {"alpha_xattn": [0.5, 0.5], "alpha_dense": [-0.5, -0.5]}


def test_a_checkpoint_of_the_whole_model(tmp_path):
    model, other = tiny(seed=1, train_eoc=True), tiny(seed=2, train_eoc=True)
    batch = batch_of("b.eI.eI..", "bI.e")
    model.save(tmp_path / "model")
    assert np.abs(other(**batch.inputs()) - model(**batch.inputs())).max() > 1e-2
    other.load(tmp_path / "model")
    np.testing.assert_array_equal(other(**batch.inputs()), model(**batch.inputs()))
    with pytest.raises(ValueError, match=r"unexpected: eoc_embedding\n.*unexpected: eoc_head"):
        tiny().load(tmp_path / "model")


def test_presets():
    mini = FlamingoConfig.preset("mini", num_latents=5)
    assert mini.num_latents == 5
    assert len(mini.lm.alibi_slopes) == mini.lm.heads
    with pytest.raises(ValueError, match="unknown preset '4B': choose from mini, 3B, 9B, 80B"):
        FlamingoConfig.preset("4B")
    with pytest.raises(ValueError, match="perceiver, mlp, transformer or none, got 'pooling'"):
        build_resampler(FlamingoConfig(resampler="pooling"), rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "preset, part, count, tolerance",
    [
        ("3B", "resampler", 193.6e6, 0.001),
        ("9B", "resampler", 193.6e6, 0.001),
        ("80B", "resampler", 193.6e6, 0.001),
        ("3B", "gated_xattn", 1.2e9, 0.05),
        ("9B", "gated_xattn", 1.6e9, 0.3),
        ("3B", "lm", 1.4e9, 0.1),
        ("80B", "lm", 70e9, 0.1),
    ],
)
def test_the_papers_sizes(preset, part, count, tolerance):
    assert count_parameters(FlamingoConfig.preset(preset))[part] == pytest.approx(
        count, rel=tolerance
    )


def test_inserted_layers_are_counted_by_hand():
    D, D_m, inner, layers = 2048, 1536, 16 * 128, 24
    attention = 2 * D * inner + 2 * D_m * inner
    each = attention + 8 * D * D + (2 * D + 2 * D + 2 * D_m) + 2
    assert count_parameters(FlamingoConfig.preset("3B"))["gated_xattn"] == layers * each


def test_counting_equals_building():
    counts = count_parameters(TINY)
    assert sum(counts.values()) == tiny().num_parameters()
    assert counts["resampler"] == tiny().resampler.num_parameters()


# --- masked means unseen --------------------------------------------------------------------------

# which pixels of a batch with rows of 3, 1 and 0 images, T = 3, are poisoned
HIDDEN = {
    "padded frames": lambda batch: np.arange(3) >= batch.num_frames[..., None],
    "padded images": lambda batch: np.arange(3)[:, None] >= batch.num_images[:, None, None],
    "unseen images": lambda batch: ~(batch.phi[:, :, None] == np.arange(1, 4)).any(1)[..., None],
}


def logits_and_gradients(model, batch, **changes):
    for _, p in model.named_parameters():
        p.grad = None
    with Tape() as tape:
        logits = model(**batch.inputs() | changes)
        loss = cross_entropy(logits, batch.tokens)
    tape.backward(loss)
    return [logits.data, *(p.grad for _, p in model.named_parameters() if p.grad is not None)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("resampler", ["perceiver", "transformer", "mlp"])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_masked_reaches_no_logit_and_no_gradient(name, resampler, bad):
    model = tiny(resampler=resampler, spatial_embeddings=True)
    batch = batch_of("bI.I..I.", "b..I.", "b...", T=3)
    phi = np.where(batch.phi == 2, 1, batch.phi)  # nobody looks at image 2
    changes = {} if name != "unseen images" else {"phi": phi, "num_frames": None}
    batch = replace(batch, phi=phi) if changes else batch
    expected = logits_and_gradients(model, batch, **changes)
    hidden = np.broadcast_to(HIDDEN[name](batch), batch.pixels.shape[:3])
    assert hidden.any() and not hidden.all()
    batch.pixels[hidden] = bad
    for ours, clean in zip(logits_and_gradients(model, batch, **changes), expected, strict=True):
        np.testing.assert_array_equal(ours, clean)


def test_pixels_that_count_are_still_checked():
    batch = batch_of("bI.I..", T=2)
    batch.pixels[0, 1, 0, 3, 3, 0] = np.nan
    with pytest.raises(ValueError, match=r"images must be finite, got nan at \[0, 1, 0, 3, 3, 0\]"):
        tiny()(**batch.inputs())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("lm", [{}, {"positions": "learned"}])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the later token itself
def test_a_later_token_reaches_no_earlier_logit(lm, bad):
    model, batch = tiny(lm=lm), batch_of("bI.eI..", T=1)
    batch.tokens[:] = np.array([1, 3, 5, 2, 3, 6, 7])
    expected = model(**batch.inputs())
    model.lm.embedding.weight.data[6] = bad
    logits = model(**batch.inputs())
    np.testing.assert_array_equal(logits[:, :5], expected[:, :5])
    assert not np.isfinite(logits[:, 5:]).any()


@pytest.mark.parametrize("cached", [True, False])
def test_decoding_does_not_see_padding(cached):
    model, batch = tiny(), batch_of("bI.", "bI.eI..", T=2)
    expected = Decoder(model, batch, 2, cached).logits
    batch.pixels[np.arange(2) >= batch.num_frames[..., None]] = np.nan
    np.testing.assert_array_equal(Decoder(model, batch, 2, cached).logits, expected)
