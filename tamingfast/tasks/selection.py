"""Sampling with rejection: of many candidates for each class, those that a classifier is most certain of are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tamingfast import images
from tamingfast.errors import UserError, brief
from tamingfast.models.classifiers import CLASSES, ImageNet
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.ranks import in_turns
from tamingfast.sampling.canvas import Canvas
from tamingfast.tasks.drawing import draw, painted
from tamingfast.tasks.models import classes_of
from tamingfast.tasks.options import DrawingOptions
from tamingfast.tasks.recipes import classes_in

#: Images (b, 3, H, W) in [-1, 1] on the prior's device -> logits (b, classes).
Classifier: TypeAlias = Callable[[Tensor], Tensor]


def check_rate(rate: object) -> float:
    """``rate`` as a float; UserError unless it is a number above 0 and at most 1."""
    fits = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= 1
    if not fits:
        raise UserError(f"accept: got {brief(rate)}, expected a rate above 0 and at most 1")
    return float(rate)  # type: ignore[arg-type]


def packaged(model: Net2NetTransformer) -> Classifier:
    """EfficientNet-Lite0 for a prior of ImageNet's classes; UserError for other priors, or without its packages."""
    if classes_of(model) != CLASSES:
        raise UserError(
            f"classifier: got none for a prior of {classes_of(model) or 'no'} classes, expected one of its classes; "
            f"the packaged one knows ImageNet's {CLASSES}, so give a function of your own from Python"
        )
    network = ImageNet().to(model.device)
    return lambda x: network(torch.from_numpy(images.to_uint8(x)).permute(0, 3, 1, 2).to(x.device))


@torch.no_grad()
def selected(
    model: Net2NetTransformer,
    blank: Canvas,
    rate: float,
    classifier: Classifier,
    options: DrawingOptions,
    bars: Bars = silent,
) -> tuple[Canvas, float]:
    """(finished canvas, share of the candidates that is on it) for the images of the canvas ``blank``.

    For n images of a class ceil(n / ``rate``) candidates are drawn, and the n to which ``classifier`` gives the highest
    probability of that class are kept, in the order in which they were drawn (Razavi et al. 2019, section 3.3, and the
    rates of the paper's class-conditional table). Candidates are numbered through all classes, which keys their noise,
    so the result does not depend on the batch but for rounding. Only kept tokens are held in memory.

    Raises UserError for a prior without classes, and for a classifier that returns anything but logits.
    """
    labels = classes_in(model, blank.cond)
    if labels is None:
        raise UserError("accept: got a rate for a prior without classes, expected None; use a class-conditional prior")
    places = {label: [i for i, own in enumerate(labels) if own == label] for label in sorted(set(labels))}
    numbers = {label: math.ceil(len(own) / rate - 1e-9) for label, own in places.items()}
    order = torch.tensor([*places]).repeat_interleave(torch.tensor([*numbers.values()]))
    kept = {label: _Kept(len(own)) for label, own in places.items()}
    prefix = {label: blank.cond[own[0]] for label, own in places.items()}
    how: dict[str, Any] = options.deciding() | options.running()
    _, rows, columns = blank.tokens.shape
    with bars("candidates", len(order)) as shown:
        cond = torch.stack([prefix[int(label)] for label in order])
        drawn = zip(draw(model, cond, rows, columns, options.batch, **how), order.split(options.batch), strict=True)

        def judged(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            grids, mine = part
            pictures = model.decode_grid(model.image_tokens(grids)).clamp(-1, 1)
            return grids.cpu(), mine, _certainty(classifier(pictures), mine)

        first = 0
        for grids, mine, certain in in_turns(judged, drawn):
            for label in mine.unique().tolist():
                at = mine == label
                kept[label].add(grids[at], certain[at], first + at.nonzero()[:, 0])
            first += len(mine)
            shown.update(len(mine))
    tokens = blank.tokens.clone()
    for label, own in places.items():
        tokens[own] = kept[label].in_order().to(tokens)
    done = replace(painted(model, blank, **options.deciding()), tokens=tokens, pending=torch.zeros_like(blank.pending))
    return done, len(labels) / len(order)


class _Kept:
    """The ``count`` most certain candidates so far; of equal ones the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts: tuple[Tensor, ...] = ()  # tokens, certainty, number

    def add(self, *new: Tensor) -> None:
        """Take in tokens (n, rows, columns), their certainty (n,) and numbers (n,), which follow the earlier ones."""
        parts = [torch.cat(pair) for pair in zip(self.parts, new, strict=True)] if self.parts else list(new)
        # By number before, so that a stable sort leaves equal candidates in the order in which they were drawn.
        by_number = parts[2].argsort()
        best = by_number[parts[1][by_number].argsort(descending=True, stable=True)][: self.count]
        self.parts = tuple(part[best] for part in parts)

    def in_order(self) -> Tensor:
        """Their tokens by number."""
        return self.parts[0][self.parts[2].argsort()]


def _certainty(logits: Any, labels: Tensor) -> Tensor:
    """The log-probability (b,) of each image's own label."""
    most = int(labels.max())
    shape = tuple(logits.shape) if isinstance(logits, Tensor) and logits.is_floating_point() else brief(logits)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != len(labels) or shape[1] <= most:
        raise UserError(
            f"classifier: got {shape} from it, expected logits of shape ({len(labels)}, classes) for classes up to "
            f"{most}"
        )
    found: Tensor = logits.double().log_softmax(1).cpu()[torch.arange(len(labels)), labels]
    if not found.isfinite().all():
        raise UserError("classifier: got logits that are not finite from it, expected finite ones")
    return found
