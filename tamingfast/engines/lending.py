"""Which engine runs a GPT, and engines that are kept with it from call to call.

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
#: By the type of device.
ENGINES: dict[str, type[GPTEngine] | type[CudaEngine]] = {"cpu": GPTEngine, "cuda": CudaEngine}
#: A parameter of at least twice as many elements is compared by a sample of them.
_SAMPLED = 512


def refusal(gpt: Transformer) -> str | None:
    """Why no engine can run this GPT on its device, or None when one can."""
    device = _device_type(gpt)
    if device not in ENGINES:
        return f"it runs on CPUs and CUDA devices, and the transformer is on {device}"
    return ENGINES[device].refusal(gpt)


def dtypes(gpt: Transformer) -> tuple[str, ...]:
    """The types of weights that the engine of the GPT's device offers."""
    device = _device_type(gpt)
    return ENGINES[device].DTYPES if device in ENGINES else ()


@contextlib.contextmanager
def borrowed_engine(gpt: Transformer, dtype: str, slots: int, length: int) -> Iterator[Engine]:
    """An engine of this GPT with at least that many slots of ``length`` positions, all empty, for the caller alone.

    It is kept with the GPT afterwards, so that weights are packed again only after they have changed. Raises as the
    engine's constructor and `reserve` do.
    """
    state = _Snapshot(gpt)
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


class _Snapshot:
    """The state of a GPT's parameters at one time; equal to that of another time as long as no write is noticed.

    A write by torch to a parameter, or to what `detach` makes of it, changes its version, and another tensor in its
    place has another address. Writes through `.data`, NumPy, DLPack or an extension change neither; they are noticed
    if they change one of the elements that are compared bit by bit: all of a parameter with fewer than 1024, and 512
    to 1023 of a larger one, evenly spaced.
    """

    def __init__(self, gpt: Transformer) -> None:
        values = list(gpt.parameters())
        # Inference tensors have no version.
        versions = [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in values]
        self.identity = (backends.isa(), values[0].device, values[0].dtype, *versions)
        with torch.no_grad():  # one concatenation instead of a comparison per parameter
            parts = [value.flatten()[:: max(1, value.numel() // _SAMPLED)] for value in values]
            self.sample = torch.cat(parts).view(torch.uint8)  # as bytes NaN equals itself

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Snapshot):
            return NotImplemented
        return self.identity == other.identity and torch.equal(self.sample, other.sample)


@dataclass(frozen=True)
class _Kept:
    """An engine that nobody uses now, and the state of its GPT when the engine was made."""

    state: _Snapshot
    engine: Engine


_kept: weakref.WeakKeyDictionary[Transformer, dict[str, _Kept]] = weakref.WeakKeyDictionary()


def _device_type(gpt: Transformer) -> str:
    return next(gpt.parameters()).device.type
