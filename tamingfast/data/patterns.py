"""Several files under one path: a directory, a pattern such as ``*.tar``, or numbers in braces as in ``{000..127}``."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator

from tamingfast.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_MOST = 1 << 20


def files_of(path: str, ending: str, what: str) -> list[str]:
    """The files that ``path`` means, in the order of their numbers or names.

    It is a file, a directory whose files with the ``ending`` are meant, or a pattern of the shell: ``*`` and ``?``,
    lists ``{a,b}`` and ranges ``{000..127}``. Raises UserError for a pattern without files, of which ``what`` are
    expected, and for a file of a list or range that is missing.
    """
    given, path = path, os.path.expanduser(path)
    if os.path.isdir(path):
        found = sorted(each.path for each in os.scandir(path) if each.name.endswith(ending) and each.name[0] != ".")
        if not found:
            raise UserError(f"{path}: got a directory without files that end in {ending}, expected {what}")
        return found
    if os.path.lexists(path):
        return [path]
    found = []
    for each in _expanded(path):
        named = sorted(glob.glob(each)) if glob.has_magic(each) else [each]
        if not named or not os.path.lexists(named[0]):
            raise UserError(f"{given if each == path else each}: got no such file, expected {what}; correct the path")
        found += named
        if len(found) > _MOST:
            raise UserError(f"{path}: got a pattern of more than {_MOST} files, expected fewer; correct it")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """The words that braces stand for, as in a shell; other braces stay as they are."""
    for braces in _BRACES.finditer(pattern):
        words = _words(braces[1])
        if words is not None:
            before, after = pattern[: braces.start()], pattern[braces.end() :]
            for word in words:
                yield from _expanded(before + word + after)
            return
    yield pattern


def _words(content: str) -> Iterator[str] | None:
    ends = _RANGE.fullmatch(content)
    if ends is None:
        return iter(content.split(",")) if "," in content else None
    first, last = int(ends[1]), int(ends[2])
    width = max(map(len, ends.groups())) if any(end.startswith("0") and len(end) > 1 for end in ends.groups()) else 0
    return (f"{number:0{width}d}" for number in range(first, last + 1, 1))
