"""The pixel baseline's first stage: a dictionary of colours (after iGPT), written as a run directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from tamingfast.checkpoints import run_directory, save_weights
from tamingfast.checkpoints.config import plain
from tamingfast.data.base import EpochDataset
from tamingfast.errors import UserError
from tamingfast.files import atomic_write
from tamingfast.models.color_clusters import ColorClusters
from tamingfast.training.seeds import seed_for

TARGET = "tamingfast.models.color_clusters.ColorClusters"
POINTS = 1 << 18  # pixels that k-means sees: 512 per colour for the paper's 512 colours
#: The least number of pixels taken from an image.
_PIXELS_PER_IMAGE = 64


def fit_color_clusters(
    dataset: EpochDataset,
    ncluster: int,
    seed: int,
    out: str | os.PathLike,
    data: Mapping[str, Any] | None = None,
    niter: int = 10,
) -> Path:
    """Learn ``ncluster`` RGB colours from a data set's images by k-means and write them as a first stage to ``out``.

    The pixels, `POINTS` at most, are drawn evenly over the images. ``data`` becomes the ``data:`` section that a prior
    on this first stage trains on by default. Raises UserError when the images have fewer pixels than there are colours.
    """
    points = _pixels(dataset, seed)
    if len(points) < ncluster:
        raise UserError(
            f"ncluster: got {ncluster} colours for {len(points)} pixels, expected at least as many pixels; ask for "
            "fewer colours, or give more images"
        )
    model = ColorClusters(ncluster, niter)
    torch.manual_seed(seed_for(seed, "colours"))
    model.kmeans.initialize(points)
    out = Path(out)
    config: dict[str, Any] = {"model": {"target": TARGET, "params": {"ncluster": ncluster, "niter": niter}}}
    if data is not None:
        config["data"] = dict(plain(data))
    with run_directory.held(out):
        with atomic_write(out / run_directory.CONFIG) as temporary:
            OmegaConf.save(OmegaConf.create(config), temporary)
        save_weights(out / run_directory.WEIGHTS, model.state_dict(), {"step": "0"})
    return out


def _pixels(dataset: EpochDataset, seed: int) -> torch.Tensor:
    """Pixels (N, 3) in [-1, 1], N at most `POINTS`, the same number from each image drawn."""
    random = np.random.default_rng(seed_for(seed, "pixels"))
    chosen = random.permutation(len(dataset))[: POINTS // _PIXELS_PER_IMAGE]
    share = max(_PIXELS_PER_IMAGE, POINTS // max(len(chosen), 1))
    rows = []
    for index in chosen.tolist():
        pixels = torch.as_tensor(dataset[index]["image"]).reshape(-1, 3)
        rows.append(pixels[torch.from_numpy(random.permutation(len(pixels))[:share])])
    return torch.cat(rows) if rows else torch.zeros(0, 3)
