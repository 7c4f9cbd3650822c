"""Decodes grids whose feature maps do not fit into memory, tile by tile.

Where the whole image fits it is decoded whole. Else the decoder's lower resolutions, with their attention over the
whole image, still run whole; from the first map that would not fit, the image goes on in tiles that overlap by the
reach of the remaining convolutions, so that no seam can arise from them. What is left of the image as a whole are the
means and variances of the group normalisations, which all tiles share. They are exact, found one after the other by
passes over all tiles, so the result is the whole image up to rounding; or, several times faster, they are those of as
many evenly spread tiles as memory holds side by side, which shifts the image's contrast a little.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.errors import UserError
from tamingfast.models.vqgan import Decoder, GroupNorm, ResnetBlock, Upsample

#: Maps of its size that a unit needs at its peak: input, normalised input, output, and a library's copies of two.
MAPS = 6
#: Share of the memory that a unit's input and output may take when it runs in tiles by itself.
TWO_MAPS = 0.6
Norm = Callable[[GroupNorm, Tensor], Tensor]
#: Mean and variance, float64 (groups,), of each normalisation.
Statistics = dict[GroupNorm, tuple[Tensor, Tensor]]


class Region(NamedTuple):
    """Rows and columns of a map, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def __mul__(self, scale: int) -> Region:
        return Region(*(side * scale for side in self))

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.top : self.bottom, self.left : self.right]


@dataclass
class Tile:
    """A map's cut-out during decoding: `x` covers `outer` of the tiled map, of which `inner` is exact."""

    x: Tensor
    inner: Region
    outer: Region

    def exact(self, scale: int) -> Tensor:
        """The part of `x` that belongs to `inner`, `x` having grown by `scale`."""
        top, left = self.outer.top, self.outer.left
        inner = Region(self.inner.top - top, self.inner.bottom - top, self.inner.left - left, self.inner.right - left)
        return (inner * scale).of(self.x)


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def decode(decoder: Decoder, z: Tensor, memory: int | None = None, exact: bool = True) -> Tensor:
    """Latents (B, z_channels, h, w) -> images (B, out_ch, f*h, f*w).

    Args:
        memory: bytes for feature maps and the result, the weights not counted; half of what is free when None.
        exact: whether the statistics of normalisations are those of the whole image, or of some tiles.

    Raises:
        UserError: not even the smallest tiles fit into `memory`.
    """
    memory = available_memory(z.device) // 2 if memory is None else memory
    units = _units(decoder)
    if max(_peaks(units, z)) * len(z) <= memory:
        return decoder(z)
    return torch.cat([_decode_one(units, image[None], memory, exact) for image in z])


def _units(decoder: Decoder) -> list[nn.Module]:
    mid = decoder.mid
    units = [decoder.conv_in, mid.block_1, mid.attn_1, mid.block_2]
    for level in reversed(decoder.up):
        for i, block in enumerate(level.block):
            units += [block, level.attn[i]] if level.attn else [block]
        if hasattr(level, "upsample"):
            units.append(level.upsample)
    return units if decoder.give_pre_end else [*units, decoder.norm_out, decoder.conv_out]


def _peaks(units: Sequence[nn.Module], z: Tensor) -> list[int]:
    """Bytes that each unit needs for one image."""
    channels, pixels, peaks = z.shape[1], z.shape[2] * z.shape[3], []
    for unit in units:
        before = channels
        channels = _channels(unit, channels)
        pixels *= 4 if isinstance(unit, Upsample) else 1
        peaks.append(MAPS * max(before, channels) * pixels * z.element_size())
    return peaks


def _channels(unit: nn.Module, channels: int) -> int:
    last = unit.conv2 if isinstance(unit, ResnetBlock) else unit
    return last.out_channels if isinstance(last, nn.Conv2d) else channels


def _run(unit: nn.Module, x: Tensor, norm: Norm) -> Tensor:
    """One unit with the given normalisation; attention inside a tile keeps to the tile."""
    if isinstance(unit, GroupNorm):
        return norm(unit, x)
    if isinstance(unit, ResnetBlock):
        h = unit.conv2(norm(unit.norm2, unit.conv1(norm(unit.norm1, x))))
        return h.add_(x if unit.shortcut is None else getattr(unit, unit.shortcut)(x))
    return unit(x)


def _reach(units: Sequence[nn.Module]) -> int:
    """Pixels of the first unit's input, to each side, that its output depends on after all units."""
    reach = 0
    for unit in reversed(units):
        if isinstance(unit, ResnetBlock):
            reach += 2
        elif isinstance(unit, nn.Conv2d):
            reach += unit.kernel_size[0] // 2
        elif isinstance(unit, Upsample):
            reach = (reach + (1 if unit.with_conv else 0) + 1) // 2
    return reach


def _decode_one(units: list[nn.Module], z: Tensor, memory: int, exact: bool) -> Tensor:
    peaks, x = _peaks(units, z), z
    while units and peaks[0] <= memory:
        x = units[0](x)
        units, peaks = units[1:], peaks[1:]
    while units:
        # One unit at a time where its input and output fit side by side, which needs the fewest passes.
        one = x.nbytes + _peaks(units[:1], x)[0] // MAPS <= TWO_MAPS * memory
        segment = units[:1] if one else units
        x = _in_tiles(segment, x, memory, exact)
        units = units[len(segment) :]
    return x


def _in_tiles(segment: list[nn.Module], x: Tensor, memory: int, exact: bool) -> Tensor:
    scale = 2 ** sum(isinstance(unit, Upsample) for unit in segment)
    reach = _reach(segment)
    out_channels = x.shape[1]
    for unit in segment:
        out_channels = _channels(unit, out_channels)
    height, width = x.shape[2:]
    out = x.new_empty(1, out_channels, height * scale, width * scale)
    room = memory - x.nbytes - out.nbytes
    per_cell = max(_peaks(segment, x)) / (height * width)  # bytes of the segment per position of its input
    side = int((max(room, 0) / per_cell) ** 0.5) - 2 * reach
    if side < 1:
        needed = x.nbytes + out.nbytes + int(per_cell * (2 * reach + 1) ** 2)
        raise UserError(
            f"decoding an image of this size needs {needed >> 20} MiB or more, but is given {memory >> 20} MiB: "
            "give it more memory"
        )
    regions = _partition(height, width, side, reach)
    if exact:
        statistics = _all_statistics(segment, x, regions)
    else:
        # Between units each tile keeps its map and, inside a block, the block's input.
        smaller = _partition(height, width, max(1, side // 4), reach)
        statistics = _some_statistics(segment, x, smaller, int(room / per_cell * 2))

    def fixed(module: GroupNorm, h: Tensor) -> Tensor:
        return _normalise(module, h, statistics[module])

    for inner, outer in regions:
        h = outer.of(x)
        for unit in segment:
            h = _run(unit, h, fixed)
        (inner * scale).of(out).copy_(Tile(h, inner, outer).exact(scale))
    return out


def _partition(height: int, width: int, side: int, reach: int) -> list[tuple[Region, Region]]:
    """Regions of at most side x side that cover a map once, each with what it depends on."""
    regions = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            inner = Region(top, min(top + side, height), left, min(left + side, width))
            outer = Region(
                max(inner.top - reach, 0),
                min(inner.bottom + reach, height),
                max(inner.left - reach, 0),
                min(inner.right + reach, width),
            )
            regions.append((inner, outer))
    return regions


class _Unknown(Exception):
    """A tile has come to the first normalisation whose statistics are not known."""

    def __init__(self, module: GroupNorm, x: Tensor) -> None:
        self.module, self.x = module, x


def _all_statistics(segment: Sequence[nn.Module], x: Tensor, regions: list[tuple[Region, Region]]) -> Statistics:
    """The statistics of the whole map: one pass over all tiles for each normalisation, as far as it."""
    found: Statistics = {}

    def norm(module: GroupNorm, h: Tensor) -> Tensor:
        if module not in found:
            raise _Unknown(module, h)
        return _normalise(module, h, found[module])

    for _ in range(sum(isinstance(part, GroupNorm) for unit in segment for part in unit.modules())):
        sums = []
        for inner, outer in regions:
            h = outer.of(x)
            try:
                for unit in segment:
                    h = _run(unit, h, norm)
            except _Unknown as reached:
                module = reached.module
                scale = reached.x.shape[-1] // (outer.right - outer.left)
                sums.append(_moments(module, Tile(reached.x, inner, outer).exact(scale)))
        if not sums:  # attention blocks keep theirs to themselves
            break
        found[module] = _mean_and_variance([sum(part) for part in zip(*sums, strict=True)])
    return found


def _some_statistics(
    segment: Sequence[nn.Module], x: Tensor, regions: list[tuple[Region, Region]], cells: int
) -> Statistics:
    """Mean and variance (groups,) of each normalisation, over tiles of together at most `cells` positions of `x`."""
    area = max((o.bottom - o.top) * (o.right - o.left) for _, o in regions)
    count = min(len(regions), max(1, cells // area))
    chosen = [regions[(2 * i + 1) * len(regions) // (2 * count)] for i in range(count)]
    tiles = [Tile(outer.of(x), inner, outer) for inner, outer in chosen]
    found: Statistics = {}
    scale = 1

    def jointly(module: GroupNorm) -> None:
        sums = [_moments(module, tile.exact(scale)) for tile in tiles]
        found[module] = _mean_and_variance([sum(parts) for parts in zip(*sums, strict=True)])
        for tile in tiles:
            tile.x = _normalise(module, tile.x, found[module])

    for unit in segment:
        if isinstance(unit, ResnetBlock):
            shortcuts = [tile.x for tile in tiles]
            for norm, conv in ((unit.norm1, unit.conv1), (unit.norm2, unit.conv2)):
                jointly(norm)
                for tile in tiles:
                    tile.x = conv(tile.x)
            for tile, kept in zip(tiles, shortcuts, strict=True):
                tile.x.add_(kept if unit.shortcut is None else getattr(unit, unit.shortcut)(kept))
        elif isinstance(unit, GroupNorm):
            jointly(unit)
            break  # nothing is normalised after the last
        else:
            scale *= 2 if isinstance(unit, Upsample) else 1
            for tile in tiles:
                tile.x = unit(tile.x)
    return found


def _moments(module: GroupNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values, their sums and those of their squares in each group: float64 (groups,)."""
    groups = x[0].reshape(module.num_groups, -1)
    sums = groups.sum(1, dtype=torch.float64)
    return torch.full_like(sums, groups.shape[1]), sums, groups.square().sum(1, dtype=torch.float64)


def _mean_and_variance(sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    count, first, second = sums
    mean = first / count
    return mean, (second / count - mean.square()).clamp_(min=0)


def _normalise(module: GroupNorm, x: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    mean, variance = (part.repeat_interleave(x.shape[1] // module.num_groups) for part in statistics)
    scale = module.weight.double() / (variance + module.eps).sqrt()
    shift = module.bias.double() - mean * scale
    y = torch.addcmul(shift.to(x)[:, None, None], x, scale.to(x)[:, None, None])
    return F.silu(y, inplace=True) if module.silu else y
