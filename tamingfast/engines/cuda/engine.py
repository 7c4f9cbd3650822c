"""The CUDA engine as its callers see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from tamingfast.engines.cuda.cache import Cache
from tamingfast.engines.cuda.decoding import Decoding, Guessing
from tamingfast.engines.cuda.device import Device, lasting_tensors
from tamingfast.engines.cuda.passes import Passes
from tamingfast.engines.cuda.step import Step
from tamingfast.engines.cuda.weights import Geometry, Weights
from tamingfast.engines.cuda.window import Window
from tamingfast.engines.networks import GPT2, Transformer, kind_of
from tamingfast.engines.request import Asked, DecodeRequest, Items, Span, check_range, spans_of
from tamingfast.errors import SettingError
from tamingfast.ops import backends
from tamingfast.ops.machine import dotted

WIDEST_HEAD = 256


class CudaEngine:
    """A copy of a GPT's weights on its device and a cache of keys and values in slots, one sequence each.

    Weights, activations and cache have the engine's type; residuals, sums, norms and softmax are float32. One thread
    works at a time; others wait. Work is queued on the current stream, after all earlier work of the engine.

    Args:
        gpt: on a CUDA device, of any floating-point type; its weights are copied.
        dtype: one of `DTYPES`.
        kernels: the module with the kernels' functions; default: the extension's.

    Attributes:
        device: of the weights, the cache and the results.

    Raises:
        ValueError: an unknown dtype, or parameters of other shapes than the GPT's config says.
        RuntimeError: the engine cannot run this GPT, see `refusal`; or a kernel could not be launched, with its name.
        MemoryError: the weights do not fit; the message states the bytes needed.
    """

    DTYPES: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    MEASURES_PASSES: ClassVar[bool] = False
    GUIDES: ClassVar[bool] = False

    @staticmethod
    def refusal(gpt: Transformer) -> str | None:
        """Why the engine cannot run this GPT, whose parameters are on a CUDA device, or None when it can."""
        state = backends.cuda()
        if not state.available:
            return state.reason
        if kind_of(gpt.config) != GPT2:
            return "its kernels are those of GPT2, and this transformer has other norms, activations or positions"
        capability = torch.cuda.get_device_capability(next(gpt.parameters()).device)
        if capability < backends.OLDEST_CUDA:
            oldest = dotted(backends.OLDEST_CUDA)
            return f"its kernels need compute capability {oldest}, and this device has {dotted(capability)}"
        head = gpt.config.n_embd // gpt.config.n_head
        if head > WIDEST_HEAD:
            return f"its kernels support heads up to {WIDEST_HEAD} wide, and these are {head} wide"
        return None

    def __init__(self, gpt: Transformer, dtype: str = "float32", kernels: ModuleType | None = None) -> None:
        if dtype not in self.DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(self.DTYPES)}")
        if kernels is None:
            module, _ = backends.native()
            reason = self.refusal(gpt)
            if module is None or reason is not None:
                raise SettingError(
                    f"engine: got a transformer that the CUDA engine cannot run ({reason}), expected one that it can"
                )
            kernels = module.cuda
        self.dtype = dtype
        self.vocab_size = gpt.config.vocab_size
        self.device = next(gpt.parameters()).device
        self._device = Device(self.device, dtype, kernels)
        self._geometry = Geometry.of(gpt)
        size = sum(value.numel() for value in gpt.parameters()) * self._device.number.itemsize
        with self._device.queueing(()), self._device.memory_for("weights", size), lasting_tensors():
            weights = Weights(gpt, self._device.number)
        cache = Cache(self._geometry, self._device)
        self._parts: _Parts | None = _Parts(weights, cache, Passes(self._geometry, weights, cache, self._device))

    def reserve(self, slots: int, length: int) -> None:
        """Replaces the cache with one of ``slots`` empty slots of ``length`` positions.

        Raises ValueError for sizes out of range. Raises MemoryError, with the bytes needed, and keeps the old cache if
        the new one does not fit.
        """
        with self._turn() as parts:
            parts.cache.reserve(slots, length)
            parts.steps.clear()  # they refer to the old cache
            parts.windows.clear()

    def length(self, slot: int) -> int:
        """The number of valid positions of the slot."""
        with self._alone() as parts:
            return parts.cache.length(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Drops the slot's positions from ``length`` on."""
        with self._alone() as parts:
            parts.cache.truncate(slot, length)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Copies the first ``length`` (default: all) positions of slot ``source`` into slot ``target``."""
        with self._turn() as parts:
            parts.cache.copy(source, target, length)

    def step(self, items: Items, logits: Asked = "last") -> Tensor:
        """Feeds tokens to slots; arguments, result and errors are those of `tamingfast.engines.cpu.GPTEngine.step`.

        The result is on the engine's device.
        """
        tokens, spans = spans_of(items)
        with self._turn() as parts:
            parts.cache.room.check_step(tokens, spans, logits)
            parts.cache.room.check_tokens(tokens)
            return parts.passes.feed(tokens.to(self.device), spans, logits)

    def feed(self, tokens: Tensor, spans: Sequence[Span], logits: Asked = "last") -> Tensor:
        """As `step`; ``tokens`` is int64 (T,), those of all spans one after the other.

        They must lie in the vocabulary. This is not checked, because the host would have to wait for the device.
        """
        with self._turn() as parts:
            parts.cache.room.check_step(tokens, spans, logits)
            return parts.passes.feed(tokens.to(self.device), list(spans), logits)

    def decode(self, request: DecodeRequest, progress: Callable[[int], None] | None = None, every: int = 1) -> None:
        """Decodes the requested tokens and writes them into ``request.sequences``, on the engine's device.

        Arguments and errors are those of `tamingfast.engines.cpu.GPTEngine.decode`. The host waits only before it calls
        ``progress``, every 50 ms or 64 steps, and at the end. Every slot is fed at every step, even where the token is
        not wanted. Tokens are guessed only if ``lookahead`` is a number, as what passes cost is not known. There is no
        guidance (ValueError).
        """
        check_range("every", every, 1)
        if request.second is not None:
            raise ValueError("second: got second sequences, expected None; feed both and choose from their logits")
        with self._turn() as parts:
            request.check_fits(parts.cache.room, self.device)
            if not request.slots or not request.steps:
                return
            width = min(request.lookahead or 1, request.steps[-1] - request.steps[0] + 1)
            if width > 1 and request.steps[0] > self._geometry.n_unmasked:
                window = self._window_of(parts, len(request.slots), width)
                Guessing(request, window, parts.passes, parts.cache, self._device).run(progress, every)
            else:
                step = self._step_of(parts, len(request.slots))
                Decoding(request, step, parts.passes, parts.cache, self._device).run(progress, every)

    def info(self) -> dict[str, int]:
        """weight_bytes (read for every token), cache_bytes, slots, capacity (positions of a slot)."""
        with self._alone() as parts:
            return {
                "weight_bytes": parts.weights.matrix_bytes(), "cache_bytes": parts.cache.tensor.nbytes,
                "slots": parts.cache.room.slots, "capacity": parts.cache.capacity,
            }  # fmt: skip

    def close(self) -> None:
        """Frees the memory; every later call raises ValueError."""
        with self._turn():
            self._device.wait()
            self._parts = None

    def _step_of(self, parts: _Parts, batch: int) -> Step:
        """The step for ``batch`` sequences, made when it is first needed."""
        if batch not in parts.steps:
            size = Step.bytes(self._geometry, parts.cache, self._device, batch)
            with self._device.memory_for("activations", size):
                parts.steps[batch] = Step(self._geometry, parts.weights, parts.cache, self._device, batch)
        return parts.steps[batch]

    def _window_of(self, parts: _Parts, batch: int, width: int) -> Window:
        """The step for ``width`` rows of each of ``batch`` sequences, made when it is first needed."""
        if (batch, width) not in parts.windows:
            size = Step.bytes(self._geometry, parts.cache, self._device, batch * width)
            with self._device.memory_for("activations", size):
                parts.windows[batch, width] = Window(
                    self._geometry, parts.weights, parts.cache, self._device, batch, width
                )
        return parts.windows[batch, width]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[_Parts]:
        """Makes other threads wait; raises ValueError if the engine is closed."""
        with self._device.alone():
            if self._parts is None:
                raise ValueError("the engine is closed")
            yield self._parts

    @contextlib.contextmanager
    def _turn(self) -> Iterator[_Parts]:
        """As `_alone`; work queued inside follows all earlier work of the engine."""
        with self._alone() as parts, self._device.queueing(parts.tensors()):
            yield parts


@dataclass
class _Parts:
    """What an engine holds until it is closed. No part refers to the engine, so it is freed with its last reference."""

    weights: Weights
    cache: Cache
    passes: Passes
    steps: dict[int, Step] = field(default_factory=dict)  # by the number of sequences
    windows: dict[tuple[int, int], Window] = field(default_factory=dict)  # by the number of sequences, and rows of each

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that outlive a call."""
        yield self.cache.tensor
        yield from self.weights.tensors()
        for step in (*self.steps.values(), *self.windows.values()):
            yield from step.tensors()
