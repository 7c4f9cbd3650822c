"""Converts a checkpoint of any kind: to one safetensors file, or to the original's ``.ckpt`` with its YAML."""

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
from tamingfast.checkpoints.config import without_checkpoints
from tamingfast.checkpoints.load import load_model
from tamingfast.checkpoints.pretrained import weights_of
from tamingfast.checkpoints.weights import save_weights
from tamingfast.errors import UserError
from tamingfast.files import atomic_write, reported

SUFFIXES = (".safetensors", ".ckpt")
#: What the original's networks read of ``ddconfig``; they take any other key and ignore it.
_DDCONFIG = frozenset({
    "attn_resolutions", "ch", "ch_mult", "double_z", "dropout", "give_pre_end", "in_channels", "num_res_blocks",
    "out_ch", "resamp_with_conv", "resolution", "z_channels",
})  # fmt: skip
#: Values of other keys that change nothing.
_NEUTRAL = (None, False, "vanilla")


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    allow: Collection[str] = (),
) -> Path:
    """Write a checkpoint that `load_model` can open as one file, without optimizer states and losses.

    A ``.safetensors`` file has its config inside. A ``.ckpt`` file is one that the original's code loads, and its
    config with the original's names is put beside it as ``.yaml``. ``allow`` is as for `load_model`. Returns the path
    of the file; UserError for another suffix, and for a model that the original does not have.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"out: got '{out.name}', expected a name that ends in {' or '.join(SUFFIXES)}")
    model = load_model(checkpoint, config, allow=allow)
    if out.suffix == ".ckpt":
        _write_original(model, out)
    else:
        save_weights(out, weights_of(model), {"config": json.dumps(without_checkpoints(model.config))})
    return out


def _write_original(model: nn.Module, out: Path) -> None:
    """Write ``out`` and the YAML beside it, both or none."""
    described: Any = _with_their_names(without_checkpoints(model.config)["model"], "model")
    beside = out.with_suffix(".yaml")
    state = {key: value.contiguous() for key, value in weights_of(model).items()}
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
    if where.endswith(".ddconfig"):
        for key, setting in value.items():
            if key not in _DDCONFIG and setting not in _NEUTRAL:
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
