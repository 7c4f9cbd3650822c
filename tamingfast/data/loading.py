"""The batches of one epoch: their order, reading them here or in worker processes, starting in the middle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from tamingfast.data.randomness import random_bits
from tamingfast.errors import UserError


def loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    workers: int = 0,
    start_batch: int = 0,
    drop_last: bool = True,
    shuffle: bool = True,
) -> Loader:
    """The batches of ``epoch``, from ``start_batch`` on, as an iterable of dicts with one row per item.

    The order is a pure function of (seed, epoch, len(dataset)), whatever ``workers`` is, and batches before
    ``start_batch`` are not read, so a run that stopped in mid-epoch goes on with exactly the batches that
    were left. ``len`` of the result is the number of batches that it yields. The global random state is not
    touched.

    Raises UserError when the dataset is smaller than one full batch, ValueError for arguments out of range.
    """
    return Loader(_Epoch(dataset, batch_size, seed, epoch, drop_last, shuffle), workers, start_batch)


class Loader:
    """An iterable over the batches ``start_batch`` to the last of one epoch; see ``loader``."""

    def __init__(self, epoch: _Epoch, workers: int, start_batch: int) -> None:
        if not 0 <= start_batch <= len(epoch):
            raise ValueError(f"start_batch is {start_batch}, but the epoch has {len(epoch)} batches")
        if workers < 0:
            raise ValueError(f"workers is {workers}, but at least 0 is expected")
        # More processes than processors would only wait for one another.
        self._epoch, self._workers = epoch, min(workers, _processors())
        self._numbers = range(start_batch, len(epoch))

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._batches()
        finally:  # whoever wants no more batches closes this generator
            getattr(self._epoch.dataset, "warn_broken", lambda: None)()

    def _batches(self) -> Iterator[dict[str, Any]]:
        if self._workers and self._numbers:
            # A generator of its own, because DataLoader would else draw from torch's global one.
            batches = DataLoader(
                self._epoch,
                batch_size=None,
                sampler=self._numbers,
                num_workers=self._workers,
                collate_fn=_unchanged,
                generator=torch.Generator(),
            )
            try:
                yield from batches
            except UserError as error:
                # A worker's error arrives with its whole traceback as the message.
                own = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
                raise UserError(own.strip()) from error
        else:
            for number in self._numbers:
                yield self._epoch[number]


def _processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Epoch(Dataset):
    """Map-style dataset whose item ``b`` is the ``b``-th batch of the epoch."""

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, epoch: int, drop_last: bool, shuffle: bool
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but at least 1 is expected")
        items = len(dataset)  # type: ignore[arg-type]
        if drop_last and items < batch_size:
            raise UserError(
                f"the dataset has {items} items, fewer than one batch of {batch_size}: lower the batch size"
            )
        self.dataset, self.batch_size, self.epoch = dataset, batch_size, epoch
        self.order = np.arange(items)
        if shuffle:
            self.order = np.argsort(random_bits(seed, epoch, self.order), kind="stable")
        if drop_last:
            self.order = self.order[: items // batch_size * batch_size]

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        # Set for every batch, because two loaders may take turns on one dataset and workers hold copies of
        # it.
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        indices = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        if hasattr(self.dataset, "batch"):
            return self.dataset.batch(indices)
        return default_collate([self.dataset[int(index)] for index in indices])


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
