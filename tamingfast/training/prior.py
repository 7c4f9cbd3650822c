"""Training of the second stage (paper section 3.2) on the tokens of a frozen first stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tamingfast.checkpoints import load_model, run_directory
from tamingfast.checkpoints.config import at, plain, trained_side
from tamingfast.checkpoints.targets import check_targets
from tamingfast.checkpoints.weights import load_into
from tamingfast.data import Index
from tamingfast.data.conditions import Objects, settings_of
from tamingfast.errors import UserError
from tamingfast.models.base import FirstStage
from tamingfast.models.condition_stages import Labelator
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ranks import world
from tamingfast.sampling.settings import recommended
from tamingfast.training import loop
from tamingfast.training.acceleration import accelerate, fuse
from tamingfast.training.averages import averages_of
from tamingfast.training.begin import as_begun, begin, divided, new_model
from tamingfast.training.configs import check_stage
from tamingfast.training.datasets import Datasets, datasets_of
from tamingfast.training.fine_tuning import Start
from tamingfast.training.fitting import fitted
from tamingfast.training.parallel import parallel_prior
from tamingfast.training.prior_config import completed_data, prior_config
from tamingfast.training.prior_stage import PriorStage
from tamingfast.training.settings import training_settings
from tamingfast.training.step import learning_rate
from tamingfast.training.tokens import check_condition, check_tokens, grid_of

logger = logging.getLogger(__name__)

#: Weights of a first stage that a prior does not need.
_NOT_NEEDED = ("loss.", "colorize")
#: Letters of class names, and of what YAML adds to each, that a config may hold.
_MOST_NAMES = 1 << 19


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
    *,
    start: str | os.PathLike | None = None,
    allow: Collection[str] = (),
) -> Path:
    """Train a prior on the tokens of ``first_stage`` (a run directory or checkpoint) into ``out``; returns ``out``.

    ``cond_stage`` is the first stage of a condition that has its own (`tamingfast.data.conditions.IMAGE_KEYS`). The
    model's config is completed by `prior_config`; without a ``data:`` section, that of ``cond_stage`` is used, else
    that of ``first_stage``. With ``first_stage`` None, the config must be complete, as the original's are, with the
    first stage's ``ckpt_path``. ``datasets`` (training, validation) replaces the ``data:`` section; items with
    ``indices`` (h, w) are taken as tokens, others are encoded batch by batch. A new run begins with the weights of
    ``start``, if that is given: the path of a prior, whose architecture, condition and first stages replace those of
    ``config``. ``allow`` names further classes that the configs of these models may name. Raises what
    `tamingfast.training.vqgan.train` raises.
    """
    config, out = dict(plain(config)), Path(out)
    settings = training_settings(config)
    check_stage(config, prior=True)
    begun = None if start is None else _started(start, first_stage, cond_stage, config, allow)
    index = Index(out / run_directory.INDEX if resume else None)
    with world(device) as among:
        frozen, condition = _first_stage(first_stage, allow), _first_stage(cond_stage, allow)
        config["data"] = _data_section(config, frozen, condition, begun, allow)
        training, validation = datasets_of(config, datasets, index)
        began = as_begun(out, resume, among)
        settings = fitted(settings, training, began)
        running = divided(settings, began, among)
        if training.condition is not None:
            config["data"] |= training.condition.get("data") or {}  # so that sampling knows the run's condition
        objects = training.kind if isinstance(training.kind, Objects) else None
        if objects is not None and config["data"].get("name") is None:  # a data set of the original
            config["data"] |= {"condition": settings_of(objects)}
        if frozen is not None:
            check_tokens(training, frozen.model)
            grid = grid_of(training, frozen.model)
            classes = None if training.classes is None else len(training.classes)
            cond_config = None if condition is None else condition.config
            rule = None if objects is None else objects.rule
            config = prior_config(frozen.config, config, grid, classes, cond_config, rule)
        described = config.get("model") or {}
        if "prior" in config and "first_stage_config" in (described.get("params") or {}):
            raise UserError(
                f"prior: got {config['prior']!r} beside a complete model, expected one of them; give --first-stage "
                "too, or change the settings below model.params"
            )
        lr = learning_rate(settings, described.get("base_learning_rate"), began.size)
        if frozen is None and begun is None and not resume:
            _warn_untrained(described)
        model = cast(Net2NetTransformer, new_model(described, settings.seed))
        for dataset in (training, validation):
            if dataset is not None:
                check_condition(model.cond_stage_key, None if condition is None else condition.model, dataset)
        grid = grid_of(training, model.first_stage_model)
        stage = PriorStage(model.to(among.device), lr, grid, settings.seed, objects, recommended(config))
        if begun is not None:
            begun.load(model)
        if frozen is not None:
            load_into(model.first_stage_model, frozen.model.state_dict(), frozen.path, optional=_NOT_NEEDED)
        if condition is not None:
            load_into(
                cast(nn.Module, model.cond_stage_model),
                condition.model.state_dict(),
                condition.path,
                optional=_NOT_NEEDED,
            )
        config |= _class_names(model, training.classes, config.get("classes"))
        accelerate(model, settings)
        fuse(stage.optimizers)
        averages = averages_of(stage, settings)
        with begin(config, out, resume, settings, training, among, began, stage, averages, index) as progress:
            held = parallel_prior(stage, running, among, averages)
            return loop.run(stage, running, (training, validation), out, among, progress, averages, held)


def _started(
    path: str | os.PathLike,
    first_stage: str | os.PathLike | None,
    cond_stage: str | os.PathLike | None,
    config: dict[str, Any],
    allow: Collection[str],
) -> Start:
    """The prior to begin with, whose ``model`` section replaces that of ``config``."""
    for name, given in (("first_stage", first_stage), ("cond_stage", cond_stage)):
        if given is not None:
            raise UserError(f"{name}: got {given} beside a prior to start from, which contains its own, expected none")
    begun = Start(path, Net2NetTransformer, allow)
    config["model"] = begun.described(config.get("model") or {})
    config.pop("prior", None)
    for name in ("classes", "sampling"):
        if begun.model.config.get(name) and not config.get(name):
            config[name] = begun.model.config[name]
    return begun


def _first_stage(path: str | os.PathLike | None, allow: Collection[str]) -> _Trained | None:
    """The first stage at ``path``; None without a path."""
    if path is None:
        return None
    model = load_model(path, device="cpu", allow=allow)
    if not isinstance(model, FirstStage):
        raise UserError(f"{path}: got a {type(model).__name__}, expected a first stage; give the run of `train vqgan`")
    return _Trained(path, model, model.config)


def _class_names(
    model: Net2NetTransformer, classes: Sequence[str] | None, given: Sequence[str] | None
) -> dict[str, Any]:
    """The entry ``classes`` of the run's config: the names of the model's classes, ``given`` or else the data's."""
    stage = model.cond_stage_model
    count = stage.n_classes if isinstance(stage, Labelator) else 0
    if given and len(given) != count:
        raise UserError(f"classes: got {len(given)} names, expected {count}, as many as the prior has classes")
    names = [str(name) for name in given or classes or ()]
    known = count and len(names) == count
    return {"classes": names} if known and sum(map(len, names)) + 8 * count < _MOST_NAMES else {}


def _warn_untrained(described: Mapping[str, Any]) -> None:
    """Log a warning when nothing gives the first stage of a new prior its weights."""
    params = described.get("params")
    if not (at(params, "ckpt_path") or at(params, "first_stage_config", "params", "ckpt_path")):
        logger.warning(
            "model.params.first_stage_config has no ckpt_path: the prior learns the codes of an untrained first stage"
        )


def _data_section(
    config: Mapping[str, Any],
    frozen: _Trained | None,
    condition: _Trained | None,
    begun: Start | None,
    allow: Collection[str],
) -> dict[str, Any]:
    """The ``data:`` section of the config, the condition or the first stage; completed by the first stage."""
    stages = [stage.config.get("data") for stage in (condition, frozen) if stage is not None]
    section: Mapping[str, Any] = config.get("data") or {}
    if not section:
        section = next(filter(None, stages), {})
        check_targets(section, "data", allow)
    if begun is not None:
        return completed_data(
            section or begun.data, trained_side(begun.model.config), begun.model.first_stage_model.n_embed
        )
    if frozen is None:
        return completed_data(section)
    return completed_data(section, trained_side(frozen.config), frozen.model.n_embed)
