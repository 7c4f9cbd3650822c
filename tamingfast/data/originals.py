"""The data sets that the original's configs name, on local files: `ImageNetTrain`, `FacesHQTrain`, `ADE20kTrain`, ...

Each takes the arguments of its namesake and the places of its files, which by default are those of the original; none
downloads or unpacks anything. Items are as everywhere here: images float32 (H, W, 3) in [-1, 1], label maps one-hot.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tamingfast.data.checks import existing_directory, flag
from tamingfast.data.conditions import Kind
from tamingfast.data.conditions.maps import Coordinates, Depth, Segmentation
from tamingfast.data.conditions.reading import packed_floats
from tamingfast.data.image_files import ImageFiles, warn_skipped
from tamingfast.data.listing import from_list, scan
from tamingfast.errors import UserError, brief, nearest
from tamingfast.files import lines_of, read_text

#: Classes of ImageNet in the original's restricted set of animals; ranges do not include their ends.
_ANIMALS = "30-32, 33-37, 151-268, 281-285, 80-100, 365-382, 389-397, 118-121, 300-319"
_IMAGENET_CLASSES = 1000
_BROKEN_IN_IMAGENET = "n06596364_9591.JPEG"
#: What the original scales with; ours is Pillow's, which differs from it in the last bits only.
_INTERPOLATION = "bicubic"


@dataclass(frozen=True)
class PackedDepth(Depth):
    """Depth maps as the original keeps them: PNGs whose pixels' four bytes are one float32. Gray PNGs work as well."""

    suffixes: ClassVar[tuple[str, ...]] = (".png",)

    def values(self, path: str | os.PathLike) -> np.ndarray:
        return packed_floats(path)


@dataclass(frozen=True)
class StuffThings(Segmentation):
    """COCO's label maps, moved up by one, so that 255, which is no label, becomes 0."""

    def values(self, path: str | os.PathLike) -> np.ndarray:
        return (super().values(path) + 1) % 256


class Pictures(ImageFiles):
    """`ImageFiles` of squares of ``crop_size`` in images whose shorter side is ``size``, perhaps with a condition."""

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None,
        random_crop: bool,
        crop_size: int | None = None,
        kind: Kind | None = None,
        sources: Sequence[str] = (),
        **options: Any,
    ) -> None:
        size = size or None  # 0 in the original, too, for images at their own size
        if size is not None and crop_size is not None and crop_size > size:
            raise UserError(f"crop_size: got {crop_size}, expected at most size={size}, the shorter side of the images")
        side = crop_size or size
        if kind is not None and side is not None:
            kind.check(side)
        super().__init__(
            paths, side, flag("random_crop", random_crop), short_side=size, kind=kind, sources=list(sources) or None,
            **options,
        )  # fmt: skip


# --- ImageNet ---------------------------------------------------------------------------------------------------------


class _ImageNet(Pictures):
    """Images in folders of their classes, as ImageNet's archives unpack; ``class_label`` is the folder's number."""

    name: ClassVar[str]
    random: ClassVar[bool]

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        path: str | os.PathLike | None = None,
        *,
        size: int | None = None,
        random_crop: bool | None = None,
        depth_path: str | os.PathLike | None = None,
        crop_size: int | None = None,
    ) -> None:
        config = dict(config or {})
        known = ("size", "sub_indices", type(self).__name__)
        for key in config:
            if key not in known:
                raise UserError(f"config.{key}: got a key that nothing reads, expected one of {', '.join(known)}")
        own = config.get(type(self).__name__) or {}
        random_crop = own.get("random_crop", self.random) if random_crop is None else random_crop
        root = _directory("path", path or _cache() / self.name / "data", "ImageNet's folders of classes")
        files, broken = scan(root)
        labelled = [(name, label) for name, label in files if label and not name.endswith(_BROKEN_IN_IMAGENET)]
        classes = sorted({label for _, label in labelled})
        kept = classes
        if config.get("sub_indices") is not None:
            if len(classes) != _IMAGENET_CLASSES:
                raise UserError(
                    f"path: got {len(classes)} folders of classes in {root}, expected {_IMAGENET_CLASSES}, of which "
                    "sub_indices are numbers"
                )
            kept = [classes[index] for index in indices_of(config["sub_indices"])]
        chosen = [(name, label) for name, label in labelled if label in set(kept)]
        if not chosen:
            raise UserError(f"path: got no image in a folder of a class in {root}, expected ImageNet's folders")
        sources: list[str] = []
        if depth_path is not None:
            maps = _directory("depth_path", depth_path, "depth maps in folders of classes")
            sources = existing([str((maps / name).with_suffix(".png")) for name, _ in chosen], "a depth map")
        warn_skipped(broken)
        super().__init__(
            [str(root / name) for name, _ in chosen], size or config.get("size"), random_crop, crop_size,
            PackedDepth() if sources else None, sources,
            labels=[kept.index(label) for _, label in chosen], classes=kept, broken=broken,
        )  # fmt: skip


class ImageNetTrain(_ImageNet):
    """``taming.data.imagenet.ImageNetTrain``: random squares of ``config.size``, in ``path``/<class>/."""

    name, random = "ILSVRC2012_train", True

    def __init__(self, config: Mapping[str, Any] | None = None, path: str | os.PathLike | None = None) -> None:
        super().__init__(config, path)


class ImageNetValidation(_ImageNet):
    """``taming.data.imagenet.ImageNetValidation``: centre squares of ``config.size``, in ``path``/<class>/."""

    name, random = "ILSVRC2012_validation", False

    def __init__(self, config: Mapping[str, Any] | None = None, path: str | os.PathLike | None = None) -> None:
        super().__init__(config, path)


class _WithDepth(_ImageNet):
    """ImageNet with a depth map for each image, in ``root``/<split>/<class>/, for the classes ``sub_indices``."""

    split: ClassVar[str]

    def __init__(
        self,
        size: int | None = None,
        random_crop: bool | None = None,
        sub_indices: str | None = None,
        crop_size: int | None = None,
        root: str | os.PathLike = "data/imagenet_depth",
        path: str | os.PathLike | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if config:
            raise UserError(f"config: got {brief(dict(config))}, which the original does not read here, expected none")
        super().__init__(
            {"sub_indices": sub_indices}, path, size=size, random_crop=random_crop, crop_size=crop_size,
            depth_path=Path(root, self.split),
        )  # fmt: skip


class ImageNetTrainWithDepth(_WithDepth):
    """``taming.data.imagenet.ImageNetTrainWithDepth``."""

    name, random, split = "ILSVRC2012_train", True, "train"


class ImageNetValidationWithDepth(_WithDepth):
    """``taming.data.imagenet.ImageNetValidationWithDepth``."""

    name, random, split = "ILSVRC2012_validation", False, "val"


class RINTrainWithDepth(ImageNetTrainWithDepth):
    """``taming.data.imagenet.RINTrainWithDepth``: the classes of animals."""

    def __init__(self, size: int | None = None, random_crop: bool = True, **places: Any) -> None:
        super().__init__(size, random_crop, _ANIMALS, **places)


class RINValidationWithDepth(ImageNetValidationWithDepth):
    """``taming.data.imagenet.RINValidationWithDepth``: the classes of animals."""

    def __init__(self, size: int | None = None, random_crop: bool = False, **places: Any) -> None:
        super().__init__(size, random_crop, _ANIMALS, **places)


def indices_of(text: str) -> list[int]:
    """The numbers in ``"32-123, 256, 280-321"``, sorted; the end of a range is not part of it."""
    found: list[int] = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"sub_indices: got {brief(text)}, expected numbers and ranges such as '32-123, 256'")
        found += range(int(first), int(last)) if dash else [int(first)]
    wrong = next((index for index in found if index >= _IMAGENET_CLASSES), None)
    if wrong is not None:
        raise UserError(f"sub_indices: got {wrong}, expected at most {_IMAGENET_CLASSES - 1}")
    return sorted(found)


def _cache() -> Path:
    """Where the original unpacks what it downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "autoencoders", "data")


# --- faces ------------------------------------------------------------------------------------------------------------


class _FacesHQ(Pictures):
    """CelebA-HQ (class 0) and FFHQ (class 1), each a directory and a list of files in it, with coordinates if asked."""

    split: ClassVar[str]
    random: ClassVar[bool]

    def __init__(
        self,
        size: int,
        crop_size: int | None = None,
        coord: bool = False,
        celebahq_path: str | os.PathLike = "data/celebahq",
        ffhq_path: str | os.PathLike = "data/ffhq",
        celebahq_list: str | os.PathLike | None = None,
        ffhq_list: str | os.PathLike | None = None,
    ) -> None:
        places = (
            (celebahq_list or f"data/celebahq{self.split}.txt", celebahq_path),
            (ffhq_list or f"data/ffhq{self.split}.txt", ffhq_path),
        )
        paths = [_listed(listed, root) for listed, root in places]
        kind = Coordinates() if flag("coord", coord) and crop_size is not None else None
        labels = [label for label, found in enumerate(paths) for _ in found]
        super().__init__(
            [*paths[0], *paths[1]], size, self.random and crop_size is not None, crop_size, kind, labels=labels,
            classes=["celebahq", "ffhq"],
        )  # fmt: skip


class FacesHQTrain(_FacesHQ):
    """``taming.data.faceshq.FacesHQTrain``: random squares of ``crop_size``."""

    split, random = "train", True


class FacesHQValidation(_FacesHQ):
    """``taming.data.faceshq.FacesHQValidation``: centre squares of ``crop_size``."""

    split, random = "validation", False


# --- label maps -------------------------------------------------------------------------------------------------------


class SegmentationBase(Pictures):
    """``taming.data.sflckr.SegmentationBase``: listed images with label maps of the same names in another directory."""

    def __init__(
        self,
        data_csv: str | os.PathLike,
        data_root: str | os.PathLike,
        segmentation_root: str | os.PathLike,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = _INTERPOLATION,
        n_labels: int = 182,
        shift_segmentation: bool = False,
        crop_size: int | None = None,
    ) -> None:
        _check_interpolation(interpolation)
        paths = _listed(data_csv, data_root)
        maps = [Path(segmentation_root, os.path.relpath(path, data_root)).with_suffix(".png") for path in paths]
        kind = (StuffThings if flag("shift_segmentation", shift_segmentation) else Segmentation)(n_labels)
        super().__init__(paths, size, random_crop, crop_size, kind, existing(list(map(str, maps)), "a label map"))


class _Examples(SegmentationBase):
    """A list of images with their label maps, at the places where the original's repository has its examples."""

    stem: ClassVar[str]
    labels_there: ClassVar[int]
    shift: ClassVar[bool] = False
    usual_size: ClassVar[int | None] = 256

    def __init__(
        self,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = _INTERPOLATION,
        data_csv: str | os.PathLike | None = None,
        data_root: str | os.PathLike | None = None,
        segmentation_root: str | os.PathLike | None = None,
    ) -> None:
        super().__init__(
            data_csv or f"data/{self.stem}_examples.txt", data_root or f"data/{self.stem}_images",
            segmentation_root or f"data/{self.stem}_segmentations", size or self.usual_size, random_crop, interpolation,
            self.labels_there, self.shift,
        )  # fmt: skip


class FlickrExamples(_Examples):
    """``taming.data.sflckr.Examples``: 182 labels."""

    stem, labels_there, usual_size = "sflckr", 182, None


class ADE20kExamples(_Examples):
    """``taming.data.ade20k.Examples``: 151 labels."""

    stem, labels_there = "ade20k", 151


class CocoExamples(_Examples):
    """``taming.data.coco.Examples``: 183 labels."""

    stem, labels_there, shift = "coco", 183, True


class _ADE20k(SegmentationBase):
    """ADE20K with 151 labels: ``path``/images and ``path``/annotations, and a list of files below the former."""

    listed: ClassVar[str]
    random: ClassVar[bool]

    def __init__(
        self,
        size: int | None = None,
        random_crop: bool | None = None,
        interpolation: str = _INTERPOLATION,
        crop_size: int | None = None,
        path: str | os.PathLike = "data/ade20k_root",
        data_csv: str | os.PathLike | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if config:
            raise UserError(f"config: got {brief(dict(config))}, which the original does not read here, expected none")
        super().__init__(
            data_csv or self.listed, Path(path, "images"), Path(path, "annotations"), size,
            self.random if random_crop is None else random_crop, interpolation, 151, False, crop_size,
        )  # fmt: skip


class ADE20kTrain(_ADE20k):
    """``taming.data.ade20k.ADE20kTrain``."""

    listed, random = "data/ade20k_train.txt", True


class ADE20kValidation(_ADE20k):
    """``taming.data.ade20k.ADE20kValidation``."""

    listed, random = "data/ade20k_test.txt", False


class _Coco(Pictures):
    """COCO's images with their maps of stuff and things, 183 labels; captions, which no model here reads, are left out.

    The images are those in ``path`` that have a map of the same name in ``segmentation_path``.
    """

    split: ClassVar[str]
    random: ClassVar[bool]

    def __init__(
        self,
        size: int,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
        path: str | os.PathLike | None = None,
        segmentation_path: str | os.PathLike | None = None,
    ) -> None:
        for name, value, wanted in (
            ("onehot_segmentation", onehot_segmentation, True), ("use_stuffthing", use_stuffthing, True),
            ("force_no_crop", force_no_crop, False),
        ):  # fmt: skip
            if flag(name, value) is not wanted:
                raise UserError(f"{name}: got {value}, expected {wanted}, as other label maps of COCO are not read")
        root = _directory("path", path or f"data/coco/{self.split}", "COCO's images")
        usual = f"data/cocostuffthings/{self.split}"
        maps = _directory("segmentation_path", segmentation_path or usual, "COCO's maps of stuff and things")
        files, broken = scan(root)
        pairs = [(root / name, (maps / name).with_suffix(".png")) for name, _ in files]
        found = [(str(image), str(source)) for image, source in pairs if source.is_file()]
        if not found:
            raise UserError(f"segmentation_path: got no map for any image of {root} in {maps}, expected <name>.png")
        warn_skipped(broken)
        super().__init__(
            [image for image, _ in found], size, self.random, crop_size, StuffThings(183),
            [source for _, source in found], broken=broken,
        )  # fmt: skip


class CocoImagesAndCaptionsTrain(_Coco):
    """``taming.data.coco.CocoImagesAndCaptionsTrain``, without captions."""

    split, random = "train2017", True


class CocoImagesAndCaptionsValidation(_Coco):
    """``taming.data.coco.CocoImagesAndCaptionsValidation``, without captions."""

    split, random = "val2017", False


# --- files ------------------------------------------------------------------------------------------------------------


def _directory(name: str, path: str | os.PathLike, what: str) -> Path:
    try:
        return existing_directory(name, path)
    except UserError as error:
        found = str(error).partition("got ")[2].partition(",")[0]
        raise UserError(
            f"{name}={path}: got {found}, expected the directory of {what}; give {name}=DIRECTORY among the params"
        ) from error


def _listed(paths_file: str | os.PathLike, root: str | os.PathLike) -> list[str]:
    """The images that a text file lists, one path below ``root`` a line; UserError if one is missing or none opens."""
    text = read_text(paths_file, "a list of the data set's images, one path a line", errors="surrogateescape")
    paths = [os.path.join(root, line.strip()) for line in lines_of(text) if line.strip()]
    existing(paths[:1], "an image")
    good, broken = from_list(paths)
    if not good:
        raise UserError(
            f"{paths_file}: got {len(paths)} paths, none of which opens as an image in {root}, expected paths of images"
        )
    warn_skipped(broken)
    return good


def existing(paths: list[str], what: str) -> list[str]:
    """``paths``; UserError naming the first that is no file, where ``what`` is expected."""
    missing = next((path for path in paths if not os.path.isfile(path)), None)
    if missing is not None:
        raise UserError(
            f"{missing}: got no such file, expected {what}; correct the directories and lists among the params"
        )
    return paths


def _check_interpolation(name: object) -> None:
    if name != _INTERPOLATION:
        raise UserError(
            f"interpolation: got {brief(name)}, expected {_INTERPOLATION}{nearest(str(name), [_INTERPOLATION])}"
        )
