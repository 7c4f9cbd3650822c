"""What each schedule costs, measured by the likelihood of real images: `likelihood`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamingfast.engines.first_stage import check_name, using
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.ranks import in_turns
from tamingfast.sampling.canvas import Canvas
from tamingfast.sampling.likelihood import negative_log_likelihood, tokens_per_token
from tamingfast.sampling.plan import plan_grid
from tamingfast.tasks.conditioning import (
    ConditionSource,
    check_label,
    check_schedule,
    conditions_of_each,
    given_each,
    tokens_of_each,
)
from tamingfast.tasks.drawing import at_least_one, painted, photo_tokens
from tamingfast.tasks.labels import Label
from tamingfast.tasks.models import Model, check_windowed, unread
from tamingfast.tasks.options import LIKELIHOOD_BATCH, STRIDES
from tamingfast.tasks.pictures import Picture, Pictures, batch_of
from tamingfast.tasks.sizes import grid_size


@dataclass(frozen=True)
class ScheduleCost:
    """What one schedule costs.

    Attributes:
        name: the rule, followed by its stride if it has one.
        nats: nats per token, the mean of `tamingfast.sampling.likelihood.negative_log_likelihood` over tokens and
            images.
        tokens_per_token: tokens that the transformer computes for each token sampled.
    """

    name: str
    nats: float
    tokens_per_token: float


def likelihood(
    model: Model,
    images: Pictures,
    *,
    size: tuple[int, int] | None = None,
    label: Label | None = None,
    conditions: Sequence[ConditionSource] | None = None,
    conditions_of: Sequence[Picture] | None = None,
    strides: Sequence[int] = STRIDES,
    batch: int = LIKELIHOOD_BATCH,
    engine: str = "auto",
    bars: Bars = silent,
) -> list[ScheduleCost]:
    """The likelihood of real images under each schedule, and the work that each schedule takes.

    Args:
        model: a prior, or the path of its run or checkpoint.
        images, size, label, conditions, conditions_of, bars: as in `complete`.
        strides: the strides to try with "strided" and "block", in tokens.
        batch: images at a time; it does not change the results.
        engine: the implementation that runs the first stage: "auto", "native" (C++ on the CPU) or "torch".

    Returns:
        "paper", "scene", then "strided" and "block" with each stride.

    Raises:
        UserError: an argument out of range, or one that does not apply to this model.
    """
    at_least_one(batch, "batch")
    check_name(engine)
    source = unread(model)
    outline = check_windowed(source.outline)
    check_label(outline, label)
    _, x, _ = batch_of(outline, images, size)
    given = given_each(len(x), conditions, conditions_of)
    rules = [("paper", "paper", 1), ("scene", "scene", 1)]
    rules += [(f"{rule} {stride}", rule, stride) for rule in ("strided", "block") for stride in strides]
    for _, rule, stride in rules:
        check_schedule(outline, *grid_size(outline, x.shape[2], x.shape[3]), rule, stride)
    prior = check_windowed(source.model)
    found = conditions_of_each(prior, given, x)

    def encoded(part: Tensor) -> Tensor:
        with bars("multiply-adds of encoding", None) as counter:
            return photo_tokens(prior, part.to(prior.device), counter.moved).cpu()

    with using(engine):
        cond = tokens_of_each(prior, found, len(x), label)
        tokens = torch.cat(list(in_turns(encoded, x.split(batch))))
    canvas = painted(prior, Canvas.of(tokens.to(cond.device), cond))
    with bars("tokens", len(rules) * canvas.tokens.numel()) as counter:
        return schedule_costs(prior, canvas, rules, batch, counter.update)


@torch.no_grad()
def schedule_costs(
    model: Net2NetTransformer,
    canvas: Canvas,
    rules: Sequence[tuple[str, str, int]],
    batch: int,
    progress: Callable[[int], object],
) -> list[ScheduleCost]:
    """`likelihood` of the tokens of a canvas under ``rules``: (name, schedule, stride)."""
    cond = canvas.cond
    _, rows, columns = canvas.tokens.shape
    window = canvas.settings["window"]
    prefix = plan_grid(model, cond, rows, columns, window).context.length
    found = []
    for name, rule, stride in rules:
        how = {"window": window, "schedule": rule, "stride": stride}

        def nats_of(part: tuple[Tensor, Tensor], how: dict[str, Any] = how) -> Tensor:
            return negative_log_likelihood(model, *part, **how, progress=progress).cpu()

        nats = list(in_turns(nats_of, zip(cond.split(batch), canvas.tokens.split(batch), strict=True)))
        work = tokens_per_token(rows, columns, prefix, window=window, schedule=rule, stride=stride)
        found.append(ScheduleCost(name, float(torch.cat(nats).mean()), work))
    return found
