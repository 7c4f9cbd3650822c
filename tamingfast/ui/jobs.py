"""Long work in a thread of its own, with previews that can be waited for and a way to stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from torch import Tensor

Result = TypeVar("Result")
#: ``work(preview, stop)``: a task, called with what its arguments of these names are.
Work = Callable[[Callable[[Tensor], object], Callable[[], bool]], Result]


class Job(Generic[Result]):
    """Work that has been begun. Iterating gives its previews, of which those that nobody waited for are left out.

    ``stopping`` makes the work end early; so does leaving the iteration before its end.
    """

    def __init__(self, work: Work[Result], stopping: threading.Event) -> None:
        self._work, self._stopping = work, stopping
        self._previews: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Tensor]:
        ended = False
        try:
            while (preview := self._previews.get()) is not None:
                while not self._previews.empty():
                    latest = self._previews.get()
                    if latest is None:
                        ended = True
                        return
                    preview = latest
                yield preview
            ended = True
        finally:
            if not ended:
                self._stopping.set()

    def result(self) -> Result:
        """What the work returned, when it has ended; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return cast(Result, self._result)

    def _run(self) -> None:
        try:
            self._result = self._work(self._previews.put, self._stopping.is_set)
        except BaseException as error:
            self._error = error
        finally:
            self._previews.put(None)
