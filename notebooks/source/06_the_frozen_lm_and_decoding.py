# %% [markdown]
# # 06 The frozen LM and decoding strategies
#
# **The question: a language model gives a distribution of the next word, and nothing else. How does
# text come out of it, without doing everything again for every word, and what does it mean that
# Flamingo's is frozen?**
#
# After this module you can
#
# - write the causal mask, also where a cache holds the past, and test causality;
# - say what a frozen model lets through, and what it keeps, when gradients pass;
# - decode with a key/value cache, show that it changes nothing, and count what it saves;
# - write temperature and top-k (optional: nucleus sampling and beam search);
# - rank given answers by log-likelihood, without favouring the short ones.
#
# **You need:** attention (module 01), a block (module 02); a first look at the model (module 00).
# The layers that Flamingo puts in between come in modules 07 and 08; here they only come along.
#
# **Time:** about 45 minutes for the core path, and 50 for what is marked optional. Computing takes
# about 2 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 5: the picture. 5 to 9: the derivation. 9 to 17: who sees whom, exercise 6.1,
# guess 6.a. 17 to 21: what frozen means. 21 to 28: writing with and without a cache. 28 to 36:
# exercise 6.2. 36 to 46: ranking, exercise 6.5. 46 to 50: the bug and the takeaways.
#
# **Predictions.** 6.a: 1 and 4. Usual: 5 and 5 ("everything depends on everything"), or 0 for the
# last, because no token comes after it: but its own logits change. 6.b: 0 and "yes". Usual: "no",
# because frozen is taken for "no gradient passes". 6.c: 10 and 88. Usual: 11 (the last word is
# read, too), and 52, the sum of 3 to 10, from a decoder that has no fixed buffer. 6.d: 3 words, t =
# 3. Usual: 2 words, because 0.36 + 0.23 is near 0.7. 6.e: "a", and "a large red circle". Usual: the
# whole caption twice, since each of its words is almost certain. 6.f: "no" and "yes". Usual: "no"
# twice, because only distances count in ALiBi; the empty place that is seen is overlooked. 6.g: 2,
# 1, 1 and 0.
#
# **Open questions.** none.
#
# **Misconceptions.** "The logits at a token are about that token": they are about the next one. "A
# cache is an approximation": it changes nothing but the work (and the rounding). "Frozen layers
# stop gradients": they have none of their own, and pass them on. "A low temperature makes a model
# more truthful": it only makes it choose what it holds likeliest more often.
#
# **To cut.** First guess 6.a's second number, then the library's `Decoder.extend`, then exercise
# 6.2 (show the solution). Keep ranking: module 10 needs it.

# %% [markdown]
# ## The picture and the letters
#
# A decoder-only language model (LM) reads a row of tokens, and at each of them says what the next
# one may be. A token sees those before it and itself, never a later one. In ours, each head also
# pays less attention to what is far away, by a slope of its own. Dark is seen in full:

# %%
import copy
from unittest.mock import patch

import numpy as np

from miniflamingo import decoding, plots
from miniflamingo.autograd import Tape
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.language import LanguageModel
from miniflamingo.prompt import BOS, EOC, IMAGE, build_batch
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds import shapes
from miniflamingo.worlds.grammar import TOKENIZER

# %%
model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
lm = model.lm
tokens = np.array([[BOS, *TOKENIZER.encode("a large red circle")]])  # [B, L]
words = [TOKENIZER.words[i] for i in tokens[0]]
bias = lm.causality(np.arange(5)[None], 5)[0]  # [H, L, L]
titles = [f"head {h}, slope {slope:g}" for h, slope in enumerate(lm.config.alibi_slopes)]
show(
    plots.plot_sight(words, np.exp(bias), titles),
    alt="Four triangles, one for each head, of 5 tokens that look at 5 tokens. Nothing is seen "
    "above the diagonal. With slope 1 a token sees itself and hardly anything before; with 1/4 and "
    "1/16 ever more; with slope 0 all earlier tokens in full.",
)

# %% [markdown]
# | letter | meaning | here | in the paper's 3B model |
# |---|---|---|---|
# | L, Lk | tokens that ask, keys that are asked | a few dozen | |
# | D, H | width, heads | 64, 4 | 2,048, 16 |
# | V | tokens in the vocabulary | 68 | |
# | $z$ | logits: one number for each of the V tokens | | |
# | $L_{new}$ | tokens that are written | | |
# | W | beams (optional) | 3 | 3 |
# | A | answers that are ranked, the candidates | | |

# %% [markdown]
# ## The derivation
#
# The probability of a text is a product, and its logarithm a sum:
#
# $$\log p(y) = \sum_{\ell} \log p(y_\ell \mid y_{\lt \ell}) = \sum_{\ell} \log
# \mathrm{softmax}(z_{\ell - 1})_{y_\ell} \qquad\qquad (1)$$
#
# where $z_{\ell-1}$ are the logits *at* token $\ell - 1$: they speak of the next one. For this to
# be a probability, $z_{\ell-1}$ must not depend on $y_\ell$ or anything later. Hence, in every
# layer,
#
# $$s_{\ell j} = \frac{q_\ell^\top k_j}{\sqrt{K}} + \begin{cases} - \mathrm{slope}_h \,
# (\ell - j) & j \le \ell \\ - \infty & j \gt \ell \end{cases} \qquad\qquad (2)$$
#
# with the slope of head h ([ALiBi](https://arxiv.org/abs/2108.12409); the paper's LM,
# [Chinchilla](https://arxiv.org/abs/2203.15556), uses relative positions of another kind). A
# penalty on distance is defined at distances that were never trained, too.
#
# **Choosing.** The temperature t makes a distribution sharper (t < 1) or flatter (t > 1); then a
# set of words may be kept, and their probabilities are divided by their sum, so that they sum to 1:
#
# $$p_v = \frac{e^{z_v / t}}{\sum_u e^{z_u / t}}, \qquad
# \tilde p_v = \frac{p_v \, [v \in \mathrm{kept}]}{\sum_{u \in \mathrm{kept}} p_u}
# \qquad\qquad (3)$$
#
# *Greedy* keeps the one likeliest word, [*top-k*](https://arxiv.org/abs/1805.04833) the k
# likeliest. The [*nucleus*](https://arxiv.org/abs/1904.09751) keeps the fewest of the likeliest
# whose probabilities reach a given p, so that few are kept where the model is sure and many where
# it is not.
#
# **Frozen.** A frozen layer y = f(x; θ) has no dθ, but it does have a dx:
#
# $$dx = \Big( \frac{\partial f}{\partial x} \Big)^{\top} dy, \qquad d\theta \text{ is never
# formed} \qquad\qquad (4)$$

# %% [markdown]
# ## Who sees whom
#
# Equation (2) with loops, without a cache:


# %%
def bias_loop(L, slope):  # -> [L, L]
    bias = np.full((L, L), -np.inf)
    for l in range(L):
        for j in range(l + 1):
            bias[l, j] = -slope * (l - j)  # equation (2)
    return bias


assert np.array_equal(bias_loop(5, 1 / 4), bias[1])

# %% [markdown]
# While it decodes, a model computes only its newest tokens; the keys of the past lie in a cache of
# fixed size, whose later places are still empty. Then token and key have different axes, and it is
# the token's *position* that decides.
#
# ### Exercise 6.1: sight with a cache
#
# ★☆☆ · 4 minutes · 1 line. `positions` int [B, L] says where each new token stands, `num_keys` how
# many places the cache has. Return bool [B, L, Lk]: may the token see the key at place j?
#
# <details><summary>Hint 1</summary>
#
# Compare `positions[:, :, None]`, [B, L, 1], with `np.arange(num_keys)`. A token sees itself.
#
# </details>


# %% tags=["exercise"]
def sight(positions, num_keys):  # int[B, L], int -> bool[B, L, Lk]
    ...  # your code


# %% tags=["solution"]
def sight(positions, num_keys):  # int[B, L], int -> bool[B, L, Lk]
    return positions[:, :, None] >= np.arange(num_keys)


# %%
check("6.1", sight)

# %%
source(LanguageModel.causality)

# %% [markdown]
# **Predict, then run:** we replace the last of five tokens. At how many of the five places do the
# LM's logits change? And if we replace the second? (Two numbers.)

# %%
guess("6.a", last=..., second=...)

# %% tags=["reveal"]
places = {}  # the token that is replaced -> where the logits change
for place in (4, 1):
    other = tokens.copy()
    other[0, place] = TOKENIZER.ids["blue"]
    places[place] = np.flatnonzero((lm(other) != lm(tokens)).any(axis=-1)[0])
    print(f"token {place} replaced: logits change at {places[place]}")
told("6.a", last=len(places[4]), second=len(places[1]))

# %% [markdown]
# ## What frozen means
#
# Flamingo's LM has `requires_grad = False` in every parameter.
#
# **Predict, then run:** we run a training step's backward pass through the whole model. How many of
# the LM's 27 parameters get a gradient (a number)? And do the gates of the *first* inserted layer
# get one, though three frozen blocks lie between them and the loss ("yes" or "no")?

# %%
guess("6.b", lm_parameters=..., first_gates=...)


# %%
def draw(colour, shape, seed=0):  # -> [24, 24, 3]
    classes = shapes.COLOURS.index(colour), shapes.SHAPES.index(shape), 1
    rng = np.random.default_rng(seed)
    return shapes.draw_objects(*(np.array([c]) for c in classes), rng, split="test")[0]


circle = draw("red", "circle", seed=1)
batch = build_batch([[circle, "a large red circle"]], TOKENIZER, 24)
with Tape() as tape:
    logits = model(**batch.inputs())
tape.backward(logits, np.ones_like(logits.data))
graded = {name for name, p in model.named_parameters() if p.grad is not None}
model.zero_grad()

# %% tags=["reveal"]
for part in ("lm.", "vision_encoder.", "gated_xattn.0.", "resampler."):
    own = [name for name, _ in model.named_parameters() if name.startswith(part)]
    print(f"{part:<16}{len(own):>4} parameters, {len(graded & set(own)):>3} with a gradient")
gates = {"gated_xattn.0.alpha_xattn", "gated_xattn.0.alpha_dense"}
reached = "yes" if gates <= graded else "no"
told("6.b", lm_parameters=sum(g.startswith("lm.") for g in graded), first_gates=reached)

# %% [markdown]
# <details><summary>After the run</summary>
#
# Layers that sit *between* frozen blocks learn through them, by the dx of equation (4). So "frozen"
# saves the gradients, the optimiser's moments and about half of the backward arithmetic
# (the products for dθ, not those for dx), but not the way back through the blocks.
#
# </details>
#
# What freezing *buys* is something else: what the LM knew cannot be trained away. In the paper
# ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198), table of ablations), to fine-tune it lowers
# the overall score from 70.7 to 62.7, and to train it from scratch, to 57.8.

# %% [markdown]
# ## Writing, with and without a cache
#
# The simplest decoder reads everything again for every word:


# %%
def write_again(tokens, more):  # int[1, L] -> int[1, L + more], greedily
    for _ in range(more):
        logits = lm(tokens)[:, -1]  # all of it, for one row
        tokens = np.concatenate([tokens, logits.argmax(axis=-1)[:, None]], axis=1)
    return tokens


# %% [markdown]
# But by (2) nothing about an old token changes when a new one comes: not its keys, not its values,
# in no layer. Keep them, and each new word costs one row. The new token must know its *position*,
# or it would be token 0.

# %%
from miniflamingo.attention import KeyValueCache


def new_cache(length):
    c = lm.config
    shape = 1, length, c.heads, c.dim // c.heads, np.float32
    return [KeyValueCache(*shape) for _ in range(c.depth)]


# %%
def write_cached(tokens, more, shift=0):  # shift is for later
    L, cache = tokens.shape[1], new_cache(tokens.shape[1] + more)
    logits = lm(tokens, np.arange(L)[None], cache)[:, -1]
    for i in range(more):
        new = logits.argmax(axis=-1)[:, None]
        tokens = np.concatenate([tokens, new], axis=1)
        if i < more - 1:  # the last word is not read any more
            logits = lm(new, np.array([[L + i + shift]]), cache)[:, -1]
    return tokens


# %%
text = "red circle dax <EOC> blue bar wug <EOC> red circle"
prompt = np.array([[BOS, *TOKENIZER.encode(text)]])
again, cached = write_again(prompt, 6), write_cached(prompt, 6)
assert np.array_equal(again, cached)
print(TOKENIZER.decode(cached[0, prompt.shape[1] :]))

# %% [markdown]
# The library's `Decoder` does the same for the whole Flamingo and for rows of different lengths,
# and keeps the images' projected keys and values, too:

# %%
source(decoding.Decoder.extend)

# %% [markdown]
# **Predict, then run:** a prompt of L = 3 tokens, $L_{new}$ = 8 words written. How many rows of
# tokens go through the LM's blocks with a cache? And without, where the library's decoder reads its
# whole buffer of $L + L_{new}$ places at each of its $L_{new}$ calls? (Two numbers. The last word
# is not read any more.)

# %%
guess("6.c", with_cache=..., without=...)


# %%
def rows_read(cached, more=8):
    rows, forward = [], type(lm.blocks[0]).forward

    def record(block, x, *rest):
        rows.append(x.shape[1])
        return forward(block, x, *rest)

    one = build_batch([[circle, "a"]], TOKENIZER, 24, close=False)
    with patch.object(type(lm.blocks[0]), "forward", record):
        decoder = decoding.Decoder(model, one, more, cached)
        for _ in range(more - 1):
            decoder.extend(decoding.greedy(decoder.logits)[:, None])
    return sum(rows) // len(lm.blocks), decoder


# %% tags=["reveal"]
(with_cache, a), (without, b) = (rows_read(cached) for cached in (True, False))
assert np.array_equal(a.tokens, b.tokens) and np.allclose(a.logits, b.logits, atol=1e-4)
told("6.c", with_cache=with_cache, without=without)

# %% [markdown]
# <details><summary>After the run</summary>
#
# $L + L_{new} - 1$ against $L_{new} (L + L_{new})$: linear against quadratic.
#
# </details>
#
# The tokens agree, and the logits up to rounding: a product of one row adds up in another order
# than one of many.

# %% [markdown]
# ## Choosing a word
#
# After "a large red circle" the text may end, go on, turn to a question, or move. Four words share
# nearly everything:

# %%
logits = lm(tokens)[0, -1].astype(np.float64)  # [V]
shown = ["and", "<EOC>", "what", "moving"]
ids = [TOKENIZER.ids[word] for word in shown]


def bars(p):  # [V] -> the four words, and the sum of the 64 others
    return np.append(p[ids], np.delete(p, ids).sum())


print("the four:", np.round(softmax(logits)[ids], 2))

# %% [markdown]
# ### Exercise 6.2: temperature and top-k
#
# ★★☆ · 7 minutes · 3 or 4 lines. From logits [B, V], return the probabilities [B, V] of equation
# (3), with temperature t, among the k likeliest of each row. Nothing is equal in the test.
#
# <details><summary>Hint 1</summary>
#
# `np.sort(logits, axis=-1)[:, -k]` is the k-th largest logit of each row.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Put $-\infty$ in the place of the smaller ones, then `softmax(... / t)`: it shares out anew.
#
# </details>


# %% tags=["exercise"]
def top_k(logits, k, t):  # [B, V], int, float -> [B, V]
    ...  # your code


# %% tags=["solution"]
def top_k(logits, k, t):  # [B, V], int, float -> [B, V]
    least = np.sort(logits, axis=-1)[:, -k, None]  # [B, 1]
    return softmax(np.where(logits >= least, logits, -np.inf) / t)  # equation (3)


# %%
check("6.2", top_k)

# %% [markdown]
# ### Exercise 6.3: draw from the nucleus (optional)
#
# ★★★ · 13 minutes · 7 to 10 lines. Draw a word for each row from its nucleus. Return two things.
# First the probabilities [B, V] among the *fewest* of the likeliest words of each row whose
# probabilities reach p; the word with which p is reached belongs to them. Then a word for each row,
# int [B], drawn with the uniform numbers `u` [B], 0 ≤ u < 1: lay the row's probabilities side by
# side, in the vocabulary's order, and take the first word whose end lies *beyond* u.
#
# <details><summary>Hint 1</summary>
#
# `np.argsort(-q, axis=-1)` gives the order of each row downwards, and `np.take_along_axis` follows
# it.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A word is kept if what stands *before* it has not reached p: `cumsum - own < p`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Back to the vocabulary's order: `np.put_along_axis(kept, order, values, -1)` into zeros.
#
# </details>
# <details><summary>Hint 4</summary>
#
# The ends are a running sum. The number of ends that are not beyond u is the number of the word;
# so a word of probability 0 is never drawn, not even at u = 0.
#
# </details>


# %% tags=["exercise"]
def nucleus(logits, p, u):  # [B, V], float, [B] -> [B, V], int[B]
    ...  # your code


# %% tags=["solution"]
def nucleus(logits, p, u):  # [B, V], float, [B] -> [B, V], int[B]
    q = softmax(logits)
    order = np.argsort(-q, axis=-1)
    ranked = np.take_along_axis(q, order, axis=-1)
    ranked = ranked * (np.cumsum(ranked, axis=-1) - ranked < p)
    kept = np.zeros_like(q)
    np.put_along_axis(kept, order, ranked, axis=-1)
    kept = kept / kept.sum(axis=-1, keepdims=True)  # equation (3)
    ends = np.cumsum(kept, axis=-1)
    return kept, (ends <= u[:, None]).sum(axis=-1)


# %%
check("6.3", nucleus)

# %% [markdown]
# The library returns no distribution but draws from it, with one uniform number a row of its own.
# To compare, we hand it 4,000 equal rows and count:

# %%
source(decoding.nucleus)

# %%
from miniflamingo.course.checks.module_06 import nucleus_of, probabilities_of

one, V = logits[None], len(logits)
panels = {
    "softmax": (softmax(one), decoding.temperature(1)),
    "t = 0.5": (probabilities_of(one, V, 0.5), decoding.temperature(0.5)),
    "t = 3": (probabilities_of(one, V, 3), decoding.temperature(3)),
    "top-k, k = 2": (probabilities_of(one, 2, 1), decoding.top_k(2)),
    "nucleus, p = 0.7": (nucleus_of(one, 0.7), decoding.nucleus(0.7)),
}

# %%
for title, (p, choose) in panels.items():
    words_drawn = choose(np.tile(logits, (4000, 1)), np.random.default_rng(0))
    share = np.bincount(words_drawn, minlength=V) / 4000
    assert not share[p[0] == 0].any() and abs(share - p[0]).max() < 0.03, title

# %% [markdown]
# **Predict, then run:** the four have 0.36, 0.23, 0.21 and 0.19. How many words does a nucleus of
# p = 0.7 keep (a number)? Which of the five panels gives the 64 other words the largest share (its
# name, as a word in quotes, as it stands above)?

# %%
guess("6.d", kept=..., panel=...)

# %% tags=["reveal"]
others = {title: bars(p[0])[-1] for title, (p, _) in panels.items()}
kept = np.count_nonzero(panels["nucleus, p = 0.7"][0])
told("6.d", kept=kept, panel=max(others, key=others.get))

# %% tags=["reveal"]
show(
    plots.plot_distributions(
        [*shown, "64 others"], {title: bars(p[0]) for title, (p, _) in panels.items()}
    ),
    alt="Five bar charts of the probabilities of and, EOC, what, moving and of the 64 others "
    "together: softmax, temperatures 0.5 and 3, top-k with k = 2, and nucleus with p = 0.7.",
)

# %% [markdown]
# ## Beam search (optional)
#
# The likeliest *text* need not begin with the likeliest *word*. Beam search keeps the W likeliest
# beginnings: each of them tries all V words, and of the W · V ways to go on the best W stay.
#
# ### Exercise 6.4: beam search (optional)
#
# ★★★ · 18 minutes · 9 to 14 lines. Write the whole search. `logp_of(texts)` is a language model:
# for texts int [B, n], all of one length n, also n = 0, it returns the log-probabilities of the
# next word, [B, V]. Return (texts int [W, most], scores [W]), best first: the W likeliest texts of
# `most` words that the search finds, and their log-probabilities. A text that has written `eoc` is
# finished: it stays in the beam, nothing but `eoc` may follow, and each further `eoc` costs
# nothing.
#
# <details><summary>Hint 1</summary>
#
# Begin with one empty text, `np.zeros((1, 0), int)`, and the score 0. Then `most` times: score all
# W · V ways to go on, `(scores[:, None] + logp).ravel()`, and keep the W best.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.divmod(best, V)` splits the places of the flat array into beam and word. The text of a new
# beam is `texts[beam]` with the word behind it.
#
# </details>
# <details><summary>Hint 3</summary>
#
# For the rows whose last word is `eoc`, set `logp` to −∞, and then `logp[row, eoc]` to 0.
#
# </details>


# %% tags=["exercise"]
def beam_search(logp_of, W, eoc, most):  # -> int[W, most], [W]
    ...  # your code


# %% tags=["solution"]
def beam_search(logp_of, W, eoc, most):  # -> int[W, most], [W]
    texts, scores = np.zeros((1, 0), int), np.zeros(1)
    for _ in range(most):
        logp = logp_of(texts)  # [beams, V]
        ended = (texts[:, -1:] == eoc).any(axis=1)
        logp[ended] = -np.inf
        logp[ended, eoc] = 0
        total = (scores[:, None] + logp).ravel()  # equation (1): a sum of logarithms
        best = np.argsort(-total)[:W]
        beam, word = np.divmod(best, logp.shape[1])
        texts = np.concatenate([texts[beam], word[:, None]], axis=1)
        scores = total[best]
    return texts, scores


# %%
check("6.4", beam_search)

# %% [markdown]
# A picture with nothing on it but noise, so that the model has to guess, and the tree of three
# beams, by hand. At each step we also show the best that was dropped.

# %%
from miniflamingo.course.checks.module_06 import step_of_beam

empty = shapes.background(12, np.random.default_rng(5))[11].clip(0, 1)
asked = build_batch([[empty]], TOKENIZER, 24, close=False)
decoder = decoding.Decoder(model, asked, 8)
decoder.select(np.zeros(3, int))
scores, steps, texts = np.array([0.0, -np.inf, -np.inf]), [], [""] * 3

# %%
for _ in range(4):
    logp = log_softmax(decoder.allowed_logits().astype(np.float64))
    ways = step_of_beam(scores, logp, most=5)  # the three that stay, and two more
    total = [scores[beam] + logp[beam, word] for beam, word in ways]
    steps.append([
        (beam, TOKENIZER.words[word], x, i < 3)
        for i, ((beam, word), x) in enumerate(zip(ways, total)) if x > -12
    ])  # fmt: skip
    texts = [f"{texts[beam]} {TOKENIZER.words[word]}" for beam, word in ways[:3]]
    scores = np.array(total[:3])
    decoder.select(ways[:3, 0])
    decoder.extend(ways[:3, 1:])

# %%
show(
    plots.plot_beam("<image>", steps),
    alt="The tree of a beam search of width 3 over four steps. From the image tag: a, this, what. "
    "'a small' is far ahead, then come colours: purple, -1.46, before cyan, -1.52; at the fourth "
    "step 'cyan ring', -1.56, has overtaken 'purple ring', -1.62. Dropped words are grey, with "
    "dotted lines.",
)
print("best by hand:", texts[0], f"{scores[0]:.2f}")
for width in (1, 3):
    [(ids_, score)] = decoding.beam_search(model, asked, 8, width)
    print(f"library, width {width}: {TOKENIZER.decode(ids_)}, {score:.2f}")

# %% [markdown]
# Width 1 is greedy: it took the likelier colour and could not go back. The library's score counts
# the closing `<EOC>`, too, which is almost certain here. The paper decodes captions with W = 3 and
# stops at the first `<EOC>`.

# %% [markdown]
# ## Ranking given answers
#
# A question with a known list of answers is better *ranked*: which candidate has the highest
# log-likelihood (1)? The prompt's last logits speak of the candidate's first token, the logits at
# its first token of the second, and so on.
#
# ### Exercise 6.5: log-likelihood
#
# ★★★ · 9 minutes · 4 to 6 lines. `first` [V] are the logits behind the prompt, `logits` [A, L, V]
# those behind each token of the candidates `tokens` int [A, L], which are padded: only the first
# `lengths[a]` count. Return [A].
#
# <details><summary>Hint 1</summary>
#
# Put `first` in front of `logits[:, :-1]`: then place i speaks of token i.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.take_along_axis(logp, tokens[..., None], -1)[..., 0]` picks each token's own; mask those at
# or beyond the length with 0, and sum.
#
# </details>


# %% tags=["exercise"]
def likelihood(first, logits, tokens, lengths):  # [V], [A, L, V], int[A, L], int[A] -> [A]
    ...  # your code


# %% tags=["solution"]
def likelihood(first, logits, tokens, lengths):  # [V], [A, L, V], int[A, L], int[A] -> [A]
    A, L, V = logits.shape
    before = np.concatenate([np.broadcast_to(first, (A, 1, V)), logits[:, :-1]], axis=1)
    logp = np.take_along_axis(log_softmax(before), tokens[..., None], axis=-1)[..., 0]
    counted = np.arange(L) < lengths[:, None]
    return (logp * counted).sum(axis=1)  # equation (1)


# %%
check("6.5", likelihood)

# %%
source(decoding.log_likelihood)

# %% [markdown]
# ## Break it
#
# Bug 1: **length bias**, candidates that are ranked without their `<EOC>`.
#
# Three candidates for the picture of the large red circle: "a", "a large red" and "a large
# red circle".
#
# **Predict, then run:** which one wins without `<EOC>`, which with it? (Its text, in quotes.)

# %%
guess("6.e", without=..., with_eoc=...)

# %% tags=["reveal"]
one = build_batch([[circle]], TOKENIZER, 24, close=False)
candidates, winners = ["a", "a large red", "a large red circle"], []
for end in ([], [EOC]):
    ranked = [TOKENIZER.encode(text) + end for text in candidates]
    likely = decoding.log_likelihood(model, one, ranked)[0]
    print(f"end {end}:", ", ".join(f"{t} {x:.2f}" for t, x in zip(candidates, likely)))
    winners.append(candidates[int(likely.argmax())])
told("6.e", without=winners[0], with_eoc=winners[1])

# %% [markdown]
# <details><summary>After the run</summary>
#
# A text can never be likelier than its own beginning, since every further factor of (1) is at most
# 1. With `<EOC>` a candidate must also *end* there. (Dividing by the length is the other common
# cure; it favours long ones whose last words are foregone.)
#
# </details>
#
# ### More bugs (optional)
#
# 2. **Cache positions off by one.** The new token is told that it stands one place further on.
# 3. **One row's `<image>` takes the images of the others**
#    ([open-flamingo](https://github.com/mlfoundations/open_flamingo)). While a batch is being
#    decoded, one row writes `<image>`; φ is then counted again from the new tokens alone.
# 4. **Visual keys and values again for every token**
#    ([IDEFICS](https://huggingface.co/blog/idefics)): right, but slow.
#
# **Predict, then run:** bug 2 moves *all* later tokens by one. Distances between them are the same.
# Does the text that is written change? And do the logits, by more than rounding? (Each "yes" or
# "no".)

# %%
guess("6.f", text=..., logits=...)

# %% tags=["reveal"]
written = [
    TOKENIZER.decode(write_cached(prompt, 6, shift)[0, prompt.shape[1] :]) for shift in (0, 1)
]
print(f"shift 0: {written[0]}\nshift 1: {written[1]}")
L, cache = prompt.shape[1], new_cache(prompt.shape[1] + 3)
lm(prompt, np.arange(L)[None], cache)
new = np.array([[TOKENIZER.ids["dax"]]])
right, wrong = (lm(new, np.array([[L + shift]]), copy.deepcopy(cache)) for shift in (0, 1))
moved = abs(right - wrong).max()
print(f"largest change of a logit: {moved:.1f}")
yes = {True: "yes", False: "no"}
told("6.f", text=yes[written[0] != written[1]], logits=yes[bool(moved > 1e-3)])

# %% [markdown]
# <details><summary>After the run</summary>
#
# The text happens to stay, and yet the logits are others, and not by the distance alone: place L of
# the cache stays empty, a key of zeros, and by (2) it is *seen*. Its score is 0 minus the slope, as
# good as many a real one. So do not judge by the text: compare logits with the uncached decoder's,
# token by token.
#
# </details>
#
# The check of exercise 6.1 says this to the same mistake in the mask:

# %%
print(check("6.1", lambda positions, n: positions[:, :, None] + 1 >= np.arange(n)).message)

# %% [markdown]
# Bug 3. Row 0 shows a circle and a bar and is about to write its second `<image>`; row 1 has one
# picture and is about to write "large", on the way to a colour.

# %%
bar = draw("blue", "bar", seed=2)
rows = build_batch([[circle, "this dax", bar], [bar, "a"]], TOKENIZER, 24, close=False)
rows.tokens, rows.lengths = rows.tokens[:, :-1], np.array([5, 3])  # the second <image> is to come
decoder = decoding.Decoder(model, rows, 1)
new = np.array([[IMAGE], [TOKENIZER.ids["large"]]])
so_far = (rows.tokens == IMAGE).sum(axis=1, keepdims=True)


# %%
def phi_of(new, so_far):  # right: each row counts its own
    return so_far + np.cumsum(new == IMAGE, axis=1)


def phi_again(new, so_far):  # bug 3: an <image> anywhere starts the count again, everywhere
    return np.cumsum(new == IMAGE, axis=1) if (new == IMAGE).any() else so_far + 0 * new


# %% [markdown]
# **Predict, then run:** what are the four values of φ, two rows by two functions? (Four numbers.)

# %%
guess("6.g", right_row_0=..., right_row_1=..., bug_row_0=..., bug_row_1=...)

# %% tags=["reveal"]
colours = ["blue", "red", "green"]
ids_of = [TOKENIZER.ids[c] for c in colours]
for name, count in (("right", phi_of), ("bug 3", phi_again)):
    phi, cache = count(new, so_far), copy.deepcopy(decoder.cache)
    p = softmax(model.read(new, None, phi, cache, decoder.lengths[:, None])[1, -1].astype(float))
    print(f"{name}: phi = {phi.ravel()}; row 1 goes on", end="")
    print("".join(f"  {c} {x:.2f}" for c, x in zip(colours, p[ids_of])))
r, b = phi_of(new, so_far).ravel(), phi_again(new, so_far).ravel()
told("6.g", right_row_0=r[0], right_row_1=r[1], bug_row_0=b[0], bug_row_1=b[1])

# %% [markdown]
# <details><summary>After the run</summary>
#
# Row 1 has become blind for this token because of something that its *neighbour* wrote, and row 0
# looks at its first picture again.
#
# </details>
#
# Which check catches it? Decode each row alone and in a batch: they must agree. A batch of one
# never shows it.
#
# Bug 4, counted for the 3B model with 32 images of 64 visual tokens: the arithmetic of one new
# token, and of projecting the images' keys and values in all 24 layers.

# %%
from miniflamingo.flamingo import PRESETS, count_parameters

c = PRESETS["3B"]
I, counts = c.xattn_heads * c.xattn_head_dim, count_parameters(c)
layers = len(range(0, c.lm.depth, c.xattn_every))
media = layers * 2 * c.media_dim * I  # the numbers of all k and v projections
token = 2 * (counts["lm"] + counts["gated_xattn"] - media)  # a multiply and an add for each
print(f"one token: {token / 1e9:.0f} GFLOP; all images' k and v: {2 * media * 32 * 64 / 1e9:.0f}")

# %% [markdown]
# More than a hundred times the token itself, every time, for numbers that never change. The
# library projects them once (`DecodingCache.of`).

# %% [markdown]
# ## The fused view (optional)
#
# With a cache, one new token of one row is one query: no matrix is large enough to fill a GPU, and
# the time goes into reading weights and cache. The kernel for Flamingo's part,
# `kernels/decode_attention.py`, therefore has one program for each row and head. It reads φ *on the
# device*, then the R keys and values of that one image: H·K·(2R + 2) numbers a row, whatever N is,
# where a dense mask over all images reads 2·N·R·H·K. For H·K = 2,048, R = 64 and N = 32 that is:

# %%
one_image, all_images = 2048 * (2 * 64 + 2), 2 * 32 * 64 * 2048
print(f"{one_image:,} numbers against {all_images:,}: {all_images / one_image:.0f} times")

# %% [markdown]
# ## Takeaways
#
# - The logits at a token speak of the next one; a key is visible if its place is not beyond the
#   token's position, with a cache and without.
# - Frozen means: no gradient *of* the weights, but one *through* them.
# - A cache changes nothing but the work, which is linear instead of quadratic. Check it on the
#   logits.
# - Temperature reshapes, top-k (and the nucleus) cut and share out anew; a beam compares whole
#   texts.
# - Rank with `<EOC>`, or every beginning beats its own completion.
# - Rows of a batch must not know of one another (optional bug 3). Test with more than one.
#
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.2 (3.1.2 in its
# first version) on the frozen LM; the appendix on evaluation, for beam search of width 3 and
# ranking. **In the library:** `miniflamingo/language.py`, `miniflamingo/decoding.py`.
#
# **Next:** module 07, φ and image-causal masking: what the inserted layers may look at.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** A cache was filled with a prompt of 10 tokens. By mistake the first new token gets position
# 0. Which keys does it see, and would the program stop with an error?
#
# <details><summary>Answer</summary>
#
# It sees the key at place 0 alone, which its own key has just overwritten: so it sees itself and
# nothing of the prompt. All shapes are right, so nothing stops. The logits differ from those of the
# uncached decoder, and that comparison finds it.
#
# </details>
#
# **2.** Someone freezes the LM by cutting the gradient at its input, so that nothing flows back
# through its blocks. Which of Flamingo's three inserted layers (one before each of three blocks)
# still learn?
#
# <details><summary>Answer</summary>
#
# None of them: behind the last inserted layer there is still a frozen block between it and the
# loss, and the gradient must come back through that block. Frozen means no dθ; dx is needed.
#
# </details>
#
# **3.** A ranked question has the candidates "yes", "no" and "not at all", scored by their summed
# log-likelihood without `<EOC>`. Which of them can never win, whatever the picture shows, if "no"
# and "not" are different words? And if the tokenizer splits "not at all" into "no", "t", "at",
# "all"?
#
# <details><summary>Answer</summary>
#
# With different first words any of the three can win, though the longer one has three factors of at
# most 1. With the other tokenizer "no" is a beginning of the third candidate, which then can never
# score higher than "no". With `<EOC>` each candidate has to end, and the beginning loses its
# advantage.
#
# </details>
