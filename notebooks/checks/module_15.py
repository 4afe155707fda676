"""Checks of module 15: parameters of a block and of the resampler, places, bytes, names."""

import numpy as np

from .core import Wrong, as_array, call, exercise, expect, same

# --- 15.1: a gated block --------------------------------------------------------------------------

BLOCKS = ((24, 10, 3, 5), (8, 14, 2, 4), (2048, 1536, 16, 128))  # D, D_m, H, K


@exercise("15.1")
def gated_block(answer):
    """answer(D, D_m, H, K) -> int[3]: attention, feed-forward, norms and gates."""
    for sizes in BLOCKS:
        right = block_parameters(*sizes)
        mistakes = [
            (message, [*right[:i], wrong, *right[i + 1 :]])
            for i, message, wrong in _block_mistakes(*sizes)
        ]
        expect(call(answer, *sizes), right, [*mistakes, *_block_orders(right)], whole=True)


def block_parameters(D, D_m, H, K):
    """Equation (1), part by part."""
    return np.array([2 * D * H * K + 2 * D_m * H * K, 8 * D * D, 4 * D + 2 * D_m + 2])


def _block_mistakes(D, D_m, H, K):
    """(which of the three, what is wrong, what it gives)."""
    W = H * K
    yield 0, "keys and values are made of visual tokens: their matrices are [H*K, D_m]", 4 * D * W
    yield 0, "queries are made of text, the output too: their matrices are of width D", 4 * D_m * W
    yield 0, "the output's matrix is missing: [D, H*K]", D * W + 2 * D_m * W
    yield 0, "keys and values have a matrix each", 2 * D * W + D_m * W
    yield 0, "H heads of width K: the matrices have H*K rows, not K", 2 * (D + D_m) * K
    yield 0, "H heads of width K: H*K need not be D", 2 * D * D + 2 * D_m * D
    yield 1, "the feed-forward has two matrices, up and down", 4 * D * D
    yield 1, "the feed-forward's hidden width is 4D: 2 * D * 4D", 2 * D * D
    yield 1, "no biases in the feed-forward", 8 * D * D + 5 * D
    yield 1, "squared ReLU has no third matrix (SwiGLU would)", 12 * D * D
    yield 2, "the two gates are missing", 4 * D + 2 * D_m
    yield 2, "two gates: one before each addition, attention and feed-forward", 4 * D + 2 * D_m + 1
    yield 2, "a layer norm has a weight AND a bias: 2 numbers a channel", 2 * D + D_m + 2
    yield 2, "the norm of the visual tokens is missing: 2 * D_m", 4 * D + 2
    yield 2, "the feed-forward has a norm of its own: 2 * D more", 2 * D + 2 * D_m + 2
    yield 2, "keys and values share one norm", 4 * D + 4 * D_m + 2
    yield 2, "the visual tokens' norm has width D_m, not D", 6 * D + 2
    yield 2, "a gate is one number a layer, not one a channel (that is IDEFICS)", 6 * D + 2 * D_m


def _block_orders(right):
    attention, ffw, rest = right
    yield "the order is: attention, feed-forward, norms and gates", [ffw, attention, rest]
    yield "the order is: attention, feed-forward, norms and gates", [rest, ffw, attention]
    yield "three numbers are asked for, this is their sum", right.sum()
    yield "norms and gates are counted, too", right[:2]


# --- 15.2: the resampler --------------------------------------------------------------------------

RESAMPLERS = (
    (np.array([3, 5, 8]), 10, 6, 2, 7, 3, 4),  # widths, D_v, D_m, H, R, T, depth
    (np.array([16, 4]), 5, 12, 3, 2, 8, 2),
)


@exercise("15.2")
def resampler(answer):
    """answer(widths int[W], D_v, D_m, H, R, T, depth) -> int[W]."""
    for case in RESAMPLERS:
        mistakes = _resampler_mistakes(*case)
        expect(call(answer, *case), resampler_parameters(*case), mistakes, whole=True)


def resampler_parameters(widths, D_v, D_m, H, R, T, depth):
    """Equation (3)."""
    layer = 4 * D_m * H * widths + 8 * D_m**2 + 6 * D_m
    return (R + T) * D_m + D_v * D_m + depth * layer + 2 * D_m


def _resampler_mistakes(widths, D_v, D_m, H, R, T, depth):
    right, one = resampler_parameters(widths, D_v, D_m, H, R, T, depth), D_m * H * widths
    yield "the projection from D_v to D_m is missing", right - D_v * D_m
    yield "the projection from D_v to D_m has no bias", right + D_m
    yield "the projection stands before the layers, once", right + (depth - 1) * D_v * D_m
    yield "the latents are missing: R * D_m", right - R * D_m
    yield "the time embeddings are missing: T * D_m", right - T * D_m
    yield (
        "one embedding a frame and one latent a visual token: R + T, not R * T",
        (right + (R * T - R - T) * D_m),
    )
    yield "the last norm is missing: 2 * D_m", right - 2 * D_m
    yield "the last norm stands behind the layers, once", right + (depth - 1) * 2 * D_m
    yield "norms have a weight AND a bias: 6 * D_m a layer", right - (3 * depth + 1) * D_m
    yield "three norms a layer: features, latents, feed-forward", right - depth * 2 * D_m
    yield "the norms of the layers are missing", right - depth * 6 * D_m
    yield "attention has four matrices: the output's is missing", right - depth * one
    yield "the feed-forward of the layers is missing", right - depth * 8 * D_m**2
    yield "the feed-forward has two matrices of 4 * D_m**2", right - depth * 4 * D_m**2
    yield (
        "there are `depth` layers: this counts one",
        (right - (depth - 1) * (4 * one + 8 * D_m**2 + 6 * D_m)),
    )
    yield (
        "keys and values are made AFTER the projection: width D_m, not D_v",
        (right + depth * 2 * (D_v - D_m) * H * widths),
    )
    yield (
        "H heads of width K: the matrices have H * K columns",
        right - depth * 4 * one * (H - 1) // H,
    )
    yield "one number for each head width is wanted, not their sum", right.sum()


# --- 15.3: which layers get a block ---------------------------------------------------------------


@exercise("15.3")
def inserted(answer):
    """answer(depth, every) -> int[blocks]."""
    for depth, every in ((9, 4), (24, 1), (40, 4), (80, 7), (3, 5)):
        right = np.arange(0, depth, every)
        expect(call(answer, depth, every), right, _place_mistakes(depth, every))


def _place_mistakes(depth, every):
    layers = np.arange(depth)
    yield (
        "this is open-flamingo's way, (i + 1) % n == 0: the paper's first block is before layer 0",
        layers[(layers + 1) % every == 0],
    )
    yield "the first block stands before layer 0", np.arange(every, depth, every)
    yield f"there is no layer {depth}: layers are counted from 0", np.arange(0, depth + 1, every)
    yield (
        f"there is no layer {depth}: layers are counted from 0",
        np.arange(every, depth + 1, every),
    )
    yield (
        "the last block is missing: layers / n is rounded UP",
        np.arange(depth // every) * every,
    )
    yield "layers are counted from 0", np.arange(0, depth, every) + 1
    yield (
        "these are the blocks' own numbers: the LM layers are wanted",
        np.arange(-(-depth // every)),
    )
    yield "the layers' numbers are wanted, not a truth for each layer", layers % every == 0
    yield "these are the layers WITHOUT a block", layers[layers % every != 0]


# --- 15.4: bytes a device -------------------------------------------------------------------------


@exercise("15.4")
def bytes_a_device(answer):
    """answer(learns, frozen, unit, devices int[n]) -> float[n]."""
    for case in ((900, 4000, 70, np.array([1, 2, 8])), (5000, 1000, 300, np.array([4, 64]))):
        expect(call(answer, *case), device_bytes(*case), _byte_mistakes(*case))


def device_bytes(learns, frozen, unit, devices):
    """Equation (6)."""
    return (16 * learns + 2 * frozen) / devices + 2 * unit


def _byte_mistakes(learns, frozen, unit, d):
    right = device_bytes(learns, frozen, unit, d)
    yield "the gathered unit is missing: 2 * U, whole on every device", right - 2 * unit
    yield "the gathered unit is not divided by d", right - 2 * unit + 2 * unit / d
    yield "the unit is gathered in bf16: 2 bytes a number", right + 2 * unit
    yield "the unit is in numbers, 2 bytes each", right - unit
    yield "nothing is sharded here: divide by d", 0 * d + 16 * learns + 2 * frozen + 2 * unit
    yield "frozen numbers are sharded, too", 16 * learns / d + 2 * frozen + 2 * unit
    yield "what learns is sharded, too", 16 * learns + 2 * frozen / d + 2 * unit
    yield (
        "frozen numbers have no gradient and no moments: 2 bytes",
        (16 * (learns + frozen) / d + 2 * unit),
    )
    yield "frozen numbers are bf16: 2 bytes, not 4", right + 2 * frozen / d
    yield (
        "12 bytes for what learns: a gradient (4) or a moment (4) is missing",
        (right - 4 * learns / d),
    )
    yield "8 bytes for what learns: Adam has two moments of 4 bytes each", right - 8 * learns / d
    yield (
        "4 bytes for what learns: gradient (4) and moments (8) come on top",
        right - 12 * learns / d,
    )
    yield "14 bytes for what learns: the gradients are float32 here", right - 2 * learns / d
    yield "bytes are wanted, not gigabytes", right / 1e9
    yield "this is the state of all devices together: divide by d", right * d


# --- 15.5: open-flamingo's block under our names --------------------------------------------------


def their_block(D=6, D_m=6, H=2, K=3, seed=0):
    """{name: array} as of an open-flamingo GatedCrossAttentionBlock, random."""
    shapes = {
        "attn.norm.weight": (D,), "attn.norm.bias": (D,), "attn.to_q.weight": (H * K, D),
        "attn.to_kv.weight": (2 * H * K, D_m), "attn.to_out.weight": (D, H * K),
        "attn_gate": (1,), "ff.0.weight": (D,), "ff.0.bias": (D,), "ff.1.weight": (4 * D, D),
        "ff.3.weight": (D, 4 * D), "ff_gate": (1,),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.2, shape) for name, shape in shapes.items()}


def converted(state):
    """The same under this project's names, without media_norm."""
    k, v = np.split(state["attn.to_kv.weight"], 2)
    return {
        "norm.weight": state["attn.norm.weight"],
        "norm.bias": state["attn.norm.bias"],
        "attention.q_proj.weight": state["attn.to_q.weight"],
        "attention.k_proj.weight": k,
        "attention.v_proj.weight": v,
        "attention.out_proj.weight": state["attn.to_out.weight"],
        "alpha_xattn": state["attn_gate"].reshape(()),
        "ffw.norm.weight": state["ff.0.weight"],
        "ffw.norm.bias": state["ff.0.bias"],
        "ffw.up.weight": state["ff.1.weight"],
        "ffw.down.weight": state["ff.3.weight"],
        "alpha_dense": state["ff_gate"].reshape(()),
    }


@exercise("15.5")
def convert(answer):
    """answer({their name: array}) -> {our name: array}."""
    for sizes in ({}, dict(D=8, D_m=5, H=2, K=3, seed=1)):
        state = their_block(**sizes)
        right, got = converted(state), _named(call(answer, state))
        _compare_names(got, right, state)
        for name, wanted in right.items():
            _compare_array(name, as_array(got[name]), wanted, right, state)


def _named(out):
    if not isinstance(out, dict):
        got = as_array(out)
        raise Wrong(f"wrong shape: {{name: array}} is wanted, got an array {list(got.shape)}")
    return out


def _compare_names(got, right, state):
    left = [name for name in got if name in state and name not in right]
    if left:
        raise Wrong(f"{left[0]} is their name: it must not be left over")
    if any("media_norm" in str(name) for name in got):
        raise Wrong("media_norm has no counterpart: leave it out, and let the loader say so")
    extra = [name for name in got if name not in right]
    missing = [name for name in right if name not in got]
    if missing:
        here = f"; {extra[0]!r} is no name of ours" if extra else ""
        raise Wrong(f"missing: {missing[0]}{here}")
    if extra:
        raise Wrong(f"{extra[0]!r} is no name of ours")


def _compare_array(name, got, wanted, right, state):
    """Wrong, with the mistake's name, unless an array is the wanted one."""
    if same(got, wanted):
        return
    if got.dtype.kind == "f" and np.isnan(got).any():
        raise Wrong(f"{name}: NaN")
    if wanted.ndim == 2 and got.shape == wanted.T.shape and np.array_equal(got, wanted.T):
        raise Wrong(f"{name} is transposed: both projects have [out, in]")
    _name_gate(name, got, wanted)
    _name_half(name, got, state)
    other = [n for n, x in right.items() if n != name and np.array_equal(got, x)]
    if other:
        raise Wrong(f"{name} holds what belongs to {other[0]}")
    if got.shape != wanted.shape:
        shapes = f"{list(wanted.shape)} is wanted, got {list(got.shape)}"
        raise Wrong(f"wrong shape of {name}: {shapes}")
    raise Wrong(f"{name}: wrong values")


def _name_gate(name, got, wanted):
    if wanted.shape == () and got.shape == (1,):
        raise Wrong(f"{name}: a gate of ours has the shape [], theirs [1]")
    if wanted.shape == () and np.allclose(got, np.tanh(wanted)):
        raise Wrong(f"{name}: the model takes tanh itself, store alpha as it is")


def _name_half(name, got, state):
    """What a wrong way to take keys and values apart gives."""
    both = state["attn.to_kv.weight"]
    if any(np.array_equal(got, half) for half in np.array_split(both, 2, axis=1)):
        raise Wrong(f"{name}: keys and values are stacked as ROWS of to_kv: split axis 0")
    if any(np.array_equal(got, both[i::2]) for i in (0, 1)):
        raise Wrong(f"{name}: keys are the first half of the rows, not every second one")
