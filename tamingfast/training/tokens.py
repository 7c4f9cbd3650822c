"""The items of a data set as tokens for the models, and checks that their tokens and conditions fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tamingfast.checkpoints.fingerprint import fingerprint
from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.data.conditions import SPATIAL_KEYS, TOKEN_KEYS
from tamingfast.errors import UserError
from tamingfast.models.base import FirstStage
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.training.stage import Batch


def grid_of(dataset: Dataset[dict[str, Any]], stage: FirstStage, key: str = "image") -> tuple[int, int]:
    """Tokens (rows, columns) of a data set's images ``key`` under a first stage, or of its token grids.

    Raises UserError for images with sides that are not multiples of the stage's factor.
    """
    grid = as_epoch_dataset(dataset).grid
    if grid is not None:
        return grid
    check_images(dataset, key)
    height, width = dataset[0][key].shape[:2]
    if height % stage.factor or width % stage.factor:
        raise UserError(
            f"data.size: got images of {height} x {width} pixels, expected multiples of {stage.factor}, the pixels per "
            "token of the first stage"
        )
    return stage.grid(height, width)


def check_images(dataset: Dataset[dict[str, Any]], key: str) -> None:
    """Raise UserError unless the items of a data set hold images (H, W[, C]) under ``key``."""
    item = dataset[0]
    if not isinstance(item, Mapping):
        raise UserError(
            f"data.train: got items of type {type(item).__name__}, expected mappings with images under {key!r}"
        )
    images = [name for name, value in item.items() if np.ndim(value) in (2, 3)]
    if key not in images:
        raise UserError(
            f"image_key: got {key!r}, expected the name of images in the data, which hold {', '.join(item)}; set "
            f"model.params.image_key to {' or '.join(images) or 'image, and give data of images'}"
        )


def tokens_of(model: Net2NetTransformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Image tokens (B, n) of a batch in the ordering's sequence, and condition tokens (B, c).

    Raises UserError when the batch lacks what the prior is conditioned on.
    """
    encoded = f"{model.cond_stage_key}_indices"
    if not model.be_unconditional and model.cond_stage_key not in batch and encoded not in batch:
        raise UserError(
            f"data: got {', '.join(batch)}, expected '{model.cond_stage_key}' too, on which the prior is conditioned; "
            "use data of the kind that it was trained on"
        )
    # In float32 even under autocast, so that training sees the same tokens as sampling and decoding.
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        if "indices" not in batch:
            x, c = model.get_xc(batch)
            return model.encode_to_z(x)[1], model.encode_to_c(c)[1]
        z = model.to_sequence(batch["indices"].long())
        if encoded in batch:
            return z, batch[encoded]
        return z, model.encode_to_c(z if model.be_unconditional else batch[model.cond_stage_key])[1]


def check_tokens(dataset: EpochDataset, first_stage: FirstStage) -> None:
    """Raise UserError when the tokens of a data set were made by another first stage."""
    if dataset.vocab_size is not None and dataset.vocab_size != first_stage.n_embed:
        raise UserError(
            f"data.path: got tokens out of {dataset.vocab_size} codes, expected {first_stage.n_embed} as in the "
            "first stage; encode the data with this first stage"
        )
    # Token files made by other programs may not name their first stage.
    if dataset.metadata.get("first_stage") not in (None, fingerprint(first_stage)):
        raise UserError(
            "data.path: got tokens of another first stage, expected those of the given one; encode the data with it"
        )


def check_condition(key: str, cond_stage: FirstStage | None, dataset: EpochDataset) -> None:
    """Raise UserError when the data lack the condition ``key``, or another ``cond_stage`` made its tokens."""
    if key not in (*SPATIAL_KEYS, *TOKEN_KEYS.values()) or key in dataset[0]:
        return
    record = dataset.condition or {}
    if record.get("key") != key:
        raise UserError(
            f"data: got items without '{key}', expected them to hold the prior's condition; train on "
            "data.name=conditions data.kind=... data.path=DIRECTORY"
        )
    # Token files made by other programs may not name their first stage.
    if cond_stage is not None and record.get("first_stage") not in (None, fingerprint(cond_stage)):
        raise UserError(
            "data.path: got conditions encoded by another first stage, expected those of --cond-stage; encode the data "
            "with it"
        )
