"""References in configs: ``${section.key}`` stands for the value of another key.

OmegaConf's resolvers, ``${name:...}``, are functions: ``${oc.env:HOME}`` would put the reader's environment into the
file. They are refused, so this module resolves references itself, on plain values and with a limit of work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from tamingfast.errors import UserError

#: Values, and as many characters of text, that references may make; a few lines could else ask for terabytes.
MOST_VALUES = 100_000
_DEEPEST = 64  # references that lead to references
_INNERMOST = re.compile(r"\$\{([^${}:]*)\}")
_STEP = re.compile(r"[.\[\]]+")

Keys = tuple[str | int, ...]


def check_references(value: Any, keys: Keys = (), source: str | os.PathLike | None = None) -> None:
    """Raise UserError for a resolver or a malformed reference in any text of nested mappings and lists.

    The message names the keys, and the file ``source`` if it is given.
    """
    for part, inside in _parts(value):
        check_references(inside, (*keys, part), source)
    if isinstance(value, str) and "${" in value:
        left = value
        while "${" in (once := _INNERMOST.sub("", left)) and once != left:
            left = once
        if "${" in once:
            name = dotted(keys) if source is None else f"{source}: {dotted(keys)}"
            raise UserError(
                f"{name}: got {value!r}, expected a value or a reference to another key, ${{section.key}}; "
                "write the value itself, as no functions are run for a config"
            )


def resolved(root: Any, keys: Keys = ()) -> Any:
    """A copy of the part of ``root`` under ``keys`` with the values that its references stand for.

    ``root`` consists of dicts and lists. Raises UserError, naming the key, for a reference to nothing, one that leads
    back to itself, and where `check_references` does.
    """
    check_references(root)
    return _References(root).copy(_at(root, keys), keys, ())


def dotted(keys: Keys) -> str:
    """The keys as they are written: ``data.path``."""
    return ".".join(map(str, keys)) or "config"


class _References:
    def __init__(self, root: Any):
        self.root, self.room = root, MOST_VALUES

    def copy(self, value: Any, keys: Keys, through: tuple[Keys, ...]) -> Any:
        """``value``, which stands under ``keys``, resolved; ``through`` are the references that led here."""
        self.spend(1, keys)
        if isinstance(value, Mapping):
            return {key: self.copy(inside, (*keys, key), through) for key, inside in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(inside, (*keys, place), through) for place, inside in enumerate(value)]
        return self.text(value, keys, through) if isinstance(value, str) and "${" in value else value

    def text(self, text: str, keys: Keys, through: tuple[Keys, ...]) -> Any:
        if keys in through or len(through) > _DEEPEST:
            raise UserError(f"{dotted(keys)}: got {text!r}, which leads back to itself, expected a value in the end")
        while found := _INNERMOST.search(text):
            value = self.named(found[1], text, keys, (*through, keys))
            if found[0] == text:
                return value
            text = text[: found.start()] + str(value) + text[found.end() :]
            self.spend(len(text), keys)
        return text

    def named(self, name: str, text: str, keys: Keys, through: tuple[Keys, ...]) -> Any:
        name = name.strip()
        dots = len(name) - len(name.lstrip("."))
        base = keys[: len(keys) - dots] if dots else ()  # one dot: beside this key
        wanted = (*base, *filter(None, _STEP.split(name)))
        try:
            value = _at(self.root, wanted)
        except LookupError:
            raise UserError(
                f"{dotted(keys)}: got {text!r}, which refers to nothing, expected a reference to a key of the config; "
                f"add {dotted(wanted)}, or write the value itself"
            ) from None
        return self.copy(value, wanted, through)

    def spend(self, values: int, keys: Keys) -> None:
        self.room -= values
        if self.room < 0:
            raise UserError(
                f"{dotted(keys)}: got references that make more than {MOST_VALUES} values, expected fewer; write the "
                "values themselves"
            )


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _at(root: Any, keys: Keys) -> Any:
    """The value under ``keys``; LookupError if there is none."""
    for key in keys:
        if isinstance(root, list | tuple):
            named = {str(place): value for place, value in enumerate(root)}
        else:
            named = {str(name): value for name, value in root.items()} if isinstance(root, Mapping) else {}
        root = named[str(key)]
    return root
