"""Token files with several views of each image, in several files, interrupted and resumed."""

from __future__ import annotations

import archives
import numpy as np
import pytest
import tiny
import torch
from picture_files import save
from PIL import Image

from tamingfast import UserError, cli, load_model, tasks
from tamingfast.data import build
from tamingfast.data.tokens import TokenDataset
from tamingfast.training import prior


@pytest.fixture(scope="module")
def stage(runs):
    return load_model(runs / "vqgan")


@pytest.fixture
def data(tmp_path):
    for number in range(7):
        save(tmp_path / f"images/{'ab'[number % 2]}/{number}.png", (20, 12))
    return {"name": "folder", "path": str(tmp_path / "images"), "size": 8, "validation_fraction": 0.1}


def tokens(stage, image) -> np.ndarray:
    return stage.encode_grid(image.permute(2, 0, 1)[None]).reshape(-1).numpy()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_view_is_that_of_an_epoch(stage, data, tmp_path):
    train, _ = build(data)
    assert tasks.encode(stage, data, tmp_path / "t.safetensors", views=3, batch=4) == 3 * len(train)
    found = TokenDataset(tmp_path / "t.safetensors")
    assert found.classes == ["a", "b"] and found.metadata["views"] == "3"
    for view in range(3):
        train.set_epoch(view)
        for number in range(len(train)):
            item, image = found[view * len(train) + number], train[number]
            assert np.array_equal(item["indices"].numpy(), tokens(stage, image["image"]))
            assert item["class_label"] == image["class_label"]
    by_view = np.stack([item["indices"].numpy() for item in found]).reshape(3, len(train), -1)
    assert not np.array_equal(by_view[0], by_view[1])


def test_ten_crops_are_the_corners_the_centre_and_these_mirrored(stage, data, tmp_path):
    data |= {"short_side": 10}
    train, _ = build(data)
    for each in train.paths:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8)).save(each)
    assert tasks.encode(stage, data, tmp_path / "t.safetensors", views="ten-crop") == 10 * len(train)
    found = TokenDataset(tmp_path / "t.safetensors")
    pixels = torch.from_numpy(np.asarray(Image.open(train.paths[0])) / 127.5 - 1).float()
    expected = []
    for mirrored in (False, True):
        for top, left in ((0, 0), (0, 8), (2, 0), (2, 8), (1, 4)):
            crop = pixels[top : top + 8, left : left + 8]
            expected.append(tokens(stage, crop.flip(1) if mirrored else crop))
    rows = [found[view * len(train)]["indices"].numpy() for view in range(10)]
    assert np.array_equal(rows, expected) and len({row.tobytes() for row in rows}) == 10
    assert not train._ten_crops


def test_an_interrupted_encoding_is_resumed_to_the_same_bytes(stage, data, tmp_path, monkeypatch):
    options = {"views": 2, "shard": 5}  # two images, four grids each
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    count = tasks.encode(stage, data, whole, **options)
    written = contents(whole)
    assert sorted(written) == [f"tokens-{number:05d}.safetensors" for number in range(3)]

    class Stop(BaseException):
        pass

    encode_grid, calls = stage.encode_grid, []

    def interrupted(x):
        calls.append(len(x))
        if len(calls) == 6:
            raise Stop
        return encode_grid(x)

    monkeypatch.setattr(stage, "encode_grid", interrupted)
    with pytest.raises(Stop):
        tasks.encode(stage, data, parts, batch=1, **options)
    assert contents(parts) == {name: written[name] for name in ("tokens-00000.safetensors",)}
    with pytest.raises(UserError, match="got a directory that already holds token files, expected a new one"):
        tasks.encode(stage, data, parts, **options)
    calls.append(0)
    assert tasks.encode(stage, data, parts, batch=3, resume=True, **options) == count
    assert contents(parts) == written and sum(calls[7:]) == count - 4  # the finished file was not encoded again

    for change, message in (
        ({"views": 1, "shard": 2}, "tokens whose views is '2', expected '1'"),
        ({"shard": 9}, "tokens whose shard is '0 of 3', expected '0 of 2'"),
        ({"data": data | {"seed": 1}}, "tokens whose settings is"),
    ):
        given = {"data": data} | options | change
        with pytest.raises(UserError, match=message):
            tasks.encode(stage, given.pop("data"), parts, resume=True, **given)
    assert contents(parts) == written


def test_a_data_set_of_the_callers_is_resumed_as_well(stage, tmp_path):
    for _ in range(2):
        assert tasks.encode(stage, tiny.Noise(5), tmp_path / "t", shard=2, resume=True) == 5
    assert len(TokenDataset(tmp_path / "t")) == 5


def test_a_prior_trains_on_a_directory_or_a_pattern(runs, data, tmp_path):
    tasks.encode(runs / "vqgan", data, tmp_path / "tokens", views=2, shard=4)
    for pattern in ("", "/tokens-*.safetensors", "/tokens-{00000..00002}.safetensors"):
        found, _ = build({"name": "tokens", "path": f"{tmp_path}/tokens{pattern}"})
        assert len(found) == 12 and len(found._files) == 3
    batch = found.batch(np.array([11, 0, 5, 4]))
    assert all(torch.equal(batch["indices"][row], found[index]["indices"]) for row, index in enumerate((11, 0, 5, 4)))
    config = tiny.config(tiny.PRIOR, steps=2) | {"data": {"name": "tokens", "path": str(tmp_path / "tokens")}}
    config["prior"] = {"condition": "class"}
    run = prior.train(config, runs / "vqgan", tmp_path / "run", device="cpu")
    prior.train(tiny.config(config, steps=3), runs / "vqgan", run, True, "cpu")


def test_files_that_do_not_fit_together_are_refused(stage, data, tmp_path):
    tasks.encode(stage, data, tmp_path / "a.safetensors")
    tasks.encode(stage, data | {"size": 16}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"b.safetensors: got grids \(8, 8\), expected \(4, 4\) as in .*a.safetensors"):
        TokenDataset(tmp_path)


def test_archives_are_encoded_too(stage, tmp_path):
    archives.shards(tmp_path / "shards", 2, 6, size=8)
    data = {
        "name": "shards",
        "path": f"{tmp_path}/shards/train-{{000..001}}.tar",
        "size": 8,
        "validation_fraction": 0.1,
    }
    count = tasks.encode(stage, data, tmp_path / "t", views="ten-crop", shard=40)
    found = TokenDataset(tmp_path / "t")
    assert len(found) == count == 10 * len(build(data)[0]) and found.classes == ["0", "1", "2"]


def test_the_command(runs, data, tmp_path, capsys):
    words = [f"{key}={value}" for key, value in data.items()]
    line = ["encode", str(runs / "vqgan"), "--out", str(tmp_path / "t"), "--views", "2", "--shard", "4", *words]
    assert cli.main(line) == 0 and "12 views of images" in capsys.readouterr().out
    assert cli.main(line) == 2 and "continue with --resume" in capsys.readouterr().err
    assert cli.main([*line, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views: got 0"),
        ({"views": "five-crop"}, "views: got 'five-crop', expected a number of views or ten-crop"),
        ({"shard": 0}, "shard: got 0"),
        ({"resume": True}, "resume: got an encoding into one file, expected one into several"),
    ],
)
def test_options_are_checked(stage, data, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tasks.encode(stage, data, tmp_path / "t", **options)


def test_only_image_files_have_ten_crops(stage, tmp_path):
    with pytest.raises(UserError, match="views: got ten-crop for .*, expected squares of image files"):
        tasks.encode(stage, tiny.Noise(3), tmp_path / "t", views="ten-crop")
