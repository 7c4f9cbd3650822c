"""Configs in the original's YAML layout, and the objects that their ``{target, params}`` describe."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from tamingfast.checkpoints import compat
from tamingfast.errors import UserError, first_line, lacks_memory, nearest


def load_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file as an OmegaConf config; UserError if it is missing, unreadable or not a mapping."""
    path = Path(path)
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: got no file, expected a YAML config; give the path of an existing one") from None
    except Exception as error:
        raise UserError(
            f"{path}: got unreadable YAML ({first_line(error)}), expected a config; correct the file"
        ) from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: got no mapping, expected a config with sections such as 'model:'")
    return config


def plain(config: Any) -> Any:
    """OmegaConf containers as dicts and lists, with interpolations resolved; everything else unchanged."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def trained_side(config: Any) -> int | None:
    """Side in pixels of the square images that a run was trained on, None if its ``data`` section does not say."""
    side = at(config, "data", "crop") or at(config, "data", "size")
    return None if side is None else int(side)


def at(config: Any, *keys: str) -> Any:
    """The value at a path of keys in nested mappings, None if a key is missing."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def get_obj_from_str(target: str) -> Any:
    """The class or function of a dotted name; for the original's names (`compat.NAMES`) our counterpart."""
    try:
        return compat.resolve(target)
    except KeyError:
        names = [f"{home}.{name}" for home, members in compat.NAMES.items() for name in members]
        hint = nearest(target, names)
        raise UserError(
            f"target: got '{target}', expected a name of the original that has a counterpart here{hint}"
        ) from None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"target: got '{target}', which cannot be imported ({first_line(error)}), expected the name of a class"
        ) from error


def instantiate_from_config(config: Any, **overrides: Any) -> Any:
    """``config["target"](**config["params"])``, with ``overrides`` in place of ``params`` of the same name.

    Raises UserError if ``target`` is missing or unknown, or does not accept the ``params``.
    """
    config = plain(config)
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"config: got {config!r}, expected a mapping with a 'target' that names a class")
    target = get_obj_from_str(config["target"])
    params = {**(config.get("params") or {}), **overrides}
    try:
        inspect.signature(target).bind(**params)
    except TypeError as error:
        accepted = list(inspect.signature(target).parameters)
        unknown = next((key for key in params if key not in accepted), None)
        hint = nearest(unknown, accepted) if unknown else ""
        raise UserError(
            f"{config['target']}: got params that do not fit ({error}), expected those of its constructor{hint}"
        ) from error
    try:
        return target(**params)
    except UserError:
        raise
    except Exception as error:  # torch answers impossible sizes with exceptions of many types
        if lacks_memory(error):
            raise
        raise UserError(
            f"{config['target']}: got params that do not fit ({first_line(error)}), expected values that go together"
        ) from error


def without_checkpoints(config: Any) -> Any:
    """The config without any ``ckpt_path``: a whole model's weights come from its own file, not from its parts'."""
    config = plain(config)
    if isinstance(config, Mapping):
        return {key: without_checkpoints(value) for key, value in config.items() if key != "ckpt_path"}
    return [without_checkpoints(value) for value in config] if isinstance(config, list | tuple) else config


def check_targets(config: Any, trusted: bool) -> None:
    """Raise UserError for a ``target`` other than a network or schedule of this package: building it would run code.

    With ``trusted``, other `torch.nn.Module` classes are allowed too. Nothing is built, but the modules of allowed
    names are imported.
    """
    if isinstance(config, list | tuple):
        for value in config:
            check_targets(value, trusted)
    if not isinstance(config, Mapping):
        return
    target = config.get("target")
    if isinstance(target, str):
        found = get_obj_from_str(target) if trusted or compat.is_ours(target) else None
        if not (isinstance(found, type) and (issubclass(found, nn.Module) or found.__name__.endswith("Scheduler"))):
            raise UserError(
                f"target: got '{target}', which is not run, expected a network of tamingfast; remove it, or pass the "
                "config as a mapping if it is a torch module that you trust"
            )
    for value in config.values():
        check_targets(value, trusted)
