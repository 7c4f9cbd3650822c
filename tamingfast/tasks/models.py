"""Opening models from paths, and checking what they can be used for."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from tamingfast.checkpoints.config import instantiate_from_config, plain
from tamingfast.checkpoints.load import load_model, outline
from tamingfast.checkpoints.targets import check_targets
from tamingfast.errors import UserError, brief
from tamingfast.models.base import FirstStage
from tamingfast.models.condition_stages import Labelator
from tamingfast.models.llama_gpt import LlamaGPT
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ops.backends import pick_device
from tamingfast.training.prior_config import LABELATOR, MODEL


class Unread:
    """A model at a path, whose weights are read when they are needed, so that cheap checks can come before.

    ``device`` None is the GPU if there is one; ``allow`` is as for `tamingfast.load_model`. ``first_stage`` is the path
    of the first stage of a transformer that comes without one; see `paired`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str | None = None,
        allow: Collection[str] = (),
        first_stage: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path, self.device, self.allow, self.first_stage = path, device, allow, first_stage

    def __str__(self) -> str:
        return os.fspath(self.path)

    @cached_property
    def outline(self) -> nn.Module:
        """The model as its config describes it, without weights; the model itself where that takes the weights."""
        found = None if self.first_stage is not None else outline(self.path, allow=self.allow)
        return found or self.model

    @cached_property
    def model(self) -> nn.Module:
        """The model, read once. Raises UserError as `tamingfast.load_model` and `paired` do."""
        device = pick_device(self.device)
        # First, as it is the smaller one, so that a mistake in its path is told soon.
        stage = None if self.first_stage is None else load_model(self.first_stage, device=device, allow=self.allow)
        model = load_model(self.path, device=device, allow=self.allow)
        if stage is not None:
            return paired(model, stage)
        if isinstance(model, LlamaGPT):
            raise UserError(
                "first_stage: got none, expected the file of a first stage, as the model is a transformer alone; give "
                "the one that it was trained on"
            )
        return model


#: A loaded model, the path of a run directory or checkpoint, or a path whose model is read when it is needed.
Model: TypeAlias = str | os.PathLike[str] | nn.Module | Unread


def paired(gpt: nn.Module, first_stage: nn.Module) -> Net2NetTransformer:
    """The class-conditional prior that a transformer is together with its first stage; both become part of it.

    Both come from `tamingfast.load_model`. Raises UserError for any other model than a `LlamaGPT`, and for a first
    stage with another number of codes.
    """
    if not isinstance(gpt, LlamaGPT):
        raise UserError(
            f"first_stage: got one for a {type(gpt).__name__}, expected none, as only a transformer alone needs it; "
            "leave it out"
        )
    stage = first_stage_of(first_stage)
    if stage is not first_stage or stage.n_embed != gpt.config.vocab_size:
        codes = "a prior" if stage is not first_stage else f"one of {stage.n_embed} codes"
        raise UserError(f"first_stage: got {codes}, expected a first stage of {gpt.config.vocab_size} codes")
    classes = {"n_classes": gpt.n_classes, "null_class": True, "first": gpt.config.vocab_size}
    params = {
        "transformer_config": plain(config_of(gpt)["model"]), "first_stage_config": plain(config_of(stage)["model"]),
        "cond_stage_config": {"target": LABELATOR, "params": classes}, "cond_stage_key": "class_label",
    }  # fmt: skip
    config = {"target": MODEL, "params": params}
    with torch.device("meta"):  # the parts have their weights already
        prior = check_prior(instantiate_from_config(config))
    prior.transformer, prior.first_stage_model = cast(Any, gpt), stage
    prior.config, prior.allow = {"model": config}, cast(Any, getattr(stage, "allow", frozenset()))
    return prior.eval()


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
    found = getattr(model, "settings" if isinstance(model, LlamaGPT) else "config", None)
    return cast("dict[str, Any]", found or {})


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
