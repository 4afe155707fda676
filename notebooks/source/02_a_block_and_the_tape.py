# %% [markdown]
# # 02 A transformer block and the tape
#
# **The question: what happens between one attention and the next, and who computes the gradients
# of all of it?**
#
# After this module you can
#
# - follow one word's row of numbers through a language model, and say what each block adds to it;
# - write layer norm, the feed-forward part and a whole block, and say what each of them is for;
# - write a tape of fifteen lines that chains gradients, and train a small model with it;
# - recognise bugs of blocks by properties that need no right answer to compare with;
# - (optional) derive the gradient of half a block, and check it by differences; recognise bugs of a
#   tape and of training whose loss falls.
#
# **You need:** attention and its mask (module 01).
#
# **Time:** about 55 minutes for the core path, and 25 for what is marked optional. Computing takes
# about 3 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# Module 01 looked at attention alone. A language model is a stack of blocks, and attention is one
# half of a block. Here is the package's small model again, on the page of module 01:

# %%
import numpy as np

from miniflamingo import plots
from miniflamingo.attention import TransformerBlock
from miniflamingo.autograd import Tape, Tensor
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.functional import cross_entropy, layer_norm, softmax
from miniflamingo.language import LanguageConfig, LanguageModel
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds.grammar import TOKENIZER, text_batch

# %%
lm = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors").lm.astype(np.float64)
page = "<BOS> red circle dax <EOC> blue bar wug <EOC> red circle"
tokens = np.array([TOKENIZER.encode(page)])  # [1, L]
positions = np.arange(tokens.shape[1])[None]
bias = lm.causality(positions, tokens.shape[1])
print(lm.config.depth, "blocks,", lm.config.dim, "numbers a token,", len(TOKENIZER), "words")

# %% [markdown]
# Each word is first looked up in a table: row 17 of the table is what the model knows of word 17.
# From there on, every block *adds* something to each word's row, and takes nothing away. Between
# the blocks we can ask what the model would say if it stopped there: the last step, which turns a
# row into a score for every word, can be applied to any row.


# %%
def rows(tokens):  # int[1, L] -> the rows [1, L, D] before, between and behind the blocks
    x = lm.embed(tokens, positions)
    yield x
    for block in lm.blocks:
        x = block(x, bias=bias)
        yield x


# %%
stages, dax = ["embedding", "block 1", "block 2", "block 3"], TOKENIZER.ids["dax"]
for stage, x in zip(stages, rows(tokens)):
    p = softmax(lm.predict(x)[0, -1])
    best = TOKENIZER.words[p.argmax()]
    print(f"after {stage:<10} 'dax' has probability {p[dax]:.3f}; the best word is {best}")

# %% [markdown]
# The name appears in the last block. The blocks before it prepare what it needs.
#
# | letter | meaning | here |
# |---|---|---|
# | L | tokens of a text | 11 |
# | D | width of a token's row | 64 |
# | F | width inside the feed-forward part, usually 4 D | 256 |
# | V | words of the vocabulary | 68 |
# | x, y | a row before and after a step, D numbers | |
# | g, b | gain and offset of a norm, D numbers each, learned | |

# %% [markdown]
# ## The derivation
#
# **The embedding** is a table E with a row of D numbers for each of the V words. The first row of
# token $\ell$, whose word is $w_\ell$, is
#
# $$x_\ell = E_{w_\ell} \qquad\qquad (1)$$
#
# **A norm** gives each row the same size before a part of the model reads it. The layer norm takes
# off the row's mean $\mu$ and divides by its standard deviation $\sigma$; then it multiplies with a
# learned gain and adds a learned offset:
#
# $$\mathrm{norm}(x) = g \cdot \hat x + b, \qquad \hat x = \frac{x - \mu}{\sigma}, \qquad
# \mu = \frac{1}{D} \sum_d x_d, \qquad
# \sigma = \sqrt{\frac{1}{D} \sum_d (x_d - \mu)^2 + \varepsilon} \qquad\qquad (2)$$
#
# The sums run over the D numbers of ONE token. No token learns anything about another one from it.
# A small $\varepsilon$ keeps the root away from 0. (The small model has the RMS norm, which leaves
# out $\mu$ and b.)
#
# **The feed-forward part** works on each token alone. It is a layer of F numbers with a simple
# function $\phi$ between two matrices:
#
# $$\mathrm{ffw}(x) = W_2 \, \phi\big( W_1 \, \mathrm{norm}(x) \big) \qquad\qquad (3)$$
#
# Attention moves information between tokens. The feed-forward part computes with what has arrived.
#
# **The block** adds both to the row, one after the other:
#
# $$y = x + \mathrm{attention}(\mathrm{norm}(x)), \qquad z = y + \mathrm{ffw}(y) \qquad\qquad (4)$$
#
# The row that is only ever added to is called the **residual stream**. It has two good properties.
# A block whose last matrix is 0 changes nothing, so a block can begin as nothing and grow; modules
# 08 and 09 build Flamingo's gates on that. And the gradient has a way past every block:
#
# $$\frac{\partial z}{\partial x} = \Big( I + \frac{\partial\, \mathrm{ffw}}{\partial y} \Big)
# \Big( I + \frac{\partial\, \mathrm{attention}}{\partial x} \Big) \qquad\qquad (5)$$
#
# (Both parts stand here with the norm that is in front of them.) Multiply out, and one of the four
# terms is I: whatever the matrices are, the gradient of z also arrives at x directly.

# %% [markdown]
# ## The norm
#
# Equation (2) with loops, one token at a time:


# %%
def norm_loop(x, gain, offset, eps=1e-5):  # [L, D], [D], [D] -> [L, D]
    out = np.zeros_like(x)
    for l, row in enumerate(x):
        mu = sum(row) / len(row)
        sigma = np.sqrt(sum((v - mu) ** 2 for v in row) / len(row) + eps)
        out[l] = gain * (row - mu) / sigma + offset  # equation (2)
    return out


# %%
rng = np.random.default_rng(0)
x, gain, offset = rng.normal(3, 5, (4, 6)), rng.normal(1, 0.2, 6), rng.normal(0, 0.1, 6)
assert np.allclose(norm_loop(x, gain, offset), layer_norm(x, gain, offset))
print("means and deviations before:", x.mean(axis=1).round(1), x.std(axis=1).round(1))

# %% [markdown]
# **Predict, then run:** we multiply a row by 1,000. By about how much is its layer norm multiplied?
# And what does it become if we add 1,000 to every number of the row: does it change at all?

# %%
guess("2.a", factor=..., changes_when_1000_is_added=...)

# %% tags=["reveal"]
before = layer_norm(x, gain, 0 * offset)
factor = np.median(layer_norm(1000 * x, gain, 0 * offset) / before)
changed = not np.allclose(layer_norm(x + 1000, gain, 0 * offset), before, atol=1e-6)
told("2.a", factor=factor, changes_when_1000_is_added=changed)

# %% [markdown]
# ### Exercise 2.1: the layer norm
#
# ★☆☆ · 6 minutes · 2 or 3 lines. Write equation (2) for any number of leading axes: `x` [..., D],
# `gain` and `offset` [D].
#
# <details><summary>Hint 1</summary>
#
# `x.mean(axis=-1, keepdims=True)` keeps the last axis with length 1, so that it can be taken off.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The variance is divided by D, not by D − 1, and ε stands under the root.
#
# </details>


# %% tags=["exercise"]
def norm_of(x, gain, offset, eps=1e-5):  # [..., D], [D], [D] -> [..., D]
    ...  # your code


# %% tags=["solution"]
def norm_of(x, gain, offset, eps=1e-5):  # [..., D], [D], [D] -> [..., D]
    centred = x - x.mean(axis=-1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return gain * centred / sigma + offset  # equation (2)


# %%
check("2.1", norm_of)

# %% [markdown]
# ## The block
#
# ### Exercise 2.2: a whole block
#
# ★★☆ · 8 minutes · 3 or 4 lines. Write equations (3) and (4). `x` [..., D]; `attend` and `norm` are
# functions of a row array; `up` [D, F] and `down` [F, D] are $W_1$ and $W_2$, to be multiplied from
# the right (`rows @ up`); $\phi$ is the ReLU. Both parts read a normed row: use `norm` twice.
#
# <details><summary>Hint 1</summary>
#
# `np.maximum(h, 0)` is the ReLU.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The second part reads y, not x, and adds to y.
#
# </details>


# %% tags=["exercise"]
def block_of(x, attend, norm, up, down):  # [..., D], [D, F], [F, D] -> [..., D]
    ...  # your code


# %% tags=["solution"]
def block_of(x, attend, norm, up, down):  # [..., D], [D, F], [F, D] -> [..., D]
    y = x + attend(norm(x))  # equation (4)
    return y + np.maximum(norm(y) @ up, 0) @ down  # equation (3)


# %%
check("2.2", block_of)

# %% [markdown]
# The library's block is the same, with the modules of this package in the place of the functions:

# %%
source(TransformerBlock.forward)

# %% [markdown]
# How much does each part add? We measure the size of the stream, and of what each part adds to it,
# in 60 texts, as the root of the mean square.

# %%
pages = text_batch(60, np.random.default_rng(2))[:, :40]
size = lambda x: np.sqrt((x**2).mean())  # noqa: E731
stream, where = lm.embed(pages, np.arange(40)[None]), lm.causality(np.arange(40)[None], 40)
for i, block in enumerate(lm.blocks, 1):
    attended = block.attention(block.norm(stream), bias=where)
    computed = block.ffw(stream + attended)
    print(f"block {i}: the stream {size(stream):.2f}, attention adds {size(attended):.2f}, "
          f"the feed-forward part {size(computed):.2f}")  # fmt: skip
    stream = stream + attended + computed

# %% [markdown]
# The stream grows from block to block. In a large model it grows much more: in a language model of
# 135 million parameters from 0.1 to above 5. What is added late must be larger to count as much.
# That is worth remembering for Flamingo, whose new layers add to the same stream.

# %% [markdown]
# ## The gradient of half a block (optional)
#
# For a formula's gradient we need `dout`, the gradient of the loss with respect to the formula's
# OUTPUT, and the formula's inputs; from them it makes the gradients of the inputs. Module 01 had
# `attention_backward`. The norm needs one, too.
#
# Take one row, and write $h = g \cdot \mathrm{dout}$ for the gradient at $\hat x$. Every
# $\hat x_e = (x_e - \mu) / \sigma$ depends on $x_d$ in three ways: directly if e = d, through
# $\mu$, with $\partial \mu / \partial x_d = 1 / D$, and through $\sigma$, with
# $\partial \sigma / \partial x_d = (x_d - \mu) / (D \sigma) = \hat x_d / D$. By the quotient rule
#
# $$\frac{\partial \hat x_e}{\partial x_d} = \frac{1}{\sigma} \Big( [e = d] - \frac1D -
# \frac{\hat x_e \hat x_d}{D} \Big)$$
#
# and the gradient at $x_d$ is the sum of these over e, each times $h_e$:
#
# $$dx_d = \frac{1}{\sigma} \Big( h_d - \frac{1}{D} \sum_{e} h_e - \hat x_d \,
# \frac{1}{D} \sum_{e} h_e \hat x_e \Big) \qquad\qquad (6)$$
#
# The first term is the direct one. The second takes off the mean, because moving all numbers
# together changes nothing. The third takes off the part along $\hat x$, because making the row
# larger changes nothing either. You saw both in the prediction above. The gain and the offset are
# used by every row, so their gradients are sums over all rows:
# $dg = \sum_\ell \mathrm{dout}_\ell \, \hat x_\ell$ and $db = \sum_\ell \mathrm{dout}_\ell$.
#
# Two more pieces make half a block. For a product of rows with a matrix, `out = rows @ W`, the
# gradients are `drows = dout @ W.T` and `dW = rows.T @ dout`. A ReLU hands `dout` on where its
# input was above 0, and 0 elsewhere.
#
# ### Exercise 2.3: the gradient of half a block (optional)
#
# ★★★ · 20 minutes · 10 to 15 lines. The second half of a block is, with `rows = norm(y)`,
# `z = y + max(rows @ up, 0) @ down`. Given `dz` and `y` [L, D], the norm's `gain` and `offset` [D],
# `up` [D, F] and `down` [F, D], return dy, dgain, doffset, dup and ddown.
#
# <details><summary>Hint 1</summary>
#
# Run it forward first, and keep σ, x̂, the normed rows and the hidden numbers before the ReLU. Then
# go backwards: down, ReLU, up, norm.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Both sums of equation (6) are means over the last axis, with `keepdims=True`. And y is used twice:
# by the norm, and by the stream that goes past it. Its two gradients are added.
#
# </details>


# %% tags=["exercise"]
def half_gradient(dz, y, gain, offset, up, down, eps=1e-5):  # -> dy, dgain, doffset, dup, ddown
    ...  # your code


# %% tags=["solution"]
def half_gradient(dz, y, gain, offset, up, down, eps=1e-5):  # -> dy, dgain, doffset, dup, ddown
    centred = y - y.mean(axis=-1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    xhat = centred / sigma
    rows = gain * xhat + offset  # equation (2)
    hidden = rows @ up
    ddown = np.maximum(hidden, 0).T @ dz
    dhidden = (dz @ down.T) * (hidden > 0)
    dup, drows = rows.T @ dhidden, dhidden @ up.T
    h = gain * drows
    along = (h * xhat).mean(axis=-1, keepdims=True)
    dx = (h - h.mean(axis=-1, keepdims=True) - xhat * along) / sigma  # equation (6)
    return dz + dx, (drows * xhat).sum(axis=0), drows.sum(axis=0), dup, ddown


# %%
check("2.3", half_gradient)

# %% [markdown]
# Nobody should believe a derivation that was not measured: move one number of x a little up and a
# little down, and see how the loss moves. Here for the library's norm:

# %%
from miniflamingo.functional import layer_norm_backward

dout, h = rng.normal(size=x.shape), 1e-5
moved = np.zeros_like(x)
for place in np.ndindex(x.shape):
    ends = []
    for sign in (h, -h):
        other = x.copy()
        other[place] += sign
        ends.append((dout * layer_norm(other, gain, offset)).sum())
    moved[place] = (ends[0] - ends[1]) / (2 * h)
dx = layer_norm_backward(dout, x, gain, offset)[0]
print(f"the formula agrees with the measured gradient: {np.abs(dx - moved).max() < 1e-7}")

# %% [markdown]
# ## The tape
#
# A gradient in this package is a function with a fixed form. It takes `dout`, the gradient of the
# loss with respect to a formula's OUTPUT, and the formula's inputs; it returns the gradients of the
# inputs. For `out = x * y` it returns `dout * y` and `dout * x`.
#
# A model is some hundred formulas in a row. Its gradient is theirs, in the opposite order: the
# chain rule. For a loss that depends on x through $u = f(x)$ and $v = g(x)$,
#
# $$\frac{\partial\, \mathrm{loss}}{\partial x} = f'(x)^\top \frac{\partial\, \mathrm{loss}}
# {\partial u} + g'(x)^\top \frac{\partial\, \mathrm{loss}}{\partial v} \qquad\qquad (7)$$
#
# Note the plus. A value that is used twice receives two gradients, and they are ADDED. In a block
# every row is used twice: by the part, and by the stream that goes past it.
#
# Nobody wants to write that order down by hand. So a program writes it down while the model runs:
# each formula that is called leaves a note of its output, its inputs and its gradient function. The
# list of notes is the **tape**. Walking it from its end to its start is the whole of
# back-propagation. Here is one, for values of any shape:


# %%
class Value:
    def __init__(self, data):
        self.data = np.asarray(data, float)


notes = []  # (output, inputs, gradient function)


def record(formula, gradient, *inputs):
    out = Value(formula(*(v.data for v in inputs)))
    notes.append((out, inputs, gradient))
    return out


# %%
def times(a, b):
    return record(lambda x, y: x * y, lambda dout, x, y: (dout * y, dout * x), a, b)


def plus(a, b):
    return record(lambda x, y: x + y, lambda dout, x, y: (dout, dout), a, b)


# %% [markdown]
# ### Exercise 2.4: walk the tape
#
# ★★★ · 15 minutes · 6 to 9 lines. `notes` is a list as above, in the order of the calls. Return the
# gradients of the values in the list `wanted`, in their order, as a list; 0 for a value that the
# loss does not depend on. The gradient of `loss` itself is 1.
#
# <details><summary>Hint 1</summary>
#
# Keep a dictionary from `id(value)` to its gradient so far. It begins with the loss alone. Go
# through `reversed(notes)`. A note whose output has no gradient yet has nothing to do with the
# loss: skip it.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `gradient(dout, *[v.data for v in inputs])` gives one gradient for each input. Equation (7): add
# it to what is there, `grads[id(v)] = grads.get(id(v), 0) + d`.
#
# </details>


# %% tags=["exercise"]
def walk(notes, loss, wanted):  # [(Value, (Value, ...), function)], Value, [Value] -> [array]
    ...  # your code


# %% tags=["solution"]
def walk(notes, loss, wanted):  # [(Value, (Value, ...), function)], Value, [Value] -> [array]
    grads = {id(loss): np.ones_like(loss.data)}
    for out, inputs, gradient in reversed(notes):
        if id(out) not in grads:
            continue
        parts = gradient(grads[id(out)], *[v.data for v in inputs])
        for value, d in zip(inputs, parts):
            grads[id(value)] = grads.get(id(value), 0) + d  # equation (7)
    return [grads.get(id(value), np.zeros_like(value.data)) for value in wanted]


# %%
check("2.4", walk)

# %% [markdown]
# Two numbers by hand: at a = 3 and b = 4 take loss = a · b + a.
#
# **Predict, then run:** what are the gradients of a and of b?

# %%
guess("2.b", a=..., b=...)

# %% tags=["reveal"]
with Tape() as tape:
    a, b = Tensor(np.array(3.0)), Tensor(np.array(4.0))
    loss = a * b + a
tape.backward(loss)
told("2.b", a=float(a.grad), b=float(b.grad))

# %% [markdown]
# That was the library's tape. It is the same as yours with three things more: it notes nothing
# outside of `with Tape()`, it leaves out what needs no gradient (a frozen model!), and it adds the
# gradients of the parameters to their `.grad`.

# %%
source(Tape.gradients)

# %% [markdown]
# ## Training with it
#
# A small language model, one block of 32 numbers a token, on the texts that the package's own model
# learned from. A step is: run, walk back, move each parameter a little against its gradient.

# %%
small = LanguageConfig(vocab_size=len(TOKENIZER), dim=32, depth=1, heads=2)
model = LanguageModel(small, rng=np.random.default_rng(0))


def step(model, tokens, rate):
    model.zero_grad()
    with Tape() as tape:
        loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], ignore_index=0)
    tape.backward(loss)
    for parameter in model.parameters():
        parameter.data = parameter.data - rate * parameter.grad
    return float(loss.data)


# %% [markdown]
# **Predict, then run:** before it has learned anything, the model has no reason to prefer one of
# the V words. What is its loss, the mean of −log p, about? (`np.log` is the natural logarithm.)

# %%
guess("2.c", first_loss=...)

# %% tags=["reveal", "volatile"]
draws, losses = np.random.default_rng(3), []
for _ in range(80):
    losses.append(step(model, text_batch(24, draws), rate=0.3))
print(f"log V = {np.log(len(TOKENIZER)):.2f}, after 80 steps {losses[-1]:.2f}")
told("2.c", first_loss=losses[0])

# %% tags=["reveal", "volatile"]
show(
    plots.plot_lines(np.arange(1, 81, 4), {"loss": losses[::4]}, "step", "nats a word", log=False),
    alt="The loss of the small model over 80 steps, one line that falls quickly in the first "
    "twenty steps, then slowly.",
)

# %% [markdown]
# Plain steps against the gradient are enough here. Module 09 replaces them by AdamW, and shows what
# that buys.

# %% [markdown]
# ## Break it
#
# Three bugs of a block:
#
# 1. **The norm over the wrong axis.** A row's mean is then a mean over tokens, later ones included.
# 2. **The stream is cut:** $z = \mathrm{ffw}(y)$, the `y +` is missing.
# 3. **The norm stands behind the sum,** not before the part, as in the first transformer of 2017.
#    That is no error, but it changes what a block that adds nothing does.

# %%
from miniflamingo.course.checks.module_02 import block as right_block


def wrong_axis(x, attend, norm, up, down):  # bug 1
    flipped = lambda x: norm(x.swapaxes(-1, -2)).swapaxes(-1, -2)  # noqa: E731
    return right_block(x, attend, flipped, up, down)


def no_stream(x, attend, norm, up, down):  # bug 2: what the second part adds, and nothing else
    y = x + attend(norm(x))
    return right_block(x, attend, norm, up, down) - y


def norm_behind(x, attend, norm, up, down):  # bug 3
    y = norm(x + attend(x))
    return norm(right_block(y, np.zeros_like, lambda x: x, up, down))


# %% [markdown]
# Three properties that need no right answer to compare with. **Empty:** with a last matrix of 0 and
# an attention that answers 0, a block leaves the stream as it is. **Causal:** a change of the last
# token moves no earlier output (here attention reads nothing but the token itself). **Gradient:**
# with `down` = 0 the gradient still arrives at x.


# %%
def properties(block):
    D = F = L = 6
    x, up = rng.normal(size=(2, L, D)), rng.normal(size=(D, F))
    norm = lambda x: layer_norm(x, np.ones(D), np.zeros(D))  # noqa: E731
    run = lambda x, down, own: block(x, lambda x: own * x, norm, up, down)  # noqa: E731
    moved = x.copy()
    moved[:, -1] += rng.normal(size=D)
    nothing, down = np.zeros((F, D)), rng.normal(size=(F, D))
    return {
        "empty": np.allclose(run(x, nothing, 0), x),
        "causal": np.allclose(run(x, down, 1)[:, :-1], run(moved, down, 1)[:, :-1]),
        "gradient": not np.allclose(run(moved, nothing, 0), run(x, nothing, 0)),
    }


# %% [markdown]
# **Predict, then run:** which of the three does each bug fail? For each a list of some of
# `"empty"`, `"causal"` and `"gradient"`.

# %%
guess("2.d", bug_1=..., bug_2=..., bug_3=...)

# %% tags=["reveal"]
blocks = {"the block": right_block, "1 wrong axis": wrong_axis, "2 no stream": no_stream,
          "3 norm behind": norm_behind}  # fmt: skip
results = {name: properties(block) for name, block in blocks.items()}
for name, passed in results.items():
    marks = (f"{what} {'✓' if ok else '✗'}" for what, ok in passed.items())
    print(f"{name:<14}", "   ".join(marks))
_, *failed = [[what for what, ok in passed.items() if not ok] for passed in results.values()]
told("2.d", **{f"bug_{i}": names for i, names in enumerate(failed, 1)})

# %% [markdown]
# <details><summary>After the run</summary>
#
# Every bug fails at least one. Bug 1 is the dangerous one: it lets the future into the past, so the
# training loss is *lower* than it should be, and the model is useless where the future is not there
# yet.
#
# </details>
#
# ### More bugs (optional)
#
# Two bugs of the tape and of training:
#
# 4. **`=` for `+=`:** a value that is used twice keeps only one of its gradients.
# 5. **Gradients are never forgotten:** `zero_grad` is missing, and each step adds to the last one.
#
# Bug 5 in training, at two rates:


# %%
def train(forgets, rate, steps=16):
    model, draws = LanguageModel(small, rng=np.random.default_rng(0)), np.random.default_rng(3)
    for _ in range(steps):
        before = {name: p.grad for name, p in model.named_parameters()}
        loss = step(model, text_batch(24, draws), rate=0)  # only the gradients
        for name, p in model.named_parameters():
            if not forgets and before[name] is not None:
                p.grad = p.grad + before[name]
            p.data = p.data - rate * p.grad
    return loss


# %% tags=["volatile"]
for rate in (0.1, 1.0):
    print(f"rate {rate}: after 16 steps the loss is {train(True, rate):.1f}, "
          f"with bug 5 it is {train(False, rate):.1f}")  # fmt: skip

# %% [markdown]
# At the small rate bug 5 is *better*: a sum of all gradients so far is a ball that rolls downhill
# and gathers speed. At the rate that suited the right program it cannot stop, and flies off. Bugs
# of this kind are found by looking for them, not by looking at a loss that falls.
#
# Bug 4 is caught by a derivative that one can compute by hand, as you did above: with `=` in the
# place of `+=` the gradient of a in a · b + a is 4 or 1, and not 5. The check of exercise 2.4 asks
# for exactly that. In a block it would cut the gradient's way past the part, or the part's own, and
# the loss would still fall.

# %% [markdown]
# ## Takeaways
#
# - A token's row goes through the model as a residual stream: every part adds to it.
# - The norm gives a part rows of one size; it works on one token alone. Its gradient takes off the
#   mean and the part along the row.
# - Attention moves information between tokens, the feed-forward part computes with it.
# - A gradient is a function of `dout` and the inputs. A tape notes the calls and walks back; what
#   is used twice is added.
# - A block whose last matrix is 0 is the identity. Flamingo's gates begin there.
#
# **In the paper:** figure 4 of [arXiv:2204.14198](https://arxiv.org/abs/2204.14198) (section 2.2)
# shows where Flamingo's new layers stand among such blocks; the block is that of
# [Attention Is All You Need](https://arxiv.org/abs/1706.03762) (section 3) with the norm in front
# ([Xiong et al., 2020](https://arxiv.org/abs/2002.04745)). **In the library:**
# `miniflamingo/attention.py` from `FeedForward` on, `miniflamingo/functional.py` for the formulas,
# `miniflamingo/autograd.py` for the tape.
#
# **Next:** module 03, the Perceiver: what to do with 50,176 inputs.

# %% [markdown] tags=["notes"]
# ### For the teacher
#
# **Minutes.** 0 the word that appears in the last block; 5 equations (1) to (5), the stream drawn
# as a line with two parts beside it; 9 guess 2.a; 12 exercise 2.1; 18 exercise 2.2, then the sizes
# of what each part adds; 28 the tape at the board, for a · b + a, with three notes; 33 exercise
# 2.4; 48 guess 2.b; 50 guess 2.c and the training; 54 guess 2.d.
#
# **Predictions.** *2.a:* 1 and `False`. Many say 1,000 for the first: they think of a norm as a
# length, not as what makes a length equal. *2.b:* 5 and 3. Those who say 4 for a forgot the second
# use, which is the point of exercise 2.4. *2.c:* a little above log 68 = 4.2. Some say 1 or 68. It
# is above because an untrained model is not uniform, but random. *2.d:* bug 1 fails "causal" and no
# other; bug 2 fails "empty" and "gradient"; bug 3 fails "empty". The usual wrong guess gives
# "gradient" to bug 3: through a norm the gradient still passes, only bent.
#
# **Open questions.** None is left open.
#
# **Misconceptions.** That a norm mixes tokens. That the feed-forward part sees other tokens. That a
# block replaces a row: it adds to it. That back-propagation needs calculus of the whole model: it
# needs one small gradient for each formula, and an order. That a falling loss proves a right
# gradient.
#
# **To cut.** The sizes of what each part adds, then exercise 2.1 (show the solution). Exercise 2.4
# is the one to keep; a class that knows tapes does 2.3 in its place.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** The last matrix of both parts of block 2 is set to 0 in a trained model of three blocks.
# Does the model still run, and what does block 3 get?
#
# <details><summary>Answer</summary>
#
# It runs. By (4) block 2 then adds 0 twice, so block 3 gets exactly what block 1 has put out. It
# works worse, as if the block had been taken out, but its input has about the size it knows.
#
# </details>
#
# **2.** A value x is used in three formulas of a model. How many gradients does it get, what
# happens to them, and which bug shows if the tape is walked from its start to its end?
#
# <details><summary>Answer</summary>
#
# Three, and they are added, (7). Walked from the start, a note's output has no gradient yet when
# the note is read, so nothing but the last note is counted: nearly all gradients are 0.
#
# </details>
#
# **3.** Two rows differ only in this: the second is ten times the first. What can a block whose
# parts read normed rows know of the difference?
#
# <details><summary>Answer</summary>
#
# Nothing in what the parts *add*: their normed rows are equal (but for ε), so both rows get the
# same sum added. In the stream the difference stays, and the same addition counts a tenth as much
# in the longer row.
#
# </details>
