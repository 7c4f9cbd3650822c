"""The whole evaluation of a model, from paths and settings: `evaluate_model`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tamingfast import tasks
from tamingfast.checkpoints.config import plain
from tamingfast.data import build, folders
from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.errors import UserError, nearest
from tamingfast.evaluation.distances import compare
from tamingfast.evaluation.features import EFFICIENTNET, INCEPTION, Extractor, check_features, load_features
from tamingfast.evaluation.references import features_of, network_of, read_reference
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
    reference: str | os.PathLike[str] | None = None,
    save_reference: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    options: DrawingOptions | None = None,
    bars: Bars = silent,
) -> dict[str, Any]:
    """Take every measure that applies to a model on real images: prepare the data and networks, then call `evaluate`.

    Args:
        model: a first stage or a prior, or the path of its run or checkpoint.
        data: a data set; the settings of one, whose validation set is used; or a directory, of which all images are
            used, those in subdirectories included. None uses the validation set that the model was trained with.
        limit: the number of images, drawn by the seed; None takes all.
        samples: the number of samples to draw from a prior.
        features: "inception" or "efficientnet-lite0"; default: the network of the reference, inception if its weights
            are given, else efficientnet-lite0 if it is installed.
        inception_weights, perceptual_weights: files with the weights of the Inception network, and of VGG16 for LPIPS,
            whose default are those of its package.
        reference: an .npz file of statistics or images, as `tamingfast.evaluation.references` describes them, from
            which the distances are measured instead of from the images of the data.
        save_reference: the .npz file to write the statistics and pixels of the images of the data to.
        state: a file that keeps the features of the samples so far, and from which an interrupted evaluation with the
            same settings goes on.
        options: how samples are drawn, as in `tamingfast.tasks.sample`; its ``batch`` and ``seed`` apply to all
            measures.
        bars: opens progress counters; see `tamingfast.progress`.

    Returns:
        ``model``, ``data``, ``reference`` and ``machine`` as text; ``sampling``, the options of drawing; ``missing``,
        what was not computed and why; and the results of `evaluate`.

    Raises:
        UserError: data that the model cannot be evaluated on, or a network that was requested but is not available.
    """
    at_least_one(samples, "samples")
    at_least_one(1 if limit is None else limit, "limit")
    if reference is not None and save_reference is not None:
        raise UserError("reference: got a file to read and one to write, expected one of them; leave one out")
    name = _network_of_features(features, inception_weights, perceptual_weights, reference)
    requested = features is not None or reference is not None or save_reference is not None
    source = tasks.unread(model)
    options = tasks.drawing_options(source) if options is None else options
    training_set, dataset = _data(source.outline, data)
    network = source.model
    seen, perceptual, missing = _networks(network, name, inception_weights, perceptual_weights, requested)
    length = len(dataset)
    known = None if reference is None or seen is None else read_reference(reference, seen, options.batch, bars)
    if seen is not None and min(samples, limit or length, length) < 2:
        seen, missing = None, missing | {"distances of features": "they need at least 2 images"}
    how = options.deciding() | options.running()
    with options.first_stage():
        found = evaluate(
            network, dataset, network=seen, perceptual=perceptual, training_set=training_set, count=samples,
            reference=known, write_reference=save_reference, state=state, limit=limit,
            batch_size=options.batch, bar=bars, **how,
        )  # fmt: skip
    return {
        "model": type(network).__name__ if isinstance(model, nn.Module) else str(model),
        "data": dataset.description,
        "machine": backends.machine(),
        "sampling": options.deciding() | {"engine": options.engine},
        "reference": None if reference is None else str(reference),
        "missing": missing,
    } | found


def evaluate_samples(
    samples: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    features: str | None = None,
    inception_weights: str | os.PathLike[str] | None = None,
    batch: int = PAPER.batch,
    device: str | torch.device | None = None,
    bars: Bars = silent,
) -> dict[str, Any]:
    """The distances of the images in an .npz file, of any model, from a reference; arguments as in `evaluate_model`.

    Raises UserError if either file cannot be compared, or the network is not available.
    """
    name = _network_of_features(features, inception_weights, None, reference)
    network = load_features(name, inception_weights, device)
    real = read_reference(reference, network, batch, bars)
    measured = compare(features_of(samples, network, batch, bars), real)
    return {
        "model": str(samples),
        "data": f"images of {samples}",
        "machine": backends.machine(),
        "reference": str(reference),
        "missing": {},
        "distances": {"samples": measured},
    }


def _data(
    model: nn.Module, data: Dataset | Mapping[str, Any] | str | os.PathLike[str] | None
) -> tuple[EpochDataset | None, EpochDataset]:
    """(training set, images to evaluate on); the training set is None if a data set or a directory is given."""
    if isinstance(data, str | os.PathLike):
        return None, _folder(model, data)
    if data is not None and not isinstance(data, Mapping):
        return None, as_epoch_dataset(data)
    settings = tasks.data_of(model) if data is None else data
    train, validation = build(plain(settings))
    if validation is None:
        raise UserError("data: got settings without a validation set, expected one; give a directory of images instead")
    return train, validation


def _folder(model: nn.Module, folder: str | os.PathLike[str]) -> EpochDataset:
    side = tasks.image_size(model)[0]
    dataset = folders.build(folder, side, validation_path=folder)[1]
    classes, names, found = tasks.classes_of(model), tasks.class_names_of(model), len(dataset.classes or ())
    if names is not None and dataset.classes is not None:
        unknown = next((name for name in dataset.classes if name not in names), None)
        if unknown is not None:
            raise UserError(
                f"{folder}: got {unknown!r}, expected folders named after the model's classes{nearest(unknown, names)}"
            )
        dataset.name_classes(names)
    elif classes is not None and found != classes:
        raise UserError(
            f"{folder}: got {found} class folders, expected {classes}, one for each class of the model; give a "
            "directory whose class folders, sorted by name, are in the model's order"
        )
    return dataset


def _network_of_features(
    features: str | None,
    inception_weights: str | os.PathLike[str] | None,
    perceptual_weights: str | os.PathLike[str] | None,
    reference: str | os.PathLike[str] | None,
) -> str:
    """The name of the network whose features are compared; UserError for what cannot be asked for."""
    known = None if reference is None else network_of(reference)
    name = features or known or (INCEPTION if inception_weights else EFFICIENTNET)
    check_features(name)
    if inception_weights and name != INCEPTION:
        raise UserError(f"inception_weights: got a file, expected none with the features of {name}; leave one out")
    if perceptual_weights == RANDOM:
        raise UserError(
            "perceptual_weights: got 'random', whose distance is not LPIPS, expected a file of VGG16's weights"
        )
    return name


def _networks(
    model: nn.Module,
    name: str,
    inception_weights: str | os.PathLike[str] | None,
    perceptual_weights: str | os.PathLike[str] | None,
    requested: bool,
) -> tuple[Extractor | None, LPIPS | None, dict[str, str]]:
    """(network of features, LPIPS, why either is missing); UserError if one that was requested is missing."""
    network = perceptual = None
    missing = {}
    try:
        network = load_features(name, inception_weights, tasks.first_stage_of(model).device)
    except UserError as error:
        if requested or inception_weights:
            raise
        missing["distances of features"] = str(error)
    try:
        perceptual = LPIPS(perceptual_weights)
    except UserError as error:
        if perceptual_weights:
            raise
        missing["LPIPS"] = f"{str(error).partition(';')[0]}; give --perceptual-weights FILE"
    return network, perceptual, missing
