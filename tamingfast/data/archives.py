"""Where the files in a tar archive lie, from its headers alone; nothing is unpacked.

Formats: ustar (POSIX.1-1988), its pax extension (POSIX.1-2001), and the long names and numbers of GNU tar.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO

from tamingfast.errors import UserError, first_line
from tamingfast.files import Part, open_regular

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _PAX = b"L", b"x"
_ABOUT_NEXT = (_LONG_NAME, _PAX, b"K", b"g")  # these describe the member that follows
_LARGEST_NAME = 1 << 20


class _Damaged(Exception):
    """What is wrong with an archive, as a part of a sentence."""


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """An archive, for `parts_of`. Raises UserError for what is no archive or ends too early, also inside the block."""
    try:
        with open_regular(path) as stream:
            yield stream
    except FileNotFoundError:
        raise UserError(f"{path}: got no such file, expected a tar archive; correct the path") from None
    except UserError:
        raise
    except (OSError, ValueError, _Damaged) as error:
        raise UserError(
            f"{path}: got a file that cannot be read ({first_line(error)}), expected an uncompressed tar archive; "
            "write it again"
        ) from error


def parts_of(path: str, stream: IO[bytes]) -> Iterator[Part]:
    """The regular files in the archive that is `opened` as ``stream``, in its order.

    Names are as the archive has them, and never used as paths.
    """
    length, place = os.fstat(stream.fileno()).st_size, 0
    told: dict[str, str] = {}  # about the next member, by the keys of pax
    while place < length:
        stream.seek(place)
        header = stream.read(_BLOCK)
        if not header[:1].strip(b"\0") and not header.strip(b"\0"):
            return
        if len(header) < _BLOCK or not _sound(header):
            raise _Damaged(f"no header at byte {place}")
        kind, begin = header[156:157], place + _BLOCK
        size = int(told["size"]) if "size" in told and kind in _REGULAR else _number(header[124:136])
        if size < 0 or begin + size > length:
            raise _Damaged(f"it ends within the file at byte {place}")
        if kind in (_LONG_NAME, _PAX):
            if size > _LARGEST_NAME:
                raise _Damaged(f"a name of {size} bytes")
            content = stream.read(size)
            told |= {"path": _text(content)} if kind == _LONG_NAME else _records(content)
        elif kind not in _ABOUT_NEXT:
            if kind in _REGULAR:
                yield Part(path, told.get("path") or _name(header), begin, size)
            told = {}
        place = begin + -(-size // _BLOCK) * _BLOCK


def _sound(header: bytes) -> bool:
    """Whether the checksum holds: the sum of all bytes, its own field counted as spaces."""
    try:
        return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _number(field: bytes) -> int:
    """Octal digits, or with the highest bit set a binary number as GNU tar writes it."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(content: bytes) -> dict[str, str]:
    """The records of a pax header: each is its own length, a space, key=value and a newline."""
    found = {}
    while content:
        length = int(content[:20].partition(b" ")[0])
        record, content = content[:length], content[length:]
        key, equals, value = record.partition(b" ")[2].rstrip(b"\n").partition(b"=")
        if length < 5 or not equals:
            raise _Damaged("a damaged pax header")
        found[_text(key)] = _text(value)
    return found
