"""NumPy archives (.npz) of arrays larger than memory, read without trusting them and written in pieces.

An .npz is a zip file with one .npy for each array: a header with dtype, order and shape, then the bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from tamingfast.errors import UserError, first_line
from tamingfast.files import atomic_write, open_regular

#: The array of images in an archive of samples, uint8 (N, H, W, 3), as the evaluator of guided-diffusion names it.
IMAGES = "arr_0"
#: Largest array that is read whole: twice the covariance of Inception's features.
_LARGEST = 1 << 27  # bytes
_LARGEST_HEADER = 10_000
_LARGEST_SIDE = 1 << 14
_MOST_IMAGES = 1 << 31


class Archive:
    """The arrays of an .npz file, by name; opened with `opened`.

    Nothing in the file is unpickled or believed: a member's header is checked against what is asked for and against
    its size before memory is taken.
    """

    def __init__(self, path: Path, found: zipfile.ZipFile, expected: str) -> None:
        self.path, self._zip, self._expected = path, found, expected
        self.names = {name.removesuffix(".npy") for name in found.namelist() if name.endswith(".npy")}

    def whole(self, name: str, *dimensions: int) -> np.ndarray:
        """The array ``name`` of real numbers with these dimensions (-1 for any), as float64.

        Raises UserError for any other shape or dtype, for values that are not finite, and for more than 128 MiB.
        """
        with self._member(name) as (stream, shape, dtype, fortran):
            wanted = f"real numbers of shape ({', '.join('N' if d < 0 else str(d) for d in dimensions)})"
            fits = len(shape) == len(dimensions) and all(w in (-1, s) for s, w in zip(shape, dimensions, strict=True))
            if not fits or dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize > _LARGEST:
                raise self._unfit(name, shape, dtype, wanted)
            size = math.prod(shape) * dtype.itemsize
            content = np.frombuffer(self._bytes(stream, size, name), dtype)
        values = content.reshape(shape, order="F" if fortran else "C").astype(np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{self.path}: got values in {name} that are not finite, expected {self._expected}")
        return values

    def text(self, name: str) -> str:
        """The text in the array ``name`` of no dimensions."""
        with self._member(name) as (stream, shape, dtype, _):
            if shape != () or dtype.kind != "U" or dtype.itemsize > 1024:
                raise self._unfit(name, shape, dtype, "a short text")
            return str(np.frombuffer(self._bytes(stream, dtype.itemsize, name), dtype)[0])

    def size_of_images(self, name: str = IMAGES) -> tuple[int, int, int]:
        """(N, H, W) of the images ``name``; UserError unless they are uint8 (N, H, W, 3) with sides up to 16384."""
        with self._images(name) as (_, shape):
            return shape

    def images(self, batch: int, name: str = IMAGES) -> Iterator[np.ndarray]:
        """The images ``name`` in batches uint8 (b, H, W, 3); raises what `size_of_images` raises."""
        with self._images(name) as (stream, (count, height, width)):
            for first in range(0, count, batch):
                part = min(batch, count - first)
                content = self._bytes(stream, part * height * width * 3, name)
                yield np.frombuffer(bytearray(content), np.uint8).reshape(part, height, width, 3)  # may be written to

    @contextlib.contextmanager
    def _images(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, int, int]]]:
        with self._member(name) as (stream, shape, dtype, fortran):
            right = len(shape) == 4 and shape[3] == 3 and dtype == np.uint8 and not fortran
            if not right or not all(1 <= side <= _LARGEST_SIDE for side in shape[1:3]) or shape[0] > _MOST_IMAGES:
                raise self._unfit(name, shape, dtype, "uint8 of shape (N, H, W, 3)")
            yield stream, (shape[0], shape[1], shape[2])

    @contextlib.contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype, bool]]:
        """The bytes of the array behind its header, its shape and dtype, and whether its first index moves fastest."""
        if name not in self.names:
            held = ", ".join(sorted(self.names)[:8]) or "no arrays"
            raise UserError(f"{self.path}: got {held}, expected {name} among them, in {self._expected}")
        with _judged(self.path, self._expected), self._zip.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version of an array: got {version}, expected 1.0 or 2.0")
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
            shape, fortran, dtype = read(stream, max_header_size=_LARGEST_HEADER)
            if dtype.hasobject or any(side < 0 for side in shape):
                raise ValueError(f"array: got {dtype} of shape {shape}, expected numbers")
            yield stream, shape, dtype, fortran

    def _bytes(self, stream: IO[bytes], size: int, name: str) -> bytes:
        content = stream.read(size)
        if len(content) < size:
            raise UserError(
                f"{self.path}: got {len(content)} of {size} bytes of {name}, expected a whole file; copy it again"
            )
        return content

    def _unfit(self, name: str, shape: tuple[int, ...], dtype: np.dtype, wanted: str) -> UserError:
        return UserError(f"{self.path}: got {name} of {dtype} and shape {shape}, expected {wanted}")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], expected: str) -> Iterator[Archive]:
    """An .npz file to read inside the block; UserError, which names what was ``expected``, if it is none."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(open_regular(path))
        except FileNotFoundError:
            raise UserError(f"{path}: got no such file, expected {expected}; correct the path") from None
        with _judged(path, expected):
            found = stack.enter_context(zipfile.ZipFile(stream))
        yield Archive(path, found, expected)


@contextlib.contextmanager
def _judged(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever the readers of zip files and headers raise inside the block into a UserError."""
    try:
        yield
    except (UserError, GeneratorExit, OSError):
        raise
    except Exception as error:  # of zipfile, its decompressors, and NumPy's parser of headers
        raise UserError(
            f"{path}: got a damaged file or no .npz ({first_line(error)}), expected {expected}; give another file"
        ) from error


class Writer:
    """Writes the arrays of an .npz file, one after the other; opened with `written`."""

    def __init__(self, found: zipfile.ZipFile) -> None:
        self._zip = found

    def array(self, name: str, values: np.ndarray) -> None:
        """Write a whole array."""
        with self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, values, allow_pickle=False)

    def images(self, batches: Iterator[np.ndarray], count: int, name: str = IMAGES) -> None:
        """Write ``count`` images from batches uint8 (b, H, W, 3), as they come.

        Raises ValueError if there are more or fewer, or of several sizes.
        """
        written, shape = 0, None
        with self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
            for batch in batches:
                if shape is None:
                    shape = batch.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(stream, header)
                if batch.shape[1:] != shape:
                    raise ValueError(f"batches: got images of {batch.shape[1:]}, expected all of {shape}")
                stream.write(np.ascontiguousarray(batch, np.uint8).data)
                written += len(batch)
        if written != count:
            raise ValueError(f"batches: got {written} images, expected {count}")


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Writer]:
    """An .npz file to write inside the block, atomically and uncompressed; raises what `atomic_write` raises."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as found:
        yield Writer(found)
