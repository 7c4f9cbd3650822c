"""COCO's and Open Images' annotated objects, as the original's two configs of scenes name them, on small files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from commands import run
from PIL import Image

from tamingfast import UserError, load_model
from tamingfast.data import build

TOKENS = 64  # 8 x 8 positions
PARAMS = {
    "data_path": "here", "split": "train", "keys": ["image", "objects_bbox", "file_name"], "no_tokens": TOKENS,
    "target_image_size": 16, "min_object_area": 0.001, "min_objects_per_image": 2, "max_objects_per_image": 3,
    "crop_method": "center", "random_flip": False, "use_group_parameter": True, "encode_crop": True,
}  # fmt: skip
#: Pictures by id: objects as (class, left, top, width, height) in pixels of 32 x 16.
PICTURES = {
    9: [("cat", 8, 0, 16, 8), ("sky", 0, 0, 32, 4), ("dot", 1, 1, 0.1, 0.1)],  # the last one is too small to count
    25: [("dog", 10, 4, 12.5, 12.5), ("sky", -0.5, 0, 32.5, 3), ("cat", 12, 8, 4, 4)],
    30: [("dog", 1, 1, 9, 9)],  # too few
    31: [("cat", i, 1, 9, 9) for i in range(4)],  # too many
}
IDS = {"cat": 17, "dog": 18, "dot": 3, "sky": 157, "other": 183}  # as text: 157, 17, 18, 3
COCO = ["sky", "cat", "dog", "dot"]
OPEN = {"cat": "/m/02", "dog": "/m/01s55n", "dot": "/m/07", "sky": "/m/05", "kitten": "/m/01"}


def pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for shade, name in enumerate(names):
        Image.new("RGB", (32, 16), (shade * 40, 90, 10)).save(folder / name)


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        pictures(tmp_path / "here" / split, [f"{number:012}.jpg" for number in PICTURES])
        images = [{"id": n, "file_name": f"{n:012}.jpg", "width": 32, "height": 16, "coco_url": ""} for n in PICTURES]
        for part, names in (("instances", ("cat", "dog", "dot")), ("stuff", ("sky", "other"))):
            found = [
                {"id": 1, "image_id": number, "category_id": IDS[name], "bbox": box, "iscrowd": 1, "area": 3}
                for number, things in PICTURES.items() for name, *box in things if name in names
            ]  # fmt: skip
            kinds = [{"id": IDS[name], "name": name, "supercategory": "x"} for name in names]
            content = {"images": images, "annotations": found, "categories": kinds}
            (tmp_path / "here" / "annotations" / f"{part}_{split}.json").write_text(json.dumps(content))
    return tmp_path / "here"


@pytest.fixture
def open_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for split, file in (("train", "oidv6-train"), ("validation", "validation")):
        pictures(tmp_path / "here" / split, [f"{number:0>16}.jpg" for number in PICTURES])
        head = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
                "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]  # fmt: skip
        with open(tmp_path / "here" / f"{file}-annotations-bbox.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(head)
            for number, things in PICTURES.items():
                for name, x, y, w, h in things:
                    name = "kitten" if name == "cat" and number == 25 else name
                    edges = [x / 32, (x + w) / 32, y / 16, (y + h) / 16]
                    writer.writerow([f"{number:0>16}", "x", OPEN[name], 1, *edges, 0, 0, int(name == "dog"), 0, 0])
    rows = "".join(f"{key},{name}\n" for name, key in OPEN.items())
    (tmp_path / "here" / "class-descriptions-boxable.csv").write_text(rows)
    return tmp_path / "here"


def built(which: str, **changed):
    described = {"target": f"taming.data.annotated_objects_{which}", "params": PARAMS | changed}
    return build({"train": described})[0]


def expected(things, classes, crop, flipped=False, groups=(), limit=3) -> set[tuple[int, int, int]]:
    """(class, first corner, second corner) of each object that the crop (left, width) of the picture shows."""
    found = set()
    for name, x, y, w, h in things:
        left, right = max(x, 0) / 32, min(x + w, 32) / 32
        top, bottom = max(y, 0) / 16, min(y + h, 16) / 16
        if w * h / 512 <= 0.001 or right <= crop[0] or left >= crop[0] + crop[1]:
            continue
        if flipped:
            left, right = 1 - right, 1 - left
        corners = [round(b * 7) * 8 + round(a * 7) for a, b in ((left, top), (right, bottom))]
        found.add((classes.index(name) + len(classes) * (name in groups), *corners))
    return found


def read(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    triples = tokens[:9].reshape(3, 3).tolist()
    return {tuple(triple) for triple in triples if triple[0] != TOKENS - 1}


def test_coco(coco):
    data = built("coco.AnnotatedObjectsCoco")
    assert [Path(path).name for path in data.paths] == ["000000000009.jpg", "000000000025.jpg"]
    assert list(data.kind.classes) == COCO
    for number, index in ((9, 0), (25, 1)):
        item = data[index]
        assert item["image"].shape == (16, 16, 3)
        assert read(item["objects_bbox"]) == expected(PICTURES[number], COCO, (0.25, 0.5))
        assert item["objects_bbox"][9:].tolist() == [round(0.25 * 7), 7 * 8 + round(0.75 * 7)]
    things = built("coco.AnnotatedObjectsCoco", use_stuff=False, min_objects_per_image=1, max_objects_per_image=3)
    assert list(things.kind.classes) == ["cat", "dog", "dot"] and len(things) == 3


def test_open_images(open_images):
    data = built(
        "open_images.AnnotatedObjectsOpenImages",
        category_allow_list=["cat", "dog", "sky", "kitten"], category_mapping={OPEN["kitten"]: OPEN["cat"]},
    )  # fmt: skip
    classes = ["cat", "sky", "dog"]  # the dog's id is the one that comes last
    assert list(data.kind.classes) == classes and len(data) == 2
    for number, index in ((9, 0), (25, 1)):
        things = [thing for thing in PICTURES[number] if thing[0] in classes]
        assert read(data[index]["objects_bbox"]) == expected(things, classes, (0.25, 0.5), groups=("dog",))


@pytest.mark.parametrize("method", ["random-1d", "random-2d"])
def test_random_crops(method, coco):
    data = built("coco.AnnotatedObjectsCoco", crop_method=method, random_flip=True, target_image_size=8)
    crops, flips = set(), set()
    for epoch in range(12):
        data.set_epoch(epoch)
        item = data[1]
        assert item["image"].shape == (8, 8, 3)
        first, second = ((int(token) % 8, int(token) // 8) for token in item["objects_bbox"][9:])
        crops.add((first, second))
        found = read(item["objects_bbox"])
        assert any(
            found <= expected(PICTURES[25], COCO, (0, 1), flipped) and not flips.add(flipped)
            for flipped in (False, True)
        )
    assert len(flips) == 2 and len(crops) > 2
    heights = {second[1] - first[1] for first, second in crops}
    assert heights == {7} if method == "random-1d" else len(heights) > 1 and max(heights) <= 7


def test_centres(coco):
    data = built("coco.AnnotatedObjectsCoco", keys=["image", "objects_center_points"], encode_crop=False)
    tokens = data[0]["objects_center_points"]
    assert tokens.shape == (6,)
    # The cat fills the crop's width in its upper half.
    assert [COCO.index("cat"), round(0.25 * 7) * 8 + round(0.5 * 7)] in tokens.reshape(3, 2).tolist()


@pytest.mark.parametrize(
    ("which", "changed", "said"),
    [
        ("coco", {"split": "test"}, "split: got 'test', expected one of train, validation"),
        ("coco", {"keys": ["image"]}, "keys: got"),
        ("coco", {"keys": ["image", "depth", "objects_bbox"]}, "keys: got"),
        ("coco", {"crop_method": "none"}, "crop_method: got 'none', expected one of center, random-1d, random-2d"),
        ("coco", {"data_path": "nowhere"}, "data_path=nowhere: got a path that"),
        ("coco", {"no_tokens": 4}, "tokens: got 4"),
        ("coco", {"min_object_area": "much"}, "min_object_area: got 'much'"),
        ("coco", {"min_objects_per_image": 3, "max_objects_per_image": 2}, "no picture of the train set with 3 to 2"),
        ("coco", {"no_object_classes": 9}, "no_object_classes: got 9, expected the 4"),
        ("coco", {"colour": 1}, "colour"),
        ("open", {"category_allow_list_target": "os.system"}, "category_allow_list_target: got 'os.system', which is"),
        ("open", {"category_mapping_target": "taming.data.x"}, "category_mapping_target: got"),
        ("open", {"category_allow_list": "none.txt"}, "none.txt: got no such file"),
        ("open", {"split": "all"}, "split: got 'all'"),
    ],
)  # fmt: skip
def test_params_that_cannot_be(which, changed, said, request):
    request.getfixturevalue("coco" if which == "coco" else "open_images")
    name = "coco.AnnotatedObjectsCoco" if which == "coco" else "open_images.AnnotatedObjectsOpenImages"
    with pytest.raises(UserError, match=said):
        built(name, **changed)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": []}', '{"images": [{}], "annotations": [], "categories": []}',
             '{"images": [], "annotations": [{"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1]}], ALL}',
             '{"images": [], "annotations": [{"image_id": 1, "category_id": 2, "bbox": 3}], ALL}'],
)  # fmt: skip
def test_damaged_annotations_of_coco(text, coco):
    text = text.replace("ALL", '"categories": []')
    (coco / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(UserError, match="annotations.*: got other content"):
        built("coco.AnnotatedObjectsCoco")


@pytest.mark.parametrize("text", ["", "ImageID\n1\n", "ImageID,LabelName,XMin\n1,2,x\n", '"', "\0"])
def test_damaged_annotations_of_open_images(text, open_images):
    (open_images / "oidv6-train-annotations-bbox.csv").write_text(text)
    with pytest.raises(UserError, match="here: got no picture|oidv6-train-annotations-bbox.csv: got other content"):
        built("open_images.AnnotatedObjectsOpenImages")
    (open_images / "class-descriptions-boxable.csv").write_text("one\n")
    with pytest.raises(UserError, match="class-descriptions-boxable.csv: got other content .'line 1"):
        built("open_images.AnnotatedObjectsOpenImages")


def test_a_missing_picture_is_named(coco):
    (coco / "train2017" / "000000000025.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000025.jpg: got no such file, expected an image"):
        built("coco.AnnotatedObjectsCoco")


@pytest.mark.parametrize("which", ["coco.AnnotatedObjectsCoco", "open_images.AnnotatedObjectsOpenImages"])
def test_the_original_s_config_trains(which, request):
    """The layout of its two configs of scenes, at a small size."""
    request.getfixturevalue("coco" if which.startswith("coco") else "open_images")
    stage = tiny.config(tiny.VQGAN, {"n_embed": TOKENS})["model"]
    del stage["base_learning_rate"]
    stage["params"]["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
    key = {"conditional_key": "objects_bbox"}
    transformer = {"vocab_size": TOKENS, "block_size": 64 + 11, "n_layer": 1, "n_head": 2, "n_embd": 16}
    params = {
        "cond_stage_key": "objects_bbox", "first_stage_config": stage,
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": transformer},
        "cond_stage_config": {"target": "taming.models.dummy_cond_stage.DummyCondStage", "params": key},
    }  # fmt: skip
    described = {"target": f"taming.data.annotated_objects_{which}", "params": PARAMS | {"min_objects_per_image": 1}}
    loaded = {"batch_size": 2, "num_workers": 0, "train": described | {"params": described["params"] | {
        "crop_method": "random-2d", "random_flip": True}},
        "validation": described | {"params": described["params"] | {"split": "validation"}}}  # fmt: skip
    config = {
        "model": {"base_learning_rate": 1e-4, "target": "taming.models.cond_transformer.Net2NetTransformer",
                  "params": params},
        "data": {"target": "main.DataModuleFromConfig", "params": loaded},
    }  # fmt: skip
    Path("scenes.yaml").write_text(yaml.safe_dump(config))
    assert run("train", "prior", "scenes.yaml", "--out", "run", "--device", "cpu", "training.steps=2") == 0
    model = load_model("run")
    assert model.cond_stage_key == "objects_bbox" and np.isfinite(model.transformer.head.weight.detach().numpy()).all()
    assert run("train", "prior", "--resume", "--out", "run", "--device", "cpu", "training.steps=3") == 0
    name = "cat" if which.startswith("coco") else "dog"
    scene = {"width": 16, "height": 16, "objects": [{"class": name, "box": [1, 1, 8, 8], "group": True}]}
    Path("scene.json").write_text(json.dumps(scene))
    assert run("sample", "run", "--condition", "scene.json", "-n", 1, "--out", "s.png", "--device", "cpu") == 0
