"""The classes of a prior, by number and by name."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from tamingfast.errors import UserError, brief, nearest
from tamingfast.tasks.models import classes_of, config_of

#: A class by its number or its name, several separated by commas, or a sequence of these.
Label: TypeAlias = int | str | Sequence[int | str]
#: Names that a message lists.
_LISTED = 20


def class_names_of(model: nn.Module) -> list[str] | None:
    """The names of a class-conditional prior's classes, by label; None if its config has none.

    They stand under ``classes`` in the config of a run. Raises UserError unless there is one name for each class.
    """
    names, classes = config_of(model).get("classes"), classes_of(model)
    if names is None or classes is None:
        return None
    if not isinstance(names, list | tuple) or len(names) != classes:
        got = len(names) if isinstance(names, list | tuple) else repr(names)
        raise UserError(f"classes: got {got}, expected {classes} names in the model's config, one for each class")
    return [str(name) for name in names]


def labels_of(model: nn.Module, label: Label) -> list[int]:
    """The numbers of the classes that ``label`` names, in its order.

    A text is first taken for a name, then for a number, then for several of them separated by commas. Raises UserError
    for a class that the model does not have, with the nearest that it has.
    """
    if not isinstance(label, str | Sequence):
        try:
            label = operator.index(label)
        except TypeError as error:
            raise UserError(f"label: got {brief(label)}, expected the number or the name of a class") from error
    elif not isinstance(label, str):
        found = [number for each in label for number in labels_of(model, each)]
        if not found:
            raise UserError("label: got no class, expected at least one")
        return found
    names, classes = class_names_of(model) or [], classes_of(model) or 0
    if isinstance(label, int) and 0 <= label < classes:
        return [label]
    if isinstance(label, str):
        if label in names:
            return [names.index(label)]
        if label.isascii() and label.isdecimal() and len(label) < 10:
            return labels_of(model, int(label))
        if "," in label:
            return labels_of(model, [part.strip() for part in label.split(",")])
    got = repr(label) if isinstance(label, str) else label
    raise UserError(f"label: got class {got}, expected {_known(names, classes)}{nearest(str(label), names)}")


def _known(names: Sequence[str], classes: int) -> str:
    """The classes that a model has, for a message."""
    if not names:
        return f"0 to {classes - 1}, as the model's config has no names of its classes"
    more = f" and {len(names) - _LISTED} more, which `tamingfast inspect` lists" if len(names) > _LISTED else ""
    return f"0 to {classes - 1}, or one of {', '.join(names[:_LISTED])}{more}"
