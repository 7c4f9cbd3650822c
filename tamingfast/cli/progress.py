"""What a command says while it works and when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def progress_bar(unit: str, total: int | None = None, **options: Any) -> Iterator[Any]:
    """A progress bar, on a terminal; ``moved(done, total)`` sets it where ``update(n)`` would add."""
    from tqdm import tqdm

    class Bar(tqdm):
        def moved(self, done: int, total: int) -> None:
            self.total = total
            self.update(done - self.n)

    with Bar(total=total, unit=f" {unit}", disable=None, **options) as bar:
        yield bar


def say_written(path: Path) -> None:
    """Tell on standard output which file is there now."""
    print(f"written: {path}")
