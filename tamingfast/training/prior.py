"""Training of the second stage (paper section 3.2) on the tokens of a frozen first stage."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints import load_model
from tamingfast.checkpoints.config import instantiate_from_config, plain, trained_side
from tamingfast.checkpoints.weights import load_into
from tamingfast.data.conditions import SPATIAL_KEYS, TOKEN_KEYS, Objects, label_colors
from tamingfast.errors import UserError
from tamingfast.models.base import FirstStage
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import TOP_K, Net2NetTransformer
from tamingfast.training import distributed, loop
from tamingfast.training.begin import begin
from tamingfast.training.configs import check_stage
from tamingfast.training.datasets import Datasets, datasets_of
from tamingfast.training.prior_config import completed_data, prior_config
from tamingfast.training.seeds import seed_for
from tamingfast.training.settings import training_settings
from tamingfast.training.stage import Batch, Loss, optimizers_of
from tamingfast.training.step import learning_rate
from tamingfast.training.tokens import check_condition, check_tokens, grid_of, tokens_of

#: Weights of a first stage that a prior does not need.
_NOT_NEEDED = ("loss.", "colorize")
#: Nats per token above which exp overflows a double.
_MOST_NATS = 700.0


@dataclass(frozen=True)
class _Trained:
    """A trained first stage, and where it was found."""

    path: str | os.PathLike
    model: FirstStage
    config: Mapping[str, Any]


def train(
    config: Mapping[str, Any],
    first_stage: str | os.PathLike | None,
    out: str | os.PathLike,
    resume: bool = False,
    device: str | torch.device | None = None,
    datasets: Datasets | None = None,
    cond_stage: str | os.PathLike | None = None,
) -> Path:
    """Train a prior on the tokens of ``first_stage`` (a run directory or checkpoint) into ``out``; returns ``out``.

    ``cond_stage`` is the first stage of a condition that has its own (`tamingfast.data.conditions.IMAGE_KEYS`). The
    model's config is completed by `prior_config`; without a ``data:`` section, that of ``cond_stage`` is used, else
    that of ``first_stage``. With ``first_stage`` None, the config must be complete, as the original's are, with the
    first stage's ``ckpt_path``. ``datasets`` (training, validation) replaces the ``data:`` section; items with
    ``indices`` (h, w) are taken as tokens, others are encoded batch by batch. Raises what
    `tamingfast.training.vqgan.train` raises.
    """
    config, out = dict(plain(config)), Path(out)
    settings = training_settings(config)
    check_stage(config, prior=True)
    with distributed.world(device) as among:
        frozen, condition = _first_stage(first_stage), _first_stage(cond_stage)
        config["data"] = _data_section(config, frozen, condition)
        training, validation = datasets_of(config, datasets)
        if training.condition is not None:
            config["data"] |= training.condition.get("data") or {}  # so that sampling knows the run's condition
        objects = training.kind if isinstance(training.kind, Objects) else None
        if frozen is not None:
            check_tokens(training, frozen.model)
            grid = grid_of(training, frozen.model)
            classes = None if training.classes is None else len(training.classes)
            cond_config = None if condition is None else condition.config
            rule = None if objects is None else objects.rule
            config = prior_config(frozen.config, config, grid, classes, cond_config, rule)
        described = config.get("model") or {}
        lr = learning_rate(settings, described.get("base_learning_rate"), among.size)
        torch.manual_seed(seed_for(settings.seed, "weights"))
        model: Net2NetTransformer = instantiate_from_config(
            {key: described[key] for key in ("target", "params") if key in described}
        )
        for dataset in (training, validation):
            if dataset is not None:
                check_condition(model.cond_stage_key, None if condition is None else condition.model, dataset)
        grid = grid_of(training, model.first_stage_model)
        stage = PriorStage(model.to(among.device), lr, grid, settings.seed, objects)
        begin(config, out, resume, settings, training, among, stage)
        if frozen is not None:
            load_into(model.first_stage_model, frozen.model.state_dict(), frozen.path, optional=_NOT_NEEDED)
        if condition is not None:
            load_into(
                cast(nn.Module, model.cond_stage_model),
                condition.model.state_dict(),
                condition.path,
                optional=_NOT_NEEDED,
            )
        return loop.run(stage, settings, (training, validation), out, among, resume)


def _first_stage(path: str | os.PathLike | None) -> _Trained | None:
    """The first stage at ``path``; None without a path."""
    if path is None:
        return None
    model = load_model(path, device="cpu")
    if not isinstance(model, FirstStage):
        raise UserError(f"{path}: got a {type(model).__name__}, expected a first stage; give the run of `train vqgan`")
    return _Trained(path, model, model.config)


def _data_section(config: Mapping[str, Any], frozen: _Trained | None, condition: _Trained | None) -> dict[str, Any]:
    """The ``data:`` section of the config, the condition or the first stage; completed by the first stage."""
    sections = (config.get("data"), *(stage.config.get("data") for stage in (condition, frozen) if stage is not None))
    section: Mapping[str, Any] = next((each for each in sections if each), {})
    if frozen is None:
        return completed_data(section)
    return completed_data(section, trained_side(frozen.config), frozen.model.n_embed)


def perplexity(nats: float) -> float:
    """exp of the cross entropy per token, capped where it would overflow a double."""
    return math.exp(min(nats, _MOST_NATS))


class PriorStage:
    """A `Net2NetTransformer` with its AdamW.

    ``grid`` is tokens (rows, columns) of an image; ``objects`` draws the conditions of a prior on objects.
    """

    shown: tuple[str, ...] = ("loss", "nll", "perplexity")

    def __init__(
        self,
        model: Net2NetTransformer,
        learning_rate: float,
        grid: tuple[int, int],
        seed: int = 0,
        objects: Objects | None = None,
    ):
        self.model, self.grid, self.seed, self.objects = model, grid, seed, objects
        model.learning_rate = learning_rate
        self.optimizers = optimizers_of(model)

    def nats(self, batch: Batch) -> Tensor:
        """Cross entropy of each image token of the batch, in nats: (B, n) in the model's sequence."""
        z, c = tokens_of(self.model, batch)
        logits = self.model.token_logits(z, c)
        return F.cross_entropy(logits.transpose(1, 2).float(), z, reduction="none")

    def nll(self, batch: Batch) -> Tensor:
        """Mean cross entropy of the batch's image tokens, nats per token ()."""
        return self.nats(batch).mean()

    def loss(self, batch: Batch, index: int) -> Loss:
        value = self.nll(batch)
        return value, {"loss": value}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean cross entropy in nats per token, and its exponential; for a multiscale prior also per scale."""
        total, images = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            nats = self.nats(batch).double()
            total, images = total.to(nats.device) + nats.sum(0), images + len(nats)
        mean = total / images  # (n,)
        nll = float(mean.mean())
        values = {"nll": nll, "perplexity": perplexity(nll)}
        if isinstance(self.model, MultiscaleTransformer):
            pyramid = self.model.pyramid
            scales = zip(pyramid.names, pyramid.split(mean), strict=True)
            values |= {f"nll_{name}": float(scale.mean()) for name, scale in scales}
        return values

    def images(self, batch: Batch) -> list[Tensor]:
        """The batch's conditions if they can be shown, its tokens decoded, and samples under its conditions."""
        z, c = tokens_of(self.model, batch)
        height, width = self.grid
        shown = self.model.decode_grid(self.model.to_grid(z, height, width))
        samples = self.model.sample_images(
            c,
            height,
            width,
            window=max(height, width),
            top_k=TOP_K,
            seed=self.seed,
        )
        return [*self.conditioning(batch), shown, samples]

    def conditioning(self, batch: Batch) -> list[Tensor]:
        """The batch's conditions as a list of one (B, 3, H, W) in [-1, 1], empty if they cannot be shown."""
        key = self.model.cond_stage_key
        if key in TOKEN_KEYS.values() and self.objects is not None:
            shape = batch[self.model.first_stage_key].shape[1:3]
            drawn = np.stack([self.objects.picture_of_tokens(tokens, shape) for tokens in batch[key].cpu().numpy()])
            return [torch.from_numpy(drawn).permute(0, 3, 1, 2)]
        if key not in SPATIAL_KEYS:
            return []
        if key in batch:
            c = self.model.get_input(key, batch)
        else:
            c = self.model.decode_condition(batch[f"{key}_indices"].view(-1, *self.grid)).clamp(-1, 1)
        if key == "segmentation":
            colors = torch.from_numpy(label_colors(c.shape[1])).to(c.device)
            return [colors[c.argmax(1)].permute(0, 3, 1, 2)]
        return [(2 * c - 1 if key == "coord" else c).expand(-1, 3, -1, -1)]
