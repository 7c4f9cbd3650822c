"""Two commands in one run directory: the second is refused in one sentence, and changes nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import runs
from forked import Forked

from tamingfast import cli
from tamingfast.checkpoints import run_directory


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return runs.config_file(tmp_path_factory.mktemp("config"))


def command(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def holder(config, tmp_path):
    """A run without end in ``tmp_path / "run"``, stopped in the middle of it; with two loader processes."""
    process = Forked(*runs.begin(config, tmp_path / "run", "training.steps=100000", "training.workers=2"))
    process.wait_until((tmp_path / "run" / run_directory.WEIGHTS).exists)
    process.kill(signal.SIGSTOP)
    yield process
    if process.running():
        process.kill()


def test_the_second_is_refused(holder, config, tmp_path, capsys):
    out = tmp_path / "run"
    before = runs.contents(out)
    for words in (runs.resume(out), runs.resume(out, "training.steps=7"), runs.begin(config, out)):
        assert command(*words) == cli.USAGE_ERROR
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1 and str(out) in said and "Traceback" not in said
    assert "got one that another process is writing" in refusal_of(runs.resume(out), capsys)
    (out / run_directory.STATE).rename(tmp_path / "state.pt")  # as before the first checkpoint
    (out / run_directory.WEIGHTS).rename(tmp_path / "weights")
    assert "got one that another process is writing" in refusal_of(runs.begin(config, out), capsys)
    (tmp_path / "state.pt").rename(out / run_directory.STATE)
    (tmp_path / "weights").rename(out / run_directory.WEIGHTS)
    assert runs.contents(out) == before


def refusal_of(words: list[object], capsys) -> str:
    assert command(*words) == cli.USAGE_ERROR
    return capsys.readouterr().err


def test_readers_are_not_kept_out(holder, tmp_path, capsys):
    out = tmp_path / "run"
    before = runs.contents(out)
    assert command("inspect", out, "--json") == 0
    assert f'"global_step": {run_directory.exported(out)}' in capsys.readouterr().out
    assert run_directory.read_metrics(out)
    assert runs.contents(out) == before


def test_a_killed_process_leaves_it_free_at_once(holder, tmp_path):
    """Also while its loader processes, which inherited its files, still notice its end."""
    out = tmp_path / "run"
    holder.kill()
    assert holder.outcome().code == -9
    reached = run_directory.progress(out)["step"]
    assert command(*runs.resume(out, f"training.steps={reached}")) == 0


def test_of_two_that_begin_at_once_one_goes_on(config, tmp_path):
    out = tmp_path / "run"
    both = [Forked(*runs.begin(config, out)) for _ in range(2)]
    outcomes = sorted(process.outcome() for process in both)
    assert [each.code for each in outcomes] == [0, 2]
    assert "Traceback" not in outcomes[1].error and str(out) in outcomes[1].error
    assert command(*runs.begin(config, tmp_path / "alone")) == 0
    runs.same_run(out, tmp_path / "alone")


def test_reading_leaves_no_lock(config, tmp_path):
    out = tmp_path / "run"
    assert command(*runs.begin(config, out, "training.steps=1")) == 0
    assert command("inspect", out, "--json") == 0
    run_directory.progress(out)
    assert not (out / run_directory.LOCK).exists()
