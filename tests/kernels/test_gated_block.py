"""The functional GATED XATTN-DENSE against the NumPy module, and the paper's promises."""

import numpy as np
import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

import torch

from miniflamingo import functional, xattn
from miniflamingo.autograd import Tape
from miniflamingo.kernels import gated_linear, squared_relu_linear
from miniflamingo.kernels.common.runtime import INTERPRET, replaced
from miniflamingo.kernels.image_causal_attention import build_work_list
from miniflamingo.kernels.model import gated_block
from miniflamingo.kernels.tools import bench_entries, peers

interpreted = pytest.mark.skipif(not INTERPRET.value, reason="float64 is the interpreter's alone")
PHI = np.array([[0, 0, 1, 1, 2, 2, 3], [0, 2, 2, 2, 2, 3, 1]])
HEADS = (2, 8)


def draw(skip_without_image=False, gates=(0.7, -0.4)):
    """A NumPy module in float64, and y [2, 7, 20], media [2, 3, 5, 12]."""
    rng = np.random.default_rng(0)
    module = xattn.GatedCrossAttentionDense(
        20, 12, *HEADS, skip_without_image=skip_without_image, rng=rng
    )
    state = {name: rng.normal(x, 0.1) for name, x in module.state_dict().items()}
    state |= {"alpha_xattn": np.array(gates[0]), "alpha_dense": np.array(gates[1])}
    for name, parameter in module.named_parameters():
        parameter.data = state[name]
    return module, rng.normal(size=(2, 7, 20)), rng.normal(size=(2, 3, 5, 12))


def tensors(*arrays):
    return [torch.from_numpy(np.array(x)).requires_grad_() for x in arrays]


def weights_of(module):
    return dict(zip(module.state_dict(), tensors(*module.state_dict().values())))


def run(weights, y, media, phi=PHI, **options):
    """The block -> [B, L, D]."""
    keys_values = gated_block.project_media(media, weights, HEADS)
    return gated_block.gated_xattn_dense(y, keys_values, torch.from_numpy(phi), weights, **options)


@interpreted
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_it_is_the_numpy_module_in_value_and_gradient(fused, skip):
    module, y, media = draw(skip)
    dout = np.random.default_rng(1).normal(size=y.shape)
    with Tape() as tape:
        expected = module(y, media, PHI)
        loss = functional.total(expected * dout)
    tape.backward(loss)
    weights = weights_of(module)
    out = run(weights, *tensors(y, media), fused=fused, skip_without_image=skip)
    np.testing.assert_allclose(out.detach(), expected.data, rtol=1e-10, atol=1e-12)
    out.backward(torch.from_numpy(dout))
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(
            weights[name].grad, parameter.grad, rtol=1e-8, atol=1e-11, err_msg=name
        )


@interpreted
@pytest.mark.parametrize("fused", [True, False])
def test_the_inputs_gradients(fused):
    module, y, media = draw()
    weights = {name: x.detach() for name, x in weights_of(module).items()}
    block = lambda y, media: run(weights, y, media, fused=fused)  # noqa: E731
    assert torch.autograd.gradcheck(block, tensors(y, media), fast_mode=True)


def low(module, y, media, dtype, device):
    """The same as tensors of a dtype on a device."""
    weights = {n: x.detach().to(device, dtype) for n, x in weights_of(module).items()}
    return weights, *(x.detach().to(device, dtype) for x in tensors(y, media))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_shut_gates_return_y_bit_for_bit(fused, dtype, device):
    weights, y, media = low(*draw(gates=(0.0, 0.0)), dtype, device)
    out = run_on(device, weights, y, media, fused)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits), y.view(bits))


def run_on(device, weights, y, media, fused, **options):
    keys_values = gated_block.project_media(media, weights, HEADS)
    phi = torch.from_numpy(PHI).to(device)
    return gated_block.gated_xattn_dense(y, keys_values, phi, weights, fused=fused, **options)


@pytest.mark.parametrize("fused", [True, False])
def test_low_precision_is_as_near_as_plain_torch(fused, device):
    module, y, media = draw()
    weights, y, media = low(module, y, media, torch.bfloat16, device)
    shape, phi = dict(H=HEADS[0], K=HEADS[1]), torch.from_numpy(PHI).to(device)
    ordered = [weights[name] for name in peers.BLOCK_NAMES]
    exact = [x.double() for x in (y, media, *ordered)]
    expected = peers.reference_block(shape)(*exact[:2], phi, *exact[2:])
    plain = peers.reference_block(shape)(y, media, phi, *ordered).double()
    out = run_on(device, weights, y, media, fused).double()
    assert (out - expected).norm() <= 2 * (plain - expected).norm()


def test_a_token_without_an_image_is_left_alone(device):
    weights, y, media = low(*draw(), torch.float32, device)
    out = run_on(device, weights, y, media, None, skip_without_image=True)
    none = torch.from_numpy(PHI == 0).to(device)
    assert torch.equal(out[none], y[none]) and (out[~none] != y[~none]).any(-1).all()
    assert (run_on(device, weights, y, media, None)[none] != y[none]).any()  # the dense branch


def test_layers_share_a_work_list(device):
    weights, y, media = low(*draw(), torch.float32, device)
    work = build_work_list(torch.from_numpy(PHI).to(device), 3, heads=2)
    expected = run_on(device, weights, y, media, True)
    assert torch.equal(run_on(device, weights, y, media, True, work=work), expected)


def test_each_product_is_chosen_by_its_own_inputs(device, monkeypatch):
    weights, y, media = low(*draw(), torch.float32, device)
    launched = []
    monkeypatch.setattr(gated_linear, "FUSED_UP_TO", 16)  # H*K = 16, 4D = 80
    monkeypatch.setattr(squared_relu_linear, "FUSED_UP_TO", 20)  # D = 20
    with replaced(launch=lambda kernel, *args, **options: launched.append(kernel.__name__)):
        run_on(device, weights, y, media, None)
    assert launched.count("_gated_linear") == 1 and "_squared_relu_linear" in launched


def test_the_names_are_those_of_the_modules():
    names = {*gated_block.MEDIA_WEIGHTS, *gated_block.TEXT_WEIGHTS}
    assert names == set(peers.BLOCK_NAMES) == set(draw()[0].state_dict())


def test_the_benchmark_times_it():
    entry = next(e for e in bench_entries.ENTRIES if e.name == "gated_xattn_dense")
    names = {i.name for i in entry.implementations(entry.shapes["cuda"][0]) if i.is_kernel}
    assert names >= {"fused products", "fused, products as chosen"}


@interpreted
def test_value_errors_quote_expected_and_got():
    weights, y, media = low(*draw(), torch.float32, "cpu")
    keys_values, phi = gated_block.project_media(media, weights, HEADS), torch.from_numpy(PHI)
    block = gated_block.gated_xattn_dense
    with pytest.raises(ValueError, match=r"\[B, L, 20\], got float32 \[7, 20\]"):
        block(y[0], keys_values, phi, weights)
    with pytest.raises(ValueError, match=r"H\*K = 16, got float32 \[2, 3, 5, 2, 4\]"):
        block(y, [x[..., :4] for x in keys_values], phi, weights)
    with pytest.raises(ValueError, match=r"0\.\.3.*got 0\.\.4"):
        block(y, keys_values, phi + (phi == 3), weights)
    with pytest.raises(ValueError, match=r"missing: norm\.bias, alpha_dense"):
        some = {n: x for n, x in weights.items() if n not in ("norm.bias", "alpha_dense")}
        block(y, keys_values, phi, some)
    with pytest.raises(ValueError, match=r"\[H\*K, D_m\] = \[24, 12\], got \[16, 12\]"):
        gated_block.project_media(media, weights, (3, 8))
