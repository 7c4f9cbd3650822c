"""Which classes a config may name. This module alone turns a ``target`` into a class."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from tamingfast.checkpoints import compat
from tamingfast.errors import UserError, first_line, nearest

_KINDS = (nn.Module, Dataset, LRScheduler)
#: Section of a config -> the package that its classes come from.
_PACKAGES = {"model": "models", "data": "data"}
_ADVICE = {"data": "; give data.name=folder data.path=DIRECTORY to train on a directory"}


def class_of(target: Any, where: str = "target", allow: Collection[str] | None = None, section: str = "model") -> type:
    """The class that a config means by ``target``, found without calling anything.

    It is a subclass of `torch.nn.Module` or of torch's Dataset, or a scheduler. With ``allow`` None, as for a config
    that the user wrote, it may come from any module, which is imported. Else it is one of this package's for
    ``section`` ("model" or "data"), under our name or the original's, or ``allow`` has its name; nothing else is
    imported. Raises UserError, which names the key ``where``, for anything else.
    """
    if not isinstance(target, str):
        raise UserError(f"{where}: got {target!r}, expected the name of a class")
    if allow is not None and target not in allow and not compat.is_ours(target, _PACKAGES[section]):
        raise _not_run(target, where, f"a class of tamingfast; add --allow {target} (allow= in Python) if you trust it")
    found = None if _starts_programs(target) else _imported(target, where, section)
    if isinstance(found, type) and (issubclass(found, _KINDS) or _is_schedule(found)):
        return found
    raise _not_run(target, where, "a subclass of torch's Module or Dataset, or a scheduler; correct the name")


def check_targets(config: Any, section: str, allow: Collection[str] | None = ()) -> None:
    """Raise UserError for the first ``target`` anywhere in a section of a config that `class_of` refuses.

    Nothing is built; ``allow`` is as for `class_of`.
    """
    for where, described in descriptions(config, section):
        class_of(described["target"], f"{where}.target", allow, section)


def descriptions(config: Any, where: str, is_params: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted key, mapping) of every ``{target, params}`` in nested mappings and lists."""
    if isinstance(config, list | tuple):
        for place, value in enumerate(config):
            yield from descriptions(value, f"{where}.{place}")
    elif isinstance(config, Mapping):
        if "target" in config and not is_params:  # among params, a class may have one called target
            yield where, config
        for key, value in config.items():
            yield from descriptions(value, f"{where}.{key}", is_params=key == "params" and "target" in config)


def _imported(target: str, where: str, section: str) -> Any:
    try:
        return compat.resolve(target)
    except KeyError:
        names = [f"{home}.{name}" for home, members in compat.NAMES.items() for name in members]
        hint = _ADVICE.get(section) or nearest(target, names)
        raise UserError(
            f"{where}: got '{target}', expected a name of the original that has a counterpart here{hint}"
        ) from None
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}: got '{target}', which cannot be imported ({first_line(error)}), expected the name of a class"
        ) from error


def _starts_programs(target: str) -> bool:
    """Whether importing the module could run a program: Python's own have no classes for configs, but `antigravity`."""
    package, *rest = target.split(".")
    return package in sys.stdlib_module_names or "__main__" in rest


def _is_schedule(found: type) -> bool:
    # The original's scheduler is a plain class.
    return found.__name__.endswith("Scheduler") and callable(getattr(found, "schedule", None))


def _not_run(target: str, where: str, expected: str) -> UserError:
    return UserError(f"{where}: got '{target}', which is not run, expected {expected}")
