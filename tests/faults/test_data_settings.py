"""Settings of data sets with values of every type: used, or refused in a sentence that names the setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import save
from PIL import Image

from tamingfast import UserError
from tamingfast.data import build
from tamingfast.data.tokens import write_tokens

VALUES: list[Any] = [
    None, True, False, -1, 0, 0.5, float("nan"), float("inf"), -1e300, 10**9, 10**18, 10**400, "big", "", "no", [], [1],
    ["x"], [float("nan"), 1], ["a", "b"], {}, {"a": 1}, "a\0b", "~nobody/x", b"x",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three images with depth maps, which are label maps, too; under ``boxes``, the same with objects."""
    root = tmp_path_factory.mktemp("data")
    for number in range(3):
        save(root / f"images/{number}.png", (24, 20))
        (root / "conditions").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 24), number, np.uint8)).save(root / f"conditions/{number}.png")
        scene = {"width": 24, "height": 20, "objects": [{"class": "cat", "box": [1, 1, 5, 5]}]}
        (root / "boxes/conditions").mkdir(parents=True, exist_ok=True)
        (root / f"boxes/conditions/{number}.json").write_text(json.dumps(scene))
    shutil.copytree(root / "images", root / "boxes/images")
    write_tokens(root / "t.safetensors", np.zeros((2, 2, 2), int), 8)
    return root


FOLDER = "path size seed validation_path validation_fraction random_crop flip crop name"
SETS = {
    "folder": ({"path": "images"}, FOLDER),
    "photos": ({"size": 16}, "size length flip crop"),
    "cifar10": ({"path": "images"}, "path flip size"),
    "tokens": ({"path": "t.safetensors"}, "path validation_path"),
    "depth": ({}, "kind depth_range short_side size seed path validation_path validation_fraction"),
    "segmentation": ({"labels": 9}, "labels"),
    "edges": ({}, "sigma"),
    "lowres": ({}, "factor"),
    "superpixels": ({"labels": 4}, "labels segments"),
    "boxes": ({"path": "boxes", "classes": ["cat"], "tokens": 64}, "classes tokens objects crop_tokens attributes"),
}
PARAMETERS = [(name, key) for name, (_, keys) in SETS.items() for key in keys.split()]


@pytest.mark.parametrize(("name", "key"), PARAMETERS)
def test_a_setting_is_used_or_refused_by_its_name(root, name, key):
    given, _ = SETS[name]
    settings = {"name": name, "size": 8} | given
    if name not in ("folder", "photos", "cifar10", "tokens"):
        settings |= {"name": "conditions", "kind": name, "path": "."} | given
    if "path" in settings:
        settings["path"] = str(root / settings["path"])
    for value in VALUES:
        try:
            for dataset in build(settings | {key: value}):
                if dataset is not None:
                    dataset[0]
        except UserError as error:
            message = str(error)
            assert len(message) < 700 and "\n" not in message
            # A missing file is named by itself, and other sizes are told by what they do not suit.
            assert key in message or str(value)[:20] in message or name in ("cifar10", "photos"), (value, message)


@pytest.mark.parametrize("word", ["no", "off", "False", "0.0.1"])
@pytest.mark.parametrize("key", ["flip", "random_crop"])
def test_words_do_not_count_as_true(root, key, word):
    with pytest.raises(UserError, match=f"{key}: got '{word}', expected true or false"):
        build({"name": "folder", "path": root / "images", key: word})


def test_a_number_may_be_the_name_of_a_directory(root, monkeypatch):
    monkeypatch.chdir(root)
    shutil.copytree("images", "2024", dirs_exist_ok=True)
    assert len(build({"name": "folder", "path": 2024, "size": 8})[0]) == 2
    with pytest.raises(UserError, match="path=2025: got a path that does not exist"):
        build({"name": "folder", "path": 2025})


@pytest.mark.parametrize("size", ["big", -1, 0.5, [8], 10**9])
def test_sizes_of_the_original_are_checked_too(root, size):
    (root / "list.txt").write_text(f"{root / 'images/0.png'}\n")
    params = {"size": size, "training_images_list_file": str(root / "list.txt")}
    with pytest.raises(UserError, match="size: got "):
        build({"train": {"target": "taming.data.custom.CustomTrain", "params": params}})


@pytest.mark.parametrize("path", VALUES)
def test_lists_of_the_original_are_named(path):
    params = {"size": 8, "training_images_list_file": path}
    with pytest.raises(UserError, match="got .*, expected "):
        build({"train": {"target": "taming.data.custom.CustomTrain", "params": params}})
