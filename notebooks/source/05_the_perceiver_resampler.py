# %% [markdown]
# # 05 The Perceiver Resampler
#
# **The question: how does one picture, or a clip of thirty frames, become the same small number of
# visual tokens?**
#
# After this module you can
#
# - write the resampler's layer, with loops and without, and say what its keys are;
# - give frames their time, and stretch eight time embeddings to thirty frames;
# - tell from measurements which departures from the paper do harm here, and which do not;
# - (optional) count its 194 million parameters, and settle a contradiction between two versions of
#   the paper; look where each latent looks, in a picture and along a clip.
#
# **You need:** the Perceiver (module 03), the vision encoder (module 04), attention (module 01) and
# layer norm (module 02).
#
# **Time:** about 50 minutes for the core path, and 45 for what is marked optional. Computing takes
# about 4 seconds of one core.

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
from miniflamingo.course import check, guess, show, source, told
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
# | H, K | heads, and the width of one | 4, 16 | 16, and see below |
# | | layers | 2 | 6 |

# %% [markdown]
# ## The derivation
#
# **Time.** Features of all frames go into one list, and attention does not know the order of a
# list. So every frame t gets a learned vector $\tau_t$, the same for all of its S features:
#
# $$f_{(t,j)} = x_{t,j} + \tau_t, \qquad f: [T S, \; D] \qquad\qquad (1)$$
#
# In the paper nothing is learned about the *place* j in a frame: the eye's features carry it
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
# (With every row of a matrix as one vector, so the matrices stand on the right.) Three things to
# notice. The norms stand *before* the projections; the sum $x + \dots$ is never normalised inside
# the stack. The latents read one another in the same softmax in which they read
# the features: cross-attention and self-attention at once. And the activation in (5) is the
# *squared* ReLU. The pseudo-code of the [paper](https://arxiv.org/abs/2204.14198) (appendix A.1)
# shows no norms; where they stand here is what the re-implementations agree on, and so is one last
# norm at the end. The same with shapes:
#
# ```
# features x       [T, S, D]  + tau [T, 1, D] -> f  [T·S, D]                    (1)
# f                [T·S, D]   norm --+
# latents x        [R, D]     norm --+-> c          [T·S + R, D]                (3)
#
# latents x        [R, D]     norm, Wq ------> q    [R, K]
# c                [T·S + R, D]   Wk, Wv ----> k, v [T·S + R, K]  each
# q, k                                   ----> scores, weights  [R, T·S + R]
# weights, v                             ----> sum  [R, K], back to [R, D], added to x    (4)
# latents x        [R, D]     norm, W1 [D, 4D], max(0, ·)², W2 [4D, D], added to x       (5)
# ```
#
# (One head is drawn; of all H the sums stand side by side, [R, H·K], before they become [R, D].)
#
# The cost of (4) is R · (T S + R) scores, linear in the number of frames. Every further layer of
# the language model then meets R tokens, whatever T was.

# %% [markdown]
# ## Frames get their time
#
# ### Exercise 5.1: add the time and flatten
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
check("5.1", with_time)

# %% [markdown]
# ### Exercise 5.2: stretch the time
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
check("5.2", stretch)

# %% [markdown]
# The library writes the weights of the trained embeddings as a matrix, a row for each frame, so
# that clips of different lengths fit into one batch:

# %%
source(perceiver.time_weights)

# %% [markdown]
# **Predict, then run:** three trained embeddings, five frames. How much of the first, the second
# and the third embedding does the *second* frame get? Three numbers that sum to 1.

# %%
guess("5.a", first=..., second=..., third=...)

# %% tags=["reveal"]
share = perceiver.time_weights(5, 5, trained=3)
print(share)
told("5.a", first=share[1, 0], second=share[1, 1], third=share[1, 2])

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
# ### Exercise 5.3: the layer without a loop
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
check("5.3", read)

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
# Are the visual tokens the same? Write `True` or `False`.

# %%
guess("5.b", same=...)

# %% tags=["reveal"]
still = features[:, :, :1]
tokens = [resampler(np.repeat(still, T, axis=2)) for T in (1, 8)]
change = np.linalg.norm(tokens[1] - tokens[0]) / np.linalg.norm(tokens[0])
print(f"relative change: {change:.1f}")
told("5.b", same=change < 0.01)

# %% [markdown]
# <details><summary>After the run</summary>
#
# They are not: the eight copies carry eight different times. "An image is a one-frame video" means
# $\tau_1$ alone.
#
# </details>

# %% [markdown]
# ## Thirty frames from eight
#
# Does the interpolation work? We ask the whole model: `<image> moving …`, and take the direction
# with the highest score. By guessing, a quarter is right.

# %%
from miniflamingo.worlds.grammar import DIRECTION_IDS, TOKENIZER

clips, directions = clips_of(160, 8)
features = features_of(clips)


def found(features, directions, resampler=resampler):  # -> the share of right directions
    n = len(features)
    text = np.tile(TOKENIZER.encode("<BOS> <image> moving"), (n, 1))
    logits = model.read(text, resampler(features), np.tile([0, 1, 1], (n, 1)))[:, -1]
    return (logits[:, DIRECTION_IDS].argmax(axis=1) == directions).mean()


# %% [markdown]
# **Predict, then run:** trained on 8 frames only. Which share of the directions will be right with
# 4 frames, which get the first 4 embeddings alone, and with 16 and 30? Three numbers between 0 and
# 1.

# %%
guess("5.c", frames_4=..., frames_16=..., frames_30=...)

# %% tags=["reveal"]
results = {}
for T in (1, 4, 8, 16, 30):
    results[T] = found(features_of(clips_of(60, T)[0]), clips_of(60, T)[1])
    print(f"{T:>2} frames: {results[T]:.0%} of the directions are right")
told("5.c", frames_4=results[4], frames_16=results[16], frames_30=results[30])

# %% [markdown]
# <details><summary>After the run</summary>
#
# Thirty frames are read as well as eight, without a step of training. That is the interpolation:
# ends on ends, a long clip looks like a slow one. One frame has no motion. Four frames, a fast clip
# that ends at the time $\tau_4$, were never trained, and it shows.
#
# </details>

# %% [markdown]
# ## 194 million parameters (optional)
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
# ### Exercise 5.4: count (optional)
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
check("5.4", count)

# %% [markdown]
# **Predict, then run:** version 1 of the paper says that a head is 128 wide. The table of version 2
# implies 1,536 / 16 = 96. Which of the two widths gives 194M? You can estimate it by (6), with
# $D_{in}$ = 3,072, the width of the eye's last grid.

# %%
guess("5.d", width=...)

# %% tags=["reveal"]
from miniflamingo.flamingo import FlamingoConfig, count_parameters

millions = {}
for K in (96, 128):
    config = FlamingoConfig.preset("3B", resampler_head_dim=K)
    millions[K] = count_parameters(config)["resampler"] / 1e6
    print(f"K = {K:>3}: {millions[K]:.1f} million")
told("5.d", width=min(millions, key=lambda K: abs(millions[K] - 194)))

# %% [markdown]
# <details><summary>After the run</summary>
#
# Only 128. So 16 heads of 128 make an inner width of 2,048 in a model of width 1,536: the heads
# need not add up to D.
#
# </details>
#
# The eye's width of 3,072 must be projected; without that projection 4.7 million are missing.

# %% [markdown]
# ## Where the latents look (optional)
#
# The weights of (4) can be looked at. `attention_maps` returns [layers, B, N, H, R, T·S + R].

# %%
rng = np.random.default_rng(4)
attributes = [rng.integers(0, most, 200) for most in (8, 6)] + [np.ones(200, int)]
pictures = shapes.draw_objects(*attributes, rng, split="test")
maps = resampler.attention_maps(features_of(pictures[:, None]))
maps = maps[0, :, 0].mean(axis=1)  # first layer, mean of the heads
looks = maps[..., :36].reshape(200, 8, 6, 6)
show(
    plots.plot_latents(pictures[0], looks[0]),
    alt="A picture of one object, and where each of eight latents looks on a 6 by 6 grid in the "
    "first layer, mean of four heads.",
)

# %% [markdown]
# **Predict, then run:** one picture proves nothing, so over all 200: the cells in which the picture
# is more colourful than usual are about a fifth of the grid. A latent that looks anywhere gives
# them a fifth of its look. Of the eight latents, what does the one give that looks at them most,
# and what the one that looks at them least? Two shares between 0 and 1.

# %%
guess("5.e", most=..., least=...)

# %% tags=["reveal"]
colour = (pictures.max(axis=-1) - pictures.min(axis=-1)).reshape(200, 6, 4, 6, 4).mean(axis=(2, 4))
usual = colour.mean(axis=(1, 2), keepdims=True) + 0.5 * colour.std(axis=(1, 2), keepdims=True)
is_object = (colour > usual)[:, None]
on_object = (looks * is_object).sum(axis=(0, 2, 3)) / looks.sum(axis=(0, 2, 3))
print(f"the object covers {is_object.mean():.2f} of the grid; the latents' share on it:")
print("  ".join(f"{r}: {share:.2f}" for r, share in enumerate(on_object)))
most, least = (round(float(share), 2) for share in (on_object.max(), on_object.min()))
told("5.e", within=0.3, most=most, least=least)

# %% [markdown]
# <details><summary>After the run</summary>
#
# No latent was told what to look at. Some look at the object, about twice as much as chance would,
# and latents 0 and 3 look *past* it, at the background.
#
# </details>
#
# Do not read too much into such maps: a feature of the eye has seen more than its own cell, and
# what is fetched there, the value, is not in the picture.
#
# ### Exercise 5.5: the share of each frame (optional)
#
# ★★★ · 18 minutes · 9 to 12 lines. From the beginning to the answer: B clips, a layer of H heads.
# `queries` [R, D] are the normed latents, the same for all clips; `context` [B, T·S + R, D] is (3)
# for each clip; `wq` and `wk` are [D, H·K]. The clips of a batch are not equally long: clip b has
# `frames[b]` frames, from the first on, and is padded to T. Nobody may look at the padding,
# whatever stands there. Return [R, T + 1]: what share of its look each latent gives to each frame
# and, in the last column, to the latents. Mean over clips and heads, each clip counts alike; a row
# sums to 1.
#
# <details><summary>Hint 1</summary>
#
# Split the projections into heads as in module 01: $q$ becomes [H, R, K], the keys [B, H, K, T·S +
# R], so that `q @ k` is [B, H, R, T·S + R]. Then (4) without the values: divide by √K, softmax.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Which of the T frames are real is a comparison, [B, T]; repeat each for its S features, append R
# columns that are always true, and mask the scores before the softmax.
#
# </details>
# <details><summary>Hint 3</summary>
#
# After the mean over clips and heads cut off the last R columns, and sum them. The first T·S
# columns are [T, S], frame after frame: reshape them and sum over S.
#
# </details>


# %% tags=["exercise"]
def shares(queries, context, wq, wk, H, T, frames):  # [R, D], [B, M, D], .., int[B] -> [R, T + 1]
    ...  # your code


# %% tags=["solution"]
def shares(queries, context, wq, wk, H, T, frames):  # [R, D], [B, M, D], .., int[B] -> [R, T + 1]
    R, B = len(queries), len(context)
    q = (queries @ wq).reshape(R, H, -1).swapaxes(0, 1)  # [H, R, K]
    k = (context @ wk).reshape(B, -1, H, q.shape[-1]).transpose(0, 2, 3, 1)  # [B, H, K, M]
    S = (k.shape[-1] - R) // T
    real = np.repeat(np.arange(T) < frames[:, None], S, axis=1)  # [B, T*S]
    real = np.concatenate([real, np.ones((B, R), bool)], axis=1)[:, None, None]
    scores = np.where(real, q @ k / np.sqrt(q.shape[-1]), -np.inf)
    looks = softmax(scores).mean(axis=(0, 1))  # equation (4), the mean [R, M]
    by_frame = looks[:, :-R].reshape(R, T, -1).sum(axis=-1)
    return np.column_stack([by_frame, looks[:, -R:].sum(axis=-1)])


# %%
check("5.5", shares)

# %% [markdown]
# The library has the weights of all layers in one call:

# %%
source(perceiver.PerceiverResampler.attention_maps)

# %% [markdown]
# The first layer of the trained resampler, the mean over 40 clips:

# %%
all_maps = resampler.attention_maps(features[:40])[:, :, 0]  # [layers, 40, H, R, T*S + R]
first = resampler.layers[0]
x, f, _ = resampler.begin(features[:40], None)
queries, context = first.normalise(x, f)  # equation (3), clip by clip
wq, wk = first.attention.q_proj.weight.data.T, first.attention.k_proj.weight.data.T

# %% tags=["target"]
paid = shares(queries[0], context, wq, wk, 4, 8, np.full(40, 8))
assert np.allclose(paid[:, -1], all_maps[0].mean(axis=(0, 1))[:, -8:].sum(axis=1), atol=1e-5)
show(
    plots.plot_lines(
        np.arange(1, 9), {f"latent {r}": paid[r, :8] for r in (0, 4, 6)},
        "frame", "share of the look", log=False,
    ),
    alt="The share of the look that three latents give to each of eight frames, mean of 40 clips. "
    "Latent 0 gives more than half to frame 1 and nothing to the last; latent 4 gives most to "
    "frames 7 and 8; latent 6 looks at all frames alike.",
)  # fmt: skip

# %% tags=["exercise"]
show(
    lambda: plots.plot_lines(
        np.arange(1, 9),
        dict(zip(("latent 0", "latent 4", "latent 6"),
                 shares(queries[0], context, wq, wk, 4, 8, np.full(40, 8))[[0, 4, 6], :8])),
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
# ## What it buys (optional)
#
# The paper compares (section 3.3, ablations): an MLP in the resampler's place scores 66.6, a
# transformer over latents and features 66.7, the Perceiver 70.7. What do they cost? The scores of
# one layer and head at S = 100 and R = 64:

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
# Three departures from the paper, put into the *trained* resampler:
#
# 1. **Time embedding off** ([open-flamingo](https://github.com/mlfoundations/open_flamingo)):
#    frames are flattened, but nothing tells them apart.
# 2. **No norm on the features** before the projections.
# 3. **Latents not appended** to keys and values.


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
# **Predict, then run:** which of the three cost the model its sense of direction, so that
# fewer than half of its answers are right? Write a list of their numbers.

# %%
guess("5.f", faults=...)

# %% tags=["reveal"]
faults = {"as trained": {}, "1 time embedding off": {"time": False}}
faults["2 no norm on the features"] = {"norm": False}
faults["3 latents not appended"] = {"append": False}
rights = [found(features, directions, broken(**changes)) for changes in faults.values()]
for name, right in zip(faults, rights):
    print(f"{name:<27} {right:.0%}")
told("5.f", faults=[i for i, right in enumerate(rights) if right < 0.5])

# %% [markdown]
# <details><summary>After the run</summary>
#
# Faults 1 and 2 leave guessing. Fault 3 does **no harm here**. No accuracy on *pictures* would ever
# show fault 1: with T = 1 there is nothing to tell apart.
#
# </details>
#
# ### One by one, and a fourth (optional)
#
# For fault 1, play a clip backwards, and remember that attention over a list
# does not change when the list is shuffled:

# %% tags=["reveal"]
for name, changes in list(faults.items())[:2]:
    forth, back = (broken(**changes)(x) for x in (features, features[:, :, ::-1]))
    change = np.linalg.norm(forth - back) / np.linalg.norm(forth)
    print(f"{name:<22} relative change when played backwards: {abs(change):.1f}")

# %% [markdown]
# Fault 2 asks what the norm is for. The features come out of a ReLU, at a size that nobody fixed;
# behind the norm their size does not matter. (Both kinds of embedding are set to 0 for this, so
# that the features alone decide.)

# %% tags=["reveal"]
without_time = {True: broken(time=False), False: broken(time=False, norm=False)}
for part in without_time.values():
    part.spatial_embeddings.data = part.spatial_embeddings.data * 0
for has_norm, part in without_time.items():
    one, ten = part(features), part(10 * features)
    change = np.linalg.norm(ten - one) / np.linalg.norm(one)
    print(f"norm: {has_norm!s:<5}  ten times larger features change the tokens by {change:.1f}")

# %% [markdown]
# What fault 3 does can be read off the maps: how much do the latents look at one another?

# %% tags=["reveal"]
all_maps = resampler.attention_maps(features[:40])[:, :, 0]  # [layers, 40, H, R, T*S + R]
for i, maps in enumerate(all_maps):
    print(f"layer {i}: share on the latents {maps[..., -8:].sum(axis=-1).mean():.3f}")
print(f"to look everywhere alike would give {8 / 296:.3f}")

# %% [markdown]
# <details><summary>After the run</summary>
#
# They hardly do, in two layers with 288 features to look at: less than by chance. So this model
# cannot say whether the paper was right to append them. Not every departure is a fault, and a
# measurement at this scale is no verdict on a model of 6 layers and 64 latents.
#
# </details>
#
# **A fourth fault: an embedding per medium, frames not flattened**
# ([flamingo-pytorch](https://github.com/lucidrains/flamingo-pytorch)). τ counts the pictures of a
# page, and each frame is resampled by itself. Take a page with the same picture three times, and
# add $\tau_n$ to picture n, as the embedding per medium does; then a clip whose eight frames count
# as eight media:

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
# Which check catches what? Exercises 5.1 and 5.3 name the departures when they are in your code:


# %%
def not_appended(x, f, norm, wq, wk, wv):
    q, k, v = norm(x) @ wq, norm(f) @ wk, norm(f) @ wv
    return x + softmax(q @ k.T / np.sqrt(q.shape[-1])) @ v


print(check("5.3", not_appended).message)
print(check("5.3", lambda x, f, norm, *w: read_loop(x, f, lambda y: y, *w)).message)
print(check("5.1", lambda x, time: x.reshape(-1, x.shape[-1])).message)

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
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.1 (3.1.1 in the
# first version); appendix A.1 has the pseudo-code and the sizes, section 3.3 the ablation of the
# resampler. **In the library:** `miniflamingo/perceiver.py`.
#
# **Next:** module 06, the frozen language model that will read these tokens, and how it is made to
# speak.

# %% [markdown] tags=["notes"]
# ### For the teacher
#
# **Minutes.** 0 the figure of keys; 4 equations (1) to (5) beside module 03's: what is new is the
# time, and that the latents are among the keys; 8 exercise 5.1; 13 exercise 5.2, guess 5.a; 25 the
# loop, exercise 5.3; 39 the library, guess 5.b; 44 guess 5.c; 47 guess 5.f and its discussion.
#
# **Predictions.** *5.a:* 0.5, 0.5 and 0: place 1 · 2/4. Some say 0.2, as if frames were cut to
# lengths. *5.b:* `False`. Most say `True`, "nothing moves": the time is added whether anything
# moves or not. *5.c:* see what is printed: 4 frames are worst, 16 and 30 as good as 8. Usually
# guessed the other way round, "few frames are easy". *5.d (optional):* 128. *5.e (optional):* about
# twice and less than half of a fifth; many guess 0 for the least. *5.f:* [1, 2]. Fault 3 is mostly
# taken for harmful, because the paper does it otherwise.
#
# **Open questions.** None is left open. Worth asking: why may four frames be worse than eight if
# the first four embeddings are trained ones? Because the whole clip, from its start to its end,
# then happens before $\tau_4$: a motion twice as fast, which training never showed.
#
# **Misconceptions.** That a clip gets more visual tokens than a picture. That S must be known to
# the resampler. That attention sees the order of a list. That each departure from a paper is a bug.
#
# **To cut.** Exercise 5.1 (do it aloud), then guess 5.b. Keep 5.3 and guess 5.f.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** Two clips show the same eight frames, one of them in reverse order. The time embeddings are
# all set to the same vector. What can the language model say about the direction of motion?
#
# <details><summary>Answer</summary>
#
# Nothing. The same vector is added to all features, so both clips give the same *set* of keys and
# values, and (4) sums over a set: the visual tokens are equal.
#
# </details>
#
# **2.** A page holds 5 pictures at S = 100, R = 64. How many visual tokens does the language
# model's cross-attention have to store, and how many if each picture is a clip of 8 frames?
#
# <details><summary>Answer</summary>
#
# 5 · 64 = 320 both times: what comes out is R for each medium, whatever T and S are. Only the
# resampler itself reads more, 64 · (864) instead of 64 · (164) scores a layer, head and medium.
#
# </details>
#
# **3.** The eye is exchanged for one whose features have the same directions but are 20 times as
# long. Which of the resampler's parts notice?
#
# <details><summary>Answer</summary>
#
# Behind the layer norm on the features the size is gone. But (1) adds τ *before* the norm: beside
# features of 20 times the length, the time embeddings count a twentieth as much, and frames are
# hardly told apart. Still pictures would work, clips would suffer.
#
# </details>
