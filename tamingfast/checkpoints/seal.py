"""Checksums in safetensors files, so that a flipped bit is noticed when a file is read.

The metadata of a file has "sha256": the SHA-256 of all of the file's bytes, with zeros in place of its own 64 digits.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from typing import IO

from tamingfast.errors import UserError
from tamingfast.files import open_regular
from tamingfast.progress import bar

_NAME, _BLANK = "sha256", "0" * 64
#: Metadata to write into a file that `seal` completes.
UNSEALED = {_NAME: _BLANK}
# Quotes inside a value are escaped, so this matches only the metadata's own key.
_DIGITS = re.compile(rb'"sha256":"([^"]{64})"')
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library


def seal(path: str | os.PathLike) -> None:
    """Fill in the checksum of a safetensors file that was written with the metadata `UNSEALED`."""
    with open(path, "rb+") as stream:
        place, _ = _checksum(stream)
        assert place is not None, "the file was not written with the metadata UNSEALED"
        digest = _digest(stream, place)
        stream.seek(place)
        stream.write(digest.encode())


def check_seal(path: str | os.PathLike) -> None:
    """Raise UserError if the bytes of a safetensors file are not those that its checksum was made of.

    A file without a checksum passes: other programs write none.
    """
    with open_regular(path) as stream:
        place, expected = _checksum(stream)
        found = expected if place is None else _digest(stream, place)
    if found != expected:
        raise UserError(
            f"{path}: got bytes of checksum {found[:12]}, expected {expected[:12]}, as the file was changed or damaged "
            "after it was written; copy or make it again"
        )


def _checksum(stream: IO[bytes]) -> tuple[int | None, str]:
    """The offset and the text of the digits in the header; (None, "") if there are none."""
    stream.seek(0)
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    found = _DIGITS.search(stream.read(length)) if length <= _LARGEST_HEADER else None
    return (None, "") if found is None else (8 + found.start(1), found[1].decode(errors="replace"))


def _digest(stream: IO[bytes], place: int) -> str:
    """SHA-256 of the file with zeros at ``place``."""
    state = hashlib.sha256()
    stream.seek(0)
    state.update(stream.read(place))
    state.update(_BLANK.encode())
    stream.seek(place + len(_BLANK))
    size = os.fstat(stream.fileno()).st_size
    with bar("B", size, desc="checksum", unit_scale=True, delay=1, leave=False) as progress:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
            progress.update(len(chunk))
    return state.hexdigest()
