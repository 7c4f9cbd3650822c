"""The data sets of a run, from the config's ``data:`` section or from the caller."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch.utils.data import Dataset

from tamingfast.checkpoints.config import plain
from tamingfast.data import Index, build, keys
from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.errors import UserError

#: (training, validation): our data sets, or any map-style data sets of torch.
Datasets: TypeAlias = tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]] | None]


def datasets_of(
    config: Mapping[str, Any], given: Datasets | None = None, index: Index | None = None
) -> tuple[EpochDataset, EpochDataset | None]:
    """The ``given`` data sets, or those of the config, whose files ``index`` may have listed already."""
    if given is None:
        section = plain(config.get("data")) or {}
        try:
            return build(section, index)
        except UserError as error:  # of a data set, which does not know where its arguments were written
            named = re.match(r"\w+(?=[:=])", str(error))
            if named is None or named[0] not in keys(section.get("name")):
                raise
            whole = f"data.{error}"
            raise UserError(whole) from error
    training, validation = given
    return as_epoch_dataset(training), None if validation is None else as_epoch_dataset(validation)
