"""Image files as tensors: photos, masks, and images cut to a size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamingfast.errors import UserError


def read_photo(path: str | os.PathLike) -> Tensor:
    """An image file as it is: (1, 3, H, W) in [-1, 1]. Raises UserError when it is missing or cannot be read."""
    return _pixels([np.asarray(read(Path(path)))])


def read_mask(path: str | os.PathLike, height: int, width: int) -> Tensor:
    """An image file of the given size as bool (H, W), True where it is lighter than mid-gray."""
    mask = np.asarray(read(Path(path)).convert("L")) >= 128
    if mask.shape != (height, width):
        raise UserError(
            f"{path} is {mask.shape[0]}x{mask.shape[1]} pixels, but the photo is {height}x{width}: "
            "give a mask of the photo's size"
        )
    return torch.from_numpy(mask)


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files, a directory standing for the images in it; UserError for directories without any."""
    from tamingfast.data.rgb import EXTENSIONS

    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
        if not inside:
            raise UserError(
                f"{path} holds no images ({', '.join(sorted(EXTENSIONS))}); give image files or their directory"
            )
        files += inside
    return files


def load_images(files: Sequence[str | os.PathLike], height: int, width: int) -> Tensor:
    """Image files, scaled to cover height x width pixels and cut at the centre: (B, 3, height, width) in [-1, 1].

    Raises UserError naming a file that is missing or cannot be read.
    """
    return _pixels([cover(read(Path(path)), height, width) for path in files])


def read(path: Path) -> Any:
    """An image file as a `PIL.Image.Image` in RGB. Raises UserError when it is missing or cannot be read."""
    from tamingfast.data.rgb import read_rgb

    try:
        return read_rgb(path)
    except FileNotFoundError:
        raise UserError(f"no image at {path}; give the path of an existing file") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def _pixels(batch: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1


def cover(image: Any, height: int, width: int) -> np.ndarray:
    """A PIL image scaled to cover so many pixels and cut at the centre: uint8 (height, width, C)."""
    from PIL import ImageOps

    return np.asarray(ImageOps.fit(image, (width, height)))
