"""Runs commands that must be refused, and judges how: exit code 2 and a short message that names the fault."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

from tamingfast import cli

LONGEST = 3  # lines of a message


def refused(*words: object, names: object = None) -> str:
    """The message of a command that must be refused; it must name one of ``names`` (a string, a path or several)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stopped:  # argparse's way
            code = stopped.code
    return judged(code, err.getvalue(), names)


def judged(code: object, error: str, names: object = None) -> str:
    """The message in ``error``, what a command wrote to standard error before it exited with ``code``."""
    said = "\n".join(said_in(error))
    assert "Traceback (most recent call last)" not in error, error
    assert code == 2, f"exit code {code}: {error}"
    assert said and len(said.splitlines()) <= LONGEST, error
    wanted = [] if names is None else list(map(str, names)) if isinstance(names, list | tuple | set) else [str(names)]
    assert not wanted or any(name in said for name in wanted), f"names none of {wanted}: {said}"
    return said


def said_in(error: str) -> list[str]:
    """The lines of a message, without logged lines and progress bars."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", error)]
    noise = re.compile(r"(warning|info): |.*\d%\||.* \d+/\d+ \[|.*it/s", re.IGNORECASE)
    return [line for line in lines if line and not noise.match(line)]


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Assert that the block leaves ``folder`` as it is: the same files with the same bytes, and no more."""
    before = contents(folder)
    yield
    after = contents(folder)
    assert after.keys() == before.keys(), sorted(after.keys() ^ before.keys())
    assert not (changed := sorted(name for name in before if after[name] != before[name])), changed


def contents(folder: Path) -> dict[str, bytes | None]:
    """The bytes of every file below ``folder``, by relative path; None for what is not a regular file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }
