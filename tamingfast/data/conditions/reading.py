"""Reading the files of conditions; errors name the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tamingfast.data.conditions.kind import Size
from tamingfast.data.rgb import read_rgb
from tamingfast.errors import UserError


def gray_png(path: str | os.PathLike, indexed: bool = False) -> np.ndarray:
    """int64 (H, W): the values of a PNG with one channel, palette indices if ``indexed`` and it has a palette."""
    wanted = "an indexed or gray PNG whose values are labels" if indexed else "a gray PNG with 8 or 16 bits"
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
    except FileNotFoundError:
        raise _missing(path, wanted) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error, wanted) from error
    if image.mode not in ("L", "I", "I;16", "1") and not (indexed and image.mode == "P"):
        raise UserError(f"{path}: got pixels of mode {image.mode}, expected {wanted}; convert it")
    return np.asarray(image).astype(np.int64)


def numbers(path: str | os.PathLike) -> np.ndarray:
    """The numbers (H, W) of a .npy file; a last axis of length 1 is dropped."""
    wanted = "a .npy file with numbers (height, width)"
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise _missing(path, wanted) from None
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error, wanted) from error
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
        raise UserError(f"{path}: got {values.dtype} of shape {values.shape}, expected {wanted}")
    return values


def rgb(path: str | os.PathLike) -> Image.Image:
    """An image file in RGB."""
    try:
        return read_rgb(path)
    except FileNotFoundError:
        raise _missing(path, "an image") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error, "an image") from error


def entries(path: str | os.PathLike, name: str, form: str) -> tuple[list[Any], tuple[float, float], Mapping[str, Any]]:
    """(the list ``name``, its picture's (width, height) in pixels, the whole object) of a JSON file.

    ``form`` is an example of a valid file, for messages.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path, form) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, f"JSON like {form}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get(name), list):
        raise UserError(f'{path}: got JSON without the list "{name}", expected {form}')
    width: Any = content.get("width")
    height: Any = content.get("height")
    if not (is_number(width) and is_number(height) and min(width, height) >= 1):
        raise UserError(
            f"{path}: got width {width} and height {height}, expected the size of the picture that the coordinates "
            'refer to; add "width" and "height" in pixels'
        )
    return content[name], (width, height), content


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; ``true`` and ``false`` are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def target_size(path: str | os.PathLike, values: np.ndarray, size: Size | None) -> Size:
    """``size`` after `check_shape`, or the size of ``values`` (H, W) if it is None."""
    own = (values.shape[1], values.shape[0])
    if size is None:
        return own
    check_shape(path, own, size)
    return size


def check_shape(path: str | os.PathLike, own: Size, size: Size) -> None:
    """Raise UserError unless uniform scaling turns ``own`` into ``size``, up to a pixel."""
    scale = min(size) / min(own)
    if any(abs(side * scale - wanted) > 1 + scale for side, wanted in zip(own, size, strict=True)):
        raise UserError(
            f"{path}: got {own[0]}x{own[1]} pixels (width x height), expected the shape of the image, which has "
            f"{size[0]}x{size[1]}; give a condition that covers the image"
        )


def nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """``values`` (H, W) scaled to ``size`` by nearest neighbour."""
    width, height = size
    rows = (np.arange(height) * 2 + 1) * values.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * values.shape[1] // (2 * width)
    return values[rows[:, None], columns]


def _missing(path: str | os.PathLike, wanted: str) -> UserError:
    return UserError(f"{path}: got no such file, expected {wanted}; correct the path")


def _unreadable(path: str | os.PathLike, error: Exception, wanted: str) -> UserError:
    return UserError(f"{path}: got a file that cannot be read ({error}), expected {wanted}; replace it")
