"""Which images each step of each process sees."""

from __future__ import annotations

import tiny
import torch

from tamingfast.data.base import as_epoch_dataset
from tamingfast.training import distributed, feed, settings


def test_each_epoch_sees_each_image_once_and_ranks_share_them():
    made, data = settings.Training(steps=1, batch_size=2, accumulate=2), as_epoch_dataset(tiny.Noise(17))

    def paths(rank, size, start, steps):
        batches = feed.step_batches(data, made, distributed.World(rank, size, torch.device("cpu")), start)
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
