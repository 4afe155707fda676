"""The house's own rules: which way imports run, and that no formula goes without a test."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import miniflamingo
from miniflamingo.rooms import FOLDERS

ROOT = Path(miniflamingo.__file__).parent
FLOORS = [
    "module", "functional", "dialects", "rotary", "attention", "perceiver", "xattn", "vision",
    "efficientnet", "vit", "tiled_vit", "eyes", "language",
]  # fmt: skip


def rooms():
    """The names of all modules below miniflamingo, `worlds.shapes` for one in a folder."""
    found = pkgutil.walk_packages([str(ROOT)], "miniflamingo.")
    return [info.name.removeprefix("miniflamingo.") for info in found]


def formulas(room):
    """The differentiable formulas that a room defines."""
    if room.split(".")[-1] == "__main__":
        return []
    module = importlib.import_module(f"miniflamingo.{room}")
    own = [f for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__]
    functions = [f for f in own if not isinstance(f, type)]
    return [f for f in functions if callable(getattr(f, "gradient", None))]


def imports(path):
    """The full names of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_formulas_in_every_room_of_mathematics():
    for room in ("functional", "attention", "xattn", "vision"):
        assert formulas(room), room


@pytest.mark.parametrize("room", [room for room in rooms() if formulas(room)])
def test_every_formula_has_a_gradient_and_a_case(room):
    tests = importlib.import_module("tests.test_" + room.replace(".", "_"))
    tested = {case.formula for case in tests.CASES}
    untested = [f.__name__ for f in formulas(room) if f not in tested]
    assert not untested, f"no Case in {tests.__name__}.CASES for {untested}"
    assert all(hasattr(f, "backward") for f in formulas(room))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_numpy_only(path):
    for name in imports(path):
        assert name.split(".")[0] not in ("torch", "triton"), name
        assert not name.startswith(tuple(FOLDERS)), name


KERNELS = ROOT.parent / "kernels"
# room of kernels/ (".": the kernels themselves) -> the rooms above it, which it must not import
ABOVE = {"common": ("model", "tools"), ".": ("model", "tools"), "model": ("tools",)}


def own_imports(path):
    """What a file of kernels/ imports of kernels/, below it: "common.runtime.launch", ..."""
    above = path.relative_to(KERNELS).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            kept = above[: len(above) + 1 - node.level]
            module = [*kept, *filter(None, [node.module])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


@pytest.mark.parametrize("room", ABOVE)
def test_the_kernels_floors_are_one_above_the_other(room):
    files = [f for f in sorted((KERNELS / room).glob("*.py")) if f.name != "commands.py"]
    found = [(path.name, name) for path in files for name in own_imports(path)]
    assert found, room
    assert not [pair for pair in found if pair[1].split(".")[0] in ABOVE[room]]


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_each_other_by_relative_names(path):
    """And nothing of the course: a copy under another name, such as a test's, stays whole."""
    assert not [name for name in imports(path) if name.startswith(tuple(FOLDERS))]


@pytest.mark.parametrize("floor, room", list(enumerate(FLOORS)), ids=FLOORS)
def test_arrows_run_one_way(floor, room):
    upstairs = {
        "flamingo",
        "interop",
        "pictures",
        "prompt",
        "decoding",
        "checkpoints",
        "runs",
        "training",
    }
    above = {*upstairs, "evaluation", "outputs", "cards", "demo", *FLOORS[floor + 1 :]}
    for name in imports(ROOT / f"{room}.py"):
        package, _, rest = name.partition(".")
        assert package != "miniflamingo" or rest.split(".")[0] not in above, name
