"""A person's own images: a directory with one sub-folder per class, or a text file that lists paths."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tamingfast.data.base import EpochDataset, positive, random_bits, random_integers, to_unit_scale
from tamingfast.errors import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
#: Bytes of decoded pictures that a data set keeps, in each worker process.
KEPT_BYTES = 128 * 2**20

# What Pillow raises for files that are not what they claim to be.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Files with a wrong extension are common and read all the same, but a decoder that starts other programs is
# not wanted.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_NAMED = 10

# The EXIF tag, and what makes each of its values upright.
_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def build(
    path: str | os.PathLike,
    size: int = 256,
    seed: int = 0,
    validation_path: str | os.PathLike | None = None,
    validation_fraction: float = 0.05,
    random_crop: bool = True,
    flip: bool = True,
) -> tuple[ImageFiles, ImageFiles]:
    """(train, validation) from the images under ``path``, read recursively.

    Sub-folders of ``path`` that hold images are the classes, in the order of their names; deeper folders
    belong to the class above them. Without sub-folders every image has class 0; beside sub-folders, images
    directly in ``path`` are left out and named by ``report``. Validation images are those under
    ``validation_path``, whose sub-folders must then be among the classes, or else ``validation_fraction`` of
    the files: those whose path relative to ``path`` hashes below it, so that adding files moves none of the
    others. (When that chooses no file at all, or every file, the one with the lowest, or highest, hash
    changes sides.)

    Training images have their shorter side resized to ``size`` and are cropped at random (``random_crop``)
    and mirrored at random (``flip``); validation images are cropped at the centre.

    Raises UserError when a directory is missing or holds no readable image, for unknown validation classes,
    and when one image is all there is to split.
    """
    size = positive("size", size)
    root = existing_directory("path", path)
    files, skipped = scan(root)
    classes = sorted({label for _, label in files if label is not None})
    if classes:
        skipped += [(str(root / name), "lies beside the class folders") for name, label in files if label is None]
        files = [(name, label) for name, label in files if label is not None]
    if validation_path is None:
        chosen = validation_names([name for name, _ in files], validation_fraction, root)
        train = [pair for pair in files if pair[0] not in chosen]
        validation, held_root, held_skipped = [pair for pair in files if pair[0] in chosen], root, []
    else:
        held_root = existing_directory("validation_path", validation_path)
        train, (validation, held_skipped) = files, scan(held_root)
        _check_classes(held_root, validation, classes)
    number = {label: place for place, label in enumerate(classes)}
    warn_skipped(skipped + held_skipped)

    def dataset(
        base: Path, pairs: list[tuple[str, str | None]], broken: list[tuple[str, str]], **options: Any
    ) -> ImageFiles:
        labels = [number.get(label, 0) for _, label in pairs]
        paths = [str(base / name) for name, _ in pairs]
        return ImageFiles(paths, size, labels=labels, classes=classes or None, broken=broken, seed=seed, **options)

    return (
        dataset(root, train, skipped, random_crop=random_crop, flip=flip),
        dataset(held_root, validation, held_skipped),
    )


@dataclass(frozen=True)
class View:
    """The part of a picture that an item shows: a box in pixels, mirrored or not.

    ``key`` decides whatever else differs from epoch to epoch, such as the order of things that have none.
    """

    left: int
    top: int
    width: int
    height: int
    flipped: bool = False
    key: int = 0

    def cut(self, array: np.ndarray) -> np.ndarray:
        """That part of anything (H, W, ...) that lies over the picture."""
        part = array[self.top : self.top + self.height, self.left : self.left + self.width]
        return part[:, ::-1] if self.flipped else part


class ImageFiles(EpochDataset):
    """Images read from their files one at a time, as the original repository's ``ImagePaths``.

    The shorter side is resized to ``short_side``, by default ``size`` (enlarged when it is smaller) and a square of
    ``size`` is cropped, at the centre or at random; without ``size`` images keep their shape. ``class_label`` is
    ``labels[index]``, else 0; ``classes`` are their names or None. A file whose pixels turn out to be unreadable is
    replaced by the next one that can be read, which `warn_broken` logs; ``report`` counts and names such files, and the
    pairs of path and reason in ``broken`` that were found, and logged, before. Pictures stay in memory as far as
    `KEPT_BYTES` reach, so files must not change while they are in use.

    Indexing raises UserError when no file can be read at all.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None = None,
        random_crop: bool = False,
        flip: bool = False,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        broken: Iterable[tuple[str, str]] = (),
        short_side: int | None = None,
    ) -> None:
        self.paths, self.size, self.seed = list(paths), size or None, seed
        self.short_side = short_side or self.size
        self.random_crop, self.flip = random_crop, flip
        self.labels = [0] * len(self.paths) if labels is None else list(labels)
        self.classes = None if classes is None else list(classes)
        self._skipped = list(broken)
        self._told: set[str] = set()
        self._kept: dict[int, Image.Image] = {}
        self._room = KEPT_BYTES
        # Shared memory, so that what worker processes find broken is known in the process that reports it.
        self._unreadable = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()

    @property
    def description(self) -> str:
        """What the images are, for reports and token files."""
        shape = f"{self.size}x{self.size}" if self.size else "their own size"
        return f"{len(self.paths)} image files as {shape}, the first {self.paths[0]}"

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(path, reason) of every file that was left out or could not be read so far."""
        return self._skipped + self._found_broken()

    def report(self) -> str:
        """One sentence that counts the files of ``broken`` and names the first ten, or an empty string."""
        return _skipped(self.broken)

    def warn_broken(self) -> None:
        """Log the files whose pixels have turned out to be unreadable since the last call."""
        new = [(path, reason) for path, reason in self._found_broken() if path not in self._told]
        self._told |= {path for path, _ in new}
        warn_skipped(new)

    def _found_broken(self) -> list[tuple[str, str]]:
        found = torch.nonzero(self._unreadable).flatten().tolist()
        return [(self.paths[index], "its pixels cannot be read") for index in found]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._check(index)
        for step in range(len(self.paths)):
            candidate = (index + step) % len(self.paths)
            if self._unreadable[candidate]:
                continue
            try:
                image = self._read(candidate)
            except _BROKEN:
                self._unreadable[candidate] = 1
                continue
            return self._item(candidate, image, self._view(image, index))
        raise UserError(
            f"None of the {len(self.paths)} image files can be read, {self.paths[0]} being the first: give other files"
        )

    def _read(self, number: int) -> Image.Image:
        """The picture before its crop. The first that fit are kept: to decode a photograph costs more than a step."""
        if number in self._kept:
            return self._kept[number]
        image = read_rgb(self.paths[number], self.short_side)
        size = 3 * image.width * image.height
        if size <= self._room:
            self._kept[number] = image
            self._room -= size
        return image

    def _item(self, number: int, image: Image.Image, view: View) -> dict[str, Any]:
        return {
            "image": to_unit_scale(view.cut(np.asarray(image))),
            "class_label": self.labels[number],
            "file_path_": self.paths[number],
        }

    def _view(self, image: Image.Image, index: int) -> View:
        """The crop and flip of this epoch."""
        row, column, mirror, other = (random_bits(self.seed, self.epoch, [index], draw) for draw in range(4))
        flipped = bool(self.flip and random_integers(mirror, 2)[0])
        if not self.size:
            return View(0, 0, *image.size, flipped, int(other[0]))
        room = (image.width - self.size, image.height - self.size)
        left, top = room[0] // 2, room[1] // 2
        if self.random_crop:
            left, top = (
                int(random_integers(bits, more + 1)[0]) for bits, more in zip((column, row), room, strict=True)
            )
        return View(left, top, self.size, self.size, flipped, int(other[0]))


class ImageList(ImageFiles):
    """The images whose paths a text file lists, one a line; relative ones begin at the working directory.

    Raises UserError when the file cannot be read, lists nothing, or none of what it lists can be opened.
    """

    def __init__(
        self,
        paths_file: str | os.PathLike,
        size: int | None = None,
        random_crop: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        try:
            lines = Path(paths_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{paths_file} cannot be read as a list of image paths ({error}): give a text file with one path a line"
            ) from error
        paths = [line.strip() for line in lines if line.strip()]
        if not paths:
            raise UserError(f"{paths_file} is empty: write the path of one image on each line")
        good, broken = _check_headers(paths)
        if not good:
            path, reason = broken[0]
            raise UserError(
                f"None of the {len(paths)} images that {paths_file} lists can be opened, {path}"
                f" ({reason}) being the first:"
                " correct the paths, relative ones begin at the working directory"
            )
        warn_skipped(broken)
        super().__init__(good, size, random_crop, flip, seed, broken=broken)


class CustomTrain(ImageList):
    """The original repository's ``taming.data.custom.CustomTrain``: centre crops of listed images."""

    def __init__(self, size: int, training_images_list_file: str | os.PathLike) -> None:
        super().__init__(training_images_list_file, size)


class CustomTest(ImageList):
    """The original repository's ``taming.data.custom.CustomTest``: centre crops of listed images."""

    def __init__(self, size: int, test_images_list_file: str | os.PathLike) -> None:
        super().__init__(test_images_list_file, size)


def read_rgb(path: str | os.PathLike, short_side: int | None = None) -> Image.Image:
    """The image as 8-bit RGB, upright, its shorter side resized to ``short_side`` when that is given.

    Honours the EXIF orientation. Transparency is laid over white, 16-bit gray scaled to 8, other modes are
    converted. Raises what Pillow raises for files that it cannot read, and ValueError for floating-point pixels.
    """
    with _open(path) as image:
        if short_side:
            # JPEG alone: decodes at a fraction of the full size that still leaves twice what is needed.
            image.draft(None, (2 * short_side, 2 * short_side))
        image.load()
        image = _to_rgb(_upright(image))
    if short_side and min(image.size) != short_side:
        scale = short_side / min(image.size)
        size = tuple(max(short_side, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def _open(path: str | os.PathLike) -> Image.Image:
    image = Image.open(path, formats=_FORMATS)
    if image.mode == "F":
        image.close()
        raise ValueError("its pixels are floating-point numbers, of which none is known to be white: save it in 8 bits")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # faulty notes about the camera raise anything, and are no reason to lose the picture
        orientation = None
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit gray is "I;16" or, in older versions of Pillow, "I"; its own conversion clips both at 255.
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def warn_skipped(broken: Iterable[tuple[str, str]]) -> None:
    """Log files that are left out, pairs of path and reason, in one sentence; nothing without any."""
    sentence = _skipped(list(dict.fromkeys(broken)))
    if sentence:
        logger.warning(sentence)


def _skipped(broken: Sequence[tuple[str, str]]) -> str:
    if not broken:
        return ""
    named = ", ".join(f"{path} ({reason})" for path, reason in broken[:_NAMED])
    rest = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    return f"{len(broken)} image file{'s were' if len(broken) > 1 else ' was'} skipped: {named}{rest}"


def existing_directory(key: str, path: str | os.PathLike) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{key}={root} {what}, but a directory of images is expected: correct the path")
    return root


def scan(root: Path) -> tuple[list[tuple[str, str | None]], list[tuple[str, str]]]:
    """[(path relative to root, class or None)] of images that open, [(path, reason)] of those that do not."""
    names = sorted(walk(root))
    candidates = [name for name in names if name.lower().endswith(EXTENSIONS)]
    if not candidates:
        others = f"{len(names)} other files such as" if len(names) > 1 else "1 other file,"
        there = f"{others} {names[0]}" if names else "no files"
        raise UserError(
            f"{root} holds {there}, but images ending in {', '.join(EXTENSIONS)} are expected in it or"
            " in one sub-folder per class: put images there or correct the path"
        )
    good, broken = _check_headers([str(root / name) for name in candidates])
    if not good:
        path, reason = broken[0]
        raise UserError(
            f"None of the {len(candidates)} image files in {root} can be opened, {path} ({reason})"
            " being the first: replace them"
        )
    opened = set(good)
    files = [name for name in candidates if str(root / name) in opened]
    return [(name, name.split("/", 1)[0] if "/" in name else None) for name in files], broken


def walk(root: Path) -> Iterator[str]:
    """Relative paths, parted by "/", of all files that are not hidden; links to folders are followed."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # A link to a folder above it would never end.
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        prefix = "" if folder == os.fspath(root) else Path(folder).relative_to(root).as_posix() + "/"
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield prefix + name


def _check_headers(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(paths that open as images, [(path, reason)] of the others); only headers are read."""
    good, broken = [], []
    for path in tqdm(paths, desc="reading image headers", unit="file", delay=1, leave=False):
        try:
            with _open(path):
                good.append(path)
        except _BROKEN as error:
            broken.append((path, _reason(error)))
    return good, broken


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image that can be read"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def validation_names(names: Sequence[str], fraction: float, root: Path) -> set[str]:
    if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise UserError(f"validation_fraction is {fraction!r}, but a number between 0 and 1 is expected: correct it")
    if len(names) < 2:
        raise UserError(
            f"{root} holds one readable image, but at least two are needed to keep one for validation: add images"
        )
    place = {name: _hash_to_unit(name) for name in names}
    chosen = {name for name in names if place[name] < fraction}
    if not chosen:
        return {min(names, key=place.__getitem__)}
    if len(chosen) == len(names):
        return chosen - {max(names, key=place.__getitem__)}
    return chosen


def _hash_to_unit(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") / 2**48


def _check_classes(root: Path, files: list[tuple[str, str | None]], classes: list[str]) -> None:
    if not classes:
        return
    known = set(classes)
    for name, label in files:
        if label not in known:
            found = f"the class folder {label!r}" if label is not None else f"{name} outside any class folder"
            raise UserError(
                f"validation_path={root} has {found}, but the training classes are"
                f" {', '.join(classes[:_NAMED])}:"
                " use the same sub-folders in both"
            )
