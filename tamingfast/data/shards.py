"""Images in tar archives, as the WebDataset library writes and reads them.

Files of one name up to its first dot are a sample: ``0001.jpg``, its class ``0001.cls`` (a whole number), and its
condition ``0001.segmentation.png``. Unlike that library, which streams, this reads headers once and then any sample by
its place, so that the order of the images is a function of (seed, epoch) and a run continues from any step. Archives
are local files; nothing in them is unpacked, imported or unpickled, and images go through the decoders of all others.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np

from tamingfast.data import index
from tamingfast.data.archives import opened, parts_of
from tamingfast.data.checks import check_short_side, path_of, side
from tamingfast.data.conditioned import with_settings
from tamingfast.data.conditions import make
from tamingfast.data.folders import held_out
from tamingfast.data.image_files import ImageFiles, warn_skipped
from tamingfast.data.listing import Skipped, opens
from tamingfast.data.patterns import files_of
from tamingfast.data.randomness import shuffled
from tamingfast.data.rgb import image_endings
from tamingfast.errors import UserError, brief, storage_sentence
from tamingfast.files import Part
from tamingfast.progress import bar

_READERS = 8  # headers lie far apart, so that a disk is waited for
_LARGEST_LABEL = 64  # bytes
_MOST_CLASSES = 1 << 20
#: Samples among which those of neighbouring shards are mixed.
MIXED = 1 << 14


def build(
    path: str | os.PathLike,
    size: int = 256,
    seed: int = 0,
    validation_path: str | os.PathLike | None = None,
    validation_fraction: float = 0.05,
    short_side: int | None = None,
    random_crop: bool = True,
    flip: bool = True,
    kind: str | None = None,
    **settings: Any,
) -> tuple[Shards, Shards]:
    """(train, validation) of the samples in tar archives.

    ``path`` is an archive, a directory of archives, or a pattern such as ``train-{000..127}.tar``. With ``kind`` each
    image has a condition: for kinds that are read from files, a file named after the kind, such as
    ``0001.segmentation.png``. ``settings`` are those of the kinds. Everything else is as in
    `tamingfast.data.conditioned.build`, with the names of archive and sample in place of a path.

    Raises UserError for archives that are missing or damaged, without images, with a class for only some of them, or
    with an image without its condition.
    """
    size = side("size", size)
    check_short_side(short_side, size)
    chosen = None if kind is None else make(kind, settings)
    if chosen is None and any(value is not None for value in settings.values()):
        name = next(name for name, value in settings.items() if value is not None)
        raise UserError(f"{name}: got a setting of conditions, expected it with a kind; add kind=...")
    if chosen is not None:
        chosen.check(size)
    wanted: set[str] = set()
    if chosen is not None and chosen.from_file:
        wanted = {f"{word}{ending}" for word in (kind, chosen.key) for ending in chosen.suffixes}
    train, skipped = _samples(path_of("path", path), wanted)
    held_skipped: list[Skipped] = []
    if validation_path is None:
        held = np.array(held_out(train.names(), validation_fraction, path, lambda number: opens(train.images[number])))
        train, validation = train.taken(~held), train.taken(held)
    else:
        validation, held_skipped = _samples(path_of("validation_path", validation_path), wanted)
    count = _classes(train, validation)
    classes = None if count is None else [str(number) for number in range(count)]
    warn_skipped(skipped + held_skipped)

    def dataset(samples: _Samples, broken: Sequence[Skipped], **options: Any) -> Shards:
        return Shards(
            samples, size=size, short_side=short_side, seed=seed, classes=classes, kind=chosen, broken=broken, **options
        )

    return dataset(train, skipped, random_crop=random_crop, flip=flip), dataset(validation, held_skipped)


# As in `conditioned`: the settings of the kinds are keys of a config.
build.__signature__ = with_settings(inspect.signature(build))  # type: ignore[attr-defined]  # see inspect.signature


class Shards(ImageFiles):
    """`ImageFiles` in archives, whose order takes one archive after the other."""

    def __init__(self, samples: _Samples, **options: Any) -> None:
        labels = None if options["classes"] is None else samples.labels.tolist()
        super().__init__(samples.images, labels=labels, sources=samples.conditions, **options)
        self._shard = samples.images.archive[samples.images.rows]

    def order(self, seed: int) -> np.ndarray:
        """Archives in random order, the samples of as many neighbours mixed as hold `MIXED`.

        So a training reads each archive within a short time, from whatever medium.
        """
        counts = np.bincount(self._shard)
        shards = shuffled(len(counts), seed, 1)
        before = np.empty(len(counts), np.int64)
        before[shards] = np.cumsum(counts[shards]) - counts[shards]
        numbers = shuffled(len(self), seed)
        return numbers[np.argsort((before // MIXED)[self._shard[numbers]], kind="stable")]


@dataclass(frozen=True, eq=False)
class _Parts(Sequence[Part]):
    """Files in archives as a few arrays: an object for each of millions would take a kilobyte apiece."""

    archives: Sequence[str]
    archive: np.ndarray  # int64 (N,): the number of each file's archive
    names: np.ndarray  # uint8: their names, as `index.packed` gives them
    ends: np.ndarray  # int64 (N,): where each name ends
    places: np.ndarray  # int64 (N, 2): offset and size
    rows: np.ndarray  # int64 (n,): those of the N files that are meant

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        row = self.rows[number]
        begin = self.ends[row - 1] + 1 if row else 0
        name = self.names[begin : self.ends[row]].tobytes().decode("utf-8", "surrogateescape")
        return Part(self.archives[self.archive[row]], name, *self.places[row].tolist())

    def taken(self, mask: np.ndarray) -> _Parts:
        return replace(self, rows=self.rows[mask])


@dataclass(frozen=True, eq=False)
class _Samples:
    """The samples of several archives: their images, labels (n,) with -1 for none, and conditions, if wanted."""

    images: _Parts
    labels: np.ndarray
    conditions: _Parts | None

    def __len__(self) -> int:
        return len(self.images)

    def names(self) -> list[str]:
        """The names by which samples are chosen for validation, wherever the archives lie."""
        images, names = self.images, index.unpacked(self.images.names)
        archives = [os.path.basename(path) for path in images.archives]
        return [
            f"{archives[archive]}/{names[row]}"
            for row, archive in zip(images.rows.tolist(), images.archive[images.rows].tolist(), strict=True)
        ]

    def taken(self, mask: np.ndarray) -> _Samples:
        conditions = None if self.conditions is None else self.conditions.taken(mask)
        return _Samples(self.images.taken(mask), self.labels[mask], conditions)


def _samples(pattern: str, wanted: Collection[str]) -> tuple[_Samples, list[Skipped]]:
    """All samples of the archives that ``pattern`` means, and what in them is none.

    ``wanted`` are the endings of their conditions, one of which each then has.
    """
    paths = files_of(pattern, ".tar", "tar archives of images")
    kept, found = index.current(), []
    with (
        ThreadPoolExecutor(_READERS) as pool,
        bar(" archives", len(paths), desc="reading headers", delay=1, leave=False) as progress,
    ):
        for path, arrays in zip(paths, pool.map(lambda path: _listing(path, wanted, kept), paths), strict=True):
            kept.keep(_place(path, wanted), arrays)
            found.append(arrays)
            progress.update(1)
    counts = [len(arrays["labels"]) for arrays in found]
    if not sum(counts):
        raise UserError(
            f"{pattern}: got {len(paths)} archives without images, expected some, such as 0001.jpg; correct the path"
        )
    archive = np.repeat(np.arange(len(paths)), counts)

    def parts(what: str) -> _Parts:
        names, places = (np.concatenate([arrays[key] for arrays in found]) for key in (what, f"{what} at"))
        return _Parts(paths, archive, names, np.flatnonzero(names == 0), places, np.arange(len(archive)))

    skipped = [(text, "a sample without an image") for arrays in found for text in index.unpacked(arrays["skipped"])]
    labels = np.concatenate([arrays["labels"] for arrays in found])
    return _Samples(parts("names"), labels, parts("conditions") if wanted else None), skipped


def _place(path: str, wanted: Collection[str]) -> str:
    """What an index calls the listing of an archive."""
    return f"samples in {path}" + (f" with {', '.join(sorted(wanted))}" if wanted else "")


def _listing(path: str, wanted: Collection[str], kept: index.Index) -> index.Arrays:
    """The samples of an archive, by the index if the archive has not changed since."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(storage_sentence(error, path)) from error
    state = np.array([found.st_size, found.st_mtime_ns])
    arrays = kept.find(_place(path, wanted))
    if arrays is not None and _holds(arrays, state, bool(wanted)):
        return arrays
    images, conditions, labels, skipped, endings = [], [], [], [], image_endings()
    with opened(path) as stream:
        named = ((*_split(part.name), part) for part in parts_of(path, stream))
        for key, group in itertools.groupby(named, operator.itemgetter(0)):
            files = {ending: part for _, ending, part in group}
            image = next((part for ending, part in files.items() if ending in endings), None)
            if key and image is not None:
                images.append(image)
                labels.append(_label(files.get("cls"), stream))
                conditions += [_condition(image, files, wanted)] if wanted else []
            elif key:
                skipped.append(f"{path}/{key}")
    return {
        "state": state, "labels": np.array(labels, np.int64), "skipped": index.packed(skipped),
        **_packed("names", images), **_packed("conditions", conditions),
    }  # fmt: skip


def _holds(arrays: index.Arrays, state: np.ndarray, conditions: bool) -> bool:
    """Whether an index has a sound listing of an archive in this ``state``."""
    try:
        labels, count = arrays["labels"], len(arrays["labels"])
        sound = ((labels >= -1) & (labels < _MOST_CLASSES)).all() and arrays["skipped"].dtype == np.uint8
        for what, number in (("names", count), ("conditions", count if conditions else 0)):
            names, places = arrays[what], arrays[f"{what} at"]
            sound = sound and names.dtype == np.uint8 and np.count_nonzero(names == 0) == number
            sound = sound and places.dtype == np.int64 and places.shape == (number, 2)
        return bool(sound) and labels.dtype == np.int64 and np.array_equal(arrays["state"], state)
    except (KeyError, TypeError, ValueError):
        return False


def _packed(what: str, parts: Sequence[Part]) -> dict[str, np.ndarray]:
    places = np.array([(part.offset, part.size) for part in parts], np.int64).reshape(-1, 2)
    return {what: index.packed([part.name for part in parts]), f"{what} at": places}


def _split(name: str) -> tuple[str, str]:
    """(the name up to the first dot of its last part, the rest in lower case); both are empty for hidden files."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return (folder + slash + stem, ending.lower()) if stem else ("", "")


def _label(part: Part | None, stream: IO[bytes]) -> int:
    """The class in a sample's file, -1 without one."""
    if part is None:
        return -1
    stream.seek(part.offset)
    text = stream.read(min(part.size, _LARGEST_LABEL)).strip()
    if not text.isdigit() or int(text) >= _MOST_CLASSES:
        raise UserError(
            f"{part}: got {brief(text.decode('utf-8', 'replace'))}, expected the number of a class, 0 to "
            f"{_MOST_CLASSES - 1}; write the archives again"
        )
    return int(text)


def _condition(image: Part, files: Mapping[str, Part], wanted: Collection[str]) -> Part:
    found = next((files[ending] for ending in files if ending in wanted), None)
    if found is None:
        raise UserError(
            f"{image}: got a sample with {', '.join(files)}, expected its condition, {' or '.join(sorted(wanted))}, "
            "too; write the archives again"
        )
    return found


def _classes(train: _Samples, validation: _Samples) -> int | None:
    """The number of classes, None if no sample has one."""
    labels = np.concatenate([train.labels, validation.labels])
    if (labels < 0).all():
        return None
    alone = next((samples for samples in (train, validation) if (samples.labels < 0).any()), None)
    if alone is not None:
        part = alone.images[int(np.argmin(alone.labels))]
        raise UserError(f"{part}: got a sample without .cls, expected one as in others; write the archives again")
    return int(labels.max()) + 1
