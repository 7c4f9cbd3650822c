"""Feature extractors for comparing sets of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast import images
from tamingfast.checkpoints.weights import load_into, read_state_dict
from tamingfast.errors import UserError, nearest
from tamingfast.evaluation.inception import FILE, Inception
from tamingfast.evaluation.statistics import Features
from tamingfast.models import classifiers
from tamingfast.ranks import in_turns

INCEPTION, EFFICIENTNET = "inception", classifiers.NAME


class Extractor(nn.Module):
    """A network for `extract`: pixels uint8 (b, 3, H, W) -> features (b, D), logits (b, classes), spatial features.

    The last two are None if the network has none that measures are defined for.
    """

    name: str


class _Inception(Extractor):
    """The Inception network of FID, with weights from a file."""

    name = INCEPTION

    def __init__(self, weights: str | os.PathLike | None):
        super().__init__()
        if weights is None or not Path(weights).exists():
            got = "none" if weights is None else f"no file {weights}"
            raise UserError(
                f"inception_weights: got {got}, expected torch-fidelity's {FILE}; download it from that project's "
                "releases and give it with inception_weights"
            )
        self.net = Inception()
        # Older torch did not store how many batches a norm has seen, and torch fills that in.
        counts = {name: value for name, value in self.net.state_dict().items() if name.endswith("batches_tracked")}
        load_into(self.net, counts | read_state_dict(weights), weights, advice=f"give {FILE}")
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.net(pixels)


class _EfficientNet(Extractor):
    """The 1280 features before the classes of EfficientNet-Lite0."""

    name = EFFICIENTNET

    def __init__(self, weights: str | os.PathLike | None):
        super().__init__()
        self.net = classifiers.ImageNet(weights)

    def forward(self, pixels: Tensor) -> tuple[Tensor, None, None]:
        return self.net.features(pixels), None, None


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


def extract(
    network: Extractor, batches: Iterable[Tensor], total: int | None = None, found: Features | None = None
) -> Features:
    """The features of images (b, C, H, W) in [-1, 1], C = 1 or 3, after rounding to 8 bits as in files.

    ``total`` is the number of all images; without it the features of all are held until they are counted. ``found``
    holds the features of the images before the first of ``batches``, and receives the others. Raises ValueError if
    there are no images, or another number than ``total``.
    """
    seen: Iterable[Seen] = in_turns(lambda batch: see(network, images.to_uint8(batch)), batches)
    if found is None and total is None:
        seen = list(seen)
        total = sum(len(values) for values, *_ in seen)
    if found is None:
        if not total:
            raise ValueError("batches: got none, expected at least one")
        found = Features(network.name, total)
    for part in seen:
        found.add(*part)
    if found.count != found.total:
        raise ValueError(f"batches: got {found.count} images, expected {found.total}")
    return found


#: Features (b, D), logits (b, classes) or None, and spatial features (b, E) or None, as float32.
Seen: TypeAlias = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


@torch.no_grad()
def see(network: Extractor, pixels: np.ndarray) -> Seen:
    """What ``network`` finds in pixels uint8 (b, H, W, 3)."""
    device = next(network.parameters()).device
    values, *others = network(torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(device))
    logits, spatial = (None if part is None else part.float().cpu().numpy() for part in others)
    return values.float().cpu().numpy(), logits, spatial
