"""A plan's bytes, what is sent, and seconds: worked out by hand, and what may not be."""

from dataclasses import replace

import pytest

from miniflamingo.cost import counting, devices, plan, report
from miniflamingo.cost.counting import Sequence
from miniflamingo.cost.plan import MIXTURE, Layout, Plan, Training
from miniflamingo.flamingo import PRESETS, count_parameters

CONFIG, PAGE = PRESETS["80B"], Sequence(256, 5)
H200, TPU = devices.find("h200"), devices.find("TPUv4")


def made(training=None, device=H200, config=CONFIG, **layout):
    return Plan(config, training or Training(), Layout(**layout), device)


def test_devices_have_what_the_other_table_says():
    """kernels/tools/devices.py knows the same GPUs; neither was copied from the other."""
    pytest.importorskip("torch")
    from miniflamingo.kernels.tools import devices as others

    names = {"A100-SXM4-80GB": "a100", "H100 80GB HBM3": "h100", "H200": "h200", "MI300X": "mi300x"}
    assert names.keys() == others.DEVICES.keys()
    for theirs, ours in names.items():
        other, own = others.DEVICES[theirs], devices.find(ours)
        assert (own.flops, own.bandwidth) == (other.peak_flops, other.peak_bandwidth)


def test_a_tpu_is_the_papers():
    assert (TPU.flops, TPU.memory, TPU.bandwidth) == (275e12, 32 * 2**30, 1.2e12)
    with pytest.raises(ValueError, match="unknown device 'tpuv9': choose from tpuv4, a100, h100"):
        devices.find("tpuv9")


def test_numbers_on_one_device_are_all_of_the_models():
    counts, own = count_parameters(CONFIG), made().numbers()
    positions = CONFIG.lm.depth * CONFIG.lm.dim**2
    assert own.trained == sum(counts[p] for p in ("gated_xattn", "resampler", "eoc_embedding"))
    assert own.frozen == counts["lm"] + positions and own.eye == counts["vision_encoder"]
    assert sum(made().parameters().values()) == sum(counts.values()) + positions


def test_16_bytes_for_what_learns_and_2_for_what_is_frozen():
    """Module 15, equation (5), in float32 gradients; equation (6): all of it cut by FSDP2."""
    training, own = Training(gradients="fp32", eye=False), made().numbers()
    whole = made(training).state()
    assert sum(whole.values()) == 16 * own.trained + 2 * own.frozen
    cut = made(training, devices=8, sharding="fsdp2")
    assert sum(cut.state().values()) == pytest.approx(sum(whole.values()) / 8)
    assert cut.buffers() == 2 * 2 * cut.unit() + 4 * counting.gated_block(CONFIG)


def test_zero1_cuts_the_optimisers_state_alone():
    none, zero = (made(devices=8, sharding=s).state() for s in ("none", "zero1"))
    assert zero["moments"] == none["moments"] / 8 == made().numbers().trained
    assert {k: v for k, v in zero.items() if k != "moments"} == {
        k: v for k, v in none.items() if k != "moments"
    }


def test_a_master_copy_belongs_to_numbers_stored_in_bf16():
    own = made().numbers()
    state = made(Training(trained="bf16"), devices=4).state()
    assert state["trained weights"] == 2 * own.trained and state["master copies"] == own.trained


def test_tensor_parallelism_cuts_everything_but_the_eye_and_what_norms_read():
    one, cut = made(), made(devices=16, tensor=16)
    eye = 2 * one.numbers().eye
    assert cut.state()["frozen weights"] - eye == (one.state()["frozen weights"] - eye) / 16
    _, halves = counting.kept(CONFIG, PAGE, False)
    assert one.activations(False) - cut.activations(False) == pytest.approx(2 * halves * 15 / 16)


def test_a_pipelines_first_stage_has_the_resampler_and_its_share_of_blocks():
    own, config = made(devices=8, pipeline=8).numbers(), CONFIG
    counts, table = count_parameters(config), config.lm.vocab_size * config.lm.dim
    rest = counts["lm"] - table + config.lm.depth * config.lm.dim**2
    others = counts["resampler"] + counts["eoc_embedding"]
    assert own.trained == counts["gated_xattn"] / 8 + others
    assert own.frozen == rest / 8 + table


def test_recomputing_keeps_less_and_computes_more():
    kept, again = Training(recompute=False), Training()
    assert made(kept).activations() > 5 * made(again).activations() > 0
    flops = [sum(f.again for f in made(t).flops().values()) for t in (kept, again)]
    forward = {name: f.forward for name, f in made(again).flops().items()}
    assert flops == [0, sum(forward.values()) - forward["head"] - forward["vision_encoder"]]


def test_plain_attention_keeps_its_weights():
    fused, plain = made(), made(Training(fused=False, recompute=False))
    c, L = CONFIG, PAGE.tokens
    scores = c.lm.depth * c.lm.heads * L * L + len(c.layers()) * c.xattn_heads * L * c.num_latents
    M = c.vision.num_features + c.num_latents
    scores += c.resampler_depth * c.resampler_heads * c.num_latents * M * PAGE.images
    assert plain.activations() - fused.activations(False) == 2 * scores


def test_flops_of_a_step_are_those_of_its_sequences():
    t = Training(tuple(MIXTURE.values()), batch=3, eye=False)
    expected = sum(counting.flops(CONFIG, s)["lm"].forward for s in MIXTURE.values())
    assert made(t).flops()["lm"].forward == 3 * expected
    assert "vision_encoder" not in made(t).flops()


def test_a_ring_sends_its_share_of_the_gradients_and_the_new_weights():
    own = made().numbers()
    none, zero, fsdp = (made(devices=8, sharding=s).sent()["data"] for s in plan.SHARDINGS)
    assert zero.bytes == 7 / 8 * (2 + 4) * own.trained and zero.hides
    assert none.bytes == 7 / 8 * (2 + 2) * own.trained
    rounds = 256 // 8  # of one sequence, each gathered twice and summed once
    assert fsdp.bytes == 7 / 8 * (4 * (own.trained + own.frozen) + 2 * own.trained) * rounds
    assert made().sent() == {}


def test_tensor_parallel_sums_are_two_a_block_and_pass():
    t = Training((Sequence(100, 0),), batch=1, recompute=False)
    sent = made(t, devices=4, tensor=4).sent()["sums over tensor"]
    blocks, D = CONFIG.lm.depth + len(CONFIG.layers()), CONFIG.lm.dim
    sums = 4 * blocks + 2  # two forward, two backward; the table and the head
    assert sent.bytes == 2 * 3 / 4 * sums * 100 * D * 2 and not sent.hides


def test_a_pipeline_sends_text_and_visual_tokens_and_waits():
    made_of = made(devices=4, pipeline=4)
    latents = PAGE.images * CONFIG.num_latents * CONFIG.media_dim
    rows = PAGE.tokens * CONFIG.lm.dim + latents
    assert made_of.sent()["pipeline"].bytes == 2 * rows * 2 * 256
    assert made_of.seconds()["bubble"] == pytest.approx(made_of.seconds()["computing"] * 3 / 256)


def test_groups_of_more_than_a_node_go_over_the_network():
    near, far = (made(devices=n, tensor=n).sent()["sums over tensor"] for n in (8, 16))
    assert (near.bandwidth, far.bandwidth) == (H200.link, H200.far)


def test_seconds_follow_from_flops_and_what_does_not_hide():
    p = made(Training(overlap=0.0), devices=8, sharding="fsdp2")
    work = sum(map(sum, p.flops().values()))
    sent = p.sent()["data"]
    assert p.seconds()["computing"] == work / (8 * 989.4e12 * 0.5)
    assert p.seconds()["waiting"] == sent.bytes / sent.bandwidth
    hidden = replace(p, training=replace(p.training, overlap=1.0)).seconds()["waiting"]
    assert hidden == max(0, sent.bytes / sent.bandwidth - p.seconds()["computing"])
    assert p.days() == pytest.approx(sum(p.seconds().values()) * 500_000 / 86_400)
    again = sum(f.again for f in p.flops().values())
    share = (work - again) / (8 * 989.4e12 * sum(p.seconds().values()))
    assert p.model_utilisation() == pytest.approx(share)


def test_the_quickest_of_those_that_fit_is_chosen():
    quick = plan.quickest(CONFIG, Training(), Layout(16, sharding="fsdp2"), H200)
    assert quick.training.micro_batch == 16 and quick.fits()  # it gathers least often
    small = replace(H200, memory=30e9)
    some = plan.quickest(CONFIG, Training(), Layout(16, sharding="fsdp2"), small)
    assert 1 <= some.training.micro_batch < 16 and some.fits()
    none = plan.quickest(CONFIG, Training(), Layout(16), small)
    assert none.training.micro_batch == 1 and not none.fits()


def test_a_batch_that_takes_so_many_days_takes_so_many_days():
    training = Training(tuple(MIXTURE.values()), 1536)
    p = made(training, TPU, devices=1536, tensor=16)
    batch = plan.batch_within(p, 15)
    computing = p.seconds()["computing"] * batch / 1536
    assert computing * 500_000 / 86_400 == pytest.approx(15)


def test_the_papers_check_is_consistent():
    training = Training(tuple(MIXTURE.values()), 1536)
    p = made(training, TPU, devices=1536, tensor=16)
    check = report.paper_check(p, 15)
    for row in check["at"]:
        assert row["off"] == pytest.approx(row["days"] / 15 - 1)
    at = replace(p, training=replace(training, utilisation=check["needs"]))
    assert at.days() == pytest.approx(15)
    days = [row["days"] for row in check["at"]]
    assert days == sorted(days, reverse=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(16, 3), r"devices must be a multiple of tensor \* pipeline, got 16 and 3 "),
        (lambda: Layout(0), "devices must be at least 1, got 0"),
        (lambda: Layout(sharding="zero3"), "sharding must be one of none, zero1, fsdp2, got 'ze"),
        (lambda: Sequence(0, 1), "tokens must be at least 1, got 0"),
        (lambda: Sequence(1, -1), "images must be at least 0, got -1"),
        (lambda: Training(()), "sequences must hold those of a data set, got none"),
        (lambda: Training(utilisation=0.0), "utilisation must be above 0, got 0"),
        (lambda: Training(precision="fp8"), "precision must be one of bf16, fp32, got 'fp8'"),
        (lambda: made(devices=32, tensor=32), "must divide the resampler's 16 heads, got 32"),
        (lambda: made(devices=3, pipeline=3), "pipeline must divide 80 blocks, got 3"),
        (lambda: made(devices=3), r"a multiple of .* micro_batch, got 256 and 3 \* 1"),
        (lambda: made(config=replace(CONFIG, resampler="mlp")), "the paper's kind .* = mlp"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
