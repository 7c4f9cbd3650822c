"""Canvases that are drawn, kept, resumed and shown by the commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tamingfast.cli.options import drawing_settings, options
from tamingfast.cli.progress import progress_bar, say_written
from tamingfast.errors import UserError

SUFFIX = ".canvas"  # of files that hold a `tamingfast.sampling.canvas.Canvas`


PAINTING = options(
    ("--preview", {"metavar": "PNG", "help": "picture of what is drawn so far, renewed while drawing"}),
    ("--canvas", {"metavar": "FILE", "help": "keep the tokens here; default: beside --out until it is written"}),
    ("--resume", {"action": "store_true", "help": "go on with the canvas of an interrupted command"}),
)


def paint(arguments: argparse.Namespace, model: Any, begun: Any) -> Any:
    """``begun``, finished; with ``--resume`` the canvas of the file, which must have begun so where that is known."""
    from tamingfast import apply, images
    from tamingfast.sampling.canvas import Canvas

    drawing = drawing_settings(arguments)
    batch_and_backend = {name: drawing.pop(name) for name in ("batch", "backend")}
    path = canvas_file(arguments)
    canvas = Canvas.load(path) if arguments.resume else apply.painted(model, begun, **drawing)
    if arguments.resume and begun is not None:
        canvas.check_begun_as(begun)

    def preview(now: Any) -> None:
        images.save_grid(arguments.preview, apply.decoded(model, now, arguments.batch))

    with progress_bar("tokens") as bar:
        return canvas.sample(
            model, path=path, preview=preview if arguments.preview else None, progress=bar.moved, **batch_and_backend
        )


def decode(arguments: argparse.Namespace, model: Any, canvas: Any) -> Any:
    """The images (B, 3, H, W) of a canvas, with a bar where that takes long."""
    from tamingfast import apply

    with progress_bar("multiply-adds of decoding", unit_scale=True, delay=1) as bar:
        return apply.decoded(model, canvas, arguments.batch, bar.moved)


def canvas_file(arguments: argparse.Namespace) -> Path:
    """Where the canvas is kept while it is drawn; UserError where --out cannot be written."""
    out = Path(arguments.out)
    if out.is_dir():  # said before anything is drawn
        raise UserError(f"{out} is a directory; give the name of a file to write")
    return Path(arguments.canvas) if arguments.canvas else out.with_suffix(SUFFIX)


def finish(arguments: argparse.Namespace) -> None:
    """Say that --out is written, and remove the canvas unless it was asked for."""
    if not arguments.canvas:  # it was there to be resumed, and there is nothing left to do
        canvas_file(arguments).unlink(missing_ok=True)
    say_written(arguments.out)
