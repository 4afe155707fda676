# %% [markdown]
# # 09 Training: the mixture, and how alpha evolves
#
# **The question: four datasets, one model, and six shut gates. What does one step of training do,
# and in which order do the gates open?**
#
# After this module you can
#
# - write the weighted mixture objective and one update on it, from the loss to AdamW, by hand;
# - say which numbers of a Flamingo learn, and prove that the others stay as they were;
# - say from the gate's gradient what can and cannot happen in the first steps;
# - read a figure of how alpha evolves, and say what it shows and what it does not (optional: and
#   what does not hold in a model as small as ours);
# - optional: say why one batch of each dataset is better than one after the other.
#
# **You need:** the tanh gate and GATED XATTN-DENSE (module 08), φ (module 07), the frozen language
# model (module 06). The gradients come from the tape (module 02): a `with Tape() as tape:` around
# the forward pass, then `tape.backward(loss)`.
#
# **Time:** about 50 minutes for the core path, and 60 for what is marked optional. Computing takes
# about 22 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 6: the mixture's picture. 6 to 12: the derivation, equation by equation. 12 to
# 14: what learns. 14 to 20: exercise 9.1. 20 to 29: exercise 9.2 and guess 9.a. 29 to 36: exercise
# 9.3. 36 to 43: one step by hand, guess 9.b. 43 to 50: how alpha evolves, guesses 9.c and 9.d. 50
# to 55: the bug and the takeaways.
#
# **Predictions.** 9.a: 6. Usual: all of them, or 148,608, everything but the resampler. 9.b: 0.001
# and "no". Usual: different moves for different gradients (true of plain gradient descent), and
# "yes", for the same reason. 9.c: "no", and 2. Usual: "yes", since the gradients differ by a factor
# of 100. 9.d: 4 gates, and "yes". Usual: 0 and "no", from the paper's figure, which shows rising
# curves. 9.e: "yes". 9.f: "yes" and "nearly nothing". Usual: "no", because a gradient of 0 seems to
# mean that nothing moves. 9.g: bug 2 by check 4, bug 3 by check 3.
#
# **Open questions.** "Does a gate's different sign mean something?" No, see guess 9.e. "Is it the
# LM's pre-training on long text documents that makes 32 shots work?" In the world of glyphs it was
# measured, with an LM that read at most 5 shots, and two to four hundredths were lost: guess 10.g.
# With this module's LM it was not measured.
#
# **Misconceptions.** "A larger gate means that the layer looks at the picture more": the branch's
# size counts, too. "Frozen means gradient 0": it means that the optimiser does not have the weight.
# "The gates open in the order of the layers": they all set out in the first update. "λ is a
# probability": it weights a gradient.
#
# **To cut.** First "what learns", then the library's `Run.step`, then exercise 9.3 (its solution is
# one line of `update`).

# %% [markdown]
# ## The picture and the letters
#
# Training reads a *mixture* (Flamingo, [arXiv:2204.14198](https://arxiv.org/abs/2204.14198),
# section 2.4): interleaved documents, captions of one object, captions of two, and clips. The two
# pre-trained parts, language model (LM) and vision encoder, come from the package. Between them we
# put a new, untrained bridge. The settings are those of the package's own run, on a tenth of the
# pictures, half the batch, and with far fewer steps.

# %%
import copy
import json
import tempfile
from unittest.mock import patch

import numpy as np

from miniflamingo import plots, training, xattn
from miniflamingo.autograd import Tape
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.flamingo import PRESETS
from miniflamingo.prompt import IMAGE, PAD
from miniflamingo.training import WEIGHTS, AdamW, BridgeRun, BridgeStage, OptimiserConfig, Run
from miniflamingo.worlds.datasets import IGNORED

# %%
config = BridgeRun(
    OptimiserConfig(steps=60, warmup=20, alpha_rate=10.0),
    model=PRESETS["mini"],
    batches=(16, 8, 8, 6),
    pool_per_class=10, pool_pairs=300, pool_clips=100,
)  # fmt: skip
stage = BridgeStage(config, WEIGHTS / "lm", WEIGHTS / "vision")
start = copy.deepcopy(stage.model)  # as it is before the first step

# %% [markdown]
# The first document of each batch of the first step:

# %%
from miniflamingo.worlds.grammar import TOKENIZER

rng, rows = np.random.default_rng([config.seed, 1]), {}
batches = {name: stage.draw(name, rng) for name in stage.weights}
for name, batch in batches.items():
    L = int((batch.tokens[0] != PAD).sum())
    words = [TOKENIZER.words[i] for i in batch.tokens[0, :L]]
    rows[name] = words, (batch.targets[0, :L] != IGNORED) & (np.arange(L) > 0)

# %%
show(
    plots.plot_mixture(rows, stage.weights),
    alt="Four rows, one for each dataset, with the words of a document: documents, times 1; "
    "captions, times 0.2; pairs, times 0.4; clips, times 0.5. BOS and the image tags are grey, "
    "which is only read; all other words are blue, which counts in the loss. The four rows run "
    "into one line: sum of the gradients, one update.",
)

# %% [markdown]
# | letter | meaning | here | in the paper |
# |---|---|---|---|
# | m | a dataset, one of | 4 | 4: M3W, ALIGN, LTIP, VTP |
# | $\lambda_m$ | weight of dataset m | 1, 0.2, 0.4, 0.5 | 1, 0.2, 0.2, 0.03 |
# | $\theta$ | the numbers that learn | counted below | 1.4 billion in the 3B model |
# | $\eta_t$ | rate of update t | 2e-3 after 20, then falling | 1e-4 after 5,000, then constant |
# | c | most that the gradient's norm may be | 1 | 1 |
# | w | weight decay (0 for the resampler) | 0.01 | 0.1 |
# | $\alpha$ | one number a gate, two gates a layer | 3 layers | 24 layers |
# | | updates | 60 | 500,000 |

# %% [markdown]
# ## The derivation
#
# **The objective** is a weighted sum over the datasets $D_m$ of the text's negative log-likelihood,
# each word given the words before it and the images before it:
#
# $$\mathcal{L}(\theta) = \sum_{m} \lambda_m \; \mathbb{E}_{(x, y) \sim D_m} \Big[ -\sum_{\ell}
# \log p_\theta(y_\ell \mid y_{\lt \ell}, x_{\le \ell}) \Big] \qquad\qquad (1)$$
#
# Only *text* is predicted: no term of the sum has an `<image>` tag or padding as its $y_\ell$. One
# choice is ours: where (1) sums over the words of a document, the library takes the mean over the
# words of a batch, so that $\lambda_m$ alone says what a dataset counts, not the length of its
# texts.
#
# **The gradient** of a sum is the sum of the gradients. Each step takes one batch from *each*
# dataset, with the mean loss $\hat{\mathcal{L}}_m$, and adds up
#
# $$g = \sum_{m} \lambda_m \nabla_\theta \hat{\mathcal{L}}_m \qquad\qquad (2)$$
#
# before *one* update is made. Four datasets, four backward passes, one update.
#
# **The update.** First g is clipped: not each number, but the whole, so that the direction stays.
#
# $$g \leftarrow g \cdot \min(1, \; c / \lVert g \rVert_2) \qquad\qquad (3)$$
#
# Then Adam divides a running mean of g by a running root mean square. Weight decay is *decoupled*:
# it is no part of g, it pulls at the weight itself ([AdamW](https://arxiv.org/abs/1711.05101)).
# Hats: divided by $1 - \beta^t$. The m here is the running mean, not the index of a dataset.
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \quad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2,
# \quad \theta \leftarrow \theta - \eta_t \Big( \frac{\hat m}{\sqrt{\hat v} + \epsilon}
# + w\,\theta \Big) \qquad (4)$$
#
# **The warm-up** raises the rate linearly, because $\hat v$ of the first steps knows little:
#
# $$\eta_t = \eta \cdot \min(1, \; t / t_{warm}) \cdot \mathrm{fall}(t), \qquad \mathrm{fall} = 1
# \text{ in the paper, and half a cosine down to } 0.05 \text{ here} \qquad (5)$$
#
# **The gate.** With a branch b (attention or feed-forward) and the gradient $dy'$ of its output,
#
# $$y' = y + \tanh(\alpha)\, b \quad \Rightarrow \quad dy = dy', \qquad
# d\alpha = (1 - \tanh^2 \alpha)\, \langle dy', b \rangle, \qquad
# db = \tanh(\alpha)\, dy' \qquad (6)$$
#
# Put $\alpha = 0$ into (6): $d\alpha = \langle dy', b \rangle$, and $db = 0$. A shut gate learns,
# what stands behind it does not.

# %% [markdown]
# ## What learns
#
# A parameter learns if its `requires_grad` is true; the optimiser never hears of the others.

# %%
parts = {}
for name, p in stage.model.named_parameters():
    part = "gates" if "alpha" in name else name.split(".")[0]
    frozen, learns = parts.get(part, (0, 0))
    parts[part] = frozen + p.size * (not p.requires_grad), learns + p.size * p.requires_grad
for part, (frozen, learns) in parts.items():
    print(f"{part:<16}{frozen:>9,} frozen {learns:>9,} learn")

# %%
from miniflamingo.flamingo import FlamingoConfig, count_parameters

P = stage.model.num_parameters(trainable_only=True)
print(f"here: {P:,} of {stage.model.num_parameters():,} learn, {P / start.num_parameters():.0%}")
large = count_parameters(FlamingoConfig.preset("3B"))
learns = large["gated_xattn"] + large["resampler"]
print(f"3B:   {learns / 1e9:.2f} of {sum(large.values()) / 1e9:.2f} billion, ", end="")
print(f"{learns / sum(large.values()):.0%}")

# %% [markdown]
# The LM and the encoder do not move, so what the LM knew can not be trained away, and in memory a
# frozen number needs no gradient and no moments. To fine-tune the LM, too, lowers the paper's
# overall score from 70.7 to 62.7.

# %% [markdown]
# ## Which tokens count
#
# Token $\ell$ predicts token $\ell + 1$. With a loop, `IGNORED` (−100) marks what does not count:


# %%
def targets_loop(tokens):  # int[B, L] -> int[B, L-1]
    targets = np.full((tokens.shape[0], tokens.shape[1] - 1), IGNORED)
    for b, l in np.ndindex(targets.shape):
        if tokens[b, l + 1] not in (IMAGE, PAD):
            targets[b, l] = tokens[b, l + 1]  # a term of equation (1)
    return targets


# %% [markdown]
# ### Exercise 9.1: the targets without a loop
#
# ★☆☆ · 5 minutes · 2 or 3 lines. Return int [B, L−1]; `image` and `pad` are the two ids.
#
# <details><summary>Hint 1</summary>
#
# `tokens[:, 1:]` is what is to be predicted. Decide by *that*, not by the token that is read.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.where(condition, IGNORED, following)`; two conditions are joined with `|`.
#
# </details>


# %% tags=["exercise"]
def targets_of(tokens, image, pad):  # int[B, L], int, int -> int[B, L-1]
    ...  # your code


# %% tags=["solution"]
def targets_of(tokens, image, pad):  # int[B, L], int, int -> int[B, L-1]
    following = tokens[:, 1:]
    return np.where((following == image) | (following == pad), IGNORED, following)


# %%
check("9.1", targets_of)

# %% [markdown]
# The library marks them when it makes a document (in captions it leaves out some colour words, too,
# which are wrong on purpose). Its loss reads the pictures' features, which it keeps because the
# encoder is frozen, and compares the logits with the targets, shifted by one:

# %%
source(BridgeStage.loss)

# %%
for name in ("pairs", "clips"):
    assert np.array_equal(targets_loop(batches[name].tokens), batches[name].targets[:, 1:])

# %% [markdown]
# ## The mixture
#
# ### Exercise 9.2: the mixture's gradient
#
# ★☆☆ · 6 minutes · 1 to 4 lines. Write equation (2). `gradients[m]` is [B_m, P], one gradient for
# each example of dataset m; `weights[m]` is λ. The loss of a batch is the *mean* over its examples.
#
# <details><summary>Hint 1</summary>
#
# The gradient of a mean is the mean of the gradients: `gradients[m].mean(axis=0)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Start from 0 and *add* each dataset. There is nothing to divide by at the end.
#
# </details>


# %% tags=["exercise"]
def mixture(gradients, weights):  # {m: [B_m, P]}, {m: lambda} -> [P]
    ...  # your code


# %% tags=["solution"]
def mixture(gradients, weights):  # {m: [B_m, P]}, {m: lambda} -> [P]
    return sum(weights[m] * g.mean(axis=0) for m, g in gradients.items())  # equation (2)


# %%
check("9.2", mixture)

# %% [markdown]
# A tape does the adding by itself: `backward` *adds* to every `p.grad`. And since the gradient is
# linear in the gradient that it starts from, to start from λ instead of 1 weights the dataset:


# %%
def accumulate(stage, batches):  # equation (2), into the p.grad of everything that learns
    stage.model.zero_grad()
    for name, batch in batches.items():
        with Tape() as tape:
            loss = stage.loss(batch)
        tape.backward(loss, np.float32(stage.weights[name]))


# %% [markdown]
# **Predict, then run:** before the first step all gates are shut. Of all the numbers that learn, a
# quarter of a million, how many have a gradient that is not 0?

# %%
guess("9.a", numbers=...)

# %% tags=["reveal"]
accumulate(stage, batches)
learning = [(name, p) for name, p in stage.model.named_parameters() if p.requires_grad]
alive = {name: p.grad for name, p in learning if np.any(p.grad)}
print(len(alive), "parameters of", len(learning), "have a gradient other than 0:")
print("\n".join(f"{name}  {float(grad):+.2f}" for name, grad in alive.items()))
told("9.a", numbers=sum(np.count_nonzero(grad) for grad in alive.values()))

# %% [markdown]
# <details><summary>After the run</summary>
#
# Six scalars of a quarter of a million numbers. The resampler has none either: whatever it sends
# goes through a shut gate. And the others are exactly 0, not small.
#
# </details>

# %% [markdown]
# ### Exercise 9.3: clip by the global norm
#
# ★★☆ · 7 minutes · 2 or 3 lines. Write equation (3) for a *list* of arrays of any shapes, the
# gradients of several parameters, and return the list. The norm is that of all of them together.
#
# <details><summary>Hint 1</summary>
#
# $\lVert g \rVert^2$ is the sum of the squares of *all* numbers in all arrays.
#
# </details>
# <details><summary>Hint 2</summary>
#
# One factor for all: `min(1, most / norm)`. Multiply each array with it.
#
# </details>


# %% tags=["exercise"]
def clip(gradients, most):  # [array, ...], float -> [array, ...]
    ...  # your code


# %% tags=["solution"]
def clip(gradients, most):  # [array, ...], float -> [array, ...]
    norm = np.sqrt(sum((g * g).sum() for g in gradients))
    return [g * min(1, most / norm) for g in gradients]  # equation (3)


# %%
check("9.3", clip)

# %% [markdown]
# ### Exercise 9.4: a training loop (optional)
#
# ★★★ · 20 minutes · 10 to 15 lines. Write equations (2) to (5) for one vector of weights.
# `gradients[m]` is a function: theta [P] → the gradient of dataset m's mean loss, [P]; `weights[m]`
# is λ. `theta` [P] is the start; then come `steps`, the `rate` η, `warm` (the updates of the
# warm-up), `most` (c) and `decay` (w). fall(t) is 1, β1 = 0.9, β2 = 0.999, ε = 1e-8. Return [steps
# + 1, P]: theta at the start and after each update.
#
# <details><summary>Hint 1</summary>
#
# The order within an update t = 1, 2, ...: add up the weighted gradients, clip the sum, update m
# and v, divide both by 1 − β^t, take the step.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `theta = theta - ...` makes a new array each time. `theta -= ...` changes the one that is already
# in your list, and the argument, too.
#
# </details>


# %% tags=["exercise"]
def train_by_hand(gradients, weights, theta, steps, rate, warm, most, decay):  # -> [steps + 1, P]
    ...  # your code


# %% tags=["solution"]
def train_by_hand(gradients, weights, theta, steps, rate, warm, most, decay):  # -> [steps + 1, P]
    m, v, path = np.zeros_like(theta), np.zeros_like(theta), [theta]
    for t in range(1, steps + 1):
        g = sum(weights[name] * gradients[name](theta) for name in gradients)  # (2)
        g = g * min(1, most / np.sqrt((g * g).sum()))  # (3)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        pace = rate * min(1, t / warm)  # (5)
        theta = theta - pace * (direction + decay * theta)  # (4)
        path.append(theta)
    return np.array(path)


# %%
check("9.4", train_by_hand)

# %% [markdown]
# ## One step by hand, then the library's
#
# Equations (3) to (5), parameter by parameter. `moments[name]` is (m, v) and t counts from 1. The
# gates have ten times the rate of the rest (`alpha_rate`, a choice of ours that the paper does not
# have: 60 or 1,800 steps are few for a number that starts at 0).


# %%
def update(learning, moments, t, o):
    norm = np.sqrt(sum((p.grad**2).sum() for _, p in learning))
    for name, p in learning:
        (m, v), g = moments[name], p.grad * min(1, o.clip / norm)  # (3)
        m += (1 - o.beta1) * (g - m)
        v += (1 - o.beta2) * (g * g - v)
        direction = m / (1 - o.beta1**t) / (np.sqrt(v / (1 - o.beta2**t)) + 1e-8)
        decay = o.weight_decay * (p.ndim > 1 and not name.startswith("resampler."))
        rate = training.scheduled_rate(o, t - 1) * (o.alpha_rate if "alpha" in name else 1)  # (5)
        p.data = p.data - rate * (direction + decay * p.data)  # (4)


# %% [markdown]
# The library's step is the same with all numbers in one long vector:

# %%
source(Run.step)

# %% [markdown]
# Three steps of both, from the same start and with the same batches. They agree up to rounding,
# which Adam enlarges where it divides a tiny gradient by its own tiny size:

# %%
hand, rng = copy.copy(stage), np.random.default_rng([config.seed, 1])
hand.model = copy.deepcopy(start)
learning = [(name, p) for name, p in hand.model.named_parameters() if p.requires_grad]
moments = {name: (np.zeros_like(p.data), np.zeros_like(p.data)) for name, p in learning}
folder = tempfile.TemporaryDirectory()
run = Run(stage, folder.name)
records, path = [], [run.optimiser.weights.copy()]

# %%
for t in (1, 2, 3):
    accumulate(hand, {name: hand.draw(name, rng) for name in hand.weights})
    update(learning, moments, t, config.optimiser)
    records.append(run.step())
    path.append(run.optimiser.weights.copy())
by_hand = np.concatenate([p.data.ravel() for _, p in learning])
assert np.linalg.norm(by_hand - path[3]) < 1e-3 * np.linalg.norm(path[3] - path[0])

# %% [markdown]
# ## The gates open first
#
# In the first update only the six gates have a gradient. What moves, and by how much, depends on
# Adam, too.
#
# **Predict, then run:** the six gates had gradients of quite different sizes. By how much did each
# alpha move in the first update, at a rate of 2e-3 · 1/20 · 10 (a number, the same for all)? In the
# *second* update the gates are hardly open, and the branches' gradients are scaled by that. Do the
# branches move by less than a tenth of their rate, 2e-3 · 2/20 ("yes" or "no")?

# %%
guess("9.b", each_alpha=..., branches_hardly=...)

# %% tags=["reveal"]
movements = [run.optimiser.parts(path[t] - path[t - 1]) for t in (1, 2, 3)]
names = ["gates" if "alpha" in n else n for n in run.optimiser.names]
print("alpha after update 1:", np.round(records[0]["alpha_xattn"] + records[0]["alpha_dense"], 6))
for group in ("gates", "gated_xattn", "resampler"):
    most = [max(abs(d).max() for n, d in zip(names, m) if n.startswith(group)) for m in movements]
    print(f"{group:<12} most that a number moved in updates 1, 2, 3:", *(f"{x:8.1e}" for x in most))

# %% tags=["reveal"]
moves = [abs(d).max() for n, d in zip(names, movements[1]) if n.startswith("gated_xattn")]
hardly = max(moves) < training.scheduled_rate(config.optimiser, 1) / 10
first = round(float(max(abs(a) for a in records[0]["alpha_xattn"])), 5)
told("9.b", each_alpha=first, branches_hardly="yes" if hardly else "no")

# %% [markdown]
# <details><summary>After the run</summary>
#
# Both answers come from Adam. $\hat m / \sqrt{\hat v}$ of the very first update is g/|g|: a sign.
# So all gates set out at the same pace, whatever their gradient, and in a direction that is decided
# by the chance of the branch's random weights. The branches stand still in update 1, but for weight
# decay. From update 2 on they move at nearly full rate, since Adam divides their tiny gradient by
# its own tiny size. The gates are *first*, but by one update, not by hundreds; with plain gradient
# descent the branches would move in proportion to the gate, that is, hardly at all.
#
# </details>

# %% [markdown]
# ### The gate's gradient, checked (optional)
#
# The library's equation (6), and one inserted layer on random numbers. Both gates are shut, so
# $dy'$ reaches the first gate unchanged, and $\langle dy', b \rangle$ is what the tape must find:

# %%
source(xattn.tanh_gate_backward)

# %%
layer, noise = copy.deepcopy(start.gated_xattn[0]).astype(np.float64), np.random.default_rng(0)
y, media = noise.normal(size=(1, 6, 64)), noise.normal(size=(1, 2, 8, 64))
dout, phi = noise.normal(size=y.shape), np.array([[0, 1, 1, 1, 2, 2]])
with Tape() as tape:
    out = layer(y, media, phi)
tape.backward(out, dout)

# %%
branch = layer.attention(layer.norm(y), layer.project_media(media), phi)
assert np.array_equal(out.data, y)
assert np.isclose(layer.alpha_xattn.grad, (dout * branch).sum(), rtol=1e-12)
assert not np.any(layer.attention.out_proj.weight.grad)  # exactly 0
print("d alpha =", f"{layer.alpha_xattn.grad:.6f}", "= <dy', b> =", f"{(dout * branch).sum():.6f}")

# %% [markdown]
# ## How alpha evolves
#
# **Predict, then run:** 57 more updates. The three attention gates lie in the layers 0 (the
# shallowest), 1 and 2 (the deepest). After 10 updates, is the widest of them more than 1.5 times as
# wide open as the narrowest ("yes" or "no")? And which one is the widest after 60 (0, 1 or 2)?

# %%
guess("9.c", differ_at_10=..., widest_at_60=...)

# %% tags=["reveal", "volatile"]
records += [run.step() for _ in range(57)]
for t in (1, 5, 10, 20, 40, 60):
    gates = np.tanh(records[t - 1]["alpha_xattn"] + records[t - 1]["alpha_dense"])
    print(f"update {t:>2}: attention", *(f"{g:6.3f}" for g in gates[:3]), end="   ")
    print("feed-forward", *(f"{g:6.3f}" for g in gates[3:]))
at_10, at_60 = (abs(np.tanh(records[t - 1]["alpha_xattn"])) for t in (10, 60))
differ = "yes" if at_10.max() > 1.5 * at_10.min() else "no"
told("9.c", differ_at_10=differ, widest_at_60=at_60.argmax())

# %% tags=["reveal", "volatile"]
curves = {name: [r[name] for r in records] for name in ("alpha_xattn", "alpha_dense")}
show(
    plots.plot_alphas([r["step"] for r in records], **curves),
    alt="The size of tanh of alpha against the update, 1 to 60, in two panels, attention and "
    "feed-forward, a line for each of three layers.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# All leave 0 within a few updates, and at first together: that was the sign of Adam. Then they
# part.
#
# </details>
#
# The package's model is from a run to the end, 1,800 updates of one seed. Its log holds what the
# paper's figure shows for Flamingo-3B: there the gates grow quickly from 0 in absolute value, at
# all layers, and the deeper the layer, the larger the gate.
#
# **Predict, then run:** do ours only grow? Of the six gates, how many end more than a tenth below
# the widest that they have been? And did any gate change its sign on the way ("yes" or "no")?

# %%
guess("9.d", fell=..., changed_sign=...)

# %% tags=["reveal"]
log = json.loads((WEIGHTS / "flamingo" / "alphas.json").read_text())
gates = np.tanh(np.concatenate([log["alpha_xattn"], log["alpha_dense"]], axis=1))  # [records, 6]
widest, end = abs(gates).max(axis=0), abs(gates[-1])
turned = (gates.min(axis=0) < 0) & (gates.max(axis=0) > 0)
for i, at in enumerate(abs(gates).argmax(axis=0)):
    where = f"{('attention', 'feed-forward')[i // 3]}, layer {i % 3}"
    print(f"{where:<23} widest {widest[i]:.2f} at update {log['steps'][at]:>4}, at the end "
          f"{end[i]:.2f}{', with another sign than before' * bool(turned[i])}")  # fmt: skip
told("9.d", fell=(end < 0.9 * widest).sum(), changed_sign="yes" if turned.any() else "no")

# %% tags=["reveal"]
show(
    plots.plot_alphas(**log),
    alt="The size of tanh of alpha over the whole run of the package's model, attention and "
    "feed-forward, three layers each, against the update.",
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# Two things are as in the paper: the fast rise from 0 in all layers, and **the deeper the layer,
# the larger the gate** at the end. One is not: most of our gates overshoot within the first few
# hundred updates and fall again, and one passes through 0 and goes on with the other sign. So
# "first they open, then they stay" is not what this run shows. It is one run of one seed; whether
# others do the same is not in the committed data.
#
# </details>
#
# Two warnings. The curves become calmer in part because our learning rate falls, where the paper's
# is constant. And it is tempting to read a larger gate as "this layer uses the image more", but, as
# the authors say, the scale of the activations may differ with depth, too.

# %% [markdown]
# ### What a gate's size and sign mean (optional)
#
# **Predict, then run:** in the package's trained model we change the sign of one α, and that of all
# numbers of the branch's last matrix. Are the logits still the same, bit for bit ("yes" or "no")?

# %%
guess("9.e", same=...)

# %% tags=["reveal"]
shipped = training.load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
flipped, batch = copy.deepcopy(shipped), batches["documents"]
flipped.gated_xattn[2].alpha_xattn.data *= -1
flipped.gated_xattn[2].attention.out_proj.weight.data *= -1
media, phi = (
    shipped.resampler(stage.pool.images[batch.pictures]),
    xattn.compute_phi(batch.tokens, IMAGE),
)
logits = [model.read(batch.tokens, media, phi) for model in (shipped, flipped)]
told("9.e", same="yes" if np.array_equal(*logits) else "no")

# %% [markdown]
# <details><summary>After the run</summary>
#
# tanh is odd, so both signs cancel, and the model stays the same. A gate's sign says nothing.
#
# </details>
#
# What a layer adds is *gate times branch*. We can measure it, as a share of the stream y that it is
# added to:


# %%
shares = []


def measured(y, alpha, branch):
    added = np.tanh(alpha.data) * branch
    shares.append(np.linalg.norm(added) / np.linalg.norm(y))
    return y + added


# %% tags=["reveal"]
with patch.object(xattn, "tanh_gate", measured):
    shipped.read(batch.tokens, media, phi)
alphas = np.stack(list(shipped.alphas().values()), axis=1).ravel()  # in the order of the layers
for i, (alpha, share) in enumerate(zip(alphas, shares)):
    where = f"layer {i // 2}, {('attention', 'feed-forward')[i % 2]}"
    print(f"{where:<24} gate {abs(np.tanh(alpha)):.2f}   adds {share:.2f} of |y|")

# %% [markdown]
# If the two columns are not in the same order, the gate alone did not tell how much a layer does.
#
# ### Exercise 9.5: read the gates from a log (optional)
#
# ★★☆ · 13 minutes · 8 to 12 lines. When is a gate *open*? A gate that opens may shut again, so ask
# from when on it stays open. `records` is a list of dicts as `Run.step` returns them, not of every
# step, with "step" and, for each layer, "alpha_xattn". The run was interrupted, and went on from
# its last checkpoint: some steps stand in the log twice, and of these the later record counts.
# Return int [layers]: the first *step* in the log from which on $|\tanh \alpha|$ of the attention
# gate is at least `level` up to the end, and 0 if the last record does not reach it.
#
# <details><summary>Hint 1</summary>
#
# A dictionary from step to record keeps the later one of two by itself. Sort its keys.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With [steps, layers] truths, go through one layer from its end backwards, as long as the gate is
# open. Where you stop is a place in the log, not yet a step.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Two ends need care: a gate that is open in all records, and one that is shut in the last.
#
# </details>


# %% tags=["exercise"]
def opening(records, level):  # [{"step": int, "alpha_xattn": [layers]}], float -> int[layers]
    ...  # your code


# %% tags=["solution"]
def opening(records, level):  # [{"step": int, "alpha_xattn": [layers]}], float -> int[layers]
    last = {r["step"]: r["alpha_xattn"] for r in records}  # the later record of a step
    steps = sorted(last)
    is_open = abs(np.tanh([last[s] for s in steps])) >= level  # [steps, layers]
    found = []
    for gate in is_open.T:
        begin = len(steps)
        while begin > 0 and gate[begin - 1]:
            begin -= 1
        found.append(steps[begin] if begin < len(steps) else 0)
    return np.array(found)


# %%
check("9.5", opening)

# %% [markdown]
# ## What the trained bridge can do (optional)
#
# Names are bound to pictures by examples alone; module 10 is about this curve. Here only its shape,
# from few samples: the bridge's training saw five pictures in a document, the curve goes to 32. φ
# is one reason why that can work: each token still looks at one picture. The frozen LM was also
# pre-trained on *text* documents of up to 33 shots (`miniflamingo/worlds/grammar.py`), so its own
# attention knows prompts of that length. Does it have to? Module 10 has a model whose LM did not.
# The dotted line is the ceiling: how often the class that is asked for was among the examples at
# all.

# %%
from miniflamingo.evaluation import TASKS, Evaluation, coverage

evaluation = Evaluation(shipped, samples=150, per_class=16)
curve = {k: v["accuracy"] for k, v in evaluation.binding("binding_8way").items()}
ceiling = {k: coverage(TASKS["binding_8way"].ways, int(k)) for k in curve}
show(
    plots.plot_few_shot({"8-way": curve}, {"8-way": ceiling}, {"8-way": 1 / 8}),
    alt="Accuracy of the package's model on an 8-way binding task against 0 to 32 shots, rising "
    "from near 0, close to the dotted ceiling up to some shots and a little below it at the end. "
    "A level line at 1/8 is who names a random example without looking.",
)

# %% [markdown]
# ## Why one batch of each? (optional)
#
# Two ways look simpler: *round-robin* takes one dataset after the other, with an update each;
# *merging* shuffles all into one batch. In the paper accumulation scores 70.7 and round-robin 62.9.
# Measure why, on the model of three updates that we made by hand: ten gradients of each dataset,
# weighted, and how far a step's gradient is from the mean of all, equation (2).


# %%
def gradient(batch):  # -> [P]
    hand.model.zero_grad()
    with Tape() as tape:
        loss = hand.loss(batch)
    tape.backward(loss)
    return np.concatenate([p.grad.ravel() for _, p in learning])


g = {m: w * np.stack([gradient(hand.draw(m, rng)) for _ in range(10)])
     for m, w in hand.weights.items()}  # fmt: skip

# %%
steps = {"accumulate": sum(g.values()), "round-robin": len(g) * np.concatenate(list(g.values()))}
truth = steps["accumulate"].mean(axis=0)
for name, step in steps.items():
    off = np.linalg.norm(step - truth, axis=1).mean() / np.linalg.norm(truth)
    print(f"{name:<12} a step's gradient is off by {off:.1f} times the length of the true one")
for m, step in g.items():
    mean = step.mean(axis=0)
    cosine = mean @ truth / np.linalg.norm(mean) / np.linalg.norm(truth)
    print(f"{m:<12} cosine of its gradient and the mixture's: {cosine:.1f}")

# %% [markdown]
# A step of round-robin follows one dataset alone. Where the cosine is small, that is a step across
# the mixture's direction, and where it is negative, one against it. On average over four steps it
# would be right if the model stood still in between; but each step is far off, and Adam's $\hat v$
# takes the differences between datasets for noise. (A round-robin step also costs less, a quarter
# of the pictures here; the paper compares at nearly equal seconds a step.)
#
# Merging has another fault. Every token counts the same, so the batch sizes and the lengths of the
# texts decide, not λ:

# %%
counts = {name: stage.count(batch) for name, batch in batches.items()}
merged = training.step_weights("merge", stage.weights, 0, counts)
for name, w in stage.weights.items():
    print(
        f"{name:<10} lambda / sum {w / sum(stage.weights.values()):.2f}   merged {merged[name]:.2f}"
    )

# %% [markdown]
# The clips have three counted words each and all but vanish. In a large model it is worse: pictures
# and pages of all sizes must be padded to one shape to fit into one batch.

# %% [markdown]
# ## What does not hold at this scale (optional)
#
# In the paper a model without gates scores 66.5 instead of 70.7. Ours? The same run with all gates
# wide open, $\tanh(20) = 1$, and never trained:


# %%
def train(model, steps):
    other = copy.copy(stage)
    other.model = model
    with tempfile.TemporaryDirectory() as folder:
        run = Run(other, folder)
        return [run.step() for _ in range(steps)]


# %%
def ungate(model):
    for layer in model.gated_xattn:
        for alpha in (layer.alpha_xattn, layer.alpha_dense):
            alpha.data, alpha.requires_grad = np.full((), 20, np.float32), False
    return model


ungated = ungate(copy.deepcopy(start))
records_ungated = train(ungated, 60)

# %% tags=["volatile"]
steps = [1, 4, 8, 12, 16, 20, 30, 40, 50, 60]
losses = {"gated": records, "no gates": records_ungated}
losses = {name: [r[t - 1]["loss"] for t in steps] for name, r in losses.items()}
show(
    plots.plot_lines(steps, losses, "update", "weighted loss (1)", log=False),
    alt="The mixture's loss against the update, with and without gates. Both fall fast within 30 "
    "updates and end close together.",
)

# %% [markdown]
# In this one run of one seed, 60 updates long, the ungated model trains as well, and the difference
# that the paper saw does not show in the loss. (A likely reason: three layers are no place where a
# random branch does lasting harm. We did not test it.) What the gate buys is something else. At
# step 0 the gated model **is** the language model, bit for bit, and the other one has lost it. Test
# with text alone, no image at all: the in-context binding that the LM had learned.

# %% tags=["volatile"]
models = {"gated, step 0": start, "gated, step 60": stage.model}
models |= {"no gates, step 0": ungate(copy.deepcopy(start)), "no gates, step 60": ungated}
asked, texts = copy.copy(evaluation), {}
asked.samples = 60
for name, asked.model in (models | {"package": shipped}).items():
    texts[name] = asked.text_only()["binding_4way_8"]
for name, text in texts.items():
    alone, inside = (text[k]["accuracy"] for k in ("lm", "inside"))
    print(f"{name:<18} text-only binding {inside:.2f}; the LM alone {alone:.2f}")

# %% [markdown]
# The first line is an identity, not a result. Training takes some of it away even from the gated
# model: the gated feed-forward acts on tokens without an image, too, so a frozen LM can be talked
# over. But the ungated model starts from nothing, and 60 updates on pictures (one seed) give none
# of it back. The package's model was trained with one change to the paper (`skip_without_image`): a
# token with no image before it skips the gated layers, so text alone goes through the LM untouched.

# %% [markdown]
# ## Break it
#
# Bug 1: **"frozen" weights that move** (diffusers,
# [issue 1009](https://github.com/huggingface/diffusers/issues/1009), with word embeddings). The
# gradients of the frozen weights are set to zero, but the optimiser still has the weights. We
# unfreeze the LM, hand all to the optimiser, zero every gradient, and make one update.
#
# **Predict, then run:** does any of the LM's 27 parameters move ("yes" or "no")? And what would be
# left of a frozen matrix after the paper's 500,000 updates with its rate and its weight decay:
# "nearly all", "about half", or "nearly nothing"?

# %%
guess("9.f", moves=..., left=...)

# %%
thawed = copy.deepcopy(start)
thawed.lm.unfreeze()
optimiser = AdamW(thawed, config.optimiser)
optimiser.update(np.zeros_like(optimiser.weights))


def moved(before, after):  # names of the parameters that are not the same, bit for bit
    return [n for n in before if not np.array_equal(before[n], after[n])]


# %% tags=["reveal"]
names = moved(start.lm.state_dict(), thawed.lm.state_dict())
print("zeroed gradients:", len(names), "of the LM's", len(start.lm.state_dict()), "moved")
print("our live run:    ", len(moved(start.lm.state_dict(), stage.model.lm.state_dict())), "moved")
o = BridgeRun().optimiser
kept = np.prod([1 - training.scheduled_rate(o, t) * o.weight_decay for t in range(o.steps)])
paper = (1 - 1e-4 * 0.1) ** 500_000
print(f"left of a frozen matrix after {o.steps} steps of ours: {kept:.1%}, ", end="")
print(f"after 500,000 of the paper's: {paper:.1%}")
left = min({"nearly all": 1, "about half": 0.5, "nearly nothing": 0}.items(),
           key=lambda item: abs(item[1] - paper))[0]  # fmt: skip
told("9.f", moves="yes" if names else "no", left=left)

# %% [markdown]
# <details><summary>After the run</summary>
#
# Decoupled decay (the w of equation (4)) needs no gradient. One update moves a weight by some
# millionths; no loss shows it, and no look at the gradients, which *are* zero. (The seven that did
# not move are vectors, on which decay does not act.)
#
# </details>
#
# The check is one line: compare the frozen weights before and after, bit for bit. A `Run` also
# keeps a fingerprint of both frozen files and refuses to go on with others.
#
# ### More bugs (optional)
#
# All of them train without an error. Number 3 is the classic of a backward pass written by hand.
#
# 2. **`tan` for `tanh`** in the gate (flamingo-pytorch,
#    [pull request 2](https://github.com/lucidrains/flamingo-pytorch/pull/2)).
# 3. **No $1 - \tanh^2$** in alpha's gradient.
# 4. **A mask that masks nothing** (open-flamingo,
#    [issue 269](https://github.com/mlfoundations/open_flamingo/issues/269), with an end token):
#    `labels == token` compares ids with the token as a *word*. That is false everywhere, and no
#    error.

# %%
from miniflamingo.autograd import differentiable


@differentiable
def tan_gate(y, alpha, branch):  # bug 2, with the gradient that belongs to it
    return y + np.tan(alpha) * branch


@tan_gate.gradient
def tan_gate_backward(dout, y, alpha, branch):
    t = np.tan(alpha)
    return dout, (1 + t * t) * np.vdot(dout, branch), t * dout


# %%
@differentiable
def no_factor(y, alpha, branch):  # bug 3
    return y + np.tanh(alpha) * branch


@no_factor.gradient
def no_factor_backward(dout, y, alpha, branch):
    return dout, np.vdot(dout, branch), np.tanh(alpha) * dout


# %% [markdown]
# Four checks: (1) a shut gate changes nothing; central differences of alpha, (2) at 0 and (3) at
# 0.8; and (4) no gate is above 1. And the check that everyone looks at, the loss, after 30 updates.


# %%
def slope_is_right(gate, backward, alpha, step=1e-6):
    rng = np.random.default_rng(0)
    dout, y, branch = rng.normal(size=(3, 5))
    difference = gate(y, alpha + step, branch) - gate(y, alpha - step, branch)
    return np.isclose(
        backward(dout, y, alpha, branch)[1], dout @ difference / (2 * step), rtol=1e-6
    )


gates = {"the library": (xattn.tanh_gate, xattn.tanh_gate_backward),
         "bug 2: tan": (tan_gate, tan_gate_backward),
         "bug 3: no factor": (no_factor, no_factor_backward)}  # fmt: skip

# %% [markdown]
# **Predict, then run:** which of the four catch bug 2, and which bug 3? (Lists of their numbers,
# `[]` for none.)

# %%
guess("9.g", bug_2=..., bug_3=...)

# %% tags=["reveal"]
caught = {}
print(f"{'':<18}shut gate   slope at 0   slope at 0.8   at most 1")
for name, (gate, backward) in gates.items():
    ok = [gate(1.0, 0.0, 5.0) == 1.0, slope_is_right(gate, backward, 0.0)]
    ok += [slope_is_right(gate, backward, 0.8), gate(0.0, 1.5, 1.0) <= 1]
    print(f"{name:<18}", *(f"{'✓' if x else '✗':^12}" for x in ok))
    caught[name[:5]] = [i for i, x in enumerate(ok, 1) if not x]
told("9.g", bug_2=caught["bug 2"], bug_3=caught["bug 3"])

# %% tags=["reveal", "volatile"]
losses = {"the library": records[29]["loss"]}
for name, (gate, _) in list(gates.items())[1:]:
    with patch.object(xattn, "tanh_gate", gate):
        losses[name] = train(copy.deepcopy(start), 30)[-1]["loss"]
print("loss after 30 updates:", ", ".join(f"{name} {x:.2f}" for name, x in losses.items()))

# %% [markdown]
# <details><summary>After the run</summary>
#
# The loss tells nothing, and neither does any test at α = 0, where tan and tanh agree in value and
# slope and the missing factor is 1. Bug 2 is even *consistent*: its gradient is the gradient of its
# formula, so gradient checks pass for ever. Only a comparison with the formula finds it, at a gate
# that is open. Bug 3 needs a gradient check at a gate that is open. **Never test a gate at 0
# alone.**
#
# </details>
#
# Bug 4, and what it would do to the loss. At step 0 the model is the LM, so we ask the LM:

# %%
from miniflamingo.functional import log_softmax

tokens = batches["documents"].tokens
following = tokens[:, 1:]
print("the mask by the word:", (following == "<image>").sum(), "tokens; by the id:",
      (following == IMAGE).sum())  # fmt: skip
scores = log_softmax(start.lm(tokens[:, :-1]))
loss = -np.take_along_axis(scores, following[..., None], axis=-1)[..., 0]
image, text = following == IMAGE, (following != IMAGE) & (following != PAD)
print(
    f"mean loss on text {loss[text].mean():.1f}, on <image> {loss[image].mean():.1f}, which is ",
    end="",
)
print(f"{loss[image].sum() / loss[image | text].sum():.0%} of the sum")

# %%
print(
    check(
        "9.1", lambda tokens, image, pad: np.where(tokens[:, 1:] == pad, IGNORED, tokens[:, 1:])
    ).message
)

# %% [markdown]
# An LM that never saw the tag finds it most unlikely, so a large part of the first gradients would
# go into predicting *where pictures stand*, which no one wants to know. The loss even looks better
# in the end, as tags are easy to predict. Count the targets, and look at one row with your own
# eyes: that is what the first figure of this module is for.

# %% [markdown]
# ## Takeaways
#
# - One step: a batch of *each* dataset, gradients weighted by λ and added, clipped by the norm of
#   all together, *one* update. λ says what a dataset counts, and round-robin and merging lose that.
# - Only resampler and inserted layers learn. Frozen means: not in the optimiser. Prove it, bit for
#   bit.
# - At α = 0 alpha's gradient is ⟨dy', b⟩, and everything behind the gate has a gradient of exactly
#   0. The gates move first, by one update of Adam, all at one pace, with arbitrary signs.
# - Then they part: fast at first and, at the end, larger the deeper, as in the paper. In our run
#   most of them fall again, and one changes its sign. A gate's size is not yet what its layer
#   contributes.
# - Test freezing by comparing bit for bit (optional: a gate where it is open, a mask by counting).
#   The loss catches none of these bugs.
#
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.2 (3.1.2 in its
# first version: the gate), section 2.4 (3.2: the mixture and accumulation), section 3 (4: the
# ablation rows on gating and frozen LMs); the appendix has the optimiser and the figure on how
# alpha evolves. **In the library:** `miniflamingo/training.py`, from `AdamW` to
# `BridgeStage`, and `tanh_gate` in `miniflamingo/xattn.py`.
#
# **Next:** module 10, few-shot: what the trained model does with up to 32 examples in its prompt.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** You double all four λ. What changes in the first update of AdamW with clipping at norm 1,
# and what changes if the norm never reaches 1?
#
# <details><summary>Answer</summary>
#
# The gradient g doubles. Where it is clipped, the clipped g is the same as before, and nothing
# changes. Where it is not, Adam divides by the root of its mean square, which doubles, too, so the
# step is the same but for ε. Only the *ratios* of the λ matter, as long as the norm stays on one
# side of the limit; doubling can also push it over.
#
# </details>
#
# **2.** After the first update, somebody finds that all six gates moved by exactly the same amount
# and suspects a bug. Is there one? Name a measurement that would tell.
#
# <details><summary>Answer</summary>
#
# No. In Adam's first update $\hat m / \sqrt{\hat v}$ is g/|g|, a sign, so every number with a
# gradient moves by the rate. Look at the gradients themselves (they differ by a factor of more than
# 100), or at the second and third update, or use plain gradient descent for one step.
#
# </details>
#
# **3.** A page says: "The deepest gate is the widest, so the deepest layer contributes most to the
# answer." Which experiment would support or refute it?
#
# <details><summary>Answer</summary>
#
# Measure what each layer adds as a share of the stream (gate times branch), or shut one layer's
# gates at a time in the trained model and see how much the answers get worse. The gate alone says
# nothing: α can be halved and the branch's last matrix enlarged without any change of the model.
#
# </details>
