"""Objects with their classes and positions: conditions that are tokens already and need no first stage."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tamingfast.data.checks import flag, positive
from tamingfast.data.conditions import reading, scenes
from tamingfast.data.conditions.kind import Kind, Size, given
from tamingfast.data.conditions.palette import label_colors
from tamingfast.data.randomness import random_bits
from tamingfast.data.rgb import unit_scale
from tamingfast.data.views import Picture, View
from tamingfast.errors import UserError, brief

_MOST_OBJECTS = 1 << 16


@dataclass(frozen=True)
class Objects(Kind[scenes.Scene]):
    """Objects as tokens, int64 (n,); `scenes` defines the files and the encoding.

    ``classes`` are the class names, ``tokens`` is the size of the first stage's codebook, ``objects`` the maximum
    number of objects: if a training picture has more, the largest are kept. ``crop_tokens`` and ``attributes`` are
    those of `scenes.Rule`.
    """

    classes: Sequence[str] = dataclasses.field(metadata={"description": "the class names"})
    tokens: int = dataclasses.field(metadata={"description": "the number of codes of the first stage"})
    objects: int = 30
    crop_tokens: bool = True
    attributes: Sequence[str] = ()
    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    from_file: ClassVar[bool] = True
    spatial: ClassVar[bool] = False
    own_first_stage: ClassVar[bool] = False
    corners: ClassVar[bool]

    @functools.cached_property
    def rule(self) -> scenes.Rule:
        """How objects become tokens."""
        if not isinstance(self.attributes, Sequence):
            raise UserError(
                f"attributes: got {brief(self.attributes)}, expected a list of {', '.join(scenes.ATTRIBUTES)}"
            )
        attributes = (self.attributes,) if isinstance(self.attributes, str) else tuple(self.attributes)
        names = scenes.class_names(self.classes)
        return scenes.Rule(names, self.tokens, self.objects, self.corners, self.crop_tokens, attributes)

    def check(self, size: int) -> None:
        positive("tokens", self.tokens, 1 << 31)
        positive("objects", self.objects, _MOST_OBJECTS)
        flag("crop_tokens", self.crop_tokens)
        _ = self.rule  # checks the other settings when it is made

    def seen(self, picture: Picture, view: View, source: str | os.PathLike | None) -> np.ndarray:
        """The tokens of what ``view`` shows, int64 (n,), in a new order each epoch, as in the original."""
        scene = self.scene(source, picture)
        order = np.argsort(random_bits(view.key, 0, np.arange(len(scene.things))), kind="stable")
        wide, tall = picture.size
        crop = (view.left / wide, view.top / tall, view.width / wide, view.height / tall)
        return self.rule.encode([scene.things[i] for i in order], crop, view.flipped)

    def scene(self, source: str | os.PathLike | None, picture: Picture) -> scenes.Scene:
        """The objects of a picture of a data set, whose file is ``source``."""
        path = given(source)
        scene = scenes.read(path, self.rule)
        reading.check_shape(path, scene.shape[::-1], picture.size)
        return scene

    def read(self, path: str | os.PathLike, size: Size | None = None) -> scenes.Scene:
        """The objects in a file, on a canvas of ``size``, by default the file's; UserError if there are too many."""
        found = scenes.read(path, self.rule)
        if len(found.things) > self.objects:
            raise UserError(
                f"{path}: got {len(found.things)} objects, expected at most {self.objects}, as the model was trained "
                "with; leave some out"
            )
        return found if size is None else found.fitted(size[1], size[0])

    def windows(self, scene: scenes.Scene, rows: int, columns: int, side: int) -> np.ndarray:
        """int64 (rows, columns, n): at each cell, the tokens for the window of ``side`` cells that starts there.

        The scene's canvas has rows x columns cells; entries where no window starts are 0. As in the original's sampling
        script, each window's tokens describe its own crop.
        """
        tall, wide = min(side, rows), min(side, columns)
        found = np.zeros((rows, columns, self.rule.length), np.int64)
        for row, column in itertools.product(range(rows - tall + 1), range(columns - wide + 1)):
            window = (column / columns, row / rows, wide / columns, tall / rows)
            found[row, column] = self.rule.encode(scene.things, scenes.inside(window, scene.region))
        return found

    def picture(self, condition: scenes.Scene) -> np.ndarray:
        """A drawing of the boxes with their class names: float32 (H, W, 3) in [-1, 1]."""
        return self._drawn(condition.things, condition.shape, condition.region)

    def picture_of_tokens(self, tokens: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The objects that tokens (n,) describe, or those of `windows` (rows, columns, n), drawn at ``shape`` (H, W).

        float32 (H, W, 3) in [-1, 1].
        """
        tokens = tokens if tokens.ndim == 3 else tokens[None, None]
        rows, columns, _ = tokens.shape
        corners = np.argwhere(tokens.any(-1)).tolist()
        tall, wide = ((side - last) / side for side, last in zip((rows, columns), corners[-1], strict=True))
        things, crops = [], []
        for row, column in corners:
            decoded, crop = self.rule.decode(tokens[row, column])
            if crop is None:
                window = (column / columns, row / rows, wide, tall)
                things += [dataclasses.replace(one, box=scenes.inside(one.box, window)) for one in decoded]
            else:
                things += decoded
                crops.append(crop)
        region = scenes.around(crops) if crops else scenes.WHOLE
        # A crop below one position has no size to scale by. Objects in several windows are drawn once.
        return self._drawn(dict.fromkeys(things), shape, region if min(region[2:]) > 0 else scenes.WHOLE)

    def _drawn(self, things: Iterable[scenes.Thing], shape: tuple[int, int], region: scenes.Box) -> np.ndarray:
        colors = ((label_colors(len(self.rule.classes)) + 1) * 127.5).astype(np.uint8)
        return unit_scale(scenes.picture(things, self.rule.classes, shape, colors, region))


@dataclass(frozen=True)
class Boxes(Objects):
    """Bounding boxes: three tokens per object, its class and two corners."""

    key: ClassVar[str] = "objects_bbox"
    corners: ClassVar[bool] = True


@dataclass(frozen=True)
class Centers(Objects):
    """Centre points: two tokens per object, its class and its centre."""

    key: ClassVar[str] = "objects_center_points"
    corners: ClassVar[bool] = False
