# %% [markdown]
# # 14 Speed: bytes, flops, the roofline
#
# **The question: how fast could this possibly be, and what is a measured time worth?**
#
# After this module you can
#
# - count the bytes and the flops of image-causal attention, forward and backward, and say why the
#   memory decides its speed and not the arithmetic;
# - draw a roofline, put a kernel under it, and measure one of your own machine;
# - time work that runs behind your back, and say what a time that was taken too early is worth;
# - (optional) say what fusing saves and when it is not worth it, read registers and occupancy from
#   compiled code, and name three more ways in which a benchmark lies.
#
# **You need:** φ and image-causal masking (module 07), the kernels (modules 12 and 13), and torch
# (`pip install -e ".[course,kernels]"`); no GPU, and Triton only to compile.
#
# **Time:** about 50 minutes for the core path, and 50 for what is marked optional. Computing takes
# about 4 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 8: the roofline figure, (1) and (2). 8 to 14: (3) and (4) by hand, exercise 14.1
# until 21. 21 to 26: exercise 14.2. 26 to 30: guess 14.a. 30 to 38: the roof of the machine in
# front of you and guess 14.b. 38 to 53: the launch that is timed too early, exercise 14.5. The
# optional parts are independent of each other.
#
# **Predictions.** 14.a: 4 times, and 5.6 times; who expects the floor to grow with the square takes
# heads for a side of the score matrix. 14.b: the dense mask reaches a similar or a higher rate and
# takes several times as long (on the machine of the committed notebook 1.2 and 6.7); most expect a
# lower rate, because they take a rate for a merit. 14.c: it shrinks; 20 % at 2048. 14.d: 4 and 0.
# 14.e: 50, 30.6, 25.5 and 25; who answers 50, 30, 20 and 10 forgets the memory's 25. 14.f: well
# above 1 (the cache), and about 1. 14.g: 6 % over the whole tensor, and 1.5 in the worst row.
#
# **Open questions.** "Is there a file of times from a GPU?" The cell says so; without one it prints
# the command that makes it.
#
# **Misconceptions.** "A high rate is good": not if the work is thrown away. "More flops take
# longer": not left of the ridge. "Occupancy is speed": it hides waiting, and no more. "The fastest
# run is the truth": it may be the one that the cache paid for.
#
# **To cut.** First guess 14.a, then exercise 14.2 (one line), then the loop over `traffic`. Keep
# 14.b and 14.5.

# %% [markdown]
# **What is measured here, and what is not.** Every *time* below is taken live, on the processor in
# front of you. Everything about GPUs is *counted*, read from compiled code, or *predicted* from
# both. This project has not been timed on a GPU so far; where a file of such times exists, the last
# cells draw it.

# %% [markdown]
# ## The picture and the letters
#
# A machine has two speeds: bytes a second from memory, and flops a second (multiplications and
# additions) in its units. As an example we *assume* an H200 with 4.3 TB/s and 790 TFLOP/s in bf16.
# That is what others measured on such a machine with a large copy and a large product; it is not a
# measurement of this project.

# %%
import json
import time
from pathlib import Path

import numpy as np

from miniflamingo import kernels, plots, xattn
from miniflamingo.attention import attention
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.course.triton_cpu import torch

BANDWIDTH, PEAK = 4.3e12, 790e12  # assumed: bytes a second, flops a second

# %% [markdown]
# | letter | meaning | here |
# |---|---|---|
# | B, L | pages, and text tokens of one | 8, 2048 |
# | N, R | images of a page, visual tokens of one | 32, 64 |
# | H, K | heads, and the width of one (3B: 16, 128) | 16, 128 |
# | D | width of the text | 2048 |
# | e | bytes that a number takes; 2 in bf16, 4 in float32 | 2 |
# | $\beta$, $\pi$ | bytes a second, flops a second | |

# %%
B, L, N, R, H, K, D = 8, 2048, 32, 64, 16, 128, 2048
tokens, media, rows = B * L * H * K, B * N * R * H * K, B * L
work = {  # flops, bytes, and no time: these are only counted
    "gate alone, y + g·b": (2 * rows * D, 2 * 3 * rows * D, None),
    "decoding one token": (4 * R * B * H * K, 4 * (B * H * K + B * R * H * K), None),
    "image-causal, forward": (4 * R * tokens, 4 * (tokens + media), None),
    "image-causal, backward": (10 * R * tokens, 2 * (3 * tokens + 4 * media), None),
    "under a dense mask": (4 * R * N * tokens, 4 * (tokens + media), None),
    "product D to 4D": (8 * rows * D * D, 2 * (5 * rows * D + 4 * D * D), None),
}
show(
    plots.plot_roof(BANDWIDTH, PEAK, work, "counted, under an assumed H200's roof"),
    alt="A roofline: the rate in flops a second rises with the intensity, flops a byte, until the "
    "ridge at 184 and is flat from there on. On the slope, from left to right: the gate alone, "
    "decoding one token, image-causal attention forward at 32 and backward at 46. On the flat "
    "part: attention under a dense mask at 1024, and the feed-forward's product.",
)

# %% [markdown]
# Hollow marks are the most that each could reach. Four of the six lie on the slope: for them, units
# wait for memory. This module is about how to find such a point, and how far below it one is.
#
# ## The derivation
#
# Something that must move bytes and do flops takes at least as long as either alone:
#
# $$time \;\ge\; \max\Big( \frac{bytes}{\beta}, \; \frac{flops}{\pi} \Big) \qquad\qquad (1)$$
#
# (At best the two overlap completely.) The first is the larger one where
# $bytes / \beta > flops / \pi$. Multiply both sides by $\pi$ and divide by the bytes: which one it
# is depends on the *intensity* alone,
#
# $$intensity = \frac{flops}{bytes}, \qquad \text{memory-bound} \iff
# intensity \lt \frac{\pi}{\beta}, \text{ the ridge} \qquad (2)$$
#
# **Forward.** Each token and head reads q and writes o, K numbers each; each image gives keys and
# values, R·K each. Two products, scores and output, cost 2RK flops a token and head each:
#
# $$bytes = e\,(2\,BLHK + 2\,BNRHK), \qquad flops = 4\,R \cdot BLHK \qquad\qquad (3)$$
#
# Divide, and B, H and K drop out: $intensity = \frac{2R}{e\,(1 + NR/L)}$. With R = 64, e = 2 and a
# page whose visual tokens are as many as its words (NR = L), that is **32 flops a byte**, far below
# 184. No choice of heads changes that. Scores and weights are not among the bytes: R = 64 of them
# fit on the chip.
#
# **Backward.** In: q, k, v and do. Out: dq, dk, dv. The scores are computed again, so there are
# five products:
#
# $$bytes = e\,(3\,BLHK + 4\,BNRHK), \qquad flops = 10\,R \cdot BLHK \qquad\qquad (4)$$
#
# **A dense mask** does (3) for all N images: N times the flops, for the same result. That takes the
# point over the ridge, to 1024 flops a byte: *compute-bound, on work that is thrown away*. A high
# intensity is no merit, and a high share of the peak is none either. Time is.

# %% [markdown]
# ## Counting, three ways
#
# With a loop over the arrays that cross the memory's bus. Nothing here is estimated:


# %%
def traffic(shapes, size):  # {array: shape} -> bytes
    total = 0
    for name, shape in shapes.items():
        total += size * int(np.prod(shape))
        print(f"{name}: {size * np.prod(shape) / 1e6:.1f} MB", end="  ")
    return total


text, images = (B, L, H, K), (B, N, R, H, K)
moved = traffic({"q": text, "k": images, "v": images, "o": text}, 2)
print(f"\nsum {moved / 1e6:.0f} MB, at least {moved / BANDWIDTH * 1e6:.0f} microseconds")

# %% [markdown]
# ### Exercise 14.1: bytes and flops
#
# ★☆☆ · 7 minutes · 3 or 4 lines. Return int [2], equation (3): bytes and flops of the forward pass,
# with `size` bytes a number, for tokens that all have an image.
#
# <details><summary>Hint 1</summary>
#
# `tokens = B * L * H * K` numbers in q and in o, `media = B * N * R * H * K` in k and in v.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A token attends to R keys, whatever N is. N is in the bytes, not in the flops.
#
# </details>


# %% tags=["exercise"]
def forward_work(B, L, N, R, H, K, size):  # seven ints -> int[2]
    ...  # your code


# %% tags=["solution"]
def forward_work(B, L, N, R, H, K, size):  # seven ints -> int[2]
    text_numbers, image_numbers = B * L * H * K, B * N * R * H * K
    return np.array([size * 2 * (text_numbers + image_numbers), 4 * R * text_numbers])  # (3)


# %%
check("14.1", forward_work)

# %% [markdown]
# The benchmark's own count knows one thing more: a token with φ = 0 reads nothing, and an image
# that no token looks at is not read. It counts numbers, not bytes:

# %%
from miniflamingo.kernels.tools import bench_entries

source(bench_entries.attention_work)


# %%
def counted(shape, backward=False):  # by the benchmark -> bytes in bf16, flops
    sizes = ([shape[letter] for letter in letters] for letters in ("BLHK", "BNRHK"))
    q, k = (torch.empty(size, device="meta") for size in sizes)
    arguments = q, k, k, bench_entries.make_phi(shape)
    numbers, flops = bench_entries.attention_work(shape, arguments, backward)
    return 2 * numbers, flops


shape = dict(B=B, L=L, N=N, R=R, H=H, K=K, phi="even")
assert counted(shape) == (2 * (2 * tokens + 2 * media), 4 * R * tokens)  # equation (3)

# %% [markdown]
# ### Exercise 14.2: the floor
#
# ★☆☆ · 5 minutes · 1 line. Return float [n], in seconds: equation (1) for each pair of the arrays
# `moved` (bytes) and `flops`.
#
# <details><summary>Hint</summary>
#
# `np.maximum` compares two arrays place by place; `np.max` finds the largest of one.
#
# </details>


# %% tags=["exercise"]
def floor(moved, flops, bandwidth, peak):  # [n], [n], float, float -> float[n]
    ...  # your code


# %% tags=["solution"]
def floor(moved, flops, bandwidth, peak):  # [n], [n], float, float -> float[n]
    return np.maximum(moved / bandwidth, flops / peak)  # equation (1)


# %%
check("14.2", floor)

# %% [markdown]
# **Predict, then run:** the 80B model has 64 heads of 128 instead of 16. How many times as long is
# its floor, forward? And how many times as long as the *whole* image-causal forward does the
# arithmetic of a dense mask alone take, here with 32 images?

# %%
guess("14.a", floor_times=..., dense_times=...)

# %% tags=["reveal"]
floors = {}  # heads, width -> microseconds of the forward
print("heads x width   forward MB    us   backward MB    us   dense, flops")
for H_, K_ in ((16, 64), (16, 128), (32, 128), (64, 128)):
    shape = dict(B=B, L=L, N=N, R=R, H=H_, K=K_, phi="even")
    (forward, flops), (both, _) = counted(shape), counted(shape, backward=True)
    parts = [forward / 1e6, forward / BANDWIDTH * 1e6]
    parts += [(both - forward) / 1e6, (both - forward) / BANDWIDTH * 1e6, N * flops / PEAK * 1e6]
    row = "{:>13.0f}{:>6.0f}{:>14.0f}{:>6.0f}{:>12.0f} us".format(*parts)
    print(f"{H_:>2} x {K_:<10}{row}")
    floors[H_, K_], dense = parts[1], parts[-1]
times = floors[64, 128] / floors[16, 128]
told("14.a", floor_times=times, dense_times=dense / floors[64, 128], within=0.2)

# %% [markdown]
# <details><summary>After the run</summary>
#
# (Counted, at the assumed bandwidth and rate.) Four times the heads, four times everything. And the
# dense mask's arithmetic alone takes more than five times as long as all that image-causal
# attention has to do.
#
# </details>

# %% [markdown]
# ## The roof of the machine in front of you
#
# No GPU is needed to measure a roofline. The bandwidth: a copy far larger than the cache, which
# reads and writes. The rate: a large product of matrices. We take processor time, which a busy
# machine disturbs less than a wall clock, and the median of several calls after two that do not
# count.


# %%
def seconds(function, repeats=7):
    taken = []
    for _ in range(2 + repeats):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return float(np.median(taken[2:]))


# %% tags=["volatile"]
a, b = np.ones((2, 2**25), np.float32)
square = np.ones((768, 768), np.float32)
bandwidth = 2 * a.nbytes / seconds(lambda: np.copyto(b, a))
peak = 2 * 768**3 / seconds(lambda: square @ square)
print(f"copy {bandwidth / 1e9:.1f} GB/s, product {peak / 1e9:.0f} GFLOP/s", end=", ")
print(f"ridge {peak / bandwidth:.0f} flops a byte")


# %% [markdown]
# Under it we put the library's attention in NumPy, and the same by the dense mask. One shape, with
# intensities by equation (3):


# %%
def dense_attention(q, k, v, phi):
    mask = xattn.image_causal_mask(phi, *k.shape[1:3])[:, None]
    k, v = (x.reshape(len(x), -1, *x.shape[3:]).swapaxes(1, 2) for x in (k, v))
    return attention(q.swapaxes(1, 2), k, v, mask).swapaxes(1, 2)


rng, small = np.random.default_rng(0), dict(B=1, L=512, N=8, R=64, H=4, K=64)
q = rng.normal(size=(1, 512, 4, 64)).astype(np.float32)
k, v = rng.normal(size=(2, 1, 8, 64, 4, 64)).astype(np.float32)
phi = 1 + np.arange(512)[None] * 8 // 512
ours = xattn.image_causal_attention(q, k, v, phi)
assert np.allclose(ours, dense_attention(q, k, v, phi), atol=1e-5)

# %% [markdown]
# **Predict, then run:** about how many times the *rate* of image-causal attention, in flops a
# second, does the dense mask reach? And about how many times its *time* does it take? (Where you
# expect less, the number is below 1.)

# %%
guess("14.b", rate_times=..., time_times=...)

# %% tags=["volatile", "reveal"]
flops, moved = 4 * 64 * q.size, 2 * q.nbytes + 2 * k.nbytes
times = {"image-causal": seconds(lambda: xattn.image_causal_attention(q, k, v, phi)),
         "dense mask": seconds(lambda: dense_attention(q, k, v, phi))}  # fmt: skip
points = {"image-causal": (flops, moved, times["image-causal"]),
          "dense mask": (8 * flops, moved, times["dense mask"]),
          "product": (2 * 768**3, 3 * square.nbytes, seconds(lambda: square @ square))}  # fmt: skip
for name, t in times.items():
    least = max(points[name][0] / peak, moved / bandwidth)
    print(f"{name:<13} {t * 1e3:>6.1f} ms, {points[name][0] / t / 1e9:>5.1f} GFLOP/s", end="")
    print(f", {100 * least / t:.0f} % of its own floor", end=", ")
    arithmetic = points[name][0] / moved > peak / bandwidth  # equation (2), on this machine
    print(f"bound by {'arithmetic' if arithmetic else 'memory'}")
longer = times["dense mask"] / times["image-causal"]
told("14.b", rate_times=8 / longer, time_times=longer, within=0.5)  # 8 times the flops

# %% tags=["volatile", "reveal"]
show(
    plots.plot_roof(bandwidth, peak, points, "measured here, in NumPy, on one core"),
    alt="The roofline of this machine, measured, with three filled marks: the product on the roof, "
    "and image-causal attention and attention under a dense mask below it. The dense mask's mark "
    "lies further right, at eight times the intensity.",
)

# %% [markdown]
# **Another machine, another bound.** Image-causal attention is memory-bound on a GPU, not by
# nature. In float32 this shape has 16 flops a byte, by equation (3). Under the GPU's roof that
# would be far left of the ridge, and memory decides. A core of a CPU has few flops for each byte.
# Where its ridge, printed above, is below 16, the image-causal mark stands under the *flat* part of
# the roof: **on such a CPU the same attention is bound by arithmetic, and not by memory.** The cell
# above says which of the two holds on the machine that ran it.
#
# <details><summary>After the run</summary>
#
# The dense mask may come as close to the roof, or closer, and still be slower: it does eight times
# the work. That is why a benchmark must report time against the floor *of the task*, not of the
# implementation.
#
# </details>
#
# NumPy stays well below its floor, because it writes every intermediate result, scores, weights,
# sorted copies, into memory and reads it back. These are bytes that (3) does not have. To keep them
# on the chip is what *fusing* means.
#
# ## What fusing saves (optional)
#
# Take the gate behind a product, $\mathbf{Y} = \mathbf{X} + \tanh(\alpha) \, \mathbf{A}
# \mathbf{W}^\top$, with A [L, I], W [D, I], and X and Y [L, D]; L counts the tokens of all pages
# here. Every way reads A and W and writes Y. Beyond that there are three ways:
#
# - **as the paper writes it** ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.2):
#   the branch $\mathbf{A}\mathbf{W}^\top$ is written and read, gate · branch is written and read, X
#   is read: 5 LD numbers;
# - **addmm**: torch folds the gate into a copy of W (read, written: 2 DI), copies X into Y (2 LD),
#   and the product reads that once more (1 LD);
# - **fused**: the sums are still in registers when they are scaled; only X is read: 1 LD.   (5)
#
# ### Exercise 14.3: three ways to shut a gate (optional)
#
# ★★☆ · 9 minutes · 3 to 5 lines. Return int [3]: all bytes that the three ways move, `size` bytes a
# number, in this order.
#
# <details><summary>Hint 1</summary>
#
# In every way: `L * I + D * I + L * D`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Add 5·L·D, or 3·L·D + 2·D·I, or L·D; then multiply by `size`.
#
# </details>


# %% tags=["exercise"]
def gate_bytes(L, D, I, size):  # four ints -> int[3]
    ...  # your code


# %% tags=["solution"]
def gate_bytes(L, D, I, size):  # four ints -> int[3]
    in_every_way = L * I + D * I + L * D
    extra = np.array([5 * L * D, 3 * L * D + 2 * D * I, L * D])  # (5)
    return size * (in_every_way + extra)


# %%
check("14.3", gate_bytes)

# %% [markdown]
# **Predict, then run:** the product gets its speed from cuBLAS, which a kernel of our own does not
# quite reach. Saving time t on a product of time T pays as long as the kernel loses less than t /
# T. Does that share `"grow"` or `"shrink"` with the width? And what is it at a width of 2048 (I =
# D), in percent? The fused way spares 2 LD + 2 DI numbers of addmm's, by (5).

# %%
guess("14.c", with_the_width=..., percent_at_2048=...)

# %% tags=["reveal"]
shares = []
print("   I = D    product us    saved us over addmm    pays while it loses less than")
for width in (2048, 4096, 8192):
    product = 2 * rows * width * width / PEAK
    saved = 2 * 2 * (rows * width + width * width) / BANDWIDTH  # addmm - fused, by (5)
    print(f"{width:>8}{product * 1e6:>12.0f}{saved * 1e6:>17.0f}{saved / product:>28.0%}")
    shares.append(saved / product)
trend = "grow" if shares[-1] > shares[0] else "shrink"
told("14.c", with_the_width=trend, percent_at_2048=100 * shares[0], within=0.2)

# %% [markdown]
# <details><summary>After the run</summary>
#
# It shrinks: the product grows with the square of the width, the pass that is saved linearly. How
# much a product written in Triton loses to cuBLAS, only a measurement can say. At a width of 2048
# there is room for such a loss; at 8192 there is next to none, because the product is so large that
# it hides everything else.
#
# </details>
#
# This product is also a small part of its block. Both gates (I = D and I = 4D), of the time that
# all products of a block take, forward and backward:

# %% tags=["reveal"]
for width in (2048, 4096, 8192):
    block = 60 * rows * width * width / PEAK
    saved = 2 * (4 * rows * width + 10 * width * width) / BANDWIDTH
    print(f"D = {width}: {saved / block:.1%} of the block's products")

# %% [markdown]
# A kernel of one's own has to be read, tested and kept in step with its compiler, for years. The
# library calls addmm, and has kernels where the count is of another order: in the attention.

# %% [markdown]
# ## What compiled code tells (optional)
#
# Triton compiles for GPUs that are not there (`python -m miniflamingo compile`). A binary says how
# many registers a thread needs. Registers decide how many *warps* (32 threads each) a
# multiprocessor (SM) can hold. Many warps hide the wait for memory: one waits, others compute.
#
# An SM has four schedulers. Each has 512 registers for each of a warp's 32 lanes, holds at most 16
# warps, and gives a warp a multiple of 8. Only whole programs (of `num_warps` warps) are resident:
#
# $$warps = w \Big\lfloor \frac{1}{w} \min \Big( 64, \; 4 \Big\lfloor
# \frac{512}{8 \lceil registers / 8 \rceil} \Big\rfloor \Big) \Big\rfloor,
# \qquad w = \text{num\_warps} \qquad (6)$$
#
# ### Exercise 14.4: occupancy, and what would raise it (optional)
#
# ★★☆ · 13 minutes · 8 to 11 lines. For kernels of `registers` int [n] a thread return int [n, 2]:
# the warps of equation (6), and how many registers a thread would have to do without, at least,
# until the SM holds *one program more*; 0 where it holds as many programs as it ever can. That is
# what one wants to know before one shortens a kernel: two registers may do, or twenty not yet.
#
# <details><summary>Hint 1</summary>
#
# Write (6) as a function of its own, for one number of registers; you will ask it often. Rounding
# up to a multiple of 8 in whole numbers: the floor division of a negative number rounds up.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For each kernel, take away one register after the other until (6) gives more than before. And how
# many warps are there at the most? With 1 register a thread nothing but the 64 limits them.
#
# </details>


# %% tags=["exercise"]
def occupancy(registers, num_warps):  # int[n], int -> int[n, 2]
    ...  # your code


# %% tags=["solution"]
def occupancy(registers, num_warps):  # int[n], int -> int[n, 2]
    def held(r):  # equation (6)
        rounded = -(-r // 8) * 8
        return min(64, 4 * (512 // rounded)) // num_warps * num_warps

    kernels = []
    for r in registers:
        fewer = r
        while held(fewer) == held(r) < held(1):
            fewer -= 1
        kernels.append([held(r), r - fewer])
    return np.array(kernels)


# %%
check("14.4", occupancy)

# %% [markdown]
# The library's version counts programs, and knows two more limits: how many programs an SM takes,
# and their shared memory.

# %%
from miniflamingo.kernels.tools.compile import resident

source(resident)

# %% [markdown]
# **Predict, then run:** in programs of four warps, how many resident warps does the 65th register
# of a thread cost, and how many the 66th?

# %%
guess("14.d", the_65th_costs=..., the_66th_costs=...)

# %%
steps = np.arange(16, 256)
allowed = np.array([4 * resident("sm_90", int(r), shared=0, num_warps=4)[0] for r in steps])

# %% tags=["reveal"]
for r in (64, 65, 66, 72, 73):
    print(f"{r} registers: {allowed[r - 16]} warps", end="   ")
costs = -np.diff(allowed)  # of the 17th register, the 18th, ...
told("14.d", the_65th_costs=costs[65 - 17], the_66th_costs=costs[66 - 17])

# %% tags=["target"]
warps, spare = occupancy(steps, 4).T
assert np.array_equal(warps, allowed) and spare[100 - 16] == 4  # of 100 registers 4 are too many
show(
    plots.plot_occupancy(steps, warps, {}),
    alt="Warps at a time against registers a thread, for programs of four warps: 64 warps up to 32 "
    "registers, then a falling staircase: 32 at 64, 16 at 128, 8 at 255.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# One register more can cost an eighth of the warps, or nothing: a staircase.
#
# </details>
#
# What this package's kernels have is in `kernels/results/compiled.json` (`forward` and `backward`
# are those of image-causal attention). Shared memory is a second limit, and a program of eight
# warps fits less well than one of four: such kernels lie below the staircase.

# %% tags=["volatile"]
results = Path(kernels.__file__).parent / "results"
if (results / "compiled.json").exists():
    compiled = json.loads((results / "compiled.json").read_text())
    rows = [dict(zip(compiled["columns"], row)) for row in compiled["rows"]]
    case = ("sm_90", "bf16", 128, 64)
    chosen = [r for r in rows if (r["target"], r["dtype"], r["K"], r["R"]) == case]
    found = {r["kernel"].strip("_"): (r["registers"], r["warps"]) for r in chosen}
    show(
        plots.plot_occupancy(steps, allowed, found),
        alt="The staircase of warps against registers, and on or below it a mark for each kernel "
        "compiled for sm_90 in bf16 at K = 128, R = 64, with its registers and its warps.",
    )
else:
    print("not compiled yet: python -m miniflamingo compile --full --json FILE")

# %% [markdown]
# ## A card one does not have (optional)
#
# A floor is what a card could do at best. What a *kernel* should do on it can be said beforehand,
# too: `python -m miniflamingo predict` runs a kernel's Python on shapes, which tells the turns of
# its loops and the bytes, and reads the loops' instructions and latencies from the compiled code.
# Then programs enter the card's places, and share what there is:

# %%
from miniflamingo.kernels.tools import predict

source(predict.share)

# %% [markdown]
# **Predict, then run:** 640 programs take 10 microseconds each, alone. The memory needs 25 for all
# of them. How many microseconds do they take where a card has room for 132 at a time? For 264, 396
# and 640?

# %%
guess("14.e", places_132=..., places_264=..., places_396=..., places_640=...)

# %% tags=["reveal"]
microseconds = {}
for places in (132, 264, 396, 640):
    waves, taken = -(-640 // places), predict.share([10.0] * 640, places, 25.0)
    print(f"{places} places: {taken:.1f} us, in waves: {waves}")
    microseconds[f"places_{places}"] = taken
told("14.e", **microseconds)

# %% [markdown]
# <details><summary>After the run</summary>
#
# Few places: the waves decide, and the memory idles. Many: the memory decides, and more places help
# no more.
#
# </details>
#
# For this package's kernels the file says which of the two decides. It is a prediction, committed
# before any measurement, and the benchmark prints it beside the time, for the time to judge it.

# %% tags=["volatile"]
if rows := predict.committed().get("records"):
    for r in rows:
        heads = r["entry"], r["shape"]["H"], r["shape"]["K"]
        if (r["device"], *heads) == ("H200", "image_causal_attention", 16, 128):
            print(f"N = {r['shape']['N']:>2}, {r['direction']:<9}{r['us']:>6.0f} us", end=", ")
            print(f"{r['percent']:.0f} % of what the floor allows; binds: {r['binds']}")
    show(
        plots.plot_prediction(rows),
        alt="Predicted, not measured: microseconds against the number of images for four cards, "
        "forward above and backward below, each line above the dotted floor of its card.",
    )
else:
    print("not predicted yet: python -m miniflamingo predict --json kernels/results/predicted.json")

# %% [markdown]
# ## How the benchmark measures (optional)
#
# `kernels/tools/bench.py` first measures the machine's own two speeds, as we did. Every
# implementation is then checked against a reference in float64 *before* it is timed; one that is
# wrong is listed with the reason and gets no time. The worst *row* counts: a norm over everything
# would hide a few wrong tokens.

# %%
from miniflamingo.kernels.tools import bench

source(bench.worst_row)

# %% [markdown]
# And on a GPU the inputs rotate through copies, of which the calls touch more than four times the
# cache:

# %%
source(bench.rotation)

# %% [markdown]
# Peers are what others would use: masked attention as
# [open-flamingo](https://github.com/mlfoundations/open_flamingo) writes it, torch's own under a
# boolean mask, compiled [FlexAttention](https://arxiv.org/abs/2412.05496), variable-length
# attention, and for the block a compiled plain one (`kernels/tools/peers.py`). The file has every
# time with its spread, floor and error.
#
# Is there one from a GPU?

# %% tags=["volatile"]
documents = [json.loads(path.read_text()) for path in sorted(results.glob("bench-*.json"))]
measured = [document for document in documents if document["meta"]["gpu"]]
for document in measured:
    show(
        plots.plot_roofline(document),
        alt="Measured on a GPU: flops a second against flops a byte under its measured roof, one "
        "panel a direction; this project's kernels filled dark blue, peers hollow orange.",
    )
if not measured:
    print("not measured yet on a GPU. With one at hand:")
    print("python -m miniflamingo bench --json kernels/results/bench-NAME.json")

# %% tags=["volatile"]
name = "image_causal_attention"
timed = [d for d in measured if any(r["entry"] == name for r in d["records"])]
for document in timed:
    show(
        plots.plot_cost(document, name, "forward"),
        alt="Measured on a GPU: microseconds of image-causal attention against the number of "
        "images, a line for each implementation, a dotted one for the counted floor.",
    )

# %% [markdown]
# ## Break it
#
# **Lie 1: timing the launch.** A GPU works asynchronously: a call puts work into a queue and
# returns. The clock then shows how long it takes to *ask*. Here is a GPU in miniature, with a clock
# of its own in microseconds, so that the experiment gives the same everywhere:

# %%
from miniflamingo.course.checks.module_14 import Device

source(Device)

# %%
device = Device()
for _ in range(4):
    start = device.clock()
    device.launch()
    print(f"{device.clock() - start:.0f} us", end="  ")
device.wait()
print(f"\nbut all four together took {device.clock():.0f} us")

# %% [markdown]
# ### Exercise 14.5: an honest benchmark
#
# ★★★ · 16 minutes · 12 to 15 lines. `devices` is a list of n devices on one machine, one for each
# implementation that is to be compared; every call on any of them makes the machine warmer, and all
# later calls slower. Launch `warm_up` calls on each device that do not count. Then time `repeats`
# calls of each, one by one and **in turns**, so that the heat is the same for all. Return float
# [n, 2]: for each device the median of its times in microseconds, and its spread, (largest −
# smallest) / median. Mind the queue, before as well as after.
#
# <details><summary>Hint 1</summary>
#
# The end of a call is when `device.wait()` returns, not when `device.launch()` does. When the first
# timed call starts, the queue may still hold the warm-up: wait before you look at the clock, too.
#
# </details>
# <details><summary>Hint 2</summary>
#
# In turns: the loop over the repeats outside, the loop over the devices inside. An array `times` of
# shape [n, repeats] takes the results in any order.
#
# </details>


# %% tags=["exercise"]
def measure(devices, warm_up, repeats):  # n Devices, int, int -> float[n, 2]
    ...  # your code


# %% tags=["solution"]
def measure(devices, warm_up, repeats):  # n Devices, int, int -> float[n, 2]
    for device in devices:
        for _ in range(warm_up):
            device.launch()
        device.wait()
    times = np.empty((len(devices), repeats))
    for turn in range(repeats):
        for i, device in enumerate(devices):
            start = device.clock()
            device.launch()
            device.wait()
            times[i, turn] = device.clock() - start
    median = np.median(times, axis=1)
    spread = (times.max(axis=1) - times.min(axis=1)) / median
    return np.stack([median, spread], axis=1)


# %%
check("14.5", measure)

# %% [markdown]
# Your times still hold the 5 microseconds of the launch. The benchmark's do not: CUDA events stand
# in the queue itself, behind a pause that is longer than the host needs to fill it.
#
# ### More lies (optional)
#
# **Lie 2: the input is in the cache.** A loop that calls the same function on the same small array
# measures the cache. **Predict, then run:** how many times the bandwidth of the large copy does a
# copy of 64 KB show, when it is the same one each time? And when 2,048 of them take turns?

# %%
guess("14.f", the_same=..., in_turns=...)


# %%
def copying(size, copies, calls=4096):  # bytes a second of copying arrays of `size` bytes, in turns
    sources, targets = np.ones((2, copies, size // 4), np.float32)

    def run():
        for i in range(calls):
            np.copyto(targets[i % copies], sources[i % copies])

    return 2 * size * calls / seconds(run)


# %% tags=["volatile", "reveal"]
shown = []
for copies in (1, 2048):
    rate = copying(2**16, copies)
    shown.append(rate / bandwidth)
    share = f"{rate / bandwidth:.0%} of the roof"
    print(f"64 KB, {copies:>4} arrays in turns: {rate / 1e9:>5.1f} GB/s, {share}")
told("14.f", the_same=shown[0], in_turns=shown[1], within=1.0)

# %% [markdown]
# <details><summary>After the run</summary>
#
# A figure above the machine's own bandwidth is the sign. Whoever quotes 130 % of the roof has
# measured something else.
#
# </details>
#
# **Lie 3: no warm-up.** The first call pays for what comes once: memory that is mapped at first
# touch, code that is loaded or, in Triton, compiled.

# %% tags=["volatile"]
fresh, taken = np.empty(2**23, np.float32), []
for _ in range(4):
    start = time.process_time()
    np.copyto(fresh, a[: 2**23])
    taken.append((time.process_time() - start) * 1e3)
print("four copies of 32 MB into new memory, ms:", " ".join(f"{t:.1f}" for t in taken))

# %% [markdown]
# **Lie 4: a peer that computes something else.** The fastest way to do attention is to do less of
# it. A mask that is wrong by one image costs nothing and passes a test on the mean. **Predict, then
# run:** one token of 512 looks at the wrong image. How large is the norm of the error, over that of
# the right result, in the whole tensor? And in the worst row alone?

# %%
guess("14.g", whole_tensor=..., worst_row=...)

# %% tags=["reveal"]
wrong_phi = phi.copy()
wrong_phi[0, 300] -= 1
peer, right = (torch.from_numpy(xattn.image_causal_attention(q, k, v, p)) for p in (wrong_phi, phi))
right = right.double()
print(f"allowed {bench.TOLERANCE['cpu']:.0e}")
whole = float((peer.double() - right).norm() / right.norm())
told("14.g", whole_tensor=whole, worst_row=bench.worst_row(peer, right), within=0.5)

# %% [markdown]
# <details><summary>After the run</summary>
#
# In bf16 rounding alone makes errors of a hundredth, and a few percent over the whole tensor would
# pass for it. An error of the size of the row itself does not.
#
# </details>

# %% [markdown]
# ## Takeaways
#
# - Count before you measure: bytes over bandwidth and flops over rate give a floor that no
#   implementation beats.
# - Image-causal attention does 32 flops a byte, at any number of heads: memory-bound on a GPU; on a
#   CPU, with a ridge of a few flops a byte, bound by arithmetic. A dense mask is compute-bound on
#   work that is thrown away.
# - Fusing saves bytes, never flops. What it saves grows with the width, the product beside it with
#   its square.
# - A time is worth something with a warm-up, a cold cache, a wait on both sides, a checked result,
#   and the machine's own limits beside it. What was not measured is "not measured yet".
#
# **In the paper:** section 2.3 (3.1.3 in its first version) and figure 7, one image a token. It
# gives seconds a step for its ablations; bytes, floors and kernels are this project's.
#
# **Next:** module 15, to full size: what 3, 9 and 80 billion parameters take in memory.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** A model doubles R from 64 to 128, with the same L and N and NR = L before. What happens to
# the floor of image-causal attention in bf16, and to its intensity?
#
# <details><summary>Answer</summary>
#
# By (3), bytes grow from 2 + 2 to 2 + 4 units of BLHK, so by a half, and flops double. The
# intensity grows by a third, from 32 to 43 flops a byte. Under the roof of the figure (ridge 184)
# it is still bound by memory, so the floor grows by a half, not by two.
#
# </details>
#
# **2.** A colleague reports that a new kernel reaches 130 % of the copy bandwidth of the machine.
# Name two explanations, and how you would tell them apart.
#
# <details><summary>Answer</summary>
#
# The inputs fit the cache and every call reads the same ones: let copies take turns that together
# are several times the cache. Or it moves fewer bytes than were counted, because it computes
# something else: compare its worst row with a reference before any time is taken. A clock that is
# stopped before the work is done is a third one: wait on both sides.
#
# </details>
#
# **3.** An operation has 20 flops a byte. Machine A has 100 GB/s and 1 TFLOP/s, machine B has 200
# GB/s and 1 TFLOP/s. How much faster is B at best, and what would a third machine with 400 GB/s and
# 1 TFLOP/s give?
#
# <details><summary>Answer</summary>
#
# On A the ridge is 10, and 20 lies right of it: bound by arithmetic, 1 TFLOP/s. On B the ridge is
# 5, and nothing changes: the same time. More bandwidth never helps what is bound by arithmetic, so
# the third machine is no faster either.
#
# </details>
