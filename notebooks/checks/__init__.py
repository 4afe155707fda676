"""What a student calls: `check("7.2", my_function)` says in one line what is wrong, or nothing is.

A check runs the answer on small cases against the library. It never raises: it returns a Result. A
mistake that many make is told apart from others by what it computes, and is called by its name.
The tests give every check typical wrong answers and expect that name.
"""

import importlib
import pkgutil

from . import untouched
from .core import EXERCISES, Result, check

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)  # module_NN registers its exercises
untouched.remember(EXERCISES)

__all__ = ["Result", "check"]
