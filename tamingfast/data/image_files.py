"""Images read one at a time from their files: resized, cropped, mirrored, and replaced if a file is broken."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from tamingfast.data.base import EpochDataset
from tamingfast.data.checks import flag, side
from tamingfast.data.conditions import Kind
from tamingfast.data.randomness import random_bits, random_integers
from tamingfast.data.rgb import UNKNOWN, check_headers, endings, read_rgb, scaled_size, to_unit_scale
from tamingfast.data.views import Picture, Size, View
from tamingfast.errors import UserError
from tamingfast.ops.machine import available_memory

logger = logging.getLogger(__name__)

#: Share of the free memory that a dataset's decoded pictures may take, in all processes that read it together.
KEPT_SHARE = 1 / 32
_NAMED = 10
#: (share of the room to the left, share above, mirrored) of the corners and the centre, and of these mirrored.
TEN_CROPS = tuple(
    (left, top, mirrored)
    for mirrored in (False, True)
    for left, top in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))
)
_STAND_IN = 4  # of the random numbers of an item; the first four are those of its view


class ImageFiles(EpochDataset):
    """Images read from their files one at a time, like the original repository's ``ImagePaths``.

    The shorter side is resized to ``short_side``, by default ``size`` (smaller images are enlarged), and a square of
    ``size`` is cropped at the centre or at random; without ``size``, images keep their shape. ``class_label`` is
    ``labels[index]``, or 0 without ``labels``. Files are judged when they are read: for one that cannot be, another is
    shown, in an order that (seed, epoch, index) determine; `warn_broken` logs it, and ``report`` counts and names such
    files together with the (path, reason) pairs in ``broken``, which were found and logged earlier. Decoded and scaled
    pictures stay in memory up to `KEPT_SHARE`, so files must not change while in use.

    Indexing raises UserError when no file at all can be read.
    """

    decodes = True

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        size: int | None = None,
        random_crop: bool = False,
        flip: bool = False,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        broken: Iterable[tuple[str, str]] = (),
        short_side: int | None = None,
        kind: Kind | None = None,
        sources: Sequence[str | os.PathLike | None] | None = None,
    ) -> None:
        self.paths, self.seed = paths, seed
        self.size = side("size", size) if size else None
        self.short_side = short_side or self.size
        self.random_crop, self.flip = flag("random_crop", random_crop), flag("flip", flip)
        self.labels = [0] * len(self.paths) if labels is None else list(labels)
        self.classes = None if classes is None else list(classes)
        self.kind, self._sources = kind, sources
        self._skipped = list(broken)
        self._ten_crops = False
        self._reasons: dict[int, str] = {}  # of the unreadable files that were looked at again
        self._reported: set[str] = set()
        self._kept: dict[int, Image.Image] = {}
        self._room: float | None = None
        # Shared memory, so that the process that reports broken files sees those that worker processes find.
        self._unreadable = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()

    @property
    def description(self) -> str:
        """One phrase about the images, for reports and token files."""
        shape = f"{self.size}x{self.size}" if self.size else "their own size"
        condition = "" if self.kind is None else f", with {self.kind.key}"
        return f"{len(self.paths)} image files as {shape}, the first {self.paths[0]}{condition}"

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(path, reason) of every file that was skipped or has turned out to be unreadable."""
        return self._skipped + self._found_broken()

    def report(self) -> str:
        """One sentence that counts the files of ``broken`` and names the first ten, or an empty string."""
        return _skipped(self.broken)

    def warn_broken(self) -> None:
        """Log the files whose pixels turned out to be unreadable since the last call."""
        new = [(path, reason) for path, reason in self._found_broken() if path not in self._reported]
        self._reported |= {path for path, _ in new}
        warn_skipped(new)

    def _found_broken(self) -> list[tuple[str, str]]:
        found = torch.nonzero(self._unreadable).flatten().tolist()
        return [(os.fspath(self.paths[index]), self._reason(index)) for index in found]

    def _reason(self, index: int) -> str:
        """Why a file is unreadable; looked up again, as another process may have found it."""
        if index not in self._reasons:
            broken = check_headers([self.paths[index]])[1]
            self._reasons[index] = broken[0][1] if broken else "its pixels cannot be read"
        return self._reasons[index]

    def name_classes(self, classes: Sequence[str]) -> None:
        """Number the labels by these names, which must contain those of the data."""
        own = self.classes or []
        self.labels = [classes.index(own[label]) for label in self.labels]
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._check(index)
        for candidate in self._candidates(index):
            if self._unreadable[candidate]:
                continue
            try:
                picture = self._read(candidate)
            except UserError:
                self._unreadable[candidate] = 1
                continue
            return self._item(candidate, picture, self._view(picture.size, index))
        raise UserError(
            f"{self.paths[0]}: got pixels that cannot be read, as in all {len(self.paths)} image files, expected at "
            "least one readable image; give other files"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        """``index``, and then all others in a seeded order: what stands in for a broken file is drawn like the rest."""
        yield index
        count = len(self.paths)
        # Steps of a length without a common divisor come to every file.
        length = 1 + int(random_integers(random_bits(self.seed, self.epoch, [index], _STAND_IN), count - 1)[0])
        while math.gcd(length, count) > 1:
            length += 1
        yield from ((index + step * length) % count for step in range(1, count))

    def _read(self, number: int) -> Picture:
        """The picture before its crop, kept in memory while there is room: decoding one costs more than a step."""
        image = self._kept.get(number)
        if image is None:
            image = read_rgb(self.paths[number], self.short_side)
            size = 3 * image.width * image.height
            if self._room is None:
                self._room = _room()
            if size <= self._room:
                self._kept[number] = image
                self._room -= size
        return Picture(image, scaled_size(image.size, self.short_side) if self.short_side else image.size)

    def _item(self, number: int, picture: Picture, view: View) -> dict[str, Any]:
        item = {
            "image": to_unit_scale(picture.part(view)),
            "class_label": self.labels[number],
            "file_path_": os.fspath(self.paths[number]),
        }
        if self.kind is None:
            return item
        source = None if self._sources is None else self._sources[number]
        return item | {self.kind.key: torch.from_numpy(self.kind.seen(picture, view, source))}

    def with_ten_crops(self) -> ImageFiles:
        """The same images, of which epoch k shows crop k of `TEN_CROPS`."""
        other = copy.copy(self)
        other._ten_crops = True
        return other

    def _view(self, size: Size, index: int) -> View:
        """The crop and flip of a picture of ``size`` in this epoch."""
        row, column, mirror, other = (random_bits(self.seed, self.epoch, [index], draw) for draw in range(4))
        flipped = bool(self.flip and random_integers(mirror, 2)[0])
        if not self.size:
            return View(0, 0, *size, flipped, int(other[0]))
        room = (size[0] - self.size, size[1] - self.size)
        left, top = room[0] // 2, room[1] // 2
        if self._ten_crops:
            right, down, flipped = TEN_CROPS[self.epoch]
            left, top = round(room[0] * right), round(room[1] * down)
        elif self.random_crop:
            left, top = (
                int(random_integers(bits, more + 1)[0]) for bits, more in zip((column, row), room, strict=True)
            )
        return View(left, top, self.size, self.size, flipped, int(other[0]))


def _room() -> float:
    """Bytes for decoded pictures in this process."""
    worker = get_worker_info()
    return KEPT_SHARE * available_memory(torch.device("cpu")) / (1 if worker is None else worker.num_workers)


def warn_skipped(broken: Iterable[tuple[str, str]]) -> None:
    """Log skipped files and folders, given as pairs of path and reason, in one sentence; nothing if there are none."""
    sentence = _skipped(list(dict.fromkeys(broken)))
    if sentence:
        logger.warning(sentence)


def _skipped(broken: Sequence[tuple[str, str]]) -> str:
    if not broken:
        return ""
    many = len(broken) > 1
    named = ", ".join(f"{path} ({reason})" for path, reason in broken[:_NAMED])
    rest = f" and {len(broken) - _NAMED} more ({_counted(broken)} in all)" if len(broken) > _NAMED else ""
    unknown = any(reason == UNKNOWN for _, reason in broken)
    readable = f"; files that can be read are {endings()}" if unknown else ""
    return f"{len(broken)} image file{'s were' if many else ' was'} skipped: {named}{rest}{readable}"


def _counted(broken: Sequence[tuple[str, str]]) -> str:
    counts = Counter(Path(path).suffix.lower() or "without an ending" for path, _ in broken)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(_NAMED))
