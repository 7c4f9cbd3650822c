"""Images made by a model: samples of a prior, and reconstructions by a first stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast import tasks
from tamingfast.evaluation.batches import batches
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ranks import in_turns
from tamingfast.training.tokens import grid_of, tokens_of


def samples(
    model: nn.Module,
    dataset: Dataset,
    count: int,
    *,
    batch_size: int = 16,
    seed: int = 0,
    first: int = 0,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """``count`` samples of a prior in batches (b, 3, H, W) in [-1, 1], of the size of the data set's images.

    The conditions are those of images drawn from the data set by ``seed``, repeated if there are fewer than
    ``count``. The samples before number ``first`` are left out. ``options`` go to `tamingfast.tasks.draw`;
    ``progress(done, total)`` counts tokens. Raises UserError if the model is not a prior.
    """
    prior = tasks.check_prior(model)
    rows, columns = grid_of(dataset, prior.first_stage_model)
    cond = _conditions(prior, dataset, count, batch_size, seed)[first:]
    options = {"window": max(rows, columns), "seed": seed, "first_image": first} | options
    canvas = prior.canvas_size(rows, columns)
    grids = tasks.draw(prior, cond, *canvas, batch=batch_size, progress=progress, **options)
    yield from in_turns(lambda grid: prior.decode_grid(prior.image_tokens(grid)).cpu(), grids)


def _conditions(prior: Net2NetTransformer, dataset: Dataset, count: int, batch_size: int, seed: int) -> Tensor:
    """Condition tokens (count, c)."""
    if prior.be_unconditional:
        return tasks.conditions(prior, count)
    found = [tokens_of(prior, batch)[1] for batch in batches(dataset, batch_size, count, seed, prior.device)]
    cond = torch.cat(found)
    return cond.repeat(-(-count // len(cond)), 1)[:count]


@torch.no_grad()
def reconstructions(model: nn.Module, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches of images (b, 3, H, W) as the first stage of ``model``, or ``model`` itself, reconstructs them."""
    stage = tasks.first_stage_of(model)
    yield from in_turns(lambda batch: tasks.reconstructed(stage, batch.to(stage.device)).cpu(), images)
