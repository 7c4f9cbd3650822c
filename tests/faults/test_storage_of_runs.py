"""A run whose storage fails or is taken away stops in one sentence; its last checkpoint and metrics fit together."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
import tiny
import torch
from forked import Forked

from tamingfast import UserError, cli
from tamingfast.checkpoints import run_directory
from tamingfast.data import loading
from tamingfast.training import loop


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of twelve steps that nothing disturbed."""
    return tiny.train("vqgan", tmp_path_factory.mktemp("whole") / "run", steps=12)


def test_a_full_disk(tmp_path):
    """By a limit on the size of files, which the system reports as it does a full disk."""
    config, out, unbroken = runs.config_file(tmp_path), tmp_path / "run", tmp_path / "unbroken"
    words = runs.begin(config, out, "training.steps=12")

    def fails(words: list[object], largest: int, name: str) -> None:
        code, error = Forked(*words, largest=largest).outcome()
        assert code == 2, error
        assert f"{out / name}: got '" in error and len(error.splitlines()) == 1
        assert not runs.leftovers(out)

    fails(words, 500, "config.yaml")
    fails(words, 150_000, "state.pt")
    assert Forked(*words, kill=("state.pt", 1, "after")).outcome().code == -9
    before = (out / run_directory.STATE).read_bytes()
    fails(runs.resume(out), run_directory.progress(out)["metrics_bytes"] + 20, "metrics.jsonl")
    fails(runs.resume(out), len(before) - 1, "state.pt")
    assert (out / run_directory.STATE).read_bytes() == before
    assert len(run_directory.read_metrics(out)) >= 3
    assert Forked(*runs.resume(out)).outcome().code == 0
    assert Forked(*runs.begin(config, unbroken, "training.steps=12")).outcome().code == 0
    runs.same_run(out, unbroken)


def disturbed(monkeypatch, step: int, action) -> None:
    """Do ``action`` after ``step`` steps."""
    advance = loop._Run.advance

    def then(self, batches):
        advance(self, batches)
        if self.step == step:
            action()

    monkeypatch.setattr(loop._Run, "advance", then)


@pytest.mark.parametrize("log_every", [1, 100])
def test_the_directory_is_moved(tmp_path, whole, monkeypatch, log_every):
    out, moved = tmp_path / "run", tmp_path / "moved"
    with monkeypatch.context() as patch:
        disturbed(patch, 7, lambda: out.rename(moved))
        with pytest.raises(UserError, match=r"run/metrics.jsonl: got a file or directory that was moved or removed"):
            tiny.train("vqgan", out, steps=12, log_every=log_every, image_every=8)
    assert not out.exists()
    assert run_directory.progress(moved)["step"] == 6
    tiny.train("vqgan", moved, resume=True, steps=12, log_every=1)
    if log_every == 1:
        runs.same_run(moved, whole)


@pytest.mark.parametrize("also", ["nothing", "a new directory", "the metrics alone"])
def test_the_directory_is_removed(tmp_path, monkeypatch, also):
    out = tmp_path / "run"

    def remove():
        if also == "the metrics alone":
            os.remove(out / run_directory.METRICS)
            return
        shutil.rmtree(out)
        if also == "a new directory":
            out.mkdir()

    disturbed(monkeypatch, 4, remove)
    with pytest.raises(UserError, match="that was moved or removed during the training"):
        tiny.train("vqgan", out, steps=12)
    assert out.exists() == (also != "nothing")


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors", "images"])
def test_a_file_can_no_longer_be_written(tmp_path, whole, monkeypatch, name):
    out = tmp_path / "run"

    def occupy():
        (out / name).unlink(missing_ok=True)
        (out / name).write_text("") if name == "images" else (out / name).mkdir()

    with monkeypatch.context() as patch:
        disturbed(patch, 4, occupy)
        with pytest.raises(UserError, match=rf"{name}[^ ]*: got "):
            tiny.train("vqgan", out, steps=12, image_every=5)
    assert not runs.leftovers(out)
    with pytest.raises(UserError, match=rf"{name}: got "):
        tiny.train("vqgan", out, resume=True, steps=12)


def test_a_read_only_file_system(tmp_path, whole, monkeypatch):
    out = tmp_path / "run"

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        disturbed(patch, 4, lambda: patch.setattr("tempfile.mkstemp", refuse))
        with pytest.raises(UserError, match=r"state.pt: got 'Read-only file system'"):
            tiny.train("vqgan", out, steps=12)
    tiny.train("vqgan", out, resume=True, steps=12)
    runs.same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_asked_twice_to_stop_while_it_saves(tmp_path, whole, monkeypatch, number):
    """The second signal ends the process at once, and the last checkpoint stays."""
    out, save, calls = tmp_path / "run", torch.save, []

    def asked(state, path):
        calls.append(path)
        save(state, path)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # beyond the time in which signals count as one
            os.kill(os.getpid(), number)
            time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", asked)
        process = multiprocessing.get_context("fork").Process(
            target=tiny.train, args=("vqgan", out), kwargs={"steps": 12}
        )
        process.start()
        process.join()
    assert process.exitcode == cli.INTERRUPTED
    assert run_directory.progress(out)["step"] == 3
    tiny.train("vqgan", out, resume=True, steps=12)
    runs.same_run(out, whole)
    assert not runs.leftovers(out)


@pytest.mark.parametrize("error", [ConnectionResetError("Connection reset by peer"), EOFError("")], ids=repr)
@pytest.mark.parametrize("own", [False, True])
def test_a_connection_to_a_loader_process_that_breaks(monkeypatch, error, own):
    """Before torch notices its end; a data set's own error is its own."""
    if own:
        error = type(error)(f"Caught {type(error).__name__} in DataLoader worker process 0.\n{error}")

    class Broken:
        def __init__(self, *args, **options):
            pass

        def __iter__(self):
            raise error

    monkeypatch.setattr(loading, "DataLoader", Broken)
    with pytest.raises(
        type(error) if own else UserError, match="Caught" if own else "^training.workers: got a process"
    ):
        next(loading.read([{"image": 0}], [], workers=1))


def test_a_killed_loader_process(tmp_path, whole, monkeypatch, capsys):
    config, out, unbroken = runs.config_file(tmp_path), tmp_path / "run", tmp_path / "unbroken"
    kill = tmp_path / "kill"

    def read(self, number, batch=None):
        if kill.exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, number)

    from tamingfast.data.loading import _Batches

    original = _Batches.__getitem__
    words = ["training.steps=12", "training.workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(_Batches, "__getitem__", read)
        disturbed(patch, 4, kill.touch)
        assert cli.main(list(map(str, runs.begin(config, out, *words)))) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert "training.workers: got " in said and "Traceback" not in said
    assert run_directory.progress(out)["step"] == 3
    assert cli.main(list(map(str, runs.resume(out)))) == 0
    assert cli.main(list(map(str, runs.begin(config, unbroken, *words)))) == 0
    runs.same_run(out, unbroken)
