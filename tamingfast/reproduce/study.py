"""What all experiments share: settings, run directories that are trained once, and the images shown in reports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamingfast import tasks
from tamingfast.checkpoints import load_model, run_directory
from tamingfast.data import build
from tamingfast.data.base import EpochDataset
from tamingfast.errors import UserError
from tamingfast.models.base import FirstStage
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ops import backends
from tamingfast.reproduce.settings import load_preset
from tamingfast.training import prior as prior_training
from tamingfast.training import vqgan as vqgan_training
from tamingfast.training.colors import fit_color_clusters

#: Side in pixels that small images are magnified to, about.
_LEGIBLE = 96


@dataclass(frozen=True)
class Study:
    """One experiment under one preset.

    Attributes:
        preset: name of the preset.
        settings: its settings, overrides applied.
        out: directory of the report; each model is trained in a run directory below it.
        resume: continue runs that have begun and keep those that are finished, instead of refusing them.
        device: where models are trained, measured and sampled.
    """

    preset: str
    settings: dict[str, Any]
    out: Path
    resume: bool
    device: str

    @classmethod
    def of(
        cls,
        experiment: str,
        preset: str,
        out: str | os.PathLike,
        overrides: Sequence[str],
        resume: bool,
        device: str | None,
    ) -> Study:
        """The study described by the arguments of `tamingfast.reproduce.run`; raises UserError as that does."""
        settings = load_preset(experiment, preset, overrides)
        return cls(preset, settings, Path(out), resume, str(backends.pick_device(device)))

    def datasets(self) -> tuple[EpochDataset, EpochDataset]:
        """The training and validation sets of the ``data`` section; UserError without a validation set."""
        train, validation = build(self.settings["data"])
        if validation is None:
            raise UserError("data: got settings without a validation set, expected one to measure on")
        return train, validation

    def resumes(self, run: str) -> bool:
        """Whether ``run`` has begun and is to be continued."""
        return self.resume and run_directory.begun(self.out / run)

    def train_first_stage(
        self, run: str, datasets: tuple[EpochDataset, EpochDataset], config: Mapping[str, Any] | None = None
    ) -> None:
        """Train a first stage with the ``vqgan`` and ``data`` sections, or with ``config`` instead."""
        config = config or {**self.settings["vqgan"], "data": self.settings["data"]}
        vqgan_training.train(config, self.out / run, self.resumes(run), self.device, datasets)

    def fit_colors(self, run: str, dataset: EpochDataset, data: Mapping[str, Any]) -> None:
        """Fit the dictionary of the ``colors`` section; ``data`` is recorded in its config."""
        if not self.resumes(run):
            colors = self.settings["colors"]
            fit_color_clusters(dataset, colors["count"], colors["seed"], self.out / run, data)

    def train_prior(
        self, run: str, first_stage: str, datasets: tuple[EpochDataset, EpochDataset], **sections: Mapping[str, Any]
    ) -> None:
        """Train a prior on a first stage's run with the ``prior`` section; ``sections`` replace parts of its config."""
        config = {**self.settings["prior"], **sections}
        prior_training.train(config, self.out / first_stage, self.out / run, self.resumes(run), self.device, datasets)

    def first_stage(self, run: str) -> FirstStage:
        """A trained first stage."""
        return tasks.first_stage_of(load_model(self.out / run, device=self.device))

    def prior(self, run: str) -> Net2NetTransformer:
        """A trained prior."""
        return tasks.check_prior(load_model(self.out / run, device=self.device))

    def steps(self, run: str) -> int:
        """Optimizer steps that a run has made."""
        return run_directory.progress(self.out / run)["step"]

    def seconds(self, runs: Iterable[str]) -> float:
        """Training time of runs in seconds, over all calls of an interrupted run; 0 for colours, without steps."""
        begun = (self.out / run for run in runs)
        return sum(run_directory.progress(out)["seconds"] for out in begun if run_directory.exists(out))

    def facts(self, dataset: EpochDataset) -> dict[str, Any]:
        """The results that every report begins with."""
        return {
            "preset": self.preset,
            "data": dataset.description,
            "machine": backends.machine(),
            "settings": self.settings,
        }


def geometry(settings: Mapping[str, Any]) -> Mapping[str, int]:
    """``n_layer``, ``n_head`` and ``n_embd`` of the prior's transformer."""
    return settings["prior"]["model"]["params"]["transformer_config"]["params"]


def sampling_options(prior: Net2NetTransformer, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `tamingfast.sampling.sample_grid` from a ``sampling`` section."""
    return {
        "temperature": sampling["temperature"],
        "top_k": min(sampling["top_k"], prior.transformer.config.vocab_size),
        "seed": sampling["seed"],
        "lookahead": sampling.get("lookahead"),
    }


def draw_images(prior: Net2NetTransformer, cond: Tensor, rows: int, columns: int, **options: Any) -> Tensor:
    """Images (B, 3, H, W) on the CPU, one for each of the conditions; ``options`` go to `tamingfast.tasks.draw`."""
    grids = tasks.draw(prior, cond, rows, columns, **options)
    return torch.cat([prior.decode_grid(prior.image_tokens(grid)).cpu() for grid in grids])


def images_at(dataset: EpochDataset, indices: Iterable[int]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of a data set."""
    return torch.stack([torch.as_tensor(dataset[i]["image"]) for i in indices]).permute(0, 3, 1, 2)


def magnification(side: int) -> int:
    """How many times an image of this side is magnified so that people see what is on it."""
    return max(1, _LEGIBLE // side)


def spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of the indices below ``count``, evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, chosen).astype(int).tolist()
