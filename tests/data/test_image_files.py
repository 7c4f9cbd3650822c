"""Datasets of image files: crops and flips, broken files, pictures kept in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import logged, save, truncate
from PIL import Image

from tamingfast.data import image_files, loader
from tamingfast.data.image_files import ImageFiles
from tamingfast.data.rgb import read_rgb


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_pixels_are_replaced_by_another_image_and_reported(tmp_path, workers, suffix, caplog):
    paths = [str(save(tmp_path / f"{number}{suffix}", (64, 64))) for number in range(6)]
    broken = [paths[number] for number in (2, 3, 5)]
    for path in broken:
        truncate(Path(path))
    dataset = ImageFiles(paths, 16)
    batches = list(loader(dataset, 1, workers=workers))
    assert "3 image files were skipped" in "".join(logged(caplog))
    read = [batch["file_path_"][0] for batch in batches]
    assert [path for path in read if path in paths[:2] + paths[4:5]] == read
    assert [read[number] for number in (0, 1, 4)] == [paths[number] for number in (0, 1, 4)]
    assert [path for path, _ in dataset.broken] == broken
    list(loader(dataset, 1))
    assert not logged(caplog)


def test_what_stands_in_for_broken_files_is_spread_over_all_and_a_function_of_seed_epoch_and_index(tmp_path):
    paths = [str(save(tmp_path / f"{number:02d}.png", (8, 8))) for number in range(40)]
    for path in paths[:20]:
        Path(path).write_bytes(b"no image")

    def read(seed=0, epoch=0, workers=0, start=0):
        dataset = ImageFiles(paths, 8, random_crop=True, flip=True, seed=seed)
        batches = loader(dataset, 4, epoch=epoch, workers=workers, start_batch=start)
        return [(name, image.sum().item()) for each in batches
                for name, image in zip(each["file_path_"], each["image"], strict=True)]  # fmt: skip

    whole = read()
    assert {name for name, _ in whole} <= set(paths[20:])
    assert len({name for name, _ in whole[:20]}) > 8  # not one neighbour for all of them
    assert read(workers=2) == whole
    assert read(start=3) == whole[12:]
    assert read(epoch=1)[:20] != whole[:20] and read(seed=1)[:20] != whole[:20]


def test_unreadable_files_are_logged_once_also_when_an_epoch_is_left(tmp_path, caplog):
    paths = [str(save(tmp_path / f"{number}.png", (64, 64))) for number in range(6)]
    for number in (0, 5):
        truncate(tmp_path / f"{number}.png")
    dataset = ImageFiles(paths, 16)
    for number, _ in enumerate(loader(dataset, 1)):
        if number == 2:
            break
    assert [message.count(".png") for message in logged(caplog)] == [1]
    list(loader(dataset, 1))
    (second,) = logged(caplog)
    assert "5.png" in second and "0.png" not in second


def test_random_crops_and_flips_are_pure_functions_of_seed_epoch_and_index(tmp_path):
    paths = [str(save(tmp_path / f"{number}.png", (40, 10), seed=number)) for number in range(4)]

    def views(seed, epoch, workers=0):
        dataset = ImageFiles(paths, 10, random_crop=True, flip=True, seed=seed)
        return torch.cat([b["image"] for b in loader(dataset, 2, epoch=epoch, workers=workers)])

    assert torch.equal(views(0, 0), views(0, 0, workers=2))
    assert not torch.equal(views(0, 0), views(0, 1))
    assert not torch.equal(views(0, 0), views(1, 0))
    dataset = ImageFiles(paths, 10, random_crop=True, flip=True)
    found = set()
    source = np.asarray(Image.open(paths[0]))
    for epoch in range(60):
        dataset.set_epoch(epoch)
        pixels = ((dataset[0]["image"].numpy() + 1) * 127.5).round().astype(np.uint8)
        places = [
            (left, flipped)
            for left in range(31)
            for flipped in (False, True)
            if np.array_equal(source[:, left : left + 10][:, :: -1 if flipped else 1], pixels)
        ]
        assert len(places) == 1
        found.add(places[0])
    assert {flipped for _, flipped in found} == {False, True}
    assert max(left for left, _ in found) > 25
    assert min(left for left, _ in found) < 5


def test_centre_crop_after_resizing_the_shorter_side(tmp_path):
    gradient = np.broadcast_to(np.arange(120, dtype=np.uint8)[None, :, None] * 2, (60, 120, 3))
    Image.fromarray(np.ascontiguousarray(gradient)).save(tmp_path / "wide.png")
    image = ImageFiles([str(tmp_path / "wide.png")], 30)[0]["image"]
    assert image.shape == (30, 30, 3)
    columns = ((image[15, :, 0] + 1) * 127.5).numpy()
    assert abs(columns[0] - 61) <= 2
    assert abs(columns[-1] - 177) <= 2
    enlarged = ImageFiles([str(tmp_path / "wide.png")], 100)[0]["image"]
    assert enlarged.shape == (100, 100, 3)
    assert ImageFiles([str(tmp_path / "wide.png")])[0]["image"].shape == (60, 120, 3)


def test_pictures_stay_in_memory_as_far_as_there_is_room(tmp_path, monkeypatch):
    paths = [str(save(tmp_path / f"{number}.png")) for number in range(3)]
    decoded = []

    def read(path, short_side):
        decoded.append(path)
        return read_rgb(path, short_side)

    monkeypatch.setattr(image_files, "read_rgb", read)
    monkeypatch.setattr(image_files, "_room", lambda: 2 * 3 * 24 * 16 + 100)
    dataset = ImageFiles(paths, 16, random_crop=True)
    before = [dataset[number]["image"] for number in range(3)]
    again = [dataset[number]["image"] for number in range(3)]
    assert decoded == [*paths, paths[2]]
    assert all(map(torch.equal, before, again))
