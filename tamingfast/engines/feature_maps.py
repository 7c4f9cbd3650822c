"""Feature maps that are written and read in bands of rows: in memory, or in a scratch file where memory runs out."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tamingfast.engines.layers import Norm, Shape
from tamingfast.errors import UserError
from tamingfast.ops.backends import available_memory

#: Largest band in bytes: glibc returns every freed block above 32 MiB to the system, which zeroes it for the next use.
BAND = 24 << 20
#: Peak memory of a convolution that runs in bands, counted in bands.
BAND_MAPS = 8


def too_little(needed: int, memory: int) -> UserError:
    return UserError(
        f"memory: got {memory >> 20} MiB, expected at least {-(-needed >> 20)} MiB for an image of this size; free or "
        "allow more memory, or take a smaller image"
    )


def shape_of(x: Tensor) -> Shape:
    """(channels, height, width) of images or feature maps (B, C, H, W)."""
    _, channels, height, width = x.shape
    return channels, height, width


class FeatureMaps:
    """The memory budget for the feature maps of one image, and scratch files for maps that exceed it.

    Attributes:
        band: bytes of the largest feature map of a band.
        free: bytes left for feature maps, after the result and the bands.
    """

    def __init__(self, memory: int, result: int, rows: int, like: Tensor) -> None:
        self.dtype, self.device = like.dtype, like.device
        self.band = max(rows, min(BAND, (memory - result) // (4 * BAND_MAPS)))
        self.free = memory - result - BAND_MAPS * self.band
        if self.free < 0:
            raise too_little(memory - self.free, memory)

    def new(self, shape: Shape, last: bool = False) -> FeatureMap:
        """An empty feature map; the ``last`` one is the result, which is always kept in memory."""
        size = math.prod(shape) * self.dtype.itemsize
        if last:
            return MemoryMap(self, shape, torch.empty(1, *shape, dtype=self.dtype, device=self.device), 0)
        if size <= self.free:
            return MemoryMap(self, shape, self._empty(shape, self.device), size)
        if self.device.type != "cpu" and size <= available_memory(torch.device("cpu")) // 2:
            return MemoryMap(self, shape, self._empty(shape, torch.device("cpu")), 0)
        return ScratchMap(self, shape, size)

    def adopt(self, x: Tensor) -> FeatureMap:
        """The output (1, C, H, W) of a layer that ran whole, as a feature map of this store."""
        adopted = MemoryMap(self, shape_of(x), x, x.nbytes)
        for top, bottom in adopted.bands(adopted):
            adopted.count(top, adopted.read(top, bottom))
        return adopted

    def _empty(self, shape: Shape, device: torch.device) -> Tensor:
        return torch.empty(1, *shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)


class FeatureMap:
    """A feature map that is written in bands from top to bottom, with the moments of its channels.

    Attributes:
        shape: channels, height, width.
        charged: bytes that it takes from the store's memory.
    """

    def __init__(self, store: FeatureMaps, shape: Shape, charged: int) -> None:
        self.store, self.shape, self.charged = store, shape, charged
        store.free -= charged

    def close(self) -> None:
        """Release the memory or the file."""
        raise NotImplementedError

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom), (1, C, bottom - top, W), channels-last."""
        raise NotImplementedError

    def write(self, top: int, band: Tensor) -> None:
        """`put` rows from ``top`` on and `count` them; writing row 0 starts the feature map anew."""
        self.count(top, band)
        self.put(top, band)

    def put(self, top: int, band: Tensor) -> None:
        """Store rows from ``top`` on."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """The whole map, (1, C, H, W), contiguous; closes it."""
        raise NotImplementedError

    def bands(self, source: FeatureMap) -> Iterator[tuple[int, int]]:
        """Rows [top, bottom) such that no band of this map or of ``source`` is larger than the store's."""
        height = self.shape[1]
        row = max(math.prod(self.shape), math.prod(source.shape)) // height * self.store.dtype.itemsize
        step = max(2, self.store.band // row // 2 * 2)
        for top in range(0, height, step):
            yield top, min(top + step, height)

    def padded(self, top: int, bottom: int, norm: Norm | None = None) -> Tensor:
        """Rows [top, bottom), normalised; zero beyond the first and the last row."""
        first, end = max(top, 0), min(bottom, self.shape[1])
        band = self.read(first, end)
        if norm is not None:
            scale, shift = (part.to(band)[:, None, None] for part in self._affine(norm))
            band = torch.addcmul(shift, band, scale)
            band = F.silu(band, inplace=True) if norm.silu else band
        beyond = first - top, bottom - end
        return F.pad(band, (0, 0, *beyond)) if any(beyond) else band

    def count(self, top: int, band: Tensor) -> None:
        """Add the rows of ``band``, which begin at ``top``, to the channels' moments."""
        wide = band.to(torch.promote_types(band.dtype, torch.float32))
        if top == 0:
            # Values are summed relative to an offset: squares of values far from zero would drown the variance.
            self._offset = wide[:, :, 0].mean(-1)[..., None, None]
            self._count = 0
            self._first = self._second = wide.new_zeros(wide.shape[1], dtype=torch.float64)
        wide = wide - self._offset
        self._count += wide.shape[2] * wide.shape[3]
        self._first = self._first + wide.sum((0, 2, 3)).double()
        self._second = self._second + wide.square_().sum((0, 2, 3)).double()

    def _affine(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """The normalisation as a scale and a shift for each channel: float64 (C,) each."""
        drift = self._first / self._count
        mean = self._offset.flatten().double() + drift
        variance = self._second / self._count - drift.square()
        grouped = mean.view(norm.num_groups, -1)
        centre = grouped.mean(1, keepdim=True)
        spread = (variance.view_as(grouped) + (grouped - centre).square()).mean(1, keepdim=True).clamp(min=0)
        scale = norm.weight.double().view_as(grouped) / (spread + norm.eps).sqrt()
        return scale.flatten(), norm.bias.double() - (centre * scale).flatten()


class MemoryMap(FeatureMap):
    """A feature map in the memory of the device or of the host."""

    def __init__(self, store: FeatureMaps, shape: Shape, x: Tensor, charged: int) -> None:
        super().__init__(store, shape, charged)
        self.x = x

    def close(self) -> None:
        self.store.free += self.charged
        del self.x

    def read(self, top: int, bottom: int) -> Tensor:
        return self.x[:, :, top:bottom].to(self.store.device).contiguous(memory_format=torch.channels_last)

    def put(self, top: int, band: Tensor) -> None:
        self.x[:, :, top : top + band.shape[2]].copy_(band)

    def whole(self) -> Tensor:
        x = self.x.to(self.store.device)
        self.close()
        return x.contiguous()


class ScratchMap(FeatureMap):
    """A feature map in a temporary file, which disappears when it is closed."""

    def __init__(self, store: FeatureMaps, shape: Shape, size: int) -> None:
        super().__init__(store, shape, 0)
        directory = scratch_directory()
        self.no_room = UserError(
            f"{directory}: got too little free disk space, expected {size >> 20} MiB for the feature maps of this "
            "image; free some, allow more memory, or set TMPDIR to a directory with more space"
        )
        if shutil.disk_usage(directory).free < size:
            raise self.no_room
        self.file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  closed by close

    def close(self) -> None:
        self.file.close()

    def read(self, top: int, bottom: int) -> Tensor:
        channels, _, width = self.shape
        rows = torch.empty(bottom - top, width, channels, dtype=self.store.dtype, device="cpu")
        self._transfer(self.file.readinto, top, rows)
        return rows.permute(2, 0, 1)[None].to(self.store.device)

    def put(self, top: int, band: Tensor) -> None:
        self._transfer(self.file.write, top, band[0].permute(1, 2, 0).cpu().contiguous())

    def whole(self) -> Tensor:
        x = self.read(0, self.shape[1])
        self.close()
        return x.contiguous()

    def _transfer(self, act: Callable[[memoryview], int], top: int, rows: Tensor) -> None:
        # Read and written, not mapped: the pages of a mapping would count as the process's own memory.
        view = rows.view(torch.uint8).flatten().numpy().data
        self.file.seek(top * rows[0].nbytes)
        try:
            while view.nbytes:
                view = view[act(view) :]
        except OSError as error:
            raise self.no_room from error


def scratch_directory() -> str:
    """A directory for large temporary files: ``TMPDIR``, else /var/tmp, because /tmp is often kept in memory."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())
