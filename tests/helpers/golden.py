"""Data recorded with the public reference implementation (see tests/data/README.md)."""

from __future__ import annotations

import json
import lzma
import tarfile
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / "data"
_keepers: list[tempfile.TemporaryDirectory] = []


@lru_cache
def _folder() -> Path:
    keeper = tempfile.TemporaryDirectory(prefix="tamingfast-golden-")
    _keepers.append(keeper)  # removed when the process ends
    folder = Path(keeper.name)
    with tarfile.open(DATA / "taming-reference.tar.xz") as archive:
        for member in archive.getmembers():
            if member.isfile():
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    return folder


def path(name: str) -> Path:
    """Path of one unpacked file of the archive, for example ``vqmodel_f2.yaml``."""
    return _folder() / name


def checkpoint(name: str) -> Path:
    """Path of a checkpoint in the original's format; its config is next to it."""
    return path(f"{name}.ckpt")


@lru_cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """Inputs and outputs recorded with the reference implementation."""
    with np.load(path(f"{name}.npz")) as archive:
        return dict(archive)


@lru_cache
def state_dict_shapes() -> dict[str, dict[str, list[int]]]:
    """For each model of the original's own configs: every state-dict key with its shape."""
    with lzma.open(DATA / "state_dict_shapes.json.xz") as stream:
        return json.load(stream)
