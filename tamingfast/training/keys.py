"""Which keys a config may have: a key that nothing reads is an error that names the nearest valid one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tamingfast.checkpoints.config import get_obj_from_str
from tamingfast.errors import UserError, nearest


def check_keys(section: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise UserError if ``section``, the part of a config under the key ``where``, has keys that are not ``known``."""
    known = list(known)
    check_mapping(section, where, known[0])
    for key in section:
        if key not in known:
            name = f"{where}.{key}" if where else key
            hint = nearest(str(key), known)
            raise UserError(f"{name}: got a key that nothing reads, expected one of {', '.join(known)}{hint}")


def check_mapping(section: object, where: str, key: str) -> None:
    """Raise UserError unless ``section`` is a mapping; the message gives ``key`` as an example."""
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: got {section!r}, expected keys below it; write for example {where}.{key}=...")


def check_params(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for ``params`` that ``target`` does not take, here and in each {target, params} inside."""
    params = config.get("params") or {}
    names = parameters_of(get_obj_from_str(config["target"]))
    if names is not None:
        check_keys(params, names, f"{where}.params")
    for key, value in params.items():
        inside = f"{where}.params.{key}"
        if key == "cond_stage_config" and params.get("unconditional"):
            continue  # never built: the original's own config has a placeholder here
        if isinstance(value, Mapping) and "target" in value:
            check_keys(value, ("target", "params"), inside)
            check_params(value, inside)
        elif key == "ddconfig" and isinstance(value, Mapping):
            check_keys(value, _network_keys(), inside)


def _network_keys() -> list[str]:
    """Keys of ``ddconfig``, which the encoder and the decoder share."""
    home = "taming.modules.diffusionmodules.model"
    return [name for part in ("Encoder", "Decoder") for name in parameters_of(get_obj_from_str(f"{home}.{part}")) or ()]


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
