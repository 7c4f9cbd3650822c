"""Checks of data settings that several datasets share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tamingfast.errors import UserError


def positive(name: str, value: object) -> int:
    """``value`` as an int if it is an integer of at least 1; otherwise UserError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name}: got {value!r}, expected an integer of at least 1")
    return int(value)


def existing_directory(name: str, path: str | os.PathLike) -> Path:
    """``path`` with ``~`` expanded if it is a directory; otherwise UserError naming the setting."""
    root = Path(path).expanduser()
    if not root.is_dir():
        found = "a file" if root.exists() else "a path that does not exist"
        raise UserError(f"{name}={root}: got {found}, expected a directory of images; correct the path")
    return root
