"""The course. `source/` holds the modules, `student/` and `teacher/` their two renderings.

A notebook starts with `from notebooks import check, show, source` and holds no set-up code.
"""

from miniflamingo import command

command.starting()

from notebooks.checks import check
from notebooks.display import show, source

__all__ = ["check", "show", "source"]
