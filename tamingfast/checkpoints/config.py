"""Configs in the original's YAML layout, and the objects that their ``{target, params}`` describe."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from tamingfast.checkpoints.references import check_references, resolved
from tamingfast.checkpoints.targets import class_of
from tamingfast.errors import UserError, first_line, lacks_memory, nearest
from tamingfast.files import check_regular, open_regular

_MOST_BYTES = 1 << 20
_MOST_VALUES, _DEEPEST = 100_000, 64
# OmegaConf 2.4 has a limit of its own, below the number of classes in some data.
_limit = "max_yaml_expanded_nodes"
_UNLIMITED: dict[str, Any] = {_limit: None} if _limit in inspect.signature(OmegaConf.create).parameters else {}


def load_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file as an OmegaConf config, its references unresolved.

    Raises UserError if it is missing, unreadable, not a mapping, or larger or deeper than any config, and for resolvers
    such as ``${oc.env:HOME}``, which are not run.
    """
    path = Path(path)
    text = _text(path)
    try:
        if path.suffix.lower() == ".json":
            loaded = OmegaConf.create(_json(text, path), **_UNLIMITED)
        else:
            _check_document(text, path)
            loaded = OmegaConf.create(text, **_UNLIMITED)
        raw = OmegaConf.to_container(loaded, resolve=False)
    except UserError:
        raise
    except Exception as error:  # of PyYAML and of OmegaConf, which share no class
        raise UserError(
            f"{path}: got unreadable {_language(path)} ({_problem(error)}), expected a config; correct or remove "
            "the file"
        ) from error
    check_config_values(raw, path)
    check_references(raw, source=path)
    return loaded


def _language(path: Path) -> str:
    return "JSON" if path.suffix.lower() == ".json" else "YAML"


def _text(path: Path) -> str:
    expected = f"a {_language(path)} config"
    try:
        check_regular(path, expected)
        with open_regular(path) as stream:
            content = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: got no file, expected {expected}; give the path of an existing one") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: got '{first_line(error)}', expected {expected} that can be read") from error
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: got more than {_MOST_BYTES} bytes, expected {expected}, which is far smaller")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: got bytes that are not text ({error}), expected {expected} in UTF-8") from error


def _json(text: str, path: Path) -> Any:
    """The mapping in a JSON text. YAML reads some numbers of JSON, such as 1e-05, as text."""
    value = json.loads(text)
    check_config_values(value, path)
    return value


def _check_document(text: str, path: Path) -> None:
    """Raise UserError unless the document is a mapping with as few and as shallow values as a config has.

    It is read event by event, as the parser of PyYAML crashes on deep documents, and a few lines of aliases can stand
    for gigabytes, which older versions of OmegaConf make.
    """
    anchors: dict[str, int] = {}
    starts: list[Any] = []
    sizes = [0]  # of the collections that are open
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.NodeEvent) and not starts and not isinstance(event, yaml.MappingStartEvent):
            raise _no_config(path, getattr(event, "value", []))
        if isinstance(event, yaml.AliasEvent):
            sizes[-1] += anchors.get(event.anchor, _MOST_VALUES)  # one that is not closed would contain itself
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            anchors[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            starts.append(event)
            sizes.append(1)
            anchors.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = anchors[starts.pop().anchor] = sizes.pop()
            sizes[-1] += size
        if sizes[-1] > _MOST_VALUES or len(starts) > _DEEPEST:
            raise _too_much(path)
    if sizes == [0]:
        raise _no_config(path, None)


def check_config_values(config: Any, source: str | os.PathLike) -> None:
    """Raise UserError unless ``config``, read from ``source``, is a mapping with as few values as one."""
    if not isinstance(config, Mapping):
        raise _no_config(source, config)
    level: list[Any] = [config]
    count = 0
    for _ in range(_DEEPEST):
        count += len(level)
        level = [value for inside in level for value in _inside(inside)]
        if not level:
            return
        if count + len(level) > _MOST_VALUES:
            break
    raise _too_much(source)


def _too_much(source: str | os.PathLike) -> UserError:
    return UserError(f"{source}: got over {_MOST_VALUES} values or {_DEEPEST} levels of them, expected a config")


def _problem(error: Exception) -> str:
    """What a parser found, and where."""
    place = getattr(error, "problem_mark", None)
    found = getattr(error, "problem", None) or first_line(error)
    return found if place is None else f"{found}, line {place.line + 1}"


def _no_config(source: str | os.PathLike, found: Any) -> UserError:
    what = "nothing" if found is None else f"no mapping ({type(found).__name__})"
    return UserError(f"{source}: got {what}, expected a config with sections such as 'model:'")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def plain(config: Any) -> Any:
    """OmegaConf containers as dicts and lists, with references resolved; everything else unchanged.

    Raises UserError for a reference to nothing and for resolvers (see `tamingfast.checkpoints.references`).
    """
    if not OmegaConf.is_config(config):
        return config
    keys: list[str | int] = []
    while (parent := config._get_parent()) is not None:
        keys.insert(0, config._key())
        config = parent
    return resolved(OmegaConf.to_container(config, resolve=False), tuple(keys))


def trained_side(config: Any) -> int | None:
    """Side in pixels of the square images that a run was trained on, None if its ``data`` section does not say."""
    side = at(config, "data", "crop") or at(config, "data", "size")
    return None if side is None else int(side)


def at(config: Any, *keys: str) -> Any:
    """The value at a path of keys in nested mappings, None if a key is missing."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def instantiate_from_config(config: Any, **overrides: Any) -> Any:
    """``config["target"](**config["params"])``, with ``overrides`` in place of ``params`` of the same name.

    Raises UserError if ``target`` is missing, does not accept the ``params``, or names anything but a class that
    `tamingfast.checkpoints.targets.class_of` allows in a user's own config.
    """
    config = plain(config)
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"config: got {config!r}, expected a mapping with a 'target' that names a class")
    target, params = class_of(config["target"]), config.get("params") or {}
    if not isinstance(params, Mapping):
        raise UserError(f"{config['target']}: got params {params!r}, expected a mapping of names to values")
    params = {**params, **overrides}
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
