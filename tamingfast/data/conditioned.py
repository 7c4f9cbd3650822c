"""Images with what they are conditioned on: plain folders, and conditions computed from the images themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tamingfast.data.base import positive
from tamingfast.data.conditions.kinds import Kind, make
from tamingfast.data.folders import ImageFiles, View, existing_directory, scan, validation_names, walk, warn_skipped
from tamingfast.errors import UserError

IMAGES, CONDITIONS = "images", "conditions"
_NAMED = 5


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
    labels: int | None = None,
    depth_range: Sequence[float] | None = None,
    factor: int | None = None,
    sigma: float | None = None,
    segments: int | None = None,
    classes: Sequence[str] | str | None = None,
    tokens: int | None = None,
    objects: int | None = None,
    crop_tokens: bool | None = None,
    attributes: Sequence[str] | None = None,
) -> tuple[ConditionedImages, ConditionedImages]:
    """(train, validation) of the images under ``path``, each with its condition of ``kind``.

    Kinds with files, ``segmentation``, ``depth``, ``keypoints``, ``boxes`` and ``centers``, need ``path/images`` and
    beside it ``path/conditions`` with one file for each image, of the same name but for its ending and in the same
    sub-folder.
    ``edges``, ``lowres``, ``superpixels`` and ``coord`` are computed from images in ``path/images``, or in ``path``
    where there is no such folder. From ``labels`` on, arguments are settings of kinds (`tamingfast.data.conditions`).

    The shorter side of an image is resized to ``short_side``, by default ``size``, before a square of ``size`` is
    cropped; a condition goes through the same scaling, crop and flip. Everything else is as in
    `tamingfast.data.folders.build`, but for classes, which are not looked for.

    Raises UserError for images without a condition and conditions without an image, settings that the kind does not
    have, and as `tamingfast.data.folders.build`; a condition's content is checked when it is read.
    """
    size = positive("size", size)
    if short_side is not None and positive("short_side", short_side) < size:
        raise UserError(f"short_side is {short_side}, but images are cut to size={size}: give at least that")
    options = dict(labels=labels, depth_range=depth_range, factor=factor, sigma=sigma, segments=segments)
    options |= dict(classes=classes, tokens=tokens, objects=objects, crop_tokens=crop_tokens, attributes=attributes)
    chosen = make(kind, options)
    chosen.check(size)
    root = existing_directory("path", path)
    pairs, broken = _pairs(root, chosen)
    if validation_path is None:
        held = validation_names([name for name, _, _ in pairs], validation_fraction, root)
        validation, held_broken = [pair for pair in pairs if pair[0] in held], []
        pairs = [pair for pair in pairs if pair[0] not in held]
    else:
        validation, held_broken = _pairs(existing_directory("validation_path", validation_path), chosen)
    warn_skipped(broken + held_broken)

    def dataset(found: list[tuple[str, str, str | None]], skipped: list[tuple[str, str]], **how: Any):
        _, paths, sources = zip(*found, strict=True)
        return ConditionedImages(
            paths, chosen, sources, size=size, short_side=short_side, seed=seed, broken=skipped, **how
        )

    return dataset(pairs, broken, random_crop=random_crop, flip=flip), dataset(validation, held_broken)


class ConditionedImages(ImageFiles):
    """`ImageFiles` whose items also hold a condition under ``kind.key``: float32 (H, W, C), or tokens int64 (n,).

    ``sources`` are the files of the conditions of ``paths``, None where the kind needs none. Indexing raises UserError
    naming the file of a condition that cannot be used.
    """

    def __init__(
        self, paths: Sequence[str], kind: Kind, sources: Sequence[str | None] | None = None, **options: Any
    ) -> None:
        super().__init__(paths, **options)
        self.kind = kind
        self.sources = [None] * len(self.paths) if sources is None else list(sources)

    @property
    def description(self) -> str:
        """What the images are, for reports and token files."""
        return f"{super().description}, with {self.kind.key}"

    def _item(self, number: int, image: Image.Image, view: View) -> dict[str, Any]:
        condition = self.kind.seen(image, view, self.sources[number])
        return super()._item(number, image, view) | {self.kind.key: torch.from_numpy(condition)}


def _pairs(root: Path, kind: Kind) -> tuple[list[tuple[str, str, str | None]], list[tuple[str, str]]]:
    """[(name, image file, file of its condition or None)], and [(path, reason)] of images that do not open."""
    folder = root / IMAGES
    if not kind.from_file:
        folder = folder if folder.is_dir() else root
        files, broken = scan(folder)
        return [(name, str(folder / name), None) for name, _ in files], broken
    for part in (folder, root / CONDITIONS):
        if not part.is_dir():
            raise UserError(
                f"{root} has no folder {part.name!r}, but {IMAGES} and {CONDITIONS} side by side are expected: put the "
                f"files of both there under the same names"
            )
    files, broken = scan(folder)
    names = [name for name in walk(root / CONDITIONS) if name.lower().endswith(kind.suffixes)]
    images = _by_stem(folder, [name for name, _ in files])
    conditions = _by_stem(root / CONDITIONS, names)
    unreadable = {Path(path).relative_to(folder).with_suffix("").as_posix() for path, _ in broken}
    _check_matched(folder, images, conditions, f"condition ({', '.join(kind.suffixes)}) in {root / CONDITIONS}")
    _check_matched(root / CONDITIONS, conditions, images.keys() | unreadable, f"image in {folder}")
    matched = [(images[stem], conditions[stem]) for stem in sorted(images)]
    return [(name, str(folder / name), str(root / CONDITIONS / other)) for name, other in matched], broken


def _by_stem(folder: Path, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        stem = Path(name).with_suffix("").as_posix()
        if stem in found:
            raise UserError(f"{folder} holds both {found[stem]} and {name}, so {stem} names two files: remove one")
        found[stem] = name
    return found


def _check_matched(folder: Path, files: dict[str, str], others: Any, wanted: str) -> None:
    alone = [files[stem] for stem in sorted(files.keys() - set(others))]
    if alone:
        named = ", ".join(alone[:_NAMED]) + (f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else "")
        raise UserError(
            f"no {wanted} has the name of {named} in {folder}: add what is missing, or remove what is left over"
        )
