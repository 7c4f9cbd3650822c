"""Which images each step sees: a pure function of (seed, step), so that a run can continue from any step."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

from tamingfast.data import loader, shuffled
from tamingfast.data.base import EpochDataset
from tamingfast.data.loading import Part, read, to_device
from tamingfast.errors import UserError
from tamingfast.ranks import World
from tamingfast.training.fitting import readers
from tamingfast.training.seeds import seed_for
from tamingfast.training.settings import Training


def images_per_step(settings: Training, processes: int) -> int:
    """Number of images in one optimizer step, over all processes."""
    return settings.batch_size * settings.accumulate * processes


def epoch_steps(dataset: EpochDataset, settings: Training, processes: int) -> int:
    """Steps in an epoch. Images that do not fill a step are left out, different ones in each epoch.

    Raises UserError for fewer images than one step needs.
    """
    needed = images_per_step(settings, processes)
    if len(dataset) < needed:
        raise UserError(
            f"data: got {len(dataset)} training images, expected at least {needed} for one step; lower "
            "training.accumulate, or give more images"
        )
    return len(dataset) // needed


def step_batches(
    dataset: EpochDataset, settings: Training, among: World, start: int
) -> Generator[tuple[int, list[dict[str, Any]]], None, None]:
    """(epoch, the ``accumulate`` batches of this process) for each step from ``start`` on, without end."""
    per_epoch = epoch_steps(dataset, settings, among.size)
    batches = read(dataset, _parts(dataset, settings, among, start), readers(settings, dataset, among))
    try:
        for step in itertools.count(start):
            yield step // per_epoch, [to_device(next(batches), among.device) for _ in range(settings.accumulate)]
            if (step + 1) % per_epoch == 0:
                dataset.warn_broken()
    finally:  # when the run ends and closes this generator
        dataset.warn_broken()


def _parts(dataset: EpochDataset, settings: Training, among: World, start: int) -> Iterator[Part]:
    """What the batches of this process hold, from step ``start`` on, without end."""
    per_epoch = epoch_steps(dataset, settings, among.size)
    taken = per_epoch * images_per_step(settings, among.size)
    first = start % per_epoch * settings.accumulate
    for epoch in itertools.count(start // per_epoch):
        order = dataset.order(seed_for(settings.seed, "order", epoch))[:taken]
        mine = order.reshape(-1, among.size, settings.batch_size)[first:, among.rank]
        yield from ((epoch, numbers) for numbers in mine)
        first = 0


def validation_batches(dataset: EpochDataset, settings: Training, among: World) -> Iterator[dict[str, Any]]:
    """The same images at every call: all, or ``validation_batches`` batches spread over the whole set."""
    # Neighbours in a data set are often crops of one photograph, so the first images do not represent the rest.
    chosen = shuffled(len(dataset), seed_for(settings.seed, "validation"))
    if settings.validation_batches is not None:
        chosen = chosen[: settings.validation_batches * settings.batch_size]
    batches = loader(
        dataset, settings.batch_size, order=chosen, workers=readers(settings, dataset, among), drop_last=False
    )
    return (to_device(batch, among.device) for batch in batches)
