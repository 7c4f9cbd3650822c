"""Image files as upright 8-bit RGB, the part of a picture that an item shows, and the [-1, 1] scale."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from tamingfast.progress import bar

#: Extensions of image files, in lower case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
#: What Pillow raises for files that are not what they claim to be.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

# Files with a wrong extension are common, so the content decides; decoders that start other programs are left out.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# x / 127.5 - 1 rounded once from double precision, as the original repository's loaders compute it.
_UNIT_SCALE = (np.arange(256) / 127.5 - 1.0).astype(np.float32)


def unit_scale(pixels: np.ndarray) -> np.ndarray:
    """float32 array in [-1, 1] with the shape of the uint8 array ``pixels``."""
    return _UNIT_SCALE[pixels]


def to_unit_scale(pixels: np.ndarray) -> torch.Tensor:
    """`unit_scale` as a tensor."""
    return torch.from_numpy(unit_scale(pixels))


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

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The same part of an array (H, W, ...) with the picture's height and width."""
        part = array[self.top : self.top + self.height, self.left : self.left + self.width]
        return part[:, ::-1] if self.flipped else part


def read_rgb(path: str | os.PathLike, short_side: int | None = None) -> Image.Image:
    """The image as 8-bit RGB, upright, its shorter side resized to ``short_side`` if that is given.

    Applies the EXIF orientation, composites transparency over white, scales 16-bit gray to 8 bits and converts other
    modes. Raises whatever Pillow raises for files that it cannot read, and ValueError for floating-point pixels.
    """
    with _open(path) as image:
        if short_side:
            # JPEG only: decodes at a reduced scale that is still at least twice the size needed.
            image.draft(None, (2 * short_side, 2 * short_side))
        image.load()
        # A damaged EXIF block may raise anything, and is no reason to lose the picture. In place, because Pillow then
        # turns the pixels before it rewrites the tags, so that an error in the latter leaves the picture upright.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
    if short_side and min(rgb.size) != short_side:
        scale = short_side / min(rgb.size)
        width, height = (max(short_side, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return rgb


def check_headers(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(paths that open as images, [(path, reason)] of the others). Reads file headers only."""
    good, broken = [], []
    with bar(" files", len(paths), desc="reading image headers", delay=1, leave=False) as progress:
        for path in paths:
            try:
                with _open(path):
                    good.append(path)
            except BROKEN as error:
                broken.append((path, _reason(error)))
            progress.update(1)
    return good, broken


def _open(path: str | os.PathLike) -> Image.Image:
    image = Image.open(path, formats=_FORMATS)
    if image.mode == "F":
        image.close()
        raise ValueError(
            "pixels: got floating-point values without a known white, expected integers; save the image with 8 bits"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit gray is "I;16" or, in older versions of Pillow, "I"; Pillow's own conversion clips both at 255.
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
