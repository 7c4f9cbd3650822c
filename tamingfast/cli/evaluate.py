"""`tamingfast evaluate`: figures of a model on real images."""

from __future__ import annotations

import argparse
from typing import Any

from tamingfast.cli.options import (
    DEVICE,
    DRAWING,
    at_least_one,
    command,
    data_settings,
    drawing_settings,
    load,
    wanted_size,
)
from tamingfast.cli.progress import progress_bar, say_written
from tamingfast.errors import UserError


def add_to(commands: Any) -> None:
    text = "figures of a model on real images: likelihood, reconstructions, samples"
    added = command(commands, "evaluate", evaluate, text, (DEVICE, DRAWING))
    added.add_argument("model", help="run directory or checkpoint of a first stage or a prior")
    added.add_argument("--data", metavar="DIR", help="all images below this directory instead of the validation set")
    added.add_argument("--limit", type=int, help="so many images, drawn by --seed; default: all")
    added.add_argument("--samples", type=int, default=256, help="of a prior (default: %(default)s)")
    added.add_argument(
        "--features",
        help="inception (FID, KID, Inception score) or efficientnet-lite0; default: inception where "
        "--inception-weights is given, else efficientnet-lite0 where it is installed",
    )
    added.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's; default: its own download")
    added.add_argument("--perceptual-weights", metavar="FILE", help="VGG16 for LPIPS; default: the lpips package's")
    added.add_argument("--out", metavar="JSON", help="write the report here too")
    text = "the data set, e.g. name=photos size=32; default: what the model was trained on"
    added.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def evaluate(arguments: argparse.Namespace) -> None:
    from tamingfast import evaluation
    from tamingfast.files import write_json
    from tamingfast.ops import backends

    for value, name in ((arguments.samples, "--samples"), (arguments.limit, "--limit")):
        at_least_one(1 if value is None else value, name)
    model = load(arguments)
    drawing = drawing_settings(arguments)
    batch = drawing.pop("batch")
    training_set, dataset = _evaluated_data(arguments, model)
    network, perceptual, missing = _networks(arguments, model)
    if network is not None and min(arguments.samples, arguments.limit or len(dataset), len(dataset)) < 2:
        network, missing = None, missing | {"distances of features": "they need at least 2 images"}
    found = {
        "model": str(arguments.model),
        "data": getattr(dataset, "description", type(dataset).__name__),
        "machine": backends.machine(),
        "sampling": drawing,
        "missing": missing,
    } | evaluation.evaluate(
        model, dataset, network=network, perceptual=perceptual, training_set=training_set, count=arguments.samples,
        limit=arguments.limit, batch_size=batch, bar=progress_bar, **drawing,
    )  # fmt: skip
    print(f"Data: {found['data']}.\n\n{evaluation.table(found)}")
    for name, reason in missing.items():
        print(f"\nNot computed: {name}, as {reason}.")
    if arguments.out:
        write_json(arguments.out, found)
        say_written(arguments.out)


def _evaluated_data(arguments: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """(training set, the images to evaluate on); the former is None for a directory of images."""
    from tamingfast.data import folders
    from tamingfast.training.settings import build_datasets

    if arguments.data is None:
        train, validation = build_datasets({"data": data_settings(arguments, model)})
        if validation is None:
            raise UserError("the data settings give no validation set; give a directory of images with --data DIR")
        return train, validation
    if arguments.overrides:
        raise UserError(f"got --data and '{arguments.overrides[0]}'; give one of them")
    side = wanted_size(None, model)[0]
    dataset = folders.build(arguments.data, side, validation_path=arguments.data)[1]
    classes = getattr(getattr(model, "cond_stage_model", None), "n_classes", None)
    if classes is not None and len(dataset.classes or ()) != classes:
        raise UserError(
            f"the model knows {classes} classes, but {arguments.data} has {len(dataset.classes or ())} class folders; "
            "give a directory with one for each class, in the order of their names"
        )
    return None, dataset


def _networks(arguments: argparse.Namespace, model: Any) -> tuple[Any, Any, dict[str, str]]:
    """(network of features, LPIPS, why any of both is missing); UserError when one that was asked for is."""
    from tamingfast import evaluation
    from tamingfast.models.lpips import LPIPS

    name = arguments.features or (evaluation.INCEPTION if arguments.inception_weights else evaluation.EFFICIENTNET)
    if arguments.inception_weights and name != evaluation.INCEPTION:
        raise UserError(f"got --inception-weights for --features {name}; leave one of them out")
    if arguments.perceptual_weights == "random":
        raise UserError("got --perceptual-weights random, whose distance is no LPIPS; give a file of VGG16's weights")
    network = perceptual = None
    missing = {}
    try:
        network = evaluation.load_features(name, arguments.inception_weights, model.device)
    except UserError as error:
        if arguments.features or arguments.inception_weights:
            raise
        missing["distances of features"] = str(error)
    try:
        perceptual = LPIPS(arguments.perceptual_weights)
    except UserError as error:
        if arguments.perceptual_weights:
            raise
        missing["LPIPS"] = f"{str(error).partition(';')[0]}; give --perceptual-weights FILE"
    return network, perceptual, missing
