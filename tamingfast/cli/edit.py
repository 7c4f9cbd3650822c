"""`tamingfast edit` and `tamingfast outpaint`: a photo, partly drawn anew or continued."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tamingfast.cli.conditions import condition_options, condition_pictures, named_conditions, tokens_under
from tamingfast.cli.options import DEVICE, DRAWING, command, load
from tamingfast.cli.painting import PAINTING, SUFFIX, count_of, finish, paint
from tamingfast.cli.progress import progress_bar
from tamingfast.errors import UserError

SIDES = ("left", "right", "top", "bottom")


def add_to(commands: Any) -> None:
    added = _command(commands, "edit", edit, "draw the masked region of a photo anew")
    added.add_argument("--mask", required=True, help="image of the photo's size, white where it is drawn anew")
    added = _command(commands, "outpaint", outpaint, "draw what lies around a photo")
    for side in SIDES:
        added.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help="default: 0")


def _command(commands: Any, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    parents = (DEVICE, DRAWING, condition_options(), PAINTING)
    added = command(commands, name, run, text, parents)
    added.add_argument("model", help="run directory or checkpoint of a prior")
    added.add_argument("photo", help="image file, or a canvas kept by --canvas")
    added.add_argument("-n", "--count", type=int, help="how many versions; default: 1")
    added.add_argument("--out", default=f"{name}ed.png", help="PNG to write (default: %(default)s)")
    added.add_argument(
        "--reconstruct", action="store_true", help="show the first stage's version of the photo where it is kept"
    )
    return added


def edit(arguments: argparse.Namespace) -> None:
    from tamingfast import tasks
    from tamingfast.sampling.canvas import token_mask

    model = tasks.check_windowed(load(arguments))
    factor = tasks.first_stage_of(model).factor
    canvas, photo, condition = _opened(arguments, model)
    height, width = (side * factor for side in canvas.tokens.shape[1:])
    mask = token_mask(tasks.read_mask(arguments.mask, height, width), factor)
    if not mask.any():
        raise UserError(
            f"{arguments.mask} has no white pixel, so nothing would be drawn; paint white what is to change"
        )
    canvas = canvas.resample(mask)
    finished = paint(arguments, model, canvas)
    _write_edited(arguments, model, finished, photo, canvas.pending, condition)


def outpaint(arguments: argparse.Namespace) -> None:
    import torch.nn.functional as F

    from tamingfast import tasks

    model = tasks.check_windowed(load(arguments))
    factor = tasks.first_stage_of(model).factor
    sides = {side: getattr(arguments, side) for side in SIDES}
    for side, pixels in sides.items():
        if pixels < 0 or pixels % factor:
            raise UserError(f"got --{side} {pixels}; this model needs multiples of {factor} pixels, 0 or more")
    if not any(sides.values()):
        raise UserError("nothing to draw; give --left, --right, --top or --bottom PIXELS")
    canvas, photo, condition = _opened(arguments, model, **{side: pixels // factor for side, pixels in sides.items()})
    finished = paint(arguments, model, canvas)
    photo = None if photo is None else F.pad(photo, tuple(sides.values()))
    _write_edited(arguments, model, finished, photo, canvas.pending, condition)


def _opened(arguments: argparse.Namespace, model: Any, **sides: int) -> tuple[Any, Any, Any]:
    """The canvas of a photo, or of the file that holds one, ``--count`` times, grown by ``sides`` tokens.

    And the photo, None for a file, and its condition (H, W, C), None where there is none or only its tokens are known.
    """
    from tamingfast import tasks

    left, right, top, bottom = (sides.get(side, 0) for side in SIDES)
    count = count_of(arguments, 1)
    saved = _saved(arguments.photo, count) if Path(arguments.photo).suffix == SUFFIX else None
    photo = tasks.read_photo(arguments.photo) if saved is None else None
    rows, columns = tasks.grid_size(model, *photo.shape[2:]) if saved is None else saved.tokens.shape[1:]
    factor = tasks.first_stage_of(model).factor
    size = ((rows + top + bottom) * factor, (columns + left + right) * factor)
    condition = _condition_at(arguments, model, size, saved is not None, not sides)
    if saved is not None:
        keep = condition is None and arguments.label is None
        cond = None if keep else tokens_under(arguments, model, condition, len(saved.tokens))
        return saved.outpaint(left, right, top, bottom, cond), None, condition
    cond = tokens_under(arguments, model, condition, count)
    part = cond if cond.ndim == 2 else cond[:, top : top + rows, left : left + columns]
    with progress_bar("multiply-adds of encoding", unit_scale=True, delay=1) as bar:
        canvas = tasks.photo_canvas(model, photo.to(model.device), part, bar.moved)
    return canvas.outpaint(left, right, top, bottom, cond), photo, condition


def _saved(path: str, count: int) -> Any:
    from tamingfast.sampling.canvas import Canvas

    canvas = Canvas.load(path)
    if len(canvas.tokens) > 1 and count > 1:
        raise UserError(f"{path} holds {len(canvas.tokens)} images; leave -n out to work on all of them")
    count, parts = max(count, len(canvas.tokens)), (canvas.tokens, canvas.pending, canvas.cond)
    return Canvas(*(part.expand(count, *part.shape[1:]) for part in parts), model=canvas.model)


def _condition_at(arguments: argparse.Namespace, model: Any, size: tuple[int, int], saved: bool, same: bool) -> Any:
    """The condition (H, W, C) of a canvas of ``size`` pixels that was ``saved``, or of a photo, and is the ``same``.

    It is the one that the options name, else what a photo or the size tells; None without a spatial condition and where
    the saved canvas has its own.
    """
    from tamingfast import tasks

    read, named = named_conditions(arguments)
    if named:
        condition = read(model, named[0])
        if condition.shape[:2] != size:
            got, wanted = ("x".join(map(str, pixels)) for pixels in (condition.shape[:2], size))
            raise UserError(
                f"the condition in {named[0]} is of {got} pixels, but the canvas of {wanted}: give one of its size"
            )
        return condition
    if saved and same:
        return None
    return tasks.own_condition(model, size, arguments.photo if same else None)


def _write_edited(
    arguments: argparse.Namespace, model: Any, finished: Any, photo: Any, drawn: Any, condition: Any
) -> None:
    from tamingfast.sampling.canvas import keep_pixels

    def keep(batch: Any) -> Any:
        return batch if photo is None or arguments.reconstruct else keep_pixels(batch, photo, drawn.cpu())

    finish(arguments, model, finished, condition_pictures(model, finished, condition), keep)
