"""A run that is interrupted in any way and then resumed equals a run that was never interrupted."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import tiny
import torch
from runs import same_run
from tamingfast.kernels import choices

from tamingfast import UserError, cli, load_model
from tamingfast.checkpoints import run_directory
from tamingfast.errors import Stopped
from tamingfast.training import loop, vqgan

STAGES = ("vqgan", "prior")
GUMBEL_SCHEDULE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 0, "max_decay_steps": 4, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 1e-3},
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(first_stage, tmp_path_factory) -> Callable[..., Path]:
    """unbroken(stage, **training): the run that was never interrupted, trained once for each stage and settings."""

    @functools.cache
    def run(stage: str, **training: int) -> Path:
        return tiny.train(stage, tmp_path_factory.mktemp("unbroken") / "run", first_stage, **training)

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_mid_epoch(stage, first_stage, unbroken, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, tiny.__file__, stage, out, first_stage if stage == "prior" else "-", "100000"]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        deadline = time.monotonic() + 100
        metrics = out / run_directory.METRICS
        while not (run_directory.exists(out) and metrics.read_bytes().count(b'"train"') >= 7):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with open(metrics, "a") as stream:
        stream.write('{"step": 100, "epoch": 9, "split": "train", "lo')  # what a kill in mid-line leaves
    reached = run_directory.progress(out)
    assert reached["step"] % 5 == 0 and reached["batch"] == reached["step"] % 6

    settings = {"steps": reached["step"] + 4, "checkpoint_every": 5}
    tiny.train(stage, out, first_stage, resume=True, **settings)
    same_run(out, unbroken(stage, **settings))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_asked_to_stop(stage, number, first_stage, unbroken, tmp_path, monkeypatch):
    def asked(self, index, read=tiny.Noise.__getitem__):
        # The fifth image of the second epoch, in its third step.
        if self.epoch == 1 and not self.seed:
            self.reads = getattr(self, "reads", 0) + 1
            if self.reads == 5:
                os.kill(os.getpid(), number)
        return read(self, index)

    out, before = tmp_path / "stopped", signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.Noise, "__getitem__", asked)
        with pytest.raises(Stopped, match=rf"after step 9 \({number.name}\).*--resume"):
            tiny.train(stage, out, first_stage, steps=11)
    assert signal.getsignal(number) == before
    assert run_directory.progress(out)["step"] == 9
    tiny.train(stage, out, first_stage, resume=True, steps=11)
    same_run(out, unbroken(stage, steps=11))


def test_killed_between_the_two_files(unbroken, tmp_path, monkeypatch):
    out, save, calls = tmp_path / "killed", run_directory.save_weights, []

    def dies_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "save_weights", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            tiny.train("vqgan", out, steps=9)
    assert run_directory.progress(out)["step"] == 6
    load_model(out)  # the export of step 3 is older, and whole
    tiny.train("vqgan", out, resume=True, steps=9)
    same_run(out, unbroken("vqgan", steps=9))


def test_killed_before_the_first_checkpoint(unbroken, tmp_path, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            tiny.train("vqgan", out, steps=4)
    tiny.train("vqgan", out, resume=True, steps=4)
    same_run(out, unbroken("vqgan", steps=4))


def test_a_resumed_run_takes_the_configurations_of_kernels_with_which_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "_table", {"kernel a": 2, "kernel b": 1})
    out = tiny.train("vqgan", tmp_path / "run", steps=3)
    monkeypatch.setattr(choices, "_table", {"kernel b": 0, "kernel c": 3})  # as another process chose before it resumed
    tiny.train("vqgan", out, resume=True, steps=4)
    assert choices.made() == {"kernel a": 2, "kernel b": 1, "kernel c": 3}
    assert run_directory.progress(out)["launches"] == [choices.made()]


def test_a_state_from_before_configurations_were_recorded_resumes(unbroken, tmp_path):
    out = tiny.train("vqgan", tmp_path / "run", steps=3)
    path = out / run_directory.STATE
    state = torch.load(path)
    del state["progress"]["launches"]
    torch.save(state, path)
    tiny.train("vqgan", out, resume=True, steps=6)
    same_run(out, unbroken("vqgan", steps=6))


def test_a_finished_run_continues_with_more_steps(unbroken, tmp_path):
    out = tiny.train("vqgan", tmp_path / "run", steps=5, accumulate=2)
    assert run_directory.read_metrics(out)[-1]["split"] == "validation"  # of the end, not of an epoch's end
    finished = (out / run_directory.METRICS).read_text()
    tiny.train("vqgan", out, resume=True, steps=5, accumulate=2)
    assert (out / run_directory.METRICS).read_text() == finished
    tiny.train("vqgan", out, resume=True, steps=8, accumulate=2)
    same_run(out, unbroken("vqgan", steps=8, accumulate=2))


@pytest.mark.parametrize("disc_start", [0, 3, 100])
def test_resuming_a_finished_run_changes_nothing(tmp_path, disc_start):
    config, out = runs.config_file(tmp_path, disc_start=disc_start), tmp_path / "run"
    words = ["training.steps=5", "training.image_every=3", "training.validate_every=4"]
    assert cli.main(list(map(str, runs.begin(config, out, *words)))) == 0
    before, times = runs.contents(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert before["metrics.jsonl"].count(b'"validation"') == 2 and "images/00000005.png" in before
    assert cli.main(list(map(str, runs.resume(out)))) == 0
    assert runs.contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    # Killed before its last validation: that comes out the same, and so does what a cut line stands for.
    whole = before["metrics.jsonl"].splitlines(keepends=True)
    for left in (b"", whole[-1][:20]):
        (out / "metrics.jsonl").write_bytes(b"".join(whole[:-1]) + left)
        (out / "images" / "00000005.png").unlink()
        assert cli.main(list(map(str, runs.resume(out)))) == 0
        assert runs.contents(out) == before


def test_a_finished_gumbel_run_validates_at_its_temperature(tmp_path):
    config = tiny.config(tiny.VQGAN, {"temperature_scheduler_config": GUMBEL_SCHEDULE}) | {"data": tiny.CROPS}
    config["model"]["target"] = "taming.models.vqgan.GumbelVQ"
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    out = tmp_path / "run"
    assert cli.main(list(map(str, runs.begin(tmp_path / "config.yaml", out, "training.steps=3")))) == 0
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert cli.main(list(map(str, runs.resume(out)))) == 0
    assert (out / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("damage", ["missing", "old", "cut"])
def test_an_export_that_was_not_finished_is_written_again(unbroken, tmp_path, damage):
    out = tiny.train("vqgan", tmp_path / "run", steps=3)
    old = (out / run_directory.WEIGHTS).read_bytes()
    tiny.train("vqgan", out, resume=True, steps=6)
    new = (out / run_directory.WEIGHTS).read_bytes()
    (out / run_directory.WEIGHTS).write_bytes({"missing": b"", "old": old, "cut": new[:-10]}[damage])
    if damage == "missing":
        (out / run_directory.WEIGHTS).unlink()
    tiny.train("vqgan", out, resume=True, steps=6)
    assert run_directory.exported(out) == 6
    same_run(out, unbroken("vqgan", steps=6))


def test_worker_processes_change_nothing(unbroken, tmp_path):
    same_run(unbroken("vqgan", steps=4), tiny.train("vqgan", tmp_path / "two", steps=4, workers=2))


def test_another_seed_is_another_run(tmp_path):
    one, two = tiny.train("vqgan", tmp_path / "one", steps=1), tiny.train("vqgan", tmp_path / "two", steps=1, seed=1)
    assert (one / run_directory.METRICS).read_text() != (two / run_directory.METRICS).read_text()


def test_time_budget_counts_over_interruptions(tmp_path):
    out = tiny.train("vqgan", tmp_path / "run", steps=None, seconds=0.3)
    reached = run_directory.progress(out)
    assert reached["seconds"] >= 0.3 and reached["step"] >= 1
    tiny.train("vqgan", out, resume=True, steps=None, seconds=0.3)
    assert run_directory.progress(out)["step"] == reached["step"]


def test_what_cannot_be_resumed(tmp_path):
    out = tiny.train("vqgan", tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="already holds a training run, .* continue the run with --resume"):
        tiny.train("vqgan", out)
    with pytest.raises(UserError, match="got no run in this directory"):
        tiny.train("vqgan", tmp_path / "nowhere", resume=True)
    with pytest.raises(UserError, match="training.batch_size: got 1, expected 2, with which the run in .* began"):
        tiny.train("vqgan", out, resume=True, batch_size=1)
    changed = tiny.config(tiny.VQGAN, {"n_embed": 32})
    with pytest.raises(UserError, match="model.params.n_embed: got 32, expected 16"):
        vqgan.train(changed, out, True, "cpu", tiny.datasets())
    with pytest.raises(UserError, match="got 12 training images, expected 13"):
        vqgan.train(tiny.config(tiny.VQGAN), out, True, "cpu", (tiny.Noise(12), None))


def test_a_schedule_of_rates_survives_an_interruption(tmp_path, monkeypatch):
    settings = {"warmup_steps": 2, "decay_steps": 6}
    seen = []
    original = loop._Run.move

    def noted(self, batches):
        seen.append(self.stage.optimizers[0].param_groups[0]["lr"] / self.rates[0])
        return original(self, batches)

    monkeypatch.setattr(loop._Run, "move", noted)
    whole_run = tiny.train("vqgan", tmp_path / "whole", steps=6, **settings)
    whole, seen[:] = list(seen), []
    parts = tiny.train("vqgan", tmp_path / "parts", steps=4, **settings)
    tiny.train("vqgan", parts, resume=True, steps=6, **settings)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert whole == pytest.approx([0.5 * cosine[0], *cosine[1:]])
    assert seen == whole
    same_run(whole_run, parts)


def command(stage: str, *words: object) -> int:
    return cli.main(["train", stage, *map(str, words), "--device", "cpu"])


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of two steps and its config, which says six."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "config.yaml").write_text(json.dumps(tiny.VQGAN))
    words = ("--out", folder / "run", "training.steps=2", "data.length=20")
    assert command("vqgan", folder / "config.yaml", *words) == 0
    return folder


class TestCommand:
    """`--resume` takes the run's own settings; what is given beside it wins."""

    @pytest.fixture
    def begun(self, two_steps, tmp_path) -> tuple[Path, Path]:
        """The run and the config, the test's own."""
        shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
        return tmp_path / "run", tmp_path / "config.yaml"

    def test_without_a_config(self, begun, tmp_path):
        out, config = begun
        assert command("vqgan", "--resume", "--out", out) == 0
        assert run_directory.progress(out)["step"] == 2
        assert command("vqgan", "--resume", "--out", out, "training.steps=3") == 0
        unbroken = tmp_path / "unbroken"
        assert command("vqgan", config, "--out", unbroken, "training.steps=3", "data.length=20") == 0
        states = [torch.load(run / run_directory.STATE, weights_only=True)["model"] for run in (out, unbroken)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_of_a_prior_needs_no_first_stage(self, begun, tmp_path, capsys):
        config, out = tmp_path / "prior.yaml", tmp_path / "prior"
        config.write_text(json.dumps(tiny.PRIOR))
        words = ["training.steps=2", "prior.condition=none"]
        assert command("prior", config, "--first-stage", begun[0], "--out", out, *words) == 0
        assert command("prior", "--resume", "--out", out, "training.steps=3") == 0
        assert run_directory.progress(out)["step"] == 3
        again = [config, "--first-stage", begun[0], "--resume", "--out", out, "prior.condition=none"]
        assert command("prior", *again, "training.steps=4") == 0
        assert run_directory.progress(out)["step"] == 4
        assert command("prior", "--resume", "--out", out, "prior.condition=class") == cli.USAGE_ERROR
        assert "prior: got settings for a run that has begun" in capsys.readouterr().err

    def test_a_named_config_leaves_the_length_of_the_run(self, begun, caplog):
        out, config = begun
        with caplog.at_level(logging.WARNING):
            assert command("vqgan", config, "--resume", "--out", out, "data.length=20") == 0
        assert run_directory.progress(out)["step"] == 2
        assert "its training.steps=2 instead of training.steps=6" in caplog.text

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--resume", "--out", "RUN", "training.batch_size=3"], "training.batch_size: got 3, expected 2"),
            (["CONFIG", "--resume", "--out", "RUN"], "data.length: got None, expected 20"),
            (["--resume", "--out", "nowhere"], "got no run in this directory"),
            (["--out", "nowhere", "training.steps=3"], "CONFIG: got none"),
        ],
    )
    def test_mistakes(self, begun, capsys, words, said):
        given = {"RUN": begun[0], "CONFIG": begun[1]}
        assert command("vqgan", *(given.get(word, word) for word in words)) == cli.USAGE_ERROR
        error = capsys.readouterr().err.strip()
        assert said in error and len(error.splitlines()) == 1
