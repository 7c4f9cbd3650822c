"""Small image files, intact and broken, and the messages logged about them."""

from __future__ import annotations

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
