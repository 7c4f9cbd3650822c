"""Scenes: the objects of a picture as tokens, by the rules of the original repository's conditional builders.

A position is one token, a cell of the finest square grid that the vocabulary numbers; an object is its class and the
positions of two corners of its box, or of its centre; a scene is a fixed number of objects, padded, and perhaps the
corners of the crop. Source: ``taming/data/conditional_builder`` and the two ``*_scene_images_transformer`` configs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tamingfast.errors import UserError, nearest

Box = tuple[float, float, float, float]  # left, top, width, height, as shares of a picture's width and height

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
#: What may be said of an object beside its class; bit i of a number that the classes are multiplied with.
ATTRIBUTES = ("group", "occluded", "depiction", "inside")
#: By how many pixels a box may reach over the border, as those of COCO do; what does is cut off.
TOLERANCE = 1.0


@dataclass(frozen=True)
class Thing:
    """An object: the number of its class, its box, and those of `ATTRIBUTES` that hold."""

    label: int
    box: Box
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """The objects of a picture, and which part of it is shown on a canvas of ``shape`` (height, width) in pixels."""

    things: tuple[Thing, ...]
    shape: tuple[int, int]
    region: Box = WHOLE

    def fitted(self, height: int, width: int) -> Scene:
        """What a canvas of so many pixels shows when the picture is scaled to cover it and cut at the centre."""
        scale = max(height / self.shape[0], width / self.shape[1])
        tall, wide = height / (self.shape[0] * scale), width / (self.shape[1] * scale)
        return Scene(self.things, (height, width), ((1 - wide) / 2, (1 - tall) / 2, wide, tall))


@dataclass(frozen=True)
class Rule:
    """How objects become tokens.

    Attributes:
        classes: their names.
        tokens: size of the vocabulary: positions are below its root squared, and its last entry stands for no object.
        objects: at most so many; where there are more, the largest are kept.
        corners: two corners of the box for each, else its centre.
        crop_tokens: boxes are relative to the whole picture and two more tokens tell the crop's corners; else boxes are
            relative to the crop and are cut at its border.
        attributes: those of `ATTRIBUTES` that are told, as part of the class.
    """

    classes: tuple[str, ...]
    tokens: int
    objects: int = 30
    corners: bool = True
    crop_tokens: bool = True
    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.attributes:
            if name not in ATTRIBUTES:
                hint = nearest(str(name), ATTRIBUTES) or f"; valid are {', '.join(ATTRIBUTES)}"
                raise UserError(f"attributes has {name!r}, which is unknown{hint}")
        bits = sum(1 << ATTRIBUTES.index(name) for name in self.attributes)
        if len(self.classes) * (bits + 1) > self.none:
            raise UserError(
                f"{len(self.classes)} classes with {len(self.attributes)} attributes need "
                f"{len(self.classes) * (bits + 1)} tokens and one for none, but there are {self.tokens}: use fewer "
                "classes or a larger codebook"
            )

    @property
    def none(self) -> int:
        """The token of an object that is not there."""
        return self.tokens - 1

    @property
    def sections(self) -> int:
        """Positions along a side."""
        return math.isqrt(self.tokens)

    @property
    def width(self) -> int:
        """Tokens of an object."""
        return 3 if self.corners else 2

    @property
    def length(self) -> int:
        """Tokens of a scene."""
        return self.objects * self.width + 2 * self.crop_tokens

    def position(self, x: float, y: float) -> int:
        """The token of a place in the unit square."""
        last = self.sections - 1
        return round(y * last) * self.sections + round(x * last)

    def place(self, token: int) -> tuple[float, float]:
        """The place (x, y) that a position's token stands for."""
        row, column = divmod(token, self.sections)
        return column / max(1, self.sections - 1), row / max(1, self.sections - 1)

    def encode(self, things: Iterable[Thing], crop: Box = WHOLE, flipped: bool = False) -> np.ndarray:
        """int64 (length,): the objects that the ``crop`` of a picture shows, in their order, mirrored if ``flipped``.

        The original cuts boxes on the left and above without making them smaller where ``crop_tokens`` is false; here
        they end where they end.
        """
        shown = [(thing, _intersection(thing.box, crop)) for thing in things]
        shown = [(thing, seen) for thing, seen in shown if seen[2] > 0 and seen[3] > 0]
        by_size = sorted(range(len(shown)), key=lambda i: -shown[i][0].box[2] * shown[i][0].box[3])
        found: list[int] = []
        for i in sorted(by_size[: self.objects]):
            thing, seen = shown[i]
            box = thing.box if self.crop_tokens else _relative(seen, crop)
            box = _mirrored(box) if flipped else box
            found += [self._class_token(thing), *self._places(box)]
        found += [self.none] * (self.objects * self.width - len(found))
        if self.crop_tokens:
            found += self._corners(_mirrored(crop) if flipped else crop)
        return np.array(found, np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> tuple[list[Thing], Box | None]:
        """The objects of tokens (length,), up to the rounding of places, and the crop, None where it is not told.

        The box of an object that only a centre is known of has no width and no height.
        """
        tokens = [int(token) for token in tokens]
        crop = self._box(*tokens[-2:]) if self.crop_tokens else None
        things = []
        for first in range(0, self.objects * self.width, self.width):
            label, *places = tokens[first : first + self.width]
            if label != self.none:
                modifier, label = divmod(label, len(self.classes))
                attributes = tuple(name for i, name in enumerate(ATTRIBUTES) if modifier >> i & 1)
                things.append(Thing(label, self._box(places[0], places[-1]), attributes))
        return things, crop

    def _class_token(self, thing: Thing) -> int:
        told = (name for name in thing.attributes if name in self.attributes)
        return thing.label + len(self.classes) * sum(1 << ATTRIBUTES.index(name) for name in told)

    def _places(self, box: Box) -> list[int]:
        return self._corners(box) if self.corners else [self.position(box[0] + box[2] / 2, box[1] + box[3] / 2)]

    def _corners(self, box: Box) -> list[int]:
        return [self.position(box[0], box[1]), self.position(box[0] + box[2], box[1] + box[3])]

    def _box(self, first: int, second: int) -> Box:
        (left, top), (right, bottom) = self.place(first), self.place(second)
        return left, top, right - left, bottom - top


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return left, top, right - left, bottom - top


def inside(box: Box, other: Box) -> Box:
    """In shares of a picture, the ``box`` in shares of its part ``other``."""
    return other[0] + box[0] * other[2], other[1] + box[1] * other[3], box[2] * other[2], box[3] * other[3]


def _intersection(box: Box, other: Box) -> Box:
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right, bottom = min(box[0] + box[2], other[0] + other[2]), min(box[1] + box[3], other[1] + other[3])
    return left, top, right - left, bottom - top


def _relative(box: Box, crop: Box) -> Box:
    return (box[0] - crop[0]) / crop[2], (box[1] - crop[1]) / crop[3], box[2] / crop[2], box[3] / crop[3]


def _mirrored(box: Box) -> Box:
    return 1 - (box[0] + box[2]), box[1], box[2], box[3]


# --- files ----------------------------------------------------------------------------------------------------------


def class_names(given: Any) -> tuple[str, ...]:
    """Names of classes from a list of them, or from a text file with one a line."""
    if isinstance(given, str | os.PathLike):
        try:
            given = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"classes={given} cannot be read as a text file ({error}): give one with a class a line, or a list"
            ) from error
    names = tuple(str(name) for name in given)
    if not names or len(set(names)) < len(names):
        raise UserError(f"classes has {len(names)} names, {len(set(names))} of them different: name each class once")
    return names


def read(path: str | os.PathLike, rule: Rule) -> Scene:
    """The scene of a JSON file ``{"width": W, "height": H, "objects": [{"class": NAME, "box": [x, y, w, h]}, ...]}``.

    Boxes are in pixels of the picture, whose size the file tells. An object may have those of `ATTRIBUTES` that hold as
    ``true``, and a "center" [x, y] instead of a box where the ``rule`` asks for no more. Raises UserError naming the
    file for anything else but notes under other keys, for classes that the rule does not know and for boxes that reach
    outside.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file at {path}; give the path of a scene") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): replace it") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("objects"), list):
        raise UserError(
            f'{path} lacks the list "objects": write {{"width": W, "height": H, "objects": [{{"class": NAME, '
            '"box": [x, y, w, h]}]}'
        )
    size = content.get("width"), content.get("height")
    if not all(_is_number(side) and side >= 1 for side in size):
        raise UserError(
            f"{path} has width {size[0]} and height {size[1]}, but the size of the picture that the boxes belong to is "
            'expected: add "width" and "height" in pixels'
        )
    things = tuple(_thing(path, number, entry, size, rule) for number, entry in enumerate(content["objects"]))
    return Scene(things, (round(size[1]), round(size[0])))


def _thing(path: str | os.PathLike, number: int, entry: Any, size: tuple[float, float], rule: Rule) -> Thing:
    where = f"object {number} of {path}"
    if not isinstance(entry, Mapping) or "class" not in entry:
        raise UserError(f'{where} has no "class": write {{"class": NAME, "box": [x, y, w, h]}}')
    name = str(entry["class"])
    if name not in rule.classes:
        hint = nearest(name, rule.classes) or f"; they begin with {', '.join(rule.classes[:5])}"
        raise UserError(f"{where} is of the class {name!r}, which is not among the {len(rule.classes)} known{hint}")
    box = entry.get("box")
    if box is None and not rule.corners and isinstance(entry.get("center"), list):
        # A pixel's box around the centre, so that it has a place but no size to speak of.
        box = [*(side - 0.5 for side in entry["center"] if _is_number(side)), 1, 1]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and box[2] > 0 and box[3] > 0):
        raise UserError(f"{where} has the box {box}, but [x, y, width, height] in pixels is expected: correct it")
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if min(left, top) < -TOLERANCE or right > size[0] + TOLERANCE or bottom > size[1] + TOLERANCE:
        raise UserError(
            f"{where} has the box {box}, which reaches outside the picture of {size[0]}x{size[1]} pixels (width x "
            "height): cut it, or correct the size"
        )
    left, right = (min(max(x, 0), size[0]) / size[0] for x in (left, right))
    top, bottom = (min(max(y, 0), size[1]) / size[1] for y in (top, bottom))
    return Thing(rule.classes.index(name), (left, top, right - left, bottom - top), _attributes(where, entry))


def _attributes(where: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    for key in entry.keys() - {"class", "box", "center", *ATTRIBUTES}:
        hint = nearest(str(key), ATTRIBUTES)
        if hint:  # other keys may be notes of its maker's
            raise UserError(f"{where} has the attribute {key!r}, which is unknown{hint}")
    for name in ATTRIBUTES:
        if not isinstance(entry.get(name, False), bool):
            raise UserError(f"{where} has {name!r}: {entry[name]!r}, but true or false is expected: correct it")
    return tuple(name for name in ATTRIBUTES if entry.get(name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- pictures -------------------------------------------------------------------------------------------------------


def picture(
    things: Iterable[Thing], names: Sequence[str], shape: tuple[int, int], colors: np.ndarray, region: Box = WHOLE
) -> np.ndarray:
    """A drawing of objects with their names, uint8 (H, W, 3), in ``colors`` uint8 (classes, 3), on white.

    It shows the ``region`` of the picture that the boxes belong to; an object without a size is a dot.
    """
    height, width = shape
    drawing = Image.new("RGB", (width, height), "white")
    pen, thick = ImageDraw.Draw(drawing), max(1, min(shape) // 128)
    font = ImageFont.load_default(size=max(8, min(shape) // 20))
    for thing in things:
        color = tuple(colors[thing.label].tolist())
        left, top, wide, tall = _relative(thing.box, region)
        x, y = left * (width - 1), top * (height - 1)
        if wide > 0 or tall > 0:
            pen.rectangle([x, y, x + wide * (width - 1), y + tall * (height - 1)], outline=color, width=thick)
        else:
            pen.ellipse([x - 2 * thick, y - 2 * thick, x + 2 * thick, y + 2 * thick], fill=color)
        pen.text((x + 2 * thick, y + thick), _caption(thing, names), fill=color, font=font)
    return np.asarray(drawing)


def _caption(thing: Thing, names: Sequence[str]) -> str:
    return names[thing.label] + (f" ({', '.join(thing.attributes)})" if thing.attributes else "")
