"""Small image files, intact and broken, and the messages logged about them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def save(path: Path, size: tuple[int, int] = (24, 16), seed: int | None = None, **options: Any) -> Path:
    """Write noise of ``size`` (width, height), by default seeded by the file's name; ``options`` are Pillow's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(path.name.encode()) if seed is None else seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def png(path: Path, depth: int, color: int, rows: list[bytes], width: int, *chunks: tuple[bytes, bytes]) -> Path:
    """Write a PNG file of any bit depth and colour type; ``chunks`` (name, content) stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


def truncate(path: Path, keep: float = 0.6) -> Path:
    """Cut the file to a fraction of its bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages logged since the last call."""
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages
