"""Scripts that the pages and slides need, from npm, once, at build time.

Each package has a pinned version and the checksum that npm must find; `npm` runs no script of it.
They are kept in out/vendor, so that a second build needs no network.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

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
    """The folder that a package was unpacked to. RuntimeError when it is not to be had, or other.

    A download is not trusted: an archive with another checksum is deleted.
    """
    version, checksum = PACKAGES[name]
    archive = cache / f"{name}-{version}.tgz"
    if not archive.exists():
        _download(name, version, archive)
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != checksum:
        archive.unlink()
        raise RuntimeError(f"{name} {version}: sha512 {checksum} is expected, got {found}")
    folder = cache / f"{name}-{version}"
    if not folder.exists():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder / "package"


def _download(name, version, archive):
    npm = shutil.which("npm")
    if not npm:
        raise RuntimeError(f"npm, which comes with Node.js, is needed once, to get {name}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", f"{name}@{version}"]
    done = subprocess.run(command, cwd=archive.parent, capture_output=True, encoding="utf-8")
    if done.returncode or not archive.exists():
        raise RuntimeError(f"npm cannot get {name} {version}: {done.stderr.strip()[-500:]}")


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
