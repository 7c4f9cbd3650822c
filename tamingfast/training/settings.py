"""Training configs: presets and YAML files in the original's layout, overrides, and which keys are valid."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import get_obj_from_str, instantiate_from_config, load_yaml, plain
from tamingfast.errors import UserError, nearest

logger = logging.getLogger(__name__)

PRESETS = Path(__file__).parents[1] / "configs"
PRECISIONS = ("float32", "bfloat16")

#: Keys of each section that is not described by a class: the top level, and what the original's layout adds.
_SECTIONS = ("model", "data", "training", "prior")
_MODEL_KEYS = ("base_learning_rate", "target", "params")
_PRIOR_KEYS = ("condition", "classes", "ordering", "scales")
_DATA_MODULE = "DataModuleFromConfig"
_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Training:
    """The ``training:`` section of a config. Counts are optimizer steps unless they say otherwise.

    ``steps`` and ``seconds`` (of training proper, without validation and checkpoints) end the run, whichever comes
    first; without either it goes on until it is stopped. ``validate_every`` None validates after each epoch;
    ``image_every`` None writes no images.
    ``learning_rate`` None follows the paper: accumulate * devices * batch_size * model.base_learning_rate. The paper
    keeps it constant; ``warmup_steps`` raises it linearly first, ``decay_steps`` lowers it to zero along a cosine.
    ``batch_size`` is images per device and forward pass. Two settings leave the original's path for short runs:
    ``shared_forward`` (see `vqgan.VQGANStage`) and ``codebook_from_data`` (see `vqgan.start_codebook`).
    """

    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 12
    accumulate: int = 1
    seed: int = 0
    precision: str = "float32"
    learning_rate: float | None = None
    warmup_steps: int = 0
    decay_steps: int | None = None
    grad_clip: float | None = None
    shared_forward: bool = False
    codebook_from_data: bool = False
    log_every: int = 10
    validate_every: int | None = None
    validation_batches: int | None = 32
    image_every: int | None = None
    checkpoint_every: int = 1000
    workers: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"training.precision is '{self.precision}', expected one of {', '.join(PRECISIONS)}")
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and "None" in kind:
                continue
            if "bool" in kind:
                if not isinstance(value, bool):
                    raise UserError(f"training.{field.name} is {value!r}, expected true or false")
            elif "int" in kind or "float" in kind:
                _check_number(field.name, value, whole="int" in kind)


#: What may differ between the run that began and the one that continues it: none of these changes a single step.
FREE_TO_CHANGE = frozenset({
    "steps", "seconds", "workers",
    "log_every", "validate_every", "validation_batches", "image_every", "checkpoint_every",
})  # fmt: skip


def _check_number(name: str, value: Any, whole: bool) -> None:
    smallest = 0 if name in ("seed", "workers", "warmup_steps") else 1
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise UserError(f"training.{name} is {value!r}, expected a {'whole ' if whole else ''}number")
    if (whole and value < smallest) or (not whole and value <= 0):
        raise UserError(f"training.{name} is {value}, expected {f'at least {smallest}' if whole else 'more than 0'}")


def training_settings(config: Mapping[str, Any]) -> Training:
    """The ``training:`` section as `Training`; UserError for unknown keys and values of the wrong kind."""
    section = plain(config.get("training")) or {}
    _check_keys(section, [field.name for field in fields(Training)], "training")
    return Training(**section)


def presets() -> list[str]:
    """Names of the packaged presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(name_or_path: str | os.PathLike, overrides: Sequence[str] = ()) -> Any:
    """A training config: a packaged preset by name or a YAML file by path, with ``key=value`` overrides.

    Files of the original are accepted as they are: ``data.target: main.DataModuleFromConfig`` and ``lightning:`` are
    translated into ``data`` and ``training``. Returns an OmegaConf mapping. Raises UserError for a missing file, an
    override that is not ``key=value``, and a key that nobody reads, with the nearest valid one.
    """
    from omegaconf import OmegaConf

    config = _translated(load_yaml(_locate(name_or_path)))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"the override '{override}' is not of the form key=value, e.g. training.steps=1000")
        try:
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        except Exception as error:
            raise UserError(f"the override '{override}' cannot be applied ({str(error).splitlines()[0]})") from error
    check_config(plain(config))
    return config


def resumed_config(out: str | os.PathLike, name: str | os.PathLike | None = None, overrides: Sequence[str] = ()) -> Any:
    """The config to continue the run in ``out`` with: the one it began with, but for the ``overrides``.

    Where a config is named (see `load_config`) it is taken, so that a setting of it that the run cannot change is
    found, but those of `FREE_TO_CHANGE` stay as they are in the run, which is logged. Raises UserError when there is no
    run, and as `load_config`.
    """
    own = load_config(run_directory.config_file(out), overrides)
    if name is None:
        if "prior" in own:
            raise UserError("settings of prior.* are for a new run, which this one no longer is; leave them out")
        return own
    config = load_config(name, overrides)
    before, named = (asdict(training_settings(each)) for each in (own, config))
    kept = {key: before[key] for key in before if key in FREE_TO_CHANGE and before[key] != named[key]}
    if kept:
        theirs, others = (", ".join(f"training.{key}={of[key]}" for key in kept) for of in (before, named))
        logger.warning("%s goes on with its %s, not %s of %s: give key=value to change it", out, theirs, others, name)
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
        f"'{name_or_path}' is neither a YAML file nor a preset{nearest(str(name_or_path), presets())} "
        f"(presets: {', '.join(presets())})"
    )


def check_config(config: Mapping[str, Any]) -> None:
    """UserError for the first key that nothing reads. Keys under ``data`` are the dataset's business, checked there."""
    _check_keys(config, _SECTIONS, "")
    model = config.get("model") or {}
    _check_keys(model, _MODEL_KEYS, "model")
    _check_keys(config.get("prior") or {}, _PRIOR_KEYS, "prior")
    _check_keys(config.get("training") or {}, [field.name for field in fields(Training)], "training")
    _check_mapping(config.get("data") or {}, "data", "name")
    if "target" in model:
        _check_params(model, "model")


def _check_params(config: Mapping[str, Any], where: str) -> None:
    """Compare ``params`` with the signature of ``target``, and so on for each {target, params} inside."""
    params = config.get("params") or {}
    target = get_obj_from_str(config["target"])
    _check_keys(params, _parameters(target), f"{where}.params")
    for key, value in params.items():
        if key == "cond_stage_config" and params.get("unconditional"):
            continue  # never built, and the original's own config has a placeholder here
        if isinstance(value, Mapping) and "target" in value:
            _check_keys(value, ("target", "params"), f"{where}.params.{key}")
            _check_params(value, f"{where}.params.{key}")
        elif key == "ddconfig" and isinstance(value, Mapping):
            encoder = get_obj_from_str("taming.modules.diffusionmodules.model.Encoder")
            decoder = get_obj_from_str("taming.modules.diffusionmodules.model.Decoder")
            known = [*(_parameters(encoder) or ()), *(_parameters(decoder) or ())]
            _check_keys(value, known or None, f"{where}.params.ddconfig")


def _parameters(target: Any) -> list[str] | None:
    """Names of the keyword parameters of a class; ``**anything`` adds no name. None when it takes ``*args`` only."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(target)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values()) and inspect.isclass(
        target
    ):
        # VQSegmentationModel(n_labels, *args, **kwargs) hands the rest to its base.
        for base in target.__bases__:
            if base is not object:
                names += _parameters(base) or []
    return names or None


def _check_keys(section: Mapping[str, Any], known: Iterable[str] | None, where: str) -> None:
    if known is None:
        return
    known = list(known)
    _check_mapping(section, where, known[0])
    for key in section:
        if key not in known:
            prefix = f"{where}." if where else ""
            hint = nearest(str(key), known) or f"; valid keys are {', '.join(known)}"
            raise UserError(f"unknown key '{prefix}{key}' in the config{hint}")


def _check_mapping(section: Any, where: str, key: str) -> None:
    if not isinstance(section, Mapping):
        raise UserError(f"{where} is {section!r}, but keys below it are expected; write for example {where}.{key}=...")


def _translated(loaded: Any) -> Any:
    """A file of the original in our layout; anything else unchanged, so that overrides reach what refers to them."""
    from omegaconf import OmegaConf

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
    config["data"] = {key: params[key] for key in _SPLITS if params.get(key)}
    train = (params.get("train") or {}).get("params") or {}
    size = train.get("size") or (train.get("config") or {}).get("size") or train.get("crop_size")
    if size:
        config["data"]["size"] = size
    return OmegaConf.create(config)


def check_stage(config: Mapping[str, Any], prior: bool) -> None:
    """UserError when the config's model belongs to the other stage's training."""
    target = (config.get("model") or {}).get("target")
    is_prior = "prior" in config or (target and "transformer_config" in (_parameters(get_obj_from_str(target)) or ()))
    if is_prior and not prior:
        raise UserError("the config describes a prior; train it with `tamingfast train prior`, or give one of a VQGAN")
    if prior and target and not is_prior:
        raise UserError("the config describes a first stage; train it with `tamingfast train vqgan`, or give a prior's")


def build_datasets(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(training, validation) datasets of a config's ``data:`` section; validation may be None.

    Beside what `tamingfast.data.build` takes there are ``name: tokens`` with ``path`` and ``validation_path``, and
    the original's {target, params} under ``train`` and ``validation``, which give way to a ``name``.
    """
    from tamingfast import data

    section = dict(plain(config.get("data")) or {})
    original = {key: section.pop(key) for key in _SPLITS if key in section}
    if section.get("name") == "tokens":
        return _token_datasets(section)
    if "name" in section:
        return data.build(section)
    if "train" not in original:
        raise UserError("the config names no data set; give data.name=photos, or data.name=folder data.path=DIRECTORY")
    try:
        train, validation = (original.get(key) and instantiate_from_config(original[key]) for key in _SPLITS)
    except UserError as error:
        problem = str(error).partition(";")[0]
        raise UserError(f"{problem}; give data.name=folder data.path=DIRECTORY to train on a directory") from error
    return train, validation


def _token_datasets(section: Mapping[str, Any]) -> tuple[Any, Any]:
    from tamingfast.data.conditions import SETTINGS
    from tamingfast.data.tokens import TokenDataset

    # The last ones, which a run keeps from the file, say what its conditions are.
    _check_keys(section, ("name", "path", "validation_path", "size", "seed", "kind", *SETTINGS), "data")
    if not section.get("path"):
        raise UserError("data.name=tokens needs data.path=FILE, a token file that `tamingfast encode` wrote")
    validation = TokenDataset(section["validation_path"]) if section.get("validation_path") else None
    return TokenDataset(section["path"]), validation
