"""Ctrl-C, SIGTERM and the end of the terminal, held back until the current step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

_Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


def _signals() -> list[signal.Signals]:
    closed = [each for each in signal.Signals if each.name == "SIGHUP"]  # Windows has none
    heard = [each for each in closed if signal.getsignal(each) != signal.SIG_IGN]
    return [signal.SIGINT, signal.SIGTERM, *heard]


class Interrupts:
    """Records the first Ctrl-C, SIGTERM or SIGHUP inside the block in ``received``; a second one acts as usual.

    SIGHUP stays ignored where it is, as under ``nohup``.

    Outside the main thread, where Python allows no signal handlers, signals act as usual from the start.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _signals():
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
