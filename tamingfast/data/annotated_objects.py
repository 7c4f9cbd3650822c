"""The two data sets of annotated objects that the original's configs name, on local files: COCO and Open Images.

Each takes the arguments of its namesake and reads the files of the data set as they are published, below ``data_path``.
Items are as everywhere here: images float32 (H, W, 3) in [-1, 1], objects as tokens int64 (n,), see
`tamingfast.data.conditions.objects`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tamingfast.data.checks import existing_directory, flag, is_number, positive
from tamingfast.data.conditions.kind import given
from tamingfast.data.conditions.objects import Boxes, Centers
from tamingfast.data.conditions.scenes import Box, Scene, Thing, class_names
from tamingfast.data.originals import Pictures, existing
from tamingfast.data.randomness import random_bits, random_integers
from tamingfast.data.rgb import scaled_size
from tamingfast.data.views import Picture
from tamingfast.errors import UserError, brief
from tamingfast.files import open_regular, read_text

#: How a square is cut: at the centre, at a random place along the longer side, or of a random size, too.
CROPS = ("center", "random-1d", "random-2d")
_GROUP = "group"
_SIZE_DRAW = 5  # of the random numbers of an item; the first five are those of `ImageFiles`
_MOST_OBJECTS = 1 << 16
_LAST_OF_OPEN_IMAGES = "/m/01s55n"  # the original numbers this class last


@dataclass(frozen=True)
class _KnownBoxes(Boxes):
    """`Boxes` of pictures whose objects are in memory, by the pictures' paths."""

    known: Mapping[str, tuple[Thing, ...]] = field(default_factory=dict)

    def scene(self, source: str | os.PathLike | None, picture: Picture) -> Scene:
        return Scene(self.known[os.fspath(given(source))], picture.size[::-1])


@dataclass(frozen=True)
class _KnownCenters(Centers):
    """`Centers` of such pictures."""

    known: Mapping[str, tuple[Thing, ...]] = field(default_factory=dict)

    def scene(self, source: str | os.PathLike | None, picture: Picture) -> Scene:
        return Scene(self.known[os.fspath(given(source))], picture.size[::-1])


_KINDS: dict[str, type[_KnownBoxes | _KnownCenters]] = {kind.key: kind for kind in (_KnownBoxes, _KnownCenters)}
_KEYS = ("image", "file_name", "annotations", *_KINDS)


class AnnotatedObjects(Pictures):
    """Squares of pictures with objects, of which each picture has from ``min_objects_per_image`` to ``max_...``.

    Objects of at most ``min_object_area``, a share of the picture, do not count. ``keys`` says whether objects become
    boxes or centres. Raises UserError for missing or damaged files, and for params that are not those of the original.
    """

    def __init__(
        self, data_path: str | os.PathLike, split: str, keys: Sequence[str], target_image_size: int,
        min_object_area: float, min_objects_per_image: int, max_objects_per_image: int, crop_method: str,
        random_flip: bool, no_tokens: int, use_group_parameter: bool, encode_crop: bool,
        no_object_classes: int | None = None,
    ) -> None:  # fmt: skip
        kind = _kind_of(keys)
        if crop_method not in CROPS:
            raise UserError(f"crop_method: got {brief(crop_method)}, expected one of {', '.join(CROPS)}")
        positive("max_objects_per_image", max_objects_per_image, _MOST_OBJECTS)
        if not is_number(min_object_area) or not is_number(min_objects_per_image):
            raise UserError(f"min_object_area: got {brief(min_object_area)}, expected a number")
        root = existing_directory("data_path", data_path)
        classes, found = self.listed(root, split)
        if no_object_classes not in (None, len(classes)):
            raise UserError(f"no_object_classes: got {no_object_classes}, expected the {len(classes)} of the files")
        known: dict[str, tuple[Thing, ...]] = {}
        for path, things in found.items():
            large = tuple(_cut(thing) for thing in things if _area(thing.box) > min_object_area)
            if max(min_objects_per_image, 1) <= len(large) <= max_objects_per_image:
                known[path] = large
        if not known:
            raise UserError(
                f"{root}: got no picture of the {split} set with {min_objects_per_image} to {max_objects_per_image} "
                "objects, expected some; change the numbers of objects"
            )
        paths = existing(list(known), "an image")
        attributes = [_GROUP] if flag("use_group_parameter", use_group_parameter) else []
        described = kind(
            classes, no_tokens, objects=max_objects_per_image, crop_tokens=flag("encode_crop", encode_crop),
            attributes=attributes, known=known,
        )  # fmt: skip
        super().__init__(
            paths,
            target_image_size,
            crop_method != "center",
            None,
            described,
            paths,
            flip=flag("random_flip", random_flip),
        )
        self.varies = crop_method == "random-2d"
        if self.varies:
            self.short_side = None  # pictures are kept at their own size

    def listed(self, root: Path, split: str) -> tuple[list[str], dict[str, list[Thing]]]:
        """The names of the classes, and the objects of each picture by its path."""
        raise NotImplementedError

    def _read(self, number: int) -> Picture:
        picture = super()._read(number)
        if not self.varies:
            return picture
        assert self.size is not None
        short = min(picture.size)
        bits = random_bits(self.seed, self.epoch, [number], _SIZE_DRAW)
        side = short if short <= self.size else self.size + int(random_integers(bits, short - self.size + 1)[0])
        return Picture(picture.image, scaled_size(picture.size, round(self.size * short / side)))


def _kind_of(keys: Any) -> type[_KnownBoxes | _KnownCenters]:
    """The kind of condition that the ``keys`` of an item ask for."""
    named = [key for key in keys if key in _KINDS] if isinstance(keys, Sequence) else []
    if len(named) != 1 or any(key not in _KEYS for key in keys):
        raise UserError(f"keys: got {brief(keys)}, expected image and one of {', '.join(_KINDS)}")
    return _KINDS[named[0]]


def _area(box: Box) -> float:
    return box[2] * box[3]


def _cut(thing: Thing) -> Thing:
    """The object inside the picture; annotations reach over its border by a pixel."""
    left, top, right, bottom = (
        min(max(edge, 0.0), 1.0)
        for edge in (thing.box[0], thing.box[1], thing.box[0] + thing.box[2], thing.box[1] + thing.box[3])
    )
    return Thing(thing.label, (left, top, right - left, bottom - top), thing.attributes)


class AnnotatedObjectsCoco(AnnotatedObjects):
    """``taming.data.annotated_objects_coco.AnnotatedObjectsCoco``: annotations/ and pictures of COCO 2017.

    ``use_things`` and ``use_stuff`` say which annotations count. Classes are numbered in the order of their ids as
    text. As with the original, whose test for groups COCO's 0 and 1 never pass, none of its objects is a group.
    """

    def __init__(self, use_things: bool = True, use_stuff: bool = True, **params: Any) -> None:
        self._files = [
            name
            for name, used in (("instances", flag("use_things", use_things)), ("stuff", flag("use_stuff", use_stuff)))
            if used
        ]
        super().__init__(**params)

    def listed(self, root: Path, split: str) -> tuple[list[str], dict[str, list[Thing]]]:
        """As `AnnotatedObjects.listed`."""
        folder = _choice(split, {"train": "train2017", "validation": "val2017"})
        sizes: dict[int, tuple[str, float, float]] = {}
        names: dict[str, str] = {}
        boxes: list[tuple[int, str, list[float]]] = []
        for part in ("instances", *(name for name in self._files if name != "instances")):
            path = root / "annotations" / f"{part}_{folder}.json"
            content = _json(path)
            try:
                if part == "instances":  # it alone describes the pictures
                    sizes = {
                        image["id"]: (
                            str(root / folder / Path(image["file_name"]).name),
                            image["width"],
                            image["height"],
                        )
                        for image in content["images"]
                    }
                if part in self._files:
                    names |= {str(each["id"]): str(each["name"]) for each in content["categories"]}
                    boxes += [
                        (each["image_id"], str(each["category_id"]), [float(side) for side in each["bbox"]])
                        for each in content["annotations"]
                    ]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise _no_annotations(path, error) from error
        kept = sorted(key for key, name in names.items() if name != "other")
        number = {key: place for place, key in enumerate(kept)}
        found: dict[str, list[Thing]] = {}
        for image, category, box in boxes:
            if image not in sizes or len(box) != 4 or not min(sizes[image][1:]) > 0:
                raise _no_annotations(
                    root / "annotations", f"an object of the picture {image!r}, which is not described"
                )
            if category in number:
                name, wide, tall = sizes[image]
                scaled = (box[0] / wide, box[1] / tall, box[2] / wide, box[3] / tall)
                found.setdefault(name, []).append(Thing(number[category], scaled))
        return _distinct([names[key] for key in kept]), found


class AnnotatedObjectsOpenImages(AnnotatedObjects):
    """``taming.data.annotated_objects_open_images.AnnotatedObjectsOpenImages``: the CSV files and pictures of V6.

    In place of the original's ``..._target``, which name lists in its code, ``category_allow_list`` has the names of
    the classes, or a text file of them, and ``category_mapping`` the ids of classes that count as others.
    """

    def __init__(
        self,
        category_allow_list: str | os.PathLike | Sequence[str] | None = None,
        category_mapping: Mapping[str, str] | None = None,
        category_allow_list_target: None = None,
        category_mapping_target: None = None,
        **params: Any,
    ) -> None:
        for name, value in (
            ("category_allow_list", category_allow_list_target), ("category_mapping", category_mapping_target),
        ):  # fmt: skip
            if value is not None:
                raise UserError(
                    f"{name}_target: got {brief(value)}, which is not run, expected none; set it to null, and give "
                    f"what it names as {name}"
                )
        self._allowed = None if category_allow_list is None else frozenset(class_names(category_allow_list))
        self._mapping = dict(category_mapping or {})
        super().__init__(**params)

    def listed(self, root: Path, split: str) -> tuple[list[str], dict[str, list[Thing]]]:
        """As `AnnotatedObjects.listed`."""
        files = {
            "train": "oidv6-train-annotations-bbox.csv", "validation": "validation-annotations-bbox.csv",
            "test": "test-annotations-bbox.csv",
        }  # fmt: skip
        path, described = root / _choice(split, files), root / "class-descriptions-boxable.csv"
        names = {}
        for number, row in enumerate(_rows(described), 1):
            if len(row) < 2:
                raise _no_annotations(described, f"line {number} without an id and a name")
            names[row[0]] = row[1]
        kept = sorted(
            (key for key, name in names.items() if self._allows(name) and key not in self._mapping),
            key=lambda key: (key == _LAST_OF_OPEN_IMAGES, key),
        )
        label = {key: place for place, key in enumerate(kept)}
        rows = _rows(path)
        place = {name: column for column, name in enumerate(next(rows, []))}
        found: dict[str, list[Thing]] = {}
        for number, row in enumerate(rows, 2):
            try:
                category = self._mapping.get(row[place["LabelName"]], row[place["LabelName"]])
                left, right, top, bottom = (float(row[place[edge]]) for edge in ("XMin", "XMax", "YMin", "YMax"))
                attributes = (_GROUP,) if row[place["IsGroupOf"]] == "1" else ()
                name = row[place["ImageID"]]
            except (KeyError, IndexError, ValueError) as error:
                raise _no_annotations(path, f"line {number}: {error}") from error
            if category in label and os.sep not in name:
                thing = Thing(label[category], (left, top, right - left, bottom - top), attributes)
                found.setdefault(str(root / split / f"{name:0>16}.jpg"), []).append(thing)
        return _distinct([names[key] for key in kept]), found

    def _allows(self, name: str) -> bool:
        return self._allowed is None or name in self._allowed


def _choice(split: object, files: Mapping[str, str]) -> str:
    if not isinstance(split, str) or split not in files:
        raise UserError(f"split: got {brief(split)}, expected one of {', '.join(files)}")
    return files[split]


def _distinct(names: list[str]) -> list[str]:
    """The names, with a number where one is there again."""
    return [name if name not in names[:place] else f"{name} {place}" for place, name in enumerate(names)]


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, "annotations of COCO"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise _no_annotations(path, error) from error


def _rows(path: Path) -> Iterator[list[str]]:
    """The rows of a CSV file, which may be larger than memory."""
    try:
        with open_regular(path) as stream, io.TextIOWrapper(stream, "utf-8", newline="") as text:
            yield from csv.reader(text)
    except FileNotFoundError:
        raise UserError(f"{path}: got no such file, expected a CSV file of Open Images; correct data_path") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise _no_annotations(path, error) from error


def _no_annotations(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: got other content ({brief(str(reason))}), expected the data set's annotations")
