"""Checks of data settings that several datasets share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch

from tamingfast.errors import UserError, brief
from tamingfast.ops.machine import available_memory

_USUAL_SIDE = 4096
_INFINITE = float("inf")


def whole(name: str, value: object) -> int:
    """``value`` as an int if it is one; otherwise UserError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name}: got {brief(value)}, expected an integer")
    return int(value)


def positive(name: str, value: object, most: int | None = None) -> int:
    """``value`` as an int if it is an integer from 1 to ``most``; otherwise UserError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name}: got {brief(value)}, expected an integer of at least 1")
    if most is not None and value > most:
        raise UserError(f"{name}: got {brief(value)}, expected at most {most}")
    return int(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value, as JSON and YAML have them, is a finite number; ``true`` and ``false`` are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _INFINITE


def side(name: str, value: object) -> int:
    """``value`` as an int if squares of so many pixels fit into memory; otherwise UserError naming the setting."""
    pixels = positive(name, value)
    if pixels > _USUAL_SIDE and 3 * 4 * pixels**2 > available_memory(torch.device("cpu")):
        raise UserError(f"{name}: got {brief(pixels)}, expected a square that fits into memory; lower it")
    return pixels


def check_short_side(short_side: int | None, size: int) -> None:
    """Raise UserError unless squares of ``size`` fit into images whose shorter side is ``short_side``, if given."""
    if short_side is not None and side("short_side", short_side) < size:
        raise UserError(f"short_side: got {short_side}, expected at least size={size}, to which images are cropped")


def flag(name: str, value: object) -> bool:
    """``value`` if it is True or False, which words such as "no" are not; otherwise UserError naming the setting."""
    if not isinstance(value, bool | np.bool_) and value not in (0, 1):
        raise UserError(f"{name}: got {brief(value)}, expected true or false")
    return bool(value)


def path_of(name: str, value: object) -> str:
    """``value`` if it can be a path; otherwise UserError naming the setting.

    Whole numbers are names, too, as the command line and YAML read ``path=2024`` as one.
    """
    if isinstance(value, bool) or not isinstance(value, str | os.PathLike | int) or value == "" or "\0" in str(value):
        raise UserError(f"{name}: got {brief(value)}, expected a path")
    return str(value) if isinstance(value, int) else os.fspath(value)


def existing_directory(name: str, path: object) -> Path:
    """``path`` with ``~`` expanded if it is a directory; otherwise UserError naming the setting."""
    root = Path(path_of(name, path))
    with contextlib.suppress(RuntimeError):  # of an unknown user
        root = root.expanduser()
    if not os.path.isdir(root):
        found = "a file" if os.path.exists(root) else "a path that does not exist"
        raise UserError(f"{name}={root}: got {found}, expected a directory of images; correct the path")
    return root
