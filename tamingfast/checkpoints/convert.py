"""Converts a checkpoint of any kind to one safetensors file, or to the layout of another library."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tamingfast.checkpoints.config import at, without_checkpoints
from tamingfast.checkpoints.formats import diffusers
from tamingfast.checkpoints.load import load_model
from tamingfast.checkpoints.pretrained import weights_of
from tamingfast.checkpoints.targets import class_of
from tamingfast.checkpoints.weights import save_weights
from tamingfast.errors import UserError
from tamingfast.files import check_directory, write_json

#: What `convert` writes: one file with the config inside, or a folder for diffusers' ``VQModel.from_pretrained``.
LAYOUTS = ("tamingfast", "diffusers")


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    allow: Collection[str] = (),
    layout: str = "tamingfast",
) -> Path:
    """Write a checkpoint that `load_model` can open as one ``.safetensors`` file with its config inside.

    With ``layout`` "diffusers" it is a folder of config.json and weights, for networks that diffusers' VQModel can be.
    Optimizer states and losses are left out, and quantisers become plain codebooks where those do the same; ``allow``
    is as for `load_model`. Returns the path of the file or folder. UserError for another suffix or layout, and for a
    network that the layout has not.
    """
    out = Path(out)
    if layout not in LAYOUTS:
        raise UserError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "tamingfast" and out.suffix != ".safetensors":
        raise UserError(f"out: got '{out.name}', expected a name that ends in .safetensors")
    if layout == "diffusers":
        check_directory(out)
    model = load_model(checkpoint, config, allow=allow)
    if layout == "diffusers":
        return _for_diffusers(model, out)
    save_weights(out, weights_of(model), {"config": json.dumps(_plain(without_checkpoints(model.config)))})
    return out


def _for_diffusers(model: nn.Module, out: Path) -> Path:
    name = type(model).__name__
    if name not in diffusers.CLASSES:
        raise UserError(f"layout: got 'diffusers' for a {name}, expected one of {', '.join(diffusers.CLASSES)}")
    params = _plain(without_checkpoints(model.config))["model"]["params"]
    config, state = diffusers.written(params, weights_of(model))
    out.mkdir(parents=True, exist_ok=True)
    # The config first: without weights the folder is refused, and weights without their config could be misread.
    write_json(out / "config.json", config)
    save_weights(out / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
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
