"""What hypothesis draws: texts for the tokenizer, shapes and arguments for the fused operators.

A case is a seed, from which hypothesis draws some examples; a failing one is made small.
"""

import dataclasses
import json
from collections import Counter

import hypothesis
import numpy as np
from hypothesis import strategies as st

from miniflamingo.prompt import SPECIAL_TOKENS, WordTokenizer, build_batch, split_words
from miniflamingo.worlds.grammar import TOKENIZER


def draw_seed(rng, corpus):
    """A seed for hypothesis."""
    return {"seed": int(rng.integers(2**31))}


OPTIONS = dict(database=None, deadline=None, derandomize=False,
               suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
AS_DRAWN = (hypothesis.Phase.generate,)  # where making it small would take minutes


def examples(count, phases=tuple(hypothesis.Phase), **strategies):
    """Make an act of a check: `count` examples, each a ValueError of one line or right."""

    def decorate(check):
        def act(case):
            counts = Counter()

            @hypothesis.seed(case["seed"])
            @hypothesis.settings(max_examples=count, phases=phases, **OPTIONS)
            @hypothesis.given(**strategies)
            def once(**drawn):
                try:
                    check(**drawn)
                    counts["accepted"] += 1
                except ValueError as error:
                    assert "\n" not in str(error), error
                    counts["refused"] += 1

            once()
            print(json.dumps(counts))

        return act

    return decorate


# --- texts ----------------------------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=()), max_size=30)  # surrogates too
ODD = ["<", "<x>", "\u202e", "e\u0301", "\0", "\x85"]
PIECES = st.sampled_from([*SPECIAL_TOKENS, *TOKENIZER.words, *ODD])
TEXTS = st.one_of(ANY, st.lists(PIECES, max_size=12).map(" ".join), st.lists(PIECES).map("".join))


@examples(60, text=TEXTS, others=st.lists(TEXTS, max_size=3))
def act_text(text, others):
    """A tokenizer made of some texts reads them, in a batch too; the world's may refuse them."""
    own = WordTokenizer.from_texts([text, *others])
    try:
        ids = own.encode(text)
        assert own.encode(own.decode(ids)) == [i for i in ids if i != 0]
    except ValueError as error:
        raise AssertionError("it refuses its own text") from error
    assert [own.words[i] for i in ids] == split_words(text)
    for tokenizer in (own, TOKENIZER):
        batch = build_batch([[text, *others], others], tokenizer, 24)
        assert batch.tokens.max() < len(tokenizer) and (batch.phi == 0).all()


# --- kernels --------------------------------------------------------------------------------------


@st.composite
def comparisons(draw):
    """A kernel beside its twin, at a random shape and dtype."""
    from miniflamingo.kernels.tools import compare, twins

    size, strided = lambda: draw(st.integers(1, 40)), draw(st.booleans())
    heads = dict(R=size(), H=draw(st.integers(1, 2)), K=size(), strided=strided)
    N, leading = draw(st.integers(1, 3)), draw(st.sampled_from([(3,), (2, 5), (1, 1)]))
    phi = draw(st.lists(st.integers(0, N), min_size=6, max_size=6))
    D, other = size(), size()
    cases = {
        "image_causal_attention": lambda: compare.attention_case([phi[:3], phi[3:]], N=N, **heads),
        "resampler_attention": lambda: twins.resampler_case(*phi[:3], **heads),
        "decode_attention": lambda: twins.decode_case(*phi, N=N, **heads),
        "gated_linear": lambda: twins.gated_case(*leading, D=D, I=other, strided=strided),
    }
    kernel, dtype = (draw(st.sampled_from(list(x))) for x in (compare.KERNELS, compare.DTYPES))
    return dataclasses.replace(kernel, cases={"drawn": cases[kernel.name]()}), dtype


@examples(4, AS_DRAWN, drawn=comparisons())
def act_kernel(drawn):
    """The kernel's error is within the bound that `compare` sets."""
    from miniflamingo.kernels.tools import compare

    kernel, dtype = drawn
    for record in compare.compare(kernel, "drawn", dtype, "cpu"):
        assert record.ok, record


def attention_arguments(rng, B=1, L=5, N=3, R=4, H=1, K=16):
    """q, k, v, phi as arrays; nobody looks at the last image."""
    q, k, v = (rng.normal(size=s) for s in ((B, L, H, K), (B, N, R, H, K), (B, N, R, H, K)))
    return q.astype("f4"), k.astype("f4"), v.astype("f4"), rng.integers(0, N, (B, L))


def gapped(x):
    """The same values as a tensor of a larger memory, whose gaps hold NaN."""
    import torch

    room = torch.full((*x.shape[:-1], 3, x.shape[-1]), torch.nan)
    room[..., 1, :] = torch.from_numpy(x)
    return room[..., 1, :]


POISON = st.sampled_from([np.nan, np.inf, -np.inf])


@examples(3, AS_DRAWN, seed=st.integers(0, 2**31), poison=POISON)
def act_unseen(seed, poison):
    """NaN or infinity in an image that nobody sees, and in memory's gaps, changes nothing."""
    import torch

    from miniflamingo import xattn
    from miniflamingo.kernels.image_causal_attention import image_causal_attention
    from miniflamingo.kernels.model.layers import dense_image_causal_attention

    q, k, v, phi = attention_arguments(np.random.default_rng(seed))
    expected = xattn.image_causal_attention(q, k, v, phi)
    k[:, -1] = v[:, -1] = poison
    with np.errstate(all="ignore"):
        grads = xattn.image_causal_attention_backward(np.ones_like(q), q, k, v, phi)
        np.testing.assert_array_equal(xattn.image_causal_attention(q, k, v, phi), expected)
    assert all(np.isfinite(grad).all() for grad in grads), "numpy: gradient"
    for attend in (image_causal_attention, dense_image_causal_attention):
        tensors = [gapped(x).requires_grad_() for x in (q, k, v)]
        out = attend(*tensors, torch.from_numpy(phi))
        np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        out.sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in tensors), f"{attend.__name__}: gradient"


@examples(3, AS_DRAWN, seed=st.integers(0, 2**31), poison=POISON)
def act_padding(seed, poison):
    """NaN or infinity in padded frames changes nothing that the resampler makes of the others."""
    import torch

    from miniflamingo.kernels.model.layers import PerceiverResampler as Torch
    from miniflamingo.perceiver import PerceiverResampler

    rng = np.random.default_rng(seed)
    sizes = dict(input_dim=8, dim=16, num_latents=2, depth=1, heads=1, head_dim=16)
    ours, theirs = PerceiverResampler(**sizes, rng=rng).astype("f4"), Torch(**sizes)
    state = {n: torch.from_numpy(np.array(x)) for n, x in ours.state_dict().items()}
    theirs.load_state_dict(state)
    features = rng.normal(size=(1, 1, 3, 2, 8)).astype("f4")  # [B, N, T, S, D_v]
    frames = np.array([[int(rng.integers(1, 3))]])
    expected = ours(features, frames)
    features[0, 0, frames[0, 0] :] = poison
    np.testing.assert_array_equal(ours(features, frames), expected)
    for backend in ("fused", "torch"):
        x = torch.from_numpy(features.copy()).requires_grad_()
        out = theirs(x, frames, backend)
        np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        out.sum().backward()
        grads = [x.grad, *(p.grad for p in theirs.parameters() if p.grad is not None)]
        assert all(torch.isfinite(grad).all() for grad in grads), f"{backend}: gradient"


def _other(kind):
    import torch

    from miniflamingo.kernels.common.work_list import build_work_list

    return {
        "another phi's work": lambda a: a | {"work": build_work_list((a["phi"] + 1) % 4, 3, 1)},
        "phi too large": lambda a: a | {"phi": a["phi"] + 4},
        "phi below 0": lambda a: a | {"phi": a["phi"] - 4},
        "phi of floats": lambda a: a | {"phi": a["phi"].float()},
        "phi too short": lambda a: a | {"phi": a["phi"][:, 1:]},
        "q of another dtype": lambda a: a | {"q": a["q"].half()},
        "integers": lambda a: {n: x.int() for n, x in a.items()},
        "v of another shape": lambda a: a | {"v": a["v"][:, :, 1:]},
        "no heads in q": lambda a: a | {"q": a["q"][:, :, 0]},
        "R too large": lambda a: a | {n: torch.zeros(1, 3, 257, 1, 16) for n in "kv"},
    }[kind]  # fmt: skip


WRONG = ["another phi's work", "phi too large", "phi below 0", "phi of floats", "phi too short",
         "q of another dtype", "integers", "v of another shape", "no heads in q",
         "R too large"]  # fmt: skip


@examples(8, AS_DRAWN, seed=st.integers(0, 2**31), wrong=st.sampled_from(WRONG))
def act_arguments(seed, wrong):
    """Arguments that do not fit are refused."""
    import torch

    from miniflamingo.kernels.image_causal_attention import image_causal_attention

    values = map(torch.from_numpy, attention_arguments(np.random.default_rng(seed)))
    arguments = _other(wrong)(dict(zip(("q", "k", "v", "phi"), values)))
    image_causal_attention(**arguments)
    raise AssertionError(f"taken as it was: {wrong}")
