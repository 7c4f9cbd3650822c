"""What is read from a run directory is whole and belongs to the run; all else is refused before anything is written."""

from __future__ import annotations

import io
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

from tamingfast import UserError, cli
from tamingfast.checkpoints import run_directory
from tamingfast.data import build
from tamingfast.models.vqgan import VQModel
from tamingfast.training.colors import fit_color_clusters


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of two steps, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    assert cli.main(list(map(str, runs.begin(runs.config_file(folder), folder / "run", "training.steps=2")))) == 0
    return folder / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def fresh() -> tuple[VQModel, list[torch.optim.Optimizer]]:
    """The model of the run with other weights, and its optimizers."""
    model = tiny.build(tiny.VQGAN)
    model.learning_rate = 0.5
    return model, model.configure_optimizers()[0]


def refused(out: Path, capsys, *words: str) -> str:
    """What `--resume` says to standard error when it refuses the run and changes nothing."""
    before = runs.contents(out)
    assert cli.main(list(map(str, runs.resume(out, "training.steps=3", *words)))) == cli.USAGE_ERROR
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "Traceback" not in said
    assert runs.contents(out) == before
    return said


def test_a_flipped_bit_in_any_record_of_a_state_is_noticed(run):
    path = run / run_directory.STATE
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    assert len(records) > 100
    model = fresh()
    for name, content in list(records.items())[::7]:
        start = whole.index(content, whole.index(name.encode()))
        flipped = bytearray(whole)
        flipped[start + len(content) // 2] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"state.pt: got .*damage"):
            run_directory.restore(run, *model)


def test_a_state_without_checksums_opens(run):
    path = run / run_directory.STATE
    state = torch.load(path, weights_only=True)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert run_directory.progress(run) == state["progress"]


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        state = torch.load(io.BytesIO(content), weights_only=True)
        change(state)
        stream = io.BytesIO()
        torch.save(state, stream)
        return stream.getvalue()

    return edit


def compressed(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        for name in archive.namelist():
            made.writestr(name, archive.read(name))
    return stream.getvalue()


def first_moments(state: dict[str, Any]) -> dict[str, Any]:
    return state["optimizers"][0]["state"][0]


EDITS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "state.pt: got "),
    "cut": (lambda content: content[: len(content) // 2], "state.pt: got "),
    "without its end": (lambda content: content[:-1], "state.pt: got "),
    "text": (lambda content: b"not a checkpoint", "state.pt: got "),
    "compressed": (compressed, "state.pt: got "),
    "another format": (edited(lambda state: state.update(format=2)), "got format 2, expected format 1"),
    "no format": (edited(lambda state: state.pop("format")), "state.pt: got no state of a run"),
    "no progress": (edited(lambda state: state.pop("progress")), "state.pt: got "),
    "progress is a list": (edited(lambda state: state.update(progress=[1])), "state.pt: got None for 'step'"),
    "a step of text": (edited(lambda state: state["progress"].update(step="2")), "state.pt: got '2' for 'step'"),
    "a step below 0": (edited(lambda state: state["progress"].update(step=-1)), "state.pt: got -1 for 'step'"),
    "nan seconds": (edited(lambda state: state["progress"].update(seconds=float("nan"))), "got nan for 'seconds'"),
    "no model": (edited(lambda state: state.pop("model")), "state.pt: got no tensors under 'model'"),
    "a model of numbers": (edited(lambda state: state.update(model={"a": 1})), "got no tensors under 'model'"),
    "a part of the model": (
        edited(lambda state: state["model"].pop("encoder.conv_in.weight")), "state.pt: got no 'encoder.conv_in.weight'",
    ),
    "no optimizers": (edited(lambda state: state.pop("optimizers")), "got optimizers that do not fit this model"),
    "one optimizer": (edited(lambda state: state["optimizers"].pop()), "got optimizers that do not fit this model"),
    "optimizers of numbers": (edited(lambda state: state.update(optimizers=[1, 2])), "got optimizers that do not fit"),
    "swapped optimizers": (edited(lambda state: state["optimizers"].reverse()), "got optimizers that do not fit"),
    "moments of another shape": (
        edited(lambda state: first_moments(state).update(exp_avg=torch.zeros(3, 3))), "exp_avg: got the shape (3, 3)",
    ),
    "moments of no parameter": (
        edited(lambda state: state["optimizers"][0]["state"].update({999: first_moments(state)})), "got optimizers",
    ),
    "other data": (edited(lambda state: state["progress"].update(images=7)), "training images, expected 7, with"),
    "no processes": (edited(lambda state: state["progress"].update(processes=0)), "got 0 for 'processes'"),
    "launches of text": (edited(lambda state: state["progress"].update(launches="a")), "got no tables for 'launches'"),
    "launches by text": (
        edited(lambda state: state["progress"].update(launches=[{"kernel": "1"}])), "got no tables for 'launches'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edited_states_are_refused(run, capsys, name):
    change, said = EDITS[name]
    path = run / run_directory.STATE
    path.write_bytes(change(path.read_bytes()))
    assert said in refused(run, capsys)


def test_weights_without_a_state_are_not_trained_over(run, capsys):
    (run / run_directory.STATE).unlink()
    assert "state.pt: got no file beside weights.safetensors" in refused(run, capsys)
    words = runs.begin(run / "config.yaml", run)
    assert cli.main(list(map(str, words))) == cli.USAGE_ERROR
    assert "state.pt: got no file beside weights.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_regular_file_is_refused(run, capsys, name, kind):
    (run / name).unlink()
    (run / name).mkdir() if kind == "directory" else os.mkfifo(run / name)
    assert f"{name}: got " in refused(run, capsys)


def test_a_place_that_cannot_be_a_run_directory(made, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert cli.main(list(map(str, runs.begin(made / "config.yaml", out)))) == cli.USAGE_ERROR
        said = capsys.readouterr().err
        assert str(out) in said and len(said.splitlines()) == 1


def test_images_need_a_directory(run, capsys):
    (run / "images").write_text("")
    assert "images: got 'Not a directory'" in refused(run, capsys, "training.image_every=1")


def test_learning_rate_of_the_config_counts(run):
    state = torch.load(run / run_directory.STATE, weights_only=True)
    state["optimizers"][0]["param_groups"][0]["lr"] = 1e9
    torch.save(state, run / run_directory.STATE)
    model, optimizers = fresh()
    run_directory.restore(run, model, optimizers)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.5, 0.5]
    assert all(optimizer.state for optimizer in optimizers)


def test_moments_that_are_not_finite_are_not_saved(run):
    model, optimizers = fresh()
    progress = run_directory.restore(run, model, optimizers)
    before = runs.contents(run)
    kept = optimizers[1].state[next(model.loss.discriminator.parameters())]
    kept["exp_avg_sq"].view(-1)[0] = float("inf")
    with pytest.raises(UserError, match=r"^exp_avg_sq of loss.discriminator.main.0.weight: got values that"):
        run_directory.save(run, model, optimizers, progress)
    assert runs.contents(run) == before


class TestMetrics:
    def test_lost_lines_are_reported_and_the_rest_goes_on(self, run, caplog):
        path = run / run_directory.METRICS
        whole = path.read_bytes()
        first = whole.index(b"\n") + 1
        for left, kept in ((whole[: first + 5], whole[:first]), (b"", b"")):
            path.write_bytes(left)
            with caplog.at_level(logging.WARNING):
                run_directory.Metrics(run, len(whole)).close()
            assert "bytes are missing" in caplog.text
            assert path.read_bytes() == kept

    def test_reading(self, run):
        path = run / run_directory.METRICS
        lines = run_directory.read_metrics(run)
        assert len(lines) == path.read_bytes().count(b"\n")
        with open(path, "ab") as stream:
            stream.write(b'{"step": 3, "epo')  # what a kill in mid-line leaves
        assert run_directory.read_metrics(run) == lines

    @pytest.mark.parametrize(
        "line",
        [b"text\n", b"\xff\n", b"[]\n", b"{}\n", b"\n", b'{"step": "a", "split": "train"}\n', b"[" * 100_000 + b"\n"],
    )
    def test_damaged_lines_are_named(self, run, line):
        path = run / run_directory.METRICS
        path.write_bytes(path.read_bytes() + line)
        number = path.read_bytes().count(b"\n")
        with pytest.raises(UserError, match=rf"metrics.jsonl: got a damaged line {number} \("):
            run_directory.read_metrics(run)

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="metrics.jsonl: got 'No such file or directory', expected an"):
            run_directory.read_metrics(tmp_path)


def test_colours_are_a_run_without_a_state(tmp_path, capsys):
    out = fit_color_clusters(build(tiny.CROPS)[0], 8, 0, tmp_path / "colors", tiny.CROPS)
    assert run_directory.begun(out) and not run_directory.exists(out)
    before = runs.contents(out)
    assert cli.main(list(map(str, runs.begin(runs.config_file(tmp_path), out)))) == cli.USAGE_ERROR
    assert "state.pt: got no file beside weights.safetensors" in capsys.readouterr().err
    assert runs.contents(out) == before


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_a_lock_that_cannot_be_held(run, capsys, kind):
    lock = run / run_directory.LOCK
    lock.mkdir() if kind == "directory" else lock.symlink_to("/dev/zero")
    assert str(run) in refused(run, capsys)
