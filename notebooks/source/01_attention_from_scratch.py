# %% [markdown]
# # 01 Attention from scratch
#
# **The question: how does a token decide what to read from the others, and what does that cost?**
#
# After this module you can
#
# - write scaled dot-product attention with loops, as two matrix products and with a mask, and say
#   where each is easy to get wrong;
# - tell encoder, decoder and cross-attention apart by an experiment, not by name;
# - count what attention costs, measure it, and say why twice the length is four times the work;
# - (optional) write several heads, derive attention's gradient and check it by finite differences,
#   and recognise five bugs of public code.
#
# **You need:** NumPy, the softmax, and the derivative of a product. Module 00 is the map; nothing
# here builds on it.
#
# **Time:** about 55 minutes for the core path, and 45 for what is marked optional. Computing takes
# about 3 seconds of one core.

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
from miniflamingo.course import check, guess, show, source, told
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
# model in which one token reads another. This module is about how it does that, and what it costs.
#
# | letter | meaning | here | in the original transformer |
# |---|---|---|---|
# | L | tokens; Lq that read, Lk that are read | 11 | 512 |
# | D | width of a token's row of numbers | 64 | 512 |
# | H, K | heads, and the width of one | 4, 16 | 8, 64 |
# | q, k, v | query, key, value of a token, K numbers each | | |
# | s, p, o | score, weight, output | | |
#
# (The original transformer is that of
# [Attention Is All You Need](https://arxiv.org/abs/1706.03762), 2017.)

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
# $$\mathbf{O} = \mathrm{softmax}\big( \mathbf{Q} \mathbf{K}^\top / \sqrt{K} \big)\, \mathbf{V}
# \qquad\qquad (4)$$
#
# (The K under the root is the width, the bold one is the matrix of all keys.) The shapes:
#
# ```
# Q [Lq, K] --+
#             +-- Q Kᵀ / √K --> S [Lq, Lk] -- softmax --> P [Lq, Lk] --+
# K [Lk, K] --+     (1)                    of each row,                +-- P V --> O [Lq, K]
#                                              (2)                     |   (3)
# V [Lk, K] -----------------------------------------------------------+
# ```
#
# Lq rows go in as queries and Lq rows come out. Lk is summed over, and is gone from the result.
#
# **By hand.** Two queries, three keys, K = 4, so √K = 2; values of two numbers:
#
# | | vector | | | vector | value |
# |---|---|---|---|---|---|
# | $q_1$ | (4, 0, 0, 0) | | $k_1$ | (1, 0, 0, 0) | $v_1$ = (10, 0) |
# | $q_2$ | (0, 2, 0, 0) | | $k_2$ | (0, 1, 0, 0) | $v_2$ = (0, 10) |
# | | | | $k_3$ | (1, 1, 0, 0) | $v_3$ = (10, 10) |
#
# The products of $q_1$ with the keys are 4, 0, 4, its scores 2, 0, 2. With $e^2 = 7.39$ and
# $e^0 = 1$ the sum of (2) is 15.78, and the weights are 0.47, 0.06, 0.47. So $o_1 = 0.47\,(10, 0) +
# 0.06\,(0, 10) + 0.47\,(10, 10) = (9.4, 5.3)$. For $q_2$ the scores are 0, 1, 1, the weights 0.16,
# 0.42, 0.42, and $o_2 = (5.8, 8.4)$. Each query has found the keys that share its direction, $q_1$
# more sharply, because it is longer.
#
# Where a token must not read another, its score counts as $-\infty$ and its weight is 0.

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


# %%
q = np.array([[4.0, 0, 0, 0], [0, 2, 0, 0]])
k = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]])
v = np.array([[10.0, 0], [0, 10], [10, 10]])
print(attention_loop(q, k, v, np.ones((2, 3), bool)).round(1))

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
# ## A trained head
#
# Now we open the model. `hidden` is what the last block's attention gets, a row of D = 64 numbers
# for each token. This layer has four readers, called heads; we look at the last one. In a language
# model token i reads the tokens 0 to i only.


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
# found the word that followed "red circle" last time. Nobody wrote that rule; it was learned. Our
# loop, with the queries, keys and values from the layer's own three matrices, agrees with the
# library:

# %%
projections = layer.q_proj, layer.k_proj, layer.v_proj
q, k, v = (layer.project(p, x)[0, :, 3] for p in projections)  # head 3: [L, K] each
out = attention_loop(q, k, v, past)
assert np.allclose(out, attention(q, k, v, mask=past), rtol=1e-12)
assert np.allclose(out, weights @ v, rtol=1e-12)
print(q.shape, k.shape, v.shape, "->", out.shape)

# %% [markdown]
# ## Why divide by √K?
#
# Let the entries of q and k be independent, with mean 0 and variance 1. Each product of two entries
# then has mean 0 and variance 1 · 1, and $q^\top k$ is a sum of K such terms. The variances of
# independent terms add, so
#
# $$\mathrm{Var}(q^\top k) = K \qquad\qquad (5)$$
#
# and the scores of a wide head are *large*. Large scores make the softmax a hard choice of one key.
#
# **Predict, then run:** 16 random keys. At K = 1024, what is the largest weight of a query on
# average, with the division and without it? Two numbers between 0 and 1. If all weights were equal
# it would be 1/16 ≈ 0.06.

# %%
guess("1.a", divided=..., undivided=...)

# %% tags=["reveal"]
rng, powers, largest = np.random.default_rng(0), [2, 4, 6, 8, 10], {"√K": [], "1": []}
for power in powers:
    some_q, some_k = rng.normal(size=(400, 2**power)), rng.normal(size=(16, 2**power))
    for name, scale in (("√K", np.sqrt(2**power)), ("1", 1)):
        largest[name].append(softmax(some_q @ some_k.T / scale).max(axis=1).mean())
lines = {f"divided by {name}": y for name, y in largest.items()}
show(
    plots.plot_lines(powers, lines, "log2 of the head width K", "largest of 16 weights", log=False),
    alt="The mean of the largest of 16 weights against the head's width, 4 to 1024, in two lines: "
    "scores divided by the root of K, and scores that are not divided.",
)
divided, undivided = (round(float(y[-1]), 2) for y in largest.values())
told("1.a", within=0.2, divided=divided, undivided=undivided)

# %% [markdown]
# A softmax that has chosen hardly learns: in equation (8), below, a weight of 0 or 1 lets no
# gradient through. Divided by √K, a new head of any width starts undecided. A *trained* head may
# choose as sharply as it likes, as ours does: 98 % in one cell.

# %% [markdown]
# ## The causal mask
#
# The model predicts the next word. Could token i read token i + 1, it would only have to copy. So
# token i reads 0 to i, itself included: the lower triangle in the figure above. `np.tri` draws it.
#
# While generating, it is not square. The keys and values of old tokens are kept, and only the
# newest Lq of Lk tokens ask. Query i then stands at position $L_k - L_q + i$, and
#
# $$\mathrm{mask}_{ij} = [\, j \le L_k - L_q + i \,] \qquad\qquad (6)$$
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
# token with no image before it (module 07). Use `softmax` or not, as you like.
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
# $$\text{head}_h = \mathrm{attention}(\mathbf{Q}_h, \mathbf{K}_h, \mathbf{V}_h), \qquad
# \text{out} = [\text{head}_1, \dots, \text{head}_H] \, W_o \qquad (7)$$
#
# The projections are made for all heads at once, [L, H·K]: head h, counted from 0, owns the columns
# hK to (h + 1)K − 1. In the library it is `MultiHeadAttention`. Its argument `context` is what is
# read when that is not x itself; that is all that makes it a *cross*-attention.
#
# ### Exercise 1.4: several heads, in groups (optional)
#
# ★★☆ · 13 minutes · 7 to 9 lines. Write (7) as models of today have it: for a batch, under a mask,
# and with fewer heads for keys and values than for queries
# ([arXiv:2305.13245](https://arxiv.org/abs/2305.13245)). With G of them, the heads 0 to H/G − 1 all
# read group 0, the next H/G heads group 1, and so on, so a text of the same length needs H/G times
# less memory for its keys. Given q [B, Lq, H·K], k and v [B, Lk, G·K] and mask bool [B, Lq, Lk],
# return the heads' outputs side by side, [B, Lq, H·K], before the matrix $W_o$. The library's
# `attention(q, k, v, mask)` takes leading axes: q as [B, H, Lq, K] works, and a query that may read
# nothing gets 0.
#
# <details><summary>Hint 1</summary>
#
# `q.reshape(B, Lq, H, K)` splits each *row* into its heads. Then the head axis must come before
# that of the tokens. With k and v it is the same, but for their own number of heads.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `reshape(B, H, Lq, K)` has the right shape, too, and mixes tokens with heads: a reshape moves no
# number. Use `.swapaxes(1, 2)`, and again on the way back.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `np.repeat` with an axis gives each head a copy of its group. And the mask has no axis of heads
# yet: it must get one to fit the scores, [B, H, Lq, Lk].
#
# </details>


# %% tags=["exercise"]
def multi_head(q, k, v, mask, H):  # [B, Lq, H*K], [B, Lk, G*K], .., bool[B, Lq, Lk] -> [B, Lq, H*K]
    ...  # your code


# %% tags=["solution"]
def multi_head(q, k, v, mask, H):  # [B, Lq, H*K], [B, Lk, G*K], .., bool[B, Lq, Lk] -> [B, Lq, H*K]
    B, Lq, width = q.shape
    K = width // H
    q, k, v = (x.reshape(B, x.shape[1], -1, K) for x in (q, k, v))  # [B, L, heads, K]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, heads, L, K]
    shared = H // k.shape[1]
    k, v = (np.repeat(x, shared, axis=1) for x in (k, v))  # head h reads group h // shared
    out = attention(q, k, v, mask[:, None])  # (7)
    return out.swapaxes(1, 2).reshape(B, Lq, width)


# %%
check("1.4", multi_head)

# %% [markdown]
# The library's class: four matrices, and equation (7).

# %%
source(MultiHeadAttention.forward)


# %%
def heads_loop(x, layer):  # [1, L, D] -> [1, L, D], under the causal mask
    q, k, v = (p(x)[0] for p in (layer.q_proj, layer.k_proj, layer.v_proj))  # [L, H*K]
    parts = [slice(h * layer.head_dim, (h + 1) * layer.head_dim) for h in range(layer.heads)]
    outs = [attention_loop(q[:, part], k[:, part], v[:, part], past) for part in parts]
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
# **Predict, then run:** we change the input of token 5, the word *blue*; the first token is token
# 0. How many of the 11 outputs change in an encoder, and how many in a decoder? And if a second
# text of 5 tokens reads this one, without changing itself, how many of *its* outputs?

# %%
guess("1.b", encoder=..., decoder=..., cross_attention=...)

# %% tags=["reveal"]
other = x.copy()
other[0, 5] += 1
asked = ["<BOS>", "red", "circle", "blue", "bar"]
reader, counts = hidden(" ".join(asked)), []
for name, run in {
    "encoder": lambda c: layer(c),
    "decoder": lambda c: layer(c, mask=past),
    "cross-attention": lambda c: layer(reader, context=c),
}.items():
    changed = abs(run(other) - run(x)).max(axis=-1)[0] > 1e-9
    print(f"{name:<16} {changed.sum()} of {len(changed)} change: {np.flatnonzero(changed)}")
    counts.append(changed.sum())
told("1.b", encoder=counts[0], decoder=counts[1], cross_attention=counts[2])

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
# ## The gradient (optional)
#
# Let $do_i$ be the gradient of the loss with respect to output i. By (3) output i changes by
# $p_{ij}$ times a change of $v_j$, and every query reads $v_j$, so $dv_j = \sum_i p_{ij}\, do_i$.
# A change of $p_{ij}$ moves $o_i$ along $v_j$, so $dp_{ij} = do_i^\top v_j$. The softmax (2) has
# the derivative $\partial p_{ij} / \partial s_{ij'} = p_{ij} ([j = j'] - p_{ij'})$: the numerator
# gives the first term, the sum in the denominator the second. Score $s_{ij}$ acts on all weights of
# its row; added up over them,
#
# $$ds_{ij} = p_{ij} \Big( dp_{ij} - \sum_{j'} p_{ij'}\, dp_{ij'} \Big) \qquad\qquad (8)$$
#
# In words: a score should grow if its value is better for the loss than the mixture is *now*, in
# proportion to its weight. From (1), $dq_i = \sum_j ds_{ij} k_j / \sqrt{K}$ and
# $dk_j = \sum_i ds_{ij} q_i / \sqrt{K}$. Where the mask forbids a pair, $p_{ij} = 0$, and by (8)
# $ds_{ij} = 0$: no gradient passes.
#
# ### Exercise 1.5: the gradient of several heads (optional)
#
# ★★★ · 18 minutes · 8 to 12 lines. Given `dout`, the gradient at the heads' outputs side by side
# [Lq, H·K], return dq [Lq, H·K], dk and dv [Lk, H·K]. All heads have the same mask; every query may
# read something. Compute the weights again, as in exercise 1.3, then (8) for all heads at once.
#
# <details><summary>Hint 1</summary>
#
# Split all four into heads as in exercise 1.4, `dout`, too (there is no batch here, and each head
# has keys of its own). Then every sum over queries or keys is
# a matrix product: $dp$ is `dout @ v.swapaxes(1, 2)`, $dv$ is `p.swapaxes(1, 2) @ dout`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The sum in (8) is one number for each *row*: `(p * dp).sum(axis=-1, keepdims=True)`. The root is
# that of the head's width K, and it divides dq and dk, not dv.
#
# </details>


# %% tags=["exercise"]
def heads_gradient(dout, q, k, v, mask, H):  # [Lq, H*K], ..., bool[Lq, Lk], int -> dq, dk, dv
    ...  # your code


# %% tags=["solution"]
def heads_gradient(dout, q, k, v, mask, H):  # [Lq, H*K], ..., bool[Lq, Lk], int -> dq, dk, dv
    split = [x.reshape(len(x), H, -1).swapaxes(0, 1) for x in (dout, q, k, v)]  # [H, L, K]
    dout, q, k, v = split
    root = np.sqrt(q.shape[-1])
    p = softmax(np.where(mask, q @ k.swapaxes(1, 2) / root, -1e9))  # (1), (2)
    dp = dout @ v.swapaxes(1, 2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))  # (8)
    parts = ds @ k / root, ds.swapaxes(1, 2) @ q / root, p.swapaxes(1, 2) @ dout
    return [x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in parts]


# %%
check("1.5", heads_gradient)

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
dout = np.random.default_rng(0).normal(size=out.shape)
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
# Now we measure. The times are your machine's, best of three.

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


# %% [markdown]
# **Predict, then run:** by which factor does the *measured* time of self-attention grow from 1,024
# to 2,048 tokens? And that of the cross-attention? Two numbers; a guess counts as right when it is
# within a third of what is measured.

# %%
guess("1.c", self_attention=..., cross_attention=...)

# %% tags=["reveal", "volatile"]
measured = {"self": [milliseconds(n, n) for n in lengths],
            "cross, 64 queries": [milliseconds(64, n) for n in lengths]}  # fmt: skip
show(
    plots.plot_lines(lengths, measured, "tokens that are read", "milliseconds"),
    alt="Measured milliseconds against length, 128 to 2048, both axes logarithmic: self-attention "
    "rises about fourfold for each doubling, the cross-attention of 64 queries about twofold.",
)
for name, ms in measured.items():
    print(f"{name}: {ms[-1]:.2f} ms at 2,048 tokens, {ms[-1] / ms[-2]:.1f} times that at 1,024")
growth = [ms[-1] / ms[-2] for ms in measured.values()]
told("1.c", within=1 / 3, self_attention=growth[0], cross_attention=growth[1])

# %% [markdown]
# <details><summary>After the run</summary>
#
# The lines have about the slopes that (9) promised. Small sizes cost more than they should: each
# call has a price of its own. Large ones may, too: the scores of 2,048 tokens and 4 heads are 67
# MB, more than the caches of most processors hold.
#
# </details>
#
# 50,176 is the number of pixels of a 224 × 224 image, as many tokens if each pixel is one. The
# scores of one layer of 8 heads alone would take 81 GB. This is the bottleneck that this course,
# and Flamingo, is built around.
#
# ### Measured with more care (optional)
#
# On more sizes and for PyTorch as well, this was measured once and kept. A slope is the exponent of
# the growth; in brackets stands the one that counting operations gives.

# %%
import json
from pathlib import Path

from miniflamingo import kernels

file = Path(kernels.__file__).parent / "results" / "scaling.json"
cases = {case["case"]: case for case in json.loads(file.read_text())["cases"]}
show(
    plots.plot_scaling({"cases": [cases["self-attention"], cases["cross-attention"]]}),
    alt="Milliseconds against size, both axes logarithmic. Self-attention over 128 to 4,096 "
    "tokens: NumPy and PyTorch lie on lines with slopes from 1.9 to 2.2. Cross-attention of a "
    "fixed number of queries to 256 to 8,192 inputs: slopes from 1.0 to 1.1.",
)

# %% [markdown]
# ### Is it really the attention that hurts? (optional)
#
# A layer also has its four matrices, $8 L D^2$ operations, linear in L. Attention has $4 L^2 D$
# (all heads together are D wide). They are equal at L = 2D:

# %%
for n in (512, 1024, 4096, 50_176):
    matrices, pairs = 8 * n * 512**2 / 1e9, flops(n, n, 8, 64) / 1e9
    scores = 4 * 8 * n * n / 1e9  # 8 heads, float32
    print(f"L = {n:>6,}: matrices {matrices:>7,.1f} GFLOP, attention {pairs:>8,.1f}, ", end="")
    print(f"scores {scores:>8,.3f} GB")

# %% [markdown]
# At the original transformer's 512 tokens attention was the smaller part.
#
# **Ways round it.** *Sliding windows* ([Mistral 7B](https://arxiv.org/abs/2310.06825)) let a token
# read only the last w tokens: O(L·w); what lies further back must travel through several layers.
# *[Ring attention](https://arxiv.org/abs/2310.01889)* (used by the [Large World
# Model](https://arxiv.org/abs/2402.08268)) keeps all L² pairs and shares them out over many
# machines. *Fused kernels* (module 12) keep all pairs, too, but never write the scores to memory.
# And the *Perceiver* (module 03) lets few queries read many keys: the lower line of the figures.

# %% [markdown]
# ## Break it
#
# A mask can be wrong where nobody looks: in a row that may read *nothing*. Two ways that were in
# public code:
#
# 1. **A finite fill** ([flamingo-pytorch](https://github.com/lucidrains/flamingo-pytorch) and
#    [open-flamingo](https://github.com/mlfoundations/open_flamingo), in some settings): masked
#    scores become a large negative number, and nothing more is done.
# 2. **−∞ and nothing else** ([PyTorch, issue
#    41508](https://github.com/pytorch/pytorch/issues/41508), of 2020).


# %%
def scores_of(q, k, mask, bias, fill):
    return np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + bias, fill)


def finite_fill(q, k, v, mask, bias=0):  # bug 1
    return softmax(scores_of(q, k, mask, bias, -1e9)) @ v


def only_infinity(q, k, v, mask, bias=0):  # bug 2
    e = np.exp(scores_of(q, k, mask, bias, -np.inf))
    return e / e.sum(axis=-1, keepdims=True) @ v


# %% [markdown]
# **Predict, then run:** nobody may read anything. What do the two return for every query, and what
# does the library return? One word for each: `"zeros"`, `"mean"` (of all values) or `"NaN"`. And on
# the causal mask, where every row reads something: does either differ from the library?

# %%
guess("1.d", library=..., bug_1=..., bug_2=..., differ_on_the_causal_mask=...)

# %% tags=["reveal"]
nothing, answers = np.zeros_like(past), {}
with np.errstate(invalid="ignore"):  # NaN without a warning
    for name, attend_with in (("library", attention), ("bug_1", finite_fill),
                              ("bug_2", only_infinity)):  # fmt: skip
        empty = attend_with(q, k, v, nothing)
        mean = np.allclose(empty, v.mean(axis=0))
        answers[name] = "NaN" if np.isnan(empty).any() else "mean" if mean else "zeros"
differ = [not np.allclose(f(q, k, v, past), out) for f in (finite_fill, only_infinity)]
told("1.d", **answers, differ_on_the_causal_mask=any(differ))

# %% [markdown]
# <details><summary>After the run</summary>
#
# Both equal the formula exactly, until a row is empty. Then bug 1 reads *everything*, all of the
# future with it, without a sign. One NaN of bug 2 in one padded row makes *every* gradient of the
# batch NaN, since 0 · NaN is NaN. In a Flamingo such rows are normal: a word before the first
# image.
#
# </details>
#
# ### More bugs (optional)
#
# Three more bugs that were in public code. All run, all give the right shape.
#
# 3. **No scale** ([mlc-llm, pull request 3426](https://github.com/mlc-ai/mlc-llm/pull/3426): a
#    fallback path forgot it).
# 4. **Softmax over the wrong axis** ([llms-from-scratch-rs, pull request
#    30](https://github.com/nerdai/llms-from-scratch-rs/pull/30)).
# 5. **The causal triangle at the wrong corner** ([flash-attention, issue
#    282](https://github.com/Dao-AILab/flash-attention/issues/282), changed in its version 2.1):
#    with fewer queries than keys, query 0 was taken for token 0.


# %%
def no_scale(q, k, v, mask, bias=0):  # bug 3
    return attention(q * np.sqrt(q.shape[-1]), k, v, mask, bias)


def wrong_axis(q, k, v, mask, bias=0):  # bug 4
    scores = scores_of(q, k, mask, bias, -np.inf)
    return softmax(scores.swapaxes(-1, -2)).swapaxes(-1, -2) @ v


def wrong_corner(q, k, v, mask, bias=0):  # bug 5: draws its own triangle
    return attention(q, k, v, mask & np.tri(*mask.shape[-2:], dtype=bool), bias)


# %% [markdown]
# Five checks, none of which needs to know how the function is written. Do the weights *sum* to 1?
# Is the *future* left unread? Does a query that may read nothing, an *empty* row, get 0? Are the
# last two queries answered alike when they ask alone, with the keys *cached*? And is it the
# *formula*?


# %%
def properties(attend):
    later_k, later_v = k.copy(), v.copy()
    later_k[-1] += 1
    later_v[-1] += 1
    before, nothing = attend(q, k, v, past), np.zeros_like(past)
    return {
        "sum": np.allclose(attend(q, k, np.ones_like(v), past), 1),
        "future": np.allclose(attend(q, later_k, later_v, past)[:-1], before[:-1]),
        "empty": np.array_equal(attend(q, k, v, nothing), 0 * v),
        "cached": np.allclose(attend(q[-2:], k, v, past[-2:]), before[-2:]),
        "formula": np.allclose(before, attention_loop(q, k, v, past)),
    }


# %% [markdown]
# **Predict, then run:** which checks catch which bug? For each bug a list of some of `"sum"`,
# `"future"`, `"empty"`, `"cached"` and `"formula"`. And does one check catch all five, `True` or
# `False`?

# %%
guess("1.e", bug_1=..., bug_2=..., bug_3=..., bug_4=..., bug_5=..., one_for_all=...)

# %% tags=["reveal"]
bugs = {"the library": attention, "1 finite fill": finite_fill,
        "2 only infinity": only_infinity, "3 no scale": no_scale, "4 wrong axis": wrong_axis,
        "5 wrong corner": wrong_corner}  # fmt: skip
with np.errstate(invalid="ignore"):  # NaN without a warning
    results = {name: properties(attend) for name, attend in bugs.items()}
print(" " * 17, *(f"{name:^10}" for name in results["the library"]))
for name, passed in results.items():
    print(f"{name:<17}", *(f"{'✓' if ok else '✗':^10}" for ok in passed.values()))
_, *caught = [{name for name, ok in passed.items() if not ok} for passed in results.values()]
by_bug = {f"bug_{i}": names for i, names in enumerate(caught, 1)}
told("1.e", **by_bug, one_for_all=bool(set.intersection(*caught)))

# %% [markdown]
# <details><summary>After the run</summary>
#
# No check catches all. Bug 3 keeps every property that one would think of, and only the comparison
# with the formula finds it. Bug 5 is right in training, where the mask is square, and wrong in use.
#
# </details>
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
# Bugs 3 and 4 ruin a model that was trained without them. Had it been trained *with* them, it would
# have learned something, with a good-looking loss; that is how they stay. The other three do
# nothing at all here, on square masks with no empty row. That is how *they* stay.

# %% [markdown]
# ## Takeaways
#
# - Scores are products of queries and keys, a softmax over the *keys* makes shares, the output is
#   the values in these shares.
# - √K keeps a new head's softmax undecided, whatever its width. It is the *head's* width.
# - A mask acts on the scores. A row without a key is 0 by definition, neither NaN nor an average.
#   With Lq < Lk the causal triangle ends at the lower *right* corner.
# - Encoder, decoder and cross-attention are one formula with other masks and other keys.
# - Heads are split by reshape *and* swapaxes. Check a gradient by central differences, and an
#   attention by several properties: no single check finds all bugs.
# - Self-attention costs O(L²); a fixed number of queries that reads L keys costs O(L).
#
# **In the paper:** sections 2.1 and 2.2 (3.1.1 and 3.1.2 in the first version) of
# [arXiv:2204.14198](https://arxiv.org/abs/2204.14198) build on cross-attention; the formula is
# equation 1 of [Attention Is All You Need](https://arxiv.org/abs/1706.03762). **In the library:**
# the file `miniflamingo/attention.py`, to `MultiHeadAttention`; kernels come in modules 12 and 13.
#
# **Next:** module 02, a transformer block and the tape: what stands around an attention.

# %% [markdown] tags=["notes"]
# ### For the teacher
#
# **Minutes.** 0 the game, the model says *dax*; 3 equations (1) to (4), the shapes, and the numbers
# by hand at the board (let the class compute $o_2$); 10 the loop, exercise 1.1; 18 the trained
# head; 22 guess 1.a; 26 exercises 1.2 and 1.3; 42 guess 1.b; 47 the cost and guess 1.c; 52 guess
# 1.d.
#
# **Predictions.** *1.a:* about 0.25 and nearly 1. Undivided is usually guessed too low: scores with
# a deviation of 32 are hard to imagine. *1.b:* 11, 6 and 5. The usual error is 1 in the encoder
# ("only token 5 changes"); then 5 in the decoder, which forgets that the token reads itself. *1.c:*
# about 4 and 2; small machines give 4.5, where the scores leave the cache. *1.d:* zeros, mean, NaN,
# `False`. Many expect zeros from −1e9: the softmax sees differences only, and equal scores are
# equal shares. *1.e (optional):* see the table that is printed; no check catches all.
#
# **Open questions.** None is left open.
#
# **Misconceptions.** That the weights are similarities: they are shares of a sum of 1, and depend
# on the other keys. That the root is that of D. That a mask may be applied behind the softmax. That
# cross-attention is another formula. That a token always reads itself most.
#
# **To cut.** The figure of the committed measurement, then guess 1.a (tell the result), then the
# encoder figure. Keep the numbers by hand and exercise 1.3.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** All keys of a page are shifted by the same vector c, $k_j + c$. What happens to the output
# of each query?
#
# <details><summary>Answer</summary>
#
# Nothing. Each score of query i changes by the same number, $q_i^\top c / \sqrt{K}$, and a softmax
# sees differences within its row only. (A shift of the *queries* does matter: it changes score j by
# $c^\top k_j / \sqrt{K}$, which differs from key to key.)
#
# </details>
#
# **2.** A text of 4,000 tokens takes 2 seconds in the attention and 1 second in the matrices of a
# layer. About how long will 8,000 tokens take?
#
# <details><summary>Answer</summary>
#
# About 10 seconds: the attention is quadratic, 4 · 2 = 8, the matrices are linear, 2 · 1 = 2.
#
# </details>
#
# **3.** A language model has a brilliant training loss, 0.1 nats a word, and writes nonsense. Which
# line do you look at first, and which test would have found the fault?
#
# <details><summary>Answer</summary>
#
# The mask: if a token can read its successor, it copies it, and the loss is near 0. When writing,
# the successor is not there. Test: change the last token, and assert that no earlier output moves.
#
# </details>
