"""Scripts that the pages and slides need, from npm, once, at build time.

Each package has a pinned version and the checksum that npm must find; `npm` runs no script of it.
They are kept in out/vendor, so that a second build needs no network.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from miniflamingo.command import Failed

CACHE = Path(__file__).resolve().parents[2] / "out" / "vendor"
PACKAGES = {  # name: version, sha512 of its archive
    "mathjax": (
        "3.2.2",
        "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
    ),
    "reveal.js": (
        "5.2.1",
        "r7//6mIM5p34hFiDMvYfXgyjXqGRta+/psd9YtytsgRlrpRzFv4RbH76TXd2qD+7ZPZEbpBDhdRhJaFgfQ7zNQ==",
    ),
    "pyodide": (
        "314.0.7",
        "0YvXxEhfEdpLfb/XkM2BFAeMROq0iMUX2bzzH9pOttyMcWkwq+HbE5uyuGD82LN7y2q+SNvi/6V5JEsOlD2R1A==",
    ),
}


def fetch(name, cache=CACHE):
    """The folder that a package was unpacked to. Failed when it is not to be had, or is another.

    A download is not trusted: one with another checksum is deleted, and an archive that was there
    before is refused.
    """
    version, checksum = PACKAGES[name]
    archive = cache / f"{name}-{version}.tgz"
    if is_new := not archive.exists():
        _download(name, version, archive)
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != checksum:
        if is_new:
            archive.unlink()
        raise Failed(f"{archive}: sha512 {checksum} is expected, got {found}")
    folder = cache / f"{name}-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as new, tarfile.open(archive) as file:
            file.extractall(f"{new}/whole", filter="data")
            os.rename(f"{new}/whole", folder)
    return folder / "package"


def _download(name, version, archive):
    npm = shutil.which("npm")
    if not npm:
        raise Failed(f"npm, which comes with Node.js, is needed once, to get {name}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", f"{name}@{version}"]
    done = subprocess.run(command, cwd=archive.parent, capture_output=True, encoding="utf-8")
    if done.returncode or not archive.exists():
        raise Failed(f"npm cannot get {name} {version}: {done.stderr.strip()[-500:]}")


def copy_mathjax(folder):
    """Copy MathJax, one file that draws SVG and needs no fonts, to folder/mathjax.js."""
    folder.mkdir(parents=True, exist_ok=True)
    package = fetch("mathjax")
    shutil.copy(package / "es5" / "tex-svg-full.js", folder / "mathjax.js")
    shutil.copy(package / "LICENSE", folder / "mathjax.LICENSE")


def copy_reveal(folder):
    """Copy what slides need of reveal.js to folder/reveal/."""
    package = fetch("reveal.js")
    for name in ("dist", "plugin/notes"):
        shutil.copytree(package / name, folder / "reveal" / name, dirs_exist_ok=True)
    shutil.copy(package / "LICENSE", folder / "reveal")
