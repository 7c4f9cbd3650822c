"""Image tensors in [-1, 1] as 8-bit pixels, contact sheets and PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tamingfast.errors import brief
from tamingfast.files import atomic_write, check_png


def to_uint8(images: Tensor) -> np.ndarray:
    """Floating-point images (B, C, H, W) or (C, H, W) in [-1, 1], C = 1 or 3, as uint8 (B, H, W, 3) or (H, W, 3).

    Values outside the range are clipped, NaN becomes black, and a single channel becomes gray. Raises ValueError for
    any other shape and for integer tensors.
    """
    fits = isinstance(images, Tensor) and images.ndim in (3, 4) and images.is_floating_point()
    if not fits or images.shape[-3] not in (1, 3):
        raise ValueError(
            f"images: got {_described(images)}, expected floating point (B, C, H, W) or (C, H, W) with 1 or 3 channels"
        )
    clipped = images.detach().float().nan_to_num(-1.0, 1.0, -1.0).clamp(-1, 1)
    pixels = ((clipped + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else brief(value)


def grid(images: Tensor | np.ndarray, columns: int | None = None, padding: int = 2) -> np.ndarray:
    """A contact sheet, uint8 (height, width, 3), of images (B, C, H, W) in [-1, 1] or pixels uint8 (B, H, W, 3).

    ``columns`` is the number of images per row; by default the sheet is as close to a square as possible. Images are
    ``padding`` white pixels apart, and places without an image are white. Raises ValueError for an empty batch.
    """
    pixels = images if isinstance(images, np.ndarray) else to_uint8(images)
    if pixels.ndim != 4 or not len(pixels) or pixels.dtype != np.uint8 or pixels.shape[3] != 3:
        raise ValueError(
            f"images: got {_described(images)}, expected at least one image, a tensor (B, C, H, W) or an array uint8 "
            "(B, H, W, 3)"
        )
    count, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8
    )
    for number, image in enumerate(pixels):
        top = padding + number // columns * (height + padding)
        left = padding + number % columns * (width + padding)
        sheet[top : top + height, left : left + width] = image
    return sheet


def magnified(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Pixels (H, W, 3), each repeated ``scale`` times in both directions, for images too small to look at."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else pixels


def save_png(
    path: str | os.PathLike, pixels: np.ndarray, scale: int = 1, texts: Mapping[str, str] | None = None
) -> None:
    """Write uint8 pixels (H, W, 3), `magnified` by ``scale``, as PNG, atomically; raises what `check_png` raises.

    ``texts`` are kept in the file by their names, each in a text chunk before the pixels.
    """
    check_png(path)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
        raise ValueError(f"pixels: got {_described(pixels)}, expected an array uint8 (H, W, 3); see images.to_uint8")
    kept = PngInfo()
    for name, text in (texts or {}).items():
        kept.add_text(name, text)
    with atomic_write(path) as temporary:
        Image.fromarray(np.ascontiguousarray(magnified(pixels, scale))).save(temporary, format="PNG", pnginfo=kept)


def save_grid(
    path: str | os.PathLike,
    images: Tensor | np.ndarray,
    columns: int | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write `grid` of ``images`` as PNG; ``texts`` as in `save_png`."""
    save_png(path, grid(images, columns), texts=texts)


def table(rows: Sequence[Tensor | Sequence[Tensor]], padding: int = 2) -> np.ndarray:
    """Images (C, H, W) in [-1, 1] in rows and columns, uint8 (height, width, 3), ``padding`` white pixels apart.

    A row is as high as its highest image, a column as wide as its widest. Raises ValueError for rows of different
    lengths and for no images.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(f"rows: got {sorted(lengths)} images, expected the same number in each row, at least one")
    pixels = [[to_uint8(image) for image in row] for row in rows]
    heights = [max(image.shape[0] for image in row) for row in pixels]
    widths = [max(row[column].shape[1] for row in pixels) for column in range(lengths.pop())]
    tops, lefts = (list(accumulate((side + padding for side in sides), initial=padding)) for sides in (heights, widths))
    sheet = np.full((tops[-1], lefts[-1], 3), 255, np.uint8)
    for top, row in zip(tops, pixels, strict=False):
        for left, image in zip(lefts, row, strict=False):
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def save_rows(
    path: str | os.PathLike,
    rows: Sequence[Tensor | Sequence[Tensor]],
    names: Sequence[str] = (),
    scale: int = 1,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write images (C, H, W), or batches of them, as the rows of one PNG, such as images above reconstructions.

    ``names`` are written to the left of their rows; ``scale`` and ``texts`` are as in `save_png`. Raises what `table`
    raises.
    """
    sheet = magnified(table(rows), scale)
    save_png(path, labelled(sheet, names) if names else sheet, texts=texts)


def labelled(sheet: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """A sheet (H, W, 3) of rows of equal height, with the rows' names in a white margin on the left."""
    height = len(sheet) // len(names)
    font = ImageFont.load_default(size=max(12, height // 6))
    gap = height // 16 + 2
    margin = np.full((len(sheet), int(max(map(font.getlength, names))) + 2 * gap, 3), 255, np.uint8)
    drawn = Image.fromarray(margin)
    for row, name in enumerate(names):
        middle = (margin.shape[1] - gap, row * height + height // 2)
        ImageDraw.Draw(drawn).text(middle, name, fill="black", font=font, anchor="rm")
    return np.concatenate((np.asarray(drawn), sheet), axis=1)
