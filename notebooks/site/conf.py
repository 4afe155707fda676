"""Sphinx's settings of the course's site; `python -m miniflamingo.course.site.build` calls it."""

import re
from importlib.util import find_spec

project, author, language = "miniflamingo", "the miniflamingo authors", "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]

# the notebooks as committed: nothing is executed
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = "miniflamingo"
html_static_path, html_favicon = ["static"], "static/favicon.svg"
html_css_files = ["course.css"]
html_copy_source, html_show_sphinx, html_show_copyright = False, False, False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
mathjax_path = "mathjax.js"  # copied there by the build; nothing is asked of another host
mathjax3_config = {"svg": {"fontCache": "local"}, "options": {"enableMenu": False}}

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
# kernels import on any machine: a GPU is needed to run them only
autodoc_mock_imports = [name for name in ("triton", "torch") if not find_spec(name)]


def as_rst(lines):
    """Docstrings are plain text: columns stay as they are, `names` are code, no markup but that."""
    out = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = paragraph.split("\n")
        if any(row.startswith(" ") for row in rows):
            out += ["::", "", *("    " + row for row in rows), ""]
        else:
            out += [_inline(row) for row in rows] + [""]
    return out


def _inline(row):
    parts = re.split(r"(`[^`]+`)", row)
    code = [f"`{p}`" if p.startswith("`") else re.sub(r"([\\*_|`])", r"\\\1", p) for p in parts]
    return "".join(code)


def setup(app):
    """Make what the docstrings of the project look like known to autodoc."""

    def process(app, what, name, thing, options, lines):
        lines[:] = as_rst(lines)

    app.connect("autodoc-process-docstring", process)
