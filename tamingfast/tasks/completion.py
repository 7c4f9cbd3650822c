"""Images completed from their upper halves: `complete`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamingfast.images import save_rows
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.sampling.canvas import keep_pixels
from tamingfast.tasks.conditioning import (
    ConditionSource,
    check_label,
    check_schedule,
    condition_picture,
    conditions_of_each,
    given_each,
    tokens_of_each,
)
from tamingfast.tasks.drawing import at_least_one, draw, lower_half, photo_tokens, token_unit
from tamingfast.tasks.labels import Label
from tamingfast.tasks.models import Model, check_windowed, first_stage_of, unread
from tamingfast.tasks.options import TIMES, DrawingOptions, drawing_options
from tamingfast.tasks.pictures import Picture, Pictures, batches, sized
from tamingfast.tasks.recipes import Recipe, classes_in, inputs_of, made, texts_of
from tamingfast.tasks.sizes import fixed_size, grid_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Completion:
    """Images and their completions, all float32 in [-1, 1] on the CPU, each image in a size of its own.

    Attributes:
        images: (3, H, W) each, as they were completed.
        completed: (times, 3, H, W) of each.
        conditions: (3, H, W) each, pictures of the spatial conditions; None for priors without one.
        recipe: how they were drawn; None if the task was told to keep none.
    """

    images: list[Tensor]
    completed: list[Tensor]
    conditions: list[Tensor] | None
    recipe: Recipe | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one PNG, with the recipe: rows of the conditions, the images, and each of their completions."""
        shown = [] if self.conditions is None else [self.conditions]
        rows = [*shown, self.images, *zip(*self.completed, strict=True)]
        save_rows(path, rows, texts=texts_of(self.recipe))


def complete(
    model: Model,
    images: Pictures,
    times: int = TIMES,
    *,
    size: tuple[int, int] | None = None,
    label: Label | None = None,
    conditions: Sequence[ConditionSource] | None = None,
    conditions_of: Sequence[Picture] | None = None,
    own_pixels: bool = True,
    options: DrawingOptions | None = None,
    metadata: bool = True,
    bars: Bars = silent,
) -> Completion:
    """Keep the upper half of each image and redraw the lower half, ``times`` times.

    Args:
        model: a prior, or the path of its run or checkpoint.
        images: pictures, or directories of them.
        times: completions of each image.
        size: (height, width) in pixels, which the images are scaled to cover and then cut to. Default: each image
            whole, cut to multiples of f; the training size for priors whose window cannot slide.
        label: as in `sample`.
        conditions, conditions_of: one per image; see ``condition`` and ``condition_of`` of `sample`. Default: computed
            from the image, if that kind of condition can be.
        own_pixels: as in `edit`.
        options: as in `sample`.
        metadata, bars: as in `sample`; the recipe is that of `Completion`.

    Raises:
        UserError: an argument out of range, or one that does not apply to this model; or images that do not fit into
            memory with their completions.
    """
    at_least_one(times, "times")
    source = unread(model)
    outline = check_windowed(source.outline)
    check_label(outline, label)
    options = drawing_options(outline) if options is None else options
    whole = size is None
    if whole and (fixed := fixed_size(outline)) is not None:
        size, whole = fixed, False
        logger.warning("scaled and cut to %dx%d pixels, the only size that this prior draws", *fixed)
    pictures = sized(outline, images, size, copies=1 + times)
    given = given_each(len(pictures), conditions, conditions_of)
    for one in {picture.size for picture in pictures}:
        check_schedule(outline, *grid_size(outline, *one), options.schedule, options.stride)
    inputs: dict[str, Any] = {
        "images": [one.picture for one in pictures],
        "conditions": conditions,
        "conditions_of": conditions_of,
    }
    inputs = inputs_of(**inputs) if metadata else {}
    prior = check_windowed(source.model)
    classes: list[int] = []
    shown: list[Tensor] = []
    taken: list[Tensor] = []
    completions: list[Tensor] = []
    with options.first_stage():
        for part, x in batches(pictures, first_stage_of(prior).factor):
            found = conditions_of_each(prior, given[part], x, whole)
            cond = tokens_of_each(prior, found, part.stop, label)[-len(x) :]
            classes += classes_in(prior, cond) or []
            shown += [condition_picture(prior, condition)[0] for condition in found]
            numbers = [again * len(pictures) + part.start for again in range(times)]
            taken.extend(x)
            completions.extend(_completions(prior, x, cond, numbers, own_pixels, options, bars).unbind(1))
    recipe = None
    if metadata:
        recipe = made(
            "complete", source, prior, inputs, count=times * len(pictures), size=size, classes=times * classes or None,
            options=options, own_pixels=own_pixels, times=times,
        )  # fmt: skip
    return Completion(taken, completions, shown or None, recipe)


def _completions(
    model: Net2NetTransformer,
    x: Tensor,
    cond: Tensor,
    numbers: Sequence[int],
    own_pixels: bool,
    options: DrawingOptions,
    bars: Bars,
) -> Tensor:
    """Completions (times, B, 3, H, W) of images (B, 3, H, W).

    ``numbers`` are those of the first image in each completion: they key the noise, so that each has its own.
    """
    with bars("multiply-adds of encoding", None) as counter:
        start = photo_tokens(model, x.to(model.device), counter.moved)
    _, rows, columns = start.shape
    mask = lower_half(rows, columns)
    how: dict[str, Any] = options.deciding() | options.running() | {"batch": options.batch}
    drawn = []
    for first in numbers:
        with bars(token_unit(model, rows, columns, cond), None) as counter:
            grids = draw(
                model, cond, rows, columns, start=start, mask=mask, first_image=first, progress=counter.moved, **how
            )
            tokens = torch.cat(list(grids))
        with bars("multiply-adds of decoding", None) as counter:
            pixels = model.decode_grid(tokens, progress=counter.moved).cpu()
        drawn.append((keep_pixels(pixels, x, mask[None]) if own_pixels else pixels).clamp(-1, 1))
    return torch.stack(drawn)
