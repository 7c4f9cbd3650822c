"""The CPU engine of encoders and decoders: the extension's convolutions, run layer by layer.

A layer writes its feature map in bands of rows. A map that does not fit into memory is kept in a scratch file, of which
the rows that the next layer reads are in memory. Whatever the bands, the batch and the number of threads, the result
has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.engines.cpu_maps import LANES, InFile, InMemory, Map
from tamingfast.engines.feature_maps import FeatureMaps, ScratchMap
from tamingfast.engines.layers import (
    Attention,
    Convolution,
    Downsample,
    Layer,
    LayeredNetwork,
    Norm,
    Residual,
    Shape,
    Upsample,
    mix,
    shapes,
    work,
)
from tamingfast.ops import backends, check

#: Peak memory of an image that runs with all maps in memory, counted in copies of its largest map: a residual block's
#: input, hidden map and output.
#: For attention also queries, keys and values, and the result.
MAPS, ATTENTION_MAPS = 3, 6
#: Bytes of a band; a smaller one would not keep all threads busy.
BAND = 8 << 20
#: Where few channels are summed, a transform's rounding alone would come close to 4 times the error of torch, or exceed
#: it. Convolutions of at most `FEW` input channels are direct, those of at most `NARROW` pairs of channels take the
#: smaller tile; they take two to three times as long for it.
FEW, NARROW = 32, 64 * 64
_MOST_THREADS = 256

#: advance(layer, part)
Advance: TypeAlias = Callable[[int, float], object]


def _ignore(layer: int, part: float) -> None:
    pass


class FirstStageEngine:
    """An encoder or a decoder; calls may run side by side.

    Args:
        network: is not kept.
        keep: pack all weights now and keep them. Otherwise each call packs those of a layer when it reaches the layer,
            and drops them after it; the results have the same bits.
    """

    def __init__(self, network: LayeredNetwork, keep: bool = True) -> None:
        self.layers = network.layers()
        self._joined = [convs for layer in self.layers for convs in _joined(layer)]
        self._kept = {tuple(map(id, convs)): _pack(convs) for convs in self._joined} if keep else {}

    def packed(self, convs: tuple[nn.Conv2d, ...]) -> _Packed:
        """Convolutions of one input as one, their outputs one after the other."""
        known = self._kept.get(tuple(map(id, convs)))
        return _pack(convs) if known is None else known

    def info(self) -> dict[str, int]:
        """weight_bytes: bytes of the packed weights that are kept."""
        return {"weight_bytes": sum(conv.native.bytes for conv in self._kept.values())}

    def peak(self, before: Shape) -> int:
        """Bytes of feature maps at most in memory for an image of shape ``before``, if all of them fit."""
        sides = [math.prod(shape) for shape in shapes(self.layers, before)]
        maps = [ATTENTION_MAPS if isinstance(layer, Attention) else MAPS for layer in self.layers]
        return 4 * max(count * max(pair) for count, pair in zip(maps, pairwise(sides), strict=True))

    def band(self, before: Shape) -> int:
        """Bytes of the smallest band of any layer."""
        rows = [_plan(convs).blocks[0] for convs in self._joined]
        return 4 * max(rows) * max(channels * width for channels, _, width in shapes(self.layers, before))

    def result(self, before: Shape) -> int:
        """Number of values of the result."""
        return math.prod(shapes(self.layers, before)[-1])

    def work(self, before: Shape) -> list[int]:
        """Multiply-adds of each layer, by the definition of a convolution."""
        return [work(layer, after) for layer, after in zip(self.layers, shapes(self.layers, before)[1:], strict=True)]

    def __call__(self, x: Tensor, store: FeatureMaps | None = None, advance: Advance = _ignore) -> Tensor:
        """The network's output for float32 images x (B, C, H, W), contiguous.

        Args:
            x: one image if there is a ``store``.
            store: keeps the feature maps that do not fit into its memory in scratch files.
            advance: called after each band with the number of the layer and the band's share of its work; the shares
                of a layer add up to 1.
        """
        current: Map = InMemory(x.detach().permute(0, 2, 3, 1).contiguous())
        for number, layer in enumerate(self.layers):
            current = _Run(self, len(x), store, partial(advance, number)).layer(layer, current)
        result = current.window(0, current.shape[1])[0].permute(0, 3, 1, 2).contiguous()
        current.close()
        last = self.layers[-1]
        return result.tanh_() if isinstance(last, Convolution) and last.tanh else result


# --- packed weights ---------------------------------------------------------------------------------------------------


def _joined(layer: Layer) -> list[tuple[nn.Conv2d, ...]]:
    """The convolutions of a layer, those together that read the same input."""
    if isinstance(layer, Attention):
        return [(layer.query, layer.key, layer.value), (layer.projection,)]
    return [(conv,) for conv in layer.convolutions]


@dataclass(frozen=True)
class _Plan:
    """How convolutions of one input are computed."""

    out: int
    inner: int
    kernel: int
    stride: int

    @property
    def method(self) -> str:
        winograd = self.kernel == 3 and self.stride == 1 and self.inner % LANES == 0 and self.inner > FEW
        return "patches" if not winograd else "winograd2" if self.inner * self.out <= NARROW else "winograd"

    @property
    def arguments(self) -> tuple[int, int, int, int, str]:
        return self.out, self.inner, self.kernel, self.stride, self.method

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of the blocks of which moments are summed; bands are whole rows of blocks."""
        return _native().Convolution.planned_blocks(*self.arguments, backends.isa())

    @property
    def reach(self) -> int:
        """Padding of a convolution of stride 1."""
        return self.kernel // 2


@dataclass(frozen=True)
class _Packed:
    native: Any
    plan: _Plan


def _plan(convs: tuple[nn.Conv2d, ...]) -> _Plan:
    first = convs[0]
    return _Plan(sum(conv.out_channels for conv in convs), first.in_channels, first.kernel_size[0], first.stride[0])


def _pack(convs: tuple[nn.Conv2d, ...]) -> _Packed:
    plan = _plan(convs)
    weight = _together([conv.weight for conv in convs])
    bias = _together(
        [conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias for conv in convs]
    )  # a name, as C++ gets the address alone
    native = _native().Convolution(
        _array("weight", weight), _array("bias", bias), *plan.arguments, _threads(), backends.isa()
    )
    return _Packed(native, plan)


def _together(tensors: list[Tensor]) -> Tensor:
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return joined.detach().to(torch.float32).contiguous()


def _array(name: str, tensor: Tensor) -> tuple[int, int]:
    return check.array(name, tensor, torch.float32)


def _maybe(name: str, tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else _array(name, tensor)


def _threads() -> int:
    return min(torch.get_num_threads(), _MOST_THREADS)


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A layer of one call of the engine."""

    engine: FirstStageEngine
    images: int
    store: FeatureMaps | None
    advance: Callable[[float], object]

    def layer(self, layer: Layer, x: Map) -> Map:
        """The layer's output; ``x`` is closed or becomes the output."""
        if isinstance(layer, Residual):
            return self.residual(layer, x)
        if isinstance(layer, Attention):
            return self.attention(layer, x)
        if isinstance(layer, Upsample | Downsample) and layer.conv is None:
            return self.resample(layer, x)
        out = self.new(layer.shape(x.shape))
        if isinstance(layer, Upsample):
            self.convolve(layer.convolutions, x, out, upsample=True)
        elif isinstance(layer, Downsample):
            self.convolve(layer.convolutions, x, out, padding=layer.padding[0])
        else:
            assert isinstance(layer, Convolution), "other layers are refused"
            self.convolve(layer.convolutions, x, out, norm=layer.norm)
        x.close()
        return out

    def new(self, shape: Shape) -> Map:
        """An empty map: in memory if it fits, else in a scratch file."""
        channels, height, width = shape
        size = 4 * math.prod(shape)
        if self.store is not None and size > self.store.free:
            return InFile(ScratchMap(self.store, shape, size))
        if self.store is not None:
            self.store.free -= size
        x = torch.empty(self.images, height, width, channels, dtype=torch.float32, device="cpu")
        return InMemory(x, self.store)

    def residual(self, layer: Residual, x: Map) -> Map:
        hidden = self.new(layer.shape(x.shape))
        self.convolve((layer.conv1,), x, hidden, norm=layer.norm1, share=0.5)
        out = x
        if layer.shortcut is not None:
            out = self.new(layer.shape(x.shape))
            self.convolve((layer.shortcut,), x, out, share=0.0)
            x.close()
        self.convolve((layer.conv2,), hidden, out, norm=layer.norm2, residual=True, share=0.5)
        hidden.close()
        return out

    def attention(self, layer: Attention, x: Map) -> Map:
        channels, height, width = x.shape
        joined = self.new((3 * channels, height, width))
        self.convolve((layer.query, layer.key, layer.value), x, joined, norm=layer.norm, share=0.25)
        whole, _ = joined.window(0, height)
        q, k, v = whole.view(self.images, 1, height * width, 3, channels).unbind(3)
        mixed = mix(q, k, v, lambda part: self.advance(part / 2)).view(self.images, height, width, channels)
        joined.close()
        self.convolve((layer.projection,), InMemory(mixed.contiguous()), x, residual=True, share=0.25)
        return x

    def resample(self, layer: Upsample | Downsample, x: Map) -> Map:
        """Without a convolution: torch's, and the moments of the result."""
        out = self.new(layer.shape(x.shape))
        channels, height, width = out.shape
        blocks = (2, 1 << 40)
        moments = out.measure(blocks)
        for top, bottom in self.bands(x, out, 2):
            first, last = (top // 2, -(-bottom // 2)) if isinstance(layer, Upsample) else (2 * top, 2 * bottom)
            source, begin = x.window(first, last)
            rows = source[:, first - begin : last - begin].permute(0, 3, 1, 2)
            if isinstance(layer, Upsample):
                rows = F.interpolate(rows, scale_factor=2.0, mode="nearest")
            else:
                rows = F.avg_pool2d(rows, 2)
            band = out.room(top, bottom)
            band.copy_(rows.permute(0, 2, 3, 1))
            if moments is not None:
                _native().moments(
                    _array("x", band),
                    self.images,
                    height,
                    width,
                    channels,
                    top,
                    bottom,
                    blocks,
                    _array("moments", moments),
                )
            out.put(top, band)
            self.advance((bottom - top) / height)
        x.close()
        return out

    def convolve(
        self,
        convs: tuple[nn.Conv2d, ...],
        x: Map,
        out: Map,
        *,
        norm: Norm | None = None,
        upsample: bool = False,
        residual: bool = False,
        padding: int | None = None,
        share: float = 1.0,
    ) -> None:
        """``out`` = convs(norm(x)), plus ``out`` itself if ``residual``; with the moments of ``out``."""
        conv = self.engine.packed(convs)
        plan = conv.plan
        if x.shape[0] != plan.inner:
            raise ValueError(f"x: got {x.shape[0]} channels, expected {plan.inner}, the convolution's")
        padding = plan.reach if padding is None else padding
        scale, shift = (None, None) if norm is None else _affine(norm, x)
        _, height, width = out.shape
        kernel, stride = plan.kernel, plan.stride
        moments = out.measure(conv.native.blocks)
        for top, bottom in self.bands(x, out, conv.native.blocks[0]):
            first, last = top * stride - padding, (bottom - 1) * stride - padding + kernel
            if upsample:
                first, last = first // 2, -(-last // 2)
            source, begin = x.window(max(0, first), min(x.shape[1], last))
            band = out.window(top, bottom)[0] if residual and isinstance(out, InFile) else out.room(top, bottom)
            conv.native.run(
                self.images, _array("x", source), begin, source.shape[1], *x.shape[1:], _array("out", band), height,
                width, top, bottom, padding, upsample, _maybe("scale", scale), _maybe("shift", shift),
                norm is not None and norm.silu, _array("residual", band) if residual else None,
                _maybe("moments", moments), _threads(),
            )  # fmt: skip
            out.put(top, band)
            self.advance(share * (bottom - top) / height)

    def bands(self, x: Map, out: Map, unit: int) -> Iterator[tuple[int, int]]:
        """Rows [top, bottom) of ``out``, written in bands of whole units; several images have one band.

        Neither these rows nor those of ``x`` that they are computed from take more than a band, but for a unit's rows.
        """
        height = out.shape[1]
        row = 4 * max(math.prod(x.shape), math.prod(out.shape)) // height
        band = BAND if self.store is None else min(BAND, self.store.band)
        rows = max(unit, band // row // unit * unit) if self.images == 1 else height
        for top in range(0, height, rows):
            yield top, min(top + rows, height)


def _native() -> Any:
    module, reason = backends.native()
    assert module is not None, reason
    return module


def _affine(norm: Norm, x: Map) -> tuple[Tensor, Tensor]:
    """Scale and shift of the normalisation of ``x``, (images, channels) each."""
    channels, height, width = x.shape
    assert x.moments is not None, "a map that is normalised has channels in whole vectors"
    scale, shift = torch.empty(2, x.images, channels, dtype=torch.float32, device="cpu")
    gain, bias = (part.detach().contiguous() for part in (norm.weight, norm.bias))
    _native().normalisation(
        _array("moments", x.moments), x.images, height, width, channels, x.blocks, norm.num_groups, norm.eps,
        _array("gain", gain), _array("bias", bias), _array("scale", scale), _array("shift", shift),
    )  # fmt: skip
    return scale, shift
