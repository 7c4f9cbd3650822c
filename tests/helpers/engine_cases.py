"""Engines of small transformers on every device, and the calls that the tests of both engines share."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import on_host
from torch import Tensor

from tamingfast.engines import CudaEngine, DecodeRequest, Engine, GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops.choice import Choice

#: Batch sizes: for one or few sequences, our GPU kernels stream the weights; for many, torch multiplies matrices.
BATCHES = [1, 3, 10]
#: Largest error of the CUDA engine's logits by its type, relative to their norm.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}
_CHOICE = ("temperature", "top_k", "top_p", "greedy", "seed")


class HostEngine(CudaEngine):
    """The CUDA engine with its kernels built for the CPU."""

    def __init__(self, gpt: GPT, dtype: str = "float32") -> None:
        super().__init__(gpt, dtype, on_host.module())

    @staticmethod
    def refusal(gpt: GPT) -> str | None:
        return None


class Place:
    """Where a CUDA engine runs: "cuda", or "cpu" with the kernels built for the host."""

    def __init__(self, device: str) -> None:
        self.device = device

    def engine(self, gpt: GPT, dtype: str = "float32", slots: int = 3, length: int | None = None) -> CudaEngine:
        made = (CudaEngine if self.device == "cuda" else HostEngine)(copy.deepcopy(gpt).to(self.device), dtype)
        made.reserve(slots, length or gpt.block_size)
        return made


def cpu_engine(gpt: GPT, dtype: str = "float32", threads: int | None = None, slots: int = 3) -> GPTEngine:
    """A CPU engine with room for whole sequences."""
    made = GPTEngine(gpt, dtype, threads)
    made.reserve(slots, gpt.block_size)
    return made


def request(sequences: Tensor, steps: Iterable[int], **options) -> DecodeRequest:
    """A request for the first slots; ``options`` are the fields of `DecodeRequest` and of `Choice` together."""
    choice = Choice(**{name: options.pop(name) for name in _CHOICE if name in options})
    slots = options.pop("slots", range(len(sequences)))
    return DecodeRequest(slots=slots, sequences=sequences, steps=steps, choice=choice, **options)


def decoded(engine: Engine, sequences: Tensor, steps: Iterable[int], **options) -> Tensor:
    """A copy of ``sequences`` after decoding in the first slots, on the CPU."""
    sequences = sequences.to(getattr(engine, "device", "cpu"), copy=True)
    engine.decode(request(sequences, steps, **options))
    return sequences.cpu()
