"""The ``training:`` section of a config: the settings of a run other than its model and its data."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from tamingfast.checkpoints.config import plain
from tamingfast.errors import UserError
from tamingfast.training.keys import check_keys

PRECISIONS = ("float32", "bfloat16")
#: Integers that may be 0; the others are at least 1.
_MAY_BE_ZERO = ("seed", "workers", "warmup_steps")
_Number = int | float  # both, as OmegaConf without conversion refuses 1 for a float


@dataclass(frozen=True)
class Training:
    """The ``training:`` section of a config. Counts are optimizer steps unless they say otherwise.

    ``steps`` and ``seconds`` (of training proper, without validation and checkpoints) end the run, whichever comes
    first; without either it continues until it is stopped. ``validate_every`` None validates after each epoch;
    ``image_every`` None writes no images.
    ``learning_rate`` None follows the paper: accumulate * devices * batch_size * model.base_learning_rate. The paper
    keeps it constant; ``warmup_steps`` raises it linearly first, ``decay_steps`` lowers it to zero along a cosine.
    ``batch_size`` is images per device and forward pass. Two settings depart from the original to shorten runs:
    ``shared_forward`` (see `vqgan.VQGANStage`) and ``codebook_from_data`` (see `vqgan.start_codebook`).

    Raises UserError for values out of range; types are checked by `training_settings`.
    """

    steps: int | None = None
    seconds: _Number | None = None
    batch_size: int = 12
    accumulate: int = 1
    seed: int = 0
    precision: str = "float32"
    learning_rate: _Number | None = None
    warmup_steps: int = 0
    decay_steps: int | None = None
    grad_clip: _Number | None = None
    shared_forward: bool = False
    codebook_from_data: bool = False
    log_every: int = 10
    validate_every: int | None = None
    validation_batches: int | None = 32
    image_every: int | None = None
    checkpoint_every: int = 1000
    workers: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "precision":
                valid = value in PRECISIONS
            elif value is None or isinstance(value, bool):
                valid = True
            elif float in _types(field.name):
                valid = value > 0
            else:
                valid = value >= _least(field.name)
            if not valid:
                raise _refused(field.name, value)


#: Settings that a resumed run may change, because none of them influences the weights after a step.
FREE_TO_CHANGE = frozenset({
    "steps", "seconds", "workers",
    "log_every", "validate_every", "validation_batches", "image_every", "checkpoint_every",
})  # fmt: skip


def training_settings(config: Mapping[str, Any]) -> Training:
    """The ``training:`` section as `Training`; UserError for unknown keys and for values of the wrong type or range."""
    section = plain(config.get("training")) or {}
    check_keys(section, [field.name for field in fields(Training)], "training")
    schema = OmegaConf.structured(Training, flags={"convert": False})
    try:
        merged = OmegaConf.merge(schema, section)
    except ValidationError as error:
        name = str(error.full_key)
        raise _refused(name, section[name]) from None
    return Training(**plain(merged))


@functools.cache
def _types(name: str) -> tuple[type, ...]:
    """The types that a setting may have."""
    hint = typing.get_type_hints(Training)[name]
    return typing.get_args(hint) or (hint,)


def _least(name: str) -> int:
    return 0 if name in _MAY_BE_ZERO else 1


def _refused(name: str, value: object) -> UserError:
    types = _types(name)
    if name == "precision":
        valid = f"one of {', '.join(PRECISIONS)}"
    elif bool in types:
        valid = "true or false"
    else:
        valid = "a number above 0" if float in types else f"an integer of at least {_least(name)}"
    return UserError(f"training.{name}: got {value!r}, expected {valid}{', or null' if NoneType in types else ''}")
