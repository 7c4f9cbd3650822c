"""`tamingfast sample`: new images."""

from __future__ import annotations

import argparse

from tamingfast import tasks
from tamingfast.cli.arguments import output, source, whole
from tamingfast.cli.drawings import KEEPING, drawing_arguments, write
from tamingfast.cli.options import (
    ALLOW,
    DEVICE,
    DRAWING,
    FIRST_STAGE,
    OR_DEMO,
    Commands,
    command,
    condition_options,
    load,
    size_of,
)
from tamingfast.tasks.options import COUNT


def add_to(commands: Commands) -> None:
    """Declare the command."""
    parents = (DEVICE, ALLOW, FIRST_STAGE, DRAWING, condition_options(), KEEPING)
    added = command(commands, "sample", sample, "draw new images", parents)
    added.add_argument("model", type=source, help=f"run directory or checkpoint of a prior{OR_DEMO}")
    added.add_argument("-n", "--count", type=whole(1), help=f"number of images; default: {COUNT}")
    added.add_argument("--size", help="HEIGHTxWIDTH in pixels; default: the training size")
    added.add_argument("--out", type=output, default="samples.png", help="PNG with all images (default: %(default)s)")
    added.add_argument(
        "--from",
        dest="photo",
        type=source,
        metavar="PHOTO",
        help="start from coarse scales of this photo, for multiscale priors",
    )
    added.add_argument("--scales", type=whole(0), metavar="N", help="number of scales taken from it, coarsest first")


def sample(arguments: argparse.Namespace) -> None:
    shared, size = drawing_arguments(arguments), size_of(arguments)
    drawing = tasks.sample(load(arguments), size=size, photo=arguments.photo, scales=arguments.scales, **shared)
    write(arguments, drawing)
