"""`tamingfast evaluate`: measuring a model on real images."""

from __future__ import annotations

import argparse

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
from tamingfast.files import write_json
from tamingfast.tasks.options import SAMPLES, DrawingOptions


def add_to(commands: Commands) -> None:
    """Declare the command."""
    text = "measure a model on real images: likelihood, reconstructions, samples"
    added = command(commands, "evaluate", evaluate, text, (DEVICE, ALLOW, FIRST_STAGE, DRAWING, JSON), together=True)
    added.add_argument("model", type=source, help=f"run directory or checkpoint of a first stage or a prior{OR_DEMO}")
    added.add_argument(
        "--data", type=source, metavar="DIR", help="take all images below this directory, not the validation set"
    )
    added.add_argument("--limit", type=whole(1), help="number of images, drawn by --seed; default: all")
    added.add_argument(
        "--samples", type=whole(1), default=SAMPLES, help="number to draw from a prior (default: %(default)s)"
    )
    added.add_argument(
        "--features",
        help="inception (FID, KID, Inception score) or efficientnet-lite0; default: inception if "
        "--inception-weights is given, else efficientnet-lite0 if it is installed",
    )
    added.add_argument(
        "--inception-weights",
        type=source,
        metavar="FILE",
        help="Inception weights of torch-fidelity; default: downloaded",
    )
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
    options = DrawingOptions(**given_options(arguments))
    found = evaluation.evaluate_model(
        load(arguments), arguments.data or data_settings(arguments), limit=arguments.limit, samples=arguments.samples,
        features=arguments.features, inception_weights=arguments.inception_weights,
        perceptual_weights=arguments.perceptual_weights, options=options, bars=bars_of(arguments),
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
