"""Check the fields of a dataclass against their annotations: configurations come from files, and dataclasses do not
check types."""

import dataclasses
import math
from collections.abc import Collection
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NAMES = {int: "an integer", float: "a finite number", str: "a string", bool: "True or False", NoneType: "None"}


def check_fields(config: Any) -> None:
    """Compare the values of a dataclass with its annotations.

    An integer counts as a float. A bool counts as neither. A float must be finite. A tuple or a set counts as a list,
    and no item may be an empty string.

    Raises:
        ValueError: a value has another type, or is not one of the choices. The message names the field.
    """
    cls: Any = type(config)
    hints = _hints(cls)
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(f"{field.name} must be {_describe(hint)}, got {_shorten(value)}")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (list, set):
        inside = isinstance(value, (list, tuple, set, frozenset))
        return inside and all(item != "" and _fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_describe, arguments)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (list, set):
        return f"a list of {NAMES[arguments[0]].rpartition(' ')[2]}s"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _shorten(value: Any, longest: int = 200) -> str:
    text = repr(list(value)[:20] if isinstance(value, Collection) and not isinstance(value, (str, dict)) else value)
    return text if len(text) <= longest else text[:longest] + " …"
