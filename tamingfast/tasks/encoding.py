"""Data sets as token files: `encode`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.checkpoints.config import plain
from tamingfast.checkpoints.fingerprint import fingerprint
from tamingfast.data import build, loader
from tamingfast.data import conditions as kinds
from tamingfast.data.base import ConditionRecord, EpochDataset, as_epoch_dataset
from tamingfast.data.tokens import smallest, write_tokens
from tamingfast.engines.first_stage import check_name, using
from tamingfast.errors import UserError
from tamingfast.models.base import ConditionStage, FirstStage, encode_grid
from tamingfast.models.condition_stages import CoordStage
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, Counter, silent
from tamingfast.ranks import in_turns, is_first
from tamingfast.tasks.drawing import at_least_one
from tamingfast.tasks.models import Model, data_of, first_stage_of, is_spatial, unread
from tamingfast.tasks.options import ENCODING_BATCH, SPLITS
from tamingfast.tasks.sizes import grid_size


def encode(
    model: Model,
    data: Dataset | Mapping[str, Any] | None,
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    cond_stage: Model | None = None,
    batch: int = ENCODING_BATCH,
    engine: str = "auto",
    bars: Bars = silent,
) -> int:
    """Encode every image of a data set and write the tokens to a file that priors can be trained on.

    Several processes encode batches in turns, and the first writes. Random crops are those of epoch 0. If the data set
    has spatial conditions, their tokens are written too.

    Args:
        model: a first stage or a prior, or the path of its run or checkpoint.
        data: a data set, or the settings of one as in a config's ``data`` section. None takes the settings that
            ``cond_stage`` was trained with or, without it, those of the model.
        out: the file to write, ``.safetensors``.
        split: "train" or "validation"; applies if ``data`` are settings.
        cond_stage: the first stage that encodes the conditions. Default: the condition stage of a prior; coordinates
            need none.
        batch: images at a time; it does not change the tokens.
        engine: the implementation that runs the first stages: "auto", "native" (C++ on the CPU) or "torch".
        bars: opens counters of progress; see `tamingfast.progress`.

    Returns:
        The number of images.

    Raises:
        UserError: conditions without a first stage to encode them, data without the conditions that ``cond_stage``
            encodes, images whose sides are not multiples of f, or the engine "native" where it cannot run.
    """
    at_least_one(batch, "batch")
    check_name(engine)
    sources = [unread(each) for each in (model, cond_stage) if each is not None]
    if data is None:
        data = data_of(sources[-1].outline)
    dataset = _made(data, split) if isinstance(data, Mapping) else as_epoch_dataset(data)
    network = sources[0].model
    stage_of_conditions = None if cond_stage is None else first_stage_of(sources[1].model)
    conditions = _conditions_of(network, dataset, stage_of_conditions)
    with bars("images", len(dataset)) as counter, using(engine):
        return _write(network, dataset, conditions, out, batch, counter)


def check_encodable(data: Mapping[str, Any]) -> None:
    """Raise UserError if token files cannot hold the conditions of a ``data`` section; no data are read."""
    kind = kinds.KINDS.get(str(data.get("kind")))
    if isinstance(kind, type) and issubclass(kind, kinds.Objects):
        raise UserError(
            f"data.kind: got '{data['kind']}', whose order changes from epoch to epoch, expected conditions that a "
            "token file can hold; train on data.name=conditions instead, or give name=folder to write the images alone"
        )


@dataclass(frozen=True)
class _Conditions:
    """The spatial conditions of a data set: their key in its batches, and the stage that encodes them."""

    key: str
    stage: FirstStage | CoordStage

    @property
    def vocab_size(self) -> int:
        return self.stage.n_embed + (1 if isinstance(self.stage, CoordStage) else 0)  # whose tokens are 0 to n_embed

    def description(self, dataset: EpochDataset) -> ConditionRecord:
        """What a token file records about its conditions; see `tamingfast.data.tokens.write_tokens`."""
        kind = dataset.kind
        return {
            "key": self.key,
            "vocab_size": self.vocab_size,
            "first_stage": fingerprint(self.stage),
            "data": {} if kind is None else kinds.settings_of(kind),
        }


class _Encoded(NamedTuple):
    """A batch: its tokens (B, h, w), labels and the tokens of its conditions (B, h, w), None without."""

    tokens: np.ndarray
    labels: list[int] | None
    conditions: np.ndarray | None


def _made(data: Mapping[str, Any], split: str) -> EpochDataset:
    """The data set described by settings."""
    if split not in SPLITS:
        raise UserError(f"split: got '{split}', expected {' or '.join(SPLITS)}")
    check_encodable(data)
    dataset = build(plain(data))[SPLITS.index(split)]
    if dataset is None:
        raise UserError("split: got validation, expected train, as the data settings give no validation set")
    return dataset


def _write(
    model: nn.Module,
    dataset: EpochDataset,
    conditions: _Conditions | None,
    path: str | os.PathLike[str],
    batch: int,
    counter: Counter,
) -> int:
    stage = first_stage_of(model)
    classes = dataset.classes
    labels: list[int] = []
    written: list[np.ndarray] = []
    height, width = dataset[0]["image"].shape[:2]
    metadata = {
        "size": f"{height}x{width}",
        "source": dataset.description,
        "first_stage": fingerprint(stage),
    }

    def encoded(numbers: np.ndarray) -> _Encoded:
        items = next(iter(loader(dataset, len(numbers), order=numbers)))
        x = _images(items["image"], stage)
        grid_size(model, *x.shape[2:])  # raises for sizes that would be cut
        tokens = stage.encode_grid(x)
        found = None
        if conditions is not None:
            grid = encode_grid(conditions.stage, _images(items[conditions.key], stage)).view(tokens.shape)
            found = smallest(grid.cpu().numpy(), conditions.vocab_size)
        return _Encoded(tokens.cpu().numpy(), None if classes is None else items["class_label"].tolist(), found)

    def grids() -> Iterator[np.ndarray]:
        numbers = np.arange(len(dataset))
        parts = [numbers[first : first + batch] for first in range(0, len(numbers), batch)]
        for found in in_turns(encoded, parts):
            labels.extend(found.labels or ())
            if found.conditions is not None:
                written.append(found.conditions)
            yield found.tokens
            counter.update(len(found.tokens))

    if not is_first():
        return sum(map(len, grids()))
    # The lists are filled while the grids are written.
    return write_tokens(
        path,
        grids(),
        stage.n_embed,
        class_label=None if classes is None else labels,
        metadata=metadata,
        classes=classes,
        conditions=None if conditions is None else written,
        condition=None if conditions is None else conditions.description(dataset),
    )


def _images(batch: Tensor, stage: FirstStage) -> Tensor:
    return batch.permute(0, 3, 1, 2).to(stage.device)


def _counted(stage: ConditionStage) -> FirstStage | CoordStage:
    """``stage``; UserError if it has no number of codes, which a token file must state."""
    if not isinstance(stage, FirstStage | CoordStage):
        raise UserError(f"cond_stage: got a {type(stage).__name__}, expected a first stage or coordinates")
    return stage


def _conditions_of(model: nn.Module, dataset: EpochDataset, stage: FirstStage | None) -> _Conditions | None:
    """The data set's spatial conditions, None if it has none; ``stage`` is the caller's for them, if any."""
    kind = dataset.kind
    key = None if kind is None else kind.key
    if kind is not None:
        check_encodable(kinds.settings_of(kind))
    if stage is None and isinstance(model, Net2NetTransformer) and is_spatial(model):
        found = _Conditions(model.cond_stage_key, _counted(model.cond_stage_model))
    elif stage is not None:
        found = _Conditions(stage.image_key, stage)
    elif key == kinds.Coordinates.key:
        first = first_stage_of(model)
        return _Conditions(key, CoordStage(first.n_embed - 1, first.factor))
    elif key is None:
        return None
    else:
        raise UserError(
            f"data: got conditions of '{key}' without a first stage for them, expected one; give --cond-stage RUN, or "
            "name=folder to write the images alone"
        )
    if found.key not in dataset[0]:
        raise UserError(
            f"data: got no '{found.key}', expected it, as the conditions' first stage encodes it; give "
            "name=conditions kind=... path=DIRECTORY"
        )
    return found
