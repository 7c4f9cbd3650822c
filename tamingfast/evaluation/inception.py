"""The Inception network of FID (Szegedy et al. 2016, as of 2015-12-05), with the names of torch-fidelity's file.

It is not torchvision's Inception v3: its average pooling leaves the padding out, its last block pools by the maximum,
it knows 1008 classes, and its images are scaled as TensorFlow 1 scaled them.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Side of its images, and the file of its weights.
SIDE, FILE = 299, "weights-inception-2015-12-05-6726825d.pth"
#: Width of its features, of its logits, and of the spatial features: 7 channels of 17 x 17.
FEATURES, CLASSES, SPATIAL = 2048, 1008, 7 * 17 * 17
#: Convolutions by name: output channels and kernel (height, width).
Branch: TypeAlias = dict[str, tuple[int, tuple[int, int]]]

_1, _3, _5, _1x7, _7x1, _1x3, _3x1 = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)


class _Convolution(nn.Module):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches beside one another, whose outputs are concatenated, and one that begins with pooling.

    Names that end in "a" and "b" have the same input. The last convolution of a branch in a block that ``halves`` the
    image has stride 2, and the pooling branch of such a block is the maximum alone.
    """

    def __init__(self, channels: int, branches: list[Branch], pool: str, pooled: int = 0, halves: bool = False) -> None:
        super().__init__()
        self.branches, self.pool, self.halves = [list(branch) for branch in branches], pool, halves
        for branch in branches:
            width = channels
            for name, (out, kernel) in branch.items():
                last = halves and name == list(branch)[-1]
                self.add_module(name, _Convolution(width, out, kernel, 2 if last else 1, padded=not last))
                width = width if name.endswith("a") else out
        if pooled:
            self.add_module("branch_pool", _Convolution(channels, pooled, _1, 1, padded=True))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            y, beside = x, []
            for name in branch:
                out = self.get_submodule(name)(y)
                if name.endswith(("a", "b")):
                    beside.append(out)
                else:
                    y = out
            found += beside or [y]
        return torch.cat([*found, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.halves:
            return F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.get_submodule("branch_pool")(x)


def _a(channels: int, pooled: int) -> _Block:
    branches: list[Branch] = [
        {"branch1x1": (64, _1)},
        {"branch5x5_1": (48, _1), "branch5x5_2": (64, _5)},
        {"branch3x3dbl_1": (64, _1), "branch3x3dbl_2": (96, _3), "branch3x3dbl_3": (96, _3)},
    ]
    return _Block(channels, branches, "average", pooled)


def _b() -> _Block:
    double: Branch = {"branch3x3dbl_1": (64, _1), "branch3x3dbl_2": (96, _3), "branch3x3dbl_3": (96, _3)}
    return _Block(288, [{"branch3x3": (384, _3)}, double], "max", halves=True)


def _c(wide: int) -> _Block:
    kernels = [_1, _7x1, _1x7, _7x1, _1x7]
    double = {f"branch7x7dbl_{n}": (192 if n == 5 else wide, kernel) for n, kernel in enumerate(kernels, 1)}
    branches: list[Branch] = [
        {"branch1x1": (192, _1)},
        {"branch7x7_1": (wide, _1), "branch7x7_2": (wide, _1x7), "branch7x7_3": (192, _7x1)},
        double,
    ]
    return _Block(768, branches, "average", 192)


def _d() -> _Block:
    kernels = [_1, _1x7, _7x1, _3]
    branches: list[Branch] = [
        {"branch3x3_1": (192, _1), "branch3x3_2": (320, _3)},
        {f"branch7x7x3_{n}": (192, kernel) for n, kernel in enumerate(kernels, 1)},
    ]
    return _Block(768, branches, "max", halves=True)


def _e(channels: int, pool: str) -> _Block:
    branches: list[Branch] = [
        {"branch1x1": (320, _1)},
        {"branch3x3_1": (384, _1), "branch3x3_2a": (384, _1x3), "branch3x3_2b": (384, _3x1)},
        {
            "branch3x3dbl_1": (448, _1), "branch3x3dbl_2": (384, _3),
            "branch3x3dbl_3a": (384, _1x3), "branch3x3dbl_3b": (384, _3x1),
        },
    ]  # fmt: skip
    return _Block(channels, branches, pool, 192)


class Inception(nn.Module):
    """Pixels uint8 (b, 3, H, W) -> features (b, 2048), logits (b, 1008) without bias, spatial features (b, 2023).

    The features are those of FID (Heusel et al. 2017), the logits those of the Inception score as torch-fidelity takes
    it, and the spatial features those of sFID (Nash et al. 2021) in the order of guided-diffusion's evaluator: the
    first 7 channels of the 1x1 branch in the fourth block of 17 x 17.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, _3, 2, padded=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, _3, 1, padded=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, _3, 1, padded=True)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, _1, 1, padded=True)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, _3, 1, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = _b(), _c(128), _c(160)
        self.Mixed_6d, self.Mixed_6e = _c(160), _c(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _d(), _e(1280, "average"), _e(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resized(pixels.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return features, features @ self.fc.weight.T, spatial


def resized(x: Tensor, side: int) -> Tensor:
    """(b, C, H, W) as (b, C, side, side), bilinearly as TensorFlow 1 did: pixel i lies at i * H / side."""
    for axis in (2, 3):
        length = x.shape[axis]
        places = torch.arange(side, dtype=torch.float32, device=x.device) * (length / side)
        low = places.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (places - low).to(x.dtype)[:, None] if axis == 2 else (places - low).to(x.dtype)
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x
