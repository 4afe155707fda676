r"""Another project's tensors under our names: tables of rules, read one tensor at a time.

A rule is (pattern, ours) or (pattern, ours, change). The first whose pattern matches the whole of a
name says what the tensor is here, each # of ours standing for the pattern's next group:

    (r"layers\.(\d+)\.mlp\.(gate|up)\.weight", "blocks.#.ffw.#.weight")    renamed
    (r".*\.inv_freq", None)                                                not needed
    (r"attn\.to_kv\.weight", ("k.weight", "v.weight"))    its rows, cut into equal parts
    (r"added\.weight", "embedding.weight+")              rows behind those of embedding.weight
    (r"attn_gate", "alpha_xattn", scalar)                changed by a function of the array
"""

import re
from collections.abc import Mapping
from functools import partial

import numpy as np

from miniflamingo.command import some
from miniflamingo.tensorfile import shown


def scalar(x):  # [1] -> []
    """A gate that is kept as an array of one number."""
    return x.reshape(())


def vector_or_scalar(x):  # [1] -> [], [1, 1, D] -> [D]
    """A gate of one number, or of D."""
    return x.reshape(()) if x.size == 1 else x.reshape(-1)


def part(x, i, of):  # [of * O, ...] -> [O, ...]
    """Rows i O to (i + 1) O; ValueError unless there are `of` equal parts."""
    if len(x) % of:
        raise ValueError(f"{len(x)} rows are not {of} equal parts")
    return x[i * len(x) // of : (i + 1) * len(x) // of]


def below(prefix, rules, ours=""):
    """The rules for names that stand behind `prefix`, a pattern, here or behind `ours` there."""

    def moved(target):
        if isinstance(target, tuple):
            return tuple(map(moved, target))
        return target if target is None else ours + target

    return tuple((prefix + pattern, moved(target), *more) for pattern, target, *more in rules)


def places(names, rules):
    """{our name: [(their name, change), ...]}, in the order in which their rows are to be joined.

    ValueError that lists up to ten names for which there is no rule.
    """
    found, unknown = {}, []
    for name in names:
        match = next((m for rule in rules if (m := (re.fullmatch(rule[0], name), rule))[0]), None)
        if match is None:
            unknown.append(shown(name))
            continue
        for ours, change in _targets(*match):
            found.setdefault(ours.removesuffix("+"), {})[ours.endswith("+")] = (name, change)
    if unknown:
        raise ValueError(f"{len(unknown)} names are not understood: {some(unknown)}")
    return {ours: [sources[k] for k in sorted(sources)] for ours, sources in found.items()}


def _targets(match, rule):
    """The (our name, change) of a name that a rule's pattern matched."""
    _, target, *change = rule
    if target is None:
        return []
    if isinstance(target, str):
        return [(_filled(target, match), change[0] if change else None)]
    cuts = (partial(part, i=i, of=len(target)) for i in range(len(target)))
    return [(_filled(name, match), cut) for name, cut in zip(target, cuts)]


def _filled(target, match):
    """The target with its # replaced by the match's groups, one after the other."""
    groups = iter(match.groups())
    return re.sub("#", lambda _: next(groups), target)


class Renamed(Mapping):
    """{our name: array} of another project's {their name: array}, read when asked for.

    ValueError for names that no rule knows, and for rows that cannot be cut or joined.
    """

    def __init__(self, state, rules):
        self._state, self._places = state, places(state, rules)

    def __iter__(self):
        return iter(self._places)

    def __len__(self):
        return len(self._places)

    def __getitem__(self, name):
        arrays = []
        for theirs, change in self._places[name]:
            array = np.asarray(self._state[theirs])
            try:
                arrays.append(array if change is None else change(array))
            except ValueError as error:
                raise ValueError(f"{theirs} {list(array.shape)}: {error}") from None
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def source(self, name):
        """What one of our tensors is called there, where it is one of theirs as it stands; else our
        name."""
        sources = self._places.get(name, ())
        if len(sources) != 1 or sources[0][1] is not None:
            return name
        return getattr(self._state, "source", str)(sources[0][0])

    def without(self, *names):
        """The same without some of our names."""
        kept = object.__new__(Renamed)
        kept._state = self._state
        kept._places = {ours: of for ours, of in self._places.items() if ours not in names}
        return kept
