"""Chooses the engine that runs a GPT, and keeps engines with their GPT from call to call.

A GPT's device decides: `GPTEngine` on the CPU, `CudaEngine` on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamingfast.engines.cpu import GPTEngine
from tamingfast.engines.cuda import CudaEngine
from tamingfast.engines.layers import altered
from tamingfast.engines.networks import Transformer
from tamingfast.ops import backends

Engine = GPTEngine | CudaEngine
#: The engines by type of device.
ENGINES: dict[str, type[GPTEngine] | type[CudaEngine]] = {"cpu": GPTEngine, "cuda": CudaEngine}
#: 64-bit words of a parameter that one sum stands for: odd and few, so that values that change places are noticed.
_SUMMED = 31
_SMALL = 4096  # elements


def refusal(gpt: Transformer) -> str | None:
    """Why no engine can run this GPT on its device, or None when one can."""
    device = _device_type(gpt)
    if device not in ENGINES:
        return f"it runs on CPUs and CUDA devices, and the transformer is on {device}"
    return ENGINES[device].refusal(gpt) or altered(gpt)


def dtypes(gpt: Transformer) -> tuple[str, ...]:
    """The weight dtypes that the engine for the GPT's device offers."""
    device = _device_type(gpt)
    return ENGINES[device].DTYPES if device in ENGINES else ()


def measures_passes(gpt: Transformer) -> bool:
    """Whether the engine for the GPT's device knows what passes cost, so that it can choose how far to look ahead."""
    return ENGINES[_device_type(gpt)].MEASURES_PASSES


def guides(gpt: Transformer) -> bool:
    """Whether `decode` of the engine for the GPT's device has classifier-free guidance."""
    return ENGINES[_device_type(gpt)].GUIDES


@contextlib.contextmanager
def borrowed_engine(gpt: Transformer, dtype: str, slots: int, length: int, drafts: bool = False) -> Iterator[Engine]:
    """An engine for this GPT, for the caller alone, with at least ``slots`` empty slots of ``length`` positions.

    With ``drafts``, on a CPU, it has an int8 copy that guesses; see `GPTEngine`. The engine is kept with the GPT
    afterwards, so that weights are packed again only after they have changed. Raises what the engine's constructor and
    `reserve` raise.
    """
    state = Snapshot(list(gpt.parameters()))
    kept = _kept.setdefault(gpt, {})
    known = kept.pop(dtype, None)
    if known is not None and known.state == state and known.drafts == drafts:
        engine = known.engine
    else:
        if known is not None:
            known.engine.close()  # before its successor needs the memory
        engine = GPTEngine(gpt, dtype, drafts=True) if drafts else ENGINES[_device_type(gpt)](gpt, dtype)
    room = engine.info()
    if room["slots"] < slots or room["capacity"] < length:
        engine.reserve(max(slots, 1), length)
    for slot in range(slots):
        engine.truncate(slot, 0)
    try:
        yield engine
    finally:
        kept[dtype] = _Kept(state, engine, drafts)


class Snapshot:
    """The state of parameters at one time; two snapshots are equal if nothing was written between them.

    A write by torch to a parameter, or to a detached view of it, changes the parameter's version; a tensor that
    replaces it has another address. Writes through `.data`, NumPy, DLPack or an extension change neither, but the sums
    of the bits, which are read at the speed of memory.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        # Inference tensors have no version.
        versions = [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in values]
        self.identity = (backends.isa(), values[0].device, values[0].dtype, *versions)
        with torch.no_grad():
            small = [value.flatten() for value in values if value.numel() < _SMALL]
            parts = [torch.cat(small)] if small else []  # one operation instead of one per parameter
            parts += [value.detach() for value in values if value.numel() >= _SMALL]
            self.sums = torch.cat([_sums(part) for part in parts])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return self.identity == other.identity and torch.equal(self.sums, other.sums)


def _sums(value: Tensor) -> Tensor:
    """Sums of a tensor's bits as 64-bit integers, each over `_SUMMED` of them; int64 (n,)."""
    flat = value.contiguous().flatten()
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    content = flat.view(torch.uint8)
    words = content[: content.numel() // 8 * 8].view(torch.int64)
    rows = words[: words.numel() // _SUMMED * _SUMMED].view(-1, _SUMMED)
    return torch.cat([rows.sum(1), words[rows.numel() :], content[8 * words.numel() :].long()])


@dataclass(frozen=True)
class _Kept:
    """An idle engine, the state of its GPT when the engine was made, and whether it was made with drafts."""

    state: Snapshot
    engine: Engine
    drafts: bool


_kept: weakref.WeakKeyDictionary[Transformer, dict[str, _Kept]] = weakref.WeakKeyDictionary()


def _device_type(gpt: Transformer) -> str:
    return next(gpt.parameters()).device.type
