"""Shared by `sample`, `edit` and `outpaint`: options for saving and resuming a drawing, and writing its images."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tamingfast import tasks
from tamingfast.cli.arguments import output
from tamingfast.cli.options import given_options, options
from tamingfast.cli.progress import bars_of, say_written
from tamingfast.errors import UserError
from tamingfast.files import check_png

KEEPING = options(
    ("--preview", {"type": output, "metavar": "PNG", "help": "write the images so far here, every few seconds"}),
    (
        "--canvas",
        {
            "type": output,
            "metavar": "FILE",
            "help": "save the tokens here; default: beside --out, until that is written",
        },
    ),
    ("--resume", {"action": "store_true", "help": "continue the canvas of an interrupted command"}),
    ("--separate", {"action": "store_true", "help": "write one numbered PNG per image instead of --out"}),
)


def drawing_arguments(arguments: argparse.Namespace, model: tasks.Unread) -> dict[str, Any]:
    """The arguments shared by `sample`, `edit` and `outpaint`, by their names in `tamingfast.tasks`."""
    check_png(arguments.out)  # before anything is drawn
    canvas, given = canvas_file(arguments), given_options(arguments)
    written = (arguments.out, arguments.preview, getattr(arguments, "npz", None))
    pictures = [os.path.realpath(path) for path in written if path is not None]
    if os.path.realpath(canvas) in pictures:
        raise UserError(f"--canvas: got {canvas}, where a picture is written, expected another path")
    if arguments.resume:
        drawing = replace(tasks.begun_with(canvas), **given)
    else:
        like = getattr(arguments, "like", None)
        repeated = None if like is None else tasks.recipe_of(like).options
        drawing = tasks.drawing_options(model, **given) if repeated is None else replace(repeated, **given)
        if arguments.canvas is None:
            tasks.check_unused(canvas)
    names = ("count", "label", "condition", "condition_of", "resume", "preview", "metadata")
    shared = {name: getattr(arguments, name) for name in names}
    return shared | {"options": drawing, "canvas": canvas, "bars": bars_of(arguments)}


def canvas_file(arguments: argparse.Namespace) -> Path:
    """Where the canvas is saved while it is drawn."""
    from tamingfast.tasks.canvases import SUFFIX

    out = getattr(arguments, "npz", None) or arguments.out
    return Path(arguments.canvas) if arguments.canvas else Path(out).with_suffix(SUFFIX)


def write(arguments: argparse.Namespace, drawing: tasks.Drawing) -> None:
    """Write the pictures of a drawing, and delete its canvas unless --canvas names it; on the first process alone."""
    from tamingfast.ranks import is_first

    if not is_first():
        return
    archive = getattr(arguments, "npz", None)
    written = [Path(archive)] if archive else drawing.save(arguments.out, arguments.separate)
    if not arguments.canvas:  # it was saved only for resuming
        tasks.forget(canvas_file(arguments))
    kept = [] if drawing.accepted is None else [f"kept {drawing.accepted:.3g} of the candidates"]
    say_written(written[0] if len(written) == 1 else f"{written[0]} to {written[-1].name}", *kept)
