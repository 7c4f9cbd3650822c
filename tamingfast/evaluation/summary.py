"""All measures of a model on a data set in one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypedDict

from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast import images as pictures
from tamingfast import tasks
from tamingfast.checkpoints.fingerprint import fingerprint, identity
from tamingfast.data.base import as_epoch_dataset
from tamingfast.evaluation.batches import images_of
from tamingfast.evaluation.distances import compare
from tamingfast.evaluation.features import Extractor, extract, see
from tamingfast.evaluation.generated import reconstructions, samples
from tamingfast.evaluation.likelihood import likelihood
from tamingfast.evaluation.reconstruction import reconstruction
from tamingfast.evaluation.references import save_reference
from tamingfast.evaluation.states import keeping
from tamingfast.evaluation.statistics import Features, Reference
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.progress import Bars, silent
from tamingfast.ranks import in_turns
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
    reference: Reference | None = None,
    write_reference: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
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
    ``training_set``. A ``reference`` takes the place of the images of ``dataset`` in the distances; without one they
    are written to the file ``write_reference``, if it is given, as `save_reference` does. The features of samples are
    gathered as they are drawn, and kept in the file ``state``, from which an interrupted evaluation goes on.
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
        real = reference
        if real is None:
            shown_images = _counted(images_of(dataset, **choice), bar, total)
            if write_reference is None:
                real = extract(network, shown_images, total).reference
            else:
                real = save_reference(write_reference, network, shown_images, total).reference
        made = {"reconstructions": extract(network, _counted(_again(model, dataset, choice), bar, total), total)}
        if is_prior:
            how = {"batch_size": batch_size, "seed": seed} | options
            made["samples"] = _seen_samples(model, dataset, network, count, bar, state, how)
        if training_set is not None:
            known = _size(training_set, count)
            others = images_of(training_set, batch_size, count, seed)
            made["training images"] = extract(network, _counted(others, bar, known), known)
        found["distances"] = {name: compare(seen, real) for name, seen in made.items()}
    return found


def _again(model: nn.Module, dataset: Dataset, choice: _Choice) -> Iterator[Tensor]:
    """The reconstructions of the chosen images."""
    return reconstructions(model, images_of(dataset, **choice))


def _seen_samples(
    model: nn.Module,
    dataset: Dataset,
    network: Extractor,
    count: int,
    bar: Bars,
    state: str | os.PathLike[str] | None,
    how: dict[str, Any],
) -> Features:
    """The features of ``count`` samples, drawn as ``how`` says; those in the file ``state`` are kept."""
    found = Features(network.name, count)
    with contextlib.ExitStack() as stack:
        kept = None
        if state is not None:
            kept = stack.enter_context(keeping(state, found, _facts(model, dataset, network, count, how)))
        shown = stack.enter_context(bar("tokens", None))
        done = found.count

        def moved(tokens: int, of: int) -> None:
            each = of // max(1, count - done)
            shown.moved(tokens + done * each, count * each)

        if done < count:
            drawn = samples(model, dataset, count, first=done, progress=moved, **how)
            for part in in_turns(lambda batch: see(network, pictures.to_uint8(batch)), drawn):
                found.add(*part)
                if kept is not None:
                    kept.tick()
    return found


def _facts(model: nn.Module, dataset: Dataset, network: Extractor, count: int, how: dict[str, Any]) -> dict[str, Any]:
    """What decides the features of samples, in values of JSON."""
    deciding = {name: value for name, value in how.items() if name not in ("engine", "lookahead", "drafts")}
    return deciding | {
        "network": network.name, "count": count, "prior": identity(model),
        "first_stage": fingerprint(tasks.first_stage_of(model)),
        "data": f"{as_epoch_dataset(dataset).description} ({len(as_epoch_dataset(dataset))} images)",
    }  # fmt: skip


def _size(dataset: Dataset, limit: int | None) -> int:
    length = len(as_epoch_dataset(dataset))
    return length if limit is None else min(limit, length)


def _counted(images: Iterator[Tensor], bar: Bars, total: int) -> Iterator[Tensor]:
    """The batches under a bar that counts images."""
    with bar("images", total) as shown:
        for batch in images:
            yield batch
            shown.update(len(batch))
