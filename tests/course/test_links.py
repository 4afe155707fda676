"""Every link of the READMEs and of the course leads to a file and a heading that exist.

Links to other hosts are looked at, not followed: tests need no network.
"""

import re
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from miniflamingo.course import render, timings
from tests.pages import PAGES

ROOT = render.HERE.parent
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s>]+(?:\([^()]*\))?)>?[^)]*\)")
HTML = re.compile(r"<(?:a|img)\b[^>]*?(?:href|src)=[\"']([^\"']+)")
READMES = list(PAGES.values())
NOTEBOOKS = [render.HERE / kind / f"{path.stem}.ipynb"
             for path in timings.sources() for kind in render.LEFT_OUT]  # fmt: skip


def unfenced(text):
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def prose(text):
    """Markdown without its code: fences, indented blocks, `spans`."""
    text = re.sub(r"^ {4}(?! *[-*\d]).*$", "", unfenced(text), flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda found: "x" * len(found[0]), text)


def links(text):
    text = prose(text)
    return LINK.findall(text) + HTML.findall(text)


def markdown(path):
    """All the Markdown of a file: the text itself, or a notebook's cells and shown Markdown."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return "\n\n".join(texts + [o.data["text/markdown"] for o in outputs
                                if "text/markdown" in o.get("data", {})])  # fmt: skip


def anchors(path):
    """The anchors that a page of the repository gives its headings, and those written in HTML."""
    text = markdown(path)
    headings = re.findall(r"^#{1,6} (.+)$", unfenced(text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    slugs = {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in plain}
    dashed = {heading.strip().replace(" ", "-") for heading in plain}  # JupyterLab's
    return slugs | dashed | set(re.findall(r"(?:id|name)=[\"']([^\"']+)", text))


def fault(target, page):
    """What is wrong with a link that stands on `page`, in words; None when nothing is."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        good = re.fullmatch(r"(?:[\w-]+\.)+[a-z]{2,}(?::\d+)?", parts.netloc, re.IGNORECASE)
        return None if good else f"{target}: no host"
    if parts.scheme in ("mailto", "attachment"):
        return None if parts.path else f"{target}: empty"
    if parts.scheme or target.startswith("/"):
        return f"{target}: neither a relative link nor one of the web"
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not path.exists():
        return f"{target}: there is no {path}"
    has_headings = parts.fragment and path.suffix in (".md", ".ipynb")
    if has_headings and unquote(parts.fragment) not in anchors(path):
        return f"{target}: {path.name} has no such heading"
    return None


def faults(text, page):
    return [found for target in links(text) if (found := fault(target, page))]


@pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_readme(page):
    text = markdown(page)
    assert links(text) and faults(text, page) == []


@pytest.mark.parametrize("path", timings.sources(), ids=lambda path: path.stem[:2])
def test_the_links_of_a_source_as_they_will_stand_in_its_notebooks(path):
    cells = render.read_source(path).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for kind in render.LEFT_OUT:
        assert faults(text, render.HERE / kind / f"{path.stem}.ipynb") == []


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: f"{page.parent.name}-{page.stem[:2]}")
def test_the_links_of_a_notebook(page):
    assert faults(markdown(page), page) == []


WRONG = [
    ("[a](nowhere.md)", "there is no"),
    ("[a *b*](other.md#no-such)", "other.md has no such heading"),
    ("![a picture](no.png 'title')", "there is no"),
    ("see [`a`](#nothing)", "has no such heading"),
    ("<a href='gone.html'>", "there is no"),
    ("[a](https://nowhere/x)", "no host"),
    ("[a](ftp://a.org/x)", "neither"),
    ("[a](/etc/hosts)", "neither"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_link_is_found(text, message, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{text}\n", "utf-8")
    (tmp_path / "other.md").write_text("# Other\n\n```\n# no such\n```\n", "utf-8")
    (found,) = faults(markdown(page), page)
    assert message in found


RIGHT = """# A page: what `it` is

[here](#a-page-what-it-is) [there](sub/b.ipynb#Two-words) [root](..) ![x](a%20b.png)
[web](https://arxiv.org/abs/2204.14198) [brackets [inside]](https://a.org/x_(y)) `[code](gone.md)`

    [code](gone.md)

```
[code](gone.md)
```
"""


def test_right_links_and_code_are_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(RIGHT, "utf-8")
    (tmp_path / "a b.png").touch()
    (tmp_path / "sub").mkdir()
    cell = nbformat.v4.new_markdown_cell("## Two words")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "sub" / "b.ipynb")
    assert len(links(RIGHT)) == 6 and faults(RIGHT, page) == []
