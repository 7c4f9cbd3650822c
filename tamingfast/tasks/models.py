"""Opening models from paths, and checking what they can be used for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from tamingfast.checkpoints import load_model
from tamingfast.checkpoints.targets import check_targets
from tamingfast.errors import UserError
from tamingfast.models.base import FirstStage
from tamingfast.models.condition_stages import Labelator
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ops.backends import pick_device

#: A loaded model, or the path of a run directory or checkpoint.
Model: TypeAlias = str | os.PathLike[str] | nn.Module


def opened(model: Model) -> nn.Module:
    """The model at a path, on the GPU if there is one; a loaded model is returned as it is.

    To choose the device, load the model with `tamingfast.load_model`. Raises UserError as that does.
    """
    return model if isinstance(model, nn.Module) else load_model(model, device=pick_device(None))


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config that a model was loaded with; empty for models made by hand."""
    return getattr(model, "config", None) or {}


def data_of(model: nn.Module) -> Mapping[str, Any]:
    """The ``data`` section of the config that a model was loaded with, whose classes `load_model` was to allow."""
    section = config_of(model).get("data") or {}
    check_targets(section, "data", getattr(model, "allow", ()))
    return section


def first_stage_of(model: nn.Module) -> FirstStage:
    """The first stage of a prior, or the model itself if it is one; UserError otherwise."""
    stage = getattr(model, "first_stage_model", model)
    if not isinstance(stage, FirstStage):
        raise UserError(f"model: got a {type(model).__name__}, expected a first stage or a prior")
    return stage


def check_prior(model: nn.Module) -> Net2NetTransformer:
    """``model``; UserError if it is not a prior."""
    if not isinstance(model, Net2NetTransformer):
        raise UserError(
            f"model: got a {type(model).__name__}, which cannot draw images, expected a prior; give a run of "
            "`tamingfast train prior`"
        )
    return model


def check_windowed(model: nn.Module) -> Net2NetTransformer:
    """``model``; UserError unless it is a prior whose tokens form one grid over the image."""
    prior = check_prior(model)
    if is_multiscale(prior):
        raise UserError(
            "model: got a multiscale prior, whose tokens form no grid over the image, expected a prior on one grid, "
            "which can be masked and extended; use `tamingfast sample`, with --from PHOTO --scales N to start from a "
            "photo's coarse scales"
        )
    if first_stage_of(prior).levels > 1:
        raise UserError(
            "model: got a prior on tokens of two levels, expected a prior on one grid, part of which can be kept; use "
            "`tamingfast sample` or `tamingfast reconstruct`"
        )
    return prior


def is_multiscale(model: nn.Module) -> bool:
    """Whether a prior is a `tamingfast.models.multiscale.MultiscaleTransformer`."""
    return isinstance(model, MultiscaleTransformer)


def is_spatial(model: Net2NetTransformer) -> bool:
    """Whether a prior has a condition that lies over the image: a map, or objects."""
    return not model.be_unconditional and classes_of(model) is None


def classes_of(model: nn.Module) -> int | None:
    """The number of classes of a class-conditional prior; None for all other models."""
    stage = getattr(model, "cond_stage_model", None)
    return stage.n_classes if isinstance(stage, Labelator) else None
