# %% [markdown]
# # 03 The Perceiver
#
# **The question: how can a model read 50,176 inputs when attention costs the square of their
# number?**
#
# After this module you can
#
# - write a Perceiver: a few latents read a large array, then think among themselves, in turns;
# - count O(MR) + O(R²) against O(M²), and measure both;
# - show by experiment what the order of the inputs means to a Perceiver, and what tells it where
#   things are;
# - recognise four bugs of public Perceivers;
# - (optional) train a small one, and look at what its latents read.
#
# **You need:** attention, self and cross, and its cost (module 01); a block (module 02).
#
# **Time:** about 50 minutes for the core path, and 35 for what is marked optional. Computing takes
# about 8 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# Module 01 ended with a number: if every pixel of a 224 × 224 image is a token, one layer's scores
# fill 81 GB. The [Perceiver](https://arxiv.org/abs/2103.03206) (Jaegle et al., 2021) does not let
# the pixels read one another. It has a few vectors of its own, the **latents**, learned like any
# weights. They read the pixels by a *cross*-attention, and whatever is deep happens among them:

# %%
import numpy as np

from miniflamingo import plots
from miniflamingo.attention import TransformerBlock, attention
from miniflamingo.autograd import Tape
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.functional import Linear, mean, softmax
from miniflamingo.module import Module
from miniflamingo.perceiver import Perceiver, PerceiverLayer
from miniflamingo.training import AdamW, OptimiserConfig
from miniflamingo.worlds.shapes import draw_objects

# %%
show(
    plots.plot_turns(50_176, 512, 2, 3),
    alt="A bar above: 50,176 inputs, never changed. Below, a line of 512 latents through two "
    "turns. Each turn begins with a cross-attention that an arrow from the inputs enters, of "
    "50,176 times 512 scores, followed by three self-attentions.",
)

# %% [markdown]
# | letter | meaning | in the figure | below |
# |---|---|---|---|
# | M | inputs: pixels, words, samples of a sound | 50,176 | 144 |
# | R | latents | 512 | 8 |
# | $D_{in}$, D | width of an input, of a latent | | 13, 32 |
# | J | turns: how often the latents read | 2 | 2 |
# | P | self-attentions in a turn | 3 | 1 |
#
# (The Perceiver's paper calls the latents N. In this course N counts images.)

# %% [markdown]
# ## The derivation
#
# The latents $z_1 \dots z_R$ ask, the inputs $x_1 \dots x_M$ answer. With learned matrices,
#
# $$z_r \leftarrow z_r + \sum_{m=1}^{M} p_{rm}\, W_v x_m, \qquad
# p_{r\,\cdot} = \mathrm{softmax}_m \big( (W_q z_r)^\top (W_k x_m) / \sqrt{K} \big) \qquad (1)$$
#
# It is module 01's attention with a residual: latents keep what they had and *add* what they read.
# The result has R rows, however many inputs there were. A turn is one such reading and P ordinary
# self-attention layers among the latents, and there are J turns:
#
# $$z \leftarrow \mathrm{self}_{j,P}( \cdots \mathrm{self}_{j,1}( \mathrm{cross}_j(z, x))), \qquad
# j = 1 \dots J \qquad (2)$$
#
# **Iterative attention:** in every turn the latents read the *same, unchanged* inputs, but with new
# queries. What they learned in turn 1 decides what they look for in turn 2.
#
# **The cost.** A score for each latent and input, and for each pair of latents:
#
# $$\text{scores} = J \, (M R + P R^2) \qquad\qquad (3)$$
#
# against $M^2$ in *each* self-attention of the inputs: O(MR) + O(R²) instead of O(M²). M and P are
# in different terms. **The depth no longer depends on the size of the input.**
#
# **Predict, then run:** draw both to scale, one score a unit of area: a square of 50,176 × 50,176,
# and a strip of 512 × 50,176. How many such strips, one above the other, fill the square?

# %%
guess("3.a", strips=...)

# %% tags=["reveal"]
areas = {
    "self-attention, one layer": [("all pairs", 50_176, 50_176)],
    "Perceiver, P = 1": [("cross", 512, 50_176), ("self", 512, 512)],
}
show(
    plots.plot_areas(areas),
    alt="Two drawings to the same scale. Left a large square, all pairs of 50,176 inputs. Right a "
    "strip of the same width, 512 by 50,176, and below it a dot, 512 by 512.",
)
told("3.a", strips=50_176**2 / (512 * 50_176))

# %% [markdown]
# ### Exercise 3.1: count the scores
#
# ★☆☆ · 5 minutes · 1 line. Write equation (3). M is an array of input sizes, the rest are numbers.
#
# <details><summary>Hint 1</summary>
#
# A turn has one cross-attention and P self-attentions. The self-attentions never see M.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `J *` stands before both terms.
#
# </details>


# %% tags=["exercise"]
def scores(M, R, J, P):  # int[...], int, int, int -> int[...]
    ...  # your code


# %% tags=["solution"]
def scores(M, R, J, P):  # int[...], int, int, int -> int[...]
    return J * (M * R + P * R**2)  # (3)


# %%
check("3.1", scores)

# %% [markdown]
# How many layers of thinking does one layer of self-attention over the pixels pay for?

# %%
M, R = 50_176, 512
print(f"one self-attention of the pixels: {M**2:,} scores")
print(f"one reading by the latents:       {M * R:,}, a {M // R}th of that")
print(f"for the rest: {(M**2 - M * R) // R**2:,} self-attentions of the latents")

# %% [markdown]
# ## Reading, with loops and without
#
# Equation (1), with one head:


# %%
def read_loop(latents, inputs, Wq, Wk, Wv):  # [R, D], [B, M, D_in], [K, D], [K, D_in], [D, D_in]
    out = np.empty((len(inputs), *latents.shape))
    for b, x in enumerate(inputs):
        for r, z in enumerate(latents):
            s = np.array([(Wq @ z) @ (Wk @ x_m) for x_m in x]) / np.sqrt(len(Wq))
            p = softmax(s)
            out[b, r] = z + sum(p_m * (Wv @ x_m) for p_m, x_m in zip(p, x))  # (1)
    return out


# %% [markdown]
# ### Exercise 3.2: read
#
# ★★☆ · 10 minutes · 3 to 5 lines. Write equation (1) without a loop. The latents [R, D] are the
# same for all B rows; Wq is [K, D], Wk [K, D_in], Wv [D, D_in]; return [B, R, D]. Use `softmax`, or
# the library's `attention(q, k, v)`.
#
# <details><summary>Hint 1</summary>
#
# `latents @ Wq.T` is [R, K]; `inputs @ Wk.T` is [B, M, K]. A product of [R, K] and [B, K, M]
# broadcasts to [B, R, M].
#
# </details>
# <details><summary>Hint 2</summary>
#
# The softmax runs over the *inputs*: each latent shares itself out over them. Then the residual.
#
# </details>


# %% tags=["exercise"]
def read(latents, inputs, Wq, Wk, Wv):  # [R, D], [B, M, D_in], three matrices -> [B, R, D]
    ...  # your code


# %% tags=["solution"]
def read(latents, inputs, Wq, Wk, Wv):  # [R, D], [B, M, D_in], three matrices -> [B, R, D]
    k = inputs @ Wk.T
    weights = softmax(latents @ Wq.T @ k.swapaxes(1, 2) / np.sqrt(len(Wq)))  # [B, R, M]
    return latents + weights @ (inputs @ Wv.T)  # (1)


# %%
check("3.2", read)

# %% [markdown]
# The library's layer, `PerceiverLayer`, has heads, a norm before everything that is read, and a
# feed-forward layer after it. Module 05 writes it out, with what Flamingo's resampler adds
# (`append_latents`; here it is off). With one head it equals the loop on normed rows:

# %%
rng = np.random.default_rng(0)
layer = PerceiverLayer(6, 4, 1, 6, append_latents=False, rng=rng).astype(np.float64)
z, x = rng.normal(size=(3, 6)), rng.normal(size=(2, 9, 4))
a = layer.attention
queries, context = layer.normalise(np.stack([z, z]), x)
Wv = a.out_proj.weight.data @ a.v_proj.weight.data
by_hand = read_loop(queries[0], context, a.q_proj.weight.data, a.k_proj.weight.data, Wv)
by_hand += z - queries[0]  # the residual is around the norm
assert np.allclose(by_hand + layer.ffw(by_hand), layer(np.stack([z, z]), x), rtol=1e-9)

# %% [markdown]
# ### Exercise 3.3: take turns
#
# ★★☆ · 7 minutes · 4 or 5 lines. Write equation (2). `cross` is a list of J functions of (latents,
# inputs); `blocks` a list of J lists of functions of the latents alone. Residuals are inside.
#
# <details><summary>Hint 1</summary>
#
# `for read, thoughts in zip(cross, blocks):` goes through the turns.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Every turn hands its latents on to the next one. The inputs stay as they are.
#
# </details>


# %% tags=["exercise"]
def perceive(latents, inputs, cross, blocks):  # [B, R, D], [B, M, D_in], J functions, J lists
    ...  # your code


# %% tags=["solution"]
def perceive(latents, inputs, cross, blocks):  # [B, R, D], [B, M, D_in], J functions, J lists
    for read_inputs, thoughts in zip(cross, blocks):
        latents = read_inputs(latents, inputs)
        for think in thoughts:
            latents = think(latents)  # (2)
    return latents


# %%
check("3.3", perceive)

# %%
source(Perceiver.forward)

# %% [markdown]
# ## The cost, measured
#
# Equation (3) counts scores. Does the clock agree? For 4 heads of 16, R = 64 latents, one turn of
# P = 6, on your machine, best of three runs. The matrices before and after are left out: they are
# linear in M and in R anyway.

# %%
from time import process_time


def milliseconds(function, *arguments):  # best of three
    times = []
    for _ in range(3):
        start = process_time()
        function(*arguments)
        times.append(process_time() - start)
    return 1e3 * min(times)


def heads(n):  # [H, n, K]
    return rng.normal(size=(4, n, 16)).astype(np.float32)


# %%
def attend(q, k):
    return attention(q, k, k)


def perceiver(q, k):
    q = attend(q, k)
    for _ in range(6):
        q = attend(q, q)


sizes = [256, 512, 1024, 2048]
latents, few = heads(64), {n: heads(n) for n in sizes}

# %% [markdown]
# **Predict, then run:** from 1,024 to 2,048 inputs, by which factor does the measured time of each
# grow? Three numbers; a guess counts as right when it is within a third of what is measured.

# %%
guess("3.b", self_attention=..., cross_attention=..., perceiver=...)

# %% tags=["reveal", "volatile"]
measured = {
    "self": [milliseconds(attend, x, x) for x in few.values()],
    "cross": [milliseconds(attend, latents, x) for x in few.values()],
    "Perceiver": [milliseconds(perceiver, latents, x) for x in few.values()],
}
show(
    plots.plot_lines(sizes, measured, "inputs M", "milliseconds"),
    alt="Measured milliseconds against the inputs, 256 to 2048, both axes logarithmic, in three "
    "lines: self-attention of all inputs, the cross-attention of 64 latents, and the Perceiver.",
)
growth = [ms[-1] / ms[-2] for ms in measured.values()]
told("3.b", within=1 / 3, self_attention=growth[0], cross_attention=growth[1], perceiver=growth[2])

# %% [markdown]
# **Depth.** What does one *more* layer cost? In a transformer it works on the M inputs, in a
# Perceiver on the R latents. Whole layers now, with all their matrices, of width 64:

# %% tags=["volatile"]
block = TransformerBlock(64, 4, 256, rng=rng)
thought = rng.normal(size=(1, 64, 64)).astype(np.float32)
for n in (256, 2048):
    tokens = rng.normal(size=(1, n, 64)).astype(np.float32)
    more = [milliseconds(block, rows) for rows in (tokens, thought)]
    print(f"M = {n:>5,}: one more layer of a transformer {more[0]:>6.1f} ms, ", end="")
    print(f"of a Perceiver {more[1]:.1f} ms")

# %% [markdown]
# The last column does not know M. That is why a Perceiver can be deep on a large input, and it is
# the trick of [latent diffusion](https://arxiv.org/abs/2112.10752), too: do the many steps in a
# small space.
#
# ### Counted, and measured with more care (optional)
#
# Operations as in module 01, $4 L_q L_k H K$ an attention:


# %%
def flops(Lq, Lk):
    return 4 * Lq * Lk * 4 * 16 / 1e6


counted = {
    "self": [flops(n, n) for n in sizes],
    "cross": [flops(64, n) for n in sizes],
    "Perceiver": [flops(64, n) + 6 * flops(64, 64) for n in sizes],
}
show(
    plots.plot_lines(sizes, counted, "inputs M", "million operations"),
    alt="Counted operations against the inputs, 256 to 2048, both axes logarithmic. Self-attention "
    "rises fourfold for each doubling, to about 1074 million; the cross-attention twofold, to 34; "
    "the Perceiver lies a constant 6 million above the cross-attention.",
)

# %% [markdown]
# Whole Perceivers were measured once and kept, against M and against R (the figures call the
# latents N, as the Perceiver's paper does). A slope is the exponent of the growth, in brackets the
# one that counting gives. Both terms of (3) are there, so the slopes lie between those of either
# alone.

# %%
import json
from pathlib import Path

from miniflamingo import kernels

file = Path(kernels.__file__).parent / "results" / "scaling.json"
cases = [case for case in json.loads(file.read_text())["cases"] if "Perceiver" in case["case"]]
show(
    plots.plot_scaling({"cases": cases}),
    alt="Milliseconds of a Perceiver in NumPy and in PyTorch, both axes logarithmic: against 256 "
    "to 8,192 inputs with slopes of about 0.6, against 32 to 1,024 latents with slopes of about 1.",
)

# %% [markdown]
# ## Does the order matter?
#
# **Predict, then run:** we shuffle the inputs. What becomes of the rows that a Perceiver puts out?
# And of those of a self-attention layer? One word for each: `"same"`, `"shuffled"` (the same rows
# in the new order of the inputs) or `"other"` (other numbers).

# %%
guess("3.c", perceiver=..., self_attention=...)

# %% tags=["reveal"]
model = Perceiver(5, 8, 3, depth=2, self_depth=1, heads=2, rng=rng).astype(np.float64)
layer = TransformerBlock(6, 2, 12, rng=rng).astype(np.float64)
x, wide, order = rng.normal(size=(1, 20, 5)), rng.normal(size=(1, 20, 6)), rng.permutation(20)


def become(before, after):
    if np.allclose(after, before):
        return "same"
    moves = before.shape[1] == len(order) and np.allclose(after, before[:, order])
    return "shuffled" if moves else "other"


told("3.c", perceiver=become(model(x), model(x[:, order])),
     self_attention=become(layer(wide), layer(wide[:, order])))  # fmt: skip

# %% [markdown]
# <details><summary>After the run</summary>
#
# The sum in (1) runs over all inputs, and a sum has no order. A Perceiver is *invariant*: it reads
# a set, and cannot tell an image from a heap of its pixels. A self-attention is *equivariant*: its
# outputs move with its inputs.
#
# </details>
#
# Nothing in (1) depends on j but the inputs themselves. What is to be known of a position must
# therefore be *written into* each input. With a position $u$ between −1 and 1 and F frequencies,
# the inputs get 2F + 1 more columns,
#
# $$[\, u,\; \sin(\pi u), \dots, \sin(F \pi u),\; \cos(\pi u), \dots, \cos(F \pi u) \,]
# \qquad\qquad (4)$$
#
# for each axis of the image. (Waves of several lengths let a query ask for "about here" coarsely or
# finely. The Perceiver's own code spaces its frequencies evenly, too, up to a higher one.)
#
# ### Exercise 3.4: pictures with their places (optional)
#
# ★★★ · 15 minutes · 8 to 12 lines. Make inputs of pictures [B, h, w, C]: one for each pixel, row
# after row, [B, h·w, C + 2 (2F + 1)]. An input holds the C colours, then the codes (4) of the
# pixel's row, then those of its column. The first row has u = −1, the last one u = 1; columns
# alike.
#
# <details><summary>Hint 1</summary>
#
# `np.linspace(-1, 1, n)` are the positions along an axis of n places. As a column, times
# `np.arange(1, F + 1)` as a row, they make the angles [n, F].
#
# </details>
# <details><summary>Hint 2</summary>
#
# All pixels of a row have the same row code: `np.repeat(codes, w, axis=0)`. The column codes begin
# anew in every row: `np.tile(codes, (h, 1))`. `np.broadcast_to` gives them to all B pictures.
#
# </details>


# %% tags=["exercise"]
def with_places(pictures, F):  # [B, h, w, C], int -> [B, h * w, C + 2 * (2F + 1)]
    ...  # your code


# %% tags=["solution"]
def with_places(pictures, F):  # [B, h, w, C], int -> [B, h * w, C + 2 * (2F + 1)]
    B, h, w, C = pictures.shape
    along = []
    for places in (h, w):
        u = np.linspace(-1, 1, places)
        angles = np.pi * u[:, None] * np.arange(1, F + 1)
        along.append(np.concatenate([u[:, None], np.sin(angles), np.cos(angles)], axis=1))  # (4)
    of_row, of_column = np.repeat(along[0], w, axis=0), np.tile(along[1], (h, 1))
    both = np.concatenate([of_row, of_column], axis=1)
    both = np.broadcast_to(both, (B, *both.shape))
    return np.concatenate([pictures.reshape(B, h * w, C), both], axis=2)


# %%
check("3.4", with_places)

# %% [markdown]
# ## What latents read (optional)
#
# A task that needs positions: *where is the object?* Pictures of 12 × 12 pixels, each an input of 3
# colours (the picture's background taken off) and 2 · 5 position codes, $D_{in} = 13$.

# %%
WIDTH = 12
side = np.linspace(-1, 1, WIDTH)
waves = np.pi * side[:, None] * np.arange(1, 3)
axis = np.concatenate([side[:, None], np.sin(waves), np.cos(waves)], axis=1)  # (4), F = 2
codes = np.concatenate([np.repeat(axis, WIDTH, axis=0), np.tile(axis, (WIDTH, 1))], axis=1)


def inputs_of(pictures):  # [B, 12, 12, 3] -> [B, 144, 13]
    colours = pictures.reshape(len(pictures), -1, 3)
    colours = 4 * (colours - np.median(colours, axis=1, keepdims=True))
    there = np.broadcast_to(codes, (len(pictures), *codes.shape))
    return np.concatenate([colours, there], axis=2).astype(np.float32)


# %%
def draw(B, rng):  # -> pictures [B, 12, 12, 3], centres (x, y) in -1..1 [B, 2]
    centre, none = rng.uniform(5, 18, (2, B)), np.ones(B, int)
    colour, shape = rng.integers(0, 8, B), rng.integers(0, 6, B)
    pictures = draw_objects(colour, shape, none, rng, centre=centre)  # 24 x 24
    small = pictures.reshape(B, WIDTH, 2, WIDTH, 2, 3).mean(axis=(2, 4))
    return small, (2 * centre.T / 23 - 1).astype(np.float32)


# %%
class Finder(Module):
    """A Perceiver of R = 8 latents, J = 2, P = 1; their mean says where."""

    def __init__(self, rng):
        self.perceiver = Perceiver(13, 32, 8, 2, 1, heads=2, ffw_mult=2, rng=rng)
        self.head = Linear(32, 2, rng=rng)

    def forward(self, inputs):  # [B, M, 13] -> [B, 2]
        return self.head(mean(self.perceiver(inputs), axis=1))


# %%
def train(finder, steps=200, encode=inputs_of):
    optimiser = AdamW(finder, OptimiserConfig(steps=steps, rate=5e-3, warmup=20))
    rng = np.random.default_rng(1)
    for _ in range(steps):
        pictures, centres = draw(32, rng)
        finder.zero_grad()
        with Tape() as tape:
            off = finder(encode(pictures)) - centres
            loss = mean(off * off)
        tape.backward(loss)
        optimiser.update(optimiser.gradient())
    return finder


def pixels_off(finder, inputs, centres):  # pixels of the 24 x 24 picture
    return 11.5 * abs(finder(inputs) - centres).mean()


# %% tags=["volatile"]
finder = train(Finder(np.random.default_rng(0)))
pictures, centres = draw(200, np.random.default_rng(9))
x = inputs_of(pictures)
print(f"always 'in the middle': off by {11.5 * abs(centres).mean():.1f} of 24 pixels")
print(f"trained:                off by {pixels_off(finder, x, centres):.1f}")

# %% [markdown]
# **Predict, then run:** by how many pixels is the trained one off when all inputs are shuffled? And
# when only the *colours* are, while the codes stay where they are? Two numbers.

# %%
guess("3.d", all_shuffled=..., colours_shuffled=...)

# %% tags=["reveal", "volatile"]
order = np.random.default_rng(2).permutation(WIDTH**2)
moved = np.concatenate([x[:, order, :3], x[:, :, 3:]], axis=2)
off = [float(pixels_off(finder, inputs, centres)) for inputs in (x[:, order], moved)]
told("3.d", within=0.3, all_shuffled=off[0], colours_shuffled=off[1])

# %% [markdown]
# <details><summary>After the run</summary>
#
# Shuffled with their codes, the inputs are the same set, and nothing changes. Where a pixel
# *stands* in the array means nothing, what is written in it means all.
#
# </details>
#
# **What latents read.** The weights of (1) for every picture, in both turns, of both heads:


# %%
def maps(finder, pictures):  # [B, 12, 12, 3] -> [J, B, H, R, M]
    p, x, found = finder.perceiver, inputs_of(pictures), []
    z = np.broadcast_to(p.latents.data, (len(x), *p.latents.shape))
    for cross, blocks in zip(p.cross, p.blocks):
        found.append(cross.attention.weights(*cross.normalise(z, x)))
        z = cross(z, x)
        for block in blocks:
            z = block(z)
    return np.stack(found)


# %% [markdown]
# **Predict, then run:** in turn 1 the queries are the same for every picture; in turn 2 they depend
# on what turn 1 has found. Go from one picture to another: which share of a latent's weights moves
# to other pixels, in turn 1, and in turn 2? Two numbers between 0 and 1, the mean of all latents
# and heads; half or twice as much counts as right.

# %%
guess("3.e", turn_1=..., turn_2=...)

# %% tags=["reveal", "volatile"]
weights = maps(finder, pictures)
moved = abs(weights - np.roll(weights, 1, axis=1)).sum(axis=-1).mean(axis=(1, 3)) / 2  # [J, H]
for j, heads_moved in enumerate(moved):
    print(f"turn {j + 1}: of a map moves, head by head:", *(f"{m:.0%}" for m in heads_moved))
turns = moved.mean(axis=1).astype(float)
told("3.e", within=0.5, turn_1=turns[0], turn_2=turns[1])

# %% [markdown]
# One picture, and what the 8 latents read with the head that moves most: in turn 1, then in turn 2.

# %% tags=["reveal", "volatile"]
head = moved[1].argmax()
first, second = weights[:, 0, head].reshape(2, 8, WIDTH, WIDTH)
show(
    plots.plot_latents(pictures[0], first),
    alt="Turn 1: a small picture with one coloured object, and for each of 8 latents a grid, "
    "bright where it reads.",
)

# %% tags=["reveal", "volatile"]
show(
    plots.plot_latents(pictures[0], second),
    alt="Turn 2: the same picture, and for each of the 8 latents a grid, bright where it reads "
    "now.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# In turn 1 a latent can only ask for a *kind* of input, a bright one or one at the left, and all
# pictures get nearly the same look. In turn 2 it asks for what *this* picture needs, and several
# times as much of its map moves. Did you expect it to stare at the object? To say where something
# is, its surroundings serve as well. A map shows what is read, not what is made of it.
#
# </details>

# %% [markdown]
# ## Break it
#
# Four bugs of public Perceivers.
#
# 1. **All latents are ones** at the start ([transformers, pull request
#    31151](https://github.com/huggingface/transformers/pull/31151): Idefics2's resampler). Equal
#    latents ask equal questions, get equal answers and equal gradients.
# 2. **Divided by $K^{-0.5}$** ([perceiver-io, issue
#    9](https://github.com/esceptico/perceiver-io/issues/9)), that is, multiplied by √K.
# 3. **Codes of the values, not of the positions** ([perceiver-pytorch, issue
#    4](https://github.com/lucidrains/perceiver-pytorch/issues/4)).
# 4. **A tanh after the mask** ([Perceiver_VL, issue
#    2](https://github.com/zinengtang/Perceiver_VL/issues/2)): tanh(−∞) is −1, and a padded input
#    gets weight.
#
# One reading of 4 latents, without matrices but one that makes inputs as wide as latents:

# %%
M, K = 30, 16
latents, W = rng.normal(size=(4, K)), rng.normal(size=(2, 6, K)) / 2
colours, present = rng.uniform(size=(M, 1)), np.arange(M) < 25  # the last 5 are padding
u = np.linspace(-1, 1, M)


def encode(colours, positions):  # [M, 1], [M] -> [M, K]
    waves = np.pi * positions[:, None] * np.arange(1, 3)
    return np.concatenate([colours, positions[:, None], np.sin(waves), np.cos(waves)], 1) @ W[0]


# %%
def reading(z=latents, encode=encode, attend=attention):
    def run(colours, positions, mask):
        x = encode(colours, positions)
        return attend(z, x, x, mask)

    return run


def tanh_late(q, k, v, mask):
    return softmax(np.tanh(np.where(mask, q @ k.T / np.sqrt(K), -np.inf))) @ v


runs = {
    "the library": reading(),
    "1 ones": reading(z=np.ones((4, K))),
    "2 multiplied": reading(attend=lambda q, k, v, mask: attention(q * K, k, v, mask)),
    "3 codes of values": reading(encode=lambda c, u: encode(c, 2 * c[:, 0] - 1)),
    "4 tanh late": reading(attend=tanh_late),
}

# %% [markdown]
# And four checks. Do the latents *differ* in what they bring? Does the *order* of the colours
# matter? Is *padding* left unread? And does the result equal the *formula*, (1), computed with the
# latents and codes that the function was given?


# %%
def properties(run):
    before = run(colours, u, present)
    padded, turned = np.where(present[:, None], colours, 9), colours.copy()
    turned[:25] = colours[:25][::-1]  # the colours change places, the positions do not
    z = np.ones((4, K)) if run is runs["1 ones"] else latents
    at = 2 * colours[:, 0] - 1 if run is runs["3 codes of values"] else u
    return {
        "differ": np.ptp(before, axis=0).max() > 1e-6,
        "order": not np.allclose(run(turned, u, present), before),
        "padding": np.allclose(run(padded, u, present), before),
        "formula": np.allclose(before, reading(z)(colours, at, present)),
    }


# %% [markdown]
# **Predict, then run:** which of the checks does each bug fail? For each a list of some of
# `"differ"`, `"order"`, `"padding"` and `"formula"`.

# %%
guess("3.f", bug_1=..., bug_2=..., bug_3=..., bug_4=...)

# %% tags=["reveal"]
results = {name: properties(run) for name, run in runs.items()}
print(" " * 18, *(f"{name:^9}" for name in results["the library"]))
for name, passed in results.items():
    print(f"{name:<18}", *(f"{'✓' if ok else '✗':^9}" for ok in passed.values()))
_, *failed = [[name for name, ok in passed.items() if not ok] for passed in results.values()]
told("3.f", **{f"bug_{i}": names for i, names in enumerate(failed, 1)})

# %% [markdown]
# <details><summary>After the run</summary>
#
# Bugs 1 and 3 compute the formula, each on the wrong thing, so no comparison with a reference finds
# them; bug 2 has every property.
#
# </details>
#
# ### Two of the bugs in training (optional)
#
# Do bugs 1 and 3 show in training? 100 steps each, with the task of "What latents read":


# %%
def values_only(pictures):  # bug 3: the same columns, made of the brightness
    x = inputs_of(pictures)
    bright = pictures.mean(axis=-1).reshape(len(x), -1)
    waves = np.pi * (2 * bright[..., None] - 1) * np.arange(1, 3)
    axis = np.concatenate([bright[..., None], np.sin(waves), np.cos(waves)], axis=2)
    return np.concatenate([x[:, :, :3], axis, axis], axis=2).astype(np.float32)


ones = Finder(np.random.default_rng(0))
ones.perceiver.latents.data = np.ones_like(ones.perceiver.latents.data)

# %% tags=["volatile"]
trained = {
    "the library": (train(Finder(np.random.default_rng(0)), 100), inputs_of),
    "1 ones": (train(ones, 100), inputs_of),
    "3 codes of values": (train(Finder(np.random.default_rng(0)), 100, values_only), values_only),
}
for name, (model, encoding) in trained.items():
    off, z = pixels_off(model, encoding(pictures), centres), model.perceiver.latents.data
    print(
        f"{name:<18} off by {off:.1f} pixels; the latents differ by {np.ptp(z, axis=0).max():.1g}"
    )

# %% [markdown]
# With codes of the values it can only guess the middle. With ones it learns about as well as the
# library: this small task can be done by *one* latent, and one it is. After training all eight are
# still the same vector, or differ by rounding alone. The loss says nothing; look at the latents.

# %% [markdown]
# ## Takeaways
#
# - R learned latents read M inputs and think among themselves: O(MR) + O(R²) for O(M²). With 512
#   latents and 50,176 pixels, a reading has a 98th of the scores of one self-attention.
# - The depth works on the latents and does not know M. That is the point, more than the saving.
# - In turns: the same inputs, new queries. What turn 1 found decides what turn 2 looks for.
# - A Perceiver reads a set. Position is what is *written in* an input, not where it stands.
# - Latents must differ at the start, or they never will.
#
# **In the paper:** section 2.1 (3.1.1 in the first version) of
# [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), where Flamingo takes the Perceiver for its
# resampler. **In the library:** `PerceiverLayer` and `Perceiver` in `miniflamingo/perceiver.py`.
#
# **Next:** module 04, the vision encoder, which makes the features that Flamingo's latents read;
# module 05 then puts the two together.

# %% [markdown] tags=["notes"]
# ### For the teacher
#
# **Minutes.** 0 the 81 GB of module 01, the figure of turns; 5 equations (1) to (3), guess 3.a; 10
# exercise 3.1; 16 the loop, exercise 3.2; 28 exercise 3.3; 36 guess 3.b, the cost of one more
# layer; 41 guess 3.c and what follows from it: positions must be written in; 45 guess 3.f.
#
# **Predictions.** *3.a:* 98. Found by 50,176 / 512; guesses are often 10, because the strip looks
# thicker in the mind. *3.b:* about 4, 2 and less than 2. The Perceiver's is guessed as 2: its
# self-attentions cost the same at both sizes. *3.c:* `"same"` and `"shuffled"`. Those who say
# "other" for the first confuse order with position codes. *3.d (optional):* as good as before, and
# about as bad as guessing. *3.e (optional):* a small share in turn 1, several times as much in turn
# 2; the numbers are printed. *3.f:* bug 1 fails "differ", bug 2 "formula", bug 3 "order", bug 4
# "padding" and "formula". That bugs 1 and 3 pass "formula" surprises most.
#
# **Open questions.** "Did you expect it to stare at the object?" (optional part): there is no right
# answer; the point is that a map shows what is read and not what it is used for.
#
# **Misconceptions.** That latents are a compressed picture, a place each. That M latents would be
# needed for M inputs. That the saving is the point: it is the depth, which no longer knows M. That
# the order in the array is a position.
#
# **To cut.** Exercise 3.1 (do it aloud), then 3.f. Keep 3.2 and guess 3.c.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** A Perceiver reads 10,000 inputs with 100 latents, in 4 turns of 6 self-attentions. A
# colleague halves the number of inputs. By about how much do the scores fall?
#
# <details><summary>Answer</summary>
#
# (3): 4 · (10,000 · 100 + 6 · 100²) = 4 · (1,000,000 + 60,000). The inputs stand in the first term
# alone: 4 · (500,000 + 60,000), so 53 % remain. Nearly half, as the reading dominates.
#
# </details>
#
# **2.** All latents of a trained Perceiver are exchanged among one another (latent 1 gets the
# vector of latent 2 and so on). What happens to its output rows, and to their mean?
#
# <details><summary>Answer</summary>
#
# The rows change places in the same way and keep their values: nothing in (1) or in a
# self-attention depends on a latent's number. Their mean does not change.
#
# </details>
#
# **3.** Somebody leaves out the residual in (1), so that $z_r$ is replaced by what it reads. What
# is lost in turn 2, beside a good gradient?
#
# <details><summary>Answer</summary>
#
# What the latents knew, except as far as it chose the weights: every output is a mixture of the
# inputs' values, so whatever turn 1 and the self-attentions had worked out is gone. Only its
# question is left.
#
# </details>
