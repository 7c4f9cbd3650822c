"""Canvases that are drawn, kept, resumed and shown by the commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tamingfast.cli.options import at_least_one, drawing_settings, given_settings, options
from tamingfast.cli.progress import progress_bar, say_written
from tamingfast.errors import UserError
from tamingfast.files import check_png

SUFFIX = ".canvas"  # of files that hold a `tamingfast.sampling.canvas.Canvas`


PAINTING = options(
    ("--preview", {"metavar": "PNG", "help": "picture of what is drawn so far, renewed while drawing"}),
    ("--canvas", {"metavar": "FILE", "help": "keep the tokens here; default: beside --out until it is written"}),
    ("--resume", {"action": "store_true", "help": "go on with the canvas of an interrupted command"}),
    ("--separate", {"action": "store_true", "help": "write one PNG per image, numbered, beside --out"}),
)


def paint(arguments: argparse.Namespace, model: Any, begun: Any) -> Any:
    """``begun``, finished; with ``--resume`` the canvas of the file, which must have begun so where that is known."""
    from tamingfast import tasks
    from tamingfast.sampling.canvas import Canvas

    path, drawing = canvas_file(arguments), drawing_settings(arguments)
    how = {name: drawing.pop(name) for name in ("batch", "backend")}
    if arguments.resume:
        canvas = Canvas.load(path)
        if begun is not None:
            canvas.check_begun_as(begun)
        _check_settings(arguments, canvas, tasks.painted(model, canvas, **drawing).settings)
    else:
        canvas = tasks.painted(model, begun, **drawing)
        _check_nothing_lost(path, arguments.canvas is None)

    def preview(now: Any) -> None:
        _save(arguments.preview, tasks.decoded(model, now, how["batch"]))

    with progress_bar("tokens") as bar:
        return canvas.sample(
            model, path=path, preview=preview if arguments.preview else None, progress=bar.moved, **how
        )


def canvas_file(arguments: argparse.Namespace) -> Path:
    """Where the canvas is kept while it is drawn; UserError where --out or --preview cannot be written."""
    for path in filter(None, (arguments.out, arguments.preview)):  # said before anything is drawn
        check_png(path)
    return Path(arguments.canvas) if arguments.canvas else Path(arguments.out).with_suffix(SUFFIX)


def count_of(arguments: argparse.Namespace, default: int) -> int:
    """Images that -n asks for."""
    return at_least_one(default if arguments.count is None else arguments.count, "--count")


def _check_settings(arguments: argparse.Namespace, canvas: Any, wanted: dict[str, Any]) -> None:
    """UserError where the command line names another setting or number of images than the canvas was begun with."""
    begun = canvas.settings | {"count": len(canvas.tokens)}
    given = {name: wanted[name] for name in given_settings(arguments) if name in wanted}
    given |= {} if arguments.count is None else {"count": arguments.count}
    for name, value in given.items():
        if begun.get(name) != value:
            raise UserError(
                f"the drawing was begun with --{name.replace('_', '-')} {begun.get(name)}, which {value} would change: "
                "leave it out to go on"
            )


def _check_nothing_lost(path: Path, unnamed: bool) -> None:
    """UserError where a new canvas would take the place of another file: one unfinished, or one nobody named."""
    from tamingfast.sampling.canvas import Canvas

    if path.exists() and (unnamed or not Canvas.load(path).done):
        raise UserError(
            f"{path} holds a drawing already; go on with it by --resume, remove it, or give the name of another file "
            "with --canvas"
        )


def finish(arguments: argparse.Namespace, model: Any, canvas: Any, shown: Sequence[Any], keep: Any = None) -> None:
    """Write the images of a finished canvas, with the pictures of what they were drawn from, and remove it.

    A canvas that --canvas names stays. ``shown`` are pictures (1, 3, H, W), ``keep`` is done to the images (B, 3, H, W)
    first. One image is written as it is and with --separate each, what is shown beside it, else all on one sheet.
    """
    import torch

    from tamingfast import images, tasks

    with progress_bar("multiply-adds of decoding", unit_scale=True, delay=1) as bar:
        batch = tasks.decoded(model, canvas, drawing_settings(arguments)["batch"], bar.moved)
    batch, out = batch if keep is None else keep(batch), Path(arguments.out)
    written = [out]
    if arguments.separate:
        written = [out.with_name(f"{out.stem}-{number:04d}.png") for number in range(len(batch))]
        for path, image in zip(written, batch, strict=True):
            images.save_png(path, images.to_uint8(image))
    else:
        _save(out, batch if len(batch) == 1 else torch.cat([*shown, batch]))
    if arguments.separate or len(batch) == 1:
        for picture in shown:
            _save(out.with_name(f"{out.stem}-condition.png"), picture)
    if not arguments.canvas:  # it was there to be resumed, and there is nothing left to do
        canvas_file(arguments).unlink(missing_ok=True)
    say_written(written[0] if len(written) == 1 else f"{written[0]} to {written[-1].name}")


def _save(path: str | Path, batch: Any) -> None:
    from tamingfast import images

    if len(batch) == 1:
        images.save_png(path, images.to_uint8(batch[0]))
    else:
        images.save_grid(path, batch)
