"""Keys and values of a GPT in slots, and the kernels that read and write them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tamingfast.engines.cuda.device import FEW, Device, lasting_tensors
from tamingfast.engines.cuda.weights import Geometry
from tamingfast.engines.networks import LayerCache
from tamingfast.engines.request import Room, check_reserve
from tamingfast.kernels.device import multiprocessors

_POSITIONS_PER_BLOCK = 64  # fewest positions per block of attention; kLeast in csrc/cuda/attention.cu
_BLOCKS_AT_ONCE = 4  # blocks of attention per multiprocessor; at most kResident in that file


@dataclass(frozen=True)
class Split:
    """Scratch memory for attention whose positions are split over several blocks."""

    splits: int
    partial: Tensor | None = None  # float32 (rows, heads, splits, stride + 2): the blocks' results
    arrived: Tensor | None = None  # int32 (rows, heads): how many blocks have finished; 0 between launches

    def tensors(self) -> Iterator[Tensor]:
        """Its tensors."""
        yield from (tensor for tensor in (self.partial, self.arrived) if tensor is not None)


class Cache:
    """Slots of keys and values, and the number of valid positions of each.

    Attributes:
        layers: the keys and the values of each layer, (slots, heads, capacity, stride) of the engine's type. A position
            is padded with zeros from the head's width to `Geometry.stride`.
        room: checks arguments against the size of the cache.
    """

    def __init__(self, geometry: Geometry, device: Device) -> None:
        self.geometry, self.device = geometry, device
        self._install(torch.empty(0, dtype=device.number, device=device.place), 0, 0)

    def _install(self, tensor: Tensor, slots: int, capacity: int) -> None:
        self.tensor = tensor
        with lasting_tensors():
            self.layers: list[LayerCache] = [(keys, values) for keys, values in tensor]
        self._lengths = [0] * slots
        geometry = self.geometry
        self.room = Room(geometry.vocab_size, slots, capacity, self._lengths.__getitem__, geometry.n_unmasked)

    @property
    def capacity(self) -> int:
        """Positions of a slot."""
        return self.room.capacity

    def reserve(self, slots: int, length: int) -> None:
        """Replaces the cache with an empty one; a MemoryError, with the bytes needed, keeps the old one."""
        geometry, number = self.geometry, self.device.number
        check_reserve(slots, length, geometry.block_size)
        shape = (geometry.layers, 2, slots, geometry.heads, length, geometry.stride)
        with self.device.memory_for("cache", math.prod(shape) * number.itemsize), lasting_tensors():
            tensor = torch.zeros(shape, dtype=number, device=self.device.place)
        self._install(tensor, slots, length)

    def length(self, slot: int) -> int:
        """The number of valid positions of the slot."""
        self.room.check_slot("slot", slot)
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Drops the slot's positions from ``length`` on."""
        self.room.check_slot("slot", slot)
        self.room.check_length(slot, length)
        self._lengths[slot] = length

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Copies the first ``length`` (default: all) positions of slot ``source`` into slot ``target``."""
        self.room.check_slot("source", source)
        self.room.check_slot("target", target)
        length = self._lengths[source] if length is None else length
        self.room.check_length(source, length)
        if source != target:
            self.tensor[:, :, target, :, :length] = self.tensor[:, :, source, :, :length]
        self._lengths[target] = length

    def hold(self, slot: int, length: int) -> None:
        """Marks the first ``length`` positions of the slot as valid, and no others."""
        self._lengths[slot] = length

    # --- attention ------------------------------------------------------------------------------------

    def append(self, layer: LayerCache, qkv: Tensor, slot: Tensor, position: Tensor) -> None:
        """Writes the keys and values of rows ``qkv`` (R, 3 * width) at int32 (R,) slots and positions."""
        keys, values = layer
        self.device.launch(
            "append", qkv, width=self.geometry.head, qkv=qkv, ldq=qkv.stride(0), slot=slot, position=position,
            heads=self.geometry.heads, stride=self.geometry.stride, capacity=self.capacity, keys=keys, values=values,
        )  # fmt: skip

    def attend(
        self,
        layer: LayerCache,
        qkv: Tensor,
        out: Tensor,
        slot: Tensor,
        position: Tensor,
        last: Tensor,
        split: Split,
        append: bool,
    ) -> None:
        """Attention of each row ``qkv`` (R, 3 * width) over its slot's positions up to ``last``, to ``out`` (R, width).

        ``slot``, ``position`` and ``last`` are int32 (R,); with ``append`` the rows' own keys and values are written
        first.
        """
        keys, values = layer
        self.device.launch(
            "attention", qkv, width=self.geometry.head, qkv=qkv, ldq=qkv.stride(0), slot=slot, position=position,
            last=last, append=append, out=out, ldo=out.stride(0), splits=split.splits, partial=split.partial,
            arrived=split.arrived, heads=self.geometry.heads, stride=self.geometry.stride, capacity=self.capacity,
            keys=keys, values=values,
        )  # fmt: skip

    def split(self, rows: int, longest: int) -> Split:
        """Memory for the attention of that many rows, which see up to ``longest`` positions."""
        splits, heads, place = self._splits(rows, longest), self.geometry.heads, self.device.place
        if splits == 1:
            return Split(1)
        partial = torch.empty(rows, heads, splits, self.geometry.stride + 2, dtype=torch.float32, device=place)
        return Split(splits, partial, torch.zeros(rows, heads, dtype=torch.int32, device=place))

    def _splits(self, rows: int, longest: int) -> int:
        """Blocks that share the positions of a row and head.

        Up to `FEW` rows get one block per `_POSITIONS_PER_BLOCK` positions, so that results depend neither on the
        number of rows nor on the device; more rows get enough blocks to fill the device.
        """
        most = math.ceil(longest / _POSITIONS_PER_BLOCK)
        if rows <= FEW:
            return most
        fill = _BLOCKS_AT_ONCE * multiprocessors(self.device.place) // (rows * self.geometry.heads)
        return max(1, min(fill, most))
