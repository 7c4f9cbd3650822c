"""PNG files as Pillow cannot read them: with long texts, and with grays of fewer than eight bits as they are stored."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
#: Bytes of texts and profiles that are left in a file, which is as many as Pillow unpacks of one of them.
LONGEST = 1 << 20


def without_long_texts(stream: IO[bytes]) -> IO[bytes]:
    """``stream`` from its beginning; of a PNG file with too long texts or profiles, a copy without these.

    Pillow refuses such files, although nothing but the rest of them is shown.
    """
    chunks, room = [], LONGEST
    left_out = False
    for kind, content in _chunks(stream):
        size = _text_size(stream, kind, content) if kind in _TEXTS else 0
        if size > room:
            left_out = True
            continue
        room -= size
        chunks.append(content)
    stream.seek(0)
    if not left_out:
        return stream
    copy = io.BytesIO()
    copy.write(stream.read(len(_SIGNATURE)))
    for content in chunks:
        stream.seek(content.start - 8)
        copy.write(stream.read(len(content) + 12))
    copy.seek(0)
    return copy


def bit_depth(stream: IO[bytes]) -> int | None:
    """The bits of a pixel's value, or of each of its colours; None for other files."""
    stream.seek(0)
    start = stream.read(25)
    stream.seek(0)
    return start[24] if len(start) == 25 and start.startswith(_SIGNATURE) else None


def _chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, range]]:
    """(name, place of the content) of each chunk of a PNG file; nothing for other files."""
    stream.seek(0)
    if stream.read(len(_SIGNATURE)) != _SIGNATURE:
        return
    place = len(_SIGNATURE)
    while len(start := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        yield kind, range(place + 8, place + 8 + length)
        if kind == b"IEND":
            return
        place += length + 12
        stream.seek(place)


def _text_size(stream: IO[bytes], kind: bytes, content: range) -> int:
    """The bytes of a text or profile when it is unpacked, or some number above `LONGEST` if they are more."""
    if len(content) > LONGEST:
        return len(content)
    stream.seek(content.start)
    data = stream.read(len(content))
    rest = data.partition(b"\0")[2]  # after the text's name
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated name
    elif kind in (b"zTXt", b"iCCP"):
        packed = rest[1:]
    else:
        return len(data)
    try:
        return len(zlib.decompressobj().decompress(packed, LONGEST + 1))
    except zlib.error:
        return len(data)
