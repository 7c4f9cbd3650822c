"""The start of a training on many files: until the first image, against listing their names with a sorted os.walk.

The files are one tiny image per folder under many names, so what is measured is listing, not decoding.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tamingfast.data import Index, build, loader

CLASSES = 1000


def tiny_image() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of so many images in `CLASSES` folders; removed at the end, as pytest keeps three of each."""

    def made(files: int) -> Path:
        for number in range(CLASSES):
            below = tmp_path / "images" / f"n{number:08d}"
            below.mkdir(parents=True)
            first = below / "00000000.png"
            first.write_bytes(tiny_image())
            for name in range(1, files // CLASSES):
                os.link(first, below / f"{name:08d}.png")
        return tmp_path / "images"

    yield made
    shutil.rmtree(tmp_path)


def walked(root: Path) -> int:
    return len(sorted(os.path.join(each, name) for each, _, names in os.walk(root) for name in names))


def first_batch(config: dict, index: Path, found: bool) -> int:
    """Build the data sets and read one batch; the index is read only if it is to be ``found``, and always written."""
    known = Index(index if found else None)
    train, validation = build(config, known)
    next(iter(loader(train, 8)))
    known.save(index)
    return len(train) + len(validation)


def seconds(function, *arguments) -> tuple[float, float, int]:
    """(elapsed seconds, those of the processor, the result): on a busy machine the second says more."""
    began, used = time.perf_counter(), time.process_time()
    count = function(*arguments)
    return time.perf_counter() - began, time.process_time() - used, count


@pytest.mark.quick(files=2000)
@pytest.mark.parametrize("files", [2000, 50_000, 1_280_000])
def test_folder(benchmark, folder, files, tmp_path):
    root = folder(files)
    config = {"name": "folder", "path": str(root), "size": 8}

    def measure() -> dict[str, list[float]]:
        steps = {
            "sorted os.walk": (walked, root),
            "first batch": (first_batch, config, tmp_path / "index", False),
            "first batch, resumed": (first_batch, config, tmp_path / "index", True),
        }
        times = {}
        for _ in range(3):
            for name, (function, *arguments) in steps.items():
                *spent, count = seconds(function, *arguments)
                assert count == files
                times[name] = [min(pair) for pair in zip(times.get(name, spent), spent, strict=True)]
        return times

    times = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(times)
    for name, (elapsed, used) in times.items():
        more = elapsed - times["sorted os.walk"][0]
        print(f"{files:9,} files  {name:22} {elapsed:7.2f} s  {more:+6.2f} s  processor {used:6.2f} s")


@pytest.mark.quick(samples=2000)
@pytest.mark.parametrize("samples", [2000, 200_000])
def test_shards(benchmark, samples, tmp_path):
    content, root = tiny_image(), tmp_path / "shards"
    root.mkdir()
    for shard in range(20):
        with tarfile.open(root / f"{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(samples // 20):
                for ending, body in (("png", content), ("cls", b"1")):
                    entry = tarfile.TarInfo(f"{shard:03d}{number:06d}.{ending}")
                    entry.size = len(body)
                    archive.addfile(entry, io.BytesIO(body))
    config = {"name": "shards", "path": str(root), "size": 8}

    def measure() -> dict[str, list[float]]:
        return {
            name: list(min(seconds(first_batch, config, tmp_path / "index", found)[:2] for _ in range(3)))
            for name, found in (("first batch", False), ("first batch, resumed", True))
        }

    times = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(times)
    for name, (elapsed, used) in times.items():
        print(f"{samples:9,} samples  {name:22} {elapsed:7.2f} s  processor {used:6.2f} s")
    shutil.rmtree(root)
