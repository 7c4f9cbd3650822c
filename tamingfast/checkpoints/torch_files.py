"""The two formats of ``torch.save``, read without torch: a zip archive and, before torch 1.6, pickles in a row.

What a file says of itself is compared with its size before memory is taken for it.
"""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from tamingfast.checkpoints.unpickling import BadPickle, Storage, StoredTensor, Unpickler

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_RECORDS = "data.pkl"
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, and the lengths of the name and the extra field
_LONGEST_END = 22 + (1 << 16)  # the record at the end of an archive, and its comment
_CHUNK = 1 << 20


class BadFile(ValueError):
    """A file of torch's that is damaged or cannot be used; the message is a noun phrase that says what it is."""


class TorchFile:
    """The content of a file of ``torch.save``; its storages are read when a tensor asks for them.

    Attributes:
        content: the value that was saved, as `Unpickler.load` gives it.
    """

    content: Any

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        self._read: dict[str, Tensor] = {}

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor on the CPU; tensors of one storage share its memory. Raises BadFile if it is damaged."""
        storage = stored.storage
        if storage.key not in self._read:
            self._read[storage.key] = self._bytes(storage)
        memory = self._read[storage.key]
        size = stored.dtype.itemsize
        last = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
        count = math.prod(stored.shape)
        if (count and last >= len(memory) // size) or math.prod(n for n in stored.shape if n) >= 1 << 62:
            raise BadFile(f"a damaged file in which a tensor of shape {stored.shape} is larger than its memory")
        if not count:
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        flat = memory[: len(memory) // size * size]
        # Any byte but 0 and 1 is no bool.
        values = flat.ne(0) if stored.dtype == torch.bool else flat.view(stored.dtype)
        return values.as_strided(stored.shape, stored.stride, stored.offset)

    def _bytes(self, storage: Storage) -> Tensor:
        raise NotImplementedError

    def _span(self, start: int, length: int, crc: int | None = None) -> Tensor:
        """The bytes of the file from ``start`` on, uint8 (length,), checked against their CRC-32 if it is given."""
        if not 0 <= start <= start + length <= self._size:
            raise BadFile(f"a file of {self._size} bytes that ends too early")
        found = torch.empty(length, dtype=torch.uint8, device="cpu")
        view = memoryview(found.numpy().data)
        self._stream.seek(start)
        done = check = 0
        while done < length and (count := self._stream.readinto(view[done : done + _CHUNK])):  # type: ignore[attr-defined]
            check = 0 if crc is None else zlib.crc32(view[done : done + count], check)
            done += count
        if done < length:
            raise BadFile(f"a file that ends after {start + done} bytes")
        if crc is not None and check != crc:
            raise BadFile(f"bytes of checksum {check:08x} where the file says {crc:08x}, as after damage")
        return found


class _Zip(TorchFile):
    """An archive with a pickle ``data.pkl`` and the storages ``data/KEY``, neither compressed."""

    def __init__(self, stream: IO[bytes]):
        super().__init__(stream)
        self._entries = {entry.filename: entry for entry in _entries(stream, self._size)}
        pickles = [name for name in self._entries if name.endswith(f"/{_RECORDS}")]
        if not pickles or any(name.endswith("/constants.pkl") for name in self._entries):
            raise BadFile(_other_archive(self._entries))
        self._folder = min(pickles, key=len).removesuffix(_RECORDS)
        # torch can be told to write no checksums (`torch.serialization.set_crc32_options`); then all are zero.
        self._checked = any(entry.CRC for entry in self._entries.values())
        self._swapped = self._text("byteorder", sys.byteorder) != sys.byteorder
        pickled = self._record(_RECORDS).numpy().tobytes()
        self.content = _unpickled(Unpickler(), io.BytesIO(pickled))

    def _text(self, name: str, default: str) -> str:
        if self._folder + name not in self._entries:
            return default
        return self._record(name).numpy().tobytes().decode("ascii", "replace")

    def _record(self, name: str) -> Tensor:
        entry = self._entries.get(self._folder + name)
        if entry is None:
            raise BadFile(f"a damaged archive without {name[:40]!r}")
        header = self._span(entry.header_offset, _LOCAL_HEADER.size).numpy().tobytes()
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise BadFile(f"a damaged archive that has no {name[:40]!r} at the place that it gives")
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        return self._span(start, entry.file_size, entry.CRC if self._checked else None)

    def _bytes(self, storage: Storage) -> Tensor:
        found = self._record(f"data/{storage.key}")
        if len(found) != storage.numel * storage.dtype.itemsize:
            raise BadFile(f"a damaged archive in which the memory of tensors has {len(found)} bytes, not as they say")
        if self._swapped and len(found):
            found.untyped_storage().byteswap(storage.dtype)
        return found


def _entries(stream: IO[bytes], size: int) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception as error:  # the parser raises errors of many types for damaged archives
        stream.seek(max(0, size - _LONGEST_END))
        if b"PK\x05\x06" in stream.read():
            raise BadFile(f"a damaged zip archive of {size} bytes") from error
        raise BadFile(
            f"a zip archive whose end is missing after {size} bytes, as after an interrupted download"
        ) from error
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise BadFile(_other_archive({entry.filename: entry for entry in entries}, "a compressed or encrypted"))
    if sum(entry.file_size for entry in entries) > size:
        raise BadFile(f"a damaged zip archive of {size} bytes that claims to hold more")
    return entries


def _other_archive(names: Any, how: str = "a") -> str:
    """What a zip archive is that is none of ``torch.save``."""
    kinds: dict[str, Callable[[str], bool]] = {
        "a TorchScript archive": lambda name: name.endswith("/constants.pkl"),
        "an archive of numpy arrays (.npz)": lambda name: name.endswith(".npy"),
        "a Keras model": lambda name: name.endswith("model.weights.h5"),
        "an exported program of torch": lambda name: "archive_format" in name or name.startswith("serialized_"),
        "an Office document": lambda name: name == "[Content_Types].xml",
    }
    for kind, matches in kinds.items():
        if any(map(matches, names)):
            return kind
    return f"{how} zip archive, which torch.save does not write"


class _Pickles(TorchFile):
    """A magic number, a version, facts of the system, the value and the keys, each pickled; then the storages."""

    def __init__(self, stream: IO[bytes]):
        super().__init__(stream)
        unpickler = Unpickler()
        source = Bounded(stream, self._size)
        if _unpickled(unpickler, source) != _MAGIC:
            raise BadFile("a pickle that torch.save did not write, as of JAX, Paddle or joblib")
        if _unpickled(unpickler, source) != _PROTOCOL:
            raise BadFile("a file of an unknown version of torch's format")
        _unpickled(unpickler, source)
        self.content = _unpickled(unpickler, source)
        keys = _unpickled(unpickler, source)
        self._places: dict[str, int] = {}
        for key in keys if isinstance(keys, list) else ():
            storage = unpickler.storages.get(key) if isinstance(key, str) else None
            if storage is None:
                raise BadFile("a damaged file whose storages have no tensors")
            (numel,) = struct.unpack("<q", self._span(stream.tell(), 8).numpy().tobytes())
            if numel != storage.numel:
                raise BadFile(f"a damaged file with {numel} values where {storage.numel} are due")
            self._places[key] = stream.tell()
            end = stream.tell() + numel * storage.dtype.itemsize
            if end > self._size:
                raise BadFile(f"a file that ends too early, after {self._size} of at least {end} bytes")
            stream.seek(end)

    def _bytes(self, storage: Storage) -> Tensor:
        if storage.key not in self._places:
            raise BadFile("a damaged file that lacks the memory of a tensor")
        return self._span(self._places[storage.key], storage.numel * storage.dtype.itemsize)


@dataclass
class Bounded:
    """A stream whose reads take no more memory than is left of the file, however long they are said to be."""

    stream: IO[bytes]
    size: int

    def read(self, count: int) -> bytes:
        # To ask for the position takes a system call, which would take longer than most instructions.
        return self.stream.read(count if count < _CHUNK else min(count, self.size - self.stream.tell()))

    def readline(self) -> bytes:
        return self.stream.readline()


def _unpickled(unpickler: Unpickler, stream: Any) -> Any:
    try:
        return unpickler.load(stream)
    except BadPickle as error:
        raise BadFile(f"a damaged file, or one that ends too early ({error})") from error


def open_torch_file(stream: IO[bytes]) -> TorchFile:
    """The file of ``torch.save`` in ``stream``, which must stay open while tensors are read. Raises BadFile."""
    stream.seek(0)
    zipped = stream.read(2) == b"PK"
    stream.seek(0)
    return _Zip(stream) if zipped else _Pickles(stream)
