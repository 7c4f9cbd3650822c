"""What a command prints while it works and when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imports tqdm, which `tamingfast --help` does without
    from tamingfast.progress import Bar


def progress_bar(unit: str, total: int | None = None) -> Bar:
    """A progress bar of ``unit``: `tamingfast.progress.Bars` for the terminal."""
    from tamingfast.progress import bar

    # Multiply-adds come in billions, so they get a scaled unit; those of small images finish before a bar is worth it.
    many = unit.startswith("multiply-adds")
    return bar(f" {unit}", total, unit_scale=many, delay=1 if many else 0)


def say_written(path: str | Path, *more: str) -> None:
    """Print which file has been written."""
    print(", ".join([f"written: {path}", *more]))
