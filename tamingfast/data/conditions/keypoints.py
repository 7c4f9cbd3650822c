"""Keypoints of people, drawn as skeletons."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from tamingfast.data.conditions import reading
from tamingfast.data.conditions.kind import FromFile, Size
from tamingfast.data.conditions.palette import hues
from tamingfast.data.rgb import unit_scale
from tamingfast.data.views import View
from tamingfast.errors import UserError, brief

Limb = tuple[int, int]


def _limbs(joined: str) -> list[Limb]:
    pairs = (limb.split("-") for limb in joined.split())
    return [(int(a), int(b)) for a, b in pairs]


#: Number of points per person -> the pairs of points that a limb joins: 17 points are COCO's, 18 and 25 OpenPose's.
SKELETONS = {
    17: _limbs("15-13 13-11 16-14 14-12 11-12 5-11 6-12 5-6 5-7 6-8 7-9 8-10 1-2 0-1 0-2 1-3 2-4 3-5 4-6"),
    18: _limbs("1-2 1-5 2-3 3-4 5-6 6-7 1-8 8-9 9-10 1-11 11-12 12-13 1-0 0-14 14-16 0-15 15-17"),
    25: _limbs(
        "1-8 1-2 1-5 2-3 3-4 5-6 6-7 8-9 9-10 10-11 8-12 12-13 13-14 1-0 0-15 15-17 0-16 16-18 14-19 19-20 14-21 11-22 "
        "22-23 11-24"
    ),
}
#: Sides of the image that a point may be away from it; drawing a line takes as long as it is.
_FAR = 10
_FORM = '{"width": W, "height": H, "people": [[[x, y], ...]]}'


@dataclass(frozen=True)
class Keypoints(FromFile):
    """Skeletons of people, drawn in colours on black: (H, W, 3) in [-1, 1].

    A JSON file gives "width" and "height" of the image that the coordinates refer to, and "people": for each person a
    list of points [x, y] or [x, y, visibility], or {"pose_keypoints_2d": [...]} or {"keypoints": [...]} with 3 numbers
    per point, as OpenPose and COCO write them. Points with visibility 0 are not drawn. "skeleton" lists the pairs of
    points, counted from 0, that a line joins; without it, people with 17 (COCO), 18 or 25 points (OpenPose) get the
    usual one. A mirrored drawing keeps each limb's colour.
    """

    key: ClassVar[str] = "keypoints"
    suffixes: ClassVar[tuple[str, ...]] = (".json",)

    def raw(self, path: str | os.PathLike, size: Size | None = None, view: View | None = None) -> np.ndarray:
        listed, (wide, tall), content = reading.entries(path, "people", _FORM)
        people = [_person(path, number, entry) for number, entry in enumerate(listed)]
        own = (round(wide), round(tall))
        width, height = size or own
        reading.check_shape(path, own, (width, height))
        _check_inside(path, people, own)
        view = view or View.whole((width, height))
        drawing = Image.new("RGB", (view.width, view.height))
        pen, thick = ImageDraw.Draw(drawing), max(1, round(min(width, height) / 64))
        for points in people:
            limbs = _skeleton(path, content, points)
            # Whole pixels, as Pillow makes them, so that lines do not move with the view.
            scaled = np.trunc(points[:, :2] * (np.array([width, height]) / own)) - (view.left, view.top)
            places = [(x, y) for x, y in scaled.tolist()]
            for (a, b), color in zip(limbs, hues(len(limbs)), strict=True):
                if points[a, 2] > 0 and points[b, 2] > 0:
                    pen.line([places[a], places[b]], fill=color, width=thick)
        return view.turned(np.asarray(drawing))

    def own_size(self, path: str | os.PathLike) -> Size:
        _, (wide, tall), _ = reading.entries(path, "people", _FORM)
        return round(wide), round(tall)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return unit_scale(raw)


def _person(path: str | os.PathLike, number: int, entry: Any) -> np.ndarray:
    """float64 (points, 3): x, y, visibility."""
    if isinstance(entry, Mapping):
        entry = entry.get("pose_keypoints_2d") or entry.get("keypoints") or []
    try:
        if np.ndim(entry[0]) == 0:
            points = np.reshape(np.array(entry, np.float64), (-1, 3))
            valid = True
        else:
            points = np.array([[*point, 1][:3] for point in entry], np.float64)
            valid = all(len(point) in (2, 3) for point in entry)
    except (TypeError, ValueError, LookupError, OverflowError):
        valid = False
    if not valid or not len(points) or not np.isfinite(points).all():
        raise UserError(
            f"{path}: got person {number} without a list of finite points, expected [[x, y], ...] or "
            "[[x, y, visibility], ...]"
        )
    return points


def _check_inside(path: str | os.PathLike, people: Sequence[np.ndarray], size: Size) -> None:
    """Raise UserError when all visible points are outside the image, or one is far; people may be outside in part."""
    visible = [points[points[:, 2] > 0, :2] for points in people]
    far = [np.abs(seen).max(initial=0) for seen in visible if np.abs(seen).max(initial=0) > _FAR * max(size)]
    if far:
        raise UserError(
            f"{path}: got a point at {far[0]:g}, expected points in or near the image of {size[0]}x{size[1]} pixels "
            "(width x height); correct the points or the size"
        )
    if any(map(len, visible)) and not any(((seen >= 0) & (seen <= size)).all(1).any() for seen in visible):
        raise UserError(
            f"{path}: got all points outside the image of {size[0]}x{size[1]} pixels (width x height), expected at "
            "least one inside; correct the points or the size"
        )


def _skeleton(path: str | os.PathLike, content: Mapping[str, Any], points: np.ndarray) -> Sequence[Limb]:
    limbs = content.get("skeleton") or SKELETONS.get(len(points))
    pairs = isinstance(limbs, Sequence) and all(isinstance(limb, Sequence) and len(limb) == 2 for limb in limbs)
    if limbs is None:
        raise UserError(
            f'{path}: got a person with {len(points)} points and no "skeleton", expected one for any number of points '
            f"but {', '.join(map(str, SKELETONS))}; add the pairs of points to join"
        )
    if not pairs or not all(type(end) is int and 0 <= end < len(points) for limb in limbs for end in limb):
        raise UserError(
            f'{path}: got the "skeleton" {brief(limbs)}, expected a list of pairs of points 0 to '
            f"{len(points) - 1}; correct or remove it"
        )
    return [(a, b) for a, b in limbs]
