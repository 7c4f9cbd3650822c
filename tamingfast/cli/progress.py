"""What a command prints while it works and when it is done."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imports tqdm, which `tamingfast --help` does without
    from tamingfast.progress import Bars, Counter


def bars_of(arguments: argparse.Namespace) -> Bars:
    """Progress bars for a command, which say how long its work will take, and which of its options would shorten it."""
    from tamingfast.progress import Estimated, bar
    from tamingfast.ranks import is_first

    told: set[str] = set()

    @contextlib.contextmanager
    def opened(unit: str, total: int | None = None) -> Iterator[Counter]:
        # Multiply-adds come in billions, so they get a scaled unit; those of small images finish before a bar is worth
        # it.
        many = unit.startswith("multiply-adds")
        quiet = not is_first()
        with bar(f" {unit}", total, unit_scale=many, delay=1 if many else 0, disable=quiet) as counter:
            yield Estimated(counter, unit.removeprefix("multiply-adds of "), _advice(unit, arguments), told)

    return opened


def _advice(unit: str, arguments: argparse.Namespace) -> str:
    """What makes such work shorter, as the end of a sentence."""
    smaller = "a smaller --size" if hasattr(arguments, "size") else "a smaller picture"
    if unit.startswith("multiply-adds"):
        return f"; {smaller}, or a model on a first stage with a larger factor f, takes less"
    if unit == "tokens in sliding windows":
        strided = getattr(arguments, "schedule", None) in (None, "paper", "scene") and not getattr(
            arguments, "resume", False
        )
        return "; --schedule strided --stride 4 takes a fraction of it" if strided else f"; {smaller} takes less"
    if hasattr(arguments, "limit"):
        return "; a smaller --limit, and fewer --samples, take less"
    return f"; {smaller} takes less" if hasattr(arguments, "strides") else ""


def say_written(path: str | Path, *more: str, apart: bool = False) -> None:
    """Print which file has been written; ``apart`` from the results, on standard error."""
    print(", ".join([f"written: {path}", *more]), file=sys.stderr if apart else sys.stdout)


def print_json(facts: Mapping[str, object]) -> None:
    """Print one JSON object. Raises ValueError for NaN and infinities, which JSON does not have."""
    print(json.dumps(facts, indent=2, allow_nan=False))
