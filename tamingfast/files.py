"""Atomic writes, checks of file names, and digests of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tamingfast.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces ``path`` on success and is removed on failure.

    Missing parent directories are created. The data are flushed to disk (fsync) before the rename, so a crash leaves
    either the old file or the new one, never a partial one.

    Raises UserError when ``path`` is a directory or cannot be written.
    """
    target = Path(path)
    _refuse_directory(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last because writers such as Pillow choose the format by it.
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".partial{target.suffix}", dir=target.parent)
    except OSError as error:
        raise UserError(f"{target}: got '{error.strerror}', expected a path that can be written") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp creates files that only their owner can read.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_directory(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: got a directory, expected the name of a file to write")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_png(path: str | os.PathLike) -> None:
    """Raise UserError when ``path`` has the suffix of another format or is a directory."""
    suffix = Path(path).suffix
    if suffix.lower() not in ("", ".png"):
        raise UserError(f"{path}: got the suffix '{suffix}', expected .png")
    _refuse_directory(Path(path))


def digest(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's contents; ``algorithm`` is a name known to hashlib."""
    state = hashlib.new(algorithm)
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
