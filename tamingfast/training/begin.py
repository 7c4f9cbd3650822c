"""The beginning of a run: all checks come before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import instantiate_from_config, load_yaml, plain
from tamingfast.checkpoints.limits import check_sizes
from tamingfast.data import loader
from tamingfast.data.base import EpochDataset
from tamingfast.data.loading import to_device
from tamingfast.errors import UserError, first_line, lacks_memory
from tamingfast.files import atomic_write
from tamingfast.training.distributed import World
from tamingfast.training.feed import epoch_steps
from tamingfast.training.seeds import seed_for
from tamingfast.training.settings import FREE_TO_CHANGE, Training
from tamingfast.training.stage import Stage


def new_model(described: Mapping[str, Any], seed: int) -> nn.Module:
    """The untrained model of a config's ``model`` section, the same for each ``seed``; UserError if it is too large."""
    check_sizes(described, "model")
    torch.manual_seed(seed_for(seed, "weights"))
    return instantiate_from_config({key: described[key] for key in ("target", "params") if key in described})


def begin(
    config: dict[str, Any],
    out: Path,
    resume: bool,
    settings: Training,
    dataset: EpochDataset,
    among: World,
    stage: Stage,
) -> None:
    """Write ``config.yaml`` into a new run directory, or check that the run to resume began with the same config.

    Raises UserError when ``out`` already holds a run and ``resume`` is not given, when there is nothing to resume, when
    a setting that influences the weights differs from the run's, when ``dataset`` is too small for one step, and when
    the model of ``stage`` cannot process its images.
    """
    epoch_steps(dataset, settings, among.size)  # raises for too few images
    config["training"] = asdict(settings)
    if resume:
        _check_same_run(plain(load_yaml(run_directory.config_file(out))), config, out)
    elif run_directory.exists(out):
        raise UserError(
            f"{out}: got a directory that already holds a training run, expected a new one; continue the run with "
            "--resume, or give another directory"
        )
    _check_forward(stage, dataset, among)
    among.any(False)  # a barrier: no process writes before all have passed the checks
    if among.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / run_directory.CONFIG) as temporary:
            OmegaConf.save(OmegaConf.create(config), temporary)


def _check_forward(stage: Stage, dataset: EpochDataset, among: World) -> None:
    """Raise UserError when the model can be built but fails on the first training image."""
    batch = next(iter(loader(dataset, 1)))
    stage.model.eval()
    devices = [among.device] if among.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
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
