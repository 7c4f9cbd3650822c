"""The interface of every dataset, and base classes for ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from tamingfast.data.conditions import Kind
from tamingfast.data.randomness import shuffled
from tamingfast.errors import UserError, brief


class ConditionRecord(TypedDict, total=False):
    """What a token file records about its condition tokens; files from other programs may leave entries out.

    Attributes:
        key: the condition's key in a batch.
        vocab_size: number of codes.
        first_stage: fingerprint of the first stage that made the tokens.
        data: settings of the kind of condition (`tamingfast.data.conditions.settings_of`).
    """

    key: str
    vocab_size: int
    first_stage: str
    data: dict[str, Any]


class EpochDataset(Dataset[dict[str, Any]]):
    """A map-style dataset whose items may depend on the epoch, which only ``set_epoch`` changes.

    An item is a dict with ``image`` float32 (H, W, 3) in [-1, 1], ``class_label`` int and ``file_path_`` str, or with
    tokens instead (`tamingfast.data.tokens`); conditions are further entries. Subclasses define ``__len__`` and
    ``__getitem__``.

    Attributes:
        epoch: the epoch that items are drawn for.
        classes: names of the classes, by ``class_label``; None if the data have no labels.
        kind: the kind of condition that items hold under ``kind.key``; None without one.
        grid: (rows, columns) of items that are token grids; None for images.
        vocab_size: number of codes of token grids; None for images.
        metadata: what a token file records about its origin; empty for images.
        condition: what a token file records about the condition tokens that it holds; None without them.
        decodes: whether each item is decoded from a file, which other processes can do ahead.
    """

    epoch: int = 0
    classes: Sequence[str] | None = None
    kind: Kind | None = None
    grid: tuple[int, int] | None = None
    vocab_size: int | None = None
    metadata: Mapping[str, str] = {}
    condition: ConditionRecord | None = None
    decodes: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def description(self) -> str:
        """One phrase about the contents, for reports and token files."""
        return type(self).__name__

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next items belong to."""
        self.epoch = int(epoch)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """The items ``indices`` (n,), collated: tensors and lists with one row per index."""
        return default_collate([self[int(index)] for index in indices])

    def order(self, seed: int) -> np.ndarray:
        """int64 (n,): the numbers of all items in the order of a training's epoch, shuffled by ``seed``."""
        return shuffled(len(self), seed)

    def warn_broken(self) -> None:
        """Log the files found unreadable since the last call; does nothing for data that are not read file by file."""

    def _check(self, index: int) -> int:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for a dataset of {length} items")
        return int(index) % length


class _Foreign(EpochDataset):
    """Any other map-style dataset: its own attributes of an `EpochDataset` are used, missing ones get the defaults."""

    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        self.dataset = dataset
        for name in ("epoch", "classes", "kind", "grid", "vocab_size", "metadata", "condition"):
            setattr(self, name, getattr(dataset, name, getattr(self, name)))
        if isinstance(self.classes, int):  # a number of classes instead of their names
            self.classes = [str(number) for number in range(self.classes)]

    @property
    def description(self) -> str:
        return getattr(self.dataset, "description", type(self.dataset).__name__)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        return self.dataset.batch(indices) if hasattr(self.dataset, "batch") else super().batch(indices)

    def warn_broken(self) -> None:
        if hasattr(self.dataset, "warn_broken"):
            self.dataset.warn_broken()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its subclasses

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        if not isinstance(item, Mapping):  # other libraries' data sets have tuples of an image and its class
            raise UserError(
                f"data: got an item that is a {type(item).__name__}, expected a mapping such as {{'image': float32 (H, "
                "W, 3) in [-1, 1], 'class_label': a number}"
            )
        return item


def as_epoch_dataset(dataset: Dataset[dict[str, Any]]) -> EpochDataset:
    """``dataset`` itself if it is an `EpochDataset`, else wrapped so that it has every attribute of one.

    Nothing else inspects foreign datasets (a config's ``target``, a caller's own class) for the attributes they have.
    """
    if isinstance(dataset, EpochDataset):
        return dataset
    if isinstance(dataset, str | bytes | np.ndarray | Tensor) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise UserError(f"data: got {brief(dataset)}, expected a data set with a length and items, or settings of one")
    return _Foreign(dataset)


class ArrayDataset(EpochDataset):
    """A dataset in memory that gathers a whole batch at once; an item is a batch of one.

    Subclasses define ``__len__`` and ``batch``.
    """

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.batch(np.array([self._check(index)]))
        return {key: row[0].item() if key == "class_label" else row[0] for key, row in rows.items()}
