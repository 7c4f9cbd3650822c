"""Data sets as token files: `encode`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.checkpoints.config import plain
from tamingfast.checkpoints.fingerprint import fingerprint
from tamingfast.data import Loader, build
from tamingfast.data import conditions as kinds
from tamingfast.data.base import ConditionRecord, EpochDataset, as_epoch_dataset
from tamingfast.data.image_files import TEN_CROPS, ImageFiles
from tamingfast.data.tokens import metadata_of, smallest, write_tokens
from tamingfast.engines.first_stage import check_name, using
from tamingfast.errors import UserError, brief
from tamingfast.files import check_directory, check_writable
from tamingfast.models.base import ConditionStage, FirstStage, encode_grid
from tamingfast.models.condition_stages import CoordStage
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, Counter, silent
from tamingfast.ranks import in_turns, is_first, take_part
from tamingfast.tasks.drawing import at_least_one
from tamingfast.tasks.models import Model, data_of, first_stage_of, is_spatial, unread
from tamingfast.tasks.options import ENCODING_BATCH, SPLITS, TEN_CROP
from tamingfast.tasks.sizes import grid_size

#: The name of one of several files.
_NAME = "tokens-{}.safetensors"


def encode(
    model: Model,
    data: Dataset | Mapping[str, Any] | None,
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    cond_stage: Model | None = None,
    views: int | str = 1,
    shard: int | None = None,
    resume: bool = False,
    batch: int = ENCODING_BATCH,
    engine: str = "auto",
    bars: Bars = silent,
) -> int:
    """Encode every image of a data set and write the tokens to files that priors can be trained on.

    Several processes encode batches in turns, and the first writes. Random crops and mirrored images are those of the
    first epochs, one for each view. If the data set has spatial conditions, their tokens are written too.

    Args:
        model: a first stage or a prior, or the path of its run or checkpoint.
        data: a data set, or the settings of one as in a config's ``data`` section. None takes the settings that
            ``cond_stage`` was trained with or, without it, those of the model.
        out: the file to write, ``.safetensors``, or with ``shard`` the directory of the files.
        split: "train" or "validation"; applies if ``data`` are settings.
        cond_stage: the first stage that encodes the conditions. Default: the condition stage of a prior; coordinates
            need none.
        views: how often each image is encoded, each time as it appears in another epoch; or "ten-crop", the corners and
            the centre of each image, and these mirrored.
        shard: the number of grids in a file, rounded down to whole images. Only one file's labels and conditions are in
            memory at a time. None writes a single file.
        resume: whether to keep the files of an encoding that was interrupted, with the same ``shard``.
        batch: images at a time; it does not change the tokens.
        engine: the implementation that runs the first stages: "auto", "native" (C++ on the CPU) or "torch".
        bars: opens counters of progress; see `tamingfast.progress`.

    Returns:
        The number of grids, those that were kept included.

    Raises:
        UserError: views that the data set does not have, files of another encoding in the directory, conditions without
            a first stage to encode them, data without the conditions that ``cond_stage`` encodes, images whose sides
            are not multiples of f, or the engine "native" where it cannot run.
    """
    at_least_one(batch, "batch")
    (check_writable if shard is None else check_directory)(out)
    check_name(engine)
    sources = [unread(each) for each in (model, cond_stage) if each is not None]
    if data is None:
        data = data_of(sources[-1].outline)
    dataset = _made(data, split) if isinstance(data, Mapping) else as_epoch_dataset(data)
    dataset, count = _viewed(dataset, views)
    places = _places(out, len(dataset), count, shard, resume)
    network = sources[0].model
    stage_of_conditions = None if cond_stage is None else first_stage_of(sources[1].model)
    conditions = _conditions_of(network, dataset, stage_of_conditions)
    encoding = _Encoding(network, dataset, conditions, count, batch)
    origin = encoding.metadata() | {"views": str(views)}
    if shard is not None:
        condition = None if conditions is None else conditions.description(dataset)
        settings = {"data": plain(data) if isinstance(data, Mapping) else None, "split": split, "condition": condition}
        origin["settings"] = json.dumps(settings, sort_keys=True, default=str)
    with bars("images", len(dataset) * count) as counter, using(engine):
        for number, (place, images) in enumerate(places):
            told = origin | ({} if shard is None else {"shard": f"{number} of {len(places)}"})
            if not (resume and _is_written(place, told)):
                encoding.write(place, images, told, counter)
            else:
                counter.update(len(images) * count)
    return len(dataset) * count


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


def _viewed(dataset: EpochDataset, views: int | str) -> tuple[EpochDataset, int]:
    """The data set whose epochs are the views, and their number."""
    if views != TEN_CROP:
        if not isinstance(views, int):
            raise UserError(f"views: got {brief(views)}, expected a number of views or {TEN_CROP}")
        at_least_one(views, "views")
        return dataset, views
    if not isinstance(dataset, ImageFiles) or dataset.size is None:
        raise UserError(
            f"views: got {TEN_CROP} for {dataset.description}, expected squares of image files; give a number of views"
        )
    return dataset.with_ten_crops(), len(TEN_CROPS)


def _places(
    out: str | os.PathLike[str], images: int, views: int, shard: int | None, resume: bool
) -> list[tuple[str | os.PathLike[str], range]]:
    """(file, numbers of its images) of every file to write."""
    if shard is None:
        if resume:
            raise UserError("resume: got an encoding into one file, expected one into several; give --shard GRIDS")
        return [(out, range(images))]
    at_least_one(shard, "shard")
    each, folder = max(1, shard // views), Path(out)
    if not resume and any(folder.glob(_NAME.format("*"))):
        raise UserError(
            f"{out}: got a directory that already holds token files, expected a new one; continue with --resume, or "
            "give another directory"
        )
    return [
        (folder / _NAME.format(f"{number:05d}"), range(first, min(first + each, images)))
        for number, first in enumerate(range(0, images, each))
    ]


def _is_written(path: str | os.PathLike[str], told: Mapping[str, str]) -> bool:
    """Whether the file is there; UserError if it was written by another encoding."""
    if not os.path.lexists(path):
        return False
    found = metadata_of(path)
    for key, value in told.items():
        if found.get(key) != value:
            raise UserError(
                f"{path}: got tokens whose {key} is {brief(found.get(key))}, expected {brief(value)}, as is encoded "
                "now; give the settings with which the directory was begun, or another directory"
            )
    return True


@dataclass(frozen=True)
class _Encoding:
    """A data set on its way into token files: each image ``views`` times, as in as many epochs."""

    model: nn.Module
    dataset: EpochDataset
    conditions: _Conditions | None
    views: int
    batch: int

    def metadata(self) -> dict[str, str]:
        """What every file says of its origin."""
        height, width = self.dataset[0]["image"].shape[:2]
        return {
            "size": f"{height}x{width}",
            "source": self.dataset.description,
            "first_stage": fingerprint(first_stage_of(self.model)),
        }

    def write(self, path: str | os.PathLike[str], images: range, metadata: Mapping[str, str], counter: Counter) -> None:
        """Write one file: first one view of all its ``images``, then the next view of all."""
        stage, classes, conditions = first_stage_of(self.model), self.dataset.classes, self.conditions
        labels: list[int] = []
        written: list[np.ndarray] = []
        parts = [
            (view, np.arange(first, min(first + self.batch, images.stop)))
            for view in range(self.views)
            for first in range(images.start, images.stop, self.batch)
        ]

        def encoded(part: tuple[int, np.ndarray]) -> _Encoded:
            items = next(iter(Loader(self.dataset, [part], 0)))
            x = _images(items["image"], stage)
            grid_size(self.model, *x.shape[2:])  # raises for sizes that would be cut
            tokens = stage.encode_grid(x)
            found = None
            if conditions is not None:
                grid = encode_grid(conditions.stage, _images(items[conditions.key], stage)).view(tokens.shape)
                found = smallest(grid.cpu().numpy(), conditions.vocab_size)
            return _Encoded(tokens.cpu().numpy(), None if classes is None else items["class_label"].tolist(), found)

        def grids() -> Iterator[np.ndarray]:
            for found in in_turns(encoded, parts):
                labels.extend(found.labels or ())
                if found.conditions is not None:
                    written.append(found.conditions)
                yield found.tokens
                counter.update(len(found.tokens))

        if not is_first():
            take_part(grids())
            return
        # The lists are filled while the grids are written.
        write_tokens(
            path,
            grids(),
            stage.n_embed,
            class_label=None if classes is None else labels,
            metadata=metadata,
            classes=classes,
            conditions=None if conditions is None else written,
            condition=None if conditions is None else conditions.description(self.dataset),
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
