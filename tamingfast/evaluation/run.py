"""The whole evaluation of a model, from paths and settings: data, networks of features, figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from tamingfast import tasks
from tamingfast.checkpoints.config import plain
from tamingfast.data import build, folders
from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.errors import UserError
from tamingfast.evaluation.features import EFFICIENTNET, INCEPTION, Extractor, load_features
from tamingfast.evaluation.summary import evaluate
from tamingfast.models.lpips import LPIPS, RANDOM
from tamingfast.ops import backends
from tamingfast.progress import Bars, silent
from tamingfast.tasks.drawing import PAPER, at_least_one
from tamingfast.tasks.models import Model
from tamingfast.tasks.options import SAMPLES, DrawingOptions


def evaluate_model(
    model: Model,
    data: Dataset | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    samples: int = SAMPLES,
    features: str | None = None,
    inception_weights: str | os.PathLike[str] | None = None,
    perceptual_weights: str | os.PathLike[str] | None = None,
    options: DrawingOptions = PAPER,
    bars: Bars = silent,
) -> dict[str, Any]:
    """All figures that a model allows on real images: `evaluate`, with everything that it needs made here.

    Args:
        model: a first stage or a prior, or the path of its run or checkpoint.
        data: a data set; the settings that make one, whose validation set is taken; a directory, all images below which
            are taken; None takes the validation set that the model was trained with.
        limit: the number of images, drawn by the seed; None takes all.
        samples: the number of samples of a prior.
        features: "inception" or "efficientnet-lite0"; by default inception where its weights are given, else
            efficientnet-lite0 where it is installed.
        inception_weights, perceptual_weights: files of the Inception network, and of VGG16 for LPIPS; by default the
            packages' own.
        options: for drawing the samples; the batch is that of all figures.
        bars: opens counters of progress; see `tamingfast.progress`.

    Returns:
        ``model``, ``data``, ``machine`` and ``sampling`` in words; ``missing``, what was not computed and why; and what
        `evaluate` returns.

    Raises:
        UserError: data that the model cannot be evaluated on, or a network that was asked for and is missing.
    """
    at_least_one(samples, "samples")
    at_least_one(1 if limit is None else limit, "limit")
    network = tasks.opened(model)
    training_set, dataset = _data(network, data)
    seen, perceptual, missing = _networks(network, features, inception_weights, perceptual_weights)
    length = len(dataset)
    if seen is not None and min(samples, limit or length, length) < 2:
        seen, missing = None, missing | {"distances of features": "they need at least 2 images"}
    how = options.deciding() | options.running()
    return {
        "model": type(network).__name__ if isinstance(model, nn.Module) else str(model),
        "data": dataset.description,
        "machine": backends.machine(),
        "sampling": options.deciding() | {"engine": options.engine},
        "missing": missing,
    } | evaluate(
        network, dataset, network=seen, perceptual=perceptual, training_set=training_set, count=samples, limit=limit,
        batch_size=options.batch, bar=bars, **how,
    )  # fmt: skip


def _data(
    model: nn.Module, data: Dataset | Mapping[str, Any] | str | os.PathLike[str] | None
) -> tuple[EpochDataset | None, EpochDataset]:
    """(training set, the images to evaluate on); there is no training set for a data set or a directory."""
    if isinstance(data, str | os.PathLike):
        return None, _folder(model, data)
    if data is not None and not isinstance(data, Mapping):
        return None, as_epoch_dataset(data)
    settings = tasks.config_of(model).get("data") or {} if data is None else data
    train, validation = build(plain(settings))
    if validation is None:
        raise UserError("data: got settings without a validation set, expected one; give a directory of images instead")
    return train, validation


def _folder(model: nn.Module, folder: str | os.PathLike[str]) -> EpochDataset:
    side = tasks.image_size(model)[0]
    dataset = folders.build(folder, side, validation_path=folder)[1]
    classes, found = tasks.classes_of(model), len(dataset.classes or ())
    if classes is not None and found != classes:
        raise UserError(
            f"{folder}: got {found} class folders, expected {classes}, the classes that the model knows; give a "
            "directory with one for each, in the order of their names"
        )
    return dataset


def _networks(
    model: nn.Module,
    features: str | None,
    inception_weights: str | os.PathLike[str] | None,
    perceptual_weights: str | os.PathLike[str] | None,
) -> tuple[Extractor | None, LPIPS | None, dict[str, str]]:
    """(network of features, LPIPS, why either is missing); UserError when one that was asked for is."""
    name = features or (INCEPTION if inception_weights else EFFICIENTNET)
    if inception_weights and name != INCEPTION:
        raise UserError(f"inception_weights: got a file, expected none with the features of {name}; leave one out")
    if perceptual_weights == RANDOM:
        raise UserError(
            "perceptual_weights: got 'random', whose distance is no LPIPS, expected a file of VGG16's weights"
        )
    network = perceptual = None
    missing = {}
    try:
        network = load_features(name, inception_weights, tasks.first_stage_of(model).device)
    except UserError as error:
        if features or inception_weights:
            raise
        missing["distances of features"] = str(error)
    try:
        perceptual = LPIPS(perceptual_weights)
    except UserError as error:
        if perceptual_weights:
            raise
        missing["LPIPS"] = f"{str(error).partition(';')[0]}; give --perceptual-weights FILE"
    return network, perceptual, missing
