"""Converts a checkpoint of any kind to one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tamingfast.checkpoints.config import without_checkpoints
from tamingfast.checkpoints.load import load_model
from tamingfast.checkpoints.pretrained import weights_of
from tamingfast.checkpoints.weights import save_weights
from tamingfast.errors import UserError


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    allow: Collection[str] = (),
) -> Path:
    """Write a checkpoint that `load_model` can open as one ``.safetensors`` file with its config inside.

    Optimizer states and losses are left out; ``allow`` is as for `load_model`. Returns the path of the file; UserError
    for another suffix.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"out: got '{out.name}', expected a name that ends in .safetensors")
    model = load_model(checkpoint, config, allow=allow)
    save_weights(out, weights_of(model), {"config": json.dumps(without_checkpoints(model.config))})
    return out
