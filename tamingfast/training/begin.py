"""The beginning of a run: all checks come before anything is written, and one process at a time writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import at, instantiate_from_config, load_yaml, plain
from tamingfast.checkpoints.limits import check_sizes
from tamingfast.data import Index, loader
from tamingfast.data.base import EpochDataset
from tamingfast.data.loading import to_device
from tamingfast.errors import UserError, first_line, lacks_memory
from tamingfast.files import atomic_write
from tamingfast.kernels import choices
from tamingfast.ranks import World
from tamingfast.training.acceleration import compiling
from tamingfast.training.averages import Averages
from tamingfast.training.events import writer_class
from tamingfast.training.feed import epoch_steps, images_per_step
from tamingfast.training.seeds import seed_for
from tamingfast.training.settings import FREE_TO_CHANGE, Training, training_settings
from tamingfast.training.stage import Stage


def new_model(described: Mapping[str, Any], seed: int) -> nn.Module:
    """The untrained model of a config's ``model`` section, the same for each ``seed``; UserError if it is too large."""
    check_sizes(described, "model")
    torch.manual_seed(seed_for(seed, "weights"))
    return instantiate_from_config({key: described[key] for key in ("target", "params") if key in described})


def as_begun(out: Path, resume: bool, among: World) -> World:
    """This process among as many as the run in ``out`` began with, for which its settings are meant; else ``among``."""
    known = resume and run_directory.exists(out)
    return replace(among, size=run_directory.progress(out)["processes"]) if known else among


def divided(settings: Training, began: World, among: World) -> Training:
    """The settings for ``among.size`` processes, with as many images in a step as ``began.size`` would take.

    Batches stay as large as they are, or become smaller. Raises UserError if the images cannot be shared equally.
    """
    images = images_per_step(settings, began.size)
    if images % among.size:
        raise UserError(
            f"WORLD_SIZE: got {among.size} processes, expected a number that divides the {images} images of a step of "
            f"this run, which began with {began.size}; resume it with another number"
        )
    own = images // among.size
    batch = max(size for size in range(1, min(settings.batch_size, own) + 1) if own % size == 0)
    return replace(settings, batch_size=batch, accumulate=own // batch)


@contextlib.contextmanager
def begin(
    config: dict[str, Any],
    out: Path,
    resume: bool,
    settings: Training,
    dataset: EpochDataset,
    among: World,
    began: World,
    stage: Stage,
    averages: Averages | None = None,
    index: Index | None = None,
) -> Iterator[dict[str, Any] | None]:
    """Hold the run directory ``out`` inside the block, with ``config.yaml`` written and the state to resume loaded.

    Yields the progress of the run that continues, None for a new one. Of several processes the first holds the lock.
    ``settings`` are recorded; they are meant for as many processes as ``began`` has. ``index``, through which the data
    were listed, is written beside the run, so that resuming it lists nothing.

    Raises UserError when another program trains in ``out``, when it already holds a run and ``resume`` is not given,
    when there is nothing to resume, when its state is damaged or was made with other settings that influence the
    weights, when ``dataset`` is too small for one step, and when the model of ``stage`` cannot process its images.
    """
    epoch_steps(dataset, settings, began.size)  # raises for too few images
    if settings.tensorboard:
        writer_class()  # raises without the package
    config["training"] = asdict(settings)
    _check_begun(config, out, resume)
    _check_forward(stage, dataset, among)
    with contextlib.ExitStack() as stack:
        if among.rank == 0:
            stack.enter_context(run_directory.held(out))
        among.any(False)  # a barrier: no process reads before the first has the lock
        recorded = _check_begun(config, out, resume)
        progress = (
            _restore(stage, dataset, out, averages, among)
            if recorded is not None and run_directory.exists(out)
            else None
        )
        if not among.agree(-1 if progress is None else progress["step"]):
            raise UserError(
                f"{out}: got different states on the processes, expected the same; use a file system that all share"
            )
        if progress is not None and index is not None:
            index.check_same("names")
        if among.rank == 0 and recorded != config:
            with atomic_write(out / run_directory.CONFIG) as temporary:
                OmegaConf.save(OmegaConf.create(config), temporary)
        if among.rank == 0 and index is not None:
            index.save(out / run_directory.INDEX)
        yield progress


def _check_begun(config: Mapping[str, Any], out: Path, resume: bool) -> dict[str, Any] | None:
    """The config of the run to resume, None for a new run; UserError where `begin` says."""
    run_directory.check_not_lost(out)
    if not resume:
        _check_apart(config, out)
        if run_directory.exists(out):
            raise UserError(
                f"{out}: got a directory that already holds a training run, expected a new one; continue the run with "
                "--resume, or give another directory"
            )
        return None
    began = plain(load_yaml(run_directory.config_file(out)))
    _check_same_run(began, config, out)
    return began


def _check_apart(config: Mapping[str, Any], out: Path) -> None:
    """Raise UserError for a run directory that is its data's: the pictures that the run writes would join them."""
    for key in ("path", "validation_path"):
        path = at(config, "data", key)
        if isinstance(path, str) and Path(path).expanduser().resolve() == out.resolve():
            raise UserError(
                f"{out}: got the directory of data.{key}, expected one for the run alone; give another --out"
            )


def _restore(stage: Stage, dataset: EpochDataset, out: Path, averages: Averages | None, among: World) -> dict[str, Any]:
    """Load the state in ``out``, and return its progress; UserError for a run on other data."""
    values = None if averages is None else averages.values
    progress = run_directory.restore(out, stage.model, stage.optimizers, values)
    if progress["images"] != len(dataset):
        raise UserError(
            f"{out}: got {len(dataset)} training images, expected {progress['images']}, with which the run began; "
            "resume it with the same number, or start a new run in another directory"
        )
    launches = progress["launches"]  # of each process of the run
    if launches:
        choices.adopt(launches[among.rank if among.rank < len(launches) else 0])
    return progress


def _check_forward(stage: Stage, dataset: EpochDataset, among: World) -> None:
    """Raise UserError when the model can be built but fails on the first training image."""
    batch = next(iter(loader(dataset, 1)))
    stage.model.eval()
    devices = [among.device] if among.device.type == "cuda" else []
    try:
        with compiling(), torch.no_grad(), torch.random.fork_rng(devices):
            stage.validate([to_device(batch, among.device)])
    except UserError:
        raise
    except Exception as error:  # mismatched parts raise errors of any kind
        if lacks_memory(error):
            raise
        raise UserError(
            f"model: got an error on the first training image ({first_line(error)}), expected a model that can process "
            "it; correct model.params or the data settings"
        ) from error
    finally:
        stage.model.train()


def _check_same_run(began: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    began = {**began, "training": asdict(training_settings(began))}  # a run of an earlier version has fewer settings
    for section in ("model", "data", "training"):
        before, after = _flat(began.get(section), section), _flat(now.get(section), section)
        for name in sorted(before.keys() | after.keys()):
            free = section == "training" and name.split(".")[1] in FREE_TO_CHANGE
            if not free and before.get(name) != after.get(name):
                raise UserError(
                    f"{name}: got {after.get(name)!r}, expected {before.get(name)!r}, with which the run in {out} "
                    "began; resume with the same setting, or start a new run in another directory"
                )


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Every leaf of nested mappings under its dotted key."""
    if isinstance(value, Mapping) and value:
        return {k: v for part in value for k, v in _flat(value[part], f"{name}.{part}").items()}
    return {name: value}
