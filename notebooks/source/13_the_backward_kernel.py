# %% [markdown]
# # 13 The backward kernel and the gate's gradient
#
# **The question: the forward kernel keeps nothing but its output. From what are the gradients made,
# and how do many programs add up one gradient without disturbing each other?**
#
# After this module you can
#
# - derive dV, dP, dS, dQ and dK, and say why neither the output nor a log-sum-exp is read again;
# - write a backward tile in Triton, with transposed products, and read the project's kernel;
# - split the tokens of one image over several programs, and add up their partial sums;
# - (optional) say who must write zeros, why the order of additions is fixed, and get the gate's
#   gradient for nearly nothing.
#
# **You need:** module 12 (kernels, the work list) and, for the gate, module 08. As there, the
# kernels run in Triton's interpreter, or in its imitation where Triton does not exist.
#
# **Time:** about 50 minutes for the core path, and 40 for what is marked optional. Computing takes
# about 8 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 10: the five products and (1) to (4), at the board, shapes first. 10 to 16:
# exercise 13.1. 16 to 20: what has to be kept, guess 13.a. 20 to 36: the tile and exercise 13.2.
# 36 to 42: `program` beside the kernel. 42 to 52: partial sums, exercise 13.3, the bug. Optional
# parts are independent of each other; the gate is the one to choose if there is half an hour more.
#
# **Predictions.** 13.a: the sum over keys is the shorter one, the one over channels needs memory,
# and P costs 67 MB; who says 33.5 forgets that P is written *and* read. 13.b: 0.67, 0.67, 1.33, 1
# and 0; "1" for q forgets the tokens without an image, and most expect the output to be read. 13.c:
# 13 results; usual guesses are 1 ("addition is commutative", which is not the point) and 300. 13.d:
# da and dW are 0, dx is not (the skip path), dalpha is not (or no gate would ever open). 13.e: case
# 3 alone. 13.f: bug 2 by all three, bug 3 by cases 1 and 2, bug 4 by case 2 and only where memory
# held NaN.
#
# **Open questions.** "How does one find a forgotten store?" is answered in the text: by poison. No
# other is left open.
#
# **Misconceptions.** "The backward pass needs the output": it does where a row is longer than a
# tile, by (5). "dS = P · dP": the row's other weights are forgotten. "Deterministic means exact":
# it means the same bits again. "An image without a token needs no work": somebody has to write its
# zeros.
#
# **To cut.** First guess 13.a (tell its result), then the source of the kernel (`program` says the
# same), then exercise 13.1 (derive (3) at the board and give the line). Keep 13.2.

# %% [markdown]
# ## The picture and the letters
#
# For one image and one head, the backward pass is five matrix products. Two of them make the
# forward's numbers and their gradients again, three make the results:

# %%
import numpy as np

from miniflamingo import plots, xattn
from miniflamingo.attention import attention, attention_backward
from miniflamingo.course import check, guess, show, source, told
from miniflamingo.course.triton_cpu import Watch, altered, fenced, tl, torch, triton
from miniflamingo.functional import softmax, softmax_backward

# %%
products = [
    (("S", "L", "R"), ("Q", "L", "K"), ("Kᵀ", "K", "R")),
    (("dP", "L", "R"), ("dO", "L", "K"), ("Vᵀ", "K", "R")),
    (("dV", "R", "K"), ("Pᵀ", "R", "L"), ("dO", "L", "K")),
    (("dK", "R", "K"), ("dSᵀ", "R", "L"), ("Q", "L", "K")),
    (("dQ", "L", "K"), ("dS", "L", "R"), ("K", "R", "K")),
]
show(
    plots.plot_products(products, {"L": 32, "R": 64, "K": 64}, unit=0.8),
    alt="Five matrix products to scale, L = 32 tokens, R = K = 64. S, L by R, is Q times K "
    "transposed; dP, L by R, is dO times V transposed; dV and dK, R by K, are P transposed times "
    "dO and dS transposed times Q; dQ, L by K, is dS times K.",
)

# %% [markdown]
# | letter | meaning |
# |---|---|
# | $d\mathbf{X}$ | the gradient of the loss with respect to X, of X's shape |
# | $\mathbf{O}, d\mathbf{O}$ | the attention's output and its gradient, which is given: [L, K] |
# | L, R, K | tokens that look at an image, its visual tokens, head width |
# | $\mathbf{Q}, \mathbf{K}, \mathbf{V}$ | queries, keys, values as matrices; K alone is a width |
# | $\mathbf{S}, \mathbf{P}$ | scores and weights, [L, R] |
# | i, r, k | a token, a key, a channel |
# | $\delta_i$ | one number for each token, defined in (3) |

# %% [markdown]
# ## The derivation
#
# Forward, for the L tokens that look at one image:
#
# $$\mathbf{S} = \mathbf{Q} \mathbf{K}^\top / \sqrt{K}, \qquad
# \mathbf{P} = \mathrm{softmax}(\mathbf{S}), \qquad \mathbf{O} = \mathbf{P} \mathbf{V}
# \qquad\qquad (1)$$
#
# **Through a product.** $O_{ik} = \sum_r P_{ir} V_{rk}$. The number $V_{rk}$ stands in the channel
# k of every token's output, with the factor $P_{ir}$; so its gradient is $\sum_i P_{ir} \,
# dO_{ik}$. The number $P_{ir}$ stands in all channels of token i's output, with the factor
# $V_{rk}$; so its gradient is $\sum_k dO_{ik} V_{rk}$. As matrices:
#
# $$d\mathbf{V} = \mathbf{P}^\top d\mathbf{O}, \qquad d\mathbf{P} = d\mathbf{O}\, \mathbf{V}^\top
# \qquad\qquad (2)$$
#
# **Through the softmax.** $\partial P_r / \partial S_j = P_r ([r = j] - P_j)$: raising one score
# raises its own weight and lowers all the others. Summed against dP,
# $dS_j = \sum_r dP_r P_r ([r = j] - P_j)$. The bracket's first part leaves the one term r = j, and
# its second takes $P_j$ out of the sum:
#
# $$dS_{ir} = P_{ir} \, (dP_{ir} - \delta_i), \qquad \delta_i = \sum_r P_{ir} \, dP_{ir}
# \qquad\qquad (3)$$
#
# **Through the scores**, which are a product again, of Q and K:
#
# $$d\mathbf{Q} = d\mathbf{S} \, \mathbf{K} / \sqrt{K}, \qquad
# d\mathbf{K} = d\mathbf{S}^\top \mathbf{Q} / \sqrt{K} \qquad\qquad (4)$$
#
# **What has to be kept?** P, if nothing else helped.
# [FlashAttention](https://arxiv.org/abs/2205.14135) keeps the log-sum-exp of every row and the
# output O, because its rows are too long for a tile and because
#
# $$\delta_i = \sum_r P_{ir} \sum_k dO_{ik} V_{rk} = \sum_k dO_{ik} \sum_r P_{ir} V_{rk}
# = \sum_k dO_{ik} \, O_{ik} \qquad\qquad (5)$$
#
# Here a token has R = 64 keys, all of them in the tile. P is made again from Q and K, and δ is the
# sum (3) over what is in the tile anyway. The backward pass reads Q, K, V and dO, **and nothing
# else**.
#
# **One image, many programs.** dK and dV of an image are sums over *all* tokens that look at it. If
# its tokens are cut into items, each item yields a partial sum:
#
# $$d\mathbf{V} = \sum_{items} \mathbf{P}_{item}^\top d\mathbf{O}_{item}, \qquad
# d\mathbf{K} = \sum_{items} d\mathbf{S}_{item}^\top \mathbf{Q}_{item} / \sqrt{K} \qquad\qquad (6)$$
#
# The sum over no item at all is 0, and someone has to write that 0.

# %% [markdown]
# ## Loops, then products
#
# Equations (2) to (4), token by token, for one image and one head:


# %%
def backward_loop(dout, q, k, v):  # [L, K], [L, K], [R, K], [R, K]
    dq, dk, dv, scale = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), q.shape[1] ** -0.5
    for i in range(len(q)):
        p = softmax(k @ q[i] * scale)  # (1), one token's R weights
        dv += np.outer(p, dout[i])  # (2), one token's share
        dp = v @ dout[i]
        ds = np.array([sum(p[r] * ((r == j) - p[j]) * dp[r] for r in range(len(p)))
                       for j in range(len(p))])  # (3), by the definition  # fmt: skip
        dq[i] = ds @ k * scale  # (4)
        dk += np.outer(ds, q[i]) * scale
    return dq, dk, dv


# %% [markdown]
# ### Exercise 13.1: through the softmax
#
# ★☆☆ · 6 minutes · 1 or 2 lines. Write equation (3) for arrays of any number of axes: p and dp are
# [.., L, R], and so is the result.
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
def dscores(p, dp):  # [.., L, R] twice -> [.., L, R]
    ...  # your code


# %% tags=["solution"]
def dscores(p, dp):  # [.., L, R] twice -> [.., L, R]
    delta = (p * dp).sum(axis=-1, keepdims=True)
    return p * (dp - delta)  # equation (3)


# %%
check("13.1", dscores)

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
# shorter, the one over R = 64 `"keys"` or the one over K = 128 `"channels"`? Which of the two needs
# something from memory? And how many megabytes does it cost to write P and read it again, for 8
# pages of 2,048 tokens and 16 heads, at 2 bytes a number?

# %%
guess("13.a", shorter=..., from_memory=..., megabytes_of_p=...)

# %% tags=["reveal"]
p, out = softmax(q @ k.T / 2), attention(q, k, v)
assert np.allclose((p * (dout @ v.T)).sum(axis=1), (dout * out).sum(axis=1))  # (3) and (5)
rows = 8 * 2048 * 16  # tokens of 8 pages times 16 heads
megabytes = {"P kept": 2 * 64, "O and log-sum-exp": 128 + 2, "made again": 0}  # of 2 bytes each
for name, numbers in megabytes.items():
    print(f"{name:<20}{numbers * 2 * rows / 1e6:>6.0f} MB written or read besides Q, K, V, dO, dQ")
terms = {"keys": 64, "channels": 128}
extra = {"keys": megabytes["made again"], "channels": megabytes["O and log-sum-exp"]}
told(
    "13.a",
    shorter=min(terms, key=terms.get),
    from_memory=max(extra, key=extra.get),
    megabytes_of_p=megabytes["P kept"] * 2 * rows / 1e6,
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# (P is written once and read once. O is written by the forward pass anyway, only its reading
# counts.) Making S again costs one product of 2·L·R·K operations more. The kernel is limited by
# memory, and the arithmetic units wait: operations are the cheaper currency.
#
# </details>

# %% [markdown]
# ## A backward tile
#
# Now in Triton. Most things are as in module 12. Two are new: a loop over tiles of tokens inside
# one program, with a sum that stays in registers, and P has to be normalised *before* its product.
# (In the forward pass, dividing by the row's sum could wait till after $P V$, as a row of O has one
# sum. A row of dV is made of all tokens, each with its own.)
#
# ### Exercise 13.2: a tile of dV
#
# ★★★ · 15 minutes · 12 to 16 lines. One program computes $dV = P^\top dO$ for all L tokens of an
# image, in tiles of `BLOCK_M` tokens. q and dout are [L, K], k and out (which is dV) are [R, K],
# without gaps. P is made again from q and k, R ≤ `BLOCK_R`.
#
# <details><summary>Hint 1</summary>
#
# Before the loop: load k, and `dv = tl.zeros([BLOCK_R, K], tl.float32)`. The loop:
# `for start in range(0, L, BLOCK_M)`, whose tokens are `start + tl.arange(0, BLOCK_M)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Make P transposed, [R, L], from the start: `tl.dot(k, tl.trans(q))`. Padded keys are *rows* now,
# a token's softmax runs over axis 0, and $dV$ needs no further transpose.
#
# </details>
# <details><summary>Hint 3</summary>
#
# What of the tokens past L? With `other=0.0` their dO is 0, so they add nothing.
#
# </details>


# %% tags=["exercise"]
@triton.jit
def dv_of(
    q_ptr, k_ptr, dout_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ...  # your code


# %% tags=["solution"]
@triton.jit
def dv_of(
    q_ptr, k_ptr, dout_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    keys = r[:, None] * K + c[None, :]
    k = tl.load(k_ptr + keys, (r < R)[:, None], other=0.0)
    total = tl.zeros([BLOCK_R, K], tl.float32)
    for start in range(0, L, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        rows = i[:, None] * K + c[None, :]
        q = tl.load(q_ptr + rows, (i < L)[:, None], other=0.0)
        dout = tl.load(dout_ptr + rows, (i < L)[:, None], other=0.0)
        scores = tl.dot(k, tl.trans(q)) * K**-0.5  # equation (1), transposed
        scores = tl.where((r < R)[:, None], scores, float("-inf"))
        p = tl.exp(scores - tl.max(scores, 0)[None, :])
        total += tl.dot(p / tl.sum(p, 0)[None, :], dout)  # equation (2)
    tl.store(out_ptr + keys, total, (r < R)[:, None])


# %%
check("13.2", dv_of)

# %% [markdown]
# ### Transposed or not? (optional)
#
# A tensor core multiplies tiles whose first side is at least 64 on an H200. Of 32 tokens, $Q
# K^\top$ would leave half of it idle; $K Q^\top$, whose first side is the 64 keys, does not. The
# numbers are the same. The project's kernel takes 64 or 128 tokens at a time and needs no
# transpose: a token's scores then lie with four threads of one warp, which find their maximum, sum
# and δ alone. Transposed, they lie across all warps, which would have to exchange each of the
# three.

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
# and `dscores` are [L, R]. `tl.sum(p * dp, 1)` is δ: no O, no log-sum-exp. `dscores` is rounded to
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
# long loop over its tokens. `choose_chunks` cuts so that at least 256 programs are there, two for
# each processor; in the forward pass, which has no partial sums, 2,048.
#
# ### Exercise 13.3: add up the partial sums
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
check("13.3", add_up)

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
# ### How often is memory touched? (optional)
#
# **Predict, then run:** how often does the backward kernel read an element of q, of dout and of k,
# how often does it write one of dq, and how often does it read one of the forward pass's output?
# All on average: of the 15 tokens 5 have no image, image 1 has two items, images 2 and 3 have one
# each.

# %%
guess("13.b", q=..., dout=..., k=..., dq=..., forward_output=...)

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

# %% tags=["reveal"]
assert watch.fault is None  # nothing is touched that is not among the tensors
touched = {
    name: watch.count(watch.loads, name) / tensors[name].numel() for name in ("q", "dout", "k")
}
touched["dq"] = watch.count(watch.stores, "dq") / q.size
touched["forward_output"] = watch.count(watch.loads, "out") / q.size  # it is not even an argument
told("13.b", within=0.05, **touched)

# %% [markdown]
# <details><summary>After the run</summary>
#
# The 5 tokens without an image, a third, are not read: 0.67. Image 1 is read by two items, image 2
# and 3 by one each. The forward's output is not even an argument.
#
# </details>
#
# ## Why not atomics? (optional)
#
# A GPU can add to a number in memory in one go (`tl.atomic_add`), so that all items of an image
# could add to one dk, without slots and without a second kernel. But programs end in any order, and
# **float addition is not associative**:

# %%
a, b, c = np.float32([1e8, -1e8, 1])
print("(a + b) + c =", (a + b) + c, "    a + (b + c) =", a + (b + c))

# %% [markdown]
# **Predict, then run:** 64 partial sums of one number, added in float32 in 300 random orders. About
# how many different results are there?

# %%
guess("13.c", results=...)

# %% tags=["reveal"]
import math

values = np.random.default_rng(2).normal(size=64).astype(np.float32)
exact = math.fsum(values.tolist())
orders = np.random.default_rng(3).permuted(np.tile(values, (300, 1)), axis=1)
sums = np.cumsum(orders, axis=1, dtype=np.float32)[:, -1]  # one after the other
told("13.c", results=float(len(np.unique(sums))), within=0.5)

# %% tags=["reveal"]
show(
    plots.plot_orders(sums, exact),
    alt="A bar chart of 300 orders by how far their float32 sum is from the exact one, in steps of "
    "the last place: a hump around 0 that reaches some steps to both sides.",
)

# %% [markdown]
# None of these sums is *wrong*, all are within rounding. But with atomics two runs of the same
# training step may differ in their last bits, the difference grows from step to step, and a fault
# can not be repeated. In a fixed order, the tokens' own, every run gives the same bits:

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
# ## The images that nobody reads (optional)
#
# Image 3 has no token. Equation (6) is then an empty sum, and its gradient exactly 0. But memory
# for dk is *uninitialised*: whoever does not write leaves what lay there. So the work list has an
# item without a token for each such image, whose program loops over nothing and stores its zeros.
#
# ### Exercise 13.4: audit a work list (optional)
#
# ★★☆ · 13 minutes · 8 to 11 lines. So what does a work list owe the kernel? Every token is in
# exactly one item, of the image that it looks at (items of image 0 hold the tokens without one);
# and every image of every page has an item, be it empty. Write the audit: from φ int [B, L], N, the
# order int [B, L] and the items int [n, 5] return four numbers of faults, int [4]: tokens that no
# item holds; tokens that several hold; places of items whose token looks at another image; and
# images, of all pages, that no item names.
#
# <details><summary>Hint 1</summary>
#
# Keep two tables while you go through the items: by how many each token [B, L] is held, and which
# images [B, N + 1] have been named.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `order[b, begin:end]` are an item's tokens, and that can be none. φ of page b at these tokens
# should be the item's image, in every place.
#
# </details>


# %% tags=["exercise"]
def audit(phi, N, order, items):  # int[B, L], int, int[B, L], int[n, 5] -> int[4]
    ...  # your code


# %% tags=["solution"]
def audit(phi, N, order, items):  # int[B, L], int, int[B, L], int[n, 5] -> int[4]
    held, named = np.zeros(phi.shape, int), np.zeros((len(phi), N + 1), bool)
    astray = 0
    for b, image, begin, end, _ in items:
        inside = order[b, begin:end]
        held[b, inside] += 1
        named[b, image] = True
        astray += np.sum(phi[b, inside] != image)
    forgotten, twice = np.sum(held == 0), np.sum(held > 1)
    return np.array([forgotten, twice, astray, np.sum(~named[:, 1:])])


# %%
check("13.4", audit)

# %% [markdown]
# How does one *find* a forgotten store? Freshly allocated memory is often zero by chance, and then
# the test passes. `runtime.poisoned()` fills it with NaN first. We shall need that in a moment.

# %% [markdown]
# ## The gate (optional)
#
# After the attention come the out-projection and the gate (module 08, and section 2.2 of
# [arXiv:2204.14198](https://arxiv.org/abs/2204.14198)). With all heads side by side the attention's
# output is a matrix $\mathbf{A}$ [L, I], I = H·K, and the out-projection $\mathbf{W}$ is [D, I]:
# $\mathbf{Y}' = \mathbf{Y} + \tanh(\alpha) \, \mathbf{A} \mathbf{W}^\top$. By module 08,
# $d\alpha = (1 - \tanh^2 \alpha) \langle d\mathbf{Y}', \mathbf{A} \mathbf{W}^\top \rangle$, for
# which one would keep $\mathbf{A} \mathbf{W}^\top$ or make it again. But a sum of products can be
# added up in another order, here over the tokens i first:
#
# $$\langle d\mathbf{Y}', \mathbf{A} \mathbf{W}^\top \rangle
# = \sum_{i,d,c} dY'_{id} A_{ic} W_{dc} = \langle \mathbf{W}, d\mathbf{W}' \rangle,
# \qquad d\mathbf{W}' = d\mathbf{Y}'^\top \mathbf{A} \qquad\qquad (7)$$
#
# and $d\mathbf{W}'$ is needed for W's own gradient in any case, because W comes into $\mathbf{Y}'$
# through the same product, times $\tanh \alpha$:
#
# $$d\mathbf{W} = \tanh(\alpha)\, d\mathbf{W}', \qquad
# d\alpha = (1 - \tanh^2 \alpha)\, \langle \mathbf{W}, d\mathbf{W}' \rangle \qquad\qquad (8)$$
#
# ### Exercise 13.5: the gate's gradient, without the branch (optional)
#
# ★★☆ · 9 minutes · 3 or 4 lines. Write equation (8). dout is $dY'$ [L, D], a [L, I], alpha one
# number, weight [D, I]. Return the pair (dalpha, dweight). You do not need $A W^\top$.
#
# <details><summary>Hint 1</summary>
#
# $dW' = dY'^\top A$ is `dout.T @ a`, [D, I] like weight.
#
# </details>
# <details><summary>Hint 2</summary>
#
# $\langle W, dW' \rangle$ is `(weight * dw).sum()`, with $dW'$ *before* it is multiplied by the
# gate.
#
# </details>


# %% tags=["exercise"]
def gate_gradients(dout, a, alpha, weight):  # [L, D], [L, I], [], [D, I]
    ...  # your code


# %% tags=["solution"]
def gate_gradients(dout, a, alpha, weight):  # [L, D], [L, I], [], [D, I]
    dw, t = dout.T @ a, np.tanh(alpha)
    return (1 - t * t) * (weight * dw).sum(), t * dw  # equation (8)


# %%
check("13.5", gate_gradients)

# %% [markdown]
# In the project, the vendor's library makes $dW'$, and one kernel passes over it: each program
# stores its numbers of $dW'$, times the gate, and its share of $\langle W, dW' \rangle$.

# %%
from miniflamingo.kernels import gated_linear

source(gated_linear._gate_dweight.fn)

# %% [markdown]
# **Predict, then run:** the gate is shut, α = 0. Which of the gradients are 0? Write a list with
# some of `"dx"`, `"da"`, `"dalpha"` and `"dW"`.

# %%
guess("13.d", zero=...)

# %% tags=["reveal"]
zero = {}  # alpha -> the gradients that are 0
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
    zero[alpha] = [name for name in ("dx", "da", "dalpha", "dW") if name not in names]
told("13.d", zero=zero[0.0])

# %% [markdown]
# The gate has its own classic, the missing $1 - \tanh^2$ (module 08). At α = 0 the factor is 1, so:

# %%
for alpha in (0.0, 0.5):
    dw = dy.T @ a
    without, right = (weight * dw).sum(), xattn.tanh_gate_backward(dy, x, alpha, a @ weight.T)[1]
    print(
        f"alpha = {alpha}: without the factor {'right' if np.isclose(without, right) else 'wrong'}"
    )
print(check("13.5", lambda dout, a, alpha, w: ((w * (dout.T @ a)).sum(), dout.T @ a)).message)

# %% [markdown]
# ## Break it
#
# **Slots are ignored**: every item stores to the image's dk and dv itself, as if it were the only
# one. Three cases, as a test might have them:
#
# 1. **two images**, both of which are read;
# 2. **an unread image**, beside one that is read;
# 3. **a long run**: both images are read, by several items each.

# %%
from unittest.mock import patch


def case(*counts, N=2, chunk=None, K=16):  # tokens of image 1, 2, ...
    phi = np.repeat(np.arange(1, len(counts) + 1), counts)[None].astype(np.int32)
    rng = np.random.default_rng(0)
    dout, q = rng.normal(size=(2, 1, phi.size, 1, K))
    work = work_list.build_work_list(torch.from_numpy(phi), N, chunk=chunk)
    return dout, q, *rng.normal(size=(2, 1, N, 6, 1, K)), phi, work


cases = [case(8, 8), case(8, 0), case(12, 9, chunk=4)]


# %%
def agrees(*arguments, fill):  # with the library's gradients, where fresh memory holds `fill`
    tensors = [torch.from_numpy(x) for x in arguments[:5]]
    with runtime.replaced(allocate=lambda shape, **where: torch.full(shape, fill, **where)):
        grads = kernel.image_causal_attention_backward(*tensors, arguments[5])
    library = xattn.image_causal_attention_backward(*arguments[:5])
    return all(np.allclose(x, y, atol=1e-6) for x, y in zip(grads, library))


def wrong_cases(old, new, fill=float("nan")):  # numbers of the cases that come out wrong
    with patch.object(kernel, "_backward", altered(kernel._backward, old, new)):
        return [i for i, c in enumerate(cases, 1) if not agrees(*c, fill=fill)]


# %% [markdown]
# **Predict, then run:** which cases find the bug? Write a list of their numbers, such as `[1, 2]`.

# %%
guess("13.e", found_by=...)

# %% tags=["reveal"]
assert wrong_cases("item, h", "item, h") == []  # the kernel as it is
told("13.e", found_by=wrong_cases("if slot < 0:", "if slot < 99:"))

# %% [markdown]
# <details><summary>After the run</summary>
#
# It needs an image with several items: the last one to store wins. **A case for every branch.**
#
# </details>
#
# ### More bugs (optional)
#
# 2. **No δ**: the softmax's gradient without the row's other weights.
# 3. **No scale in dk**: it was in the scores, and is forgotten on the way back.
# 4. **Unread images are skipped**: "no tokens, nothing to do".
#
# Each is run with poisoned memory, full of NaN, and with memory that happens to hold zeros.
#
# **Predict, then run:** which of the cases find which bug, when the memory is poisoned? And for
# which bugs does it matter what lay in memory? Write lists of numbers.

# %%
guess("13.f", bug_2=..., bug_3=..., bug_4=..., memory_matters_for=...)

# %%
bugs = {
    2: ("p * (dp - delta[:, None])", "p * dp"),
    3: ("dk_ptr + first, r, H * K, r < R, dk * SCALE", "dk_ptr + first, r, H * K, r < R, dk"),
    4: ("if image == 0:", "if (image == 0) | (begin == end):"),
}

# %% tags=["reveal"]
found = {bug: wrong_cases(*change) for bug, change in bugs.items()}
matters = [bug for bug, change in bugs.items() if wrong_cases(*change, fill=0.0) != found[bug]]
told(
    "13.f", **{f"bug_{bug}": numbers for bug, numbers in found.items()}, memory_matters_for=matters
)

# %% [markdown]
# <details><summary>After the run</summary>
#
# Bug 2 shows everywhere: any comparison with central differences finds it. Bug 3 sits in one of two
# stores, and where every image has several items the other one is taken. Bug 4 needs an unread
# image *and* poisoned memory. With zeros it is invisible, and on a GPU, where fresh memory is often
# zero, it shows much later, as a NaN in the loss.
#
# </details>

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
# **In the paper:** sections 2.2 (the gate) and 2.3 (the attention) of
# [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), 3.1.2 and 3.1.3 in its first version;
# gradients and kernels are no subject of it. **In the repository:**
# `kernels/image_causal_attention.py`, `kernels/gated_linear.py`, and `python -m miniflamingo
# compare` for all cases.
#
# **Next:** module 14, speed: how many bytes and operations these kernels cost, and what a GPU makes
# of them.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** All R values of an image are the same vector: $v_r = v$ for every r. What are δ, dS and dQ
# of a token, and why?
#
# <details><summary>Answer</summary>
#
# $dP_{ir} = dO_i \cdot v$ is then the same number for every r, and since the weights sum to 1, δ is
# this number, too. So dS = 0 by (3), and dQ = 0 by (4). It has to be so: whatever the weights are,
# the output is v, and no query can change it.
#
# </details>
#
# **2.** A model is trained with one image a page and then with 32. For which of the two does the
# backward kernel need partial sums, and what would the forward kernel need?
#
# <details><summary>Answer</summary>
#
# With one image all tokens of a page add to the same dK and dV. Its run is long, and it is cut so
# that there are enough programs; each item needs a slot. With 32 images the runs are short, most
# have one item, and that stores the gradient itself. The forward kernel never needs partial sums:
# an output belongs to one token, and a token to one item.
#
# </details>
#
# **3.** A test allocates dk with `torch.zeros`, runs the backward kernel, and passes. The training
# has `torch.empty`, and its loss becomes NaN after an hour. What may be wrong, and which test would
# have found it?
#
# <details><summary>Answer</summary>
#
# Something is never stored, for instance the gradient of an image that no token looks at, which
# should be 0. Zeros in fresh memory hide that. A test that fills the memory with NaN first, and
# that has an unread image among its cases, finds it at once.
#
# </details>
