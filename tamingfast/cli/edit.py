"""`tamingfast edit` and `tamingfast outpaint`: redrawing a part of a photo, or extending it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

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
    RECONSTRUCT,
    Commands,
    command,
    condition_options,
    load,
)

SIDES = ("left", "right", "top", "bottom")


def add_to(commands: Commands) -> None:
    """Declare both commands."""
    added = _command(commands, "edit", edit, "redraw the masked region of a photo")
    added.add_argument(
        "--mask", type=source, required=True, help="image of the photo's size, white where the photo is redrawn"
    )
    added = _command(commands, "outpaint", outpaint, "draw what lies around a photo")
    for side in SIDES:
        added.add_argument(
            f"--{side}",
            type=whole(0),
            default=0,
            metavar="PIXELS",
            help="to add, a multiple of the factor f; default: 0",
        )


def _command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    parents = (DEVICE, ALLOW, FIRST_STAGE, DRAWING, condition_options(), KEEPING, METADATA)
    added = command(commands, name, run, text, parents)
    added.add_argument("model", type=source, help=f"run directory or checkpoint of a prior{OR_DEMO}")
    added.add_argument("photo", type=source, help="image file, or a canvas saved with --canvas")
    added.add_argument("-n", "--count", type=whole(1), help="number of versions; default: 1, or that of the canvas")
    added.add_argument("--out", type=output, default=f"{name}ed.png", help="PNG to write (default: %(default)s)")
    added.add_argument("--reconstruct", action="store_true", help=RECONSTRUCT)
    return added


def edit(arguments: argparse.Namespace) -> None:
    model, own_pixels = load(arguments), not arguments.reconstruct
    shared = drawing_arguments(arguments, model)
    write(arguments, tasks.edit(model, arguments.photo, arguments.mask, own_pixels=own_pixels, **shared))


def outpaint(arguments: argparse.Namespace) -> None:
    model, own_pixels = load(arguments), not arguments.reconstruct
    shared = drawing_arguments(arguments, model)
    sides = {side: getattr(arguments, side) for side in SIDES}
    write(arguments, tasks.outpaint(model, arguments.photo, **sides, own_pixels=own_pixels, **shared))
