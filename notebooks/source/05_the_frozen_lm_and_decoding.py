# %% [markdown]
# # 05 The frozen LM and decoding strategies
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
# - write temperature, top-k, nucleus sampling and a step of beam search;
# - rank given answers by log-likelihood, without favouring the short ones.
#
# **You need:** attention (module 01); a first look at the model (module 00). The layers that
# Flamingo puts in between come in modules 06 and 07; here they only come along.
#
# **Time:** about 49 minutes: 11 to read (2,230 words, 200 a minute) and 38 for five exercises.
# Computing takes about 2 seconds of one core.

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
from miniflamingo.course import check, show, source
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
titles = [f"head {h}, slope {s:g}" for h, s in enumerate(lm.config.alibi_slopes)]
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
# | M | tokens that are written | | |
# | W | beams | 3 | 3 |
# | C | candidates that are ranked | | |

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
# $$\text{score}_{\ell j} = \frac{q_\ell^\top k_j}{\sqrt{K}} + \begin{cases} - s \, (\ell - j)
# & j \le \ell \\ - \infty & j \gt \ell \end{cases} \qquad\qquad (2)$$
#
# with the head's slope s (ALiBi; the paper's LM, Chinchilla, uses relative positions of another
# kind). A penalty on distance goes on working at distances that were never trained.
#
# **Choosing.** The temperature t makes a distribution sharper or flatter; then a set S of words may
# be chosen, and the rest is shared out anew:
#
# $$p_v = \frac{e^{z_v / t}}{\sum_u e^{z_u / t}}, \qquad
# \tilde p_v = \frac{p_v \, [v \in S]}{\sum_{u \in S} p_u} \qquad\qquad (3)$$
#
# *Greedy*: S is the one likeliest word. *Top-k*: the k likeliest. *Nucleus*: the fewest of the
# likeliest whose probabilities reach a given p, so that S is small where the model is sure and
# large where it is not.
#
# **Frozen.** A frozen layer y = f(x; θ) has no dθ, but it does have a dx:
#
# $$dx = \Big( \frac{\partial f}{\partial x} \Big)^{\top} dy, \qquad d\theta \text{ is never
# formed} \qquad\qquad (4)$$
#
# Layers that sit *between* frozen blocks learn through them.

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
# ### Exercise 5.1: sight with a cache
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
check("5.1", sight)

# %%
source(LanguageModel.causality)

# %% [markdown]
# **Predict, then run:** we replace the last of five tokens. At how many of the five places do the
# LM's logits change? And if we replace the second?

# %%
for place in (4, 1):
    other = tokens.copy()
    other[0, place] = TOKENIZER.ids["blue"]
    changed = (lm(other) != lm(tokens)).any(axis=-1)[0]
    print(f"token {place} replaced: logits change at {np.flatnonzero(changed)}")

# %% [markdown]
# ## What frozen means
#
# Flamingo's LM has `requires_grad = False` in every parameter. **Predict, then run:** we run a
# training step's backward pass through the whole model. How many of the LM's parameters get a
# gradient? And do the gates of the *first* inserted layer get one, though three frozen blocks lie
# between them and the loss?


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
for part in ("lm.", "vision_encoder.", "gated_xattn.0.", "resampler."):
    own = [name for name, _ in model.named_parameters() if name.startswith(part)]
    print(f"{part:<16}{len(own):>4} parameters, {len(graded & set(own)):>3} with a gradient")
model.zero_grad()

# %% [markdown]
# So "frozen" saves the gradients, the optimiser's moments and about half of the backward arithmetic
# (the products for dθ, not those for dx), but not the way back through the blocks. What it *buys*
# is something else: what the LM knew cannot be trained away. In the paper, to fine-tune it lowers
# the overall score from 70.7 to 62.7, and to train it from scratch, to 57.8.

# %% [markdown]
# ## Writing, with and without a cache
#
# The simplest decoder reads everything again for every word:


# %%
def write_again(tokens, M):  # int[1, L], M words more, greedily
    for _ in range(M):
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
def write_cached(tokens, M, shift=0):  # shift is for later
    L, cache = tokens.shape[1], new_cache(tokens.shape[1] + M)
    logits = lm(tokens, np.arange(L)[None], cache)[:, -1]
    for i in range(M):
        new = logits.argmax(axis=-1)[:, None]
        tokens = np.concatenate([tokens, new], axis=1)
        if i < M - 1:  # the last word is not read any more
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
# **Predict, then run:** a prompt of L = 3 tokens, M = 8 words written. How many rows of tokens go
# through the LM's blocks with a cache? And without, where the library's decoder reads its whole
# buffer of L + M places at each of its M calls?


# %%
def rows_read(cached, M=8):
    rows, forward = [], type(lm.blocks[0]).forward

    def record(block, x, *rest):
        rows.append(x.shape[1])
        return forward(block, x, *rest)

    one = build_batch([[circle, "a"]], TOKENIZER, 24, close=False)
    with patch.object(type(lm.blocks[0]), "forward", record):
        decoder = decoding.Decoder(model, one, M, cached)
        for _ in range(M - 1):
            decoder.extend(decoding.greedy(decoder.logits)[:, None])
    return sum(rows) // len(lm.blocks), decoder


# %%
(with_cache, a), (without, b) = (rows_read(cached) for cached in (True, False))
assert np.array_equal(a.tokens, b.tokens) and np.allclose(a.logits, b.logits, atol=1e-4)
print("rows read:", with_cache, "with a cache,", without, "without")

# %% [markdown]
# L + M − 1 against M (L + M): linear against quadratic. The tokens agree, and the logits up to
# rounding: a product of one row adds up in another order than one of many.

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
# ### Exercise 5.2: temperature and top-k
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
check("5.2", top_k)

# %% [markdown]
# ### Exercise 5.3: the nucleus
#
# ★★★ · 10 minutes · 4 to 7 lines. Return the probabilities [B, V] among the *fewest* of the
# likeliest words of each row whose probabilities reach p. The word with which p is reached belongs
# to them.
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


# %% tags=["exercise"]
def nucleus(logits, p):  # [B, V], float -> [B, V]
    ...  # your code


# %% tags=["solution"]
def nucleus(logits, p):  # [B, V], float -> [B, V]
    q = softmax(logits)
    order = np.argsort(-q, axis=-1)
    ranked = np.take_along_axis(q, order, axis=-1)
    ranked = ranked * (np.cumsum(ranked, axis=-1) - ranked < p)
    kept = np.zeros_like(q)
    np.put_along_axis(kept, order, ranked, axis=-1)
    return kept / kept.sum(axis=-1, keepdims=True)  # equation (3)


# %%
check("5.3", nucleus)

# %% [markdown]
# The library returns no distribution but draws from it, with one uniform number a row. To compare,
# we hand it 4,000 equal rows and count:

# %%
source(decoding.nucleus)

# %%
from miniflamingo.course.checks.module_05 import nucleus_of, probabilities_of

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
# **Predict, then run:** the four have 0.36, 0.23, 0.21 and 0.19. How many does a nucleus of p = 0.7
# keep? Which panel lets one of the 64 other words through?

# %%
show(
    plots.plot_distributions(
        [*shown, "64 others"], {title: bars(p[0]) for title, (p, _) in panels.items()}
    ),
    alt="Probabilities of and, EOC, what, moving and of the 64 others. Softmax: 0.36, 0.23, 0.21, "
    "0.19 and next to nothing. Temperature 0.5: and has nearly a half. Temperature 3: the four are "
    "nearly equal and the others together have more than a third. Top-k with k = 2: only and and "
    "EOC. Nucleus 0.7: three words, moving is cut.",
)

# %% [markdown]
# ## Beam search
#
# The likeliest *text* need not begin with the likeliest *word*. Beam search keeps the W likeliest
# beginnings: each of them tries all V words, and of the W · V ways to go on the best W stay.
#
# ### Exercise 5.4: one step of a beam
#
# ★★☆ · 8 minutes · 2 to 4 lines. `scores` [W] are the log-probabilities of the beams so far, `logp`
# [W, V] those of each next word. Return int [W, 2], best first: (which beam, which word).
#
# <details><summary>Hint 1</summary>
#
# The logarithm of a product is a sum: `scores[:, None] + logp`, [W, V].
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.argsort(-total.ravel())[:W]` are places in the flat array; `np.divmod(place, V)` splits them.
#
# </details>


# %% tags=["exercise"]
def beam_step(scores, logp):  # [W], [W, V] -> int[W, 2]
    ...  # your code


# %% tags=["solution"]
def beam_step(scores, logp):  # [W], [W, V] -> int[W, 2]
    total = (scores[:, None] + logp).ravel()  # [W * V]
    best = np.argsort(-total)[: len(scores)]
    return np.stack(np.divmod(best, logp.shape[1]), axis=1)


# %%
check("5.4", beam_step)

# %% [markdown]
# A picture with nothing on it but noise, so that the model has to guess, and the tree of three
# beams, by hand. At each step we also show the best that was dropped.

# %%
from miniflamingo.course.checks.module_05 import step_of_beam

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
        (beam, TOKENIZER.words[word], s, i < 3)
        for i, ((beam, word), s) in enumerate(zip(ways, total)) if s > -12
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
# ### Exercise 5.5: log-likelihood
#
# ★★★ · 9 minutes · 4 to 6 lines. `first` [V] are the logits behind the prompt, `logits` [C, M, V]
# those behind each token of the candidates `tokens` int [C, M], which are padded: only the first
# `lengths[c]` count. Return [C].
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
def likelihood(first, logits, tokens, lengths):  # [V], [C, M, V], int[C, M], int[C] -> [C]
    ...  # your code


# %% tags=["solution"]
def likelihood(first, logits, tokens, lengths):  # [V], [C, M, V], int[C, M], int[C] -> [C]
    C, M, V = logits.shape
    before = np.concatenate([np.broadcast_to(first, (C, 1, V)), logits[:, :-1]], axis=1)
    logp = np.take_along_axis(log_softmax(before), tokens[..., None], axis=-1)[..., 0]
    counted = np.arange(M) < lengths[:, None]
    return (logp * counted).sum(axis=1)  # equation (1)


# %%
check("5.5", likelihood)

# %%
source(decoding.log_likelihood)

# %% [markdown]
# ## Break it
#
# Four faults; numbers 2 and 3 are from public implementations.
#
# 1. **Cache positions off by one.** The new token is told that it stands one place further on.
# 2. **One row's `<image>` takes the images of the others** (open-flamingo). While a batch is being
#    decoded, one row writes `<image>`; φ is then counted again from the new tokens alone.
# 3. **Visual keys and values again for every token** (IDEFICS): right, but slow.
# 4. **Length bias**: candidates without their `<EOC>`.
#
# **Predict, then run:** bug 1 moves *all* later tokens by one. Distances between them are the same.
# Does anything change?

# %%
for shift in (0, 1):
    out = write_cached(prompt, 6, shift)[0, prompt.shape[1] :]
    print(f"shift {shift}: {TOKENIZER.decode(out)}")
L, cache = prompt.shape[1], new_cache(prompt.shape[1] + 3)
lm(prompt, np.arange(L)[None], cache)
new = np.array([[TOKENIZER.ids["dax"]]])
right, wrong = (lm(new, np.array([[L + s]]), copy.deepcopy(cache)) for s in (0, 1))
print(f"largest change of a logit: {abs(right - wrong).max():.1f}")
print(check("5.1", lambda positions, n: positions[:, :, None] + 1 >= np.arange(n)).message)

# %% [markdown]
# It does, and not by the distance alone: place L of the cache stays empty, a key of zeros, and by
# (2) it is *seen*. Its score is 0 minus the slope, as good as many a real one. The text may look
# fine, so do not judge by the text: compare logits with the uncached decoder's, token by token.
# (The last line is what the check of exercise 5.1 says to the same mistake in the mask.)
#
# Bug 2. Row 0 shows two circles and is about to write its second `<image>`; row 1 has one picture
# and is about to write "large", on the way to a colour.

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


def phi_again(new, so_far):  # bug 2: an <image> anywhere starts the count again, everywhere
    return np.cumsum(new == IMAGE, axis=1) if (new == IMAGE).any() else so_far + 0 * new


# %% [markdown]
# **Predict, then run:** what are the four values of φ, two rows by two functions?

# %%
colours = ["blue", "red", "green"]
ids_of = [TOKENIZER.ids[c] for c in colours]
for name, count in (("right", phi_of), ("bug 2", phi_again)):
    phi, cache = count(new, so_far), copy.deepcopy(decoder.cache)
    p = softmax(model.read(new, None, phi, cache, decoder.lengths[:, None])[1, -1].astype(float))
    print(f"{name}: phi = {phi.ravel()}; row 1 goes on", end="")
    print("".join(f"  {c} {x:.2f}" for c, x in zip(colours, p[ids_of])))

# %% [markdown]
# Row 1 has become blind for this token because of something that its *neighbour* wrote, and row 0
# looks at its first picture again. Which check catches it? Decode each row alone and in a batch:
# they must agree. A batch of one never shows it.
#
# Bug 3, counted for the 3B model with 32 images of 64 visual tokens: the arithmetic of one new
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
#
# Bug 4. Three candidates for the picture of the large red circle. **Predict, then run:** which one
# wins without `<EOC>`, which with it?

# %%
one = build_batch([[circle]], TOKENIZER, 24, close=False)
candidates = ["a", "a large red", "a large red circle"]
for end in ([], [EOC]):
    ranked = [TOKENIZER.encode(text) + end for text in candidates]
    likely = decoding.log_likelihood(model, one, ranked)[0]
    print(f"end {end}:", ", ".join(f"{t} {x:.2f}" for t, x in zip(candidates, likely)))
    print("   wins:", candidates[int(likely.argmax())])

# %% [markdown]
# A text can never be likelier than its own beginning, since every further factor of (1) is at most
# 1. With `<EOC>` a candidate must also *end* there. (Dividing by the length is the other common
# cure; it favours long ones whose last words are foregone.)

# %% [markdown]
# ## The fused view
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
# - A cache changes nothing but the work: L + M − 1 rows, not M (L + M). Check it on the logits.
# - Temperature reshapes, top-k and nucleus cut and share out anew; a beam compares whole texts.
# - Rank with `<EOC>`, or every beginning beats its own completion.
# - Rows of a batch must not know of one another. Test with more than one.
#
# **In the paper:** section 3.1.2 on the frozen LM; the appendix on evaluation, for beam search of
# width 3 and ranking. **In the library:** `miniflamingo/language.py`, `miniflamingo/decoding.py`.
#
# **Next:** module 06, φ and image-causal masking: what the inserted layers may look at.
