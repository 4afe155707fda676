"""The course. `source/` holds the modules, `student/` and `teacher/` their two renderings.

A notebook starts with `from miniflamingo.course import check, guess, show, source, told`: no set-up
code.
"""

from miniflamingo import command, rooms

command.starting()

if __name__ == "notebooks":  # seen from the repository's root, where it is no package of ours
    rooms.give_way(__name__)
else:
    from .checks import check
    from .display import show, source
    from .guesses import guess, told

__all__ = ["check", "guess", "show", "source", "told"]
