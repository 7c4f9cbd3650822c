"""Feature maps of the CPU engine: (images, rows, columns, channels), with the moments of their channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tamingfast.engines.feature_maps import FeatureMaps, ScratchMap
from tamingfast.engines.layers import Shape

#: Channels of a map that is normalised are a multiple of this, the longest vector of the instruction sets.
LANES = 16


class Map:
    """A feature map of several images, written in bands, with the moments of its channels.

    Attributes:
        shape: channels, height, width.
        moments: float32 (images, blocks, 3, channels), see csrc/cpu/convolution.h; None if no norm can follow.
        blocks: (rows, columns) of the blocks of which they are the moments.
    """

    moments: Tensor | None = None
    blocks: tuple[int, int] = (1, 1)

    def __init__(self, images: int, shape: Shape) -> None:
        self.images, self.shape = images, shape

    def measure(self, blocks: tuple[int, int]) -> Tensor | None:
        """Room for the moments of blocks of this size."""
        channels, height, width = self.shape
        self.blocks, self.moments = blocks, None
        if channels % LANES == 0:
            count = math.ceil(height / blocks[0]) * math.ceil(width / blocks[1])
            self.moments = torch.empty(self.images, count, 3, channels, dtype=torch.float32, device="cpu")
        return self.moments

    def window(self, top: int, bottom: int) -> tuple[Tensor, int]:
        """Rows that include [top, bottom), (images, rows, width, channels), and the number of the first."""
        raise NotImplementedError

    def room(self, top: int, bottom: int) -> Tensor:
        """Where rows [top, bottom) are to be written before `put`, (images, bottom - top, width, channels)."""
        raise NotImplementedError

    def put(self, top: int, band: Tensor) -> None:
        """Keep the band from row ``top`` on that was written into `room`."""

    def close(self) -> None:
        """Release the memory or the file."""


class InMemory(Map):
    """A feature map that is one tensor x (images, height, width, channels)."""

    def __init__(self, x: Tensor, store: FeatureMaps | None = None) -> None:
        images, height, width, channels = x.shape
        super().__init__(images, (channels, height, width))
        self.x, self.store = x, store

    def window(self, top: int, bottom: int) -> tuple[Tensor, int]:
        return self.x, 0

    def room(self, top: int, bottom: int) -> Tensor:
        return self.x[:, top:bottom]

    def close(self) -> None:
        if self.store is not None:
            self.store.free += self.x.nbytes
        del self.x


class InFile(Map):
    """A feature map of one image in a scratch file."""

    def __init__(self, file: ScratchMap) -> None:
        super().__init__(1, file.shape)
        self.file = file

    def window(self, top: int, bottom: int) -> tuple[Tensor, int]:
        return self.file.read(top, bottom).permute(0, 2, 3, 1), top

    def room(self, top: int, bottom: int) -> Tensor:
        channels, _, width = self.shape
        return torch.empty(1, bottom - top, width, channels, dtype=torch.float32, device="cpu")

    def put(self, top: int, band: Tensor) -> None:
        self.file.put(top, band.permute(0, 3, 1, 2))

    def close(self) -> None:
        self.file.close()
