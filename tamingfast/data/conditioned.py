"""Images with conditions: plain folders of both, or conditions computed from the images themselves."""

from __future__ import annotations

import inspect
import itertools
import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tamingfast.data.checks import check_short_side, existing_directory, side
from tamingfast.data.conditions import SETTINGS, Kind, make
from tamingfast.data.folders import held_out
from tamingfast.data.image_files import ImageFiles, warn_skipped
from tamingfast.data.listing import Skipped, opens, scan, walk
from tamingfast.data.rgb import check_headers
from tamingfast.errors import UserError

IMAGES, CONDITIONS = "images", "conditions"
_NAMED = 5

#: (name, image file, file of its condition or None).
Pair = tuple[str, str, str | None]


def build(
    path: str | os.PathLike,
    kind: str,
    size: int = 256,
    seed: int = 0,
    validation_path: str | os.PathLike | None = None,
    validation_fraction: float = 0.05,
    short_side: int | None = None,
    random_crop: bool = True,
    flip: bool = True,
    **settings: Any,
) -> tuple[ImageFiles, ImageFiles]:
    """(train, validation) of the images under ``path``, each with its condition of ``kind``.

    Kinds read from files (``segmentation``, ``depth``, ``keypoints``, ``boxes`` and ``centers``) need ``path/images``
    and next to it ``path/conditions``, with one file per image that has the same sub-folder and the same name up to the
    extension. ``edges``, ``lowres``, ``superpixels`` and ``coord`` are computed from the images in ``path/images``, or
    in ``path`` if there is no such folder. ``settings`` are those of the kinds (`tamingfast.data.conditions.SETTINGS`).

    The shorter side of an image is resized to ``short_side``, by default ``size``, before a square of ``size`` is
    cropped; a condition goes through the same scaling, crop and flip. Everything else is as in
    `tamingfast.data.folders.build`, except that sub-folders are not classes.

    Raises UserError for images without a condition and conditions without an image, for settings that the kind does not
    have, and where `tamingfast.data.folders.build` does. A condition's content is checked when it is read.
    """
    size = side("size", size)
    check_short_side(short_side, size)
    chosen = make(kind, settings)
    chosen.check(size)
    root = existing_directory("path", path)
    pairs, broken = _pairs(root, chosen)
    held_broken: list[Skipped] = []
    if validation_path is None:
        names = [name for name, _, _ in pairs]
        held = held_out(names, validation_fraction, root, lambda number: opens(pairs[number][1]))
        train = list(itertools.compress(pairs, map(operator.not_, held)))
        validation = list(itertools.compress(pairs, held))
    else:
        train = pairs
        validation, held_broken = _pairs(existing_directory("validation_path", validation_path), chosen)
    warn_skipped(broken + held_broken)

    def dataset(found: Sequence[Pair], skipped: Sequence[Skipped], **options: Any) -> ImageFiles:
        paths, sources = [image for _, image, _ in found], [source for _, _, source in found]
        return ImageFiles(
            paths, size, kind=chosen, sources=sources, short_side=short_side, seed=seed, broken=skipped, **options
        )

    return dataset(train, broken, random_crop=random_crop, flip=flip), dataset(validation, held_broken)


def with_settings(signature: inspect.Signature) -> inspect.Signature:
    """The signature with ``**settings`` replaced by one parameter for each setting of the kinds."""
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return signature.replace(
        parameters=[
            *named,
            *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in SETTINGS),
        ]
    )


# `tamingfast.data.build` checks the keys of a config against this signature; the settings come from the registry.
build.__signature__ = with_settings(inspect.signature(build))  # type: ignore[attr-defined]  # see inspect.signature


def _pairs(root: Path, kind: Kind) -> tuple[list[Pair], list[Skipped]]:
    """The images under ``root`` with their conditions, and the files that are neither."""
    folder = _images_of(root)
    if not kind.from_file:
        files, broken = scan(folder)
        return [(name, os.path.join(folder, name), None) for name, _ in files], broken
    for part in (root / IMAGES, root / CONDITIONS):
        if not part.is_dir():
            raise UserError(
                f"{root}: got a directory without {part.name!r}, expected the folders {IMAGES!r} and {CONDITIONS!r}; "
                "put the files of both there under the same names"
            )
    files, left_out = scan(folder)
    there, unread = walk(root / CONDITIONS)
    names = [name for name in there if name.lower().endswith(kind.suffixes)]
    others = [str(root / CONDITIONS / name) for name in there if not name.lower().endswith(kind.suffixes)]
    conditions = _by_stem(root / CONDITIONS, names)
    found, unopened = _without_broken(folder, [name for name, _ in files], conditions)
    broken = left_out + unopened + unread + [(path, f"not a condition ({', '.join(kind.suffixes)})") for path in others]
    images = _by_stem(folder, found)
    unreadable = {_stem(os.path.relpath(path, folder)) for path, _ in left_out + unopened}
    _check_matched(folder, images, conditions, f"condition ({', '.join(kind.suffixes)}) in {root / CONDITIONS}")
    _check_matched(root / CONDITIONS, conditions, images.keys() | unreadable, f"image in {folder}")
    matched = [(images[stem], conditions[stem]) for stem in sorted(images)]
    pairs: list[Pair] = [
        (name, os.path.join(folder, name), os.path.join(root, CONDITIONS, other)) for name, other in matched
    ]  # fmt: skip
    return pairs, broken


def _images_of(root: Path) -> Path:
    return root / IMAGES if (root / IMAGES).is_dir() else root


def _without_broken(
    folder: Path, names: Sequence[str], conditions: Mapping[str, str]
) -> tuple[list[str], list[Skipped]]:
    """(the images ``names`` without broken ones, those); one with a condition of its own stays unopened."""
    stems = Counter(map(_stem, names))
    doubtful = {str(folder / name): name for name in names if stems[_stem(name)] > 1 or _stem(name) not in conditions}
    unopened = check_headers(list(doubtful))[1]
    left_out = {doubtful[path] for path, _ in unopened}
    return [name for name in names if name not in left_out], unopened


def _by_stem(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """File names by their path without the extension."""
    found: dict[str, str] = {}
    for name in names:
        stem = _stem(name)
        if stem in found:
            raise UserError(f"{folder}: got both {found[stem]} and {name}, expected one file named {stem}; remove one")
        found[stem] = name
    return found


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _check_matched(folder: Path, files: Mapping[str, str], others: Iterable[str], wanted: str) -> None:
    """UserError for ``files`` of ``folder`` whose stem is not among ``others``."""
    alone = [files[stem] for stem in sorted(files.keys() - set(others))]
    if alone:
        named = ", ".join(alone[:_NAMED]) + (f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else "")
        raise UserError(
            f"{folder}: got {named}, expected an equally named {wanted} for each; add what is missing, or remove what "
            "is left over"
        )
