"""CIFAR10 from its official python archive.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tamingfast.checkpoints.unpickling import BadPickle, Unpickler, numbers
from tamingfast.data.base import ArrayDataset
from tamingfast.data.checks import flag, path_of
from tamingfast.data.randomness import random_bits, random_integers
from tamingfast.data.rgb import to_unit_scale
from tamingfast.errors import UserError
from tamingfast.files import digest
from tamingfast.progress import bar

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_NAME = "cifar-10-python.tar.gz"
FOLDER_NAME = "cifar-10-batches-py"
TRAIN_MEMBERS = tuple(f"data_batch_{number}" for number in range(1, 6))
VALIDATION_MEMBERS = ("test_batch",)
MEMBER_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 18

#: Images uint8 (n, 32, 32, 3), labels int64 (n,) and file names of one data file or split.
_Part = tuple[np.ndarray, np.ndarray, list[str]]


def build(
    size: int = 32,
    seed: int = 0,
    path: str | os.PathLike | None = None,
    flip: bool = True,
    url: str = URL,
    md5: str = ARCHIVE_MD5,
    member_md5: Mapping[str, str] = MEMBER_MD5,
    images_per_batch: int = 10_000,
) -> tuple[Cifar10, Cifar10]:
    """(train, validation): 50000 training images (mirrored at random with ``flip``), 10000 test images.

    ``path`` is the archive, a directory that contains it, or the directory extracted from it (or its parent). By
    default the archive is taken from the user's cache, and downloaded from ``url`` first if it is not there. Everything
    is verified before it is used: the archive by ``md5``, extracted files by ``member_md5``. ``images_per_batch`` is
    the number of images in each of the six files.

    Raises UserError for a size other than 32, a missing path, a failed download, a wrong checksum, and for an archive
    that lacks a file or is not in the official format.
    """
    if size != 32:
        raise UserError(f"size: got {size!r}, expected 32, the size of CIFAR10's images; or choose another dataset")
    source = _locate(None if path is None else path_of("path", path), url, md5)
    members = _from_folder(source, member_md5) if source.is_dir() else _from_archive(source, md5)
    batches = {name: _parse(name, content, images_per_batch) for name, content in members}
    train = _join([batches[name] for name in TRAIN_MEMBERS])
    validation = _join([batches[name] for name in VALIDATION_MEMBERS])
    return Cifar10(*train, split="train", seed=seed, flip=flip), Cifar10(*validation, split="test")


class Cifar10(ArrayDataset):
    """Images kept in memory as uint8 (N, 32, 32, 3); ``class_label`` indexes ``classes``."""

    classes = CLASSES

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        names: list[str],
        *,
        split: str,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        self.images, self.labels, self.names = images, labels, names
        self.split, self.seed, self.flip = split, seed, flag("flip", flip)

    @property
    def description(self) -> str:
        """One phrase about the images, for reports and token files."""
        return f"CIFAR10, {self.split} split, {len(self.images)} images of 32x32"

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        pixels = self.images[indices]
        if self.flip:
            mirrored = random_integers(random_bits(self.seed, self.epoch, indices), 2).astype(bool)
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        names = [self.names[index] for index in indices]
        return {
            "image": to_unit_scale(pixels),
            "class_label": torch.from_numpy(self.labels[indices]),
            "file_path_": names,
        }


def cache_folder() -> Path:
    """Where downloads are kept: ``tamingfast`` in $XDG_CACHE_HOME, which defaults to ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tamingfast"


def download(url: str, target: Path, md5: str) -> None:
    """Fetch ``url`` into ``target``, which appears only when complete and with the MD5 sum ``md5``.

    Bytes are collected in ``target`` + ".partial"; if an earlier attempt left such a file, only the rest is requested.
    Raises UserError when the server cannot be reached, refuses, stops early, or sends other bytes.
    """
    partial = target.with_name(target.name + ".partial")
    by_hand = "or fetch the file by other means and give its location as path=..."
    try:
        expected = _fetch(url, partial)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{url}: got HTTP {error.code} ({error.reason}), expected the archive; try again later, {by_hand}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url}: got no answer ({reason}), expected the archive; connect to the network and run again, {by_hand}"
        ) from error
    received = partial.stat().st_size
    if expected is not None and received < expected:
        raise UserError(
            f"{url}: got {received} bytes, expected {expected} bytes; run again to fetch the rest, {by_hand}"
        )
    found = digest(partial, "md5")
    if found != md5:
        partial.unlink()
        raise UserError(
            f"{url}: got {received} bytes with MD5 {found}, expected MD5 {md5}; run again to download anew, {by_hand}"
        )
    with open(partial, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, target)


def _fetch(url: str, partial: Path) -> int | None:
    """Append the bytes that ``partial`` lacks; returns the file's total size, None if the server does not give it."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # The partial file is at least as long as the whole file; its checksum decides.
        return None
    with response:
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with (
            open(partial, "ab" if have else "wb") as stream,
            bar("B", total, desc="CIFAR10", initial=have, unit_scale=True, delay=1) as progress,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                stream.write(chunk)
                progress.update(len(chunk))
    return total


def _locate(path: str | os.PathLike | None, url: str, md5: str) -> Path:
    """The archive, or the directory with the extracted files."""
    if path is None:
        archive = cache_folder() / ARCHIVE_NAME
        if not archive.exists():
            download(url, archive, md5)
        return archive
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if not given.exists():
        raise UserError(
            f"path={given}: got a path that does not exist, expected {ARCHIVE_NAME}; leave the path out to download it"
        )
    for candidate in (given / FOLDER_NAME, given / ARCHIVE_NAME):
        if candidate.exists():
            return candidate
    if any((given / name).exists() for name in MEMBER_MD5):
        return given
    raise UserError(
        f"path={given}: got a directory without {FOLDER_NAME} and {ARCHIVE_NAME}, expected one of them in it"
    )


def _from_archive(archive: Path, md5: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the six data files, after verifying the archive."""
    found = digest(archive, "md5")
    if found != md5:
        raise UserError(
            f"{archive}: got MD5 {found}, expected {md5}; the file is incomplete or a different one, so delete it "
            "and download it again"
        )
    wanted = {f"{FOLDER_NAME}/{name}": name for name in MEMBER_MD5}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = wanted.pop(member.name.removeprefix("./"), None) if member.isfile() else None
                content = None if name is None else tar.extractfile(member)
                if name is not None and content is not None:
                    yield name, content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{archive}: got a file that cannot be read as a tar archive ({error}), expected {ARCHIVE_NAME}; download "
            "it again"
        ) from error
    if wanted:
        raise UserError(
            f"{archive}: got an archive without {', '.join(wanted)}, expected {ARCHIVE_NAME}; download it again"
        )


def _from_folder(folder: Path, member_md5: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the six data files, each verified."""
    for name in MEMBER_MD5:
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / name}: got no readable file ({error.strerror}), expected one; extract {ARCHIVE_NAME} again"
            ) from error
        found = hashlib.md5(content).hexdigest()
        if found != member_md5.get(name):
            raise UserError(
                f"{folder / name}: got MD5 {found}, expected {member_md5.get(name)}; extract {ARCHIVE_NAME} again"
            )
        yield name, content


def _parse(name: str, content: bytes, count: int) -> _Part:
    """The ``count`` images of one data file."""
    try:
        batch = Unpickler().load(io.BytesIO(content))
        fields = batch if isinstance(batch, dict) else {}
        data = numbers(fields["data"]) if "data" in fields else None
        labels, names = fields.get("labels"), fields.get("filenames")
    except BadPickle as error:
        raise UserError(
            f"{name}: got a pickle that is refused ({error}), expected only arrays and lists; download it again"
        ) from error
    if data is None or not (data.dtype == np.uint8 and isinstance(labels, list) and isinstance(names, list)):
        raise UserError(
            f"{name}: got a file without data (uint8), labels or filenames, expected one of CIFAR10's python version; "
            f"download {ARCHIVE_NAME}"
        )
    if data.shape != (count, 3072) or len(labels) != count or len(names) != count:
        raise UserError(
            f"{name}: got data of shape {data.shape}, {len(labels)} labels and {len(names)} file names, expected "
            f"({count}, 3072), {count} and {count}; download it again"
        )
    if not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels):
        raise UserError(f"{name}: got labels out of range, expected 0 to {len(CLASSES) - 1}; download it again")
    images = data.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(labels, np.int64), [f"{name}/{_text(file)}" for file in names]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _join(parts: list[_Part]) -> _Part:
    images, labels, names = zip(*parts, strict=True)
    return (
        np.ascontiguousarray(np.concatenate(images)),
        np.concatenate(labels),
        [name for part in names for name in part],
    )
