# %% [markdown]
# # 09 Few-shot: 0 to 32 shots, RICES, ranking
#
# **The question: a trained Flamingo never learns again. How does it take up a new task from a few
# examples in its prompt, and how do we know how well it did?**
#
# After this module you can
#
# - build the prompt of a few-shot episode, and say why nothing of the answer may be in it;
# - get an answer in two ways: rank candidates by log-likelihood, or write it word by word;
# - read a curve over 0 to 32 shots with its uncertainty and its ceiling;
# - choose the shots with RICES, average over their orders, and say what each bought here.
#
# **You need:** φ (module 06), log-likelihood and beam search (module 05), the trained model
# (module 08). This module trains nothing.
#
# **Time:** about 46 minutes: 12 to read (2,400 words, 200 a minute) and 34 for five exercises.
# Computing takes about 3 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# An episode invents names for things and asks for one of them. "dax" has no meaning outside this
# one prompt, so the answer can be read off the *examples* alone. The examples are called shots, the
# last picture is the query.

# %%
import json

import numpy as np

from miniflamingo import plots
from miniflamingo.course import check, show, source
from miniflamingo.decoding import beam_search, generate, log_likelihood
from miniflamingo.evaluation import TASKS, Evaluation, wilson
from miniflamingo.functional import log_softmax
from miniflamingo.prompt import BOS, EOC, IMAGE, build_batch
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds import datasets, grammar, shapes
from miniflamingo.worlds.grammar import NAME_IDS, TOKENIZER

model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")

# %%
# red circle, blue square, red circle again, green ring; the query is another blue square
colour, shape = np.array([0, 2, 0, 1, 2]), np.array([0, 1, 0, 4, 1])
size = np.array([0, 1, 1, 0, 0])
pictures = shapes.draw_objects(colour, shape, size, np.random.default_rng(3), split="test")
labels = ["this dax", "this wug", "this dax", "this toma", "this"]
parts = [part for pair in zip(pictures, labels) for part in pair]
batch = build_batch([parts], TOKENIZER, 24, close=False)  # close=False: to be gone on with
print(TOKENIZER.decode(batch.tokens[0]))

# %%
names = ["dax", "wug", "toma", "zorp"]
candidates = [[TOKENIZER.ids[name]] for name in names]
scores = log_likelihood(model, batch, candidates)[0]
show(
    plots.plot_episode(pictures, [*labels[:-1], "this ?"], names, scores, truth=1),
    alt="Five small pictures: four shots with their labels, this dax, this wug, this dax, this "
    "toma, then the query. Beside them the log-likelihoods of four names; wug, the right one, is "
    "nearest to 0, the others are far below.",
)

# %% [markdown]
# | letter | meaning | here | in the paper |
# |---|---|---|---|
# | k | shots | 0 to 32 | 0, 4, 8, 16, 32 |
# | w | ways: classes of an episode | 8 in most tasks | up to 1,000 |
# | C | candidates that are ranked | | |
# | n | episodes that an accuracy is measured on | 150, and 1,000 | the test sets |
# | L, V | tokens of a prompt, words | 4k + 3, about 90 | |

# %% [markdown]
# ## The derivation
#
# **The prompt** is one interleaved sequence: k closed chunks and an open one.
#
# $$s = \langle BOS \rangle \; \big( \langle image \rangle_i \; \text{this} \; y_i \;
# \langle EOC \rangle \big)_{i=1}^{k} \; \langle image \rangle_q \; \text{this} \qquad\qquad (1)$$
#
# The paper's prompts have the same form: `<image>Output: ...<EOC>` for captions, and
# `<image>Question: ... Answer: ...<EOC>`. No weight moves. Each token looks at one picture, that
# of its own chunk (φ), and the language model's own attention compares the chunks.
#
# **Close-ended**: there is a list of candidates, each a row of tokens c. Score every one,
#
# $$\mathrm{score}(c) = \sum_{m=1}^{|c|} \log p(c_m \mid s, c_{\lt m}) \qquad\qquad (2)$$
#
# and take the best. **Open-ended**: write, with greedy decoding or beam search (width 3 in the
# paper), until `<EOC>`.
#
# **RICES** (Retrieval-based In-Context Example Selection): where a large support set exists, take
# the k examples whose pictures are most similar to the query's by the *frozen encoder*. With its
# mean feature f,
#
# $$\mathrm{likeness}(i) = \frac{f_i^\top f_q}{\lVert f_i \rVert \, \lVert f_q \rVert}
# \qquad\qquad (3)$$
#
# and put the most similar **last**, next to the query.
#
# **The uncertainty.** With n independent episodes, each right with probability p, the number of
# right ones is binomial, with variance n p (1 − p). An accuracy is that number divided by n:
#
# $$\mathrm{se} = \sqrt{p (1 - p) / n} \qquad\qquad (4)$$
#
# About 95 % of the time the truth lies within 2 of these. At p = 0.5 and n = 100 that is ±0.10.
#
# **Ensembling**: a prompt has an order that means nothing. Average it out, over O random orders
# $\pi$ of the same shots (6 in the paper):
#
# $$\hat y = \arg\max_c \; \frac{1}{O} \sum_{\pi} \log p(c \mid s_\pi) \qquad\qquad (5)$$

# %% [markdown]
# ## The prompt
#
# Equation (1) with loops. `names` has k + 1 columns: the last is the query's own, the answer.


# %%
def prompt_loop(names, this):  # int[B, k+1], int -> int[B, 1 + 4k + 2]
    rows = []
    for *shots, _ in names.tolist():  # without the last, the answer
        chunks = [token for name in shots for token in (IMAGE, this, name, EOC)]
        rows.append([BOS, *chunks, IMAGE, this])  # equation (1), left open
    return np.array(rows)


# %% [markdown]
# ### Exercise 9.1: the prompt of an episode
#
# ★☆☆ · 6 minutes · 4 to 7 lines. Write equation (1) for a batch, without a loop over tokens. `BOS`,
# `EOC` and `IMAGE` are ids.
#
# <details><summary>Hint 1</summary>
#
# Fill an array `chunks` of [B, k, 4]: the four columns are IMAGE, this, the name, EOC.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `chunks.reshape(B, 4 * k)` lines them up; `np.concatenate` puts BOS before and IMAGE, this behind.
# The shots' names are `names[:, :-1]`.
#
# </details>


# %% tags=["exercise"]
def prompt_of(names, this):  # int[B, k+1], int -> int[B, 1 + 4k + 2]
    ...  # your code


# %% tags=["solution"]
def prompt_of(names, this):  # int[B, k+1], int -> int[B, 1 + 4k + 2]
    B, k = len(names), names.shape[1] - 1
    chunks = np.empty((B, k, 4), int)
    chunks[:] = IMAGE, this, 0, EOC
    chunks[:, :, 2] = names[:, :-1]
    end = np.tile([IMAGE, this], (B, 1))
    return np.concatenate([np.full((B, 1), BOS), chunks.reshape(B, 4 * k), end], axis=1)


# %%
check("9.1", prompt_of)

# %% [markdown]
# The library draws an episode, closes all k + 1 chunks, and cuts the last two tokens off when it
# asks, the answer and its `<EOC>`. No picture stands in an episode twice: the query would be among
# its own shots.

# %%
source(datasets.binding_documents)

# %%
evaluation = Evaluation(model, samples=150, per_class=16)  # pictures that no training has seen
rng = np.random.default_rng(0)
documents, episode = datasets.binding_documents(evaluation.pool, 150, 5, 4, rng)
this = TOKENIZER.ids["this"]
assert np.array_equal(documents.tokens[:, :-2], prompt_loop(episode.name, this))

# %% [markdown]
# ## Close-ended: rank the candidates
#
# Equation (2) with loops, uncached, for one prompt. The model reads prompt and candidate in one go;
# its logits at a token say what comes *next*.


# %%
def scores_loop(model, batch, candidates):  # one prompt, C lists of ids -> [C]
    scores, start = [], batch.tokens.shape[1]
    media = model.resampler(model.encode(batch.pixels), batch.num_frames)
    for c in candidates:
        tokens = np.concatenate([batch.tokens, [c]], axis=1)
        phi = np.cumsum(tokens == IMAGE, axis=1)
        logp = log_softmax(model.read(tokens, media, phi))[0]
        scores.append(sum(logp[start + m - 1, c[m]] for m in range(len(c))))  # equation (2)
    return np.array(scores)


assert np.allclose(scores_loop(model, batch, candidates), scores, atol=1e-3)

# %% [markdown]
# ### Exercise 9.2: score the candidates
#
# ★★☆ · 9 minutes · 3 to 6 lines. All C rows hold the same prompt, then a candidate, then padding:
# `tokens` int [C, L] with the candidate at `start` up to (not including) `lengths[c]`; `logits`
# [C, L, V] as the model gave them. Return equation (2), [C]. `log_softmax` is at hand.
#
# <details><summary>Hint 1</summary>
#
# The token at place l was predicted by the logits at place l − 1. So take `logp[:, start-1:-1]` and
# `tokens[:, start:]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.take_along_axis(logp, tokens[..., None], axis=2)` picks each token's log-probability.
# `np.arange(start, L) < lengths[:, None]` is true where a candidate is, false on padding.
#
# </details>


# %% tags=["exercise"]
def score(logits, tokens, start, lengths):  # [C, L, V], int[C, L], int, int[C] -> [C]
    ...  # your code


# %% tags=["solution"]
def score(logits, tokens, start, lengths):  # [C, L, V], int[C, L], int, int[C] -> [C]
    logp = log_softmax(logits)[:, start - 1 : -1]  # what comes at start, start + 1, ...
    picked = np.take_along_axis(logp, tokens[:, start:, None], axis=2)[..., 0]
    counted = np.arange(start, tokens.shape[1]) < lengths[:, None]
    return (picked * counted).sum(axis=1)  # equation (2)


# %%
check("9.2", score)

# %% [markdown]
# The library's reads the prompt once, keeps it in a cache, and repeats the cache for each
# candidate:

# %%
source(log_likelihood)

# %% [markdown]
# **Predict, then run:** a picture of one object, candidates "a", "a small" and the whole, right
# caption of four words. Which one wins by equation (2)? And if `<EOC>` belongs to each candidate?

# %%
alone = build_batch([[pictures[-1]]], TOKENIZER, 24, close=False)
texts = ["a", "a small", TOKENIZER.decode(generate(model, alone, 5)[0])]
ids = [TOKENIZER.encode(text) for text in texts]
bare, ended = (log_likelihood(model, alone, c)[0] for c in (ids, [[*i, EOC] for i in ids]))
for text, i, a, b in zip(texts, ids, bare, ended):
    print(f"{text:<22} bare {a:6.2f}, a word {a / len(i):6.2f}; with <EOC> {b:6.1f}")

# %% [markdown]
# Each further word multiplies by a probability of at most 1, so a beginning never scores lower than
# the whole. That is **length bias**: bare sums prefer short candidates. Dividing by the length
# changes that, but it is another quantity with a bias of its own: sure words pay for unsure ones.
# With `<EOC>` a candidate has to *end* there, and the candidates become whole answers that exclude
# one another. Where all candidates have one token, as our names do, the question does not arise.

# %% [markdown]
# ## Open-ended: write
#
# Greedy takes the best word at each step, beam search keeps the best three beginnings. Beam search
# can only do better by its own measure, the log-probability of the whole; whether that is the
# *right* answer is another question. (Compare with the first figure.)

# %%
one = build_batch([[p] for p in pictures], TOKENIZER, 24, close=False)
for greedy, (ids, _) in zip(generate(model, one, 8), beam_search(model, one, 8, width=3)):
    same = "the same" if greedy == ids else TOKENIZER.decode(greedy)
    print(f"beam: {TOKENIZER.decode(ids):<24} greedy: {same}")

# %% [markdown]
# The first picture is a circle, and both call it a cross: sure of it, and wrong. Searching for the
# likeliest answer mends no misperception. Module 10 comes back to that.

# %% [markdown]
# ## The curve, and how sure we are of it
#
# ### Exercise 9.3: the standard error
#
# ★☆☆ · 5 minutes · 2 lines. Write equation (4) for C accuracies at once: `correct` is bool [C, n],
# the answers to n episodes, right or wrong. Return [C].
#
# <details><summary>Hint 1</summary>
#
# p of each row is `correct.mean(axis=1)`, and n is `correct.shape[1]`.
#
# </details>


# %% tags=["exercise"]
def standard_error(correct):  # bool[C, n] -> [C]
    ...  # your code


# %% tags=["solution"]
def standard_error(correct):  # bool[C, n] -> [C]
    p = correct.mean(axis=1)
    return np.sqrt(p * (1 - p) / correct.shape[1])  # equation (4)


# %%
check("9.3", standard_error)

# %% [markdown]
# Equation (4) is 0 when all n answers are right, which no one should believe. The library draws the
# Wilson interval instead; it is nearly p ± 2 se in the middle and stays honest at the edges:

# %%
for hits, n in ((75, 150), (142, 150), (150, 150), (500, 1000)):
    p, (low, high) = hits / n, wilson(hits, n)
    print(f"{hits:>3} of {n:<4}: 2 se = {2 * np.sqrt(p * (1 - p) / n):.3f}; Wilson "
          f"{low:.3f} to {high:.3f}")  # fmt: skip

# %% [markdown]
# **Predict, then run:** eight classes, k random shots. Training showed five pictures in a document.
# What can *any* model reach at 4 shots, and will ours fall apart beyond 4?

# %%
shipped = json.loads((WEIGHTS / "flamingo" / "metrics.json").read_text())
measured = shipped["few_shot_details"]["binding_8way"]  # 1,000 episodes, made by `evaluate`
live = evaluation.binding("binding_8way", shots=(0, 1, 2, 4, 8, 16, 32))
curves = {
    name: {k: (v["accuracy"], *v["interval"]) for k, v in curve.items()}
    for name, curve in (("1,000 episodes", measured), ("150 episodes, live", live))
}
ceiling = {k: v["ceiling"] for k, v in measured.items()}
show(
    plots.plot_shots(curves, {"1,000 episodes": ceiling}),
    alt="Accuracy of the package's model on 8-way binding against 0 to 32 shots: two curves that "
    "agree within their bars, the one of 150 episodes with wide bars, the one of 1,000 with short "
    "ones, rising from nearly 0 to about 0.95 along the dotted ceiling.",
)

# %% [markdown]
# Read it in this order. **The bars:** the two curves are one model; where they differ, that is what
# 150 episodes do. **The ceiling:** k random shots show the query's class with probability
# $1 - (7/8)^k$, and a class that was not shown has a name that nobody can know. Most of the rise is
# this *coverage*. So divide it out, and ask only episodes in which the class was shown:

# %%
for k in ("1", "4", "8", "16", "32"):
    row = measured[k]
    print(f"{k:>2} shots: accuracy {row['accuracy']:.2f}, ceiling {ceiling[k]:.2f}, "
          f"given that the class was shown {row['given_shown']:.2f}")  # fmt: skip

# %% [markdown]
# That is the model's own part: near 1 with few shots, a little lower with 32, where six times as
# many pictures compete as in training. That it holds at all is φ: a token never sees more than one
# picture, whether there are 2 or 33. The accuracy at few shots can lie a little above the ceiling,
# since a lucky guess among the names also counts.
#
# In the paper (captioning scores on COCO, 0, 4 and 32 shots) the 80B model goes 84.3, 103.2, 113.8,
# and the 3B model 73.0, 85.0, 99.0. More shots help, and larger models are better at each number.

# %% [markdown]
# ## Zero shots are two
#
# At 0 shots a model does not know what is wanted: a name, a caption, an answer? The paper's
# "0-shot" prompt therefore holds two examples *without their pictures*. They show the form and
# nothing else.
#
# **Predict, then run:** captions of fresh pictures, exactly right, with nothing before the picture,
# and after two captions of other, absent things.

# %%
pool, B = evaluation.pool, 150
asked = datasets.caption_documents(pool, B, 1, rng, datasets.SEEN & grammar.GEOMETRIC)
media, truth = evaluation.media["images"][asked.pictures], asked.tokens[:, 2:6]
absent = grammar.caption(*grammar.draw_attributes((B, 2), grammar.GEOMETRIC, rng))
ended = np.concatenate([absent, np.full((B, 2, 1), EOC)], axis=2)
examples = grammar.document(ended)  # <BOS> a small red bar <EOC> a large blue ring <EOC>


# %%
def exactly(start):  # int[B, L] -> bool[B]: does it write the caption behind start and <image>?
    tokens = np.concatenate([start, np.full((B, 1), IMAGE)], axis=1)
    written = generate(evaluation.reader, evaluation.prompt(tokens, media), 5)
    return np.array([ids == list(row) for ids, row in zip(written, truth)])


p = np.array([exactly(start).mean() for start in (examples[:, :1], examples)])
print("nothing before it {:.1f}, two texts before it {:.1f}".format(*p))
se = np.sqrt((p * (1 - p)).sum() / B)  # equation (4), and variances add
print("they differ by less than 3 standard errors:", np.ptp(p) < 3 * se)

# %% [markdown]
# Within their errors the two agree: our captions leave little to be told about the form. Large
# models, trained on the web, gain more from being shown it. Note what the two texts cost: they come
# from the training set, so the paper's "zero-shot" has seen two labels.

# %% [markdown]
# ## RICES: choose the shots
#
# ### Exercise 9.4: the most similar pictures
#
# ★★☆ · 8 minutes · 4 or 5 lines. `features` [n, D] are the mean features of all pictures, `query`
# int [B] says which of them are asked for. Return int [B, k], the k most similar by equation (3),
# the most similar *last*, and never the query itself.
#
# <details><summary>Hint 1</summary>
#
# Divide each row by its length; then `unit[query] @ unit.T` is [B, n], all cosines.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Set `likeness[np.arange(B), query]` to −∞. `np.argsort` sorts upwards: the last k are the best.
#
# </details>


# %% tags=["exercise"]
def most_similar(features, query, k):  # [n, D], int[B], int -> int[B, k]
    ...  # your code


# %% tags=["solution"]
def most_similar(features, query, k):  # [n, D], int[B], int -> int[B, k]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    likeness = unit[query] @ unit.T  # equation (3)
    likeness[np.arange(len(query)), query] = -np.inf
    return np.argsort(likeness, axis=1)[:, -k:]


# %%
check("9.4", most_similar)

# %% [markdown]
# In the library every episode has a support set of its own, 160 pictures with names:

# %%
source(Evaluation.rices)

# %% [markdown]
# **Predict, then run:** 4 shots, eight classes. Random shots have a ceiling of 0.41. And RICES?


# %%
def beside(live, known):  # {how: figure} each, of 150 and of 1,000 episodes
    for how, value in live.items():
        (low, high), accuracy = value["interval"], known[how]["accuracy"]
        where = "within" if low <= accuracy <= high else "outside"
        print(f"{how:<10} live {value['accuracy']:.1f}; of 1,000 episodes {accuracy:.3f}, "
              f"{where} the live interval")  # fmt: skip


beside(evaluation.rices(shots=4), shipped["rices"])

# %% [markdown]
# A leap, and not because the model understands more. RICES breaks the ceiling: the encoder finds
# pictures of the query's class, so the name *is* shown, often four times. Given that, the model was
# right before, too. How good is plain retrieval, then? Ask the nearest picture alone:

# %%
task, k = TASKS["binding_8way"], 4
drawn = grammar.draw_episode(B, 161, task.ways, rng, task.allowed, task.mode)
each = pool.pick(drawn.colour[..., None], drawn.shape[..., None], rng)  # one by one: may repeat
chosen = each[..., 0]  # int[B, 161], the query last
mean = pool.images[:, 0].mean(axis=1)
unit = mean - mean.mean(axis=0)
unit /= np.linalg.norm(unit, axis=1, keepdims=True)
likeness = np.einsum("bd,bnd->bn", unit[chosen[:, -1]], unit[chosen[:, :-1]])  # equation (3)
again = datasets.repeated(chosen)[:, :-1]  # the query itself, and what is drawn once more
order = np.argsort(np.where(again, -np.inf, likeness), axis=1)


# %%
def answer(rows, names=drawn.name):  # int[B, k] -> the words that the model says, int[B]
    columns = np.concatenate([rows, np.full((B, 1), 160)], axis=1)
    shown, said = (np.take_along_axis(a, columns, axis=1) for a in (chosen, names))
    tokens = prompt_loop(said, this)
    return evaluation.logits(tokens, evaluation.media["images"][shown])[:, -1].argmax(axis=-1)


truth, nearest = drawn.name[:, -1], np.take_along_axis(drawn.name, order[:, -1:], axis=1)[:, 0]
print(f"the nearest picture's name {np.mean(nearest == truth):.1f}, "
      f"the model after 4 {np.mean(answer(order[:, -k:]) == truth):.1f}")  # fmt: skip

# %% [markdown]
# The encoder alone, without any language model, does as well on this task. So the leap is the
# *encoder's*: it chose examples that hold the answer, and the model had to do little more than
# repeat it. When RICES shines in a table, ask for this line. (150 episodes tell one decimal. The
# second is noise; and of two words that are nearly equally likely, another processor may say the
# other.)

# %% [markdown]
# ## Ensembling over orders
#
# ### Exercise 9.5: average over orders
#
# ★☆☆ · 6 minutes · 1 line. `logp` [O, B, V] holds the log-probability of each word in each of O
# orders. Return equation (5), the chosen words, int [B].
#
# <details><summary>Hint 1</summary>
#
# First the mean over the orders, axis 0, then the best word, the last axis.
#
# </details>


# %% tags=["exercise"]
def ensemble(logp):  # [O, B, V] -> int[B]
    ...  # your code


# %% tags=["solution"]
def ensemble(logp):  # [O, B, V] -> int[B]
    return logp.mean(axis=0).argmax(axis=-1)  # equation (5)


# %%
check("9.5", ensemble)

# %% [markdown]
# A mean of logs is a product of probabilities: an order that finds a word impossible has a veto. A
# vote, or a mean of probabilities, would be other rules.
#
# **Predict, then run:** 8 random shots of four classes, one order against six. How much is gained?

# %%
beside(evaluation.ensemble(shots=8, orders=6), shipped["ensemble"])

# %% [markdown]
# Nothing that the bars could tell from 0, live or in 1,000 episodes. The reason is the ceiling
# again: with 8 shots of 4 classes it is $1 - (3/4)^8 = 0.90$. What is wrong here is wrong in every
# order, because the class is not there, and an average of six ignorant answers is ignorant. Where a
# model's errors *depend* on the order, as in large models on real images, averaging can help. Not
# everything in a paper's appendix helps everywhere: measure.

# %% [markdown]
# ## Break it
#
# Four bugs of evaluations. None stops with an error, and three make the result *better*.
#
# 1. **A leak from the label.** Shots are chosen knowing the query's class ("every class must be
#    shown").
# 2. **The query is in its own support.** RICES then finds it, label and all. The library's own
#    evaluation has had this bug twice. First here: a finite pool, 160 draws, and nothing that
#    forbade the query, worth 0.990 instead of 0.987. Then in the curves, where pictures were drawn
#    with replacement: of $w$ classes with 40 pictures each, a shot is the asked one with a
#    probability of $1/40w$, so after 32 shots it had stood among them in $1 - (1 - 1/40w)^{32}$ of
#    the episodes: 10 % for eight classes, 23 % for three.
# 3. **A wrong offset in the score**: token ℓ is scored with the logits *at* ℓ.
# 4. **The most similar first.**
#
# **Predict, then run:** which of them changes the accuracy, and in which direction?

# %%
same_class = (drawn.index[:, :-1] == drawn.index[:, -1:]) & ~again
favoured = same_class.argmax(axis=1)[:, None]  # the first other picture of the query's class
random = np.argsort(again, axis=1, kind="stable")[:, :k]
leaky = np.concatenate([random[:, 1:], favoured], axis=1)
with_itself = np.argsort(likeness, axis=1)[:, -k:]
rows = {"random": random, "bug 1: class always shown": leaky,
        "RICES": order[:, -k:], "bug 2: the query in it": with_itself,
        "bug 4: most similar first": order[:, -k:][:, ::-1]}  # fmt: skip
for name, choice in rows.items():
    print(f"{name:<27} {np.mean(answer(choice) == truth):.1f}")

# %% [markdown]
# Bug 1 lifts random shots from the ceiling to nearly 1. It looks like a fair "balanced" prompt, and
# it *can* be one if every class is always shown; here one shot alone is chosen by the answer. Bug 4
# hardly matters to this model: its ALiBi slopes include a 0, so that some heads do not prefer near
# tokens. A larger model, trained on real pages, has more reason to follow the last example.
#
# Bug 2 seems to be worth little, as RICES is nearly perfect here anyway. The check that finds it is
# to take the meaning away: **give every support picture a random name.** Now nothing can be known,
# and the accuracy must drop to that of guessing, 1/24.

# %%
itself = chosen[:, :-1] == chosen[:, -1:]
random_names = NAME_IDS[rng.integers(0, len(NAME_IDS), drawn.name.shape)]
random_names[:, :-1][itself] = np.repeat(random_names[:, -1], itself.sum(axis=1))
print(f"the query stands in its own support in {itself.any(axis=1).mean():.0%} of the episodes")
for name, choice in (("RICES", order[:, -k:]), ("bug 2", with_itself)):
    print(f"{name:<6} with random names "
          f"{np.mean(answer(choice, random_names) == random_names[:, -1]):.1f}")  # fmt: skip

# %% [markdown]
# An accuracy where nothing can be known: that is a leak, whatever its cause. Shuffled labels cost
# one line, and every few-shot evaluation should have that line.
#
# Bug 3, on captions: four candidates for each picture, the true caption and three with a wrong
# colour, ranked by the right offset and by the wrong one.

# %%
colours = pool.objects[0][asked.pictures] + np.arange(4)  # [B, 4], the true one first
rows = np.repeat(asked.tokens, 4, axis=0)
rows[:, 4] = grammar.COLOUR_IDS[colours.ravel() % 8]  # <BOS> <image> a small COLOUR shape <EOC>
logp = log_softmax(evaluation.logits(rows, np.repeat(media, 4, axis=0)))
for name, shift in (("right offset", 1), ("bug 3", 0)):
    picked = np.take_along_axis(logp[:, 2 - shift : 7 - shift], rows[:, 2:, None], axis=2)
    best = picked[..., 0].sum(axis=1).reshape(B, 4).argmax(axis=1)
    print(f"{name:<13} the true caption is the best of four: {np.mean(best == 0):.1f}")


# %%
def shifted(logits, tokens, start, lengths):  # bug 3
    logp = log_softmax(logits)[:, start:]
    picked = np.take_along_axis(logp, tokens[:, start:, None], axis=2)[..., 0]
    return (picked * (np.arange(start, tokens.shape[1]) < lengths[:, None])).sum(axis=1)


print(check("9.2", shifted).message)
unit_of = lambda f: f / np.linalg.norm(f, axis=1, keepdims=True)  # noqa: E731
print(check("9.4", lambda f, q, k: np.argsort(unit_of(f)[q] @ unit_of(f).T)[:, -k:]).message)

# %% [markdown]
# The wrong offset asks how well the *next* word predicts this one, which is no question. The sums
# are finite and plausible. It is found by a case that can be added up by hand, or by comparing a
# cached with an uncached score; and by a candidate task that the model is known to solve.

# %% [markdown]
# ## Takeaways
#
# - Few-shot learning here is a prompt: k closed chunks and an open one. No weight moves, φ shows
#   each token one picture, and so 32 shots work after training on 5 pictures.
# - Rank by the sum of log-probabilities, `<EOC>` included; bare sums favour short candidates.
# - Give the ceiling and the interval with every accuracy. Most of a few-shot curve can be coverage.
# - RICES buys coverage, with the encoder's help. Ensembling bought nothing here, and the ceiling
#   says why.
# - Check for leaks with random labels: what cannot be known must not be answered.
#
# **In the paper:** section 3.3 (in-context learning), section 4.1 and the tables of few-shot
# results; RICES, ensembling, prompts and zero-shot examples are in the appendix. **In the
# library:** `miniflamingo/evaluation.py` and `miniflamingo/decoding.py`; run
# `python -m miniflamingo evaluate` for all tasks.
#
# **Next:** module 10, ablations and limits: what each choice of the architecture buys.
