# %% [markdown]
# # 07 φ and image-causal masking
#
# **The question: a page holds several images. Which of them may a word look at, and how do we make
# sure that it looks at no other?**
#
# After this module you can
#
# - compute φ, the index of the image that each token looks at, and say where it is easy to be off
#   by one;
# - write the image-causal mask and the attention under it, with loops and without;
# - find out by experiment which image reaches which token, and recognise a bug that public
#   implementations of Flamingo had (optional: two more);
# - optional: write φ of the next image, and say what a dense mask costs at the paper's size and how
#   the fused kernel does without one.
#
# **You need:** attention (module 01) and the Perceiver Resampler (module 05), which turns every
# image into the same small number of *visual tokens*. The gate that the result goes through comes
# next, in module 08.
#
# **Time:** about 50 minutes for the core path, and 45 for what is marked optional. Computing takes
# about 1 second of one core.

# %% [markdown] tags=["notes"]
# ## For the teacher
#
# **Minutes.** 0 to 7: the picture, and φ of the page read aloud by the class. 7 to 14: the
# derivation; draw the shapes on the board. 14 to 20: exercise 7.1. 20 to 29: the mask and exercise
# 7.3. 29 to 35: attention to one image, guesses 7.b and 7.c. 35 to 46: exercise 7.4 (slower
# readers finish it at home). 46 to 50: the bug, and the takeaways.
#
# **Predictions.** 7.a: 1, 2 and 0. Usual: 0 first, because φ of the first picture began with
# 0, and 3 last, because nobody cuts at N. 7.b: 9 tokens, the puppy's chunk from its `<image>` to
# its `<EOC>`. Usual: 8, without the tag, or 17, since "later words know of the puppy": they do, but
# through the language model's self-attention and not through this layer. 7.c: 0.125 and 0. Usual: 0
# for both, as if −1e9 were small whatever it is compared with. 7.d: 16, 8 tokens by both images.
# Usual: 8, since many expect a leak of the first image alone. 7.e: 8 and 8. 7.f: none.
#
# **Open questions.** Where must the tags of the widget's page stand so that no token sees image 2
# but the tag itself? The second tag at the very end of the page, the first anywhere before it.
#
# **Misconceptions.** "φ is the list of all images so far": it is one index. "A token with φ = 0 has
# a small attention output": it is exactly 0, by definition. "The mask is stored in the model": it
# is made anew from the tokens of every batch. "Because later tokens do not look at image 1, the
# model forgets it": the language model's own attention still reads the words about it.
#
# **To cut.** First the widget, then guess 7.b, then the paragraph on the library's version with
# heads. Exercise 7.4 may be done in pairs, with hint 3 told to all.

# %% [markdown]
# ## The picture and the letters
#
# Flamingo ([Alayrac et al. 2022, arXiv:2204.14198](https://arxiv.org/abs/2204.14198)) reads text
# and images interleaved. This page, from the paper's figure 7, has two images. An `<image>` tag
# stands in the text where each image was, `<BOS>` opens the page, and `<EOC>` ("end of chunk")
# closes what belongs to one image.

# %%
import numpy as np

from miniflamingo import plots, xattn
from miniflamingo.course import check, guess, show, source, told
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
# The two pictures of our page (drawn by [Noto Emoji](https://github.com/googlefonts/noto-emoji),
# Apache-2.0; the paper has photographs), each with the text that belongs to it:

# %%
from miniflamingo.real import kept

drawn = kept.read()["pictures"]
pets = [kept.pixels(drawn[key]) for key in ("dog, noto", "cat, noto")]
texts = ["My puppy sitting in the grass.", "My cat looking very dignified."]
show(
    plots.plot_answers(pets, texts, [True, True], 2),
    alt="Two drawings side by side, a spotted puppy with the text 'My puppy sitting in the grass.' "
    "below it, and a yellow cat with 'My cat looking very dignified.'",
)

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
# $$\mathrm{mask}_{\ell,\,(n,r)} = [\, n = \phi(\ell) \,] \qquad\qquad (2)$$
#
# Note the `=`. Not $n \le \phi(\ell)$: a token does *not* look at all images so far, it looks at
# one. Attention under that mask is a softmax over the R visual tokens of a single image:
#
# $$o_\ell = \sum_{r=1}^{R} p_{\ell r} \, v_{\phi(\ell),\,r}, \qquad
# p_{\ell\,\cdot} = \mathrm{softmax}_r \big( q_\ell^\top k_{\phi(\ell),\,r} / \sqrt{K} \big),
# \qquad o_\ell = 0 \ \text{ where } \phi(\ell) = 0 \qquad (3)$$
#
# The shapes, from the tokens to the output, for one head:
#
# ```
# tokens           [B, L]        which token of the vocabulary stands where
#    | count the tags up to and including each token                        (1)
# phi              [B, L]        0 to N
#    | compare with the image of each column: 1 1 1 1 2 2 2 2               (2)
# mask             [B, L, N·R]   true where a token may look
#
# q                [B, L, K]  ----+
# k  [B, N, R, K] as [B, N·R, K] -+-> scores   [B, L, N·R]   q kᵀ / sqrt(K)
# mask             [B, L, N·R] ---+-> weights  [B, L, N·R]   softmax over the last axis
# v  [B, N, R, K] as [B, N·R, K] -+-> output   [B, L, K]     weights times values   (3)
# ```
#
# The last case of (3) is not a detail. A token without an image has no key to attend to, and a
# softmax of nothing is 0/0. The output is *defined* as exactly 0, so that such a token goes on as
# if this were a language model alone.
#
# **Why only one image?** Because then every token sees R = 64 keys, whether the page has one image
# or thirty-two. The paper trains on pages of at most 5 images and uses the same model with 32, and
# nothing *in this layer* meets a situation that it has not seen. (The language model does: it must
# read a longer text, so φ alone does not make 32 images work.) The cat's text can still know of the
# puppy: the language model's own self-attention carries words about image 1 to later words. Letting
# a token see *all* earlier images instead lowers the paper's overall score from 70.7 to 63.5 (its
# table of ablations).

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
# ### Exercise 7.1: φ without a loop
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
check("7.1", phi_of)

# %%
assert np.array_equal(phi_loop(tokens, IMAGE), phi)
print(phi[0])

# %% [markdown]
# ## The next image instead of the last (optional)
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
# 17), and the last number of $\phi_{next}$ on our page? Write your guesses for the dots.

# %%
guess("7.a", first=..., second_image=..., last=...)

# %% tags=["reveal"]
phi_next = xattn.compute_phi(tokens, IMAGE, use_next=True)
told("7.a", first=phi_next[0, 0], second_image=phi_next[0, 17], last=phi_next[0, -1])

# %% tags=["reveal"]
show(
    plots.plot_phi(words, phi_next[0]),
    alt="The same 25 tokens in a row, each with its phi of the next image, and coloured by it.",
)

# %% [markdown]
# ### Exercise 7.2: φ of the next image (optional)
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
check("7.2", phi_next_of)

# %% [markdown]
# The library's version is both (1) and (4), with `use_next` for the second, and checks that no page
# has more tags than images.

# %%
source(xattn.compute_phi)

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
# ### Exercise 7.3: the mask without a loop
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
check("7.3", mask_of)

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
guess("7.b", tokens=...)

# %% tags=["reveal"]
other_k, other_v = k.copy(), v.copy()
other_k[:, 0] += 1
other_v[:, 0] += 1
changed = (attention_loop(q, other_k, other_v, phi) != out).any(axis=-1)[0]
print("these change:", " ".join(np.array(words)[changed]))
told("7.b", tokens=changed.sum())

# %% [markdown]
# **Predict, then run:** many programs do not use $-\infty$ for a masked score but a large negative
# number such as −1e9. For a token with φ = 0, *all* scores are then −1e9. What weight does each of
# the 8 visual tokens get? And in the library?

# %%
guess("7.c", with_1e9=..., library=...)

# %% tags=["reveal"]
from miniflamingo.functional import softmax

finite = softmax(np.full(8, -1e9))
library = attention_weights(q[0, :1], k[0].reshape(8, K), np.zeros(8, bool))[0]
print("-1e9 everywhere:", finite)
print("the library:    ", library)
told("7.c", with_1e9=finite[0], library=library[0])

# %% [markdown]
# Softmax only sees *differences* of scores. A row of equal scores, however low, is a uniform
# average. Keep that in mind for the exercise.
#
# ### Exercise 7.4: attention under φ, without a loop
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
check("7.4", attend)

# %% [markdown]
# The library's version takes heads (q is [B, L, H, K], k and v are [B, N, R, H, K]) and builds no
# mask at all. How it manages is the subject of the last, optional section; here we only compare.

# %%
source(xattn.image_causal_attention)


# %%
def image_causal(q, k, v, phi):  # the library's, with one head
    q, k, v = q[:, :, None], k[:, :, :, None], v[:, :, :, None]
    return xattn.image_causal_attention(q, k, v, phi)[:, :, 0]


assert np.allclose(image_causal(q, k, v, phi), out, rtol=1e-12)

# %% [markdown]
# ### The gradient (optional)
#
# **It is image-causal, too.** An image learns only from the tokens that look at it:
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
# change one image, and see which tokens notice. `reach` does that. It returns [L, N], the largest
# change of an output of each token when the keys and values of each image change.
#
# Bug 1: **a finite fill** ([flamingo-pytorch](https://github.com/lucidrains/flamingo-pytorch) and
# [open-flamingo](https://github.com/mlfoundations/open_flamingo), where a token may attend to all
# earlier images, or a page has more tags than images). Masked scores become a large negative
# number, and nothing is done about the rows that are masked throughout.


# %%
def finite_fill(q, k, v, phi):
    mask, (B, N, R, K) = xattn.image_causal_mask(phi, *k.shape[1:3]), k.shape
    scores = q @ k.reshape(B, N * R, K).swapaxes(1, 2) / np.sqrt(K)
    return softmax(np.where(mask, scores, -1e9)) @ v.reshape(B, N * R, K)


# %% [markdown]
# **Predict, then run:** the table tokens × images has 50 cells. In how many of them does an output
# change that should not?

# %%
guess("7.d", bug_1=...)

# %%
from miniflamingo.course.checks.module_07 import reach

own = phi[0][:, None] == np.arange(1, N + 1)  # [L, N]: what should change
attends = {"the library": image_causal, "bug 1:\nfinite fill": finite_fill}

# %% tags=["reveal"]
leaks = (reach(finite_fill, q, k, v, phi) > 0) & ~own
print("these leak:", " ".join(np.array(words)[leaks.any(axis=1)]))
told("7.d", bug_1=leaks.sum())

# %% [markdown]
# Which check catches it? That of exercise 7.4:

# %% tags=["reveal"]
for name, function in attends.items():
    print(f"{' '.join(name.split())}: {check('7.4', function).message}")

# %% [markdown]
# <details><summary>After the run</summary>
#
# The captions are right and so is every later token; only the opening words see a blur of all
# images, *future ones included*.
#
# </details>
#
# ### Exercise 7.5: a harness that finds the fault (optional)
#
# ★★★ · 18 minutes · 9 to 14 lines. Write `reach` yourself, and let it judge. Given *any* function
# `attend(q, k, v, phi)`, a batch of one page, return bool [3, L]. Row 0: the token notices an
# *earlier* image than its own. Row 1: it notices a *later* one (for a token with φ = 0, any image
# is later). Row 2: it has an image, and is *blind* to it.
#
# <details><summary>Hint 1</summary>
#
# Compute the output once as it is. Then, for each image, copy k and v, change the copy of that
# image, and compare the outputs token by token: a table bool [L, N].
#
# </details>
# <details><summary>Hint 2</summary>
#
# Change keys *and* values, and not by the same number everywhere. A leak may run through only one
# of them; the check tries both kinds.
#
# </details>
# <details><summary>Hint 3</summary>
#
# With `image = np.arange(1, N + 1)` and `own = phi[0][:, None]`, earlier is `table & (image <
# own)`, and what is true of any image is `.any(axis=1)`.
#
# </details>


# %% tags=["exercise"]
def faults(attend, q, k, v, phi):  # a function and its arguments -> bool[3, L]
    ...  # your code


# %% tags=["solution"]
def faults(attend, q, k, v, phi):  # a function and its arguments -> bool[3, L]
    before, columns = attend(q, k, v, phi), []
    for j in range(k.shape[1]):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, j] += np.linspace(1, 2, k.shape[3])
        other_v[:, j] += 1
        columns.append((attend(q, other_k, other_v, phi) != before).any(axis=-1)[0])
    table, image = np.stack(columns, axis=1), np.arange(1, k.shape[1] + 1)  # [L, N], [N]
    mine = phi[0][:, None]
    earlier = (table & (image < mine)).any(axis=1)
    later = (table & (image > mine)).any(axis=1)
    blind = (phi[0] > 0) & ~(table & (image == mine)).any(axis=1)
    return np.stack([earlier, later, blind])


# %%
check("7.5", faults)

# %% [markdown]
# ### More bugs (optional)
#
# 2. **Text before the first image attends to it** (transformers,
#    [issue 26428](https://github.com/huggingface/transformers/issues/26428)).
# 3. **`>=` where `==` was meant** (flamingo-pytorch, [issue
#    6](https://github.com/lucidrains/flamingo-pytorch/issues/6)): a token sees every image so far.


# %%
def first_image_too_early(q, k, v, phi):
    return image_causal(q, k, v, np.maximum(phi, 1))


# %%
def greater_or_equal(q, k, v, phi):
    B, N, R, K = k.shape
    mask = xattn.image_causal_mask(phi, N, R, only_last=False)  # phi >= n
    return attention(q, k.reshape(B, N * R, K), v.reshape(B, N * R, K), mask)


# %% [markdown]
# **Predict, then run:** in how many of the 50 cells does an output change that should not, with
# each of these two?

# %%
guess("7.e", bug_2=..., bug_3=...)

# %%
attends["bug 2: first\nimage too early"] = first_image_too_early
attends["bug 3:\n>= for =="] = greater_or_equal
changes = {name: reach(function, q, k, v, phi) for name, function in attends.items()}

# %% tags=["reveal"]
leaks = [((change > 0) & ~own).sum() for change in changes.values()]
told("7.e", bug_2=leaks[2], bug_3=leaks[3])

# %% tags=["reveal"]
show(
    plots.plot_reach(words, phi[0], changes),
    alt="Four tables, 25 tokens by 2 images, for the library and three bugs: how much an output "
    "of each token changes with each image. Changes by an image that is not the token's own are "
    "marked as leaks.",
)

# %% tags=["reveal"]
for name, function in attends.items():
    print(f"{' '.join(name.split())}: {check('7.4', function).message}")

# %% [markdown]
# **Predict, then run:** suppose that you test with image-caption pairs, `<BOS><image>caption<EOC>`.
# How many of the three bugs show in a token of the caption?

# %%
guess("7.f", bugs=...)

# %% tags=["reveal"]
pair, bugs = np.array([[0, 1, 1, 1, 1]]), 0  # <BOS> <image> A caption <EOC>
for name, function in attends.items():
    change = reach(function, q[:, :5], k[:, :1], v[:, :1], pair)
    leaks = np.flatnonzero((change[:, 0] > 0) & (pair[0] == 0))
    print(f"{' '.join(name.split()):<30} tokens that leak: {leaks}")
    bugs = bugs + bool((leaks > 1).any())
told("7.f", bugs=bugs)

# %% [markdown]
# <details><summary>After the run</summary>
#
# None does: bugs 1 and 2 only touch `<BOS>`, and bug 3 needs two images. That is how such a bug
# goes unseen. Test on a page that begins with text and has several images.
#
# </details>

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
# page has more tags than images. mllama (Llama 3.2 Vision, in
# [transformers](https://github.com/huggingface/transformers)) always does: of a token
# without an image it masks what the gated feed-forward adds, but not what the attention adds.
# [IDEFICS](https://huggingface.co/blog/idefics)'s is no leak, only a waste: the images have not
# changed since the last token.

# %% [markdown]
# ## What it costs (optional)
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
# ## The fused view (optional)
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
# differs from the NumPy function above; modules 12 and 13 build it from zero.

# %%
source(xattn.work_list)

# %% [markdown]
# ## Takeaways
#
# - φ(l) is the running count of `<image>` tags, and the tag itself is counted. Off by one *at the
#   tag* is the typical mistake.
# - A token attends to the R visual tokens of one image: `==`, not `>=`. Earlier images arrive
#   through the language model's own attention. So this layer's task is the same with 5 images as
#   with 32; whether the whole model is up to 32 has to be measured (module 10).
# - φ = 0 means an output of exactly 0. A large negative number is not $-\infty$: a row that is
#   masked throughout becomes an average of everything, the future included.
# - Test causality by changing an image and listing the tokens that notice, on a page that begins
#   with text.
# - φ is the interface, 4 bytes a token; the dense mask is for teaching. Group the tokens by their
#   image, and no mask is needed (optional section).
#
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), section 2.3 (3.1.3 in its
# first version) and figure 7 (φ and the mask); the appendix has $p_{next}$ and the ablation in
# which a token sees all previous images. **In the library:** `miniflamingo/xattn.py`,
# from its top to `image_causal_attention`.
#
# **Next:** module 08, tanh gates and GATED XATTN-DENSE: how the output that you have computed here
# enters a frozen language model without disturbing it.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** A page is `<BOS> <image> a <EOC> <image> b <EOC>`. Someone computes φ as the number of tags
# *strictly before* each token. Which tokens get another image than they should, and would a loss on
# words alone show it?
#
# <details><summary>Answer</summary>
#
# Only the two `<image>` tags: the first gets 0 instead of 1, the second 1 instead of 2. All words
# and `<EOC>`s have the same φ as before. No word looks at a wrong image directly; the harm goes
# through the language model's self-attention, which reads what the tags have gathered. The loss
# would be a little worse at most, which nobody would notice. A table of φ shows it at once.
#
# </details>
#
# **2.** You double R, the number of visual tokens of an image, and the number of images N of each
# page. By what factor do the dense mask and the arithmetic of the image-causal attention grow?
#
# <details><summary>Answer</summary>
#
# The dense mask has L·N·R entries for a page, so it grows by 4. The image-causal attention lets
# each token meet R visual tokens, whatever N is, so its arithmetic grows by 2.
#
# </details>
#
# **3.** A colleague masks with −1e9 and tests on 1,000 image-caption pairs: all outputs equal those
# of the right code in every word of every caption. Why does that not show that the mask is right,
# and which single page would show it?
#
# <details><summary>Answer</summary>
#
# In a pair every word comes after the one image, so no row of the mask is empty except that of
# `<BOS>`, and there is no second image that could leak. A page that begins with some words and has
# two images shows it: change image 2, and the opening words change.
#
# </details>
