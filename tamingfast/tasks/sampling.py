"""New images: `sample`."""

from __future__ import annotations

import os

from torch import Tensor

from tamingfast.errors import UserError
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.sampling.canvas import Canvas
from tamingfast.tasks.canvases import Painter, Preview
from tamingfast.tasks.conditioning import (
    Condition,
    ConditionSource,
    Given,
    condition_pictures,
    own_condition,
    tokens_under,
)
from tamingfast.tasks.drawing import Drawing, at_least_one, begun
from tamingfast.tasks.models import Model, check_prior, is_spatial, opened
from tamingfast.tasks.options import COUNT, DrawingOptions
from tamingfast.tasks.pictures import Picture, load_images
from tamingfast.tasks.sizes import grid_size, image_size


def sample(
    model: Model,
    count: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    label: int | None = None,
    condition: ConditionSource | None = None,
    condition_of: Picture | None = None,
    photo: Picture | None = None,
    scales: int | None = None,
    options: DrawingOptions | None = None,
    canvas: str | os.PathLike[str] | None = None,
    resume: bool = False,
    preview: Preview | None = None,
    bars: Bars = silent,
) -> Drawing:
    """Draw new images.

    Args:
        model: a prior, or the path of its run or checkpoint.
        count: how many images; 16 by default, or on resuming those of the canvas.
        size: (height, width) in pixels; by default that of the condition, else the size of the training images.
        label: the class of all images, for class-conditional priors; by default the images take all classes in turn.
        condition: what lies over the images, for priors with a spatial condition: a file, an array, or a PIL image.
        condition_of: a photo to compute the condition from, for kinds that can be computed.
        photo, scales: begin with the ``scales`` coarsest scales of this photo, for multiscale priors.
        options: of the drawing; the paper's by default, or on resuming those of the canvas.
        canvas: a file that keeps the tokens while they are drawn and afterwards; by default none.
        resume: continue the drawing that was interrupted, from ``canvas``. What else is given must be as it was begun.
        preview: called with the images so far (B, 3, H, W) every few seconds, or the PNG to write them to.
        bars: opens counters of progress; see `tamingfast.progress`.

    Raises:
        UserError: an argument out of range or of no use to this model, or a canvas that would be lost.
    """
    painter = Painter(options, canvas, resume, preview, bars)
    prior = check_prior(opened(model))
    if count is not None:
        at_least_one(count, "count")
    found = _condition(prior, Given(condition, condition_of), size, resume)
    start = _scales_of(prior, photo, scales, size)
    blank = None
    if not resume or any(value is not None for value in (found, start, label, size)):
        blank = _blank(prior, count or COUNT, found, label, size, start, scales)
    finished = painter.paint(prior, blank, count)
    shown = condition_pictures(prior, found, finished.cond) if start is None else (start,)
    return painter.finish(prior, finished, shown)


def _blank(
    model: Net2NetTransformer,
    count: int,
    condition: Condition | None,
    label: int | None,
    size: tuple[int, int] | None,
    start: Tensor | None,
    scales: int | None,
) -> Canvas:
    """The canvas to be drawn, but for coarse scales that are given."""
    cond = tokens_under(model, count, condition, label)
    if start is not None and scales is not None and isinstance(model, MultiscaleTransformer):
        return begun(model, start.to(model.device), scales, cond)
    if condition is not None:
        rows, columns = cond.shape[1:3]
    else:
        rows, columns = grid_size(model, *image_size(model, size))
    return Canvas.blank(cond, *model.canvas_size(rows, columns))


def _scales_of(
    model: Net2NetTransformer, photo: Picture | None, scales: int | None, size: tuple[int, int] | None
) -> Tensor | None:
    """The photo (1, 3, H, W) that a multiscale prior begins with; None without one."""
    if photo is None and scales is None:
        return None
    if not isinstance(model, MultiscaleTransformer):
        raise UserError(
            "photo: got a photo or scales for a prior of one scale, expected a multiscale prior; train one with "
            "prior.scales=all"
        )
    names = model.pyramid.names
    if photo is None or scales is None:
        raise UserError(
            f"photo: got {'scales' if photo is None else 'a photo'} alone, expected photo and scales together; scales "
            f"is how many of {', '.join(names)}, coarsest first, are the photo's"
        )
    model.pyramid.first(scales)  # raises for more scales than there are
    size = image_size(model, size)
    model.canvas_size(*grid_size(model, *size))  # raises for another size than the trained one
    return load_images([photo], *size)


def _condition(model: Net2NetTransformer, given: Given, size: tuple[int, int] | None, resume: bool) -> Condition | None:
    """The spatial condition that was given or follows from the size; None where there is none, or the canvas has it."""
    if size is not None:
        grid_size(model, *size)
    found = given.read(model, size)
    if found is not None or (resume and size is None):
        return found
    return own_condition(model, image_size(model, size)) if is_spatial(model) else None
