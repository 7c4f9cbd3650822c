"""Reading and writing files: regular files only, atomic writes, locks, checks of names, and digests."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

from tamingfast.errors import UserError, storage_problem

if os.name == "posix":
    import fcntl

_TEMPORARY = re.compile(r"\..*-[a-z0-9_]{8}\.partial(\.[^.]*)?")
_MARKS = (  # UTF-32's in front of UTF-16's, with which one of them begins
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_tidied: set[Path] = set()  # directories whose leftovers this process has removed


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces ``path`` on success and is removed on failure.

    Missing parent directories are created. The data are flushed to disk (fsync) before the rename, so a crash leaves
    either the old file or the new one, never a partial one. A link is followed: its target is replaced. Temporary files
    that killed processes left for the same target are removed.

    Raises UserError when ``path`` is anything but a regular file, cannot be written, or the disk is full; the old file
    is then unchanged.
    """
    target = writable_path(path)
    with _reported(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in _tidied:
            remove_leftovers(target.parent)
            _tidied.add(target.parent)
        held, temporary = _temporary(target)
    try:
        with held, _reported(path):
            yield temporary
            with open(temporary, "rb+") as stream:
                os.fsync(stream.fileno())
            # mkstemp creates files that only their owner can read.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> tuple[IO[bytes], Path]:
    """A new file beside ``target``, and the stream that holds its lock.

    A writer holds the lock as long as it lives, so a file that can be locked has lost its writer.
    """
    while True:
        # The suffix stays last because writers such as Pillow choose the format by it.
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".partial{target.suffix}", dir=target.parent)
        held = os.fdopen(handle, "rb")
        if os.name == "posix":
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.exists(name):  # another process could have tidied it away before it was locked
            return held, Path(name)
        held.close()


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove the temporary files of `atomic_write` in ``directory`` whose processes were killed."""
    with os.scandir(directory) as entries:
        names = [Path(entry.path) for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for name in names:
        if _abandoned(name):
            name.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    if os.name != "posix":
        return False
    try:
        with open_regular(path) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (OSError, UserError):
        return False


def writable_path(path: str | os.PathLike) -> Path:
    """The file that writing to ``path`` replaces: ``path`` itself, or what it links to.

    Raises UserError when that is anything but a regular file or a free name, such as a directory or a device.
    """
    try:
        target = Path(os.path.realpath(path))
        kind = target.stat().st_mode
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: got '{reason}', expected a path that can be written") from error
    if not stat.S_ISREG(kind):
        raise UserError(f"{path}: got {_kind(kind)}, expected the name of a file to write")
    return target


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Open a file for reading bytes, without waiting for the writer of a pipe.

    Raises UserError when ``path`` is anything but a regular file, and OSError as `open` does.
    """
    check_regular(path)
    stream = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise UserError(f"{path}: got a file that was replaced while it was opened, expected a regular file")


def read_text(path: str | os.PathLike, expected: str, errors: str = "strict", largest: int = 1 << 30) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, as Windows programs write it.

    A mark is no part of the text. ``errors`` is that of `bytes.decode`. Raises UserError, which names what was
    ``expected``, for files that are missing, unreadable, larger than ``largest`` bytes or no text.
    """
    try:
        with open_regular(path) as stream:
            content = stream.read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: got no such file, expected {expected}; correct the path") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no path can hold a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: got '{reason}', expected {expected}") from error
    if len(content) > largest:
        raise UserError(f"{path}: got more than {largest >> 20} MiB, expected {expected}; divide the file")
    try:
        text = content.decode(next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8"), errors)
    except UnicodeError as error:
        raise UserError(
            f"{path}: got a file that cannot be read as UTF-8 ({error}), expected {expected}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{path}: got a file that is no text in UTF-8, expected {expected}; save it as UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank, ended as on Unix, Windows or old Macs.

    Nothing is cut off them, and no other sign ends one, because names may contain spaces and whatever else
    `str.splitlines` takes for the end of a line.
    """
    lines = text.split("\n" if "\n" in text else "\r")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def check_regular(path: str | os.PathLike, expected: str = "a regular file") -> None:
    """Raise UserError when ``path`` exists and is a directory, a device or a pipe, which is never to be read."""
    try:
        kind = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(kind):
        raise UserError(f"{path}: got {_kind(kind)}, expected {expected}")


def _kind(mode: int) -> str:
    tests = {
        "a directory": stat.S_ISDIR, "a device": lambda m: stat.S_ISCHR(m) or stat.S_ISBLK(m),
        "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK,
    }  # fmt: skip
    return next((name for name, test in tests.items() if test(mode)), "a special file")


@contextlib.contextmanager
def locked(path: str | os.PathLike, what: str, advice: str) -> Iterator[None]:
    """Hold the lock file ``path`` inside the block; a process that ends, however it ends, loses its lock.

    Raises UserError, which names ``what`` and gives ``advice``, when another process holds it.
    """
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{what}: got one that another process is writing, expected a free one; {advice}") from None
    except OSError as error:
        raise UserError(
            f"{what}: got '{storage_problem(error) or error}', expected a place to write; {advice}"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _reported(path: str | os.PathLike) -> Iterator[None]:
    """Report what the storage refuses as a UserError that names ``path``."""
    try:
        yield
    except Exception as error:
        problem = None if isinstance(error, UserError) else storage_problem(error)
        if problem is None:
            raise
        raise UserError(f"{path}: got '{problem}', expected a path that can be written") from error


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
    """Raise UserError when ``path`` has the suffix of another format or is not the name of a file to write."""
    suffix = Path(path).suffix
    if suffix.lower() not in ("", ".png"):
        raise UserError(f"{path}: got the suffix '{suffix}', expected .png")
    writable_path(path)


def digest(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's contents; ``algorithm`` is a name known to hashlib."""
    state = hashlib.new(algorithm)
    with open_regular(path) as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
