"""Right and wrong answers to the exercises of module 15, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_15 import converted, device_bytes
from miniflamingo.perceiver import PerceiverResampler
from miniflamingo.xattn import GatedCrossAttentionDense

# --- 15.1: a gated block --------------------------------------------------------------------------


class _Shapes:
    """As in count_parameters: arrays with a shape and no storage."""

    def normal(self, loc=0.0, scale=1.0, size=()):
        return np.broadcast_to(np.float32(0), size)


def block(D, D_m, H, K, parts=lambda a, f, n: [a, f, n], width=None, media=None, ffw=8, rest=None):
    W, D_m = (H * K if width is None else width), D_m if media is None else media
    rest = 4 * D + 2 * D_m + 2 if rest is None else rest
    return np.array(parts(2 * D * W + 2 * D_m * W, ffw * D * D, rest))


def block_by_building(D, D_m, H, K):
    built = GatedCrossAttentionDense(D, D_m, H, K, rng=_Shapes())
    count = [0, 0, 0]
    for name, p in built.named_parameters():
        part = 2 if "norm" in name or "alpha" in name else int(name.startswith("ffw"))
        count[part] += p.size
    return count


# --- 15.2: the resampler --------------------------------------------------------------------------


def resampler(widths, D_v, D_m, H, R, T, depth, matrices=4, ffw=8, norms=6, once=True, last=2):
    layer = matrices * D_m * H * widths + ffw * D_m**2 + norms * D_m
    before = (R + T) * D_m + D_v * D_m
    return before + depth * layer + last * D_m * (1 if once else depth)


def resampler_by_building(widths, D_v, D_m, H, R, T, depth):
    sizes = dict(num_latents=R, depth=depth, heads=H, num_frames=T, num_features=None)
    return [
        PerceiverResampler(D_v, D_m, head_dim=int(K), **sizes, rng=np.random.default_rng(0))
        .num_parameters()
        for K in widths
    ]  # fmt: skip


# --- 15.4: bytes ----------------------------------------------------------------------------------


def device(learns, frozen, unit, devices, each=16, bf16=2, gathered=2):
    return (each * learns + bf16 * frozen) / devices + gathered * unit


def device_by_loop(learns, frozen, unit, devices):
    out = []
    for d in devices:
        state = {"weights": 4 * learns, "gradients": 4 * learns, "moments": 8 * learns}
        out.append(sum(state.values()) / d + 2 * frozen / d + unit + unit)
    return out


# --- 15.5: names ----------------------------------------------------------------------------------


def renamed(state):
    """Another way to write it: one name after the other."""
    ours, half = {}, len(state["attn.to_kv.weight"]) // 2
    table = {"to_q": "q_proj", "to_out": "out_proj"}
    for name, x in state.items():
        if name == "attn.to_kv.weight":
            ours["attention.k_proj.weight"] = x[:half]
            ours["attention.v_proj.weight"] = x[half:]
        elif name.endswith("gate"):
            ours["alpha_xattn" if name.startswith("attn") else "alpha_dense"] = x[0]
        elif name.startswith("ff."):
            place, kind = name[3], name[5:]
            ours[{"0": "ffw.norm", "1": "ffw.up", "3": "ffw.down"}[place] + "." + kind] = x
        elif "norm" in name:
            ours[name[5:]] = x
        else:
            ours[f"attention.{table[name.split('.')[1]]}.weight"] = x
    return ours


def with_change(**changes):
    """converted(state) with entries replaced: our name (dots as __) -> function(ours, state)."""

    def answer(state):
        ours = converted(state)
        new = {name.replace("__", "."): make(ours, state) for name, make in changes.items()}
        return ours | new

    return answer


def without(name):
    return lambda state: {n: x for n, x in converted(state).items() if n != name}


K, V, Q = (f"attention__{letter}_proj__weight" for letter in "kvq")
KEYS, VALUES = K.replace("__", "."), V.replace("__", ".")

RIGHT = [
    ("15.1", block),
    ("15.1", block_by_building),
    ("15.2", resampler),
    ("15.2", resampler_by_building),
    ("15.3", lambda depth, every: np.arange(0, depth, every)),
    ("15.3", lambda depth, every: [i for i in range(depth) if i % every == 0]),
    ("15.4", device),
    ("15.4", device_by_loop),
    ("15.5", converted),
    ("15.5", renamed),
    ("15.1", lambda *a: block(*a) / 1),
    ("15.5", lambda state: {n: x.astype(np.float32) for n, x in converted(state).items()}),
]

WRONG = [
    ("15.1", lambda D, D_m, H, K: [4 * D * H * K, *block(D, D_m, H, K)[1:]],
     "keys and values are made of visual tokens"),
    ("15.1", lambda *a: block(*a, width=a[3]), "H*K rows, not K"),
    ("15.1", lambda *a: block(*a, width=a[0]), "H*K need not be D"),
    ("15.1", lambda *a: block(*a, ffw=4), "two matrices, up and down"),
    ("15.1", lambda *a: block(*a, ffw=12), "no third matrix"),
    ("15.1", lambda *a: block(*a, rest=4 * a[0] + 2 * a[1]), "the two gates are missing"),
    ("15.1", lambda *a: block(*a, rest=2 * a[0] + a[1] + 2), "a weight AND a bias"),
    ("15.1", lambda *a: block(*a, rest=4 * a[0] + 2), "norm of the visual tokens is missing"),
    ("15.1", lambda *a: block(*a, rest=6 * a[0] + 2 * a[1]), "one a channel (that is IDEFICS)"),
    ("15.1", lambda *a: block(*a, parts=lambda a, f, n: [f, a, n]), "the order is"),
    ("15.1", lambda *a: block(*a).sum(), "this is their sum"),
    ("15.2", lambda w, D_v, D_m, *a: resampler(w, 0, D_m, *a), "projection from D_v to D_m is mis"),
    ("15.2", lambda w, D_v, D_m, H, R, T, depth: resampler(w, D_v, D_m, H, R, 0, depth),
     "the time embeddings are missing"),
    ("15.2", lambda w, D_v, D_m, H, R, T, depth: resampler(w, D_v, D_m, H, 0, T, depth),
     "the latents are missing"),
    ("15.2", lambda *a: resampler(*a, last=0), "the last norm is missing"),
    ("15.2", lambda *a: resampler(*a, once=False), "behind the layers, once"),
    ("15.2", lambda *a: resampler(*a, norms=4), "three norms a layer"),
    ("15.2", lambda *a: resampler(*a, norms=3, last=1), "a weight AND a bias"),
    ("15.2", lambda *a: resampler(*a, matrices=3), "the output's is missing"),
    ("15.2", lambda *a: resampler(*a, ffw=4), "two matrices of 4"),
    ("15.2", lambda *a: resampler(*a[:-1], 1), "this counts one"),
    ("15.2", lambda *a: resampler(*a).sum(), "not their sum"),
    ("15.3", lambda depth, every: [i for i in range(depth) if (i + 1) % every == 0],
     "open-flamingo's way"),
    ("15.3", lambda depth, every: np.arange(every, depth, every), "the first block stands before"),
    ("15.3", lambda depth, every: np.arange(0, depth + 1, every), "there is no layer"),
    ("15.3", lambda depth, every: np.arange(depth // every) * every, "rounded UP"),
    ("15.3", lambda depth, every: np.arange(1, depth + 1, every), "layers are counted from 0"),
    ("15.3", lambda depth, every: np.arange(-(-depth // every)), "the blocks' own numbers"),
    ("15.3", lambda depth, every: np.arange(depth) % every == 0, "not a truth for each layer"),
    ("15.4", lambda *a: device(*a, gathered=0), "the gathered unit is missing"),
    ("15.4", lambda *a: device(*a, gathered=2 / a[3]), "unit is not divided by d"),
    ("15.4", lambda *a: device(*a, gathered=4), "gathered in bf16"),
    ("15.4", lambda *a: device(*a[:3], a[3] ** 0), "nothing is sharded here"),
    ("15.4", lambda g, f, u, d: 16 * g / d + 2 * f + 2 * u, "frozen numbers are sharded, too"),
    ("15.4", lambda *a: device(*a, bf16=16), "no gradient and no moments"),
    ("15.4", lambda *a: device(*a, bf16=4), "2 bytes, not 4"),
    ("15.4", lambda *a: device(*a, each=12), "a gradient (4) or a moment (4) is missing"),
    ("15.4", lambda *a: device(*a, each=8), "Adam has two moments"),
    ("15.4", lambda *a: device(*a, each=14), "the gradients are float32 here"),
    ("15.4", lambda *a: device_bytes(*a) / 1e9, "not gigabytes"),
    ("15.5", with_change(alpha_xattn=lambda o, s: s["attn_gate"]), "alpha_xattn: a gate of ours"),
    ("15.5", with_change(alpha_dense=lambda o, s: np.tanh(o["alpha_dense"])), "takes tanh itself"),
    ("15.5", with_change(**{K: lambda o, s: o[VALUES], V: lambda o, s: o[KEYS]}),
     "attention.k_proj.weight holds what belongs to attention.v_proj.weight"),
    ("15.5", with_change(**{Q: lambda o, s: s["attn.to_q.weight"].T}), "is transposed"),
    ("15.5", with_change(**{K: lambda o, s: s["attn.to_kv.weight"][::2]}), "every second one"),
    ("15.5", with_change(**{K: lambda o, s: np.split(s["attn.to_kv.weight"], 2, axis=1)[0]}),
     "split axis 0"),
    ("15.5", with_change(**{K: lambda o, s: s["attn.to_kv.weight"]}), "wrong shape of attention.k"),
    ("15.5", with_change(norm__weight=lambda o, s: o["ffw.norm.weight"]), "holds what belongs to"),
    ("15.5", with_change(media_norm__weight=lambda o, s: np.ones(6)), "has no counterpart"),
    ("15.5", with_change(norm__bias=lambda o, s: o["norm.bias"] * np.nan), "norm.bias: NaN"),
    ("15.5", without("ffw.down.weight"), "missing: ffw.down.weight"),
    ("15.5", lambda state: converted(state) | state, "is their name"),
    ("15.5", lambda state: [*converted(state).values()], "an array is wanted, got list"),
    ("15.2", lambda *a: resampler(*a) / 1e6, "every number is 1e-06 times the right one"),
]  # fmt: skip
