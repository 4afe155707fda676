"""The site, read with a browser: pages, figures, mathematics, search, themes; and a notebook run.

What needs a browser is skipped where the extra `site` or Chromium is missing; `make site-test` has
them. Requests to other hosts are blocked and counted: there must be none. JupyterLite is tried
where MINIFLAMINGO_LITE is set, because its Python takes a minute to start.
"""

import functools
import html
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from miniflamingo.course import render, timings
from miniflamingo.course.site import build, conf, lite, vendor
from tests.pages import PAGES

MISSING = [name for name in ("sphinx", "myst_nb", "furo", "playwright") if not find_spec(name)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
ABSENT = MISSING + ([] if CHROMIUM else ["Chromium"])
in_a_browser = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
PATHS = timings.sources()[:2]  # two modules are enough to try all kinds of pages
SECONDS = 240  # the longest wait for anything, on a busy machine
LOCAL = re.compile(r"(https?|ws)://(localhost|127\.0\.0\.1)[:/]|data:|blob:|about:")


# --- pages before Sphinx reads them ---------------------------------------------------------------


def test_links_lead_to_the_site_s_own_pages():
    name = PATHS[0].stem
    text = (f"[`a`](student/{name}.ipynb#b) [x](../miniflamingo/worlds/__init__.py) [r](README.md) "
            "[p](../README.md#c) [m](../Makefile) [w](https://a.org/b) [n](student/99_no.ipynb) "
            "![p](../Makefile)")  # fmt: skip
    assert build.relink(text, render.HERE, PATHS) == (
        f"[`a`](/course/{name}.ipynb#b) [x](/api/miniflamingo.worlds.md) [r](/teaching.md) "
        "[p](/project.md#c) m [w](https://a.org/b) n ![p](../Makefile)"
    )


def test_a_folder_is_its_page_and_every_page_of_the_project_is_on_the_site(tmp_path):
    text = "[a](../kernels) [b](../kernels/model/) [c](../miniflamingo/plots) [d](student)"
    assert build.relink(text, render.HERE, PATHS) == (
        "[a](/kernels.md) [b](/own-model.md) [c](/api/miniflamingo.plots.md) d"
    )
    assert build.PAGES.keys() == PAGES.keys()
    build.write_pages(tmp_path / "pages", PATHS)
    front = (tmp_path / "pages" / "index.md").read_text("utf-8")
    button = f"[Start with module 00](/course/{PATHS[0].stem}.ipynb){{.start}}"
    places = [
        front.index(part) for part in (button, "![", "## The path", "## The modules", "| [00")
    ]
    assert places == sorted(places) and not re.search(r"\{\w+\}\n", front.split("```")[0])
    links = build.LINK.findall((build.HERE / "index.md").read_text("utf-8"))
    for label, target in links:  # those to modules that are left out here become plain text
        words = " ".join(label.replace("{number}", "00").split())
        assert target.endswith(".ipynb") or f"[{words}](" in " ".join(front.split())
    for name in build.PAGES.values():
        assert f"\n{name}\n" in front
        for picture in build.PICTURE.findall((tmp_path / f"pages/{name}.md").read_text("utf-8")):
            assert (tmp_path / "pages" / picture[1].lstrip("/")).is_file()


def test_docstrings_keep_their_columns_and_hold_no_markup():
    lines = ["A *b* of `c_d`, x_ |e|.", "", "    phi    the image", "    gate   0", "", "End"]
    assert conf.as_rst(lines) == [
        r"A \*b\* of ``c_d``, x\_ \|e\|.", "",
        "::", "", "        phi    the image", "        gate   0", "", "End", "",
    ]  # fmt: skip


def test_a_course_page_describes_its_figures():
    page = build.course_page(PATHS[0], PATHS)
    assert not any("installed()" in cell.source for cell in page.cells)  # there is nothing to run
    committed = nbformat.read(render.HERE / "student" / f"{PATHS[0].stem}.ipynb", as_version=4)
    alts = [o.metadata["image/png"]["alt"] for cell in committed.cells
            for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]  # fmt: skip
    given = [c.metadata["mystnb"]["image"]["alt"] for c in page.cells if "mystnb" in c.metadata]
    assert alts and " ".join(given) == " ".join(alts)


def measured(N, kernel, direction):
    """A row of bench.py, with an invented time."""
    shape = {"B": 1, "L": 8, "N": N, "R": 4, "H": 1, "K": 8, "phi": "even"}
    return {"entry": "image_causal_attention", "direction": direction, "shape": shape,
            "implementation": "fused" if kernel else "torch", "is_kernel": kernel,
            "microseconds": 5.0 * N, "flops": 10**6, "bytes": 10**5,
            "floor_microseconds": 1.0 * N}  # fmt: skip


def test_the_figures_of_a_measurement_are_drawn(tmp_path):
    document = {"meta": {"gpu": "invented", "cpu": None, "date": "2026-01-01"},
                "limits": {"copy_bytes_per_second": 1e12, "flops_per_second": 1e14},
                "records": [measured(N, kernel, "forward") for N in (1, 4)
                            for kernel in (True, False)]}  # fmt: skip
    (tmp_path / "card.json").write_text(json.dumps(document), "utf-8")
    build.write_benchmarks(tmp_path, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert "## card" in text and "- gpu: invented" in text and "Not measured" not in text
    files = re.findall(r"!\[[^\]]{40,}\]\((figures/[^)]+)\)", text)
    assert files == ["figures/card-roofline.png", "figures/card-cost-forward.png"]
    assert all((tmp_path / file).stat().st_size > 2000 for file in files)


def test_without_results_the_page_says_what_measures_them(tmp_path):
    build.write_benchmarks(tmp_path, tmp_path)
    assert "Not measured yet" in (tmp_path / "benchmarks.md").read_text("utf-8")
    (tmp_path / "other.json").write_text("[1, 2]", "utf-8")
    build.write_benchmarks(tmp_path, tmp_path)
    assert "python -m miniflamingo bench --json" in (tmp_path / "benchmarks.md").read_text("utf-8")


def test_what_pyodide_packages_need_comes_with_them():
    packages = {"a": {"depends": ["B_c"]}, "b-c": {"depends": ["a", "gone"]}, "d": {"depends": []}}
    assert lite.closure(packages, ["a", "nowhere"]) == {"a", "b-c"}


def test_modules_1_to_10_go_into_the_browser():
    paths = [Path(f"{n:02d}_x.py") for n in (0, 1, 10, 11)]
    assert [path.stem[:2] for path in lite.chosen(paths)] == ["01", "10"]
    assert "built without JupyterLite" in lite.page(paths[:1])


def test_notebooks_for_the_browser_carry_their_pictures(tmp_path):
    lite.write_contents(tmp_path / "files", PATHS)
    for path in PATHS:
        book = json.loads((tmp_path / "files" / f"{path.stem}.ipynb").read_text("utf-8"))
        assert book["cells"][1]["source"] == lite.INSTALL
        linked = [cell for cell in book["cells"] if "](targets/" in cell["source"]]
        attached = [cell for cell in book["cells"] if "attachments" in cell]
        targets = list((render.HERE / "student/targets").glob(f"{path.stem[:2]}-*.png"))
        assert not linked and len(attached) == len(targets)


# --- in a browser ---------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def serve():
    """serve(folder) -> the address of a server of its files."""
    servers = []

    def start(folder):
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory, serve):
    """The address of a site of two modules, built anew; its folder is site.folder."""
    out = tmp_path_factory.mktemp("built") / "site"
    try:
        vendor.fetch("mathjax")
    except RuntimeError as error:
        pytest.skip(str(error))
    numbers = [path.stem[:2] for path in PATHS]
    assert build.main(["--no-lite", "--out", str(out), *numbers]) == 0
    address = Address(serve(out))
    address.folder = out
    return address


class Address(str):
    """An address that knows its folder."""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page that keeps its errors in page.faults, and the requests that it was refused."""
    context = chromium.new_context(viewport={"width": 1300, "height": 900})
    context.set_default_timeout(SECONDS * 1000)
    page = context.new_page()
    page.faults = []

    def refuse(route):
        page.faults.append(f"asks for {route.request.url}")
        route.abort()

    context.route(lambda url: not LOCAL.match(url), refuse)
    page.on("console", lambda m: m.type == "error" and page.faults.append(m.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("response", lambda r: r.status >= 400 and page.faults.append(f"{r.status} {r.url}"))
    yield page
    context.close()


NAMES = ["index", "browser", *build.PAGES.values(), "benchmarks", "api/index",
         "api/miniflamingo.xattn", "api/miniflamingo.kernels.image_causal_attention",
         *(f"course/{path.stem}" for path in PATHS)]  # fmt: skip
HEADINGS = (
    "[...document.querySelectorAll('article :is(h1,h2,h3,h4,h5,h6)')].map(h => +h.tagName[1])"
)
IMAGES = "[...document.images].map(i => [i.naturalWidth, i.alt])"
# contrast of text and background, by WCAG 2; transparent backgrounds are looked through
CONTRAST = """selector => {
  const light = c => { const [r, g, b] = c.map(x => x / 255).map(
    x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3) } return [255, 255, 255] };
  return [...document.querySelectorAll(selector)].map(e => {
    const two = [parse(getComputedStyle(e).color).slice(0, 3), behind(e)].map(light).sort();
    return (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05) }) }"""


@in_a_browser
@pytest.mark.parametrize("name", NAMES)
def test_a_page_loads_and_asks_nothing_of_other_hosts(site, page, name):
    page.goto(f"{site}/{name}.html", wait_until="networkidle")
    assert page.faults == []
    levels = page.evaluate(HEADINGS)
    assert levels[0] == 1 == levels.count(1)
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("nav a, .sidebar-tree a").count() > len(PATHS)
    # the first paragraph says what the page is
    said = page.locator("article section > p").first.inner_text()
    assert len(said) > 30 and not said.startswith("Run it")


WIDE = """() => [document.documentElement.scrollWidth, [...document.querySelectorAll('article *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && ![...function*() {
    for (let q = e.parentElement; q && q.tagName != 'BODY'; q = q.parentElement) yield q }()].some(
    q => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(q).overflowX)
      && q.getBoundingClientRect().right <= innerWidth + 1))
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))]"""


@in_a_browser
@pytest.mark.parametrize("name", NAMES)
def test_on_a_phone_nothing_scrolls_sideways(site, page, name):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"{site}/{name}.html", wait_until="networkidle")
    assert page.evaluate(WIDE) == [360, []]


@in_a_browser
def test_every_link_between_pages_leads_somewhere(site):
    files = [f for f in site.folder.rglob("*.html") if "_modules" not in f.parts]  # Sphinx's own
    pages = {path: path.read_text("utf-8") for path in files}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    found = 0
    for path, text in pages.items():
        article = text.split("<article", 1)[-1].split("</article>")[0]
        for target in re.findall(r'<a\b[^>]*?href="([^"]+)"', article):
            name, _, anchor = html.unescape(target).partition("#")
            if re.match(r"[a-z]+:", name):
                continue
            to = (path.parent / unquote(name)).resolve() if name else path
            assert to.exists(), f"{path.name}: {target}"
            assert not anchor or to not in ids or unquote(anchor) in ids[to], (path.name, target)
            found += 1
    assert found > 200


@in_a_browser
def test_the_first_page_has_one_button_and_figures_lie_on_a_dimmed_card(site, page):
    page.emulate_media(color_scheme="dark")
    page.goto(f"{site}/index.html", wait_until="networkidle")
    button = page.locator("a.start")
    assert button.count() == 1 and button.inner_text() == "Start with module 00"
    assert button.bounding_box()["y"] < 500 and min(page.evaluate(CONTRAST, "a.start")) >= 4.5
    style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).filter]"
    colour, dimmed = page.locator("article img").first.evaluate(style)
    assert colour == "rgb(255, 255, 255)" and "brightness(0.8)" in dimmed
    page.emulate_media(color_scheme="light")
    assert page.locator("article img").first.evaluate(style)[1] == "none"


@in_a_browser
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem[:2])
def test_figures_are_seen_and_mathematics_is_drawn(site, page, path):
    page.goto(f"{site}/course/{path.stem}.html", wait_until="networkidle")
    page.wait_for_selector("mjx-container svg")
    figures = page.evaluate(IMAGES)
    assert figures and all(width > 0 and len(alt) > 40 for width, alt in figures)
    assert page.locator("mjx-container").count() == page.locator("article .math").count()
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert page.locator("article details").count() > 3 and page.faults == []


@in_a_browser
def test_the_search_finds_the_resampler(site, page):
    page.goto(site, wait_until="networkidle")
    page.fill(".sidebar-search", "resampler")
    page.press(".sidebar-search", "Enter")
    page.wait_for_selector("#search-results li a")
    links = page.locator("#search-results li a").evaluate_all("all => all.map(a => a.href)")
    assert any("api/miniflamingo.perceiver" in link for link in links) and page.faults == []


READ = {
    f"course/{PATHS[0].stem}": ("article p", ".highlight span", "summary", ".cell_output pre"),
    "teaching": ("article a.reference", "article td", ".sidebar-tree a", "article code"),
    "api/miniflamingo.xattn": (".sig", ".sig span", "dd p", "pre"),
}


@in_a_browser
@pytest.mark.parametrize("name", READ)
def test_both_themes_can_be_read(site, page, name):
    page.goto(f"{site}/{name}.html", wait_until="networkidle")
    colours = {}
    for _ in range(3):  # automatic, light, dark, in the theme's order
        theme = page.evaluate("document.body.dataset.theme")
        colours[theme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for what in READ[name]:
            ratios = page.evaluate(CONTRAST, what)
            assert ratios and min(ratios) >= 4.5, (theme, what, min(ratios, default=None))
        page.locator(".theme-toggle:visible").first.click()
    assert len(colours) == 3 and colours["light"] != colours["dark"]


# before its kernel answers, JupyterLab runs no cell
READY = """() => { const kernel = jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel;
  return kernel?.connectionStatus === 'connected' && kernel.status === 'idle' }"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a student's notebook that was never run, and its folder."""
    folder, port = tmp_path / "student", free_port()
    shutil.copytree(render.HERE / "student" / "targets", folder / "targets")
    notebook = nbformat.read(render.HERE / "student" / f"{PATHS[0].stem}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / f"{PATHS[0].stem}.ipynb")
    options = {"ServerApp.root_dir": folder, "ServerApp.port": port, "IdentityProvider.token": "",
               "LabApp.extension_manager": "readonly", "LabApp.expose_app_in_browser": True,
               "ServerApp.disable_check_xsrf": True}  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               *(f"--{name}={value}" for name, value in options.items())]  # fmt: skip
    environment = {**os.environ, **render.ENVIRONMENT, "JUPYTER_CONFIG_DIR": str(tmp_path / "c"),
                   "JUPYTER_DATA_DIR": str(tmp_path / "d")}  # fmt: skip
    log = (tmp_path / "log").open("w", encoding="utf-8")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    for _ in range(SECONDS):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0 or process.poll() is not None:
                break
        time.sleep(1)
    assert process.poll() is None, (tmp_path / "log").read_text("utf-8")[-2000:]
    yield f"http://127.0.0.1:{port}", folder
    process.terminate()
    process.wait(30)


@in_a_browser
def test_run_all_goes_from_the_first_cell_to_the_last_with_nothing_done(lab, page):
    (url, folder), name = lab, f"{PATHS[0].stem}.ipynb"
    page.goto(f"{url}/lab/tree/{name}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function(READY)
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
    code = [c for c in nbformat.read(folder / name, 4).cells if c.cell_type == "code"]
    for _ in range(SECONDS):
        shown = page.evaluate("window.jupyterapp.shell.currentWidget.content.model.toJSON()")
        cells = [c for c in nbformat.from_dict(shown).cells if c.cell_type == "code"]
        if cells[-1].execution_count == len(code):
            break
        page.wait_for_timeout(1000)
    assert [cell.execution_count for cell in cells] == list(range(1, len(code) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    said = "".join(o.data.get("text/plain", "") for o in outputs if "data" in o)
    assert said.count("not done yet") >= 3


# --- JupyterLite ----------------------------------------------------------------------------------


@in_a_browser
@pytest.mark.skipif(not os.environ.get("MINIFLAMINGO_LITE"), reason="MINIFLAMINGO_LITE is not set")
def test_jupyterlite_opens_computes_and_finds_the_library(page, serve, tmp_path):
    lite.build(tmp_path / "lite", PATHS)
    page.goto(f"{serve(tmp_path / 'lite')}/lab/index.html?path={PATHS[0].stem}.ipynb")
    cell = page.locator(".jp-Notebook .jp-CodeCell").first
    found = "import piplite; await piplite.install('miniflamingo', deps=False)"
    found += "; import importlib.metadata as m; print('version', m.version('miniflamingo'))"
    for code, expected in (("print(6 * 7)", "42"), (found, "version 0.1.0")):
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(code)
        page.keyboard.press("Control+Enter")
        cell.locator(".jp-OutputArea-output", has_text=expected).wait_for()
