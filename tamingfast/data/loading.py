"""The batches of a data set, in an explicit order and from any batch on, read here or in worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.data.randomness import random_bits
from tamingfast.errors import UserError


def shuffled(count: int, seed: int, epoch: int = 0) -> np.ndarray:
    """int64 (count,): the numbers from 0 to ``count`` - 1, shuffled as a pure function of (count, seed, epoch)."""
    return np.argsort(random_bits(seed, epoch, np.arange(count)), kind="stable")


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
    return Loader(_Batches(items, batch_size, order, epoch, drop_last), workers, start_batch)


class Loader:
    """An iterable over the batches from ``start_batch`` on; see `loader`."""

    def __init__(self, batches: _Batches, workers: int, start_batch: int) -> None:
        if not 0 <= start_batch <= len(batches):
            raise ValueError(f"start_batch: got {start_batch}, expected 0 to {len(batches)}, the number of batches")
        if workers < 0:
            raise ValueError(f"workers: got {workers}, expected at least 0")
        # More processes than processors would only wait for one another.
        self._batches, self._workers = batches, min(workers, _processors())
        self._numbers = range(start_batch, len(batches))

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._read()
        finally:  # also when the reader stops early and closes this generator
            self._batches.dataset.warn_broken()

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self._workers or not self._numbers:
            for number in self._numbers:
                yield self._batches[number]
            return
        batches = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._numbers,
            num_workers=self._workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # without one, DataLoader draws from torch's global generator
        )
        try:
            yield from batches
        except UserError as error:
            # A worker's error arrives with its whole traceback as the message.
            own = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
            raise UserError(own.strip()) from error


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _processors() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Batches(Dataset[dict[str, Any]]):
    """A map-style data set whose item ``b`` is the ``b``-th batch of another one."""

    def __init__(self, dataset: EpochDataset, batch_size: int, order: np.ndarray, epoch: int, drop_last: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if drop_last and len(order) < batch_size:
            raise UserError(
                f"batch_size: got {batch_size}, expected at most {len(order)}, the number of items; lower it, or give "
                "more data"
            )
        self.dataset, self.batch_size, self.epoch = dataset, batch_size, epoch
        self.order = order[: len(order) // batch_size * batch_size] if drop_last else order

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        # Set for every batch, because two loaders may take turns on one data set and workers hold copies of it.
        self.dataset.set_epoch(self.epoch)
        indices = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        return self.dataset.batch(indices)


def _unchanged(batch: Any) -> Any:
    return batch
