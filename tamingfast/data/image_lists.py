"""Images whose paths a text file lists, as in the original repository's data configs."""

from __future__ import annotations

import os

from tamingfast.data.checks import path_of
from tamingfast.data.image_files import ImageFiles, warn_skipped
from tamingfast.data.listing import from_list
from tamingfast.errors import UserError
from tamingfast.files import lines_of, read_text

#: Around paths: spaces of all kinds, byte-order marks of joined files, and the end of a file on DOS.
_UNSEEN = " \t\u00a0\u200b\u3000\ufeff\x1a"


class ImageList(ImageFiles):
    """The images whose paths a text file lists, one per line; relative paths start at the working directory.

    The text may have been saved on Windows: with a byte-order mark, in UTF-16, with its ends of lines, quotes around
    paths and backslashes in them.

    Raises UserError when the file cannot be read, lists nothing, or lists no image that can be opened.
    """

    def __init__(
        self,
        paths_file: str | os.PathLike,
        size: int | None = None,
        random_crop: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        paths_file = path_of("list of images", paths_file)
        text = read_text(paths_file, "a text file with one image path per line", errors="surrogateescape")
        paths = [_existing(line) for line in lines_of(text) if line.strip(_UNSEEN)]
        if not paths:
            raise UserError(f"{paths_file}: got an empty file, expected one image path per line")
        good, broken = from_list(paths)
        if not good:
            path, reason = broken[0]
            raise UserError(
                f"{paths_file}: got {len(paths)} paths, none of which opens as an image, the first being {path} "
                f"({reason}), expected paths of images; correct them (relative paths start at the working directory)"
            )
        warn_skipped(broken)
        super().__init__(good, size, random_crop, flip, seed, broken=broken)


def _existing(line: str) -> str:
    """The line, or what it stands for where only that is the path of a file.

    Programs on Windows write quotes around paths, backslashes in them, and marks that cannot be seen beside them.
    """
    bare = line.strip(_UNSEEN)
    plain = bare.strip('"')
    meant = (line, bare, plain, plain.replace("\\", "/"))
    return next(filter(os.path.lexists, meant), line)


class CustomTrain(ImageList):
    """The original repository's ``taming.data.custom.CustomTrain``: centre crops of listed images."""

    def __init__(self, size: int, training_images_list_file: str | os.PathLike) -> None:
        super().__init__(training_images_list_file, size)


class CustomTest(ImageList):
    """The original repository's ``taming.data.custom.CustomTest``: centre crops of listed images."""

    def __init__(self, size: int, test_images_list_file: str | os.PathLike) -> None:
        super().__init__(test_images_list_file, size)
