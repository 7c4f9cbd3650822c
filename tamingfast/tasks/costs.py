"""What each schedule costs in likelihood of real images: `likelihood`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.sampling.likelihood import negative_log_likelihood, tokens_per_token
from tamingfast.sampling.plan import plan_grid
from tamingfast.tasks.conditioning import ConditionSource, conditions_of_each, given_each, tokens_of_each
from tamingfast.tasks.drawing import at_least_one, painted, photo_canvas
from tamingfast.tasks.models import Model, check_windowed, opened
from tamingfast.tasks.options import LIKELIHOOD_BATCH, STRIDES
from tamingfast.tasks.pictures import Picture, Pictures, batch_of


@dataclass(frozen=True)
class ScheduleCost:
    """One schedule.

    Attributes:
        name: the rule, with its stride where it has one.
        nats: mean over tokens and images of `tamingfast.sampling.likelihood.negative_log_likelihood`.
        tokens_per_token: tokens that pass through the transformer for each one sampled.
    """

    name: str
    nats: float
    tokens_per_token: float


def likelihood(
    model: Model,
    images: Pictures,
    *,
    size: tuple[int, int] | None = None,
    label: int | None = None,
    conditions: Sequence[ConditionSource] | None = None,
    conditions_of: Sequence[Picture] | None = None,
    strides: Sequence[int] = STRIDES,
    batch: int = LIKELIHOOD_BATCH,
    bars: Bars = silent,
) -> list[ScheduleCost]:
    """How likely real images are under each schedule, and how much work each is.

    Args:
        model: a prior, or the path of its run or checkpoint.
        images, size, label, conditions, conditions_of, bars: as in `complete`.
        strides: those of "strided" and "block" to try, in tokens.
        batch: images at a time, which does not change the figures.

    Raises:
        UserError: an argument out of range or of no use to this model.
    """
    at_least_one(batch, "batch")
    prior = check_windowed(opened(model))
    pictures, x, size = batch_of(prior, images, size)
    given = given_each(len(pictures), conditions, conditions_of)
    found = conditions_of_each(prior, given, pictures, size)
    cond = tokens_of_each(prior, found, len(x), label)
    with bars("schedules", None) as counter:
        return schedule_costs(prior, x.to(prior.device), cond, strides, batch, counter.moved)


@torch.no_grad()
def schedule_costs(
    model: Net2NetTransformer,
    x: Tensor,
    cond: Tensor,
    strides: Sequence[int],
    batch: int,
    progress: Callable[[int, int], object],
) -> list[ScheduleCost]:
    """The same of images (B, 3, H, W) in [-1, 1] under condition tokens (B, c) or (B, rows, columns)."""
    canvas = painted(model, photo_canvas(model, x, cond))
    _, rows, columns = canvas.tokens.shape
    window = canvas.settings["window"]
    prefix = plan_grid(model, cond, rows, columns, window).context.length
    rules = [("paper", "paper", 1), ("scene", "scene", 1)]
    rules += [(f"{rule} {stride}", rule, stride) for rule in ("strided", "block") for stride in strides]
    found = []
    for done, (name, rule, stride) in enumerate(rules, start=1):
        nats = []
        for part, tokens in zip(cond.split(batch), canvas.tokens.split(batch), strict=True):
            nats.append(negative_log_likelihood(model, part, tokens, window=window, schedule=rule, stride=stride))
        work = tokens_per_token(rows, columns, prefix, window=window, schedule=rule, stride=stride)
        found.append(ScheduleCost(name, float(torch.cat(nats).mean()), work))
        progress(done, len(rules))
    return found
