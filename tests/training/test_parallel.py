"""Several processes train the model that one process trains with the same images, and go on in another number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import shared_runs
import shared_steps
import torch
from forked import on_ranks

from tamingfast import load_model
from tamingfast.checkpoints import run_directory

#: Relative difference of losses that rounding may cause in 40 steps.
NEAR = 1e-5


def same_losses(one: Path, other: Path, *splits: str) -> None:
    """Assert that two runs recorded the same losses in every step, up to rounding."""
    for split in splits:
        left, right = shared_runs.values(one, split), shared_runs.values(other, split)
        assert [line["step"] for line in left] == [line["step"] for line in right]
        for a, b in zip(left, right, strict=True):
            name = "loss" if split == "train" else "nll"
            assert math.isclose(a[name], b[name], rel_tol=NEAR), (split, a, b)
    assert len(shared_runs.values(one)) == shared_runs.STEPS


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage."""
    folder = tmp_path_factory.mktemp("first")
    config = shared_runs.vqgan_config(folder, steps=2)
    shared_runs.run(1, "train", "vqgan", config, "--out", folder / "run")
    return folder / "run"


def train(folder: Path, first: Path, processes: int, **training: Any) -> Path:
    """The run of a prior on the first stage ``first``, in ``folder``."""
    config = shared_runs.prior_config(folder, **training)
    shared_runs.run(processes, "train", "prior", config, "--first-stage", first, "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def alone(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with steps of six batches of two images."""
    return train(tmp_path_factory.mktemp("alone"), first, 1, accumulate=6)


class TestPriors:
    @pytest.mark.parametrize(
        ("processes", "parallel"),
        [
            (2, "ddp"),
            (3, "fsdp"),
            pytest.param(3, "ddp", marks=pytest.mark.exhaustive),
            pytest.param(2, "fsdp", marks=pytest.mark.exhaustive),
        ],
    )
    def test_several_processes_equal_one(self, alone, first, tmp_path, parallel, processes):
        out = train(tmp_path, first, processes, accumulate=6 // processes, parallel=parallel)
        same_losses(out, alone, "train", "validation")
        one, other = (load_model(path).state_dict() for path in (alone, out))
        for name, value in one.items():
            if name.endswith("key.bias"):
                continue  # attention does not depend on it: Adam makes steps of the rounding of its gradient
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)

    def test_larger_batches_equal_more_of_them(self, first, tmp_path):
        outs = []
        for processes, batch_size in ((1, 12), (2, 6)):
            folder = tmp_path / str(processes)
            folder.mkdir()
            outs.append(train(folder, first, processes, noise=False, batch_size=batch_size))
        same_losses(*outs, "train")  # validations take as many batches, so other images

    @pytest.mark.parametrize(("before", "after"), [(("fsdp", 3), ("ddp", 1)), (("ddp", 2), ("fsdp", 3))])
    def test_a_run_goes_on_in_another_number_of_processes(self, alone, first, tmp_path, before, after):
        (parallel, count), (then, number) = before, after
        out = train(tmp_path, first, count, steps=20, accumulate=6 // count, parallel=parallel)
        assert run_directory.progress(out)["processes"] == count
        words = ("train", "prior", "--resume", "--first-stage", first, "--out", out)
        shared_runs.run(number, *words, "training.steps=40", f"training.parallel={then}")
        same_losses(out, alone, "train", "validation")

    def test_a_number_that_does_not_divide_a_step_is_refused(self, first, tmp_path):
        out = train(tmp_path, first, 2, steps=1, batch_size=1)
        with pytest.raises(AssertionError, match="WORLD_SIZE: got 3 processes, expected a number that divides the 2"):
            shared_runs.run(3, "train", "prior", "--resume", "--first-stage", first, "--out", out, "training.steps=2")


@pytest.mark.parametrize(
    ("processes", "kind"), [(2, shared_steps.act_norm), (3, shared_steps.batch_norm)], ids=["act norm", "batch norm"]
)
def test_several_processes_train_the_first_stage_of_one(processes, kind):
    # In float64, as a GAN's steps amplify rounding: what differs by more would be another model.
    alone = kind(0)
    for found in on_ranks(processes, kind):
        for number, (values, expected) in enumerate(zip(found, alone, strict=True)):
            for name in ("aeloss", "discloss", "rec_loss", "d_weight", "g_loss", "logits_fake"):
                assert math.isclose(values[name], expected[name], rel_tol=NEAR, abs_tol=NEAR), (number, name)
    assert alone[-1]["quant_loss"] < 0.5 * alone[0]["quant_loss"]


def test_a_first_stage_is_not_held_in_parts(tmp_path):
    config = shared_runs.vqgan_config(tmp_path, parallel="fsdp")
    with pytest.raises(AssertionError, match=r"training\.parallel: got fsdp for a first stage, expected ddp"):
        shared_runs.run(1, "train", "vqgan", config, "--out", tmp_path / "run")
