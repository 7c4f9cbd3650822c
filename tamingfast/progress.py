"""How far a long work has come: a bar on a terminal, and elsewhere, as in a log file, a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

#: Seconds between two lines.
EVERY = 60.0
_KNOWN = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
_OPEN = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} gone{postfix}"


class Bar(tqdm):
    """A progress bar that also takes its state instead of steps."""

    def moved(self, done: int, total: int) -> None:
        """Set what ``update(n)`` would add to."""
        self.total = total
        self.update(done - self.n)


class Lines(Bar):
    """The same without a terminal: a bar that is never drawn, whose state is written each `EVERY` seconds."""

    def __init__(self, total: int | None = None, unit: str = "it", **options: Any) -> None:
        super().__init__(total=total, initial=options.get("initial", 0), disable=True)
        self._shown = {name: options.get(name) for name in ("initial", "unit_scale") if options.get(name)}
        self._shown |= {"unit": unit, "prefix": options.get("desc") or unit.strip()}
        self._began = self._said = time.monotonic()
        self.postfix = None

    def update(self, n: float | None = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            shape = _OPEN if self.total is None else _KNOWN
            options = self._shown | {"postfix": self.postfix, "bar_format": shape}
            print(self.format_meter(self.n, self.total, now - self._began, **options), file=sys.stderr, flush=True)


def bar(unit: str, total: int | None = None, **options: Any) -> tqdm:
    """A context manager whose ``update(n)`` counts ``unit`` up to ``total``; ``options`` are tqdm's.

    ``disable=True`` makes one that says nothing.
    """
    silent = options.get("disable", False) or sys.stderr.isatty()
    return (Bar if silent else Lines)(total=total, unit=unit, **options)
