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
from tamingfast.tasks.labels import Label
from tamingfast.tasks.models import Model, check_windowed, opened
from tamingfast.tasks.options import TIMES, DrawingOptions
from tamingfast.tasks.pictures import Picture, Pictures, batch_of


@dataclass(frozen=True, eq=False)
class Completion:
    """Images and their completions, all float32 in [-1, 1] on the CPU.

    Attributes:
        images: (B, 3, H, W), the input, scaled and cut to the size.
        completed: (times, B, 3, H, W).
        conditions: (B, 3, H, W), pictures of the spatial conditions; None for priors without one.
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
    label: Label | None = None,
    conditions: Sequence[ConditionSource] | None = None,
    conditions_of: Sequence[Picture] | None = None,
    options: DrawingOptions = PAPER,
    bars: Bars = silent,
) -> Completion:
    """Keep the upper half of each image and redraw the lower half, ``times`` times.

    Args:
        model: a prior, or the path of its run or checkpoint.
        images: pictures, or directories of them.
        times: completions of each image.
        size: (height, width) in pixels, which the images are scaled to cover and then cut to. Default: a tensor's own
            size; for other pictures, the size that the model was trained on.
        label: as in `sample`.
        conditions, conditions_of: one per image; see ``condition`` and ``condition_of`` of `sample`. Default: computed
            from the image, if that kind of condition can be.
        options: how tokens are drawn.
        bars: as in `sample`.

    Raises:
        UserError: an argument out of range, or one that does not apply to this model.
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
            first = again * len(x)  # numbers the images on, so that each completion has its own noise
            part = completed(prior, x.to(prior.device), cond, first_image=first, progress=counter.moved, **how)
        drawn.append(part.clamp(-1, 1).cpu())
    shown = torch.cat([condition_picture(prior, condition) for condition in found]) if found else None
    return Completion(x, torch.stack(drawn), shown)
