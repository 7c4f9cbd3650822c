"""Which images each step sees: a pure function of (seed, step), so that a run can begin anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.data import loader
from tamingfast.data.randomness import random_bits
from tamingfast.errors import UserError
from tamingfast.training.distributed import World
from tamingfast.training.settings import Training


def key(*parts: Any) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def images_per_step(settings: Training, size: int) -> int:
    """Images that one optimizer step of ``size`` processes sees."""
    return settings.batch_size * settings.accumulate * size


def epoch_steps(dataset: Dataset, settings: Training, size: int) -> int:
    """Steps in an epoch; what is left after the last whole step is dropped (another part each epoch)."""
    whole = len(dataset) // images_per_step(settings, size)
    if not whole:
        raise UserError(
            f"the training set has {len(dataset)} images, fewer than one step's {images_per_step(settings, size)}; "
            "lower training.batch_size or training.accumulate"
        )
    return whole


class _Chosen(Dataset):
    """The items ``indices`` of a dataset, in that order, read in batches where the dataset can."""

    def __init__(self, dataset: Dataset, indices: np.ndarray):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        return self.dataset[int(self.indices[position])]

    def __getattr__(self, name: str) -> Any:
        if name == "batch":
            read = self.dataset.batch
            return lambda positions: read(self.indices[positions])
        if name in ("set_epoch", "warn_broken"):
            return getattr(self.dataset, name)
        raise AttributeError(name)


def _shuffled(count: int, *parts: Any) -> np.ndarray:
    return np.argsort(random_bits(key(*parts), 0, np.arange(count)), kind="stable")


def step_batches(dataset: Dataset, settings: Training, among: World, start: int) -> Iterator[tuple[int, list[Any]]]:
    """(epoch, the ``accumulate`` batches of this process) for each step from ``start`` on, for ever."""
    per_epoch = epoch_steps(dataset, settings, among.size)
    taken = per_epoch * images_per_step(settings, among.size)
    while True:
        epoch, first = divmod(start, per_epoch)
        order = _shuffled(len(dataset), settings.seed, "order", epoch)[:taken]
        mine = order.reshape(-1, among.size, settings.batch_size)[:, among.rank].reshape(-1)
        batches = iter(
            loader(
                _Chosen(dataset, mine),
                settings.batch_size,
                settings.seed,
                epoch,
                workers=settings.workers,
                start_batch=first * settings.accumulate,
                shuffle=False,
            )
        )
        for _ in range(first, per_epoch):
            yield epoch, [to_device(next(batches), among.device) for _ in range(settings.accumulate)]
        start = (epoch + 1) * per_epoch


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def validation_batches(dataset: Dataset, settings: Training, device: torch.device) -> Iterator[Any]:
    """The same images at every call: all, or ``validation_batches`` batches spread over the whole set."""
    # Neighbours in a dataset are often crops of one photograph, so its beginning would not stand for the whole.
    chosen = _shuffled(len(dataset), settings.seed, "validation")
    if settings.validation_batches is not None:
        chosen = chosen[: settings.validation_batches * settings.batch_size]
    batches = loader(
        _Chosen(dataset, chosen),
        settings.batch_size,
        settings.seed,
        epoch=0,
        workers=settings.workers,
        drop_last=False,
        shuffle=False,
    )
    return (to_device(batch, device) for batch in batches)


def grid_of(dataset: Dataset, stage: nn.Module, key: str = "image") -> tuple[int, int]:
    """Tokens (rows, columns) of a dataset's images under a first stage, or of its token grids."""
    grid = getattr(dataset, "grid", None)
    if grid is not None:
        return tuple(grid)
    height, width = dataset[0][key].shape[:2]
    if height % stage.factor or width % stage.factor:
        raise UserError(
            f"the images are {height} x {width}, no multiple of the first stage's {stage.factor}; set data.size to one"
        )
    return stage.grid(height, width)
