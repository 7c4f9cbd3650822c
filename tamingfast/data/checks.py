"""Checks of data settings that several datasets share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import torch

from tamingfast.errors import UserError
from tamingfast.ops.machine import available_memory

_USUAL_SIDE = 4096


def positive(name: str, value: object) -> int:
    """``value`` as an int if it is an integer of at least 1; otherwise UserError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name}: got {value!r}, expected an integer of at least 1")
    return int(value)


def side(name: str, value: object) -> int:
    """``value`` as an int if squares of so many pixels fit into memory; otherwise UserError naming the setting."""
    pixels = positive(name, value)
    if pixels > _USUAL_SIDE and 3 * 4 * pixels**2 > available_memory(torch.device("cpu")):
        raise UserError(f"{name}: got {pixels}, expected a side in pixels whose square fits into memory; lower it")
    return pixels


def flag(name: str, value: object) -> bool:
    """``value`` if it is True or False, which words such as "no" are not; otherwise UserError naming the setting."""
    if not isinstance(value, bool | np.bool_) and value not in (0, 1):
        raise UserError(f"{name}: got {value!r}, expected true or false")
    return bool(value)


def existing_directory(name: str, path: object) -> Path:
    """``path`` with ``~`` expanded if it is a directory; otherwise UserError naming the setting.

    Whole numbers are names of directories, too, as the command line and YAML read ``path=2024`` as one.
    """
    if isinstance(path, bool) or not isinstance(path, str | os.PathLike | int):
        raise UserError(f"{name}: got {path!r}, expected a directory of images; give one path")
    root = Path(str(path) if isinstance(path, int) else path)
    with contextlib.suppress(RuntimeError):  # of an unknown user
        root = root.expanduser()
    if "\0" in str(root) or not root.is_dir():
        found = "a path that does not exist" if "\0" in str(root) or not root.exists() else "a file"
        raise UserError(f"{name}={root}: got {found}, expected a directory of images; correct the path")
    return root
