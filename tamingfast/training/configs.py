"""Training configs: presets, YAML files (the original's too), overrides, and the config of a resumed run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import get_obj_from_str, load_yaml, plain
from tamingfast.data import SPLITS
from tamingfast.errors import UserError, first_line, nearest
from tamingfast.training.keys import check_keys, check_mapping, check_params, parameters_of
from tamingfast.training.settings import FREE_TO_CHANGE, Training, training_settings

logger = logging.getLogger(__name__)

PRESETS = Path(__file__).parents[1] / "configs"

#: Keys of sections that are not the parameters of a class, and names from the original's layout.
_SECTIONS = ("model", "data", "training", "prior")
_MODEL_KEYS = ("base_learning_rate", "target", "params")
_PRIOR_KEYS = ("condition", "classes", "ordering", "scales")
_DATA_MODULE = "DataModuleFromConfig"


def presets() -> list[str]:
    """Names of the packaged presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(name_or_path: str | os.PathLike, overrides: Sequence[str] = ()) -> DictConfig:
    """A training config: a packaged preset by name or a YAML file by path, with ``key=value`` overrides.

    Files of the original are accepted as they are: ``data.target: main.DataModuleFromConfig`` and ``lightning:`` are
    translated into ``data`` and ``training``. Raises UserError for a missing file, an override that is not
    ``key=value``, and a key that nothing reads, with the nearest valid one.
    """
    config = _translated(load_yaml(_locate(name_or_path)))
    for override in overrides:
        config = _overridden(config, override)
    check_config(plain(config))
    return config


def _overridden(config: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override: got '{override}', expected key=value, such as training.steps=1000")
    try:
        return cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist([override])))
    except Exception as error:
        raise UserError(
            f"override: got '{override}', which does not fit the config ({first_line(error)}), expected key=value for "
            "a key of its sections"
        ) from error


def resumed_config(
    out: str | os.PathLike, name: str | os.PathLike | None = None, overrides: Sequence[str] = ()
) -> DictConfig:
    """The config to continue the run in ``out`` with: the one it began with, changed by the ``overrides``.

    If ``name`` is given, that config is loaded instead (see `load_config`), so that a setting in it that the run cannot
    change is noticed; for the settings in `FREE_TO_CHANGE` the run's own values are kept, with a warning. Raises
    UserError when there is no run, and where `load_config` does.
    """
    own = load_config(run_directory.config_file(out), overrides)
    if name is None:
        if "prior" in own:
            raise UserError("prior: got settings for a run that has begun, expected none; leave them out")
        return own
    config = load_config(name, overrides)
    before, named = (asdict(training_settings(each)) for each in (own, config))
    kept = {key: before[key] for key in before if key in FREE_TO_CHANGE and before[key] != named[key]}
    if kept:
        theirs, others = (", ".join(f"training.{key}={of[key]}" for key in kept) for of in (before, named))
        logger.warning("%s keeps its %s instead of %s from %s: give key=value to change it", out, theirs, others, name)
        config["training"] = {**(config.get("training") or {}), **kept}
    return config


def _locate(name_or_path: str | os.PathLike) -> Path:
    path = Path(name_or_path)
    preset = PRESETS / f"{path}.yaml"
    if path.is_file() or (path.suffix in (".yaml", ".yml") and not (PRESETS / path.name).is_file()):
        return path
    if path.parent == Path(".") and preset.is_file():
        return preset
    if path.parent == Path(".") and (PRESETS / path.name).is_file():
        return PRESETS / path.name
    raise UserError(
        f"config: got '{name_or_path}', expected a YAML file or a preset, one of {', '.join(presets())}"
        f"{nearest(str(name_or_path), presets())}"
    )


def check_config(config: Mapping[str, Any]) -> None:
    """Raise UserError for the first key that nothing reads; `tamingfast.data.build` checks those below ``data``."""
    check_keys(config, _SECTIONS, "")
    model = config.get("model") or {}
    check_keys(model, _MODEL_KEYS, "model")
    check_keys(config.get("prior") or {}, _PRIOR_KEYS, "prior")
    check_keys(config.get("training") or {}, [field.name for field in fields(Training)], "training")
    check_mapping(config.get("data") or {}, "data", "name")
    if "target" in model:
        check_params(model, "model")


def check_stage(config: Mapping[str, Any], prior: bool) -> None:
    """Raise UserError when the config is one for the other stage."""
    target = (config.get("model") or {}).get("target")
    is_prior = "prior" in config or (target and "transformer_config" in (parameters_of(get_obj_from_str(target)) or ()))
    if is_prior and not prior:
        raise UserError("config: got one for a prior, expected one for a first stage; use `tamingfast train prior`")
    if prior and target and not is_prior:
        raise UserError("config: got one for a first stage, expected one for a prior; use `tamingfast train vqgan`")


def _translated(loaded: DictConfig) -> DictConfig:
    """A config of the original in our layout; any other unchanged, so that overrides reach its interpolations."""
    lightning = loaded.pop("lightning", None)
    if not str((loaded.get("data") or {}).get("target", "")).endswith(_DATA_MODULE):
        return loaded
    config, lightning = plain(loaded), plain(lightning) or {}
    data = config["data"]
    config["model"] = {key: value for key, value in config.get("model", {}).items() if key in _MODEL_KEYS}
    params, trainer = data.get("params") or {}, lightning.get("trainer") or {}
    training = {
        "batch_size": params.get("batch_size"),
        "workers": params.get("num_workers"),
        "steps": trainer.get("max_steps"),
        "accumulate": trainer.get("accumulate_grad_batches"),
        "grad_clip": trainer.get("gradient_clip_val") or None,
    }
    training = {key: value for key, value in training.items() if value is not None}
    config["training"] = training | dict(config.get("training") or {})
    config["data"] = {key: params[key] for key in SPLITS if params.get(key)}
    train = (params.get("train") or {}).get("params") or {}
    size = train.get("size") or (train.get("config") or {}).get("size") or train.get("crop_size")
    if size:
        config["data"]["size"] = size
    return OmegaConf.create(config)
