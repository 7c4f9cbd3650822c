"""Both stages on archives of images: resumed runs, reading processes, ranks."""

from __future__ import annotations

import archives
import pytest
import tiny
import torch
from runs import same_run

from tamingfast import ranks
from tamingfast.data import build, shards
from tamingfast.training import feed, prior, settings, vqgan


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MIXED", 8)
    archives.shards(tmp_path / "shards", 4, 6, size=8)
    path = f"{tmp_path}/shards/train-{{000..003}}.tar"
    return {"name": "shards", "path": path, "size": 8, "validation_fraction": 0.1}


def test_resumed_runs_equal_unbroken_ones(data, tmp_path, monkeypatch):
    def first_stage(out, steps, resume=False, **training):
        config = tiny.config(tiny.VQGAN, steps=steps, batch_size=2, **training) | {"data": data}
        return vqgan.train(config, out, resume, "cpu")

    def second_stage(out, steps, resume=False):
        config = tiny.config(tiny.PRIOR, steps=steps, batch_size=2) | {"data": data, "prior": {"condition": "class"}}
        return prior.train(config, tmp_path / "whole", out, resume, "cpu")

    first_stage(tmp_path / "whole", 14)
    first_stage(tmp_path / "parts", 5, workers=2)
    monkeypatch.setattr(shards, "parts_of", lambda *_: pytest.fail("the headers were read again"))
    same_run(first_stage(tmp_path / "parts", 14, True, workers=2), tmp_path / "whole")
    monkeypatch.undo()
    monkeypatch.setattr(shards, "MIXED", 8)
    second_stage(tmp_path / "prior", 14)
    second_stage(tmp_path / "prior_parts", 5)
    same_run(second_stage(tmp_path / "prior_parts", 14, True), tmp_path / "prior")


def test_each_image_is_read_by_one_process(data):
    train, _ = build(data)
    made = settings.Training(steps=1, batch_size=2, workers=2)

    def seen(rank, size, start, steps):
        batches = feed.step_batches(train, made, ranks.World(rank, size, torch.device("cpu")), start)
        found = [[path for batch in next(batches)[1] for path in batch["file_path_"]] for _ in range(steps)]
        batches.close()
        return found

    steps = feed.epoch_steps(train, made, 2)
    both = [seen(rank, 2, 0, steps) for rank in range(2)]
    read = [path for rank in both for step in rank for path in step]
    assert len(read) == len(set(read)) == 4 * steps
    assert seen(1, 2, 2, 2) == both[1][2:4]  # from the middle of an archive
