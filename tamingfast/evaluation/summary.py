"""All measures of a model on a data set in one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.data.base import as_epoch_dataset
from tamingfast.evaluation.batches import images_of
from tamingfast.evaluation.distances import distances
from tamingfast.evaluation.features import Extractor
from tamingfast.evaluation.generated import reconstructions, samples
from tamingfast.evaluation.likelihood import likelihood
from tamingfast.evaluation.reconstruction import reconstruction
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.tasks.options import SAMPLES


class _Choice(TypedDict):
    """Which images are measured, and in which batches."""

    batch_size: int
    limit: int | None
    seed: int


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    network: Extractor | None = None,
    perceptual: nn.Module | None = None,
    training_set: Dataset | None = None,
    count: int = SAMPLES,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    bar: Bars = silent,
    **options: Any,
) -> dict[str, Any]:
    """Take every measure that applies to ``model``, on ``limit`` images of ``dataset`` or on all of them.

    Returns ``reconstruction`` and, for priors, ``likelihood``: the results of the functions with these names. With a
    ``network`` of features there are also ``distances`` from the images of ``dataset``: one row for their
    reconstructions, one for ``count`` samples of a prior and, for comparison, one for ``count`` images of the
    ``training_set``.
    ``options`` are for drawing the samples; see `tamingfast.evaluation.samples`.
    """
    total = _size(dataset, limit)
    choice = _Choice(batch_size=batch_size, limit=limit, seed=seed)
    found: dict[str, Any] = {}
    with bar("images", total) as shown:
        found["reconstruction"] = reconstruction(model, dataset, perceptual=perceptual, progress=shown.update, **choice)
    is_prior = isinstance(model, Net2NetTransformer)
    if is_prior:
        with bar("images", total) as shown:
            found["likelihood"] = likelihood(model, dataset, progress=shown.update, **choice)
    if network is not None:
        again = reconstructions(model, images_of(dataset, **choice))
        made = {"reconstructions": _counted(again, bar, total)}
        if is_prior:
            made["samples"] = _drawn(model, dataset, count, bar, batch_size=batch_size, seed=seed, **options)
        if training_set is not None:
            others = images_of(training_set, batch_size, count, seed)
            made["training images"] = _counted(others, bar, _size(training_set, count))
        found["distances"] = distances(network, made, _counted(images_of(dataset, **choice), bar, total))
    return found


def _size(dataset: Dataset, limit: int | None) -> int:
    length = len(as_epoch_dataset(dataset))
    return length if limit is None else min(limit, length)


def _drawn(model: nn.Module, dataset: Dataset, count: int, bar: Bars, **options: Any) -> Iterator[Tensor]:
    """`samples` under a bar that counts tokens."""
    with bar("tokens", None) as shown:
        yield from samples(model, dataset, count, progress=shown.moved, **options)


def _counted(images: Iterator[Tensor], bar: Bars, total: int) -> Iterator[Tensor]:
    """The batches under a bar that counts images."""
    with bar("images", total) as shown:
        for batch in images:
            yield batch
            shown.update(len(batch))
