# %% [markdown]
# # 00 Start here
#
# **The question: what can a Flamingo do, what does it do when it can not know, and where in this
# course is each of its parts explained?**
#
# After this module you can
#
# - talk to a trained mini Flamingo: captions, questions, clips, and names that you invent;
# - write the prompt that it reads, as tokens, and say which image each token looks at;
# - tell an answer that was seen from one that was guessed;
# - find your way: seventeen modules, 00 to 16, and what each one is for;
# - (optional) say what the few examples of a prompt can teach at most, and be the model yourself.
#
# **You need:** Python and NumPy, and some calculus for later modules. No GPU.
#
# **Time:** about 45 minutes for the core path, and 25 for what is marked optional. Computing takes
# about 2 seconds of one core.

# %% [markdown]
# ## Real pictures, real words
#
# Here is a Flamingo: a language model that knows English, an eye that knows photographs, both
# trained by others and frozen, and a bridge between them that this project has trained. It was
# given six pictures, one at a time, and wrote a name below each. Then it was asked, of each,
# `Question: What kind of thing is this? Answer:`, and wrote what stands in brackets.

# %%
from miniflamingo import plots
from miniflamingo.course import show
from miniflamingo.real import kept

real = kept.read()
images = {key: kept.pixels(picture) for key, picture in real["pictures"].items()}
animals = real["shown"]["chosen"]
said = [animal["name"]["answer"] for animal in animals]
right = [name == real["pictures"][a["picture"]]["name"] for name, a in zip(said, animals)]
said = [f"{name} [{animal['kind']['answer']}]" for name, animal in zip(said, animals)]
show(
    plots.plot_answers([images[animal["picture"]] for animal in animals], said, right, 3),
    alt="Drawings of a dog, a cat and a flamingo, twice, by two artists. Below the first row stand "
    "dog, cat and flamingo, below the second deer, dog and rooster, all three wrong. The kind in "
    "brackets is animal each time.",
)

# %% [markdown]
# The first row is by an artist whose pictures it was trained with, the second by another. There it
# takes the dog for a deer, the cat for a dog and the flamingo for a rooster; but it knows that they
# are animals. So one sees at once what this course asks again and again: what has the model *seen*,
# and what does it only write well?
#
# A prompt may also hold examples. Here a dog is called *trun* and a cat *gorp*, words that mean
# nothing and were in no training. What is the third picture, by the other artist?

# %%
import numpy as np

taught = real["invented"][0]
pictures = [images[key] for key in (*taught["examples"], taught["asked"])]
scores = np.log(list(taught["p"].values()))
show(
    plots.plot_episode(pictures, [*taught["examples"].values(), "?"], list(taught["p"]), scores, 0),
    alt="Three drawings: a dog called trun, a cat called gorp, and another artist's dog. Beside "
    "them the log-likelihoods: trun, the right one, near 0, and gorp far below.",
)

# %% [markdown]
# Two examples are enough here. Where this goes right and where it does not, with numbers and with
# what a model reaches that does not look, is module 16, the last one. Until then we take a model
# that is much smaller, so that you can take it apart, train it and break it yourself in seconds.
#
# (Pictures: [Noto Emoji](https://github.com/googlefonts/noto-emoji) by Google, Apache-2.0, and
# [Twemoji](https://github.com/twitter/twemoji) by Twitter, Inc and other contributors, [CC-BY
# 4.0](https://creativecommons.org/licenses/by/4.0/).)

# %% [markdown]
# ## The picture
#
# Flamingo ([Alayrac et al., 2022](https://arxiv.org/abs/2204.14198)) reads text and images
# *interleaved*, and writes text. Two large models that already exist are frozen, one that sees and
# one that writes, and between them a bridge is trained. This is the whole of it, with the sizes of
# the small one that comes with this package.

# %%
import json

import numpy as np

from miniflamingo import demo, plots
from miniflamingo.course import check, guess, show, told
from miniflamingo.flamingo import count_parameters
from miniflamingo.training import WEIGHTS, load_flamingo

model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
show(
    plots.plot_map(count_parameters(model.config), model.config.lm.depth),
    alt="Pictures go through a frozen vision encoder (module 04) and a trained Perceiver Resampler "
    "(module 05), which gives visual tokens. Words go, three times, through a trained GATED "
    "XATTN-DENSE layer (modules 07 and 08), which reads the visual tokens, and a frozen LM block "
    "(modules 01 and 06); then comes the next word (module 06).",
)

# %% [markdown]
# | letter | meaning | here | in the paper |
# |---|---|---|---|
# | L | text tokens of a prompt | a few dozen | up to 256 in training on web pages |
# | N | images (or clips) in it | 0 to 32 | 5 in training on web pages, up to 32 in use |
# | R | visual tokens of an image | 8 | 64 |
# | V | tokens that it knows | 68 | |
# | y, x | the text, the images | | |
# | φ | which image a token looks at | | |
#
# ## The model talks
#
# Its world is small: pictures of 24 × 24 pixels with coloured shapes or handwritten digits, and 64
# words. Six pictures that no training has seen, with combinations of colour and shape that the
# bridge never saw either:

# %%
media, questions, truths, columns = demo.exhibits()["captions"]
show(
    plots.plot_answers(media[:6], [""] * 6, [True] * 6, columns),
    alt="Six small pictures without captions, on dark, noisy backgrounds: a yellow square as wide "
    "as a third of its picture, a cyan cross of twice the size of the green one beside it, a blue "
    "triangle, a purple ring and a purple disc.",
)

# %% [markdown]
# **Predict, then run:** what would *you* write under the first one, and what will the model write
# there? Its captions have a size, a colour and a shape, such as `"a large red circle"`. And how
# many of its six captions will be right in every word?

# %%
guess("0.a", first=..., right=...)

# %% tags=["reveal"]
answers = demo.ask(model, media[:6], questions[:6])
right = [a == t for a, t in zip(answers, truths)]
show(
    plots.plot_answers(media[:6], answers, right, columns),
    alt="The same six small pictures, each with the model's caption below it: "
    + "; ".join(answers)
    + ".",
)
told("0.a", first=answers[0], right=sum(right))

# %% [markdown]
# Questions about one of two objects, and clips of eight frames, which are one "image" each:

# %%
for kind in ("questions", "clips"):
    media, questions, truths, _ = demo.exhibits()[kind]
    for question, answer, truth in zip(questions, demo.ask(model, media, questions), truths):
        print(f"{question:<25}{answer:<14}{'right' if answer == truth else f'wrong: {truth}'}")

# %% [markdown]
# ## What it computes
#
# Each word is drawn from a distribution that knows the words before it *and the images before it*:
#
# $$p(y \mid x) = \prod_{\ell=1}^{L} p(y_\ell \mid y_{\lt \ell}, \, x_{\le \ell}) \qquad\qquad (1)$$
#
# That is all: a language model (LM) with pictures among its conditions. Nothing is said of
# captions, questions or examples: what you get depends on the prompt that you write.
#
# ## The prompt
#
# In the text, `<image>` stands where an image is, `<BOS>` opens, and `<EOC>` ("end of chunk")
# closes what belongs to one image. A prompt that the model is to go on with does *not* end with
# `<EOC>`, or there is nothing left to say. The library builds it:

# %%
from miniflamingo.prompt import BOS, EOC, IMAGE, build_batch
from miniflamingo.worlds import shapes
from miniflamingo.worlds.grammar import TOKENIZER


# %%
def draw(colour, shape, seed=0):  # -> [24, 24, 3], another picture for each seed
    classes = shapes.COLOURS.index(colour), shapes.SHAPES.index(shape), 1
    rng = np.random.default_rng(seed)
    return shapes.draw_objects(*(np.array([c]) for c in classes), rng, split="test")[0]


batch = build_batch([[draw("red", "circle"), "what color ?"]], TOKENIZER, 24, close=False)
print(batch.tokens[0], "=", TOKENIZER.decode(batch.tokens[0]))

# %% [markdown]
# ### Exercise 0.1: a question, as tokens
#
# ★☆☆ · 4 minutes · 1 line. `question` are the ids of its words. Return the prompt int [2 + n] that
# asks it about one image: `BOS`, `IMAGE` and `EOC` are the ids of the special tokens.
#
# <details><summary>Hint 1</summary>
#
# The image comes first, so that every word of the question comes after it.
#
# </details>


# %% tags=["exercise"]
def ask_about(question):  # n ids -> int[2 + n]
    ...  # your code


# %% tags=["solution"]
def ask_about(question):  # n ids -> int[2 + n]
    return np.array([BOS, IMAGE, *question])


# %%
check("0.1", ask_about)

# %% [markdown]
# ## Which image does a word look at?
#
# With several images in a prompt, each token looks at exactly *one*: the last before it, or at it.
# Its number is φ, counted from 1, and 0 where no image has come yet:
#
# $$\varphi(\ell) = \text{how many } \texttt{<image>} \text{ there are among } y_1 \dots y_\ell
# \qquad\qquad (2)$$
#
# ### Exercise 0.2: φ, by hand
#
# ★☆☆ · 5 minutes · 1 line. Fill in φ for the 12 words of this page, by hand: a list of 12 numbers.
# (`words` is there if you would rather count with a loop.)
#
# `<BOS> two things <EOC> <image> this dax <EOC> <image> this wug <EOC>`
#
# <details><summary>Hint 1</summary>
#
# `<image>` already looks at its own image. `<EOC>` still belongs to the chunk that it closes.
#
# </details>


# %% tags=["exercise"]
def phi_by_hand(words):  # 12 strings -> int[12]
    ...  # your code


# %% tags=["solution"]
def phi_by_hand(words):  # 12 strings -> int[12]
    return [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]  # equation (2)


# %%
check("0.2", phi_by_hand)

# %% [markdown]
# Module 07 is about this number: how attention keeps to it, and what goes wrong if it does not.
# The library's version, on a prompt with two pictures:

# %%
from miniflamingo.xattn import compute_phi

circle, bar = draw("red", "circle", seed=1), draw("blue", "bar", seed=2)
batch = build_batch([["and", circle, "this dax", bar, "this wug"]], TOKENIZER, 24)
words = [TOKENIZER.words[i] for i in batch.tokens[0]]
assert np.array_equal(compute_phi(batch.tokens, IMAGE), batch.phi)
show(
    plots.plot_phi(words, batch.phi[0], images=[circle, bar]),
    alt="Two pictures, a red circle and a blue bar, and the tokens below. BOS and 'and EOC' have "
    "phi 0; the first image tag, 'this dax EOC' have phi 1; the second image tag, 'this wug EOC' "
    "have phi 2.",
)

# %% [markdown]
# ## Examples in the prompt teach
#
# "dax" and "wug" mean nothing. The model has never been told that a red circle is a dax; in the
# next prompt a blue bar may be one. Such a name can only be read off the examples, and reading it
# off is what *few-shot learning* means. Nothing is trained, no weight changes.
#
# ### Exercise 0.3: a prompt that teaches a name
#
# ★★☆ · 10 minutes · 3 to 5 lines. `names` int [k] are the names of k shots. Return the tokens
#
# `<BOS> <image> this name <EOC> <image> this name <EOC> ... <image> this`
#
# which show k named images and leave the last one open. `this` is the id of the word "this".
#
# <details><summary>Hint 1</summary>
#
# Each shot is four tokens: `[IMAGE, this, name, EOC]`. The query is two: `[IMAGE, this]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Start with a list that holds `BOS` alone, add each shot to it in a loop, then the query.
#
# </details>


# %% tags=["exercise"]
def teach(names, this):  # int[k], int -> int[4k + 3]
    ...  # your code


# %% tags=["solution"]
def teach(names, this):  # int[k], int -> int[4k + 3]
    tokens = [BOS]
    for name in names:
        tokens += [IMAGE, this, name, EOC]
    return np.array([*tokens, IMAGE, this])


# %%
check("0.3", teach)

# %% [markdown]
# The library builds the same tokens from words and pictures. The third picture is another red
# circle: elsewhere, in another shade.

# %%
from miniflamingo.functional import softmax

other = draw("red", "circle", seed=3)


def next_word(prompt):  # -> the distribution of the next word, [V]
    batch = build_batch([prompt], TOKENIZER, 24, close=False)
    return softmax(model(**batch.inputs())[0, -1].astype(np.float64))


def shots(first, second):
    return [circle, f"this {first}", bar, f"this {second}", other, "this"]


# %% [markdown]
# **Predict, then run:** the circle was called *dax* and the bar *wug*. Which word does the model
# write next? And which one if the two names change places? One word for each.

# %%
guess("0.b", next_word=..., names_exchanged=...)

# %% tags=["reveal"]
names = ["dax", "wug", "toma", "red", "circle"]
ids = [TOKENIZER.ids[name] for name in names]
panels = {"circle dax, bar wug": shots("dax", "wug"), "circle wug, bar dax": shots("wug", "dax")}
panels |= {"no shots": [other, "this"]}
show(
    plots.plot_distributions(names, {t: next_word(p)[ids] for t, p in panels.items()}),
    alt="Probability of dax, wug, toma, red and circle as the next word, in three panels: the "
    "circle called dax and the bar wug, the other way round, and without shots.",
)
first, second, _ = (TOKENIZER.words[next_word(p).argmax()] for p in panels.values())
told("0.b", next_word=first, names_exchanged=second)

# %% [markdown]
# ## How far do examples carry? (optional)
#
# With *w* possible classes and k random shots, the class that is asked for may not be among the
# shots at all, and then nobody can know its name. Each shot misses it with probability $(w - 1)/w$,
# and as the shots are drawn independently, all k of them with $((w-1)/w)^k$. The rest is the best
# that anyone can do:
#
# $$\text{ceiling}(w, k) = 1 - \Big( \frac{w - 1}{w} \Big)^k \qquad\qquad (3)$$
#
# Try it with a loop, by throwing dice: 8 classes, 4 shots.

# %%
rng, shown = np.random.default_rng(0), 0
for _ in range(20_000):
    asked, *seen = rng.integers(0, 8, 1 + 4)
    shown += asked in seen  # the class that is asked for was among the shots
print(f"shown in {shown / 20_000:.2f} of the cases")

# %% [markdown]
# ### Exercise 0.4: the ceiling (optional)
#
# ★☆☆ · 6 minutes · 1 line. Write equation (3) for an array of numbers of shots, without a loop.
#
# <details><summary>Hint 1</summary>
#
# `base ** shots` works for an array `shots`, number by number.
#
# </details>


# %% tags=["exercise"]
def ceiling(ways, shots):  # int, int[n] -> [n]
    ...  # your code


# %% tags=["solution"]
def ceiling(ways, shots):  # int, int[n] -> [n]
    return 1 - ((ways - 1) / ways) ** np.asarray(shots)  # equation (3)


# %%
check("0.4", ceiling)

# %% [markdown]
# ### Exercise 0.5: be the model (optional)
#
# ★★★ · 15 minutes · 8 to 12 lines. Answer a few-shot prompt as well as anyone can. `tokens` are
# those of exercise 0.3: `<BOS> <image> this name <EOC> ... <image> this`. `classes` int [k + 1]
# says what each image shows, the query last: a number for red circles, another for blue bars.
# Return the id of the name that the query's class has in this prompt, or −1 where no shot shows
# that class. Text may stand before the first image, and between two images; only the word behind
# `this` is a name.
#
# <details><summary>Hint 1</summary>
#
# Walk through the tokens and keep φ, the number of images so far. The image that a word looks at
# shows `classes[phi - 1]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A dictionary from class to name. The last `this` has no word behind it. `names.get(key, -1)` gives
# −1 where a key is missing.
#
# </details>


# %% tags=["exercise"]
def best_answer(tokens, classes, this):  # int[L], int[k + 1], int -> int
    ...  # your code


# %% tags=["solution"]
def best_answer(tokens, classes, this):  # int[L], int[k + 1], int -> int
    phi, names = 0, {}
    for i, token in enumerate(tokens):
        if token == IMAGE:
            phi += 1  # equation (2)
        elif token == this and phi > 0 and i + 1 < len(tokens):
            shown = classes[phi - 1]
            names[shown] = tokens[i + 1]
    return names.get(classes[-1], -1)


# %%
check("0.5", best_answer)

# %% [markdown]
# Now the curve of the trained model, from its own evaluation (1,000 episodes a point, pictures that
# no training has seen). The bridge was trained on documents of *five* pictures; the curve goes to
# 32. That the model uses 32 examples after seeing five is no accident: φ lets every word look at
# one image only, so 32 are no new situation (module 07).

# %%
from miniflamingo.evaluation import coverage

metrics = json.loads((WEIGHTS / "flamingo" / "metrics.json").read_text())
curves = {"4-way": "binding_4way", "8-way": "binding_8way"}
curves = {name: metrics["few_shot"][task] for name, task in curves.items()}
ceilings = {f"{w}-way": {k: coverage(w, int(k)) for k in curves["8-way"]} for w in (4, 8)}
show(
    plots.plot_few_shot(curves, ceilings, {f"{w}-way": 1 / w for w in (4, 8)}),
    alt="Accuracy against 0 to 32 shots. Both curves start near 0 and follow their dotted ceilings "
    "closely: 4-way reaches 0.91 at 8 shots and almost 1 at 32, 8-way 0.65 at 8 shots and 0.94 at "
    "32, a little below the ceiling of 0.99. Level lines at 1/4 and 1/8 are who names a random "
    "example without looking.",
)

# %% [markdown]
# ## Break it
#
# Nothing makes a language model silent. Ask for what is not there: a picture with nothing on it but
# the noise that all our pictures have, or a bar where there is only a circle.
#
# **Predict, then run:** we show a red circle and ask `what color is bar ?`. Which colour does the
# model answer, and with which probability? And what is the probability of the likeliest colour when
# it is asked `what color ?` of the empty picture? A word and two numbers between 0 and 1; numbers
# within a quarter of the model's count as right.

# %%
guess("0.c", bar=..., bar_probability=..., empty_probability=...)

# %% tags=["reveal"]
empty, other_empty = shapes.background(2, np.random.default_rng(0)).clip(0, 1)
cases = {"a red circle": [circle, "what color ?"], "nothing": [empty, "what color ?"],
         "is bar ?": [circle, "what color is bar ?"]}  # fmt: skip
names = list(shapes.COLOURS)
ids = [TOKENIZER.ids[name] for name in names]
answers = {title: next_word(prompt)[ids] for title, prompt in cases.items()}
show(
    plots.plot_distributions(names, answers),
    alt="Probabilities of eight colours, as bars in three panels: for a red circle, for an empty "
    "picture, and when the colour of a bar is asked for where there is only a red circle.",
)
nothing, bar_answer = answers["nothing"], answers["is bar ?"]
probabilities = (round(float(p.max()), 2) for p in (bar_answer, nothing))
bar_told = dict(zip(("bar_probability", "empty_probability"), probabilities))
told("0.c", within=0.25, bar=names[bar_answer.argmax()], **bar_told)

# %% [markdown]
# <details><summary>After the run</summary>
#
# The empty picture is the milder case: the model guesses, but its distribution is broad, which one
# can see. The bar is worse. The question *presupposes* a bar, training never held a
# question without an answer, and the model is as sure as if there were one. The paper names just
# this among its limits: an answer that is invited by an irrelevant question.
#
# </details>
#
# Which check tells an answer that was seen from a guess? Not the probability alone. One that says
# more: take the object away, that is, show another empty picture, and ask again. An answer that was
# seen changes with the picture; one that was not does not, or not much. (Half the sum of
# |differences|: 1 is as far as two distributions can be apart.)

# %% tags=["reveal"]
for title, prompt in cases.items():
    seen, unseen = next_word(prompt), next_word([other_empty, *prompt[1:]])
    change = abs(seen - unseen).sum() / 2
    word = TOKENIZER.words[seen.argmax()]
    print(f"{title:<14}{word:<8} p = {seen.max():.2f}   moved by the picture: {change:.2f}")

# %% [markdown]
# <details><summary>After the run</summary>
#
# That check sees that "red" comes from the picture in the first and in the last case, and that the
# answer to the empty one hardly does. It does not see that there is no bar: no check of the
# *answer* can, only one that knows the picture.
#
# </details>
#
# Module 11 is about such limits.

# %% [markdown]
# ## The map of the course
#
# | module | its question in short |
# |---|---|
# | 01 attention | what does a token learn from the others, and what does it cost? |
# | 02 a block and the tape | what stands between two attentions, and who computes the gradients? |
# | 03 Perceiver | how do a few latents read a very long input? |
# | 04 vision encoder | how is a picture turned into features, and learned from captions? |
# | 05 Perceiver Resampler | how does any image or video become R visual tokens? |
# | 06 the frozen LM | how is text written, word by word, and how fast? |
# | 07 φ and masking | which image may a word look at? |
# | 08 tanh gates | how do new layers enter a frozen model without disturbing it? |
# | 09 training | what does a step do, and in which order do the gates open? |
# | 10 few-shot | what do 0 to 32 examples teach, and which ones? |
# | 11 ablations and limits | what does each choice buy, and where does it fail? |
# | 12, 13 Triton | how are the forward and the backward pass written for a GPU? |
# | 14 speed | how fast can it be at most, and how fast is it? |
# | 15 full size | what changes at 3, 9 and 80 billion? |
# | 16 a real one | what can it say and see with real parts, and what not? |
#
# In each: derive, predict, run, do the exercises (`check` says what is wrong), break it. "Run all"
# never stops, and later cells never depend on your answers.
#
# ## Takeaways
#
# - Flamingo is a frozen eye and a frozen language model with a trained bridge between them.
# - It completes interleaved text and images; captions, questions and examples are all prompts.
# - Every token looks at one image: the last one.
# - Names invented in a prompt are learned from its examples, as far as the examples show them.
# - It always answers. A confident answer is not a seen one.
#
# **In the paper:** [arXiv:2204.14198](https://arxiv.org/abs/2204.14198), figures 1 to 3 and
# sections 1 to 3; its limits are in section 5. **In the library:** `miniflamingo/xattn.py` first,
# then `flamingo.py`, the whole model on a page. `python -m miniflamingo generate` asks it about
# your own picture.
#
# **Next:** module 01, attention from scratch.

# %% [markdown] tags=["notes"]
# ### For the teacher
#
# **Minutes.** 0 the map, guess 0.a, captions, questions and clips; 9 equation (1), the prompt,
# exercise 0.1; 16 exercise 0.2, then the same by the library; 24 exercise 0.3 and guess 0.b; 38
# guess 0.c and the check that takes the object away; 44 the map of the course.
#
# **Predictions.** *0.a:* what the first caption says is easy to see; all six are right. Classes
# guess three or four, from experience with small models: this one's world is small, too. *0.b:*
# "dax", then "wug". Who answers "red" takes the names for knowledge; they are read off the page.
# *0.c:* red, nearly 1, and about a half. The usual guess for the bar is a low probability, "it
# cannot know": nothing in its training rewarded doubt.
#
# **Open questions.** None is left open.
#
# **Misconceptions.** That the model learns from the examples in the sense of weights. That
# captions, questions and examples are different modes. That a word looks at all images before it.
# That a high probability means that something was seen.
#
# **To cut.** The clips, then the check that takes the object away (tell its result). Keep 0.2 and
# 0.3.

# %% [markdown] tags=["quiz"]
# ### Quiz
#
# **1.** In a prompt with three images the order of the first two chunks (image and text together)
# is exchanged. Which words look at other images than before, and may the answer change?
#
# <details><summary>Answer</summary>
#
# None: each chunk's words look at their own image, which has moved with them; only the numbers φ
# are exchanged. The answer may change all the same, since the language model reads the chunks in
# another order.
#
# </details>
#
# **2.** Somebody writes a prompt of four named shots and gets the name of the wrong class, with a
# probability of 0.99. Name two different causes, and a test for each.
#
# <details><summary>Answer</summary>
#
# The class is not among the shots, so no right answer can be known: look at the shots, or compute
# how often that happens, (3). Or the prompt is built wrongly, such as an `<EOC>` at its end or an
# `<image>` behind its text: print the tokens and φ.
#
# </details>
#
# **3.** The model was trained on pages of five images and works with 32. Which property of (2)
# makes that less surprising?
#
# <details><summary>Answer</summary>
#
# Every word looks at exactly one image, however many there are. So no cross-attention meets more
# than one image's R visual tokens, in training or with 32; only the text becomes longer.
#
# </details>
