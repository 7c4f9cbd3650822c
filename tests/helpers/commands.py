"""Runs the command line, and reads the pictures that it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tamingfast import cli


def run(*words: object) -> int:
    """The exit status of ``tamingfast`` with these arguments."""
    return cli.main([str(word) for word in words])


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of a picture."""
    with Image.open(path) as image:
        return image.size


def pixels_of(path: Path) -> np.ndarray:
    """The pixels of a picture, int64 so that differences do not wrap."""
    with Image.open(path) as image:
        return np.asarray(image).astype(int)
