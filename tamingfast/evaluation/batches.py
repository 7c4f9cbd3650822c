"""Batches of the images that a model is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tamingfast.data import loader, shuffled
from tamingfast.data.base import as_epoch_dataset
from tamingfast.data.loading import to_device
from tamingfast.errors import UserError

#: Called after each batch with the number of images in it.
Progress = Callable[[int], object]


#: The numbers of the items of a batch.
Part = np.ndarray


def parts(dataset: Dataset, batch_size: int, limit: int | None = None, seed: int = 0) -> list[Part]:
    """The batches of the whole data set in its own order, or of ``limit`` items drawn from all of it by ``seed``.

    Items are drawn because neighbours are often crops of the same photograph, so that the first few would not
    represent the set. A ``limit`` above the number of items takes each once. Raises ValueError for a ``batch_size`` or
    ``limit`` below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    length = len(as_epoch_dataset(dataset))
    count = length if limit is None else min(limit, length)
    order = shuffled(length, seed)[:count] if count < length else np.arange(length)
    return [order[first : first + batch_size] for first in range(0, count, batch_size)]


def loaded(dataset: Dataset, part: Part, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The items of a batch."""
    return to_device(next(iter(loader(dataset, len(part), order=part))), torch.device(device))


def batches(
    dataset: Dataset,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Iterator[dict[str, Any]]:
    """The batches `parts`, one after the other."""
    return (loaded(dataset, part, device) for part in parts(dataset, batch_size, limit, seed))


def images_of(
    dataset: Dataset, batch_size: int = 16, limit: int | None = None, seed: int = 0, key: str = "image"
) -> Iterator[Tensor]:
    """The images of `batches` as (b, C, H, W). Raises UserError if the data set has none under ``key``."""
    return (images_in(dataset, part, key) for part in parts(dataset, batch_size, limit, seed))


def images_in(dataset: Dataset, part: Part, key: str = "image") -> Tensor:
    """The images of a batch as (b, C, H, W). Raises UserError if the data set has none under ``key``."""
    batch = loaded(dataset, part)
    if key not in batch:
        raise UserError(
            f"data: got items with {', '.join(batch)}, expected '{key}' among them; evaluate on images, for "
            "example name=folder path=DIR"
        )
    return batch[key].permute(0, 3, 1, 2).contiguous()
