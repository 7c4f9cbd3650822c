"""An engine's device: one thread at a time, order across streams, kernel launches, memory errors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import torch
from torch import Tensor

#: Most rows of the "linear" kernel (kMostLinearRows in csrc/cuda/kernels.h), whose cost is reading the weights.
FEW = 8
#: Elements that a kernel reads at a time.
VECTOR = 8


class Device:
    """Kernels for one dtype on one torch device, for one thread at a time.

    Work is queued on the caller's current stream, after all earlier work of this object, on whichever stream that was.
    The CPU takes the place of a GPU where the kernels are built for it, as tests do.

    Args:
        place: where the tensors are.
        dtype: type of weights, activations and cache.
        kernels: the module with the kernels' functions.
    """

    def __init__(self, place: torch.device, dtype: str, kernels: ModuleType) -> None:
        self.place, self.kernels = place, kernels
        self.dtype = dtype
        self.number: torch.dtype = getattr(torch, dtype)
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that holds the lock
        self._streams: set[torch.cuda.Stream] = set()  # those that have used the engine's tensors
        self._done: torch.cuda.Event | None = None  # follows all queued work; None on the CPU
        if place.type == "cuda":
            self._done = self._stream().record_event()
            self._streams.add(self._stream())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Makes other threads wait; RuntimeError if this thread is inside already, as in a callback."""
        if self._owner == threading.get_ident():
            raise RuntimeError("the engine is working: a callback cannot use it")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    @contextlib.contextmanager
    def queueing(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Orders work queued inside after all earlier work of the engine; ``tensors`` are those of the engine."""
        with torch.no_grad(), torch.autocast(self.place.type, enabled=False):
            if self._done is None:
                yield
                return
            with torch.cuda.device(self.place):
                stream = self._stream()
                stream.wait_event(self._done)
                self._streams.add(stream)
                if len(self._streams) > 1:
                    for tensor in tensors:
                        tensor.record_stream(stream)  # torch does not reuse its memory while this stream needs it
                try:
                    yield
                finally:
                    self._done.record(stream)

    def wait(self) -> None:
        """Waits until all work queued on the current stream is done."""
        if self._done is not None:
            self._stream().synchronize()

    def launch(
        self, kernel: str, sized: Tensor, dtype: str | None = None, **arguments: Tensor | float | str | None
    ) -> None:
        """Launches a kernel for the rows of ``sized``; tensors are passed as addresses, None as the null pointer."""
        if sized.shape[0] == 0:
            return
        rows, width = sized.shape
        values: dict[str, float | str] = {"rows": rows, "width": width, "dtype": dtype or self.dtype}
        for name, value in arguments.items():
            values[name] = 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value
        stream = 0 if self._done is None else self._stream().cuda_stream
        getattr(self.kernels, kernel)(device=self.place.index or 0, stream=stream, **values)

    @contextlib.contextmanager
    def memory_for(self, what: str, size: int) -> Iterator[None]:
        """Raises MemoryError, with the bytes that ``what`` needs, if torch runs out of memory inside."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is a subclass; the CPU's is a plain RuntimeError
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            message = f"{what}: {size} bytes are needed"
            if self.place.type == "cuda":
                message += f", but only {torch.cuda.mem_get_info(self.place)[0]} bytes are free on {self.place}"
            raise MemoryError(message) from error

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.place)


class _CaptureStreams(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, torch.cuda.Stream] = {}


_capture_streams = _CaptureStreams()


def capture_stream(place: torch.device) -> torch.cuda.Stream:
    """The calling thread's stream for graph capture, always the same: torch keeps a workspace per stream for good."""
    streams = _capture_streams.by_device
    if place not in streams:
        streams[place] = torch.cuda.Stream(place, priority=-1)  # from torch's high-priority pool, which few others use
    return streams[place]


@contextlib.contextmanager
def lasting_tensors() -> Iterator[None]:
    """Tensors made inside can be written to later, inside and outside of `torch.inference_mode`."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Replayed:
    """Work of fixed shape, in memory at fixed addresses, which is queued again and again.

    A thread's first run is only queued, because libraries initialise in it; its second is captured as a graph, and from
    then on every run, in whichever thread, replays that. A thread queues and captures on the same stream of its own:
    torch keeps the workspace of its matrix products per thread and stream, so the workspace exists before the capture
    and does not become part of the graph's own memory.

    Args:
        place: where; without a GPU there are no graphs, and every run queues.
    """

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._replay: Callable[[], None] | None = None
        self._warm = _Warm()

    def run(self, queue: Callable[[], None]) -> None:
        """Queues the work on the current stream, as ``queue`` does."""
        if self._place.type != "cuda":
            queue()
        elif self._replay is not None:
            self._replay()
        elif self._warm.here:
            with _on_capture_stream(self._place) as stream:
                self._replay = _captured(queue, stream)
            self._replay()
        else:
            with _on_capture_stream(self._place):
                queue()
            self._warm.here = True


class _Warm(threading.local):
    here = False  # whether the work has run in this thread


@contextlib.contextmanager
def _on_capture_stream(place: torch.device) -> Iterator[torch.cuda.Stream]:
    """Makes the thread's capture stream the current one; it follows the caller's, and the caller's follows it."""
    current, stream = torch.cuda.current_stream(place), capture_stream(place)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield stream
    finally:
        current.wait_stream(stream)


def _captured(queue: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Captures what ``queue`` queues; returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    # torch fills tensors of its own whenever it replays a graph, in or out of inference mode; and other threads may
    # allocate meanwhile.
    with lasting_tensors(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        queue()
    return graph.replay
