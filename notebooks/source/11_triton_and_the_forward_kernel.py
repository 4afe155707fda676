# %% [markdown]
# # 11 Triton from zero, and the forward kernel
#
# **The question: a GPU runs thousands of copies of one short program at once, and none knows of the
# others. How do you write image-causal attention as such a program?**
#
# After this module you can
#
# - write a Triton kernel: a program's number, its places, loads, stores, and masks at the tail;
# - turn an index into an address with strides, and say what a kernel reads past the end;
# - write a softmax and a tile of attention whose padding does not count;
# - read the project's forward kernel line by line, and break it on purpose.
#
# **You need:** attention (module 01), φ and the work list (module 06). No GPU: Triton brings an
# interpreter, which runs the programs of a kernel one after the other with NumPy. Triton exists for
# Linux alone; on another system this module can be read but not run.
#
# **Time:** about 52 minutes: 13 to read (2,500 words, 200 a minute) and 39 for four exercises.
# Computing takes about 4 seconds of one core.

# %% [markdown]
# ## The picture and the letters
#
# A vector of 10 numbers, and programs that take 4 places each. Three programs are needed, and the
# last one has two places too many:

# %%
import numpy as np

from miniflamingo import plots, xattn
from miniflamingo.course import check, show, source
from miniflamingo.course.triton_cpu import Watch, altered, fenced, tl, torch, triton

# %%
show(
    plots.plot_programs(10, 4),
    alt="Three rows of four boxes. Program 0 has the places 0 to 3, program 1 the places 4 to 7, "
    "program 2 the places 8 and 9; its places 10 and 11 are grey and crossed: masked.",
)

# %% [markdown]
# | letter | meaning |
# |---|---|
# | p | a program's number, `tl.program_id(0)`: 0, 1, 2, ... |
# | BLOCK | places of one program, known before it runs, and a power of two |
# | n | elements of a vector or row, any number |
# | s | stride: how many elements further in memory the next one of an axis lies |
# | B, L, N, R, H, K | batch, text tokens, images, visual tokens of an image, heads, head width |
# | M | tokens of a tile |
#
# Three things are unlike NumPy. A kernel gets **pointers**, not arrays: an address, without a
# shape. Its tiles have **sizes that are powers of two**, whatever the data's size is. And it
# returns nothing: it **stores**.

# %% [markdown]
# ## The derivation
#
# **Who does what.** Program p takes the places
#
# $$i = p \cdot BLOCK + (0, 1, \dots, BLOCK - 1), \qquad \text{of which } i \lt n \text{ exist}
# \qquad\qquad (1)$$
#
# so that $\lceil n / BLOCK \rceil$ programs cover everything. They run in any order, many at the
# same time; so no program may need what another one stores, and no two may store to one place.
#
# **Where it lies.** Memory is one long line. Element $(a, b, c)$ of an array lies at
#
# $$pointer + a\, s_a + b\, s_b + c\, s_c \qquad\qquad (2)$$
#
# with the strides in elements. A transposed or sliced array is the same memory with other strides.
#
# **A softmax with padding.** A row of n scores sits in a tile of BLOCK ≥ n places. What is put into
# the other places must not count, so it is $-\infty$, and $e^{-\infty} = 0$:
#
# $$p_i = \frac{e^{x_i - m}}{\sum_j e^{x_j - m}}, \qquad m = \max_j x_j, \qquad x_j = -\infty
# \text{ for } j \ge n \qquad\qquad (3)$$
#
# Subtracting m changes nothing in exact arithmetic, and everything in float32, where $e^{89}$ is
# already infinite. GPUs compute powers of 2, so kernels use $e^x = 2^{x \log_2 e}$.
#
# **A tile of attention.** For M tokens that all look at the same image:
#
# $$S = Q K^\top / \sqrt{K}, \qquad P = \mathrm{softmax}(S) \text{ by rows (3)}, \qquad O = P V
# \qquad\qquad (4)$$
#
# **Which tile.** The work list cuts the tokens into items: an item is a batch row b, an image n (0
# for none), and a range of places in `order`, the row's tokens sorted by their image. There is one
# program for each item and head:
#
# $$item = \lfloor p / H \rfloor, \quad h = p \bmod H, \quad
# q: \; b\, q_b + order_{b,i}\, q_l + h\, q_h, \quad
# k: \; b\, k_b + (n - 1)\, k_n + r\, k_r + h\, k_h \qquad (5)$$

# %% [markdown]
# ## A first kernel
#
# Equation (1) with a loop over the programs, in NumPy. Each turn of the outer loop is one program:


# %%
def double_loop(x, out, n, BLOCK):
    for pid in range(triton.cdiv(n, BLOCK)):  # cdiv divides and rounds up
        for i in range(pid * BLOCK, (pid + 1) * BLOCK):  # equation (1)
            if i < n:
                out[i] = 2 * x[i]


# %% [markdown]
# The kernel is the inside of that loop. `tl.arange` makes all places at once, and the `if` becomes
# a mask of the load and of the store. `tl.constexpr` marks what is known before the kernel runs: on
# a GPU another BLOCK is another compiled program.


# %%
@triton.jit
def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)  # equation (1)
    x = tl.load(x_ptr + i, i < n)
    tl.store(out_ptr + i, 2 * x, i < n)


# %% [markdown]
# A launch names the number of programs in square brackets, and passes tensors, whose addresses the
# kernel gets. The output is there before: full of NaN here, so that what is never stored shows.

# %%
x = torch.arange(10.0)
out = torch.full((10,), float("nan"))
double[(3,)](x, out, 10, BLOCK=4)
print(out)
by_loop = np.full(10, np.nan)
double_loop(x.numpy(), by_loop, 10, 4)
assert np.array_equal(by_loop, out)

# %% [markdown]
# **Predict, then run:** the same kernel, launched with 2 programs instead of 3. Which elements of
# the output are NaN?

# %%
out = torch.full((10,), float("nan"))
double[(2,)](x, out, 10, BLOCK=4)
print(out)

# %% [markdown]
# **Predict, then run:** all 3 programs, but without the masks. Does the output differ? Does
# anything go wrong?


# %%
@triton.jit
def double_unmasked(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i))


# %%
x, out = fenced(np.arange(10.0)), fenced(np.full(10, np.nan))
with Watch(x=x, out=out) as watch:
    double_unmasked[(3,)](x, out, 10, BLOCK=4)
print(out)
print("the watch:", watch.fault)

# %% [markdown]
# The output is right! Program 2 also read two numbers that belong to someone else and wrote two
# numbers over someone else's memory. On a GPU that goes unseen on a good day, and spoils another
# tensor on a bad one. Here `Watch` looks at every address, and `fenced` puts memory around a tensor
# that nobody needs. The checks of this module use both.
#
# ### Exercise 11.1: add two vectors
#
# ★☆☆ · 6 minutes · 4 or 5 lines. out = x + y for n elements, with masks. `check` launches your
# kernel for several n and BLOCK, with ⌈n / BLOCK⌉ programs.
#
# <details><summary>Hint 1</summary>
#
# `double` with a second load. All three pointers get the same places i.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The mask is the second argument of `tl.load` and the third of `tl.store`.
#
# </details>


# %% tags=["exercise"]
@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):  # three vectors [n]
    ...  # your code


# %% tags=["solution"]
@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):  # three vectors [n]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # equation (1)
    total = tl.load(x_ptr + i, i < n) + tl.load(y_ptr + i, i < n)
    tl.store(out_ptr + i, total, i < n)


# %%
check("11.1", add)

# %% [markdown]
# ## Two axes and their strides
#
# A matrix is covered by tiles. Six rows and ten columns in tiles of 4 × 4 take six programs, and
# four of them have something to mask:

# %%
show(
    plots.plot_tiles((6, 10), (4, 4)),
    alt="A matrix of 6 rows and 10 columns, covered by six tiles of 4 by 4, numbered 0 to 5, three "
    "in a row. The last two columns of tiles 2 and 5 and the last two rows of tiles 3, 4 and 5 "
    "lie outside the matrix and are crossed.",
)

# %% [markdown]
# A tile's addresses are equation (2) for all its elements: a column of row offsets plus a row of
# column offsets, by broadcasting as in NumPy. `rows[:, None]` is [4, 1], `columns[None, :]` [1, 4].


# %%
@triton.jit
def copy_tile(x_ptr, out_ptr, height, width, x_row, x_column, BLOCK: tl.constexpr):
    across = tl.cdiv(width, BLOCK)  # tiles side by side
    rows = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row + columns[None, :] * x_column, inside)  # (2)
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], x, inside)


# %% [markdown]
# **Predict, then run:** the strides of an array [10, 6] in memory are (6, 1). Which strides make
# the kernel read it as its transpose [6, 10]?

# %%
matrix = torch.arange(60.0).reshape(10, 6)
turned = torch.full((6, 10), float("nan"))
copy_tile[(6,)](matrix, turned, 6, 10, *matrix.T.stride(), BLOCK=4)
print("strides", matrix.T.stride(), "; equal:", torch.equal(turned, matrix.T))

# %% [markdown]
# No number was moved: a transpose is a pair of exchanged strides. That is why the project's kernels
# take strides as arguments: q, k and v may be slices of one projection, and nobody copies them.
#
# ## The softmax of a row
#
# One program a row, the whole row in one tile. Equation (3) with loops:


# %%
def softmax_loop(x, BLOCK):  # [rows, n] -> [rows, n]
    out = np.empty_like(x)
    for pid, row in enumerate(x):
        tile = np.full(BLOCK, -np.inf)
        tile[: len(row)] = row
        e = np.exp(tile - tile.max())  # equation (3)
        out[pid] = (e / e.sum())[: len(row)]
    return out


# %% [markdown]
# **Predict, then run:** someone pads with 0 instead of $-\infty$. A row of 5 scores in a tile of 8:
# what do its 5 weights sum to?

# %%
from miniflamingo.functional import softmax

scores = np.array([1.0, 2.0, 0.0, -1.0, 0.5])
assert np.allclose(softmax_loop(scores[None], 8)[0], softmax(scores))
print(f"-inf: {softmax_loop(scores[None], 8).sum():.2f}", end="   ")
print(f"zeros: {softmax(np.pad(scores, (0, 3)))[:5].sum():.2f}")

# %% [markdown]
# ### Exercise 11.2: the softmax of rows
#
# ★★☆ · 10 minutes · 5 lines. Program p handles row p. x is [rows, n] with rows that begin `x_row`
# elements apart (it is a slice of a wider matrix); out is [rows, n] without gaps. n ≤ BLOCK. One of
# the check's rows has scores of 200.
#
# <details><summary>Hint 1</summary>
#
# Row p of x begins at `x_ptr + p * x_row`, row p of out at `out_ptr + p * n`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `tl.load(pointers, mask, other=float("-inf"))` fills what the mask leaves out. `tl.max(x, 0)` and
# `tl.sum(x, 0)` reduce over axis 0; `tl.exp` is there.
#
# </details>


# %% tags=["exercise"]
@triton.jit
def softmax_rows(x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr):  # [rows, n] twice
    ...  # your code


# %% tags=["solution"]
@triton.jit
def softmax_rows(x_ptr, out_ptr, x_row, n, BLOCK: tl.constexpr):  # [rows, n] twice
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + i, i < n, other=float("-inf"))  # equation (2)
    e = tl.exp(x - tl.max(x, 0))  # equation (3)
    tl.store(out_ptr + row * n + i, e / tl.sum(e, 0), i < n)


# %%
check("11.2", softmax_rows)

# %% [markdown]
# ## A tile of attention
#
# `tl.dot(a, b)` is the matrix product of two tiles, on a GPU by its tensor cores, and wants sides
# of at least 16. So an image with R = 5 visual tokens takes 16 rows of keys, of which 11 are
# padding. Loaded as zeros, a padded key has the score $q^\top 0 = 0$, and zero is a perfectly good
# score:
#
# **Predict, then run:** all real scores of a token are about −3. Where does its attention go?

# %%
real = np.full(5, -3.0)
weights = softmax(np.pad(real, (0, 11)))
print(f"5 real keys: {weights[:5].sum():.2f}   11 padded ones: {weights[5:].sum():.2f}")

# %% [markdown]
# So the scores of padded keys are set to $-\infty$ *after* the product, with `tl.where`.
#
# ### Exercise 11.3: a tile of attention
#
# ★★★ · 14 minutes · 9 to 12 lines. Write equation (4). q and out are [M, K], k and v [R, K], all
# without gaps; K is 16 or 32. Program p takes `BLOCK_M` of the M queries; each program reads all R
# keys, R ≤ `BLOCK_R`.
#
# <details><summary>Hint 1</summary>
#
# With `m` the rows of q, `r` those of k and `c = tl.arange(0, K)`, the offsets are
# `m[:, None] * K + c[None, :]` and the same with r. Masks: `(m < M)[:, None]`, `(r < R)[:, None]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `tl.dot(q, tl.trans(k))` is [BLOCK_M, BLOCK_R]. Then `* K**-0.5`, then
# `tl.where((r < R)[None, :], scores, float("-inf"))`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `tl.max(scores, 1)` is [BLOCK_M]; `[:, None]` makes it a column again. The same for the sum.
#
# </details>


# %% tags=["exercise"]
@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ...  # your code


# %% tags=["solution"]
@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, M, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    keys = r[:, None] * K + c[None, :]
    q = tl.load(q_ptr + m[:, None] * K + c[None, :], (m < M)[:, None], other=0.0)
    k = tl.load(k_ptr + keys, (r < R)[:, None], other=0.0)
    v = tl.load(v_ptr + keys, (r < R)[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k)) * K**-0.5  # equation (4)
    scores = tl.where((r < R)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])  # equation (3)
    out = tl.dot(weights, v) / tl.sum(weights, 1)[:, None]
    tl.store(out_ptr + m[:, None] * K + c[None, :], out, (m < M)[:, None])


# %%
check("11.3", attend)

# %% [markdown]
# ## The work list
#
# A page of 12 tokens and three images, the third of which nobody looks at. The kernel's own work
# list is built on the device, with items of at most 3 tokens here:

# %%
from miniflamingo.kernels.common.work_list import build_work_list

words = ["<BOS>", "Cute", "pets!", "<EOC>"]
words += ["<image>", "A", "puppy.", "<EOC>", "<image>", "A", "cat.", "<EOC>"]
phi = np.repeat([0, 1, 2], 4)[None].astype(np.int32)
N, H = 3, 2
work = build_work_list(torch.from_numpy(phi), N, chunk=3)
print("items: batch row, image, begin, end, slot\n", work.items.numpy())

# %%
show(
    plots.plot_items(words, work.order[0], work.items, H),
    alt="Eight items with two programs each. Items 0 and 1 hold the four tokens without an image "
    "and store zeros; items 2 and 3 the four tokens of image 1, items 4 and 5 those of image 2; "
    "item 6 has nothing to do; item 7 is image 3, without a token.",
)

# %% [markdown]
# The number of items is fixed by B, L, N and the chunk alone, not by φ, so the host never waits for
# the device to tell it; the price is a spare item such as item 6. Item 7 looks useless; module 12
# needs it, and the slots.
#
# ### Exercise 11.4: where does a program read?
#
# ★★☆ · 9 minutes · 5 to 8 lines. In NumPy, equation (5): for program `pid`, return int [tokens, 2].
# A row for each token of its item: the offset at which the token's query begins, and the one at
# which the image's keys begin (r = 0; the same in every row). `q_strides` is (q_b, q_l, q_h) and
# `k_strides` (k_b, k_n, k_r, k_h). The item has an image.
#
# <details><summary>Hint 1</summary>
#
# `b, image, begin, end, slot = items[pid // H]`, and the head is `pid % H`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `order[b, begin:end]` are the tokens. Images are counted from 1.
#
# </details>


# %% tags=["exercise"]
def offsets_of(pid, H, items, order, q_strides, k_strides):  # -> int[tokens, 2]
    ...  # your code


# %% tags=["solution"]
def offsets_of(pid, H, items, order, q_strides, k_strides):  # -> int[tokens, 2]
    (q_b, q_l, q_h), (k_b, k_n, _, k_h) = q_strides, k_strides
    b, image, begin, end, _ = items[pid // H]
    h = pid % H
    q_at = b * q_b + order[b, begin:end] * q_l + h * q_h  # equation (5)
    k_at = b * k_b + (image - 1) * k_n + h * k_h
    return np.stack([q_at, np.full_like(q_at, k_at)], axis=1)


# %%
check("11.4", offsets_of)

# %% [markdown]
# ## The project's kernel, line by line
#
# First what one program does, in NumPy, and the loop that a GPU does not have:


# %%
def program(pid, q, k, v, order, items, out):
    item, h = divmod(pid, q.shape[2])  # equation (5)
    b, image, begin, end, _ = items[item]
    token = order[b, begin:end]
    if image == 0:
        out[b, token, h] = 0  # no image before these tokens
    elif begin < end:
        scores = q[b, token, h] @ k[b, image - 1, :, h].T * q.shape[3] ** -0.5  # equation (4)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))  # equation (3)
        out[b, token, h] = p @ v[b, image - 1, :, h] / p.sum(axis=1, keepdims=True)


# %% [markdown]
# Now the kernel. `load_item` reads the five numbers of an item; `load_rows` is equation (2) for the
# rows of a tile, with both masks; `dot` is `tl.dot` in full float32 precision.

# %%
from miniflamingo.kernels import image_causal_attention as forward
from miniflamingo.kernels.common import runtime, work_list

source(forward._forward.fn)

# %%
source(runtime.load_rows.fn)
source(work_list.load_item.fn)

# %% [markdown]
# | in the kernel | in `program` above | why it differs |
# |---|---|---|
# | `program_id(0) // H`, `% H` | `divmod(pid, H)` | 64 bits, where offsets grow large |
# | `load_rows(k_ptr + ...)` | `k[b, image - 1, :, h]` | (2); R and K padded to powers of two |
# | `for start in range(...)` | all tokens at once | an item may exceed a tile; k and v stay |
# | `load(order_ptr + ...)` | `order[b, begin:end]` | past the end: token 0, masked everywhere |
# | `SCALE * LOG2E`, `exp2` | `K ** -0.5`, `np.exp` | powers of 2, one multiplication for both |
# | `tl.where(r < R, ...)` | | the padded keys of exercise 11.3 |
# | `dot(p, v)`, then `* inverse` | the same order | one division a row, not R |
# | `range(BLOCK_R, R, BLOCK_R)` | | the other blocks of an image with R > 64; else no turn |
#
# Nothing of size L × N·R exists. The scores live in registers, 64 × 64 at a time. The programs one
# after the other, the kernel, and the library agree:

# %%
B, L, R, K, rng = 1, 12, 5, 16, np.random.default_rng(0)
q = rng.normal(size=(B, L, H, K)).astype(np.float32)
k, v = rng.normal(size=(2, B, N, R, H, K)).astype(np.float32)
by_programs = np.full_like(q, np.nan)
order, items = work.order.numpy(), work.items.numpy()
for pid in range(len(items) * H):
    program(pid, q, k, v, order, items, by_programs)


# %%
def run_kernel(q, k, v, phi):
    with runtime.poisoned():  # every fresh output holds NaN before the kernel runs
        return forward.image_causal_attention(*map(torch.from_numpy, (q, k, v, phi))).numpy()


library = xattn.image_causal_attention(q, k, v, phi)
assert np.allclose(by_programs, library, atol=1e-6)
assert np.allclose(run_kernel(q, k, v, phi), library, atol=1e-6)

# %% [markdown]
# **Predict, then run:** how often is each element of q, of k and of out touched? The page has 4
# tokens without an image, two images in two items each (of at most 3 tokens), and an unused image.


# %%
def watch_forward(q, k, v, work):
    tensors = dict(q=q, k=k, v=v, out=np.full_like(q, np.nan))
    tensors = {name: fenced(x) for name, x in tensors.items()}
    tensors |= dict(statistics=torch.empty(0), order=work.order, items=work.items)
    q, k, v = (tensors[name] for name in "qkv")
    sizes = forward.options_for(forward._forward, K, q.dtype, R)
    strides = *q.stride()[:3], *k.stride()[:4], *v.stride()[:4]
    with Watch(**tensors) as watch:
        programs = len(work.items) * H
        runtime.launch(forward._forward, programs, *tensors.values(), *strides, L, H, **sizes)
    return watch


# %%
watch = watch_forward(q, k, v, work)
assert watch.fault is None
for name, accesses, size in (("q", watch.loads, q.size), ("k", watch.loads, k.size),
                             ("out", watch.stores, q.size)):  # fmt: skip
    print(f"{name:<4}{size:>4} elements, touched {watch.count(accesses, name) / size:.2f} times")
places = np.concatenate([o for _, name, o in watch.stores if name == "out"])
print("places of out stored twice:", len(places) - len(np.unique(places)))

# %% [markdown]
# A query without an image is not even read: 8 of 12 tokens are 0.67. The keys of the two images are
# read once by each of their two items, those of the third image by one item with no token: 5 items
# for 3 images. Every place of the output is stored exactly once, which is why no program has to
# wait for another.
#
# In use an item has up to 512 tokens. Then q is read and out is written once, and k and v hardly
# count: nothing is left to save. Module 13 turns that count into microseconds.

# %% [markdown]
# ## Break it
#
# Four bugs in the project's own kernel, each a change of one place. `altered` makes the kernel anew
# with a piece of its source replaced.
#
# 1. **Padded keys count**: the line with `tl.where` keeps every score. It is the kernel's form of a
#    known bug of masks: a value that looks like "nothing" but is a score (flamingo-pytorch and
#    open-flamingo, module 06).
# 2. **A stride forgotten**: `h * k_h` is missing, so all heads read the first head's keys.
# 3. **No scale**: the factor $1 / \sqrt{K}$ is lost.
# 4. **No mask at the store**: rows behind an item's end are stored, too, at token 0.

# %%
bugs = {
    "1 padded keys count": ("tl.where((r < R)[None, :]", "tl.where((r < BLOCK_R)[None, :]"),
    "2 a stride forgotten": ("(image - 1) * k_n + h * k_h", "(image - 1) * k_n"),
    "3 no scale": ("tl.trans(k)) * (SCALE * LOG2E)", "tl.trans(k)) * LOG2E"),
    "4 no mask at the store": ("H * K, place < end, out", "H * K, place < end + BLOCK_M, out"),
}

# %% [markdown]
# And four cases, as a test might have them: R = 64 as in the paper and R = 5, a page that begins
# with text, and two heads. In the others, two images have 32 tokens each and there is one head.

# %%
from unittest.mock import patch


def case(R, *counts, H=1, K=16):  # tokens before the first image, then of each image
    phi = np.repeat(np.arange(len(counts)), counts)[None].astype(np.int32)
    rng = np.random.default_rng(R)
    q = rng.normal(size=(1, phi.size, H, K)).astype(np.float32)
    return q, *rng.normal(size=(2, 1, 2, R, H, K)).astype(np.float32), phi


cases = {"R = 64": case(64, 0, 32, 32), "R = 5": case(5, 0, 32, 32)}
cases |= {"R = 64, text first": case(64, 3, 9, 9), "two heads": case(64, 0, 32, 32, H=2)}

# %% [markdown]
# **Predict, then run:** which case finds which bug?

# %%
print(f"{'':<24}" + "".join(f"{name:>20}" for name in cases))
for bug, (old, new) in {"none": ("item, h", "item, h"), **bugs}.items():
    with patch.object(forward, "_forward", altered(forward._forward, old, new)):
        errors = [abs(run_kernel(*c) - xattn.image_causal_attention(*c)).max()
                  for c in cases.values()]  # fmt: skip
    print(f"{bug:<24}" + "".join(f"{'wrong' if e > 1e-5 else 'right':>20}" for e in errors))

# %% [markdown]
# The missing scale shows at once, everywhere. The others hide. With R = 64, the paper's number, a
# tile has no padded keys, so bug 1 passes every test at the paper's own size. Bug 2 needs two
# heads. Bug 4 needs an item that does not fill its tile, **and** a token 0 that was done earlier:
# on a GPU, where the order is open, it is a race that shows on some days.
#
# So test with sizes that are *not* round, several images and heads, text first. That is what the
# cases of `python -m miniflamingo compare` are: "R = 37, K = 40", "text before the first image",
# "adjacent images". It compares with NumPy in float64 and allows twice the error of plain torch:

# %%
from miniflamingo.kernels.tools.compare import KERNELS, compare

for name in ("R = 37, K = 40", "text before the first image"):
    record = next(compare(KERNELS[0], name, "fp32", "cpu"))
    print(f"{name:<30}{'ok' if record.ok else 'FAILED'}, on the {record.backend}")

# %% [markdown]
# **What the interpreter does not show.** It runs one program after the other, so a race never
# shows; it knows no registers, so it does not say whether a tile fits; and its times mean nothing.
# The same source, compiled, does. `python -m miniflamingo compile` compiles it without a GPU and
# lists the registers.

# %% [markdown]
# ## Takeaways
#
# - A kernel is the inside of a loop over programs. Program p finds its places from
#   `tl.program_id`, times BLOCK.
# - Sizes of tiles are powers of two, data are not: every load and store has a mask. Without one the
#   result may be right and the memory wrong.
# - Addresses are sums of index times stride. A transpose costs nothing.
# - What pads a tile must not count: 0 for a sum, $-\infty$ for a softmax, and set after the
#   product.
# - The work list makes image-causal attention a plain dense tile: no mask over images, one store
#   for each place, no waiting.
# - Test with R, K and runs that are not round.
#
# **In the paper:** section 3.1.3 (what is computed); kernels are no subject of it. **In the
# repository:** `kernels/image_causal_attention.py`, `kernels/common/work_list.py`,
# `kernels/common/runtime.py`.
#
# **Next:** module 12, the backward kernel: the same tiles once more, and the gradient of the
# gate.
