# %% [markdown]
# # 12 The backward kernel and the gate's gradient
#
# **The question: the forward kernel keeps nothing but its output. From what are the gradients made,
# and how do many programs add up one gradient without disturbing each other?**
#
# After this module you can
#
# - derive dV, dP, dS, dQ and dK, and say why neither the output nor a log-sum-exp is read again;
# - write a backward tile in Triton, with transposed products, and read the project's kernel;
# - split the tokens of one image over several programs and add up in a fixed order;
# - say who must write zeros, and get the gate's gradient for nearly nothing.
#
# **You need:** module 11 (kernels, the work list) and module 07 (the gate). As there, the kernels
# run in Triton's interpreter, on Linux.
#
# **Time:** about 55 minutes: 12 to read (2,400 words, 200 a minute) and 43 for five exercises.
# Computing takes about 5 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# For one image and one head, the backward pass is five matrix products. Two of them make the
# forward's numbers and their gradients again, three make the results:

# %%
import numpy as np

from miniflamingo import plots, xattn
from miniflamingo.attention import attention, attention_backward
from miniflamingo.course import check, show, source
from miniflamingo.course.triton_cpu import Watch, altered, fenced, tl, torch, triton
from miniflamingo.functional import softmax, softmax_backward

# %%
products = [
    (("S", "M", "R"), ("Q", "M", "K"), ("Kᵀ", "K", "R")),
    (("dP", "M", "R"), ("dO", "M", "K"), ("Vᵀ", "K", "R")),
    (("dV", "R", "K"), ("Pᵀ", "R", "M"), ("dO", "M", "K")),
    (("dK", "R", "K"), ("dSᵀ", "R", "M"), ("Q", "M", "K")),
    (("dQ", "M", "K"), ("dS", "M", "R"), ("K", "R", "K")),
]
show(
    plots.plot_products(products, {"M": 32, "R": 64, "K": 64}, unit=0.8),
    alt="Five matrix products to scale, M = 32 tokens, R = K = 64. S, M by R, is Q times K "
    "transposed; dP, M by R, is dO times V transposed; dV and dK, R by K, are P transposed times "
    "dO and dS transposed times Q; dQ, M by K, is dS times K.",
)

# %% [markdown]
# | letter | meaning |
# |---|---|
# | dX | the gradient of the loss with respect to X, of X's shape |
# | O, dO | the attention's output and its gradient, which is given: [M, K] |
# | M, R, K | tokens of a tile, visual tokens of an image, head width |
# | S, P | scores and weights, [M, R] |
# | δ | one number for each token, defined in (3) |
# | A, W, α | the attention's output with all heads side by side, the out-projection, the gate |
#
# (K is a width and the matrix of the keys; its place tells which.)

# %% [markdown]
# ## The derivation
#
# Forward, for the M tokens that look at one image:
#
# $$S = Q K^\top / \sqrt{K}, \qquad P = \mathrm{softmax}(S), \qquad O = P V \qquad\qquad (1)$$
#
# **Through a product.** $O_{mk} = \sum_r P_{mr} V_{rk}$. Each V is used by all tokens, each P by
# all channels, so
#
# $$dV = P^\top dO, \qquad dP = dO\, V^\top \qquad\qquad (2)$$
#
# (The shapes allow nothing else: dV is [R, K].)
#
# **Through the softmax.** $\partial P_r / \partial S_j = P_r ([r = j] - P_j)$: raising one score
# raises its own weight and lowers all the others. Summed against dP,
#
# $$dS_{mr} = P_{mr} \, (dP_{mr} - \delta_m), \qquad \delta_m = \sum_r P_{mr} \, dP_{mr}
# \qquad\qquad (3)$$
#
# **Through the scores.**
#
# $$dQ = dS \, K / \sqrt{K}, \qquad dK = dS^\top Q / \sqrt{K} \qquad\qquad (4)$$
#
# **What has to be kept?** P, if nothing else helped. FlashAttention keeps the log-sum-exp of every
# row and the output O, because its rows are too long for a tile and because
#
# $$\delta_m = \sum_r P_{mr} \sum_k dO_{mk} V_{rk} = \sum_k dO_{mk} \, O_{mk} \qquad\qquad (5)$$
#
# Here a token has R = 64 keys, all of them in the tile. P is made again from Q and K, and δ is the
# sum (3) over what is in the tile anyway. The backward pass reads Q, K, V and dO, **and nothing
# else**.
#
# **One image, many programs.** dK and dV of an image are sums over *all* tokens that look at it. If
# its tokens are cut into items, each item yields a partial sum:
#
# $$dV = \sum_{items} P_{item}^\top dO_{item}, \qquad
# dK = \sum_{items} dS_{item}^\top Q_{item} / \sqrt{K} \qquad\qquad (6)$$
#
# The sum over no item at all is 0, and someone has to write that 0.
#
# **The gate.** After the attention come the out-projection and the gate,
# $y' = y + \tanh(\alpha) \, A W^\top$. By module 07, $d\alpha = (1 - \tanh^2 \alpha) \langle dy',
# A W^\top \rangle$, for which one would keep $A W^\top$ or make it again. But a sum of products can
# be added up in another order:
#
# $$\langle dy', A W^\top \rangle = \sum_{m,d,i} dy'_{md} A_{mi} W_{di} = \langle W, dW' \rangle,
# \qquad dW' = dy'^\top A \qquad\qquad (7)$$
#
# and $dW'$ is needed for W's own gradient in any case:
#
# $$dW = \tanh(\alpha)\, dW', \qquad d\alpha = (1 - \tanh^2 \alpha)\, \langle W, dW' \rangle
# \qquad\qquad (8)$$

# %% [markdown]
# ## Loops, then products
#
# Equations (2) to (4), token by token, for one image and one head:


# %%
def backward_loop(dout, q, k, v):  # [M, K], [M, K], [R, K], [R, K]
    dq, dk, dv, scale = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), q.shape[1] ** -0.5
    for m in range(len(q)):
        p = softmax(k @ q[m] * scale)  # (1), one token's R weights
        dv += np.outer(p, dout[m])  # (2), one token's share
        dp = v @ dout[m]
        ds = np.array([sum(p[r] * ((r == j) - p[j]) * dp[r] for r in range(len(p)))
                       for j in range(len(p))])  # (3), by the definition  # fmt: skip
        dq[m] = ds @ k * scale  # (4)
        dk += np.outer(ds, q[m]) * scale
    return dq, dk, dv


# %% [markdown]
# ### Exercise 12.1: through the softmax
#
# ★☆☆ · 6 minutes · 1 or 2 lines. Write equation (3) for arrays of any number of axes: p and dp are
# [.., M, R], and so is the result.
#
# <details><summary>Hint 1</summary>
#
# δ is a sum over the last axis; `keepdims=True` makes it fit again.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Mind the brackets: $P (dP - \delta)$, not $P\,dP - \delta$. Each row of dS must sum to 0.
#
# </details>


# %% tags=["exercise"]
def dscores(p, dp):  # [.., M, R] twice -> [.., M, R]
    ...  # your code


# %% tags=["solution"]
def dscores(p, dp):  # [.., M, R] twice -> [.., M, R]
    delta = (p * dp).sum(axis=-1, keepdims=True)
    return p * (dp - delta)  # equation (3)


# %%
check("12.1", dscores)

# %% [markdown]
# The library's version, in whole matrices:

# %%
source(attention_backward)

# %%
rng = np.random.default_rng(0)
dout, q = rng.normal(size=(2, 7, 4))
k, v = rng.normal(size=(2, 5, 4))
for mine, library in zip(backward_loop(dout, q, k, v), attention_backward(dout, q, k, v)):
    assert np.allclose(mine, library)

# %% [markdown]
# **Predict, then run:** equation (5) says that δ can be had from O and dO. Which of the two sums is
# shorter, over R = 64 keys or over K = 128 channels? And which needs something from memory?

# %%
p, out = softmax(q @ k.T / 2), attention(q, k, v)
assert np.allclose((p * (dout @ v.T)).sum(axis=1), (dout * out).sum(axis=1))  # (3) and (5)
rows = 8 * 2048 * 16  # tokens of 8 pages times 16 heads
megabytes = {"P kept": 2 * 64, "O and log-sum-exp": 128 + 2, "made again": 0}  # of 2 bytes each
for name, numbers in megabytes.items():
    print(f"{name:<20}{numbers * 2 * rows / 1e6:>6.0f} MB written or read besides Q, K, V, dO, dQ")

# %% [markdown]
# (P is written once and read once. O is written by the forward pass anyway, only its reading
# counts.) Making S again costs one product of 2·M·R·K operations more. The kernel is limited by
# memory, and the arithmetic units wait: operations are the cheaper currency.

# %% [markdown]
# ## A backward tile
#
# Now in Triton. Most things are as in module 11. Two are new: a loop over tiles of tokens inside
# one program, with a sum that stays in registers, and P has to be normalised *before* its product.
# (In the forward pass, dividing by the row's sum could wait till after $P V$, as a row of O has one
# sum. A row of dV is made of all tokens, each with its own.)
#
# ### Exercise 12.2: a tile of dV
#
# ★★★ · 15 minutes · 12 to 16 lines. One program computes $dV = P^\top dO$ for all M tokens of an
# image, in tiles of `BLOCK_M` tokens. q and dout are [M, K], k and out (which is dV) are [R, K],
# without gaps. P is made again from q and k, R ≤ `BLOCK_R`.
#
# <details><summary>Hint 1</summary>
#
# Before the loop: load k, and `dv = tl.zeros([BLOCK_R, K], tl.float32)`. The loop:
# `for start in range(0, M, BLOCK_M)`, whose tokens are `start + tl.arange(0, BLOCK_M)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Make P transposed, [R, M], from the start: `tl.dot(k, tl.trans(q))`. Padded keys are *rows* now,
# a token's softmax runs over axis 0, and $dV$ needs no further transpose.
#
# </details>
# <details><summary>Hint 3</summary>
#
# What of the tokens past M? With `other=0.0` their dO is 0, so they add nothing.
#
# </details>


# %% tags=["exercise"]
@triton.jit
def dv_of(
    q_ptr, k_ptr, dout_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ...  # your code


# %% tags=["solution"]
@triton.jit
def dv_of(
    q_ptr, k_ptr, dout_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    keys = r[:, None] * K + c[None, :]
    k = tl.load(k_ptr + keys, (r < R)[:, None], other=0.0)
    total = tl.zeros([BLOCK_R, K], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        rows = m[:, None] * K + c[None, :]
        q = tl.load(q_ptr + rows, (m < M)[:, None], other=0.0)
        dout = tl.load(dout_ptr + rows, (m < M)[:, None], other=0.0)
        scores = tl.dot(k, tl.trans(q)) * K**-0.5  # equation (1), transposed
        scores = tl.where((r < R)[:, None], scores, float("-inf"))
        p = tl.exp(scores - tl.max(scores, 0)[None, :])
        total += tl.dot(p / tl.sum(p, 0)[None, :], dout)  # equation (2)
    tl.store(out_ptr + keys, total, (r < R)[:, None])


# %%
check("12.2", dv_of)

# %% [markdown]
# **Transposed or not?** A tensor core multiplies tiles whose first side is at least 64 on an H100.
# Of 32 tokens, $S = Q K^\top$ would leave half of it idle; $S^\top = K Q^\top$, whose first side is
# the 64 keys, does not. The numbers are the same. The project's kernel takes 64 or 128 tokens at a
# time and needs no transpose: a token's scores then lie with four threads of one warp, which find
# their maximum, sum and δ alone. Transposed, they lie across all warps. Counted in the code for an
# H100, the loop has 45 % fewer instructions a token this way (K = 64, bfloat16).

# %% [markdown]
# ## The project's kernel
#
# What one program does, in NumPy, for an item and a head:


# %%
def program(pid, dout, q, k, v, order, items, dq, dk, dv, parts):
    item, h = divmod(pid, q.shape[2])
    b, image, begin, end, slot = items[item]
    token, n, scale = order[b, begin:end], image - 1, q.shape[3] ** -0.5
    if image == 0:
        dq[b, token, h] = 0
        return
    q_, dout_, k_, v_ = q[b, token, h], dout[b, token, h], k[b, n, :, h], v[b, n, :, h]
    scores = q_ @ k_.T * scale  # (1)
    ds = softmax_backward(dout_ @ v_.T, scores)  # (2), (3)
    dq[b, token, h] = ds @ k_ * scale  # (4)
    to_k, to_v = (dk[b, n], dv[b, n]) if slot < 0 else (parts[0][slot], parts[1][slot])
    to_k[:, h], to_v[:, h] = ds.T @ q_ * scale, softmax(scores).T @ dout_  # (6)


# %%
from miniflamingo.kernels import image_causal_attention as kernel
from miniflamingo.kernels.common import runtime, work_list

source(kernel._backward.fn)

# %% [markdown]
# Read it beside the equations. `k` and `v` are loaded once, before the loop. `scores`, `p`, `dp`
# and `dscores` are [M, R]. `tl.sum(p * dp, 1)` is δ: no O, no log-sum-exp. `dscores` is rounded to
# the inputs' precision for the tensor cores, while `dk` and `dv` add up in float32. The scale comes
# in once, where dk is stored. And `slot` says where to: to the image's gradient if the item is the
# image's only one, else to a partial sum of its own.
#
# A page with 5 tokens before its first image, 7 for image 1, 3 for image 2 and none for image 3, in
# items of at most 4 tokens:

# %%
phi = np.repeat([0, 1, 2], [5, 7, 3])[None].astype(np.int32)
(B, L), N, R, H, K = phi.shape, 3, 5, 2, 16
work = work_list.build_work_list(torch.from_numpy(phi), N, chunk=4)
order, items, splits = (x.numpy() for x in (work.order, work.backward_items, work.splits))
print("items: batch row, image, begin, end, slot\n", items)
print("splits: image (from 0), first slot, number of slots:", splits.tolist())

# %%
rng = np.random.default_rng(1)
dout, q = rng.normal(size=(2, B, L, H, K))
k, v = rng.normal(size=(2, B, N, R, H, K))
dq, dk, dv = (np.full_like(x, np.nan) for x in (q, k, v))
parts = np.full((2, work.num_slots, R, H, K), np.nan)
for pid in range(len(items) * H):
    program(pid, dout, q, k, v, order, items, dq, dk, dv, parts)
print("images whose dk is still NaN:", 1 + np.flatnonzero(np.isnan(dk[0]).any(axis=(1, 2, 3))))

# %% [markdown]
# ## Adding up partial sums
#
# Image 1 had two items, whose partial sums wait in slots 0 and 1. A second, small kernel adds them
# up, one program for each image of `splits` and block of numbers.
#
# Why split at all? With one image a page there is one run for each page and head. For 8 pages of
# 2,048 tokens and 16 heads these are 128 programs for the 132 processors of an H100, each with a
# long loop over its tokens. `choose_chunks` cuts so that 256 programs are there, two for each
# processor; in the forward pass, which has no partial sums, 2,048.
#
# ### Exercise 12.3: add up the partial sums
#
# ★★☆ · 8 minutes · 4 to 6 lines. `parts` is [slots, size], `out` [images, size], `splits` int
# [images, 2]: an image's first slot, and how many slots it has. Return a copy of out in which every
# image with slots has their sum; the others keep what their only item stored.
#
# <details><summary>Hint 1</summary>
#
# A loop over the images; nothing to do where the number of slots is 0.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Its slots are `parts[slot : slot + slots]`. What lies in out for a split image is no number of
# yours: replace it.
#
# </details>


# %% tags=["exercise"]
def add_up(parts, out, splits):  # [slots, size], [images, size], int[images, 2]
    ...  # your code


# %% tags=["solution"]
def add_up(parts, out, splits):  # [slots, size], [images, size], int[images, 2]
    total = out.copy()
    for image, (slot, slots) in enumerate(splits):
        if slots > 0:
            total[image] = parts[slot : slot + slots].sum(axis=0)  # equation (6)
    return total


# %%
check("12.3", add_up)

# %%
source(work_list._sum_partials.fn)

# %% [markdown]
# Its `splits` do not name every image, only as many as some φ can split: an image needs more than a
# chunk of a row's tokens for that. So no program starts, and no memory waits, for the others. The
# kernel, its partial sums added up, equals the library:


# %%
def run_backward(dout, q, k, v, phi, work=None):
    arguments = [torch.from_numpy(x) for x in (dout, q, k, v, phi)]
    with runtime.poisoned():  # fresh memory holds NaN
        return [x.numpy() for x in kernel.image_causal_attention_backward(*arguments, work)]


grads = run_backward(dout, q, k, v, phi, work)
for mine, library in zip(grads, xattn.image_causal_attention_backward(dout, q, k, v, phi)):
    assert np.allclose(mine, library)

# %% [markdown]
# **Predict, then run:** how often does the backward kernel touch each element of q, dout, k and dq,
# and the output of the forward pass?

# %%
tensors = dict(dout=dout, q=q, k=k, v=v, dq=dq, dk=dk, dv=dv, dk_part=parts[0], dv_part=parts[1])
tensors = {name: fenced(x) for name, x in tensors.items()}
tensors |= dict(statistics=torch.empty(0), delta=torch.empty(0))  # of images of several blocks
tensors |= dict(order=work.order, items=work.backward_items)
strides = [s for n, axes in (("dout", 3), ("q", 3), ("k", 4), ("v", 4))
           for s in tensors[n].stride()[:axes]]  # fmt: skip
sizes = kernel.options_for(kernel._backward, K, torch.float32, R)
with Watch(**tensors) as watch:
    runtime.launch(kernel._backward, len(items) * H, *tensors.values(), *strides, L, N, H, **sizes)

# %%
assert watch.fault is None
for name in ("q", "dout", "k"):
    size = tensors[name].numel()
    print(f"{name:<6}read {watch.count(watch.loads, name) / size:.2f} times")
print(f"dq    written {watch.count(watch.stores, 'dq') / q.size:.2f} times")
print("the forward's output: it is not even an argument")

# %% [markdown]
# The 5 tokens without an image, a third, are not read: 0.67. Image 1 is read by two items, image 2
# and 3 by one each.
#
# ## Why not atomics?
#
# A GPU can add to a number in memory in one go (`tl.atomic_add`), so that all items of an image
# could add to one dk, without slots and without a second kernel. But programs end in any order, and
# **float addition is not associative**:

# %%
a, b, c = np.float32([1e8, -1e8, 1])
print("(a + b) + c =", (a + b) + c, "    a + (b + c) =", a + (b + c))

# %% [markdown]
# **Predict, then run:** 64 partial sums of one number, added in float32 in 300 random orders. How
# many different results?

# %%
import math

values = np.random.default_rng(2).normal(size=64).astype(np.float32)
exact = math.fsum(values.tolist())
orders = np.random.default_rng(3).permuted(np.tile(values, (300, 1)), axis=1)
sums = np.cumsum(orders, axis=1, dtype=np.float32)[:, -1]  # one after the other
print(len(np.unique(sums)), "different sums")

# %%
show(
    plots.plot_orders(sums, exact),
    alt="A bar chart of 300 orders by how far their float32 sum is from the exact one, in steps of "
    "the last place: a hump around 0 that reaches some steps to both sides.",
)

# %% [markdown]
# None of them is *wrong*, all are within rounding. But with atomics two runs of the same training
# step may differ in their last bits, the difference grows from step to step, and a fault can not be
# repeated. In a fixed order, the tokens' own, every run gives the same bits:

# %%
again = run_backward(dout, q, k, v, phi, work)
print("two runs, bit for bit:", all(np.array_equal(x, y) for x, y in zip(grads, again)))
other = run_backward(dout, q, k, v, phi)  # one item an image: another order of additions
print("dk with the runs cut elsewhere:", np.array_equal(grads[1], other[1]))

# %% [markdown]
# So the way in which runs are cut is part of a result's last bits, and the project's depends on the
# shapes alone. The interpreter would give the same bits with atomics, too, since its programs run
# one after the other. That a GPU's do not is why the kernel has no atomics, and it is something
# that the interpreter can not show.

# %% [markdown]
# ## The images that nobody reads
#
# Image 3 has no token. Equation (6) is then an empty sum, and its gradient exactly 0. But memory
# for dk is *uninitialised*: whoever does not write leaves what lay there. So the work list has an
# item without a token for each such image, whose program loops over nothing and stores its zeros.
#
# ### Exercise 12.4: which images are not read?
#
# ★☆☆ · 5 minutes · 1 to 3 lines. From φ int [B, L], return bool [B, N]: true for the images that no
# token of their page looks at.
#
# <details><summary>Hint 1</summary>
#
# Compare [B, L, 1] with the N image numbers, which count from 1.
#
# </details>
# <details><summary>Hint 2</summary>
#
# No token of L looks at it: `~(...).any(axis=1)`.
#
# </details>


# %% tags=["exercise"]
def unread(phi, N):  # int[B, L], int -> bool[B, N]
    ...  # your code


# %% tags=["solution"]
def unread(phi, N):  # int[B, L], int -> bool[B, N]
    looks = phi[:, :, None] == np.arange(1, N + 1)
    return ~looks.any(axis=1)


# %%
check("12.4", unread)

# %% [markdown]
# How does one *find* a forgotten store? Freshly allocated memory is often zero by chance, and then
# the test passes. `runtime.poisoned()` fills it with NaN first. We shall need that in a moment.

# %% [markdown]
# ## The gate
#
# ### Exercise 12.5: the gate's gradient, without the branch
#
# ★★☆ · 9 minutes · 3 or 4 lines. Write equation (8). dout is $dy'$ [M, D], a [M, I], alpha one
# number, weight [D, I]. Return the pair (dalpha, dweight). You do not need $A W^\top$.
#
# <details><summary>Hint 1</summary>
#
# $dW' = dy'^\top A$ is `dout.T @ a`, [D, I] like weight.
#
# </details>
# <details><summary>Hint 2</summary>
#
# $\langle W, dW' \rangle$ is `(weight * dw).sum()`, with $dW'$ *before* it is multiplied by the
# gate.
#
# </details>


# %% tags=["exercise"]
def gate_gradients(dout, a, alpha, weight):  # [M, D], [M, I], [], [D, I]
    ...  # your code


# %% tags=["solution"]
def gate_gradients(dout, a, alpha, weight):  # [M, D], [M, I], [], [D, I]
    dw, t = dout.T @ a, np.tanh(alpha)
    return (1 - t * t) * (weight * dw).sum(), t * dw  # equation (8)


# %%
check("12.5", gate_gradients)

# %% [markdown]
# In the project, the vendor's library makes $dW'$, and one kernel passes over it: each program
# stores its numbers of $dW'$, times the gate, and its share of $\langle W, dW' \rangle$.

# %%
from miniflamingo.kernels import gated_linear

source(gated_linear._gate_dweight.fn)

# %% [markdown]
# **Predict, then run:** the gate is shut, α = 0. Which of the gradients of x, a, α and W are 0?

# %%
rng, D, I = np.random.default_rng(5), 24, 20
x, dy = rng.normal(size=(2, 30, D))
a, weight = rng.normal(size=(30, I)), rng.normal(size=(D, I))
for alpha in (0.0, 0.5):
    tensors = [torch.from_numpy(np.asarray(t)) for t in (dy, x, a, alpha, weight)]
    grads = gated_linear.gated_linear_backward(*tensors)
    twin = xattn.tanh_gate_backward(dy, x, alpha, a @ weight.T)[1]  # module 08's, with the branch
    assert np.isclose(float(grads[2]), twin)
    names = [n for n, g in zip(("dx", "da", "dalpha", "dW"), grads) if g.any()]
    print(f"alpha = {alpha}: not 0 are", ", ".join(names))

# %% [markdown]
# ## Break it
#
# Four bugs in the project's backward kernel, each in one place:
#
# 1. **No δ**: the softmax's gradient without the row's other weights.
# 2. **No scale in dk**: it was in the scores, and is forgotten on the way back.
# 3. **Unread images are skipped**: "no tokens, nothing to do".
# 4. **Every item stores to the image's dk itself**, as if it were the only one.

# %%
bugs = {
    "none": ("item, h", "item, h"),
    "1 no delta": ("p * (dp - delta[:, None])", "p * dp"),
    "2 no scale in dk": (
        "dk_ptr + first, r, H * K, r < R, dk * SCALE",
        "dk_ptr + first, r, H * K, r < R, dk",
    ),
    "3 unread are skipped": ("if image == 0:", "if (image == 0) | (begin == end):"),
    "4 slots are ignored": ("if slot < 0:", "if slot < 99:"),
}

# %% [markdown]
# Three cases: two images that are read, an unread image, and a long run in several items. Each is
# run with poisoned memory and with memory that happens to hold zeros.

# %%
from unittest.mock import patch


def case(*counts, N=2, chunk=None, K=16):  # tokens of image 1, 2, ...
    phi = np.repeat(np.arange(1, len(counts) + 1), counts)[None].astype(np.int32)
    rng = np.random.default_rng(0)
    dout, q = rng.normal(size=(2, 1, phi.size, 1, K))
    work = work_list.build_work_list(torch.from_numpy(phi), N, chunk=chunk)
    return dout, q, *rng.normal(size=(2, 1, N, 6, 1, K)), phi, work


cases = {
    "two images": case(8, 8),
    "an unread image": case(8, 0),
    "a long run": case(12, 9, chunk=4),
}


# %%
def agrees(*arguments, fill):
    tensors = [torch.from_numpy(x) for x in arguments[:5]]
    with runtime.replaced(allocate=lambda shape, **where: torch.full(shape, fill, **where)):
        grads = kernel.image_causal_attention_backward(*tensors, arguments[5])
    library = xattn.image_causal_attention_backward(*arguments[:5])
    return all(np.allclose(x, y, atol=1e-6) for x, y in zip(grads, library))


# %% [markdown]
# **Predict, then run:** which case finds which bug? And for which does it matter what lay in
# memory?

# %%
print(f"{'':<22}" + "".join(f"{name:>32}" for name in cases))
print(f"{'':<22}" + f"{'NaN':>20}{'zeros':>12}" * 3)
for bug, (old, new) in bugs.items():
    with patch.object(kernel, "_backward", altered(kernel._backward, old, new)):
        marks = ["right" if agrees(*c, fill=f) else "wrong"
                 for c in cases.values() for f in (float("nan"), 0.0)]  # fmt: skip
    print(f"{bug:<22}" + "".join(f"{a:>20}{b:>12}" for a, b in zip(marks[::2], marks[1::2])))

# %% [markdown]
# Bug 1 shows everywhere: any comparison with central differences finds it. Bug 2 sits in one of two
# stores, and where every image has several items the other one is taken. Bug 3 needs an unread
# image *and* poisoned memory. With zeros it is invisible, and on a GPU, where fresh memory is often
# zero, it shows much later, as a NaN in the loss. Bug 4 needs a run with several items. **A
# case for every branch, and poison.**
#
# The gate has its own classic, the missing $1 - \tanh^2$ (module 08). At α = 0 the factor is 1, so:

# %%
for alpha in (0.0, 0.5):
    dw = dy.T @ a
    without, right = (weight * dw).sum(), xattn.tanh_gate_backward(dy, x, alpha, a @ weight.T)[1]
    print(
        f"alpha = {alpha}: without the factor {'right' if np.isclose(without, right) else 'wrong'}"
    )
print(check("12.5", lambda dout, a, alpha, w: ((w * (dout.T @ a)).sum(), dout.T @ a)).message)

# %% [markdown]
# ## Takeaways
#
# - dV = PᵀdO, dP = dO Vᵀ, dS = P(dP − δ), dQ = dS K / √K, dK = dSᵀQ / √K.
# - A row's whole softmax is in the tile, so P and δ are made again. Read: Q, K, V, dO. No O, no
#   log-sum-exp.
# - Transposed products keep the tensor cores full with few tokens in a tile.
# - A token belongs to one item: dQ is a plain store. An image may belong to several: partial sums
#   in float32, added up in a fixed order, so two runs agree bit for bit.
# - An empty sum is 0, and someone must write it. Poison finds who did not.
# - The gate: dα = (1 − tanh²α)⟨W, dW'⟩, from what W's gradient makes anyway.
#
# **In the paper:** section 3.1.2 (the gate) and 3.1.3 (the attention); gradients and kernels are no
# subject of it. **In the repository:** `kernels/image_causal_attention.py`,
# `kernels/gated_linear.py`, and `python -m miniflamingo compare` for all cases.
#
# **Next:** module 13, speed: how many bytes and operations these kernels cost, and what a GPU makes
# of them.
