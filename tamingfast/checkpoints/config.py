"""Configs: the original's YAML layout, and objects made from ``{target, params}``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tamingfast.checkpoints import compat
from tamingfast.errors import UserError, first_line, lacks_memory, nearest


def load_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file as an OmegaConf config; UserError when it is missing, unreadable or not a mapping."""
    from omegaconf import DictConfig, OmegaConf

    path = Path(path)
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"no config file at {path}; give the path of an existing YAML file") from None
    except Exception as error:
        raise UserError(f"{path} is not readable YAML ({first_line(error)}); correct the file") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} holds no mapping; expected the sections of a config such as 'model:'")
    return config


def plain(config: Any) -> Any:
    """OmegaConf containers as plain dicts and lists (interpolations resolved); everything else unchanged."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def trained_side(config: Any) -> int | None:
    """Side in pixels of the squares that a run was trained on, where the ``data`` section of its config says so."""
    side = at(config, "data", "crop") or at(config, "data", "size")
    return None if side is None else int(side)


def at(config: Any, *keys: str) -> Any:
    """What stands in a config below these keys, one after the other; None where one is missing."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def get_obj_from_str(target: str) -> Any:
    """The class or function that a dotted name means; the original's names give our classes (`compat.NAMES`)."""
    try:
        return compat.resolve(target)
    except KeyError:
        names = [f"{home}.{name}" for home, members in compat.NAMES.items() for name in members]
        hint = nearest(target, names)
        raise UserError(f"'{target}' of the original has no counterpart here{hint}") from None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the config names '{target}', which cannot be imported ({first_line(error)})") from error


def instantiate_from_config(config: Any, **overrides: Any) -> Any:
    """Build ``config["target"](**config["params"])``; keyword ``overrides`` win over ``params``.

    Raises UserError when ``target`` is missing or unknown, and when it does not take the ``params``.
    """
    config = plain(config)
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"expected a config with a 'target' key naming a class, got {config!r}")
    target = get_obj_from_str(config["target"])
    params = {**(config.get("params") or {}), **overrides}
    try:
        inspect.signature(target).bind(**params)
    except TypeError as error:
        accepted = list(inspect.signature(target).parameters)
        unknown = next((key for key in params if key not in accepted), None)
        hint = nearest(unknown, accepted) if unknown else ""
        raise UserError(f"the params of '{config['target']}' do not fit: {error}{hint}") from error
    try:
        return target(**params)
    except UserError:
        raise
    except Exception as error:  # what a network makes of numbers that it was not made for is of any kind
        if lacks_memory(error):
            raise
        raise UserError(f"the params of '{config['target']}' do not fit: {first_line(error)}") from error
