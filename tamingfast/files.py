"""Reading and writing files: regular files only, atomic writes, locks, checks of names, and digests."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock

from tamingfast.errors import UserError, brief, storage_sentence, system_refusal, torch_writer_failed

if os.name == "posix":
    import fcntl

_TEMPORARY = re.compile(r"\..*-[a-z0-9_]{8}\.partial(\.[^.]*)?")
_MARKS = (  # UTF-32's in front of UTF-16's, with which one of them begins
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_LARGEST_PART = 1 << 28
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
    with reported(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in _tidied:
            with contextlib.suppress(OSError):  # such as a directory that may be written but not listed
                remove_leftovers(target.parent)
            _tidied.add(target.parent)
        held, temporary = _temporary(target)
    try:
        with held, reported(path, temporary):
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
    # Cut, as both together may be as long as a name can be, which is counted in bytes. The suffix stays last because
    # some writers choose the format by it.
    prefix, suffix = f".{target.stem[:40]}-", f".partial{target.suffix[:16]}"
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=target.parent)
        held = os.fdopen(handle, "rb")
        if os.name == "posix":
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_SH)
        else:
            held.close()  # Windows replaces no file that is open
        if os.path.exists(name):  # another process could have tidied it away before it was locked
            return held, Path(name)
        held.close()


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove the temporary files of `atomic_write` in ``directory`` whose processes were killed."""
    if os.name != "posix":
        return
    with os.scandir(directory) as entries:
        names = [
            entry.path for entry in entries
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]  # fmt: skip
    for name in names:
        # Held until it is removed, lest a writer locks it in between. One that cannot be locked has its writer.
        with contextlib.suppress(OSError, UserError), open_regular(name) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name)


def writable_path(path: str | os.PathLike) -> Path:
    """The file that writing to ``path`` replaces or creates: ``path`` itself, or what it links to.

    Raises UserError when that is anything but a regular file or a free name, such as a directory or a device, and when
    it is already known that it cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))
        kind = _mode(path)
        if kind is not None and not stat.S_ISREG(kind):
            raise UserError(f"{path}: got {_kind(kind)}, expected the name of a file to write")
        _check_allowed(target)
    except OSError as error:
        raise UserError(storage_sentence(error, path)) from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: got a name with '{error}', expected a path that can be written") from error
    return target


def check_writable(path: str | os.PathLike) -> None:
    """Raise what `writable_path` raises, and try whether a file can be made there; nothing is left of it."""
    _check_room(writable_path(path), path)


def check_directory(path: str | os.PathLike) -> None:
    """Raise UserError unless ``path`` is a directory in which a file can be made, or can become one."""
    _check_room(Path(path).absolute() / "file", path)


def _check_room(target: Path, path: str | os.PathLike) -> None:
    with reported(path):
        # A trial, as permissions do not tell: the system's own directories refuse even those who may write everywhere.
        tempfile.TemporaryFile(dir=_check_allowed(target)).close()


def _mode(path: str | os.PathLike) -> int | None:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _check_allowed(target: Path) -> Path:
    """The lowest directory above ``target`` that exists; OSError where permissions forbid to write or create there."""
    above = next(parent for parent in target.absolute().parents if _mode(parent) is not None)
    if not stat.S_ISDIR(_mode(above) or 0):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    for place in (above, target):
        if os.path.exists(place) and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    return above


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Open a file, or a `Part` of one, for reading bytes, without waiting for the writer of a pipe.

    Raises UserError when ``path`` is anything but a regular file, and OSError as `open` does.
    """
    if isinstance(path, Part):
        return path.content()
    check_regular(path)
    stream = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise UserError(f"{path}: got a file that was replaced while it was opened, expected a regular file")


@dataclass(frozen=True)
class Part(os.PathLike):
    """A file within another, such as a member of an archive: a path that `open_regular` opens.

    ``path`` is the other file, ``name`` the name of the part, ``offset`` and ``size`` its place in bytes.
    """

    path: str
    name: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return f"{self.path}/{self.name}"

    __str__ = __fspath__

    def content(self) -> IO[bytes]:
        """The bytes, in memory. Raises UserError for too many of them and where they are not there any more."""
        if self.size > _LARGEST_PART:
            raise UserError(f"{self}: got {self.size} bytes, expected at most {_LARGEST_PART}")
        with open_regular(self.path) as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise UserError(f"{self.path}: got a file that ends before {self.name}, expected the one that was listed")
        return io.BytesIO(content)


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

    The file is removed at the end, and so are those that killed processes left, when they are locked again.

    Raises UserError, which names ``what`` and gives ``advice``, when another process holds it.
    """
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{what}: got one that another process is writing, expected a free one; {advice}") from None
    except OSError as error:
        raise UserError(storage_sentence(error, what)) from error
    try:
        own = os.stat(path)
        yield
    finally:
        with contextlib.suppress(OSError):  # its directory may be gone, or replaced by another process's
            if os.path.samestat(own, os.stat(path)):
                os.unlink(path)
        lock.release()


@contextlib.contextmanager
def reported(path: str | os.PathLike, written: Path | None = None) -> Iterator[None]:
    """Turn what the storage refuses inside the block into a UserError that names ``path``.

    If ``written`` is given, the file that stands for ``path`` in the block, then errors that name another file pass, as
    all other errors do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = system_refusal(error)
        if refused is None and written is not None and torch_writer_failed(error):
            refused = _why_not_written(written)
        if refused is None or (written is not None and refused.filename not in (None, str(written))):
            raise
        raise UserError(storage_sentence(refused, path)) from error


def _why_not_written(path: str | os.PathLike) -> OSError:
    """The system's answer to one more write at the end of a file that torch, which hides it, failed to write."""
    try:
        with open(path, "ab", buffering=0) as stream:
            for _ in range(64):  # a full disk may have room for a few bytes more
                stream.write(bytes(1 << 16))
            os.fsync(stream.fileno())
    except OSError as error:
        return error
    return OSError(None, "the file cannot be written to its end, as on a full disk")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        # Names of files may hold bytes that are not UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_path(name: str, value: object) -> None:
    """Raise UserError about ``name`` unless ``value`` is a path as text or as an object."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}: got {brief(value)}, expected a path")


def check_png(path: str | os.PathLike) -> None:
    """Raise UserError when ``path`` has the suffix of another format or is not the name of a file to write."""
    check_suffix(path, ".png")
    writable_path(path)


def check_suffix(path: str | os.PathLike, expected: str) -> None:
    """Raise UserError when ``path`` has another suffix than the one ``expected``, or no path."""
    check_path("path", path)
    suffix = Path(path).suffix
    if suffix.lower() not in ("", expected):
        raise UserError(f"{path}: got the suffix '{suffix}', expected {expected}")


def digest(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's contents; ``algorithm`` is a name known to hashlib."""
    state = hashlib.new(algorithm)
    with open_regular(path) as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
