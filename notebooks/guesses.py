"""A reader's guesses: said before the run, compared behind it.

    guess("7.a", first=..., last=...)            a number, a word, or several, for the dots
    told("7.a", first=phi[0], last=phi[-1])      in the cell that runs: which were right

A guess stands in a cell of its own, so that it stays in the file, and whoever grades reads it. What
the cell that runs puts out is left out of the student's rendering: it comes with the run.
"""

import numbers
from dataclasses import dataclass

import numpy as np

GUESSES = {}  # number -> {name: what was guessed, ... for nothing yet}


@dataclass(frozen=True, repr=False)
class Lines:
    """What a notebook shows: a line for each guess; `right` of `asked` were right."""

    lines: tuple
    right: int = 0
    asked: int = 0

    def __repr__(self):
        return "\n".join(self.lines)


def guess(number, **expected):
    """Keep the guesses of a number; returns what a notebook shows. Never raises."""
    GUESSES[number] = expected
    missing = [name for name, value in expected.items() if _nothing(value)]
    if missing:
        return Lines(
            (f"○ guess {number}: write what you expect for {', '.join(missing)}, then run",)
        )
    kept = ", ".join(f"{name} {_shown(value)}" for name, value in expected.items())
    return Lines((f"guess {number}: {kept}",))


def told(number, within=0.1, **right):
    """Compare the guesses of a number with what came out; returns what a notebook shows.

    Whole numbers and words have to be the same, other numbers within this share of what is right,
    and several, a list or a set, the same whatever their order; one alone may stand without its
    list. Never raises.
    """
    expected, lines, hits = GUESSES.get(number, {}), [], 0
    for name, value in right.items():
        said = expected.get(name, ...)
        if _nothing(said):
            lines.append(f"○ {number} {name}: {_shown(value)} (no guess)")
        elif _agrees(said, value, within):
            hits += 1
            lines.append(f"✓ {number} {name}: {_shown(value)}")
        else:
            lines.append(f"✗ {number} {name}: {_shown(value)}, your guess was {_shown(said)}")
    return Lines(tuple(lines), hits, len(right))


def _nothing(value):
    return value is ... or value is None


def _plain(value):
    """NumPy's numbers and arrays as Python's; a word in lower case, without blanks around it."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return value.strip().casefold() if isinstance(value, str) else value


def _agrees(said, right, within):
    said, right = _plain(said), _plain(right)
    if isinstance(right, list | tuple | set | frozenset):
        if not isinstance(said, list | tuple | set | frozenset):
            said = [] if said == "none" else [said]  # one is meant, or none
        if len(said) != len(right):
            return False
        pairs = zip(sorted(map(_plain, said), key=str), sorted(map(_plain, right), key=str))
        return all(_agrees(a, b, within) for a, b in pairs)
    both = all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in (said, right))
    if both and not isinstance(right, numbers.Integral):
        return abs(said - right) <= within * abs(right) + 1e-12
    return (both or type(said) is type(right)) and bool(said == right)


def _shown(value):
    """A value in a few letters."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str | int | bool) else type(value).__name__
