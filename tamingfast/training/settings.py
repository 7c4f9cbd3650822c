"""The ``training:`` section of a config: the settings of a run other than its model and its data."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any

from tamingfast.checkpoints.config import plain
from tamingfast.checkpoints.values import LARGEST, is_number
from tamingfast.errors import UserError
from tamingfast.training.keys import check_keys

#: What the machine decides, see `fitting.fitted`.
AUTO = "auto"
PRECISIONS = (AUTO, "float32", "bfloat16")
#: How several processes hold a prior, see `parallel`.
DDP, FSDP = "ddp", "fsdp"
PARALLEL = (DDP, FSDP)
#: Settings with a few valid values, and these.
_NAMED = {"precision": PRECISIONS, "parallel": PARALLEL}
#: Integers that may be 0; the others are at least 1.
_MAY_BE_ZERO = ("seed", "workers", "warmup_steps")
_Number = int | float


@dataclass(frozen=True)
class Training:
    """The ``training:`` section of a config. Counts are optimizer steps unless they say otherwise.

    ``steps``, ``epochs`` (passes over the training images) and ``seconds`` (of training proper, without validation and
    checkpoints) end the run, whichever comes first; without any it continues until it is stopped. ``validate_every``
    None validates after each epoch, after several if they are short (`loop.BETWEEN_VALIDATIONS`); ``image_every`` None
    writes no images.
    ``learning_rate`` None follows the paper: accumulate * devices * batch_size * model.base_learning_rate. The paper
    keeps it constant; ``warmup_steps`` raises it linearly first, ``decay_steps`` lowers it to zero along a cosine.
    ``batch_size`` is images per device and forward pass. ``precision`` and ``workers``, the processes that read data,
    can be "auto". Two settings depart from the original to shorten runs:
    ``shared_forward`` (see `vqgan.VQGANStage`) and ``codebook_from_data`` (see `vqgan.start_codebook`).
    ``ema_decay`` is that of the weights' moving averages (`averages.Averages`), with which the run validates, draws and
    exports; None keeps none. ``gradient_checkpointing`` and ``compile`` are those of `acceleration.accelerate`.
    ``parallel`` is how several processes hold a prior: each the whole, "ddp", or each a part, "fsdp"; see `parallel`.
    ``tensorboard`` writes events for TensorBoard, too.

    Raises UserError for values of the wrong type or out of range.
    """

    steps: int | None = None
    epochs: int | None = None
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
    ema_decay: float | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    parallel: str = DDP
    log_every: int = 10
    validate_every: int | None = None
    validation_batches: int | None = 32
    image_every: int | None = None
    checkpoint_every: int = 1000
    workers: int | str = AUTO
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            check_setting(field.name, getattr(self, field.name))

    def last_step(self, per_epoch: int) -> int | None:
        """The step that ends a run whose epochs have ``per_epoch`` steps; None if only seconds or nothing ends it."""
        ends = [self.steps, None if self.epochs is None else self.epochs * per_epoch]
        return min((end for end in ends if end is not None), default=None)


#: Settings that a resumed run may change, because none of them influences the weights after a step.
FREE_TO_CHANGE = frozenset({
    "steps", "epochs", "seconds", "workers", "gradient_checkpointing", "parallel",
    "tensorboard", "log_every", "validate_every", "validation_batches", "image_every", "checkpoint_every",
})  # fmt: skip


def training_settings(config: Mapping[str, Any]) -> Training:
    """The ``training:`` section as `Training`; UserError for unknown keys and for values of the wrong type or range."""
    section = plain(config.get("training"))
    section = {} if section is None else section
    check_keys(section, [field.name for field in fields(Training)], "training")
    return Training(**section)


def check_setting(name: str, value: object, key: str | None = None) -> None:
    """Raise UserError, which names ``key`` (default: ``training.`` and the name), unless a setting may have a value."""
    types = _types(name)
    if name in _NAMED:
        valid, expected = value in _NAMED[name], f"one of {', '.join(_NAMED[name])}"
    elif name == "workers" and value == AUTO:
        valid, expected = True, ""
    elif name == "ema_decay":
        valid, expected = is_number(value) and 0 < value < 1, "a number between 0 and 1"  # type: ignore[operator]
    elif bool in types:
        valid, expected = isinstance(value, bool), "true or false"
    elif float in types:
        valid, expected = is_number(value) and value > 0, "a number above 0"  # type: ignore[operator]
    else:
        least = 0 if name in _MAY_BE_ZERO else 1
        valid = isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST
        expected = f"an integer of at least {least}{f', or {AUTO}' * (str in types)}"
    or_null = NoneType in types
    if not (valid or (value is None and or_null)):
        raise UserError(f"{key or f'training.{name}'}: got {value!r}, expected {expected}{', or null' * or_null}")


@functools.cache
def _types(name: str) -> tuple[type, ...]:
    """The types that a setting may have."""
    hint = typing.get_type_hints(Training)[name]
    return typing.get_args(hint) or (hint,)
