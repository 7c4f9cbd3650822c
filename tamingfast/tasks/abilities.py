"""What a model can be asked for: `abilities_of`, for programs that offer it to people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import nn

from tamingfast.data import conditions as kinds
from tamingfast.data.conditions.palette import label_colors
from tamingfast.errors import UserError
from tamingfast.models.condition_stages import Labelator
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.tasks.conditioning import kind_of
from tamingfast.tasks.labels import class_names_of
from tamingfast.tasks.models import check_prior, check_windowed, classes_of, first_stage_of, is_spatial
from tamingfast.tasks.sizes import fixed_size, trained_size


@dataclass(frozen=True)
class Form:
    """The condition that a prior draws from.

    Attributes:
        name: as in ``data.kind``.
        suffixes: endings of its files; empty if no file describes it.
        computable: whether it can be computed from a photo.
        labels: name and colour (red, green, blue) of each label of a label map or class of objects, else empty.
        objects: the largest number of objects in a scene; 0 for conditions that are maps.
    """

    name: str
    suffixes: tuple[str, ...]
    computable: bool
    labels: tuple[tuple[str, tuple[int, int, int]], ...]
    objects: int


@dataclass(frozen=True)
class Abilities:
    """What a model can be asked for.

    Attributes:
        factor: pixels per token along one side; sizes are multiples of it.
        size: (height, width) in pixels that it was trained on; None if its config does not say.
        fixed: whether this is the only size.
        no_drawing: why it cannot `sample`, as in the error that this would raise; None if it can.
        no_editing: the same of `edit` and `outpaint`.
        classes: the names of its classes, or their numbers as text; empty without classes.
        guides: whether it has a null class, and takes ``cfg``.
        scales: the names of the scales of a multiscale prior, coarsest first; else empty.
        condition: the condition that lies over the image; None without one.
    """

    factor: int
    size: tuple[int, int] | None
    fixed: bool
    no_drawing: str | None
    no_editing: str | None
    classes: tuple[str, ...]
    guides: bool
    scales: tuple[str, ...]
    condition: Form | None


def abilities_of(model: nn.Module) -> Abilities:
    """What a model, or the outline of one, can be asked for. Raises UserError for a model without a first stage."""
    factor, size = first_stage_of(model).factor, trained_size(model)
    no_drawing, no_editing = _refusal(check_prior, model), _refusal(check_windowed, model)
    if no_drawing is not None:
        return Abilities(factor, size, False, no_drawing, no_editing, (), False, (), None)
    prior = check_prior(model)
    count = classes_of(prior) or 0
    names = class_names_of(prior) or [str(number) for number in range(count)]
    guides = count > 0 and cast(Labelator, prior.cond_stage_model).null is not None
    scales = tuple(prior.pyramid.names) if isinstance(prior, MultiscaleTransformer) else ()
    fixed = bool(scales) or fixed_size(prior) is not None or first_stage_of(prior).levels > 1
    form = _form(prior) if is_spatial(prior) else None
    return Abilities(factor, size, fixed, no_drawing, no_editing, tuple(names), guides, scales, form)


def _refusal(check: Callable[[nn.Module], object], model: nn.Module) -> str | None:
    """What ``check(model)`` says against the model."""
    try:
        check(model)
    except UserError as error:
        return str(error)
    return None


def _form(prior: Net2NetTransformer) -> Form:
    kind = kind_of(prior)
    names: list[str] = []
    if isinstance(kind, kinds.Objects):
        names = list(kind.rule.classes)
    elif isinstance(kind, kinds.Segmentation | kinds.Superpixels):
        names = [str(label) for label in range(kind.labels)]
    colors = ((label_colors(len(names)) + 1) * 127.5).round().astype(int).tolist() if names else []
    labels = tuple((name, (red, green, blue)) for name, (red, green, blue) in zip(names, colors, strict=True))
    objects = kind.objects if isinstance(kind, kinds.Objects) else 0
    computable, name = isinstance(kind, kinds.Computed), str(kinds.settings_of(kind)["kind"])
    return Form(name, kind.suffixes, computable, labels, objects)
