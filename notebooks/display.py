"""How a notebook shows figures and the library's own source, the same bytes at every run."""

import html
import inspect
import io
import textwrap

from IPython.display import display
from PIL import Image

from miniflamingo.rooms import path_of


def show(figure, alt):
    """Show a matplotlib Figure, with `alt`, what it shows, in words.

    The words go where a reader may look for them: into the image's metadata (converters make the
    alt attribute of it), into its plain text, and under it, folded, because JupyterLab and the
    repository page give an image no alternative text. `figure` may be a function without arguments
    that draws a student's answer: when it fails, one line says so and the notebook goes on.
    """
    if callable(figure):
        try:
            figure = figure()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"no picture yet: finish the exercise first ({reason})")
            return
    bundle = {"image/png": _small_png(figure), "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})
    words = html.escape(textwrap.fill(alt, 100), quote=False)
    _markdown(f"<details><summary>The figure in words</summary>\n\n{words}\n\n</details>", alt)


def _small_png(figure):
    """The figure as a PNG of at most 256 colours, half the size; no colour is far from its own."""
    large, small = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png")
    options = dict(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    Image.open(large).convert("RGB").quantize(256, **options).save(small, "png", optimize=True)
    return small.getvalue()


def source(thing):
    """Show the library's own source of a function or class, folded, under the file it stands in.

    Folded, because it is the answer to many an exercise.
    """
    thing = inspect.unwrap(thing)
    code = textwrap.dedent(inspect.getsource(thing)).rstrip()
    lines, path = code.count("\n") + 1, path_of(thing.__module__) + ".py"
    name = f"<code>{thing.__qualname__}</code> in <code>{path}</code>, {lines} lines"
    folded = f"<details><summary>{name}</summary>\n\n```python\n{code}\n```\n\n</details>"
    _markdown(folded, f"{path}\n{code}")


def _markdown(text, plain):
    """Show Markdown, or `plain` where only text can be shown."""
    display({"text/markdown": text, "text/plain": plain}, raw=True)
