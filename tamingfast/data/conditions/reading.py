"""Reading the files of conditions; errors name the file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tamingfast.data.checks import is_number
from tamingfast.data.rgb import opened
from tamingfast.data.views import Size, View
from tamingfast.errors import UserError, brief
from tamingfast.files import open_regular, read_text

_LARGEST_JSON = 1 << 26
_MOST_PIXELS = 1 << 28


def gray_png(path: str | os.PathLike, indexed: bool = False) -> np.ndarray:
    """int64 (H, W): the values of a PNG with one channel, palette indices if ``indexed`` and it has a palette."""
    wanted = "an indexed or gray PNG whose values are labels" if indexed else "a gray PNG with 8 or 16 bits"
    with opened(path, wanted, ("PNG",)) as image:
        image.load()
        values, depth = np.asarray(image).astype(np.int64), image.info["bit_depth"]
    if image.mode not in ("L", "I", "I;16", "1") and not (indexed and image.mode == "P"):
        raise UserError(f"{path}: got pixels of mode {image.mode}, expected {wanted}; convert it")
    # Pillow spreads the grays of two and four bits over eight.
    return values // (255 // (2**depth - 1)) if image.mode == "L" and depth in (2, 4) else values


def packed_floats(path: str | os.PathLike) -> np.ndarray:
    """float32 (H, W): the numbers whose four bytes, the lowest first, are the pixels of an RGBA PNG; or `gray_png`."""
    with opened(path, "a PNG of depth", ("PNG",)) as image:
        packed = image.mode == "RGBA"
        pixels = np.ascontiguousarray(np.asarray(image)) if packed else None
    return gray_png(path) if pixels is None else pixels.view("<f4")[..., 0]


def numbers(path: str | os.PathLike) -> np.ndarray:
    """The numbers (H, W) of a .npy file; a last axis of length 1 is dropped."""
    wanted = "a .npy file with numbers (height, width)"
    try:
        with open_regular(path) as stream:
            values = np.load(stream, allow_pickle=False)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: got no such file, expected {wanted}; correct the path") from None
    except Exception as error:  # numpy evaluates the header of the file
        raise _unreadable(path, error, wanted) from error
    if not isinstance(values, np.ndarray):
        raise UserError(f"{path}: got an archive of arrays, expected {wanted}")
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
        raise UserError(f"{path}: got {values.dtype} of shape {values.shape}, expected {wanted}")
    return values


def entries(path: str | os.PathLike, name: str, form: str) -> tuple[list[Any], tuple[float, float], Mapping[str, Any]]:
    """(the list ``name``, its picture's (width, height) in pixels, the whole object) of a JSON file.

    ``form`` is an example of a valid file, for messages.
    """
    text = read_text(path, f"JSON like {form}", largest=_LARGEST_JSON)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error, f"JSON like {form}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get(name), list):
        raise UserError(f'{path}: got JSON without the list "{name}", expected {form}')
    width: Any = content.get("width")
    height: Any = content.get("height")
    if not (is_number(width) and is_number(height) and min(width, height) >= 1 and width * height <= _MOST_PIXELS):
        raise UserError(
            f"{path}: got width {brief(width)} and height {brief(height)}, expected the size of the picture that "
            'the coordinates refer to; add "width" and "height" in pixels'
        )
    return content[name], (width, height), content


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


def nearest(values: np.ndarray, size: Size, view: View | None = None) -> np.ndarray:
    """``values`` (H, W) scaled to ``size`` by nearest neighbour, or the part of that which ``view`` shows."""
    width, height = size
    view = view or View.whole(size)
    rows = (np.arange(view.top, view.top + view.height) * 2 + 1) * values.shape[0] // (2 * height)
    columns = (np.arange(view.left, view.left + view.width) * 2 + 1) * values.shape[1] // (2 * width)
    return view.turned(values[rows[:, None], columns])


def _unreadable(path: str | os.PathLike, error: Exception, wanted: str) -> UserError:
    return UserError(f"{path}: got a file that cannot be read ({error}), expected {wanted}; replace it")
