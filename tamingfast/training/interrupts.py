"""Ctrl-C, SIGTERM and the end of the terminal: answered at once, held back until the current step is done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

_Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None

#: Exit status after a second signal, the same as of every interrupted command.
STOPPED_NOW = 130
#: Seconds within which signals count as one: a launcher passes on what the terminal sends to all its processes, too.
_TOGETHER = 0.3
_STANDARD_ERROR = 2
_END = b"\0"  # no signal has this number


def _signals() -> list[signal.Signals]:
    closed = [each for each in signal.Signals if each.name == "SIGHUP"]  # Windows has none
    heard = [each for each in closed if signal.getsignal(each) != signal.SIG_IGN]
    return [signal.SIGINT, signal.SIGTERM, *heard]


class Interrupts:
    """Answers the first Ctrl-C, SIGTERM or SIGHUP inside the block and records it; a second ends the process.

    SIGHUP stays ignored where it is, as under ``nohup``.

    Python runs its signal handlers between two instructions of the main thread, of which a backward pass is one. So a
    thread answers instead. The second signal ends the process as a kill does, which no file that is written atomically
    suffers from. With ``quiet`` nothing is printed. Outside the main thread, where Python allows no signal handlers,
    signals act as usual.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.received: str | None = None
        self._quiet = quiet
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._heard = _signals()
            for number in self._heard:
                self._before[number] = signal.signal(number, self._record)
            self._thread = threading.Thread(target=self._answer, name="interrupts", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._writing, _END)
        self._thread.join()
        self.close()

    def close(self) -> None:
        """Close the pipe through which signals reach the thread."""
        os.close(self._reading)
        os.close(self._writing)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _answer(self) -> None:
        first: float | None = None
        while (number := os.read(self._reading, 1)) != _END:
            if ord(number) not in self._heard:
                continue
            now = time.monotonic()
            if first is None:
                first = now
                self._say("stopping after this step; again stops now")
            elif now - first > _TOGETHER:
                self._say("stopped; --resume continues from the last checkpoint")
                os._exit(STOPPED_NOW)

    def _say(self, text: str) -> None:
        # Not through sys.stderr, whose lock the main thread may hold.
        if not self._quiet:
            with contextlib.suppress(OSError):
                os.write(_STANDARD_ERROR, f"\n{text}\n".encode())


def _leave_to_the_parent() -> None:
    """In a process that reads data: a terminal's Ctrl-C, which it receives too, is answered by the training."""
    held = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(held, Interrupts):
        signal.set_wakeup_fd(-1)
        held.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
