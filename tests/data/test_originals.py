"""The data sets that the original's configs name, on small files at the original's places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from commands import run
from PIL import Image

from tamingfast import UserError, load_model
from tamingfast.checkpoints import compat
from tamingfast.data import build, originals
from tamingfast.training import load_config

SIDE = 16
#: The data sections of the original's configs, and what an item has: key -> channels.
SECTIONS = {
    "imagenet_vqgan": (
        "imagenet.ImageNetTrain", "imagenet.ImageNetValidation", {"config": {"size": SIDE}}, {"image": 3},
    ),
    "imagenetdepth_vqgan": (
        "imagenet.ImageNetTrainWithDepth", "imagenet.ImageNetValidationWithDepth", {"size": SIDE}, {"depth": 1},
    ),
    "drin_transformer": (
        "imagenet.RINTrainWithDepth", "imagenet.RINValidationWithDepth", {"size": SIDE}, {"image": 3, "depth": 1},
    ),
    "faceshq_vqgan": (
        "faceshq.FacesHQTrain", "faceshq.FacesHQValidation", {"size": SIDE, "crop_size": SIDE}, {"image": 3},
    ),
    "faceshq_transformer": (
        "faceshq.FacesHQTrain", "faceshq.FacesHQValidation", {"size": SIDE, "crop_size": SIDE, "coord": True},
        {"image": 3, "coord": 1},
    ),
    "sflckr_cond_stage": ("sflckr.Examples", "sflckr.Examples", {"size": SIDE}, {"segmentation": 182}),
    "coco_cond_stage": (
        "coco.CocoImagesAndCaptionsTrain", "coco.CocoImagesAndCaptionsTrain",
        {"size": SIDE + 4, "crop_size": SIDE, "onehot_segmentation": True, "use_stuffthing": True},
        {"segmentation": 183},
    ),
    "ade20k": (
        "ade20k.ADE20kTrain", "ade20k.ADE20kValidation", {"size": SIDE, "crop_size": SIDE}, {"segmentation": 151},
    ),
}  # fmt: skip


def picture(path: Path, shade: int = 90, size: tuple[int, int] = (24, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 40, 200)).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def labels(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def depth(path: Path, values: np.ndarray) -> None:
    """As the original keeps depth: float32 numbers as the four bytes of a pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = np.ascontiguousarray(values.astype("<f4")).view(np.uint8).reshape(*values.shape, 4)
    Image.fromarray(packed, "RGBA").save(path)


MAP = np.add.outer(np.arange(20), np.arange(24)) % 9
RAMP = np.linspace(-3, 7, 20 * 24).reshape(20, 24)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every data set lies where the original has it; the cache is ``cache``."""
    root = tmp_path_factory.mktemp("originals")
    for split, folder in (("train", "train"), ("validation", "val")):
        for number in range(1000):  # the restricted set counts all classes
            name = f"n{number:08d}/{number}.JPEG"
            place = root / "cache/autoencoders/data" / f"ILSVRC2012_{split}" / "data"
            if number in (7, 30, 151):
                picture(place / name, number)
                depth((root / "data/imagenet_depth" / folder / name).with_suffix(".png"), RAMP)
            else:
                (place / name).parent.mkdir(parents=True)
                (place / name).symlink_to(place.parents[4] / "one.jpg")
                (root / "data/imagenet_depth" / folder / name).parent.mkdir(parents=True, exist_ok=True)
                (root / "data/imagenet_depth" / folder / name).with_suffix(".png").symlink_to(root / "one.png")
        for base, stem in (("celebahq", "a"), ("ffhq", "b")):
            picture(root / "data" / base / f"{split}{stem}.png", 60, (24, 24))
            (root / f"data/{base}{split}.txt").write_text(f"{split}{stem}.png\n")
    picture(root / "one.jpg")
    depth(root / "one.png", RAMP)
    for stem in ("sflckr", "coco", "ade20k"):
        picture(root / f"data/{stem}_images/x/1.jpg")
        labels(root / f"data/{stem}_segmentations/x/1.png", MAP)
        (root / f"data/{stem}_examples.txt").write_text("x/1.jpg\n")
    for split, name in (("training", "train"), ("validation", "test")):
        picture(root / f"data/ade20k_root/images/{split}/1.jpg")
        labels(root / f"data/ade20k_root/annotations/{split}/1.png", MAP)
        (root / f"data/ade20k_{name}.txt").write_text(f"{split}/1.jpg\n")
    picture(root / "data/coco/train2017/1.jpg")
    labels(root / "data/cocostuffthings/train2017/1.png", np.where(MAP == 0, 255, MAP))
    return root


@pytest.fixture(autouse=True)
def _place(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "cache"))


def section(name: str) -> dict:
    train, validation, params, _ = SECTIONS[name]
    return {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 2,
            "num_workers": 0,
            "train": {"target": f"taming.data.{train}", "params": params},
            "validation": {"target": f"taming.data.{validation}", "params": params},
        },
    }


@pytest.mark.parametrize("name", SECTIONS)
def test_the_section_of_a_config_works_as_it_is(name, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": section(name)}))
    data = load_config(tmp_path / "c.yaml")["data"]
    assert data["size"] == SIDE
    for dataset in build(data):
        item = dataset[0]
        for key, channels in SECTIONS[name][3].items():
            assert item[key].shape == (SIDE, SIDE, channels) and item[key].dtype == torch.float32
        assert item["image"].shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("name", ["imagenet_vqgan", "faceshq_vqgan"])
def test_a_config_of_the_original_trains(name, tmp_path):
    config = {"model": tiny.VQGAN["model"], "data": section(name), "lightning": {"trainer": {"max_steps": 1}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    batches = ["training.batch_size=1", "training.validation_batches=1"]
    assert run("train", "vqgan", tmp_path / "c.yaml", "--out", tmp_path / "run", "--device", "cpu", *batches) == 0
    assert load_model(tmp_path / "run").config["data"]["size"] == SIDE


def test_paths_can_be_given(files, tmp_path):
    picture(tmp_path / "mine/cat/1.jpg")
    picture(tmp_path / "mine/dog/1.jpg")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": section("imagenet_vqgan")}))
    config = load_config(tmp_path / "c.yaml", [f"data.params.train.params.path={tmp_path / 'mine'}"])
    train, validation = build(config["data"])
    assert list(train.classes) == ["cat", "dog"] and [train[i]["class_label"] for i in (0, 1)] == [0, 1]
    assert len(validation) == 1000


def test_labels_are_the_numbers_of_class_folders():
    train = originals.ImageNetTrain({"size": SIDE})
    assert len(train) == 1000 and train[30]["class_label"] == 30
    animals = originals.RINTrainWithDepth(size=SIDE)
    assert len(animals) == len(set(originals.indices_of(originals._ANIMALS))) == 194
    assert animals.classes[0] == "n00000030" and animals[0]["file_path_"].endswith("n00000030/30.JPEG")


def test_depth_is_unpacked_and_stretched():
    item = originals.ImageNetValidationWithDepth(size=20)[7]
    expected = 2 * (RAMP - RAMP.min()) / (RAMP.max() - RAMP.min()) - 1
    torch.testing.assert_close(item["depth"][..., 0].double(), torch.tensor(expected[:, 2:22]), atol=1e-5, rtol=0)


def test_faces_have_the_coordinates_of_their_crops():
    train = originals.FacesHQTrain(24, crop_size=SIDE, coord=True)
    assert [train[i]["class_label"] for i in (0, 1)] == [0, 1]
    coordinates = train[0]["coord"][..., 0] * 24 * 24
    top, left = divmod(int(coordinates[0, 0].round()), 24)
    assert 0 <= top <= 8 and 0 <= left <= 8
    assert int(coordinates[3, 5].round()) == (top + 3) * 24 + left + 5
    assert "coord" not in originals.FacesHQValidation(SIDE, crop_size=SIDE)[0]


def test_label_maps_are_one_hot_and_coco_s_are_moved_by_one():
    for made, shift in ((originals.FlickrExamples(20), 0), (originals.CocoExamples(20), 1)):
        assert torch.equal(made[0]["segmentation"].argmax(-1), torch.tensor(MAP[:, 2:22] + shift))
    item = originals.CocoImagesAndCaptionsTrain(20, True, True, 20)[0]["segmentation"].argmax(-1)
    columns = [np.where(MAP == 0, 0, MAP + 1)[:, left : left + 20] for left in range(5)]
    assert any(torch.equal(item, torch.tensor(part)) for part in columns)


@pytest.mark.parametrize(
    ("target", "params", "said"),
    [
        ("imagenet.ImageNetTrain", {"config": {"size": 8, "depth": 1}}, "config.depth: got a key that nothing reads"),
        ("imagenet.ImageNetTrain", {"path": "nowhere"}, "path=nowhere: got .*ImageNet's.*give path=DIRECTORY among"),
        ("imagenet.ImageNetTrainWithDepth", {"size": 8, "sub_indices": "1-x"}, "sub_indices: got '1-x'"),
        ("imagenet.ImageNetTrainWithDepth", {"size": 8, "sub_indices": "1000"}, "sub_indices: got 1000"),
        ("imagenet.ImageNetTrainWithDepth", {"size": 8, "root": "nowhere"}, "depth_path=nowhere/train: got"),
        ("faceshq.FacesHQTrain", {"size": 8, "ffhq_path": "nowhere"}, "nowhere/trainb.png: got no such file"),
        ("faceshq.FacesHQTrain", {"size": 8, "ffhq_list": "none.txt"}, "none.txt: got"),
        ("faceshq.FacesHQTrain", {"size": 8, "crop_size": 16}, "crop_size: got 16, expected at most size=8"),
        ("sflckr.Examples", {"size": 8, "segmentation_root": "nowhere"}, "nowhere/x/1.png: got no such file"),
        ("sflckr.Examples", {"size": 8, "interpolation": "area"}, "interpolation: got 'area', expected bicubic"),
        ("coco.CocoImagesAndCaptionsTrain", {"size": 8}, "onehot_segmentation: got False, expected True"),
        ("coco.CocoImagesAndCaptionsValidation",
         {"size": 8, "onehot_segmentation": True, "use_stuffthing": True}, "val2017: got .*COCO's images"),
        ("annotated_objects_coco.AnnotatedObjectsCoco", {}, "missing a required argument|required positional"),
        ("faceshq.CelebAHQTrain", {}, "expected a name of the original that has a counterpart"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(target, params, said):
    with pytest.raises(UserError, match=said):
        build({"train": {"target": f"taming.data.{target}", "params": params}})


def test_every_data_set_of_the_table_is_documented():
    """docs/training.md names each of them, and says what is refused."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    for module, names in compat.NAMES.items():
        if module.startswith("taming.data."):
            assert all(f"`{module.removeprefix('taming.data.')}.{name}`" in page for name in names), module
    for name in ("drin_transformer", "coco_scene_images_transformer", "open_images_scene_images_transformer"):
        assert f"`{name}.yaml`" in page
