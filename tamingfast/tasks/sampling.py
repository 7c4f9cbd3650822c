"""New images: `sample`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tamingfast.data.conditions import Coordinates
from tamingfast.errors import UserError
from tamingfast.files import check_path
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.sampling.canvas import EVERY, Canvas
from tamingfast.tasks.canvases import Painter, Preview, Stop
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
from tamingfast.tasks.labels import Label, labels_of
from tamingfast.tasks.models import Model, check_prior, is_spatial, unread
from tamingfast.tasks.options import COUNT, DrawingOptions
from tamingfast.tasks.pictures import Picture, load_images
from tamingfast.tasks.recipes import (
    Recipe,
    RecipeSource,
    check_same_model,
    inputs_of,
    repeatable,
    say_changed,
)
from tamingfast.tasks.selection import Classifier, check_rate, packaged, selected
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
    every: float = EVERY,
    stop: Stop | None = None,
    like: RecipeSource | None = None,
    metadata: bool = True,
    npz: str | os.PathLike[str] | None = None,
    accept: float | None = None,
    classifier: Classifier | None = None,
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
        options: how tokens are drawn; default: those of `tamingfast.tasks.drawing_options` or, on resuming, those of
            the canvas.
        canvas: a file in which the tokens are saved during drawing and afterwards; by default they are not saved.
        resume: continue the interrupted drawing in ``canvas``. Other arguments, if given, must be those it was begun
            with.
        preview: called with the images so far (B, 3, H, W) every few seconds, or the PNG to write them to.
        every: seconds between previews, and between saves of the canvas; each takes at most a tenth of the time.
        stop: a function that is asked whenever tokens were drawn. After the first True the drawing is what there is so
            far: its canvas is unfinished, and what is not drawn yet is gray.
        like: a picture of an earlier `sample`, or its recipe, to repeat: it gives what is left out of count, size,
            label, scales and options. The model must be the one that drew it, and a photo or a condition that it began
            with is given again. What is given besides replaces the recipe's, which a warning says.
        metadata: note how the images were drawn in `Drawing.recipe`, which `Drawing.save` writes into the files.
        npz: an .npz file to write the pixels to, ``arr_0`` as uint8 (count, H, W, 3), in the memory of one batch; the
            drawing returned then holds no images and no recipe.
        accept: keep this share of the candidates that are drawn of each class, those that ``classifier`` is most
            certain of, as `tamingfast.tasks.selection.selected` says; such a drawing is neither saved on a canvas nor
            has a recipe.
        classifier: images (b, 3, H, W) in [-1, 1] -> logits (b, classes); default: EfficientNet-Lite0, for priors of
            ImageNet's 1000 classes in their usual order.
        bars: opens progress counters; see `tamingfast.progress`.

    Raises:
        UserError: an argument out of range, or one that does not apply to this model; or an unfinished canvas that
            would be overwritten; or a picture to repeat that another model or another task drew.
    """
    if count is not None:
        at_least_one(count, "count")
    if accept is not None:
        _check_selection(accept, canvas=canvas, resume=resume or None, preview=preview, like=like, photo=photo)
        metadata = False
    given: dict[str, Any] = {"condition": condition, "condition_of": condition_of, "photo": photo}
    wanted = _Wanted(count, size, label, scales, options)
    source = unread(model)
    outline = check_prior(source.outline)
    check_label(outline, label)
    if like is not None:
        wanted = _like(like, outline, wanted, given, resume)
    size, label = wanted.size, wanted.label
    painter = Painter(wanted.options, canvas, resume, preview, bars, every, stop, whole=npz is None).under(outline)
    options = painter.options
    found = _condition(outline, Given(condition, condition_of), size, resume)
    start = _scales_of(outline, photo, wanted.scales, size)
    if options is not None and not resume and not isinstance(outline, MultiscaleTransformer):
        drawn = image_size(outline, size) if found is None else (found.shape[0], found.shape[1])
        check_schedule(outline, *grid_size(outline, *drawn), options.schedule, options.stride)
    inputs = inputs_of(**given) if metadata else {}
    prior = check_prior(source.model)
    if like is not None:
        check_same_model(like, prior)
    blank = None
    with (options or PAPER).first_stage():
        if not resume or any(value is not None for value in (found, start, label, size)):
            blank = _blank(prior, wanted, found, start)
        accepted = None
        if accept is None:
            finished = painter.paint(prior, blank, wanted.count)
        else:
            assert blank is not None  # nothing is resumed
            finished, accepted = selected(prior, blank, accept, classifier or packaged(prior), options or PAPER, bars)
        shown = condition_pictures(prior, found, finished.cond) if start is None else (start,)
        if npz is not None:
            return replace(painter.archive(prior, finished, shown, npz), accepted=accepted)
        drawing = replace(painter.finish(prior, finished, shown), accepted=accepted)
    if metadata and not (resume and _begins_with_a_picture(prior) and not inputs):  # which the canvas does not tell
        drawing = painter.noted(
            drawing, "sample", source, prior, inputs, size=size if inputs else None, scales=wanted.scales
        )
    return drawing if wanted.image is None else drawing.only(wanted.image)


def _check_selection(rate: float, **others: object) -> None:
    """Raise UserError for a rate out of range, or arguments that do not apply where candidates are rejected."""
    check_rate(rate)
    for name, value in others.items():
        if value is not None:
            raise UserError(f"accept: got a rate together with {name}, expected one of them; leave one out")


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What is to be drawn: the arguments of `sample`, the first image's number, and the only image wanted of all."""

    count: int | None
    size: tuple[int, int] | None
    label: Label | None
    scales: int | None
    options: DrawingOptions | None
    first: int = 0
    image: int | None = None


def _like(
    source: RecipeSource, outline: Net2NetTransformer, wanted: _Wanted, given: Mapping[str, Any], resume: bool
) -> _Wanted:
    """What is wanted, with all that it leaves out taken from a recipe."""
    if resume:
        raise UserError("like: got a picture to repeat and a canvas to resume, expected one of them; leave one out")
    if not isinstance(source, Recipe):
        check_path("like", source)
    recipe = repeatable(source, given)
    classes = None if wanted.label is None else labels_of(outline, wanted.label)
    say_changed(source, wanted.count, wanted.size, classes, wanted.options)
    numbers = recipe.together if wanted.count is None else range(recipe.first, recipe.first + wanted.count)
    return _Wanted(
        len(numbers),
        wanted.size or recipe.size,
        recipe.classes_from(numbers.start) if wanted.label is None else wanted.label,
        recipe.arguments.get("scales") if wanted.scales is None else wanted.scales,
        wanted.options or recipe.options,
        numbers.start,
        recipe.image if wanted.count is None else None,
    )


def _begins_with_a_picture(model: Net2NetTransformer) -> bool:
    """Whether a drawing of this prior may begin with a photo or a condition."""
    return isinstance(model, MultiscaleTransformer) or (is_spatial(model) and model.cond_stage_key != Coordinates.key)


def _blank(
    model: Net2NetTransformer,
    wanted: _Wanted,
    condition: Condition | None,
    start: Tensor | None,
) -> Canvas:
    """The canvas to draw; nothing is known but the coarse scales of ``start``, if given."""
    cond = tokens_under(model, wanted.count or COUNT, condition, wanted.label)
    numbered = {"first_image": wanted.first} if wanted.first else {}
    if start is not None and wanted.scales is not None and isinstance(model, MultiscaleTransformer):
        return replace(begun(model, start.to(model.device), wanted.scales, cond), settings=numbered)
    if condition is not None:
        rows, columns = cond.shape[1:3]
    else:
        rows, columns = grid_size(model, *image_size(model, wanted.size))
    return Canvas.blank(cond, *model.canvas_size(rows, columns), **numbered)


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
