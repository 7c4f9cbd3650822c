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
    METADATA,
    OR_DEMO,
    Commands,
    command,
    condition_options,
    load,
    size_of,
)
from tamingfast.errors import UserError
from tamingfast.tasks.options import COUNT


def add_to(commands: Commands) -> None:
    """Declare the command."""
    parents = (DEVICE, ALLOW, FIRST_STAGE, DRAWING, condition_options(), KEEPING, METADATA)
    added = command(commands, "sample", sample, "draw new images", parents, together=True)
    text = (
        f"run directory or checkpoint of a prior{OR_DEMO}; with --like, by default the one of the recorded name here "
        "or in runs/"
    )
    added.add_argument("model", type=source, nargs="?", help=text)
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
    added.add_argument(
        "--like", type=source, metavar="IMAGE",
        help="repeat the drawing of this PNG of `tamingfast sample`; options that are given replace its own",
    )  # fmt: skip


def sample(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        if arguments.like is None:
            raise UserError("model: got none, expected the run directory or checkpoint of a prior")
        arguments.model = tasks.model_named(arguments.like)
    shared, size = drawing_arguments(arguments), size_of(arguments)
    start = {"photo": arguments.photo, "scales": arguments.scales}
    write(arguments, tasks.sample(load(arguments), size=size, like=arguments.like, **start, **shared))
