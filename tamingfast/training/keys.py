"""Which keys a config may have: a key that nothing reads is an error that names the nearest valid one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tamingfast.checkpoints.targets import class_of
from tamingfast.checkpoints.values import check_types
from tamingfast.errors import UnknownKey, UserError
from tamingfast.models.prior import FIRST_STAGE, UNCONDITIONAL
from tamingfast.training.prior_config import GPT, MODEL

#: Targets of a prior that presets leave out: `prior_config` adds them.
DEFAULT_TARGETS = {"model": MODEL, "transformer_config": GPT}
_PATHS = (
    "path", "validation_path", "ckpt_path", "remap", "training_images_list_file", "test_images_list_file",
)  # fmt: skip


def check_keys(section: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise UserError if ``section``, the part of a config under the key ``where``, has keys that are not ``known``."""
    known = list(known)
    check_mapping(section, where, known[0])
    for key in section:
        if key not in known:
            name, valid = _below(where, str(key)), [_below(where, each) for each in known]
            raise UnknownKey(name, f"{name}: got a key that nothing reads, expected one of {', '.join(known)}", valid)


def _below(where: str, key: str) -> str:
    """The whole key of ``key`` in the section ``where``."""
    return f"{where}.{key}" if where else key


def check_mapping(section: object, where: str, key: str) -> None:
    """Raise UserError unless ``section`` is a mapping; the message gives ``key`` as an example."""
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: got {section!r}, expected keys below it; write for example {where}.{key}=...")


def is_path(key: str) -> bool:
    """Whether a dotted key is that of a path: what looks like a number there is one, too."""
    return key.strip().rpartition(".")[2] in _PATHS


def check_paths(value: Any, where: str = "") -> None:
    """Make text of numbers in place of paths, in nested mappings; UserError for what can be neither."""
    for key in value if isinstance(value, dict) else ():
        name = f"{where}.{key}" if where else str(key)
        if not is_path(str(key)):
            check_paths(value[key], name)
        elif isinstance(value[key], int | float) and not isinstance(value[key], bool):
            value[key] = str(value[key])
        elif not isinstance(value[key], str | None):
            raise UserError(f"{name}: got {value[key]!r}, expected a path")


def check_params(config: Mapping[str, Any], where: str, default: str | None = None) -> None:
    """Raise UserError for ``params`` that ``target`` does not take, here and in each {target, params} inside.

    ``default`` is the target of a config without one.
    """
    params = config.get("params") or {}
    check_mapping(params, f"{where}.params", "lossconfig")
    network = _class(config, where, default)
    names = parameters_of(network)
    if names is not None:
        check_keys(params, names, f"{where}.params")
    for declared in network.__mro__:
        if declared.__module__.startswith("tamingfast."):
            check_types(params, declared, f"{where}.params")
    for key, value in params.items():
        inside = f"{where}.params.{key}"
        if key == "cond_stage_config" and params.get("unconditional"):
            continue  # never built: the original's own config has a placeholder here
        if isinstance(value, Mapping) and ("target" in value or key in DEFAULT_TARGETS):
            check_keys(value, ("target", "params"), inside)
            check_params(value, inside, DEFAULT_TARGETS.get(key))
        elif key != "ddconfig" and key.endswith("config") and isinstance(value, Mapping):
            raise UserError(f"{inside}: got {dict(value)!r}, expected a 'target' that names a class, and its params")
        elif key == "cond_stage_config" and isinstance(value, str) and value not in (FIRST_STAGE, UNCONDITIONAL):
            raise UserError(f"{inside}: got {value!r}, expected {FIRST_STAGE}, {UNCONDITIONAL}, or keys below it")
        elif key == "ddconfig" and isinstance(value, Mapping):
            check_keys(value, [name for coder in _coders() for name in parameters_of(coder) or ()], inside)
            for coder in _coders():
                check_types(value, coder, inside)


def keys_of_params(config: object, where: str, default: str | None = None) -> Iterator[str]:
    """The whole keys that ``config``, with a target and params, can have; none of a part that cannot be understood."""
    if not isinstance(config, Mapping):
        return
    with contextlib.suppress(UserError):
        yield from (f"{where}.params.{name}" for name in parameters_of(_class(config, where, default)) or ())
    params = config.get("params")
    for key, value in params.items() if isinstance(params, Mapping) else ():
        inside = f"{where}.params.{key}"
        if key == "ddconfig":
            yield from (f"{inside}.{name}" for coder in _coders() for name in parameters_of(coder) or ())
        else:
            yield from keys_of_params(value, inside, DEFAULT_TARGETS.get(str(key)))


def _class(config: Mapping[str, Any], where: str, default: str | None) -> type:
    return class_of(config.get("target", default), f"{where}.target")


def _coders() -> list[Callable[..., Any]]:
    """The classes that read ``ddconfig``, and what reads the settings that both hand on."""
    from tamingfast.models.autoencoder import Shape  # imports torch, which the help does without

    return [*(class_of(f"taming.modules.diffusionmodules.model.{part}") for part in ("Encoder", "Decoder")), Shape.of]


def parameters_of(target: Callable[..., Any]) -> list[str] | None:
    """Names of the keyword parameters of a class or function; None when it takes ``*args`` or ``**kwargs`` alone."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    passes_on = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if passes_on and inspect.isclass(target):
        # VQSegmentationModel(n_labels, *args, **kwargs) hands the rest to its base.
        for base in target.__bases__:
            names += [] if base is object else parameters_of(base) or []
    return names or None
