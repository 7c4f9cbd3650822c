"""Which images each step of each process sees, how often files are read, and when a run validates."""

from __future__ import annotations

import pytest
import tiny
import torch
from picture_files import save

from tamingfast import ranks
from tamingfast.checkpoints import run_directory
from tamingfast.data import image_files
from tamingfast.data.base import as_epoch_dataset
from tamingfast.data.rgb import read_rgb
from tamingfast.training import feed, loop, settings


def test_each_epoch_sees_each_image_once_and_ranks_share_them():
    made, data = settings.Training(steps=1, batch_size=2, accumulate=2), as_epoch_dataset(tiny.Noise(17))

    def paths(rank, size, start, steps):
        batches = feed.step_batches(data, made, ranks.World(rank, size, torch.device("cpu")), start)
        return [[path for batch in next(batches)[1] for path in batch["file_path_"]] for _ in range(steps)]

    alone = paths(0, 1, 0, 4)
    assert len({path for step in alone for path in step}) == 16
    assert paths(0, 1, 2, 4)[:2] == alone[2:]  # starting in the middle
    assert {p for step in paths(0, 1, 4, 4) for p in step} != {
        p for step in alone for p in step
    }  # another part is dropped
    assert paths(0, 1, 4, 4) != alone
    for mine, yours, both in zip(
        paths(0, 2, 0, 2), paths(1, 2, 0, 2), [alone[0] + alone[1], alone[2] + alone[3]], strict=True
    ):
        assert not set(mine) & set(yours) and set(mine) | set(yours) == set(both)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_file_is_decoded_once_however_many_epochs(tmp_path, monkeypatch, workers):
    log = tmp_path / "log"

    def read(path, short_side):
        with open(log, "a") as stream:
            stream.write(f"{path}\n")
        return read_rgb(path, short_side)

    monkeypatch.setattr(image_files, "read_rgb", read)
    paths = [str(save(tmp_path / f"{number}.jpg", (40, 30))) for number in range(5)]
    data = image_files.ImageFiles(paths, 8, random_crop=True)
    made = settings.Training(steps=1, batch_size=2, workers=workers)
    batches = feed.step_batches(data, made, ranks.World(0, 1, torch.device("cpu")), 0)
    epochs = [next(batches)[0] for _ in range(12)]
    batches.close()
    decoded = log.read_text().split()
    assert epochs == [number // 2 for number in range(12)] and sorted(decoded) == paths


@pytest.mark.parametrize(
    ("accumulate", "validated"), [(6, [4, 7]), (2, [6, 7]), (1, [6, 7])], ids=["of 1", "of 3", "of 6"]
)
def test_short_epochs_are_not_validated_one_by_one(tmp_path, monkeypatch, accumulate, validated):
    monkeypatch.setattr(loop, "BETWEEN_VALIDATIONS", 4)
    out = tiny.train("vqgan", tmp_path / "run", steps=7, accumulate=accumulate, validate_every=None)
    assert [line["step"] for line in run_directory.read_metrics(out, "validation")] == validated
