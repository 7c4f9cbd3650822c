"""Of several checkpoints, the one of the most steps is meant; configs beside and inside files are found or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tamingfast
from tamingfast import checkpoints
from tamingfast.checkpoints.locate import embedded_config, neighbouring_config, weights_path
from tamingfast.errors import UserError


def run(folder: Path, files: dict[str, dict], **times: int) -> Path:
    """A run directory whose checkpoints have this content beside their weights; ``times`` by name without ending."""
    (folder / "checkpoints").mkdir(parents=True)
    for name, content in files.items():
        path = folder / "checkpoints" / name
        torch.save({"state_dict": {"a": torch.zeros(2)}} | content, path)
        os.utime(path, (times.get(path.stem, 1_600_000_000),) * 2)
    return folder


def steps(*counts: int) -> list[dict]:
    return [{"global_step": count, "epoch": count // 100} for count in counts]


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["epoch=9-step=900.ckpt", "epoch=10-step=1000.ckpt", "epoch=100-step=10000.ckpt"], 2),
        (["last.ckpt", "last-v1.ckpt"], 1),
        (["last-v9.ckpt", "last-v10.ckpt", "last.ckpt"], 2),
        (["last-v1.ckpt", "epoch=000003.ckpt", "z.ckpt"], 2),
        (["z.ckpt", "model-0100.ckpt", "a.pt"], 2),
        (["b.ckpt", "a.pth"], 1),
        (["b.ckpt", "epoch=99.ckpt", "last.ckpt"], 2),
    ],
)
def test_the_steps_recorded_inside_decide(names, newest, tmp_path):
    """The later a file is in the list, the more steps it records."""
    files = dict(zip(names, steps(*(100 * (i + 1) for i in range(len(names)))), strict=True))
    assert weights_path(run(tmp_path / "run", files)).name == names[newest]


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["epoch=9.ckpt", "epoch=10.ckpt", "epoch=100.ckpt"], "epoch=100.ckpt"),
        (["epoch=9-step=900.ckpt", "epoch=3-step=1000.ckpt"], "epoch=3-step=1000.ckpt"),
        (["epoch_000009.ckpt", "epoch_000010.ckpt"], "epoch_000010.ckpt"),
        (["last.ckpt", "last-v1.ckpt", "last-v2.ckpt"], "last-v2.ckpt"),
        (["last-v9.ckpt", "last-v10.ckpt"], "last-v10.ckpt"),
        (["other.ckpt", "last.ckpt"], "last.ckpt"),
        (["model_9.pth", "model_10.pth", "model_2.pth"], "model_10.pth"),
        (["2.ckpt", "10.ckpt", "9.ckpt"], "10.ckpt"),
        (["N-Step-9.ckpt", "N-Step-10.ckpt"], "N-Step-10.ckpt"),
        (["best-9-loss=0.30.ckpt", "best-10-loss=0.05.ckpt"], "best-10-loss=0.05.ckpt"),
        (["EPOCH=9.CKPT", "epoch=3.ckpt"], "EPOCH=9.CKPT"),
    ],
)
def test_without_records_names_decide(names, newest, tmp_path):
    for made in (names, names[::-1]):
        folder = run(tmp_path / made[0], {name: {} for name in made})
        assert weights_path(folder).name == newest


@pytest.mark.parametrize("key", ["step", "steps", "iteration", "iter"])
@pytest.mark.parametrize("kind", [int, float])
def test_other_trainers_record_steps_under_other_names(key, kind, tmp_path):
    files = {name: {key: kind(count)} for name, count in {"b.ckpt": 9, "a.ckpt": 10, "c.ckpt": 1}.items()}
    assert weights_path(run(tmp_path / "run", files)).name == "a.ckpt"


def test_hidden_files_are_no_checkpoints_and_no_configs(tmp_path):
    folder = run(tmp_path / "run", {"a.ckpt": {}})
    (folder / "configs").mkdir()
    (folder / "configs" / "2021-project.yaml").write_text("model: {target: x}")
    for name in ("checkpoints/._last.ckpt", "checkpoints/.last.ckpt.x.ckpt", "configs/._2022-project.yaml"):
        (folder / name).write_bytes(b"\0\5\x16\7" + bytes(80))
    assert weights_path(folder).name == "a.ckpt"
    assert neighbouring_config(folder / "checkpoints" / "a.ckpt").model.target == "x"


def test_links_to_nothing(tmp_path):
    folder = run(tmp_path / "run", {"epoch=1.ckpt": {}})
    (folder / "checkpoints" / "last.ckpt").symlink_to("gone.ckpt")
    assert weights_path(folder).name == "epoch=1.ckpt"
    (folder / "checkpoints" / "epoch=1.ckpt").unlink()
    with pytest.raises(UserError, match=r"last\.ckpt: got a link to 'gone\.ckpt', which is missing"):
        tamingfast.load_model(folder)


def test_without_names_times_decide(tmp_path):
    folder = run(tmp_path / "run", {"a.ckpt": {}, "b.ckpt": {}}, a=1_700_000_000)
    assert weights_path(folder).name == "a.ckpt"


def test_of_the_same_step_the_last_is_meant(tmp_path):
    folder = run(tmp_path / "run", {"epoch=3.ckpt": steps(300)[0], "last.ckpt": steps(300)[0]})
    assert weights_path(folder).name == "last.ckpt"


def test_a_damaged_one_of_several_is_named(tmp_path):
    folder = run(tmp_path / "run", {"a.ckpt": {}, "last.ckpt": {}})
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"last\.ckpt: got a zip archive whose end is missing"):
        weights_path(folder)


def test_files_of_either_format_are_compared(tmp_path):
    folder = run(tmp_path / "run", {"a.ckpt": steps(5)[0]})
    checkpoints.save_weights(folder / "checkpoints" / "b.safetensors", {"a": torch.zeros(2)}, {"step": "7"})
    old = {"state_dict": {"a": torch.zeros(2)}, "global_step": 9}
    torch.save(old, folder / "checkpoints" / "c.pt", _use_new_zipfile_serialization=False)
    (folder / "checkpoints" / "notes.txt").write_text("no checkpoint")
    assert weights_path(folder).name == "c.pt"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"), ("5", "no mapping"), ("[1]", "no mapping"), ('"x"', "no mapping"), ("null", "no mapping"),
        ("[" * 100_000, "not JSON"), ('{"a":' * 900 + "1" + "}" * 900, "too deeply nested"),
        ('{"model": 5}', "no 'target'"), ('{"model": [1]}', "no 'target'"), ('{"model": {"target": 5}}', "target"),
    ],
)  # fmt: skip
def test_configs_inside_a_file_that_are_none(text, words, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"encoder.conv_in.weight": torch.zeros(2)}, path, {"config": text})
    with pytest.raises(UserError, match="m.safetensors") as error:
        tamingfast.load_model(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_config_inside_a_file_of_another_name(tmp_path):
    config = {"model": {"target": "x", "params": {}}}
    checkpoints.save_weights(tmp_path / "m.ckpt", {"a": torch.zeros(2)}, {"config": json.dumps(config)})
    assert embedded_config(tmp_path / "m.ckpt") == config
