"""JupyterLite: the students' notebooks 01 to 10 in a JupyterLab that runs in the reader's browser.

Python there is Pyodide. Its core comes from its npm package; pure Python packages and the project's
own wheel (made from the student's release: no solution in it) are copied beside it. What the
package index did not offer at build time, compiled packages as a rule, is left to Pyodide's own
host: the reader's browser fetches it when a notebook is run there, never while pages are read. With

    MINIFLAMINGO_PYODIDE=FOLDER python -m miniflamingo.course.site.build

a whole Pyodide distribution, unpacked, is copied instead, and nothing is fetched from elsewhere.
"""

import base64
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from miniflamingo.command import Failed

from .. import release, render
from . import vendor

LAST = 10  # modules 11 and later want more memory, torch or Triton
ROOTS = ("ipython", "micropip", "jedi", "numpy", "matplotlib", "pillow", "safetensors", "tqdm",
         "threadpoolctl", "pyodide-http")  # fmt: skip
EXTRA = ("comm",)  # asked for by the kernel, and not in Pyodide's list
PLATFORM = ["--platform", "pyemscripten_2026_0_wasm32", "--python-version", "3.14",
            "--implementation", "cp", "--abi", "cp314", "--abi", "abi3"]  # fmt: skip
CDN = "https://cdn.jsdelivr.net/pyodide/v{}/full/"
INSTALL = "# in the browser alone: the library, from this site\n%pip install -q miniflamingo"
PAGE = """# In the browser

A JupyterLab in the page, with Python compiled to WebAssembly: nothing to install, nothing leaves
the browser, and what is written stays in its storage. The first run of a notebook takes a while.

{start}

- **Served from this site:** JupyterLab, Pyodide's core, the library, {served}.
- **Fetched by your browser from Pyodide's host, {host}, when a notebook runs:** {fetched}.

**Not tested:** whether the notebooks run there from first to last cell, and how long they take.
Tested is that JupyterLab opens, that its Python starts and computes, and that the library's package
is found. Modules 11 and later are left out: torch and Triton do not exist there.
"""


def chosen(paths):
    """The modules that go into the browser: 01 to 10."""
    return [path for path in paths if 1 <= int(path.stem.split("_")[0]) <= LAST]


def build(out, paths, cache=vendor.CACHE):
    """Build JupyterLite into `out`. Failed when its command fails."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        write_contents(stage / "files", chosen(paths))
        write_pyodide(stage / "static" / "pyodide", cache)
        wheels = [make_wheel(stage)] + [f for name in EXTRA if (f := _wheel(name, cache))]
        settings = {"LiteBuildConfig": {
                        "contents": ["files"], "apps": ["lab"], "output_dir": str(out.resolve()),
                        "no_sourcemaps": True, "ignore_sys_prefix": False},
                    "PipliteAddon": {"piplite_urls": [str(wheel) for wheel in wheels]}}  # fmt: skip
        (stage / "jupyter_lite_config.json").write_text(json.dumps(settings), "utf-8")
        command = [sys.executable, "-m", "jupyterlite_core", "build", "--lite-dir", "."]
        done = subprocess.run(command, cwd=stage, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise Failed(f"jupyter lite build fails:\n{(done.stdout + done.stderr)[-3000:]}")


def write_contents(folder, paths):
    """The students' notebooks: a first cell installs the library, and pictures are inside."""
    folder.mkdir(parents=True)
    for path in paths:
        notebook = nbformat.read(render.HERE / "student" / f"{path.stem}.ipynb", as_version=4)
        for cell in notebook.cells:
            if "target" in render.tags(cell):
                _attach(cell)
        notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL, id="install"))
        text = nbformat.writes(notebook, split_lines=False)  # JupyterLite reads whole strings
        (folder / f"{path.stem}.ipynb").write_text(text, encoding="utf-8")


def _attach(cell):
    """Put the picture that a cell links to into the notebook."""
    name = re.search(r"\((targets/[^)]+)\)", cell.source)[1]
    png = base64.b64encode((render.HERE / "student" / name).read_bytes()).decode()
    cell.source = cell.source.replace(f"({name})", "(attachment:target.png)")
    cell["attachments"] = {"target.png": {"image/png": png}}


def make_wheel(stage):
    """The project as a pure Python wheel, from the release: no solution in it. -> its path."""
    release.write_release(stage / "release")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(stage), "."]
    done = subprocess.run(command, cwd=stage / "release", capture_output=True, encoding="utf-8")
    wheels = list(stage.glob("miniflamingo-*.whl"))
    if done.returncode or len(wheels) != 1:
        raise Failed(f"no wheel could be made: {done.stderr[-1000:]}")
    return wheels[0]


# --- Pyodide ------------------------------------------------------------------------------------


def write_pyodide(folder, cache=vendor.CACHE):
    """Copy Pyodide to `folder`, with what could be had of the packages; the rest by its host."""
    whole = os.environ.get("MINIFLAMINGO_PYODIDE")
    shutil.copytree(whole or vendor.fetch("pyodide"), folder)
    if whole:
        return
    lock_file = folder / "pyodide-lock.json"
    lock = json.loads(lock_file.read_text("utf-8"))
    host = CDN.format(vendor.PACKAGES["pyodide"][0])
    needed = closure(lock["packages"])
    for name, entry in lock["packages"].items():
        wheel = _wheel(f"{name}=={entry['version']}", cache) if name in needed else None
        if wheel:
            shutil.copy(wheel, folder)
            entry["sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
        entry["file_name"] = wheel.name if wheel else host + entry["file_name"]
    lock_file.write_text(json.dumps(lock), "utf-8")


def closure(packages, roots=ROOTS):
    """The names of the roots and of all that they depend on; packages as in pyodide-lock.json."""
    seen, todo = set(), list(roots)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in packages and name not in seen:
            seen.add(name)
            todo += packages[name]["depends"]
    return seen


@functools.cache
def _wheel(requirement, cache):
    """A wheel for Pyodide from the package index, kept in the cache; None where there is none."""
    folder = cache / "wheels" / requirement
    if not list(folder.glob("*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary",
                   ":all:", *PLATFORM, "-d", str(folder), requirement]  # fmt: skip
        subprocess.run(command, capture_output=True)
    return next(folder.glob("*.whl"), None)


# --- the page about it --------------------------------------------------------------------------


def page(paths, cache=vendor.CACHE):
    """The site's page on what runs in the browser; paths are the modules shown, none without it."""
    if not chosen(paths):
        return ("# In the browser\n\nNotebooks that run in a browser would be here; this site was "
                "built without JupyterLite.\n")  # fmt: skip
    packages = json.loads((vendor.fetch("pyodide") / "pyodide-lock.json").read_text("utf-8"))[
        "packages"
    ]
    whole = os.environ.get("MINIFLAMINGO_PYODIDE")
    had = {name: whole or _wheel(f"{name}=={packages[name]['version']}", cache)
           for name in sorted(closure(packages))}  # fmt: skip
    return PAGE.format(
        start="<a href='lite/lab/index.html'>Open the notebooks 01 to 10 in the browser</a>",
        host="cdn.jsdelivr.net",
        served=", ".join(name for name, where in had.items() if where),
        fetched=", ".join(name for name, where in had.items() if not where) or "nothing",
    )
