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
from tamingfast.data.folders import scan
from tamingfast.data.image_files import warn_skipped
from tamingfast.data.rgb import read_rgb, to_rgb
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
    """A mask of height x width pixels as bool (H, W), True where a picture is lighter than mid-gray and opaque.

    Bool arrays and tensors (H, W) are used as they are. Raises UserError for any other size, and for pictures whose
    white is 1 instead of 255.
    """
    name = named(source, "mask")
    if isinstance(source, np.ndarray | Tensor) and source.dtype in (np.bool_, torch.bool):
        mask = torch.as_tensor(source)
    else:
        # Over black, so that what is transparent is not chosen.
        lightness = np.asarray(as_image(source, "mask", background="black").convert("L"))
        if lightness.size and lightness.max() == 1:
            raise UserError(f"{name}: got no value above 1, expected 0 to 255; make white 255, or give bool (H, W)")
        mask = torch.from_numpy(lightness >= 128)
    if mask.shape != (height, width):
        raise UserError(
            f"{name}: got {'x'.join(map(str, mask.shape))} pixels, expected {height}x{width}, the photo's size"
        )
    return mask.cpu()


def image_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths, with each directory replaced by the images in it and its sub-folders, in the order of their names.

    What else lies in a directory is named in a warning; see `tamingfast.data.folders.scan`. Raises UserError for a
    directory without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside, skipped = scan(path, pixels=True)
        warn_skipped(skipped)
        files += [path / name for name, _ in inside]
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


def as_image(source: Picture, name: str = "picture", background: str = "white") -> Image.Image:
    """A picture as a PIL image in RGB; files are turned upright, and transparency is laid over the ``background``.

    Raises UserError as `read_photo` does; ``name`` is that of a ``source`` in memory.
    """
    if isinstance(source, str | os.PathLike):
        return read_rgb(source, background=background)
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source, background)
        except (OSError, SyntaxError, ValueError) as error:  # of an image that is read only now, or of its mode
            raise UserError(f"{name}: got an image that cannot be used ({error}), expected one in RGB") from error
    if isinstance(source, Tensor):
        return Image.fromarray(images.to_uint8(_checked(source, name)[0]))
    if not isinstance(source, np.ndarray):
        raise UserError(f"{name}: got {type(source).__name__}, expected a path, a PIL image, an array or a tensor")
    shaped = source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)
    if source.dtype != np.uint8 or not shaped or not source.size:
        raise UserError(
            f"{name}: got {source.dtype} of shape {source.shape}, expected uint8 (H, W) or (H, W, 3) from 0 to 255"
        )
    return Image.fromarray(source).convert("RGB")


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


def _checked(x: Tensor, name: str = "picture") -> Tensor:
    whole = x[None] if x.ndim == 3 else x
    if whole.ndim != 4 or len(whole) != 1 or whole.shape[1] != 3 or not x.is_floating_point() or not x.numel():
        raise UserError(
            f"{name}: got {x.dtype} of shape {tuple(x.shape)}, expected floating point (3, H, W) or (1, 3, H, W)"
        )
    return whole.detach().float().cpu()


def _fitted(picture: Picture, height: int, width: int) -> Tensor:
    if isinstance(picture, Tensor) and picture.shape[-2:] == (height, width):
        return _checked(picture)  # not rounded to 8 bits
    return _pixels([cover(as_image(picture), height, width)])


def _pixels(batch: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
