"""Converts a checkpoint of any kind: to one safetensors file, the original's ``.ckpt`` and YAML, or for diffusers."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from tamingfast.checkpoints import compat
from tamingfast.checkpoints.config import at, without_checkpoints
from tamingfast.checkpoints.formats import diffusers
from tamingfast.checkpoints.load import dtype_of, load_model
from tamingfast.checkpoints.pretrained import weights_of
from tamingfast.checkpoints.targets import class_of
from tamingfast.checkpoints.weights import save_weights
from tamingfast.errors import UserError
from tamingfast.files import atomic_write, check_directory, reported, write_json

#: What `convert` writes: one file, or a folder for diffusers' ``VQModel.from_pretrained``.
LAYOUTS = ("tamingfast", "diffusers")
SUFFIXES = (".safetensors", ".ckpt")
#: What the original's networks read of ``ddconfig``; they take any other key and ignore it.
_DDCONFIG = frozenset({
    "attn_resolutions", "ch", "ch_mult", "double_z", "dropout", "give_pre_end", "in_channels", "num_res_blocks",
    "out_ch", "resamp_with_conv", "resolution", "z_channels",
})  # fmt: skip
#: Values of other keys that change nothing.
_NEUTRAL = (None, False, "vanilla")
#: Parameters that the original's classes lack, with the values that stand for what those do.
_OURS = {"codes": "nearest", "quant_conv": True, "image_range": [-1, 1], "null_class": False, "qk_norm": False}


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    allow: Collection[str] = (),
    layout: str = "tamingfast",
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write a checkpoint that `load_model` can open as one file, without optimizer states and losses.

    A ``.safetensors`` file has its config inside. A ``.ckpt`` file is one that the original's code loads, and its
    config with the original's names is put beside it as ``.yaml``. With ``layout`` "diffusers" it is a folder of
    config.json and weights, for networks that diffusers' VQModel can be. Quantisers become plain codebooks where those
    do the same; ``allow`` is as for `load_model`. With a ``dtype``, such as "bfloat16", weights are rounded to that.
    Returns the path of the file or folder. UserError for another suffix or layout, and for a model that the layout has
    not.
    """
    out, dtype = Path(out), dtype_of(dtype)
    if layout not in LAYOUTS:
        raise UserError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "diffusers":
        check_directory(out)
    elif out.suffix not in SUFFIXES:
        raise UserError(f"out: got '{out.name}', expected a name that ends in {' or '.join(SUFFIXES)}")
    model = load_model(checkpoint, config, allow=allow)
    settings = _plain(without_checkpoints(model.config))
    if layout == "diffusers":
        _write_for_diffusers(model, settings["model"]["params"], out, dtype)
    elif out.suffix == ".ckpt":
        _write_original(model, settings["model"], out, dtype)
    else:
        save_weights(out, weights_of(model, dtype), {"config": json.dumps(settings)})
    return out


def _write_for_diffusers(model: nn.Module, params: dict[str, Any], out: Path, dtype: torch.dtype) -> None:
    name = type(model).__name__
    if name not in diffusers.CLASSES:
        raise UserError(f"layout: got 'diffusers' for a {name}, expected one of {', '.join(diffusers.CLASSES)}")
    config, state = diffusers.written(params, weights_of(model, dtype))
    out.mkdir(parents=True, exist_ok=True)
    # The config first: without weights the folder is refused, and weights without their config could be misread.
    write_json(out / "config.json", config)
    save_weights(out / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})


def _write_original(model: nn.Module, settings: dict[str, Any], out: Path, dtype: torch.dtype) -> None:
    """Write ``out`` and the YAML beside it, both or none."""
    described: Any = _with_their_names(settings, "model")
    beside = out.with_suffix(".yaml")
    state = {key: value.contiguous() for key, value in weights_of(model, dtype).items()}
    with atomic_write(beside) as written:
        OmegaConf.save(OmegaConf.create({"model": described}), written)
        with atomic_write(out) as temporary, reported(out, temporary):
            torch.save({"state_dict": state}, temporary)


def _with_their_names(value: Any, where: str) -> Any:
    """A section of a config whose classes have the original's names; UserError for what it does not have."""
    if isinstance(value, list):
        return [_with_their_names(each, f"{where}.{place}") for place, each in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    for key, setting in value.items():
        ignored = where.endswith(".ddconfig") and key not in _DDCONFIG and setting not in _NEUTRAL
        if ignored or setting != _OURS.get(key, setting):
            raise UserError(
                f"{where}.{key}: got {setting!r}, which the original's networks ignore, expected a network that it "
                "has; give a name that ends in .safetensors"
            )
    found = {key: _with_their_names(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value.get("target"), str):
        found["target"] = _their_name(value["target"], f"{where}.target")
    return found


def _their_name(target: str, where: str) -> str:
    name = compat.original_name(target)
    if name is None:
        raise UserError(
            f"{where}: got '{target}', which the original lacks, expected one of its classes; give a name that ends in "
            ".safetensors"
        )
    return name


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
