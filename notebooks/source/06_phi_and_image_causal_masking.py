# %% [markdown]
# # 06 φ and image-causal masking
#
# **The question: a page holds several images. Which of them may a word look at, and how do we make
# sure that it looks at no other?**
#
# After this module you can
#
# - compute φ, the index of the image that each token looks at, and say where it is easy to be off
#   by one;
# - write the image-causal mask and the attention under it, with loops and without;
# - find out by experiment which image reaches which token, and recognise three bugs that public
#   implementations of Flamingo had;
# - say what a dense mask costs at the paper's size, and how the fused kernel does without one.
#
# **You need:** attention (module 01) and the Perceiver Resampler (module 04), which turns every
# image into the same small number of *visual tokens*. The gate that the result goes through comes
# next, in module 07.
#
# **Time:** about 56 minutes: 13 to read (2,600 words, 200 a minute) and 43 for five exercises.
# Computing takes about 1 second of one core.

# %% [markdown]
# ## The picture and the letters
#
# Flamingo reads text and images interleaved. This page, from the paper's figure 7, has two images.
# An `<image>` tag stands in the text where each image was, `<BOS>` opens the page, and `<EOC>`
# ("end of chunk") closes what belongs to one image.

# %%
import numpy as np

from miniflamingo import plots, xattn
from miniflamingo.course import check, show, source
from miniflamingo.prompt import IMAGE, WordTokenizer

# %%
page = (
    "<BOS> Cute pics of my pets! <EOC>"
    "<image> My puppy sitting in the grass. <EOC>"
    "<image> My cat looking very dignified. <EOC>"
)
tokenizer = WordTokenizer.from_texts([page])
tokens = np.array([tokenizer.encode(page)])  # [B, L]
words = [tokenizer.words[i] for i in tokens[0]]
print(f"{tokens.shape = }; <image> is id {IMAGE}, at", np.flatnonzero(tokens[0] == IMAGE))

# %% [markdown]
# Every token gets a number, φ: **which image it looks at**. It is the last image before the token,
# and 0 for the tokens that come before any image. This is the whole module in one picture:

# %%
phi = xattn.compute_phi(tokens, IMAGE)
show(
    plots.plot_phi(words, phi[0]),
    alt="The 25 tokens of the page in a row, each with its phi. 'BOS Cute pics of my pets! EOC' "
    "has phi 0, the tokens from the first image tag to the EOC after 'grass.' have phi 1, and "
    "those from the second image tag to the end have phi 2.",
)

# %% [markdown]
# | letter | meaning | here | in the paper's models |
# |---|---|---|---|
# | B | pages in a batch | 1 | |
# | L | text tokens of a page | 25 | 256 in training on web pages |
# | N | images of a page | 2 | 5 in training, up to 32 in use |
# | R | visual tokens of an image | 4 | 64 |
# | H, K | heads, and the width of one | 1, 8 | 16 to 64, and 128 |
# | φ | int [B, L], 0 to N | the colours above | |
#
# Two details in the picture matter later. `<image>` itself already has its own image's number: the
# second one says 2, not 1. And the `<EOC>` before it still belongs to the chunk that it ends.

# %% [markdown]
# ## The derivation
#
# Let $y_1 \dots y_L$ be the tokens. The last image before token $\ell$ (or at it) has the index
#
# $$\phi(\ell) = \sum_{i=1}^{\ell} \, [\, y_i \text{ is an image tag} \,] \qquad\qquad (1)$$
#
# where $[\cdot]$ is 1 if true and 0 if false: φ only counts the tags so far. All the visual tokens
# of the page stand in one list of N·R columns, and visual token $r$ of image $n$ is visible to
# token $\ell$ if and only if
#
# $$M_{\ell,\,(n,r)} = [\, n = \phi(\ell) \,] \qquad\qquad (2)$$
#
# Note the `=`. Not $n \le \phi(\ell)$: a token does *not* look at all images so far, it looks at
# one. Attention under that mask is a softmax over the R visual tokens of a single image:
#
# $$o_\ell = \sum_{r=1}^{R} p_{\ell r} \, v_{\phi(\ell),\,r}, \qquad
# p_{\ell\,\cdot} = \mathrm{softmax}_r \big( q_\ell^\top k_{\phi(\ell),\,r} / \sqrt{K} \big),
# \qquad o_\ell = 0 \ \text{ where } \phi(\ell) = 0 \qquad (3)$$
#
# The last case is not a detail. A token without an image has no key to attend to, and a softmax of
# nothing is 0/0. The output is *defined* as exactly 0, so that such a token goes on as if this were
# a language model alone.
#
# **Why only one image?** Because then every token sees R = 64 keys, whether the page has one image
# or thirty-two. The paper trains on pages of at most 5 images and uses the same model with 32, and
# nothing in this layer meets a situation that it has not seen. The cat's text can still know of the
# puppy: the language model's own self-attention carries words about image 1 to later words. Letting
# a token see *all* earlier images instead lowers the paper's overall score from 70.7 to 63.5.

# %% [markdown]
# ## φ with loops, then without
#
# Equation (1), word for word:


# %%
def phi_loop(tokens, image_token):  # int[B, L] -> int[B, L]
    phi = np.zeros_like(tokens)
    for b, row in enumerate(tokens):
        seen = 0
        for l, token in enumerate(row):
            seen += token == image_token  # equation (1), one more term
            phi[b, l] = seen
    return phi


# %% [markdown]
# ### Exercise 6.1: φ without a loop
#
# ★☆☆ · 5 minutes · 1 or 2 lines. Write equation (1) for a whole batch `tokens` [B, L], with NumPy
# and no loop. Pages are independent of one another: row 1 starts at 0 again.
#
# <details><summary>Hint 1</summary>
#
# `tokens == image_token` is true at the tags. A running sum of truths is a count.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.cumsum` has an argument `axis`; without it, it runs through the whole batch.
#
# </details>


# %% tags=["exercise"]
def phi_of(tokens, image_token):  # int[B, L], int -> int[B, L]
    ...  # your code


# %% tags=["solution"]
def phi_of(tokens, image_token):  # int[B, L], int -> int[B, L]
    return np.cumsum(tokens == image_token, axis=1)  # equation (1)


# %%
check("6.1", phi_of)

# %% [markdown]
# The library's version does the same, checks that no page has more tags than images, and knows one
# thing more, `use_next`. We come to it at once.

# %%
source(xattn.compute_phi)

# %%
assert np.array_equal(phi_loop(tokens, IMAGE), phi)
print(phi[0])

# %% [markdown]
# ## The next image instead of the last
#
# On web pages a caption may stand *after* its image or *before* it, and no one marks which. So in
# training a coin is thrown for each page, and with probability $p_{next} = 1/2$ every token of the
# page is given the image that FOLLOWS it:
#
# $$\phi_{next}(\ell) = 1 + \sum_{i \lt \ell} \, [\, y_i \text{ is an image tag} \,], \qquad
# \text{and } 0 \text{ where that is more than } N \qquad (4)$$
#
# The sum runs over $i \lt \ell$ now. An `<image>` tag thus keeps its own number in both versions.
#
# **Predict, then run:** what are the first number, the number at the second `<image>` (position
# 17), and the last number of $\phi_{next}$ on our page?

# %%
phi_next = xattn.compute_phi(tokens, IMAGE, use_next=True)
print("first", phi_next[0, 0], " at the second <image>", phi_next[0, 17], " last", phi_next[0, -1])

# %%
show(
    plots.plot_phi(words, phi_next[0]),
    alt="The same 25 tokens with phi of the next image: 1 from BOS to the first image tag, 2 from "
    "'My puppy' to the second image tag, and 0, no image, for 'My cat looking very dignified.'",
)

# %% [markdown]
# ### Exercise 6.2: φ of the next image
#
# ★★☆ · 8 minutes · 3 or 4 lines. Write equation (4) without a loop, and without the library.
#
# <details><summary>Hint 1</summary>
#
# "Strictly before" is "up to and including", minus the token itself.
#
# </details>
# <details><summary>Hint 2</summary>
#
# N is the number of tags of each row: `is_image.sum(axis=1, keepdims=True)`.
#
# </details>


# %% tags=["exercise"]
def phi_next_of(tokens, image_token):  # int[B, L], int -> int[B, L]
    ...  # your code


# %% tags=["solution"]
def phi_next_of(tokens, image_token):  # int[B, L], int -> int[B, L]
    is_image = tokens == image_token
    following = 1 + np.cumsum(is_image, axis=1) - is_image  # equation (4)
    return np.where(following > is_image.sum(axis=1, keepdims=True), 0, following)


# %%
check("6.2", phi_next_of)

# %% [markdown]
# ## The mask
#
# Equation (2) with a loop. The columns of image n are `(n - 1) * R` to `n * R - 1`:

# %%
N, R = 2, 4


def mask_loop(phi, N, R):  # int[B, L] -> bool[B, L, N*R]
    mask = np.zeros((*phi.shape, N * R), bool)
    for b, l in np.ndindex(phi.shape):
        n = phi[b, l]
        mask[b, l, (n - 1) * R : n * R] = n > 0  # equation (2)
    return mask


# %% [markdown]
# ### Exercise 6.3: the mask without a loop
#
# ★★☆ · 6 minutes · 2 lines. Return bool [B, L, N·R] by comparing each token's φ with the image that
# each column belongs to.
#
# <details><summary>Hint 1</summary>
#
# With R = 4 and N = 2 the columns belong to the images 1 1 1 1 2 2 2 2.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `phi[:, :, None] == image` compares [B, L, 1] with [N·R] and gives [B, L, N·R].
#
# </details>


# %% tags=["exercise"]
def mask_of(phi, N, R):  # int[B, L], int, int -> bool[B, L, N*R]
    ...  # your code


# %% tags=["solution"]
def mask_of(phi, N, R):  # int[B, L], int, int -> bool[B, L, N*R]
    image = np.repeat(np.arange(1, N + 1), R)  # the image of each column
    return phi[:, :, None] == image  # equation (2)


# %%
check("6.3", mask_of)

# %% [markdown]
# The paper draws this mask in dark blue, visible, and light blue, masked.

# %% tags=["target"]
show(
    plots.plot_mask(words, mask_of(phi, N, R)[0], N, phi[0]),
    alt="The mask: 25 tokens by 8 visual tokens. Rows with phi 0 are light blue throughout. Rows "
    "with phi 1 are dark blue in the four columns of image 1, rows with phi 2 in the four columns "
    "of image 2. Two dark blocks in a staircase, nothing else.",
)

# %% tags=["exercise"]
show(
    lambda: plots.plot_mask(words, mask_of(phi, N, R)[0], N, phi[0]),
    alt="The mask that your function returns, in the same colours as the target.",
)

# %% [markdown]
# And the library's version, equal to the loop. Its `only_last=False` is the ablation that scores
# 63.5 instead of 70.7, and one of the bugs below.

# %%
source(xattn.image_causal_mask)

# %%
assert np.array_equal(mask_loop(phi, N, R), xattn.image_causal_mask(phi, N, R))

# %% [markdown]
# Move the tags of another page yourself, and watch φ and the mask follow. Where must both tags
# stand so that no token sees image 2 but the tag itself?

# %%
from miniflamingo.course.widgets import move_image_tag

move_image_tag("My puppy . <image> My cat . <image> Both sleep .")

# %% [markdown]
# ## Attention to one image
#
# Equation (3) with a loop over the tokens. A token with an image attends to that image's R keys and
# to nothing else; one without an image keeps the 0 that was there before.

# %%
from miniflamingo.attention import attention, attention_weights


def attention_loop(q, k, v, phi):  # [B, L, K], [B, N, R, K] twice, [B, L] -> [B, L, K]
    out = np.zeros_like(q)
    for b, l in np.ndindex(phi.shape):
        if n := phi[b, l]:
            out[b, l] = attention(q[b, l, None], k[b, n - 1], v[b, n - 1])[0]  # equation (3)
    return out


# %% [markdown]
# Random numbers stand in for the projections of text (q) and of images (k, v):

# %%
K, rng = 8, np.random.default_rng(0)
q = rng.normal(size=(1, len(words), K))
k, v = rng.normal(size=(2, 1, N, R, K))
out = attention_loop(q, k, v, phi)
print(out.shape, "; tokens whose output is exactly 0:", np.flatnonzero((out[0] == 0).all(axis=-1)))

# %% [markdown]
# **Predict, then run:** we repaint the puppy, that is, we change the keys and values of image 1. In
# how many of the 25 tokens does the output change?

# %%
other_k, other_v = k.copy(), v.copy()
other_k[:, 0] += 1
other_v[:, 0] += 1
changed = (attention_loop(q, other_k, other_v, phi) != out).any(axis=-1)[0]
print(changed.sum(), "tokens change:", " ".join(np.array(words)[changed]))

# %% [markdown]
# **Predict, then run:** many programs do not use $-\infty$ for a masked score but a large negative
# number such as −1e9. For a token with φ = 0, *all* scores are then −1e9. What weight does each of
# the 8 visual tokens get?

# %%
from miniflamingo.functional import softmax

print("-1e9 everywhere:", softmax(np.full(8, -1e9)))
print("the library:    ", attention_weights(q[0, :1], k[0].reshape(8, K), np.zeros(8, bool))[0])

# %% [markdown]
# Softmax only sees *differences* of scores. A row of equal scores, however low, is a uniform
# average. Keep that in mind for the exercise.
#
# ### Exercise 6.4: attention under φ, without a loop
#
# ★★★ · 14 minutes · 5 to 8 lines. Write equation (3) for all tokens at once, by way of the mask.
# Use NumPy, `softmax` and `xattn.image_causal_mask`. Mind the tokens with φ = 0.
#
# <details><summary>Hint 1</summary>
#
# Line all visual tokens up: `k.reshape(B, N * R, K)`. The scores of all pairs are then
# `q @ keys.swapaxes(1, 2)`, [B, L, N·R]; divide them by $\sqrt{K}$.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `np.where(mask, scores, -1e9)` masks the others before the softmax.
#
# </details>
# <details><summary>Hint 3</summary>
#
# What remains is the rows with φ = 0, which are now a uniform average. Multiply the weights by the
# mask, or the output by `(phi > 0)[:, :, None]`.
#
# </details>


# %% tags=["exercise"]
def attend(q, k, v, phi):  # [B, L, K], [B, N, R, K] twice, int[B, L] -> [B, L, K]
    ...  # your code


# %% tags=["solution"]
def attend(q, k, v, phi):  # [B, L, K], [B, N, R, K] twice, int[B, L] -> [B, L, K]
    B, N, R, K = k.shape
    keys, values = k.reshape(B, N * R, K), v.reshape(B, N * R, K)
    mask = xattn.image_causal_mask(phi, N, R)
    scores = np.where(mask, q @ keys.swapaxes(1, 2) / np.sqrt(K), -1e9)
    return (softmax(scores) * mask) @ values  # equation (3); a row without an image is 0


# %%
check("6.4", attend)

# %% [markdown]
# The library's version takes heads (q is [B, L, H, K], k and v are [B, N, R, H, K]) and builds no
# mask at all. How it manages is the subject of the last section; here we only compare.

# %%
source(xattn.image_causal_attention)


# %%
def image_causal(q, k, v, phi):  # the library's, with one head
    q, k, v = q[:, :, None], k[:, :, :, None], v[:, :, :, None]
    return xattn.image_causal_attention(q, k, v, phi)[:, :, 0]


assert np.allclose(image_causal(q, k, v, phi), out, rtol=1e-12)

# %% [markdown]
# **The gradient is image-causal, too.** An image learns only from the tokens that look at it:
# $\partial \mathcal{L} / \partial v_{n,r} = \sum_{\ell:\,\phi(\ell)=n} p_{\ell r} \,
# \partial \mathcal{L} / \partial o_\ell$. In the library the gradient stands right below its
# formula, and takes the output's gradient and the formula's inputs:

# %%
source(xattn.image_causal_attention_backward)

# %% [markdown]
# If the loss depends on the cat's caption alone, the puppy's values must not move:

# %%
dout = np.where(phi[:, :, None] == 2, 1.0, 0.0)[..., None] * np.ones((1, 1, 1, K))
arguments = q[:, :, None], k[:, :, :, None], v[:, :, :, None], phi
dq, dk, dv = xattn.image_causal_attention_backward(dout, *arguments)
for n in range(N):
    print(f"image {n + 1}: sum of |dk| = {abs(dk[0, n]).sum():.2f}, of dv = {dv[0, n].sum():.2f}")

# %% [markdown]
# The 8 tokens of the cat's chunk, each with weights that sum to 1 and K = 8 channels, add up to 64.

# %% [markdown]
# ## Break it
#
# A wrong mask does not crash, and every shape is right. So do not look at the code, **measure**:
# change one image, and see which tokens notice.
#
# ### Exercise 6.5: which image reaches which token?
#
# ★★☆ · 10 minutes · 5 to 8 lines. Given *any* function `attend(q, k, v, phi)`, return bool [L, N]:
# true where the output at token l changes when image j changes. The batch has one page.
#
# <details><summary>Hint 1</summary>
#
# Compute the output once as it is. Then, for each image, copy k and v, change the copy of that
# image, and compare the outputs token by token.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Change keys *and* values. A leak may run through only one of them; the check tries both kinds.
#
# </details>


# %% tags=["exercise"]
def reached(attend, q, k, v, phi):  # a function and its arguments -> bool[L, N]
    ...  # your code


# %% tags=["solution"]
def reached(attend, q, k, v, phi):  # a function and its arguments -> bool[L, N]
    before, columns = attend(q, k, v, phi), []
    for j in range(k.shape[1]):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, j] += 1
        other_v[:, j] += 1
        columns.append((attend(q, other_k, other_v, phi) != before).any(axis=-1)[0])
    return np.stack(columns, axis=1)


# %%
check("6.5", reached)

# %% [markdown]
# Here are three bugs that public implementations had, each in a few lines.
#
# 1. **A finite fill** (flamingo-pytorch and open-flamingo, where a token may attend to all earlier
#    images, or a page has more tags than images): masked scores become a large negative number, and
#    a row that is masked throughout becomes a uniform average over all images.
# 2. **Text before the first image attends to it** (transformers, issue 26428).
# 3. **`>=` where `==` was meant** (flamingo-pytorch, issue 6): a token sees every image so far.


# %%
def finite_fill(q, k, v, phi):
    mask, (B, N, R, K) = xattn.image_causal_mask(phi, *k.shape[1:3]), k.shape
    scores = q @ k.reshape(B, N * R, K).swapaxes(1, 2) / np.sqrt(K)
    return softmax(np.where(mask, scores, -1e9)) @ v.reshape(B, N * R, K)


# %%
def first_image_too_early(q, k, v, phi):
    return image_causal(q, k, v, np.maximum(phi, 1))


# %%
def greater_or_equal(q, k, v, phi):
    B, N, R, K = k.shape
    mask = xattn.image_causal_mask(phi, N, R, only_last=False)  # phi >= n
    return attention(q, k.reshape(B, N * R, K), v.reshape(B, N * R, K), mask)


# %% [markdown]
# **Predict, then run:** for each bug, which cells of the table tokens × images will be wrong?
#
# `reach` measures what exercise 6.5 asks for, and also how much: the largest change of an output.

# %%
from miniflamingo.course.checks.module_06 import reach

attends = {
    "the library": image_causal,
    "bug 1:\nfinite fill": finite_fill,
    "bug 2: first\nimage too early": first_image_too_early,
    "bug 3:\n>= for ==": greater_or_equal,
}
changes = {name: reach(function, q, k, v, phi) for name, function in attends.items()}

# %%
show(
    plots.plot_reach(words, phi[0], changes),
    alt="Four tables, 25 tokens by 2 images, of how much each output changes with each image. The "
    "library: each token changes with its own image alone, and tokens with phi 0 never. Bug 1: all "
    "8 tokens before the first image change with both images. Bug 2: these 8 tokens change with "
    "image 1. Bug 3: the 8 tokens of the cat's chunk change with image 1, too.",
)

# %% [markdown]
# The same in numbers. Which check catches it? The check of exercise 6.4 names all three:

# %%
own = phi[0][:, None] == np.arange(1, N + 1)  # [L, N]
for name, function in attends.items():
    leaks = (changes[name] > 0) & ~own
    title = " ".join(name.split())
    print(f"{title}: {leaks.sum()} leaks over {leaks.any(axis=1).sum()} tokens")
    print("   ", check("6.4", function).message)

# %% [markdown]
# Bug 1 is the nastiest. The captions are right and so is every later token, only the opening words
# see a blur of all images, *future ones included*.
#
# **Predict, then run:** suppose that you test with image-caption pairs, `<BOS><image>caption<EOC>`.
# Which bugs show in a token of the caption?

# %%
pair = np.array([[0, 1, 1, 1, 1]])  # <BOS> <image> A caption <EOC>
for name, function in attends.items():
    change = reach(function, q[:, :5], k[:, :1], v[:, :1], pair)
    leaks = np.flatnonzero((change[:, 0] > 0) & (pair[0] == 0))
    print(f"{' '.join(name.split()):<30} tokens that leak: {leaks}")

# %% [markdown]
# None does: bugs 1 and 2 only touch `<BOS>`, and bug 3 needs two images. That is how such a bug
# goes unseen. Test on a page that begins with text and has several images.

# %% [markdown]
# **Measured on the originals.** The three bugs above are re-enactments. The library also reads
# these projects' checkpoints, so their own code can be run beside ours with the same random
# weights. `python -m tests.interop` does that and writes down what it finds: how large a number a
# token without an image gets, how far the logits in front of the first image move when the *last*
# image is repainted, how often a generation runs the resampler. Right would be 0, 0 and once.

# %%
import json
from pathlib import Path

from miniflamingo import course

data = Path(course.__file__).with_name("data") / "others_faults.json"
for row in json.loads(data.read_text("utf-8"))["faults"]:
    print(f"{row['package']}: {row['fault']}")
    print(f"    theirs {row['theirs']:.3g}, here {row['ours']:g}")

# %% [markdown]
# flamingo-pytorch and open-flamingo do so only with `only_attend_immediate_media=False`, or when a
# page has more tags than images. mllama (Llama 3.2 Vision, in transformers) always does: of a token
# without an image it masks what the gated feed-forward adds, but not what the attention adds.
# IDEFICS's is no leak, only a waste: the images have not changed since the last token.
#
# ## What it costs
#
# Most columns of the mask are light blue. With N images only one column in N is dark, so a dense
# attention does N times the work and fills arrays that grow with N. With the heads of the 3B model
# (16, of width 128) and R = 64, for 8 pages of 2,048 tokens and 32 images:


# %%
def costs(B, L, N, R, H, K):  # N images for each token to attend to
    megabytes = {"phi, int32": 4 * B * L, "mask, bool": B * L * N * R}
    megabytes["scores, float32"] = 4 * B * H * L * N * R
    gigaflops = 4 * B * H * L * N * R * K / 1e9  # two products, of a multiply and an add each
    return {name: size / 1e6 for name, size in megabytes.items()}, gigaflops


# %%
(dense_mb, dense_gflop), (one_mb, one_gflop) = (costs(8, 2048, n, 64, 16, 128) for n in (32, 1))
one_mb["mask, bool"] = 0  # nothing to mask: see the last section
print(f"{'':<18}{'dense':>10}{'image-causal':>16}")
for name in dense_mb:
    print(f"{name:<18}{dense_mb[name]:>10,.2f}{one_mb[name]:>16,.2f}  MB")
print(f"{'arithmetic':<18}{dense_gflop:>10,.0f}{one_gflop:>16,.0f}  GFLOP")

# %% [markdown]
# The library in NumPy does not build these arrays either. Measured here, on a small case (256
# tokens, 4 heads of 16, R = 16): the most memory that the dense attention and the library's use at
# any moment, for 1 to 32 images. With one image there is nothing to save, and sorting costs a copy.

# %%
import tracemalloc


def peak_megabytes(function, *arguments):
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


# %%
def dense(q, k, v, phi):  # heads and all, by the mask of equation (2)
    mask = xattn.image_causal_mask(phi, *k.shape[1:3])[:, None]
    k, v = (x.reshape(len(x), -1, *x.shape[3:]).swapaxes(1, 2) for x in (k, v))
    return attention(q.swapaxes(1, 2), k, v, mask).swapaxes(1, 2)


# %%
def case(N, L=256, R=16, H=4, K=16):
    q, (k, v) = rng.normal(size=(1, L, H, K)), rng.normal(size=(2, 1, N, R, H, K))
    return q, k, v, 1 + np.arange(L)[None] * N // L  # chunks of one length


arguments = case(5)
assert np.allclose(dense(*arguments), xattn.image_causal_attention(*arguments), rtol=1e-10)

# %% tags=["volatile"]
counts, functions = [1, 2, 4, 8, 16, 32], (dense, xattn.image_causal_attention)
peaks = [[peak_megabytes(f, *case(n)) for n in counts] for f in functions]
show(
    plots.plot_lines(
        counts, {"dense mask": peaks[0], "image-causal": peaks[1]}, "images N", "peak MB"
    ),
    alt="Peak memory against the number of images, both axes logarithmic, from 1 to 32 images: the "
    "dense attention's grows about thirtyfold; the library's doubles, as the keys and values do "
    "grow with the images.",
)

# %% [markdown]
# ## The fused view
#
# How can one attend without a mask? By sorting the work. The tokens that look at one image form a
# group, and inside the group *everything* is visible: a plain, dense attention of a few tokens to R
# keys. `work_list` makes that list of groups ("items") from φ. Tokens with φ = 0 are in no item,
# and nothing is computed for them.

# %%
owner, items = xattn.work_list(phi, N, most=5)
print("image of each item, counted from 0:", owner)
show(
    plots.plot_work_list(words, owner, items),
    alt="Four items of at most five tokens. Items 0 and 1 hold the 9 tokens of image 1, items 2 "
    "and 3 the 8 tokens of image 2, in their order; one place of item 1 and two of item 3 are "
    "free.",
)

# %% [markdown]
# An item has at most `most` tokens (5 here to make the picture, 64 as a rule), so a long chunk is
# cut into several items of the same shape. Each is one small matrix product, softmax and matrix
# product: *one program* of the GPU kernel, which finds all of its scores (64 tokens × 64 visual
# tokens) in the fast memory next to the arithmetic and never writes them out. Because an item has
# exactly one image, the softmax of a row is complete in one piece, and because a token is in
# exactly one item, no two programs write to the same place. The Triton kernel is
# `kernels/image_causal_attention.py`, and `python -m miniflamingo compare` shows by how much it
# differs from the NumPy function above; modules 11 and 12 build it from zero.

# %%
source(xattn.work_list)

# %% [markdown]
# ## Takeaways
#
# - φ(l) is the running count of `<image>` tags, and the tag itself is counted. Off by one *at the
#   tag* is the typical mistake.
# - A token attends to the R visual tokens of one image: `==`, not `>=`. Earlier images arrive
#   through the language model's own attention, and that is why 5 images in training suffice for 32
#   in use.
# - φ = 0 means an output of exactly 0. A large negative number is not $-\infty$: a row that is
#   masked throughout becomes an average of everything, the future included.
# - Test causality by changing an image and listing the tokens that notice, on a page that begins
#   with text.
# - φ is the interface, 4 bytes a token; the dense mask is for teaching. Group the tokens by their
#   image, and no mask is needed.
#
# **In the paper:** section 3.1.3 and figure 7 (φ and the mask); the appendix has $p_{next}$ and the
# ablation in which a token sees all previous images. **In the library:** `miniflamingo/xattn.py`,
# from its top to `image_causal_attention`.
#
# **Next:** module 07, tanh gates and GATED XATTN-DENSE: how the output that you have computed here
# enters a frozen language model without disturbing it.
