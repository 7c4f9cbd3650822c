"""What the machine and the data decide: precision, the size of a batch, processes that read data."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from PIL import Image
from runs import same_run

from tamingfast import cli
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.ops import machine
from tamingfast.ranks import World
from tamingfast.training.fitting import fitted, readers
from tamingfast.training.settings import Training

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NOISE = as_epoch_dataset(tiny.Noise(13))


def units(monkeypatch, there: bool) -> None:
    """Say whether this machine multiplies bfloat16."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda device: there)
    monkeypatch.setattr(machine, "trains_faster_in_bfloat16", lambda device: there)


@pytest.mark.parametrize(
    ("features", "there", "faster"),
    [
        ([], False, False), (["avx2", "avx512f"], False, False), (["avx512_bf16"], True, False),
        (["amx_bf16", "avx512_bf16"], True, True), (["bf16"], True, False),
    ],
)  # fmt: skip
def test_a_cpu_multiplies_bfloat16_if_it_lists_such_an_instruction(monkeypatch, features, there, faster):
    monkeypatch.setattr(machine, "_cpu", lambda: ("a processor", features))
    assert machine.multiplies_bfloat16(CPU) is there
    assert machine.trains_faster_in_bfloat16(CPU) is faster
    assert not machine.multiplies_bfloat16(torch.device("meta"))
    assert not machine.trains_faster_in_bfloat16(torch.device("meta"))


@pytest.mark.parametrize(("there", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_what_the_device_has_and_the_run_records_it(monkeypatch, tmp_path, caplog, there, precision):
    units(monkeypatch, there)
    out = tiny.train("vqgan", tmp_path / "run", steps=1, precision="auto")
    assert plain(load_yaml(out / run_directory.CONFIG))["training"]["precision"] == precision
    assert "precision" not in caplog.text
    same_run(out, tiny.train("vqgan", tmp_path / "named", steps=1, precision=precision))


def test_bfloat16_on_a_cpu_without_such_units_has_a_price(monkeypatch, caplog):
    units(monkeypatch, False)
    among = World(0, 1, CPU)
    assert fitted(Training(precision="bfloat16"), NOISE, among).precision == "bfloat16"
    assert caplog.text.count("several times as long as with training.precision=float32") == 1
    caplog.clear()
    fitted(Training(precision="bfloat16"), NOISE, World(1, 2, CPU))
    fitted(Training(precision="float32"), NOISE, among)
    assert not caplog.text


def test_batches_are_as_large_as_the_data_allow(tmp_path, caplog):
    out = tiny.train("vqgan", tmp_path / "run", steps=2, batch_size=16, accumulate=2)
    assert "training.batch_size=16: there are 13 training images, so batches have 6" in caplog.text
    assert plain(load_yaml(out / run_directory.CONFIG))["training"]["batch_size"] == 6
    same_run(out, tiny.train("vqgan", tmp_path / "named", steps=2, batch_size=6, accumulate=2))
    tiny.train("vqgan", out, resume=True, steps=3, batch_size=16, accumulate=2)
    assert run_directory.progress(out)["step"] == 3


@pytest.mark.parametrize(
    ("workers", "decodes", "device", "size", "processors", "count"),
    [
        (3, False, CPU, 1, 1, 3), ("auto", False, GPU, 1, 64, 0), ("auto", True, CPU, 1, 2, 0),
        ("auto", True, CPU, 1, 16, 4), ("auto", True, CPU, 1, 256, 8), ("auto", True, GPU, 1, 4, 3),
        ("auto", True, GPU, 8, 64, 7), ("auto", True, GPU, 1, 1, 0), ("auto", True, GPU, 4, 2, 0),
    ],
)  # fmt: skip
def test_processes_that_read_data(monkeypatch, workers, decodes, device, size, processors, count):
    monkeypatch.setattr(machine, "processors", lambda: processors)
    dataset = EpochDataset()
    dataset.decodes = decodes
    assert readers(Training(workers=workers), dataset, World(0, size, device)) == count


def test_data_sets_of_files_are_read_by_other_processes(monkeypatch, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(tiny.photographs(7, 12)):
        Image.fromarray(picture).save(folder / f"{number}.png")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tiny.VQGAN))
    data = ["data.name=folder", f"data.path={folder}", "data.crop=8", "data.size=10"]

    def train(name: str, *words: str) -> None:
        command = ["train", "vqgan", config, "--out", tmp_path / name, "--device", "cpu", *data, *words]
        assert cli.main(list(map(str, command))) == 0

    train("alone", "training.workers=0")
    monkeypatch.setattr(machine, "processors", lambda: 8)
    train("two", "training.workers=auto", "training.steps=4")
    train("two", "--resume", "training.steps=6")
    same_run(tmp_path / "alone", tmp_path / "two")
