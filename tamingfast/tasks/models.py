"""What a loaded model is: which first stage it has, and what it can be used for."""

from __future__ import annotations

from torch import nn

from tamingfast.errors import UserError


def first_stage_of(model: nn.Module) -> nn.Module:
    """The first stage of a prior, or the model itself; UserError when there is none."""
    stage = getattr(model, "first_stage_model", model)
    if not hasattr(stage, "factor"):
        raise UserError(f"got a {type(model).__name__}, which is no first stage and has none; give a VQGAN or a prior")
    return stage


def check_prior(model: nn.Module) -> nn.Module:
    """The model itself; UserError when it is no prior."""
    if not hasattr(model, "transformer"):
        raise UserError(
            f"got a {type(model).__name__}, which cannot draw images; give a run of `tamingfast train prior`"
        )
    return model


def check_windowed(model: nn.Module) -> nn.Module:
    """The model itself; UserError when it is no prior, or one whose tokens are not one grid over the image."""
    if is_multiscale(check_prior(model)):
        raise UserError(
            "the model is a multiscale prior, whose tokens are no grid of the image that could be masked, extended or "
            "scanned; use `tamingfast sample`, with --from PHOTO --scales N to begin with a photo's coarse scales"
        )
    if first_stage_of(model).levels > 1:
        raise UserError(
            "the model's tokens are of two levels, of which no part of an image can be kept; use `tamingfast sample` "
            "or `tamingfast reconstruct`"
        )
    return model


def is_multiscale(model: nn.Module) -> bool:
    """Whether a prior is a `tamingfast.models.multiscale.MultiscaleTransformer`."""
    return hasattr(model, "pyramid")


def is_spatial(model: nn.Module) -> bool:
    """Whether the condition of a prior has a token for each token of the image."""
    return not model.be_unconditional and not hasattr(model.cond_stage_model, "n_classes")
