"""Real images that others are compared with, and samples, as .npz files of guided-diffusion's evaluator.

``mu`` and ``sigma`` are mean and covariance of the features, ``mu_s`` and ``sigma_s`` those of the spatial ones, and
``arr_0`` are images, uint8 (N, H, W, 3): all, or as in the published files a part of those that the moments are of. We
add the ``network`` and the number of ``images``, which other programs pass over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

from tamingfast import images, npz
from tamingfast.errors import UserError
from tamingfast.evaluation.features import INCEPTION, Extractor, Seen, see
from tamingfast.evaluation.statistics import Features, Reference
from tamingfast.progress import Bars, silent
from tamingfast.ranks import in_turns, is_first, take_part

_EXPECTED = "statistics of images (mu, sigma) or images (arr_0) in an .npz file"
_SAMPLES = f"images ({npz.IMAGES}) in an .npz file"
#: Widest features whose covariance is read.
_WIDEST = 4096


def read_reference(path: str | os.PathLike[str], network: Extractor, batch: int = 16, bars: Bars = silent) -> Reference:
    """What the file says of real images, in the features of ``network``.

    Moments are taken from the file, else from its images; the features of single images, without which there are no
    kernel distance, precision and recall, from its images. Raises UserError for a file that is no .npz or holds neither
    in valid shapes, and for moments of another network's features.
    """
    with npz.opened(path, _EXPECTED) as found:
        if not found.names & {"mu", npz.IMAGES}:
            held = ", ".join(sorted(found.names)[:8]) or "no arrays"
            raise UserError(f"{path}: got {held}, expected {_EXPECTED}")
        moments = _moments(found, network) if "mu" in found.names else None
    seen = features_of(path, network, batch, bars) if npz.IMAGES in found.names else None
    if moments is None:
        assert seen is not None
        return seen.reference
    if seen is not None and len(seen.pooled.mean) != len(moments.mean):
        raise UserError(
            f"{path}: got moments of {len(moments.mean)} features, expected {len(seen.pooled.mean)}, those of "
            f"{network.name}; give statistics of that network"
        )
    return moments if seen is None else replace(moments, values=seen.values)


def network_of(path: str | os.PathLike[str]) -> str | None:
    """The name of the network whose statistics the file holds; None if it has images alone."""
    with npz.opened(path, _EXPECTED) as found:
        return _network(found) if "mu" in found.names else None


def _network(found: npz.Archive) -> str:
    return found.text("network") if "network" in found.names else INCEPTION


def _moments(found: npz.Archive, network: Extractor) -> Reference:
    name = _network(found)
    if name != network.name:
        raise UserError(
            f"{found.path}: got statistics in the features of {name}, expected those of {network.name}, in which the "
            "samples are seen; choose the network that the file is of"
        )
    count = int(found.whole("images", 1)[0]) if "images" in found.names else None
    mean, covariance = _gaussian(found, "mu", "sigma")
    spatial = _gaussian(found, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= found.names else None
    return Reference(name, count, mean, covariance, spatial)


def _gaussian(found: npz.Archive, mean: str, covariance: str) -> tuple[np.ndarray, np.ndarray]:
    center = found.whole(mean, -1)
    if not 1 <= len(center) <= _WIDEST:
        raise UserError(f"{found.path}: got {len(center)} numbers in {mean}, expected 1 to {_WIDEST}")
    spread = found.whole(covariance, len(center), len(center))
    if not np.allclose(spread, spread.T, rtol=1e-3, atol=1e-6 * np.abs(spread).max()):
        raise UserError(f"{found.path}: got a {covariance} that is not symmetric, expected a covariance")
    return center, (spread + spread.T) / 2


def features_of(path: str | os.PathLike[str], network: Extractor, batch: int = 16, bars: Bars = silent) -> Features:
    """The features of the images in an .npz file; UserError if it holds none, or fewer than 2."""
    with npz.opened(path, _SAMPLES) as found:
        count = found.size_of_images()[0]
        if count < 2:
            raise UserError(f"{path}: got {count} images, expected at least 2")
        seen = Features(network.name, count)
        with bars("images", count) as shown:
            for pixels in found.images(batch):
                seen.add(*see(network, pixels))
                shown.update(len(pixels))
    return seen


def save_reference(path: str | os.PathLike[str], network: Extractor, batches: Iterable[Tensor], count: int) -> Features:
    """Write the statistics of ``count`` images (b, C, H, W) in [-1, 1] and their pixels; returns their features.

    The file is written atomically and takes the memory of one batch. Raises ValueError for another number of images
    and UserError for fewer than 2, or if the file cannot be written.
    """
    if count < 2:
        raise UserError(f"save_reference: got {count} images, expected at least 2")
    seen = Features(network.name, count)

    def looked(batch: Tensor) -> tuple[np.ndarray, Seen]:
        pixels = images.to_uint8(batch)
        return pixels, see(network, pixels)

    def noted() -> Iterator[np.ndarray]:
        for pixels, found in in_turns(looked, batches):
            seen.add(*found)
            yield pixels

    if not is_first():
        take_part(noted())
        return seen
    with npz.written(path) as archive:
        archive.images(noted(), count)
        known = seen.reference
        moments = {"mu": known.mean, "sigma": known.covariance}
        if known.spatial is not None:
            moments |= dict(zip(("mu_s", "sigma_s"), known.spatial, strict=True))
        for name, values in moments.items():
            archive.array(name, values)
        archive.array("network", np.array(known.network))
        archive.array("images", np.array([count]))
    return seen
