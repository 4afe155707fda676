# %% [markdown]
# # 08 Training: the mixture, and how alpha evolves
#
# **The question: four datasets, one model, and six shut gates. What does one step of training do,
# and in which order do the gates open?**
#
# After this module you can
#
# - write the weighted mixture objective and one update on it, from the loss to AdamW, by hand;
# - say which numbers of a Flamingo learn, and prove that the others stay as they were;
# - derive the gate's gradient, and from it what can and cannot happen in the first steps;
# - read the paper's figure on alpha, and say what it shows, what it does not, and what does not
#   hold in a model as small as ours.
#
# **You need:** the tanh gate and GATED XATTN-DENSE (module 07), φ (module 06), the frozen language
# model (module 05). The gradients come from the library's tape: a `with Tape() as tape:` around the
# forward pass, then `tape.backward(loss)`.
#
# **Time:** about 51 minutes: 15 to read (3,000 words, 200 a minute) and 36 for five exercises.
# Computing takes about 22 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# Training reads a *mixture*: interleaved documents, captions of one object, captions of two, and
# clips. The two pre-trained parts, language model (LM) and vision encoder, come from the package.
# Between them we put a new, untrained bridge. The settings are those of the package's own run, on a
# tenth of the pictures, half the batch, and with far fewer steps.

# %%
import copy
import json
import tempfile
from unittest.mock import patch

import numpy as np

from miniflamingo import plots, training, xattn
from miniflamingo.autograd import Tape
from miniflamingo.course import check, show, source
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
# | M | datasets | 4 | 4: M3W, ALIGN, LTIP, VTP |
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
# $$\mathcal{L}(\theta) = \sum_{m=1}^{M} \lambda_m \; E_{(x, y) \sim D_m} \Big[ -\sum_{\ell}
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
# it is no part of g, it pulls at the weight itself. (Hats: divided by $1 - \beta^t$.)
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \quad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2,
# \quad \theta \leftarrow \theta - \eta_t \Big( \frac{\hat m}{\sqrt{\hat v} + \epsilon}
# + w\,\theta \Big) \qquad (4)$$
#
# **The warm-up** raises the rate linearly, because $\hat v$ of the first steps knows little:
#
# $$\eta_t = \eta \cdot \min(1, \; t / t_{warm}) \cdot s(t), \qquad s = 1 \text{ in the paper, and
# half a cosine down to } 0.05 \text{ here} \qquad (5)$$
#
# **The gate.** With a branch b (attention or feed-forward) and the gradient $dy'$ of its output,
#
# $$y' = y + \tanh(\alpha)\, b \quad \Rightarrow \quad dy = dy', \qquad
# d\alpha = (1 - \tanh^2 \alpha)\, \langle dy', b \rangle, \qquad
# db = \tanh(\alpha)\, dy' \qquad (6)$$
#
# Put $\alpha = 0$ into (6): $d\alpha = \langle dy', b \rangle$, and $db = 0$. A shut gate learns,
# what stands behind it does not. That sentence is half of this module.

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
# ### Exercise 8.1: the targets without a loop
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
check("8.1", targets_of)

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
# ### Exercise 8.2: the mixture's gradient
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
check("8.2", mixture)

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
# **Predict, then run:** before the first step all gates are shut. Of the numbers that learn, how
# many have a gradient that is not 0?

# %%
accumulate(stage, batches)
learning = [(name, p) for name, p in stage.model.named_parameters() if p.requires_grad]
alive = {name: p.grad for name, p in learning if np.any(p.grad)}
print(len(alive), "parameters of", len(learning), "have a gradient other than 0:")
print("\n".join(f"{name}  {float(grad):+.2f}" for name, grad in alive.items()))

# %% [markdown]
# Six scalars of a quarter of a million numbers. The resampler has none either: whatever it sends
# goes through a shut gate. And the others are exactly 0, not small.

# %% [markdown]
# ### Exercise 8.3: clip by the global norm
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
check("8.3", clip)

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
# ### Exercise 8.4: the gate's gradient
#
# ★★☆ · 9 minutes · 2 to 4 lines. Write equation (6): `dout` is $dy'$, [...] like y and the branch;
# alpha is one number. Return (dy, dalpha, dbranch).
#
# <details><summary>Hint 1</summary>
#
# alpha scales *every* number of the branch, so its gradient is a sum over all of them: the inner
# product `(dout * branch).sum()`, times the derivative of tanh.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With $t = \tanh(\alpha)$, the derivative of tanh is $1 - t^2$.
#
# </details>


# %% tags=["exercise"]
def gate_backward(dout, y, alpha, branch):  # [...], [...], [], [...] -> [...], [], [...]
    ...  # your code


# %% tags=["solution"]
def gate_backward(dout, y, alpha, branch):  # [...], [...], [], [...] -> [...], [], [...]
    t = np.tanh(alpha)
    return dout, (1 - t * t) * (dout * branch).sum(), t * dout  # equation (6)


# %%
check("8.4", gate_backward)

# %% [markdown]
# The library's, and one inserted layer on random numbers. Both gates are shut, so $dy'$ reaches the
# first gate unchanged, and $\langle dy', b \rangle$ is what the tape must find:

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
# **Predict, then run:** the six gates had gradients of quite different sizes. By how much did each
# alpha move in the first update, at a rate of 2e-3 · 1/20 · 10? And in the *second* update, when
# the gates are open by a thousandth and the branches' gradients are scaled by that: do the branches
# move a thousandth of what they could?

# %%
movements = [run.optimiser.parts(path[t] - path[t - 1]) for t in (1, 2, 3)]
names = ["gates" if "alpha" in n else n for n in run.optimiser.names]
print("alpha after update 1:", np.round(records[0]["alpha_xattn"] + records[0]["alpha_dense"], 6))
for group in ("gates", "gated_xattn", "resampler"):
    most = [max(abs(d).max() for n, d in zip(names, m) if n.startswith(group)) for m in movements]
    print(f"{group:<12} most that a number moved in updates 1, 2, 3:", *(f"{x:8.1e}" for x in most))

# %% [markdown]
# Both answers come from Adam. $\hat m / \sqrt{\hat v}$ of the very first update is g/|g|: a sign.
# So all gates set out at the same pace, whatever their gradient, and in a direction that is decided
# by the chance of the branch's random weights. The branches stand still in update 1, but for weight
# decay. From update 2 on they move at nearly full rate, since Adam divides their tiny gradient by
# its own tiny size. The gates are *first*, but by one update, not by hundreds; with plain gradient
# descent the branches would move in proportion to the gate, that is, hardly at all.

# %% [markdown]
# ## How alpha evolves
#
# **Predict, then run:** 57 more updates. Which of the three attention gates, from the shallowest
# (layer 0) to the deepest (layer 2), is the widest open after 10 updates? And after 60? Does the
# sign matter?

# %% tags=["volatile"]
records += [run.step() for _ in range(57)]
for t in (1, 5, 10, 20, 40, 60):
    gates = np.tanh(records[t - 1]["alpha_xattn"] + records[t - 1]["alpha_dense"])
    print(f"update {t:>2}: attention", *(f"{g:6.3f}" for g in gates[:3]), end="   ")
    print("feed-forward", *(f"{g:6.3f}" for g in gates[3:]))

# %% tags=["volatile"]
curves = {name: [r[name] for r in records] for name in ("alpha_xattn", "alpha_dense")}
show(
    plots.plot_alphas([r["step"] for r in records], **curves),
    alt="The size of tanh of alpha against the update, 1 to 60, in two panels, attention and "
    "feed-forward, a line for each of three layers. All leave 0 together; later the deepest "
    "layer's lies highest.",
)

# %% [markdown]
# All leave 0 within a few updates, and at first together: that was the sign of Adam. Then they
# part. The gates' *signs* differ and say nothing. tanh is odd, so α and the branch's last matrix
# may both change their sign and the model stays the same, bit for bit:

# %%
shipped = training.load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
flipped, batch = copy.deepcopy(shipped), batches["documents"]
flipped.gated_xattn[2].alpha_xattn.data *= -1
flipped.gated_xattn[2].attention.out_proj.weight.data *= -1
media, phi = (
    shipped.resampler(stage.pool.images[batch.pictures]),
    xattn.compute_phi(batch.tokens, IMAGE),
)
logits = [model.read(batch.tokens, media, phi) for model in (shipped, flipped)]
print("same logits:", np.array_equal(*logits))

# %% [markdown]
# That model is the one in the package, from a run to the end. Its log holds what the paper's figure
# shows:

# %%
log = json.loads((WEIGHTS / "flamingo" / "alphas.json").read_text())
show(
    plots.plot_alphas(**log),
    alt="The size of tanh of alpha over the whole run of the package's model, attention and "
    "feed-forward, three layers each: a fast rise from 0 at the very start, slower changes later, "
    "and at the end the deepest layer's line lies highest in both panels.",
)

# %% [markdown]
# The paper's figure on Flamingo-3B, in miniature: the gates grow quickly from 0, at all layers,
# then flatten; and **the deeper the layer, the larger the gate**. Two warnings. The curves flatten
# in part because our learning rate falls, where the paper's is constant. And it is tempting to read
# the order as "deep layers use the image more", but, as the authors say, the scale of the
# activations may differ with depth, too: what a layer adds is *gate times branch*. We can measure
# it, as a share of the stream y that it is added to:


# %%
shares = []


def measured(y, alpha, branch):
    added = np.tanh(alpha.data) * branch
    shares.append(np.linalg.norm(added) / np.linalg.norm(y))
    return y + added


# %%
with patch.object(xattn, "tanh_gate", measured):
    shipped.read(batch.tokens, media, phi)
alphas = np.stack(list(shipped.alphas().values()), axis=1).ravel()  # in the order of the layers
for i, (alpha, share) in enumerate(zip(alphas, shares)):
    where = f"layer {i // 2}, {('attention', 'feed-forward')[i % 2]}"
    print(f"{where:<24} gate {abs(np.tanh(alpha)):.2f}   adds {share:.2f} of |y|")

# %% [markdown]
# If the two columns are not in the same order, the gate alone did not tell how much a layer does.
#
# ### Exercise 8.5: read the gates from a log
#
# ★★☆ · 9 minutes · 3 to 6 lines. `records` is a list of dicts as `Run.step` returns them, not of
# every step, with "step" and, for each layer, "alpha_xattn". Return int [layers]: the first *step*
# in the log at which $|\tanh \alpha|$ of the attention gate is at least `level`, and 0 if it never
# is.
#
# <details><summary>Hint 1</summary>
#
# `np.array([r["alpha_xattn"] for r in records])` is [records, layers].
#
# </details>
# <details><summary>Hint 2</summary>
#
# `argmax(axis=0)` of truths is the place of the first True, but also 0 where there is none.
# `any(axis=0)` tells the two apart, and the place is not yet the step.
#
# </details>


# %% tags=["exercise"]
def opening(records, level):  # [{"step": int, "alpha_xattn": [layers]}], float -> int[layers]
    ...  # your code


# %% tags=["solution"]
def opening(records, level):  # [{"step": int, "alpha_xattn": [layers]}], float -> int[layers]
    steps = np.array([r["step"] for r in records])
    is_open = abs(np.tanh([r["alpha_xattn"] for r in records])) >= level  # [records, layers]
    return np.where(is_open.any(axis=0), steps[is_open.argmax(axis=0)], 0)


# %%
check("8.5", opening)

# %% [markdown]
# ## What the trained bridge can do
#
# Names are bound to pictures by examples alone; module 09 is about this curve. Here only its shape,
# from few samples: training saw five pictures in a document, the curve goes to 32. The dotted line
# is the ceiling: how often the class that is asked for was among the examples at all.

# %%
from miniflamingo.evaluation import TASKS, Evaluation, coverage

evaluation = Evaluation(shipped, samples=150, per_class=16)
curve = {k: v["accuracy"] for k, v in evaluation.binding("binding_8way").items()}
ceiling = {k: coverage(TASKS["binding_8way"].ways, int(k)) for k in curve}
show(
    plots.plot_few_shot({"8-way": curve}, {"8-way": ceiling}),
    alt="Accuracy of the package's model on an 8-way binding task against 0 to 32 shots, rising "
    "from near 0, close to the dotted ceiling up to some shots and a little below it at the end.",
)

# %% [markdown]
# ## Why one batch of each?
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
# the mixture's direction, and where it is negative, one against it. On average over M steps it
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
# ## What does not hold at this scale
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
# The ungated model trains as well here: three layers are no place where a random branch does
# lasting harm, and the difference that the paper saw does not show. What the gate buys is something
# else. At step 0 the gated model **is** the language model, bit for bit, and the other one has lost
# it. Test with text alone, no image at all: the in-context binding that the LM had learned.

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
# over. But the ungated model starts from nothing, and 60 updates on pictures give none of it back.
# The package's model was trained with one change to the paper (`skip_without_image`): a token with
# no image before it skips the gated layers, so text alone goes through the LM untouched.

# %% [markdown]
# ## Break it
#
# Four bugs, three of them from public repositories. All of them train without an error.
#
# 1. **`tan` for `tanh`** in the gate (flamingo-pytorch, pull request 2).
# 2. **No $1 - \tanh^2$** in alpha's gradient: the hand-written backward's classic.
# 3. **"Frozen" weights that move** (diffusers, issue 1009, with word embeddings): the gradients are
#    set to zero, but the optimiser still has the weights, and decoupled decay needs no gradient.
# 4. **A mask that masks nothing** (open-flamingo, issue 269, with an end token): `labels == token`
#    compares ids with the token as a *word*. That is false everywhere, and no error.

# %%
from miniflamingo.autograd import differentiable


@differentiable
def tan_gate(y, alpha, branch):  # bug 1, with the gradient that belongs to it
    return y + np.tan(alpha) * branch


@tan_gate.gradient
def tan_gate_backward(dout, y, alpha, branch):
    t = np.tan(alpha)
    return dout, (1 + t * t) * np.vdot(dout, branch), t * dout


# %%
@differentiable
def no_factor(y, alpha, branch):  # bug 2
    return y + np.tanh(alpha) * branch


@no_factor.gradient
def no_factor_backward(dout, y, alpha, branch):
    return dout, np.vdot(dout, branch), np.tanh(alpha) * dout


# %% [markdown]
# Four checks: a shut gate changes nothing; central differences of alpha, at 0 and at 0.8; and no
# gate is above 1. And the check that everyone looks at, the loss, after 30 updates.


# %%
def slope_is_right(gate, backward, alpha, step=1e-6):
    rng = np.random.default_rng(0)
    dout, y, branch = rng.normal(size=(3, 5))
    difference = gate(y, alpha + step, branch) - gate(y, alpha - step, branch)
    return np.isclose(
        backward(dout, y, alpha, branch)[1], dout @ difference / (2 * step), rtol=1e-6
    )


gates = {"the library": (xattn.tanh_gate, xattn.tanh_gate_backward),
         "bug 1: tan": (tan_gate, tan_gate_backward),
         "bug 2: no factor": (no_factor, no_factor_backward)}  # fmt: skip

# %% [markdown]
# **Predict, then run:** which of the four catches which bug?

# %%
print(f"{'':<18}shut gate   slope at 0   slope at 0.8   at most 1")
for name, (gate, backward) in gates.items():
    ok = [gate(1.0, 0.0, 5.0) == 1.0, slope_is_right(gate, backward, 0.0)]
    ok += [slope_is_right(gate, backward, 0.8), gate(0.0, 1.5, 1.0) <= 1]
    print(f"{name:<18}", *(f"{'✓' if x else '✗':^12}" for x in ok))

# %% tags=["volatile"]
losses = {"the library": records[29]["loss"]}
for name, (gate, _) in list(gates.items())[1:]:
    with patch.object(xattn, "tanh_gate", gate):
        losses[name] = train(copy.deepcopy(start), 30)[-1]["loss"]
print("loss after 30 updates:", ", ".join(f"{name} {x:.2f}" for name, x in losses.items()))

# %%
for name, (_, backward) in gates.items():
    print(f"{name:<18}", check("8.4", backward).message)

# %% [markdown]
# The loss tells nothing, and neither does any test at α = 0, where tan and tanh agree in value and
# slope and the missing factor is 1. Bug 1 is even *consistent*: its gradient is the gradient of its
# formula, so gradient checks pass for ever. Only a comparison with the formula finds it, at a gate
# that is open. Bug 2 needs a gradient check at a gate that is open. **Never test a gate at 0
# alone.**
#
# Bug 3. We unfreeze the LM, hand all to the optimiser, and zero every gradient: one update.

# %%
thawed = copy.deepcopy(start)
thawed.lm.unfreeze()
optimiser = AdamW(thawed, config.optimiser)
optimiser.update(np.zeros_like(optimiser.weights))


def moved(before, after):  # names of the parameters that are not the same, bit for bit
    return [n for n in before if not np.array_equal(before[n], after[n])]


# %%
print("zeroed gradients:", len(moved(start.lm.state_dict(), thawed.lm.state_dict())),
      "of the LM's", len(start.lm.state_dict()), "parameters moved")  # fmt: skip
print("our live run:    ", len(moved(start.lm.state_dict(), stage.model.lm.state_dict())), "moved")
o = BridgeRun().optimiser
kept = np.prod([1 - training.scheduled_rate(o, t) * o.weight_decay for t in range(o.steps)])
print(f"left of a frozen weight after {o.steps} steps of ours: {kept:.1%}, ", end="")
print(f"after 500,000 of the paper's: {(1 - 1e-4 * 0.1) ** 500_000:.1%}")

# %% [markdown]
# One update moves a weight by some millionths, no loss shows it, and no look at the gradients,
# which *are* zero. At the paper's settings nearly nothing of the LM would be left. The check is one
# line: compare the frozen weights before and after, bit for bit. A `Run` also keeps a fingerprint
# of both frozen files and refuses to go on with others.
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
        "8.1", lambda tokens, image, pad: np.where(tokens[:, 1:] == pad, IGNORED, tokens[:, 1:])
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
# - Then they part: larger the deeper, fast at first, flat later, as in the paper. A gate's size is
#   not yet what its layer contributes.
# - At three layers the gate does not raise the score. It makes the model *be* its LM at step 0.
# - Test a gate where it is open, masks by counting, freezing by comparing. The loss catches
#   nothing.
#
# **In the paper:** section 3.1.2 (the gate; ablation rows on gating and frozen LMs in section 4),
# section 3.2 (the mixture, equation 2, and accumulation); the appendix has the optimiser and the
# figure on how alpha evolves. **In the library:** `miniflamingo/training.py`, from `AdamW` to
# `BridgeStage`, and `tanh_gate` in `miniflamingo/xattn.py`.
#
# **Next:** module 09, few-shot: what the trained model does with up to 32 examples in its prompt.
