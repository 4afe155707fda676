"""A checkout imports its own kernels/ and notebooks/; their names are left to other packages."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from miniflamingo import rooms
from tests.processes import ODD, ROOT

BOTH = sorted(rooms.FOLDERS.values())
THEIRS = """__version__ = "9.9"
from .layer import get_kernel
"""


def run_python(code, folder, *paths):
    """What a program prints that is started in `folder`, a line each; paths are searched, too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return os.fsdecode(done.stdout).splitlines()


@pytest.fixture
def others(tmp_path):
    """A folder with other projects' packages `kernels` and `notebooks`."""
    for name in BOTH:
        folder = tmp_path / "others" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(THEIRS, "utf-8")
        (folder / "layer.py").write_text("def get_kernel(): return 'theirs'\n", "utf-8")
    return tmp_path / "others"


# --- the names of others --------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("where", ["root", "elsewhere", "root, theirs ahead"])
def test_neither_breaks_the_other(name, first, where, others, tmp_path):
    ours, theirs = f"import {rooms.name_of(name)} as ours", f"from {name}.layer import get_kernel"
    lines = [ours, theirs] if first == "ours" else [theirs, ours]
    lines += [f"import {name}, sys", f"print({name}.__version__, {name}.get_kernel())"]
    lines += ["print(ours.__file__)", "print(sys.path.count(''))"]
    paths = [others, ROOT] if where.endswith("ahead") else [ROOT, others]
    folder = tmp_path if where == "elsewhere" else ROOT
    said, file, entries = run_python("\n".join(lines), folder, *paths)
    assert said == "9.9 theirs" and file == str(ROOT / name / "__init__.py") and entries == "1"


def installed_elsewhere(name):
    """Whether another project's package of this name is installed here."""
    code = f"import importlib.util as u; print(u.find_spec({name!r}) is not None)"
    return run_python(code, "/") == ["True"]


@pytest.mark.parametrize("name", BOTH)
def test_where_theirs_is_missing_it_looks_missing_in_the_root_too(name):
    if installed_elsewhere(name):
        pytest.skip(f"another project's {name} is installed")
    code = f"""
import {name}, importlib.util, {rooms.name_of(name)} as ours
print({name}.__version__, getattr({name}, "__file__", None), importlib.util.find_spec("{name}"))
try:
    from {name} import layers
except ImportError as error:
    print(error)
print(ours.__name__)
"""
    about, error, ours = run_python(code, ROOT)
    assert about == f"0 None ModuleSpec(name='{name}', loader=None)"
    assert error == f"the folder {name}/ of miniflamingo is imported as {rooms.name_of(name)}"
    assert ours == rooms.name_of(name)


def test_an_error_inside_theirs_is_shown(others):
    (others / "kernels" / "layer.py").write_text("import nowhere_at_all\n", "utf-8")
    code = "try:\n    import kernels\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run_python(code, ROOT, others) == ["nowhere_at_all"]


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_transformers_sees_theirs_if_it_is_installed(where, tmp_path):
    """It looks for the package, for its version, and imports it where there is no version."""
    if not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed")
    code = "import miniflamingo.kernels\nfrom transformers.utils import import_utils as u\n"
    code += "print(u.is_kernels_available())"
    found = run_python(code, ROOT if where == "root" else tmp_path, ROOT)
    assert found == run_python(code.split("\n", 1)[1], "/")


# --- whose packages are imported ------------------------------------------------------------------


def test_a_copy_imports_its_own(tmp_path):
    """Also where another checkout is installed, as it is where these tests run."""
    ignore = shutil.ignore_patterns("weights", "__pycache__", "student", "teacher", "results")
    for name in ("miniflamingo", *BOTH):
        shutil.copytree(ROOT / name, tmp_path / ODD / name, ignore=ignore)
    names = ["miniflamingo", "miniflamingo.kernels.commands", "miniflamingo.course.timings"]
    if not importlib.util.find_spec("jupytext"):
        names.pop()
    code = f"import {', '.join(names)}, sys\nfor name in {names}: print(sys.modules[name].__file__)"
    for file in run_python(code, "/", tmp_path / ODD):
        assert Path(file).is_relative_to(tmp_path / ODD), file


def test_what_is_installed_inside_the_package_is_taken_there(tmp_path, monkeypatch):
    """As a wheel's: a package called `kernels` beside it is somebody else's."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "miniflamingo" / "kernels").mkdir(parents=True)
    monkeypatch.setattr(rooms, "HERE", tmp_path / "miniflamingo")
    assert rooms.Beside.find_spec("miniflamingo.kernels") is None
    assert rooms.Beside.find_spec("kernels") is rooms.Beside.find_spec("miniflamingo.x") is None


@pytest.mark.parametrize(
    "module, path",
    [
        ("miniflamingo.kernels.model.layers", "kernels/model/layers"),
        ("miniflamingo.course", "notebooks"),
        ("miniflamingo.worlds.shapes", "miniflamingo/worlds/shapes"),
        ("miniflamingo.kernelsmith", "miniflamingo/kernelsmith"),
    ],
)
def test_names_and_paths(module, path):
    assert rooms.path_of(module) == path and rooms.name_of(path) == module


@pytest.mark.parametrize("name", BOTH)
def test_another_checkout_on_the_path_gives_way_too(name, others, tmp_path):
    """Its folder of the same name is no more the other project's package than our own is."""
    second = tmp_path / "checkout" / name
    second.mkdir(parents=True)
    shutil.copy(ROOT / name / "__init__.py", second)
    code = f"import miniflamingo, {name}; print({name}.get_kernel())"
    assert run_python(code, ROOT, ROOT, second.parent, others) == ["theirs"]
    if not installed_elsewhere(name):
        code = f"import miniflamingo, {name}; print({name}.__version__)"
        assert run_python(code, ROOT, ROOT, second.parent) == ["0"]
