"""The project's own files agree: requirements, package metadata, README, the walls of the rooms."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from miniflamingo.rooms import FOLDERS, path_of
from tests.pages import PAGES, text_of

ROOT = Path(__file__).parent.parent
SITE = "notebooks/site/requirements.txt"
ROOMS = sorted((ROOT / "miniflamingo").rglob("*.py"))


def requirements(file="requirements.txt"):
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def name_of(requirement):
    return re.match(r"[\w-]+", requirement).group().lower()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_package_asks_for_what_the_requirements_name():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    # the site's packages have a file of their own, so that `make test` need not install them
    assert sorted(optional.pop("site")) == sorted(requirements(SITE))
    optional = optional.items()
    declared = project["dependencies"] + [line for _, extra in optional for line in extra]
    assert sorted(line.replace("'", '"') for line in declared) == sorted(requirements())


def test_every_requirement_has_a_range_and_a_reason():
    page = text_of("miniflamingo/INSTALL.md")
    for requirement in requirements() + requirements(SITE):
        assert re.search(r"==|>=.*,<", requirement), f"{requirement} has no tested range"
        row = rf"^\| {name_of(requirement)} \|.*\w.*\|$"
        assert re.search(row, page, re.M | re.I), f"INSTALL.md gives no reason for {requirement}"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_reference_needs_neither_torch_nor_the_kernels(room):
    assert not {"torch", "triton"} & set(imports(room))


@pytest.fixture(scope="module")
def packed():
    """The paths of what a wheel holds, as setuptools lists them, under their names in it."""
    if not find_spec("setuptools") or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("the setuptools that builds the wheel is not installed")
    code = """
from setuptools import Distribution
distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files(["pyproject.toml"])
build = distribution.get_command_obj("build_py")
build.build_lib = "."
build.ensure_finalized()
print(*build.get_outputs(include_bytecode=False), sep="\\n")
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return {Path(line).as_posix() for line in done.stdout.splitlines()}


def test_the_wheel_has_every_room_of_the_library(packed):
    """A new folder below miniflamingo/ or kernels/ must be named in pyproject.toml."""
    inside = {path_of(name.removesuffix(".py").replace("/", ".")) for name in packed
              if name.endswith(".py")}  # fmt: skip
    for folder in ("miniflamingo", "kernels", "notebooks/checks"):
        files = {
            p.relative_to(ROOT).with_suffix("").as_posix() for p in (ROOT / folder).rglob("*.py")
        }
        assert files and files <= inside, sorted(files - inside)


def test_the_wheel_has_what_runs_and_nothing_of_a_teachers(packed):
    data = {name for name in packed if not name.endswith(".py")}
    assert {"miniflamingo/weights/flamingo/model.safetensors", "miniflamingo/worlds/digits.npz",
            "miniflamingo/worlds/glyphs.npz",
            "miniflamingo/real/weights/model.safetensors", "miniflamingo/real/weights/card.md",
            "miniflamingo/kernels/results/compiled.json",
            "miniflamingo/ablations/results.json",
            "miniflamingo/course/data/others_faults.json"} <= data  # fmt: skip
    assert not [name for name in packed if re.search("teacher|student|source/|site/|ipynb", name)]
    assert all(name.startswith("miniflamingo/") for name in packed)  # no name of others
    assert sum((ROOT / _in_repository(name)).stat().st_size for name in packed) < 15e6


def _in_repository(name):
    for package, folder in FOLDERS.items():
        name = re.sub(f"^{package.replace('.', '/')}/", f"{folder}/", name)
    return name


def test_the_source_archive_is_told_of_every_folder():
    manifest = (ROOT / "MANIFEST.in").read_text("utf-8")
    hidden = {p.name for p in ROOT.iterdir() if p.name.startswith(".")}
    made = {"out", "runs", "build", "dist", "miniflamingo.egg-info"}
    always = {"pyproject.toml", "MANIFEST.in", "PKG-INFO", "setup.cfg"}
    for name in {p.name for p in ROOT.iterdir()} - hidden - made - always:
        assert name in manifest, f"MANIFEST.in leaves out {name}"


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name):
    for path in re.findall(r"\]\(([\w./-]+)\)", text_of(name)):
        found = (PAGES[name].parent / path).resolve()
        assert found.exists(), f"{name} links to {path}, which does not exist"
        assert found.is_relative_to(ROOT), f"{name} links to {path}, which is not of the project"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for target in re.findall(r"(?:`|^    )make ([\w-]+)", text_of(name), re.M):
        assert target in targets, f"{name} names `make {target}`, which does not exist"


def test_make_clean_removes_what_make_has_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("out", "runs", ".venv", "build"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine").write_text("mine", "utf-8")
    for _ in range(2):
        subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
        assert all((tmp_path / f / "mine").exists() for f in ("out", "runs", "build"))
        if (tmp_path / ".venv" / "mine").exists():
            (tmp_path / ".venv" / "install.log").touch()
    assert not (tmp_path / ".venv").exists()


def test_the_pages_python_runs(capsys):
    blocks = [code for name in PAGES for code in
              re.findall(r"```python\n(.*?)```", text_of(name), re.S)]  # fmt: skip
    for code in blocks:
        # what a block imports; torch's blocks use the kernels
        needed = {"torch": "triton", "transformers": "transformers"}
        used = [
            package for name, package in needed.items() if re.search(rf"(import|from) {name}", code)
        ]
        if all(map(find_spec, used)):
            exec(code, {})
    assert len(blocks) == 3 and "[[0 1 1 1 2 2 2 2]]" in capsys.readouterr().out


def leaves_its_encoding_to_the_locale(call):
    """Whether a call reads or writes text in whatever encoding the user's locale names."""
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    given = {keyword.arg for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    path = ast.unparse(getattr(call.func, "value", call.func))
    if name == "open" and path not in ("Image", "tarfile", "av", "os"):
        modes = call.args[path == "open" :][:1]
        return not modes or "b" not in ast.literal_eval(modes[0])
    return name != "examples" and bool({"text", "universal_newlines"} & given)


@pytest.mark.parametrize(
    "code, found",
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text('a')", True),
        ("path.write_text('a', encoding='utf-8')", False),
        ("open(path, 'a')", True),
        ("open(path, 'rb')", False),
        ("path.open()", True),
        ("path.open('wb')", False),
        ("Image.open(path)", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
    ],
)
def test_what_leaves_its_encoding_to_the_locale(code, found):
    assert leaves_its_encoding_to_the_locale(ast.parse(code, mode="eval").body) is found


def test_texts_are_utf_8_whatever_the_locale():
    """The course's cells read the project's own JSON, which is ASCII, and stay as short as that."""
    for room in ("miniflamingo", "kernels", "notebooks", "tests"):
        for path in (p for p in (ROOT / room).rglob("*.py") if p.parent.name != "source"):
            calls = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Call)]
            lines = [call.lineno for call in calls if leaves_its_encoding_to_the_locale(call)]
            assert not lines, f"{path.relative_to(ROOT)}, lines {lines}: no encoding is named"


def test_data_that_cells_read_without_an_encoding_are_ascii():
    for path in ROOT.rglob("notebooks/data/*.json"), ROOT.rglob("*/weights/**/*.json"):
        assert all(file.read_bytes().isascii() for file in path)
