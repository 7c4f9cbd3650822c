"""Runs encoders and decoders on images whose feature maps do not fit into memory, in bands of rows.

Where an image fits it is processed whole. Else it goes through the network one convolution at a time: what a
convolution needs is read in bands of rows, with the row above and the row below, normalised, convolved, and written to
the next map, whose means and variances are summed up as it is written, for the normalisation that follows. So nothing
is computed twice, no seam can arise, and the result is the whole image's up to rounding. A map that memory does not
hold lies in a scratch file meanwhile (for a GPU in the host's memory, where there is room). Attention, which the
lowest resolutions have, runs whole.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.errors import UserError
from tamingfast.models.vqgan import AttnBlock, Decoder, Downsample, Encoder, GroupNorm, ResnetBlock, Upsample, VQModel
from tamingfast.ops.backends import available_memory

#: Maps of its size that a unit needs at its peak when it runs whole: input, normalised input, output, and a library's
#: copies of two; with attention the queries, keys and values and what becomes of them.
MAPS, ATTENTION_MAPS = 6, 10
#: Bytes of a band, at most: glibc returns blocks beyond 32 MiB to the system each time, and gets them back zeroed.
BAND = 24 << 20
#: Bands that a convolution needs at its peak.
BAND_MAPS = 8

Shape = tuple[int, int, int]  # channels, height, width
Progress = Callable[[int, int], Any]


@torch.no_grad()
def encode_grid(stage: nn.Module, x: Tensor, memory: int | None = None, progress: Progress | None = None) -> Tensor:
    """Images (B, C, H, W) -> a first stage's tokens int64 (B, h, w); the rest as in `run`."""
    if isinstance(stage, VQModel) and isinstance(stage.encoder, Encoder) and stage.levels == 1:
        quant, _, (_, _, indices) = stage.quantize(stage.quant_conv(run(stage.encoder, x, memory, progress)))
    else:
        quant, _, (_, _, indices) = stage.encode(x)
    return indices.view(len(x), *quant.shape[2:])


@torch.no_grad()
def decode_grid(stage: nn.Module, grid: Tensor, memory: int | None = None, progress: Progress | None = None) -> Tensor:
    """A first stage's tokens (B, h, w) -> images (B, C, f*h, f*w); the rest as in `run`."""
    quant = stage.quantize.get_codebook_entry(grid.reshape(-1), (*grid.shape, stage.embed_dim))
    if isinstance(stage, VQModel) and isinstance(stage.decoder, Decoder):
        return run(stage.decoder, stage.decoder_input(quant), memory, progress)
    return stage.decode(quant)


@torch.no_grad()
def run(network: Encoder | Decoder, x: Tensor, memory: int | None = None, progress: Progress | None = None) -> Tensor:
    """``network(x)``, of as many images at once as fit into memory, and in bands where not even one does.

    Args:
        memory: bytes for feature maps and the result, the weights not counted; half of what is free when None.
        progress: called as progress(done, total) with multiply-adds over all images, where they run in bands.

    Raises:
        UserError: not even bands of two rows fit into `memory`, or what is beyond it onto the disk.
    """
    units = _decoder_units(network) if isinstance(network, Decoder) else _encoder_units(network)
    memory = available_memory(x.device) // 2 if memory is None else memory
    shapes = _shapes(units, tuple(x.shape[1:]))
    peaks = [_peak(unit, before, after) for unit, (before, after) in zip(units, pairwise(shapes), strict=True)]
    at_once = memory // (max(peaks) * x.element_size())
    if at_once >= len(x):
        return network(x)
    if at_once:
        return torch.cat([network(part) for part in x.split(at_once)])
    work = [_work(unit, before, after) for unit, (before, after) in zip(units, pairwise(shapes), strict=True)]
    total, done = sum(work) * len(x), 0

    def advance(more: float) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(round(done), total)

    images = [_one(units, shapes, image[None], memory, work, advance) for image in x]
    return images[0] if len(images) == 1 else torch.cat(images)


def _decoder_units(decoder: Decoder) -> list[nn.Module]:
    units = [decoder.conv_in, decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2]
    for level in reversed(decoder.up):
        units += _level_units(level)
    return units if decoder.give_pre_end else [*units, nn.Sequential(decoder.norm_out, decoder.conv_out)]


def _encoder_units(encoder: Encoder) -> list[nn.Module]:
    units = [encoder.conv_in]
    for level in encoder.down:
        units += _level_units(level)
    mid = encoder.mid
    return [*units, mid.block_1, mid.attn_1, mid.block_2, nn.Sequential(encoder.norm_out, encoder.conv_out)]


def _level_units(level: nn.Module) -> Iterator[nn.Module]:
    for i, block in enumerate(level.block):
        yield block
        if level.attn:
            yield level.attn[i]
    for name in ("upsample", "downsample"):
        if hasattr(level, name):
            yield getattr(level, name)


def _shapes(units: Sequence[nn.Module], shape: Shape) -> list[Shape]:
    """Of the maps before, between and after the units."""
    shapes = [shape]
    for unit in units:
        channels, height, width = shapes[-1]
        last = unit.conv2 if isinstance(unit, ResnetBlock) else unit[-1] if isinstance(unit, nn.Sequential) else unit
        channels = last.out_channels if isinstance(last, nn.Conv2d) else channels
        if isinstance(unit, Upsample):
            height, width = 2 * height, 2 * width
        elif isinstance(unit, Downsample):
            height, width = height // 2, width // 2
        shapes.append((channels, height, width))
    return shapes


def _peak(unit: nn.Module, before: Shape, after: Shape) -> int:
    """Values that a unit needs when it runs whole."""
    return (ATTENTION_MAPS if isinstance(unit, AttnBlock) else MAPS) * max(math.prod(before), math.prod(after))


def _work(unit: nn.Module, before: Shape, after: Shape) -> int:
    """Multiply-adds of a unit."""
    pixels = after[1] * after[2]
    weights = sum(parameter.numel() for parameter in unit.parameters() if parameter.ndim == 4)
    return pixels * (weights + (2 * pixels * after[0] if isinstance(unit, AttnBlock) else 0))


def _one(
    units: Sequence[nn.Module],
    shapes: Sequence[Shape],
    x: Tensor,
    memory: int,
    work: Sequence[int],
    advance: Callable[[float], None],
) -> Tensor:
    """One image (1, C, H, W) through the units, each of them whole where it fits and else in bands."""
    size = x.element_size()
    rows = [max(math.prod(before), math.prod(after)) // after[1] for before, after in pairwise(shapes)]
    store = _Store(memory, math.prod(shapes[-1]) * size, 2 * max(rows) * size, x)
    current: Tensor | _Map = x
    for i, unit in enumerate(units):
        peak = _peak(unit, shapes[i], shapes[i + 1]) * size
        room = store.free + (current.charged if isinstance(current, _Map) else 0)
        if peak <= room:
            current = unit(current.whole() if isinstance(current, _Map) else current)
            advance(work[i])
        elif isinstance(unit, AttnBlock):
            raise _too_little(memory - room + peak, memory)
        else:
            if isinstance(current, Tensor):
                current = store.holding(current)
            last = i == len(units) - 1
            current = _in_bands(unit, current, shapes[i + 1], store, last, lambda part, i=i: advance(part * work[i]))
    return current.whole() if isinstance(current, _Map) else current


def _too_little(needed: int, memory: int) -> UserError:
    return UserError(
        f"an image of this size needs {-(-needed >> 20)} MiB or more, but is given {memory >> 20} MiB: give it more "
        "memory"
    )


def _in_bands(unit: nn.Module, x: _Map, shape: Shape, store: _Store, last: bool, told: Callable[[float], None]) -> _Map:
    """The map after a unit, which is the one before it, overwritten, where that is possible.

    ``told`` is called after each band with the part of the unit's work that it was.
    """
    if isinstance(unit, ResnetBlock):
        half = lambda part: told(part / 2)  # noqa: E731
        h = _convolved(x, store.new(shape), unit.conv1, unit.norm1, half)
        if unit.shortcut is None:
            out = _convolved(h, x, unit.conv2, unit.norm2, half, beside=x)
        else:
            shortcut = getattr(unit, unit.shortcut)
            out = _convolved(h, store.new(shape, last), unit.conv2, unit.norm2, half, x, shortcut)
            x.close()
        h.close()
        return out
    norm, conv = unit if isinstance(unit, nn.Sequential) else (None, unit)
    out = store.new(shape, last)
    for top, bottom in out.bands(x):
        if isinstance(conv, Upsample):
            band = _up(conv, x, top, bottom)
        elif isinstance(conv, Downsample):
            band = _down(conv, x, top, bottom)
        else:
            band = _convolve(conv, x, top, bottom, norm)
        out.write(top, band)
        told((bottom - top) / shape[1])
    x.close()
    return out


def _convolved(
    source: _Map,
    out: _Map,
    conv: nn.Conv2d,
    norm: GroupNorm,
    told: Callable[[float], None],
    beside: _Map | None = None,
    shortcut: nn.Conv2d | None = None,
) -> _Map:
    """``out``, which becomes conv(norm(source)), added to ``beside`` itself or through a ``shortcut``."""
    for top, bottom in out.bands(source):
        band = _convolve(conv, source, top, bottom, norm)
        if beside is not None:
            band += beside.read(top, bottom) if shortcut is None else _convolve(shortcut, beside, top, bottom)
        out.write(top, band)
        told((bottom - top) / out.shape[1])
    return out


def _convolve(conv: nn.Conv2d, source: _Map, top: int, bottom: int, norm: GroupNorm | None = None) -> Tensor:
    reach = conv.kernel_size[0] // 2
    band = source.padded(top - reach, bottom + reach, norm)
    return F.conv2d(band, conv.weight, conv.bias, padding=(0, reach))


def _up(unit: Upsample, source: _Map, top: int, bottom: int) -> Tensor:
    if not unit.with_conv:
        return F.interpolate(source.read(top // 2, bottom // 2), scale_factor=2.0, mode="nearest")
    band = F.interpolate(source.padded(top // 2 - 1, bottom // 2 + 1), scale_factor=2.0, mode="nearest")
    return F.conv2d(band[:, :, 1:-1], unit.conv.weight, unit.conv.bias, padding=(0, 1))


def _down(unit: Downsample, source: _Map, top: int, bottom: int) -> Tensor:
    if not unit.with_conv:
        return F.avg_pool2d(source.read(2 * top, 2 * bottom), 2)
    band = F.pad(source.padded(2 * top, 2 * bottom + 1), (0, 1))
    return F.conv2d(band, unit.conv.weight, unit.conv.bias, stride=2)


class _Store:
    """The memory that one image's maps may take, and where they go beyond it.

    Attributes:
        band: bytes of a band's largest map.
        free: bytes that are left for maps, beside the result and what the bands need.
    """

    def __init__(self, memory: int, result: int, rows: int, like: Tensor) -> None:
        self.dtype, self.device = like.dtype, like.device
        self.band = max(rows, min(BAND, (memory - result) // (4 * BAND_MAPS)))
        self.free = memory - result - BAND_MAPS * self.band
        if self.free < 0:
            raise _too_little(memory - self.free, memory)

    def new(self, shape: Shape, last: bool = False) -> _Map:
        """An empty map; the last one is the result, which always lies in memory."""
        size = math.prod(shape) * self.dtype.itemsize
        if last:
            return _Map(self, shape, torch.empty(1, *shape, dtype=self.dtype, device=self.device), 0)
        if size <= self.free:
            return _Map(self, shape, self._empty(shape, self.device), size)
        if self.device.type != "cpu" and size <= available_memory(torch.device("cpu")) // 2:
            return _Map(self, shape, self._empty(shape, torch.device("cpu")), 0)
        return _Scratch(self, shape, size)

    def holding(self, x: Tensor) -> _Map:
        """The map (1, C, H, W) of a unit that ran whole."""
        found = _Map(self, tuple(x.shape[1:]), x, x.nbytes)
        for top, bottom in found.bands(found):
            found.note(top, found.read(top, bottom))
        return found

    def _empty(self, shape: Shape, device: torch.device) -> Tensor:
        return torch.empty(1, *shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)


class _Map:
    """A feature map in memory, written in bands from top to bottom, and the moments of its channels.

    Attributes:
        shape: channels, height, width.
    """

    def __init__(self, store: _Store, shape: Shape, x: Tensor | None, charged: int) -> None:
        self.store, self.shape, self.x, self.charged = store, shape, x, charged
        store.free -= charged

    def close(self) -> None:
        """Give the memory back."""
        self.store.free += self.charged
        self.x = None

    def bands(self, source: _Map) -> Iterator[tuple[int, int]]:
        """Rows [top, bottom) of this map, of which none needs more than a band of it or of the ``source``."""
        height = self.shape[1]
        row = max(math.prod(self.shape), math.prod(source.shape)) // height * self.store.dtype.itemsize
        step = max(2, self.store.band // row // 2 * 2)
        for top in range(0, height, step):
            yield top, min(top + step, height)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom), (1, C, bottom - top, W), channels-last."""
        return self.x[:, :, top:bottom].to(self.store.device).contiguous(memory_format=torch.channels_last)

    def padded(self, top: int, bottom: int, norm: GroupNorm | None = None) -> Tensor:
        """Rows [top, bottom), normalised, zero beyond the map's ends."""
        inside = max(top, 0), min(bottom, self.shape[1])
        band = self.read(*inside)
        if norm is not None:
            scale, shift = (part.to(band)[:, None, None] for part in self._affine(norm))
            band = torch.addcmul(shift, band, scale)
            band = F.silu(band, inplace=True) if norm.silu else band
        beyond = inside[0] - top, bottom - inside[1]
        return F.pad(band, (0, 0, *beyond)) if any(beyond) else band

    def write(self, top: int, band: Tensor) -> None:
        """Put rows, from ``top`` on; writing the first begins the map anew."""
        self.note(top, band)
        self.x[:, :, top : top + band.shape[2]].copy_(band)

    def note(self, top: int, band: Tensor) -> None:
        """Count rows into the moments, without putting them anywhere."""
        wide = band.to(torch.promote_types(band.dtype, torch.float32))
        if top == 0:
            # Sums of squares of what is far from zero would lose the variance.
            self.offset = wide[:, :, 0].mean(-1)[..., None, None]
            self.count, self.first, self.second = 0, 0.0, 0.0
        wide = wide - self.offset
        self.count += wide.shape[2] * wide.shape[3]
        self.first += wide.sum((0, 2, 3)).double()
        self.second += wide.square_().sum((0, 2, 3)).double()

    def _affine(self, norm: GroupNorm) -> tuple[Tensor, Tensor]:
        """What a normalisation multiplies each channel by, and what it adds then: float64 (C,)."""
        drift = self.first / self.count
        mean = self.offset.flatten().double() + drift
        variance = self.second / self.count - drift.square()
        grouped = mean.view(norm.num_groups, -1)
        centre = grouped.mean(1, keepdim=True)
        spread = (variance.view_as(grouped) + (grouped - centre).square()).mean(1, keepdim=True).clamp(min=0)
        scale = norm.weight.double().view_as(grouped) / (spread + norm.eps).sqrt()
        return scale.flatten(), norm.bias.double() - (centre * scale).flatten()

    def whole(self) -> Tensor:
        """The map (1, C, H, W), which is given up."""
        x = self.read(0, self.shape[1]) if self.x is None else self.x.to(self.store.device)
        self.close()
        return x.contiguous()


class _Scratch(_Map):
    """A map in a file, which vanishes with it."""

    def __init__(self, store: _Store, shape: Shape, size: int) -> None:
        super().__init__(store, shape, None, 0)
        directory = scratch_directory()
        self.no_room = UserError(
            f"an image of this size needs {size >> 20} MiB in {directory} beside its memory: make room, give it more "
            "memory, or set TMPDIR to a directory with more room"
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
        self.note(top, band)
        self._transfer(self.file.write, top, band[0].permute(1, 2, 0).cpu().contiguous())

    def _transfer(self, act: Callable[[memoryview], int], top: int, rows: Tensor) -> None:
        # Read and written, not mapped: the pages of a mapping would count as the process's own memory.
        view = memoryview(rows.view(torch.uint8).flatten().numpy())
        self.file.seek(top * rows[0].nbytes)
        try:
            while view.nbytes:
                view = view[act(view) :]
        except OSError as error:
            raise self.no_room from error


def scratch_directory() -> str:
    """Where large files may lie for a while: ``TMPDIR``, else /var/tmp, as /tmp is often a part of memory."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())
