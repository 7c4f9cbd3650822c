"""Image files as upright 8-bit RGB, and the [-1, 1] scale. Every image file is opened here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from tamingfast.data import png
from tamingfast.errors import UserError
from tamingfast.files import open_regular
from tamingfast.ops.machine import available_memory
from tamingfast.progress import bar

# Files with a wrong extension are common, so the content decides; decoders that start other programs are left out.
# Some builds of Pillow cannot read AVIF, and HEIF needs a plugin.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16")

#: Why a file whose content is of no known format is skipped.
UNKNOWN = "not an image in a known format"

# Bytes of memory per pixel while a picture is decoded, turned and converted.
_COPIES = 16
_ALWAYS_READ = 1 << 22  # pixels

# x / 127.5 - 1 rounded once from double precision, as the original repository's loaders compute it.
_UNIT_SCALE = (np.arange(256) / 127.5 - 1.0).astype(np.float32)


def unit_scale(pixels: np.ndarray) -> np.ndarray:
    """float32 array in [-1, 1] with the shape of the uint8 array ``pixels``."""
    return _UNIT_SCALE[pixels]


def to_unit_scale(pixels: np.ndarray) -> torch.Tensor:
    """`unit_scale` as a tensor."""
    return torch.from_numpy(unit_scale(pixels))


def formats() -> list[str]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def image_endings() -> set[str]:
    """The usual endings of files in these formats, in lower case and without the dot."""
    known = {*formats(), "MPO"}  # which begins with a JPEG
    found = {ending[1:] for ending, name in Image.registered_extensions().items() if name in known}
    return found - {"pfm"}  # which holds floating-point pixels


def endings() -> str:
    """These endings, for messages."""
    return ", ".join(f".{ending}" for ending in sorted(image_endings()))


@contextlib.contextmanager
def opened(
    path: str | os.PathLike, expected: str = "an image", among: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """An image file whose pixels are not decoded yet, by its content one of the formats ``among``, by default of all.

    ``image.info["bit_depth"]`` is a PNG file's. Raises UserError, which names the file and what was ``expected``, for
    whatever cannot be opened, and for errors of Pillow in the block.
    """
    try:
        with _opened(path, among) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: got no such file, expected {expected}; correct the path") from None
    except Exception as error:  # Pillow's decoders raise what their files lead them to
        raise UserError(
            f"{path}: got a file that cannot be read ({_reason(path, error)}), expected {expected}; replace it"
        ) from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike, among: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    with open_regular(path) as file:
        depth = png.bit_depth(file)
        with Image.open(png.without_long_texts(file), formats=among or formats()) as image:
            _check(image)
            image.info["bit_depth"] = depth
            yield image


def _check(image: Image.Image) -> None:
    """Raise ValueError for pixels without a known meaning as colours, or too many for the memory."""
    if image.mode == "F":
        raise ValueError(
            "pixels: got floating-point values without a known white, expected integers; save the image with 8 bits"
        )
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise ValueError(f"pixels: got the mode {image.mode}, expected gray or RGB; save the image as RGB")
    pixels = image.width * image.height
    if pixels > _ALWAYS_READ and pixels * _COPIES > available_memory(torch.device("cpu")):
        raise ValueError(
            f"pixels: got {image.width}x{image.height}, expected at most what fits into this machine's memory; reduce "
            "the image"
        )


def read_rgb(path: str | os.PathLike, short_side: int | None = None, background: str = "white") -> Image.Image:
    """The image as 8-bit RGB, upright, its shorter side reduced to ``short_side`` if that is given and smaller.

    Applies the EXIF orientation, lays transparency over the ``background``, scales 16-bit gray to 8 bits and converts
    other modes; an animation's first picture is taken. Raises UserError for files that cannot be read.
    """
    with opened(path) as image:
        if short_side:
            # JPEG only: decodes at a reduced scale that is still at least twice the size needed.
            image.draft(None, (2 * short_side, 2 * short_side))
        image.load()
        # A damaged EXIF block may raise anything, and is no reason to lose the picture. In place, because Pillow then
        # turns the pixels before it rewrites the tags, so that an error in the latter leaves the picture upright.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        rgb = to_rgb(image, background)
    if short_side and min(rgb.size) > short_side:
        rgb = rgb.resize(scaled_size(rgb.size, short_side), Image.Resampling.BICUBIC)
    return rgb


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of the image that `read_rgb` gives, from the file's header. Raises UserError as that does."""
    with opened(path) as image:
        turned = False
        with contextlib.suppress(Exception):  # of a damaged EXIF block
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) with the shorter side scaled to ``short_side``."""
    scale = short_side / min(size)
    width, height = (max(short_side, round(side * scale)) for side in size)
    return width, height


def check_headers(paths: Sequence[str | os.PathLike], pixels: bool = False) -> tuple[list[str], list[tuple[str, str]]]:
    """(paths that open as images, [(path, reason)] of the others).

    Only headers are read, so that later a file may still turn out to be damaged, or all ``pixels`` too.
    """
    good, broken = [], []
    with bar(" files", len(paths), desc="reading image headers", delay=1, leave=False) as progress:
        for path in paths:
            try:
                with _opened(path) as image:
                    if pixels:
                        image.load()
                good.append(os.fspath(path))
            except Exception as error:  # as in `opened`
                broken.append((os.fspath(path), _reason(path, error)))
            progress.update(1)
    return good, broken


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """An image of any mode as RGB, transparency laid over the ``background``. Raises ValueError for unknown modes."""
    _check(image)
    key = image.info.get("transparency")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or (image.mode == "P" and key is not None):
        whole = image.convert("RGBA")
        return _over(whole.convert("RGB"), whole.getchannel("A"), background)
    rgb = _gray_of(image).convert("RGB") if image.mode.startswith("I") else image.convert("RGB")
    if key is None or image.mode not in ("1", "L", "I", "I;16", "RGB"):
        return rgb
    visible = np.asarray(image) != _key_as_decoded(image, key)
    visible = visible.any(-1) if visible.ndim == 3 else visible
    return _over(rgb, Image.fromarray(visible.astype(np.uint8) * 255), background)


def _gray_of(image: Image.Image) -> Image.Image:
    # 16-bit gray is "I;16" or, in older versions of Pillow, "I"; Pillow's own conversion clips both at 255.
    gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray(((gray + 128) // 257).astype(np.uint8))


def _key_as_decoded(image: Image.Image, key: int | tuple[int, ...]) -> np.ndarray:
    """The value of transparent pixels, which Pillow gives as a PNG file has it, scaled as Pillow scales the pixels."""
    depth = image.info.get("bit_depth")
    value = np.asarray(key)
    if image.mode == "1":  # 1 or 255 is white
        return value != 0
    if image.mode == "L" and depth in (2, 4):
        return value * (255 // (2**depth - 1))
    return value >> 8 if image.mode == "RGB" and depth == 16 else value


def _over(rgb: Image.Image, alpha: Image.Image, background: str) -> Image.Image:
    return Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)


def _reason(path: str | os.PathLike, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return UNKNOWN
    told = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
    return " ".join(told.split()) or type(error).__name__
