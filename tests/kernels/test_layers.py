"""The torch twins: the NumPy model's weights under the same names, and the same numbers."""

import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from miniflamingo import Flamingo, FlamingoConfig  # noqa: E402
from miniflamingo.kernels.model import layers  # noqa: E402
from tests.models import batch_of, tiny  # noqa: E402

IMAGE = FlamingoConfig().image_token
CHANGES = {
    "plain": {},
    "own <EOC>": {"train_eoc": True},
    "all previous images": {"only_last": False},
    "every other layer": {"xattn_every": 2},
    "no spatial embeddings": {"spatial_embeddings": False},
    "skipped without an image": {"skip_without_image": True},
}


def open_model(dtype, **changes):
    """A mini Flamingo with open gates, and a ragged batch: rows with 3, 2 and 0 images."""
    rng = np.random.default_rng(0)
    model = Flamingo(FlamingoConfig.preset("mini", **changes), rng=rng).astype(dtype)
    for layer in model.gated_xattn:
        layer.alpha_xattn.data, layer.alpha_dense.data = np.array([0.5, -0.7], dtype)
    tokens = rng.integers(4, 100, (3, 20))
    tokens[:2, [2, 9]], tokens[0, 10] = IMAGE, IMAGE
    pixels = rng.random((3, 3, 2, 24, 24, 3)).astype(dtype)
    sizes = {
        "num_images": np.array([3, 2, 0]),
        "num_frames": np.array([[1, 2, 2], [2, 1, 0], [0] * 3]),
    }
    return model, tokens, pixels, sizes


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-4)])
def test_one_checkpoint_gives_the_same_logits_on_both_sides(changes, dtype, tolerance):
    model, tokens, pixels, sizes = open_model(dtype, **changes)
    expected = model(tokens, pixels, **sizes)
    twin = layers.Flamingo.from_numpy(model)
    logits = twin(torch.from_numpy(tokens), torch.from_numpy(pixels), **sizes).detach().numpy()
    assert logits.dtype == dtype
    assert abs(logits - expected).max() <= tolerance * abs(expected).max()


def test_a_checkpoint_goes_there_and_back_unchanged():
    model, *_ = open_model(np.float32)
    twin = layers.Flamingo.from_numpy(model)
    state, back = model.state_dict(), twin.to_numpy()
    assert set(state) == set(back)
    assert all(np.array_equal(state[name], back[name]) for name in state)
    frozen = {name for name, p in twin.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_gradients_equal_the_hand_derived_ones():
    from miniflamingo.autograd import Tape
    from miniflamingo.functional import cross_entropy

    model, tokens, pixels, sizes = open_model(np.float64, train_eoc=True)
    with Tape() as tape:
        loss = cross_entropy(model(tokens, pixels, **sizes), tokens)
    tape.backward(loss)
    twin = layers.Flamingo.from_numpy(model)
    logits = twin(torch.from_numpy(tokens), torch.from_numpy(pixels), **sizes)
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(tokens).flatten()
    ).backward()
    own = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            np.testing.assert_allclose(
                own[name].grad, parameter.grad, rtol=1e-8, atol=1e-12, err_msg=name
            )


def test_the_fused_backend_gives_the_same_logits_and_gradients():
    pytest.importorskip("triton")
    model, tokens, pixels, sizes = open_model(np.float64, resampler_depth=1, resampler_heads=2)
    twin, results = layers.Flamingo.from_numpy(model), {}
    for backend in ("torch", "fused"):
        twin.zero_grad()
        logits = twin(torch.from_numpy(tokens), torch.from_numpy(pixels), **sizes, backend=backend)
        logits.square().mean().backward()
        grads = [p.grad for p in twin.parameters() if p.requires_grad]
        results[backend] = [logits.detach(), *grads]
    for plain, fused in zip(results["torch"], results["fused"], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_fused_resampler_gives_the_same_tokens_and_gradients(ragged):
    pytest.importorskip("triton")
    resampler = layers.PerceiverResampler(5, 8, 3, 2, 2, 4, num_features=3).double()
    features = torch.randn(2, 2, 2, 3, 5, dtype=torch.float64)
    num_frames, results = np.array([[1, 2], [2, 0]]) if ragged else None, {}
    for backend in layers.BACKENDS:
        x = features.clone().requires_grad_()
        resampler.zero_grad()
        out = resampler(x, num_frames, backend)
        out.square().mean().backward()
        results[backend] = [out.detach(), x.grad, *(p.grad for p in resampler.parameters())]
    for plain, fused in zip(results["torch"], results["fused"], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


def test_the_fused_resampler_joins_nothing(monkeypatch):
    pytest.importorskip("triton")
    layer = layers.PerceiverLayer(8, 2, 4)
    latents, inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    expected = layer(latents, inputs)
    monkeypatch.setattr(torch, "cat", lambda *args, **options: pytest.fail("concatenated"))
    torch.testing.assert_close(layer(latents, inputs, backend="fused"), expected)


def test_a_phi_that_no_image_has_counts_as_none():
    q, phi = torch.randn(1, 2, 2, 8), torch.tensor([[0, 3]])
    k, v = torch.randn(2, 1, 2, 3, 2, 8)
    assert (layers.dense_image_causal_attention(q, k, v, phi) == 0).all()
    assert (layers.dense_image_causal_attention(q, k[:, :0], v[:, :0], phi * 0) == 0).all()


def test_a_row_without_images_stays_finite_and_untouched():
    q, phi = torch.randn(1, 5, 2, 8, requires_grad=True), torch.zeros(1, 5, dtype=torch.int32)
    k, v = torch.randn(2, 1, 2, 3, 2, 8)
    out = layers.dense_image_causal_attention(q, k, v, phi)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


# --- one GATED XATTN-DENSE layer, alone -----------------------------------------------------------

FUSED = pytest.param(
    "fused", marks=pytest.mark.skipif(layers.MISSING is not None, reason=str(layers.MISSING))
)
both = pytest.mark.parametrize("backend", ["torch", FUSED])


def open_layer(dtype=torch.float32, gates=(0.5, -0.7), **options):
    """A layer and its input: y [2, 5, 16], media [2, 3, 4, 12], phi with rows without an image."""
    torch.manual_seed(0)
    layer = layers.GatedCrossAttentionDense(16, 12, 2, 8, **options).to(dtype)
    with torch.no_grad():
        layer.alpha_xattn.fill_(gates[0])
        layer.alpha_dense.fill_(gates[1])
    phi = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 0, 1, 1]])
    return layer, torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 3, 4, 12, dtype=dtype), phi


def run_layer(layer, y, media, phi, backend, call=None, **options):
    """{"out", "y", "media", and the parameters' names: a call's output, and the gradients}."""
    layer.zero_grad()
    y, media = (x.detach().requires_grad_() for x in (y, media))
    out = (layer if call is None else call)(y, media, phi, backend, **options)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "y": y.grad, "media": media.grad, **grads}


@both
@pytest.mark.parametrize("skip", [False, True])
def test_a_layer_alone_has_its_twin_s_output_and_gradients(backend, skip):
    from miniflamingo.autograd import Tape, Tensor
    from miniflamingo.xattn import GatedCrossAttentionDense

    layer, y, media, phi = open_layer(torch.float64, skip_without_image=skip)
    rng = np.random.default_rng(0)
    own = GatedCrossAttentionDense(16, 12, 2, 8, skip_without_image=skip, rng=rng)
    own.astype(np.float64).load_state_dict({n: p.numpy() for n, p in layer.state_dict().items()})
    inputs = [Tensor(y.numpy()), Tensor(media.numpy())]
    with Tape() as tape:
        out = own(*inputs, phi.numpy())
        loss = (out * out).sum()
    tape.backward(loss)
    expected = {"out": out.data, "y": inputs[0].grad, "media": inputs[1].grad}
    expected |= {name: p.grad for name, p in own.named_parameters()}
    ours = run_layer(layer, y, media, phi, backend)
    assert set(ours) == set(expected)
    for name in ours:
        np.testing.assert_allclose(ours[name], expected[name], 1e-10, 1e-12, err_msg=name)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_with_shut_gates_the_output_is_the_input_bit_for_bit(backend, dtype, autocast):
    layer, y, media, phi = open_layer(torch.float32 if autocast else dtype, gates=(0, 0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = run_layer(layer, y.to(dtype), media.to(dtype), phi, backend)
    assert results["out"].dtype == dtype and torch.equal(results["out"], y.to(dtype))
    moved = {name for name, _ in layer.named_parameters() if results[name].any()}
    assert moved == {"alpha_xattn", "alpha_dense"}


def test_the_branches_outputs_are_not_kept_for_the_backward_pass():
    layer, y, media, phi = open_layer()
    branches, kept = [], []
    for projection in (layer.attention.out_proj, layer.ffw.down):
        projection.weight.requires_grad_(False)
    a = layer.attention(layer.norm(y), layer.project_media(media), phi)
    branches = [a, layer.ffw(y + layer.alpha_xattn.tanh() * a)]
    layer.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(y, media, phi)
    assert any(torch.equal(x, y) for x in kept if x.shape == y.shape)  # the norm's input is kept
    for branch in branches:
        assert not any(torch.allclose(x, branch) for x in kept if x.shape == branch.shape)


@both
def test_it_compiles_without_a_graph_break(backend):
    layer, y, media, phi = open_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = run_layer(layer, y, media, phi, backend)
    torch.testing.assert_close(run_layer(layer, y, media, phi, backend, compiled), expected)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", ["float32", "low"])
def test_under_autocast_the_attention_gets_one_dtype(backend, dtype, stream, monkeypatch):
    layer, y, media, phi = open_layer()
    seen, attend = [], layers.dense_image_causal_attention
    if backend == "fused":
        from miniflamingo.kernels import image_causal_attention as module

        attend = module.image_causal_attention
    else:
        module = layers

    def spy(q, k, v, *rest, **options):
        seen.append({q.dtype, k.dtype, v.dtype})
        return attend(q, k, v, *rest, **options)

    monkeypatch.setattr(module, attend.__name__, spy)
    expected = layer(y, media, phi, "torch")
    seen.clear()
    kept = layer.project_media(media)  # float32, as a decoder might have projected them before
    y = y if stream == "float32" else y.to(dtype)
    with torch.autocast("cpu", dtype):
        outputs = [layer(y, media, phi, backend), layer(y, None, phi, backend, keys_values=kept)]
    assert seen == [{dtype}, {dtype}]
    for out in outputs:
        assert out.dtype == y.dtype
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@both
def test_gradient_checkpointing_changes_nothing(backend):
    from torch.utils.checkpoint import checkpoint

    layer, y, media, phi = open_layer()

    def call(*inputs):
        return checkpoint(layer, *inputs, use_reentrant=False)

    expected = run_layer(layer, y, media, phi, backend)
    ours = run_layer(layer, y, media, phi, backend, call)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@both
def test_strides_do_not_matter(backend):
    layer, y, media, phi = open_layer()
    expected = layer(y, media, phi, backend)
    y, media = y.transpose(0, 2).contiguous().transpose(0, 2), media.flip(2).flip(2)
    media = media.transpose(1, 3).contiguous().transpose(1, 3)
    assert not y.is_contiguous() and not media.is_contiguous()
    wide = torch.stack([phi, phi], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(layer(y, media, wide, backend), expected)


@both
def test_projected_media_serve_as_well_and_layers_share_a_work_list(backend):
    layer, y, media, phi = open_layer()
    expected = layer(y, media, phi, backend)
    assert torch.equal(
        layer(y, None, phi, backend, keys_values=layer.project_media(media)), expected
    )
    work = layers.share_work(phi, 3, 2, backend)
    assert (work is None) == (backend == "torch")
    assert torch.equal(layer(y, media, phi, backend, work, check=False), expected)


# --- decoding: one token a row ------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(layers.MISSING is not None, reason=str(layers.MISSING))


def decoding_step(dtype=torch.float32, **options):
    """A layer, y [3, 1, D], the images' keys and values, and phi: none, image 2, image 3."""
    layer, y, media, _ = open_layer(dtype, **options)
    y, media = torch.cat([y, y])[:3, :1], torch.cat([media, media])[:3]
    with torch.no_grad():
        return layer, y, layer.project_media(media), torch.tensor([[0], [2], [3]])


def launches_of(call):
    """(kernel's name, where its tensors lie) of every launch of a call, none of which is made."""
    from miniflamingo.kernels.common.runtime import replaced

    made = []

    def record(kernel, programs, *args, **options):
        made.append((kernel.__name__, [x.data_ptr() for x in args if torch.is_tensor(x)]))

    with replaced(launch=record):
        call()
    return made


@needs_kernels
def test_a_decoded_token_takes_the_kernel_for_one_token_in_the_memory_that_there_is():
    layer, y, kept, phi = decoding_step()
    work = lambda: layers.share_work(phi, 3, 2, "fused")  # noqa: E731
    step = lambda: layer(y, None, phi, "fused", work(), kept, False)  # noqa: E731
    with torch.no_grad():
        first, again = launches_of(step), launches_of(step)
    for ((name, (_, k, v, _, where)),) in (first, again):
        assert name == "_decode"
        assert [k, v, where] == [x.data_ptr() for x in (*kept, phi)]
    # with gradients, with a work list, and for two tokens, it is the other one
    assert [name for name, _ in launches_of(step)] == ["_list_work", "_forward"]
    with torch.no_grad():
        given = layers.share_work(torch.cat([phi, phi], 1), 3, 2, "fused")
        assert len(given.order[0]) == 2
        y, phi = torch.cat([y, y], 1), torch.cat([phi, phi], 1)
        assert [name for name, _ in launches_of(step)] == ["_list_work", "_forward"]


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_a_decoded_token_gets_what_the_kernel_for_many_gives(dtype, tolerance, skip):
    layer, y, kept, phi = decoding_step(dtype, skip_without_image=skip)
    many = layer(y, None, phi, "fused", None, kept).detach()
    plain = layer(y, None, phi, "torch", None, kept).detach()
    with torch.no_grad():
        one = layer(y, None, phi, "fused", None, kept)
        heads = layer.attention.heads_output(layer.norm(y), kept, phi, "fused")
    for expected in (many, plain):
        assert abs(one - expected).max() <= tolerance * abs(expected).max()
    assert (heads[0] == 0).all() and (heads[1:] != 0).any(-1).all()
    unseen = torch.arange(1, 4) != phi
    for x in kept:
        x[unseen] = torch.nan
    with torch.no_grad():
        assert torch.equal(layer(y, None, phi, "fused", None, kept), one)


@needs_kernels
def test_a_step_of_decoding_reads_nothing_on_the_host():
    """As a CUDA graph needs it: with tensors that hold nothing, reading one is an error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException as Read
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as Shaped
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, y, kept, phi = decoding_step(skip_without_image=True)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y, phi, *kept = (mode.from_tensor(x) for x in (y, phi, *kept))
        for read, error in ((phi.tolist, Read), (phi.max().item, Read), (phi.nonzero, Shaped)):
            with pytest.raises(error):
                read()
        work = layers.share_work(phi, 3, 2, "fused")
        assert layer(y, None, phi, "fused", work, kept, False).shape == y.shape


@needs_kernels
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_a_cuda_graph_holds_a_step_of_decoding(device):
    layer, y, kept, phi = decoding_step()
    layer, y, phi, *kept = (x.to(device) for x in (layer, y, phi, *kept))
    step = lambda: layer(y, None, phi, "fused", None, kept, False)  # noqa: E731
    with torch.no_grad():
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for new in ([[0], [2], [3]], [[3], [0], [1]]):
            phi.copy_(torch.tensor(new))
            graph.replay()
            torch.testing.assert_close(out, step())


@pytest.mark.parametrize("bad", (0.0, torch.nan, torch.inf))
def test_few_tokens_are_given_their_own_image_alone(bad):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 3, 5, 6, 4, 8, generator=generator, dtype=torch.float64)
    phi = torch.tensor([[0, 3], [5, 1], [6, -1]])  # 6 and -1: no image has them
    for x in (k, v):
        x[:, 1] = bad  # the second image, which no token looks at
    under_the_mask = layers.dense_image_causal_attention(q.requires_grad_(), k, v, phi)
    with torch.no_grad():
        ours = layers.dense_image_causal_attention(q, k, v, phi)
    assert not under_the_mask[0, 0].any() and not under_the_mask[2].any()
    torch.testing.assert_close(ours, under_the_mask.detach(), rtol=0, atol=1e-14)


@both
def test_an_unchecked_phi_outside_counts_as_none(backend):
    layer, y, media, phi = open_layer(skip_without_image=True)
    wrong = torch.where(phi == 0, torch.tensor([[4], [-1]]), phi)
    expected = layer(y, media, phi, backend)
    assert torch.equal(layer(y, media, wrong, backend, check=False), expected)


@both
def test_without_any_image_every_parameter_still_takes_part(backend):
    layer, y, media, phi = open_layer()
    results = run_layer(layer, y, media[:, :0], phi * 0, backend)
    assert all(x is not None and x.isfinite().all() for x in results.values())


def test_auto_is_plain_torch_on_the_cpu():
    q = torch.zeros(1, 1, 2, 8)
    assert layers.choose_backend("auto", q, 8, 4) == "torch"
    assert layers.share_work(torch.zeros(1, 1, dtype=torch.int32), 1, 2, "auto") is None


def test_fused_without_triton_is_plain_torch_with_one_warning(monkeypatch):
    layer, y, media, phi = open_layer()
    expected = layer(y, media, phi, "torch")
    monkeypatch.setattr(layers, "MISSING", "the kernels need triton, not installed here")
    layers._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="plain torch stands in .* need triton") as caught:
        assert torch.equal(layer(y, media, phi, "fused"), expected)
        assert torch.equal(layer(y, media, phi, "fused"), expected)
    assert len(caught) == 1
    assert layers.share_work(phi, 3, 2, "fused") is None


def train_on_two(rank, folder, backend):
    """One of two processes: the mean gradients under DDP and FSDP2, saved by the first."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    grads = gradients_of_two(rank, backend, dist.init_device_mesh("cpu", (2,)))
    if rank == 0:
        torch.save(grads, f"{folder}/grads")
    gc.collect()  # as in kernels/model/train.py
    dist.barrier()
    dist.destroy_process_group()


def gradients_of_two(rank, backend, mesh):
    """{"ddp NAME", "fsdp NAME": gradient}, of this process's row."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    layer, *inputs = open_layer()
    inputs = [x[rank : rank + 1] for x in inputs]
    ddp = DistributedDataParallel(layer)
    run_layer(layer, *inputs, backend, ddp)
    grads = {f"ddp {n}": p.grad.clone() for n, p in layer.named_parameters()}
    sharded = fully_shard(layers.without_scalars(layer), mesh=mesh)
    run_layer(sharded, *inputs, backend)
    return grads | {f"fsdp {n}": p.grad.full_tensor() for n, p in sharded.named_parameters()}


@both
def test_two_processes_get_the_gradient_of_one(backend, tmp_path):
    torch.multiprocessing.spawn(train_on_two, (str(tmp_path), backend), nprocs=2)
    layer, *inputs = open_layer()
    run_layer(layer, *inputs, "torch")
    grads = torch.load(tmp_path / "grads")
    assert len(grads) == 2 * len(list(layer.parameters()))
    for name, parameter in layer.named_parameters():
        for wrapper in ("ddp", "fsdp"):  # both average over the processes
            ours = 2 * grads[f"{wrapper} {name}"].reshape(parameter.shape)
            torch.testing.assert_close(ours, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_without_scalars_goes_back_to_numpy():
    model, *_ = open_model(np.float32)
    twin = layers.without_scalars(layers.Flamingo.from_numpy(model))
    assert all(p.ndim for p in twin.parameters())
    assert not any(p.requires_grad for p in twin.vision_encoder.parameters())
    before = {name: x.copy() for name, x in model.state_dict().items()}
    model.load_state_dict(twin.to_numpy())
    assert all(np.array_equal(before[name], x) for name, x in model.state_dict().items())


INPUTS = {"y": (1, 2, 8), "media": (1, 1, 3, 6), "phi": torch.ones(1, 2, dtype=torch.int32)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"y": (1, 2, 7)}, r"y must be \[B, L, 8\], got float32 \[1, 2, 7\] on cpu"),
        ({"media": (1, 3, 6)}, r"media must be \[1, N, R, 6\], got float32 \[1, 3, 6\]"),
        ({"media": (2, 1, 3, 6)}, r"media must be \[1, N, R, 6\], got float32 \[2, 1, 3, 6\]"),
        ({"keys_values": [torch.zeros(1, 1, 3, 2, 5)] * 2}, r"keys_values must be .* 2, 4\], got"),
        ({"phi": torch.ones(1, 3)}, r"phi must be int \[B, L\] = \[1, 2\] on cpu, got float32 \["),
        ({"phi": torch.ones(1, 2)}, r"phi must be int .*, got float32 \[1, 2\] on cpu"),
        (
            {"phi": torch.ones(1, 2, dtype=torch.int32, device="meta")},
            r"phi must be int .* on cpu, got int32 \[1, 2\] on meta",
        ),
        ({"phi": torch.full((1, 2), 2)}, r"phi must lie in 0..1 \(N = 1 images\), got 2..2"),
        ({"phi": torch.tensor([[-1, 0]])}, r"phi must lie in 0..1 .*, got -1..0"),
        (
            {"y": torch.zeros(1, 2, 8, dtype=torch.bfloat16)},
            r"y, media and the layer must have one dtype outside torch.autocast, got torch.bf",
        ),
        ({"media": torch.zeros(1, 1, 3, 6, device="meta")}, "on one device, got cpu, meta, cpu"),
        ({"backend": "cuda"}, r"backend must be one of .*'torch', 'fused'.* got 'cuda'"),
    ],
)
def test_bad_input(wrong, message):
    layer = layers.GatedCrossAttentionDense(8, 6, 2, 4)
    inputs = INPUTS | wrong
    inputs |= {n: torch.zeros(x) for n, x in inputs.items() if isinstance(x, tuple)}
    with pytest.raises(ValueError, match=message):
        layer(**inputs)


def test_what_has_no_twin_or_no_kernel():
    layer, *inputs = open_layer(only_last=False)
    with pytest.raises(ValueError, match='no kernel for only_last=False: "torch" or "auto" do'):
        layer(*inputs, backend="fused")
    with pytest.raises(ValueError, match="perceiver resampler, got 'mlp'"):
        layers.Flamingo(FlamingoConfig.preset("mini", resampler="mlp"))


def test_the_resampler_refuses_an_unknown_backend():
    resampler = layers.PerceiverResampler(8, 8, 2, 1, 2, 4)
    with pytest.raises(ValueError, match=r"'torch', 'fused'.* got 'triton'"):
        resampler(torch.randn(1, 1, 1, 3, 8), backend="triton")
    with pytest.raises(ValueError, match=r"'torch', 'fused'.* got 'triton'"):
        resampler.layers[0](torch.randn(1, 2, 8), torch.randn(1, 3, 8), backend="triton")


# --- masked means unseen --------------------------------------------------------------------------

each_bad = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


def equal(ours, expected):
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@both
@each_bad
def test_an_image_that_nobody_looks_at_reaches_nothing(backend, bad):
    layer, y, media, phi = open_layer()
    expected = run_layer(layer, y, media, phi, backend)
    media[1, 1:] = bad  # row 1 looks at image 1 alone
    equal(run_layer(layer, y, media, phi, backend), expected)


@each_bad
def test_nor_where_tokens_look_at_all_previous_images(bad):
    layer, y, media, phi = open_layer(only_last=False)
    expected = run_layer(layer, y, media, phi, "torch")
    media[1, 1:] = bad
    equal(run_layer(layer, y, media, phi, "torch"), expected)


@each_bad
def test_projected_media_of_an_unseen_image_reach_nothing(bad):
    q, (k, v) = torch.randn(1, 4, 2, 8), torch.randn(2, 1, 3, 5, 2, 8)
    phi, results = torch.tensor([[0, 1, 1, 3]]), []
    for value in (1.0, bad):
        k[:, 1], v[:, 1] = value, value
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = layers.dense_image_causal_attention(*inputs, phi)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, clean in zip(results[1], results[0]):
        assert torch.equal(ours, clean)
    assert not results[1][2][:, 1].any() and not results[1][3][:, 1].any()


@each_bad
@pytest.mark.parametrize("only_last", [True, False])
def test_an_image_that_some_look_at_reaches_only_them(bad, only_last):
    q, (k, v) = torch.randn(1, 5, 2, 8), torch.randn(2, 1, 3, 5, 2, 8)
    phi = torch.tensor([[0, 1, 2, 2, 3]])
    expected = layers.dense_image_causal_attention(q, k, v, phi, only_last)
    v[0, 1, 2, 0, 3] = bad
    out = layers.dense_image_causal_attention(q, k, v, phi, only_last)
    reached = (phi[0] == 2) if only_last else (phi[0] >= 2)
    assert torch.equal(out[:, ~reached], expected[:, ~reached])
    assert out[:, reached].isnan().all()


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_a_skipped_token_overflows_to_is_not_seen(backend):
    layer, y, media, phi = open_layer(skip_without_image=True)
    with torch.no_grad():  # the norm gives every token but one of zeros a huge number
        layer.ffw.norm.bias.zero_()
        layer.ffw.norm.weight.fill_(1e30)
    y[phi > 0] = 0
    layer.alpha_xattn.data.zero_()
    results = run_layer(layer, y, media, phi, backend)
    assert torch.equal(results["out"][phi == 0], y[phi == 0])
    assert all(x.isfinite().all() for x in results.values())


@both
@each_bad
def test_padded_frames_reach_nothing(backend, bad):
    resampler = layers.PerceiverResampler(5, 8, 3, 2, 2, 4, num_features=3)
    features, num_frames = torch.randn(2, 2, 2, 3, 5), np.array([[1, 2], [2, 0]])
    padded, results = torch.from_numpy(np.arange(2) >= num_frames[..., None]), []
    for value in (1.0, bad):
        x = torch.where(padded[..., None, None], value, features).requires_grad_()
        resampler.zero_grad()
        out = resampler(x, num_frames, backend)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in resampler.named_parameters()}
        results.append({"out": out.detach(), "features": x.grad, **grads})
    equal(results[1], results[0])


@both
@each_bad
@pytest.mark.parametrize("hidden", ["padded frames", "padded images", "an unseen image"])
def test_what_is_masked_reaches_no_logit_and_no_gradient(backend, bad, hidden):
    batch, sizes, results = batch_of("bI.I", "bI", "b.", images=[2, 1, 0], T=2), {}, []
    twin = layers.Flamingo.from_numpy(tiny(dtype=np.float32))
    tokens, pixels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.pixels).float()
    where = np.arange(2)[:, None] >= batch.num_images[:, None, None]  # padded images
    if hidden == "padded frames":
        sizes["num_frames"] = batch.num_frames
        where = np.arange(2) >= batch.num_frames[..., None]
    if hidden == "an unseen image":
        sizes["phi"] = torch.from_numpy(batch.phi).clamp(max=1)
        where = where | (np.arange(2)[:, None] == 1)
    for value in (0.5, bad):
        twin.zero_grad()
        poisoned = torch.from_numpy(where)[..., None, None, None]
        poisoned = torch.where(poisoned, value, pixels)
        logits = twin(tokens, poisoned, **sizes, backend=backend)
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
        results.append({"logits": logits.detach(), **grads})
    equal(results[1], results[0])


@each_bad
def test_a_later_token_reaches_no_earlier_logit(bad):
    model, tokens, pixels, sizes = open_model(np.float32)
    twin = layers.Flamingo.from_numpy(model)
    tokens[:, 15] = 110  # a word that stands nowhere else
    tokens, pixels = map(torch.from_numpy, (tokens, pixels))
    expected = twin(tokens, pixels, **sizes)
    twin.lm.embedding.weight.data[110] = bad
    logits = twin(tokens, pixels, **sizes)
    assert torch.equal(logits[:, :15], expected[:, :15])
    assert not logits[:, 15:].isfinite().any()


@each_bad
def test_the_padding_of_a_text_reaches_nothing(bad):
    encoder = layers.TextEncoder(9, 8, heads=2, max_positions=6)
    tokens, results = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]]), []
    for value in (1.0, bad):
        encoder.embedding.weight.data[0] = value
        encoder.zero_grad()
        out = encoder(tokens)
        out.square().sum().backward()
        results.append({"out": out.detach(), **{n: p.grad for n, p in encoder.named_parameters()}})
    equal(results[1], results[0])


@pytest.mark.parametrize("y", [-0.0, 0.0, 1.5, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("x, same", [(3.0, True), (-3.0, True), (np.inf, False)])
def test_a_shut_gate_gives_y_where_the_branch_is_finite(y, x, same):
    out = layers.gated_add(*(torch.tensor(z) for z in ([y], 0.0, [x], [[1.0]])))
    assert np.array_equal(out.numpy(), np.float32([y]), equal_nan=True) == (same or np.isnan(y))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_a_token_without_an_image_holds_reaches_nothing(wrong):
    q = torch.randn(1, 4, 2, 16)
    q[:, 0] = wrong
    k, v = torch.randn(2, 1, 2, 3, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = layers.dense_image_causal_attention(*leaves, torch.tensor([[0, 1, 1, 2]]))
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, *(leaf.grad for leaf in leaves)))
