"""Describes an encoder or a decoder as a list of layers in the order in which they run, each with its torch modules.

Engines run a first stage from this description and never look at its class. Widths, kernel sizes, strides and padding
are those of the ``torch.nn.Conv2d`` modules; groups, eps and activation those of the norms. Calling a layer runs
it on a whole feature map; its `shape` method gives the shape of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _GLOBAL_HOOKS

from tamingfast.engines.networks import Transformer

Shape: TypeAlias = tuple[int, int, int]  # channels, height, width

#: Zeros (left, right, top, bottom) that a `Downsample` adds around its input; its convolution then adds none.
DOWNSAMPLE_PADDING = (0, 1, 0, 1)
Padding: TypeAlias = tuple[int, int, int, int]


class Norm(Protocol):
    """A group normalisation, followed by the activation x * sigmoid(x) if ``silu``."""

    num_groups: int
    eps: float
    silu: bool
    weight: nn.Parameter
    bias: nn.Parameter

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Convolution:
    """A normalisation, if any, a convolution of stride 1 that keeps height and width, and tanh if ``tanh``."""

    conv: nn.Conv2d
    norm: Norm | None = None
    tanh: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv(x if self.norm is None else self.norm(x))
        return torch.tanh(x) if self.tanh else x

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """All convolutions of the layer."""
        return (self.conv,)

    def shape(self, before: Shape) -> Shape:
        """Shape of the output for an input of shape ``before``."""
        return self.conv.out_channels, before[1], before[2]


@dataclass(frozen=True, eq=False, kw_only=True)
class Residual:
    """``conv2(norm2(conv1(norm1(x)))) + x``; the last x goes through the convolution ``shortcut``, if any.

    ``module`` is the whole block, which also applies dropout in training mode.
    """

    module: nn.Module
    norm1: Norm
    conv1: nn.Conv2d
    norm2: Norm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """All convolutions of the layer."""
        return _present(self.conv1, self.conv2, self.shortcut)

    def shape(self, before: Shape) -> Shape:
        """Shape of the output for an input of shape ``before``."""
        return self.conv2.out_channels, before[1], before[2]


#: Multiply-adds of attention after which `Attention.attend` reports: about a second of a CPU core.
REPORTED = 2**34
#: Queries that CPU kernels take at a time; a part is a multiple of it.
_QUERIES = 512


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention:
    """``x + projection(softmax(q kᵀ / √C) v)`` over all pixels: one head of all C channels.

    q, k and v are 1x1 convolutions of ``norm(x)``. Memory is proportional to the number of pixels, time to its square.
    """

    module: nn.Module
    norm: Norm
    query: nn.Conv2d
    key: nn.Conv2d
    value: nn.Conv2d
    projection: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def attend(self, x: Tensor, advance: Callable[[float], object] | None = None) -> Tensor:
        """The layer's definition: x (B, C, H, W) -> (B, C, H, W).

        ``advance`` is called with shares of the work, which add up to 1; the queries then go in parts, at most one a
        second or so.
        """
        h = self.norm(x)
        # Contiguous, because otherwise PyTorch's CPU attention stores all pairs of scores: 17 GB for 256 x 256 pixels.
        q, k, v = (
            conv(h).flatten(2).transpose(1, 2).contiguous()[:, None] for conv in (self.query, self.key, self.value)
        )
        h = mix(q, k, v, advance)
        return x + self.projection(h[:, 0].transpose(1, 2).reshape(x.shape))

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """All convolutions of the layer."""
        return self.query, self.key, self.value, self.projection

    def shape(self, before: Shape) -> Shape:
        """Shape of the output, which is that of the input."""
        return before


@dataclass(frozen=True, eq=False, kw_only=True)
class Upsample:
    """Every pixel repeated twice in both directions, then a convolution, if any, that keeps the doubled size."""

    module: nn.Module
    conv: nn.Conv2d | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """All convolutions of the layer."""
        return _present(self.conv)

    def shape(self, before: Shape) -> Shape:
        """Shape of the output for an input of shape ``before``."""
        return _channels(self.conv, before), 2 * before[1], 2 * before[2]


@dataclass(frozen=True, eq=False, kw_only=True)
class Downsample:
    """Half the height and width: zeros around the input and a 3x3 convolution of stride 2, which adds none.

    Without a convolution: the mean of 2x2 pixels. The result is rounded down, but up if all sides are padded.
    """

    module: nn.Module
    conv: nn.Conv2d | None
    padding: Padding = DOWNSAMPLE_PADDING

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """All convolutions of the layer."""
        return _present(self.conv)

    def shape(self, before: Shape) -> Shape:
        """Shape of the output for an input of shape ``before``."""
        more = 0 if self.conv is None else sum(self.padding[2:]) - 1
        return _channels(self.conv, before), (before[1] + more) // 2, (before[2] + more) // 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Whole:
    """Any other block that keeps height and width: engines run the ``module`` whole, or leave the network to torch."""

    module: nn.Module
    convolutions: tuple[nn.Conv2d, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def shape(self, before: Shape) -> Shape:
        """Shape of the output for an input of shape ``before``."""
        return self.convolutions[-1].out_channels, before[1], before[2]


Layer: TypeAlias = Convolution | Residual | Attention | Upsample | Downsample | Whole


@runtime_checkable
class LayeredNetwork(Protocol):
    """A network that equals its layers run one after the other."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def layers(self) -> list[Layer]:
        """The layers in the order in which they run."""


_Class = TypeVar("_Class", bound=type[nn.Module])
#: Classes of which a description says all that they compute; not their subclasses.
_DESCRIBED: set[type[nn.Module]] = {nn.Conv2d, nn.Dropout, nn.ModuleList}


def described(kind: _Class) -> _Class:
    """A decorator of module classes that compute what the description of their network says, and nothing else."""
    _DESCRIBED.add(kind)
    return kind


def undescribed(network: nn.Module) -> str | None:
    """Why a network may compute something else than its description says, or None."""
    for module in network.modules():
        if type(module) not in _DESCRIBED:
            return f"it does not know {type(module).__name__}"
    return altered(network)


def altered(network: nn.Module | Transformer) -> str | None:
    """Why a module may compute something else than its class says, for a program has hooked in; or None."""
    if _GLOBAL_HOOKS._global_forward_hooks or _GLOBAL_HOOKS._global_forward_pre_hooks:
        return "all modules have hooks"
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "a module has hooks"
        if "forward" in vars(module):
            return f"the forward of a {type(module).__name__} was replaced"
    return None


def shapes(layers: Iterable[Layer], before: Shape) -> list[Shape]:
    """Shapes of the feature maps before, between and after the layers."""
    found = [before]
    for layer in layers:
        found.append(layer.shape(found[-1]))
    return found


def mix(q: Tensor, k: Tensor, v: Tensor, advance: Callable[[float], object] | None = None) -> Tensor:
    """``softmax(q kᵀ / √C) v`` of tensors (B, 1, pixels, C); ``advance`` as in `Attention.attend`."""
    if advance is None:
        return F.scaled_dot_product_attention(q, k, v)
    rows = max(REPORTED // (2 * k.numel()) // _QUERIES, 1) * _QUERIES
    parts = []
    for part in q.split(rows, dim=2):
        parts.append(F.scaled_dot_product_attention(part, k, v))
        advance(part.shape[2] / q.shape[2])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def work(layer: Layer, after: Shape) -> int:
    """Multiply-adds of a layer with an output of shape ``after``."""
    channels, height, width = after
    pixels = height * width
    weights = sum(conv.weight.numel() for conv in layer.convolutions)
    return pixels * (weights + (2 * pixels * channels if isinstance(layer, Attention) else 0))


def _present(*convolutions: nn.Conv2d | None) -> tuple[nn.Conv2d, ...]:
    return tuple(conv for conv in convolutions if conv is not None)


def _channels(conv: nn.Conv2d | None, before: Shape) -> int:
    return before[0] if conv is None else conv.out_channels
