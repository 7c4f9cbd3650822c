"""Conditions of a prior: from classes, files and photos to tokens, and back to pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast.data.conditions.scenes import Scene
from tamingfast.engines import bands
from tamingfast.errors import UserError
from tamingfast.tasks.models import first_stage_of, is_spatial
from tamingfast.tasks.pictures import cover, read
from tamingfast.tasks.sizes import grid_size, window_of

if TYPE_CHECKING:
    from tamingfast.data.conditions.kinds import Kind


def conditions(model: nn.Module, count: int, label: int | None = None) -> Tensor:
    """Condition tokens (count, 1) of an unconditional or class-conditional prior.

    Without ``label`` the classes take turns. Raises UserError for labels that the model does not know and for priors
    whose condition is an image.
    """
    if model.be_unconditional:
        if label is not None:
            raise UserError(f"got class {label}, but the model is unconditional; leave the class out")
        return torch.full((count, 1), model.sos_token, device=model.device)
    classes = getattr(model.cond_stage_model, "n_classes", None)
    if classes is None:
        raise UserError(
            f"the model is conditioned on '{model.cond_stage_key}', which a class cannot stand for; give a --condition "
            "FILE, or tamingfast.sampling.sample_grid the condition's tokens"
        )
    if label is not None and not 0 <= label < classes:
        raise UserError(f"got class {label}; the model knows 0 to {classes - 1}")
    labels = torch.arange(count) % classes if label is None else torch.full((count,), label)
    return labels[:, None].to(model.device)


def kind_of(model: nn.Module) -> Kind:
    """The kind of condition that a prior was trained with, from its data settings or, without them, its key.

    Raises UserError for priors without a condition that an image could be, and for conditions that we cannot make.
    """
    from tamingfast.data.conditions import kinds

    key = getattr(model, "cond_stage_key", None)
    if not is_spatial(model):
        raise UserError(f"the model is conditioned on {'nothing' if key == 'image' else f'{key!r}'}; give no condition")
    data = (getattr(model, "config", None) or {}).get("data") or {}
    if data.get("kind") is not None:
        return kinds.make(data["kind"], {name: data.get(name) for name in kinds.SETTINGS})
    if key not in kinds.KINDS:
        raise UserError(
            f"the model is conditioned on '{key}', and its config does not say how that is made; call "
            "tamingfast.sampling.sample_grid with the condition's tokens"
        )
    labels = model.cond_stage_model.encoder.conv_in.in_channels if key == "segmentation" else None
    return kinds.make(key, {"labels": labels})


def read_condition(
    model: nn.Module, path: str | os.PathLike, size: tuple[int, int] | None = None
) -> np.ndarray | Scene:
    """The condition (H, W, C) that a file holds, float32, or the scene, whose shape is (H, W).

    Scaled to cover ``size`` (height, width) and cut at the centre, or, without one, as large as it is, cut to multiples
    of f. Raises UserError as `tamingfast.data.conditions.kinds.Kind.read`.
    """
    from tamingfast.data.conditions.kinds import Objects

    kind = kind_of(model)
    if isinstance(kind, Objects):
        scene = kind.read(path)
        return scene.fitted(*(size or _multiples(model, *scene.shape, path)))
    found = kind.read(path)
    if size is None:
        return _centre(found, *_multiples(model, *found.shape[:2], path))
    scale = max(wanted / side for wanted, side in zip(size, found.shape[:2], strict=True))
    if scale != 1:
        covering = [max(wanted, round(side * scale)) for wanted, side in zip(size, found.shape[:2], strict=True)]
        found = kind.read(path, (covering[1], covering[0]))
    return _centre(found, *size)


def computed_condition(model: nn.Module, photo: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """The condition (H, W, C) of a photo, float32, for kinds that can be computed; sizes as in `read_condition`."""
    from tamingfast.data.conditions.kinds import Computed

    kind = kind_of(model)
    if not isinstance(kind, Computed):
        raise UserError(f"the condition '{kind.key}' cannot be computed from a photo; give a --condition FILE of it")
    image = read(Path(photo))
    if size is not None:
        return kind.compute(cover(image, *size))
    pixels = np.asarray(image)
    return kind.compute(np.ascontiguousarray(_centre(pixels, *_multiples(model, *pixels.shape[:2], photo))))


def own_condition(model: nn.Module, size: tuple[int, int], photo: str | os.PathLike | None = None) -> np.ndarray | None:
    """The condition (H, W, C) that nobody needs to give, None for priors without a spatial one.

    It follows from the ``size`` (height, width) alone, or is computed from the ``photo``, cut to that size. Raises
    UserError for conditions that only a file can tell.
    """
    from tamingfast.data.conditions.kinds import Computed, Coordinates

    if not is_spatial(model):
        return None
    if model.cond_stage_key == Coordinates.key:
        return Coordinates().whole((size[1], size[0]))
    computable = isinstance(kind_of(model), Computed)
    if computable and photo is not None:
        return computed_condition(model, photo, size)
    photo_too = ", or --condition-of PHOTO to compute it from," if computable else ""
    raise UserError(
        f"the model is conditioned on '{model.cond_stage_key}'; give --condition FILE{photo_too} of "
        f"{size[0]}x{size[1]} pixels"
    )


def condition_tokens(model: nn.Module, condition: np.ndarray | Scene, count: int) -> Tensor:
    """Tokens (count, rows, columns) of a condition (H, W, C), the same for each of ``count`` images.

    Of a scene (count, rows, columns, c): those that stand before the window which begins there.
    """
    rows, columns = grid_size(model, *condition.shape[:2])
    if isinstance(condition, Scene):
        kind = kind_of(model)
        window = window_of(model, rows, columns, kind.rule.length)
        tokens = torch.from_numpy(kind.windows(condition, rows, columns, window)).to(model.device)
        return tokens[None].expand(count, -1, -1, -1)
    c = torch.from_numpy(condition).to(model.device).permute(2, 0, 1)[None].contiguous()
    whole = model.downsample_cond_size > -1
    tokens = (model.encode_to_c(c)[1] if whole else bands.encode_grid(model.cond_stage_model, c)).flatten(1)
    if tokens.shape[1] != rows * columns:
        raise UserError(
            f"the condition has {tokens.shape[1]} tokens and the image {rows * columns}, but windows need as many of "
            "both; call tamingfast.sampling.sample_grid with the condition's tokens"
        )
    return tokens.view(1, rows, columns).expand(count, -1, -1).contiguous()


def condition_picture(model: nn.Module, condition: np.ndarray | Scene) -> Tensor:
    """What to show of a condition (H, W, C) or a scene: (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(kind_of(model).picture(condition)).permute(2, 0, 1)[None]


@torch.no_grad()
def decoded_condition(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the prior sees of a spatial condition, from its tokens (1, rows, columns, ...): (1, 3, H, W) in [-1, 1]."""
    if tokens.ndim == 4:
        factor = first_stage_of(model).factor
        shape = (tokens.shape[1] * factor, tokens.shape[2] * factor)
        picture = kind_of(model).picture_of_tokens(tokens[0].cpu().numpy(), shape)
        return torch.from_numpy(picture).permute(2, 0, 1)[None]
    c = model.decode_condition(tokens.to(model.device))
    return condition_picture(model, c[0].permute(1, 2, 0).cpu().numpy()).clamp(-1, 1)


def _multiples(model: nn.Module, height: int, width: int, path: str | os.PathLike) -> tuple[int, int]:
    factor = first_stage_of(model).factor
    if min(height, width) < factor:
        raise UserError(f"{path} is {height}x{width} pixels, but one token is {factor}: give a larger one, or --size")
    return height // factor * factor, width // factor * factor


def _centre(array: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]
