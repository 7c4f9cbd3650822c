"""Converts a checkpoint of any kind to one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tamingfast.checkpoints.config import at, without_checkpoints
from tamingfast.checkpoints.load import load_model
from tamingfast.checkpoints.targets import class_of
from tamingfast.checkpoints.weights import folded, save_weights
from tamingfast.errors import UserError


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    allow: Collection[str] = (),
) -> Path:
    """Write a checkpoint that `load_model` can open as one ``.safetensors`` file with its config inside.

    Optimizer states and losses are left out, and quantisers become plain codebooks where those do the same; ``allow``
    is as for `load_model`. Returns the path of the file; UserError for another suffix.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"out: got '{out.name}', expected a name that ends in .safetensors")
    model = load_model(checkpoint, config, allow=allow)
    state = {key: value for key, value in folded(model, model.state_dict()).items() if ".loss." not in f".{key}"}
    save_weights(out, state, {"config": json.dumps(_plain(without_checkpoints(model.config)))})
    return out


def _plain(config: Any) -> Any:
    """The config without quantisers for which their folded weights are a plain codebook."""
    if isinstance(config, list):
        return [_plain(value) for value in config]
    if not isinstance(config, dict):
        return config
    return {
        key: _plain(value)
        for key, value in config.items()
        if not (key == "quantizer_config" and getattr(class_of(at(value, "target")), "folds_to_plain", False))
    }
