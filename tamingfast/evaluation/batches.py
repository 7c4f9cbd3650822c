"""The images that figures are computed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tamingfast.data import loader, shuffled
from tamingfast.data.loading import to_device
from tamingfast.errors import UserError

#: Called with a number of images after these have been dealt with.
Progress = Callable[[int], Any]


def batches(
    dataset: Dataset, batch_size: int, limit: int | None = None, seed: int = 0, device: Any = "cpu"
) -> Iterator[dict[str, Any]]:
    """Batches of the whole dataset in its order, or of ``limit`` items drawn from all of it by ``seed``.

    Neighbours in a dataset are often parts of one photograph, so its beginning would not stand for the whole. With a
    ``limit`` beyond the dataset's length, all items are given once.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size} and limit {limit}; expected at least 1")
    left = len(dataset) if limit is None else min(limit, len(dataset))
    order = shuffled(len(dataset), seed) if left < len(dataset) else None
    for batch in loader(dataset, batch_size, order=order, drop_last=False):
        cut = {name: value[:left] for name, value in batch.items()}
        yield to_device(cut, torch.device(device))
        left -= len(next(iter(cut.values())))
        if left <= 0:
            return


def images_of(
    dataset: Dataset, batch_size: int = 16, limit: int | None = None, seed: int = 0, key: str = "image"
) -> Iterator[Tensor]:
    """The images of `batches`, (b, C, H, W); UserError when the dataset holds none."""
    for batch in batches(dataset, batch_size, limit, seed):
        if key not in batch:
            raise UserError(
                f"the data hold {', '.join(batch)} and no '{key}'; evaluate on images, for example name=folder path=DIR"
            )
        yield batch[key].permute(0, 3, 1, 2).contiguous()
