"""Training configs in the original's layout, translated into ours.

There, ``data`` is ``{target: main.DataModuleFromConfig, params}`` and ``lightning.trainer`` has the arguments of
Lightning's Trainer. What has a counterpart here is translated; what only decides where a run computes or what it shows
is dropped; anything else would change the training, and is refused by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tamingfast.checkpoints.config import at
from tamingfast.data import ANY_SIZE, SPLITS
from tamingfast.errors import UserError
from tamingfast.training.keys import check_keys, check_mapping
from tamingfast.training.settings import check_setting

logger = logging.getLogger(__name__)

#: Keys of a model in the original's layout.
MODEL_KEYS = ("base_learning_rate", "target", "params")
_DATA_MODULE = "DataModuleFromConfig"
_DATA_PARAMS = {"batch_size": "batch_size", "num_workers": "workers"}
#: Params of the data module that do not concern training.
UNUSED_PARAMS = ("test", "wrap")

#: Arguments of the Trainer, of all its versions, that decide where a run computes, what it keeps or what it shows.
_WITHOUT_EFFECT = frozenset({
    "accelerator", "amp_backend", "auto_select_gpus", "barebones", "benchmark", "checkpoint_callback",
    "default_root_dir", "detect_anomaly", "deterministic", "devices", "distributed_backend", "enable_checkpointing",
    "enable_model_summary", "enable_progress_bar", "flush_logs_every_n_steps", "gpus", "inference_mode", "ipus",
    "limit_predict_batches", "limit_test_batches", "log_gpu_memory", "log_save_interval", "logger",
    "move_metrics_to_cpu", "multiple_trainloader_mode", "num_nodes", "num_processes", "num_sanity_val_steps",
    "plugins", "prepare_data_per_node", "process_position", "profiler", "progress_bar_refresh_rate",
    "reload_dataloaders_every_epoch", "reload_dataloaders_every_n_epochs", "row_log_interval", "strategy",
    "terminate_on_nan", "tpu_cores", "track_grad_norm", "weights_save_path", "weights_summary",
})  # fmt: skip
#: Arguments that have no counterpart -> the values with which they change nothing; null changes nothing either.
_WITHOUT_COUNTERPART: dict[str, tuple[Any, ...]] = {
    "amp_level": (), "auto_lr_find": (False,), "auto_scale_batch_size": (False,), "check_val_every_n_epoch": (1,),
    "early_stop_callback": (False,), "fast_dev_run": (False,), "gradient_clip_algorithm": ("norm",),
    "limit_train_batches": (1.0,), "max_time": (), "min_epochs": (0, 1), "min_steps": (0, 1),
    "overfit_batches": (0,), "replace_sampler_ddp": (True,), "resume_from_checkpoint": (),
    "stochastic_weight_avg": (False,), "sync_batchnorm": (False,), "train_percent_check": (1.0,),
    "truncated_bptt_steps": (), "use_distributed_sampler": (True,), "val_percent_check": (1.0,),
}  # fmt: skip
#: What is in the names of callbacks, Lightning's and others', that change what is trained, or for how long.
_TRAINING_CALLBACKS = re.compile(
    "earlystop|accumulat|averag|ema$|emacallback|timer|lambda|finetun|prun|quantiz|(batchsize|learningrate|lr)finder|freez"
)
_PRECISIONS = {
    "32": "float32", "32-true": "float32", "float32": "float32",
    "bf16": "bfloat16", "bf16-mixed": "bfloat16", "bfloat16": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class _Counterpart:
    """The setting of ``training:`` that an argument of the Trainer corresponds to, and its value there."""

    setting: str
    value: Callable[[Any, Mapping[str, Any]], Any]


class _NoCounterpart(Exception):
    """The value of an argument has none; the text says which values do."""


def _count(value: Any, trainer: Mapping[str, Any]) -> Any:
    """A number of steps or epochs, -1 for no limit."""
    return None if value == -1 and value is not True else value


def _clip(value: Any, trainer: Mapping[str, Any]) -> Any:
    return None if value == 0 and value is not False else value


def _precision(value: Any, trainer: Mapping[str, Any]) -> Any:
    if str(value) not in _PRECISIONS:
        raise _NoCounterpart("32 or bf16")
    return _PRECISIONS[str(value)]


def _interval(value: Any, trainer: Mapping[str, Any]) -> Any:
    """Steps between validations: the original counts batches, or parts of an epoch."""
    batches = trainer.get("accumulate_grad_batches") or 1
    if value == 1.0 and isinstance(value, float):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not isinstance(batches, int) or value % batches:
        raise _NoCounterpart("1.0 or a number of batches that is a multiple of accumulate_grad_batches")
    return value // batches


def _validation(value: Any, trainer: Mapping[str, Any]) -> Any:
    if isinstance(value, float):
        if value == 1.0:
            return None
        raise _NoCounterpart("1.0 or a number of batches")
    return value


_FOLLOWED = {
    "max_steps": _Counterpart("steps", _count),
    "max_epochs": _Counterpart("epochs", _count),
    "accumulate_grad_batches": _Counterpart("accumulate", lambda value, trainer: value),
    "gradient_clip_val": _Counterpart("grad_clip", _clip),
    "precision": _Counterpart("precision", _precision),
    "val_check_interval": _Counterpart("validate_every", _interval),
    "limit_val_batches": _Counterpart("validation_batches", _validation),
    "log_every_n_steps": _Counterpart("log_every", lambda value, trainer: value),
}
_TRAINER_KEYS = (*_FOLLOWED, *_WITHOUT_COUNTERPART, *sorted(_WITHOUT_EFFECT), "callbacks")


def translated(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config in our layout, from one in either; its references are resolved already.

    ``overrides`` is what the command line gave, merged into ``config`` before. It wins over the file in whichever
    layout it is written. Raises UserError for what has no counterpart, and for two values of one setting.
    """
    config = dict(config)
    lightning = config.pop("lightning", None)
    found: list[tuple[tuple[str, ...], str, Any]] = []  # key in the original's layout, our setting, its value
    if lightning is not None:
        found += _of_lightning(lightning)
    data = config.get("data")
    if isinstance(data, Mapping) and "target" in data:
        if not str(data["target"]).endswith(_DATA_MODULE):
            raise UserError(
                f"data.target: got {data['target']!r}, expected main.{_DATA_MODULE}; give data.name=folder "
                "data.path=DIRECTORY to train on a directory"
            )
        if isinstance(config.get("model"), Mapping):
            config["model"] = _model(config["model"])
        params = data.get("params") or {}
        check_mapping(params, "data.params", "batch_size")
        check_keys(params, (*_DATA_PARAMS, *SPLITS, *UNUSED_PARAMS), "data.params")
        found += [
            (("data", "params", key), setting, params[key])
            for key, setting in _DATA_PARAMS.items()
            if params.get(key) is not None
        ]
        config["data"] = _data(data, params)
    if found:
        config["training"] = _training(config.get("training") or {}, found, overrides)
    return config


def _model(section: Mapping[str, Any]) -> dict[str, Any]:
    """The model without keys that the original does not read either, such as notes, which are named in a warning."""
    unread = ", ".join(f"model.{key}" for key in section if key not in MODEL_KEYS)
    if unread:
        logger.warning("%s: nothing reads this", unread)
    return {key: value for key, value in section.items() if key in MODEL_KEYS}


def _training(
    section: Any, found: Collection[tuple[tuple[str, ...], str, Any]], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``training`` section with the settings ``found`` in the original's layout."""
    check_mapping(section, "training", "steps")
    own = at(overrides, "training") or {}
    settled = dict(section)
    for keys, setting, value in found:
        check_setting(setting, value, ".".join(keys))
        newer = keys[-1] in (at(overrides, *keys[:-1]) or {})
        if setting in section and section[setting] != value and newer == (setting in own):
            raise UserError(
                f"{'.'.join(keys)}: got {value!r} beside training.{setting}={section[setting]!r}, expected one of "
                "them; leave the other out"
            )
        if setting not in section or newer:
            settled[setting] = value
    return settled


def _of_lightning(lightning: Any) -> list[tuple[tuple[str, ...], str, Any]]:
    check_mapping(lightning, "lightning", "trainer.max_steps")
    check_keys(
        lightning,
        ("trainer", "callbacks", "logger", "modelcheckpoint", "strategy", "find_unused_parameters"),
        "lightning",
    )
    trainer = {} if lightning.get("trainer") is None else lightning["trainer"]
    check_mapping(trainer, "lightning.trainer", "max_steps")
    check_keys(trainer, _TRAINER_KEYS, "lightning.trainer")
    for where, callbacks in (("callbacks", lightning), ("trainer.callbacks", trainer)):
        _check_callbacks(callbacks.get("callbacks"), f"lightning.{where}")
    found: list[tuple[tuple[str, ...], str, Any]] = []
    for key, value in trainer.items():
        where = f"lightning.trainer.{key}"
        if key in _WITHOUT_COUNTERPART and value is not None and not _among(value, _WITHOUT_COUNTERPART[key]):
            neutral = " or ".join(map(repr, (*_WITHOUT_COUNTERPART[key], None)))
            raise UserError(f"{where}: got {value!r}, which has no counterpart here, expected {neutral}; remove it")
        if key in _FOLLOWED and value is not None:
            counterpart = _FOLLOWED[key]
            try:
                ours = counterpart.value(value, trainer)
            except _NoCounterpart as valid:
                raise UserError(
                    f"{where}: got {value!r}, which has no counterpart here, expected {valid}; change it, or remove it "
                    f"and give training.{counterpart.setting}"
                ) from None
            if ours is not None:
                found.append((("lightning", "trainer", key), counterpart.setting, ours))
    return found


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether ``value`` is one of ``neutral``; Python takes 1 for True, and 1 for 1.0, a count for a fraction."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral) and not (
        type(value) is int and any(type(other) is float for other in neutral)
    )


def _check_callbacks(callbacks: Any, where: str) -> None:
    """Raise UserError for a callback that changes the training; the others show or keep something."""
    if callbacks is None:
        return
    if not isinstance(callbacks, Mapping | list):
        raise UserError(f"{where}: got {callbacks!r}, expected keys below it")
    described = callbacks.items() if isinstance(callbacks, Mapping) else enumerate(callbacks)
    for name, callback in described:
        given = callback if isinstance(callback, Mapping) else {"target": callback}
        target = str(next((given[key] for key in ("target", "class_path", "_target_") if key in given), name))
        plain_name = re.sub(r"[\W_]", "", target.rpartition(".")[2]).lower()
        if _TRAINING_CALLBACKS.search(plain_name):
            raise UserError(
                f"{where}.{name}: got {target}, which has no counterpart here, expected callbacks that change no "
                "training; remove it"
            )


def _data(section: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Our ``data`` section: the data sets of the original's ``params``, or ours of the same section in their place."""
    own = {key: value for key, value in section.items() if key not in ("target", "params")}
    sets = {split: _merged(params.get(split), own.pop(split, None)) for split in SPLITS}
    size = side_of(sets["train"])
    if own.get("name") is None:
        return {split: described for split, described in sets.items() if described} | (
            {"size": size} | own if size else own
        )
    return ({"size": size} if size and own["name"] in ANY_SIZE else {}) | own


def side_of(train: Any) -> Any:
    """The size of images in the params of a data set of the original, None if they name none."""
    params = at(train, "params")
    names = ("crop_size", "size", "target_image_size")
    return next((params[name] for name in names if at(params, name)), None) or at(params, "config", "size")


def check_original_data(data: Mapping[str, Any]) -> None:
    """Raise UserError for keys of ``data`` that the data sets of the original's layout in it do not read."""
    for split in SPLITS:
        described = data.get(split)
        if described:
            check_keys(described, ("target", "params"), f"data.{split}")
    for key, value in data.items():
        if key not in (*SPLITS, "size", "name", "condition"):  # the last one is for sampling
            raise UserError(
                f"data.{key}: got {value!r}, which data sets in the original's layout do not read, expected settings "
                "below data.params.train and data.params.validation; give data.name=folder too to replace these data"
            )
    size = side_of(data.get("train"))
    if size and data.get("size") not in (None, size):
        raise UserError(f"data.size: got {data['size']!r}, expected {size!r} as in data.train.params; change it there")


def _merged(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return dict(first) | {key: _merged(first.get(key), value) for key, value in second.items()}
    return first if second is None else second
