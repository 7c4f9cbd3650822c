"""kill -9 at any moment of a run: resumed, it equals a run that was never interrupted, and nothing is left over."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import runs
from forked import Forked

from tamingfast.checkpoints import run_directory

STEPS = "training.steps=14"
IMAGES = "training.image_every=4"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return runs.config_file(tmp_path_factory.mktemp("config"), disc_start=4)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert Forked(*runs.begin(config, out, STEPS, IMAGES)).outcome().code == 0
    return out


def continued(out: Path, config: Path) -> list[object]:
    """The command that continues the run, or begins it if the kill came before anything was written."""
    return runs.resume(out, STEPS) if run_directory.begun(out) else runs.begin(config, out, STEPS, IMAGES)


def check_whole(out: Path, unbroken: Path) -> None:
    runs.same_run(out, unbroken)
    assert not runs.leftovers(out)
    assert runs.contents(out / run_directory.IMAGES) == runs.contents(unbroken / run_directory.IMAGES)


KILLS = [
    pytest.param(name, number, moment, id=f"{name}-{number}-{moment}", marks=[] if fast else pytest.mark.exhaustive)
    for name, number, fast_moments in (
        ("config.yaml", 1, ["half"]), ("state.pt", 1, ["before"]), ("state.pt", 3, ["half", "after"]),
        ("weights.safetensors", 2, ["half"]), ("weights.safetensors", 5, ["before"]), ("00000008.png", 1, ["half"]),
    )
    for moment in ("half", "before", "after")
    for fast in [moment in fast_moments]
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "moment"), KILLS)
def test_while_a_file_is_written(name, number, moment, config, unbroken, tmp_path):
    out = tmp_path / "run"
    killed = Forked(*runs.begin(config, out, STEPS, IMAGES), kill=(name, number, moment)).outcome()
    assert killed.code == -9, killed.error
    assert len(runs.leftovers(out)) == (moment != "after")
    resumed = Forked(*continued(out, config)).outcome()
    assert resumed.code == 0, resumed.error
    check_whole(out, unbroken)


@pytest.mark.parametrize("kills", [pytest.param(5, id="5"), pytest.param(40, id="40", marks=pytest.mark.exhaustive)])
def test_at_random_times(kills, config, tmp_path):
    random.seed(kills)
    steps = f"training.steps={10 * kills}"
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert Forked(*runs.begin(config, whole, steps)).outcome().code == 0
    for _ in range(kills):
        words = runs.resume(out, steps) if run_directory.begun(out) else runs.begin(config, out, steps)
        process = Forked(*words)
        process.wait_until(lambda p=process: (out / run_directory.LOCK).exists() or not p.running())
        time.sleep(random.uniform(0.0, 1.0))
        process.kill()
        assert process.outcome().code in (-9, 0)
    assert Forked(*runs.resume(out, steps)).outcome().code == 0
    runs.same_run(out, whole)
    assert not runs.leftovers(out)
