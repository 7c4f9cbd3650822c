"""The pixel baseline's first stage: a dictionary of colours (after iGPT), as a run directory like any other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import plain
from tamingfast.errors import UserError
from tamingfast.files import atomic_write
from tamingfast.training.feed import key

TARGET = "tamingfast.models.color_clusters.ColorClusters"
POINTS = 1 << 18  # pixels that k-means sees: 512 for each colour of the paper's 512


def fit_color_clusters(
    dataset: Dataset,
    ncluster: int,
    seed: int,
    out: str | os.PathLike,
    data: Mapping[str, Any] | None = None,
    niter: int = 10,
) -> Path:
    """Learn ``ncluster`` RGB colours from the dataset's images by k-means and write them as a first stage to ``out``.

    The pixels are drawn evenly over up to `POINTS` / 64 images. ``data`` is the ``data:`` section that a prior on top
    of it trains on by default. Raises UserError when the images have fewer pixels than there are colours.
    """
    from omegaconf import OmegaConf

    from tamingfast.checkpoints import save_weights
    from tamingfast.models.color_clusters import ColorClusters

    points = _pixels(dataset, seed)
    if len(points) < ncluster:
        raise UserError(
            f"the images have {len(points)} pixels, fewer than the {ncluster} colours asked for; ask for fewer"
        )
    model = ColorClusters(ncluster, niter)
    torch.manual_seed(key(seed, "colours"))
    model.kmeans.initialize(points)
    out = Path(out)
    config = {"model": {"target": TARGET, "params": {"ncluster": ncluster, "niter": niter}}}
    if data is not None:
        config["data"] = dict(plain(data))
    with atomic_write(out / run_directory.CONFIG) as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)
    save_weights(out / run_directory.WEIGHTS, model.state_dict(), {"step": "0"})
    return out


def _pixels(dataset: Dataset, seed: int) -> torch.Tensor:
    """Pixels (N, 3) in [-1, 1], N at most `POINTS`, the same number from each of some images."""
    random = np.random.default_rng(key(seed, "pixels"))
    chosen = random.permutation(len(dataset))[: POINTS // 64]
    share = max(64, POINTS // max(len(chosen), 1))
    rows = []
    for index in chosen.tolist():
        pixels = torch.as_tensor(dataset[index]["image"]).reshape(-1, 3)
        rows.append(pixels[torch.from_numpy(random.permutation(len(pixels))[:share])])
    return torch.cat(rows) if rows else torch.zeros(0, 3)
