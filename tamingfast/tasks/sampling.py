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
    check_label,
    check_schedule,
    condition_pictures,
    own_condition,
    tokens_under,
)
from tamingfast.tasks.drawing import PAPER, Drawing, at_least_one, begun
from tamingfast.tasks.labels import Label
from tamingfast.tasks.models import Model, check_prior, is_spatial, unread
from tamingfast.tasks.options import COUNT, DrawingOptions
from tamingfast.tasks.pictures import Picture, load_images
from tamingfast.tasks.sizes import grid_size, image_size


def sample(
    model: Model,
    count: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    label: Label | None = None,
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
        count: number of images; default: 16 or, on resuming, that of the canvas.
        size: (height, width) in pixels; default: the size of the condition or, without one, of the training images.
        label: the class of the images, for class-conditional priors, by number or by name; the images cycle through
            several, by default through all.
        condition: the spatial condition of all images, for priors that have one: a file, an array, or a PIL image.
        condition_of: a photo to compute the condition from, for kinds that can be computed.
        photo, scales: start from the ``scales`` coarsest scales of this photo, for multiscale priors.
        options: how tokens are drawn; default: the paper's options or, on resuming, those of the canvas.
        canvas: a file in which the tokens are saved during drawing and afterwards; by default they are not saved.
        resume: continue the interrupted drawing in ``canvas``. Other arguments, if given, must be those it was begun
            with.
        preview: called with the images so far (B, 3, H, W) every few seconds, or the PNG to write them to.
        bars: opens progress counters; see `tamingfast.progress`.

    Raises:
        UserError: an argument out of range, or one that does not apply to this model; or an unfinished canvas that
            would be overwritten.
    """
    painter = Painter(options, canvas, resume, preview, bars)
    source = unread(model)
    outline = check_prior(source.outline)
    if count is not None:
        at_least_one(count, "count")
    check_label(outline, label)
    found = _condition(outline, Given(condition, condition_of), size, resume)
    start = _scales_of(outline, photo, scales, size)
    if options is not None and not resume and not isinstance(outline, MultiscaleTransformer):
        drawn = image_size(outline, size) if found is None else (found.shape[0], found.shape[1])
        check_schedule(outline, *grid_size(outline, *drawn), options.schedule, options.stride)
    prior = check_prior(source.model)
    blank = None
    with (options or PAPER).first_stage():
        if not resume or any(value is not None for value in (found, start, label, size)):
            blank = _blank(prior, count or COUNT, found, label, size, start, scales)
        finished = painter.paint(prior, blank, count)
        shown = condition_pictures(prior, found, finished.cond) if start is None else (start,)
        return painter.finish(prior, finished, shown)


def _blank(
    model: Net2NetTransformer,
    count: int,
    condition: Condition | None,
    label: Label | None,
    size: tuple[int, int] | None,
    start: Tensor | None,
    scales: int | None,
) -> Canvas:
    """The canvas to draw; nothing is known but the coarse scales of ``start``, if given."""
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
    """The photo (1, 3, H, W) that a multiscale prior starts from, or None."""
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
            f"is the number taken from the photo, coarsest first, of {', '.join(names)}"
        )
    model.pyramid.first(scales)  # raises if there are fewer scales
    size = image_size(model, size)
    model.canvas_size(*grid_size(model, *size))  # raises unless it is the training size
    return load_images([photo], *size)


def _condition(model: Net2NetTransformer, given: Given, size: tuple[int, int] | None, resume: bool) -> Condition | None:
    """The spatial condition, given or following from the size; None without one, or if a resumed canvas has its own."""
    if size is not None:
        image_size(model, size)  # raises for a size that the model cannot draw
    found = given.read(model, size)
    if found is not None or (resume and size is None):
        return found
    return own_condition(model, image_size(model, size)) if is_spatial(model) else None
