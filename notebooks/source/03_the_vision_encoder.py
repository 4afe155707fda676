# %% [markdown]
# # 03 The vision encoder
#
# **The question: how do pixels become features in which a picture lies close to its own caption?**
#
# After this module you can
#
# - write a convolution with loops and as a matrix product, and standardise its weights;
# - say what happens to a signal in a deep network without normalisation, and keep its size by
#   arithmetic instead of by looking at the batch;
# - write the two-term contrastive loss and its gradient, and use what it has trained to retrieve;
# - recognise five faults of contrastive training, four of them from public code, none of which
#   stops a program.
#
# **You need:** softmax and cross-entropy (module 01), and a little probability: the variance of a
# sum.
#
# **Time:** about 53 minutes: 13 to read (2,550 words, 200 a minute) and 40 for five exercises.
# Computing takes about 6 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# Flamingo's eye is trained first, on pictures and captions alone, and then frozen for ever. Ours
# comes with the package. We load it, and draw a batch of pictures and captions of the same kind as
# it was trained on. The captions come in groups that differ in one shape only.

# %%
import numpy as np

from miniflamingo import plots, vision
from miniflamingo.course import check, show, source
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds import shapes
from miniflamingo.worlds.datasets import contrastive_batch
from miniflamingo.worlds.grammar import TOKENIZER

# %%
eye = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors").vision_encoder
pictures, tokens = contrastive_batch(96, np.random.default_rng(5))
captions = [" ".join(TOKENIZER.words[i] for i in row if i) for row in tokens]
features = eye(pictures)
print(f"{pictures.shape = }  {features.shape = }  {eye.num_parameters():,} parameters")

# %% [markdown]
# A picture of 24 × 24 pixels becomes a grid of 6 × 6 features, 64 numbers each. Below every picture
# you see how far each feature is from the mean of all: the eye says *something is here*.

# %%
some = [0, 1, 8, 16, 48, 49, 56, 64]
grid = np.linalg.norm(features - features.mean(axis=(0, 1)), axis=-1).reshape(-1, 6, 6)
show(
    plots.plot_features(pictures[some], [captions[i] for i in some], grid[some]),
    alt="Eight pictures with their captions, four of one object and four of two. Below each, a "
    "6 by 6 grid that is dark where the objects are and light elsewhere.",
)

# %% [markdown]
# | letter | meaning | here | in the paper's eye (NFNet-F6) |
# |---|---|---|---|
# | B | pictures, and captions, in a batch | 96 | |
# | C, O | channels into and out of a convolution | 3 to 64 | 3 to 3,072 |
# | u, v | place in a kernel, of height and width k | k = 3 | 1 and 3 |
# | S | features of a picture, the last grid in a row | 36 | 100 at 320 × 320 pixels |
# | D | width of the space where pictures and captions meet | 64 | 1,376 |
# | s | inverse temperature, learned | | |
# | | parameters | 0.1 million | 435 million |
#
# *Normalizer-Free* means: no batch norm. Batch norm subtracts the mean of the batch and divides by
# its deviation, so that the features of a picture depend on *the other pictures*. **Predict, then
# run:** we paint picture 1 black. Do the features of picture 0 change?

# %%
other = pictures[:8].copy()
other[1] = 0


def batch_norm(x):  # [B, S, D]
    return (x - x.mean(axis=(0, 1))) / x.std(axis=(0, 1))


before, after = eye(pictures[:8]), eye(other)
print("without batch norm:", abs(after - before)[0].max() > 1e-4)
print("with batch norm:   ", abs(batch_norm(after) - batch_norm(before))[0].max() > 1e-4)

# %% [markdown]
# A frozen eye must not do that: it sees one picture at a time, or 32. And in contrastive training
# the leak is a way to cheat. So what batch norm does for depth must be had in another way.

# %% [markdown]
# ## The derivation: a signal that keeps its size
#
# **Convolution** with stride t and padding p (zeros around the picture):
#
# $$y_{b,i,j,o} = \sum_{u,v,c} W_{o,c,u,v} \; x_{b,\; t i + u - p,\; t j + v - p,\; c}
# \qquad\qquad (1)$$
#
# The same k·k·C numbers, the *patch* at (i, j), meet all O filters. With every patch as a row of a
# matrix P and every filter as a column of a matrix M, (1) is one product:
#
# $$Y = P M, \qquad P: [B h w, \; k k C], \quad M: [k k C, \; O] \qquad\qquad (2)$$
#
# **What size has the output?** Let the numbers of a patch be independent, with mean μ and variance
# σ². Then an output of filter w has
#
# $$E[y] = \mu \sum_i w_i, \qquad Var[y] = \sigma^2 \sum_i w_i^2 \qquad\qquad (3)$$
#
# After a ReLU all numbers are positive, so μ > 0, and every channel gets a mean of its own,
# $\mu \sum w$, which is the same for all pictures and tells nothing. It grows from layer to layer.
# **Scaled weight standardisation** removes the cause. It computes with
#
# $$\hat W_o = g_o \cdot \frac{W_o - \overline{W_o}}{\sqrt{\sum (W_o - \overline{W_o})^2 +
# \epsilon}} \qquad\qquad (4)$$
#
# where the mean and the sum run over all k·k·C weights of filter o, and the gain $g_o$ is learned.
# By (3), $E[y] = 0$ whatever μ is, and $Var[y] = g_o^2 \sigma^2$. No picture was looked at.
#
# **The activation** shrinks the variance: for x normal, $Var[\max(x, 0)] = (1 - 1/\pi)/2$. So the
# activation is multiplied by
#
# $$\gamma = \sqrt{2 / (1 - 1/\pi)} = 1.714 \text{ for ReLU} \qquad\qquad (5)$$
#
# **A residual block** adds a branch f to its input. Variances add, so without care they double in
# every block. The Normalizer-Free block divides its input by its *expected* deviation β and scales
# the branch by a = 0.2:
#
# $$x_{l+1} = x_l + a \, f(x_l / \beta_l), \qquad \beta_l^2 = Var[x_l], \qquad
# Var[x_{l+1}] = Var[x_l] + a^2 \qquad (6)$$
#
# β is not measured. It is known from (6) before the first picture is seen. A *transition*, which
# changes the width or the stride, needs a convolution on the shortcut, too. It takes the divided
# signal, of variance 1, so the count starts again: $Var[x_{l+1}] = 1 + a^2$.

# %% [markdown]
# ## A convolution, with loops and without
#
# Equation (1), word for word:


# %%
def conv_loop(x, weight, stride, padding):  # [B, H, W, C], [O, C, k, k] -> [B, h, w, O]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    (B, H, W, _), (O, _, kh, kw) = x.shape, weight.shape
    out = np.zeros((B, (H - kh) // stride + 1, (W - kw) // stride + 1, O))
    for b, i, j, o in np.ndindex(out.shape):
        patch = x[b, stride * i : stride * i + kh, stride * j : stride * j + kw]
        out[b, i, j, o] = (patch.transpose(2, 0, 1) * weight[o]).sum()  # equation (1)
    return out


# %% [markdown]
# ### Exercise 3.1: a convolution as a matrix product
#
# ★★★ · 12 minutes · 4 to 6 lines. Write equation (2): x is [B, H, W, C], weight [O, C, kh, kw]; pad
# with zeros. `np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))` gives all windows
# [B, H', W', C, kh, kw], a view without a copy.
#
# <details><summary>Hint 1</summary>
#
# The stride leaves out windows: `windows[:, ::stride, ::stride]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The last three axes of the windows, C, kh, kw, stand in the same order as in the weight. So
# `windows.reshape(B, h, w, -1)` is P, and the matrix M is `weight.reshape(O, -1).T`.
#
# </details>


# %% tags=["exercise"]
def convolve(x, weight, stride, padding):  # [B, H, W, C], [O, C, kh, kw] -> [B, h, w, O]
    ...  # your code


# %% tags=["solution"]
def convolve(x, weight, stride, padding):  # [B, H, W, C], [O, C, kh, kw] -> [B, h, w, O]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # [B, h, w, C, kh, kw]
    patches = windows.reshape(*windows.shape[:3], -1)
    return patches @ weight.reshape(len(weight), -1).T  # equation (2)


# %%
check("3.1", convolve)

# %% [markdown]
# The library's does the same and knows *groups* as well: channels that meet only their own filters.
# The paper's eye has them, ours has none.

# %%
source(vision.conv2d)

# %%
rng = np.random.default_rng(0)
x, weight = rng.normal(size=(2, 7, 6, 3)), rng.normal(size=(4, 3, 3, 3))
by_loops = conv_loop(x, weight, stride=2, padding=1)
assert np.allclose(by_loops, vision.conv2d(x, weight, stride=2, padding=1), rtol=1e-12)
print(x.shape, "->", by_loops.shape)

# %% [markdown]
# ## Weights that keep the signal's size
#
# ### Exercise 3.2: weight standardisation
#
# ★★☆ · 7 minutes · 3 lines. Write equation (4) for all filters at once. `gain` is [O].
#
# <details><summary>Hint 1</summary>
#
# A filter's weights lie along the axes 1, 2 and 3. `keepdims=True` lets the result broadcast.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A *sum* of squares, not a mean. `gain[:, None, None, None]` is [O, 1, 1, 1].
#
# </details>


# %% tags=["exercise"]
def standardise(weight, gain, eps):  # [O, C, k, k], [O], float -> [O, C, k, k]
    ...  # your code


# %% tags=["solution"]
def standardise(weight, gain, eps):  # [O, C, k, k], [O], float -> [O, C, k, k]
    centred = weight - weight.mean(axis=(1, 2, 3), keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=(1, 2, 3), keepdims=True) + eps)
    return centred / norm * gain[:, None, None, None]  # equation (4)


# %%
check("3.2", standardise)

# %%
source(vision.standardise_weight)

# %% [markdown]
# Now we look at depth: 24 layers of ReLU (times γ) and convolution, untrained, on noise. The grid
# is wrapped round, so that no edge disturbs. We follow two numbers: how much a channel *varies*
# from picture to picture and place to place, which is what it can tell; and its squared *mean*,
# which tells nothing. Three ways to draw the weights of a filter with n inputs: of variance 1/n; of
# variance 1/n times 2/γ², which is He's rule and keeps the mean *square* constant; and (4).

# %%
scale = vision.ACTIVATION_GAIN["relu"]  # equation (5)


def follow(prepare, depth=24, width=32):
    x = np.random.default_rng(0).normal(size=(16, 8, 8, width))
    rng, variance, mean = np.random.default_rng(1), [], []
    for _ in range(depth):
        weight = prepare(rng.normal(0, (9 * width) ** -0.5, (width, width, 3, 3)))
        x = np.pad(np.maximum(x, 0) * scale, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        x = vision.conv2d(x, weight)
        variance.append(x.var(axis=(0, 1, 2)).mean())
        mean.append((x.mean(axis=(0, 1, 2)) ** 2).mean())
    return variance, mean


# %% [markdown]
# **Predict, then run:** He's rule keeps variance plus squared mean at the same size. Then what
# happens to the variance alone, when the means take an ever larger share?

# %%
ways = {"variance 1/n": lambda w: w, "He's rule": lambda w: w * np.sqrt(2) / scale}
ways["standardised"] = lambda w: vision.standardise_weight(w, np.ones(len(w)))
curves = {name: follow(prepare) for name, prepare in ways.items()}
for name, (variance, mean) in curves.items():
    print(f"{name:<14} after 24 layers: variance {variance[-1]:.1g}, squared mean {mean[-1]:.1g}")

# %%
titles = "variance of a channel", "squared mean of a channel"
panels = {title: {name: curve[i] for name, curve in curves.items()}
          for i, title in enumerate(titles)}  # fmt: skip
show(
    plots.plot_signal(panels),
    alt="Two panels over 24 layers, logarithmic. Variance: with weights of variance 1/n it grows "
    "to about two hundred, with He's rule it falls to about a fiftieth, standardised it stays at "
    "1. Squared mean: grows to two thousand, stays near a fifth, and stays near 0.002.",
)

# %% [markdown]
# With He's rule nothing explodes, and yet the network goes blind: after 24 layers a tenth of the
# signal is about the picture, the rest is the same for all. Batch norm would subtract that mean.
# Weight standardisation does not let it arise, and it holds during training, too, because (4) is
# part of the forward pass: whatever the optimiser does to W, the filter that is used has mean 0.

# %% [markdown]
# ### Exercise 3.3: the expected deviation
#
# ★★☆ · 6 minutes · 4 to 7 lines. Before any picture is seen, compute β of equation (6) for each
# block of a network. The first block's input has variance 1. `transition` is bool [L]: true where
# a block is a transition. Return float [L]: the deviation of the *input* of each block.
#
# <details><summary>Hint 1</summary>
#
# Keep a variance v. For each block: write down $\sqrt v$, then compute v after the block.
#
# </details>
# <details><summary>Hint 2</summary>
#
# After a block v is v + a², after a transition 1 + a².
#
# </details>


# %% tags=["exercise"]
def deviations(transition, a):  # bool[L], float -> float[L]
    ...  # your code


# %% tags=["solution"]
def deviations(transition, a):  # bool[L], float -> float[L]
    betas, v = [], 1.0
    for restarts in transition:
        betas.append(np.sqrt(v))
        v = (1.0 if restarts else v) + a**2  # equation (6)
    return np.array(betas)


# %%
check("3.3", deviations)

# %% [markdown]
# The library's block. `skip_gain` is NFNet's *SkipInit*, a learned number on the branch. In NFNet
# it starts at 0, so that a new block is the identity: the same idea as Flamingo's gate in module
# 07. Here it starts at 1, a choice for a net of two blocks.

# %%
source(vision.NFBlock.forward)

# %% [markdown]
# Sixteen blocks, untrained, with (6) and without (β = 1 and a = 1):

# %%
config = vision.VisionConfig(image_size=8, widths=(32,), depths=(16,), strides=(1,))


def residual(scaled):
    x, v, variances = np.random.default_rng(0).normal(size=(16, 8, 8, 32)), 1.0, []
    rng = np.random.default_rng(2)
    for _ in range(16):
        block = vision.NFBlock(32, 32, 1, np.sqrt(v) if scaled else 1, config, rng=rng)
        out = block(x)
        x, v = (out if scaled else x + (out - x) / 0.2), v + 0.04
        variances.append(x.var(axis=(0, 1, 2)).mean())
    return variances


# %%
expected = [1 + 0.04 * l for l in range(1, 17)]
show(
    plots.plot_signal(
        {"variance after a block": {"expected, (6)": expected, "measured, (6)": residual(True),
                                    "β = 1, a = 1": residual(False)}},
        xlabel="block",
    ),
    alt="The variance after each of 16 residual blocks, logarithmic. Without the two scales it "
    "grows by a factor of about two a block, to tens of thousands. With them it grows from 1 to "
    "about 1.5, close to the line that equation 6 expects.",
)  # fmt: skip

# %% [markdown]
# ## The derivation: pictures and captions in one space
#
# The mean of a picture's features, projected to D numbers and brought to length 1, is its vector
# $u_i$. The caption goes through a text encoder (BERT in the paper, a small transformer here), the
# mean over its words is projected and brought to length 1, too: $w_i$. Of B pictures and B captions
# we form all B² similarities, times a learned *inverse temperature* s:
#
# $$z_{ij} = s \; u_i^\top w_j \qquad\qquad (7)$$
#
# Row i asks: which caption belongs to picture i? Column i asks: which picture belongs to caption i?
# Each is a classification with B classes, and the answer is always i:
#
# $$\mathcal{L} = -\frac1B \sum_i \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
# \; - \; \frac1B \sum_i \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}} \qquad\qquad (8)$$
#
# The other pairs of the batch are the wrong answers, for free. A gradient of cross-entropy is
# "probability minus truth", so with $p$ the softmax of the rows and $q$ that of the columns
#
# $$\frac{\partial \mathcal{L}}{\partial z_{ij}} = \frac1B \big( p_{ij} + q_{ij} - 2\,[i = j] \big)
# \qquad\qquad (9)$$
#
# Why the temperature? $u^\top w$ lies between −1 and 1. With s = 1 and B = 96 even a perfect eye,
# 1 for its own and −1 for all others, would pay $2 \log(1 + 95 e^{-2})$.

# %%
for s in (1, 10, 100):
    print(f"s = {s:>3}: the least loss is {2 * np.log1p(95 * np.exp(-2.0 * s)):.2g}")
print(f"knowing nothing costs {2 * np.log(96):.3g}")

# %% [markdown]
# With loops, equation (8):


# %%
def loss_loop(u, w, s):  # [B, D], [B, D], [] -> []
    total, B = 0.0, len(u)
    for i in range(B):
        row = sum(np.exp(s * u[i] @ w[j]) for j in range(B))
        column = sum(np.exp(s * u[j] @ w[i]) for j in range(B))
        own = np.exp(s * u[i] @ w[i])
        total -= (np.log(own / row) + np.log(own / column)) / B  # equation (8)
    return total


# %% [markdown]
# ### Exercise 3.4: the two terms
#
# ★★☆ · 8 minutes · 3 to 5 lines. Write (7) and (8) without a loop, with the library's `log_softmax`
# (over the last axis). Return both terms apart, as an array [2]: pictures to captions, captions to
# pictures.
#
# <details><summary>Hint 1</summary>
#
# `logits = s * u @ w.T` is [B, B]. The terms' own pairs stand on its diagonal: `np.diagonal`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The second term is the first of `logits.T`.
#
# </details>

# %%
from miniflamingo.functional import log_softmax, softmax


# %% tags=["exercise"]
def two_terms(u, w, s):  # [B, D], [B, D], [] -> [2]
    ...  # your code


# %% tags=["solution"]
def two_terms(u, w, s):  # [B, D], [B, D], [] -> [2]
    logits = s * u @ w.T  # equation (7)
    both = (log_softmax(z) for z in (logits, logits.T))
    return np.array([-np.diagonal(logp).mean() for logp in both])  # equation (8)


# %%
check("3.4", two_terms)

# %%
source(vision.contrastive_loss)

# %%
u, w = vision.l2_normalise(rng.normal(size=(2, 6, 5)))
assert np.isclose(loss_loop(u, w, 7.0), vision.contrastive_loss(u, w, 7.0), rtol=1e-12)

# %% [markdown]
# ### Exercise 3.5: the gradient
#
# ★★☆ · 7 minutes · 2 to 4 lines. Write (9): from `logits` [B, B] to the gradient [B, B]. `softmax`
# runs over the last axis.
#
# <details><summary>Hint 1</summary>
#
# The softmax of the columns is `softmax(logits.T).T`: turned there, and turned back.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `[i = j]` is `np.eye(B)`.
#
# </details>


# %% tags=["exercise"]
def dlogits_of(logits):  # [B, B] -> [B, B]
    ...  # your code


# %% tags=["solution"]
def dlogits_of(logits):  # [B, B] -> [B, B]
    B = len(logits)
    return (softmax(logits) + softmax(logits.T).T - 2 * np.eye(B)) / B  # equation (9)


# %%
check("3.5", dlogits_of)

# %% [markdown]
# From there to the vectors it is (7) backwards, and the library has it in a few lines:

# %%
source(vision.contrastive_loss_backward)

# %% [markdown]
# ## A batch seen by the eye
#
# The text encoder was thrown away when the eye was frozen: Flamingo has a language model of its
# own. To see the two together we train a new one, for a second, on the frozen eye's features. The
# eye does not move; only the captions must find their pictures.

# %%
from miniflamingo.autograd import Tape
from miniflamingo.functional import exp
from miniflamingo.training import AdamW, OptimiserConfig

rng = np.random.default_rng(0)
drawn = [contrastive_batch(96, rng) for _ in range(20)]
batches = [(eye(x).mean(axis=1), y) for x, y in drawn]


# %%
def loss_of(model, means, tokens, loss=vision.contrastive_loss, norm=vision.l2_normalise):
    u = norm(model.image_proj(means))
    w = norm(model.text_proj(model.text_encoder(tokens)))
    return loss(u, w, exp(model.log_inverse_temperature))


# %%
def train(steps=90, **changes):
    rng = np.random.default_rng(0)
    text = vision.TextEncoder(len(TOKENIZER), 64, rng=rng)
    model = vision.ContrastiveModel(eye.freeze(), text, 64, 64, rng=rng)
    optimiser = AdamW(model, OptimiserConfig(steps=steps, warmup=20, rate=3e-3))
    for step in range(steps):
        model.zero_grad()
        with Tape() as tape:
            loss = loss_of(model, *batches[step % len(batches)], **changes)
        tape.backward(loss)
        optimiser.update(optimiser.gradient())
    return model


# %% [markdown]
# **Predict, then run:** there are 96 fresh pictures and 96 fresh captions. Guessing finds the right
# caption in 1 % of the cases. How often will the nearest caption be the right one?

# %% tags=["volatile"]
means, own = features.mean(axis=1), np.arange(96)


def recall(model, norm=vision.l2_normalise):  # -> pictures to captions, captions to pictures
    u, w = norm(model.image_proj(means)), norm(model.text_proj(model.text_encoder(tokens)))
    return [float((s.argmax(axis=1) == own).mean()) for s in (u @ w.T, w @ u.T)]


trained = train()
print("found: its caption {:.0%}, its picture {:.0%}".format(*recall(trained)))

# %% tags=["volatile"]
rows = [0, 1, 2, 16, 24, 48, 49, 56]
u = vision.l2_normalise(trained.image_proj(means[rows]))
w = trained.embed_texts(tokens[rows])
show(
    plots.plot_similarity(u @ w.T, pictures[rows], [captions[i] for i in rows]),
    alt="Eight pictures as rows, their captions as columns, similarities from about 0 to 0.9 as "
    "shades of blue. The diagonal is the darkest; pictures of one group, which differ in one "
    "shape, form lighter blocks around it (0.2 to 0.7).",
)

# %% [markdown]
# The dark blocks are the groups: the same colour, size and place, another shape. The diagonal is
# darker still, so shape is told apart, if less clearly. A batch without such groups would have been
# easy by colour alone, and shapes would hardly have been learned: *the wrong answers of the batch
# are the teacher*. That is why batches are large in practice.

# %% [markdown]
# ## Retrieval
#
# Similar pictures lie close together even without captions. This is how Flamingo picks examples for
# a prompt (RICES, module 09): take those whose features are most similar to the query's. We have
# 600 pictures of one object, colour and shape at random.

# %%
rng = np.random.default_rng(3)
colour, shape = rng.integers(0, 8, 600), rng.integers(0, 16, 600)
size = rng.integers(0, 2, 600)
library = shapes.draw_objects(colour, shape, size, rng, split="test")
vectors = eye(library).mean(axis=1)

# %% [markdown]
# **Predict, then run:** what is the mean cosine of two pictures that have nothing to do with each
# other? Remember that the features come out of a ReLU.


# %%
def cosines(x):
    unit = vision.l2_normalise(x)
    return unit @ unit.T


centred = vectors - vectors.mean(axis=0)
for name, x in (("as they are", vectors), ("mean removed", centred)):
    print(f"{name}: mean cosine of two pictures {cosines(x)[np.triu_indices(600, 1)].mean():.1f}")

# %%
similarity = cosines(centred)
np.fill_diagonal(similarity, -1)  # not itself
order = np.argsort(-similarity, axis=1, kind="stable")[:, :6]
for name, kind in (("colour", colour), ("shape", shape), ("size", size)):
    print(f"the nearest picture has the same {name}: {(kind[order[:, 0]] == kind).mean():.0%}")

# %%
names = np.array([f"{shapes.COLOURS[c]} {shapes.SHAPES[k]}" for c, k in zip(colour, shape)])
queries = [3, 5, 8, 12]
nearest = order[queries]
scores = np.take_along_axis(similarity[queries], nearest, axis=1)
show(
    plots.plot_retrieved(
        library[queries], names[queries], library[nearest], names[nearest], scores
    ),
    alt="Four query pictures (green cross, orange triangle, red five, purple triangle) and the six "
    "nearest of 600 for each, with names and cosines; a cross marks another colour or shape. The "
    "first three find mostly their like; the purple triangle finds triangles of other colours.",
)

# %% [markdown]
# ## Break it
#
# Five faults, four of them from public code. None of them stops a program.
#
# 1. **One softmax only** (DALLE-pytorch, issue 32): the loss asks each picture for its caption and
#    never each caption for its picture.
# 2. **No L2 normalisation** before the product (train-CLIP, pull request 3).
# 3. **The logarithm of s as s** (M3D, issue 52): $\log s$ is what is learned; the exp is missing.
# 4. **Labels off by one**: row i belongs to column i − 1, as after a shuffle of one side.
# 5. **Duplicates** (moein-shariatnia/OpenAI-CLIP, issue 11): pictures that share a caption count as
#    wrong answers for one another.

# %%
from miniflamingo.functional import cross_entropy, transpose


def one_axis(u, w, s):  # fault 1
    return cross_entropy(s * (u @ transpose(w, 1, 0)), np.arange(len(u)))


def off_by_one(u, w, s):  # fault 4
    logits, labels = s * (u @ transpose(w, 1, 0)), np.roll(np.arange(len(u)), 1)
    return cross_entropy(logits, labels) + cross_entropy(transpose(logits, 1, 0), labels)


# %% [markdown]
# **Predict, then run:** the same 90 steps with a fault each. Which of them hurts retrieval most,
# and does any of them not hurt it at all?

# %% tags=["volatile"]
print("{:<22} its caption {:4.0%}   its picture {:4.0%}".format("right", *recall(trained)))
faults, models = {"1 one softmax": {"loss": one_axis}}, {}
faults["2 no normalisation"] = {"norm": lambda x: x}
faults["4 labels off by one"] = {"loss": off_by_one}
for name, changes in faults.items():
    models[name] = train(**changes)
    found = recall(models[name], changes.get("norm", vision.l2_normalise))
    print("{:<22} its caption {:4.0%}   its picture {:4.0%}".format(name, *found))

# %% [markdown]
# Fault 4 is the interesting one. It should find nothing, and yet it finds about twenty times what
# guessing finds: neighbours in a batch are of one group, so colour, size and place are learned from
# the *wrong* partner. Only shape is not. Someone who looks at the loss alone sees "it learns
# slowly". Fault 2 hurts most from captions to pictures. In a product length counts as much as
# direction, and on which side do the lengths differ more?

# %% tags=["volatile"]
free = models["2 no normalisation"]
sides = {"pictures": free.image_proj(means), "captions": free.text_proj(free.text_encoder(tokens))}
for name, vectors_of in sides.items():
    length = np.linalg.norm(vectors_of, axis=1)
    print(f"{name}: deviation of the lengths {length.std() / length.mean():.0%} of their mean")

# %% [markdown]
# Fault 1 does **no** visible harm here. The batch is balanced, every caption occurs about as often
# as every picture. What it leaves undone is seen directly: raise all similarities of *one* picture
# by 1, so that it is close to everything, a *hub*.

# %%
u, w = vision.l2_normalise(np.random.default_rng(1).normal(size=(2, 8, 16)))
w = vision.l2_normalise(u + 0.6 * w)  # captions near their pictures
logits = 10 * u @ w.T
hub = logits.copy()
hub[0] += 10.0
for name, z in (("before", logits), ("picture 0 is a hub", hub)):
    rows, columns = (-np.diagonal(log_softmax(t)).mean() for t in (z, z.T))
    found = (z.argmax(axis=0) == np.arange(8)).mean()
    print(f"{name:<20} row term {rows:.2f}  column term {columns:.2f}  picture found {found:.0%}")

# %% [markdown]
# The row term does not notice: a softmax sees differences within its row only. The column term
# does. Which cheap test finds fault 1 at once? Exchange pictures and captions. The right loss is
# symmetric, equation (8), and knowing nothing costs $2 \log B$, not $\log B$.

# %%
zeros = np.zeros((8, 16))
for name, loss in (("right", vision.contrastive_loss), ("one softmax", one_axis)):
    symmetric = np.isclose(loss(u, w, 10.0), loss(w, u, 10.0), rtol=1e-9)
    print(f"{name:<12} symmetric: {symmetric}   knowing nothing: {loss(zeros, zeros, 10.0):.2f}",
          f"(2 log 8 = {2 * np.log(8):.2f})")  # fmt: skip

# %% [markdown]
# Fault 3 is arithmetic. s starts at 10, and $\log 10 = 2.3$. Used as s, the least loss for B = 96
# is $2 \log(1 + 95 e^{-4.6})$, until training has raised it. Fault 5 is arithmetic, too: let every
# caption occur k times in the batch. Even with perfect vectors each row has k equal winners.

# %%
print(f"fault 3: the least loss is {2 * np.log1p(95 * np.exp(-2 * np.log(10))):.2f}")
for k in (1, 2, 4):
    unit = np.repeat(np.eye(96 // k), k, axis=0)  # a vector for each caption, k rows each
    loss = vision.contrastive_loss(unit, unit, 100.0)
    print(f"fault 5, each caption {k} times: the least loss is {abs(loss):.2f}")

# %% [markdown]
# And the checks? Given faulty answers, that of exercise 3.4 names the faults:


# %%
def faulty(logits_of, diagonal=0):
    def answer(u, w, s):
        both = (log_softmax(z) for z in logits_of(u, w, s))
        return np.array([-np.diagonal(logp, diagonal).mean() for logp in both])

    return answer


wrong = {
    1: faulty(lambda u, w, s: [s * u @ w.T] * 2),
    3: faulty(lambda u, w, s: [np.log(s) * u @ w.T, np.log(s) * w @ u.T]),
    4: faulty(lambda u, w, s: [s * u @ w.T, s * w @ u.T], diagonal=1),
}
for name, answer in wrong.items():
    print(f"fault {name}: {check('3.4', answer).message}")

# %% [markdown]
# ## Takeaways
#
# - A convolution is a matrix product of patches and filters.
# - After a ReLU means are positive, and without care they take over. Standardised weights let no
#   mean through; γ, β and a = 0.2 keep the variance, all known before the first picture.
# - Without batch norm a picture's features are its own. A frozen eye needs that.
# - The contrastive loss is two classifications over one matrix of similarities: rows and columns,
#   unit vectors, a learned temperature. Its gradient is "probability minus truth", twice.
# - The other pairs of the batch are the teacher: hard ones teach shape, duplicates teach nonsense.
# - Test a contrastive loss by its values: $2 \log B$ at the start, symmetric under exchange. The
#   falling of the loss shows nothing.
#
# **In the paper:** section 3.1.1 (the vision encoder and why it is frozen) and appendix B.1.3 (the
# contrastive training, on pairs of image and text). **In the library:** `miniflamingo/vision.py`;
# RICES in `miniflamingo/evaluation.py`.
#
# **Next:** module 04, the Perceiver Resampler: the S features of a picture, or of all frames of a
# clip, become a fixed number of visual tokens.
