"""Two pictures to turn by hand: where an image tag stands, and how far the gates are open.

    from notebooks.widgets import move_image_tag, turn_alpha

    move_image_tag("My cat . <image> My dog .")     # the last line of a cell
    turn_alpha("what color ?")

Each returns a widget. Without ipywidgets, and when the course is rendered, it prints one line that
says how to get it, shows the same figure as it is at the start, and returns None: a notebook's
output is the same bytes at every run.
"""

import base64
import html
import io
import os

import numpy as np
from matplotlib.figure import Figure

from miniflamingo import plots
from miniflamingo.functional import softmax
from miniflamingo.plots.style import GREY, VISIBLE, styled
from miniflamingo.prompt import IMAGE, WordTokenizer, build_batch, split_words
from miniflamingo.training import WEIGHTS, load_flamingo
from miniflamingo.worlds import grammar, shapes
from miniflamingo.xattn import compute_phi

from .display import show

TAG = "<image>"
MISSING = "To turn this by hand: pip install ipywidgets, restart the kernel, run the cell again."
RENDERED = "To turn this by hand, run the cell in JupyterLab. Here it is as it starts:"


def _present(draw, sliders):
    """A widget of the sliders above what draw(*their values) -> (figure, alt) shows, or None.

    sliders: {name: (kind of ipywidgets' slider, value, lowest, highest, step)}.
    """
    values = [value for _, value, *_ in sliders.values()]
    rendering = bool(os.environ.get("MINIFLAMINGO_RENDERING"))  # set by render.py
    try:
        import ipywidgets
    except ImportError:
        ipywidgets = None
    if rendering or not ipywidgets:
        print(RENDERED if rendering else MISSING)
        show(*draw(*values))
        return None
    picture, handles = ipywidgets.HTML(_image(*draw(*values))), []
    for name, (kind, value, low, high, step) in sliders.items():
        settings = dict(min=low, max=high, step=step, description=name)
        style = {"description_width": "initial"}
        handles.append(getattr(ipywidgets, kind)(value=value, style=style, **settings))

    def redraw(change):
        picture.value = _image(*draw(*(handle.value for handle in handles)))

    for handle in handles:
        handle.observe(redraw, names="value")
    return ipywidgets.VBox([*handles, picture])


def _image(figure, alt):
    """A figure as an HTML image that says in words what it shows."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


# --- where the tag stands -----------------------------------------------------------------------


def move_image_tag(text, R=4):
    """Move the image tags of a sentence; phi and the image-causal mask follow (equations 1, 2).

    text holds one `<image>` tag or more, among words; each image has R visual tokens. ValueError
    for a text without a tag, or without a word.
    """
    words = split_words(text)
    plain, places = [], []
    for word in words:
        places.append(len(plain)) if word == TAG else plain.append(word)
    if not places or not plain:
        raise ValueError(f"a text of words and {TAG} tags is wanted, got {text!r}")

    def draw(*places):
        return _mask_figure(*tagged(plain, places), R)

    sliders = {f"words before tag {i + 1}": ("IntSlider", place, 0, len(plain), 1)
               for i, place in enumerate(places)}  # fmt: skip
    return _present(draw, sliders)


def tagged(words, places):
    """L words and N places, 0..L -> L + N words with the tags put in, and their phi int[L + N]."""
    out = list(words)
    for place in sorted(places, reverse=True):
        out.insert(place, TAG)
    tokens = WordTokenizer.from_texts([" ".join(words)]).encode(" ".join(out))
    return out, compute_phi(np.array([tokens]), IMAGE)[0]


def _mask_figure(words, phi, R):
    N = words.count(TAG)
    seen = [f"{sum(phi == j)} look at {f'image {j}' if j else 'no image'}" for j in range(N + 1)]
    alt = (
        f"The image-causal mask of '{' '.join(words)}'. Of {len(words)} tokens, {', '.join(seen)}."
    )
    return plots.plot_image_causal_mask(words, phi, N, R), alt


# --- how far the gates are open -----------------------------------------------------------------


def turn_alpha(text="what color ?", opening=1.0, picture=None):
    """Turn all gates of the shipped mini Flamingo; its next word leaves the frozen LM's.

    Every alpha is its trained value times the opening: 0 is the LM bit for bit, 1 the trained
    model. picture [24, 24, 3] in [0, 1], a large red circle by default, stands before the text.
    """
    gates = Gates(text, picture)
    shown = gates.top_words(5)

    def draw(opening):
        return _words_figure(gates, shown, opening)

    return _present(draw, {"alpha, in trained alphas": ("FloatSlider", opening, 0.0, 1.5, 0.05)})


class Gates:
    """The shipped model before one picture and a text, with gates that can be turned."""

    def __init__(self, text, picture=None):
        self.model = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
        if picture is None:
            red, circle, large = (np.array([names.index(name)]) for names, name in (
                (shapes.COLOURS, "red"), (shapes.SHAPES, "circle"),
                (shapes.SIZES, "large")))  # fmt: skip
            rng = np.random.default_rng(0)
            picture = shapes.draw_objects(red, circle, large, rng, split="test")[0]
        size = self.model.config.vision.image_size
        self.batch = build_batch([[picture, text]], grammar.TOKENIZER, size, close=False)
        self.media = self.model.resampler(self.model.encode(self.batch.pixels))
        self.text = text
        alphas = [(g.alpha_xattn, g.alpha_dense) for g in self.model.gated_xattn]
        self.trained = [(alpha, alpha.data) for pair in alphas for alpha in pair]

    def frozen(self):
        """The frozen LM's probabilities [V] of the next word; it sees the text, no picture."""
        return softmax(self.model.lm(self.batch.tokens)[0, -1])

    def opened(self, opening):
        """The model's probabilities [V] of the next word, alphas being `opening` times trained."""
        for alpha, trained in self.trained:
            alpha.data = trained * np.asarray(opening, trained.dtype)
        logits = self.model.read(self.batch.tokens, self.media, self.batch.phi)
        return softmax(logits[0, -1])

    def top_words(self, n):
        """Token ids: the n likeliest words of the frozen LM and of the trained model, each once."""
        both = [np.argsort(-p, kind="stable")[:n] for p in (self.opened(1.0), self.frozen())]
        return list(dict.fromkeys(int(i) for ids in both for i in ids))


@styled
def _words_figure(gates, shown, opening):
    frozen, opened = gates.frozen(), gates.opened(opening)
    words, y = [grammar.TOKENIZER.words[i] for i in shown], np.arange(len(shown))
    apart = abs(opened - frozen).sum() / 2
    figure = Figure((6.4, 0.42 * len(shown) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    rows = (
        ("frozen LM", frozen, GREY, -0.2),
        ("with the picture", opened, VISIBLE, 0.2),
    )
    for name, p, colour, shift in rows:
        bars = axes.barh(y + shift, p[shown], 0.38, color=colour, label=name)
        axes.bar_label(bars, [f"{x:.2f}" for x in p[shown]], padding=3, fontsize=8)
    axes.set(yticks=y, yticklabels=words, xlim=(0, 1.12), xlabel="probability of the next word")
    axes.set_title(f"alpha × {opening:.2f}: the two are {apart:.2f} apart (0 equal, 1 disjoint)")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    first, second = (words[int(np.argmax(p[shown]))] for p in (frozen, opened))
    alt = (f"Probabilities of the word after '{gates.text}', alpha being {opening:.2f} times its "
           f"trained value. Likeliest for the frozen LM: {first}; with the picture: {second}. "
           f"The two distributions are {apart:.2f} apart.")  # fmt: skip
    return figure, alt
