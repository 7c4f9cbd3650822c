"""Builds models from checkpoints, the original's and ours."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tamingfast.checkpoints import compat, formats
from tamingfast.checkpoints.config import (
    at,
    check_config_values,
    instantiate_from_config,
    load_yaml,
    plain,
    without_checkpoints,
)
from tamingfast.checkpoints.formats import llamagen_gpt
from tamingfast.checkpoints.infer import ASSUMED, KNOWN, check_signs, infer_config
from tamingfast.checkpoints.limits import check_sizes
from tamingfast.checkpoints.locate import embedded_config, hub_config, neighbouring_config, weights_path
from tamingfast.checkpoints.targets import check_targets
from tamingfast.checkpoints.weights import (
    ADVICE,
    Checkpoint,
    check_real,
    load_into,
    read_checkpoint,
    read_state_dict,
    unwrapped,
)
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
    """A model in evaluation mode from a checkpoint of the original, of its relatives (docs/families.md) or of ours.

    A config builds networks of this package only, so neither file runs code; other `torch.nn.Module` classes are built
    if ``allow`` has their names, or if ``config`` is a mapping.

    Args:
        checkpoint: a Lightning ``.ckpt``, a ``.safetensors`` file, a run directory of either project, or a folder as
            models are published on the Hub.
        config: a YAML file or a mapping. By default it is looked for where both projects put it: inside the safetensors
            file, beside the weights, in the run's ``configs/``. If there is none, a first stage's is inferred. The
            model's ``config`` has it in our terms, with the name of the ``family`` if it is one of a relative.
        device: default: the CPU.
        dtype: a torch dtype or its name, such as "bfloat16". Default: float32.
        allow: dotted names of further classes that the config may name, such as ``("package.Class",)``.

    Raises:
        UserError: a file is missing, damaged or unsafe, holds weights that are not finite, or does not fit the config.
    """
    check_path("checkpoint", checkpoint)
    dtype, device = dtype_of(dtype), pick_device(str(device or "cpu"))
    path = weights_path(Path(checkpoint))
    allowed = None if isinstance(config, Mapping) else allow  # a mapping is the caller's own, and may name any class
    found, settings = _opened(path, config, allowed)
    check_targets(settings["model"], "model", allowed)
    check_sizes(settings["model"], "model", found.state, path)
    model = instantiate_from_config(settings["model"])
    load_into(model, found.state, path, optional=_OPTIONAL)
    _remember(model, settings, allow)
    return model.to(device=device, dtype=dtype).eval()


def outline(checkpoint: str | os.PathLike, *, allow: Collection[str] = ()) -> nn.Module | None:
    """The model that `load_model` gives, on the meta device, as its config describes it: no weights are read.

    None where that takes the weights, such as for a checkpoint without a config. Raises UserError for a missing file
    and for a config that may not be built.
    """
    path = weights_path(Path(checkpoint))
    config = config_beside(path)
    family = formats.family_of(config)
    if config is None or (family is not None and family.whole):
        return None
    settings = _settings(*_translated(read_checkpoint(path, tensors=False), config), allow)
    check_targets(settings["model"], "model", allow)
    check_sizes(settings["model"], "model")
    try:
        with torch.device("meta"):
            model = instantiate_from_config(settings["model"])
    except UserError:  # such as for a remapping that the weights contain, but no file
        return None
    _remember(model, settings, allow)
    return model.eval()


def _remember(model: Any, settings: dict[str, Any], allow: Collection[str]) -> None:
    # The config of a transformer alone is its sizes.
    setattr(model, "settings" if settings["model"]["target"] == llamagen_gpt.TARGET else "config", settings)
    model.allow = frozenset(allow)


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype:
    """The floating dtype of that name, float32 for None; UserError for anything else."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or found not in FLOATS:
        names = ", ".join(str(known).removeprefix("torch.") for known in FLOATS)
        raise UserError(f"dtype: got '{dtype}', expected one of {names}")
    return found


def _opened(path: Path, config: Any, allow: Collection[str] | None) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint file with our names of its weights, and the config of its model, inferred if there is none."""
    found, config = read_translated(path, config)
    if config is None:
        check_signs(found.beside, path)
        config = {"model": infer_config(found.state, path)}
        logger.warning("no config found for %s; its architecture is inferred from the weights, so %s", path, ASSUMED)
    return found, _settings(found, config, allow)


def read_translated(path: Path, config: Any = None) -> tuple[Checkpoint, Any]:
    """The checkpoint file at ``path`` and its plain config: the given one, else that found with the weights, or None.

    If it is of a family of `tamingfast.checkpoints.formats`, whose name is then the config's ``family``, both are in
    our terms. Raises UserError for a file that cannot be read, or is of a family and cannot be opened.
    """
    found, config = read_as_published(path, config)
    check_real(found.state, path)
    return _translated(found, config)


def read_as_published(path: Path, config: Any = None) -> tuple[Checkpoint, Any]:
    """As `read_translated`, in the family's own terms; of a larger model, the first stage's weights alone are read."""
    if isinstance(config, str | os.PathLike):
        config = load_yaml(config)
    elif config is None:
        config = config_beside(path)
    config = plain(config)
    if config is not None:
        check_config_values(config, path)
    family = formats.family_of(config)
    return read_checkpoint(path, prefix="" if family is None else family.prefix(config)), config


def init_from_ckpt(module: nn.Module, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
    """The original's ``init_from_ckpt``: load all weights of a file but those whose keys start with ``ignore_keys``.

    Unlike the original's, it does not go on when weights are missing or left over: UserError, unless their keys are the
    loss's or start with one of ``ignore_keys``. A first stage also takes checkpoints of its relatives, folders too, if
    its settings that weights do not show, such as how codes are chosen, are theirs.
    """
    ignored = tuple(ignore_keys)
    unseen = getattr(module, "unseen", None)
    if unseen is None:
        state = read_state_dict(path)
    else:
        found, config = read_translated(weights_path(Path(path)) if os.path.isdir(path) else Path(path))
        state = found.state
        _check_unseen(unseen, config, path)
    state = {key: value for key, value in unwrapped(state, module.state_dict()).items() if not key.startswith(ignored)}
    advice = f"{ADVICE}, or name what is to be left out in ignore_keys"
    load_into(module, state, path, optional=("loss.", "colorize", *ignored), advice=advice)
    logger.info("restored from %s", path)


def _check_unseen(unseen: Mapping[str, Any], config: Any, path: str | os.PathLike) -> None:
    """UserError if a checkpoint of a family is of a network whose settings differ from ``unseen``."""
    if at(config, "family") is None:
        return
    params = at(config, "model", "params")
    for name, own in unseen.items():
        theirs = at(params, *name.split("."))
        theirs = formats.UNSEEN[name] if theirs is None else theirs
        if theirs != own:
            raise UserError(
                f"{path}: got weights ({config['family']}) of a network with {name}={theirs}, expected one with "
                f"{name}={own}, as the model has; set model.params.{name}={theirs}"
            )


def config_beside(path: Path) -> Any:
    """The plain config in the file or beside it; a config.json counts if it is one of ours or of a family.

    Raises UserError for one that cannot be read, whatever the weights are called: they may be another network than
    they seem without it.
    """
    found = plain(embedded_config(path) or neighbouring_config(path))
    if found is None:
        found = plain(hub_config(path))
        ours = at(found, "model", "target") is not None  # else it is a family's or another library's
        return found if ours or formats.family_of(found) is not None else None
    return found


def _translated(found: Checkpoint, config: Any) -> tuple[Checkpoint, Any]:
    state = unwrapped(found.state, KNOWN)
    family = formats.family_of(config, state)
    if family is None:
        return found, config
    made = family.opened(formats.Source(found.path, config, state, found.beside))
    kept = {} if family.whole or config is None else config
    return replace(found, state=made.state), {**kept, "model": made.model, "family": family.name}


def _settings(checkpoint: Checkpoint, config: Any, allow: Collection[str] | None) -> dict[str, Any]:
    """The config without files that it names, and without what using the model does not need."""
    path = checkpoint.path
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
