"""What torch's function transforms may do with the fused operators: what is right, or an error."""

import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

import torch
from torch.autograd import forward_ad

from miniflamingo.kernels.common.runtime import INTERPRET
from miniflamingo.kernels.decode_attention import decode_attention
from miniflamingo.kernels.gated_linear import gated_linear, gated_linear_backward
from miniflamingo.kernels.image_causal_attention import (
    image_causal_attention,
    image_causal_attention_backward,
)
from miniflamingo.kernels.resampler_attention import (
    padded_resampler_attention,
    resampler_attention,
    resampler_attention_backward,
)

if not INTERPRET.value:
    pytest.skip("rules of torch, checked with the interpreter alone", allow_module_level=True)

PHI, OFFSETS = torch.tensor([[0, 1, 2]]), torch.tensor([0, 3])
text, media, latents, features = (1, 3, 2, 4), (1, 2, 3, 2, 4), (1, 2, 2, 4), (3, 2, 4)
OPERATORS = {
    "image_causal_attention": (
        lambda q, k, v: image_causal_attention(q, k, v, PHI), (text, media, media),
    ),
    "resampler_attention": (
        lambda *args: resampler_attention(*args, OFFSETS),
        (latents, features, features, latents, latents),
    ),
    "padded_resampler_attention": (
        padded_resampler_attention, (latents, (1, 3, 2, 4), (1, 3, 2, 4), latents, latents),
    ),
    "decode_attention": (
        lambda q, k, v: decode_attention(q, k, v, PHI[0, 1:2]), ((1, 2, 4), media, media),
    ),
    "gated_linear": (gated_linear, ((3, 4), (3, 5), (), (4, 5))),
}  # fmt: skip
LISTS = {"work_list", "feature_list"}  # of integers, which have no derivatives
COMPOSED = ("padded_resampler_attention", "gated_xattn_dense", "project_media")
BACKWARDS = {
    "image_causal_attention_backward": (
        lambda *args: image_causal_attention_backward(*args, PHI)[0], (text, text, media, media),
    ),
    "resampler_attention_backward": (
        lambda *args: resampler_attention_backward(*args, OFFSETS)[0],
        (latents, latents, features, features, latents, latents),
    ),
    "gated_linear_backward": (
        lambda *args: gated_linear_backward(*args)[1], ((3, 4), (3, 4), (3, 5), (), (4, 5)),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", OPERATORS)


def drawn(name):
    torch.manual_seed(0)
    function, shapes = (OPERATORS | BACKWARDS)[name]
    return function, tuple(torch.randn(shape) for shape in shapes)


def duals(f, args, which, requires_grad=False):
    with forward_ad.dual_level():
        args = [x.requires_grad_(requires_grad) for x in args]
        f(*(forward_ad.make_dual(x, x.detach()) if i == which else x for i, x in enumerate(args)))


def nested(f, args):
    """A derivative of the first argument, in the middle of one of the second's."""
    first = lambda x: torch.func.jvp(lambda y: y * f(x, *args[1:]).sum(), (x,), (x,))[1]  # noqa: E731
    torch.func.jvp(first, args[:1], args[:1])


def compiled(f, args):
    torch.compiler.reset()
    torch.compile(lambda *args: torch.func.jvp(f, args, args), backend="aot_eager")(*args)


FORWARD_MODE = {
    "dual tensors": lambda f, args: [duals(f, args, which=0)],
    "dual tensors with gradients": lambda f, args: duals(f, args, 0, requires_grad=True),
    "a dual in the last place": lambda f, args: duals(f, args, len(args) - 1),
    "jvp": lambda f, args: torch.func.jvp(f, args, args),
    "jacfwd": lambda f, args: torch.func.jacfwd(f)(*args),
    "jvp of vmap": lambda f, args: torch.func.jvp(
        torch.func.vmap(f), *[tuple(x[None] for x in args)] * 2
    ),
    "vmap of jvp": lambda f, args: torch.func.vmap(lambda *args: torch.func.jvp(f, args, args))(
        *(x[None] for x in args)
    ),
    "nested": nested,
    "hessian": lambda f, args: torch.func.hessian(lambda *args: f(*args).sum())(*args),
}


@pytest.mark.parametrize("way", FORWARD_MODE)
@pytest.mark.parametrize("name", [*OPERATORS, *BACKWARDS])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_forward_mode_is_an_error(name, way):
    with pytest.raises(RuntimeError, match=r"has no forward-mode derivative|must override|jvp"):
        FORWARD_MODE[way](*drawn(name))


@pytest.mark.parametrize("name", ["image_causal_attention", "gated_linear"])
def test_forward_mode_inside_a_compiled_function_is_an_error(name):
    with pytest.raises(Exception, match="forward-mode"):
        compiled(*drawn(name))


# the others make tensors of their own on the way, which jvp wraps as if they might have tangents
@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in COMPOSED])
def test_a_constant_beside_a_tangent_is_no_error(name):
    f, args = drawn(name)
    x, expected = torch.ones(()), f(*args)
    _, tangent = torch.func.jvp(lambda x: x * f(*args), (x,), (x,))
    assert torch.equal(tangent, expected)


@each
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_right(name):
    f, args = drawn(name)
    out = torch.func.vmap(f)(*(torch.stack([x, 2 * x]) for x in args))
    torch.testing.assert_close(out, torch.stack([f(*args), f(*(2 * x for x in args))]))


@each
def test_a_derivative_of_a_derivative_is_an_error(name):
    f, args = drawn(name)
    leaves = [x.requires_grad_() for x in args]
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grads = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(x.square().sum() for x in grads), leaves)


@each
def test_func_grad_is_an_error_where_it_is_not_right(name):
    f, args = drawn(name)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda *args: f(*args).square().sum())(*args)


def test_every_operator_is_tried():
    names = torch._C._dispatch_get_all_op_names()
    registered = {n.split("::")[1] for n in names if n.startswith("miniflamingo::")}
    registered = {n for n in registered if not n.startswith("broken_")}  # other tests' copies
    tried = {name.split(",")[0] for name in OPERATORS | BACKWARDS}
    assert registered - LISTS == tried - set(COMPOSED)
    assert registered >= LISTS
