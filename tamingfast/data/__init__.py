"""Datasets by name and their batches: ``build`` makes a pair of datasets, ``loader`` walks an epoch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import Dataset

from tamingfast.data.crops import cut
from tamingfast.data.loading import Loader, loader
from tamingfast.errors import UserError, nearest

__all__ = ["Loader", "build", "loader"]

_MODULES = {"cifar10": "cifar10", "conditions": "conditioned", "folder": "folders", "photos": "photos"}


def build(config: Mapping[str, Any]) -> tuple[Dataset, Dataset]:
    """The (train, validation) datasets that ``config`` describes.

    ``config["name"]`` is ``photos``, ``cifar10``, ``folder`` or ``conditions``; ``crop``, where given, is the side of
    squares to cut from images without conditions (see `tamingfast.data.crops`); every other key is an argument of that
    module's ``build``. Items are dicts with ``image`` float32 (H, W, 3) in [-1, 1], ``class_label`` int and
    ``file_path_`` str, and are a pure function of (seed, epoch, index), where ``set_epoch`` gives the epoch.

    Raises UserError for an unknown name or key (naming the nearest valid one), for a missing key, and for
    whatever is wrong with the data themselves.
    """
    options = dict(config)
    name, crop = options.pop("name", None), options.pop("crop", None)
    if name is None:
        raise UserError(f"the data settings lack a name: add name=... with one of {', '.join(sorted(_MODULES))}")
    if name not in _MODULES:
        raise UserError(_unknown("dataset name", name, _MODULES))
    factory = importlib.import_module(f"{__name__}.{_MODULES[name]}").build
    parameters = inspect.signature(factory).parameters
    for key in options:
        if key not in parameters:
            raise UserError(_unknown(f"key of the {name} dataset,", key, [*parameters, "crop"]))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and options.get(key) is None:
            raise UserError(
                f"the {name} dataset needs the key {key!r}, which is missing: add {key}=... to the data settings"
            )
    if crop is None:
        return factory(**options)
    if name == "conditions":
        raise UserError("crop would cut images and leave their conditions whole: give short_side and size instead")
    return cut(factory(**options), crop, options.get("seed", 0))


def _unknown(what: str, got: object, valid: Iterable[str]) -> str:
    hint = nearest(str(got), valid)
    return f"the {what} {got!r} is unknown{hint} (valid: {', '.join(sorted(valid))})"
