# %% [markdown]
# # 08 Tanh gates and GATED XATTN-DENSE
#
# **The question: how do new layers enter a frozen language model without disturbing it, and how do
# they ever begin to matter?**
#
# After this module you can
#
# - write the tanh gate and its gradient, and say what happens at α = 0 and why;
# - build the whole GATED XATTN-DENSE layer line by line, and check its gradient by differences;
# - say why a test at α = 0 misses a wrong gate, and which test finds it (optional: two more bugs);
# - optional: say where the layers go, how large they are, and what `skip_without_image` changes;
# - optional: fold the gate into the weights, as the fused kernel does.
#
# **You need:** φ and image-causal attention (module 07), the frozen language model (module 06), and
# the tape (module 02): `with Tape() as tape:` around the forward pass, then
# `tape.backward(out, dout)`.
#
# **Time:** about 50 minutes for the core path, and 50 for what is marked optional. Computing takes
# about 2 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 4: the picture. 4 to 10: the derivation; let the class put α = 0 into (3)
# themselves. 10 to 16: the gate and exercise 8.1. 16 to 25: exercise 8.2. 25 to 36: exercise 8.3
# and the same by single operations. 36 to 39: guess 8.a. 39 to 45: from shut to open. 45 to 50:
# the bug and the takeaways.
#
# **Predictions.** 8.a: 2, 0 and 14. Usual: 0 for shut gates ("nothing comes out, so nothing
# learns"), and 2 for shut gates with zeroed matrices, because the factor W in ⟨dy', b⟩ is
# overlooked. 8.b: near 0.5, and yes. Usual: "only at 1", as it was trained there, and "no", since
# twice the trained α sounds like too much. 8.c: no, and 12. Usual: "yes", because tan is visibly
# another function, and fewer than 12 for the same reason. 8.d: none are caught, no, yes.
#
# **Open questions.** none.
#
# **Misconceptions.** "A shut gate has no gradient": α has one, what is behind it has none. "The
# gate chooses between text and image": nothing is taken from the stream, the branch is added. "α
# differs from token to token": it is one number for a whole branch. "With α = 0 the layers cost
# nothing": they are computed all the same.
#
# **To cut.** First the widget, then the lines on the Kullback–Leibler divergence (look at the left
# panel alone), then the check of the tape against differences. Exercise 8.2 can be homework; the
# rest of the module uses the notebook's own copy.

# %% [markdown]
# ## The picture and the letters
#
# One inserted layer of Flamingo ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.2)
# and the frozen block behind it, at initialisation. The text runs along the
# thick line. Two branches leave it and come back: one looks at the image, the other one works on
# what is there. Each comes back through a gate, one number between −1 and 1.

# %%
import copy
from unittest.mock import patch

import numpy as np

from miniflamingo import demo, plots, xattn
from miniflamingo.autograd import Tape, array_of
from miniflamingo.course import check, guess, show, source, told
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
# | L | tokens; all B·L of them, when a product does not care which row is whose | | |

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
# The shapes on the way, with I = H·K the heads' inner width:
#
# ```
# y    [B, L, D]       --norm, q_proj-->  q     [B, L, I]     --+
# x    [B, N, R, D_m]  --norm, k_proj-->  k     [B, N, R, I]  --+
#                      --norm, v_proj-->  v     [B, N, R, I]  --+-> attention [B, L, I]
# phi  [B, L]          ----------------------------------------+       | out_proj
#                                                         branch 1  [B, L, D]   times tanh(α), + y
# y'   [B, L, D]       --norm, up------>  hidden [B, L, 4D]  --ReLU², down-->
#                                                         branch 2  [B, L, D]   times tanh(α), + y'
# ```
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
def gate_loop(dout, y, alpha, branch):  # [L, D], [L, D], [], [L, D] -> [L, D], []
    out, dalpha = np.zeros_like(y), 0.0
    for place in np.ndindex(y.shape):
        out[place] = y[place] + np.tanh(alpha) * branch[place]  # (1)
        dalpha += (1 - np.tanh(alpha) ** 2) * dout[place] * branch[place]  # (3)
    return out, dalpha


# %% [markdown]
# ### Exercise 8.1: the gate without a loop
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
check("8.1", gate)

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
# ### Exercise 8.2: the slope, by differences
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
check("8.2", slopes)

# %% [markdown]
# The notebook's own copy of the same, for the rest of the module:

# %%
from miniflamingo.course.checks.module_08 import differences

some = np.array([-1.5, 0.0, 0.8])
numeric = differences(lambda a: np.vdot(dout, xattn.tanh_gate(y, a, branch)), some)
by_hand = [xattn.tanh_gate_backward(dout, y, a, branch)[1] for a in some]
assert np.allclose(numeric, by_hand, rtol=1e-6)
print("d alpha at -1.5, 0, 0.8:", *(f"{x:.2f}" for x in by_hand))

# %% [markdown]
# ## The whole layer
#
# ### Exercise 8.3: GATED XATTN-DENSE
#
# ★★☆ · 8 minutes · 2 or 3 lines. Write equation (2). `attend(y)` and `ffw(y)` are given as
# functions: the image-causal attention of module 07 with its norms and projections, and a
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
check("8.3", layer_of)

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
# **Predict, then run:** both gates are shut. How many of the layer's 14 parameters get a gradient
# that is not 0? How many do if, on top, `out_proj` and `down`, the last matrices of both branches,
# are set to 0, "to be on the safe side"? And how many if the gates stand at 0.1 instead, and the
# matrices are as they were? (Three numbers.)

# %%
guess("8.a", shut=..., shut_and_zero=..., open=...)


# %%
def alive(layer):  # names of the parameters whose gradient is not 0
    layer.zero_grad()
    with Tape() as tape:
        out = layer(y, media, phi)
    tape.backward(out, dout)
    return [name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()]


# %% tags=["reveal"]
set_gates(layer, 0, 0)
assert np.array_equal(layer(y, media, phi), y)
once = alive(layer)
zeroed = copy.deepcopy(layer)
for p in (zeroed.attention.out_proj.weight, zeroed.ffw.down.weight):
    p.data = np.zeros_like(p.data)
twice = alive(zeroed)
set_gates(layer, 0.1, 0.1)
print("gates shut:", once, "; and the last matrices 0, too:", twice)
told("8.a", shut=len(once), shut_and_zero=len(twice), open=len(alive(layer)))

# %% [markdown]
# <details><summary>After the run</summary>
#
# Zero once is a start, zero twice is the end: with W = 0 the branch is 0, so $\langle dy', b
# \rangle = 0$, and with α = 0 also $dW = 0$. Neither ever moves. One of two factors must not be 0.
#
# </details>

# %% [markdown]
# ## From shut to open
#
# The package's trained model has six gates. With all of them at 0 it must be its LM, bit for bit,
# and with all at their trained values it sees. In between we multiply every α by one factor.

# %%
model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
pictures, _, truths, _ = demo.exhibits()["captions"]
batch = build_batch([[pictures[0], "what color ?"]], TOKENIZER, 24, close=False)
print(f"the picture: {truths[0]}; the prompt: {TOKENIZER.decode(batch.tokens[0])}")
for name, values in model.alphas().items():
    print(f"tanh({name}), layer by layer:", *(f"{a:.2f}" for a in np.tanh(values)))


# %%
def opened(model, factor):
    model = copy.deepcopy(model)
    for layer in model.gated_xattn:
        set_gates(layer, factor * layer.alpha_xattn.data, factor * layer.alpha_dense.data)
    return model


shut = opened(model, 0)(**batch.inputs())
print("shut gates, logits equal to the LM's:", np.array_equal(shut, model.lm(batch.tokens)))

# %% [markdown]
# How far two distributions of the next word are apart is told by the Kullback–Leibler divergence,
# $\mathrm{KL}(p \Vert q) = \sum_v p_v \log (p_v / q_v)$: 0 for equal ones, never negative.
#
# **Predict, then run:** the LM alone, asked for a colour, can only guess. At which factor does the
# model begin to say "yellow" with more than a half: near 0.1, near 0.5, or only at 1 (one of these
# numbers)? And does it still say so at 2 ("yes" or "no")?

# %%
guess("8.b", yellow_from=..., still_at_2=...)

# %%
factors = np.array([0, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.8, 1, 1.5, 2])
logits = np.stack([opened(model, f)(**batch.inputs())[0, -1] for f in factors])
p = softmax(logits.astype(np.float64))  # [factors, V]
kl = (p * np.log(p / p[0])).sum(axis=-1)

# %% tags=["reveal"]
says = p[:, TOKENIZER.ids["yellow"]] > 0.5  # [factors]
nearest = min((0.1, 0.5, 1), key=lambda f: abs(f - factors[says.argmax()]))
told("8.b", yellow_from=nearest, still_at_2="yes" if says[-1] else "no")

# %% tags=["reveal"]
show(
    plots.plot_next_words(factors, p, TOKENIZER.words, kl, most=3),
    alt="Left: the probabilities of the three likeliest next words against the factor of every "
    "alpha, 0 to 2. Right: the Kullback-Leibler divergence from the frozen LM against the factor.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# Not in proportion: three layers work in a row, and a softmax decides at the end.
#
# </details>
#
# This is *one* model looked at along a line; it was trained at factor 1 alone. How the gates move
# in training is module 09.
#
# Turn the gates yourself, and watch the next word leave the frozen LM's:

# %%
from miniflamingo.course.widgets import turn_alpha

turn_alpha("what color ?")

# %% [markdown]
# ## Tokens without an image (optional)
#
# A token with φ = 0 gets an attention output of exactly 0 (module 07). The feed-forward branch does
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
# is in the README: the same training *without* it, of one seed, keeps 16 % of the LM's skill at
# text-only binding. With it 100 % are kept, by construction. The other figures stay within what
# chance explains. So it is a choice with a measured effect in one small model; how large the effect
# is with other seeds was not measured. Of the paper's models nobody says that they suffer so.

# %% [markdown]
# ## Where the layers go (optional)
#
# A layer stands *before* an LM block, so that the block's self-attention can pass on what the layer
# has seen. Of the LM's blocks 0, 1, 2, ... every n-th has one: n = 1 in the 3B model, 4 in 9B, 7 in
# 80B. The first one always has.
#
# ### Exercise 8.4: run a Flamingo, and measure its layers (optional)
#
# ★★☆ · 12 minutes · 8 to 10 lines. `blocks` are the LM's blocks and `layers` the inserted ones,
# lists of functions of the stream. `y` [B, L, D] is what goes into block 0. Run all of them, with a
# layer before every n-th block, and with the skip: a token that sees no image (`sees` bool [B, L])
# goes past the layer, its row as it was. Return what the last block gives, and float [layers]: what
# share of the stream each layer adds, $|y' - y| / |y|$, where y goes into the layer, y' is what
# goes on, and $|\cdot|$ is the root of the sum of all squares.
#
# <details><summary>Hint 1</summary>
#
# The remainder `i % every` tells which blocks have a layer. Which one is it? Count them apart from
# the blocks.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A layer as in exercise 8.3 has added its branches to y already. `np.where` with `sees[..., None]`
# chooses, token by token, between what it gives and y. `np.linalg.norm(x)` of an array with three
# axes is the root of the sum of all squares.
#
# </details>


# %% tags=["exercise"]
def run(y, blocks, layers, every, sees):  # [B, L, D], functions, int, bool -> [B, L, D], [layers]
    ...  # your code


# %% tags=["solution"]
def run(y, blocks, layers, every, sees):  # [B, L, D], functions, int, bool -> [B, L, D], [layers]
    shares = []
    for i, block in enumerate(blocks):
        if i % every == 0:
            before, layer = y, layers[len(shares)]
            y = np.where(sees[..., None], layer(y), y)
            shares.append(np.linalg.norm(y - before) / np.linalg.norm(before))
        y = block(y)
    return y, np.array(shares)


# %%
check("8.4", run)

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
# Only 3B fits. The paper's 9B row is not consistent with itself (module 15 recomputes it), and its
# 80B row counts more than these shapes hold. In the 3B model the layers nearly double the LM; every
# fourth block, as in 9B, costs a quarter and scores 68.8 instead of 70.7 in the paper's ablation at
# 3B, while one single layer in the middle scores 59.8. The same model without tanh gates: 66.5.
# What is left of all that at this project's size, at three depths and four rates, is in module 11.

# %% [markdown]
# ## Break it
#
# Bug 1: **`tan` for `tanh`** (flamingo-pytorch,
# [pull request 2](https://github.com/lucidrains/flamingo-pytorch/pull/2)).


# %%
def tan_gate(y, alpha, branch):  # bug 1
    return y + np.tan(array_of(alpha)) * branch


# %%
def hits(read):  # how many of the 12 answers are right
    right = 0
    for picture, truth in zip(pictures, truths):
        asked = build_batch([[picture, "what color ?"]], TOKENIZER, 24, close=False)
        seen = model.resampler(model.encode(asked.pixels), asked.num_frames)
        best = read(asked.tokens, seen, asked.phi)[0, -1].argmax()
        right += TOKENIZER.words[best] in truth.split()
    return right


# %% [markdown]
# The first test that everyone writes is that shut gates leave the LM as it is. The second is what
# the trained model answers: twelve pictures, asked for their colour.
#
# **Predict, then run:** does the first test catch the bug ("yes" or "no")? And how many of the
# twelve answers are right with it (the library has all of them)?

# %%
guess("8.c", caught=..., right=...)

# %% tags=["reveal"]
closed, lm = opened(model, 0), model.lm(batch.tokens)
with patch.object(xattn, "tanh_gate", tan_gate):
    same = np.array_equal(closed(**batch.inputs()), lm)
    right = hits(model.read)
print("the library:", hits(model.read), "of 12")
told("8.c", caught="no" if same else "yes", right=right)

# %% [markdown]
# And what does the check of exercise 8.1 say?

# %% tags=["reveal"]
print("bug 1:", check("8.1", tan_gate).message)

# %% [markdown]
# <details><summary>After the run</summary>
#
# tan and tanh have the same value and the same slope at 0, so no test there tells them apart. The
# answers do not either: the widest gate has |α| below 0.6, where both are still alike. The bug
# waits for a gate that grows: beyond 1.57 the branch jumps to its opposite. The check of 8.1 tries
# gates that are open. **Never test a gate at 0 alone.**
#
# </details>
#
# ### More bugs (optional)
#
# 2. **No $1 - \tanh^2$** in α's gradient, the classic of a backward pass written by hand.
# 3. **Inserted after instead of before** the LM's block
#    ([flamingo-pytorch](https://github.com/lucidrains/flamingo-pytorch): after every n-th).


# %%
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
# Bug 2 is not in the forward pass, so the test with shut gates cannot see it. A gradient check
# compares with differences.
#
# **Predict, then run:** does the test with shut gates catch bug 3? And does a gradient check catch
# bug 2 at α = 0, and at α = 0.8 (each "yes" or "no")?

# %%
guess("8.d", bug_3_shut=..., bug_2_at_0=..., bug_2_at_08=...)

# %% tags=["reveal"]
media = model.resampler(model.encode(batch.pixels), batch.num_frames)
same = np.array_equal(read_after(closed, batch.tokens, media, batch.phi), lm)
print("bug 3, shut gates equal the LM:", same)

# %% tags=["reveal"]
dout, y, branch = np.random.default_rng(0).normal(size=(3, 5, 4))
caught = []
for at in (0.0, 0.8):
    right = differences(lambda a: np.vdot(dout, xattn.tanh_gate(y, a, branch)), [at])[0]
    agrees = np.isclose(no_factor(dout, y, at, branch)[1], right, rtol=1e-6)
    caught.append("no" if agrees else "yes")
told("8.d", bug_3_shut="no" if same else "yes", bug_2_at_0=caught[0], bug_2_at_08=caught[1])

# %% [markdown]
# <details><summary>After the run</summary>
#
# Bug 3 passes, since a shut layer is the identity wherever it stands; and $1 - \tanh^2(0)$ is 1.
# Away from 0 bug 2 is found.
#
# </details>
#
# The gates and their slopes, the right ones and those of the bugs:

# %% tags=["reveal"]
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
# And what do the twelve answers say to bug 3?

# %%
print("bug 3, after:", hits(lambda *a: read_after(model, *a)), "of 12")

# %% [markdown]
# Bug 3 ruins *these* weights, which were trained the right way round. A model that is trained with
# it may learn, too; but no image reaches its first LM block, and what its last layer finds goes to
# the head with no block to work on it. To see it without training, list which LM blocks get another
# input when the image changes:


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
# And which check catches which bug? Bug 2 is caught by 8.5 below.
# [open-flamingo](https://github.com/mlfoundations/open_flamingo), whose layers stand before the
# blocks with $(i + 1) \bmod n = 0$, so that block 0 has none, is caught by 8.4:


# %%
def as_open_flamingo(y, blocks, layers, every, sees):
    for i, block in enumerate(blocks):
        if (i + 1) % every == 0:
            y = np.where(sees[..., None], layers[i // every](y), y)
        y = block(y)
    return y, np.zeros(len(layers))


print("open-flamingo:", check("8.4", as_open_flamingo).message)

# %% [markdown]
# ## The fused view (optional)
#
# **With the weights.** Both branches end in a matrix: $b = a W^\top$, with a [L, I] and W [D, I].
# Let $dW' = dy'^{\,\top} a$, the gradient that W would have if the gate stood at 1. Then
#
# $$\langle dy', a W^\top \rangle = \mathrm{tr}(dy'^{\,\top} a W^\top) = \langle W, dW' \rangle
# \;\Rightarrow\; d\alpha = (1 - \tanh^2 \alpha) \, \langle W, dW' \rangle, \qquad
# dW = \tanh(\alpha) \, dW' \qquad (4)$$
#
# The gate's gradient follows from a matrix that is needed anyway. b itself need not be kept.
#
# **The forward pass.** b is as large as the stream, [L, D], and equation (1) as it stands writes b,
# reads it, writes tanh(α) b, reads it, and reads y. But $\tanh(\alpha) \, a W^\top = a \,
# (\tanh(\alpha) W)^\top$: fold the gate into the *weights*, D·I numbers that do not grow with the
# text, and what is left is one product that adds onto y. BLAS libraries have it as one call; in
# torch it is `addmm(y, a, (tanh(alpha) * W).T)`.

# %%
L, D, I = 5, 4, 3
y, a, W = rng.normal(size=(L, D)), rng.normal(size=(L, I)), rng.normal(size=(D, I))
folded = y + a @ (np.tanh(0.8) * W).T
assert np.allclose(folded, xattn.tanh_gate(y, 0.8, a @ W.T), rtol=1e-12)

# %% [markdown]
# Numbers moved in the forward pass beside reading a and W and writing y': 5LD as written above;
# 3LD + 2DI with addmm (y is first copied to the output, which the product then reads and adds to;
# and the scaled weights are made); LD for a kernel that scales the sums while they are still in
# registers, and only reads y. For
# the 3B model's feed-forward, 8 pages of 2,048 tokens:

# %%
L, D, I = 8 * 2048, 2048, 4 * 2048
moved = {"as written": 5 * L * D, "addmm": 3 * L * D + 2 * D * I, "fused": L * D}
for name, numbers in moved.items():
    print(f"{name:<11}{2 * numbers / 1e6:>5.0f} MB in bfloat16")

# %% [markdown]
# Bytes are not time: the product itself is long, and a kernel's product may be slower than the
# vendor's. Of a whole block's time, the step from addmm to such a kernel is about one per cent
# (counted in `kernels/gated_linear.py`), so the library takes addmm. The backward pass has one more
# use of the same thought: equation (4).
#
# ### Exercise 8.5: the gated feed-forward, forwards and backwards (optional)
#
# ★★★ · 20 minutes · 9 to 14 lines. A branch without its norm: `y` [L, D], `up` [I, D], `down` [D,
# I], `alpha` [], and $y' = y + \tanh(\alpha) \; \mathrm{relu}(y \, \mathrm{up}^\top)^2 \,
# \mathrm{down}^\top$. From `dout` [L, D], the gradient of y', return (out, dy, dup, ddown, dalpha).
# Take dα from equation (4), without the branch.
#
# <details><summary>Hint 1</summary>
#
# Forwards: `before = y @ up.T`, `positive = np.maximum(before, 0)`, `hidden = positive**2`. Keep
# them.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With a = hidden and W = down, equation (4) is `full = dout.T @ hidden` (this is dW'), from which
# both `ddown` and `dalpha` follow.
#
# </details>
# <details><summary>Hint 3</summary>
#
# On the way back: `dhidden = tanh(alpha) * dout @ down`, then through the square of the ReLU, whose
# slope is `2 * positive`; y has two ways to the output, so `dy` is a sum of two.
#
# </details>


# %% tags=["exercise"]
def gated_feed_forward(dout, y, up, down, alpha):  # [L, D] twice, [I, D], [D, I], []
    ...  # your code


# %% tags=["solution"]
def gated_feed_forward(dout, y, up, down, alpha):  # [L, D] twice, [I, D], [D, I], []
    before = y @ up.T  # [L, I]
    above = np.maximum(before, 0)
    hidden, gate = above**2, np.tanh(alpha)
    out = y + gate * hidden @ down.T  # equation (1)
    full = dout.T @ hidden  # dW' of equation (4), as if the gate stood at 1
    dalpha = (1 - gate**2) * (down * full).sum()
    dhidden = gate * dout @ down  # db of equation (3), through the matrix
    dbefore = dhidden * 2 * above
    return out, dout + dbefore @ up, dbefore.T @ y, gate * full, dalpha


# %%
check("8.5", gated_feed_forward)

# %% [markdown]
# ## Takeaways
#
# - y' = y + tanh(α) b. At α = 0 the model *is* the frozen LM, bit for bit, whatever b is.
# - dα = (1 − tanh²α) ⟨dy', b⟩ is not 0 there, db is: the gates set out first, and the branches
#   follow. Start one factor at 0, never both.
# - Two gates a layer: image-causal attention, then feed-forward on its result; then the frozen
#   block. Layers stand before blocks 0, n, 2n, ...
# - Never test a gate at 0 alone: tan passes there (and so do a missing 1 − tanh², and a layer on
#   the wrong side).
# - From the optional parts: the feed-forward acts on tokens without an image, too, unless you
#   forbid it (`skip_without_image` is this project's choice and not the paper's). The gate folds
#   into the weights, and dα follows from ⟨W, dW'⟩ without the branch.
#
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.2 (3.1.2 in its
# first version) and figure 4; the ablation table; the sizes of the blocks, in the appendix. **In
# the library:** `miniflamingo/xattn.py` from "the gate" on; `Flamingo.read` in
# `miniflamingo/flamingo.py`; `kernels/gated_linear.py`.
#
# **Next:** module 09, training: the mixture, and how alpha evolves.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** Someone initialises all α at 0.01 instead of 0, "so that the branches learn from the first
# step on". What is gained, and what is lost?
#
# <details><summary>Answer</summary>
#
# Gained: $db = \tanh(\alpha) \, dy'$ is no longer exactly 0, so the branches have a gradient in the
# first step; with α = 0 they have one from the second step on, so this is one step. Lost: the model
# is no longer the frozen LM bit for bit, so the exact test at initialisation is gone, and every
# token gets a little of a random branch.
#
# </details>
#
# **2.** A gate has α = 3. The loss would fall if the branch were turned down. Why will that take
# long with plain gradient descent?
#
# <details><summary>Answer</summary>
#
# $d\alpha$ has the factor $1 - \tanh^2(3) \approx 0.01$: the gate is saturated, so its gradient is
# a hundredth of what it would be at 0. (Adam divides by the gradient's own size and suffers less.)
#
# </details>
#
# **3.** You replace a trained layer's $\alpha_{xattn}$ by $-\alpha_{xattn}$ and negate nothing
# else. Which one change of the weights makes the model exactly what it was?
#
# <details><summary>Answer</summary>
#
# tanh is odd, so the gate changes its sign. Negate the last matrix of the attention branch,
# `out_proj`: the branch changes its sign, too, and the product is the same. So the sign of a gate
# alone has no meaning.
#
# </details>
