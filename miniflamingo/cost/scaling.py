"""Time and memory, measured, of what the paper's costs are about: O(N^2), O(N M), O(N M) + O(N^2).

Each Case has one size that grows and everything else fixed. Its sides (NumPy; where they are
installed, torch and two public re-implementations) compute from the same arrays, those that must
agree are compared before they are timed, and all sides and sizes take turns, so that whatever else
the machine does disturbs all alike. One thread.

    time      processor time of one call, which a busy machine disturbs less than the clock;
              calls that are short are repeated until they take `LEAST` seconds together
    memory    the most that one call held at a time beyond what it was given: NumPy's as tracemalloc
              counts it; of a full run every side's, as the growth of the resident set (Linux), in a
              process of its own in which malloc gives freed memory back at once
    exponent  p of the line through log size and log time, without the smallest third of the sizes:
              of the medians, with the middle 90 % of what resampling the repeats gives. Beside it
              that of the counted flops over the same sizes, and the order that theory names

Letters as in counting.py. What is timed is the forward pass.
"""

import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from miniflamingo.attention import attention
from miniflamingo.command import Failed, in_processes, require
from miniflamingo.cost import counting
from miniflamingo.cost.counting import Sequence
from miniflamingo.decoding import DecodingCache
from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.language import LanguageConfig
from miniflamingo.perceiver import Perceiver, PerceiverResampler
from miniflamingo.vision import VisionConfig
from miniflamingo.xattn import GatedCrossAttentionDense, compute_phi, image_causal_mask

LEAST = 0.01  # seconds that a measurement takes, so that the clock's grain does not show
RESAMPLED, MIDDLE = 1000, (5, 95)  # of the exponents, in percent
TOLERANCE = 1e-3  # by which sides may differ, of the largest number
H, K, R = 4, 64, 64  # heads, their width, visual tokens
D, D_m = 256, 256
# a model in which products, and not Python, take the time; 16 x 16 pixels, as the eye is not timed
SMALL = FlamingoConfig(
    VisionConfig(16, stem=(8,), stem_strides=(2,), widths=(64,), depths=(1,), strides=(2,)),
    LanguageConfig(512, D, 4, H), D_m, num_latents=16, resampler_depth=2, resampler_heads=H,
    resampler_head_dim=K, xattn_heads=H, xattn_head_dim=K,
)  # fmt: skip
SHOT = 10  # tokens of an example: `<image>`, eight words, `<EOC>`


@dataclass(frozen=True)
class Case:
    """What is measured. sizes: of a short run, and of a full one; order as theory names it;
    flops(size, side) of one call; make(size, rng) -> its Inputs, the same for all sides."""

    name: str
    grows: str
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    order: str
    flops: Callable
    make: Callable


@dataclass(frozen=True)
class Inputs:
    """Of a case at one size: {side: function without arguments}, and what other sides are made of:
    a kind that kernels/tools/scaling_peers.py knows, a NumPy module or None, arrays."""

    sides: dict
    kind: str
    module: object = None
    arrays: tuple = ()


def normal(rng, *shape):
    """Random numbers, float32."""
    return rng.normal(size=shape).astype(np.float32)


# --- cases ----------------------------------------------------------------------------------------


def attend(queries, keys, rng):
    """Attention of so many queries to so many keys, without its projections."""
    q, k, v = (normal(rng, 1, H, n, K) for n in (queries, keys, keys))
    return Inputs({"NumPy": lambda: attention(q, k, v)}, "attention", None, (q, k, v))


def attend_flops(queries, keys):
    """Of q k^T and p v."""
    return counting.attending(queries, keys, H * K).forward


def perceive(inputs, latents, rng):
    """A general Perceiver: a cross-attention, and two blocks over the latents."""
    model, x = Perceiver(D, D, latents, rng=rng), normal(rng, 1, inputs, D)
    return Inputs({"NumPy": lambda: model(x)}, "perceiver", model, (x,))


def perceive_flops(inputs, latents):
    """Of its three attentions, their matrices and feed-forwards."""
    product = counting.product
    cross = product(latents, D, 2 * D + 8 * D, True) + product(inputs, D, 2 * D, True)
    cross += counting.attending(latents, inputs, D)
    block = product(latents, D, 12 * D, True) + counting.attending(latents, latents, D)
    return (cross + block.times(2)).forward


def resample(images, frames, rng):
    """The Perceiver Resampler, two layers, 36 features a frame."""
    model = PerceiverResampler(D_m, D_m, R, 2, H, K, rng=rng)
    features = normal(rng, 1, images, frames, 36, D_m)
    return Inputs({"NumPy": lambda: model(features)}, "resampler", model, (features,))


def resample_flops(images, frames):
    """As the formula has it, of a config with these sizes."""
    eye = VisionConfig(24, widths=(48, D_m))  # a grid of 6 x 6
    config = FlamingoConfig(eye, SMALL.lm, D_m, num_latents=R, resampler_depth=2,
                            resampler_heads=H, resampler_head_dim=K)  # fmt: skip
    return counting.resampler_flops(config, Sequence(1, images, frames)).forward


def gated(tokens, images, rng):
    """A GATED XATTN-DENSE layer with open gates; and the attention under the dense mask, which
    looks at all images' tokens to use those of one."""
    layer = GatedCrossAttentionDense(D, D_m, H, K, rng=rng)
    for alpha in (layer.alpha_xattn, layer.alpha_dense):
        alpha.data = np.float32(0.5) * np.ones_like(alpha.data)
    dense = under_dense_mask(layer)
    y, media = normal(rng, 1, tokens, D), normal(rng, 1, images, R, D_m)
    phi = 1 + np.arange(tokens)[None] * images // tokens
    sides = {"NumPy": lambda: layer(y, media, phi),
             "NumPy, dense mask": lambda: dense(y, media, phi)}  # fmt: skip
    return Inputs(sides, "gated", layer, (y, media, phi))


def under_dense_mask(layer):
    """The same layer under the dense mask: what image-causal attention is held against."""

    def dense(y, media, phi):
        a, (B, N) = layer.attention, media.shape[:2]
        q, (k, v) = a.queries(layer.norm(y)), layer.project_media(media)
        k, v = (x.reshape(B, N * R, H, K).swapaxes(1, 2) for x in (k, v))
        mask = image_causal_mask(phi, N, R)[:, None]
        out = attention(q.swapaxes(1, 2), k, v, mask).swapaxes(1, 2)
        gate = np.tanh(layer.alpha_xattn.data)
        y = y + gate * a.out_proj(out.reshape(*y.shape[:2], H * K))
        return y + np.tanh(layer.alpha_dense.data) * layer.ffw(y)

    return dense


def gated_layer_flops(tokens, images, side):
    """As the formula has it, of one layer; all sides but one look at all images' tokens."""
    config = FlamingoConfig(lm=LanguageConfig(8, D, 1, H), media_dim=D_m, num_latents=R,
                            xattn_heads=H, xattn_head_dim=K)  # fmt: skip
    total = counting.gated_flops(config, Sequence(tokens, images)).forward
    unseen = 0 if side == "NumPy" else R * (images - 1)
    return total + counting.attending(tokens, unseen, H * K).forward


def prompt(shots, rng):
    """tokens int[1, L], phi int[1, L], media of a question behind so many examples."""
    words = rng.integers(4, SMALL.lm.vocab_size, (shots + 1, SHOT))
    words[:, 0], words[:, -1] = SMALL.image_token, SMALL.eoc_token
    tokens = np.concatenate([[1], words.ravel()[:-4]])[None]
    phi = compute_phi(tokens, SMALL.image_token)
    return tokens, phi, normal(rng, 1, shots + 1, SMALL.num_latents, D_m)


def read_prompt(shots, rng):
    """All tokens of a prompt at once, before the first word of the answer."""
    model, (tokens, phi, media) = opened(rng), prompt(shots, rng)
    work = lambda: model.read(tokens, media, phi, last=True)  # noqa: E731
    return Inputs({"NumPy": work}, "read", model, (tokens, media, phi))


def write_word(shots, rng):
    """One more word behind the prompt: from the caches, and by reading everything again."""
    model, (tokens, phi, media) = opened(rng), prompt(shots, rng)
    length = tokens.shape[1]
    cache, place = DecodingCache.of(model, media, length), np.arange(length)[None]
    model.read(tokens[:, :-1], None, phi[:, :-1], cache, place[:, :-1])
    one = (tokens[:, -1:], None, phi[:, -1:], cache, place[:, -1:])
    sides = {"NumPy, cached": lambda: model.read(*one),
             "NumPy, not cached": lambda: model.read(tokens, media, phi, last=True)}  # fmt: skip
    return Inputs(sides, "word", model, (tokens, media, phi))


def opened(rng):
    """The small model, its gates open."""
    model = Flamingo(SMALL, rng=rng)
    for layer in model.gated_xattn:
        for alpha in (layer.alpha_xattn, layer.alpha_dense):
            alpha.data = np.float32(0.5) * np.ones_like(alpha.data)
    return model


def read_flops(shots, side):
    """Of all tokens of a prompt, without the eye and the resampler; with caches, of its last: what
    is left that grows is its attention to the others."""
    L = SHOT * (shots + 1) - 3
    if side.endswith(", cached"):
        one = counting.gated_flops(SMALL, Sequence(1, 0)) + counting.lm_flops(SMALL, 1)
        seen = counting.attending(1, SMALL.num_latents, H * K).times(len(SMALL.layers()))
        return (one + seen + counting.attending(1, L - 1, D).times(SMALL.lm.depth)).forward
    parts = counting.flops(SMALL, Sequence(L, shots + 1))
    unseen = SMALL.num_latents * shots * side.startswith("torch")  # under its dense mask
    dense = counting.attending(L, unseen, H * K).times(len(SMALL.layers()))
    return (parts["gated_xattn"] + parts["lm"] + dense).forward


LENGTHS = (128, 256, 512, 1024), (128, 256, 512, 1024, 2048, 4096)
MANY = (256, 512, 1024, 2048), (256, 512, 1024, 2048, 4096, 8192)
FEW = (32, 64, 128, 256), (32, 64, 128, 256, 512, 1024)
FRAMES = (2, 4, 8, 16), (2, 4, 8, 16, 32, 64)
IMAGES = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64)
SHOTS = (0, 4, 8, 16, 32), (0, 2, 4, 8, 16, 32, 64)
CASES = {
    case.name: case
    for case in (
        Case("self-attention", "tokens N", LENGTHS, "O(N^2)", lambda n, side: attend_flops(n, n),
             lambda n, rng: attend(n, n, rng)),
        Case("cross-attention", "inputs M", MANY, "O(N M)", lambda n, side: attend_flops(R, n),
             lambda n, rng: attend(R, n, rng)),
        Case("Perceiver, inputs", "inputs M", MANY, "O(N M) + O(N^2)",
             lambda n, side: perceive_flops(n, R), lambda n, rng: perceive(n, R, rng)),
        Case("Perceiver, latents", "latents N", FEW, "O(N M) + O(N^2)",
             lambda n, side: perceive_flops(512, n), lambda n, rng: perceive(512, n, rng)),
        Case("resampler, frames", "frames T", FRAMES, "O(R T S) + O(R^2)",
             lambda n, side: resample_flops(1, n), lambda n, rng: resample(1, n, rng)),
        Case("resampler, images", "images N", IMAGES, "O(N)",
             lambda n, side: resample_flops(n, 1), lambda n, rng: resample(n, 1, rng)),
        Case("gated block, tokens", "tokens L", LENGTHS, "O(L R), dense O(L N R)",
             lambda n, side: gated_layer_flops(n, 4, side), lambda n, rng: gated(n, 4, rng)),
        Case("gated block, images", "images N", IMAGES, "O(L R) + O(N R), dense O(L N R)",
             lambda n, side: gated_layer_flops(256, n, side), lambda n, rng: gated(256, n, rng)),
        Case("reading a prompt", "shots", SHOTS, "O(L) + O(L^2)", read_flops, read_prompt),
        Case("one more word", "shots", SHOTS, "cached O(1) + O(L), else O(L) + O(L^2)", read_flops,
             write_word),
    )
}  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------


class Timed:
    """One side of a case at one size: how often to call it, and what was measured."""

    def __init__(self, case, size, side, work):
        self.case, self.size, self.side, self.work = case, size, side, work
        work()
        self.calls, self.seconds = 1, []
        while self.calls * self.once(self.calls) < LEAST:
            self.calls *= 2

    def once(self, calls):
        """Seconds of processor time a call."""
        start = time.process_time()
        for _ in range(calls):
            self.work()
        return (time.process_time() - start) / calls

    def measure(self):
        """Once more."""
        self.seconds.append(self.once(self.calls))


def most_held(work):
    """The bytes that work() holds at a time, at most, beyond what was there; NumPy's alone."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def status(key):
    """A figure of /proc/self/status, in bytes; None where there is no such file."""
    file = Path("/proc/self/status")
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None


def growth(work):
    """Bytes by which the resident set grows during work(), at most; None where it is not told.
    Linux forgets the highest mark where 5 is written to clear_refs (man 5 proc)."""
    work()
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return None
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def growth_of(name, full):
    """{(size, side): bytes or None} of a case; call it in a process of its own."""
    case, (more, _), found = CASES[name], others(), {}
    with threadpool_limits(1):
        for size in case.sizes[full]:
            inputs = case.make(size, np.random.default_rng(size))
            sides = inputs.sides | more(inputs)
            found |= {(size, side): growth(work) for side, work in sides.items()}
    return found


def all_growth(names, full):
    """{case: growth_of(case)}, from one fresh process whose malloc gives large pieces back."""
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc's own threshold moves
    try:
        columns = names, [full] * len(names)
        return dict(zip(names, in_processes(1, growth_of, *columns, method="spawn")))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        if before is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


def others():
    """(sides(inputs) -> {side: function}, {side: why it is left out}) of what has torch."""
    try:
        require("torch")
    except ModuleNotFoundError as error:
        return lambda inputs: {}, {"torch": str(error), "flamingo-pytorch": "it needs torch",
                                   "open-flamingo": "it needs torch"}  # fmt: skip
    peers = import_module("miniflamingo.kernels.tools.scaling_peers")
    return peers.sides, peers.missing()


def check_equal(case, size, sides):
    """Failed unless all sides of a case, but the public ones, give the same numbers."""
    ours = {name: np.asarray(work()) for name, work in sides.items() if "flamingo" not in name}
    first = next(iter(ours.values()))
    for name, out in ours.items():
        off = abs(out - first).max() / abs(first).max()
        if not off <= TOLERANCE:
            raise Failed(f"{case.name} of {size}: {name} is off by {off:.2g}, at most {TOLERANCE}")


def prepare(case, full, more):
    """[Timed] of all sizes and sides of a case, and what NumPy's hold, {(size, side): bytes}."""
    timed, memory = [], {}
    for size in case.sizes[full]:
        inputs = case.make(size, np.random.default_rng(size))
        sides = inputs.sides | more(inputs)
        check_equal(case, size, sides)
        memory |= {(size, name): most_held(work) for name, work in inputs.sides.items()}
        timed += [Timed(case, size, name, work) for name, work in sides.items()]
    return timed, memory


def measure(case, full=False, repeats=5, more=lambda inputs: {}):
    """[{size, side, seconds: [repeats], median, bytes, flops}] of a case; all take turns."""
    with threadpool_limits(1):
        timed, memory = prepare(case, full, more)
        for _ in range(repeats):
            for one in timed:
                one.measure()
    return [
        {"size": t.size, "side": t.side, "seconds": t.seconds,
         "median": float(np.median(t.seconds)), "bytes": memory.get((t.size, t.side)),
         "flops": case.flops(t.size, t.side)}
        for t in timed
    ]  # fmt: skip


# --- exponents ------------------------------------------------------------------------------------


def slope(sizes, values):
    """p of the least-squares line log value = p log size + c; values may have leading axes.

    ValueError unless there are two different sizes above 0, and values above 0.
    """
    sizes, values = np.asarray(sizes, float), np.asarray(values, float)
    if len(set(sizes.tolist())) < 2 or sizes.min() <= 0 or not (values > 0).all():
        raise ValueError(f"a slope needs two sizes and values above 0, got {sizes}, {values}")
    x = np.log(sizes) - np.log(sizes).mean()
    return np.log(values) @ x / (x @ x)


def exponent(rows, case, rng=None):
    """{exponent, low, high, counted, memory, sizes} of one side's rows, without the smallest third
    of the sizes; n shots count as n + 1, the images of the prompt."""
    rng = np.random.default_rng(0) if rng is None else rng
    rows = rows[len(rows) // 3 :]
    sizes = [row["size"] + (case.grows == "shots") for row in rows]
    low, high = np.percentile(resampled(sizes, rows, rng), MIDDLE)
    held = [row["bytes"] for row in rows]
    return {
        "exponent": float(slope(sizes, [row["median"] for row in rows])), "low": float(low),
        "high": float(high), "counted": float(slope(sizes, [row["flops"] for row in rows])),
        "memory": float(slope(sizes, held)) if all(held) else None, "sizes": sizes,
    }  # fmt: skip


def resampled(sizes, rows, rng):
    """Exponents [RESAMPLED] of medians of repeats that are drawn again, with replacement."""
    repeats = np.array([row["seconds"] for row in rows])  # [sizes, repeats]
    drawn = rng.integers(0, repeats.shape[1], (RESAMPLED, *repeats.shape))
    medians = np.median(np.take_along_axis(repeats[None], drawn, axis=2), axis=2)
    return slope(sizes, medians)


def summarise(case, rows):
    """A case's document: its rows, an exponent a side, ratios to NumPy at the largest size."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    by_side = {side: [row for row in rows if row["side"] == side] for side in sides}
    last = {side: own[-1]["median"] for side, own in by_side.items()}
    return {
        "case": case.name, "grows": case.grows, "order": case.order,
        "fits": {side: exponent(own, case) for side, own in by_side.items()},
        "ratios": {side: value / last[sides[0]] for side, value in last.items()}, "rows": rows,
    }  # fmt: skip
