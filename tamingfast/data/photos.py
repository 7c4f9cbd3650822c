"""The default data: crops of the colour photographs in the scikit-image and scikit-learn packages.

Only files of the installed wheels are read; nothing is downloaded. Of the colour pictures there, these are left out:
``motorcycle_right`` (the other half of the stereo pair with ``motorcycle_left``, which would leak between splits or
count a scene twice), ``retina``, ``ihc`` and ``microaneurysms`` (medical images, whose two colours and textures teach
nothing about scenes), and drawings. ``rocket`` (flat sky) and ``hubble_deep_field`` (black) have lower weights, because
most of their crops show little.

The split is by photograph. ``chelsea`` and ``coffee`` are for validation: the colours of their fur, glaze and wood also
occur in the six training photographs, whereas only ``rocket`` has a blue sky and is therefore needed for training.

Sources: astronaut, hubble_deep_field (NASA, public domain); chelsea, coffee (Stefan van der Walt, Rachel
Michetti, CC0); rocket (SpaceX, public domain); motorcycle (Middlebury 2014 stereo benchmark); china (Daniel
Buechele, CC-BY 2.0); flower (flickr user vultilion, CC-BY 2.0).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tamingfast.data.base import ArrayDataset
from tamingfast.data.checks import flag, positive
from tamingfast.data.randomness import random_bits, random_integers, random_units
from tamingfast.data.rgb import read_rgb, to_unit_scale
from tamingfast.errors import UserError


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A photograph's file in a package, its weight in the random choice, and its split."""

    name: str
    package: str
    file: str
    weight: float = 1.0
    validation: bool = False


PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png"),
    Photograph("chelsea", "skimage", "data/chelsea.png", validation=True),
    Photograph("china", "sklearn", "datasets/images/china.jpg"),
    Photograph("coffee", "skimage", "data/coffee.png", validation=True),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg"),
    Photograph("hubble_deep_field", "skimage", "data/hubble_deep_field.jpg", weight=0.25),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photograph("rocket", "skimage", "data/rocket.jpg", weight=0.5),
)
_DISTRIBUTIONS = "scikit-image scikit-learn"  # of both packages
CLASSES = tuple(photograph.name for photograph in PHOTOGRAPHS)

# Shorter side of a scaled photograph in units of the crop's side: from nearly the whole scene to a sixteenth of it.
SCALES = (1.125, 1.5, 2.0, 2.5, 3.0, 4.0)
SMALLEST_SIDE = 300


@dataclasses.dataclass(frozen=True)
class Plane:
    """One photograph at one scale: its index in PHOTOGRAPHS, and uint8 (H, W, 3)."""

    label: int
    pixels: np.ndarray


def build(size: int = 32, seed: int = 0, length: int | None = None, flip: bool = True) -> tuple[PhotoCrops, PhotoGrid]:
    """(train, validation): random crops of six photographs and a fixed grid of crops of two others.

    ``size`` is the side of a crop in pixels: at most 300, the shorter side of the smallest photograph, because nothing
    is enlarged. ``length`` is the number of training crops per epoch, by default the number of positions on a grid with
    stride size / 4. ``flip`` mirrors half of the training crops.

    Raises UserError for a size or length out of range and when a package or one of its photographs is missing.
    """
    size = positive("size", size)
    if size > SMALLEST_SIDE:
        raise UserError(
            f"size: got {size}, expected at most {SMALLEST_SIDE}, the shorter side of the smallest photograph; choose "
            "a smaller size or the folder dataset"
        )
    planes = [(photograph, plane) for photograph in PHOTOGRAPHS for plane in _planes(photograph, size)]
    train = [plane for photograph, plane in planes if not photograph.validation]
    validation = [plane for photograph, plane in planes if photograph.validation]
    return PhotoCrops(train, size, seed, length, flip), PhotoGrid(validation, size)


class _Crops(ArrayDataset):
    """Square crops of planes; ``class_label`` indexes ``classes``, the names of all photographs."""

    classes = CLASSES

    def __init__(self, planes: Sequence[Plane], size: int) -> None:
        self.planes, self.size = list(planes), size

    @property
    def photographs(self) -> list[str]:
        """Names of the photographs that crops are taken from."""
        return sorted({CLASSES[plane.label] for plane in self.planes})

    @property
    def description(self) -> str:
        """One phrase about the images, for reports and token files."""
        return f"{self.size}x{self.size} crops of the photographs {', '.join(self.photographs)}"

    def _room(self) -> np.ndarray:
        """int64 (planes, 2): number of rows and of columns at which a crop can start."""
        return np.array([plane.pixels.shape[:2] for plane in self.planes]) - self.size + 1

    def _cut(self, which: np.ndarray, tops: np.ndarray, lefts: np.ndarray, flips: np.ndarray) -> dict[str, Any]:
        size = self.size
        crops = np.empty((len(which), size, size, 3), np.uint8)
        labels, names = [], []
        rows = zip(which.tolist(), tops.tolist(), lefts.tolist(), flips.tolist(), strict=True)
        for crop, (number, top, left, flipped) in zip(crops, rows, strict=True):
            plane = self.planes[number]
            window = plane.pixels[top : top + size, left : left + size]
            crop[:] = window[:, ::-1] if flipped else window
            labels.append(plane.label)
            height, width = plane.pixels.shape[:2]
            names.append(f"{CLASSES[plane.label]}/{width}x{height}/{left},{top}" + ("/flipped" if flipped else ""))
        return {"image": to_unit_scale(crops), "class_label": torch.tensor(labels), "file_path_": names}


class PhotoCrops(_Crops):
    """Random crops. (seed, epoch, index) determine photograph (by weight), scale (uniform), position and flip."""

    def __init__(
        self, planes: Sequence[Plane], size: int, seed: int = 0, length: int | None = None, flip: bool = True
    ) -> None:
        super().__init__(planes, size)
        self.seed, self.flip = seed, flag("flip", flip)
        labels = np.array([plane.label for plane in self.planes])
        weights = np.array([PHOTOGRAPHS[label].weight for label in labels]) / np.bincount(labels)[labels]
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._bounds = self._room()
        if length is None:
            length = int(np.prod(-(-self._bounds // max(1, size // 4)), axis=1).sum())
        self.length = positive("length", length, 1 << 40)

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        choice, row, column, mirror = (random_bits(self.seed, self.epoch, indices, draw) for draw in range(4))
        # The minimum, because rounding may leave the last cumulative weight below a draw.
        which = np.minimum(np.searchsorted(self._cumulative, random_units(choice), side="right"), len(self.planes) - 1)
        tops, lefts = (
            random_integers(row, self._bounds[which, 0]),
            random_integers(column, self._bounds[which, 1]),
        )
        return self._cut(which, tops, lefts, random_integers(mirror, 2).astype(bool) & self.flip)


class PhotoGrid(_Crops):
    """Every crop of the sparsest even grid that covers each whole plane, the same in every epoch.

    They are in one fixed random order, so that the first crops already represent all photographs and scales.
    """

    def __init__(self, planes: Sequence[Plane], size: int) -> None:
        super().__init__(planes, size)
        places = [
            (number, top, left)
            for number, (rows, columns) in enumerate(self._room().tolist())
            for top in _even(rows, size)
            for left in _even(columns, size)
        ]
        order = np.argsort(random_bits(0, 0, range(len(places))), kind="stable")
        self._places = np.array(places)[order]

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        which, tops, lefts = self._places[indices].T
        return self._cut(which, tops, lefts, np.zeros(len(which), bool))


def area_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, C), each pixel the mean over the area of uint8 (H, W, C) that it covers.

    Pixels that are covered in part count by that part, so that no ratio of sizes causes moiré.
    """
    rows, columns = _coverage(pixels.shape[0], height), _coverage(pixels.shape[1], width)
    mean = np.einsum("yY,YXc->yXc", rows, pixels.astype(np.float64), optimize=True)
    mean = np.einsum("xX,yXc->yxc", columns, mean, optimize=True)
    return np.clip(np.rint(mean), 0, 255).astype(np.uint8)


def _coverage(source: int, target: int) -> np.ndarray:
    """float64 (target, source): the fraction of each target cell that each source cell covers; rows sum to 1."""
    edges = np.arange(target + 1)[:, None] * (source / target)
    cells = np.arange(source)[None, :]
    overlap = np.minimum(edges[1:], cells + 1) - np.maximum(edges[:-1], cells)
    return np.clip(overlap, 0, None) * (target / source)


def _even(room: int, stride: int) -> list[int]:
    """The fewest evenly spaced starts from 0 to room - 1 that leave no gap longer than ``stride``."""
    return np.linspace(0, room - 1, -(-(room - 1) // stride) + 1).round().astype(int).tolist()


@functools.lru_cache(len(PHOTOGRAPHS))  # a process builds its data sets several times with one size
def _planes(photograph: Photograph, size: int) -> tuple[Plane, ...]:
    """The photograph at every scale that does not enlarge it, and at its own size if that is within their range."""
    pixels = _read(photograph)
    height, width = pixels.shape[:2]
    native = min(height, width)
    sides = {round(scale * size) for scale in SCALES}
    sides = {side for side in sides if side < native} | ({native} if native <= max(sides) else set())
    label = PHOTOGRAPHS.index(photograph)
    return tuple(
        Plane(
            label,
            pixels
            if side == native
            else area_resize(pixels, round(height * side / native), round(width * side / native)),
        )
        for side in sorted(sides)
    )


def _read(photograph: Photograph) -> np.ndarray:
    # The package is located but not imported: importing it takes a second, and its loaders may download.
    spec = importlib.util.find_spec(photograph.package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{photograph.package}: got no such package, expected it for the photos dataset; run "
            f"'pip install {_DISTRIBUTIONS}'"
        )
    path = Path(spec.submodule_search_locations[0]) / photograph.file
    try:
        return np.asarray(read_rgb(path))
    except UserError as error:
        raise UserError(
            f"{path}: got a file that cannot be read or is missing, expected the photograph {photograph.name}; run "
            f"'pip install --force-reinstall --no-deps {_DISTRIBUTIONS}'"
        ) from error
