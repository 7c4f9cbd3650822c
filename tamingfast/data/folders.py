"""Directories of images: finding the files, their classes, and the split into training and validation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tamingfast.data.checks import existing_directory, positive
from tamingfast.data.image_files import ImageFiles, warn_skipped
from tamingfast.data.rgb import EXTENSIONS, check_headers
from tamingfast.errors import UserError

#: (path relative to the directory, name of its class folder or None).
Labelled = tuple[str, str | None]
#: (path, why the file is skipped).
Skipped = tuple[str, str]
_NAMED = 10


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

    Sub-folders of ``path`` that contain images are the classes, in the order of their names; deeper folders belong to
    the class above them. Without sub-folders every image has class 0; images directly in ``path`` next to sub-folders
    are skipped and named by ``report``. Validation images are those under ``validation_path``, whose sub-folders must
    then be among the classes, or else ``validation_fraction`` of the files: those whose path relative to ``path``
    hashes below that fraction, so that adding files moves none of the others. (If that selects no file, the one with
    the lowest hash is taken; if it selects every file, the one with the highest hash is left for training.)

    Training images have their shorter side resized to ``size`` and are cropped at random (``random_crop``) and mirrored
    at random (``flip``); validation images are cropped at the centre.

    Raises UserError when a directory is missing or contains no readable image, for unknown validation classes, and when
    there is only one image to split.
    """
    size = positive("size", size)
    root = existing_directory("path", path)
    files, skipped = scan(root)
    classes = sorted({label for _, label in files if label is not None})
    if classes:
        skipped += [(str(root / name), "lies beside the class folders") for name, label in files if label is None]
        files = [(name, label) for name, label in files if label is not None]
    held_root, held_skipped = root, list[Skipped]()
    if validation_path is None:
        chosen = validation_names([name for name, _ in files], validation_fraction, root)
        train = [pair for pair in files if pair[0] not in chosen]
        validation = [pair for pair in files if pair[0] in chosen]
    else:
        held_root = existing_directory("validation_path", validation_path)
        train, (validation, held_skipped) = files, scan(held_root)
        _check_classes(held_root, validation, classes)
    number: dict[str | None, int] = {label: place for place, label in enumerate(classes)}
    warn_skipped(skipped + held_skipped)

    def dataset(base: Path, pairs: Sequence[Labelled], broken: Sequence[Skipped], **options: Any) -> ImageFiles:
        labels = [number.get(label, 0) for _, label in pairs]
        paths = [str(base / name) for name, _ in pairs]
        return ImageFiles(paths, size, labels=labels, classes=classes or None, broken=broken, seed=seed, **options)

    return (
        dataset(root, train, skipped, random_crop=random_crop, flip=flip),
        dataset(held_root, validation, held_skipped),
    )


def scan(root: Path) -> tuple[list[Labelled], list[Skipped]]:
    """The images under ``root`` that open, and those that do not. Raises UserError if none opens."""
    names = sorted(walk(root))
    candidates = [name for name in names if name.lower().endswith(EXTENSIONS)]
    if not candidates:
        others = f"{len(names)} other files such as" if len(names) > 1 else "1 other file,"
        there = f"{others} {names[0]}" if names else "no files"
        raise UserError(
            f"{root}: got {there}, expected images ending in {', '.join(EXTENSIONS)}, in it or in one sub-folder per "
            "class; correct the path"
        )
    good, broken = check_headers([str(root / name) for name in candidates])
    if not good:
        path, reason = broken[0]
        raise UserError(
            f"{root}: got {len(candidates)} image files, none of which opens, the first being {path} ({reason}), "
            "expected readable images; replace them"
        )
    opened = set(good)
    files = [name for name in candidates if str(root / name) in opened]
    return [(name, name.split("/", 1)[0] if "/" in name else None) for name in files], broken


def walk(root: Path) -> Iterator[str]:
    """Relative paths, with "/" as separator, of all files that are not hidden; follows links to folders."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # A link to a parent folder would make the walk endless.
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


def validation_names(names: Sequence[str], fraction: float, root: Path) -> set[str]:
    """The ``names`` chosen for validation: about ``fraction`` of them, at least one and never all."""
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise UserError(f"validation_fraction: got {fraction!r}, expected a number between 0 and 1")
    if len(names) < 2:
        raise UserError(
            f"{root}: got one readable image, expected at least two, one of them for validation; add images"
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


def _check_classes(root: Path, files: Sequence[Labelled], classes: Sequence[str]) -> None:
    """Raise UserError for a validation image outside the training classes; without classes, any image is valid."""
    known = set(classes)
    for name, label in files if classes else ():
        if label not in known:
            found = f"{name} outside any class folder" if label is None else f"the class folder {label!r}"
            raise UserError(
                f"validation_path={root}: got {found}, expected the training classes {', '.join(classes[:_NAMED])}; "
                "use the same sub-folders in both"
            )
