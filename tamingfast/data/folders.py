"""Directories of images: finding the files, their classes, and the split into training and validation."""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tamingfast.data.checks import check_short_side, existing_directory, side
from tamingfast.data.image_files import ImageFiles, warn_skipped
from tamingfast.data.listing import Labelled, Skipped, opens, scan
from tamingfast.errors import UserError

_NAMED = 10


def build(
    path: str | os.PathLike,
    size: int = 256,
    seed: int = 0,
    validation_path: str | os.PathLike | None = None,
    validation_fraction: float = 0.05,
    random_crop: bool = True,
    flip: bool = True,
    short_side: int | None = None,
) -> tuple[ImageFiles, ImageFiles]:
    """(train, validation) from the images under ``path``, read recursively, as by `scan`.

    Sub-folders of ``path`` that contain images are the classes, in the order of their names; deeper folders belong to
    the class above them. Without sub-folders every image has class 0; images directly in ``path`` next to sub-folders
    are skipped and named by ``report``. Validation images are those under ``validation_path``, whose sub-folders must
    then be among the classes, or else ``validation_fraction`` of the files: those whose path relative to ``path``
    hashes below that fraction, so that adding files moves none of the others. (If that selects no file, the one with
    the lowest hash is taken; if it selects every file, the one with the highest hash is left for training.)

    Images have their shorter side resized to ``short_side``, by default ``size``, before a square of ``size`` is cut.
    Training images are cropped at random (``random_crop``) and mirrored at random (``flip``), validation images at the
    centre.

    Raises UserError when a directory is missing or contains no readable image, for unknown validation classes, and when
    there is only one image to split.
    """
    size = side("size", size)
    check_short_side(short_side, size)
    root = existing_directory("path", path)
    files, skipped = scan(root)
    classes = sorted({label for _, label in files if label is not None})
    if classes:
        skipped += [(f"{root}/{name}", "lies beside the class folders") for name, label in files if label is None]
        files = [(name, label) for name, label in files if label is not None]
    held_root, held_skipped = root, list[Skipped]()
    if validation_path is None:
        names = [name for name, _ in files]
        held = held_out(names, validation_fraction, root, lambda number: opens(root / names[number]))
        train = list(itertools.compress(files, map(operator.not_, held)))
        validation = list(itertools.compress(files, held))
    else:
        held_root = existing_directory("validation_path", validation_path)
        train, (validation, held_skipped) = files, scan(held_root)
        # A disk of macOS may hold the names of one of both folders in another form of Unicode.
        composed = {_composed(label): label for label in classes}
        validation = [(name, composed.get(_composed(label), label) if label else None) for name, label in validation]
        _check_classes(held_root, validation, classes)
    number: dict[str | None, int] = {label: place for place, label in enumerate(classes)}
    warn_skipped(skipped + held_skipped)

    def dataset(base: Path, pairs: Sequence[Labelled], broken: Sequence[Skipped], **options: Any) -> ImageFiles:
        labels = [number.get(label, 0) for _, label in pairs]
        within = os.path.join(base, "")
        paths = [within + name for name, _ in pairs]
        return ImageFiles(
            paths, size, labels=labels, classes=classes or None, broken=broken, seed=seed, short_side=short_side,
            **options,
        )  # fmt: skip

    return (
        dataset(root, train, skipped, random_crop=random_crop, flip=flip),
        dataset(held_root, validation, held_skipped),
    )


def held_out(names: Sequence[str], fraction: float, where: object, opens: Callable[[int], bool]) -> list[bool]:
    """Which of the images ``names`` are for validation: about ``fraction``, at least one that opens, and never all.

    A name hashes below that fraction or not, whatever the others are. ``opens`` tells of a number whether that image
    opens. UserError, which names ``where`` they are, unless two of them open.
    """
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise UserError(f"validation_fraction: got {fraction!r}, expected a number between 0 and 1")
    place = [_hash_to_unit(name) for name in names]
    chosen = {number for number, value in enumerate(place) if value < fraction}
    if len(chosen) == len(names) > 1:
        chosen.remove(max(chosen, key=place.__getitem__))
    if not any(map(opens, sorted(chosen))):
        others = sorted(set(range(len(names))) - chosen, key=place.__getitem__)
        chosen |= set(itertools.islice(filter(opens, others), 1))
    if not any(opens(number) for number in range(len(names)) if number not in chosen):
        raise UserError(
            f"{where}: got one readable image, expected at least two, one of them for validation; add images"
        )
    return [number in chosen for number in range(len(names))]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


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
