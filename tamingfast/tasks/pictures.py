"""Input pictures, from files or from memory, as tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from tamingfast import images
from tamingfast.data.rgb import EXTENSIONS, read_rgb
from tamingfast.errors import UserError
from tamingfast.tasks.sizes import image_size

#: An image file, a PIL image, an array uint8 (H, W) or (H, W, 3), or a tensor float (3, H, W) or (1, 3, H, W) in
#: [-1, 1].
Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
#: One or several pictures, where a directory stands for the image files in it; or a tensor (B, 3, H, W) in [-1, 1].
Pictures: TypeAlias = Sequence[Picture] | Picture


def read_photo(source: Picture) -> Tensor:
    """A picture in its own size: float32 (1, 3, H, W) in [-1, 1].

    Raises UserError if a file is missing or cannot be read, or an array or tensor has another shape or type.
    """
    if isinstance(source, Tensor):
        return _checked(source)
    return _pixels([np.asarray(as_image(source))])


def read_mask(source: Picture, height: int, width: int) -> Tensor:
    """A mask of height x width pixels as bool (H, W), True where a picture is lighter than mid-gray.

    Bool arrays and tensors (H, W) are used as they are. Raises UserError for any other size.
    """
    if isinstance(source, np.ndarray | Tensor) and source.dtype in (np.bool_, torch.bool):
        mask = torch.as_tensor(source)
    else:
        mask = torch.from_numpy(np.asarray(as_image(source).convert("L")) >= 128)
    if mask.shape != (height, width):
        raise UserError(
            f"{named(source, 'mask')}: got {'x'.join(map(str, mask.shape))} pixels, expected {height}x{width}, the "
            "photo's size"
        )
    return mask.cpu()


def image_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths, with each directory replaced by the images in it; UserError for a directory without images."""
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
        if not inside:
            raise UserError(
                f"{path}: got a directory without images, expected image files ({', '.join(sorted(EXTENSIONS))})"
            )
        files += inside
    return files


def listed(pictures: Pictures) -> list[Picture]:
    """One or several pictures as a list, with each directory replaced by its image files."""
    if isinstance(pictures, Tensor) and pictures.ndim == 4:
        return list(pictures.split(1))
    several = list(pictures) if isinstance(pictures, Sequence) and not isinstance(pictures, str) else [pictures]
    found: list[Picture] = []
    for picture in several:
        found += image_files([picture]) if isinstance(picture, str | os.PathLike) else [picture]
    return found


def load_images(pictures: Sequence[Picture], height: int, width: int) -> Tensor:
    """Pictures scaled to cover height x width pixels and cut at the centre: float32 (B, 3, height, width) in [-1, 1].

    Raises UserError as `read_photo` does.
    """
    return torch.cat([_fitted(picture, height, width) for picture in pictures])


def batch_of(
    model: nn.Module, pictures: Pictures, size: tuple[int, int] | None
) -> tuple[list[Picture], Tensor, tuple[int, int]]:
    """The pictures as a list, the batch that `load_images` makes of them, and its (height, width).

    Without ``size`` a tensor (B, 3, H, W) keeps its own size, and other pictures get the size that the model was
    trained on. Raises UserError as `read_photo` does, and for sizes that are not multiples of f.
    """
    if size is None and isinstance(pictures, Tensor) and pictures.ndim == 4:
        size = (pictures.shape[2], pictures.shape[3])
    several, size = listed(pictures), image_size(model, size)
    return several, load_images(several, *size), size


def as_image(source: Picture) -> Image.Image:
    """A picture as a PIL image in RGB; files are turned upright. Raises UserError as `read_photo` does."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Tensor):
        return Image.fromarray(images.to_uint8(_checked(source)[0]))
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] != 3):
            raise UserError(f"picture: got {source.dtype} of shape {source.shape}, expected uint8 (H, W) or (H, W, 3)")
        return Image.fromarray(source).convert("RGB")
    try:
        return read_rgb(source)
    except FileNotFoundError:
        raise UserError(f"{source}: got no such file, expected an image") from None
    except Exception as error:
        raise UserError(f"{source}: got a file that cannot be read ({error}), expected an image") from error


def save_pictures(path: str | os.PathLike[str], batch: Tensor) -> None:
    """Write images (B, 3, H, W) in [-1, 1] to one PNG: a single image as it is, several as a sheet."""
    if len(batch) == 1:
        images.save_png(path, images.to_uint8(batch[0]))
    else:
        images.save_grid(path, batch)


def cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """A PIL image scaled to cover height x width pixels and cut at the centre: uint8 (height, width, C)."""
    return np.asarray(ImageOps.fit(image, (width, height)))


def named(source: object, otherwise: str) -> str:
    """The name of a picture or condition in messages: the path of a file, else ``otherwise``."""
    return str(source) if isinstance(source, str | os.PathLike) else otherwise


def _checked(x: Tensor) -> Tensor:
    whole = x[None] if x.ndim == 3 else x
    if whole.ndim != 4 or len(whole) != 1 or whole.shape[1] != 3 or not x.is_floating_point():
        raise UserError(
            f"picture: got {x.dtype} of shape {tuple(x.shape)}, expected floating point (3, H, W) or (1, 3, H, W)"
        )
    return whole.detach().float().cpu()


def _fitted(picture: Picture, height: int, width: int) -> Tensor:
    if isinstance(picture, Tensor) and picture.shape[-2:] == (height, width):
        return _checked(picture)  # not rounded to 8 bits
    return _pixels([cover(as_image(picture), height, width)])


def _pixels(batch: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
