"""Where two packages are: `miniflamingo.kernels` is kernels/, `miniflamingo.course` notebooks/.

A wheel has them inside `miniflamingo`, where Python looks. In a checkout, or a copy of one, they
lie beside it; there `Beside` finds them, so that it imports its own, whatever is installed.

As top-level names, `kernels` and `notebooks` belong to other packages, whatever folder Python is
started in: see `give_way`.
"""

import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = {"miniflamingo.kernels": "kernels", "miniflamingo.course": "notebooks"}


class Beside:
    """A finder of packages, for sys.meta_path: those of FOLDERS that lie beside miniflamingo/."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Where the package of this name is, or None: others know."""
        if name in FOLDERS and not (HERE / name.rpartition(".")[2]).exists():
            return spec_from_file_location(name, HERE.parent / FOLDERS[name] / "__init__.py")
        return None


def path_of(module):
    """The file of one of this project's modules in the repository, such as kernels/model/layers.py;
    without its end, "kernels/model/layers"."""
    for package, folder in FOLDERS.items():
        if f"{module}.".startswith(f"{package}."):
            module = folder + module.removeprefix(package)
    return module.replace(".", "/")


def name_of(path):
    """The module of a path in the repository, without its end: what `path_of` is given."""
    first, *rest = str(path).split("/")
    names = {folder: package for package, folder in FOLDERS.items()}
    return ".".join([names.get(first, first), *rest])


def give_way(name):
    """Called by a folder of FOLDERS that Python, started in the repository's root, has found as the
    top-level package `name`: import the package that the name belongs to, in its place.

    Where there is none, leave an empty module. Without a file, and of version 0, it is what
    libraries that look for the other package take for its absence.
    """
    # the caller's folder, which may be that of another checkout on the path
    seen, folder = sys.path[:], Path(sys.modules[name].__file__).resolve().parent
    sys.path[:] = [entry for entry in seen if Path(entry, name).resolve() != folder]
    del sys.modules[name]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        sys.modules[name] = _placeholder(name)
    finally:
        sys.path[:] = seen


def _placeholder(name):
    module = types.ModuleType(name)
    module.__spec__, module.__version__ = ModuleSpec(name, None), "0"

    def __getattr__(wanted):
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        raise ImportError(f"the folder {name}/ of miniflamingo is imported as {name_of(name)}")

    module.__getattr__ = __getattr__
    return module
