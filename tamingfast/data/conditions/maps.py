"""Conditions that are arrays over the image: segmentation, superpixels, depth, edges, low resolution, coordinates."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
from PIL import Image

from tamingfast.data.checks import is_number, positive
from tamingfast.data.conditions import reading
from tamingfast.data.conditions.kind import Computed, FromFile, Map, Size
from tamingfast.data.conditions.palette import label_colors
from tamingfast.data.rgb import read_rgb, unit_scale
from tamingfast.data.views import Picture, View
from tamingfast.errors import UserError, brief

_MOST_LABELS = 1 << 16  # as many as files can hold
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class _LabelMap(Map):
    """One of ``labels`` classes per pixel, one-hot. Files are indexed or gray PNGs whose values are the labels."""

    labels: int = dataclasses.field(metadata={"description": "the number of labels"})
    key: ClassVar[str] = "segmentation"
    suffixes: ClassVar[tuple[str, ...]] = (".png",)

    def check(self, size: int) -> None:
        positive("labels", self.labels, _MOST_LABELS)

    def raw(self, path: str | os.PathLike, size: Size | None = None, view: View | None = None) -> np.ndarray:
        values = self.values(path)
        wrong = int(values.max())
        if wrong >= self.labels:
            raise UserError(
                f"{path}: got the label {wrong}, expected 0 to {self.labels - 1}; correct the map, or set data.labels "
                f"to at least {wrong + 1}"
            )
        return reading.nearest(values, reading.target_size(path, values, size), view)

    def values(self, path: str | os.PathLike) -> np.ndarray:
        """The labels in a file: int64 (H, W)."""
        return reading.gray_png(path, indexed=True)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return (raw[..., None] == np.arange(self.labels)).astype(np.float32)

    def picture(self, condition: np.ndarray) -> np.ndarray:
        return label_colors(condition.shape[-1])[condition.argmax(-1)]


@dataclass(frozen=True)
class Segmentation(_LabelMap, FromFile):
    """Semantic segmentation from label maps."""


@dataclass(frozen=True)
class Superpixels(_LabelMap, Computed):
    """Label maps that need no annotation: SLIC superpixels, labelled by mean brightness in ``labels`` steps.

    ``segments`` is the approximate number of superpixels (Achanta et al., "SLIC superpixels", 2012).
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
    """Depth or disparity maps: gray PNGs with 8 or 16 bits, or numbers (H, W) in .npy files.

    ``depth_range`` [low, high] is mapped to [-1, 1] and clipped. Without it, every map is stretched between its own
    extremes, as the original repository does with relative depth.
    """

    depth_range: tuple[float, float] | None = None
    key: ClassVar[str] = "depth"
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".npy")

    def check(self, size: int) -> None:
        limits = self.depth_range
        valid = isinstance(limits, Sequence) and len(limits) == 2 and all(map(is_number, limits))
        if limits is not None and not (valid and limits[0] < limits[1]):
            raise UserError(f"depth_range: got {brief(limits)}, expected [low, high] with low < high")

    def raw(self, path: str | os.PathLike, size: Size | None = None, view: View | None = None) -> np.ndarray:
        values = self.values(path)
        bad = ~np.isfinite(values)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise UserError(
                f"{path}: got {int(bad.sum())} values that are not finite, the first in row {row}, column {column}, "
                "expected finite numbers; fill them in, for example with the nearest depth"
            )
        low, high = self.depth_range or (values.min(), values.max())
        values = np.clip((values.astype(np.float64) - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        target = reading.target_size(path, values, size)
        scaled = Picture(Image.fromarray((2 * values - 1).astype(np.float32)), target)
        return scaled.part(view or View.whole(target), Image.Resampling.BILINEAR)

    def values(self, path: str | os.PathLike) -> np.ndarray:
        """The numbers in a file: (H, W)."""
        return reading.numbers(path) if Path(path).suffix.lower() == ".npy" else reading.gray_png(path)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return np.array(raw[..., None], np.float32)


@dataclass(frozen=True)
class Edges(Computed):
    """Canny edges: (H, W, 1), 1 on an edge and -1 elsewhere. ``sigma`` is the blur's standard deviation, in pixels.

    A condition file is a drawing with light lines on a dark background.
    """

    sigma: float = 1.0
    key: ClassVar[str] = "edges"
    suffixes: ClassVar[tuple[str, ...]] = _PICTURES

    def check(self, size: int) -> None:
        if not is_number(self.sigma) or not 0 < self.sigma <= size:
            raise UserError(f"sigma: got {brief(self.sigma)}, expected a number above 0 and at most size={size}")

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        feature = _skimage("feature")
        return self.encode(feature.canny(pixels.mean(axis=-1) / 255, sigma=self.sigma))

    def raw(self, path: str | os.PathLike, size: Size | None = None, view: View | None = None) -> np.ndarray:
        # What is transparent is no line.
        drawing = read_rgb(path, background="black").convert("L")
        target = reading.target_size(path, np.asarray(drawing), size)
        return Picture(drawing, target).part(view or View.whole(target)) >= 128

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return np.where(raw[..., None], 1, -1).astype(np.float32)


@dataclass(frozen=True)
class LowResolution(Computed):
    """The image reduced by ``factor`` per side, by averaging, and enlarged again: (H, W, 3) in [-1, 1].

    A condition file is a small image, which is enlarged by ``factor``.
    """

    factor: int = 8
    key: ClassVar[str] = "lowres"
    suffixes: ClassVar[tuple[str, ...]] = _PICTURES

    def check(self, size: int) -> None:
        if size % positive("factor", self.factor):
            raise UserError(f"size: got {size}, expected a multiple of factor={self.factor}; change one of the two")

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        small = image.reduce(self.factor)
        return self.encode(np.asarray(small.resize(image.size, Image.Resampling.BICUBIC)))

    def raw(self, path: str | os.PathLike, size: Size | None = None, view: View | None = None) -> np.ndarray:
        small = read_rgb(path)
        target = (small.width * self.factor, small.height * self.factor)
        if size is not None:
            reading.check_shape(path, target, size)
        return Picture(small, size or target).part(view or View.whole(size or target))

    def own_size(self, path: str | os.PathLike) -> Size:
        small = read_rgb(path)
        return small.width * self.factor, small.height * self.factor

    def encode(self, raw: np.ndarray) -> np.ndarray:
        return unit_scale(raw)


@dataclass(frozen=True)
class Coordinates(Map):
    """A crop's place in the whole picture: (H, W, 1) in [0, 1), each pixel's raster index over the number of pixels.

    As in the original repository; a mirrored picture is mirrored before its pixels are numbered.
    """

    key: ClassVar[str] = "coord"
    own_first_stage: ClassVar[bool] = False

    def seen(self, picture: Picture, view: View, source: str | os.PathLike | None) -> np.ndarray:
        left = picture.size[0] - view.left - view.width if view.flipped else view.left
        return self._part(picture.size, dataclasses.replace(view, left=left))

    def whole(self, size: Size) -> np.ndarray:
        """The coordinates of a whole picture of ``size``: float32 (H, W, 1)."""
        return self._part(size, View.whole(size))

    def _part(self, size: Size, view: View) -> np.ndarray:
        width, height = size
        rows = np.arange(view.top, view.top + view.height)[:, None]
        columns = np.arange(view.left, view.left + view.width)
        return ((rows * width + columns) / (height * width))[..., None].astype(np.float32)

    def picture(self, condition: np.ndarray) -> np.ndarray:
        return np.repeat(2 * condition - 1, 3, axis=-1)


def _skimage(part: str) -> ModuleType:
    """A module of scikit-image, which is optional and only needed for computed conditions."""
    try:
        return importlib.import_module(f"skimage.{part}")
    except ImportError as error:
        raise UserError(
            f"skimage: got an import error ({error}), expected scikit-image, which computes this condition; run "
            "'pip install scikit-image'"
        ) from error
