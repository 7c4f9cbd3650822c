"""The interface of every kind of condition, and base classes for maps over the image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np

from tamingfast.data.views import Picture, Size, View
from tamingfast.errors import UserError

#: What `Kind.read` returns and `Kind.picture` shows.
Content = TypeVar("Content")


@dataclass(frozen=True)
class Kind(Generic[Content]):
    """A kind of condition. Subclasses are frozen dataclasses whose fields are its settings.

    A field without a default must be set; its metadata then contains a "description" for messages.

    Attributes:
        key: the condition's key in a batch.
        suffixes: endings of its files; empty if no file describes it.
        from_file: whether it is read from a file beside each image of a dataset.
        spatial: whether it covers the image, as float32 (H, W, C), and has one token for each of the image's tokens.
            Otherwise the condition is a sequence of tokens already, int64 (n,).
        own_first_stage: whether a first stage trained on this kind makes its tokens.
    """

    key: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    from_file: ClassVar[bool] = False
    spatial: ClassVar[bool] = True
    own_first_stage: ClassVar[bool] = True

    def check(self, size: int) -> None:
        """Raise UserError when the settings do not suit images with sides of ``size`` pixels."""

    def seen(self, picture: Picture, view: View, source: str | os.PathLike | None) -> np.ndarray:
        """The condition of the part of ``picture`` that ``view`` shows, as an entry of a batch.

        ``source`` is the file with the whole picture's condition; None for kinds without files.
        """
        raise NotImplementedError

    def read(self, path: str | os.PathLike, size: Size | None = None) -> Content:
        """The condition in a file, scaled to ``size``, by default at the file's own size.

        Raises UserError naming the file when it is unreadable, out of range or of another aspect ratio than ``size``.
        """
        raise NotImplementedError

    def picture(self, condition: Content) -> np.ndarray:
        """An image of the condition: float32 (H, W, 3) in [-1, 1]."""
        raise NotImplementedError


class Map(Kind[np.ndarray]):
    """An array over the image, float32 (H, W, C)."""

    def read(self, path: str | os.PathLike, size: Size | None = None, view: View | None = None) -> np.ndarray:
        """The condition in a file, float32 (H, W, C), scaled to ``size``, by default at the file's own size.

        With ``view`` only that part of the scaled condition is made and returned. Raises UserError naming the file when
        it is unreadable, out of range or of another aspect ratio than ``size``.
        """
        return self.encode(self.raw(path, size, view))

    def own_size(self, path: str | os.PathLike) -> Size:
        """The size of what `read` returns by default."""
        height, width = self.raw(path).shape[:2]
        return width, height

    def raw(self, path: str | os.PathLike, size: Size | None = None, view: View | None = None) -> np.ndarray:
        """The content of a file, (H, W) or (H, W, C), as the input of `encode`; ``size`` and ``view`` as in `read`."""
        raise UserError(f"{path}: got a file for {self.key}, expected none, because it is never read from a file")

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """float32 (H, W, C) from what `raw` returns or a part of it."""
        raise NotImplementedError

    def picture(self, condition: np.ndarray) -> np.ndarray:
        """An image of the condition (H, W, C): float32 (H, W, 3) in [-1, 1]."""
        return np.repeat(condition, 3 // condition.shape[-1], axis=-1)


class FromFile(Map):
    """Maps with one file beside each image."""

    from_file = True

    def seen(self, picture: Picture, view: View, source: str | os.PathLike | None) -> np.ndarray:
        return self.read(given(source), picture.size, view)


class Computed(Map):
    """Maps computed from the image's own pixels, without any weights."""

    def seen(self, picture: Picture, view: View, source: str | os.PathLike | None) -> np.ndarray:
        return self.compute(np.ascontiguousarray(picture.part(view)))

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        """float32 (H, W, C) from uint8 (H, W, 3)."""
        raise NotImplementedError


def given(source: str | os.PathLike | None) -> str | os.PathLike:
    """``source``, which must not be None (ValueError)."""
    if source is None:
        raise ValueError("source: got None, expected the file with the picture's condition")
    return source
