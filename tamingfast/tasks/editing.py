"""Redrawing a part of a photo, or drawing what lies around it: `edit` and `outpaint`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from tamingfast.errors import UserError
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.sampling.canvas import EVERY, Canvas, keep_pixels, token_mask
from tamingfast.tasks.canvases import SUFFIX, Painter, Preview, Stop, check_condition
from tamingfast.tasks.conditioning import (
    Condition,
    ConditionSource,
    Given,
    check_label,
    check_schedule,
    condition_pictures,
    own_condition,
    tokens_under,
)
from tamingfast.tasks.drawing import PAPER, Drawing, at_least_one, photo_canvas
from tamingfast.tasks.labels import Label
from tamingfast.tasks.models import Model, check_windowed, first_stage_of, unread
from tamingfast.tasks.options import DrawingOptions
from tamingfast.tasks.pictures import Picture, named, read_mask, read_photo
from tamingfast.tasks.recipes import inputs_of
from tamingfast.tasks.sizes import grid_size

#: A photo, a canvas to continue, or the path of a saved canvas, which ends in `SUFFIX`.
PhotoOrCanvas: TypeAlias = Picture | Canvas


def edit(
    model: Model,
    photo: PhotoOrCanvas,
    mask: Picture,
    count: int | None = None,
    *,
    label: Label | None = None,
    condition: ConditionSource | None = None,
    condition_of: Picture | None = None,
    own_pixels: bool = True,
    pixels: Picture | None = None,
    options: DrawingOptions | None = None,
    canvas: str | os.PathLike[str] | None = None,
    resume: bool = False,
    preview: Preview | None = None,
    every: float = EVERY,
    stop: Stop | None = None,
    metadata: bool = True,
    bars: Bars = silent,
) -> Drawing:
    """Redraw the masked region of a photo.

    Args:
        model: a prior, or the path of its run or checkpoint.
        photo: the photo, or a canvas from an earlier drawing, whose condition is kept unless another is given.
        mask: a picture of the photo's size, white where the photo is redrawn, black or transparent elsewhere, or bool
            (H, W). A token is redrawn if the mask touches any of its pixels.
        count: number of versions; default: 1, or the number of images of a canvas.
        label, condition, condition_of: as in `sample`; a condition must have the photo's size. Default: computed from
            the photo, if that kind of condition can be.
        own_pixels: show the photo's own pixels in the part that is kept, instead of their reconstruction by the first
            stage. A seam one token wide around what is resampled fades from one to the other.
        pixels: of a canvas given as ``photo``, a picture of its size whose pixels count as its own, such as the images
            of the drawing that it comes from.
        options, canvas, resume, preview, every, stop, metadata, bars: as in `sample`.

    Raises:
        UserError: an argument out of range, or one that does not apply to this model; an empty mask; or an unfinished
            canvas that would be overwritten.
    """
    painter = Painter(options, canvas, resume, preview, bars, every, stop)
    source = unread(model)
    outline = check_windowed(source.outline)
    painter = painter.under(outline)
    kept = _kept(outline, photo, count, Given(condition, condition_of), label, painter.options, pixels)
    factor = first_stage_of(outline).factor
    height, width = kept.rows * factor, kept.columns * factor
    tokens = token_mask(read_mask(mask, height, width), factor)
    if not tokens.any():
        raise UserError(
            f"{named(mask, 'mask')}: got a mask without a white pixel, expected one; paint what is to change white, "
            "on black or on nothing"
        )
    given = {"photo": photo, "mask": mask, "condition": condition, "condition_of": condition_of, "pixels": pixels}
    inputs = inputs_of(**given) if metadata else {}
    prior = check_windowed(source.model)
    with (painter.options or PAPER).first_stage():
        opening = _opened(prior, kept, bars)
        opening = replace(opening, canvas=opening.canvas.resample(tokens))
        drawing = _painted(painter, prior, opening, count, own_pixels)
    if not metadata:
        return drawing
    return painter.noted(drawing, "edit", source, prior, inputs, own_pixels=own_pixels)


def outpaint(
    model: Model,
    photo: PhotoOrCanvas,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    count: int | None = None,
    *,
    label: Label | None = None,
    condition: ConditionSource | None = None,
    condition_of: Picture | None = None,
    own_pixels: bool = True,
    pixels: Picture | None = None,
    options: DrawingOptions | None = None,
    canvas: str | os.PathLike[str] | None = None,
    resume: bool = False,
    preview: Preview | None = None,
    every: float = EVERY,
    stop: Stop | None = None,
    metadata: bool = True,
    bars: Bars = silent,
) -> Drawing:
    """Draw what lies around a photo.

    Args:
        model: a prior, or the path of its run or checkpoint.
        photo: the photo, or a canvas from an earlier drawing.
        left, right, top, bottom: pixels to add, multiples of f.
        condition, condition_of: as in `edit`, but of the size of the larger image.
        count, label, own_pixels, pixels, options, canvas, resume, preview, every, stop, metadata, bars: as in `edit`.

    Raises:
        UserError: an argument out of range, or one that does not apply to this model; or an unfinished canvas that
            would be overwritten.
    """
    painter = Painter(options, canvas, resume, preview, bars, every, stop)
    source = unread(model)
    outline = check_windowed(source.outline)
    painter = painter.under(outline)
    factor = first_stage_of(outline).factor
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for side, more in sides.items():
        if not isinstance(more, int) or more < 0 or more % factor:
            raise UserError(f"{side}: got {more!r} pixels, expected 0 or a multiple of {factor}")
    if not any(sides.values()):
        raise UserError("left, right, top, bottom: got 0 pixels each, expected something to draw; give at least one")
    added = Added(*(more // factor for more in sides.values()))
    kept = _kept(outline, photo, count, Given(condition, condition_of), label, painter.options, pixels, added)
    given = {"photo": photo, "condition": condition, "condition_of": condition_of, "pixels": pixels}
    inputs = inputs_of(**given) if metadata else {}
    prior = check_windowed(source.model)
    with (painter.options or PAPER).first_stage():
        opening = _opened(prior, kept, bars)
        if opening.photo is not None:
            opening = replace(opening, photo=F.pad(opening.photo, tuple(sides.values())))
        drawing = _painted(painter, prior, opening, count, own_pixels)
    if not metadata:
        return drawing
    arguments: dict[str, Any] = {"own_pixels": own_pixels, **sides}
    return painter.noted(drawing, "outpaint", source, prior, inputs, **arguments)


@dataclass(frozen=True)
class Added:
    """Tokens to add on each side of a photo."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


@dataclass(frozen=True, eq=False)
class _Opening:
    """What a drawing starts from.

    Attributes:
        canvas: the tokens of the photo, or the given canvas; added cells are pending.
        photo: (1, 3, H, W); None if a canvas was given without pixels.
        condition: the spatial condition; None for priors without one, and if the given canvas keeps its own.
    """

    canvas: Canvas
    photo: Tensor | None
    condition: Condition | None


@dataclass(frozen=True, eq=False)
class _Kept:
    """What the caller gave to start from, checked and read before the model's weights are.

    Attributes:
        start: the photo (1, 3, H, W), or a canvas.
        pixels: of that canvas (1, 3, H, W), or None.
        rows, columns: its size in tokens.
        condition: the spatial condition of the larger image, as in `_Opening`.
        label: as given.
        count: the number of versions.
        added: tokens to add around it.
    """

    start: Tensor | Canvas
    pixels: Tensor | None
    rows: int
    columns: int
    condition: Condition | None
    label: Label | None
    count: int
    added: Added


def _kept(
    outline: Net2NetTransformer,
    source: PhotoOrCanvas,
    count: int | None,
    given: Given,
    label: Label | None,
    options: DrawingOptions | None,
    pixels: Picture | None,
    added: Added = Added(),
) -> _Kept:
    kept = _read(outline, source, count, given, label, pixels, added)
    rows, columns = (kept.rows + added.top + added.bottom, kept.columns + added.left + added.right)
    if options is not None:
        check_schedule(outline, rows, columns, options.schedule, options.stride)
    return kept


def _read(
    outline: Net2NetTransformer,
    source: PhotoOrCanvas,
    count: int | None,
    given: Given,
    label: Label | None,
    pixels: Picture | None,
    added: Added,
) -> _Kept:
    check_label(outline, label)
    canvas = kept_canvas(source)
    if canvas is not None:
        canvas = _repeated(canvas, count, named(source, "photo"))
        count, rows, columns = canvas.tokens.shape
        condition = _of_size(given, outline, _grown(outline, rows, columns, added))
        if condition is None and added != Added():
            condition = own_condition(outline, _grown(outline, rows, columns, added))
        own = None if pixels is None else _of_canvas(pixels, outline, rows, columns)
        return _Kept(canvas, own, rows, columns, condition, label, count, added)
    assert not isinstance(source, Canvas)  # kept_canvas returns a canvas as it is
    if pixels is not None:
        raise UserError("pixels: got some beside a photo, expected none, as that has its own; leave them out")
    count = at_least_one(1 if count is None else count, "count")
    photo = read_photo(source)
    rows, columns = grid_size(outline, photo.shape[2], photo.shape[3], named(source, "photo"))
    size = _grown(outline, rows, columns, added)
    condition = _of_size(given, outline, size)
    if condition is None:
        condition = own_condition(outline, size, source if added == Added() else None)
    return _Kept(photo, None, rows, columns, condition, label, count, added)


def _opened(model: Net2NetTransformer, kept: _Kept, bars: Bars) -> _Opening:
    added, start = kept.added, kept.start
    around = (added.left, added.right, added.top, added.bottom)
    if isinstance(start, Canvas):
        check_condition(model, start)
        keep = kept.condition is None and kept.label is None
        cond = None if keep else tokens_under(model, kept.count, kept.condition, kept.label)
        return _Opening(start.outpaint(*around, cond), kept.pixels, kept.condition)
    cond = tokens_under(model, kept.count, kept.condition, kept.label)
    rows, columns = slice(added.top, added.top + kept.rows), slice(added.left, added.left + kept.columns)
    part = cond if cond.ndim == 2 else cond[:, rows, columns]
    with bars("multiply-adds of encoding", None) as counter:
        canvas = photo_canvas(model, start.to(model.device), part, counter.moved)
    return _Opening(canvas.outpaint(*around, cond), start, kept.condition)


def kept_canvas(source: PhotoOrCanvas) -> Canvas | None:
    """The canvas that was given instead of a photo, or None."""
    if isinstance(source, Canvas):
        return source
    if isinstance(source, str | os.PathLike) and Path(source).suffix == SUFFIX:
        return Canvas.load(source)
    return None


def _of_canvas(pixels: Picture, model: Net2NetTransformer, rows: int, columns: int) -> Tensor:
    """The pixels of a canvas (1, 3, H, W); UserError unless they have its size."""
    found, size = read_photo(pixels), _grown(model, rows, columns, Added())
    if tuple(found.shape[2:]) != size:
        got, wanted = ("x".join(map(str, sides)) for sides in (found.shape[2:], size))
        raise UserError(f"{named(pixels, 'pixels')}: got {got} pixels, expected {wanted}, the size of the canvas")
    return found


def _repeated(canvas: Canvas, count: int | None, name: str) -> Canvas:
    """The canvas with a single image repeated ``count`` times, without the settings that it was drawn with."""
    own = len(canvas.tokens)
    wanted = own if count is None else at_least_one(count, "count")
    if own > 1 and wanted > 1 and wanted != own:
        raise UserError(
            f"{name}: got a canvas of {own} images, expected one image for {wanted} versions; leave count out"
        )
    parts = (canvas.tokens, canvas.pending, canvas.cond)
    tokens, pending, cond = (part.expand(max(wanted, own), *part.shape[1:]) for part in parts)
    return Canvas(tokens, pending, cond, model=canvas.model, name=canvas.name)


def _grown(model: Net2NetTransformer, rows: int, columns: int, added: Added) -> tuple[int, int]:
    """(height, width) in pixels of a grid of rows x columns tokens after adding tokens around it."""
    factor = first_stage_of(model).factor
    return (rows + added.top + added.bottom) * factor, (columns + added.left + added.right) * factor


def _of_size(given: Given, model: Net2NetTransformer, size: tuple[int, int]) -> Condition | None:
    """The given condition, or None; UserError if its size is not ``size`` (height, width)."""
    condition = given.read(model)
    if condition is not None and tuple(condition.shape[:2]) != size:
        got, wanted = ("x".join(map(str, pixels)) for pixels in (condition.shape[:2], size))
        raise UserError(f"{given.name}: got a condition of {got} pixels, expected {wanted}, the size of the canvas")
    return condition


def _painted(
    painter: Painter, model: Net2NetTransformer, opening: _Opening, count: int | None, own_pixels: bool
) -> Drawing:
    photo, drawn = opening.photo, opening.canvas.pending.cpu()
    finished = painter.paint(model, opening.canvas, count)

    def with_photo(batch: Tensor) -> Tensor:
        return batch if photo is None or not own_pixels else keep_pixels(batch, photo, drawn)

    return painter.finish(model, finished, condition_pictures(model, opening.condition, finished.cond), with_photo)
