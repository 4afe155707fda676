"""What a value of a config may be: one line that names the field, what was expected and what came.

The dataclasses of configs call these in __post_init__; configs that come from a file are built here
field by field.
"""

import json
import math
import reprlib
from dataclasses import MISSING, asdict, fields, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import get_args, get_origin

from miniflamingo.command import some
from miniflamingo.tensorfile import shown

LONGEST = 1_000_000  # characters of a config in a file's metadata; ours have about 2,000
# the metadata of a field that older files do not have: its default is what they were made with
LATER = {"later": True}


def check_types(config):
    """ValueError unless each field is of its annotated type; floats must be finite."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            kind = getattr(field.type, "__name__", str(field.type))
            kind = str(field.type) if get_args(field.type) else kind
            raise ValueError(f"{field.name} must be {kind}, got {reprlib.repr(value)}")


def _fits(value, kind):
    parts = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is tuple:  # a list will do: tuple[int, ...]
        return isinstance(value, (tuple, list)) and all(_fits(v, parts[0]) for v in value)
    if kind is NoneType or kind is None:
        return value is None
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        finite = isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value))
        return finite and not isinstance(value, bool)
    return isinstance(value, kind)


def check_range(config, least, most, *names, below=math.inf):
    """ValueError unless each named field, or each element of it, lies in least..most, and below
    `below`; None passes."""
    for name in names:
        value = getattr(config, name)
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if x is not None and not (least <= x <= most and x < below):
                limit = f"at least {least}" if most == math.inf else f"in {least}..{most}"
                limit += f" and below {below}" * (below < math.inf)
                raise ValueError(f"{name} must be {limit}, got {reprlib.repr(value)}")


def check_at_least(config, least, *names):
    """ValueError unless each named field, or each element of it, is at least `least`."""
    check_range(config, least, math.inf, *names)


def check_above_zero(config, *names):
    """ValueError unless each named field is above 0; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {reprlib.repr(value)}")


def check_lengths(config, length, *names):
    """ValueError unless each named tuple has `length` elements."""
    for name in names:
        value = getattr(config, name)
        if len(value) != length:
            raise ValueError(f"{name} must have {length} elements, got {reprlib.repr(value)}")


# --- configs from files ---------------------------------------------------------------------------


def from_json(text, where):
    """The value that a JSON text stands for; ValueError that names `where` it stands if none."""
    if len(text) > LONGEST:
        raise ValueError(f"{where} has {len(text)} characters, more than {LONGEST}")
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {shown(error, 200)}") from None


def _refuse(constant):
    raise ValueError(f"{constant} is no number")


def config_from_json(kind, text, where):
    """A config from the JSON of its asdict; ValueError that names `where` and the wrong field.

    Every field must be there: one that is missing has no default here, because a default that is
    not what was trained (a number of heads) would load and answer wrongly. The exception is what is
    marked as LATER.
    """
    return _build(kind, from_json(text, where), where)


def with_later(values, config):
    """The asdict of an older config like `config`, with what came LATER at its default."""
    values = dict(values) if isinstance(values, dict) else values
    for f in fields(config) if isinstance(values, dict) else ():
        inner = getattr(config, f.name)
        if f.metadata == LATER:
            default = f.default if f.default is not MISSING else f.default_factory()
            values.setdefault(f.name, asdict(default) if is_dataclass(default) else default)
        elif is_dataclass(inner) and isinstance(values.get(f.name), dict):
            values[f.name] = with_later(values[f.name], inner)
    return values


def _config_of(kind, value):
    """The config class that a field's value is built as, None for a plain value; of several, the
    one whose fields the value's are most alike."""
    classes = [part for part in (get_args(kind) or (kind,)) if is_dataclass(part)]
    if len(classes) < 2 or not isinstance(value, dict):
        return classes[0] if classes else None
    return min(classes, key=lambda part: len(value.keys() ^ {f.name for f in fields(part)}))


def _build(kind, values, where):
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, got {reprlib.repr(values)}")
    types = {field.name: field.type for field in fields(kind)}
    unknown = [shown(name) for name in values if name not in types]
    later = [field.name for field in fields(kind) if field.metadata == LATER]
    missing = [name for name in types if name not in values and name not in later]
    for what, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise ValueError(f"{where} has {what} fields: {some(names)}")
    for name, value in values.items():
        if inner := _config_of(types[name], value):
            values[name] = _build(inner, value, f"{where}.{name}")
        elif isinstance(value, list):  # JSON has lists where the configs have tuples
            values[name] = tuple(value)
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
