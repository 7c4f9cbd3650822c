"""Chooses the engine that runs a GPT, and keeps engines with their GPT from call to call.

A GPT's device decides: `GPTEngine` on the CPU, `CudaEngine` on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tamingfast.engines.cpu import GPTEngine
from tamingfast.engines.cuda import CudaEngine
from tamingfast.engines.networks import Transformer
from tamingfast.ops import backends

Engine = GPTEngine | CudaEngine
#: The engines by type of device.
ENGINES: dict[str, type[GPTEngine] | type[CudaEngine]] = {"cpu": GPTEngine, "cuda": CudaEngine}
#: Only a sample of the elements is compared if a parameter has at least twice as many as this.
_SAMPLED = 512


def refusal(gpt: Transformer) -> str | None:
    """Why no engine can run this GPT on its device, or None when one can."""
    device = _device_type(gpt)
    if device not in ENGINES:
        return f"it runs on CPUs and CUDA devices, and the transformer is on {device}"
    return ENGINES[device].refusal(gpt)


def dtypes(gpt: Transformer) -> tuple[str, ...]:
    """The weight dtypes that the engine for the GPT's device offers."""
    device = _device_type(gpt)
    return ENGINES[device].DTYPES if device in ENGINES else ()


@contextlib.contextmanager
def borrowed_engine(gpt: Transformer, dtype: str, slots: int, length: int) -> Iterator[Engine]:
    """An engine for this GPT, for the caller alone, with at least ``slots`` empty slots of ``length`` positions.

    It is kept with the GPT afterwards, so that weights are packed again only after they have changed. Raises what the
    engine's constructor and `reserve` raise.
    """
    state = Snapshot(gpt)
    kept = _kept.setdefault(gpt, {})
    known = kept.pop(dtype, None)
    if known is not None and known.state == state:
        engine = known.engine
    else:
        if known is not None:
            known.engine.close()  # before its successor needs the memory
        engine = ENGINES[_device_type(gpt)](gpt, dtype)
    room = engine.info()
    if room["slots"] < slots or room["capacity"] < length:
        engine.reserve(max(slots, 1), length)
    for slot in range(slots):
        engine.truncate(slot, 0)
    try:
        yield engine
    finally:
        kept[dtype] = _Kept(state, engine)


class Snapshot:
    """The state of a module's parameters at one time; two snapshots are equal if no write between them is noticed.

    A write by torch to a parameter, or to a detached view of it, changes the parameter's version; a tensor that
    replaces it has another address. Writes through `.data`, NumPy, DLPack or an extension change neither. They are
    noticed only if they change an element that is compared bit by bit: every element of a parameter with fewer than
    1024, and 512 to 1023 evenly spaced elements of a larger one.
    """

    def __init__(self, module: torch.nn.Module | Transformer) -> None:
        values = list(module.parameters())
        # Inference tensors have no version.
        versions = [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in values]
        self.identity = (backends.isa(), values[0].device, values[0].dtype, *versions)
        with torch.no_grad():  # one concatenation instead of a comparison per parameter
            parts = [value.flatten()[:: max(1, value.numel() // _SAMPLED)] for value in values]
            self.sample = torch.cat(parts).view(torch.uint8)  # as bytes NaN equals itself

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return self.identity == other.identity and torch.equal(self.sample, other.sample)


@dataclass(frozen=True)
class _Kept:
    """An idle engine, and the state of its GPT when the engine was made."""

    state: Snapshot
    engine: Engine


_kept: weakref.WeakKeyDictionary[Transformer, dict[str, _Kept]] = weakref.WeakKeyDictionary()


def _device_type(gpt: Transformer) -> str:
    return next(gpt.parameters()).device.type
