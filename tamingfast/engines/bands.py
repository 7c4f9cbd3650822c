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
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.engines.feature_maps import FeatureMap, FeatureMaps, shape_of, too_little
from tamingfast.engines.layers import (
    REPORTED,
    Attention,
    Convolution,
    Downsample,
    Layer,
    LayeredNetwork,
    Norm,
    Residual,
    Shape,
    Upsample,
    Whole,
    shapes,
    work,
)
from tamingfast.ops.backends import available_memory

#: Peak memory of a layer that runs whole, counted in copies of its input or output, whichever is larger: the input, the
#: normalised input, the output and a library's copies of two; for attention also queries, keys, values and results.
MAPS, ATTENTION_MAPS = 6, 10

Progress = Callable[[int, int], object]


@torch.no_grad()
def run(network: LayeredNetwork, x: Tensor, memory: int | None = None, progress: Progress | None = None) -> Tensor:
    """``network(x)``: several images at a time if memory allows, in bands if not even one fits.

    Args:
        network: an encoder or a decoder.
        x: (B, C, H, W).
        memory: bytes for feature maps and the result, weights not counted. Default: half of the free memory.
        progress: called as progress(done, total), in multiply-adds over all images, after each layer, band or part of
            attention.

    Raises:
        UserError: ``memory`` is too small for bands of two rows, or the disk for the feature maps that exceed it.
    """
    layers = network.layers()
    memory = available_memory(x.device) // 2 if memory is None else memory
    sides = shapes(layers, shape_of(x))
    peaks = [_peak(layer, before, after) for layer, (before, after) in zip(layers, pairwise(sides), strict=True)]
    at_once = memory // (max(peaks) * x.element_size())
    costs = [work(layer, after) for layer, after in zip(layers, sides[1:], strict=True)]
    total, done = sum(costs) * len(x), 0.0

    def advance(more: float) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(round(done), total)

    if at_once and progress is None:
        parts = [network(part) for part in x.split(at_once)]
    elif at_once:
        parts = [_whole(layers, part, costs, advance) for part in x.split(at_once)]
    else:
        parts = [_one(layers, sides, image[None], memory, costs, advance) for image in x]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _peak(layer: Layer, before: Shape, after: Shape) -> int:
    """Peak number of values in memory while a layer runs whole."""
    maps = ATTENTION_MAPS if isinstance(layer, Attention) else MAPS
    return maps * max(math.prod(before), math.prod(after))


def _whole(layers: Sequence[Layer], x: Tensor, work: Sequence[int], advance: Callable[[float], None]) -> Tensor:
    """Run images (B, C, H, W) through the layers, each whole."""
    for layer, each in zip(layers, work, strict=True):
        x = _reported(layer, x, len(x) * each, advance)
    return x


def _reported(layer: Layer, x: Tensor, work: int, advance: Callable[[float], None]) -> Tensor:
    if isinstance(layer, Attention) and work > REPORTED:
        return layer.attend(x, lambda share: advance(share * work))
    out = layer(x)
    advance(work)
    return out


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
    store = FeatureMaps(memory, math.prod(sides[-1]) * size, 2 * max(rows) * size, x)
    current: Tensor | FeatureMap = x
    for i, layer in enumerate(layers):
        peak = _peak(layer, sides[i], sides[i + 1]) * size
        room = store.free + (current.charged if isinstance(current, FeatureMap) else 0)
        if peak <= room:
            current = _reported(
                layer, current.whole() if isinstance(current, FeatureMap) else current, work[i], advance
            )
        elif isinstance(layer, Attention | Whole):
            raise too_little(memory - room + peak, memory)
        else:
            if isinstance(current, Tensor):
                current = store.adopt(current)

            def advance_part(part: float, whole: int = work[i]) -> None:
                advance(part * whole)

            current = _in_bands(layer, current, sides[i + 1], store, i == len(layers) - 1, advance_part)
    return current.whole() if isinstance(current, FeatureMap) else current


def _in_bands(
    layer: Convolution | Residual | Upsample | Downsample,
    x: FeatureMap,
    shape: Shape,
    store: FeatureMaps,
    last: bool,
    advance: Callable[[float], None],
) -> FeatureMap:
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
            band = band.tanh_() if layer.tanh else band
        out.write(top, band)
        advance((bottom - top) / shape[1])
    x.close()
    return out


def _residual_in_bands(
    layer: Residual, x: FeatureMap, shape: Shape, store: FeatureMaps, last: bool, advance: Callable[[float], None]
) -> FeatureMap:
    h = _convolve_all(x, store.new(shape), layer.conv1, layer.norm1, advance)
    if layer.shortcut is None:
        out = _convolve_all(h, x, layer.conv2, layer.norm2, advance, skip=x)
    else:
        out = _convolve_all(h, store.new(shape, last), layer.conv2, layer.norm2, advance, x, layer.shortcut)
        x.close()
    h.close()
    return out


def _convolve_all(
    source: FeatureMap,
    out: FeatureMap,
    conv: nn.Conv2d,
    norm: Norm,
    advance: Callable[[float], None],
    skip: FeatureMap | None = None,
    shortcut: nn.Conv2d | None = None,
) -> FeatureMap:
    """``out`` = conv(norm(source)) + skip; ``skip`` goes through the convolution ``shortcut`` first, if given."""
    for top, bottom in out.bands(source):
        band = _convolve(conv, source, top, bottom, norm)
        if skip is not None:
            band += skip.read(top, bottom) if shortcut is None else _convolve(shortcut, skip, top, bottom)
        out.write(top, band)
        advance((bottom - top) / out.shape[1])
    return out


def _convolve(conv: nn.Conv2d, source: FeatureMap, top: int, bottom: int, norm: Norm | None = None) -> Tensor:
    reach = conv.kernel_size[0] // 2
    band = source.padded(top - reach, bottom + reach, norm)
    return F.conv2d(band, conv.weight, conv.bias, padding=(0, reach))


def _up(layer: Upsample, source: FeatureMap, top: int, bottom: int) -> Tensor:
    if layer.conv is None:
        return F.interpolate(source.read(top // 2, bottom // 2), scale_factor=2.0, mode="nearest")
    band = F.interpolate(source.padded(top // 2 - 1, bottom // 2 + 1), scale_factor=2.0, mode="nearest")
    return F.conv2d(band[:, :, 1:-1], layer.conv.weight, layer.conv.bias, padding=(0, 1))


def _down(layer: Downsample, source: FeatureMap, top: int, bottom: int) -> Tensor:
    if layer.conv is None:
        return F.avg_pool2d(source.read(2 * top, 2 * bottom), 2)
    left, right, above, _ = layer.padding
    band = F.pad(source.padded(2 * top - above, 2 * bottom + 1 - above), (left, right))
    return F.conv2d(band, layer.conv.weight, layer.conv.bias, stride=layer.conv.stride)
