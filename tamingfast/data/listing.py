"""The files of a directory, found without opening those that are images by their names."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tamingfast.data import index
from tamingfast.data.rgb import check_headers, endings, image_endings
from tamingfast.errors import UserError
from tamingfast.progress import bar

#: (path relative to the directory, name of its class folder or None).
Labelled = tuple[str, str | None]
#: (path, why the file is skipped).
Skipped = tuple[str, str]

_CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
#: Endings of files that nobody takes for images.
_NOTES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".html", ".yaml", ".yml", ".log", ".py")
_LINKED = "a link to a folder that is read already"


def scan(root: Path, pixels: bool = False) -> tuple[list[Labelled], list[Skipped]]:
    """The images under ``root``, and what else lies there: all commands mean these files by a directory.

    A file with an image's usual ending is one until its pixels are read; any other is one if its content is of a known
    format, whatever its name. With ``pixels`` every file is decoded. What is skipped is named, folders in ``root``
    without an image too, except for notes and for what file managers leave behind. Raises UserError if no image opens.
    """
    listing = _listing(root, "images")
    names, skipped = listing.names, listing.skipped
    if pixels:
        good, broken = check_headers([str(root / name) for name in names], pixels=True)
        opened = set(good)
        names, skipped = [name for name in names if str(root / name) in opened], skipped + broken
    _check_any(root, names, skipped)
    files = [(name, name.split("/", 1)[0] if "/" in name else None) for name in names]
    told = {path for path, _ in skipped}
    empty = {str(root / name) for name in listing.top_folders() - {label for _, label in files}}
    skipped = [(path, reason) for path, reason in skipped if not path.lower().endswith(_NOTES)]
    return files, skipped + [(path, "a folder without a readable image") for path in sorted(empty - told)]


def walk(root: Path) -> tuple[list[str], list[Skipped]]:
    """(sorted relative paths of all visible files under ``root``, with "/" as separator; folders that are not read).

    Follows links to folders, but reads no folder twice, so that links to a parent end.
    """
    listing = _listing(root, "files")
    return listing.names, listing.skipped


def judged(names: Sequence[str], root: Path = Path()) -> tuple[list[str], list[Skipped]]:
    """(the images among the files ``names`` in ``root``, the others); only those with odd endings are opened."""
    known = image_endings()
    odd = [name for name in names if name.rpartition(".")[2].lower() not in known]
    opened = {str(root / name): name for name in odd}
    broken = check_headers(list(opened))[1]
    left_out = {opened[path] for path, _ in broken}
    return [name for name in names if name not in left_out] if broken else list(names), broken


def from_list(paths: Iterable[str]) -> tuple[list[str], list[Skipped]]:
    """(the images among files that a list names, the others); none of the first unless at least one opens."""
    there, broken = [], []
    for path in paths:
        if os.path.lexists(path):
            there.append(path)
        else:
            broken.append((path, os.strerror(errno.ENOENT)))
    good, unopened = judged(there)
    closed = _none_opens(good)
    return ([], [closed]) if closed else (good, broken + unopened)


def opens(path: str | os.PathLike) -> bool:
    """Whether a file opens as an image; only its header is read."""
    return not check_headers([path])[1]


def _none_opens(paths: Iterable[str]) -> Skipped | None:
    """The first of the paths if not one opens as an image; None after the first that does."""
    first = None
    for path in paths:
        _, broken = check_headers([path])
        if not broken:
            return None
        first = first or broken[0]
    return first


def _check_any(root: Path, names: Sequence[str], skipped: Sequence[Skipped]) -> None:
    """Raise UserError unless one of the images ``names`` opens."""
    broken = _none_opens(str(root / name) for name in names)
    if names and broken is None:
        return
    others = [each for each in skipped if not os.path.isdir(each[0])]
    count, first = len(names) + len(others), broken or (others[0] if others else None)
    there = "no files" if first is None else (
        f"{count} files, none of which opens as an image, the first being {first[0]} ({first[1]})"
    )  # fmt: skip
    raise UserError(f"{root}: got {there}, expected images ({endings()}); correct the path")


@dataclass(frozen=True)
class _Listing:
    """Names of files below a directory, what was skipped there, and the folders with the times of their last change."""

    names: list[str]
    skipped: list[Skipped]
    folders: dict[str, int]

    def top_folders(self) -> set[str]:
        return {name[:-1] for name in self.folders if name.count("/") == 1}

    def arrays(self) -> index.Arrays:
        """What an index keeps of it."""
        return {
            "names": index.packed(self.names),
            "skipped": index.packed([text for pair in self.skipped for text in pair]),
            "folders": index.packed(list(self.folders)),
            "times": np.array(list(self.folders.values()), np.int64),
        }

    @classmethod
    def of(cls, arrays: index.Arrays) -> _Listing:
        """The reverse of `arrays`; KeyError or ValueError for arrays of anything else."""
        texts = index.unpacked(arrays["skipped"])
        folders = dict(zip(index.unpacked(arrays["folders"]), arrays["times"].tolist(), strict=True))
        names = index.unpacked(arrays["names"])
        if not names or any(name.startswith("/") or "../" in name for name in names):
            raise ValueError("names: got none, or some outside the directory, expected names of files in it")
        return cls(names, list(zip(texts[::2], texts[1::2], strict=True)), folders)

    def holds(self, root: Path) -> bool:
        """Whether no file was added, removed or renamed since: that changes the time of its folder."""
        try:
            return all(os.stat(root / name).st_mtime_ns == time for name, time in self.folders.items())
        except OSError:
            return False


def _listing(root: Path, what: str) -> _Listing:
    """The ``what`` ("images" or all "files") under ``root``, by the index where it still holds."""
    place, kept = f"{what} in {root}", index.current()
    arrays = kept.find(place)
    if arrays is not None:
        try:
            listing = _Listing.of(arrays)
        except (KeyError, ValueError, AttributeError):
            listing = None
        if listing is not None and listing.holds(root):
            kept.keep(place, arrays)
            return listing
    listing = _walk(root)
    if what == "images":
        listing = _images(root, listing)
    if listing.names:
        kept.keep(place, listing.arrays())
    return listing


def _images(root: Path, listing: _Listing) -> _Listing:
    """The listing without what is not an image."""
    names = [name for name in listing.names if not name.lower().endswith(_NOTES)] or listing.names
    names, broken = judged(names, root)
    return _Listing(names, listing.skipped + broken, listing.folders)


def _walk(root: Path) -> _Listing:
    """Everything visible under ``root``."""
    found: list[str] = []
    skipped: list[Skipped] = []
    folders: dict[str, int] = {}
    seen = set()
    waiting = [""]  # folders as the beginnings of the names in them
    with bar(" files", None, desc="listing files", delay=1, leave=False) as progress:
        while waiting:
            folder = waiting.pop()
            path = os.path.join(root, folder) if folder else os.fspath(root)
            try:
                state = os.stat(path)
                if (state.st_dev, state.st_ino) in seen:
                    skipped.append((path.removesuffix("/"), _LINKED))
                    continue
                seen.add((state.st_dev, state.st_ino))
                below, files, special = _entries(path)
            except OSError as error:
                skipped.append((path.removesuffix("/"), error.strerror or str(error)))
                continue
            folders[folder] = state.st_mtime_ns
            found += [folder + name for name in files]
            skipped += check_headers([os.path.join(path, name) for name in sorted(special)])[1]
            waiting += [f"{folder}{name}/" for name in sorted(below, reverse=True)]
            progress.update(len(files))
    return _Listing(sorted(found), skipped, folders)


def _entries(path: str) -> tuple[list[str], list[str], list[str]]:
    """The names of the visible (folders, files, pipes and whatever else there is) in a folder."""
    below: list[str] = []
    files: list[str] = []
    special: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if not name.startswith(".") and name.lower() not in _CLUTTER:
                (below if _is(entry.is_dir) else files if _is(entry.is_file) else special).append(name)
    return below, files, special


def _is(asked: Callable[[], bool]) -> bool:
    try:
        return asked()
    except OSError:  # of a link to itself
        return False
