"""The kinds of condition by name. A new kind is one class and one line of `KINDS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tamingfast.data.conditions.keypoints import Keypoints
from tamingfast.data.conditions.kind import Kind
from tamingfast.data.conditions.maps import Coordinates, Depth, Edges, LowResolution, Segmentation, Superpixels
from tamingfast.data.conditions.objects import Boxes, Centers
from tamingfast.errors import UserError, brief, nearest

#: Values of ``data.kind``.
KINDS: dict[str, type[Kind]] = {
    "segmentation": Segmentation,
    "superpixels": Superpixels,
    "depth": Depth,
    "keypoints": Keypoints,
    "edges": Edges,
    "lowres": LowResolution,
    "coord": Coordinates,
    "boxes": Boxes,
    "centers": Centers,
}

#: Names of the settings of all kinds.
SETTINGS = tuple(sorted({field.name for kind in KINDS.values() for field in dataclasses.fields(kind)}))

#: Keys of conditions with a first stage of their own; a key is also the value of ``prior.condition``.
IMAGE_KEYS = tuple(dict.fromkeys(kind.key for kind in KINDS.values() if kind.own_first_stage))
#: Keys of all conditions with one token for each of the image's tokens.
SPATIAL_KEYS = tuple(dict.fromkeys(kind.key for kind in KINDS.values() if kind.spatial))
#: For conditions that are tokens already: the value of ``prior.condition`` and ``data.kind`` -> key in a batch.
TOKEN_KEYS = {name: kind.key for name, kind in KINDS.items() if not kind.spatial}


def make(name: str, options: Mapping[str, Any]) -> Kind:
    """The kind ``name`` with those ``options`` that are not None; UserError for unknown names and options."""
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"kind: got {brief(name)}, expected one of {', '.join(KINDS)}{nearest(str(name), KINDS)}")
    fields = {field.name: field for field in dataclasses.fields(KINDS[name])}
    values = {key: value for key, value in options.items() if value is not None}
    for key in values:
        if key not in fields:
            known = f"one of {', '.join(fields)}" if fields else "none"
            raise UserError(f"{key}: got a setting that the condition {name} does not have, expected {known}")
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in values:
            what = field.metadata["description"]
            raise UserError(f"{key}: got nothing, expected {what}, which the condition {name} needs; add {key}=...")
    return KINDS[name](**values)


def settings_of(kind: Kind) -> dict[str, Any]:
    """The ``data:`` settings that describe ``kind``: its name under "kind", and its options."""
    name, made = next((name, made) for name, made in KINDS.items() if isinstance(kind, made))
    return {"kind": name} | {field.name: getattr(kind, field.name) for field in dataclasses.fields(made)}
