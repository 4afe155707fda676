# %% [markdown]
# # 04 The Perceiver Resampler
#
# **The question: how does one picture, or a clip of thirty frames, become the same small number of
# visual tokens?**
#
# After this module you can
#
# - write the resampler's layer, with loops and without, and say what its keys are;
# - give frames their time, and stretch eight time embeddings to thirty frames;
# - count its 194 million parameters, and settle a contradiction between two versions of the paper;
# - look where each latent looks, in a picture and along a clip;
# - tell from measurements which of four departures from the paper do harm here, and which do not.
#
# **You need:** the Perceiver (module 02), the vision encoder (module 03), attention and layer norm
# (module 01).
#
# **Time:** about 51 minutes: 11 to read (2,200 words, 200 a minute) and 40 for five exercises.
# Computing takes about 4 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# The frozen eye makes S features of every frame, frame by frame. The language model must not pay
# for all of them in every one of its layers. So R *latents*, learned vectors, look at the features
# in their stead, and what they have gathered is all that the language model gets to see.

# %%
import copy

import numpy as np

from miniflamingo import perceiver, plots
from miniflamingo.course import check, show, source
from miniflamingo.functional import layer_norm, softmax
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds import shapes

# %%
show(
    plots.plot_keys({"image": 1, "clip": 4}, S=36, R=8),
    alt="Two rows of blocks. An image: one block of 36 keys, plus tau 1, and 8 grey latents, 44 "
    "keys, 8 visual tokens. A clip of four frames: four blocks of 36 in four colours, plus tau 1 "
    "to tau 4, and the same 8 latents, 152 keys, 8 visual tokens.",
)

# %% [markdown]
# | letter | meaning | here | in the paper |
# |---|---|---|---|
# | T | frames; an image is a clip of one | 1 to 30 | 8 in training, 30 in use |
# | S | features of a frame | 36 | 100 at 320 × 320 pixels |
# | R | latents, and so visual tokens | 8 | 64 |
# | D | width of latents and features | 64 | 1,536 |
# | F | time embeddings that were trained | 8 | 8 |
# | H, K | heads, and the width of one | 4, 16 | 16, 128 |
# | | layers | 2 | 6 |

# %% [markdown]
# ## The derivation
#
# **Time.** Features of all frames go into one list, and attention does not know the order of a
# list. So every frame t gets a learned vector $\tau_t$, the same for all of its S features:
#
# $$f_{(t,s)} = x_{t,s} + \tau_t, \qquad f: [T S, \; D] \qquad\qquad (1)$$
#
# In the paper nothing is learned about the *place* s in a frame: the eye's features carry it
# themselves. (Ours has learned spatial embeddings too, an option of the library.)
#
# **More frames than were trained.** With F embeddings and T > F frames, frame t = 0 … T − 1 takes
# the place
#
# $$\pi_t = t \cdot \frac{F - 1}{T - 1} \qquad\qquad (2)$$
#
# between the trained ones, and its embedding is interpolated linearly: ends lie on ends. The paper
# trains on 8 frames, one a second, and uses 30, three a second, in this way. A clip that is no
# longer than F takes the first T embeddings, a choice of the library.
#
# **A layer.** The latents $x: [R, D]$ are the queries. Keys and values are the features *and the
# latents*, each behind a layer norm:
#
# $$c = [\, \mathrm{norm}(f); \; \mathrm{norm}(x) \,] : [T S + R, \; D] \qquad\qquad (3)$$
#
# $$x \leftarrow x + \mathrm{softmax} \Big( \frac{(\mathrm{norm}(x) W_q) (c W_k)^\top}{\sqrt K}
# \Big) \, c W_v \qquad\qquad (4)$$
#
# $$x \leftarrow x + W_2 \, \max(0, \; W_1 \, \mathrm{norm}(x))^2 \qquad\qquad (5)$$
#
# Three things to notice. The norms stand *before* the projections; the sum $x + \dots$ is never
# normalised inside the stack. The latents read one another in the same softmax in which they read
# the features: cross-attention and self-attention at once. And the activation in (5) is the
# *squared* ReLU. The pseudo-code of the paper shows no norms; where they stand here is what the
# re-implementations agree on, and so is one last norm at the end.
#
# The cost of (4) is R · (T S + R) scores, linear in the number of frames. Every further layer of
# the language model then meets R tokens, whatever T was.

# %% [markdown]
# ## Frames get their time
#
# ### Exercise 4.1: add the time and flatten
#
# ★☆☆ · 5 minutes · 1 or 2 lines. Write equation (1): `x` is [T, S, D], `time` [T, D]. Return
# [T·S, D], frame after frame.
#
# <details><summary>Hint 1</summary>
#
# `time[:, None]` is [T, 1, D] and broadcasts over the features of a frame.
#
# </details>


# %% tags=["exercise"]
def with_time(x, time):  # [T, S, D], [T, D] -> [T*S, D]
    ...  # your code


# %% tags=["solution"]
def with_time(x, time):  # [T, S, D], [T, D] -> [T*S, D]
    return (x + time[:, None]).reshape(-1, x.shape[-1])  # equation (1)


# %%
check("4.1", with_time)

# %% [markdown]
# ### Exercise 4.2: stretch the time
#
# ★★☆ · 9 minutes · 3 to 6 lines. From `time` [F, D] make the embeddings of T frames, [T, D]: the
# first T of them for T ≤ F, equation (2) for T > F.
#
# <details><summary>Hint 1</summary>
#
# `np.linspace(0, F - 1, T)` is equation (2).
#
# </details>
# <details><summary>Hint 2</summary>
#
# With $i = \lfloor \pi \rfloor$, at most F − 2, and the rest $w = \pi - i$, the embedding is
# $(1 - w) \, \tau_i + w \, \tau_{i+1}$.
#
# </details>


# %% tags=["exercise"]
def stretch(time, T):  # [F, D], int -> [T, D]
    ...  # your code


# %% tags=["solution"]
def stretch(time, T):  # [F, D], int -> [T, D]
    F = len(time)
    if T <= F:
        return time[:T]
    place = np.linspace(0, F - 1, T)  # equation (2)
    i = np.minimum(place.astype(int), F - 2)
    w = (place - i)[:, None]
    return (1 - w) * time[i] + w * time[i + 1]


# %%
check("4.2", stretch)

# %% [markdown]
# The library writes the weights of the trained embeddings as a matrix, a row for each frame, so
# that clips of different lengths fit into one batch:

# %%
source(perceiver.time_weights)

# %% [markdown]
# **Predict, then run:** three trained embeddings, five frames. Which weights has frame 1, the
# second?

# %%
print(perceiver.time_weights(5, 5, trained=3))

# %%
time, (T, F) = np.random.default_rng(0).normal(size=(8, 4)), (30, 8)
by_numpy = [np.interp(np.linspace(0, F - 1, T), np.arange(F), column) for column in time.T]
assert np.allclose(perceiver.time_weights(T, T, F) @ time, np.stack(by_numpy, axis=1), rtol=1e-12)

# %% [markdown]
# ## A layer, with loops and without
#
# Equations (3) and (4) with one head, latent by latent:


# %%
def read_loop(x, f, norm, wq, wk, wv):  # [R, D], [M, D], function, [D, K], [D, K], [D, D]
    out, context = x.copy(), [*norm(f), *norm(x)]  # equation (3): the latents are appended
    for r, query in enumerate(norm(x) @ wq):
        scores = np.array([query @ (c @ wk) for c in context]) / np.sqrt(len(query))
        for weight, c in zip(softmax(scores), context):
            out[r] += weight * (c @ wv)  # equation (4)
    return out


# %% [markdown]
# ### Exercise 4.3: the layer without a loop
#
# ★★★ · 12 minutes · 4 to 6 lines. The same for all latents at once. `norm` is given, a layer norm
# over the last axis.
#
# <details><summary>Hint 1</summary>
#
# `np.concatenate([norm(f), norm(x)])` is equation (3).
#
# </details>
# <details><summary>Hint 2</summary>
#
# Queries come from `norm(x)`, but the sum begins with x itself.
#
# </details>


# %% tags=["exercise"]
def read(x, f, norm, wq, wk, wv):  # [R, D], [M, D], function, [D, K], [D, K], [D, D] -> [R, D]
    ...  # your code


# %% tags=["solution"]
def read(x, f, norm, wq, wk, wv):  # [R, D], [M, D], function, [D, K], [D, K], [D, D] -> [R, D]
    context = np.concatenate([norm(f), norm(x)])  # equation (3)
    q, k, v = norm(x) @ wq, context @ wk, context @ wv
    return x + softmax(q @ k.T / np.sqrt(q.shape[-1])) @ v  # equation (4)


# %%
check("4.3", read)

# %% [markdown]
# In the library a layer has two lines for (3) to (5), and the heads are in `MultiHeadAttention`:

# %%
source(perceiver.PerceiverLayer.normalise)

# %%
source(perceiver.PerceiverLayer.forward)

# %% [markdown]
# With one head, and an output projection that does nothing, it equals the loop:

# %%
rng = np.random.default_rng(1)
layer = perceiver.PerceiverLayer(6, 6, heads=1, head_dim=6, rng=rng).astype(float)
layer.attention.out_proj.weight.data = np.eye(6)
x, f = rng.normal(size=(3, 6)), rng.normal(size=(10, 6))
weights = [p.weight.data.T for p in (layer.attention.q_proj, layer.attention.k_proj,
                                     layer.attention.v_proj)]  # fmt: skip


# %%
def norm(x):
    return layer_norm(x, np.ones(x.shape[-1]), np.zeros(x.shape[-1]))


by_hand = read_loop(x, f, norm, *weights)
by_library = layer.attention(*layer.normalise(x[None], f[None]))[0]
assert np.allclose(by_hand, x + by_library, rtol=1e-10)

# %% [markdown]
# The whole resampler is as short as the paper's pseudo-code:

# %%
source(perceiver.PerceiverResampler.forward)

# %% [markdown]
# Now the trained one, with the eye that it was trained for. `features` are [B, N, T, S, D], as a
# page may hold N pictures or clips.

# %%
model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
resampler = model.resampler


def clips_of(n, T, seed=0):  # -> frames [n, T, 24, 24, 3], directions int[n]
    rng = np.random.default_rng(seed)
    colour, shape, size = (rng.integers(0, most, n) for most in (8, 6, 2))
    direction = rng.integers(0, 4, n)
    clips = shapes.draw_clips(colour, shape, size, direction, rng, T, split="test")
    return clips, direction


# %%
def features_of(clips):  # [n, T, 24, 24, 3] -> [n, 1, T, S, D]
    return model.encode(clips[:, None])


for T in (1, 8, 30):
    features = features_of(clips_of(2, T)[0])
    print(f"T = {T:>2}: features {features.shape} -> visual tokens {resampler(features).shape}")

# %% [markdown]
# The pseudo-code once more, by hand and with the trained weights, squared ReLU and all:

# %%
x, f, _ = resampler.begin(features, None)  # latents, and equation (1)
for layer in resampler.layers:
    x = x + layer.attention(*layer.normalise(x, f))  # equations (3) and (4)
    hidden = layer.ffw.up(layer.ffw.norm(x))
    x = x + layer.ffw.down(np.maximum(hidden, 0) ** 2)  # equation (5)
assert np.allclose(resampler.final_norm(x), resampler(features)[:, 0], atol=1e-4)

# %% [markdown]
# **Predict, then run:** a picture, and a clip that shows this picture eight times without moving.
# Are the visual tokens the same?

# %%
still = features[:, :, :1]
tokens = [resampler(np.repeat(still, T, axis=2)) for T in (1, 8)]
change = np.linalg.norm(tokens[1] - tokens[0]) / np.linalg.norm(tokens[0])
print(f"relative change: {change:.1f}")

# %% [markdown]
# They are not: the eight copies carry eight different times. "An image is a one-frame video" means
# $\tau_1$ alone.

# %% [markdown]
# ## 194 million parameters
#
# The resampler is the same in all three sizes of the paper's model: about 194M. With $D_{in}$ the
# width of the eye's features, no biases but those of the norms (a gain and a bias each), and a
# hidden width of 4D,
#
# $$\underbrace{D_{in} D}_{\text{projection}} + \underbrace{(R + F) D}_{\text{latents, times}}
# + \text{layers} \cdot \big( \underbrace{4 \, D H K}_{\text{attention}} +
# \underbrace{2 \cdot D \cdot 4D}_{\text{feed-forward}} + \underbrace{3 \cdot 2 D}_{\text{norms}}
# \big) + \underbrace{2 D}_{\text{last norm}} \qquad (6)$$
#
# ### Exercise 4.4: count
#
# ★★☆ · 8 minutes · 5 or 6 lines. Return the five kinds apart, int [5]: projection; latents and
# times; attention; feed-forward; norms, the last one included.
#
# <details><summary>Hint 1</summary>
#
# Attention has four matrices. Three lead from D to H·K, and the fourth leads back.
#
# </details>


# %% tags=["exercise"]
def count(D_in, D, R, F, layers, H, K):  # ints -> int[5]
    ...  # your code


# %% tags=["solution"]
def count(D_in, D, R, F, layers, H, K):  # ints -> int[5]
    attention, feed_forward = 4 * D * H * K, 2 * D * 4 * D
    norms = layers * 3 * 2 * D + 2 * D
    return [D_in * D, (R + F) * D, layers * attention, layers * feed_forward, norms]  # (6)


# %%
check("4.4", count)

# %% [markdown]
# **Predict, then run:** version 1 of the paper says that a head is 128 wide. The table of version 2
# implies 1,536 / 16 = 96. Which of them gives 194M?

# %%
from miniflamingo.flamingo import FlamingoConfig, count_parameters

for K in (96, 128):
    config = FlamingoConfig.preset("3B", resampler_head_dim=K)
    print(f"K = {K:>3}: {count_parameters(config)['resampler'] / 1e6:.1f} million")

# %% [markdown]
# Only 128. So 16 heads of 128 make an inner width of 2,048 in a model of width 1,536: the heads
# need not add up to D. And 3,072, the width of the eye's last grid, must be projected; without that
# projection 4.7 million are missing.

# %% [markdown]
# ## Where the latents look
#
# The weights of (4) can be looked at. `attention_maps` returns [layers, B, N, H, R, T·S + R].

# %%
source(perceiver.PerceiverResampler.attention_maps)

# %%
rng = np.random.default_rng(4)
attributes = [rng.integers(0, most, 200) for most in (8, 6)] + [np.ones(200, int)]
pictures = shapes.draw_objects(*attributes, rng, split="test")
features = features_of(pictures[:, None])
maps = resampler.attention_maps(features)[0, :, 0].mean(axis=1)  # first layer, mean of the heads
looks = maps[..., :36].reshape(200, 8, 6, 6)
show(
    plots.plot_latents(pictures[0], looks[0]),
    alt="A picture of one object, and where each of eight latents looks on a 6 by 6 grid in the "
    "first layer, mean of four heads. They differ: some look at cells of the object, others at "
    "cells of the background.",
)

# %% [markdown]
# **Predict, then run:** one picture proves nothing, so over all 200: the cells in which the picture
# is more colourful than usual are about a fifth of the grid. A latent that looks anywhere gives
# them a fifth of its look. What do the eight latents give?

# %%
colour = (pictures.max(axis=-1) - pictures.min(axis=-1)).reshape(200, 6, 4, 6, 4).mean(axis=(2, 4))
usual = colour.mean(axis=(1, 2), keepdims=True) + 0.5 * colour.std(axis=(1, 2), keepdims=True)
is_object = (colour > usual)[:, None]
on_object = (looks * is_object).sum(axis=(0, 2, 3)) / looks.sum(axis=(0, 2, 3))
print(f"the object covers {is_object.mean():.2f} of the grid; the latents' share on it:")
print("  ".join(f"{r}: {share:.2f}" for r, share in enumerate(on_object)))

# %% [markdown]
# No latent was told what to look at. Some look at the object, about twice as much as chance would,
# and latents 0 and 3 look *past* it, at the background. Do not read too much into such maps: a
# feature of the eye has seen more than its own cell, and what is fetched there, the value, is not
# in the picture.
#
# ### Exercise 4.5: the share of each frame
#
# ★★☆ · 6 minutes · 2 to 4 lines. `maps` is [H, R, T·S + R], the weights of a layer for a clip of T
# frames. Return [R, T + 1]: what share of its look each latent gives to each frame and, in the last
# column, to the latents. Mean over the heads; a row sums to 1.
#
# <details><summary>Hint 1</summary>
#
# Take the mean over the heads first, then cut off the last R columns.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The first T·S columns are [T, S], frame after frame: reshape them and sum over S.
#
# </details>


# %% tags=["exercise"]
def shares(maps, T):  # [H, R, T*S + R], int -> [R, T + 1]
    ...  # your code


# %% tags=["solution"]
def shares(maps, T):  # [H, R, T*S + R], int -> [R, T + 1]
    mean, R = maps.mean(axis=0), maps.shape[1]
    frames = mean[:, :-R].reshape(R, T, -1).sum(axis=-1)
    return np.column_stack([frames, mean[:, -R:].sum(axis=-1)])


# %%
check("4.5", shares)

# %% [markdown]
# The first layer again, the mean over 40 clips:

# %%
clips, directions = clips_of(160, 8)
features = features_of(clips)
all_maps = resampler.attention_maps(features[:40])[:, :, 0]  # [layers, 40, H, R, T*S + R]
maps = all_maps[0].mean(axis=0)

# %% tags=["target"]
lines = {f"latent {r}": shares(maps, 8)[r, :8] for r in (0, 4, 6)}
show(
    plots.plot_lines(np.arange(1, 9), lines, "frame", "share of the look", log=False),
    alt="The share of the look that three latents give to each of eight frames, mean of 40 clips. "
    "Latent 0 gives more than half to frame 1 and nothing to the last; latent 4 gives most to "
    "frames 7 and 8; latent 6 looks at all frames alike.",
)

# %% tags=["exercise"]
show(
    lambda: plots.plot_lines(
        np.arange(1, 9), {f"latent {r}": shares(maps, 8)[r, :8] for r in (0, 4, 6)},
        "frame", "share of the look", log=False,
    ),
    alt="The shares of three latents that your function returns, by frame.",
)  # fmt: skip

# %% [markdown]
# And in one clip, a square that moves to the right:

# %%
one, some = int(np.flatnonzero(directions == 1)[2]), [0, 4, 5]
paid = all_maps[0, one].mean(axis=0)[some, : 8 * 36].reshape(3, 8, 6, 6)
print("this clip moves", shapes.DIRECTIONS[directions[one]])
show(
    plots.plot_clip_latents(clips[one], paid, some),
    alt="Three latents as rows, the eight frames of a clip as columns, yellow where a latent looks "
    "and each frame's share above it. Latent 0 looks at the background of the first frames. "
    "Latent 4 follows the square as it moves, and looks most at the last frames. Latent 5 looks "
    "around it, from the third frame on.",
)

# %% [markdown]
# The latents have divided the time among them. Nobody asked for it: to say which way something
# moves, early must be told from late, and the sum in (4) can only do that if some queries prefer
# early frames and others late ones. The keys carry τ, so a query can ask for a time.

# %% [markdown]
# ## Thirty frames from eight
#
# Does the interpolation work? We ask the whole model: `<image> moving …`, and take the direction
# with the highest score. By guessing, a quarter is right.

# %%
from miniflamingo.worlds.grammar import DIRECTION_IDS, TOKENIZER


def found(features, directions, resampler=resampler):  # -> the share of right directions
    n = len(features)
    text = np.tile(TOKENIZER.encode("<BOS> <image> moving"), (n, 1))
    logits = model.read(text, resampler(features), np.tile([0, 1, 1], (n, 1)))[:, -1]
    return (logits[:, DIRECTION_IDS].argmax(axis=1) == directions).mean()


# %% [markdown]
# **Predict, then run:** trained on 8 frames only. How well will it do with 16 and 30 frames, and
# with the first 4 embeddings alone?

# %%
results = {}
for T in (1, 4, 8, 16, 30):
    results[T] = found(features_of(clips_of(60, T)[0]), clips_of(60, T)[1])
    print(f"{T:>2} frames: {results[T]:.0%} of the directions are right")

# %% [markdown]
# Thirty frames are read as well as eight, without a step of training. That is the interpolation:
# ends on ends, a long clip looks like a slow one. One frame has no motion. Four frames, a fast clip
# that ends at the time $\tau_4$, were never trained, and it shows.

# %% [markdown]
# ## What it buys
#
# The paper compares: an MLP in the resampler's place scores 66.6, a transformer over latents and
# features 66.7, the Perceiver 70.7. What do they cost? The scores of one layer and head at S = 100
# and R = 64:

# %%
S, R = 100, 64
for T in (1, 8, 30):
    ours, full = R * (T * S + R), (T * S + R) ** 2
    print(f"T = {T:>2}: Perceiver {ours:>9,}   transformer {full:>11,}   {full / ours:.0f} times")

# %% [markdown]
# And which parameters know S, the number of features? One that does fixes the size of the pictures
# for ever:

# %%
rng, sizes = np.random.default_rng(0), dict(num_latents=8, depth=2, num_features=25)
for kind in (perceiver.PerceiverResampler, perceiver.MLPResampler):
    part = kind(64, 64, **sizes, rng=rng)
    knows = [name for name, p in part.named_parameters() if 25 in p.shape]
    print(f"{kind.__name__:<20} {knows}")

# %% [markdown]
# For the Perceiver it is the spatial embeddings alone, which the paper does without. The MLP mixes
# the places with a matrix [R, S].

# %% [markdown]
# ## Break it
#
# Four departures from the paper, the first and the last from public code, put into the *trained*
# resampler:
#
# 1. **Time embedding off** (open-flamingo): frames are flattened, but nothing tells them apart.
# 2. **No norm on the features** before the projections.
# 3. **Latents not appended** to keys and values.
# 4. **An embedding per medium, frames not flattened** (flamingo-pytorch): τ counts the pictures of
#    a page, and each frame is resampled by itself.


# %%
class Nothing:
    def __call__(self, x):
        return x


def broken(time=True, norm=True, append=True):
    other = copy.deepcopy(resampler)
    other.time_embeddings.data = other.time_embeddings.data * time
    for layer in other.layers:
        layer.append_latents = append
        layer.input_norm = layer.input_norm if norm else Nothing()
    return other


# %% [markdown]
# **Predict, then run:** which of the first three cost the model its sense of direction?

# %%
faults = {"as trained": {}, "1 time embedding off": {"time": False}}
faults["2 no norm on the features"] = {"norm": False}
faults["3 latents not appended"] = {"append": False}
for name, changes in faults.items():
    print(f"{name:<27} {found(features, directions, broken(**changes)):.0%}")

# %% [markdown]
# Fault 1 leaves guessing. To see why, play a clip backwards. Attention over a list does not change
# when the list is shuffled:

# %%
for name, changes in list(faults.items())[:2]:
    forth, back = (broken(**changes)(x) for x in (features, features[:, :, ::-1]))
    change = np.linalg.norm(forth - back) / np.linalg.norm(forth)
    print(f"{name:<22} relative change when played backwards: {abs(change):.1f}")

# %% [markdown]
# No accuracy on *pictures* would have shown it: with T = 1 there is nothing to tell apart. Fault 2
# shows what the norm is for. The features come out of a ReLU, at a size that nobody fixed; behind
# the norm their size does not matter. (Both kinds of embedding are set to 0 for this, so that the
# features alone decide.)

# %%
without_time = {True: broken(time=False), False: broken(time=False, norm=False)}
for part in without_time.values():
    part.spatial_embeddings.data = part.spatial_embeddings.data * 0
for has_norm, part in without_time.items():
    one, ten = part(features), part(10 * features)
    change = np.linalg.norm(ten - one) / np.linalg.norm(one)
    print(f"norm: {has_norm!s:<5}  ten times larger features change the tokens by {change:.1f}")

# %% [markdown]
# Fault 3 does **no harm here**. Why, can be read off the maps: how much do the latents look at one
# another?

# %%
for i, maps in enumerate(all_maps):
    print(f"layer {i}: share on the latents {maps[..., -8:].sum(axis=-1).mean():.3f}")
print(f"to look everywhere alike would give {8 / 296:.3f}")

# %% [markdown]
# They hardly do, in two layers with 288 features to look at: less than by chance. So this model
# cannot say whether the paper was right to append them. Not every departure is a fault, and a
# measurement at this scale is no verdict on a model of 6 layers and 64 latents.
#
# Fault 4, last. Take a page with the same picture three times, and add $\tau_n$ to picture n, as
# the embedding per medium does; then a clip whose eight frames count as eight media:

# %%
picture = features[:1, :, :1]  # [1, 1, 1, S, D]
tau = resampler.time_embeddings.data
page = np.concatenate([picture + tau[n] - tau[0] for n in range(3)], axis=1)  # [1, 3, 1, S, D]
right, wrong = resampler(np.repeat(picture, 3, axis=1))[0], resampler(page)[0]
for name, tokens in (("the library", right), ("per medium", wrong)):
    change = [np.linalg.norm(t - tokens[0]) / np.linalg.norm(tokens[0]) for t in tokens]
    print(f"{name:<12} pictures 1, 2, 3 differ from the first by", *(f"{c:.1f}" for c in change))

# %%
frames_as_media = features[:1].swapaxes(1, 2)  # [1, T, 1, S, D]
print("flattened:     ", resampler(features[:1]).shape[1:3], "media, tokens")
print("not flattened: ", resampler(frames_as_media).shape[1:3], "media, tokens")

# %% [markdown]
# The same picture gets other tokens when another stands before it, which few-shot prompts are full
# of. And a clip gets eight times the tokens, while φ still says that it is one medium: a word would
# see one frame of it.
#
# Which check catches what? Exercises 4.1 and 4.3 name the departures when they are in your code:


# %%
def not_appended(x, f, norm, wq, wk, wv):
    q, k, v = norm(x) @ wq, norm(f) @ wk, norm(f) @ wv
    return x + softmax(q @ k.T / np.sqrt(q.shape[-1])) @ v


print(check("4.3", not_appended).message)
print(check("4.3", lambda x, f, norm, *w: read_loop(x, f, lambda y: y, *w)).message)
print(check("4.1", lambda x, time: x.reshape(-1, x.shape[-1])).message)

# %% [markdown]
# ## Takeaways
#
# - R latents read T·S features and themselves; out come R visual tokens, whatever T and S are.
# - Attention reads a set. Only the time embeddings tell frames apart; test with a clip played
#   backwards.
# - More frames than trained: interpolate, ends on ends. Here 30 frames are read as well as 8.
# - Norms before the projections make the size of the eye's features irrelevant.
# - 194M parameters fit heads of width 128, not 96, and a projection from 3,072.
# - Measure a departure before you call it a fault: latents that are not appended do no harm here.
#
# **In the paper:** section 3.1.1; the appendix has the pseudo-code, the sizes, the frames, and the
# ablation of the resampler. **In the library:** `miniflamingo/perceiver.py`.
#
# **Next:** module 05, the frozen language model that will read these tokens, and how it is made to
# speak.
