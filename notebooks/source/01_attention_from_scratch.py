# %% [markdown]
# # 01 Attention from scratch
#
# **The question: how does a token decide what to read from the others, and what does that cost?**
#
# After this module you can
#
# - write scaled dot-product attention with loops, as two matrix products, with a mask and with
#   several heads, and say where each is easy to get wrong;
# - tell encoder, decoder and cross-attention apart by an experiment, not by name;
# - derive attention's gradient and check it by finite differences;
# - count what attention costs, measure it, and say why twice the length is four times the work.
#
# **You need:** NumPy, the softmax, and the derivative of a product. Module 00 is the map; nothing
# here builds on it.
#
# **Time:** about 52 minutes: 13 to read (2,650 words, 200 a minute) and 39 for five exercises.
# Computing takes about 3 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# The small language model of this package has learned a game: a page binds invented names to
# things, and then asks for one again. *dax* means nothing, except on this page:

# %%
import numpy as np

from miniflamingo import plots
from miniflamingo.attention import (
    MultiHeadAttention,
    attention,
    attention_backward,
    attention_weights,
)
from miniflamingo.course import check, show, source
from miniflamingo.functional import softmax
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds.grammar import TOKENIZER

# %%
lm = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors").lm.astype(np.float64)
page = "<BOS> red circle dax <EOC> blue bar wug <EOC> red circle"
tokens, words = np.array([TOKENIZER.encode(page)]), page.split()
logits = lm(tokens)  # [B, L, V]
print("after the last word the model expects:", TOKENIZER.words[logits[0, -1].argmax()])

# %% [markdown]
# To say *dax*, the model must have read it eight tokens back. Attention is the only part of the
# model in which one token reads another. So we open it: `hidden` is what the last block's attention
# gets, a row of D = 64 numbers for each token. This layer has four readers, called heads; we look
# at the last one.


# %%
def hidden(text):  # words -> [1, L, D]
    tokens = np.array([TOKENIZER.encode(text)])
    positions = np.arange(tokens.shape[1])[None]
    x, bias = lm.embed(tokens, positions), lm.causality(positions, tokens.shape[1])
    for block in lm.blocks[:-1]:
        x = block(x, bias=bias)
    return lm.blocks[-1].norm(x)


# %%
layer, x, L = lm.blocks[-1].attention, hidden(page), len(words)
past = np.tri(L, dtype=bool)  # token i may read tokens 0 to i
weights = layer.weights(x, mask=past)[0, 3]  # [L, L]
show(
    plots.plot_attention(words, words, weights, past),
    alt="A matrix of 11 tokens that read by 11 tokens that are read, in per cent, and the same as "
    "lines between two columns of words. Above the diagonal all is grey, masked. In the last row "
    "the second 'circle' reads 'dax' with 84 per cent and itself with 15; the second 'red' reads "
    "the first 'circle' with 98.",
)

# %% [markdown]
# Row i says what token i reads, in shares that sum to 100 %. The last *circle* reads *dax*: it has
# found the word that followed "red circle" last time. Nobody wrote that rule; it was learned. This
# module is about how such a matrix comes about, and what it costs.
#
# | letter | meaning | here | in the original transformer |
# |---|---|---|---|
# | L | tokens; Lq that read, Lk that are read | 11 | 512 |
# | D | width of a token's row of numbers | 64 | 512 |
# | H, K | heads, and the width of one | 4, 16 | 8, 64 |
# | q, k, v | query, key, value of a token, K numbers each | | |
# | s, p, o | score, weight, output | | |

# %% [markdown]
# ## The derivation
#
# Every token makes three vectors from its row x, by three learned matrices: a **query** (what do I
# look for?), a **key** (what can I be found by?) and a **value** (what do I say when I am read?).
# How well key j answers query i is their product, divided by a constant that we come to below:
#
# $$s_{ij} = q_i^\top k_j \,/\, \sqrt{K} \qquad\qquad (1)$$
#
# A softmax makes shares of the scores. They are positive and sum to 1 over the *keys*:
#
# $$p_{ij} = \frac{\exp s_{ij}}{\sum_{j'} \exp s_{ij'}} \qquad\qquad (2)$$
#
# The output is the values, mixed in these shares:
#
# $$o_i = \sum_j p_{ij} \, v_j \qquad\qquad (3)$$
#
# It is a dictionary look-up made soft. A look-up takes the one value whose key is equal; attention
# takes a little of each, more where the key fits better, and so it has a gradient. With the vectors
# as rows of matrices, all of it is two products with a softmax of each row in between:
#
# $$O = \mathrm{softmax}\big( Q K^\top / \sqrt{K} \big)\, V \qquad\qquad (4)$$
#
# (The K under the root is the width, the other one the matrix of keys; the field writes it so.)
# Where a token must not read another, as in the grey cells above, its score counts as $-\infty$ and
# its weight is 0.

# %% [markdown]
# ## Loops, then matrices
#
# Equations (1) to (3), one token at a time. The largest score is taken off first: a softmax sees
# only differences, and exp of a large number would overflow.


# %%
def attention_loop(q, k, v, mask):  # [Lq, K], [Lk, K], [Lk, K], bool[Lq, Lk] -> [Lq, K]
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        seen = np.flatnonzero(mask[i])
        s = np.array([q[i] @ k[j] for j in seen]) / np.sqrt(q.shape[1])  # (1)
        e = np.exp(s - s.max())
        for j, p in zip(seen, e / e.sum()):  # (2)
            out[i] += p * v[j]  # (3)
    return out


# %% [markdown]
# The queries, keys and values of our head, from the layer's own three matrices, and the loop's
# output beside the library's:

# %%
projections = layer.q_proj, layer.k_proj, layer.v_proj
q, k, v = (layer.project(p, x)[0, :, 3] for p in projections)  # head 3: [L, K] each
out = attention_loop(q, k, v, past)
assert np.allclose(out, attention(q, k, v, mask=past), rtol=1e-12)
assert np.allclose(out, weights @ v, rtol=1e-12)
print(q.shape, k.shape, v.shape, "->", out.shape)

# %% [markdown]
# ### Exercise 1.1: attention without a loop
#
# ★☆☆ · 6 minutes · 2 or 3 lines. Write equation (4) for a batch, with no mask yet: q is [B, Lq, K],
# k and v are [B, Lk, K]. `softmax` takes the softmax over the last axis.
#
# <details><summary>Hint 1</summary>
#
# `k.swapaxes(-1, -2)` turns [B, Lk, K] into [B, K, Lk]; `.T` would turn the batch, too.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The scores are [B, Lq, Lk]. Each row must sum to 1 *along the keys*, which is the last axis.
#
# </details>


# %% tags=["exercise"]
def attend(q, k, v):  # [B, Lq, K], [B, Lk, K], [B, Lk, K] -> [B, Lq, K]
    ...  # your code


# %% tags=["solution"]
def attend(q, k, v):  # [B, Lq, K], [B, Lk, K], [B, Lk, K] -> [B, Lq, K]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])  # (1)
    return softmax(scores) @ v  # (2) and (3)


# %%
check("1.1", attend)

# %% [markdown]
# ## Why divide by √K?
#
# Let the entries of q and k be independent, with mean 0 and variance 1. Their product is a sum of K
# terms of variance 1 each, so
#
# $$\mathrm{Var}(q^\top k) = K \qquad\qquad (5)$$
#
# and the scores of a wide head are *large*. Large scores make the softmax a hard choice of one key.
#
# **Predict, then run:** 16 random keys. At K = 1024, what is the largest weight of a query on
# average, with the division and without it? If all were equal it would be 1/16 ≈ 0.06.

# %%
rng, powers, largest = np.random.default_rng(0), [2, 4, 6, 8, 10], {"√K": [], "1": []}
for power in powers:
    some_q, some_k = rng.normal(size=(400, 2**power)), rng.normal(size=(16, 2**power))
    for name, scale in (("√K", np.sqrt(2**power)), ("1", 1)):
        largest[name].append(softmax(some_q @ some_k.T / scale).max(axis=1).mean())
lines = {f"divided by {name}": y for name, y in largest.items()}
show(
    plots.plot_lines(powers, lines, "log2 of the head width K", "largest of 16 weights", log=False),
    alt="The mean of the largest of 16 weights against the head's width, 4 to 1024. Divided by the "
    "root of K it stays near 0.25 at all widths; undivided it climbs from about 0.5 to nearly 1.",
)

# %% [markdown]
# A softmax that has chosen hardly learns: in equation (8), below, a weight of 0 or 1 lets no
# gradient through. Divided by √K, a new head of any width starts undecided. A *trained* head may
# choose as sharply as it likes, as ours does: 98 % in one cell.

# %% [markdown]
# ## The causal mask
#
# The model predicts the next word. Could token i read token i + 1, it would only have to copy. So
# token i reads 0 to i, itself included: the lower triangle in the first figure. `np.tri` draws it.
#
# While generating, it is not square. The keys and values of old tokens are kept, and only the
# newest Lq of Lk tokens ask. Query i then stands at position $L_k - L_q + i$, and
#
# $$M_{ij} = [\, j \le L_k - L_q + i \,] \qquad\qquad (6)$$
#
# ### Exercise 1.2: the causal mask
#
# ★☆☆ · 5 minutes · 1 to 3 lines. Return bool [Lq, Lk], true where the query may read the key. The
# queries are the *last* Lq of the Lk tokens.
#
# <details><summary>Hint 1</summary>
#
# The last query is the last token: its row is true throughout, whatever Lq and Lk are.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Compare `np.arange(Lk)`, a row, with the positions of the queries as a column, `[:, None]`.
#
# </details>


# %% tags=["exercise"]
def causal(Lq, Lk):  # int, int -> bool[Lq, Lk]
    ...  # your code


# %% tags=["solution"]
def causal(Lq, Lk):  # int, int -> bool[Lq, Lk]
    position = Lk - Lq + np.arange(Lq)
    return np.arange(Lk) <= position[:, None]  # (6)


# %%
check("1.2", causal)

# %% [markdown]
# ### Exercise 1.3: weights under a mask
#
# ★★☆ · 9 minutes · 3 to 5 lines. Return the weights, equation (2), over the keys that `mask`
# allows. A query that may read *nothing* gets weights of exactly 0. Such rows are real: padding, a
# token with no image before it (module 06). Use `softmax` or not, as you like.
#
# <details><summary>Hint 1</summary>
#
# Mask the *scores*, before the softmax: `np.where(mask, scores, ...)`. Weights that are set to 0
# afterwards leave the others with a sum below 1.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With −∞, a row without a key is 0/0. With a large negative number like −1e9, all its scores are
# equal, and equal scores make a uniform average. Mend those rows at the end: multiply by the mask.
#
# </details>


# %% tags=["exercise"]
def masked_weights(q, k, mask):  # [Lq, K], [Lk, K], bool[Lq, Lk] -> [Lq, Lk]
    ...  # your code


# %% tags=["solution"]
def masked_weights(q, k, mask):  # [Lq, K], [Lk, K], bool[Lq, Lk] -> [Lq, Lk]
    scores = q @ k.T / np.sqrt(q.shape[1])  # (1)
    return softmax(np.where(mask, scores, -1e9)) * mask  # (2); a row without a key is 0


# %%
check("1.3", masked_weights)

# %% [markdown]
# The library's version, whose name the rest of the course uses. `bias` is added to the scores; the
# language model uses it to prefer near tokens. It is 0 in the head that we look at.

# %%
source(attention_weights)

# %%
assert np.allclose(attention_weights(q, k, past), weights, rtol=1e-12)
empty = past & (np.arange(L) > 0)  # now nobody may read <BOS>, and <BOS> may read nothing
print("row of <BOS>:", np.unique(attention_weights(q, k, empty)[0]))

# %% [markdown]
# ## Several heads
#
# One softmax makes one choice. *circle* has to read its colour, its name and its neighbours at
# once, so a layer runs H attentions side by side, each on its own K numbers of the projections, and
# one more matrix mixes their outputs:
#
# $$\text{head}_h = \mathrm{attention}(Q_h, K_h, V_h), \qquad
# \text{out} = W_o \, [\text{head}_1, \dots, \text{head}_H] \qquad (7)$$
#
# The projections are made for all heads at once, [L, H·K]: head h owns columns hK to (h + 1)K − 1.
#
# ### Exercise 1.4: several heads
#
# ★★☆ · 9 minutes · 4 to 6 lines. Given q [Lq, H·K], k and v [Lk, H·K], return the heads' outputs
# side by side, [Lq, H·K], before the matrix $W_o$. The library's `attention(q, k, v)` takes leading
# axes: [H, Lq, K] works.
#
# <details><summary>Hint 1</summary>
#
# `q.reshape(len(q), H, K)` splits each *row* into its heads. Then the head axis must come first.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `reshape(H, Lq, K)` has the right shape, too, and mixes tokens with heads: a reshape moves no
# number. Use `.swapaxes(0, 1)`, and again on the way back.
#
# </details>


# %% tags=["exercise"]
def multi_head(q, k, v, H):  # [Lq, H*K], [Lk, H*K], [Lk, H*K], int -> [Lq, H*K]
    ...  # your code


# %% tags=["solution"]
def multi_head(q, k, v, H):  # [Lq, H*K], [Lk, H*K], [Lk, H*K], int -> [Lq, H*K]
    q, k, v = (x.reshape(len(x), H, -1).swapaxes(0, 1) for x in (q, k, v))  # [H, L, K]
    out = attention(q, k, v)  # (7)
    return out.swapaxes(0, 1).reshape(q.shape[1], -1)


# %%
check("1.4", multi_head)

# %% [markdown]
# The library's class: four matrices, and equation (7). `context` is what is read when it is not x
# itself; that is all that makes it a *cross*-attention.

# %%
source(MultiHeadAttention.forward)


# %%
def heads_loop(x, layer):  # [1, L, D] -> [1, L, D], under the causal mask
    q, k, v = (p(x)[0] for p in (layer.q_proj, layer.k_proj, layer.v_proj))  # [L, H*K]
    parts = [slice(h * layer.head_dim, (h + 1) * layer.head_dim) for h in range(layer.heads)]
    outs = [attention_loop(q[:, s], k[:, s], v[:, s], past) for s in parts]
    return layer.out_proj(np.concatenate(outs, axis=1)[None])  # (7)


assert np.allclose(heads_loop(x, layer), layer(x, mask=past), rtol=1e-9)

# %% [markdown]
# ## Encoder, decoder, cross-attention
#
# Three names for one formula; only two things differ: the mask, and whose keys are read.
#
# - **encoder:** every token reads every token, later ones, too. For texts and images that are there
#   as a whole;
# - **decoder:** causal. For text that is still being written;
# - **cross-attention:** the queries come from one sequence, the keys and values from another. The
#   original transformer's decoder reads its encoder so, and Flamingo's text its images.
#
# **Predict, then run:** we change the input of token 5, the word *blue*. Which of the 11 outputs
# change in an encoder, and which in a decoder? And if a second text reads this one, without
# changing itself, which of *its* outputs?

# %%
other = x.copy()
other[0, 5] += 1
asked = ["<BOS>", "red", "circle", "blue", "bar"]
reader = hidden(" ".join(asked))
for name, run in {
    "encoder": lambda c: layer(c),
    "decoder": lambda c: layer(c, mask=past),
    "cross-attention": lambda c: layer(reader, context=c),
}.items():
    changed = abs(run(other) - run(x)).max(axis=-1)[0] > 1e-9
    print(f"{name:<16} {changed.sum()} of {len(changed)} change: {np.flatnonzero(changed)}")

# %% [markdown]
# Now our head as an encoder, with the mask taken away, and as a cross-attention: another text,
# which contains no name at all, reads our page.

# %%
cross = layer.weights(reader, context=x)[0, 3]  # [5, 11]
show(
    plots.plot_weights(
        {
            "encoder: no mask": (words, words, layer.weights(x)[0, 3], None),
            "cross-attention": (asked, words, cross, None),
        }
    ),
    alt="Two matrices in per cent. Encoder: now the first 'circle' reads 'dax', the word after it, "
    "with 83, and 'bar' reads 'wug' with 87. Cross-attention, 5 tokens by 11: 'circle' reads 'dax' "
    "with 83 per cent and 'bar' reads 'wug' with 84.",
)

# %% [markdown]
# Without the mask, the first *circle* reads the name that comes after it: that is the cheating that
# the mask forbids. And the head works *across* texts, though it was never trained to: *circle* in
# the one finds *dax* in the other, and *bar* finds *wug*. Keys and queries do not know where they
# come from.

# %% [markdown]
# ## The gradient
#
# Let $do_i$ be the gradient of the loss with respect to output i, and $dp_{ij} = do_i^\top v_j$.
# From (3), $dv_j = \sum_i p_{ij}\, do_i$. The softmax (2) has the derivative
# $\partial p_{ij} / \partial s_{ij'} = p_{ij} ([j = j'] - p_{ij'})$, and so
#
# $$ds_{ij} = p_{ij} \Big( dp_{ij} - \sum_{j'} p_{ij'}\, dp_{ij'} \Big) \qquad\qquad (8)$$
#
# In words: a score should grow if its value is better for the loss than the mixture is *now*, in
# proportion to its weight. From (1), $dq_i = \sum_j ds_{ij} k_j / \sqrt{K}$, and the same for
# $dk_j$ with $q_i$.
#
# ### Exercise 1.5: the softmax's gradient
#
# ★★★ · 10 minutes · 2 or 3 lines. Write equation (8) for all queries and keys at once: given `dout`
# [Lq, K], the weights `p` [Lq, Lk] and `v` [Lk, K], return ds [Lq, Lk].
#
# <details><summary>Hint 1</summary>
#
# $dp_{ij} = do_i^\top v_j$ for all pairs is `dout @ v.T`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The sum in (8) is one number for each *row*: `(p * dp).sum(axis=1, keepdims=True)`.
#
# </details>


# %% tags=["exercise"]
def dscores(dout, p, v):  # [Lq, K], [Lq, Lk], [Lk, K] -> [Lq, Lk]
    ...  # your code


# %% tags=["solution"]
def dscores(dout, p, v):  # [Lq, K], [Lq, Lk], [Lk, K] -> [Lq, Lk]
    dp = dout @ v.T
    return p * (dp - (p * dp).sum(axis=1, keepdims=True))  # (8)


# %%
check("1.5", dscores)

# %% [markdown]
# The library's gradient stands right below its formula. It keeps nothing from the forward pass and
# computes the weights again, as the fused kernels do:

# %%
source(attention_backward)

# %% [markdown]
# A derivation may be wrong, a measurement of the slope is not. **Central differences:** move one
# number by ±ε, and see how $\sum do \cdot o$ moves. That is a slow loop, so it is for tests only.


# %%
def slopes(loss, array, step=1e-6):  # a function without arguments, and an array that it reads
    grad = np.zeros_like(array)
    for place in np.ndindex(array.shape):
        kept, values = array[place], []
        for array[place] in (kept + step, kept - step):
            values.append(loss())
        array[place] = kept
        grad[place] = (values[0] - values[1]) / (2 * step)
    return grad


# %%
dout = rng.normal(size=out.shape)
arrays = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
derived = attention_backward(dout, *arrays.values(), mask=past)
for (name, array), d in zip(arrays.items(), derived):
    measured = slopes(lambda: (dout * attention(*arrays.values(), mask=past)).sum(), array)
    assert np.allclose(measured, d, atol=1e-7)
    print(f"d{name}: {d.size} numbers, the largest {abs(d).max():.2g}, equal to the measured ones")

# %% [markdown]
# ## What it costs
#
# For every pair of a query and a key, a product of K numbers makes the score and K numbers of the
# value are mixed in: 2K multiplications and as many additions, in each of H heads:
#
# $$\text{flops} = 4 \, L_q L_k \, H K, \qquad \text{scores} = H \, L_q L_k \qquad (9)$$
#
# In self-attention $L_q = L_k = L$: **O(L²)**. If a *fixed* number of queries reads L keys, it is
# O(L). Counted first, for 4 heads of 16:


# %%
def flops(Lq, Lk, H=4, K=16):
    return 4 * Lq * Lk * H * K  # (9)


lengths = [128, 256, 512, 1024, 2048]
counted = {"self": [flops(n, n) / 1e6 for n in lengths],
           "cross, 64 queries": [flops(64, n) / 1e6 for n in lengths]}  # fmt: skip
show(
    plots.plot_lines(lengths, counted, "tokens that are read", "million operations"),
    alt="Counted operations against length, 128 to 2048, both axes logarithmic. Self-attention "
    "rises from 4 to about 1074 million, fourfold for each doubling; the cross-attention of 64 "
    "queries from 2 to about 34 million, twofold for each doubling.",
)

# %% [markdown]
# **Predict, then run:** by which factor does the *measured* time of self-attention grow from 1,024
# to 2,048 tokens? And of the cross-attention? (Times are your machine's, best of three.)

# %%
from time import process_time


def milliseconds(Lq, Lk, H=4, K=16):
    q, k, v = (rng.normal(size=(H, n, K)).astype(np.float32) for n in (Lq, Lk, Lk))
    times = []
    for _ in range(3):
        start = process_time()
        attention(q, k, v)
        times.append(process_time() - start)
    return 1e3 * min(times)


# %% tags=["volatile"]
measured = {"self": [milliseconds(n, n) for n in lengths],
            "cross, 64 queries": [milliseconds(64, n) for n in lengths]}  # fmt: skip
show(
    plots.plot_lines(lengths, measured, "tokens that are read", "milliseconds"),
    alt="Measured milliseconds against length, 128 to 2048, both axes logarithmic: self-attention "
    "rises about fourfold for each doubling, the cross-attention of 64 queries about twofold.",
)
for name, ms in measured.items():
    print(f"{name}: {ms[-1]:.2f} ms at 2,048 tokens, {ms[-1] / ms[-2]:.1f} times that at 1,024")

# %% [markdown]
# The lines have the slopes that (9) promised. Small sizes cost more than they should: each call has
# a price of its own.
#
# Is it really the attention that hurts? A layer also has its four matrices, $8 L D^2$ operations,
# linear in L. They are equal at L = 2D:

# %%
for n in (512, 1024, 4096, 50_176):
    matrices, pairs = 8 * n * 512**2 / 1e9, flops(n, n, 8, 64) / 1e9
    scores = 4 * 8 * n * n / 1e9  # 8 heads, float32
    print(f"L = {n:>6,}: matrices {matrices:>7,.1f} GFLOP, attention {pairs:>8,.1f}, ", end="")
    print(f"scores {scores:>8,.3f} GB")

# %% [markdown]
# At the original transformer's 512 tokens attention was the smaller part. 50,176 is the number of
# pixels of a 224 × 224 image, as many tokens if each pixel is one: the scores of one layer alone
# would take 81 GB. This is the bottleneck that this course, and Flamingo, is built around.
#
# **Ways round it.** *Sliding windows* (Mistral 7B) let a token read only the last w tokens: O(L·w);
# what lies further back must travel through several layers. *Ring attention* (Large World Model)
# keeps all L² pairs and shares them out over many machines. *Fused kernels* (module 11) keep all
# pairs, too, but never write the scores to memory. And the *Perceiver* (module 02) lets few queries
# read many keys: the lower line of both figures.

# %% [markdown]
# ## Break it
#
# Five bugs that were in public code. All run, all give the right shape.
#
# 1. **No scale** (mlc-llm, pull request 3426: a fallback path forgot it).
# 2. **Softmax over the wrong axis** (nerdai/llms-from-scratch-rs, pull request 30).
# 3. **A finite fill** (flamingo-pytorch and open-flamingo, in some settings): masked scores become
#    a large negative number, and a row that is masked throughout becomes a uniform average.
# 4. **−∞ and nothing else** (PyTorch, issue 41508, of 2020): such a row becomes NaN.
# 5. **The causal triangle at the wrong corner** (flash-attention, issue 351, changed in its version
#    2.1): with fewer queries than keys, query 0 was taken for token 0.


# %%
def scores_of(q, k, mask, bias, fill):
    return np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + bias, fill)


def no_scale(q, k, v, mask, bias=0):  # bug 1
    return attention(q * np.sqrt(q.shape[-1]), k, v, mask, bias)


def wrong_axis(q, k, v, mask, bias=0):  # bug 2
    scores = scores_of(q, k, mask, bias, -np.inf)
    return softmax(scores.swapaxes(-1, -2)).swapaxes(-1, -2) @ v


# %%
def finite_fill(q, k, v, mask, bias=0):  # bug 3
    return softmax(scores_of(q, k, mask, bias, -1e9)) @ v


def only_infinity(q, k, v, mask, bias=0):  # bug 4
    e = np.exp(scores_of(q, k, mask, bias, -np.inf))
    return e / e.sum(axis=-1, keepdims=True) @ v


def wrong_corner(q, k, v, mask, bias=0):  # bug 5: draws its own triangle
    return attention(q, k, v, mask & np.tri(*mask.shape[-2:], dtype=bool), bias)


# %% [markdown]
# Five checks, none of which needs to know how the function is written:


# %%
def properties(attend):
    later_k, later_v = k.copy(), v.copy()
    later_k[-1] += 1
    later_v[-1] += 1
    before, nothing = attend(q, k, v, past), np.zeros_like(past)
    return {
        "sum 1": np.allclose(attend(q, k, np.ones_like(v), past), 1),
        "no future": np.allclose(attend(q, later_k, later_v, past)[:-1], before[:-1]),
        "empty = 0": np.array_equal(attend(q, k, v, nothing), 0 * v),
        "cached": np.allclose(attend(q[-2:], k, v, past[-2:]), before[-2:]),
        "formula": np.allclose(before, attention_loop(q, k, v, past)),
    }


# %% [markdown]
# **Predict, then run:** which check catches which bug? Is there one that catches all?

# %%
bugs = {"the library": attention, "1 no scale": no_scale, "2 wrong axis": wrong_axis,
        "3 finite fill": finite_fill, "4 only infinity": only_infinity,
        "5 wrong corner": wrong_corner}  # fmt: skip
with np.errstate(invalid="ignore"):  # NaN without a warning
    results = {name: properties(attend) for name, attend in bugs.items()}
print(" " * 17, *(f"{name:^10}" for name in results["the library"]))
for name, passed in results.items():
    print(f"{name:<17}", *(f"{'✓' if ok else '✗':^10}" for ok in passed.values()))

# %% [markdown]
# No check catches all. Bug 1 keeps every property that one would think of, and only the comparison
# with the formula finds it. Bugs 3 and 4 equal the formula exactly, until a row is empty; one NaN
# in one padded row then makes *every* gradient of the batch NaN, since 0 · NaN is NaN. Bug 5 is
# right in training, where the mask is square, and wrong in use.
#
# What do the bugs do to the trained model? We put them into its layers, and ask for a name on pages
# that bind two names eight times in all. Guessing one of the two would be right half the time.

# %%
from unittest.mock import patch

from miniflamingo import attention as room
from miniflamingo.worlds.grammar import binding, draw_episode

episode = draw_episode(200, 8, 2, np.random.default_rng(1))
texts = binding(episode)  # int[B, 1 + 4 n]: <BOS>, then colour shape name <EOC>, n times

# %%
for name, attend_with in bugs.items():

    def inside(q, k, v, mask=None, bias=None, attend=attend_with):  # masked by a bias of -inf
        seen = np.isfinite(bias)
        return attend(q, k, v, seen, np.where(seen, bias, 0))

    with patch.object(room, "attention", inside):
        right = lm(texts)[:, -3].argmax(axis=-1) == texts[:, -2]
    print(f"{name:<16} right on {right.mean():.0%} of {len(texts)} pages")

# %% [markdown]
# The first two bugs ruin a model that was trained without them. Had it been trained *with* them, it
# would have learned something, with a good-looking loss; that is how they stay. The other three do
# nothing at all here, on square masks with no empty row. That is how *they* stay.

# %% [markdown]
# ## Takeaways
#
# - Scores are products of queries and keys, a softmax over the *keys* makes shares, the output is
#   the values in these shares.
# - √K keeps a new head's softmax undecided, whatever its width. It is the *head's* width.
# - A mask acts on the scores. A row without a key is 0 by definition, neither NaN nor an average.
#   With Lq < Lk the causal triangle ends at the lower *right* corner.
# - Heads are split by reshape *and* swapaxes. Encoder, decoder and cross-attention are one formula
#   with other masks and other keys.
# - Check a gradient by central differences, and an attention by several properties: no single check
#   finds all bugs.
# - Self-attention costs O(L²); a fixed number of queries that reads L keys costs O(L).
#
# **In the paper:** sections 3.1.1 and 3.1.2 build on cross-attention; the formula is equation 1 of
# "Attention Is All You Need" (Vaswani et al., 2017). **In the library:** the file
# `miniflamingo/attention.py`, to `MultiHeadAttention`; kernels come in modules 11 and 12.
#
# **Next:** module 02, the Perceiver: what to do with 50,176 inputs.
