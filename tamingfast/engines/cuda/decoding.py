"""One call of `decode`: the order in which tokens are fed, chosen and shown to the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from tamingfast.engines.cuda.cache import Cache
from tamingfast.engines.cuda.device import Device
from tamingfast.engines.cuda.passes import Passes
from tamingfast.engines.cuda.step import Step
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


def steps_ahead(seconds: float) -> int:
    """How many steps of ``seconds`` each are queued before the host looks again."""
    return max(1, min(_MOST_STEPS_AHEAD, int(_SECONDS_AHEAD / max(seconds, 1e-9))))
