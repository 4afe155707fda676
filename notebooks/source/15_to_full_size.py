# %% [markdown]
# # 15 To full size
#
# **The question: our model has half a million numbers, the paper's largest has 80 billion, and the
# code is the same. What does it take to run it there: which numbers are there, where do they fit,
# and how do trained ones get in?**
#
# After this module you can
#
# - derive the parameter count of every part from a handful of sizes, and say where the paper's own
#   table does not fit itself;
# - count the bytes of training on one device and on many, and what many devices must send;
# - load a checkpoint into two models, and tell which faults a strict loader refuses;
# - (optional) count a step's arithmetic, bring another project's weights under our names, tell the
#   faults that no loader sees, and cut a model over two processes.
#
# **You need:** GATED XATTN-DENSE (module 08), the resampler (module 05), training (module 09).
# The cells on torch's side want `pip install -e ".[course,kernels]"`; no GPU.
#
# **Time:** about 50 minutes for the core path, and 45 for what is marked optional. Computing takes
# about 30 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 8: the three panels, (1), (2) and (4). 8 to 15: exercise 15.1 and the two other
# ways to count. 15 to 20: exercise 15.3 and the picture of three projects. 20 to 25: guess 15.b,
# the table that does not fit. 25 to 30: (5) and guess 15.c. 30 to 41: (6), exercise 15.4, the
# figure, (7) and the two processes. 41 to 50: checkpoints, and guess 15.e.
#
# **Predictions.** 15.a: 128, and 174.8 million. 15.b: 32 layers and 8 blocks; most trust the stated
# 40. 15.c: 4 and 16; the usual guess for the first is far higher, because 80 billion times 16 bytes
# is what one has in mind. 15.d: 1.29 TFLOP, and the eye 0.9 times as much. 15.e: 1 and 6; number 3
# is often added, but the transposed matrices are square. 15.f: all five; `tan` costs the fewest,
# then the heads. 15.g: ZeRO-1 alone does not fit.
#
# **Open questions.** "Which of them would a look at a few fluent captions not show?": the shut
# gates, above all. The text stays flawless, and the model has never looked.
#
# **Misconceptions.** "Freezing makes training as cheap as inference": the gradient must still pass
# through, and frozen numbers must be gathered. "More devices make a device emptier": only down to
# the gathered unit. "It loads, so it is right": names and shapes are all that a loader sees.
#
# **To cut.** First exercise 15.3 (one line), then the loop over named parameters, then the cell
# behind (7). Keep 15.4 and 15.e.

# %% [markdown]
# ## The picture and the letters
#
# The package has the paper's three sizes ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198),
# Table 5) as presets. `count_parameters` builds the real model with
# arrays that have a shape and no storage, so that 80 billion numbers can be counted on a laptop.
# Beside them stands the paper's own table.

# %%
import copy
import json
import struct
from dataclasses import replace
from functools import partial

import numpy as np

from miniflamingo import plots, training, xattn
from miniflamingo.__main__ import PAPER_SIZES
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.flamingo import PRESETS, count_parameters
from miniflamingo.module import load_tensors
from miniflamingo.training import WEIGHTS


# %%
def counted(config):  # {part: parameters}, with the relative positions of the paper's LM
    parts = count_parameters(config)
    return parts | {"relative positions": config.lm.depth * config.lm.dim**2}


paper = {name: {part: int(n) for part, n in row.items() if part != "total"}
         for name, row in PAPER_SIZES.items()}  # fmt: skip
counts = {name: counted(PRESETS[name]) for name in paper}

# %%
order = ("lm", "relative positions", "gated_xattn", "resampler", "vision_encoder")
bars = {name: {"counted": {part: counts[name][part] for part in order},
               "the table": {part: paper[name].get(part, 0) for part in order}}
        for name in paper}  # fmt: skip
show(
    plots.plot_sizes(bars),
    alt="Three panels, 3B, 9B and 80B, each with two bars in billions of parameters, counted and "
    "as in the paper's table, split into language model, relative positions, gated "
    "cross-attention, resampler and vision encoder. 3B: 3.16 counted, 3.23 in the table. "
    "9B: 11.3 counted, 9.33 in the table. 80B: 79 counted, 80.6 in the table.",
)

# %% [markdown]
# Two panels agree to a few percent. One is off by two billion, and it will not be our mistake: the
# paper's own table does not quite fit itself, as we shall find.
#
# | letter | meaning | mini | 3B | 9B | 80B |
# |---|---|---|---|---|---|
# | D, H | width and heads of the LM | 64, 4 | 2048, 16 | 4096, 32 | 8192, 64 |
# | | LM layers | 3 | 24 | 40 | 80 |
# | n | a block before every n-th layer | 1 | 1 | 4 | 7 |
# | K | head width | 16 | 128 | 128 | 128 |
# | $D_m$, R | width, number of visual tokens | 64, 8 | 1536, 64 | 1536, 64 | 1536, 64 |
# | $D_v$ | width of the eye's features | 64 | 3072 | 3072 | 3072 |
# | V | words | 128 | 32,000 | 32,000 | 32,000 |
# | d | devices | 1 | | | 16 in the paper |
#
# (V is our choice of a round number; the paper's vocabulary is not stated.)

# %% [markdown]
# ## The derivation
#
# **A gated block** has four matrices of attention, the queries from text of width D, the keys and
# values from visual tokens of width $D_m$, and two of the feed-forward, hidden width 4D. None has a
# bias. Then three layer norms (a weight and a bias each: on the text, on the visual tokens, before
# the feed-forward) and two gates:
#
# $$P_{block} = \underbrace{2\,D\,HK + 2\,D_m HK}_{attention} + \underbrace{8\,D^2}_{ffw}
# + \underbrace{4D + 2D_m + 2}_{norms,\ gates} \qquad\qquad (1)$$
#
# With $HK = D$, as in all three sizes, that is about $10 D^2 + 2 D D_m$. **An LM layer** has
# $4D^2 + 8D^2$, its two norms a weight alone, and if its positions are relative, as the paper's,
# one matrix more:
#
# $$P_{lm} = VD + layers \cdot (12 D^2 + 2D) + D \quad (+ \; layers \cdot D^2) \qquad\qquad (2)$$
#
# **The resampler** has R latents and T = 8 time embeddings, a projection from $D_v$ to $D_m$, six
# layers with two norms before the attention and one before the feed-forward, and a last norm:
#
# $$P_{res} = (R + T)\,D_m + D_v D_m + 6\,(4\, D_m HK + 8\, D_m^2 + 6 D_m) + 2 D_m
# \qquad\qquad (3)$$
#
# **Where the blocks stand:** before LM layers 0, n, 2n, ..., so there are
# $\lceil layers / n \rceil$ of them.   (4)

# %% [markdown]
# ## Counting, three ways
#
# ### Exercise 15.1: a gated block
#
# ★☆☆ · 7 minutes · 3 or 4 lines. Return int [3]: the parameters of the attention's matrices, of the
# feed-forward's, and of norms and gates together, equation (1).
#
# <details><summary>Hint 1</summary>
#
# Queries: [H·K, D]. Keys and values: [H·K, D_m] each. Output: [D, H·K].
#
# </details>
# <details><summary>Hint 2</summary>
#
# A layer norm of width W has 2W numbers; widths D, D_m and D. A gate is one number.
#
# </details>


# %% tags=["exercise"]
def gated_block(D, D_m, H, K):  # four ints -> int[3]
    ...  # your code


# %% tags=["solution"]
def gated_block(D, D_m, H, K):  # four ints -> int[3]
    attention = 2 * D * H * K + 2 * D_m * H * K
    norms_and_gates = 2 * D + 2 * D_m + 2 * D + 2
    return np.array([attention, 8 * D * D, norms_and_gates])  # equation (1)


# %%
check("15.1", gated_block)

# %% [markdown]
# The same with a loop, over a real block's parameters by name. This is the mini model's:

# %%
shipped = training.load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
for name, p in shipped.gated_xattn[0].named_parameters():
    print(f"{name:<28}{p.shape!s:>12}{p.size:>8,}")

# %% [markdown]
# And the library's way for any size. Its trick is a "random generator" that returns one number,
# broadcast to the shape that was asked for:

# %%
source(count_parameters)

# %%
for name, config in PRESETS.items():
    D, D_m, H, K = config.lm.dim, config.media_dim, config.xattn_heads, config.xattn_head_dim
    each = 2 * D * H * K + 2 * D_m * H * K + 8 * D * D + 4 * D + 2 * D_m + 2  # equation (1)
    blocks = -(-config.lm.depth // config.xattn_every)  # equation (4)
    assert blocks * each == count_parameters(config)["gated_xattn"]
    print(f"{name:>4}: {blocks:>2} blocks of {each / 1e6:8.2f} million")

# %% [markdown]
# ### Exercise 15.2: the resampler, and a head width that nobody states twice (optional)
#
# ★★☆ · 8 minutes · 3 to 5 lines. One version of the paper implies heads of width 96, another says
# 128. Return int [len(widths)]: equation (3), with 16 heads, for each head width K in the array
# `widths`; `depth` is the number of layers.
#
# <details><summary>Hint 1</summary>
#
# Only the term $4 D_m H K$ depends on K. NumPy does all widths at once if `widths` stays an array.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A layer's three norms hold $6 D_m$ numbers. The projection from $D_v$ and the last norm are there
# once, not in every layer.
#
# </details>


# %% tags=["exercise"]
def resampler(widths, D_v, D_m, H, R, T, depth):  # int[W] and six ints -> int[W]
    ...  # your code


# %% tags=["solution"]
def resampler(widths, D_v, D_m, H, R, T, depth):  # int[W] and six ints -> int[W]
    layer = 4 * D_m * H * np.asarray(widths) + 8 * D_m**2 + 6 * D_m
    return (R + T) * D_m + D_v * D_m + depth * layer + 2 * D_m  # equation (3)


# %%
check("15.2", resampler)

# %% [markdown]
# **Predict, then run:** the table says 194 million. Which head width is it, 96 or 128? And how many
# millions does the other one give?

# %%
guess("15.a", head_width=..., other_gives=...)

# %% tags=["reveal"]
millions = {}  # head width -> the resampler's parameters
for K in (96, 128):
    config = replace(PRESETS["3B"], resampler_head_dim=K)
    millions[K] = count_parameters(config)["resampler"] / 1e6
    print(f"head width {K:>3}: {millions[K]:.1f} million")
right, other = sorted(millions, key=lambda K: abs(millions[K] - paper["3B"]["resampler"] / 1e6))
told("15.a", head_width=right, other_gives=millions[other], within=0.05)

# %% [markdown]
# <details><summary>After the run</summary>
#
# So 128, if there is an input projection: a *count* settles what two versions of a text leave open.
#
# </details>
#
# It pays to recompute a table before one builds on it.
#
# ## Where the blocks stand
#
# ### Exercise 15.3: which layers get a block?
#
# ★☆☆ · 4 minutes · 1 line. Return int: the LM layers, counted from 0, before which a block stands,
# equation (4).
#
# <details><summary>Hint</summary>
#
# `np.arange(start, stop, step)`.
#
# </details>


# %% tags=["exercise"]
def inserted(depth, every):  # int, int -> int[blocks]
    ...  # your code


# %% tags=["solution"]
def inserted(depth, every):  # int, int -> int[blocks]
    return np.arange(0, depth, every)  # equation (4)


# %%
check("15.3", inserted)

# %% [markdown]
# Public implementations ([open-flamingo](https://github.com/mlfoundations/open_flamingo),
# [flamingo-pytorch](https://github.com/lucidrains/flamingo-pytorch), IDEFICS in
# [transformers](https://github.com/huggingface/transformers)) count differently. A stack of twelve
# layers with n = 4:

# %% tags=["target"]
show(
    plots.plot_inserted(
        12,
        {
            "Flamingo, IDEFICS": inserted(12, 4),
            "open-flamingo": [i for i in range(12) if (i + 1) % 4 == 0],
            "flamingo-pytorch": [i + 1 for i in range(12) if (i + 1) % 4 == 0],
        },
    ),
    alt="Three rows of twelve layers. Flamingo and IDEFICS have blocks before layers 0, 4 and 8; "
    "open-flamingo before layers 3, 7 and 11; flamingo-pytorch behind layers 3, 7 and 11.",
)

# %% [markdown]
# Three blocks each, with the same names and shapes. A checkpoint of one loads into another, and
# the first block then reads an unprocessed embedding instead of the output of three layers.
#
# ## Does the table fit itself?
#
# **Predict, then run:** the 9B row says 40 layers of width 4096, 7.1 billion for them, a block
# before every 4th layer, 10 blocks, 1.6 billion for these. The numbers can not all be right. Which
# number of layers, 40, 36 or 32, makes the 7.1 billion? And how many blocks are there then?

# %%
guess("15.b", layers=..., blocks=...)

# %% tags=["reveal"]
nine, away = PRESETS["9B"], {}  # layers -> how far the LM's count is from the table's
for depth in (40, 36, 32):
    parts = counted(replace(nine, lm=replace(nine.lm, depth=depth)))
    lm, blocks = (parts["lm"] + parts["relative positions"]) / 1e9, parts["gated_xattn"] / 1e9
    print(
        f"{depth} layers: LM {lm:.2f} (table 7.1), {-(-depth // 4):>2} blocks {blocks:.2f}", end=""
    )
    print(f" (table 1.6), sum with the rest {sum(parts.values()) / 1e9:.1f} (table 9.3)")
    away[depth] = abs(lm - paper["9B"]["lm"] / 1e9)
nearest = min(away, key=away.get)
told("15.b", layers=nearest, blocks=-(-nearest // nine.xattn_every))

# %% [markdown]
# <details><summary>After the run</summary>
#
# 32 layers give the LM's 7.1 to the digit. Then "every 4th" makes 8 blocks, not 10, of 1.44
# billion. Nine blocks would give 1.62. The sum of 9.3 is that of the table's parts, so it decides
# nothing. Our preset keeps the *stated* layers, and says so.
#
# </details>
#
# In the 80B row, 12 blocks are 8.4 billion where the table has 10.

# %% [markdown]
# ## What it takes to train
#
# **Bytes.** In the paper's precision a frozen number is stored in bf16, 2 bytes, and has neither a
# gradient nor moments. A number that learns is kept in float32 (4), with a gradient (4: `kernels/`
# adds gradients up in float32; the paper keeps them in bf16, which would be 2) and the two moments
# of [Adam](https://arxiv.org/abs/1412.6980) (8):
#
# $$bytes = 16\, P_{learns} + 2\, P_{frozen} \qquad\qquad (5)$$
#
# **Predict, then run:** how many devices of 80 GB does (5) need for the 80B model? And if all of it
# learned? (8.5 billion numbers learn, 70.5 billion are frozen.)

# %%
guess("15.c", devices=..., if_all_learned=...)


# %%
def learning(name):  # -> how many parameters learn, how many are frozen
    parts = counts[name]
    learns = sum(parts.get(p, 0) for p in ("gated_xattn", "resampler", "eoc_embedding"))
    return learns, sum(parts.values()) - learns


# %% tags=["reveal"]
for name in paper:
    learns, frozen = learning(name)
    sizes = 16 * learns + 2 * frozen, 16 * (learns + frozen)  # equation (5)
    needs = [-(-size // 80_000_000_000) for size in sizes]
    print(f"{name:>4}: {sizes[0] / 1e9:>6.0f} GB, devices: {needs[0]}", end="")
    print(f"; if all learned {sizes[1] / 1e9:>6.0f} GB, devices: {needs[1]}")
told("15.c", devices=needs[0], if_all_learned=needs[1])

# %% [markdown]
# <details><summary>After the run</summary>
#
# Freezing saves nearly four fifths of the 80B model's bytes.
#
# </details>
#
# (Activations come on top. If every
# unit is recomputed in the backward pass, each LM layer and block keeps only its input, 2·B·L·D
# bytes: for 80B, eight pages of 256 tokens and 92 units, 3 GB.)
#
# **Sharding.** Fully sharded data parallelism ([FSDP](https://arxiv.org/abs/2304.11277)) cuts all
# of (5) into d equal parts. Before a *unit* (a layer, a block) computes, every device gathers it
# whole, in bf16, and drops it afterwards. With a largest unit of U parameters, here an LM layer, $U
# = 13 D^2 + 2D$,
#
# $$bytes(d) = \frac{16\, P_{learns} + 2\, P_{frozen}}{d} + 2\,U \qquad\qquad (6)$$
#
# This is what the library's own trainer does, its units from the inside out:

# %%
from miniflamingo.kernels.model import layers, train

source(train.shard)

# %% [markdown]
# ### Exercise 15.4: bytes a device
#
# ★★☆ · 8 minutes · 2 or 3 lines. Return float [len(devices)]: equation (6) for each number of
# devices in the array `devices`.
#
# <details><summary>Hint 1</summary>
#
# 4 + 4 + 8 bytes for a number that learns, 2 for a frozen one; both are divided by d.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The gathered unit is whole on every device, whatever d is.
#
# </details>


# %% tags=["exercise"]
def bytes_a_device(learns, frozen, unit, devices):  # three ints, int[n] -> float[n]
    ...  # your code


# %% tags=["solution"]
def bytes_a_device(learns, frozen, unit, devices):  # three ints, int[n] -> float[n]
    state = 16 * learns + 2 * frozen  # equation (5)
    return state / np.asarray(devices) + 2 * unit  # equation (6)


# %%
check("15.4", bytes_a_device)

# %%
devices = np.array([1, 2, 4, 8, 16, 32, 64])
D = {name: PRESETS[name].lm.dim for name in counts}
largest = {name: 13 * D[name] ** 2 + 2 * D[name] for name in counts}

# %% tags=["target"]
curves = {name: bytes_a_device(*learning(name), largest[name], devices) for name in counts}
everything = bytes_a_device(sum(learning("80B")), 0, largest["80B"], devices)
show(
    plots.plot_memory(
        devices, curves | {"80B, all learns": everything}, {"80 GB": 80e9, "141 GB": 141e9}
    ),
    alt="Gigabytes a device against 1 to 64 devices, both axes logarithmic, falling lines that "
    "flatten at the right. 3B fits one device of 80 GB; 9B fits one; 80B needs four of 80 GB, or "
    "two of 141 GB, full to the brim; with everything learning it needs 32 of 80 GB.",
)

# %% [markdown]
# The lines flatten where the gathered unit outweighs the share. More devices than that do not make
# a device emptier, only the step faster.
#
# **What is sent.** Each device receives the other (d − 1)/d of every unit, in bf16, for the forward
# pass and again for the backward. Of the gradients only those that learn are sent, in float32:
#
# $$sent(d) = \frac{d - 1}{d} \big( 2 \cdot 2\,(P_{learns} + P_{frozen}) + 4\, P_{learns} \big)
# \qquad\qquad (7)$$

# %%
for name in counts:
    learns, frozen = learning(name)
    ours, all_learn = (
        15 / 16 * (4 * (learns + frozen) + 4 * g) / 1e9 for g in (learns, learns + frozen)
    )
    whole = 15 / 16 * (4 * learns + 4 * learns) / 1e9
    print(
        f"{name:>4}, 16 devices: {ours:>4.0f} GB a step; if all learned {all_learn:>4.0f}; ", end=""
    )
    print(f"frozen part whole on each device ({2 * frozen / 1e9:.0f} GB): {whole:.0f}")

# %% [markdown]
# Here freezing saves less: frozen numbers must still be *there*. Where a device has room for all of
# them, as for 3B, do not shard them: the last column. None of this depends on the batch, so larger
# batches hide it behind arithmetic.
#
# **Does (6) hold?** `python -m miniflamingo plan` counts the same for any layout of devices, with
# activations and time. And it was held against what really runs: two processes cut the mini model
# between them, made one step, and each counted the bytes of its own parts. The committed figures,
# and what the first term of (6) says for d = 2:

# %%
from pathlib import Path

from miniflamingo import kernels

results = Path(kernels.__file__).parent / "results"
held = json.loads((results / "fsdp2.json").read_text())["fsdp2"]["bf16"]
parts = counted(PRESETS["mini"])
learns = parts["gated_xattn"] + parts["resampler"]
for row in held:
    print(f"{row['part']:<16} process 0, 1: {row['measured'][0]:>9,} {row['measured'][1]:>9,}")
together = sum(sum(row["measured"]) for row in held)
print(f"together {together:,}; 16 P + 2 P: {16 * learns + 2 * parts['lm']:,}")
assert together == 16 * learns + 2 * parts["lm"]  # equation (5), which both processes share

# %% [markdown]
# To the byte: the two together hold exactly (5). Process 0 has 24 bytes more of the weights than
# process 1: six gates, single numbers of 4 bytes, which can not be cut. (The model's eye is left
# out there, and it has no relative positions.)
#
# ### What a step computes (optional)
#
# **Flops.** A matrix of P numbers costs 2P flops a token: a multiplication and an addition each.
# The backward pass has a product for the gradient of the input, and one for that of the matrix.
# A frozen LM layer needs the first two of the three: no gradient of its matrix is wanted, but the
# gradient must pass *through* it to reach the blocks below. So freezing saves a third, not more:
#
# $$flops \approx tokens \cdot (6\, P_{learns} + 4\, P_{frozen}) \qquad\qquad (8)$$
#
# Torch can count what really runs. Its device "meta" has shapes and no storage, like our trick
# above. **Predict, then run:** one page of 256 tokens and 5 images in the 3B model, whose LM has
# 1.27 billion numbers and whose blocks have 1.16. How many TFLOP (10¹² of them) does the text half
# take, forward? And how many times as much does the eye take for the five images?

# %%
guess("15.d", text_tflop=..., eye_times_text=...)

# %%
import torch
from torch.utils.flop_counter import FlopCounterMode

config, (L, N), flops = PRESETS["3B"], (256, 5), {}


def count(name, function):
    with FlopCounterMode(display=False) as counter:
        out = function()
    flops[name] = counter.get_total_flops()
    return out


# %%
with torch.device("meta"):
    twin = layers.Flamingo(config)
    pixels = torch.zeros(1, N, 1, *2 * [config.vision.image_size], 3)
    tokens, phi = torch.zeros(2, 1, L, dtype=torch.int64)
    features = count("the eye, forward only", partial(twin.encode, pixels))
    media = count("resampler, forward", partial(twin.resampler, features))
    logits = count("text half, forward", partial(twin.read, tokens, media, phi, check=False))
    count("all, backward", logits.sum().backward)

# %% tags=["reveal"]
assert sum(p.numel() for p in twin.parameters()) == sum(count_parameters(config).values())
for name, number in flops.items():
    print(f"{name:<22} {number / 1e12:.2f} TFLOP")
lm, blocks = (counts["3B"][part] for part in ("lm", "gated_xattn"))
print(f"2 P tokens of the text half: {2 * (lm + blocks) * L / 1e12:.2f}")
text, eye = flops["text half, forward"], flops["the eye, forward only"]
told("15.d", text_tflop=text / 1e12, eye_times_text=eye / text, within=0.3)

# %% [markdown]
# <details><summary>After the run</summary>
#
# The rule gives 1.24 where 1.29 are counted: the keys and values are made of N·R = 320 visual
# tokens, not of 256 words, and attention itself has products without parameters. The backward
# pass of the text half costs less than twice its forward, because LM layers need one product of the
# two. And look at the first line: five pictures through the frozen eye cost about as much as
# reading the page. Features of a frozen eye can be kept, as `training` does (module 09).
#
# </details>

# %% [markdown]
# ## Real checkpoints
#
# A [safetensors](https://github.com/huggingface/safetensors) file is a length, a header in JSON
# with names, types, shapes and places, and then numbers. No code can hide in it, and the header can
# be read alone:


# %%
def header(path):  # -> {name: {"dtype", "shape", "data_offsets"}}
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


names = header(WEIGHTS / "flamingo" / "model.safetensors")
configuration = json.loads(names.pop("__metadata__")["flamingo"])
print(len(names), "tensors; alpha of layer 2:", names["gated_xattn.2.alpha_xattn"])
print({k: configuration[k] for k in ("xattn_every", "xattn_heads", "xattn_head_dim")})

# %% [markdown]
# A name is a path through the attributes, in NumPy as in torch, and each linear weight is
# [out, in] in both. So the NumPy model's file *is* the torch model's file. From one checkpoint, the
# same logits up to rounding:

# %%
from safetensors.torch import load_file

twin = layers.Flamingo(shipped.config)
twin.load_state_dict(load_file(WEIGHTS / "flamingo" / "model.safetensors"))
rng = np.random.default_rng(0)
tokens, media = rng.integers(4, 60, (2, 12)), rng.normal(size=(2, 3, 8, 64)).astype(np.float32)
tokens[:, [1, 6]] = shipped.config.image_token
phi = xattn.compute_phi(tokens, shipped.config.image_token)

# %%
ours = shipped.read(tokens, media, phi)
with torch.no_grad():
    theirs = twin.read(*map(torch.from_numpy, (tokens, media, phi))).numpy()
assert ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-4)

# %% [markdown]
# ### Another decoder (optional)
#
# A pre-trained LM of another project brings names of its own. `kernels/model/adapter.py` leaves
# them alone: a hook in front of every n-th block passes the hidden states through a block of ours,
# and the inserted layers are saved apart. (Tested with GPT-2 and LLaMA of `transformers`.)

# %%
from miniflamingo.kernels.model.adapter import insert_into

source(insert_into)

# %%
decoder = layers.LanguageModel(replace(shipped.config.lm, depth=4))  # any decoder will do
given = torch.from_numpy(tokens)
with torch.no_grad():
    before = decoder(given)
    gated = insert_into(decoder.blocks, 2, dim=64, media_dim=64, heads=4, head_dim=16)
    with gated.reading(torch.from_numpy(media), torch.from_numpy(phi)):
        after = decoder(given)
print("blocks before layers 0 and 2; gates shut, logits the same:", torch.equal(before, after))
print(list(gated.state_dict())[:3])

# %% [markdown]
# ### Other projects' gated blocks (optional)
#
# | | ours | open-flamingo | IDEFICS (transformers) |
# |---|---|---|---|
# | the text's norm | `norm`, LayerNorm | `attn.norm`, LayerNorm | `input_layernorm`, RMSNorm |
# | the images' norm | `media_norm` | none | none |
# | queries | `attention.q_proj` | `attn.to_q` | `cross_attn.q_proj` |
# | keys, values | `k_proj`, `v_proj` | `attn.to_kv`, stacked | `k_proj`, `v_proj` |
# | output | `attention.out_proj` | `attn.to_out` | `cross_attn.o_proj` |
# | feed-forward | `ffw`, squared ReLU | `ff`, GELU | `mlp`, SwiGLU, 3 matrices |
# | attention's gate | `alpha_xattn`, [] | `attn_gate`, [1] | `alpha_cross_attn`, [1] |
# | the other gate | `alpha_dense`, [] | `ff_gate`, [1] | `alpha_dense`; or both [1, 1, D] |
# | before layer i if | i % n == 0 | (i + 1) % n == 0 | i % n == 0 |
#
# ### Exercise 15.5: open-flamingo's block under our names (optional)
#
# ★★★ · 14 minutes · 6 to 12 lines. `state` is {name: array} of one open-flamingo block, with
# `attn.norm.weight`, `attn.norm.bias`, `attn.to_q.weight`, `attn.to_kv.weight` (keys first, [2HK,
# D_m]), `attn.to_out.weight`, `attn_gate`, `ff.0.weight`, `ff.0.bias`, `ff.1.weight`, `ff.3.weight`
# and `ff_gate`. Return {our name: array}, without `media_norm`, which has no counterpart.
#
# <details><summary>Hint 1</summary>
#
# `np.split(x, 2)` halves the rows. A gate of ours has the shape []: `gate.reshape(())`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `ff` is a sequence: 0 the norm (ours: `ffw.norm`), 1 up, 2 the activation, 3 down.
#
# </details>


# %% tags=["exercise"]
def convert(state):  # {their name: array} -> {our name: array}
    ...  # your code


# %% tags=["solution"]
def convert(state):  # {their name: array} -> {our name: array}
    new = {"attn.norm": "norm", "ff.0": "ffw.norm", "ff.1": "ffw.up", "ff.3": "ffw.down"}
    new |= {"attn.to_q": "attention.q_proj", "attn.to_out": "attention.out_proj"}
    ours = {}
    for name, x in state.items():
        part, _, kind = name.rpartition(".")
        if part in new:
            ours[f"{new[part]}.{kind}"] = x
    halves = np.split(state["attn.to_kv.weight"], 2)
    ours["attention.k_proj.weight"], ours["attention.v_proj.weight"] = halves
    ours["alpha_xattn"], ours["alpha_dense"] = (state[f"{n}_gate"][0] for n in ("attn", "ff"))
    return ours


# %%
check("15.5", convert)

# %% [markdown]
# Names and shapes then fit. The *functions* do not: no norm on the visual tokens, and GELU where we
# have a squared ReLU. A strict loader gives the first away, as it misses two names:

# %%
from miniflamingo.course.checks.module_15 import converted, their_block

theirs = converted(their_block(D=64, D_m=64, H=4, K=16))
block = copy.deepcopy(shipped.gated_xattn[0])
try:
    block.load_state_dict(theirs)
except ValueError as error:
    print(error)

# %% [markdown]
# The second it can not see: an activation has no parameters. Whoever fills in "a norm of ones" to
# quiet the loader has a model that runs, and is another model.
#
# ## Break it
#
# Six faults that checkpoints really have, in the shipped model's file:
#
# 1. **Another head width**: the file of a model with heads of 24, in one with heads of 16.
# 2. **Other heads, same width of all heads**: 2 heads of 32 for 4 of 16.
# 3. **Transposed weights**, [in, out] for [out, in], as in
#    [GPT-2's own code](https://github.com/openai/gpt-2).
# 4. **`tan` for `tanh`** ([flamingo-pytorch, PR
#    2](https://github.com/lucidrains/flamingo-pytorch/pull/2)): the same gates, another gate
#    function.
# 5. **The wrong layers**: the blocks of layers 0, 1, 2 in reverse order.
# 6. **A wrong prefix with `strict=False`**, torch's switch that skips what does not fit.
#
# **Predict, then run:** which of them would a strict loader refuse? Write a list of their numbers,
# such as `[1, 2]`. (Fault 6 is a wrong prefix: what does it say if it may not skip anything?)

# %%
guess("15.e", refused=...)

# %%
state = load_tensors(WEIGHTS / "flamingo" / "model.safetensors")[0]
q, out = "attention.q_proj.weight", "attention.out_proj.weight"


def changed(change):  # a copy of the file's arrays, with change(name, array) in gated blocks
    return {name: change(name, x) if name.startswith("gated") else x for name, x in state.items()}


def wider(name, x):
    rows = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    if name.endswith(rows):
        return np.concatenate([x, x[:32]])
    return np.concatenate([x, x[:, :32]], axis=1) if name.endswith(out) else x


# %%
def reversed_layers(name):  # gated_xattn.0.norm.weight -> gated_xattn.2.norm.weight
    part, i, rest = name.split(".", 2)
    return f"{part}.{2 - int(i)}.{rest}"


files = {
    "heads of 24": changed(wider),
    "transposed": changed(lambda name, x: x.T if "_proj" in name else x),
    "layers reversed": changed(lambda name, x: state[reversed_layers(name)]),
    "wrong prefix": {name.replace("gated_xattn", "xattn"): x for name, x in state.items()},
}

# %% tags=["reveal"]
numbers = {"heads of 24": 1, "transposed": 3, "layers reversed": 5, "wrong prefix": 6}
broken, refused = {"the shipped model": shipped}, []
for name, arrays in files.items():
    model = copy.deepcopy(shipped)
    try:
        broken[name] = model.load_state_dict(arrays)
    except ValueError as error:
        print(f"{name}: {'; '.join(map(str.strip, str(error).splitlines()[:3]))}; ...")
        refused.append(numbers[name])
told("15.e", refused=refused)  # 2 and 4 are no faults of the file: there is nothing to refuse

# %% [markdown]
# <details><summary>After the run</summary>
#
# The two refusals quote what was expected and what came. The other faults load in silence, without
# a trace in the shapes: the matrices that are transposed are square.
#
# </details>
#
# ### The faults that load (optional)
#
# Three faults are not in a file and are made here: two heads of 32, `tan`, and `strict=False`,
# which loads all but the blocks and leaves these as they were built, with shut gates.

# %%
broken["2 heads of 32"] = copy.deepcopy(shipped)
for block in broken["2 heads of 32"].gated_xattn:
    block.attention.heads, block.attention.head_dim = 2, 32
broken["tan for tanh"] = shipped
fresh = type(shipped)(shipped.config, rng=np.random.default_rng(0))
rest = {name: x for name, x in files["wrong prefix"].items() if not name.startswith("xattn")}
broken["wrong prefix, not strict"] = fresh.load_state_dict({**fresh.state_dict(), **rest})

# %% [markdown]
# Two ways to notice. *Golden logits*: whoever saves a checkpoint stores a few logits that it must
# give. And an examination, here sixty captions of new pictures, exactly right or not.
#
# **Predict, then run:** five models load: those of the faults 2 to 5, and of fault 6 with
# `strict=False`. How many of the five do the golden logits catch? Which fault costs the fewest
# captions, and which the second fewest? Write their numbers. And think about it: which of them
# would a look at a few fluent captions not show?

# %%
guess("15.f", golden_logits_catch=..., fewest=..., second_fewest=...)

# %%
from unittest.mock import patch

from miniflamingo.evaluation import Evaluation


def tan_gate(y, alpha, branch):
    return y + np.tan(alpha.data) * branch


# %% tags=["reveal"]
numbers |= {"2 heads of 32": 2, "tan for tanh": 4, "wrong prefix, not strict": 6}
caught, rights = 0, {}
print(f"{'':<26}{'golden logits':>14}{'captions right':>16}")
for name, model in broken.items():
    gate = tan_gate if name == "tan for tanh" else xattn.tanh_gate
    with patch.object(xattn, "tanh_gate", gate):
        same = np.allclose(model.read(tokens, media, phi), ours, atol=1e-3)
        right = Evaluation(model, samples=60, per_class=3).captions()["seen"]["accuracy"]
    print(f"{name:<26}{'same' if same else 'differ':>14}{right:>16.1f}")
    if name in numbers:
        caught, rights[numbers[name]] = caught + (not same), right
fewest, second_fewest, *_ = sorted(rights, key=rights.get, reverse=True)
told("15.f", golden_logits_catch=caught, fewest=fewest, second_fewest=second_fewest)

# %% [markdown]
# <details><summary>After the run</summary>
#
# Golden logits catch every one, at the price of a few numbers beside the file. The examination does
# not: `tan` is nearly `tanh` as long as the gates are nearly shut, and shows only in a model that
# opened them wide; the wrong heads cost two captions in ten, which a tired reader takes for a
# poorly trained model. The last row is treacherous in another way. With shut gates the model *is*
# the language model: its text is flawless, and it has never looked at a picture.
#
# </details>

# %% [markdown]
# ## At the end: many devices (optional)
#
# ### Two processes, for real
#
# No GPU is needed to cut a model into two. Two processes on the CPU do it, with gloo to send what
# has to be sent. Each builds the mini model, `train.shard` cuts it (FSDP2, torch's second version),
# they make one step of AdamW together, and each counts the bytes of its own parts. It takes some
# seconds, most of which go into starting.

# %%
from importlib.util import find_spec

rows = []
if find_spec("torch"):
    from miniflamingo.kernels.model import resident

    rows = resident.measure(PRESETS["mini"], "bf16")
else:
    print("torch is not installed here, so no processes were started: the figures behind (7) stand")
for i, own in enumerate(rows):
    print(f"process {i}:", ", ".join(f"{part} {size:,}" for part, size in own.items()))
print(f"together {sum(sum(own.values()) for own in rows):,} bytes, (5) says {together:,}")

# %% [markdown]
# ### A plan for the 80B model
#
# FSDP is one way to spread a model. [ZeRO](https://arxiv.org/abs/1910.02054) stage 1 cuts the
# optimiser's moments alone; [tensor parallelism](https://arxiv.org/abs/1909.08053) cuts every
# matrix, and adds up what the parts give; a pipeline gives each device some layers. The planner
# counts all four, with what (6) leaves out: gradients (here in bf16, as in the paper), activations,
# and time.
#
# **Predict, then run:** the 80B model on 16 devices of 141 GB, of which a tenth is left free. Which
# of `"ZeRO-1"`, `"FSDP2"`, `"tensor 16"` and `"pipeline 16"` do not fit? Write a list.

# %%
guess("15.g", do_not_fit=...)

# %%
from miniflamingo.cost import commands
from miniflamingo.cost.devices import find
from miniflamingo.cost.plan import Layout, Training, quickest

ways = {"ZeRO-1": Layout(16, sharding="zero1"), "FSDP2": Layout(16, sharding="fsdp2"),
        "tensor 16": Layout(16, tensor=16), "pipeline 16": Layout(16, pipeline=16)}  # fmt: skip
plans = {name: quickest(PRESETS["80B"], Training(), way, find("h200"))
         for name, way in ways.items()}  # fmt: skip

# %% tags=["reveal"]
for name, plan in plans.items():
    print(f"{name:<12}{sum(plan.memory().values()) / 1e9:>5.0f} GB,", end=" ")
    print(f"{sum(plan.seconds().values()):>5.1f} seconds a step")
told("15.g", do_not_fit=[name for name, plan in plans.items() if not plan.fits()])

# %% tags=["reveal"]
document = {name: commands.as_data(plan) for name, plan in plans.items()}
show(
    plots.plot_plan({"model": "80B", "device": "h200", "plans": document}),
    alt="Four bars of gigabytes on the fullest of 16 devices, one for each way to spread the 80B "
    "model, cut into frozen weights, trained weights, gradients, moments, activations, logits and "
    "buffers, beside two dashed lines: what a device has, and what of it is given away.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# With ZeRO-1 every device holds all weights, and 141 GB of frozen ones alone are too many. The
# other three fit. They differ in what they send and when: the sums of tensor parallelism can not
# hide behind other work, which makes it the slowest here. (Seconds are counted, at half of the
# datasheet's peak; nothing of this was timed.)
#
# </details>
#
# **The paper's own run.** It names 1,536 devices and 15 days, and states no batch sizes. The
# planner asks the other way round: how many sequences of each data set could a step have, if
# products reach a given share of the peak?

# %%
paper_run = json.loads((results / "plan.json").read_text())["paper"]
for row in paper_run["at"]:
    print(f"{row['utilisation']:.0%} of the peak, {paper_run['paper_days']} days:", end=" ")
    print(f"{row['batch']:,.0f} sequences of each data set a step")

# %% [markdown]
# At 40 % of the peak, 15 days afford about 2,400 sequences of each data set a step. That is a count
# with its assumptions (500,000 steps, the lengths of the mixture, computing alone), and no
# statement of the paper. `python -m miniflamingo plan --paper` prints them all.

# %% [markdown]
# ## Takeaways
#
# - Sizes follow from five numbers, and a count that disagrees with a table may be right: the 9B row
#   fits 32 layers, not the 40 that it states.
# - A frozen number costs 2 bytes, one that learns 16. Freezing saves memory and gradients' traffic;
#   it saves only one of three products, and frozen numbers must still be gathered.
# - FSDP divides the state by d and adds one whole unit; two processes hold it to the byte. Count
#   before you rent.
# - Names and shapes are the least that a checkpoint must match. Head counts, activations, gate
#   functions, places of layers and layouts of square matrices have no shape: store golden logits.
#
# **In the paper:** Table 5 (sizes); section 2.4 (3.2 in its first version) and appendix B.1.2 on
# training: 1,536 TPUv4 for 15 days, the model sharded over 16. Equations (5) to (8) are our
# arithmetic.
#
# **Next:** module 16, a real one: a language model that knows English, an eye that knows
# photographs, and what the bridge between them can say. `python -m miniflamingo sizes` prints this
# module's counts, `python -m miniflamingo train-torch --help` what shards.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** Somebody unfreezes the LM of the 3B model (1.27 billion numbers). By how much does (5)
# grow, and by how much (8)?
#
# <details><summary>Answer</summary>
#
# A number that was frozen cost 2 bytes and now costs 16: 14 more each, so about 18 GB. Its flops a
# token grow from 4 to 6: by a half for the LM's part. So memory suffers far more than arithmetic.
#
# </details>
#
# **2.** A model fits 16 devices under FSDP with 30 GB each. Do 32 devices hold it with 15 GB each?
#
# <details><summary>Answer</summary>
#
# Only the first term of (6) is halved. The gathered unit stays whole on every device, and so do the
# activations of a device's own rows of the batch. It is less than 30 and more than 15.
#
# </details>
#
# **3.** A checkpoint of 8 heads of 16 is loaded into a model with 4 heads of 32, and a strict
# loader says nothing. Why, and which is the cheapest test that shows it?
#
# <details><summary>Answer</summary>
#
# All matrices have the shapes [128, D] or [D, 128] in both, because only H·K stands in a shape. The
# split into heads is in the code. A few logits, stored beside the checkpoint by whoever saved it,
# differ at once; fluent text may well not.
#
# </details>
