"""The settings of a run as the machine and the data allow them."""

from __future__ import annotations

import logging
from dataclasses import replace

from tamingfast.data.base import EpochDataset
from tamingfast.ops import machine
from tamingfast.ranks import World
from tamingfast.training.settings import AUTO, Training

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8


def fitted(settings: Training, dataset: EpochDataset, among: World) -> Training:
    """The settings with ``precision`` chosen, and ``batch_size`` lowered to what ``dataset`` fills, which is logged.

    Both influence the weights, so it is these settings that a run records. ``workers`` stays "auto", for the machine on
    which the run continues.
    """
    return _filled(replace(settings, precision=_precision(settings.precision, among)), dataset, among)


def _precision(asked: str, among: World) -> str:
    if asked == AUTO:
        return "bfloat16" if machine.trains_faster_in_bfloat16(among.device) else "float32"
    if (
        asked == "bfloat16"
        and not machine.multiplies_bfloat16(among.device)
        and among.device.type == "cpu"
        and among.rank == 0
    ):
        logger.warning(
            "training.precision=bfloat16: this processor has no units for it, and may take several times as long as "
            "with training.precision=float32"
        )
    return asked


def _filled(settings: Training, dataset: EpochDataset, among: World) -> Training:
    """With fewer images than a step takes, batches of as many as there are; at least one, see `feed.epoch_steps`."""
    most = max(1, len(dataset) // (settings.accumulate * among.size))
    if settings.batch_size <= most:
        return settings
    if among.rank == 0:
        logger.warning(
            "training.batch_size=%d: there are %d training images, so batches have %d",
            settings.batch_size, len(dataset), most,
        )  # fmt: skip
    return replace(settings, batch_size=most)


def readers(settings: Training, dataset: EpochDataset, among: World) -> int:
    """Number of processes that read data for this one: ``training.workers``, or as many as help on this machine.

    Items that are in memory already cost less than their way from another process. On a CPU the training itself keeps
    the processors busy.
    """
    if settings.workers != AUTO:
        return int(settings.workers)
    if not dataset.decodes:
        return 0
    own = machine.processors() // among.size
    return min(_MOST_WORKERS, own // 4 if among.device.type == "cpu" else max(0, own - 1))
