"""Conditions of a prior: turning classes, files and photos into tokens, and tokens back into pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tamingfast.data import conditions as kinds
from tamingfast.data.conditions import Scene
from tamingfast.data.views import View
from tamingfast.errors import UserError
from tamingfast.models.condition_stages import DummyCondStage, Labelator
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.models.vqgan import VQModel
from tamingfast.sampling.schedule import make_schedule
from tamingfast.tasks.labels import Label, labels_of
from tamingfast.tasks.models import classes_of, config_of, first_stage_of, is_spatial
from tamingfast.tasks.pictures import Picture, as_image, cover, multiples_of, named
from tamingfast.tasks.sizes import grid_size, window_of, window_under

#: A spatial condition: a map over the image, float32 (H, W, C), or the objects in it.
Condition: TypeAlias = np.ndarray | Scene
#: The file of a condition; a PIL image or an integer array (H, W) or (H, W, 3), treated like a file with these pixels;
#: or a `Condition`, used as it is.
ConditionSource: TypeAlias = str | os.PathLike[str] | Image.Image | Condition


@dataclass(frozen=True)
class Given:
    """What the caller gave for one image: its condition, a photo to compute the condition from, or neither."""

    condition: ConditionSource | None = None
    condition_of: Picture | None = None

    def __post_init__(self) -> None:
        if self.condition is not None and self.condition_of is not None:
            raise UserError("condition: got condition and condition_of, expected one of them; leave one out")

    @property
    def name(self) -> str:
        """Its name in error messages."""
        if self.condition is None:
            return named(self.condition_of, "condition_of")
        return named(self.condition, "condition")

    def read(self, model: Net2NetTransformer, size: tuple[int, int] | None = None) -> Condition | None:
        """The condition, scaled to ``size`` (height, width) if given, as by `read_condition`; None if there is none."""
        if self.condition is not None:
            return read_condition(model, self.condition, size)
        if self.condition_of is not None:
            return computed_condition(model, self.condition_of, size)
        return None


def given_each(
    count: int, conditions: Sequence[ConditionSource] | None, conditions_of: Sequence[Picture] | None
) -> list[Given]:
    """One `Given` per image, in order; raises UserError unless none or all ``count`` images have a condition."""
    if conditions is not None and conditions_of is not None:
        raise UserError("conditions: got conditions and conditions_of, expected one of them; leave one out")
    found = [Given(condition=condition) for condition in conditions or ()]
    found += [Given(condition_of=photo) for photo in conditions_of or ()]
    if found and len(found) != count:
        raise UserError(
            f"conditions: got {len(found)} conditions for {count} images, expected one for each; give them in the "
            "images' order"
        )
    return found or [Given()] * count


def check_label(model: Net2NetTransformer, label: Label | None) -> None:
    """Raise UserError for a class given to a prior that has none, and for one that it does not have."""
    if label is None:
        return
    if classes_of(model) is not None:
        labels_of(model, label)
        return
    what = "unconditional" if model.be_unconditional else f"conditioned on '{model.cond_stage_key}'"
    raise UserError(f"label: got class {label}, expected none, as the model is {what}; leave it out")


def check_schedule(model: Net2NetTransformer, rows: int, columns: int, schedule: str, stride: int) -> None:
    """Raise UserError if the windows that ``model`` draws a grid in cannot be placed so; its weights are not used."""
    shape = (1, 1) if not is_spatial(model) else (1, rows, columns)
    if isinstance(model.cond_stage_model, DummyCondStage):
        shape = (*shape, _objects(model).rule.length)
    window = window_under(model, rows, columns, torch.empty(shape, device="meta", dtype=torch.int64))
    make_schedule(rows, columns, window, schedule, stride)


def conditions(model: Net2NetTransformer, count: int, label: Label | None = None) -> Tensor:
    """Condition tokens int64 (count, 1) for an unconditional or class-conditional prior.

    The images cycle through the classes of ``label`` or, without it, through all. Raises UserError for an unknown
    class, and for priors with a spatial condition.
    """
    check_label(model, label)
    if model.be_unconditional:
        return torch.full((count, 1), model.sos_token, device=model.device)
    classes = classes_of(model)
    if classes is None:
        raise UserError(
            f"condition: got none, expected one, as the model is conditioned on '{model.cond_stage_key}'; give a file "
            "with condition, or its tokens to tamingfast.sampling.sample_grid"
        )
    chosen = list(range(classes)) if label is None else labels_of(model, label)
    labels = torch.tensor(chosen, dtype=torch.int64, device=model.device)
    labels = labels[torch.arange(count, device=model.device) % len(chosen)][:, None]
    return labels + cast(Labelator, model.cond_stage_model).first


def kind_of(model: Net2NetTransformer) -> kinds.Kind:
    """The kind of condition that a prior was trained with, from its data settings or else from its condition key.

    Raises UserError for priors without a spatial condition, and for kinds that are not in
    `tamingfast.data.conditions.KINDS`.
    """
    key = model.cond_stage_key
    if not is_spatial(model):
        what = "nothing" if model.be_unconditional else f"'{key}'"
        raise UserError(f"condition: got one, expected none, as the model is conditioned on {what}; leave it out")
    data = config_of(model).get("data") or {}
    data = data.get("condition") or data  # of a run on objects of the original's data sets
    if data.get("kind") is not None:
        return kinds.make(data["kind"], {name: data.get(name) for name in kinds.SETTINGS})
    if key not in kinds.KINDS:
        raise UserError(
            f"condition: got a model conditioned on '{key}', whose config does not say how to make that, expected one "
            f"of {', '.join(kinds.KINDS)}; give the condition's tokens to tamingfast.sampling.sample_grid"
        )
    stage = model.cond_stage_model
    labels = stage.encoder.conv_in.in_channels if key == "segmentation" and isinstance(stage, VQModel) else None
    return kinds.make(key, {"labels": labels})


def read_condition(
    model: Net2NetTransformer, source: ConditionSource, size: tuple[int, int] | None = None
) -> Condition:
    """Read a condition as float32 (H, W, C), or as a scene of objects with ``shape`` (H, W).

    It is scaled to cover ``size`` (height, width) and cut at the centre; without ``size`` it is only cut, to multiples
    of f. Raises UserError as `tamingfast.data.conditions.Kind.read` does.
    """
    kind = kind_of(model)
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.dtype != np.float32):
        with tempfile.TemporaryDirectory() as folder:
            return _read(model, kind, _saved(source, Path(folder)), size)
    if isinstance(source, np.ndarray):
        if source.ndim != 3:
            raise UserError(f"condition: got float32 of shape {source.shape}, expected (H, W, C)")
        return _centre(source, *(size or _multiples(model, source.shape[0], source.shape[1], "condition")))
    if isinstance(source, Scene):
        return source.fitted(*(size or _multiples(model, *source.shape, "condition")))
    return _read(model, kind, source, size)


def _saved(source: Image.Image | np.ndarray, folder: Path) -> Path:
    path = folder / "condition.png"
    image = source
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biu" or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise UserError(
                f"condition: got {image.dtype} of shape {image.shape}, expected integers (H, W) or (H, W, 3), or "
                "float32 (H, W, C)"
            )
        if not image.size or image.min() < 0 or image.max() > 65535:
            got = f"{image.min()} to {image.max()}" if image.size else f"shape {image.shape}"
            raise UserError(f"condition: got {got}, expected integers from 0 to 65535")
        wide = image.max(initial=0) > 255
        image = Image.fromarray(image.astype(np.uint16 if wide else np.uint8))
    image.save(path)
    return path


def _read(
    model: Net2NetTransformer, kind: kinds.Kind, path: str | os.PathLike[str], size: tuple[int, int] | None
) -> Condition:
    if isinstance(kind, kinds.Objects):
        scene = kind.read(path)
        return scene.fitted(*(size or _multiples(model, *scene.shape, path)))
    assert isinstance(kind, kinds.Map)  # the only other kinds are objects
    width, height = kind.own_size(path)
    if size is None:
        size = _multiples(model, height, width, path)
    else:
        scale = max(size[0] / height, size[1] / width)
        height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return kind.read(path, (width, height), View.centre((width, height), size[1], size[0]))


def computed_condition(model: Net2NetTransformer, photo: Picture, size: tuple[int, int] | None = None) -> np.ndarray:
    """Compute the condition float32 (H, W, C) of a photo; ``size`` as in `read_condition`.

    Raises UserError for kinds that cannot be computed from a photo.
    """
    kind = kind_of(model)
    if not isinstance(kind, kinds.Computed):
        raise UserError(
            f"condition_of: got a photo, expected none, as '{kind.key}' cannot be computed from a photo; give its "
            "file with condition"
        )
    image = as_image(photo)
    if size is not None:
        return kind.compute(cover(image, *size))
    pixels = np.asarray(image)
    height, width = _multiples(model, pixels.shape[0], pixels.shape[1], named(photo, "condition_of"))
    return kind.compute(np.ascontiguousarray(_centre(pixels, height, width)))


def own_condition(model: Net2NetTransformer, size: tuple[int, int], photo: Picture | None = None) -> np.ndarray | None:
    """The condition float32 (H, W, C) to use if none is given; None for priors without a spatial condition.

    Coordinates follow from ``size`` (height, width); other kinds are computed from ``photo``, cut to that size. Raises
    UserError for conditions that can only be given.
    """
    if not is_spatial(model):
        return None
    if model.cond_stage_key == kinds.Coordinates.key:
        return kinds.Coordinates().whole((size[1], size[0]))
    computable = isinstance(kind_of(model), kinds.Computed)
    if computable and photo is not None:
        return computed_condition(model, photo, size)
    raise UserError(
        f"condition: got none, expected one of {size[0]}x{size[1]} pixels, as the model is conditioned on "
        f"'{model.cond_stage_key}'; give its file with condition"
        f"{', or a photo to compute it from with condition_of' if computable else ''}"
    )


def tokens_under(
    model: Net2NetTransformer, count: int, condition: Condition | None, label: Label | None = None
) -> Tensor:
    """Condition tokens for ``count`` images of one spatial condition or, if that is None, of a class or nothing."""
    if condition is None:
        return conditions(model, count, label)
    check_label(model, label)
    return condition_tokens(model, condition, count)


def tokens_of_each(model: Net2NetTransformer, found: Sequence[Condition], count: int, label: Label | None) -> Tensor:
    """Condition tokens for ``count`` images, one spatial condition each or, without any, all of ``label``."""
    if not found:
        return tokens_under(model, count, None, label)
    return torch.cat([tokens_under(model, 1, condition, label) for condition in found])


def conditions_of_each(
    model: Net2NetTransformer, given: Sequence[Given], x: Tensor, whole: bool = False
) -> list[Condition]:
    """The spatial condition of each picture of ``x`` (B, 3, H, W), given or else from `own_condition`.

    It is scaled to cover the picture and cut at the centre; if the pictures are ``whole``, a condition of their own
    size is only cut, as they were. Empty for priors without a spatial condition.
    """
    size, found = (x.shape[2], x.shape[3]), []
    for one, picture in zip(given, x, strict=True):
        condition = one.read(model) if whole else None
        if condition is None or tuple(condition.shape[:2]) != size:
            condition = one.read(model, size)
        if condition is None:
            condition = own_condition(model, size, picture)
        found += [] if condition is None else [condition]
    return found


def condition_tokens(model: Net2NetTransformer, condition: Condition, count: int) -> Tensor:
    """Tokens int64 (count, rows, columns) of a condition (H, W, C), the same for each of ``count`` images.

    For a scene the shape is (count, rows, columns, c): a cell has the prefix of the window whose upper left corner it
    is.
    """
    rows, columns = grid_size(model, *condition.shape[:2])
    if isinstance(condition, Scene):
        kind = _objects(model)
        window = window_of(model, rows, columns, kind.rule.length)
        tokens = torch.from_numpy(kind.windows(condition, rows, columns, window)).to(model.device)
        return tokens[None].expand(count, -1, -1, -1)
    c = torch.from_numpy(condition).to(model.device).permute(2, 0, 1)[None].contiguous()
    whole = model.downsample_cond_size > -1
    tokens = (model.encode_to_c(c)[1] if whole else model.encode_condition(c)).flatten(1)
    if tokens.shape[1] != rows * columns:
        raise UserError(
            f"condition: got {tokens.shape[1]} tokens, expected the image's {rows * columns}, as windows crop both "
            "alike; give the condition's tokens to tamingfast.sampling.sample_grid"
        )
    return tokens.view(1, rows, columns).expand(count, -1, -1).contiguous()


def condition_picture(model: Net2NetTransformer, condition: Condition) -> Tensor:
    """A picture of a condition (H, W, C) or a scene: float32 (1, 3, H, W) in [-1, 1]."""
    pixels = _objects(model).picture(condition) if isinstance(condition, Scene) else kind_of(model).picture(condition)
    return _as_batch(pixels)


@torch.no_grad()
def decoded_condition(model: Net2NetTransformer, tokens: Tensor) -> Tensor:
    """A picture of a spatial condition from its tokens (1, rows, columns, ...): float32 (1, 3, H, W) in [-1, 1]."""
    if tokens.ndim == 4:
        factor = first_stage_of(model).factor
        shape = (tokens.shape[1] * factor, tokens.shape[2] * factor)
        return _as_batch(_objects(model).picture_of_tokens(tokens[0].cpu().numpy(), shape))
    c = model.decode_condition(tokens.to(model.device))
    return condition_picture(model, c[0].permute(1, 2, 0).cpu().numpy()).clamp(-1, 1)


def condition_pictures(model: Net2NetTransformer, condition: Condition | None, cond: Tensor) -> tuple[Tensor, ...]:
    """A picture (1, 3, H, W) of the condition; if that is None, of the first image's condition tokens in ``cond``.

    Empty for priors without a spatial condition.
    """
    if condition is not None:
        return (condition_picture(model, condition),)
    return (decoded_condition(model, cond[:1]),) if cond.ndim > 2 else ()


def _objects(model: Net2NetTransformer) -> kinds.Objects:
    kind = kind_of(model)
    if not isinstance(kind, kinds.Objects):
        raise UserError(f"condition: got objects, expected '{kind.key}', which the model is conditioned on")
    return kind


def _as_batch(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _multiples(model: Net2NetTransformer, height: int, width: int, name: str | os.PathLike[str]) -> tuple[int, int]:
    return multiples_of(first_stage_of(model).factor, height, width, name)


def _centre(array: np.ndarray, height: int, width: int) -> np.ndarray:
    if array.shape[0] < height or array.shape[1] < width:
        raise UserError(f"condition: got {array.shape[0]}x{array.shape[1]} pixels, expected at least {height}x{width}")
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]
