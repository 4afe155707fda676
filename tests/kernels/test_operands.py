"""On a CPU in 16 bits torch's own products get matrices without gaps: see operands.py."""

import pytest

torch = pytest.importorskip("torch")

from torch._library.custom_ops import OPDEFS  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from miniflamingo.kernels import unavailable  # noqa: E402
from miniflamingo.kernels.common.operands import packed  # noqa: E402
from miniflamingo.kernels.model import layers  # noqa: E402

needs_triton = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "scaled_dot_product")


def has_gaps(x):
    """Whether memory lies between the numbers of x that is none of them."""
    needed = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return 0 not in x.stride() and needed > x.numel()


class OldOneDNN(TorchDispatchMode):
    """The worst of oneDNN's issue 5717: a product of a 16-bit matrix with gaps is NaN."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "miniflamingo":  # an operator: look inside
            body = OPDEFS[f"miniflamingo::{function.overloadpacket.__name__}"]._init_fn
            with self:
                return body(*args)
        out = function(*args, **(kwargs or {}))
        if not any(name in function.overloadpacket.__name__ for name in PRODUCTS):
            return out
        OldOneDNN.products += 1
        operands = [x for x in args if isinstance(x, torch.Tensor) and x.itemsize == 2]
        if any(has_gaps(x) for x in operands):
            (out if isinstance(out, torch.Tensor) else out[0]).fill_(torch.nan)
        return out


def gapped(x):
    """x, with NaN between its rows (and, for a vector or a scalar, x)."""
    if x.ndim < 2:
        return x
    return torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[-1]]


def run(function, *args, gaps, gaps_in_dout):
    leaves = [(gapped(x) if gaps else x).detach() for x in args]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in leaves]
    OldOneDNN.products = 0
    with OldOneDNN():
        out = function(*leaves)
        dout = torch.ones_like(out)
        wanted = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad(out, wanted, gapped(dout) if gaps_in_dout else dout)
    assert OldOneDNN.products
    return [out, *grads]


def products():
    """name -> a function and its arguments, with lengths that are no multiple of 32."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape) * 0.5  # noqa: E731
    phi = torch.tensor([[0, 1, 1, 2], [2, 0, 1, 1]])
    layer = layers.GatedCrossAttentionDense(33, 35, 2, 9).bfloat16()
    resampler = layers.PerceiverResampler(33, 35, 5, 1, 2, 9).bfloat16()
    q, k, v = draw(2, 4, 2, 9), draw(2, 2, 3, 2, 9), draw(2, 2, 3, 2, 9)
    yield "attend", lambda q, k, v: layers.attend(q, k[:, 0], v[:, 0]), (q, k, v)
    yield "dense", lambda *x: layers.dense_image_causal_attention(*x, phi), (q, k, v)
    gate = draw(3, 35), torch.tensor(0.5), draw(3, 33), draw(35, 33)
    yield "gated_add", layers.gated_add, gate
    for backend in ("torch", "fused"):
        run_layer = lambda y, m, b=backend: layer(y, m, phi, b)  # noqa: E731
        yield f"layer, {backend}", run_layer, (draw(2, 4, 33), draw(2, 2, 3, 35))
        run_resampler = lambda x, b=backend: resampler(x, None, b)  # noqa: E731
        yield f"resampler, {backend}", run_resampler, (draw(1, 2, 2, 3, 33),)
    if unavailable():
        return
    from miniflamingo.kernels.gated_linear import gated_linear

    y, alpha, a, weight = gate
    yield "gated_linear", gated_linear, (y, a, alpha, weight)


CASES = {name: case for name, *case in products()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_no_product_sees_a_gap(name, dtype):
    if unavailable() and "fused" in name:
        pytest.skip(unavailable())
    function, args = CASES[name]
    if dtype == torch.float16 and ("layer" in name or "resampler" in name):
        pytest.skip("the modules of this test are bfloat16")
    args = [x.to(dtype) for x in args]
    # what reaches plain torch's own backward comes from autograd, and is contiguous
    own = name == "gated_linear"
    expected = run(function, *args, gaps=False, gaps_in_dout=False)
    ours = run(function, *args, gaps=True, gaps_in_dout=own)
    for x, y in zip(ours, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)


def test_the_mode_shows_a_gap():
    x = gapped(torch.ones(3, 33, dtype=torch.bfloat16))
    with OldOneDNN():
        assert (x @ x.mT).isnan().all() and not (packed(x) @ packed(x).mT).isnan().any()


def test_only_what_needs_it_is_copied():
    x = torch.ones(3, 33, dtype=torch.bfloat16)
    assert packed(x) is x and packed(gapped(x.float())).stride() == (66, 1)
    elsewhere = torch.empty_strided((3, 33), (66, 1), dtype=torch.bfloat16, device="meta")
    assert packed(elsewhere) is elsewhere
