"""Standard output and error that are closed, full, or in an encoding without some letter of a file's name."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

OUTPUT = "standard output"


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside the block, printing to standard error never fails, and a failure of standard output names it.

    A stream that was closed before the program began takes everything and keeps nothing. Letters that a stream's
    encoding lacks are written as escapes.
    """
    _reserve_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Guarded(before[0], OUTPUT), _Guarded(before[1], None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _reserve_descriptors() -> None:
    # Otherwise the next file that is opened gets the number of the closed stream, and libraries print into that file.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


class _Guarded:
    """A text stream that, once it fails, takes everything and keeps nothing; if it has a name, the failure is raised.

    It is raised by every later flush, too, because argparse ignores it.
    """

    def __init__(self, stream: TextIO | None, name: str | None) -> None:
        self._stream: TextIO = io.StringIO() if stream is None else stream
        self._name, self._lost = name, stream is None
        self._failure: OSError | None = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._lost:
            with self._surviving():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._surviving():
            self._stream.flush()
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._lost = True
            # What is still buffered must not fail again when Python flushes it at exit.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())
            if self._name is not None:
                self._failure = OSError(error.errno, error.strerror, self._name)
                raise self._failure from error
