"""Classes by their names: kept in the run, its checkpoint and its converted file, and accepted wherever a class is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import run
from PIL import Image
from refusals import refused

from tamingfast import UserError, checkpoints, load_model, tasks
from tamingfast.data.tokens import write_tokens
from tamingfast.evaluation.run import _folder
from tamingfast.training import prior, vqgan

NAMES = ["cat", "dog", "red fox, old", "7"]


@pytest.fixture(scope="module")
def named(runs, tmp_path_factory) -> Path:
    """The run of a prior of four classes with names."""
    folder = tmp_path_factory.mktemp("named")
    tokens = [[[index % 16] * 4] * 4 for index in range(8)]

    write_tokens(
        folder / "t.safetensors", np.array(tokens), 16, class_label=[index % 4 for index in range(8)], classes=NAMES
    )
    data = {"name": "tokens", "path": str(folder / "t.safetensors")}
    return prior.train(tiny.config(tiny.PRIOR, steps=1) | {"data": data}, runs / "vqgan", folder / "run", device="cpu")


def labels(path, label, count=4):
    drawing = tasks.sample(path, count, size=(8, 8), label=label)
    return drawing.canvas.cond.flatten().tolist()


def test_a_class_by_name_number_and_list(named):
    assert labels(named, "dog") == [1] * 4 == labels(named, 1)
    assert labels(named, ["dog", 0]) == [1, 0, 1, 0] == labels(named, "dog,cat")
    assert labels(named, "red fox, old", 1) == [2] == labels(named, "2", 1)
    assert labels(named, "7", 1) == [3]  # a name comes before a number
    assert labels(named, None, 5) == [0, 1, 2, 3, 0]


def test_the_size_of_token_files_is_the_size_that_is_drawn(named):
    """Their config records no pixels, but the transformer's block has room for 4 x 4 tokens only."""
    assert tasks.image_size(load_model(named)) == (8, 8) == tuple(tasks.sample(named, 1).images.shape[2:])


@pytest.mark.parametrize("label", ["fish", "doq", 4, -1, "4", 1.5, [], ["cat", "fish"], "cat,fish"])
def test_a_class_that_is_none(named, label):
    with pytest.raises(UserError, match="label: got .*expected") as caught:
        tasks.labels_of(load_model(named), label)
    if label == "doq":
        assert "0 to 3, or one of cat, dog, red fox, old, 7; did you mean 'dog'?" in str(caught.value)


def test_names_travel_with_the_run_and_its_converted_file(named, tmp_path, capsys):
    converted = checkpoints.convert(named, tmp_path / "c.safetensors")
    for path in (named, converted):
        assert tasks.class_names_of(load_model(path)) == NAMES
        assert run("inspect", path, "--json") == 0
        assert json.loads(capsys.readouterr().out)["classes"] == NAMES
        assert run("sample", path, "-n", 1, "--class", "dog", "--size", 8, "--out", tmp_path / "s.png") == 0
        capsys.readouterr()
    refused("sample", named, "--class", "doq", names="--class: got class 'doq'")


def test_a_resumed_run_keeps_them_and_a_wrong_number_of_them_is_named(named, tmp_path):
    assert run("train", "prior", "--resume", "--out", named, "--first-stage", named.parent / "none") != 0
    model = load_model(named)
    assert "classes" in model.config
    model.config["classes"] = NAMES[:2]
    with pytest.raises(UserError, match="classes: got 2, expected 4 names"):
        tasks.labels_of(model, "cat")


def test_names_that_nothing_would_read_are_refused(runs, tmp_path):
    data = {"data": tiny.CROPS, "classes": ["a", "b"]}
    first, second = tiny.config(tiny.VQGAN, steps=1) | data, tiny.config(tiny.PRIOR, steps=1) | data
    with pytest.raises(UserError, match="classes: got names for a first stage"):
        vqgan.train(first, tmp_path / "a", device="cpu")
    with pytest.raises(UserError, match="classes: got 2 names, expected 0, as many as"):
        prior.train(second | {"prior": {"condition": "none"}}, runs / "vqgan", tmp_path / "b", device="cpu")


def test_a_model_without_names_says_so(named):
    model = load_model(named)
    del model.config["classes"]
    with pytest.raises(UserError, match="expected 0 to 3, as the model's config has no names"):
        tasks.labels_of(model, "cat")


def test_evaluation_finds_classes_by_the_names_of_their_folders(named, tmp_path):
    for place, name in enumerate(("dog", "7")):  # neither all of them nor in the model's order
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            pixels = tiny.photographs(4, 16)[2 * place + number]
            Image.fromarray(pixels).save(tmp_path / f"data/{name}/{number}.png")
    dataset = _folder(load_model(named), tmp_path / "data")
    assert dataset.classes == NAMES
    assert [NAMES[item["class_label"]] for item in map(dataset.__getitem__, range(4))] == ["7", "7", "dog", "dog"]
    (tmp_path / "data/dog").rename(tmp_path / "data/dogs")
    with pytest.raises(UserError, match="got 'dogs', expected folders named after the model's classes; did you mean"):
        _folder(load_model(named), tmp_path / "data")
