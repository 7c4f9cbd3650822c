"""Scenes: the objects of a picture as tokens, following the original repository's conditional builders.

A position is one token: a cell of the finest square grid that the vocabulary can number. An object is its class and the
positions of two corners of its box, or of its centre. A scene is a fixed number of objects, padded, optionally followed
by the corners of the crop. Source: ``taming/data/conditional_builder`` and the two ``*_scene_images_transformer``
configs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tamingfast.data.checks import is_number
from tamingfast.data.conditions.reading import entries
from tamingfast.errors import UserError, brief, nearest
from tamingfast.files import lines_of, read_text

Box = tuple[float, float, float, float]  # left, top, width, height, as fractions of a picture's width and height

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
#: What an object can have besides its class. Attribute i is bit i of m in its class token, label + m * len(classes).
ATTRIBUTES = ("group", "occluded", "depiction", "inside")
#: How many pixels a box may reach over the border, as COCO's do; the part outside is cut off.
TOLERANCE = 1.0

_FORM = '{"width": W, "height": H, "objects": [{"class": NAME, "box": [x, y, w, h]}, ...]}'


@dataclass(frozen=True)
class Thing:
    """An object: the index of its class, its box, and the `ATTRIBUTES` that it has."""

    label: int
    box: Box
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """The objects of a picture, and the ``region`` of it that a canvas of ``shape`` (height, width) in pixels shows."""

    things: tuple[Thing, ...]
    shape: tuple[int, int]
    region: Box = WHOLE

    def fitted(self, height: int, width: int) -> Scene:
        """The same picture scaled to cover a canvas of height x width pixels and cut at the centre."""
        scale = max(height / self.shape[0], width / self.shape[1])
        tall, wide = height / (self.shape[0] * scale), width / (self.shape[1] * scale)
        return Scene(self.things, (height, width), ((1 - wide) / 2, (1 - tall) / 2, wide, tall))


@dataclass(frozen=True)
class Rule:
    """How objects become tokens.

    Attributes:
        classes: the class names.
        tokens: size of the vocabulary. Positions are numbered below the square of its integer root; its last entry
            means "no object".
        objects: the maximum number of objects; the largest are kept.
        corners: whether an object is encoded by two corners of its box; otherwise by its centre.
        crop_tokens: whether boxes are relative to the whole picture, with two more tokens for the corners of the crop;
            otherwise boxes are relative to the crop and cut at its border.
        attributes: the `ATTRIBUTES` that are encoded, as part of the class token.
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
                hint = nearest(str(name), ATTRIBUTES)
                raise UserError(f"attributes: got {name!r}, expected some of {', '.join(ATTRIBUTES)}{hint}")
        needed = len(self.classes) * (sum(1 << ATTRIBUTES.index(name) for name in self.attributes) + 1)
        if needed > self.none:
            raise UserError(
                f"tokens: got {self.tokens}, expected at least {needed + 1} for {len(self.classes)} classes with "
                f"{len(self.attributes)} attributes and the token for no object; use fewer classes or a larger codebook"
            )

    @property
    def none(self) -> int:
        """The token that pads scenes with fewer objects."""
        return self.tokens - 1

    @property
    def sections(self) -> int:
        """Positions along a side."""
        return math.isqrt(self.tokens)

    @property
    def width(self) -> int:
        """Tokens per object."""
        return 3 if self.corners else 2

    @property
    def length(self) -> int:
        """Tokens per scene."""
        return self.objects * self.width + 2 * self.crop_tokens

    def position(self, x: float, y: float) -> int:
        """The token of a point in the unit square."""
        last = self.sections - 1
        return round(y * last) * self.sections + round(x * last)

    def place(self, token: int) -> tuple[float, float]:
        """The point (x, y) that a position token stands for."""
        row, column = divmod(token, self.sections)
        return column / max(1, self.sections - 1), row / max(1, self.sections - 1)

    def encode(self, things: Iterable[Thing], crop: Box = WHOLE, flipped: bool = False) -> np.ndarray:
        """int64 (length,): the objects visible in the ``crop`` of a picture, in their order, mirrored if ``flipped``.

        Without ``crop_tokens``, the original moves a box that reaches over the crop's left or upper border without
        shrinking it; here the box keeps its other edge.
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
        """(objects, crop) of tokens (length,), up to the rounding of positions; the crop is None without crop tokens.

        An object known only by its centre gets a box without width and height.
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
        encoded = (name for name in thing.attributes if name in self.attributes)
        return thing.label + len(self.classes) * sum(1 << ATTRIBUTES.index(name) for name in encoded)

    def _places(self, box: Box) -> list[int]:
        return self._corners(box) if self.corners else [self.position(box[0] + box[2] / 2, box[1] + box[3] / 2)]

    def _corners(self, box: Box) -> list[int]:
        return [self.position(box[0], box[1]), self.position(box[0] + box[2], box[1] + box[3])]

    def _box(self, first: int, second: int) -> Box:
        (left, top), (right, bottom) = self.place(first), self.place(second)
        return left, top, right - left, bottom - top


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that contains all of them."""
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return left, top, right - left, bottom - top


def inside(box: Box, other: Box) -> Box:
    """``box``, given in fractions of a picture's part ``other``, in fractions of the picture."""
    return other[0] + box[0] * other[2], other[1] + box[1] * other[3], box[2] * other[2], box[3] * other[3]


def _intersection(box: Box, other: Box) -> Box:
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right, bottom = min(box[0] + box[2], other[0] + other[2]), min(box[1] + box[3], other[1] + other[3])
    return left, top, right - left, bottom - top


def _relative(box: Box, crop: Box) -> Box:
    """The inverse of `inside`."""
    return (box[0] - crop[0]) / crop[2], (box[1] - crop[1]) / crop[3], box[2] / crop[2], box[3] / crop[3]


def _mirrored(box: Box) -> Box:
    return 1 - (box[0] + box[2]), box[1], box[2], box[3]


# --- files ----------------------------------------------------------------------------------------------------------


def class_names(given: str | os.PathLike | Sequence[str]) -> tuple[str, ...]:
    """Class names from a list of them, or from a text file with one per line."""
    if isinstance(given, str | os.PathLike):
        text = read_text(given, "a text file with one class per line, or a list of classes")
        given = [line.strip(" \t") for line in lines_of(text)]
    if not isinstance(given, Sequence):
        raise UserError(f"classes: got {brief(given)}, expected a list of names, or a text file with one per line")
    names = tuple(str(name) for name in given)
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"classes: got {len(names)} names, {len(set(names))} of them different, expected distinct names"
        )
    return names


def read(path: str | os.PathLike, rule: Rule) -> Scene:
    """The scene in a JSON file ``{"width": W, "height": H, "objects": [{"class": NAME, "box": [x, y, w, h]}, ...]}``.

    Boxes are in pixels of the picture, whose size the file gives. An object may set its `ATTRIBUTES` to ``true``, and
    may have a "center" [x, y] instead of a box if the ``rule`` uses only centres; other keys are ignored. Raises
    UserError naming the file for any other content, for classes that the rule does not know and for boxes that reach
    outside.
    """
    objects, size, _ = entries(path, "objects", _FORM)
    things = tuple(_thing(f"object {number}", path, entry, size, rule) for number, entry in enumerate(objects))
    return Scene(things, (round(size[1]), round(size[0])))


def _thing(which: str, path: str | os.PathLike, entry: Any, size: tuple[float, float], rule: Rule) -> Thing:
    if not isinstance(entry, Mapping) or "class" not in entry:
        raise UserError(f'{path}: got {which} without "class", expected {{"class": NAME, "box": [x, y, w, h]}}')
    name = str(entry["class"])
    if name not in rule.classes:
        first = f"{', '.join(rule.classes[:5])}{', ...' if len(rule.classes) > 5 else ''}"
        raise UserError(
            f"{path}: got {which} of class {brief(name)}, expected one of the {len(rule.classes)} known classes "
            f"({first}){nearest(name, rule.classes)}"
        )
    box = entry.get("box")
    if box is None and not rule.corners and isinstance(entry.get("center"), list):
        # A box of one pixel around the centre: a position with almost no size.
        box = [*(side - 0.5 for side in entry["center"] if is_number(side)), 1, 1]
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and box[2] > 0 and box[3] > 0):
        raise UserError(f"{path}: got {which} with the box {brief(box)}, expected [x, y, width, height] in pixels")
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if min(left, top) < -TOLERANCE or right > size[0] + TOLERANCE or bottom > size[1] + TOLERANCE:
        raise UserError(
            f"{path}: got {which} with the box {box}, expected one inside the picture of {size[0]}x{size[1]} pixels "
            "(width x height); cut it, or correct the size"
        )
    left, right = (min(max(x, 0), size[0]) / size[0] for x in (left, right))
    top, bottom = (min(max(y, 0), size[1]) / size[1] for y in (top, bottom))
    return Thing(rule.classes.index(name), (left, top, right - left, bottom - top), _attributes(which, path, entry))


def _attributes(which: str, path: str | os.PathLike, entry: Mapping[str, Any]) -> tuple[str, ...]:
    for key in entry.keys() - {"class", "box", "center", *ATTRIBUTES}:
        hint = nearest(str(key), ATTRIBUTES)
        if hint:  # otherwise the key is unrelated to attributes and ignored
            raise UserError(
                f"{path}: got {which} with the attribute {brief(key)}, expected some of {', '.join(ATTRIBUTES)}{hint}"
            )
    for name in ATTRIBUTES:
        if not isinstance(entry.get(name, False), bool):
            raise UserError(f"{path}: got {which} with {name!r}: {brief(entry[name])}, expected true or false")
    return tuple(name for name in ATTRIBUTES if entry.get(name))


# --- pictures -------------------------------------------------------------------------------------------------------


def picture(
    things: Iterable[Thing], names: Sequence[str], shape: tuple[int, int], colors: np.ndarray, region: Box = WHOLE
) -> np.ndarray:
    """A drawing of objects with their names on white, uint8 (H, W, 3), in ``colors`` uint8 (classes, 3).

    Shows the ``region`` of the picture that the boxes refer to; an object without a size is drawn as a dot.
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
