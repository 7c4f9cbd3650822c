"""Builds models from checkpoints, the original's and ours."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tamingfast.checkpoints import compat
from tamingfast.checkpoints.config import (
    at,
    check_config_values,
    instantiate_from_config,
    load_yaml,
    plain,
    without_checkpoints,
)
from tamingfast.checkpoints.infer import ASSUMED, KNOWN, check_signs, infer_config
from tamingfast.checkpoints.limits import check_sizes
from tamingfast.checkpoints.locate import embedded_config, neighbouring_config, weights_path
from tamingfast.checkpoints.targets import check_targets
from tamingfast.checkpoints.weights import Checkpoint, check_real, load_into, read_checkpoint, unwrapped
from tamingfast.errors import UserError
from tamingfast.files import check_path
from tamingfast.ops.backends import pick_device
from tamingfast.ops.check import FLOATS

logger = logging.getLogger(__name__)

# Parts that a checkpoint may lack, because only training needs them.
_OPTIONAL = ("loss.",)
# Of latent-diffusion's first stages; only training needs them.
_LDM, _LDM_TRAINING = "ldm.", ("batch_resize_range", "lr_g_factor", "scheduler_config", "use_ema")
_DUMMY_LOSS = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
# For the config of each first stage in a model's: what its keys begin with in the model's weights.
_STAGES = {"": "", "first_stage_config": "first_stage_model.", "cond_stage_config": "cond_stage_model."}


def load_model(
    checkpoint: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    allow: Collection[str] = (),
) -> nn.Module:
    """A model in evaluation mode from a checkpoint of the original or of ours.

    A config builds networks of this package only, so neither file runs code; other `torch.nn.Module` classes are built
    if ``allow`` has their names, or if ``config`` is a mapping.

    Args:
        checkpoint: a Lightning ``.ckpt``, a ``.safetensors`` file, or a run directory of either project.
        config: a YAML file or a mapping. By default it is looked for where both projects put it: inside the safetensors
            file, beside the weights, in the run's ``configs/``. If there is none, a first stage's is inferred.
        device: default: the CPU.
        dtype: a torch dtype or its name, such as "bfloat16". Default: float32.
        allow: dotted names of further classes that the config may name, such as ``("package.Class",)``.

    Raises:
        UserError: a file is missing, damaged or unsafe, holds weights that are not finite, or does not fit the config.
    """
    check_path("checkpoint", checkpoint)
    dtype, device = _dtype(dtype), pick_device(str(device or "cpu"))
    path = weights_path(Path(checkpoint))
    found = read_checkpoint(path)
    check_real(found.state, path)
    allowed = None if isinstance(config, Mapping) else allow  # a mapping is the caller's own, and may name any class
    settings = _settings(found, config, allowed)
    check_targets(settings["model"], "model", allowed)
    check_sizes(settings["model"], "model", found.state, path)
    model = instantiate_from_config(settings["model"])
    load_into(model, found.state, path, optional=_OPTIONAL)
    model.config, model.allow = settings, frozenset(allow)
    return model.to(device=device, dtype=dtype).eval()


def outline(checkpoint: str | os.PathLike, *, allow: Collection[str] = ()) -> nn.Module | None:
    """The model that `load_model` gives, on the meta device, as its config describes it: no weights are read.

    None where that takes the weights, such as for a checkpoint without a config. Raises UserError for a missing file
    and for a config that may not be built.
    """
    path = weights_path(Path(checkpoint))
    found = read_checkpoint(path, tensors=False)
    if embedded_config(path) is None and neighbouring_config(path) is None:
        return None
    settings = _settings(found, None, allow)
    check_targets(settings["model"], "model", allow)
    check_sizes(settings["model"], "model")
    try:
        with torch.device("meta"):
            model = instantiate_from_config(settings["model"])
    except UserError:  # such as for a remapping that the weights contain, but no file
        return None
    model.config, model.allow = settings, frozenset(allow)
    return model.eval()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or found not in FLOATS:
        names = ", ".join(str(known).removeprefix("torch.") for known in FLOATS)
        raise UserError(f"dtype: got '{dtype}', expected one of {names}")
    return found


def _settings(checkpoint: Checkpoint, config: Any, allow: Collection[str] | None) -> dict[str, Any]:
    """The given config, else the one found with the weights, else the inferred one, without files that it names."""
    path = checkpoint.path
    if isinstance(config, str | os.PathLike):
        config = load_yaml(config)
    elif config is None:
        config = embedded_config(path) or neighbouring_config(path)
    if config is None:
        check_signs(checkpoint.beside, path)
        config = {"model": infer_config(checkpoint.state, path)}
        logger.warning("no config found for %s; its architecture is inferred from the weights, so %s", path, ASSUMED)
    config = plain(config)
    check_config_values(config, path)
    settings = without_checkpoints(config)
    model = settings.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("target"), str):
        raise UserError(
            f"config of {path}: got no 'target' in a section 'model', expected the config of this model; give the one "
            "that it was trained with"
        )
    _keep_what_is_used(model, checkpoint, allow)
    return settings


def _is_of_relatives(lossconfig: Any, allow: Collection[str] | None) -> bool:
    """Whether a loss is none, or one of another project, which is not needed and not run."""
    target = "torch.nn.Identity" if lossconfig is None else str(at(lossconfig, "target"))
    if target.startswith(_LDM) or target == "torch.nn.Identity":
        return True
    named = allow is None or target in allow or compat.is_ours(target)
    return "losses" in target.split(".")[:-1] and not named


def _keep_what_is_used(model: Mapping[str, Any], checkpoint: Checkpoint, allow: Collection[str] | None) -> None:
    """Remove from the config what using a first stage does not need, and what its weights say without a file."""
    state = unwrapped(checkpoint.state, KNOWN)
    for name, prefix in _STAGES.items():
        stage = at(model, "params", name) if name else model
        params = at(stage, "params")
        if not isinstance(params, dict):
            continue
        if f"{prefix}quantize.used" in state:
            params.pop("remap", None)
        if "lossconfig" in params and _is_of_relatives(params["lossconfig"], allow):
            params["lossconfig"] = dict(_DUMMY_LOSS)
        if str(at(stage, "target")).startswith(_LDM):
            for key in _LDM_TRAINING:
                params.pop(key, None)
