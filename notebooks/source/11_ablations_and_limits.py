# %% [markdown]
# # 11 Ablations and limits: what each choice buys, hallucination
#
# **The question: Flamingo is a list of choices. Which of them matter, how would we know, and what
# can the model still not do?**
#
# After this module you can
#
# - run an ablation: change one choice, keep all else, and say what the difference is worth;
# - put an error on a difference, and say what a small experiment can and can not tell;
# - compare your findings with the paper's table without wishing for agreement;
# - make a model hallucinate on purpose, and measure how sure it is of what is not there;
# - optional: test a difference without any variance, say where a gate is worth something, look
#   closely at attention to all previous images, read the measured limits of our model, and say what
#   came after Flamingo.
#
# **You need:** the resampler, φ, the gates, training, and the evaluation's intervals (modules 05,
# 07, 08, 09 and 10).
#
# **Time:** about 55 minutes for the core path, and 40 for what is marked optional. Computing takes
# about 23 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 5: the paper's table. 5 to 10: the derivation, exercise 11.1. 10 to 17: exercise
# 11.2. 17 to 24: the live runs, guess 11.a (they compute while you talk about fairness). 24 to 32:
# the longer runs, guess 11.b. 32 to 40: hallucination, guess 11.d. 40 to 49: exercise 11.4. 49 to
# 53: one run a row, takeaways.
#
# **Predictions.** 11.a: below are one layer, all previous images and LM from scratch; above are no
# gate and the MLP. Usual: "no gate" below, as in the paper. 11.b: worse: no interleaved documents,
# round robin, all previous images, LM from scratch; lowest: no clips. Usual: "no gate" among the
# worse, and a lowest row that is also told. 11.c: "no gate", "gate" and "gate". Usual: "gate" three
# times. 11.d: 6, and grey and noise. Usual: fewer than 6, because a model "must" refuse, and the
# absent object among the unsure ones. 11.e: "yes", "picture". Usual: "text", from stories about
# language priors. 11.f: 4 and 3. Usual: 0 and 0, "a table has one number a row, so it is sure".
# 11.g: 5, 5, 10.
#
# **Open questions.** "Is a white picture's 'white' a hallucination?" There is no object, so the
# question does not fit; as a description of the pixels it is true. The paper's definition (likely
# from the text alone, or ungrounded) does not cover it. "Why is the MLP better here?" A guess is in
# the text. An experiment: shuffle the features' places for both, or give the Resampler more latents
# (*large resampler* in the table: that is not it).
#
# **Misconceptions.** "Not told means equal": it means that five runs cannot tell. "The lowest mean
# is the worst row": see no clips. "Faster means better": 100 steps measure how fast a row learns.
# "A sure answer is a right one": see the absent object. "An error bar of 2,000 questions covers the
# seed": it does not, it is another error.
#
# **To cut.** First exercise 11.1, then the loss curves without clips, then the library's source.

# %% [markdown]
# ## The picture and the letters
#
# The ablations of Flamingo ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198)), on its 3B model
# with 4 shots. Each row changes one thing; "overall" is one
# number for five benchmarks.

# %%
import json

import numpy as np

from miniflamingo import plots, xattn
from miniflamingo.ablations import commands
from miniflamingo.ablations.stage import CHANCE, TASKS, lm_from_scratch, no_gate
from miniflamingo.attention import attention
from miniflamingo.course import ablations, check, guess, show, source, told
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.prompt import IMAGE, WordTokenizer, build_batch
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds import datasets, grammar, shapes
from miniflamingo.worlds.grammar import COLOUR_IDS, TOKENIZER

# %%
paper = {
    "baseline": 70.7, "no gate": 66.5, "MLP resampler": 66.6, "one layer": 59.8,
    "all previous images": 63.5, "LM from scratch": 57.8,
}  # fmt: skip
others = {"LM fine-tuned": 62.7, "without M3W": 53.4, "without pairs": 60.9, "without video": 67.3,
          "round robin": 62.9, "no image first (p = 0)": 69.6, "vanilla xattn": 66.9}  # fmt: skip
show(
    plots.plot_dots(
        {"paper, overall score": {n: [v] for n, v in (paper | others).items()}},
        reference="baseline", digits=1,
    ),
    alt="The overall score of thirteen rows of the paper's ablation table, one dot each. The "
    "baseline has 70.7. Without interleaved pages, M3W, it is lowest, 53.4, then LM from scratch "
    "57.8 and one inserted layer 59.8; no gate has 66.5.",
)  # fmt: skip

# %% [markdown]
# | letter | meaning | here |
# |---|---|---|
# | E | rows of a table: models that are compared | 6 live, 26 in the committed data |
# | n | runs of one row, with different seeds | 1 live, 5 in the committed data |
# | φ, B, L, N, R, K | as in module 07 | |
#
# One dot a row: the table has one number for each, and no error. At that price no one repeats a
# run, but it means that a difference of one point may be chance. Here a run takes seconds, so we
# can repeat it.

# %% [markdown]
# ## The derivation
#
# **One number for five benchmarks.** Their scores have different kinds (accuracies, CIDEr above
# 100), so each is divided by the best fine-tuned score before the mean is taken:
#
# $$\mathrm{overall} = \frac{100}{5} \sum_{i=1}^{5} \frac{\mathrm{score}_i}{\mathrm{tuned}_i}
# \qquad\qquad (1)$$
#
# **A difference and its error.** Training has a seed: other first weights, other batches. Two rows
# with n and m runs, means $\bar a$ and $\bar b$, and variances $v_a$ and $v_b$ over the runs:
#
# $$d = \bar a - \bar b, \qquad \mathrm{se}(d) = \sqrt{v_a / n + v_b / m}, \qquad
# v = \frac{1}{n - 1} \sum_i (a_i - \bar a)^2 \qquad\qquad (2)$$
#
# With three runs of each the variance itself is badly known: by Student's t, chance alone gives
# more than 2 se in 12 % of such comparisons, and more than 3 se in 4 %. And a score has a second
# error, from the finite test (module 10).

# %% [markdown]
# ### Exercise 11.1: the overall score
#
# ★☆☆ · 4 minutes · 1 line. Write equation (1): `scores` [E, 5], `tuned` [5]. Return [E].
#
# <details><summary>Hint 1</summary>
#
# `scores / tuned` divides each column by its own number.
#
# </details>


# %% tags=["exercise"]
def overall(scores, tuned):  # [E, 5], [5] -> [E]
    ...  # your code


# %% tags=["solution"]
def overall(scores, tuned):  # [E, 5], [5] -> [E]
    return 100 * (scores / tuned).mean(axis=1)  # equation (1)


# %%
check("11.1", overall)

# %% [markdown]
# ### Exercise 11.2: is it a difference?
#
# ★★☆ · 7 minutes · 2 or 3 lines. Write equation (2): a [n] and b [m] are scores of single runs.
# Return [2]: d and its standard error.
#
# <details><summary>Hint 1</summary>
#
# `a.var(ddof=1)` divides by n − 1. With n = 3 that matters: n would make it a third too small.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The variances of the two means add: `a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)`.
#
# </details>


# %% tags=["exercise"]
def difference(a, b):  # [n], [m] -> [2]
    ...  # your code


# %% tags=["solution"]
def difference(a, b):  # [n], [m] -> [2]
    variance = a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)
    return np.array([a.mean() - b.mean(), np.sqrt(variance)])  # equation (2)


# %%
check("11.2", difference)

# %% [markdown]
# ## The experiment
#
# A small bridge (one resampler layer, three inserted layers) between the package's frozen encoder
# and language model, and five rows that change one thing each:

# %%
source(no_gate)
source(ablations.one_layer)
source(lm_from_scratch)

# %% [markdown]
# The MLP and "all previous images" are settings of the library's config. Two words on fairness.
# *Same data, same steps, same rates* is a choice: a row might want another rate. And *one layer*
# and the *MLP* have other numbers of weights that learn, as in the paper.

# %%
stages = {row: ablations.Ablation(row) for row in ablations.CONFIGS}
for row, stage in stages.items():
    print(f"{row:<20} {stage.model.num_parameters(trainable_only=True):>8,} numbers learn")

# %% [markdown]
# **Predict, then run:** 100 steps on documents of three captioned pictures, asked about the *last*
# of three fresh ones. Three baselines with other seeds are the yardstick. Which of the five other
# rows lie below all three of them in the colour word, and which above all three? (Two lists of the
# rows' names as they stand above, in quotes; `[]` for none.)

# %%
guess("11.a", below=..., above=...)

# %% tags=["volatile"]
pool = stages["baseline"].pool
fresh = ablations.fresh_pool(stages["baseline"])
losses, live = {}, {row: [] for row in stages}
for row, stage in stages.items():
    stage.pool = pool  # the frozen features are the same for all
    losses[row] = ablations.train(stage)
    live[row].append(ablations.examine(stage.model, fresh, samples=100))

# %% [markdown]
# And the baseline with two more seeds. That spread is the yardstick for all the differences:

# %% tags=["volatile"]
for seed in (1, 2):
    stage = ablations.Ablation("baseline", seed, pool=pool)
    ablations.train(stage)
    live["baseline"].append(ablations.examine(stage.model, fresh, samples=100))


# %%
def panels(rows, questions):  # -> {question: {row: [scores of the runs]}}
    return {q: {row: [r[q] for r in runs] for row, runs in rows.items()} for q in questions}


# %% tags=["reveal", "volatile"]
yard = [run["colour"] for run in live["baseline"]]
colours = {row: runs[0]["colour"] for row, runs in live.items() if row != "baseline"}
told(
    "11.a",
    below=[row for row, x in colours.items() if x < min(yard)],
    above=[row for row, x in colours.items() if x > max(yard)],
)

# %% tags=["reveal", "volatile"]
show(
    plots.plot_dots(
        panels(live, ("colour", "shape")), "baseline", xlabel="accuracy", limits=(0, 1)
    ),
    alt="The live runs: two panels, colour and shape words of captions, a dot for each run of six "
    "rows. The baseline has three dots, whose spread is the yardstick, and every other row one.",
)

# %% [markdown]
# Each row with one dot differs from the baseline's three by more than they differ from one another,
# or it does not, and only the first kind is news.
#
# <details><summary>After the run</summary>
#
# In the committed run, no gate and the MLP learned the colours *faster* than all three baselines.
# All previous images, one layer and the LM from scratch fell behind all three. Each of these five
# is one seed.
#
# </details>
#
# But a run of 100 steps is in the middle of learning, and to be earlier is not yet to be better.
#
# ## The longer runs
#
# `python -m miniflamingo ablate` made the file that follows: 26 rows, five seeds of each, 900
# steps, nine times the live runs. Four data sets are mixed: interleaved documents of
# examples with invented names, captions and questions; captions of one object; captions of two; and
# clips. There are four tasks, and *overall* is their mean. The pictures have clutter beside what
# they are about, so that a resampler has something to leave out.

# %%
data = commands.committed()
about, rows, compared = data["about"], data["rows"], data["compared"]
hours = sum(run["seconds"] for runs in rows.values() for run in runs) / 3600
print(about["command"], "|", about["date"], "| NumPy", about["numpy"], "|", about["machine"])
print(f"{len(rows)} rows, {len(rows['baseline'])} seeds, {about['steps']} steps, {hours:.1f} hours "
      f"of one core; {about['samples']} questions of each kind")  # fmt: skip

# %% [markdown]
# **Pairs.** With one seed, all rows start from the same frozen parts and read the same pictures. A
# seed that is hard for one row may be hard for all. So take the difference first, seed by seed, and
# then its mean and its error:
#
# $$d_i = a_i - b_i, \qquad \mathrm{se}(\bar d) = \sqrt{v_d / n} \qquad (3)$$
#
# where $v_d$ is the variance of the differences. The interval is $\bar d \pm 2.8 \,
# \mathrm{se}$: for five seeds Student's t has its middle 95 % between −2.8 and 2.8.
#
# **Many comparisons.** The file compares 24 rows with a baseline. Were none of them different, 5 %
# each would still give one false finding or more in most such tables. Holm's correction: sort the
# p-values, multiply the smallest by 24, the next by 23, and so on. A row is *told* if its corrected
# p stays below 0.05.
#
# **Predict, then run:** which of these nine rows are told to be worse than the baseline in the
# overall score (a list of names), and which one is the lowest (a name)?

# %%
nine = ("no interleaved documents", "no captions", "no clips", "round robin", "no gate",
        "MLP resampler", "all previous images", "LM tuned", "LM from scratch")  # fmt: skip

# %%
guess("11.b", worse=..., lowest=...)

# %% tags=["reveal"]
mean = {row: np.mean([run["overall"] for run in rows[row]]) for row in nine}
worse = [
    row for row in nine if compared[row]["adjusted"] < 0.05 and compared[row]["difference"] < 0
]
told("11.b", worse=worse, lowest=min(mean, key=mean.get))

# %% tags=["reveal"]
some = {row: rows[row] for row in ("baseline", *nine)}
marks = {task: {"chance": CHANCE[task]} for task in TASKS}
show(
    plots.plot_dots(
        panels(some, TASKS), "baseline", xlabel="share right", limits=(0, 1), marks=marks
    ),
    alt="Ten rows, the baseline and the nine, in four panels: whole captions, the colour of one of "
    "two, binding after 16 shots, motion; five dots, one a seed, for each. "
    "All previous images and LM from scratch lie at chance in binding; without clips most dots lie "
    "at chance everywhere.",
)

# %% [markdown]
# The whole family: the paper's difference in points, ours as a share with its 95 % interval over
# seeds, and what can be said.

# %% tags=["reveal"]
print(f"{'':<27} paper   ours, 95 % interval              p")
for row, found in compared.items():
    points = "" if found["paper"] is None else f"{found['paper']:+.1f}"
    print(f"{row:<27} {points:>5}  {found['difference']:+.3f} ({found['low']:+.3f} to "
          f"{found['high']:+.3f})  {found['adjusted']:.3f}  {found['verdict']}")  # fmt: skip

# %% [markdown]
# <details><summary>After the run</summary>
#
# - **Interleaved documents** buy most of all that is told, as in the paper: without them no name is
#   learned from examples (0.00), and the form of a question was never seen.
# - **No clips** is the lowest, and yet it is not told. Its runs are of two kinds, and the figure
#   after next shows them.
# - **Round robin** takes one data set a step, and so reads a quarter of the documents in as many
#   steps: told, and in the paper's direction.
# - **All previous images** and **LM from scratch** lose binding altogether: it is at chance after
#   16 shots. Both are told, and in the paper's direction. So is *grafting*, which loses the same.
# - **LM tuned** loses little, if anything. What it does lose is not in this table; see below.
# - **No captions** loses captions, of course, but the interleaved documents have some, too: not
#   told.
# - **No gate** loses nothing, and all five seeds are a little *above* the baseline. In the paper it
#   loses 4.2 points. A gate that starts at 0 protects what a large LM knows from layers that know
#   nothing. Our LM has three blocks, and every row of the table was trained at one rate; below are
#   other depths and rates.
# - **The MLP** is told to be *better*, the opposite of the paper's finding. It gains where the
#   colour of one of *two* objects is asked. It reads the 36 features in their order and so knows
#   for nothing where a thing is, which our Resampler has to learn; that is a guess. The paper does
#   not say what its MLP looked like, and one as ours is bound to one size of picture.
# - What else is not told, among it vanilla cross-attention, the Transformer resampler, every second
#   layer and the choice of p, is not shown to be equal. The paper's differences are 0.8 to 4.0
#   points there, and five seeds of ours cannot tell so little.
#
# </details>

# %% [markdown]
# One more column of the file is the language model itself: the few-shot question in words alone,
# without any picture.

# %% tags=["reveal"]
for row, runs in rows.items():
    if (
        abs(np.mean([run["text"] - base["text"] for run, base in zip(runs, rows["baseline"])]))
        > 0.01
    ):
        print(f"{row:<27}", *(f"{run['text']:.2f}" for run in runs))
print(f"{'all others':<27}", *(f"{run['text']:.2f}" for run in rows["baseline"]))

# %% [markdown]
# `skip_without_image` skips the new layers where no picture was seen yet (module 09), so nearly
# every row *is* its frozen LM there. Without that option most of it is lost, with new layers on top
# some; and an LM that is tuned on pages with pictures has forgotten how to bind names in text. That
# is the reason to freeze it that one sees even at this size.
#
# And why is the interval of *no clips* so wide? Look at its five seeds while they learn:

# %%
steps = np.arange(100, about["steps"] + 1, 100)
curves = {f"seed {r['seed']}": [r["losses"][t // 10 - 1] for t in steps] for r in rows["no clips"]}
show(
    plots.plot_lines(steps, curves, "step", "weighted loss", log=False),
    alt="The weighted loss of five runs without clips against the step, 100 to 900. Seeds 0 and 4 "
    "fall from 1.5 to 0.6, seed 4 from step 200 on and seed 0 from step 400; the other three stay "
    "near 1.4.",
)

# %% [markdown]
# Two runs left the plateau, three never did, and in two of those the attention gates are still
# below 0.03 at the end. The mean of such a row describes none of its runs, and a t-test that sees
# two kinds rightly says that it does not know. Would more steps help? These two rows were trained
# again, with 1,800 steps and a schedule of that length:

# %%
longer = json.loads(commands.QUOTED["longer"].read_text("utf-8"))["rows"]
for question in ("overall", "one of two"):
    for row, runs in longer.items():
        print(f"{question:<10}  {row:<8}", *(f"{run[question]:.2f}" for run in runs))

# %% [markdown]
# Twice the steps do not help: four of five stay on the plateau, one of them a seed that had left it
# under the shorter schedule. So clips are more than one more task. Motion is learned first, and it
# seems to be what opens the gates for the rest.
#
# And the baseline was not done after 900 steps. It gains most where one of two is asked, and ends
# where the MLP had been after half as many. So what we were told of the MLP is above all that it
# learns *faster*.

# %% [markdown]
# ### Where is the gate worth something? (optional)
#
# In the paper the model without gates is 4.2 points worse, and its training became unstable. Ours
# was a little better, at three blocks and one rate. A 3B model has more blocks, and a rate is a
# choice. So both were trained again at three depths of the language model, a gated layer before
# each block, and at four rates (`python -m miniflamingo ablate --stability`).
#
# **Predict, then run:** at three times the table's rate, 0.01, which is better on average with 3
# blocks, and which with 12 ("gate" or "no gate")? And which at ten times, 0.03, at all depths?

# %%
guess("11.c", three=..., twelve=..., at_ten_times=...)

# %% tags=["reveal"]
stability = commands.committed(stability=True)["rows"]


def better(depth, rate):
    both = ("gate", "no gate")
    return max(both, key=lambda gate: np.mean(
        [run["overall"] for run in stability[f"{depth} blocks, rate {rate}, {gate}"]]))  # fmt: skip


at_ten_times = {better(depth, 0.03) for depth in (3, 6, 12)}
assert len(at_ten_times) == 1
told("11.c", three=better(3, 0.01), twelve=better(12, 0.01), at_ten_times=at_ten_times.pop())

# %% tags=["reveal"]
depths = {
    f"{depth} blocks": {
        row.removeprefix(f"{depth} blocks, "): [run["overall"] for run in runs]
        for row, runs in stability.items() if row.startswith(f"{depth} blocks")
    } for depth in (3, 6, 12)
}  # fmt: skip
show(
    plots.plot_dots(depths, xlabel="overall", limits=(0, 1)),
    alt="Three panels, language models of 3, 6 and 12 blocks: the overall score at rates 0.001, "
    "0.003, 0.01 and 0.03, with the gate and without, three dots each. Up to 0.003 all lie "
    "around 0.7 to 0.9. At 0.01 no gate is ahead with 3 blocks, and with 12 two of its three dots "
    "are behind. At 0.03 all are below 0.4, and no gate is the lower one on average.",
)

# %% tags=["reveal"]
for gate in ("gate", "no gate"):
    names = [run["4-way, 16 shots"] for run in stability[f"12 blocks, rate 0.01, {gate}"]]
    print(f"12 blocks, rate 0.01, {gate:<7} 4-way after 16 shots:", *(f"{x:.2f}" for x in names))

# %% [markdown]
# <details><summary>After the run</summary>
#
# Up to the table's rate of 0.003 the model without gates is a little ahead with 3 and 6 blocks, and
# level with 12. At 0.01 it depends on the depth: with 3 blocks *no gate* is ahead in all three
# seeds; with 12 two of three seeds lose what the gate keeps, names from examples (the two lines
# above), and the third loses nothing. At 0.03 hardly anything is learned; with gates a little more
# on average, but only in seven of the nine pairs.
#
# So there is a trace of the paper's finding where layers are many and steps are large: two runs
# fail and one does not, which is what *unstable* means. A reason could be that a gate that starts
# at 0 lets the new layers come in slowly, while without it all of them disturb the stream from the
# first step on, and that a small rate makes up for it; this was not measured. It is a trace and no
# more: none of the twelve pairs, three seeds each, is told after Holm's correction. And α learns at
# ten times the rate in all of these, so a large rate is very large for the gates, which may be what
# they suffer from with 3 blocks.
#
# </details>

# %% [markdown]
# ### Exercise 11.3: all ways to divide the runs (optional)
#
# ★★★ · 15 minutes · 8 to 12 lines. Student's t believes that scores are normally distributed. Here
# is a test that believes less, and needs no variance: if row and baseline were the same, any
# division of all their runs into a group of n and one of m would be as likely as the one that was
# observed. p is the share of all divisions whose means differ, in either direction, by as much as
# the observed ones, or more. `rows` is a list of arrays, of different lengths, `baseline` [m].
# Return p for each row, [E].
#
# <details><summary>Hint 1</summary>
#
# `itertools.combinations(range(n + m), n)` are all groups of n places. Put a's and the baseline's
# scores into one array.
#
# </details>
# <details><summary>Hint 2</summary>
#
# An array of truths picks a group, `scores[mine]`, and `scores[~mine]` picks the others. Let
# rounding not decide: compare with `observed - 1e-9`.
#
# </details>

# %%
from itertools import combinations


# %% tags=["exercise"]
def divide(rows, baseline):  # E arrays, [m] -> [E]
    ...  # your code


# %% tags=["solution"]
def divide(rows, baseline):  # E arrays, [m] -> [E]
    p = []
    for a in rows:
        scores, observed = np.concatenate([a, baseline]), abs(a.mean() - baseline.mean())
        hits = []
        for chosen in combinations(range(len(scores)), len(a)):
            mine = np.isin(np.arange(len(scores)), chosen)
            d = abs(scores[mine].mean() - scores[~mine].mean())
            hits.append(d >= observed - 1e-9)
        p.append(np.mean(hits))
    return np.array(p)


# %%
check("11.3", divide)

# %%
from miniflamingo.course.checks.module_11 import divided

for question in ("caption", "4-way, 16 shots"):
    base, *others = (np.array([run[question] for run in runs]) for runs in some.values())
    p = divided(others, base)
    print(f"{question:<16}", ", ".join(f"{row} {x:.3f}" for row, x in zip(nine, p)))

# %% [markdown]
# With five runs against five there are 252 divisions, and the observed one and its mirror image
# always count: p cannot be below 2/252 = 0.008, however large the difference. Holm multiplies that
# by 24, and no row at all could be told. What believes less needs more runs. With three seeds, more
# than many a table has, the least p is 0.10: three can make us attentive; they cannot convince.

# %% [markdown]
# ## All previous images, closely (optional)
#
# **Attention to all previous images**:
#
# $$o_\ell = \sum_{n \le \phi(\ell)} \sum_r p_{\ell,(n,r)} \, v_{n,r}, \qquad p_{\ell} =
# \mathrm{softmax}_{n \le \phi(\ell),\, r} \big( q_\ell^\top k_{n,r} / \sqrt{K} \big), \qquad
# o_\ell = 0 \ \text{ where } \phi(\ell) = 0 \qquad (4)$$
#
# With loops:


# %%
def attend_all_loop(q, k, v, phi):  # [B, L, K], [B, N, R, K] twice, int[B, L] -> [B, L, K]
    out = np.zeros_like(q)
    for b, l in np.ndindex(phi.shape):
        if n := phi[b, l]:
            keys, values = (np.concatenate(x[b, :n]) for x in (k, v))  # images 1 to n
            out[b, l] = attention(q[b, l, None], keys, values)[0]  # equation (4)
    return out


# %% [markdown]
# Without the loop it is exercise 7.4 with `<=` in the place of `==`. The library has it as an
# option, `only_last=False`, by the dense mask:

# %%
source(xattn._attend_to_all_previous)

# %%
page = "<BOS> Two pets. <EOC> <image> My puppy. <EOC> <image> My cat. <EOC>"
tokenizer = WordTokenizer.from_texts([page])
tokens = np.array([tokenizer.encode(page)])
phi, rng = xattn.compute_phi(tokens, IMAGE), np.random.default_rng(0)
q = rng.normal(size=(1, tokens.shape[1], 8))
k, v = rng.normal(size=(2, 1, 2, 4, 8))  # 2 images of 4 visual tokens


# %%
def one_head(attend):  # an attention with heads -> one without
    return lambda q, k, v, phi: attend(q[:, :, None], k[:, :, :, None], v[:, :, :, None], phi)[
        :, :, 0
    ]


library = one_head(xattn._attend_to_all_previous)
assert np.allclose(attend_all_loop(q, k, v, phi), library(q, k, v, phi), rtol=1e-12)

# %% [markdown]
# **Why might it cost so much?** A model that may look at all images must learn which one a word is
# about. One that sees the last image alone is told. And the number of keys grows with the page, to
# lengths never trained. That is an argument, not a measurement. What follows is no ablation either,
# since these weights were trained to see one image: let the shipped model look at all previous
# ones, and ask for captions of the first, second and third picture.

# %%
from unittest.mock import patch

model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
rng = np.random.default_rng(1)
asked = datasets.caption_documents(fresh, 200, 3, rng, ablations.CLASSES)
visual = model.resampler(fresh.images[:, None])[:, 0][asked.pictures]


def captions_right():  # -> [3], for each picture: are all four words of its caption right?
    said = model.read(asked.tokens, visual, xattn.compute_phi(asked.tokens, IMAGE)).argmax(axis=-1)
    starts = [1 + 6 * n for n in range(3)]  # <BOS>, then <image> a small red circle <EOC>
    right = [said[:, s : s + 4] == asked.tokens[:, s + 1 : s + 5] for s in starts]
    return [r.all(axis=1).mean() for r in right]


# %%
print("its own image      ", *(f"{x:.1f}" for x in captions_right()))
with patch.object(xattn, "image_causal_attention", xattn._attend_to_all_previous):
    print("all previous images", *(f"{x:.1f}" for x in captions_right()))

# %% [markdown]
# ## Limits: hallucination
#
# The paper names its model's limits: hallucination, that is, an answer that is likely from the text
# alone, or invited by a question that does not fit the picture, or an ungrounded guess; social
# bias, offensive text, leaking private data; classification below that of contrastive models; and
# in-context learning that is sensitive to its examples. The first we can measure on the package's
# model. Six situations, 60 pictures each, and always a question about a colour:

# %%
model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
B, rng = 60, np.random.default_rng(0)
seen = datasets.SEEN & grammar.GEOMETRIC
colour, shape, size = grammar.draw_attributes((B,), seen, rng)
objects = shapes.draw_objects(colour, shape, size, rng, split="test")
two = grammar.draw_pair_attributes((B,), seen, rng)
pairs = shapes.draw_pairs(*two, rng, split="test")
absent = np.array([rng.choice([s for s in range(6) if s not in both]) for both in two[1]])
other = (colour + rng.integers(1, 8, B)) % 8
noise = np.clip(shapes.background(B, rng), 0, 1).astype(np.float32)

# %%
plain = ["what color ?"] * B
about_absent = [f"what color is {shapes.SHAPES[s]} ?" for s in absent]
claims = [
    f"a {shapes.SIZES[z]} {shapes.COLOURS[c]} {shapes.SHAPES[s]} what color ?"
    for z, c, s in zip(size, other, shape)
]
situations = {
    "an object": (objects, plain), "blank: grey": (np.full_like(objects, 0.5), plain),
    "blank: white": (np.ones_like(objects), plain), "noise alone": (noise, plain),
    "an absent object": (pairs, about_absent), "the text says another": (objects, claims),
}  # fmt: skip

# %% [markdown]
# **Predict, then run:** in how many of the six situations does the model answer with a colour in
# more than half of the pictures (a number)? And in which is it more than 90 % sure in less than
# half of them (a list of their names as they stand above, in quotes)? No training ever showed a
# picture without an object, or a question that does not fit.

# %%
guess("11.d", colour=..., unsure=...)


# %%
def next_word(media, texts):  # -> log-probabilities [B, V]
    prompts = [[picture, text] for picture, text in zip(media, texts)]
    batch = build_batch(prompts, TOKENIZER, 24, close=False)
    encoded = model.resampler(model.encode(batch.pixels), batch.num_frames)
    logits = model.read(batch.tokens, encoded, batch.phi)
    return log_softmax(logits[np.arange(len(media)), batch.lengths - 1])


# %%
logp = {name: next_word(*situation) for name, situation in situations.items()}
sure = {name: np.exp(x.max(axis=1)) for name, x in logp.items()}
answered = {name: np.isin(x.argmax(axis=1), COLOUR_IDS).mean() for name, x in logp.items()}

# %% tags=["reveal"]
for name, share in answered.items():
    print(f"{name:<22} answers with a colour {share:.1f}, more than 90 % sure "
          f"{np.mean(sure[name] > 0.9):.1f}")  # fmt: skip
unsure = [name for name, x in sure.items() if np.mean(x > 0.9) < 0.5]
told("11.d", colour=sum(bool(share > 0.5) for share in answered.values()), unsure=unsure)

# %% tags=["reveal"]
show(
    plots.plot_dots({"probability of the answer": sure}, "an object", limits=(0, 1)),
    alt="Six rows of 60 dots, one for each situation and picture: the probability that the model "
    "gives its own answer, from 0 to 1.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# It *always* answers. There is no word for "nothing" in its answers, and no training asked for one.
#
# - On **grey and noise** it is unsure: an ungrounded guess that its probability gives away.
# - A **white** picture is a sure "white". Is that a hallucination, or the truth about the picture?
# - The **absent object** is the bad case: the question takes for granted that there is one, and the
#   model answers, mostly sure.
#
# </details>
#
# ### Invited answers (optional)
#
# **Predict, then run:** asked about an absent object, does the model mostly name the colour of an
# object that is there ("yes" or "no")? And where the text says another colour than the picture
# shows, which of them wins mostly, "picture" or "text"?

# %%
guess("11.e", colour_there=..., winner=...)

# %% tags=["reveal"]
named = COLOUR_IDS[two[0]]  # [B, 2], the colours of the two objects that are there
there = (logp["an absent object"].argmax(1)[:, None] == named).any(1).mean()
said = logp["the text says another"].argmax(axis=1)
wins = {"picture": np.mean(said == COLOUR_IDS[colour]), "text": np.mean(said == COLOUR_IDS[other])}
print(f"absent: the colour of one that is there {there:.1f}; the text against the picture: the "
      f"picture wins {wins['picture']:.1f}, the text {wins['text']:.1f}")  # fmt: skip
told("11.e", colour_there="yes" if there > 0.5 else "no", winner=max(wins, key=wins.get))

# %% [markdown]
# <details><summary>After the run</summary>
#
# The picture wins. A likely reason, which we did not test: three in ten of the training's captions
# had a wrong colour word on purpose, not counted in the loss (module 09), so words about a colour
# could not be trusted. Nothing taught the model to distrust a question.
#
# </details>
#
# Look at some of the absent ones:

# %%
answers = [TOKENIZER.words[i] for i in logp["an absent object"].argmax(axis=1)]
texts = [f"{q} {a}: {p:.2f}" for q, a, p in zip(about_absent, answers, sure["an absent object"])]
show(
    plots.plot_answers(pairs[:6], texts[:6], np.ones(6, bool)),
    alt="Six pictures of two objects each, with a question below about a third object that is not "
    "there, and the model's answer with its probability; nearly every answer is a colour.",
)

# %% [markdown]
# ### Exercise 11.4: only answer when sure
#
# ★★☆ · 9 minutes · 3 lines. A remedy: answer only if the best word has a probability of at least
# `level`. `logp` [B, V], `truth` int [B]. Return [2]: the share of questions that are answered, and
# the accuracy *of those*: NaN where nothing is answered, as the mean of no numbers is.
#
# <details><summary>Hint 1</summary>
#
# An array of truths picks rows: `right[sure].mean()` is the mean over the sure answers alone.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Only the answer's own probability counts. That of the truth is not known when one answers.
#
# </details>


# %% tags=["exercise"]
def abstain(logp, truth, level):  # [B, V], int[B], float -> [2]
    ...  # your code


# %% tags=["solution"]
def abstain(logp, truth, level):  # [B, V], int[B], float -> [2]
    sure = np.exp(logp.max(axis=1)) >= level
    right = logp.argmax(axis=1) == truth
    return np.array([sure.mean(), right[sure].mean()])


# %%
check("11.4", abstain)

# %% [markdown]
# Mix the 60 good questions with 60 that have no answer, and raise the level:

# %%
for bad in ("noise alone", "an absent object"):
    both = np.concatenate([logp["an object"], logp[bad]])
    truth = np.concatenate([COLOUR_IDS[colour], np.full(B, -1)])  # nothing is right for the others
    right = both.argmax(axis=1) == truth
    for level in (0, 0.5, 0.9):
        kept = np.exp(both.max(axis=1)) >= level
        print(f"with {bad:<17} level {level:.1f}: answered {kept.mean():.1f}, right of those "
              f"{right[kept].mean():.1f}")  # fmt: skip

# %% [markdown]
# Abstaining removes the ungrounded guesses. Against the invited ones it does little: confidence
# says how clear the evidence *seems*, not whether the question has an answer.

# %% [markdown]
# ## Break it
#
# Bug 1: **one run a row**, as in nearly every published table. Suppose that only seed 0 had been
# run, or only seed 1, and so on. Each of the five would have given a table of differences, row by
# row, and none of them would have shown an error.
#
# **Predict, then run:** for how many of the nine rows does the *sign* of the difference to the
# baseline depend on the seed, in whole captions and in binding after 16 shots? (Two numbers.)

# %%
guess("11.f", caption=..., binding=...)

# %% tags=["reveal"]
turns = {}
for question in ("caption", "4-way, 16 shots"):
    scores = np.array([[run[question] for run in runs] for runs in some.values()])  # [E, seeds]
    d = scores[1:] - scores[0]
    turns[question] = (np.sign(d.min(axis=1)) != np.sign(d.max(axis=1))).sum()
    print(question)
    for row, line in zip(nine, d):
        print(f"    {row:<20}", *(f"{x:+.2f}" for x in line))
told("11.f", caption=turns["caption"], binding=turns["4-way, 16 shots"])

# %% [markdown]
# <details><summary>After the run</summary>
#
# With seed 0 or 4 alone, leaving out the clips would have cost nothing in captions and binding;
# with one of the others, everything. What protects you is equation (2) or (3): with n = 1 the
# variance is 0/0, so there is no error and no verdict. A table without errors is a table of single
# draws.
#
# </details>
#
# ### More bugs (optional)
#
# [flamingo-pytorch](https://github.com/lucidrains/flamingo-pytorch) and
# [open-flamingo](https://github.com/mlfoundations/open_flamingo) have the ablation of equation (4)
# as an option, `only_attend_immediate_media=False`. Both fill masked scores with a large negative
# number and go on. A token before the first image is then masked throughout, and its softmax is **a
# uniform average over all images, later ones included.**


# %%
def uniform_rows(q, k, v, phi):  # the bug: the same, but for `* mask`
    B, N, R, K = k.shape
    mask = np.repeat(np.arange(1, N + 1), R) <= phi[:, :, None]
    scores = np.where(mask, q @ k.reshape(B, N * R, K).swapaxes(1, 2) / np.sqrt(K), -1e9)
    return softmax(scores) @ v.reshape(B, N * R, K)


def reach(attend):  # how much each token changes when an image's keys and values do, [L, N]
    columns, unchanged = [], attend(q, k, v, phi)
    for j in range(2):
        step = np.where(np.arange(2) == j, 1.0, 0.0)[None, :, None, None]
        columns.append(abs(attend(q, k + step, v + step, phi) - unchanged).max(axis=-1)[0])
    return np.stack(columns, axis=1)


# %% [markdown]
# **Predict, then run:** the page has 5 tokens before the first image, 5 in the first image's chunk
# and 5 in the second's. How many of the 15 tokens does the *second* image reach, in each of three
# versions? (Three numbers.)

# %%
guess("11.g", own_image=..., all_previous=..., bug=...)

# %% tags=["reveal"]
words = [tokenizer.words[i] for i in tokens[0]]
versions = {"its own image": one_head(xattn.image_causal_attention),
            "all previous\nimages": library, "all previous,\nthe bug": uniform_rows}  # fmt: skip
changes = {name: reach(attend) for name, attend in versions.items()}
counts = [(change[:, 1] > 0).sum() for change in changes.values()]
told("11.g", own_image=counts[0], all_previous=counts[1], bug=counts[2])

# %% tags=["reveal"]
show(
    plots.plot_reach(words, phi[0], changes),
    alt="Three tables, 15 tokens by two images, for own image, all previous ones, and the bug: "
    "how much each token changes with each image. What is not a token's own image is marked.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# The middle table is an ablation: earlier images reach later tokens, as equation (4) says (the
# figure calls "leak" whatever is not a token's own image). The right one is a bug: *later* images
# reach *earlier* tokens. In training, the words before a picture can be read off that picture, so
# the loss looks better than it is; in use, what is said first depends on pictures yet to come.
#
# </details>

# %% [markdown]
# Shapes, NaNs and training losses are all in order; so is every test on a page that begins with an
# image. The check that finds it is the table above: change image j, and look at *every* token.

# %% [markdown]
# ## Limits, measured (optional)
#
# `python -m miniflamingo limits` asks the package's model (one training, seed 0) 1,000 questions of
# each kind, with 0 to 8 shots, and writes down what it finds:

# %%
from miniflamingo import limits

measured = json.loads(limits.RESULTS.read_text())["limits"]
absent, shots = measured["absent"], [str(k) for k in limits.SHOTS]


def share(figures, *names):  # of each number of shots
    return " ".join(f"{figures[k][names[0]][names[1]]['accuracy']:.3f}" for k in shots
                    if k in figures)  # fmt: skip


print("shots                                     ", *(f"{k:>5}" for k in shots))
print("sure above 0.9, the object is there       ", share(absent["plain"], "fits", "sure"))
print("sure above 0.9, it is not                 ", share(absent["plain"], "absent", "sure"))
print(
    "then the colour of one that is there      ",
    share(absent["plain"], "absent", "of what is there"),
)

# %%
declined = max(
    row[kind]["declined"]["accuracy"] for row in absent["remedy"].values() for kind in row
)
prior = max(row["prior"]["accuracy"] for row in measured["prior"]["shots agree"].values())
wrong = {m: row["right"]["accuracy"] for m, row in measured["wrong_labels"].items()}
print(f"shots that decline where they should: the model declines in at most {declined:.3f}")
print(f"up to 8 captions of one colour, then another: it follows the captions in {prior:.3f}")
print(
    "8 shots, m of them with a wrong name, right:",
    ", ".join(f"m = {m} {x:.2f}" for m, x in wrong.items()),
)

# %% [markdown]
# Asked about what is not there, the model nearly always names the colour of something that is, and
# in about three of four cases it is more than 90 % sure; more shots change neither. Shots that show
# how to decline, by a name for "there is none", teach it nothing: it never uses that name. It does
# *not* hallucinate from the text: captions of one colour do not make it repeat that colour. And it
# trusts its examples: the more of their names are wrong, the more of its answers are.

# %% [markdown]
# ## What came after (optional)
#
# **The same design, in the open.** [OpenFlamingo](https://arxiv.org/abs/2308.01390) and
# [IDEFICS](https://huggingface.co/blog/idefics), the latter with the open pages of
# [OBELICS](https://arxiv.org/abs/2306.16527), rebuilt Flamingo with public language models. Llama
# 3.2 Vision, described in [the Llama 3 paper](https://arxiv.org/abs/2407.21783), is the best known
# later model that kept cross-attention layers between blocks whose weights stay as they were. The
# reason given is this course's: with shut or skipped layers the text model *is* the text model.
#
# **Visual tokens in the sequence.** Most others went another way.
# [LLaVA](https://arxiv.org/abs/2304.08485) projects the encoder's features to the width of the
# language model and puts them between the words, where the model's *own* self-attention reads them.
# No new layers are needed, only a small projection; every tool that serves language models (caches,
# kernels, sharding) works unchanged; and the language model is fine-tuned, so that all of its
# layers learn to read pictures. The price is what Flamingo avoided: a picture costs places in the
# context ([LLaVA-1.5](https://arxiv.org/abs/2310.03744): 576 for each), in every layer, and the
# text model is no longer the one that it was.
#
# **Which is better?** [Idefics2](https://arxiv.org/abs/2405.02246), by IDEFICS's own authors,
# trained both ways. With frozen language model and encoder cross-attention came out ahead; once
# these were trained, too, the tokens in the sequence did. That fits this module's lesson: an
# ablation holds for the setting in which it was made.

# %% [markdown]
# ## Takeaways
#
# - An ablation is a difference, and a difference has an error. Repeat the baseline first.
# - At our size, with five seeds, five losses of the paper's are told: interleaved documents above
#   all, accumulation instead of round robin, a pre-trained LM, one image at a time, layers inside
#   instead of on top. One is told to be the opposite after 900 steps: the MLP. The gate buys
#   nothing here that can be told.
# - A row with two kinds of runs has no meaningful mean. Few steps measure the speed of learning,
#   and one run a row measures one draw.
# - The model answers whatever it is asked. Unsure guesses can be filtered; what a question takes
#   for granted can not.
#
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.3 (3.1.3 in its
# first version), the ablation table with its discussion (section 3.3 and the appendix; 4 in the
# first version); limits, hallucination and risks in the discussion and the appendix. **In the
# library:** `resampler`, `only_last` in `miniflamingo/flamingo.py`; `notebooks/ablations.py` is the
# experiment.
#
# **Next:** module 12, Triton from zero, and the forward kernel.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** A row has the scores 0.70, 0.72, 0.74 in three runs and the baseline 0.80, 0.60, 0.82. Is
# the row worse? Which of the two spreads decides?
#
# <details><summary>Answer</summary>
#
# d = 0.74 − 0.72 = 0.02. The variances are 0.0148 and 0.0004, so
# $\mathrm{se} = \sqrt{0.0148/3 + 0.0004/3} \approx 0.071$: not told at all. The baseline's spread
# decides; more runs of the *row* would hardly help.
#
# </details>
#
# **2.** After 300 steps row X is 0.3 behind the baseline, told. After 3,000 steps both are equal.
# Was the first finding wrong?
#
# <details><summary>Answer</summary>
#
# No, but it was a finding about speed: X learns more slowly under these rates. It was wrong only if
# someone wrote "X is worse". (It may also want another learning rate.)
#
# </details>
#
# **3.** You let the model abstain below 0.9. On a test with half noise pictures the accuracy of its
# answers rises from 0.5 to nearly 1. Can you promise the same for questions about absent objects?
#
# <details><summary>Answer</summary>
#
# No. On noise it is unsure, and its probability gives that away. About an absent object it is
# mostly sure, because the colour of another object is clearly seen: confidence measures how clear
# the evidence seems, not whether the question has an answer.
#
# </details>
