# %% [markdown]
# # 07 Tanh gates and GATED XATTN-DENSE
#
# **The question: how do new layers enter a frozen language model without disturbing it, and how do
# they ever begin to matter?**
#
# After this module you can
#
# - write the tanh gate and its gradient, and say what happens at α = 0 and why;
# - build the whole GATED XATTN-DENSE layer line by line, and check its gradient by differences;
# - say where the layers go, how large they are, and what `skip_without_image` changes;
# - catch three bugs, two of which pass the test that everyone writes first;
# - fold the gate into the weights, as the fused kernel does.
#
# **You need:** φ and image-causal attention (module 06), the frozen language model (module 05), and
# the tape: `with Tape() as tape:` around the forward pass, then `tape.backward(out, dout)`.
#
# **Time:** about 48 minutes: 12 to read (2,450 words, 200 a minute) and 36 for five exercises.
# Computing takes about 2 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# One inserted layer and the frozen block behind it, at initialisation. The text runs along the
# thick line. Two branches leave it and come back: one looks at the image, the other one works on
# what is there. Each comes back through a gate, one number between −1 and 1.

# %%
import copy
from unittest.mock import patch

import numpy as np

from miniflamingo import demo, plots, xattn
from miniflamingo.autograd import Tape, array_of
from miniflamingo.course import check, show, source
from miniflamingo.functional import softmax
from miniflamingo.prompt import build_batch
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds.grammar import TOKENIZER

# %%
show(
    plots.plot_gated_block(alpha_xattn=0.0, alpha_dense=0.0),
    alt="A line from left to right, y. From it a dotted branch leads through a box, attention, and "
    "a gate that says 0.00, back to a plus on the line; visual tokens of image phi feed the box. A "
    "second dotted branch has a feed-forward and a gate, 0.00. Both are trained. Then the line "
    "runs through the frozen block: self-attention and feed-forward.",
)

# %% [markdown]
# | letter | meaning | here | in the 3B model |
# |---|---|---|---|
# | y | the text's stream, [B, L, D] | D = 64 | D = 2,048 |
# | x | visual tokens, [B, N, R, D_m] | R = 8, D_m = 64 | R = 64, D_m = 1,536 |
# | α | one number a gate; two gates a layer | 3 layers | 24 layers |
# | b | what a branch computes, [B, L, D] | | |
# | dy' | the gradient of a gate's output y' | | |
# | M | rows, B·L, when a product does not care which is which | | |

# %% [markdown]
# ## The derivation
#
# A branch b is added to the stream through a gate:
#
# $$y' = y + \tanh(\alpha) \, b \qquad\qquad (1)$$
#
# A layer has two of them, one after the other, and the second sees what the first has done:
#
# $$y' = y + \tanh(\alpha_{xattn}) \; \mathrm{attention}(y, x, \varphi), \qquad
# y'' = y' + \tanh(\alpha_{dense}) \; \mathrm{ffw}(y') \qquad\qquad (2)$$
#
# **At α = 0 nothing happens.** $\tanh(0) = 0$ exactly, $0 \cdot b = 0$ for every finite b, and
# $y + 0 = y$: no rounding, no "almost". The stream, and so every logit, is that of the frozen
# language model (LM) bit for bit, whatever random weights stand in the branches. (*Finite* matters:
# $0 \cdot \infty$ is NaN. A gate does not hide a branch that overflows.)
#
# **The gradient.** y goes straight through. α scales every number of b, so its gradient is a sum
# over all of them, an inner product:
#
# $$dy = dy', \qquad d\alpha = (1 - \tanh^2 \alpha) \, \langle dy', b \rangle, \qquad
# db = \tanh(\alpha) \, dy' \qquad\qquad (3)$$
#
# Put α = 0 into (3): $d\alpha = \langle dy', b \rangle$ and $db = 0$. **A shut gate learns; what is
# behind it does not, yet.** The random branch b is right or wrong by chance, the gate moves a
# little in the direction that helps, and from then on $db \ne 0$.
#
# **With the weights.** Both branches end in a matrix: $b = a W^\top$, with a [M, I] and W [D, I].
# Let $dW' = dy'^{\,\top} a$, the gradient that W would have if the gate stood at 1. Then
#
# $$\langle dy', a W^\top \rangle = \mathrm{tr}(dy'^{\,\top} a W^\top) = \langle W, dW' \rangle
# \;\Rightarrow\; d\alpha = (1 - \tanh^2 \alpha) \, \langle W, dW' \rangle, \qquad
# dW = \tanh(\alpha) \, dW' \qquad (4)$$
#
# The gate's gradient follows from a matrix that is needed anyway. b itself need not be kept.

# %% [markdown]
# ## The gate
#
# Why tanh, and not α itself? It is odd, has slope 1 at 0, and never exceeds 1: a branch may be
# turned up, or turned round, but never amplified.

# %%
alphas = np.linspace(-3, 3, 241)
line = np.where(abs(alphas) < 1.5, alphas, np.nan)
show(
    plots.plot_gate(alphas, {
        "the gate": {"tanh(alpha)": np.tanh(alphas), "alpha": line},
        "its slope": {"1 - tanh(alpha)^2": 1 - np.tanh(alphas) ** 2},
    }),
    alt="Left, the gate against alpha from -3 to 3: tanh follows the line alpha near 0 and levels "
    "off at -1 and 1. Right, its slope: a bell with height 1 at alpha 0, 0.42 at 1, near 0 at 3.",
)  # fmt: skip

# %% [markdown]
# Equation (1) with a loop over every number, and the gradient of α beside it:


# %%
def gate_loop(dout, y, alpha, branch):  # [M, D], [M, D], [], [M, D] -> [M, D], []
    out, dalpha = np.zeros_like(y), 0.0
    for place in np.ndindex(y.shape):
        out[place] = y[place] + np.tanh(alpha) * branch[place]  # (1)
        dalpha += (1 - np.tanh(alpha) ** 2) * dout[place] * branch[place]  # (3)
    return out, dalpha


# %% [markdown]
# ### Exercise 7.1: the gate without a loop
#
# ★☆☆ · 4 minutes · 1 line. Write equation (1); y and branch may have any shape.
#
# <details><summary>Hint 1</summary>
#
# tanh is taken of the one number α, not of the branch: the branch may be as large as it likes.
#
# </details>


# %% tags=["exercise"]
def gate(y, alpha, branch):  # [...], [], [...] -> [...]
    ...  # your code


# %% tags=["solution"]
def gate(y, alpha, branch):  # [...], [], [...] -> [...]
    return y + np.tanh(alpha) * branch  # equation (1)


# %%
check("7.1", gate)

# %% [markdown]
# The library's, with its gradient right below it, as everywhere in this project:

# %%
source(xattn.tanh_gate)

# %%
source(xattn.tanh_gate_backward)

# %%
rng = np.random.default_rng(0)
dout, y, branch = rng.normal(size=(3, 5, 4))
out, dalpha = gate_loop(dout, y, 0.8, branch)
assert np.allclose(xattn.tanh_gate(y, 0.8, branch), out, rtol=1e-12)
assert np.isclose(xattn.tanh_gate_backward(dout, y, 0.8, branch)[1], dalpha, rtol=1e-12)

# %% [markdown]
# ### Exercise 7.2: the slope, by differences
#
# ★★☆ · 8 minutes · 2 to 4 lines. A gradient that someone derived by hand is checked by someone who
# does not know the derivation. `loss` is any function of *one* number. Return its slope at each of
# `alphas` [n], by central differences: $(f(\alpha + h) - f(\alpha - h)) / 2h$.
#
# <details><summary>Hint 1</summary>
#
# h = 1e-5 or 1e-6: small enough for the curve, large enough for 16 digits.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `loss` takes one number, so go through `alphas` in a list comprehension, and make an array of it.
#
# </details>


# %% tags=["exercise"]
def slopes(loss, alphas):  # a function of a number, [n] -> [n]
    ...  # your code


# %% tags=["solution"]
def slopes(loss, alphas):  # a function of a number, [n] -> [n]
    h = 1e-6
    return np.array([(loss(a + h) - loss(a - h)) / (2 * h) for a in alphas])


# %%
check("7.2", slopes)

# %% [markdown]
# The notebook's own copy of the same, for the rest of the module:

# %%
from miniflamingo.course.checks.module_07 import differences

some = np.array([-1.5, 0.0, 0.8])
numeric = differences(lambda a: np.vdot(dout, xattn.tanh_gate(y, a, branch)), some)
by_hand = [xattn.tanh_gate_backward(dout, y, a, branch)[1] for a in some]
assert np.allclose(numeric, by_hand, rtol=1e-6)
print("d alpha at -1.5, 0, 0.8:", *(f"{x:.2f}" for x in by_hand))

# %% [markdown]
# ## The whole layer
#
# ### Exercise 7.3: GATED XATTN-DENSE
#
# ★★☆ · 8 minutes · 2 or 3 lines. Write equation (2). `attend(y)` and `ffw(y)` are given as
# functions: the image-causal attention of module 06 with its norms and projections, and a
# feed-forward net.
#
# <details><summary>Hint 1</summary>
#
# Two gates, two numbers. Overwrite y after the first, so that the second one sees it.
#
# </details>


# %% tags=["exercise"]
def layer_of(y, alpha_xattn, alpha_dense, attend, ffw):  # [B, L, D], [], [], two functions
    ...  # your code


# %% tags=["solution"]
def layer_of(y, alpha_xattn, alpha_dense, attend, ffw):  # [B, L, D], [], [], two functions
    y = y + np.tanh(alpha_xattn) * attend(y)  # equation (2)
    return y + np.tanh(alpha_dense) * ffw(y)


# %%
check("7.3", layer_of)

# %% [markdown]
# The library's forward pass. Four lines are the paper's two; the rest checks φ, and there is one
# option of our own, to which we come below.

# %%
source(xattn.GatedCrossAttentionDense.forward)

# %% [markdown]
# Now the same by single operations, down to the matrices. The norms stand where the paper's first
# version has them: on the queries' input, on the keys' and values' input, and on the feed-forward's
# input. The activation is a *squared* ReLU.

# %%
layer = xattn.GatedCrossAttentionDense(64, 64, heads=4, head_dim=16, rng=np.random.default_rng(1))
layer.astype(np.float64)
y, media = rng.normal(size=(1, 6, 64)), rng.normal(size=(1, 2, 8, 64))
phi = np.array([[0, 1, 1, 1, 2, 2]])


def standardise(x):  # a layer norm, as long as its weight is 1 and its bias 0
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


# %%
def by_lines(y, media, phi, alpha_xattn, alpha_dense):
    w = {name: p.data for name, p in layer.named_parameters()}
    q = standardise(y) @ w["attention.q_proj.weight"].T
    x = standardise(media)
    k, v = (x @ w[f"attention.{name}_proj.weight"].T for name in "kv")
    heads = [a.reshape(*a.shape[:-1], 4, 16) for a in (q, k, v)]
    a = xattn.image_causal_attention(*heads, phi).reshape(1, 6, 64)
    y = y + np.tanh(alpha_xattn) * (a @ w["attention.out_proj.weight"].T)  # (2)
    hidden = np.maximum(standardise(y) @ w["ffw.up.weight"].T, 0) ** 2
    return y + np.tanh(alpha_dense) * (hidden @ w["ffw.down.weight"].T)  # (2)


# %%
def set_gates(layer, alpha_xattn, alpha_dense):
    for p, value in ((layer.alpha_xattn, alpha_xattn), (layer.alpha_dense, alpha_dense)):
        p.data = np.full_like(p.data, value)


set_gates(layer, 0.7, -0.4)
assert np.allclose(layer(y, media, phi), by_lines(y, media, phi, 0.7, -0.4), rtol=1e-10)

# %% [markdown]
# The gradient of the whole layer, the tape's against differences, for each gate. The attention's α
# also moves what the feed-forward sees: the dy' of its equation (3) has come back through that.

# %%
dout = rng.normal(size=y.shape)
with Tape() as tape:
    out = layer(y, media, phi)
tape.backward(out, dout)
losses = {
    "alpha_xattn": lambda a: np.vdot(dout, by_lines(y, media, phi, a, -0.4)),
    "alpha_dense": lambda a: np.vdot(dout, by_lines(y, media, phi, 0.7, a)),
}
for (name, loss), at in zip(losses.items(), (0.7, -0.4)):
    numeric = differences(loss, [at])[0]
    assert np.isclose(getattr(layer, name).grad, numeric, rtol=1e-6)
    print(f"d {name} = {numeric:.2f}")

# %% [markdown]
# **Predict, then run:** both gates are shut. Which of the layer's 14 parameters get a gradient that
# is not 0? And which do if, on top, `out_proj` and `down`, the last matrices of both branches, are
# set to 0, "to be on the safe side"?


# %%
def alive(layer):  # names of the parameters whose gradient is not 0
    layer.zero_grad()
    with Tape() as tape:
        out = layer(y, media, phi)
    tape.backward(out, dout)
    return [name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()]


# %%
set_gates(layer, 0, 0)
assert np.array_equal(layer(y, media, phi), y)
print(len(list(layer.named_parameters())), "parameters; gates shut:", alive(layer))
twice = copy.deepcopy(layer)
for p in (twice.attention.out_proj.weight, twice.ffw.down.weight):
    p.data = np.zeros_like(p.data)
print("and the last matrices 0, too:", alive(twice))
set_gates(layer, 0.1, 0.1)
print("gates open by a tenth:", len(alive(layer)))

# %% [markdown]
# Zero once is a start, zero twice is the end: with W = 0 the branch is 0, so $\langle dy', b
# \rangle = 0$, and with α = 0 also $dW = 0$. Neither ever moves. One of two factors must not be 0.

# %% [markdown]
# ## From shut to open
#
# The package's trained model has six gates. With all of them at 0 it must be its LM, bit for bit,
# and with all at their trained values it sees. In between we multiply every α by a number s.

# %%
model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
pictures, _, truths, _ = demo.exhibits()["captions"]
batch = build_batch([[pictures[0], "what color ?"]], TOKENIZER, 24, close=False)
print(f"the picture: {truths[0]}; the prompt: {TOKENIZER.decode(batch.tokens[0])}")
for name, values in model.alphas().items():
    print(f"tanh({name}), layer by layer:", *(f"{a:.2f}" for a in np.tanh(values)))


# %%
def opened(model, s):
    model = copy.deepcopy(model)
    for layer in model.gated_xattn:
        set_gates(layer, s * layer.alpha_xattn.data, s * layer.alpha_dense.data)
    return model


shut = opened(model, 0)(**batch.inputs())
print("shut gates, logits equal to the LM's:", np.array_equal(shut, model.lm(batch.tokens)))

# %% [markdown]
# How far two distributions of the next word are apart is told by the Kullback–Leibler divergence,
# $\mathrm{KL}(p \Vert q) = \sum_v p_v \log (p_v / q_v)$: 0 for equal ones, never negative.
#
# **Predict, then run:** the LM alone, asked for a colour, can only guess. At which s does the model
# say "yellow" with more than a half: near 0.1, near 0.5, or only at 1? And at s = 2?

# %%
scales = np.array([0, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.8, 1, 1.5, 2])
logits = np.stack([opened(model, s)(**batch.inputs())[0, -1] for s in scales])
p = softmax(logits.astype(np.float64))  # [S, V]
kl = (p * np.log(p / p[0])).sum(axis=-1)

# %%
show(
    plots.plot_next_words(scales, p, TOKENIZER.words, kl, most=3),
    alt="Left: the probability of the next word while every alpha is multiplied by 0 to 2. Yellow "
    "is near 0 up to 0.4, passes a half just below 0.5, is almost 1 from 0.6 on and stays there to "
    "2. Right: the KL divergence from the frozen LM, 0 at 0, rising in the same way to about 7 "
    "nats and then flat.",
)

# %% [markdown]
# Not in proportion: three layers work in a row, and a softmax decides at the end. This is *one*
# model looked at along a line; it was trained at s = 1 alone. How the gates move in training is
# module 08.
#
# Turn the gates yourself, and watch the next word leave the frozen LM's:

# %%
from miniflamingo.course.widgets import turn_alpha

turn_alpha("what color ?")

# %% [markdown]
# ## Tokens without an image
#
# A token with φ = 0 gets an attention output of exactly 0 (module 06). The feed-forward branch does
# not look at any image, so nothing stops it from acting on such a token. The paper does not say;
# the re-implementations let it act. Then text alone is *not* read by the LM as it was, once
# $\alpha_{dense} \ne 0$. Our models are trained with an option of this project, not of the paper:
# `skip_without_image` multiplies the feed-forward's branch by [φ > 0], too. Text without an image:

# %%
text = np.array([[1, *TOKENIZER.encode("red circle dax <EOC> blue bar wug <EOC> red circle")]])
no_image, nothing = np.zeros_like(text), np.zeros((1, 1, 8, 64), np.float32)
paper = copy.deepcopy(model)
for layer in paper.gated_xattn:
    layer.skip_without_image = False
lm = model.lm(text)
for name, other in (("skip", model), ("no skip", paper)):
    out = other.read(text, nothing, no_image)
    now, before = (softmax(a[0, -1].astype(np.float64)) for a in (out, lm))
    print(f"{name:<8} equal to the LM: {np.array_equal(out, lm)!s:<6} p(dax) {now.max():.2f}, ",
          f"LM {before.max():.2f}")  # fmt: skip

# %% [markdown]
# The second line is not a fair trial, since these weights were trained with the skip. The fair one
# is in the README: the same training *without* it keeps 16 % of the LM's skill at text-only
# binding, with it 100 %, and the other figures stay within what chance explains. So it is a choice
# with a measured effect in a small model, where a few gates are easily wide open. Of the paper's
# models nobody says that they suffer so.

# %% [markdown]
# ## Where the layers go
#
# A layer stands *before* an LM block, so that the block's self-attention can pass on what the layer
# has seen. Of the LM's blocks 0, 1, 2, ... every n-th has one: n = 1 in the 3B model, 4 in 9B, 7 in
# 80B. The first one always has.
#
# ### Exercise 7.4: which blocks have a layer?
#
# ★☆☆ · 5 minutes · 1 line. Return the indices, int [count], of the LM blocks with an inserted layer
# before them, for a `depth` and `every` n-th.
#
# <details><summary>Hint 1</summary>
#
# 0, n, 2n, ... below depth: `np.arange` takes a start, an end and a step.
#
# </details>


# %% tags=["exercise"]
def placed(depth, every):  # int, int -> int[count]
    ...  # your code


# %% tags=["solution"]
def placed(depth, every):  # int, int -> int[count]
    return np.arange(0, depth, every)


# %%
check("7.4", placed)

# %% [markdown]
# The library's, in the loop over the blocks:

# %%
from miniflamingo.flamingo import PRESETS, Flamingo

source(Flamingo.read)

# %% [markdown]
# How large is a layer? With the heads' inner width I = H·K: q and the output are D × I each, k and
# v are D_m × I each, the feed-forward is two of D × 4D, the three norms are small, and the gates
# are two numbers.

# %%
from miniflamingo.flamingo import count_parameters

stated = {"3B": 1.2, "9B": 1.6, "80B": 10}  # the paper's table, in billions
for name in stated:
    c = PRESETS[name]
    D, D_m, I = c.lm.dim, c.media_dim, c.xattn_heads * c.xattn_head_dim
    size = 2 * D * I + 2 * D_m * I + 8 * D * D + 4 * D + 2 * D_m + 2
    count = len(range(0, c.lm.depth, c.xattn_every))
    assert count_parameters(c)["gated_xattn"] == count * size
    print(
        f"{name:<4}{count:>3} layers of {size / 1e6:>4.0f}M = {count * size / 1e9:>4.1f}B, ", end=""
    )
    print(f"the paper says {stated[name]}B")

# %% [markdown]
# Only 3B fits. The paper's 9B row is not consistent with itself (module 14 recomputes it), and its
# 80B row counts more than these shapes hold. In the 3B model the layers nearly double the LM; every
# fourth block, as in 9B, costs a quarter and scores 68.8 instead of 70.7 in the paper's ablation at
# 3B, while one single layer in the middle scores 59.8. The same model without tanh gates: 66.5.

# %% [markdown]
# ## Break it
#
# Three bugs.
#
# 1. **`tan` for `tanh`** (flamingo-pytorch, pull request 2).
# 2. **No $1 - \tanh^2$** in α's gradient, the classic of a backward pass written by hand.
# 3. **Inserted after instead of before** the LM's block (flamingo-pytorch: after every n-th).


# %%
def tan_gate(y, alpha, branch):  # bug 1
    return y + np.tan(array_of(alpha)) * branch


def no_factor(dout, y, alpha, branch):  # bug 2
    return dout, np.vdot(dout, branch), np.tanh(alpha) * dout


# %%
def read_after(model, tokens, media, phi):  # bug 3
    positions = np.arange(tokens.shape[1])[None]
    bias, x = model.lm.causality(positions, tokens.shape[1]), model.lm.embed(tokens, positions)
    for layer, block in zip(model.gated_xattn, model.lm.blocks):
        x = layer(block(x, None, bias), media, phi)
    return model.lm.predict(x)


# %% [markdown]
# The first test that everyone writes is that shut gates leave the LM as it is. **Predict, then
# run:** which of the bugs does it catch? And which does a gradient check at α = 0 catch?

# %%
media = model.resampler(model.encode(batch.pixels), batch.num_frames)
lm, closed = model.lm(batch.tokens), opened(model, 0)
with patch.object(xattn, "tanh_gate", tan_gate):
    print("bug 1, shut gates equal the LM:", np.array_equal(closed(**batch.inputs()), lm))
print("bug 3, shut gates equal the LM:",
      np.array_equal(read_after(closed, batch.tokens, media, batch.phi), lm))  # fmt: skip

# %%
dout, y, branch = np.random.default_rng(0).normal(size=(3, 5, 4))
for at in (0.0, 0.8):
    right = differences(lambda a: np.vdot(dout, xattn.tanh_gate(y, a, branch)), [at])[0]
    found = no_factor(dout, y, at, branch)[1]
    print(f"bug 2 at alpha = {at}: gradient right: {np.isclose(found, right, rtol=1e-6)}")

# %% [markdown]
# None is caught at α = 0. tan and tanh have the same value and slope there, and $1 - \tanh^2(0)$ is
# 1. Away from 0 they part:

# %%
tan = np.where(abs(np.tan(alphas)) < 4, np.tan(alphas), np.nan)
show(
    plots.plot_gate(alphas, {
        "the gate": {"tanh": np.tanh(alphas), "tan (bug 1)": tan},
        "its slope": {"1 - tanh^2": 1 - np.tanh(alphas) ** 2, "1 (bug 2)": np.ones_like(alphas)},
    }),
    alt="Left: tanh, between -1 and 1, and tan, which meets it at 0, runs off to infinity at alpha "
    "1.57 and comes back from minus infinity with the other sign. Right: the slope 1 - tanh^2, a "
    "bell, and bug 2's constant 1, which touch at alpha 0 alone.",
)  # fmt: skip

# %% [markdown]
# And what do the answers say? Twelve pictures, asked for their colour, with the trained model:


# %%
def hits(read):  # how many of the 12 answers are right
    right = 0
    for picture, truth in zip(pictures, truths):
        asked = build_batch([[picture, "what color ?"]], TOKENIZER, 24, close=False)
        seen = model.resampler(model.encode(asked.pixels), asked.num_frames)
        best = read(asked.tokens, seen, asked.phi)[0, -1].argmax()
        right += TOKENIZER.words[best] in truth.split()
    return right


# %%
print("the library:", hits(model.read), "of 12")
with patch.object(xattn, "tanh_gate", tan_gate):
    print("bug 1, tan: ", hits(model.read), "of 12")
print("bug 3, after:", hits(lambda *a: read_after(model, *a)), "of 12")

# %% [markdown]
# tan goes unseen: the widest gate has |α| below 0.6, where tan and tanh still are alike. It waits
# for a gate that grows: beyond 1.57 the branch jumps to its opposite. Bug 3 ruins *these* weights,
# which were trained the right way round. A model that is trained with it may learn, too; but no
# image reaches its first LM block, and what its last layer finds goes to the head with no block to
# work on it. To see it without training, list which LM blocks get another input when the image
# changes:


# %%
def inputs_that_change(read):  # for each LM block: does its input depend on the image?
    seen, forward = [], type(model.lm.blocks[0]).forward

    def record(block, x, *rest):
        return seen.append(x) or forward(block, x, *rest)

    with patch.object(type(model.lm.blocks[0]), "forward", record):
        read(batch.tokens, media, batch.phi)
        read(batch.tokens, media + 1, batch.phi)
    return [not np.array_equal(a, b) for a, b in zip(seen[:3], seen[3:])]


print("before:", inputs_that_change(model.read))
print("after: ", inputs_that_change(lambda *a: read_after(model, *a)))

# %% [markdown]
# And which check catches which bug? 7.1 looks at gates that are open, and calls bug 1 by its name.
# Bug 2 is caught by 7.5 below. open-flamingo, whose layers stand before the blocks with
# $(i + 1) \bmod n = 0$, so that block 0 has none, is caught by 7.4:

# %%
print("bug 1:        ", check("7.1", tan_gate).message)
print("open-flamingo:", check("7.4", lambda n, k: np.arange(k - 1, n, k)).message)

# %% [markdown]
# ## The fused view
#
# b is as large as the stream, [M, D], and equation (1) as it stands writes it, reads it, writes
# tanh(α) b, reads it, and reads y. But $\tanh(\alpha) \, a W^\top = a \, (\tanh(\alpha) W)^\top$:
# fold the gate into the *weights*, D·I numbers that do not grow with the text, and what is left is
# one product that adds onto y. BLAS libraries have it as one call; in torch it is
# `addmm(y, a, (tanh(alpha) * W).T)`.

# %%
M, D, I = 5, 4, 3
y, a, W = rng.normal(size=(M, D)), rng.normal(size=(M, I)), rng.normal(size=(D, I))
folded = y + a @ (np.tanh(0.8) * W).T
assert np.allclose(folded, xattn.tanh_gate(y, 0.8, a @ W.T), rtol=1e-12)

# %% [markdown]
# Numbers moved in the forward pass beside reading a and W and writing y': 5MD as written above;
# 3MD + 2DI with addmm; MD for a kernel that scales the sums while they are still in registers. For
# the 3B model's feed-forward, 8 pages of 2,048 tokens:

# %%
M, D, I = 8 * 2048, 2048, 4 * 2048
moved = {"as written": 5 * M * D, "addmm": 3 * M * D + 2 * D * I, "fused": M * D}
for name, numbers in moved.items():
    print(f"{name:<11}{2 * numbers / 1e6:>5.0f} MB in bfloat16")

# %% [markdown]
# Bytes are not time: the product itself is long, and a kernel's product may be slower than the
# vendor's. Of a whole block's time, the step from addmm to such a kernel is about one per cent
# (counted in `kernels/gated_linear.py`), so the library takes addmm. The backward pass has one more
# use of the same thought: equation (4).
#
# ### Exercise 7.5: the gate's gradient without the branch
#
# ★★★ · 11 minutes · 2 to 4 lines. G gates at once: `dout` [G, M, D], `a` [G, M, I], `alpha` [G] and
# `weight` [G, D, I]. Return dα [G] by equation (4). Do not build a Wᵀ, [G, M, D].
#
# <details><summary>Hint 1</summary>
#
# dW' of each gate is `dout[g].T @ a[g]`, [D, I]; for all gates, `dout.swapaxes(1, 2) @ a`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# $\langle W, dW' \rangle$ is the sum of the products of all numbers, over the last *two* axes.
#
# </details>


# %% tags=["exercise"]
def gate_gradients(dout, a, alpha, weight):  # [G, M, D], [G, M, I], [G], [G, D, I] -> [G]
    ...  # your code


# %% tags=["solution"]
def gate_gradients(dout, a, alpha, weight):  # [G, M, D], [G, M, I], [G], [G, D, I] -> [G]
    dweight = dout.swapaxes(1, 2) @ a  # dW', as if every gate stood at 1
    return (1 - np.tanh(alpha) ** 2) * (weight * dweight).sum(axis=(1, 2))  # equation (4)


# %%
check("7.5", gate_gradients)

# %% [markdown]
# Bug 2, written in this form, and what the check calls it:

# %%
print("bug 2:", check("7.5", lambda d, a, alpha, w: np.einsum("gmd,gmi,gdi->g", d, a, w)).message)

# %% [markdown]
# ## Takeaways
#
# - y' = y + tanh(α) b. At α = 0 the model *is* the frozen LM, bit for bit, whatever b is.
# - dα = (1 − tanh²α) ⟨dy', b⟩ is not 0 there, db is: the gates set out first, and the branches
#   follow. Start one factor at 0, never both.
# - Two gates a layer: image-causal attention, then feed-forward on its result; then the frozen
#   block. Layers stand before blocks 0, n, 2n, ...
# - The feed-forward acts on tokens without an image, too, unless you forbid it;
#   `skip_without_image` is this project's choice and not the paper's.
# - Never test a gate at 0 alone: tan, a missing 1 − tanh², and a layer on the wrong side all pass.
# - The gate folds into the weights, and dα follows from ⟨W, dW'⟩ without the branch.
#
# **In the paper:** section 3.1.2 and figure 4; the ablation table; the sizes of the blocks, in the
# appendix. **In the library:** `miniflamingo/xattn.py` from "the gate" on; `Flamingo.read` in
# `miniflamingo/flamingo.py`; `kernels/gated_linear.py`.
#
# **Next:** module 08, training: the mixture, and how alpha evolves.
