"""`tamingfast sample`: new images."""

from __future__ import annotations

import argparse

from tamingfast import tasks
from tamingfast.cli.arguments import number, output, source, whole
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
from tamingfast.files import check_suffix
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
    added.add_argument(
        "--npz", type=output, metavar="FILE",
        help="write the pixels here instead of to --out, for other programs: arr_0, uint8 (N, H, W, 3)",
    )  # fmt: skip
    added.add_argument(
        "--accept", type=number, metavar="RATE",
        help="keep this share of the candidates of each class, such as 0.05, by a classifier of ImageNet",
    )  # fmt: skip


def sample(arguments: argparse.Namespace) -> None:
    from tamingfast.tasks.selection import check_rate

    if arguments.model is None:
        if arguments.like is None:
            raise UserError("model: got none, expected the run directory or checkpoint of a prior")
        arguments.model = tasks.model_named(arguments.like)
    if arguments.npz is not None:
        check_suffix(arguments.npz, ".npz")
        if arguments.separate:
            raise UserError("--npz: got an archive and --separate, expected one of them; leave one out")
    if arguments.accept is not None:
        check_rate(arguments.accept)  # before the model is read
    model, size = load(arguments), size_of(arguments)
    shared = drawing_arguments(arguments, model)
    if arguments.accept is not None and arguments.canvas is None:  # candidates are not kept
        shared["canvas"] = None
    own = {name: getattr(arguments, name) for name in ("photo", "scales", "like", "npz", "accept")}
    write(arguments, tasks.sample(model, size=size, **own, **shared))
