# %% [markdown]
# # 12 Triton from zero, and the forward kernel
#
# **The question: a GPU runs thousands of copies of one short program at once, and none knows of the
# others. How do you write image-causal attention as such a program?**
#
# After this module you can
#
# - write a Triton kernel: a program's number, its places, loads, stores, and masks at the tail;
# - turn an index into an address with strides, and say what a kernel reads past the end;
# - write a softmax and a tile of attention whose padding does not count;
# - read the project's forward kernel beside its loop in NumPy, and break it on purpose;
# - (optional) write flash attention: a softmax whose row is longer than a tile, in one pass.
#
# **You need:** attention (module 01), φ and the work list (module 07), and torch
# (`pip install -e ".[course,kernels]"`). No GPU: [Triton](https://github.com/triton-lang/triton)
# brings an interpreter, which runs the programs of a kernel one after the other with NumPy. Triton
# exists for Linux alone; on another system the course puts an imitation of its language in its
# place (`notebooks/imitation.py`), and everything below runs there, too.
#
# **Time:** about 55 minutes for the core path, and 70 for what is marked optional. Computing takes
# about 10 seconds of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 8: the picture, (1) and (2), `double`, guesses 12.a and 12.b. 8 to 14: exercise
# 12.1. 14 to 16: tiles and strides. 16 to 27: the softmax of a row and exercise 12.2. 27 to 41:
# the tile, guess 12.e, exercise 12.3. 41 to 50: the work list, `program`, the kernel beside it, and
# the first bug. What is optional is a second lesson of about the same length; its heart is the
# online softmax and exercise 12.5.
#
# **Predictions.** 12.a: NaN at 8 and 9; who writes 6 and 7 has divided 10 by 2 instead of taking
# tiles of 4. 12.b: the output is right and foreign memory is touched; nearly everybody expects the
# one to follow from the other. 12.c: (1, 6), an exchange; the usual wrong answer is (10, 1), the
# strides of a transposed *copy*. 12.d: 0.81; "1" forgets that the padding takes its share, and
# "3/8 less" forgets that weights depend on scores. 12.e: 0.98, far more than 11/16, because all
# real scores lie below the padding's 0. 12.f: 0.67, 1.67 and 1. 12.g: case 2 alone. 12.h: bug 2 is
# found by case 4, bug 3 by all, bug 4 by case 3. 12.i: 4 and 2. 12.j: 3 and 2. 12.k:
# $e^{1 - 4} = 0.05$. 12.l: 4 blocks, and (32 · 1 + 68 · 3) / 100
# = 2.36; who says 3 forgets the block that stays.
#
# **Open questions.** None in the core path. "What limits the tile?", in the part on products:
# registers, and the shared memory through which tiles pass; module 14 counts both.
#
# **Misconceptions.** "A mask is an `if`": no, all lanes compute, and the mask decides what is read
# and stored. "A program is a thread": it is a group of warps that share one tile. "Padding with
# zeros is neutral": for sums it is, for a softmax it is not. "Flash attention approximates": it
# computes the same softmax, and only adds up in another order.
#
# **To cut.** First the source of the kernel (`program` says the same), then exercise 12.2 (show its
# solution: 12.3 holds it). Keep 12.e: the bug in "Break it" rests on it.

# %% [markdown]
# ## The picture and the letters
#
# A vector of 10 numbers, and programs that take 4 places each. Three programs are needed, and the
# last one has two places too many:

# %%
import numpy as np

from miniflamingo import plots, xattn
from miniflamingo.course import check, guess, show, source, told
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
# | pid | a program's number, `tl.program_id(0)`: 0, 1, 2, ... |
# | BLOCK | places of one program, known before it runs, and a power of two |
# | n | elements of a vector or row, any number |
# | $\mathrm{stride}_a$ | how many elements further in memory the next one of axis a lies |
# | B, L, N, R, H, K | batch, text tokens, images, visual tokens of an image, heads, head width |
# | $s_{ij}$ | the score of token i and key j, before the softmax |
# | $\mathbf{Q}, \mathbf{K}, \mathbf{V}$ | queries, keys and values as whole matrices |
#
# Three things are unlike NumPy. A kernel gets **pointers**, not arrays: an address, without a
# shape. Its tiles have **sizes that are powers of two**, whatever the data's size is. And it
# returns nothing: it **stores**.

# %% [markdown]
# ## The derivation
#
# **Who does what.** The program with number pid takes the places
#
# $$i = pid \cdot BLOCK + (0, 1, \dots, BLOCK - 1), \qquad \text{of which } i \lt n \text{ exist}
# \qquad\qquad (1)$$
#
# so that $\lceil n / BLOCK \rceil$ programs cover everything. They run in any order, many at the
# same time; so no program may need what another one stores, and no two may store to one place.
#
# **Where it lies.** Memory is one long line. Element $(a, b, c)$ of an array lies at
#
# $$pointer + a \cdot \mathrm{stride}_a + b \cdot \mathrm{stride}_b + c \cdot \mathrm{stride}_c
# \qquad\qquad (2)$$
#
# with the strides in elements. A transposed or sliced array is the same memory with other strides.
#
# **A softmax with padding.** A row of n scores sits in a tile of BLOCK ≥ n places. What is put into
# the other places must not count, so it is $-\infty$, and $e^{-\infty} = 0$:
#
# $$w_j = \frac{e^{s_j - m}}{\sum_i e^{s_i - m}}, \qquad m = \max_j s_j, \qquad s_j = -\infty
# \text{ for } j \ge n \qquad\qquad (3)$$
#
# Subtracting m changes nothing in exact arithmetic, because $e^{-m}$ is a factor of the numerator
# and of every term below it. In float32 it changes everything, since $e^{89}$ is already infinite.
# GPUs compute powers of 2, so kernels use $e^x = 2^{x \log_2 e}$.
#
# **A tile of attention.** For L tokens that all look at the same image:
#
# $$\mathbf{S} = \mathbf{Q} \mathbf{K}^\top / \sqrt{K}, \qquad
# \mathbf{P} = \mathrm{softmax}(\mathbf{S}) \text{ by rows (3)}, \qquad
# \mathbf{O} = \mathbf{P} \mathbf{V} \qquad\qquad (4)$$

# %%
products = [
    (("S", "L", "R"), ("Q", "L", "K"), ("Kᵀ", "K", "R")),
    (("O", "L", "K"), ("P", "L", "R"), ("V", "R", "K")),
]
show(
    plots.plot_products(products, {"L": 40, "R": 64, "K": 32}),
    alt="The two products of equation (4) to scale, for 40 tokens, 64 keys and heads of 32. The "
    "scores S, L by R, are Q, L by K, times K transposed, K by R. The output O, L by K, is P, L by "
    "R, times V, R by K.",
)

# %% [markdown]
# **Which tile.** The work list cuts the tokens into items: an item is a batch row b, an image (0
# for none), and a range of places in `order`, the row's tokens sorted by their image. There is one
# program for each item and head. With $q_b, q_l, q_h$ for the strides of q, and $k_b, k_n, k_r,
# k_h$ for those of k, it reads at
#
# $$item = \lfloor pid / H \rfloor, \quad h = pid \bmod H, \quad
# q: \; b\, q_b + order_{b,i}\, q_l + h\, q_h, \quad
# k: \; b\, k_b + (image - 1)\, k_n + r\, k_r + h\, k_h \qquad (5)$$

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
# **Predict, then run:** the same kernel, launched with 2 programs instead of 3. At which places of
# the output does NaN remain? Write a list of places for the dots, such as `[0, 1]`.

# %%
guess("12.a", nan_at=...)

# %% tags=["reveal"]
out = torch.full((10,), float("nan"))
double[(2,)](x, out, 10, BLOCK=4)
print(out)
told("12.a", nan_at=np.flatnonzero(np.isnan(out.numpy())))

# %% [markdown]
# **Predict, then run:** all 3 programs, but without the masks. Is the output wrong? And does any
# program touch memory that it must not touch? Two guesses, each `True` or `False`. (`Watch` looks
# at every address that a kernel reads or writes, and `fenced` puts memory around a tensor that
# nobody needs.)

# %%
guess("12.b", output_wrong=..., touches_other_memory=...)


# %%
@triton.jit
def double_unmasked(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i))


# %% tags=["reveal"]
x, out = fenced(np.arange(10.0)), fenced(np.full(10, np.nan))
with Watch(x=x, out=out) as watch:
    double_unmasked[(3,)](x, out, 10, BLOCK=4)
print(out)
print("the watch:", watch.fault)
wrong = not np.array_equal(out, 2 * np.arange(10.0))
told("12.b", output_wrong=wrong, touches_other_memory=watch.fault is not None)

# %% [markdown]
# <details><summary>After the run</summary>
#
# The output is right! Program 2 also read two numbers that belong to someone else and wrote two
# numbers over someone else's memory. On a GPU that goes unseen on a good day, and spoils another
# tensor on a bad one.
#
# </details>
#
# The checks of this module use `Watch` and `fenced`, too.
#
# ### Exercise 12.1: add two vectors
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
check("12.1", add)

# %% [markdown]
# ## Two axes and their strides
#
# A tile's addresses are equation (2) for all its elements: a column of row offsets plus a row of
# column offsets, by broadcasting as in NumPy. `rows[:, None]` is [4, 1], `columns[None, :]` [1, 4],
# and `rows[:, None] * row_stride + columns[None, :] * column_stride` [4, 4]. The project's kernels
# take strides as arguments, because q, k and v may be slices of one projection, and then nobody
# copies them.
#
# ### A transpose costs nothing (optional)
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
# **Predict, then run:** the strides of an array [10, 6] in memory are (6, 1): the next row lies 6
# elements further, the next column 1. Which two strides make the kernel read it as its transpose
# [6, 10]?

# %%
guess("12.c", next_row=..., next_column=...)

# %% tags=["reveal"]
matrix = torch.arange(60.0).reshape(10, 6)
turned = torch.full((6, 10), float("nan"))
copy_tile[(6,)](matrix, turned, 6, 10, *matrix.T.stride(), BLOCK=4)
print("equal to the transpose:", torch.equal(turned, matrix.T))
told("12.c", next_row=matrix.T.stride(0), next_column=matrix.T.stride(1))

# %% [markdown]
# <details><summary>After the run</summary>
#
# No number was moved: a transpose is a pair of exchanged strides.
#
# </details>
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
# **Predict, then run:** someone pads with 0 instead of $-\infty$. A row of 5 scores, 1, 2, 0, −1
# and 0.5, lies in a tile of 8: what do its 5 weights sum to?

# %%
guess("12.d", weights_sum_to=...)

# %% tags=["reveal"]
from miniflamingo.functional import softmax

scores = np.array([1.0, 2.0, 0.0, -1.0, 0.5])
assert np.allclose(softmax_loop(scores[None], 8)[0], softmax(scores))
print(f"-inf: {softmax_loop(scores[None], 8).sum():.2f}", end="   ")
zeros = softmax(np.pad(scores, (0, 3)))[:5].sum()
print(f"zeros: {zeros:.2f}")
told("12.d", weights_sum_to=zeros)

# %% [markdown]
# ### Exercise 12.2: the softmax of rows
#
# ★★☆ · 8 minutes · 5 lines. Program pid handles row pid. x is [rows, n] with rows that begin
# `x_row` elements apart (it is a slice of a wider matrix); out is [rows, n] without gaps. n ≤
# BLOCK. One of the check's rows has scores of 200.
#
# <details><summary>Hint 1</summary>
#
# Row pid of x begins at `x_ptr + pid * x_row`, row pid of out at `out_ptr + pid * n`.
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
check("12.2", softmax_rows)

# %% [markdown]
# ## A tile of attention
#
# `tl.dot(a, b)` is the matrix product of two tiles, on a GPU by its tensor cores, and wants sides
# of at least 16. So an image with R = 5 visual tokens takes 16 rows of keys, of which 11 are
# padding. Loaded as zeros, a padded key has the score $q^\top 0 = 0$, and zero is a perfectly good
# score:
#
# **Predict, then run:** all 5 real scores of a token are −3. Which share of its attention, from 0
# to 1, goes to the 11 padded keys?

# %%
guess("12.e", share_of_padding=...)

# %% tags=["reveal"]
real = np.full(5, -3.0)
weights = softmax(np.pad(real, (0, 11)))
print(f"5 real keys: {weights[:5].sum():.2f}   11 padded ones: {weights[5:].sum():.2f}")
told("12.e", share_of_padding=weights[5:].sum())

# %% [markdown]
# So the scores of padded keys are set to $-\infty$ *after* the product, with `tl.where`.
#
# ### Exercise 12.3: a tile of attention
#
# ★★★ · 13 minutes · 9 to 12 lines. Write equation (4). q and out are [L, K], k and v [R, K], all
# without gaps; K is 16 or 32. Program pid takes `BLOCK_M` of the L queries; each program reads all
# R keys, R ≤ `BLOCK_R`.
#
# <details><summary>Hint 1</summary>
#
# With `i` the rows of q, `r` those of k and `c = tl.arange(0, K)`, the offsets are
# `i[:, None] * K + c[None, :]` and the same with r. Masks: `(i < L)[:, None]`, `(r < R)[:, None]`.
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
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ...  # your code


# %% tags=["solution"]
@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, K)
    keys = r[:, None] * K + c[None, :]
    q = tl.load(q_ptr + i[:, None] * K + c[None, :], (i < L)[:, None], other=0.0)
    k = tl.load(k_ptr + keys, (r < R)[:, None], other=0.0)
    v = tl.load(v_ptr + keys, (r < R)[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k)) * K**-0.5  # equation (4)
    scores = tl.where((r < R)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])  # equation (3)
    out = tl.dot(weights, v) / tl.sum(weights, 1)[:, None]
    tl.store(out_ptr + i[:, None] * K + c[None, :], out, (i < L)[:, None])


# %%
check("12.3", attend)

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
# the device to tell it; the price is a spare item such as item 6. Item 7 looks useless; module 13
# needs it, and the slots.
#
# ### Exercise 12.4: who reads what? (optional)
#
# ★★☆ · 13 minutes · 9 to 12 lines. In NumPy, equation (5) for the whole launch: `items` int [n, 5]
# and H heads, so n·H programs. Return int [reads, 3], a row for each program and each token of its
# item, in the order of the programs: the program's number, the offset at which the token's query
# begins, and the one at which the image's keys begin (r = 0). `q_strides` is (q_b, q_l, q_h) and
# `k_strides` (k_b, k_n, k_r, k_h). A program whose item has no image reads nothing, and one whose
# item has no token neither.
#
# <details><summary>Hint 1</summary>
#
# Two loops: over the programs, and over the tokens of a program's item. The item is number `pid //
# H`, and the head `pid % H`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Begin and end of an item are places in `order`, in the row of its page; what lies there are the
# tokens. Images are counted from 1, and 0 is none.
#
# </details>


# %% tags=["exercise"]
def reads_of(H, items, order, q_strides, k_strides):  # int, int[n, 5], int[B, L] -> int[reads, 3]
    ...  # your code


# %% tags=["solution"]
def reads_of(H, items, order, q_strides, k_strides):  # int, int[n, 5], int[B, L] -> int[reads, 3]
    (q_b, q_l, q_h), (k_b, k_n, _, k_h) = q_strides, k_strides
    reads = []
    for pid in range(len(items) * H):
        b, image, begin, end, _ = items[pid // H]
        h = pid % H
        if image == 0:
            continue
        k_at = b * k_b + (image - 1) * k_n + h * k_h  # equation (5)
        for token in order[b, begin:end]:
            reads.append([pid, b * q_b + token * q_l + h * q_h, k_at])
    return np.array(reads)


# %%
check("12.4", reads_of)

# %% [markdown]
# ## The project's kernel
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
# Now the kernel, folded: open it, and find the three lines of `program` that compute. `load_item`
# reads the five numbers of an item; `load_rows` is equation (2) for the rows of a tile, with both
# masks; `dot` is `tl.dot` in full float32 precision.

# %%
from miniflamingo.kernels import image_causal_attention as forward
from miniflamingo.kernels.common import runtime, work_list

source(forward._forward.fn)

# %% [markdown]
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
# ### Line by line (optional)

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
# | `tl.where(r < R, ...)` | | the padded keys of exercise 12.3 |
# | `dot(p, v)`, then `* inverse` | the same order | one division a row, not R |
# | `range(BLOCK_R, R, BLOCK_R)` | | the other blocks of an image with R > 64; else no turn |

# %% [markdown]
# ### Which program touches what (optional)
#
# **Predict, then run:** how often is an element of q and of k read, and one of out written, on
# average over all elements? The page has 12 tokens, 4 of them without an image, two images in two
# items each (of at most 3 tokens), and a third image that nobody looks at, which has one item.

# %%
guess("12.f", q=..., k=..., out=...)


# %%
def watch_forward(q, k, v, work):
    (_, L, H, K), R = q.shape, k.shape[2]
    tensors = dict(q=q, k=k, v=v, out=np.full_like(q, np.nan))
    tensors = {name: fenced(x) for name, x in tensors.items()}
    q, k, v = (tensors[name] for name in "qkv")
    statistics = torch.empty(forward.statistics_shape(q, k))  # none where R <= 64
    tensors |= dict(statistics=statistics, order=work.order, items=work.items)
    sizes = forward.options_for(forward._forward, K, q.dtype, R)
    strides = *q.stride()[:3], *k.stride()[:4], *v.stride()[:4]
    with Watch(**tensors) as watch:
        programs = len(work.items) * H
        runtime.launch(forward._forward, programs, *tensors.values(), *strides, L, H, **sizes)
    return watch


# %% tags=["reveal"]
watch, touched = watch_forward(q, k, v, work), {}
assert watch.fault is None
for name, accesses, size in (("q", watch.loads, q.size), ("k", watch.loads, k.size),
                             ("out", watch.stores, q.size)):  # fmt: skip
    touched[name] = watch.count(accesses, name) / size
    print(f"{name:<4}{size:>4} elements, touched {touched[name]:.2f} times")
places = np.concatenate([o for _, name, o in watch.stores if name == "out"])
print("places of out stored twice:", len(places) - len(np.unique(places)))
told("12.f", within=0.05, **touched)

# %% [markdown]
# <details><summary>After the run</summary>
#
# A query without an image is not even read: 8 of 12 tokens are 0.67. The keys of the two images are
# read once by each of their two items, those of the third image by one item with no token: 5 items
# for 3 images. Every place of the output is stored exactly once, which is why no program has to
# wait for another.
#
# In use an item has up to 512 tokens. Then q is read and out is written once, and k and v hardly
# count: nothing is left to save. Module 14 turns that count into microseconds.
#
# </details>


# %%
def touched_cells(accesses, name, cells):  # -> int[programs, cells], a cell is K numbers
    table = np.zeros((len(items) * H, cells), int)
    for program, tensor, offsets in accesses:
        if tensor == name:
            table[program, np.unique(offsets // K)] += 1
    return table


# %% tags=["reveal"]
tables = {"q, read": touched_cells(watch.loads, "q", L * H),
          "k, read": touched_cells(watch.loads, "k", N * R * H),
          "out, stored": touched_cells(watch.stores, "out", L * H)}  # fmt: skip
show(
    plots.plot_touched(tables),
    alt="Sixteen rows, one a program, beside three strips of memory: q, k and out, in cells of one "
    "head's numbers, token by token. A cell is filled where the program of its row touches it, and "
    "a number below each column says how many programs do.",
)

# %% [markdown]
# ## Break it
#
# **Padded keys count.** The kernel's line with `tl.where` is changed so that it keeps every score.
# It is the kernel's form of a known bug of masks: a value that looks like "nothing" but is a score,
# as [flamingo-pytorch](https://github.com/lucidrains/flamingo-pytorch) and
# [open-flamingo](https://github.com/mlfoundations/open_flamingo) had it (module 07). `altered`
# makes a kernel anew with one piece of its source replaced. Four cases, as a test might have them:
#
# 1. **R = 64**, as in the paper ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section
#    2.1);
# 2. **R = 5**;
# 3. **R = 64, text first**: 3 tokens without an image, then 9 of each of two images;
# 4. **two heads**, and R = 64.
#
# Where nothing else is said, two images have 32 tokens each and there is one head.

# %%
from unittest.mock import patch


def case(R, *counts, H=1, K=16):  # tokens before the first image, then of each image
    phi = np.repeat(np.arange(len(counts)), counts)[None].astype(np.int32)
    rng = np.random.default_rng(R)
    q = rng.normal(size=(1, phi.size, H, K)).astype(np.float32)
    return q, *rng.normal(size=(2, 1, 2, R, H, K)).astype(np.float32), phi


cases = {"R = 64": case(64, 0, 32, 32), "R = 5": case(5, 0, 32, 32)}
cases |= {"R = 64, text first": case(64, 3, 9, 9), "two heads": case(64, 0, 32, 32, H=2)}


# %%
def wrong_cases(old, new):  # numbers of the cases that the changed kernel gets wrong
    with patch.object(forward, "_forward", altered(forward._forward, old, new)):
        errors = [abs(run_kernel(*c) - xattn.image_causal_attention(*c)).max()
                  for c in cases.values()]  # fmt: skip
    return [i for i, error in enumerate(errors, 1) if error > 1e-5]


# %% [markdown]
# **Predict, then run:** which cases find this bug? Write a list of the cases' numbers, such as
# `[1, 2]`.

# %%
guess("12.g", found_by=...)

# %% tags=["reveal"]
assert wrong_cases("item, h", "item, h") == []  # the kernel as it is
bug_1 = wrong_cases("tl.where((r < R)[None, :]", "tl.where((r < BLOCK_R)[None, :]")
told("12.g", found_by=bug_1)

# %% [markdown]
# <details><summary>After the run</summary>
#
# With R = 64, the paper's number, a tile has no padded keys, so the bug passes every test at the
# paper's own size.
#
# </details>
#
# So test with sizes that are *not* round.
#
# ### More bugs (optional)
#
# 2. **A stride forgotten**: `h * k_h` is missing, so all heads read the first head's keys.
# 3. **No scale**: the factor $1 / \sqrt{K}$ is lost.
# 4. **No mask at the store**: rows behind an item's end are stored, too, at token 0.
#
# **Predict, then run:** which of the same cases find which bug?

# %%
guess("12.h", bug_2=..., bug_3=..., bug_4=...)

# %%
bugs = {
    "bug_2": ("(image - 1) * k_n + h * k_h", "(image - 1) * k_n"),
    "bug_3": ("tl.trans(k)) * (SCALE * LOG2E)", "tl.trans(k)) * LOG2E"),
    "bug_4": ("H * K, place < end, out", "H * K, place < end + BLOCK_M, out"),
}

# %% tags=["reveal"]
told("12.h", **{bug: wrong_cases(*change) for bug, change in bugs.items()})

# %% [markdown]
# <details><summary>After the run</summary>
#
# The missing scale shows at once, everywhere. Bug 2 needs two heads. Bug 4 needs an item that does
# not fill its tile, **and** a token 0 that was done earlier: on a GPU, where the order is open, it
# is a race that shows on some days.
#
# </details>
#
# So test with several images and heads, and with text first, too. That is what the cases of
# `python -m miniflamingo compare` are: "R = 37, K = 40", "text before the first image", "adjacent
# images". It compares with NumPy in float64 and allows twice the error of plain torch:

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
# ## From a tile to flash attention (optional)
#
# So far everything that a program needed lay in one tile: a row of scores, an image's keys. What if
# it does not? Five kernels lead from a sum to flash attention, each one step longer than the one
# before. All of them keep the pattern of a loop over tiles *inside* one program, with something
# that is carried from turn to turn in registers.
#
# ### A sum longer than a tile
#
# One program a row of n elements, in tiles of BLOCK. A tile of running sums is carried, and added
# up at the end. What the mask leaves out counts as 0, which is neutral for a sum:


# %%
@triton.jit
def sum_rows(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # [rows, n] -> [rows]
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * n + i, i < n, other=0.0)
    tl.store(out_ptr + row, tl.sum(total, 0))


# %%
rows = torch.from_numpy(np.random.default_rng(4).normal(size=(3, 37)).astype(np.float32))
sums = torch.full((3,), float("nan"))
sum_rows[(3,)](rows, sums, 37, BLOCK=8)
assert np.allclose(sums, rows.numpy().sum(axis=1), atol=1e-5)

# %% [markdown]
# ### A matrix product with a loop over the common side
#
# out = a w, with a [L, I] and w [I, D]. A program owns one tile of out, and loops over the common
# side I (Triton's tutorials call it K, which is the width of a head here). The tile of sums is
# carried, and stored once:


# %%
@triton.jit
def product(
    a_ptr, w_ptr, out_ptr, L, I, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        a_mask, w_mask = (row < L)[:, None] & (i < I)[None, :], (i < I)[:, None] & (column < D)
        a = tl.load(a_ptr + row[:, None] * I + i[None, :], a_mask, other=0.0)
        w = tl.load(w_ptr + i[:, None] * D + column[None, :], w_mask, other=0.0)
        total += tl.dot(a, w)
    inside = (row < L)[:, None] & (column < D)[None, :]
    tl.store(out_ptr + row[:, None] * D + column[None, :], total, inside)


# %% [markdown]
# Every tile of out reads all of its rows of a and all of its columns of w. A row of a is therefore
# read once for each tile across, and a column of w once for each tile down:
#
# $$\text{numbers read} = L I \lceil D / BLOCK_D \rceil + I D \lceil L / BLOCK_M \rceil
# \qquad\qquad (6)$$
#
# **Predict, then run:** for L = I = D = 64, how often is a number of a read with tiles of 16 × 16,
# and how often with tiles of 32 × 32?

# %%
guess("12.i", tiles_of_16=..., tiles_of_32=...)

# %%
left, right = np.random.default_rng(5).normal(size=(2, 64, 64)).astype(np.float32)


def reads_of(BLOCK):  # how often a number of a is read; the product is checked
    a, w, out = fenced(left), fenced(right), fenced(np.full((64, 64), np.nan, np.float32))
    with Watch(a=a, w=w, out=out) as watch:
        sizes = dict(BLOCK_M=BLOCK, BLOCK_D=BLOCK, BLOCK_I=16)
        product[((64 // BLOCK) ** 2,)](a, w, out, 64, 64, 64, **sizes)
    assert watch.fault is None and np.allclose(out, left @ right, atol=1e-4)
    return watch.count(watch.loads, "a") / left.size


# %% tags=["reveal"]
told("12.i", tiles_of_16=reads_of(16), tiles_of_32=reads_of(32))

# %% [markdown]
# Larger tiles read less, by (6). What limits the tile? It is carried in registers: 128 × 128 sums
# in float32, shared by 128 threads, are 128 registers a thread, of at most 255.
#
# ### A softmax of a row longer than a tile
#
# Equation (3) needs the row's maximum before the first power and the row's sum before the first
# division. With a row longer than a tile that makes three loops, one after the other:


# %%
@triton.jit
def softmax_three_loops(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # [rows, n] twice
    x_ptr += tl.program_id(0) * n
    out_ptr += tl.program_id(0) * n
    m = tl.max(tl.load(x_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < n, other=float("-inf")))
    for start in range(BLOCK, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = tl.maximum(m, tl.max(tl.load(x_ptr + i, i < n, other=float("-inf"))))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(x_ptr + i, i < n, other=float("-inf")) - m)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        e = tl.exp(tl.load(x_ptr + i, i < n, other=float("-inf")) - m)
        tl.store(out_ptr + i, e / tl.sum(total, 0), i < n)


# %% [markdown]
# ### The online softmax
#
# The maximum and the sum can be had in *one* loop. The idea is due to [Milakov and
# Gimelshein](https://arxiv.org/abs/1805.02867), and
# [FlashAttention](https://arxiv.org/abs/2205.14135) rests on it. Suppose that some tiles of the row
# have been seen, and call the set of their places *seen*. We carry the maximum of the scores seen
# so far, and the sum of their powers relative to that maximum:
#
# $$m = \max_{j \in seen} s_j, \qquad z = \sum_{j \in seen} e^{s_j - m} \qquad\qquad (7)$$
#
# Now the next tile comes, with places of its own. The new maximum is the larger one of the old
# maximum and the tile's, because the largest of two sets together is the larger of their two
# largest:
#
# $$m' = \max\big(m, \max_{j \in tile} s_j\big) \qquad\qquad (8)$$
#
# The new sum has to be relative to m'. Its terms from the tile can be computed at once. Its terms
# from *seen* were computed relative to m, and their scores are gone. But $e^{s_j - m'} = e^{s_j -
# m} \cdot e^{m - m'}$, and the second factor is the same for every j. So it can be taken out of the
# sum, and what remains of the sum is z, which was kept:
#
# $$z' = \sum_{j \in seen} e^{s_j - m'} + \sum_{j \in tile} e^{s_j - m'}
# = e^{m - m'} z + \sum_{j \in tile} e^{s_j - m'} \qquad\qquad (9)$$
#
# Nothing was approximated. Since $m \le m'$, the factor is at most 1, so nothing overflows; it is
# exactly 1 when the tile brings no larger score. Before the first tile *seen* is empty, and $m =
# -\infty$ and $z = 0$ are right: the first factor is then $e^{-\infty} = 0$. (One thing must not
# happen: a *first* tile that holds nothing but $-\infty$, because $-\infty - (-\infty)$ is not a
# number.)
#
# By (9), equation (7) holds after every tile if it held before it; it holds before the first; so it
# holds after the last, where m and z are the row's maximum and sum, as (3) wants them.
#
# **The same for the output.** Attention does not want the weights, it wants their product with the
# values. Carry the vector $o = \sum_{j \in seen} e^{s_j - m} v_j$. Its terms have the same factor,
# and the same step holds:
#
# $$o' = e^{m - m'}\, o + \sum_{j \in tile} e^{s_j - m'} v_j, \qquad
# \text{and at the end } \sum_j w_j v_j = o / z \qquad\qquad (10)$$
#
# The weights of a whole row never exist. That is why flash attention needs no memory for them.


# %%
@triton.jit
def softmax_online(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # [rows, n] twice
    x_ptr += tl.program_id(0) * n
    out_ptr += tl.program_id(0) * n
    m, z = float("-inf"), 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < n, other=float("-inf"))
        new_m = tl.maximum(m, tl.max(x, 0))  # equation (8)
        z = z * tl.exp(m - new_m) + tl.sum(tl.exp(x - new_m), 0)  # equation (9)
        m = new_m
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < n, other=float("-inf"))
        tl.store(out_ptr + i, tl.exp(x - m) / z, i < n)


# %% [markdown]
# **Predict, then run:** how often does each of the two kernels read an element of x?

# %%
guess("12.j", three_loops=..., online=...)


# %%
def run_rows(kernel, x, BLOCK=8):  # -> what the kernel stores, how often it reads an element
    tensors = {"x": fenced(x), "out": fenced(np.full_like(x, np.nan))}
    with Watch(**tensors) as watch:
        kernel[(len(x),)](*tensors.values(), x.shape[1], BLOCK=BLOCK)
    assert watch.fault is None
    return tensors["out"].numpy(), watch.count(watch.loads, "x") / x.size


# %% tags=["reveal"]
high = rows.numpy() * 3 + np.float32([[0], [200], [-200]])  # exp alone would overflow
(two_pass, thrice), (online, twice) = (
    run_rows(kernel, high) for kernel in (softmax_three_loops, softmax_online)
)
assert np.allclose(online, two_pass, rtol=1e-5) and np.allclose(online, softmax(high), rtol=1e-4)
told("12.j", three_loops=thrice, online=twice)

# %% [markdown]
# **Predict, then run:** three tiles have the largest scores 1, 4 and 2. By what factor has the
# first tile's sum been multiplied when the loop ends?

# %%
guess("12.k", factor=...)

# %% tags=["reveal"]
factor, m = 1.0, 1.0
for largest in (4.0, 2.0):
    m, before = max(m, largest), m
    factor *= np.exp(before - m)
    print(f"after a tile whose largest score is {largest}: m = {m}, factor {factor:.3f}")
told("12.k", factor=factor)

# %% [markdown]
# ### Exercise 12.5: flash attention
#
# ★★★ · 20 minutes · 15 to 20 lines. Write (4) for any number of keys R: by (8) to (10), with a loop
# over blocks of `BLOCK_R` keys. Everything else is as in exercise 12.3: q and out are [L, K], k and
# v [R, K], program pid takes `BLOCK_M` of the L queries. Each program reads every key once.
#
# <details><summary>Hint 1</summary>
#
# Carried from block to block: m, a tile [BLOCK_M] of $-\infty$, which
# `tl.full([BLOCK_M], float("-inf"), tl.float32)` makes; z, zeros of the same shape; o, zeros
# [BLOCK_M, K]. The loop: `for first in range(0, R, BLOCK_R)`, whose keys are
# `first + tl.arange(0, BLOCK_R)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Compute `shrink = tl.exp(m - new_m)` once, use it for z and, with `[:, None]`, for o. Set `m =
# new_m` at the end of the turn, not before `shrink`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The last block may have padded keys: `tl.where((r < R)[None, :], scores, float("-inf"))`, as in
# exercise 12.3. Divide by z once, behind the loop.
#
# </details>


# %% tags=["exercise"]
@triton.jit
def flash(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ...  # your code


# %% tags=["solution"]
@triton.jit
def flash(
    q_ptr, k_ptr, v_ptr, out_ptr, L, R,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, K)
    q = tl.load(q_ptr + i[:, None] * K + c[None, :], (i < L)[:, None], other=0.0)
    m, z = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, K], tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        keys = r[:, None] * K + c[None, :]
        k = tl.load(k_ptr + keys, (r < R)[:, None], other=0.0)
        v = tl.load(v_ptr + keys, (r < R)[:, None], other=0.0)
        scores = tl.where((r < R)[None, :], tl.dot(q, tl.trans(k)) * K**-0.5, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))  # equation (8)
        shrink, e = tl.exp(m - new_m), tl.exp(scores - new_m[:, None])
        z = z * shrink + tl.sum(e, 1)  # equation (9)
        o = o * shrink[:, None] + tl.dot(e, v)  # equation (10)
        m = new_m
    tl.store(out_ptr + i[:, None] * K + c[None, :], o / z[:, None], (i < L)[:, None])


# %%
check("12.5", flash)

# %% [markdown]
# ### The project's kernel, where an image has more keys than a tile
#
# The paper's R = 64 fits one tile, and then the kernel's inner loop `for first in range(BLOCK_R, R,
# BLOCK_R)` has no turn: the code is that of exercise 12.3. Up to R = 256 the same kernel is flash
# attention within an image. It differs from exercise 12.5 in two points. It makes m from the first
# block itself, so there is no $-\infty$ to start from. And it leaves m and 1 / z of every row in
# memory, because the backward pass can then no longer make a row's weights from one tile. It keeps
# the two numbers apart: their log-sum-exp $m + \ln z$ would be a single number, but where m is
# large it would carry the rounding error of a number of that size.
#
# **Predict, then run:** R = 100 visual tokens of width 16 in float32, one image, and one item of 40
# tokens. The kernel takes tiles of 16 tokens and blocks of 32 keys; the first block stays in
# registers while the tiles pass, the others are loaded by every tile. How many blocks are there?
# And how often is a number of k read, on average?

# %%
guess("12.l", blocks=..., k_read=...)

# %% tags=["reveal"]
q, k, v, phi = (x[:, :1] if x.ndim == 5 else x for x in case(100, 0, 40))  # one image alone
assert np.allclose(run_kernel(q, k, v, phi), xattn.image_causal_attention(q, k, v, phi), atol=1e-5)
sizes = forward.options_for(forward._forward, 16, torch.float32, 100)
assert (sizes["BLOCK_M"], sizes["BLOCK_R"]) == (16, 32)
watch = watch_forward(q, k, v, build_work_list(torch.from_numpy(phi), 1, chunk=64))
told("12.l", blocks=-(-100 // 32), k_read=watch.count(watch.loads, "k") / k.size, within=0.05)

# %%
source(forward.in_one_block)

# %% [markdown]
# ### Who chooses the sizes?
#
# BLOCK_M, BLOCK_R and the number of warps change nothing in the result and much in the time. Triton
# can try several and keep the fastest:
#
#     @triton.autotune(
#         configs=[triton.Config({"BLOCK_M": 64}, num_warps=4),
#                  triton.Config({"BLOCK_M": 128}, num_warps=8)],
#         key=["R", "K"],  # another R or K: try again
#     )
#     @triton.jit
#     def kernel(...)
#
# At the first launch for each value of the key it runs every configuration on the GPU, several
# times, and measures. That has three prices: the first call is slow; two computers may choose
# differently, and then their last bits may differ; and it needs the GPU, so it does not work in the
# interpreter. The project's kernels therefore have a table instead, chosen by what fits in
# registers without spilling; its own comment says that it was not chosen by measured time:

# %%
source(forward.options_for)

# %% [markdown]
# What such a choice should cost on a GPU can be said before it is measured. `python -m miniflamingo
# predict` reads the compiled code of every launch, counts the programs, and asks which resource
# binds. A prediction is no measurement; module 14 takes one apart. These are the committed ones for
# the forward kernel (B = 8, L = 2048, R = 64, 16 heads of 128, bfloat16):

# %% tags=["volatile"]
import json
from pathlib import Path

from miniflamingo import kernels

file = Path(kernels.__file__).parent / "results" / "predicted.json"
records = json.loads(file.read_text())["records"] if file.exists() else []
for r in records:
    key = r["entry"], r["direction"], r["shape"]["H"], r["shape"]["K"], r["device"]
    if key == ("image_causal_attention", "forward", 16, 128, "H200"):
        launch = r["launches"][0]
        print(f"N = {r['shape']['N']:>2}: {launch['programs']} programs,", end=" ")
        print(f"{launch['resident']} at a time on a processor; {r['binds']} binds;", end=" ")
        print(f"{r['percent']:.0f} % of the floor's speed")

# %% [markdown]
# ## Takeaways
#
# - A kernel is the inside of a loop over programs. A program finds its places from
#   `tl.program_id`, times BLOCK.
# - Sizes of tiles are powers of two, data are not: every load and store has a mask. Without one the
#   result may be right and the memory wrong.
# - Addresses are sums of index times stride. A transpose costs nothing.
# - What pads a tile must not count: 0 for a sum, $-\infty$ for a softmax, and set after the
#   product.
# - The work list makes image-causal attention a plain dense tile: no mask over images, one store
#   for each place, no waiting.
# - Test with R, K and runs that are not round.
# - A softmax of a row longer than a tile needs the running maximum, the running sum, and one factor
#   that shrinks both when the maximum grows: that is flash attention.
#
# **In the paper:** section 2.3 (3.1.3 in its first version on arXiv) says what is computed; kernels
# are no subject of it. **In the repository:** `kernels/image_causal_attention.py`,
# `kernels/common/work_list.py`, `kernels/common/runtime.py`.
#
# **Next:** module 13, the backward kernel: the same tiles once more, and the gradient of the
# gate.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** A kernel doubles a vector of n = 1,000 elements with BLOCK = 256 and is launched with four
# programs. Somebody removes the mask of the store and keeps that of the load. What becomes wrong?
#
# <details><summary>Answer</summary>
#
# The 1,000 elements are right. Program 3 has the places 768 to 1,023, and its last 24 lanes now
# write behind the vector: twice whatever the masked load gave there, which is undefined. If other
# data lies there, it is spoilt, and a test that looks only at the output does not see it.
#
# </details>
#
# **2.** An image has R = 5 visual tokens, a tile has 16 rows of keys, and the padded keys are
# loaded as zeros. In which direction is the output wrong if nobody sets their scores to $-\infty$,
# and for which tokens is the error smallest?
#
# <details><summary>Answer</summary>
#
# Each padded key has score 0 and value 0, so it takes weight away and adds nothing: the output
# becomes shorter by the factor (sum of the real weights), never longer. The error is smallest for
# tokens whose real scores are large and positive, because eleven terms $e^0$ are then little beside
# $\sum_j e^{s_j}$. For scores far below 0 nearly nothing is left of the output.
#
# </details>
#
# **3.** Two programs may not store to one place. Why may many programs *load* from one place, and
# which tensor of image-causal attention is loaded by many?
#
# <details><summary>Answer</summary>
#
# A load changes nothing, so its order does not matter; two stores of different values leave
# whatever came last. The keys and values of an image are loaded by every item of that image. That
# is why k and v are read more than once where an image has several items, while every place of out
# is stored by exactly one program.
#
# </details>
