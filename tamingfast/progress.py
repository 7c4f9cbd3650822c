"""Progress of long work: a bar on a terminal; anywhere else, such as in a log file, one line a minute.

Nothing else in the package draws bars.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tqdm import tqdm

logger = logging.getLogger(__name__)

#: Seconds between printed lines.
EVERY = 60.0
#: Work of fewer seconds than this is never worth a line.
BRIEF = 1.0
#: Seconds of work before an estimate of the rest, and seconds of the rest that are worth one.
MEASURED, LONG = 5.0, 60.0
#: Size of a terminal that does not say how large it is.
_COLUMNS, _ROWS = 80, 24
_KNOWN = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
_OPEN = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} elapsed{postfix}"


class Counter(Protocol):
    """What long work reports its progress to, either as increments or as a count and a total."""

    def update(self, n: float | None = 1, /) -> object:
        """Count ``n`` more."""

    def moved(self, done: int, total: int, /) -> object:
        """Set the count to ``done`` and the total to ``total``."""


#: ``bars(unit, total)`` opens a counter of ``unit``; ``total`` is None where it is not known beforehand.
Bars = Callable[[str, int | None], AbstractContextManager[Counter]]


class Bar(tqdm):
    """A progress bar that can also be set to a count and a total."""

    def moved(self, done: int, total: int) -> None:
        """Set the count to ``done`` and the total to ``total``."""
        self.total = total
        self.update(done - self.n)


class Lines(Bar):
    """A `Bar` that is not drawn but prints lines, for output that is not a terminal.

    All of a process together print a line every `EVERY` seconds, whether one of them lives for an hour or a thousand
    for a second each.
    """

    last = time.monotonic()  # when a line was printed, or the process started

    def __init__(self, total: int | None = None, unit: str = "it", **options: Any) -> None:
        super().__init__(total=total, initial=options.get("initial", 0), disable=True)
        self._shown = {name: options.get(name) for name in ("initial", "unit_scale") if options.get(name)}
        self._shown |= {"unit": unit, "prefix": options.get("desc") or unit.strip()}
        self._began = time.monotonic()
        self.postfix = None

    def update(self, n: float | None = 1) -> None:
        """Add ``n`` and print a line when one is due."""
        self.n += n or 0
        now = time.monotonic()
        if now - Lines.last >= EVERY and now - self._began >= min(BRIEF, EVERY):
            Lines.last = now
            shape = _OPEN if self.total is None else _KNOWN
            options = self._shown | {"postfix": self.postfix, "bar_format": shape}
            line = self.format_meter(self.n, self.total or 0, now - self._began, **options)
            print(line, file=sys.stderr, flush=True)


class Estimated:
    """A counter of long work that logs once how long the rest will take, and what would shorten it.

    It does so when `MEASURED` seconds of the work have shown that more than `LONG` seconds are left. What precedes the
    first report does not count, because it prepares the rest, too.
    """

    def __init__(self, counter: Bar, work: str, advice: str, told: set[str]) -> None:
        self._counter, self._work, self._advice, self._told = counter, work, advice, told
        self._first: tuple[float, float] | None = None  # time and count of the first report

    def update(self, n: float | None = 1) -> None:
        """Count ``n`` more."""
        self._counter.update(n)
        self._estimate()

    def moved(self, done: int, total: int) -> None:
        """Set the count to ``done`` and the total to ``total``."""
        self._counter.moved(done, total)
        self._estimate()

    def _estimate(self) -> None:
        now = time.monotonic(), self._counter.n
        self._first = self._first or now
        spent, done = (after - before for after, before in zip(now, self._first, strict=True))
        if self._work in self._told or not self._counter.total or done <= 0 or spent < MEASURED:
            return
        left = spent / done * (self._counter.total - self._counter.n)
        if left > LONG:
            self._told.add(self._work)
            logger.warning("%s: about %s left at this pace%s", self._work, duration(left), self._advice)


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there are at least two, such as "3 minutes"."""
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{round(seconds / length)} {name}"
    return f"{round(seconds)} seconds"


def bar(unit: str, total: int | None = None, **options: Any) -> Bar:
    """A context manager that counts ``unit`` up to ``total``; ``options`` are tqdm's."""
    if sys.stderr.isatty() or options.get("disable", False):
        return Bar(total=total, unit=unit, **(_size() | options))
    return Lines(total=total, unit=unit, **options)


def _size() -> dict[str, Any]:
    """Columns and rows for tqdm, which draws nothing where a terminal, as some in containers, says that it has none."""
    try:
        return {} if os.get_terminal_size(sys.stderr.fileno()).columns else {"ncols": _COLUMNS, "nrows": _ROWS}
    except (OSError, ValueError):  # no terminal
        return {}


def silent(unit: str, total: int | None = None) -> Bar:
    """A counter that shows nothing, for callers that want no progress shown."""
    return Bar(total=total, unit=unit, disable=True)
