"""The batches of a data set, in an explicit order and from any batch on, read here or in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.errors import UserError, lost_worker
from tamingfast.ops.machine import processors


def loader(
    dataset: Dataset[dict[str, Any]],
    batch_size: int,
    *,
    order: np.ndarray | None = None,
    epoch: int = 0,
    workers: int = 0,
    start_batch: int = 0,
    drop_last: bool = True,
) -> Loader:
    """The items ``order`` of ``dataset`` in batches, as an iterable of dicts with one row per item.

    ``order`` holds the numbers of the items, such as those from `shuffled`; None takes all items in the data set's own
    order. ``epoch`` is what the data set's ``set_epoch`` receives. ``workers`` processes read ahead and change nothing
    else. Batches before ``start_batch`` are not read, so that a run that stopped in the middle of an epoch continues
    with exactly the batches that were left; ``drop_last`` leaves out a last batch that is not full. ``len`` of the
    result is the number of batches that it yields. torch's global random state is not touched.

    Raises UserError when ``drop_last`` would leave no batch, ValueError for arguments out of range.
    """
    items = as_epoch_dataset(dataset)
    order = np.arange(len(items)) if order is None else order
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if drop_last and len(order) < batch_size:
        raise UserError(
            f"batch_size: got {batch_size}, expected at most {len(order)}, the number of items; lower it, or give more "
            "data"
        )
    if workers < 0:
        raise ValueError(f"workers: got {workers}, expected at least 0")
    order = order[: len(order) // batch_size * batch_size] if drop_last else order
    parts = [(epoch, order[first : first + batch_size]) for first in range(0, len(order), batch_size)]
    if not 0 <= start_batch <= len(parts):
        raise ValueError(f"start_batch: got {start_batch}, expected 0 to {len(parts)}, the number of batches")
    return Loader(items, parts[start_batch:], workers)


#: (epoch, the numbers of the items) of a batch.
Part = tuple[int, np.ndarray]


class Loader:
    """An iterable over batches; see `loader`."""

    def __init__(self, dataset: EpochDataset, parts: Sequence[Part], workers: int) -> None:
        self._dataset, self._parts, self._workers = dataset, parts, workers

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from read(self._dataset, self._parts, self._workers if self._parts else 0)
        finally:  # also when the reader stops early and closes this generator
            self._dataset.warn_broken()


def read(dataset: EpochDataset, parts: Iterable[Part], workers: int = 0) -> Iterator[dict[str, Any]]:
    """The batches ``parts``, of which there may be no end.

    ``workers`` processes, at most one for each processor, read ahead. They live as long as the iterator, and so does
    what a data set keeps in memory.
    """
    batches = _Batches(dataset)
    if not workers:
        yield from map(batches.__getitem__, parts)
        return
    made = DataLoader(
        batches,
        batch_size=None,
        sampler=parts,
        num_workers=min(workers, processors()),  # more would only wait for one another
        collate_fn=_unchanged,
        generator=torch.Generator(),  # without one, DataLoader draws from torch's global generator
    )
    try:
        yield from made
    except UserError as error:
        # A worker's error arrives with its whole traceback as the message.
        own = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
        raise UserError(own.strip()) from error
    except (ConnectionError, EOFError) as error:
        if "in DataLoader worker process" in str(error):  # the data set's own, in a worker that goes on
            raise
        # The connection to a killed worker may break before torch notices its end.
        raise UserError(lost_worker(error)) from error


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


class _Batches(Dataset[dict[str, Any]]):
    """A map-style data set whose items are batches of another one."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, part: Part) -> dict[str, Any]:
        # Set for every batch, because two loaders may take turns on one data set and workers hold copies of it.
        self.dataset.set_epoch(part[0])
        return self.dataset.batch(part[1])


def _unchanged(batch: Any) -> Any:
    return batch
