"""Writing files so that a reader never meets half of one, and telling one file from another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tamingfast.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step, on failure it is removed.

    The parent directory is created when missing. After the block the data are on disk (fsync) before the
    rename, so a crash leaves either the old file or the new one.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{target} is a directory; give the name of a file to write")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept last because writers such as Pillow choose the format by it.
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".partial{target.suffix}", dir=target.parent)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); give another place") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes private files; results are for everyone whom the umask allows.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinities are refused with ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_png(path: str | os.PathLike) -> None:
    """UserError unless a PNG may be written under this name: it says no other format and is no directory."""
    if Path(path).suffix.lower() not in ("", ".png"):
        raise UserError(f"{path} is no name for a PNG; give one that ends in .png")
    if Path(path).is_dir():
        raise UserError(f"{path} is a directory; give the name of a file to write")


def digest(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes; ``algorithm`` is any name that hashlib knows."""
    state = hashlib.new(algorithm)
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
