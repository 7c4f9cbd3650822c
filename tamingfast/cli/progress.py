"""What a command says while it works and when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def progress_bar(unit: str, total: int | None = None, **options: Any) -> Iterator[Any]:
    """A progress bar; ``moved(done, total)`` sets it where ``update(n)`` would add."""
    from tamingfast.progress import bar

    with bar(f" {unit}", total, **options) as shown:
        yield shown


def say_written(path: str | Path) -> None:
    """Tell on standard output which file is there now."""
    print(f"written: {path}")
