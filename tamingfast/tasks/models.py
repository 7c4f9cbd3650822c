"""Opening models from paths, and checking what they can be used for."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, TypeAlias

from torch import nn

from tamingfast.checkpoints.load import load_model, outline
from tamingfast.checkpoints.targets import check_targets
from tamingfast.errors import UserError, brief
from tamingfast.models.base import FirstStage
from tamingfast.models.condition_stages import Labelator
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ops.backends import pick_device


class Unread:
    """A model at a path, whose weights are read when they are needed, so that cheap checks can come before.

    ``device`` None is the GPU if there is one; ``allow`` is as for `tamingfast.load_model`.
    """

    def __init__(self, path: str | os.PathLike[str], device: str | None = None, allow: Collection[str] = ()) -> None:
        self.path, self.device, self.allow = path, device, allow

    def __str__(self) -> str:
        return os.fspath(self.path)

    @cached_property
    def outline(self) -> nn.Module:
        """The model as its config describes it, without weights; the model itself where that takes the weights."""
        return outline(self.path, allow=self.allow) or self.model

    @cached_property
    def model(self) -> nn.Module:
        """The model, read once. Raises UserError as `tamingfast.load_model` does."""
        return load_model(self.path, device=pick_device(self.device), allow=self.allow)


#: A loaded model, the path of a run directory or checkpoint, or a path whose model is read when it is needed.
Model: TypeAlias = str | os.PathLike[str] | nn.Module | Unread


def unread(model: Model) -> Unread:
    """A model whose weights may not be read yet; of a loaded model, model and outline are that itself."""
    if isinstance(model, Unread):
        return model
    if not isinstance(model, nn.Module):
        if not isinstance(model, str | os.PathLike):
            raise UserError(f"model: got {brief(model)}, expected a model, or the path of its run or checkpoint")
        return Unread(model)
    found = Unread("")
    found.outline = found.model = model
    return found


def opened(model: Model) -> nn.Module:
    """The model at a path, on the GPU if there is one; a loaded model is returned as it is.

    To choose the device, load the model with `tamingfast.load_model`. Raises UserError as that does.
    """
    return unread(model).model


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
