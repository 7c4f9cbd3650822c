"""What a family of checkpoints is to the code that opens them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.weights import TRAINING_ONLY
from tamingfast.errors import UserError

VQMODEL, INTERFACE = "tamingfast.models.vqgan.VQModel", "tamingfast.models.vqgan.VQModelInterface"
_DUMMY_LOSS = {"target": "tamingfast.models.losses.DummyLoss"}
_AVERAGES = "model_ema."
#: Settings of a first stage that its weights do not show, and the original's values.
UNSEEN: dict[str, Any] = {
    "codes": "nearest", "image_range": [-1, 1], "ddconfig.tanh_out": False, "ddconfig.num_groups": 32,
}  # fmt: skip
#: What a constructor of ours takes of a config of the original's form; the rest is for training.
_PARAMS = ("ddconfig", "n_embed", "embed_dim", "image_key", "colorize_nlabels", "remap", "sane_index_shape")


@dataclass(frozen=True)
class Source:
    """A checkpoint of a family: its weights by their names in the file, its config, and what lies beside them."""

    path: Path
    config: Mapping[str, Any] | None
    state: Mapping[str, Tensor]
    beside: Mapping[Any, Any] = field(default_factory=dict)

    def bad(self, got: str, expected: str) -> UserError:
        """The error that says what the file is in place of what is ``expected``."""
        return UserError(f"{self.path}: got {got}, expected {expected}")


@dataclass(frozen=True)
class Opened:
    """The same in our terms: a ``{target, params}`` config and weights by our names."""

    model: dict[str, Any]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
        name: as `inspect` gives it.
        named: whether a config is one of the family.
        shown: whether the names of weights are, which none of another family are.
        opened: translates a checkpoint. Raises UserError for one that is incomplete, or that no network of ours is.
        prefix: what the names of the first stage's weights begin with in the file of a larger model.
        whole: whether ``opened`` takes the weights, too, not the config alone.
    """

    name: str
    named: Callable[[Mapping[str, Any]], bool]
    shown: Callable[[Collection[str]], bool]
    opened: Callable[[Source], Opened]
    prefix: Callable[[Mapping[str, Any]], str] = lambda config: ""
    whole: bool = True


def model_of(params: Mapping[str, Any], target: str = VQMODEL) -> dict[str, Any]:
    """The config of a model with these params, without a loss."""
    return {"target": target, "params": {**params, "lossconfig": dict(_DUMMY_LOSS)}}


def known_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a config's params without those for training."""
    return {name: params[name] for name in _PARAMS if params.get(name) is not None}


def renamed(state: Mapping[str, Tensor], rules: Collection[tuple[str, str | Callable[[re.Match[str]], str]]]) -> dict:
    """``state`` by other names: each rule (pattern, replacement) is applied to every name, one after the other."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    found = {}
    for name, value in state.items():
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        found[name] = value
    return found


def chosen_weights(source: Source, averaged: bool) -> dict[str, Tensor]:
    """The weights that count: the moving averages that Lightning's LitEma keeps if ``averaged``, else the raw ones."""
    raw = {name: value for name, value in source.state.items() if not name.startswith((*TRAINING_ONLY, "loss."))}
    if not averaged:
        return raw
    found = {}
    for name in raw:
        average = _AVERAGES + name.replace(".", "")
        if average not in source.state:
            raise source.bad(f"no '{average}'", "averages of all weights, as the config says 'use_ema: true'")
        found[name] = source.state[average]
    return found
