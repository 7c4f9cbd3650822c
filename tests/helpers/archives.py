"""Tar archives of images for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """An image file's bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def noise(number: int, size: int = 16) -> np.ndarray:
    """uint8 (size, size, 3), its first pixel telling the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels[0, 0] = number
    return pixels


def write(path: Path, files: Mapping[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    """An archive of ``files`` by their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1.5 if form == tarfile.PAX_FORMAT else 1
            archive.addfile(entry, io.BytesIO(content))
    return path


def shards(root: Path, count: int, each: int, labelled: bool = True, size: int = 16) -> Path:
    """``count`` archives of ``each`` images under ``root``; the class is the number of the image modulo 3."""
    for shard in range(count):
        files: dict[str, bytes] = {}
        for number in range(shard * each, (shard + 1) * each):
            files[f"{number:05d}.png"] = encoded(noise(number, size))
            if labelled:
                files[f"{number:05d}.cls"] = str(number % 3).encode()
        write(root / f"train-{shard:03d}.tar", files)
    return root
