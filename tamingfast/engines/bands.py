"""Runs encoders and decoders on images whose feature maps do not fit into memory, in bands of rows.

An image that fits runs whole. Otherwise it goes through the network one convolution at a time: the input is read in
bands of rows with one extra row above and below, normalised, convolved and written to the next feature map, whose means
and variances are accumulated on the way for the normalisation that follows. So nothing is computed twice, there are no
seams, and the result equals that of the whole image up to rounding. Feature maps that exceed the memory are kept in a
scratch file, or for a GPU in the host's memory if it has room. Attention, which occurs at the lowest resolutions only,
runs whole.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.engines.layers import (
    DOWNSAMPLE_PADDING,
    Attention,
    Convolution,
    Downsample,
    Layer,
    LayeredNetwork,
    Norm,
    Residual,
    Shape,
    Upsample,
    shapes,
)
from tamingfast.errors import UserError
from tamingfast.ops.backends import available_memory

#: Peak memory of a layer that runs whole, counted in copies of its input or output, whichever is larger: the input, the
#: normalised input, the output and a library's copies of two; for attention also queries, keys, values and results.
MAPS, ATTENTION_MAPS = 6, 10
#: Largest band in bytes: glibc returns every freed block above 32 MiB to the system, which zeroes it for the next use.
BAND = 24 << 20
#: Peak memory of a convolution that runs in bands, counted in bands.
BAND_MAPS = 8

Progress = Callable[[int, int], object]


@torch.no_grad()
def run(network: LayeredNetwork, x: Tensor, memory: int | None = None, progress: Progress | None = None) -> Tensor:
    """``network(x)``: several images at a time if memory allows, in bands if not even one fits.

    Args:
        network: an encoder or a decoder.
        x: (B, C, H, W).
        memory: bytes for feature maps and the result, weights not counted. Default: half of the free memory.
        progress: called as progress(done, total), in multiply-adds over all images; only while images run in bands.

    Raises:
        UserError: ``memory`` is too small for bands of two rows, or the disk for the feature maps that exceed it.
    """
    layers = network.layers()
    memory = available_memory(x.device) // 2 if memory is None else memory
    sides = shapes(layers, _shape(x))
    peaks = [_peak(layer, before, after) for layer, (before, after) in zip(layers, pairwise(sides), strict=True)]
    at_once = memory // (max(peaks) * x.element_size())
    if at_once >= len(x):
        return network(x)
    if at_once:
        return torch.cat([network(part) for part in x.split(at_once)])
    work = [_work(layer, after) for layer, after in zip(layers, sides[1:], strict=True)]
    total, done = sum(work) * len(x), 0.0

    def advance(more: float) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(round(done), total)

    images = [_one(layers, sides, image[None], memory, work, advance) for image in x]
    return images[0] if len(images) == 1 else torch.cat(images)


def _shape(x: Tensor) -> Shape:
    _, channels, height, width = x.shape
    return channels, height, width


def _peak(layer: Layer, before: Shape, after: Shape) -> int:
    """Peak number of values in memory while a layer runs whole."""
    maps = ATTENTION_MAPS if isinstance(layer, Attention) else MAPS
    return maps * max(math.prod(before), math.prod(after))


def _work(layer: Layer, after: Shape) -> int:
    """Multiply-adds of a layer."""
    channels, height, width = after
    pixels = height * width
    weights = sum(conv.weight.numel() for conv in layer.convolutions)
    return pixels * (weights + (2 * pixels * channels if isinstance(layer, Attention) else 0))


def _one(
    layers: Sequence[Layer],
    sides: Sequence[Shape],
    x: Tensor,
    memory: int,
    work: Sequence[int],
    advance: Callable[[float], None],
) -> Tensor:
    """Run one image (1, C, H, W) through the layers, each whole if it fits, else in bands."""
    size = x.element_size()
    rows = [max(math.prod(before), math.prod(after)) // after[1] for before, after in pairwise(sides)]
    store = _Store(memory, math.prod(sides[-1]) * size, 2 * max(rows) * size, x)
    current: Tensor | _Map = x
    for i, layer in enumerate(layers):
        peak = _peak(layer, sides[i], sides[i + 1]) * size
        room = store.free + (current.charged if isinstance(current, _Map) else 0)
        if peak <= room:
            current = layer(current.whole() if isinstance(current, _Map) else current)
            advance(work[i])
        elif isinstance(layer, Attention):
            raise _too_little(memory - room + peak, memory)
        else:
            if isinstance(current, Tensor):
                current = store.adopt(current)

            def advance_part(part: float, whole: int = work[i]) -> None:
                advance(part * whole)

            current = _in_bands(layer, current, sides[i + 1], store, i == len(layers) - 1, advance_part)
    return current.whole() if isinstance(current, _Map) else current


def _too_little(needed: int, memory: int) -> UserError:
    return UserError(
        f"memory: got {memory >> 20} MiB, expected at least {-(-needed >> 20)} MiB for an image of this size; free or "
        "allow more memory, or take a smaller image"
    )


def _in_bands(
    layer: Convolution | Residual | Upsample | Downsample,
    x: _Map,
    shape: Shape,
    store: _Store,
    last: bool,
    advance: Callable[[float], None],
) -> _Map:
    """The layer's output, written over its input if possible; the input is closed or overwritten.

    ``advance`` is called after each band with its share of the layer's work.
    """
    if isinstance(layer, Residual):
        return _residual_in_bands(layer, x, shape, store, last, lambda part: advance(part / 2))
    out = store.new(shape, last)
    for top, bottom in out.bands(x):
        if isinstance(layer, Upsample):
            band = _up(layer, x, top, bottom)
        elif isinstance(layer, Downsample):
            band = _down(layer, x, top, bottom)
        else:
            band = _convolve(layer.conv, x, top, bottom, layer.norm)
        out.write(top, band)
        advance((bottom - top) / shape[1])
    x.close()
    return out


def _residual_in_bands(
    layer: Residual, x: _Map, shape: Shape, store: _Store, last: bool, advance: Callable[[float], None]
) -> _Map:
    h = _convolve_all(x, store.new(shape), layer.conv1, layer.norm1, advance)
    if layer.shortcut is None:
        out = _convolve_all(h, x, layer.conv2, layer.norm2, advance, skip=x)
    else:
        out = _convolve_all(h, store.new(shape, last), layer.conv2, layer.norm2, advance, x, layer.shortcut)
        x.close()
    h.close()
    return out


def _convolve_all(
    source: _Map,
    out: _Map,
    conv: nn.Conv2d,
    norm: Norm,
    advance: Callable[[float], None],
    skip: _Map | None = None,
    shortcut: nn.Conv2d | None = None,
) -> _Map:
    """``out`` = conv(norm(source)) + skip; ``skip`` goes through the convolution ``shortcut`` first, if given."""
    for top, bottom in out.bands(source):
        band = _convolve(conv, source, top, bottom, norm)
        if skip is not None:
            band += skip.read(top, bottom) if shortcut is None else _convolve(shortcut, skip, top, bottom)
        out.write(top, band)
        advance((bottom - top) / out.shape[1])
    return out


def _convolve(conv: nn.Conv2d, source: _Map, top: int, bottom: int, norm: Norm | None = None) -> Tensor:
    reach = conv.kernel_size[0] // 2
    band = source.padded(top - reach, bottom + reach, norm)
    return F.conv2d(band, conv.weight, conv.bias, padding=(0, reach))


def _up(layer: Upsample, source: _Map, top: int, bottom: int) -> Tensor:
    if layer.conv is None:
        return F.interpolate(source.read(top // 2, bottom // 2), scale_factor=2.0, mode="nearest")
    band = F.interpolate(source.padded(top // 2 - 1, bottom // 2 + 1), scale_factor=2.0, mode="nearest")
    return F.conv2d(band[:, :, 1:-1], layer.conv.weight, layer.conv.bias, padding=(0, 1))


def _down(layer: Downsample, source: _Map, top: int, bottom: int) -> Tensor:
    if layer.conv is None:
        return F.avg_pool2d(source.read(2 * top, 2 * bottom), 2)
    left, right, above, below = DOWNSAMPLE_PADDING
    band = F.pad(source.padded(2 * top - above, 2 * bottom + below), (left, right))
    return F.conv2d(band, layer.conv.weight, layer.conv.bias, stride=layer.conv.stride)


class _Store:
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
            raise _too_little(memory - self.free, memory)

    def new(self, shape: Shape, last: bool = False) -> _Map:
        """An empty feature map; the ``last`` one is the result, which is always kept in memory."""
        size = math.prod(shape) * self.dtype.itemsize
        if last:
            return _InMemory(self, shape, torch.empty(1, *shape, dtype=self.dtype, device=self.device), 0)
        if size <= self.free:
            return _InMemory(self, shape, self._empty(shape, self.device), size)
        if self.device.type != "cpu" and size <= available_memory(torch.device("cpu")) // 2:
            return _InMemory(self, shape, self._empty(shape, torch.device("cpu")), 0)
        return _Scratch(self, shape, size)

    def adopt(self, x: Tensor) -> _Map:
        """The output (1, C, H, W) of a layer that ran whole, as a feature map of this store."""
        adopted = _InMemory(self, _shape(x), x, x.nbytes)
        for top, bottom in adopted.bands(adopted):
            adopted.count(top, adopted.read(top, bottom))
        return adopted

    def _empty(self, shape: Shape, device: torch.device) -> Tensor:
        return torch.empty(1, *shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)


class _Map:
    """A feature map that is written in bands from top to bottom, with the moments of its channels.

    Attributes:
        shape: channels, height, width.
        charged: bytes that it takes from the store's memory.
    """

    def __init__(self, store: _Store, shape: Shape, charged: int) -> None:
        self.store, self.shape, self.charged = store, shape, charged
        store.free -= charged

    def close(self) -> None:
        """Release the memory or the file."""
        raise NotImplementedError

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom), (1, C, bottom - top, W), channels-last."""
        raise NotImplementedError

    def write(self, top: int, band: Tensor) -> None:
        """Store rows from ``top`` on; writing row 0 starts the feature map anew."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """The whole map, (1, C, H, W), contiguous; closes it."""
        raise NotImplementedError

    def bands(self, source: _Map) -> Iterator[tuple[int, int]]:
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


class _InMemory(_Map):
    """A feature map in the memory of the device or of the host."""

    def __init__(self, store: _Store, shape: Shape, x: Tensor, charged: int) -> None:
        super().__init__(store, shape, charged)
        self.x = x

    def close(self) -> None:
        self.store.free += self.charged
        del self.x

    def read(self, top: int, bottom: int) -> Tensor:
        return self.x[:, :, top:bottom].to(self.store.device).contiguous(memory_format=torch.channels_last)

    def write(self, top: int, band: Tensor) -> None:
        self.count(top, band)
        self.x[:, :, top : top + band.shape[2]].copy_(band)

    def whole(self) -> Tensor:
        x = self.x.to(self.store.device)
        self.close()
        return x.contiguous()


class _Scratch(_Map):
    """A feature map in a temporary file, which disappears when it is closed."""

    def __init__(self, store: _Store, shape: Shape, size: int) -> None:
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
        rows = torch.empty(bottom - top, width, channels, dtype=self.store.dtype)
        self._transfer(self.file.readinto, top, rows)
        return rows.permute(2, 0, 1)[None].to(self.store.device)

    def write(self, top: int, band: Tensor) -> None:
        self.count(top, band)
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
