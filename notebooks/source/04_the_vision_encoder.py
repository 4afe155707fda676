# %% [markdown]
# # 04 The vision encoder
#
# **The question: how do pixels become features in which a picture lies close to its own caption?**
#
# After this module you can
#
# - write a convolution with loops and as a matrix product, and standardise its weights;
# - write the two-term contrastive loss, and say what its least value is;
# - recognise faults of contrastive training, most of them from public code, none of which stops a
#   program;
# - (optional) keep a signal's size through a deep network by arithmetic instead of by looking at
#   the batch; derive the loss's gradient down to the features; retrieve pictures; say in what this
#   eye differs from CLIP's.
#
# **You need:** the softmax (module 01), and the variance of a sum. The cross-entropy of a guess is
# −log of the probability that it gives to the right answer.
#
# **Time:** about 55 minutes for the core path, and 55 for what is marked optional. Computing takes
# about 6 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# Flamingo's eye is trained first, on pictures and captions alone, and then frozen for ever. Ours
# comes with the package. We load it, and draw a batch of pictures and captions of the same kind as
# it was trained on. The captions come in groups that differ in one shape only.

# %%
import numpy as np

from miniflamingo import plots, vision
from miniflamingo.course import check, guess, show, source, told
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
# | κ | inverse temperature, learned | 10 at the start | |
# | | parameters | 0.1 million | 435 million |
#
# The paper's eye is a *Normalizer-Free* ResNet
# ([NFNet](https://arxiv.org/abs/2102.06171)), which means: no
# [batch norm](https://arxiv.org/abs/1502.03167). Batch norm subtracts the mean of the batch and
# divides by its deviation.
#
# **Predict, then run:** we paint picture 1 black. Do the features of picture 0 change? Write `True`
# or `False` for each kind of eye.

# %%
guess("4.a", without_batch_norm=..., with_batch_norm=...)

# %% tags=["reveal"]
other = pictures[:8].copy()
other[1] = 0


def batch_norm(x):  # [B, S, D]
    return (x - x.mean(axis=(0, 1))) / x.std(axis=(0, 1))


before, after = eye(pictures[:8]), eye(other)
without = abs(after - before)[0].max() > 1e-4
normed = abs(batch_norm(after) - batch_norm(before))[0].max() > 1e-4
told("4.a", without_batch_norm=without, with_batch_norm=normed)

# %% [markdown]
# <details><summary>After the run</summary>
#
# With batch norm the features of a picture depend on *the other pictures*. A frozen eye must not do
# that: it sees one picture at a time, or 32. And in contrastive training the leak is a way to
# cheat.
#
# </details>
#
# Batch norm also keeps the size of the signal from layer to layer. Without it, this must be had in
# another way: by the weights themselves.

# %% [markdown]
# ## The derivation: a convolution
#
# A convolution computes O new numbers at each place (i, j) of a grid, all from the numbers that
# stand close by. It has a stride (how far a step to the next place goes) and a padding p (how many
# zeros are put around the picture):
#
# $$y_{b,i,j,o} = \sum_{u,v,c} W_{o,c,u,v} \; x_{b,\; \mathrm{stride} \cdot i + u - p,\;
# \mathrm{stride} \cdot j + v - p,\; c} \qquad\qquad (1)$$
#
# The same k·k·C numbers, the *patch* at (i, j), meet all O filters. With every patch as a row of a
# matrix $\mathbf{P}$ and every filter as a column of a matrix $\mathbf{W}$, (1) is one product:
#
# $$\mathbf{Y} = \mathbf{P} \, \mathbf{W}, \qquad \mathbf{P}: [B h w, \; k k C], \quad
# \mathbf{W}: [k k C, \; O] \qquad\qquad (2)$$
#
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
# ### Exercise 4.1: a convolution as a matrix product
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
# `windows.reshape(B, h, w, -1)` is $\mathbf{P}$, and $\mathbf{W}$ is `weight.reshape(O, -1).T`.
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
check("4.1", convolve)

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
# ### What a convolution takes for granted (optional)
#
# Equation (1) holds two assumptions about pictures. **Locality:** a place reads only the k × k
# places around it; what is far apart meets only after several layers. **The same weights
# everywhere:** W does not depend on (i, j), so an edge is found by the same filter wherever it is,
# and a picture that is moved by one stride gives features that are moved by one place (but for the
# border). Both save numbers: a 3 × 3 convolution from 64 to 64 channels has 36,864 weights; a
# matrix between two whole grids of 6 × 6 × 64 would have 5.3 million.
#
# A *Vision Transformer* ([ViT](https://arxiv.org/abs/2010.11929)) makes neither assumption behind
# its first layer. It cuts the picture into patches that do not overlap, of 16 × 16 pixels for
# instance, and one matrix turns each of them into a token: that is (2) with a stride of k, still a
# convolution. From there on it is a transformer encoder as in module 01: every token reads every
# other one, however far, and where a token stands is known only from a learned vector that is added
# to it. What a convolution takes for granted, a ViT has to learn, and so it needs more pictures.
#
# ## Weights that keep the signal's size
#
# **What size has the output of (1)?** Let the numbers of a patch be independent, with mean μ and
# variance σ². An expected value of a sum is the sum of the expected values, and the variances of
# independent numbers add, each times the square of its factor. So an output of filter w has
#
# $$E[y] = \mu \sum_i w_i, \qquad Var[y] = \sigma^2 \sum_i w_i^2 \qquad\qquad (3)$$
#
# After a ReLU all numbers are positive or 0, so μ > 0, and every channel gets a mean of its own,
# $\mu \sum w$, which is the same for all pictures and tells nothing.
# **Scaled [weight standardisation](https://arxiv.org/abs/2101.08692)** removes the cause. It
# computes with
#
# $$\hat W_o = g_o \cdot \frac{W_o - \overline{W_o}}{\sqrt{\sum (W_o - \overline{W_o})^2 +
# \epsilon}} \qquad\qquad (4)$$
#
# where the mean and the sum run over all k·k·C weights of filter o, and the gain $g_o$ is learned.
# The weights of $\hat W_o$ sum to 0, and their squares sum to $g_o^2$ (but for the small ε). So by
# (3), $E[y] = 0$ whatever μ is, and $Var[y] = g_o^2 \sigma^2$. No picture was looked at.
#
# ### Exercise 4.2: weight standardisation
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
check("4.2", standardise)

# %%
source(vision.standardise_weight)

# %% [markdown]
# ## A signal that keeps its size through the depth (optional)
#
# What (4) does for one convolution must hold for a network. **The activation** shrinks the
# variance. For x normal with variance 1, half of the mean square is left, $E[\max(x, 0)^2] = 1/2$,
# and the mean is $E[\max(x, 0)] = 1 / \sqrt{2 \pi}$, so the variance is $1/2 - 1/(2\pi) =
# (1 - 1/\pi)/2$. The activation is multiplied by
#
# $$\gamma = \sqrt{2 / (1 - 1/\pi)} = 1.713 \text{ for ReLU} \qquad\qquad (5)$$
#
# (NFNet's code has 1.714, which was found by drawing random numbers; the library keeps it.)
#
# **A residual block** adds a branch f to its input. Variances of independent numbers add, so
# without care they double in every block. The Normalizer-Free block divides its input by its
# *expected* deviation β, so that f gets a signal of variance 1, and by (4) and (5) gives one of
# variance 1; then it scales the branch by a = 0.2:
#
# $$x_{l+1} = x_l + a \, f(x_l / \beta_l), \qquad \beta_l^2 = Var[x_l], \qquad
# Var[x_{l+1}] = Var[x_l] + a^2 \qquad (6)$$
#
# β is not measured. It is known from (6) before the first picture is seen. A *transition*, which
# changes the width or the stride, needs a convolution on the shortcut, too. It takes the divided
# signal, of variance 1, so the count starts again: $Var[x_{l+1}] = 1 + a^2$.
#
# Now we look at depth: 24 layers of ReLU (times γ) and convolution, untrained, on noise. The grid
# is wrapped round, so that no edge disturbs. We follow two numbers: how much a channel *varies*
# from picture to picture and place to place, which is what it can tell; and its squared *mean*,
# which tells nothing. Three ways to draw the weights of a filter with n inputs: of variance 1/n; of
# variance 1/n times 2/γ², which is [He's rule](https://arxiv.org/abs/1502.01852) and keeps the mean
# *square* constant; and (4).

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
# **Predict, then run:** He's rule keeps variance plus squared mean at the same size. And the
# variance alone? Write for each of the three ways whether it `"grows"`, `"stays"` or `"falls"` over
# the 24 layers. It stays when it remains within a factor of three.

# %%
guess("4.b", plain=..., he=..., standardised=...)

# %% tags=["reveal"]
ways = {"variance 1/n": lambda w: w, "He's rule": lambda w: w * np.sqrt(2) / scale}
ways["standardised"] = lambda w: vision.standardise_weight(w, np.ones(len(w)))
curves = {name: follow(prepare) for name, prepare in ways.items()}
for name, (variance, mean) in curves.items():
    print(f"{name:<14} after 24 layers: variance {variance[-1]:.1g}, squared mean {mean[-1]:.1g}")
ratios = [variance[-1] / variance[0] for variance, _ in curves.values()]
words = ["grows" if r > 3 else "falls" if r < 1 / 3 else "stays" for r in ratios]
said = ", ".join(f"{name} {word}" for name, word in zip(curves, words))
told("4.b", plain=words[0], he=words[1], standardised=words[2])

# %% tags=["reveal"]
titles = "variance of a channel", "squared mean of a channel"
panels = {title: {name: curve[i] for name, curve in curves.items()}
          for i, title in enumerate(titles)}  # fmt: skip
show(
    plots.plot_signal(panels),
    alt="Two panels over 24 layers, logarithmic, one line for each way to draw the weights: the "
    f"variance of a channel and its squared mean. The variance: {said}.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# With He's rule nothing explodes, and yet the network goes blind: after 24 layers a tenth of the
# signal is about the picture, the rest is the same for all. Batch norm would subtract that mean.
# Weight standardisation does not let it arise.
#
# </details>
#
# What (4) does, it does during training, too, because it is part of the forward pass: whatever the
# optimiser does to W, the filter that is used has mean 0.

# %% [markdown]
# ### Exercise 4.3: the expected deviation and the measured one (optional)
#
# ★★☆ · 12 minutes · 8 to 11 lines. Run a network of L blocks, and compare what (6) expects with
# what comes. `blocks` is a list of L pairs (branch, shortcut) of functions; the shortcut is `None`
# but in a transition. The input x, of any shape, is taken to have variance 1. Return the output,
# and float [L, 2]: for the *input* of each block the deviation that (6) expects, before any picture
# is seen, and the one that x has, `x.std()`. The expected one is β.
#
# <details><summary>Hint 1</summary>
#
# Carry two things from block to block, the signal x and the variance v that it should have. For
# each block write down two numbers first, then compute x and v behind the block.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The branch gets the divided signal, in a transition the shortcut, too. Without a shortcut x itself
# goes on, not divided. Behind a block v is v + a², behind a transition 1 + a².
#
# </details>


# %% tags=["exercise"]
def run_blocks(x, blocks, a):  # [...], L pairs of functions, float -> [...], float[L, 2]
    ...  # your code


# %% tags=["solution"]
def run_blocks(x, blocks, a):  # [...], L pairs of functions, float -> [...], float[L, 2]
    deviations, v = [], 1.0
    for branch, shortcut in blocks:
        beta = np.sqrt(v)
        deviations.append([beta, x.std()])
        divided = x / beta
        kept = shortcut(divided) if shortcut else x
        x = kept + a * branch(divided)  # equation (6)
        v = (1.0 if shortcut else v) + a**2
    return x, np.array(deviations)


# %%
check("4.3", run_blocks)

# %% [markdown]
# The library's block. `skip_gain` is [SkipInit](https://arxiv.org/abs/2002.10444), a learned number
# on the branch. In NFNet it starts at 0, so that a new block is the identity: the same idea as
# Flamingo's gate in module
# 08. Here it starts at 1, a choice for a net of two blocks.

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
# $u_i$. The caption goes through a text encoder ([BERT](https://arxiv.org/abs/1810.04805) in the
# paper, a small transformer here), the mean over its words is projected and brought to length 1,
# too: $w_i$. Of B pictures and B captions we form all B² similarities, times a learned *inverse
# temperature* κ:
#
# $$z_{ij} = \kappa \; u_i^\top w_j \qquad\qquad (7)$$
#
# Row i asks: which caption belongs to picture i? Column i asks: which picture belongs to caption i?
# Each is a classification with B classes, and the answer is always i:
#
# $$\mathcal{L} = -\frac1B \sum_i \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
# \; - \; \frac1B \sum_i \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}} \qquad\qquad (8)$$
#
# The other pairs of the batch are the wrong answers, for free.
#
# **Why the temperature?** How small can (8) become? One would like a similarity of 1 for the own
# pair and of −1 for all others, but that cannot be had: only *two* vectors can be opposite to each
# other. B vectors are as far apart as they can all be when they are the corners of a regular
# simplex, where any two have the cosine $-1/(B - 1)$. Then the own score is ahead of each other one
# by $\kappa (1 + 1/(B - 1)) = \kappa B / (B - 1)$, and this is the best of all:
#
# $$\mathcal{L} \ge 2 \log\big(1 + (B - 1) \, e^{-\kappa B / (B - 1)}\big) \qquad\qquad (9)$$

# %%
for kappa in (1, 10, 100):
    print(f"κ = {kappa:>3}: the least loss is {2 * np.log1p(95 * np.exp(-kappa * 96 / 95)):.2g}")
print(f"knowing nothing costs {2 * np.log(96):.3g}")

# %% [markdown]
# With κ = 1 even a perfect eye would pay three quarters of what one pays that knows nothing. So κ
# is learned; it starts at 10.
#
# ### Why it cannot be less (optional)
#
# *One row.* Let $d_{ij} = z_{ij} - z_{ii}$. The term of row i in (8) is
# $\log(1 + \sum_{j \ne i} e^{d_{ij}})$. The exponential is convex, so by Jensen's inequality the
# sum is at least $(B - 1)\, e^{\bar d_i}$, with $\bar d_i$ the mean of the row's $d_{ij}$.
# *All rows.* The function $x \mapsto \log(1 + (B - 1) e^x)$ is convex as well, so the mean over the
# rows is at least its value at the mean $\bar d$ of all $d_{ij}$. The columns hold the same numbers
# $z_{ij}$ and have the same mean $\bar d$, so together $\mathcal{L} \ge
# 2 \log(1 + (B - 1) e^{\bar d})$. This grows with $\bar d$; how small can $\bar d$ be?
# *All pairs.* Let $\bar u$ and $\bar w$ be the means of the vectors, and $a_i = u_i - \bar u$,
# $b_i = w_i - \bar w$, which sum to 0. Multiplied out,
#
# $$B (B - 1) \, \bar d = \sum_{i,j} z_{ij} - B \sum_i z_{ii}
# = \kappa \Big( B^2 \, \bar u^\top \bar w - B \sum_i (\bar u + a_i)^\top (\bar w + b_i) \Big)
# = - \kappa B \sum_i a_i^\top b_i .$$
#
# Any two vectors have $a^\top b \le (|a|^2 + |b|^2)/2$, and $\sum_i |a_i|^2 = \sum_i |u_i|^2 -
# B |\bar u|^2 \le B$, the same for b. So $\sum_i a_i^\top b_i \le B$, and
# $\bar d \ge -\kappa B / (B - 1)$, which is (9). It is reached when $u_i = w_i$, the mean is 0
# and all cosines are equal: the regular simplex. That needs B − 1 dimensions, 95 here, so with our
# D = 64 the loss stays a little above (9).

# %%
corners = np.sqrt(6 / 5) * (np.eye(6) - 1 / 6)  # a regular simplex: 6 unit vectors
least = 2 * np.log1p(5 * np.exp(-4 * 6 / 5))
print("cosines:", np.unique((corners @ corners.T).round(3)))
print(f"loss at κ = 4: {vision.contrastive_loss(corners, corners, 4.0):.6f}, (9) says {least:.6f}")

# %% [markdown]
# ## The loss, with loops and without
#
# With loops, equation (8):


# %%
def loss_loop(u, w, kappa):  # [B, D], [B, D], [] -> []
    total, B = 0.0, len(u)
    for i in range(B):
        row = sum(np.exp(kappa * u[i] @ w[j]) for j in range(B))
        column = sum(np.exp(kappa * u[j] @ w[i]) for j in range(B))
        own = np.exp(kappa * u[i] @ w[i])
        total -= (np.log(own / row) + np.log(own / column)) / B  # equation (8)
    return total


# %% [markdown]
# ### Exercise 4.4: the two terms
#
# ★★☆ · 8 minutes · 3 to 5 lines. Write (7) and (8) without a loop, with the library's `log_softmax`
# (over the last axis). Return both terms apart, as an array [2]: pictures to captions, captions to
# pictures.
#
# <details><summary>Hint 1</summary>
#
# `logits = kappa * u @ w.T` is [B, B]. The terms' own pairs stand on its diagonal: `np.diagonal`.
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
def two_terms(u, w, kappa):  # [B, D], [B, D], [] -> [2]
    ...  # your code


# %% tags=["solution"]
def two_terms(u, w, kappa):  # [B, D], [B, D], [] -> [2]
    logits = kappa * u @ w.T  # equation (7)
    both = (log_softmax(z) for z in (logits, logits.T))
    return np.array([-np.diagonal(logp).mean() for logp in both])  # equation (8)


# %%
check("4.4", two_terms)

# %%
source(vision.contrastive_loss)

# %%
u, w = vision.l2_normalise(rng.normal(size=(2, 6, 5)))
assert np.isclose(loss_loop(u, w, 7.0), vision.contrastive_loss(u, w, 7.0), rtol=1e-12)

# %% [markdown]
# ### Exercise 4.5: the gradient, down to the features (optional)
#
# ★★★ · 18 minutes · 8 to 14 lines. Training needs the gradient of (8) at what the projections give:
# vectors $x_i$ and $y_i$ that do not yet have length 1, and $\log \kappa$, which is the number that
# is learned. A cross-entropy has the gradient "probability minus truth", so with $p$ the softmax of
# the rows and $q$ that of the columns
#
# $$\frac{\partial \mathcal{L}}{\partial z_{ij}} = \frac1B \big( p_{ij} + q_{ij} - 2\,[i = j] \big)
# \qquad\qquad (10)$$
#
# Write $dz_{ij}$ for it. By (7) every $u_i$ acts through its row, every $w_j$ through its column,
# and κ through all:
#
# $$du_i = \kappa \sum_j dz_{ij} \, w_j, \qquad dw_j = \kappa \sum_i dz_{ij} \, u_i, \qquad
# d \log \kappa = \kappa \, \frac{\partial \mathcal{L}}{\partial \kappa} = \sum_{i,j} dz_{ij} \,
# z_{ij} \qquad\qquad (11)$$
#
# Last, $u = x / |x|$. Making x longer does not move u, so the part of du along u has no effect;
# what is orthogonal turns u by an angle that is smaller, the longer x is:
#
# $$dx_i = \big( du_i - (u_i^\top du_i) \, u_i \big) / |x_i| \qquad\qquad (12)$$
#
# and $dy_i$ from $dw_i$ in the same way. Return dx, dy and $d \log \kappa$.
#
# <details><summary>Hint 1</summary>
#
# Keep the lengths, `np.linalg.norm(x, axis=1, keepdims=True)`: you need them twice.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The softmax of the columns is `softmax(logits.T).T`: turned there, and turned back. `[i = j]` is
# `np.eye(B)`. The sums of (11) are `dz @ w` and `dz.T @ u`.
#
# </details>


# %% tags=["exercise"]
def gradients(x, y, log_kappa):  # [B, D], [B, D], [] -> [B, D], [B, D], []
    ...  # your code


# %% tags=["solution"]
def gradients(x, y, log_kappa):  # [B, D], [B, D], [] -> [B, D], [B, D], []
    kappa, B = np.exp(log_kappa), len(x)
    long_x, long_y = (np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    u, w = x / long_x, y / long_y
    z = kappa * u @ w.T  # equation (7)
    dz = (softmax(z) + softmax(z.T).T - 2 * np.eye(B)) / B  # equation (10)
    du, dw = kappa * dz @ w, kappa * dz.T @ u  # equation (11)
    dx = (du - (u * du).sum(axis=1, keepdims=True) * u) / long_x  # equation (12)
    dy = (dw - (w * dw).sum(axis=1, keepdims=True) * w) / long_y
    return dx, dy, (dz * z).sum()


# %%
check("4.5", gradients)

# %% [markdown]
# The library has the same in two functions, one for (10) and (11), one for (12):

# %%
source(vision.contrastive_loss_backward)

# %%
source(vision.l2_normalise_backward)

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
# caption in a share of 0.01 of the cases. In which share will the nearest caption be the right one?

# %%
guess("4.c", right_caption=...)

# %% tags=["reveal", "volatile"]
means, own = features.mean(axis=1), np.arange(96)


def recall(model, norm=vision.l2_normalise):  # -> pictures to captions, captions to pictures
    u, w = norm(model.image_proj(means)), norm(model.text_proj(model.text_encoder(tokens)))
    return [float((z.argmax(axis=1) == own).mean()) for z in (u @ w.T, w @ u.T)]


trained = train()
print("found: its caption {:.0%}, its picture {:.0%}".format(*recall(trained)))
told("4.c", within=0.15, right_caption=recall(trained)[0])

# %% tags=["reveal", "volatile"]
rows = [0, 1, 2, 16, 24, 48, 49, 56]
u = vision.l2_normalise(trained.image_proj(means[rows]))
w = trained.embed_texts(tokens[rows])
show(
    plots.plot_similarity(u @ w.T, pictures[rows], [captions[i] for i in rows]),
    alt="Eight pictures as rows, their captions as columns, the similarity of each pair as a shade "
    "of blue and as a number, each picture's own caption framed. Rows 1 to 3 are of one group, "
    "and rows 6 and 7: they differ in one shape.",
)

# %% [markdown]
# The dark blocks are the groups: the same colour, size and place, another shape. The diagonal is
# darker still, so shape is told apart, if less clearly. A batch without such groups would have been
# easy by colour alone, and shapes would hardly have been learned: *the wrong answers of the batch
# are the teacher*. That is why batches are large in practice.

# %% [markdown]
# ## Retrieval (optional)
#
# Similar pictures lie close together even without captions. This is how Flamingo picks examples for
# a prompt (RICES, module 10): take those whose features are most similar to the query's. We have
# 600 pictures of one object, colour and shape at random.

# %%
rng = np.random.default_rng(3)
colour, shape = rng.integers(0, 8, 600), rng.integers(0, 16, 600)
size = rng.integers(0, 2, 600)
library = shapes.draw_objects(colour, shape, size, rng, split="test")
vectors = eye(library).mean(axis=1)

# %% [markdown]
# **Predict, then run:** what is the mean cosine of two pictures that have nothing to do with each
# other? Remember that the features come out of a ReLU. Write a number between −1 and 1.

# %%
guess("4.d", cosine=...)


# %% tags=["reveal"]
def cosines(x):
    unit = vision.l2_normalise(x)
    return unit @ unit.T


centred = vectors - vectors.mean(axis=0)
as_they_are, mean_removed = (
    round(float(cosines(x)[np.triu_indices(600, 1)].mean()), 1) for x in (vectors, centred)
)
print(f"mean removed: {mean_removed:.1f}")
told("4.d", within=0.15, cosine=as_they_are)

# %% [markdown]
# What all pictures have in common tells none of them apart, so we take their mean off before we
# look for the nearest:

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
# Three faults; two more stand further below. None of them stops a program.
#
# 1. **One softmax only** ([DALLE-pytorch, issue
#    32](https://github.com/lucidrains/DALLE-pytorch/issues/32)): the loss asks each picture for its
#    caption and never each caption for its picture.
# 2. **No L2 normalisation** before the product ([train-CLIP, pull request
#    3](https://github.com/Zasder3/train-CLIP/pull/3)).
# 3. **Labels off by one**: row i belongs to column i − 1, as after a shuffle of one side.

# %%
from miniflamingo.functional import cross_entropy, transpose


def one_axis(u, w, kappa):  # fault 1
    return cross_entropy(kappa * (u @ transpose(w, 1, 0)), np.arange(len(u)))


def off_by_one(u, w, kappa):  # fault 3
    logits, labels = kappa * (u @ transpose(w, 1, 0)), np.roll(np.arange(len(u)), 1)
    return cross_entropy(logits, labels) + cross_entropy(transpose(logits, 1, 0), labels)


# %% [markdown]
# **Predict, then run:** the same 90 steps with each fault. Which of them hurts retrieval most?
# Write its number. And how many of the three are harmless, that is, cost less than 5 of 100
# answers?

# %%
guess("4.e", most=..., harmless=...)

# %% tags=["reveal", "volatile"]
whole = recall(trained)
print("{:<22} its caption {:4.0%}   its picture {:4.0%}".format("right", *whole))
faults, models, lost = {"1 one softmax": {"loss": one_axis}}, {}, {}
faults["2 no normalisation"] = {"norm": lambda x: x}
faults["3 labels off by one"] = {"loss": off_by_one}
for name, changes in faults.items():
    models[name] = train(**changes)
    found = recall(models[name], changes.get("norm", vision.l2_normalise))
    lost[int(name[0])] = (sum(whole) - sum(found)) / 2
    print("{:<22} its caption {:4.0%}   its picture {:4.0%}".format(name, *found))
told("4.e", most=max(lost, key=lost.get), harmless=sum(less < 0.05 for less in lost.values()))

# %% [markdown]
# <details><summary>After the run</summary>
#
# Fault 3 is the interesting one. It should find nothing, and yet it finds about twenty times what
# guessing finds: neighbours in a batch are of one group, so colour, size and place are learned from
# the *wrong* partner. Only shape is not. Someone who looks at the loss alone sees "it learns
# slowly". Fault 2 hurts most from captions to pictures. Fault 1 does **no** visible harm here: the
# batch is balanced, every caption occurs about as often as every picture.
#
# </details>
#
# Which cheap test finds fault 1 at once? Exchange pictures and captions. The right loss is
# symmetric, equation (8), and knowing nothing costs $2 \log B$, not $\log B$.

# %%
u, w = vision.l2_normalise(np.random.default_rng(1).normal(size=(2, 8, 16)))
zeros = np.zeros((8, 16))
for name, loss in (("right", vision.contrastive_loss), ("one softmax", one_axis)):
    symmetric = np.isclose(loss(u, w, 10.0), loss(w, u, 10.0), rtol=1e-9)
    print(f"{name:<12} symmetric: {symmetric}   knowing nothing: {loss(zeros, zeros, 10.0):.2f}",
          f"(2 log 8 = {2 * np.log(8):.2f})")  # fmt: skip

# %% [markdown]
# ### More bugs (optional)
#
# Under fault 2, length counts as much as direction in a product. On which side do the lengths
# differ more, among the pictures or among the captions?

# %% tags=["volatile"]
free = models["2 no normalisation"]
sides = {"pictures": free.image_proj(means), "captions": free.text_proj(free.text_encoder(tokens))}
for name, vectors_of in sides.items():
    length = np.linalg.norm(vectors_of, axis=1)
    print(f"{name}: deviation of the lengths {length.std() / length.mean():.0%} of their mean")

# %% [markdown]
# What fault 1 leaves undone is seen directly: raise all similarities of *one* picture by 1, so that
# it is close to everything, a *hub*.

# %%
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
# does.
#
# Two more faults are seen by arithmetic.
#
# 4. **The logarithm of κ as κ** ([M3D, issue 52](https://github.com/BAAI-DCAI/M3D/issues/52)):
#    $\log \kappa$ is what is learned; the exp is missing. κ starts at 10, and $\log 10 = 2.3$. Used
#    as κ, it makes the least loss (9) for B = 96 the first number below, until training has
#    raised it.
# 5. **Duplicates** ([OpenAI-CLIP by M. Shariatnia, issue
#    11](https://github.com/moein-shariatnia/OpenAI-CLIP/issues/11)): pictures that share a caption
#    count as wrong answers for one another. Let every caption occur k times in the batch, and every
#    caption have a direction of its own: each row still has k equal winners, and pays $\log k$.

# %%
print(f"fault 4: the least loss is {2 * np.log1p(95 * np.exp(-np.log(10) * 96 / 95)):.2f}")
for k in (1, 2, 4):
    unit = np.repeat(np.eye(96 // k), k, axis=0)  # a vector for each caption, k rows each
    loss = vision.contrastive_loss(unit, unit, 100.0)
    print(f"fault 5, each caption {k} times: the loss of perfect vectors is {abs(loss):.2f}")

# %% [markdown]
# And the checks? Given faulty answers, that of exercise 4.4 names the faults:


# %%
def faulty(logits_of, diagonal=0):
    def answer(u, w, kappa):
        both = (log_softmax(z) for z in logits_of(u, w, kappa))
        return np.array([-np.diagonal(logp, diagonal).mean() for logp in both])

    return answer


wrong = {
    1: faulty(lambda u, w, kappa: [kappa * u @ w.T] * 2),
    3: faulty(lambda u, w, kappa: [kappa * u @ w.T, kappa * w @ u.T], diagonal=1),
    4: faulty(lambda u, w, kappa: [np.log(kappa) * u @ w.T, np.log(kappa) * w @ u.T]),
}
for name, answer in wrong.items():
    print(f"fault {name}: {check('4.4', answer).message}")

# %% [markdown]
# ## The paper's eye beside CLIP's (optional)
#
# [CLIP](https://arxiv.org/abs/2103.00020) is the best-known eye that was trained in this way, and
# what many later models use. The paper trains its own:
#
# | | Flamingo's eye | CLIP's |
# |---|---|---|
# | pictures | NFNet-F6, convolutions, 435 million numbers | ViT or ResNet; its best one is a ViT |
# | captions | BERT, the mean over all words | a causal transformer, its last token |
# | one vector | the mean of the last grid | a class token, or attention pooling |
# | loss | the *sum* of the two terms of (8) | their mean |
# | data | [ALIGN](https://arxiv.org/abs/2102.05918) and LTIP | 400 million pairs, one collection |
#
# In each step the paper takes a batch of both of its collections and adds up the gradients.
# A sum instead of a mean doubles the gradient and changes nothing else. The mean over the grid
# serves the contrastive training alone: once the eye is frozen, the pooling, the projection and the
# text encoder are thrown away, and the last grid itself, flattened, goes to the resampler (module
# 05). In the paper's ablation its own eye was better for Flamingo than CLIP's.

# %% [markdown]
# ## Takeaways
#
# - A convolution is a matrix product of patches and filters.
# - After a ReLU means are positive. Standardised weights let no mean through, and keep the
#   variance, before the first picture is seen.
# - Without batch norm a picture's features are its own. A frozen eye needs that.
# - The contrastive loss is two classifications over one matrix of similarities: rows and columns,
#   unit vectors, a learned temperature. It cannot fall below (9).
# - The other pairs of the batch are the teacher: hard ones teach shape, duplicates teach nonsense.
# - Test a contrastive loss by its values: $2 \log B$ at the start, symmetric under exchange. The
#   falling of the loss shows nothing.
#
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.1 (3.1.1 in its
# first version): the vision encoder and why it is frozen; appendix B.1.3: the contrastive training,
# on pairs of image and text. **In the library:** `miniflamingo/vision.py`; RICES in
# `miniflamingo/evaluation.py`.
#
# **Next:** module 05, the Perceiver Resampler: the S features of a picture, or of all frames of a
# clip, become a fixed number of visual tokens.

# %% [markdown] tags=["notes"]
# ### For the teacher
#
# **Minutes.** 0 the question and the letters; 6 guess 4.a and batch norm; 12 equations (1) and (2)
# at the board, with one patch drawn; 15 exercise 4.1; 28 equation (3) and exercise 4.2; 37 the two
# classifications of (8), and the least loss; 40 exercise 4.4; 48 training the text encoder, guess
# 4.c; 53 guess 4.e and what it shows. What is left goes to the hub, or to the retrieval.
#
# **Predictions.** *4.a:* `False` and `True`. Some say `False` twice, because a frozen network "does
# not change": its parameters do not, but batch norm's mean and deviation are computed from the
# batch. *4.b (optional):* grows, falls, stays. Most say that He's rule stays: it was made for that,
# but what it keeps is the mean *square*, in which the useless mean counts. *4.c:* about 0.84.
# Guesses are lower, because 96 captions look like many; they forget that colour, size and place
# alone leave a group of eight. *4.d (optional):* about 0.7. The usual guess is 0, "they have
# nothing to do with each other": numbers behind a ReLU are never negative. *4.e:* fault 4 hurts
# most, and one is harmless. Many guess fault 1 as the worst, as half of the loss is missing.
#
# **Open questions.** "On which side do the lengths differ more?" (More bugs): the next cell prints
# it: among the pictures, about 32 % of the mean against 18 %. So a caption that asks for its
# picture prefers the long ones, which is why fault 2 hurts on that side. No other question is left
# open.
#
# **Misconceptions.** That a larger batch is only faster: it makes the task harder, which is the
# point. That the temperature is a detail: by (9) a small κ keeps the loss high for every eye. That
# a falling loss shows a right program: faults 1 to 5 all let it fall. That "frozen" and "batch norm
# in training mode" go together.
#
# **To cut.** First the hub and the other optional parts, then exercise 4.2 (show the solution),
# then the loops. Keep 4.1 and 4.4.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** A colleague trains with B = 256 and a fixed κ = 1, and the loss stops at 10.5. "The eye is
# too small", she says. What do you compute first?
#
# <details><summary>Answer</summary>
#
# The least loss, (9): $2 \log(1 + 255 \, e^{-256/255}) \approx 9.1$, and what knowing nothing
# costs, $2 \log 256 \approx 11.1$. With κ = 1 no eye can come below 9.1: the temperature is the
# limit, not the eye. Let κ be learned, or take 10.
#
# </details>
#
# **2.** We double all weights of a convolution whose weights are standardised by (4). What happens
# to its output, and to its gradient?
#
# <details><summary>Answer</summary>
#
# The output stays as it is (but for ε): numerator and root in (4) are both doubled. The weights
# must move twice as far for the same change, so the gradient is halved. The size of the output is
# set by the gain alone.
#
# </details>
#
# **3.** The batch is drawn so that its 96 captions name 96 different colours and nothing else
# differs. Retrieval on such batches soon reaches 100 %. Is the eye good?
#
# <details><summary>Answer</summary>
#
# It knows colours. A contrastive loss teaches what tells the pairs of a batch apart, and nothing
# more: neither shape nor place was ever needed, so they need not be in the features. That is why
# the batches of this module hold groups that differ in one shape only.
#
# </details>
