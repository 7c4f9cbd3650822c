"""Images completed from their upper halves: `complete`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamingfast.progress import Bars, silent
from tamingfast.tasks.conditioning import (
    ConditionSource,
    condition_picture,
    conditions_of_each,
    given_each,
    tokens_of_each,
)
from tamingfast.tasks.drawing import PAPER, at_least_one, completed
from tamingfast.tasks.models import Model, check_windowed, opened
from tamingfast.tasks.options import TIMES, DrawingOptions
from tamingfast.tasks.pictures import Picture, Pictures, batch_of


@dataclass(frozen=True, eq=False)
class Completion:
    """Images and what was made of their upper halves, all float32 in [-1, 1] on the CPU.

    Attributes:
        images: (B, 3, H, W), as given.
        completed: (times, B, 3, H, W).
        conditions: pictures (B, 3, H, W) of their conditions; None for priors without a spatial one.
    """

    images: Tensor
    completed: Tensor
    conditions: Tensor | None


def complete(
    model: Model,
    images: Pictures,
    times: int = TIMES,
    *,
    size: tuple[int, int] | None = None,
    label: int | None = None,
    conditions: Sequence[ConditionSource] | None = None,
    conditions_of: Sequence[Picture] | None = None,
    options: DrawingOptions = PAPER,
    bars: Bars = silent,
) -> Completion:
    """Keep the upper half of images and draw the lower half anew, ``times`` times.

    Args:
        model: a prior, or the path of its run or checkpoint.
        images: pictures, or directories of them.
        times: completions of each image.
        size: (height, width) in pixels that they are scaled to cover and cut to; by default the size that the
            model was trained on, or a tensor's own.
        label: as in `sample`.
        conditions, conditions_of: one for each image, as in `sample`; by default computed from it, where it can be.
        options: of the drawing.
        bars: as in `sample`.

    Raises:
        UserError: an argument out of range or of no use to this model.
    """
    at_least_one(times, "times")
    prior = check_windowed(opened(model))
    pictures, x, size = batch_of(prior, images, size)
    given = given_each(len(pictures), conditions, conditions_of)
    found = conditions_of_each(prior, given, pictures, size)
    cond = tokens_of_each(prior, found, len(x), label)
    how = options.deciding() | options.running() | {"batch": options.batch}
    drawn = []
    for again in range(times):
        with bars("tokens", None) as counter:
            first = again * len(x)  # each completion has noise of its own
            part = completed(prior, x.to(prior.device), cond, first_image=first, progress=counter.moved, **how)
        drawn.append(part.cpu())
    shown = torch.cat([condition_picture(prior, condition) for condition in found]) if found else None
    return Completion(x, torch.stack(drawn), shown)
