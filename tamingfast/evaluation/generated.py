"""Samples of a prior, and how far they are from real images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast import tasks
from tamingfast.evaluation.batches import batches
from tamingfast.evaluation.distances import frechet_distance, kernel_distance
from tamingfast.evaluation.features import INCEPTION, Features, extract
from tamingfast.training.feed import grid_of
from tamingfast.training.prior import tokens_of


def samples(
    model: nn.Module,
    dataset: Dataset,
    count: int,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """``count`` samples in batches (b, 3, H, W) in [-1, 1], under the conditions of images of ``dataset``.

    The images that conditions are taken from are drawn by ``seed`` and begin anew when there are fewer than ``count``;
    they also give the size of the grid. ``options`` go to `tamingfast.tasks.draw`; ``progress(done, total)`` counts
    tokens.
    """
    rows, columns = grid_of(dataset, tasks.first_stage_of(model))
    if model.be_unconditional:
        cond = tasks.conditions(model, count)
    else:
        found = batches(dataset, batch_size, count, seed, model.device)
        cond = torch.cat([tokens_of(model, batch)[1] for batch in found])
    cond = cond.repeat(-(-count // len(cond)), 1)[:count]
    options = {"window": max(rows, columns), "seed": seed} | options
    canvas = model.canvas_size(rows, columns)
    for grid in tasks.draw(model, cond, *canvas, batch=batch_size, progress=progress, **options):
        yield model.decode_grid(model.image_tokens(grid))


@torch.no_grad()
def reconstructions(model: nn.Module, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """What the first stage of ``model`` makes of batches of images (b, 3, H, W)."""
    stage = tasks.first_stage_of(model)
    for batch in images:
        yield tasks.reconstruct(stage, batch.to(stage.device))[0]


def distances(
    network: nn.Module, made: Mapping[str, Iterable[Tensor]], real: Iterable[Tensor]
) -> dict[str, dict[str, Any]]:
    """`compare` of each set of images in ``made`` with the ``real`` ones, all in batches (b, C, H, W) in [-1, 1]."""
    reference = extract(network, real)
    return {name: compare(extract(network, batches), reference) for name, batches in made.items()}


def compare(drawn: Features, real: Features) -> dict[str, Any]:
    """How far images are from real ones: distances that say whose features they are of, and of how many images.

    Inception's are ``fid``, ``kid`` and ``inception_score`` (of ``drawn`` alone), others' ``frechet_distance`` and
    ``kernel_distance``. The Frechet distance grows as sets get smaller, so that it compares only with others of the
    same numbers of images; the kernel distance is unbiased.
    """
    if drawn.network != real.network:
        raise ValueError(f"drawn and real: got features of {drawn.network} and {real.network}; expected one network's")
    found: dict[str, Any] = {"network": real.network, "images": len(drawn.values), "real_images": len(real.values)}
    frechet, kernel = (distance(drawn.values, real.values) for distance in (frechet_distance, kernel_distance))
    if real.network != INCEPTION:
        return found | {"frechet_distance": frechet, "kernel_distance": kernel}
    from torch_fidelity.metric_isc import isc_features_to_metric

    score = isc_features_to_metric(drawn.logits, splits=min(10, len(drawn.values)))
    return found | {"fid": frechet, "kid": kernel} | score
