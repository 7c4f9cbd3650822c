"""One call of `decode`: the order in which tokens are fed, chosen and shown to the caller."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator

from torch import Tensor

from tamingfast.engines.cuda.cache import Cache
from tamingfast.engines.cuda.device import Device
from tamingfast.engines.cuda.passes import Passes
from tamingfast.engines.cuda.step import Step
from tamingfast.engines.cuda.window import Window
from tamingfast.engines.request import DecodeRequest

_MOST_STEPS_AHEAD = 64  # steps that are queued before the host looks for errors and for Ctrl-C
_SECONDS_AHEAD = 0.05  # time that these steps may take
_SHORT_GAP = 4  # up to this many known tokens between two choices, single steps are cheaper than a pass


class Decoding:
    """Decodes a request with the fixed-shape step for its batch size."""

    def __init__(self, request: DecodeRequest, step: Step, passes: Passes, cache: Cache, device: Device) -> None:
        self.request, self.step, self.passes, self.cache, self.device = request, step, passes, cache, device
        self.size = Step.bytes(step.geometry, cache, device, step.batch)

    def run(self, progress: Callable[[int], None] | None, every: int) -> None:
        """Decodes into the request's sequences; arguments and errors as in `CudaEngine.decode`."""
        request = self.request
        self._hold(request.fed)  # later positions are overwritten, even if this is interrupted
        with self.device.memory_for("activations", self.size):
            self.step.begin(request)
        shown, ahead, since = 0, 1, time.perf_counter()  # steps that the caller has; steps until the next look
        try:
            for done in self._steps():
                report = progress is not None and done % every == 0
                if report or done - shown >= ahead or done == len(request.steps):
                    self._show(done)
                    now = time.perf_counter()
                    ahead = steps_ahead((now - since) / (done - shown))
                    shown, since = done, now
                if progress is not None and report:
                    progress(done)
                    since = time.perf_counter()
        finally:
            self.device.wait()  # queued work reads and writes the slots

    def _steps(self) -> Iterator[int]:
        """Queues one step after the other; yields the number queued so far."""
        fed = self.request.fed
        for done, length in enumerate(self.request.steps, 1):
            with self.device.memory_for("activations", self.size):
                self._next(fed, length)
            self._hold(length)
            fed = length
            yield done

    def _next(self, fed: int, length: int) -> None:
        """Chooses the token after the first ``length`` of each sequence; the slots hold ``fed`` positions."""
        step, n_unmasked = self.step, self.passes.geometry.n_unmasked
        start = min(fed, length - 1)  # the slots may hold all that is needed except the logits
        if start < n_unmasked:
            start = 0
        if length <= n_unmasked:  # tokens before the last one attend to it, too
            step.place(length - 1)
            step.choose(self._feed(0, length, "last"))
            return
        if step.position == start and length - 1 - start <= _SHORT_GAP:
            for position in range(start, length - 1):
                step.advance()
                self._hold(position + 1)
        elif start < length - 1:
            self._feed(start, length - 1, "none")
        if step.position != length - 1:
            step.place(length - 1)
        step.advance()

    def _feed(self, start: int, stop: int, logits: str) -> Tensor:
        return self.passes.feed_columns(self.step.sequence, self.request.slots, start, stop, logits)

    def _show(self, done: int) -> None:
        """Waits, and gives the caller the tokens of the steps done."""
        try:
            self.step.collect(self.request.sequences, self.request.steps[done - 1] + 1)
        except ValueError:
            self._hold(self.request.fed)  # a stand-in for the token that could not be chosen was fed
            raise

    def _hold(self, length: int) -> None:
        for slot in self.request.slots:
            self.cache.hold(slot, length)


class Guessing:
    """Decodes a request, whose first step follows the unmasked prefix, with a window over each sequence."""

    def __init__(self, request: DecodeRequest, window: Window, passes: Passes, cache: Cache, device: Device) -> None:
        self.request, self.window, self.passes, self.cache, self.device = request, window, passes, cache, device
        self.size = Step.bytes(window.geometry, cache, device, window.batch)

    def run(self, progress: Callable[[int], None] | None, every: int) -> None:
        """Decodes into the request's sequences; arguments and errors as in `CudaEngine.decode`."""
        steps, last = self.request.steps, self.request.steps[-1]
        self._hold([self.request.fed] * len(self.request.slots))
        with self.device.memory_for("activations", self.size):
            self.window.begin(self.request)
        self._feed_known()
        done, ahead, since = 0, 1, time.perf_counter()
        reached = [steps[0] - 1]
        try:
            while done < len(steps):
                ahead = min(ahead, last - min(reached))  # a pass takes every sequence one token further at least
                with self.device.memory_for("activations", self.size):
                    for _ in range(ahead):
                        self.window.advance()
                reached = self._show()
                now = time.perf_counter()
                ahead, since = steps_ahead((now - since) / ahead), now
                before, done = done, bisect_right(steps, min(reached))
                for step in range(before + 1, done + 1):
                    if progress is not None and step % every == 0:
                        progress(step)
                        since = time.perf_counter()
        finally:
            self.device.wait()  # queued work reads and writes the slots

    def _feed_known(self) -> None:
        """Feeds what the slots lack before the last known token."""
        first = self.request.steps[0] - 1
        start = min(self.request.fed, first)
        if start < self.passes.geometry.n_unmasked:
            start = 0
        if start < first:
            self.passes.feed_columns(self.window.tokens, self.request.slots, start, first, "none")

    def _show(self) -> list[int]:
        """Waits, gives the caller the known tokens, and returns the position of the last one in each sequence."""
        try:
            reached = self.window.reached()
        except ValueError:
            self._hold([self.request.fed] * len(self.request.slots))  # a stand-in for the missing token was fed
            raise
        self.window.collect_known(self.request.sequences)
        self._hold(reached)
        return reached

    def _hold(self, lengths: list[int]) -> None:
        for slot, length in zip(self.request.slots, lengths, strict=True):
            self.cache.hold(slot, length)


def steps_ahead(seconds: float) -> int:
    """How many steps of ``seconds`` each are queued before the host looks again."""
    return max(1, min(_MOST_STEPS_AHEAD, int(_SECONDS_AHEAD / max(seconds, 1e-9))))
