"""Launches in Triton's interpreter, which follows any address: here each that a kernel reads or writes is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

#: Bytes around each tensor of a launch, so that whoever leaves one tensor does not arrive in another.
_GAP = 1 << 20


class _Copy:
    """A tensor's elements, and the memory between them, in a place of their own."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.width = name, tensor.element_size()
        sizes, strides = tensor.shape, tensor.stride()
        count = (
            1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if tensor.numel() else 0
        )
        self._original = tensor.detach().as_strided((count,), (1,)).view(torch.uint8) if count else None
        self._buffer = np.empty(2 * _GAP + count * self.width, np.uint8)  # untouched memory costs nothing
        self._bytes = torch.from_numpy(self._buffer[_GAP : _GAP + count * self.width])
        if self._original is not None:
            self._bytes.copy_(self._original)
        self._before = self._bytes.clone()
        self.tensor = self._bytes.view(tensor.dtype).as_strided(sizes, strides)
        self.start, self.end = self._bytes.data_ptr(), self._bytes.data_ptr() + count * self.width
        self.elements = np.zeros(count, bool)  # those of the tensor, not between them
        np.lib.stride_tricks.as_strided(self.elements, sizes, strides)[...] = True

    def give_back(self) -> None:
        """Writes what has changed to the original."""
        changed = self._bytes != self._before
        if self._original is not None and changed.any():
            self._original[changed] = self._bytes[changed]


class _Memory:
    """In place of the interpreter's functions: those that have an address, checked first."""

    def __init__(self, functions: ModuleType) -> None:
        self._functions, self.kernel = functions, ""
        self.copies: list[_Copy] = []

    def __getattr__(self, name: str):
        return getattr(self._functions, name)

    def load(self, addresses, mask, other, dtype):
        self._check("reads", addresses[mask], np.dtype(dtype).itemsize)
        return self._functions.load(addresses, mask, other, dtype)

    def store(self, addresses, values, mask):
        self._check("writes", addresses[mask], values.itemsize)
        return self._functions.store(addresses, values, mask)

    def atomic_rmw(self, operation, addresses, values, mask, order):
        self._check("adds to", addresses[mask], values.itemsize)
        return self._functions.atomic_rmw(operation, addresses, values, mask, order)

    def atomic_cas(self, addresses, expected, values, order):
        self._check("exchanges", addresses, values.itemsize)
        return self._functions.atomic_cas(addresses, expected, values, order)

    def _check(self, what: str, addresses: np.ndarray, width: int) -> None:
        """One instruction's addresses must be those of elements of one tensor."""
        if not addresses.size or not self.copies:  # without copies, the launch is that of another guard
            return
        lowest, highest = int(addresses.min()), int(addresses.max())
        nearest = min(self.copies, key=lambda copy: max(copy.start - lowest, lowest - copy.end, 0))
        does = f"{self.kernel} {what} {nearest.name}"
        for address in (lowest, highest):
            at = (address - nearest.start) // nearest.width
            if not nearest.start <= address < nearest.end:
                raise AssertionError(f"{does} at element {at}, and it has {len(nearest.elements)}")
        index, beside = np.divmod(addresses.astype(np.int64) - nearest.start, nearest.width)
        if width != nearest.width or beside.any() or not nearest.elements[index].all():
            raise AssertionError(f"{does} between its elements")


@contextlib.contextmanager
def guarded(common: ModuleType) -> Iterator[None]:
    """Launches of ``common`` (kernels/common.py) fail if they leave a tensor, or touch what lies between its elements.

    A kernel works on copies of its tensors, of which no two touch.
    """
    from triton.runtime import interpreter  # only where there is Triton

    memory, run = _Memory(interpreter._interpreter), common._run

    def guarded_run(kernel, grid, config, arguments):
        copies = {name: _Copy(name, value) for name, value in arguments.items() if isinstance(value, Tensor)}
        memory.kernel, memory.copies = kernel.__name__, list(copies.values())
        try:
            run(kernel, grid, config, {**arguments, **{name: copy.tensor for name, copy in copies.items()}})
        finally:
            memory.copies = []
        for copy in copies.values():
            copy.give_back()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", memory)
        patch.setattr(common, "_run", guarded_run)
        yield
