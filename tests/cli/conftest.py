"""Small models shared by the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def square(photo: Path, tmp_path: Path) -> Path:
    path = tmp_path / "square.png"
    Image.open(photo).crop((0, 0, 32, 32)).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    pixels = np.zeros((32, 32), np.uint8)
    pixels[10:20, 12:24] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    return path
