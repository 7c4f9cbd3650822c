"""Images with conditions: matched by name, aligned under crops and flips, and errors that name the file."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import UserError
from tamingfast.data import build, loader
from tamingfast.data.conditions import Coordinates
from tamingfast.data.views import View

SIZE = 24


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Six photographs of 48x36 pixels in ``images/``, with a map of each kind that is a function of its pixels."""
    root = tmp_path_factory.mktemp("data")
    for number, pixels in enumerate(tiny.photographs(6, 48)):
        pixels = pixels[:36]
        for folder in ("images/sub", "segmentation/sub", "depth/sub", "arrays/sub"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        name = f"sub/{number}"
        Image.fromarray(pixels).save(root / f"images/{name}.png")
        labels = Image.new("P", (48, 36))
        labels.putdata((pixels[..., 0] // 64).ravel().tolist())
        labels.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
        labels.save(root / f"segmentation/{name}.png")
        Image.fromarray(pixels[..., 1]).save(root / f"depth/{name}.png")
        np.save(root / f"arrays/{name}.npy", pixels[..., 1].astype(np.float32) * 257)
    return root


@pytest.fixture
def folder(originals, tmp_path):
    """Makes ``images/`` and ``conditions/`` of one kind."""

    def made(kind: str | None = None):
        shutil.copytree(originals / "images", tmp_path / "images")
        if kind:
            shutil.copytree(originals / kind, tmp_path / "conditions")
        return tmp_path

    return made


def train_of(path, kind, **options):
    return build({"name": "conditions", "path": str(path), "kind": kind, "size": SIZE} | options)[0]


def item_at(dataset, epoch, index=0):
    dataset.set_epoch(epoch)
    return dataset[index]


class TestAlignment:
    """The conditions were made from the pixels, so every crop and flip must still agree with its own pixels."""

    @pytest.mark.parametrize("short_side", [36, None])
    def test_segmentation(self, folder, short_side):
        dataset = train_of(folder("segmentation"), "segmentation", labels=4, short_side=short_side)
        for epoch in range(6):
            item = item_at(dataset, epoch)
            expected = ((item["image"][..., 0] + 1) * 127.5).round().int() // 64
            assert item["segmentation"].shape == (SIZE, SIZE, 4) and item["segmentation"].dtype == torch.float32
            assert torch.equal(item["segmentation"].sum(-1), torch.ones(SIZE, SIZE))
            agreeing = (item["segmentation"].argmax(-1) == expected).float().mean()
            # Scaled labels are those of the nearest pixel, scaled images are not.
            assert agreeing == 1 if short_side == 36 else agreeing > 0.7

    @pytest.mark.parametrize("kind", ["depth", "arrays"])
    def test_depth(self, folder, kind):
        high = 255 if kind == "depth" else 65535
        dataset = train_of(folder(kind), "depth", short_side=36, depth_range=[0, high])
        for epoch in range(6):
            item = item_at(dataset, epoch)
            assert item["depth"].shape == (SIZE, SIZE, 1) and item["depth"].dtype == torch.float32
            torch.testing.assert_close(item["depth"][..., 0], item["image"][..., 1], atol=1e-5, rtol=0)

    def test_keypoints(self, folder):
        root = folder()
        points = [[10, 9], [30, 9, 1], [30, 25, 2], [10, 25, 0]]
        for path in sorted(root.glob("images/sub/*.png")):
            drawn = np.zeros((36, 48, 3), np.uint8)
            drawn[9, 10:31] = drawn[9:26, 30] = 255
            Image.fromarray(drawn).save(path)
            content = {"width": 96, "height": 72, "skeleton": [[0, 1], [1, 2], [2, 3]]}
            content["people"] = [[[2 * x, 2 * y, *seen] for x, y, *seen in points]]
            target = root / "conditions/sub" / f"{path.stem}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(content))
        dataset = train_of(root, "keypoints", short_side=36)
        for epoch in range(6):
            item = item_at(dataset, epoch)
            assert item["keypoints"].shape == (SIZE, SIZE, 3)
            assert torch.equal(item["keypoints"].amax(-1) > 0, item["image"].amax(-1) > 0)
        assert {tuple(pixel) for pixel in item["keypoints"].reshape(-1, 3).tolist()} > {(-1.0, -1.0, -1.0)}

    def test_coordinates(self, folder):
        dataset = train_of(folder(), "coord", short_side=36)
        whole = torch.arange(36 * 48).view(36, 48) / (36 * 48)
        corners = set()
        for epoch in range(8):
            coord = item_at(dataset, epoch)["coord"]
            top, left = divmod(round(float(coord[0, 0]) * 36 * 48), 48)
            corners.add((top, left))
            torch.testing.assert_close(coord[..., 0], whole[top : top + SIZE, left : left + SIZE])
        assert len(corners) > 3

    def test_mirrored_pictures_are_mirrored_before_they_are_numbered(self):
        picture = Image.new("RGB", (10, 6))
        seen = Coordinates().seen(picture, View(1, 2, 3, 4, flipped=True), None)
        assert np.allclose(seen[..., 0], (np.arange(60) / 60).reshape(6, 10)[2:6, 6:9])


@pytest.mark.parametrize(
    ("kind", "options", "key", "channels"),
    [
        ("edges", {}, "edges", 1),
        ("lowres", {"factor": 8}, "lowres", 3),
        ("superpixels", {"labels": 5, "segments": 20}, "segmentation", 5),
        ("coord", {}, "coord", 1),
    ],
)
def test_computed_conditions_are_a_function_of_seed_epoch_and_index(folder, kind, options, key, channels):
    root = folder()
    first, again = (train_of(root, kind, **options, seed=3) for _ in range(2))
    seen = [item_at(first, epoch)[key] for epoch in (0, 1, 2, 3)]
    assert all(torch.equal(item_at(again, epoch)[key], value) for epoch, value in enumerate(seen))
    assert any(not torch.equal(seen[0], other) for other in seen[1:])
    assert seen[0].shape == (SIZE, SIZE, channels) and seen[0].abs().max() <= 1
    batch = next(iter(loader(first, 2)))
    assert batch["image"].shape == (2, SIZE, SIZE, 3) and batch[key].shape == (2, SIZE, SIZE, channels)


def test_images_may_lie_in_the_folder_itself(originals):
    assert len(train_of(originals / "images", "edges")) == 5


class TestMistakes:
    def says(self, message, make):
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)

    def test_images_without_a_condition(self, folder):
        root = folder("depth")
        (root / "conditions/sub/3.png").unlink()
        self.says(
            r"images: got sub/3.png, expected an equally named condition \(.png, .npy\) in .*conditions for each",
            lambda: train_of(root, "depth"),
        )

    def test_conditions_without_an_image(self, folder):
        root = folder("depth")
        (root / "images/sub/3.png").unlink()
        self.says(
            r"conditions: got sub/3.png, expected an equally named image in .*images for each",
            lambda: train_of(root, "depth"),
        )

    def test_two_files_of_one_name(self, folder):
        root = folder("depth")
        shutil.copy(root / "images/sub/3.png", root / "images/sub/3.webp")
        self.says("both sub/3.png and sub/3.webp", lambda: train_of(root, "depth"))

    def test_no_folder_of_conditions(self, folder):
        self.says("got a directory without 'conditions'", lambda: train_of(folder(), "depth"))

    def test_label_out_of_range(self, folder):
        dataset = train_of(folder("segmentation"), "segmentation", labels=2, short_side=36)
        self.says(r"sub/\d.png: got the label 3, expected 0 to 1", lambda: [dataset[i] for i in range(5)])

    def test_a_worker_says_the_same(self, folder):
        dataset = train_of(folder("segmentation"), "segmentation", labels=2, short_side=36)
        self.says(r"^/.*sub/\d.png: got the label 3, expected", lambda: list(loader(dataset, 5, workers=1)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_depth_with_nan(self, folder, bad):
        root = folder("arrays")
        for path in root.glob("conditions/sub/*.npy"):
            values = np.load(path)
            values[2, 5] = bad
            np.save(path, values)
        dataset = train_of(root, "depth")
        self.says(r"sub/\d.npy: got 1 values that are not finite, the first in row 2, column 5", lambda: dataset[0])

    def test_another_shape(self, folder):
        root = folder("depth")
        for path in root.glob("conditions/sub/*.png"):
            Image.open(path).resize((30, 36)).save(path)
        self.says(
            r"sub/\d.png: got 30x36 pixels .* expected the shape of the image", lambda: train_of(root, "depth")[0]
        )

    def test_colour_where_labels_are_expected(self, folder):
        root = folder("depth")
        shutil.rmtree(root / "conditions")
        shutil.copytree(root / "images", root / "conditions")
        self.says("mode RGB, expected an indexed", lambda: train_of(root, "segmentation", labels=4)[0])

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("egdes", {}, "did you mean 'edges'"),
            (
                "edges",
                {"labels": 3},
                "labels: got a setting that the condition edges does not have, expected one of sigma",
            ),
            ("superpixels", {}, "labels: got nothing, expected the number of labels, .* add labels=..."),
            ("superpixels", {"labels": 0}, "labels: got 0"),
            ("lowres", {"factor": 7}, "expected a multiple of factor=7"),
            ("edges", {"sigma": -1}, "sigma: got -1"),
            ("edges", {"short_side": 8}, "short_side: got 8"),
            ("edges", {"labls": 8}, "did you mean 'data.labels'"),
        ],
    )
    def test_settings(self, folder, kind, options, message):
        self.says(message, lambda: train_of(folder(), kind, **options))

    def test_depth_range(self, folder):
        self.says("depth_range: got", lambda: train_of(folder("depth"), "depth", depth_range=[3, 1]))
