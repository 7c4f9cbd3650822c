"""Data sets as token files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from tamingfast.checkpoints.weights import fingerprint
from tamingfast.errors import UserError
from tamingfast.tasks.models import first_stage_of, is_spatial
from tamingfast.tasks.sizes import grid_size


def encode(
    model: nn.Module,
    dataset: Dataset,
    path: str | os.PathLike,
    batch: int = 64,
    progress: Callable[[int], Any] | None = None,
    cond_stage: nn.Module | None = None,
) -> int:
    """Write the tokens of every image of ``dataset`` to a token file that the prior's training reads; returns how many.

    Images are taken as the dataset's epoch 0 gives them, and where it holds spatial conditions their tokens are written
    too: those of ``cond_stage``, by default of the prior ``model``, or coordinates. ``progress(n)`` runs after every n
    images. Raises UserError for conditions without a stage, for a stage whose conditions the dataset lacks, and for
    images whose sides are no multiples of the first stage's factor.
    """
    from tamingfast.data import loader
    from tamingfast.data.tokens import smallest, write_tokens

    stage = first_stage_of(model)
    key, cond_stage = _stage_of_conditions(model, dataset, cond_stage)
    classes = getattr(dataset, "classes", None)
    labels: list[int] = []
    conditions: list[np.ndarray] = []
    height, width = dataset[0]["image"].shape[:2]
    metadata = {
        "size": f"{height}x{width}",
        "source": getattr(dataset, "description", type(dataset).__name__),
        "first_stage": fingerprint(stage),
    }
    condition = None if key is None else _description_of_conditions(key, cond_stage, dataset)

    @torch.no_grad()
    def grids() -> Iterator[np.ndarray]:
        for items in loader(dataset, batch, seed=0, epoch=0, shuffle=False, drop_last=False):
            x = items["image"].permute(0, 3, 1, 2).to(stage.device)
            grid_size(model, *x.shape[2:])  # fails for images of which a part would be lost
            quant, _, (_, _, indices) = stage.encode(x)
            grid = quant.shape[2:]
            if classes is not None:
                labels.extend(items["class_label"].tolist())
            if key is not None:
                _, _, (_, _, found) = cond_stage.encode(items[key].permute(0, 3, 1, 2).to(stage.device))
                conditions.append(smallest(found.view(len(x), *grid).cpu().numpy(), condition["vocab_size"]))
            yield indices.view(len(x), *grid).cpu().numpy()
            if progress is not None:
                progress(len(x))

    # The lists are filled while the grids are written.
    return write_tokens(
        path,
        grids(),
        stage.n_embed,
        class_label=None if classes is None else labels,
        metadata=metadata,
        classes=classes,
        conditions=None if key is None else conditions,
        condition=condition,
    )


def check_encodable(data: Mapping[str, Any]) -> None:
    """UserError for a ``data`` section with conditions that token files do not hold; reads none of them."""
    from tamingfast.data.conditions.kinds import KINDS, Objects

    if issubclass(KINDS.get(str(data.get("kind")), object), Objects):
        raise UserError(
            "token files hold no objects, whose order changes from epoch to epoch; train on data.name=conditions "
            "instead, or give name=folder to write the images alone"
        )


def _stage_of_conditions(
    model: nn.Module, dataset: Dataset, cond_stage: nn.Module | None
) -> tuple[str | None, nn.Module | None]:
    """The key of the dataset's spatial conditions and what makes tokens of them, both None without."""
    from tamingfast.data.conditions.kinds import Coordinates, settings_of
    from tamingfast.models.condition_stages import CoordStage

    kind = getattr(dataset, "kind", None)
    key = getattr(kind, "key", None)
    if kind is not None:
        check_encodable(settings_of(kind))
    if cond_stage is None and hasattr(model, "transformer") and is_spatial(model):
        wanted, cond_stage = model.cond_stage_key, model.cond_stage_model
    else:
        wanted = getattr(cond_stage, "image_key", None)
    if wanted is not None and wanted not in dataset[0]:
        raise UserError(
            f"the stage of conditions is for '{wanted}', which the data do not hold; give name=conditions kind=... "
            "path=DIRECTORY"
        )
    if wanted is None and key == Coordinates.key:
        stage = first_stage_of(model)
        return key, CoordStage(stage.n_embed - 1, stage.factor)
    if wanted is None and key is not None:
        raise UserError(
            f"the data hold conditions of '{key}', but no first stage for them is given; give --cond-stage RUN, or "
            "name=folder to write the images alone"
        )
    return wanted, cond_stage


def _description_of_conditions(key: str, cond_stage: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """What a token file says about its conditions: see `tamingfast.data.tokens.write_tokens`."""
    from tamingfast.data.conditions.kinds import settings_of

    kind = getattr(dataset, "kind", None)
    return {
        "key": key,
        # A coordinate stage rounds to n_embed itself.
        "vocab_size": cond_stage.n_embed + (0 if hasattr(cond_stage, "quantize") else 1),
        "first_stage": fingerprint(cond_stage),
        "data": {} if kind is None else settings_of(kind),
    }
