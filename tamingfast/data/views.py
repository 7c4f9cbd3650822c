"""The part of a picture that an item shows, cut out before the rest is scaled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]  # (width, height), as in Pillow


@dataclass(frozen=True)
class View:
    """The part of a picture that an item shows: a box in pixels, mirrored or not.

    ``key`` seeds everything else that changes from epoch to epoch, such as the order of a scene's objects.
    """

    left: int
    top: int
    width: int
    height: int
    flipped: bool = False
    key: int = 0

    @classmethod
    def whole(cls, size: Size) -> View:
        """All of a picture of ``size``."""
        return cls(0, 0, *size)

    @classmethod
    def centre(cls, size: Size, width: int, height: int) -> View:
        """The middle of a picture of ``size``."""
        return cls((size[0] - width) // 2, (size[1] - height) // 2, width, height)

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The same part of an array (H, W, ...) with the picture's height and width."""
        part = array[self.top : self.top + self.height, self.left : self.left + self.width]
        return self.turned(part)

    def turned(self, part: np.ndarray) -> np.ndarray:
        """An array (height, width, ...) of the box, mirrored if the view is."""
        return part[:, ::-1] if self.flipped else part


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as if scaled to ``size``, of which only the parts that are looked at are scaled.

    So the memory for a part does not depend on the shape of the whole: one pixel by a thousand, with its shorter side
    scaled to 256, would be 256 by 256,000.
    """

    image: Image.Image
    size: Size

    def part(self, view: View, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
        """The pixels (height, width[, C]) that ``view`` shows of the scaled picture."""
        image, (wide, tall) = self.image, self.size
        if image.size == self.size:
            box = (view.left, view.top, view.left + view.width, view.top + view.height)
            return view.turned(np.asarray(image.crop(box)))
        x, y = image.width / wide, image.height / tall
        right = min(image.width, (view.left + view.width) * x)
        bottom = min(image.height, (view.top + view.height) * y)
        scaled = image.resize((view.width, view.height), resample, (view.left * x, view.top * y, right, bottom))
        return view.turned(np.asarray(scaled))
