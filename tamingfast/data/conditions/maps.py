"""What an image can be conditioned on: reading it from a file, or computing it from the image, as float32 (H, W, C).

Objects alone are tokens at once, int64 (n,). A kind is a frozen dataclass whose fields are its settings. `FromFile`
kinds have one file beside each image, `Computed` ones none. The paper conditions on segmentation, depth, edges,
keypoints, low resolution and coordinates (section 4.2).
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from tamingfast.data.base import positive, random_bits
from tamingfast.data.conditions import scenes
from tamingfast.data.folders import View, read_rgb
from tamingfast.errors import UserError, nearest

Size = tuple[int, int]  # (width, height), as Pillow has it

# Joints (17 of COCO, 18 and 25 of OpenPose) that are bones' ends; the files themselves do not say.
_LIMBS_18 = "1-2 1-5 2-3 3-4 5-6 6-7 1-8 8-9 9-10 1-11 11-12 12-13 1-0 0-14 14-16 0-15 15-17"
_LIMBS_25 = (
    "1-8 1-2 1-5 2-3 3-4 5-6 6-7 8-9 9-10 10-11 8-12 12-13 13-14 1-0 0-15 15-17 0-16 16-18 14-19 19-20 14-21 11-22 "
    "22-23 11-24"
)
_LIMBS_17 = "15-13 13-11 16-14 14-12 11-12 5-11 6-12 5-6 5-7 6-8 7-9 8-10 1-2 0-1 0-2 1-3 2-4 3-5 4-6"
SKELETONS = {
    count: [tuple(map(int, limb.split("-"))) for limb in limbs.split()]
    for count, limbs in ((17, _LIMBS_17), (18, _LIMBS_18), (25, _LIMBS_25))
}


class Kind:
    """A kind of condition.

    Attributes:
        key: of the condition in a batch.
        suffixes: of its files, empty for what no file describes.
    """

    key: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    from_file: ClassVar[bool] = False

    def check(self, size: int) -> None:
        """UserError when the settings do not fit images of ``size`` pixels a side."""

    def seen(self, picture: Image.Image, view: View, source: str | None) -> np.ndarray:
        """float32 (H, W, C) over what ``view`` shows of the whole ``picture``, whose condition lies in ``source``."""
        raise NotImplementedError

    def read(self, path: str | os.PathLike, size: Size | None = None) -> np.ndarray:
        """A condition from its file, float32 (H, W, C), scaled to ``size``, by default of the file's own size.

        Raises UserError naming the file when it is unreadable, out of range or of another shape than ``size``.
        """
        return self.encode(self.raw(path, size))

    def raw(self, path: str | os.PathLike, size: Size | None = None) -> np.ndarray:
        """What `encode` turns into the condition, (H, W) or (H, W, C)."""
        raise UserError(f"{path} is of no use, as {self.key} is never read from a file; leave it out")

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """float32 (H, W, C) of `raw` or a part of it."""
        raise NotImplementedError

    def picture(self, condition: np.ndarray) -> np.ndarray:
        """What to show of a condition: float32 (H, W, 3) in [-1, 1]."""
        return np.repeat(condition, 3 // condition.shape[-1], axis=-1)


class FromFile(Kind):
    """Kinds with a file for each image."""

    from_file = True

    def seen(self, picture: Image.Image, view: View, source: str | None) -> np.ndarray:
        return self.encode(view.cut(self.raw(source, picture.size)))


class Computed(Kind):
    """Kinds that are a function of the pixels which they condition, and need no weights."""

    def seen(self, picture: Image.Image, view: View, source: str | None) -> np.ndarray:
        return self.compute(np.ascontiguousarray(view.cut(np.asarray(picture))))

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        """float32 (H, W, C) of uint8 (H, W, 3)."""
        raise NotImplementedError


@dataclass(frozen=True)
class _LabelMap:
    """One of ``labels`` classes for each pixel, one-hot. Files are indexed or gray PNGs whose values are the labels."""

    labels: int
    key: ClassVar[str] = "segmentation"
    suffixes: ClassVar[tuple[str, ...]] = (".png",)

    def check(self, size: int) -> None:
        positive("labels", self.labels)

    def raw(self, path: str | os.PathLike, size: Size | None = None) -> np.ndarray:
        values = _gray(path, "a label map", indexed=True)
        wrong = int(values.max())
        if wrong >= self.labels:
            raise UserError(
                f"{path} has the label {wrong}, but 0 to {self.labels - 1} is expected: correct the map, or set "
                f"data.labels to at least {wrong + 1}"
            )
        return _nearest(values, _target(path, values, size))

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return (raw[..., None] == np.arange(self.labels)).astype(np.float32)

    def picture(self, condition: np.ndarray) -> np.ndarray:
        return label_colors(condition.shape[-1])[condition.argmax(-1)]


@dataclass(frozen=True)
class Segmentation(_LabelMap, FromFile):
    """Semantic segmentation from label maps."""


@dataclass(frozen=True)
class Superpixels(_LabelMap, Computed):
    """Label maps without an annotator: SLIC superpixels, each labelled by its mean brightness in ``labels`` steps.

    ``segments`` is about how many there are in a picture (Achanta et al., "SLIC superpixels", 2012).
    """

    segments: int = 100

    def check(self, size: int) -> None:
        super().check(size)
        positive("segments", self.segments)

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        segmentation = _skimage("segmentation")
        parts = segmentation.slic(pixels, n_segments=self.segments, start_label=0, channel_axis=-1)
        brightness = pixels.mean(axis=-1).ravel() / 256
        mean = np.bincount(parts.ravel(), brightness) / np.maximum(np.bincount(parts.ravel()), 1)
        return self.encode((mean * self.labels).astype(np.int64)[parts])


@dataclass(frozen=True)
class Depth(FromFile):
    """Depth or disparity maps: 8- or 16-bit gray PNGs, or numbers (H, W) in .npy.

    ``depth_range`` [low, high] is mapped to [-1, 1] and what lies outside is clipped. Without it every map is stretched
    by its own extremes, as the original repository does with relative depth.
    """

    depth_range: tuple[float, float] | None = None
    key: ClassVar[str] = "depth"
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".npy")

    def check(self, size: int) -> None:
        given = self.depth_range
        if given is not None and not (len(given) == 2 and given[0] < given[1]):
            raise UserError(f"depth_range is {given!r}, but [low, high] with low < high is expected: correct it")

    def raw(self, path: str | os.PathLike, size: Size | None = None) -> np.ndarray:
        values = _array(path) if Path(path).suffix.lower() == ".npy" else _gray(path, "a depth map")
        bad = ~np.isfinite(values)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise UserError(
                f"{path} has {int(bad.sum())} values that are no numbers, the first in row {row}, column {column}: "
                "fill them, for example with the nearest depth"
            )
        low, high = self.depth_range or (values.min(), values.max())
        values = np.clip((values.astype(np.float64) - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        scaled = Image.fromarray((2 * values - 1).astype(np.float32))
        target = _target(path, values, size)
        return np.asarray(scaled if scaled.size == target else scaled.resize(target, Image.Resampling.BILINEAR))

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return np.array(raw[..., None], np.float32)


@dataclass(frozen=True)
class Keypoints(FromFile):
    """Skeletons of people, drawn in colours on black: (H, W, 3) in [-1, 1].

    A JSON file holds "width" and "height" of the image that the coordinates belong to, and "people": for each a list of
    points [x, y] or [x, y, visibility], or as OpenPose and COCO have them {"pose_keypoints_2d": [...]} and
    {"keypoints": [...]} with 3 numbers a point. Points of visibility 0 are left out. "skeleton" lists pairs of points,
    from 0, that a line joins; without it people of 17 (COCO), 18 and 25 points (OpenPose) have the usual one. A
    mirrored drawing keeps each limb's colour.
    """

    key: ClassVar[str] = "keypoints"
    suffixes: ClassVar[tuple[str, ...]] = (".json",)

    def raw(self, path: str | os.PathLike, size: Size | None = None) -> np.ndarray:
        content = _json(path)
        people, own = _people(path, content), _declared_size(path, content)
        width, height = size or own
        _check_shape(path, own, (width, height))
        _check_inside(path, people, own)
        drawing = Image.new("RGB", (width, height))
        pen, thick = ImageDraw.Draw(drawing), max(1, round(min(width, height) / 64))
        for points in people:
            limbs = _limbs(path, content, points)
            places = points[:, :2] * (np.array([width, height]) / own)
            colors = _hues(len(limbs))
            for (a, b), color in zip(limbs, colors, strict=True):
                if points[a, 2] > 0 and points[b, 2] > 0:
                    pen.line([tuple(places[a]), tuple(places[b])], fill=color, width=thick)
        return np.asarray(drawing)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return _unit(raw)


@dataclass(frozen=True)
class Edges(Computed):
    """Canny's edges: (H, W, 1), 1 on an edge and -1 elsewhere. ``sigma`` is the blur before, in pixels.

    A file is a drawing, light lines on dark ground.
    """

    sigma: float = 1.0
    key: ClassVar[str] = "edges"
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg", ".webp")

    def check(self, size: int) -> None:
        if not isinstance(self.sigma, int | float) or self.sigma <= 0:
            raise UserError(f"sigma is {self.sigma!r}, but a number above 0 is expected: correct it")

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        feature = _skimage("feature")
        return self.encode(feature.canny(pixels.mean(axis=-1) / 255, sigma=self.sigma))

    def raw(self, path: str | os.PathLike, size: Size | None = None) -> np.ndarray:
        drawing = _rgb(path).convert("L")
        return np.asarray(drawing.resize(_target(path, np.asarray(drawing), size))) >= 128

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return np.where(raw[..., None], 1, -1).astype(np.float32)


@dataclass(frozen=True)
class LowResolution(Computed):
    """The image averaged to 1 / ``factor`` of its sides and enlarged again: (H, W, 3) in [-1, 1].

    A file is a small image, to be enlarged by ``factor``.
    """

    factor: int = 8
    key: ClassVar[str] = "lowres"
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg", ".webp")

    def check(self, size: int) -> None:
        if size % positive("factor", self.factor):
            raise UserError(f"size is {size}, no multiple of factor={self.factor}: change one of the two")

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        small = image.reduce(self.factor)
        return self.encode(np.asarray(small.resize(image.size, Image.Resampling.BICUBIC)))

    def raw(self, path: str | os.PathLike, size: Size | None = None) -> np.ndarray:
        small = _rgb(path)
        target = (small.width * self.factor, small.height * self.factor)
        if size is not None:
            _check_shape(path, target, size)
        return np.asarray(small.resize(size or target, Image.Resampling.BICUBIC))

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return _unit(raw)


@dataclass(frozen=True)
class Coordinates(Kind):
    """Where in the whole picture a crop lies: (H, W, 1) in [0, 1), a pixel's place in reading order over their number.

    As in the original repository. Mirrored pictures are mirrored before they are numbered.
    """

    key: ClassVar[str] = "coord"

    def seen(self, picture: Image.Image, view: View, source: str | None) -> np.ndarray:
        left = picture.width - view.left - view.width if view.flipped else view.left
        return dataclasses.replace(view, left=left, flipped=False).cut(self.whole(picture.size))

    def whole(self, size: Size) -> np.ndarray:
        """The coordinates of a whole picture."""
        width, height = size
        return (np.arange(height * width) / (height * width)).reshape(height, width, 1).astype(np.float32)

    def picture(self, condition: np.ndarray) -> np.ndarray:
        return np.repeat(2 * condition - 1, 3, axis=-1)


@dataclass(frozen=True)
class Objects(FromFile):
    """Objects with their classes and places as tokens, int64 (n,); `.scenes` has files and rules.

    ``classes`` are their names, ``tokens`` is the size of the first stage's codebook, ``objects`` the most there are:
    of more in a picture to train on, the largest are kept.
    """

    classes: Sequence[str]
    tokens: int
    objects: int = 30
    crop_tokens: bool = True
    attributes: Sequence[str] = ()
    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    corners: ClassVar[bool]

    @functools.cached_property
    def rule(self) -> scenes.Rule:
        """How they become tokens."""
        attributes = (self.attributes,) if isinstance(self.attributes, str) else tuple(self.attributes)
        names = scenes.class_names(self.classes)
        return scenes.Rule(names, self.tokens, self.objects, self.corners, self.crop_tokens, attributes)

    def check(self, size: int) -> None:
        positive("tokens", self.tokens)
        positive("objects", self.objects)
        _ = self.rule  # which checks itself

    def seen(self, picture: Image.Image, view: View, source: str | None) -> np.ndarray:
        """In an order of their own in each epoch, as in the original: none comes first by nature."""
        scene = scenes.read(source, self.rule)
        _check_shape(source, scene.shape[::-1], picture.size)
        order = np.argsort(random_bits(view.key, 0, np.arange(len(scene.things))), kind="stable")
        wide, tall = picture.size
        crop = (view.left / wide, view.top / tall, view.width / wide, view.height / tall)
        return self.rule.encode([scene.things[i] for i in order], crop, view.flipped)

    def read(self, path: str | os.PathLike, size: Size | None = None) -> scenes.Scene:
        """The objects of a file on a canvas of ``size``, by default of the file's; UserError when they are too many."""
        found = scenes.read(path, self.rule)
        if len(found.things) > self.objects:
            raise UserError(
                f"{path} has {len(found.things)} objects, but the model was trained with at most {self.objects}: leave "
                "some out"
            )
        return found if size is None else found.fitted(size[1], size[0])

    def windows(self, scene: scenes.Scene, rows: int, columns: int, side: int) -> np.ndarray:
        """int64 (rows, columns, n): the tokens for each window of ``side`` cells on the scene's canvas, at its corner.

        The canvas has rows x columns cells; where no window begins there are zeros. The original's sampling script
        tells each window its own crop in the same way.
        """
        tall, wide = min(side, rows), min(side, columns)
        found = np.zeros((rows, columns, self.rule.length), np.int64)
        for row, column in itertools.product(range(rows - tall + 1), range(columns - wide + 1)):
            window = (column / columns, row / rows, wide / columns, tall / rows)
            found[row, column] = self.rule.encode(scene.things, scenes.inside(window, scene.region))
        return found

    def picture(self, condition: scenes.Scene) -> np.ndarray:
        return self._drawn(condition.things, condition.shape, condition.region)

    def picture_of_tokens(self, tokens: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """What the tokens (n,), or those of `windows` (rows, columns, n), tell: float32 (H, W, 3) in [-1, 1]."""
        tokens = tokens if tokens.ndim == 3 else tokens[None, None]
        rows, columns, _ = tokens.shape
        corners = np.argwhere(tokens.any(-1)).tolist()
        tall, wide = ((side - last) / side for side, last in zip((rows, columns), corners[-1], strict=True))
        things, crops = [], []
        for row, column in corners:
            told, crop = self.rule.decode(tokens[row, column])
            window = (column / columns, row / rows, wide, tall)
            things += told if crop else [dataclasses.replace(one, box=scenes.inside(one.box, window)) for one in told]
            crops += [crop] if crop else []
        region = scenes.around(crops) if crops else scenes.WHOLE
        # A crop of less than a cell has no size to scale by; windows tell the same objects again.
        return self._drawn(dict.fromkeys(things), shape, region if min(region[2:]) > 0 else scenes.WHOLE)

    def _drawn(self, things: Iterable[scenes.Thing], shape: tuple[int, int], region: scenes.Box) -> np.ndarray:
        colors = ((label_colors(len(self.rule.classes)) + 1) * 127.5).astype(np.uint8)
        return _unit(scenes.picture(things, self.rule.classes, shape, colors, region))


@dataclass(frozen=True)
class Boxes(Objects):
    """Bounding boxes: three tokens for each object."""

    key: ClassVar[str] = "objects_bbox"
    corners: ClassVar[bool] = True


@dataclass(frozen=True)
class Centers(Objects):
    """Centre points: two tokens for each object."""

    key: ClassVar[str] = "objects_center_points"
    corners: ClassVar[bool] = False


KINDS: dict[str, Callable[..., Kind]] = {
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
_NEEDED = {
    "labels": "how many labels there are",
    "classes": "the names of the classes",
    "tokens": "how many codes the first stage has",
}


def make(name: str, options: Mapping[str, Any]) -> Kind:
    """The kind ``name`` with the ``options`` that are not None; UserError for unknown names and options."""
    if name not in KINDS:
        raise UserError(
            f"the kind of condition {name!r} is unknown{nearest(str(name), KINDS)} (valid: {', '.join(KINDS)})"
        )
    known = [field.name for field in dataclasses.fields(KINDS[name])]
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            theirs = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"{key} is no setting of the condition {name}; {theirs}: leave {key} out")
    for key, what in _NEEDED.items():
        if key in known and key not in given:
            raise UserError(f"the condition {name} needs to know {what}: add {key}=...")
    return KINDS[name](**given)


def settings_of(kind: Kind) -> dict[str, Any]:
    """What makes ``kind`` again, as keys of data settings: its name under "kind", and its options."""
    (name,) = (name for name, made in KINDS.items() if made is type(kind))
    return {"kind": name} | dataclasses.asdict(kind)


def label_colors(count: int) -> np.ndarray:
    """float32 (count, 3) in [-1, 1]: the same colour for a label whatever their number, neighbours far apart."""
    golden = (math.sqrt(5) - 1) / 2
    return np.array(
        [colorsys.hsv_to_rgb(n * golden % 1, 0.65, 1.0 - 0.25 * (n // 8 % 3)) for n in range(count)], np.float32
    ) * np.float32(2) - np.float32(1)


# --- files ----------------------------------------------------------------------------------------------------------


def _unit(pixels: np.ndarray) -> np.ndarray:
    return (pixels / 127.5 - 1).astype(np.float32)


def _target(path: str | os.PathLike, values: np.ndarray, size: Size | None) -> Size:
    own = (values.shape[1], values.shape[0])
    if size is None:
        return own
    _check_shape(path, own, size)
    return size


def _check_shape(path: str | os.PathLike, own: Size, size: Size) -> None:
    """UserError unless scaling alone, to the same shorter side, makes ``own`` into ``size`` but for a pixel."""
    scale = min(size) / min(own)
    if any(abs(side * scale - wanted) > 1 + scale for side, wanted in zip(own, size, strict=True)):
        raise UserError(
            f"{path} is {own[0]}x{own[1]} pixels (width x height), which is of another shape than the image's "
            f"{size[0]}x{size[1]}: give a condition that covers the image"
        )


def _nearest(values: np.ndarray, size: Size) -> np.ndarray:
    width, height = size
    rows = (np.arange(height) * 2 + 1) * values.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * values.shape[1] // (2 * width)
    return values[rows[:, None], columns]


def _gray(path: str | os.PathLike, what: str, indexed: bool = False) -> np.ndarray:
    """int64 (H, W): the values of a PNG with one channel, palette indices where ``indexed``."""
    modes = ("L", "I", "I;16", "1", *(("P",) if indexed else ()))
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
    except FileNotFoundError:
        raise UserError(f"no file at {path}; give the path of {what}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a PNG ({error}): replace it") from error
    if image.mode not in modes:
        wanted = "an indexed or gray PNG whose values are labels" if indexed else "a gray PNG of 8 or 16 bits"
        raise UserError(f"{path} has the pixels of mode {image.mode}, but {wanted} is expected: convert it")
    return np.asarray(image).astype(np.int64)


def _array(path: str | os.PathLike) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no file at {path}; give the path of a depth map") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an array ({error}): write it with numpy.save") from error
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
        raise UserError(f"{path} has {values.dtype} of shape {values.shape}, but numbers (height, width) are expected")
    return values


def _rgb(path: str | os.PathLike) -> Image.Image:
    try:
        return read_rgb(path)
    except FileNotFoundError:
        raise UserError(f"no image at {path}; give the path of an existing file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): replace it") from error


def _json(path: str | os.PathLike) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file at {path}; give the path of keypoints") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): replace it") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("people"), list):
        raise UserError(f'{path} lacks the list "people": write {{"width": W, "height": H, "people": [[[x, y], ...]]}}')
    return content


def _declared_size(path: str | os.PathLike, content: Mapping[str, Any]) -> Size:
    size = content.get("width"), content.get("height")
    if not all(isinstance(side, int | float) and side >= 1 for side in size):
        raise UserError(
            f"{path} has width {size[0]} and height {size[1]}, but the size of the image that the points belong to is "
            'expected: add "width" and "height" in pixels'
        )
    return round(size[0]), round(size[1])


def _people(path: str | os.PathLike, content: Mapping[str, Any]) -> list[np.ndarray]:
    """float64 (points, 3) for each person: x, y, visibility."""
    people = []
    for number, person in enumerate(content["people"]):
        if isinstance(person, Mapping):
            person = person.get("pose_keypoints_2d") or person.get("keypoints") or []
        try:
            flat = np.ndim(person[0]) == 0
            rows = (
                np.reshape(person, (-1, 3)) if flat else [[*point, 1][:3] for point in person if len(point) in (2, 3)]
            )
            points = np.array(rows, np.float64)
        except (TypeError, ValueError, LookupError):
            flat, points = True, np.empty((0, 3))
        if not len(points) or not (flat or len(points) == len(person)) or not np.isfinite(points).all():
            raise UserError(f"person {number} of {path} is no list of points [x, y] or [x, y, visibility]: correct it")
        people.append(points)
    return people


def _check_inside(path: str | os.PathLike, people: Sequence[np.ndarray], size: Size) -> None:
    """UserError when no point that is visible lies on the image: people may reach outside, but not stand there."""
    visible = [points[points[:, 2] > 0, :2] for points in people]
    if any(map(len, visible)) and not any(((seen >= 0) & (seen <= size)).all(1).any() for seen in visible):
        raise UserError(
            f"{path} has all its points outside the image of {size[0]}x{size[1]} pixels (width x height): correct "
            "them, or the size"
        )


def _limbs(path: str | os.PathLike, content: Mapping[str, Any], points: np.ndarray) -> Sequence[tuple[int, int]]:
    limbs = content.get("skeleton") or SKELETONS.get(len(points))
    if limbs is None:
        raise UserError(
            f'{path} has a person of {len(points)} points and no "skeleton": add the pairs of points to join'
        )
    joined = np.array(limbs)
    if joined.ndim != 2 or joined.shape[1] != 2 or joined.min() < 0 or joined.max() >= len(points):
        raise UserError(
            f'the "skeleton" of {path} is no list of pairs of points 0 to {len(points) - 1}: correct it, or remove it'
        )
    return [tuple(pair) for pair in joined.tolist()]


def _hues(count: int) -> list[tuple[int, int, int]]:
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(n / count, 1.0, 1.0)) for n in range(count)]


def _skimage(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"skimage.{part}")
    except ImportError as error:
        raise UserError(
            f"this condition is computed with scikit-image, which cannot be imported ({error}): "
            'run pip install "tamingfast[train]"'
        ) from error
