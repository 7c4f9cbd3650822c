"""Input pictures, from files or from memory, as tensors."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from tamingfast import images
from tamingfast.data.image_files import warn_skipped
from tamingfast.data.listing import scan
from tamingfast.data.rgb import opened, read_rgb, to_rgb, upright_size
from tamingfast.errors import UserError, check_count
from tamingfast.ops.backends import available_memory
from tamingfast.tasks.models import first_stage_of
from tamingfast.tasks.sizes import image_size

logger = logging.getLogger(__name__)

#: Pixels of pictures that are processed together, and bytes of a pixel in float32.
_PIXELS, _BYTES = 2**21, 12
#: Lightness up to which a pixel of a mask counts as black, and from which on as white.
_BLACK, _WHITE = 16, 239
#: Shades of gray that a mask may be painted in.
_SHADES = 16

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

    Bool arrays and tensors (H, W) are used as they are. Raises UserError for any other size, for pictures whose white
    is 1 instead of 255, and for photos.
    """
    name = named(source, "mask")
    if isinstance(source, np.ndarray | Tensor) and source.dtype in (np.bool_, torch.bool):
        mask = torch.as_tensor(source)
    else:
        # Over black, so that what is transparent is not chosen.
        lightness = np.asarray(as_image(source, "mask", background="black").convert("L"))
        if lightness.size and lightness.max() == 1:
            raise UserError(f"{name}: got no value above 1, expected 0 to 255; make white 255, or give bool (H, W)")
        if lightness.shape == (height, width):
            _check_mask(lightness, name)
        mask = torch.from_numpy(lightness >= 128)
    if mask.shape != (height, width):
        raise UserError(
            f"{name}: got {'x'.join(map(str, mask.shape))} pixels, expected {height}x{width}, the photo's size"
        )
    return mask.cpu()


def _check_mask(lightness: np.ndarray, name: str) -> None:
    """Raise UserError where most of uint8 (H, W) is neither black nor white but many shades of gray, as in a photo."""
    between = (lightness > _BLACK) & (lightness < _WHITE)
    if between.mean() > 0.5 and len(np.unique(lightness[between])) > _SHADES:
        raise UserError(
            f"{name}: got a picture of which {between.mean():.0%} is neither black nor white, expected a mask; paint "
            "what is to change white, on black or on nothing"
        )


def read_strokes(source: str | os.PathLike[str]) -> np.ndarray:
    """The colours of a picture file and how much they cover, uint8 (H, W, 4). Raises UserError as `read_photo` does."""
    with opened(source) as image:
        return np.asarray(image.convert("RGBA"))


def scaled_size(model: nn.Module, source: Picture, side: int) -> tuple[int, int]:
    """(height, width) for a picture whose longer side is to be about ``side`` pixels, both multiples of f.

    Raises UserError for a ``side`` below one token, and as `read_photo` does.
    """
    check_count("side", side)
    height, width = own_size(source)
    factor, scale = first_stage_of(model).factor, side / max(height, width)
    multiples_of(factor, side, side, "side")
    height, width = (max(1, round(own * scale / factor)) * factor for own in (height, width))
    return height, width


def image_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths, with each directory replaced by the images in it and its sub-folders, in the order of their names.

    What else lies in a directory is named in a warning; see `tamingfast.data.listing.scan`. Raises UserError for a
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


def own_size(source: Picture) -> tuple[int, int]:
    """(height, width) of a picture; of a file only the header is read. Raises UserError as `read_photo` does."""
    if isinstance(source, str | os.PathLike):
        return upright_size(source)
    if isinstance(source, Tensor):
        _, _, height, width = _checked(source).shape
        return height, width
    image = as_image(source)
    return image.height, image.width


@dataclass(frozen=True, eq=False)
class Sized:
    """A picture, and the (height, width) in pixels that it is processed in: its own cut to multiples, or another."""

    picture: Picture
    size: tuple[int, int]

    def read(self, factor: int) -> Tensor:
        """The pixels, float32 (1, 3, height, width), cut out of the middle, or of the picture scaled to cover them."""
        x = read_photo(self.picture)
        beyond = [own - side for own, side in zip(x.shape[2:], self.size, strict=True)]
        if not all(0 <= more < factor for more in beyond):
            return load_images([self.picture], *self.size)
        top, left = (more // 2 for more in beyond)
        return x[..., top : top + self.size[0], left : left + self.size[1]]


def sized(model: nn.Module, pictures: Pictures, size: tuple[int, int] | None, copies: int) -> list[Sized]:
    """The pictures, each in ``size`` or, without it, whole: cut to multiples of f, which a warning says.

    Raises UserError for a picture that cannot be read or is smaller than a token, for a ``size`` that is no multiple of
    f, and where ``copies`` of them all do not fit into memory.
    """
    several, factor = listed(pictures), first_stage_of(model).factor
    if size is not None:
        found = [Sized(picture, image_size(model, size)) for picture in several]
    else:
        found, cut = [], []
        for picture in several:
            height, width = own_size(picture)
            whole = multiples_of(factor, height, width, named(picture, "picture"))
            found.append(Sized(picture, whole))
            if whole != (height, width):
                cut.append(f"{named(picture, 'a picture')} from {height}x{width} to {whole[0]}x{whole[1]}")
        if cut:
            more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
            logger.warning("cut to multiples of f = %d pixels: %s%s", factor, cut[0], more)
    needed, free = _BYTES * copies * sum(math.prod(one.size) for one in found), available_memory(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"memory: got {free / 2**30:.1f} GiB free, expected {needed / 2**30:.1f} GiB for {len(found)} pictures and "
            "what is made of them; give fewer or a smaller size"
        )
    return found


def batches(pictures: Sequence[Sized], factor: int) -> Iterator[tuple[slice, Tensor]]:
    """The pictures (b, 3, H, W) with their places in the list: as many of one size as are small, in order."""
    first = 0
    while first < len(pictures):
        room = max(1, _PIXELS // math.prod(pictures[first].size))
        _, alike = next(groupby(pictures[first : first + room], key=lambda one: one.size))
        x = torch.cat([one.read(factor) for one in alike])
        yield slice(first, first + len(x)), x
        first += len(x)


def multiples_of(factor: int, height: int, width: int, name: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) rounded down to multiples of ``factor``; UserError about ``name`` if less than one is left."""
    if min(height, width) < factor:
        raise UserError(
            f"{name}: got {height}x{width} pixels, expected at least {factor}x{factor}, one token; give a larger "
            "picture, or a size to scale it to"
        )
    return height // factor * factor, width // factor * factor


def batch_of(
    model: nn.Module, pictures: Pictures, size: tuple[int, int] | None
) -> tuple[list[Picture], Tensor, tuple[int, int]]:
    """The pictures as a list, the batch that `load_images` makes of them, and its (height, width).

    Without ``size`` a tensor (B, 3, H, W) keeps its own size, and other pictures get the size that the model was
    trained on. Raises UserError as `read_photo` does, and for sizes that are not multiples of f.
    """
    if size is None and isinstance(pictures, Tensor) and pictures.ndim == 4:
        size = (pictures.shape[2], pictures.shape[3])
    several, given, size = listed(pictures), size, image_size(model, size)
    if given is None and (other := next((one for one in several if own_size(one) != size), None)) is not None:
        logger.warning("scaled and cut to %dx%d pixels, the training size: %s", *size, named(other, "a picture"))
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


def save_pictures(path: str | os.PathLike[str], batch: Tensor, texts: Mapping[str, str] | None = None) -> None:
    """Write images (B, 3, H, W) in [-1, 1] to one PNG: a single image as it is, several as a sheet.

    ``texts`` as in `tamingfast.images.save_png`.
    """
    if len(batch) == 1:
        images.save_png(path, images.to_uint8(batch[0]), texts=texts)
    else:
        images.save_grid(path, batch, texts=texts)


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
