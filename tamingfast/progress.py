"""The progress of long work: a bar on a terminal; elsewhere, as in a log file, one line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tqdm import tqdm

#: Seconds between two lines.
EVERY = 60.0
_KNOWN = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
_OPEN = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} gone{postfix}"


class Counter(Protocol):
    """What long work reports its progress to, either in steps or as a state."""

    def update(self, n: float | None = 1, /) -> object:
        """Count ``n`` more."""

    def moved(self, done: int, total: int, /) -> object:
        """``done`` of ``total`` are done."""


#: ``bars(unit, total)`` opens a counter of ``unit``; ``total`` is None where it is not known beforehand.
Bars = Callable[[str, int | None], AbstractContextManager[Counter]]


class Bar(tqdm):
    """A progress bar that also takes a state instead of steps."""

    def moved(self, done: int, total: int) -> None:
        """Set the count to ``done`` and the total to ``total``."""
        self.total = total
        self.update(done - self.n)


class Lines(Bar):
    """The same without a terminal: the bar is never drawn; its state is printed every `EVERY` seconds."""

    def __init__(self, total: int | None = None, unit: str = "it", **options: Any) -> None:
        super().__init__(total=total, initial=options.get("initial", 0), disable=True)
        self._shown = {name: options.get(name) for name in ("initial", "unit_scale") if options.get(name)}
        self._shown |= {"unit": unit, "prefix": options.get("desc") or unit.strip()}
        self._began = self._printed = time.monotonic()
        self.postfix = None

    def update(self, n: float | None = 1) -> None:
        """Add ``n`` and print a line when one is due."""
        self.n += n or 0
        now = time.monotonic()
        if now - self._printed >= EVERY:
            self._printed = now
            shape = _OPEN if self.total is None else _KNOWN
            options = self._shown | {"postfix": self.postfix, "bar_format": shape}
            line = self.format_meter(self.n, self.total or 0, now - self._began, **options)
            print(line, file=sys.stderr, flush=True)


def bar(unit: str, total: int | None = None, **options: Any) -> Bar:
    """A context manager that counts ``unit`` up to ``total``; ``options`` are tqdm's."""
    if sys.stderr.isatty() or options.get("disable", False):
        return Bar(total=total, unit=unit, **options)
    return Lines(total=total, unit=unit, **options)


def silent(unit: str, total: int | None = None) -> Bar:
    """A counter that shows nothing: the `Bars` of callers who want none."""
    return Bar(total=total, unit=unit, disable=True)
