"""`tamingfast evaluate`: measuring a model on real images."""

from __future__ import annotations

import argparse

from tamingfast import tasks
from tamingfast.cli.arguments import output, source, whole
from tamingfast.cli.options import (
    ALLOW,
    DEVICE,
    DRAWING,
    FIRST_STAGE,
    JSON,
    OR_DEMO,
    Commands,
    command,
    data_settings,
    given_options,
    load,
)
from tamingfast.cli.progress import bars_of, print_json, say_written
from tamingfast.errors import UserError
from tamingfast.files import check_suffix, write_json
from tamingfast.tasks.options import SAMPLES, DrawingOptions

_MODEL = f"run directory or checkpoint of a first stage or a prior{OR_DEMO}; or samples of any model, an .npz of images"


def add_to(commands: Commands) -> None:
    """Declare the command."""
    text = "measure a model on real images: likelihood, reconstructions, samples"
    added = command(commands, "evaluate", evaluate, text, (DEVICE, ALLOW, FIRST_STAGE, DRAWING, JSON), together=True)
    added.add_argument("model", type=source, help=_MODEL)
    added.add_argument(
        "--data", type=source, metavar="DIR", help="take all images below this directory, not the validation set"
    )
    added.add_argument("--limit", type=whole(1), help="number of images, drawn by --seed; default: all")
    added.add_argument(
        "--samples", type=whole(1), default=SAMPLES, help="number to draw from a prior (default: %(default)s)"
    )
    added.add_argument(
        "--features",
        help="inception (FID, sFID, KID, Inception score) or efficientnet-lite0; default: the one of --reference, "
        "inception if --inception-weights is given, else efficientnet-lite0 if it is installed",
    )
    added.add_argument(
        "--inception-weights",
        type=source,
        metavar="FILE",
        help="Inception weights of torch-fidelity",
    )
    added.add_argument(
        "--reference", type=source, metavar="NPZ",
        help="measure distances from these statistics or images instead of from the data, as guided-diffusion has them",
    )  # fmt: skip
    added.add_argument(
        "--save-reference", type=output, metavar="NPZ", help="write the statistics and images of the data here"
    )
    added.add_argument(
        "--state", type=output, metavar="FILE",
        help="keep the features of the samples here every minute, and go on from there if the file exists",
    )  # fmt: skip
    added.add_argument(
        "--perceptual-weights",
        type=source,
        metavar="FILE",
        help="VGG16 weights for LPIPS; default: downloaded on first use (64 MB)",
    )
    added.add_argument("--out", type=output, metavar="JSON", help="also write the report here")
    text = "the data set, e.g. name=photos size=32; default: the one that the model was trained on"
    added.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def evaluate(arguments: argparse.Namespace) -> None:
    from tamingfast import evaluation
    from tamingfast.ranks import is_first

    if arguments.data is not None and arguments.overrides:
        raise UserError(f"--data: got a directory and '{arguments.overrides[0]}', expected one of them; leave one out")
    for name in (arguments.reference, arguments.save_reference):
        if name is not None:
            check_suffix(name, ".npz")
    given = given_options(arguments)
    batch = DrawingOptions(**given).batch
    shared = {
        "features": arguments.features, "inception_weights": arguments.inception_weights,
        "reference": arguments.reference, "bars": bars_of(arguments),
    }  # fmt: skip
    if arguments.model.lower().endswith(".npz"):
        _of_samples(arguments)
        found = evaluation.evaluate_samples(arguments.model, batch=batch, device=arguments.device, **shared)
    else:
        model = load(arguments)
        found = evaluation.evaluate_model(
            model, arguments.data or data_settings(arguments), limit=arguments.limit,
            samples=arguments.samples, perceptual_weights=arguments.perceptual_weights,
            save_reference=arguments.save_reference, state=arguments.state,
            options=tasks.drawing_options(model, **given), **shared,
        )  # fmt: skip
    found["model"] = arguments.model
    if arguments.json:
        print_json(found)
    else:
        print(f"Data: {found['data']}.\n\n{evaluation.table(found)}")
        for name, reason in found["missing"].items():
            print(f"\nNot computed: {name}, as {reason}.")
    if arguments.out and is_first():
        write_json(arguments.out, found)
        say_written(arguments.out, apart=arguments.json)
    if arguments.save_reference:
        say_written(arguments.save_reference, apart=arguments.json)


def _of_samples(arguments: argparse.Namespace) -> None:
    """Raise UserError unless the options are those of judging samples without a model."""
    if arguments.reference is None:
        raise UserError("--reference: got none, expected the statistics or images that samples are compared with")
    for name in ("data", "limit", "perceptual_weights", "save_reference", "state"):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: got {getattr(arguments, name)}, expected none for samples; leave it out")
