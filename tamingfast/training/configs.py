"""Training configs: presets, YAML files (the original's too), overrides, and the config of a resumed run."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from tamingfast import data
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import at, load_yaml, plain
from tamingfast.checkpoints.references import check_references
from tamingfast.checkpoints.targets import check_targets, class_of, descriptions
from tamingfast.checkpoints.values import is_number
from tamingfast.errors import UnknownKey, UserError, brief, first_line, nearest
from tamingfast.sampling.settings import RECOMMENDED, recommended
from tamingfast.training.keys import (
    DEFAULT_TARGETS,
    check_keys,
    check_mapping,
    check_params,
    check_paths,
    is_path,
    keys_of_params,
    parameters_of,
)
from tamingfast.training.original_layout import MODEL_KEYS, UNUSED_PARAMS, check_original_data, translated
from tamingfast.training.prior_config import MODEL
from tamingfast.training.settings import FREE_TO_CHANGE, Training, training_settings

logger = logging.getLogger(__name__)

PRESETS = Path(__file__).parents[1] / "configs"

#: Keys of sections that are not the parameters of a class.
_SECTIONS = ("model", "data", "training", "prior", "classes", "sampling")
_PRIOR_KEYS = ("condition", "classes", "ordering", "scales", "class_dropout")


def presets() -> list[str]:
    """Names of the packaged presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(
    name_or_path: str | os.PathLike, overrides: Sequence[str] = (), *, allow: Collection[str] | None = None
) -> DictConfig:
    """A training config: a packaged preset by name or a YAML file by path, with ``key=value`` overrides.

    Files of the original are accepted as they are: ``data.target: main.DataModuleFromConfig`` and ``lightning:`` are
    translated into ``data`` and ``training``, in the file and in overrides alike. References, ``${section.key}``, are
    resolved last. With ``allow`` None the config is the user's own, and may name the user's own classes; else only
    ours and those in ``allow`` (see `tamingfast.checkpoints.targets.class_of`).

    Raises UserError for a missing file, an override that is not ``key=value``, a key that nothing reads, with the
    nearest valid one, a ``target`` that may not be built, and a resolver such as ``${oc.env:HOME}``.
    """
    config = load_yaml(_locate(name_or_path))
    given = OmegaConf.create()
    try:
        for override in overrides:
            change = _parsed(override)
            config, given = (_merged(each, change, override) for each in (config, given))
        return _settled(plain(config), cast(dict[str, Any], OmegaConf.to_container(given, resolve=False)), allow)
    except UnknownKey as error:
        raise error.among(valid_keys(cast(dict[str, Any], OmegaConf.to_container(config, resolve=False)))) from None


def _settled(settled: dict[str, Any], given: Mapping[str, Any], allow: Collection[str] | None) -> DictConfig:
    """The checked config in our layout."""
    if at(settled, "data", "name") is None:  # these are not built, but who runs a config with them means harm
        unused = {key: at(settled, "data", "params", key) for key in UNUSED_PARAMS}
        check_targets({"params": unused}, "data", allow)
    settled = translated(settled, given)
    check_paths(settled)
    for section in ("model", "data"):
        check_targets(settled.get(section), section, allow)
    check_config(settled)
    return OmegaConf.create(settled)


def valid_keys(config: Mapping[str, Any]) -> list[str]:
    """The whole keys that a config with these classes and this data set can have."""
    model, sections = config.get("model"), (
        ("model", ("base_learning_rate",)),
        ("data", data.keys(at(config, "data", "name"))),
        ("training", [field.name for field in fields(Training)]),
        ("prior", _PRIOR_KEYS),
        ("sampling", RECOMMENDED),
    )  # fmt: skip
    found = [f"{section}.{key}" for section, keys in sections for key in keys]
    return [*found, *keys_of_params(model, "model", DEFAULT_TARGETS["model"])]


def _parsed(override: str) -> DictConfig:
    """What an override says, as a config."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override: got '{override}', expected key=value, such as training.steps=1000")
    if not text.strip():
        raise UserError(f"override: got '{override}' without a value, expected key=value; write {key}=null for none")
    try:
        change = OmegaConf.from_dotlist([override])
        if is_path(key) and not OmegaConf.is_config(OmegaConf.select(change, key)) and text != "null":
            OmegaConf.update(change, key, text)  # a number or a date, to YAML
        raw = OmegaConf.to_container(change, resolve=False)
    except Exception as error:  # of PyYAML and of OmegaConf, which share no class
        raise _unfit(override, error) from error
    check_references(raw)
    if isinstance(raw, dict) and isinstance(raw.get("model"), dict):
        check_keys(raw["model"], MODEL_KEYS, "model")
    return change


def _merged(config: DictConfig, change: DictConfig, override: str) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(config, change))
    except Exception as error:
        raise _unfit(override, error) from error


def _unfit(override: str, error: Exception) -> UserError:
    return UserError(
        f"override: got '{override}', which does not fit the config ({first_line(error)}), expected key=value for a "
        "key of its sections"
    )


def resumed_config(
    out: str | os.PathLike,
    name: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    *,
    allow: Collection[str] = (),
) -> DictConfig:
    """The config to continue the run in ``out`` with: the one it began with, changed by the ``overrides``.

    If ``name`` is given, that config is loaded instead (see `load_config`), so that a setting in it that the run cannot
    change is noticed; for the settings in `FREE_TO_CHANGE` the run's own values are kept, with a warning. The run's
    config may name our classes only, and those that ``allow`` or the config ``name`` names again. Raises UserError when
    there is no run, and where `load_config` does.
    """
    path = run_directory.config_file(out)
    if name is None:
        own = load_config(path, overrides, allow=allow)
        if "prior" in own:
            raise UserError("prior: got settings for a run that has begun, expected none; leave them out")
        return own
    config = load_config(name, overrides)
    again = {str(described["target"]) for _, described in descriptions(plain(config), "config")}
    own = load_config(path, overrides, allow=again.union(allow))
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
    """Raise UserError for the first key that nothing reads."""
    check_keys(config, _SECTIONS, "")
    sections = {name: {} if config.get(name) is None else config[name] for name in _SECTIONS}
    model, section = sections["model"], sections["data"]
    check_keys(model, MODEL_KEYS, "model")
    check_keys(sections["prior"], _PRIOR_KEYS, "prior")
    check_keys(sections["training"], [field.name for field in fields(Training)], "training")
    check_mapping(section, "data", "name")
    if section.get("name") is not None:
        data.check_name(section["name"])
        data.check_keys(section)
    elif section.get("train") is not None:
        check_original_data(section)
    rate = model.get("base_learning_rate")
    if rate is not None and not (is_number(rate) and rate > 0):
        raise UserError(f"model.base_learning_rate: got {rate!r}, expected a number above 0")
    if not isinstance(sections["classes"] or [], list):
        raise UserError(f"classes: got {brief(sections['classes'])}, expected a list of the names of classes")
    check_keys(sections["sampling"], RECOMMENDED, "sampling")
    recommended(config)
    classes = sections["prior"].get("classes")
    if classes is not None and not (type(classes) is int and classes > 0):
        raise UserError(f"prior.classes: got {classes!r}, expected an integer of at least 1, or null")
    dropout = sections["prior"].get("class_dropout", 0)
    if not (is_number(dropout) and 0 <= dropout <= 1):
        raise UserError(f"prior.class_dropout: got {dropout!r}, expected a probability from 0 to 1")
    if model:
        check_params(model, "model", DEFAULT_TARGETS["model"])


def check_stage(config: Mapping[str, Any], prior: bool) -> None:
    """Raise UserError when the config is one for the other stage, or for what is no stage at all."""
    recommended(config)
    target = (config.get("model") or {}).get("target")
    network = class_of(target, "model.target") if target else None
    is_prior = "prior" in config or (network and "transformer_config" in (parameters_of(network) or ()))
    if is_prior and not prior:
        raise UserError("config: got one for a prior, expected one for a first stage; use `tamingfast train prior`")
    if prior and target and not is_prior:
        raise UserError("config: got one for a first stage, expected one for a prior; use `tamingfast train vqgan`")
    if config.get("classes") and not prior:
        raise UserError("classes: got names for a first stage, expected none, as only priors have classes")
    if config.get("sampling") and not prior:
        raise UserError("sampling: got settings for a first stage, expected none, as only priors are sampled from")
    needed = ("token_logits", "encode_to_z") if prior else ("encode", "decode", "loss_of")
    if network and not all(hasattr(network, name) for name in needed):
        raise UserError(
            f"model.target: got '{target}', expected a {'prior' if prior else 'first stage'}, such as "
            f"{MODEL if prior else 'taming.models.vqgan.VQModel'}"
        )
