"""The data sets of a run, from the config's ``data:`` section or from the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch.utils.data import Dataset

from tamingfast.checkpoints.config import plain
from tamingfast.data import build
from tamingfast.data.base import EpochDataset, as_epoch_dataset

#: (training, validation): our data sets, or any map-style data sets of torch.
Datasets: TypeAlias = tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]] | None]


def datasets_of(config: Mapping[str, Any], given: Datasets | None = None) -> tuple[EpochDataset, EpochDataset | None]:
    """The ``given`` data sets, or those of the config."""
    if given is None:
        return build(plain(config.get("data")) or {})
    training, validation = given
    return as_epoch_dataset(training), None if validation is None else as_epoch_dataset(validation)
