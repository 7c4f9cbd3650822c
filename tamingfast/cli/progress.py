"""What a command says while it works and when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def progress_bar(unit: str, total: int | None = None, **options: Any) -> Any:
    """A progress bar; ``moved(done, total)`` sets it where ``update(n)`` would add."""
    from tamingfast.progress import bar

    return bar(f" {unit}", total, **options)


def say_written(path: str | Path) -> None:
    """Tell on standard output which file is there now."""
    print(f"written: {path}")
