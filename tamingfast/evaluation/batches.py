"""Batches of the images that a model is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tamingfast.data import loader, shuffled
from tamingfast.data.base import as_epoch_dataset
from tamingfast.data.loading import to_device
from tamingfast.errors import UserError

#: Called after each batch with the number of images in it.
Progress = Callable[[int], object]


def batches(
    dataset: Dataset,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Iterator[dict[str, Any]]:
    """Batches of the whole data set in its own order, or of ``limit`` items drawn from all of it by ``seed``.

    Items are drawn because neighbours are often crops of the same photograph, so that the first few would not
    represent the set. A ``limit`` above the number of items takes each once. Raises ValueError for a ``batch_size`` or
    ``limit`` below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    items = as_epoch_dataset(dataset)
    left = len(items) if limit is None else min(limit, len(items))
    order = shuffled(len(items), seed) if left < len(items) else None
    for batch in loader(items, batch_size, order=order, drop_last=False):
        cut = {name: value[:left] for name, value in batch.items()}
        yield to_device(cut, torch.device(device))
        left -= len(next(iter(cut.values())))
        if left <= 0:
            return


def images_of(
    dataset: Dataset, batch_size: int = 16, limit: int | None = None, seed: int = 0, key: str = "image"
) -> Iterator[Tensor]:
    """The images of `batches` as (b, C, H, W). Raises UserError if the data set has none under ``key``."""
    for batch in batches(dataset, batch_size, limit, seed):
        if key not in batch:
            raise UserError(
                f"data: got items with {', '.join(batch)}, expected '{key}' among them; evaluate on images, for "
                "example name=folder path=DIR"
            )
        yield batch[key].permute(0, 3, 1, 2).contiguous()
