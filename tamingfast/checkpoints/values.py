"""Values of settings against the types that their class or function declares."""

from __future__ import annotations

import collections.abc
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from tamingfast.errors import UserError

#: The largest integer of torch and NumPy.
LARGEST = 2**63 - 1
_WORDS = {
    int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null",
    os.PathLike: "a path",
}  # fmt: skip


def is_number(value: object) -> bool:
    """Whether ``value`` is a number that torch can take, neither infinite nor NaN."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, float) and math.isfinite(value)


def types_of(declared: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's parameters, or of those of a class's constructor; empty if they say nothing."""
    try:
        return typing.get_type_hints(vars(declared).get("__init__") if isinstance(declared, type) else declared)
    except Exception:  # an annotation can be any expression, also one that fails
        return {}


def check_types(values: Mapping[str, Any], declared: Callable[..., Any], where: str) -> None:
    """Raise UserError, naming the key below ``where``, for a value that ``declared`` cannot take as a parameter.

    Only numbers, text, paths, and lists and mappings of them are checked; other annotations allow everything.
    """
    hints = types_of(declared)
    for key, value in values.items():
        if key in hints and not _fits(value, hints[key]):
            raise UserError(f"{where}.{key}: got {_short(value)}, expected {_described(hints[key])}")


def _fits(value: Any, hint: Any) -> bool:
    if hint is int:
        return is_number(value) and value == int(value)  # 1e4, which YAML reads as a float, is a number of steps
    if hint is float:
        return is_number(value)
    if hint in (bool, str, types.NoneType):
        return isinstance(value, hint)
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inside)
    if hint is os.PathLike or origin is os.PathLike:
        return isinstance(value, str | os.PathLike) or is_number(value)  # YAML reads the name 2024 as a number
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping)
    if origin in (collections.abc.Iterable, collections.abc.Sequence, list):
        return isinstance(value, list | tuple) and all(_fits(each, inside[0]) for each in value)
    return True


def _described(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(_described, inside)))
    if origin in (collections.abc.Iterable, collections.abc.Sequence, list):
        return f"a list, each entry {_described(inside[0])}"
    if origin in (collections.abc.Mapping, dict):
        return "keys below it"
    return _WORDS.get(origin or hint, "a value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
